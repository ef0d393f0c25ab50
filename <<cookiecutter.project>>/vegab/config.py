"""Configs: a root that is the schema, named variants, files, overrides and references.

A config is a nested dictionary of plain data (what JSON can say, without NaN and infinity).
The root names every key and its default; whatever comes on top (a registered config, a file, the
command line) may change values, never add a key or change a type.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

Config = dict[str, Any]
CONFIG_SUFFIXES = (".yaml", ".yml", ".json")
REFERENCE = re.compile(r"\$\{([^${}]*)\}")


class UsageError(Exception):
    """A mistake of the person who typed the command: one sentence, exit code 2, nothing written."""


class Key(NamedTuple):
    """A default together with its explanation, for any value of a root config."""

    default: Any
    help: str = ""


class Override(NamedTuple):
    """One change asked for on the command line. `value` is text unless it was read already."""

    key: str
    value: Any
    raw: bool = False


# ----------------------------------------------------------------------- plain nested dictionaries


def flatten(config: Config, prefix: str = "") -> dict[str, Any]:
    """Every leaf by its dotted key; an empty mapping counts as a leaf."""
    leaves: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, dict) and value:
            leaves.update(flatten(value, f"{prefix}{name}."))
        else:
            leaves[prefix + name] = value
    return leaves


def merge(below: Config, above: Config) -> Config:
    """A new dictionary: mappings merge deeply, everything else (lists too) is replaced."""
    merged = copy.deepcopy(below)
    for name, value in above.items():
        if isinstance(value, dict) and isinstance(merged.get(name), dict):
            merged[name] = merge(merged[name], value)
        else:
            merged[name] = copy.deepcopy(value)
    return merged


def nested(key: str, value: Any) -> Config:
    """`nested("a.b", 1)` is `{"a": {"b": 1}}`."""
    for name in reversed(key.split(".")):
        value = {name: value}
    return value


def lookup(config: Config, key: str) -> Any:
    """The value at a dotted key. Raises KeyError."""
    value: Any = config
    for name in key.split("."):
        if not isinstance(value, dict):
            raise KeyError(key)
        value = value[name]
    return value


def same(a: Any, b: Any) -> bool:
    """Equality that tells 1, 1.0 and True apart."""
    return json.dumps(a, sort_keys=True, default=str) == json.dumps(b, sort_keys=True, default=str)


def differences(old: Config, new: Config, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Dotted key -> (old, new) for every value that differs; `...` stands for an absent one."""
    changes: dict[str, tuple[Any, Any]] = {}
    for name in old | new:
        before, after = old.get(name, ...), new.get(name, ...)
        if isinstance(before, dict) and isinstance(after, dict):
            changes.update(differences(before, after, f"{prefix}{name}."))
        elif before is ... or after is ... or not same(before, after):
            changes[prefix + name] = (before, after)
    return changes


def show(value: Any) -> str:
    """A value as it can be typed on the command line."""
    if value is ...:
        return "(absent)"
    if isinstance(value, str) and re.fullmatch(r"[A-Za-z_][\w./-]*", value):
        return value
    return json.dumps(value, ensure_ascii=False)


