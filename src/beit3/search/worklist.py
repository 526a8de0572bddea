"""An unfinished run of `beit3 embed`: its settings, which item goes into which shard, what is done.

It lies in `V/unfinished` until the manifest lists the shards:

    settings.json     what all shards have in common
    items.parquet     the survey with the columns `shard` (-1: none), `is_duplicate` and `is_wanted`
    manifest.json     the manifest before the run, where there was one
    inputs.parquet    the inputs of the run before, where there was one
    shard_0.json      shard 0 is complete: its rows, and the faults of images that it lacks

A shard is a function of settings and items alone, so that it does not matter which process computes
it, or when.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from beit3.files import atomic_write, flush_to_disk, read_json, write_text
from beit3.search.input_tables import ID
from beit3.search.manifest import MANIFEST, Manifest, read_manifest, write_manifest

UNFINISHED = "unfinished"
SETTINGS, ITEMS = "settings.json", "items.parquet"
INPUTS = "inputs.parquet"
"""The items of the last complete run, beside the manifest."""
NO_SHARD = -1


@dataclass(frozen=True)
class Settings:
    """What all shards of a run have in common.

    Attributes:
        weights: Path of the weights as it was given.
        fingerprint: `Predictor.fingerprint`.
        precision: Number format in which the network runs.
        dtype: Type of the stored vectors.
        dim: Length of a vector.
        modalities: Which vectors a row has.
        image_root: Directory that image paths are relative to.
        batch_size: Images that are encoded at once.
        shard_size: Items of a shard.
        first_shard: Number of the first shard of this run.
    """

    weights: str
    fingerprint: dict[str, str]
    precision: str
    dtype: str
    dim: int
    modalities: tuple[str, ...]
    image_root: str
    batch_size: int
    shard_size: int
    first_shard: int


@dataclass(frozen=True)
class Mark:
    """Says that a shard is complete.

    Attributes:
        digest: Digest of the shard's items and settings.
        rows: Rows of the shard; a shard without rows has no files.
        faults: id -> reason, of the items that have no row.
    """

    digest: str
    rows: int
    faults: dict[str, str]


def assign_shards(
    survey: pa.Table, wanted: Sequence[bool], known_hashes: set[str], *, size: int, first: int
) -> pa.Table:
    """Returns the survey with the columns `shard`, `is_duplicate` and `is_wanted`.

    Shards of distinct images come first, then those of duplicates. An image that cannot be read
    has no shard.

    Args:
        survey: The survey.
        wanted: Whether each item is to be encoded.
        known_hashes: Hashes of images that have vectors already.
        size: Items of a shard.
        first: Number of the first shard.
    """
    hashes, faults = survey["hash"].to_pylist(), survey["fault"].to_pylist()
    seen = set(known_hashes)
    distinct: list[int] = []
    duplicates: list[int] = []
    for row, (content_hash, fault) in enumerate(zip(hashes, faults, strict=True)):
        if not wanted[row] or fault:
            continue
        (duplicates if content_hash in seen else distinct).append(row)
        seen.add(content_hash)
    shards = np.full(len(hashes), NO_SHARD, dtype=np.int64)
    shards[distinct] = first + np.arange(len(distinct)) // size
    first_duplicates = first + -(-len(distinct) // size)
    shards[duplicates] = first_duplicates + np.arange(len(duplicates)) // size
    is_duplicate = np.zeros(len(hashes), dtype=bool)
    is_duplicate[duplicates] = True
    columns = {"shard": shards, "is_duplicate": is_duplicate, "is_wanted": np.array(wanted)}
    for name, values in columns.items():
        survey = survey.append_column(name, pa.array(values))
    return survey


def write_worklist(
    out: Path,
    settings: Settings,
    items: pa.Table,
    *,
    base: Manifest | None,
    base_inputs: pa.Table | None,
) -> "Worklist":
    """Writes a new worklist; shards whose items and settings stay the same remain complete.

    Args:
        out: The folder of vectors.
        settings: The settings.
        items: What `assign_shards` returns.
        base: The manifest that the run adds to, None without one.
        base_inputs: The inputs of the run that wrote `base`.
    """
    folder = out / UNFINISHED
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SETTINGS).unlink(missing_ok=True)
    (folder / MANIFEST).unlink(missing_ok=True)
    for name, table in {ITEMS: items, INPUTS: base_inputs}.items():
        if table is not None:
            with atomic_write(folder / name) as file:
                pq.write_table(table, file)
            flush_to_disk(folder / name)
    if base is not None:
        write_manifest(folder, base)
    # The settings come last: with them the worklist is complete.
    write_text(folder / SETTINGS, json.dumps(asdict(settings), indent=1) + "\n")
    flush_to_disk(folder / SETTINGS)
    return Worklist(out)


def has_worklist(out: Path) -> bool:
    """Returns whether a run in this folder is unfinished."""
    return (out / UNFINISHED / SETTINGS).is_file()


def clean_up(out: Path) -> None:
    """Removes what killed processes left half-written. Nobody else may be writing."""
    for path in [*out.glob("*.partial"), *out.glob("*/*.partial")]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    if (out / UNFINISHED).is_dir() and not has_worklist(out):
        shutil.rmtree(out / UNFINISHED)


class Worklist:
    """The worklist of the unfinished run in a folder of vectors; ValueError if it is damaged."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.folder = out / UNFINISHED
        content = read_json(self.folder / SETTINGS)
        try:
            content["modalities"] = tuple(content["modalities"])
            self.settings = Settings(**content)
            self.items: pa.Table = pq.read_table(self.folder / ITEMS)
        except (TypeError, KeyError, OSError, pa.ArrowException) as error:
            raise ValueError(
                f"{self.folder} is damaged ({error}): remove it and repeat the command"
            ) from None

    @cached_property
    def _shards(self) -> np.ndarray:
        return self.items["shard"].to_numpy()

    @cached_property
    def _duplicates(self) -> np.ndarray:
        return self.items["is_duplicate"].to_numpy(zero_copy_only=False)

    def list_shards(self, *, duplicates: bool) -> list[int]:
        """Returns the numbers of the shards of distinct images, or of those of duplicates."""
        numbers = self._shards[(self._duplicates == duplicates) & (self._shards >= 0)]
        return np.unique(numbers).tolist()

    def get_rows(self, number: int) -> np.ndarray:
        """Returns the rows of `items` that belong to a shard."""
        return np.flatnonzero(self._shards == number)

    def compute_digest(self, number: int) -> str:
        """Returns a digest of all that a shard depends on."""
        rows = self.items.take(pa.array(self.get_rows(number)))
        ids, digests = rows[ID].to_pylist(), rows["digest"].to_pylist()
        content = [
            json.dumps(asdict(self.settings), sort_keys=True),
            str(rows.schema.remove_metadata()),
            *map(":".join, zip(ids, digests, strict=True)),
        ]
        return sha256("\n".join(content).encode()).hexdigest()

    def mark_complete(self, number: int, num_rows: int, faults: Mapping[str, str]) -> None:
        """Notes that the files of a shard are on the disk."""
        mark = Mark(self.compute_digest(number), num_rows, dict(faults))
        write_text(self._mark_path(number), json.dumps(asdict(mark)))
        flush_to_disk(self._mark_path(number))

    def read_mark(self, number: int) -> Mark | None:
        """Returns the mark of a complete shard, None of a shard that is to be computed."""
        path = self._mark_path(number)
        if not path.is_file():
            return None
        mark = Mark(**read_json(path))
        return mark if mark.digest == self.compute_digest(number) else None

    def list_open(self, numbers: Sequence[int]) -> list[int]:
        """Returns those of some shards that are not complete."""
        return [number for number in numbers if self.read_mark(number) is None]

    @cached_property
    def base(self) -> Manifest | None:
        """The manifest before this run, None where there was none."""
        return read_manifest(self.folder) if (self.folder / MANIFEST).is_file() else None

    @cached_property
    def base_inputs(self) -> pa.Table | None:
        """The inputs of the run before, None where there was none."""
        return pq.read_table(self.folder / INPUTS) if self.base is not None else None

    @cached_property
    def inputs_digest(self) -> str:
        """Digest of all items and of where they are."""
        columns = [self.items[name].to_pylist() for name in (ID, "digest")]
        content = [self.settings.image_root, *map(":".join, zip(*columns, strict=True))]
        return sha256("\n".join(content).encode()).hexdigest()

    def remove(self) -> None:
        """Removes the worklist: all its shards are listed."""
        retired = self.folder.with_name(f"{UNFINISHED}.partial")
        self.folder.rename(retired)
        shutil.rmtree(retired)

    def _mark_path(self, number: int) -> Path:
        return self.folder / f"shard_{number}.json"
