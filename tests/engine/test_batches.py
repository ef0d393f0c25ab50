"""A batch is a function of seed, epoch and step alone, whatever it is read from."""

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pandas as pd
import pytest
import tensorflow as tf

from engine import batches
from engine.batches import ArrayBatches, FunctionBatches, batch_source, digest, shapes_of
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


@pytest.mark.parametrize(
    ("values", "refusal"),
    [
        ({"batch_size": 0}, "batch_size is 0; it must be at least 1"),
        ({"seed": -1}, "seed is -1; it must be at least 0"),
        ({"features": {"a": np.arange(3)}}, "are x/a: 3, y: 4; expected the same in all"),
        ({"features": np.arange(0), "labels": None}, "are x: 0; .*at least 1"),
        ({"features": [1, 2, 3]}, "x/0 is the number 1; expected an array"),
    ],
)
def test_batches_refuse_what_makes_no_sense(values: dict[str, Any], refusal: str) -> None:
    arguments: dict[str, Any] = {"features": np.arange(4), "labels": np.arange(4), "batch_size": 2}
    with pytest.raises(ValueError, match=refusal):
        ArrayBatches(**arguments | values)


def test_arrays_of_any_nesting_are_batches_as_fit_packs_them() -> None:
    table = pd.DataFrame({"length": [1.0, 2.0, 3.0], "width": [4.0, 5.0, 6.0]})
    features = {"table": table, "both": [table["width"], np.array(["a", "b", "c"], object)]}
    source = batch_source((features, np.arange(3), np.ones(3)), batch_size=2, shuffle=False)
    assert source.steps_per_epoch == 2
    x, y, weights = source.batch(0, 1)
    assert x["table"].tolist() == [[3, 6]]
    assert x["table"].dtype == np.float32  # `fit` casts floats, but nothing else
    assert x["both"][0].tolist() == [[6]]
    assert x["both"][1].tolist() == ["c"]
    assert (y.tolist(), y.dtype, weights.tolist()) == ([2], np.int64, [1])
    assert shapes_of(source.batch(0, 0)).startswith(
        "x/both/0: float32 (2, 1), x/both/1: object (2,)"
    )
    mixed = batch_source((pd.DataFrame({"n": [1, 2], "word": ["a", "b"]}), np.arange(2)))
    assert {key: column.shape for key, column in mixed.batch(0, 0)[0].items()} == {
        "n": (2, 1),
        "word": (2, 1),
    }
    # A model's own step is given x itself, where there is nothing else.
    assert batch_source(np.zeros((3, 2))).batch(0, 0).shape == (3, 2)
    assert isinstance(batch_source([np.zeros(3), np.zeros(3)]).batch(0, 0), tuple)


def test_shuffled_parts_stay_together() -> None:
    numbers = np.arange(50)
    source = batch_source(({"a": numbers, "b": -numbers}, numbers), batch_size=7, seed=3)
    x, y = source.batch(1, 2)
    assert (x["a"] == y).all()
    assert (x["b"] == -y).all()
    assert y.tolist() != sorted(y.tolist())


def test_other_data_has_another_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def of(*values: Any) -> str:
        return digest(batch_source(np.array(values, object)), None)

    # By content, whatever the objects' addresses are.
    assert of("one", [1, "two"]) == of("one", [1, "two"]) != of("one", [1, "three"])
    assert of(*[np.arange(5000)] * 2) != of(np.arange(5000), np.arange(5000) % 4000)

    path = tmp_path / "mapped.npy"
    np.save(path, np.zeros((5000, 3)))

    def of_file() -> str:
        return digest(batch_source(np.load(path, mmap_mode="r")), None)

    first = of_file()
    monkeypatch.setattr(batches, "DIGESTED_WHOLE", 1)  # as if it were large
    sampled = of_file()
    assert sampled == of_file()
    np.load(path, mmap_mode="r+")[1] = 1  # in no row that is looked at
    os.utime(path, (1, 1))
    assert of_file() != sampled
    monkeypatch.undo()
    assert of_file() != first


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
    straight, jumping = batch_source(make()), batch_source(make())
    assert straight.steps_per_epoch == 5
    batches = {
        (epoch, step): straight.batch(epoch, step) for epoch in range(2) for step in range(5)
    }
    for place in ((0, 3), (1, 0), (1, 4)):
        for one, other in zip(batches[place], jumping.batch(*place), strict=True):
            assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


class Slow(Numbers):
    """Four workers have to be in it at once, else it waits for ever."""

    meeting = threading.Barrier(4)
    has_met = False

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        if not self.has_met:
            self.meeting.wait(timeout=60)
            type(self).has_met = True
        return super().__getitem__(index)


