"""Every file that was released with BEiT-3 and for BEiT v2's tokenizer: what it is and what it is good for.

Names, sizes and scores are those of the release's README; parameters are counted from the networks. Nothing is fetched:
a file is the reader's to download. The giant of the paper was never released. Shapes: names and text.
"""

from dataclasses import dataclass
from textwrap import wrap

from beit3.config import suggestion

WIDTH = 60
"""Characters of the last column of the table."""

LISTED = "the README of github.com/microsoft/unilm lists it"
"""For what a person should open; links have moved twice, so none is kept here."""


@dataclass(frozen=True)
class ReleasedFile:
    """One row of the list."""

    name: str
    task: str
    """What it was last trained for, by the name of our task; `text` for the text tokenizer."""
    folder: str
    """Of github.com/microsoft/unilm, whose README lists the file."""
    image_size: int = 0
    """Pixels; 0 where there is no image."""
    size: str = ""
    """`base` or `large`."""
    parameters: float = 0.0
    """Millions, heads included."""
    starts: tuple[str, ...] = ()
    """What may be trained from it, or with its codes: a task and its recipe."""
    score: str = ""
    """As the release reports it."""


def _pretrained(size: str, kind: str, task: str, parameters: float, *uses: str) -> ReleasedFile:
    """`uses`: "vqa 480" for the recipe `base_480` of vqa, where the size is base."""
    starts = tuple(f"{use.split()[0]} {size}_{use.split()[1]}" for use in uses)
    return ReleasedFile(
        f"beit3_{size}{kind}_patch16_224.pth", task, "beit3", 224, size, parameters, starts
    )


def _tuned(
    network: str, pixels: int, what: str, task: str, parameters: float, score: str
) -> ReleasedFile:
    name = f"beit3_{network}_patch16_{pixels}_{what}.pth"
    return ReleasedFile(name, task, "beit3", pixels, network.split("_")[0], parameters, score=score)


def _codes(name: str, parameters: float) -> ReleasedFile:
    starts = ("pretrain base_224", "pretrain large_224")
    return ReleasedFile(
        f"vqkd_encoder_base_decoder_{name}.pth", "vqkd", "beit2", 224, "base", parameters, starts
    )


FUSION = ("vqa 480", "captioning 480", "captioning 480_nocaps")
DUAL = ("retrieval 384_coco", "retrieval 384_flickr30k")
FILES = (
    _pretrained(
        "base",
        "",
        "pretrain",
        276.5,
        *FUSION,
        "nlvr2 224",
        "imagenet 224",
        "retrieval 224_itc",
        "pretrain 224",
    ),
    _pretrained(
        "base",
        "_indomain",
        "pretrain",
        276.5,
        *FUSION,
        "nlvr2 224_indomain",
        "imagenet 224",
        "pretrain 224_indomain",
    ),
    _pretrained("base", "_itc", "retrieval", 222.2, *DUAL, "imagenet 224"),
    _pretrained(
        "large",
        "",
        "pretrain",
        746.7,
        *FUSION,
        "nlvr2 224",
        "imagenet 224",
        "retrieval 224_itc",
        "pretrain 224",
    ),
    _pretrained(
        "large",
        "_indomain",
        "pretrain",
        746.7,
        *FUSION,
        "vqa 768",
        "nlvr2 224_indomain",
        "imagenet 224",
        "pretrain 224",
    ),
    _pretrained("large", "_itc", "retrieval", 674.8, *DUAL, "imagenet 224"),
    _tuned("base", 480, "vqa", "vqa", 228.1, "VQAv2 test-dev 77.65"),
    _tuned("base_indomain", 480, "vqa", "vqa", 228.1, "VQAv2 test-dev 78.46"),
    _tuned("large", 480, "vqa", "vqa", 683.0, "VQAv2 test-dev 81.85"),
    _tuned("large_indomain", 480, "vqa", "vqa", 683.0, "VQAv2 test-dev 82.53"),
    _tuned(
        "large_indomain", 768, "vgqaaug_vqa", "vqa", 684.4, "VQAv2 test-dev 82.97, test-std 83.03"
    ),
    _tuned("base", 224, "nlvr2", "nlvr2", 225.7, "NLVR2 dev 83.6, test-P 84.4"),
    _tuned("base_indomain", 224, "nlvr2", "nlvr2", 225.7, "NLVR2 dev 84.6, test-P 85.3"),
    _tuned("large", 224, "nlvr2", "nlvr2", 681.1, "NLVR2 dev 88.5, test-P 89.4"),
    _tuned("large_indomain", 224, "nlvr2", "nlvr2", 681.1, "NLVR2 dev 89.2, test-P 90.0"),
    _tuned("base", 480, "coco_captioning", "captioning", 270.8, "COCO test CIDEr 133.6"),
    _tuned("base_indomain", 480, "coco_captioning", "captioning", 270.8, "COCO test CIDEr 135.0"),
    _tuned("large", 480, "coco_captioning", "captioning", 739.0, "COCO test CIDEr 143.2"),
    _tuned("base", 480, "nocaps", "captioning", 270.8, "NoCaps val CIDEr 104.4"),
    _tuned("base_indomain", 480, "nocaps", "captioning", 270.8, "NoCaps val CIDEr 105.6"),
    _tuned("large", 480, "nocaps", "captioning", 739.0, "NoCaps val CIDEr 120.2"),
    _tuned("base", 384, "coco_retrieval", "retrieval", 222.5, "COCO image R@1 61.4, text R@1 79.1"),
    _tuned(
        "large", 384, "coco_retrieval", "retrieval", 675.2, "COCO image R@1 63.4, text R@1 82.1"
    ),
    _tuned(
        "base", 384, "f30k_retrieval", "retrieval", 222.5, "Flickr30k image R@1 86.2, text R@1 96.3"
    ),
    _tuned(
        "large",
        384,
        "f30k_retrieval",
        "retrieval",
        675.2,
        "Flickr30k image R@1 88.1, text R@1 97.2",
    ),
    _tuned("base", 224, "in1k", "imagenet", 221.8, "ImageNet-1k top-1 85.4"),
    _tuned("base_indomain", 224, "in1k", "imagenet", 221.8, "ImageNet-1k top-1 85.4"),
    _tuned("large", 224, "in1k", "imagenet", 673.7, "ImageNet-1k top-1 87.6"),
    _tuned("large_indomain", 224, "in1k", "imagenet", 673.7, "ImageNet-1k top-1 87.5"),
    ReleasedFile("beit3.spm", "text", "beit3", score="SentencePiece, 64,000 pieces"),
    _codes("3x768x12_clip-d5036aa7", 109.1),
    _codes("1x768x12_clip-d93179da", 94.9),
    _codes("1x768x12_dino-663c55d7", 95.1),
)
"""Fusion tasks start from the plain or in-domain files, retrieval and ImageNet from the contrastive ones (`itc`)."""


