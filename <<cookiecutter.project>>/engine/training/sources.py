"""Finds the code that a run depends on, by reading the imports of what its config names."""

import ast
import functools
import hashlib
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vegab import ROOT, trust
from vegab.names import readings

BUILDS_ALL = "src.experiment"  # whatever a config names, this builds it
ENGINE = "engine"
# What reads the command line and the config, which is compared itself, and tests.
CHANGES_NO_BIT = ("bin", "configs", "tests", "vegab")


def digests(config: Mapping[str, Any]) -> dict[str, str]:
    """Return a SHA-256, without comments, of each file that a config leads to, and of "engine"."""
    found: dict[str, str] = {}
    of_engine: dict[str, str] = {}
    open_modules = [BUILDS_ALL, *_named_by(config)]
    seen, search = set(open_modules), tuple(map(os.path.abspath, sys.path))
    while open_modules:
        if (file := _file_of(open_modules.pop(), search)) is None:
            continue
        name = str(file.relative_to(ROOT))
        digest, imports = _source(file.read_bytes(), file)
        (of_engine if name.startswith(f"{ENGINE}/") else found)[name] = digest
        new = [module for module in imports if module not in seen]
        seen.update(new)
        open_modules += new
    text = "\n".join(f"{name} {digest}" for name, digest in sorted(of_engine.items()))
    return dict(sorted(found.items())) | {ENGINE: hashlib.sha256(text.encode()).hexdigest()}


def _named_by(value: Any) -> Iterator[str]:
    """Yield the modules that texts in a config may name."""
    if isinstance(value, Mapping | list):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _named_by(item)
    elif isinstance(value, str):
        yield from (module for module, _ in readings(value))


@functools.cache
def _file_of(module: str, search: tuple[str, ...]) -> Path | None:
    """Return the file of one of the project's modules whose code counts, or None."""
    top, *rest = module.split(".")
    if top not in _places(search):
        return None
    path = Path(_places(search)[top], top, *rest)
    files = (path.with_suffix(".py"), path / "__init__.py")
    return next((file for file in files if file.is_file()), None)


@functools.cache
def _places(search: tuple[str, ...]) -> dict[str, Path]:
    """Return, by the name of a module or package of the project that counts, where it lies."""
    found: dict[str, Path] = {}
    for place in [*map(Path, search), ROOT]:
        if trust.is_of_project(place):
            for path in place.resolve().glob("*"):
                if path.stem not in CHANGES_NO_BIT and trust.is_of_project(path):
                    found[path.stem] = path.parent
    return found


@functools.cache  # a sweep parses for all of its trials
def _source(content: bytes, file: Path) -> tuple[str, list[str]]:
    """Return what counts of a file: a digest of its code, and the modules that it may import."""
    try:
        tree = ast.parse(content)
    except SyntaxError:  # what imports it will say so
        return hashlib.sha256(content).hexdigest(), []
    package = list(file.relative_to(ROOT).with_suffix("").parts[:-1])
    imports: dict[str, None] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imports.update(dict.fromkeys(alias.name for alias in node.names))
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *filter(None, [node.module])])
            imports.update(dict.fromkeys([module, *(f"{module}.{a.name}" for a in node.names)]))
        match getattr(node, "body", None):
            case [ast.Expr(ast.Constant(str())), *_] as body:  # a docstring
                body[0] = ast.Expr(ast.Constant(None))
    with_parents = {
        ".".join(parts[:number])
        for parts in (module.split(".") for module in imports)
        for number in range(1, len(parts) + 1)
    }
    digest = hashlib.sha256(ast.unparse(tree).encode()).hexdigest()
    return digest, sorted(with_parents)
