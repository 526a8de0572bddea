"""Exports agree with the network at several sizes, or are refused; predictions are the task's."""

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from beit3.data.views.preprocessing import Preprocessing
from beit3.export import export as export_module
from beit3.export import extra
from beit3.export.export import export_task
from beit3.export.modes import TASK_MODES, choose_modes, list_modes, make_mode
from beit3.export.parity import Comparison, compare
from beit3.export.runtime import is_exported
from beit3.model.config import TINY, TINY_RELEASE
from beit3.model.generation import Decoding
from beit3.predict import Predictor, load
from beit3.recipe import TaskConfig
from beit3.task import Task
from beit3.tasks.backbone import Backbone
from beit3.tasks.captioning import Captioning, CaptioningConfig
from beit3.tasks.coco import Coco
from beit3.tasks.imagenet import ImageNet, ImageNetConfig
from beit3.tasks.nlvr2 import NLVR2, NLVR2Config
from beit3.tasks.pretrain import Pretrain, PretrainConfig
from beit3.tasks.retrieval import Retrieval, RetrievalConfig
from beit3.tasks.vqa import VQA, VQAConfig
from beit3.tasks.vqkd import VQKD
from beit3.tokenizer.text import TextTokenizer
from beit3.weights.matching import LoadReport
from beit3.weights.store import save_weights

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

MODEL = replace(
    TINY, dim=32, num_heads=2, depth=1, ffn_dim=48, image_size=24, vocab_size=64, text_positions=66
)
IMAGE = Preprocessing(24)
COMPLETE = LoadReport("test", (), {}, {})
TEXTS = ["how many red cubes are left of the ball", "a blue ball"]


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return TextTokenizer.train(TEXTS, vocab_size=60)


@pytest.fixture(scope="module")
def images() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (30, 41, 3), dtype=np.uint8) for _ in range(3)]


def make_task(name: str, tokenizer: TextTokenizer) -> Task:
    """Builds a tiny task at initial values that are large enough to tell outputs apart."""
    model = MODEL
    tasks = {
        "backbone": lambda: Backbone(TaskConfig(model=model, image=IMAGE), tokenizer=tokenizer),
        "retrieval": lambda: Retrieval(
            RetrievalConfig(model=model, image=IMAGE, text_length=16), tokenizer=tokenizer
        ),
        "vqa": lambda: VQA(
            VQAConfig(model=model, image=IMAGE, num_answers=3, answers=("yes", "no", "two")),
            tokenizer=tokenizer,
        ),
        "nlvr2": lambda: NLVR2(NLVR2Config(model=model, image=IMAGE), tokenizer=tokenizer),
        "captioning": lambda: Captioning(
            CaptioningConfig(model=model, image=IMAGE, text_length=9), tokenizer=tokenizer
        ),
        "pretrain": lambda: Pretrain(PretrainConfig(model=model, image=IMAGE), tokenizer=tokenizer),
        "imagenet": lambda: ImageNet(
            ImageNetConfig(
                model=replace(model, final_norm=True),
                image=IMAGE,
                head="names",
                classes=("cube", "ball"),
                num_classes=2,
            ),
            tokenizer=tokenizer,
        ),
        "imagenet linear": lambda: ImageNet(
            ImageNetConfig(
                model=replace(model, final_norm=False), image=IMAGE, head="linear", num_classes=5
            )
        ),
        "coco": lambda: Coco(replace(Coco.recipes["demo"].task, num_classes=3)),
    }
    task = tasks[name]()
    task.init_weights(0)
    with torch.no_grad():
        for _, parameter in task.named_parameters():
            if parameter.ndim > 1 and name != "coco":
                parameter.mul_(4)
    return task.eval()


class Exported:
    """Exports each task once and keeps it for all tests of the file."""

    def __init__(self, directory: Path, tokenizer: TextTokenizer):
        self.directory, self.tokenizer = directory, tokenizer
        self.tasks: dict[str, Task] = {}

    def get(self, name: str, **options: object) -> tuple[Predictor, Path]:
        """Returns a predictor of the network itself and the directory of its export."""
        out = self.directory / f"{name} {options}".replace("/", "")
        if name not in self.tasks:
            self.tasks[name] = make_task(name, self.tokenizer)
        if not out.exists():
            export_task(self.tasks[name], out, fingerprint={"weights": name}, **options)
        return Predictor(self.tasks[name], COMPLETE), out


