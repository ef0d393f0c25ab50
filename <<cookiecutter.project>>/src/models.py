"""Builds models. Each function takes the config and what it needs of the data, and returns one.

To add one, write one like `build_simple_cnn` and add it to `MODELS` with loss and metrics."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import keras
from keras import layers

from engine.cifar import CIFAR


def build_simple_cnn(
    config: Mapping[str, Any], input_shape: tuple[int, ...] = (32, 32, 3), num_classes: int = 0
) -> keras.Model:
    """Return a small convolutional network: images (batch, height, width, channels) to
    probabilities (batch, num_classes); of the config only, for CIFAR-10 or CIFAR-100.

    Each of the `n_layers` blocks halves the image and doubles the number of filters, `n_filters` in
    the first, as long as there is an image to halve. Blocks after that only convolve."""
    if not num_classes and config["dataset"] not in CIFAR:
        raise ValueError("it asks for num_classes, which the dataset does not say")
    inputs = keras.Input(input_shape, name="image")
    x = inputs
    n_filters = config["n_filters"]
    for _ in range(config["n_layers"]):
        x = layers.Conv2D(n_filters, 3, padding="same", use_bias=False)(x)
        x = layers.BatchNormalization(momentum=0.9)(x)
        x = layers.Activation("relu")(x)
        if min(x.shape[1:3]) > 1:
            x = layers.MaxPooling2D()(x)
            n_filters *= 2
    x = layers.Flatten()(x)
    x = layers.Dropout(config.get("dropout", 0.0))(x)
    # Probabilities keep full precision, even if the layers above compute in a shorter format.
    precision = keras.config.dtype_policy().variable_dtype
    num_classes = num_classes or CIFAR[config["dataset"]].num_classes
    outputs = layers.Dense(num_classes, activation="softmax", dtype=precision)(x)
    return keras.Model(inputs, outputs, name="simple_cnn")


class Model(NamedTuple):
    """A model with its loss and metrics; a function that compiles its model needs neither.

    Attributes:
        build: called with the config and, if it has such parameters, `input_shape`, `num_classes`
            and `dataset`.
        loss: as Keras takes it; the setting `loss` takes its place. None: cross-entropy, and
            accuracy as the metric, if the data has classes.
        metrics: as Keras takes them; the setting `metrics` takes their place."""

    build: Callable[..., keras.Model]
    loss: Any = None
    metrics: Any = ()


CLASSIFIER = ("sparse_categorical_crossentropy", ["accuracy"])  # loss and metrics

MODELS: dict[str, Model] = {
    "simple_cnn": Model(build_simple_cnn, *CLASSIFIER),
}
