"""The head against transformers' modules; its losses against transformers' and against loops over
single points."""

import math
from importlib.metadata import PackageNotFoundError

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
pytest.importorskip("scipy")

from beit3.segmentation import head as module
from beit3.segmentation import losses
from beit3.segmentation.config import LARGE_HEAD, SMALL_HEAD, HeadConfig
from beit3.segmentation.head import MaskHead
from beit3.segmentation.losses import MaskPredictions

CLASSES, IGNORE = 4, 255
CONFIG = HeadConfig(
    hidden_dim=32,
    num_heads=4,
    encoder_layers=2,
    encoder_ffn=48,
    decoder_layers=4,
    decoder_ffn=40,
    num_queries=6,
    num_points=64,
)


def make_head(config=CONFIG, dim=24, seed=0):
    head = MaskHead(dim, CLASSES, config)
    head.init_weights(seed)
    return head


def make_features(batch=2, dim=24, height=16, width=24, seed=0):
    """Returns four maps whose sides are not all even, as the adapter's may be."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [(-(-height // 2**level), -(-width // 2**level)) for level in range(4)]
    return [torch.randn(batch, dim, *size, generator=generator) for size in sizes]


def make_predictions(batch=2, queries=6, height=10, width=14, layers=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    masks = tuple(
        3 * torch.randn(batch, queries, height, width, generator=generator) for _ in range(layers)
    )
    return MaskPredictions(
        masks,
        tuple(torch.randn(batch, queries, CLASSES + 1, generator=generator) for _ in range(layers)),
    )


def make_label_map(batch=2, height=30, width=44, seed=0, high=CLASSES):
    """Returns label maps of blocks of 10 x 10 pixels."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(high, (batch, -(-height // 10), -(-width // 10)), generator=generator)
    return blocks.repeat_interleave(10, 1).repeat_interleave(10, 2)[:, :height, :width]


def make_lattice(shape, like):
    """Replaces random points by the same ones for every mask and image."""
    steps = torch.arange(shape[-1]) + 0.5
    return torch.stack((steps * 0.618 % 1, steps / shape[-1]), -1).expand(*shape, 2)


# The network --------------------------------------------------------------------------------------


def build_reference(config=CONFIG, dim=24):
    """Returns transformers' modules with their own initial values, and their loss."""
    from transformers import Mask2FormerConfig
    from transformers.models.mask2former import modeling_mask2former as m

    settings = Mask2FormerConfig(
        num_labels=CLASSES,
        feature_size=config.hidden_dim,
        mask_feature_size=config.hidden_dim,
        hidden_dim=config.hidden_dim,
        num_attention_heads=config.num_heads,
        encoder_layers=config.encoder_layers,
        encoder_feedforward_dim=config.encoder_ffn,
        decoder_layers=config.decoder_layers + 1,
        dim_feedforward=config.decoder_ffn,
        num_queries=config.num_queries,
        train_num_points=config.num_points,
    )

    class ReferenceHead(m.Mask2FormerPreTrainedModel):
        def __init__(self):
            super().__init__(settings)
            self.pixels = m.Mask2FormerPixelDecoder(settings, [dim] * 4)
            self.queries = m.Mask2FormerTransformerModule(config.hidden_dim, settings)
            self.classes = nn.Linear(config.hidden_dim, CLASSES + 1)
            self.post_init()

    return ReferenceHead(), m.Mask2FormerLoss(settings, {})