def about(name: str) -> str:
    """What a file of this name would be and where the release lists it, in one sentence; empty for names of others.

    The ending plays no part (browsers save these files as .zip), nor does the digest in a tokenizer's name.
    """
    stems = {_stem(file.name): file for file in FILES}
    stem = _stem(name)
    if stem not in stems:
        return (
            suggestion(stem, list(stems)).removeprefix("; ")
            if stem.startswith(("beit3_", "vqkd_"))
            else ""
        )
    file = stems[stem]
    if file.task == "text":
        what = "text tokenizer"
    else:
        tuned = "" if file.starts else "fine-tuned "
        kind = (
            "visual tokenizer"
            if file.task == "vqkd"
            else f"{tuned}{file.size} network for {file.task}"
        )
        what = f"{kind} ({file.image_size} px, {file.parameters} million parameters)"
    return (
        f"that is the release's {what}; download it yourself, {LISTED} in its folder {file.folder}"
    )


def table(task: str | None = None) -> list[str]:
    """The list as lines for a person, all of it or the files of one task. ValueError for a task of which no file was released."""
    tasks = list(dict.fromkeys(file.task for file in FILES))
    if task is not None and task not in tasks:
        raise ValueError(
            f"no file was released for {task}{suggestion(task, tasks)} (known: {', '.join(tasks)})"
        )
    rows = [("file", "task", "px", "size", "params", "what it starts, or its score")]
    for file in FILES:
        if task in (None, file.task):
            uses = ", ".join(
                start.replace(" ", "\xa0") for start in file.starts
            )  # a task and its recipe stay in one line
            numbers = (
                str(file.image_size or ""),
                file.size,
                f"{file.parameters:.1f} M" if file.parameters else "",
            )
            first, *more = (line.replace("\xa0", " ") for line in wrap(uses or file.score, WIDTH))
            rows.append((file.name, file.task, *numbers, first))
            rows += [("", "", "", "", "", line) for line in more]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return [
        *lines,
        "BEiT-3 files start a task with --init, vqkd files give pretrain its codes with --task.visual_tokenizer.",
        "Listed in the READMEs of github.com/microsoft/unilm, folders beit3 and beit2 (vqkd). Nothing is downloaded for you.",
    ]


def _stem(name: str) -> str:
    """`vqkd_encoder_base_decoder_3x768x12_clip` of vqkd_encoder_base_decoder_3x768x12_clip-d5036aa7.pth."""
    return name.lower().partition(".")[0].partition("-")[0]
