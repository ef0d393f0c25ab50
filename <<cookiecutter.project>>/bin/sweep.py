#!/usr/bin/env python
"""Train CONFIG with many settings, each in a run folder of its own below FOLDER.

python bin/sweep.py digits results/sweep --grid n_filters=8,16,32 --seeds 3 --jobs 2
python bin/sweep.py digits results/search --range 'learning_rate=1e-4..1e-1 log' \\
    --search optuna --trials 50 --pruner median
python bin/sweep.py status results/sweep
python bin/sweep.py stop results/sweep"""

import argparse  # PYTHON_ARGCOMPLETE_OK
import contextlib
import functools
import json
import os
import shlex
import shutil
import signal
import socket
import sys
import time as clock
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import vegab
from configs import registry
from engine import sweeps
from engine.runs import comparison, reproduction
from engine.sweeps import Launcher, LocalLauncher, slurm, sweep
from engine.sweeps import definition as sweep_trials
from src import experiment
from vegab.command_line import argh  # which says what to do if it is missing
from vegab.config import CONFIG_SUFFIXES, Override, UnknownKeyError, find_key, show
from vegab.execution import print_line, say
from vegab.exits import FAILED, FINISHED, INTERRUPTED, REFUSED
from vegab.files import LOCK
from vegab.run_folder import living_owner, refuse_links, start_of

TYPED = vegab.VegabPlugin()  # keeps the command line, for what the trials have in common


def run(
    config: dict[str, Any],
    save_path: str,
    *,
    grid: Sequence[str] = (),
    range: Sequence[str] = (),
    random: int = 0,
    seeds: int = 0,
    folds: int = 0,
    search: str = "",
    trials: int = 0,
    pruner: str = "",
    plan: str = "",
    launcher: str = "local",
    jobs: int | None = None,
    gpus: str = "",
    per_gpu: int = 1,
    partition: str = "",
    time: str = "",
    max_parallel: int = 0,
    address: str = "",
    retry_failed: bool = False,
    detach: bool = False,
    own_code: bool = False,
    allow_inexact: bool = False,
    dry_run: bool = False,
) -> None:
    """Train CONFIG with many settings, each in a run folder of its own below SAVE_PATH.

    Args:
        config: the resolved config, which all trials share.
        save_path: folder of the sweep; the same command continues it
        grid: KEY=VALUE,VALUE,…; may be repeated: all combinations are trained
        range: KEY=LOW..HIGH or 'KEY=LOW..HIGH log', to draw or choose from; may be repeated
        random: how many draws from the ranges to train, for each combination of the grid
        seeds: how many seeds to train each setting with, counted up from the config's
        folds: cross-validation with N folds; each trial trains on all but one of them
        search: optuna: let Optuna choose from grid and ranges by what it learns from earlier trials
        trials: how many settings the search is to choose
        pruner: median, halving or hyperband: end trials early that do worse than others
        plan: a YAML file that has these flags as keys, and may have config and overrides
        launcher: what starts the trials: local, slurm or ray
        jobs: local: trials at a time; by default as many as there are GPUs or cores for
        gpus: local: the GPUs to share out, such as 0,1; slurm, ray: how many for each trial
        per_gpu: local: trials at a time on each GPU
        partition: slurm: the partition to queue in
        time: slurm: time limit of a job, such as 4:00:00; a job that reaches it is queued again
        max_parallel: slurm, ray: trials at a time; 0: as many as there is room for
        address: ray: the cluster's, such as head:6379; by default one is started on this machine
        retry_failed: train failed trials again
        detach: go on in the background; status shows how far the sweep is, stop ends it
        own_code: go on with the code that the sweep began with, not that of the project
        allow_inexact: train although a step uses what no checkpoint holds
        dry_run: print the trials, and train none"""
    numbers = {"random": random, "seeds": seeds, "folds": folds, "trials": trials}
    asked: dict[str, Any] = {**numbers, "grid": list(grid), "range": list(range)}
    asked |= {"search": search, "pruner": pruner}
    sweep_trials.require_numbers(0, **numbers, max_parallel=max_parallel)
    sweep_trials.require_numbers(1, jobs=1 if jobs is None else jobs, per_gpu=per_gpu)
    args, folder = TYPED.args, Path(save_path)
    if folds:
        if not {"num_folds", "fold"} <= config.keys():
            hint = "which say how the data is split; see is_valid in src/data.py"
            raise vegab.UsageError(f"--folds: {args.config} has no keys num_folds and fold, {hint}")
        args.overrides["num_folds"] = folds
        config = {**config, "num_folds": folds}
    os.environ.pop("TF_CONFIG", None)  # a trial trains by itself
    stops: list[int] = []
    sweep_trials.require_one_of(("local", "slurm", "ray"), "launcher", launcher)
    places = {"outputs": folder / sweep.OUTPUTS, "is_stopped": lambda: bool(stops)}
    threads = config.get("threads")
    if launcher == "local":
        starts: Launcher = LocalLauncher(jobs, gpus, per_gpu, threads, **places)
    elif launcher == "slurm":
        starts = slurm.SlurmLauncher(gpus, partition, time, max_parallel, **places)
    else:
        starts = sweeps.RayLauncher(gpus, address, max_parallel, threads, **places)
    definition = definition_of(config, asked)
    definition, known = sweep.taken_up(folder, definition, registry.completed)
    for corner in sweep_trials.corners(definition) if definition.search else ():
        definition.resolve(corner)  # or raise a UsageError
    more = ["--allow_inexact"] if allow_inexact else []

    def command_of(trial: sweep_trials.Trial) -> list[str]:
        own = [f"--{key}={show(value)}" for key, value in trial.settings.items()]
        run = os.path.join(folder, trial.name)
        return [definition.config_name, run, *definition.words, *own, *more]

    if dry_run:
        for trial in known:
            print(shlex.join(["python", "bin/train.py", *command_of(trial)]))
        if definition.search:
            print(f"{definition.trials} settings in all, chosen as earlier ones end")
        return
    source = folder / vegab.snapshot.CODE
    vegab.snapshot.go_on_from(source)
    was_there = folder.exists()
    if detach:
        sweep.require_unlocked(folder)
        leave_terminal(folder)
    with sweep.locked(folder):
        if not source.exists():
            vegab.snapshot.keep(vegab.snapshot.take(), source)
        is_new = not (folder / sweep.SWEEP).exists()
        sweep.write(folder, definition, known, [] if is_new else sweep.read(folder)[2])
        sweeper = sweep.Sweeper(folder, lambda refused: known, command_of, starts)
        total = len(known)
        if definition.search:
            room = functools.partial(max, 1, max_parallel or starts.num_parallel)
            sweeper.advance = sweeps.Search(folder, definition, room).advance
            total = definition.trials * len(sweep_trials.repeats(definition))
        code = train(sweeper, total, stops, retry_failed)
    if code == REFUSED and is_new:  # nothing was trained: leave nothing behind but what it said
        for path in folder.iterdir():
            if path.name != sweep.LOG:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        if not (was_there or detach):
            folder.rmdir()
    sys.exit(code)


