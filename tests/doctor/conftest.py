"""Weights that the tests of the doctor check."""

from dataclasses import replace
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def weights(root, tmp_path_factory) -> Path:
    """Returns untrained weights with a text tokenizer, as the `best` of a run."""
    from beit3.data.views.preprocessing import Preprocessing
    from beit3.model.config import TINY
    from beit3.tasks.vqa import VQA, VQAConfig
    from beit3.tokenizer.text import TextTokenizer
    from beit3.weights.store import save_weights

    model = replace(
        TINY,
        dim=32,
        depth=1,
        num_heads=2,
        ffn_dim=32,
        image_size=16,
        patch_size=8,
        final_norm=False,
    )
    config = VQAConfig(
        model=model, image=Preprocessing(16), text_length=16, num_answers=2, answers=("yes", "no")
    )
    task = VQA(config, tokenizer=TextTokenizer(root / "text.model"))
    task.init_weights(0)
    directory = tmp_path_factory.mktemp("doctor") / "run" / "best"
    save_weights(task, directory)
    return directory
