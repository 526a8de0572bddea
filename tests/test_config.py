"""Configs survive JSON strictly and take overrides from a command line."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import pytest

from beit3.config import from_dict, list_flags, override, suggest, to_dict
from beit3.model.config import GIANT, ModelConfig
from beit3.recipe import Recipe
from beit3.task import list_tasks, load_task
from beit3.tasks.pretrain import PretrainConfig
from beit3.tasks.vqa import VQA

RECIPES = [(task, recipe) for task in list_tasks() for recipe in load_task(task).recipes]
DEMO = VQA.recipes["demo"]


@dataclass(frozen=True)
class Inner:
    sizes: tuple[int, ...] = (1, 2)
    pair: tuple[float, str] = (0.5, "a")


@dataclass(frozen=True)
class Outer:
    number: float = 1.0
    count: int = 2
    flag: bool = False
    kind: Literal["x", "y"] = "x"
    maybe: int | None = None
    table: Mapping[str, int] = dataclasses.field(default_factory=dict)
    inner: Inner = Inner()


@pytest.mark.parametrize(("task", "name"), RECIPES)
def test_every_recipe_survives_json(task, name):
    recipe, config = load_task(task).recipes[name], load_task(task).Config
    loaded = Recipe.from_dict(json.loads(json.dumps(recipe.to_dict())), config)
    assert loaded == recipe and type(loaded.task) is config
    assert loaded.to_dict() == recipe.to_dict()
    assert recipe.note, "a recipe says what it reproduces"


def test_values_of_all_types_survive_json():
    value = Outer(0.1, 3, True, "y", 7, {"a": 1, "b": 2}, Inner((), (2.0, "b")))
    data = json.loads(json.dumps(to_dict(value)))
    assert data == {
        "number": 0.1,
        "count": 3,
        "flag": True,
        "kind": "y",
        "maybe": 7,
        "table": {"a": 1, "b": 2},
        "inner": {"sizes": [], "pair": [2.0, "b"]},
    }
    loaded = from_dict(Outer, data)
    assert loaded == value and type(loaded.inner.sizes) is tuple
    assert from_dict(Outer, {}) == Outer(), "absent fields keep their defaults"
    assert type(from_dict(Outer, {"number": 3}).number) is float, "JSON may write 3.0 as 3"
    assert from_dict(Outer, {"maybe": None}).maybe is None


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"numbr": 1.0}, r"Outer: unknown field 'numbr'; did you mean number\?"),
        ({"zzz": 1.0}, "Outer: unknown field 'zzz'$"),
        ({"inner": {"size": [1]}}, r"Outer\.inner: unknown field 'size'; did you mean sizes\?"),
        ({"count": 1.5}, r"Outer\.count: 1\.5 is not of type int"),
        ({"count": True}, r"Outer\.count: True is not of type int"),
        ({"number": True}, r"Outer\.number: True is not of type float"),
        ({"number": "1"}, r"Outer\.number: '1' is not of type float"),
        ({"flag": 1}, r"Outer\.flag: 1 is not of type bool"),
        ({"kind": "z"}, r"Outer\.kind: 'z' is not one of 'x', 'y'"),
        ({"maybe": "a"}, r"Outer\.maybe: 'a' is not of type int"),
        ({"table": {"a": "b"}}, r"Outer\.table\.a: 'b' is not of type int"),
        ({"table": 3}, r"Outer\.table: expected a table, got 3"),
        ({"inner": 3}, r"Outer\.inner: expected a table of fields, got 3"),
        ({"inner": {"sizes": [1, "a"]}}, r"Outer\.inner\.sizes: 'a' is not of type int"),
        ({"inner": {"sizes": 1}}, r"Outer\.inner\.sizes: expected a list, got 1"),
        ({"inner": {"pair": [1.0]}}, r"Outer\.inner\.pair: expected 2 values, got 1"),
    ],
)
def test_values_that_do_not_fit_are_named(data, message):
    with pytest.raises(ValueError, match=message) as caught:
        from_dict(Outer, data)
    assert "\n" not in str(caught.value)


def test_a_config_of_impossible_sizes_is_refused():
    with pytest.raises(ValueError, match="dim 10 is not a multiple of num_heads 4"):
        from_dict(ModelConfig, {"dim": 10, "num_heads": 4})


def test_the_task_section_must_be_of_the_class_of_the_task():
    data = DEMO.to_dict()
    with pytest.raises(ValueError, match="task: unknown field 'num_answers'"):
        Recipe.from_dict(data, PretrainConfig)


# Overrides ----------------------------------------------------------------------------------------


def test_overrides_reach_every_section():
    changed = override(
        DEMO,
        [
            "--optim.lr",
            "3e-4",
            "--optim.betas",
            "0.8",
            "0.9",
            "--run.steps=7",
            "--run.checkpointing",
            "selective",
            "--run.precision",
            "bfloat16",
            "--data.batch.main",
            "16",
            "--data.root",
            "somewhere",
            "--task.model.dim",
            "64",
            "--task.crop",
            "0.2",
            "0.9",
            "--task.image.image_size",
            "48",
        ],
    )
    assert changed == replace(
        DEMO,
        optim=replace(DEMO.optim, lr=3e-4, betas=(0.8, 0.9)),
        run=replace(DEMO.run, steps=7, checkpointing="selective", precision="bfloat16"),
        data=replace(DEMO.data, batch={"main": 16}, root="somewhere"),
        task=replace(
            DEMO.task,
            model=replace(DEMO.task.model, dim=64),
            crop=(0.2, 0.9),
            image=replace(DEMO.task.image, image_size=48),
        ),
    )
    assert type(changed.task) is type(DEMO.task)


def test_no_override_changes_nothing():
    assert override(DEMO, []) == DEMO


@pytest.mark.parametrize(("task", "name"), RECIPES)
def test_every_recipe_can_be_overridden(task, name):
    recipe = load_task(task).recipes[name]
    assert override(recipe, ["--run.steps", "3"]) == replace(
        recipe, run=replace(recipe.run, steps=3)
    )


def test_flags_name_every_field_once():
    flags = list_flags(DEMO)
    assert len(flags) == len(set(flags))
    assert {
        "--optim.lr",
        "--task.model.dim",
        "--data.batch.main",
        "--run.steps",
        "--task.image.mean",
    } <= set(flags)
    assert {"--batch.images", "--batch.texts"} <= set(
        list_flags(load_task("pretrain").recipes["demo"].data)
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--optim.lrr", "1"], r"unknown field --optim\.lrr; did you mean --optim\.lr\?"),
        (["--optm.lr=1"], r"unknown field --optm\.lr; did you mean --optim\.lr\?"),
        (["--lr", "1"], "unknown field --lr"),
        (
            ["--optim.lr", "fast"],
            "cannot read --optim.lr fast: .*",
        ),
        (["--optim.lr"], "cannot read --optim.lr"),
        (["--run.steps", "1.5"], "--run.steps 1.5"),
        (["--run.precision", "half"], "--run.precision half"),
        (["--optim.betas", "0.9"], "--optim.betas 0.9"),
        (["stray"], "stray"),
        (
            ["--task.model.dim", "7"],
            "cannot read --task.model.dim 7: .*dim 7 is not a multiple of num_heads 4",
        ),
    ],
)
def test_errors_on_a_command_line_are_one_line(arguments, message, capfd):
    with pytest.raises(ValueError, match=message) as caught:
        override(DEMO, arguments)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", ""), "nothing but the error is printed"


def test_only_similar_names_are_suggested():
    assert suggest("dmi", ["dim", "depth"]) == "; did you mean dim?"
    assert suggest("color", ["dim", "depth"]) == ""


def test_the_giant_has_the_sizes_of_the_paper():
    assert (
        GIANT.dim,
        GIANT.depth,
        GIANT.num_heads,
        GIANT.ffn_dim,
        GIANT.patch_size,
        GIANT.fusion_layers,
    ) == (1408, 40, 16, 6144, 14, 3)
