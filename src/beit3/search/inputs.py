"""What `beit3 embed` reads: folders of images, lists and tables of images, tar files, Parquet.

An input becomes items: an id, the path of an image, perhaps a caption, and columns of metadata.
Nothing is decoded here. What makes no item is listed with the reason.
"""

import os
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import pyarrow as pa

from beit3.data.prepare.formats.files import walk_files
from beit3.data.prepare.formats.tars import read_samples, refuse_compressed_tars
from beit3.files import format_tar_member, read_lines
from beit3.images import SUFFIXES
from beit3.search.input_tables import (
    CAPTION,
    ID,
    IMAGE_PATH,
    InputTable,
    find_image_path,
    read_input_table,
)

TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")
VIDEO, FRAME, TIME = "video", "frame", "time"
FRAME_NUMBER = re.compile(r"\d+(?=\D*$)")
"""The last number in the name of a frame's file."""

BAD_NAME = "the name is not UTF-8: rename the file"


@dataclass(frozen=True)
class InputOptions:
    """How inputs are read.

    Attributes:
        image_column: Column of a table that holds images; by default one of the usual names.
        caption_column: Column of captions; by default one of the usual names, if there is one.
        id_column: Column of ids; by default `id`, if there is one.
        image_root: Folder that paths in lists and tables are relative to; by default theirs.
        frames: Whether images are key frames, `<video>/<frame>.jpg`.
        fps: Frames of a video per second, from which the time of a frame follows; 0 = not known.
    """

    image_column: str = ""
    caption_column: str = ""
    id_column: str = ""
    image_root: str = ""
    frames: bool = False
    fps: float = 0.0


@dataclass
class Items:
    """What is embedded.

    Attributes:
        root: Absolute path of the folder that image paths are relative to.
        table: A row per item: `id` and `image_path`, `caption` where there are captions, and
            columns of metadata.
        faults: (path, reason) of each input that makes no item.
    """

    root: str
    table: pa.Table
    faults: list[tuple[str, str]] = field(default_factory=list)

    def __len__(self) -> int:
        return self.table.num_rows

    @property
    def has_captions(self) -> bool:
        return CAPTION in self.table.column_names

    def list_paths(self) -> list[str]:
        """Returns the path of each item's image, which `input_tables.read_image` reads."""
        return [os.path.join(self.root, path) for path in self.table[IMAGE_PATH].to_pylist()]


@dataclass
class _Part:
    """The items of one input. `ids` is empty where paths are the ids."""

    root: str
    paths: list[str] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    columns: Mapping[str, pa.Array] = field(default_factory=dict)
    faults: list[tuple[str, str]] = field(default_factory=list)


def list_items(inputs: Sequence[str | Path], options: InputOptions | None = None) -> Items:
    """Lists the items of one input or of several.

    Args:
        inputs: Folders of images, searched recursively, or of tar files; lists of paths (.txt);
            tables (.csv, .tsv, .jsonl, .parquet) with a column of images; tar files.
        options: Names of columns, and how key frames of videos are named.

    Raises:
        ValueError: An input is absent or of no known kind, holds no images, lacks a column, or two
            items have the same id.
    """
    options = options or InputOptions()
    _resolve.cache_clear()  # links may have changed since the last call
    parts = [_read_part(Path(path).absolute(), options) for path in inputs]
    if not parts:
        raise ValueError("there is nothing to embed: name a folder, a list, a table or tar files")
    root = os.path.commonpath([os.path.realpath(part.root) for part in parts])
    faults = [fault for part in parts for fault in part.faults]
    tables = [_make_table(part, root, options) for part in parts]
    table = pa.concat_tables(tables, promote_options="permissive").combine_chunks()
    if not len(table):
        reason = f"; the first of {len(faults)} faults: {faults[0][1]}" if faults else ""
        raise ValueError(f"{inputs[0]} holds no images: give a folder or a list of some{reason}")
    _check_ids(table[ID].to_pylist(), table[IMAGE_PATH].to_pylist())
    return Items(root, table, faults)


