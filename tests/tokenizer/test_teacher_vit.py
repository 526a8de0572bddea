"""CLIP and DINO as teachers, against a second implementation of the networks, and a BEiT-3."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from beit3.tokenizer.teacher_loading import load_teacher
from beit3.tokenizer.teacher_vit import BackboneTeacher, CLIPTeacher, DINOTeacher
from beit3.tokenizer.vit import resample_learned_positions

DIM, DEPTH, FFN, PATCH, GRID, OUT = 128, 2, 160, 4, 3, 24


def pixels(size: int = PATCH * GRID, batch: int = 2) -> Tensor:
    return torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(size))


def random_state(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) * 0.1 for name, shape in shapes.items()}


def openai_state() -> dict[str, Tensor]:
    shapes: dict[str, tuple[int, ...]] = {
        "visual.class_embedding": (DIM,),
        "visual.positional_embedding": (1 + GRID**2, DIM),
        "visual.proj": (DIM, OUT),
        "visual.conv1.weight": (DIM, 3, PATCH, PATCH),
        "token_embedding.weight": (7, 5),
        "logit_scale": (),
    }
    for name in (
        "ln_pre",
        "ln_post",
        *(f"transformer.resblocks.{i}.ln_{n}" for i in range(DEPTH) for n in (1, 2)),
    ):
        shapes |= {f"visual.{name}.weight": (DIM,), f"visual.{name}.bias": (DIM,)}
    for i in range(DEPTH):
        block = f"visual.transformer.resblocks.{i}"
        shapes |= {
            f"{block}.attn.in_proj_weight": (3 * DIM, DIM),
            f"{block}.attn.in_proj_bias": (3 * DIM,),
        }
        for name, (rows, columns) in {
            "attn.out_proj": (DIM, DIM),
            "mlp.c_fc": (FFN, DIM),
            "mlp.c_proj": (DIM, FFN),
        }.items():
            shapes |= {f"{block}.{name}.weight": (rows, columns), f"{block}.{name}.bias": (rows,)}
    return random_state(shapes)


def hugging_face_state(openai: dict[str, Tensor]) -> dict[str, Tensor]:
    v = "vision_model"
    state = {
        f"{v}.embeddings.class_embedding": openai["visual.class_embedding"],
        f"{v}.embeddings.position_embedding.weight": openai["visual.positional_embedding"],
        f"{v}.embeddings.patch_embedding.weight": openai["visual.conv1.weight"],
        f"{v}.embeddings.position_ids": torch.arange(1 + GRID**2)[None],
        "visual_projection.weight": openai["visual.proj"].T.contiguous(),
        "text_model.final_layer_norm.weight": torch.ones(5),
    }
    for kind in ("weight", "bias"):
        state[f"{v}.pre_layrnorm.{kind}"] = openai[f"visual.ln_pre.{kind}"]
        state[f"{v}.post_layernorm.{kind}"] = openai[f"visual.ln_post.{kind}"]
        for i in range(DEPTH):
            ours, theirs = f"{v}.encoder.layers.{i}", f"visual.transformer.resblocks.{i}"
            for part, rows in zip(
                "qkv", openai[f"{theirs}.attn.in_proj_{kind}"].chunk(3), strict=True
            ):
                state[f"{ours}.self_attn.{part}_proj.{kind}"] = rows.clone()
            for a, b in (
                ("self_attn.out_proj", "attn.out_proj"),
                ("layer_norm1", "ln_1"),
                ("layer_norm2", "ln_2"),
                ("mlp.fc1", "mlp.c_fc"),
                ("mlp.fc2", "mlp.c_proj"),
            ):
                state[f"{ours}.{a}.{kind}"] = openai[f"{theirs}.{b}.{kind}"]
    return state


def layer_norm(x: Tensor, state: dict[str, Tensor], name: str, eps: float) -> Tensor:
    return F.layer_norm(x, (DIM,), state[f"{name}.weight"], state[f"{name}.bias"], eps)


def attend(x: Tensor, weight: Tensor, bias: Tensor, out: Tensor, out_bias: Tensor) -> Tensor:
    attention = nn.MultiheadAttention(DIM, 2, batch_first=True)
    attention.load_state_dict(
        {
            "in_proj_weight": weight,
            "in_proj_bias": bias,
            "out_proj.weight": out,
            "out_proj.bias": out_bias,
        }
    )
    return attention(x, x, x)[0]


def linear(x: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def clip_features(state: dict[str, Tensor], images: Tensor) -> Tensor:
    """OpenAI's image tower, all patch tokens."""
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    patches = F.unfold((images - mean) / std, PATCH, stride=PATCH).transpose(1, 2)
    x = patches @ state["visual.conv1.weight"].flatten(1).T
    x = (
        torch.cat((state["visual.class_embedding"].expand(len(x), 1, DIM), x), 1)
        + state["visual.positional_embedding"]
    )
    x = layer_norm(x, state, "visual.ln_pre", 1e-5)
    for i in range(DEPTH):
        block = f"visual.transformer.resblocks.{i}"
        attention = (
            state[f"{block}.attn.{n}"]
            for n in ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")
        )
        x = x + attend(layer_norm(x, state, f"{block}.ln_1", 1e-5), *attention)
        hidden = linear(layer_norm(x, state, f"{block}.ln_2", 1e-5), state, f"{block}.mlp.c_fc")
        x = x + linear(hidden * torch.sigmoid(1.702 * hidden), state, f"{block}.mlp.c_proj")
    return layer_norm(x, state, "visual.ln_post", 1e-5)[:, 1:].detach() @ state["visual.proj"]


