"""Many records parsed at once, where they differ in nothing but their values.

Records of one data set are mostly alike: the same names in the same order, and values of the same
sizes, so that each value stands at the same place in all of them. Such places are found once, and
the values of a whole batch are then taken out of one array of bytes, several times as fast as each
record can be parsed. What does not follow a known layout is left to TensorFlow.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine.batches import Array

# Places of values in a record: for strings and floats, where it begins and ends; for integers, that
# of each value.
Span = tuple[int, int]
MOST_LAYOUTS = 64
BYTES = 2  # the type, in protocol buffers, of what begins with its length
LISTS = {1: "string", 2: "float32", 3: "int64"}


@dataclass(frozen=True)
class Wanted:
    """What is to be taken out of each record under a name.

    Attributes:
        dtype: "string", "float32" or "int64", as it is stored.
        shape: of the values in one record.
        raw: dtype of the array that a string holds the bytes of, or None: it stays a string.
    """

    dtype: str
    shape: tuple[int, ...]
    raw: str | None = None


class Layouts:
    """Parses batches of `tf.train.Example`s that follow a few layouts.

    Args:
        wanted: name in the record, and what is to be taken; by the name in the result.
    """

    def __init__(self, wanted: Mapping[Any, tuple[str, Wanted]]) -> None:
        self.wanted = wanted
        self._known: dict[int, list[_Layout]] = {}  # by the length of a record
        self._number = 0
        self._is_in_use = True

    def parse(self, records: Sequence[bytes]) -> dict[Any, Array] | None:
        """Return arrays of shape (len(records), ...), or None if the records are too different."""
        if not self._is_in_use:
            return None
        groups: dict[int, list[int]] = {}
        for row, length in enumerate(map(len, records)):
            groups.setdefault(length, []).append(row)
        parts: list[tuple[list[int], dict[Any, Array]]] = []
        for length, rows in groups.items():
            content = b"".join([records[row] for row in rows])
            table = np.frombuffer(content, np.uint8).reshape(len(rows), length)
            left = np.arange(len(rows))
            while len(left):
                found = self._matching(table, left)
                if found is None:
                    return None
                layout, matches = found
                chosen = left[matches]
                taken = table if len(chosen) == len(table) else table[chosen]
                parts.append(([rows[i] for i in chosen.tolist()], layout.values(taken)))
                left = left[~matches]
        if len(parts) == 1:
            return parts[0][1]
        arrays = {
            name: np.empty((len(records), *array.shape[1:]), array.dtype)
            for name, array in parts[0][1].items()
        }
        for rows, values in parts:
            for name, array in values.items():
                arrays[name][rows] = array
        return arrays

    def _matching(self, table: Array, left: Array) -> "tuple[_Layout, Array] | None":
        """Return a layout that some of the rows follow, and which of them do."""
        known = self._known.setdefault(table.shape[1], [])
        rest = table if len(left) == len(table) else table[left]
        for layout in known:
            matches = layout.matches(rest)
            if matches.any():
                return layout, matches
        if self._number >= MOST_LAYOUTS:
            self._is_in_use = False
            return None
        new = _Layout.of(table[left[0]].tobytes(), self.wanted)
        if new is None:
            return None
        self._number += 1
        known.append(new)
        return new, new.matches(rest)


class _Layout:
    """Where the values stand in a record.

    Args:
        record: one that has this layout.
        spans: the places of the values, by name in the record.
        wanted: as for `Layouts`.
    """

    def __init__(
        self,
        record: bytes,
        spans: Mapping[str, tuple[str, list[Span]]],
        wanted: Mapping[Any, tuple[str, Wanted]],
    ) -> None:
        self.spans = spans
        self.wanted = wanted
        # Bits that are not those of a value are the same in all records of the layout.
        fixed = np.full(len(record), 0xFF, np.uint8)
        for dtype, places in spans.values():
            for first, last in places:
                # The highest bit of an integer's bytes says whether another byte follows.
                fixed[first:last] = 0x80 if dtype == "int64" else 0
        self._places = np.flatnonzero(fixed)
        self._mask = fixed[self._places]
        self._expected = np.frombuffer(record, np.uint8)[self._places] & self._mask

    @classmethod
    def of(cls, record: bytes, wanted: Mapping[Any, tuple[str, Wanted]]) -> "_Layout | None":
        """Return a record's layout, or None if it holds something else than is wanted."""
        try:
            spans = _spans(record)
        except (ValueError, IndexError, UnicodeDecodeError):
            return None
        for key, wish in wanted.values():
            dtype, places = spans.get(key, ("", []))
            if dtype != wish.dtype:
                return None
            number = int(np.prod(wish.shape))
            if wish.raw is not None:
                first, last = places[0] if len(places) == 1 else (0, -1)
                if last - first != number * np.dtype(wish.raw).itemsize:
                    return None
            elif dtype == "float32":
                if sum(last - first for first, last in places) != 4 * number or len(places) > 1:
                    return None
            elif len(places) != number:
                return None
        return cls(record, spans, wanted)

    def matches(self, table: Array) -> Array:
        """Return which rows have this layout: bool, shape (rows,)."""
        return ((table[:, self._places] & self._mask) == self._expected).all(axis=1)

    def values(self, table: Array) -> dict[Any, Array]:
        """Return the values of rows that have this layout."""
        return {
            name: self._value(table, self.spans[key][1], wish)
            for name, (key, wish) in self.wanted.items()
        }

    def _value(self, table: Array, places: list[Span], wish: Wanted) -> Array:
        shape = (len(table), *wish.shape)
        if wish.raw is not None or wish.dtype == "float32":
            first, last = places[0] if places else (0, 0)
            dtype = np.dtype(wish.raw or "float32").newbyteorder("<")
            values = np.array(table[:, first:last]).view(dtype).reshape(shape)
            return values.astype(dtype.newbyteorder("="), copy=False)
        if wish.dtype == "int64":
            numbers = np.zeros((len(table), len(places)), np.uint64)
            for column, (first, last) in enumerate(places):
                for place in range(first, last):
                    bits = (table[:, place] & 0x7F).astype(np.uint64)
                    numbers[:, column] |= bits << np.uint64(7 * (place - first))
            return numbers.view(np.int64).reshape(shape)
        strings = np.empty((len(table), len(places)), object)
        for column, (first, last) in enumerate(places):
            strings[:, column] = [row[first:last].tobytes() for row in table]
        return strings.reshape(shape)