@pytest.fixture(scope="module")
def exported(tmp_path_factory, tokenizer) -> Exported:
    return Exported(tmp_path_factory.mktemp("exports"), tokenizer)


def assert_close(left: object, right: object, tolerance: float = 1e-4) -> None:
    """Compares nested lists and dicts: texts and ids are equal, numbers close."""
    if isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left:
            assert_close(left[key], right[key], tolerance)
    elif isinstance(left, list):
        assert len(left) == len(right)
        for pair in zip(left, right, strict=True):
            assert_close(*pair, tolerance)
    elif isinstance(left, float):
        assert abs(left - right) <= tolerance * max(1, abs(left))
    else:
        assert left == right


# Equal predictions ------------------------------------------------------------------------------


def get_inputs(name: str, images: list[np.ndarray]) -> tuple:
    """Returns raw inputs of one record."""
    inputs = {"vqa": (images[0], TEXTS[0]), "nlvr2": (images[0], images[1], TEXTS[1])}
    inputs |= {"backbone": (images[0], TEXTS[0]), "retrieval": (images[0], TEXTS[0])}
    return inputs.get(name, (images[0],))


@pytest.mark.parametrize(
    "name",
    [
        "vqa",
        "captioning",
        "retrieval",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("backbone", "nlvr2", "imagenet", "imagenet linear", "coco")
        ),
    ],
)
def test_an_export_predicts_what_the_network_predicts(name, exported, images):
    predictor, out = exported.get(name)
    loaded = load(out)
    inputs = get_inputs(name, images)
    assert_close(predictor(*inputs), loaded(*inputs))


@pytest.mark.parametrize(
    "decoding", [Decoding("greedy"), Decoding(num_beams=2), Decoding("sample")]
)
def test_captions_are_the_same_by_every_decoding(decoding, exported, images):
    predictor, out = exported.get("captioning")
    loaded = load(out)
    for task in (predictor.task, loaded.task):
        task.config = replace(task.config, decoding=decoding)
    for image in images:
        assert_close(predictor(image), loaded(image))


def test_a_graph_stands_for_its_directory(exported, images):
    predictor, out = exported.get("vqa")
    assert is_exported(out) and is_exported(out / "pair.onnx")
    loaded = load(out / "pair.onnx")
    assert_close(predictor(images[1], TEXTS[1]), loaded(images[1], TEXTS[1]))


def test_a_directory_may_be_called_like_a_graph(exported, images, tmp_path):
    predictor, out = exported.get("vqa")
    shutil.copytree(out, tmp_path / "vqa.onnx")
    loaded = load(tmp_path / "vqa.onnx")
    assert_close(predictor(images[1], TEXTS[1]), loaded(images[1], TEXTS[1]))


def test_an_export_cannot_be_saved_as_weights(exported, tmp_path):
    with pytest.raises(ValueError, match=r"\(export\) holds no weights"):
        load(exported.get("vqa")[1]).save_pretrained(tmp_path / "weights")
    assert not list(tmp_path.iterdir())


def test_values_that_are_no_numbers_are_never_close(tokenizer):
    """Wherever they are: Python's max([0.0, nan]) is 0.0."""
    mode = make_mode(make_task("captioning", tokenizer), "step")
    zeros = [torch.zeros(2, 3) for _ in mode.output_names]
    for broken in range(len(zeros)):
        outputs = list(zeros)
        outputs[broken] = torch.tensor([[0.0, 0.0, float("nan")], [0.0, 0.0, 0.0]])
        for program in ("onnxruntime", "onnxruntime int8"):
            for values, expected in ((outputs, zeros), (zeros, outputs), (outputs, outputs)):
                run = partial(lambda values, inputs: values, values)
                assert not compare(mode, program, run, {}, expected).is_close


