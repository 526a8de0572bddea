"""The table of verbs, and `main`, which runs one of them.

Errors that the user can mend are one line on stderr and status 2; `--debug` shows their traceback.
"""

import io
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from cyclopts import App, CycloptsError, Group

from beit3.cli.convert import convert_clip, convert_official, convert_timm, convert_vqkd
from beit3.cli.demo import demo, world
from beit3.cli.doctor import doctor
from beit3.cli.download import download
from beit3.cli.embed import embed
from beit3.cli.evaluate import evaluate, score
from beit3.cli.export import export
from beit3.cli.index import index
from beit3.cli.options import DEFAULTS
from beit3.cli.predict import predict
from beit3.cli.prepare import prepare
from beit3.cli.recipes import recipes
from beit3.cli.report import report
from beit3.cli.search import search
from beit3.cli.serve import serve
from beit3.cli.tokenizer import decode, encode, train_tokenizer
from beit3.cli.train import plan, train
from beit3.log_filters import hide_enum_warnings

# Threads that wait must not spin: where another program shares the cores, spinning made steps 20
# times slower. It has to be set before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

Verb = Callable[..., None]


@dataclass(frozen=True)
class SubVerbs:
    """A verb that has verbs of its own, such as `beit3 tokenizer train`."""

    help: str
    verbs: dict[str, Verb]


TOKENIZER = SubVerbs(
    "Train or use a SentencePiece text tokenizer with BEiT-3's special tokens.",
    {"train": train_tokenizer, "encode": encode, "decode": decode},
)
CONVERT = SubVerbs(
    "Convert released files to weights directories, and back.",
    {
        "official": convert_official,
        "vqkd": convert_vqkd,
        "clip": convert_clip,
        "timm": convert_timm,
    },
)

VERBS: dict[str, dict[str, Verb | SubVerbs]] = {
    "Start": {"demo": demo, "doctor": doctor},
    "Data": {"prepare": prepare, "tokenizer": TOKENIZER, "world": world},
    "Training": {"recipes": recipes, "plan": plan, "train": train, "report": report},
    "Search": {"embed": embed, "index": index, "search": search},
    "Weights": {
        "eval": evaluate,
        "predict": predict,
        "score": score,
        "convert": CONVERT,
        "serve": serve,
        "export": export,
        "download": download,
    },
}
"""Group in the help -> name -> verb."""


def build_app() -> App:
    """Builds the parser of the whole command line."""
    app = App(
        name="beit3",
        help="BEiT-3: pretrain, fine-tune, evaluate and use it.\n\n"
        "```\n"
        "beit3 serve\n"
        "beit3 demo\n"
        "beit3 train vqa demo --optim.lr 5e-4 --run.steps 200\n"
        'beit3 predict runs/vqa-demo picture.png "what color is the circle ?"\n'
        "```",
        help_epilogue="`beit3 VERB --help` explains a verb. Any verb takes `--debug`, which shows "
        "the traceback of an error.",
        help_format="markdown",
        default_parameter=DEFAULTS,
        result_action="return_value",
        # `main` reports errors and interrupts itself.
        exit_on_error=False,
        print_error=False,
        verbose=False,
        suppress_keyboard_interrupt=False,
    )
    for title, verbs in VERBS.items():
        group = Group.create_ordered(title)
        for position, (name, verb) in enumerate(verbs.items()):
            if callable(verb):
                app.command(verb, name=name, group=group, sort_key=position)
            else:
                app.command(build_sub_app(name, verb, group=group, sort_key=position))
    options = Group.create_ordered("Options")
    app["--help"].group = app["--version"].group = options
    app.register_install_completion_command(
        help="Install completion for bash, zsh, fish or PowerShell.", group=options
    )
    return app


def build_sub_app(name: str, verbs: SubVerbs, *, group: Group, sort_key: int) -> App:
    """Builds the parser of a verb that has verbs of its own."""
    app = App(name=name, help=verbs.help, group=group, sort_key=sort_key)
    for position, (sub_name, verb) in enumerate(verbs.verbs.items()):
        app.command(verb, name=sub_name, sort_key=position)
    return app


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb.

    Args:
        arguments: The words of the command line after `beit3`; those of the process by default.

    Returns:
        The exit status: 0, 2 for an error that the user can mend, 130 for Ctrl-C, 128 + the
        number of another signal.
    """
    hide_enum_warnings()
    escape_unprintable_output()
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    app = build_app()
    if not words:
        app.help_print([])
        return 2
    try:
        app(words)
    except KeyboardInterrupt as interrupt:
        message = str(interrupt) or "interrupted; the same command resumes from the last checkpoint"
        print(f"\n{message}", file=sys.stderr)
        # Training raises a subclass with the signal's status. Its class is not imported here: that
        # would load torch, perhaps in the middle of an interrupted import.
        return getattr(interrupt, "status", 130)
    except (CycloptsError, ValueError, FloatingPointError, OSError) as error:
        if debug:
            raise
        message = explain_usage(error) if isinstance(error, CycloptsError) else str(error)
        print(f"beit3: {' '.join(message.split())}", file=sys.stderr)
        return 2
    return 0


def explain_usage(error: CycloptsError) -> str:
    """Returns an error of the parser with the command that explains the verb."""
    message = str(error).strip()
    if not message.endswith("..."):
        message = message.removesuffix(".")
    command = " ".join(["beit3", *(error.command_chain or ()), "--help"])
    return f"{message[:1].lower()}{message[1:]}; see {command}"


def escape_unprintable_output() -> None:
    """Prints characters that the console's encoding lacks as escapes.

    Consoles of Windows, and files that their output goes to, are often in cp1252. A file name in
    Chinese would end a run there.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def read_command(words: Sequence[str]) -> tuple[Verb, dict[str, Any]]:
    """Parses a command line without running it: returns the verb and its arguments by name."""
    command, bound, _ = build_app().parse_args(list(words))
    return command, bound.arguments
