"""Lays out a checkpoint's HDF5 file, so that writing one is no more than copying.

HDF5 and Keras write the file once, with all values zero. A checkpoint is the bytes between the
arrays, with the arrays of the moment in their places: a tenth of the time that HDF5 would take."""

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import h5py
import keras
import numpy as np

from engine import keras_private
from engine.checkpoints import file as commits
from engine.checkpoints.transfer import as_if_none_were_frozen
from engine.devices import replicas
from engine.trees import map_leaves

# What grows, grows by this much at a time: the layout is made again then.
TEXT_BLOCK = 4096  # bytes of JSON
HISTORY_BLOCK = 256  # rows
# Keras writes these into the file as they were given, and then cannot read them.
SHORT_NAMES = ("mse", "mae", "mape", "msle", "kld", "bce")


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
    """Puts together checkpoints of one model, all of whose variables are made.

    `training_state` has every variable by its path. The datasets that Keras reads are links to
    these, or, where Keras cannot read ours (bfloat16), and `at_end`, arrays of their own.
    `unreadable` says why `load_model` cannot open the file, if it cannot."""

    def __init__(
        self,
        model: keras.Model | None,
        variables: Mapping[str, Mapping[str, Any]],
        num_replicas: int = 1,
        at_end: bool = False,
    ) -> None:
        content = io.BytesIO()
        self._names: list[str] = []  # of a dataset for each variable, in the order of the groups
        self._ends: list[tuple[int, str]] = []  # number of a weight, and a dataset of its own
        self.unreadable = ""
        with h5py.File(content, "w", userblock_size=commits.USER_BLOCK) as file:
            by_keras: list[list[str]] = [[] for _ in variables.get("weights", ())]
            if model is not None:
                by_keras, self.unreadable = _write_model(model, file)
            for group, members in variables.items():
                file.require_group(f"{commits.STATE}/{group}")
                for index, (path, variable) in enumerate(members.items()):
                    name = f"{commits.STATE}/{group}/{index:05}"
                    each = (num_replicas,) if replicas.has_one_each(variable) else ()
                    dtype = _dtype(variable)
                    copies = by_keras[index] if group == "weights" else []
                    is_shared = bool(copies) and not at_end and dtype == _stored(dtype)
                    if is_shared:
                        file[name] = file[copies[0]]
                        _link(file, copies, name)
                    else:
                        zeros = np.zeros((*each, *variable.shape), _stored(dtype))
                        file.create_dataset(name, data=zeros)
                        if dtype != _stored(dtype):
                            file[name].attrs["dtype"] = dtype.name
                        if group == "weights" and (at_end or copies):
                            self._ends.append((index, _own_copy(file, index, variable, copies)))
                    file[name].attrs["path"] = path if group == "others" else path_of(variable)
                    if each:
                        file[name].attrs[replicas.NUM_REPLICAS] = num_replicas
                    self._names.append(name)
        names = [*self._names, *(name for _, name in self._ends)]
        self._model = _without_arrays(content, names)[0]
        self._key: Any = None
        self._file = self._model
        self._places: list[int] = []

    def put_together(self, snapshot: Any, at_end: Sequence[np.ndarray] | None = None) -> memoryview:
        """Return the bytes of a checkpoint with a `Snapshot`, and other weights to use `at_end`."""
        values = [np.asarray(value) for value in snapshot.values]
        state = snapshot.state | {"columns": snapshot.columns, "num_rows": len(snapshot.rows)}
        arrays: list[np.ndarray] = []
        text = json.dumps(_take_arrays(state, arrays)).encode()
        num_rows, num_columns = snapshot.history.shape
        grown = np.zeros((-(-num_rows // HISTORY_BLOCK) * HISTORY_BLOCK, num_columns))
        grown[:num_rows] = snapshot.history
        width = -(-len(text) // TEXT_BLOCK) * TEXT_BLOCK
        self._lay_out(width, grown, arrays)
        content = self._file.filled()
        ends = values if at_end is None else at_end
        written: list[np.ndarray] = [np.frombuffer(text, np.uint8), grown, *arrays]
        shown = [ends[number].astype(_readable(ends[number].dtype)) for number, _ in self._ends]
        for offset, array in zip(self._places, [*values, *shown, *written], strict=True):
            if array.size:
                flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
                content[offset : offset + flat.size] = flat
        digest = hashlib.sha256(content.data[commits.USER_BLOCK :]).hexdigest()
        head = (commits.SIGNATURE + digest.encode()).ljust(commits.USER_BLOCK, b"\0")
        content[: commits.USER_BLOCK] = np.frombuffer(head, np.uint8)
        return content.data

    def _lay_out(self, width: int, history: np.ndarray, arrays: Sequence[np.ndarray]) -> None:
        """Make room for so much text, history, and arrays of these shapes."""
        key = (width, history.shape, [(array.shape, str(array.dtype)) for array in arrays])
        if key == self._key:
            return
        content = io.BytesIO(self._model.filled().tobytes())
        names = [*self._names, *(name for _, name in self._ends), commits.TEXT, commits.HISTORY]
        with h5py.File(content, "r+") as file:
            file.create_dataset(commits.TEXT, data=np.zeros((), f"S{width}"))
            file.create_dataset(commits.HISTORY, data=np.zeros_like(history))
            for index, array in enumerate(arrays):
                name = f"{commits.STATE}/arrays/{index:05}"
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


def _write_model(model: keras.Model, file: h5py.File) -> tuple[list[list[str]], str]:
    """Write a model as Keras does; return the datasets of each weight, and why Keras cannot."""
    none: list[list[str]] = [[] for _ in model.weights]
    if not isinstance(model, keras.Sequential) and not hasattr(model, "operations"):
        return none, "it is subclassed, and load_model cannot build its layers"
    try:
        with as_if_none_were_frozen(model):
            keras_private.write_hdf5(model, file)
            found = _datasets_of_weights(model, file)
    # Layers are the users' own, and so is what their get_config does.
    except Exception as error:
        file.clear()
        for name in list(file.attrs):
            del file.attrs[name]
        return none, " ".join(f"{type(error).__name__}: {error}".split())[:200]
    if "training_config" in file.attrs:
        training_config = json.loads(file.attrs["training_config"])

        def full(loss: Any) -> Any:
            return keras.losses.get(loss).__name__ if str(loss).lower() in SHORT_NAMES else loss

        training_config["loss"] = map_leaves(training_config.get("loss"), full)
        file.attrs["training_config"] = json.dumps(training_config)
    names = [found.get(id(weight), []) for weight in model.weights]
    missing = [path_of(w) for w, those in zip(model.weights, names, strict=True) if not those]
    return names, f"Keras' file has no place for {', '.join(missing[:3])}" if missing else ""


def _datasets_of_weights(model: keras.Model, file: h5py.File) -> dict[int, list[str]]:
    """Return the datasets of each weight, by its id; a layer that is shared has several."""
    found: dict[int, list[str]] = {}
    root = file["model_weights"]
    # Keras' own order: first what is trained, then what is not, without random states.
    owners = {
        layer.name: [*layer.trainable_weights, *layer.non_trainable_weights]
        for layer in model.layers
    }
    owners["top_level_model_weights"] = keras_private.own_weights(model)
    for owner, weights in owners.items():
        names = commits.names_in(root[owner], "weight_names")
        for name, weight in zip(names, weights, strict=True):
            found.setdefault(id(weight), []).append(f"model_weights/{owner}/{name}")
    return found


def _link(file: h5py.File, copies: Sequence[str], name: str) -> None:
    """Make several datasets links to another one."""
    for copy in copies:
        if file[copy].id != file[name].id:
            del file[copy]
            file[copy] = file[name]


def _own_copy(file: h5py.File, index: int, variable: Any, copies: Sequence[str]) -> str:
    """Make the dataset that evaluation, and Keras, read of a weight; return its name."""
    name = f"{commits.WEIGHTS_AT_END}/{index:05}"
    zeros = np.zeros(tuple(variable.shape), _readable(_dtype(variable)))
    file.create_dataset(name, data=zeros).attrs["path"] = path_of(variable)
    _link(file, copies, name)
    return name


def _stored(dtype: np.dtype) -> np.dtype:
    """Return the dtype as which HDF5 stores the bytes of another, such as bfloat16."""
    return np.dtype(f"u{dtype.itemsize}") if dtype.kind == "V" else dtype


def _readable(dtype: np.dtype) -> np.dtype:
    """Return the dtype that Keras reads values of another from."""
    return np.dtype(np.float32) if dtype.kind == "V" else dtype


def _take_arrays(value: Any, arrays: list[np.ndarray]) -> Any:
    """Return `value` with each array in it replaced by its number, and append it to `arrays`."""

    def take(leaf: Any) -> Any:
        if not isinstance(leaf, np.ndarray | np.generic):
            return leaf
        arrays.append(np.asarray(leaf))
        return {commits.ARRAY: len(arrays) - 1}

    return map_leaves(value, take)


def path_of(variable: Any) -> str:
    """Return the path of a Keras variable, or the name of TensorFlow's."""
    return getattr(variable, "path", None) or variable.name


def _dtype(variable: Any) -> np.dtype:
    return np.dtype(keras.backend.standardize_dtype(variable.dtype))
