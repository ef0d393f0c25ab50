"""Faults of the disk: system calls that fail or are the last, lost power, damage, hostile files.

A fixed sample by default; `make fault-test` runs the whole.
"""

from __future__ import annotations

import base64
import errno
import json
import marshal
import os
import pickle
import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from fault_lab import (
    EVEN,
    KILLED,
    WHOLE,
    Job,
    Lab,
    differences,
    needs_shim,
    read_trace,
    two_at_once,
)

ERRORS = (errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT, errno.EMFILE)
# The third commit ends the first epoch, there are two before it, and it stays the best: what a
# fault does to model_best.h5 is not made good by a later epoch.
COMMIT = 3
FIRST_IS_BEST = ("--monitor=step", "--monitor_mode=min")
JOB = Job("first-is-best", (*EVEN.words, *FIRST_IS_BEST), num_epochs=2)


@pytest.fixture(scope="module")
def killed(lab: Lab) -> Path:
    """A run that was killed in its last epoch: it has two commits, and a best one."""
    run = lab.new_folder("killed")
    harm = {"at": "step", "call": 29, "when": "before"}
    assert lab.attempt(run, EVEN.arguments, faults=[harm], most_steps=1).code == KILLED
    return run


def copy_of(lab: Lab, run: Path, name: str) -> Path:
    copy = lab.new_folder(name)
    shutil.copytree(run, copy)
    return copy


def shim(run: Path, mode: str, **more: Any) -> dict[str, Any]:
    return {"shim": {"folder": str(run), "mode": mode, **more}}


def calls_of(lab: Lab, commit: int) -> list[str]:
    """The system calls of one commit (0: of a whole attempt) that touch the run folder."""
    run = lab.new_folder("calls")
    trace = run.parent / "trace"
    faults = shim(run, "record", commit=commit, trace=str(trace))
    assert lab.attempt(run, JOB.arguments, **faults).code == 0
    return [call[0] for call in read_trace(trace)]


@pytest.mark.slow
def test_killed_at_each_system_call(lab: Lab) -> None:
    """A SIGKILL before each, and in the middle of each write."""
    needs_shim(lab)
    commit = 0 if WHOLE else COMMIT
    calls = calls_of(lab, commit)
    assert {"create", "write", "fsync", "rename"} <= set(calls)
    reference = lab.reference(JOB)
    assert (reference / "model.h5").read_bytes() != (reference / "model_best.h5").read_bytes()

    def trial(mode: str, call: int) -> None:
        run = lab.new_folder(f"{mode}-{call}")
        done = lab.attempt(run, JOB.arguments, **shim(run, mode, commit=commit, call=call))
        # A whole attempt may take a few calls less or more than another, as the clock goes.
        assert done.code == KILLED or (WHOLE and done.code == 0), done.said
        lab.finish(JOB, run, f"{mode} at call {call}, {calls[call - 1]}")

    trials = [("kill", call) for call in range(1, len(calls) + 1)]
    trials += [("tear", call) for call, name in enumerate(calls, start=1) if name == "write"]
    two_at_once([lambda mode=mode, call=call: trial(mode, call) for mode, call in trials])


@pytest.mark.slow
def test_each_error_at_each_system_call_of_a_commit(lab: Lab) -> None:
    """A commit fails and is tried again, in one process; the run ends as if nothing had been."""
    needs_shim(lab)
    run = lab.new_folder("errors")
    report = run.parent / "report.json"
    exhaust = {
        "folder": str(run),
        "commit": COMMIT,
        "errors": list(ERRORS),
        "report": str(report),
    }
    done = lab.attempt(run, JOB.arguments, exhaust=exhaust)
    assert done.code == 0, done.said
    found = json.loads(report.read_text())
    assert len(found) > 100
    wrong = [
        [errno.errorcode[number], call, raised, whole]
        for number, call, raised, whole in found
        if not whole or (raised and os.strerror(number) not in raised)
    ]
    assert not wrong
    loud = sum(raised is not None for _, _, raised, _ in found)
    assert loud > len(found) / 2
    assert not differences(run, lab.reference(JOB))


@pytest.mark.slow
def test_an_error_of_the_disk_is_told_and_the_run_goes_on_later(lab: Lab) -> None:
    needs_shim(lab)
    calls = calls_of(lab, COMMIT)
    lab.reference(JOB)
    first = {name: calls.index(name) + 1 for name in ("create", "write", "fsync", "rename")}
    first["close"] = len(calls) - calls[::-1].index("close")
    places = [
        (number, name, call)
        for index, number in enumerate(ERRORS)
        for place, (name, call) in enumerate(first.items())
        if WHOLE or index == place
    ]

    def trial(number: int, name: str, call: int) -> None:
        run = lab.new_folder(f"error-{number}-{call}")
        fault = shim(run, "fail", commit=COMMIT, call=call, error=number)
        done = lab.attempt(run, JOB.arguments, **fault)
        context = f"{errno.errorcode[number]} at {name}, call {call}:\n{done.said}"
        assert done.code == 1, context
        last = done.said.strip().splitlines()[-1]
        assert os.strerror(number) in last, context
        assert "Traceback" not in done.said, context
        lab.finish(JOB, run, context)

    two_at_once([lambda place=place: trial(*place) for place in places])


