"""How fast the training loop is beside `model.fit`, Lightning and a loop written by hand.

    python benchmarks/loop.py                 # all rows; writes benchmarks/loop.txt
    python benchmarks/loop.py fit memory      # some rows; writes nothing

A figure is a ratio of a pair measured in turn in one run, so that whatever else the machine does
meets both sides. Rates come from two processes, one for each side, that train by turns for some
seconds each after a warm-up, while the other one waits at the end of an epoch. Memory, the
time to resume, and how long a signal takes come from a new process each. Our side is `bin/train.py`
as it lies in the template: history, captured output, a progress bar on a terminal that nobody looks
at, TensorBoard, a checkpoint every epoch, signals, the lock of the folder.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import fcntl
import functools
import hashlib
import importlib.util
import json
import os
import platform
import pty
import random
import runpy
import shutil
import signal
import statistics
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parent.parent
PROJECT = ROOT / "<<cookiecutter.project>>"
SCRIPT = [__file__]  # runs the sides
FOREVER = 10**6  # epochs; a side ends when the pipe to it is closed
WARM_UP = 5  # epochs

DIGITS: dict[str, Any] = {"dataset": "loop.digits", "monitor": "loss", "augmented": False}
PHOTOGRAPHS: dict[str, Any] = {"dataset": "loop.photographs", "monitor": "loss", "augmented": False}
PHOTOGRAPHS |= {"n_layers": 3, "batch_size": 128, "threads": None}
LARGE: dict[str, Any] = {
    "dataset": "loop.many_digits",
    "model": "loop.large_model",
    "monitor": "loss",
}
LARGE |= {"augmented": False, "threads": None}
MANY: dict[str, Any] = {
    "dataset": "loop.many_digits",
    "monitor": "loss",
    "augmented": False,
    "batch_size": 1,
}
TINY: dict[str, Any] = {"dataset": "loop.one_batch", "monitor": "loss", "augmented": False}
TINY |= {"n_filters": 2, "n_layers": 1}
EVERY_100: dict[str, Any] = {"class": "loop.acting_hook", "every": 100}
TEN_HOOKS = {"hooks": [EVERY_100] * 10}
TEN_IN_TURN = {"hooks": [EVERY_100 | {"first": 10 * n, "before": True} for n in range(10)]}


# ------------------------------------------------------------------------------- data and models


def digits(config: Any) -> Any:
    """Return the bundled digits without validation, which `fit` is not asked for either."""
    from src.data import get_digits

    return dataclasses.replace(get_digits(config), valid=None)


def many_digits(config: Any) -> Any:
    """Return the digits over and over: 1,100,000 examples."""
    return _repeated(config, 1_100_000)


def one_batch(config: Any) -> Any:
    """Return as many digits as a batch has."""
    return _repeated(config, config["batch_size"])


def photographs(config: Any) -> Any:
    """Return 5,120 random images of the shape of CIFAR-10's, 40 batches of 128."""
    import numpy as np

    from engine.batches import ArrayBatches
    from src.data import Dataset

    def prepare(images: Any) -> Any:
        return images.astype(np.float32) / 255

    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (5120, 32, 32, 3), np.uint8)
    labels = generator.integers(0, 10, 5120, np.uint8)
    train = ArrayBatches(images, labels, config["batch_size"], config["seed"], prepare)
    return Dataset(train, None, lambda: (images, labels), (32, 32, 3), 10)


def _repeated(config: Any, number: int) -> Any:
    import numpy as np

    from engine.batches import ArrayBatches

    dataset = digits(config)
    once = dataset.train
    images = np.resize(once.features, (number, *once.features.shape[1:]))
    labels = np.resize(once.labels, number)
    train = ArrayBatches(images, labels, config["batch_size"], config["seed"], once.prepare)
    return dataclasses.replace(dataset, train=train)


def large_model(config: Any, input_shape: tuple[int, ...], num_classes: int) -> Any:
    """Return a network with 100 MB of weights in 25 layers; Adam keeps two times as much."""
    import keras

    return keras.Sequential(
        [
            keras.Input(input_shape),
            keras.layers.Flatten(),
            *(keras.layers.Dense(1000, activation="relu") for _ in range(26)),
            keras.layers.Dense(num_classes, activation="softmax"),
        ]
    )


