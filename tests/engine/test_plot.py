"""Curves of runs: what is drawn is what `history.csv` holds, and says where it comes from."""

import csv
import json
import math
import re
import runpy
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from machinery import ROOT, Command
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image

from engine.runs import curves, results
from vegab import UsageError

PLOT = str(ROOT / "bin" / "plot.py")
COMMIT = "0123456789abcdef0123456789abcdef01234567"
HOSTILE = [
    "$\\frac{1}{$ & _x^2_",
    "_<script>alert('x')</script>",
    "a\nb \x1b é 数 --> ]]>",
    "ends $",
]


def write_run(
    folder: Path,
    values: Sequence[Any],
    config: Mapping[str, Any] | None = None,
    metric: str = "val_loss",
    status: str = "finished",
    num_epochs: int = 10,
) -> Path:
    """Write a run folder with one metric, 40 steps an epoch; None is a cell that is not there."""
    folder.mkdir(parents=True)
    meta = {
        "status": status,
        "git": {"commit": COMMIT, "dirty": False},
        "command": {"argv": ["python", "bin/train.py", "digits"], "line": "python bin/train.py"},
        "attempts": [{"start": "2026-01-01T00:00:00+00:00", "end": "2026-01-01T00:01:00+00:00"}],
    }
    known = {"monitor": metric, "num_epochs": num_epochs}
    (folder / "config.json").write_text(json.dumps(known | dict(config or {})))
    (folder / "meta.json").write_text(json.dumps(meta))
    with open(folder / "history.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["epoch", "step", "learning_rate", metric])
        for epoch, value in enumerate(values):
            writer.writerow([epoch, 40 * (epoch + 1), 0.1 / (epoch + 1), value])
    return folder


def column(run: Path, name: str) -> np.ndarray:
    """Read a column of `history.csv` by a way that the project does not take."""
    header, *lines = (run / "history.csv").read_text().splitlines()
    place = header.split(",").index(name)
    return np.array([float(line.split(",")[place]) for line in lines])


def drawing(runs: Sequence[Path], *metrics: str, **options: Any) -> tuple[Figure, list[str]]:
    """Draw runs as the command does."""
    records = results.read_runs([str(run) for run in runs])
    chosen = {key: options[key] for key in ("x", "log_y") if key in options}
    found, problems = curves.curves_of(records, metrics, **chosen)
    return curves.draw(found, records, **options), problems


def lines_of(figure: Figure, panel: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
    lines = figure.axes[panel].lines
    return [(np.array(line.get_xdata()), np.array(line.get_ydata())) for line in lines]


def corners_of_band(figure: Figure) -> np.ndarray:
    """Return the outline of the only band, of shape (num_points, 2)."""
    [band] = figure.axes[0].collections
    return np.asarray(band.get_paths()[0].vertices)


def legend_of(figure: Figure) -> Any:
    return figure.axes[0].get_legend() or figure.legends[0]


def legend_texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in legend_of(figure).get_texts()]


def content(figure: Figure, form: str, runs: Sequence[Path]) -> bytes:
    provenance = results.provenance_of(results.read_runs([str(run) for run in runs]))
    return curves.content_of(figure, form, "title", provenance)


def plot(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, PLOT, *map(str, arguments)]
    return subprocess.run(words, cwd=cwd, capture_output=True, text=True, timeout=1800)


def polylines(svg: Path) -> list[np.ndarray]:
    """Return the points, of shape (num_points, 2), of curves in the colours of an SVG."""
    found = []
    for path in ElementTree.parse(svg).iter("{http://www.w3.org/2000/svg}path"):
        style = path.get("style", "")
        if any(f"stroke: {color.lower()};" in style for color in curves.COLORS[:6]):
            numbers = re.findall(r"[ML] (\S+) (\S+)", path.get("d", ""))
            if len(numbers) > 3 and "z" not in path.get("d", ""):  # neither legend nor marker
                found.append(np.array(numbers, dtype=float))
    return found


def test_a_real_run_is_drawn_as_it_is_on_disk(
    command: Command, quick_command: Command, tmp_path: Path
) -> None:
    run, picture = tmp_path / "run", tmp_path / "out" / "curve.svg"
    small = ("--n_filters=2", "--n_layers=1", "--batch_size=512", "--no_tensorboard")
    words = ("bin/train.py", "digits", run, "--num_epochs=4", *small, "--lr_schedule=null")
    trained = quick_command(*words)
    assert trained.returncode == 0, trained.stderr
    picture.parent.mkdir()
    done = command("bin/plot.py", run, "--metric=val_accuracy", "--x=step", "-o", picture)
    assert (done.returncode, done.stderr) == (0, "")
    assert str(picture) in done.stdout
    # Paper goes down and to the right, linearly.
    [points] = polylines(picture)
    for drawn, name, sign in ((points[:, 0], "step", 1), (points[:, 1], "val_accuracy", -1)):
        values = column(run, name)
        slope, offset = np.polyfit(values, drawn, 1)
        np.testing.assert_allclose(drawn, slope * values + offset, atol=1e-4)
        assert sign * slope > 0
    meta = json.loads((run / "meta.json").read_text())
    beside = json.loads((tmp_path / "out" / "curve.svg.json").read_text())
    assert [(r["path"], r["commit"]) for r in beside["runs"]] == [(str(run), meta["git"]["commit"])]
    assert beside["command"].endswith(f"-o {picture}")
    assert sorted(path.name for path in picture.parent.iterdir()) == ["curve.svg", "curve.svg.json"]


def test_seeds_are_a_mean_with_a_band(tmp_path: Path) -> None:
    noise = np.random.default_rng(0)
    lengths = (6, 5, 4, 2)
    seeds = [
        write_run(tmp_path / f"a{seed}", list(2 + noise.normal(size=n)), {"n": 8, "seed": seed})
        for seed, n in enumerate(lengths)
    ]
    other = write_run(tmp_path / "b", [3.0, 2, 1], {"n": 16, "seed": 0})
    figure, _ = drawing([*seeds, other])
    values = [column(run, "val_loss") for run in seeds]
    there = [[own[epoch] for own in values if len(own) > epoch] for epoch in range(6)]
    mean = [np.mean(some) for some in there]
    std = np.array([np.std(some, ddof=1) for some in there[:5]])
    (x, drawn), (other_x, other_drawn) = lines_of(figure)
    assert x.tolist() == [1, 2, 3, 4, 5, 6]
    np.testing.assert_allclose(drawn, mean)
    assert (other_x.tolist(), other_drawn.tolist()) == ([1, 2, 3], [3, 2, 1])
    corners = corners_of_band(figure)
    assert corners[:, 0].max() == 5, "the band ends where a run is alone"
    for epoch in range(5):
        edges = corners[corners[:, 0] == epoch + 1, 1]
        np.testing.assert_allclose(
            [edges.min(), edges.max()], mean[epoch] + std[epoch] * np.array([-1, 1])
        )
    assert legend_texts(figure) == ["n=8 (n = 4)", "n=16"]
    assert legend_of(figure).get_title().get_text() == "mean ± standard deviation"


def test_values_that_are_not_finite_leave_a_gap_and_cells_without_a_value_none(
    tmp_path: Path,
) -> None:
    diverged = write_run(tmp_path / "a", [1, "inf", 3, "nan", 5], {"seed": 1})
    sound = write_run(tmp_path / "b", [1, 2, 3, 4, 5], {"seed": 2})
    sparse = write_run(tmp_path / "c", [1, None, 3, None, 5], {"n": 1})
    figure, problems = drawing([diverged, sound, sparse])
    (_, mean), (x, y) = lines_of(figure)
    np.testing.assert_array_equal(mean, [1, math.nan, 3, math.nan, 5])  # no mean of survivors
    assert (x.tolist(), y.tolist()) == ([1, 3, 5], [1, 3, 5])
    assert problems == [
        f"{diverged}: val_loss is not finite at 2 of 5 points, which leaves a gap",
    ]


def test_smoothing_shows_the_raw_curve_underneath(tmp_path: Path) -> None:
    # By hand: m = 1, (0.5 * 1 + 0.5 * 2 * ...) and so on, over 1 - 0.5 ** t.
    values = pd.Series([1, 2, math.nan, 4])
    by_hand = [0.5 / 0.5, 1.25 / 0.75, math.nan, 2.625 / 0.875]
    np.testing.assert_allclose(curves.smoothed(values, 0.5), by_hand)
    np.testing.assert_array_equal(curves.smoothed(values, 0), values)

    runs = [
        write_run(tmp_path / str(seed), values, {"seed": seed})
        for seed, values in enumerate(([1, 5, 2], [3, 1, 2]))
    ]
    figure, _ = drawing(runs, smooth=0.6)
    raw, smooth = figure.axes[0].lines
    assert raw.get_zorder() < smooth.get_zorder()
    assert raw.get_color() == smooth.get_color()
    assert list(np.asarray(raw.get_ydata())) == [2, 3, 2]
    weights = np.array([[1, 0, 0], [0.24 / 0.64, 0.4 / 0.64, 0], [0.144, 0.24, 0.4]])
    weights[2] /= 0.784
    each = weights @ np.array([[1, 3], [5, 1], [2, 2]])
    np.testing.assert_allclose(np.asarray(smooth.get_ydata()), each.mean(axis=1))
    top = each.mean(axis=1) + each.std(axis=1, ddof=1)
    assert corners_of_band(figure)[:, 1].max() == pytest.approx(top.max())
    assert "smoothed by 0.6" in legend_of(figure).get_title().get_text()
    assert legend_texts(figure) == ["n = 2"]


def test_the_legend_has_names_and_what_differs(tmp_path: Path) -> None:
    rate = {"optimizer": {"lr": 0.1}, "same": 1}
    one = write_run(tmp_path / "one", [2, 1], rate | {"seed": 1})
    two = write_run(tmp_path / "two", [2, 1], rate | {"optimizer": {"lr": 0.2}, "seed": 1})
    told = ["one: optimizer.lr=0.1", "two: optimizer.lr=0.2"]
    assert legend_texts(drawing([one, two])[0]) == told
    assert legend_texts(drawing([one])[0]) == ["one"]
    told = ["one: same=1, epoch=2/10", "two: same=1, epoch=2/10"]
    assert legend_texts(drawing([one, two], columns=["same", "epoch"])[0]) == told
    # What tells most runs apart comes first, and what a trial is called is not said twice.
    trials = [
        write_run(tmp_path / f"n={n % 3}", [2, 1], {"odd": n % 2, "rate": n, "n": n % 3})
        for n in range(3)
    ]
    told = ["n=0: rate=0, odd=0", "n=1: rate=1, odd=1", "n=2: rate=2, odd=0"]
    assert legend_texts(drawing(trials)[0]) == told
    other = write_run(tmp_path / "other" / "one", [2, 1], rate | {"seed": 1, "same": 2})
    shown = ["".join(text.split()) for text in legend_texts(drawing([one, other])[0])]
    assert shown == [f"{one}:same=1", f"{other}:same=2"]
    long = [
        write_run(tmp_path / f"l{n}", [2, 1], {"list": [n, *range(100)], "also": n})
        for n in range(2)
    ]
    for label in legend_texts(drawing(long)[0]):
        assert label.count("\n") == 2
        assert label.endswith("…")


def test_a_number_of_runs_stays_in_one_line_and_an_epoch_is_whole(tmp_path: Path) -> None:
    long = {"a_long_name_of_a_setting": 0, "another": 1}
    runs = [write_run(tmp_path / f"s{seed}", [2.0], long | {"seed": seed}) for seed in (0, 1)]
    runs += [write_run(tmp_path / "o", [3.0], {"a_long_name_of_a_setting": 1, "another": 2})]
    figure, _ = drawing(runs)
    (label, _) = legend_texts(figure)
    assert "\n" in label and "(n = 2)" in label
    figure.draw_without_rendering()
    assert [tick for tick in figure.axes[0].get_xticks() if 0.9 < tick < 1.1] == [1.0]


def test_no_learning_rate_is_the_best(tmp_path: Path) -> None:
    run = write_run(tmp_path / "r", [2, 1], metric="learning_rate")
    figure, _ = drawing([run], "learning_rate")
    assert figure.axes[0].get_title(loc="left") == ""


def test_hostile_names_are_text(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / "r" / name.replace("/", "\\"), [2, 1], {"name": name}, metric="$m_")
        for name in HOSTILE
    ]
    runs += [write_run(tmp_path / name, [2, 1], {}, metric="$m_") for name in ("_$", "$x\udcff$")]
    (runs[4] / "config.json").write_text("{")
    figure, _ = drawing(runs, "$m_")
    shown = "".join(legend_texts(figure)).replace("\n", "")
    for piece in ("frac{1}{$ & _x^2_", "_<script>alert('x')</script>", "ends $", "_$"):
        assert piece.replace(" ", "") in shown.replace(" ", "")
    assert "\x1b" not in shown
    pictures = {form: content(figure, form, runs) for form in curves.FORMATS}
    root = ElementTree.fromstring(pictures[".svg"])
    assert not [element for element in root.iter() if element.tag.endswith("script")]
    provenance = results.provenance_of(results.read_runs([str(runs[-1])]))
    results.write_with_provenance(tmp_path / "x.png", b"", provenance)
    beside = json.loads((tmp_path / "x.png.json").read_bytes())
    assert beside["runs"][0]["path"] == str(runs[-1])


