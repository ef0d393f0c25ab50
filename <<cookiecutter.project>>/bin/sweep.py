"""Train CONFIG with many settings, each in a run folder of its own below FOLDER.

python bin/sweep.py digits results/sweep --grid n_filters=8,16,32 --seeds 3 --jobs 2
python bin/sweep.py status results/sweep
python bin/sweep.py stop results/sweep
"""

import argparse
import functools
import os
import shlex
import signal
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import vegab
from configs import registry
from src import comparison, experiment, launch, sweep
from vegab.config import (
    Override,
    UnknownKeyError,
    did_you_mean,
    find_key,
    read_text,
    read_yaml,
    show,
)
from vegab.execution import say

# isort: split
import argh  # vegab tells what to do where it is not installed

PLAN = ("grid", "range", "random", "seeds")


def run(
    config: dict[str, Any],
    save_path: str,
    *,
    grid: Sequence[str] = (),
    range: Sequence[str] = (),
    random: int = 0,
    seeds: int = 0,
    plan: str = "",
    jobs: int = 1,
    retry_failed: bool = False,
    dry_run: bool = False,
) -> None:
    """Train CONFIG with many settings, each in a run folder of its own below SAVE_PATH.

    Args:
        config: the resolved config, which all trials share.
        save_path: folder of the sweep; the same command continues it
        grid: KEY=VALUE,VALUE,…; may be repeated: all combinations are trained
        range: KEY=LOW..HIGH or 'KEY=LOW..HIGH log', that --random draws from; may be repeated
        random: so many draws from the ranges, for each combination of the grid
        seeds: so many seeds of each, counted up from the config's
        plan: a YAML file that has these four under their names
        jobs: trials at a time
        retry_failed: train those again that have failed
        dry_run: print the trials, and train none
    """
    asked: dict[str, Any] = {
        "grid": list(grid),
        "range": list(range),
        "random": random,
        "seeds": seeds,
    }
    if plan:
        asked = with_plan(plan, asked)
    require_numbers({**asked, "jobs": jobs}, {"random": 0, "seeds": 0, "jobs": 1})
    args, key_of = TYPED.args, functools.partial(find_key, config)
    definition = sweep.Definition(
        config_name=args.config,
        config=config,
        words=shared_words(args),
        axes=sweep.axes_of(asked["grid"], key_of),
        ranges=sweep.ranges_of(asked["range"], key_of),
        num_random=asked["random"],
        num_seeds=asked["seeds"],
    )
    if bool(definition.num_random) != bool(definition.ranges):
        raise vegab.UsageError("--random and --range belong together; give both or none")
    folder = Path(save_path)
    trials = sweep.known_trials(folder, definition)
    check(args, trials)
    commands = {trial.name: words_of(definition, folder, trial) for trial in trials}
    if dry_run:
        for words in commands.values():
            print(shlex.join(["python", "bin/train.py", *words]))
        return
    with sweep.locked(folder):
        sweep.write(folder, definition, trials)
        sys.exit(train(folder, trials, commands, jobs, retry_failed))


class Typed(vegab.VegabPlugin):
    """Keeps the command line, for what the trials have in common."""

    args: argparse.Namespace

    def on_parsed_args(self, args: argparse.Namespace) -> None:
        """Keep it."""
        self.args = args


TYPED = Typed()


def with_plan(path: str, asked: dict[str, Any]) -> dict[str, Any]:
    """Return what a plan asks for, and what the command line does beside it.

    Raises:
        vegab.UsageError: if the file is no plan.
    """
    plan = read_yaml(read_text(Path(path)), path)
    if not isinstance(plan, dict):
        raise vegab.UsageError(f"{path} holds no plan; give it some of {', '.join(PLAN)}")
    for key in plan:
        if key not in PLAN:
            hint = did_you_mean(str(key), PLAN)
            raise vegab.UsageError(f"{path}: unknown key '{key}'{hint} ({', '.join(PLAN)})")
    for key in ("grid", "range"):
        entries = plan.get(key) or {}
        if not isinstance(entries, dict):
            raise vegab.UsageError(f"{path}: {key} is a mapping, such as {{n_filters: [8, 16]}}")
        for name, value in entries.items():
            if key == "grid" and not isinstance(value, list):
                raise vegab.UsageError(f"{path}: grid.{name} is {show(value)}; give a list")
            text = ",".join(map(show, value)) if key == "grid" else value
            asked[key].insert(0, f"{name}={text}")
    return asked | {key: asked[key] or plan.get(key, 0) for key in ("random", "seeds")}