@pytest.mark.parametrize("size", [(16, 24), (13, 22)])
def test_the_network_equals_that_of_transformers(size):
    head, (reference_head, _) = make_head(), build_reference()
    reference_head.load_state_dict(head.state_dict())
    features = make_features(height=size[0], width=size[1])
    predictions = head(features)
    pixels = reference_head.pixels(features)
    expected = reference_head.queries(pixels.multi_scale_features, pixels.mask_features)
    assert len(predictions.masks) == len(predictions.classes) == CONFIG.decoder_layers + 1
    assert predictions.masks[-1].shape == (2, 6, *size)
    assert predictions.classes[-1].shape == (2, 6, CLASSES + 1)
    for actual, expected_masks in zip(
        predictions.masks, expected.masks_queries_logits, strict=True
    ):
        torch.testing.assert_close(actual, expected_masks, atol=2e-4, rtol=1e-4)
    for actual, states in zip(
        predictions.classes, expected.intermediate_hidden_states, strict=True
    ):
        torch.testing.assert_close(
            actual, reference_head.classes(states.transpose(0, 1)), atol=2e-4, rtol=1e-4
        )


def init_reference_layers():
    """An attention of the pixel decoder and a layer of the query decoder, initialized as
    transformers means to.

    Its `post_init` visits the parts of a module first, and then leaves what they hold: all offsets
    stay 0 (5.23).
    """
    from transformers.models.mask2former import modeling_mask2former as m

    reference_head, _ = build_reference()
    attention = m.Mask2FormerPixelDecoderEncoderMultiscaleDeformableAttention(
        CONFIG.hidden_dim, CONFIG.num_heads, 3, 4
    )
    layer = m.Mask2FormerMaskedAttentionDecoderLayer(reference_head.config)
    for part in (attention, layer):
        reference_head._init_weights(part)
    return dict(attention.named_parameters()), dict(layer.named_parameters())


def test_initial_values_equal_the_original_ones():
    head, (attention, layer) = make_head(), init_reference_layers()
    for built_layer, original in (
        (head.pixels.encoder.layers[1].self_attn, attention),
        (head.queries.decoder.layers[2], layer),
    ):
        for name, parameter in built_layer.named_parameters():
            if parameter.ndim > 1 and original[name].any():
                torch.testing.assert_close(
                    parameter.std(), original[name].std(), rtol=0.1, atol=0, msg=name
                )
            elif (
                "fc" not in name and "out_proj" not in name and "self_attn." not in name
            ):  # the original's are torch's own
                assert torch.equal(parameter, original[name]), name
    for table in (
        head.pixels.level_embed,
        head.queries.level_embed.weight,
        head.queries.queries_embedder.weight,
    ):
        assert 0.7 < float(table.detach().std()) < 1.3
    assert 0.9 / math.sqrt(32) < float(head.classes.weight.abs().max()) <= 1 / math.sqrt(32)


def test_a_head_built_on_meta_gets_the_same_values():
    with torch.device("meta"):
        head = MaskHead(24, CLASSES, CONFIG)
    assert all(parameter.is_meta for parameter in head.parameters()) and not list(head.buffers())
    head.to_empty(device="cpu").init_weights(0)
    for (name, parameter), expected in zip(
        head.named_parameters(), make_head().parameters(), strict=True
    ):
        assert torch.equal(parameter, expected), name


def test_every_parameter_gets_a_gradient():
    head = make_head()
    for parameter in (
        head.parameters()
    ):  # at first deformable attention looks past its queries, level embeddings among them
        parameter.data += 0.02 * torch.randn(
            parameter.shape, generator=torch.Generator().manual_seed(0)
        )
    sums = head.compute_losses(head(make_features()), make_label_map())
    torch.stack(list(sums.values())).sum().backward()
    without_gradient = {
        name
        for name, parameter in head.named_parameters()
        if parameter.grad is None or not parameter.grad.any()
    }
    # A softmax does not see a constant that all keys share.
    assert all(name.endswith("self_attn.k_proj.bias") for name in without_gradient), (
        without_gradient
    )


def test_recomputed_layers_give_the_same_gradients():
    gradients = []
    for config in (CONFIG, HeadConfig(**{**vars(CONFIG), "checkpointing": True})):
        head, features = make_head(config), [tensor.requires_grad_() for tensor in make_features()]
        torch.manual_seed(3)
        sum(head.compute_losses(head(features), make_label_map()).values()).backward()
        gradients.append([tensor.grad for tensor in (*head.parameters(), *features)])
    for stored, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(stored, recomputed)


