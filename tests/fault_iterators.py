"""Iterators whose state is easily lost: the fault tests put this file into a project's `src`."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import keras
import numpy as np

from engine.iterators.datasets import DatasetMixin
from src.examples.iterators import (
    ClassifierIterator,
    ClassifierTrainer,
    NumpyIterator,
    SoftmaxRegression,
)


class Few(DatasetMixin):
    """Images of noise with labels, `n_examples` of them; every look adds noise of its own."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        generator = np.random.default_rng(1)
        self.images = generator.uniform(-1, 1, (config["n_examples"], 8, 8, 1)).astype(np.float32)
        self.labels = {"label": np.arange(len(self.images)) % 10}

    def __len__(self) -> int:
        return len(self.images)

    def get_example(self, index: int) -> dict[str, Any]:
        noise = self.prng.normal(0, 0.1, (8, 8, 1)).astype(np.float32)
        return {"image": self.images[index] + noise, "label": np.int32(index % 10)}


class CountingRegression(SoftmaxRegression):
    """A classifier in NumPy that counts its updates."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        self.updates = 0

    def get_state(self) -> dict[str, Any]:
        return super().get_state() | {"updates": self.updates}

    def set_state(self, state: Mapping[str, Any]) -> None:
        super().set_state(state)
        self.updates = state["updates"]


class DrawingIterator(NumpyIterator):
    """Draws from the generators of Python and NumPy; keeps a momentum, which is no model's."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.velocity = np.zeros((64, 10))

    def train_op(self, model: Any, image: np.ndarray, label: np.ndarray, **batch: Any) -> float:
        before = model.weights.copy()
        noisy = random.uniform(0.5, 1.5) * image + np.random.normal(0, 0.1, image.shape)
        loss = super().train_op(model, noisy, label, **batch)
        self.velocity = 0.9 * self.velocity + model.weights - before
        model.weights = before + self.velocity
        model.updates += 1
        return loss

    def get_state(self) -> dict[str, Any]:
        return super().get_state() | {"velocity": self.velocity}

    def set_state(self, state: Mapping[str, Any]) -> None:
        super().set_state(state)
        self.velocity = np.array(state["velocity"])


class SavingIterator(ClassifierIterator):
    """Saves to files: a mean of losses by which the rate falls, and where the worst batch was."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Its variables come into being by the first step, which a resume has to make for that.
        self.optimizer = keras.optimizers.Adam(self.config["lr"])
        self.mean_loss = 3.0
        self.worst = np.zeros(2)

    def step_op(self, model: keras.Model, **batch: Any) -> dict[str, Any]:
        ops = super().step_op(model, **batch)

        def train_op() -> dict[str, float]:
            self.optimizer.learning_rate = self.config["lr"] * self.mean_loss
            loss = ops["train_op"]()
            self.mean_loss = 0.7 * self.mean_loss + 0.3 * loss
            if loss > self.worst[0]:
                self.worst = np.array([loss, self.get_global_step()])
            return {"loss": loss, "mean_loss": self.mean_loss}

        return ops | {"train_op": train_op}

    def save(self, checkpoint_path: str) -> None:
        folder = Path(checkpoint_path)
        (folder / "deep").mkdir(parents=True)
        (folder / "mean.json").write_text(json.dumps(self.mean_loss))
        np.save(folder / "deep" / "worst.npy", self.worst)

    def restore(self, checkpoint_path: str) -> None:
        folder = Path(checkpoint_path)
        self.mean_loss = json.loads((folder / "mean.json").read_text())
        self.worst = np.load(folder / "deep" / "worst.npy")


class CountingTrainer(ClassifierTrainer):
    """Has a variable of its own, which training counts up."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.updates = keras.Variable(0, dtype="int32", trainable=False, name="updates")

    def train_op(self, model: Any, **batch: Any) -> dict[str, Any]:
        self.updates.assign_add(1)
        return super().train_op(model, **batch)
