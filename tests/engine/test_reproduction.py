"""Forks of a run, and runs that are made again from their folder.

The tests share a project of its own in a git repository, and one run of it, which was made with
uncommitted code, and killed, stopped and made to fail. They build on one another.
"""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forked
import h5py
import pytest
from conftest import files_below
from machinery import ROOT

from engine.checkpoints.file import HISTORY, commits_of, datasets_in, read_state
from engine.runs import reproduction
from vegab import UsageError, snapshot

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
    "batch_size": 126,
    "learning_rate": 0.003,
    "lr_schedule": None,
    "tensorboard": False,
    "checkpoint_steps": 4,
    "hooks": [
        {"class": "engine.hooks.KeepCheckpoints", "every": STEPS, "keep": 3},
        {"class": "src.ending.EndAt"},
    ],
}
ENDING = '''"""Ends the process after a step, as the environment says; by 0 it fails."""

import os

from engine.hooks import Hook


class EndAt(Hook):
    def __init__(self):
        step, _, self.signal = os.environ.get("END_AT", "0:9").partition(":")
        self.step = int(step)

    def next_step(self, global_step):
        return self.step if global_step < self.step else None

    def after_step(self, global_step, last_results):
        if global_step == self.step and not int(self.signal):
            raise RuntimeError("the end")
        if global_step == self.step:
            os.kill(os.getpid(), int(self.signal))
'''
FAILURE = "33:0"  # a step after a commit


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of this project that reads its digits from a file that git ignores."""
    project = tmp_path_factory.mktemp("a project") / "it's mine"
    for name in ("bin", "configs", "engine", "src", "vegab"):
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
    """Run `python SCRIPT ARGUMENTS` from the root of that project, maybe with one core alone."""

    def use_one_core() -> None:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

    def run(
        *arguments: object, end_at: str = "", one_core: bool = False
    ) -> subprocess.CompletedProcess[str]:
        words = [*map(str, arguments)]
        if not one_core:
            return forked.run(words, project, os.environ | ({"END_AT": end_at} if end_at else {}))
        return subprocess.run(
            [sys.executable, *words],
            cwd=project,
            capture_output=True,
            text=True,
            timeout=1800,
            preexec_fn=use_one_core,
        )

    return run


@pytest.fixture(scope="module")
def run(project: Path, do: Do) -> Path:
    """A run with code that git does not have; it was killed, stopped, and failed once.

    What it was then is results/failed.
    """
    replace(project / "src" / "models.py", 'Activation("relu")', 'Activation("tanh")')
    (project / "src" / "ending.py").write_text(ENDING)
    ends = {f"13:{signal.SIGKILL}": -signal.SIGKILL, f"27:{signal.SIGTERM}": 75, FAILURE: 1}
    for end, code in ends.items():
        done = do("bin/train.py", "config.json", RUN, end_at=end)
        assert done.returncode == code, done.stderr
    copy_of(project / RUN, "failed")
    done = do("bin/train.py", "config.json", RUN)
    assert done.returncode == 0, done.stderr
    return project / RUN


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert text.count(old) == 1, path
    path.write_text(text.replace(old, new))


def git(project: Path, *arguments: str) -> str:
    words = ("git", "-c", "user.name=T", "-c", "user.email=t@example.org", *arguments)
    return subprocess.run(words, cwd=project, check=True, capture_output=True, text=True).stdout


def commit(project: Path) -> None:
    git(project, "add", "--all")
    git(project, "commit", "-q", "-m", "one more")


def copy_of(run: Path, name: str) -> Path:
    return Path(shutil.copytree(run, run.with_name(name)))


def meta_of(folder: Path) -> dict[str, Any]:
    meta: dict[str, Any] = json.loads((folder / "meta.json").read_text())
    return meta


# ---- forks ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fork(project: Path, run: Path, do: Do) -> Path:
    """A fork of the run, with its config, and on fewer cores where there are several."""
    words = (f"{RUN}/config.json", "results/fork", "--fork", RUN, "--from_epoch", "2")
    done = do("bin/train.py", *words, one_core=hasattr(os, "sched_setaffinity"))
    assert done.returncode == 0, done.stderr
    assert f"starting from {RUN}/checkpoints/model-20.h5" in done.stdout
    return project / "results" / "fork"


def test_a_fork_from_an_epoch_ends_as_the_run_itself(project: Path, run: Path, fork: Path) -> None:
    commits = commits_of(run)
    assert {commit.path.name for commit in commits if commit.epoch == 2} == {"model-20.h5"}
    steps = [commit.state["global_step"] for commit in commits]
    assert steps == sorted(steps, reverse=True)
    assert commits[0].path.name == "model.h5"
    for name in COMMITS:
        assert (fork / name).read_bytes() == (run / name).read_bytes(), name
    meta = meta_of(fork)
    attempt = meta_of(run)["attempts"][0]
    assert meta["parent"] == {
        "path": RUN,
        "from_epoch": 2,
        "from_step": 2 * STEPS,
        "started": attempt["start"],
        "commit": git(project, "rev-parse", "HEAD").strip(),
    }
    assert meta["config"] == f"{RUN}/config.json"
    assert meta["flags"] == {"fork": RUN, "from_epoch": 2}


@pytest.mark.slow
def test_a_fork_may_have_another_rate_and_another_monitor(project: Path, run: Path, do: Do) -> None:
    parent = copy_of(run, "parent")
    shutil.copy(parent / "checkpoints" / "model-20.h5", parent / "checkpoints" / "mine.h5")
    with h5py.File(parent / "checkpoints" / "mine.h5", "r+") as file:
        file[HISTORY][0, -1] += 1  # of another run
    # The worst epoch is the best now: the first, whose weights are not kept.
    done = do("bin/train.py", f"{RUN}/config.json", "results/faster", "--fork=results/parent",
              "--from_epoch=3", "--learning_rate=0.003001", "--monitor_mode=max")  # fmt: skip
    assert done.returncode == 0, done.stderr
    faster = project / "results" / "faster"
    rows = (faster / "history.csv").read_text().splitlines()
    old = (run / "history.csv").read_text().splitlines()
    assert rows[:4] == old[:4]
    assert rows[4].split(",")[:3] == ["4", "40", "0.003001"]
    assert rows[4].split(",")[3] != old[4].split(",")[3]
    assert read_state(run / "model.h5")["best_epoch"] == 3
    assert read_state(faster / "model.h5")["best_epoch"] == 0
    assert "weights of epoch 1, the best so far, are not kept in results/parent" in done.stdout
    assert not (faster / "model_best.h5").exists()
    kept = {path.name for path in (faster / "checkpoints").iterdir()}
    assert kept == {"model-20.h5", "model-30.h5", "model-40.h5"}


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--from_epoch=2",), "--from_epoch needs the run to begin with: add --fork=RUN"),
        (("--fork", RUN, "--from_epoch=1"), "no checkpoint of the end of epoch 1, but of 2, 3, 4"),
        (("--fork", RUN, "--from_epoch=-1"), "--from_epoch is -1; it must be at least 1"),
        (("--fork", "src"), "src is not a run folder"),
        (("--fork", RUN, "--checkpoint", RUN), "--fork and --checkpoint both say"),
        (("--fork", RUN, "--warm_start", RUN), "--fork and --warm_start both say"),
        (("--fork", RUN, "--retrain"), "--retrain needs"),
        (("--fork", RUN), "4 epochs are done, of 4 in this config"),
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
    before = files_below(run)
    done = do("bin/reproduce.py", RUN)
    assert done.returncode == 0, done.stdout + done.stderr
    first, *lines = done.stdout.splitlines()
    assert first.startswith(f"{RUN}: finished, 4 of 4 epochs, 4 attempts, commit ")
    assert first.endswith(", with uncommitted changes")
    assert lines == [
        "not from the run folder: data from the project as it is now",
        "packages, Python and processor are the same",
        "data, devices and settings are the same",
        "identical bit for bit: history.csv (4 epochs), model.h5, model_best.h5",
    ]
    assert files_below(run) == before
    assert not list(tmp_path.glob("reproduce-*")), "nothing is left where all is identical"


def test_a_run_goes_on_with_its_own_code(later: Path, run: Path, do: Do) -> None:
    folder = copy_of(later / "results" / "failed", "goes on")
    before = files_below(folder)
    done = do("bin/train.py", "config.json", folder)
    assert done.returncode == 2
    assert "src.ending.EndAt" in done.stderr  # which the project has no more
    assert files_below(folder) == before
    for words in (("bin/train.py", "config.json"), ("bin/evaluate.py",)):
        done = do(*words, folder, "--own_code")
        assert done.returncode == 0, done.stdout + done.stderr
        assert "has changed" not in done.stderr
    for name in COMMITS:
        assert (folder / name).read_bytes() == (run / name).read_bytes(), name
    assert [path.name for path in folder.glob("code*")] == ["code.zip"]
    command = meta_of(folder)["command"]
    assert command["line"].split()[1] == command["script"] == "bin/train.py"
    assert json.loads((folder / "eval" / "test.json").read_text())["code_differs"] == []
    done = do("bin/train.py", "config.json", "results/nothing", "--own_code")
    assert done.returncode == 2
    assert "--own_code needs the folder of a run that has begun" in done.stderr


@pytest.mark.slow
def test_a_sweep_goes_on_with_the_code_that_it_began_with(later: Path, do: Do) -> None:
    words = ["bin/sweep.py", "mix.yaml", "results/mix", "--num_epochs=1", "--n_filters=2"]
    words += ["--n_layers=1", "--no_tensorboard", "--threads=1", "--jobs=1"]
    models, mix = later / "src" / "models.py", later / "results" / "mix"
    source, config = models.read_text(), later / "mix.yaml"
    config.write_text("dropout: 0.1\n")
    process = subprocess.Popen(
        [sys.executable, *words, "--seeds=3"], cwd=later, stderr=subprocess.DEVNULL
    )
    while not (mix / "seed=0" / "meta.json").exists():
        assert process.poll() is None
        time.sleep(0.05)
    models.write_text(source.replace('"gelu"', '"relu"'))
    config.write_text("dropout: 0.5\n")
    try:
        assert process.wait() == 0
        done = do(*words, "--seeds=4")
        assert done.returncode == 2
        assert "a sweep of another config (dropout: 0.1 -> 0.5)" in done.stderr
        config.write_text("dropout: 0.1\n")
        done = do(*words, "--seeds=4")
        assert done.returncode == 2
        assert "results/mix began with other code (src/models.py); add --own_code" in done.stderr
        config.write_text("dropout: 0.5\n")
        done = do(*words, "--seeds=4", "--own_code")
        assert done.returncode == 0, done.stdout + done.stderr
    finally:
        models.write_text(source)
    configs = [json.loads(path.read_text()) for path in mix.glob("seed=*/config.json")]
    assert [each["dropout"] for each in configs] == [0.1] * 4, "as the file was at the beginning"
    codes = [*mix.glob("seed=*/code.zip"), mix / "code.zip"]
    assert len(codes) == 5 and len({path.stat().st_ino for path in codes}) == 1
    assert b"gelu" in snapshot.read(codes[0])["src/models.py"]


def test_a_fork_begins_again_with_the_state_that_it_had(later: Path, do: Do) -> None:
    done = do("bin/reproduce.py", "results/fork", "--epochs=3")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith(
        "identical bit for bit: history.csv (3 epochs), checkpoints/model-30.h5\n"
    )


@pytest.mark.slow
def test_a_signal_that_ends_it_is_named(run: Path, do: Do) -> None:
    done = do("bin/reproduce.py", run, "--epochs=1", end_at=f"5:{signal.SIGSEGV}")
    assert done.returncode == 1
    assert "different: here it fails: it died by SIGSEGV (Segmentation fault)" in done.stdout


def test_a_run_that_failed_is_compared_as_far_as_it_came(later: Path, do: Do) -> None:
    failed = later / "results" / "failed"
    assert read_state(failed / "model.h5")["global_step"] == 32
    done = do("bin/reproduce.py", "results/failed", end_at=FAILURE)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "results/failed: failed, 3 of 3 epochs, 3 attempts" in done.stdout
    assert done.stdout.endswith(
        "identical bit for bit: history.csv (3 epochs), model_previous.h5\n"
    )


def test_another_weight_is_a_difference_where_it_is_kept(
    later: Path, run: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(run, tmp_path / "other"))
    path = other / "checkpoints" / "model-20.h5"
    shutil.copy(path, tmp_path / "a file of its own")
    (tmp_path / "a file of its own").replace(path)
    with h5py.File(path, "r+") as file:
        name, weights = datasets_in(file, "weights")[-1]
        weights[0] = 7
    result = reproduction.compare(reproduction.Original(other, 2), run)
    assert result.compared == ["history.csv (2 epochs)", "checkpoints/model-20.h5"]
    assert result.difference is not None
    assert result.difference.place.startswith("checkpoints/model-20.h5, ")
    assert result.difference.place.endswith(f"{name}[0]")
    assert result.difference.one == "7.0"

    path.unlink()
    result = reproduction.compare(reproduction.Original(other, 2), run)
    sentence = f"the weights after epoch 2 are not kept in {other}, and were not compared"
    assert (result.difference, result.left_out) == (None, sentence)


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
    assert first.stdout.endswith(
        "identical bit for bit: history.csv (1 epoch)\n"
        "the weights after epoch 1 are not kept in results/edited, and were not compared\n"
    )

    done = do("bin/reproduce.py", "results/edited")
    assert done.returncode == 1, done.stderr
    sentence = f"epoch 3, val_loss: 0.125 in results/edited, {was} when run again"
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
    assert "not as it was then: the data has changed\n" in done.stdout
    assert "different: history.csv, epoch 1, loss: " in done.stdout
    assert "likely cause: the data has changed\n" in done.stdout


def test_what_cannot_be_made_again_is_refused_and_left_alone(
    later: Path, run: Path, fork: Path, do: Do, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = open(copy_of(run, "running") / "run.lock", "r+")  # noqa: SIM115
    fcntl.lockf(running, fcntl.LOCK_EX)
    damaged = copy_of(run, "damaged")
    (damaged / "model.h5").unlink()  # a link to others of its folder
    shutil.copy(run / "model.h5", damaged)
    with h5py.File(damaged / "model.h5", "r+") as file:
        datasets_in(file, "weights")[0][1][0, 0] += 1
    torn = copy_of(run, "torn")
    (torn / "config.json").write_text('{"num_epochs": 4, ')
    empty = copy_of(run, "empty")
    for path in empty.glob("model*.h5"):
        path.unlink()
    codeless = copy_of(run, "codeless")
    (codeless / "code.zip").unlink()
    for name, flags in (("gpus", {"gpus": "77"}), ("start", {"checkpoint": "gone.h5"})):
        folder = copy_of(run, name)
        (folder / "meta.json").write_text(json.dumps(meta_of(run) | {"flags": flags}))
    garbled = copy_of(run, "garbled")
    (garbled / "history.csv").write_bytes(b"epoch,loss\n0,\xff\n")
    for name, changes in (
        ("orphan", {"from_step": 7}),
        ("adopted", {"started": "2020-01-01T00:00:00+00:00"}),
        ("heir", {"path": "results/damaged", "from_step": 4 * STEPS}),
    ):
        meta = meta_of(copy_of(fork, name))
        meta["parent"] |= changes
        (later / "results" / name / "meta.json").write_text(json.dumps(meta))
    refusals = [
        (("results/nowhere", 0), "results/nowhere is not a run folder"),
        (("results/damaged", 0), "model.h5 is corrupt"),
        (("results/torn", 0), "cannot read results/torn/config.json"),
        (("results/garbled", 0), "cannot read results/garbled/history.csv"),
        (("results/empty", 0), "results/empty has no model.h5"),
        (("results/codeless", 0), "code.zip is gone"),
        (("results/gpus", 0), "ran with --gpus=77"),
        (("results/start", 0), "began with --checkpoint=gone.h5, which is not there any more"),
        (("results/orphan", 0), f"the state of {RUN} after step 7, which is not there any more"),
        (
            ("results/adopted", 0),
            f"of {RUN} after step 20, and that folder holds another run",
        ),
        (("results/heir", 0), "of results/damaged after step 40; "),
        (("results/fork", 1), "the first 1 of results/fork are those of the run that it"),
        ((RUN, 5), "--epochs is 5; results/a run has 4 epochs"),
        ((RUN, -1), "--epochs is -1"),
    ]
    monkeypatch.chdir(later)
    monkeypatch.setattr(reproduction, "PROJECT", later)
    for (name, epochs), sentence in refusals:
        before = files_below(later / name) if (later / name).exists() else {}
        with pytest.raises(UsageError) as refusal:
            reproduction.Original(Path(name), epochs)
        assert sentence in str(refusal.value)
        assert not before or files_below(later / name) == before
    # As a user sees it. To read the lock file here would give the lock back.
    for name, sentence in [
        ("src", "src is not a run folder"),
        ("results/running", "results/running is still running"),
    ]:
        done = do("bin/reproduce.py", name)
        assert done.returncode == 2, (name, done.stdout, done.stderr)
        assert sentence in done.stderr
        assert len(done.stderr.splitlines()) == 1
    running.close()
