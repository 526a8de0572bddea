"""Changes the core a little, one change at a time, and counts the changes that no test notices.

    python -m benchmarks.mutate --count 120 --json benchmarks/mutations.json
    python -m benchmarks.mutate --again --json benchmarks/mutations.json
    python -m benchmarks.mutate --show training/optim.py:87

The mutations are drawn with a fixed seed, equally many from each room of `ROOMS`. Each is made in a
copy of the tree, where the tests of that file run until one fails; without a mutation they must
pass. A test that fails or takes longer than `--seconds` kills the mutation. The JSON file keeps
every mutation; survivors have a `reason`, written by hand, which later runs keep. `--again` runs
the survivors without a reason, after tests were added, and with slower tests; there, a test that
takes too long kills nothing.
"""

import argparse
import ast
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "src/beit3"

ROOMS: dict[str, tuple[str, ...]] = {
    "model": ("model/*.py",),
    "data/views": ("data/views/*.py",),
    "ops": ("ops/*.py",),
    "tasks": ("tasks/*.py",),
    "training": ("training/loop.py", "training/step.py", "training/optim.py"),
}
"""Room -> its files."""

ROOM_TESTS: dict[str, tuple[str, ...]] = {
    "model": (
        *("tests/model/test_beit3.py", "tests/model/test_initial_values.py"),
        "tests/model/test_golden.py",
    ),
    "data/views": ("tests/tasks/test_augmentation_fields.py",),
    "ops": (*("tests/model/test_beit3.py", "tests/model/test_initial_values.py"),),
    "tasks": (
        *("tests/tasks/test_recipes_published.py", "tests/tasks/test_augmentation_fields.py"),
        *("tests/tasks/test_golden.py", "tests/model/test_initial_values.py"),
    ),
    "training": ("tests/training/test_optim.py", "tests/training/test_step.py"),
}
"""Room -> tests that run after the file's own (`ops/init.py` -> `tests/ops/test_init.py`)."""

SKIPPED = "not two_processes and not compiled and not equal_those_of_transformers and not giant"
"""Tests that take tens of seconds run for survivors only."""

OWN_TESTS = {
    "model/cache.py": "tests/model/test_generation.py",
    "model/attention_mask.py": "tests/model/test_generation.py",
    "ops/deformable.py": "tests/segmentation/test_adapter.py",
    "data/views/preprocessing.py": "tests/data/views/test_transforms.py",
}
"""Files whose tests have another name."""

THOROUGH_TESTS: dict[str, tuple[str, ...]] = {
    "model": (
        *("tests/tasks/test_recipes_published.py", "tests/tasks/test_golden.py", "tests/model"),
        "tests/weights/test_initialization.py",
        *("tests/tasks/test_captioning.py", "tests/tasks/test_contract.py"),
    ),
    "data/views": (
        *("tests/data/views", "tests/tasks/test_pretrain.py", "tests/tasks/test_imagenet.py"),
        *("tests/tasks/test_coco.py", "tests/tasks/test_ade20k.py"),
    ),
    "ops": (
        *("tests/ops", "tests/tasks/test_pretrain.py", "tests/segmentation/test_adapter.py"),
        *("tests/tasks/test_retrieval.py", "tests/tasks/test_golden.py"),
        *("tests/tasks/test_captioning.py", "tests/training/test_parallel.py"),
    ),
    "tasks": (
        *("tests/test_recipe.py", "tests/weights/test_adapt.py", "tests/tasks/test_contract.py"),
        "tests/tasks/test_dense.py",
    ),
    "training": (
        *("tests/training/test_loop.py", "tests/training/test_evaluation_in_training.py"),
        *("tests/training/test_watchdog.py", "tests/training/test_parallel.py"),
    ),
}
"""Room -> slow tests, which run for survivors (`--again`)."""

OPERATORS: dict[type, type] = {
    **{ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult},
    **{ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult, ast.Pow: ast.Mult, ast.MatMult: ast.Mult},
    **{ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt},
    **{ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is},
    ast.In: ast.NotIn,  # codespell:ignore
    ast.NotIn: ast.In,  # codespell:ignore
    **{ast.And: ast.Or, ast.Or: ast.And, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd},
}
"""Operators and what they become."""

OWN_MODULES = ("beit3", "tests", "benchmarks")

