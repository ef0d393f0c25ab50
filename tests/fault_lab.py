"""Runs of a generated project in which something goes wrong at a chosen place, and their oracle."""

from __future__ import annotations

import contextlib
import filecmp
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import pytest

HERE = Path(__file__).parent
# `make fault-test` sets it: the whole, not the sample.
WHOLE = bool(os.environ.get("TEMPLATE_FAULT_TESTS_WHOLE"))


def only_whole(test: Callable[..., None]) -> Callable[..., None] | None:
    """Leave a test that takes minutes to `make fault-test`."""
    return test if WHOLE else None


EXACT = ("model.h5", "model_best.h5", "history.csv")
KILLED, INTERRUPTED = -9, 75
MOMENTS = ("before", "in", "after")
LIMIT = 600  # seconds for one attempt, after which it counts as hung

SMALL = ("root", "--n_filters=2", "--n_layers=1", "--batch_size=128", "--no_tensorboard")
STEPS = 10  # of an epoch of 1,260 examples


@dataclass(frozen=True)
class Job:
    """A run to break: its command line without the folder.

    `processors` is how many TensorFlow takes the processor for; they then stand for GPUs.
    """

    name: str
    words: tuple[str, ...]
    num_epochs: int = 3
    processors: int = 1

    def __str__(self) -> str:
        return self.name

    @property
    def arguments(self) -> tuple[str, ...]:
        return (*self.words, f"--num_epochs={self.num_epochs}")


CNN = Job("cnn", (*SMALL, "--checkpoint_steps=4"))
# No smaller last batch, for which its steps would be compiled once more.
EVEN = Job("even", (*SMALL, "--batch_size=126", "--checkpoint_steps=4"))
RECURRENT = Job(
    "recurrent",
    (
        *SMALL,
        "--checkpoint_steps=3",
        "--model=fault_models:build_recurrent",
        "--optimizer=adamw",
        "--callbacks=[{class: keras.callbacks.ReduceLROnPlateau, patience: 1, min_delta: 1.0}]",
    ),
)
SUBCLASSED = Job(
    "subclassed",
    (*SMALL, "--checkpoint_steps=3", "--model=fault_models:build_subclassed"),
)
OF_OWN = (*EVEN.words, "--lr_schedule=null")
SCATTERED = Job("scattered", (*OF_OWN, "--monitor=loss", "--model=fault_models:build_scattered"))
STATEFUL = Job(
    "stateful",
    (
        *OF_OWN,
        "--dataset=fault_models:whole_batches",
        "--model=fault_models:build_stateful",
    ),
)
SHARED = Job("shared", (*OF_OWN, "--model=fault_models:build_shared"))
# Attempts make one step a call, the run that nothing stopped makes many: with XLA too that changes
# no bit.
COMPILED = Job("compiled", (*SMALL, "--checkpoint_steps=4", "--no_deterministic", "--jit_compile"))


@dataclass
class Attempt:
    """How an attempt ended, what it said, and what it did."""

    code: int
    said: str
    is_signalled: bool  # by a planted signal
    num_steps: int
    later_calls: int  # of steps, which began after the signal


