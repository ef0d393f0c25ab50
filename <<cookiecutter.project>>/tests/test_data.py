"""Shapes, value ranges, splits, and that a batch is a function of seed, epoch and step alone."""

import pickle
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from engine.batches import ArrayBatches, batch_source
from src.data import flip, get_cifar, get_digits, shift
from vegab import UsageError


def test_digits_have_the_shapes_and_ranges_that_are_promised(config: dict[str, Any]) -> None:
    digits = get_digits(config)
    features, labels = digits.train.batch(epoch=0, step=0)
    assert features.shape == (32, 8, 8, 1)
    assert features.dtype == np.float32
    assert labels.shape == (32,)
    assert digits.valid is not None
    for features, labels in (digits.train.batch(0, 0), digits.valid, digits.load_test()):
        assert features.min() == 0
        assert features.max() == 1
        assert set(labels.tolist()) == set(range(10))


def test_no_test_or_validation_image_is_trained_on(config: dict[str, Any]) -> None:
    digits = get_digits(config | {"augmented": False})
    batches = [digits.train.batch(0, step) for step in range(digits.train.steps_per_epoch)]
    train = {image.tobytes() for features, _ in batches for image in features}
    assert digits.valid is not None
    test = digits.load_test()
    assert len(train) == 1260
    assert [len(digits.valid[0]), len(test[0])] == [180, 357]
    assert not train & {image.tobytes() for image in np.concatenate([digits.valid[0], test[0]])}


def test_folds_validate_once_on_all_that_is_not_for_the_test(config: dict[str, Any]) -> None:
    def images_of(fold: int) -> tuple[list[bytes], list[bytes]]:
        folds = config | {"augmented": False, "num_folds": 5, "fold": fold}
        digits = get_digits(folds)
        assert digits.valid is not None
        batches = [digits.train.batch(0, step) for step in range(digits.train.steps_per_epoch)]
        train = [image.tobytes() for features, _ in batches for image in features]
        assert set(digits.valid[1].tolist()) == set(range(10))
        return train, [image.tobytes() for image in digits.valid[0]]

    parts = [images_of(fold) for fold in range(5)]
    for train, valid in parts:
        assert not {*train} & {*valid}
        assert len(train) + len(valid) == 1440
    validated = [image for _, valid in parts for image in valid]
    assert len(validated) == len({*validated}) == 1440
    assert not {*validated} & {image.tobytes() for image in get_digits(config).load_test()[0]}


def test_an_epoch_holds_every_example_once_in_an_order_of_its_own() -> None:
    numbers = np.arange(10)
    source = ArrayBatches(numbers, numbers, batch_size=4, seed=0)
    epochs = [
        [int(label) for step in range(3) for label in source.batch(epoch, step)[1]]
        for epoch in range(2)
    ]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(10))
    assert epochs[0] != epochs[1]


def test_a_batch_is_the_same_whatever_was_asked_before(config: dict[str, Any]) -> None:
    straight, jumping = get_digits(config).train, get_digits(config).train
    for step in range(5):
        straight.batch(0, step)
    expected = straight.batch(1, 7)
    jumping.batch(9, 3)
    for one, other in zip(expected, jumping.batch(1, 7), strict=True):
        assert one.tobytes() == other.tobytes()
    other_seed = get_digits(config | {"seed": 1}).train.batch(1, 7)
    assert expected[0].tobytes() != other_seed[0].tobytes()


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


def test_shift_and_flip_do_what_they_say() -> None:
    image = np.zeros((1, 3, 3, 1), dtype=np.float32)
    image[0, 1, 1] = 1
    corner = shift(image, np.zeros((1, 4)), most=1)
    assert corner[0, 2, 2, 0] == 1
    assert corner.sum() == 1
    assert shift(image, np.full((1, 4), 0.5), most=1).tobytes() == image.tobytes()
    left = np.zeros((2, 1, 2, 1))
    left[:, 0, 0] = 1
    mirrored = flip(left, np.array([[0, 0, 0.1, 0], [0, 0, 0.9, 0]]))
    assert mirrored[:, 0, :, 0].tolist() == [[0, 1], [1, 0]]