def test_of_many_runs_some_have_names_and_no_two_of_them_look_the_same(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"r{n}", [92 - n, 91 - n], {"n": n}) for n in range(30)]
    figure, _ = drawing(runs)
    named = curves.MOST_NAMED
    # The best come first.
    told = [f"r{29 - n}: n={29 - n}" for n in range(named)]
    assert legend_texts(figure) == [*told, f"and {30 - named} more"]
    assert figure.axes[0].get_title(loc="left") == "best 62 at epoch 2, r29: n=29"
    lines: list[Line2D] = list(figure.axes[0].lines)
    assert len(lines) == 30
    in_grey = {(line.get_linestyle(), str(line.get_marker())) for line in lines[:named]}
    assert len(in_grey) == named
    for line in lines[named:]:
        red, green, blue = (to_hex(line.get_color())[i : i + 2] for i in (1, 3, 5))
        assert red == green == blue
    handles = legend_of(figure).get_lines()
    assert [handle.get_color() for handle in handles] == [
        line.get_color() for line in lines[: named + 1]
    ]
    figure.draw_without_rendering()
    legend = legend_of(figure).get_window_extent()
    assert all(figure.bbox.contains(*corner) for corner in legend.corners())
    assert not figure.axes[0].get_window_extent().overlaps(legend)

    # The best of another metric may have no colour; its name stands above.
    (runs[0] / "history.csv").write_text("epoch,step,val_loss,loss\n0,1,92,0.5\n")
    (runs[20] / "history.csv").write_text("epoch,step,val_loss,loss\n0,1,72,0.9\n")
    two, _ = drawing(runs, "val_loss", "loss")
    assert two.axes[1].get_title(loc="left") == "best 0.5 at epoch 1, r0: n=0"
    few, _ = drawing(runs[:named])
    assert legend_texts(few) == [f"r{n}: n={n}" for n in range(named)]


