"""Names of weights become paths in one order, and errors say what would work."""

import pytest
import torch

from beit3.predict import load
from beit3.weights import names
from beit3.weights.initialization import initialize_from
from beit3.weights.loading import load_backbone, load_frozen
from beit3.weights.matching import get_weights
from beit3.weights.names import explain_missing, find_path, find_pretrained, is_there, list_shipped
from beit3.weights.store import save_weights
from tests.weights.states import make_backbone


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """A folder of weights that ship, in place of the package's own."""
    for name in ("world/vqa", "world/captions"):
        save_weights(make_backbone(), tmp_path / "shipped" / name)
    monkeypatch.setattr(names, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setenv("BEIT3_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "shipped"


def test_shipped_weights_load_by_name(shipped):
    assert list_shipped() == ["world/captions", "world/vqa"]
    assert find_path("world/vqa") == shipped / "world" / "vqa"
    assert load("world/vqa").report.source == f"{shipped / 'world' / 'vqa'} (backbone)"
    assert load_backbone("world/captions").config.dim == 64


def test_a_path_goes_before_a_name(shipped, tmp_path):
    save_weights(make_backbone(), tmp_path / "world" / "vqa")
    assert find_path("world/vqa").resolve() == tmp_path / "world" / "vqa"
    assert find_path(tmp_path / "world" / "vqa") == tmp_path / "world" / "vqa"


def test_a_folder_without_weights_does_not_hide_a_name(shipped, tmp_path):
    """`beit3 world --out world` writes the raw files of VQA to world/vqa."""
    (tmp_path / "world" / "vqa").mkdir(parents=True)
    assert find_path("world/vqa") == shipped / "world" / "vqa"
    assert find_pretrained("world/vqa") == shipped / "world" / "vqa"
    save_weights(make_backbone(), tmp_path / "world" / "vqa" / "last")  # a run
    assert find_path("world/vqa").resolve() == tmp_path / "world" / "vqa"


def test_a_downloaded_file_is_found_with_and_without_its_ending(shipped, tmp_path):
    file = tmp_path / "cache" / "released" / "beit3_base_patch16_224.pth"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"x")
    assert not is_there("beit3_large_patch16_224") and not is_there("hf:me/vqa")
    for name in ("beit3_base_patch16_224", "beit3_base_patch16_224.pth"):
        assert find_path(name) == file and is_there(name)
    (tmp_path / "beit3_base_patch16_224").mkdir()  # holds no weights
    assert find_path("beit3_base_patch16_224") == file
    # Names that only begin alike are other files: a network of timm's, one of the user's.
    for name in ("beit3_base_patch16_224.in22k_ft_in1k", "beit3_base_patch16_224-mine.pth"):
        assert not is_there(name)
    # A path that leads elsewhere is not the downloaded file.
    with pytest.raises(ValueError, match="no weights at other/beit3_base_patch16_224.pth"):
        find_path("other/beit3_base_patch16_224.pth")


def test_relative_paths_are_no_repositories(shipped):
    for name in ("./absent", "../absent"):
        with pytest.raises(ValueError, match=f"no weights at {name}"):
            find_pretrained(name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("world/vqaa", "no weights at world/vqaa: did you mean world/vqa?"),
        ("world/segmentation", "the weights that ship are world/captions, world/vqa"),
        ("runs/x", "a directory of weights; the weights that ship are world/captions, world/vqa"),
        ("beit3_large_itc_patch16_224", "get it with beit3 download beit3_large_itc_patch16_224"),
        ("beit3_large_itc_patch16_22", "did you mean beit3_large_itc_patch16_224?"),
    ],
)
def test_errors_say_what_would_work(shipped, name, message):
    with pytest.raises(ValueError) as caught:
        load(name)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert str(caught.value) == explain_missing(name)


def test_a_training_starts_from_a_name(shipped, tmp_path):
    target = make_backbone()
    target.init_weights(1)
    assert initialize_from(target, "world/vqa").loaded == tuple(get_weights(target))
    for name, tensor in get_weights(load("world/vqa").task).items():
        assert torch.equal(get_weights(target)[name], tensor)
    task, frozen = load_frozen("world/captions", "backbone")
    assert frozen.path == str((shipped / "world" / "captions").resolve())
    with pytest.raises(ValueError, match=r"^cannot start from x: no weights at x: give"):
        initialize_from(target, "x")


def test_commands_take_names(shipped, run_cli, tmp_path):
    run_cli("convert", "official", "world/vqa", "--out", tmp_path / "again.pth")
    assert (tmp_path / "again.pth").is_file()
