"""A folder of vectors: shards of memory-mapped vectors and metadata behind one manifest.

Readers see the shards that the manifest lists. Writers add files under new names and then replace
the manifest, so that a reader sees a write whole or not at all.
"""

import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from filelock import FileLock, Timeout

from beit3.files import atomic_write, flush_to_disk
from beit3.search.manifest import MANIFEST, Manifest, Shard, commit, read_manifest
from beit3.search.metadata import ID, join_tables, normalize_metadata, unify_schemas
from beit3.search.sketch import Sketch, open_sketch, write_sketch

VECTOR_DIRECTORIES = {"image": "img_emb", "text": "text_emb"}
LOCK = "write.lock"
MAX_NORM = 1.01
"""Largest length of a vector: unit vectors, rounded. The bound of exact search relies on it."""
OPEN_ATTEMPTS = 20
"""How often a reader opens a folder anew because a writer replaced its files meanwhile."""

# Files of a shard -----------------------------------------------------------------------------


def get_vectors_path(folder: str | Path, number: int, modality: str) -> Path:
    """Returns the path of a shard's vectors, as in "V/img_emb/img_emb_0.npy"."""
    name = VECTOR_DIRECTORIES[modality]
    return Path(folder) / name / f"{name}_{number}.npy"


def get_metadata_path(folder: str | Path, number: int) -> Path:
    """Returns the path of a shard's metadata, as in "V/metadata/metadata_0.parquet"."""
    return Path(folder) / "metadata" / f"metadata_{number}.parquet"


def write_shard(
    folder: str | Path,
    number: int,
    vectors: Mapping[str, np.ndarray],
    metadata: pa.Table,
    *,
    dtype: str = "float16",
) -> Shard:
    """Writes the files of one shard under their final names; readers see it after `commit`.

    Each file is written under a temporary name first. The metadata come last, so that a shard with
    metadata is complete (`find_shard`).

    Args:
        folder: The folder of vectors.
        number: Number of the shard; files of that number are replaced.
        vectors: "image" and perhaps "text" -> unit vectors [rows, dim]. A row without a caption has
            zeros as its text vector.
        metadata: One row per vector; the column `id` holds distinct strings.
        dtype: float16 or float32.
    """
    metadata = normalize_metadata(metadata)
    for modality, rows in vectors.items():
        if rows.ndim != 2 or len(rows) != metadata.num_rows:
            raise ValueError(
                f"{folder} shard {number}: {modality} vectors of shape {rows.shape} for "
                f"{metadata.num_rows} rows of metadata; they should have a row each"
            )
        norms = np.linalg.norm(rows.astype(np.float32), axis=1)
        if not (norms <= MAX_NORM).all():
            raise ValueError(
                f"{folder} shard {number}: {modality} vectors should have the length 1, row "
                f"{int(np.flatnonzero(~(norms <= MAX_NORM))[0])} has {np.max(norms):.4g}"
            )
        stored = np.ascontiguousarray(rows, dtype=dtype)
        with atomic_write(get_vectors_path(folder, number, modality)) as file:
            np.save(file, stored)
            file.flush()
            os.fsync(file.fileno())
        write_sketch(folder, number, modality, stored)
    with atomic_write(get_metadata_path(folder, number)) as file:
        pq.write_table(metadata, file)
        file.flush()
        os.fsync(file.fileno())
    for modality in vectors:
        flush_to_disk(get_vectors_path(folder, number, modality).parent)
    flush_to_disk(get_metadata_path(folder, number).parent)
    return Shard(number, metadata.num_rows)


def find_shard(folder: str | Path, number: int, modalities: Iterable[str]) -> Shard | None:
    """Returns a shard whose files are complete, or None. Whether it is listed does not matter."""
    paths = [get_vectors_path(folder, number, modality) for modality in modalities]
    metadata = get_metadata_path(folder, number)
    if not all(path.is_file() for path in [*paths, metadata]):
        return None
    return Shard(number, pq.read_metadata(metadata).num_rows)


# Reading --------------------------------------------------------------------------------------


