"""From a config to data, model, hooks and callbacks: what every command in `bin` needs."""

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.devices import gpus as devices
from engine.devices import workers
from engine.training import fingerprint
from vegab import UsageError, resolve

if TYPE_CHECKING:
    pass
from engine.building import (
    call,
    callbacks_of,
    check_common_ranges,
    hooks_of,
    learning_rate_schedule,
    require_at_least_one,
)
from engine.experiment import Experiment, inexactness, prepare_process
from engine.iterators import check_ranges_of_iterator
from engine.records import check_ranges_of_variant

DEFAULT_RATE = 0.001


def build(
    config: Mapping[str, Any],
    save_path: str | None = None,
    resume_inexact: bool = False,
    start: Path | None = None,
    together: bool = False,
    trains: bool = True,
) -> Experiment:
    """Import, read and build what the config names. Nothing is written.

    Args:
        config: the resolved config, of any kind.
        save_path: the run folder; what its commit says of threads and the like is taken over.
        resume_inexact: go on where the bits of an uninterrupted run cannot be had any more.
        start: a commit of another run to go on from; then these are taken over from there, unless
            the config says otherwise.
        together: train with the other workers that the environment names; see
            `engine.devices`.
        trains: whether the hooks that the config names are needed.

    Raises:
        UsageError: if a value is out of range, a name leads nowhere, or the run in `save_path`
            could not be resumed exactly.
        OSError: if the data cannot be read.
        SystemExit: with code 75, if other workers do not come, or are gone.
    """
    check_ranges(config)
    stored, settings = prepare_process(config, save_path, start)
    from engine.training import guard

    if "iterator" in config and together and workers.worker().number > 1:
        raise UsageError("a config with an iterator trains in one process; unset TF_CONFIG")
    with devices.scope(together) as several, guard.noting_lines():
        if several is not None:
            from engine.devices import replicas

            replicas.make_seed_generator()
        if "iterator" in config:
            if several is not None:
                raise UsageError("a config with an iterator trains on one GPU; give --gpus one")
            from engine.iterators import build_iterator

            built = build_iterator(config, save_path)
        elif "train" in config:
            from engine.records import build_variant

            built = build_variant(config)
        else:
            built = build_compiled(config)
    strategy = getattr(built.model, "distribute_strategy", None)
    all_workers = workers.Workers(strategy)
    if all_workers.num_replicas > 1:
        replicas.prepare(built.model)
    # Made now, so that their code counts, and what the config names wrongly is refused.
    config_hooks = hooks_of(config) if trains else []
    now = fingerprint.take(config, settings, built.dataset, all_workers.layout)
    shown = {key: json.dumps(value, sort_keys=True) for key, value in now.items()}
    all_workers.require_same(shown, "and would not make the same updates")
    inexact = inexactness(stored, now, save_path, resume_inexact)
    return replace(built, fingerprint=now, inexact=inexact, config_hooks=config_hooks)


def build_compiled(config: Mapping[str, Any]) -> Experiment:
    """Build what a config of root's kind names; see `build`.

    Raises:
        UsageError, OSError: as `build` does.
    """
    import keras

    from engine.batches import batch_source
    from src.data import DATASETS, Dataset
    from src.models import MODELS

    dataset = call(config, "dataset", resolve(config["dataset"], "dataset", DATASETS), config)
    if not isinstance(dataset, Dataset):
        raise UsageError(
            f"dataset {config['dataset']!r} gives a {type(dataset).__name__}; expected a "
            "src.data.Dataset, or, for a dataset of examples, a config with the key 'iterator'"
        )
    source = call(config, "dataset", batch_source, dataset.train, config["seed"])
    dataset = replace(dataset, train=source)
    model = call(
        config,
        "model",
        resolve(config["model"], "model", MODELS),
        config,
        input_shape=dataset.input_shape,
        num_classes=dataset.num_classes,
    )
    learning_rates, first_rate = learning_rate(config)
    if model.compiled:
        refuse_what_is_compiled(config)
        learning_rates = None
    else:
        optimizers = {
            name.lower(): value
            for name, value in vars(keras.optimizers).items()
            if isinstance(value, type) and issubclass(value, keras.optimizers.Optimizer)
        }
        optimizer = resolve(config["optimizer"], "optimizer", optimizers)
        accumulate_steps = config["accumulate_steps"]
        accumulation = (
            {"gradient_accumulation_steps": accumulate_steps} if accumulate_steps > 1 else {}
        )
        model.compile(
            optimizer=call(
                config,
                "optimizer",
                optimizer,
                learning_rate=first_rate,
                **accumulation,
                **config["optimizer_arguments"],
            ),
            loss="sparse_categorical_crossentropy",
            metrics=["accuracy"],
            jit_compile=config["jit_compile"],
        )
    from engine.checkpoints import is_lower_better
    from engine.training import floats, make_variables

    monitor = config["monitor"]
    if dataset.valid is None:
        monitor = monitor.removeprefix("val_")
    # A first batch shows whether model and data fit, before anything is written.
    first, fine_tune = dataset.train.batch(0, 0), config["fine_tune"]
    metrics = floats(call(config, "model", make_variables, model, first, fine_tune))
    if monitor.startswith("val_") and monitor.removeprefix("val_") not in metrics:
        raise UsageError(
            f"monitor is {config['monitor']!r}; choose one of {', '.join(sorted(metrics))}, "
            "or one with val_ before it"
        )
    call(config, "monitor", is_lower_better, monitor, config["monitor_mode"])
    return Experiment(
        config=config,
        dataset=dataset,
        model=model,
        learning_rates=learning_rates,
        monitor=monitor,
        callbacks=callbacks_of(config),
    )


