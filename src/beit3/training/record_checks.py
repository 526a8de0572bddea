"""The check of records before anything is computed from them.

Every record of a split is read once and compared with the fields that the task declares. So a
wrong line, or a val record that cannot be scored, is found before the first step. JSON lines take
about ten seconds per million. Tars and arrays of token ids, whose records `beit3 prepare` itself
composes, are left out.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from beit3.data.loader import RecordDataset
from beit3.data.stores.record_fields import GERUNDS, ID_FIELD, Purpose, RecordField, find_fault
from beit3.data.stores.records import FILE_FIELDS, Records
from beit3.data.stores.upstream import UpstreamIndex
from beit3.images import measure_file
from beit3.ops.collectives import all_gather_objects, rank
from beit3.recipe import TaskConfig
from beit3.task import Record, Task

REMEDY = "mend the record, or run `beit3 prepare` again"

Progress = Callable[[int, int], None]
"""Receives (records checked, records in all)."""


def check_records(
    task_class: type[Task],
    sources: Mapping[str, RecordDataset],
    purpose: Purpose,
    *,
    config: TaskConfig | None = None,
    limit: int = 0,
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
        limit: Records of each source that are read, the first ones; 0 = all.
        bad_share: The fraction of the records to score whose images may be missing.
        progress: Receives the progress.
    """
    fault = ""
    if rank() == 0:
        faults = (
            _find_source_fault(
                task_class, name, source, purpose, config, limit, bad_share, progress
            )
            for name, source in sources.items()
        )
        fault = next(filter(None, faults), "")
    fault = all_gather_objects(fault)[0]
    if fault:
        raise ValueError(fault)


def _find_source_fault(
    task_class: type[Task],
    name: str,
    source: RecordDataset,
    purpose: Purpose,
    config: TaskConfig | None,
    limit: int,
    bad_share: float,
    progress: Progress | None,
) -> str:
    """Returns what is wrong with the records of a source, or ""."""
    fields = {"id": ID_FIELD, **task_class.get_record_fields(name)}
    checker = SourceChecker(task_class, fields, purpose, config)
    size = min(limit or len(source), len(source))
    for number, (store, index) in enumerate(iterate_checked(source)):
        if number == size:
            break
        checker.check(store, index, source.root)
        if progress and number % 1000 == 0:
            progress(number, size)
    return checker.find_fault(bad_share)


def iterate_checked(source: RecordDataset) -> Iterator[tuple[Records | UpstreamIndex, int]]:
    """Yields the records of a source that are checked, as a store and an index in it."""
    for store, size in zip(source.stores, source.sizes, strict=True):
        if isinstance(store, Records | UpstreamIndex):
            for index in range(size):
                yield store, index


class SourceChecker:
    """Checks the records of one source, one after the other, and remembers what it has found."""

    def __init__(
        self,
        task_class: type[Task],
        fields: Mapping[str, RecordField],
        purpose: Purpose,
        config: TaskConfig | None,
    ) -> None:
        self.task_class, self.fields = task_class, fields
        self.purpose, self.config = purpose, config
        self.first_fault = ""
        self.num_faults = self.num_records = 0
        self.locations: dict[tuple[Path, str], int] = {}
        """File and id -> index of the record, of records to score."""
        self.empty_fields = {
            name for name, field in fields.items() if purpose in field.may_be_empty_for
        }
        """Fields that were empty in all records so far."""
        self.path = Path()
        self.missing_files: dict[str, str] = {}
        """Missing file -> where it is named."""
        self.num_missing = 0
        self.checked_files: set[str] = set()

    def check(self, store: Records | UpstreamIndex, index: int, root: Path) -> None:
        """Checks one record."""
        self.num_records += 1
        self.path = store.path
        try:
            record = store[index]
        except ValueError as error:
            self._add_fault(str(error))
            return
        fault = find_fault(record, self.fields, self.purpose, self.config)
        fault = fault or self.task_class.find_record_fault(record, self.purpose, self.config)
        if not fault and self.purpose != "train":
            fault = self._find_repeated_id(store, index, str(record["id"]))
        if fault:
            identifier = f" (record {record['id']})" if record.get("id") is not None else ""
            self._add_fault(f"{store.describe(index)}{identifier}: {fault}: {REMEDY}")
            return
        self.empty_fields = {name for name in self.empty_fields if not record.get(name)}
        if self.purpose == "score":
            self._look_for_files(store, index, record, root)

    def _add_fault(self, fault: str) -> None:
        self.first_fault = self.first_fault or fault
        self.num_faults += 1

    def _find_repeated_id(self, store: Records | UpstreamIndex, index: int, id: str) -> str:
        """Returns a fault where an earlier record of the same file has this id."""
        first = self.locations.setdefault((store.path, id), index)
        if first == index:
            return ""
        return f"field id is also that of {store.describe(first)}, and predictions are told by it"

    def _look_for_files(
        self, store: Records | UpstreamIndex, index: int, record: Record, root: Path
    ) -> None:
        """Notes the files of a record that are missing."""
        is_missing = False
        for name in FILE_FIELDS:
            if name not in record:
                continue
            file = str(root / record[name])
            if file not in self.checked_files:
                self.checked_files.add(file)
                if not _is_file(file):
                    self.missing_files[file] = f"{store.describe(index)}: field {name}"
            is_missing = is_missing or file in self.missing_files
        self.num_missing += is_missing

    def find_fault(self, bad_share: float) -> str:
        """Returns what is wrong with the records that were checked, or ""."""
        if self.first_fault:
            others = self.num_faults - 1
            more = f" ({others} more of {self.num_records} records are faulty)" if others else ""
            return self.first_fault + more
        if self.num_missing > bad_share * self.num_records:
            file, location = next(iter(self.missing_files.items()))
            return (
                f"{location} names {file}, which is not there; it is the first of "
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
