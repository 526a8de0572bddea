"""State dicts are read safely from files of several formats."""

import argparse
import gzip
import json
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import beit3
from beit3.weights.state_dicts import read_checkpoint, read_state_dict
from beit3.weights.store import find_weights
from tests.weights.states import assert_equal_tensors


@pytest.mark.parametrize(
    "keys", ["", "model", "state_dict", "model_state", "model_ema", "ema model"]
)
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "model.net."])
def test_state_dicts_are_found_under_any_key_and_prefix(tmp_path, backbone_state, keys, prefix):
    content = {prefix + name: tensor for name, tensor in backbone_state.items()}
    if prefix == "module.":
        content["n_averaged"] = torch.tensor(3)
    for key in keys.split():
        content = {key: content, "epoch": 3, "best": np.float64(1), "args": {"lr": 1e-3}}
    torch.save(content, tmp_path / "a.pth")
    assert_equal_tensors(read_state_dict(tmp_path / "a.pth"), backbone_state)


def test_compiled_blocks_inside_a_network_have_their_released_names(tmp_path, backbone_state):
    state = {n.replace(".ffn.", ".ffn._orig_mod."): t for n, t in backbone_state.items()}
    torch.save(state, tmp_path / "a.pth")
    assert_equal_tensors(read_state_dict(tmp_path / "a.pth"), backbone_state)


def test_passed_over_parts_of_a_file_are_named(tmp_path, backbone_state):
    file = tmp_path / "a.pth"
    torch.save({"model": {**backbone_state, "step": 3}, "model_ema": backbone_state}, file)
    assert read_checkpoint(file).notes == (
        "'model_ema' was passed over: 'model' of the file was read",
        "passed over in the file, no tensor: 'step' is of type int",
    )
    torch.save({"ema": backbone_state}, file)
    assert "moving average 'ema'" in read_checkpoint(file).notes[0]
    assert read_checkpoint(file).notes[0] in beit3.load(file, num_heads=2).report.lines()
    torch.save({"model": backbone_state, "state_dict": backbone_state}, file)
    with pytest.raises(ValueError, match="under 'model' and others under 'state_dict': save"):
        read_state_dict(file)
    name = next(iter(backbone_state))
    torch.save({**backbone_state, f"module.{name}": backbone_state[name]}, file)
    with pytest.raises(ValueError, match=f"holds both {name} and module.{name}"):
        read_state_dict(file)


def test_values_beside_the_tensors_are_read_without_running_anything(tmp_path, backbone_state):
    args = argparse.Namespace(out=Path("runs"), lr=np.float32(1), array=np.arange(3))
    torch.save({"model": backbone_state, "args": args, "score": np.int64(3)}, tmp_path / "a.pth")
    assert_equal_tensors(read_state_dict(tmp_path / "a.pth"), backbone_state)
    arrays = {name: tensor.numpy() for name, tensor in backbone_state.items()}
    torch.save({"model": arrays}, tmp_path / "a.pth")
    assert_equal_tensors(read_state_dict(tmp_path / "a.pth"), backbone_state)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path, backbone_state, value, dtype):
    state = {name: tensor.to(dtype, copy=True) for name, tensor in backbone_state.items()}
    name = list(state)[3]
    state[name].view(-1)[-1] = value
    for save, file in ((torch.save, "a.pth"), (save_file, "a.safetensors")):
        save(state, tmp_path / file)
        for as_stored in (False, True):
            with pytest.raises(ValueError, match=f"{file}: {name} holds NaN or infinite values"):
                read_state_dict(tmp_path / file, as_stored=as_stored)


def test_large_finite_values_are_no_fault(tmp_path):
    # Their sum in float32 overflows.
    torch.save({"a": torch.full((4,), 3e38)}, tmp_path / "a.pth")
    assert read_state_dict(tmp_path / "a.pth")["a"].isfinite().all()


