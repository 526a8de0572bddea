"""The catalog of files that were released with BEiT-3, and of BEiT v2's visual tokenizers.

Names, sizes and scores are those of the release's README; parameters are counted from the networks.
`beit3.weights.released` downloads a file when it is asked to. The giant network of the paper was
never released.
"""

from dataclasses import dataclass
from textwrap import wrap

from beit3.config import suggest

LAST_COLUMN_WIDTH = 60
"""Characters of the table's last column."""

BASE_URLS = {
    "beit3": "https://github.com/addf400/files/releases/download/beit3",
    "beit2": "https://github.com/addf400/files/releases/download/BEiT-v2",
}
"""Folder of github.com/microsoft/unilm -> where the files that its README lists lie since 2024."""

NUM_BYTES = {
    "beit3.spm": 1_356_293,
    "beit3_large_patch16_384_coco_retrieval.pth": 1_350_590_595,
}
"""Sizes that are known. Of the other files none was at hand."""

SHA256 = {
    "beit3.spm": "6f5e2fefcf793761a76a6bfb8ad35489f9c203b25557673284b6d032f41043f4",
    "beit3_base_patch16_384_coco_retrieval.pth": (
        "df39666a88508ccd356567616582bc62cd56fa86ad6a8f8e50471b35217c8629"
    ),
    "beit3_large_patch16_224.pth": (
        "b76916cb3008d5e27519884b256dd1698faeb45ea7ab3950f319353e5051bd60"
    ),
    "vqkd_encoder_base_decoder_3x768x12_clip-d5036aa7.pth": "d5036aa7",
    "vqkd_encoder_base_decoder_1x768x12_clip-d93179da.pth": "d93179da",
    "vqkd_encoder_base_decoder_1x768x12_dino-663c55d7.pth": "663c55d7",
}
"""Digests that are known, in whole or by their first characters. The release states none but those
in the visual tokenizers' names, which its code checks. The others are written down in public
projects that download these files."""

MAX_BYTES_PER_PARAMETER = 16
"""A file may hold an optimizer and a teacher beside float32 weights, but no more than this."""


@dataclass(frozen=True)
class ReleasedFile:
    """One file of the release."""

    name: str
    task: str
    """The task it was last trained for, by our name; `text` for the text tokenizer."""
    folder: str
    """Folder of github.com/microsoft/unilm whose README lists the file."""
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

    @property
    def stem(self) -> str:
        """The name that users type: without its ending, but for the text tokenizer's."""
        return self.name if self.task == "text" else self.name.removesuffix(".pth")

    @property
    def url(self) -> str:
        """Where the file was in 2024."""
        return f"{BASE_URLS[self.folder]}/{self.name}"

    @property
    def num_bytes(self) -> int:
        """Size of the file; 0 where it is not known."""
        return NUM_BYTES.get(self.name, 0)

    @property
    def max_bytes(self) -> int:
        """Largest plausible size of the file."""
        return self.num_bytes or int(self.parameters * 1e6 * MAX_BYTES_PER_PARAMETER)

    @property
    def sha256(self) -> str:
        """Digest of the file or its first characters; empty where it is not known."""
        return SHA256.get(self.name, "")


def _list_pretrained(
    size: str, variant: str, trained_for: str, parameters: float, *uses: str
) -> ReleasedFile:
    """`uses`: "vqa 480" stands for the recipe `base_480` of vqa, where the size is base."""
    starts = tuple(f"{task} {size}_{recipe}" for task, recipe in map(str.split, uses))
    name = f"beit3_{size}{variant}_patch16_224.pth"
    return ReleasedFile(name, trained_for, "beit3", 224, size, parameters, starts)


def _list_finetuned(
    network: str, image_size: int, suffix: str, task: str, parameters: float, score: str
) -> ReleasedFile:
    name, size = f"beit3_{network}_patch16_{image_size}_{suffix}.pth", network.split("_")[0]
    return ReleasedFile(name, task, "beit3", image_size, size, parameters, score=score)


def _list_visual_tokenizer(decoder: str, parameters: float) -> ReleasedFile:
    name = f"vqkd_encoder_base_decoder_{decoder}.pth"
    starts = ("pretrain base_224", "pretrain large_224")
    return ReleasedFile(name, "vqkd", "beit2", 224, "base", parameters, starts)


