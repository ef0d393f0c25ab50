"""What `bin/check_resume.py` looks at: suspects in model, data and callbacks."""

import inspect
import os
import random
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from engine.checkpoints import callback_state
from engine.hooks import Hook
from src import experiment

GENERATORS = (np.random.Generator, np.random.RandomState, random.Random, tf.random.Generator)


class KillAt(Hook):
    """Kills the process after a step, so that nothing has a chance to tidy up."""

    def __init__(self, global_step: int) -> None:
        self.global_step = global_step

    def next_step(self, global_step: int) -> int | None:
        """The step to die at, if it is still to come."""
        return self.global_step if global_step < self.global_step else None

    def after_step(self, global_step: int, last_results: Mapping[str, float]) -> None:
        """Die, if this is the step."""
        if global_step == self.global_step:
            os.kill(os.getpid(), signal.SIGKILL)


def train(
    config: Mapping[str, Any], save_path: Path, kill_at: int, output: Path | None = None
) -> None:
    """Train as `bin/train.py` does, and die after `kill_at` steps.

    Args:
        config: the resolved config.
        save_path: a folder, made where it is missing.
        kill_at: steps since the run began; 0: live.
        output: where all that is written goes; None: where it went before.
    """
    if output is not None:
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for number in (1, 2):
            os.dup2(file, number)
    save_path.mkdir(exist_ok=True)
    prepared = experiment.build(config, str(save_path)).with_work(allow_inexact=True)
    experiment.train(prepared, save_path, [*prepared.hooks(None), KillAt(kill_at)])


def survey(config: Mapping[str, Any]) -> tuple[int, list[str]]:
    """Return the steps of an epoch, and a phrase for each thing that is known to break the promise.

    Each says where that is.
    """
    first = experiment.build(config).with_work(allow_inexact=True)
    second = experiment.build(config)
    assert first.work is not None
    found = [f"no checkpoint holds {name}" for name in first.work.guard.found]
    found += [
        f"the state of the callback {type(callback).__name__} is not saved "
        f"({place(type(callback))}); give it get_state() and set_state(state)"
        for callback in first.callbacks
        if not callback_state.is_known(callback)
    ]
    for layer in layers_of(first.model):
        for name, value in vars(layer).items():
            if isinstance(value, GENERATORS):
                found.append(
                    f"{getattr(layer, 'name', 'the model')} has a generator of its own, {name} "
                    f"({place(type(layer))}); use keras.random with a SeedGenerator"
                )
    steps_per_epoch = first.dataset.train.steps_per_epoch
    step = steps_per_epoch - 1
    for number in range(step):
        first.dataset.train.batch(0, number)
    straight, direct = first.dataset.train.batch(0, step), second.dataset.train.batch(0, step)
    if _bytes(straight) != _bytes(direct):
        found.append(
            f"the data is not a function of position: the last batch of an epoch is another when "
            f"it is asked for directly ({place(dataset_function(config))})"
        )
    return steps_per_epoch, found


def layers_of(model: Any) -> list[Any]:
    """Return a Keras model and all its layers; any other model alone."""
    layers = model._flatten_layers(include_self=False) if isinstance(model, keras.Model) else []
    return [model, *layers]


def place(thing: Any) -> str:
    """Return the file and line where a class or function begins."""
    try:
        return f"{Path(inspect.getfile(thing)).name}, line {inspect.getsourcelines(thing)[1]}"
    except (OSError, TypeError):
        return "its source is not to be found"


def dataset_function(config: Mapping[str, Any]) -> Any:
    """Return the function or class that a config's `dataset` names, or `datasets.train`."""
    from src.data import DATASETS
    from vegab import resolve

    name = config["dataset"] or config["datasets"]["train"]
    return resolve(name, "dataset", DATASETS)


def _bytes(batch: Any) -> bytes:
    return b"".join(np.asarray(part).tobytes() for part in keras.tree.flatten(batch))
