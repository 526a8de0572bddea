"""Stand-ins where there are no values; everything else as it is."""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from beit3.ops.values import known


def test_what_has_values_is_left_alone():
    states = torch.rand(3, 4)
    assert known(states) is states


def test_stand_ins_rise_evenly_or_are_zero():
    with FakeTensorMode():
        floats, places, nothing = (
            torch.empty(2, 4),
            torch.empty(3, dtype=torch.int64),
            torch.empty(0, 4),
        )
    assert known(floats).tolist() == [[0, 0.125, 0.25, 0.375], [0.5, 0.625, 0.75, 0.875]]
    assert known(places).tolist() == [0, 0, 0] and known(places).dtype == torch.int64
    assert known(nothing).shape == (0, 4)