FUSION_RECIPES = ("vqa 480", "captioning 480", "captioning 480_nocaps")
RETRIEVAL_RECIPES = ("retrieval 384_coco", "retrieval 384_flickr30k")
RELEASED_FILES = (
    _list_pretrained(
        "base",
        "",
        "pretrain",
        276.5,
        *FUSION_RECIPES,
        "nlvr2 224",
        "imagenet 224",
        "retrieval 224_itc",
        "pretrain 224",
    ),
    _list_pretrained(
        "base",
        "_indomain",
        "pretrain",
        276.5,
        *FUSION_RECIPES,
        "nlvr2 224_indomain",
        "imagenet 224",
        "pretrain 224_indomain",
    ),
    _list_pretrained(
        "base",
        "_itc",
        "retrieval",
        222.2,
        *RETRIEVAL_RECIPES,
        "retrieval 384_coco_matching",
        "imagenet 224",
    ),
    _list_pretrained(
        "large",
        "",
        "pretrain",
        746.7,
        *FUSION_RECIPES,
        "nlvr2 224",
        "imagenet 224",
        "retrieval 224_itc",
        "pretrain 224",
    ),
    _list_pretrained(
        "large",
        "_indomain",
        "pretrain",
        746.7,
        *FUSION_RECIPES,
        "vqa 768",
        "nlvr2 224_indomain",
        "imagenet 224",
        "pretrain 224",
    ),
    _list_pretrained("large", "_itc", "retrieval", 674.8, *RETRIEVAL_RECIPES, "imagenet 224"),
    _list_finetuned("base", 480, "vqa", "vqa", 228.1, "VQAv2 test-dev 77.65"),
    _list_finetuned("base_indomain", 480, "vqa", "vqa", 228.1, "VQAv2 test-dev 78.46"),
    _list_finetuned("large", 480, "vqa", "vqa", 683.0, "VQAv2 test-dev 81.85"),
    _list_finetuned("large_indomain", 480, "vqa", "vqa", 683.0, "VQAv2 test-dev 82.53"),
    _list_finetuned(
        "large_indomain", 768, "vgqaaug_vqa", "vqa", 684.4, "VQAv2 test-dev 82.97, test-std 83.03"
    ),
    _list_finetuned("base", 224, "nlvr2", "nlvr2", 225.7, "NLVR2 dev 83.6, test-P 84.4"),
    _list_finetuned("base_indomain", 224, "nlvr2", "nlvr2", 225.7, "NLVR2 dev 84.6, test-P 85.3"),
    _list_finetuned("large", 224, "nlvr2", "nlvr2", 681.1, "NLVR2 dev 88.5, test-P 89.4"),
    _list_finetuned("large_indomain", 224, "nlvr2", "nlvr2", 681.1, "NLVR2 dev 89.2, test-P 90.0"),
    _list_finetuned("base", 480, "coco_captioning", "captioning", 270.8, "COCO test CIDEr 133.6"),
    _list_finetuned(
        "base_indomain", 480, "coco_captioning", "captioning", 270.8, "COCO test CIDEr 135.0"
    ),
    _list_finetuned("large", 480, "coco_captioning", "captioning", 739.0, "COCO test CIDEr 143.2"),
    _list_finetuned("base", 480, "nocaps", "captioning", 270.8, "NoCaps val CIDEr 104.4"),
    _list_finetuned("base_indomain", 480, "nocaps", "captioning", 270.8, "NoCaps val CIDEr 105.6"),
    _list_finetuned("large", 480, "nocaps", "captioning", 739.0, "NoCaps val CIDEr 120.2"),
    _list_finetuned(
        "base", 384, "coco_retrieval", "retrieval", 222.5, "COCO image R@1 61.4, text R@1 79.1"
    ),
    _list_finetuned(
        "large", 384, "coco_retrieval", "retrieval", 675.2, "COCO image R@1 63.4, text R@1 82.1"
    ),
    _list_finetuned(
        "base", 384, "f30k_retrieval", "retrieval", 222.5, "Flickr30k image R@1 86.2, text R@1 96.3"
    ),
    _list_finetuned(
        "large",
        384,
        "f30k_retrieval",
        "retrieval",
        675.2,
        "Flickr30k image R@1 88.1, text R@1 97.2",
    ),
    _list_finetuned("base", 224, "in1k", "imagenet", 221.8, "ImageNet-1k top-1 85.4"),
    _list_finetuned("base_indomain", 224, "in1k", "imagenet", 221.8, "ImageNet-1k top-1 85.4"),
    _list_finetuned("large", 224, "in1k", "imagenet", 673.7, "ImageNet-1k top-1 87.6"),
    _list_finetuned("large_indomain", 224, "in1k", "imagenet", 673.7, "ImageNet-1k top-1 87.5"),
    ReleasedFile("beit3.spm", "text", "beit3", score="SentencePiece, 64,000 pieces"),
    _list_visual_tokenizer("3x768x12_clip-d5036aa7", 109.1),
    _list_visual_tokenizer("1x768x12_clip-d93179da", 94.9),
    _list_visual_tokenizer("1x768x12_dino-663c55d7", 95.1),
)
"""Fusion tasks start from the plain or in-domain files, retrieval and ImageNet from the contrastive
ones (`itc`)."""


