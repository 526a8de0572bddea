"""Every command of docs/search.md runs, in the order of the page."""

import csv
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from beit3.cli import main
from beit3.task import load_task
from beit3.training.loop import train
from tests.world_root import make_finetuning_recipe

PAGE = Path(__file__).resolve().parents[2] / "docs/search.md"
STAND_INS = (
    (r"^torchrun \S+ \S+ -m ", ""),  # processes that share the work have tests of their own
    (r" --engine ray", ""),  # and so has Ray
    (r"http://milvus:19530/photos", "server.db"),  # a server answers the same calls
)
"""What a test cannot have, and what stands for it."""


def read_commands() -> list[list[str]]:
    """Returns the words of the page's commands, except for training."""
    text = PAGE.read_text(encoding="utf-8")
    commands = []
    for block in re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            for pattern, stand_in in STAND_INS:
                line = re.sub(pattern, stand_in, line)
            program, *words = shlex.split(line, comments=True)
            assert program in ("beit3", "cp"), line
            if words[0] != "train":
                commands.append([program, *words])
    return commands


@pytest.fixture(scope="module")
def working_directory(root, tmp_path_factory):
    """What the page takes for granted: other weights, a table, key frames, queries.

    Its first commands make the photographs.
    """
    folder = tmp_path_factory.mktemp("page")
    recipe = make_finetuning_recipe("retrieval", root, steps=2)
    train(recipe, load_task("retrieval"), out=folder / "runs/retrieval-other")
    for name in ("a", "b"):
        (folder / "keyframes" / name).mkdir(parents=True)
    for number, image in enumerate(find_images(root)[:24]):
        shutil.copy(image, folder / f"keyframes/{'ab'[number % 2]}/{25 * number}.png")
    with (folder / "photos.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "caption", "year", "city"])
        for number in range(24):
            city = ("Hue", "Hanoi", "Da Nang")[number % 3]
            writer.writerow([f"{number:06d}.png", f"a red circle {number}", 2010 + number, city])
    (folder / "queries.txt").write_text("a red circle\na blue square\n")
    (folder / "queries.csv").write_text("id,text,relevant\nq1,a red circle,000003.png\n")
    return folder


def find_images(root: Path) -> list[Path]:
    """Returns the images of the raw world, of which the records of `root` name one."""
    with (root / "retrieval/main/val.jsonl").open() as file:
        record = json.loads(file.readline())
    return sorted((root / record["image"]).resolve().parent.glob("*.png"))


def test_all_commands_of_the_page_run(working_directory, monkeypatch, capfd):
    pytest.importorskip("faiss")
    pytest.importorskip("pymilvus")
    monkeypatch.chdir(working_directory)
    outputs = {}
    for program, *words in read_commands():
        if program == "cp":
            shutil.copytree(*words[1:])
            continue
        status = main(words)
        captured = capfd.readouterr()
        assert status == 0, f"beit3 {' '.join(words)}: {captured.err}"
        outputs[" ".join(words)] = captured.out
        if words[0] == "search" and "--out" not in words and "--scores" not in words:
            assert json.loads(captured.out), words
    for name in ("hits.html", "scenes.html", "hits.csv", "scores.parquet", "top.parquet"):
        assert (working_directory / name).stat().st_size > 0
    check_recall(outputs)


def check_recall(outputs: dict[str, str]) -> None:
    """The page says that recall equals that of `beit3 eval`."""
    (scores,) = [json.loads(text) for words, text in outputs.items() if words.startswith("eval")]
    (by_text,) = [json.loads(text) for words, text in outputs.items() if "image_path" in words]
    (by_image,) = [
        json.loads(text)
        for words, text in outputs.items()
        if "--queries data" in words and "--in text" in words
    ]
    for k in (1, 5, 10):
        assert by_text[f"recall@{k}"] == scores[f"image_recall@{k}"]
        assert by_image[f"recall@{k}"] == scores[f"text_recall@{k}"]
