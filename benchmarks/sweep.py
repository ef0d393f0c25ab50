"""What a sweep costs beside the same commands typed one by one, and how fast it answers.

    python benchmarks/sweep.py                  # all rows; writes benchmarks/sweep.txt
    python benchmarks/sweep.py wall --pairs 1   # some rows; writes nothing

Both sides of `wall` train the digits config with 32 settings for 2 epochs, two at a time, in turn:
ours by one command, the other by 32 commands of `bin/train.py`.
"""

from __future__ import annotations

import argparse
import functools
import json
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import runs
from loop import PROJECT, heading, print_and_keep, spread

SWEEP = (sys.executable, str(PROJECT / "bin" / "sweep.py"))
SETTINGS = ("--num_epochs=2", "--grid", "n_filters=4,6,8,10", "--seeds=8")
MANY = ("--grid", f"batch_size={','.join(str(n) for n in range(1, 1001))}", "--seeds=5")


def timed(function: Callable[[], object]) -> float:
    """Return the seconds that a function takes."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def call(*words: str | Path) -> str:
    """Return what a command prints; it must end well."""
    command = [*SWEEP, *map(str, words)]
    return subprocess.run(command, cwd=PROJECT, check=True, capture_output=True, text=True).stdout


def one_by_one(commands: list[list[str]]) -> None:
    """Run commands, two at a time."""

    def train(words: list[str]) -> None:
        subprocess.run(words, cwd=PROJECT, check=True, capture_output=True)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(train, commands))


def wall(folder: Path, pairs: int) -> str:
    """Wall time of 32 trials over that of the same commands one by one."""
    ratios, times = [], []
    for pair in range(pairs):
        ours, theirs = folder / "ours", folder / "theirs"
        lines = call("digits", theirs, *SETTINGS, "--dry_run").splitlines()
        commands = [[sys.executable, *shlex.split(line)[1:]] for line in lines]
        sides: dict[str, Callable[[], object]] = {
            "ours": functools.partial(call, "digits", ours, *SETTINGS, "--jobs=2"),
            "theirs": functools.partial(one_by_one, commands),
        }
        seconds = {}
        for name in sides if pair % 2 else reversed(sides):
            seconds[name] = timed(sides[name])
        for run in ours.glob("*/model.h5"):
            other = theirs / run.parent.name / "model.h5"
            if run.read_bytes() != other.read_bytes():
                sys.exit(f"{run.parent.name} has not the bits of the command typed by hand")
        ratios.append(seconds["ours"] / seconds["theirs"])
        times.append(seconds)
        shutil.rmtree(ours)
        shutil.rmtree(theirs)
    medians = [statistics.median(pair[name] for pair in times) for name in ("ours", "theirs")]
    said = "reached" if statistics.median(ratios) <= 0.35 else "NOT REACHED"
    return (
        "32 trials of the digits config, 2 epochs, 2 at a time: wall time over the same commands "
        "one by one, 2 at a time; the bits are compared\n"
        f"    {spread(ratios)}, {pairs} pairs  <= 0.35: {said}  "
        f"[{medians[0]:.0f} : {medians[1]:.0f} s]"
    )


def answers(folder: Path, pairs: int) -> str:
    """Seconds of `--dry_run` and `status` on 5,000 trials."""
    runs.make(folder, 5_000)
    place = folder / "results"
    dry_run = [timed(lambda: call("root", folder / "new", *MANY, "--dry_run"))]
    names = [path.name for path in place.iterdir() if path.is_dir()]
    trials = [{"name": name, "settings": {}} for name in names]
    (place / "sweep.json").write_text(json.dumps({"config": {}, "trials": trials}))
    call("status", place)
    status = []
    for _ in range(pairs):
        dry_run.append(timed(lambda: call("root", folder / "new", *MANY, "--dry_run")))
        status.append(timed(lambda: call("status", place)))
    slowest = max(map(statistics.median, (dry_run, status)))
    return (
        "5,000 trials, seconds: --dry_run, and status once there is an index\n"
        f"    {spread(dry_run)} and {spread(status)}, {pairs} times  <= 2: "
        f"{'reached' if slowest <= 2 else 'NOT REACHED'}"
    )


ROWS = {"wall": wall, "answers": answers}


def main() -> None:
    """Measure rows, print them, and keep them beside this file if they are all."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("rows", nargs="*", help=f"{', '.join(ROWS)}; none: all")
    parser.add_argument("--pairs", type=int, default=3)
    args = parser.parse_args()

    def measured(name: str) -> str:
        with tempfile.TemporaryDirectory() as folder:
            return ROWS[name](Path(folder), args.pairs)

    head = heading(("tensorflow", "tensorflow-cpu", "keras"))
    rows = {name: functools.partial(measured, name) for name in ROWS}
    print_and_keep(parser, args.rows, rows, head, "sweep")


if __name__ == "__main__":
    main()