class VectorFolder:
    """One generation of a folder of vectors, open for reading.

    Vectors are memory-mapped, metadata columns are read when they are asked for. What a writer
    does later is not seen; `open_folder` again shows it.
    """

    def __init__(self, path: str | Path, manifest: Manifest):
        self.path = Path(path)
        self.manifest = manifest
        self._vectors = {
            modality: [_map_vectors(self.path, manifest, shard, modality) for shard in self.shards]
            for modality in manifest.modalities
        }
        self._sketches = {
            modality: [
                open_sketch(self.path, shard.number, modality, vectors)
                for shard, vectors in zip(self.shards, self._vectors[modality], strict=True)
            ]
            for modality in manifest.modalities
        }
        self._metadata = [_open_metadata(self.path, shard) for shard in self.shards]
        self.schema = unify_schemas([file.schema_arrow for file in self._metadata])
        self.deleted = _read_deleted(self.path, manifest)
        self._columns: dict[str, pa.ChunkedArray] = {}
        self._reading = threading.Lock()

    @property
    def shards(self) -> tuple[Shard, ...]:
        return self.manifest.shards

    @property
    def num_rows(self) -> int:
        """Number of rows that are not deleted."""
        return self.manifest.num_rows - len(self.deleted)

    def get_vectors(self, modality: str = "image") -> list[np.ndarray]:
        """Returns the memory-mapped vectors [rows, dim] of each shard."""
        if modality not in self._vectors:
            raise ValueError(
                f"{self.path} holds no {modality} vectors, only {' and '.join(self._vectors)} ones"
            )
        return self._vectors[modality]

    def get_sketches(self, modality: str = "image") -> list[Sketch | None]:
        """Returns the 8-bit copy of each shard's vectors, None where a shard has none."""
        return self._sketches[modality]

    def gather_vectors(self, rows: np.ndarray, modality: str = "image") -> np.ndarray:
        """Returns the vectors [len(rows), dim] of some rows, as float32."""
        gathered = np.empty((len(rows), self.manifest.dim), dtype=np.float32)
        starts = self.shard_starts
        shard_of_row = np.searchsorted(starts, rows, side="right") - 1
        for number, vectors in enumerate(self.get_vectors(modality)):
            positions = np.flatnonzero(shard_of_row == number)
            gathered[positions] = vectors[rows[positions] - starts[number]]
        return gathered

    @cached_property
    def shard_starts(self) -> np.ndarray:
        """Row number at which each shard begins."""
        return np.cumsum([0, *(shard.rows for shard in self.shards)])[:-1]

    @cached_property
    def alive(self) -> np.ndarray:
        """Whether each row is not deleted: bool [all rows]."""
        alive = np.ones(self.manifest.num_rows, dtype=bool)
        alive[self.deleted] = False
        return alive

    def read_column(self, name: str) -> pa.ChunkedArray:
        """Returns a metadata column of all rows, deleted ones included. It is read once.

        Several threads may call it: a Parquet file is read by one thread at a time.
        """
        if name not in self._columns:
            with self._reading:
                if name not in self._columns:
                    shards = range(len(self.shards))
                    table = join_tables([self._read_shard(shard, [name]) for shard in shards])
                    self._columns[name] = table.column(name)
        return self._columns[name]

    def read_columns(self, names: Sequence[str]) -> pa.Table:
        """Returns metadata columns of all rows, deleted ones included."""
        return pa.table({name: self.read_column(name) for name in names})

    def read_rows(self, rows: np.ndarray, names: Sequence[str] | None = None) -> pa.Table:
        """Returns the metadata of some rows, in their order: all columns, or those in `names`."""
        table = self.read_columns(list(self.schema.names if names is None else names))
        return table.take(pa.array(rows, type=pa.int64()))

    def find_rows(self, ids: Sequence[str]) -> np.ndarray:
        """Returns the row number of each id, -1 where no row that is alive has it."""
        positions = pc.index_in(
            pa.array(list(ids), type=pa.string()), value_set=self._alive_ids.combine_chunks()
        )
        positions = positions.fill_null(-1).to_numpy(zero_copy_only=False)
        rows = np.append(np.flatnonzero(self.alive), -1)
        return rows[positions]

    @cached_property
    def _alive_ids(self) -> pa.ChunkedArray:
        """Ids of the rows that are alive, in the order of the rows."""
        ids = self.read_column(ID)
        return ids.filter(pa.array(self.alive)) if len(self.deleted) else ids

    def _read_shard(self, position: int, names: Sequence[str]) -> pa.Table:
        """Reads columns of one shard; one that the shard lacks is filled with nulls."""
        file = self._metadata[position]
        present = [name for name in names if name in file.schema_arrow.names]
        table = file.read(columns=present)
        fields = [self.schema.field(name) for name in names]
        rows = self.shards[position].rows
        columns = [
            table.column(field.name).cast(field.type)
            if field.name in present
            else pa.nulls(rows, field.type)
            for field in fields
        ]
        return pa.table(columns, schema=pa.schema(fields))


