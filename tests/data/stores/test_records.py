"""Records: random access, scanning on first use, and errors that name file and line."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from torch.utils.data import DataLoader

from beit3.data.stores.records import Records, write_records

RECORDS = [{"id": str(i), "text": "snow ☃ " * (i % 5), "image": f"a/{i}.png"} for i in range(50)]


@pytest.fixture
def path(tmp_path) -> Path:
    path = tmp_path / "vqa" / "main" / "train.jsonl"
    assert write_records(path, iter(RECORDS)) == 50
    return path


def test_records_are_read_as_they_were_written(path):
    records = Records(path)
    assert len(records) == 50 and list(records) == RECORDS
    assert records[7] == RECORDS[7] and records[-1] == RECORDS[-1]
    assert records[np.int64(3)] == RECORDS[3]
    for index in (50, -51):
        with pytest.raises(IndexError):
            records[index]
    assert os.listdir(path.parent) == ["train.jsonl"]


def test_workers_read_the_same(path):
    records = Records(path)
    records[0]
    assert list(pickle.loads(pickle.dumps(records))) == RECORDS
    loader = DataLoader(records, batch_size=None, num_workers=2, shuffle=False)
    assert list(loader) == RECORDS


def test_the_file_is_scanned_once_on_first_use(path):
    records = Records(path)
    assert records._lines is None
    records[3]
    lines = records._lines
    records[4], len(records)
    assert records._lines is lines


def test_blank_lines_crlf_and_a_missing_final_newline_are_accepted(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'\n{"a": 1}\r\n  \n{"a": 2}')
    assert list(Records(path)) == [{"a": 1}, {"a": 2}]
    path.write_bytes(b"")
    assert len(Records(path)) == 0 and list(Records(path)) == []


@pytest.mark.parametrize("line", [b'{"a": ', b"[1, 2]", b"nonsense", b'{"a": "\xff"}'])
def test_a_malformed_line_is_named(tmp_path, line):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"a": 1}\n\n' + line + b'\n{"a": 2}\n')
    records = Records(path)
    assert records[0] == {"a": 1} and records[2] == {"a": 2}
    with pytest.raises(ValueError, match="x.jsonl line 3 is not a JSON object") as error:
        records[1]
    assert "\n" not in str(error.value)


def test_lines_are_described_by_their_numbers_in_the_file(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'\n{"a": 1}\n \r\n{"a": 2}\n{"a": 3}\n{')
    records = pickle.loads(pickle.dumps(Records(path)))
    assert [records.describe(index) for index in (0, 1, -1)] == [
        f"{path} line {number}" for number in (2, 4, 6)
    ]
    is_left_out = np.array([True, False, False, False])
    records.leave_out(is_left_out)
    assert [records.describe(index) for index in range(3)] == [
        f"{path} line {number}" for number in (4, 5, 6)
    ]
    with pytest.raises(ValueError, match="line 6 is not a JSON object"):
        records.find_left_out(lambda record: record["a"] == 2)


def test_an_absent_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"no records at .*absent\.jsonl"):
        Records(tmp_path / "absent.jsonl")


def test_a_failed_write_leaves_the_old_file(path):
    def yield_and_fail():
        yield {"id": "new"}
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError):
        write_records(path, yield_and_fail())
    assert list(Records(path)) == RECORDS and os.listdir(path.parent) == ["train.jsonl"]
