"""The model card of a weights directory: README.md, written from what is known and nothing else.

Sizes come from the network, preprocessing from its config, settings and scores from the run that
trained it, where there is one. What is not known has no line.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from beit3.files import read_json, read_json_lines
from beit3.model.config import ModelConfig
from beit3.task import Task, task_name
from beit3.weights.matching import get_weights

PIPELINE_TAGS = {
    "vqa": "visual-question-answering",
    "captioning": "image-to-text",
    "retrieval": "zero-shot-image-classification",
    "imagenet": "image-classification",
    "coco": "object-detection",
    "ade20k": "image-segmentation",
    "backbone": "feature-extraction",
}
"""Task -> the hub's name for what it does, where the hub has one."""

PURPOSES = {
    "vqa": "answers questions about images",
    "captioning": "writes captions of images",
    "retrieval": "finds images for texts and texts for images",
    "nlvr2": "says whether a sentence is true of two images",
    "imagenet": "classifies images",
    "coco": "finds objects in images, with boxes and masks",
    "ade20k": "gives each pixel of an image a class",
    "backbone": "encodes images and texts",
    "pretrain": "was pretrained on masked images, texts and pairs",
    "vqkd": "turns patches of images into codes, the targets of pretraining",
}

EXAMPLE_INPUTS: Mapping[str, tuple[str, ...]] = {
    "vqa": ("picture.jpg", "what color is the car?"),
    "nlvr2": ("left.jpg", "right.jpg", "both show a car"),
    "retrieval": ("picture.jpg", "a red car"),
}
"""Task -> inputs of the example in a card; an image alone for other tasks."""

MAX_NAMES = 20
"""Names of classes or answers that a card lists."""


@dataclass(frozen=True)
class RunRecord:
    """What a run directory tells about weights in it."""

    settings: Mapping[str, Any] = field(default_factory=dict)
    """Setting -> value, as `optim.lr`. Paths of the machine are not among them."""
    scores: Mapping[str, float] = field(default_factory=dict)
    """Scores on the val split."""
    step: int = 0
    """Step of these weights; 0 where it is not known."""


def write_card(
    task: Task,
    *,
    title: str,
    license: str = "",
    run: RunRecord | None = None,
    example: str = "",
    example_inputs: Sequence[str] = (),
) -> str:
    """Returns a model card as Markdown with a YAML header.

    Args:
        task: The task.
        title: Its heading.
        license: The license's identifier, such as "mit"; without one the card names none.
        run: The run that trained the weights.
        example: What an example loads: a path, or `owner/name` of the hub.
        example_inputs: Files and texts that the example gives to the network, by default those of
            `EXAMPLE_INPUTS`. Weights that know only some images and texts have an example of them.
    """
    name, run = task_name(type(task)), run or RunRecord()
    purpose = PURPOSES.get(name, f"was trained for the task {name}")
    sections = [
        _format_header(name, license),
        f"# {title}",
        f"Weights for the package `beit3`: the network {purpose}.",
        _format_example(name, example or title, example_inputs),
        "## Network\n\n" + _format_table(_describe_network(task)),
        "## Inputs and outputs\n\n" + _format_table(_describe_inputs(task)),
    ]
    if run.settings:
        sections.append("## Training\n\n" + _format_table(run.settings.items()))
    if run.scores:
        step = f", after step {run.step:,}" if run.step else ""
        table = _format_table((score, f"{value:.4g}") for score, value in run.scores.items())
        sections.append(f"## Scores\n\nMeasured on the val split of the run{step}.\n\n{table}")
    return "\n\n".join(sections) + "\n"


def _format_header(name: str, license: str) -> str:
    tags = ["beit3", name]
    lines = ["---"]
    if license:
        lines.append(f"license: {license}")
    lines.append("library_name: beit3")
    if name in PIPELINE_TAGS:
        lines.append(f"pipeline_tag: {PIPELINE_TAGS[name]}")
    lines += ["tags:", *(f"- {tag}" for tag in tags), "---"]
    return "\n".join(lines)


def _format_example(name: str, source: str, inputs: Sequence[str]) -> str:
    inputs = inputs or EXAMPLE_INPUTS.get(name, ("picture.jpg",))
    literals = [json.dumps(text, ensure_ascii=False) for text in inputs]
    call = f"predictor({', '.join(literals)})"
    if name == "retrieval":
        call = f"predictor.embed(images=[{literals[0]}], texts=[{', '.join(literals[1:])}])"
    if name == "backbone":  # its weights may read images alone
        call = f"predictor.embed(images=[{literals[0]}])"
    if name in ("pretrain", "vqkd"):
        call = "predictor.task  # takes tensors"
    return f'```python\nimport beit3\n\npredictor = beit3.from_pretrained("{source}")\n{call}\n```'


