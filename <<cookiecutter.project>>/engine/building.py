"""Builds what a config names, checks ranges, and names the key in a refusal."""

import ast
import contextlib
import functools
import logging
import os
import re
import sys
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vegab import ROOT, UsageError, resolve

log = logging.getLogger(__name__)

CHOICES = {
    "precision": ("float32", "mixed_bfloat16", "mixed_float16", "float64"),
    "on_nan": ("stop", "continue"),
    "monitor_mode": ("auto", "min", "max"),
}
MAX_SEED = 2**32 - 1
REFUSALS = (ValueError, TypeError, KeyError)


def callbacks_of(config: Mapping[str, Any]) -> list[Any]:
    """Return the Keras callbacks that a config names."""
    return [from_mapping(config, "callbacks", entry) for entry in config["callbacks"]]


def require_at_least_one(config: Mapping[str, Any], *keys: str, section: str = "") -> None:
    """Raise a UsageError that names the first key whose value is not a whole number above 0."""
    for key in keys:
        if not isinstance(config[key], int) or config[key] < 1:
            raise UsageError(f"{section}{key} is {config[key]!r}; it must be at least 1")


def check_common_ranges(config: Mapping[str, Any]) -> None:
    """Raise a UsageError that names the first key out of range, of those that every config has."""
    threads = config["threads"]
    if threads is not None and (not isinstance(threads, int) or threads < 1):
        raise UsageError(f"threads is {threads!r}; it must be at least 1, or null: one per core")
    for key in ("callbacks", "hooks"):
        for entry in config[key]:
            _named_in(key, entry)
    for key in ("patience", "checkpoint_seconds"):
        if config[key] < 0:
            raise UsageError(f"{key} is {config[key]}; it must be at least 0 (0: never)")
    if not 0 <= config["seed"] <= MAX_SEED:
        raise UsageError(f"seed is {config['seed']}; it must be from 0 to {MAX_SEED}")
    for key, choices in CHOICES.items():
        if config[key] not in choices:
            raise UsageError(f"{key} is {config[key]!r}; choose one of {', '.join(choices)}")


def learning_rate_schedule(config: Mapping[str, Any], key: str, value: Any) -> Any:
    """Return a Keras schedule over steps: {class: exponential, …}, or "0.1:1000:0.01", which is 0.1
    for the first 1,000 steps and then 0.01. Raises UsageError if it is neither."""
    import keras

    schedules = keras.optimizers.schedules
    if isinstance(value, str) and ":" in value:
        try:
            numbers = [float(part) for part in value.split(":")]
            # Keras keeps a rate through the step of its boundary, which counts from 0.
            ends = [int(number) - 1 for number in numbers[1::2]]
            return schedules.PiecewiseConstantDecay(ends, numbers[::2])
        except ValueError as error:
            if value.replace(":", "").replace(".", "").isdecimal():
                raise UsageError(f"{key} is {value!r}: {error}") from None
    known = {
        "exponential": schedules.ExponentialDecay,
        "piecewise": schedules.PiecewiseConstantDecay,
        "cosine": schedules.CosineDecay,
        "cosine_restarts": schedules.CosineDecayRestarts,
    }
    return from_mapping(config, key, value, known)


def from_mapping(
    config: Mapping[str, Any], key: str, value: Any, registered: Mapping[str, Any] | None = None
) -> Any:
    """Call the class or function that `value` names: "path", or {class: path, argument: …}."""
    name, arguments = _named_in(key, value)
    found = resolve(name, key, registered)
    with refusals_named(config, key):
        return found(**arguments)


def _named_in(key: str, value: Any) -> tuple[str, dict[str, Any]]:
    arguments = dict(value) if isinstance(value, Mapping) else {"class": value}
    if not isinstance(name := arguments.pop("class", None), str):
        raise UsageError(f"{key} is {value}; expected an import path, or a mapping with `class`")
    return name, arguments


def objects_of(config: Mapping[str, Any], key: str, value: Any) -> Any:
    """Return a value whose import paths and mappings with `class` are replaced by the objects."""
    if isinstance(value, list):
        return [objects_of(config, key, each) for each in value]
    if isinstance(value, Mapping) and "class" in value:
        return from_mapping(config, key, value)
    if isinstance(value, Mapping):  # by the outputs' names
        return {name: objects_of(config, f"{key}.{name}", each) for name, each in value.items()}
    is_path = isinstance(value, str) and not value.isidentifier()  # Keras' names have no dot
    return resolve(value, key) if is_path else value


