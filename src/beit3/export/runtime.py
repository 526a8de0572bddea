"""Loads an exported directory: the task itself, whose network is graphs that onnxruntime runs.

Preprocessing, records, predictions and scores are the task's own code. Only what calls the network
is replaced: `outputs` by the graphs image, text and pair; the backbone of captioning by start and
step, so that all ways of decoding work; the trunk of coco by its graph, before the head in torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from beit3.export.description import EXPORT_FILE, HEAD_FILE, Description, read_description
from beit3.export.modes import (
    IMAGE_MODE,
    MATCH_MODE,
    PAIR_MODE,
    START_MODE,
    STEP_MODE,
    TEXT_MODE,
    TRUNK_MODE,
    list_modes,
    name_cache_entries,
)
from beit3.export.sessions import open_session, run_session
from beit3.model.beit3 import Encoded
from beit3.model.cache import Cache, LayerCache
from beit3.task import Batch, Task, load_task
from beit3.tokenizer.text import TextTokenizer
from beit3.weights.matching import LoadReport
from beit3.weights.store import TOKENIZER_FILE, read_config


def is_exported(path: str | Path) -> bool:
    """Returns whether `path` is a directory that `export_task` wrote, or a graph in it."""
    path = Path(path)
    return path.suffix == ".onnx" or (path / EXPORT_FILE).is_file()


def load_exported(
    path: str | Path, *, options: Mapping[str, object] | None = None
) -> tuple[Task, LoadReport]:
    """Returns the task of an export, on the CPU, and a report for `Predictor`.

    Args:
        path: The directory, or a graph in it, which stands for the directory.
        options: Options of `load` that weights take; an export was made with them.

    Raises:
        ValueError: An option is given, onnxruntime is not installed, or a file is missing,
            incomplete or not one of an export.
    """
    path = Path(path)
    for name, value in (options or {}).items():
        if value:
            raise ValueError(
                f"{path} is an export, which was made for one task: leave {name} out, or give it "
                "to beit3 export"
            )
    directory = path if path.is_dir() else path.parent
    if not path.exists():
        raise ValueError(f"no export at {path}: give a directory that beit3 export wrote")
    if not (directory / EXPORT_FILE).is_file():
        raise ValueError(
            f"{path} has no {EXPORT_FILE} beside it: give a graph of a directory that beit3 export "
            "wrote"
        )
    description = read_description(directory)
    graphs = Graphs(directory, description)
    task = build_task(directory, graphs)
    task.stored_fingerprint = description.fingerprint
    return task.eval(), LoadReport(f"{directory} (export)", tuple(description.graphs), {}, {})


class Graphs:
    """The graphs of a directory, opened when they are first used."""

    def __init__(self, directory: Path, description: Description):
        self.directory, self.description = directory, description
        self.sessions: dict[str, Any] = {}

    def __contains__(self, mode: str) -> bool:
        return mode in self.description.graphs

    def run(self, mode: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Runs a graph on the inputs that it takes and returns its outputs by name.

        Raises ValueError where the export does not hold it, or it does not take these sizes.
        """
        if mode not in self.description.graphs:
            raise ValueError(
                f"{self.directory} holds the modes {', '.join(self.description.graphs)}, and this "
                f"needs {mode}: export the weights with --mode {mode}"
            )
        graph = self.description.graphs[mode]
        if mode not in self.sessions:
            self.sessions[mode] = open_session(self.directory / graph.file)
        values = {name: inputs[name] for name in graph.inputs}
        try:
            outputs = run_session(self.sessions[mode], values)
        except Exception as error:  # its exceptions share no class
            shapes = {name: list(values[name].shape) for name in list(values)[:3]}
            raise ValueError(
                f"{self.directory / graph.file} does not take inputs {shapes}: "
                f"{' '.join(str(error).split())[:200]}"
            ) from error
        return dict(zip(graph.outputs, outputs, strict=True))


# Building -----------------------------------------------------------------------------------------


def build_task(directory: Path, graphs: Graphs) -> Task:
    """Builds the task of an export around its graphs."""
    stored = read_config(directory)
    tokenizer_file = directory / TOKENIZER_FILE
    tokenizer = TextTokenizer(tokenizer_file) if tokenizer_file.is_file() else None
    if stored.tokenizer is not None and (tokenizer is None or tokenizer.digest != stored.tokenizer):
        raise ValueError(f"{tokenizer_file} is not the tokenizer of this export: copy it again")
    task_class, config = load_task(stored.task), stored.config
    if stored.task == "coco":
        task = task_class(config, tokenizer=tokenizer)
        load_head(task, directory / HEAD_FILE)
        task.backbone = TrunkRunner(graphs)
        return task
    with torch.device("meta"):  # parameters without values: there are no weights
        task = task_class(config, tokenizer=tokenizer)
    for name in [*task._modules, *task._parameters, *task._buffers]:
        delattr(task, name)
    if TRUNK_MODE in graphs:
        task.backbone = TrunkRunner(graphs)
        task.outputs = task.predict = refuse_trunk  # type: ignore[method-assign]
    elif START_MODE in graphs or STEP_MODE in graphs:
        task.backbone, task.text_head = CaptionRunner(graphs, config.model), nn.Identity()
        task.outputs = OutputsRunner(task, graphs).run  # type: ignore[method-assign]
    else:
        task.backbone = Weightless(graphs)
        task.outputs = OutputsRunner(task, graphs).run  # type: ignore[method-assign]
    if MATCH_MODE in graphs:
        task.matching_head = nn.Identity()
        task.match = OutputsRunner(task, graphs).match  # type: ignore[assignment]
    return task


