"""Gives examples one at a time, as dicts, and makes batches of them.

An example may be read from a file, drawn at random or made of another dataset's. Its randomness is
a function of seed, epoch and index: the same in every process and in whatever order it is made.

Nothing here imports Keras, so that worker processes start fast."""

import inspect
import operator
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from engine.batches import Ahead, Array, ArrayBatches, require_at_least
from engine.processes import Processes
from engine.trees import Path, leaves, map_leaves

Example = dict[str, Any]
# Next to the streams of `engine.batches`; no two streams overlap.
EXAMPLE_STREAM = 2
NO_INDEX = 2**63 - 1
_generator_in_hand: ContextVar["ExampleGenerator | None"] = ContextVar("generator", default=None)


class ExampleGenerator(np.random.Generator):
    """NumPy's generator, which has the methods of `numpy.random.RandomState` besides its own."""

    def __getattr__(self, name: str) -> Any:
        return getattr(np.random.RandomState(self.bit_generator), name)


def example_generator(seed: int, epoch: int, index: int) -> ExampleGenerator:
    """Return a generator that depends on nothing but its arguments; no two of them overlap."""
    philox = np.random.Philox(key=[seed, epoch], counter=[0, 0, index, EXAMPLE_STREAM])
    return ExampleGenerator(philox)


class DatasetMixin:
    """A dataset of examples. A subclass gives `get_example` and `__len__`, or sets `self.data` to
    another dataset, and inherits from it what it does not define itself.

    `dataset[index]` is a copy of the example with its index under "index_". Functions among the
    values, nested ones too, are called and replaced by what they return: an image that is read by
    a function is only read when somebody asks for the example. `dataset[2:5]` and `dataset[[7, 3]]`
    are lists of examples, `a + b` and `3 * a` are datasets."""

    append_labels: bool = False  # put the labels of an example under "labels_"
    data: Any

    def get_example(self, index: int) -> Example:
        """Return the example at `index`, which is in [0, len(self))."""
        if not hasattr(self, "data"):
            raise TypeError(f"{type(self).__name__} has neither get_example(index) nor self.data")
        return self.data[index]

    def __len__(self) -> int:
        """Return the number of examples."""
        if not hasattr(self, "data"):
            raise TypeError(f"{type(self).__name__} has neither __len__ nor self.data")
        return len(self.data)

    @cached_property
    def labels(self) -> dict[str, Array]:
        """Arrays with one entry per example: what is known of it without loading it."""
        labels = getattr(getattr(self, "data", None), "labels", None)
        return dict(labels) if isinstance(labels, Mapping) else {}

    @property
    def prng(self) -> ExampleGenerator:
        """Generator of the example in hand: a function of seed, epoch and index; for
        `dataset[index]` that of seed 0 and epoch 0."""
        return _generator_in_hand.get() or example_generator(0, 0, NO_INDEX)

    def __getitem__(self, index: int | slice | Sequence[int] | Array) -> Any:
        """Return the example at `index`, or the list of those at the indices of a slice or list."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if isinstance(index, (Sequence, np.ndarray)):
            return [self[operator.index(i)] for i in index]
        length, kind = len(self), type(self).__name__
        if not -length <= index < length:
            raise IndexError(f"index {index} of {kind} with {length} examples")
        index = operator.index(index) % length
        token = _generator_in_hand.set(_generator_in_hand.get() or example_generator(0, 0, index))
        try:
            example = self.get_example(index)
            if not isinstance(example, dict):
                given = type(example).__name__
                raise TypeError(f"{kind} gave a {given} as an example; expected a dict")
            example = _load(example) | {"index_": index}
            if self.append_labels:
                example["labels_"] = _labels_at(self.labels, index)
            return example
        finally:
            _generator_in_hand.reset(token)

    def __iter__(self) -> Iterator[Example]:
        # Without it, Python would take an IndexError in get_example for the end.
        return (self[index] for index in range(len(self)))

    def __add__(self, other: "DatasetMixin") -> "ConcatenatedDataset":
        return ConcatenatedDataset(self, other)

    def __mul__(self, times: int) -> "ConcatenatedDataset":
        return ConcatenatedDataset(*[self] * times)

    __rmul__ = __mul__


class SubDataset(DatasetMixin):
    """The examples of `data` at `subindices`, as often and in the order as these come."""

    def __init__(self, data: DatasetMixin, subindices: Iterable[int]) -> None:
        self.data = data
        self.subindices = np.array([operator.index(i) for i in subindices], np.int64)
        outside = (self.subindices < 0) | (self.subindices >= len(data))
        if outside.any():
            first = self.subindices[outside][0]
            raise IndexError(f"subindex {first} of a dataset with {len(data)} examples")

    def __len__(self) -> int:
        return len(self.subindices)

    def get_example(self, index: int) -> Example:
        return self.data[int(self.subindices[index])]

    @cached_property
    def labels(self) -> dict[str, Array]:
        labels = self.data.labels.items()
        return {key: np.asarray(values)[self.subindices] for key, values in labels}


class ConcatenatedDataset(DatasetMixin):
    """One dataset after the other; if `balanced`, the shorter ones are repeated."""

    def __init__(self, *datasets: DatasetMixin, balanced: bool = False) -> None:
        if not datasets:
            raise ValueError("there are no datasets to concatenate; expected at least one")
        self.datasets = list(datasets)
        longest = max(map(len, datasets))
        if balanced and longest:
            if not all(map(len, datasets)):
                raise ValueError("an empty dataset cannot be repeated to balance the others")
            self.datasets = [SubDataset(data, np.arange(longest) % len(data)) for data in datasets]
        self._ends = np.cumsum([len(data) for data in self.datasets])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def get_example(self, index: int) -> Example:
        which = int(np.searchsorted(self._ends, index, side="right"))
        # From its end, as its negative indices count.
        return self.datasets[which][index - int(self._ends[which])]

    @cached_property
    def labels(self) -> dict[str, Array]:
        """The labels that all the datasets have."""
        every = [data.labels for data in self.datasets]
        shared = [key for key in every[0] if all(key in labels for labels in every)]
        return {key: np.concatenate([labels[key] for labels in every]) for key in shared}


class CsvDataset(DatasetMixin):
    """The rows of a CSV file: its columns are the labels, a row is an example. In the config,
    `csv_path` is the file, `csv_arguments` (optional) are for `pandas.read_csv`."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        import pandas as pd

        if "csv_path" not in config:
            raise ValueError("the config of a CsvDataset needs the key csv_path, a file's path")
        table = pd.read_csv(config["csv_path"], **config.get("csv_arguments") or {})
        self._num_rows = len(table)
        self.labels = {str(key): _as_array(column) for key, column in table.items()}

    def __len__(self) -> int:
        return self._num_rows

    def get_example(self, index: int) -> Example:
        return _labels_at(self.labels, index)


