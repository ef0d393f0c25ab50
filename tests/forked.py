"""Runs commands in processes that are forked with the libraries imported, which saves seconds each.

The trials of a sweep begin like that too; see `engine.sweeps.trial`.
"""

import multiprocessing
import os
import random
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

OWN = {"configs", "engine", "src", "tests", "vegab"}


def run(
    words: Sequence[str], folder: Path, env: Mapping[str, str], timeout: float = 600
) -> subprocess.CompletedProcess[str]:
    """Run `python WORDS` in a folder, and return what `subprocess.run` would.

    Not for what is about a process' start, or about variables that are read at an import.

    Raises:
        subprocess.TimeoutExpired: if it has not ended after so many seconds; it is killed.
    """
    with tempfile.TemporaryDirectory() as said:
        process = start(words, folder, env, said)
        process.join(timeout)
        if process.is_alive():
            process.kill()
            raise subprocess.TimeoutExpired(words, timeout)
        output, errors = (Path(said, name).read_text() for name in ("1", "2"))
    assert process.exitcode is not None
    return subprocess.CompletedProcess(words, process.exitcode, output, errors)


def start(
    words: Sequence[str], folder: Path, env: Mapping[str, str], said: str
) -> multiprocessing.process.BaseProcess:
    """Begin as `run` does; what it says is added to the files `1` and `2` of the folder `said`."""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["libraries"])
    process = processes.Process(target=_be, args=(list(words), str(folder), dict(env), said))
    process.start()
    return process


def _be(words: list[str], folder: str, env: dict[str, str], said: str) -> None:
    """Be that process; what it says goes into the files `1` and `2` of the folder `said`."""
    for number in (1, 2):
        file = os.open(f"{said}/{number}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
    os.chdir(folder)
    multiprocessing.process.ORIGINAL_DIR = folder  # type: ignore[attr-defined]
    os.environ.clear()
    os.environ.update(env)
    tempfile.tempdir = None  # TMPDIR is looked at anew
    # Two processes draw different numbers where nothing has seeded them.
    random.seed()
    np.random.seed()
    sys.path[:0] = filter(None, env.get("PYTHONPATH", "").split(os.pathsep))
    # Of the project nothing is imported yet.
    for name in [name for name in sys.modules if name.partition(".")[0] in OWN]:
        del sys.modules[name]
    sys.argv, sys.orig_argv = words, [sys.executable, *words]
    runpy.run_path(words[0], run_name="__main__")
