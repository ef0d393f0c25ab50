"""Feeds batches from arrays and tables in memory."""

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from engine.batches import Array
from engine.records.feeders import Feeder
from engine.trees import map_leaves


class MemorySamplesFeeder(Feeder):
    """Batches of samples in memory.

    Raises ValueError if first dimensions differ, a dict is not to be fed as one, or batch size or
    seed is out of range.

    Args:
        x: features: an array, list, DataFrame, Series, dict of them, or list of dicts.
        y: labels, of the same kinds, or None: batches are features only.
        feed_as_dict: batches are dicts: by the names of columns, or, for what has none, by the
            numbers of its columns ("0", "1", ...; an array of more than 2 dimensions is one
            column). False: batches are arrays.
        batch_size, drop_remainder, shuffle, seed: as for `Feeder`.
    """

    def __init__(
        self,
        x: Any,
        y: Any = None,
        feed_as_dict: bool = True,
        batch_size: int = 128,
        drop_remainder: bool = False,
        shuffle: bool = True,
        seed: int = 0,
    ) -> None:
        self.x = _columns(x, "x", feed_as_dict)
        self.y = None if y is None else _columns(y, "y", feed_as_dict)
        (first, array), *others = self._arrays()
        num_samples = len(array)
        for name, other in others:
            if len(other) != num_samples:
                raise ValueError(
                    f"{first} has {num_samples} samples and {name} has {len(other)}; expected as "
                    "many"
                )
        super().__init__(num_samples, batch_size, drop_remainder, shuffle, seed)

    def digest(self) -> str:
        """Return a SHA-256 (hex) of the samples, to the last byte, and the options."""
        sha256 = hashlib.sha256(self._options().encode())
        for name, array in self._arrays():
            sha256.update(f"{name} {array.dtype} {array.shape}".encode())
            is_object = array.dtype.hasobject
            sha256.update(
                repr(array.tolist()).encode() if is_object else np.ascontiguousarray(array).data
            )
        return sha256.hexdigest()

    def _arrays(self) -> list[tuple[str, Array]]:
        return [*_named_arrays("x", self.x), *_named_arrays("y", self.y)]

    def _examples(self, first: int, last: int) -> Any:
        rows = self._rows(first, last)
        x, y = map_leaves((self.x, self.y), lambda array: None if array is None else array[rows])
        return x if y is None else (x, y)


def _columns(values: Any, name: str, feed_as_dict: bool) -> Any:
    columns: Any = values
    if isinstance(values, list) and values and all(isinstance(row, Mapping) for row in values):
        keys = list(values[0])
        if any(list(row) != keys for row in values):
            raise ValueError(f"the dicts of {name} have different keys; expected {keys} in each")
        columns = {key: [row[key] for row in values] for key in keys}
    elif hasattr(values, "columns"):  # a DataFrame
        columns = {key: values[key] for key in values.columns}
    elif not isinstance(values, Mapping):
        columns = np.asarray(values)
        is_named = hasattr(values, "index") and getattr(values, "name", None) is not None
        if feed_as_dict and is_named:  # a Series
            columns = {values.name: columns}
        elif feed_as_dict:
            columns = dict(enumerate(columns.T)) if columns.ndim == 2 else {0: columns}
    elif not feed_as_dict:
        raise ValueError(f"{name} is a dict, which feed_as_dict=False cannot make an array of")
    if isinstance(columns, Mapping):
        columns = {str(key): np.asarray(column) for key, column in columns.items()}
        if not columns:
            raise ValueError(f"{name} has no columns; expected at least one")
        if not feed_as_dict:
            columns = np.stack(list(columns.values()), axis=-1)
    for column, array in _named_arrays(name, columns):
        if array.ndim == 0 or not len(array):
            raise ValueError(f"{column} has no samples; expected at least one")
    return columns


def _named_arrays(name: str, values: Any) -> Iterator[tuple[str, Array]]:
    if isinstance(values, dict):
        yield from ((f"{name}[{key!r}]", array) for key, array in values.items())
    elif values is not None:
        yield name, values
