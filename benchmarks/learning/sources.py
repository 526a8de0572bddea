"""What each kind of data adds to pretraining: pairs, with images, with texts, with both.

    python -m benchmarks.learning.sources --out runs/learning

All rows start from the same first part on pairs alone and go on for the same number of steps. A
step has the records of each source that the recipe gives it, so rows with more sources see more
records, as in the paper.

Guess: images add to classes, segmentation and the linear probes and nothing to questions; texts add
little anywhere, since the world's captions say what its texts say; words follow the image slightly
less than with pairs alone, because the steps are shared.
"""

from benchmarks.learning.study import Row, Study, Tuning, run_program
from benchmarks.learning.world_runs import make_pretraining

BATCHES = {
    "pairs": {"pairs": 64},
    "pairs and images": {"images": 32, "pairs": 64},
    "pairs and texts": {"texts": 32, "pairs": 64},
    "pairs, images and texts": {"images": 32, "texts": 32, "pairs": 64},
}

STUDY = Study(
    "sources",
    [
        *(Row(name, make_pretraining(batch=batch)) for name, batch in BATCHES.items()),
        Row("nothing"),
    ],
    [
        Tuning("vqa", 300, 1000),
        Tuning("nlvr2", 360),
        Tuning("imagenet", 120),
        Tuning("ade20k", 150),
    ],
)

if __name__ == "__main__":
    run_program(STUDY, __doc__)
