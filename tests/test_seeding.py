"""Generators depend only on their arguments, not on the order of calls, process or machine."""

import torch

from beit3.seeding import make_generator, make_rng


def test_every_argument_changes_the_numbers():
    arguments = [(3, 1, "a/b.jpg"), (4, 1, "a/b.jpg"), (3, 2, "a/b.jpg"), (3, 1, "a/c.jpg")]
    numbers = [make_rng(*args).integers(1 << 60) for args in arguments]
    assert len(set(numbers)) == 4
    assert numbers[0] == make_rng(*arguments[0]).integers(1 << 60)
    generators = [make_generator(*args) for args in ((0, "a"), (0, "b"), (1, "a"))]
    assert len({generator.initial_seed() for generator in generators}) == 3


def test_the_numbers_never_change():
    """The recorded numbers depend neither on PYTHONHASHSEED nor on the machine."""
    assert make_rng(0, 0, "x").integers(1 << 30) == 71608040
    generator = make_generator(0, "x")
    assert generator.device.type == "cpu"
    assert torch.randint(1 << 30, (), generator=generator) == 631300227
