"""A U-Net that finds shapes: a PyDataset with workers, a class for each pixel."""

import keras
import numpy as np
from keras import layers

from src.data import Dataset

SIZE = 16


class Shapes(keras.utils.PyDataset):
    """Draws pictures of a square (class 1) and a disc (class 2)."""

    def __init__(self, num_batches, seed, **kwargs):
        super().__init__(**kwargs)
        self.num, self.seed, self.epoch = num_batches, seed, -1

    def __len__(self):
        return self.num

    def on_epoch_begin(self):
        self.epoch += 1

    def __getitem__(self, index):
        rng = np.random.default_rng([self.seed, self.epoch % 2, index])
        y, x = np.mgrid[:SIZE, :SIZE]
        masks = np.zeros((8, SIZE, SIZE), "uint8")
        for mask, (a, b, c, d) in zip(masks, rng.integers(3, SIZE - 3, (8, 4)), strict=True):
            mask[(abs(y - a) < 4) & (abs(x - b) < 4)] = 1
            mask[(y - c) ** 2 + (x - d) ** 2 < 9] = 2
        pictures = np.eye(3)[masks] + rng.normal(0, 0.3, (8, SIZE, SIZE, 3))
        return pictures.astype("float32"), masks


def make_model():
    inputs = keras.Input((SIZE, SIZE, 3))
    x, skipped = inputs, []
    for filters in (8, 16):
        x = layers.SeparableConv2D(filters, 3, padding="same")(x)
        x = layers.Activation("relu")(layers.BatchNormalization()(x))
        skipped.append(x)
        x = layers.MaxPooling2D()(x)
    for filters in (16, 8):
        x = layers.UpSampling2D()(layers.Conv2DTranspose(filters, 3, padding="same")(x))
        x = layers.Concatenate()([x, skipped.pop()])
    outputs = layers.Conv2D(3, 3, activation="softmax", padding="same")(x)
    model = keras.Model(inputs, outputs)
    iou = keras.metrics.MeanIoU(3, sparse_y_pred=False, name="iou")
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy", iou])
    return model


# ---- ported ------------------------------------------------------------------------------------


def data(config):
    train = Shapes(20, config["seed"], workers=2)
    names = ["nothing", "square", "disc"]
    return Dataset(train, Shapes(4, 100), lambda: Shapes(4, 200), class_names=names)


def build(config):
    return make_model()