@pytest.mark.slow
def test_power_lost_at_any_moment_of_a_commit(lab: Lab, killed: Path) -> None:
    needs_shim(lab)
    states: dict[str, int] = {}
    for commit in range(2, 7) if WHOLE else (2,):
        folder = lab.new_folder(f"power-{commit}").parent
        before, after, trace = folder / "before" / "run", folder / "after" / "run", folder / "trace"
        harm = {"at": "commit", "call": commit, "when": "before"}
        # Two epochs are done and the third has begun: the state before, then after, the commit.
        shutil.copytree(killed, before)
        assert lab.attempt(before, LONGER, faults=[harm]).code == KILLED
        shutil.copytree(before, after)
        assert lab.attempt(after, LONGER, **record_one(after, trace)).code == KILLED
        found = lab.check("power", before, after, trace, 160 if WHOLE else 90)
        assert found["acknowledged"] and not found["wrong"], found
        states[str(commit)] = found["states"]
    assert sum(states.values()) >= (10_000 if WHOLE else 1_000), states


LONGER = (*EVEN.words, "--num_epochs=12")


def record_one(run: Path, trace: Path) -> dict[str, Any]:
    """Record the first commit, and kill the run after it."""
    harm = {"at": "views", "call": 2, "when": "after"}
    return {"faults": [harm], **shim(run, "record", commit=1, trace=str(trace))}


def test_damage_to_the_newest_commit_is_found(lab: Lab, killed: Path) -> None:
    found = lab.check("damage", killed, 10_000 if WHOLE else 200)
    assert found["tried"] >= 200 and not found["undetected"], found