UNORDERED = ("max", "min", "isinstance", "getattr", "hasattr", "zip")
"""Functions whose arguments are not swapped: nothing changes, or nothing runs."""


class Mutation(NamedTuple):
    """One change of one file: the bytes from `start` to `end` become `text`."""

    file: str
    """Path below src/beit3."""
    line: int
    kind: str
    before: str
    start: int
    end: int
    text: str

    @property
    def name(self) -> str:
        return f"{self.file}:{self.line}"


# What can be changed ------------------------------------------------------------------------------


def list_mutations(file: str, source: str) -> list[Mutation]:
    """Returns every mutation of a file, in the order of the text.

    Texts, annotations, docstrings, declarations of types and the messages of errors are left as
    they are: a change of them is none of what the network computes.
    """
    content, lines = source.encode(), [0]
    for line in content.split(b"\n"):
        lines.append(lines[-1] + len(line) + 1)
    mutations = []
    for node in _walk(ast.parse(source)):
        start = lines[node.lineno - 1] + node.col_offset
        end = lines[(node.end_lineno or 0) - 1] + (node.end_col_offset or 0)
        before = content[start:end].decode()
        for kind, text in _mutate(node):
            mutations.append(Mutation(file, node.lineno, kind, before, start, end, text))
    return sorted(mutations, key=lambda mutation: (mutation.start, mutation.end, mutation.text))


def _walk(node: ast.AST) -> Iterator[Any]:
    """Yields the nodes that compute something."""
    if isinstance(node, (ast.Raise, ast.Import, ast.ImportFrom, ast.JoinedStr, ast.Assert)):
        return
    if isinstance(node, (ast.expr, ast.stmt)):
        yield node
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list", "bases"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from _walk(child)


def _mutate(node: ast.AST) -> Iterator[tuple[str, str]]:
    """Yields (kind, new text) for each change of one node; the text is in parentheses."""
    if isinstance(node, ast.Constant):
        for value in _change_constant(node.value):
            yield "constant", repr(value)
    elif isinstance(node, (ast.BinOp, ast.BoolOp)) and type(node.op) in OPERATORS:
        changed = _copy(node)
        changed.op = OPERATORS[type(node.op)]()
        yield "operator", f"({ast.unparse(changed)})"
    elif isinstance(node, ast.Compare) and type(node.ops[0]) in OPERATORS:
        changed = _copy(node)
        changed.ops[0] = OPERATORS[type(node.ops[0])]()
        yield "comparison", f"({ast.unparse(changed)})"
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.Not, ast.USub)):
        yield "sign", f"({ast.unparse(node.operand)})"
    elif isinstance(node, ast.IfExp):
        changed = _copy(node)
        changed.body, changed.orelse = changed.orelse, changed.body
        yield "condition", f"({ast.unparse(changed)})"
    elif isinstance(node, ast.Call):
        yield from _change_call(node)
    elif _can_be_dropped(node):
        yield "dropped statement", "pass"


def _change_constant(value: object) -> Iterator[object]:
    if isinstance(value, bool):
        yield not value
    elif isinstance(value, int):
        yield value + 1
    elif isinstance(value, float):
        yield value * 1.5 if value else 0.5


def _change_call(node: ast.Call) -> Iterator[tuple[str, str]]:
    """Swaps the first two arguments, or drops an argument that is given by name."""
    positional = len(node.args) > 1 and not any(isinstance(a, ast.Starred) for a in node.args)
    positional = positional and ast.unparse(node.func) not in UNORDERED
    if positional and ast.unparse(node.args[0]) != ast.unparse(node.args[1]):
        changed = _copy(node)
        changed.args[0], changed.args[1] = changed.args[1], changed.args[0]
        yield "swapped arguments", ast.unparse(changed)
    for index, keyword in enumerate(node.keywords):
        if keyword.arg and not isinstance(keyword.value, ast.Constant):
            changed = _copy(node)
            del changed.keywords[index]
            yield "dropped argument", ast.unparse(changed)


def _can_be_dropped(node: ast.AST) -> bool:
    """Whether a statement is a call, adds to a variable, or assigns what comes from itself."""
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Call)
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
        names = {child.id for child in ast.walk(node.value) if isinstance(child, ast.Name)}
        return node.targets[0].id in names
    return isinstance(node, ast.AugAssign)


