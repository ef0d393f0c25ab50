"""Reading runs back, and the notebook that does it."""

from pathlib import Path

import nbformat
import numpy as np
import pytest
from machinery import ROOT, Command
from nbclient import NotebookClient

from engine import pictures as figures
from engine.runs import results


def test_a_confusion_matrix_counts_labels_against_predictions() -> None:
    matrix = results.confusion_matrix(np.array([0, 0, 1, 2]), np.array([0, 1, 1, 0]), 3)
    assert matrix.tolist() == [[1, 1, 0], [0, 1, 0], [1, 0, 0]]


def test_the_learning_curve_is_drawn_for_whatever_the_history_holds(tmp_path: Path) -> None:
    rows = [{"epoch": 0, "step": 3, "learning_rate": 0.1, "loss": 1.0}]
    for history, best in ((rows, None), ([rows[0] | {"val_loss": 2.0, "f1": float("nan")}], 0)):
        figures.draw_learning_curve(tmp_path, history, best)
        assert (tmp_path / "learning_curve.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_notebook_runs_on_a_run(
    quick_command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("--num_epochs=2", "--n_filters=4", "--n_layers=1")
    assert quick_command("bin/train.py", "digits", tmp_path / "run", *arguments).returncode == 0
    monkeypatch.setenv("RUN", str(tmp_path / "run"))
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        NotebookClient(notebook, timeout=1800, resources={"metadata": {"path": ROOT}}).execute()
        outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
        assert any("image/png" in output.get("data", {}) for output in outputs)


@pytest.mark.parametrize("first", [0, 1])
def test_epochs_of_an_older_history_count_from_1_too(first: int, tmp_path: Path) -> None:
    text = f"epoch,step,loss\n{first},4,0.5\n{first + 1},8,0.25\n"
    (tmp_path / "history.csv").write_text(text)
    assert [row["epoch"] for row in results.rows_in(tmp_path)] == ["1", "2"]
    assert list(results.load_history(tmp_path).index) == [1, 2]
    assert [row["epoch"] for row in results.read_history(tmp_path)] == [0, 1]
