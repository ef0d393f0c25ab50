"""Shows what settings do: the best value of a metric against each setting, over any runs.

Runs that differ only by seed and fold are one group, with a mean and a standard deviation."""

import json
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from engine.runs import comparison, results
from engine.runs.results import RunRecord

MOST_SETTINGS = 10  # that are drawn
MOST_WORDS = 24  # of such a setting
LONGEST_WORD = 200  # characters
MOST_VALUES = 12  # numbers of it, each with a mean of its own; more are put into ranges
NUM_RANGES = 8
MOST_POINTS = 1_000
MOST_GROUPS = 200
LARGEST = 2**53  # numbers above it are words: JavaScript's have gaps there
FAR = 100  # times the least value, the greatest needs a logarithmic axis


class Axis(NamedTuple):
    """A setting, and where its values stand."""

    key: str  # dotted
    scale: str  # "linear" or "log" for ranges of numbers, or "words", which stand side by side
    # What has a mean of its own: {"value": …}, without it for runs that have no such setting, or
    # {"low": …, "high": …}; and "at", where it stands.
    levels: Sequence[dict[str, Any]]
    places: Sequence[float]  # of each run's value: numbers, or how many words stand before it
    level_of: Sequence[int]  # each run's place among the levels


def effects_of(records: Sequence[RunRecord], monitor: str | None) -> dict[str, Any] | None:
    """Return what a page shows of settings, as JSON values; None if there is nothing to compare."""
    if len(records) < 2 or monitor is None:
        return None
    counted: list[RunRecord] = []
    left_out: Counter[str] = Counter()
    for record in records:
        if record.state != "finished":
            left_out[record.state] += 1
        elif not record.config or monitor not in record.metrics:
            left_out[f"without a finite {monitor}"] += 1
        else:
            counted.append(record)
    is_lower = results.is_lower_better_in(counted[0].config if counted else {}, monitor)
    counted.sort(key=lambda record: record.metrics[monitor].best, reverse=not is_lower)
    values = [record.metrics[monitor].best for record in counted]
    place_of = {record.path: place for place, record in enumerate(records)}
    groups = [
        {"runs": sorted(place_of[record.path] for record in group)}
        | _mean_of(record.metrics[monitor].best for record in group)
        for group in results.groups_of(counted)
    ]
    groups.sort(key=lambda group: group["mean"], reverse=not is_lower)
    varied = results.differing_settings(counted, repetitions=False)
    axes, undrawn = _axes_of([record.settings for record in counted], varied)
    drawn = enumerate(counted[:MOST_POINTS])
    points = [[place_of[r.path], short(values[i]), *(a.places[i] for a in axes)] for i, r in drawn]
    return {
        "metric": monitor,
        "lower": is_lower,
        "is_log": are_far_apart(values),
        "num_runs": len(counted),
        "left_out": [f"{count} {reason}" for reason, count in left_out.items()],
        "varied": varied,
        "repetitions": list(filter(results.is_repetition, results.differing_settings(counted))),
        "undrawn": undrawn,
        "axes": [{"key": a.key, "scale": a.scale, "levels": _with_means(a, values)} for a in axes],
        "points": points,
        "num_groups": len(groups),
        "groups": groups[:MOST_GROUPS],
    }


def _axes_of(
    settings: Sequence[Mapping[str, Any]], varied: Sequence[str]
) -> tuple[list[Axis], list[str]]:
    """Return an axis for each setting that can be drawn, of those that differ, and which cannot."""
    axes, undrawn = [], []
    for key in varied:
        axis = _axis_of(key, [own.get(key, ...) for own in settings])
        number = len(axis.levels)
        if number < 2 or number > MOST_WORDS:
            undrawn.append(f"{key} ({number} value{'s' * (number != 1)})")
        elif len(set(axis.level_of)) == len(settings):
            undrawn.append(f"{key} (one run per value)")
        else:
            axes.append(axis)
    undrawn += [axis.key for axis in axes[MOST_SETTINGS:]]
    return axes[:MOST_SETTINGS], undrawn


def _axis_of(key: str, values: Sequence[Any]) -> Axis:
    numbers = sorted({value for value in values if _is_number(value)})
    if len(numbers) > MOST_VALUES and all(map(_is_number, values)):
        import numpy as np

        is_log = are_far_apart(numbers)
        space = np.geomspace if is_log else np.linspace
        # Ends of ranges, and their middles between them.
        points = space(numbers[0], numbers[-1], 2 * NUM_RANGES + 1).tolist()
        ranges = zip(points[1::2], points[:-1:2], points[2::2], strict=True)
        levels = [dict(zip(("at", "low", "high"), each, strict=True)) for each in ranges]
        level_of = [bisect_right(points[2:-1:2], value) for value in values]
        return Axis(key, "log" if is_log else "linear", levels, values, level_of)
    value_of = {_identity(value): value for value in values}
    # Numbers come first, then words, then nothing.
    each = sorted(value_of, key=lambda one: (isinstance(one, str), one == "", one))
    levels = [
        {"at": place} | ({"value": clipped(value_of[one], LONGEST_WORD)} if one != "" else {})
        for place, one in enumerate(each)
    ]
    place_of = {one: place for place, one in enumerate(each)}
    level_of = [place_of[_identity(value)] for value in values]
    return Axis(key, "words", levels, level_of, level_of)


def _is_number(value: Any) -> bool:
    is_one = isinstance(value, int | float) and not isinstance(value, bool)
    return is_one and abs(value) <= LARGEST  # neither infinite nor NaN


def _identity(value: Any) -> Any:
    """Return what is the same for the same values: a number, or a text; "" where there is none."""
    if _is_number(value):
        return value
    return "" if value is ... else json.dumps(value, sort_keys=True)


def clipped(value: Any, longest: int) -> Any:
    """Return a setting, or the beginning of a long one as text."""
    text = value if isinstance(value, str) else json.dumps(value)
    return value if len(text) <= longest else f"{text[:longest]}…"


def are_far_apart(values: Sequence[float]) -> bool:
    """Return whether values ask for a logarithmic axis."""
    return bool(values) and min(values) > 0 and max(values) / min(values) > FAR


def _with_means(axis: Axis, values: Sequence[float]) -> list[dict[str, Any]]:
    """Return the levels of an axis with the mean of each."""
    at: list[list[float]] = [[] for _ in axis.levels]
    for value, place in zip(values, axis.level_of, strict=True):
        at[place].append(value)
    return [level | _mean_of(some) for level, some in zip(axis.levels, at, strict=True)]


def _mean_of(values: Iterable[float]) -> dict[str, Any]:
    mean = comparison.mean_of(list(values))
    if mean is None:
        return {}
    std = None if mean.std is None else short(mean.std)
    return {"mean": short(mean.mean), "std": std, "told": comparison.mean_and_spread(mean)}


def short(value: float) -> float:
    """Return a value with six digits."""
    return float(f"{value:.6g}")
