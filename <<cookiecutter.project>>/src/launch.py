"""Starts the trials of a sweep on this machine, as many at a time as are asked for."""

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SECONDS_BETWEEN = 0.5


class LocalLauncher:
    """Runs command lines of `bin/train.py`, each in a process that is forked with all imported.

    Args:
        jobs: how many at a time, at least 1.
        outputs: folder for what they say until their run folder is open.
        is_stopped: whether to stop; those that run are then told to commit and end.
    """

    def __init__(self, jobs: int, outputs: Path, is_stopped: Callable[[], bool]) -> None:
        self.jobs = jobs
        self.outputs = outputs
        self.is_stopped = is_stopped
        outputs.mkdir(exist_ok=True)
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        os.environ["PYTHONPATH"] = os.pathsep.join(paths)
        self._processes = multiprocessing.get_context("forkserver")
        self._processes.set_forkserver_preload(["src.trial"])

    def run(
        self,
        commands: Mapping[str, Sequence[str]],
        tell: Callable[[Sequence[str], Mapping[str, int]], None],
    ) -> dict[str, int]:
        """Run commands by name until all have ended, or `is_stopped` says so.

        Args:
            commands: words after the program's name.
            tell: called with the names that run and the exit codes of those that have ended,
                whenever one begins or ends, and twice a second.

        Returns:
            The exit codes by name; minus the number of a signal, if that ended it. What was not
            begun has none.
        """
        waiting = deque(commands)
        running: dict[str, Any] = {}
        codes: dict[str, int] = {}
        is_told = False
        while running or (waiting and not self.is_stopped()):
            while waiting and len(running) < self.jobs and not self.is_stopped():
                name = waiting.popleft()
                running[name] = self._start(name, commands[name])
            tell(list(running), codes)
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
        tell([], codes)
        return codes

    def said(self, name: str) -> str:
        """Return the last line that a command wrote before its run folder was open, or ""."""
        try:
            lines = (self.outputs / f"{name}.txt").read_text(errors="replace").strip().splitlines()
        except OSError:
            return ""
        return lines[-1] if lines else ""

    def _start(self, name: str, words: Sequence[str]) -> Any:
        output = self.outputs / f"{name}.txt"
        output.unlink(missing_ok=True)
        process = self._processes.Process(target=_run, args=(list(words), str(output)))
        with _nothing_said():  # TensorFlow tells of itself when the fork server imports it
            process.start()
        return process


def _run(words: list[str], output: str) -> None:
    """Call `src.trial` in a process that has it already; this module's users have not."""
    from src import trial

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
