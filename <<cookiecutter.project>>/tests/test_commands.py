"""The commands as a user types them, each once, and what they refuse."""

import json
from pathlib import Path

import h5py
import numpy as np
import pytest
from matplotlib.image import imread

from tests.conftest import ROOT, SMALL, Command


@pytest.fixture(scope="module")
def run(command: Command, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two epochs, with a checkpoint after each, that the tests below share."""
    folder = tmp_path_factory.mktemp("results") / "run"
    keep = "--hooks=[{class: engine.hooks.KeepCheckpoints, every: 40, keep: 9}]"
    command("bin/train.py", "digits", folder, "--num_epochs=2", keep, *SMALL)
    return folder


def test_train_continue_finish_extend(command: Command, tmp_path: Path) -> None:
    words = ("bin/train.py", "digits", tmp_path / "run", *SMALL)
    assert "epoch 1/1" in command(*words, "--num_epochs=1").stdout
    first = (tmp_path / "run" / "history.csv").read_text()
    assert "already finished" in command(*words, "--num_epochs=1").stdout
    assert (tmp_path / "run" / "history.csv").read_text() == first
    command(*words, "--num_epochs=2")
    history = (tmp_path / "run" / "history.csv").read_text()
    assert history.startswith(first)
    assert len(history.splitlines()) == 1 + 2
    other = command(*words, "--num_epochs=2", "--n_filters=5", code=2)
    assert "n_filters" in other.stderr


def test_the_run_folder_tells_the_whole_story(run: Path) -> None:
    expected = """
        config.json history.csv learning_curve.png loop_state.pkl meta.json model.h5 model_best.h5
        model_previous.h5 stderr.txt stdout.txt tb timing.csv train.py
    """
    assert {path.name for path in run.iterdir()} >= set(expected.split())
    assert json.loads((run / "config.json").read_text())["n_filters"] == 4
    assert json.loads((run / "meta.json").read_text())["status"] == "finished"
    with h5py.File(run / "model.h5") as file:
        assert "model_weights" in file
    assert "epoch 2/2" in (run / "stdout.txt").read_text()
    assert (run / "learning_curve.png").read_bytes().startswith(b"\x89PNG")


def test_evaluate_reads_the_test_set_and_writes_what_comes_out(command: Command, run: Path) -> None:
    command("bin/evaluate.py", run)
    summary = json.loads((run / "eval" / "test.json").read_text())
    assert summary["checkpoint"] == "model_best.h5"
    assert summary["num_examples"] == 357
    header, *rows = (run / "eval" / "predictions.csv").read_text().splitlines()
    assert header == "index,label,prediction,probability"
    labels, predictions = np.array([row.split(",")[1:3] for row in rows], dtype=int).T
    assert (labels == predictions).mean() == pytest.approx(summary["accuracy"], abs=1e-6)
    assert imread(run / "eval" / "confusion_matrix.png").size
    refused = command("bin/evaluate.py", "no_such_run", code=2)
    assert "nothing matches 'no_such_run'" in refused.stderr


def test_export_writes_a_model_that_needs_nothing_of_the_project(
    command: Command, run: Path, tmp_path: Path
) -> None:
    command("bin/export.py", run, tmp_path / "exported")
    assert (tmp_path / "exported" / "model.keras").is_file()
    assert (tmp_path / "exported" / "saved_model" / "saved_model.pb").is_file()


def test_runs_are_listed_compared_drawn_and_reported(
    command: Command, run: Path, tmp_path: Path
) -> None:
    assert "finished" in command("bin/runs.py", "list", run).stdout
    assert "val_loss" in command("bin/runs.py", "compare", run, "--metric=val_loss").stdout
    assert "the same" in command("bin/runs.py", "diff", run, run).stdout
    command("bin/plot.py", run, "--metric=val_loss", "-o", tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    command("bin/report.py", run, "-o", tmp_path / "report.html")
    assert "<html" in (tmp_path / "report.html").read_text()


def test_a_run_is_made_again_from_its_folder_and_forked(
    command: Command, run: Path, tmp_path: Path
) -> None:
    assert "identical bit for bit" in command("bin/reproduce.py", run, "--epochs=1").stdout
    fork = (f"--fork={run}", "--from_epoch=1")
    command("bin/train.py", run / "config.json", tmp_path / "fork", *fork)
    for name in ("history.csv", "model.h5"):
        assert (tmp_path / "fork" / name).read_bytes() == (run / name).read_bytes(), name


def test_check_resume_kills_and_compares(command: Command) -> None:
    for length in (("--kills=1", "--epochs=1"), ("--quick",)):
        assert "identical" in command("bin/check_resume.py", "digits", *length, *SMALL).stdout


def test_the_example_runner_trains(command: Command, tmp_path: Path) -> None:
    folder = tmp_path / "simple_cnn" / "first"
    command("src/scripts/train_simple_CNN.py", "root", folder, "--num_epochs=1", *SMALL)
    assert (folder / "model.h5").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("digit",), "digits"),
        (("digits", "--n_filter=4"), "n_filters"),
        (("digits", "--n_filters=many"), "n_filters"),
        (("digits", "--optimizer=adm"), "adam"),
    ],
)
def test_train_refuses_in_one_sentence_and_writes_nothing(
    arguments: tuple[str, ...], message: str, command: Command, tmp_path: Path
) -> None:
    name, *overrides = arguments
    done = command("bin/train.py", name, tmp_path / "run", *overrides, code=2)
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_the_configs_in_the_folder_are_named_by_the_help(command: Command) -> None:
    said = command("bin/train.py", "--help").stdout
    for name in ("digits", "cifar10", *(path.stem for path in ROOT.glob("configs/*.yaml"))):
        assert name == "slurm" or name in said
