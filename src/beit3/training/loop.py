"""The loop that trains every task.

`train` prepares a run: process, records, network, run directory. `Trainer.fit` is the loop; its
steps (forward and backward, update, log, save, evaluate) are the methods below it.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from beit3.data.loader import ExampleDataset, RecordDataset, load_batches, sample_micro_batches
from beit3.files import read_json, write_text
from beit3.ops.batch_norm import average_batch_norm_statistics
from beit3.ops.collectives import barrier, rank, rank_zero_first, world_size
from beit3.progress import show_progress
from beit3.recipe import Recipe, TaskConfig
from beit3.task import Batch, Task, grow_vocabulary, task_name
from beit3.tokenizer.text import TextTokenizer
from beit3.training.checkpoint import Checkpointer
from beit3.training.directory import (
    check_same_run,
    describe_inputs,
    is_finished,
    lock_run_directory,
)
from beit3.training.errors import explain_errors
from beit3.training.evaluate import evaluate, to_device
from beit3.training.launch import init_device, seed_step
from beit3.training.log import Log, measure_peak_memory
from beit3.training.optim import (
    clip_gradients,
    compute_learning_rate,
    count_steps,
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
from beit3.training.record_checks import check_records
from beit3.training.sources import (
    check_tokenizer,
    find_records_root,
    has_raw_text,
    open_source,
    open_tokenizer,
)
from beit3.training.step import (
    backward,
    check_finite,
    measure_gradient_norms,
    report_unreadable_records,
    sum_targets,
)
from beit3.training.stop import Interrupted, StopRequest
from beit3.training.watchdog import Watchdog
from beit3.weights import store
from beit3.weights.initialization import initialize_from
from beit3.weights.matching import gather_weights


def train(
    recipe: Recipe,
    task_class: type[Task],
    *,
    out: str | Path,
    init: str | Path = "",
    label: str = "",
) -> dict[str, Any]:
    """Trains a task by a recipe and returns its final scores.

    Args:
        recipe: The recipe of the run.
        task_class: The task.
        out: The run directory (beit3.training.directory draws it). One that holds a run of the same
            recipe is resumed, one that holds anything else is refused.
        init: Weights to start from: a directory of weights, a run, or a released file.
        label: The name of the run on the console; by default that of `out`.

    Raises:
        ValueError: The user can mend it; the message says how.
        FloatingPointError: A loss or gradient is not finite.
        ConnectionError: Another process of the run has ended.
        OSError: The disk is full.
        Interrupted: The run was stopped by Ctrl-C, SIGTERM or SIGUSR1 and can be resumed.
    """
    out = Path(out)
    device = init_device(recipe.run)

    # Records: root directory, train and val split, text tokenizer
    with rank_zero_first(), show_progress("writing the world") as advance:
        root = find_records_root(task_class, recipe.data.root, recipe.data.batch, progress=advance)
    sources, val_sources = open_sources(task_class, recipe, root)
    check_accumulation(task_class, recipe)
    tokenizer = open_training_tokenizer(recipe, root, init, sources)

    # Network: on the meta device, so that everything below fails before any memory is used
    config = task_class.configure(grow_vocabulary(recipe.task, tokenizer), root)
    task = build_task(task_class, config, tokenizer, recipe.run, device)
    check_tokenizer(task, sources)

    # Run directory: the same run or an empty one
    description = {
        "task": task_name(task_class),
        "init": str(init),
        "recipe": recipe.to_dict(),
        "inputs": describe_inputs(task),
    }
    check_same_run(out, description)
    num_steps, warmup = count_steps(recipe, {name: len(source) for name, source in sources.items()})
    sample_step_positions(0, recipe, list(sources))  # raises if batches do not divide over ranks

    # Training
    if not is_finished(out, num_steps):
        materialize(task, device, recipe.run.seed)
        report = initialize_from(task, init) if init else None
        out.mkdir(parents=True, exist_ok=True)  # where that fails, no record need be read
        check_run_records(task_class, config, recipe, sources, val_sources)
        log = Log(out, label or out.name, num_steps, enabled=rank() == 0)
        with explain_errors(out), lock_run_directory(out, description, device), closing(log):
            trainer = Trainer(
                task,
                recipe,
                sources,
                val_sources,
                out=out,
                log=log,
                device=device,
                warmup=warmup,
            )
            trainer.resume()
            if not trainer.first_step:
                for line in (*(report.lines() if report else ()), *task.training_notes):
                    log.info(f"{log.name}  {line}")
            trainer.fit()
    scores_file = out / "scores.json"
    return read_json(scores_file) if scores_file.exists() else {"step": num_steps}


class Trainer:
    """A run at work: its network, optimizer, records and files, and the loop over its steps."""

    def __init__(
        self,
        task: Task,
        recipe: Recipe,
        sources: Mapping[str, RecordDataset],
        val_sources: Mapping[str, RecordDataset],
        *,
        out: Path,
        log: Log,
        device: torch.device,
        warmup: int,
    ):
        self.task, self.recipe, self.out, self.log = task, recipe, out, log
        self.sources, self.val_sources = sources, val_sources
        self.device, self.num_steps, self.warmup = device, log.num_steps, warmup
        self.autocast = make_autocast(recipe.run, device)
        self.optimizer = make_optimizer(task, recipe.optim)
        self.checkpointer = Checkpointer(
            out, keep=recipe.run.keep, asynchronous=recipe.run.async_save, info=log.info
        )
        self.first_step = 0
        self.evaluates_first = False
        self.best_score: float | None = None
        self.unreadable: dict[str, set[str]] = {}  # source -> lines about its records
        self.move_batch = partial(to_device, device=device, dtype=get_parameter_dtype(recipe.run))

    def resume(self) -> None:
        """Restores the newest checkpoint, if there is one, and opens the log at its step.

        A checkpoint is written before the evaluation of its step, so an evaluation that was due
        then is made again, and its lines are dropped from the log.
        """
        self.first_step, self.best_score = self.checkpointer.restore(self.task, self.optimizer)
        self.evaluates_first = self.first_step > 0 and self.evaluation_is_due(self.first_step)
        self.log.begin(self.first_step, repeats_evaluation=self.evaluates_first)

    def fit(self) -> None:
        """Trains to the last step; then everything that the run leaves is in its directory."""
        run = self.recipe.run
        batches = self.load_micro_batches()
        with StopRequest() as stop, Watchdog(self.log) as watchdog:
            if self.evaluates_first:
                self.evaluate(self.first_step)
            for step in range(self.first_step, self.num_steps):
                num_done = step + 1

                # Records
                watchdog.begin_step(step)
                micro_batches = next(batches)
                watchdog.mark_loaded()
                self.report_unreadable(micro_batches)

                # Forward and backward
                seed_step(run.seed, step)  # not earlier: the loader uses the same generator
                lr = self.set_learning_rate(step)
                values, losses = self.forward_backward(step, micro_batches)

                # Clip and update
                log_is_due = self.is_due(num_done, run.log_every)
                part_norms = measure_gradient_norms(self.task) if log_is_due else {}
                norm = self.clip_gradients()
                check_finite(step, values["loss"], norm, micro_batches, losses)
                self.update()
                watchdog.end_step()

                # Log
                self.log.num_samples += self.batch_size
                values |= {"lr": lr, "gradient_norm": norm, "samples": self.batch_size}
                if log_is_due:
                    self.write_metrics(num_done, values | part_norms, watchdog.pop_timings())
                self.log.print_progress(num_done, values)

                # Save, also before every evaluation: it may fail, or be killed
                stop_signal = stop.agree()
                evaluation_is_due = self.evaluation_is_due(num_done)
                save_is_due = evaluation_is_due or self.is_due(num_done, run.save_every)
                if stop_signal or save_is_due:
                    self.save(num_done)

                # Stop if asked to; the resumed run then evaluates
                if stop_signal and num_done < self.num_steps:
                    self.interrupt(num_done, stop_signal)

                # Evaluate
                if evaluation_is_due:
                    self.evaluate(num_done)
        self.checkpointer.wait()
        save_weights(self.task, self.out / "last")

    @property
    def batch_size(self) -> int:
        """Records of all sources in one step, over all processes."""
        return sum(self.recipe.data.batch[name] for name in self.sources)

    def is_due(self, num_done: int, every: int) -> bool:
        """Returns whether something is due after `num_done` steps; always after the last one."""
        return num_done == self.num_steps or (every > 0 and num_done % every == 0)

    def evaluation_is_due(self, num_done: int) -> bool:
        """Returns whether the run is scored after `num_done` steps."""
        return bool(self.val_sources) and self.is_due(num_done, self.recipe.run.eval_every)

    def load_micro_batches(self) -> Iterator[list[Batch]]:
        """Yields this process's micro-batches of each step that is left."""
        maker = self.task.without_network()
        return load_batches(
            ExampleDataset(self.sources, maker.example, seed=self.recipe.run.seed),
            maker.collate,
            partial(sample_step_positions, recipe=self.recipe, source_names=list(self.sources)),
            range(self.first_step, self.num_steps),
            workers=self.recipe.data.workers,
            pinned=self.device.type == "cuda",
        )

    def report_unreadable(self, micro_batches: list[Batch]) -> None:
        """Logs records that the loader skipped; raises ValueError if there are too many."""
        report_unreadable_records(
            self.unreadable, micro_batches, self.sources, self.recipe.data.bad_share, self.log
        )

    def set_learning_rate(self, step: int) -> float:
        """Sets the learning rate of a step and returns it, without the groups' factors."""
        lr = compute_learning_rate(step, self.num_steps, self.warmup, self.recipe.optim)
        set_learning_rate(self.optimizer, lr)
        return lr

    def forward_backward(
        self, step: int, micro_batches: list[Batch]
    ) -> tuple[dict[str, float], list[Tensor]]:
        """Computes the step's gradients; returns losses and metrics, and micro-batches' losses."""
        counters = {"step": step, "steps": self.num_steps}
        micro_batches = [batch | counters for batch in micro_batches]
        totals = sum_targets(self.task, micro_batches)
        return backward(self.task, micro_batches, totals, self.autocast, self.move_batch)

    def clip_gradients(self) -> float:
        """Clips the gradients and returns their norm before."""
        parameters = (parameter for _, parameter in self.task.trainable_parameters())
        return clip_gradients(parameters, self.recipe.optim.clip)

    def update(self) -> None:
        """Updates the weights and frees the gradients."""
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def write_metrics(
        self, num_done: int, values: Mapping[str, float], timings: Mapping[str, float]
    ) -> None:
        """Writes the values of a step with the groups' learning rates and the peak memory in GB."""
        rates = get_group_learning_rates(self.optimizer)
        memory = {"memory": measure_peak_memory()}
        self.log.write(num_done, {**values, **rates, **memory, **timings})

    def save(self, num_done: int) -> None:
        """Writes a checkpoint, which holds the best score before the evaluation of this step."""
        average_batch_norm_statistics(self.task)
        self.checkpointer.save(num_done, self.task, self.optimizer, self.best_score)

    def evaluate(self, num_done: int) -> None:
        """Scores the val split, writes scores.json, and saves the weights as `best/` if they lead.

        The checkpoint of this step is complete by then. Rank 0 writes.
        """
        self.checkpointer.wait()
        recipe, task = self.recipe, self.task
        scores = evaluate(
            task,
            self.val_sources,
            batch_size=recipe.run.micro_batch or max(1, count_rank_records(recipe)),
            bad_share=recipe.data.bad_share,
            workers=recipe.data.workers,
            autocast=self.autocast,
        )
        reshard(task)
        self.log.write(num_done, {f"val/{name}": value for name, value in scores.items()})
        if rank() == 0:
            text = json.dumps({"step": num_done, **scores}, indent=1)
            write_text(self.out / "scores.json", text + "\n")
        score = scores[task.headline]
        self.log.info(f"{self.log.name}  step {num_done}  val {task.headline} {score:.4f}")
        if self.best_score is None or score > self.best_score:
            save_weights(task, self.out / "best")
            self.best_score = score

    def interrupt(self, num_done: int, stop_signal: int) -> NoReturn:
        """Ends the run after its checkpoint is written, with the status of the signal."""
        self.checkpointer.wait()
        raise Interrupted(
            f"{self.out} stopped after step {num_done} of {self.num_steps}; the same command "
            "resumes it",
            stop_signal,
        )


