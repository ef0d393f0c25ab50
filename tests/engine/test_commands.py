"""The commands as a user types them: train, continue, evaluate, and what they refuse."""

import json
from pathlib import Path

import h5py
import numpy as np
import pytest
from machinery import ROOT, Command
from matplotlib.image import imread
from test_fingerprint import edit_state

from engine.training import fingerprint

SMALL = ("--n_filters=4", "--n_layers=1")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder that the tests below share; the first of them fills it."""
    return tmp_path_factory.mktemp("results") / "run"


@pytest.mark.slow
def test_train_continue_finish_extend(command: Command, run: Path) -> None:
    done = command("bin/train.py", "digits", run, "--num_epochs=1", *SMALL)
    assert done.returncode == 0, done.stderr
    assert "epoch 1/1" in done.stdout
    first = (run / "history.csv").read_text()
    assert len(first.splitlines()) == 1 + 1

    again = command("bin/train.py", "digits", run, "--num_epochs=1", *SMALL)
    assert again.returncode == 0
    assert "already finished" in again.stdout
    assert (run / "history.csv").read_text() == first

    longer = command("bin/train.py", "digits", run, "--num_epochs=3", *SMALL)
    assert longer.returncode == 0, longer.stderr
    history = (run / "history.csv").read_text()
    assert history.startswith(first)
    assert len(history.splitlines()) == 1 + 3

    other = command(
        "bin/train.py", "digits", run, "--num_epochs=3", "--n_filters=5", "--n_layers=1"
    )
    assert other.returncode == 2
    assert "n_filters" in other.stderr
    assert "4" in other.stderr
    assert "5" in other.stderr


@pytest.mark.slow
def test_the_run_folder_tells_the_whole_story(run: Path) -> None:
    names = {path.name for path in run.iterdir()}
    assert names >= {
        "code",
        "config.json",
        "history.csv",
        "learning_curve.png",
        "loop_state.pkl",
        "meta.json",
        "model.h5",
        "model_best.h5",
        "model_previous.h5",
        "stderr.txt",
        "stdout.txt",
        "tb",
        "timing.csv",
        "train.py",
    }
    config = json.loads((run / "config.json").read_text())
    assert config["n_filters"] == 4
    meta = json.loads((run / "meta.json").read_text())
    assert meta["status"] == "finished"
    assert [attempt["exit_status"] for attempt in meta["attempts"]] == [0, 0]
    assert meta["attempts"][1]["from"]["epoch"] == 1
    assert meta["attempts"][1]["to"]["epoch"] == 3
    with h5py.File(run / "model.h5") as file:
        assert "model_weights" in file
    assert "epoch 3/3" in (run / "stdout.txt").read_text()
    assert list((run / "tb" / "train").glob("events.*"))
    assert (run / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    assert (run / "code" / "src" / "data.py").is_file()


@pytest.mark.slow
def test_the_code_of_a_run_runs_again(command: Command, run: Path, tmp_path: Path) -> None:
    again = command(
        run / "code" / "bin" / "train.py",
        run / "config.json",
        tmp_path / "again",
        "--num_epochs=3",
    )
    assert again.returncode == 0, again.stderr
    history = [(folder / "history.csv").read_text() for folder in (run, tmp_path / "again")]
    assert history[0].splitlines()[0] == history[1].splitlines()[0]


@pytest.mark.slow
def test_evaluate_reads_the_test_set_and_writes_what_comes_out(
    quick_command: Command, run: Path
) -> None:
    done = quick_command("bin/evaluate.py", run)
    assert done.returncode == 0, done.stderr
    summary = json.loads((run / "eval" / "test.json").read_text())
    assert summary["checkpoint"] == "model_best.h5"
    assert summary["num_examples"] == 357
    header, *rows = (run / "eval" / "predictions.csv").read_text().splitlines()
    assert header == "index,label,prediction,probability"
    labels, predictions = np.array([row.split(",")[1:3] for row in rows], dtype=int).T
    assert (labels == predictions).mean() == pytest.approx(summary["accuracy"], abs=1e-6)
    per_class = (run / "eval" / "per_class.csv").read_text().splitlines()
    assert per_class[0] == "label,precision,recall,f1,support"
    recall = float(per_class[1].split(",")[2])
    assert recall == pytest.approx((predictions[labels == 0] == 0).mean())
    assert (run / "eval" / "confusion_matrix.png").read_bytes().startswith(b"\x89PNG")
    # The first pictures of the test set, side by side: every fifth block of ten is in it.
    with np.load(ROOT / "data" / "digits" / "digits.npz") as file:
        first = [*file["images"][40:50], *file["images"][90:96]]
    pixels = np.rint(imread(run / "eval" / "examples.png")[..., :3] * 255)
    assert (pixels == np.rint(np.concatenate(first, axis=1) / 16 * 255)[..., np.newaxis]).all()


@pytest.mark.slow
def test_evaluate_takes_the_latest_or_a_path(quick_command: Command, run: Path) -> None:
    for checkpoint, name in (("latest", "model.h5"), (run / "model_previous.h5",) * 2):
        done = quick_command("bin/evaluate.py", run, f"--checkpoint={checkpoint}")
        assert done.returncode == 0, done.stderr
        summary = json.loads((run / "eval" / "test.json").read_text())
        assert summary["checkpoint"] == Path(name).name


@pytest.mark.slow
def test_evaluate_and_export_name_the_source_that_has_changed(
    quick_command: Command, run: Path, tmp_path: Path
) -> None:
    quick_command("bin/evaluate.py", run)
    assert json.loads((run / "eval" / "test.json").read_text())["code_differs"] == []
    model = run / "model_best.h5"
    stored = fingerprint.of(model)
    assert stored is not None
    edit_state(model, fingerprint=stored | {"code": stored["code"] | {"src/models.py": "0"}})
    changed = "src/models.py has changed since the run; the figures are of the code as it is now"
    for words in (("bin/evaluate.py", run), ("bin/export.py", run, tmp_path / "exported")):
        done = quick_command(*words)
        assert done.returncode == 0, done.stderr
        assert changed in done.stderr
    summary = json.loads((run / "eval" / "test.json").read_text())
    assert summary["code_differs"] == ["src/models.py"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("no_such_run",), "no_such_run is not a run folder"),
        (("{run}", "--checkpoint=worst"), "there is no checkpoint worst"),
    ],
)
def test_evaluate_refuses(
    arguments: tuple[str, ...], message: str, quick_command: Command, run: Path
) -> None:
    done = quick_command("bin/evaluate.py", *(argument.format(run=run) for argument in arguments))
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("digit",), "digits"),
        (("digits", "--n_filter=4"), "n_filters"),
        (("digits", "--n_filters=many"), "n_filters"),
        (("digits", "--n_filters=[1, 2]"), "n_filters"),
        (("digits", "--optimizer=adm"), "adam"),
        (("digits", "--model=keras.Sequential"), "does not take this config"),
        (("digits", "--hooks=[engine.hooks.KeepCheckpoint]"), "did you mean 'KeepCheckpoints'"),
    ],
)
def test_train_refuses_in_one_sentence_and_writes_nothing(
    arguments: tuple[str, ...], message: str, quick_command: Command, tmp_path: Path
) -> None:
    name, *overrides = arguments
    done = quick_command("bin/train.py", name, tmp_path / "run", *overrides)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_help_and_usage_errors_do_without_tensorflow(command: Command, tmp_path: Path) -> None:
    for arguments in (["--help"], ["digit", tmp_path / "run"], ["digits", "--dry_run", tmp_path]):
        done = command("-X", "importtime", "bin/train.py", *arguments)
        modules = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
        assert "vegab" in modules
        assert not modules & {"tensorflow", "keras", "numpy", "pandas", "matplotlib", "h5py"}


def test_help_explains_every_key(command: Command) -> None:
    from configs import registry

    text = " ".join(command("bin/train.py", "--help").stdout.split())
    for key in registry.get_root_config():
        assert f"--{key}" in text or f"--[no_]{key}" in text
    for name in ("digits", "cifar10", "cifar100", "digits_wide"):
        assert name in text


@pytest.mark.slow
def test_the_example_runner_trains(quick_command: Command, tmp_path: Path) -> None:
    done = quick_command(
        "src/scripts/train_simple_CNN.py",
        "root",
        tmp_path / "simple_cnn" / "first",
        "--n_layers=2",
        "--n_filters=4",
        "--num_epochs=1",
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "simple_cnn" / "first" / "train_simple_CNN.py").is_file()
    assert (tmp_path / "simple_cnn" / "first" / "model.h5").is_file()
