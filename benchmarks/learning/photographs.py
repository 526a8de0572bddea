"""Every task on small sets of photographs: pretrained, from scratch, and with controls.

    python -m benchmarks.learning.photographs --data ../shared/data --out runs/photographs

The laptop's recipes as they stand: a visual tokenizer on 1,000 photographs, whose teacher is
EfficientNet-Lite0 or statistics of gradients and colors; pretraining on these photographs, the
training images of CIFAR-10 and CamVid without labels, books, and 6,000 captions; then each task,
both sides alike. All seeds of a fine-tuning start from the same pretrained weights. "Contrastive
alone" has seen the same pairs as "then contrastive" for the same steps of that stage, without
pretraining. The probe is a linear classifier of CIFAR-10 on the mean state of the patches.

Guess: the probe gains from a teacher that knows objects what the teacher knows more than gradients
do. Retrieval, captions and segmentation gain; answers that 6,000 questions leave open gain little.
"""

import shutil
from pathlib import Path

from beit3.data.views.preprocessing import Preprocessing
from beit3.task import load_task
from beit3.tokenizer.teacher_efficientnet import is_installed
from beit3.tokenizer.text import MODEL_FILE, TextTokenizer, read_texts
from benchmarks.learning.probes import Probe
from benchmarks.learning.runs import Run, get_recipe_steps
from benchmarks.learning.study import Options, Row, Study, Tuning, run_program

VOCABULARY = 8000
PRETRAINING = "pretraining"
IMAGES = {
    "imagenet": "imagenet_sample_1k",
    "cifar10": "cifar10_mini/train",
    "camvid": "camvid_mini/train",
}
"""Dataset of pretraining's images -> folder below --data."""
DATASETS = {
    "flickr8k": ("flickr8k_mini", ("retrieval", "captioning")),
    "camvid": ("camvid_mini", ("ade20k",)),
    "cifar10": ("cifar10_mini", ("imagenet",)),
    "daquar": ("daquar_train", ("vqa",)),
    "easy_vqa": ("easy_vqa", ("vqa",)),
    "nlvr1": ("nlvr1_dev", ("nlvr2",)),
}
"""Folder of records -> folder below --data, and the tasks that read it."""


# Records ------------------------------------------------------------------------------------------


def write_records(options: Options) -> Path:
    """Writes the records of pretraining and of all tasks that are not there; returns their root."""
    root = options.out / "records"
    write_pretraining(options.data, root / PRETRAINING)
    for name, (raw, tasks) in DATASETS.items():
        folder = root / name
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(root / PRETRAINING / MODEL_FILE, folder / MODEL_FILE)
        for task in tasks:
            if not (folder / task).exists():
                load_task(task).prepare(options.data / raw, folder, "main")
    return root


def write_pretraining(data: Path, root: Path) -> None:
    """Writes pairs, images, the text tokenizer and texts."""
    if (root / "pretrain" / "texts").exists():
        return
    pretrain, corpus = load_task("pretrain"), data / "text_corpus"
    pretrain.prepare(data / "flickr8k_mini", root, "pairs")
    for name, raw in IMAGES.items():
        pretrain.prepare(data / raw, root, f"images/{name}")
    load_task("vqkd").prepare(data / "imagenet_sample_1k", root, "main")
    files = [str(path) for path in sorted(corpus.rglob("*.txt"))]
    texts = read_texts([*files, str(root / "pretrain" / "pairs" / "train.jsonl")])
    TextTokenizer.train(texts, vocab_size=VOCABULARY).save(root / MODEL_FILE)
    pretrain.prepare(corpus, root, "texts")


# Runs ---------------------------------------------------------------------------------------------


def make_pretraining(tokenizer_recipe: str) -> Run:
    """Returns `pretrain laptop` with the codes of a recipe of the visual tokenizer."""
    steps = get_recipe_steps("vqkd", tokenizer_recipe)
    codes = Run("codes", "vqkd", tokenizer_recipe, steps, records=PRETRAINING)
    steps = get_recipe_steps("pretrain", "laptop")
    needs = {"visual_tokenizer": codes}
    return Run("pretrain", "pretrain", "laptop", steps, needs=needs, records=PRETRAINING)


def make_contrastive(init: Run | None = None) -> Run:
    """Returns the contrastive stage on pretraining's pairs, by default from initial values."""
    needs = {"init": init} if init else {}
    steps = get_recipe_steps("retrieval", "laptop_itc")
    return Run("contrastive", "retrieval", "laptop_itc", steps, needs=needs, records=PRETRAINING)


def make_tuning(task: str, records: str, *, recipe: str = "laptop", labels: int = 0) -> Tuning:
    """Returns a fine-tuning of the recipe's length."""
    return Tuning(task, get_recipe_steps(task, recipe), labels, recipe, records)


GRADIENTS = make_pretraining("laptop")
PRETRAINED = make_pretraining("laptop_efficientnet") if is_installed() else GRADIENTS

STUDY = Study(
    "photographs",
    [
        Row("pretrained", PRETRAINED),
        Row("pretrained, codes of gradients", GRADIENTS, tasks=()),
        Row("pretrained, then contrastive", make_contrastive(PRETRAINED), tasks=("retrieval",)),
        Row("contrastive alone", make_contrastive(), tasks=("retrieval",)),
        Row("scratch"),
    ],
    [
        make_tuning("retrieval", "flickr8k"),
        make_tuning("captioning", "flickr8k"),
        make_tuning("ade20k", "camvid"),
        make_tuning("vqa", "daquar"),
        make_tuning("vqa", "easy_vqa", labels=1000),
        make_tuning("imagenet", "cifar10", recipe="laptop_names"),
        make_tuning("nlvr2", "nlvr1"),
    ],
    words=False,
    probe=Probe(Preprocessing(112), ("class",), "cifar10"),
    rows_are_columns=True,
    recipe="laptop",
    shares_pretraining=True,
    write_records=write_records,
)

if __name__ == "__main__":
    run_program(STUDY, __doc__)