def _read_part(path: Path, options: InputOptions) -> _Part:
    """Lists the items of one input by its kind."""
    suffix = path.suffix.lower()
    if path.is_dir():
        tars = [file for file in walk_files(path) if file.suffix.lower() == ".tar"]
        refuse_compressed_tars(path)
        return _read_tars(path, tars) if tars else _read_folder(path)
    if not path.exists():
        raise ValueError(f"{path} does not exist: give a folder, a list, a table or tar files")
    if suffix == ".tar":
        return _read_tars(path.parent, [path])
    refuse_compressed_tars(path)
    if suffix in TABLE_SUFFIXES:
        return _read_table(path, options)
    if suffix == ".txt":
        return _read_table(path, options) if _is_table(path) else _read_list(path, options)
    if suffix in SUFFIXES:
        raise ValueError(f"{path} is one image: give its folder, or a list of images (.txt)")
    raise ValueError(
        f"{path} is no folder and no list: give .txt, {', '.join(TABLE_SUFFIXES)} or .tar"
    )


def _make_table(part: _Part, root: str, options: InputOptions) -> pa.Table:
    """Makes the table of a part, its image paths relative to `root`."""
    image_paths = [_make_relative(path, root) for path in part.paths]
    columns = {
        ID: pa.array(part.ids or image_paths, pa.string()),
        IMAGE_PATH: pa.array(image_paths, pa.string()),
    }
    table = pa.table({**columns, **part.columns})
    return add_frames(table, options) if options.frames or options.fps else table


def _make_relative(path: str, root: str) -> str:
    """Returns a path relative to the real `root`, with slashes on every system."""
    directory, name = os.path.split(path)
    return Path(os.path.relpath(os.path.join(_resolve(directory), name), root)).as_posix()


@lru_cache(maxsize=65536)
def _resolve(directory: str) -> str:
    """Returns the real path of a directory; thousands of images share one."""
    return os.path.realpath(directory)


def _check_ids(ids: Sequence[str], image_paths: Sequence[str]) -> None:
    """Raises ValueError for an id that is empty or that two items have."""
    seen: dict[str, str] = {}
    for item_id, path in zip(ids, image_paths, strict=True):
        if not item_id:
            raise ValueError(f"the item of image {path} has no id: fill the column of ids")
        if item_id in seen and item_id == path == seen[item_id]:
            raise ValueError(
                f"the image {path} is named twice: name it once, or give each row an id of its "
                "own, in a column id"
            )
        if item_id in seen:
            raise ValueError(
                f"two items have the id {item_id!r} (images {seen[item_id]} and {path}): give each "
                "its own, in a column id"
            )
        seen[item_id] = path


# Folders and lists --------------------------------------------------------------------------------


def _read_folder(folder: Path) -> _Part:
    """Lists the images below a folder, sorted by folder and name."""
    found = [str(path) for path in walk_files(folder) if path.suffix.lower() in SUFFIXES]
    paths = [path for path in found if _is_unicode(path)]
    faults = [
        (os.fsencode(os.path.relpath(path, folder)).decode("utf-8", "backslashreplace"), BAD_NAME)
        for path in sorted(set(found) - set(paths))
    ]
    if not found:
        names = [path.name for path in walk_files(folder)][:3]
        content = f"only other files ({', '.join(names)})" if names else "no files"
        raise ValueError(
            f"{folder} holds {content}: give a folder with images ({' '.join(sorted(SUFFIXES)[:9])}"
            " and others), a list or tar files"
        )
    return _Part(str(folder), paths, faults=faults)


def _is_unicode(path: str) -> bool:
    """Returns whether a path can be written into a table, which bytes of other encodings cannot."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_table(path: Path) -> bool:
    """Returns whether a .txt file begins with the header of a table, as Flickr8k's captions do."""
    header = next(read_lines(path), "").lower().strip()
    return re.match(r"(image|file\w*|path|img)\s*[,\t;|]", header) is not None


def _read_list(file: Path, options: InputOptions) -> _Part:
    """Reads a list of paths, one per line, relative to the list or to the image root."""
    base = Path(options.image_root).absolute() if options.image_root else file.parent
    names = [line.strip() for line in read_lines(file) if line.strip()]
    if not names:
        raise ValueError(f"{file} is empty: write the path of an image on each line")
    paths = [find_image_path(file, base, name) for name in names]
    return _Part(_find_root(paths, base), paths)


