"""Models. Each function takes the config and the shape of the data, and returns a `keras.Model`.

To add one, write a function like `build_simple_cnn` and enter it in `MODELS`.
"""

from collections.abc import Callable, Mapping
from typing import Any

import keras
from keras import layers


def build_simple_cnn(
    config: Mapping[str, Any], input_shape: tuple[int, ...], num_classes: int
) -> keras.Model:
    """Return a small convolutional network for images.

    Args:
        config: `n_filters` of the first block, doubled in each of the `n_layers` blocks; `dropout`
            in [0, 1) before the classifier.
        input_shape: (height, width, channels).
        num_classes: number of outputs.

    Returns:
        Maps float images of shape (batch, height, width, channels) to probabilities of shape
        (batch, num_classes), in float32 (float64 where that is the precision).
    """
    inputs = keras.Input(input_shape, name="image")
    x = inputs
    for layer in range(config["n_layers"]):
        x = layers.Conv2D(config["n_filters"] * 2**layer, 3, padding="same", use_bias=False)(x)
        x = layers.BatchNormalization(momentum=0.9)(x)
        x = layers.Activation("relu")(x)
        x = layers.MaxPooling2D()(x)
    x = layers.Flatten()(x)
    x = layers.Dropout(config["dropout"])(x)
    # Probabilities are not in a shorter format, also where the layers above compute in one.
    precision = keras.config.dtype_policy().variable_dtype
    outputs = layers.Dense(num_classes, activation="softmax", dtype=precision)(x)
    return keras.Model(inputs, outputs, name="simple_cnn")


MODELS: dict[str, Callable[..., keras.Model]] = {
    "simple_cnn": build_simple_cnn,
}
