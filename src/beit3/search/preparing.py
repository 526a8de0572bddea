"""The beginning of a run of `beit3 embed`: checks, the survey, and the worklist."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from beit3.predict import Predictor, load
from beit3.progress import show_progress
from beit3.search.folder import LOCK, get_metadata_path, open_folder
from beit3.search.input_tables import HASH, ID, get_metadata_names
from beit3.search.inputs import InputOptions, Items, list_items
from beit3.search.manifest import (
    DTYPES,
    MANIFEST,
    Manifest,
    find_differences,
    read_manifest,
)
from beit3.search.metadata import normalize_column, unify_schemas
from beit3.search.survey import compare_surveys, survey_items
from beit3.search.worklist import (
    INPUTS,
    UNFINISHED,
    Settings,
    Worklist,
    assign_shards,
    clean_up,
    has_worklist,
    write_worklist,
)

SHARD_SIZE = 4096
CPU_BATCH, ACCELERATOR_BATCH = 8, 64
"""Images that are encoded at once by default."""


@dataclass(frozen=True)
class EmbedOptions:
    """How `embed` works; 0, None and "" stand for what is best here, or what the folder has.

    Attributes:
        precision: float32, bfloat16, float16, int8 or auto, see `beit3.precision`.
        dtype: float16 or float32, of the stored vectors; float16 by default.
        batch_size: Images that are encoded at once: 8 on a CPU, 64 elsewhere.
        shard_size: Items of a shard, 4096 by default.
        workers: Processes that decode images. By default none on a CPU, whose computing threads
            decode as well, and one per core, at most 8, elsewhere.
        threads: Batches that a CPU computes at once; by default one per core.
        device: auto, cpu, cuda, mps, ...
        update: Whether to add new and changed inputs to a folder and delete removed ones.
        engine: local or ray.
        ray_workers: Processes that Ray starts; by default one per GPU, or one per two cores.
        load: Further arguments of `beit3.predict.load`.
    """

    precision: str = "auto"
    dtype: str = ""
    batch_size: int = 0
    shard_size: int = 0
    workers: int | None = None
    threads: int = 0
    device: str = "auto"
    update: bool = False
    engine: str = "local"
    ray_workers: int = 0
    load: Mapping[str, Any] = field(default_factory=dict)


# Checks -------------------------------------------------------------------------------------------


def check_options(options: EmbedOptions) -> None:
    """Raises ValueError for an option of no known value."""
    if options.dtype not in ("", *DTYPES):
        raise ValueError(f"dtype {options.dtype!r} is not known: give {' or '.join(DTYPES)}")
    if options.engine not in ("local", "ray"):
        raise ValueError(f"engine {options.engine!r} is not known: give local or ray")
    if options.engine == "ray" and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("--engine ray starts processes of its own: call it without torchrun")


def check_out(out: Path) -> None:
    """Raises ValueError unless a folder of vectors is, or can be, at `out`."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file: name a folder for the vectors")
    above = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise ValueError(
            f"--out {out}: nothing can be written to {above}: name a folder that can be written"
        )
    if not out.is_dir() or has_worklist(out):
        return
    names = [path.name for path in out.iterdir() if path.name not in (LOCK, UNFINISHED)]
    if names and MANIFEST not in names:
        raise ValueError(
            f"--out {out} holds something else ({names[0]}): name a new folder or one that "
            "beit3 embed made"
        )
    if MANIFEST in names and not (out / INPUTS).is_file():
        raise ValueError(
            f"--out {out} holds vectors that beit3 embed did not make (no {INPUTS}): name a new "
            "folder"
        )


def _read_stored(out: Path) -> Settings | Manifest | None:
    """Returns the settings of the unfinished run, else the manifest, else None."""
    if has_worklist(out):
        return Worklist(out).settings
    return read_manifest(out) if (out / MANIFEST).is_file() else None


def read_inputs(
    weights: str,
    inputs: Sequence[str | Path],
    out: Path,
    reading: InputOptions,
    options: EmbedOptions,
    device: torch.device,
) -> tuple[Items, Settings, Predictor]:
    """Lists the inputs, loads the weights and checks that they fit the folder.

    The precision that "auto" chose for a folder stays.
    """
    items = list_items(inputs, reading)
    stored = _read_stored(out)
    precision = options.precision
    if stored is not None:
        _check_given_options(stored, options, out)
        precision = stored.precision
    predictor = load_predictor(weights, precision, options, device)
    is_cpu = device.type == "cpu"
    settings = Settings(
        weights=weights,
        fingerprint=predictor.fingerprint,
        precision=predictor.precision,
        dtype=options.dtype or "float16",
        dim=_measure_dim(predictor, has_captions=items.has_captions),
        modalities=("image", "text") if items.has_captions else ("image",),
        image_root=items.root,
        batch_size=options.batch_size or (CPU_BATCH if is_cpu else ACCELERATOR_BATCH),
        shard_size=options.shard_size or SHARD_SIZE,
        first_shard=0,
    )
    if stored is not None:
        settings = _follow(settings, stored, out)
    return items, settings, predictor


def load_predictor(
    weights: str, precision: str, options: EmbedOptions, device: torch.device
) -> Predictor:
    """Loads the weights onto a device, in a number format that `load` checks."""
    arguments: dict[str, Any] = {**options.load, "precision": precision}
    return load(weights, device=device, **arguments)


def _measure_dim(predictor: Predictor, *, has_captions: bool) -> int:
    """Returns the length of a vector; raises ValueError for weights without features."""
    image = np.zeros((32, 32, 3), dtype=np.uint8)
    features = predictor.embed(images=[image], texts=["a"] if has_captions else [])
    return int(features["image"].shape[1])


