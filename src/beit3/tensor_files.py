"""Named tensors in files: reads pickles of `torch.save`, safetensors, and shards of both.

The content decides how a file is read, not its ending. Nothing in a file is executed. Tensors are
written as safetensors.
"""

import argparse
import pickle
import re
import stat
import types
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from beit3.files import read_json

CONTAINERS = ("model", "module", "state_dict", "model_state_dict", "model_state", "network", "net")
"""Keys under which trainers store the state dict of a checkpoint."""

AVERAGES = (
    "model_ema",
    "ema",
    "ema_model",
    "state_dict_ema",
    "ema_state_dict",
    "model_ema_state_dict",
)
"""Keys of a moving average of the weights, which is read where it is alone."""

WRAPPERS = re.compile(
    r"^(?:(?:module|model|network|net)\.)+"
    r"|(?:(?<=\.)|^)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
"""Parts of names that DistributedDataParallel, torch.compile, FSDP and trainers put there."""

AVERAGE_COUNT = "n_averaged"
"""A counter that torch.optim.swa_utils.AveragedModel stores among its tensors."""

SIGNATURES = (
    (b"version https://git-lfs", "a Git LFS pointer in place of the file: run git lfs pull"),
    (b"\x89HDF", "an HDF5 file, as Keras writes it: a .pth or .safetensors file is needed"),
    (b"GGUF", "a GGUF file: a .pth or .safetensors file is needed"),
    (b"\x1f\x8b", "compressed by gzip: unpack it first"),
    (b"BZh", "compressed by bzip2: unpack it first"),
    (b"\xfd7zXZ", "compressed by xz: unpack it first"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd: unpack it first"),
    (b"7z\xbc\xaf", "a 7z archive: unpack it first"),
)
"""First bytes of files that people give by mistake -> what the file is, and the remedy."""

LEGACY_MAGIC = b"\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"
"""Number at the start of the files that `torch.save` wrote before it wrote zip archives."""

NUMPY_CODES = np.typecodes["AllInteger"] + np.typecodes["AllFloat"] + "?SU"


@dataclass(frozen=True)
class TensorFile:
    """The named tensors of a file, and what was passed over in it."""

    tensors: dict[str, Tensor]
    notes: tuple[str, ...] = ()
    """Lines for the user."""


def read_tensors(
    path: Path, *, containers: Sequence[str] = CONTAINERS, averages: Sequence[str] = AVERAGES
) -> TensorFile:
    """Returns the tensors of a file, without the names that wrappers put in front.

    Args:
        path: A file of `torch.save` or safetensors, or the `.index.json` of sharded ones.
        containers: Keys under which the state dict may lie, at any depth.
        averages: Keys that are looked at where there is none of `containers`.

    Raises:
        ValueError: The file is damaged or of another kind, holds something else than tensors and
            plain values, two state dicts, or a value that is no finite number.
    """
    state, notes = _find_state_dict(_read_content(path), path, containers, averages)
    state, passed_over = _select_tensors(state, path)
    notes += passed_over
    tensors = _strip_wrappers(state, path)
    check_finite(tensors, path)
    return TensorFile(tensors, tuple(notes))


def check_finite(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raises ValueError that names the first tensor with a NaN or infinite value.

    The extremes of a tensor tell it without memory, in 0.1 s per GB on one core, 0.2 in bfloat16.
    """
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        if tensor.itemsize == 1:  # torch compares no float8
            tensor = tensor.float()
        low, high = torch.aminmax(tensor)
        if torch.isfinite(low) and torch.isfinite(high):
            continue
        raise ValueError(
            f"{path}: {name} holds NaN or infinite values: "
            "the training that wrote it diverged, or it is damaged; give other weights"
        )


def write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Writes tensors as a safetensors file, which the users may read that the umask allows.

    safetensors 0.8 writes to a temporary file that its owner alone may read, and renames it.
    """
    path.touch()
    mode = path.stat().st_mode
    save_file(dict(tensors), path)
    if path.stat().st_mode != mode:  # some file systems have one mode and refuse chmod
        path.chmod(stat.S_IMODE(mode))


def is_torchscript(path: Path) -> bool:
    """Returns whether a file is a TorchScript archive, as OpenAI's CLIP files are.

    Such a file can only be opened by executing it.
    """
    return any(name.endswith("/constants.pkl") for name in _list_members(path))


# Content ------------------------------------------------------------------------------------------


def _read_content(path: Path, *, is_shard: bool = False) -> Any:
    """Returns the deserialized file; its first bytes tell the format."""
    with path.open("rb") as file:
        start = file.read(512)
    if not start:
        raise ValueError(f"{path} is empty: download it again")
    for signature, description in SIGNATURES:
        if start.startswith(signature):
            raise ValueError(f"{path} is {description}")
    if start[:4] == b"PK\x03\x04" or start[:1] == b"\x80":
        return _read_pickle(path, start)
    if start[8:9] == b"{":  # safetensors: 8 bytes of length, then a JSON header
        return _read_safetensors(path)
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text.startswith(b"{"):
        if is_shard:
            raise ValueError(f"{path} is JSON, an index names files of tensors: download it again")
        return _read_shards(path)
    if text.startswith(b"<"):
        raise ValueError(f"{path} is a web page in place of the file: download it again")
    if start[257:262] == b"ustar":
        raise ValueError(f"{path} is a tar archive: unpack it first")
    raise ValueError(f"{path} is neither a torch nor a safetensors file: download it again")


def _read_pickle(path: Path, start: bytes) -> Any:
    """Returns what `torch.save` wrote, refusing everything that would have to be executed."""
    if is_torchscript(path):
        raise ValueError(
            f"{path} is a TorchScript archive, as OpenAI's CLIP files are: "
            "a file of tensors is needed here"
        )
    members = _list_members(path)
    if members and not any(name.endswith("data.pkl") for name in members):
        raise ValueError(f"{path} is a zip archive of {members[0]} and others: unpack it first")
    if start[:1] == b"\x80" and LEGACY_MAGIC not in start[:64]:
        raise ValueError(
            f"{path} is a pickle that torch.save did not write: save it by "
            "torch.save(network.state_dict(), path)"
        )
    try:
        # torch.load gets an open file, because with a path it goes by the ending.
        with torch.serialization.safe_globals(list(_list_safe_globals())), path.open("rb") as file:
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        refused_name = re.search(r"GLOBAL (\S+)", str(error))
        content = refused_name[1] if refused_name else "something damaged"
        raise ValueError(
            f"{path} is refused, it holds {content}: ask for a file of tensors alone"
        ) from None
    except Exception:  # damaged bytes lead torch's reader to every kind
        raise ValueError(f"{path} is not a complete torch file: download it again") from None


def _list_safe_globals() -> Iterator[Any]:
    """Yields the classes and functions that a pickle may name beside those of torch.

    They hold values and run nothing: command lines of trainers (argparse.Namespace), paths, which
    become paths that cannot be opened, and numpy's numbers and arrays.
    """
    yield from (argparse.Namespace, types.SimpleNamespace)
    for module in ("pathlib", "pathlib._local"):
        yield PurePosixPath, f"{module}.PosixPath"
        yield PureWindowsPath, f"{module}.WindowsPath"
    make_scalar, make_array = np.float64(0).__reduce__()[0], np.zeros(0).__reduce__()[0]
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        yield make_scalar, f"{module}.scalar"
        yield make_array, f"{module}._reconstruct"
    yield from (np.dtype, np.ndarray)
    yield from {type(np.dtype(code)) for code in NUMPY_CODES}


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    # Headers may be damaged in ways that the library does not expect.
    except (SafetensorError, KeyError, ValueError, TypeError, RuntimeError, OSError):
        raise ValueError(f"{path} is not a complete safetensors file: download it again") from None


def _read_shards(index: Path) -> dict[str, Any]:
    """Returns the tensors of the shards that an index in Hugging Face's format lists."""
    content = read_json(index)
    files = content.get("weight_map")
    if not isinstance(files, dict) or not files:
        raise ValueError(f"{index} is JSON without a weight_map: give the file of the weights")
    shards: dict[str, Any] = {}
    for name, file in files.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise ValueError(f"{index}: {name} lies in {file!r}, which names no file beside it")
        if file in shards:
            continue
        shard = index.with_name(file)
        if not shard.is_file():
            raise ValueError(f"{index} names {file}, which is missing: download it too")
        shards[file] = _read_content(shard, is_shard=True)
    for name, file in files.items():
        if not isinstance(shards[file], Mapping) or name not in shards[file]:
            raise ValueError(f"{index.with_name(file)} lacks {name}: download it again")
    unlisted = [
        f"{name} of {file}" for file in shards for name in shards[file] if name not in files
    ]
    if unlisted:
        raise ValueError(f"{index} does not list {unlisted[0]}: download it again")
    return {name: shards[file][name] for name, file in files.items()}


def _list_members(path: Path) -> list[str]:
    """Returns the names of a zip archive's members; none for other files."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, EOFError, NotImplementedError):
        return []


# The state dict in it -----------------------------------------------------------------------------


def _find_state_dict(
    content: Any, path: Path, containers: Sequence[str], averages: Sequence[str]
) -> tuple[Mapping[Any, Any], list[str]]:
    """Returns the state dict inside a checkpoint, and a note for each average passed over."""
    notes: list[str] = []
    visited: list[Any] = []
    while True:
        if not isinstance(content, Mapping) or not content:
            kind = type(content).__name__
            raise ValueError(
                f"{path} holds a {kind} and no named tensors: save the network's state_dict()"
            )
        keys = [key for key in containers if _holds_tensors(content.get(key))]
        average_keys = [key for key in averages if _holds_tensors(content.get(key))]
        if not keys and not average_keys:
            return content, notes
        candidates = keys or average_keys
        if len(candidates) > 1:
            raise ValueError(
                f"{path} holds weights under {candidates[0]!r} and others under "
                f"{candidates[1]!r}: save the ones that you mean to a file of their own"
            )
        if keys:
            notes += [
                f"{key!r} was passed over: {keys[0]!r} of the file was read" for key in average_keys
            ]
        else:
            notes.append(f"the weights are the moving average {average_keys[0]!r} of the file")
        visited.append(content)
        content = content[candidates[0]]
        if any(content is outer for outer in visited):
            raise ValueError(
                f"{path} holds a {type(content).__name__} that contains itself under "
                f"{candidates[0]!r}: save the network's state_dict()"
            )


def _holds_tensors(value: Any) -> bool:
    """Returns whether a value is a mapping with a tensor or array in it, at any depth."""
    waiting = [value] if isinstance(value, Mapping) else []
    visited: set[int] = set()
    while waiting:
        value = waiting.pop()
        if isinstance(value, Tensor | np.ndarray):
            return True
        if isinstance(value, Mapping) and id(value) not in visited:
            visited.add(id(value))
            waiting += value.values()
    return False


def _select_tensors(state: Mapping[Any, Any], path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """Returns the tensors of a state dict, and a note on plain values beside them."""
    tensors, plain = {}, []
    for name, value in state.items():
        kind = type(value).__name__
        if isinstance(value, np.ndarray) and value.dtype.kind in "fiub":
            value = _convert_array(value, f"{path}: {name!r}")
        if isinstance(value, Tensor):
            if value.is_complex() or value.is_quantized or value.layout != torch.strided:
                raise ValueError(
                    f"{path}: {name!r} is a {value.dtype} {value.layout}: "
                    "dense floating tensors are expected"
                )
            if value.is_meta:
                raise ValueError(
                    f"{path}: {name!r} is a meta tensor, which has a shape and no values: "
                    "save the network after its weights were loaded"
                )
            tensors[str(name)] = value
        elif value is None or isinstance(value, int | float | str | np.generic):
            plain.append(f"{name!r} is of type {kind}")
        else:
            raise ValueError(
                f"{path}: {name!r} is of type {kind}: a state dict of tensors is expected"
            )
    if not tensors:
        raise ValueError(f"{path}: {plain[0]}: a state dict of tensors is expected")
    return tensors, [f"passed over in the file, no tensor: {description}" for description in plain]


def _convert_array(array: np.ndarray, location: str) -> Tensor:
    """Returns a numpy array as a tensor, in the byte order of this machine."""
    try:
        return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))
    except TypeError:
        raise ValueError(
            f"{location} is an array of {array.dtype}, which torch does not have: "
            "save it as float32"
        ) from None


def _strip_wrappers(state: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Returns the tensors without `WRAPPERS` in their names."""
    tensors: dict[str, Tensor] = {}
    original_names: dict[str, str] = {}
    for original, tensor in state.items():
        name, previous = original, ""
        while name != previous:
            name, previous = WRAPPERS.sub("", name), name
        if name == AVERAGE_COUNT:
            continue
        if name in tensors:
            raise ValueError(
                f"{path} holds both {original_names[name]} and {original}: "
                "save the tensors of one network alone"
            )
        tensors[name], original_names[name] = tensor, original
    return tensors
