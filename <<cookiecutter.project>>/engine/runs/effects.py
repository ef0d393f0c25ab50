"""Tells what settings do: the best value of a metric against each, over any runs, as of a sweep.

Runs that differ only by seed and fold are one group, with a mean and a standard deviation. Needs
no Keras.
"""

import json
import math
import statistics
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
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
FAR = 5  # times the least value, the greatest may need a logarithmic axis


class Axis(NamedTuple):
    """A setting, and where its values stand."""

    key: str  # dotted
    scale: str  # "linear", "log", or "words", which stand side by side
    # What has a mean of its own: {"value": …}, without it for runs that have no such setting, or
    # {"low": …, "high": …}; and "at", where it stands.
    levels: Sequence[dict[str, Any]]
    places: Sequence[float]  # of each run's value: numbers, or how many words stand before it
    level_of: Sequence[int]  # each run's place among the levels


def effects_of(records: Sequence[RunRecord], monitor: str | None) -> dict[str, Any] | None:
    """Return what a page shows of settings, as JSON values; None if there is nothing to compare.

    Finished runs with a finite value of `monitor` count. Runs are named by their place.
    """
    if len(records) < 2 or monitor is None:
        return None
    counted: list[RunRecord] = []
    others: list[RunRecord] = []
    for record in records:
        is_one = record.state == "finished" and record.config and monitor in record.metrics
        (counted if is_one else others).append(record)
    left_out = Counter(
        record.state if record.state != "finished" else f"without a finite {monitor}"
        for record in others
    )
    is_lower_better = results.is_lower_better_in(counted[0].config if counted else {}, monitor)
    sign = 1 if is_lower_better else -1
    counted.sort(key=lambda record: sign * record.metrics[monitor].best)
    values = [record.metrics[monitor].best for record in counted]
    place_of = {record.path: place for place, record in enumerate(records)}
    groups = [
        {"runs": sorted(place_of[record.path] for record in group)}
        | _mean_of([record.metrics[monitor].best for record in group])
        for group in results.groups_of(counted)
    ]
    varied = results.differing_settings(records, repetitions=False)
    axes, undrawn = _axes_of([record.settings for record in counted], varied)
    number, most = len(counted), min(len(counted), MOST_POINTS)
    points = [round(i * (number - 1) / max(most - 1, 1)) for i in range(most)]
    return {
        "metric": monitor,
        "lower": is_lower_better,
        "is_log": _is_logarithmic(values),
        "num_runs": number,
        "left_out": [f"{count} {reason}" for reason, count in left_out.items()],
        "varied": varied,
        "repetitions": list(filter(results.is_repetition, results.differing_settings(records))),
        "undrawn": undrawn,
        "axes": [_shown(axis, values, len(groups) if len(axes) > 1 else 0) for axis in axes],
        "cells": _cells_of(axes[0], axes[1], values) if len(axes) == 2 else None,
        "points": [
            [place_of[counted[i].path], _short(values[i]), *(axis.places[i] for axis in axes)]
            for i in points
        ],
        "num_groups": len(groups),
        "groups": sorted(groups, key=lambda group: sign * group["mean"])[:MOST_GROUPS],
    }


def _axes_of(
    settings: Sequence[Mapping[str, Any]], varied: Sequence[str]
) -> tuple[list[Axis], list[str]]:
    """Return an axis for each setting that can be drawn, of those that differ, and which cannot."""
    axes, undrawn, most_alike = {}, [], {}
    for key in varied:
        values = [own.get(key, ...) for own in settings]
        counts = Counter(map(_identity, values))
        has_words = not all(map(_is_number, values))
        if len(counts) < 2 or (has_words and len(counts) > MOST_WORDS):
            undrawn.append(f"{key} ({len(counts)} value{'s' * (len(counts) != 1)})")
        elif len(set((axis := _axis_of(key, values)).level_of)) == len(values):
            undrawn.append(f"{key} (one run a value)")
        else:
            axes[key], most_alike[key] = axis, max(counts.values())
    # Of too many, those that tell most runs apart stay, in the order in which they stand.
    chosen = sorted(axes, key=most_alike.__getitem__)[:MOST_SETTINGS]
    undrawn += [key for key in axes if key not in chosen]
    return [axis for key, axis in axes.items() if key in chosen], undrawn