@pytest.mark.parametrize("values", [{"batch_size": 0}, {"seed": -1}, {"features": np.arange(3)}])
def test_batches_refuse_what_makes_no_sense(values: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {
        "features": np.arange(4),
        "labels": np.arange(4),
        "batch_size": 2,
        "seed": 0,
    }
    with pytest.raises(ValueError, match=r"at least"):
        ArrayBatches(**(arguments | values))


def write_cifar(folder: Path, which: str, num_examples: int = 20) -> Path:
    """Write a small archive in the authors' format: pickled dictionaries of bytes keys in a tar."""
    generator = np.random.default_rng(0)
    members = {
        "cifar10": [
            f"cifar-10-batches-py/{n}"
            for n in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
        ],
        "cifar100": ["cifar-100-python/train", "cifar-100-python/test"],
    }[which]
    path = folder / f"cifar-{which.removeprefix('cifar')}-python.tar.gz"
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as tar:
        for name in members:
            data = generator.integers(0, 256, (num_examples, 3072), dtype=np.uint8)
            data[0, :1024], data[0, 1024:2048], data[0, 2048:] = 10, 20, 30
            labels = [int(label) for label in np.arange(num_examples) % 10]
            key = b"labels" if which == "cifar10" else b"fine_labels"
            file = folder / "member"
            file.write_bytes(pickle.dumps({b"data": data, key: labels}, protocol=2))
            tar.add(file, name)
            file.unlink()
    return path


@pytest.mark.parametrize(("which", "num_train"), [("cifar10", 90), ("cifar100", 18)])
def test_cifar_is_read_from_data_dir(
    which: str,
    num_train: int,
    config: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_cifar(tmp_path, which)
    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    cifar = get_cifar(config | {"batch_size": 8}, which)
    assert cifar.train.batch(0, 0)[0].shape == (8, 32, 32, 3)
    assert cifar.train.steps_per_epoch == -(-num_train // 8)
    features, labels = cifar.load_test()
    assert features.dtype == np.float32
    # Channels come last, and the first image is of one colour.
    np.testing.assert_array_equal(features[0] * 255, np.broadcast_to([10, 20, 30], (32, 32, 3)))
    assert labels.tolist() == [label % 10 for label in range(20)]


@pytest.mark.parametrize("keras_home", [None, "{home}/cache", "~/cache"])
def test_cifar_is_read_from_the_cache_of_keras(
    keras_home: str | None,
    config: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_cifar(tmp_path / ("cache" if keras_home else ".keras") / "datasets", "cifar10")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("DATA_DIR", raising=False)
    monkeypatch.delenv("KERAS_HOME", raising=False)
    if keras_home:
        monkeypatch.setenv("KERAS_HOME", keras_home.format(home=tmp_path))
    assert get_cifar(config, "cifar10").num_classes == 10


def test_a_torn_archive_is_named(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = write_cifar(tmp_path, "cifar10")
    archive.write_bytes(archive.read_bytes()[:1000])
    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    with pytest.raises(OSError, match=r"cifar-10-python.tar.gz cannot be read"):
        get_cifar(config, "cifar10")


def test_an_archive_that_would_run_code_is_refused(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "executed",))

    member = tmp_path / "member"
    member.write_bytes(pickle.dumps(Payload()))
    with tarfile.open(tmp_path / "cifar-10-python.tar.gz", "w:gz") as tar:
        tar.add(member, "cifar-10-batches-py/data_batch_1")
    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    with pytest.raises(OSError, match="which no CIFAR archive does"):
        get_cifar(config, "cifar10")
    assert not (tmp_path / "executed").exists()


def test_without_copy_and_network_it_says_what_to_put_where(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import keras

    def fail(*args: object, **kwargs: object) -> None:
        raise Exception("URL fetch failure")

    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    monkeypatch.setattr(keras.utils, "get_file", fail)
    with pytest.raises(UsageError, match=r"put a copy of .*cifar-100-python.tar.gz there"):
        get_cifar(config, "cifar100")


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


def test_a_dataset_of_another_order_at_each_pass_is_refused() -> None:
    with pytest.raises(ValueError, match=r"two passes over the tf.data.Dataset differ"):
        batch_source(tf.data.Dataset.range(100).shuffle(100), seed=0)


def test_what_is_no_source_is_refused() -> None:
    with pytest.raises(TypeError, match="training data is a list"):
        batch_source([1, 2, 3], seed=0)


def test_an_epoch_that_ends_early_is_named() -> None:
    source = batch_source(lambda epoch: iter([(np.zeros(1),)] * (3 - epoch)), seed=0)
    source.batch(1, 1)
    with pytest.raises(ValueError, match="epoch 2 of the data ends after 2 batches; expected 3"):
        source.batch(1, 2)
