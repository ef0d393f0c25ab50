"""Trains and kills for `bin/check_resume.py`, and looks for suspects in model, data, callbacks."""

import inspect
import os
import random
import signal
import traceback
from collections.abc import Callable, Mapping
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from vegab import resolve

# Keras is imported where it is used: bin/check_resume.py does without, its processes have it.

NOT_SAVED = "which no checkpoint holds"  # a warning says


def train(
    experiment: tuple[Callable[..., Any], Callable[..., None]],
    config: Mapping[str, Any],
    save_path: Path,
    kill_at: int,
    output: Path,
    is_quick: bool = False,
) -> None:
    """Train by the functions `build` and `train`, and die after `kill_at` steps, unless that is 0;
    quick: an epoch has two steps, and the model is evaluated."""
    import keras

    from engine.hooks import Hook
    from engine.training import Validation

    class KillAt(Hook):
        """Kills the process, so that nothing has a chance to tidy up."""

        def next_step(self, global_step: int) -> int | None:
            return kill_at if global_step < kill_at else None

        def after_step(self, global_step: int, last_results: Mapping[str, float]) -> None:
            if global_step == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in (1, 2):
        os.dup2(file, number)
    save_path.mkdir(exist_ok=True)
    build, run = experiment
    prepared = build(config, str(save_path))
    if is_quick:
        parts = {name: first_steps(getattr(prepared.dataset, name)) for name in ("train", "valid")}
        prepared = replace(prepared, dataset=SimpleNamespace(**{**vars(prepared.dataset), **parts}))
    prepared = prepared.with_work(allow_inexact=True)
    run(prepared, save_path, [*prepared.hooks(None), KillAt()])
    if is_quick and prepared.iterator is None:
        prepared = build(config, str(save_path), trains=False)
        prepared.load(save_path / "model.h5")
        load_test = getattr(prepared.dataset, "load_test", lambda: prepared.dataset.valid)
        try:
            test = load_test()
        except ValueError as error:  # there may be no test set
            return print(error)
        nobody = keras.callbacks.CallbackList()
        Validation(prepared.model, first_steps(test)).run(nobody, stop=lambda: False)


def first_steps(data: Any) -> Any:
    """Return the first two batches of what `batch_source` takes."""
    from engine.batches import batch_source

    if data is None:
        return None
    source = batch_source(data, shuffle=False)
    return SimpleNamespace(batch=source.batch, steps_per_epoch=min(source.steps_per_epoch, 2))


def send_survey(sender: Connection, *arguments: Any) -> None:
    """Send what `survey` returns, or what it raises, with the traceback."""
    try:
        sender.send(survey(*arguments))
    except Exception as error:
        error.add_note(traceback.format_exc())
        sender.send(error)


def survey(
    build: Callable[..., Any], datasets: Mapping[str, Any], config: Mapping[str, Any]
) -> tuple[int, list[str]]:
    """Return the steps of an epoch, and a phrase for each thing that breaks the promise."""
    import keras
    import numpy as np

    from engine.training import walk

    generators = (np.random.Generator, np.random.RandomState, random.Random)
    first = build(config).with_work(allow_inexact=True)
    second = build(config)
    assert first.work is not None
    found = [f"no checkpoint holds {name}" for name in first.work.guard.found]
    # A step that is compiled draws from these once, as it is traced.
    is_traced = first.iterator is None and not first.model.run_eagerly
    for path, thing, *_ in walk({"model": first.model}) if is_traced else ():
        if isinstance(thing, generators):
            found.append(f"{path} is a generator of Python's or NumPy's; use keras.random")
    sources = [built.dataset.train for built in (first, second, second)]
    steps_per_epoch = sources[0].steps_per_epoch
    step = steps_per_epoch - 1
    for number in range(step):
        sources[0].batch(0, number)
    batches = [keras.tree.flatten(source.batch(0, step)) for source in sources]
    if len({b"".join(np.asarray(part).tobytes() for part in batch) for batch in batches}) > 1:
        name = config["dataset"] or config["datasets"]["train"]
        where = place(resolve(name, "dataset", datasets))
        what = "the last batch of an epoch differs when it is asked for directly, or twice"
        found.append(f"the data is not a function of position: {what} ({where})")
    return steps_per_epoch, found


def place(thing: Any) -> str:
    """Return the file and line where a class or function begins."""
    try:
        return f"{Path(inspect.getfile(thing)).name}, line {inspect.getsourcelines(thing)[1]}"
    except (OSError, TypeError):
        return "its source is not to be found"
