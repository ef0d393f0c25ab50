"""What the commands do besides what a project's own tests look at."""

import json
import os
import shutil
from pathlib import Path

import forked
import numpy as np
import pytest
from machinery import ROOT, Command
from matplotlib.image import imread
from test_fingerprint import edit_state

from engine.checkpoints import verify
from engine.training import fingerprint

SMALL = ("--n_filters=4", "--n_layers=1")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that the tests below share."""
    folder = tmp_path_factory.mktemp("results") / "run"
    words = ["bin/train.py", "digits", str(folder), "--num_epochs=3", *SMALL]
    done = forked.run(words, ROOT, os.environ)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
def test_evaluate_writes_the_first_pictures(quick_command: Command, run: Path) -> None:
    done = quick_command("bin/evaluate.py", run)
    assert done.returncode == 0, done.stderr
    # The first pictures of the test set, side by side: every fifth block of ten is in it.
    with np.load(ROOT / "data" / "digits" / "digits.npz") as file:
        first = [*file["images"][40:50], *file["images"][90:96]]
    pixels = np.rint(imread(run / "eval" / "examples.png")[..., :3] * 255)
    assert (pixels == np.rint(np.concatenate(first, axis=1) / 16 * 255)[..., np.newaxis]).all()


@pytest.mark.slow
def test_evaluate_and_export_name_the_source_that_has_changed(
    quick_command: Command, run: Path, tmp_path: Path
) -> None:
    quick_command("bin/evaluate.py", run, f"--checkpoint={run / 'model_previous.h5'}")
    summary = json.loads((run / "eval" / "test.json").read_text())
    assert (summary["checkpoint"], summary["code_differs"]) == ("model_previous.h5", [])
    model = run / "model_best.h5"
    stored = fingerprint.of(model)
    assert stored is not None
    edit_state(model, fingerprint=stored | {"code": stored["code"] | {"src/models.py": "0"}})
    changed = "src/models.py has changed since the run; this is of the code as it is now"
    for words in (("bin/evaluate.py", run), ("bin/export.py", run, tmp_path / "exported")):
        done = quick_command(*words)
        assert done.returncode == 0, done.stderr
        assert changed in done.stderr
    summary = json.loads((run / "eval" / "test.json").read_text())
    assert summary["code_differs"] == ["src/models.py"]


@pytest.mark.slow
def test_a_finished_run_that_has_lost_its_checkpoints_says_so_or_makes_them_again(
    quick_command: Command, run: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(run, tmp_path / "run"))
    words = ("bin/train.py", "digits", folder, "--num_epochs=3", *SMALL)
    assert "already finished" in quick_command(*words).stdout
    content = (run / "model.h5").read_bytes()
    (folder / "model.h5").unlink()
    (folder / "model.h5").write_bytes(content[:-9])
    done = quick_command(*words)
    assert done.returncode == 0, done.stderr
    verify(folder / "model.h5")  # it went on from the previous one
    assert (folder / "history.csv").read_bytes() == (run / "history.csv").read_bytes()
    for name in ("model.h5", "model_previous.h5"):
        (folder / name).unlink()
    done = quick_command(*words)
    assert done.returncode == 2
    assert "is finished, and has lost its checkpoints (model.h5 is gone; model_prev" in done.stderr


def test_help_explains_every_key(command: Command) -> None:
    from configs import registry

    text = " ".join(command("bin/train.py", "--help").stdout.split())
    for key in registry.get_root_config():
        assert f"--{key}" in text or f"--[no_]{key}" in text
    for name in ("digits", "cifar10", "cifar100", "digits_wide"):
        assert name in text


def test_a_runner_without_pytorch_is_refused_in_one_sentence(
    command: Command, tmp_path: Path
) -> None:
    missing = "raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')"
    (tmp_path / "torch.py").write_text(missing)
    words = ("src/examples/torch_loop.py", "root", tmp_path / "run")
    done = command(*words, env={"PYTHONPATH": str(tmp_path)})
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "torch_loop.py: error: PyTorch is missing; type pip install torch\n"
    assert not (tmp_path / "run").exists()
