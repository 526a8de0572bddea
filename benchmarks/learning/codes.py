"""What masked patches should predict: codes of several teachers, or pixels.

    python -m benchmarks.learning.codes --out runs/learning

Pretraining on images alone, so that nothing but the target teaches; all else is equal. Teachers
of one's own are the demo's pairs (masked words) and the contrastive stage on the same pairs, both
of the same number of steps. EfficientNet was trained with the labels of ImageNet; its row is left
out where its package is not installed.

Guess: codes of one's own networks are best for shape and color, because they know the words;
gradients are second and EfficientNet is no better than they are on drawings of 32 px, which it has
never seen. Pixels are last on shapes. On photographs the order of the last three would be another.
"""

from beit3.model.config import TINY
from beit3.tokenizer.teacher_efficientnet import is_installed
from benchmarks.learning.runs import Run
from benchmarks.learning.study import Row, Study, Tuning, run_program
from benchmarks.learning.world_runs import (
    PAIR_STEPS,
    make_contrastive,
    make_images_only,
    make_pairs,
    make_tokenizer,
)

EFFICIENTNET = "--task.teacher efficientnet --task.model.teacher_dim 304"


def make_own_tokenizer(teacher: Run) -> Run:
    """Returns the visual tokenizer that one's own network teaches."""
    return make_tokenizer(
        f"--task.teacher beit3 --task.model.teacher_dim {TINY.dim}",
        needs={"teacher_weights": teacher},
    )


TOKENIZERS = {
    "codes of gradients": make_tokenizer(),
    "codes of EfficientNet-Lite0": make_tokenizer(EFFICIENTNET),
    "codes of one's own pairs": make_own_tokenizer(make_pairs()),
    "codes of one's own contrastive stage": make_own_tokenizer(make_contrastive(steps=PAIR_STEPS)),
}
if not is_installed():
    del TOKENIZERS["codes of EfficientNet-Lite0"]

STUDY = Study(
    "codes",
    [
        *(Row(name, make_images_only(tokenizer)) for name, tokenizer in TOKENIZERS.items()),
        Row(
            "pixels",
            make_images_only(make_tokenizer(), task="benchmarks.learning.pixels", needs={}),
        ),
        Row("initial values"),
    ],
    [Tuning("imagenet", 120), Tuning("ade20k", 150), Tuning("coco", 150)],
)

if __name__ == "__main__":
    run_program(STUDY, __doc__)
