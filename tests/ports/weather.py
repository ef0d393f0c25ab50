"""An LSTM that forecasts the temperature: windows of a time series, by Keras' own utility."""

import keras
import numpy as np
from keras import layers

from src.data import Dataset

PAST, FUTURE = 24, 6


def load_weather(number=1500):
    hours = np.arange(number)[:, None]
    noise = np.random.default_rng(0).normal(0, 0.1, (number, 3))
    waves = np.sin(2 * np.pi * hours / np.array([24, 24 * 7, 500])) + noise
    train = waves[: int(0.7 * number)]
    return ((waves - train.mean(0)) / train.std(0)).astype("float32")


def windows(begin, end, **kwargs):
    begin, end = (int(share * len(WEATHER)) for share in (begin, end))
    x, y = WEATHER[begin : end - FUTURE], WEATHER[begin + PAST + FUTURE : end, 0]
    return keras.utils.timeseries_dataset_from_array(x, y, PAST, batch_size=64, **kwargs)


WEATHER = load_weather()


def make_model():
    inputs = keras.Input((PAST, 3))
    return keras.Model(inputs, layers.Dense(1)(layers.LSTM(16)(inputs)))


# ---- ported ------------------------------------------------------------------------------------


def data(config):
    train = lambda epoch, seed: windows(0, 0.7, shuffle=True, seed=seed + epoch)  # noqa: E731
    return Dataset(train, windows(0.7, 0.85), lambda: windows(0.85, 1))


def build(config):
    return make_model()
