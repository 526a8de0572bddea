"""Exports a task to a directory, after every graph has been compared with the network.

export/
  image.onnx ...      one graph per mode; image.onnx.data beside it where its weights are large
  image.pt2 ...       the same as programs of torch.export, where asked for
  head.safetensors    of coco: what follows the trunk, which stays in torch
  export.json         the graphs, their inputs and outputs
  config.json         task, its config with the preprocessing; text.model the tokenizer
  parity.json, .md    how far each graph is from the network
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from beit3.config import to_dict
from beit3.export.description import (
    EXPORT_FILE,
    FLOAT32,
    HEAD_FILE,
    INT8,
    REPORT_FILE,
    TABLE_FILE,
    describe,
)
from beit3.export.examples import choose_sizes, make_examples
from beit3.export.extra import PACKAGES, import_extra
from beit3.export.graphs import quantize_onnx, quiet, trace, write_onnx
from beit3.export.modes import TRUNK_MODE, Mode, choose_modes, list_modes, make_mode, needs_text
from beit3.export.parity import (
    Comparison,
    Run,
    check_comparisons,
    compare,
    format_report,
)
from beit3.export.sessions import open_session, run_session
from beit3.task import Task, task_name
from beit3.tensor_files import write_tensors
from beit3.weights.matching import LoadReport, get_weights, serves_text
from beit3.weights.store import CONFIG_FILE, TOKENIZER_FILE, describe_task, replace_directory

GRAPH_ENDINGS = (".onnx", ".onnx.data", ".pt2")
OTHER_FILES = (EXPORT_FILE, CONFIG_FILE, TOKENIZER_FILE, HEAD_FILE, REPORT_FILE, TABLE_FILE)


@dataclass(frozen=True)
class Export:
    """What was written."""

    directory: Path
    files: dict[str, int]
    """Name of a file -> its bytes."""
    comparisons: list[Comparison]

    def lines(self) -> list[str]:
        """Returns a summary for the user, a line per mode and program."""
        lines = []
        for key in dict.fromkeys((row.mode, row.program) for row in self.comparisons):
            rows = [row for row in self.comparisons if (row.mode, row.program) == key]
            error = max(row.error for row in rows)
            cosine = min(row.cosine for row in rows)
            lines.append(
                f"{key[0]} as {key[1]}: largest error {error:.1e}, cosine {cosine:.7f} "
                f"on {len(rows)} sizes of inputs"
            )
        size = sum(self.files.values()) / 1e6
        return [*lines, f"{self.directory}: {len(self.files)} files, {size:.1f} MB"]


def export_task(
    task: Task,
    out: str | Path,
    *,
    modes: Sequence[str] = (),
    int8: bool = False,
    programs: bool = False,
    fixed_size: bool = False,
    report: LoadReport | None = None,
    fingerprint: Mapping[str, str] | None = None,
    show: Callable[[str], None] = lambda line: None,
) -> Export:
    """Writes graphs of a task for any batch size, length of text and size of image.

    Nothing is left under `out` unless every graph runs at two batch sizes, lengths and image sizes
    and agrees with the network: to 1e-4 and a cosine of 0.99999 in float32, to a cosine of 0.98 in
    int8.

    Args:
        task: The task on the CPU in float32.
        out: The directory to write. An older export in it is replaced as a whole.
        modes: The graphs, see `modes.list_modes`; by default those that predictions need.
        int8: Writes matrix products in 8-bit integers, for CPUs.
        programs: Also writes each graph as a program of torch.export (.pt2).
        fixed_size: Images have the size of the config alone, and positions are constants.
        report: What the weights held, so that an absent text side is refused.
        fingerprint: What decides the features of these weights, kept in `export.json`.
        show: Is told what is done.

    Raises:
        ValueError: A mode that the task does not have, weights without a part that it needs, the
            extra `export` is not installed, or a graph is not dynamic or not exact.
    """
    for package in PACKAGES:
        import_extra(package)
    out = Path(out)
    check_target(out)
    task = task.eval().requires_grad_(False)
    names = choose_modes(task, modes)
    if report is not None:
        check_parts(task, names, report)
    comparisons: list[Comparison] = []
    made_modes: list[Mode] = []
    opset = 0
    with replace_directory(out) as directory:
        for name in names:
            show(f"{name}: tracing")
            mode = make_mode(task, name, fixed_size=fixed_size)
            program = trace(mode, make_examples(task, mode, choose_sizes(task)[0]))
            show(f"{name}: writing ONNX")
            file = directory / f"{name}.onnx"
            write_onnx(program, mode, file)
            show(f"{name}: comparing with the network")
            comparisons += compare_graph(task, mode, program, file)
            check_comparisons(comparisons)
            if programs:
                with quiet():
                    torch.export.save(program, directory / f"{name}.pt2")
            del program
            if int8:
                show(f"{name}: int8")
                comparisons += replace_by_int8(task, mode, file)
                check_comparisons(comparisons)
            opset = read_opset(file)
            made_modes.append(mode)
        description = describe(
            task,
            made_modes,
            directory,
            precision=INT8 if int8 else FLOAT32,
            opset=opset,
            fingerprint=dict(fingerprint or {}),
        )
        write_other_files(task, directory, description, comparisons)
        files = {file.name: file.stat().st_size for file in sorted(directory.iterdir())}
    return Export(out, files, comparisons)


def check_target(out: Path) -> None:
    """Raises ValueError where `out` holds something else than an export, or more than one."""
    if out.is_file():
        raise ValueError(f"{out} is a file: give a directory")
    if out.exists() and not (out / EXPORT_FILE).is_file() and any(out.iterdir()):
        raise ValueError(f"{out} exists and holds no export: give another directory")
    names = [file.name for file in out.iterdir()] if out.exists() else []
    others = sorted(name for name in names if not name.endswith(GRAPH_ENDINGS))
    others = [name for name in others if name not in OTHER_FILES]
    if others:
        raise ValueError(f"{out} holds {others[0]}, which is no part of an export: give another")


def check_parts(task: Task, modes: Sequence[str], report: LoadReport) -> None:
    """Raises ValueError where the weights lack what a mode needs."""
    untrained = [name for name in report.fresh if not serves_text(name)]
    if untrained:
        raise ValueError(
            f"{report.source} lacks {untrained[0]}, which {task_name(type(task))} needs: give "
            f"weights of {task_name(type(task))}, or export with --task backbone"
        )
    without_text = [name for name in list_modes(task) if not needs_text(name)]
    for mode in modes:
        if report.fresh and (needs_text(mode) or task.config.classifies_by_names):
            remedy = f"give --mode {without_text[0]}" if without_text else "give other weights"
            raise ValueError(
                f"{report.source} holds the image side alone, and the mode {mode} needs the text "
                f"side: {remedy}"
            )


# Comparing ----------------------------------------------------------------------------------------


def compare_graph(task: Task, mode: Mode, program: ExportedProgram, file: Path) -> list[Comparison]:
    """Runs a traced mode and its ONNX file beside the network, on inputs of several sizes."""
    module = program.module()
    runs: dict[str, Run] = {
        "torch.export": lambda inputs: module(*inputs.values()),
        "onnxruntime": partial(run_session, open_session(file)),
    }
    return compare_programs(task, mode, runs)


def replace_by_int8(task: Task, mode: Mode, file: Path) -> list[Comparison]:
    """Puts the int8 variant of a graph in its place and compares it with the network."""
    quantized = file.with_name(f"{mode.name}.int8.onnx")
    quantize_onnx(file, quantized)
    file.with_name(f"{file.name}.data").unlink(missing_ok=True)
    move_graph(quantized, file)
    return compare_programs(
        task, mode, {"onnxruntime int8": partial(run_session, open_session(file))}
    )


def compare_programs(task: Task, mode: Mode, runs: Mapping[str, Run]) -> list[Comparison]:
    """Compares programs with the network on the same inputs."""
    comparisons = []
    for sizes in choose_sizes(task)[1]:
        inputs = make_examples(task, mode, sizes)
        with torch.no_grad():
            expected = mode.network(*inputs.values())
            for name, run in runs.items():
                comparisons.append(compare(mode, name, run, inputs, expected))
    return comparisons


def move_graph(old: Path, new: Path) -> None:
    """Renames a graph with the file of its weights, whose name the graph holds."""
    data = old.with_name(f"{old.name}.data")
    if data.exists():
        onnx = import_extra("onnx")
        model = onnx.load(old, load_external_data=False)
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = f"{new.name}.data"
        onnx.save(model, old)
        data.rename(new.with_name(f"{new.name}.data"))
    old.rename(new)


def read_opset(file: Path) -> int:
    """Returns the version of ONNX's operators that a graph uses."""
    model = import_extra("onnx").load(file, load_external_data=False)
    return next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))


