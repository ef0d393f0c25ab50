"""Makes batches, each a pure function of seed, epoch and step, so that a source has no state."""

import hashlib
import inspect
import logging
import operator
import os
import pickle
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from types import ModuleType, SimpleNamespace
from typing import Any, Protocol

import numpy as np

from engine.processes import Processes

log = logging.getLogger(__name__)

Array = np.ndarray
Arrays = tuple[Array, Array]
# Each use of randomness has a stream of its own, so that switching one on leaves the others alone.
SHUFFLE_STREAM, AUGMENT_STREAM = 0, 1
DRAWS_PER_EXAMPLE = 4
UNKNOWN, ENDLESS = -2, -1  # cardinalities of tf.data
MOST_BATCHES, READ_AHEAD = 1_000_000, 8  # that are counted, that are read ahead
SECONDS_TO_COMPARE = 60.0
PARTS = ("x", "y", "sample_weight")  # of a batch that is a tuple
IN_ORDER = 256  # examples at a time, of arrays in memory that are validated or tested on
DIGESTED_WHOLE, DIGESTED_ROWS = 2**30, 1000  # bytes in memory; rows of larger arrays, and of files


class BatchSource(Protocol):
    """What the training loop needs to know of its training data."""

    @property
    def steps_per_epoch(self) -> int:
        """Number of batches in an epoch, at least 1."""

    def batch(self, epoch: int, step: int) -> Any:
        """Return the batch at `step` of `epoch`, both from 0, as `fit` takes it: x, (x, y) or
        (x, y, sample_weight), each an array or nested dicts, lists and tuples of arrays."""


def random_generator(seed: int, epoch: int, stream: int) -> np.random.Generator:
    """Return a generator that depends on nothing but its arguments, and overlaps with no other:
    seed and epoch are the key of Philox (Salmon et al., 2011), the stream is its counter."""
    return np.random.Generator(np.random.Philox(key=[seed, epoch], counter=[0, 0, 0, stream]))


def require_at_least(least: int, **values: int) -> None:
    """Raise a ValueError that names the first of the values that is below `least`."""
    for name, value in values.items():
        if value < least:
            raise ValueError(f"{name} is {value}; it must be at least {least}")


class Ahead:
    """Calls a function in `workers` threads, ahead of time for what will be wanted next."""

    def __init__(self, function: Callable[..., Any], name: str, workers: int = 1) -> None:
        self._function = function
        self._executor = ThreadPoolExecutor(max_workers=workers, thread_name_prefix=name)
        self._pending: dict[tuple[Any, ...], Future[Any]] = {}

    def take(self, wanted: tuple[Any, ...], *following: tuple[Any, ...]) -> Any:
        """Return what the function returns for `wanted`, and begin with what follows."""
        if wanted not in self._pending:
            self.forget()
        for arguments in (wanted, *following):
            if arguments not in self._pending:
                self._pending[arguments] = self._executor.submit(self._function, *arguments)
        return self._pending.pop(wanted).result()

    def forget(self) -> None:
        """Forget what was begun."""
        for future in self._pending.values():
            future.cancel()
        self._pending.clear()


