"""Takes out, and puts back, what a callback or hook remembers between epochs.

The fields of Keras' own callbacks are listed here: a stranger's checkpoint must not set paths.
A callback of one's own takes part by `get_state` and `set_state`."""

import logging
import random
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np

from engine.checkpoints.file import DamagedCheckpointError

log = logging.getLogger(__name__)
SEEN = ("_batches_seen_since_last_saving", "_last_batch_seen")
FIELDS: dict[type, tuple[str, ...]] = {
    keras.callbacks.EarlyStopping: ("wait", "best", "best_epoch", "stopped_epoch", "best_weights"),
    keras.callbacks.ReduceLROnPlateau: ("wait", "best", "cooldown_counter"),
    keras.callbacks.ModelCheckpoint: ("best", "epochs_since_last_save", *SEEN, "_current_epoch"),
    keras.callbacks.SwapEMAWeights: ("_ema_weights_in_model",),
    keras.callbacks.TensorBoard: ("_global_train_batch", "_global_test_batch"),
}
# By these attributes they are told where to write.
PLACES = ("filename", "filepath", "log_dir", "backup_dir")


def get(callback: Any) -> dict[str, Any]:
    """Return the state of a callback or hook, JSON values and arrays; {} if none is known."""
    if hasattr(callback, "get_state"):
        return callback.get_state()
    return {n: getattr(callback, n) for n in fields_of(callback) if hasattr(callback, n)}


def fields_of(callback: Any) -> list[str]:
    """Return the names of the attributes of Keras' part of a callback that are its state."""
    return [name for kind in type(callback).__mro__ for name in FIELDS.get(kind, ())]


def put(callback: Any, state: Mapping[str, Any]) -> None:
    """Give a callback or hook the state that `get` returned, and nothing else."""
    if hasattr(callback, "set_state"):
        callback.set_state(state)
        return
    fields, name = fields_of(callback), type(callback).__name__
    if foreign := [key for key in state if key not in fields]:
        saved = f"of which {', '.join(fields) or 'nothing'} is saved; put a good copy back"
        what = f"it would set {', '.join(foreign)} of {name}, {saved}"
        raise DamagedCheckpointError(f"this is not a checkpoint of ours: {what}")
    for key, value in state.items():
        setattr(callback, key, value)


def get_all(callbacks: Sequence[Any]) -> dict[str, Any]:
    """Return the states of callbacks or hooks by place and class, of those that have one."""
    states = {f"{index} {type(item).__name__}": get(item) for index, item in enumerate(callbacks)}
    return {name: state for name, state in states.items() if state}


def put_all(callbacks: Sequence[Any], states: Mapping[str, Any]) -> None:
    """Give callbacks or hooks what `get_all` returned."""
    for index, item in enumerate(callbacks):
        if state := states.get(f"{index} {type(item).__name__}"):
            put(item, state)


def redirect(callbacks: Sequence[Any], folder: Path) -> None:
    """Let Keras' callbacks write into a folder, whatever file or folder they were given."""
    for number, callback in enumerate(callbacks):
        for name in PLACES:
            if getattr(callback, name, None):
                place = Path(getattr(callback, name))
                setattr(callback, name, str(folder / f"{number}-{place.name}"))


def attributes_of(thing: Any) -> dict[str, Any]:
    """Return what an object has in its `__dict__`, without asking the object itself."""
    try:
        return dict(object.__getattribute__(thing, "__dict__"))
    except AttributeError:
        return {}


def plain_attributes(thing: Any) -> dict[str, str]:
    """Return the plain values among an object's attributes as text, which shows any change."""
    values = {name: _as_text(value) for name, value in attributes_of(thing).items()}
    return {name: text for name, text in values.items() if text is not None}


def _as_text(value: Any) -> str | None:
    """Return numbers, text, arrays, generators and what holds such as text; None for others."""
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {value.shape} {hash(value.tobytes())}"
    if value is None or isinstance(value, int | float | complex | str | bytes | np.generic):
        return repr(value)
    if isinstance(value, random.Random):
        return str(hash(value.getstate()))
    if isinstance(value, np.random.Generator):
        return str(value.bit_generator.state)
    # Not any mapping: to read one of lazy results would compute them.
    if isinstance(value, dict):
        return str([(repr(key), _as_text(item)) for key, item in value.items()])
    if isinstance(value, list | tuple | set | frozenset | deque):
        return str([_as_text(item) for item in value])
    return None
