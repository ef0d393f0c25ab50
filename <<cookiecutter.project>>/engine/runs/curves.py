"""Draws the curves of many runs: a column of their histories, seeds as a mean with a band."""

import io
import json
import logging
import textwrap
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.pictures import new_figure
from engine.runs import comparison, results, selection
from engine.runs.effects import are_far_apart
from engine.runs.results import RunRecord
from vegab import UsageError
from vegab.execution import printable

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = (".png", ".pdf", ".svg")
# Of Okabe and Ito (https://jfly.uni-koeln.de/color/), except yellow, which fades on white paper.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
LINES = ("-", "--", "-.", ":")
# No factor in common with the others: in grey print, too, no two curves with a name look the same.
MARKERS = ("o", "s", "^", "D", "v")
MOST_NAMED = 10  # curves, the best; the rest is grey
LONGEST_LINE, LONGEST_TITLE = 44, 64
TEST_SET = "test set"
MOST_MARKED = 10  # points of a curve or so, besides single ones
# Names are text, no LaTeX; PDF has TrueType fonts, as publishers want; SVG the same identifiers.
STYLE: Any = {"text.usetex": False, "pdf.fonttype": 42, "svg.hashsalt": "curves", "font.size": 9}
Groups = Sequence[Sequence[RunRecord]]
Curves = dict[str, "pd.Series"]  # a metric by epochs (from 1) or steps, for each run's path


def curves_of(
    records: Sequence[RunRecord], asked: Sequence[str], x: str = "epoch", log_y: bool = False
) -> tuple[dict[str, Curves], list[str]]:
    """Return the curves of each metric, and a sentence for whatever is not drawn as one expects.

    A curve is NaN where a value is not finite, or with `log_y` not above 0, which leaves a gap; its
    index has the name of `x`. A metric of the test set is one point, and its index has the name
    "test set". Without columns that are `asked` for, it is what the runs monitor."""
    import numpy as np
    import pandas as pd

    histories, problems = {}, results.problems_of(records)
    for record in records:
        try:
            histories[record.path] = rows = results.read_history(record.path)
        except (OSError, ValueError) as error:
            if not record.problem:
                problems.append(f"{record.path}: {error}")
            continue
        if record.state != "finished" or not rows:
            of_how_many = f" of {record.num_epochs}" if record.num_epochs else ""
            problems.append(f"{record.path}: {record.state}, {len(rows)}{of_how_many} epochs")
    columns = {key for rows in histories.values() for row in rows for key in row}
    selection.metrics_of(records, [metric for metric in asked if metric not in columns])
    metrics = list(dict.fromkeys(asked or [r.monitor for r in records if r.monitor]))
    if not metrics:
        hint = f"; name one by --metric: {', '.join(sorted(columns))}" if columns else ""
        raise UsageError(f"no run monitors a metric that could be drawn{hint}")
    curves: dict[str, Curves] = {metric: {} for metric in metrics}
    for record in records:
        rows = histories.get(record.path, [])
        for metric in metrics if rows else ():
            points = {row[x]: row[metric] for row in rows if x in row and metric in row}
            if metric not in columns and metric in record.metrics:
                points = {0: record.metrics[metric].last}
            if not points:
                problems.append(f"{record.path} has no {metric}")
                continue
            values = pd.Series(points, dtype=np.float64)
            usable = np.isfinite(values) & ((values > 0) | (not log_y))
            if not usable.all():
                what = f"{record.path}: {metric} is not finite{' and above 0' * log_y}"
                where = f"{(~usable).sum()} of {len(values)} points"
                problems.append(f"{what} at {where}, which leaves a gap")
            if usable.any():
                curves[metric][record.path] = curve = values.where(usable)
                curve.index += x == "epoch"
                curve.index.name = x if metric in columns else TEST_SET
    for metric, there in curves.items():
        if not there:
            raise UsageError(f"no run has a finite value{' above 0' * log_y} of {metric!r}")
    return curves, problems


def smoothed(values: "pd.Series", weight: float) -> "pd.Series":
    """Return an exponential moving average with bias correction, as TensorBoard draws it."""
    return values.ewm(alpha=1 - weight, ignore_na=True).mean().where(values.notna())


def mean_of(curves: Sequence["pd.Series"]) -> tuple["pd.Series", "pd.Series"]:
    """Return mean and standard deviation (n - 1) of each point; where one is NaN, so are they."""
    import pandas as pd

    points = pd.concat(curves).groupby(level=0)
    is_gap = points.count() < points.size()
    return points.mean().mask(is_gap), points.std().mask(is_gap)


