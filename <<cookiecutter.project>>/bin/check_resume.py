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
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import vegab
from configs import registry
from src import experiment

EXACT = ("model.h5", "model_best.h5", "history.csv")
KILLED = -signal.SIGKILL


def check(config: dict[str, Any], *, kills: int = 10, epochs: int = 2) -> None:
    """Train CONFIG briefly, once through and once with kills at random steps, and compare.

    Args:
        config: the resolved config.
        kills: how often to kill the second run, at random steps
        epochs: how long both runs are
    """
    config |= {"num_epochs": epochs}
    steps_per_epoch = experiment.build(config).dataset.train.steps_per_epoch
    config |= {"checkpoint_steps": max(steps_per_epoch // 7, 1)}

    from src.resume_check import first_difference, suspects

    # Chosen anew each time: a check that always kills at the same steps proves less.
    every_step = range(1, epochs * steps_per_epoch + 1)
    stops = sorted(random.SystemRandom().sample(every_step, min(kills, len(every_step))))
    reasons = suspects(config)
    with tempfile.TemporaryDirectory(prefix="check_resume-") as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(config))
        for run in ("straight", "again"):
            attempt(folder, run, [])
        difference = first_difference(folder / "straight", folder / "again")
        if difference:
            tell(f"two runs without a kill differ: {difference}", reasons, NOT_REPEATABLE)
        attempt(folder, "killed", stops)
        difference = first_difference(folder / "straight", folder / "killed")
        if difference:
            tell(f"killed after the steps {stops}, it differs: {difference}", reasons, STATE_LOST)
    print(f"identical: {', '.join(EXACT)}, killed after the steps {stops}")
    for reason in reasons:
        print(f"yet it may not always be: {reason}")


NOT_REPEATABLE = (
    "something draws random numbers that the seed does not decide, or an operation is not "
    "deterministic; look for generators of Python, NumPy or TensorFlow in model, data and callbacks"
)
STATE_LOST = (
    "something keeps a state that is not in the commit: an attribute of a layer, a callback or the "
    "data that changes along the way"
)


def attempt(folder: Path, run: str, stops: list[int]) -> None:
    """Train in processes of their own, killed at each of the steps, until the run is finished."""
    command = [sys.executable, __file__, "--worker", str(folder / "config.json"), str(folder / run)]
    for stop in [*stops, 0]:
        environment = os.environ | {"PYTHONHASHSEED": str(random.SystemRandom().randrange(2**32))}
        done = subprocess.run(
            [*command, str(stop)], env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode not in (0, KILLED):
            raise ChildProcessError(f"the run itself fails: {done.stderr.strip().splitlines()[-1]}")


def tell(what: str, reasons: list[str], otherwise: str) -> None:
    """End the program with the first difference and its likely cause."""
    print(what)
    for reason in reasons or [otherwise]:
        print(f"likely cause: {reason}")
    raise SystemExit(1)


def worker(config_file: str, save_path: str, stop: str) -> None:
    """Train as `bin/train.py` does, and die at the step `stop` (0: do not)."""
    from src.resume_check import train

    train(json.loads(Path(config_file).read_text()), Path(save_path), int(stop))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(*sys.argv[2:])
    else:
        vegab.wrap(registry, check)
