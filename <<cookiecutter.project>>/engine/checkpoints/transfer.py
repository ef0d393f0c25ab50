"""Gives a model weights of another run, and trains only some weights."""

import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import keras
import numpy as np

from engine.checkpoints.file import LATEST, verify, weights_in

KERAS_FILES = (".keras", ".weights.h5")
_frozen: WeakKeyDictionary[keras.Model, list[Any]] = WeakKeyDictionary()


def warm_start(model: keras.Model, checkpoint: Path, pattern: str = ".*") -> str:
    """Assign the weights in a checkpoint, a run's latest one, a `.keras` or a `.weights.h5` file to
    those of a model that have the same path, if that matches a regular expression from its
    beginning on; return a sentence that says how many.

    Raises ValueError if none is taken, or one has another shape; OSError without a checkpoint."""
    wanted = {w.path: w for w in model.weights if matching(pattern, w.path, "--warm_start_vars")}
    path = checkpoint / LATEST if checkpoint.is_dir() else checkpoint
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    if path.name.endswith(KERAS_FILES):
        saved = _from_keras(model, path)
    else:
        verify(path)
        saved = dict(weights_in(path))
    taken = sorted(wanted.keys() & saved.keys())
    if not taken:
        names, others = _some([weight.path for weight in model.weights]), _some(sorted(saved))
        there = f"the model's are {names}, the file's {others}"
        raise ValueError(f"{path} has no weight of the model that {pattern!r} matches; {there}")
    for name in taken:
        if (its := saved[name].shape) != (own := wanted[name].shape):
            both = f"with the shape {its}, the model with {tuple(own)}"
            raise ValueError(f"{path} has {name} {both}; exclude it by --warm_start_vars")
    for name in taken:
        wanted[name].assign(saved[name])
    left = sorted({weight.path for weight in model.weights} - {*taken})
    not_taken = f"; not {_some(left)}" if left else ""
    return f"warm start: {len(taken)} weights taken from {checkpoint}{not_taken}"


def _from_keras(model: keras.Model, path: Path) -> dict[str, np.ndarray]:
    """Return what Keras finds in a file of its own for the weights of a model, by path. Such a file
    knows layers, not paths: Keras reads it into the model; what it has not touched stays NaN."""
    before = [(weight, np.array(weight)) for weight in model.weights]
    floats = [weight for weight, value in before if np.issubdtype(value.dtype, np.floating)]
    try:
        for weight in floats:
            weight.assign(np.full(weight.shape, np.nan))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.load_weights(path, skip_mismatch=True)
        read = {weight.path: np.array(weight) for weight in floats}
    finally:
        for weight, value in before:
            weight.assign(value)
    return {name: value for name, value in read.items() if not np.isnan(value).all()}


def freeze(model: keras.Model, pattern: str) -> None:
    """Train only the weights whose path matches a regular expression from its beginning on."""
    trained = [w.path for w in model.trainable_weights if matching(pattern, w.path, "fine_tune")]
    if not trained:
        names = _some([weight.path for weight in model.trainable_weights])
        raise ValueError(f"fine_tune {pattern!r} matches no weight; there are {names}")
    others = [weight for weight in model.trainable_weights if weight.path not in trained]
    for weight in others:
        weight.trainable = False
    _frozen[model] = others


@contextmanager
def as_if_none_were_frozen(model: Any) -> Iterator[None]:
    """Within the block, weights are in the order in which Keras' HDF5 format has them."""
    frozen: Sequence[Any] = _frozen.get(model, []) if isinstance(model, keras.Model) else []
    for weight in frozen:
        weight.trainable = True
    try:
        yield
    finally:
        for weight in frozen:
            weight.trainable = False


def matching(pattern: str, path: str, key: str) -> bool:
    """Whether a path matches a regular expression from its beginning on; refuses an invalid one."""
    try:
        return re.match(pattern, path) is not None
    except re.error as error:
        raise ValueError(f"{key}: {pattern!r} is not a regular expression: {error}") from None


def _some(names: Sequence[str]) -> str:
    more = f", … ({len(names)} in all)" if len(names) > 8 else ""
    return ", ".join(names[:8]) + more if names else "none"
