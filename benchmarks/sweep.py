"""What a sweep costs beside the same commands typed one by one, and how fast it answers.

    python benchmarks/sweep.py                  # all rows; writes benchmarks/sweep.txt
    python benchmarks/sweep.py wall --pairs 1   # some rows; writes nothing

Both sides of `wall` train the digits config with 32 settings for 2 epochs, two at a time, in turn:
ours by one command, the other by 32 commands of `bin/train.py`. The sides of `others` are Hydra and
Ray Tune with the same model by `model.fit`, see `benchmarks/others.py`; they are measured where
they are installed: `pip install hydra-core hydra-joblib-launcher "ray[tune]"`. The trials of
`overhead` leave what a finished run leaves, and do nothing beside. Both sides of `workers` train
the same network on the same batches, in turn: one by two workers with a thread each, the other by
one process with a thread for each core.
"""

from __future__ import annotations

import argparse
import csv
import functools
import importlib.util
import json
import os
import runpy
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
from typing import Any

import runs
from loop import PHOTOGRAPHS, PROJECT, ROOT, heading, memory, print_and_keep, spread

sys.path.insert(0, str(PROJECT))

SWEEP = (sys.executable, str(PROJECT / "bin" / "sweep.py"))
OTHERS = ("hydra", "hydra_plugins.hydra_joblib_launcher", "ray.tune")
SETTINGS = ("--num_epochs=2", "--grid", "n_filters=4,6,8,10", "--seeds=8")
NUMBER = 5_000
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
    from engine.sweeps import definition as sweep_trials
    from engine.sweeps import sweep

    trials = [sweep_trials.Trial(path.name, {}) for path in place.iterdir() if path.is_dir()]
    sweep.write(place, sweep_trials.Definition("root", {}, [], {}, {}, 0, 0), trials)
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


def workers(folder: Path, pairs: int) -> str:
    """Images a second of two workers over loopback over those of one process."""
    ratios, rates = [], []
    for pair in range(pairs):
        sides = {number: folder / f"{number}-{pair}" for number in (2, 1)}
        for number in sides if pair % 2 else reversed(sides):
            train_together(sides[number], number)
        rate = {number: steps_per_second(run) * 128 for number, run in sides.items()}
        ratios.append(rate[2] / rate[1])
        rates.append(rate)
    medians = [statistics.median(rate[number] for rate in rates) for number in (2, 1)]
    said = "reached" if statistics.median(ratios) >= 0.9 else "NOT REACHED"
    return (
        "CIFAR-shaped CNN, batch 128, images/s: two workers over loopback / one process\n"
        f"    {spread(ratios)}, {pairs} pairs  >= 0.9: {said}  "
        f"[{medians[0]:.0f} : {medians[1]:.0f} images/s]"
    )


def train_together(run: Path, number: int) -> None:
    """Train the photographs of `loop.py` for seven epochs by so many workers."""
    from engine.devices import workers

    settings = PHOTOGRAPHS | {"threads": 1 if number > 1 else None, "num_epochs": 7}
    flags = [
        f"--{key}={json.dumps(value)}" for key, value in settings.items() if value is not False
    ]
    flags += [f"--no_{key}" for key, value in settings.items() if value is False]
    command = [sys.executable, "bin/train.py", "digits", str(run), "--lr_schedule=null", *flags]
    processes = []
    for index, config in enumerate(workers.on_this_machine(number)):
        here = os.environ | {"TF_CONFIG": config, "PYTHONPATH": str(ROOT / "benchmarks")}
        with open(f"{run}-{index}.txt", "w") as said:
            processes.append(
                subprocess.Popen(command, cwd=PROJECT, env=here, stdout=said, stderr=said)
            )
    codes = [process.wait() for process in processes]
    if any(codes):
        sys.exit("\n".join(Path(f"{run}-{index}.txt").read_text() for index in range(number)))


def steps_per_second(run: Path) -> float:
    """Return the median over a run's epochs, without the first three, in which it compiles."""
    with open(run / "timing.csv", newline="") as file:
        rates = [float(row["steps_per_second"]) for row in csv.DictReader(file)]
    return statistics.median(rates[3:])


