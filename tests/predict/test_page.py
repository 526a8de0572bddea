"""Every Python block of docs/predict.md runs, on the weights that ship and the pictures that its
command makes."""

import re
from contextlib import chdir
from pathlib import Path
from types import ModuleType

from beit3.cli import main
from tests.predict.networks import assert_same

PAGE = Path(__file__).resolve().parents[2] / "docs/predict.md"


def test_blocks_of_the_page_run(tmp_path):
    text = PAGE.read_text(encoding="utf-8")
    (command,) = re.findall(r"^```bash\nbeit3 (.*?)\n```", text, re.MULTILINE)
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 8
    page = ModuleType("page")
    with chdir(tmp_path):
        assert main(command.split()) == 0
        for block in blocks:
            exec(compile(block, PAGE.name, "exec"), page.__dict__)
    dim = page.predictor.task.config.model.dim
    assert page.similarities.shape == (2, 2)
    assert page.pairs["image"].shape == page.pairs["text"].shape == (2, dim)
    assert page.maps.shape == (2, dim, 8, 12) and page.middle.shape == (1, dim, 4, 4)
    assert "".join(page.inspection.words[:-1]).startswith("<s> how many objects")
    assert_same(page.answers, page.predictor(tmp_path / page.first, page.questions))
