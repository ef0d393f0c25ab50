"""Builds data, model, optimizer and hooks from a config, and starts the training loop."""

import functools
import inspect
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from engine import building
from engine.experiment import Experiment, prepare
from vegab import UsageError, resolve

HERE = Path(__file__).parent
DEFAULT_RATE = 0.001
# Settings, with root's values, that have no effect on a model that is compiled already.
OF_COMPILING: dict[str, Any] = {
    "lr_schedule": None, "learning_rate": None, "optimizer": "adam", "optimizer_arguments": {},
    "accumulate_steps": 1, "jit_compile": False, "loss": None, "metrics": None,
}  # fmt: skip


def build(config: Mapping[str, Any], save_path: str | None = None, **asked: Any) -> Experiment:
    """Build what the config names, whatever kind of config it is. Nothing is written.

    For arguments and errors see `engine.experiment.prepare`."""
    check_ranges(config)
    return prepare(experiment_of, building.Noting(config), save_path, **asked)


def experiment_of(config: Mapping[str, Any], save_path: str | None) -> Experiment:
    """Build what a config names: read the data, build the model, compile it.

    Raises UsageError if a name leads nowhere, or what it leads to does not take this config;
    OSError if the data cannot be read."""
    if "iterator" in config:  # EDflow's kind
        from engine.iterators import build_iterator

        return build_iterator(config, save_path)
    if "train" in config:  # Deephub's kind
        from engine.records import build_variant

        return build_variant(config, save_path)

    import keras

    from engine.batches import batch_source, require_labels_in_classes
    from src.data import DATASETS, Dataset
    from src.models import CLASSIFIER, MODELS, Model

    # ---- read the data ----
    get_dataset = resolve(config["dataset"], "dataset", DATASETS)
    with building.refusals_named(config, "dataset"):
        dataset = get_dataset(config)
        if not isinstance(dataset, Dataset):
            what = f"dataset {config['dataset']!r} gives a {type(dataset).__name__}"
            hint = "or, for a dataset of examples, a config with the key 'iterator'"
            raise UsageError(f"{what}; expected a src.data.Dataset, {hint}")
        train, valid = dataset.train, dataset.valid
        train = batch_source(train, config["batch_size"], config["seed"], name="train")
        valid = batch_source(valid, shuffle=False, name="valid") if valid is not None else None
        dataset = replace(dataset, train=train, valid=valid)
        first = train.batch(0, 0)
        if dataset.num_classes is not None:
            require_labels_in_classes(dataset.num_classes, train, valid)

    # ---- build the model ----
    entry = resolve(config["model"], "model", MODELS)
    entry = entry if isinstance(entry, Model) else Model(entry)
    with building.refusals_named(config, "model"):
        model = entry.build(config, **wanted_by(entry.build, dataset, first))

    # ---- compile it, unless it is compiled already ----
    rates, first_rate = learning_rate(config)
    if model.compiled:
        if given := {key: unset for key, unset in OF_COMPILING.items() if config[key] != unset}:
            flags = (f"--{key}={json.dumps(unset)}" for key, unset in given.items())
            what = f"model {config['model']!r} compiles itself and would not see {', '.join(given)}"
            raise UsageError(f"{what}; add {' '.join(flags)}")
        rates = []
    else:
        kinds = [each for each in vars(keras.optimizers).items() if isinstance(each[1], type)]
        base = keras.optimizers.Optimizer
        optimizers = {name.lower(): kind for name, kind in kinds if issubclass(kind, base)}
        optimizer = resolve(config["optimizer"], "optimizer", optimizers)
        arguments = {"learning_rate": first_rate, **config["optimizer_arguments"]}
        if config["accumulate_steps"] > 1:
            arguments["gradient_accumulation_steps"] = config["accumulate_steps"]
        with building.refusals_named(config, "optimizer"):
            optimizer = optimizer(**arguments)
        # The settings `loss` and `metrics` replace those of the model's entry.
        loss, metrics = entry.loss, entry.metrics
        if loss is config["loss"] is None and dataset.num_classes is not None:
            loss, metrics = CLASSIFIER
        if config["loss"] is not None:
            loss = building.objects_of(config, "loss", config["loss"])
        if config["metrics"] is not None:
            metrics = building.objects_of(config, "metrics", config["metrics"])
        metrics = [metrics] if isinstance(metrics, str) else metrics
        with building.refusals_named(config, "model"):
            model.compile(optimizer, loss, metrics=metrics, jit_compile=config["jit_compile"])

    monitor = config["monitor"] if valid is not None else config["monitor"].removeprefix("val_")
    callbacks = building.callbacks_of(config)
    return Experiment(config, dataset, model, monitor or None, callbacks, learning_rates=rates)


