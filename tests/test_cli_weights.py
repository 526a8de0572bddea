"""`convert`, `recipes --released`, and weights of another network to start from: what a person
types and reads."""

import json
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from zipfile import ZipFile

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from beit3.cli import main
from beit3.data.views.preprocessing import Preprocessing
from beit3.metrics import caption_java
from beit3.model.config import TINY, TINY_RELEASE
from beit3.recipe import TaskConfig
from beit3.tasks.backbone import Backbone
from beit3.tasks.captioning import Captioning, CaptioningConfig
from beit3.tasks.pretrain import Pretrain, PretrainConfig
from beit3.tasks.retrieval import Retrieval, RetrievalConfig
from beit3.tokenizer.text import TextTokenizer
from beit3.weights.loading import load_weights
from beit3.weights.release_format import to_released_state
from beit3.weights.store import read_config, save_weights
from tests.golden import find_fixture
from tests.tokenizer.test_teacher_vit import hugging_face_state, openai_state


def make_backbone(**changes) -> Backbone:
    task = Backbone(TaskConfig(model=replace(TINY, **changes)))
    task.init_weights(0)
    return task


def make_released_backbone() -> Backbone:
    task = Backbone(TaskConfig(model=TINY_RELEASE))
    task.init_weights(0)
    return task


def test_a_file_becomes_a_directory_and_a_file_again(tmp_path, run_cli, root):
    state = {
        name: tensor.half() for name, tensor in to_released_state(make_released_backbone()).items()
    }
    torch.save({"model": state}, tmp_path / "given.pth")
    ours = tmp_path / "ours"
    output = run_cli(
        "convert",
        "official",
        tmp_path / "given.pth",
        "--out",
        ours,
        "--num-heads",
        4,
        "--text-model",
        root / "text.model",
    )
    assert (
        output.startswith("139 tensors loaded from a released backbone file\n")
        and f"backbone at {ours}\n" in output
    )
    assert load_weights(ours).has_tokenizer and read_config(ours).config.model == TINY_RELEASE
    assert "171 tensors" in run_cli("convert", "official", ours, "--out", tmp_path / "back.pth")
    back = torch.load(tmp_path / "back.pth", weights_only=True)["model"]
    assert back.keys() == state.keys()
    assert all(
        back[name].dtype == tensor.dtype and torch.equal(back[name], tensor)
        for name, tensor in state.items()
    )


def test_answers_task_tokenizers_and_teachers(tmp_path, run_cli, run_failing_cli):
    names = tmp_path / "answers.txt"
    names.write_text("".join(f"answer {number}\n" for number in range(37)))
    file = find_fixture("vqa") / "model.safetensors"
    run_cli(
        "convert", "official", file, "--out", tmp_path / "vqa", "--num-heads", 4, "--answers", names
    )
    assert read_config(tmp_path / "vqa").config.answers[36] == "answer 36"
    output = run_cli(
        "convert", "official", file, "--out", tmp_path / "b", "--num-heads", 4, "--task", "backbone"
    )
    assert "ignored (head of vqa: no part of backbone): " in output
    assert "37 outputs" in run_failing_cli(
        "convert",
        "official",
        file,
        "--out",
        tmp_path / "c",
        "--task",
        "vqa",
        "--answers",
        write_short_list(names),
    )
    codes = find_fixture("vqkd") / "model.safetensors"
    assert f"vqkd at {tmp_path / 'codes'}" in run_cli(
        "convert", "vqkd", codes, "--out", tmp_path / "codes", "--num-heads", 4
    )
    output = run_failing_cli(
        "convert", "official", codes, "--out", tmp_path / "d", "--num-heads", 4
    )
    assert "would be lost (only its training used it)" in output and "give --task vqkd" in output
    save_file(hugging_face_state(openai_state()), tmp_path / "clip.safetensors")
    assert "--task.teacher_weights" in run_cli(
        "convert", "clip", tmp_path / "clip.safetensors", "--out", tmp_path / "clip"
    )
    assert not [name for name in "cd" if (tmp_path / name).exists()]