def require_numbers(asked: dict[str, Any], least: dict[str, int]) -> None:
    """Refuse what is no number, or too small a one.

    Raises:
        vegab.UsageError: naming it.
    """
    for name, limit in least.items():
        if not isinstance(asked[name], int) or asked[name] < limit:
            raise vegab.UsageError(f"{name} is {asked[name]!r}; it must be at least {limit}")


def shared_words(args: argparse.Namespace) -> list[str]:
    """Return the part of the trials' command line that they share, after CONFIG and folder."""
    words = [word for base in args.base for word in ("-b", base)]
    words += [word for key in args.delete for word in ("--delete", key)]
    for key, value in args.overrides.items():
        try:
            registry.draft(args.config, args.base).resolve([Override(key, value)])
            words.append(f"--{key}={show(value)}")
        except UnknownKeyError:  # only -p adds a key
            words += ["-p", key, show(value)]
    return words


def words_of(definition: sweep.Definition, folder: Path, trial: sweep.Trial) -> list[str]:
    """Return the command line of a trial, after the program's name."""
    own = [f"--{key}={show(value)}" for key, value in trial.settings.items()]
    return [definition.config_name, os.path.join(folder, trial.name), *definition.words, *own]


def check(args: argparse.Namespace, trials: Sequence[sweep.Trial]) -> None:
    """Resolve each trial's config, and look at its ranges.

    Raises:
        vegab.UsageError: naming the trial that cannot be.
    """
    given = [Override(key, value, adds=True) for key, value in args.overrides.items()]
    given += [Override(key, None, deletes=True) for key in args.delete]
    draft = registry.draft(args.config, args.base, [override.key for override in given])
    for trial in trials:
        own = [Override(key, value) for key, value in trial.settings.items()]
        try:
            experiment.check_ranges(draft.resolve([*given, *own]))
        except vegab.UsageError as error:
            raise vegab.UsageError(f"{trial.name}: {error}") from error


def train(
    folder: Path,
    trials: Sequence[sweep.Trial],
    commands: dict[str, list[str]],
    jobs: int,
    retry_failed: bool,
) -> int:
    """Train what is not done yet, say how the sweep stands, and return the exit code."""
    from tqdm import tqdm

    stops: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, lambda received, _: stops.append(received))
    launcher = launch.LocalLauncher(jobs, folder / ".output", lambda: bool(stops))
    with tqdm(total=len(trials), disable=None, unit="trial", dynamic_ncols=True) as bar:

        def show_line(text: str, done: int) -> None:
            bar.set_postfix_str(text, refresh=False)
            bar.update(done - bar.n)
            bar.refresh()

        sweeper = sweep.Sweeper(folder, commands, launcher, show_line)
        records = sweeper.run(trials, retry_failed)
    print(sweep.summary(records), flush=True)
    for record in records:
        if record.state == "failed":
            say(f"{record.path} failed: {record.error}")
    for sentence in sweeper.refused.values():
        say(sentence.removeprefix("train.py: "))
    if stops:
        say(f"interrupted; the same command continues {folder}")
        return sweep.INTERRUPTED
    return sweep.FINISHED if all(record.state == "finished" for record in records) else 1


@argh.arg("folder", metavar="FOLDER", help="of a sweep")
def status(folder: str) -> None:
    """Print a line a trial, and one for the whole."""
    place = Path(folder)
    records = sweep.states_of(place, sweep.read(place)[1])
    print(comparison.as_text(comparison.listing(records)), end="")
    print(sweep.summary(records))


@argh.arg("folder", metavar="FOLDER", help="of a sweep")
def stop(folder: str) -> None:
    """Tell the process that sweeps a folder to stop: its trials commit and end."""
    place = Path(folder)
    _, trials = sweep.read(place)
    owner = sweep.owner_of(place)
    if owner is None:
        print(f"nobody sweeps {folder}")
    elif owner["host"] != socket.gethostname():
        raise vegab.UsageError(f"{folder} is being swept on {owner['host']}; stop it there")
    else:
        os.kill(owner["pid"], signal.SIGTERM)
        while sweep.owner_of(place):
            time.sleep(sweep.SECONDS_BETWEEN)
    print(sweep.summary(sweep.states_of(place, trials)))


if __name__ == "__main__":
    if sys.argv[1:2] in (["status"], ["stop"]):
        vegab.wrap_commands(status, stop)
    else:
        vegab.wrap(registry, run, plugins=[TYPED], opens_folder=False)
