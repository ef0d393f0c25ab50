"""Defines an iterator of each kind on the bundled digits: copy the one nearest to yours.

`configs/iterator_*.yaml` and `configs/gan.yaml` train them; PyTorch: `torch_classifier.py`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import layers, ops
from matplotlib.image import imsave

from engine import iterators
from engine.hooks import Hook, tile
from engine.pictures import draw_through_training
from src.data import get_digits

Config = Mapping[str, Any]


class Digits(iterators.DatasetMixin):
    """Handwritten digits: `image`, float32 of shape (8, 8, 1) in [-1, 1], and `label`, 0 to 9."""

    split = "train"

    def __init__(self, config: Config) -> None:
        digits = get_digits({"batch_size": 1, "seed": 0, "augmented": False})
        if self.split == "train":
            # Only the arrays are used: in which order, the iterator decides.
            images, labels = digits.train.features / 16, digits.train.labels
        else:
            assert digits.valid is not None
            images, labels = digits.valid
        self.images = (2 * images - 1).astype(np.float32)
        self.labels = {"label": labels.astype(np.int32)}

    def __len__(self) -> int:
        return len(self.images)

    def get_example(self, index: int) -> dict[str, Any]:
        return {"image": self.images[index], "label": self.labels["label"][index]}


class ValidationDigits(Digits):
    """The digits to validate on."""

    split = "validation"


class SoftmaxRegression:
    """A linear classifier in NumPy."""

    def __init__(self, config: Config) -> None:
        self.weights = np.zeros((64, 10))

    def probabilities(self, image: np.ndarray) -> np.ndarray:
        """Return probabilities, float64 of shape (batch, 10)."""
        logits = image.reshape(len(image), 64) @ self.weights
        exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
        return exponentials / exponentials.sum(axis=1, keepdims=True)

    def get_state(self) -> dict[str, Any]:
        """Return what has to survive a kill."""
        return {"weights": self.weights}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Take back what `get_state` returned."""
        self.weights = np.array(state["weights"])


class NumpyIterator(iterators.PyHookedModelIterator):
    """Trains a `SoftmaxRegression` by gradient descent."""

    def step_ops(self) -> Any:
        return {"train_op": self.train_op}

    def train_op(
        self, model: SoftmaxRegression, image: np.ndarray, label: np.ndarray, **_: Any
    ) -> float:
        """Make a step; return the loss before it."""
        probabilities = model.probabilities(image)
        errors = probabilities - np.eye(10)[label]
        model.weights -= self.config["lr"] * image.reshape(len(image), 64).T @ errors / len(image)
        return cross_entropy(probabilities, label)

    def validate(self, batch: Mapping[str, Any]) -> dict[str, float]:
        probabilities = self.model.probabilities(batch["image"])
        accuracy = float((probabilities.argmax(axis=1) == batch["label"]).mean())
        return {"loss": cross_entropy(probabilities, batch["label"]), "accuracy": accuracy}

    def eval_op(
        self, model: SoftmaxRegression, image: np.ndarray, label: np.ndarray, **_: Any
    ) -> dict[str, Any]:
        return {"labels": {"prediction": model.probabilities(image).argmax(axis=1)}}


def cross_entropy(probabilities: np.ndarray, label: np.ndarray) -> float:
    """Return the mean of -log of the labels' probabilities."""
    return float(-np.log(probabilities[np.arange(len(label)), label]).mean())


def build_classifier(config: Config) -> keras.Model:
    """Return a network whose input is `image` and whose output are logits."""
    inputs = keras.Input((8, 8, 1), name="image")
    x = layers.Flatten()(inputs)
    x = layers.Dense(config.get("n_units", 64), activation="relu")(x)
    x = layers.Dropout(0.2)(x)
    return keras.Model(inputs, layers.Dense(10)(x), name="classifier")


class ClassifierIterator(iterators.TemplateIterator):
    """Trains, logs and evaluates a classifier by operations of its own."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.optimizer = keras.optimizers.Adam(self.config["lr"])
        self.optimizer.build(self.model.trainable_variables)
        self.train_on = tf.function(self._train_on)

    def step_op(self, model: keras.Model, **batch: Any) -> dict[str, Any]:
        """Return the operations, none of which is computed unless somebody reads it."""
        image, label = batch["image"], batch["label"]

        def train_op() -> float:
            return float(self.train_on(image, label))

        def log_op() -> dict[str, Any]:
            logits = ops.convert_to_numpy(model(image, training=False))
            accuracy = float((logits.argmax(axis=1) == label).mean())
            fixed = self.get_fixed_examples("train")
            return {"scalars": {"accuracy": accuracy}, "images": {"fixed": fixed["image"]}}

        def eval_op() -> dict[str, Any]:
            logits = ops.convert_to_numpy(model(image, training=not self.test_mode))
            return {"logits": logits, "labels": {"prediction": logits.argmax(axis=1)}}

        return {"train_op": train_op, "log_op": log_op, "eval_op": eval_op}

    def _train_on(self, image: Any, label: Any) -> Any:
        with tf.GradientTape() as tape:
            loss = sparse_cross_entropy(label, self.model(image, training=True))
        variables = self.model.trainable_variables
        self.optimizer.apply(tape.gradient(loss, variables), variables)
        return loss


class CompiledIterator(iterators.TFHookedModelIterator):
    """Trains the same classifier by a step that the iterator compiles."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.optimizer = keras.optimizers.Adam(self.config["lr"])
        self.optimizer.build(self.model.trainable_variables)

    def step_ops(self) -> Any:
        return {"train_op": self.train_op}

    def train_op(self, model: keras.Model, image: Any, label: Any, **_: Any) -> Any:
        with tf.GradientTape() as tape:
            loss = sparse_cross_entropy(label, model(image, training=self.is_training))
        variables = model.trainable_variables
        self.optimizer.apply(tape.gradient(loss, variables), variables)
        return loss


