"""Starts the trials of a sweep on this machine, as many at a time as are asked for."""

import math
import multiprocessing
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.connection import wait
from pathlib import Path
from types import ModuleType
from typing import Any

from engine.devices import gpus as devices
from vegab import ROOT, UsageError
from vegab.provenance import usable_cores

SECONDS_BETWEEN = 0.5


class Launcher:
    """Runs command lines of `bin/train.py`, and touches the disk no sooner than in `run`.

    Attributes:
        outputs: folder for what they say until their run folder is open.
        num_parallel: how many a search may run at a time, where the command does not say.
    """

    outputs: Path
    num_parallel = 8  # on a cluster, whose room changes

    def adopted(self) -> set[str]:
        """Return the names of the commands that go on, begun by a launcher that is gone.

        `run` watches them where they are among its own.
        """
        return set()

    def said(self, name: str) -> str:
        """Return the last line that a command wrote before its run folder was open."""
        try:
            lines = (self.outputs / f"{name}.txt").read_text(errors="replace").strip().splitlines()
        except OSError:
            lines = []
        return lines[-1] if lines else f"{name} ended before it said anything"


class LocalLauncher(Launcher):
    """Runs command lines of `bin/train.py`, each in a process that is forked with all imported.

    Raises UsageError if `gpus` names none, or has no room for as many.

    Args:
        jobs: how many at a time, at least 1; None: as many as there is room for.
        gpus: to share out, in the form of `bin/train.py --gpus`; "": none in particular.
        per_gpu: trials at a time on each of them.
        threads: of each; None: one a core.
        outputs: folder for what they say until their run folder is open.
        is_stopped: whether to stop; those that run are then told to commit and end.
    """

    def __init__(
        self,
        jobs: int | None,
        gpus: str,
        per_gpu: int,
        threads: int | None,
        outputs: Path,
        is_stopped: Callable[[], bool],
    ) -> None:
        self.places = places_of(jobs, gpus, per_gpu, threads)
        self.num_parallel = len(self.places)
        self.is_shared = bool(gpus) and per_gpu > 1
        self.outputs = outputs
        self.is_stopped = is_stopped
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        os.environ["PYTHONPATH"] = os.pathsep.join(paths)
        self._processes = multiprocessing.get_context("forkserver")
        self._processes.set_forkserver_preload(["engine.sweeps.trial"])

    def run(
        self,
        commands: Mapping[str, Sequence[str]],
        tell: Callable[[Sequence[str], Mapping[str, int]], Mapping[str, Sequence[str]]],
    ) -> dict[str, int]:
        """Run commands by name until all have ended, or `is_stopped` says so.

        Args:
            commands: words after the program's name.
            tell: called with the names that run and the exit codes of those that have ended,
                whenever one begins or ends, and twice a second; returns commands that may now
                begin, too.

        Returns:
            The exit codes by name; minus the number of a signal, if that ended it. What was not
            begun has none.
        """
        self.outputs.mkdir(exist_ok=True)
        waiting = deque(commands)
        free = deque(self.places)
        running: dict[str, Any] = {}
        held: dict[str, str] = {}
        codes: dict[str, int] = {}
        is_told = False
        while running or (waiting and not self.is_stopped()):
            while waiting and free and not self.is_stopped():
                name = waiting.popleft()
                held[name] = free.popleft()
                running[name] = self._start(name, commands[name], held[name])
            if more := tell(list(running), codes):
                commands = {**commands, **more}
                waiting.extend(more)
                continue
            wait([process.sentinel for process in running.values()], SECONDS_BETWEEN)
            if self.is_stopped() and not is_told:
                is_told = True
                for process in running.values():
                    if process.is_alive():
                        os.kill(process.pid, signal.SIGTERM)
            for name in [name for name, process in running.items() if not process.is_alive()]:
                process = running.pop(name)
                process.join()
                codes[name] = process.exitcode
                free.append(held.pop(name))
        tell([], codes)
        return codes

    def _start(self, name: str, words: Sequence[str], gpu: str) -> Any:
        output = self.outputs / f"{name}.txt"
        output.unlink(missing_ok=True)
        arguments = (list(words), str(output), gpu, self.is_shared)
        process = self._processes.Process(target=_run, args=arguments)
        # TensorFlow tells of itself when the fork server imports it.
        with _nothing_said(), _without_program():
            process.start()
        return process


def places_of(jobs: int | None, gpus: str, per_gpu: int, threads: int | None) -> list[str]:
    """Return the GPU of each trial that runs at a time, "" for none; see `LocalLauncher`."""
    devices.choose_gpus(gpus)
    if gpus in ("", "none"):
        cores = usable_cores() or 1
        return [""] * (jobs or (max(cores // threads, 1) if threads else 1))
    numbers = os.environ["CUDA_VISIBLE_DEVICES"].split(",")
    places = numbers * per_gpu
    if jobs and jobs > len(places):
        raise UsageError(
            f"--gpus={gpus} has room for {len(places)} at a time, and --jobs={jobs} asks for more; "
            f"give --per_gpu={math.ceil(jobs / len(numbers))}"
        )
    return places[:jobs]


def _run(words: list[str], output: str, gpu: str, is_shared: bool) -> None:
    """Call `engine.sweeps.trial` in a process that has it already; this module's users have not."""
    from engine.sweeps import trial

    devices.choose_gpus(gpu)
    if is_shared:  # else TensorFlow takes the whole memory for one
        os.environ["TF_FORCE_GPU_ALLOW_GROWTH"] = "true"
    trial.run(words, output)


@contextmanager
def _nothing_said() -> Iterator[None]:
    """Let processes that begin now write their errors to nowhere."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


@contextmanager
def _without_program() -> Iterator[None]:
    """Let processes that begin now not import the sweeper's program, for they need nothing of it.

    multiprocessing makes them, in a quarter of a second each.
    """
    program = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = program
