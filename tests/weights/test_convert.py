"""Conversion both ways: exported files equal the converted ones, and no file is replaced."""

from dataclasses import replace
from pathlib import Path
from zipfile import ZipFile

import pytest
import torch
from torch import Tensor

from beit3.model.config import TINY
from beit3.recipe import TaskConfig
from beit3.tasks.backbone import Backbone
from beit3.tasks.vqa import VQA
from beit3.tasks.vqkd import VQKD, VQKDConfig
from beit3.tensor_files import TensorFile
from beit3.tokenizer.teacher_loading import load_teacher
from beit3.weights.convert import convert_clip, convert_released, export_released
from beit3.weights.initialization import initialize_from
from beit3.weights.loading import load_frozen, load_released, load_weights
from beit3.weights.release_format import to_released_state
from beit3.weights.store import read_config, read_tensors, save_weights
from tests.golden import find_fixture, load_config, load_tensors
from tests.tokenizer.test_teacher_vit import GRID, PATCH, hugging_face_state, openai_state, pixels
from tests.weights.states import (
    State,
    add_pretraining_heads,
    assert_equal_tensors,
    load_released_shapes,
    make_backbone,
)


def list_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def make_vqa_state() -> State:
    """Returns the state dict of a released VQA file with three answers."""
    state = {
        key: tensor
        for key, tensor in to_released_state(make_backbone()).items()
        if "encoder.layer_norm." not in key
    }
    return to_released_state(load_released(state, "vqa", answers=("yes", "no", "two"))[0])


MAKE_STATE = {
    "pretrain": lambda: add_pretraining_heads(to_released_state(make_backbone())),
    "vqa": make_vqa_state,
    "backbone": lambda: to_released_state(make_backbone()),
}


def to_mixed_precision(state: State) -> State:
    """Returns the state in half precision but for one table, as a released file may be."""
    half = {name: tensor.half() for name, tensor in state.items()}
    return half | {name: state[name] for name in state if "embed_positions" in name}


PRECISIONS = {
    "half": lambda state: {name: tensor.half() for name, tensor in state.items()},
    "bfloat16": lambda state: {name: tensor.bfloat16() for name, tensor in state.items()},
    "float32": dict,
    "mixed": to_mixed_precision,
}


@pytest.fixture
def write_released_file(tmp_path):
    """Returns a function that writes a state dict as a released file."""

    def write(state: State, name: str = "given.pth") -> Path:
        torch.save({"model": state}, tmp_path / name)
        return tmp_path / name

    return write


# Conversion and export ----------------------------------------------------------------------------


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("task_name", MAKE_STATE)
def test_an_exported_file_equals_the_converted_one(
    tmp_path, write_released_file, task_name, precision
):
    state = PRECISIONS[precision](MAKE_STATE[task_name]())
    lines = convert_released(write_released_file(state), tmp_path / "ours")
    assert lines == [
        f"{len(read_tensors(tmp_path / 'ours'))} tensors loaded from a released {task_name} file",
        f"{task_name} at {tmp_path / 'ours'}",
    ]
    lines = export_released(tmp_path / "ours", tmp_path / "sub" / "back.pth")
    assert lines[0].startswith(f"{len(state)} tensors of {tmp_path / 'ours'} ({task_name}, ")
    exported = torch.load(tmp_path / "sub" / "back.pth", weights_only=True)
    assert exported.keys() == {"model"}
    assert_equal_tensors(exported["model"], state)


@pytest.mark.parametrize("precision", ["half", "float32"])
@pytest.mark.parametrize("name", ["vqa", "nlvr2", "captioning", "retrieval", "imageclassification"])
def test_recorded_tensors_are_exported_unchanged(tmp_path, write_released_file, name, precision):
    """The recorded networks have four heads, which shapes do not show."""
    state = PRECISIONS[precision](load_tensors(name, "model"))
    lines = convert_released(write_released_file(state), tmp_path / "ours", num_heads=4)
    assert len(lines) == 2 and load_weights(tmp_path / "ours").config.model.num_heads == 4
    export_released(tmp_path / "ours", tmp_path / "back.pth")
    assert_equal_tensors(torch.load(tmp_path / "back.pth", weights_only=True)["model"], state)