class ClassifierTrainer(iterators.TFBaseTrainer):
    """Trains the same classifier by its loss only, whose name is in the paths of the variables."""

    def make_loss_ops(self, model: keras.Model, **batch: Any) -> dict[str, Any]:
        logits = model(batch["image"], training=self.is_training)
        return {"dense": sparse_cross_entropy(batch["label"], logits)}

    def make_log_ops(self, model: keras.Model, **batch: Any) -> dict[str, Any]:
        predictions = ops.argmax(model(batch["image"], training=False), axis=1)
        hits = ops.equal(predictions, ops.cast(batch["label"], predictions.dtype))
        return {"accuracy": ops.mean(ops.cast(hits, "float32"))}


def sparse_cross_entropy(label: Any, logits: Any) -> Any:
    """Return the mean cross entropy, a scalar."""
    return ops.mean(ops.sparse_categorical_crossentropy(label, logits, from_logits=True))


class GAN(keras.Model):
    """A generator of digits, and a critic that tells them from real ones."""

    def __init__(self, config: Config) -> None:
        super().__init__(name="gan")
        self.num_noise = config.get("n_noise", 16)
        draw = [keras.Input((self.num_noise,)), layers.Dense(64, activation="relu")]
        draw += [layers.Dense(64, activation="tanh"), layers.Reshape((8, 8, 1))]
        self.generator = keras.Sequential(draw, name="generator")
        judge = [keras.Input((8, 8, 1)), layers.Flatten()]
        judge += [layers.Dense(64, activation="leaky_relu"), layers.Dropout(0.2), layers.Dense(1)]
        self.critic = keras.Sequential(judge, name="critic")
        self.seed_generator = keras.random.SeedGenerator(config["seed"])
        self.built = True

    def generate(self, number: Any) -> Any:
        """Return images, float32 of shape (number, 8, 8, 1) in [-1, 1]."""
        noise = keras.random.normal((number, self.num_noise), seed=self.seed_generator)
        return self.generator(noise)


class GANTrainer(iterators.TFFrequencyTrainer):
    """Trains generator and critic in turn, by the losses of Goodfellow et al. (2014)."""

    opt_frequency = {"generator": 1, "critic": 1}  # noqa: RUF012

    def make_loss_ops(self, model: GAN, **batch: Any) -> dict[str, Any]:
        real = batch["image"]
        fake = model.generate(ops.shape(real)[0])
        on_real = model.critic(real, training=self.is_training)
        on_fake = model.critic(fake, training=self.is_training)
        return {
            "generator": ops.mean(ops.softplus(-on_fake)),
            "critic": ops.mean(ops.softplus(-on_real)) + ops.mean(ops.softplus(on_fake)),
        }

    def eval_op(self, model: GAN, **batch: Any) -> dict[str, Any]:
        return {"image": model.generate(ops.shape(batch["image"])[0])}


class Samples(Hook):
    """Draws what the generator makes of the same noise after epochs 1, 2, 4, 8, … and the last,
    and at the end all of these side by side, as `train/samples.png`."""

    only_tells = True

    def after_epoch(self, epoch: int) -> None:
        if epoch & (epoch + 1) and epoch + 1 < self.run.num_epochs:
            return
        gan: GAN = self.run.model
        images = gan.generator(keras.random.normal((16, gan.num_noise), seed=0))
        Path(self.train).mkdir(exist_ok=True)
        path = f"{self.train}/samples_{self.run.global_step:08d}.png"
        imsave(path, tile(ops.convert_to_numpy(images))[..., 0], cmap="gray", vmin=-1, vmax=1)

    def after_training(self) -> None:
        draw_through_training(Path(self.train))


class Autoencoder(keras.Model):
    """An encoder with a classifier and a decoder on top."""

    def __init__(self, config: Config) -> None:
        super().__init__(name="autoencoder")
        encode = [keras.Input((8, 8, 1)), layers.Flatten(), layers.Dense(32, activation="relu")]
        self.encoder = keras.Sequential(encode, name="encoder")
        classify = [keras.Input((32,)), layers.Dense(10)]
        self.classifier = keras.Sequential(classify, name="classifier")
        decode = [keras.Input((32,)), layers.Dense(64), layers.Reshape((8, 8, 1))]
        self.decoder = keras.Sequential(decode, name="decoder")
        self.built = True


class AutoencoderTrainer(iterators.TFListTrainer):
    """Learns to classify at one step, and to decode, half as fast, at the next."""

    def make_loss_ops(self, model: Autoencoder, **batch: Any) -> list[dict[str, Any]]:
        code = model.encoder(batch["image"])
        class_loss = sparse_cross_entropy(batch["label"], model.classifier(code))
        error = ops.mean(ops.square(model.decoder(code) - batch["image"]))
        return [{"encoder": class_loss, "classifier": class_loss}, {"decoder": error}]

    def get_learning_rate_multiplier(self, index: int) -> float:
        return 1.0 if index == 0 else 0.5

    def eval_op(self, model: Autoencoder, **batch: Any) -> dict[str, Any]:
        return {"decoded": model.decoder(model.encoder(batch["image"]))}


def accuracy(
    root: str,
    data_in: iterators.DatasetMixin,
    data_out: iterators.DatasetMixin,
    config: Config,
    **_: Any,
) -> dict[str, Any]:
    """Return the share of predictions that are the labels, as a callback of evaluation."""
    hits = data_out.labels["prediction"] == data_in.labels["label"]
    return {"scalars": {"accuracy": float(hits.mean())}}
