"""Weights directories as repositories of the Hugging Face hub (extra `hub`).

A repository holds the files of a weights directory (`beit3.weights.store`) and a model card. Only
these files are fetched, no code, no pickles and nothing in subfolders, and only when a repository
is named.
"""

import re
from pathlib import Path
from types import ModuleType

REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*")
"""owner/name. `./weights` and `../weights` are paths."""
MODEL_FILE = "model.safetensors"
FETCHED = (MODEL_FILE, "config.json", "text.model")
"""The files that are fetched: those of a weights directory. The hub takes them for patterns whose
`*` stands for `/` too, so that `*.json` would fetch every subfolder's."""
PUSHED = (*FETCHED, "README.md")


def fetch_folder(
    name: str,
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Path:
    """Fetches a repository into the hub's cache and returns its folder.

    Files that the cache holds are not fetched again.

    Args:
        name: The repository, as owner/name.
        revision: A branch, tag or commit; by default the main branch.
        token: Access token; by default the one that `hf auth login` stored.
        cache_dir: The cache; by default the hub's own.
        local_files_only: Take what the cache holds and do not use the network.

    Raises:
        ValueError: There is no such repository, it holds no weights, or it cannot be fetched.
    """
    check_name(name)
    huggingface_hub = _import_hub()
    try:
        folder = huggingface_hub.snapshot_download(
            name,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            allow_patterns=list(FETCHED),
        )
    # The library raises its own errors, those of its HTTP client, OSError and ValueError.
    except Exception as error:
        raise ValueError(_explain(name, error)) from None
    if not (Path(folder) / MODEL_FILE).is_file():
        raise ValueError(
            f"{name} on the hub has no {MODEL_FILE}: give a repository that save_pretrained wrote"
        )
    return Path(folder)


def push_folder(
    folder: str | Path, name: str, *, private: bool = False, token: str | None = None
) -> str:
    """Uploads a weights directory as a repository, which is created if need be; returns its URL.

    Args:
        folder: A directory that `save_pretrained` or `beit3 train` wrote.
        name: The repository, as owner/name.
        private: Whether a new repository can be seen by its owner alone.
        token: Access token; by default the one that `hf auth login` stored.

    Raises:
        ValueError: The name has another form, or the upload failed.
    """
    check_name(name)
    api = _import_hub().HfApi(token=token)
    try:
        url = api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=name,
            folder_path=folder,
            allow_patterns=list(PUSHED),
            commit_message="Weights of beit3",
        )
    except Exception as error:  # as in fetch_folder
        raise ValueError(_explain(name, error)) from None
    return str(url)


def check_name(name: str) -> None:
    """Raises ValueError for what is no name of a repository."""
    if not REPOSITORY.fullmatch(name) or ".." in name:
        raise ValueError(f"{name!r} is no repository of the hub: give owner/name")


def _import_hub() -> ModuleType:
    try:
        import huggingface_hub
    except ImportError:
        raise ValueError(
            "the hub needs the package huggingface_hub: pip install 'beit3[hub]'"
        ) from None
    return huggingface_hub


def _explain(name: str, error: Exception) -> str:
    """Returns a one-line error of the hub's, which often has many lines: the first two say it."""
    lines = [line.strip().rstrip(".:") for line in str(error).splitlines() if line.strip()]
    return f"{name} on the hub: {'; '.join(lines[:2]) or type(error).__name__}"
