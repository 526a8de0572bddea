"""The command line: each verb is one library call. Errors are one line and status 2; `--debug` shows where they came from."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
"""Threads that wait must not spin: where another program shares the cores, spinning made steps 20 times slower here."""

TRAIN_USAGE = "fields of the recipe are overridden as --section.field value, for example --optim.lr 1e-4 --data.root DIR"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit status: 0, 2 for an error that the user can mend, 130 when interrupted."""
    parser, debug = make_parser(), False
    try:
        known, rest = parser.parse_known_args(arguments)
        if not hasattr(known, "verb"):
            parser.print_help()
            return 2
        debug = known.debug
        used_with = known.verb in (evaluate, predict) and all(
            word.startswith("--task.") for word in rest if word.startswith("--")
        )
        if rest and known.verb not in (train, plan, prepare) and not used_with:
            raise ValueError(f"unknown argument {rest[0]}: see beit3 {known.name} --help")
        known.verb(known, rest)
        return 0
    except KeyboardInterrupt as stop:
        print(
            f"\n{stop if str(stop) else 'interrupted; the same command goes on from the last checkpoint'}",
            file=sys.stderr,
        )
        return getattr(stop, "status", 130)
    except (ValueError, FloatingPointError, OSError) as error:
        if debug:
            raise
        print(f"beit3: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


class Parser(argparse.ArgumentParser):
    """Its errors are one line, like all others."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; see {self.prog} --help")


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="beit3", description="BEiT-3: pretrain, fine-tune, evaluate, use.")
    verbs = parser.add_subparsers(metavar="VERB")

    def verb(name: str, call: Any, text: str, **options: Any) -> argparse.ArgumentParser:
        sub = verbs.add_parser(name, help=text, description=text, allow_abbrev=False, **options)
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
        sub.set_defaults(verb=call, name=name)
        return sub

    sub = verb(
        "demo",
        demo,
        "The tour on the embedded world: tokenizers, pretraining, every task, report.html.",
    )
    length = sub.add_mutually_exclusive_group()
    length.add_argument("--fast", action="store_true", help="a shorter tour, under two minutes")
    length.add_argument(
        "--full",
        action="store_true",
        help="every demo recipe at full length, several seeds, with and without pretraining",
    )
    sub.add_argument(
        "--out",
        default="",
        help="run directory (default runs/demo, runs/demo-fast or runs/demo-full)",
    )

    sub = verb("world", world, "Write the embedded world in the public data sets' own formats.")
    sub.add_argument("--out", required=True)
    sub.add_argument("--scenes", type=int, default=6000, help="training scenes of each kind")
    sub.add_argument("--image-size", type=int, default=32)
    sub.add_argument("--seed", type=int, default=0)

    options = "pretrain's texts: --pack N tokens a record (512; 0 = paragraphs in words), --field NAME in .jsonl and .parquet, --workers N"
    sub = verb("prepare", prepare, "Public annotation files -> records.", epilog=options)
    sub.add_argument("task")
    sub.add_argument("--raw", required=True, help="directory of the downloaded files")
    sub.add_argument("--root", required=True, help="directory that receives the records")
    sub.add_argument(
        "--source",
        default="",
        help="images, texts or pairs for pretrain; the others have one source",
    )

    sub = verb(
        "tokenizer", tokenizer, "Train or use a SentencePiece text tokenizer with BEiT-3's ids."
    )
    sub.add_argument("action", choices=("train", "encode", "decode"))
    sub.add_argument(
        "inputs", nargs="*", help="train: text or record files; encode: a text; decode: ids"
    )
    sub.add_argument(
        "--model", required=True, help="the .spm file, written by train and read by the others"
    )
    sub.add_argument("--vocab-size", type=int, default=64000)
    sub.add_argument("--type", choices=("unigram", "bpe"), default="unigram")

    sub = verb(
        "train",
        train,
        "Train a task by a recipe.",
        usage="beit3 train TASK [RECIPE] [options]",
        epilog=TRAIN_USAGE,
    )
    sub.add_argument("task")
    sub.add_argument(
        "--init", default="", help="weights to start from: a directory of ours or a released file"
    )
    sub.add_argument("--out", default="", help="run directory (default runs/TASK-RECIPE)")

    usage = "beit3 plan TASK [RECIPE] [options]"
    sub = verb(
        "plan",
        plan,
        "What a run will take: memory of a device, micro-batch, time, cost.",
        usage=usage,
        epilog=TRAIN_USAGE,
    )
    sub.add_argument("task")
    sub.add_argument("--gpus", type=int, default=1, help="processes, one a device")
    sub.add_argument(
        "--gpu",
        default="h100",
        help="a100-40, a100-80, h100, h200, b200, l40s, rtx4090 and others; cpu is this machine",
    )
    sub.add_argument(
        "--utilisation", type=float, default=0.4, help="share of the device's peak that is reached"
    )
    sub.add_argument("--price", type=float, default=0.0, help="of one device for an hour")
    sub.add_argument(
        "--records", type=int, default=0, help="of the largest source, where a recipe counts epochs"
    )
    sub.add_argument("--json", action="store_true")

    sub = verb("eval", evaluate, "Score weights on a split.")
    sub.add_argument("weights")
    sub.add_argument("--split", default="val")
    sub.add_argument(
        "--data.root", dest="root", default="", help="records (default: the embedded world)"
    )
    sub.add_argument("--batch", type=int, default=32)
    sub.add_argument(
        "--predictions", default="", help="also write the predictions to this jsonl file"
    )
    sub.add_argument(
        "--submission",
        default="",
        help="instead of scores write what the evaluation server takes (vqa, captioning)",
    )
    sub.add_argument(
        "--java",
        action="store_true",
        help="METEOR and SPICE too, by pycocoevalcap's Java programs (captioning; minutes)",
    )
    sub.add_argument(
        "--int8", action="store_true", help="in 8-bit integers, on CPU (docs/speed.md)"
    )
    released(sub)

    sub = verb("score", score, "Score a predictions file.")
    sub.add_argument("task")
    sub.add_argument("predictions")
    sub.add_argument("--split", default="val")
    sub.add_argument("--data.root", dest="root", default="")
    sub.add_argument("--source", default="main")
    sub.add_argument("--java", action="store_true", help="METEOR and SPICE too, as for eval")

    sub = verb(
        "predict",
        predict,
        "Ask weights, with what their task takes: an image and a question, two images and a statement.",
    )
    sub.add_argument("weights")
    sub.add_argument("inputs", nargs="+")
    sub.add_argument(
        "--out",
        default="",
        help="also a picture: what coco or ade20k found in the image, drawn onto it",
    )
    sub.add_argument(
        "--min-score",
        type=float,
        default=None,
        help="with --out: of the objects that are drawn and listed (0.3)",
    )
    sub.add_argument("--int8", action="store_true", help="in 8-bit integers, as for eval")
    released(sub)

    sub = verb("convert", convert, "Released files to directories of weights, and back.")
    sub.add_argument(
        "kind",
        choices=("official", "vqkd", "clip"),
        help="BEiT-3, BEiT v2's visual tokenizer, CLIP as a teacher",
    )
    sub.add_argument(
        "weights",
        help="the file; for official also a directory of ours or a run, which goes back into a file",
    )
    sub.add_argument("--out", required=True, help="a directory; a .pth file where weights go back")
    released(sub)

    sub = verb("recipes", recipes, "What can be trained, and what each recipe reproduces.")
    sub.add_argument("task", nargs="?")
    sub.add_argument(
        "--released",
        action="store_true",
        help="the files released with BEiT-3 instead, and what they start",
    )
    sub.add_argument("--show", default="", help="print this recipe whole, as JSON")

    sub = verb(
        "report", report, "One self-contained HTML page of a run, or of several side by side."
    )
    sub.add_argument("runs", nargs="+")
    sub.add_argument("--out", default="", help="the page (default report.html in the first run)")

    sub = verb(
        "doctor", doctor, "Check this machine: packages, text tokenizer, cores, accelerator, disk."
    )
    sub.add_argument("--text-model", default="", help="a SentencePiece file to look at")
    sub.add_argument("--weights", default="", help="weights or a run to check whole")
    return parser


def released(sub: argparse.ArgumentParser) -> None:
    """What a released file does not say itself."""
    sub.add_argument(
        "--task",
        default=None,
        help="what to build, for example imagenet of retrieval's weights (default: what they are)",
    )
    sub.add_argument("--num-heads", type=int, default=None)
    sub.add_argument(
        "--text-model", default=None, help="the SentencePiece file of released weights"
    )
    sub.add_argument("--answers", default=None, help="the answer list of a released VQA file")
    sub.add_argument(
        "--classes",
        default=None,
        help="class names for imagenet, one per line (eval by names: default those of the records)",
    )
    sub.add_argument(
        "--prompt", default=None, help='what is said of a class name, for example "a photo of a {}"'
    )


def demo(known: argparse.Namespace, rest: list[str]) -> None:
    from beit3.demo import comparison, tour

    if known.full:
        comparison.run(Path(known.out or "runs/demo-full"))
    else:
        tour.run(
            Path(known.out or ("runs/demo-fast" if known.fast else "runs/demo")), fast=known.fast
        )


def world(known: argparse.Namespace, rest: list[str]) -> None:
    from beit3.progress import bar
    from beit3.world.export import write_world

    scenes = known.scenes
    with bar("world") as advance:
        write_world(
            known.out,
            num_train=scenes,
            num_val=max(1, scenes // 12),
            num_test=max(1, scenes // 12),
            num_questions=scenes * 3 // 2,
            image_size=known.image_size,
            seed=known.seed,
            progress=advance,
        )
    print(f"the world is at {known.out}")


def prepare(known: argparse.Namespace, rest: list[str]) -> None:
    from beit3.config import keyword_options
    from beit3.data.prepare.statistics import describe
    from beit3.task import load_task

    task = load_task(known.task)
    if not task.sources:
        raise ValueError(f"task {known.task} reads no records: there is nothing to prepare")
    source = known.source or task.sources[0]
    if source.partition("/")[0] not in task.sources:  # pairs/coco: a set of its own
        raise ValueError(
            f"--source {source} is none of {', '.join(task.sources)} of task {known.task}"
        )
    own = [name for name in task.sources if name not in task.records_from]
    if len(own) > 1 and not known.source:
        raise ValueError(f"task {known.task} has several sources: give --source {' or '.join(own)}")
    if source in task.records_from:
        raise ValueError(
            f"--source {source} of {known.task} are the records of {task.records_from[source]}: prepare those"
        )
    options = keyword_options(task.prepare, rest)
    report = task.prepare(Path(known.raw), Path(known.root), source, **options)
    print(describe(report), file=sys.stderr)
    print(json.dumps(report, indent=1, ensure_ascii=False))


def tokenizer(known: argparse.Namespace, rest: list[str]) -> None:
    from beit3.tokenizer.text import TextTokenizer, texts_of

    if known.action == "train":
        TextTokenizer.train(
            texts_of(known.inputs), vocab_size=known.vocab_size, model_type=known.type
        ).save(known.model)
        print(f"{TextTokenizer(known.model).vocab_size} ids at {known.model}")
    elif known.action == "encode":
        print(*TextTokenizer(known.model).encode(" ".join(known.inputs)))
    else:
        print(TextTokenizer(known.model).decode([int(value) for value in known.inputs]))


def train(known: argparse.Namespace, rest: list[str]) -> None:
    from beit3.ops.collectives import rank
    from beit3.task import load_task
    from beit3.training.loop import train as run

    name, recipe = recipe_with(known, rest, init=known.init)
    out = known.out or f"runs/{known.task}-{name}"
    scores = run(recipe, load_task(known.task), out=out, init=known.init)
    if rank() == 0:
        print(json.dumps(scores, indent=1))
        print(f"weights at {out}/last and {out}/best")


def plan(known: argparse.Namespace, rest: list[str]) -> None:
    from beit3.plan.table import plan as planned
    from beit3.plan.table import table
    from beit3.task import load_task

    name, recipe = recipe_with(known, rest)
    options = {
        option: getattr(known, option)
        for option in ("gpus", "gpu", "utilisation", "price", "records")
    }
    found = planned(load_task(known.task), recipe, **options)
    print(
        json.dumps(found, indent=1)
        if known.json
        else "\n".join(table(f"{known.task} {name}", found, recipe))
    )


def recipe_with(known: argparse.Namespace, rest: list[str], init: str = "") -> tuple[str, Any]:
    """The recipe that `rest` begins with, or the one that suits the weights to start from, with its fields overridden."""
    from beit3.config import override, suggestion
    from beit3.task import load_task
    from beit3.weights.store import recipe_for

    task = load_task(known.task)
    # An optional word before options: argparse's own rule for it changed between Python versions.
    name, fields = (
        (rest[0], rest[1:])
        if rest and not rest[0].startswith("--")
        else (recipe_for(task, init), rest)
    )
    if name not in task.recipes:
        list_tasks = list(task.recipes)
        raise ValueError(
            f"{known.task} has no recipe {name}{suggestion(name, list_tasks)} (known: {', '.join(list_tasks)})"
        )
    return name, override(task.recipes[name], fields)


def evaluate(known: argparse.Namespace, rest: list[str]) -> None:
    from beit3.data.stores.predictions import write_predictions
    from beit3.data.stores.records import write_text
    from beit3.ops.collectives import leader_first, rank
    from beit3.progress import bar
    from beit3.recipe import RunConfig
    from beit3.task import task_name
    from beit3.tasks.captioning import java_scorer
    from beit3.training.evaluate import predict_sources, score_sources
    from beit3.training.launch import start
    from beit3.training.parallel import autocast
    from beit3.training.root import split_sources

    device = start(RunConfig())  # under torchrun the processes share the records
    predictor = load_predictor(known, rest)
    predictor.require_trained()
    task = predictor.to(device).task
    if not task.sources:
        raise ValueError(
            f"task {task_name(type(task))} reads no records: there is nothing to score"
        )
    java = java_scorer(type(task)) if known.java else None
    with leader_first():
        sources = split_sources(type(task), known.root, known.split)
    predictor.agree_on_classes(next(iter(sources.values())).path.with_name(task.names_file))
    with bar("records") as advance:
        found = predict_sources(
            task,
            sources,
            batch_size=known.batch,
            precision=autocast(RunConfig(), device),
            progress=advance,
        )
    if rank():
        return
    if known.predictions:
        write_predictions(
            known.predictions,
            ({"source": name} | row for name, (rows, _) in found.items() for row in rows),
        )
    if known.submission:
        lines = [
            line for rows, records in found.values() for line in task.submission(rows, records)
        ]
        write_text(known.submission, json.dumps(lines, ensure_ascii=False) + "\n")
        print(
            f"{len(lines)} predictions for the evaluation server at {known.submission}",
            file=sys.stderr,
        )
    else:
        scores = score_sources(type(task), found)
        for rows, records in found.values():
            scores |= java(rows, records) if java else {}
        print(json.dumps(scores, indent=1))


def score(known: argparse.Namespace, rest: list[str]) -> None:
    from beit3.data.stores.predictions import read_predictions
    from beit3.task import load_task
    from beit3.tasks.captioning import java_scorer
    from beit3.training.root import split_sources

    task = load_task(known.task)
    java = java_scorer(task) if known.java else None
    sources = split_sources(task, known.root, known.split)
    if known.source not in sources:
        raise ValueError(
            f"--source {known.source} has no {known.split} records: there are {', '.join(sources)}"
        )
    try:
        rows = [
            row
            for row in read_predictions(known.predictions)
            if row.get("source", known.source) == known.source
        ]
        records = list(sources[known.source])
        scores = task.score(rows, records) | (java(rows, records) if java else {})
    except KeyError as field:
        raise ValueError(
            f"{known.predictions}: a prediction has no field {field}, as beit3 eval --predictions writes it"
        ) from None
    print(json.dumps(scores, indent=1))


def load_predictor(known: argparse.Namespace, rest: list[str]) -> Any:
    """Weights as the flags say; `rest`: `--task.field value` for how they are used, such as the decoding of captions."""
    from beit3.config import override
    from beit3.predict import load
    from beit3.recipe import Recipe

    predictor = load(
        known.weights,
        task=known.task,
        num_heads=known.num_heads,
        text_model=known.text_model,
        answers=known.answers,
        classes=known.classes,
        prompt=known.prompt or "",
        int8=known.int8,
    )
    config = override(Recipe(task=predictor.task.config), rest).task
    if config.model != predictor.task.config.model:
        raise ValueError(f"{' '.join(rest)}: the network of weights that exist cannot be another")
    predictor.task.config = config
    return predictor


def predict(known: argparse.Namespace, rest: list[str]) -> None:
    predictor = load_predictor(known, rest)
    if known.out or known.min_score is not None:
        from beit3.report.drawing import predict_drawn

        found = predict_drawn(predictor, known.inputs, known.out, min_score=known.min_score)
    else:
        found = predictor(*known.inputs)
    print(json.dumps(found, ensure_ascii=False))


def convert(known: argparse.Namespace, rest: list[str]) -> None:
    from beit3.predict import read_answers, read_classes
    from beit3.tokenizer.text import TextTokenizer
    from beit3.weights.convert import from_clip, from_official, to_file

    back = known.kind == "official" and Path(known.weights).is_dir()
    takes = {
        "official": ("task", "num_heads", "text_model", "answers", "classes", "prompt"),
        "vqkd": ("num_heads",),
        "clip": (),
    }
    for name in takes["official"]:
        if getattr(known, name) is not None and (back or name not in takes[known.kind]):
            raise ValueError(
                f"--{name.replace('_', '-')} is not for {'directories' if back else f'{known.kind} files'}: leave it out"
            )
    if back or known.kind == "clip":
        lines = (to_file if back else from_clip)(known.weights, known.out)
    else:
        lines = from_official(
            known.weights,
            known.out,
            task="vqkd" if known.kind == "vqkd" else known.task,
            num_heads=known.num_heads,
            answers=read_answers(known.answers),
            classes=read_classes(known.classes),
            prompt=known.prompt or "",
            tokenizer=TextTokenizer(known.text_model) if known.text_model else None,
        )
    print(*lines, sep="\n")


def recipes(known: argparse.Namespace, rest: list[str]) -> None:
    from beit3.config import suggestion
    from beit3.task import list_tasks, load_task
    from beit3.weights.catalog import table

    if known.released:
        print(*table(known.task), sep="\n")
        return
    tasks = {
        name: load_task(name).recipes for name in ([known.task] if known.task else list_tasks())
    }
    labels = {label for recipes in tasks.values() for label in recipes}
    if known.show and known.show not in labels:
        raise ValueError(
            f"no recipe {known.show}{suggestion(known.show, sorted(labels))} (known: {', '.join(sorted(labels))})"
        )
    for name, recipes in tasks.items():
        for label, recipe in recipes.items():
            if known.show == label:
                print(json.dumps(recipe.to_dict(), indent=1))
            elif not known.show:
                print(f"{name:10} {label:18} {recipe.note}")


def report(known: argparse.Namespace, rest: list[str]) -> None:
    from beit3.report.page import write_report

    print(write_report(known.runs, Path(known.out or Path(known.runs[0], "report.html"))))


def doctor(known: argparse.Namespace, rest: list[str]) -> None:
    from beit3.doctor import examine

    faults = 0
    for line in examine(text_model=known.text_model, weights=known.weights):
        print(line, flush=True)  # what follows may break the interpreter itself
        faults += line.startswith("FAULT")
    if faults:
        raise ValueError(f"{faults} of these lines name a fault and its remedy")


if __name__ == "__main__":
    sys.exit(main())
