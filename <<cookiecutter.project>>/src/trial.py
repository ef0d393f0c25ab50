"""One trial of a sweep: what `bin/train.py` does, in a process that has the libraries already.

The fork server of a sweep imports this module once; each trial is then a process of its own, in
which TensorFlow has not begun yet. Of the project itself nothing is imported before: what a run
imports is part of its fingerprint.
"""

import os
import runpy
import sys
from pathlib import Path

import h5py
import keras
import matplotlib.figure
import tensorboard.summary
import tensorflow as tf
import tqdm

ROOT = Path(__file__).resolve().parents[1]
IMPORTED = (h5py, keras, matplotlib, tensorboard, tf, tqdm)
# What TensorFlow takes from the environment when it is imported.
READ_AT_IMPORT = {"onednn": ("TF_ENABLE_ONEDNN_OPTS", "1"), "xla_flags": ("TF_XLA_FLAGS", "")}


def run(words: list[str], output: str) -> None:
    """Run `bin/train.py` with a command line, and end the process as it ends.

    Args:
        words: after the program's name; the second one is the run folder.
        output: file for what it says.
    """
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in (1, 2):
        os.dup2(file, number)
    program = ROOT / "bin" / "train.py"
    command = [sys.executable, os.path.relpath(program), *words]
    if _began_otherwise(words[1]):
        os.execv(sys.executable, command)  # import anew
    for name in [name for name in sys.modules if name.partition(".")[0] == "src"]:
        del sys.modules[name]
    sys.argv, sys.orig_argv = command[1:], command  # meta.json tells what to type
    runpy.run_path(str(program), run_name="__main__")


def _began_otherwise(run: str) -> bool:
    """Return whether a run's commit was made with TensorFlow set otherwise than here."""
    from src import fingerprint

    stored = (fingerprint.stored_in(run) or {}).get("settings", {})
    return any(
        stored.get(key, os.environ.get(name, default)) != os.environ.get(name, default)
        for key, (name, default) in READ_AT_IMPORT.items()
    )
