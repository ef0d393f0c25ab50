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

    Each of the `n_layers` blocks halves the image and doubles the number of filters, as long as
    there is an image to halve. Blocks after that only convolve: a pooling would leave nothing of
    the image, and filters that went on doubling would be 16,384 in the tenth block, for which no
    memory is large enough.

    Args:
        config: `n_filters` of the first block; `n_layers`; `dropout` in [0, 1) before the
            classifier.
        input_shape: (height, width, channels).
        num_classes: number of outputs.

    Returns:
        Maps float images of shape (batch, height, width, channels) to probabilities of shape
        (batch, num_classes), in float32 (float64 where that is the precision).
    """
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
    x = layers.Dropout(config["dropout"])(x)
    # Probabilities are not in a shorter format, also where the layers above compute in one.
    precision = keras.config.dtype_policy().variable_dtype
    outputs = layers.Dense(num_classes, activation="softmax", dtype=precision)(x)
    return keras.Model(inputs, outputs, name="simple_cnn")


MODELS: dict[str, Callable[..., keras.Model]] = {
    "simple_cnn": build_simple_cnn,
}