def open_sources(
    task_class: type[Task], recipe: Recipe, root: Path
) -> tuple[dict[str, RecordDataset], dict[str, RecordDataset]]:
    """Opens the train and the val split of the sources that `data.batch` names.

    No val split is opened where `run.eval_every` is -1. Both hold only the records that the run
    reads, by `data.limit` and `run.eval_records`.

    Raises ValueError if it names none of the task's sources.
    """
    names = [name for name in task_class.sources if recipe.data.batch.get(name)]
    if not names:
        raise ValueError(
            f"data.batch names none of the sources {', '.join(task_class.sources)}: give each a "
            "number of records"
        )
    sources = {name: open_source(root, task_class, name, recipe) for name in names}
    val_sources = {}
    if recipe.run.eval_every >= 0:
        val_sources = {
            name: open_source(
                root, task_class, name, recipe, "val", eval_records=recipe.run.eval_records
            )
            for name in names
        }
    return sources, val_sources


def check_run_records(
    task_class: type[Task],
    config: TaskConfig,
    recipe: Recipe,
    sources: Mapping[str, RecordDataset],
    val_sources: Mapping[str, RecordDataset],
) -> None:
    """Raises ValueError for records that cannot be trained on, or val records without a score."""
    check = partial(check_records, task_class, config=config, bad_share=recipe.data.bad_share)
    with show_progress("checking records") as advance:
        check(sources, "train", progress=advance)
        check(val_sources, "score", progress=advance)


