"""Where everything lies in a commit's HDF5 file, so that writing one is no more than copying.

HDF5 and Keras lay out the file once, with all values zero. What is left of that are the bytes
between the arrays, and each array's place; a commit is these bytes with the arrays of the moment
copied into their places. That takes a tenth of the time that HDF5 would, and the training is not
held up by it.
"""

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import h5py
import keras
import numpy as np

# Not part of Keras' public face, which takes a path alone; the public function calls it.
from engine import keras_private
from engine.checkpoints.file import ARRAY, HISTORY, SIGNATURE, STATE, TEXT, USER_BLOCK
from engine.checkpoints.transfer import as_if_none_were_frozen
from engine.devices import replicas
from engine.trees import map_leaves

# What grows, grows by so much at a time: the layout is made anew then.
TEXT_BLOCK = 4096  # bytes of JSON
HISTORY_BLOCK = 256  # rows
# Keras writes these into the file as they were given, and then cannot read them.
FULL_NAMES = {
    "mse": "mean_squared_error",
    "mae": "mean_absolute_error",
    "mape": "mean_absolute_percentage_error",
    "msle": "mean_squared_logarithmic_error",
    "kld": "kl_divergence",
    "bce": "binary_crossentropy",
}


class _Sparse(NamedTuple):
    """A file of `size` bytes without its arrays: offset and bytes of what lies between them."""

    size: int
    pieces: list[tuple[int, bytes]]

    def filled(self) -> np.ndarray:
        """Return the file with zeros in all arrays, as uint8 of shape (size,)."""
        content = np.zeros(self.size, np.uint8)
        for offset, piece in self.pieces:
            content[offset : offset + len(piece)] = np.frombuffer(piece, np.uint8)
        return content


