"""From a config with an `iterator` to datasets, model and iterator: EDflow's form of a config."""

import sys
from collections.abc import Mapping
from typing import Any

from engine.building import callbacks_of, refusals_named
from engine.experiment import Experiment, Splits
from engine.hooks import Hook, IntervalHook, KeepCheckpoints, LoggingHook
from engine.iterators.base import PyHookedModelIterator, TemplateIterator
from engine.iterators.datasets import ExampleBatches
from engine.iterators.ranges import splits_of
from engine.iterators.trainers import TFBaseTrainer
from vegab import UsageError, resolve


def of_iterators(config: Mapping[str, Any]) -> list[Hook]:
    """Return the hooks that a config with an iterator asks for by its keys."""
    hooks: list[Hook] = [
        IntervalHook(
            [LoggingHook(tensorboard=config["tensorboard"])],
            config["start_log_freq"],
            max_interval=config["log_freq"],
        )
    ]
    if config["ckpt_freq"]:
        hooks.append(
            KeepCheckpoints(
                config["ckpt_freq"], config["ckpt_keep"], config["monitor"], config["monitor_mode"]
            )
        )
    return hooks


# What a subclass has to write, if it inherits from none that has it.
TO_WRITE = {
    TemplateIterator: "step_op",
    TFBaseTrainer: "make_loss_ops",
    PyHookedModelIterator: "step_ops",
}


class NoModel:
    """The model of a config that names none: it does nothing."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config


def build_iterator(config: Mapping[str, Any], save_path: str | None) -> Experiment:
    """Build what a config with an iterator names; see `experiment.build`.

    Raises:
        UsageError: as `experiment.build` does.
    """
    datasets = build_datasets(config)
    model_class = resolve(config["model"], "model") if config["model"] else NoModel
    kind = iterator_class(config)  # now PyTorch is imported, if they need it
    if "torch" in sys.modules:  # the initial weights are drawn from the run's seed, too
        sys.modules["torch"].manual_seed(config["seed"])
    with refusals_named(config, "model"):
        model = model_class(config)
    iterator = make_iterator(config, kind, save_path or ".", model, datasets)
    for split in config["fixed_example_indices"]:
        with refusals_named(config, "fixed_example_indices"):
            iterator.fixed_example_indices(split)
    splits = make_splits(config, datasets)
    with refusals_named(config, splits_of(config)["train"][0]):
        first = splits.train.batch(0, 0)
    with refusals_named(config, "iterator"):
        iterator.make_variables(first)
    return Experiment(
        config=config,
        dataset=splits,
        model=model,
        monitor=config["monitor"],
        callbacks=callbacks_of(config),
        iterator=iterator,
        own_hooks=of_iterators(config),
    )


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
            raise UsageError(
                f"{key}: {name} gives a {type(dataset).__name__} without __len__; write one, which "
                "returns the number of examples"
            ) from None
        if not length:
            raise UsageError(f"{key}: {name} is empty; expected at least one example")
        datasets[split] = dataset
    return datasets


def iterator_class(config: Mapping[str, Any]) -> type[PyHookedModelIterator]:
    """Return the class that `iterator` names, which has written what it has to write itself."""
    name = config["iterator"]
    kind = resolve(name, "iterator")
    if not isinstance(kind, type) or not issubclass(kind, PyHookedModelIterator):
        raise UsageError(
            f"iterator: {name} is no iterator; inherit from one in engine/iterators/base.py"
        )
    for base, method in TO_WRITE.items():
        if issubclass(kind, base):
            if getattr(kind, method) is getattr(base, method):
                raise UsageError(
                    f"iterator: {name} has no {method}; write it, as {base.__name__} in "
                    "engine/iterators/base.py says"
                )
            break
    return kind


def make_iterator(
    config: Mapping[str, Any],
    kind: type[PyHookedModelIterator],
    root: str,
    model: Any,
    datasets: Mapping[str, Any],
) -> PyHookedModelIterator:
    """Return an iterator, made with EDflow's arguments."""
    with refusals_named(config, "iterator"):
        return kind(
            config=config,
            root=root,
            model=model,
            datasets=datasets,
            hook_freq=config["hook_freq"],
            num_epochs=config["num_epochs"] or 0,
            hooks=[],
        )


def make_splits(config: Mapping[str, Any], datasets: Mapping[str, Any]) -> Splits:
    """Return training and validation data as batches."""

    def batches(split: str, **arguments: Any) -> ExampleBatches:
        with refusals_named(config, splits_of(config)[split][0]):
            return ExampleBatches(
                datasets[split],
                seed=config["seed"],
                num_workers=config["n_data_processes"],
                **arguments,
            )

    most = config["max_batches_per_epoch"]
    return Splits(
        train=batches("train", batch_size=config["batch_size"], max_batches=most),
        valid=batches(
            "validation",
            batch_size=config["test_batch_size"] or config["batch_size"],
            shuffle=False,
        )
        if "validation" in datasets
        else None,
    )
