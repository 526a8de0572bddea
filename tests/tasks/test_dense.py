"""Tests of detection and segmentation together: initial weights, two processes, large sizes and
precision."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from beit3.data.views.preprocessing import Preprocessing
from beit3.detection.config import DetectorConfig
from beit3.model.config import GIANT, TINY_RELEASE
from beit3.model.trunk import ImageTrunk
from beit3.ops import batch_norm
from beit3.ops.collectives import gather_full
from beit3.ops.positions import resample_patches, resample_positions
from beit3.predict import load as load_predictor
from beit3.recipe import RunConfig, TaskConfig
from beit3.seeding import make_generator
from beit3.segmentation import losses
from beit3.segmentation.records import decode_label_map
from beit3.task import Batch, Task, load_task
from beit3.tasks.backbone import Backbone
from beit3.tasks.coco import CocoConfig
from beit3.tasks.pretrain import Pretrain, PretrainConfig
from beit3.tasks.retrieval import Retrieval, RetrievalConfig
from beit3.training import parallel
from beit3.training.evaluate import predict
from beit3.training.step import backward, sum_targets
from beit3.weights.initialization import initialize_from
from beit3.weights.loading import load_released
from beit3.weights.matching import NUM_EXTRA_ROWS, assign_weights, gather_weights, get_weights
from beit3.weights.release_format import to_released_state
from beit3.weights.store import save_weights
from tests.golden import find_fixture
from tests.tasks.dense import (
    CONFIGS,
    MODEL,
    NUM_CLASSES,
    SIDE,
    add_noise,
    coco_config,
    make_inference_config,
    make_label_blocks,
    make_labeled_record,
    make_object,
    make_record,
    make_task,
)

DENSE = ("coco", "ade20k")
SOURCE_MODEL = replace(
    TINY_RELEASE,
    dim=32,
    depth=4,
    num_heads=2,
    ffn_dim=48,
    image_size=32,
    patch_size=8,
    vocab_size=30,
    text_positions=12,
)
"""A released network of 4 x 4 patches; the networks of the tasks have 8 x 8."""
TARGET_MODEL = replace(SOURCE_MODEL, image_size=SIDE, final_norm=False)


@pytest.fixture(scope="module")
def release() -> Backbone:
    task = Backbone(TaskConfig(model=SOURCE_MODEL))
    task.init_weights(3)
    return add_noise(task)


def get_trunk_weights(task: Any) -> dict[str, Tensor]:
    return {
        name: tensor for name, tensor in get_weights(task).items() if name.startswith("backbone.")
    }


def check_same_trunk(task: Any, source: Task) -> None:
    """Checks that the image experts are equal to the bit, and positions resampled."""
    source_weights, positions = get_weights(source), "backbone.image_embedding.positions"
    for name, tensor in get_trunk_weights(task).items():
        expected = (
            source_weights[name]
            if name != positions
            else resample_positions(source_weights[name], (4, 4), (8, 8), keep=NUM_EXTRA_ROWS)
        )
        assert torch.equal(tensor, expected), name


# Initial weights ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DENSE)
def test_a_released_file_initializes_the_trunk(release, tmp_path, name):
    state = to_released_state(release)
    torch.save({"model": state}, tmp_path / "release.pth")
    task = make_task(name, seed=5, model=TARGET_MODEL)
    head = {
        key: tensor.clone()
        for key, tensor in get_weights(task).items()
        if not key.startswith("backbone.")
    }
    report = initialize_from(task, tmp_path / "release.pth")
    check_same_trunk(task, release)
    assert set(report.loaded) == set(get_trunk_weights(task)) and set(report.fresh) == set(head)
    assert all(torch.equal(get_weights(task)[key], tensor) for key, tensor in head.items()), (
        "heads keep their initial values"
    )
    sides = {
        key: "the final norm" if "encoder.layer_norm.A" in key else "takes images alone"
        for key in report.ignored
    }
    assert all(sides[key] in reason for key, reason in report.ignored.items())
    texts = {key for key in state if ".B." in key or "text_embed." in key} | {
        key for key in state if "encoder.layer_norm.A" in key
    }
    assert set(report.ignored) == texts, "nothing else is left"


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("kind", ["pretrain", "retrieval"])
def test_our_own_weights_initialize_the_trunk(tmp_path, name, kind):
    """The source has the paper's form, with fusion experts, which images alone do not use."""
    model = replace(
        SOURCE_MODEL, fusion_layers=2, shared_attention=True, sub_ln=False, final_norm=True
    )
    configs: Any = {
        "pretrain": (Pretrain, PretrainConfig(model=model, image=Preprocessing(model.image_size))),
        "retrieval": (Retrieval, RetrievalConfig(model=model)),
    }
    source = configs[kind][0](configs[kind][1])
    source.init_weights(2)
    save_weights(source, tmp_path / "w")
    task = make_task(name, model=replace(model, image_size=SIDE, final_norm=False))
    report = initialize_from(task, tmp_path / "w")
    check_same_trunk(task, source)
    backbone = {
        key: reason for key, reason in report.ignored.items() if key.startswith("backbone.")
    }
    assert any(".fusion." in key for key in backbone) and any(".text." in key for key in backbone)
    for key, reason in backbone.items():
        assert (
            "the final norm" if key.startswith("backbone.norm.") else "takes images alone"
        ) in reason, key
    assert any(f"a head that {name} does not have" == reason for reason in report.ignored.values())
    assert not any(key.startswith("backbone.") for key in report.fresh)


