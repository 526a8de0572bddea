"""Small tasks whose weights the tests save and load."""

from dataclasses import replace
from pathlib import Path

import torch

from beit3.data.views.preprocessing import Preprocessing
from beit3.model.config import TINY, TINY_RELEASE, ModelConfig
from beit3.task import Task
from beit3.tasks.pretrain import Pretrain, PretrainConfig
from beit3.tasks.vqa import VQA, VQAConfig
from beit3.tasks.vqkd import VQKD, VQKDConfig
from beit3.tokenizer.visual import VisualTokenizerConfig
from beit3.weights.store import save_weights

PAPER = replace(TINY, dim=32, depth=2, ffn_dim=48, image_size=16, vocab_size=64, text_positions=20)

RELEASE = replace(
    TINY_RELEASE,
    dim=64,
    num_heads=1,
    depth=2,
    ffn_dim=48,
    image_size=16,
    vocab_size=64,
    text_positions=20,
)

VISUAL = VisualTokenizerConfig(
    image_size=16,
    patch_size=8,
    dim=16,
    depth=1,
    num_heads=2,
    ffn_dim=32,
    decoder_depth=1,
    code_dim=4,
    num_codes=9,
    teacher_dim=12,
)


def make_vqa(
    model: ModelConfig = PAPER, answers: tuple[str, ...] = ("yes", "no", "two"), **arguments
) -> VQA:
    config = VQAConfig(
        model=replace(model, final_norm=False),
        answers=answers,
        num_answers=len(answers),
        text_length=9,
    )
    return initialize(VQA(config, **arguments))


def make_visual_tokenizer(seed: int = 0) -> VQKD:
    image = replace(VQKDConfig().image, image_size=VISUAL.image_size)
    return initialize(VQKD(VQKDConfig(model=VISUAL, image=image)), seed)


def initialize(task, seed: int = 0):
    task.init_weights(seed)
    return task


def make_pretrain(tmp_path: Path) -> Pretrain:
    save_weights(make_visual_tokenizer(), tmp_path / "visual")
    config = PretrainConfig(
        model=PAPER,
        image=Preprocessing(16),
        num_codes=9,
        token_size=16,
        visual_tokenizer=str(tmp_path / "visual"),
    )
    return initialize(Pretrain(config))


def assert_same_weights(task: Task, expected: Task) -> None:
    assert task.config == expected.config
    state, expected_state = task.state_dict(), expected.state_dict()
    assert state.keys() == expected_state.keys()
    assert all(torch.equal(state[name], expected_state[name]) for name in state)