def leave_terminal(folder: Path) -> None:
    """Go on in a process that has no terminal, and end this one."""
    folder.mkdir(parents=True, exist_ok=True)
    if pid := os.fork():
        name = shlex.quote(str(folder))
        print(f"process {pid} sweeps {folder}, and writes to {folder / sweep.LOG}")
        print(f"python bin/sweep.py status {name} shows how far it is, stop ends it", flush=True)
        os._exit(FINISHED)
    os.setsid()
    write_to_log(folder)


def write_to_log(folder: Path) -> None:
    """Let a file take the place of a terminal that is gone or is about to go."""
    log = os.open(folder / sweep.LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for number in (1, 2):
        os.dup2(log, number)
    os.close(log)


def definition_of(config: dict[str, Any], asked: dict[str, Any]) -> sweep_trials.Definition:
    """Return the sweep that is asked for. Raises vegab.UsageError if it makes no sense."""
    args = TYPED.args
    given = dict(args.overrides)
    if asked["pruner"]:
        given["hooks"] = [*config["hooks"], {"class": reproduction.PRUNING}]
    key_of = functools.partial(find_key, config)
    asked["grid"] = sweep_trials.grid_of(asked["grid"], key_of)
    asked["range"] = sweep_trials.ranges_of(asked["range"], key_of)
    asked |= {"words": shared_words(args, given), "resolve": resolver(args)}
    definition = sweep_trials.Definition(args.config, config, **asked)
    sweep_trials.check_search(definition)
    return definition


def shared_words(args: argparse.Namespace, overrides: dict[str, Any]) -> list[str]:
    """Return the part of the trials' command line that they share, after CONFIG and folder."""
    words = [word for base in args.base for word in ("-b", base)]
    words += [word for key in args.delete for word in ("--delete", key)]
    for key, value in overrides.items():
        try:
            registry.draft(args.config, args.base).resolve([Override(key, value)])
            words.append(f"--{key}={show(value)}")
        except UnknownKeyError:  # only -p adds a key
            words += ["-p", key, show(value)]
    return words


def resolver(args: argparse.Namespace) -> Callable[[sweep_trials.Settings], dict[str, Any]]:
    """Return what makes a trial's config of its settings, or raises vegab.UsageError."""

    given = [Override(key, value, adds=True) for key, value in args.overrides.items()]
    given += [Override(key, None, deletes=True) for key in args.delete]
    draft = registry.draft(args.config, args.base)

    @functools.cache
    def config_of(text: str) -> dict[str, Any]:
        own = json.loads(text)
        try:
            config = draft.resolve([*given, *(Override(key, own[key]) for key in own)])
            experiment.check_ranges(config)
        except vegab.UsageError as error:
            raise vegab.UsageError(f"{sweep_trials.name_of(own)}: {error}") from error
        return config

    return lambda settings: config_of(json.dumps(settings))


def train(sweeper: sweep.Sweeper, total: int, stops: list[int], retry_failed: bool) -> int:
    """Train what is not done yet, say how the sweep stands, and return the exit code."""
    from tqdm import tqdm

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda received, _: stops.append(received))
    signal.signal(signal.SIGHUP, lambda *_: write_to_log(sweeper.folder))  # its terminal is closed
    line = "{bar}| {remaining} left{postfix}"
    with tqdm(total=total, disable=None, smoothing=0, dynamic_ncols=True, bar_format=line) as bar:
        bar.initial = total  # until it is known

        def show_line(running: int, done: int, failed: int, best: str) -> None:
            bar.n = done + failed
            bar.initial = min(bar.initial, bar.n)  # what was there before took no time
            waiting = f"{max(total - bar.n - running, 0)} waiting"
            state = f"{waiting}, {running} running, {done} done, {failed} failed"
            bar.set_postfix_str(", ".join(filter(None, (state, best))))

        records = sweeper.run(retry_failed, show_line)
    folder, is_refused = sweeper.folder, sweeper.num_refusals == len(records)
    if not is_refused:
        sweeps.write_sweep(records, folder)
        print_line(sweep.summary(records))
        print(f"what the settings do: {folder / sweeps.SWEEP_PAGE}", flush=True)
        for sentence in sweep.problems(folder, records):
            say(sentence)
    for sentence in dict.fromkeys(sweeper.refused.values()):
        say(sentence.removeprefix("train.py: "))
    if is_refused:
        return REFUSED
    total = max(total, len(records)) if stops else len(records)  # else none is left to be chosen
    num_finished = sum(record.state == "finished" for record in records)
    print(f"{num_finished} of {total} trials are finished", flush=True)
    if stops:
        say(f"interrupted; the same command continues {folder}")
        return INTERRUPTED
    return FINISHED if num_finished == len(records) else FAILED


