"""Writes small archives in the format of CIFAR's authors."""

import pickle
import tarfile
from pathlib import Path

import numpy as np


def write_cifar(folder: Path, which: str, num_examples: int = 20) -> Path:
    """Write an archive: pickles of Python 2 with keys of bytes, in a tar."""
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
            batch = {b"data": data, key: labels, b"batch_label": b"batch"}
            content = pickle.dumps(batch, protocol=2)
            # The module has moved in NumPy since the archives were made.
            content = content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
            file.write_bytes(content)
            tar.add(file, name)
            file.unlink()
    return path
