"""Finds the files of a raw dataset and its images, and checks the fields of its entries.

Every fault of a file is a ValueError of one line that names the file, the location in it and the
remedy.
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

FLICKR30K_FOLDERS = ("flickr30k-images", "flickr30k_images")
"""Folders to which Flickr30k's images unpack."""


def find_folder(raw: str | Path) -> Path:
    """Returns `raw` as an absolute path. Raises ValueError unless it is a folder."""
    raw = Path(raw).absolute()
    if not raw.is_dir():
        raise ValueError(f"raw folder {raw} does not exist: give the folder that holds the dataset")
    return raw


def walk_files(raw: Path) -> Iterator[Path]:
    """Yields the files below `raw`, sorted.

    Links are followed once. Hidden files and folders and what macOS leaves behind are skipped.
    """
    visited = set()
    for folder, subfolders, names in os.walk(raw, followlinks=True):
        real_path = os.path.realpath(folder)
        if real_path in visited:
            subfolders.clear()
            continue
        visited.add(real_path)
        subfolders[:] = sorted(name for name in subfolders if name[0] not in "._")
        yield from (Path(folder) / name for name in sorted(names) if name[0] != ".")


def find_files(raw: Path, pattern: str) -> list[Path]:
    """Returns the files in `raw`, then those in the folders right below it, that match a glob."""
    return sorted(raw.glob(pattern)) + sorted(raw.glob(f"*/{pattern}"))


def find_single_file(raw: str | Path, pattern: str, content: str) -> Path:
    """Returns `raw` if it is a file, else the only file in or right below it that matches a glob.

    `content` says what the file holds, for the ValueError when there is none or more than one.
    """
    raw = Path(raw).absolute()
    files = [raw] if raw.is_file() else find_files(find_folder(raw), pattern)
    if len(files) != 1:
        names = ", ".join(file.name for file in files) or "none"
        raise ValueError(f"{raw} should hold {content} in one file {pattern}; it holds {names}")
    return files[0]


def make_unknown_error(raw: Path, formats: str) -> ValueError:
    """Returns the error for a folder or file that no reader understands, for the caller to raise.

    `formats` names the files that would be understood.
    """
    return ValueError(f"no known format in {raw}: it should hold one of {formats}")


def get_field(entry: Any, name: str, kind: type, location: str | Path) -> Any:
    """Returns `entry[name]`.

    Raises ValueError that begins with `location` unless `entry` is a dict with a value of this kind
    under `name`.
    """
    if not isinstance(entry, dict) or not isinstance(entry.get(name), kind):
        raise ValueError(
            f"{location} has no {name} ({kind.__name__}): check that the file is complete and of "
            "this format"
        )
    return entry[name]


# Images -------------------------------------------------------------------------------------------


class MissingImagePath(str):
    """The path at which a missing image was expected. `searched` names all folders searched."""

    searched: str

    def __new__(cls, path: str, searched: str) -> "MissingImagePath":
        instance = super().__new__(cls, path)
        instance.searched = searched
        return instance


class ImageFinder:
    """Finds images by name in several folders, each of which is listed once.

    Args:
        base: Folder below which `folders` lie.
        folders: Folders to search, relative to `base`; the first with a match wins.
        also: Further folders below which `folders` are searched, after `base`.
    """

    def __init__(self, base: Path, *folders: str, also: Sequence[Path] = ()) -> None:
        self.bases = [path.absolute() for path in (base, *also)]
        self.folders = folders
        self._listings: dict[Path, dict[str, str]] = {}
        self._search_paths: dict[str, list[Path]] = {}

    def find(self, *names: str, folder: str = "") -> str:
        """Returns the absolute path of the first of `names` that exists.

        `folder` is searched first, on its own, then below each of the finder's folders. If no image
        is found, the result is a `MissingImagePath` for the first name.
        """
        if folder not in self._search_paths:
            self._search_paths[folder] = self._make_search_paths(folder)
        for path in self._search_paths[folder]:
            listing = self._list(path)
            for name in names:
                if name in listing:
                    return listing[name]
        return make_missing_path(self._search_paths[folder], names[0], self.bases[0])

    def _make_search_paths(self, folder: str) -> list[Path]:
        """Returns the folders to search for an entry's images, in order."""
        # "images" and the folder that an entry names may be nested either way.
        nested = [f"{outer}/{folder}" for outer in self.folders if outer and folder]
        folders = [*([folder] if folder else []), *self.folders, *nested]
        return [base / name for base in self.bases for name in folders]

    def _list(self, folder: Path) -> dict[str, str]:
        """Returns the paths in a folder by file name; empty where there is no such folder."""
        if folder not in self._listings:
            entries = os.scandir(folder) if folder.is_dir() else ()
            self._listings[folder] = {entry.name: entry.path for entry in entries}
        return self._listings[folder]


def make_missing_path(folders: Sequence[Path], name: str, base: Path) -> MissingImagePath:
    """Returns the path of a missing image in the first of `folders`.

    Folders below `base` are named relative to it in `searched`.
    """
    shown = [
        os.path.relpath(folder, base) if folder.is_relative_to(base) else str(folder)
        for folder in folders
    ]
    return MissingImagePath(str(folders[0] / name), f"{', '.join(dict.fromkeys(shown))} of {base}")
