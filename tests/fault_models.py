"""Models whose state is easily lost: the fault tests put this file into a project's `src`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import keras
import tensorflow as tf
from keras import layers


@keras.saving.register_keras_serializable("faults")
class UnseededNoise(layers.Layer):
    """Noise from Keras' global generator, which belongs to no layer."""

    def call(self, inputs: Any, training: bool = False) -> Any:
        if not training:
            return inputs
        return inputs + 0.1 * keras.random.normal(keras.ops.shape(inputs))


def build_recurrent(
    config: Mapping[str, Any], input_shape: tuple[int, ...], num_classes: int
) -> keras.Model:
    """Reads an image row by row."""
    inputs = keras.Input(input_shape)
    x = layers.Reshape(input_shape[:2])(inputs)
    x = UnseededNoise()(x)
    x = layers.GRU(6, dropout=0.2, recurrent_dropout=0.2)(x)
    x = layers.LayerNormalization()(x)
    return keras.Model(inputs, layers.Dense(num_classes, activation="softmax")(x))


class TwoOptimizers(keras.Model):
    """Its own train step: the body and the head have an optimizer each; it averages weights."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.body = keras.Sequential([layers.Flatten(), layers.Dense(8), layers.Dropout(0.3)])
        self.normalization = layers.BatchNormalization()
        self.head = layers.Dense(num_classes)
        self.head_optimizer = keras.optimizers.SGD(0.05, momentum=0.9)
        self.mean_loss = keras.metrics.Mean("mean_loss")

    def build(self, input_shape: Any) -> None:
        self.body.build(input_shape)
        self.normalization.build((None, 8))
        self.head.build((None, 8))

    def call(self, inputs: Any, training: bool = False) -> Any:
        x = self.normalization(self.body(inputs, training=training), training=training)
        return self.head(keras.ops.relu(x))

    def train_step(self, data: Any) -> dict[str, Any]:
        features, labels = data
        with tf.GradientTape(persistent=True) as tape:
            loss = self.compute_loss(features, labels, self(features, training=True))
        head = self.head.trainable_variables
        rest = [v for v in self.trainable_variables if all(v is not other for other in head)]
        self.optimizer.apply(tape.gradient(loss, rest), rest)
        self.head_optimizer.apply(tape.gradient(loss, head), head)
        self.mean_loss.update_state(loss)
        return {"loss": self.mean_loss.result()}

    def test_step(self, data: Any) -> dict[str, Any]:
        features, labels = data
        self.mean_loss.update_state(self.compute_loss(features, labels, self(features)))
        return {"loss": self.mean_loss.result()}


def build_subclassed(
    config: Mapping[str, Any], input_shape: tuple[int, ...], num_classes: int
) -> keras.Model:
    """A model that Keras cannot write as HDF5."""
    model = TwoOptimizers(num_classes)
    model.build((None, *input_shape))
    head = model.head.trainable_variables
    rest = [v for v in model.trainable_variables if all(v is not other for other in head)]
    optimizer = keras.optimizers.Adam(0.01)
    optimizer.build(rest)
    model.head_optimizer.build(head)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=optimizer, loss=loss)
    return model
