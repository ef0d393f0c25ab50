"""Runs on two devices, and by two workers, that are killed end as if nothing had, bit for bit.

A fixed sample by default; `make fault-test` runs the whole.
"""

from __future__ import annotations

import dataclasses
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from fault_lab import (
    EVEN,
    INTERRUPTED,
    KILLED,
    MOMENTS,
    WHOLE,
    Attempt,
    Job,
    Lab,
    differences,
    killed_anywhere,
)

from engine.devices.workers import on_this_machine

pytestmark = pytest.mark.slow

# A chain of kills of one run: in a first attempt, and in two that resume it.
CHAINS = 14 if WHOLE else 2
PLACES = ("step", "step", "snapshot", "commit", "validation", "read", "restore")

TWO_DEVICES = dataclasses.replace(
    EVEN, name="two-devices", words=(*EVEN.words, "--gpus=0,1"), processors=2
)
WORKERS = dataclasses.replace(EVEN, name="two-workers")


def some_kills(chance: random.Random) -> list[dict[str, Any]]:
    """Three kills of one run: on the way, in a resume or wherever, and late."""
    kills = []
    for places, most in ((("step",), 14), (PLACES, 3), (("step", "commit"), 4)):
        at = chance.choice(places)
        call = 1 if at in ("read", "restore") else chance.randint(2 if at == "step" else 1, most)
        fault = {"at": at, "call": call, "when": chance.choice(MOMENTS)}
        fault["delay"] = chance.uniform(0, 0.02)
        kills.append({"faults": [fault], "most_steps": 1})
    return kills


def test_two_devices_are_killed(lab: Lab) -> None:
    killed_anywhere(lab, TWO_DEVICES, [some_kills(random.Random(n)) for n in range(CHAINS)])


def both(lab: Lab, run: Path, job: Job, struck: int = 0, **harm: Any) -> list[Attempt]:
    """Run a job's command by two workers, one of which is harmed."""
    started = []
    for index, config in enumerate(on_this_machine(2)):
        faults = harm if index == struck else harm | {"faults": []}
        started.append(lab.start(run, job.arguments, environment={"TF_CONFIG": config}, **faults))
    return [each.wait() for each in started]


def test_two_workers_are_killed(lab: Lab) -> None:
    straight = lab.new_folder("workers-reference")
    assert [end.code for end in both(lab, straight, WORKERS)] == [0, 0]
    strikes = 0
    for seed in range(CHAINS):
        run, chance = lab.new_folder("workers"), random.Random(seed)
        for harm in some_kills(chance):
            struck = chance.randrange(2)
            if struck == 1 and harm["faults"][0]["at"] == "commit":
                harm["faults"][0]["at"] = "step"  # the chief alone writes
            ends = both(lab, run, WORKERS, struck, **harm)
            assert ends[struck].code in (KILLED, 0), f"{harm}: {ends}"
            if ends[struck].code == KILLED:
                strikes += 1
                assert ends[1 - struck].code in (INTERRUPTED, 0), f"{harm}: {ends}"
        assert [end.code for end in both(lab, run, WORKERS)] == [0, 0]
        assert not differences(run, straight), f"seed {seed}"
        shutil.rmtree(run.parent)
    assert strikes >= 0.8 * 3 * CHAINS, "kills came too late to count"
