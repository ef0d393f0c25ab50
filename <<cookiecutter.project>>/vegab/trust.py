"""Knows whose config it is: one that is typed may name anything, one in a run folder may not.

A run's `config.json` is data, and whoever sends a run may have written it. Once a process has read
a config from a run folder, names lead into the project and the dependencies of its `pyproject.toml`
only, in this process and in those that it starts. Names that were typed in addition are free."""

import functools
import itertools
import os
import re
from pathlib import Path
from types import ModuleType
from typing import Any

from vegab.files import CONFIG, LOCK, META, ROOT

# A config may name nothing in these folders of the project; in vegab it could name what trusts it.
NO_CODE = ("data", "results", "vegab")
FLAG = "VEGAB_CONFINED"

# What this process is given, and does not read itself, was not typed.
_is_inherited = bool(os.environ.get(FLAG))
_typed: set[str] = set()


def confine() -> None:
    """Lets names lead only into the project and its dependencies from now on."""
    os.environ[FLAG] = "1"


def is_confined(name: str) -> bool:
    """May a name be from a config that somebody else has written?"""
    return bool(os.environ.get(FLAG)) and (_is_inherited or name not in _typed)


def note_file(chain: tuple[Path, ...], config: Any) -> None:
    """Takes note of a config file that is read, the last of a chain that extend each other."""
    if any(is_in_run_folder(path) for path in chain):
        confine()
    else:
        note_typed(config)


def note_typed(value: Any) -> None:
    """Takes note of what a person has typed: the texts in it may name anything."""
    if isinstance(value, str):
        _typed.add(value)
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            note_typed(item)


def is_in_run_folder(path: Path) -> bool:
    """Does a file lie in the folder of a run? Where the project itself lies does not matter."""
    folders = {*path.absolute().parents, *path.resolve().parents} - {ROOT, *ROOT.parents}
    return any(
        (folder / LOCK).exists()
        or ((folder / CONFIG).exists() and ((folder / META).exists() or any(folder.glob("*.h5"))))
        for folder in folders
    )


def is_of_project(path: Path) -> bool:
    """Is it a file or folder of the project's own code, without the runner's?"""
    path = path.resolve()
    if not path.is_relative_to(ROOT) or "site-packages" in path.parts:
        return False
    is_code = path.relative_to(ROOT).parts[:1] not in [(name,) for name in NO_CODE]
    return is_code and not is_in_run_folder(path / "any file")


def _is_own(path: Path, package: str) -> bool:
    # To set PYTHONPATH is to type it, and what it leads to is not a dependency.
    entries = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    places = [Path(entry, name) for entry in entries for name in (package, f"{package}.py")]
    is_named = any(path.is_relative_to(place) for place in places)
    is_installed = {"site-packages", "dist-packages"} & set(path.parts)
    return is_of_project(path) or (is_named and not is_installed and not is_in_run_folder(path))


def is_inside(module: str) -> bool | None:
    """Is a module of the project or of a dependency? None: there is no such module. It is not
    imported for that; the packages around it are, once they are known to be inside."""
    import importlib.util

    parts = module.split(".")
    if parts[0] in dependencies():
        return True
    for n in range(1, len(parts) + 1):
        try:
            spec = importlib.util.find_spec(".".join(parts[:n]))
        except ModuleNotFoundError:
            return None
        except ValueError:  # __main__
            return False
        if spec is None:
            return None
        places = [spec.origin] if spec.has_location else spec.submodule_search_locations
        if not places or not all(place and _is_own(Path(place), parts[0]) for place in places):
            return False
    return True


def home_of(thing: Any) -> str:
    """The module that an object is from, however it was reached."""
    if isinstance(thing, ModuleType):
        return thing.__name__
    if isinstance(thing, functools.partial | functools.partialmethod):
        return home_of(thing.func)
    module = getattr(getattr(thing, "__func__", thing), "__module__", None)
    if isinstance(module, str):
        return module
    for name in ("__self__", "__objclass__"):  # of a method that is written in C
        owner = getattr(thing, name, None)
        if owner is not None:
            return home_of(owner)
    return type(thing).__module__


@functools.cache
def dependencies() -> frozenset[str]:
    """Top-level modules of the packages that `pyproject.toml` names and that are installed."""
    # Imported here: most commands need neither.
    import tomllib
    from importlib import metadata

    try:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    except (OSError, ValueError, KeyError):
        return frozenset()
    groups = [project.get("dependencies", []), *project.get("optional-dependencies", {}).values()]
    wanted = {_canonical(re.split(r"[^\w.-]", line)[0]) for line in itertools.chain(*groups)}
    wanted.discard("")
    installed = metadata.packages_distributions().items()
    return frozenset(module for module, names in installed if wanted & {*map(_canonical, names)})


def _canonical(distribution: str | None) -> str:  # one that is damaged has no name
    return re.sub(r"[-_.]+", "-", distribution or "").lower()
