"""Traces a mode with torch.export and writes it as an ONNX file, int8 where asked.

Axes are traced as formulas. A condition on one of them in the network would fix its size: tracing
then fails, and its message says which axis.
"""

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from beit3.export.extra import import_extra
from beit3.export.modes import ATTENDED, Axis, Mode

MAX_EMBEDDED_BYTES = 1 << 30
"""A graph's weights beyond this size go into a file beside it: protobuf ends at 2 GiB."""


def trace(mode: Mode, inputs: dict[str, Tensor]) -> ExportedProgram:
    """Traces a mode for any size of its axes.

    Args:
        mode: The mode.
        inputs: An example; no axis that may vary has size 1 in it, which would be fixed.

    Raises:
        ValueError: The network fixes the size of an axis.
    """
    try:
        with torch.no_grad(), quiet():
            return torch.export.export(
                mode.network,
                tuple(inputs.values()),
                dynamic_shapes=(describe_axes(mode),),
                strict=False,
            )
    except Exception as error:  # torch.export raises errors of many classes
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"mode {mode.name} cannot be exported for any size of its axes: {reason}"
        ) from error


def describe_axes(mode: Mode) -> tuple[dict[int, Any], ...]:
    """Returns the axes of each input as torch.export takes them."""
    # The number of tokens attended to is the sum of two axes, which torch.export finds itself.
    dims: dict[str, Any] = {ATTENDED: Dim.AUTO}
    axes_per_input = []
    for input in mode.inputs.values():
        axes: dict[int, Any] = {}
        for position, axis in enumerate(input.axes):
            if not isinstance(axis, Axis):
                continue
            if axis.name not in dims:
                dims[axis.name] = Dim(axis.name, min=1, max=mode.limits.get(axis.name))
            dim = dims[axis.name]
            axes[position] = dim if axis.factor == 1 else axis.factor * dim
        axes_per_input.append(axes)
    return tuple(axes_per_input)


def write_onnx(program: ExportedProgram, mode: Mode, file: Path) -> None:
    """Writes a traced mode as ONNX; large weights go to `<file>.data` beside it."""
    import_extra("onnxscript")
    with quiet():
        converted = torch.onnx.export(
            program,
            dynamo=True,
            input_names=list(mode.inputs),
            output_names=list(mode.output_names),
            verbose=False,
        )
    assert converted is not None
    num_bytes = sum(tensor.nbytes for tensor in program.state_dict.values())
    converted.save(str(file), external_data=num_bytes > MAX_EMBEDDED_BYTES)
    name_axes(mode, file)


def name_axes(mode: Mode, file: Path) -> None:
    """Gives the axes of an ONNX file their names: the exporter calls them s26, s30 ..."""
    onnx = import_extra("onnx")
    model = onnx.load(file, load_external_data=False)
    names = {}
    for value, input in zip(model.graph.input, mode.inputs.values(), strict=True):
        for dim, axis in zip(value.type.tensor_type.shape.dim, input.axes, strict=True):
            match = re.search(r"s\d+$", dim.dim_param)
            if isinstance(axis, Axis) and match and axis.name != ATTENDED:
                names[match[0]] = axis.name
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = re.sub(
                    r"\bs\d+\b", lambda match: names.get(match[0], match[0]), dim.dim_param
                )
    onnx.save(model, file)


def quantize_onnx(file: Path, out: Path) -> None:
    """Writes an int8 variant: weights of matrix products with one scale per output channel.

    Inputs of the products are rounded as they come. Embeddings, norms and the attention itself stay
    in float32.
    """
    quantization = import_extra("onnxruntime.quantization")
    external = file.with_name(f"{file.name}.data").exists()
    with quiet():
        quantization.quantize_dynamic(
            file,
            out,
            op_types_to_quantize=["MatMul"],
            per_channel=True,
            weight_type=quantization.QuantType.QInt8,
            use_external_data_format=external,
        )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hides the exporters' progress, warnings and notes, which are about their own code."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
