"""What the report holds: text that stays text, curves that are thinned, pictures of the runs."""

import base64
import csv
import json
import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imsave
from test_plot import write_run

from engine import pictures as figures
from engine.runs import effects, report, results
from engine.sweeps import definition as sweep_trials
from engine.sweeps import sweep
from engine.sweeps.sweep import sweep_of, write_sweep

HOSTILE = "</script><script>alert(1)</script>&\u2028\"'"


def make_run(
    folder: Path, losses: Sequence[float] = (1, 0.5, 0.25), status: str = "finished", **config: Any
) -> Path:
    """Write what a run with such losses leaves behind."""
    return write_run(folder, losses, {"n_filters": 4, "seed": 0} | config, "loss", status)


def evaluate(run: Path, picture: np.ndarray, num_classes: int = 3) -> None:
    """Write what an evaluation leaves behind; each third prediction is wrong."""
    (run / "eval").mkdir()
    with open(run / "eval" / "predictions.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["index", "label", "prediction", "probability"])
        for i in range(30):
            label = i % num_classes
            writer.writerow([i, label, (label + (i % 4 == 0)) % num_classes, 0.75])
    imsave(run / "eval" / "examples.png", np.concatenate(picture, axis=1).repeat(3, 2)[..., :3])


def data_in(page: Path) -> dict[str, Any]:
    """Return what the page is to show, as its script reads it."""
    _, _, rest = page.read_text().partition('<script type="application/json" id="data">')
    return json.loads(rest.partition("</script>")[0])


def written(folder: Path) -> dict[str, Any]:
    paths, problems = results.find_runs([str(folder)])
    records = results.read_runs(paths)
    size = report.write_report(records, folder / "report.html", problems, sweep=sweep_of(records))
    assert size == (folder / "report.html").stat().st_size
    return data_in(folder / "report.html")


def test_what_runs_say_stays_text(tmp_path: Path) -> None:
    make_run(tmp_path / "a")
    make_run(tmp_path / "<script>alert(1)", note=HOSTILE, seed=2**70, rate=math.inf)
    make_run(tmp_path / "seed", note=HOSTILE, seed=1, rate=math.inf)
    data = written(tmp_path)
    text = (tmp_path / "report.html").read_text()
    assert text.count("<script") == 2
    assert "alert(1)<" not in text
    run = next(run for run in data["runs"] if "script" in run["path"])
    assert run["settings"] == {"note": HOSTILE, "seed": str(2**70), "rate": "inf"}
    assert run["href"] == "./%3Cscript%3Ealert%281%29/"
    assert data["settings"]["common"] == {"monitor": "loss", "num_epochs": 10, "n_filters": 4}
    (note, rate) = data["effects"]["axes"]
    assert [level.get("value") for level in note["levels"]] == [HOSTILE, None]
    assert [level.get("value") for level in rate["levels"]] == ["inf", None]


def test_long_curves_are_thinned_and_keep_their_extremes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "MOST_VALUES", 1000)
    long = [{"epoch": i, "step": i, "loss": 1 / (i + 1)} for i in range(1001)]
    long[333]["loss"], long[555]["loss"], long[700]["loss"] = 99.0, -5.0, math.nan
    short = long[:20]
    histories = [long, short, []]
    (thin, same, none), stride = report.thinned(histories, 3 * 1021)
    assert none == {}
    assert same["epoch"] == list(range(1, 21))
    assert same["loss"] == pytest.approx([row["loss"] for row in short], rel=1e-5)
    assert stride == 4
    assert set(range(1, 1002, stride)) <= set(thin["epoch"])
    assert {334, 556, 1001} <= set(thin["epoch"])
    for epoch, loss in zip(thin["epoch"], thin["loss"], strict=True):
        value = long[epoch - 1]["loss"]
        assert loss == (pytest.approx(value, rel=1e-5) if math.isfinite(value) else None)
    assert 2 * len(thin["epoch"]) < 1000


def test_pictures_are_those_of_the_run_folder_and_of_no_other(tmp_path: Path) -> None:
    for name in "abc":
        evaluate(make_run(tmp_path / name), np.zeros((3, 2, 2, 1)))
    secret = tmp_path / "secret.png"
    (tmp_path / "b/eval/examples.png").rename(secret)
    (tmp_path / "b/eval/examples.png").symlink_to(secret)
    (tmp_path / "c/eval").rename(tmp_path / "other")
    (tmp_path / "c/eval").symlink_to(tmp_path / "other")
    runs = written(tmp_path)["runs"]
    assert ["eval/examples.png" in run["files"] for run in runs] == [True, False, False]
    assert [[*run["pictures"]] for run in runs] == [["eval/examples.png"], [], []]
    content = (tmp_path / "a/eval/examples.png").read_bytes()
    assert runs[0]["pictures"]["eval/examples.png"].endswith(base64.b64encode(content).decode())
    assert ["eval/predictions.csv" in run["files"] for run in runs] == [True, True, False]


