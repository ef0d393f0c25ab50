"""Iterators, records and sweeps: one command of each."""

from pathlib import Path

import pytest

from tests.conftest import Command


def test_a_sweep_has_a_run_for_each_trial(command: Command, tmp_path: Path) -> None:
    words = ("--grid", "n_filters=2,4", "--n_layers=1", "--num_epochs=1")
    command("bin/sweep.py", "digits", tmp_path / "sweep", *words)
    assert "2 finished" in command("bin/sweep.py", "status", tmp_path / "sweep").stdout
    assert len(list((tmp_path / "sweep").glob("*/model.h5"))) == 2


@pytest.mark.parametrize("name", ["iterator_numpy", "toy"])
def test_configs_of_other_kinds_train(name: str, command: Command, tmp_path: Path) -> None:
    length = "--num_steps=3" if name == "iterator_numpy" else "--train.epochs=1"
    command("bin/train.py", name, tmp_path / "run", length)
    assert (tmp_path / "run" / "history.csv").is_file()


def test_records_are_inspected(command: Command) -> None:
    done = command("bin/tfrecords.py", "validate", "data/toy/train-*")
    assert "1 files, 0 of them bad" in done.stdout
