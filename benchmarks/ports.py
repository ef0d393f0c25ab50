"""How fast ports of Keras scripts train, next to plain `model.fit` of the same data and model.

    python benchmarks/ports.py               # all rows; writes benchmarks/ports.txt
    python benchmarks/ports.py lengths       # some rows; writes nothing

The ports are those of `tests/ports`. Rates are measured as in `loop.py`: two processes train by
turns after a warm-up, ours by `bin/train.py` with everything on. `first_epoch` has the time that
tracing takes in it, and comes from a new process each.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import loop
from loop import FOREVER, Figures, Meter, Row, in_turn, side

sys.path.append(str(loop.ROOT / "tests" / "ports"))
EPOCH = 30  # batches
loop.WARM_UP = 20  # epochs: our first 100 steps are made singly, and many are compiled after them
COMMON: dict[str, Any] = {"dataset": "ports.data", "monitor": "loss", "lr_schedule": None}
COMMON |= {"threads": None}


# ------------------------------------------------------------------------------- data and models


def data(config: Any) -> Any:
    """Return what the port that the config's model names trains on, without validation."""
    from src.data import Dataset

    port = importlib.import_module(config["model"].partition(":")[0])
    return Dataset(port.data(config).train)


def long_weather(config: Any) -> Any:
    """Return ten times as much weather, 160 steps an epoch: what a function makes anew for each."""
    import weather

    weather.WEATHER = weather.load_weather(15_000)
    return data(config)


def slow_reading(config: Any) -> Any:
    """Return a PyDataset with four workers, each of whose batches takes 20 ms to read."""
    import segmentation

    from src.data import Dataset

    class Slow(segmentation.Shapes):
        def __getitem__(self, index: int) -> Any:
            time.sleep(0.02)
            return super().__getitem__(index)

    return Dataset(Slow(EPOCH, 0, workers=4))


