"""Resolves configs: a root that is the schema, named variants, files, overrides, references.

A config is a nested dictionary of plain data (what JSON can say, without NaN and infinity).
`vegab/README.md` says what root, schemas and layers are."""

from __future__ import annotations

import ast
import builtins
import contextlib
import copy
import difflib
import functools
import glob
import json
import math
import operator
import os
import re
from collections import ChainMap
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vegab import trust
from vegab.exits import UsageError
from vegab.files import PROJECT, ROOT, is_modest, read_bytes

Config = dict[str, Any]
CONFIG_SUFFIXES = (".yaml", ".yml", ".json")
BARE = re.compile(r"(?!(?i:null|true|false)$)[A-Za-z_][\w./-]*")  # text that YAML reads as it is
REFERENCE = re.compile(r"\$\{([^${}]*)\}")
# {a/b} is a reference where it is a whole value, and the config's kind is open.
BRACES = re.compile(r"\{([^${}\[\]:,'\"\s]+)\}")
# What metayaml, which read Deephub's files by the rules of YAML 1.1, took for another value.
WORDS: dict[str, bool | None] = dict.fromkeys(("yes", "Yes", "YES", "on", "On", "ON"), True)
WORDS |= dict.fromkeys(("no", "No", "NO", "off", "Off", "OFF"), False) | {"None": None}
OLD_NUMBER = re.compile(r"[-+]?(0[0-7_]+|[1-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?)")
DIRECTIVES = {
    "__del__": "write delete: [a.b] in the file that extends another",
    "__del_all__": "write delete: [a.b] in the file that extends another",
    "__extend__": "write extend: [files] at the top of a file, whose keys are complete",
    "__inherit__": "write out the keys, or extend a file that has them",
}


class UnknownKeyError(UsageError):
    """A name stands for no key."""


class Key(NamedTuple):
    """A default together with its explanation, for any value of a root config or a schema."""

    default: Any
    help: str = ""
    instead_of: str = ""  # a key of root that goes back to its default where this one is typed
    section: str = ""  # a heading in --help, for this key and those after it


class Override(NamedTuple):
    """One change asked for on the command line. `value` is text unless it was read already."""

    key: str
    value: Any
    raw: bool = False
    adds: bool = False  # may it add a key, where the config's kind allows that?
    deletes: bool = False  # takes the key away, or gives one of the schema its default back


class Schema(NamedTuple):
    """A kind of config: the keys that the program knows, with their defaults and explanations."""

    defaults: Config
    keys: dict[str, Key] = {}  # noqa: RUF012  # by their dotted names, as far as they are explained
    title: str = ""
    required: tuple[tuple[str, ...], ...] = ()
    is_open: bool = False  # may a config of this kind have keys of its own?
    closed: tuple[str, ...] = ()  # top-level keys whose mappings have none, even so
    is_metayaml: bool = False  # were its files read by metayaml before?

    def resolved(self, config: Config, strict: bool = True) -> Config:
        """A config of this kind with its references resolved. See `resolve_references`."""
        return resolve_references(config, braces=self.is_open, strict=strict)

    def expected(self) -> Config:
        """Every key with a value of its type: a default that refers to another has its value."""
        return self.resolved(self.defaults, strict=False)


Layer = tuple[Config, str]  # what a file or registration contributes, and the file, for errors


# ----------------------------------------------------------------------- plain nested dictionaries


def flatten(config: Config, prefix: str = "") -> dict[str, Any]:
    """Every leaf by its dotted key; an empty mapping counts as a leaf."""
    leaves: dict[str, Any] = {}
    for name, value in config.items():
        key = f"{prefix}{name}"
        leaves |= flatten(value, f"{key}.") if isinstance(value, dict) and value else {key: value}
    return leaves


def merge(below: Config, above: Config) -> Config:
    """A new dictionary: mappings merge deeply, everything else (lists too) is replaced."""
    merged = copy.deepcopy(below)
    for name, value in above.items():
        both = isinstance(value, dict) and isinstance(merged.get(name), dict)
        merged[name] = merge(merged[name], value) if both else copy.deepcopy(value)
    return merged


def nested(key: str, value: Any) -> Config:
    """`nested("a.b", 1)` is `{"a": {"b": 1}}`."""
    for name in reversed(key.split(".")):
        value = {name: value}
    return value


