"""Batch sources: a batch is a pure function of seed, epoch and step.

Nothing is advanced from one batch to the next, so a source has no state to save: a run that resumes
at step 1,000 of epoch 7 asks for that batch and gets the same bits.
"""

import hashlib
import inspect
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from types import SimpleNamespace
from typing import Any, Protocol

import numpy as np

Array = np.ndarray
Arrays = tuple[Array, Array]
# Each use of randomness has a stream of its own, so that switching one on leaves the others alone.
SHUFFLE_STREAM = 0
AUGMENT_STREAM = 1
DRAWS_PER_EXAMPLE = 4
UNKNOWN, ENDLESS = -2, -1  # cardinalities of tf.data
MOST_BATCHES = 1_000_001


class BatchSource(Protocol):
    """What the training loop needs to know of its training data."""

    @property
    def steps_per_epoch(self) -> int:
        """Number of batches in an epoch, at least 1."""

    def batch(self, epoch: int, step: int) -> Any:
        """Return features and labels of `step` (from 0) in `epoch` (from 0)."""


def random_generator(seed: int, epoch: int, stream: int) -> np.random.Generator:
    """Return a generator that depends on nothing but its arguments.

    Philox is counter-based (Salmon et al., 2011): seed and epoch are its key and the stream its
    counter, so no two of them overlap.
    """
    return np.random.Generator(np.random.Philox(key=[seed, epoch], counter=[0, 0, 0, stream]))


def require_at_least(least: int, **values: int) -> None:
    """Raise a ValueError that names the first of the values that is below `least`."""
    for name, value in values.items():
        if value < least:
            raise ValueError(f"{name} is {value}; it must be at least {least}")


class Ahead:
    """Calls a function in a thread, and already for what will be wanted next.

    Args:
        function: never called by two threads at a time.
        name: of the thread.
    """

    def __init__(self, function: Callable[..., Any], name: str) -> None:
        self._function = function
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)
        self._pending: dict[tuple[Any, ...], Future[Any]] = {}

    def take(self, wanted: tuple[Any, ...], *following: tuple[Any, ...]) -> Any:
        """Return what the function returns for `wanted`, and begin with what follows."""
        if wanted not in self._pending:
            for future in self._pending.values():
                future.cancel()
            self._pending = {}
        for arguments in (wanted, *following):
            if arguments not in self._pending:
                self._pending[arguments] = self._executor.submit(self._function, *arguments)
        return self._pending.pop(wanted).result()

    def close(self) -> None:
        """Let the thread go."""
        self._executor.shutdown(cancel_futures=True)


