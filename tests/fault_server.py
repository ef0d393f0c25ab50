"""A process with the libraries imported, which forks one process for each attempt at a run.

Started by `fault_lab.Server` in a generated project; it reads a JSON request a line and answers
with one. Nothing of TensorFlow runs before the fork, so that an attempt is as good as a fresh
process. What is to go wrong in it is done here, to the real program, by a real signal.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import io
import json
import os
import random
import runpy
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path.cwd()))

import keras
import matplotlib.pyplot
import numpy as np
import tensorflow as tf
from keras.src.random.seed_generator import global_seed_generator

import vegab
from engine.checkpoints import checkpoint
from engine.devices import gpus as devices
from engine.devices import workers
from engine.hooks import base as hooks
from engine.iterators import build as iterator_experiment
from engine.iterators import steps as iterator_steps
from engine.training import sources, steps
from engine.training.signals import SignalsToFlag
from src import data, experiment, models, training_loop
from src.examples import iterators as examples

SHIM_MODES = {"count": 0, "kill": 1, "tear": 2, "fail": 3, "record": 4}

assert keras and data and examples and experiment and hooks and iterator_experiment and matplotlib
assert models and vegab


def serve() -> None:
    """Answer requests until there are no more."""
    # What every attempt would read and make again, and what no fault is planted in.
    sources.digests({"names": ["src.fault_models", "src.fault_iterators", "engine.iterators"]})
    matplotlib.pyplot.figure().savefig(io.BytesIO())
    matplotlib.pyplot.close()
    gc.freeze()  # an attempt need not look at what is here already
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            pid, status = os.waitpid(request["wait"], os.WNOHANG)
            answer = {"code": os.waitstatus_to_exitcode(status) if pid else None}
        else:
            answer = {"pid": os.fork()}
            if answer["pid"] == 0:
                attempt(**request)
        print(json.dumps(answer), flush=True)


def attempt(
    words: list[str],
    output: str,
    process_seed: int,
    faults: list[dict[str, Any]],
    shim: dict[str, Any] | None,
    most_steps: int | None,
    exhaust: dict[str, Any] | None,
    processors: int,
    environment: dict[str, str],
) -> None:
    """Be a process that runs `words`, and never return."""
    code = 1
    try:
        for number, path in enumerate([os.devnull, output, output]):
            os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666), number)
        os.setsid()
        for number in SignalsToFlag.SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.stdin = os.fdopen(0, closefd=False)
        sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
        sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
        sys.argv = words
        os.environ |= environment
        workers.SECONDS_OF_SILENCE = 5
        if processors > 1:
            several = [tf.config.LogicalDeviceConfiguration()] * processors
            (processor,) = tf.config.list_physical_devices("CPU")
            tf.config.set_logical_device_configuration(processor, several)
            devices.device_names = lambda: [f"CPU:{number}" for number in range(processors)]
        sow(process_seed)
        # So that both ways to make a step meet every fault.
        steps.Steps.FIRST_STEPS = 13
        if most_steps:
            steps.Steps.MOST_STEPS = most_steps
        for fault in faults:
            plant(output=output, **fault)
        if shim:
            plant_shim(**shim)
        if exhaust:
            plant_every_error(**exhaust)
        runpy.run_path(words[0], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def sow(process_seed: int) -> None:
    """Give every generator of the process a state of its own just before a resume restores.

    Whatever is not in the commit then differs from the run that was never stopped.
    """
    restore = checkpoint.Checkpoint.restore

    @functools.wraps(restore)
    def seeded(self: Any, *groups: Any) -> None:
        random.seed(process_seed)
        np.random.seed(process_seed)
        global_seed_generator().state.assign([process_seed, process_seed])
        for variable in self.model.variables if self.model is not None else []:
            if "seed" in variable.path:
                variable.assign(np.full(variable.shape, process_seed))
        restore(self, *groups)

    checkpoint.Checkpoint.restore = seeded


PLACES: dict[str, tuple[Any, str]] = {
    "step": (steps.Steps, "run"),
    "snapshot": (checkpoint.Checkpoint, "snapshot"),
    "commit": (checkpoint.Checkpoint, "_write"),
    "views": (checkpoint.Checkpoint, "_write_views"),
    "validation": (steps.Validation, "run"),
    "iterator_step": (iterator_steps.IteratorSteps, "run"),
    "iterator_validation": (iterator_steps.IteratorValidation, "run"),
    "read": (checkpoint.Checkpoint, "read"),
    "restore": (checkpoint.Checkpoint, "restore"),
    "training": (training_loop, "training_loop"),
}


def plant(
    output: str, at: str, call: int = 1, when: str = "before", delay: float = 0, number: int = 9
) -> None:
    """Have a signal sent before, `delay` seconds into, or after the `call`-th call of a function.

    The file `output`.signal tells that it was sent; `output`.steps has a line for each call of
    steps: how many it ran, and whether it began after the signal.
    """
    left, is_struck, is_due = call, False, float("inf")
    struck = threading.Event()

    def strike() -> None:
        nonlocal is_struck
        Path(f"{output}.signal").touch()
        is_struck = True
        os.kill(os.getpid(), number)
        struck.set()

    def noted(run_steps: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(run_steps)
        def run(self: Any, epoch: int, step: int, *args: Any, **kwargs: Any) -> Any:
            if time.monotonic() > is_due:
                struck.wait()  # on a busy machine, the thread that strikes may come late
            is_later = is_struck
            result = run_steps(self, epoch, step, *args, **kwargs)
            with open(f"{output}.steps", "a") as file:
                file.write(f"{result.step - step} {int(is_later)}\n")
            return result

        return run

    for kind in (steps.Steps, iterator_steps.IteratorSteps):
        kind.run = noted(kind.run)
    owner, name = PLACES[at]
    function = getattr(owner, name)

    @functools.wraps(function)
    def faulty(*args: Any, **kwargs: Any) -> Any:
        nonlocal left, is_due
        left -= 1
        now = left == 0
        if now and when == "before":
            strike()
        if now and when == "in":
            threading.Timer(delay, strike).start()
            is_due = time.monotonic() + delay
        result = function(*args, **kwargs)
        if now and when == "after":
            strike()
        return result

    setattr(owner, name, faulty)


def plant_shim(
    folder: str, mode: str, call: int = 0, commit: int = 0, error: int = 0, trace: str = ""
) -> None:
    """Have the `call`-th system call on the run folder go wrong, counted within one commit.

    `commit` 0: counted from the start of the process.
    """
    library = ctypes.CDLL(None)
    library.fault_arm.argtypes = (
        [ctypes.c_char_p, ctypes.c_int, ctypes.c_long, ctypes.c_int, ctypes.c_char_p]
    )  # fmt: skip
    arm = functools.partial(
        library.fault_arm, folder.encode(), SHIM_MODES[mode], call, error, trace.encode()
    )
    if commit == 0:
        arm()
        return
    write: Callable[..., None] = checkpoint.Checkpoint._write
    left = commit

    def counted(*args: Any) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            arm()
        try:
            write(*args)
        finally:
            library.fault_disarm()

    checkpoint.Checkpoint._write = counted


def plant_every_error(folder: str, commit: int, errors: list[int], report: str) -> None:
    """Before the `commit`-th commit succeeds, have it fail in every way at every system call.

    What came of each goes into the JSON file `report`: [errno, call, what was raised, whether there
    is a whole commit, the old or the new one].
    """
    library = ctypes.CDLL(None)
    library.fault_calls.restype = ctypes.c_long
    write: Callable[..., None] = checkpoint.Checkpoint._write
    left = commit

    def wreck(self: Any, *args: Any) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            found = []
            before = Path(folder, "model.h5").read_bytes()
            after = bytes(self._layout.put_together(args[0]))
            for error in errors:
                for call in range(1, 1000):
                    raised = None
                    library.fault_arm(folder.encode(), SHIM_MODES["fail"], call, error, b"")
                    try:
                        write(self, *args)
                    except BaseException as problem:
                        raised = f"{type(problem).__name__}: {problem}"
                    calls = library.fault_calls()
                    library.fault_disarm()
                    good = checkpoint.latest_good(Path(folder))
                    whole = good and good.read_bytes() in (before, after)
                    found.append([error, call, raised, bool(whole)])
                    if calls < call:
                        break  # there was no such call: all were tried
            Path(report).write_text(json.dumps(found))
        write(self, *args)

    checkpoint.Checkpoint._write = wreck


if __name__ == "__main__":
    serve()
