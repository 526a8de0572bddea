"""The state of inputs: size, time of change and content of every image, and what has changed.

A survey is a table of the items with these further columns: `size` and `mtime` (nanoseconds) of the
file that holds the image, `hash` (SHA-256 of the image's bytes, null when they cannot be read),
`width` and `height` (null when the header cannot be read), `fault` ("" or why the image cannot be
read) and `digest` (of hash, caption and metadata).
"""

import json
import os
import stat
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, NamedTuple

import pyarrow as pa

from beit3.images import open_with_pillow, read_upright_size
from beit3.machine import count_cores
from beit3.search.input_tables import HASH, ID, IMAGE_PATH, get_container, read_bytes
from beit3.search.inputs import Items

MAX_NAMED = 3
"""Ids that a message about changes names."""


class Measurement(NamedTuple):
    """The state of one image."""

    size: int
    mtime: int
    hash: str | None
    width: int | None
    height: int | None
    fault: str


@dataclass(frozen=True)
class Changes:
    """Ids of the items that differ between two surveys."""

    new: Sequence[str]
    removed: Sequence[str]
    changed: Sequence[str]

    def __bool__(self) -> bool:
        return bool(self.new or self.removed or self.changed)

    def describe(self) -> str:
        """Returns "2 changed (a.jpg, b.jpg), 1 new (c.jpg)"."""
        counts = {"changed": self.changed, "removed": self.removed, "new": self.new}
        return ", ".join(
            f"{len(ids)} {kind} ({', '.join(ids[:MAX_NAMED])}{', ...' * (len(ids) > MAX_NAMED)})"
            for kind, ids in counts.items()
            if ids
        )


def survey_items(
    items: Items, known: pa.Table | None, advance: Callable[[int, int], None]
) -> pa.Table:
    """Measures the images of all items, in parallel threads.

    Args:
        items: The items.
        known: An earlier survey; images whose path, size and time of change are in it are not read
            again.
        advance: Receives (images done, images in all).

    Returns:
        The items' table with the further columns, and a row for each fault, whose path is its id.
    """
    earlier = _index_measurements(known)
    paths, image_paths = items.list_paths(), items.table[IMAGE_PATH].to_pylist()

    def measure(index: int) -> Measurement:
        return measure_image(paths[index], earlier.get(image_paths[index]))

    measurements: list[Measurement] = []
    with ThreadPoolExecutor(4 * count_cores()) as pool:
        for measurement in pool.map(measure, range(len(paths))):
            measurements.append(measurement)
            advance(len(measurements), len(paths))
    table = _append_faults(items)
    measurements += [Measurement(0, 0, None, None, None, fault) for _, fault in items.faults]
    columns = dict(zip(Measurement._fields, zip(*measurements, strict=True), strict=True))
    kinds = {HASH: pa.string(), "fault": pa.string()}
    for name, values in columns.items():
        table = table.append_column(name, pa.array(values, kinds.get(name, pa.int64())))
    return table.append_column("digest", pa.array(_compute_digests(table), pa.string()))


def _append_faults(items: Items) -> pa.Table:
    """Returns the items' table with a row for each input that makes no item."""
    names = pa.array([name for name, _ in items.faults], pa.string())
    faults = pa.table({ID: names, IMAGE_PATH: names})
    return pa.concat_tables([items.table, faults], promote_options="default").combine_chunks()


def measure_image(path: str, earlier: Measurement | None = None) -> Measurement:
    """Reads and hashes an image, unless its file is as it was when `earlier` was measured."""
    try:
        status = os.stat(get_container(path))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        return Measurement(0, 0, None, None, None, f"cannot read image {path}: {reason}")
    if not stat.S_ISREG(status.st_mode):  # reading a pipe would wait for ever
        return Measurement(0, 0, None, None, None, f"cannot read image {path}: it is no file")
    if earlier is not None and (earlier.size, earlier.mtime) == (
        status.st_size,
        status.st_mtime_ns,
    ):
        return earlier
    width = height = digest = None
    fault = ""
    try:
        content = read_bytes(path)
        digest = sha256(content).hexdigest()
        with open_with_pillow(content, f"image {path}") as header:
            width, height = read_upright_size(header)
    except ValueError as error:
        fault = str(error)
    return Measurement(status.st_size, status.st_mtime_ns, digest, width, height, fault)


def _index_measurements(known: pa.Table | None) -> dict[str, Measurement]:
    """Returns image path -> its measurement in an earlier survey."""
    if known is None:
        return {}
    rows = zip(*(known[name].to_pylist() for name in Measurement._fields), strict=True)
    return dict(zip(known[IMAGE_PATH].to_pylist(), map(Measurement._make, rows), strict=True))


def _compute_digests(table: pa.Table) -> list[str]:
    """Returns a digest of each row without its size and time of change."""
    names = [name for name in table.column_names if name not in ("size", "mtime", "fault")]
    columns = [table[name].to_pylist() for name in names]
    return [_compute_digest([names, row]) for row in zip(*columns, strict=True)]


def _compute_digest(value: Any) -> str:
    return sha256(json.dumps(value, default=str).encode()).hexdigest()


def compare_surveys(old: pa.Table, new: pa.Table) -> Changes:
    """Returns what is different in `new`. An item is known by its id."""
    old_digests, new_digests = _index_digests(old), _index_digests(new)
    return Changes(
        new=[item for item in new_digests if item not in old_digests],
        removed=[item for item in old_digests if item not in new_digests],
        changed=[
            item
            for item, digest in new_digests.items()
            if item in old_digests and old_digests[item] != digest
        ],
    )


def _index_digests(survey: pa.Table) -> Mapping[str, str]:
    return dict(zip(survey[ID].to_pylist(), survey["digest"].to_pylist(), strict=True))
