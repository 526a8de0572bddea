"""A third modality that only this file defines: spectrogram patches with their own expert."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from beit3.config import from_dict, to_dict
from beit3.data.views.preprocessing import Preprocessing
from beit3.model.beit3 import BEiT3
from beit3.model.config import (
    IMAGE_MODALITY,
    TEXT_MODALITY,
    TINY,
    TINY_RELEASE,
    Modality,
    ModelConfig,
)
from beit3.model.embeddings import Embedding
from beit3.recipe import TaskConfig
from beit3.tasks.backbone import Backbone
from beit3.weights.initialization import initialize_from
from beit3.weights.loading import load_weights
from beit3.weights.release_format import to_released_state
from beit3.weights.store import save_weights
from tests.reference import backbone as reference

NUM_BINS, FRAMES_PER_PATCH, MAX_PATCHES = 12, 4, 20


class SpectrogramEmbedding(Embedding):
    """Spectrograms [B, NUM_BINS, frames] -> [B, frames / FRAMES_PER_PATCH, D]."""

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.patch = nn.Conv1d(NUM_BINS, config.dim, FRAMES_PER_PATCH, stride=FRAMES_PER_PATCH)
        self.mask_token = nn.Parameter(torch.zeros(config.dim))
        self.positions = nn.Parameter(torch.zeros(MAX_PATCHES, config.dim))

    def forward(self, spectrogram: Tensor, mask: Tensor | None = None) -> Tensor:
        tokens = self.patch(spectrogram).transpose(1, 2)
        if mask is not None:
            tokens = torch.where(mask[..., None], self.mask_token, tokens)
        return tokens + self.positions[: tokens.shape[1]]


AUDIO = Modality("audio", f"{__name__}.SpectrogramEmbedding", init_from="image")
SMALL_SIZES = {"dim": 32, "depth": 3, "ffn_dim": 48, "vocab_size": 40, "text_positions": 20}
PAPER = replace(TINY, **SMALL_SIZES)
RELEASE = replace(TINY_RELEASE, **SMALL_SIZES)
BOTH_FORMS = pytest.mark.parametrize("config", [PAPER, RELEASE], ids=["paper", "release"])


def add_audio(config: ModelConfig, modality: Modality = AUDIO) -> ModelConfig:
    return replace(config, modalities=(IMAGE_MODALITY, TEXT_MODALITY, modality))


def make_network(config: ModelConfig) -> BEiT3:
    """A float64 network with all parameters away from their initial values."""
    network = BEiT3(config).double().eval()
    network.init_weights(0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(noise, alpha=0.2)
    return network


@pytest.fixture
def audio() -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(2, NUM_BINS, 5 * FRAMES_PER_PATCH, generator=generator).double()


@pytest.fixture
def text() -> Tensor:
    return torch.tensor([[0, 5, 9, 7, 2], [0, 8, 2, 1, 1]])


PADDING = {
    "audio": torch.tensor([[0, 0, 0, 0, 0], [0, 0, 0, 1, 1]]).bool(),
    "text": torch.tensor([[0, 0, 0, 0, 0], [0, 0, 0, 1, 1]]).bool(),
}


def rename_to_published(network: BEiT3) -> dict[str, Tensor]:
    """Returns the state dict with the audio expert named as the image expert, for the reference."""
    state = {name: value for name, value in network.state_dict().items() if ".image." not in name}
    return {name.replace(".audio.", ".image."): value for name, value in state.items()}


@BOTH_FORMS
@pytest.mark.parametrize("with_text", [False, True])
def test_audio_states_equal_the_reference_implementation(
    config, audio, text, with_text, monkeypatch
):
    """The reference sees audio tokens as image tokens, whose expert holds audio's values."""
    network = make_network(add_audio(config))
    tokens = network.audio_embedding(audio)
    monkeypatch.setattr(reference, "image_tokens", lambda *arguments: list(tokens.unbind(1)))
    text_or_none = text if with_text else None
    expected = reference.encode(
        rename_to_published(network), config, image=audio, text=text_or_none
    )
    encoded = network(text=text_or_none, inputs={"audio": audio})
    states = torch.cat([encoded.of("audio"), *([encoded.of("text")] if with_text else [])], 1)
    # The network puts text before audio, the reference after it: sums differ by rounding.
    torch.testing.assert_close(states, expected, rtol=0, atol=1e-10)


@BOTH_FORMS
@pytest.mark.parametrize("read", ["all", "real", "first", "last"])
def test_any_modality_may_be_padded(config, audio, text, read):
    """The states of a padded sample equal those of its real tokens encoded alone."""
    network = make_network(add_audio(config))
    padded = network(text=text, inputs={"audio": audio}, padding=PADDING, read=read)
    for sample, length in ((0, 5), (1, 3)):
        if read == "last" and length < 5:
            continue  # the last token is padding
        one_audio = audio[sample : sample + 1, :, : length * FRAMES_PER_PATCH]
        one_text = text[sample : sample + 1, :length]
        alone = network(text=one_text, inputs={"audio": one_audio}, read=read)
        for name in ("text", "audio"):
            states, expected = padded.of(name)[sample], alone.of(name)[0]
            torch.testing.assert_close(states[: len(expected)], expected, rtol=0, atol=1e-10)