def _axis_of(key: str, values: Sequence[Any]) -> Axis:
    import numpy as np

    numbers = sorted({value for value in values if _is_number(value)})
    positive = [number for number in numbers if number > 0]
    scale, are_few = "log" if _is_logarithmic(positive) else "linear", len(numbers) <= MOST_VALUES
    if not all(map(_is_number, values)):
        scale = "words"
    elif len(positive) < len(numbers):  # 0 has no place on a logarithmic axis
        scale = "words" if scale == "log" and are_few else "linear"
    if scale == "words" or are_few:
        value_of = {_identity(value): value for value in values}
        # Numbers come first, then words, then nothing.
        each = sorted(value_of, key=lambda one: (isinstance(one, str), one == "", one))
        level_of = [each.index(_identity(value)) for value in values]
        levels = [
            {"at": place if scale == "words" else one}
            | ({"value": clipped(value_of[one], LONGEST_WORD)} if one != "" else {})
            for place, one in enumerate(each)
        ]
        return Axis(key, scale, levels, level_of if scale == "words" else values, level_of)
    space = np.geomspace if scale == "log" else np.linspace
    # Ends of ranges, and their middles between them.
    points = space(numbers[0], numbers[-1], 2 * NUM_RANGES + 1).tolist()
    lows, middles, highs = points[:-1:2], points[1::2], points[2::2]
    levels = [
        {"at": middle, "low": low, "high": high}
        for middle, low, high in zip(middles, lows, highs, strict=True)
    ]
    level_of = [bisect_right(highs[:-1], value) for value in values]
    return Axis(key, scale, levels, values, level_of)


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


def _is_logarithmic(values: Sequence[float]) -> bool:
    """Return whether values are far apart, and lie more evenly on a logarithmic axis."""
    if not values or min(values) <= 0 or max(values) / min(values) < FAR:
        return False
    low, middle, high = min(values), statistics.median_low(values), max(values)
    share = (middle - low) / (high - low)
    logarithmic = math.log(middle / low) / math.log(high / low)
    return abs(logarithmic - 0.5) <= abs(share - 0.5)


def _shown(axis: Axis, values: Sequence[float], num_groups: int) -> dict[str, Any]:
    """Return an axis with the means of its levels; one for each of the groups: drawn at random."""
    means = _means_of(values, axis.level_of, len(axis.levels))
    levels = [level | mean for level, mean in zip(axis.levels, means, strict=True)]
    is_drawn = axis.scale != "words" and len(levels) == num_groups
    return {
        "key": axis.key,
        "scale": axis.scale,
        "is_grid": not is_drawn and "low" not in levels[0],
        "is_joined": not is_drawn,
        "levels": levels,
    }


def _cells_of(one: Axis, other: Axis, values: Sequence[float]) -> list[list[dict[str, Any]]]:
    """Return the mean of each pair of levels, a row for each level of the first axis."""
    width = len(other.levels)
    pairs = zip(one.level_of, other.level_of, strict=True)
    places = [row * width + column for row, column in pairs]
    means = _means_of(values, places, len(one.levels) * width)
    return [means[start : start + width] for start in range(0, len(means), width)]


def _means_of(
    values: Sequence[float], places: Sequence[int], num_places: int
) -> list[dict[str, Any]]:
    at: list[list[float]] = [[] for _ in range(num_places)]
    for value, place in zip(values, places, strict=True):
        at[place].append(value)
    return [_mean_of(some) for some in at]


def _mean_of(values: Sequence[float]) -> dict[str, Any]:
    mean = comparison.mean_of(values)
    if mean is None:
        return {}
    std = None if mean.std is None else _short(mean.std)
    return {"mean": _short(mean.mean), "std": std, "told": comparison.mean_and_spread(mean)}


def _short(value: float) -> float:
    return float(f"{value:.6g}")