def load_head(task: Task, file: Path) -> None:
    """Loads the parts of a detector that follow its trunk."""
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError):
        raise ValueError(f"{file} is missing or incomplete: copy the export again") from None
    needed = {name for name in task.state_dict() if not name.startswith("backbone.")}
    if needed - tensors.keys():
        raise ValueError(f"{file} lacks {min(needed - tensors.keys())}: copy the export again")
    task.load_state_dict(tensors, strict=False)


def refuse_trunk(batch: Batch) -> Any:
    """Raises ValueError: the head of ade20k reads the trunk's blocks, not its features alone."""
    raise ValueError(
        "this export is a trunk without its head: give pixels to .task.backbone, or predict with "
        "the weights"
    )


class Weightless(nn.Module):
    """A network that consists of graphs.

    Its one parameter says where and in which format inputs are prepared.
    """

    def __init__(self, graphs: Graphs):
        super().__init__()
        self.graphs = graphs
        self.placeholder = nn.Parameter(torch.zeros(1), requires_grad=False)


@dataclass
class OutputsRunner:
    """`Task.outputs` by the graphs image, text and pair."""

    task: Task
    graphs: Graphs

    def run(self, batch: Batch) -> dict[str, Tensor]:
        """Returns the task's outputs for the image, the text or both of a batch."""
        masked = batch.get("image_mask")
        if masked is not None and bool(masked.any()):
            raise ValueError("an export takes no masked images: leave image_mask out")
        inputs = self.make_inputs(batch)
        modes = [mode for mode in (IMAGE_MODE, TEXT_MODE) if mode in inputs]
        if len(modes) == 2 and PAIR_MODE in list_modes(self.task):
            modes = [PAIR_MODE]  # one fused sequence; retrieval encodes each alone
        outputs: dict[str, Tensor] = {}
        for mode in modes:
            for name, value in self.graphs.run(mode, inputs).items():
                outputs[name.removesuffix("_states")] = value
        return outputs

    def match(self, batch: Batch) -> Tensor:
        """Returns the matching head's logits [B] of pairs."""
        return self.graphs.run(MATCH_MODE, self.make_inputs(batch))["matching"]

    def make_inputs(self, batch: Batch) -> dict[str, Tensor]:
        """Returns normalized images, texts and their padding, as far as the batch holds them."""
        inputs: dict[str, Tensor] = {}
        if "image" in batch:
            inputs["image"] = self.task.normalize_images(batch).float()
        if "text" in batch:
            padding = batch.get("text_padding")
            inputs["text"] = batch["text"]
            inputs["text_padding"] = (
                torch.zeros_like(batch["text"], dtype=torch.bool) if padding is None else padding
            )
        return inputs


class TrunkRunner(Weightless):
    """The trunk of a dense task as its graph."""

    def forward(self, image: Tensor) -> Tensor:
        """Encodes pixels [B, 3, H, W] to features [B, h, w, D]."""
        return self.graphs.run(TRUNK_MODE, {"image": image.float()})["features"]


@dataclass
class EncodedLogits:
    """Logits in place of the states that the head would map to them."""

    parts: Mapping[str, Tensor] = field(default_factory=dict)

    def of(self, modality: str) -> Tensor:
        return self.parts[modality]


class CaptionRunner(Weightless):
    """The backbone and head of captioning, as `DecoderState` calls them: start, then steps."""

    def __init__(self, graphs: Graphs, config: Any):
        super().__init__(graphs)
        self.config = config

    def forward(
        self,
        image: Tensor | None = None,
        text: Tensor | None = None,
        *,
        attention_mask: Tensor,
        text_position_ids: Tensor,
        cache: Cache,
        read: str = "all",
    ) -> "Encoded | EncodedLogits":
        """Returns logits as the states of the text, and appends keys and values to the cache.

        The first call brings images with the first tokens, later calls bring tokens alone.
        """
        assert text is not None
        depth = self.config.depth
        if image is not None:
            cache.layers.extend(LayerCache() for _ in range(depth))
            cache.fused = True
            outputs = self.graphs.run(START_MODE, {"image": image.float(), "text": text})
        else:
            inputs = {
                "text": text,
                "position_ids": text_position_ids,
                "attention_mask": attention_mask,
            }
            names = iter(name_cache_entries(depth, "past"))
            for layer in cache.layers:
                assert layer.key is not None and layer.value is not None
                inputs[next(names)] = layer.key[:, :, : layer.length]
                inputs[next(names)] = layer.value[:, :, : layer.length]
            outputs = self.graphs.run(STEP_MODE, inputs)
        names = iter(name_cache_entries(depth, "new"))
        for layer in cache.layers:
            layer.extend(outputs[next(names)], outputs[next(names)])
        cache.num_text += text.shape[1]
        return EncodedLogits({"text": outputs["logits"]})
