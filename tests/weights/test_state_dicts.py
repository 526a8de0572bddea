"""State dicts are read safely from files of several formats."""

import argparse
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from beit3.weights.state_dicts import read_state_dict
from tests.weights.states import assert_equal_tensors


@pytest.mark.parametrize("nest", ["model", "module", "state_dict", None])
def test_state_dicts_are_found_under_any_key(tmp_path, backbone_state, nest):
    torch.save({nest: backbone_state, "epoch": 3} if nest else backbone_state, tmp_path / "a.pth")
    assert_equal_tensors(read_state_dict(tmp_path / "a.pth"), backbone_state)


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
    with pytest.raises(ValueError, match="no weights at .*absent.pth"):
        read_state_dict(tmp_path / "absent.pth")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "holds no named tensors"),
        ({}, "holds no named tensors"),
        ({"model": {"a": 3}}, "'a' is of type int"),
        ({"epoch": 3}, "'epoch' is of type int"),
    ],
)
def test_torch_files_without_a_state_dict_are_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=message):
        read_state_dict(tmp_path / "a.pth")