@dataclass(eq=False)
class LabelDataset(DatasetMixin):
    """The labels of `data` as examples; the examples themselves are not loaded."""

    data: DatasetMixin

    def get_example(self, index: int) -> Example:
        return _labels_at(self.labels, index)


class ExtraLabelsDataset(DatasetMixin):
    """`data` with further labels, which `labeler(data, index)` returns as a dict."""

    append_labels = True

    def __init__(
        self, data: DatasetMixin, labeler: Callable[[DatasetMixin, int], Mapping[str, Any]]
    ) -> None:
        self.data = data
        # The labeler is not kept: it may be a lambda, which could not go to a worker process.
        given = (labeler(data, index) for index in range(len(data)))
        extra = [{key: np.asarray(value) for key, value in each.items()} for each in given]
        self.labels = data.labels | (stack(extra) if extra else {})


@dataclass(eq=False)
class ProcessedDataset(DatasetMixin):
    """`data` with `process(**example)` merged into each example, or, without `update`, instead."""

    data: DatasetMixin
    process: Callable[..., Example]
    update: bool = True

    def get_example(self, index: int) -> Example:
        example = self.data[index]
        if "index_" not in inspect.signature(self.process).parameters:  # it may ask for it
            del example["index_"]
        processed = self.process(**example)
        return example | processed if self.update else processed


def make_examples(
    dataset: DatasetMixin, indices: Iterable[int], seed: int, epoch: int
) -> list[Example]:
    """Return the examples at `indices`; each is a function of seed, epoch and its index. So is what
    it draws from Python's and NumPy's global generators, which are left as they were."""
    states = random.getstate(), np.random.get_state()
    token = _generator_in_hand.set(None)
    examples = []
    try:
        for index in map(int, indices):
            generator = example_generator(seed, epoch, index)
            random.seed(int(generator.integers(2**32)))
            np.random.seed(int(generator.integers(2**32)))
            _generator_in_hand.set(generator)
            try:
                examples.append(dataset[index])
            except Exception as error:
                what = f"example {index} of {type(dataset).__name__}: {type(error).__name__}"
                raise RuntimeError(f"{what}: {error}") from error
        return examples
    finally:
        _generator_in_hand.reset(token)
        random.setstate(states[0])
        np.random.set_state(states[1])


