"""Structured data: a table with numbers and words, encoded by a FeatureSpace within the model."""

import keras
import numpy as np
import pandas as pd
import tensorflow as tf
from keras import layers
from keras.utils import FeatureSpace

from src.data import Dataset


def load_patients(number, seed):
    rng = np.random.default_rng(seed)
    table = pd.DataFrame(
        {
            "age": rng.integers(20, 80, number),
            "chol": rng.normal(240, 50, number),
            "sex": rng.integers(0, 2, number),
            "thal": rng.choice(["fixed", "normal", "reversible"], number),
        }
    )
    is_ill = (table["age"] > 50) ^ (table["thal"] == "normal")
    return table, is_ill.astype("int64")


def make_model():
    feature_space = FeatureSpace(
        features={
            "age": FeatureSpace.float_discretized(num_bins=10),
            "chol": FeatureSpace.float_normalized(),
            "sex": FeatureSpace.integer_categorical(num_oov_indices=0),
            "thal": FeatureSpace.string_categorical(num_oov_indices=0),
        },
        crosses=[FeatureSpace.cross(("sex", "thal"), crossing_dim=8)],
        output_mode="concat",
    )
    feature_space.adapt(tf.data.Dataset.from_tensor_slices(dict(load_patients(400, 0)[0])))
    x = layers.Dropout(0.2)(layers.Dense(16, "relu")(feature_space.get_encoded_features()))
    model = keras.Model(feature_space.get_inputs(), layers.Dense(1, activation="sigmoid")(x))
    metrics = ["accuracy", keras.metrics.AUC(name="auc")]
    model.compile("adam", "binary_crossentropy", metrics=metrics)
    return model


# ---- ported ------------------------------------------------------------------------------------


def data(config):
    test = lambda: load_patients(100, 2)  # noqa: E731
    return Dataset(load_patients(400, 0), load_patients(80, 1), test, num_classes=2)


def build(config):
    return make_model()
