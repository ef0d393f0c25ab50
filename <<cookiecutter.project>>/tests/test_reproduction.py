"""Forks of a run, and runs that are made again from their folder.

The tests share a project of its own in a git repository, and one run of it, which was made with
uncommitted code and killed twice and stopped once. They build on one another.
"""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import pytest

from src.commit_file import commits_of, weights_in
from tests.conftest import ROOT

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="needs git")

Do = Callable[..., subprocess.CompletedProcess[str]]
RUN = "results/a run"
COMMITS = ("model.h5", "model_best.h5", "history.csv")
STEPS = 10  # an epoch
# checkpoint_steps does not divide an epoch, so that a kill comes at every kind of place.
CONFIG = {
    "num_epochs": 4,
    "n_filters": 2,
    "n_layers": 1,
    "batch_size": 128,
    "learning_rate": 0.003,
    "lr_schedule": None,
    "tensorboard": False,
    "checkpoint_steps": 4,
    "hooks": [
        {"class": "src.hooks.KeepCheckpoints", "every": STEPS, "keep": 3},
        {"class": "src.ending.EndAt"},
    ],
}
ENDING = '''"""Ends the process after a step, as the environment says."""

import os

from src.hooks import Hook


class EndAt(Hook):
    def __init__(self):
        step, _, self.signal = os.environ.get("END_AT", "0:9").partition(":")
        self.step = int(step)

    def next_step(self, global_step):
        return self.step if global_step < self.step else None

    def after_step(self, global_step, last_results):
        if global_step == self.step:
            os.kill(os.getpid(), int(self.signal))
'''


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of this project that reads its digits from a file that git ignores."""
    project = tmp_path_factory.mktemp("a project") / "it's mine"
    for name in ("bin", "configs", "src", "vegab"):
        leave_out = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, project / name, ignore=leave_out)
    (project / "data").mkdir()
    shutil.copy(ROOT / "data" / "digits" / "digits.npz", project / "data" / "mine.npz")
    replace(project / "src" / "data.py", '"digits" / "digits.npz"', '"mine.npz"')
    (project / ".gitignore").write_text("/results/\n/data/\n__pycache__/\n")
    (project / "config.json").write_text(json.dumps(CONFIG))
    git(project, "init", "-q")
    commit(project)
    return project


@pytest.fixture(scope="module")
def do(project: Path) -> Do:
    """Run `python SCRIPT ARGUMENTS` from the root of that project."""

    def run(*arguments: object, end_at: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *map(str, arguments)],
            cwd=project,
            env=os.environ | ({"END_AT": end_at} if end_at else {}),
            capture_output=True,
            text=True,
            timeout=120,
        )

    return run


@pytest.fixture(scope="module")
def run(project: Path, do: Do) -> Path:
    """A run with code that git does not have, killed at two places and stopped at a third."""
    replace(project / "src" / "models.py", 'Activation("relu")', 'Activation("tanh")')
    (project / "src" / "ending.py").write_text(ENDING)
    for end in (f"13:{signal.SIGKILL}", f"27:{signal.SIGTERM}", f"33:{signal.SIGKILL}"):
        done = do("bin/train.py", "config.json", RUN, end_at=end)
        assert done.returncode in (75, -signal.SIGKILL), done.stderr
        if "33:" in end:
            shutil.copytree(project / RUN, project / "results" / "died")
    done = do("bin/train.py", "config.json", RUN)
    assert done.returncode == 0, done.stderr
    return project / RUN


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert text.count(old) == 1, path
    path.write_text(text.replace(old, new))


def git(project: Path, *arguments: str) -> None:
    identity = ("-c", "user.name=T", "-c", "user.email=t@example.org")
    subprocess.run(["git", *identity, *arguments], cwd=project, check=True, capture_output=True)


def commit(project: Path) -> None:
    git(project, "add", "--all")
    git(project, "commit", "-q", "-m", "one more")


def content_of(folder: Path) -> dict[str, bytes]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def copy_of(run: Path, name: str) -> Path:
    return Path(shutil.copytree(run, run.with_name(name)))


def meta_of(folder: Path) -> dict[str, Any]:
    meta: dict[str, Any] = json.loads((folder / "meta.json").read_text())
    return meta


# ---- forks ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fork(project: Path, run: Path, do: Do) -> Path:
    """A fork of the run, with its config."""
    words = (f"{RUN}/config.json", "results/fork", "--fork", RUN, "--from_epoch", "2")
    done = do("bin/train.py", *words)
    assert done.returncode == 0, done.stderr
    assert f"starting from {RUN}/checkpoints/model-20.h5" in done.stdout
    return project / "results" / "fork"


def test_a_fork_from_an_epoch_ends_as_the_run_itself(project: Path, run: Path, fork: Path) -> None:
    kept = {commit.path.name for commit in commits_of(run) if commit.epoch == 2}
    assert kept == {"model-20.h5"}
    for name in COMMITS:
        assert (fork / name).read_bytes() == (run / name).read_bytes(), name
    meta = meta_of(fork)
    attempt = meta_of(run)["attempts"][0]
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=project, capture_output=True, text=True, check=True
    )
    assert meta["parent"] == {
        "path": RUN,
        "from_epoch": 2,
        "from_step": 2 * STEPS,
        "started": attempt["start"],
        "commit": head.stdout.strip(),
    }
    assert meta["config"] == f"{RUN}/config.json"
    assert meta["flags"] == {"fork": RUN, "from_epoch": 2}


def test_a_fork_with_another_rate_goes_on_at_that_rate(project: Path, run: Path, do: Do) -> None:
    done = do("bin/train.py", f"{RUN}/config.json", "results/faster", "--fork", RUN,
              "--from_epoch=3", "--learning_rate=0.03")  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = (project / "results" / "faster" / "history.csv").read_text().splitlines()
    old = (run / "history.csv").read_text().splitlines()
    assert rows[:4] == old[:4]
    assert rows[4].split(",")[:3] == ["3", "40", "0.03"]
    assert rows[4].split(",")[3] != old[4].split(",")[3]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--from_epoch=2",), "--from_epoch needs the run to begin with: add --fork=RUN"),
        (("--fork", RUN, "--from_epoch=1"), "no commit of the end of epoch 1, but of 2, 3, 4"),
        (("--fork", RUN, "--from_epoch=-1"), "--from_epoch is -1; it must be at least 1"),
        (("--fork", "src"), "src is not a run folder"),
        (("--fork", RUN, "--checkpoint", RUN), "--fork and --checkpoint both say"),
        (("--fork", RUN, "--warm_start", RUN), "--fork and --warm_start both say"),
        (("--fork", RUN, "--retrain"), "--retrain needs"),
        (("--fork", RUN), "4 epochs are done, of 4 in this config"),
        (("--fork", RUN, "--from_epoch=3", "--n_filters=3"), "written by another model"),
    ],
)
def test_a_fork_that_cannot_be_is_refused(
    words: tuple[str, ...], sentence: str, project: Path, run: Path, do: Do
) -> None:
    done = do("bin/train.py", f"{RUN}/config.json", "results/none", *words)
    assert done.returncode == 2, done.stderr
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr
    assert not (project / "results" / "none").exists()


# ---- runs made again -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def later(project: Path, run: Path, fork: Path) -> Path:
    """The project after its code has changed and was committed."""
    replace(project / "src" / "models.py", 'Activation("tanh")', 'Activation("gelu")')
    (project / "src" / "ending.py").unlink()
    commit(project)
    return project


def test_a_run_is_identical_with_its_own_code(
    later: Path, run: Path, do: Do, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    before = content_of(run)
    done = do("bin/reproduce.py", RUN)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith(f"{RUN}: finished, 4 of 4 epochs, 4 attempts, commit ")
    assert lines[0].endswith(", with uncommitted changes")
    assert lines[1] == "not from the run folder: data/mine.npz from the project's data/"
    assert lines[-1] == "identical to the bit: history.csv (4 epochs), model.h5, model_best.h5"
    assert content_of(run) == before
    assert not list(tmp_path.glob("reproduce-*")), "nothing is left where all is identical"


def test_a_fork_begins_again_with_the_state_that_it_had(later: Path, do: Do) -> None:
    done = do("bin/reproduce.py", "results/fork")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "identical to the bit: history.csv (4 epochs), model.h5, model_best.h5" in done.stdout


def test_a_run_that_died_is_compared_as_far_as_it_came(later: Path, do: Do) -> None:
    done = do("bin/reproduce.py", "results/died")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "results/died: died, 3 of 3 epochs, 3 attempts" in done.stdout
    assert "identical to the bit: history.csv (3 epochs)" in done.stdout


def test_an_edited_cell_is_named_and_the_first_epochs_can_be_compared_alone(
    later: Path, run: Path, do: Do, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    edited = copy_of(run, "edited")
    lines = (edited / "history.csv").read_text().splitlines()
    header, cells = lines[0].split(","), lines[3].split(",")
    column = header.index("val_loss")
    was, cells[column] = cells[column], "0.125"
    lines[3] = ",".join(cells)
    (edited / "history.csv").write_text("\n".join(lines) + "\n")

    first = do("bin/reproduce.py", "results/edited", "--epochs", "1")
    assert first.returncode == 0, first.stdout + first.stderr
    assert "results/edited: finished, 1 of 4 epochs" in first.stdout
    assert "identical to the bit: history.csv (1 epoch)" in first.stdout

    done = do("bin/reproduce.py", "results/edited")
    assert done.returncode == 1, done.stderr
    sentence = f"epoch 2, val_loss: 0.125 in results/edited, {was} when run again"
    assert f"different: history.csv, {sentence}\n" in done.stdout
    assert f"likely cause: history.csv was changed after the run: its model.h5 has {was}\n" in (
        done.stdout
    )
    (kept,) = tmp_path.glob("reproduce-*")
    assert f"kept to look at: {kept} " in done.stdout
    assert (kept / "run" / "model.h5").read_bytes() == (run / "model.h5").read_bytes()
    assert "tanh" in (kept / "code" / "src" / "models.py").read_text()


def test_other_data_are_the_likely_cause(
    later: Path, do: Do, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import numpy as np

    monkeypatch.setenv("TMPDIR", str(tmp_path))
    path = later / "data" / "mine.npz"
    good = path.read_bytes()
    with np.load(path) as file:
        np.savez(path, images=file["images"][::-1], labels=file["labels"])
    done = do("bin/reproduce.py", RUN, "--epochs=1")
    path.write_bytes(good)
    assert done.returncode == 1, done.stderr
    assert "different: history.csv, epoch 0, loss: " in done.stdout
    assert "likely cause: the data is another\n" in done.stdout


def test_what_cannot_be_made_again_is_refused_and_left_alone(
    later: Path, run: Path, fork: Path, do: Do
) -> None:
    running = open(copy_of(run, "running") / "run.lock", "r+")  # noqa: SIM115
    fcntl.lockf(running, fcntl.LOCK_EX)
    damaged = copy_of(run, "damaged")
    (damaged / "model.h5").unlink()  # a link to others of its folder
    shutil.copy(run / "model.h5", damaged)
    with h5py.File(damaged / "model.h5", "r+") as file:
        weights_in(file)[0][1][0, 0] += 1
    torn = copy_of(run, "torn")
    (torn / "config.json").write_text('{"num_epochs": 4, ')
    empty = copy_of(run, "empty")
    for path in empty.glob("model*.h5"):
        path.unlink()
    codeless = copy_of(run, "codeless")
    shutil.rmtree(codeless / "code")
    for name, flags in (("gpus", {"gpus": "77"}), ("start", {"checkpoint": "gone.h5"})):
        folder = copy_of(run, name)
        (folder / "meta.json").write_text(json.dumps(meta_of(run) | {"flags": flags}))
    orphan = copy_of(fork, "orphan")
    meta = meta_of(orphan)
    meta["parent"]["from_step"] = 7
    (orphan / "meta.json").write_text(json.dumps(meta))
    for words, sentence in [
        (("src",), "src is not a run folder"),
        (("results/running",), "results/running is still running"),
        (("results/nowhere",), "results/nowhere is not a run folder"),
        (("results/damaged",), "model.h5 is damaged"),
        (("results/torn",), "cannot read results/torn/config.json"),
        (("results/empty",), "results/empty has no model.h5"),
        (("results/codeless",), "code is gone"),
        (("results/gpus",), "ran with --gpus=77"),
        (("results/start",), "began with --checkpoint=gone.h5, which is not there any more"),
        (("results/orphan",), f"the state of {RUN} after step 7, which is not kept there"),
        ((RUN, "--epochs=5"), "--epochs is 5; results/a run has 4 epochs"),
        ((RUN, "--epochs=-1"), "--epochs is -1"),
    ]:
        folder = later / words[0]
        # To read the lock file would give the lock back.
        looks = "results/" in words[0] and words[0] != "results/running"
        before = content_of(folder) if looks else {}
        done = do("bin/reproduce.py", *words)
        assert done.returncode == 2, (words, done.stdout, done.stderr)
        assert sentence in done.stderr, (words, done.stderr)
        assert len(done.stderr.splitlines()) == 1
        assert not before or content_of(folder) == before
    running.close()
