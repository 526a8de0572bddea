"""Options that several verbs share: their types, help, completion and checks."""

import math
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal

from cyclopts import App, Group, Parameter, Token

from beit3.config import suggest


def format_default(value: Any) -> str | None:
    """Returns a default as the help shows it; nothing for False, empty strings and None."""
    return str(value) if value else None


DEFAULTS = Parameter(negative=(), show_default=format_default)
"""Of all options. Flags have no `--no-` form, because all of them are off by default."""


def complete_tasks(context: Any) -> list[str]:
    """Lists the names of tasks for the shell, without importing torch as `list_tasks` does."""
    import beit3.tasks

    return [module.name for module in pkgutil.iter_modules(beit3.tasks.__path__)]


def read_whole_number(kind: type, tokens: Sequence[Token]) -> int:
    """Converts a word to an int. The library's own conversion rounds 1.5 to 2."""
    try:
        return int(tokens[0].value)
    except ValueError:
        raise ValueError(f"{tokens[0].value!r} is no whole number") from None


def read_count(kind: type, tokens: Sequence[Token]) -> int:
    """Converts a word to an int of at least 1."""
    number = read_whole_number(kind, tokens)
    if number < 1:
        raise ValueError(f"{number} is too few, expected at least 1")
    return number


def read_size(kind: type, tokens: Sequence[Token]) -> int:
    """Converts a word to an int of at least 0."""
    number = read_whole_number(kind, tokens)
    if number < 0:
        raise ValueError(f"{number} is negative, expected at least 0")
    return number


def read_amount(kind: type, tokens: Sequence[Token]) -> float:
    """Converts a word to a finite number of at least 0."""
    word = tokens[0].value
    try:
        number = float(word)
    except ValueError:
        raise ValueError(f"{word!r} is no number") from None
    if not 0 <= number < math.inf:
        raise ValueError(f"{word} is no finite number of at least 0")
    return number


def read_fraction(kind: type, tokens: Sequence[Token]) -> float:
    """Converts a word to a number of 0 to 1."""
    number = read_amount(kind, tokens)
    if number > 1:
        raise ValueError(f"{tokens[0].value} is above 1, expected 0 to 1")
    return number


TaskName = Annotated[str, Parameter(completer=complete_tasks)]
Count = Annotated[int, Parameter(converter=read_count, allow_leading_hyphen=True)]
"""A whole number of at least 1."""
Size = Annotated[int, Parameter(converter=read_size, allow_leading_hyphen=True)]
"""A whole number of at least 0."""
Amount = Annotated[float, Parameter(converter=read_amount, allow_leading_hyphen=True)]
"""A finite number of at least 0."""
Fraction = Annotated[float, Parameter(converter=read_fraction, allow_leading_hyphen=True)]
"""A number of 0 to 1."""
Word = Annotated[str, Parameter(allow_leading_hyphen=True)]
"""A word that may also be an option of the recipe or the task, which the verb reads itself."""
PrecisionName = Literal["auto", "float32", "bfloat16", "float16", "int8"]
RecordsRoot = Annotated[str, Parameter(name="--data.root")]


@Parameter(name="*", group=Group("Released files", "What a released file does not say itself."))
@dataclass(frozen=True)
class ReleasedOptions:
    """Options for released checkpoints, which hold tensors and no config."""

    task: Annotated[str | None, Parameter(completer=complete_tasks)] = None
    """The task to build, for example imagenet from retrieval weights; by default that of the
    weights."""

    num_heads: Count | None = None
    """Attention heads; by default 64 channels make one."""

    text_model: str | None = None
    """The SentencePiece file."""

    answers: str | None = None
    """The answer list of a VQA checkpoint."""

    classes: str | None = None
    """Class names for imagenet, one per line. `eval` by names takes those of the records by
    default."""

    prompt: str | None = None
    """The sentence that a class name is put into, for example "a photo of a {}"."""

    def list_given(self) -> list[str]:
        """Lists the options that were given: `--num-heads`."""
        names = [field.name for field in fields(self) if getattr(self, field.name) is not None]
        return [f"--{name.replace('_', '-')}" for name in names]


NOT_RELEASED = ReleasedOptions()


def list_options(verb: Callable[..., None]) -> list[str]:
    """Lists the options of a verb: `--init`, `--out`."""
    arguments = App(default_parameter=DEFAULTS, default_command=verb)
    return [
        name
        for argument in arguments.assemble_argument_collection()
        for name in argument.names
        if name.startswith("--")
    ]


def check_task_fields(words: Sequence[str], verb: Callable[..., None], name: str) -> None:
    """Raises ValueError for the first flag in `words` that is no `--task.field`."""
    for word in words:
        flag = word.partition("=")[0]
        if flag.startswith("--") and not flag.startswith("--task."):
            hint = suggest(flag, list_options(verb))
            raise ValueError(f"unknown option {flag}{hint}; see beit3 {name} --help")
