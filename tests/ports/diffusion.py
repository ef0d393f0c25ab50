"""A denoising diffusion model: a step of its own, a moving average of the network, no labels."""

import keras
import numpy as np
import tensorflow as tf
from keras import layers, ops

from src.data import DIGITS, Dataset

EMBEDDED, STEPS = 8, 5


def load_images():
    with np.load(DIGITS) as file:
        return (file["images"][..., None] / 16).astype("float32")


@keras.saving.register_keras_serializable()
def sinusoidal_embedding(x):
    speeds = 2 * np.pi * ops.exp(ops.linspace(ops.log(1.0), ops.log(100.0), EMBEDDED // 2))
    return ops.concatenate([ops.sin(speeds * x), ops.cos(speeds * x)], axis=3)


def make_network():
    noisy, variances = keras.Input((8, 8, 1)), keras.Input((1, 1, 1))
    embedding = layers.Lambda(sinusoidal_embedding, output_shape=(1, 1, EMBEDDED))(variances)
    x = layers.Concatenate()(
        [layers.Conv2D(8, 1)(noisy), layers.UpSampling2D(8, interpolation="nearest")(embedding)]
    )
    skip = x = layers.Conv2D(16, 3, padding="same", activation="swish")(x)
    x = layers.Conv2D(16, 3, padding="same", activation="swish")(layers.AveragePooling2D(2)(x))
    x = layers.Concatenate()([layers.UpSampling2D(interpolation="bilinear")(x), skip])
    x = layers.Conv2D(1, 1, kernel_initializer="zeros")(x)
    return keras.Model([noisy, variances], x, name="network")


class DiffusionModel(keras.Model):
    def __init__(self):
        super().__init__()
        self.normalizer = layers.Normalization()
        self.network = make_network()
        self.ema_network = keras.models.clone_model(self.network)

    def compile(self, **kwargs):
        super().compile(**kwargs)
        self.noise_loss_tracker = keras.metrics.Mean(name="n_loss")
        self.image_loss_tracker = keras.metrics.Mean(name="i_loss")

    @property
    def metrics(self):
        return [self.noise_loss_tracker, self.image_loss_tracker]

    def diffusion_schedule(self, times):
        start, end = ops.arccos(0.95), ops.arccos(0.02)
        angles = start + times * (end - start)
        return ops.sin(angles), ops.cos(angles)

    def denoise(self, noisy, noise_rates, signal_rates, training):
        network = self.network if training else self.ema_network
        noises = network([noisy, noise_rates**2], training=training)
        return noises, (noisy - noise_rates * noises) / signal_rates

    def generate(self, number):
        images = noisy = keras.random.normal((number, 8, 8, 1))
        for step in range(STEPS):
            times = ops.ones((number, 1, 1, 1)) - step / STEPS
            noise_rates, signal_rates = self.diffusion_schedule(times)
            noises, images = self.denoise(noisy, noise_rates, signal_rates, training=False)
            noise_rates, signal_rates = self.diffusion_schedule(times - 1 / STEPS)
            noisy = signal_rates * images + noise_rates * noises
        return self.normalizer.mean + images * self.normalizer.variance**0.5

    def step(self, images, training):
        images = self.normalizer(images, training=training)
        number = ops.shape(images)[0]
        noises = keras.random.normal((number, 8, 8, 1))
        times = keras.random.uniform((number, 1, 1, 1))
        noise_rates, signal_rates = self.diffusion_schedule(times)
        noisy = signal_rates * images + noise_rates * noises
        found, found_images = self.denoise(noisy, noise_rates, signal_rates, training)
        self.image_loss_tracker.update_state(self.loss(images, found_images))
        loss = self.loss(noises, found)
        self.noise_loss_tracker.update_state(loss)
        return loss

    def train_step(self, images):
        with tf.GradientTape() as tape:
            loss = self.step(images, training=True)
        gradients = tape.gradient(loss, self.network.trainable_weights)
        self.optimizer.apply_gradients(zip(gradients, self.network.trainable_weights, strict=True))
        for weight, ema_weight in zip(self.network.weights, self.ema_network.weights, strict=True):
            ema_weight.assign(0.99 * ema_weight + 0.01 * weight)
        return {m.name: m.result() for m in self.metrics}

    def test_step(self, images):
        self.step(images, training=False)
        return {m.name: m.result() for m in self.metrics}


def make_model():
    model = DiffusionModel()
    model.normalizer.adapt(load_images()[:1000])
    optimizer = keras.optimizers.AdamW(learning_rate=1e-3, weight_decay=1e-4)
    model.compile(optimizer=optimizer, loss=keras.losses.mean_absolute_error)
    return model


# ---- ported ------------------------------------------------------------------------------------


def data(config):
    images = tf.data.Dataset.from_tensor_slices(load_images())
    return Dataset(
        lambda epoch, seed: images.take(1000).shuffle(1000, seed + epoch).batch(64),
        images.skip(1000).take(300).batch(64),
        lambda: images.skip(1300).batch(64),
    )


def build(config):
    return make_model()
