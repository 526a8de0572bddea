"""Fine-tuning from pretrained weights against training from scratch, for every task.

    python -m benchmarks.learning.pretrained --out runs/learning

The paper's first claim: one pretraining serves all tasks. Each task is trained for three lengths
with all labels, and with few labels, from initial values, from pretraining, and from a control that
has seen the same pairs for the same number of steps without masks: the contrastive stage alone.

Guess: pretraining is ahead of scratch on questions, captions, retrieval and detection at every
length, and most where labels or steps are few. Classes, statements and segmentation gain less and
lose the gain with length. The control is as good as pretraining on retrieval and on classes, since
it names whole images, and no better than scratch on statements and captions, since it has never
fused the two modalities.
"""

from benchmarks.learning.study import Row, Study, Tuning, run_program
from benchmarks.learning.world_runs import (
    PAIR_STEPS,
    PRETRAINING_STEPS,
    make_contrastive,
    make_pretraining,
)

LENGTHS = {
    "vqa": (100, 300, 900),
    "captioning": (60, 120, 360),
    "retrieval": (60, 120, 360),
    "imagenet": (60, 120, 360),
    "nlvr2": (120, 360, 1080),
    "coco": (75, 150, 450),
    "ade20k": (75, 150, 450),
}
FEW_LABELS = {
    "vqa": (1000,),
    "captioning": (300,),
    "retrieval": (300,),
    "imagenet": (60, 200),
    "nlvr2": (1000,),
    "coco": (100,),
    "ade20k": (100,),
}
"""The middle length is also trained with so many labels."""

STUDY = Study(
    "pretrained",
    [
        Row("pretrained", make_pretraining()),
        Row("contrastive only", make_contrastive(steps=PAIR_STEPS + PRETRAINING_STEPS)),
        Row("scratch"),
    ],
    [
        tuning
        for task, lengths in LENGTHS.items()
        for tuning in (
            *(Tuning(task, steps) for steps in lengths),
            *(Tuning(task, lengths[1], labels) for labels in FEW_LABELS[task]),
        )
    ],
    rows_are_columns=True,
)

if __name__ == "__main__":
    run_program(STUDY, __doc__)
