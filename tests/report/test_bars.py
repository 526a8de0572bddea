"""Tests of codebook usage. Bars by class are tested with the panels of dense tasks."""

import math
from xml.etree import ElementTree

import numpy as np
import pytest

from beit3.report.bars import compute_usage, draw_usage_bars


def test_usage_of_even_single_and_no_codes():
    assert compute_usage(np.array([5, 5, 5, 5])) == pytest.approx((1, 4))
    assert compute_usage(np.array([7, 0, 0, 0])) == pytest.approx((0.25, 1))
    assert compute_usage(np.array([0, 0])) == (0, 0)


def test_perplexity_is_two_to_the_entropy_in_bits():
    counts = np.random.default_rng(0).integers(0, 9, 50)
    frequencies = [count / sum(counts) for count in counts.tolist() if count]
    bits = -sum(frequency * math.log2(frequency) for frequency in frequencies)
    assert compute_usage(counts) == pytest.approx((len(frequencies) / 50, 2**bits))


def test_usage_bars_are_sorted_and_described():
    svg = draw_usage_bars(np.array([3, 1, 0, 4]))
    assert "75% of 4 codes are used" in (ElementTree.fromstring(svg).get("aria-label") or "")
    assert draw_usage_bars(np.array([0, 4, 3, 1])) == svg
