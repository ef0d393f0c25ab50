"""Reads CIFAR-10 and CIFAR-100 from the authors' archives."""

import contextlib
import os
import pickle
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from engine.batches import Arrays
from vegab import UsageError


class CifarSource(NamedTuple):
    """Where a CIFAR archive comes from and what it holds (https://www.cs.toronto.edu/~kriz)."""

    archive: str
    sha256: str
    train_files: tuple[str, ...]
    test_files: tuple[str, ...]
    label_key: bytes
    num_classes: int
    class_names: Sequence[str] | None = None


OF_CIFAR10 = "airplane automobile bird cat deer dog frog horse ship truck"
CIFAR = {
    "cifar10": CifarSource(
        archive="cifar-10-python.tar.gz",
        sha256="6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
        train_files=tuple(f"cifar-10-batches-py/data_batch_{number}" for number in range(1, 6)),
        test_files=("cifar-10-batches-py/test_batch",),
        label_key=b"labels",
        num_classes=10,
        class_names=OF_CIFAR10.split(),
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
    """Return the archive in DATA_DIR, or else in Keras' cache; download it if it is missing."""
    import keras

    # Keras goes by KERAS_HOME, too, but has no public function that says where its cache is.
    cache = os.environ.get("KERAS_HOME") or "~/.keras"
    folder = Path(os.environ.get("DATA_DIR") or f"{cache}/datasets").expanduser().resolve()
    path = folder / source.archive
    if path.is_file():
        return path
    url = f"https://www.cs.toronto.edu/~kriz/{source.archive}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        keras.utils.get_file(source.archive, url, file_hash=source.sha256, cache_subdir=str(folder))
    except Exception as error:  # Keras raises a bare Exception where the download fails
        with contextlib.suppress(OSError):  # the folder may be what is not there
            path.unlink()
        hint = f"put a copy of {url} there, or set DATA_DIR to the folder that holds it"
        wrong = f"{source.archive} is not in {folder} and could not be downloaded ({error})"
        raise UsageError(f"{wrong}; {hint}") from error
    return path


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
    except Exception as error:  # a truncated archive raises a dozen different types
        hint = "delete it to have it downloaded again, or put a good copy in its place"
        raise OSError(f"{archive} cannot be read as a CIFAR archive ({error}); {hint}") from error
    return np.concatenate(images).transpose(0, 2, 3, 1), np.concatenate(labels)