def dino_state() -> dict[str, Tensor]:
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, DIM),
        "pos_embed": (1, 1 + GRID**2, DIM),
        "patch_embed.proj.weight": (DIM, 3, PATCH, PATCH),
        "patch_embed.proj.bias": (DIM,),
    }
    for name in ("norm", *(f"blocks.{i}.norm{n}" for i in range(DEPTH) for n in (1, 2))):
        shapes |= {f"{name}.weight": (DIM,), f"{name}.bias": (DIM,)}
    for i in range(DEPTH):
        for name, (rows, columns) in {
            "attn.qkv": (3 * DIM, DIM),
            "attn.proj": (DIM, DIM),
            "mlp.fc1": (FFN, DIM),
            "mlp.fc2": (DIM, FFN),
        }.items():
            shapes |= {
                f"blocks.{i}.{name}.weight": (rows, columns),
                f"blocks.{i}.{name}.bias": (rows,),
            }
    return random_state(shapes)


def dino_features(state: dict[str, Tensor], images: Tensor, grid: int = GRID) -> Tensor:
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    patches = F.unfold((images - mean) / std, PATCH, stride=PATCH).transpose(1, 2)
    x = patches @ state["patch_embed.proj.weight"].flatten(1).T + state["patch_embed.proj.bias"]
    x = torch.cat((state["cls_token"].expand(len(x), 1, DIM), x), 1) + resample_learned_positions(
        state["pos_embed"], (grid, grid)
    )
    for i in range(DEPTH):
        attention = (
            state[f"blocks.{i}.attn.{n}"]
            for n in ("qkv.weight", "qkv.bias", "proj.weight", "proj.bias")
        )
        x = x + attend(layer_norm(x, state, f"blocks.{i}.norm1", 1e-6), *attention)
        hidden = linear(
            layer_norm(x, state, f"blocks.{i}.norm2", 1e-6), state, f"blocks.{i}.mlp.fc1"
        )
        x = x + linear(F.gelu(hidden), state, f"blocks.{i}.mlp.fc2")
    return layer_norm(x, state, "norm", 1e-6)[:, 1:].detach()