def open_folder(path: str | Path) -> VectorFolder:
    """Opens a folder of vectors; raises ValueError when it is none, or when a file is damaged."""
    manifest = read_manifest(path)
    for _ in range(OPEN_ATTEMPTS):
        try:
            return VectorFolder(path, manifest)
        except ValueError:
            # A writer may have removed files of this generation while they were being opened.
            newest = read_manifest(path)
            if newest.generation == manifest.generation:
                raise
            manifest = newest
    raise ValueError(f"{path} is being rewritten all the time: try again later")


def _map_vectors(folder: Path, manifest: Manifest, shard: Shard, modality: str) -> np.ndarray:
    """Maps the vectors of a shard into memory, and checks that they are what is listed."""
    path = get_vectors_path(folder, shard.number, modality)
    try:
        vectors = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise ValueError(f"{path} is missing, {folder / MANIFEST} lists it: embed again") from None
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{path} is truncated or damaged ({error}): embed again") from None
    expected = (shard.rows, manifest.dim)
    if vectors.shape != expected or vectors.dtype != manifest.dtype:
        raise ValueError(
            f"{path} holds {vectors.dtype} {list(vectors.shape)}, {folder / MANIFEST} says "
            f"{manifest.dtype} {list(expected)}: embed again"
        )
    return vectors


def _open_metadata(folder: Path, shard: Shard) -> pq.ParquetFile:
    """Opens the metadata of a shard, and checks that they have the rows that are listed."""
    path = get_metadata_path(folder, shard.number)
    try:
        file = pq.ParquetFile(path, memory_map=True)
    except FileNotFoundError:
        raise ValueError(f"{path} is missing, {folder / MANIFEST} lists it: embed again") from None
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is truncated or damaged ({error}): embed again") from None
    if file.metadata.num_rows != shard.rows or ID not in file.schema_arrow.names:
        raise ValueError(
            f"{path} has {file.metadata.num_rows} rows, {folder / MANIFEST} says {shard.rows} with "
            f"a column {ID}: embed again"
        )
    return file


def _read_deleted(folder: Path, manifest: Manifest) -> np.ndarray:
    """Returns the sorted row numbers that are deleted."""
    if not manifest.deleted:
        return np.zeros(0, dtype=np.int64)
    path = folder / manifest.deleted
    try:
        rows = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{path} is missing or damaged ({error}): embed again") from None
    if rows.dtype != np.int64 or rows.ndim != 1 or (rows >= manifest.num_rows).any():
        raise ValueError(f"{path} holds row numbers beyond {manifest.num_rows}: embed again")
    return rows


# Writing --------------------------------------------------------------------------------------

Batch = tuple[Mapping[str, np.ndarray], pa.Table]
"""Vectors by modality, and metadata."""