@BOTH_FORMS
def test_audio_gradients_reach_all_used_parameters_only(config, audio, text):
    network = make_network(add_audio(config))
    calls = {"alone": (("audio",),), "fused": (("audio", "text"),)}
    for case, modalities in calls.items():
        network.zero_grad()
        text_or_none = text if case == "fused" else None
        mask = {"audio": torch.tensor([[True, False, False, False, False]] * 2)}
        network(
            text=text_or_none, inputs={"audio": audio}, masks=mask
        ).tokens.sin().sum().backward()
        unused = network.find_unused_parameters(*modalities, masked=("audio",))
        for name, parameter in network.named_parameters():
            is_unused = any(f"{name}.".startswith(f"{prefix}.") for prefix in unused)
            assert (parameter.grad is None) == is_unused, (case, name)


@BOTH_FORMS
def test_weights_with_three_modalities_are_loaded_as_saved(config, audio, text, tmp_path):
    task = Backbone(TaskConfig(model=add_audio(config), image=Preprocessing(32))).eval()
    task.init_weights(0)
    save_weights(task, tmp_path / "weights")
    loaded = load_weights(tmp_path / "weights").eval()
    assert loaded.config == task.config
    with torch.inference_mode():
        expected, states = (
            network.backbone(text=text, inputs={"audio": audio.float()}).tokens
            for network in (task, loaded)
        )
    assert torch.equal(states, expected)


@pytest.mark.parametrize("source", ["directory", "released file"])
@pytest.mark.parametrize("init_from", ["", "image"])
def test_old_weights_load_into_a_network_with_one_more_expert(source, init_from, text, tmp_path):
    """Images and texts give the same bits as before; the new expert is fresh or a copy."""
    old = Backbone(TaskConfig(model=RELEASE, image=Preprocessing(32))).eval()
    old.init_weights(3)
    path = tmp_path / "weights"
    if source == "directory":
        save_weights(old, path)
    else:
        path = tmp_path / "released.pth"
        torch.save({"model": to_released_state(old)}, path)
    model = add_audio(RELEASE, replace(AUDIO, init_from=init_from))
    new = Backbone(TaskConfig(model=model, image=Preprocessing(32))).eval()
    new.init_weights(5)
    initial_values = {name: value.clone() for name, value in new.state_dict().items()}
    report = initialize_from(new, path)

    image = torch.rand(2, 3, 32, 32)
    for inputs in ({"image": image}, {"text": text}, {"image": image, "text": text}):
        with torch.inference_mode():
            assert torch.equal(new.backbone(**inputs).tokens, old.backbone(**inputs).tokens)
    experts = {name: value for name, value in new.state_dict().items() if ".audio." in name}
    assert experts
    for name, value in experts.items():
        copied = new.state_dict()[name.replace(".audio.", ".image.")]
        assert torch.equal(value, copied if init_from else initial_values[name]), name
    lines = "\n".join(report.lines())
    assert ("copied (audio from image)" in lines) == bool(init_from)
    assert "fresh (the file has no audio)" in lines, "its embedding is fresh either way"


def test_a_config_with_three_modalities_survives_json():
    config = add_audio(PAPER)
    assert from_dict(ModelConfig, to_dict(config)) == config
    old_config = to_dict(PAPER)
    del old_config["modalities"]
    assert from_dict(ModelConfig, old_config) == PAPER, (
        "configs of earlier versions name no modalities"
    )


@pytest.mark.parametrize(
    ("modality", "message"),
    [
        (Modality("text", AUDIO.embedding), "a name of its own"),
        (Modality("fusion", AUDIO.embedding), "a name of its own"),
        (Modality("a.b", AUDIO.embedding), "a name of its own"),
        (Modality("audio", "beit3.model.nowhere.Embedding"), "not the dotted path"),
        (Modality("audio", "beit3.model.config.ModelConfig"), "not the dotted path"),
        (Modality("audio", "SpectrogramEmbedding"), "not the dotted path"),
    ],
)
def test_wrong_modalities_are_refused(modality, message):
    with pytest.raises(ValueError, match=message):
        BEiT3(add_audio(PAPER, modality))


def test_wrong_inputs_are_refused(audio, text):
    network = make_network(add_audio(PAPER))
    with pytest.raises(ValueError, match="no modality 'video'"):
        network(inputs={"video": audio})
    with pytest.raises(ValueError, match="audio_padding without audio"):
        network(text=text, padding={"audio": PADDING["audio"]})
    with pytest.raises(ValueError, match="texts take no mask"):
        network(text=text, masks={"text": PADDING["text"]})