def _copy(node: Any) -> Any:
    return ast.parse(ast.unparse(node), mode="eval").body


def sample_mutations(count: int, seed: int) -> list[Mutation]:
    """Draws equally many mutations from each room."""
    rng = random.Random(seed)
    samples: list[Mutation] = []
    for patterns in ROOMS.values():
        files = sorted(path for pattern in patterns for path in (ROOT / PACKAGE).glob(pattern))
        mutations = [
            mutation
            for path in files
            for mutation in list_mutations(
                path.relative_to(ROOT / PACKAGE).as_posix(), path.read_text()
            )
        ]
        samples += rng.sample(mutations, min(len(mutations), count // len(ROOMS)))
    rng.shuffle(samples)  # a run that is ended early has seen all rooms
    return samples


# Running the tests --------------------------------------------------------------------------------


def find_room(file: str) -> str:
    return max((room for room in ROOMS if file.startswith(f"{room}/")), key=len)


def list_tests(file: str, tree: Path, *, thorough: bool) -> list[str]:
    """Returns the tests of a file: its own, the room's, and those of survivors if `thorough`."""
    folder, name = file.rsplit("/", 1)
    own = OWN_TESTS.get(file, f"tests/{folder}/test_{name}")
    tests = [own, *ROOM_TESTS[find_room(file)]]
    if thorough:
        tests += THOROUGH_TESTS[find_room(file)]
    return [test for test in dict.fromkeys(tests) if (tree / test).exists()]


def copy_tree(folder: Path) -> Path:
    """Copies what tests need, and links what lies beside the repository."""
    tree = folder / ROOT.name
    for name in ("src", "tests", "benchmarks", "pyproject.toml"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, tree / name)
    if (ROOT.parent / "shared").exists():
        (folder / "shared").symlink_to(ROOT.parent / "shared")
    return tree


def run_tests(
    tree: Path, tests: Sequence[str], seconds: float, log: Path, *, thorough: bool
) -> tuple[int, str]:
    """Runs tests in a fork of this process, which has imported torch, until the first failure.

    Returns pytest's exit status, -1 where time ran out, and the name of the failed test.
    """
    pid = os.fork()
    if pid == 0:
        os.setsid()
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.chdir(tree)
        sys.path[:] = [str(tree / "src"), str(tree), *sys.path]
        os.environ["PYTHONPATH"] = f"{tree / 'src'}:{tree}"
        for module in [name for name in sys.modules if name.split(".")[0] in OWN_MODULES]:
            del sys.modules[module]  # those of the tree that is not mutated
        import pytest

        options = ["-x", "-q", "-p", "no:cacheprovider", "--tb=line"]
        if not thorough:
            options += ["-k", SKIPPED]
        os._exit(int(pytest.main([*options, *tests])))
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status), _read_failure(log)
        time.sleep(0.1)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return -1, f"no end after {seconds:.0f} s"


def _read_failure(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines()
    failed = [line for line in lines if line.startswith(("FAILED ", "ERROR "))]
    return failed[0].split(" ")[1][:120] if failed else ""


def _write(path: Path, content: bytes) -> None:
    """Writes a file whose time differs from all before, or Python would run the old bytecode."""
    modified = path.stat().st_mtime + 2
    path.write_bytes(content)
    os.utime(path, (modified, modified))


def try_mutation(
    tree: Path, mutation: Mutation, seconds: float, *, thorough: bool
) -> dict[str, Any]:
    """Makes one mutation, runs the tests of its file and takes the mutation back."""
    path = tree / PACKAGE / mutation.file
    source = path.read_bytes()
    _write(path, source[: mutation.start] + mutation.text.encode() + source[mutation.end :])
    started = time.monotonic()
    try:
        tests = list_tests(mutation.file, tree, thorough=thorough)
        status, failure = run_tests(
            tree, tests, seconds, tree.parent / "log.txt", thorough=thorough
        )
    finally:
        _write(path, source)
    return {
        **mutation._asdict(),
        "killed": status > 0 or (status < 0 and not thorough),
        "by": failure,
        "seconds": round(time.monotonic() - started, 1),
    }


def check_unmutated(tree: Path, files: Sequence[str], seconds: float, *, thorough: bool) -> None:
    """Runs the tests of each file without a mutation; a test that fails by itself kills anything.

    Raises SystemExit that names the file and the test.
    """
    for file in files:
        tests = list_tests(file, tree, thorough=thorough)
        status, failure = run_tests(
            tree, tests, seconds, tree.parent / "log.txt", thorough=thorough
        )
        if status:
            raise SystemExit(f"{file}: its tests fail without a mutation: {failure}")


def find_again(result: dict[str, Any]) -> Mutation | None:
    """Returns a stored mutation at its place in today's text; None where its text is gone."""
    source = (ROOT / PACKAGE / result["file"]).read_text()
    same = [
        mutation
        for mutation in list_mutations(result["file"], source)
        if all(getattr(mutation, key) == result[key] for key in ("kind", "before", "text"))
    ]
    return min(same, key=lambda mutation: abs(mutation.line - result["line"]), default=None)


# Results ------------------------------------------------------------------------------------------


def make_table(results: Sequence[dict[str, Any]]) -> str:
    """Returns the counts by room, and a line for each survivor."""
    total, killed = Counter(), Counter()
    for result in results:
        for room in (find_room(result["file"]), "all"):
            total[room] += 1
            killed[room] += result["killed"]
    lines = ["| room | mutations | killed | surviving |", "|---|---|---|---|"]
    for room in (*ROOMS, "all"):
        lines.append(f"| {room} | {total[room]} | {killed[room]} | {total[room] - killed[room]} |")
    survivors = [result for result in results if not result["killed"]]
    if survivors:
        lines += ["", "| surviving mutation | becomes | why |", "|---|---|---|"]
    for result in survivors:
        before, text = (
            " ".join(result[key].split()).replace("|", "\\|")[:60] for key in ("before", "text")
        )
        place = f"{result['file']}:{result['line']}"
        lines.append(f"| {place} `{before}` | `{text}` | {result.get('reason', '')} |")
    return "\n".join(lines)


def save(path: Path, results: Sequence[dict[str, Any]]) -> None:
    from benchmarks.probe import save_results

    save_results(path, make_table(results), results)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--count", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--again", action="store_true", help="run the survivors only")
    parser.add_argument("--show", help="FILE:LINE: list the mutations there")
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks/mutations.json")
    options = parser.parse_args()
    if options.show:
        file, _, line = options.show.partition(":")
        for mutation in list_mutations(file, (ROOT / PACKAGE / file).read_text()):
            if not line or mutation.line == int(line):
                print(f"{mutation.name} {mutation.kind}: {mutation.before} -> {mutation.text}")
        return
    results: list[dict[str, Any]] = []
    if options.json.is_file():
        results = json.loads(options.json.read_text())["figures"]
    if options.again:
        open_results = [r for r in results if not r["killed"] and not r.get("reason")]
        found = [(result, find_again(result)) for result in open_results]
        todo = [(result, mutation) for result, mutation in found if mutation]
    else:
        done = {(r["file"], r["kind"], r["before"], r["text"]) for r in results}
        sample = sample_mutations(options.count, options.seed)
        todo = [({}, m) for m in sample if (m.file, m.kind, m.before, m.text) not in done]
    import pytest  # noqa: F401
    import sentencepiece  # noqa: F401
    import torch  # noqa: F401 - imported once, before the forks
    import torchvision.transforms.v2  # noqa: F401
    from transformers.models.mask2former import modeling_mask2former  # noqa: F401

    with tempfile.TemporaryDirectory(prefix="mutate_") as folder:
        tree = copy_tree(Path(folder))
        files = sorted({mutation.file for _, mutation in todo})
        check_unmutated(tree, files, options.seconds, thorough=options.again)
        for number, (stored, mutation) in enumerate(todo, 1):
            result = try_mutation(tree, mutation, options.seconds, thorough=options.again)
            if not stored:
                results.append(stored)
            stored |= result
            save(options.json, results)
            verdict = f"killed by {result['by']}" if result["killed"] else "SURVIVED"
            change = f"{' '.join(mutation.before.split())[:50]} -> {mutation.text[:50]}"
            print(f"{number}/{len(todo)} {mutation.name} {change}: {verdict}", flush=True)
    print(make_table(results))


if __name__ == "__main__":
    main()
