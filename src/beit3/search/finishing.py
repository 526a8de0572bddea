"""The end of a run of `beit3 embed`: the list of inputs, the skipped ones, and the manifest."""

import csv
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from beit3.files import atomic_write, flush_to_disk, write_text
from beit3.search.folder import get_vectors_path, open_folder, write_deleted
from beit3.search.input_tables import HASH, ID, IMAGE_PATH
from beit3.search.manifest import Manifest, Shard, commit
from beit3.search.sketch import remove_sketch
from beit3.search.survey import compare_surveys
from beit3.search.worklist import INPUTS, Mark, Worklist

SKIPPED = "skipped.csv"
BROKEN, DUPLICATE = "broken", "duplicate"


@dataclass(frozen=True)
class EmbedReport:
    """What a folder of vectors holds now.

    Attributes:
        rows: Rows that are not deleted.
        broken: Inputs that could not be read.
        duplicates: Rows whose image vectors were copied from another row of the same content.
        changes: How the inputs differed from the last run's, "" for a new folder or no change.
        is_unchanged: Whether the folder was complete already.
        precision: Number format in which the network ran.
    """

    rows: int
    broken: int
    duplicates: int
    changes: str
    is_unchanged: bool
    precision: str

    def describe(self, out: str | Path) -> str:
        """Returns the report as one line."""
        skipped = [
            f"{count} {kind}"
            for count, kind in ((self.broken, "broken"), (self.duplicates, "duplicate"))
            if count
        ]
        listed = f"; {Path(out) / SKIPPED} lists {' and '.join(skipped)} inputs" if skipped else ""
        state = (
            "is complete and unchanged" if self.is_unchanged else f"computed in {self.precision}"
        )
        changes = f" ({self.changes})" if self.changes else ""
        return f"{out}: {self.rows} vectors, {state}{changes}{listed}"


def finish(worklist: Worklist) -> None:
    """Lists the shards of a worklist, all of which are complete, in the manifest.

    A run that is killed in here can call it again.

    Raises:
        ValueError: None of the inputs can be read.
    """
    out, base = worklist.out, worklist.base
    inputs = _list_inputs(worklist)
    marks = _read_marks(worklist)
    shards = tuple(Shard(number, mark.rows) for number, mark in marks.items() if mark.rows)
    if base is None and not shards:
        faults = pc.drop_null(inputs["detail"].combine_chunks()).to_pylist()
        raise ValueError(
            f"none of the {len(inputs)} inputs can be read; the first: {faults[0]}: mend them and "
            "give --update"
        )
    _remove_strays(worklist, shards)
    _write_skipped(out / SKIPPED, inputs)
    with atomic_write(out / INPUTS) as file:
        pq.write_table(inputs, file)
    for name in (SKIPPED, INPUTS):
        flush_to_disk(out / name)
    _commit(worklist, shards)
    worklist.remove()


def _commit(worklist: Worklist, shards: tuple[Shard, ...]) -> None:
    """Writes the manifest, from which on readers see the shards."""
    out, settings, base = worklist.out, worklist.settings, worklist.base
    if base is None:
        manifest = Manifest(
            dim=settings.dim,
            fingerprint=settings.fingerprint,
            weights=settings.weights,
            precision=settings.precision,
            dtype=settings.dtype,
            modalities=settings.modalities,
        )
        deleted = ""
    else:
        manifest = base
        deleted = _write_deleted(worklist)
    commit(
        out,
        manifest,
        shards=(*manifest.shards, *shards),
        deleted=deleted,
        image_root=settings.image_root,
        inputs=worklist.inputs_digest,
    )
    if manifest.deleted and manifest.deleted != deleted:
        (out / manifest.deleted).unlink(missing_ok=True)


def _write_deleted(worklist: Worklist) -> str:
    """Deletes the rows of inputs that were removed or changed; returns the file that lists them."""
    assert worklist.base is not None and worklist.base_inputs is not None
    current = open_folder(worklist.out)
    changes = compare_surveys(worklist.base_inputs, worklist.items)
    rows = current.find_rows([*changes.removed, *changes.changed, *changes.new])
    rows = np.unique(rows[rows >= 0])
    return write_deleted(current, rows) if len(rows) else worklist.base.deleted


