"""Starts the trials of a sweep on this machine, as many at a time as are asked for."""

import math
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import chdir, contextmanager, suppress
from multiprocessing import forkserver
from multiprocessing.connection import wait
from pathlib import Path
from types import ModuleType
from typing import Any

from engine import endings
from engine.devices import gpus as devices
from engine.runs import MOST_DEATHS
from vegab import ROOT, UsageError, capture
from vegab.provenance import usable_cores

SECONDS_BETWEEN = 0.5
KILLED, UNKNOWN = -9, 255
Commands = Mapping[str, Sequence[str]]
Tell = Callable[[Sequence[str], Mapping[str, int]], Commands]


class Launcher:
    """Runs command lines of `bin/train.py`, and touches the disk no sooner than in `run`.

    `outputs` is the folder for what commands say until their run folder is open. When `is_stopped`
    returns true, those that run are told to save a checkpoint and end."""

    num_parallel = 8  # that a search may run at a time, on a cluster, whose room changes
    room: Callable[[], int]  # returns how many commands may run at a time
    begin: Callable[[str, Sequence[str]], Any]  # begins one; returns what stands for it
    ended: Callable[[list[Any]], Sequence[Any]]  # returns what has ended; waits for one, not long
    end: Callable[[Any], None]  # tells one that runs to save a checkpoint and end
    code_of: Callable[[Any, str], int | None]  # of one that has ended; None: it had not begun

    def __init__(self, outputs: Path, is_stopped: Callable[[], bool]) -> None:
        self.outputs = outputs
        self.is_stopped = is_stopped

    def adopted(self) -> set[str]:
        """Return the names of commands that a launcher began that is gone; `run` watches them."""
        return set()

    def said(self, name: str) -> str:
        """Return the last line that a command wrote before its run folder was open."""
        with suppress(OSError):
            if line := endings.last_line(self.output(name).read_text(errors="replace")):
                return line
        return f"{name} ended before it said anything"

    def how(self, name: str, code: int, why: str = "") -> str:
        """Return a phrase that says how a command was ended, and `why` where that is known."""
        said = b""
        with suppress(OSError):
            errors = (self.outputs.parent / name / capture.FILES[1]).read_bytes()
            said = capture.ATTEMPT.split(errors)[-1].partition(b"\n")[2]
        return endings.ending(code, said.decode(errors="replace"), why)

    def output(self, name: str) -> Path:
        """Return the file for what a command says."""
        return self.outputs / f"{name}.txt"

    def begin_some(self, waiting: Commands, num_running: int) -> dict[Any, str]:
        """Begin as many as there is room for; return their names by what stands for each."""
        some = [*waiting][: max(self.room() - num_running, 0)]
        return {self.begin(name, waiting[name]): name for name in some}

    def at_work(self, names: Sequence[str]) -> Sequence[str]:
        """Return the commands, of those that were begun, that are not only queued."""
        return names

    def run(self, commands: Commands, tell: Tell) -> None:
        """Run commands by name until all have ended, or `is_stopped` says so.

        `tell` is called with the names that run, and the exit codes (minus the number of a signal
        that ended it) of those that have ended since, twice a second or oftener; it returns
        commands that may now begin, or begin again."""
        self.outputs.mkdir(exist_ok=True)
        waiting = dict(commands)
        running: dict[Any, str] = {}
        codes: dict[str, int] = {}
        is_told = False
        while True:
            if not self.is_stopped():
                begun = self.begin_some(waiting, len(running))
                running |= begun
                for name in begun.values():
                    del waiting[name]
            more, codes = tell(self.at_work([*running.values()]), codes), {}
            waiting |= more
            if not running and (self.is_stopped() or not waiting):
                return
            if more:
                continue
            ended = self.ended(list(running))
            if self.is_stopped() and not is_told:
                is_told = True
                for one in running:
                    self.end(one)
            for one in ended:
                name = running.pop(one)
                if (code := self.code_of(one, name)) is not None:
                    codes[name] = code