def _find_root(paths: Sequence[str], base: Path) -> str:
    """Returns `base`, or the folder above all images where one of them lies elsewhere."""
    real_base = os.path.realpath(base)
    folders = {_resolve(os.path.dirname(path)) for path in paths}
    inside = [os.path.commonpath([real_base, folder]) == real_base for folder in folders]
    return real_base if all(inside) else os.path.commonpath(sorted(folders))


# Tables -------------------------------------------------------------------------------------------


def _read_table(file: Path, options: InputOptions) -> _Part:
    """Reads a table with a column of images; its other columns become metadata."""
    base = Path(options.image_root).absolute() if options.image_root else file.parent
    table: InputTable = read_input_table(
        file,
        base,
        image_column=options.image_column,
        caption_column=options.caption_column,
        id_column=options.id_column,
    )
    if not table.paths:
        raise ValueError(f"{file} has no rows: write an image into each")
    return _Part(_find_root(table.paths, base), table.paths, table.ids, table.columns, table.faults)


# Tar files ----------------------------------------------------------------------------------------


def _read_tars(root: Path, tars: Sequence[Path]) -> _Part:
    """Lists the samples of tar files; ids are "tar/key", captions those beside the images."""
    part = _Part(str(root))
    captions: list[str] = []
    for tar in tars:
        name = tar.relative_to(root).with_suffix("").as_posix()
        for sample_id, path, caption, fault in _read_samples(tar, name):
            if fault:
                part.faults.append((sample_id, fault))
                continue
            part.ids.append(sample_id)
            part.paths.append(path)
            captions.append(caption)
    if any(captions):
        part.columns = {CAPTION: pa.array([text or None for text in captions], pa.string())}
    return part


def _read_samples(tar: Path, name: str) -> Iterator[tuple[str, str, str, str]]:
    """Yields (id, path, caption, fault) of each sample of a tar, and one fault where it is cut."""
    try:
        for sample in read_samples(tar, captions=True):
            has_fault = bool(sample.fault) and sample.fault != sample.caption_fault
            if sample.image is None or has_fault:
                yield f"{name}/{sample.key}", "", "", sample.fault
            else:
                path = format_tar_member(tar, *sample.image)
                yield f"{name}/{sample.key}", path, sample.text, ""
    except tarfile.TarError as error:
        yield name, "", "", str(error)


# Key frames of videos -----------------------------------------------------------------------------


def add_frames(table: pa.Table, options: InputOptions) -> pa.Table:
    """Adds the columns `video`, `frame` and `time` (seconds) that the table lacks.

    Video and frame follow from the path, `<video>/<frame number>.jpg`; the time follows from the
    frame and `fps`. Raises ValueError for a path that names no video or no frame.
    """
    if VIDEO not in table.column_names or FRAME not in table.column_names:
        videos, frames = [], []
        for path in table[IMAGE_PATH].to_pylist():
            video, _, name = path.rpartition("/")
            number = FRAME_NUMBER.search(name.rpartition(".")[0])
            if not video or number is None:
                raise ValueError(
                    f"{path} names no frame of a video: key frames lie at <video>/<number>.jpg, or "
                    f"in a table with the columns {VIDEO}, {FRAME} and {TIME}"
                )
            videos.append(video)
            frames.append(int(number[0]))
        table = _set_column(table, VIDEO, pa.array(videos, pa.string()))
        table = _set_column(table, FRAME, pa.array(frames, pa.int64()))
    if options.fps and TIME not in table.column_names:
        numbers = table[FRAME].to_pylist()
        if not all(isinstance(number, int | None) for number in numbers):
            raise ValueError(
                f"column {FRAME} holds {numbers[0]!r}, no frame number: give column {TIME}"
            )
        times = [None if number is None else number / options.fps for number in numbers]
        table = table.append_column(TIME, pa.array(times, pa.float64()))
    return table


def _set_column(table: pa.Table, name: str, values: pa.Array) -> pa.Table:
    """Appends a column unless the table has it."""
    return table if name in table.column_names else table.append_column(name, values)
