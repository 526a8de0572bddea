"""`beit3 convert`: released files become weights directories, and go back into files."""

from beit3.cli.options import NOT_RELEASED, Count, ReleasedOptions


def convert_official(
    weights: str, /, *, out: str, released: ReleasedOptions = NOT_RELEASED
) -> None:
    """Convert a released BEiT-3 checkpoint to a weights directory, or a directory to a file.

    ```
    beit3 convert official beit3_base_patch16_224.pth --text-model beit3.spm --out weights
    beit3 convert official runs/vqa-demo --out vqa.pth
    ```

    Args:
        weights: A released file; or a weights directory or run, which goes back into a file.
        out: A directory for a file, a .pth file for a directory.
    """
    from beit3.weights.convert import convert_released, export_released
    from beit3.weights.names import find_path

    path = find_path(weights)
    if not path.is_dir():
        lines = convert_released(path, out, **read_released(released))
    elif given := released.list_given():
        raise ValueError(f"{given[0]} is not for directories: leave it out")
    else:
        lines = export_released(path, out)
    print(*lines, sep="\n")


def convert_vqkd(weights: str, /, *, out: str, num_heads: Count | None = None) -> None:
    """Convert BEiT v2's visual tokenizer (VQ-KD) to a weights directory.

    ```
    beit3 convert vqkd vqkd_encoder_base_decoder_3x768x12_clip-d5036aa7.pth --out codes
    ```

    Args:
        weights: The released file.
        out: The directory to write.
        num_heads: Attention heads; by default 64 channels make one.
    """
    from beit3.weights.convert import convert_released
    from beit3.weights.names import find_path

    lines = convert_released(find_path(weights), out, task="vqkd", num_heads=num_heads)
    print(*lines, sep="\n")


def convert_timm(
    weights: str, /, *, out: str, num_heads: Count | None = None, classes: str | None = None
) -> None:
    """Convert timm's BEiT-3, the image half of the released networks, to a weights directory.

    ```
    beit3 convert timm beit3_base_patch16_224.in22k_ft_in1k.safetensors --out weights
    ```

    Args:
        weights: A file, a folder with timm's model.safetensors, or hf:owner/name.
        out: The directory to write.
        num_heads: Attention heads; by default those of timm's network of this width.
        classes: Names of the head's outputs, one per line.
    """
    from beit3.predict import read_classes
    from beit3.weights.convert import convert_timm as convert

    lines = convert(weights, out, num_heads=num_heads, classes=read_classes(classes))
    print(*lines, sep="\n")


def convert_clip(weights: str, /, *, out: str) -> None:
    """Convert the image tower of CLIP to a teacher for vqkd.

    ```
    beit3 convert clip ViT-B-16.pt --out clip
    ```

    Args:
        weights: A file under OpenAI's or Hugging Face's parameter names.
        out: The directory to write.
    """
    from beit3.weights.convert import convert_clip as convert

    print(*convert(weights, out), sep="\n")


def read_released(released: ReleasedOptions) -> dict:
    """Returns the options as arguments of `convert_released`, with their files read."""
    from beit3.predict import read_answers, read_classes
    from beit3.tokenizer.text import TextTokenizer

    return {
        "task": released.task,
        "num_heads": released.num_heads,
        "answers": read_answers(released.answers),
        "classes": read_classes(released.classes),
        "prompt": released.prompt or "",
        "tokenizer": TextTokenizer(released.text_model) if released.text_model else None,
    }