def write_short_list(names: Path) -> Path:
    (names.parent / "short.txt").write_text("yes\nno\n")
    return names.parent / "short.txt"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["clip", "x.pth", "--num-heads", "3"],
            "unknown option: --num-heads; see beit3 convert clip --help",
        ),
        (
            ["vqkd", "x.pth", "--text-model", "a.spm"],
            "unknown option: --text-model; see beit3 convert vqkd --help",
        ),
        (["official", ".", "--task", "vqa"], "--task is not for directories"),
        (["official", "."], ". holds neither weights nor a run's best or last"),
        (
            ["official", "beit3_base_itc_patch16_224.pth"],
            "that is the release's base network for retrieval (224 px",
        ),
        (
            ["vqkd", "vqkd_encoder_base_decoder_3x768x12_clip-d5036aa7.pth"],
            "get it with beit3 download vqkd_",
        ),
        (["clip", "ViT-B-16.pt"], "no teacher weights at ViT-B-16.pt"),
        (["dino", "x.pth"], 'unknown command "dino"'),
    ],
)
def test_conversions_that_mean_nothing(arguments, message, run_failing_cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in run_failing_cli("convert", *arguments, "--out", "out.pth")
    assert not list(tmp_path.iterdir())


def test_convert_explains_itself(capsys):
    assert main(["convert", "official", "--help"]) == 0
    assert "released" in " ".join(capsys.readouterr().out.split())


def test_released_files_are_listed(run_cli, run_failing_cli):
    output = run_cli("recipes", "--released")
    assert (
        "beit3_large_indomain_patch16_768_vgqaaug_vqa.pth" in output
        and "vqkd_encoder_base_decoder_3x768x12_clip" in output
    )
    listing = run_cli("recipes", "vqa", "--released")
    assert "beit3_base_patch16_480_vqa.pth" in listing and "nlvr2" not in listing
    assert "no file was released for vqkdd; did you mean vqkd?" in run_failing_cli(
        "recipes", "vqkdd", "--released"
    )


# Every task of a released file --------------------------------------------------------------------

RELEASED_FORM = (
    "--task.model.shared_attention False --task.model.shared_norms False "
    "--task.model.sub_ln True --task.model.fusion_layers 0"
)
INPUTS = {
    "vqa": ("what color ?",),
    "nlvr2": ("{image_path}", "there is a circle"),
    "retrieval": ("a circle",),
}


@pytest.mark.parametrize("kind", ["vqa", "nlvr2", "captioning", "retrieval", "imagenet"])
def test_a_released_file_is_tuned_written_back_and_asked(kind, root, tmp_path, run_cli):
    """From a pretrained file to a file of the task, which is known by its content, scored and
    asked."""
    task = Pretrain(PretrainConfig(model=TINY_RELEASE, image=Preprocessing(32), num_codes=9))
    task.init_weights(0)
    torch.save(
        {"model": {name: tensor.half() for name, tensor in to_released_state(task).items()}},
        tmp_path / "pretrained.zip",
    )
    flags = [
        *RELEASED_FORM.split(),
        "--run.steps",
        1,
        "--run.eval_records",
        4,
        "--run.device",
        "cpu",
        "--data.root",
        root,
    ]
    if kind == "captioning":
        flags += ["--task.text_length", 6]
    run_cli(
        "train",
        kind,
        "demo",
        "--init",
        tmp_path / "pretrained.zip",
        "--out",
        tmp_path / "run",
        "--data.batch.main",
        4,
        *flags,
    )
    assert "tensors of" in run_cli(
        "convert", "official", tmp_path / "run", "--out", tmp_path / "tuned.pth"
    )
    lists = {
        "vqa": ("--answers", root / "vqa/main/answer2label.txt"),
        "imagenet": ("--classes", root / "imagenet/main/classes.txt"),
    }
    names = lists.get(kind, ())
    arguments = [
        tmp_path / "tuned.pth",
        "--num-heads",
        4,
        "--text-model",
        root / "text.model",
        *names,
    ]
    assert json.loads(
        run_cli("eval", *arguments, "--data.root", write_few_records(root, kind, tmp_path))
    )
    Image.new("RGB", (40, 30), "red").save(tmp_path / "a.png")
    inputs = [word.format(image_path=tmp_path / "a.png") for word in INPUTS.get(kind, ())]
    from_file = json.loads(
        run_cli("predict", arguments[0], tmp_path / "a.png", *inputs, *arguments[1:])
    )
    assert (
        from_file[0].keys()
        == json.loads(run_cli("predict", tmp_path / "run", tmp_path / "a.png", *inputs))[0].keys()
    )


def write_few_records(root: Path, kind: str, folder: Path) -> Path:
    """A root with the first records of a split."""
    directory = folder / "few" / kind / "main"
    directory.mkdir(parents=True)
    records = []
    for line in (root / kind / "main/val.jsonl").read_text().splitlines()[:2]:
        record = json.loads(line)
        records.append(
            record
            | {
                key: str((root / record[key]).resolve())
                for key in ("image", "image2")
                if key in record
            }
        )
    (directory / "val.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder / "few"


# Zero-shot ----------------------------------------------------------------------------------------


@pytest.fixture
def dual(root, tmp_path) -> Path:
    """Retrieval weights that know the records' tokenizer."""
    tokenizer = TextTokenizer(root / "text.model")
    model = replace(TINY, dim=32, depth=1, num_heads=2, ffn_dim=48, vocab_size=tokenizer.vocab_size)
    task = Retrieval(
        RetrievalConfig(model=model, image=Preprocessing(32), text_length=20), tokenizer=tokenizer
    )
    task.init_weights(0)
    save_weights(task, tmp_path / "dual")
    return tmp_path / "dual"


def test_retrieval_weights_are_scored_on_classes(dual, root, run_cli, tmp_path):
    """Without names those of the records are taken; other names of the same number give other
    predictions."""
    scores = json.loads(run_cli("eval", dual, "--task", "imagenet", "--data.root", root))
    assert {"accuracy", "top5"} <= scores.keys() and 0 <= scores["accuracy"] <= scores["top5"] <= 1
    names = root / "imagenet/main/classes.txt"
    assert (
        json.loads(
            run_cli("eval", dual, "--task", "imagenet", "--data.root", root, "--classes", names)
        )
        == scores
    )
    files = [tmp_path / f"{number}.jsonl" for number in range(2)]
    run_cli("eval", dual, "--task", "imagenet", "--data.root", root, "--predictions", files[0])
    run_cli(
        "eval",
        dual,
        "--task",
        "imagenet",
        "--data.root",
        root,
        "--prompt",
        "there is a {}",
        "--predictions",
        files[1],
    )
    assert files[0].read_text() != files[1].read_text()


def test_a_picture_by_names(dual, root, run_cli, run_failing_cli, tmp_path):
    image_path = tmp_path / "a.png"
    Image.new("RGB", (40, 30), "red").save(image_path)
    (tmp_path / "names.txt").write_text("a red circle\na blue square\n")
    output = json.loads(
        run_cli(
            "predict",
            dual,
            image_path,
            "--task",
            "imagenet",
            "--classes",
            tmp_path / "names.txt",
            "--prompt",
            "{} there",
        )
    )
    assert {prediction["name"] for prediction in output} == {"a red circle", "a blue square"}
    assert sum(prediction["score"] for prediction in output) == pytest.approx(1)
    assert "needs the class names: give classes=FILE" in run_failing_cli(
        "predict", dual, image_path, "--task", "imagenet"
    )
    assert "prompt 'a photo' has no {}" in run_failing_cli(
        "predict", dual, image_path, "--task", "imagenet", "--prompt", "a photo"
    )
    assert "the head of vqa is untrained" in run_failing_cli(
        "predict", dual, image_path, "how many ?", "--task", "vqa"
    )
    assert "the head of captioning is untrained" in run_failing_cli(
        "eval", dual, "--task", "captioning", "--data.root", root
    )


def test_class_names_travel_in_a_directory(tmp_path, run_cli, run_failing_cli):
    names = tmp_path / "names.txt"
    names.write_text("".join(f"class {number}\n" for number in range(11)))
    file = find_fixture("imageclassification") / "model.safetensors"
    run_cli(
        "convert", "official", file, "--out", tmp_path / "w", "--num-heads", 4, "--classes", names
    )
    config = read_config(tmp_path / "w").config
    assert config.classes[10] == "class 10" and config.image.resize == "crop"
    Image.new("RGB", (40, 30), "red").save(tmp_path / "a.png")
    output = json.loads(run_cli("predict", tmp_path / "w", tmp_path / "a.png"))
    assert len(output) == 5 and output[0]["name"] == f"class {output[0]['label']}"
    assert "11 outputs" in run_failing_cli(
        "convert",
        "official",
        file,
        "--out",
        tmp_path / "b",
        "--num-heads",
        4,
        "--classes",
        write_short_list(names),
    )
    assert "--classes is not for directories" in run_failing_cli(
        "convert", "official", tmp_path / "w", "--out", "a.pth", "--classes", names
    )


def test_preprocessing_that_differs_is_said_at_the_start(dual, root, run_cli, tmp_path, capsys):
    """A network that knows other pictures than the recipe gives it trains, and the line says so."""
    config = read_config(dual).config.model
    names = ("dim", "depth", "num_heads", "ffn_dim", "vocab_size")
    flags = [part for name in names for part in (f"--task.model.{name}", getattr(config, name))]
    flags += [
        "--data.root",
        root,
        "--run.steps",
        1,
        "--data.batch.main",
        4,
        "--run.eval_records",
        4,
        "--run.device",
        "cpu",
    ]
    assert (
        main(
            [
                str(argument)
                for argument in [
                    "train",
                    "imagenet",
                    "demo_names",
                    "--out",
                    tmp_path / "same",
                    "--init",
                    dual,
                    *flags,
                ]
            ]
        )
        == 0
    )
    assert "prepared in another way" not in "".join(capsys.readouterr())
    other = [*flags, "--task.image.mean", 0.4, 0.4, 0.4]
    assert (
        main(
            [
                str(argument)
                for argument in [
                    "train",
                    "imagenet",
                    "demo_names",
                    "--out",
                    tmp_path / "other",
                    "--init",
                    dual,
                    *other,
                ]
            ]
        )
        == 0
    )
    output = "".join(capsys.readouterr())
    assert (
        output.count(
            "images are prepared differently than for these weights' training: mean is (0.5, 0.5, "
            "0.5), here (0.4, 0.4, 0.4)"
        )
        == 1
    )


# Captions -----------------------------------------------------------------------------------------


@pytest.fixture
def captioner(root, tmp_path) -> Path:
    """Captioning weights, beams by default."""
    tokenizer = TextTokenizer(root / "text.model")
    model = replace(TINY, dim=32, depth=1, num_heads=2, ffn_dim=48, vocab_size=tokenizer.vocab_size)
    task = Captioning(
        CaptioningConfig(model=model, image=Preprocessing(32), text_length=6), tokenizer=tokenizer
    )
    task.init_weights(0)
    save_weights(task, tmp_path / "captioner")
    return tmp_path / "captioner"


def test_how_captions_are_written_is_said_to_weights_that_exist(
    captioner, root, run_cli, run_failing_cli, tmp_path
):
    Image.new("RGB", (40, 30), "red").save(tmp_path / "a.png")
    ask = ("predict", captioner, tmp_path / "a.png")
    beams, greedy = (
        json.loads(run_cli(*ask, *flags))[0] for flags in ((), ("--task.decoding.method", "greedy"))
    )
    task = load_weights(captioner)
    task.config = replace(task.config, decoding=replace(task.config.decoding, method="greedy"))
    batch = task.collate([task.example(task.record(str(tmp_path / "a.png")), False)])
    (expected,) = task.predict(batch)
    assert greedy["caption"] == expected["caption"] and greedy["score"] == pytest.approx(
        expected["score"], abs=1e-4
    )
    assert greedy["score"] < beams["score"] < 0, "the sum of log-probabilities, and beams' mean"
    assert "cider" in run_cli(
        "eval",
        captioner,
        "--data.root",
        write_few_records(root, "captioning", tmp_path),
        "--task.decoding.num_beams",
        1,
    )
    assert "--task.model.depth 2: the network of existing weights cannot change" in run_failing_cli(
        *ask, "--task.model.depth", 2
    )
    assert "--task.decoding.methd" in run_failing_cli(*ask, "--task.decoding.methd", "greedy")
    assert "unknown option --optim.lr" in run_failing_cli(*ask, "--optim.lr", 1)


def test_meteor_and_spice_are_asked_for(
    captioner, dual, root, run_cli, run_failing_cli, tmp_path, monkeypatch
):
    """In place of pycocoevalcap a module with its interface."""

    class Module:
        class Meteor:
            def compute_score(self, truths, results):
                assert truths.keys() == results.keys() and len(truths) == 2
                return 0.25, [0.5, 0.0]

        Spice = Meteor

    records = write_few_records(root, "captioning", tmp_path)
    evaluated = ("eval", captioner, "--data.root", records, "--predictions", tmp_path / "p.jsonl")
    scored = ("score", "captioning", tmp_path / "p.jsonl", "--data.root", records)
    monkeypatch.setattr(caption_java.shutil, "which", lambda name: None)
    for call in (evaluated, scored):
        assert "--java: METEOR and SPICE need Java: put a runtime" in run_failing_cli(
            *call, "--java"
        )
    assert not (tmp_path / "p.jsonl").exists(), "said before anything is predicted"
    monkeypatch.setattr(caption_java.shutil, "which", lambda name: "/usr/bin/java")
    monkeypatch.setattr(caption_java, "find_spec", lambda name: Module)
    monkeypatch.setattr(
        caption_java, "importlib", SimpleNamespace(import_module=lambda name: Module)
    )
    plain = json.loads(run_cli(*evaluated))
    assert "cider" in plain and "meteor" not in plain, "never without being asked for"
    for call in (evaluated, scored):
        assert json.loads(run_cli(*call, "--java")) == plain | {"meteor": 0.25, "spice": 0.25}
    assert "are scores of captions, retrieval writes none" in run_failing_cli(
        "eval", dual, "--data.root", root, "--java"
    )


# Weights of another network to start from ---------------------------------------------------------


def write(kind: str, folder: Path) -> Path:
    """Weights that do not fit the demo's network, each in its own way."""
    directory = folder / kind
    if kind == "resnet":
        torch.save(
            {"conv1.weight": torch.zeros(64, 3, 7, 7), "bn1.weight": torch.zeros(64)}, directory
        )
    elif kind == "clip":
        torch.save(openai_state(), directory)
    elif kind == "torchscript":
        with ZipFile(directory, "w") as archive:
            archive.writestr("script/constants.pkl", b"")
    elif kind == "released":
        torch.save({"model": to_released_state(make_released_backbone())}, directory)
    elif kind.startswith("beit3_"):
        pass
    else:
        save_weights(
            make_backbone(
                **{"wider": {"dim": 256}, "deeper": {"depth": 5}, "heads": {"num_heads": 2}}[kind]
            ),
            directory,
        )
    return directory


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (
            "resnet",
            "not BEiT-3 weights: the keys begin with conv1.weight, bn1.weight; give a released "
            "BEiT-3 file",
        ),
        (
            "clip",
            "these are CLIP's tensors, not BEiT-3's: they can teach a vqkd (beit3 convert clip)",
        ),
        ("torchscript", "is a TorchScript archive"),
        (
            "released",
            "(shared_attention is False, here True; shared_norms is False, here True; sub_ln is "
            "True, here False; ",
        ),
        (
            "wider",
            "another network (dim is 256, here 128): take a recipe of its size, or give "
            "--task.model.dim 256; ",
        ),
        ("deeper", "another network (depth is 5, here 4)"),
        (
            "heads",
            "another network (num_heads is 2, here 4): take a recipe of its size, or give "
            "--task.model.num_heads 2",
        ),
        ("beit3_base_patch16_224.pth", "that is the release's base network for pretrain"),
    ],
)
def test_weights_of_another_network_leave_the_run_unwritten(
    kind, message, root, tmp_path, run_failing_cli
):
    arguments = write(kind, tmp_path)
    before = {
        path: sha256(path.read_bytes()).hexdigest()
        for path in tmp_path.rglob("*")
        if path.is_file()
    }
    output = run_failing_cli(
        "train",
        "vqa",
        "demo",
        "--out",
        tmp_path / "run",
        "--init",
        arguments,
        "--data.root",
        root,
        "--run.steps",
        1,
    )
    assert output.startswith(f"beit3: cannot start from {arguments}: ") and message in output
    assert not (tmp_path / "run").exists()
    assert {
        path: sha256(path.read_bytes()).hexdigest()
        for path in tmp_path.rglob("*")
        if path.is_file()
    } == before


def test_the_remedy_of_another_network_works(root, tmp_path, run_failing_cli, run_cli):
    save_weights(make_backbone(dim=64, num_heads=2, depth=1, ffn_dim=96), tmp_path / "w")
    call = [
        "train",
        "vqa",
        "demo",
        "--out",
        tmp_path / "run",
        "--init",
        tmp_path / "w",
        "--data.root",
        root,
    ]
    call += ["--run.steps", 1, "--data.batch.main", 8, "--run.eval_records", 4]
    flags = run_failing_cli(*call).split("or give ")[1].split(";")[0].split()
    run_cli(*call, *flags)
    assert (
        json.loads((tmp_path / "run" / "recipe.json").read_text())["recipe"]["task"]["model"]["dim"]
        == 64
    )