def test_embedding_and_scores_of_an_export(exported, images):
    predictor, out = exported.get("retrieval")
    loaded = load(out)
    texts = [*TEXTS, "two red balls are left"]
    features, loaded_features = (p.embed(images, texts) for p in (predictor, loaded))
    for name in ("image", "text"):
        assert np.abs(features[name] - loaded_features[name]).max() < 1e-5
    batch = loaded.task.collate(
        [
            loaded.task.example({"id": str(index), "image": image, "text": text}, False)
            for index, (image, text) in enumerate(zip(images, texts, strict=True))
        ]
    )
    records = [{"id": str(index), "image": str(index)} for index in range(3)]
    scores = [p.task.score(p.task.predict(batch), records) for p in (predictor, loaded)]
    assert scores[0] == scores[1]


@pytest.mark.slow
def test_pretraining_heads_and_captions_of_a_given_text(exported, tokenizer):
    predictor, out = exported.get("pretrain")
    loaded = load(out)
    batch = {
        "image": torch.randint(0, 256, (2, 3, 24, 24), dtype=torch.uint8),
        "text": torch.randint(4, 60, (2, 6)),
        "text_padding": torch.tensor([[False] * 6, [False] * 4 + [True] * 2]),
    }
    for names in (("image",), ("text", "text_padding"), tuple(batch)):
        part = {name: batch[name] for name in names}
        with torch.no_grad():
            outputs, loaded_outputs = predictor.task.outputs(part), loaded.task.outputs(part)
        assert outputs.keys() == loaded_outputs.keys()
        for name, value in outputs.items():
            assert (value - loaded_outputs[name]).abs().max() < 1e-4
    with pytest.raises(ValueError, match="image_mask"):
        loaded.task.outputs({**batch, "image_mask": torch.ones(2, 9, dtype=torch.bool)})
    predictor, out = exported.get("captioning", modes=("pair",))
    with torch.no_grad():
        expected = predictor.task.outputs(batch)["logits"]
    assert (load(out).task.outputs(batch)["logits"] - expected).abs().max() < 1e-4


@pytest.mark.slow
def test_the_matching_head_of_retrieval(tmp_path, tokenizer):
    task = make_task("retrieval", tokenizer)
    assert "match" not in list_modes(task)
    task = type(task)(replace(task.config, matching=True), tokenizer=tokenizer)
    task.init_weights(seed=0)
    task.eval()
    export_task(task, tmp_path / "out", modes=("match",))
    batch = {"image": torch.rand(2, 3, 24, 24), "text": torch.randint(4, 60, (2, 5))}
    batch["text_padding"] = torch.zeros(2, 5, dtype=torch.bool)
    with torch.no_grad():
        expected = task.match(batch)
        assert (load(tmp_path / "out").task.match(batch) - expected).abs().max() < 1e-4
    assert expected.std() > 0


# What is written --------------------------------------------------------------------------------


def test_the_axes_have_names_and_any_size(exported):
    _, out = exported.get("vqa")
    graph = onnx.load(out / "pair.onnx").graph
    axes = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    }
    patch = MODEL.patch_size
    assert axes["image"] == ["batch", 3, f"{patch}*rows", f"{patch}*columns"]
    assert axes["text"] == axes["text_padding"] == ["batch", "length"]
    assert axes["logits"] == ["batch", 3]
    description = json.loads((out / "export.json").read_text())
    assert description["graphs"]["pair"]["inputs"]["image"]["axes"] == axes["image"]
    assert description["graphs"]["pair"]["largest"] == {"length": 64}


def test_a_report_of_several_sizes_stands_beside_the_graphs(exported):
    _, out = exported.get("vqa")
    report = json.loads((out / "parity.json").read_text())
    for program in ("torch.export", "onnxruntime"):
        rows = [row for row in report["comparisons"] if row["program"] == program]
        for name, axis in (("image", 0), ("image", 2), ("image", 3), ("text", 1)):
            assert len({row["inputs"][name][axis] for row in rows}) >= 2
        assert all(row["error"] <= 1e-4 and row["cosine"] > 0.9999 for row in rows)
    assert report["largest_error"] == max(row["error"] for row in report["comparisons"])
    assert "| pair | onnxruntime | image 1x3x24x24" in (out / "parity.md").read_text()
    assert sorted(file.name for file in out.iterdir()) == [
        "config.json",
        "export.json",
        "pair.onnx",
        "parity.json",
        "parity.md",
        "text.model",
    ]


