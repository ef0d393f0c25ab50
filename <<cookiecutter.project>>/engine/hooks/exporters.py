"""A trained model as others can use it: a SavedModel that needs nothing of this project, and a
`.keras` file."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from engine.checkpoints import load_weights
from engine.hooks.base import Hook
from vegab.files import replacing_folder

log = logging.getLogger(__name__)
SAVED_MODEL = "saved_model"
KERAS_FILE = "model.keras"
PLAIN, SERIALIZED = "serving_default", "serving_examples"


def export(
    model: keras.Model, features: Any, serving: Any, output: Path, replace: bool = False
) -> dict[str, Any]:
    """Write `saved_model/` and `model.keras` into a new folder, or nothing at all.

    The SavedModel has the signature `serving_default`, which takes the features as tensors by name,
    and, where records are read, `serving_examples`, which takes serialized `tf.train.Example`s
    without labels: strings of shape (batch,). Both return the model's outputs by name.

    Args:
        model: with its weights.
        features: of a batch: arrays by name, in a tuple, or one.
        serving: what a feeder's `serving_features()` returns, or None.
        output: the folder to make; an empty one may be there.
        replace: put it in the place of one that is there.

    Returns:
        The signatures: what each takes, by name.

    Raises:
        FileExistsError: if the folder is there and not empty.
        ValueError: if the model cannot be written.
    """
    is_taken = output.exists() and (not output.is_dir() or any(output.iterdir()))
    if is_taken and not replace:
        raise FileExistsError(f"{output} is there already; give a new folder")
    with replacing_folder(output) as partial:
        specs = specs_of(model, features)
        archive = keras.export.ExportArchive()
        archive.track(model)

        def plain(inputs: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
            return by_name(model(like(features, inputs), training=False), "outputs")

        archive.add_endpoint(PLAIN, plain, input_signature=[specs])
        signatures: dict[str, Any] = {PLAIN: {name: _shown(s) for name, s in specs.items()}}
        if serving is not None:

            def from_examples(examples: tf.Tensor) -> dict[str, tf.Tensor]:
                return by_name(model(serving.parse(examples), training=False), "outputs")

            strings = tf.TensorSpec([None], tf.string, name="examples")
            archive.add_endpoint(SERIALIZED, from_examples, input_signature=[strings])
            signatures[SERIALIZED] = {"examples": _shown(strings)}
        archive.write_out(str(partial / SAVED_MODEL), verbose=False)
        model.save(partial / KERAS_FILE)
    return signatures


class Export(Hook):
    """Exports the model when training has ended, be it early, to `export/<name>`.

    `commit` is `model.h5`, the latest, or `model_best.h5`; for the others see `export`.
    """

    def __init__(self, name: str, commit: str, features: Any, serving: Any) -> None:
        self.name = name
        self.commit = commit
        self.features = features
        self.serving = serving

    def after_training(self) -> None:
        model, commit = self.run.model, self.run.root / self.commit
        if not commit.exists():
            log.warning("%s is not there, so nothing is exported to export/%s", commit, self.name)
            return
        weights = model.get_weights()
        try:
            load_weights(commit, model)
            output = self.run.root / "export" / self.name
            export(model, self.features, self.serving, output, replace=True)
        finally:
            model.set_weights(weights)


def specs_of(model: keras.Model, features: Any) -> dict[str, tf.TensorSpec]:
    """Return shape and dtype of each feature by name, with any number of examples.

    A functional model says which other dimensions may vary, too.
    """
    inputs = {tensor.name: tensor for tensor in getattr(model, "inputs", None) or []}
    specs = {}
    for name, value in by_name(features, "inputs").items():
        array = np.asarray(value)
        _, *shape = inputs[name].shape if name in inputs else array.shape
        dtype = tf.string if array.dtype.kind in "SUO" else tf.as_dtype(array.dtype)
        specs[name] = tf.TensorSpec([None, *shape], dtype, name=name)
    return specs


def by_name(values: Any, prefix: str) -> dict[str, Any]:
    """Return values by name; those that have none are `prefix`, or `prefix`_0, `prefix`_1, …."""
    if isinstance(values, Mapping):
        return dict(values)
    if isinstance(values, tuple | list):
        return {f"{prefix}_{number}": value for number, value in enumerate(values)}
    return {prefix: values}


def like(features: Any, inputs: Mapping[str, Any]) -> Any:
    """Return tensors that `by_name` has named in the shape in which the model takes them."""
    if isinstance(features, Mapping):
        return dict(inputs)
    tensors = [inputs[name] for name in by_name(features, "inputs")]
    return tuple(tensors) if isinstance(features, tuple | list) else tensors[0]


def _shown(spec: tf.TensorSpec) -> str:
    return f"{spec.dtype.name} {tuple(spec.shape)}"