def lookup(config: Config, key: str) -> Any:
    """The value at a key whose parts are separated by dots or slashes. Raises KeyError."""
    for path in (key, key.replace("/", ".")):
        with contextlib.suppress(KeyError, TypeError):
            return functools.reduce(operator.getitem, path.split("."), config)
    raise KeyError(key)


def without(config: Config, key: str) -> Config:
    """A copy of the config that lacks a dotted key. Raises KeyError if it is not there."""
    lookup(config, key)
    shorter = copy.deepcopy(config)
    section, _, name = key.rpartition(".")
    del (lookup(shorter, section) if section else shorter)[name]
    return shorter


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


def as_text(value: Any) -> str:
    """A text as it is, anything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, default=str)


def show(value: Any) -> str:
    """A value as it can be typed on the command line."""
    if value is ...:
        return "(absent)"
    if isinstance(value, str) and BARE.fullmatch(value):
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
    word = word.replace("-", "_")
    close = difflib.get_close_matches(word, by_last_name, n=1)
    if not close:  # lr is short for learning_rate
        close = [n for n in by_last_name if word == "".join(w[:1] for w in n.split("_"))]
    return f"; did you mean '{by_last_name[close[0]]}'?" if close else ""


# ---------------------------------------------------------------------------------------- checking


def plain(value: Any, key: str) -> Any:
    """A deep copy made of what JSON can say, where a key that is a whole number is text. Raises
    UsageError for anything else."""
    if isinstance(value, dict):
        copied: Config = {}
        for name, item in value.items():
            if type(name) is int:
                name = str(name)
            if not isinstance(name, str) or not name or "." in name:
                wrong = f"the key {name!r} is not a word; keys are text without dots"
                raise UsageError(f"{key or 'config'}: {wrong}")
            copied[name] = plain(item, f"{key}.{name}" if key else name)
        return copied
    if isinstance(value, list | tuple):
        return [plain(item, f"{key}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        raise UsageError(f"{key}: {value} is not a finite number; a config holds only finite ones")
    if value is None or isinstance(value, bool | int | float | str):
        return value
    held = "a config holds numbers, text, true, false, null, lists and mappings"
    raise UsageError(f"{key}: a value of type {type(value).__name__} is not plain data; {held}")


def refuse_metayaml(value: Any, where: str, keys_only: bool = False) -> None:
    """Raises UsageError for what metayaml would have computed, in the keys and texts of a value."""
    if isinstance(value, dict):
        for name in value:
            refuse_metayaml(name, where)
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            refuse_metayaml(item, where, keys_only)
    if not isinstance(value, str) or keys_only:
        return
    directive = next((name for name in DIRECTIVES if re.search(rf"(^|\W){name}(\W|$)", value)), "")
    if directive:
        raise UsageError(f"{where}: {directive} is not known here; {DIRECTIVES[directive]}")
    for opening, inner in re.findall(r"\$([({])([^)}]*)", value):
        if opening == "(" or not re.fullmatch(r"[\w./-]*", inner):
            hint = "write ${a.b} for the value of another key, or the result itself"
            raise UsageError(f"{where}: {value!r} is not computed; {hint}")


def type_name(value: Any) -> str:
    """A value's type in the words of the error messages."""
    names = {bool: "true or false", int: "an integer", float: "a number", str: "text"}
    return names.get(type(value)) or ("a list" if isinstance(value, list) else "a mapping")


def checked(
    kind: Schema,
    types: Config,
    changes: Config,
    is_open: bool,
    prefix: str = "",
    is_resolved: bool = False,
) -> Config:
    """Changes to a config of a kind, with an int turned into a float where the default is one.
    Raises UsageError for a value of another type than in `types` and, unless `is_open`, for a key
    that is not there. A type of None takes anything, one of {} any mapping; what may be a reference
    is checked once it is resolved."""
    result: Config = {}
    for name, value in changes.items():
        key = prefix + name
        if name not in types and not is_open:
            raise UnknownKeyError(f"unknown key '{key}'" + did_you_mean(name, flatten(types)))
        default, may_refer = types.get(name), isinstance(value, str) and not is_resolved
        if isinstance(default, dict) and default and isinstance(value, dict):
            value = checked(kind, default, value, is_open, f"{key}.", is_resolved)
        elif may_refer and (REFERENCE.search(value) or (kind.is_open and BRACES.fullmatch(value))):
            pass
        elif type(default) is float and type(value) is int:
            value = float(value)
        elif default is not None and type(value) is not type(default):
            example = "" if isinstance(default, dict) else f" (the default is {show(default)})"
            expected = f"{type_name(default)} is expected{example}"
            raise UsageError(f"{key}: {show(value)} was given, {expected}")
        result[name] = value
    return result


