"""Iterators for PyTorch, which is installed for these tests alone, next to the environment.

triton, which a wheel of PyTorch for CPUs does not bring, is installed too: where it is imported
after TensorFlow, the process dies.
"""

from __future__ import annotations

import csv
import filecmp
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, run

pytestmark = pytest.mark.slow

PACKAGES = ("torch==2.13.0", "triton==3.7.1; sys_platform == 'linux'")
SITE_PACKAGES = "torch/site-packages"
HOOK = "--hooks=[{class: src.harm.Kill}]"
EXACT = ("model.h5", "history.csv")


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
    installer = ("uv", "pip") if shutil.which("uv") else (sys.executable, "-m", "pip")
    options = [f"--target={copy / SITE_PACKAGES}", f"--constraint={ROOT / 'requirements.txt'}"]
    if folder := os.environ.get("PIP_FIND_LINKS"):  # of which uv knows nothing
        options.append(f"--find-links={folder}")
    if installer[0] == "uv":
        options.append(f"--python={sys.executable}")
    run(*installer, "install", "--quiet", *options, *PACKAGES, timeout=2400)
    return copy


def command(own: Path, *words: str, **variables: str) -> subprocess.Popen[str]:
    # PyTorch's threads wait by spinning, which takes the processor from tests beside this one.
    environment = (
        os.environ | {"PYTHONPATH": str(own / SITE_PACKAGES), "OMP_NUM_THREADS": "1"} | variables
    )
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, *words], cwd=own, env=environment, stdout=pipe, stderr=pipe, text=True
    )


def train(own: Path, name: str, *words: str) -> None:
    process = command(own, "bin/train.py", "iterator_torch", f"results/{name}", *words)
    said = process.communicate(timeout=1800)
    assert process.returncode == 0, said


def test_killed_and_continued_it_ends_with_the_same_bytes(own: Path) -> None:
    words = ("--num_steps=200", "--checkpoint_seconds=0.05", "--log_freq=50", HOOK)
    train(own, "straight", *words)
    second_commit = str(own / "results" / "killed" / "model_previous.h5")
    to_kill = ("bin/train.py", "iterator_torch", "results/killed", *words)
    process = command(own, *to_kill, KILL_AFTER=second_commit)
    said = process.communicate(timeout=1800)
    assert process.returncode == -signal.SIGKILL, said
    train(own, "killed", *words)
    for name in EXACT:
        straight, killed = (
            own / "results" / run_name / name for run_name in ("straight", "killed")
        )
        assert filecmp.cmp(straight, killed, shallow=False), name
    meta = json.loads((own / "results" / "killed" / "meta.json").read_text())
    assert [attempt["exit_status"] for attempt in meta["attempts"]] == ["killed", 0]
    with open(own / "results" / "straight" / "history.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert float(rows[-1]["loss"]) < 0.6 * float(rows[0]["loss"])


def test_the_run_is_evaluated(own: Path) -> None:
    process = command(own, "bin/evaluate.py", "results/straight")
    stdout, stderr = process.communicate(timeout=1800)
    assert process.returncode == 0, stderr
    assert "accuracy" in stdout.splitlines()[-1]


def test_what_no_checkpoint_would_hold_is_found_wherever_it_hangs(own: Path) -> None:
    shutil.copy(Path(__file__).with_name("torch_iterators.py"), own / "src")
    build_all = "from src import torch_iterators; torch_iterators.main()"
    process = command(own, "-c", build_all)
    stdout, stderr = process.communicate(timeout=1800)
    assert process.returncode == 0, stderr
    for name, (expected, refusal) in json.loads(stdout).items():
        assert refusal == expected, name


def test_a_refusal_leaves_no_folder(own: Path) -> None:
    shutil.copy(Path(__file__).with_name("torch_iterators.py"), own / "src")
    scaler = "--iterator=src.torch_iterators.Scaler"
    process = command(own, "bin/train.py", "iterator_torch", "results/refused", scaler)
    _, stderr = process.communicate(timeout=1800)
    assert process.returncode == 2, stderr
    assert "no checkpoint holds iterator.scaler (GradScaler)" in stderr.splitlines()[-1]
    assert not (own / "results" / "refused").exists()


def test_what_comes_too_late_to_be_restored_is_an_error(own: Path) -> None:
    shutil.copy(Path(__file__).with_name("torch_iterators.py"), own / "src")
    words = (
        "bin/train.py",
        "iterator_torch",
        "results/late",
        "--iterator=src.torch_iterators.Late",
    )
    first = command(own, *words, "--num_steps=3")
    assert first.wait(timeout=1800) == 0, first.communicate()
    second = command(own, *words, "--num_steps=6")
    _, stderr = second.communicate(timeout=1800)
    assert second.returncode == 1
    assert "second is in the checkpoint, but Late has none yet; make it in __init__" in stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("bin/check_resume.py", "iterator_torch", "--kills=2"), "identical: "),
        (("bin/sweep.py", "iterator_torch", "results/sweep", "--seeds=2"), "2 trials: 2 finished"),
        (("bin/reproduce.py", "results/straight", "--epochs=1"), "identical to the bit"),
    ],
    ids=["check_resume", "sweep", "reproduce"],
)
def test_every_command_imports_triton_before_tensorflow(
    words: tuple[str, ...], said: str, own: Path
) -> None:
    process = command(own, *words)
    stdout, stderr = process.communicate(timeout=1800)
    assert process.returncode == 0, stdout + stderr
    assert said in stdout