def train(
    experiment: Experiment,
    save_path: Path,
    hooks: Sequence[Any],
    start_from: Path | None = None,
    retrain: bool = False,
) -> None:
    """Train into an existing run folder, from its latest checkpoint on if it has one.

    A new run may start from a checkpoint of another; `retrain` takes only the weights from it.
    Raises what `training_loop` does."""
    from src.training_loop import training_loop

    session = experiment.session(save_path, hooks, start_from, retrain)
    often = ("checkpoint_steps", "checkpoint_seconds", "validation_seconds")
    given = {key: experiment.settings.get(key, 0) for key in often}
    loop = functools.partial(training_loop, session, **given)
    if experiment.iterator is None:
        loop()
    else:
        experiment.iterator.iterate_by(loop, experiment.dataset.train)


def wanted_by(build_model: Any, dataset: Any, first: Any) -> dict[str, Any]:
    """Return what a model function asks for besides the config, by the names of its parameters.

    Without `input_shape` in the dataset, that of the first batch is taken. Raises ValueError if the
    function needs a number of classes that the dataset does not have."""
    import keras

    parameters = inspect.signature(build_model).parameters
    features = first[0] if isinstance(first, tuple) else first
    shape = keras.tree.map_structure(lambda array: tuple(array.shape[1:]), features)
    offered = {"input_shape": dataset.input_shape or shape, "dataset": dataset}
    if dataset.num_classes is not None:
        offered["num_classes"] = dataset.num_classes
    elif (asked := parameters.get("num_classes")) and asked.default is asked.empty:
        raise ValueError("it asks for num_classes; give the Dataset num_classes")
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    wanted = {*parameters, *(("input_shape", "num_classes") if takes_all else ())}
    return {name: value for name, value in offered.items() if name in wanted}


def check_ranges(config: Mapping[str, Any]) -> None:
    """Raise UsageError for numbers that have the right type but make no sense."""
    building.check_common_ranges(config)
    if "iterator" in config:
        from engine.iterators import check_ranges_of_iterator

        return check_ranges_of_iterator(config)
    if "train" in config:
        from engine.records import check_ranges_of_variant

        return check_ranges_of_variant(config)
    keys = ("batch_size", "num_epochs", "n_filters", "n_layers", "accumulate_steps")
    building.require_at_least_one(config, *keys)
    if config["jit_compile"] and config["deterministic"]:
        what = "jit_compile and deterministic exclude each other: there is no deterministic XLA"
        how = "add --no_deterministic (bits may then change on a GPU), or --no_jit_compile"
        raise UsageError(f"{what}; {how}")
    building.require_registered(config, "dataset", HERE / "data.py", "DATASETS")
    building.require_registered(config, "model", HERE / "models.py", "MODELS")
    num_folds, fold, rate = config["num_folds"], config["fold"], config["learning_rate"]
    is_rate = rate is None or (isinstance(rate, int | float) and rate > 0)
    for key, is_fine, expected in (
        ("checkpoint_steps", config["checkpoint_steps"] >= 0, "at least 0 (0: never)"),
        ("dropout", 0 <= config["dropout"] < 1, "at least 0 and below 1"),
        ("num_folds", num_folds == 0 or num_folds > 1, "at least 2, or 0 for none"),
        ("fold", 0 <= fold < max(num_folds, 1), f"at least 0 and below num_folds, {num_folds}"),
        ("learning_rate", is_rate, "a number above 0"),
    ):
        if not is_fine:
            raise UsageError(f"{key} is {config[key]!r}; it must be {expected}")
    if isinstance(config["lr_schedule"], list | None):  # others are made by Keras
        learning_rate(config)


def learning_rate(config: Mapping[str, Any]) -> tuple[list[tuple[int, float]], Any]:
    """Return the rates by epoch, if any, and what the optimizer starts with.

    Raises UsageError if `lr_schedule` is neither [until_epoch, rate] pairs nor a Keras schedule."""
    schedule, rate = config["lr_schedule"], config["learning_rate"]
    if schedule is None:
        return [], DEFAULT_RATE if rate is None else float(rate)
    if rate is not None:
        what = f"learning_rate is {rate} and there is an lr_schedule, {schedule}"
        raise UsageError(f"{what}; add --lr_schedule=null to train at one rate")
    if isinstance(schedule, Mapping | str):
        return [], building.learning_rate_schedule(config, "lr_schedule", schedule)
    pairs: list[tuple[int, float]] = []
    for entry in schedule if isinstance(schedule, list) else []:
        match entry:
            case [int(until), int() | float() as rate] if 0 <= rate < math.inf:
                pairs.append((until, float(rate)))
    epochs = [until for until, _ in pairs]
    if not pairs or len(pairs) != len(schedule) or epochs != sorted(set(epochs)) or epochs[0] < 1:
        example = "{class: keras.optimizers.schedules.CosineDecay, decay_steps: 1000, …}"
        raise UsageError(
            f"lr_schedule is {schedule}; expected [until_epoch, rate] with rising epochs, "
            f"such as [[3, 0.1], [6, 0.01]], or a Keras schedule, such as {example}"
        )
    return pairs, pairs[0][1]