@pytest.mark.parametrize(
    "kind",
    ["flip", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("cut", "zero", "empty"))],
)
def test_the_commit_before_a_damaged_one_is_used(lab: Lab, killed: Path, kind: str) -> None:
    run = copy_of(lab, killed, kind)
    path = run / "model.h5"
    content = bytearray(path.read_bytes())
    if kind == "flip":
        content[len(content) // 2] ^= 1
    elif kind == "cut":
        del content[-100:]
    elif kind == "zero":
        content[4096:8192] = bytes(4096)
    else:
        content.clear()
    path.write_bytes(content)
    lab.finish(EVEN, run, f"newest commit damaged: {kind}")


def test_both_commits_damaged_is_said(lab: Lab, killed: Path) -> None:
    run = copy_of(lab, killed, "both")
    for name in ("model.h5", "model_previous.h5"):
        with open(run / name, "r+b") as file:
            file.truncate(1000)
    done = lab.attempt(run, EVEN.arguments)
    assert done.code in (1, 2) and "Traceback" not in done.said, done.said
    assert "no checkpoint in" in done.said and "is whole" in done.said, done.said
    assert len((run / "model.h5").read_bytes()) == 1000


@pytest.mark.slow
@pytest.mark.parametrize("harm", ["deleted", "cut", "edited"])
@pytest.mark.parametrize("name", ["history.csv", "loop_state.pkl", "stdout.txt"])
def test_a_view_that_was_harmed_is_made_anew(lab: Lab, killed: Path, name: str, harm: str) -> None:
    run = copy_of(lab, killed, f"{harm}-{name}")
    do_harm(run / name, harm)
    lab.finish(EVEN, run, f"{name} {harm}")


@pytest.mark.parametrize(
    "harm", ["edited", *(pytest.param(one, marks=pytest.mark.slow) for one in ("deleted", "cut"))]
)
def test_a_harmed_best_commit_is_named_and_the_run_goes_on(
    lab: Lab, killed: Path, harm: str
) -> None:
    """Its epoch is over and its weights are nowhere else; all the rest is as it should be."""
    run = copy_of(lab, killed, f"{harm}-best")
    do_harm(run / "model_best.h5", harm)
    done = lab.attempt(run, EVEN.arguments)
    assert done.code == 0, done.said
    sentences = [line for line in done.said.splitlines() if "model_best.h5" in line]
    assert len(sentences) == 1 and "cannot be made again" in sentences[0], done.said
    assert ("is gone" if harm == "deleted" else "is corrupt") in sentences[0]
    assert (run / "model_best.h5.damaged").exists() == (harm != "deleted")
    assert set(differences(run, lab.reference(EVEN))) <= {"model_best.h5"}


def do_harm(path: Path, harm: str) -> None:
    content = path.read_bytes()
    path.unlink()
    if harm == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif harm == "edited":
        path.write_bytes(content.replace(b"0", b"7", 20) + b"1,2,3\n")


class Payload:
    """Unpickled by an unpickler that executes, it leaves a file behind."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, ...]]:
        return os.system, (f"touch '{self.canary}'",)


def test_nothing_in_a_hostile_loop_state_is_executed(lab: Lab, killed: Path) -> None:
    run = copy_of(lab, killed, "pickle")
    canary = run.parent / "executed"
    (run / "loop_state.pkl").write_bytes(pickle.dumps({"epoch": Payload(canary)}))
    lab.finish(EVEN, run, "a hostile loop_state.pkl")
    assert not canary.exists()


def external_link(file: h5py.File, secret: Path) -> None:
    del file["training_state/optimizer/00000"]
    file["training_state/optimizer/00000"] = h5py.ExternalLink(str(secret), "secret")


def external_storage(file: h5py.File, secret: Path) -> None:
    old = file["training_state/optimizer/00002"]
    path, shape, dtype = old.attrs["path"], old.shape, old.dtype
    size = int(np.prod(shape)) * dtype.itemsize
    group = file["training_state/optimizer"]
    del group["00002"]
    new = group.create_dataset("00002", shape, dtype, external=[(str(secret), 0, size)])
    new.attrs["path"] = path


def external_state(file: h5py.File, secret: Path) -> None:
    del file["training_state"]
    file["training_state"] = h5py.ExternalLink(str(secret), "training_state")


def huge_shape(file: h5py.File, secret: Path) -> None:
    path = file["training_state/optimizer/00002"].attrs["path"]
    del file["training_state/optimizer/00002"]
    new = file.create_dataset(
        "training_state/optimizer/00002", (2**44,), "f4", chunks=(1024,), fillvalue=1
    )
    new.attrs["path"] = path


def huge_state(file: h5py.File, secret: Path) -> None:
    del file["training_state/state"]
    file.create_dataset("training_state/state", (2**44,), "S1", chunks=(1024,))


@pytest.mark.parametrize(
    "change", [external_link, external_storage, external_state, huge_shape, huge_state]
)
def test_a_hostile_commit_is_refused(
    lab: Lab, killed: Path, change: Callable[[h5py.File, Path], None]
) -> None:
    """Its digest is right, as whoever made it can count too; it is refused in one sentence."""
    run = copy_of(lab, killed, change.__name__)
    secret = run.parent / "secret.h5"
    shutil.copy(run / "model.h5", secret)
    with h5py.File(secret, "r+") as file:
        file["secret"] = file["training_state/optimizer/00000"][()]
        file["secret"].attrs["path"] = file["training_state/optimizer/00000"].attrs["path"]
    change_commits(run, lambda file: change(file, secret))
    done = lab.attempt(run, EVEN.arguments)
    assert done.code in (1, 2), done.said
    assert "Traceback" not in done.said, done.said
    assert "model.h5" in done.said.strip().splitlines()[-1], done.said


def test_a_lambda_layer_in_a_commit_is_not_executed(lab: Lab, killed: Path) -> None:
    run = copy_of(lab, killed, "lambda")
    canary = run.parent / "executed"
    payload = eval(f"lambda x: (__import__('os').system('touch {canary}'), x)[1]")
    dumped = base64.b64encode(marshal.dumps(payload.__code__)).decode()
    code = {"code": dumped, "defaults": None, "closure": None}
    function = {"class_name": "__lambda__", "config": code}
    layer = {"class_name": "Lambda", "config": {"name": "x", "function": function}}

    def add_lambda(file: h5py.File) -> None:
        config = json.loads(file.attrs["model_config"])
        config["config"]["layers"].insert(1, layer)
        file.attrs["model_config"] = json.dumps(config)

    change_commits(run, add_lambda)
    done = lab.attempt(run, EVEN.arguments)
    assert done.code in (0, 1, 2) and "Traceback" not in done.said, done.said
    done = lab.start(run, (), program="bin/evaluate.py").wait()
    assert done.code in (0, 1, 2) and "Traceback" not in done.said, done.said
    assert not canary.exists()


def test_a_file_that_is_no_commit_is_set_aside(lab: Lab, killed: Path) -> None:
    run = copy_of(lab, killed, "foreign")
    content = (run / "model.h5").read_bytes()
    (run / "model.h5").write_bytes(bytes(512) + content[512:])
    lab.finish(EVEN, run, "model.h5 with an empty user block")


def change_commits(run: Path, change: Callable[[h5py.File], None]) -> None:
    """Change both commits of a run, and make their digests right."""
    for name in ("model.h5", "model_previous.h5"):
        path = run / name
        with h5py.File(path, "r+") as file:
            change(file)
        content = path.read_bytes()
        head = content[:512].rstrip(b"\0")[:-64] + sha256(content[512:]).hexdigest().encode()
        path.write_bytes(head.ljust(512, b"\0") + content[512:])