def test_points_without_neighbours_are_marked(tmp_path: Path) -> None:
    values: list[Any] = [float(n) for n in range(1, 101)]
    values[49], values[51] = "nan", "nan"
    runs = [write_run(tmp_path / "a", values), write_run(tmp_path / "b", [1.0], {"n": 1})]
    figure, _ = drawing(runs)
    long, short = figure.axes[0].lines
    marked = np.asarray(long.get_markevery())
    assert 50 in marked
    assert 10 <= len(marked) <= 11
    assert short.get_markevery() == [0]


def test_an_axis_is_logarithmic_where_the_range_asks_for_it(tmp_path: Path) -> None:
    for name, values, wanted in (
        ("far", [101, 3, 1], "log"),
        ("near", [100, 3, 1], "linear"),
        ("zero", [101, 3, 0], "linear"),
    ):
        run = write_run(tmp_path / name, values)
        assert drawing([run])[0].axes[0].get_yscale() == wanted, name
    figure, _ = drawing([tmp_path / "far"], log_y=False)
    assert figure.axes[0].get_yscale() == "linear"
    assert figure.axes[0].get_title(loc="left") == "best 1 at epoch 3"


def test_logarithmic_axes(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / f"{n}_{seed}", values, {"n": n, "seed": seed})
        for n, seed, values in (
            (1, 1, [1.47, 0.5, 0.1]),
            (1, 2, [8.53, 0.5, 0.1]),
            (2, 1, [5, 0, 4]),
        )
    ]
    figure, problems = drawing(runs, log_x=True, log_y=True)
    [axes] = figure.axes
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    np.testing.assert_array_equal(lines_of(figure)[1][1], [5, math.nan, 4])
    assert problems == [
        f"{runs[2]}: val_loss is not finite and above 0 at 1 of 3 points, which leaves a gap"
    ]
    # The band of 1.47 and 8.53 goes down to 0.008, and the axis does not follow it.
    assert 0.03 < axes.get_ylim()[0] < 0.1
    with pytest.raises(UsageError, match="no run has a finite value above 0 of 'val_loss'"):
        drawing([write_run(tmp_path / "below", [-1, 0])], log_y=True)


