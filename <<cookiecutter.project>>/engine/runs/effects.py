"""What settings do: the best value of a metric against each, over the runs of a sweep, or any runs.

Runs that differ by seed and fold alone are one group, with a mean and a standard deviation. Needs
no Keras.
"""

import json
import math
import shlex
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from engine.runs import comparison, results
from engine.runs.comparison import Mean
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

    Finished runs with a finite value of the metric `monitor` count; how many others there are is
    told. Runs are named by their place in `records`.
    """
    if len(records) < 2 or monitor is None:
        return None
    counted = [
        index
        for index, record in enumerate(records)
        if record.state == "finished" and record.config and monitor in record.metrics
    ]
    config = records[counted[0]].config if counted else {}
    is_lower_better = results.is_lower_better_in(config, monitor)
    values = {index: records[index].metrics[monitor].best for index in counted}
    counted.sort(key=lambda index: values[index] if is_lower_better else -values[index])
    settings = [results.settings_of(records[index]) for index in counted]
    in_order = [values[index] for index in counted]
    differing = results.differing_settings(records)
    varied = [key for key in differing if not results.is_repetition(key)]
    axes, undrawn = _axes_of(settings, varied)
    groups = _groups_of(settings, varied)
    return {
        "metric": monitor,
        "lower": is_lower_better,
        "is_log": _is_logarithmic(in_order),
        "num_runs": len(counted),
        "left_out": _left_out(records, values, monitor),
        "varied": varied,
        "repetitions": [key for key in differing if results.is_repetition(key)],
        "undrawn": undrawn,
        "axes": [_shown(axis, in_order, len(groups) if len(axes) > 1 else 0) for axis in axes],
        "cells": _cells_of(axes[0], axes[1], in_order) if len(axes) == 2 else None,
        "points": [
            [counted[i], _short(in_order[i]), *(axis.places[i] for axis in axes)]
            for i in _spread(len(counted), MOST_POINTS)
        ],
        "num_groups": len(groups),
        "groups": _best_groups(groups, counted, in_order, is_lower_better),
        "again": f"python bin/reproduce.py {shlex.quote(records[counted[0]].path)}"
        if counted
        else "",
    }


def _left_out(records: Sequence[RunRecord], values: Mapping[int, float], monitor: str) -> list[str]:
    reasons = Counter(
        record.state if record.state != "finished" else f"without a finite {monitor}"
        for index, record in enumerate(records)
        if index not in values
    )
    return [f"{number} {reason}" for reason, number in reasons.items()]


def _axes_of(
    settings: Sequence[Mapping[str, Any]], varied: Sequence[str]
) -> tuple[list[Axis], list[str]]:
    """Return an axis for each setting that can be drawn, of those that differ, and which cannot."""
    axes, undrawn, most_alike = [], [], {}
    for key in varied:
        texts = Counter(_text(own.get(key, ...)) for own in settings)
        values = [own.get(key, ...) for own in settings]
        has_words = not all(map(_is_number, values))
        if len(texts) < 2 or (has_words and len(texts) > MOST_WORDS):
            undrawn.append(f"{key} ({len(texts)} value{'s' * (len(texts) != 1)})")
            continue
        axes.append(_axis_of(key, values))
        most_alike[key] = max(texts.values())
    # Of too many, those that tell most runs apart stay, in the order in which they stand.
    chosen = sorted(most_alike, key=lambda key: most_alike[key])[:MOST_SETTINGS]
    undrawn += [axis.key for axis in axes if axis.key not in chosen]
    return [axis for axis in axes if axis.key in chosen], undrawn


def _axis_of(key: str, values: Sequence[Any]) -> Axis:
    numbers = sorted({value for value in values if _is_number(value)})
    has_words = not all(map(_is_number, values))
    positive = [number for number in numbers if number > 0]
    is_logarithmic = _is_logarithmic(positive)
    # 0 has no place on a logarithmic axis.
    if has_words or (is_logarithmic and len(positive) < len(numbers) <= MOST_VALUES):
        first = {_text(value): value for value in values}
        texts = sorted(first, key=lambda text: _order(first[text]))
        levels = [
            {"at": index} | ({"value": _clipped(first[text], text)} if text else {})
            for index, text in enumerate(texts)
        ]
        index_of = {text: index for index, text in enumerate(texts)}
        places = [index_of[_text(value)] for value in values]
        return Axis(key, "words", levels, places, places)
    scale = "log" if is_logarithmic and len(positive) == len(numbers) else "linear"
    if len(numbers) <= MOST_VALUES:
        index_of = {number: index for index, number in enumerate(numbers)}
        levels = [{"at": number, "value": number} for number in numbers]
        return Axis(key, scale, levels, values, [index_of[value] for value in values])
    there, back = (math.log, math.exp) if scale == "log" else (float, float)
    low, high = there(numbers[0]), there(numbers[-1])
    ends = [low + (high - low) * i / NUM_RANGES for i in range(NUM_RANGES + 1)]
    levels = [
        {"at": back((start + end) / 2), "low": back(start), "high": back(end)}
        for start, end in pairwise(ends)
    ]
    shares = [(there(value) - low) / (high - low) for value in values]
    level_of = [min(int(share * NUM_RANGES), NUM_RANGES - 1) for share in shares]
    return Axis(key, scale, levels, values, level_of)


def _is_number(value: Any) -> bool:
    is_one = isinstance(value, int | float) and not isinstance(value, bool)
    return is_one and abs(value) <= LARGEST  # neither infinite nor NaN


def _order(value: Any) -> tuple[int, float, str]:
    """Numbers come first, then words, then nothing."""
    if _is_number(value):
        return (0, value, "")
    return (2, 0, "") if value is ... else (1, 0, _text(value))


def _is_logarithmic(values: Sequence[float]) -> bool:
    """Return whether values are far apart, and lie more evenly on a logarithmic axis."""
    if not values or min(values) <= 0 or max(values) / min(values) < FAR:
        return False
    low, middle, high = min(values), statistics.median_low(values), max(values)
    share = (middle - low) / (high - low)
    logarithmic = math.log(middle / low) / math.log(high / low)
    return abs(logarithmic - 0.5) <= abs(share - 0.5)


def _text(value: Any) -> str:
    return "" if value is ... else json.dumps(value, sort_keys=True)


def _clipped(value: Any, text: str) -> Any:
    return value if len(text) <= LONGEST_WORD else f"{text[:LONGEST_WORD]}…"


def _shown(axis: Axis, values: Sequence[float], num_groups: int) -> dict[str, Any]:
    """Return an axis with the means of its levels. Where each of the groups of runs has a level of
    its own, the values were drawn at random.
    """
    at_level: list[list[float]] = [[] for _ in axis.levels]
    for level, value in zip(axis.level_of, values, strict=True):
        at_level[level].append(value)
    levels = [
        level | _written(comparison.mean_of(own))
        for level, own in zip(axis.levels, at_level, strict=True)
    ]
    is_drawn = axis.scale != "words" and len(levels) == num_groups
    is_range = "low" in levels[0]
    return {
        "key": axis.key,
        "scale": axis.scale,
        "is_grid": not is_drawn and not is_range,
        "is_joined": not is_drawn,
        "levels": levels,
    }


def _cells_of(one: Axis, other: Axis, values: Sequence[float]) -> list[list[dict[str, Any]]]:
    """Return the mean of each pair of levels, a row for each level of the first axis."""
    at_cell: list[list[list[float]]] = [[[] for _ in other.levels] for _ in one.levels]
    for row, column, value in zip(one.level_of, other.level_of, values, strict=True):
        at_cell[row][column].append(value)
    return [[_written(comparison.mean_of(own)) for own in row] for row in at_cell]


def _groups_of(settings: Sequence[Mapping[str, Any]], varied: Sequence[str]) -> list[list[int]]:
    groups: dict[tuple[str, ...], list[int]] = {}
    for index, own in enumerate(settings):
        groups.setdefault(tuple(_text(own.get(key, ...)) for key in varied), []).append(index)
    return list(groups.values())


def _best_groups(
    groups: Sequence[Sequence[int]],
    runs: Sequence[int],
    values: Sequence[float],
    is_lower_better: bool,
) -> list[dict[str, Any]]:
    """Return the groups whose means are the best, the best one first."""
    written = [
        {"runs": sorted(runs[i] for i in group)}
        | _written(comparison.mean_of([values[i] for i in group]))
        for group in groups
    ]
    sign = 1 if is_lower_better else -1
    return sorted(written, key=lambda group: sign * group["mean"])[:MOST_GROUPS]


def _written(mean: Mean | None) -> dict[str, Any]:
    if mean is None:
        return {}
    std = None if mean.std is None else _short(mean.std)
    return {"mean": _short(mean.mean), "std": std, "told": comparison.mean_and_spread(mean)}


def _short(value: float) -> float:
    return float(f"{value:.6g}")


def _spread(number: int, most: int) -> list[int]:
    """Return so many places among a number of them, the first and the last included."""
    if number <= most:
        return list(range(number))
    return [round(i * (number - 1) / (most - 1)) for i in range(most)]
