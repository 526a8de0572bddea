"""The loop that trains every task: start, records, network, optimizer, resume, then step after
step."""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from beit3.data.loader import ExampleDataset, RecordDataset, load_batches, sample_micro_batches
from beit3.data.stores.split_files import locate_split
from beit3.files import write_text
from beit3.ops.batch_norm import average_batch_norm_statistics
from beit3.ops.collectives import barrier, rank, rank_zero_first, world_size
from beit3.progress import show_progress
from beit3.recipe import Recipe
from beit3.task import Task, grow_vocabulary, task_name
from beit3.tokenizer.text import TextTokenizer
from beit3.training.checkpoint import Checkpointer, explain_full_disk
from beit3.training.directory import (
    check_same_run,
    describe_inputs,
    is_finished,
    lock_run_directory,
)
from beit3.training.evaluate import evaluate, to_device
from beit3.training.launch import init_device, seed_step
from beit3.training.log import Log, measure_peak_memory
from beit3.training.optim import (
    clip_gradients,
    compute_learning_rate,
    get_group_learning_rates,
    make_optimizer,
    set_learning_rate,
)
from beit3.training.parallel import (
    build_task,
    get_parameter_dtype,
    make_autocast,
    materialize,
    reshard,
)
from beit3.training.sources import check_tokenizer, find_records_root, has_raw_text
from beit3.training.step import (
    backward,
    check_finite,
    measure_gradient_norms,
    report_unreadable_records,
    sum_targets,
)
from beit3.training.stop import Interrupted, StopRequest
from beit3.training.watchdog import Watchdog
from beit3.weights import initialization, store
from beit3.weights.matching import LoadReport, gather_weights