def find_key(names: Config, name: str, types: Config | None = None) -> str:
    """The dotted key that a full or short name, perhaps with slashes, stands for. Inside a mapping
    that is {} in `types` (by default `names`) any key is fine."""
    leaves = flatten(names)
    sections = {key.rsplit(".", n)[0] for key in leaves for n in range(1, key.count(".") + 1)}
    dotted = name if name in leaves else name.replace("/", ".")
    if dotted in leaves or dotted in sections:
        return dotted
    candidates = [key for key in leaves if key.endswith("." + dotted)]
    if len(candidates) == 1:
        return candidates[0]
    if candidates:
        raise UsageError(f"the key '{name}' is ambiguous: give {' or '.join(candidates)}")
    free = leaves if types is None else flatten(types)
    if any(value == {} and dotted.startswith(key + ".") for key, value in free.items()):
        return dotted
    raise UnknownKeyError(f"unknown key '{name}'" + did_you_mean(dotted, leaves))


def resolve_references(config: Config, *, braces: bool = False, strict: bool = True) -> Config:
    """Replaces `${a.b}`: by itself it keeps the type of what it names, in text it is written out.
    With `braces`, a value `{a/b}` is replaced, too, where there is such a key. A reference to
    nothing or to itself raises UsageError; if not `strict` it becomes None."""

    def resolved(value: Any, trail: tuple[str, ...]) -> Any:
        if isinstance(value, dict):
            return {name: resolved(item, trail) for name, item in value.items()}
        if isinstance(value, list):
            return [resolved(item, trail) for item in value]
        if not isinstance(value, str):
            return value
        if alone := REFERENCE.fullmatch(value):
            return target(alone[1], trail)
        if braces and (in_braces := BRACES.fullmatch(value)):
            with contextlib.suppress(KeyError):
                lookup(config, in_braces[1])
                return target(in_braces[1], trail)
        return REFERENCE.sub(lambda match: as_text(target(match[1], trail)), value)

    def target(key: str, trail: tuple[str, ...]) -> Any:
        wrong = f"the references {' -> '.join([*trail, key])} form a circle"
        if key not in trail:
            try:
                return resolved(lookup(config, key), (*trail, key))
            except KeyError:
                hint = did_you_mean(key.replace("/", "."), flatten(config))
                wrong = f"${{{key}}} refers to a key that is not there{hint}"
        if strict:
            raise UsageError(wrong)
        return None

    return resolved(config, ())


# ------------------------------------------------------------------------------------------- files


def read_yaml(text: str, source: str, is_metayaml: bool = False) -> Any:
    """Reads YAML 1.2 or JSON; a time or date stays text. `source` names it in errors. If
    `is_metayaml`, the words of YAML 1.1 are true, false and null, and its numbers are refused."""
    # Imported where it is needed: it is half of what importing vegab would cost.
    from ruamel.yaml import YAML
    from ruamel.yaml.constructor import SafeConstructor
    from ruamel.yaml.error import YAMLError

    class PlainConstructor(SafeConstructor):
        pass

    for tag in ("timestamp", "value", "merge"):
        PlainConstructor.add_constructor(f"tag:yaml.org,2002:{tag}", lambda _, node: node.value)
    if is_metayaml:

        def as_before(constructor: SafeConstructor, node: Any) -> Any:
            if node.style is None and OLD_NUMBER.fullmatch(node.value):
                raise ValueError(f"is {node.value} a number or text? Write it out, or quote it")
            if node.tag.endswith(":int"):
                return constructor.construct_yaml_int(node)
            return WORDS.get(node.value, node.value) if node.style is None else node.value

        for tag in ("str", "int"):
            PlainConstructor.add_constructor(f"tag:yaml.org,2002:{tag}", as_before)
    yaml = YAML(typ="safe", pure=True)
    yaml.Constructor = PlainConstructor
    try:
        if is_modest(value := yaml.load(text)):
            return value
        raise RecursionError
    except RecursionError:
        hint = "it is nested too deeply, or made too large by aliases (&a, *a)"
        raise UsageError(f"{source}: {hint}") from None
    except (YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}" if mark and "\n" in text else ""
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UsageError(f"{source}{place}: this is not valid YAML: {reason}") from None


