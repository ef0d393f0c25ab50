"""Checks the numbers in a variant, before TensorFlow is imported."""

import tomllib
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from engine.building import require_at_least_one
from vegab import UsageError

TABLE = tomllib.loads(Path(__file__).with_name("deephub.toml").read_text(encoding="utf-8"))
NOTED, REFUSED = TABLE["noted"], TABLE["refused"]


def not_done(config: Mapping[str, Any], table: Mapping[str, str]) -> Iterator[str]:
    """Give a sentence for each key of a variant that is in a part of the table."""
    train = config["train"]
    keys = [f"train.exporters.{n}.{key}" for n, each in train["exporters"].items() for key in each]
    for pattern, sentence in table.items():
        found = [key for key in (*config, *keys) if fnmatchcase(key, pattern)]
        yield from (f"{key}: this is not done here; {sentence}" for key in found)


def check_ranges_of_variant(config: Mapping[str, Any]) -> None:
    """See `check_ranges`."""
    train = config["train"]
    for key, entry in train["exporters"].items():
        if not isinstance(entry, Mapping):
            raise UsageError(f"train.exporters.{key} is {entry!r}; expected {{type: …, …}}")
    for sentence in not_done(config, REFUSED):
        raise UsageError(sentence)
    if not train["train_feeder"]:
        raise UsageError("the key 'train.train_feeder' is missing: {type: a feeder, …}")
    steps = [f"early_stopping_steps_without_{change}" for change in ("decrease", "increase")]
    may_lack = ("save_checkpoint_steps", "early_stopping_hook_run_every_steps", *steps)
    given = [key for key in may_lack if train[key] is not None]
    require_at_least_one(train, "epochs", "save_summary_steps", *given, section="train.")
    for one, other in (steps, ("save_checkpoint_steps", "save_checkpoint_secs")):
        if train[one] is not None and train[other] is not None:
            what = f"train.{one} is {train[one]} and train.{other} is {train[other]}"
            raise UsageError(f"{what}; give one of them (--delete train.{other})")
    for key in ("save_checkpoint_secs", "validation_secs"):
        value = train[key]
        if value is not None and (not isinstance(value, int | float) or value <= 0):
            raise UsageError(f"train.{key} is {value!r}; it must be a number of seconds above 0")
    if train["validation_secs"] and not train["eval_feeder"]:
        raise UsageError("train.validation_secs needs a train.eval_feeder to validate on")