@pytest.mark.slow
def test_programs_of_torch_export_and_a_fixed_size(tmp_path, tokenizer):
    task = make_task("retrieval", tokenizer)
    export_task(task, tmp_path / "out", modes=("image",), programs=True, fixed_size=True)
    program = torch.export.load(tmp_path / "out" / "image.pt2").module()
    image = torch.rand(5, 3, 24, 24)
    with torch.no_grad():
        expected = task.outputs({"image": image})["image_features"]
        assert torch.allclose(program(image)[0], expected, atol=1e-6)
    loaded = load(tmp_path / "out").task
    assert torch.allclose(loaded.outputs({"image": image})["image_features"], expected, atol=1e-5)
    with pytest.raises(ValueError, match=r"image\.onnx does not take inputs .*\[1, 3, 32, 24\]"):
        loaded.outputs({"image": torch.rand(1, 3, 32, 24)})
    with pytest.raises(ValueError, match="this needs text: export the weights with --mode text"):
        loaded.outputs({"text": torch.ones(1, 3, dtype=torch.int64)})


def test_int8_computes_in_integers_and_is_close(exported, images):
    predictor, out = exported.get("retrieval", modes=("image",), int8=True)
    operators = [node.op_type for node in onnx.load(out / "image.onnx").graph.node]
    # Of the block: qkv, out, fc1, fc2; then the projection.
    assert operators.count("MatMulInteger") == 5
    programs = {
        row["program"] for row in json.loads((out / "parity.json").read_text())["comparisons"]
    }
    assert programs == {"torch.export", "onnxruntime", "onnxruntime int8"}
    features, quantized = (p.embed(images)["image"] for p in (predictor, load(out)))
    assert (features * quantized).sum(1).min() > 0.98


@pytest.mark.slow
def test_large_weights_go_into_a_file_beside_the_graph(tmp_path, tokenizer, monkeypatch, images):
    monkeypatch.setattr("beit3.export.graphs.MAX_EMBEDDED_BYTES", 1000)
    task = make_task("retrieval", tokenizer)
    for int8 in (False, True):
        out = tmp_path / f"out{int8}"
        export_task(task, out, modes=("image",), int8=int8)
        assert (out / "image.onnx.data").stat().st_size > 10_000
        features = load(out).embed(images)["image"]
        expected = Predictor(task, COMPLETE).embed(images)["image"]
        assert (features * expected).sum(1).min() > 0.98
    with (tmp_path / "outFalse" / "image.onnx.data").open("ab") as file:
        file.write(b"0")
    with pytest.raises(ValueError, match="copy the export again"):
        load(tmp_path / "outFalse")


def test_an_export_keeps_the_fingerprint_of_its_weights(exported):
    assert load(exported.get("vqa")[1]).task.stored_fingerprint == {"weights": "vqa"}


# Refused ----------------------------------------------------------------------------------------


def test_a_graph_that_is_not_dynamic_is_refused_and_nothing_is_left(tmp_path, tokenizer):
    task = make_task("retrieval", tokenizer)
    outputs = task.outputs

    def fix_batch(batch):
        features = outputs(batch)["image_features"]
        return {"image_features": features.view(int(features.shape[0]), -1)}

    task.outputs = fix_batch
    with pytest.raises(ValueError, match="image cannot be exported for any size.*batch"):
        export_task(task, tmp_path / "out", modes=("image",))
    assert not list(tmp_path.iterdir())


def test_a_graph_that_differs_is_refused_and_an_older_export_stays(tmp_path, tokenizer, exported):
    task = make_task("retrieval", tokenizer)
    shutil.copytree(exported.get("retrieval")[1], tmp_path / "out")
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    outputs = task.outputs

    def differ(batch):
        shift = 1e-3 if torch.compiler.is_compiling() else 0.0
        return {name: value + shift for name, value in outputs(batch).items()}

    task.outputs = differ
    with pytest.raises(ValueError, match="differs from the network by .*nothing was written"):
        export_task(task, tmp_path / "out", modes=("image",))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before


