"""One way to name a class or function in a config, whatever it is for."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

from vegab.config import UsageError, did_you_mean


def resolve(
    name: Any, key: str, registered: Mapping[str, Any] | None = None, search: str = "src"
) -> Any:
    """The object that a config names.

    `name` is a registered name, `pkg.mod.Name`, `pkg.mod:Name` or `mod:Name` (`mod` in the package
    `search`). `key` is the config key that it stands at. Raises UsageError with key, name, reason.
    """
    known = registered or {}
    if isinstance(name, str) and name in known:
        return known[name]
    names = f" (known names: {', '.join(known)})" if known else ""
    expected = f"give an import path such as pkg.mod.Name or mod:Name{names}"
    if not isinstance(name, str) or not _is_path(name):
        raise UsageError(f"{key}: {name!r} names nothing that could be imported; {expected}")
    if "." not in name and ":" not in name:
        hint = did_you_mean(name, known)
        raise UsageError(
            f"{key}: there is no '{name}'{hint}{names}"
            if hint
            else f"{key}: there is no '{name}'; {expected}"
        )
    tried = list(_readings(name, search))
    for module_name, attributes in tried:
        module = _import(module_name, key, name)
        if module is not None:
            return _attribute(module, attributes, key, name)
    modules = " or ".join(module_name for module_name, _ in tried)
    raise UsageError(f"{key}: '{name}' cannot be imported: there is no module {modules}{names}")


def _is_path(name: str) -> bool:
    parts = name.replace(":", ".", 1).split(".")
    return all(part.isidentifier() for part in parts)


def _readings(name: str, search: str) -> Iterator[tuple[str, str]]:
    """Every (module, attributes) that a path can mean, in the order in which they are tried."""
    module, colon, attributes = name.partition(":")
    if colon:
        if search:
            yield f"{search}.{module}", attributes
        yield module, attributes
        return
    parts = name.split(".")
    for n in range(len(parts) - 1, 0, -1):
        yield ".".join(parts[:n]), ".".join(parts[n:])


def _import(module: str, key: str, name: str) -> ModuleType | None:
    try:
        return importlib.import_module(module)
    except Exception as error:
        missing = getattr(error, "name", None) if isinstance(error, ModuleNotFoundError) else None
        if missing and f"{module}.".startswith(f"{missing}."):
            return None
        reason = f"{type(error).__name__}: {error}"
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