def test_a_panel_for_each_metric(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, [2, 1], metric=name) for name in ("f1", "val_loss")]
    figure, problems = drawing(runs, "learning_rate", "f1", x="step")
    assert [axes.get_ylabel() for axes in figure.axes] == ["learning_rate", "f1"]
    assert [len(axes.lines) for axes in figure.axes] == [2, 1]
    x, y = lines_of(figure)[0]
    assert (x.tolist(), y.tolist()) == ([40, 80], [0.1, 0.05])
    assert problems == [f"{runs[1]} has no f1"]
    by_monitor, _ = drawing(runs)
    assert [axes.get_ylabel() for axes in by_monitor.axes] == ["f1", "val_loss"]


@pytest.mark.slow
def test_pictures_tell_their_runs_and_are_the_same_each_time(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, [3, 2, 1], {"n": name}) for name in ("a (b)", "é")]
    read = {}
    for form in curves.FORMATS:
        picture, again = (content(drawing(runs)[0], form, runs) for _ in range(2))
        assert picture == again
        path = tmp_path / f"picture{form}"
        path.write_bytes(picture)
        if form == ".png":
            with Image.open(path) as image:
                read[form] = image.info["Description"]
        elif form == ".pdf":
            [text] = re.findall(rb"/Subject \((.*?[^\\])\)[ \n]", picture)
            read[form] = re.sub(r"\\(.)", r"\1", text.decode())
            assert b"CreationDate" not in picture
            assert b"/Type3" not in picture
        else:
            names = ElementTree.parse(path).iter("{http://purl.org/dc/elements/1.1/}description")
            read[form] = next(names).text
            assert b"<dc:date>" not in picture
    for text in read.values():
        found = json.loads(text)["runs"]
        assert [(run["path"], run["commit"]) for run in found] == [(str(r), COMMIT) for r in runs]


