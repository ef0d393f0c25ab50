"""Writes a trained model for others: its weights, and as a `.keras` file, SavedModel and ONNX."""

import importlib.util
import logging
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from engine.building import reason_of
from engine.checkpoints import load_weights
from engine.hooks.base import Hook
from engine.trees import named
from vegab.files import replacing_folder

log = logging.getLogger(__name__)
WEIGHTS, KERAS_FILE, ONNX = "model.weights.h5", "model.keras", "model.onnx"
SAVED_MODEL = "saved_model"
PLAIN, SERIALIZED = "serving_default", "serving_examples"


def export(
    model: keras.Model, features: Any, serving: Any, output: Path, replace: bool = False
) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """Write a model into a new folder in each form that it can have, or nothing at all.

    The SavedModel's signature `serving_default` takes the features of a batch as tensors by name;
    with `serving`, a feeder's `serving_features()`, `serving_examples` takes serialized examples.
    Return what each signature takes, and why forms are not there, by name. Raises FileExistsError
    if `output` is not an empty folder, unless it may `replace` it; OSError if there is no form."""
    is_taken = output.exists() and (not output.is_dir() or any(output.iterdir()))
    if is_taken and not replace:
        raise FileExistsError(f"{output} already exists; give a new folder")
    # Keras says so of a model that was never called, whose weights are there all the same.
    model.built = True
    missing: dict[str, str] = {}
    signatures: dict[str, dict[str, str]] = {}
    forms: dict[str, Callable[[Path], Any]] = {
        WEIGHTS: model.save_weights,
        KERAS_FILE: model.save,
        SAVED_MODEL: lambda path: signatures.update(_save(model, features, serving, path)),
    }
    if importlib.util.find_spec("tf2onnx"):
        forms[ONNX] = lambda path: _save_onnx(model, features, path)
    else:
        missing[ONNX] = "tf2onnx is not installed"
    with replacing_folder(output) as partial:
        for name, write in forms.items():
            try:
                write(partial / name)
            except Exception as error:  # what a model cannot do, it says in its own way
                log.debug("%s", name, exc_info=error)
                missing[name] = reason_of(error)
                begun = partial / name
                shutil.rmtree(begun) if begun.is_dir() else begun.unlink(missing_ok=True)
        if not any(partial.iterdir()):
            raise OSError(f"the model cannot be written in any form; {shown(missing)}")
    return signatures, missing


def shown(missing: Mapping[str, str]) -> str:
    """Return which forms are missing, and why, in one sentence."""
    return "not written: " + "; ".join(f"{name} ({reason})" for name, reason in missing.items())


def _save(model: keras.Model, features: Any, serving: Any, path: Path) -> dict[str, dict[str, str]]:
    """Write a SavedModel; return what its signatures take."""
    specs = specs_of(model, features)
    archive = keras.export.ExportArchive()
    archive.track(model)

    def plain(inputs: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        values = keras.tree.pack_sequence_as(features, [inputs[name] for name in specs])
        return named(model(values, training=False), "outputs")

    archive.add_endpoint(PLAIN, plain, input_signature=[specs])
    signatures = {PLAIN: {name: _shown(spec) for name, spec in specs.items()}}
    if serving is not None:

        def from_examples(examples: tf.Tensor) -> dict[str, tf.Tensor]:
            return named(model(serving.parse(examples), training=False), "outputs")

        strings = tf.TensorSpec([None], tf.string, name="examples")
        archive.add_endpoint(SERIALIZED, from_examples, input_signature=[strings])
        signatures[SERIALIZED] = {"examples": _shown(strings)}
    archive.write_out(str(path), verbose=False)
    return signatures


def _save_onnx(model: keras.Model, features: Any, path: Path) -> None:
    """Write an ONNX file; check it: the exporter also writes operations that ONNX lacks."""
    logging.getLogger("tf2onnx").setLevel("CRITICAL")
    specs = keras.tree.pack_sequence_as(features, list(specs_of(model, features).values()))
    model.export(path, "onnx", verbose=False, input_signature=[specs])
    importlib.import_module("onnx.checker").check_model(str(path))


class Export(Hook):
    """Exports a checkpoint, `model.h5` or `model_best.h5`, to `export/<name>` after training."""

    def __init__(self, name: str, commit: str, features: Any, serving: Any) -> None:
        self.name, self.commit, self.features, self.serving = name, commit, features, serving

    def after_training(self) -> None:
        model, commit = self.run.model, self.run.root / self.commit
        if not commit.exists():
            log.warning("%s is not there, so nothing is exported to export/%s", commit, self.name)
            return
        weights = model.get_weights()
        try:
            load_weights(commit, model)
            output = self.run.root / "export" / self.name
            _, missing = export(model, self.features, self.serving, output, replace=True)
            if missing.keys() - {ONNX}:
                log.warning("export/%s: %s", self.name, shown(missing))
        finally:
            model.set_weights(weights)


def specs_of(model: keras.Model, features: Any) -> dict[str, tf.TensorSpec]:
    """Return shape and dtype of each feature by name; a functional model says what may vary."""
    values = named(features, "inputs")
    inputs = getattr(model, "inputs", None) or []
    names = values if len(values) == len(inputs) else [tensor.name for tensor in inputs]
    shapes = {name: tensor.shape for name, tensor in zip(names, inputs, strict=True)}
    specs = {}
    for name, array in ((name, np.asarray(value)) for name, value in values.items()):
        shape: Any = shapes.get(name, array.shape)
        dtype = tf.string if array.dtype.kind in "SUO" else tf.as_dtype(array.dtype)
        specs[name] = tf.TensorSpec([None, *shape[1:]], dtype, name=name)
    return specs


def _shown(spec: tf.TensorSpec) -> str:
    return f"{spec.dtype.name} {tuple(spec.shape)}"
