"""The floors of the house, held by walking every import, those inside functions too."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "src" / "beit3"
FILES = sorted(SOURCE.rglob("*.py"))
BANNED = {"utils", "util", "common", "helpers", "helper", "misc", "base"}

FLOOR = {
    "files": 0,
    "images": 0,
    "machine": 0,
    "seeding": 0,
    "config": 0,
    "ops": 0,
    "metrics": 0,
    "world": 0,
    "progress": 0,
    "model": 1,
    "tokenizer": 1,
    "data": 1,
    "detection": 2,
    "segmentation": 2,
    "recipe": 3,
    "task": 3,
    "weights": 3,
    "tasks": 3,
    "training": 4,
    "quantize": 5,
    "predict": 5,
    "export": 5,
    "search": 5,
    "serve": 5,
    "report": 5,
    "compat": 5,
    "doctor": 5,
    "demo": 5,
    "plan": 5,
    "cli": 6,
    "__main__": 6,
}
"""Room -> floor. A room is a package or a module right below beit3."""

SIDEWAYS = {
    ("images", "files"),
    ("tokenizer", "model"),
    ("task", "recipe"),
    ("weights", "recipe"),
    ("weights", "task"),
    ("tasks", "recipe"),
    ("tasks", "task"),
    ("tasks", "weights"),
    ("predict", "quantize"),
    ("demo", "report"),
    ("__main__", "cli"),
}
"""(room, room of the same floor that it may import)."""

OUTSIDE = {
    "ops": {"torch"},
    "metrics": {"numpy", "faster_coco_eval"},
    "world": {"numpy", "PIL"},
    "config": set(),
    "progress": {"rich"},
    "model": {"torch"},
}
"""Packages that a room may import beside the standard library; rooms not named are free."""


def module_of(path: Path) -> str:
    """`beit3.data.loader` of its file; a package is called without `__init__`."""
    parts = ["beit3", *path.relative_to(SOURCE).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def imports(path: Path) -> set[str]:
    """Whole names of everything a file imports, wherever in the file it does so, except for type
    checkers alone."""
    found: set[str] = set()
    waiting: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while waiting:
        node = waiting.pop()
        if (
            isinstance(node, ast.If)
            and isinstance(node.test, ast.Name)
            and node.test.id == "TYPE_CHECKING"
        ):
            waiting += node.orelse
            continue
        waiting += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} imports relatively"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


MODULES = {module_of(path): path for path in FILES}


def own(module: str) -> set[str]:
    """The modules of this package that `module` imports: `from beit3.ops import init` is
    beit3.ops.init."""
    found = set()
    for name in imports(MODULES[module]):
        if name.partition(".")[0] == "beit3":
            found.add(name if name in MODULES else name.rpartition(".")[0])
    return found - {module}


def test_every_room_has_a_floor():
    assert {room_of(module) for module in MODULES} - {""} <= FLOOR.keys()
    assert all(target in MODULES for module in MODULES for target in own(module))


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_go_down_or_where_an_arrow_is_drawn(module):
    here = room_of(module)
    if not here:
        assert not own(module), "the package itself imports nothing"
        return
    for target in own(module):
        there = room_of(target)
        assert there, f"{module} imports the package itself"
        allowed = here == there or FLOOR[there] < FLOOR[here] or (here, there) in SIDEWAYS
        assert allowed, f"{module} (floor {FLOOR[here]}) imports {target} (floor {FLOOR[there]})"
        assert not (here == there == "tasks" and target != "beit3.tasks"), (
            f"{module} imports another task, {target}"
        )
        assert not (here == "training" and there == "tasks"), f"{module} knows the task {target}"


@pytest.mark.parametrize("module", sorted(MODULES))
def test_low_floors_need_few_packages(module):
    room = room_of(module)
    if room in OUTSIDE:
        packages = (
            {name.partition(".")[0] for name in imports(MODULES[module])}
            - set(sys.stdlib_module_names)
            - {"beit3"}
        )
        assert packages <= OUTSIDE[room]


def test_no_import_leads_back():
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path[path.index(module) :], module))
        if module not in done:
            for target in sorted(own(module)):
                visit(target, (*path, module))
            done.add(module)

    for module in sorted(MODULES):
        visit(module, ())


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_files_say_what_they_are(path):
    text = path.read_text(encoding="utf-8")
    assert path.stem not in BANNED and not BANNED & set(path.relative_to(SOURCE).parts)
    assert ast.get_docstring(ast.parse(text)), "the top docstring says what the file is"


def loaded_by(statement: str) -> set[str]:
    """Modules in memory after a statement in a fresh interpreter."""
    code = f"{statement}\nimport sys\nprint(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": str(SOURCE.parent)},
    )
    return set(done.stdout.split())


def test_importing_the_package_is_free():
    assert not {"torch", "numpy", "beit3.model", "rich", "cyclopts"} & loaded_by("import beit3")
    assert not {"torch", "torchvision"} & loaded_by(
        "from beit3.cli.app import build_app; build_app()"
    ), "the command line opens fast"


def test_public_names_are_there():
    import beit3

    for name in beit3.__all__:
        assert getattr(beit3, name) is not None
    with pytest.raises(AttributeError, match="nothing"):
        beit3.nothing  # noqa: B018