def show_differences(changes: dict[str, tuple[Any, Any]]) -> str:
    """`a.b: 1 -> 2, c: x -> y`."""
    return ", ".join(f"{key}: {show(old)} -> {show(new)}" for key, (old, new) in changes.items())


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?`, or nothing."""
    by_last_name: dict[str, str] = {}
    for name in known:
        by_last_name.setdefault(name.rpartition(".")[2], name)
        by_last_name[name] = name
    close = difflib.get_close_matches(word.replace("-", "_"), by_last_name, n=1)
    return f"; did you mean '{by_last_name[close[0]]}'?" if close else ""


# ---------------------------------------------------------------------------------------- checking


def plain(value: Any, key: str) -> Any:
    """A deep copy made of what JSON can say. Raises UsageError for anything else."""
    if isinstance(value, dict):
        for name in value:
            if not isinstance(name, str) or not name or "." in name:
                raise UsageError(
                    f"{key or 'config'}: the key {name!r} is not a word; keys are text without dots"
                )
        return {name: plain(item, f"{key}.{name}" if key else name) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, f"{key}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        raise UsageError(f"{key}: {value} is not a finite number, and a config holds none else")
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise UsageError(
        f"{key}: a value of type {type(value).__name__} is not plain data; "
        "a config holds numbers, text, true, false, null, lists and mappings"
    )


def type_name(value: Any) -> str:
    """A value's type in the words of the error messages."""
    names = {bool: "true or false", int: "an integer", float: "a number", str: "text"}
    return names.get(type(value)) or ("a list" if isinstance(value, list) else "a mapping")


def checked(schema: Config, changes: Config, prefix: str = "") -> Config:
    """`changes` with an int turned into a float where the default is one.

    Raises UsageError for a key that the schema does not have or a value of another type.
    A default of None takes anything, one of {} any mapping; a `${reference}` is checked later.
    """
    result: Config = {}
    for name, value in changes.items():
        key = prefix + name
        if name not in schema:
            raise UsageError(f"unknown key '{key}'" + did_you_mean(name, flatten(schema)))
        default = schema[name]
        if isinstance(default, dict) and default and isinstance(value, dict):
            value = checked(default, value, key + ".")
        elif isinstance(value, str) and REFERENCE.search(value):
            pass
        elif type(default) is float and type(value) is int:
            value = float(value)
        elif default is not None and type(value) is not type(default):
            example = "" if isinstance(default, dict) else f" (the default is {show(default)})"
            raise UsageError(
                f"{key}: {show(value)} was given, {type_name(default)} is expected{example}"
            )
        result[name] = value
    return result


def find_key(schema: Config, name: str) -> str:
    """The dotted key that a full or short name on the command line stands for."""
    leaves = flatten(schema)
    sections = {key.rsplit(".", n)[0] for key in leaves for n in range(1, key.count(".") + 1)}
    if name in leaves or name in sections:
        return name
    candidates = [key for key in leaves if key.endswith("." + name)]
    if len(candidates) == 1:
        return candidates[0]
    if candidates:
        raise UsageError(f"the key '{name}' is ambiguous: give {' or '.join(candidates)}")
    inside = [key for key, value in leaves.items() if value == {} and name.startswith(key + ".")]
    if inside:  # a key of a mapping whose keys are free
        return name
    raise UsageError(f"unknown key '{name}'" + did_you_mean(name, leaves))


def resolve_references(config: Config) -> Config:
    """Replaces `${a.b}`: alone it keeps the type of what it names, in text it is written out."""

    def resolved(value: Any, trail: tuple[str, ...]) -> Any:
        if isinstance(value, dict):
            return {name: resolved(item, trail) for name, item in value.items()}
        if isinstance(value, list):
            return [resolved(item, trail) for item in value]
        if not isinstance(value, str):
            return value
        alone = REFERENCE.fullmatch(value)
        if alone:
            return target(alone[1], trail)
        return REFERENCE.sub(lambda match: written(target(match[1], trail)), value)

    def target(key: str, trail: tuple[str, ...]) -> Any:
        if key in trail:
            raise UsageError(f"the references {' -> '.join([*trail, key])} go round in a circle")
        try:
            value = lookup(config, key)
        except KeyError:
            hint = did_you_mean(key, flatten(config))
            raise UsageError(f"${{{key}}} refers to a key that is not there{hint}") from None
        return resolved(value, (*trail, key))

    def written(value: Any) -> str:
        return value if isinstance(value, str) else json.dumps(value)

    return resolved(config, ())


# ------------------------------------------------------------------------------------------- files


def read_yaml(text: str, source: str) -> Any:
    """Reads YAML 1.2 or JSON; a time or date stays text. `source` names it in errors."""
    # Imported where it is needed: it is half of what importing vegab would cost.
    from ruamel.yaml import YAML
    from ruamel.yaml.constructor import SafeConstructor
    from ruamel.yaml.error import YAMLError

    class PlainConstructor(SafeConstructor):
        pass

    for tag in ("timestamp", "value", "merge"):
        PlainConstructor.add_constructor(f"tag:yaml.org,2002:{tag}", lambda _, node: node.value)
    yaml = YAML(typ="safe", pure=True)
    yaml.Constructor = PlainConstructor
    try:
        return yaml.load(text)
    except (YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}" if mark and "\n" in text else ""
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UsageError(f"{source}{place}: this is not valid YAML: {reason}") from None


def read_text(path: Path) -> str:
    """A file's text. Raises UsageError."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"cannot read {path}: it is not UTF-8 text") from None


def load_file(path: Path, trail: tuple[Path, ...] = ()) -> Config:
    """A config file with what it extends merged under it; references stay as they are."""
    if path.resolve() in [other.resolve() for other in trail]:
        circle = " -> ".join(str(other) for other in (*trail, path))
        raise UsageError(f"the files {circle} extend each other in a circle")
    config = read_yaml(read_text(path), str(path))
    if config is None:
        raise UsageError(f"{path} is empty; a config file holds a mapping of keys to values")
    if not isinstance(config, dict):
        raise UsageError(
            f"{path} holds {type_name(config)}; a config file holds a mapping of keys to values"
        )
    patterns = config.pop("extend", [])
    if isinstance(patterns, str):
        patterns = [patterns]
    if not isinstance(patterns, list) or not all(isinstance(item, str) for item in patterns):
        raise UsageError(f"{path}: extend is a list of file names")
    merged: Config = {}
    for pattern in patterns:
        for base in extended(path, pattern):
            merged = merge(merged, load_file(base, (*trail, path)))
    return merge(merged, plain(config, ""))


def extended(path: Path, pattern: str) -> list[Path]:
    """The files that one entry of `extend` names, sorted."""
    import glob

    found = sorted(glob.glob(os.path.join(glob.escape(str(path.parent)), pattern), recursive=True))
    if not found:
        raise UsageError(f"{path}: there is no file {pattern} to extend")
    return [Path(name) for name in found]


def comments_as_help(text: str) -> dict[str, str]:
    """Dotted key -> the comment at the end of its line."""
    from ruamel.yaml import YAML

    lines = text.splitlines()
    helps: dict[str, str] = {}

    def walk(node: Any, prefix: str) -> None:
        for name, value in node.value:
            flows = getattr(value, "flow_style", False) or value.end_mark.line == name.end_mark.line
            mark = value.end_mark if flows and value.value else name.end_mark
            comment = re.match(r"[\s:|>+-]*#\s*(.*)", lines[mark.line][mark.column :])
            if comment:
                helps[prefix + name.value] = comment[1].strip()
            if value.id == "mapping":
                walk(value, f"{prefix}{name.value}.")

    node = YAML(typ="safe", pure=True).compose(text)
    if node is not None and node.id == "mapping":
        walk(node, "")
    return helps


def first_comment(text: str) -> str:
    """The comment on the first line of a file, or nothing."""
    first = text.lstrip("\ufeff").split("\n", 1)[0]
    return first.lstrip("# ").strip() if first.startswith("#") else ""


# ---------------------------------------------------------------------------------------- registry


class ConfigRegistry:
    """Named configs over one root, which is the schema of them all."""

    def __init__(self) -> None:
        self._root: Config | None = None
        self._helps: dict[str, str] = {}
        # name -> function that reads what differs from root, name -> function that reads its help
        self._readers: dict[str, Callable[[], Config]] = {}
        self._summaries: dict[str, Callable[[], str]] = {}

    def set_root_config(self, config: Config) -> None:
        """Sets every key and its default. Any value may be a `Key(default, help)`."""
        if self._root is not None:
            raise ValueError("the root config is set already")
        self._helps = {}

        def without_keys(value: Any, key: str) -> Any:
            if isinstance(value, Key):
                self._helps[key] = value.help
                value = value.default
            if not isinstance(value, dict):
                return value
            prefix = f"{key}." if key else ""
            return {name: without_keys(item, f"{prefix}{name}") for name, item in value.items()}

        with _as_value_error("root"):
            self._root = plain(without_keys(config, ""), "")

    def get_root_config(self) -> Config:
        """A deep copy of the root config, as plain data."""
        return copy.deepcopy(self._root or {})

    def __getitem__(self, name: str) -> Config:
        """A deep copy of root with the named config on it, references resolved."""
        return self.resolve(name)

    def __setitem__(self, name: str, config: Config) -> None:
        """Registers what differs from root. See `register`."""
        self.register(name, config)

    def register(self, name: str, config: Config, help: str = "") -> None:
        """Registers what differs from root. Raises ValueError for a name or key that cannot be."""
        with _as_value_error(name):
            changes = plain(config, "")
            if self._root is not None:
                changes = checked(self.schema(), changes)
        self._add(name, lambda: changes, lambda: help)

    def add_folder(self, path: str | Path) -> None:
        """Registers each YAML and JSON file of a folder by its stem, except `root`.

        A file is read when it is asked for, so that a broken one does not stop the others.
        """
        for file in sorted(Path(path).iterdir()):
            hidden = file.name.startswith(".")
            if file.suffix in CONFIG_SUFFIXES and file.stem != "root" and not hidden:
                self._add(
                    file.stem,
                    lambda file=file: self._read_file(file),  # type: ignore[misc]
                    lambda file=file: first_comment(read_text(file)),  # type: ignore[misc]
                )

    def __contains__(self, name: object) -> bool:
        return name in self._readers or (name == "root" and self._root is not None)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def names(self) -> list[str]:
        """Every name that CONFIG may be, `root` first."""
        return [*(["root"] if self._root is not None else []), *self._readers]

    def help_for(self, key: str) -> str:
        """The explanation of a dotted key, or nothing."""
        return self._helps.get(key, "")

    def summary(self, name: str) -> str:
        """The one line that says what a named config is, or nothing."""
        if name not in self._summaries:
            return "every key with its default" if name == "root" else ""
        return self._summaries[name]()

    def resolve(
        self,
        name: str,
        bases: Iterable[str | Path] = (),
        overrides: Iterable[Override] = (),
    ) -> Config:
        """root <- base files <- named config or config file <- overrides, then the references.

        Raises UsageError for whatever does not fit together.
        """
        config = self.get_root_config()
        layers = [self._read_file(Path(base)) for base in bases]
        layers.append(self._changes(name))
        for layer in layers:
            config = merge(config, layer)
        # A registered config's schema is root; without one the files themselves are.
        schema = self.schema() or config
        for override in overrides:
            config = overridden(config, schema, override)
        config = resolve_references(config)
        return config if self._root is None else checked(schema, config)

    def schema(self) -> Config:
        """Every key with a value of its type: root with its references resolved."""
        return resolve_references(self._root or {})

    def _changes(self, name: str) -> Config:
        if name in self._readers:
            return self._readers[name]()
        if name in self:
            return {}
        if name.endswith(CONFIG_SUFFIXES):
            return self._read_file(Path(name))
        hint = did_you_mean(name, self.names())
        known = ", ".join(self.names())
        raise UsageError(
            f"unknown config '{name}'{hint or '.'} "
            f"Known are {known}; a path to a .yaml or .json file is fine, too"
        )

    def _read_file(self, path: Path) -> Config:
        config = load_file(path)
        if self._root is None:
            return config
        try:
            return checked(self.schema(), config)
        except UsageError as error:
            raise UsageError(f"{path}: {error}") from None

    def _add(self, name: str, reader: Callable[[], Config], summary: Callable[[], str]) -> None:
        if name in self or name == "root":
            raise ValueError(f"a config named '{name}' is registered already")
        self._readers[name] = reader
        self._summaries[name] = summary


@contextlib.contextmanager
def _as_value_error(name: str) -> Iterator[None]:
    """Turns a UsageError into a ValueError: here the mistake is in the code, not in a command."""
    try:
        yield
    except UsageError as error:
        raise ValueError(f"config '{name}': {error}") from None


def config_from_folder(path: str | Path) -> ConfigRegistry:
    """A registry of a folder's files. `root.yaml` (or .yml, .json) is the root config; the
    comments at the end of its lines explain the keys in `--help`. Raises ValueError without one.
    """
    folder = Path(path)
    roots = [folder / f"root{suffix}" for suffix in CONFIG_SUFFIXES]
    root = next((file for file in roots if file.is_file()), None)
    if root is None:
        raise ValueError(f"{folder} has no root.yaml, which names every key and its default")
    registry = ConfigRegistry()
    registry.set_root_config(load_file(root))
    registry._helps = comments_as_help(read_text(root))
    registry.add_folder(folder)
    return registry


# --------------------------------------------------------------------------------------- overrides


def read_override(schema: Config, override: Override) -> Config:
    """The change that one override asks for, as a nested dictionary."""
    key = find_key(schema, override.key)
    try:
        default = lookup(schema, key)
    except KeyError:  # inside a mapping whose keys are free
        default = None
    value = override.value
    if isinstance(value, str) and not override.raw:
        value = read_value(value, default, key)
    return checked(schema, nested(key, plain(value, key)))


def overridden(config: Config, schema: Config, override: Override) -> Config:
    """The config with one override. A mapping is merged where root names its keys; where it takes
    any (its default is {} or null), the one on the command line is the whole of it."""
    change, key = read_override(schema, override), find_key(schema, override.key)
    with contextlib.suppress(KeyError):
        if not lookup(schema, key) and isinstance(lookup(change, key), dict):
            config = merge(config, nested(key, None))
    return merge(config, change)


def read_value(text: str, default: Any, key: str) -> Any:
    """What was typed as a value: YAML, or `@file`. Where text is expected, a number is text."""
    if text.startswith("@"):
        return read_yaml(read_text(Path(text[1:])), text[1:])
    expects_text = isinstance(default, str)
    try:
        value = read_yaml(text, key)
    except UsageError:
        if expects_text:
            return text
        raise
    if expects_text and (isinstance(value, bool | int | float) or not text.strip()):
        return text
    return value
