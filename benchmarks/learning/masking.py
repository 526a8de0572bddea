"""How much is masked, in blocks or at random, and what of a pair.

    python -m benchmarks.learning.masking --out runs/learning

Images: pretraining on images alone, with patches of 4 px, a grid of 8 x 8, because blocks mean
little on the demo's grid of 4 x 4. Texts and pairs: the demo's pretraining on pairs alone.

Guess: blocks of 8 patches are ahead of single patches on the shape probe, since a single masked
patch is told by its neighbors; the rate matters little between .4 and .6 and costs at .2 and .8.
Half of a caption's words is better than 15 % at this length, because more targets are seen; at 80 %
the words that tell the objects apart are gone. Masking patches of pairs too slows words down, as it
did before (docs/pretraining.md).
"""

from benchmarks.learning.study import Row, Study, Tuning, run_program
from benchmarks.learning.world_runs import make_images_only, make_pairs, make_tokenizer

SMALL_PATCHES = "--task.model.patch_size 4"
IMAGE_MASKS = {
    "images: single patches, .4": "--task.min_mask_block 0",
    "images: blocks from 4 patches, .4": "--task.min_mask_block 4",
    "images: blocks from 8 patches, .4": "--task.min_mask_block 8",
    "images: blocks from 8 patches, .2": "--task.min_mask_block 8 --task.image_mask_rate 0.2",
    "images: blocks from 8 patches, .6": "--task.min_mask_block 8 --task.image_mask_rate 0.6",
    "images: blocks from 8 patches, .8": "--task.min_mask_block 8 --task.image_mask_rate 0.8",
}
PAIR_MASKS = {
    "pairs: half of the text": "",
    "pairs: .15 of the text": "--task.pair_text_mask_rate 0.15",
    "pairs: .3 of the text": "--task.pair_text_mask_rate 0.3",
    "pairs: .8 of the text": "--task.pair_text_mask_rate 0.8",
    "pairs: half of the text and .4 of the patches": "--task.pair_masking both",
    "pairs: one of both": "--task.pair_masking alternate",
}
TOKENIZER = make_tokenizer(SMALL_PATCHES)

STUDY = Study(
    "masking",
    [
        *(
            Row(name, make_images_only(TOKENIZER, f"{SMALL_PATCHES} {changes}"), SMALL_PATCHES)
            for name, changes in IMAGE_MASKS.items()
        ),
        Row("images: initial values", network=SMALL_PATCHES),
        *(Row(name, make_pairs(changes)) for name, changes in PAIR_MASKS.items()),
    ],
    [Tuning("imagenet", 120), Tuning("vqa", 300, 1000)],
)

if __name__ == "__main__":
    run_program(STUDY, __doc__)