def read_text(path: Path) -> str:
    """A file's text. Raises UsageError."""
    try:
        content = path.read_bytes() if str(path)[:5] == "/dev/" else read_bytes(path)  # as <(…)
        return content.decode("utf-8-sig")
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"cannot read {path}: it is not UTF-8 text") from None


def load_file(
    path: Path, trail: Sequence[Path] = (), laid: set[Path] | None = None, is_metayaml: bool = False
) -> Config:
    """A config file with what it extends merged under it. Each file is `laid` once: where two of
    them extend a third, the later one does not bring it back. What metayaml would have read in
    another way is read so, or refused, if it `is_metayaml`."""
    laid = set() if laid is None else laid
    if path.resolve() in [other.resolve() for other in trail]:
        circle = " -> ".join(str(other) for other in (*trail, path))
        raise UsageError(f"the files {circle} extend each other in a circle")
    config = read_yaml(read_text(path), str(path), is_metayaml)
    refuse_metayaml(config, str(path), keys_only=not is_metayaml)
    if not isinstance(config, dict):
        what = "is empty" if config is None else f"holds {type_name(config)}"
        raise UsageError(f"{path} {what}; a config file holds a mapping of keys to values")
    trust.note_file((*trail, path), config)
    patterns = _pop_texts(config, "extend", "a list of file names", path)
    deleted = _pop_texts(config, "delete", "a list of keys that an extended file has", path)
    merged: Config = {}
    for pattern in patterns:
        bases = [str(path.parent / pattern)]
        if not os.path.exists(bases[0]):
            bases = glob.glob(os.path.join(glob.escape(str(path.parent)), pattern), recursive=True)
        if not bases:
            raise UsageError(f"{path}: there is no file {pattern} to extend")
        for base in map(Path, sorted(bases)):
            if base.resolve() not in laid:
                merged = merge(merged, load_file(base, (*trail, path), laid, is_metayaml))
                laid.add(base.resolve())
    for key in deleted:
        try:
            merged = without(merged, key.replace("/", "."))
        except KeyError:
            hint = did_you_mean(key, flatten(merged))
            raise UsageError(f"{path}: no extended file has '{key}' to delete{hint}") from None
    return merge(merged, plain(config, ""))


def _pop_texts(config: Config, key: str, what: str, path: Path) -> list[str]:
    """Takes a key out of a file's config whose value is a text or a list of them."""
    texts = config.pop(key, [])
    texts = [texts] if isinstance(texts, str) else texts
    if not isinstance(texts, list) or not all(isinstance(item, str) for item in texts):
        raise UsageError(f"{path}: {key} is {what}")
    return texts


# ---------------------------------------------------------------------------------------- registry


