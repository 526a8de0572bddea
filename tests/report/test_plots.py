"""Tests of the scale of axes and of the colors and dashes of runs."""

import numpy as np
import pytest

from beit3.report.plots import DASHES, PALETTE, get_run_class, get_run_style, spans_decades


@pytest.mark.parametrize(
    "values, expected", [([1, 9], False), ([1, 11], True), ([-1, 11], False), ([], False)]
)
def test_only_positive_values_over_more_than_a_decade_are_logarithmic(values, expected):
    assert spans_decades([np.array(values)]) is expected


def test_twenty_runs_have_different_styles_and_classes():
    num_styles = len(PALETTE) * len(DASHES)
    assert num_styles == 20
    assert len({get_run_style(index) for index in range(num_styles)}) == num_styles
    assert len({get_run_class(index) for index in range(num_styles)}) == num_styles
    assert get_run_class(num_styles) == get_run_class(0)