def test_autocast_keeps_pixel_decoder_and_losses_in_float32():
    head, pixel_dtypes = make_head(), []
    head.pixels.register_forward_hook(
        lambda module, inputs, output: pixel_dtypes.append(output.mask_features.dtype)
    )
    with torch.autocast("cpu", torch.bfloat16):
        predictions = head([feature_map.bfloat16() for feature_map in make_features()])
        sums = head.compute_losses(predictions, make_label_map())
        scores = head.compute_scores(predictions)
    assert predictions.masks[-1].dtype == torch.bfloat16
    assert {*pixel_dtypes, scores.dtype, *(value.dtype for value in sums.values())} == {
        torch.float32
    }


def test_scores_are_sums_over_queries():
    predictions = make_predictions(layers=2)
    scores = make_head().compute_scores(predictions)
    expected = torch.zeros(2, CLASSES, 10, 14)
    for image in range(2):
        for query in range(6):
            probabilities = predictions.classes[-1][image, query].softmax(0)
            for label in range(CLASSES):
                expected[image, label] += (
                    probabilities[label] * predictions.masks[-1][image, query].sigmoid()
                )
    torch.testing.assert_close(scores, expected)


@pytest.mark.parametrize("installed", ["none", "5.22.1", "4.57.0"])
def test_an_old_transformers_is_rejected(installed, monkeypatch):
    def version(name):
        if installed == "none":
            raise PackageNotFoundError
        return installed

    monkeypatch.setattr(module, "version", version)
    with pytest.raises(
        ValueError,
        match=rf"transformers 5\.23 or later \(installed: {installed}\): "
        r"pip install 'beit3\[dense\]'",
    ):
        make_head()


def test_heads_have_the_published_sizes():
    assert (
        SMALL_HEAD.hidden_dim,
        SMALL_HEAD.num_heads,
        SMALL_HEAD.encoder_ffn,
        SMALL_HEAD.decoder_ffn,
        SMALL_HEAD.num_queries,
    ) == (256, 8, 1024, 2048, 100)
    assert (
        LARGE_HEAD.hidden_dim,
        LARGE_HEAD.num_heads,
        LARGE_HEAD.encoder_ffn,
        LARGE_HEAD.decoder_ffn,
        LARGE_HEAD.num_queries,
    ) == (1024, 32, 4096, 4096, 200)
    with pytest.raises(ValueError, match="hidden_dim 48"):
        HeadConfig(hidden_dim=48)


# Losses -------------------------------------------------------------------------------------------


def compute_mean_losses(predictions, label_map, config=CONFIG):
    sums = losses.compute_losses(predictions, label_map, config, ignore=IGNORE)
    counts = losses.count_targets(label_map, CLASSES, config, ignore=IGNORE)
    return {name: value / max(1, counts[name]) for name, value in sums.items()}


def test_without_ignored_pixels_the_losses_equal_those_of_transformers(monkeypatch):
    """Points are drawn away from the border."""
    predictions, label_map, rand = make_predictions(), make_label_map(), torch.rand
    monkeypatch.setattr(torch, "rand", lambda *size, **options: 0.1 + 0.8 * rand(*size, **options))
    torch.manual_seed(5)
    mean_losses = compute_mean_losses(predictions, label_map)
    classes = [image.unique() for image in label_map]
    masks = [
        torch.stack([image == label for label in present]).float()
        for image, present in zip(label_map, classes, strict=True)
    ]
    criterion = build_reference()[1]
    torch.manual_seed(5)
    expected = criterion(predictions.masks[0], predictions.classes[0], masks, classes)
    for name, value in (
        ("mask", "loss_mask"),
        ("dice", "loss_dice"),
        ("class", "loss_cross_entropy"),
    ):
        torch.testing.assert_close(mean_losses[name], expected[value], rtol=1e-4, atol=1e-5)


