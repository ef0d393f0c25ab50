"""A runner of its own for one family of experiments, built on vegab alone: copy it and change it.

python src/scripts/train_simple_cnn.py root results/simple_cnn/first --n_layers=2
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import vegab
from configs import registry


def train(config: dict[str, Any], save_path: str) -> None:
    """Train the small CNN on the digits into the folder SAVE_PATH."""
    import keras

    from src.data import get_digits
    from src.hooks import EpochLog, LearningCurve
    from src.models import build_simple_cnn
    from src.training_loop import training_loop

    keras.utils.set_random_seed(config["seed"])
    digits = get_digits(config)
    model = build_simple_cnn(config, digits.input_shape, digits.num_classes)
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    training_loop(
        model,
        digits.train,
        digits.valid,
        Path(save_path),
        num_epochs=config["num_epochs"],
        hooks=[EpochLog(), LearningCurve()],
    )


if __name__ == "__main__":
    vegab.wrap(registry, train, plugins=[vegab.MetaSaver()])
