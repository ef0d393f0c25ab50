"""Builds a model for the toy records: an example of what a variant's `model` names."""

from dataclasses import dataclass
from typing import Any

import keras


@dataclass
class DebugToyModel:
    """Tells numbers apart by one hidden layer."""

    num_classes: int = 100
    learning_rate: Any = 0.001  # of Adam; a rate or a Keras schedule
    hidden_neurons: int = 50

    def keras_model_fn(self) -> keras.Model:
        """Return the model, compiled: int64 or float `number` of shape (batch, 1) to probabilities
        of shape (batch, num_classes)."""
        constant = {"kernel_initializer": keras.initializers.Constant(0.01)}
        number = keras.Input((1,), name="number")
        hidden = keras.layers.Dense(self.hidden_neurons, "relu", name="hidden", **constant)
        outputs = keras.layers.Dense(self.num_classes, "softmax", name="outputs", **constant)
        model = keras.Model({"number": number}, outputs(hidden(number)))
        adam = keras.optimizers.Adam(self.learning_rate)
        model.compile(adam, loss="sparse_categorical_crossentropy", metrics=["accuracy"])
        return model
