"""Check that CONFIG can be killed and continued bit for bit: your model, your data, your callbacks.

python bin/check_resume.py digits --kills 10 --n_filters=8
"""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import traceback
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import vegab
from configs import registry
from engine import endings
from engine.building import quiet_libraries
from engine.checkpoints import differences

ROOT = Path(__file__).resolve().parents[1]
EXACT = ("model.h5", "model_best.h5", "history.csv")
KILLED = -signal.SIGKILL


def check(config: dict[str, Any], *, kills: int = 10, epochs: int = 2) -> None:
    """Train CONFIG briefly, once through and once with kills at random steps, and compare.

    Args:
        config: the resolved config.
        kills: how often to kill the second run, at random steps
        epochs: how long both runs are
    """
    for name, number in (("kills", kills), ("epochs", epochs)):
        if number < 1:
            raise vegab.UsageError(f"{name} is {number}; it must be at least 1")
    config |= {"num_epochs": epochs}
    if "num_steps" in config:
        config["num_steps"] = None
    processes = server()
    with (
        tempfile.TemporaryDirectory(prefix="check_resume-") as name,
        ThreadPoolExecutor(3) as threads,
    ):
        steps_per_epoch, reasons = survey(processes, config)
        config |= {"checkpoint_steps": max(steps_per_epoch // 7, 1)}
        # Chosen anew each time: a check that always kills at the same steps proves less.
        every_step = range(1, epochs * steps_per_epoch + 1)
        stops = sorted(random.SystemRandom().sample(every_step, min(kills, len(every_step))))
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(config))
        runs = [
            threads.submit(straight, folder),
            threads.submit(attempts, processes, config, folder / "again", [0]),
            threads.submit(attempts, processes, config, folder / "killed", [*stops, 0]),
        ]
        for run in runs:
            run.result()
        for other, what, otherwise in (
            ("again", "two runs without a kill differ", NOT_REPEATABLE),
            ("killed", f"killed after the steps {stops}, it differs", STATE_LOST),
        ):
            difference = differences.first_difference(folder / "straight", folder / other)
            if difference:
                tell(f"{what}: {difference}", reasons, otherwise)
    print(f"identical: {', '.join(EXACT)}, killed after the steps {stops}")
    for reason in reasons:
        print(f"yet it may not always be: {reason}")


NOT_REPEATABLE = (
    "something draws random numbers that the seed does not decide, or an operation is not "
    "deterministic; look for generators of Python, NumPy or TensorFlow in model, data and callbacks"
)
STATE_LOST = (
    "something keeps a state that is not in the commit: an attribute of a layer, a callback, a "
    "hook or the data that changes along the way"
)


def server() -> ForkServerContext:
    """Return what starts processes in which TensorFlow is imported already, but has not begun."""
    quiet_libraries()
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    os.environ["PYTHONHASHSEED"] = another_hash_seed()
    processes = get_context("forkserver")
    processes.set_forkserver_preload(["engine.runs.resume_check"])
    return processes


def there(name: str, *arguments: Any) -> Any:
    """Call a function of `resume_check` in a process that has it already; this one has not."""
    from engine.runs import resume_check

    return getattr(resume_check, name)(*arguments)


def survey(processes: ForkServerContext, config: dict[str, Any]) -> tuple[int, list[str]]:
    """Return what `resume_check.survey` does, from a process of its own.

    Raises Exception: what it raises. Raises ChildProcessError if the process dies; says by which
    signal.
    """
    receiver, sender = processes.Pipe(duplex=False)
    process = processes.Process(target=send_survey, args=(sender, config))
    process.start()
    sender.close()
    try:
        result = receiver.recv()
    except EOFError:
        process.join()
        raise ChildProcessError(
            f"model and data cannot be built: {endings.ending(process.exitcode or 0)}"
        ) from None
    process.join()
    if isinstance(result, Exception):
        raise result
    return result


def send_survey(sender: Connection, config: dict[str, Any]) -> None:
    """Send what `resume_check.survey` returns, or what it raises, with the traceback."""
    try:
        sender.send(there("survey", config))
    except Exception as error:
        error.add_note(traceback.format_exc())
        sender.send(error)


def another_hash_seed() -> str:
    """Return a seed of Python's hashes, on which no bit may depend."""
    return str(random.SystemRandom().randrange(1, 2**32))


def straight(folder: Path) -> None:
    """Train without a kill, in a process that has nothing in common with the others."""
    paths = [str(folder / "config.json"), str(folder / "straight")]
    command = [sys.executable, __file__, "--worker", *paths]
    environment = os.environ | {"PYTHONHASHSEED": another_hash_seed()}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ChildProcessError(
            f"the run itself fails: {endings.ending(done.returncode, done.stderr)}"
        )


def attempts(
    processes: ForkServerContext, config: dict[str, Any], save_path: Path, stops: list[int]
) -> None:
    """Train in one process after another, each of which dies at its step (0: lives)."""
    output = save_path.with_suffix(".txt")
    for stop in stops:
        process = processes.Process(target=there, args=("train", config, save_path, stop, output))
        process.start()
        process.join()
        if process.exitcode != 0 and (not stop or process.exitcode != KILLED):
            said = output.read_text(errors="replace") if output.exists() else ""
            raise ChildProcessError(
                f"the run itself fails: {endings.ending(process.exitcode or 0, said)}"
            )


def tell(what: str, reasons: list[str], otherwise: str) -> None:
    """End the program with the first difference and its likely cause."""
    print(what)
    for reason in reasons or [otherwise]:
        print(f"likely cause: {reason}")
    raise SystemExit(1)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        there("train", json.loads(Path(sys.argv[2]).read_text()), Path(sys.argv[3]), 0)
    else:
        vegab.wrap(registry, check)
