"""Datasets. Each function takes the config and returns a `Dataset`.

To add one, write a function like `get_digits` and enter it in `DATASETS`.
"""

import contextlib
import os
import pickle
import tarfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from src.batches import Array, ArrayBatches, Arrays, BatchSource
from vegab import UsageError

DIGITS = Path(__file__).resolve().parents[1] / "data" / "digits" / "digits.npz"


@dataclass(frozen=True)
class Dataset:
    """What a model is trained and judged on.

    Attributes:
        train: batches for training.
        valid: features and labels to validate on after each epoch, or None.
        load_test: reads the test set. It is called by evaluation alone: what training never holds
            cannot leak into it.
        input_shape: shape of one example's features, without the batch dimension.
        num_classes: labels are integers in [0, num_classes).
    """

    train: BatchSource
    valid: Arrays | None
    load_test: Callable[[], Arrays]
    input_shape: tuple[int, ...]
    num_classes: int


def get_digits(config: Mapping[str, Any]) -> Dataset:
    """Return the bundled handwritten digits: 1,260 for training, 180 to validate, 357 to test.

    Features are float32 of shape (batch, 8, 8, 1) in [0, 1], labels uint8 of shape (batch,)
    in [0, 10).
    """
    with np.load(DIGITS, allow_pickle=False) as file:
        images, labels = file["images"][..., np.newaxis], file["labels"]
    # A split by position is the same for every seed and every version of NumPy. The digits come in
    # turns, 0 to 9 over and over, so that blocks of ten hold every class.
    block = np.arange(len(images)) // 10 % 10
    test = np.isin(block, (4, 9))
    valid = np.zeros_like(test)
    valid[~test] = is_valid(config, block[~test] == 2)

    def prepare(images: Array) -> Array:
        return images.astype(np.float32) / 16

    def augment(images: Array, draws: Array) -> Array:
        return shift(images, draws, most=1)

    train = ~(test | valid)
    return Dataset(
        train=_batches(config, (images[train], labels[train]), prepare, augment),
        valid=(prepare(images[valid]), labels[valid]),
        load_test=lambda: (prepare(images[test]), labels[test]),
        input_shape=(8, 8, 1),
        num_classes=10,
    )


