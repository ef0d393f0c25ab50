"""Keeps a run's history as rows, an array and text."""

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from engine.checkpoints.best import Row

# A cell that a row does not have. It is a NaN, and no computation returns this one.
MISSING = np.array(0x7FF8_0000_0000_0A11, np.int64).view(np.float64)[()]


class HistoryArray:
    """A history as one array, which grows with it at the cost of the new rows only."""

    def __init__(self) -> None:
        self.columns: dict[str, bool] = {}  # names, and whether a column holds whole numbers
        # float64 of shape (num_rows, num_columns), never written to once it is here
        self.values = np.empty((0, 0))

    def follow(self, history: Sequence[Row]) -> None:
        """Take the rows that are new since the last call, and forget those that are gone."""
        self.values = self.values[: len(history)]
        for row in history[len(self.values) :]:
            for key, value in row.items():
                if not isinstance(value, int | float):
                    raise TypeError(f"{key} is {value!r}; the history holds only numbers")
                self.columns.setdefault(key, isinstance(value, int))
            more = len(self.columns) - self.values.shape[1]
            wide = np.pad(self.values, ((0, 0), (0, more)), constant_values=MISSING)
            new = [row.get(key, MISSING) for key in self.columns]
            self.values = np.concatenate([wide, [new]])


def rows_of(columns: Mapping[str, bool], values: np.ndarray) -> list[dict[str, Any]]:
    """Return the rows that `HistoryArray` made `columns` and `values` of."""
    bits, missing = values.view(np.int64), MISSING.view(np.int64)
    return [
        {
            key: int(value) if is_whole else float(value)
            for (key, is_whole), value, bit in zip(columns.items(), row, row_bits, strict=True)
            if bit != missing
        }
        for row, row_bits in zip(values, bits, strict=True)
    ]


def csv_lines(columns: Sequence[str], rows: Sequence[Row], header: bool = True) -> str:
    """Return rows, whose epochs count from 0, as CSV text, where they count from 1."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    if header:
        writer.writeheader()
    for row in rows:
        cells = {key: shortest(value) for key, value in row.items()}
        writer.writerow(cells | ({"epoch": row["epoch"] + 1} if "epoch" in row else {}))
    return text.getvalue()


def shortest(value: Any) -> Any:
    """Return a float with the fewest digits that read back as it (as a float32, if it is one)."""
    if not isinstance(value, float):
        return value
    single = np.float32(value)
    return str(single) if float(single) == value else repr(value)
