"""A tiny world, read in each dataset's own format; its texts are compared with its images."""

import hashlib
import io
import json
import re
import tarfile
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from beit3.world.export import IMAGENET_CLASSES, _make_instance, write_world
from beit3.world.language import ANSWERS
from beit3.world.render import compute_boxes, render_instance_masks
from beit3.world.scene import COLORS, make_scene

TINY = {"num_train": 24, "num_val": 8, "num_test": 6, "num_questions": 60}
SHAPE_IDS = {"circle": 1, "square": 2, "triangle": 3, "cross": 4, "bar": 5}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("world") / "tiny"
    write_world(out, **TINY)
    return out


def read_pixels(path: Path, size: int = 32) -> np.ndarray:
    with Image.open(path) as image:
        assert image.size == (size, size) and image.format == "PNG"
        return np.asarray(image.convert("RGB"), dtype=float)


def shows_color(path: Path, color: str) -> bool:
    return bool((abs(read_pixels(path) - np.array(COLORS[color])).max(axis=-1) < 40).sum() >= 2)


def compute_digests(root: Path) -> dict[str, str]:
    files = [path for path in root.rglob("*") if path.is_file()]
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files
    }


def test_the_same_arguments_give_the_same_bytes(world, tmp_path):
    write_world(tmp_path / "again", **TINY)
    assert compute_digests(tmp_path / "again") == compute_digests(world)
    write_world(tmp_path / "other", **TINY, seed=1)
    shared_digests = set(compute_digests(tmp_path / "other").values()) & set(
        compute_digests(world).values()
    )
    assert len(shared_digests) <= 2  # images never repeat, label maps may


def test_no_image_appears_twice(world):
    seen = Counter(
        digest for name, digest in compute_digests(world).items() if "/annotations/" not in name
    )
    assert max(seen.values()) == 1


def test_images_and_texts(world):
    for split, count in (("train", 24), ("val", 8)):
        assert [path.name for path in sorted((world / "images" / split).iterdir())][:1] == [
            "000000.png"
        ]
        assert len(list((world / "images" / split).glob("*.png"))) == count
        documents = "".join(
            path.read_text() for path in (world / "texts" / split).glob("*.txt")
        ).split("\n\n")
        assert len(documents) == count and all(
            document.strip().endswith(" .") for document in documents
        )


def test_pairs_are_karpathys_format(world):
    images = json.loads((world / "pairs/dataset_world.json").read_text())["images"]
    assert Counter(image["split"] for image in images) == {"train": 24, "val": 8, "test": 6}
    assert [image["imgid"] for image in images] == list(range(38))
    assert sum((image["sentids"] for image in images), []) == list(range(3 * 38))
    for image in images:
        path = world / "pairs" / image["filepath"] / image["filename"]
        for sentence, sentid in zip(image["sentences"], image["sentids"], strict=True):
            assert sentence["imgid"] == image["imgid"] and sentence["sentid"] == sentid
            assert sentence["tokens"] == re.findall("[a-z]+", sentence["raw"])
            assert all(shows_color(path, word) for word in sentence["tokens"] if word in COLORS), (
                path,
                sentence["raw"],
            )


def test_vqa_is_vqav2s_format(world):
    ids = set()
    for split, count in (("train2014", 60), ("val2014", 24)):
        asked = json.loads((world / f"vqa/v2_OpenEnded_mscoco_{split}_questions.json").read_text())
        answered = json.loads((world / f"vqa/v2_mscoco_{split}_annotations.json").read_text())
        assert asked["data_subtype"] == answered["data_subtype"] == split
        assert len(asked["questions"]) == len(answered["annotations"]) == count
        for question, annotation in zip(asked["questions"], answered["annotations"], strict=True):
            assert question["question_id"] == annotation["question_id"]
            assert question["image_id"] == annotation["image_id"]
            answer = annotation["multiple_choice_answer"]
            assert [vote["answer_id"] for vote in annotation["answers"]] == list(range(1, 11))
            assert answer in ANSWERS and {vote["answer"] for vote in annotation["answers"]} == {
                answer
            }
            assert question["question"].startswith(annotation["question_type"] + " ")
            assert (annotation["answer_type"] == "yes/no") == (answer in ("yes", "no"))
            assert (annotation["answer_type"] == "number") == (answer in ("0", "1", "2", "3"))
            path = world / f"vqa/{split}/COCO_{split}_{question['image_id']:012d}.png"
            assert shows_color(path, answer) if answer in COLORS else path.exists()
        split_ids = {question["question_id"] for question in asked["questions"]}
        assert len(split_ids) == count and not split_ids & ids
        ids |= split_ids


