"""The rooms of a project import from left to right only, by their public names, in no circle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from machinery import ROOT, Command

# From left to right. Files of one group may import each other, but for the rooms of the second.
ORDER = [
    ("bin", "configs", "src"),
    ("engine.iterators", "engine.records", "engine.sweeps"),  # a project may leave any of them out
    ("engine.runs", "engine.experiment"),
    ("engine.training",),
    ("engine.hooks",),
    ("engine.checkpoints",),
    ("engine.devices", "engine.building"),
    (
        "engine",
        "engine.batches",
        "engine.cifar",
        "engine.endings",
        "engine.keras_private",
        "engine.libraries",
        "engine.pictures",
        "engine.processes",
        "engine.trees",
    ),
    ("vegab",),
]
RANKS = {room: rank for rank, group in enumerate(ORDER) for room in group}


@dataclass(frozen=True)
class Import:
    """A name that a file imports from a module, or the module itself, where `name` is empty."""

    file: str
    module: str
    name: str
    is_for_types: bool

    @property
    def target(self) -> str:
        """The module that is meant: what a room's name stands for, or a module that is named."""
        inner = f"{self.module}.{self.name}"
        if self.name and path_of(inner):
            return inner
        return public_names(self.module).get(self.name, self.module)


def path_of(module: str) -> Path | None:
    """The file of a project's module."""
    path = ROOT.joinpath(*module.split("."))
    files = (path.with_suffix(".py"), path / "__init__.py")
    return next((file for file in files if file.is_file()), None)


def module_of(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    """The longest entry of the order that a module belongs to."""
    parts = module.split(".")
    return next(
        room for n in (2, 1) if (room := ".".join(parts[:n])) in RANKS or n == 1
    )  # a room that the order does not name is found by the test below


def imports_of(file: Path) -> Iterator[Import]:
    """Every import of a project's module in a file, also within functions."""
    name = str(file.relative_to(ROOT))
    tree = ast.parse(file.read_bytes())
    for_types = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test)
        for statement in block.body
        for node in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found = [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{name}: import modules by their full names"
            found = [(node.module, alias.name) for alias in node.names]
        else:
            continue
        for module, imported in found:
            if module.partition(".")[0] in ("bin", "configs", "engine", "src", "vegab"):
                yield Import(name, module, imported, id(node) in for_types)


def public_names(package: str) -> dict[str, str]:
    """The names that a package's `__init__.py` has for others, and the modules that they are of."""
    file = path_of(package)
    if file is None or file.name != "__init__.py":
        return {}
    return {one.name: one.module for one in imports_of(file) if one.module != package}


FILES = sorted(
    file
    for room in ("bin", "configs", "engine", "src", "vegab")
    for file in (ROOT / room).rglob("*.py")
)
IMPORTS = [one for file in FILES for one in imports_of(file)]


def breaks_order(one: Import) -> bool:
    own, other = room_of(module_of(ROOT / one.file)), room_of(one.target)
    if own == other or RANKS[own] == RANKS[other] != RANKS["engine.iterators"]:
        return False
    return RANKS[own] >= RANKS[other]


def breaks_door(one: Import) -> bool:
    """Is it an inner module of another room that is imported from?"""
    own, other = room_of(module_of(ROOT / one.file)), room_of(one.module)
    return own != other and other.startswith("engine.") and one.module != other


def test_every_room_has_its_place() -> None:
    rooms = {room_of(module_of(file)) for file in FILES}
    assert rooms - {*RANKS} == set()


@pytest.mark.parametrize("breaks", [breaks_order, breaks_door])
def test_imports_go_from_left_to_right_and_through_doors(breaks: object) -> None:
    assert callable(breaks)
    found = {(one.file, one.module) for one in IMPORTS if breaks(one)}
    assert sorted(found) == []


def test_there_is_no_circle() -> None:
    graph: dict[str, set[str]] = {}
    for one in IMPORTS:
        own = module_of(ROOT / one.file)
        if not one.is_for_types and one.target != own:
            graph.setdefault(own, set()).add(one.target)
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path[path.index(module) :], module))
        if module not in done:
            for other in sorted(graph.get(module, ())):
                visit(other, (*path, module))
            done.add(module)

    for module in sorted(graph):
        visit(module, ())


# Words that a script answers without TensorFlow, besides --help.
ANSWERS = {
    "plot.py": [["nothing"], ["{folder}", "-o", "x.jpg"]],
    "report.py": [["no_such_folder"], [".", "-o", "{folder}"]],
    "runs.py": [[do, "{folder}"] for do in ("list", "compare")],
    "tfrecords.py": [["inspect"]],
    "train.py": [["digit", "{folder}/new"], ["digits", "--dry_run", "{folder}/new"]],
}


@pytest.mark.parametrize("script", sorted(file.name for file in (ROOT / "bin").glob("*.py")))
def test_what_needs_no_tensorflow_imports_none(
    script: str, command: Command, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text('{"monitor": "val_loss", "num_epochs": 2}')
    (tmp_path / "run" / "history.csv").write_text("epoch,val_loss\n1,0.5\n2,0.4\n")
    for words in (["--help"], *ANSWERS.get(script, [])):
        words = [word.format(folder=tmp_path) for word in words]
        done = command("-X", "importtime", f"bin/{script}", *words)
        modules = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
        assert "vegab" in modules, words
        heavy = {"tensorflow", "keras", "numpy", "pandas", "h5py", "matplotlib", "torch"}
        heavy -= {"numpy"} if script == "tfrecords.py" else set()  # it reads and writes with that
        assert not modules & heavy, words
        assert "Traceback" not in done.stderr