@contextmanager
def lock_for_writing(folder: str | Path) -> Iterator[None]:
    """Keeps other writers out for the block; raises ValueError at once when there is one."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    lock = FileLock(Path(folder) / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(
            f"{folder} is being written by another process: wait until it has ended"
        ) from None
    try:
        yield
    finally:
        lock.release()


def append_rows(
    folder: str | Path, vectors: Mapping[str, np.ndarray], metadata: pa.Table
) -> Manifest:
    """Adds rows as a new shard. Raises ValueError when an id is there already."""
    return change_rows(folder, [(vectors, metadata)], replace=False)


def replace_rows(
    folder: str | Path, vectors: Mapping[str, np.ndarray], metadata: pa.Table
) -> Manifest:
    """Adds rows as a new shard, and deletes those that had their ids, in one generation."""
    return change_rows(folder, [(vectors, metadata)], replace=True)


def delete_rows(folder: str | Path, ids: Sequence[str]) -> int:
    """Deletes rows by their ids, and returns how many. Raises ValueError for unknown ids."""
    with lock_for_writing(folder):
        current = open_folder(folder)
        rows = current.find_rows(ids)
        missing = [item for item, row in zip(ids, rows, strict=True) if row < 0]
        if missing:
            raise ValueError(
                f"{folder} has no row with id {missing[0]!r} ({len(missing)} in all): give ids as "
                "`beit3 search` prints them"
            )
        rows = np.unique(rows)
        if len(rows):
            commit(folder, current.manifest, deleted=write_deleted(current, rows))
            _remove_old_deleted(current)
        return len(rows)


def change_rows(folder: str | Path, batches: Iterable[Batch], *, replace: bool) -> Manifest:
    """Appends rows in one generation, a shard for each batch; `replace` deletes those of their ids.

    Args:
        folder: The folder of vectors.
        batches: Vectors and metadata, as `write_shard` takes them.
        replace: Whether rows with the same ids are deleted; otherwise they raise ValueError.
    """
    with lock_for_writing(folder):
        current = open_folder(folder)
        manifest = current.manifest
        shards = list(manifest.shards)
        schema = current.schema
        replaced: list[np.ndarray] = []
        ids: set[str] = set()
        for vectors, metadata in batches:
            metadata = normalize_metadata(metadata)
            if metadata.num_rows == 0:
                continue
            _check_vectors(current, vectors)
            schema = unify_schemas([schema, metadata.schema])
            replaced.append(_find_present(current, metadata, ids, replace=replace))
            number = max((shard.number for shard in shards), default=-1) + 1
            shards.append(write_shard(folder, number, vectors, metadata, dtype=manifest.dtype))
        if len(shards) == len(manifest.shards):
            return manifest
        rows = np.concatenate(replaced)
        deleted = write_deleted(current, rows) if len(rows) else manifest.deleted
        changed = commit(folder, manifest, shards=tuple(shards), deleted=deleted)
        if deleted != manifest.deleted:
            _remove_old_deleted(current)
        return changed


def _find_present(
    current: VectorFolder, metadata: pa.Table, earlier: set[str], *, replace: bool
) -> np.ndarray:
    """Returns the rows that have the ids of new rows; ValueError unless they may be replaced.

    `earlier` are the ids of the batches before, to which those of this one are added.
    """
    ids = metadata.column(ID).to_pylist()
    rows = current.find_rows(ids)
    double = [name for name in ids if name in earlier]
    if double:
        raise ValueError(
            f"several of the rows that are added to {current.path} have the id {double[0]!r} "
            f"({len(double)} such ids): give each row an id of its own"
        )
    present = [name for name, row in zip(ids, rows, strict=True) if row >= 0]
    if present and not replace:
        raise ValueError(
            f"{current.path} has a row with id {present[0]!r} ({len(present)} such ids): use "
            "`beit3 index --replace` or the store's `replace`"
        )
    earlier.update(ids)
    return rows[rows >= 0]


def _check_vectors(current: VectorFolder, vectors: Mapping[str, np.ndarray]) -> None:
    """Raises ValueError unless new vectors have the modalities and the length of the folder's."""
    manifest = current.manifest
    if set(vectors) != set(manifest.modalities):
        raise ValueError(
            f"{current.path} holds {' and '.join(manifest.modalities)} vectors, "
            f"{' and '.join(sorted(vectors)) or 'none'} are given: give the same ones"
        )
    for modality, rows in vectors.items():
        if rows.shape[1:] != (manifest.dim,):
            raise ValueError(
                f"{current.path} holds vectors of length {manifest.dim}, the {modality} vectors "
                f"that are given have the shape {list(rows.shape)}"
            )


def write_deleted(current: VectorFolder, rows: np.ndarray) -> str:
    """Writes the deleted rows together with those before, and returns the file's name.

    It belongs to the next generation, which `commit` writes.
    """
    name = f"deleted_{current.manifest.generation + 1}.npy"
    with atomic_write(current.path / name) as file:
        np.save(file, np.union1d(current.deleted, rows).astype(np.int64))
        file.flush()
        os.fsync(file.fileno())
    return name


def _remove_old_deleted(current: VectorFolder) -> None:
    """Removes the file of deleted rows that a new generation has replaced."""
    if current.manifest.deleted:
        (current.path / current.manifest.deleted).unlink(missing_ok=True)