def words_with_plan(argv: list[str]) -> list[str]:
    """Return a command line, the CONFIG and the overrides of its --plan before what was typed."""
    flags = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    flags.add_argument("--plan")
    for name in ("--grid", "--range"):
        flags.add_argument(name, action="append", default=[])
    typed, others = flags.parse_known_args(argv)
    if not typed.plan:
        return argv
    varied = {text.partition("=")[0].strip() for text in (*typed.grid, *typed.range)}
    first = next((word for word in others if not word.startswith("-")), "")
    is_config_typed = first in registry or first.endswith(CONFIG_SUFFIXES)
    words = sweep_trials.words_of_plan(typed.plan, is_config_typed)
    return [*(word for word in words if "".join(word.split("=")[1:2]) not in varied), *argv]


@argh.arg("folder", metavar="FOLDER", help="of a sweep")
def status(folder: str) -> None:
    """Print a line per trial, or, of many, those that need a look and the best; and one for all."""
    place = Path(folder)
    records = sweep.states_of(place, sweep.read(place)[1])
    shown = sweep.to_look_at(records)
    print(comparison.for_terminal(comparison.listing(shown)), end="")
    if more := len(records) - len(shown):
        print(f"and {more} more: python bin/runs.py list {shlex.quote(folder)}")
    more_lines = sweep.problems(place, shown)
    with contextlib.suppress(vegab.UsageError):  # it may be typed where no SLURM is
        more_lines += slurm.queue_of(place / sweep.OUTPUTS)
    for line in more_lines:
        print_line(line)
    print_line(sweep.summary(records))


@argh.arg("folder", metavar="FOLDER", help="of a sweep")
def stop(folder: str) -> None:
    """End the sweep in FOLDER and its trials, which save a checkpoint first."""
    place = Path(folder)
    _, trials, _ = sweep.read(place)
    refuse_links(place, folder)  # a trial that is elsewhere may be another's run
    if living_owner(place, sweep.LOCK) is None:
        told = slurm.stop_all(place / sweep.OUTPUTS)
        print(f"nobody sweeps {folder}" + "; its jobs in SLURM were told to end" * told)
    end_all([place], sweep.LOCK)
    end_all([place / trial.name for trial in trials])  # they outlive a sweeper that is killed
    print_line(sweep.summary(sweep.states_of(place, trials)))


def end_all(folders: Sequence[Path], lock: str = LOCK) -> None:
    """Tell the holders of these folders to end, and wait; UsageError for one on another host."""
    ended: set[int] = set()
    while living := {str(path): owner for path in folders if (owner := living_owner(path, lock))}:
        for path, owner in living.items():
            if owner["host"] != socket.gethostname():
                raise vegab.UsageError(f"{path} is in use on {owner['host']}; stop it there")
            if owner["start"] is None or owner["start"] != start_of(owner["pid"]):
                raise vegab.UsageError(
                    f"{path} is in use by process {owner['pid']}, and its lock does not prove that "
                    "this process took it; look what it is, and end it yourself"
                )
            if owner["pid"] not in ended:
                ended.add(owner["pid"])
                with contextlib.suppress(ProcessLookupError):
                    os.kill(owner["pid"], signal.SIGTERM)
        clock.sleep(sweep.SECONDS_BETWEEN)


if __name__ == "__main__":
    if sys.argv[1:2] in (["status"], ["stop"]):
        vegab.wrap_commands(status, stop)
    else:
        vegab.wrap(registry, run, plugins=[TYPED], opens_folder=False, rewrite=words_with_plan)
