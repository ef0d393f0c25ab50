"""Batch sources: a batch is a pure function of seed, epoch and step.

Nothing is advanced from one batch to the next, so a source has no state to save: a run that resumes
at step 1,000 of epoch 7 asks for that batch and gets the same bits.
"""

from collections.abc import Callable
from typing import Protocol

import numpy as np

Array = np.ndarray
Arrays = tuple[Array, Array]

# Each use of randomness has a stream of its own, so that switching one on leaves the others alone.
SHUFFLE_STREAM = 0
AUGMENT_STREAM = 1
DRAWS_PER_EXAMPLE = 4


class BatchSource(Protocol):
    """What the training loop needs to know of its training data."""

    @property
    def steps_per_epoch(self) -> int:
        """Number of batches in an epoch, at least 1."""

    def batch(self, epoch: int, step: int) -> Arrays:
        """Return features and labels of `step` (from 0) in `epoch` (from 0)."""


def random_generator(seed: int, epoch: int, stream: int) -> np.random.Generator:
    """Return a generator that depends on nothing but its arguments.

    Philox is counter-based (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011):
    seed and epoch are its key and the stream its counter, so no two of them overlap.
    """
    return np.random.Generator(np.random.Philox(key=[seed, epoch], counter=[0, 0, 0, stream]))


class ArrayBatches:
    """Shuffled batches of arrays in memory; every example comes exactly once an epoch.

    Args:
        features: array of shape (num_examples, ...).
        labels: array of shape (num_examples, ...).
        batch_size: examples a batch, at least 1; the last batch of an epoch may be smaller.
        seed: order and augmentation are functions of it, at least 0.
        prepare: maps raw features of a batch to what the model is given.
        augment: maps raw features (batch, ...) and float64 random numbers in [0, 1) of shape
            (batch, 4) to augmented features. An example's numbers depend on seed, epoch and the
            example alone, not on the batch that it is in. None: no augmentation.

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
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
        if seed < 0:
            raise ValueError(f"seed is {seed}; it must be at least 0")
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
        """Return the number of examples."""
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
        """Cache what an epoch's batches share; a cache only, made anew from seed and epoch."""
        self._order = random_generator(self.seed, epoch, SHUFFLE_STREAM).permutation(len(self))
        if self.augment:
            generator = random_generator(self.seed, epoch, AUGMENT_STREAM)
            self._draws = generator.random((len(self), DRAWS_PER_EXAMPLE))
        self._epoch = epoch
