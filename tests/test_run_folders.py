"""What runs of a generated project leave on the disk."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import pty
import re
import resource
import shutil
import subprocess
import sys
import tarfile
import termios
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forked
import h5py
import numpy as np
import pytest
from cifar_archive import write_cifar
from conftest import files_below, run

Done = subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def lab(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the default project with callbacks that do harm, uncommitted as in real life."""
    copy = tmp_path_factory.mktemp("lab") / "my-research"
    shutil.copytree(project, copy, symlinks=True)
    (copy / "src" / "harm.py").write_text(HARM)
    models = copy / "src" / "models.py"
    models.write_text(models.read_text() + "\n# An edit that is not committed.\n")
    return copy


HARM = '''
import os

import keras


class Harm(keras.callbacks.Callback):
    """Makes the loss not a number at the end of the batch HARM, counted over the attempt from 1."""

    def __init__(self):
        super().__init__()
        self.left = int(os.environ.get("HARM", "0"))

    def on_train_batch_end(self, batch, logs=None):
        self.left -= 1
        if self.left == 0:
            for weight in self.model.trainable_weights:
                weight.assign(weight * float("nan"))
'''

# The small run that the tests below break: one command, harmful where the environment says so.
COMMAND = ("digits", "--n_filters=4", "--n_layers=1", "--callbacks=[{class: harm:Harm}]")


Train = Callable[..., Done]


@pytest.fixture
def train(lab: Path) -> Train:
    """Run `python bin/train.py ARGUMENTS`; `harm="50"` does harm at the 50th step.

    With an option of subprocess.run it is a process of its own from the start.
    """

    def command(*arguments: object, harm: str = "0", **options: Any) -> Done:
        environment = os.environ | {"HARM": harm} | options.pop("env", {})
        if options:
            words = (sys.executable, "bin/train.py", *arguments)
            return run(*words, cwd=lab, env=environment, check=False, **options)
        return forked.run(["bin/train.py", *map(str, arguments)], lab, environment, timeout=1800)

    return command


def rows_of(run_folder: Path) -> list[dict[str, str]]:
    with open(run_folder / "history.csv", newline="") as file:
        return list(csv.DictReader(file))


def meta_of(run_folder: Path) -> dict[str, Any]:
    return json.loads((run_folder / "meta.json").read_text())


