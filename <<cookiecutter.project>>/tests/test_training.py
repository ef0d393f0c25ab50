"""A run that is killed or stopped and continued by the same command ends with the same bytes."""

import csv
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from engine.hooks import Hook
from tests.conftest import SMALL, Command

BITS = ("model.h5", "model_best.h5", "history.csv")
STRIKE = "STRIKE_OF_A_TEST"
COMMAND = (
    *("bin/train.py", "digits"),
    *("--num_epochs=3", "--checkpoint_steps=15", "--dropout=0.3", *SMALL),
    "--callbacks=[{class: keras.callbacks.ReduceLROnPlateau, patience: 1}]",
    "--lr_schedule=null",
    "--hooks=[tests.test_training.Strike, hooks:GapLog]",
)


class Strike(Hook):
    """Sends its own process a signal after a step, if the environment says so: STEP:SIGNAL."""

    def __init__(self) -> None:
        step, _, number = os.environ.get(STRIKE, "0:0").partition(":")
        self.step, self.number = int(step), int(number)

    def next_step(self, global_step: int) -> int | None:
        """Return the step to be called after."""
        return self.step if global_step < self.step else None

    def after_step(self, global_step: int, last_results: Any) -> None:
        """Strike at the step."""
        if global_step == self.step:
            os.kill(os.getpid(), self.number)


@pytest.fixture(scope="module")
def straight(command: Command, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing stops."""
    folder = tmp_path_factory.mktemp("results") / "straight"
    command(*COMMAND[:2], folder, *COMMAND[2:])
    return folder


def test_the_history_has_a_row_per_epoch(straight: Path) -> None:
    with open(straight / "history.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["epoch"], row["step"]) for row in rows] == [("1", "40"), ("2", "80"), ("3", "120")]
    assert float(rows[2]["loss"]) < float(rows[0]["loss"])
    assert {"val_loss", "val_accuracy", "learning_rate"} <= {*rows[0]}


@pytest.mark.parametrize(
    ("strikes", "code"),
    [
        ([(50, signal.SIGKILL), (95, signal.SIGKILL)], -signal.SIGKILL),
        ([(50, signal.SIGTERM)], 75),
    ],
    ids=["killed", "stopped"],
)
def test_the_same_command_continues_and_ends_with_the_same_bytes(
    strikes: list[tuple[int, int]], code: int, straight: Path, command: Command, tmp_path: Path
) -> None:
    words = (*COMMAND[:2], tmp_path / "run", *COMMAND[2:])
    for step, number in strikes:
        command(*words, code=code, env={STRIKE: f"{step}:{int(number)}"})
    command(*words)
    for name in BITS:
        assert (tmp_path / "run" / name).read_bytes() == (straight / name).read_bytes(), name
    meta = json.loads((tmp_path / "run" / "meta.json").read_text())
    assert meta["status"] == "finished"
    assert len(meta["attempts"]) == len(strikes) + 1
