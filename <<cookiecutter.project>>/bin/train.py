#!/usr/bin/env python
"""Train CONFIG into the folder SAVE_PATH; the same command continues an interrupted run."""

import argparse  # PYTHON_ARGCOMPLETE_OK
import logging
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import vegab
from configs import registry
from engine import checkpoints, endings
from engine.devices import gpus as devices
from engine.devices import workers
from engine.experiment import Experiment, commit_to_fork
from engine.runs import results
from engine.training import fingerprint
from src import experiment
from vegab.exits import FAILED, REFUSED
from vegab.run_folder import RunFolder

log = logging.getLogger(__name__)


def train(
    config: dict[str, Any],
    save_path: str,
    prepared: Experiment,
    *,
    checkpoint: str = "",
    retrain: bool = False,
    fork: str = "",
    from_epoch: int = 0,
    warm_start: str = "",
    warm_start_vars: str = ".*",
    evaluation: Sequence[str] = (),
    name: str = "",
    gpus: str = "",
    own_code: bool = False,
    resume_inexact: bool = False,
    allow_inexact: bool = False,
    launcher: str = "local",
    nodes: int = 1,
    partition: str = "",
    time: str = "",
) -> None:
    """Train CONFIG into the folder SAVE_PATH; the same command continues an interrupted run.

    Args:
        config: the resolved config.
        save_path: the run folder.
        prepared: what the config stands for.
        checkpoint: begin with this file, or with the latest checkpoint of this run folder
        retrain: with --checkpoint: take only the weights, and begin at step 0
        fork: begin with the state of the run in this folder
        from_epoch: with --fork: after this epoch, if the run keeps a checkpoint of it; 0: the last
        warm_start: begin with the weights of a run, checkpoint or .keras file
        warm_start_vars: take only weights whose path matches this regular expression
        evaluation: evaluate with this config, too; may be repeated
        name: train into SAVE_PATH_NAME
        gpus: such as 0,1; none: use the CPU; -1: use idle GPUs; slurm: how many per node
        own_code: run the code that this run began with
        resume_inexact: continue although code, data or versions differ
        allow_inexact: train although checkpoints will lack some state
        launcher: local: train here; slurm: in a job that is queued again until the run is finished
        nodes: slurm: number of nodes to train on
        partition: slurm: the partition to queue in
        time: slurm: time limit of a job, such as 4:00:00"""
    from engine.hooks import UnreadSettings  # with Keras
    from src.data import Dataset

    log.info("%s", prepared.shown())
    hooks = prepared.hooks(vegab.terminal())
    if isinstance(prepared.dataset, Dataset):
        hooks.append(UnreadSettings(prepared.config, registry.get_root_config()))
    with workers.ends_with_the_others():
        start = start_of(save_path, checkpoint, fork, from_epoch)
        experiment.train(prepared, Path(save_path), hooks, start_from=start, retrain=retrain)
    if workers.is_follower():
        return
    then = f"python bin/evaluate.py {shlex.quote(save_path)}"
    log.info("%s is finished; next: %s", save_path, then)
    program = Path(__file__).with_name("evaluate.py")
    for file in evaluation:
        command = [sys.executable, str(program), save_path, "-e", file]
        code = subprocess.run(command, check=False).returncode
        if code != 0:
            reason = endings.ending(code) if endings.signal_of(code) else "what it said is above"
            raise ChildProcessError(f"the evaluation with {file} failed: {reason}")


