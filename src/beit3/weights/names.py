"""Names of weights: what a user writes where weights are expected becomes a path.

In this order, a name is

1. a path that exists: a weights directory, a run, or a file (a folder without weights is no
   obstacle to a name: `beit3 world --out world` makes a folder world/vqa);
2. `hf:owner/name` or `hf:owner/name@revision`: a repository of the Hugging Face hub;
3. the name of weights that ship with this package, such as `world/vqa`;
4. the name of a released file that `beit3 download` has fetched, with or without its ending.

Only `hf:` ever reaches the network.
"""

from importlib.resources import files
from pathlib import Path

from beit3.config import suggest
from beit3.weights import hub
from beit3.weights.catalog import describe_file
from beit3.weights.released import find_downloaded

HUB_PREFIX = "hf:"
SHIPPED = Path(str(files("beit3") / "shipped"))
"""Weights directories that are part of the package: `shipped/world/vqa` is named world/vqa."""


def find_path(name: str | Path) -> Path:
    """Returns the path of weights: a directory or a file.

    Raises ValueError, one line that says what would work, where there are none of that name.
    """
    if path := find_local(name):
        return path
    if isinstance(name, str) and name.startswith(HUB_PREFIX):
        repository, _, revision = name.removeprefix(HUB_PREFIX).partition("@")
        return hub.fetch_folder(repository, revision=revision or None)
    raise ValueError(explain_missing(name))


def find_local(name: str | Path) -> Path | None:
    """Returns the path of weights that are on this machine, as `find_path` does, or None."""
    path = Path(name)
    named = find_shipped(name) or (find_downloaded(str(name)) if is_bare(name) else None)
    if path.exists() and (named is None or holds_weights(path)):
        return path
    return named


def holds_weights(path: Path) -> bool:
    """Returns whether a path is a file, a weights directory, a run or an export."""
    files = ("model.safetensors", "best/model.safetensors", "last/model.safetensors", "export.json")
    return path.is_file() or any((path / file).is_file() for file in files)


def is_there(name: str | Path) -> bool:
    """Returns whether weights of this name are on this machine."""
    return find_local(name) is not None


def find_pretrained(
    name: str | Path,
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Path:
    """Returns the path of weights as `find_path` does, but takes owner/name for a repository too.

    The options are those of `beit3.weights.hub.fetch_folder`.

    Raises ValueError where there are no such weights, and for a revision of what is no repository.
    """
    text = str(name).removeprefix(HUB_PREFIX)
    is_local = find_local(name) is not None or is_bare(name)
    if is_local or not hub.REPOSITORY.fullmatch(text.partition("@")[0]):
        if revision is not None:
            raise ValueError(f"{name} is no repository of the hub: leave revision out")
        return find_path(name)
    repository, _, own_revision = text.partition("@")
    return hub.fetch_folder(
        repository,
        revision=revision or own_revision or None,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
    )


def is_bare(name: str | Path) -> bool:
    """Returns whether a name has no directory in front of it."""
    return Path(name).name == str(name)


def list_shipped() -> list[str]:
    """Returns the names of the weights that ship with this package."""
    return sorted(path.parent.relative_to(SHIPPED).as_posix() for path in _list_models())


def find_shipped(name: str | Path) -> Path | None:
    """Returns the directory of shipped weights of this name, or None."""
    return SHIPPED / name if Path(name).as_posix() in list_shipped() else None


def _list_models() -> list[Path]:
    return list(SHIPPED.glob("*/*/model.safetensors"))


def explain_missing(name: str | Path) -> str:
    """Returns the error for weights that are not there: what the name may mean, and what works."""
    remedy = describe_file(Path(name).name)
    if not remedy:
        shipped = list_shipped()
        hint = suggest(Path(name).as_posix(), shipped).removeprefix("; ")
        remedy = hint or "give a released .pth file or a directory of weights"
        if shipped:
            remedy += f"; the weights that ship are {', '.join(shipped)}"
    return f"no weights at {name}: {remedy}"