def train(
    recipe: Recipe,
    task_class: type[Task],
    *,
    out: str | Path,
    init: str | Path = "",
    label: str = "",
) -> dict[str, Any]:
    """Train `task_class` by `recipe` into the run directory `out`; returns the final scores.

    `out` holds recipe.json, metrics.jsonl, checkpoints/, best/ and last/ (weights). An `out` with
    the same recipe is
    resumed, with another one refused. `init`: weights to start from. Raises ValueError for anything
    the user can mend,
    FloatingPointError for a loss or gradient that is not finite, ConnectionError where another
    process of the run has
    ended, OSError for a full disk, Interrupted after Ctrl-C, SIGTERM or SIGUSR1.
    """
    run, out = recipe.run, Path(out)
    device = init_device(run)
    with rank_zero_first(), show_progress("writing the world") as advance:
        root = find_records_root(task_class, recipe.data.root, recipe.data.batch, progress=advance)
    sources = {
        name: open_source(root, task_class, name, recipe)
        for name in task_class.sources
        if recipe.data.batch.get(name)
    }
    if not sources:
        raise ValueError(
            f"data.batch names none of the sources {', '.join(task_class.sources)}: give each a "
            "number of records"
        )
    held_out = {name: open_source(root, task_class, name, recipe, "val") for name in sources}
    check_accumulation(task_class, recipe)
    tokenizer = open_tokenizer(recipe, root, init)
    if tokenizer is None and any(has_raw_text(source[0]) for source in sources.values()):
        raise ValueError(
            "no text tokenizer: give --data.text_model FILE, or write "
            f"{root / store.TOKENIZER_FILE} with beit3 tokenizer train"
        )
    config = task_class.configure(grow_vocabulary(recipe.task, tokenizer), root)
    task = build_task(task_class, config, tokenizer, run, device)
    check_tokenizer(task, sources)
    mine = {
        "task": task_name(task_class),
        "init": str(init),
        "recipe": recipe.to_dict(),
        "inputs": describe_inputs(task),
    }
    check_same_run(out, mine)
    steps, warmup = count_steps(recipe, {name: len(source) for name, source in sources.items()})
    sample_micro_batches(
        0, **shares(recipe, sources)
    )  # batches that do not divide over the processes end here
    if not is_finished(out, steps):
        materialize(task, device, run.seed)
        report = initialization.initialize_from(task, init) if init else None
        with (
            explain_errors(out),
            lock_run_directory(out, mine, device),
            closing(Log(out, label or out.name, steps, enabled=rank() == 0)) as log,
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
    sources: Mapping[str, RecordDataset],
    held_out: Mapping[str, RecordDataset],
    out: Path,
    log: Log,
    *,
    device: torch.device,
    warmup: int,
    report: LoadReport | None,
) -> None:
    """From the newest checkpoint, or the start, to the last step; everything the run leaves is then
    in `out`."""
    run, steps = recipe.run, log.num_steps
    optimizer = make_optimizer(task, recipe.optim)
    checkpoints = Checkpointer(out, keep=run.keep, asynchronous=run.async_save, info=log.info)
    done, best = checkpoints.restore(task, optimizer)
    log.begin(done)
    if report and not done:
        for line in report.lines():
            log.info(f"{log.name}  {line}")
    examples = ExampleDataset(sources, task.example, seed=run.seed)
    places = partial(sample_micro_batches, **shares(recipe, sources))
    pinned = device.type == "cuda"
    batches = load_batches(
        examples,
        task.collate,
        places,
        range(done, steps),
        workers=recipe.data.workers,
        pinned=pinned,
    )
    broken: dict[str, set[str]] = {}
    precision = make_autocast(run, device)
    with StopRequest() as stop, Watchdog(log) as watch:
        for step in range(done, steps):
            watch.begin_step(step)
            micro_batches = next(batches)
            watch.mark_loaded()
            seed_step(
                run.seed, step
            )  # after the loader, which draws from the same generator when it starts
            report_unreadable_records(broken, micro_batches, sources, recipe.data.bad_share, log)
            lr = compute_learning_rate(step, steps, warmup, recipe.optim)
            set_learning_rate(optimizer, lr)
            micro_batches = [batch | {"step": step, "steps": steps} for batch in micro_batches]
            totals = sum_targets(task, micro_batches)
            values, losses = backward(
                task,
                micro_batches,
                totals,
                precision,
                partial(to_device, device=device, dtype=get_parameter_dtype(run)),
            )
            after = step + 1
            due = after % run.log_every == 0 or after == steps
            norms = measure_gradient_norms(task) if due else {}
            norm = clip_gradients(
                (parameter for _, parameter in task.trainable_parameters()), recipe.optim.clip
            )
            check_finite(step, values["loss"], norm, micro_batches, losses)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            watch.end_step()

            values |= {
                "lr": lr,
                "gradient_norm": norm,
                "samples": sum(recipe.data.batch[name] for name in sources),
            }
            log.num_samples += int(values["samples"])
            if due:
                state = get_group_learning_rates(optimizer) | {"memory": measure_peak_memory()}
                log.write(after, {**values, **norms, **state, **watch.pop_timings()})
            log.print_progress(after, values)
            if after == steps or (run.eval_every and after % run.eval_every == 0):
                best = evaluate_and_save_best(
                    task, recipe, held_out, out, after, best, log, precision
                )
            asked = stop.agree()
            if asked or after == steps or (run.save_every and after % run.save_every == 0):
                checkpoints.save(after, task, optimizer, best)
            if asked and after < steps:
                checkpoints.wait()
                raise Interrupted(
                    f"{out} stopped after step {after} of {steps}; the same command goes on from "
                    "there",
                    asked,
                )
    checkpoints.wait()
    save_weights(task, out / "last")


def shares(recipe: Recipe, sources: Iterable[str]) -> dict[str, Any]:
    """What `sample_micro_batches` needs to know of the recipe and of this process's place."""
    return {
        "batch": recipe.data.batch,
        "sources": list(sources),
        "micro_batch": recipe.run.micro_batch,
        "rank": rank(),
        "world": world_size(),
    }


@contextmanager
def explain_errors(out: Path) -> Iterator[None]:
    """Errors of a disk that filled and of a process that ended, wherever in the run, say what is
    still good and what to do."""
    try:
        yield
    except OSError as error:
        raise explain_full_disk(error, out) from error
    except RuntimeError as error:
        raise explain_lost_process(error) from error


def explain_lost_process(error: RuntimeError) -> Exception:
    """The same error; where a collective failed because its peer is gone, one that says so."""
    gone = isinstance(error, dist.DistError) or any(
        word in str(error) for word in ("closed by peer", "reset by peer", "Broken pipe")
    )
    if world_size() == 1 or not gone:
        return error
    return ConnectionError(
        f"another process of this run has ended (this was {rank()} of {world_size()}): its own "
        "message tells why; start the run again, "
        "or let torchrun do it with --max-restarts; it goes on from the last checkpoint"
    )