class CommitLayout:
    """Puts commits of one model together.

    Args:
        model: with weights, metrics and optimizer variables made, or None. It is described as it is
            now, so this comes before anything is restored.
        variables: by group, the variables of which a commit holds the values; those of "weights"
            are Keras' own where it can write the model.
        num_replicas: copies of the model.
    """

    def __init__(
        self,
        model: keras.Model | None,
        variables: Mapping[str, Sequence[Any]],
        num_replicas: int = 1,
    ) -> None:
        content = io.BytesIO()
        with h5py.File(content, "w", userblock_size=USER_BLOCK) as file:
            names = _write_model(model, file) if model is not None else []
            for group, members in variables.items():
                if group == "weights" and names:
                    continue
                for index, variable in enumerate(members):
                    name = f"{STATE}/{group}/{index:05}"
                    each = (num_replicas,) if replicas.has_one_each(variable) else ()
                    zeros = np.zeros((*each, *variable.shape), _dtype(variable))
                    dataset = file.create_dataset(name, data=zeros)
                    dataset.attrs["path"] = path_of(variable)
                    if each:
                        dataset.attrs[replicas.NUM_REPLICAS] = num_replicas
                    names.append(name)
                file.require_group(f"{STATE}/{group}")
        self._names = names
        self._model = _without_arrays(content, names)[0]
        self._key: Any = None
        self._file = self._model
        self._places: list[int] = []

    def put_together(
        self, values: Sequence[np.ndarray], state: Mapping[str, Any], history: np.ndarray
    ) -> np.ndarray:
        """Return the bytes of a commit, uint8; they depend on nothing but model and arguments.

        Args:
            values: an array for each variable, in the order of the groups.
            state: JSON values, and arrays in place of some.
            history: float64 of shape (num_rows, num_columns).
        """
        arrays: list[np.ndarray] = []
        text = json.dumps(_take_arrays(state, arrays)).encode()
        grown = np.zeros((-(-len(history) // HISTORY_BLOCK) * HISTORY_BLOCK, history.shape[1]))
        grown[: len(history)] = history
        width = -(-len(text) // TEXT_BLOCK) * TEXT_BLOCK
        self._lay_out(width, grown, arrays)
        content = self._file.filled()
        written: list[np.ndarray] = [np.frombuffer(text, np.uint8), grown, *arrays]
        for offset, array in zip(self._places, [*values, *written], strict=True):
            if array.size:
                flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
                content[offset : offset + flat.size] = flat
        digest = hashlib.sha256(content.data[USER_BLOCK:]).hexdigest()
        head = (SIGNATURE + digest.encode()).ljust(USER_BLOCK, b"\0")
        content[:USER_BLOCK] = np.frombuffer(head, np.uint8)
        return content

    def _lay_out(self, width: int, history: np.ndarray, arrays: Sequence[np.ndarray]) -> None:
        """Make room for so much text, history, and arrays of these shapes."""
        key = (width, history.shape, [(array.shape, str(array.dtype)) for array in arrays])
        if key == self._key:
            return
        content = io.BytesIO(self._model.filled().tobytes())
        names = [*self._names, TEXT, HISTORY]
        with h5py.File(content, "r+") as file:
            file.create_dataset(TEXT, data=np.zeros((), f"S{width}"))
            file.create_dataset(HISTORY, data=np.zeros_like(history))
            for index, array in enumerate(arrays):
                name = f"{STATE}/arrays/{index:05}"
                file.create_dataset(name, data=np.zeros_like(array))
                names.append(name)
        self._file, self._places = _without_arrays(content, names)
        self._key = key


def _without_arrays(content: io.BytesIO, names: Sequence[str]) -> tuple[_Sparse, list[int]]:
    """Return a file without some of its datasets' bytes, and where each of these begins."""
    places, pieces, end = [], [], 0
    whole = content.getvalue()
    with h5py.File(content, "r") as file:
        datasets = [file[name] for name in names]
        places = [dataset.id.get_offset() if dataset.size else 0 for dataset in datasets]
        sizes = [dataset.nbytes for dataset in datasets]
    for place, size in sorted(zip(places, sizes, strict=True)):
        if size:
            pieces.append((end, whole[end:place]))
            end = place + size
    pieces.append((end, whole[end:]))
    return _Sparse(len(whole), pieces), places


def _write_model(model: keras.Model, file: h5py.File) -> list[str]:
    """Write what `model.save("model.h5")` does; return the dataset of each of `model.weights`.

    A subclassed model has no config that Keras could write: then the list is empty, and so is the
    file. The live model stays as it is.
    """
    try:
        with as_if_none_were_frozen(model):
            keras_private.write_hdf5(model, file)
    except NotImplementedError:
        file.clear()
        return []
    file.pop("optimizer_weights", None)  # load_model does not read it, and ours is complete
    if "training_config" in file.attrs:
        training_config = json.loads(file.attrs["training_config"])
        training_config["loss"] = map_leaves(
            training_config.get("loss"),
            lambda loss: FULL_NAMES.get(loss.lower(), loss) if isinstance(loss, str) else loss,
        )
        file.attrs["training_config"] = json.dumps(training_config)
    with as_if_none_were_frozen(model):
        return _names_of_weights(model, file)


def _names_of_weights(model: keras.Model, file: h5py.File) -> list[str]:
    """Return the dataset of each of `model.weights`, in that order."""
    found: dict[int, str] = {}
    group = file["model_weights"]
    for layer in model.layers:
        layer_group = group[layer.name]
        # Keras' own order: first what is trained, then what is not, without random states.
        weights = [*layer.trainable_weights, *layer.non_trainable_weights]
        for name, weight in zip(layer_group.attrs["weight_names"], weights, strict=True):
            found[id(weight)] = f"model_weights/{layer.name}/{name}"
    return [found[id(weight)] for weight in model.weights]


def _take_arrays(value: Any, arrays: list[np.ndarray]) -> Any:
    """Return `value` with each array in it replaced by its number, and append it to `arrays`."""

    def take(leaf: Any) -> Any:
        if not isinstance(leaf, np.ndarray | np.generic):
            return leaf
        arrays.append(np.asarray(leaf))
        return {ARRAY: len(arrays) - 1}

    return map_leaves(value, take)


def path_of(variable: Any) -> str:
    """Return the path of a Keras variable, or the name of TensorFlow's."""
    return getattr(variable, "path", None) or variable.name


def _dtype(variable: Any) -> np.dtype:
    return np.dtype(keras.backend.standardize_dtype(variable.dtype))