def test_nlvr2(world):
    for split, count in (("train", 6), ("dev", 8)):
        lines = (world / f"nlvr2/{split}.json").read_text().splitlines()
        assert len(lines) == count
        for record in map(json.loads, lines):
            stem = record["identifier"].rpartition("-")[0]
            folder = (
                f"nlvr2/images/train/{record['directory']}" if split == "train" else "nlvr2/dev"
            )
            paths = [world / folder / f"{stem}-img{side}.png" for side in (0, 1)]
            assert record["label"] in ("True", "False") and all(path.exists() for path in paths)


def test_nlvr2_statements_match_their_images(tmp_path):
    write_world(tmp_path / "w", num_train=400, num_val=1, num_test=1, num_questions=3)
    outcomes = Counter()
    for record in map(json.loads, (tmp_path / "w/nlvr2/train.json").read_text().splitlines()):
        match = re.fullmatch(
            r"the (left|right) image contains an? (\w+) object \.", record["sentence"]
        )
        # White and black are shades of textured objects as well.
        if match and match[2] in COLORS and match[2] not in ("white", "black"):
            stem = record["identifier"].rpartition("-")[0]
            folder = tmp_path / f"w/nlvr2/images/train/{record['directory']}"
            path = folder / f"{stem}-img{int(match[1] == 'right')}.png"
            outcomes[shows_color(path, match[2]) == (record["label"] == "True")] += 1
    assert outcomes[True] >= 3 and not outcomes[False]


def test_imagenet_is_a_folder_per_class(world):
    for split in ("train", "val"):
        folders = sorted(path.name for path in (world / "imagenet" / split).iterdir())
        assert folders == sorted(IMAGENET_CLASSES) and len(folders) == 10
        for path in (world / "imagenet" / split).glob("*/*.png"):
            assert shows_color(path, path.parent.name.split("_")[0])


def test_coco(world):
    for split, count in (("train", 10), ("val", 10)):
        body = json.loads((world / f"coco/annotations/instances_{split}.json").read_text())
        images = {image["id"]: image for image in body["images"]}
        assert len(images) == count and [c["name"] for c in body["categories"]] == list(SHAPE_IDS)
        assert {annotation["image_id"] for annotation in body["annotations"]} == set(images)
        assert len({annotation["id"] for annotation in body["annotations"]}) == len(
            body["annotations"]
        )
        for image in images.values():
            assert read_pixels(world / "coco" / split / image["file_name"]).shape == (
                image["height"],
                image["width"],
                3,
            )
    captions = json.loads((world / "coco/annotations/captions_val.json").read_text())
    assert Counter(a["image_id"] for a in captions["annotations"]) == dict.fromkeys(images, 3)


def test_coco_instances_agree_with_the_masks():
    excess = defaultdict(list)
    for seed in range(400):
        scene = make_scene(seed)
        for item, mask, box in zip(
            scene.objects, render_instance_masks(scene, 128), compute_boxes(scene, 128), strict=True
        ):
            record = _make_instance(item, 128)
            assert record["category_id"] == SHAPE_IDS[item.shape] and record["iscrowd"] == 0
            # The tips of triangles are thinner than a pixel; every other side is good to one.
            slack = {"triangle": 2.5}.get(item.shape, 1.01)
            assert record["bbox"] == pytest.approx(box, abs=slack), item
            excess[item.shape].append(mask.sum() / record["area"] - 1)
    for shape, values in excess.items():
        assert max(map(abs, values)) < 0.12, shape  # one row of pixels along a small cross
        # The polygon of a circle has 24 corners.
        expected = np.pi / (12 * np.sin(np.pi / 12)) - 1 if shape == "circle" else 0
        assert np.mean(values) == pytest.approx(expected, abs=0.008), shape


