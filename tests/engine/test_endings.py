"""How a child process ended is said with the name of the signal, and with what is known of it."""

import signal
import subprocess
import sys
from typing import Any

import pytest
from machinery import Command

from engine import endings
from engine.sweeps import Launcher, sweep
from engine.sweeps.definition import Trial
from engine.sweeps.local import Commands
from engine.sweeps.sweep import Sweeper

NOISE = """\
2026-11-30 09:25:10.572: I tensorflow/core/util/port.cc:153] oneDNN custom operations are on.
WARNING: All log messages before absl::InitializeLog() is called are written to STDERR
I0000 00:00:1764494710.123456    7 gpu_device.cc:2020] Created device
To enable the following instructions: AVX2 FMA, in other operations, rebuild TensorFlow"""


@pytest.mark.parametrize("name", ["SIGSEGV", "SIGKILL", "SIGTERM"])
def test_a_signal_is_named(name: str) -> None:
    program = f"import os, signal; print('the last line'); os.kill(os.getpid(), signal.{name})"
    words = [sys.executable, "-u", "-c", program]
    done = subprocess.run(words, check=False, capture_output=True, text=True)
    said = endings.ending(done.returncode, done.stdout)
    assert said.startswith(f"it died by {name} (")
    assert said.endswith("; its last line is: the last line")
    assert ("memory" in said) == (name == "SIGKILL")
    of_a_shell = 128 + getattr(signal, name)
    assert endings.ending(of_a_shell) == said.removesuffix("; its last line is: the last line")


def test_an_exit_code_is_told_by_the_last_line_or_else_by_its_number() -> None:
    assert endings.ending(1, "one\ntwo\n") == "two"
    assert endings.ending(1) == "it ended with exit code 1"
    assert endings.ending(255) == "it ended with exit code 255"  # no signal has the number 127


@pytest.mark.slow
def test_the_evaluation_after_training(command: Command, tmp_path: Any) -> None:
    (tmp_path / "dies.yaml").write_text("callbacks: [{class: os.abort}]\n")
    small = ("--num_steps=2", "--num_epochs=1", "--no_tensorboard")
    words = ("bin/train.py", "iterator_numpy", tmp_path / "run", *small)
    done = command(*words, "-e", tmp_path / "dies.yaml")
    assert done.returncode == 1
    assert "dies.yaml failed: it died by SIGABRT (Aborted)" in done.stderr


@pytest.mark.parametrize("has_begun", [True, False])
def test_a_trial(has_begun: bool, tmp_path: Any) -> None:
    class Crashing(Launcher):
        def said(self, name: str) -> str:
            return "the last line"

        def run(self, commands: Commands, tell: Any) -> None:
            self.outputs.mkdir(exist_ok=True)
            if has_begun:
                (tmp_path / "n=1").mkdir(exist_ok=True)
                said = f"--- attempt 1 ---\nmine\n--- attempt 2 ---\nmy own\n{NOISE}\n"
                (tmp_path / "n=1" / "stderr.txt").write_text(said)
            tell([], dict.fromkeys(commands, -signal.SIGSEGV))

    trials = [Trial("n=1", {})]
    launcher = Crashing(tmp_path / ".output", lambda: False)
    sweeper = Sweeper(tmp_path, lambda refused: trials, lambda trial: [], launcher)
    (record,) = sweeper.run(retry_failed=False, show=lambda *numbers: None)
    (told,) = sweep.problems(tmp_path, [record])
    assert "it died by SIGSEGV (Segmentation fault)" in told
    assert "(death 3 of 3)" in told
    assert ("; its last line is: my own (" in told) == has_begun
    assert record.state == "failed"
    assert bool(sweeper.refused) == (not has_begun)
    assert has_begun or "the last line" in sweeper.refused["n=1"]


def test_a_program_s_own_last_line_is_not_tensorflow_s() -> None:
    assert endings.last_line(f"  I am the last\n\n{NOISE}\n") == "I am the last"
    assert endings.ending(-9, NOISE, "its node failed") == "its node failed"
