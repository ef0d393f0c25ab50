"""Finds the class or function that a config names, whatever it is for."""

import contextlib
import gc
import importlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

from vegab import trust
from vegab.config import did_you_mean
from vegab.exits import UsageError

SEARCHED = ("src", "src.examples")  # where the mod of mod:Name is looked for first
# Packages that this project took the place of, and where their names are looked for if they cannot
# be imported: as a registered name, in these modules, and as mod:Name for a.b.mod.Name.
EDFLOW = ("engine.iterators", "engine.iterators.datasets", "engine.hooks", "engine.iterators.build")
OTHER_HOMES: dict[str, tuple[str, ...]] = {"edflow": EDFLOW, "deephub": ()}
# Modules that say in IMPORTS what to use instead of a name that has no home here.
NOT_HERE = {"edflow": "engine.iterators.edflow"}


def import_libraries(names: Iterable[str]) -> None:
    """Import large modules as a process begins, while nothing is garbage yet. To look for it would
    take a quarter of the time, and every later look goes through all that they hold."""
    gc.disable()
    for name in names:
        importlib.import_module(name)
    gc.freeze()
    gc.enable()


def resolve(
    name: Any,
    key: str,
    registered: Mapping[str, Any] | None = None,
    search: Sequence[str] = SEARCHED,
) -> Any:
    """The object that a config names.

    `name` is a registered name, `pkg.mod.Name`, `pkg.mod:Name` or `mod:Name` (`mod` in the packages
    `search`). `key` is the config key that it stands at. Raises UsageError with key, name, reason.

    A config of a run folder leads into the project and its dependencies only: see `vegab.trust`.
    The object counts, not the name: a module also has all that it imports."""
    known = registered or {}
    if isinstance(name, str) and name in known:
        return known[name]
    names = f" (known names: {', '.join(known)})" if known else ""
    expected = f"give an import path such as pkg.mod.Name or mod:Name{names}"
    words = name.replace(":", ".", 1).split(".") if isinstance(name, str) else [""]
    if not all(word.isidentifier() for word in words):
        raise UsageError(f"{key}: {name!r} names nothing that could be imported; {expected}")
    if len(words) == 1:
        hint = did_you_mean(name, known)
        raise UsageError(f"{key}: there is no '{name}'{hint + names if hint else f'; {expected}'}")
    tried = list(readings(name, search))
    is_confined = trust.is_confined(name)
    for module_name, attributes in tried:
        module = _import(module_name, key, name, is_confined)
        if module is not None:
            found = _attribute(module, attributes, key, name)
            home = trust.home_of(found)
            is_private = any(part.startswith("_") for part in attributes.split("."))
            if is_confined and (is_private or not trust.is_inside(home)):
                raise _refusal(key, name, home)
            return found
    package, *parts = words
    if package in OTHER_HOMES:
        if parts[-1] in known:
            return known[parts[-1]]
        if instead := _instead(package, parts[-1]):
            raise UsageError(f"{key}: there is no '{name}' here: {instead}")
        for home in OTHER_HOMES[package]:
            with contextlib.suppress(UsageError):
                return resolve(f"{home}:{parts[-1]}", key, search=())
        if len(parts) > 1:
            return resolve(":".join(parts[-2:]), key, registered, search)
    modules = " or ".join(module_name for module_name, _ in tried)
    raise UsageError(f"{key}: '{name}' cannot be imported: there is no module {modules}{names}")


def readings(name: str, search: Sequence[str] = SEARCHED) -> Iterator[tuple[str, str]]:
    """Every (module, attributes) that a path can mean, in the order in which they are tried."""
    module, colon, attributes = name.partition(":")
    if colon:
        yield from ((f"{package}.{module}", attributes) for package in search)
        yield module, attributes
        return
    parts = name.split(".")
    for n in range(len(parts) - 1, 0, -1):
        yield ".".join(parts[:n]), ".".join(parts[n:])


def _instead(package: str, name: str) -> str:
    with contextlib.suppress(KeyError, ImportError):  # a room may be left out
        return importlib.import_module(NOT_HERE[package]).IMPORTS.get(name, "")
    return ""


def _refusal(key: str, name: str, home: str) -> UsageError:
    return UsageError(
        f"{key}: '{name}' leads to {home}, and the config of a run may name only what the project "
        "and the dependencies in pyproject.toml define; add what it needs there, or give a copy of "
        "the config from outside of the run folder"
    )


def _import(module: str, key: str, name: str, is_confined: bool) -> ModuleType | None:
    try:
        if is_confined and trust.is_inside(module) is False:
            raise _refusal(key, name, module)
        return importlib.import_module(module)
    except UsageError:
        raise
    except Exception as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing and f"{module}.".startswith(f"{missing}."):
            return None
        reason = f"{type(error).__name__}: {error}"
        if homes := OTHER_HOMES.get((missing or "").partition(".")[0]):
            reason += f"; import what it has from {', '.join(homes[:3])}, as docs/iterators.md says"
        raise UsageError(f"{key}: '{name}': importing {module} failed: {reason}") from error


def _attribute(module: ModuleType, attributes: str, key: str, name: str) -> Any:
    found: Any = module
    for attribute in attributes.split("."):
        if not hasattr(found, attribute):
            hint = did_you_mean(attribute, [n for n in dir(found) if not n.startswith("_")])
            owner = getattr(found, "__name__", found)
            raise UsageError(f"{key}: '{name}': {owner} has no '{attribute}'{hint}")
        found = getattr(found, attribute)
    return found
