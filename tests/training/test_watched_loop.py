"""The loop tells its watchdog of every step, so that the watchdog names the step that hangs."""

import pytest

from beit3.tasks.vqa import VQA
from beit3.training.loop import train
from beit3.training.watchdog import Watchdog
from tests.world_root import make_vqa_recipe


def test_the_loop_tells_its_watchdog_of_every_step(root, tmp_path, monkeypatch: pytest.MonkeyPatch):
    calls: list[tuple] = []

    def record_calls(name: str) -> None:
        method = getattr(Watchdog, name)

        def record(watchdog: Watchdog, *arguments):
            calls.append((name, *arguments[:1]))
            return method(watchdog, *arguments)

        monkeypatch.setattr(Watchdog, name, record)

    for name in ("begin_step", "mark_loaded", "end_step"):
        record_calls(name)
    train(make_vqa_recipe(root, steps=2), VQA, out=tmp_path / "run")
    assert [call[0] for call in calls] == ["begin_step", "mark_loaded", "end_step"] * 2
    assert [call[1] for call in calls if call[0] == "begin_step"] == [0, 1]