class ConfigRegistry:
    """Named configs over one root, which is their schema; `add_schema` adds kinds besides it."""

    def __init__(self) -> None:
        self._root = Schema({})
        self._schemas: list[Schema] = []
        # name -> the config or its file, and the line that says what it is
        self._named: dict[str, tuple[Config | Path, str]] = {}

    def set_root_config(self, config: Config) -> None:
        """Sets every key and its default. Any value may be a `Key(default, help)`."""
        if "root" in self:
            raise ValueError("the root config is set already")
        with _as_value_error("root"):
            self._root = _schema_of(config)
        self._named = {"root": ({}, "every key with its default"), **self._named}

    def get_root_config(self) -> Config:
        """A deep copy of the root config, as plain data."""
        return copy.deepcopy(self._root.defaults)

    def add_schema(
        self,
        config: Config,
        required: Sequence[tuple[str, ...]] = (),
        title: str = "keys of files that have keys of their own",
        closed: Sequence[str] = (),
        is_metayaml: bool = False,
    ) -> None:
        """Adds a kind of config: one that has a top-level key of this schema that root has not.

        Add schemas before configs are registered; vegab/README.md explains them. Of each tuple in
        `required`, one key must not be None, "" or {}; `load_file` explains `is_metayaml`."""
        with _as_value_error(title):
            kind = _schema_of(config)._replace(title=title, is_open=True, is_metayaml=is_metayaml)
        self._schemas.append(kind._replace(required=tuple(required), closed=tuple(closed)))

    @property
    def schemas(self) -> list[Schema]:
        """Every kind of config, root's first."""
        return [*([self._root] if "root" in self else []), *self._schemas]

    def completed(self, config: Config) -> Config:
        """A resolved config of an earlier time, with the defaults of keys that were added since."""
        kind = self._kind_of(config)
        return kind.resolved(merge(kind.defaults, config), strict=False)

    def register(self, name: str, config: Config, help: str = "") -> None:
        """Registers what differs from root. Raises ValueError for a name or key that cannot be."""
        with _as_value_error(name):
            kind = self._kind_of(config)
            try:
                changes = _checked_layer(kind, plain(config, ""))
            except UnknownKeyError as error:
                raise UsageError(f"{error} (root names every key: add it there)") from None
        self._add(name, changes, help)

    __setitem__ = register

    def add_folder(self, path: str | Path, besides: Iterable[str] = ()) -> None:
        """Registers each file but `root` and `besides` by its stem; it is read when asked for. A
        folder that is not there has none."""
        others = {"root", *besides}
        for file in sorted(Path(path).glob("*")):
            hidden = file.name.startswith(".")
            if file.suffix in CONFIG_SUFFIXES and file.stem not in others and not hidden:
                self._add(file.stem, file)

    def __contains__(self, name: object) -> bool:
        return name in self._named

    def names(self) -> list[str]:
        """Every name that CONFIG may be, `root` first."""
        return list(self._named)

    def summary(self, name: str) -> str:
        """The one line that says what a named config is, or nothing."""
        source, about = self._named[name]
        first = read_text(source).split("\n", 1)[0] if isinstance(source, Path) else ""
        return first.lstrip("# ").strip() if first.startswith("#") else about

    def resolve(
        self, name: str, bases: Iterable[str | Path] = (), overrides: Sequence[Override] = ()
    ) -> Config:
        """defaults <- base files <- named config or file <- overrides, then the references."""
        return self.draft(name, bases).resolve(overrides)

    __getitem__ = resolve

    def draft(self, name: str | None, bases: Iterable[str | Path] = ()) -> Draft:
        """The config, or root, before its overrides."""

        def read(is_metayaml: bool) -> list[Layer]:
            below = [(load_file(path, is_metayaml=is_metayaml), str(path)) for path in paths]
            return [*below, *([] if name is None else [self._read(name, is_metayaml)])]

        paths = [_as_it_ran(Path(path)) for path in bases]
        layers = read(False)
        kind = self._kind_of(dict(ChainMap(*(config for config, _ in layers))))
        return Draft(kind, name, read(True) if kind.is_metayaml else layers)

    def _kind_of(self, config: Config) -> Schema:
        """Root's kind, or the first schema of which the config has a key that root has not; a
        resolved config has every key of its kind."""
        own = config.keys() - self._root.defaults.keys()
        marked = [schema for schema in self._schemas if schema.defaults.keys() & own]
        whole = [schema for schema in marked if schema.defaults.keys() <= config.keys()]
        return [*whole, *marked, self._root][0]

    def _read(self, name: str, is_metayaml: bool) -> Layer:
        source = self._named[name][0] if name in self else _as_it_ran(Path(name))
        if not (name in self or name.endswith(CONFIG_SUFFIXES)):
            hint = did_you_mean(name, self.names()) or "."
            known = f"{', '.join(self.names())}; a path to a .yaml or .json file is fine, too"
            raise UsageError(f"unknown config '{name}'{hint} Known are {known}")
        if isinstance(source, Path):
            return load_file(source, is_metayaml=is_metayaml), str(source)
        return source, ""

    def _add(self, name: str, source: Config | Path, about: str = "") -> None:
        if name in self or name == "root":
            raise ValueError(f"a config named '{name}' is registered already")
        self._named[name] = source, about


def _as_it_ran(path: Path) -> Path:
    """The file, or the one in the snapshot that this process runs from: it is edited by nobody."""
    inner = os.path.relpath(os.path.realpath(path.parent), PROJECT)
    kept = Path(ROOT, inner, path.name)
    return path if PROJECT == ROOT or inner.startswith("..") or not kept.is_file() else kept