def test_small_outputs_that_differ_are_refused_by_their_cosine(tmp_path, tokenizer):
    """Values around 1e-6 are within the limit on the error, whatever they are."""
    task = make_task("retrieval", tokenizer)
    outputs = task.outputs

    def shrink(batch):
        shift = 1.0 if torch.compiler.is_compiling() else 0.0
        return {name: 1e-6 * (value + shift) for name, value in outputs(batch).items()}

    task.outputs = shrink
    with pytest.raises(ValueError, match=r"differs .* beyond error 0.0001 and cosine 0.99999"):
        export_task(task, tmp_path / "out", modes=("image",))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("program", "error", "cosine", "is_close"),
    [
        ("onnxruntime", 1e-4, 0.99999, True),
        ("onnxruntime", 1e-4, 0.9999, False),
        ("onnxruntime", 2e-4, 1.0, False),
        ("torch.export", 0.0, float("nan"), False),
        ("onnxruntime int8", 0.1, 0.98, True),
        ("onnxruntime int8", 0.0, 0.97, False),
    ],
)
def test_float32_has_limits_on_error_and_cosine_and_int8_on_the_cosine(
    program, error, cosine, is_close
):
    assert Comparison("image", program, {}, error, cosine).is_close == is_close


def test_the_published_table_has_every_task_within_the_limits():
    """benchmarks/export.py measures it."""
    path = Path(__file__).parents[2] / "benchmarks" / "export.json"
    rows = json.loads(path.read_text())["figures"]["parity"]
    modes = {(row["task"], row["mode"]) for row in rows}
    tasks_and_modes = {(task, mode) for task, modes in TASK_MODES.items() for mode in modes}
    assert modes == {*tasks_and_modes, ("retrieval", "match")}
    for row in rows:
        assert Comparison(row["mode"], row["program"], {}, row["error"], row["cosine"]).is_close


def test_unknown_modes_and_tasks_without_modes_are_refused(tokenizer):
    task = make_task("vqa", tokenizer)
    with pytest.raises(ValueError, match="vqa has no mode 'image': give pair"):
        choose_modes(task, ["image"])
    with pytest.raises(ValueError, match="vqkd has no mode to export"):
        choose_modes(VQKD(VQKD.recipes["demo"].task))
    captioning = make_task("captioning", tokenizer)
    assert choose_modes(captioning) == ("start", "step")
    assert choose_modes(captioning, ["pair", "pair"]) == ("pair",)


def test_weights_without_a_part_are_refused(tmp_path, tokenizer):
    task = make_task("retrieval", tokenizer)
    image_only = LoadReport(
        "image.pth", (), {}, {"backbone.text_embedding.tokens.weight": "the image side alone"}
    )
    with pytest.raises(ValueError, match="holds the image side alone.*text.*give --mode image"):
        export_task(task, tmp_path / "out", report=image_only)
    untrained = LoadReport("base.pth", (), {}, {"image_projection.weight": "no head"})
    with pytest.raises(ValueError, match="lacks image_projection.weight"):
        export_task(task, tmp_path / "out", report=untrained)
    assert not list(tmp_path.iterdir())


def test_a_missing_extra_is_one_line(tmp_path, tokenizer, monkeypatch):
    def fail(name):
        raise ImportError(name)

    task = make_task("retrieval", tokenizer)
    monkeypatch.setattr(extra.importlib, "import_module", fail)
    with pytest.raises(ValueError, match=r"need onnx: pip install 'beit3\[export\]'"):
        export_task(task, tmp_path / "out")


