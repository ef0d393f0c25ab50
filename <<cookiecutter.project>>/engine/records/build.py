"""Builds feeders, model and hooks from a variant, which is Deephub's form of a config."""

import contextlib
import inspect
import logging
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from engine import hooks
from engine.batches import parts_of
from engine.building import callbacks_of, learning_rate_schedule, refusals_named
from engine.checkpoints import BEST, LATEST, is_lower_better
from engine.experiment import Experiment
from engine.hooks import Hook
from engine.records.features import class_in
from engine.records.feeders import MemorySamplesFeeder, TFRecordExamplesFeeder
from engine.records.ranges import NOTED, REFUSED, not_done
from vegab import UsageError, resolve
from vegab.config import did_you_mean, lookup

log = logging.getLogger(__name__)
FEEDERS = {kind.__name__: kind for kind in (TFRecordExamplesFeeder, MemorySamplesFeeder)}
OF_FEEDERS = ("steps_per_epoch", "total_steps", "batch", "one_pass", "until_epochs")
RECEIVER = "serving_input_receiver_fn"  # the method of Deephub's feeder by that name
EXPORTED = {"BestExporter": BEST, "FinalExporter": LATEST}
EXPORTERS = dict.fromkeys(EXPORTED, ("serving_feeder", RECEIVER))
EXPORTERS["BestCheckpointCopier"] = ("checkpoints_to_keep", "score_metric")


def build_variant(config: Mapping[str, Any], save_path: str | None = None) -> Experiment:
    """Build what a variant names; see `experiment.build`."""
    if save_path is not None:
        for sentence in not_done(config, NOTED):
            log.warning("%s", sentence)
    train = config["train"]
    train_feeder = make_feeder(config, "train.train_feeder")
    train_feeder.until_epochs = train["epochs"]
    eval_feeder = make_feeder(config, "train.eval_feeder") if train["eval_feeder"] else None
    valid = OneLabel(eval_feeder.one_pass()) if eval_feeder else None
    splits = SimpleNamespace(train=OneLabel(train_feeder), valid=valid)
    serving = getattr(train_feeder, "serving_features", lambda: None)()
    model = make_model(config, save_path or ".")
    if train["lr_schedule"] is not None:
        schedule = learning_rate_schedule(config, "train.lr_schedule", train["lr_schedule"])
        model.optimizer.learning_rate = schedule
    with refusals_named(config, "train.train_feeder"):
        features = parts_of(splits.train.batch(0, 0))["x"]
    watched = metrics_of(config)
    with refusals_named(config, "monitor"):
        is_lower_better(watched["monitor"], config["monitor_mode"])
    parts = config, splits, model, watched["monitor"], callbacks_of(config)
    own = hooks_of(config, watched) + exporters_of(config, watched, features, serving)
    changes = {
        "warm_start": train["warm_start_check_point"],
        "warm_start_vars": train["warm_start_variables_regex"],
        "fine_tune": train["fine_tune"],
        "num_epochs": None,
        "num_steps": train_feeder.total_steps(train["epochs"]),
        "checkpoint_steps": train["save_checkpoint_steps"] or 0,
        "checkpoint_seconds": train["save_checkpoint_secs"] or 0,
        "validation_seconds": train["validation_secs"] or 0,
    }
    return Experiment(*parts, own_hooks=own, serving=serving, watched=watched, changes=changes)


class OneLabel:
    """A feeder's batches; a single label loses its name, which Keras takes for an output's."""

    def __init__(self, source: Any) -> None:
        self.source = source

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)

    def batch(self, epoch: int, step: int) -> Any:
        """Return features by name, and labels, if any: one array, or several by name."""
        batch = self.source.batch(epoch, step)
        if isinstance(batch, tuple) and isinstance(batch[1], Mapping) and len(batch[1]) == 1:
            return batch[0], next(iter(batch[1].values()))
        return batch


def make_feeder(config: Mapping[str, Any], key: str) -> Any:
    """Return the feeder that stands at `key`."""
    try:
        feeder = made(config, key, FEEDERS, seed=config["seed"])
    except OSError as error:
        raise UsageError(f"{key}: {error}") from error
    if missing := [name for name in OF_FEEDERS if not hasattr(feeder, name)]:
        hint = "inherit from engine.records.feeders.Feeder, and write digest and _examples"
        raise UsageError(f"{key}: {type(feeder).__name__} has no {missing[0]}; {hint}")
    return feeder


def metrics_of(config: Mapping[str, Any]) -> dict[str, str]:
    """Return columns of the history, of validation if there is any, by the keys that name them."""
    train = config["train"]
    named = {"train.early_stopping_metric": train["early_stopping_metric"]}
    for name, entry in train["exporters"].items():
        named[f"train.exporters.{name}.score_metric"] = entry.get("score_metric")
    named["monitor"] = config["monitor"] or train["early_stopping_metric"] or "loss"
    of_validation = "val_" if train["eval_feeder"] else ""
    names = {key: str(name).removeprefix(of_validation) for key, name in named.items() if name}
    return {key: of_validation + name for key, name in names.items()}


