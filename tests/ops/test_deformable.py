"""Deformable sampling equals a slow loop, and transformers' function with its gradients."""

import math
from itertools import product

import pytest
import torch

from beit3.ops.deformable import Grids, sample_deformable

SHAPES = ((5, 7), (3, 4), (1, 2))


def make_inputs(dtype=torch.float64):
    """Returns values [2, 49, 3, 4], locations [2, 6, 3, 3, 2, 2] in and around the maps, and
    weights that sum to 1."""
    torch.manual_seed(0)
    num_cells = sum(rows * columns for rows, columns in SHAPES)
    values = torch.randn(2, num_cells, 3, 4, dtype=dtype)
    locations = torch.rand(2, 6, 3, len(SHAPES), 2, 2, dtype=dtype) * 1.6 - 0.3
    weights = torch.randn(2, 6, 3, len(SHAPES) * 2, dtype=dtype).softmax(-1)
    return values, locations, weights.view(2, 6, 3, len(SHAPES), 2)


def sample_bilinear(feature_map, x, y):
    """Samples a map [h, w, d] at column x and row y; beyond its edge it is 0."""
    total = torch.zeros_like(feature_map[0, 0])
    for row in (math.floor(y), math.floor(y) + 1):
        for column in (math.floor(x), math.floor(x) + 1):
            if 0 <= row < len(feature_map) and 0 <= column < feature_map.shape[1]:
                weight = (1 - abs(x - column)) * (1 - abs(y - row))
                total += feature_map[row, column] * weight
    return total


def sample_slowly(values, shapes, locations, weights):
    batch_size, num_queries, num_heads, _, num_points = weights.shape
    output = torch.zeros(batch_size, num_queries, num_heads, values.shape[-1], dtype=values.dtype)
    for b, q, h in product(range(batch_size), range(num_queries), range(num_heads)):
        start = 0
        for level, (rows, columns) in enumerate(shapes):
            feature_map = values[b, start : start + rows * columns, h].view(rows, columns, -1)
            for point in range(num_points):
                x, y = locations[b, q, h, level, point].tolist()
                sample = sample_bilinear(feature_map, x * columns - 0.5, y * rows - 0.5)
                output[b, q, h] += weights[b, q, h, level, point] * sample
            start += rows * columns
    return output.flatten(2)


def test_samples_equal_a_slow_loop():
    values, locations, weights = make_inputs()
    expected = sample_slowly(values, SHAPES, locations, weights)
    output = sample_deformable(values, SHAPES, locations, weights)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)


def test_samples_and_gradients_equal_those_of_transformers():
    modeling = pytest.importorskip("transformers.models.mask2former.modeling_mask2former")
    results = []
    for function in (sample_deformable, modeling.multi_scale_deformable_attention):
        values, locations, weights = (tensor.requires_grad_() for tensor in make_inputs())
        output = function(values, SHAPES, locations, weights)
        gradient = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).view_as(output)
        output.backward(gradient)
        results.append([output.detach(), values.grad, locations.grad, weights.grad])
    for ours, theirs in zip(*results, strict=True):
        assert theirs.abs().sum() > 0
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_sampling_at_the_centers_returns_the_cells():
    values = torch.arange(7.0).view(1, 7, 1, 1)
    grids = Grids.from_shapes([(2, 3), (1, 1)], values)
    thirds = [1 / 6, 1 / 2, 5 / 6]
    centers = [[x, y] for y in (0.25, 0.75) for x in thirds] + [[0.5, 0.5]]
    torch.testing.assert_close(grids.centers, torch.tensor(centers))
    torch.testing.assert_close(grids.cell_sizes, torch.tensor([[1 / 3, 1 / 2], [1.0, 1.0]]))
    locations = grids.centers[:6, None, None, None].expand(6, 1, 2, 1, 2)[None]
    weights = torch.tensor([1.0, 0.0]).view(2, 1).expand(1, 6, 1, 2, 1)
    samples = sample_deformable(values, grids.shapes, locations, weights).flatten()
    torch.testing.assert_close(samples, torch.arange(6.0), rtol=0, atol=1e-5)


def test_locations_stay_exact_for_values_of_half_precision():
    """Locations in bfloat16 would be off by up to 0.4 cells on a map of 112."""
    ramp = torch.arange(112.0).view(1, 112, 1, 1).to(torch.bfloat16)
    grids = Grids.from_shapes([(1, 112)], ramp)
    assert grids.centers.dtype == torch.float32
    locations = grids.centers[None, :, None, None, None]
    output = sample_deformable(ramp, grids.shapes, locations, torch.ones(1, 112, 1, 1, 1))
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float().flatten(), torch.arange(112.0), rtol=0, atol=1e-3)
