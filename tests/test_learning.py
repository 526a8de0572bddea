"""The engine of `benchmarks/learning/`: jobs in order, equal runs trained once, table and plot."""

import json
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from beit3.demo.parallel import Job
from beit3.demo.tour import export_world
from beit3.model.config import TINY
from beit3.task import load_task
from beit3.training.sources import find_records_root
from benchmarks.learning import contrastive
from benchmarks.learning.drawing import draw_results, make_table
from benchmarks.learning.jobs import run_kept_jobs
from benchmarks.learning.one_ffn import OneFFN
from benchmarks.learning.pixels import Pixels
from benchmarks.learning.probes import fit_classifier
from benchmarks.learning.runs import Run, compute_digest, make_recipe, make_training_jobs
from benchmarks.learning.study import Row, run_program
from benchmarks.learning.world_runs import make_contrastive, make_pretraining

VALUES = {
    "pretrained": {
        "shape probe": [0.5, 0.7],
        "vqa accuracy, 100 labels, 30 steps": [0.4, 0.5],
        "vqa accuracy, all labels, 30 steps": [0.5, 0.6],
        "vqa accuracy, all labels, 90 steps": [0.7, 0.8],
        "captioning cider, all labels, 90 steps": [1.5, 2.5],
    },
    "scratch": {"vqa accuracy, all labels, 30 steps": [0.25, 0.25]},
}
DEMO = load_task("pretrain").recipes["demo"].task
ROOT = Path("world-records")


# Jobs and runs ------------------------------------------------------------------------------------


def write_after(needed: Path | None) -> dict[str, float]:
    """Returns the value of the file that is needed plus one."""
    return {"value": json.loads(needed.read_text())["value"] + 1 if needed else 0}


def test_jobs_wait_for_what_they_need_and_finished_ones_are_not_executed_again(tmp_path):
    paths = [tmp_path / f"{index}" / "result.json" for index in range(3)]
    jobs = {
        path: Job(write_after, (needed,), (needed,) if needed else ())
        for path, needed in zip(paths, [None, *paths[:2]], strict=True)
    }
    run_kept_jobs(dict(reversed(jobs.items())))
    assert [json.loads(path.read_text())["value"] for path in paths] == [0, 1, 2]
    times = [path.stat().st_mtime_ns for path in paths]
    run_kept_jobs(jobs)
    assert [path.stat().st_mtime_ns for path in paths] == times


def test_equal_runs_of_two_rows_are_one_job():
    few = make_contrastive(make_pretraining(), steps=10)
    many = make_contrastive(make_pretraining(), steps=20)
    jobs = make_training_jobs(few, ROOT, Path("out")) | make_training_jobs(many, ROOT, Path("out"))
    labels = sorted(job.arguments[0].label for job in jobs.values())
    assert labels == ["codes", "contrastive", "contrastive", "pairs", "pretrain"]


def test_a_run_differs_from_another_by_recipe_seed_world_and_what_it_starts_from():
    run = make_pretraining()
    others = [
        run.with_seed(1),
        run.change("--task.image_mask_rate 0.6"),
        run.with_network("--task.model.fusion_layers 0"),
        replace(run, batch={"images": 32}),
        replace(run, steps=run.steps + 1),
        make_pretraining(run.needs["init"].change("--optim.lr 0.1")),
    ]
    digests = {compute_digest(other, ROOT) for other in [run, *others]}
    digests.add(compute_digest(run, Path("other-records")))
    assert len(digests) == len(others) + 2
    assert compute_digest(run, Path("/moved") / ROOT) == compute_digest(run, ROOT)


def test_another_network_is_that_of_all_runs_but_the_visual_tokenizer():
    run = make_pretraining().with_network("--task.model.fusion_layers 0")
    for changed in (run, run.needs["init"]):
        assert make_recipe(changed, ROOT).task.model == replace(TINY, fusion_layers=0)
    assert run.needs["init"].needs["visual_tokenizer"].changes == ""


@pytest.mark.parametrize(
    "name",
    [
        "every_task",
        "segmentation",
        "pretrained",
        "sources",
        "architecture",
        "codes",
        "masking",
        "contrastive",
    ],
)
def test_programs_state_a_guess_and_their_recipes_can_be_made(name):
    program = __import__(f"benchmarks.learning.{name}", fromlist=["STUDY"])
    assert "Guess:" in program.__doc__ and program.STUDY.name == name
    assert len({row.name for row in program.STUDY.rows}) == len(program.STUDY.rows)
    for row in program.STUDY.rows:
        if row.run:
            make_training_jobs(row.run, ROOT, Path("out"))
        for tuning in program.STUDY.tunings:
            recipe = tuning.recipe or program.STUDY.recipe
            make_recipe(Run("", tuning.task, recipe, tuning.steps, row.network), ROOT)


# Networks and probe -------------------------------------------------------------------------------