def make_model(config: Mapping[str, Any], save_path: str) -> Any:
    """Return the compiled Keras model that `model` stands for."""
    import keras

    model = made(config, "model", {}, model_dir=save_path)
    if hasattr(model, "keras_model_fn"):
        with refusals_named(config, "model"):
            model = model.keras_model_fn()
    if not isinstance(model, keras.Model) or not model.compiled:
        name, _ = class_in(config["model"], "model")
        wanted = "a compiled Keras model, or an object whose keras_model_fn() returns one"
        raise UsageError(f"model {name} gives a {type(model).__name__}; expected {wanted}")
    return model


def made(config: Mapping[str, Any], key: str, registered: Mapping[str, Any], **more: Any) -> Any:
    """Call what the mapping at `key` names with its other entries, and what it takes of `more`."""
    name, arguments = class_in(lookup(dict(config), key), key)
    kind = resolve(name, f"{key}.type", registered)
    parameters: Mapping[str, inspect.Parameter] = {}
    with contextlib.suppress(ValueError, TypeError):  # some built-in types have no signature
        parameters = inspect.signature(kind).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for name, value in more.items():
        # What a model's ** takes are its settings.
        if name in parameters or (takes_any and name != "model_dir"):
            arguments.setdefault(name, value)
    with refusals_named(config, key):
        return kind(**arguments)


def hooks_of(config: Mapping[str, Any], watched: Mapping[str, str]) -> list[Hook]:
    """Return the hooks that a variant asks for by its keys."""
    train = config["train"]
    logs = hooks.LoggingHook(tensorboard=config["tensorboard"])
    every = hooks.IntervalHook([logs], train["save_summary_steps"])
    chosen: list[Hook] = [hooks.LastMetrics(), every]
    decrease = train["early_stopping_steps_without_decrease"]
    steps = decrease or train["early_stopping_steps_without_increase"]
    if bool(train["early_stopping_metric"]) != bool(steps):
        keys = "train.early_stopping_metric and train.early_stopping_steps_without_…"
        how = "the metric without steps stops nothing, and steps without it use the run's monitor"
        log.warning("%s: only one is given; %s", keys, how)
    if steps:
        metric = watched.get("train.early_stopping_metric", watched["monitor"])
        rule: Any = {"in_steps": True, "min_steps": train["early_stopping_min_steps"]}
        rule["every_steps"] = train["early_stopping_hook_run_every_steps"] or 1
        chosen.append(hooks.EarlyStopping(steps, metric, "min" if decrease else "max", **rule))
    return chosen


def exporters_of(
    config: Mapping[str, Any], watched: Mapping[str, str], features: Any, serving: Any
) -> list[Hook]:
    """Return a hook for each of `train.exporters`."""
    chosen: dict[str, Hook] = {}
    for word, entry in config["train"]["exporters"].items():
        key = f"train.exporters.{word}"
        path, arguments = class_in(entry, key)
        kind = path.rpartition(":")[2].rpartition(".")[2]
        if kind not in EXPORTERS:
            raise UsageError(f"{key} is a {kind}; choose one of {', '.join(EXPORTERS)}")
        folder = arguments.pop("name", word)
        known, noted = EXPORTERS[kind], [key.rpartition(".")[2] for key in (*NOTED, *REFUSED)]
        for name in arguments.keys() - {*known, *noted}:
            hint = did_you_mean(name, known) or f"; it takes {', '.join(('name', *known))}"
            raise UsageError(f"{key}: a {kind} has no {name!r}{hint}")
        if kind in EXPORTED:
            if arguments.get(RECEIVER, RECEIVER) != RECEIVER:
                raise UsageError(f"{key}.{RECEIVER} is {arguments[RECEIVER]!r}; it is {RECEIVER}")
            reader = serving
            if "serving_feeder" in arguments:
                feeder = make_feeder(config, f"{key}.serving_feeder")
                reader = getattr(feeder, "serving_features", lambda: None)()
            if not isinstance(folder, str) or not folder or Path(folder).name != folder:
                raise UsageError(f"{key} names a folder in export/; give it a single word")
            hook: Hook = hooks.Export(folder, EXPORTED[kind], features, reader)
        else:
            if folder != word:
                log.info("%s: %s is checkpoints/ here", key, folder)
            folder = "checkpoints/"
            score = watched.get(f"{key}.score_metric")
            mode = "auto" if score else config["monitor_mode"]
            try:
                is_lower_better(score, mode)
            except ValueError:
                mode = "min"  # as Deephub takes every metric
            with refusals_named(config, key):
                keep = arguments.get("checkpoints_to_keep", 5)
                hook = hooks.KeepCheckpoints(None, keep, score or watched["monitor"], mode)
        if folder in chosen:
            raise UsageError(f"{key}: another exporter writes to {folder} already")
        chosen[folder] = hook
    return list(chosen.values())