def acting_hook(every: int, first: int = 0, before: bool = False) -> Any:
    """Return a hook that looks at the figures of every so many steps, and perhaps at the feeds.

    Args:
        every: steps from one time to the next.
        first: the first one.
        before: whether it acts before the step as well.
    """
    from engine.hooks.base import Hook, IntervalHook

    class Looks(Hook):
        def after_step(self, global_step: int, last_results: Any) -> None:
            self.seen = float(last_results["loss"])

    class LooksBefore(Looks):
        def before_step(self, global_step: int, fetches: Any, feeds: Any, batch: Any) -> None:
            self.seen = float(feeds[0].mean())

    return IntervalHook([LooksBefore() if before else Looks()], every, first)


# ------------------------------------------------------------------------ one side, in its process


class Meter:
    """In the process of a side: trains when told to, and says how far it came.

    Args:
        orders, answers: descriptors of pipes from and to the benchmark.
    """

    def __init__(self, orders: int, answers: int) -> None:
        self.orders = open(orders)  # noqa: SIM115
        self.answers = open(answers, "w")  # noqa: SIM115
        self.epochs = self.steps = 0
        self.seconds = 0.0
        self.start = time.perf_counter()
        self.has_waited = False

    def epoch_done(self, steps: int) -> None:
        """Called by each side as an epoch ends; returns when the next one may begin."""
        self.epochs += 1
        if self.has_waited:  # an iterator of tf.data that has waited may take as long to go
            self.has_waited, self.start = False, time.perf_counter()
            return
        self.steps += steps
        elapsed = time.perf_counter() - self.start
        if self.epochs < WARM_UP or elapsed < self.seconds:
            return
        self.tell({"rate": self.steps / elapsed, "peak": memory("VmHWM")})
        order = self.orders.readline()
        if not order:
            os._exit(0)
        self.seconds, self.steps, self.has_waited = float(order), 0, True

    def tell(self, answer: Any) -> None:
        """Send an answer."""
        print(json.dumps(answer), file=self.answers, flush=True)