class ArrayBatches:
    """Shuffled batches of arrays in memory; every example comes exactly once an epoch.

    Args:
        features: array of shape (num_examples, ...).
        labels: array of shape (num_examples, ...).
        batch_size: examples a batch, at least 1; the last batch of an epoch may be smaller.
        seed: order and augmentation are functions of it, at least 0.
        prepare: maps raw features of a batch to what the model is given.
        augment: maps raw features (batch, ...) and float64 random numbers in [0, 1) of shape
            (batch, 4), which depend on seed, epoch and example only, to augmented features.

    Raises:
        ValueError: if there are no examples, features and labels differ in length, or batch size
            or seed is out of range.
    """

    def __init__(
        self,
        features: Array,
        labels: Array,
        batch_size: int,
        seed: int,
        prepare: Callable[[Array], Array] | None = None,
        augment: Callable[[Array, Array], Array] | None = None,
    ) -> None:
        if len(features) != len(labels) or len(features) == 0:
            raise ValueError(
                f"got {len(features)} features and {len(labels)} labels; "
                "expected the same number of both, at least one"
            )
        require_at_least(1, batch_size=batch_size)
        require_at_least(0, seed=seed)
        self.features = features
        self.labels = labels
        self.batch_size = batch_size
        self.seed = seed
        self.prepare = prepare
        self.augment = augment
        self._epoch: int | None = None
        self._order = np.empty(0, dtype=np.int64)
        self._draws = np.empty((0, DRAWS_PER_EXAMPLE))

    def __len__(self) -> int:
        return len(self.features)

    @property
    def steps_per_epoch(self) -> int:
        """Number of batches in an epoch, the last and perhaps smaller one included."""
        return -(-len(self) // self.batch_size)

    def batch(self, epoch: int, step: int) -> Arrays:
        """Return features and labels of `step` in `epoch`, both counted from 0.

        Raises:
            IndexError: if the epoch has no such step.
        """
        if not 0 <= step < self.steps_per_epoch:
            raise IndexError(f"step {step} of an epoch with {self.steps_per_epoch} steps")
        if epoch != self._epoch:
            self._start_epoch(epoch)
        rows = self._order[step * self.batch_size : (step + 1) * self.batch_size]
        features = self.features[rows]
        if self.augment:
            features = self.augment(features, self._draws[rows])
        if self.prepare:
            features = self.prepare(features)
        return features, self.labels[rows]

    def _start_epoch(self, epoch: int) -> None:
        """Cache what an epoch's batches share; it is a function of seed and epoch."""
        self._order = random_generator(self.seed, epoch, SHUFFLE_STREAM).permutation(len(self))
        if self.augment:
            generator = random_generator(self.seed, epoch, AUGMENT_STREAM)
            self._draws = generator.random((len(self), DRAWS_PER_EXAMPLE))
        self._epoch = epoch


class FunctionBatches:
    """Batches of a function of the epoch, resumed by skipping what was seen already.

    Args:
        open_epoch: called with the epoch (from 0); returns an iterable of batches, such as a
            `tf.data.Dataset`: the same ones for the same epoch in every process.
        steps_per_epoch: batches in every epoch; None: the first epoch is counted once.

    Raises:
        ValueError: if an epoch holds no batches, or fewer than `steps_per_epoch`.
    """

    def __init__(
        self, open_epoch: Callable[[int], Iterable[Any]], steps_per_epoch: int | None = None
    ) -> None:
        self.open_epoch = open_epoch
        if steps_per_epoch is None:
            # Reading past an end that was not foreseen makes Keras count a step without data.
            steps_per_epoch = _number_of_batches(open_epoch(0))
        if steps_per_epoch < 1:
            raise ValueError("the data has no batches; expected at least one an epoch")
        self.steps_per_epoch = steps_per_epoch
        self._next: tuple[int, int] | None = None
        self._iterator: Iterator[Any] = iter(())

    def batch(self, epoch: int, step: int) -> Any:
        """Return the batch at `step` of `epoch`; the one that follows the last is found at once."""
        if self._next != (epoch, step):
            opened = self.open_epoch(epoch)
            # tf.data skips without handing the batches to Python.
            skipped = opened.skip(step) if hasattr(opened, "skip") else islice(opened, step, None)
            self._iterator = iter(skipped)
        try:
            batch = next(self._iterator)
        except StopIteration:
            raise ValueError(
                f"epoch {epoch + 1} of the data ends after {step} batches; "
                f"expected {self.steps_per_epoch}, as in the epochs before"
            ) from None
        self._next = (epoch, step + 1)
        import keras

        return keras.tree.map_structure(np.asarray, batch)


def _number_of_batches(opened: Iterable[Any]) -> int:
    """Return how many batches an epoch has, which only reading tells where tf.data does not know.

    Raises:
        ValueError: if there is no end to them.
    """
    number = int(opened.cardinality()) if hasattr(opened, "cardinality") else UNKNOWN
    if number == UNKNOWN:
        number = sum(1 for _ in islice(opened, MOST_BATCHES))
    if number in (ENDLESS, MOST_BATCHES):
        raise ValueError(
            "the data has no end (or more than a million batches an epoch), so there is no epoch; "
            "leave out repeat(), or cut it by take(steps)"
        )
    return number


class PyDatasetBatches:
    """Batches of a `keras.utils.PyDataset`, in an order of their own in every epoch.

    Its `on_epoch_begin` and `on_epoch_end` are called for each epoch up to the one asked for, as
    Keras would.
    """

    def __init__(self, dataset: Any, seed: int) -> None:
        if not len(dataset):
            raise ValueError("the PyDataset has no batches; expected at least one")
        self.dataset = dataset
        self.seed = seed
        self.steps_per_epoch = len(dataset)
        self._epoch = 0
        self._order: Array | None = None

    def batch(self, epoch: int, step: int) -> Any:
        """Return the batch at `step` of `epoch`."""
        if epoch < self._epoch:
            raise ValueError("a PyDataset cannot go back to an earlier epoch")
        if epoch > self._epoch or self._order is None:
            if self._order is None:
                self._begin()
            while self._epoch < epoch:
                self.dataset.on_epoch_end()
                self._epoch += 1
                self._begin()
            generator = random_generator(self.seed, epoch, SHUFFLE_STREAM)
            self._order = generator.permutation(len(self.dataset))
        return self.dataset[int(self._order[step])]

    def _begin(self) -> None:
        if hasattr(self.dataset, "on_epoch_begin"):  # any object with the other methods will do
            self.dataset.on_epoch_begin()


def batch_source(data: Any, seed: int) -> BatchSource:
    """Return `data` as a batch source.

    Args:
        data: an object with `batch(epoch, step)` and `steps_per_epoch` or a length; a
            `keras.utils.PyDataset`; a function `(epoch, seed) -> tf.data.Dataset` or a generator
            function of the epoch; a `tf.data.Dataset` that gives the same batches at every pass.
        seed: of the order, where the order is ours to choose.

    Raises:
        TypeError: if it is none of these.
        ValueError: if two passes over a `tf.data.Dataset` differ.
    """
    if hasattr(data, "batch") and hasattr(data, "steps_per_epoch"):
        return data
    import tensorflow as tf

    if isinstance(data, tf.data.Dataset):
        if int(data.cardinality()) == ENDLESS:
            return FunctionBatches(lambda epoch: data)  # which says what to do
        first, second = ([_digest(batch) for batch in data] for _ in range(2))
        if first != second:
            raise ValueError(
                "two passes over the tf.data.Dataset differ, so that a resumed run could not go "
                "on where it was; give a function (epoch, seed) -> tf.data.Dataset instead, which "
                "passes the seed to shuffle() and to every random operation"
            )
        return FunctionBatches(lambda epoch: data, len(first))
    if hasattr(data, "batch") and hasattr(data, "__len__"):
        return SimpleNamespace(batch=data.batch, steps_per_epoch=len(data))
    if hasattr(data, "__getitem__") and hasattr(data, "on_epoch_end"):
        return PyDatasetBatches(data, seed)
    if callable(data):
        number = len(inspect.signature(data).parameters)
        if number in (1, 2):
            return FunctionBatches(lambda epoch: data(*(epoch, seed)[:number]))
    raise TypeError(
        f"training data is a {type(data).__name__}; expected arrays in ArrayBatches, an object "
        "with batch(epoch, step) and a length, a PyDataset, a function (epoch, seed) -> "
        "tf.data.Dataset, or a generator function of the epoch"
    )


def digest(source: BatchSource, valid: Any) -> str:
    """Return a SHA-256 by which other data is noticed.

    A source with a method `digest()` speaks for itself. Arrays are read to the last byte; of other
    sources, the first batch has to stand for all.
    """
    sha256 = hashlib.sha256(str(source.steps_per_epoch).encode())
    parts: list[Array] = []
    data: Any
    for data in (source, valid):
        if hasattr(data, "digest"):
            sha256.update(data.digest().encode())
        elif isinstance(data, ArrayBatches):
            parts += [data.features, data.labels]
        else:
            parts += (
                _flat(data.batch(0, 0))
                if hasattr(data, "batch")
                else _flat(data if data is not None else ())
            )
    for part in parts:
        sha256.update(f"{part.dtype} {part.shape}".encode())
        sha256.update(_content(part))
    return sha256.hexdigest()


def _content(array: Array) -> Any:
    """Return the bytes of an array; of one of objects, as texts are, what each of them shows."""
    if array.dtype.hasobject:
        return "\0".join(map(repr, array.reshape(-1).tolist())).encode()
    return np.ascontiguousarray(array).data


def _flat(batch: Any) -> list[Array]:
    import tensorflow as tf

    return [np.asarray(part) for part in tf.nest.flatten(batch)]


def _digest(batch: Any) -> bytes:
    return hashlib.sha256(b"".join(bytes(_content(part)) for part in _flat(batch))).digest()