class Noting(dict[str, Any]):
    """A config that notes which of its keys are read."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        self.read: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.read.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        """Return the value of a key, or the default."""
        self.read.add(key)
        return super().get(key, default)


@contextlib.contextmanager
def refusals_named(
    config: Mapping[str, Any], key: str, what: str = "this config"
) -> Iterator[None]:
    """Within the block, turn an error of what a key names into a UsageError; see `refusal`."""
    try:
        yield
    except Exception as error:
        # Errors of TensorFlow, which may not be imported yet, are of data that it reads.
        if not isinstance(error, REFUSALS) and not type(error).__module__.startswith("tensorflow"):
            raise
        raise refusal(config, key, error, what) from error


def refusal(
    config: Mapping[str, Any], key: str, error: BaseException, what: str = "this config"
) -> UsageError:
    """Return the error to raise if the thing that a key names does not take `what`."""
    logging.getLogger(__name__).debug("%s", "".join(traceback.format_exception(error)))
    frames = traceback.extract_tb(error.__traceback__)[1:]  # without that of the block
    frame = max(frames[::-1], key=_is_of, default=None)  # the last of those that say most
    place = f"{Path(frame.filename).name}, line {frame.lineno}; " if frame else ""
    is_plain = isinstance(error, ValueError | TypeError)
    reason = reason_of(error) if is_plain else f"{type(error).__name__}: {reason_of(error)}"
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    named = f"the model's {key}" if value is None else f"{key} {value!r}"
    return UsageError(f"{named} does not take {what}: {reason} ({place}-l DEBUG shows all)")


def _is_of(frame: traceback.FrameSummary) -> int:
    """Return 2 for a line of the user's, 1 for one of the machinery, 0 for one of a library."""
    file = Path(frame.filename)
    if not file.is_relative_to(ROOT) or "site-packages" in file.parts:
        return 0
    return 1 if file.relative_to(ROOT).parts[0] in ("engine", "vegab") else 2


def require_registered(config: Mapping[str, Any], key: str, file: Path, table: str) -> None:
    """Raise UsageError for a bare name that is not a key of a table that is written out in the
    user's source. The source is only read: to import it can take seconds."""
    name, names = config[key], _names_in(file, table)
    if isinstance(name, str) and name.isidentifier() and names is not None:
        resolve(name, key, dict.fromkeys(names))


@functools.cache  # a sweep asks for each of its trials
def _names_in(file: Path, table: str) -> list[str] | None:
    """Return the keys of a table that is written out in a source file, or None."""
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError):
        return None  # whoever imports it says what is wrong
    uses = [node.id for node in ast.walk(tree) if isinstance(node, ast.Name)].count(table)
    names: list[Any] = []
    for node in (each for each in tree.body if isinstance(each, ast.Assign | ast.AnnAssign)):
        for target in getattr(node, "targets", [getattr(node, "target", None)]):
            if isinstance(node.value, ast.Dict) and getattr(target, "id", None) == table:
                names += node.value.keys
                uses -= 1
            elif getattr(getattr(target, "value", None), "id", None) == table:
                names.append(getattr(target, "slice", None))  # TABLE["name"] = …
                uses -= 1
    is_whole = uses == 0 and all(isinstance(name, ast.Constant) for name in names)
    return [str(name.value) for name in names] if is_whole and names else None


def quiet_libraries() -> None:
    """Keep notices of matplotlib, and of TensorFlow as far as possible, out of the output."""
    for name in ("matplotlib", "absl", "tensorflow"):
        logging.getLogger(name).setLevel(logging.WARNING)
    if not logging.getLogger().isEnabledFor(logging.DEBUG):
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")
    if "tensorflow" not in sys.modules:
        log.info("importing TensorFlow …")


def reason_of(error: BaseException) -> str:
    """Return an exception's message in one line, without what Keras and TensorFlow add."""
    around = (
        r"\x1b\[\d*m",
        r"^Exception encountered when calling .*?\n\n",
        r"\n\nArguments received by.*",
        r"^Graph execution error:.*\n\n",
        r"\s*\[\[\{\{node.*",
    )
    text = str(error)
    for part in around:
        text = re.sub(part, "", text, flags=re.DOTALL)
    return " ".join(text.split())[:300] or type(error).__name__
