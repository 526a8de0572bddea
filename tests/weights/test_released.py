"""Released files are downloaded when asked for, checked, and found again by their bare names."""

import hashlib
import io
from dataclasses import replace

import numpy as np
import pytest
import torch

from beit3.data.views.preprocessing import Preprocessing
from beit3.predict import load
from beit3.tasks.retrieval import Retrieval, RetrievalConfig
from beit3.weights import catalog
from beit3.weights.catalog import RELEASED_FILES, find_by_name, find_file
from beit3.weights.release_format import to_released_state
from beit3.weights.released import (
    download_released,
    find_downloaded,
    format_downloads,
    get_download_directory,
)
from tests.file_server import Behavior, serve
from tests.weights.states import BACKBONE

NAME = "beit3_base_patch16_384_f30k_retrieval"
"""A file of which neither size nor digest is known."""


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BEIT3_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "released"


@pytest.fixture
def task(tokenizer):
    model = replace(BACKBONE, vocab_size=64, text_positions=66)
    task = Retrieval(RetrievalConfig(model=model, image=Preprocessing(16)), tokenizer=tokenizer)
    task.init_weights(0)
    return task.eval()


def write_checkpoint(task) -> bytes:
    file = io.BytesIO()
    torch.save({"model": to_released_state(task)}, file)
    return file.getvalue()


@pytest.mark.parametrize(
    "name",
    [
        "beit3.spm",
        "beit3_base_patch16_224",
        "beit3_base_patch16_224.pth",
        "vqkd_encoder_base_decoder_1x768x12_dino",
        "vqkd_encoder_base_decoder_1x768x12_dino.pth",
        "vqkd_encoder_base_decoder_1x768x12_dino-663c55d7.pth",
    ],
)
def test_names_come_with_and_without_digest_and_ending(name):
    file = find_by_name(name)
    assert file is not None and file.name.startswith(name.removesuffix(".pth"))


@pytest.mark.parametrize(
    "name",
    ["beit3", "beit3_base_patch16_224-mine.pth", "vqkd_encoder_base_decoder_1x768x12_dino-0.pth"],
)
def test_names_that_go_on_in_another_way_are_other_files(name):
    assert find_file(name) is not None and find_by_name(name) is None


def test_known_facts_belong_to_listed_files():
    names = {file.name for file in RELEASED_FILES}
    assert set(catalog.NUM_BYTES) <= names and set(catalog.SHA256) <= names
    for file in RELEASED_FILES:
        assert all(character in "0123456789abcdef" for character in file.sha256)
        assert len(file.sha256) in (0, 8, 64)
        # The digest in a visual tokenizer's name is the one that its code checks.
        assert (len(file.sha256) == 8) == (file.task == "vqkd")
        assert len(file.sha256) != 8 or f"-{file.sha256}." in file.name
        assert file.max_bytes > 1e6 and file.url.endswith(f"/{file.name}")
        # Half precision and a little around it.
        assert (
            not file.num_bytes
            or file.task == "text"
            or (0.999 < file.num_bytes / (file.parameters * 2e6) < 1.01)
        )
    assert "BEiT-v2/vqkd" in find_file("vqkd_encoder_base_decoder_1x768x12_dino").url


def test_a_downloaded_file_loads_by_its_bare_name(cache, task, tokenizer):
    content = write_checkpoint(task)
    image = np.zeros((20, 20, 3), np.uint8)
    expected = task.eval()
    with serve(Behavior(content, stop_after=[20_000])) as base:
        path = download_released(NAME, base_url=f"{base}/", first_wait=0.001)
    assert path == cache / f"{NAME}.pth" == find_downloaded(NAME) == find_downloaded(path.name)
    assert get_download_directory() == cache
    with pytest.raises(ValueError, match="give text_model"):
        load(NAME).embed(texts=["a red cube"])
    tokenizer.save(cache / "beit3.spm")
    for name in (NAME, f"{NAME}.pth", path):
        features = load(name).embed(images=[image], texts=["a red cube"])
        batch = expected.collate([expected.example(expected.record(image, "a red cube"), False)])
        with torch.inference_mode():
            outputs = expected.outputs(batch)
        for modality, values in features.items():
            torch.testing.assert_close(
                torch.from_numpy(values), outputs[f"{modality}_features"], rtol=0, atol=1e-6
            )