def open_training_tokenizer(
    recipe: Recipe, root: Path, init: str | Path, sources: Mapping[str, RecordDataset]
) -> TextTokenizer | None:
    """Returns the text tokenizer of a run, or None where no record has raw text.

    Raises ValueError if records have raw text and there is no tokenizer.
    """
    tokenizer = open_tokenizer(recipe, root, init)
    if tokenizer is None and any(has_raw_text(source[0]) for source in sources.values()):
        raise ValueError(
            "no text tokenizer: give --data.text_model FILE, or write "
            f"{root / store.TOKENIZER_FILE} with beit3 tokenizer train"
        )
    return tokenizer


def sample_step_positions(
    step: int, recipe: Recipe, source_names: list[str]
) -> list[list[tuple[str, int]]]:
    """Returns the positions of the records of each micro-batch of this process in one step."""
    return sample_micro_batches(
        step,
        recipe.data.batch,
        source_names,
        micro_batch=recipe.run.micro_batch,
        rank=rank(),
        world=world_size(),
    )


def count_rank_records(recipe: Recipe) -> int:
    """Returns the records per step of the largest source on one process."""
    return max(recipe.data.batch.values()) // world_size()


def check_accumulation(task_class: type[Task], recipe: Recipe) -> None:
    """Raises ValueError for several micro-batches a step if the task's forward changes buffers.

    A codebook's moving average is such a buffer.
    """
    num_records = count_rank_records(recipe)
    if task_class.updates_buffers and 0 < recipe.run.micro_batch < num_records:
        raise ValueError(
            f"run.micro_batch {recipe.run.micro_batch}: {task_name(task_class)} needs all "
            f"{num_records} records of a process at once: leave run.micro_batch out"
        )


def save_weights(task: Task, directory: Path) -> None:
    """Writes the complete weights from rank 0; all processes take part where they are sharded."""
    tensors = gather_weights(task)
    if rank() == 0:
        store.save_weights(task, directory, tensors=tensors)
    barrier()