# Writing ------------------------------------------------------------------------------------------


def write_other_files(
    task: Task, directory: Path, description: dict[str, Any], comparisons: Sequence[Comparison]
) -> None:
    """Writes everything but the graphs."""
    report = {
        "largest_error": max(row.error for row in comparisons),
        "smallest_cosine": min(row.cosine for row in comparisons),
        "comparisons": [row.to_dict() for row in comparisons],
    }
    # Frozen parts, such as pretraining's visual tokenizer, make no predictions.
    no_files: dict[str, Any] = dict.fromkeys(task.frozen_files, "")
    config = replace(task.config, **no_files)
    stored = {**describe_task(task), "config": to_dict(config), "frozen": {}}
    for name, content in (
        (EXPORT_FILE, description),
        (CONFIG_FILE, stored),
        (REPORT_FILE, report),
    ):
        text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
        (directory / name).write_text(text, encoding="utf-8")
    (directory / TABLE_FILE).write_text(format_report(comparisons), encoding="utf-8")
    if task.has_tokenizer:
        task.tokenizer.save(directory / TOKENIZER_FILE)
    if task_name(type(task)) == "coco" and TRUNK_MODE in description["graphs"]:
        head = {
            name: tensor.detach().contiguous()
            for name, tensor in get_weights(task).items()
            if not name.startswith("backbone.")
        }
        write_tensors(head, directory / HEAD_FILE)
