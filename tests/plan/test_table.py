"""`beit3 plan` prints a table or JSON, and one line for an error."""

import json

import pytest

from beit3 import cli
from beit3.task import load_task
from tests.test_cli import NETWORK


def test_the_command_line_prints_a_table_or_json(run_cli):
    table = run_cli("plan", "vqa", "demo", "--gpus", 2, "--gpu", "h200", "--price", 3, *NETWORK)
    assert table.startswith("vqa demo on 2 x h200 (141 GiB, 989 TFLOP/s, of which 40%)")
    assert "none *" in table and "cost at 3 per hour" in table and "hours, 200 steps" in table
    plan = json.loads(run_cli("plan", "vqa", "demo", "--gpu", "cpu", "--json", *NETWORK))
    assert plan["gpu"]["name"] == "cpu" and plan["ways"][0]["memory"]["reserve"] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "0"], "invalid value for --gpus: 0 is too few, expected at least 1"),
        (["--gpus", "3"], "data.batch.main 32 is not divisible by 3 processes"),
        (["--gpu", "h1000"], "--gpu h1000 is not listed; did you mean h100?"),
        (
            ["--utilisation", "40"],
            "invalid value for --utilisation: 40 is above 1, expected 0 to 1",
        ),
        (["--run.micro_bach", "4"], "did you mean --run.micro_batch?"),
        (["--data.batch.main", "0"], "data.batch names none of the sources main"),
    ],
)
def test_errors_are_one_line(arguments, message, capsys):
    assert cli.main(["plan", "vqa", "demo", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_hours_are_unknown_without_records(run_cli):
    table = run_cli("plan", "vqkd", "base_224_clip", "--gpus", 8, "--task.model.depth", 2)
    assert "give --records N, or --data.root" in table and "hours," not in table
    assert load_task("vqkd").recipes["base_224_clip"].run.steps == 0
