"""ViT-Adapter: gates of 0 leave the trunk unchanged, images may have any size, and every parameter
is trained."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from beit3.model.config import GIANT, IMAGE, ModelConfig
from beit3.model.trunk import ImageTrunk
from beit3.ops.batch_norm import sync_batch_norms
from beit3.ops.deformable import Grids
from beit3.seeding import make_generator
from beit3.segmentation import interaction
from beit3.segmentation.adapter import AdapterConfig, ViTAdapter
from beit3.segmentation.interaction import ConvFeedForward, DeformableAttention, Extractor

MODEL = ModelConfig(dim=32, depth=5, num_heads=4, ffn_dim=64, image_size=64, vocab_size=64)
SMALL = AdapterConfig(inplanes=8, num_interactions=3)


@torch.no_grad()
def init_module(module):
    """Initializes a module as a task does."""
    for name, parameter in module.named_parameters():
        module.init_parameter(name, parameter, make_generator(0, name))
    if isinstance(module, ViTAdapter):
        module.reset_buffers()
    return module


def make_adapter(model=MODEL, config=SMALL, *, window=0):
    return init_module(ViTAdapter(model, config)), init_module(ImageTrunk(model, window=window))


@pytest.mark.parametrize("window", [0, 2])
def test_gates_of_zero_leave_the_trunk_unchanged(window):
    adapter, trunk = make_adapter(window=window)
    image = torch.randn(2, 3, 37, 101)
    plain = trunk(F.pad(image, (0, 11, 0, 11)))
    assert torch.equal(adapter.interact(image, trunk)[0][-1], plain)
    for injector in adapter.injectors:
        nn.init.constant_(injector.gate, 0.1)
    assert (adapter.interact(image, trunk)[0][-1] - plain).abs().max() > 1e-3


def list_state_indices(num_interactions: int) -> list[int]:
    return make_adapter(replace(MODEL, depth=6), replace(SMALL, num_interactions=num_interactions))[
        0
    ].state_indices


def test_each_map_adds_the_trunk_states_of_its_depth():
    """The adapter's own maps are 0, and the expected states come from single blocks."""
    assert [list_state_indices(rounds) for rounds in (1, 2, 3, 4, 6)] == [
        [0] * 4,
        [0, 0, 1, 1],
        [0, 1, 2, 2],
        [0, 1, 2, 3],
        [1, 2, 4, 5],
    ]
    adapter, trunk = make_adapter(replace(MODEL, depth=4), replace(SMALL, num_interactions=4))
    adapter.norms = nn.ModuleList(nn.Identity() for _ in range(4))
    states, priors = adapter.interact(image := torch.randn(2, 3, 48, 80), trunk)
    adapter.interact = lambda *_: (states, [torch.zeros_like(prior) for prior in priors])
    maps, expected = adapter(image, trunk), trunk.embed(image)
    for block, feature_map in zip(trunk.blocks, maps, strict=True):
        expected = block(expected)
        expected_map = F.interpolate(
            trunk.norm((expected,), (IMAGE,))[0].movedim(3, 1),
            feature_map.shape[2:],
            mode="bilinear",
        )
        torch.testing.assert_close(feature_map, expected_map, rtol=0, atol=1e-6)


