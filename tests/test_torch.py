"""Iterators for PyTorch, which is installed for these tests alone, next to the environment.

triton, which a wheel of PyTorch for CPUs does not bring, is installed too: where it is imported
after TensorFlow, the process dies.
"""

from __future__ import annotations

import csv
import filecmp
import json
import os
import re
import shutil
import signal
import sys
from pathlib import Path

import pytest
from conftest import ROOT, run
from fault_lab import only_whole
from test_ports import NEEDS_TORCH, commands, examples

pytestmark = pytest.mark.slow

PACKAGES = ("torch==2.13.0", "triton==3.7.1; sys_platform == 'linux'")
SITE_PACKAGES = "torch/site-packages"
HOOK = "--hooks=[{class: src.harm.Kill}]"
EXACT = ("model.h5", "history.csv")
TRAIN = ("bin/train.py", "iterator_torch")


HARM = """
import os
import signal

from engine.hooks import Hook


class Kill(Hook):
    # Kills the process after the first step at which the file that KILL_AFTER names is there.

    def after_step(self, global_step, last_results):
        if os.path.exists(os.environ.get("KILL_AFTER", "")):
            os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(scope="module")
def own(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project that finds PyTorch."""
    copy = tmp_path_factory.mktemp("torch") / "own"
    shutil.copytree(project, copy, symlinks=True)
    (copy / "src" / "harm.py").write_text(HARM)
    shutil.copy(Path(__file__).with_name("torch_iterators.py"), copy / "src")
    for block in examples()[NEEDS_TORCH]:
        (copy / block.file).write_text(block.content)
    installer = ("uv", "pip") if shutil.which("uv") else (sys.executable, "-m", "pip")
    options = [f"--target={copy / SITE_PACKAGES}", f"--constraint={ROOT / 'requirements.txt'}"]
    if folder := os.environ.get("PIP_FIND_LINKS"):  # of which uv knows nothing
        options.append(f"--find-links={folder}")
    if installer[0] == "uv":
        options.append(f"--python={sys.executable}")
    run(*installer, "install", "--quiet", *options, *PACKAGES, timeout=2400)
    return copy


def said(own: Path, *words: str, code: int = 0, **variables: str) -> str:
    """Run a command, which is to end with `code`; return what it has written."""
    # PyTorch's threads wait by spinning, which takes the processor from tests beside this one.
    variables |= {"PYTHONPATH": str(own / SITE_PACKAGES), "OMP_NUM_THREADS": "1"}
    command, environment = (sys.executable, *words), os.environ | variables
    done = run(*command, cwd=own, env=environment, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_a_loop_of_its_own_goes_on_to_the_bit(own: Path) -> None:
    words = ("src/examples/torch_loop.py", "root")
    said(own, *words, "results/loop", "--num_epochs=2")
    said(own, *words, "results/loop", "--num_epochs=4")
    said(own, *words, "results/whole", "--num_epochs=4")
    loop, whole = ((own / "results" / n / "history.csv").read_text() for n in ("loop", "whole"))
    assert loop == whole and loop.count("\n") == 5
    compare = """
import torch
one, other = (torch.load(f"results/{n}/model.pt", weights_only=True) for n in ("loop", "whole"))
assert all(torch.equal(one["model"][name], other["model"][name]) for name in one["model"])
assert one["history"][-1]["val_accuracy"] > 0.8
"""
    said(own, "-c", compare)
    assert "is already finished" in said(own, *words, "results/whole", "--num_epochs=4")


@pytest.mark.parametrize("iterator", ["", "Everything"])
def test_killed_and_continued_it_ends_with_the_same_bytes(iterator: str, own: Path) -> None:
    words: tuple[str, ...] = ("--num_steps=200", "--checkpoint_seconds=0.05", "--log_freq=50", HOOK)
    words += (f"--iterator=src.torch_iterators.{iterator}",) if iterator else ()
    straight, killed = (own / "results" / f"{name}{iterator}" for name in ("straight", "killed"))
    said(own, *TRAIN, str(straight), *words)
    to_kill = (*TRAIN, str(killed), *words)
    second_checkpoint = str(killed / "model_previous.h5")
    said(own, *to_kill, code=-signal.SIGKILL, KILL_AFTER=second_checkpoint)
    said(own, *to_kill)
    for name in EXACT:
        assert filecmp.cmp(straight / name, killed / name, shallow=False), name
    meta = json.loads((killed / "meta.json").read_text())
    assert [attempt["exit_status"] for attempt in meta["attempts"]] == ["killed", 0]
    with open(straight / "history.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert iterator or float(rows[-1]["loss"]) < 0.6 * float(rows[0]["loss"])


def test_what_follows_a_convolution_of_grey_images_can_be_viewed(own: Path) -> None:
    look = """
import numpy as np, torch
from engine.iterators import TorchHookedModelIterator as Kind
grey = Kind._to_torch(Kind, np.ones((2, 8, 8, 1), "float32"))
print(tuple(torch.nn.Conv2d(1, 4, 3)(grey).view(2, -1).shape))
"""
    assert said(own, "-c", look).startswith("(2, 144)\n")


@only_whole
def test_killed_after_each_step(own: Path) -> None:
    check = ("bin/check_resume.py", *TRAIN[1:], "--iterator=src.torch_iterators.Everything")
    every_step = list(range(1, 15))  # of two epochs of seven
    assert f"steps {every_step}\n" in said(own, *check, "--batch_size=180", "--kills=99")


def test_the_run_is_evaluated(own: Path) -> None:
    evaluated = said(own, "bin/evaluate.py", "results/straight")
    assert re.search(r"^validation, .* accuracy/accuracy", evaluated, re.MULTILINE)


def test_what_holds_a_state_is_found_wherever_it_hangs(own: Path) -> None:
    found = own / "found.json"
    said(own, "-c", f"from src import torch_iterators; torch_iterators.main({str(found)!r})")
    for name, (expected, states) in json.loads(found.read_text()).items():
        assert sorted(states.split(", ")) == sorted(expected.split(", ")), name


def test_a_refusal_leaves_no_folder(own: Path) -> None:
    elsewhere = "--iterator=src.torch_iterators.Elsewhere"
    refusal = said(own, *TRAIN, "results/refused", elsewhere, code=2).splitlines()[-1]
    assert "no checkpoint holds a GradScaler that neither" in refusal
    assert not (own / "results" / "refused").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("bin/check_resume.py", *commands()[NEEDS_TORCH], "--kills=2"), "identical: "),
        (("bin/sweep.py", "iterator_torch", "results/sweep", "--seeds=2"), "2 trials: 2 finished"),
        (("bin/reproduce.py", "results/straight", "--epochs=1"), "identical bit for bit"),
    ],
    ids=["check_resume", "sweep", "reproduce"],
)
def test_every_command_imports_triton_before_tensorflow(
    words: tuple[str, ...], expected: str, own: Path
) -> None:
    assert expected in said(own, *words)
