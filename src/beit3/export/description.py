"""`export.json`: which graphs an exported directory holds, and how their inputs are made."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from beit3.config import to_dict
from beit3.export.modes import Axis, Input, Mode
from beit3.files import read_json
from beit3.task import Task

FORMAT = 1
EXPORT_FILE, HEAD_FILE = "export.json", "head.safetensors"
REPORT_FILE, TABLE_FILE = "parity.json", "parity.md"

FLOAT32, INT8 = "float32", "int8"


@dataclass(frozen=True)
class Graph:
    """One graph of an exported directory."""

    file: str
    num_bytes: int
    """Size of the file and of the one with its weights, where there is one."""
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Description:
    """The content of `export.json`."""

    precision: str
    graphs: dict[str, Graph]
    """Mode -> its graph."""
    fingerprint: dict[str, str]
    """What decides the features of the weights that were exported; empty if it is not known."""


def describe(
    task: Task,
    modes: list[Mode],
    directory: Path,
    *,
    precision: str,
    opset: int,
    fingerprint: dict[str, str],
) -> dict[str, Any]:
    """Returns the content of `export.json`. Its image settings are those of `config.json`."""
    return {
        "format": FORMAT,
        "precision": precision,
        "opset": opset,
        "image": to_dict(task.config.image),
        "text_length": task.config.text_length,
        "fingerprint": fingerprint,
        "graphs": {
            mode.name: {
                "file": f"{mode.name}.onnx",
                "bytes": count_bytes(directory / f"{mode.name}.onnx"),
                "inputs": {name: describe_input(input) for name, input in mode.inputs.items()},
                "outputs": list(mode.output_names),
                "largest": dict(mode.limits),
            }
            for mode in modes
        },
    }


def describe_input(input: Input) -> dict[str, Any]:
    """Returns the dtype and the axes of an input: names with a factor, or numbers."""
    axes = [_format_axis(axis) if isinstance(axis, Axis) else axis for axis in input.axes]
    return {"dtype": _DTYPES[input.dtype], "axes": axes}


_DTYPES = {torch.float32: "float32", torch.int64: "int64", torch.bool: "bool"}


def _format_axis(axis: Axis) -> str:
    return axis.name if axis.factor == 1 else f"{axis.factor}*{axis.name}"


def count_bytes(file: Path) -> int:
    """Returns the size of a graph and of the weights beside it."""
    data = file.with_name(f"{file.name}.data")
    return file.stat().st_size + (data.stat().st_size if data.exists() else 0)


def read_description(directory: Path) -> Description:
    """Reads `export.json` and checks that its graphs are there and complete.

    Raises ValueError, naming the file and the field.
    """
    path = directory / EXPORT_FILE
    data = read_json(path)
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        version = data.get("format") if isinstance(data, dict) else type(data).__name__
        raise ValueError(
            f"{path} is of format {version!r}, not {FORMAT}: read it with the version that wrote it"
        )
    try:
        graphs = {
            str(name): Graph(
                str(graph["file"]),
                int(graph["bytes"]),
                tuple(graph["inputs"]),
                tuple(graph["outputs"]),
            )
            for name, graph in data["graphs"].items()
        }
        description = Description(str(data["precision"]), graphs, dict(data["fingerprint"]))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{path} lacks a field, or holds something else in it ({error}): export the weights "
            "again"
        ) from None
    for graph in graphs.values():
        _check_file(directory, graph)
    return description


def _check_file(directory: Path, graph: Graph) -> None:
    """Raises ValueError for a graph that is missing or has another size."""
    file = directory / graph.file
    if Path(graph.file).name != graph.file:
        raise ValueError(
            f"{directory / EXPORT_FILE} names {graph.file}, which is no file beside it"
        )
    if not file.is_file():
        raise ValueError(f"{file} is missing: copy the export again")
    if count_bytes(file) != graph.num_bytes:
        raise ValueError(
            f"{file} has {count_bytes(file)} bytes with its weights, {graph.num_bytes} were "
            "written: copy the export again"
        )
