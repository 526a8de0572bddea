"""Loader workers of every start method give training the same steps."""

import multiprocessing
from dataclasses import replace

import pytest

from beit3.tasks.pretrain import Pretrain
from beit3.training.loop import train
from tests.training.runs import read_metrics
from tests.world_root import make_pretrain_recipe


@pytest.mark.parametrize("method", multiprocessing.get_all_start_methods())
def test_two_steps_with_workers_are_those_without(root, vqkd_weights, tmp_path, method):
    """Pretraining also holds a frozen network, which no worker is sent.

    tests/training/test_evaluate.py does the same for evaluations.
    """
    recipe = make_pretrain_recipe(root, vqkd_weights, steps=2, eval_every=-1)
    multiprocessing.set_start_method(method, force=True)
    try:
        for workers in (0, 1):
            data = replace(recipe.data, workers=workers)
            train(replace(recipe, data=data), Pretrain, out=tmp_path / str(workers))
    finally:
        multiprocessing.set_start_method(None, force=True)
    assert read_metrics(tmp_path / "1") == read_metrics(tmp_path / "0")
