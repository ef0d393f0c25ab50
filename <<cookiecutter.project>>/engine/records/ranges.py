"""Checks the numbers in a variant, before TensorFlow is imported."""

from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

from engine.building import require_at_least_one
from vegab import UsageError

REFUSED, NOTED = "refused", "noted"
# What a variant of Deephub may say and this project does not do: refused where results would be
# others, noted where they are the same.
NOT_DONE: dict[str, tuple[str, str]] = {
    "predict": (
        NOTED,
        "no command reads it; bin/evaluate.py RUN writes predictions for train.eval_feeder",
    ),
    "train.exporters.*.exports_to_keep": (
        NOTED,
        "one export is kept, for each takes the place of the one before it",
    ),
    "train.exporters.*.event_file_pattern": (
        NOTED,
        "the best epoch is found in the run's history, not in event files",
    ),
    "train.exporters.*.as_text": (NOTED, "a SavedModel is written in its binary form only"),
    "train.exporters.*.assets_extra": (
        REFUSED,
        "nothing is added to an export; leave it out, and copy files there after training",
    ),
    "train.exporters.*.compare_fn": (
        REFUSED,
        "BestExporter goes by monitor and monitor_mode, BestCheckpointCopier by score_metric; "
        "leave it out",
    ),
    "train.exporters.*.sort_key_fn": (
        REFUSED,
        "checkpoints are ranked by score_metric; leave it out",
    ),
    "train.exporters.*.sort_reverse": (
        REFUSED,
        "whether less or more is better goes by the name of score_metric; leave it out",
    ),
}
EARLY_STOPPING = (
    "train.early_stopping_metric",
    "of it and early_stopping_steps_without_… only one is given: the steps alone stop by the "
    "run's monitor, which Deephub did not; the metric alone stops nothing",
)


def not_done(config: Mapping[str, Any], what: str) -> Iterator[tuple[str, str]]:
    """Give the keys of a variant that `NOT_DONE` says are `what`, each with its sentence."""
    train = config["train"]
    keys = [f"train.exporters.{n}.{key}" for n, each in train["exporters"].items() for key in each]
    for pattern, (kind, sentence) in NOT_DONE.items():
        found = [key for key in (*config, *keys) if fnmatchcase(key, pattern)]
        yield from ((key, sentence) for key in found if kind == what)
    steps = [f"early_stopping_steps_without_{change}" for change in ("decrease", "increase")]
    if what == NOTED and bool(train["early_stopping_metric"]) != any(train[key] for key in steps):
        yield EARLY_STOPPING


def check_ranges_of_variant(config: Mapping[str, Any]) -> None:
    """See `check_ranges`."""
    train = config["train"]
    for key, entry in train["exporters"].items():
        if not isinstance(entry, Mapping):
            raise UsageError(f"train.exporters.{key} is {entry!r}; expected {{type: …, …}}")
    for key, sentence in not_done(config, REFUSED):
        raise UsageError(f"{key}: {sentence}")
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
