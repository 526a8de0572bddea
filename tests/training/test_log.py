"""The log of a run: metrics.jsonl, tensorboard and the console."""

import json

import pytest

from beit3.training.log import Log, format_duration, measure_peak_memory, truncate_metrics

VALUES = {"loss": 1.75, "loss/image": 1.25, "loss/text": 0.5, "lr": 1e-3}


def test_lines_after_the_checkpoint_are_dropped_on_resume(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step}) for step in (1, 2, 2, 3)]
    path.write_text("\n".join(lines) + '\n{"step": 2, "cut')
    truncate_metrics(path, 2)
    assert path.read_text().splitlines() == lines[:3]
    truncate_metrics(tmp_path / "absent.jsonl", 2)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["metrics.jsonl"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0s"), (59.9, "59s"), (60, "1m00s"), (3599, "59m59s"), (7500, "2h05m")],
)
def test_durations_are_formatted(seconds, text):
    assert format_duration(seconds) == text


def test_peak_memory_is_measured():
    assert 0.05 < measure_peak_memory() < 1000


def test_a_step_is_one_line_in_the_file_and_on_the_console(tmp_path, capsys):
    log = Log(tmp_path, "name", 20)
    log.begin(0)
    log.num_samples = 8
    log.write(1, VALUES)
    for step in (1, 2, 20):
        log.print_progress(step, VALUES)
    log.info("passed over: images[3] record a[/b]")
    log.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, **VALUES}
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and lines[-1] == "passed over: images[3] record a[/b]", (
        "first and last step; others are at least ten seconds apart"
    )
    assert lines[0].startswith(
        "name  step 1/20  loss 1.750  image 1.250  text 0.500  lr 1.0e-03"
    ) and lines[0].endswith("left")
    assert list((tmp_path / "tensorboard").iterdir())


def test_a_disabled_log_prints_and_writes_nothing(tmp_path, capsys):
    log = Log(tmp_path, "name", 20, enabled=False)
    log.begin(0)
    log.write(1, VALUES)
    log.print_progress(20, VALUES)
    log.info("a remark")
    log.close()
    assert capsys.readouterr().out == "" and not list(tmp_path.iterdir())