def test_the_workers_of_a_pydataset_work_at_once_and_change_no_batch() -> None:
    alone, together = batch_source(Numbers(), seed=1), batch_source(Slow(workers=4), seed=1)
    for place in ((0, 0), (0, 1), (0, 4), (1, 2)):
        assert [part.tolist() for part in alone.batch(*place)] == [
            part.tolist() for part in together.batch(*place)
        ]


class Rising(Numbers):
    """Gives what its epochs have made of it."""

    begun = ended = 0

    def on_epoch_begin(self) -> None:
        self.begun += 1

    def on_epoch_end(self) -> None:
        self.ended += 1

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        return np.array([self.begun, self.ended]), np.array([index, index])


def test_a_pydataset_is_told_of_every_epoch_up_to_the_one_that_is_asked_for() -> None:
    source = batch_source(Rising())
    assert source.batch(0, 0)[0].tolist() == [1, 0]
    assert source.batch(2, 4)[0].tolist() == [3, 2]


class InProcesses(Rising):
    """Says which process has made a batch."""

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        return np.array([self.begun, self.ended, os.getpid()]), np.array([index])


def test_the_processes_of_a_pydataset_know_what_its_epochs_have_made_of_it() -> None:
    source = batch_source(InProcesses(workers=2, use_multiprocessing=True), shuffle=False)
    for epoch in range(2):
        for step in range(5):
            x, y = source.batch(epoch, step)
            assert (x[:2].tolist(), y.tolist()) == ([epoch + 1, epoch], [step])
            assert x[2] != os.getpid()


def without_length() -> tf.data.Dataset:
    return tf.data.Dataset.range(10).filter(lambda number: True).batch(2)


def test_a_dataset_is_read_once_in_a_run_to_know_it() -> None:
    source: Any = batch_source(without_length())
    source.settle(None)
    assert source.steps_per_epoch == 5
    # What an earlier attempt has found is taken over, but not where the data says its length.
    for data, steps in ((without_length(), 7), (tf.data.Dataset.range(10).batch(2), 5)):
        source = batch_source(data)
        source.settle(7)
        assert source.steps_per_epoch == steps


def test_what_cannot_be_resumed_or_has_no_end_is_refused() -> None:
    source: Any = batch_source(tf.data.Dataset.range(100).shuffle(100))
    with pytest.raises(ValueError, match=r"two passes over the tf.data.Dataset differ"):
        source.settle(None)
    with pytest.raises(ValueError, match=r"has no end, .*take\(steps\)"):
        assert batch_source(tf.data.Dataset.range(3).repeat()).steps_per_epoch
    with pytest.raises(ValueError, match="has no batches"):
        assert batch_source(lambda epoch: iter(())).steps_per_epoch
    with pytest.raises(TypeError, match="the data is a NoneType; expected arrays"):
        batch_source(None)


def test_an_epoch_that_ends_early_is_named() -> None:
    source = batch_source(lambda epoch: iter([(np.zeros(1),)] * (3 - epoch)))
    source.batch(1, 1)
    with pytest.raises(ValueError, match="epoch 2 of the data ends after 2 batches; expected 3"):
        source.batch(1, 2)


def test_what_an_epoch_has_more_of_than_the_first_is_said_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    source = batch_source(lambda epoch: iter([np.full(1, epoch)] * (2 + epoch)))
    assert source.steps_per_epoch == 2
    with caplog.at_level("WARNING"):
        numbers = [int(source.batch(epoch, step)[0]) for epoch in range(4) for step in range(2)]
    assert numbers == [0, 0, 1, 1, 2, 2, 3, 3]
    (message,) = caplog.messages
    assert message.startswith("epoch 2 of the data has more batches than the first, which has 2; ")


@pytest.mark.parametrize("number", [1, 5, 30])
def test_data_that_is_the_same_in_each_epoch_is_read_once_for_each(number: int) -> None:
    opened = read = 0

    def open_epoch(epoch: int) -> Iterator[Any]:
        nonlocal opened, read
        opened += 1
        for place in range(number):
            read += 1
            yield np.full(1, place)

    source = FunctionBatches(open_epoch, is_the_same=True)
    assert source.steps_per_epoch == number
    opened = read = 0
    for epoch in range(10):
        batches = [source.batch(epoch, step) for step in range(number)]
        assert [int(batch[0]) for batch in batches] == [*range(number)]
    assert opened <= 11
    assert read <= 11 * number


def test_data_that_ends_early_later_on_is_named() -> None:
    passes = [3, 2]
    source = FunctionBatches(lambda epoch: iter([np.zeros(1)] * passes[0]), is_the_same=True)
    assert source.steps_per_epoch == passes.pop(0)
    with pytest.raises(ValueError, match="a later pass over the data ends after 2 batches"):
        source.batch(1, 2)