@pytest.mark.parametrize("name", DENSE)
def test_patches_of_another_size_are_resampled_where_the_config_says_so(release, tmp_path, name):
    torch.save(to_released_state(release), tmp_path / "release.pth")
    model = replace(TARGET_MODEL, patch_size=16, image_size=2 * SIDE)
    with pytest.raises(
        ValueError,
        match=r"shape .*8, 8.*needs .*16, 16.; --task.resize_patch True resamples it",
    ):
        initialize_from(make_task(name, model=model), tmp_path / "release.pth")
    task = make_task(name, model=model, resize_patch=True)
    initialize_from(task, tmp_path / "release.pth")
    released_patches = get_weights(release)["backbone.image_embedding.patch.weight"]
    assert torch.equal(
        task.backbone.image_embedding.patch.weight, resample_patches(released_patches, 16)
    )
    small = torch.rand(5, 3, 8, 8)
    large = nn.functional.interpolate(small, scale_factor=2, mode="bicubic")
    resampled = task.backbone.image_embedding.patch(large)
    released = release.backbone.image_embedding.patch(small)
    # An enlarged patch gives the same embedding.
    torch.testing.assert_close(resampled, released, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", DENSE)
def test_layers_of_other_classes_start_fresh_and_the_rest_is_loaded(tmp_path, name):
    source = add_noise(make_task(name))
    save_weights(source, tmp_path / "w")
    task = make_task(name, seed=4, num_classes=NUM_CLASSES + 2)
    report = initialize_from(task, tmp_path / "w")
    assert (
        report.fresh
        and not report.ignored
        and all("in the file" in reason for reason in report.fresh.values())
    )
    assert all("class" in key or "mask_fcn_logits" in key for key in report.fresh)
    source_weights, fresh = (
        get_weights(source),
        get_weights(make_task(name, seed=4, num_classes=NUM_CLASSES + 2)),
    )
    for key, tensor in get_weights(task).items():
        assert torch.equal(tensor, fresh[key] if key in report.fresh else source_weights[key]), key


def test_weights_without_a_mask_head_initialize_one_with_it_and_back(tmp_path):
    """Objects365 comes first, then COCO. On the way back the mask head is ignored."""
    boxes, outlines = (
        coco_config(detector=replace(coco_config().detector, masks=masks))
        for masks in (False, True)
    )
    for first, then in ((boxes, outlines), (outlines, boxes)):
        source, task = load_task("coco")(first), load_task("coco")(then)
        source.init_weights(1), task.init_weights(2)
        save_weights(source, tmp_path / "w")
        report = initialize_from(task, tmp_path / "w")
        left = report.fresh if then is outlines else report.ignored
        assert left and all(key.startswith("detector.cascade.mask_head.") for key in left)
        assert (
            set(report.loaded) == set(get_weights(source)) & set(get_weights(task))
            and len(report.loaded) > 80
        )


def test_detection_and_segmentation_initialize_each_other(tmp_path):
    for name, target_name in (DENSE, DENSE[::-1]):
        save_weights(add_noise(make_task(name)), tmp_path / name)
        report = initialize_from(make_task(target_name), tmp_path / name)
        assert set(report.loaded) == set(get_trunk_weights(make_task(target_name)))


@pytest.mark.parametrize("name", DENSE)
def test_weights_of_other_tasks_load_as_dense_tasks(release, tmp_path, name):
    """An untrained head refuses to predict."""
    retrieval = Retrieval(RetrievalConfig(model=replace(SOURCE_MODEL, final_norm=True)))
    retrieval.init_weights(0)
    save_weights(retrieval, tmp_path / "retrieval")
    torch.save(to_released_state(release), tmp_path / "release.pth")
    for path, heads in ((tmp_path / "retrieval", None), (tmp_path / "release.pth", 2)):
        predictor = load_predictor(path, task=name, num_heads=heads)
        assert predictor.report.fresh and type(predictor.task) is load_task(name)
        with pytest.raises(ValueError, match=f"the head of {name} is untrained"):
            predictor("image.png")


@pytest.mark.parametrize("name", DENSE)
def test_dense_weights_initialize_tasks_of_texts_and_pairs(tmp_path, name):
    """Parameters that images alone do not use start fresh, fusion experts included."""
    model = replace(TARGET_MODEL, fusion_layers=1)
    save_weights(add_noise(make_task(name, model=model)), tmp_path / "w")
    task = Retrieval(RetrievalConfig(model=model))
    report = initialize_from(task, tmp_path / "w")
    own = [key for key in get_weights(task) if key.startswith("backbone.")]
    images = {
        key
        for key in own
        if not any(part in key for part in (".text.", ".text_embedding.", ".fusion."))
    }
    assert any(".fusion." in key for key in own)
    assert set(report.loaded) == images
    assert {report.fresh[key] for key in set(own) - images} == {
        "the file holds the image side alone"
    }


def test_weights_of_detection_use_square_images_as_a_classifier(tmp_path):
    """Detection keeps the aspect ratio; images of a classifier must be squares to be stacked."""
    save_weights(make_task("coco", model=TARGET_MODEL), tmp_path / "w")
    assert load_predictor(tmp_path / "w", task="imagenet").task.config.image.resize == "crop"


def test_every_released_backbone_fits_both_tasks():
    """Names and shapes of the published files, without their memory."""
    shapes = json.loads((find_fixture("state_dict_shapes") / "shapes.json").read_text())
    assert shapes
    for file, tensors in shapes.items():
        for name in DENSE:
            with torch.device("meta"):
                task, report = load_released(
                    {key: torch.empty(shape) for key, shape in tensors.items()}, name
                )
            fresh = {
                key for key in report.fresh if key.startswith("backbone.")
            }  # some tasks of the release read states before the norm
            assert fresh <= {"backbone.norm.image.weight", "backbone.norm.image.bias"}, file
            assert set(report.loaded) | fresh == set(get_trunk_weights(task)), file


# Two processes ------------------------------------------------------------------------------------

EXACT = RunConfig(precision="float64")
ALL_SAMPLES: dict[str, Any] = {"rpn_samples": 10_000, "roi_samples": 400, "roi_positive_share": 0.5}
"""More samples than there are candidates, so that none are drawn at random."""
MICRO_BATCHES = {2: ([[0], [1, 2]], [[3], [4]]), 1: ([[0, 3], [1, 2, 4]],)}
"""Micro-batches of each process, by the number of processes. The first image has no object."""
SIZES = [(40, 30), (64, 200), (64, 64), (150, 70), (33, 64)]


def make_configs() -> dict[str, Any]:
    detector = replace(coco_config().detector, **ALL_SAMPLES)
    return {
        "coco": coco_config(detector=detector, window=4, num_global=1),
        "ade20k": CONFIGS["ade20k"](views=make_inference_config(flip=True)),
    }


def write_records(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Writes five images and returns their records for each task."""
    task_records: dict[str, list[dict[str, Any]]] = {"coco": [], "ade20k": []}
    for index, (width, height) in enumerate(SIZES):
        objects = [
            make_object(
                4 * number, 3 * number, 12 + number, 14, label=number % NUM_CLASSES, id=number + 1
            )
            for number in range((0, 3, 1, 4, 2)[index])
        ]
        task_records["coco"].append(make_record(folder, f"{index + 1}", (width, height), *objects))
        task_records["ade20k"].append(
            make_labeled_record(
                folder,
                f"s{index}",
                make_label_blocks(width, height, index, num_classes=1 + index % NUM_CLASSES),
            )
        )
    return task_records


def make_fixed_points(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Returns the same points for every mask and image, in place of random ones."""
    steps = torch.arange(shape[-1], dtype=like.dtype) + 0.5
    return torch.stack((steps * 0.618 % 1, steps / shape[-1]), -1).expand(*shape, 2)


@contextmanager
def fix_points() -> Iterator[None]:
    with patch.object(losses, "draw_points", make_fixed_points):
        yield


def run_tasks(folder: Path, rank: int, processes: int) -> dict[str, Any]:
    """Returns losses, gradients, counts and predictions of both tasks, by `<task> <value>`."""
    device, results = torch.device("cpu"), {}
    for name, records in json.loads((folder / "records.json").read_text()).items():
        task: Any = parallel.build_task(load_task(name), make_configs()[name], None, EXACT, device)
        parallel.materialize(task, device, 0)
        assign_weights(task, load_file(folder / f"{name}.safetensors"))
        for module in task.modules():  # statistics of a batch are of one process's
            module.train(not isinstance(module, nn.BatchNorm2d))
        micro_batches = [
            task.collate([task.example(records[index], True) for index in indices])
            for indices in MICRO_BATCHES[processes][rank]
        ]
        totals = sum_targets(task, micro_batches)
        with fix_points():
            results[f"{name} losses"], _ = backward(
                task, micro_batches, totals, parallel.make_autocast(EXACT, device)
            )
        results[f"{name} gradients"] = {
            key: gather_full(p.grad) for key, p in task.trainable_parameters() if p.grad is not None
        }
        results[f"{name} counts"] = totals
        results[f"{name} predictions"] = predict(
            task, records, batch_size=1, autocast=parallel.make_autocast(EXACT, device)
        )
        results[f"{name} names"] = sorted(gather_weights(task))
    return results


def run_process(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    meet = f"file://{folder}/meet"
    dist.init_process_group(
        "gloo", init_method=meet, rank=rank, world_size=2, timeout=timedelta(seconds=90)
    )  # a process that waits for the other fails
    torch.save(run_tasks(folder, rank, 2), folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Returns the results of one process, and of each of two."""
    folder = tmp_path_factory.mktemp("processes")
    (folder / "records.json").write_text(json.dumps(write_records(folder)))
    for name, config in make_configs().items():
        task = load_task(name)(config)
        task.init_weights(0)
        save_file(get_weights(add_noise(task)), folder / f"{name}.safetensors")
    mp.spawn(run_process, (folder,), nprocs=2)
    return run_tasks(folder, 0, 1), *(
        torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)
    )


@pytest.mark.parametrize("name", DENSE)
def test_two_processes_equal_one(runs, name):
    """Compares losses, counts and gradients. Masks, boxes and queries are counted over both
    processes, also where one of them has none."""
    single, sharded, _ = runs
    assert single[f"{name} counts"] == sharded[f"{name} counts"]
    assert single[f"{name} losses"] == pytest.approx(sharded[f"{name} losses"], rel=1e-9)
    assert all(value > 0 for value in single[f"{name} losses"].values())
    expected, gradients = single[f"{name} gradients"], sharded[f"{name} gradients"]
    assert expected.keys() == gradients.keys() and any(
        key.startswith("backbone.") for key in expected
    )
    for key, gradient in expected.items():
        torch.testing.assert_close(
            gradients[key],
            gradient,
            rtol=1e-8,
            atol=1e-10 * float(1 + gradient.abs().max()),
            msg=key,
        )


@pytest.mark.parametrize("name", DENSE)
def test_two_processes_predict_the_same_as_one(runs, name):
    """This holds also where one process's images need more windows than the other's, because
    sharded blocks are gathered for each window."""
    single, *sharded = runs
    expected = single[f"{name} predictions"]
    for results in sharded:
        predictions = results[f"{name} predictions"]
        ids = [prediction["id"] for prediction in predictions]
        assert ids == [prediction["id"] for prediction in expected]
        if name == "ade20k":
            assert predictions == expected
            assert max(len(np.unique(decode_label_map(prediction))) for prediction in expected) > 1
            continue
        for prediction, expected_prediction in zip(predictions, expected, strict=True):
            assert_equal_objects(prediction["objects"], expected_prediction["objects"])


def assert_equal_objects(objects: list[dict], expected: list[dict]) -> None:
    assert objects
    for detected, expected_object in zip(objects, expected, strict=True):
        assert detected["label"] == expected_object["label"]
        assert detected["box"] == pytest.approx(expected_object["box"], abs=1e-6)
        assert detected["score"] == pytest.approx(expected_object["score"], rel=1e-6)
        assert detected["mask"] == expected_object["mask"]


def test_batch_norms_are_synchronized_on_accelerators(monkeypatch):
    """The task is built as for two GPUs; nothing is computed."""
    for module in (batch_norm, parallel):
        monkeypatch.setattr(module, "world_size", lambda: 2)
    monkeypatch.setattr(parallel, "shard", lambda *_: None)
    for device, kind in (("cuda", nn.SyncBatchNorm), ("cpu", nn.BatchNorm2d)):
        task = parallel.build_task(
            load_task("ade20k"), make_configs()["ade20k"], None, RunConfig(), torch.device(device)
        )
        norms = [
            module
            for module in task.modules()
            if isinstance(module, nn.modules.batchnorm._BatchNorm)
        ]
        assert len(norms) > 8 and {type(norm) for norm in norms} == {kind}


# Sizes and precision ------------------------------------------------------------------------------


@torch.no_grad()
def test_the_giants_have_the_papers_shapes():
    """Runs the paper's recipes without memory: segmentation at 896 px up to the scores, detection
    at 1280 px up to the pyramid, because later shapes depend on the detections."""
    with torch.device("meta"):
        coco = load_task("coco")(load_task("coco").recipes["giant_1280"].task).eval()
    assert [block.window for block in coco.backbone.blocks].count(
        0
    ) == 4 and coco.config.model.patch_size == 16
    maps = coco.detector.pyramid(coco.backbone(torch.empty(1, 3, 1280, 1280, device="meta")))
    assert [feature_map.shape for feature_map in maps] == [
        (1, 256, side, side) for side in (320, 160, 80, 40, 20)
    ]
    with FakeTensorMode():  # transformers asks for a type of autocast, which meta has none of
        ade20k = load_task("ade20k")(load_task("ade20k").recipes["giant_896"].task).eval()
        scores = ade20k.compute_scores(torch.empty(1, 3, 896, 896))
    assert scores.shape == (1, 150, 224, 224) and ade20k.config.model.dim == GIANT.dim


@pytest.mark.parametrize("name", DENSE)
def test_bfloat16_is_near_float32(tmp_path, name):
    """Losses are float32 and within 5 % of those of float32, since products have 8 bits."""
    task = load_task(name)(make_configs()[name])
    task.init_weights(0)
    task = add_noise(task)
    batch = task.collate([task.example(record, True) for record in write_records(tmp_path)[name]])
    results = []
    for half in (False, True):
        task.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=half), fix_points():
            result = task(batch)["losses"]
        torch.stack(list(result.values())).sum().backward()
        assert all(value.dtype == torch.float32 for value in result.values())
        assert all(
            p.grad.isfinite().all() for _, p in task.trainable_parameters() if p.grad is not None
        )
        results.append({key: float(value.detach()) for key, value in result.items()})
    steady = [
        key for key in results[0] if not key.startswith(("box1", "box2"))
    ]  # those follow boxes that just cross a threshold
    assert len(steady) >= 3 and {key: results[1][key] for key in steady} == pytest.approx(
        {key: results[0][key] for key in steady}, rel=0.05
    )


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 0.01), (torch.bfloat16, 0.06)])
def test_segmentation_in_half_precision_is_near_float32(dtype, tolerance):
    """Weights are in half precision as well, unlike in training. A large map shows positions that
    half precision would round."""
    task = make_task("ade20k", num_classes=5).eval()
    images = torch.randint(
        0, 256, (1, 3, 200, 264), dtype=torch.uint8, generator=make_generator(0, "images")
    )
    scores = task.compute_scores(task.normalize_images({"image": images}))
    task.to(dtype)
    half_scores = task.compute_scores(task.normalize_images({"image": images}))
    assert half_scores.dtype == torch.float32
    assert (half_scores - scores).abs().max() < tolerance * scores.abs().max()
    record = {"id": "0", "image": images[0].permute(1, 2, 0).numpy()}
    (prediction,) = task.predict(task.collate([task.example(record, False)]))
    assert decode_label_map(prediction).shape == (200, 264)


@pytest.mark.parametrize("name", DENSE)
def test_recomputed_blocks_give_the_same_gradients(tmp_path, name):
    gradients = []
    for recompute in ("none", "full", "selective"):
        task = parallel.build_task(
            load_task(name),
            make_configs()[name],
            None,
            replace(EXACT, checkpointing=recompute),
            torch.device("cpu"),
        )
        parallel.materialize(task, torch.device("cpu"), 0)
        batch: Batch = task.collate(
            [task.example(record, True) for record in write_records(tmp_path)[name][1:3]]
        )
        with fix_points():
            torch.stack(list(task(batch)["losses"].values())).sum().backward()
        gradients.append(
            {key: p.grad for key, p in task.trainable_parameters() if p.grad is not None}
        )
    for recomputed in gradients[1:]:
        for key, gradient in gradients[0].items():
            torch.testing.assert_close(recomputed[key], gradient, rtol=1e-9, atol=1e-12, msg=key)


def test_defaults_are_the_published_sizes():
    config = CocoConfig()
    assert (config.window, config.num_global, config.image.image_size, config.detector) == (
        16,
        4,
        1024,
        DetectorConfig(),
    )
    with torch.device("meta"):
        trunk = ImageTrunk(MODEL, window=2, num_global=1)
    assert {name.split(".")[0] for name, _ in trunk.named_parameters()} == {
        "image_embedding",
        "blocks",
    }
