"""A batch is a function of seed, epoch and step alone, whatever it is read from."""

from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from engine.batches import ArrayBatches, batch_source
from src.data import flip, shift


def test_an_epoch_holds_every_example_once_in_an_order_of_its_own() -> None:
    numbers = np.arange(10)
    source = ArrayBatches(numbers, numbers, batch_size=4, seed=0)
    epochs = [
        [int(label) for step in range(3) for label in source.batch(epoch, step)[1]]
        for epoch in range(2)
    ]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(10))
    assert epochs[0] != epochs[1]


def test_augmentation_belongs_to_the_example_not_to_its_batch() -> None:
    images = np.arange(6 * 8 * 8, dtype=np.float32).reshape(6, 8, 8, 1)

    def augmented(batch_size: int) -> dict[int, bytes]:
        source = ArrayBatches(
            images,
            np.arange(6),
            batch_size,
            seed=0,
            augment=lambda images, draws: flip(shift(images, draws, most=2), draws),
        )
        batches = [source.batch(0, step) for step in range(source.steps_per_epoch)]
        return {
            int(label): image.tobytes()
            for features, labels in batches
            for image, label in zip(features, labels, strict=True)
        }

    assert augmented(batch_size=6) == augmented(batch_size=4)


@pytest.mark.parametrize("values", [{"batch_size": 0}, {"seed": -1}, {"features": np.arange(3)}])
def test_batches_refuse_what_makes_no_sense(values: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {"features": np.arange(4), "batch_size": 2, "seed": 0}
    with pytest.raises(ValueError, match=r"at least"):
        ArrayBatches(labels=np.arange(4), **arguments | values)


class Numbers(keras.utils.PyDataset):
    """Two examples a batch, in an order that is its own."""

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        return np.array([2 * index, 2 * index + 1]), np.array([index, index])


def shuffled(epoch: int, seed: int) -> tf.data.Dataset:
    numbers = tf.data.Dataset.range(10).shuffle(10, seed=seed + epoch)
    return numbers.map(lambda number: (number, number)).batch(2)


def generated(epoch: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for step in range(5):
        yield np.array([epoch, step]), np.array([epoch, step])


class Indexed:
    def __len__(self) -> int:
        return 5

    def batch(self, epoch: int, step: int) -> tuple[np.ndarray, np.ndarray]:
        return np.array([epoch, step]), np.array([epoch, step])


SOURCES: dict[str, Any] = {
    "PyDataset": Numbers,
    "function to tf.data": lambda: shuffled,
    "generator function": lambda: generated,
    "batch and length": Indexed,
    "tf.data": lambda: tf.data.Dataset.range(10).map(lambda number: (number, number)).batch(2),
}


@pytest.mark.parametrize("make", SOURCES.values(), ids=SOURCES)
def test_any_source_gives_the_same_batch_at_the_same_place(make: Any) -> None:
    straight, jumping = batch_source(make(), seed=0), batch_source(make(), seed=0)
    assert straight.steps_per_epoch == 5
    batches = {
        (epoch, step): straight.batch(epoch, step) for epoch in range(2) for step in range(5)
    }
    for place in ((0, 3), (1, 0), (1, 4)):
        for one, other in zip(batches[place], jumping.batch(*place), strict=True):
            assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


def test_what_is_no_source_is_refused() -> None:
    with pytest.raises(ValueError, match=r"two passes over the tf.data.Dataset differ"):
        batch_source(tf.data.Dataset.range(100).shuffle(100), seed=0)
    with pytest.raises(TypeError, match="training data is a list"):
        batch_source([1, 2, 3], seed=0)


def test_an_epoch_that_ends_early_is_named() -> None:
    source = batch_source(lambda epoch: iter([(np.zeros(1),)] * (3 - epoch)), seed=0)
    source.batch(1, 1)
    with pytest.raises(ValueError, match="epoch 2 of the data ends after 2 batches; expected 3"):
        source.batch(1, 2)