def sample_bilinear(grid, x, y):
    """Samples a map [h, w] at x, y from 0 to 1."""
    height, width = grid.shape
    x, y, total = x * width - 0.5, y * height - 0.5, 0.0
    for column in (math.floor(x), math.floor(x) + 1):
        for row in (math.floor(y), math.floor(y) + 1):
            value = grid[min(max(row, 0), height - 1), min(max(column, 0), width - 1)]
            total += (1 - abs(x - column)) * (1 - abs(y - row)) * float(value)
    return total


def compute_losses_slowly(logits, label_map, label, points):
    """Returns mean cross-entropy and dice of one mask over its points that are not ignored."""
    cross_entropy = sum_valid = sum_overlap = sum_probability = sum_truth = 0.0
    for x, y in points.tolist():
        logit, truth = sample_bilinear(logits, x, y), sample_bilinear(label_map == label, x, y)
        valid = sample_bilinear(label_map != IGNORE, x, y)
        probability = 1 / (1 + math.exp(-logit))
        cross_entropy -= truth * math.log(probability) + (valid - truth) * math.log(1 - probability)
        sum_valid, sum_overlap, sum_probability, sum_truth = (
            sum_valid + valid,
            sum_overlap + probability * truth,
            sum_probability + probability * valid,
            sum_truth + truth,
        )
    dice = 1 - (2 * sum_overlap + 1) / (sum_probability + sum_truth + 1)
    return cross_entropy / max(sum_valid, 1e-6), dice


def make_label_map_with_holes():
    label_map = make_label_map()
    label_map[0, :, 17:] = IGNORE
    label_map[1, 5:12, 3:20] = IGNORE
    return label_map


def test_matching_and_losses_equal_a_loop_over_points(monkeypatch):
    monkeypatch.setattr(losses, "draw_points", make_lattice)
    config = HeadConfig(**{**vars(CONFIG), "importance": 0.0})
    predictions, label_map = make_predictions(), make_label_map_with_holes()
    points, total = make_lattice((config.num_points,), None), {"mask": 0.0, "dice": 0.0}
    present_classes = losses.find_present_classes(label_map, CLASSES, IGNORE)
    matches = losses.match_queries(
        predictions.masks[0],
        predictions.classes[0],
        label_map,
        present_classes,
        config,
        ignore=IGNORE,
    )
    for index, classes in enumerate(present_classes):
        pairs = [
            [compute_losses_slowly(mask, label_map[index], label, points) for label in classes]
            for mask in predictions.masks[0][index]
        ]
        cross_entropy, dice = torch.tensor(pairs).unbind(-1)  # [Q, n]
        expected_cost = (
            5 * cross_entropy + 5 * dice - 2 * predictions.classes[0][index].softmax(-1)[:, classes]
        )
        truth, valid = losses.sample_class_masks(label_map[index], points, classes, IGNORE)
        logits = losses.sample_maps(predictions.masks[0][index : index + 1], points)[0]
        cost = losses.compute_match_costs(
            logits, predictions.classes[0][index], classes, truth, valid, config
        )
        torch.testing.assert_close(cost, expected_cost, rtol=1e-4, atol=1e-4)
        queries, class_indices = losses.assign(expected_cost)
        is_of_image = matches.image == index
        assert torch.equal(matches.query[is_of_image], queries) and torch.equal(
            matches.label[is_of_image], classes[class_indices]
        )
        total["mask"] += float(cross_entropy[queries, class_indices].sum())
        total["dice"] += float(dice[queries, class_indices].sum())
    sums = losses.compute_losses(predictions, label_map, config, ignore=IGNORE)
    for name, value in total.items():
        assert float(sums[name]) == pytest.approx(value, rel=1e-4)