def close(ours: Tensor, theirs: Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(ours, theirs, atol=atol, rtol=1e-4)


def test_clip_from_openai_names_in_half_precision(tmp_path: Path):
    state = {name: tensor.half() for name, tensor in openai_state().items()}
    torch.save(state, tmp_path / "clip.pth")
    teacher = load_teacher("clip", path=tmp_path / "clip.pth", patch_size=PATCH)
    features = teacher.extract_features(pixels())
    assert teacher.dim == OUT and features.dtype == torch.float32
    close(
        features, clip_features({name: tensor.float() for name, tensor in state.items()}, pixels())
    )


def test_clip_from_hugging_face_names(tmp_path: Path):
    state = openai_state()
    save_file(hugging_face_state(state), tmp_path / "model.safetensors")
    teacher = load_teacher("clip", path=tmp_path / "model.safetensors", patch_size=PATCH)
    close(teacher.extract_features(pixels()), clip_features(state, pixels()))


@pytest.mark.parametrize("wrapping", ["plain", "teacher"])
def test_dino(tmp_path: Path, wrapping: str):
    state = dino_state()
    saved: dict = {**state, "head.mlp.weight": torch.ones(3)}
    if wrapping == "teacher":
        saved = {
            "epoch": 3,
            "teacher": {f"module.backbone.{name}": tensor for name, tensor in state.items()},
        }
    torch.save(saved, tmp_path / "dino.pth")
    teacher = load_teacher("dino", path=tmp_path / "dino.pth", patch_size=PATCH)
    assert teacher.dim == DIM
    close(teacher.extract_features(pixels()), dino_features(state, pixels()))
    close(teacher.extract_features(pixels(20)), dino_features(state, pixels(20), 5))


def test_another_patch_size_gives_the_tokenizers_grid():
    state = dino_state()
    teacher = DINOTeacher(state, patch_size=2 * PATCH)
    images = pixels(2 * PATCH * GRID)
    smaller = F.interpolate(images, size=(12, 12), mode="bicubic", antialias=True).clamp(0, 1)
    close(teacher.extract_features(images), dino_features(state, smaller))


def test_teachers_are_frozen():
    teacher = CLIPTeacher(openai_state(), patch_size=PATCH).train()
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert not teacher.extract_features(pixels().requires_grad_()).requires_grad


def test_refusals(tmp_path: Path):
    with pytest.raises(ValueError, match="unknown teacher 'vae'"):
        load_teacher("vae", patch_size=4)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="give the path"):
        load_teacher("clip", patch_size=4)
    with pytest.raises(ValueError, match="no teacher weights at"):
        load_teacher("dino", path=tmp_path / "none.pth", patch_size=4)
    torch.save({"args": SimpleNamespace()}, tmp_path / "objects.pth")
    with pytest.raises(ValueError, match="'args' is of type SimpleNamespace"):
        load_teacher("dino", path=tmp_path / "objects.pth", patch_size=4)
    torch.save(torch.ones(2), tmp_path / "tensor.pth")
    with pytest.raises(ValueError, match="holds a Tensor"):
        load_teacher("dino", path=tmp_path / "tensor.pth", patch_size=4)
    with pytest.raises(ValueError, match="normalized"):
        DINOTeacher(dino_state(), patch_size=PATCH).extract_features(pixels() * 2 - 1)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_torchscript_archive_is_refused_with_a_remedy(tmp_path: Path):
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), tmp_path / "ViT-B-16.pt")
    with pytest.raises(ValueError, match="TorchScript archive: convert it"):
        load_teacher("clip", path=tmp_path / "ViT-B-16.pt", patch_size=4)


def test_states_of_other_networks_are_refused_by_name():
    dino = dino_state()
    with pytest.raises(ValueError, match=r"blocks\.1\.norm2\.bias"):
        DINOTeacher(
            {name: tensor for name, tensor in dino.items() if name != "blocks.1.norm2.bias"},
            patch_size=4,
        )
    with pytest.raises(ValueError, match="rope"):
        DINOTeacher({**dino, "rope": torch.ones(1)}, patch_size=4)
    with pytest.raises(ValueError, match="visual.proj"):
        CLIPTeacher(dino, patch_size=4)


def test_a_backbone_as_teacher():
    class Encoded:
        def __init__(self, states: Tensor):
            self.states = states

        def of(self, modality: str) -> Tensor:
            assert modality == "image"
            return self.states

    class Backbone(nn.Module):
        def __init__(self):
            super().__init__()
            self.config = SimpleNamespace(dim=48, patch_size=4)
            self.patch = nn.Conv2d(3, 48, 4, stride=4)

        def forward(self, image: Tensor) -> Encoded:
            states = self.patch(image).flatten(2).transpose(1, 2)
            return Encoded(torch.cat((states.new_zeros(len(image), 1, 48), states), 1))

    backbone = Backbone()
    teacher = BackboneTeacher(backbone, patch_size=backbone.config.patch_size)
    features = teacher.extract_features(pixels())
    assert teacher.dim == 48 and not features.requires_grad
    close(features, backbone.patch(pixels() * 2 - 1).flatten(2).transpose(1, 2).detach())