def draw(
    curves: Mapping[str, Curves],
    records: Sequence[RunRecord],
    x: str = "epoch",
    log_x: bool = False,
    log_y: bool | None = None,
    smooth: float = 0.0,
    columns: Sequence[str] = (),
) -> "Figure":
    """Draw a panel per metric, and in it a curve per run, or per group of runs of different seeds:
    the mean of the smoothed curves, over that of the raw ones.

    `log_y` is None for an axis as the values ask for. The legend tells of each curve what differs,
    or these `columns`. Of too many, the best of the first metric have a name and a colour."""
    import matplotlib
    from matplotlib.lines import Line2D

    drawn = {path for some in curves.values() for path in some}
    groups: Groups = results.groups_of([r for r in records if r.path in drawn])
    if len(groups) > MOST_NAMED:
        best = selection.ranked(groups, next(iter(curves)))
        are_ranked = set(map(id, best))
        groups = [*best, *(group for group in groups if id(group) not in are_ranked)]
    names, title = _legend(groups, smooth, columns)
    num_more = len(names) - MOST_NAMED
    labels = names[:MOST_NAMED] + [f"and {num_more} more"] * (num_more > 0)
    lines = [line for text in (*labels, title) for line in text.split("\n")]
    num_columns = 2 if len(curves) == 4 else min(len(curves), 3)
    num_rows = -(-len(curves) // num_columns)
    with matplotlib.rc_context(STYLE):
        width = 4.4 * num_columns + 0.6 + 0.065 * max(map(len, lines))
        figure = new_figure(width=width, height=max(3.2 * num_rows, 0.3 + 0.15 * len(lines)))
        panels = figure.subplots(num_rows, num_columns, squeeze=False).ravel()
        for axes in panels[len(curves) :]:
            axes.remove()
        for axes, (metric, there) in zip(panels, curves.items(), strict=False):
            finite = [value for curve in there.values() for value in curve.dropna()]
            is_log = are_far_apart(finite) if log_y is None else log_y
            means = _draw_panel(axes, groups, there, smooth, log_x, is_log)
            told = _best_of(metric, groups, means, names)
            axes.set_title(told, fontsize=8, loc="left", parse_math=False)
            axes.set_xlabel(next(iter(there.values())).index.name)
            axes.set_ylabel(printable(metric), parse_math=False)
        handles = [Line2D([], [], **_style(n)) for n in range(len(labels))]
        looks: Any = {"frameon": False, "title": title, "title_fontsize": 8, "alignment": "left"}
        legend = figure.legend(handles, "-" * len(labels), loc="outside right upper", **looks)
        # Set here, a name may hold $, or begin with _, which legend() of older releases leaves out.
        for text, label in zip(legend.get_texts(), labels, strict=True):
            text.set(text=label, parse_math=False, fontsize=8)
    return figure


def _legend(groups: Groups, smooth: float, columns: Sequence[str]) -> tuple[list[str], str]:
    """Return what the curves are called, and a title."""
    is_grouped = any(len(group) > 1 for group in groups)
    first = [group[0] for group in groups]
    known = selection.known_to(first) if columns else {}
    getters = {f"{name}=": selection.find(known, name) for name in columns} or {
        f"{key}=": selection.of_setting(key)
        for key in results.differing_settings(first, not is_grouped)
    }
    told = {key: [comparison.text_of(get(r)) for r in first] for key, get in getters.items()}
    if not columns:  # what tells most curves apart comes first
        told = dict(sorted(told.items(), key=lambda item: max(Counter(item[1]).values())))
    names = Counter(Path(record.path).name for record in first)
    labels = []
    for index, group in enumerate(groups):
        path = group[0].path
        name = path if names[Path(path).name] > 1 else Path(path).name
        parts = [key + values[index] for key, values in told.items() if values[index]]
        if is_grouped:
            label = ", ".join(parts) or path
        else:  # the name of a trial holds its settings
            parts = [part for part in parts if part not in name]
            label = f"{name}: {', '.join(parts)}" if parts else name
        if len(group) > 1:
            label = f"{label} (n = {len(group)})" if len(groups) > 1 else f"n = {len(group)}"
        form: Any = {"max_lines": 3, "placeholder": " …", "break_on_hyphens": False}
        whole = printable(label).replace(" = ", "\u00a0=\u00a0")  # no line ends in "(n ="
        labels.append(textwrap.fill(whole, LONGEST_LINE, **form).replace("\u00a0", " "))
    title = ["mean ± standard deviation"] * is_grouped + [f"smoothed by {smooth:g}"] * (smooth > 0)
    return labels, "\n".join(title)


def _best_of(
    metric: str, groups: Groups, means: Mapping[int, "pd.Series"], labels: Sequence[str]
) -> str:
    """Return a panel's best value, where that is, and whose, if there are several curves."""
    import pandas as pd

    values = pd.concat(means).dropna()
    if values.empty or metric == "learning_rate":  # gaps only; or no rate is the best
        return ""
    is_lower = results.is_lower_better_in(groups[0][0].config, metric)
    index, place = values.idxmin() if is_lower else values.idxmax()
    name = means[index].index.name
    where = "" if name == TEST_SET else f" at {name} {place:.0f}"
    whose = f", {labels[index].splitlines()[0]}" if len(means) > 1 else ""
    title = f"best {values[index, place]:.4g}{where}{whose}"
    return textwrap.shorten(title, LONGEST_TITLE, placeholder=" …")


def _draw_panel(
    axes: "Axes", groups: Groups, curves: Curves, smooth: float, log_x: bool, log_y: bool
) -> dict[int, "pd.Series"]:
    """Draw the curves of a metric; return the mean of each group that has one, by its place."""
    import numpy as np
    from matplotlib.ticker import MaxNLocator

    is_of_test = all(curve.index.name == TEST_SET for curve in curves.values())
    if is_of_test:
        axes.set(xticks=[], xlim=(-0.5, len(groups) - 0.5))
    elif log_x:
        axes.set_xscale("log")
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    if log_y:
        axes.set_yscale("log")
    axes.spines[["top", "right"]].set_visible(False)
    bands, means = [], {}
    for index, group in enumerate(groups):
        there = [curves[record.path] for record in group if record.path in curves]
        if not there:
            continue
        style = _style(index)
        mean, std = mean_of([smoothed(curve, smooth) for curve in there])
        raw, _ = mean_of(there)
        means[index] = raw.rename_axis(there[0].index.name)
        if is_of_test:
            axes.errorbar([index], mean, std, capsize=3, **style)
            continue
        if smooth:
            axes.plot(raw, color=style["color"], linewidth=0.7, alpha=0.4, zorder=1)
        every = -(-len(mean) // MOST_MARKED)
        is_marked = np.arange(len(mean)) % every == index % every
        is_marked |= (mean.shift(1).isna() & mean.shift(-1).isna()).to_numpy()
        axes.plot(mean, markevery=np.flatnonzero(is_marked).tolist(), **style)
        if style["marker"] and std.notna().any():
            bands.append((mean, std, style["color"]))
    bottom = axes.get_ylim()[0] if log_y else -np.inf  # of the lines: a band may go below 0
    for mean, std, color in bands:
        low, high = (mean - std).clip(lower=bottom), mean + std
        axes.fill_between(mean.index, low, high, color=color, alpha=0.2, linewidth=0, zorder=0)
    return means


def _style(index: int) -> dict[str, Any]:
    """Return how a curve looks, in colour, line and marker at once; one without a name is grey."""
    if index >= MOST_NAMED:
        return {"color": "0.8", "linewidth": 0.7, "marker": "", "zorder": 0.5}
    cycles = {"color": COLORS, "linestyle": LINES, "marker": MARKERS}
    style = {name: looks[index % len(looks)] for name, looks in cycles.items()}
    return style | {"linewidth": 1.3, "markersize": 3.5, "zorder": 2}


def content_of(figure: "Figure", form: str, title: str, provenance: Mapping[str, Any]) -> bytes:
    """Return a picture whose metadata say which runs it shows; the same bytes each time."""
    import matplotlib

    # ASCII with escapes: each format takes it, and a name that is no UTF-8 can be written.
    origin = json.dumps({key: provenance[key] for key in ("project_commit", "runs")})
    title = printable(title).encode("ascii", "backslashreplace").decode()
    metadata = {
        ".png": {"Title": title, "Description": origin},
        ".pdf": {"Title": title, "Subject": origin, "CreationDate": None},
        ".svg": {"Title": title, "Description": origin, "Date": None},
    }
    logging.getLogger("fontTools").setLevel("WARNING")  # it tells of each glyph in a PDF
    target = io.BytesIO()
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # one that the font lacks is drawn as a box
        figure.savefig(target, format=form[1:], dpi=300, metadata=metadata[form])
    return target.getvalue()