def test_the_command_draws_what_it_can_and_says_what_it_cannot(tmp_path: Path) -> None:
    good = write_run(tmp_path / "runs" / "good", [3, 2, 1], {"seed": 1})
    torn = write_run(tmp_path / "runs" / "torn", [3, 2, 1], {"seed": 2})
    (torn / "config.json").write_text('{"seed": ')
    killed = write_run(
        tmp_path / "runs" / "killed", [3, 2], {"seed": 3}, "val_loss", "interrupted", 5
    )
    (killed / "history.csv").write_text((killed / "history.csv").read_text() + "2,120,0.0")
    damaged = write_run(tmp_path / "runs" / "damaged", [3, "x", 1])
    empty = write_run(tmp_path / "runs" / "empty", [], status="failed")
    other = write_run(tmp_path / "runs" / "other", [1, 2], metric="val/f1")
    done = plot("runs", "nothing_*", "--metric=val_loss", cwd=tmp_path)
    assert done.returncode == 1  # for the pattern that matches nothing
    assert done.stdout == "val_loss of 3 runs: val_loss.png, val_loss.png.json\n"
    said = done.stderr.splitlines()
    for word, run in (
        ("config.json", torn),
        ("broken, 3 epochs", torn),
        ("interrupted, 2 of 5 epochs", killed),
        ("line 3", damaged),
        ("failed, 0", empty),
        ("has no val_loss", other),
        ("nothing_*", None),
    ):
        name = run.relative_to(tmp_path) if run else ""
        assert len([line for line in said if word in line and str(name) in line]) == 1, word
    assert not [line for line in said if str(good.relative_to(tmp_path)) in line]
    beside = json.loads((tmp_path / "val_loss.png.json").read_text())
    assert {Path(run["path"]).name for run in beside["runs"]} == {"good", "torn", "killed"}

    done = plot("runs/good", "runs/other", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "val_loss-val_f1.png").read_bytes().startswith(b"\x89PNG")


def test_what_cannot_be_drawn_is_refused_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(tmp_path / "run", [1, 2])
    write_run(tmp_path / "diverged", ["nan", "nan"], metric="gone")
    write_run(tmp_path / "empty", [])
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    refused: Any = runpy.run_path(PLOT)["plot"]
    for patterns, options, sentence in (
        (["run"], {"output": "x.jpg"}, "x.jpg ends with none of .png, .pdf, .svg"),
        (["run"], {"output": "none/x.png"}, "none/x.png is not a file that could"),
        (["run"], {"smooth": 1}, "--smooth=1 is not a weight in [0, 1)"),
        (["run"], {"smooth": math.nan}, "--smooth=nan is not a weight"),
        (["run"], {"metric": ["val_los"]}, "no run has the metric 'val_los'; did you mean"),
        (["diverged"], {"metric": ["gone"]}, "no run has a finite value of 'gone'"),
        (["diverged"], {}, "no run has a finite value of 'gone'"),
        (["empty"], {}, "no run monitors a metric that could be drawn"),
        (["runn"], {}, "did you mean 'run'"),
    ):
        with pytest.raises(UsageError, match=re.escape(sentence)):
            refused(*patterns, **options)
    assert sorted(tmp_path.rglob("*")) == before
