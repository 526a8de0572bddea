"""From which weights segmentation gains, and up to which length.

    python -m benchmarks.learning.segmentation --out runs/learning

Other tasks read the trunk alone; segmentation also has an adapter whose convolutions see the image
and can learn the world's five shapes by themselves.

Guess: pretraining is ahead while runs are short, most from the contrastive stage, whose patches
tell shapes best; at the recipe's 1,400 steps nothing is left of it.
"""

from benchmarks.learning.every_task import CONTRASTIVE, PRETRAINING
from benchmarks.learning.study import Row, Study, Tuning, run_program

STUDY = Study(
    "segmentation",
    [
        Row("pretrained", PRETRAINING),
        Row("pretrained, then contrastive", CONTRASTIVE),
        Row("scratch"),
    ],
    [
        Tuning("ade20k", 150),
        Tuning("ade20k", 450),
        Tuning("ade20k", 1400),
        Tuning("ade20k", 150, labels=100),
    ],
    rows_are_columns=True,
)

if __name__ == "__main__":
    run_program(STUDY, __doc__)