def memory(which: str) -> float:
    """Return this process' resident memory in MB: VmRSS now, VmHWM at most so far."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(which)) / 1024


def train_py(job: dict[str, Any], make_hook: Callable[[], Any], built: Any = None) -> None:
    """Run `bin/train.py` with a hook more, before the others."""
    from engine.experiment import Experiment
    from src import experiment

    hooks, build = Experiment.hooks, experiment.build

    def with_ours(self: Any, terminal: Any) -> Any:
        return [make_hook(), *hooks(self, terminal)]

    @functools.wraps(build)
    def and_tell(*args: Any, **kwargs: Any) -> Any:
        done = build(*args, **kwargs)
        if built is not None:
            built()
        return done

    Experiment.hooks = with_ours
    experiment.build = and_tell
    flags = [
        f"--{key}={json.dumps(value)}" if value is not False else f"--no_{key}"
        for key, value in job["config"].items()
    ]
    num_epochs = f"--num_epochs={job.get('num_epochs', FOREVER)}"
    sys.argv = [str(PROJECT / "bin/train.py"), "digits", job["folder"], num_epochs, *flags]
    runpy.run_path(sys.argv[0], run_name="__main__")


def side_ours(job: dict[str, Any], meter: Meter) -> None:
    """Train with everything on."""

    def make_hook() -> Any:
        from engine.hooks.base import Hook

        class Turns(Hook):
            def after_epoch(self, epoch: int) -> None:
                meter.epoch_done(self.run.steps_per_epoch)

        return Turns()

    train_py(job, make_hook)


def side_fit(job: dict[str, Any], meter: Meter) -> None:
    """Train by `model.fit` on a `tf.data.Dataset` whose examples are prepared beforehand."""
    import keras  # as a script does; for our programs it is imported without garbage collection
    import tensorflow as tf

    from configs import registry
    from src import experiment

    config = registry["digits"] | {"num_epochs": FOREVER} | job["config"]
    # What Keras and TensorFlow do unless one asks for something else.
    config |= {"deterministic": False, "threads": None, "jit_compile": "auto"}
    built = experiment.build(config)
    source: Any = built.dataset.train
    dataset = tf.data.Dataset.from_tensor_slices((source.prepare(source.features), source.labels))
    dataset = dataset.shuffle(len(source)).batch(source.batch_size).prefetch(tf.data.AUTOTUNE)

    class Turns(keras.callbacks.Callback):
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            meter.epoch_done(source.steps_per_epoch)

    folder = job["folder"]
    callbacks: list[Any] = [Turns()]
    if job.get("logged"):
        callbacks += [
            keras.callbacks.CSVLogger(f"{folder}/history.csv"),
            keras.callbacks.ModelCheckpoint(f"{folder}/model.keras"),
            keras.callbacks.BackupAndRestore(f"{folder}/backup"),
            keras.callbacks.TensorBoard(f"{folder}/tb"),
        ]
    verbose = "auto" if job.get("logged") else 0
    built.model.fit(dataset, epochs=FOREVER, verbose=verbose, callbacks=callbacks)


def torch_network() -> Any:
    """Return the network of `build_simple_cnn` with its defaults."""
    from torch import nn

    def block(inputs: int, outputs: int) -> list[Any]:
        convolution = nn.Conv2d(inputs, outputs, 3, padding="same", bias=False)
        return [convolution, nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2)]

    layers = [*block(1, 32), *block(32, 64), nn.Flatten(), nn.Dropout(0.2), nn.Linear(256, 10)]
    return nn.Sequential(*layers)


def torch_digits() -> Any:
    """Return the training digits as images and labels."""
    import torch

    from configs import registry

    source = digits(registry["digits"] | DIGITS).train
    images = source.prepare(source.features).transpose(0, 3, 1, 2).copy()
    return torch.from_numpy(images), torch.from_numpy(source.labels).long()


def side_torch(job: dict[str, Any], meter: Meter) -> None:
    """Train by a loop as in PyTorch's tutorial; loss and accuracy are summed up over the epoch."""
    import torch
    from torch import nn
    from torch.utils.data import DataLoader, TensorDataset

    network, data = torch_network(), TensorDataset(*torch_digits())
    optimizer, criterion = torch.optim.Adam(network.parameters()), nn.CrossEntropyLoss()
    batches: Any = DataLoader(data, batch_size=32, shuffle=True)
    for _ in range(FOREVER):
        if not job["loader"]:
            images, labels = data.tensors
            order = torch.randperm(len(data)).split(32)
            batches = [(images[rows], labels[rows]) for rows in order]
        network.train()
        loss_sum, correct = 0.0, 0
        for images, labels in batches:
            optimizer.zero_grad()
            outputs = network(images)
            loss = criterion(outputs, labels)
            loss.backward()
            optimizer.step()
            loss_sum += loss.item() * len(labels)
            correct += int((outputs.argmax(1) == labels).sum().item())
        meter.epoch_done(len(batches))


def side_lightning(job: dict[str, Any], meter: Meter) -> None:
    """Train by Lightning with its progress bar, its CSV logger and its checkpoint."""
    import lightning
    import torch
    from lightning.pytorch.loggers import CSVLogger
    from torch.utils.data import DataLoader, TensorDataset

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = torch_network()

        def training_step(self, batch: Any, index: int) -> Any:
            images, labels = batch
            outputs = self.network(images)
            loss = torch.nn.functional.cross_entropy(outputs, labels)
            accuracy = (outputs.argmax(1) == labels).float().mean()
            self.log_dict({"loss": loss, "accuracy": accuracy}, on_step=False, on_epoch=True)
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters())

    class Turns(lightning.Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            meter.epoch_done(int(trainer.num_training_batches))

    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=-1,
        callbacks=[Turns()],
        logger=CSVLogger(job["folder"]),
        default_root_dir=job["folder"],
    )
    data = TensorDataset(*torch_digits())
    trainer.fit(Module(), DataLoader(data, batch_size=32, shuffle=True))