def get_cifar(config: Mapping[str, Any], which: str) -> Dataset:
    """Return CIFAR-10 or CIFAR-100: 45,000 images for training, 5,000 to validate, 10,000 to test.

    Features are float32 of shape (batch, 32, 32, 3) in [0, 1], labels uint8 of shape (batch,).

    Args:
        config: keys `batch_size`, `seed`, `augmented`, `num_folds` and `fold` are read.
        which: "cifar10" or "cifar100".

    Raises:
        UsageError: if the archive can be neither found nor downloaded.
        OSError: if it cannot be read.
    """
    source = CIFAR[which]
    archive = _cifar_archive(source)
    images, labels = _read_cifar(archive, source.train_files, source.label_key)
    valid = is_valid(config, np.arange(len(images)) < len(images) // 10)

    def prepare(images: Array) -> Array:
        return images.astype(np.float32) / 255

    def augment(images: Array, draws: Array) -> Array:
        return flip(shift(images, draws, most=4), draws)

    def load_test() -> Arrays:
        images, labels = _read_cifar(archive, source.test_files, source.label_key)
        return prepare(images), labels

    return Dataset(
        train=_batches(config, (images[~valid], labels[~valid]), prepare, augment),
        valid=(prepare(images[valid]), labels[valid]),
        load_test=load_test,
        input_shape=(32, 32, 3),
        num_classes=source.num_classes,
    )


def get_cifar10(config: Mapping[str, Any]) -> Dataset:
    """Return CIFAR-10, see `get_cifar`."""
    return get_cifar(config, "cifar10")


def get_cifar100(config: Mapping[str, Any]) -> Dataset:
    """Return CIFAR-100 with its 100 fine labels, see `get_cifar`."""
    return get_cifar(config, "cifar100")


DATASETS: dict[str, Callable[[Mapping[str, Any]], Dataset]] = {
    "digits": get_digits,
    "cifar10": get_cifar10,
    "cifar100": get_cifar100,
}


def is_valid(config: Mapping[str, Any], default: Array) -> Array:
    """Return which examples to validate on, of those that are not for the test.

    Args:
        config: with `num_folds`, every `num_folds`th block of ten examples is, from `fold` on.
        default: bool of shape (num_examples,), what is returned without folds.
    """
    if not config.get("num_folds"):
        return default
    return np.arange(len(default)) // 10 % config["num_folds"] == config["fold"]


def shift(images: Array, draws: Array, most: int) -> Array:
    """Move each image by up to `most` pixels in both directions; zeros come in at the border.

    Args:
        images: shape (batch, height, width, channels), any dtype.
        draws: shape (batch, 4) in [0, 1); the first two columns decide.
        most: pixels, at least 0.
    """
    height, width = images.shape[1:3]
    border = ((0, 0), (most, most), (most, most), (0, 0))
    windows = np.lib.stride_tricks.sliding_window_view(
        np.pad(images, border), (height, width), axis=(1, 2)
    )
    down, right = (draws[:, :2] * (2 * most + 1)).astype(np.int64).T
    moved = windows[np.arange(len(images)), down, right]
    return np.ascontiguousarray(np.moveaxis(moved, 1, -1))


def flip(images: Array, draws: Array) -> Array:
    """Mirror each image left to right with probability 1/2, by the third column of `draws`."""
    mirrored = draws[:, 2, np.newaxis, np.newaxis, np.newaxis] < 0.5
    return np.where(mirrored, images[:, :, ::-1], images)


def _batches(
    config: Mapping[str, Any],
    examples: Arrays,
    prepare: Callable[[Array], Array],
    augment: Callable[[Array, Array], Array],
) -> ArrayBatches:
    return ArrayBatches(
        *examples,
        batch_size=config["batch_size"],
        seed=config["seed"],
        prepare=prepare,
        augment=augment if config["augmented"] else None,
    )


@dataclass(frozen=True)
class CifarSource:
    """Where a CIFAR archive comes from and what it holds (https://www.cs.toronto.edu/~kriz)."""

    archive: str
    sha256: str
    train_files: tuple[str, ...]
    test_files: tuple[str, ...]
    label_key: bytes
    num_classes: int

    @property
    def url(self) -> str:
        """Where the authors keep it."""
        return f"https://www.cs.toronto.edu/~kriz/{self.archive}"


CIFAR = {
    "cifar10": CifarSource(
        archive="cifar-10-python.tar.gz",
        sha256="6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
        train_files=tuple(f"cifar-10-batches-py/data_batch_{number}" for number in range(1, 6)),
        test_files=("cifar-10-batches-py/test_batch",),
        label_key=b"labels",
        num_classes=10,
    ),
    "cifar100": CifarSource(
        archive="cifar-100-python.tar.gz",
        sha256="85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7",
        train_files=("cifar-100-python/train",),
        test_files=("cifar-100-python/test",),
        label_key=b"fine_labels",
        num_classes=100,
    ),
}


def _cifar_archive(source: CifarSource) -> Path:
    """Return the archive in `_archive_folder`, downloading it if it is missing.

    Raises:
        UsageError: saying what to put where, if it cannot be downloaded.
    """
    import keras

    path = _archive_folder() / source.archive
    if path.is_file():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        keras.utils.get_file(
            source.archive,
            origin=source.url,
            file_hash=source.sha256,
            cache_subdir=str(path.parent),
        )
    except Exception as error:  # Keras raises a bare Exception where the download fails
        with contextlib.suppress(OSError):  # the folder may be what is not there
            path.unlink()
        raise UsageError(
            f"{source.archive} is not in {path.parent} and could not be downloaded ({error}); "
            f"put a copy of {source.url} there, or set DATA_DIR to the folder that holds it"
        ) from error
    return path


def _archive_folder() -> Path:
    """Return the folder DATA_DIR, or else `datasets` in Keras' cache: KERAS_HOME or ~/.keras.

    Keras goes by the same variable, but has no public function that says where its cache is.
    """
    folder = os.environ.get("DATA_DIR")
    if not folder:
        folder = os.path.join(os.environ.get("KERAS_HOME") or "~/.keras", "datasets")
    return Path(folder).expanduser().resolve()


class _ArrayUnpickler(pickle.Unpickler):
    """Reads the arrays in a CIFAR batch; every other object in a pickle is refused, not built."""

    ALLOWED = (
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "_reconstruct"),
        ("numpy._core.numeric", "_frombuffer"),
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        ("_codecs", "encode"),
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no CIFAR archive does")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def _read_cifar(archive: Path, names: tuple[str, ...], label_key: bytes) -> Arrays:
    """Read uint8 images (num_examples, 32, 32, 3) and uint8 labels out of the archive."""
    images, labels = [], []
    try:
        with tarfile.open(archive) as tar:
            for name in names:
                member = tar.extractfile(name)
                if member is None:
                    raise ValueError(f"{name} is not a file")
                batch = _ArrayUnpickler(member, encoding="bytes").load()
                images.append(batch[b"data"].reshape(-1, 3, 32, 32))
                labels.append(np.asarray(batch[label_key], dtype=np.uint8))
    except Exception as error:  # a torn archive raises a dozen different types
        raise OSError(
            f"{archive} cannot be read as a CIFAR archive ({error}); "
            "delete it to have it downloaded again, or put a good copy in its place"
        ) from error
    return np.concatenate(images).transpose(0, 2, 3, 1), np.concatenate(labels)