@pytest.mark.parametrize("ending", [".safetensors", ".bin"])
def test_shards_are_read_by_their_index(tmp_path, backbone_state, ending):
    names = list(backbone_state)
    weight_map = {n: f"m-0000{1 + i % 2}-of-00002{ending}" for i, n in enumerate(names)}
    save = save_file if ending == ".safetensors" else torch.save
    for file in set(weight_map.values()):
        save({n: backbone_state[n] for n in names if weight_map[n] == file}, tmp_path / file)
    index = tmp_path / f"m{ending}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8")
    assert_equal_tensors(read_state_dict(index), backbone_state)
    with pytest.raises(ValueError, match=f"is a directory: give the file in it, {index}"):
        find_weights(tmp_path)
    for changed, message in (
        ({**weight_map, names[0]: weight_map[names[1]]}, f"lacks {names[0]}: download"),
        ({**weight_map, names[0]: "m-00003-of-00002.bin"}, "m-00003-of-00002.bin, which is miss"),
        ({**weight_map, names[0]: "../m.bin"}, "'../m.bin', which names no file beside it"),
        ({n: f for n, f in weight_map.items() if n != names[0]}, f"does not list {names[0]}"),
        ({}, "JSON without a weight_map"),
    ):
        index.write_text(json.dumps({"weight_map": changed}), encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            read_state_dict(index)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_tensors_of_every_precision_become_float32(tmp_path, backbone_state, dtype):
    torch.save(
        {"model": {name: tensor.to(dtype) for name, tensor in backbone_state.items()}},
        tmp_path / "a.pth",
    )
    assert_equal_tensors(
        read_state_dict(tmp_path / "a.pth"),
        {name: tensor.to(dtype).float() for name, tensor in backbone_state.items()},
    )


@pytest.mark.parametrize("name", ["a.zip", "a.pth", "a.bin", "a.safetensors", "no_ending"])
def test_formats_are_recognized_by_content_not_by_name(tmp_path, backbone_state, name):
    torch.save({"model": backbone_state}, tmp_path / name)
    assert_equal_tensors(read_state_dict(tmp_path / name), backbone_state)
    torch.save(backbone_state, tmp_path / name, _use_new_zipfile_serialization=False)
    assert_equal_tensors(read_state_dict(tmp_path / name), backbone_state)
    save_file(backbone_state, tmp_path / name)
    assert_equal_tensors(read_state_dict(tmp_path / name), backbone_state)


def test_checkpoints_with_command_line_arguments_are_read(tmp_path, backbone_state):
    torch.save(
        {"model": backbone_state, "args": argparse.Namespace(lr=1.0), "epoch": 1, "scaler": {}},
        tmp_path / "a.pth",
    )
    assert_equal_tensors(read_state_dict(tmp_path / "a.pth"), backbone_state)


class Payload:
    """A pickle that would make a directory when it is loaded."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.mkdir, (self.path,)


def test_code_in_a_file_is_refused_and_never_run(tmp_path, backbone_state):
    trap = tmp_path / "trap"
    for old_format in (False, True):
        torch.save(
            {"model": backbone_state, "x": Payload(trap)},
            tmp_path / "a.pth",
            _use_new_zipfile_serialization=not old_format,
        )
        with pytest.raises(
            ValueError, match="a.pth is refused, it holds .*: ask for a file of tensors alone"
        ):
            read_state_dict(tmp_path / "a.pth")
        assert not trap.exists()


def test_damaged_files_are_named(tmp_path, backbone_state):
    torch.save({"model": backbone_state}, tmp_path / "whole.pth")
    save_file(backbone_state, tmp_path / "whole.safetensors")
    contents = {
        "cut.pth": (tmp_path / "whole.pth").read_bytes()[:5000],
        "cut.safetensors": (tmp_path / "whole.safetensors").read_bytes()[:5000],
        "page.pth": b"<!DOCTYPE html><title>404</title>",
        "empty.pth": b"",
        "zip.pth": b"PK\x03\x04 not a torch archive at all",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} is .*: download it again$"):
            read_state_dict(tmp_path / name)
    with zipfile.ZipFile(tmp_path / "archive.pth", "w") as archive:
        archive.writestr("beit3.pth", b"")
    other_files = {
        "a.pth.gz": (gzip.compress(b"x"), "compressed by gzip: unpack it first"),
        "lfs.pth": (b"version https://git-lfs.github.com/spec/v1", "Git LFS pointer"),
        "plain.pkl": (pickle.dumps(backbone_state), "a pickle that torch.save did not write"),
        "archive.pth": (None, "a zip archive of beit3.pth and others: unpack it first"),
        "keras.h5": (b"\x89HDF\r\n", "an HDF5 file"),
    }
    for name, (content, message) in other_files.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} is .*{message}"):
            read_state_dict(tmp_path / name)
    with pytest.raises(ValueError, match="no weights at .*absent.pth"):
        read_state_dict(tmp_path / "absent.pth")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "holds a list and no named tensors"),
        ({}, "holds a dict and no named tensors"),
        ({"model": {"a": 3}}, "'model' is of type dict"),
        ({"epoch": 3}, "'epoch' is of type int"),
    ],
)
def test_torch_files_without_a_state_dict_are_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=message):
        read_state_dict(tmp_path / "a.pth")


def nest(state: dict, key: str) -> dict:
    """Returns a checkpoint that contains itself under `key`."""
    content = {**state, "model": {"epoch": 3}}
    content[key] = content
    return content


def nest_deep(state: dict) -> dict:
    """Returns a dict with a value that contains itself, and no state dict but its own."""
    inner: dict = {}
    inner["inner"] = {"outer": inner}
    return {"model": inner, "epoch": 3, **state}


def nest_by_two(state: dict) -> dict:
    """Returns a dict that contains itself under two keys in turn."""
    content: dict = {"model": {**state}}
    content["model"]["module"] = content
    return content


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda state: nest(state, "model"), "a dict that contains itself under 'model'"),
        (lambda state: nest(state, "ema"), "a dict that contains itself under 'ema'"),
        (nest_by_two, "a dict that contains itself under 'module'"),
        (nest_deep, "'model' is of type dict: a state dict"),
        (lambda state: {"a": np.ones(3, np.longdouble)}, "'a' is an array of .*: save it as float"),
        (lambda state: {"a": torch.ones(3, device="meta")}, "'a' is a meta tensor, .*: save"),
        (lambda state: {"model": {"a": torch.ones(3, device="meta")}}, "'a' is a meta tensor"),
    ],
)
def test_content_that_is_no_plain_state_dict_is_refused(tmp_path, backbone_state, make, message):
    torch.save(make(dict(backbone_state)), tmp_path / "a.pth")
    with pytest.raises(ValueError, match=f"a.pth.*{message}") as error:
        read_state_dict(tmp_path / "a.pth")
    assert "\n" not in str(error.value)


def test_deep_nests_and_arrays_of_any_byte_order_are_read(tmp_path):
    content: dict = {"a": np.arange(3, dtype=">f4")}
    torch.save({"model": content}, tmp_path / "a.pth")
    assert read_state_dict(tmp_path / "a.pth")["a"].tolist() == [0, 1, 2]
    for _ in range(300):
        content = {"model": content}
    torch.save(content, tmp_path / "a.pth")
    assert read_state_dict(tmp_path / "a.pth")["a"].tolist() == [0, 1, 2]


def test_an_index_that_names_an_index_is_refused(tmp_path):
    for first, second in (("a", "a"), ("a", "b")):
        for name, named in ((first, second), (second, first)):
            text = json.dumps({"weight_map": {"x": f"{named}.index.json"}})
            (tmp_path / f"{name}.index.json").write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=f"{second}.index.json is JSON, an index names"):
            read_state_dict(tmp_path / "a.index.json")