@dataclass
class Server:
    """One process that forks attempts."""

    project: Path
    shim: Path | None
    hash_seed: int
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        environment = os.environ | {
            "PYTHONHASHSEED": str(self.hash_seed),
            "PYTHONDONTWRITEBYTECODE": "1",
            "TF_CPP_MIN_LOG_LEVEL": "1",
        }
        if self.shim:
            environment["LD_PRELOAD"] = str(self.shim)
        self.process = subprocess.Popen(
            [sys.executable, HERE / "fault_server.py"],
            cwd=self.project,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def ask(self, **request: Any) -> dict[str, Any]:
        assert self.process.stdin and self.process.stdout
        with self.lock:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        assert line, "the fork server is gone"
        return json.loads(line)


@dataclass
class Started:
    """An attempt that goes on."""

    server: Server
    pid: int
    terminal: Path

    @property
    def signal_file(self) -> Path:
        """What is there once a planted signal was sent."""
        return Path(f"{self.terminal}.signal")

    def wait(self) -> Attempt:
        """Return how it ended."""
        for _ in range(50 * LIMIT):
            code = self.server.ask(wait=self.pid)["code"]
            if code is not None:
                break
            time.sleep(0.02)
        else:
            os.kill(self.pid, signal.SIGKILL)
            pytest.fail(f"an attempt took more than {LIMIT} s\n{self.terminal.read_text()}")
        said = self.terminal.read_text(errors="replace")
        file = Path(f"{self.terminal}.steps")
        calls = [line.split() for line in file.read_text().splitlines()] if file.exists() else []
        num_steps = sum(int(number) for number, _ in calls)
        later_calls = sum(int(is_later) for _, is_later in calls)
        return Attempt(code, said, self.signal_file.exists(), num_steps, later_calls)


class Lab:
    """A project, two servers with different hash seeds, and the runs that were never stopped."""

    def __init__(self, project: Path, folder: Path) -> None:
        self.folder = folder
        self.project = folder / "my-research"
        shutil.copytree(project, self.project, symlinks=True)
        for name in ("fault_models.py", "fault_iterators.py"):
            shutil.copy(HERE / name, self.project / "src")
        shim = folder / "shim.so"
        if shutil.which("gcc"):
            source = HERE / "fault_shim.c"
            command = ("gcc", "-shared", "-fPIC", "-O1", "-o", shim, source, "-ldl", "-lpthread")
            subprocess.run([str(word) for word in command], check=True)
        self.shim = shim if shim.exists() else None
        self.servers = [Server(self.project, self.shim, hash_seed) for hash_seed in (1, 2)]
        self._numbers = itertools.count(1)
        self._references: dict[Job, Path] = {}
        self._one_reference = threading.Lock()

    def close(self) -> None:
        for server in self.servers:
            assert server.process.stdin
            server.process.stdin.close()
            server.process.wait(LIMIT)

    def new_folder(self, name: str) -> Path:
        return self.folder / "runs" / f"{next(self._numbers)}-{name}" / "run"

    def start(
        self, run: Path, words: Sequence[str], program: str = "bin/train.py", **faults: Any
    ) -> Started:
        """Begin an attempt; for the faults see `fault_server.attempt`. The servers take turns."""
        run.parent.mkdir(parents=True, exist_ok=True)
        number = next(self._numbers)
        server = self.servers[number % len(self.servers)]
        terminal = run.parent / f"terminal-{number}.txt"
        request: dict[str, Any] = {"faults": [], "shim": None, "most_steps": None, "exhaust": None}
        request |= {"processors": 1, "environment": {}}
        answer = server.ask(
            words=[program, *words[:1], str(run), *words[1:]],
            output=str(terminal),
            process_seed=number,
            **(request | faults),
        )
        return Started(server, answer["pid"], terminal)

    def attempt(self, run: Path, words: Sequence[str], **faults: Any) -> Attempt:
        """Run a command to its end, whatever that is."""
        return self.start(run, words, **faults).wait()

    def check(self, name: str, *arguments: object) -> Any:
        """Run a function of `fault_checks.py` in a process of its own; return what it found."""
        folder = self.new_folder(name)
        words = [name, *map(str, arguments)]
        done = self.attempt(folder, words, program=str(HERE / "fault_checks.py"))
        assert done.code == 0, done.said
        return json.loads(folder.read_text())

    def reference(self, job: Job) -> Path:
        """The run that nothing stopped."""
        with self._one_reference:
            if job not in self._references:
                run = self.new_folder(f"{job.name}-reference")
                done = self.attempt(run, job.arguments, processors=job.processors)
                assert done.code == 0, done.said
                self._references[job] = run
            return self._references[job]

    def finish(self, job: Job, run: Path, context: str) -> None:
        """Resume to the end; the run must then be the one that nothing stopped, bit for bit."""
        done = self.attempt(run, job.arguments, processors=job.processors)
        assert done.code == 0, f"{context}: the resumed run ended with {done.code}\n{done.said}"
        differing = differences(run, self.reference(job))
        assert not differing, f"{context}: {', '.join(differing)} differ\n{done.said}"
        shutil.rmtree(run.parent)

    def chain(self, job: Job, kills: Sequence[dict[str, Any]], name: str) -> int:
        """Kill a run again and again, then resume it to its end. Returns how many kills struck."""
        run, struck = self.new_folder(name), 0
        for kill in kills:
            done = self.attempt(run, job.arguments, processors=job.processors, **kill)
            assert done.code in (KILLED, 0), f"{kill}: ended with {done.code}\n{done.said}"
            struck += done.code == KILLED
        self.finish(job, run, f"{job.name}, {name}, killed at {kills}")
        return struck


@contextlib.contextmanager
def opened(project: Path, folder: Path) -> Iterator[Lab]:
    """A lab that is closed in the end."""
    lab = Lab(project, folder)
    try:
        yield lab
    finally:
        lab.close()


def differences(run: Path, other: Path) -> list[str]:
    """The files of two runs that are not the same, byte for byte."""
    kept = {f"checkpoints/{path.name}" for f in (run, other) for path in f.glob("checkpoints/*")}
    return [
        name
        for name in (*EXACT, *sorted(kept))
        if not ((run / name).exists() and (other / name).exists())
        or not filecmp.cmp(run / name, other / name, shallow=False)
    ]


def state_of(run: Path) -> dict[str, Any]:
    """What a run's latest commit holds beside the variables."""
    with h5py.File(run / "model.h5") as file:
        return json.loads(file["training_state/state"][()])


def two_at_once(tasks: Sequence[Any]) -> list[Any]:
    """Call functions, two at a time; the first error is raised."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda task: task(), tasks))


def killed_anywhere(lab: Lab, job: Job, chains: Sequence[list[dict[str, Any]]]) -> None:
    """Kill a run for each chain of kills, and finish it; most kills must strike."""
    lab.reference(job)
    struck = two_at_once(
        [lambda i=i, c=c: lab.chain(job, c, f"kills-{i}") for i, c in enumerate(chains)]
    )
    assert sum(struck) >= 0.8 * sum(map(len, chains)), "kills came too late to count"


def every_kill(
    kill: Callable[..., dict[str, Any]],
    places: Mapping[str, int],
    delay: float,
    resumes_after: tuple[str, Sequence[int]],
) -> list[list[dict[str, Any]]]:
    """Before, in and after every call of each place, after the end, and while resuming.

    Args:
        kill: makes a kill of place, call, moment and delay.
        places: how often each is called.
        delay: of a kill within a call, in seconds.
        resumes_after: the place and the calls at which the first of two kills strikes, the second
            while the run resumes.
    """
    chains = [
        [kill(at, n, when, delay)]
        for at, number in places.items()
        for n in range(1, number + 1)
        for when in MOMENTS
    ]
    first, calls = resumes_after
    resumes = [
        [kill(first, n), kill(at, 1, when)]
        for n in calls
        for at in ("read", "restore")
        for when in MOMENTS
    ]
    return [*chains, [kill("training", 1, "after")], *resumes]


def needs_shim(lab: Lab) -> None:
    if lab.shim is None:
        pytest.skip("gcc is needed for the faults of system calls")


def read_trace(path: Path) -> list[tuple[str, str, str, int, bytes]]:
    """Calls as (name, path, other path, offset, data)."""
    content, calls, place = path.read_bytes(), [], 0
    while place < len(content):
        end = content.index(b"\n", place)
        name, first, second, offset, size = content[place:end].decode().split("\t")
        place = end + 1
        data = b""
        if name == "write":
            data = content[place : place + int(size)]
            place += int(size)
        calls.append((name, Path(first).name, Path(second).name, int(offset), data))
    return calls