def _read_marks(worklist: Worklist) -> dict[int, Mark]:
    """Returns the mark of every shard of the worklist."""
    marks = {}
    for duplicates in (False, True):
        for number in worklist.list_shards(duplicates=duplicates):
            mark = worklist.read_mark(number)
            assert mark is not None, f"shard {number} is not complete"
            marks[number] = mark
    return marks


def _remove_strays(worklist: Worklist, shards: tuple[Shard, ...]) -> None:
    """Removes files of shards that neither this run nor the one before it lists.

    A run that was begun with other inputs may have left them.
    """
    base = worklist.base.shards if worklist.base is not None else ()
    listed = {shard.number for shard in (*base, *shards)}
    for path in (worklist.out / "metadata").glob("metadata_*.parquet"):
        number = path.stem.rpartition("_")[2]
        if number.isdecimal() and int(number) not in listed:
            path.unlink()
            for modality in ("image", "text"):
                get_vectors_path(worklist.out, int(number), modality).unlink(missing_ok=True)
                remove_sketch(worklist.out, int(number), modality)


# What became of the inputs ------------------------------------------------------------------------


def _list_inputs(worklist: Worklist) -> pa.Table:
    """Returns the worklist's items with `kind` and `detail` of those without own encoding."""
    fates = _recall_fates(worklist)
    items = worklist.items
    originals = _find_originals(worklist)
    faults = {
        item: fault
        for mark in _read_marks(worklist).values()
        for item, fault in mark.faults.items()
    }
    rows = zip(
        *(items[name].to_pylist() for name in (ID, HASH, "fault", "is_duplicate", "is_wanted")),
        strict=True,
    )
    for item, content_hash, fault, is_duplicate, is_wanted in rows:
        if not is_wanted:
            continue
        fates[item] = ("", "")
        if fault or item in faults:
            fates[item] = (BROKEN, fault or faults[item])
        elif is_duplicate:
            fates[item] = (DUPLICATE, f"same content as {originals[content_hash]}")
    kinds, details = zip(*(fates[item] for item in items[ID].to_pylist()), strict=True)
    inputs = items.drop_columns(["shard", "is_duplicate", "is_wanted"])
    inputs = inputs.append_column("kind", pa.array(kinds, pa.string()))
    return inputs.append_column("detail", pa.array(details, pa.string()))


def _recall_fates(worklist: Worklist) -> dict[str, tuple[str, str]]:
    """Returns id -> (kind, detail) of the inputs of the run before."""
    if worklist.base_inputs is None:
        return {}
    columns = [worklist.base_inputs[name].to_pylist() for name in (ID, "kind", "detail")]
    return {item: (kind, detail) for item, kind, detail in zip(*columns, strict=True)}


def _find_originals(worklist: Worklist) -> dict[str, str]:
    """Returns the hash of an image -> the id of the item that was encoded with it."""
    originals: dict[str, str] = {}
    if worklist.base_inputs is not None:
        columns = [worklist.base_inputs[name].to_pylist() for name in (ID, HASH, "kind")]
        for item, content_hash, kind in zip(*columns, strict=True):
            if not kind:
                originals.setdefault(content_hash, item)
    items = worklist.items
    columns = [items[name].to_pylist() for name in (ID, HASH, "shard", "is_duplicate")]
    originals |= {
        content_hash: item
        for item, content_hash, shard, is_duplicate in zip(*columns, strict=True)
        if shard >= 0 and not is_duplicate
    }
    return originals


def _write_skipped(path: Path, inputs: pa.Table) -> None:
    """Writes the inputs without an encoding of their own as a table."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = (IMAGE_PATH, "kind", "detail", ID)
    writer.writerow(["path", *names[1:]])
    columns = [inputs[name].to_pylist() for name in names]
    writer.writerows(row for row in zip(*columns, strict=True) if row[1])
    write_text(path, text.getvalue())


def make_report(out: Path, changes: str, *, is_unchanged: bool) -> EmbedReport:
    """Returns what a folder of vectors holds."""
    folder = open_folder(out)
    kinds = pq.read_table(out / INPUTS, columns=["kind"])["kind"].to_pylist()
    return EmbedReport(
        rows=folder.num_rows,
        broken=kinds.count(BROKEN),
        duplicates=kinds.count(DUPLICATE),
        changes=changes,
        is_unchanged=is_unchanged,
        precision=folder.manifest.precision,
    )