class LocalLauncher(Launcher):
    """Runs command lines of `bin/train.py`, each in a process that is forked with all imported.

    The arguments are flags of `bin/sweep.py`, the threads of each trial (None: one a core), and
    `Launcher`'s. Raises UsageError if `gpus` names none, or has no room for as many."""

    def __init__(
        self, jobs: int | None, gpus: str, per_gpu: int, threads: int | None, **options: Any
    ) -> None:
        super().__init__(**options)
        self.places = places_of(jobs, gpus, per_gpu, threads)
        self.num_parallel = len(self.places)
        self.room = lambda: self.num_parallel
        self.is_shared = bool(gpus) and per_gpu > 1
        self.held: dict[Any, str] = {}  # the place of each that runs
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        os.environ["PYTHONPATH"] = os.pathsep.join(paths)
        self._processes: Any = multiprocessing.get_context("forkserver")
        self._processes.set_forkserver_preload(["engine.libraries", "engine.sweeps.trial"])

    def begin(self, name: str, words: Sequence[str]) -> Any:
        gpu = self.places.pop(0)
        arguments = (list(words), str(self.output(name)), gpu, self.is_shared)
        process = self._processes.Process(target=_run, args=arguments)
        with _apart():
            for deaths in range(MOST_DEATHS):  # of the fork server
                before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # it outlives the terminal
                with chdir(ROOT):  # where it imports from first, and that may be a snapshot
                    forkserver.ensure_running()
                signal.signal(signal.SIGHUP, before)
                try:
                    process.start()
                    break
                except (EOFError, OSError):
                    if deaths + 1 == MOST_DEATHS:
                        raise
                    time.sleep(SECONDS_BETWEEN)  # it may not be known yet that it is dead
        self.held[process] = gpu
        return process

    def ended(self, running: list[Any]) -> list[Any]:
        wait([process.sentinel for process in running], SECONDS_BETWEEN)
        return [process for process in running if not process.is_alive()]

    def end(self, one: Any) -> None:
        one.terminate()

    def code_of(self, one: Any, name: str) -> int:
        one.join()
        self.places.append(self.held.pop(one))
        # If the fork server was killed, nobody knows the code; where it stands, its folder says.
        return KILLED if one.exitcode == UNKNOWN else one.exitcode


def places_of(jobs: int | None, gpus: str, per_gpu: int, threads: int | None) -> list[str]:
    """Return the GPU of each trial that runs at a time, "" for none; see `LocalLauncher`."""
    devices.choose_gpus(gpus)
    if gpus in ("", "none"):
        cores = usable_cores() or 1
        return [""] * (jobs or (max(cores // threads, 1) if threads else 1))
    numbers = os.environ["CUDA_VISIBLE_DEVICES"].split(",")
    places = numbers * per_gpu
    if jobs and jobs > len(places):
        room = f"--gpus={gpus} has room for {len(places)} at a time"
        hint = f"give --per_gpu={math.ceil(jobs / len(numbers))}"
        raise UsageError(f"{room}, and --jobs={jobs} asks for more; {hint}")
    return places[:jobs]


def _run(words: list[str], output: str, gpu: str, is_shared: bool) -> None:
    os.setsid()  # what a terminal sends is for the sweeper, which tells its trials
    from engine.sweeps import trial  # which this process has already, and who imports us has not

    devices.choose_gpus(gpu)
    if is_shared:  # else TensorFlow takes the whole memory for one
        os.environ["TF_FORCE_GPU_ALLOW_GROWTH"] = "true"
    trial.run(words, output)


@contextmanager
def _apart() -> Iterator[None]:
    """Let processes that begin now write no errors, and not import the sweeper's program.
    TensorFlow tells of itself when the fork server imports it. To import the program, of which a
    trial needs nothing, would take each a quarter of a second."""
    kept, program = os.dup(2), sys.modules["__main__"]
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = program
        os.dup2(kept, 2)
        os.close(kept)
