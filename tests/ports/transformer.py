"""A transformer that classifies texts: token ids in an array, layers of one's own."""

import keras
import numpy as np
from keras import layers, ops

from src.data import Dataset

NUM_WORDS, LENGTH, WIDTH = 40, 20, 16


class TransformerBlock(layers.Layer):
    def __init__(self, num_heads, ff_width, rate=0.1, **kwargs):
        super().__init__(**kwargs)
        self.attention = layers.MultiHeadAttention(num_heads, WIDTH)
        self.ffn = keras.Sequential([layers.Dense(ff_width, "relu"), layers.Dense(WIDTH)])
        self.norm1, self.norm2 = layers.LayerNormalization(), layers.LayerNormalization()
        self.dropout1, self.dropout2 = layers.Dropout(rate), layers.Dropout(rate)

    def call(self, inputs, training=False):
        attended = self.dropout1(self.attention(inputs, inputs), training=training)
        attended = self.norm1(inputs + attended)
        return self.norm2(attended + self.dropout2(self.ffn(attended), training=training))


class TokenAndPositionEmbedding(layers.Layer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.tokens = layers.Embedding(NUM_WORDS, WIDTH)
        self.positions = layers.Embedding(LENGTH, WIDTH)

    def call(self, inputs):
        return self.tokens(inputs) + self.positions(ops.arange(LENGTH))


def load_reviews(number, seed):
    words = np.random.default_rng(seed).integers(0, NUM_WORDS, (number, LENGTH))
    return words, ((words % 7 == 3).sum(1) > 2).astype("int64")


def make_model():
    inputs = keras.Input((LENGTH,))
    x = TransformerBlock(num_heads=2, ff_width=16)(TokenAndPositionEmbedding()(inputs))
    x = layers.Dropout(0.1)(layers.GlobalAveragePooling1D()(x))
    model = keras.Model(inputs, layers.Dense(2, activation="softmax")(x))
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


# ---- ported ------------------------------------------------------------------------------------


def data(config):
    test = lambda: load_reviews(100, 2)  # noqa: E731
    return Dataset(load_reviews(320, 0), load_reviews(64, 1), test, class_names=["bad", "good"])


def build(config):
    return make_model()