def test_one_ffn_is_the_same_layer_for_images_and_texts_also_after_training_steps():
    task = OneFFN(replace(DEMO, model=replace(TINY, fusion_layers=0)))
    task.init_weights(3)
    block = task.backbone.blocks[1]
    optimizer = torch.optim.AdamW(task.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    before = block.ffn.image.fc1.weight.clone()
    for _ in range(2):
        image = torch.randn(2, 3, 32, 32, generator=generator)
        text = torch.randint(5, 400, (2, 9), generator=generator)
        optimizer.zero_grad()
        task.backbone(image, text).tokens.square().sum().backward()
        optimizer.step()
    assert not torch.equal(block.ffn.image.fc1.weight, before)
    for layer in (block.norm2, block.ffn):
        tensors = layer.text.state_dict()
        for name, tensor in layer.image.state_dict().items():
            torch.testing.assert_close(tensors[name], tensor, rtol=0, atol=0)
    states = torch.randn(1, 5, 128, generator=generator)
    as_image, as_text = block.ffn((states, states), ("image", "text"))
    assert torch.equal(as_image, as_text)
    torch.testing.assert_close(as_image, block.ffn.image(states))
    with pytest.raises(ValueError, match="fusion_layers 0"):
        OneFFN(DEMO)


def test_a_task_whose_records_are_all_another_tasks_reads_them_below_its_root(tmp_path):
    assert find_records_root(Pixels, str(tmp_path), ["images"]) == tmp_path


def test_pixels_of_a_patch_are_normalized_and_only_masked_patches_have_a_loss():
    task = Pixels(DEMO)
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8, generator=generator)
    mask = torch.zeros(2, 16, dtype=torch.bool)
    mask[0, 5], mask[1, 0] = True, True
    targets = task.compute_pixels(task.normalize_images({"image": image}))
    patch = image[0, :, 8:16, 8:16].float().flatten()
    expected = (patch - patch.mean()) / patch.std()
    torch.testing.assert_close(targets[0, 5], expected, atol=1e-4, rtol=0)
    (masked,) = task.compute_masked_losses({"image": image, "image_mask": mask})
    assert masked.modality == "image" and masked.losses.shape == (2,)
    constant = image.clone()
    constant[:] = 7
    assert task.compute_pixels(task.normalize_images({"image": constant})).abs().max() < 1e-2


def test_the_probe_separates_what_is_linearly_separable():
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(200, 8, generator=generator)
    labels = (states @ torch.randn(8, 3, generator=generator)).argmax(1)
    accuracy = (fit_classifier(states, labels)(states).argmax(1) == labels).float().mean()
    assert accuracy > 0.95


# Table and plot -----------------------------------------------------------------------------------


def test_tables_show_mean_and_spread_and_leave_empty_what_was_not_measured():
    lines = make_table(VALUES).splitlines()
    assert lines[0].startswith("|  | shape probe | vqa accuracy, 100 labels, 30 steps |")
    assert lines[2].startswith("| pretrained | 60.0% (50.0% to 70.0%) |")
    assert lines[2].endswith("| 2.00 (1.50 to 2.50) |")
    assert lines[3] == "| scratch |  |  | 25.0% (25.0% to 25.0%) |  |  |"
    columns = make_table(VALUES, rows_are_columns=True).splitlines()
    assert columns[0] == "|  | pretrained | scratch |" and len(columns) == 7


def test_the_plot_has_a_panel_for_every_measure_and_curves_over_steps():
    svg = draw_results(VALUES)
    root = ElementTree.fromstring(svg)
    panels = [child.get("aria-label") for child in root if child.get("aria-label")]
    assert [panel.partition(":")[0] for panel in panels] == [
        "shape probe",
        "captioning cider, all labels, 90 steps",
        "vqa accuracy over labels, 30 steps",
        "vqa accuracy over steps, all labels",
    ]
    assert "pretrained ends at 0.75, scratch ends at 0.25" in panels[-1]


# A program ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_program_writes_its_results_and_trains_nothing_again(tmp_path, monkeypatch, capsys):
    study = replace(contrastive.STUDY, rows=[*contrastive.STUDY.rows[:1], Row("scratch")])
    arguments = ["--fast", "--only", "retrieval", "imagenet", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["contrastive.py", *arguments])
    export_world(["vqkd"], "small")
    run_program(study, "contrastive")
    results = json.loads((tmp_path / "contrastive.json").read_text())
    assert list(results["figures"]) == ["masks alone, no further steps", "scratch"]
    measures = results["figures"]["masks alone, no further steps"]
    assert {"color words", "shape probe", "retrieval mean recall, all labels, 2 steps"} <= {
        *measures
    }
    table = (tmp_path / "contrastive.md").read_text()
    assert table.strip() == results["table"] and table in capsys.readouterr().out
    assert (tmp_path / "contrastive.svg").read_text().startswith("<svg ")
    assert not list(tmp_path.glob("imagenet-*/last")), "of fine-tunings only the scores are kept"

    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("result.json")}
    assert len(files) == 3 + 2 * 2
    run_program(study, "contrastive")
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("result.json")} == files
    again = json.loads((tmp_path / "contrastive.json").read_text())
    assert again["figures"] == results["figures"]
