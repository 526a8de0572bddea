"""Captions decoded with the cache equal those of a reference decoder that has none."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from beit3.model.attention_mask import make_image_to_text_mask
from beit3.model.beit3 import BEiT3
from beit3.model.config import TINY, TINY_RELEASE
from beit3.model.generation import DecoderState, Decoding, SpecialTokens, generate, sample
from tests.reference import decoding as reference

BOS, PAD, EOS = 0, 1, 2
FORMS = {
    "paper": replace(
        TINY,
        dim=32,
        depth=3,
        num_heads=4,
        ffn_dim=48,
        image_size=24,
        vocab_size=37,
        text_positions=19,
        fusion_layers=2,
    ),
    "release": replace(
        TINY_RELEASE,
        dim=48,
        depth=2,
        num_heads=2,
        ffn_dim=80,
        image_size=40,
        vocab_size=61,
        text_positions=23,
    ),
}


@pytest.fixture(params=FORMS)
def network(request):
    """Returns (backbone, head, images [3, 3, S, S], special tokens) in float64.

    The head's weights are large, so that few tokens are likely.
    """
    config = replace(FORMS[request.param], init="magneto")
    torch.manual_seed(1)
    backbone = BEiT3(config).double()
    backbone.init_weights(3)
    for parameter in backbone.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    head = torch.nn.Linear(config.dim, config.vocab_size).double()
    head.weight.data.normal_(std=1.0)
    head.bias.data[EOS] += 2.0
    images = torch.rand(3, 3, config.image_size, config.image_size, dtype=torch.float64)
    return backbone.eval(), head, images, SpecialTokens(BOS, EOS, PAD, config.vocab_size - 1)


@pytest.mark.parametrize(
    ("num_beams", "penalty", "max_length"),
    [(1, 0.6, 9), (2, 0.0, 6), (3, 0.6, 12), (5, 1.3, 7), (3, 0.6, 4)],
)
@torch.inference_mode()
def test_beam_search_equals_the_reference_without_a_cache(network, num_beams, penalty, max_length):
    backbone, head, images, special_tokens = network
    captions = generate(
        DecoderState(backbone, head, images, special_tokens),
        max_length,
        Decoding("beam", num_beams, penalty),
    )
    for image, caption in zip(images.split(1), captions, strict=True):
        token_ids, score = reference.beam(
            backbone, head, image, max_length, num_beams, penalty, BOS, EOS, special_tokens.mask
        )
        assert caption.token_ids == token_ids
        assert caption.score == pytest.approx(score, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("max_length", [3, 4, 11])
@torch.inference_mode()
def test_greedy_search_equals_the_reference_without_a_cache(network, max_length):
    backbone, head, images, special_tokens = network
    captions = generate(
        DecoderState(backbone, head, images, special_tokens), max_length, Decoding("greedy")
    )
    for image, caption in zip(images.split(1), captions, strict=True):
        token_ids, score = reference.greedy(
            backbone, head, image, max_length, BOS, EOS, special_tokens.mask
        )
        assert caption.token_ids == token_ids and len(token_ids) <= max_length - 2
        assert caption.score == pytest.approx(score, rel=1e-5, abs=1e-5)


@torch.inference_mode()
def test_cached_log_probabilities_equal_those_of_one_pass(network):
    """This holds when beams are reordered, repeated, and grow from two to three an image."""
    backbone, head, images, special_tokens = network
    state = DecoderState(backbone, head, images, special_tokens)
    texts: list[list[int]] = [[], [], []]
    for rows, token_ids in (
        ([0, 0, 1, 1, 2, 2], [5, 9, 7, 4, 6, 9]),
        ([1, 0, 0, 3, 3, 2, 4, 4, 4], [3, 5, 8, 9, 9, 4, 7, 6, 5]),
        ([2, 0, 0, 3, 4, 5, 8, 7, 7], [4, 4, 5, 6, 8, 8, 9, 3, 3]),
    ):
        state.advance(torch.tensor(rows), torch.tensor(token_ids))
        texts = [[*texts[row], token_id] for row, token_id in zip(rows, token_ids, strict=True)]
    for row, (log_probs, token_ids) in enumerate(zip(state.log_probs, texts, strict=True)):
        image = images[row // 3 : row // 3 + 1]
        expected = reference.next_word(backbone, head, image, token_ids, BOS, special_tokens.mask)
        torch.testing.assert_close(log_probs.double(), expected, rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_image_states_do_not_depend_on_the_text(network):
    backbone, _, images, special_tokens = network
    mask = make_image_to_text_mask(1 + backbone.config.num_patches, 6)
    texts = [torch.randint(4, special_tokens.mask, (3, 6)) for _ in range(2)]
    states, with_other_text = (
        backbone(images, text, attention_mask=mask).of("image") for text in texts
    )
    assert torch.equal(states, with_other_text)


@torch.inference_mode()
def test_an_image_is_encoded_once_for_all_beams(network, monkeypatch):
    backbone, head, images, special_tokens = network
    batch_sizes = []
    embed = backbone.image_embedding.forward
    monkeypatch.setattr(
        backbone.image_embedding,
        "forward",
        lambda image, mask: batch_sizes.append(len(image)) or embed(image, mask),
    )
    generate(DecoderState(backbone, head, images, special_tokens), 8, Decoding("beam", 5))
    assert batch_sizes == [3]


@torch.inference_mode()
def test_sampling_follows_its_generators(network):
    backbone, head, images, special_tokens = network

    def sample_captions(seeds, **fields):
        generators = [np.random.default_rng(seed).random for seed in seeds]
        return [
            caption.token_ids
            for caption in generate(
                DecoderState(backbone, head, images, special_tokens),
                9,
                Decoding("sample", **fields),
                generators,
            )
        ]

    assert sample_captions([1, 2, 3]) == sample_captions([1, 2, 3]) != sample_captions([4, 5, 6])
    assert sample_captions([4, 2, 3])[1:] == sample_captions([1, 2, 3])[1:], (
        "a caption does not depend on its batch"
    )
    likeliest = [
        caption.token_ids
        for caption in generate(
            DecoderState(backbone, head, images, special_tokens), 9, Decoding("greedy")
        )
    ]
    assert (
        sample_captions([1, 2, 3], top_p=1e-6)
        == likeliest
        == sample_captions([7, 8, 9], temperature=1e-3)
    )


def test_samples_follow_the_probabilities():
    """20,000 draws: each frequency within 4 deviations of a binomial's."""
    probs = torch.tensor([0.5, 0.05, 0.3, 0.15])
    draws = 20_000
    generators = [np.random.default_rng(seed).random for seed in range(draws)]
    samples = sample(probs.log().expand(draws, 4), Decoding("sample"), generators)
    counts = torch.bincount(samples, minlength=4) / draws
    assert ((counts - probs).abs() < 4 * (probs * (1 - probs) / draws).sqrt()).all()
    top_p_samples = sample(probs.log().expand(draws, 4), Decoding("sample", top_p=0.7), generators)
    assert set(top_p_samples.tolist()) == {0, 2}, "the likeliest tokens that together have 0.7"


def test_lengths_and_options_out_of_range_are_refused(network):
    backbone, head, images, special_tokens = network
    for length, method in (
        (3, "beam"),
        (2, "greedy"),
        (backbone.config.max_text_length + 1, "beam"),
    ):
        with torch.inference_mode(), pytest.raises(ValueError, match="captions of"):
            generate(DecoderState(backbone, head, images, special_tokens), length, Decoding(method))
    for fields in ({"num_beams": 0}, {"top_p": 0.0}, {"top_p": 1.5}, {"temperature": 0.0}):
        with pytest.raises(ValueError, match="num_beams"):
            Decoding("sample", **fields)