def others(folder: Path, pairs: int) -> str:
    """Wall time of 32 trials over that of the better of Hydra and Ray Tune."""
    missing = [name for name in OTHERS if not is_there(name)]
    if missing:
        return (
            "the same over Hydra's multirun with joblib and over Ray Tune\n"
            '    not measured: pip install hydra-core hydra-joblib-launcher "ray[tune]"'
        )
    import others as side

    def hydra() -> None:
        run_other(
            *("--multirun", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"),
            *(f"hydra.sweep.dir={folder / 'hydra'}", f"n_filters={joined(side.FILTERS)}"),
            f"seed={joined(side.SEEDS)}",
        )

    def run_other(*words: str) -> None:
        command = [sys.executable, side.__file__, *words]
        subprocess.run(command, cwd=folder, check=True, capture_output=True)

    sides: dict[str, Callable[[], object]] = {
        "ours": functools.partial(call, "digits", folder / "ours", *SETTINGS, "--jobs=2"),
        "hydra": hydra,
        "tune": functools.partial(run_other, str(folder)),
    }
    times: list[dict[str, float]] = []
    for pair in range(pairs):
        seconds = {}
        for name in sides if pair % 2 else reversed(sides):
            seconds[name] = timed(sides[name])
        number = len(side.FILTERS) * len(side.SEEDS)
        for pattern in ("ours/*/model.h5", "hydra/*/model.keras", "tune/*/model.keras"):
            if len(list(folder.glob(pattern))) != number:
                sys.exit(f"{pattern}: not {number} trials")
        times.append(seconds)
        for name in sides:
            shutil.rmtree(folder / name)
    ratios = [pair["ours"] / min(pair["hydra"], pair["tune"]) for pair in times]
    medians = {name: statistics.median(pair[name] for pair in times) for name in sides}
    said = "reached" if statistics.median(ratios) <= 0.8 else "NOT REACHED"
    return (
        "32 trials of the digits config, 2 epochs, 2 at a time: wall time over the better of "
        "Hydra's multirun with joblib and Ray Tune, which train the same model by model.fit\n"
        f"    {spread(ratios)}, {pairs} times  <= 0.8: {said}  "
        f"[{medians['ours']:.0f} : Hydra {medians['hydra']:.0f}, Ray Tune {medians['tune']:.0f} s]"
    )


def is_there(module: str) -> bool:
    """Return whether a module is installed; it is not imported, but what it lies in is."""
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:
        return False


def joined(values: tuple[int, ...]) -> str:
    """Return values as Hydra's command line has them."""
    return ",".join(map(str, values))


def overhead(folder: Path, pairs: int) -> str:
    """What a sweep of trials that do nothing costs for each of them."""
    runs.make(folder, 1)
    (folder / "results" / "run_0").rename(folder / "run")
    times, floors, processor, peaks = [], [], [], []
    for _ in range(pairs):
        words = ["root", str(folder / "sweep"), *MANY, "--jobs=2"]
        report = sweeper(folder, *words)
        names = len(list((folder / "sweep").glob("*/meta.json")))
        if names != NUMBER:
            sys.exit(f"{names} trials were run, not {NUMBER}")
        floors.append(sweeper(folder)["wall"] / NUMBER * 1000)
        times.append(report["wall"] / NUMBER * 1000 - floors[-1])
        processor.append(report["processor"] / NUMBER * 1000)
        peaks.append(report["peak"])
        shutil.rmtree(folder / "sweep")
    reached = {True: "reached", False: "NOT REACHED"}
    return (
        "5,000 trials that only leave the folder of a finished run, 2 at a time: milliseconds a "
        "trial that the sweep takes longer than its fork server takes to fork as many processes "
        "that do the same; the sweeper's own processor time; its peak of memory\n"
        f"    {spread(times)} ms and {spread(processor)} ms, {pairs} times  <= 10: "
        f"{reached[max(map(statistics.median, (times, processor))) <= 10]}  "
        f"[forks {spread(floors)} ms]\n"
        f"    {spread(peaks, '.0f')} MB  <= 200: {reached[statistics.median(peaks) <= 200]}"
    )


def sweeper(folder: Path, *words: str) -> dict[str, float]:
    """Return what a process reports of a sweep with this command line; without one, of the forks.

    Args:
        folder: of the run that each trial copies, `run`.
        words: of `bin/sweep.py`.
    """
    command = [sys.executable, __file__, "--sweeper", str(folder), *words]
    subprocess.run(command, cwd=PROJECT, check=True, capture_output=True)
    return json.loads((folder / "report.json").read_text())


def side_sweeper(folder: Path, words: list[str]) -> None:
    """In a process of its own: run `bin/sweep.py`, or only the processes that it would fork."""
    from engine.sweeps import local as launch

    def begin_copying(self: Any, name: str, words: list[str]) -> Any:
        process = self._processes.Process(target=shutil.copytree, args=(folder / "run", words[1]))
        with launch._apart():
            process.start()
        self.held[process] = self.places.pop(0)
        return process

    launch.LocalLauncher.begin = begin_copying
    begin, begin_processor = time.perf_counter(), time.process_time()
    if words:
        sys.argv = [SWEEP[1], *words]
        try:
            runpy.run_path(SWEEP[1], run_name="__main__")
        except SystemExit as end:
            if end.code:
                raise
    else:
        places = {"outputs": folder / "said", "is_stopped": lambda: False}
        launcher = launch.LocalLauncher(2, "", 1, None, **places)
        commands = {str(n): ["root", str(folder / "forks" / str(n))] for n in range(NUMBER)}
        launcher.run(commands, lambda running, codes: {})
        shutil.rmtree(folder / "forks")
    report = {
        "wall": time.perf_counter() - begin,
        "processor": time.process_time() - begin_processor,
        "peak": memory("VmHWM"),
    }
    (folder / "report.json").write_text(json.dumps(report))


ROWS = {
    "wall": wall,
    "others": others,
    "overhead": overhead,
    "answers": answers,
    "workers": workers,
}


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
    if sys.argv[1:2] == ["--sweeper"]:
        side_sweeper(Path(sys.argv[2]), sys.argv[3:])
    else:
        main()
