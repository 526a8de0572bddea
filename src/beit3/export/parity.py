"""How far an export is from the network: the largest error and the cosine of every output."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from beit3.export.modes import Mode

MAX_ERROR = 1e-4
"""Largest error of a float32 export, relative to the largest value of an output above 1."""
MIN_COSINE = 0.99999
"""Smallest cosine of a float32 export. An output whose values are all far below 1 passes the limit
on the error whatever it is. This one allows a difference of 0.45 % of an output's norm; graphs that
differ by the order of sums alone have cosines within 1e-9 of 1."""
MIN_INT8_COSINE = 0.98
"""Smallest cosine of an int8 export."""

Run = Callable[[dict[str, Tensor]], Sequence[Tensor]]
"""Maps a mode's inputs to its outputs in their order."""


@dataclass(frozen=True)
class Comparison:
    """One mode, run by one program on inputs of one size, beside the network itself."""

    mode: str
    program: str
    """torch.export, onnxruntime, or onnxruntime int8."""
    inputs: dict[str, list[int]]
    """Name of an input -> its shape; the caches' entries are left out but for the first."""
    error: float
    """Largest difference of all outputs, each relative to its largest value above 1."""
    cosine: float
    """Smallest cosine of the outputs, each as one vector."""

    @property
    def is_close(self) -> bool:
        """Whether the export may be used."""
        if self.program.endswith("int8"):
            return self.cosine >= MIN_INT8_COSINE
        return self.error <= MAX_ERROR and self.cosine >= MIN_COSINE

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def compare(
    mode: Mode, program: str, run: Run, inputs: dict[str, Tensor], expected: Sequence[Tensor]
) -> Comparison:
    """Runs a program on inputs and compares its outputs with those of the network.

    Raises ValueError where it cannot run on these sizes, or gives outputs of other shapes.
    """
    shapes = list_shapes(mode, inputs)
    try:
        outputs = run(inputs)
    except Exception as error:  # each program has its own classes
        raise ValueError(
            f"mode {mode.name} as {program} does not take inputs {shapes}: "
            f"{' '.join(str(error).split())[:200]}"
        ) from error
    errors, cosines = [], []
    for name, output, value in zip(mode.output_names, outputs, expected, strict=True):
        if output.shape != value.shape:
            raise ValueError(
                f"mode {mode.name} as {program} gives {name} of shape {list(output.shape)} for "
                f"inputs {shapes}, the network {list(value.shape)}"
            )
        difference = float((output.double() - value.double()).abs().max())
        errors.append(difference / max(1.0, float(value.abs().max())))
        cosines.append(compute_cosine(output, value))
    # Python's max and min pass over NaN, which no output may hold; torch's return it.
    largest_error = float(torch.tensor(errors, dtype=torch.float64).max())
    lowest_cosine = float(torch.tensor(cosines, dtype=torch.float64).min())
    return Comparison(mode.name, program, shapes, largest_error, lowest_cosine)


def compute_cosine(left: Tensor, right: Tensor) -> float:
    """Returns the cosine of two tensors as vectors; 1 where both are zero."""
    left, right = left.double().flatten(), right.double().flatten()
    norms = float(left.norm() * right.norm())
    return float(left @ right) / norms if norms else float(torch.equal(left, right))


def list_shapes(mode: Mode, inputs: dict[str, Tensor]) -> dict[str, list[int]]:
    """Returns the shapes of the inputs, of the caches that of the first alone."""
    return {
        name: list(value.shape)
        for name, value in inputs.items()
        if not name.startswith("past.") or name == "past.0.key"
    }


def check_comparisons(comparisons: Sequence[Comparison]) -> None:
    """Raises ValueError for the first comparison that is not close enough."""
    for comparison in comparisons:
        if comparison.is_close:
            continue
        limit = f"cosine {MIN_INT8_COSINE}"
        if not comparison.program.endswith("int8"):
            limit = f"error {MAX_ERROR} and cosine {MIN_COSINE}"
        raise ValueError(
            f"mode {comparison.mode} as {comparison.program} differs from the network by "
            f"{comparison.error:.1e} (cosine {comparison.cosine:.6f}) on inputs "
            f"{comparison.inputs}, beyond {limit}: nothing was written"
        )


def format_report(comparisons: Sequence[Comparison]) -> str:
    """Formats the comparisons as a Markdown table."""
    lines = [
        "# Parity",
        "",
        "Each program beside the network itself in float32, on random inputs. The error is the",
        "largest difference of all outputs, each relative to its largest value where that is above",
        "1; the cosine is the smallest of all outputs.",
        "",
        "| mode | program | inputs | error | cosine |",
        "|---" * 5 + "|",
    ]
    for comparison in comparisons:
        shapes = ", ".join(
            f"{name} {'x'.join(map(str, shape))}" for name, shape in comparison.inputs.items()
        )
        lines.append(
            f"| {comparison.mode} | {comparison.program} | {shapes} | {comparison.error:.1e} | "
            f"{comparison.cosine:.7f} |"
        )
    return "\n".join(lines) + "\n"
