"""The loop that trains every task: start, records, network, optimizer, resume, then step after step."""

import json
import signal
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from beit3.data.loader import Examples, Source, step_batches, step_places
from beit3.data.stores.records import locate, write_text
from beit3.ops.collectives import all_gather_objects, barrier, leader_first, rank, world_size
from beit3.progress import bar
from beit3.recipe import Recipe
from beit3.task import Task, grow_vocabulary, task_name
from beit3.tokenizer.text import TextTokenizer
from beit3.training.checkpoint import Checkpoints, full_disk
from beit3.training.directory import claimed, finished, inputs_of, refuse_other_run
from beit3.training.evaluate import evaluate, holds_words, refuse_other_ids, to_device
from beit3.training.launch import seed_step, start
from beit3.training.log import Log
from beit3.training.optim import clip_gradients, learning_rate, make_optimizer, set_learning_rate
from beit3.training.parallel import autocast, build, dtype, materialise, reshard, share_statistics
from beit3.training.root import records_root
from beit3.training.step import backward, check_finite, gradient_norms, note_broken, sum_targets
from beit3.training.watch import Watch
from beit3.weights import store
from beit3.weights.matching import Report, gathered


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop and has saved where it was; start it again to go on. `status`: 128 + the signal."""

    def __init__(self, message: str, number: int):
        super().__init__(message)
        self.status = 128 + number


def train(
    recipe: Recipe,
    task_class: type[Task],
    *,
    out: str | Path,
    init: str | Path = "",
    label: str = "",
) -> dict[str, Any]:
    """Train `task_class` by `recipe` into the run directory `out`; returns the final scores.

    `out` holds recipe.json, metrics.jsonl, checkpoints/, best/ and last/ (weights). An `out` with the same recipe is
    resumed, with another one refused. `init`: weights to start from. Raises ValueError for anything the user can mend,
    FloatingPointError for a loss or gradient that is not finite, ConnectionError where another process of the run has
    ended, OSError for a full disk, Interrupted after Ctrl-C, SIGTERM or SIGUSR1.
    """
    run, out = recipe.run, Path(out)
    device = start(run)
    with leader_first(), bar("writing the world") as advance:
        root = records_root(task_class, recipe.data.root, recipe.data.batch, progress=advance)
    sources = {
        name: open_source(root, task_class, name, recipe)
        for name in task_class.sources
        if recipe.data.batch.get(name)
    }
    if not sources:
        raise ValueError(
            f"data.batch names none of the sources {', '.join(task_class.sources)}: give each a number of records"
        )
    held_out = {name: open_source(root, task_class, name, recipe, "val") for name in sources}
    refuse_accumulation(task_class, recipe)
    tokenizer = open_tokenizer(recipe, root, init)
    if tokenizer is None and any(holds_words(source[0]) for source in sources.values()):
        raise ValueError(
            f"no text tokenizer: give --data.text_model FILE, or write {root / store.TEXT} with beit3 tokenizer train"
        )
    config = task_class.configure(grow_vocabulary(recipe.task, tokenizer), root)
    task = build(task_class, config, tokenizer, run, device)
    refuse_other_ids(task, sources)
    mine = {
        "task": task_name(task_class),
        "init": str(init),
        "recipe": recipe.to_dict(),
        "inputs": inputs_of(task),
    }
    refuse_other_run(out, mine)
    steps, warmup = count_steps(recipe, {name: len(source) for name, source in sources.items()})
    step_places(
        0, **shares(recipe, sources)
    )  # batches that do not divide over the processes end here
    if not finished(out, steps):
        materialise(task, device, run.seed)
        report = store.initialise_from(task, init) if init else None
        with (
            explained(out),
            claimed(out, mine, device),
            closing(Log(out, label or out.name, steps, speak=rank() == 0)) as log,
        ):
            fit(
                task,
                recipe,
                sources,
                held_out,
                out,
                log,
                device=device,
                warmup=warmup,
                report=report,
            )
    return json.loads((out / "scores.json").read_text())


def fit(
    task: Task,
    recipe: Recipe,
    sources: Mapping[str, Source],
    held_out: Mapping[str, Source],
    out: Path,
    log: Log,
    *,
    device: torch.device,
    warmup: int,
    report: Report | None,
) -> None:
    """From the newest checkpoint, or the start, to the last step; everything the run leaves is then in `out`."""
    run, steps = recipe.run, log.steps
    optimizer = make_optimizer(task, recipe.optim)
    checkpoints = Checkpoints(out, keep=run.keep, asynchronous=run.async_save, say=log.say)
    done, best = checkpoints.restore(task, optimizer)
    log.begin(done)
    if report and not done:
        for line in report.lines():
            log.say(f"{log.name}  {line}")
    examples = Examples(sources, task.example, seed=run.seed)
    places = partial(step_places, **shares(recipe, sources))
    pinned = device.type == "cuda"
    batches = step_batches(
        examples,
        task.collate,
        places,
        range(done, steps),
        workers=recipe.data.workers,
        pinned=pinned,
    )
    broken: dict[str, set[str]] = {}
    precision = autocast(run, device)
    with Stop() as stop, Watch(log) as watch:
        for step in range(done, steps):
            watch.begin(step)
            micro_batches = next(batches)
            watch.loaded()
            seed_step(
                run.seed, step
            )  # after the loader, which draws from the same generator when it starts
            note_broken(broken, micro_batches, sources, recipe.data.bad_share, log)
            lr = learning_rate(step, steps, warmup, recipe.optim)
            set_learning_rate(optimizer, lr)
            micro_batches = [batch | {"step": step, "steps": steps} for batch in micro_batches]
            totals = sum_targets(task, micro_batches)
            values, losses = backward(
                task,
                micro_batches,
                totals,
                precision,
                partial(to_device, device=device, dtype=dtype(run)),
            )
            after = step + 1
            due = after % run.log_every == 0 or after == steps
            norms = gradient_norms(task) if due else {}
            norm = clip_gradients(
                (parameter for _, parameter in task.trainable()), recipe.optim.clip
            )
            check_finite(step, values["loss"], norm, micro_batches, losses)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            watch.done()

            values |= {
                "lr": lr,
                "gradient_norm": norm,
                "samples": sum(recipe.data.batch[name] for name in sources),
            }
            log.samples += int(values["samples"])
            if due:
                log.write(after, values | norms | log.surroundings(optimizer) | watch.lap())
            log.show(after, values)
            if after == steps or (run.eval_every and after % run.eval_every == 0):
                best = evaluate_and_keep(task, recipe, held_out, out, after, best, log, precision)
            asked = stop.agreed()
            if asked or after == steps or (run.save_every and after % run.save_every == 0):
                checkpoints.save(after, task, optimizer, best)
            if asked and after < steps:
                checkpoints.wait()
                raise Interrupted(
                    f"{out} stopped after step {after} of {steps}; the same command goes on from there",
                    asked,
                )
    checkpoints.wait()
    keep_weights(task, out / "last")


def shares(recipe: Recipe, sources: Iterable[str]) -> dict[str, Any]:
    """What `step_places` needs to know of the recipe and of this process's place."""
    return {
        "batch": recipe.data.batch,
        "sources": list(sources),
        "micro_batch": recipe.run.micro_batch,
        "rank": rank(),
        "world": world_size(),
    }