def stack(examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return one dict of the leaves of the examples, stacked into arrays; tuples become lists."""
    if not examples:
        raise ValueError("there are no examples to stack; expected at least one")
    columns: dict[Path, list[Any]] = {}
    for example in examples:
        for path, value in leaves(example):
            columns.setdefault(path, []).append(value)
    arrays = iter([_stacked(path, values, len(examples)) for path, values in columns.items()])
    return map_leaves(examples[0], lambda _: next(arrays))


class ExampleBatches:
    """Batches of a dataset's examples: a batch source.

    A batch is the stacked dict of its examples, see `stack`. Every example comes once an epoch.

    Args:
        dataset: the examples.
        batch_size: examples per batch, at least 1; the last batch of an epoch may be smaller.
        seed: decides the order, a new one every epoch if `shuffle`, and what examples draw.
        num_workers: processes that make the examples; 0: this one does. The batches are the same.
            The dataset is pickled for the workers, once: changes after the first batch do not
            reach them. A script that is run with workers needs `if __name__ == "__main__"`.
        max_batches: an epoch ends after N batches, at least 1; None: with the examples."""

    def __init__(
        self,
        dataset: DatasetMixin,
        batch_size: int,
        seed: int,
        shuffle: bool = True,
        num_workers: int = 0,
        max_batches: int | None = None,
    ) -> None:
        if len(dataset) == 0:
            raise ValueError(f"{type(dataset).__name__} has no examples; expected at least one")
        indices = np.arange(len(dataset))
        self._all = ArrayBatches(indices, batch_size=batch_size, seed=seed, shuffle=shuffle)
        require_at_least(1, max_batches=1 if max_batches is None else max_batches)
        require_at_least(0, num_workers=num_workers)
        self.dataset, self.batch_size, self.seed = dataset, batch_size, seed
        self.shuffle, self.num_workers = shuffle, num_workers
        self.steps_per_epoch = min(self._all.steps_per_epoch, max_batches or len(dataset))
        self._processes = Processes(dataset, num_workers, "set n_data_processes to 0")
        self._ahead = Ahead(self._part, "examples", max(2 * num_workers, 1))

    def batch(self, epoch: int, step: int) -> dict[str, Any]:
        """Return the batch at `step` of `epoch`, both counted from 0."""
        if not 0 <= step < self.steps_per_epoch:
            raise IndexError(f"step {step} of an epoch with {self.steps_per_epoch} steps")
        if not self.num_workers:
            indices = self._all.batch(epoch, step)
            return stack(make_examples(self.dataset, indices, self.seed, epoch))
        # The workers make the next batch while the model learns from this one.
        following = divmod(epoch * self.steps_per_epoch + step + 1, self.steps_per_epoch)
        parts = self._parts(epoch, step)
        more = self._parts(*following) if self.shuffle or following[0] == epoch else []
        examples = []
        for number, part in enumerate(parts):
            examples += self._ahead.take(part, *parts[number + 1 :], *more)
        return stack(examples)

    def close(self) -> None:
        """End the worker processes; a batch that is asked for later starts new ones."""
        self._ahead.forget()
        self._processes.close()

    def _parts(self, epoch: int, step: int) -> list[tuple[Any, ...]]:
        """Return epoch and indices of what each of the workers makes of a batch."""
        indices = self._all.batch(epoch, step)
        parts = np.array_split(indices, min(self.num_workers, len(indices)))
        return [(epoch, *part.tolist()) for part in parts]

    def _part(self, epoch: int, *indices: int) -> list[Example]:
        return self._processes.call(make_examples, indices, self.seed, epoch)


def _load(value: Any) -> Any:
    """Copy nested dicts and lists and call the functions in them."""
    return map_leaves(value, lambda leaf: _load(leaf()) if callable(leaf) else leaf)


def _labels_at(labels: Mapping[str, Any], index: int) -> Example:
    return {
        key: _labels_at(values, index) if isinstance(values, Mapping) else values[index]
        for key, values in labels.items()
    }


def _as_array(column: Any) -> Array:
    """Return a column of a table; text as unicode, unless some of it is missing."""
    array = column.to_numpy()
    is_text = array.dtype == object and all(isinstance(entry, str) for entry in array)
    return array.astype(np.str_) if is_text else array


def _stacked(path: Path, values: Sequence[Any], number: int) -> Array:
    name, arrays = "/".join(map(str, path)), [np.asarray(value) for value in values]
    if len(arrays) < number:
        raise ValueError(f"'{name}' is in some of the examples, but not in all")
    for value, array in zip(values, arrays, strict=True):
        if array.dtype == object:
            kind = type(value).__name__
            raise ValueError(f"'{name}' is a {kind} in one of the examples; it cannot be stacked")
    if len(shapes := sorted({array.shape for array in arrays})) > 1:
        listed = " and ".join(map(str, shapes))
        raise ValueError(f"'{name}' has the shapes {listed}; examples must have the same")
    if len({array.dtype.kind in "SU" for array in arrays}) > 1:
        raise ValueError(f"'{name}' is text in some of the examples, but not in all")
    return np.stack(arrays)
