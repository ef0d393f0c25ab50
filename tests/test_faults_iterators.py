"""Runs of iterators that are killed and stopped end as the run that nothing stopped, bit for bit.

A fixed sample by default; `make fault-test` runs the whole.
"""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import h5py
import pytest
from conftest import files_below
from fault_lab import (
    INTERRUPTED,
    KILLED,
    MOMENTS,
    WHOLE,
    Job,
    Lab,
    differences,
    every_kill,
    killed_anywhere,
    state_of,
    two_at_once,
)

STEPS = 3  # of an epoch of 12 examples


def job(name: str, config: str, *words: str, num_steps: int | None = 7) -> Job:
    """A run of a config on 12 examples, three steps an epoch; `num_steps` cuts the last epoch."""
    small = (
        "--datasets={train: src.fault_iterators.Few, validation: src.fault_iterators.Few}",
        *("-p", "n_examples", "12"),
        *("--batch_size=4", "--threads=1", "--no_tensorboard", "--start_log_freq=1000"),
    )
    end = () if num_steps is None else (f"--num_steps={num_steps}",)
    # The steps count more than the epochs.
    return Job(name, (config, *small, *words, *end), num_epochs=3 if num_steps is None else 99)


GAN = job("gan", "gan", "--ckpt_freq=2", "--ckpt_keep=2", "--monitor=val_loss_critic")
LIST = job("list", "iterator_list", "--monitor=val_loss_decoder")
FILES = job(
    "files", "iterator_template", "--iterator=src.fault_iterators.SavingIterator", num_steps=None
)
DRAWING = (
    "--iterator=src.fault_iterators.DrawingIterator",
    "--model=src.fault_iterators.CountingRegression",
    "--ckpt_freq=2",
)
NUMPY = job("numpy", "iterator_numpy", *DRAWING, num_steps=None)
NUMPY_7 = job("numpy-7", "iterator_numpy", *DRAWING)
SHORT = job("short", "iterator_numpy", *DRAWING, num_steps=4)  # of the same run as NUMPY_7
NUMPY_4 = job("numpy-4", "iterator_numpy", *DRAWING, "--ckpt_freq=1", num_steps=4)
TRAINER_4 = job(
    "trainer-4",
    "iterator_trainer",
    "--iterator=src.fault_iterators.CountingTrainer",
    *("--lr_decay_begin=1", "--lr_decay_end=4", "--monitor=val_loss", "--ckpt_freq=1"),
    num_steps=4,
)


def fault(
    at: str,
    call: int = 1,
    when: str = "before",
    delay: float = 0.0,
    number: signal.Signals = signal.SIGKILL,
) -> dict[str, Any]:
    """A signal at a place in an attempt."""
    place = {"at": at, "call": call, "when": when, "delay": delay, "number": number}
    return {"faults": [place]}


# One after the other in one run. Steps, commits and validations are counted in their attempt.
IN_AN_EPOCH = [
    fault("iterator_step", 2, "in", 0.002),
    fault("iterator_step", STEPS, "after"),  # an epoch has its steps, its commit is to come
    fault("iterator_validation", 1, "in"),
]
FROM_A_COMMIT = [
    fault("commit", 1, "after"),
    fault("restore", 1, "after"),
    fault("iterator_step", STEPS, "before"),
    fault("commit", 1, "in", 0.001),
    fault("training", 1, "after"),
]
AT_ENDS = [
    fault("commit", 1, "after"),
    fault("iterator_validation", 1, "after"),
    fault("views", 2, "before"),
    fault("restore", 1, "before"),
    fault("iterator_step", 2, "after"),
    fault("snapshot", 1, "after"),
    fault("commit", 2, "before"),
]


@pytest.mark.parametrize(
    ("job", "chains"),
    [
        pytest.param(GAN, [IN_AN_EPOCH, FROM_A_COMMIT], id="gan", marks=pytest.mark.slow),
        pytest.param(
            NUMPY, [IN_AN_EPOCH, FROM_A_COMMIT, AT_ENDS], id="numpy", marks=pytest.mark.slow
        ),
        pytest.param(FILES, [IN_AN_EPOCH, FROM_A_COMMIT], id="files", marks=pytest.mark.slow),
        pytest.param(LIST, [FROM_A_COMMIT[::2]], id="list"),
    ],
)
def test_killed_anywhere(lab: Lab, job: Job, chains: list[list[dict[str, Any]]]) -> None:
    if WHOLE:
        places = dict.fromkeys(("iterator_validation", "snapshot", "commit", "views"), 3)
        places |= {"iterator_step": 7}
        resumes = ("iterator_step", (2, 4, 6))
        chains = chains + every_kill(fault, places, 0.001, resumes_after=resumes)
    killed_anywhere(lab, job, chains)


