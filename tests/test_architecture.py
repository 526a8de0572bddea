"""Imports between rooms follow the floors; imports inside functions count as well."""

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
    "log_filters": 0,
    "machine": 0,
    "seeding": 0,
    "tensor_files": 0,
    "config": 0,
    "ops": 0,
    "metrics": 0,
    "world": 0,
    "progress": 0,
    "download": 0,
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
    "precision": 5,
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
    ("tensor_files", "files"),
    ("download", "files"),
    ("tokenizer", "model"),
    ("task", "recipe"),
    ("weights", "recipe"),
    ("weights", "task"),
    ("tasks", "recipe"),
    ("tasks", "task"),
    ("tasks", "weights"),
    ("precision", "quantize"),
    ("predict", "precision"),
    ("predict", "export"),
    ("search", "predict"),
    ("serve", "predict"),
    ("serve", "search"),
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
"""Room -> packages that it may import besides the standard library; other rooms may import any."""


def get_module_name(path: Path) -> str:
    """Returns the module name of a file, e.g. `beit3.data.loader`, without `__init__`."""
    parts = ["beit3", *path.relative_to(SOURCE).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def get_room(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def list_imports(path: Path, *, for_types: bool = False) -> set[str]:
    """Returns the full names of what a file imports; imports for type checkers if asked."""
    names: set[str] = set()
    nodes: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while nodes:
        node = nodes.pop()
        if (
            not for_types
            and isinstance(node, ast.If)
            and isinstance(node.test, ast.Name)
            and node.test.id == "TYPE_CHECKING"
        ):
            nodes += node.orelse
            continue
        nodes += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} imports relatively"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


MODULES = {get_module_name(path): path for path in FILES}


def list_own_imports(module: str, *, for_types: bool = False) -> set[str]:
    """Returns the modules of beit3 that `module` imports, e.g. `beit3.ops.init`."""
    modules = set()
    for name in list_imports(MODULES[module], for_types=for_types):
        if name.partition(".")[0] == "beit3":
            modules.add(name if name in MODULES else name.rpartition(".")[0])
    return modules - {module}


def test_every_room_has_a_floor():
    assert {get_room(module) for module in MODULES} - {""} <= FLOOR.keys()
    assert all(target in MODULES for module in MODULES for target in list_own_imports(module))


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_go_down_or_sideways_where_allowed(module):
    room = get_room(module)
    if not room:
        assert not list_own_imports(module), "the package itself imports nothing"
        return
    for target in list_own_imports(module):
        target_room = get_room(target)
        assert target_room, f"{module} imports the package itself"
        allowed = (
            room == target_room
            or FLOOR[target_room] < FLOOR[room]
            or (room, target_room) in SIDEWAYS
        )
        assert allowed, (
            f"{module} (floor {FLOOR[room]}) imports {target} (floor {FLOOR[target_room]})"
        )
        assert not (room == target_room == "tasks" and target != "beit3.tasks"), (
            f"{module} imports another task, {target}"
        )
        assert not (room == "training" and target_room == "tasks"), (
            f"{module} knows the task {target}"
        )


@pytest.mark.parametrize("module", sorted(MODULES))
def test_rooms_import_only_their_allowed_packages(module):
    room = get_room(module)
    if room in OUTSIDE:
        packages = (
            {name.partition(".")[0] for name in list_imports(MODULES[module])}
            - set(sys.stdlib_module_names)
            - {"beit3"}
        )
        assert packages <= OUTSIDE[room]


def test_imports_have_no_cycle():
    """Imports for type checkers count: files that know each other are one subject."""
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path[path.index(module) :], module))
        if module not in done:
            for target in sorted(list_own_imports(module, for_types=True)):
                visit(target, (*path, module))
            done.add(module)

    for module in sorted(MODULES):
        visit(module, ())


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_files_have_docstrings_and_allowed_names(path):
    text = path.read_text(encoding="utf-8")
    assert path.stem not in BANNED and not BANNED & set(path.relative_to(SOURCE).parts)
    assert ast.get_docstring(ast.parse(text)), "a file begins with a docstring"


def list_loaded_modules(statement: str) -> set[str]:
    """Returns the modules that a fresh interpreter holds after a statement."""
    code = f"{statement}\nimport sys\nprint(*sys.modules)"
    process = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": str(SOURCE.parent)},
    )
    return set(process.stdout.split())


def test_importing_the_package_loads_no_heavy_module():
    assert not {"torch", "numpy", "beit3.model", "rich", "cyclopts"} & list_loaded_modules(
        "import beit3"
    )
    assert not {"torch", "torchvision"} & list_loaded_modules(
        "from beit3.cli.app import build_app; build_app()"
    ), "the command line opens fast"


def test_public_names_exist():
    import beit3

    for name in beit3.__all__:
        assert getattr(beit3, name) is not None
    with pytest.raises(AttributeError, match="nothing"):
        beit3.nothing  # noqa: B018
