"""How long one waits: for a new project, for `--help`, and for the answer to a mistyped command.

    make benchmark                  # writes benchmarks/startup.txt
    make benchmark ARGS='--runs=5'

What is committed is measured. Each command is run `--runs` times, in turn with the others, after
one run that does not count. The table has the median, the fastest and the slowest in seconds, and
the median as a multiple of that of `python -c pass`, to compare between machines.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOTHING = "python -c pass"
BAKE = "cookiecutter --no-input"

# What is typed in a generated project, and the exit code that it must have.
COMMANDS = {
    "python bin/train.py --help": 0,
    "python bin/train.py digits results/new --n_filter=10": 2,
    "python bin/train.py digits results/new --n_filters=many": 2,
    "python bin/train.py digit results/new": 2,
    "python bin/train.py digits pyproject.toml": 2,
    "python bin/train.py digits results/new --dry_run": 0,
    "python bin/evaluate.py --help": 0,
}


def seconds(command: list[str], folder: Path, code: int) -> float:
    """Return the wall-clock time of a command, whose exit code must be `code`."""
    start = time.perf_counter()
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    elapsed = time.perf_counter() - start
    if done.returncode != code:
        sys.exit(f"{command} ended with {done.returncode}, not {code}:\n{done.stdout}{done.stderr}")
    return elapsed


def measure(runs: int) -> dict[str, list[float]]:
    """Return the times of every command by what is typed."""
    times: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        template = f"{name}/template"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), template], check=True)
        bake = [sys.executable, "-m", "cookiecutter", template, "--no-input", "--output-dir", name]
        for run in range(runs + 1):
            project = folder / "my-research"
            if project.exists():
                shutil.rmtree(project)
            round_times = {BAKE: seconds(bake, folder, 0)}
            round_times[NOTHING] = seconds([sys.executable, "-c", "pass"], folder, 0)
            for program in sorted({typed.split()[1] for typed in COMMANDS}):  # compiles the project
                seconds([sys.executable, program, "--help"], project, 0)
            for typed, code in COMMANDS.items():
                command = [sys.executable, *typed.split()[1:]]
                round_times[typed] = seconds(command, project, code)
            if run > 0:  # the first one fills the caches of the disk
                for typed, elapsed in round_times.items():
                    times.setdefault(typed, []).append(elapsed)
    return times


def table(times: dict[str, list[float]]) -> str:
    """Return the times as text."""
    width = max(map(len, times))
    unit = statistics.median(times[NOTHING])
    lines = [f"{'':{width}}  median  fastest  slowest  multiple"]
    for typed, samples in times.items():
        median = statistics.median(samples)
        lines.append(
            f"{typed:{width}}  {median:6.3f}  {min(samples):7.3f}  {max(samples):7.3f}"
            f"  {median / unit:8.1f}"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure, print the table and keep it beside this file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=15)
    runs = parser.parse_args().runs
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}"
    heading = f"Python {platform.python_version()} on {machine}; {runs} runs, in seconds"
    text = f"{heading}\n\n{table(measure(runs))}\n"
    print(text, end="")
    (ROOT / "benchmarks" / "startup.txt").write_text(text)


if __name__ == "__main__":
    main()
