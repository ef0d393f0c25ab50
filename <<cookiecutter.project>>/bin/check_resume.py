#!/usr/bin/env python
"""Check that CONFIG can be killed and continued bit for bit: your model, your data, your callbacks.

python bin/check_resume.py digits --kills 10 --n_filters=8"""

import contextlib  # PYTHON_ARGCOMPLETE_OK
import os
import random
import signal
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import vegab
from configs import registry
from engine import checkpoints, endings
from engine.building import quiet_libraries, require_at_least_one
from engine.runs import resume_check
from src import experiment

KILLED = -signal.SIGKILL


@vegab.filtered()
def check(config: dict[str, Any], *, kills: int = 10, epochs: int = 2, quick: bool = False) -> None:
    """Train CONFIG briefly, once through and once with kills at random steps, and compare.

    Args:
        config: the resolved config.
        kills: how often to kill the second run, at random steps
        epochs: number of epochs of both runs
        quick: do only two steps each of training (with one kill), validation and evaluation"""
    require_at_least_one({"kills": kills, "epochs": epochs}, "kills", "epochs")
    experiment.check_ranges(config)
    if quick:
        kills = epochs = 1
    config |= {"num_epochs": epochs}
    if "num_steps" in config:
        config["num_steps"] = None
    processes = server()
    folder = tempfile.TemporaryDirectory(prefix="check_resume-")
    with folder as name, ThreadPoolExecutor(3) as threads:
        steps_per_epoch, reasons = (2, []) if quick else survey(processes, config)
        config |= {"checkpoint_steps": max(steps_per_epoch // 7, 1)}
        # Others each time: a check that always kills at the same steps proves less.
        every_step = range(1, epochs * steps_per_epoch + (not quick))
        stops = sorted(random.SystemRandom().sample(every_step, min(kills, len(every_step))))
        straight, again, killed = (Path(name, run) for run in ("straight", "again", "killed"))
        os.environ["PYTHONHASHSEED"] = another_hash_seed()
        alone: Any = get_context("spawn")  # a process that has nothing in common with the others
        print(f"training without a kill, and with kills after the steps {stops} …", flush=True)
        trainings = [(alone, straight, [0]), (processes, again, [0])]
        comparisons = [(again, "two runs without a kill differ", NOT_REPEATABLE)]
        if quick:
            trainings, comparisons = [(processes, straight, [0])], []
        trainings.append((processes, killed, [*stops, 0]))
        comparisons.append((killed, f"killed after the steps {stops}, it differs", STATE_LOST))
        runs = [threads.submit(attempts, *training, config, quick) for training in trainings]
        for run in runs:
            run.result()
        said = straight.with_suffix(".txt").read_text(errors="replace").splitlines()
        reasons += [line for line in said if resume_check.NOT_SAVED in line]
        for other, what, otherwise in comparisons:
            if difference := checkpoints.first_difference(straight, other):
                print(f"{what}: {difference}")
                for reason in reasons or [otherwise]:
                    print(f"likely cause: {reason}")
                raise SystemExit(1)
    print(f"identical: model.h5, model_best.h5, history.csv, killed after the steps {stops}")
    for reason in reasons:
        print(f"it may not always be identical: {reason}")


NOT_REPEATABLE = (
    "something draws random numbers that the seed does not decide, or an operation is not "
    "deterministic; look for generators of Python, NumPy or TensorFlow in model, data and callbacks"
)
STATE_LOST = (
    "something keeps a state that is not in the checkpoint: an attribute of a layer, a callback, a "
    "hook or the data that changes along the way"
)


def server() -> ForkServerContext:
    """Return what starts processes in which TensorFlow is imported already, but has not begun."""
    quiet_libraries()
    os.environ["PYTHONPATH"] = os.pathsep.join([str(vegab.ROOT), os.environ.get("PYTHONPATH", "")])
    os.environ["PYTHONHASHSEED"] = another_hash_seed()
    processes = get_context("forkserver")
    processes.set_forkserver_preload(["engine.libraries", "engine.runs.resume_check"])
    return processes


def survey(processes: ForkServerContext, config: dict[str, Any]) -> tuple[int, list[str]]:
    """Return or raise what `resume_check.survey` does, which runs in a process of its own."""
    from src.data import DATASETS  # with NumPy

    receiver, sender = processes.Pipe(duplex=False)
    arguments = (sender, experiment.build, DATASETS, config)
    process = processes.Process(target=resume_check.send_survey, args=arguments)
    process.start()
    sender.close()
    result: Any = None
    with contextlib.suppress(EOFError):  # it has died
        result = receiver.recv()
    process.join()
    if result is None:
        how = endings.ending(process.exitcode or 0)
        raise ChildProcessError(f"model and data cannot be built: {how}")
    if isinstance(result, Exception):
        raise result
    return result


def another_hash_seed() -> str:
    """Return a seed of Python's hashes, on which no bit may depend."""
    return str(random.SystemRandom().randrange(1, 2**32))


def attempts(
    processes: Any, save_path: Path, stops: list[int], config: dict[str, Any], is_quick: bool
) -> None:
    """Train in one process after another, each of which dies at its step (0: lives)."""
    output = save_path.with_suffix(".txt")
    functions = (experiment.build, experiment.train)
    for stop in stops:
        arguments = (functions, config, save_path, stop, output, is_quick)
        process = processes.Process(target=resume_check.train, args=arguments)
        process.start()
        process.join()
        if process.exitcode != 0 and (not stop or process.exitcode != KILLED):
            said = output.read_text(errors="replace") if output.exists() else ""
            how = endings.ending(process.exitcode or 0, said)
            raise ChildProcessError(f"the run itself fails: {how}")


if __name__ == "__main__":
    vegab.wrap(registry, check)
