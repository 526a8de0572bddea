"""`prepare --bad_share` of every task: how many records may be unusable before it refuses all."""

import inspect
import shutil

import pytest

from beit3.task import task_name
from beit3.training.embedded_world import RAW_DIRECTORIES
from tests.world_root import list_trainable_tasks

SOURCES = [
    (task, source)
    for task in list_trainable_tasks()
    for source in task.sources
    if source not in task.records_from and source != "texts"
]


@pytest.mark.parametrize(
    ("task", "source"), SOURCES, ids=[f"{task.__name__}-{source}" for task, source in SOURCES]
)
def test_every_task_takes_the_share_of_unusable_records(task, source, raw, tmp_path):
    """A tenth of the images is damaged."""
    assert "bad_share" in inspect.signature(task.prepare).parameters
    name = task_name(task)
    directory = RAW_DIRECTORIES.get(source, RAW_DIRECTORIES.get(name, name))
    # Images may lie beside the directory, so that the whole world is copied.
    shutil.copytree(raw, tmp_path / "raw", symlinks=False)
    images = sorted(
        path
        for path in (tmp_path / "raw" / directory).rglob("*")
        if path.suffix in (".png", ".jpg") and "annotations" not in path.as_posix()
    )
    for path in images[::10]:
        path.write_bytes(b"damaged")
    with pytest.raises(ValueError, match="bad_share|unusable|% "):
        task.prepare(tmp_path / "raw" / directory, tmp_path / "root", source)
    assert not list((tmp_path / "root").rglob("train*")), "nothing is written"
    report = task.prepare(tmp_path / "raw" / directory, tmp_path / "root", source, bad_share=0.9)
    assert report["passed_over"] and sum(report["records"].values()) > 0
