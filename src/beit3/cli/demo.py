"""`beit3 demo` and `beit3 world`: the embedded world, learned from and written to files."""

from pathlib import Path

from beit3.cli.options import Count, Size


def demo(*, fast: bool = False, full: bool = False, out: str = "") -> None:
    """Take the tour: tokenizers, pretraining and every task on the embedded world.

    It writes report.html. Stopped, it goes on where it was.

    ```
    beit3 demo --fast
    beit3 demo --full --out runs/demo-full
    ```

    Args:
        fast: A shorter tour, under two minutes.
        full: Every demo recipe at full length over several seeds, with and without pretraining.
        out: Run directory; by default runs/demo, runs/demo-fast or runs/demo-full.
    """
    from beit3.demo import comparison, tour

    if fast and full:
        raise ValueError("--fast and --full exclude each other: give one of them")
    if full:
        comparison.run(Path(out or "runs/demo-full"))
    else:
        tour.run(Path(out or ("runs/demo-fast" if fast else "runs/demo")), fast=fast)


def world(
    *,
    out: str,
    scenes: Count = 6000,
    image_size: Count = 32,
    seed: Size = 0,
) -> None:
    """Write the embedded world in the file formats of the public datasets.

    ```
    beit3 world --out world --scenes 1000
    beit3 prepare vqa --raw world/vqa --root data
    ```

    Args:
        out: Directory to write, which must not exist.
        scenes: Training scenes of each kind; val and test have a twelfth of it each.
        image_size: Side of an image in pixels.
        seed: Seed of the scenes.
    """
    from beit3.progress import show_progress
    from beit3.world.export import write_world

    num_held_out = max(1, scenes // 12)
    with show_progress("world") as advance:
        write_world(
            out,
            num_train=scenes,
            num_val=num_held_out,
            num_test=num_held_out,
            num_questions=scenes * 3 // 2,
            image_size=image_size,
            seed=seed,
            progress=advance,
        )
    print(f"the world is at {out}")
