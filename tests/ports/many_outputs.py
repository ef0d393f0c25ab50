"""Several inputs and outputs, by name, with a loss and a sample weight for each."""

import keras
import numpy as np
from keras import layers

from src.data import Dataset
from src.models import Model

NUM_WORDS, NUM_TAGS, NUM_DEPARTMENTS = 60, 6, 4


def load_tickets(number, seed):
    rng = np.random.default_rng(seed)
    title, body = (rng.integers(1, NUM_WORDS, (number, length)) for length in (5, 12))
    tags = rng.integers(0, 2, (number, NUM_TAGS)).astype("float32")
    x = {"title": title, "body": body, "tags": tags}
    priority = ((title[:, :1] < 20) & (tags[:, :1] > 0)).astype("float32")
    y = {"priority": priority, "department": title[:, 0] % NUM_DEPARTMENTS}
    weights = {"priority": 1 + priority[:, 0], "department": rng.uniform(0.5, 1, number)}
    return x, y, weights


def make_model():
    title, body = (keras.Input((None,), name=name) for name in ("title", "body"))
    tags = keras.Input((NUM_TAGS,), name="tags")
    read = [layers.LSTM(8)(layers.Embedding(NUM_WORDS, 8)(text)) for text in (title, body)]
    x = layers.Concatenate()([*read, tags])
    outputs = {
        "priority": layers.Dense(1, activation="sigmoid", name="priority")(x),
        "department": layers.Dense(NUM_DEPARTMENTS, name="department")(x),
    }
    return keras.Model({"title": title, "body": body, "tags": tags}, outputs)


losses = {
    "priority": "binary_crossentropy",
    "department": keras.losses.SparseCategoricalCrossentropy(from_logits=True),
}
metrics = {"priority": ["accuracy"], "department": ["accuracy"]}


# ---- ported ------------------------------------------------------------------------------------


def data(config):
    return Dataset(load_tickets(320, 0), load_tickets(64, 1), lambda: load_tickets(96, 2))


build = Model(lambda config: make_model(), losses, metrics)
