"""Deformable sampling equals a slow loop, and transformers' with its gradients."""

import math

import pytest
import torch

from beit3.ops.deformable import Grids, sample_deformable

SHAPES = ((5, 7), (3, 4), (1, 2))


def inputs(dtype=torch.float64):
    """Values [2, 49, 3, 4], places [2, 6, 3, 3, 2, 2] in and around the maps, weights that sum to
    1."""
    torch.manual_seed(0)
    cells = sum(rows * columns for rows, columns in SHAPES)
    values = torch.randn(2, cells, 3, 4, dtype=dtype)
    places = torch.rand(2, 6, 3, len(SHAPES), 2, 2, dtype=dtype) * 1.6 - 0.3
    weights = (
        torch.randn(2, 6, 3, len(SHAPES) * 2, dtype=dtype).softmax(-1).view(2, 6, 3, len(SHAPES), 2)
    )
    return values, places, weights


def bilinear(cells, x, y):
    """What lies at column x and row y of a map [h, w, d], 0 beyond it."""
    total = torch.zeros_like(cells[0, 0])
    for row in (math.floor(y), math.floor(y) + 1):
        for column in (math.floor(x), math.floor(x) + 1):
            if 0 <= row < len(cells) and 0 <= column < cells.shape[1]:
                total += cells[row, column] * (1 - abs(x - column)) * (1 - abs(y - row))
    return total


def slowly(values, shapes, places, weights):
    batch, queries, heads, _, points = weights.shape
    out = torch.zeros(batch, queries, heads, values.shape[-1], dtype=values.dtype)
    for b, q, h in ((b, q, h) for b in range(batch) for q in range(queries) for h in range(heads)):
        start = 0
        for level, (rows, columns) in enumerate(shapes):
            cells = values[b, start : start + rows * columns, h].view(rows, columns, -1)
            for point in range(points):
                x, y = places[b, q, h, level, point].tolist()
                out[b, q, h] += weights[b, q, h, level, point] * bilinear(
                    cells, x * columns - 0.5, y * rows - 0.5
                )
            start += rows * columns
    return out.flatten(2)


def test_it_equals_a_slow_loop():
    values, places, weights = inputs()
    wanted = slowly(values, SHAPES, places, weights)
    torch.testing.assert_close(
        sample_deformable(values, SHAPES, places, weights), wanted, rtol=0, atol=1e-12
    )


def test_it_equals_transformers_with_its_gradients():
    theirs = pytest.importorskip(
        "transformers.models.mask2former.modeling_mask2former"
    ).multi_scale_deformable_attention
    found = []
    for function in (sample_deformable, theirs):
        leaves = [each.requires_grad_() for each in inputs()]
        result = function(leaves[0], SHAPES, *leaves[1:])
        (
            result * torch.linspace(-1, 1, result.numel(), dtype=torch.float64).view_as(result)
        ).sum().backward()
        found.append([result.detach(), *(each.grad for each in leaves)])
    for mine, other in zip(*found, strict=True):
        assert other.abs().sum() > 0
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-12)


def test_centres_of_cells_give_the_cells_themselves():
    values = torch.arange(7.0).view(1, 7, 1, 1)
    grids = Grids.of([(2, 3), (1, 1)], values)
    thirds = [1 / 6, 1 / 2, 5 / 6]
    torch.testing.assert_close(
        grids.centres, torch.tensor([[x, y] for y in (0.25, 0.75) for x in thirds] + [[0.5, 0.5]])
    )
    torch.testing.assert_close(grids.cells, torch.tensor([[1 / 3, 1 / 2], [1.0, 1.0]]))
    places = grids.centres[:6, None, None, None].expand(6, 1, 2, 1, 2)[None]
    weights = torch.tensor([1.0, 0.0]).view(2, 1).expand(1, 6, 1, 2, 1)
    torch.testing.assert_close(
        sample_deformable(values, grids.shapes, places, weights).flatten(),
        torch.arange(6.0),
        rtol=0,
        atol=1e-5,
    )


def test_places_of_half_precision_values_stay_exact():
    """A ramp of 112 cells: places rounded to bfloat16 would be off by up to 0.4 cells."""
    ramp = torch.arange(112.0).view(1, 112, 1, 1).to(torch.bfloat16)
    grids = Grids.of([(1, 112)], ramp)
    assert grids.centres.dtype == torch.float32
    found = sample_deformable(
        ramp, grids.shapes, grids.centres[None, :, None, None, None], torch.ones(1, 112, 1, 1, 1)
    )
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float().flatten(), torch.arange(112.0), rtol=0, atol=1e-3)