def _schema_of(config: Config) -> Schema:
    """The defaults as plain data, with what each value that is a `Key` says."""
    keys: dict[str, Key] = {}

    def without_keys(value: Any, key: str) -> Any:
        if isinstance(value, Key):
            keys[key], value = value, value.default
        if not isinstance(value, dict):
            return value
        prefix = f"{key}." if key else ""
        return {name: without_keys(item, f"{prefix}{name}") for name, item in value.items()}

    return Schema(plain(without_keys(config, ""), ""), keys)


def _checked_layer(kind: Schema, config: Config, source: str = "") -> Config:
    """The layer's config, if it fits its kind. Raises UsageError."""
    if not kind.defaults:
        return config
    try:
        return checked(kind, kind.expected(), config, kind.is_open)
    except UsageError as error:
        raise type(error)(f"{source}: {error}" if source else str(error)) from None


@contextlib.contextmanager
def _as_value_error(name: str) -> Iterator[None]:
    """Turns a UsageError into a ValueError: here the mistake is in the code, not in a command."""
    try:
        yield
    except UsageError as error:
        raise ValueError(f"config '{name}': {error}") from None


def config_from_folder(path: str | Path) -> ConfigRegistry:
    """A registry of a folder's files. Raises ValueError without `root.yaml` (or .yml, .json)."""
    folder = Path(path)
    roots = [folder / f"root{suffix}" for suffix in CONFIG_SUFFIXES]
    root = next((file for file in roots if file.is_file()), None)
    if root is None:
        raise ValueError(f"{folder} has no root.yaml, which names every key and its default")
    registry = ConfigRegistry()
    registry.set_root_config(load_file(root))
    registry.add_folder(folder)
    return registry


# --------------------------------------------------------------------------------------- overrides


class Draft:
    """A config whose files are read and whose kind is known; the overrides are to come. `names` has
    every key that can be set, with its value so far; `types` a value of the type that is expected
    there: the default, or for a key of its own what its files say."""

    def __init__(self, kind: Schema, name: str | None, layers: Sequence[Layer] = ()) -> None:
        self.kind, self.name = kind, name
        configs = [_checked_layer(kind, *layer) for layer in layers]
        self._last = configs[-1] if name is not None else {}
        self._merged = functools.reduce(merge, configs, kind.defaults)
        self.names = self.types = kind.expected()
        if kind.is_open or not kind.defaults:  # without root, a config's schema is the config
            self.names = kind.resolved(self._merged, strict=False)
            self.types = _types_of(self.types, self.names)

    def key_of(self, override: Override) -> str:
        """The dotted key that an override means. Raises UsageError if it may not be set."""
        try:
            return find_key(self.names, override.key, self.types)
        except UnknownKeyError:
            if not (self.kind.is_open and override.adds):
                raise
            return override.key.replace("/", ".")

    def change_of(self, override: Override, key: str) -> Config:
        """What an override changes, as a nested dictionary; a number is text where text was."""
        present = None
        with contextlib.suppress(KeyError):  # inside a mapping whose keys are free, or a new key
            present = lookup(self.names, key)
        kind, value = self.kind, override.value
        # YAML would read {a/b} as a mapping.
        in_braces = kind.is_open and isinstance(value, str) and BRACES.fullmatch(value)
        if isinstance(value, str) and not override.raw and not in_braces:
            text = "null" if kind.is_open and value == "None" else value
            value = read_value(text, present, key)
            is_text = isinstance(present, str) and isinstance(value, str)
            if kind.is_open and is_other_in_python(text, value, is_text, kind.is_metayaml):
                hint = "write the number, [1, 2] or null, or give it by -P as text"
                raise UsageError(f"{key}: {text} is not computed; {hint}")
            is_list = isinstance(present, list) and not kind.is_open
            if is_list and isinstance(value, str) and "," in value:
                value = read_yaml(f"[{value}]", key)
        if kind.is_metayaml and not override.raw:
            refuse_metayaml(value, key)
        change = plain(nested(key, value), "")
        may_add = kind.is_open and override.adds
        # One text may stand where a file has a list.
        is_one = may_add and isinstance(value, str) and isinstance(present, list)
        return checked(kind, kind.expected() if is_one else self.types, change, may_add)

    def resolve(self, overrides: Iterable[Override] = ()) -> Config:
        """The config with its overrides, references resolved. Raises UsageError."""
        config = self._merged
        typed: set[str] = set()
        for override in overrides:
            key = self.key_of(override)
            if override.deletes:
                config = self._deleted(config, key)
                continue
            change = self.change_of(override, key)
            trust.note_typed(change)
            with contextlib.suppress(KeyError):
                # A mapping is merged where its keys are named; where any are fine (the default is
                # {} or null), the one on the command line is the whole of it, but for Deephub's.
                is_whole = not lookup(self.types, key) and not self.kind.is_metayaml
                if is_whole and isinstance(lookup(change, key), dict):
                    config = merge(config, nested(key, None))
            config = merge(config, change)
            if lookup(change, key) is not None:
                typed.add(key)
        for key, about in self.kind.keys.items():
            if key not in typed or not (other := about.instead_of):
                continue
            if other in typed:
                raise UsageError(f"{key} and {other} exclude each other; give one of them")
            config = merge(config, {other: self.kind.defaults[other]})
        config = self.kind.resolved(config)
        if self.kind.defaults:
            expected = self.kind.expected()
            config = checked(self.kind, expected, config, self.kind.is_open, is_resolved=True)
            for section in self.kind.closed:
                known, given = expected[section], config[section]
                checked(self.kind, known, given, False, f"{section}.", is_resolved=True)
        self._check_required(config)
        return config

    def named(self) -> Config:
        """CONFIG's own values over the defaults, without base files and overrides."""
        return self.kind.resolved(merge(self.kind.defaults, self._last), strict=False)

    def _deleted(self, config: Config, key: str) -> Config:
        with contextlib.suppress(KeyError):
            default = lookup(self.kind.defaults, key)
            return merge(merge(config, nested(key, None)), nested(key, default))
        with contextlib.suppress(KeyError):  # it was deleted twice
            return without(config, key)
        return config

    def _check_required(self, config: Config) -> None:
        own = sorted(config.keys() - self.kind.defaults.keys())
        for keys in self.kind.required:
            if any(config.get(key) not in (None, "", {}) for key in keys):
                continue
            shown = " and ".join(f"'{key}'" for key in keys)
            what = f"one of the keys {shown}" if len(keys) > 1 else f"the key {shown}"
            close = [(difflib.get_close_matches(name, keys, n=1), name) for name in own]
            hints = [f"; did you mean '{key[0]}' by '{name}'?" for key, name in close if key]
            raise UsageError(f"{self.name}: {what} is missing{''.join(hints[:1])}")


