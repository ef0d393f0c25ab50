"""CIFAR is read from the authors' archives, and nothing in them is run."""

import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cifar_archive import write_cifar

from src.data import DATASETS, get_cifar
from src.models import build_simple_cnn


@pytest.fixture
def data_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(("which", "num_train"), [("cifar10", 90), ("cifar100", 18)])
def test_cifar_is_read_from_data_dir(
    which: str, num_train: int, config: dict[str, Any], data_dir: Path
) -> None:
    write_cifar(data_dir, which)
    cifar = get_cifar(which, False, config | {"batch_size": 8})
    assert cifar.train.batch(0, 0)[0].shape == (8, 32, 32, 3)
    assert cifar.train.steps_per_epoch == -(-num_train // 8)
    features, labels = cifar.load_test()
    assert features.dtype == np.float32
    # Channels come last, and the first image is of one colour.
    np.testing.assert_array_equal(features[0] * 255, np.broadcast_to([10, 20, 30], (32, 32, 3)))
    assert labels.tolist() == [label % 10 for label in range(20)]
    plain, moved = (get_cifar(which, augment).train.batch(0, 0) for augment in (False, True))
    np.testing.assert_array_equal(plain[1], moved[1])
    assert (plain[0] != moved[0]).any()
    named = DATASETS[which](config | {"augmented": True, "batch_size": 32, "seed": 0})
    np.testing.assert_array_equal(named.train.batch(0, 0)[0], moved[0])


def test_data_and_model_are_had_as_the_old_template_had_them(data_dir: Path) -> None:
    write_cifar(data_dir, "cifar100")
    train, test = get_cifar("cifar100", augment=False)
    assert [len(images) for images, _ in train] == [18]
    assert [part.shape for part in test] == [(20, 32, 32, 3), (20,)]
    config = {"n_layers": 1, "n_filters": 2, "dataset": "cifar100", "n_epochs": 100}
    assert build_simple_cnn(config).predict(test[0], verbose=0).shape == (20, 100)
    with pytest.raises(ValueError, match="asks for num_classes, which the dataset does not say"):
        build_simple_cnn(config | {"dataset": "faces"})


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
    assert get_cifar("cifar10", False).num_classes == 10


def test_a_truncated_archive_is_named(config: dict[str, Any], data_dir: Path) -> None:
    archive = write_cifar(data_dir, "cifar10")
    archive.write_bytes(archive.read_bytes()[:1000])
    with pytest.raises(OSError, match=r"cifar-10-python.tar.gz cannot be read"):
        get_cifar("cifar10", False)


def test_an_archive_that_would_run_code_is_refused(config: dict[str, Any], data_dir: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (data_dir / "executed",))

    member = data_dir / "member"
    member.write_bytes(pickle.dumps(Payload()))
    with tarfile.open(data_dir / "cifar-10-python.tar.gz", "w:gz") as tar:
        tar.add(member, "cifar-10-batches-py/data_batch_1")
    with pytest.raises(OSError, match="which no CIFAR archive does"):
        get_cifar("cifar10", False)
    assert not (data_dir / "executed").exists()
