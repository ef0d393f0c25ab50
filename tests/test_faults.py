"""Runs that are killed, stopped and raced for end as the run that nothing stopped, bit for bit.

A fixed sample by default; `make fault-test` runs the whole.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from fault_lab import (
    CNN,
    COMPILED,
    EVEN,
    INTERRUPTED,
    KILLED,
    LIMIT,
    MOMENTS,
    RECURRENT,
    SCATTERED,
    SHARED,
    STATEFUL,
    STEPS,
    SUBCLASSED,
    WHOLE,
    Job,
    Lab,
    every_kill,
    killed_anywhere,
    state_of,
    two_at_once,
)


def kill(at: str, call: int = 1, when: str = "before", delay: float = 0.0) -> dict[str, Any]:
    """A SIGKILL at a place in an attempt, which makes one step a call."""
    return {"faults": [{"at": at, "call": call, "when": when, "delay": delay}], "most_steps": 1}


def some_kills(chance: random.Random) -> list[dict[str, Any]]:
    """Five kills of one run: on the way, in a resume, at the end of an epoch, and after the end."""
    when = chance.choice(["before", "in", "after"])
    delay = chance.uniform(0, 0.03)
    return [
        kill("step", chance.randint(9, 14), when, delay),
        kill(chance.choice(["read", "restore"]), 1, chance.choice(["before", "after"])),
        kill(chance.choice(["snapshot", "commit", "views"]), chance.randint(1, 3), when, delay),
        kill("validation", 1, when, delay),
        chance.choice([kill("training", 1, "after"), kill("commit", 2, "after"), kill("step", 9)]),
    ]


@pytest.mark.parametrize(
    ("job", "seeds"),
    [
        pytest.param(CNN, range(1), id="cnn-0"),
        pytest.param(CNN, range(1, 3), id="cnn", marks=pytest.mark.slow),
        pytest.param(RECURRENT, range(2), id="recurrent", marks=pytest.mark.slow),
        pytest.param(SUBCLASSED, range(2), id="subclassed", marks=pytest.mark.slow),
        pytest.param(SCATTERED, range(2), id="scattered", marks=pytest.mark.slow),
        pytest.param(STATEFUL, range(2), id="stateful", marks=pytest.mark.slow),
        pytest.param(SHARED, range(2), id="shared", marks=pytest.mark.slow),
        pytest.param(COMPILED, range(1), id="compiled", marks=pytest.mark.slow),
    ],
)
def test_killed_anywhere(lab: Lab, job: Job, seeds: range) -> None:
    chains = [some_kills(random.Random(seed)) for seed in seeds]
    if WHOLE and job is not COMPILED and len(seeds) > 1:
        places = {"step": job.num_epochs * STEPS, "commit": 8, "views": 8, "validation": 3}
        chains += every_kill(kill, places, 0.002, resumes_after=("step", (6, 12, 21)))
    killed_anywhere(lab, job, chains)


STORM = Job("storm", (*EVEN.words[:-1], "--checkpoint_steps=2"), num_epochs=6)


@pytest.mark.slow
def test_storms(lab: Lab) -> None:
    lab.reference(STORM)
    two_at_once([lambda seed=seed: storm(lab, seed) for seed in range(100 if WHOLE else 1)])


def storm(lab: Lab, seed: int) -> None:
    """25 kills in one run, which has hardly time to go on between two of them."""
    chance = random.Random(seed)
    run = lab.new_folder("storm")
    for number in range(25):
        place = chance.choice(["step", "step", "step", "commit", "read", "views"])
        call = chance.randint(2, 4) if place == "step" else 1
        harm = kill(place, call, chance.choice(MOMENTS), chance.uniform(0, 0.02))
        done = lab.attempt(run, STORM.arguments, **harm)
        assert done.code == KILLED, f"{number}, {harm}: {done}"
    lab.finish(STORM, run, f"storm {seed}")


SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


@pytest.mark.slow
def test_stopped_by_signals(lab: Lab) -> None:
    """The call that runs ends, its state is committed, exit code 75.

    How long that takes is a row of `benchmarks/loop.py`.
    """
    lab.reference(EVEN)
    stopped = two_at_once(
        [lambda seed=seed: stop_often(lab, seed, 4) for seed in range(100 if WHOLE else 3)]
    )
    assert sum(stopped) >= 3 * len(stopped), "runs ended before they could be stopped"


def stop_often(lab: Lab, seed: int, times: int) -> int:
    """Stop a run by signals, then finish it. Returns how often it stopped."""
    chance = random.Random(seed)
    run, stops, begun = lab.new_folder("signals"), 0, 0
    for _ in range(times):
        place = chance.choice(["step", "step", "validation", "commit"])
        # The first step is compiled.
        call = chance.randint(1, EVEN.num_epochs if place == "validation" else 2)
        fault = {
            "at": place,
            "call": call + (place == "step"),
            "when": chance.choice(["before", "in", "after"] if place == "step" else ["in"]),
            "delay": chance.uniform(0, 0.01),
            "number": chance.choice(SIGNALS),
        }
        alone = {} if fault["when"] == "in" else {"most_steps": 1}  # the step that ends is known
        done = lab.attempt(run, EVEN.arguments, faults=[fault], **alone)
        if done.code == 0:
            break  # it was in the last step
        assert done.code == INTERRUPTED, f"{fault}: {done.code}\n{done.said}"
        assert "Traceback" not in done.said, done.said
        assert done.is_signalled
        stops += 1
        # The loop may have been on its way into a call.
        assert done.later_calls <= 1, f"{fault}: {done.later_calls} calls of steps came after it"
        ended = state_of(run)["global_step"]
        assert ended == begun + done.num_steps, f"{fault}: not all of it was committed"
        assert not alone or ended == begun + call + 1, f"{fault}: from {begun} to {ended}"
        begun = ended
    lab.finish(EVEN, run, f"stopped by signals, seed {seed}")
    return stops


@pytest.mark.slow
def test_two_processes_race_for_one_folder(lab: Lab) -> None:
    """One goes on, the other is refused."""
    lab.reference(EVEN)
    two_at_once([lambda: race_four_times(lab)] * (250 if WHOLE else 3))


def race_four_times(lab: Lab) -> None:
    run = lab.new_folder("race")
    for _ in range(4):
        harm = kill("commit", 2, "after")
        # Whoever has the folder stands still until the other one has seen that.
        harm["faults"].insert(0, {"at": "step", "number": signal.SIGSTOP})
        both = [lab.start(run, EVEN.arguments, **harm) for _ in range(2)]
        deadline = time.monotonic() + LIMIT
        # Not sooner: what goes on before it has stopped stands still for ever.
        while not any(is_stopped(started.pid) for started in both):
            assert time.monotonic() < deadline, [each.terminal.read_text() for each in both]
            time.sleep(0.01)
        (winner,) = [started for started in both if is_stopped(started.pid)]
        (loser,) = [started for started in both if started is not winner]
        end = loser.wait()
        assert end.code == 2, end
        assert "in use" in end.said, end
        os.kill(winner.pid, signal.SIGCONT)
        end = winner.wait()
        assert end.code == KILLED, end
    lab.finish(EVEN, run, "after races")


def is_stopped(pid: int) -> bool:
    return "\nState:\tT" in Path(f"/proc/{pid}/status").read_text()


def test_a_lock_that_another_host_left(lab: Lab) -> None:
    run = lab.new_folder("stale")
    assert lab.attempt(run, EVEN.arguments, **kill("step", 13)).code == KILLED
    (run / "run.lock").write_text(json.dumps({"host": "node17", "pid": os.getpid()}))
    lab.finish(EVEN, run, "a stale lock")