def prepare(
    config: dict[str, Any],
    save_path: str,
    resume_inexact: bool,
    allow_inexact: bool,
    checkpoint: str,
    retrain: bool,
    fork: str,
    from_epoch: int,
    warm_start: str,
    warm_start_vars: str,
    evaluation: Sequence[str],
    gpus: str,
) -> Experiment:
    """Build what the config stands for, and look at what the flags name."""
    if retrain and not checkpoint:
        raise vegab.UsageError("--retrain needs the weights to begin with: add --checkpoint=PATH")
    if from_epoch and not fork:
        raise vegab.UsageError("--from_epoch needs the run to begin with: add --fork=RUN")
    beginnings = {"--fork": fork, "--checkpoint": checkpoint, "--warm_start": warm_start}
    given = [flag for flag, value in beginnings.items() if value]
    if len(given) > 1:
        raise vegab.UsageError(f"{' and '.join(given)} both say what to begin with; give one")
    if checkpoint:
        commit_of(checkpoint)
    start = start_of(save_path, checkpoint, fork, from_epoch)
    for file in evaluation:
        if not Path(file).is_file():
            raise vegab.UsageError(f"-e {file}: there is no such file")
    devices.choose_gpus(gpus)
    with workers.ends_with_the_others():
        asked = {"start": None if retrain else start, "resume_inexact": resume_inexact}
        prepared = experiment.build(config, save_path, **asked, together=True)
        prepared = prepared.with_work(allow_inexact)
        if start:
            prepared.check_start(start, retrain, *given)
    if start and not retrain:
        prepared.require_more_to_do(start, *given)
    if not Path(save_path, checkpoints.LATEST).exists():
        named = prepared.changes.get("warm_start")  # by a variant
        if warm_start:
            prepared.warm_start(Path(warm_start), warm_start_vars)
        elif named and not start:
            prepared.warm_start(Path(named), prepared.changes["warm_start_vars"])
    return prepared


def start_of(save_path: str, checkpoint: str, fork: str, from_epoch: int) -> Path | None:
    """Return the checkpoint of another run to begin with; None if the run has its own."""
    if Path(save_path, checkpoints.LATEST).exists() or not (checkpoint or fork):
        return None
    return commit_to_fork(Path(fork), from_epoch).path if fork else commit_of(checkpoint)


def commit_of(checkpoint: str) -> Path:
    """Return the file that --checkpoint names: a checkpoint, or a run folder's latest one."""
    path = Path(checkpoint, checkpoints.LATEST) if Path(checkpoint).is_dir() else Path(checkpoint)
    if not path.is_file():
        hint = "give a run folder, its model.h5 or one in its checkpoints/"
        raise vegab.UsageError(f"there is no checkpoint {path}; {hint}")
    return path


def parent(args: argparse.Namespace) -> dict[str, Any]:
    """Return which run --fork names, and where in it this one begins; without it, {}."""
    if not (fork := args.flags["fork"]):
        return {}
    commit = commit_to_fork(Path(fork), args.flags["from_epoch"])
    return {"path": fork, "from_epoch": commit.epoch, "from_step": commit.state["global_step"]}


class Launch(vegab.VegabPlugin):
    """Submits a job that follows the command line, where --launcher says so, and ends."""

    def on_parsed_args(self, args: argparse.Namespace) -> None:
        """Look at flags and folder, and submit; without --launcher do nothing."""
        launcher = args.flags["launcher"]
        asked = {name: args.flags[name] for name in ("nodes", "partition", "time")}
        if launcher == "local":
            for name in asked.keys() & args.given_flags.keys():
                raise vegab.UsageError(f"--{name} is for a job: add --launcher=slurm")
            return
        if launcher != "slurm":
            raise vegab.UsageError(f"launcher is {launcher!r}; expected local or slurm")
        from engine.sweeps import slurm as launch_slurm

        experiment.check_ranges(args.resolved_config)
        RunFolder(args.save_path, args.resolved_config, fingerprint.MAY_GROW).check()
        gpus = args.flags["gpus"]
        vegab.snapshot.go_on_from()  # a job may begin after the project has changed
        print(launch_slurm.submit_run(args.argv, args.save_path, gpus, **asked))
        sys.exit()


def suffix(args: argparse.Namespace) -> str:
    """Return what is added to SAVE_PATH: --name, or EDflow's key `experiment_name`."""
    return args.flags["name"] or args.resolved_config.get("experiment_name") or ""


if __name__ == "__main__":
    saver = vegab.MetaSaver(position=results.load_position, parent=parent)
    try:
        vegab.wrap(
            registry,
            train,
            plugins=[vegab.AutomaticNamer(suffix, as_suffix=True), Launch(), saver],
            prepare=prepare,
            extendable=fingerprint.MAY_GROW,
            save_path_key="model.model_dir",
            follows=workers.is_follower,
            is_whole=results.is_whole,
            short_flags={"c": "checkpoint", "r": "retrain", "e": "evaluation", "n": "name"},
        )
    except SystemExit as end:
        if end.code in (FAILED, REFUSED):
            workers.tell_of_failure()
        raise
