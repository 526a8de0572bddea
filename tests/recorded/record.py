r"""Records a tiny network of torchscale, its states and its gradients.

    pip install --no-deps --target TORCHSCALE torchscale==0.3.0
    python tests/recorded/record.py --torchscale TORCHSCALE

The file torchscale.safetensors beside this script holds for each of `FORMS`:

- `<form>/model/<name>`: the state dict
- `<form>/<call>/embedding`, `layer0`, `layer1`, `output`: the states of each of `CALLS`
- `<form>/<call>/attention`: the attention weights [heads, B, N, N] of the first layer
- `<form>/gradients/<name>`: the gradients of the call with image and padded text

`inputs/` holds what both forms read. Its metadata say where it comes from. torchscale is the
implementation that BEiT-3 was released with (MIT license, Microsoft).
"""

import argparse
import json
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

FILE = Path(__file__).with_name("torchscale.safetensors")
FORMS = {"sub_ln": True, "plain": False}
SIZES = {
    "img_size": 16,
    "patch_size": 8,
    "vocab_size": 20,
    "encoder_embed_dim": 16,
    "encoder_attention_heads": 2,
    "encoder_ffn_embed_dim": 20,
    "encoder_layers": 2,
    "max_source_positions": 12,
}
NUM_IMAGE = 5
"""Tokens of an image: the class token and four patches."""
CALLS = {
    "image": ("image",),
    "masked image": ("image", "image_mask"),
    "text": ("text",),
    "padded text": ("text", "text_padding"),
    "pair": ("image", "text", "text_padding"),
    "pair with attention mask": ("image", "text", "attention_mask"),
}


def import_torchscale(folder: str) -> None:
    """Makes torchscale importable, with stubs of packages whose functions are never called."""
    sys.path.insert(0, folder)
    stubs: dict[str, tuple[str, ...]] = {
        "fairscale": (),
        "fairscale.nn": ("checkpoint_wrapper", "wrap"),
        "timm": (),
        "timm.models": (),
        "timm.models.layers": ("drop_path",),
    }
    for name, members in stubs.items():
        module = ModuleType(name)
        module.__dict__.update(dict.fromkeys(members))
        sys.modules[name] = module


def make_network(sub_ln: bool) -> Any:
    """Returns torchscale's BEiT3 with random values everywhere, in norms and biases too."""
    from torchscale.architecture.config import EncoderConfig
    from torchscale.model.BEiT3 import BEiT3

    torch.manual_seed(1 + sub_ln)
    network = BEiT3(
        EncoderConfig(
            multiway=True,
            subln=sub_ln,
            no_output_layer=True,
            layernorm_embedding=False,
            normalize_output=True,
            **SIZES,
        )
    )
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return network.eval()


def make_inputs() -> dict[str, Tensor]:
    """Returns the inputs under the argument names of `beit3`."""
    torch.manual_seed(0)
    text = torch.randint(4, SIZES["vocab_size"], (2, 6))
    padding = torch.arange(6) >= torch.tensor([[4], [6]])
    length = NUM_IMAGE + 6
    attention_mask = torch.ones(length, length).tril().bool()
    attention_mask[:NUM_IMAGE, :NUM_IMAGE] = True  # the text follows the image, as in captioning
    return {
        "image": torch.randn(2, 3, SIZES["img_size"], SIZES["img_size"]),
        "image_mask": torch.tensor([[1, 0, 0, 1], [0, 0, 1, 0]]).bool(),
        "text": text.masked_fill(padding, 1),
        "text_padding": padding,
        "attention_mask": attention_mask,
    }


def call(network: Any, inputs: dict[str, Tensor], names: tuple[str, ...]) -> dict[str, Tensor]:
    """Returns the states that a call leaves behind."""
    given = {name: inputs[name] for name in names}
    states: dict[str, Tensor] = {}

    def record(name: str, index: int | None = None) -> Any:
        def hook(module: nn.Module, arguments: Any, output: Any) -> None:
            states[name] = output if index is None else output[index]

        return hook

    layers = network.encoder.layers
    hooks = [
        layer.register_forward_hook(record(f"layer{number}", 0))
        for number, layer in enumerate(layers)
    ]
    hooks.append(layers[0].self_attn.register_forward_hook(record("attention", 1)))
    hooks.append(
        layers[0].register_forward_pre_hook(
            lambda module, arguments: states.__setitem__("embedding", arguments[0])
        )
    )
    mask = given.get("attention_mask")
    output = network(
        textual_tokens=given.get("text"),
        visual_tokens=given.get("image"),
        text_padding_position=given.get("text_padding"),
        vision_masked_position=given.get("image_mask"),
        attn_mask=None if mask is None else (~mask).float() * -1e8,
    )
    states["output"] = output["encoder_out"]
    for hook in hooks:
        hook.remove()
    return states


def record() -> dict[str, Tensor]:
    """Returns all tensors of the file."""
    inputs = make_inputs()
    torch.manual_seed(3)
    inputs["output_gradient"] = torch.randn(2, NUM_IMAGE + 6, SIZES["encoder_embed_dim"])
    tensors = {f"inputs/{name}": tensor for name, tensor in inputs.items()}
    for form, sub_ln in FORMS.items():
        network = make_network(sub_ln)
        tensors |= {f"{form}/model/{name}": p for name, p in network.state_dict().items()}
        for name, arguments in CALLS.items():
            with torch.no_grad():
                states = call(network, inputs, arguments)
            tensors |= {f"{form}/{name}/{state}": value for state, value in states.items()}
        output = call(network, inputs, CALLS["pair"])["output"]
        kept = ~torch.cat((torch.zeros(2, NUM_IMAGE).bool(), inputs["text_padding"]), 1)
        (output * inputs["output_gradient"])[kept].sum().backward()
        tensors |= {
            f"{form}/gradients/{name}": parameter.grad
            for name, parameter in network.named_parameters()
            if parameter.grad is not None
        }
    return {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--torchscale", required=True, help="folder that torchscale was put into")
    args = parser.parse_args()
    import_torchscale(args.torchscale)
    metadata = {
        "torchscale": version("torchscale"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, CPU, float32",
        "sizes": json.dumps(SIZES),
        "command": "python tests/recorded/record.py --torchscale TORCHSCALE",
    }
    save_file(record(), FILE, metadata)
    print(f"{FILE}: {FILE.stat().st_size} bytes")


if __name__ == "__main__":
    main()