@contextmanager
def explained(out: Path) -> Iterator[None]:
    """Errors of a disk that filled and of a process that ended, wherever in the run, say what is still good and what to do."""
    try:
        yield
    except OSError as error:
        raise full_disk(error, out) from error
    except RuntimeError as error:
        raise lost_process(error) from error


def lost_process(error: RuntimeError) -> Exception:
    """The same error; where a collective failed because its peer is gone, one that says so."""
    gone = isinstance(error, dist.DistError) or any(
        word in str(error) for word in ("closed by peer", "reset by peer", "Broken pipe")
    )
    if world_size() == 1 or not gone:
        return error
    return ConnectionError(
        f"another process of this run has ended (this was {rank()} of {world_size()}): its own message tells why; start the run again, "
        "or let torchrun do it with --max-restarts; it goes on from the last checkpoint"
    )


def open_source(
    root: Path, task_class: type[Task], name: str, recipe: Recipe, split: str = "train"
) -> Source:
    """The records of one split under `root`."""
    data, path = (
        recipe.data,
        locate(str(root), task_class.records_from.get(name, task_name(task_class)), name, split),
    )
    if split != "train":
        return Source(path, root)
    strange = [key for key in data.weights if key.partition("/")[0] not in task_class.sources]
    if strange:
        raise ValueError(
            f"data.weights names {strange[0]}: give it by source/set, sources are {', '.join(task_class.sources)}"
        )
    weights = {
        key.partition("/")[2]: weight
        for key, weight in data.weights.items()
        if key.partition("/")[0] == name
    }
    return Source(path, root, limit=data.limit, window=data.shuffle_window, weights=weights)


