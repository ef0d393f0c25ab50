"""Provides data sets. Each function takes the config and returns a `Dataset`.

To add one, write a function like `get_digits` and enter it in `DATASETS`."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from engine.batches import Array, ArrayBatches, Arrays
from engine.cifar import CIFAR, _cifar_archive, _read_cifar

DIGITS = Path(__file__).resolve().parents[1] / "data" / "digits" / "digits.npz"


def _no_test_set() -> Any:
    raise ValueError("it has no test set; give its Dataset a load_test")


@dataclass(frozen=True)
class Dataset:
    """What a model is trained and evaluated on.

    Each of the three is what `fit` takes: arrays x, (x, y) or (x, y, sample_weight), nested and by
    name if you like; a `tf.data.Dataset` of batches; a function `(epoch, seed) -> tf.data.Dataset`;
    a `keras.utils.PyDataset`; or any object with `steps_per_epoch` and `batch(epoch, step)`.

    Attributes:
        train: the training data; if it is arrays, they are shuffled in each epoch.
        valid: the validation data, used after each epoch; None: no validation.
        load_test: reads the test set. Only evaluation calls it: what training never holds cannot
            leak into it.
        input_shape: shape of one example's features, without the batch dimension; None: as the
            first batch has it.
        num_classes: labels are integers in [0, num_classes); None: there are no classes.
        class_names: names of the classes, in their order; None: classes are shown by number."""

    train: Any
    valid: Any = None
    load_test: Callable[[], Any] = _no_test_set
    input_shape: tuple[int, ...] | None = None
    num_classes: int | None = None
    class_names: Sequence[str] | None = None

    def __iter__(self) -> Iterator[Any]:
        """Yield the batches of an epoch and the test set, for `train, test = get_cifar(…)`."""
        yield (self.train.batch(0, step) for step in range(self.train.steps_per_epoch))
        yield self.load_test()


def get_digits(config: Mapping[str, Any]) -> Dataset:
    """Return the bundled handwritten digits: 1,260 for training, 180 to validate, 357 to test.

    Features are float32 of shape (batch, 8, 8, 1) in [0, 1], labels uint8, (batch,) in [0, 9]."""
    with np.load(DIGITS, allow_pickle=False) as file:
        images, labels = file["images"][..., np.newaxis], file["labels"]
    # A split by position is the same for every seed and every version of NumPy. The labels run
    # from 0 to 9 over and over, so that every block of ten holds each class.
    block = np.arange(len(images)) // 10 % 10
    test = np.isin(block, (4, 9))
    valid = np.zeros_like(test)
    valid[~test] = is_valid(config, block[~test] == 2)

    def prepare(images: Array) -> Array:
        return images.astype(np.float32) / 16

    train = ~(test | valid)
    order = {"batch_size": config["batch_size"], "seed": config["seed"]}
    augment = partial(shift, most=1) if config["augmented"] else None
    arrays = images[train], labels[train]
    return Dataset(
        train=ArrayBatches(*arrays, **order, prepare=prepare, augment=augment),
        valid=(prepare(images[valid]), labels[valid]),
        load_test=lambda: (prepare(images[test]), labels[test]),
        input_shape=(8, 8, 1),
        num_classes=10,
    )


def get_cifar(which: str, augment: bool, config: Mapping[str, Any] | None = None) -> Dataset:
    """Return CIFAR-10 or CIFAR-100: 45,000 images for training, 5,000 to validate, 10,000 to test.

    Features are float32 of shape (batch, 32, 32, 3) in [0, 1], labels uint8 of shape (batch,).
    `augmented` moves and mirrors training images at random. Without a config, batches are of 32."""
    config = config or {"batch_size": 32, "seed": 0}
    source = CIFAR[which]
    archive = _cifar_archive(source)
    images, labels = _read_cifar(archive, source.train_files, source.label_key)
    valid = is_valid(config, np.arange(len(images)) < len(images) // 10)

    def prepare(images: Array) -> Array:
        return images.astype(np.float32) / 255

    def move(images: Array, draws: Array) -> Array:
        return flip(shift(images, draws, most=4), draws)

    def load_test() -> Arrays:
        images, labels = _read_cifar(archive, source.test_files, source.label_key)
        return prepare(images), labels

    order = {"batch_size": config["batch_size"], "seed": config["seed"]}
    arrays = images[~valid], labels[~valid]
    return Dataset(
        train=ArrayBatches(*arrays, **order, prepare=prepare, augment=move if augment else None),
        valid=(prepare(images[valid]), labels[valid]),
        load_test=load_test,
        input_shape=(32, 32, 3),
        num_classes=source.num_classes,
        class_names=source.class_names,
    )


def get_cifar10(config: Mapping[str, Any]) -> Dataset:
    """Return CIFAR-10; see `get_cifar`."""
    return get_cifar("cifar10", config["augmented"], config)


def get_cifar100(config: Mapping[str, Any]) -> Dataset:
    """Return CIFAR-100 with its 100 fine labels; see `get_cifar`."""
    return get_cifar("cifar100", config["augmented"], config)


DATASETS: dict[str, Callable[[Mapping[str, Any]], Dataset]] = {
    "digits": get_digits,
    "cifar10": get_cifar10,
    "cifar100": get_cifar100,
}


def is_valid(config: Mapping[str, Any], default: Array) -> Array:
    """Return which of the examples outside of the test set to validate on: every `num_folds`th
    block of ten, from block `fold` on, or, without folds, the `default`."""
    if not config.get("num_folds"):
        return default
    return np.arange(len(default)) // 10 % config["num_folds"] == config["fold"]


def shift(images: Array, draws: Array, most: int) -> Array:
    """Move each image by up to `most` pixels in both directions; zeros come in at the border.

    The first two columns of `draws`, of shape (batch, 4) in [0, 1), decide."""
    padded = np.pad(images, ((0, 0), (most, most), (most, most), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, images.shape[1:3], axis=(1, 2))
    down, right = (draws[:, :2] * (2 * most + 1)).astype(np.int64).T
    moved = windows[np.arange(len(images)), down, right]
    return np.ascontiguousarray(np.moveaxis(moved, 1, -1))


def flip(images: Array, draws: Array) -> Array:
    """Mirror each image left to right with probability 1/2, by the third column of `draws`."""
    mirrored = draws[:, 2, np.newaxis, np.newaxis, np.newaxis] < 0.5
    return np.where(mirrored, images[:, :, ::-1], images)