def _types_of(defaults: Config, names: Config) -> Config:
    """For each of the names the default or, where there is none, its own value."""
    types: Config = {}
    for name, value in names.items():
        types[name] = defaults.get(name, value)
        if isinstance(value, dict) and isinstance(types[name], dict) and types[name]:
            types[name] = _types_of(types[name], value)
    return types


def is_other_in_python(text: str, value: Any, is_text: bool, computes: bool) -> bool:
    """Whether a text is something other than `value` in Python, which read literals for EDflow, and
    for Deephub all that it `computes`. Where text is expected, a literal number is text."""
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    with contextlib.suppress(ValueError, TypeError):
        literal = ast.literal_eval(tree)
        return literal != value and not (is_text and isinstance(literal, int | float | str))
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    bound = {name.id for name in names if isinstance(name.ctx, ast.Store)}.union(dir(builtins))
    is_word = isinstance(tree.body, ast.Name) or re.fullmatch(r"\d{4}-\d\d-\d\d", text)
    return computes and not is_word and all(name.id in bound for name in names)


def read_value(text: str, default: Any, key: str) -> Any:
    """What was typed as a value: YAML, or `@file` with it. Where text is expected, a number is
    text. What is neither a number, a truth nor null, and not in quotes or brackets, is text as it
    was typed, whatever YAML makes of a # or a line break."""
    if text.startswith("@"):
        return read_yaml(read_text(Path(text[1:])), text[1:])
    is_text, stripped = isinstance(default, str), text.strip()
    is_plain = stripped[:1] not in ("'", '"', "[", "{", "!")
    if stripped in ("null", "~") or (stripped == "None" and not is_text):
        return None
    if is_text and is_plain:
        return text
    try:
        value = read_yaml(text, key)
    except UsageError:
        if is_plain or is_text:
            return text
        raise
    is_wanted = isinstance(value, dict | list) and isinstance(default, type(value))
    is_scalar = isinstance(value, bool | int | float) or not stripped
    return value if is_scalar or is_wanted or not is_plain else text
