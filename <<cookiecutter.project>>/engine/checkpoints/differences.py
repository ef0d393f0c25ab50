"""Where two runs differ first: in the history, or else in what their commits hold. Needs no Keras.

NumPy and h5py are imported where they are used, so that the command line answers at once.
"""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import h5py

Cells = dict[str, str]  # of a row, by column
NOTHING = "nothing"


class Difference(NamedTuple):
    """A place, and what each of two runs has there."""

    place: str
    one: str
    other: str

    def __str__(self) -> str:
        return f"{self.place}: {self.one} and {self.other}"


def first_difference(one: Path, other: Path) -> str:
    """Return where two runs differ first, in the history or else in the commit; "" if nowhere."""
    difference = history_difference(rows_in(one), rows_in(other))
    if difference:
        return str(difference)
    from engine.checkpoints.file import BEST, LATEST

    for name in (LATEST, BEST):
        if not (one / name).exists() and not (other / name).exists():
            continue  # without a monitor no epoch is the best
        if (one / name).read_bytes() != (other / name).read_bytes():
            difference = commit_difference(one / name, other / name)
            return f"{name}, {difference or 'its description'}"
    return ""


def rows_in(run: Path) -> list[Cells]:
    """Return the rows of `history.csv` as text; [] if there is none yet.

    A last line that is half written is left out. Raises ValueError if it cannot be read.
    """
    path = run / "history.csv"
    try:
        text = path.read_text()
        return list(csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1])))
    except FileNotFoundError:
        return []
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"cannot read {path}: {error}") from error


def history_difference(rows: Sequence[Cells], others: Sequence[Cells]) -> Difference | None:
    """Return the first cell of two histories that differs, or their lengths.

    Epochs count from 1, as they do in all that people read and type.
    """
    for epoch, (row, another) in enumerate(zip(rows, others, strict=False), start=1):
        for column in dict.fromkeys([*row, *another]):
            cells = row.get(column), another.get(column)
            if cells[0] != cells[1]:
                shown = (NOTHING if cell in (None, "") else str(cell) for cell in cells)
                return Difference(f"epoch {epoch}, {column}", *shown)
    if len(rows) != len(others):
        return Difference("number of epochs", str(len(rows)), str(len(others)))
    return None


def commit_difference(one: Path, other: Path, ignored: Sequence[str] = ()) -> Difference | None:
    """Return the first array or entry of state in which two commits differ; weights come first.

    Args:
        one: a commit.
        other: another.
        ignored: entries of the state that are not looked at.
    """
    import h5py

    from engine.checkpoints.file import STATE, TEXT

    with h5py.File(one) as a, h5py.File(other) as b:
        datasets, others = _datasets_in(a), _datasets_in(b)
        names = sorted({*datasets, *others}, key=lambda name: (name.startswith(STATE), name))
        for name in names:
            if name == TEXT:
                continue
            if name not in datasets or name not in others:
                shown = ("there" if name in found else NOTHING for found in (datasets, others))
                return Difference(name, *shown)
            difference = _array_difference(datasets[name], others[name])
            if difference:
                return difference
        if TEXT in datasets and TEXT in others:
            states = json.loads(a[TEXT][()]), json.loads(b[TEXT][()])
            return _state_difference(*states, ignored)
    return None


def _datasets_in(file: "h5py.File") -> dict[str, "h5py.Dataset"]:
    import h5py

    found: dict[str, Any] = {}

    def look(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset):
            found[name] = item

    file.visititems(look)
    return found


def _array_difference(one: "h5py.Dataset", other: "h5py.Dataset") -> Difference | None:
    """Compare bytes: a NaN equals itself, and 0.0 is not -0.0."""
    import numpy as np

    a, b = (np.asarray(dataset[()]) for dataset in (one, other))
    if a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes():
        return None
    name = str(one.attrs.get("path", one.name.lstrip("/")))
    if a.dtype != b.dtype or a.shape != b.shape:
        return Difference(name, *(f"{array.dtype} of shape {array.shape}" for array in (a, b)))
    cells = [array.reshape(-1, 1).view(np.uint8) for array in (a, b)]
    index = int(np.argmax((cells[0] != cells[1]).any(axis=1)))
    place = [int(number) for number in np.unravel_index(index, a.shape)]
    return Difference(f"{name}{place or ''}", *(str(array.flat[index]) for array in (a, b)))


def _state_difference(
    one: Mapping[str, Any], other: Mapping[str, Any], ignored: Sequence[str]
) -> Difference | None:
    for key in dict.fromkeys([*one, *other]):
        values = [json.dumps(state.get(key), sort_keys=True) for state in (one, other)]
        if key not in ignored and values[0] != values[1]:
            return Difference(f"state, {key}", *(value[:100] for value in values))
    return None