def check_ranges(config: Mapping[str, Any]) -> None:
    """Refuse numbers that have the right type and make no sense.

    Raises:
        UsageError: naming the key, the value and what it may be.
    """
    check_common_ranges(config)
    if "iterator" in config:
        check_ranges_of_iterator(config)
    elif "train" in config:
        check_ranges_of_variant(config)
    else:
        check_ranges_of_compiled(config)


def check_ranges_of_compiled(config: Mapping[str, Any]) -> None:
    """See `check_ranges`."""
    require_at_least_one(
        config, "batch_size", "num_epochs", "n_filters", "n_layers", "accumulate_steps"
    )
    if config["jit_compile"] and config["deterministic"]:
        raise UsageError(
            "jit_compile and deterministic exclude each other, for TensorFlow has no deterministic "
            "XLA; add --no_deterministic (bits may then change on a GPU), or --no_jit_compile"
        )
    if config["checkpoint_steps"] < 0:
        raise UsageError(
            f"checkpoint_steps is {config['checkpoint_steps']}; it must be at least 0 (0: never)"
        )
    if not 0 <= config["dropout"] < 1:
        raise UsageError(f"dropout is {config['dropout']}; it must be at least 0 and below 1")
    num_folds, fold = config["num_folds"], config["fold"]
    if num_folds < 0 or num_folds == 1:
        raise UsageError(f"num_folds is {num_folds}; it must be at least 2, or 0 for none")
    if not 0 <= fold < max(num_folds, 1):
        raise UsageError(f"fold is {fold}; it must be at least 0 and below num_folds, {num_folds}")
    rate = config["learning_rate"]
    if rate is not None and (not isinstance(rate, int | float) or not rate > 0):
        raise UsageError(f"learning_rate is {rate!r}; it must be a number above 0")


def learning_rate(config: Mapping[str, Any]) -> tuple[list[tuple[int, float]] | None, Any]:
    """Return the rates by epoch, if any, and what the optimizer starts with.

    Raises:
        UsageError: if `lr_schedule` is neither a list of [until_epoch, rate] nor a Keras schedule.
    """
    schedule, rate = config["lr_schedule"], config["learning_rate"]
    if schedule is None:
        return None, DEFAULT_RATE if rate is None else float(rate)
    if rate is not None:
        raise UsageError(
            f"learning_rate is {rate} and there is an lr_schedule, {schedule}; "
            "add --lr_schedule=null to train at one rate"
        )
    if isinstance(schedule, Mapping | str):
        return None, learning_rate_schedule(config, "lr_schedule", schedule)
    pairs = (
        [
            (pair[0], float(pair[1]))
            for pair in schedule
            if isinstance(pair, list)
            and len(pair) == 2
            and isinstance(pair[0], int)
            and isinstance(pair[1], int | float)
            and math.isfinite(pair[1])
            and pair[1] >= 0
        ]
        if isinstance(schedule, list)
        else []
    )
    epochs = [until for until, _ in pairs]
    if not pairs or len(pairs) != len(schedule) or epochs != sorted(set(epochs)) or epochs[0] < 1:
        raise UsageError(
            f"lr_schedule is {schedule}; expected a list of [until_epoch, rate] with rising "
            "epochs, such as [[3, 0.1], [6, 0.01]], or a Keras schedule, such as "
            "{class: keras.optimizers.schedules.CosineDecay, initial_learning_rate: 0.1, "
            "decay_steps: 1000}"
        )
    return pairs, pairs[0][1]


def refuse_what_is_compiled(config: Mapping[str, Any]) -> None:
    """Refuse learning rates for a model that has compiled itself, with an optimizer of its own.

    Raises:
        UsageError: naming the settings.
    """
    given = [key for key in ("lr_schedule", "learning_rate") if config[key] is not None]
    if given:
        raise UsageError(
            f"model {config['model']!r} compiles itself and would not see {', '.join(given)}; "
            f"add {' '.join(f'--{key}=null' for key in given)}"
        )