def _check_given_options(stored: Settings | Manifest, options: EmbedOptions, out: Path) -> None:
    """Raises ValueError for an option that is not what a folder was made with."""
    for name in _list_kept(stored):
        given, kept = getattr(options, name), getattr(stored, name)
        if given not in ("", 0, "auto") and given != kept:
            option = name.replace("_", "-")
            raise ValueError(
                f"{out} was made with --{option} {kept}, and {given} is given: leave --{option} "
                "out, or use another --out"
            )


def _list_kept(stored: Settings | Manifest) -> list[str]:
    """Returns the names of the options that stay as they were when a folder was begun."""
    sizes = ["batch_size", "shard_size"] if isinstance(stored, Settings) else []
    return ["precision", "dtype", *sizes]


def _follow(settings: Settings, stored: Settings | Manifest, out: Path) -> Settings:
    """Returns settings that agree with those of a folder.

    Raises ValueError where weights, preprocessing or kinds of vectors differ.
    """
    different = find_differences(stored.fingerprint, settings.fingerprint)
    if different:
        raise ValueError(
            f"{out} was made with {stored.weights}, and {' and '.join(different)} of "
            f"{settings.weights} are different: use the same weights, or another --out"
        )
    kept: dict[str, Any] = {name: getattr(stored, name) for name in _list_kept(stored)}
    settings = replace(settings, **kept)
    if isinstance(stored, Manifest) and settings.modalities != stored.modalities:
        given = "captions" if "text" in settings.modalities else "no captions"
        raise ValueError(
            f"{out} holds {' and '.join(stored.modalities)} vectors, and the inputs have {given}: "
            "use another --out"
        )
    return replace(settings, weights=stored.weights, fingerprint=stored.fingerprint)


# The worklist -------------------------------------------------------------------------------------


def prepare(out: Path, settings: Settings, items: Items, options: EmbedOptions) -> tuple[bool, str]:
    """Writes the worklist of a run, or finds that of an unfinished one. The folder is locked.

    Returns:
        Whether there is work, and how the inputs differ from those of the folder, "" if they do
        not, or if the folder is new.

    Raises:
        ValueError: The inputs differ and `options.update` is not set.
    """
    clean_up(out)
    worklist = Worklist(out) if has_worklist(out) else None
    manifest = read_manifest(out) if (out / MANIFEST).is_file() else None
    if worklist is not None and manifest != worklist.base:
        if manifest is None or manifest.inputs != worklist.inputs_digest:
            raise ValueError(
                f"{out} was changed while an update was unfinished: remove {worklist.folder} and "
                "repeat the command"
            )
        worklist.remove()  # the run was killed right after it had written the manifest
        worklist = None
    old, old_root = None, ""
    if worklist is not None:
        old, old_root = worklist.items, worklist.settings.image_root
    elif manifest is not None:
        old, old_root = pq.read_table(out / INPUTS), manifest.image_root
    with show_progress("surveying images") as advance:
        survey = survey_items(items, old, advance)
    changes = "" if old is None else _describe_changes(old, survey, old_root, items.root)
    if changes and not options.update:
        raise ValueError(
            f"the inputs of {out} have changed since: {changes}; give --update to add and delete "
            "accordingly, or another --out"
        )
    if old is not None and not changes:
        return worklist is not None, ""
    base = manifest if worklist is None else worklist.base
    base_inputs = None
    if base is not None:
        base_inputs = pq.read_table(out / INPUTS) if worklist is None else worklist.base_inputs
    _write_worklist(out, settings, survey, base, base_inputs)
    return True, changes


def _describe_changes(old: pa.Table, new: pa.Table, old_root: str, new_root: str) -> str:
    """Returns how inputs differ, in words."""
    changes = compare_surveys(old, new).describe()
    moved = f"images moved from {old_root} to {new_root}" if old_root != new_root else ""
    return ", ".join(filter(None, (changes, moved)))


def _write_worklist(
    out: Path,
    settings: Settings,
    survey: pa.Table,
    base: Manifest | None,
    base_inputs: pa.Table | None,
) -> None:
    """Assigns what is new or changed to shards, and writes the worklist."""
    wanted = [True] * len(survey)
    hashes: set[str] = set()
    if base is not None and base_inputs is not None:
        changes = compare_surveys(base_inputs, survey)
        wanted_ids = {*changes.new, *changes.changed}
        wanted = [item in wanted_ids for item in survey[ID].to_pylist()]
        settings = replace(settings, first_shard=base.next_shard_number)
        hashes = _read_hashes(out, base)
        _check_columns(out, survey)
    listed = assign_shards(
        survey, wanted, hashes, size=settings.shard_size, first=settings.first_shard
    )
    write_worklist(out, settings, listed, base=base, base_inputs=base_inputs)


def _read_hashes(out: Path, base: Manifest) -> set[str]:
    """Returns the hashes of all images that have a vector in a folder."""
    hashes: set[str] = set()
    for shard in base.shards:
        path = get_metadata_path(out, shard.number)
        if HASH in pq.read_schema(path).names:
            hashes.update(pq.read_table(path, columns=[HASH])[HASH].to_pylist())
    return hashes - {None}


def _check_columns(out: Path, survey: pa.Table) -> None:
    """Raises ValueError where a column of metadata has another type than in the folder."""
    names = get_metadata_names(survey.column_names)
    columns = {name: normalize_column(name, survey[name]) for name in names}
    unify_schemas([open_folder(out).schema, pa.table(columns).schema])
