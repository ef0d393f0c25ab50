"""Finds where two runs differ first, and reads their histories. Needs no NumPy."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from vegab.files import read_bytes

Cells = dict[str, str]  # of a row, by column
NOTHING = "nothing"
MOST_ROWS = 1_100_000  # of a history that somebody else may have made


class Difference(NamedTuple):
    """A place, and what each of two runs has there."""

    place: str
    one: str
    other: str

    def __str__(self) -> str:
        return f"{self.place}: {self.one} and {self.other}"


def rows_in(run: Path) -> list[Cells]:
    """Return the rows of `history.csv`, if any, as text, except a last one that is half written."""
    path = run / "history.csv"
    try:
        text = read_bytes(path, run).decode()
        if (number := text.count("\n")) > MOST_ROWS:
            raise ValueError(f"cannot read {path}: it has {number:,} lines")
        rows = list(csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1])))
        if rows and rows[0].get("epoch") == "0":  # an older project's, which counted from 0
            rows = [row | {"epoch": str(number)} for number, row in enumerate(rows, start=1)]
        return rows
    except FileNotFoundError:
        return []
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"cannot read {path}: {error}") from error


def history_difference(rows: Sequence[Cells], others: Sequence[Cells]) -> Difference | None:
    """Return the first cell of two histories that differs, or their lengths; epochs from 1."""
    for epoch, (row, another) in enumerate(zip(rows, others, strict=False), start=1):
        for column in dict.fromkeys([*row, *another]):
            cells = row.get(column), another.get(column)
            if cells[0] != cells[1]:
                shown = (NOTHING if cell in (None, "") else str(cell) for cell in cells)
                return Difference(f"epoch {epoch}, {column}", *shown)
    if len(rows) != len(others):
        return Difference("number of epochs", str(len(rows)), str(len(others)))
    return None
