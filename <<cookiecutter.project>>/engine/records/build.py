"""From a variant, Deephub's form of a config, to feeders, model and hooks."""

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from engine.building import callbacks_of, learning_rate_schedule, refusals_named
from engine.checkpoints import BEST, LATEST, is_lower_better
from engine.experiment import Experiment
from engine.hooks import EarlyStopping, Export, KeepCheckpoints, LastMetrics, LoggingHook
from engine.hooks import base as hooks
from engine.records.features import class_in
from engine.records.feeders import MemorySamplesFeeder, TFRecordExamplesFeeder
from vegab import UsageError, resolve
from vegab.config import lookup

FEEDERS = {kind.__name__: kind for kind in (TFRecordExamplesFeeder, MemorySamplesFeeder)}


def build_variant(config: Mapping[str, Any]) -> Experiment:
    """Build what a variant names; see `experiment.build`."""
    train = config["train"]
    train_feeder = make_feeder(config, "train.train_feeder")
    train_feeder.until_epochs = train["epochs"]
    eval_feeder = make_feeder(config, "train.eval_feeder") if train["eval_feeder"] else None
    valid = OneLabel(eval_feeder.one_pass()) if eval_feeder else None
    splits = SimpleNamespace(train=OneLabel(train_feeder), valid=valid)
    reads_records = isinstance(train_feeder, TFRecordExamplesFeeder)
    serving = train_feeder.serving_features() if reads_records else None
    model = make_model(config)
    if train["lr_schedule"] is not None:
        model.optimizer.learning_rate = learning_rate_schedule(
            config, "train.lr_schedule", train["lr_schedule"]
        )
    with refusals_named(config, "train.train_feeder"):
        first = splits.train.batch(0, 0)
    features = first[0] if isinstance(first, tuple) else first
    monitor = config["monitor"] or train["early_stopping_metric"] or "loss"
    if eval_feeder and not monitor.startswith("val_"):
        monitor = f"val_{monitor}"
    with refusals_named(config, "monitor"):
        is_lower_better(monitor, config["monitor_mode"])
    return Experiment(
        config=config,
        dataset=splits,
        model=model,
        monitor=monitor,
        callbacks=callbacks_of(config),
        own_hooks=[
            *hooks_of(config, monitor),
            *exporters_of(config, monitor, splits.train.steps_per_epoch, features, serving),
        ],
        serving=serving,
        changes={
            "fine_tune": train["fine_tune"],
            "num_epochs": None,
            "num_steps": train_feeder.total_steps(train["epochs"]),
            "checkpoint_steps": train["save_checkpoint_steps"] or 0,
            "checkpoint_seconds": train["save_checkpoint_secs"] or 0,
            "validation_seconds": train["validation_secs"] or 0,
        },
    )


class OneLabel:
    """A feeder's batches, with the only label as it is instead of by its name. Keras takes labels
    by name only where the model's outputs have names.
    """

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
        return made(config, key, FEEDERS, seed=config["seed"])
    except OSError as error:
        raise UsageError(f"{key}: {error}") from error


def make_model(config: Mapping[str, Any]) -> Any:
    """Return the compiled Keras model that `model` stands for."""
    import keras

    model = made(config, "model", {})
    if hasattr(model, "keras_model_fn"):
        with refusals_named(config, "model"):
            model = model.keras_model_fn()
    if not isinstance(model, keras.Model) or not model.compiled:
        name, _ = class_in(config["model"], "model")
        raise UsageError(
            f"model {name} gives a {type(model).__name__}; expected a compiled Keras model, or an "
            "object whose keras_model_fn() returns one"
        )
    return model


def made(config: Mapping[str, Any], key: str, registered: Mapping[str, Any], **more: Any) -> Any:
    """Return what the mapping at `key` names, called with the mapping's other entries."""
    name, arguments = class_in(lookup(dict(config), key), key)
    kind = resolve(name, f"{key}.type", registered)
    with refusals_named(config, key):
        return kind(**arguments, **more)


def hooks_of(config: Mapping[str, Any], monitor: str) -> list[hooks.Hook]:
    """Return the hooks that a variant asks for by its keys."""
    train = config["train"]
    chosen: list[hooks.Hook] = [
        LastMetrics(),
        hooks.IntervalHook(
            [LoggingHook(tensorboard=config["tensorboard"])], train["save_summary_steps"]
        ),
    ]
    decrease = train["early_stopping_steps_without_decrease"]
    increase = train["early_stopping_steps_without_increase"]
    if decrease or increase:
        chosen.append(
            EarlyStopping(
                decrease or increase,
                monitor,
                "min" if decrease else "max",
                in_steps=True,
                min_steps=train["early_stopping_min_steps"],
                every_steps=train["early_stopping_hook_run_every_steps"] or 1,
            )
        )
    return chosen


def exporters_of(
    config: Mapping[str, Any], monitor: str, steps_per_epoch: int, features: Any, serving: Any
) -> list[hooks.Hook]:
    """Return a hook for each of `train.exporters`."""
    train = config["train"]
    chosen: list[hooks.Hook] = []
    commits = {"FinalExporter": LATEST, "BestExporter": BEST}
    for name, entry in train["exporters"].items():
        key = f"train.exporters.{name}"
        if Path(name).name != name:
            raise UsageError(f"{key} names a folder in export/; give it a single word")
        kind = class_in(entry, key)[0].rpartition(":")[2].rpartition(".")[2]
        if kind in commits:
            chosen.append(Export(name, commits[kind], features, serving))
        elif kind == "BestCheckpointCopier":
            every = train["save_checkpoint_steps"] or steps_per_epoch
            keep = entry.get("checkpoints_to_keep", 5)
            with refusals_named(config, key):
                chosen.append(KeepCheckpoints(every, keep, monitor, "min"))
        else:
            raise UsageError(
                f"{key} is a {kind}; choose BestExporter, FinalExporter or BestCheckpointCopier"
            )
    return chosen