def side_stall(job: dict[str, Any], meter: Meter) -> None:
    """Train step by step; tell what a checkpoint adds to them, and how long `model.save` takes.

    Every `job["every"]` steps comes a checkpoint. Three quarters of the way to the next one, when
    it has long been on the disk, comes the save.
    """
    every = job["every"]
    save_at, num_pairs = every * 3 // 4, job["pairs"]

    def make_hook() -> Any:
        from engine.hooks.base import Hook

        class Stall(Hook):
            def before_training(self, run: Any) -> None:
                super().before_training(run)
                self.gaps: list[float] = []
                self.saves: list[float] = []
                self.before = time.perf_counter()

            def next_step(self, global_step: int) -> int:
                return global_step + 1

            def after_step(self, global_step: int, last_results: Any) -> None:
                self.gaps.append(time.perf_counter() - self.before)
                if global_step % every == save_at:
                    path = Path(job["folder"], "saved.keras")
                    start = time.perf_counter()
                    self.run.model.save(path)
                    self.saves.append(time.perf_counter() - start)
                    path.unlink()
                if len(self.saves) == num_pairs + 2:
                    meter.tell(self.figures())
                    os._exit(0)
                self.before = time.perf_counter()

            def figures(self) -> Any:
                figures = []
                for number in range(1, num_pairs + 1):  # gaps[i] is the time of step i + 1
                    first = number * every
                    after = self.gaps[first : first + save_at]
                    ordinary = statistics.median(after[save_at // 2 :])
                    disturbed = after[: save_at // 2]
                    figures.append(
                        {
                            "stall": after[0] - ordinary,
                            "cost": sum(disturbed) - ordinary * len(disturbed),
                            "save": self.saves[number],
                            "step": ordinary,
                        }
                    )
                return figures

        return Stall()

    train_py(job, make_hook)


def side_stop(job: dict[str, Any], meter: Meter) -> None:
    """Train ten steps and stop by SIGTERM."""

    def make_hook() -> Any:
        from engine.hooks.base import Hook

        class Stop(Hook):
            def next_step(self, global_step: int) -> int | None:
                return 10 if global_step < 10 else None

            def after_step(self, global_step: int, last_results: Any) -> None:
                if global_step == 10:
                    os.kill(os.getpid(), signal.SIGTERM)

        return Stop()

    train_py(job, make_hook)


def side_signalled(job: dict[str, Any], meter: Meter) -> None:
    """Train until a signal comes; tell once how long a step and a checkpoint take."""
    from engine.checkpoints.checkpoint import Checkpoint

    taken: dict[str, list[float]] = {"snapshot": [], "_write": []}

    def timed(name: str) -> Any:
        function = getattr(Checkpoint, name)

        @functools.wraps(function)
        def and_timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = function(*args, **kwargs)
            taken[name].append(time.perf_counter() - start)
            return result

        return and_timed

    for name in taken:
        setattr(Checkpoint, name, timed(name))

    def make_hook() -> Any:
        from engine.hooks.base import Hook

        class Ready(Hook):
            def before_epoch(self, epoch: int) -> None:
                self.start = time.perf_counter()

            def after_epoch(self, epoch: int) -> None:
                if epoch == job["after"]:
                    commit = sum(statistics.median(values) for values in taken.values())
                    seconds = time.perf_counter() - self.start
                    meter.tell({"step": seconds / self.run.steps_per_epoch, "commit": commit})

        return Ready()

    train_py(job, make_hook)


def side_move(job: dict[str, Any], meter: Meter) -> None:
    """Move a stopped run to another step of its epoch, as if it had trained until there."""
    import h5py

    from engine.checkpoints.file import SIGNATURE, TEXT, USER_BLOCK

    path = Path(job["folder"], "model.h5")
    with h5py.File(path, "r+") as file:
        state = json.loads(file[TEXT][()])
        state["step"] = state["global_step"] = job["step"]
        del file[TEXT]
        file[TEXT] = json.dumps(state)
    content = path.read_bytes()[USER_BLOCK:]
    head = SIGNATURE + hashlib.sha256(content).hexdigest().encode()
    path.write_bytes(head.ljust(USER_BLOCK, b"\0") + content)


def side_resume(job: dict[str, Any], meter: Meter) -> None:
    """Resume; tell the time from when data and model are there to the end of the first step."""
    start = 0.0

    def built() -> None:
        nonlocal start
        start = time.perf_counter()

    def make_hook() -> Any:
        from engine.hooks.base import Hook

        class First(Hook):
            def next_step(self, global_step: int) -> int:
                return global_step + 1

            def after_step(self, global_step: int, last_results: Any) -> None:
                meter.tell({"seconds": time.perf_counter() - start, "step": global_step})
                os._exit(0)

        return First()

    train_py(job, make_hook, built)


def side_epochs(job: dict[str, Any], meter: Meter) -> None:
    """Train many tiny epochs; tell how long they took, and what the process held."""
    # Until then, steps and snapshots are made as a short run makes them, which is slower.
    first, num_epochs = (110, 210), job["num_epochs"]

    def make_hook() -> Any:
        from engine.hooks.base import Hook

        class Watch(Hook):
            def before_training(self, run: Any) -> None:
                super().before_training(run)
                self.ends: list[float] = []
                self.held: list[Any] = []

            def after_epoch(self, epoch: int) -> None:
                self.ends.append(time.perf_counter())
                if epoch + 1 in (first[1], num_epochs):
                    files = len(os.listdir("/proc/self/fd"))
                    self.held.append({"files": files, "memory": memory("VmRSS")})

            def after_training(self) -> None:
                seconds = [
                    after - before
                    for before, after in zip(self.ends[:-1], self.ends[1:], strict=True)
                ]
                answer = {
                    "first": statistics.median(seconds[first[0] - 1 : first[1] - 1]),
                    "last": statistics.median(seconds[-100:]),
                    "held": self.held,
                    "seconds": sum(seconds),
                }
                meter.tell(answer)

        return Watch()

    train_py(job, make_hook)


SIDES = {name.removeprefix("side_"): value for name, value in globals().items() if "side_" in name}


# ------------------------------------------------------------------------------- the benchmark


class Side:
    """A process of its own that does a job, on a terminal that nobody looks at.

    Args:
        name: of a function `side_…`.
        job: what it is given, "folder" excepted.
        folder: for its files; it does not exist yet.
    """

    def __init__(self, name: str, job: dict[str, Any], folder: Path) -> None:
        orders, self._orders = os.pipe()
        self._answers, answers = os.pipe()
        self._terminal, terminal = pty.openpty()
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
        self.name = name
        text = json.dumps(job | {"folder": str(folder)})
        pipes = (orders, answers)
        self.process = subprocess.Popen(
            [sys.executable, *SCRIPT, "--side", name, text, *map(str, pipes)],
            stdin=subprocess.DEVNULL,
            stdout=terminal,
            stderr=terminal,
            pass_fds=pipes,
            start_new_session=True,
            env=os.environ | {"TERM": "xterm", "TF_CPP_MIN_LOG_LEVEL": "1"},
        )
        for number in (*pipes, terminal):
            os.close(number)
        self.output: collections.deque[bytes] = collections.deque(maxlen=200)
        self._reader = threading.Thread(target=self._read_terminal, daemon=True)
        self._reader.start()
        self._lines = open(self._answers)  # noqa: SIM115

    def _read_terminal(self) -> None:
        try:
            while data := os.read(self._terminal, 65536):
                self.output.append(data)
        except OSError:  # the other end is closed
            pass

    def answer(self) -> Any:
        """Wait for the next answer."""
        line = self._lines.readline()
        if not line:
            self.fail()
        return json.loads(line)

    def fail(self) -> NoReturn:
        """End the benchmark with what the process wrote last."""
        self._reader.join(5)
        text = b"".join(self.output).decode(errors="replace")[-4000:]
        sys.exit(f"{text}\n{self.name} ended with {self.process.wait()} and without an answer")

    def train(self, seconds: float) -> float:
        """Let it train for so long, and return steps a second."""
        os.write(self._orders, f"{seconds}\n".encode())
        return self.answer()["rate"]

    def close(self) -> int:
        """Let the process end, and return its exit code."""
        os.close(self._orders)
        try:
            return self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()
        finally:
            self._lines.close()
            self._reader.join(5)
            os.close(self._terminal)


@contextmanager
def side(name: str, job: dict[str, Any], folder: Path | None = None) -> Iterator[Side]:
    """Start a side in a new folder, which goes away with it unless it is given."""
    with tempfile.TemporaryDirectory(prefix="loop-") as new:
        started = Side(name, job, folder or Path(new, "run"))
        try:
            yield started
        finally:
            started.close()


@dataclasses.dataclass
class Figures:
    """What a row of the table says: ratios of pairs, and what they were made of."""

    ratios: list[float]
    note: str


def spread(values: list[float], form: str = ".2f") -> str:
    """Return the median and, in brackets, the least and the most."""
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def in_turn(
    ours: dict[str, Any],
    name: str,
    theirs: dict[str, Any],
    pairs: int,
    seconds: float = 3.0,
    examples: int = 1,
) -> Figures:
    """Return our steps a second over theirs, both trained by turns."""
    rates: tuple[list[float], list[float]] = ([], [])
    with side("ours", {"config": ours}) as first, side(name, theirs) as second:
        sides = (first, second)
        for one in sides:
            one.answer()  # the warm-up
        for number in range(-1, pairs):
            for index in (0, 1) if number % 2 else (1, 0):
                rate = sides[index].train(seconds) * examples
                if number >= 0:  # the first turn of each is a warm-up too
                    rates[index].append(rate)
    ratios = [our / their for our, their in zip(*rates, strict=True)]
    medians = " : ".join(f"{statistics.median(rate):.0f}" for rate in rates)
    return Figures(ratios, f"{medians} {'steps/s' if examples == 1 else 'images/s'}")


def peak_memory(config: dict[str, Any], pairs: int) -> Figures:
    """Return our peak of resident memory over that of `fit`, each in new processes."""
    peaks: dict[str, list[float]] = {"ours": [], "fit": []}
    for _ in range(pairs):
        for name, values in peaks.items():
            with side(name, {"config": config}) as process:
                process.answer()
                os.write(process._orders, b"3\n")
                values.append(process.answer()["peak"])
    ratios = [our / their for our, their in zip(*peaks.values(), strict=True)]
    note = " : ".join(f"{statistics.median(values):.0f}" for values in peaks.values())
    return Figures(ratios, f"{note} MB")


@functools.cache
def commits(pairs: int) -> list[dict[str, float]]:
    """Return what checkpoints of the 100 MB model cost, and saves of it between them."""
    config = LARGE | {"checkpoint_steps": 40}
    with side("stall", {"config": config, "every": 40, "pairs": pairs}) as process:
        return process.answer()


def commit_over_save(which: str, pairs: int) -> Figures:
    """Return what a checkpoint takes from the training over the time of `model.save`."""
    figures = commits(pairs)
    medians = {key: statistics.median(row[key] for row in figures) for key in figures[0]}
    return Figures(
        [row[which] / row["save"] for row in figures],
        f"{medians[which]:.2f} : {medians['save']:.2f} s; a step takes {medians['step']:.3f} s",
    )


def resume(pairs: int) -> Figures:
    """Return the time to the first step at 1,000,000 over that at 10, each in new processes."""
    seconds: dict[int, list[float]] = {1_000_000: [], 10: []}
    with tempfile.TemporaryDirectory(prefix="loop-") as name:
        stopped = Path(name, "stopped")
        process = Side("stop", {"config": MANY}, stopped)
        if process.process.wait() != 75:
            process.fail()
        process.close()
        for number in range(-1, pairs):
            for step, values in seconds.items():
                folder = Path(name, "run")
                shutil.copytree(stopped, folder)
                with side("move", {"step": step}, folder) as process:
                    if process.process.wait() != 0:
                        process.fail()
                with side("resume", {"config": MANY}, folder) as process:
                    answer = process.answer()
                if answer["step"] != step + 1:
                    sys.exit(f"resumed at step {answer['step'] - 1}, not at {step}")
                if number >= 0:
                    values.append(answer["seconds"])
                shutil.rmtree(folder)
    ratios = [late / early for late, early in zip(*seconds.values(), strict=True)]
    note = " : ".join(f"{statistics.median(values):.2f}" for values in seconds.values())
    return Figures(ratios, f"{note} s")


def signalled(pairs: int) -> Figures:
    """Return the time from a signal to the process' end over a step, 100 ms and a checkpoint."""
    chance = random.Random(0)
    rows = []
    for _ in range(pairs):
        with side("signalled", {"config": DIGITS, "after": 20}) as process:
            row = process.answer()
            time.sleep(chance.uniform(0, 1))
            start = time.perf_counter()
            process.process.send_signal(signal.SIGTERM)
            if process.process.wait() != 75:
                process.fail()
            rows.append(row | {"end": time.perf_counter() - start})
    allowed = [row["step"] + 0.1 + row["commit"] for row in rows]
    medians = {key: 1000 * statistics.median(row[key] for row in rows) for key in rows[0]}
    return Figures(
        [row["end"] / limit for row, limit in zip(rows, allowed, strict=True)],
        f"{medians['end']:.0f} ms; a step takes {medians['step']:.1f} ms, a checkpoint "
        f"{medians['commit']:.0f} ms",
    )


def epochs(num_epochs: int, runs: int) -> Figures:
    """Return the rate of the last 100 tiny epochs over that of the first 100 after a warm-up."""
    answers = []
    for _ in range(runs):
        with side("epochs", {"config": TINY, "num_epochs": num_epochs}) as process:
            answers.append(process.answer())
    last = statistics.median(answer["last"] for answer in answers)
    first = statistics.median(answer["first"] for answer in answers)
    before, after = answers[-1]["held"]
    return Figures(
        [answer["first"] / answer["last"] for answer in answers],
        f"{num_epochs} epochs; {last * 1000:.1f} : {first * 1000:.1f} ms; "
        f"{after['files']} : {before['files']} open files; "
        f"{after['memory']:.0f} : {before['memory']:.0f} MB",
    )


def bfloat16(pairs: int) -> Figures | str:
    """Return images a second in mixed_bfloat16 over those in float32."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        flags = ""
    if "amx_bf16" not in flags:
        return "not measured: this CPU has no AMX"
    ours = PHOTOGRAPHS | {"precision": "mixed_bfloat16"}
    return in_turn(ours, "ours", {"config": PHOTOGRAPHS}, pairs, 6, 128)


def needs(package: str, measure: Callable[[], Figures]) -> Figures | str:
    """Measure if the package is installed."""
    if importlib.util.find_spec(package) is None:
        return f"not measured: needs {package}"
    return measure()


@dataclasses.dataclass
class Row:
    """A row of the table: what it says, its limit, and how it is measured."""

    text: str
    limit: str
    measure: Callable[[argparse.Namespace], Figures | str]


SMALL = "small model, steps/s:"
ROWS = {
    "fit": Row(
        f"{SMALL} everything on / bare model.fit",
        ">= 2.5",
        lambda a: in_turn(DIGITS, "fit", {"config": DIGITS}, a.pairs),
    ),
    "fit_logged": Row(
        f"{SMALL} everything on / model.fit with CSVLogger, ModelCheckpoint, BackupAndRestore, "
        "TensorBoard",
        ">= 3.3",
        lambda a: in_turn(DIGITS, "fit", {"config": DIGITS, "logged": True}, a.pairs),
    ),
    "lightning": Row(
        f"{SMALL} everything on / Lightning with its CSV logger and checkpoint",
        ">= 4",
        lambda a: needs("lightning", lambda: in_turn(DIGITS, "lightning", {}, a.pairs)),
    ),
    "torch": Row(
        f"{SMALL} everything on / plain PyTorch loop over a DataLoader",
        ">= 1.4",
        lambda a: needs("torch", lambda: in_turn(DIGITS, "torch", {"loader": True}, a.pairs)),
    ),
    "torch_tensors": Row(
        f"{SMALL} everything on / plain PyTorch loop over slices of two tensors",
        "",
        lambda a: needs("torch", lambda: in_turn(DIGITS, "torch", {"loader": False}, a.pairs)),
    ),
    "cifar": Row(
        "CIFAR-shaped CNN, batch 128, images/s: everything on / bare model.fit",
        ">= 1.0",
        lambda a: in_turn(PHOTOGRAPHS, "fit", {"config": PHOTOGRAPHS}, a.pairs, 6, 128),
    ),
    "bfloat16": Row(
        "CIFAR-shaped CNN, images/s: mixed_bfloat16 / float32",
        ">= 2.5",
        lambda a: bfloat16(a.pairs),
    ),
    "stall": Row(
        "100 MB model: stall of the training by a checkpoint / time of model.save to .keras",
        "<= 0.25",
        lambda a: commit_over_save("stall", a.pairs),
    ),
    "stall_and_after": Row(
        "100 MB model: the stall and what the steps after it lose / time of model.save",
        "",
        lambda a: commit_over_save("cost", a.pairs),
    ),
    "commits": Row(
        f"{SMALL} a checkpoint every 10 steps / a checkpoint every epoch (40 steps)",
        ">= 0.9",
        lambda a: in_turn(DIGITS | {"checkpoint_steps": 10}, "ours", {"config": DIGITS}, a.pairs),
    ),
    "hooks": Row(
        f"{SMALL} with ten hooks that each act every 100 steps / without them",
        ">= 0.95",
        lambda a: in_turn(DIGITS | TEN_HOOKS, "ours", {"config": DIGITS}, a.pairs),
    ),
    "hooks_before": Row(
        f"{SMALL} the same, before and after a step, and no two of them at the same step",
        "",
        lambda a: in_turn(DIGITS | TEN_IN_TURN, "ours", {"config": DIGITS}, a.pairs),
    ),
    "signals": Row(
        "small model, from SIGTERM to the process's end with 75 / a step, 100 ms and a checkpoint",
        "<= 1",
        lambda a: signalled(a.pairs),
    ),
    "memory": Row(
        "small model, peak of memory: everything on / bare model.fit",
        "<= 1.15",
        lambda a: peak_memory(DIGITS, a.pairs),
    ),
    "memory_cifar": Row(
        "CIFAR-shaped CNN, peak of memory: everything on / bare model.fit",
        "<= 1.15",
        lambda a: peak_memory(PHOTOGRAPHS, a.pairs),
    ),
    "resume": Row(
        "time to the first new step: resumed at step 1,000,000 / at step 10",
        "<= 1.05",
        lambda a: resume(a.pairs),
    ),
    "epochs": Row(
        "tiny epochs, rate: the last 100 / the first 100 (after 110)",
        ">= 0.95",
        lambda a: epochs(a.epochs, a.runs),
    ),
}


def line(row: Row, figures: Figures | str) -> str:
    """Return a row as text."""
    if isinstance(figures, str):
        return f"{row.text}\n    {figures}"
    said = ""
    if row.limit:
        comparison, limit = row.limit.split()
        median = statistics.median(figures.ratios)
        reached = median >= float(limit) if comparison == ">=" else median <= float(limit)
        said = f"  {row.limit}: {'reached' if reached else 'NOT REACHED'}"
    number = len(figures.ratios)
    return f"{row.text}\n    {spread(figures.ratios)}, {number} pairs{said}  [{figures.note}]"


def heading(packages: Sequence[str], note: str = "") -> str:
    """Return what was measured, and on what."""
    from importlib.metadata import PackageNotFoundError, version

    versions = []
    for package in packages:
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return (
        f"Python {platform.python_version()}, {', '.join(versions)}\n"
        f"on {platform.machine()}, {os.cpu_count()} cores, {platform.system()}; the "
        f"machine was shared with other work{note and f'; {note}'}.\n"
        "Ratio: median (least to most) of pairs measured in turn; in brackets, the medians of both "
        "sides."
    )


def print_and_keep(
    parser: argparse.ArgumentParser,
    asked: Sequence[str],
    rows: Mapping[str, Callable[[], str]],
    head: str,
    name: str,
) -> None:
    """Measure rows, print each as it comes, and keep them in `<name>.txt` if they are all."""
    if unknown := set(asked) - set(rows):
        parser.error(f"no row {', '.join(sorted(unknown))}; there are {', '.join(rows)}")
    text = head
    print(text, flush=True)
    for row in asked or rows:
        told = rows[row]()
        print(f"\n{told}", flush=True)
        text += f"\n\n{told}"
    if not asked:
        (ROOT / "benchmarks" / f"{name}.txt").write_text(f"{text}\n")


def main() -> None:
    """Measure rows, print them, and keep them beside this file if they are all."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("rows", nargs="*", help=f"{', '.join(ROWS)}; none: all")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--epochs", type=int, default=10_000, help="of the row `epochs`")
    parser.add_argument("--runs", type=int, default=1, help="of the row `epochs`")
    args = parser.parse_args()
    head = heading(("tensorflow", "tensorflow-cpu", "keras", "torch", "lightning"))
    rows = {name: functools.partial(measured, row, args) for name, row in ROWS.items()}
    print_and_keep(parser, args.rows, rows, head, "loop")


def measured(row: Row, args: argparse.Namespace) -> str:
    """Return what there is to say of a row, which is measured."""
    return line(row, row.measure(args))


def be_side() -> bool:
    """Be the side that the command line names, if it names one."""
    sys.path.insert(0, str(PROJECT))
    if sys.argv[1:2] != ["--side"]:
        return False
    name, job, *pipes = sys.argv[2:]
    SIDES[name](json.loads(job), Meter(*map(int, pipes)))
    return True


if __name__ == "__main__" and not be_side():
    main()
