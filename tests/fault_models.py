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


class Averages:
    """Something of one's own that keeps variables, and a moving average of weights."""

    def __init__(self, weights: list[Any]) -> None:
        self.weights = weights
        self.number = keras.Variable(0.0, trainable=False)
        self.slow = [tf.Variable(weight) for weight in weights]

    def follow(self) -> None:
        """Move the average."""
        self.number.assign_add(1.0)
        for slow, weight in zip(self.slow, self.weights, strict=True):
            slow.assign(0.9 * slow + 0.1 * tf.convert_to_tensor(weight.value))


class Scattered(keras.Model):
    """Keeps what it needs everywhere: optimizers in a dictionary, a variable, a helper, noise."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.body = keras.Sequential([layers.Flatten(), layers.Dense(8, "relu")])
        self.head = layers.Dense(num_classes)
        self.body.build((None, 8, 8, 1))
        self.head.build((None, 8))
        self.built = True
        self.optimizers = {
            "body": keras.optimizers.Adam(0.01),
            "head": keras.optimizers.SGD(0.05, momentum=0.9),
        }
        for name, optimizer in self.optimizers.items():
            optimizer.build(getattr(self, name).trainable_variables)
        self.steps_done = tf.Variable(0.0, trainable=False)
        self.averages = Averages(self.head.trainable_variables)

    def call(self, inputs: Any, training: bool = False) -> Any:
        x = self.body(inputs)
        return self.head(tf.nn.dropout(x, 0.2) if training else x)

    def train_step(self, data: Any) -> dict[str, Any]:
        features, labels = data
        self.steps_done.assign_add(1.0)
        with tf.GradientTape(persistent=True) as tape:
            scores = self(features + 0.01 * tf.random.normal([]), training=True)
            penalty = tf.add_n([tf.reduce_mean(slow**2) for slow in self.averages.slow])
            loss = self.compute_loss(features, labels, scores) + penalty / self.steps_done
        for name, optimizer in self.optimizers.items():
            variables = getattr(self, name).trainable_variables
            optimizer.apply(tape.gradient(loss, variables), variables)
        self.averages.follow()
        return {"loss": loss, "number": self.averages.number.value}


def build_scattered(
    config: Mapping[str, Any], input_shape: tuple[int, ...], num_classes: int
) -> keras.Model:
    """Nothing of it is where Keras would look."""
    model = Scattered(num_classes)
    model.compile(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


def build_stateful(
    config: Mapping[str, Any], input_shape: tuple[int, ...], num_classes: int
) -> keras.Model:
    """A recurrent layer that goes on where the batch before ended."""
    inputs = keras.Input(batch_shape=(config["batch_size"], *input_shape))
    x = layers.GRU(6, stateful=True)(layers.Reshape(input_shape[:2])(inputs))
    return keras.Model(inputs, layers.Dense(num_classes, activation="softmax")(x))


def whole_batches(config: Mapping[str, Any]) -> Any:
    """The digits, for a model that takes one size of batches only."""
    from dataclasses import replace

    from src.data import get_digits

    dataset: Any = get_digits(config)
    return replace(dataset, valid=tuple(part[: config["batch_size"]] for part in dataset.valid))


def build_shared(
    config: Mapping[str, Any], input_shape: tuple[int, ...], num_classes: int
) -> keras.Model:
    """An encoder that two nested models share; its weights are averaged in the end."""
    inputs = keras.Input(input_shape)
    encoder = keras.Model(inputs, layers.Dense(8, "relu")(layers.Flatten()(inputs)), name="encoder")
    parts = []
    for name, layer in (("a", layers.BatchNormalization()), ("b", layers.Dense(8))):
        inputs = keras.Input(input_shape)
        parts.append(keras.Model(inputs, layer(encoder(inputs)), name=name))
    inputs = keras.Input(input_shape)
    added = layers.Add()([part(inputs) for part in parts])
    model = keras.Model(inputs, layers.Dense(num_classes, activation="softmax")(added))
    optimizer = keras.optimizers.Adam(0.01, use_ema=True, ema_momentum=0.9)
    model.compile(optimizer, "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model
