"""Checks of text tokenizers and weights directories."""

import shutil

from beit3.doctor import weights as doctor_weights
from beit3.doctor.weights import check_text_tokenizers, check_weights
from beit3.tokenizer.text import TextTokenizer


def test_text_tokenizers_are_reported_by_ids_and_digest(root, tmp_path, monkeypatch):
    path = str(root / "text.model")
    tokenizer = TextTokenizer(path)
    (finding,) = check_text_tokenizers(path)
    assert finding.startswith(
        f"ok    text tokenizer {path}: {tokenizer.vocab_size} ids (the released one has 64002"
    )
    assert finding.endswith(tokenizer.digest)
    monkeypatch.setattr(doctor_weights, "RELEASED_IDS", tokenizer.vocab_size)
    assert "as many as the released one" in next(check_text_tokenizers(path))
    (tmp_path / "x.spm").write_text("no model")
    for name, text in (
        ("x.spm", "is not a complete SentencePiece model"),
        ("absent.spm", "no text tokenizer at"),
    ):
        (finding,) = check_text_tokenizers(str(tmp_path / name))
        assert finding.startswith("FAULT ") and text in finding
    monkeypatch.setenv("BEIT3_CACHE", str(tmp_path))
    assert list(check_text_tokenizers()) == []


def test_complete_weights_are_ok(weights):
    finding = check_weights(str(weights))
    assert finding.startswith(f"ok    weights {weights} (vqa): ")
    assert "complete, text tokenizer " in finding
    assert check_weights(str(weights.parent)) == finding, "the run may be given as well"


def test_damaged_weights_are_faults(weights, tmp_path):
    other = tmp_path / "other.spm"
    texts = ["completely other words than theirs"] * 3
    TextTokenizer.train(texts, vocab_size=40, model_type="bpe").save(other)
    cut = (weights / "model.safetensors").read_bytes()[:-8]
    damages = {
        "text.model is missing": lambda copy: (copy / "text.model").unlink(),
        "does not fit the weights": lambda copy: shutil.copy(other, copy / "text.model"),
        "is not a complete safetensors file": lambda copy: (copy / "model.safetensors").write_bytes(
            cut
        ),
        "is not JSON": lambda copy: (copy / "config.json").write_text("{"),
        "holds neither weights nor a run's best or last": lambda copy: (
            copy / "config.json"
        ).unlink(),
    }
    for text, damage in damages.items():
        copy = tmp_path / text
        shutil.copytree(weights, copy)
        damage(copy)
        finding = check_weights(str(copy))
        assert finding.startswith("FAULT weights ") and text in finding, finding
    assert "does not fit the weights" in check_weights(str(weights), str(other))
    assert "holds neither" in check_weights(str(tmp_path / "absent"))
