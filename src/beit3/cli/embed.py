"""`beit3 embed`."""

from typing import Literal

from beit3.cli.options import NOT_RELEASED, Amount, Count, ReleasedOptions, Size


def embed(
    weights: str,
    /,
    *inputs: str,
    out: str,
    update: bool = False,
    precision: Literal["auto", "float32", "bfloat16", "float16", "int8"] = "auto",
    dtype: Literal["float16", "float32"] | None = None,
    image_column: str = "",
    caption_column: str = "",
    id_column: str = "",
    image_root: str = "",
    frames: bool = False,
    fps: Amount = 0.0,
    batch_size: Count | None = None,
    shard_size: Count | None = None,
    workers: Size | None = None,
    threads: Count | None = None,
    device: str = "auto",
    engine: Literal["local", "ray"] = "local",
    ray_workers: Count | None = None,
    released: ReleasedOptions = NOT_RELEASED,
) -> None:
    """Embed images and captions into a folder of vectors, which beit3 search reads.

    ```
    beit3 embed runs/retrieval-demo photos --out vectors
    beit3 embed runs/retrieval-demo captions.csv --out vectors --update
    beit3 embed runs/retrieval-demo keyframes --fps 25 --out vectors
    torchrun --nproc-per-node 4 -m beit3 embed runs/retrieval-demo shards --out vectors
    ```

    A run that was killed goes on with the same command. docs/search.md is the page of this command.

    Args:
        weights: A weights directory, a run or a released file, of retrieval or another task with
            features of single images.
        inputs: Folders of images or tar files; a list of paths (.txt); a table (.csv, .tsv, .jsonl,
            .parquet) with a column of images; tar files (WebDataset).
        out: The folder of vectors.
        update: Add new and changed inputs to the folder and delete removed ones.
        precision: Number format of the network; auto takes the fastest on this machine that keeps
            results.
        dtype: Number format of the stored vectors; float16 by default.
        image_column: The column of images in a table; by default one of the usual names.
        caption_column: The column of captions; by default one of the usual names, if there is one.
        id_column: The column of ids; by default id, else paths are the ids.
        image_root: Folder that paths in lists and tables are relative to; by default theirs.
        frames: Images are key frames of videos, video/frame-number.jpg.
        fps: Frames of a video per second, which gives key frames a time; implies --frames.
        batch_size: Images that are encoded at once.
        shard_size: Images of a shard, 4096 by default.
        workers: Processes that decode images.
        threads: Batches that a CPU computes at once; by default one per core.
        device: Where to compute: auto, cpu, cuda, mps.
        engine: Share the work by Ray instead of torchrun (pip install 'beit3[ray]').
        ray_workers: Processes that Ray starts.
    """
    from beit3.ops.collectives import rank
    from beit3.search.embed import embed as embed_inputs
    from beit3.search.inputs import InputOptions
    from beit3.search.preparing import EmbedOptions

    report = embed_inputs(
        weights,
        inputs,
        out,
        reading=InputOptions(
            image_column=image_column,
            caption_column=caption_column,
            id_column=id_column,
            image_root=image_root,
            frames=frames,
            fps=fps,
        ),
        options=EmbedOptions(
            precision=precision,
            dtype=dtype or "",
            batch_size=batch_size or 0,
            shard_size=shard_size or 0,
            workers=workers,
            threads=threads or 0,
            device=device,
            update=update,
            engine=engine,
            ray_workers=ray_workers or 0,
            load=make_load_options(released),
        ),
    )
    if rank() == 0:
        print(report.describe(out))


def make_load_options(released: ReleasedOptions) -> dict[str, str | int]:
    """Returns the options for released files that were given."""
    options = {
        "task": released.task,
        "num_heads": released.num_heads,
        "text_model": released.text_model,
    }
    return {name: value for name, value in options.items() if value is not None}
