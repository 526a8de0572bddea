"""Which file holds the records of a split: `root/<task>/<source>/<split>` and its suffix.

A source may consist of several datasets, each in a directory of its own below the source's. Where
a task has no such directory, the root may hold the index files of the BEiT-3 release as they are
(`beit3.data.stores.upstream`).
"""

from itertools import pairwise
from pathlib import Path

STORE_SUFFIXES = (".jsonl", ".shards", ".tokens")
"""Kinds of files with records: `records.Records`, `shards.Shards` and `tokens.Tokens`."""

INDEX_FILES = {
    "vqa": ("vqa.{}.jsonl",),
    "nlvr2": ("nlvr2.{}.index.jsonl",),
    "retrieval": ("coco_retrieval.{}.jsonl", "flickr30k.{}.jsonl"),
    "captioning": ("coco_captioning.{}.jsonl", "nocaps.{}.jsonl"),
    "imagenet": ("imagenet.{}.index.jsonl",),
}
"""Index files of the release by task; the braces stand for the release's name of the split."""

INDEX_SPLITS = {
    ("vqa", "val"): ("rest_val", "val"),
    ("nlvr2", "val"): ("dev",),
    ("nlvr2", "test"): ("test-P",),
}
"""The release's names of a split where they differ from ours; the first one with a file counts."""


def locate_split(root: str | Path, task: str, source: str, split: str) -> Path:
    """Returns the path of a split's records, to be opened by `beit3.data.loader.RecordDataset`.

    It is `root/task/source/split` with the suffix of its file. It has no suffix when the source
    consists of several datasets. Without a directory for the source it is the release's index
    file in the root.

    Raises:
        ValueError: There is no such file, or two files hold the split. The message says what to do.
    """
    directory = Path(root) / task / source
    files = find_split_files(directory, split)
    if files:
        return files[0] if files[0].parent == directory else directory / split
    if source == "main" and not directory.is_dir():
        index_file = _find_index_file(Path(root), task, split)
        if index_file:
            return index_file
    command = f"beit3 prepare {task} --raw DIR --root {root}"
    if source != "main":
        command += f" --source {source}"
    raise ValueError(f"no {task}/{source}/{split}.jsonl under {root}: write it with `{command}`")


def find_split_files(directory: Path, split: str) -> list[Path]:
    """Returns the files of a split: the one in `directory`, else those of its subdirectories.

    Raises ValueError when two files hold the same records, or both places have some.
    """
    names = [f"{split}{suffix}" for suffix in STORE_SUFFIXES]
    own = [directory / name for name in names if (directory / name).is_file()]
    below = sorted(path for name in names for path in directory.glob(f"[!.]*/{name}"))
    for first, second in pairwise(own or below):
        if first.parent == second.parent:
            raise ValueError(f"{first} and {second} are both {split}: keep one of them")
    if own and below:
        raise ValueError(
            f"{own[0]} and {below[0]} are both {split}: "
            "move the first into a directory of its own beside the other's"
        )
    return own or below


def _find_index_file(root: Path, task: str, split: str) -> Path | None:
    """Returns the release's index file of a split; None where there is none."""
    for name in INDEX_SPLITS.get((task, split), (split,)):
        paths = [root / pattern.format(name) for pattern in INDEX_FILES.get(task, ())]
        files = [path for path in paths if path.is_file()]
        if len(files) > 1:
            raise ValueError(
                f"{' and '.join(map(str, files))} are both {task} {split}: "
                "keep one of them in this root"
            )
        if files:
            return files[0]
    return None