def test_weights_in_half_precision_are_loaded_in_float32(tmp_path, write_released_file):
    state = PRECISIONS["half"](MAKE_STATE["vqa"]())
    convert_released(write_released_file(state), tmp_path / "ours", answers=("yes", "no", "two"))
    assert {
        tensor.dtype for tensor in read_tensors(tmp_path / "ours", as_stored=True).values()
    } == {torch.float16}
    task = load_weights(tmp_path / "ours")
    assert isinstance(task, VQA) and task.config.answers == ("yes", "no", "two")
    assert_equal_tensors(
        to_released_state(task), {name: tensor.float() for name, tensor in state.items()}
    )
    larger_task = make_backbone(image_size=24)
    initialize_from(larger_task, tmp_path / "ours")
    assert larger_task.backbone.image_embedding.positions.dtype == torch.float32, (
        "resampled in full precision"
    )


def test_names_without_a_prefix_are_exported_with_it(tmp_path, write_released_file):
    state = MAKE_STATE["backbone"]()
    convert_released(
        write_released_file(
            {name.removeprefix("beit3."): tensor for name, tensor in state.items()}
        ),
        tmp_path / "ours",
    )
    export_released(tmp_path / "ours", tmp_path / "back.pth")
    assert_equal_tensors(torch.load(tmp_path / "back.pth", weights_only=True)["model"], state)


def test_tensors_that_share_memory_are_stored_separately(tmp_path, write_released_file):
    state = MAKE_STATE["backbone"]()
    norm = "beit3.encoder.layers.0.final_layer_norm"
    state[f"{norm}.B.weight"] = state[f"{norm}.A.weight"]
    convert_released(write_released_file(state), tmp_path / "ours")
    export_released(tmp_path / "ours", tmp_path / "back.pth")
    assert_equal_tensors(torch.load(tmp_path / "back.pth", weights_only=True)["model"], state)


def test_the_best_weights_of_a_run_are_exported(tmp_path):
    for seed, name in enumerate(("last", "best")):
        task = make_backbone()
        task.init_weights(seed)
        save_weights(task, tmp_path / "run" / name)
    lines = export_released(tmp_path / "run", tmp_path / "back.pth")
    assert f"of {tmp_path / 'run' / 'best'} (backbone, float32)" in lines[0]
    assert_equal_tensors(
        torch.load(tmp_path / "back.pth", weights_only=True)["model"], to_released_state(task)
    )


def test_released_models_are_exported_under_their_own_names(monkeypatch):
    """This is checked at full size on the meta device."""
    monkeypatch.setattr("beit3.weights.convert.check_does_not_exist", lambda out: None)
    written: dict[str, tuple] = {}
    monkeypatch.setattr(
        "beit3.weights.convert.save_weights",
        lambda task, out, *, tensors: written.update({"last": (task, tensors)}),
    )
    for name, shapes in load_released_shapes().items():
        with torch.device("meta"):
            state = {key: torch.empty(shape, dtype=torch.float16) for key, shape in shapes.items()}
            file = TensorFile(state)
            monkeypatch.setattr(
                "beit3.weights.convert.read_checkpoint", lambda path, as_stored, file=file: file
            )
            convert_released(name, "out")
            exported = to_released_state(*written["last"])
        assert {key: list(tensor.shape) for key, tensor in exported.items()} == shapes, name
        assert {tensor.dtype for tensor in exported.values()} == {torch.float16}


# Tensors that would be lost -----------------------------------------------------------------------


def test_a_head_that_would_be_lost_is_named(tmp_path, write_released_file):
    """A file with heads of two tasks loads as the first; the error precedes any writing."""
    text_head = {"mlm_head.weight": torch.zeros(30, 64), "mlm_head.bias": torch.zeros(30)}
    retrieval_heads = {
        "vision_head.weight": torch.zeros(64, 64),
        "language_head.weight": torch.zeros(64, 64),
        "logit_scale": torch.zeros(()),
    }
    backbone_state, lost_names = (
        MAKE_STATE["backbone"](),
        "vision_head.weight, language_head.weight",
    )
    path = write_released_file(backbone_state | text_head | retrieval_heads)
    with pytest.raises(
        ValueError,
        match=rf"3 tensors would be lost \(head of retrieval.*\): {lost_names}.*; "
        "give --task captioning",
    ):
        convert_released(path, tmp_path / "ours")
    assert list_names(tmp_path) == ["given.pth"]
    assert any(
        lost_names in line and "ignored" in line
        for line in convert_released(path, tmp_path / "ours", task="captioning")
    )
    export_released(tmp_path / "ours", tmp_path / "back.pth")
    assert_equal_tensors(
        torch.load(tmp_path / "back.pth", weights_only=True)["model"], backbone_state | text_head
    )