@dataclass(eq=False, repr=False)
class ArrayBatches:
    """Batches of arrays in memory; every example comes exactly once an epoch.

    Raises ValueError if the arrays differ in length, or a number is out of range."""

    # An array (num_examples, ...), or nested dicts, lists and tuples of arrays. A DataFrame
    # is its rows, or, if not all are numbers, a dict of columns; a Series is (num_examples, 1).
    features: Any
    labels: Any = None  # the same; None: there are none
    batch_size: int = IN_ORDER  # the last batch of an epoch may be smaller
    seed: int = 0  # order and augmentation are functions of it
    prepare: Callable[[Any], Any] | None = None  # from raw features to what the model is given
    # From raw features (batch, ...) and float64 random numbers in [0, 1) of shape (batch, 4), which
    # depend on seed, epoch and example only, to augmented features.
    augment: Callable[[Any, Array], Any] | None = None
    sample_weight: Any = None
    shuffle: bool = True  # whether each epoch has an order of its own

    def __post_init__(self) -> None:
        require_at_least(1, batch_size=self.batch_size)
        require_at_least(0, seed=self.seed)
        parts = _map(_in_memory, (self.features, self.labels, self.sample_weight))
        self.features, self.labels, self.sample_weight = parts
        self._num_examples = _length_of(parts)
        self._epoch: int | None = None
        self._order = np.arange(len(self))
        self._draws = np.empty((0, DRAWS_PER_EXAMPLE))

    def __len__(self) -> int:
        return self._num_examples

    @property
    def steps_per_epoch(self) -> int:
        """Number of batches in an epoch, the last and perhaps smaller one included."""
        return -(-len(self) // self.batch_size)

    def batch(self, epoch: int, step: int) -> Any:
        """Return the batch at `step` of `epoch`, see `BatchSource`; IndexError if there is none."""
        if not 0 <= step < self.steps_per_epoch:
            raise IndexError(f"step {step} of an epoch with {self.steps_per_epoch} steps")
        if epoch != self._epoch:  # cached, as functions of seed and epoch
            if self.shuffle:
                generator = random_generator(self.seed, epoch, SHUFFLE_STREAM)
                self._order = generator.permutation(len(self))
            if self.augment:
                generator = random_generator(self.seed, epoch, AUGMENT_STREAM)
                self._draws = generator.random((len(self), DRAWS_PER_EXAMPLE))
            self._epoch = epoch
        # A slice of what is not shuffled copies nothing.
        part = slice(step * self.batch_size, (step + 1) * self.batch_size)
        rows = self._order[part] if self.shuffle else part
        of_all = (self.features, self.labels, self.sample_weight)
        features, labels, weights = _map(lambda array: array[rows], of_all)
        if self.augment:
            features = self.augment(features, self._draws[rows])
        if self.prepare:
            features = self.prepare(features)
        parts: Any = (features, labels) if weights is None else (features, labels, weights)
        if labels is None and weights is None:
            # As `fit` packs them: a model's own step is given x itself.
            parts = (features,) if isinstance(features, tuple | list) else features
        return _map(_as_fit, parts)


class FunctionBatches:
    """Batches of an iterable, such as a `tf.data.Dataset`, that a function of the epoch returns; it
    may be one that `is_the_same` in every epoch. A resume skips the batches that were seen."""

    def __init__(self, open_epoch: Callable[[int], Iterable], is_the_same: bool = False) -> None:
        self.open_epoch, self.is_the_same = open_epoch, is_the_same
        self.element_spec: Any = None  # of tf.data: which dimensions may vary
        self._first: dict[int, Any] = {}  # steps of epoch 0 that are asked for before all others
        self._next: tuple[int, int] | None = None
        self._is_longer = False  # than the first: an epoch, and that was said
        self._iterator: Iterator[Any] = iter(())
        self.ahead = Ahead(self._read, "data")

    @cached_property
    def steps_per_epoch(self) -> int:
        """Number of batches of an epoch, which is read to its end if it does not say how many."""
        # Reading past an end that was not foreseen makes Keras count a step without data.
        number = self._cardinality()
        if number == UNKNOWN:
            log.info("the data does not say how many batches an epoch has: the first is counted")
            number = sum(1 for _ in islice(self.open_epoch(0), MOST_BATCHES + 1))
        if number == ENDLESS or number > MOST_BATCHES:
            hint = "cut it by take(steps)"
            raise ValueError(f"the data has no end, or more than a million batches; {hint}")
        if not number:
            raise ValueError("the data has no batches; expected at least one per epoch")
        return number

    def _cardinality(self) -> int:
        opened = self.open_epoch(0)
        return int(opened.cardinality()) if hasattr(opened, "cardinality") else UNKNOWN

    def settle(self, steps_per_epoch: int | None) -> None:
        """Count the batches, unless an earlier attempt at the run has done so. If all passes are to
        be the same, compare two, for a minute at most; ValueError if they differ."""
        if steps_per_epoch is not None:
            if self._cardinality() == UNKNOWN:
                self.steps_per_epoch = steps_per_epoch
            return
        # Counted first: an end that is missing is refused before endless passes are compared.
        start, number, steps = time.monotonic(), 0, self.steps_per_epoch
        passes = [self.open_epoch(0), self.open_epoch(0)] if self.is_the_same else [(), ()]
        for first, second in zip(*passes, strict=False):
            if _digest(first) != _digest(second):
                raise ValueError(
                    "two passes over the tf.data.Dataset differ, so that a resumed run could not "
                    "go on where it was; give a function (epoch, seed) -> tf.data.Dataset instead, "
                    "which passes the seed to shuffle() and to every random operation"
                )
            number += 1
            if time.monotonic() - start > SECONDS_TO_COMPARE:
                break
        if (seconds := time.monotonic() - start) > 1:
            agree = f"it has {steps} batches, and two passes agree in {number} of them"
            log.info(f"read the tf.data.Dataset for {seconds:.0f} s, once in a run: {agree}")

    def batch(self, epoch: int, step: int) -> Any:
        """Return the batch at `step` of `epoch`; those that follow are read meanwhile."""
        epoch = 0 if self.is_the_same else epoch
        if epoch == 0 and step in self._first:
            return self._first[step]
        following = []
        if steps := vars(self).get("steps_per_epoch"):  # it is known already
            next_one = epoch * steps + step + 1
            places = (divmod(n, steps) for n in range(next_one, next_one + READ_AHEAD))
            following = [(0 if self.is_the_same else e, s) for e, s in places]
        batch = self.ahead.take((epoch, step), *following)
        if epoch == 0 and step < 2:  # what a run looks at before it begins
            self._first[step] = batch
        return batch

    def _read(self, epoch: int, step: int) -> Any:
        if self._next != (epoch, step):
            # As long as another is there, an iterator of tf.data may wait a minute as it goes.
            self._iterator = iter(())
            opened = self.open_epoch(epoch)
            self.element_spec = getattr(opened, "element_spec", None)
            # tf.data skips without handing the batches to Python.
            skipped = opened.skip(step) if hasattr(opened, "skip") else islice(opened, step, None)
            self._iterator = iter(skipped)
        try:
            batch = next(self._iterator)
        except StopIteration:
            which = "a later pass over" if self.is_the_same else f"epoch {epoch + 1} of"
            expected = f"expected {self.steps_per_epoch}, as in the first"
            raise ValueError(f"{which} the data ends after {step} batches; {expected}") from None
        self._next = (epoch, step + 1)
        is_last = not self.is_the_same and step + 1 == vars(self).get("steps_per_epoch")
        if is_last and next(self._iterator, None) is not None and not self._is_longer:
            self._is_longer = True
            first = f"the first, which has {step + 1}; the rest of it is left out"
            log.warning(f"epoch {epoch + 1} of the data has more batches than {first}")
        return batch


class PyDatasetBatches:
    """Batches of a `keras.utils.PyDataset`, or what has its methods, by as many workers as it says.
    As Keras would, it calls `on_epoch_begin` and `on_epoch_end` for each epoch."""

    def __init__(self, dataset: Any, seed: int, shuffle: bool = True) -> None:
        number = dataset.num_batches if hasattr(dataset, "num_batches") else len(dataset)
        if not number:
            what = "has no end" if number is None else "has no batches"
            raise ValueError(f"{type(dataset).__name__} {what}; expected a length of at least 1")
        self.dataset, self.seed, self.shuffle = dataset, seed, shuffle
        self.steps_per_epoch, self._epoch = number, -1
        self._order = np.arange(number)
        workers = getattr(dataset, "workers", 1)
        in_processes = getattr(dataset, "use_multiprocessing", False) and workers > 0
        remedy = "set its use_multiprocessing to False"
        self._processes = Processes(dataset, workers, remedy) if in_processes else None
        is_ahead = workers > 1 or in_processes
        self.ahead = Ahead(self._item, "PyDataset", workers) if is_ahead else None
        self._num_ahead = max(getattr(dataset, "max_queue_size", 10), workers)

    def batch(self, epoch: int, step: int) -> Any:
        """Return the batch at `step` of `epoch`."""
        if epoch < self._epoch:
            raise ValueError("a PyDataset cannot go back to an earlier epoch")
        while self._epoch < epoch:
            if self._epoch >= 0:
                self.dataset.on_epoch_end()
            self._epoch += 1
            if hasattr(self.dataset, "on_epoch_begin"):  # any object with the other methods will do
                self.dataset.on_epoch_begin()
            if self.shuffle:
                generator = random_generator(self.seed, self._epoch, SHUFFLE_STREAM)
                self._order = generator.permutation(self.steps_per_epoch)
            if self._processes is not None and self._epoch == epoch:
                self._processes.renew()
        if self.ahead is None:
            return self._item(epoch, step)
        last = min(step + self._num_ahead, self.steps_per_epoch)
        return self.ahead.take((epoch, step), *((epoch, each) for each in range(step + 1, last)))

    def _item(self, epoch: int, step: int) -> Any:
        index = int(self._order[step])
        if self._processes is not None:
            return self._processes.call(operator.getitem, index)
        return self.dataset[index]


def batch_source(
    data: Any, batch_size: int = IN_ORDER, seed: int = 0, shuffle: bool = True, name: str = ""
) -> BatchSource:
    """Return whatever `fit` takes as a batch source; `name` stands in a TypeError or ValueError.

    It is arrays x, (x, y) or (x, y, sample_weight), each perhaps nested in dicts, lists and tuples,
    DataFrames and their columns too; a `tf.data.Dataset` of batches that gives the same ones at
    every pass; a function `(epoch, seed) -> tf.data.Dataset` or a generator function of the epoch;
    a `keras.utils.PyDataset`; an object with `batch(epoch, step)`, and a length or
    `steps_per_epoch`. Batch size, seed and shuffle are for what does not decide them itself."""
    try:
        if hasattr(data, "batch") and hasattr(data, "steps_per_epoch"):
            return data
        if hasattr(data, "element_spec"):  # a tf.data.Dataset
            return FunctionBatches(lambda epoch: data, is_the_same=True)
        if hasattr(data, "batch") and hasattr(data, "__len__"):
            return SimpleNamespace(batch=data.batch, steps_per_epoch=len(data))
        if hasattr(data, "__getitem__") and hasattr(data, "on_epoch_end"):
            return PyDatasetBatches(data, seed, shuffle)
        if callable(data):
            number = len(inspect.signature(data).parameters)
            if number in (1, 2):
                return FunctionBatches(lambda epoch: data(*(epoch, seed)[:number]))
        elif data is not None:
            parts = data if isinstance(data, tuple) else (data,)
            if len(parts) > len(PARTS) or (parts and parts[0] is None):
                given = ", ".join(type(part).__name__ for part in parts)
                expected = "expected x, (x, y) or (x, y, sample_weight)"
                raise ValueError(f"the data is a tuple of {given}; {expected}")
            x, y, weight = (*parts, None, None)[:3]
            return ArrayBatches(x, y, batch_size, seed, sample_weight=weight, shuffle=shuffle)
        raise TypeError(
            f"the data is a {type(data).__name__}; expected arrays, an object with batch(epoch, "
            "step) and a length, a tf.data.Dataset, a PyDataset, a function (epoch, seed) -> "
            "tf.data.Dataset, or a generator function of the epoch"
        )
    except (ValueError, TypeError) as error:
        raise type(error)(f"{name}: {error}" if name else str(error)) from error


def require_labels_in_classes(num_classes: int, *sources: Any) -> None:
    """Raise ValueError if integer labels of sources, one an example, are not in their classes."""
    for source in (each for each in sources if each is not None):
        all_of_them = getattr(source, "labels", None)
        labels = parts_of(source.batch(0, 0)).get("y") if all_of_them is None else all_of_them
        if not hasattr(labels, "shape"):
            continue  # there are none, or several
        array = np.asarray(labels)
        if array.dtype.kind in "iu" and array.size == len(array):
            low, high = array.min(), array.max()
            if low < 0 or high >= num_classes:
                expected = f"expected integers in [0, {num_classes})"
                raise ValueError(f"the labels are from {low} to {high}; {expected}")


def parts_of(batch: Any) -> dict[str, Any]:
    """Return x, y and sample_weight of a batch by these names, as far as it has them."""
    parts = tuple(batch) if isinstance(batch, tuple) else (batch,)
    return {name: part for name, part in zip(PARTS, parts, strict=False) if part is not None}


def shapes_of(batch: Any) -> str:
    """Return dtype and shape of all that is in a batch, such as "x: float32 (32, 8, 8, 1)"."""
    return ", ".join(
        f"{'/'.join((name, *map(str, path)))}: {np.asarray(leaf).dtype} {np.shape(leaf)}"
        for name, part in parts_of(batch).items()
        for path, leaf in _tree().flatten_with_path(part)
    )


def digest(*sources: Any) -> str:
    """Return a SHA-256 of data; of large arrays and other sources, a part stands for all."""
    sha256 = hashlib.sha256(str(sources[0].steps_per_epoch).encode())
    for source in sources:
        if hasattr(source, "digest"):
            sha256.update(source.digest().encode())
        elif isinstance(source, ArrayBatches):
            arrays = _leaves((source.features, source.labels, source.sample_weight))
            is_whole = sum(array.nbytes for array in arrays) <= DIGESTED_WHOLE
            for array in arrays:
                add_to_digest(sha256, array if is_whole else _some_rows(sha256, array))
        elif source is not None:
            for array in _leaves(source.batch(0, 0)):
                add_to_digest(sha256, array)
    return sha256.hexdigest()


def _map(function: Callable[[Any], Any], nested: Any) -> Any:
    """Call a function with each array; None, for a part that is not there, stays None."""
    return _tree().map_structure(lambda leaf: None if leaf is None else function(leaf), nested)


def _leaves(nested: Any) -> list[Array]:
    return [np.asanyarray(leaf) for leaf in _tree().flatten(nested) if leaf is not None]


def _tree() -> ModuleType:
    from keras import tree

    return tree


def _in_memory(leaf: Any) -> Any:
    """Return what `fit` takes for an array as one; see `ArrayBatches`."""
    if not hasattr(leaf, "to_numpy"):  # not of pandas
        return np.asanyarray(leaf)
    if leaf.ndim == 1:
        return leaf.to_numpy()[:, np.newaxis]
    array = leaf.to_numpy()
    return array if array.dtype != object else {str(n): _in_memory(leaf[n]) for n in leaf}


def _as_fit(array: Array) -> Array:
    """Return numbers in the precision of the model's weights, which `fit` casts arrays to."""
    import keras

    if np.asarray(array).dtype.kind != "f":
        return array
    return np.asarray(array, keras.config.dtype_policy().variable_dtype)


def _length_of(parts: tuple[Any, ...]) -> int:
    """Return the number of examples; ValueError if it is none, or not the same everywhere."""
    lengths = {}
    for part_name, part in zip(PARTS, parts, strict=True):
        for path, leaf in _tree().flatten_with_path(part):
            if leaf is None:
                continue
            name = "/".join((part_name, *map(str, path)))
            if not np.ndim(leaf):
                raise ValueError(f"{name} is the number {leaf}; expected an array, not a list")
            lengths[name] = len(leaf)
    number = next(iter(lengths.values()), 0)
    if number == 0 or set(lengths.values()) != {number}:
        listed = ", ".join(f"{name}: {length}" for name, length in lengths.items()) or "none"
        expected = "expected the same in all, at least 1"
        raise ValueError(f"the numbers of examples are {listed}; {expected}")
    return number


def _content(array: Array) -> Any:
    """Return the bytes of an array; of one of objects, such as texts, those of each of them."""
    if not array.dtype.hasobject:
        return np.ascontiguousarray(array).data
    return b"\0".join(
        str(each).encode() if isinstance(each, str | bytes) else pickle.dumps(each)
        for each in array.reshape(-1).tolist()
    )


def _some_rows(sha256: Any, array: Array) -> Array:
    """Return rows that stand for an array that is too large to read, which may be in a file."""
    if isinstance(array, np.memmap) and array.filename is not None:
        sha256.update(str(os.stat(array.filename).st_mtime_ns).encode())
    sha256.update(str(array.shape).encode())
    return array[np.linspace(0, len(array) - 1, min(DIGESTED_ROWS, len(array))).astype(np.int64)]


def add_to_digest(sha256: Any, array: Array) -> None:
    """Add dtype, shape and content of an array."""
    sha256.update(f"{array.dtype} {array.shape}".encode())
    sha256.update(_content(array))


def _digest(batch: Any) -> bytes:
    sha256 = hashlib.sha256()
    for array in _leaves(batch):
        add_to_digest(sha256, array)
    return sha256.digest()