def test_a_directory_of_something_else_is_left_alone(tmp_path, tokenizer):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="exists and holds no export"):
        export_task(make_task("retrieval", tokenizer), tmp_path)
    with pytest.raises(ValueError, match="is a file"):
        export_task(make_task("retrieval", tokenizer), tmp_path / "notes.txt")
    (tmp_path / "export.json").write_text("{}")  # an older export, and a file of the user's in it
    with pytest.raises(ValueError, match=r"holds notes\.txt, which is no part of an export"):
        export_task(make_task("retrieval", tokenizer), tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_damaged_exports_are_refused_in_one_line(exported, tmp_path, images):
    source = exported.get("vqa")[1]

    def copy(name: str) -> Path:
        return Path(shutil.copytree(source, tmp_path / name))

    out = copy("missing")
    (out / "pair.onnx").unlink()
    with pytest.raises(ValueError, match=r"pair\.onnx is missing"):
        load(out)
    out = copy("cut")
    (out / "pair.onnx").write_bytes((source / "pair.onnx").read_bytes()[:5000])
    with pytest.raises(ValueError, match="has 5000 bytes"):
        load(out)
    out = copy("garbage")
    (out / "pair.onnx").write_bytes(bytes((source / "pair.onnx").stat().st_size))
    with pytest.raises(ValueError, match="cannot be read by onnxruntime"):
        load(out)(images[0], TEXTS[0])
    out = copy("format")
    (out / "export.json").write_text('{"format": 9}')
    with pytest.raises(ValueError, match="is of format 9, not 1"):
        load(out)
    out = copy("field")
    (out / "export.json").write_text('{"format": 1, "graphs": {}}')
    with pytest.raises(ValueError, match="lacks a field"):
        load(out)
    out = copy("outside")
    text = (out / "export.json").read_text()
    (out / "export.json").write_text(text.replace('"pair.onnx"', '"../pair.onnx"'))
    with pytest.raises(ValueError, match="no file beside it"):
        load(out)
    out = copy("tokenizer")
    (out / "text.model").unlink()
    with pytest.raises(ValueError, match="is not the tokenizer"):
        load(out)
    shutil.copy(source / "pair.onnx", tmp_path / "alone.onnx")
    with pytest.raises(ValueError, match="no export.json beside it"):
        load(tmp_path / "alone.onnx")
    with pytest.raises(ValueError):
        load(tmp_path / "absent.onnx")
    with pytest.raises(ValueError, match="device nonsense cannot be used"):
        load(source, device="nonsense")
    for option in ({"task": "vqa"}, {"int8": True}, {"answers": ["yes"]}):
        with pytest.raises(ValueError, match=f"leave {next(iter(option))} out"):
            load(source, **option)


@pytest.mark.slow
def test_the_trunk_of_ade20k_makes_no_predictions(tmp_path, images):
    from beit3.tasks.ade20k import Ade20k

    pytest.importorskip("transformers")
    task = Ade20k(Ade20k.recipes["demo"].task)
    task.init_weights(0)
    export_task(task, tmp_path / "out")
    loaded = load(tmp_path / "out")
    pixels = torch.rand(2, 3, 64, 48)
    with torch.no_grad():
        assert torch.allclose(loaded.task.backbone(pixels), task.eval().backbone(pixels), atol=1e-3)
    with pytest.raises(ValueError, match="a trunk without its head"):
        loaded(images[0])


# Command line -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_exports_and_predicts(tmp_path, tokenizer, images, run_cli):
    from PIL import Image

    save_weights(make_task("vqa", tokenizer), tmp_path / "weights")
    Image.fromarray(images[0]).save(tmp_path / "image.png")
    output = run_cli("export", tmp_path / "weights", "--out", tmp_path / "out")
    assert "pair as onnxruntime: largest error" in output
    question = [tmp_path / "image.png", TEXTS[0]]
    answers, expected = (
        json.loads(run_cli("predict", tmp_path / name, *question)) for name in ("out", "weights")
    )
    assert_close(expected, answers)


def test_the_command_refuses_in_one_line(tmp_path, tokenizer, exported, run_failing_cli):
    line = run_failing_cli("export", exported.get("vqa")[1], "--out", tmp_path / "again")
    assert "is an export already" in line
    save_weights(make_task("vqa", tokenizer), tmp_path / "weights")
    line = run_failing_cli(
        "export", tmp_path / "weights", "--out", tmp_path / "new", "--mode", "step"
    )
    assert "vqa has no mode 'step'" in line and not (tmp_path / "new").exists()


@pytest.mark.slow
def test_released_weights_export_too(tmp_path, tokenizer):
    model = replace(
        TINY_RELEASE,
        dim=64,
        num_heads=1,
        depth=1,
        ffn_dim=48,
        image_size=32,
        vocab_size=64,
        text_positions=66,
    )
    task = VQA(VQAConfig(model=model, image=Preprocessing(32), num_answers=3), tokenizer=tokenizer)
    task.init_weights(0)
    written = export_task(task, tmp_path / "out")
    assert max(row.error for row in written.comparisons) < 1e-4
    assert export_module.EXPORT_FILE in written.files