def open_source(
    root: Path, task_class: type[Task], name: str, recipe: Recipe, split: str = "train"
) -> RecordDataset:
    """The records of one split under `root`."""
    data, path = (
        recipe.data,
        locate_split(
            str(root), task_class.records_from.get(name, task_name(task_class)), name, split
        ),
    )
    if split != "train":
        return RecordDataset(path, root)
    strange = [key for key in data.weights if key.partition("/")[0] not in task_class.sources]
    if strange:
        raise ValueError(
            f"data.weights names {strange[0]}: give it by source/set, sources are "
            f"{', '.join(task_class.sources)}"
        )
    weights = {
        key.partition("/")[2]: weight
        for key, weight in data.weights.items()
        if key.partition("/")[0] == name
    }
    return RecordDataset(path, root, limit=data.limit, window=data.shuffle_window, weights=weights)


def open_tokenizer(recipe: Recipe, root: Path, init: str | Path) -> TextTokenizer | None:
    """The text tokenizer a run reads with: the recipe's, the initial weights', or the root's; None
    where there is none.

    Weights of ours hold theirs; beside a released file it is called as it was released.
    """
    candidates = [Path(recipe.data.text_model)] if recipe.data.text_model else []
    if init:
        candidates += [
            store.find_weights(init) / store.TOKENIZER_FILE
            if Path(init).is_dir()
            else Path(init).with_name("beit3.spm")
        ]
    for path in [*candidates, root / store.TOKENIZER_FILE]:
        if path.exists() or str(path) == recipe.data.text_model:
            return TextTokenizer(path)
    return None


def count_steps(recipe: Recipe, sizes: Mapping[str, int]) -> tuple[int, int]:
    """(steps, warmup steps); an epoch is the largest source's records over its batch, rounded
    down."""
    run, optim = recipe.run, recipe.optim
    per_epoch = max(1, max(size // recipe.data.batch[name] for name, size in sizes.items()))
    steps = run.steps or round(run.epochs * per_epoch)
    if steps < 1:
        raise ValueError("run.steps and run.epochs are both 0: give one of them")
    return steps, optim.warmup_steps or round(optim.warmup_epochs * per_epoch)


def check_accumulation(task_class: type[Task], recipe: Recipe) -> None:
    """ValueError for several micro-batches a step where the task's forward changes state (a
    codebook's moving average)."""
    share = max(recipe.data.batch.values()) // world_size()
    if task_class.updates_buffers and 0 < recipe.run.micro_batch < share:
        raise ValueError(
            f"run.micro_batch {recipe.run.micro_batch}: {task_name(task_class)} needs its share "
            f"of {share} records at once"
        )


def evaluate_and_save_best(
    task: Task,
    recipe: Recipe,
    held_out: Mapping[str, RecordDataset],
    out: Path,
    step: int,
    best: float | None,
    log: Log,
    precision: torch.autocast,
) -> float | None:
    """Score the val split, write scores.json, and keep the weights as `best/` if their headline
    leads; rank 0 writes."""
    size = recipe.run.micro_batch or max(1, max(recipe.data.batch.values()) // world_size())
    average_batch_norm_statistics(task)
    scores = evaluate(
        task,
        held_out,
        batch_size=size,
        limit=recipe.run.eval_records,
        bad_share=recipe.data.bad_share,
        autocast=precision,
    )
    log.write(step, {f"val/{name}": value for name, value in scores.items()})
    reshard(task)
    if rank() == 0:
        write_text(out / "scores.json", json.dumps({"step": step, **scores}, indent=1) + "\n")
    headline = scores[task.headline]
    log.info(f"{log.name}  step {step}  val {task.headline} {headline:.4f}")
    if best is not None and headline <= best:
        return best
    save_weights(task, out / "best")
    return headline


def save_weights(task: Task, directory: Path) -> None:
    """Write the weights, whole, from rank 0; every process takes part where they are sharded."""
    tensors = gather_weights(task)
    if rank() == 0:
        store.save_weights(task, directory, tensors=tensors)
    barrier()
