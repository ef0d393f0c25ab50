"""What does not fit is blamed, with place and shapes: data, model, loss or metrics."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers
from loops import loop

from configs import registry
from engine.batches import batch_source
from engine.experiment import Experiment, prepare
from src.data import Dataset
from vegab import UsageError

X, Y = np.zeros((40, 4), np.float32), np.arange(40) % 3


def compiled(metrics: Any = ()) -> keras.Model:
    inputs = keras.Input((4,), name="size")
    model = keras.Model(inputs, layers.Dense(3, "softmax")(inputs))
    model.compile("sgd", "sparse_categorical_crossentropy", metrics=list(metrics))
    return model


def epoch_of(odd: Any, at: int = 1) -> Callable[[int], Iterator[Any]]:
    return lambda epoch: iter([odd if number == at else (X[:8], Y[:8]) for number in range(4)])


@pytest.mark.parametrize(
    ("train", "valid", "metrics", "blamed"),
    [
        ((X, Y), (X[:9, :3], Y[:9]), (), r"model '\w+' .* x: float32 \(9, 3\), .* \(valid\)"),
        ((X, Y), X[:9], (), r"the model's loss .* x: float32 \(9, 4\) \(valid\)"),
        ((X, Y), None, [keras.metrics.F1Score], r"the model's metrics .* \(40, 4\), .* \(train\)"),
        (epoch_of([X[:8], Y[:8]]), None, (), "dataset '.*the data of batch 2 is x/0: "),
        (epoch_of((None, Y[:8])), None, (), "dataset '.*a NoneType is in a batch; expected dense"),
    ],
)
def test_what_a_step_cannot_be_traced_for_is_blamed(
    train: Any, valid: Any, metrics: Any, blamed: str
) -> None:
    model = compiled([each() for each in metrics])
    dataset = Dataset(batch_source(train), batch_source(valid) if valid is not None else None)
    config = registry["root"]
    experiment = Experiment(config, dataset, model, None, [])
    with pytest.raises(UsageError, match=blamed):
        experiment.with_work()


@pytest.mark.parametrize(
    ("odd", "said"),
    [
        ((X[:8, :3], Y[:8]), r"step 3 of epoch 1.* x: float32 \(8, 3\), y: int64 \(8,\)"),
        ((X[:8], Y[:8] + 5), r"step 3 of epoch 1.*\(8, 4\).*\[0, 3\)"),
        (({"width": X[:8]}, Y[:8]), "step 3 of epoch 1 .* x/width: .*expected the structure of"),
    ],
)
def test_a_batch_that_a_step_cannot_take_is_named(odd: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said):
        loop(compiled(), epoch_of(odd, at=2), None, tmp_path, num_epochs=1, monitor=None)


@pytest.mark.parametrize(
    ("odd", "said"),
    [
        ((X[:8], Y[:8] + 5), r"^evaluation step 3 cannot take .*, x: float32 \(8, 4\), .*\[0, 3\)"),
        (({"width": X[:8]}, Y[:8]), "^the data of evaluation step 3 is x/width: .*structure of"),
    ],
)
def test_a_batch_that_cannot_be_validated_is_named(odd: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said):
        loop(compiled(), (X, Y), epoch_of(odd, at=2), tmp_path, num_epochs=1, monitor=None)


def test_data_without_batches_is_named() -> None:
    dataset = Dataset(batch_source((X, Y)), batch_source(lambda epoch: iter(())))
    experiment = Experiment(registry["root"], dataset, compiled(), None, [])
    with pytest.raises(UsageError, match=r"\(valid\): the data has no batches; expected at least"):
        prepare(lambda config, save_path: experiment, registry["root"])


@pytest.mark.parametrize("data", [(X, Y, Y, Y), (None, Y)])
def test_parts_that_fit_does_not_know_are_refused(data: Any) -> None:
    with pytest.raises(ValueError, match=r"a tuple of .*; expected x, \(x, y\)"):
        batch_source(data)
