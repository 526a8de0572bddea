"""Finds the files of a raw dataset and its images, and checks the fields of its entries.

Every fault of a file is a ValueError of one line that names the file, the location in it and the
remedy.
"""

import os
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
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
    """Yields the files below `raw`, sorted, as `walk_folders` finds them."""
    for folder, names in walk_folders(raw):
        yield from (Path(folder) / name for name in names)


def walk_folders(raw: Path) -> Iterator[tuple[str, list[str]]]:
    """Yields (folder, the sorted names of its files) for `raw` and the folders below it, sorted.

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
        yield folder, sorted(name for name in names if name[0] != ".")


def find_files(raw: Path, pattern: str) -> list[Path]:
    """Returns the files in `raw`, then those in the folders right below it, that match a glob.

    Raises ValueError for a pipe or a device.
    """
    return glob_files(raw, pattern) + glob_files(raw, f"*/{pattern}")


def glob_files(raw: Path, pattern: str) -> list[Path]:
    """Returns the files below `raw` that match a glob, sorted; folders of such a name are none.

    Raises ValueError for a pipe or a device, of which reading might never end.
    """
    paths = sorted(raw.glob(pattern))
    for path in paths:
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise make_pipe_error(path)
    return [path for path in paths if not path.is_dir()]


def make_pipe_error(path: str | Path) -> ValueError:
    """Returns the error for what is neither a file nor a folder, for the caller to raise."""
    return ValueError(f"{path} is a pipe or a device, not a file: remove it")


def name_kind(path: Path) -> str:
    """Returns the kind of a file that is left out, for the report: its suffix in lower case."""
    return path.suffix.lower() or "no suffix"


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
    value = entry.get(name) if isinstance(entry, dict) else None
    if isinstance(value, kind):
        return value
    found = "" if value is None else f", but {str(value)[:60]!r} ({type(value).__name__})"
    raise ValueError(
        f"{location} has no {name} ({kind.__name__}){found}: check that the file is complete and "
        "of this format"
    )


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

    A name may hold folders, also with the backslashes of Windows. A file whose name has the same
    letters in another Unicode form (é as one character or as two, as macOS writes it) is found
    where no name is equal.

    Args:
        base: Folder below which `folders` lie.
        folders: Folders to search, relative to `base`; the first with a match wins.
        also: Further folders below which `folders` are searched, after `base`.
    """

    def __init__(self, base: Path, *folders: str, also: Sequence[Path] = ()) -> None:
        self.bases = [path.absolute() for path in (base, *also)]
        self.folders = folders
        self._listings: dict[Path, dict[str, str]] = {}
        self._normalized_listings: dict[Path, dict[str, str]] = {}
        self._search_paths: dict[str, list[Path]] = {}
        self._places: dict[tuple[str, ...], list[tuple[Path, ...]]] = {}
        self._searched: dict[str, str] = {}

    def find(self, *names: str, folder: str = "") -> str:
        """Returns the absolute path of the first of `names` that exists.

        `folder` is searched first, on its own, then below each of the finder's folders. If no image
        is found, the result is a `MissingImagePath` for the first name.
        """
        if folder not in self._search_paths:
            self._search_paths[folder] = self._make_search_paths(folder)
        search_paths = self._search_paths[folder]
        keys = [_split_name(name) for name in names]
        places = self._find_places(folder, *(outer for outer, _ in keys))
        for paths in places:
            for path, name, (_, file_name) in zip(paths, names, keys, strict=True):
                listing = self._listings[path]
                if file_name in listing:
                    return listing[file_name]
                if name in listing:  # a name may hold a backslash
                    return listing[name]
        for paths in places:
            for path, (_, file_name) in zip(paths, keys, strict=True):
                image_path = self._normalize_listing(path).get(normalize_name(file_name))
                if image_path:
                    return image_path
        if folder not in self._searched:
            self._searched[folder] = describe_searched(search_paths, self.bases[0])
        return MissingImagePath(str(search_paths[0] / names[0]), self._searched[folder])

    def _find_places(self, folder: str, *outers: str) -> list[tuple[Path, ...]]:
        """Returns the folders in which names may lie whose own folders are `outers`.

        There is a tuple for each of the search paths of `folder`, with a folder for each name, but
        for those that hold no file.
        """
        key = (folder, *outers)
        if key not in self._places:
            places = [
                tuple(self._find_folder(path, outer) if outer else path for outer in outers)
                for path in self._search_paths[folder]
            ]
            for path in {path for paths in places for path in paths}:
                self._list(path)
            self._places[key] = [paths for paths in places if any(map(self._listings.get, paths))]
        return self._places[key]

    def _make_search_paths(self, folder: str) -> list[Path]:
        """Returns the folders to search for an entry's images, in order."""
        # "images" and the folder that an entry names may be nested either way.
        nested = [f"{outer}/{folder}" for outer in self.folders if outer and folder]
        folders = [*([folder] if folder else []), *self.folders, *nested]
        return [self._find_folder(base, name) for base in self.bases for name in folders]

    def _find_folder(self, base: Path, name: str) -> Path:
        """Returns a folder below `base`, by another spelling where there is none of this name."""
        if (base / name).is_dir():
            return base / name
        path = base
        for part in PurePosixPath(name.replace("\\", "/")).parts:
            entry = self._normalize_listing(path).get(normalize_name(part))
            path = Path(entry) if entry and not (path / part).is_dir() else path / part
        return path if path.is_dir() else base / name

    def _list(self, folder: Path) -> dict[str, str]:
        """Returns the paths in a folder by file name; empty where there is no such folder."""
        if folder not in self._listings:
            entries = os.scandir(folder) if folder.is_dir() else ()
            self._listings[folder] = {entry.name: entry.path for entry in entries}
        return self._listings[folder]

    def _normalize_listing(self, folder: Path) -> dict[str, str]:
        """Returns the paths in a folder by normalized file name."""
        if folder not in self._normalized_listings:
            self._normalized_listings[folder] = {
                normalize_name(name): path for name, path in self._list(folder).items()
            }
        return self._normalized_listings[folder]


def _split_name(name: str) -> tuple[str, str]:
    """Returns the folder that a name holds, or "", and the file name."""
    outer, slash, file_name = name.replace("\\", "/").rpartition("/")
    return outer or slash, file_name


def list_spellings(name: str) -> list[str]:
    """Returns a file name and its other spellings: with forward slashes, in both Unicode forms."""
    plain = name.replace("\\", "/")
    forms = [unicodedata.normalize("NFC", plain), unicodedata.normalize("NFD", plain)]
    return [*dict.fromkeys([name, plain, *forms])]


def normalize_name(name: str) -> str:
    """Returns a file name in the Unicode form that composes letters with their accents (NFC)."""
    return unicodedata.normalize("NFC", name)


def make_missing_path(folders: Sequence[Path], name: str, base: Path) -> MissingImagePath:
    """Returns the path of a missing image in the first of `folders`; `base` is for the message."""
    return MissingImagePath(str(folders[0] / name), describe_searched(folders, base))


def describe_searched(folders: Sequence[Path], base: Path) -> str:
    """Returns the names of folders for a message; those below `base` are relative to it."""
    shown = [
        os.path.relpath(folder, base) if folder.is_relative_to(base) else str(folder)
        for folder in folders
    ]
    return f"{', '.join(dict.fromkeys(shown))} of {base}"
