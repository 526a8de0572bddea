"""Captions with the cache equal those without it, in both forms, at odd lengths and vocabularies;
image states ignore the text."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from beit3.model.attention_mask import make_image_to_text_mask
from beit3.model.beit3 import BEiT3
from beit3.model.config import TINY, TINY_RELEASE
from beit3.model.generation import DecoderState, Decoding, SpecialTokens, generate, sample
from tests.reference import decoding as slow

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
    """A backbone and a head of strong opinions, in double precision: (backbone, head, images [3, 3,
    S, S], marks)."""
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
def test_beam_search_equals_encoding_everything_anew(network, num_beams, penalty, max_length):
    backbone, head, images, marks = network
    found = generate(
        DecoderState(backbone, head, images, marks),
        max_length,
        Decoding("beam", num_beams, penalty),
    )
    for image, caption in zip(images.split(1), found, strict=True):
        words, score = slow.beam(
            backbone, head, image, max_length, num_beams, penalty, BOS, EOS, marks.mask
        )
        assert caption.token_ids == words
        assert caption.score == pytest.approx(score, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("max_length", [3, 4, 11])
@torch.inference_mode()
def test_greedy_equals_encoding_everything_anew(network, max_length):
    backbone, head, images, marks = network
    found = generate(DecoderState(backbone, head, images, marks), max_length, Decoding("greedy"))
    for image, caption in zip(images.split(1), found, strict=True):
        words, score = slow.greedy(backbone, head, image, max_length, BOS, EOS, marks.mask)
        assert caption.token_ids == words and len(words) <= max_length - 2
        assert caption.score == pytest.approx(score, rel=1e-5, abs=1e-5)


@torch.inference_mode()
def test_steps_equal_the_full_pass(network):
    """The slot's log-probabilities after any words of any beams: of two an image, later of three,
    some gone on with twice."""
    backbone, head, images, marks = network
    slots = DecoderState(backbone, head, images, marks)
    said: list[list[int]] = [[], [], []]
    for rows, words in (
        ([0, 0, 1, 1, 2, 2], [5, 9, 7, 4, 6, 9]),
        ([1, 0, 0, 3, 3, 2, 4, 4, 4], [3, 5, 8, 9, 9, 4, 7, 6, 5]),
        ([2, 0, 0, 3, 4, 5, 8, 7, 7], [4, 4, 5, 6, 8, 8, 9, 3, 3]),
    ):
        slots.advance(torch.tensor(rows), torch.tensor(words))
        said = [[*said[row], word] for row, word in zip(rows, words, strict=True)]
    for row, (found, words) in enumerate(zip(slots.log_probs, said, strict=True)):
        image = images[row // 3 : row // 3 + 1]
        expected = slow.next_word(backbone, head, image, words, BOS, marks.mask)
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_image_states_do_not_depend_on_the_text(network):
    backbone, _, images, marks = network
    mask = make_image_to_text_mask(1 + backbone.config.num_patches, 6)
    texts = [torch.randint(4, marks.mask, (3, 6)) for _ in range(2)]
    one, two = (backbone(images, text, attention_mask=mask).of("image") for text in texts)
    assert torch.equal(one, two)


@torch.inference_mode()
def test_an_image_is_encoded_once_whatever_the_beams(network, monkeypatch):
    backbone, head, images, marks = network
    seen = []
    embed = backbone.image_embedding.forward
    monkeypatch.setattr(
        backbone.image_embedding,
        "forward",
        lambda image, mask: seen.append(len(image)) or embed(image, mask),
    )
    generate(DecoderState(backbone, head, images, marks), 8, Decoding("beam", 5))
    assert seen == [3]


@torch.inference_mode()
def test_sampling_follows_its_generators(network):
    backbone, head, images, marks = network

    def said(seeds, **fields):
        generators = [np.random.default_rng(seed).random for seed in seeds]
        return [
            each.token_ids
            for each in generate(
                DecoderState(backbone, head, images, marks),
                9,
                Decoding("sample", **fields),
                generators,
            )
        ]

    assert said([1, 2, 3]) == said([1, 2, 3]) != said([4, 5, 6])
    assert said([4, 2, 3])[1:] == said([1, 2, 3])[1:], "a record's words do not depend on its batch"
    likeliest = [
        each.token_ids
        for each in generate(DecoderState(backbone, head, images, marks), 9, Decoding("greedy"))
    ]
    assert said([1, 2, 3], top_p=1e-6) == likeliest == said([7, 8, 9], temperature=1e-3)


def test_samples_have_their_probabilities():
    """20,000 draws: each frequency within 4 deviations of a binomial's."""
    probs = torch.tensor([0.5, 0.05, 0.3, 0.15])
    draws = 20_000
    generators = [np.random.default_rng(seed).random for seed in range(draws)]
    words = sample(probs.log().expand(draws, 4), Decoding("sample"), generators)
    counts = torch.bincount(words, minlength=4) / draws
    assert ((counts - probs).abs() < 4 * (probs * (1 - probs) / draws).sqrt()).all()
    cut = sample(probs.log().expand(draws, 4), Decoding("sample", top_p=0.7), generators)
    assert set(cut.tolist()) == {0, 2}, "the first words that together have 0.7"


def test_limits(network):
    backbone, head, images, marks = network
    for length, method in (
        (3, "beam"),
        (2, "greedy"),
        (backbone.config.max_text_length + 1, "beam"),
    ):
        with torch.inference_mode(), pytest.raises(ValueError, match="captions of"):
            generate(DecoderState(backbone, head, images, marks), length, Decoding(method))
    for fields in ({"num_beams": 0}, {"top_p": 0.0}, {"top_p": 1.5}, {"temperature": 0.0}):
        with pytest.raises(ValueError, match="num_beams"):
            Decoding("sample", **fields)