def test_pictures_that_would_make_the_page_too_large_are_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "ab":
        evaluate(make_run(tmp_path / name), np.random.default_rng(0).uniform(size=(9, 9, 9, 1)))
    size = (tmp_path / "a/eval/examples.png").stat().st_size
    monkeypatch.setattr(report, "MOST_OF_PICTURES", 1.5 * size)
    runs = written(tmp_path)["runs"]
    assert [bool(run["pictures"]["eval/examples.png"]) for run in runs] == [True, False]


def test_damage_is_told_and_hides_no_other_run(tmp_path: Path) -> None:
    evaluate(make_run(tmp_path / "good"), np.zeros((3, 2, 2, 1)))
    evaluate(make_run(tmp_path / "torn"), np.zeros((3, 2, 2, 1)))
    (tmp_path / "torn" / "eval" / "test.json").write_text('{"loss": ')
    make_run(tmp_path / "empty")
    (tmp_path / "empty" / "history.csv").unlink()
    data = written(tmp_path)
    runs = {Path(run["path"]).name: run for run in data["runs"]}
    assert "test.json" in runs["torn"]["problem"]
    assert runs["good"]["problem"] == runs["empty"]["problem"] == ""
    assert runs["empty"]["history"] == {}
    assert data["notes"][-1].startswith("1 run could not be read in full")


