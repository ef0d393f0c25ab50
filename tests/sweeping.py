"""What the tests of sweeps share: waiting for their processes, and the bits of their trials."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from vegab.run_folder import living_owner

EXACT = ("model.h5", "model_best.h5", "history.csv")
LIMIT = 1800  # seconds that the tests wait for anything


def start(cwd: Path, /, *words: object, **env: str) -> subprocess.Popen[str]:
    """Begin `python WORDS` in a folder, with these variables in its environment."""
    return subprocess.Popen(
        [sys.executable, *map(str, words)],
        cwd=cwd,
        env=os.environ | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(condition: Callable[[], Any], process: subprocess.Popen[str] | None = None) -> Any:
    """Return what a condition returns once that is true; fail if a process ends before."""
    end = time.monotonic() + LIMIT
    while not (found := condition()):
        if process is not None and process.poll() is not None:
            pytest.fail(f"it ended with {process.returncode}: {process.communicate()}")
        if time.monotonic() > end:
            pytest.fail(f"it took more than {LIMIT} s")
        time.sleep(0.02)
    return found


def is_told_to_end(pid: int) -> bool:
    """Whether SIGTERM waits for a process that is stopped; not every system tells."""
    status = Path(f"/proc/{pid}/status")
    if not status.exists():
        time.sleep(5)
        return True
    pending = int(re.findall(r"ShdPnd:\s+(\w+)", status.read_text())[0], 16)
    return bool(pending >> (signal.SIGTERM - 1) & 1)


def pid_in(run: Path) -> int:
    """Return the process that has or had a run folder open, or 0."""
    with contextlib.suppress(OSError, ValueError):
        return json.loads((run / "run.lock").read_text())["pid"]
    return 0


def kill(*pids: int) -> None:
    """Kill processes that may have ended already; 0 is none."""
    for pid in filter(None, pids):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def fork_servers_of(pid: int) -> list[int]:
    """Return the fork servers that a process has begun."""
    with contextlib.suppress(OSError):
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return [
            int(c) for c in children if b"forkserver" in Path(f"/proc/{c}/cmdline").read_bytes()
        ]
    return []


@contextlib.contextmanager
def killed_whenever_seen(run: Path) -> Iterator[None]:
    """Kill whoever trains a run, as often as that is begun, also while nobody sweeps."""
    is_over = threading.Event()

    def watch() -> None:
        while not is_over.wait(0.005):
            if living_owner(run):
                kill(pid_in(run))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        is_over.set()
        watcher.join()


def swept_under_fire(
    cwd: Path,
    words: Sequence[object],
    folder: Path,
    num_kills: int,
    chance: random.Random,
) -> tuple[Counter[str], str]:
    """Give the command of a sweep again and again, and kill so many of what moves: the sweeper, a
    trial, the fork server.

    Returns what was killed, and what the command said that was killed no more.
    """
    killed: Counter[str] = Counter()
    kinds = ("sweeper", "trial", "trial", "fork server")
    what = "trial"  # to be killed as soon as there is one
    while True:
        deaths: Counter[Path] = Counter()  # a sweeper gives up what is killed three times
        sweeper = start(cwd, *words)
        at = time.monotonic()
        while sweeper.poll() is None:
            time.sleep(0.02)
            if killed.total() >= num_kills or time.monotonic() < at:
                continue
            trials = {path: pid_in(path) for path in folder.glob("*=*") if living_owner(path)}
            fresh = {path: pid for path, pid in trials.items() if pid and deaths[path] < 2}
            # Without a trial it may be starting: after its third death then, the sweep ends.
            is_safe = trials and len(fresh) == len(trials)
            servers = fork_servers_of(sweeper.pid) if is_safe else []
            found = {"sweeper": [sweeper.pid], "trial": [*fresh.values()], "fork server": servers}
            if any(found[what]):
                pid = chance.choice([pid for pid in found[what] if pid])
                # All that a fork server has forked may die with it.
                deaths.update(p for p in trials if what == "fork server" or trials[p] == pid)
                kill(pid)
                killed[what] += 1
                what, at = chance.choice(kinds), time.monotonic() + chance.uniform(0, 1)
            elif len(fresh) < len(trials):
                what = "sweeper"  # the next one counts from 0 again
        said, problems = sweeper.communicate()
        if sweeper.returncode in (0, 1) and "is not finished" not in problems:
            return killed, said + problems


def attempts_in(run: Path) -> list[int | str | None]:
    """Return how each attempt at a run ended; None: it has not."""
    attempts = json.loads((run / "meta.json").read_text())["attempts"]
    return [attempt.get("exit_status") for attempt in attempts]


def exact_files(folder: Path, *more: str) -> dict[str, bytes]:
    """Return the files of a sweep's trials that are exact, and others of these names."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for name in (*EXACT, *more)
        for path in folder.glob(f"*/{name}")
    }
