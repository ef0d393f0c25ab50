"""How long `bin/runs.py` takes over thousands of run folders, and how much memory.

    python benchmarks/runs.py               # 10,000 runs; writes benchmarks/runs.txt
    python benchmarks/runs.py --runs 1000   # fewer; writes nothing

The folders are made in a temporary place: what a short training really wrote, with other settings,
seeds and figures in each, in one folder. `cold` is the first time, when no index is there, though
the system has the files in its memory; `warm` comes after it, in turn with the other commands. The
floor is a `stat` of the files of every run, by which a change is noticed.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import pickle
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from loop import PROJECT, ROOT, heading, spread

SETTINGS = {
    "n_filters": (8, 16, 32, 64),
    "learning_rate": (0.01, 0.003, 0.001),
    "dropout": (0.0, 0.2),
}
NUM_EPOCHS = 60
COMMANDS = {
    "list": ("list", "results"),
    "list --sort=best": ("list", "results", "--sort=best"),
    "compare": ("compare", "results"),
    "compare --group --format=latex": ("compare", "results", "--group", "--format=latex"),
}
MOST_SECONDS, MOST_MEGABYTES = 5.0, 500.0


def make(folder: Path, number: int) -> None:
    """Make so many run folders of one that was trained."""
    train = [sys.executable, "bin/train.py", "root", str(folder / "first"), "--num_epochs=1"]
    small = ["--n_filters=2", "--n_layers=1", "--no_tensorboard"]
    subprocess.run([*train, *small], cwd=PROJECT, check=True, capture_output=True)
    first = folder / "first"
    config, meta = (json.loads((first / f"{name}.json").read_text()) for name in ("config", "meta"))
    state = pickle.loads((first / "loop_state.pkl").read_bytes())
    (folder / "results").mkdir()
    for index in range(number):
        chance = random.Random(index)
        run = folder / "results" / f"run_{index}"
        run.mkdir()
        chosen = {key: chance.choice(values) for key, values in SETTINGS.items()}
        own = config | chosen | {"seed": index % 5, "num_epochs": NUM_EPOCHS}
        (run / "config.json").write_text(json.dumps(own, indent=2))
        (run / "meta.json").write_text(json.dumps(meta, indent=2))
        position = {"epoch": NUM_EPOCHS, "global_step": NUM_EPOCHS * 40}
        (run / "loop_state.pkl").write_bytes(pickle.dumps(state | position))
        (run / "run.lock").touch()
        with open(run / "history.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(
                ("epoch", "step", "learning_rate", "loss", "accuracy", "val_loss", "val_accuracy")
            )
            for epoch in range(NUM_EPOCHS):
                figures = [chance.random() for _ in range(4)]
                writer.writerow((epoch, 40 * (epoch + 1), chosen["learning_rate"], *figures))
    shutil.rmtree(first)


def answer(words: tuple[str, ...], folder: Path) -> tuple[float, float]:
    """Return seconds and peak of memory in MB of one command."""
    command = [sys.executable, str(PROJECT / "bin" / "runs.py"), *words]
    start = time.perf_counter()
    with open(os.devnull, "wb") as nothing:
        process = subprocess.Popen(command, cwd=folder, stdout=nothing)
        _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    if os.waitstatus_to_exitcode(status) != 0:
        sys.exit(f"{command} ended with {os.waitstatus_to_exitcode(status)}")
    return seconds, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6


def floor(folder: Path) -> float:
    """Return the seconds that a stat of all files takes."""
    start = time.perf_counter()
    for run in os.scandir(folder / "results"):
        if run.is_dir():
            for name in ("config.json", "meta.json", "history.csv", "loop_state.pkl"):
                os.stat(f"{run.path}/{name}")
    return time.perf_counter() - start


def measure(folder: Path, number: int, pairs: int) -> str:
    """Return a line a command."""
    make(folder, number)
    cold, _ = answer(COMMANDS["list"], folder)
    index = folder / "results" / ".runs.json"
    figures: dict[str, list[tuple[float, float]]] = {name: [] for name in COMMANDS}
    floors = []
    for _ in range(pairs):
        floors.append(floor(folder))
        for name, words in COMMANDS.items():
            figures[name].append(answer(words, folder))
    lines = [
        f"{number:,} runs of {NUM_EPOCHS} epochs in one folder, seconds; peak of memory, MB",
        f"    list, cold: {cold:.2f} s; the index then has {index.stat().st_size / 1e6:.1f} MB",
        f"    a stat of four files of each run: {spread(floors)} s",
    ]
    for name, samples in figures.items():
        seconds, memory = ([sample[i] for sample in samples] for i in (0, 1))
        times = [s / f for s, f in zip(seconds, floors, strict=True)]
        is_reached = (
            statistics.median(seconds) <= MOST_SECONDS
            and statistics.median(memory) <= MOST_MEGABYTES
        )
        lines.append(
            f"    {name}, warm: {spread(seconds)} s, {spread(times, '.0f')} times the stat; "
            f"{spread(memory, '.0f')} MB  <= {MOST_SECONDS:g} s, {MOST_MEGABYTES:g} MB: "
            f"{'reached' if is_reached else 'NOT REACHED'}"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure, print the lines and keep them beside this file if they are of all runs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--pairs", type=int, default=5)
    args: Any = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        text = f"{heading(('pandas', 'numpy'))}\n\n{measure(Path(folder), args.runs, args.pairs)}\n"
    print(text, end="")
    if args.runs == 10_000:
        (ROOT / "benchmarks" / "runs.txt").write_text(text)


if __name__ == "__main__":
    main()