@pytest.fixture(scope="module")
def digits(lab: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The main job: the digits with the default config, and their evaluation."""
    folder = tmp_path_factory.mktemp("results") / "digits"
    run(sys.executable, "bin/train.py", "digits", folder, cwd=lab)
    run(sys.executable, "bin/evaluate.py", folder, cwd=lab)
    return folder


def test_the_digits_are_learnt(digits: Path) -> None:
    summary = json.loads((digits / "eval" / "test.json").read_text())
    assert summary["num_examples"] == 357
    assert summary["accuracy"] >= 0.97


def test_history_and_timing_have_a_row_per_epoch(digits: Path) -> None:
    rows = rows_of(digits)
    assert [int(row["epoch"]) for row in rows] == list(range(1, 31))
    assert [int(row["step"]) for row in rows] == [40 * n for n in range(1, 31)]
    rates = [float(row["learning_rate"]) for row in rows]
    assert rates == [0.003] * 20 + [0.0005] * 6 + [0.0001] * 4
    assert float(rows[-1]["val_loss"]) < float(rows[0]["val_loss"])
    with open(digits / "timing.csv", newline="") as file:
        timing = list(csv.DictReader(file))
    assert [row["epoch"] for row in timing] == [row["epoch"] for row in rows]
    assert all(float(row["seconds"]) > 0 for row in timing)
    assert not {"seconds", "finished_at"} & set(rows[0])


def test_keras_and_h5py_open_the_model(digits: Path) -> None:
    import keras

    model = keras.models.load_model(digits / "model_best.h5")
    assert model.predict(np.zeros((1, 8, 8, 1)), verbose=0).shape == (1, 10)
    content = (digits / "model.h5").read_bytes()
    assert hashlib.sha256(content[512:]).hexdigest().encode() in content[:512]
    with h5py.File(digits / "model.h5") as file:
        state = json.loads(file["training_state/state"][()])
        history = file["training_state/history"][: state["num_rows"]]
    # Epochs count from 0 in the checkpoint, and from 1 where people read them.
    written = {key: [row[key] for row in rows_of(digits)] for key in state["columns"]}
    written["epoch"] = [str(int(number) - 1) for number in written["epoch"]]
    for column, key in zip(history.T, state["columns"], strict=True):
        assert [np.float32(value) for value in column] == [
            np.float32(text) for text in written[key]
        ]
    best = min(rows_of(digits), key=lambda row: float(row["val_loss"]))
    assert state["best_epoch"] == int(best["epoch"]) - 1


def test_meta_json_tells_how_it_was_made(digits: Path, lab: Path) -> None:
    meta = meta_of(digits)
    head = run("git", "rev-parse", "HEAD", cwd=lab).stdout.strip()
    assert meta["git"]["commit"] == head
    assert meta["git"]["dirty"] is True
    assert "+# An edit that is not committed." in meta["git"]["diff"]
    assert "+class Harm(keras.callbacks.Callback):" in meta["git"]["diff"]
    import keras

    assert meta["packages"]["keras"] == keras.__version__
    assert meta["seeds"] == {"seed": 0}
    assert meta["command"]["line"].endswith(f"bin/train.py digits {digits}")
    assert meta["status"] == "finished"
    (attempt,) = meta["attempts"]
    assert attempt["exit_status"] == 0
    assert attempt["start"] < attempt["end"]
    assert attempt["to"]["global_step"] == 1200


def test_code_is_the_source_as_it_ran(digits: Path, lab: Path) -> None:
    with zipfile.ZipFile(digits / "code.zip") as archive:
        code = {name: archive.read(name) for name in archive.namelist()}
    for name in ("bin/train.py", "src/models.py", "src/harm.py", "configs/__init__.py"):
        assert code[name] == (lab / name).read_bytes()
    assert "data/digits/digits.npz" in code
    assert (digits / "train.py").read_bytes() == (lab / "bin" / "train.py").read_bytes()


def test_stdout_has_a_line_per_epoch_and_no_progress_bar(digits: Path) -> None:
    lines = (digits / "stdout.txt").read_text().splitlines()
    assert len([line for line in lines if line.startswith("epoch ")]) == 30
    for name in ("stdout.txt", "stderr.txt"):
        assert "\r" not in (digits / name).read_text()
        assert "step/s" not in (digits / name).read_text()


def test_the_pictures_show_something(digits: Path) -> None:
    from matplotlib.image import imread

    for name in ("learning_curve.png", "eval/confusion_matrix.png"):
        picture = imread(digits / name)[..., :3]
        assert picture.shape[0] > 300
        colours = np.unique((picture.reshape(-1, 3) * 255).astype(int), axis=0)
        assert len(colours) > 50


def test_tensorboard_reads_the_history(digits: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(digits / "tb"), {"tensors": 0}).Reload()
    tags = events.Tags()["tensors"]
    assert {"loss", "val_loss", "val_accuracy"} <= set(tags)
    assert [event.step for event in events.Tensors("loss")] == list(range(1, 31))


@pytest.mark.slow
def test_flags_do_what_they_say(train: Train, tmp_path: Path) -> None:
    done = train(
        "digits",
        tmp_path / "run",
        "--num_epochs=3",
        "--n_filters=10",
        "--n_layers=2",
        "--batch_size=64",
        "--no_augmented",
        "--lr_schedule=[[1, 0.1], [2, 0.01]]",
        "--optimizer=sgd",
        "--precision=mixed_bfloat16",
        "--seed=1",
    )
    assert done.returncode == 0, done.stderr
    rows = rows_of(tmp_path / "run")
    assert [float(row["learning_rate"]) for row in rows] == [0.1, 0.01, 0.01]
    assert int(rows[0]["step"]) == -(-1260 // 64)
    with h5py.File(tmp_path / "run" / "model.h5") as file:
        model_config, training_config = file.attrs["model_config"], file.attrs["training_config"]
    assert '"filters": 10' in str(model_config)
    assert '"filters": 20' in str(model_config)
    assert "mixed_bfloat16" in str(model_config)
    assert '"class_name": "SGD"' in str(training_config)


LIMIT = 1800  # seconds, after which what is waited for counts as hung


@pytest.mark.slow
def test_a_loss_that_is_not_a_number_stops_the_run(train: Train, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    done = train(*COMMAND, folder, "--num_epochs=2", harm="50")
    assert done.returncode == 1
    (sentence,) = [line for line in done.stderr.splitlines() if "train.py" in line]
    assert "at step 11 of epoch 2" in sentence
    assert "Traceback" not in done.stderr
    assert "Traceback" in (folder / "stderr.txt").read_text()
    assert len(rows_of(folder)) == 1
    assert train(*COMMAND, folder, "--num_epochs=2").returncode == 0
    assert [np.isfinite(float(row["loss"])) for row in rows_of(folder)] == [True, True]
    going_on = tmp_path / "going_on"
    done = train(*COMMAND, going_on, "--num_epochs=2", "--on_nan=continue", harm="50")
    assert done.returncode == 0
    assert rows_of(going_on)[1]["loss"] == "nan"


def test_a_disk_without_space_keeps_the_state_before(train: Train, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert train(*COMMAND, folder, "--num_epochs=1").returncode == 0
    before = {name: (folder / name).read_bytes() for name in ("model.h5", "history.csv")}
    limit = len(before["model.h5"]) - 1  # the kernel refuses to let a file grow beyond

    def no_space() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    done = train(*COMMAND, folder, "--num_epochs=2", preexec_fn=no_space)
    assert done.returncode == 1
    (sentence,) = [line for line in done.stderr.splitlines() if "train.py: failed" in line]
    assert "could not be written" in sentence
    assert {name: (folder / name).read_bytes() for name in before} == before
    assert not list(folder.glob(".*partial*"))
    assert train(*COMMAND, folder, "--num_epochs=2").returncode == 0
    assert len(rows_of(folder)) == 2


# A proxy where nobody listens: no network, on any machine.
NO_NETWORK = {"https_proxy": "http://127.0.0.1:9"}


@pytest.fixture
def bare(tmp_path: Path) -> dict[str, str]:
    """The environment of somebody who has set nothing, with a home in which nothing is."""
    (tmp_path / "home").mkdir()
    return {"PATH": os.environ["PATH"], "HOME": str(tmp_path / "home")}


@pytest.mark.slow
@pytest.mark.parametrize("which", ["cifar10", "cifar100"])
def test_cifar_is_trained_on_where_nothing_is_set(
    which: str, bare: dict[str, str], lab: Path, tmp_path: Path
) -> None:
    archive = write_cifar(Path(bare["HOME"], ".keras", "datasets"), which, 40)
    before, folder = archive.read_bytes(), tmp_path / "run"
    words = (sys.executable, "bin/train.py", which, folder, "--n_filters=10")
    done = run(*words, cwd=lab, env=bare)
    assert len(rows_of(folder)) == {"cifar10": 60, "cifar100": 80}[which]
    assert "already finished" in run(*words, cwd=lab, env=bare).stdout
    run(sys.executable, "bin/evaluate.py", folder, cwd=lab, env=bare)
    summary = json.loads((folder / "eval" / "test.json").read_text())
    assert summary["num_examples"] == 40
    # Nothing was downloaded, over the archive or next to it.
    assert "Downloading" not in done.stdout + done.stderr
    assert files_below(archive.parent) == {archive.name: before}


@pytest.mark.slow
def test_what_is_evaluated_without_its_data_is_left_as_it_is(
    bare: dict[str, str], lab: Path, tmp_path: Path
) -> None:
    archive = write_cifar(Path(bare["HOME"], ".keras", "datasets"), "cifar10", 40)
    folder = tmp_path / "run"
    words = ("bin/train.py", "cifar10", folder, "--n_filters=2", "--num_epochs=1")
    run(sys.executable, *words, cwd=lab, env=bare)
    archive.unlink()
    before = files_below(folder)
    evaluated = (sys.executable, "bin/evaluate.py", folder)
    done = run(*evaluated, cwd=lab, env=bare | NO_NETWORK, check=False)
    assert done.returncode == 2
    (sentence,) = [line for line in done.stderr.splitlines() if "evaluate.py" in line]
    assert f"{archive.name} is not in {archive.parent} and" in sentence
    assert "Traceback" not in done.stdout + done.stderr
    assert files_below(folder) == before


@pytest.mark.parametrize(
    ("variable", "place"),
    [
        (None, "home/.keras/datasets"),
        pytest.param("KERAS_HOME", "cache/datasets", marks=pytest.mark.slow),
        pytest.param("DATA_DIR", "cache", marks=pytest.mark.slow),
    ],
)
def test_without_network_and_copy_it_says_what_to_put_where(
    variable: str | None, place: str, bare: dict[str, str], lab: Path, tmp_path: Path
) -> None:
    environment = bare | NO_NETWORK | ({variable: str(tmp_path / "cache")} if variable else {})
    folder = tmp_path / "run"
    words = (sys.executable, "bin/train.py", "cifar10", folder, "--n_filters=2", "--num_epochs=1")
    done = run(*words, cwd=lab, env=environment, check=False)
    assert done.returncode == 2
    (sentence,) = [line for line in done.stderr.splitlines() if "train.py" in line]
    assert f"cifar-10-python.tar.gz is not in {tmp_path / place} and" in sentence
    assert "cifar-10-python.tar.gz there" in sentence
    assert "Traceback" not in done.stdout + done.stderr
    assert not folder.exists()


@pytest.mark.slow
def test_evaluate_alone_reads_the_test_set(train: Train, lab: Path, tmp_path: Path) -> None:
    archive = write_cifar(tmp_path / "data", "cifar100", 40)
    without_test = tmp_path / "without_test" / archive.name
    without_test.parent.mkdir()
    with tarfile.open(archive) as old, tarfile.open(without_test, "w:gz") as new:
        member = old.getmember("cifar-100-python/train")
        new.addfile(member, old.extractfile(member))
    environment = {"DATA_DIR": str(without_test.parent)}
    command = ("cifar100", tmp_path / "run", "--n_filters=2", "--num_epochs=1")
    assert train(*command, env=environment).returncode == 0
    words = (sys.executable, "bin/evaluate.py", tmp_path / "run")
    done = run(*words, cwd=lab, env=os.environ | environment, check=False)
    assert done.returncode == 1
    assert "cannot be read" in done.stderr


@pytest.mark.slow
def test_a_progress_bar_on_a_terminal_and_nowhere_else(lab: Path, tmp_path: Path) -> None:
    command = [sys.executable, "bin/train.py", *COMMAND, "--num_epochs=30"]

    def on_terminal(*arguments: object) -> str:
        leader, follower = pty.openpty()
        termios.tcsetwinsize(follower, (24, 100))
        words = [*command, *map(str, arguments)]
        process = subprocess.Popen(words, cwd=lab, stdin=follower, stdout=follower, stderr=follower)
        os.close(follower)
        shown = b""
        while True:
            try:
                piece = os.read(leader, 65536)
            except OSError:  # the last one closed the terminal
                break
            if not piece:
                break
            shown += piece
        assert process.wait(timeout=LIMIT) == 0
        os.close(leader)
        return shown.decode()

    shown = on_terminal(tmp_path / "run")
    assert "step/s" in shown
    assert "loss" in shown
    # No line of the log shares its line with what is left of the bar.
    ends = [line.rsplit("\r", 1)[-1].split("\x1b[K")[-1] for line in shown.splitlines()]
    assert len([line for line in ends if re.match(r"epoch +\d+/30  +\d", line)]) == 30
    for name in ("stdout.txt", "stderr.txt"):
        text = (tmp_path / "run" / name).read_text()
        assert "step/s" not in text
        assert "\r" not in text
    quiet = on_terminal(tmp_path / "quiet", "-l", "WARNING")
    assert "step/s" not in quiet
    assert "epoch" not in quiet


@pytest.mark.slow
def test_the_example_runner_is_a_program_of_its_own(
    bare: dict[str, str], lab: Path, tmp_path: Path
) -> None:
    own = tmp_path / "own"
    shutil.copytree(lab, own, symlinks=True)
    script = "src/scripts/train_simple_CNN.py"
    bare["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), bare["PATH"]])
    words = (f"./{script}", "root", "results/simple_cnn/first", "--n_layers=10")
    assert run(*words, cwd=own, env=bare).stderr == ""
    folder = own / "results" / "simple_cnn" / "first"
    assert (folder / "train_simple_CNN.py").read_bytes() == (own / script).read_bytes()
    assert len(rows_of(folder)) == 20
    assert "already finished" in run(*words, cwd=own, env=bare).stdout
    assert f"\n{' '.join(words)}\n" in (own / script).read_text()
    assert len((own / script).read_text().splitlines()) <= 60
