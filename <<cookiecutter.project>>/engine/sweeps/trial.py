"""Runs one trial of a sweep as `bin/train.py` does, in a process that has the libraries already.

The fork server of a sweep imports this module once; each trial is then a process of its own, in
which TensorFlow has not begun yet."""

import multiprocessing
import os
import runpy
import sys
from contextlib import suppress

from engine.training import fingerprint, sources
from vegab import ROOT, capture

with suppress(Exception):  # a trial says what is wrong
    sources.digests({})  # what is parsed here, no trial parses: it is kept by its content


def run(words: list[str], output: str) -> None:
    """Run `bin/train.py`; the second word is the run folder, `output` a file for what it says."""
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for number in (1, 2):
        os.dup2(file, number)
    command = [sys.executable, os.path.relpath(ROOT / "bin" / "train.py"), *words]
    if (sweeper := multiprocessing.parent_process()) and not sweeper.is_alive():
        return  # as `stop` finds only what has begun, nothing begins when the sweeper is gone
    settings = (fingerprint.stored_in(words[1]) or {}).get("settings")
    now = fingerprint.read_at_import()
    if settings is not None and any(settings.get(key, "") != now[key] for key in now):
        os.execv(sys.executable, command)  # the run began with TensorFlow set otherwise than here
    capture.is_watched = False
    sys.argv, sys.orig_argv = command[1:], command  # meta.json tells what to type
    runpy.run_path(os.path.abspath(command[1]), run_name="__main__")