def lengths(config: Any) -> Any:
    """Return 30 padded batches of 16 spectrograms and texts, each batch of another length."""
    import ctc
    import numpy as np
    import tensorflow as tf

    from src.data import Dataset

    def batches() -> Any:
        for number in range(EPOCH):
            generator = np.random.default_rng(number)
            letters = generator.integers(1, ctc.NUM_LETTERS + 1, (16, 4 + number // 5))
            frames = np.repeat(letters, 6, axis=1)[:, : 20 + number]
            yield ctc.SOUNDS[frames].astype("float32"), letters.astype("int32")

    signature = tf.TensorSpec((None, None, ctc.NUM_BANDS)), tf.TensorSpec((None, None), tf.int32)
    padded = tf.data.Dataset.from_generator(batches, output_signature=signature)
    return Dataset(lambda epoch, seed: padded)


# ------------------------------------------------------------------------ one side, in its process


def fit(job: dict[str, Any], at_epoch_end: Callable[[int], None]) -> None:
    """Train by `model.fit`; call a function with the steps of each epoch that ends."""
    import keras  # as a script does; for our programs it is imported without garbage collection

    from configs import registry
    from src import experiment
    from vegab import resolve

    config = registry["root"] | {"num_epochs": FOREVER} | job["config"]
    # What Keras and TensorFlow do unless one asks for something else.
    config |= {"deterministic": False}
    built = experiment.build(config)
    num_steps = built.dataset.train.steps_per_epoch
    train = resolve(config["dataset"], "dataset")(config).train
    if not isinstance(train, tuple | keras.utils.PyDataset):
        train = train(0, config["seed"])
    arguments = dict(zip(("x", "y", "sample_weight"), train, strict=False))
    if not isinstance(train, tuple):
        arguments = {"x": train}

    class Turns(keras.callbacks.Callback):
        def on_train_begin(self, logs: Any = None) -> None:
            at_epoch_end(0)

        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            at_epoch_end(num_steps)

    size = config["batch_size"] if isinstance(train, tuple) else None
    built.model.fit(**arguments, batch_size=size, epochs=FOREVER, verbose=0, callbacks=[Turns()])


def side_fit_port(job: dict[str, Any], meter: Meter) -> None:
    """Train by `model.fit`, by turns."""
    fit(job, lambda num_steps: meter.epoch_done(num_steps) if num_steps else None)


class FirstEpoch:
    """Tells how long the first epoch takes, once data and model are there, and ends the process."""

    def __init__(self, meter: Meter) -> None:
        self.meter = meter

    def begin(self) -> None:
        """Called when data and model are there."""
        self.start = time.perf_counter()

    def end(self, *_: Any) -> None:
        """Called when the epoch ends."""
        self.meter.tell(time.perf_counter() - self.start)
        os._exit(0)


def side_first_ours(job: dict[str, Any], meter: Meter) -> None:
    """Train an epoch by `bin/train.py`."""
    first = FirstEpoch(meter)

    def make_hook() -> Any:
        from engine.hooks.base import Hook

        class Ends(Hook):
            def after_epoch(self, epoch: int) -> None:
                first.end()

        return Ends()

    loop.train_py(job, make_hook, first.begin)


def side_first_fit(job: dict[str, Any], meter: Meter) -> None:
    """Train an epoch by `model.fit`."""
    first = FirstEpoch(meter)
    fit(job, lambda num_steps: first.end() if num_steps else first.begin())


loop.SIDES |= {
    "fit_port": side_fit_port,
    "first_ours": side_first_ours,
    "first_fit": side_first_fit,
}


# ----------------------------------------------------------------------------------- the benchmark


def rates(args: argparse.Namespace, model: str, is_compiled: bool = True, **config: Any) -> Figures:
    """Return our steps a second over those of `fit`."""
    config = COMMON | {"model": model} | config
    theirs = config if is_compiled else config | {"jit_compile": "auto"}  # as Keras compiles
    return in_turn(config, "fit_port", {"config": theirs}, args.pairs)


def first_epoch(args: argparse.Namespace, **config: Any) -> Figures:
    """Return the seconds of the first epoch by `fit` over ours, each in a new process."""
    seconds: dict[str, list[float]] = {"first_fit": [], "first_ours": []}
    for _ in range(args.pairs):
        for name, values in seconds.items():
            with side(name, {"config": COMMON | config}) as process:
                values.append(process.answer())
    theirs, ours = seconds.values()
    note = f"{statistics.median(ours):.1f} : {statistics.median(theirs):.1f} s"
    return Figures([their / our for our, their in zip(ours, theirs, strict=True)], note)


WEATHER = {"dataset": "ports.long_weather", "loss": "mse", "metrics": []}
LENGTHS: dict[str, Any] = {"dataset": "ports.lengths", "model": "ctc:build"}
ROWS = {
    "transformer": Row("arrays, a transformer", ">= 1.0", lambda a: rates(a, "transformer:build")),
    "many_outputs": Row(
        "dictionaries of arrays with sample weights, two LSTMs, two outputs",
        ">= 1.0",
        lambda a: rates(a, "many_outputs:build", is_compiled=False),
    ),
    "weather": Row(
        "tf.data, an LSTM",
        ">= 1.0",
        lambda a: rates(a, "weather:build", is_compiled=False, **WEATHER),
    ),
    "diffusion": Row(
        "tf.data, a diffusion model with a step of its own",
        ">= 1.0",
        lambda a: rates(a, "diffusion:build", monitor="n_loss"),
    ),
    "workers": Row(
        "PyDataset with four workers, 20 ms to read a batch, a U-Net",
        ">= 1.0",
        lambda a: rates(a, "segmentation:build", dataset="ports.slow_reading"),
    ),
    "lengths": Row(
        "padded batches of 30 lengths, Conv1D, GRU and CTC",
        ">= 1.0",
        lambda a: rates(a, **LENGTHS),
    ),
    "first_epoch": Row(
        "the same, time of the first epoch: model.fit / everything on",
        ">= 1.0",
        lambda a: first_epoch(a, **LENGTHS),
    ),
}


def main() -> None:
    """Measure rows, print them, and keep them beside this file if they are all."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("rows", nargs="*", help=f"{', '.join(ROWS)}; none: all")
    parser.add_argument("--pairs", type=int, default=7)
    args = parser.parse_args()
    head = loop.heading(("tensorflow", "tensorflow-cpu", "keras"), "steps/s: everything on / fit")
    rows = {name: functools.partial(loop.measured, row, args) for name, row in ROWS.items()}
    loop.print_and_keep(parser, args.rows, rows, head, "ports")


if __name__ == "__main__":
    loop.SCRIPT[:] = [__file__]
    if not loop.be_side():
        main()