def open_tokenizer(recipe: Recipe, root: Path, init: str | Path) -> TextTokenizer | None:
    """The text tokenizer a run reads with: the recipe's, the initial weights', or the root's; None where there is none.

    Weights of ours hold theirs; beside a released file it is called as it was released.
    """
    candidates = [Path(recipe.data.text_model)] if recipe.data.text_model else []
    if init:
        candidates += [
            store.find(init) / store.TEXT
            if Path(init).is_dir()
            else Path(init).with_name("beit3.spm")
        ]
    for path in [*candidates, root / store.TEXT]:
        if path.exists() or str(path) == recipe.data.text_model:
            return TextTokenizer(path)
    return None


def count_steps(recipe: Recipe, sizes: Mapping[str, int]) -> tuple[int, int]:
    """(steps, warmup steps); an epoch is the largest source's records over its batch, rounded down."""
    run, optim = recipe.run, recipe.optim
    per_epoch = max(1, max(size // recipe.data.batch[name] for name, size in sizes.items()))
    steps = run.steps or round(run.epochs * per_epoch)
    if steps < 1:
        raise ValueError("run.steps and run.epochs are both 0: give one of them")
    return steps, optim.warmup_steps or round(optim.warmup_epochs * per_epoch)


def refuse_accumulation(task_class: type[Task], recipe: Recipe) -> None:
    """ValueError for several micro-batches a step where the task's forward changes state (a codebook's moving average)."""
    share = max(recipe.data.batch.values()) // world_size()
    if task_class.updates_buffers and 0 < recipe.run.micro_batch < share:
        raise ValueError(
            f"run.micro_batch {recipe.run.micro_batch}: {task_name(task_class)} needs its share of {share} records at once"
        )


def evaluate_and_keep(
    task: Task,
    recipe: Recipe,
    held_out: Mapping[str, Source],
    out: Path,
    step: int,
    best: float | None,
    log: Log,
    precision: torch.autocast,
) -> float | None:
    """Score the val split, write scores.json, and keep the weights as `best/` if their headline leads; rank 0 writes."""
    size = recipe.run.micro_batch or max(1, max(recipe.data.batch.values()) // world_size())
    share_statistics(task)
    scores = evaluate(
        task,
        held_out,
        batch_size=size,
        limit=recipe.run.eval_records,
        bad_share=recipe.data.bad_share,
        precision=precision,
    )
    log.write(step, {f"val/{name}": value for name, value in scores.items()})
    reshard(task)
    if rank() == 0:
        write_text(out / "scores.json", json.dumps({"step": step, **scores}, indent=1) + "\n")
    headline = scores[task.headline]
    log.say(f"{log.name}  step {step}  val {task.headline} {headline:.4f}")
    if best is not None and headline <= best:
        return best
    keep_weights(task, out / "best")
    return headline


def keep_weights(task: Task, directory: Path) -> None:
    """Write the weights, whole, from rank 0; every process takes part where they are sharded."""
    tensors = gathered(task)
    if rank() == 0:
        store.save(task, directory, tensors=tensors)
    barrier()


class Stop:
    """Turns Ctrl-C, SIGTERM and SIGUSR1 into a request that the loop answers after the step at hand; a second Ctrl-C acts at once.

    Schedulers announce the end of a machine by SIGTERM (Kubernetes, SLURM) or by a signal of the user's choice (SLURM's
    --signal=USR1@60).
    """

    SIGNALS = tuple(
        getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)
    )

    def __init__(self) -> None:
        self.asked = 0

    def __enter__(self) -> "Stop":
        self.previous = {}
        for number in self.SIGNALS:
            try:
                self.previous[number] = signal.signal(number, self._ask)
            except ValueError:  # signals belong to the main thread; elsewhere the caller stops us
                continue
        return self

    def agreed(self) -> int:
        """The signal by which any process was asked, 0 for none, so that all of them stop after the same step."""
        return max(all_gather_objects(self.asked)) if world_size() > 1 else self.asked

    def _ask(self, number: int, frame: Any) -> None:
        if self.asked == number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = number

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
