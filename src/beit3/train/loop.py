"""The loop that trains every task: start, records, network, optimizer, resume, then step after step.

A step's loss is the sum over loss names of weight * (sum over targets) / (targets of the whole step, all micro-batches
and processes), so that accumulation, three objectives and any number of processes give one number.
"""

import json
import math
import platform
import signal
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint as recomputed

from beit3.config import to_dict
from beit3.data.loader import PASSED_OVER, Examples, Source, step_batches, step_places
from beit3.data.records import locate
from beit3.ops.collectives import all_reduce, barrier, leader_first, rank, world_size
from beit3.progress import bar
from beit3.recipe import Recipe
from beit3.task import Batch, Task, fit_vocabulary
from beit3.tokenizer.text import TextTokenizer
from beit3.train import checkpoint
from beit3.train.evaluate import evaluate, to_device
from beit3.train.launch import autocast, seed_step, start
from beit3.train.log import Log
from beit3.train.optim import clip_gradients, learning_rate, make_optimizer, set_learning_rate
from beit3.train.root import embedded_root
from beit3.weights import store
from beit3.weights.fill import task_name


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop (Ctrl-C, SIGTERM) and has saved where it was; start it again to go on."""


def train(recipe: Recipe, task_class: type[Task], *, out: str | Path, init: str | Path = "", label: str = "") -> dict[str, Any]:
    """Train `task_class` by `recipe` into the run directory `out`; returns the final scores.

    `out` holds recipe.json, metrics.jsonl, checkpoints/, best/ and last/ (weights). An `out` with the same recipe is
    resumed, with another one refused. `init`: weights to start from. Raises ValueError for anything the user can mend,
    FloatingPointError for a loss or gradient that is not finite, Interrupted after Ctrl-C.
    """
    run, out = recipe.run, Path(out)
    device = start(run)
    with leader_first(), bar("writing the world") as advance:
        root = Path(recipe.data.root) if recipe.data.root else embedded_root(task_class, progress=advance)
    sources = {name: open_source(root, task_class, name, recipe) for name in task_class.sources if recipe.data.batch.get(name)}
    if not sources:
        raise ValueError(f"data.batch names none of the sources {', '.join(task_class.sources)}: give each a number of records")
    refuse_accumulation(task_class, recipe)
    held_out = {name: open_source(root, task_class, name, recipe, "val") for name in sources}
    tokenizer = open_tokenizer(recipe, root, init)
    if tokenizer is None and any("text" in source[0] for source in sources.values()):
        raise ValueError(f"no text tokenizer: give --data.text_model FILE, or write {root / store.TEXT} with beit3 tokenizer train")
    steps, warmup = count_steps(recipe, {name: len(source) for name, source in sources.items()})
    task = task_class(task_class.configure(fit_vocabulary(recipe.task, tokenizer), root), tokenizer=tokenizer)
    mine = {"task": task_name(task_class), "init": str(init), "recipe": recipe.to_dict(), "inputs": inputs_of(task)}
    refuse_other_run(out, mine)
    if finished(out, steps):
        return json.loads((out / "scores.json").read_text())

    task.init_weights(run.seed)
    if init:
        report = store.initialise_from(task, init)
    task.to(device).train()
    wrap_blocks(task, recompute=run.checkpointing, compiled=run.compile)
    optimizer = make_optimizer(task, recipe.optim)
    parameters = [parameter for _, parameter in task.trainable()]

    barrier()  # every process has looked at `out` before one writes there
    if rank() == 0:
        claim(out, mine)
    barrier()
    done, best = 0, None
    if newest := checkpoint.newest(out):
        state = checkpoint.restore(newest, task, optimizer, device)
        done, best = state["step"], state["best"]
    log = Log(out, label or out.name, steps, first_step=done, speak=rank() == 0)
    if init and not done:
        for line in report.lines():
            log.say(f"{log.name}  {line}")
    examples = Examples(sources, task.example, seed=run.seed)
    places = partial(
        step_places, batch=recipe.data.batch, sources=list(sources), micro_batch=run.micro_batch, rank=rank(), world=world_size()
    )
    batches = step_batches(examples, task.collate, places, range(done, steps), workers=recipe.data.workers)
    broken: dict[str, set[str]] = {}

    with Stop() as stop:
        for step, micro_batches in enumerate(batches, start=done):
            seed_step(run.seed, step)
            note_broken(broken, micro_batches, sources, recipe.data.bad_share, log)
            lr = learning_rate(step, steps, warmup, recipe.optim)
            set_learning_rate(optimizer, lr)
            micro_batches = [to_device(batch, device) | {"step": step, "steps": steps} for batch in micro_batches]
            totals = sum_targets(task, micro_batches)
            values = backward(task, micro_batches, totals, autocast(run, device))
            norm = clip_gradients(parameters, recipe.optim.clip)
            check_finite(step, values["loss"], norm, micro_batches)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

            after = step + 1
            values |= {"lr": lr, "gradient_norm": norm, "samples": sum(recipe.data.batch[name] for name in sources)}
            log.samples += int(values["samples"])
            if after % run.log_every == 0 or after == steps:
                log.write(after, values)
            log.show(after, values)
            if after == steps or (run.eval_every and after % run.eval_every == 0):
                best = evaluate_and_keep(task, recipe, held_out, out, after, best, log)
            asked = stop.agreed()
            if asked or after == steps or (run.save_every and after % run.save_every == 0):
                if rank() == 0:
                    checkpoint.save(out, after, task, optimizer, best, keep=run.keep)
                barrier()  # a process that leaves early would have the others killed while they write
            if asked and after < steps:
                log.close()
                raise Interrupted(f"{out} stopped after step {after} of {steps}; the same command goes on from there")
    if rank() == 0:
        store.save(task, out / "last")
    barrier()
    log.close()
    return json.loads((out / "scores.json").read_text())


def open_source(root: Path, task_class: type[Task], name: str, recipe: Recipe, split: str = "train") -> Source:
    """The records of one split under `root`."""
    limit = recipe.data.limit if split == "train" else 0
    return Source(locate(str(root), task_name(task_class), name, split), root, limit=limit)


def open_tokenizer(recipe: Recipe, root: Path, init: str | Path) -> TextTokenizer | None:
    """The text tokenizer a run reads with: the recipe's, the initial weights', or the root's; None where there is none."""
    candidates = [Path(recipe.data.text_model)] if recipe.data.text_model else []
    candidates += [store.find(init) / store.TEXT] if init and Path(init).is_dir() else []
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
    if task_class.moves_in_forward and 0 < recipe.run.micro_batch < share:
        raise ValueError(f"run.micro_batch {recipe.run.micro_batch}: {task_name(task_class)} needs its share of {share} records at once")