def test_a_text_model_beside_files_of_other_names_is_left_alone(cache, task, tokenizer, tmp_path):
    (tmp_path / "mine.pth").write_bytes(write_checkpoint(task))
    tokenizer.save(tmp_path / "beit3.spm")
    assert not load(tmp_path / "mine.pth").task.has_tokenizer


def test_a_known_name_that_is_not_there_says_how_to_get_it(cache):
    for name in (NAME, f"{NAME}.pth"):
        with pytest.raises(ValueError, match=f"get it with beit3 download {NAME}$") as caught:
            load(name)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"did you mean beit3_base_patch16_384_coco_retrieval\?"):
        load("beit3_base_patch16_384_cocoretrieval")


@pytest.mark.parametrize("damage", ["byte", "start", "page"])
def test_a_damaged_checkpoint_of_unknown_digest_is_refused(cache, task, damage):
    content = bytearray(write_checkpoint(task))
    if damage == "byte":
        content[len(content) // 2] ^= 1  # in a tensor: only its checksum can tell
    content = {"byte": bytes(content), "start": bytes(content[9:-30]), "page": b"<html>"}[damage]
    with serve(Behavior(content)) as base, pytest.raises(ValueError, match="is removed") as caught:
        download_released(NAME, base_url=base)
    assert "archive is damaged" in str(caught.value) or "no checkpoint" in str(caught.value)
    assert not [path for path in cache.iterdir() if path.stat().st_size]


def test_known_size_and_digest_are_checked(cache, monkeypatch):
    with serve(Behavior(b"x" * 786_432)) as base:
        with pytest.raises(ValueError, match=r"announces 786,432 bytes, the file has 1,356,293"):
            download_released("beit3.spm", base_url=base)
    with serve(Behavior(b"x" * 1_356_293)) as base:
        with pytest.raises(ValueError, match=r"SHA-256 is .*, 6f5e2fef"):
            download_released("beit3.spm", base_url=base)
    assert find_downloaded("beit3.spm") is None


def test_a_file_that_is_there_is_checked_and_not_fetched_again(cache, task, tmp_path):
    with serve(Behavior(write_checkpoint(task))) as base:
        path = download_released(NAME, tmp_path / "mine", base_url=base)
    assert path == tmp_path / "mine" / f"{NAME}.pth"
    assert download_released(NAME, tmp_path / "mine", base_url=base) == path  # the server is gone
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"is not the released file: .*; remove it"):
        download_released(NAME, tmp_path / "mine", base_url=base)


def test_unknown_names_are_refused(cache):
    with pytest.raises(ValueError, match=r"no file beit3_huge.* did you mean beit3_large"):
        download_released("beit3_huge_patch16_224")
    with pytest.raises(ValueError, match=r"did you mean beit3_base_patch16_224\?"):
        download_released("beit3_base_patch16_224.in22k_ft_in1k")  # timm's
    with pytest.raises(ValueError, match="beit3 recipes --released lists them"):
        download_released("resnet50")


def test_the_list_says_what_is_known_and_what_is_there(cache, task):
    lines = format_downloads()
    assert len(lines) == 1 + len(RELEASED_FILES)
    spm = next(line for line in lines if line.startswith("beit3.spm"))
    assert spm.split()[1:] == ["1,356,293", "6f5e2fef", "-"]
    cache.mkdir(parents=True)
    (cache / f"{NAME}.pth").write_bytes(b"x")
    assert any(
        line.startswith(NAME) and line.endswith(f"{NAME}.pth") for line in format_downloads()
    )


def test_the_command_downloads_and_predicts(cache, task, run_cli, tmp_path):
    content = write_checkpoint(task)
    with serve(Behavior(content)) as base:
        printed = run_cli("download", NAME, "--base-url", base)
    digest = hashlib.sha256(content).hexdigest()
    assert printed == f"{cache / NAME}.pth  sha256 {digest}\n"
    assert run_cli("download").count("\n") == 1 + len(RELEASED_FILES)