def _spans(record: bytes) -> dict[str, tuple[str, list[Span]]]:
    """Return dtype and places of the values of each feature.

    Raises:
        ValueError: if a record is not written in the plain way, where each name comes once and
            numbers are packed; or is no `tf.train.Example`.
        IndexError: if it ends early.
    """
    found: dict[str, tuple[str, list[Span]]] = {}
    for features in _fields(record, 0, len(record), {1}):
        for entry in _fields(record, *features[1:], {1}):
            parts = list(_fields(record, *entry[1:], {1, 2}))
            if [number for number, *_ in parts] != [1, 2]:
                raise ValueError("not a name and a feature")
            key = record[slice(*parts[0][1:])].decode()
            if key in found:
                raise ValueError("a name comes twice")
            lists = list(_fields(record, *parts[1][1:], set(LISTS)))
            if len(lists) > 1:
                raise ValueError("two lists in a feature")
            if lists:
                number, first, last = lists[0]
                spans = [(a, b) for _, a, b in _fields(record, first, last, {1})]
                if number == 3:
                    spans = [span for packed in spans for span in _varints(record, *packed)]
                found[key] = (LISTS[number], spans)
    return found


def _fields(
    record: bytes, first: int, last: int, known: set[int]
) -> Iterator[tuple[int, int, int]]:
    """Give number, beginning and end of the fields of a message, which are messages or bytes."""
    while first < last:
        tag = record[first]
        if tag & 7 != BYTES or tag >> 3 not in known:
            raise ValueError("an unknown field")
        place = first + 1
        first = _end_of_varint(record, place, last)
        length = sum((record[i] & 0x7F) << 7 * (i - place) for i in range(place, first))
        if first + length > last:
            raise ValueError("a field ends after its message")
        yield tag >> 3, first, first + length
        first += length


def _varints(record: bytes, first: int, last: int) -> Iterator[Span]:
    """Give beginning and end of each integer."""
    while first < last:
        end = _end_of_varint(record, first, last)
        yield first, end
        first = end


def _end_of_varint(record: bytes, first: int, last: int) -> int:
    end = first + 1
    while record[end - 1] & 0x80:
        end += 1
    if end > last or end - first > 10:
        raise ValueError("an integer is cut off, or longer than 64 bits")
    return end
