"""Every model builds, answers with probabilities, and learns from one step."""

from typing import Any

import keras
import numpy as np
import pytest

from src.data import get_digits
from src.experiment import build
from src.models import MODELS
from vegab import UsageError


@pytest.mark.parametrize("name", MODELS)
def test_a_model_answers_with_probabilities(name: str, config: dict[str, Any]) -> None:
    model = MODELS[name].build(config, input_shape=(8, 8, 1), num_classes=10)
    probabilities = model.predict(np.zeros((3, 8, 8, 1)), verbose=0)
    assert probabilities.shape == (3, 10)
    assert probabilities.dtype == np.float32
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_one_step_lowers_the_loss_of_its_batch(name: str, config: dict[str, Any]) -> None:
    keras.utils.set_random_seed(0)
    # Dropout, which is random by design, would blur the comparison.
    config |= {"dropout": 0.0}
    model = MODELS[name].build(config, input_shape=(8, 8, 1), num_classes=10)
    model.compile("adam", "sparse_categorical_crossentropy")
    batch = get_digits(config).train.batch(0, 0)
    before = model.train_on_batch(*batch)
    assert model.train_on_batch(*batch) < before


def test_settings_reach_the_model(config: dict[str, Any]) -> None:
    def filters(**changes: Any) -> list[int]:
        model = build(config | changes).model
        return [layer.filters for layer in model.layers if isinstance(layer, keras.layers.Conv2D)]

    assert filters(n_filters=10) == [10]
    assert filters(n_filters=3, n_layers=3) == [3, 6, 12]


def test_a_deep_model_pools_and_doubles_while_there_is_an_image(config: dict[str, Any]) -> None:
    config |= {"n_filters": 2, "n_layers": 10}

    def shapes(*input_shape: int) -> list[tuple[int, ...]]:
        model = MODELS["simple_cnn"].build(config, input_shape=input_shape, num_classes=10)
        assert model.predict(np.zeros((1, *input_shape)), verbose=0).shape == (1, 10)
        return [layer.output.shape[1:] for layer in model.layers if "conv" in layer.name]

    assert shapes(8, 8, 1) == [(8, 8, 2), (4, 4, 4), (2, 2, 8)] + 7 * [(1, 1, 16)]
    # The shorter side decides.
    assert shapes(2, 8, 1) == [(2, 8, 2)] + 9 * [(1, 4, 4)]


def test_the_seed_decides_the_initial_weights(config: dict[str, Any]) -> None:
    def weights(seed: int) -> bytes:
        return b"".join(
            array.tobytes() for array in build(config | {"seed": seed}).model.get_weights()
        )

    assert weights(1) == weights(1)
    assert weights(1) != weights(2)


def test_mixed_precision_computes_short_and_answers_in_float32(config: dict[str, Any]) -> None:
    try:
        model = build(config | {"precision": "mixed_bfloat16"}).model
        convolution = next(x for x in model.layers if isinstance(x, keras.layers.Conv2D))
        assert convolution.compute_dtype == "bfloat16"
        assert convolution.variable_dtype == "float32"
        assert model.predict(np.zeros((1, 8, 8, 1)), verbose=0).dtype == np.float32
    finally:
        keras.config.set_dtype_policy("float32")


def test_optimizer_and_its_arguments_reach_keras(config: dict[str, Any]) -> None:
    changes = {"optimizer": "sgd", "optimizer_arguments": {"momentum": 0.5}, "learning_rate": 0.25}
    optimizer = build(config | changes).model.optimizer
    assert isinstance(optimizer, keras.optimizers.SGD)
    assert optimizer.momentum == 0.5
    assert float(optimizer.learning_rate) == 0.25


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "keras.Sequential"}, "'keras.Sequential' does not take this config"),
        ({"model": "simple_cn"}, "simple_cnn"),
        ({"dataset": "digit"}, "digits"),
        ({"optimizer": "adm"}, "adam"),
        ({"optimizer_arguments": {"momentun": 0.9}}, "momentun"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"monitor": "val_lost"}, "choose one of accuracy, loss"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"seed": -1}, "seed is -1"),
        ({"threads": 0}, "threads is 0"),
        ({"threads": "two"}, "threads is 'two'"),
        ({"jit_compile": True, "deterministic": True}, "add --no_deterministic"),
        ({"learning_rate": 0.1, "lr_schedule": [[1, 0.1]]}, "add --lr_schedule=null"),
        ({"learning_rate": "fast"}, "learning_rate is 'fast'"),
        ({"monitor_mode": "up"}, "auto, min, max"),
        ({"precision": "float8"}, "mixed_bfloat16"),
        ({"on_nan": "ignore"}, "stop, continue"),
        ({"lr_schedule": [[3, 0.1], [2, 0.01]]}, "rising epochs"),
        ({"lr_schedule": [3, 0.1]}, "until_epoch"),
        ({"lr_schedule": []}, "until_epoch"),
        ({"lr_schedule": {"class": "keras.optimizers.schedules.Nothing"}}, "lr_schedule"),
        ({"callbacks": [{"class": "keras.callbacks.EarlyStoping"}]}, "EarlyStopping"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused_in_one_sentence(
    changes: dict[str, Any], message: str, config: dict[str, Any]
) -> None:
    with pytest.raises(UsageError) as refusal:
        build(config | changes).with_work()
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)