def test_ignored_pixels_count_nowhere():
    """Their predictions change neither matching nor losses, and get no gradient."""
    predictions, label_map = make_predictions(width=22), make_label_map(width=44)
    label_map[:, :, 20:] = IGNORE
    logits = predictions.masks[0].clone()
    logits[..., 11:] = (
        50 * torch.randn(2, 6, 10, 11, generator=torch.Generator().manual_seed(9)).sign()
    )
    results = []
    for masks in (predictions.masks[0], logits):
        masks = masks.clone().requires_grad_()
        torch.manual_seed(1)
        mean_losses = compute_mean_losses(MaskPredictions((masks,), predictions.classes), label_map)
        (gradient,) = torch.autograd.grad(mean_losses["mask"] + mean_losses["dice"], masks)
        assert gradient[..., :10].any() and not gradient[..., 11:].any()
        results.append(mean_losses)
    for name, value in results[0].items():
        torch.testing.assert_close(value, results[1][name], msg=name)


def test_uncertain_points_are_selected_first_and_ignored_ones_last(monkeypatch):
    config = HeadConfig(**{**vars(CONFIG), "num_points": 200, "oversample": 4.0, "importance": 0.5})
    logits = torch.full((1, 1, 10, 40), 8.0)
    logits[..., 18:] = 0.1
    label_map = torch.zeros(1, 10, 40, dtype=torch.int64)
    label_map[..., 30:] = IGNORE
    torch.manual_seed(0)
    points = losses.select_points(
        logits,
        losses.Matches(*torch.zeros(3, 1, dtype=torch.int64)),
        label_map,
        config,
        ignore=IGNORE,
    )
    assert points.shape == (1, 200, 2)
    x = points[0, :, 0] * 40
    assert ((x[:100] > 18) & (x[:100] < 30.5)).all(), "uncertain and labeled"
    assert (x[100:] < 18).any() and (x[100:] > 31).any(), "the others anywhere"


def test_losses_of_parts_of_a_batch_add_up(monkeypatch):
    """Any number of processes or micro-batches, of any sizes, gives the mean over the step."""
    monkeypatch.setattr(losses, "draw_points", make_lattice)
    predictions, label_map = make_predictions(batch=5, layers=2), make_label_map(batch=5)
    label_map[1] = IGNORE
    expected_sums = losses.compute_losses(predictions, label_map, CONFIG, ignore=IGNORE)
    expected_counts = losses.count_targets(label_map, CLASSES, CONFIG, ignore=IGNORE)
    sums, counts = dict.fromkeys(expected_sums, 0.0), dict.fromkeys(expected_sums, 0)
    for images in (slice(0, 2), slice(2, 5)):
        part = MaskPredictions(
            tuple(layer[images] for layer in predictions.masks),
            tuple(layer[images] for layer in predictions.classes),
        )
        part_sums = losses.compute_losses(part, label_map[images], CONFIG, ignore=IGNORE)
        part_counts = losses.count_targets(label_map[images], CLASSES, CONFIG, ignore=IGNORE)
        for name, value in part_sums.items():
            sums[name] += value
            counts[name] += part_counts[name]
    assert counts == expected_counts
    for name, value in expected_sums.items():
        torch.testing.assert_close(sums[name], value)


def test_the_total_is_the_sum_over_layers(monkeypatch):
    monkeypatch.setattr(losses, "draw_points", make_lattice)
    head, predictions, label_map = (
        make_head(),
        make_predictions(layers=CONFIG.decoder_layers + 1),
        make_label_map(),
    )
    mean_losses, weights = compute_mean_losses(predictions, label_map), head.loss_weights
    expected = 0.0
    for masks, classes in zip(predictions.masks, predictions.classes, strict=True):
        layer_losses = compute_mean_losses(MaskPredictions((masks,), (classes,)), label_map)
        expected += 5 * layer_losses["mask"] + 5 * layer_losses["dice"] + 2 * layer_losses["class"]
    torch.testing.assert_close(
        sum(weights[name] * value for name, value in mean_losses.items()), expected
    )


