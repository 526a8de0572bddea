"""Every Python block of docs/predict.md runs on weights and pictures under its names."""

import re
from contextlib import chdir
from pathlib import Path
from types import ModuleType

from beit3.weights.store import save_weights
from tests.predict.networks import assert_same, make_task, write_image

PAGE = Path(__file__).resolve().parents[2] / "docs/predict.md"


def test_blocks_of_the_page_run(root, tmp_path):
    for name in ("vqa", "retrieval"):
        save_weights(make_task(name, root), tmp_path / "runs" / name / "best")
    for number, name in enumerate(("street", "door")):
        write_image(tmp_path / f"{name}.jpg", number)
    text = PAGE.read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 8
    page = ModuleType("page")
    with chdir(tmp_path):
        for block in blocks:
            exec(compile(block, PAGE.name, "exec"), page.__dict__)
    dim = page.predictor.task.config.model.dim
    assert page.similarities.shape == (2, 2)
    assert page.pairs["image"].shape == page.pairs["text"].shape == (2, dim)
    assert page.maps.shape == (2, dim, 8, 12) and page.middle.shape == (1, dim, 4, 4)
    assert "".join(page.inspection.words[:-1]).startswith("<s> how many")
    assert_same(page.answers, page.predictor(tmp_path / "street.jpg", page.questions))
