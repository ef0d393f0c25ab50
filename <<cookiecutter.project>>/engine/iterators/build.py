"""Builds datasets, model and iterator from a config with an `iterator`, which is EDflow's form."""

import inspect
import logging
import sys
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from engine.building import callbacks_of, refusals_named
from engine.experiment import Experiment
from engine.hooks import Hook, IntervalHook, KeepCheckpoints, LoggingHook
from engine.iterators import edflow, evaluation, outputs
from engine.iterators.base import PyHookedModelIterator, TemplateIterator
from engine.iterators.datasets import ExampleBatches
from engine.iterators.ranges import splits_of
from engine.iterators.trainers import TFBaseTrainer
from engine.training import guard
from vegab import UsageError, resolve

log = logging.getLogger(__name__)


class NoModel:
    """The model of a config that names none: it does nothing."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config


def build_iterator(config: Mapping[str, Any], save_path: str | None) -> Experiment:
    """Build what a config with an iterator names; see `experiment.build`."""
    datasets = build_datasets(config)
    make_model = resolve(config["model"], "model") if config["model"] else NoModel
    make_iterator = iterator_class(config)  # now PyTorch is imported, if they need it
    if "torch" in sys.modules:  # the initial weights are drawn from the run's seed, too
        sys.modules["torch"].manual_seed(config["seed"])
    with guard.noting_torch():
        with refusals_named(config, "model"):
            model = make_model(config)
        with refusals_named(config, "iterator"):
            numbers = {"hook_freq": config["hook_freq"], "num_epochs": config["num_epochs"] or 0}
            given: dict[str, Any] = {"config": config, "model": model, "datasets": datasets}
            iterator = make_iterator(root=save_path or ".", **given, **numbers, hooks=[])
            edflow.check_definitions(iterator, isinstance(iterator, TFBaseTrainer))
    with refusals_named(config, "fixed_example_indices"):
        for split in config["fixed_example_indices"]:
            if split in datasets:
                iterator.fixed_example_indices(split)
            else:
                log.warning("fixed_example_indices has %s, which is not a split of datasets", split)
    splits = make_splits(config, datasets)
    with refusals_named(config, splits_of(config)["train"][0]):
        first = splits.train.batch(0, 0)
    with refusals_named(config, "iterator"):
        iterator.make_variables(first)
    import keras

    own = getattr(iterator, "model", None)  # it may make its model itself
    model = own if isinstance(own, keras.Model) else model
    parts = config, splits, model, config["monitor"], callbacks_of(config)
    hooks = of_iterators(config, iterator, splits.valid)
    return Experiment(*parts, iterator=iterator, own_hooks=hooks)


def build_datasets(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the datasets by split: of `datasets`, or of `dataset` and `validation_dataset`."""
    splits = splits_of(config)
    if "train" not in splits:
        raise UsageError(f"datasets has {', '.join(splits)}; expected at least train")
    datasets = {}
    for split, (key, name) in splits.items():
        make_dataset = resolve(name, key)
        with refusals_named(config, key):
            dataset = make_dataset(config)
        try:
            length = len(dataset)
        except TypeError:
            what = f"{key}: {name} gives a {type(dataset).__name__} without __len__"
            raise UsageError(f"{what}; write one, which returns the number of examples") from None
        if not length:
            raise UsageError(f"{key}: {name} is empty; expected at least one example")
        datasets[split] = dataset
    return datasets


def iterator_class(config: Mapping[str, Any]) -> type[PyHookedModelIterator]:
    """Return the class that `iterator` names, if it defines the methods that it has to."""
    name = config["iterator"]
    kind = resolve(name, "iterator")
    if not isinstance(kind, type) or not issubclass(kind, PyHookedModelIterator):
        hint = "inherit from one in engine.iterators"
        raise UsageError(f"iterator: {name} is not an iterator; {hint}")
    own = inspect.unwrap(kind.iterate)
    if own is not PyHookedModelIterator.iterate and "iterate" not in own.__code__.co_names:
        how = "call super().iterate(batches) there, or say in step_ops what a step does"
        raise UsageError(f"iterator: {name} has a loop of its own in iterate; {how}")
    for method in dir(kind):
        if getattr(getattr(kind, method, None), "__isabstractmethod__", False):
            told = "write it, as its base class in engine/iterators says"
            raise UsageError(f"iterator: {name} has no {method}; {told}")
    return kind


def make_splits(config: Mapping[str, Any], datasets: Mapping[str, Any]) -> SimpleNamespace:
    """Return training and validation data as batches."""
    size, most = config["batch_size"], config["max_batches_per_epoch"]
    shared = {"seed": config["seed"], "num_workers": config["n_data_processes"]}
    train, valid = ExampleBatches(datasets["train"], size, max_batches=most, **shared), None
    if "validation" in datasets:
        size = config["test_batch_size"] or size
        valid = ExampleBatches(datasets["validation"], size, shuffle=False, **shared)
    return SimpleNamespace(train=train, valid=valid)


def of_iterators(config: Mapping[str, Any], iterator: Any, valid: Any) -> list[Hook]:
    """Return the hooks of a config with an iterator: by its keys, and to evaluate after epochs."""
    ops = {} if config.get("log_ops") is None else {"log_ops": config["log_ops"]}
    logs = LoggingHook(**ops, tensorboard=config["tensorboard"])
    first, most = config["start_log_freq"], config["log_freq"]
    hooks: list[Hook] = [IntervalHook([logs], first, max_interval=most)]
    if every := config["ckpt_freq"]:
        monitor = config["monitor"], config["monitor_mode"]
        hooks.append(KeepCheckpoints(every, config["ckpt_keep"], *monitor))
    if isinstance(iterator, TemplateIterator) and valid is not None:  # as EDflow's
        callbacks = outputs.callbacks_of(config, iterator, iterator.model)
        hooks.append(evaluation.EvaluateEpochs(config, valid, *callbacks))
    return hooks