def test_perfect_queries_cost_little():
    label_map = make_label_map()
    masks, classes = torch.full((2, 6, 30, 44), -20.0), torch.full((2, 6, CLASSES + 1), -20.0)
    classes[..., -1] = 0
    for image in range(2):
        for index, label in enumerate(label_map[image].unique().tolist()):
            query = 5 - index
            masks[image, query][label_map[image] == label] = 20.0
            classes[image, query] = -20.0
            classes[image, query, label] = 0.0
    mean_losses = compute_mean_losses(
        MaskPredictions((masks,), (classes,)),
        label_map,
        HeadConfig(**{**vars(CONFIG), "importance": 0.0, "num_points": 3000}),
    )
    assert (
        mean_losses["class"] < 1e-6 and mean_losses["dice"] < 0.1 and mean_losses["mask"] < 0.3
    ), "only points between two classes cost something"


def test_images_without_any_class_have_no_mask_loss():
    predictions, label_map = make_predictions(), make_label_map()
    label_map[0] = IGNORE
    assert compute_mean_losses(predictions, label_map)["mask"] > 0
    label_map[1] = IGNORE
    masks = predictions.masks[0].clone().requires_grad_()
    sums = losses.compute_losses(
        MaskPredictions((masks,), predictions.classes), label_map, CONFIG, ignore=IGNORE
    )
    assert losses.count_targets(label_map, CLASSES, CONFIG, ignore=IGNORE) == {
        "mask": 0,
        "dice": 0,
        "class": 12 * 100,
    }
    assert sums["mask"] == sums["dice"] == 0 and sums["class"] > 0
    (sums["mask"] + sums["dice"]).backward()
    assert not masks.grad.any(), "a gradient of zero, so that processes agree on what has one"


def test_with_more_classes_than_queries_some_stay_unmatched():
    predictions, label_map = (
        make_predictions(queries=2),
        make_label_map(batch=2, height=60, width=60),
    )
    num_present = [
        len(classes) for classes in losses.find_present_classes(label_map, CLASSES, IGNORE)
    ]
    assert min(num_present) > 2
    assert losses.count_targets(label_map, CLASSES, HeadConfig(num_queries=2), ignore=IGNORE) == {
        "mask": 4,
        "dice": 4,
        "class": 4000,
    }
    matches = losses.match_queries(
        predictions.masks[0],
        predictions.classes[0],
        label_map,
        losses.find_present_classes(label_map, CLASSES, IGNORE),
        CONFIG,
        ignore=IGNORE,
    )
    assert matches.image.tolist() == [0, 0, 1, 1] and sorted(matches.query[:2].tolist()) == [0, 1]


def test_costs_that_are_not_finite_are_matched_last():
    cost = torch.tensor([[float("nan"), 5.0], [1.0, float("inf")], [2.0, 3.0]])
    queries, classes = losses.assign(cost)
    assert dict(zip(classes.tolist(), queries.tolist(), strict=True)) == {0: 1, 1: 2}


@pytest.mark.parametrize("label", [CLASSES, 254, -1])
def test_labels_out_of_range_are_rejected(label):
    label_map = make_label_map()
    label_map[1, 3, 4] = label
    with pytest.raises(
        ValueError, match=f"label {label} is none of the {CLASSES} classes, nor 255"
    ):
        losses.compute_losses(make_predictions(), label_map, CONFIG, ignore=IGNORE)
    with pytest.raises(ValueError, match="is one of the 4 classes"):
        losses.count_targets(make_label_map(), CLASSES, CONFIG, ignore=2)


@pytest.mark.parametrize("kind", [torch.uint8, torch.int32])
def test_labels_of_other_integer_types_give_the_same_losses(kind):
    torch.manual_seed(0)
    expected = compute_mean_losses(make_predictions(), make_label_map_with_holes())
    torch.manual_seed(0)
    assert compute_mean_losses(make_predictions(), make_label_map_with_holes().to(kind)) == expected