@pytest.mark.parametrize("patch", [8, 14, 16])
@pytest.mark.parametrize("size", [(64, 96), (72, 88), (37, 101), (16, 240), (5, 3)])
def test_images_of_any_size_are_accepted(patch, size):
    model = replace(MODEL, patch_size=patch, image_size=4 * patch)
    adapter, trunk = make_adapter(model)
    maps = adapter.eval()(torch.randn(2, 3, *size), trunk)
    height, width = adapter.compute_padded_size(*size)
    assert (
        height % patch == width % patch == 0
        and 0 <= height - size[0] < patch
        and 0 <= width - size[1] < patch
    )
    assert adapter.strides == ((2, 4, 8, 16) if patch == 8 else (4, 8, 16, 32))
    for feature_map, stride in zip(maps, adapter.strides, strict=True):
        assert (
            feature_map.shape == (2, model.dim, -(-height // stride), -(-width // stride))
            and feature_map.isfinite().all()
        )


def test_padding_equals_zeros_in_the_image():
    adapter, trunk = make_adapter()
    image = torch.randn(1, 3, 41, 64)
    for padded_inside, padded_before in zip(
        adapter.eval()(image, trunk), adapter(F.pad(image, (0, 0, 0, 7)), trunk), strict=True
    ):
        assert torch.equal(padded_inside, padded_before)


def test_every_parameter_gets_a_gradient():
    """Away from the initial zeros, and with batch norms in eval mode: in training they take away
    the constants before them."""
    adapter, trunk = make_adapter(config=replace(SMALL, gate_init=0.1))
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    maps = adapter.eval()(torch.randn(1, 3, 64, 80), trunk)
    sum((feature_map * torch.randn_like(feature_map)).sum() for feature_map in maps).backward()
    for name, parameter in [*adapter.named_parameters(), *trunk.named_parameters()]:
        if name not in ImageTrunk.unused_parameters:
            assert parameter.grad.abs().sum() > 0, name


def test_gates_get_a_gradient_in_the_first_step():
    adapter, trunk = make_adapter()
    sum(
        feature_map.square().sum()
        for feature_map in adapter.eval()(torch.randn(1, 3, 64, 80), trunk)
    ).backward()
    for injector in adapter.injectors:
        assert injector.gate.grad.abs().min() > 0


def test_recomputing_changes_nothing():
    """Gradients with stochastic depth, running statistics and their count: bit for bit."""
    results = []
    for recompute in (False, True):
        adapter, trunk = make_adapter(
            config=replace(SMALL, gate_init=0.1, drop_path_rate=0.5, recompute=recompute)
        )
        torch.manual_seed(1)
        maps = adapter.train()(torch.randn(3, 3, 48, 80), trunk)
        sum((feature_map * torch.randn_like(feature_map)).sum() for feature_map in maps).backward()
        results.append(
            [parameter.grad for parameter in adapter.parameters()] + list(adapter.buffers())
        )
        assert (
            adapter.norms[0].num_batches_tracked
            == adapter.prior.stem[0].norm.num_batches_tracked
            == 1
        )
        assert adapter.prior.stem[0].norm.running_mean.abs().sum() > 0
    for stored, recomputed in zip(*results, strict=True):
        assert torch.equal(stored, recomputed)


def test_recomputing_stores_fewer_activations():
    num_stored = []
    for recompute in (False, True):
        adapter, trunk = make_adapter(config=replace(SMALL, recompute=recompute))
        saved_tensors: dict[int, torch.Tensor] = {}

        def save_tensor(tensor, saved_tensors=saved_tensors):
            saved_tensors[tensor.data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(save_tensor, lambda tensor: tensor):
            maps = adapter(torch.randn(1, 3, 64, 64), trunk)
        num_stored.append(sum(tensor.numel() for tensor in saved_tensors.values()))
        assert maps[0].requires_grad
    assert num_stored[1] < 0.7 * num_stored[0]


def test_the_giant_can_be_built_and_run_on_meta():
    model = replace(GIANT, patch_size=16, image_size=896)
    with torch.device("meta"):
        adapter, trunk = ViTAdapter(model, AdapterConfig(recompute=True)), ImageTrunk(model)
        maps = adapter(torch.empty(1, 3, 896, 896), trunk)
        assert adapter.last_blocks == (9, 19, 29, 39)
    assert [tuple(feature_map.shape) for feature_map in maps] == [
        (1, 1408, side, side) for side in (224, 112, 56, 28)
    ]
    assert all(tensor.is_meta for tensor in [*maps, *adapter.state_dict().values()])


def test_an_adapter_built_on_meta_gets_the_same_values():
    with torch.device("meta"):
        adapter = ViTAdapter(MODEL, SMALL)
    adapter._apply(
        lambda tensor: torch.full_like(
            tensor, 7 if tensor.dtype == torch.int64 else torch.nan, device="cpu"
        )
    )
    expected = make_adapter()[0].state_dict()
    for name, value in init_module(adapter).state_dict().items():
        assert value.isfinite().all() and torch.equal(value, expected[name]), name


def test_initial_values_follow_the_release():
    adapter = init_module(
        ViTAdapter(replace(MODEL, dim=64, num_heads=8), AdapterConfig(gate_init=1e-6, num_points=2))
    )
    attention = adapter.injectors[0].attention
    ways = [(1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1)]
    steps = torch.tensor(
        [[[[step * x, step * y] for step in (1, 2)] for _ in range(3)] for x, y in ways],
        dtype=torch.float32,
    )
    torch.testing.assert_close(attention.offsets.bias.view(8, 3, 2, 2), steps)
    assert (
        not attention.offsets.weight.any()
        and not attention.weights.weight.any()
        and not attention.weights.bias.any()
    )
    bound = (6 / (64 + 32)) ** 0.5
    assert attention.value.weight.abs().max() <= bound and attention.value.weight.std() > bound / 2
    assert (adapter.injectors[1].gate == 1e-6).all() and 0.8 < adapter.level_embedding.std() < 1.2
    assert (adapter.norms[0].weight == 1).all() and (
        adapter.extractors[0].ffn_norm.weight == 1
    ).all()
    assert abs(adapter.prior.stem[1].conv.weight.std() / (2 / (9 * 64)) ** 0.5 - 1) < 0.05
    assert abs(adapter.enlarge.weight.std() / (2 / (4 * 64)) ** 0.5 - 1) < 0.05
    assert abs(adapter.extractors[0].ffn.conv.weight.std() / (2 / 9) ** 0.5 - 1) < 0.2
    assert abs(adapter.extractors[0].ffn.fc1.weight.std() / 0.02 - 1) < 0.1


def test_attention_reads_the_neighbor_at_its_offset():
    attention = DeformableAttention(4, 4, num_heads=1, num_maps=2, num_points=1)
    for part in (attention.value, attention.out):
        nn.init.eye_(part.weight)
        nn.init.zeros_(part.bias)
    nn.init.zeros_(attention.offsets.weight)
    nn.init.zeros_(attention.weights.weight)
    attention.offsets.bias.data = torch.tensor(
        [1.0, 0.0, 0.0, 1.0]
    )  # one to the right in the first map, one down in the second
    attention.weights.bias.data = torch.tensor([0.0, 0.0])
    first, second = torch.randn(1, 3, 5, 4), torch.randn(1, 3, 5, 4)
    grids = Grids.from_shapes([(3, 5), (3, 5)], first)
    features = torch.cat((first.flatten(1, 2), second.flatten(1, 2)), 1)
    output = attention(torch.randn(1, 15, 4), grids.centers[:15], features, grids).view(1, 3, 5, 4)
    right, below = F.pad(first, (0, 0, 0, 1))[:, :, 1:], F.pad(second, (0, 0, 0, 0, 0, 1))[:, 1:]
    torch.testing.assert_close(output, (right + below) / 2)


def test_attention_equals_transformers_where_values_are_as_wide_as_queries():
    modeling = pytest.importorskip("transformers.models.mask2former.modeling_mask2former")
    reference = modeling.Mask2FormerPixelDecoderEncoderMultiscaleDeformableAttention(
        16, num_heads=4, n_levels=3, n_points=2
    ).double()
    attention = DeformableAttention(16, 16, num_heads=4, num_maps=3, num_points=2).double()
    pairs = {
        "offsets": "sampling_offsets",
        "weights": "attention_weights",
        "value": "value_proj",
        "out": "output_proj",
    }
    for name, reference_name in pairs.items():
        parameters = reference.get_submodule(reference_name).state_dict()
        getattr(attention, name).load_state_dict(parameters)
    shapes = [(4, 6), (2, 3), (1, 2)]
    features, query = (
        torch.randn(2, 32, 16, dtype=torch.float64),
        torch.randn(2, 24, 16, dtype=torch.float64),
    )
    grids = Grids.from_shapes(shapes, features)
    points = grids.centers[:24]
    expected, _ = reference(
        query,
        encoder_hidden_states=features,
        reference_points=points[None, :, None].expand(2, -1, 3, -1),
        spatial_shapes_list=shapes,
    )
    torch.testing.assert_close(
        attention(query, points, features, grids), expected, rtol=0, atol=1e-12
    )


def test_the_feed_forward_network_treats_each_map_separately():
    network, shapes = ConvFeedForward(8, 4), ((3, 5), (2, 2), (1, 4))
    states = torch.randn(2, 23, 8)
    alone = [
        network(part, (shape,))
        for part, shape in zip(states.split([15, 4, 4], 1), shapes, strict=True)
    ]
    torch.testing.assert_close(network(states, shapes), torch.cat(alone, 1))


def test_stochastic_depth_drops_whole_samples():
    attention = DeformableAttention(8, 8, num_heads=2, num_maps=1, num_points=1)
    extractor = Extractor(8, attention, ffn_dim=8, drop_path_rate=0.25)
    states, grids = torch.randn(64, 6, 8), Grids.from_shapes([(2, 3)], torch.empty(0))
    with torch.no_grad():
        read = states + attention(
            extractor.query_norm(states), grids.centers, extractor.feature_norm(states), grids
        )
        change = extractor.eval()(states, grids, states, grids) - read
        torch.manual_seed(0)
        scales = (extractor.train()(states, grids, states, grids) - read) / change
    is_kept = scales.mean((1, 2)) > 0.5
    torch.testing.assert_close(
        scales,
        torch.where(is_kept, 1 / 0.75, 0.0)[:, None, None].expand_as(scales),
        rtol=0,
        atol=1e-2,
    )
    assert 0.6 < is_kept.float().mean() < 0.9


def test_bfloat16_is_near_float32(monkeypatch):
    adapter, trunk = make_adapter(config=replace(SMALL, gate_init=0.1))
    image, dtypes, sample_deformable = torch.randn(1, 3, 72, 88), [], interaction.sample_deformable

    def record_dtypes(values, shapes, points, weights):
        dtypes.append((values.dtype, points.dtype, weights.dtype))
        return sample_deformable(values, shapes, points, weights)

    monkeypatch.setattr(interaction, "sample_deformable", record_dtypes)
    with torch.no_grad():
        exact = adapter.eval()(image, trunk)
        dtypes.clear()
        with torch.autocast("cpu", torch.bfloat16):
            rough = adapter(image, trunk)
    assert set(dtypes) == {(torch.bfloat16, torch.float32, torch.float32)}
    for expected, actual in zip(exact, rough, strict=True):
        assert actual.isfinite().all() and (expected - actual).norm() < 0.03 * expected.norm()


def test_norms_are_synchronized_only_for_several_processes_on_cuda(monkeypatch):
    adapter = ViTAdapter(MODEL, SMALL)
    names = [name for name, _ in adapter.named_parameters()]
    assert (
        sync_batch_norms(adapter, torch.device("cuda")) is adapter
        and type(adapter.norms[0]) is nn.BatchNorm2d
    )
    monkeypatch.setattr("beit3.ops.batch_norm.world_size", lambda: 2)
    assert type(sync_batch_norms(adapter, torch.device("cpu")).norms[0]) is nn.BatchNorm2d
    assert (
        type(sync_batch_norms(adapter, torch.device("cuda")).prior.stem[0].norm) is nn.SyncBatchNorm
    )
    assert [name for name, _ in init_module(adapter).named_parameters()] == names


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (AdapterConfig(num_heads=5), "deform_ratio 0.5 of dim 32 is no multiple of num_heads 5"),
        (AdapterConfig(num_interactions=6), "num_interactions 6 of a trunk of 5 blocks"),
    ],
)
def test_a_config_that_does_not_fit_the_trunk_is_rejected(config, message):
    with pytest.raises(ValueError, match=message):
        ViTAdapter(MODEL, config)