def test_an_untrained_head_is_not_written(tmp_path, write_released_file):
    lines = convert_released(
        write_released_file(MAKE_STATE["pretrain"]()),
        tmp_path / "ours",
        task="vqa",
        answers=("yes", "no"),
    )
    assert [line.split(" (")[0] for line in lines[1:4]] == ["4 ignored", "4 ignored", "10 fresh"]
    assert "what is fresh was not written" in lines[4]
    assert all(name.startswith("backbone.") for name in read_tensors(tmp_path / "ours"))
    with pytest.raises(
        ValueError,
        match=r"10 tensors are missing: pooler.* train them with beit3 train vqa --init .*ours",
    ):
        load_weights(tmp_path / "ours")
    with pytest.raises(ValueError, match="10 tensors are missing"):
        export_released(tmp_path / "ours", tmp_path / "back.pth")
    task = VQA(read_config(tmp_path / "ours").config)
    assert len(initialize_from(task, tmp_path / "ours").fresh) == 10


def test_a_file_without_text_parameters_is_converted_without_them(tmp_path, write_released_file):
    state = {
        key: tensor
        for key, tensor in MAKE_STATE["backbone"]().items()
        if ".B." not in key and "text_embed" not in key
    }
    convert_released(write_released_file(state), tmp_path / "ours")
    assert_equal_tensors(to_released_state(make_backbone(), read_tensors(tmp_path / "ours")), state)
    report = initialize_from(make_backbone(), tmp_path / "ours")
    assert set(report.fresh.values()) == {"the file holds the image side alone"}


# Faults -------------------------------------------------------------------------------------------


def test_existing_files_are_never_replaced(tmp_path, write_released_file):
    path, directory = write_released_file(MAKE_STATE["backbone"]()), tmp_path / "ours"
    convert_released(path, directory)
    contents = {
        file_path: file_path.read_bytes()
        for file_path in tmp_path.rglob("*")
        if file_path.is_file()
    }
    for call in (convert_released, convert_clip):
        for out in (directory, path):
            with pytest.raises(ValueError, match="exists already"):
                call(path, out)
    with pytest.raises(ValueError, match="given.pth exists already"):
        export_released(directory, path)
    with pytest.raises(ValueError, match="give a name that ends in .pth"):
        export_released(directory, tmp_path / "other")
    assert {
        file_path: file_path.read_bytes()
        for file_path in tmp_path.rglob("*")
        if file_path.is_file()
    } == contents
    (tmp_path / "empty").mkdir()
    convert_released(path, tmp_path / "empty")
    assert load_weights(tmp_path / "empty")


def test_a_failed_conversion_leaves_no_files(tmp_path, write_released_file, monkeypatch):
    path, clip = (
        write_released_file(MAKE_STATE["backbone"]()),
        write_released_file(openai_state(), "clip.pth"),
    )
    convert_released(path, tmp_path / "ours")

    def fail_half_way(content, target, *_):
        if isinstance(target, Path):
            target.write_bytes(b"half")
        else:
            target.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("beit3.weights.store.write_tensors", fail_half_way)
    monkeypatch.setattr("beit3.tensor_files.write_tensors", fail_half_way)
    monkeypatch.setattr("torch.save", fail_half_way)
    for call, source, out in (
        (convert_released, path, "a"),
        (export_released, tmp_path / "ours", "b.pth"),
        (convert_clip, clip, "c"),
    ):
        with pytest.raises(OSError, match="disk full"):
            call(source, tmp_path / out)
    assert list_names(tmp_path) == ["clip.pth", "given.pth", "ours"]


def test_weights_without_released_names_are_not_exported(tmp_path):
    task = Backbone(
        TaskConfig(
            model=replace(
                TINY, dim=32, depth=1, num_heads=2, ffn_dim=48, vocab_size=64, text_positions=20
            )
        )
    )
    save_weights(task, tmp_path / "w")
    with pytest.raises(
        ValueError, match="has no counterpart in the released files: keep these weights as they are"
    ):
        export_released(tmp_path / "w", tmp_path / "back.pth")
    with pytest.raises(ValueError, match="nowhere holds neither weights nor a run's best or last"):
        export_released(tmp_path / "nowhere", tmp_path / "back.pth")
    assert list_names(tmp_path) == ["w"]


