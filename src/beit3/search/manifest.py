"""The manifest of a folder of vectors: what its vectors are, and which files hold them."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from beit3.files import flush_to_disk, read_json, write_text

MANIFEST = "manifest.json"
VERSION = 1
DTYPES = ("float16", "float32")
MODALITIES = ("image", "text")

FINGERPRINT_NAMES = {
    "task": "the task",
    "weights": "the weights",
    "image": "the preprocessing of images",
    "text": "the tokenizer or the length of texts",
}
"""Key of a fingerprint -> its name in messages."""


@dataclass(frozen=True)
class Shard:
    """One shard: `img_emb_<number>.npy` and the files beside it. Row i of each is the same item."""

    number: int
    rows: int


@dataclass(frozen=True)
class Manifest:
    """Describes a folder of vectors.

    Attributes:
        dim: Length of a vector.
        fingerprint: What made the vectors, see `Predictor.fingerprint`.
        weights: Path of the weights as it was given.
        precision: Number format in which the network ran.
        dtype: float16 or float32, of the stored vectors.
        modalities: "image", "text" or both: which vectors each row has.
        image_root: Directory that the paths in the column `image_path` are relative to.
        shards: The shards in order of their rows. Files of other shards are not part of the folder.
        deleted: Name of the file with the row numbers that are deleted, "" if none is.
        inputs: Digest of the inputs, for the run that goes on.
        generation: Counts the writes.
        version: Version of the format.
    """

    dim: int
    fingerprint: dict[str, str] = field(default_factory=dict)
    weights: str = ""
    precision: str = "float32"
    dtype: str = "float16"
    modalities: tuple[str, ...] = ("image",)
    image_root: str = ""
    shards: tuple[Shard, ...] = ()
    deleted: str = ""
    inputs: str = ""
    generation: int = 0
    version: int = VERSION

    @property
    def num_rows(self) -> int:
        """Number of stored rows, deleted ones included."""
        return sum(shard.rows for shard in self.shards)

    @property
    def next_shard_number(self) -> int:
        """Number of the shard that is written next."""
        return max((shard.number for shard in self.shards), default=-1) + 1


def write_manifest(folder: str | Path, manifest: Manifest) -> None:
    """Replaces the manifest of a folder. From then on readers see the shards that it lists."""
    folder = Path(folder)
    write_text(folder / MANIFEST, json.dumps(asdict(manifest), indent=1) + "\n")
    flush_to_disk(folder / MANIFEST)
    flush_to_disk(folder)


def commit(folder: str | Path, manifest: Manifest, **changes: Any) -> Manifest:
    """Writes `manifest` with `changes` as the next generation, and returns it."""
    changed = replace(manifest, generation=manifest.generation + 1, **changes)
    write_manifest(folder, changed)
    return changed


def read_manifest(folder: str | Path) -> Manifest:
    """Reads the manifest of a folder; raises ValueError when the folder is no index."""
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise ValueError(
            f"{folder} is no index (it has no {MANIFEST}): make one with `beit3 embed`"
        )
    content = read_json(path)
    try:
        return _make_manifest(content)
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} is no manifest of vectors ({error}): embed again") from None


def _make_manifest(content: dict[str, Any]) -> Manifest:
    """Builds a manifest of parsed JSON; raises an error that tells what is wrong with it."""
    if content["version"] != VERSION:
        raise ValueError(f"version {content['version']}, this program reads {VERSION}")
    shards = tuple(Shard(int(row["number"]), int(row["rows"])) for row in content.pop("shards"))
    manifest = Manifest(
        **{**content, "shards": shards, "modalities": tuple(content["modalities"])},
    )
    if manifest.dtype not in DTYPES:
        raise ValueError(f"dtype {manifest.dtype}, known are {', '.join(DTYPES)}")
    if not manifest.modalities or set(manifest.modalities) - set(MODALITIES):
        raise ValueError(f"modalities {manifest.modalities}, known are {', '.join(MODALITIES)}")
    if not (isinstance(manifest.dim, int) and manifest.dim > 0):
        raise ValueError(f"dim {manifest.dim}, which should be a positive number")
    if any(shard.rows <= 0 or shard.number < 0 for shard in shards):
        raise ValueError("a shard without rows or with a negative number")
    return manifest


def find_differences(stored: Mapping[str, str], current: Mapping[str, str]) -> list[str]:
    """Returns the names of what differs between two fingerprints.

    Weights without a tokenizer, whose `text` is "", make no vectors of texts. So they differ from
    the same weights with a tokenizer in nothing that is stored.
    """
    keys = [key for key in FINGERPRINT_NAMES if key in stored or key in current]
    if "" in (stored.get("text"), current.get("text")):
        keys.remove("text")
    return [FINGERPRINT_NAMES[key] for key in keys if stored.get(key) != current.get(key)]


def check_fingerprint(
    stored: Mapping[str, str], current: Mapping[str, str], uri: str, *, weights: str = ""
) -> None:
    """Raises ValueError when an index was made by other weights or preprocessing.

    Args:
        stored: Fingerprint in the index.
        current: Fingerprint of the predictor at hand.
        uri: The index, for the message.
        weights: Path of the weights that the index names, for the message.
    """
    different = find_differences(stored, current)
    if not different:
        return
    remedy = f"use {weights}" if weights else "use the weights that made it"
    raise ValueError(
        f"{uri} was made with other weights or preprocessing ({' and '.join(different)} differ): "
        f"{remedy}, or embed again"
    )