def test_metrics_of_the_test_set_are_shown_and_other_evaluations_linked(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    (run / "eval/validation-100").mkdir(parents=True)
    (run / "eval/validation-100/scalars.json").write_text("{}")
    summary = {"checkpoint": "model_best.h5", "epoch": 3, "split": "test", "num_examples": 5}
    (run / "eval/test.json").write_text(json.dumps(summary | {"loss": 0.25}))
    (shown,) = written(tmp_path)["runs"]
    assert shown["metrics"]["test_loss"] == [0.25, None, 0.25]
    assert {"eval/test.json", "eval/validation-100/scalars.json"} <= set(shown["files"])


@pytest.mark.parametrize(("low", "high", "channels"), [(0, 1, 1), (-1, 1, 3), (2, 2, 1)])
def test_examples_show_mistakes_first_at_a_size_that_can_be_seen(
    low: float, high: float, channels: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = np.random.default_rng(0).uniform(low, high, size=(20, 4, 6, channels))
    label = np.arange(20) % 3
    prediction, probability = label.copy(), np.linspace(0.5, 0.9, 20)
    prediction[[4, 11]] = [0, 7]  # the surer mistake comes first; 7 has no name
    drawn: list[Figure] = []
    monkeypatch.setattr(figures, "save_figure", lambda figure, path, **_: drawn.append(figure))
    names = ["cat", "$dog$ with a long name", "_owl"]
    classes = (label, prediction, probability)
    figures.draw_classified(images, classes, names, tmp_path / "examples.png", "run")
    (figure,) = drawn
    titles = [axes.get_title() for axes in figure.axes]
    assert titles[:2] == ["_owl\n→ 7 0.73", "$dog$ with a lo\n→ cat 0.58"]
    assert titles[2:5] == ["cat\n0.50", "$dog$ with a lo\n0.52", "_owl\n0.54"]
    assert len(titles) == 16
    for axes, index in zip(figure.axes, [11, 4, 0, 1, 2, 3, 5], strict=False):
        shown = np.asarray(axes.images[0].get_array())
        scaled = (images[index] - images.min()) / ((images.max() - images.min()) or 1)
        np.testing.assert_allclose(shown.reshape(scaled.shape), scaled)
        assert axes.get_window_extent().width > 100  # dots


# -------------------------------------------------------------------------------------- settings


def effects_in(folder: Path) -> dict[str, Any]:
    return written(folder)["effects"]


def test_what_settings_do_is_what_one_works_out_by_hand(tmp_path: Path) -> None:
    folder = tmp_path / "it's here"
    losses: dict[tuple[int, str], list[float]] = {
        (8, "adam"): [0.5, 0.7],
        (8, "sgd"): [0.3, 0.4],
        (16, "adam"): [0.2, 0.25],
        (16, "sgd"): [0.8, math.nan],
    }
    for (n_filters, optimizer), figures_of_seeds in losses.items():
        for seed, loss in enumerate(figures_of_seeds):
            config: dict[str, Any] = {"n_filters": n_filters, "optimizer": optimizer}
            config |= {"seed": seed, "fold": seed}
            name = f"{n_filters} {optimizer} {seed}"
            make_run(folder / name, [loss + 0.1, loss, loss + 0.2], **config)
    # It was the best until it failed, and is none now.
    rest: dict[str, Any] = {"n_filters": 32, "optimizer": "sgd", "seed": 0, "fold": 0}
    rest |= {"of_another_kind": 1}  # the others are not compared by this
    make_run(folder / "z", [0.1], status="failed", **rest)
    shown = effects_in(folder)
    every = written(folder)["runs"]
    paths = [run["path"] for run in every]

    def names(runs: list[int]) -> list[str]:
        return [Path(paths[run]).name for run in runs]

    assert (shown["metric"], shown["lower"], shown["num_runs"]) == ("loss", True, 7)
    assert sorted(shown["left_out"]) == ["1 failed", "1 without a finite loss"]
    assert shown["varied"] == ["n_filters", "optimizer"]
    assert shown["repetitions"] == ["seed", "fold"]
    n_filters, optimizer = shown["axes"]
    assert [axis["scale"] for axis in (n_filters, optimizer)] == ["words", "words"]
    assert [level["value"] for level in n_filters["levels"]] == [8, 16]
    assert [level["mean"] for level in n_filters["levels"]] == pytest.approx([0.475, 0.416667])
    # Of 8: deviations 0.025, 0.225, -0.175, -0.075; the sum of squares 0.0875, over 3.
    assert n_filters["levels"][0]["std"] == pytest.approx(math.sqrt(0.0875 / 3), rel=1e-5)
    assert [level["value"] for level in optimizer["levels"]] == ["adam", "sgd"]
    assert [level["mean"] for level in optimizer["levels"]] == pytest.approx([0.4125, 0.5])
    assert [(names(group["runs"]), group["told"]) for group in shown["groups"]] == [
        (["16 adam 0", "16 adam 1"], "0.225 ± 0.035 (2)"),
        (["8 sgd 0", "8 sgd 1"], "0.350 ± 0.071 (2)"),
        (["8 adam 0", "8 adam 1"], "0.60 ± 0.14 (2)"),
        (["16 sgd 0"], "0.8 (1)"),
    ]
    best = [(names([run])[0], value, *places) for run, value, *places in shown["points"]]
    assert best[:2] == [("16 adam 0", 0.2, 1, 0), ("16 adam 1", 0.25, 1, 0)]
    assert best[-1] == ("16 sgd 0", 0.8, 1, 1)
    best_run, failed = every[shown["points"][0][0]], every[paths.index(str(folder / "z"))]
    again = ["python", "bin/reproduce.py", str(folder / "16 adam 0")]
    assert shlex.split(best_run["again"]) == again
    assert failed["again"] == failed["command"]  # which goes on with it


def test_a_value_of_one_run_has_no_chart(tmp_path: Path) -> None:
    for index in range(4):
        make_run(tmp_path / str(index), [index], rate=0.1 + index, n=index % 2)
    shown = effects_in(tmp_path)
    assert [axis["key"] for axis in shown["axes"]] == ["n"]
    assert shown["undrawn"] == ["rate (one run per value)"]


def test_more_is_better_where_the_metric_says_so(tmp_path: Path) -> None:
    for n_filters, loss in ((1, 0.5), (2, 0.9)):
        config: dict[str, Any] = {"n_filters": n_filters, "monitor": "loss", "monitor_mode": "max"}
        make_run(tmp_path / str(n_filters), [loss], **config)
    shown = effects_in(tmp_path)
    assert shown["lower"] is False
    assert [value for _, value, *_ in shown["points"]] == [0.9, 0.5]
    assert [group["mean"] for group in shown["groups"]] == [0.9, 0.5]


@pytest.mark.parametrize(
    ("values", "levels"),
    [
        ([64, 8, 32, 16], [8, 16, 32, 64]),
        ([0, 1e-4, 1e-3, 1e-2], [0, 1e-4, 1e-3, 1e-2]),
        ([True, False], [False, True]),
        ([None, [[3, 0.1]], "b", 2, {"a": 1}], [2, "b", [[3, 0.1]], None]),
        ([1, "nan"], [1, "nan"]),
        ([math.nan, 1.0], [1.0, "nan"]),
        ([2**70, 1], [1, str(2**70)]),
        (["x" * 999, 1], [1, "x" * 200 + "…"]),
    ],
)
def test_few_values_stand_side_by_side(
    values: list[Any], levels: list[Any], tmp_path: Path
) -> None:
    for index, value in enumerate(values):
        for seed in (0, 1):
            make_run(tmp_path / f"{index} {seed}", [0.5 + index], x=value, seed=seed)
    (axis,) = (axis for axis in effects_in(tmp_path)["axes"] if axis["key"] == "x")
    assert axis["scale"] == "words"
    shown = [level.get("value", "none") for level in axis["levels"]]
    # What is a mapping has keys of its own, and no value here.
    wanted = [*levels, "none"] if {"a": 1} in values else levels
    assert shown == wanted
    assert [level["at"] for level in axis["levels"]] == list(range(len(shown)))


def test_numbers_that_were_drawn_have_means_over_ranges(tmp_path: Path) -> None:
    # 10^(i/8): in eight ranges of half a decade.
    for index in range(33):
        make_run(tmp_path / str(index), [float(index)], rate=10 ** (index / 8), n=index % 2)
    rate = effects_in(tmp_path)["axes"][0]
    assert (rate["key"], rate["scale"]) == ("rate", "log")
    assert len(rate["levels"]) == effects.NUM_RANGES == 8
    ends = [(level["low"], level["high"]) for level in rate["levels"]]
    assert ends[0] == pytest.approx((1, 10**0.5))
    assert ends[-1] == pytest.approx((10**3.5, 10**4))
    # Runs 0 to 3 are in the first, 28 to 32 in the last: the greatest belongs to it.
    assert rate["levels"][-1]["mean"] == 30
    assert sum(int(level["told"].rpartition("(")[2][:-1]) for level in rate["levels"]) == 33


def test_what_is_too_much_to_draw_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(effects, "MOST_POINTS", 10)
    monkeypatch.setattr(effects, "MOST_GROUPS", 7)
    for index in range(30):
        few: dict[str, Any] = {f"few_{i}": (index + i) % 3 for i in range(effects.MOST_SETTINGS)}
        make_run(
            tmp_path / str(index), [1 / (index + 1)], note=f"run {index}", rare=index == 0, **few
        )
    shown = effects_in(tmp_path)
    assert [axis["key"] for axis in shown["axes"]] == ["rare", *(f"few_{i}" for i in range(9))]
    assert shown["undrawn"] == ["note (30 values)", "few_9"]
    assert [len(shown["points"]), len(shown["groups"]), shown["num_groups"]] == [10, 7, 30]
    values = [value for _, value, *_ in shown["points"]]
    assert values == sorted(values)
    assert (values[0], values[-1]) == pytest.approx((1 / 30, 1 / 21), rel=1e-5)
    assert shown["num_runs"] == 30


def test_a_sweep_has_a_page_that_says_what_it_is_and_is_no_run(tmp_path: Path) -> None:
    names = ["n_filters=4", "n_filters=8", "n_filters=9"]
    for name in names[:2]:
        make_run(tmp_path / name, [0.5], n_filters=int(name[-1]))
    sweep.write(
        tmp_path,
        sweep_trials.Definition(
            "digits", {"seed": 0}, ["--note=a b"], {"n_filters": [4, 8, 9]}, {}, 0, 2
        ),
        [sweep_trials.Trial(name, {}) for name in names],
    )
    records = sweep.states_of(tmp_path, sweep.read(tmp_path)[1])
    write_sweep(records, tmp_path)
    data = data_in(tmp_path / "sweep.html")
    assert [Path(run["path"]).name for run in data["runs"]] == names[:2]
    assert data["runs"][0]["href"] == "./n_filters%3D4/"
    told = ["digits '--note=a b'", "grid n_filters=4,8,9", "seeds 2"]
    assert data["sweep"] == {"definition": told, "num_trials": 3, "num_waiting": 1}
    paths, problems = results.find_runs([str(tmp_path)])
    assert ([Path(path).name for path in paths], problems) == (names[:2], [])
    assert written(tmp_path)["sweep"] == data["sweep"]
    (tmp_path / "sweep.json").write_text("[]")
    assert written(tmp_path)["sweep"] is None


def test_a_sweep_of_which_nothing_has_begun_has_no_page(tmp_path: Path) -> None:
    write_sweep([results.RunRecord("a", state="waiting")], tmp_path)
    assert list(tmp_path.iterdir()) == []
