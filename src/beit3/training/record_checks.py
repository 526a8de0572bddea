"""The check of records before anything is computed from them.

Every record of a split is read once and compared with the fields that the task declares. So a
wrong line, or a val record that cannot be scored, is found before the first step. JSON lines take
about ten seconds per million. Tars and arrays of token ids, whose records `beit3 prepare` itself
composes, are left out.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeAlias

import numpy as np

from beit3.data.loader import RecordDataset
from beit3.data.stores.record_fields import (
    FILE,
    GERUNDS,
    ID_FIELD,
    Purpose,
    RecordField,
    find_fault,
)
from beit3.data.stores.records import Records
from beit3.data.stores.upstream import UpstreamIndex
from beit3.images import measure_file
from beit3.ops.collectives import compute_on_rank_zero
from beit3.recipe import TaskConfig
from beit3.task import Record, Task

CheckedStore: TypeAlias = Records | UpstreamIndex

REMEDY = "mend the record, or run `beit3 prepare` again"

Progress = Callable[[int, int], None]
"""Receives (records checked, records in all)."""


def check_records(
    task_class: type[Task],
    sources: Mapping[str, RecordDataset],
    purpose: Purpose,
    *,
    config: TaskConfig | None = None,
    bad_share: float = 0.0,
    progress: Progress | None = None,
) -> None:
    """Raises ValueError for records that do not hold what the task declares.

    The message names the first such record by file, line and field, and counts the others. Rank 0
    reads the records, and every process raises.

    Args:
        task_class: The task.
        sources: Source -> the records of one split.
        purpose: What the records are read for.
        config: The task's config, by which labels are checked.
        bad_share: The fraction of the records to score whose files may be missing. At 1 no file
            is looked for.
        progress: Receives the progress.
    """

    def find_first_fault() -> str:
        for name, source in sources.items():
            fields = {"id": ID_FIELD, **task_class.get_record_fields(name)}
            checker = SourceChecker(task_class, fields, purpose, config, bad_share)
            fault = _find_source_fault(checker, source, progress)
            if fault:
                return fault
        return ""

    fault = compute_on_rank_zero(find_first_fault)
    if fault:
        raise ValueError(fault)


def _find_source_fault(
    checker: "SourceChecker", source: RecordDataset, progress: Progress | None
) -> str:
    """Returns what is wrong with the records of a source, or ""."""
    stores = find_checked_stores(source)
    size, number = sum(len(indices) for _, indices in stores), 0
    for store, indices in stores:
        for index in indices:
            checker.check(store, int(index), source.root)
            if progress and number % 1000 == 0:
                progress(number, size)
            number += 1
    return checker.find_fault()


def find_checked_stores(
    source: RecordDataset,
) -> list[tuple[CheckedStore, range | np.ndarray]]:
    """Returns the files of a source that are checked, and the indices of the records of each.

    Those beyond the source's limit are not read, and so not checked.
    """
    return [
        (store, indices)
        for store, indices in zip(source.stores, source.indices, strict=True)
        if isinstance(store, Records | UpstreamIndex)
    ]


class SourceChecker:
    """Checks the records of one source, one after the other, and remembers what it has found."""

    def __init__(
        self,
        task_class: type[Task],
        fields: Mapping[str, RecordField],
        purpose: Purpose,
        config: TaskConfig | None,
        bad_share: float,
    ) -> None:
        self.task_class, self.fields = task_class, fields
        self.purpose, self.config, self.bad_share = purpose, config, bad_share
        self.file_fields = [name for name, field in fields.items() if field.kind is FILE]
        """Fields whose files are looked for."""
        if purpose != "score" or bad_share >= 1:
            self.file_fields = []
        self.first_fault = ""
        self.num_faults = self.num_records = 0
        self.locations: dict[tuple[Path, str], int] = {}
        """File and id -> index of the record, of records to score."""
        self.empty_fields = {
            name for name, field in fields.items() if purpose in field.may_be_empty_for
        }
        """Fields that were empty in all records so far."""
        self.path = Path()
        self.is_present: dict[str, bool] = {}
        """File -> whether it is there."""
        self.first_missing = ""
        """The first missing file, after where it is named."""
        self.num_missing = 0

    def check(self, store: CheckedStore, index: int, root: Path) -> None:
        """Checks one record."""
        self.num_records += 1
        self.path = store.path
        try:
            record = store[index]
        except ValueError as error:
            self.first_fault = self.first_fault or str(error)
            self.num_faults += 1
            return
        fault = find_fault(record, self.fields, self.purpose, self.config)
        fault = fault or self.task_class.find_record_fault(record, self.purpose, self.config)
        if not fault and self.purpose != "train":
            fault = self._find_repeated_id(store, index, str(record["id"]))
        if fault:
            self._add_fault(fault, store, index, record)
            return
        self.empty_fields = {name for name in self.empty_fields if not record.get(name)}
        self._look_for_files(store, index, record, root)

    def _add_fault(self, fault: str, store: CheckedStore, index: int, record: Record) -> None:
        if not self.first_fault:
            identifier = f" (record {record['id']})" if record.get("id") is not None else ""
            self.first_fault = f"{store.describe(index)}{identifier}: {fault}: {REMEDY}"
        self.num_faults += 1

    def _find_repeated_id(self, store: CheckedStore, index: int, id: str) -> str:
        """Returns a fault where an earlier record of the same file has this id."""
        first = self.locations.setdefault((store.path, id), index)
        if first == index:
            return ""
        return f"field id is also that of {store.describe(first)}, and predictions are told by it"

    def _look_for_files(self, store: CheckedStore, index: int, record: Record, root: Path) -> None:
        """Counts the record if a file that it names is missing."""
        missing_fields = [
            name
            for name in self.file_fields
            if name in record and not self._is_present(root / record[name])
        ]
        if missing_fields and not self.first_missing:
            name = missing_fields[0]
            self.first_missing = (
                f"{store.describe(index)}: field {name} names {root / record[name]}"
            )
        self.num_missing += bool(missing_fields)

    def _is_present(self, file: Path) -> bool:
        name = str(file)
        if name not in self.is_present:
            self.is_present[name] = _is_file(name)
        return self.is_present[name]

    def find_fault(self) -> str:
        """Returns what is wrong with the records that were checked, or ""."""
        if self.first_fault:
            others = self.num_faults - 1
            more = f" ({others} more of {self.num_records} records are faulty)" if others else ""
            return self.first_fault + more
        if self.num_missing > self.bad_share * self.num_records:
            return (
                f"{self.first_missing}, which is not there; it is the first of "
                f"{self.num_missing} such records of {self.num_records}: move the files and the "
                "records together, or mend the paths"
            )
        if self.empty_fields and self.num_records:
            name = min(self.empty_fields)
            return (
                f"{self.path}: field {name} is empty in all {self.num_records} records, and "
                f"{GERUNDS[self.purpose]} needs it: give a split that has {name}"
            )
        return ""


def _is_file(name: str) -> bool:
    """Returns whether a file, or the tar of a member, is there."""
    try:
        measure_file(name)
    except ValueError:
        return False
    return True