def _format_table(rows: Iterable[tuple[str, Any]]) -> str:
    cells = [(str(name), " ".join(str(value).split()).replace("|", "\\|")) for name, value in rows]
    lines = [f"| {name} | {value} |" for name, value in cells if value]
    return "\n".join(["| | |", "|---|---|", *lines])


# What is known ------------------------------------------------------------------------------------


def _describe_network(task: Task) -> list[tuple[str, Any]]:
    """Returns names and values of the network's sizes."""
    model, weights = task.config.model, get_weights(task)
    dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in weights.values()}
    rows: list[tuple[str, Any]] = [
        ("task", task_name(type(task))),
        ("width", model.dim),
        ("layers", model.depth),
        ("attention heads", model.num_heads),
        ("width of feed-forward layers", model.ffn_dim),
        ("patch size in pixels", model.patch_size),
    ]
    if isinstance(model, ModelConfig):  # a visual tokenizer has neither texts nor experts
        rows.append(("rows of the token embedding", model.vocab_size))
        rows.append(("experts", _list_experts(model)))
    rows.append(("parameters", f"{sum(tensor.numel() for tensor in weights.values()):,}"))
    rows.append(("precision", ", ".join(sorted(dtypes))))
    return rows


def _list_experts(model: ModelConfig) -> str:
    experts = [*model.modality_names]
    if num_layers := model.fusion_layers:
        last = "last layer" if num_layers == 1 else f"last {num_layers} layers"
        experts.append(f"fusion in the {last}")
    return ", ".join(experts)


def _describe_inputs(task: Task) -> list[tuple[str, Any]]:
    """Returns names and values of what goes in and comes out."""
    image = task.config.image
    rows: list[tuple[str, Any]] = [("inputs", ", ".join(task.input_names))]
    rows.append(
        (
            "images",
            f"{image.image_size} px, resize rule {image.resize}, {image.interpolation}, "
            f"mean {_join(image.mean)}, deviation {_join(image.std)}",
        )
    )
    if task.has_tokenizer:
        rows.append(
            (
                "texts",
                f"up to {task.config.text_length} tokens, {task.tokenizer.vocab_size} ids, "
                f"tokenizer SHA-256 {task.tokenizer.digest}",
            )
        )
    if names := task.config.output_names:
        more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
        rows.append(("outputs", f"{len(names)}: {', '.join(names[:MAX_NAMES])}{more}"))
    return rows


def _join(values: Sequence[float]) -> str:
    return "/".join(f"{value:g}" for value in values)


def read_run(directory: Path, task_class: type[Task]) -> RunRecord | None:
    """Returns what is known of weights in a run directory, or None where they lie in none.

    Args:
        directory: The weights directory: `best`, `last`, or another.
        task_class: The task that the weights are used for; a run of another task tells nothing.

    Raises:
        ValueError: A file of the run cannot be read.
    """
    run = directory.parent
    if directory.name not in ("best", "last") or not (run / "recipe.json").is_file():
        return None
    content = read_json(run / "recipe.json")
    if content.get("task") != task_name(task_class):
        return None
    recipe = content.get("recipe", {})
    step, scores = _find_scores(
        run / "metrics.jsonl", task_class.headline, is_best=directory.name == "best"
    )
    settings: dict[str, Any] = {}
    if init := content.get("init"):
        # Not the whole path: it tells of the machine.
        num_parts = 2 if Path(init).name in ("best", "last") else 1
        settings["started from"] = "/".join(Path(init).parts[-num_parts:])
    for label, section, name in (
        ("steps", "run", "steps"),
        ("learning rate", "optim", "lr"),
        ("weight decay", "optim", "weight_decay"),
        ("seed", "run", "seed"),
    ):
        if (value := recipe.get(section, {}).get(name)) is not None:
            settings[label] = value
    batch = recipe.get("data", {}).get("batch", {})
    if batch:
        settings["records per step"] = ", ".join(f"{key} {n}" for key, n in batch.items())
    return RunRecord(settings, scores, step)


def _find_scores(path: Path, headline: str, *, is_best: bool) -> tuple[int, dict[str, float]]:
    """Returns step and scores of the best evaluation of a run, or of its last one."""
    if not path.is_file():
        return 0, {}
    evaluations = []
    for _, line in read_json_lines(path):
        scores = {
            name.removeprefix("val/"): value
            for name, value in line.items()
            if name.startswith("val/")
        }
        if headline in scores:
            evaluations.append((line.get("step", 0), scores))
    if not evaluations:
        return 0, {}
    if is_best:
        # The first of equal scores, as training keeps it.
        return max(evaluations, key=lambda evaluation: evaluation[1][headline])
    return evaluations[-1]