def test_coco_area_is_that_of_the_polygon():
    for seed in range(40):
        for item in make_scene(seed).objects:
            record = _make_instance(item, 128)
            canvas = Image.new("1", (2048, 2048))
            ImageDraw.Draw(canvas).polygon(
                [16 * value for value in record["segmentation"][0]], fill=1
            )
            assert record["area"] == pytest.approx(np.asarray(canvas).sum() / 256, rel=0.02), item


def test_ade20k(world):
    for split in ("training", "validation"):
        images = sorted((world / "ade20k/images" / split).iterdir())
        labels = sorted((world / "ade20k/annotations" / split).iterdir())
        assert len(images) == 10 and [path.name for path in images] == [
            path.name for path in labels
        ]
        for path in labels:
            with Image.open(path) as label:
                assert label.mode == "L"
                values = set(np.unique(np.asarray(label)).tolist())
            assert 1 in values and values <= set(range(1, 7)) and len(values) >= 2


def test_shards_are_webdatasets(world):
    with tarfile.open(world / "shards/train-000000.tar") as tar:
        members = {member.name: tar.extractfile(member).read() for member in tar.getmembers()}
    keys = list(dict.fromkeys(name.partition(".")[0] for name in members))
    assert list(members) == [f"{key}.{ending}" for key in keys for ending in ("png", "txt", "json")]
    assert len(keys) == 10
    for key in keys:
        record = json.loads(members[f"{key}.json"])
        assert record["key"] == key and record["caption"] == members[f"{key}.txt"].decode()
        assert Image.open(io.BytesIO(members[f"{key}.png"])).size == (32, 32)


def test_shards_contain_all_pairs(tmp_path, monkeypatch):
    monkeypatch.setattr("beit3.world.export.PAIRS_PER_SHARD", 4)
    write_world(tmp_path / "w", **TINY)
    keys = []
    for path in sorted((tmp_path / "w/shards").glob("*.tar")):
        with tarfile.open(path) as tar:
            keys.append([name[:-4] for name in tar.getnames() if name.endswith(".txt")])
    assert [len(part) for part in keys] == [4, 4, 2] and sum(keys, []) == [
        f"{k:09d}" for k in range(10)
    ]


def test_progress_ends_at_the_total(tmp_path):
    calls = []
    write_world(
        tmp_path / "w",
        **TINY,
        image_size=16,
        progress=lambda done, total: calls.append((done, total)),
    )
    assert [done for done, _ in calls] == list(range(1, len(calls) + 1))
    assert {total for _, total in calls} == {len(calls)}
    read_pixels(tmp_path / "w/images/train/000000.png", size=16)


def test_an_interrupted_export_leaves_nothing(tmp_path):
    def interrupt(done: int, total: int) -> None:
        if done == 40:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_world(tmp_path / "w", **TINY, progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_invalid_arguments_are_refused(world, tmp_path):
    with pytest.raises(ValueError, match="exists already"):
        write_world(world, **TINY)
    with pytest.raises(ValueError, match="num_val: 0"):
        write_world(tmp_path / "w", **{**TINY, "num_val": 0})
    with pytest.raises(ValueError, match="num_questions: 2"):
        write_world(tmp_path / "w", **{**TINY, "num_questions": 2})
    with pytest.raises(ValueError, match="seed: -1"):
        write_world(tmp_path / "w", **TINY, seed=-1)
    assert list(tmp_path.iterdir()) == []
