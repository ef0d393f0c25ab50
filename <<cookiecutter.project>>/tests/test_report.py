"""What the report holds: text that stays text, curves that are thinned, pictures kept once."""

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from src import figures, report, results
from tests.conftest import Command

HOSTILE = "</script><script>alert(1)</script>&\u2028\"'"


def make_run(folder: Path, rows: int = 3, **config: Any) -> Path:
    """Write what a run of so many epochs leaves behind."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"n_filters": 4, "seed": 0} | config))
    attempt = {"start": "2026-01-01T00:00:00+00:00", "end": "2026-01-01T00:01:00+00:00"}
    meta = {"status": "finished", "attempts": [attempt], "command": {"line": "python x"}}
    (folder / "meta.json").write_text(json.dumps(meta))
    lines = [f"{i},{i + 1},{1 / (i + 1)}" for i in range(rows)]
    (folder / "history.csv").write_text("\n".join(["epoch,step,loss", *lines, ""]))
    return folder


def evaluate(run: Path, picture: np.ndarray, num_classes: int = 3) -> None:
    """Write what an evaluation leaves behind; each third prediction is wrong."""
    (run / "eval").mkdir()
    with open(run / "eval" / "predictions.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["index", "label", "prediction", "probability"])
        for i in range(30):
            label = i % num_classes
            writer.writerow([i, label, (label + (i % 4 == 0)) % num_classes, 0.75])
    figures.save_examples(picture, run / "eval" / "examples.png")


def data_in(page: Path) -> dict[str, Any]:
    """Return what the page is to show, as its script reads it."""
    _, _, rest = page.read_text().partition('<script type="application/json" id="data">')
    return json.loads(rest.partition("</script>")[0])


def written(folder: Path) -> dict[str, Any]:
    paths, problems = results.find_runs([str(folder)])
    size = report.write_report(results.read_runs(paths), folder / "report.html", problems)
    assert size == (folder / "report.html").stat().st_size
    return data_in(folder / "report.html")


def test_what_runs_say_stays_text(tmp_path: Path) -> None:
    make_run(tmp_path / "a")
    make_run(tmp_path / "<script>alert(1)", note=HOSTILE, seed=2**70, rate=math.inf)
    data = written(tmp_path)
    text = (tmp_path / "report.html").read_text()
    assert text.count("<script") == 2
    assert "alert(1)<" not in text
    run = next(run for run in data["runs"] if "script" in run["path"])
    assert run["settings"] == {"note": HOSTILE, "seed": str(2**70), "rate": "inf"}
    assert run["href"] == "./%3Cscript%3Ealert%281%29/"
    assert data["settings"]["common"] == {"n_filters": 4}


def test_long_curves_are_thinned_and_keep_their_extremes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "MOST_VALUES", 1000)
    long = [{"epoch": i, "step": i, "loss": 1 / (i + 1)} for i in range(1001)]
    long[333]["loss"], long[555]["loss"], long[700]["loss"] = 99.0, -5.0, math.nan
    short = long[:20]
    (thin, same, none), stride = report.thinned([long, short, []])
    assert none == {}
    assert same["epoch"] == list(range(1, 21))
    assert same["loss"] == pytest.approx([row["loss"] for row in short], rel=1e-5)
    assert stride in (4, 8)
    assert set(range(1, 1002, stride)) <= set(thin["epoch"])
    assert {334, 556, 1001} <= set(thin["epoch"])
    for epoch, loss in zip(thin["epoch"], thin["loss"], strict=True):
        value = long[epoch - 1]["loss"]
        assert loss == (pytest.approx(value, rel=1e-5) if math.isfinite(value) else None)
    assert 2 * len(thin["epoch"]) < 1000


def test_equal_pictures_are_in_the_page_once(tmp_path: Path) -> None:
    pictures = np.random.default_rng(0).uniform(size=(20, 4, 5, 1))
    for name in "abc":
        evaluate(make_run(tmp_path / name), pictures + (name == "c") * 2 * (pictures > 0.5))
    data = written(tmp_path)
    assert len(data["images"]) == 2
    images = [run["examples"]["image"] for run in data["runs"]]
    assert images[0] == images[1] != images[2]
    assert data["runs"][0]["matrix"] == [[7, 3, 0], [0, 7, 3], [2, 0, 8]]
    assert data["runs"][0]["examples"]["rows"][:2] == [[0, 1, 0.75], [1, 1, 0.75]]
    assert data["images"][images[0]]["count"] == 16
    assert data["images"][images[0]]["width"] == 16 * 5


def test_a_page_that_would_be_too_large_leaves_pictures_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "LARGEST_PAGE", len(report.PAGE.read_bytes()) + 200_000)
    for name in "abcd":
        pictures = np.random.default_rng(ord(name)).uniform(size=(16, 40, 40, 3))
        evaluate(make_run(tmp_path / name), pictures)
    data = written(tmp_path)
    assert ["examples" in run for run in data["runs"]] == [True, False, False, False]
    assert any("of 3 runs are left out" in note for note in data["notes"])
    assert (tmp_path / "report.html").stat().st_size < report.LARGEST_PAGE


def test_damage_is_told_and_hides_no_other_run(tmp_path: Path) -> None:
    evaluate(make_run(tmp_path / "good"), np.zeros((3, 2, 2, 1)))
    evaluate(make_run(tmp_path / "torn"), np.zeros((3, 2, 2, 1)))
    (tmp_path / "torn" / "eval" / "predictions.csv").write_text("index,label\n0,zero\n")
    (tmp_path / "torn" / "eval" / "test.json").write_text('{"loss": ')
    make_run(tmp_path / "empty")
    (tmp_path / "empty" / "history.csv").unlink()
    data = written(tmp_path)
    runs = {Path(run["path"]).name: run for run in data["runs"]}
    assert "test.json" in runs["torn"]["problem"]
    assert "predictions.csv" in runs["torn"]["problem"]
    assert runs["good"]["problem"] == runs["empty"]["problem"] == ""
    assert runs["empty"]["history"] == {}
    assert "matrix" in runs["good"]
    assert data["notes"][-1].startswith("1 run could not be read in full")


def test_evaluations_of_every_kind_are_shown(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    for step, accuracy in ((9, 0.1), (100, 0.9)):
        (run / f"eval/validation-{step}").mkdir(parents=True)
        scalars = {"metrics": {"accuracy": accuracy, "loss": None}}
        (run / f"eval/validation-{step}/scalars.json").write_text(json.dumps(scalars))
    summary = {"checkpoint": "model_best.h5", "epoch": 3, "split": "test", "num_examples": 5}
    (run / "eval/test.json").write_text(json.dumps(summary | {"loss": 0.25}))
    (shown,) = written(tmp_path)["runs"]
    assert shown["evaluations"] == [
        {
            "split": "test",
            "about": "model_best.h5 of epoch 3, 5 examples",
            "figures": {"loss": 0.25},
        },
        {
            "split": "validation",
            "about": "step 100",
            "figures": {"metrics/accuracy": 0.9, "metrics/loss": None},
        },
    ]


@pytest.mark.parametrize(
    ("low", "high", "channels"), [(0, 1, 1), (-1, 1, 3), (0, 255, 3), (2, 2, 1)]
)
def test_examples_are_the_pixels_of_the_first_pictures(
    low: float, high: float, channels: int, tmp_path: Path
) -> None:
    images = np.random.default_rng(0).uniform(low, high, size=(20, 4, 6, channels))
    images[19, 0, 0, 0], images[19, 0, 1, 0] = low, high  # of the set, not of the first ones
    figures.save_examples(images.astype(np.float32), tmp_path / "examples.png")
    pixels = np.rint(imread(tmp_path / "examples.png")[..., :3] * 255)
    assert pixels.shape == (4, 16 * 6, 3)
    for index in range(16):
        wanted = 255 * (images[index] - low) / ((high - low) or 1)
        found = pixels[:, 6 * index : 6 * (index + 1)]
        assert np.abs(found - wanted).max() <= 0.51
    assert [path.name for path in tmp_path.iterdir()] == ["examples.png"]


def test_report_answers_without_heavy_imports(command: Command, tmp_path: Path) -> None:
    for arguments in (["--help"], ["no_such_folder"], [".", "-o", tmp_path]):
        done = command("-X", "importtime", "bin/report.py", *arguments)
        modules = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
        assert "vegab" in modules
        assert not modules & {"tensorflow", "keras", "numpy", "pandas", "matplotlib", "h5py"}
