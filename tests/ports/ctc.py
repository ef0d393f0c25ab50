"""Speech to text: padded batches, each of another length, and CTC as the loss."""

import keras
import numpy as np
import tensorflow as tf
from keras import layers

from src.data import Dataset

NUM_LETTERS, NUM_BANDS = 5, 8
SOUNDS = np.random.default_rng(7).normal(size=(NUM_LETTERS + 1, NUM_BANDS))


def load_speech(number, seed):
    """Yield spectrograms of shape (time, bands) and texts of shape (letters,), from 1 on."""
    for index in range(number):
        rng = np.random.default_rng([*seed, index])
        letters = rng.integers(1, NUM_LETTERS + 1, rng.integers(2, 6))
        frames = np.repeat(letters, rng.integers(4, 8, len(letters)))
        noise = rng.normal(0, 0.2, (len(frames), NUM_BANDS))
        yield (SOUNDS[frames] + noise).astype("float32"), letters.astype("int32")


def batched(number, seed):
    signature = tf.TensorSpec((None, NUM_BANDS)), tf.TensorSpec((None,), tf.int32)
    examples = tf.data.Dataset.from_generator(
        lambda: load_speech(number, seed), output_signature=signature
    )
    return examples.padded_batch(16)


def make_model():
    inputs = keras.Input((None, NUM_BANDS))
    x = layers.Conv1D(16, 3, padding="same", use_bias=False)(inputs)
    x = layers.ReLU()(layers.BatchNormalization()(x))
    x = layers.Bidirectional(layers.GRU(16, return_sequences=True))(x)
    model = keras.Model(inputs, layers.Dense(NUM_LETTERS + 1)(x))
    model.compile(keras.optimizers.Adam(0.01), keras.losses.CTC())
    return model


# ---- ported ------------------------------------------------------------------------------------


def data(config):
    train = lambda epoch, seed: batched(160, [seed, epoch])  # noqa: E731
    return Dataset(train, batched(32, [100]), lambda: batched(32, [200]))


def build(config):
    return make_model()