def find_file(name: str) -> ReleasedFile | None:
    """Returns the released file of this name, or None.

    The ending of the name plays no part (browsers save these files as .zip), nor does the digest in
    a visual tokenizer's name.
    """
    return _get_files_by_stem().get(_get_stem(name))


def find_by_name(name: str) -> ReleasedFile | None:
    """Returns the released file that has this name, with or without its ending, or None.

    A visual tokenizer's digest may be left out. Unlike `find_file`, this takes no name that goes on
    in another way: `beit3_base_patch16_224-mine.pth` and timm's
    `beit3_base_patch16_224.in22k_ft_in1k` are other files.
    """
    file = find_file(name)
    if file is None:
        return None
    stem, dot, ending = file.name.rpartition(".")
    without_digest = stem.partition("-")[0]
    names = {file.stem, file.name, without_digest, f"{without_digest}{dot}{ending}"}
    if file.task == "text":  # its name is always with the ending
        names = {file.name}
    return file if name.lower() in names else None


def describe_file(name: str) -> str:
    """Returns what a released file of this name is and how to get it, as a sentence.

    Names are compared as `find_file` does. Returns a suggestion for names that look like
    misspelled ones, and an empty string for others.
    """
    file = find_file(name)
    if file is None:
        return suggest_file(name) if _get_stem(name).startswith(("beit3_", "vqkd_")) else ""
    return (
        f"that is the release's {_describe_content(file)}; get it with beit3 download {file.stem}"
    )


def suggest_file(name: str) -> str:
    """Returns "did you mean ...?" for a name close to that of a released file, else ''."""
    return suggest(_get_stem(name), list(_get_files_by_stem())).removeprefix("; ")


def _get_files_by_stem() -> dict[str, ReleasedFile]:
    return {_get_stem(file.name): file for file in RELEASED_FILES}


def _describe_content(file: ReleasedFile) -> str:
    if file.task == "text":
        return "text tokenizer"
    sizes = f"({file.image_size} px, {file.parameters} million parameters)"
    if file.task == "vqkd":
        return f"visual tokenizer {sizes}"
    finetuned = "" if file.starts else "fine-tuned "
    return f"{finetuned}{file.size} network for {file.task} {sizes}"


def format_table(task: str | None = None) -> list[str]:
    """Returns the catalog as lines of text, all of it or the files of one task.

    Raises ValueError for a task of which no file was released.
    """
    tasks = list(dict.fromkeys(file.task for file in RELEASED_FILES))
    if task is not None and task not in tasks:
        raise ValueError(
            f"no file was released for {task}{suggest(task, tasks)} (known: {', '.join(tasks)})"
        )
    rows: list[tuple[str, ...]] = [
        ("file", "task", "px", "size", "params", "what it starts, or its score")
    ]
    for file in RELEASED_FILES:
        if task in (None, file.task):
            rows += _make_rows(file)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join(cells).rstrip())
    return [
        *lines,
        "BEiT-3 files start a task with --init, vqkd files give pretrain its codes with "
        "--task.visual_tokenizer.",
        "Listed in the READMEs of github.com/microsoft/unilm, folders beit3 and beit2 (vqkd). "
        "beit3 download NAME gets one.",
    ]


def _make_rows(file: ReleasedFile) -> list[tuple[str, ...]]:
    """Returns the rows of a file: a first one, and one for each further line of its last cell."""
    # No-break spaces keep a task and its recipe on one line.
    uses = ", ".join(start.replace(" ", "\xa0") for start in file.starts)
    lines = wrap(uses or file.score, LAST_COLUMN_WIDTH)
    first, *more = [line.replace("\xa0", " ") for line in lines]
    image_size = str(file.image_size or "")
    parameters = f"{file.parameters:.1f} M" if file.parameters else ""
    rows: list[tuple[str, ...]] = [(file.name, file.task, image_size, file.size, parameters, first)]
    return rows + [("", "", "", "", "", line) for line in more]


def _get_stem(name: str) -> str:
    """Returns the part of a file's name before its digest and ending, in lower case."""
    return name.lower().partition(".")[0].partition("-")[0]
