#!/usr/bin/env python
"""Trains one family of experiments with its own settings, on vegab only: copy it and change it.

./src/scripts/train_simple_CNN.py root results/simple_cnn/first --n_layers=10
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import vegab
from vegab import Key

registry = vegab.ConfigRegistry()
SETTINGS = {
    "n_filters": Key(32, "filters of the first block; twice as many after each pooling"),
    "n_layers": Key(2, "blocks of convolution, normalisation and pooling, down to one pixel"),
    "dropout": Key(0.2, "dropout rate before the last layer"),
    "augmented": Key(True, "move training images at random"),
    "batch_size": Key(32, "examples per step"),
    "learning_rate": Key(0.001, "learning rate of Adam"),
    "num_epochs": Key(20, "epochs in all; a larger number continues a finished run"),
    "seed": Key(0, "seed of initial weights, order of examples, augmentation and dropout"),
}
registry.set_root_config(SETTINGS)


def train(config: dict[str, Any], save_path: str) -> None:
    """Train the small CNN on the digits into the folder SAVE_PATH."""
    import keras

    from engine.hooks import EpochLog, LearningCurve
    from engine.training import Session, work_on
    from src.data import get_digits
    from src.models import build_simple_cnn
    from src.training_loop import training_loop

    keras.utils.set_random_seed(config["seed"])
    digits = get_digits(config)
    model = build_simple_cnn(config, input_shape=(8, 8, 1), num_classes=10)
    adam = keras.optimizers.Adam(config["learning_rate"])
    model.compile(adam, loss="sparse_categorical_crossentropy", metrics=["accuracy"])
    work = work_on(model, digits.train, digits.valid)
    hooks = [EpochLog(), LearningCurve()]
    training_loop(Session(Path(save_path), work, hooks=hooks, num_epochs=config["num_epochs"]))


if __name__ == "__main__":
    vegab.wrap(registry, train, plugins=[vegab.MetaSaver()])