@pytest.mark.slow
@pytest.mark.parametrize("job", [GAN, NUMPY_4], ids=str)
def test_stopped_by_signals(lab: Lab, job: Job) -> None:
    lab.reference(job)
    several = [
        fault("iterator_step", 2, number=signal.SIGTERM),
        fault("iterator_validation", 1, number=signal.SIGINT),
        fault("iterator_step", 1, "in", 0.001, number=signal.SIGINT),
    ]
    steps = 4 if job is NUMPY_4 else 7
    # After the last step, there is still an epoch to be ended.
    stops = [several, [fault("iterator_step", steps, number=signal.SIGTERM)]]
    if WHOLE:
        places = [("iterator_step", n) for n in range(1, steps + 1)]
        places += [("iterator_validation", n) for n in range(1, -(-steps // STEPS) + 1)]
        stops += [
            [fault(at, call, when, 0.001, number)]
            for at, call in places
            for when in MOMENTS
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
        ]
    two_at_once([lambda faults=faults: stop(lab, job, faults) for faults in stops])


def stop(lab: Lab, job: Job, faults: list[dict[str, Any]]) -> None:
    """Stop a run by signals, then finish it."""
    run, steps = lab.new_folder("signals"), 0
    for one in faults:
        done = lab.attempt(run, job.arguments, **one)
        (place,) = one["faults"]
        late = place["when"] == "in" and done.code == 0
        assert done.code == INTERRUPTED or late, f"{one}: {done.code}\n{done.said}"
        assert "Traceback" not in done.said, done.said
        before, steps = steps, state_of(run)["global_step"]
        if place["at"] == "iterator_step" and place["when"] == "before":
            assert steps == before + place["call"], "the step has not ended, or was not committed"
    lab.finish(job, run, f"{job.name}, stopped by {faults}")


# ---- 12 examples, 4 in a batch, num_steps 4, num_epochs 99 -----------------------------------


def updates_of(run: Path) -> int:
    """How often the model of a commit was updated, which the model itself has counted."""
    state = state_of(run)
    if "model" in state["steps"]["iterator"]:
        return state["steps"]["iterator"]["model"]["updates"]
    with h5py.File(run / "model.h5") as file:
        variables = file["training_state/variables"].values()
        (counted,) = [int(v[()]) for v in variables if "updates" in str(v.attrs["path"])]
    return counted


def stamps(run: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of change of every file."""
    status = {str(path): path.stat() for path in run.rglob("*")}
    return {name: (entry.st_ino, entry.st_mtime_ns) for name, entry in status.items()}


FOUR_STEPS = [
    fault(at, call, when)
    for at, calls in (("iterator_step", 4), ("iterator_validation", 2))
    for call in range(1, calls + 1)
    for when in ("before", "after")
]
# After each step, and after the third and the fourth, at which epochs end, once more.
COMMITS = [fault("commit", call, "after") for call in range(1, 7)]
AFTER_ALL = fault("training", 1, "after")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("job", "kills"),
    [
        pytest.param(
            NUMPY_4,
            [{}, *(FOUR_STEPS if WHOLE else FOUR_STEPS[0:8:7]), *COMMITS, AFTER_ALL],
            id="numpy",
        ),
        pytest.param(
            TRAINER_4,
            [*FOUR_STEPS, *COMMITS] if WHOLE else [*COMMITS[:3], COMMITS[4]],
            id="trainer",
        ),
    ],
)
def test_num_steps_updates_are_made_and_no_more(
    lab: Lab, job: Job, kills: list[dict[str, Any]]
) -> None:
    reference = lab.reference(job)
    assert updates_of(reference) == 4
    two_at_once([lambda kill=kill: make_four_steps(lab, job, kill) for kill in kills])


def make_four_steps(lab: Lab, job: Job, kill: dict[str, Any]) -> None:
    """Kill a run, finish it, type its command once more."""
    run = lab.new_folder("four")
    if kill:
        done = lab.attempt(run, job.arguments, **kill)
        assert done.code == KILLED, f"{kill}: {done.code}\n{done.said}"
    before = stamps(run)
    done = lab.attempt(run, job.arguments)
    assert done.code == 0, f"{kill}: {done.code}\n{done.said}"
    assert updates_of(run) == 4, kill
    assert state_of(run)["global_step"] == 4, kill
    if kill == AFTER_ALL:
        assert stamps(run)[str(run / "model.h5")] == before[str(run / "model.h5")]
    content, times = files_below(run), stamps(run)
    again = lab.attempt(run, job.arguments)
    assert again.code == 0, again.said
    assert "already finished" in again.said
    assert files_below(run) == content
    assert stamps(run) == times
    assert not differences(run, lab.reference(job)), kill


@pytest.mark.slow
def test_more_steps_go_on_within_the_epoch_that_num_steps_had_cut(lab: Lab) -> None:
    run = lab.new_folder("longer")
    assert lab.attempt(run, SHORT.arguments).code == 0
    assert updates_of(run) == 4
    killed = lab.attempt(run, NUMPY_7.arguments, **fault("iterator_step", 2, "after"))
    assert killed.code == KILLED
    lab.finish(NUMPY_7, run, "extended and killed")
