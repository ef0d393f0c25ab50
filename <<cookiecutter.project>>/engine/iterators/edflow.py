"""Tells users of EDflow what has no effect here, and what to do instead; see `edflow.toml`."""

import logging
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.trees import leaves
from vegab import UsageError
from vegab.config import WORDS, as_text

log = logging.getLogger(__name__)
TABLE = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
IMPORTS: dict[str, str] = TABLE["imports"]


def check_keys(config: Mapping[str, Any]) -> None:
    """Note keys that nothing reads; UsageError for one that changed results in EDflow."""
    for name, instead in (TABLE["keys"] | TABLE["noted_keys"]).items():
        value: Any = config
        for part in name.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if value and value != TABLE["as_written"].get(name):
            told = f"{name}, a key of EDflow, has no effect here: {instead}"
            if name in TABLE["keys"]:
                raise UsageError(told)
            log.warning("%s", told)
    for path, word in leaves(config):
        if isinstance(word, str) and (meant := WORDS.get(word)) is not None:
            told = f"{'.'.join(map(str, path))} is the text {word}; write {as_text(meant)}"
            log.warning("%s if it is what EDflow read it as", told)


def check_arguments(owner: Any, arguments: Mapping[str, Any]) -> None:
    """Note arguments that nothing reads; TypeError for one that EDflow does not have either."""
    for name in arguments:
        if name not in TABLE["arguments"]:
            raise TypeError(f"{type(owner).__name__} has no argument {name!r}")
        if arguments[name]:
            instead = TABLE["arguments"][name]
            log.warning("%s, an argument of EDflow, has no effect here: %s", name, instead)


def check_definitions(iterator: Any, is_trainer: bool) -> None:
    """Raise a UsageError for what an iterator defines, but nothing calls or reads."""
    names = TABLE["definitions"] | (TABLE["of_trainers"] if is_trainer else {})
    for name, instead in names.items():
        if hasattr(iterator, name):
            kind = type(iterator).__name__
            what = f"iterator: {kind} has {name}, which EDflow uses and this project does not"
            raise UsageError(f"{what}: {instead}")


class NotHereError(UsageError, AttributeError):
    """An attribute is read that EDflow's iterators have, and those here do not."""


def missing(iterator: Any, name: str) -> AttributeError:
    """Return the error for an attribute that an iterator does not have."""
    kind = type(iterator).__name__
    for of in ("definitions", "of_trainers", "attributes"):
        if instead := TABLE[of].get(name):
            return NotHereError(f"{kind} has no {name}, which EDflow's iterators have: {instead}")
    return AttributeError(f"{kind} has no attribute {name!r}")
