"""Checks the numbers in a variant, before TensorFlow is imported."""

from collections.abc import Mapping
from typing import Any

from engine.building import require_at_least_one
from vegab import UsageError


def check_ranges_of_variant(config: Mapping[str, Any]) -> None:
    """See `check_ranges`."""
    train = config["train"]
    if not train["train_feeder"]:
        raise UsageError("the key 'train.train_feeder' is missing: {type: a feeder, …}")
    numbers = ("save_checkpoint_steps", "early_stopping_hook_run_every_steps")
    given = [key for key in numbers if train[key] is not None]
    steps = [f"early_stopping_steps_without_{change}" for change in ("decrease", "increase")]
    given += [key for key in steps if train[key] is not None]
    require_at_least_one(train, "epochs", "save_summary_steps", *given, section="train.")
    for one, other in (steps, ("save_checkpoint_steps", "save_checkpoint_secs")):
        if train[one] is not None and train[other] is not None:
            raise UsageError(
                f"train.{one} is {train[one]} and train.{other} is {train[other]}; give one of "
                f"them (--delete train.{other})"
            )
    for key in ("save_checkpoint_secs", "validation_secs"):
        value = train[key]
        if value is not None and (not isinstance(value, int | float) or value <= 0):
            raise UsageError(f"train.{key} is {value!r}; it must be a number of seconds above 0")
    if train["validation_secs"] and not train["eval_feeder"]:
        raise UsageError("train.validation_secs needs a train.eval_feeder to validate on")
