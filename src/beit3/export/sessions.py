"""Graphs as onnxruntime runs them, with torch tensors on both sides."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from beit3.export.extra import import_extra


def open_session(file: Path) -> Any:
    """Opens an ONNX file for the CPU, with as many threads as torch uses.

    Raises ValueError where onnxruntime is not installed or cannot read the file.
    """
    onnxruntime = import_extra("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # its warnings are about its own optimizations
    try:
        return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions share no class
        raise ValueError(
            f"{file} cannot be read by onnxruntime: {' '.join(str(error).split())[:200]}"
        ) from error


def run_session(session: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
    """Runs a graph on its inputs, on the CPU; returns the outputs in their order."""
    arrays = {name: value.detach().contiguous().numpy() for name, value in inputs.items()}
    return [torch.from_numpy(array) for array in session.run(None, arrays)]
