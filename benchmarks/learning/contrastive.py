"""The contrastive stage before masked pretraining, after it, or not at all.

    python -m benchmarks.learning.contrastive --out runs/learning

The paper pretrains without a contrastive loss and adds a contrastive stage for retrieval alone. All
rows but "masks alone, no further steps" take the same number of steps. A contrastive stage at the
end leaves no head for words, so these cannot be measured there.

Guess: after pretraining, the stage is best for retrieval and costs questions a little. Before it,
it gives words a start, because patches already tell shapes apart, and retrieval keeps part of the
gain. The contrastive stage alone is close on retrieval and behind on questions.
"""

from benchmarks.learning.runs import Run
from benchmarks.learning.study import Row, Study, Tuning, run_program
from benchmarks.learning.world_runs import (
    PAIR_STEPS,
    PRETRAINING_STEPS,
    make_contrastive,
    make_pairs,
    make_pretraining,
    make_tokenizer,
)

STEPS = 300
TOKENIZER = make_tokenizer()


def make_pairs_after_contrastive() -> Run:
    """Returns the demo's pairs, from the weights of the contrastive stage."""
    return make_pairs(needs={"visual_tokenizer": TOKENIZER, "init": make_contrastive(steps=STEPS)})


STUDY = Study(
    "contrastive",
    [
        Row("masks alone, no further steps", make_pretraining()),
        Row("masks alone", make_pretraining(make_pairs(steps=PAIR_STEPS + STEPS))),
        Row("contrastive before", make_pretraining(make_pairs_after_contrastive())),
        Row("contrastive after", make_contrastive(make_pretraining(), steps=STEPS)),
        Row("contrastive alone", make_contrastive(steps=PAIR_STEPS + PRETRAINING_STEPS + STEPS)),
        Row("scratch"),
    ],
    [
        Tuning("retrieval", 120),
        Tuning("vqa", 300, 1000),
        Tuning("captioning", 120),
        Tuning("imagenet", 120),
    ],
)

if __name__ == "__main__":
    run_program(STUDY, __doc__)