def inputs_of(task: Task) -> dict[str, Any]:
    """What a run reads beside its recipe: the config that the records completed, tokenizer and frozen parts by digest."""
    frozen = {name: file.sha256 for name, file in getattr(task, "frozen_files", {}).items()}
    digest = task.tokenizer.digest if task.has_tokenizer else None
    return {"config": to_dict(task.config), "tokenizer": digest, "frozen": frozen}


def refuse_other_run(out: Path, mine: dict[str, Any]) -> None:
    """ValueError where `out` holds anything else than this run."""
    path = out / "recipe.json"
    if path.exists():
        theirs = json.loads(path.read_text())
        theirs.pop("environment", None)
        if theirs != mine:
            field = first_difference(theirs, mine)
            raise ValueError(f"{out} holds another run (its {field} differs): give another --out, or delete it")
    elif out.exists() and (out.is_file() or any(out.iterdir())):
        raise ValueError(f"{out} is not empty and holds no run: give another --out")


def claim(out: Path, mine: dict[str, Any]) -> None:
    """Write recipe.json, once everything that the recipe asks for could be built."""
    path = out / "recipe.json"
    if path.exists():
        return
    out.mkdir(parents=True, exist_ok=True)
    environment = {"python": platform.python_version(), "torch": torch.__version__, "processes": world_size()}
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(mine | {"environment": environment}, indent=1) + "\n")
    temporary.rename(path)


def first_difference(theirs: Any, mine: Any, where: str = "") -> str:
    """Dotted name of the first field in which two JSON values differ."""
    if isinstance(theirs, dict) and isinstance(mine, dict):
        for key in [*mine, *theirs]:
            if theirs.get(key) != mine.get(key):
                return first_difference(theirs.get(key), mine.get(key), f"{where}.{key}".lstrip("."))
    return where


def finished(out: Path, steps: int) -> bool:
    """Whether `out` has run all its steps and stored its weights."""
    newest = checkpoint.newest(out)
    return newest is not None and newest.stem == f"step_{steps:08d}" and (out / "last" / "config.json").exists()


def sum_targets(task: Task, micro_batches: Iterable[Batch]) -> dict[str, int]:
    """Targets of the step per loss name, over all micro-batches and processes."""
    totals: dict[str, int] = {}
    for batch in micro_batches:
        for name, count in task.targets(batch).items():
            totals[name] = totals.get(name, 0) + count
    if world_size() > 1:
        counts = all_reduce(torch.tensor([totals[name] for name in totals], dtype=torch.int64))
        totals = dict(zip(totals, counts.tolist(), strict=True))
    return totals