def test_files_of_other_networks_are_refused(tmp_path, write_released_file):
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "resnet.pth")
    for source, task, message in (
        (
            tmp_path / "resnet.pth",
            None,
            "resnet.pth: not BEiT-3 weights: the keys begin with conv1.weight; give a released "
            "BEiT-3 file",
        ),
        (
            write_released_file(MAKE_STATE["backbone"]()),
            "vqkd",
            "given.pth: a released backbone file cannot become vqkd",
        ),
        (tmp_path, None, "is a directory, a released file is needed"),
        (
            tmp_path / "beit3_base_patch16_224.zip",
            None,
            "no weights at .*: that is the release's base network for pretrain",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            convert_released(source, tmp_path / "ours", task=task)
    assert list_names(tmp_path) == ["given.pth", "resnet.pth"]


# Visual tokenizers and teachers -------------------------------------------------------------------


def test_a_visual_tokenizer_is_converted(tmp_path):
    inputs, expected = load_tensors("vqkd", "inputs"), load_tensors("vqkd", "outputs")
    heads = load_config("vqkd").get("num_heads", 4)
    lines = convert_released(
        find_fixture("vqkd") / "model.safetensors", tmp_path / "codes", task="vqkd", num_heads=heads
    )
    assert (
        "ignored (only its training used it)" in lines[1]
        and lines[-1] == f"vqkd at {tmp_path / 'codes'}"
    )
    task, write_released_file = load_frozen(str(tmp_path / "codes"), "vqkd")
    codes = task.outputs({"token_image": inputs["image_0_1"]})["codes"]
    assert torch.equal(codes.flatten(), expected["image_0_1.codebook_indices"].flatten())
    assert len(write_released_file.sha256) == 64


NAMES = {"openai": lambda state: state, "hugging_face": hugging_face_state}


@pytest.mark.parametrize("names", NAMES)
def test_a_converted_clip_teacher_equals_its_file(tmp_path, write_released_file, names):
    state: dict[str, Tensor] = NAMES[names](openai_state())
    lines = convert_clip(write_released_file(state), tmp_path / "clip")
    assert (
        lines[0].startswith("image tower of CLIP, 2 x 128, 12 px / 4")
        and "--task.model.teacher_dim 24" in lines[1]
    )
    assert list_names(tmp_path / "clip") == ["config.json", "model.safetensors"]
    from_file, from_directory = (
        load_teacher("clip", path=path, patch_size=PATCH)
        for path in (tmp_path / "given.pth", tmp_path / "clip")
    )
    assert torch.equal(
        from_file.extract_features(pixels()), from_directory.extract_features(pixels())
    )
    assert not [
        name for name, parameter in from_directory.named_parameters() if parameter.requires_grad
    ]
    model = replace(
        VQKDConfig().model,
        image_size=GRID * PATCH,
        patch_size=PATCH,
        dim=64,
        depth=1,
        num_heads=1,
        teacher_dim=24,
    )
    image = replace(VQKDConfig().image, image_size=model.image_size)
    task = VQKD(VQKDConfig(model=model, image=image, teacher_weights=str(tmp_path / "clip")))
    assert torch.equal(
        task.extract_teacher_features(pixels()), from_directory.extract_features(pixels())
    )


def test_files_that_are_no_teachers_are_refused(tmp_path, write_released_file):
    convert_clip(write_released_file(openai_state()), tmp_path / "clip")
    save_weights(make_backbone(), tmp_path / "w")
    for name, path, message in (
        ("dino", tmp_path / "clip", "holds no dino teacher: give its weight file"),
        ("clip", tmp_path / "w", "w holds no clip teacher: .* beit3 convert clip"),
        ("clip", tmp_path, "holds no clip teacher"),
    ):
        with pytest.raises(ValueError, match=message):
            load_teacher(name, path=path, patch_size=PATCH)
    with pytest.raises(
        ValueError,
        match="clip holds a clip teacher, no BEiT-3: it is for --task.teacher_weights of vqkd",
    ):
        initialize_from(make_backbone(), tmp_path / "clip")
    data = bytearray((tmp_path / "clip" / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "clip" / "model.safetensors").write_bytes(data)
    with pytest.raises(
        ValueError,
        match="model.safetensors is not the file that config.json describes: convert it again",
    ):
        load_teacher("clip", path=tmp_path / "clip", patch_size=PATCH)
    with pytest.raises(ValueError, match="not a CLIP image tower"):
        convert_clip(write_released_file(MAKE_STATE["backbone"](), "b.pth"), tmp_path / "other")
    with ZipFile(tmp_path / "script.pt", "w") as archive:
        archive.writestr("script/constants.pkl", b"")
    with pytest.raises(ValueError, match="script.pt is a TorchScript archive: convert it"):
        convert_clip(tmp_path / "script.pt", tmp_path / "other")
    assert not (tmp_path / "other").exists() and not (tmp_path / ".other.new").exists()
