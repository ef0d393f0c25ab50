"""Contrastive learning: pictures with labels and more without, two optimizers, augmentation."""

import keras
import numpy as np
import tensorflow as tf
from keras import layers, ops

from src.data import DIGITS, Dataset

WIDTH = 16


def load_digits(begin, end):
    with np.load(DIGITS) as file:
        images, labels = (file[name][begin:end] for name in ("images", "labels"))
    return (images[..., None] / 16).astype("float32"), labels


def get_augmenter(zoom):
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.RandomTranslation(zoom / 2, zoom / 2),
            layers.RandomZoom((-zoom, 0.0), (-zoom, 0.0)),
            layers.RandomBrightness(zoom, value_range=(0, 1)),
        ]
    )


def get_encoder():
    convolution = layers.Conv2D(WIDTH, 3, strides=2, activation="relu")
    return keras.Sequential(
        [keras.Input((8, 8, 1)), convolution, layers.Flatten(), layers.Dense(WIDTH, "relu")]
    )


class ContrastiveModel(keras.Model):
    def __init__(self):
        super().__init__()
        self.temperature = 0.1
        self.contrastive_augmenter = get_augmenter(0.5)
        self.classification_augmenter = get_augmenter(0.2)
        self.encoder = get_encoder()
        self.projection_head = keras.Sequential(
            [keras.Input((WIDTH,)), layers.Dense(WIDTH, "relu"), layers.Dense(WIDTH)]
        )
        self.linear_probe = keras.Sequential([layers.Input((WIDTH,)), layers.Dense(10)])

    def compile(self, contrastive_optimizer, probe_optimizer, **kwargs):
        super().compile(**kwargs)
        self.contrastive_optimizer = contrastive_optimizer
        self.probe_optimizer = probe_optimizer
        self.probe_loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        self.contrastive_loss_tracker = keras.metrics.Mean(name="c_loss")
        self.contrastive_accuracy = keras.metrics.SparseCategoricalAccuracy(name="c_acc")
        self.probe_loss_tracker = keras.metrics.Mean(name="p_loss")
        self.probe_accuracy = keras.metrics.SparseCategoricalAccuracy(name="p_acc")

    @property
    def metrics(self):
        return [
            self.contrastive_loss_tracker,
            self.contrastive_accuracy,
            self.probe_loss_tracker,
            self.probe_accuracy,
        ]

    def contrastive_loss(self, one, other):
        one, other = ops.normalize(one, axis=1), ops.normalize(other, axis=1)
        similarities = ops.matmul(one, ops.transpose(other)) / self.temperature
        labels = ops.arange(ops.shape(one)[0])
        losses = []
        for logits in (similarities, ops.transpose(similarities)):
            self.contrastive_accuracy.update_state(labels, logits)
            losses.append(keras.losses.sparse_categorical_crossentropy(labels, logits, True))
        return ops.mean(losses)

    def train_step(self, data):
        (unlabeled, _), (labeled, labels) = data
        images = ops.concatenate((unlabeled, labeled), axis=0)
        views = [self.contrastive_augmenter(images, training=True) for _ in range(2)]
        with tf.GradientTape() as tape:
            projections = [self.projection_head(self.encoder(v, training=True)) for v in views]
            loss = self.contrastive_loss(*projections)
        weights = self.encoder.trainable_weights + self.projection_head.trainable_weights
        gradients = tape.gradient(loss, weights)
        self.contrastive_optimizer.apply_gradients(zip(gradients, weights, strict=True))
        self.contrastive_loss_tracker.update_state(loss)

        images = self.classification_augmenter(labeled, training=True)
        with tf.GradientTape() as tape:
            logits = self.linear_probe(self.encoder(images, training=False), training=True)
            loss = self.probe_loss(labels, logits)
        gradients = tape.gradient(loss, self.linear_probe.trainable_weights)
        weights = self.linear_probe.trainable_weights
        self.probe_optimizer.apply_gradients(zip(gradients, weights, strict=True))
        self.probe_loss_tracker.update_state(loss)
        self.probe_accuracy.update_state(labels, logits)
        return {m.name: m.result() for m in self.metrics}

    def test_step(self, data):
        images, labels = data
        logits = self.linear_probe(self.encoder(images, training=False), training=False)
        self.probe_loss_tracker.update_state(self.probe_loss(labels, logits))
        self.probe_accuracy.update_state(labels, logits)
        return {m.name: m.result() for m in self.metrics[2:]}


def make_model():
    model = ContrastiveModel()
    model.compile(keras.optimizers.Adam(), keras.optimizers.Adam(0.01))
    return model


# ---- ported ------------------------------------------------------------------------------------


def data(config):
    unlabeled, labeled = (
        tf.data.Dataset.from_tensor_slices(load_digits(*rows)) for rows in ((0, 1000), (1000, 1200))
    )

    def train(epoch, seed):
        parts = unlabeled.shuffle(1000, seed + epoch), labeled.shuffle(200, seed + epoch)
        return tf.data.Dataset.zip(parts[0].batch(50), parts[1].batch(10))

    return Dataset(train, load_digits(1200, 1500), lambda: load_digits(1500, 1797))


def build(config):
    return make_model()
