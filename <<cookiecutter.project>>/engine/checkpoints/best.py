"""Tells which epoch of a history is the best. Without NumPy: commands that list runs need none."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
LOWER_IS_BETTER = ("loss", "error", "mae", "mse", "mape", "msle", "rmse", "perplexity", "kl")
HIGHER_IS_BETTER = ("acc", "auc", "precision", "recall", "f1", "iou", "dice", "r2", "score", "psnr")


def is_lower_better(monitor: str | None, mode: str = "auto") -> bool:
    """Whether less of a metric is better; ValueError if "auto" cannot tell by its name."""
    if monitor is None or mode != "auto":
        return mode != "max"
    lower = any(part in monitor.lower() for part in LOWER_IS_BETTER)
    higher = any(part in monitor.lower() for part in HIGHER_IS_BETTER)
    if lower == higher:
        raise ValueError(f"is less of {monitor!r} better, or more? Set monitor_mode to min or max")
    return lower


def best_of(history: Sequence[Row], monitor: str | None, lower_is_better: bool) -> int | None:
    """Return the first epoch with the best finite `monitor`, or None if there is none."""
    if monitor is None:
        return None
    found = [row for row in history if math.isfinite(row.get(monitor, math.nan))]
    sign = 1 if lower_is_better else -1
    best = min(found, key=lambda row: (sign * row[monitor], row["epoch"]), default=None)
    return best["epoch"] if best else None


def is_best(history: Sequence[Row], best_epoch: int | None, monitor: str, is_lower: bool) -> bool:
    """Whether the last row, which has a column `monitor`, is better than the best epoch so far."""
    value = history[-1][monitor]
    if best_epoch is None or not math.isfinite(value):
        return math.isfinite(value)
    best = history[best_epoch][monitor]
    return value < best if is_lower else value > best