def backward(task: Task, micro_batches: Iterable[Batch], totals: Mapping[str, int], precision: torch.autocast) -> dict[str, float]:
    """Gradients of the step's loss; returns `loss`, `loss/<name>` and the metrics, each averaged over its targets."""
    sums: dict[str, float] = {"loss": 0.0}
    for batch in micro_batches:
        with precision:
            result = task(batch)
        means = {name: value / max(1, totals[name]) for name, value in result["losses"].items()}
        loss = torch.stack([task.loss_weights.get(name, 1.0) * mean for name, mean in means.items()]).sum()
        loss.backward()
        logged = {"loss": loss} | {f"loss/{name}": mean for name, mean in means.items()}
        for name, value in result["metrics"].items():
            target = name.rpartition("/")[0]
            logged[name.removeprefix("loss/")] = value / max(1, totals[target])
        for name, value in logged.items():
            sums[name] = sums.get(name, 0.0) + float(value.detach())
    return average_gradients(task, sums) if world_size() > 1 else sums


def average_gradients(task: Task, sums: dict[str, float]) -> dict[str, float]:
    """Sum gradients and logged values over processes: every part was already divided by the global target count."""
    for _, parameter in task.trainable():
        if parameter.grad is not None:
            parameter.grad = all_reduce(parameter.grad)
    values = all_reduce(torch.tensor(list(sums.values()), dtype=torch.float64))
    return dict(zip(sums, values.tolist(), strict=True))


def check_finite(step: int, loss: float, norm: float, micro_batches: Iterable[Batch]) -> None:
    """Stop on a loss or gradient that is not finite, naming step and records."""
    if math.isfinite(loss) and math.isfinite(norm):
        return
    ids = [str(key) for batch in micro_batches for key in batch.get("id", [])]
    raise FloatingPointError(
        f"step {step + 1}: loss {loss}, gradient norm {norm}; records {', '.join(ids[:8])}{' ...' if len(ids) > 8 else ''}; "
        "lower optim.lr, set optim.clip, or look at those records"
    )


def note_broken(broken: dict[str, set[str]], micro_batches: list[Batch], sources: Mapping[str, Source], share: float, log: Log) -> None:
    """Name each unreadable record once; more than `share` of a source's records end the run."""
    for batch in micro_batches:
        for line in batch.pop(PASSED_OVER):
            name = line.split(" record ")[0]
            lines = broken.setdefault(name, set())
            if line in lines:
                continue
            lines.add(line)
            log.say(f"passed over: {line}")
            if len(lines) > share * len(sources[name]):
                raise ValueError(
                    f"{len(lines)} of {len(sources[name])} records of {sources[name].path} cannot be read, "
                    f"data.bad_share allows {share:.0%}: {'; '.join(sorted(lines)[:20])}"
                )


def evaluate_and_keep(
    task: Task, recipe: Recipe, held_out: Mapping[str, Source], out: Path, step: int, best: float | None, log: Log
) -> float | None:
    """Score the val split, write scores.json, and keep the weights as `best/` if their headline leads; rank 0 writes."""
    size = recipe.run.micro_batch or max(recipe.data.batch.values())
    scores = evaluate(task, held_out, batch_size=size, limit=recipe.run.eval_records, bad_share=recipe.data.bad_share)
    log.write(step, {f"val/{name}": value for name, value in scores.items()})
    if rank() == 0:
        temporary = out / "scores.tmp"
        temporary.write_text(json.dumps({"step": step, **scores}, indent=1) + "\n")
        temporary.rename(out / "scores.json")
    headline = scores[task.headline]
    log.say(f"{log.name}  step {step}  val {task.headline} {headline:.4f}")
    if best is not None and headline <= best:
        return best
    if rank() == 0:
        store.save(task, out / "best")
    return headline


def wrap_blocks(task: Task, *, recompute: bool, compiled: bool) -> None:
    """Activation checkpointing, then compilation, of each block of the backbone, from outside; names do not change."""
    blocks = list(getattr(task.backbone, "blocks", ()))
    if (recompute or compiled) and not blocks:
        raise ValueError(f"{task_name(type(task))} has no blocks to recompute or compile: leave run.checkpointing and run.compile off")
    for block in blocks:
        if recompute:
            block.forward = partial(recomputed, block.forward, use_reentrant=False)  # type: ignore[method-assign]
        if compiled:
            block.compile()


class Stop:
    """Turns Ctrl-C and SIGTERM into a request that the loop answers after the step at hand; a second Ctrl-C acts at once."""

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> "Stop":
        self.previous = {}
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self.previous[number] = signal.signal(number, self._ask)
            except ValueError:  # signals belong to the main thread; elsewhere the caller stops us
                continue
        return self

    def agreed(self) -> bool:
        """Whether any process was asked, so that all of them stop after the same step."""
        return bool(all_reduce(torch.tensor(int(self.asked))))

    def _ask(self, number: int, frame: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
