"""One atomic commit of everything that a run needs to go on.

`model.h5` is the commit. It is an ordinary Keras HDF5 file, so that `keras.models.load_model` opens
it, with two additions: the group `training_state` (optimizer, seeds, position, history, hooks), and
in the first 512 bytes, which HDF5 leaves to its user, the SHA-256 of all bytes that follow. It is
written under another name, synced, and renamed: from the first commit on there is at every instant
a whole `model.h5`, the old or the new.

`model_previous.h5` is the commit before, `model_best.h5` the best one. `history.csv` and
`loop_state.pkl` are views for people and for other programs: they are written from the commit and
never read back to resume.
"""

import csv
import hashlib
import io
import json
import logging
import os
import pickle
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np

# Not part of Keras' public face, which takes a path alone; the public function calls it.
from keras.src.legacy.saving.legacy_h5_format import save_model_to_hdf5
from keras.src.random.seed_generator import global_seed_generator

from src.commit_file import SIGNATURE, USER_BLOCK, DamagedCheckpointError, verify

log = logging.getLogger(__name__)

LATEST = "model.h5"
PREVIOUS = "model_previous.h5"
BEST = "model_best.h5"
STATE = "training_state"


@dataclass(frozen=True)
class Snapshot:
    """A copy of all that a commit holds, which training can no longer change.

    Attributes:
        weights, variables, optimizer, metrics: arrays in the order of the model's lists.
        state: JSON values; "history" is a list with a row per finished epoch.
    """

    weights: list[np.ndarray]
    variables: list[np.ndarray]
    optimizer: list[np.ndarray]
    metrics: list[np.ndarray]
    state: dict[str, Any]


class Checkpoint:
    """Writes a model's commits, off the training thread and one at a time, and reads them back.

    Args:
        folder: the run folder.
        model: compiled, with weights, metrics and optimizer variables made.
    """

    def __init__(self, folder: Path, model: keras.Model) -> None:
        self.folder = folder
        self.model = model
        # What never changes, Keras' description of the model above all, is written once, and before
        # anything is restored: it is the same in every attempt.
        self._template, self._weight_names = _template(model)
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="commit")
        self._pending: Future[None] | None = None
        self._found: Path | None = None

    def snapshot(self, state: Mapping[str, Any]) -> Snapshot:
        """Copy the model's variables as they are now. `state` must be JSON values."""
        model = self.model
        return Snapshot(
            weights=_copies(model.weights),
            variables=_copies(_variables_beside_weights(model)),
            optimizer=_copies(_optimizer_variables(model)),
            metrics=_copies(_metrics_variables(model)),
            state=json.loads(json.dumps(state)),
        )

    def commit(self, snapshot: Snapshot, is_best: bool = False) -> None:
        """Start to make a snapshot the latest commit; an earlier one is finished first.

        Raises:
            OSError: if the earlier one could not be written.
        """
        self.wait()
        self._pending = self._executor.submit(self._write, snapshot, is_best)

    def wait(self) -> None:
        """Return when the commit that was started last is on disk.

        Raises:
            OSError: if it could not be written; the commits that were there stay as they were.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Finish what was started, and let the writing thread go. Raises nothing."""
        self._executor.shutdown()

    def read(self) -> dict[str, Any] | None:
        """Find the latest good commit and return its state; None if there is none.

        A damaged file is set aside under the name `*.damaged` and the commit before it is used. The
        views are written anew, so that one that was lost or edited is right again.

        Raises:
            DamagedCheckpointError: if there are commits, and none of them is good.
        """
        self._found = latest_good(self.folder)
        if self._found is None:
            return None
        state = read_state(self._found)
        write_views(self.folder, state)
        return state

    def restore(self) -> None:
        """Assign all variables of the commit that `read` has found.

        Raises:
            ValueError: if the commit belongs to another model or optimizer.
        """
        path = self._found
        assert path is not None
        load_weights(path, self.model)
        with h5py.File(path, "r") as file:
            group = file[STATE]
            _assign(group["variables"], _variables_beside_weights(self.model), path)
            _assign(group["optimizer"], _optimizer_variables(self.model), path)
            _assign(group["metrics"], _metrics_variables(self.model), path)

    def _write(self, snapshot: Snapshot, is_best: bool) -> None:
        folder, temporary = self.folder, self.folder / f".{LATEST}.partial"
        try:
            write_and_sync(temporary, self._content(snapshot))
            # The links come first: a kill between them and the rename leaves the latest commit in
            # its place, and what is then repeated makes the same links again.
            if is_best:
                _link(temporary, folder / BEST)
            if (folder / LATEST).exists():
                _link(folder / LATEST, folder / PREVIOUS)
            os.replace(temporary, folder / LATEST)
            _sync_folder(folder)
            write_views(folder, snapshot.state)
        except OSError as error:
            raise OSError(
                f"{folder / LATEST} or a file that belongs to it could not be written "
                f"({error.strerror}); the last commit is whole, and the same command continues "
                "once the cause is gone"
            ) from error
        finally:
            temporary.unlink(missing_ok=True)

    def _content(self, snapshot: Snapshot) -> bytes:
        """Return the bytes of a commit; they depend on model and state alone."""
        # Made in memory: HDF5 never writes to a disk that may be full, and never fails half-way.
        content = io.BytesIO(self._template)
        model = self.model
        with h5py.File(content, "r+") as file:
            group = file[STATE]
            if self._weight_names:
                for name, array in zip(self._weight_names, snapshot.weights, strict=True):
                    file[name][...] = array
            else:
                _write(group.create_group("weights"), model.weights, snapshot.weights)
            variables = _variables_beside_weights(model)
            _write(group.create_group("variables"), variables, snapshot.variables)
            _write(group.create_group("optimizer"), _optimizer_variables(model), snapshot.optimizer)
            _write(group.create_group("metrics"), _metrics_variables(model), snapshot.metrics)
            group["state"] = json.dumps(snapshot.state)
        view = content.getbuffer()
        digest = hashlib.sha256(view[USER_BLOCK:]).hexdigest().encode()
        view[:USER_BLOCK] = (SIGNATURE + digest).ljust(USER_BLOCK, b"\0")
        return bytes(view)


def latest_good(folder: Path) -> Path | None:
    """Return the newest whole commit of a run, or None if it has none yet.

    A damaged one before it is renamed to `*.damaged`, and named in a warning.

    Raises:
        DamagedCheckpointError: if there are commits, and none of them is good.
    """
    damaged = []
    for path in (folder / LATEST, folder / PREVIOUS):
        if not path.exists():
            continue
        try:
            verify(path)
        except DamagedCheckpointError as error:
            log.warning("%s", error)
            damaged.append(path)
            continue
        for bad in damaged:
            os.replace(bad, bad.with_name(f"{bad.name}.damaged"))
            log.warning("%s is set aside as %s.damaged; %s is used", bad, bad.name, path.name)
        return path
    if damaged:
        raise DamagedCheckpointError(
            f"no commit in {folder} is whole ({', '.join(path.name for path in damaged)}); "
            "put a good copy back, or start anew in another folder"
        )
    return None


def read_state(path: Path) -> dict[str, Any]:
    """Return what a commit says of its run: epoch, steps, best epoch, history."""
    with h5py.File(path, "r") as file:
        return json.loads(file[STATE]["state"][()])


def load_weights(path: Path, model: keras.Model) -> None:
    """Assign a commit's weights alone, as evaluation needs them.

    Raises:
        ValueError: if they are those of another model.
    """
    with h5py.File(path, "r") as file:
        by_keras = "model_weights" in file
        if STATE in file and not by_keras:
            _assign(file[STATE]["weights"], model.weights, path)
    if by_keras:
        try:
            model.load_weights(path)
        except ValueError as error:
            raise ValueError(f"{path} was written by another model: {error}") from error


def write_views(folder: Path, state: Mapping[str, Any]) -> None:
    """Write `history.csv` and `loop_state.pkl` from a commit's state."""
    write_atomically(folder / "history.csv", history_csv(state["history"]).encode())
    position = {key: value for key, value in state.items() if key != "history"}
    write_atomically(folder / "loop_state.pkl", pickle.dumps(position, protocol=4))


def history_csv(history: Sequence[Mapping[str, Any]]) -> str:
    """Return rows as CSV text; a column that a row lacks is left empty in it.

    A float32 is written with the fewest digits that read back as the same float32.
    """
    columns = list(dict.fromkeys(key for row in history for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    for row in history:
        writer.writerow({key: _shortest(value) for key, value in row.items()})
    return text.getvalue()


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file by `content`: a reader, and a kill, find the old bytes or the new."""
    temporary = path.with_name(f".{path.name}.partial")
    try:
        write_and_sync(temporary, content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _template(model: keras.Model) -> tuple[bytes, list[str]]:
    """Return what all commits of a model have in common, and where its weights are in there.

    It is what `model.save("model.h5")` writes. A subclassed model has no config that Keras could
    write: then there is only our own group, and the list is empty.
    """
    content, names = io.BytesIO(), []
    with h5py.File(content, "w", userblock_size=USER_BLOCK) as file:
        try:
            _write_keras_model(model, file)
        except NotImplementedError:
            file.clear()
        else:
            names = _names_of_weights(model, file)
        file.create_group(STATE)
    return content.getvalue(), names


def _write_keras_model(model: keras.Model, file: h5py.File) -> None:
    """Write what `model.save("model.h5")` does, and leave the live model as it is."""
    # Keras' writer takes the optimizer out of the model's compile config. Its copy of the optimizer
    # is left out: load_model does not read it, and ours is complete.
    compile_config = model._compile_config
    kept = dict(compile_config.config) if compile_config is not None else None
    try:
        save_model_to_hdf5(model, file, include_optimizer=True)
        file.pop("optimizer_weights", None)
    finally:
        if compile_config is not None:
            compile_config.config = kept


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


def _variables_beside_weights(model: keras.Model) -> list[Any]:
    """Return what a model keeps beside its weights: the states of its random generators."""
    weights = {id(weight) for weight in model.weights}
    beside = [variable for variable in model.variables if id(variable) not in weights]
    # What draws without a seed of its own draws from here.
    return [*beside, global_seed_generator().state]


def _optimizer_variables(model: keras.Model) -> list[Any]:
    """Return the variables of the model's optimizer, and of others that it has."""
    others = [value for value in vars(model).values() if isinstance(value, keras.Optimizer)]
    optimizers = {id(optimizer): optimizer for optimizer in (model.optimizer, *others)}
    return [variable for optimizer in optimizers.values() for variable in optimizer.variables]


def _metrics_variables(model: keras.Model) -> list[Any]:
    """Return the accumulators of all metrics, the loss' included."""
    return [variable for metric in model.metrics for variable in metric.variables]


def _copies(variables: Sequence[Any]) -> list[np.ndarray]:
    return [np.array(keras.ops.convert_to_numpy(variable)) for variable in variables]


def _write(group: h5py.Group, variables: Sequence[Any], arrays: Sequence[np.ndarray]) -> None:
    for index, (variable, array) in enumerate(zip(variables, arrays, strict=True)):
        group.create_dataset(f"{index:05}", data=array).attrs["path"] = variable.path


def _assign(group: h5py.Group, variables: Sequence[Any], path: Path) -> None:
    saved = [(_plain(dataset.attrs["path"]), dataset.shape) for dataset in group.values()]
    wanted = [(_plain(variable.path), tuple(variable.shape)) for variable in variables]
    if saved != wanted:
        differing = sorted(f"{name} {shape}" for name, shape in set(saved) ^ set(wanted))
        raise ValueError(
            f"{path} was written by another model or optimizer; these are in one of them only: "
            f"{', '.join(differing[:6])}"
        )
    for dataset, variable in zip(group.values(), variables, strict=True):
        variable.assign(dataset[()])


def _plain(path: str) -> str:
    """Drop the numbers that Keras adds to a name when a process makes a second layer of a kind."""
    return re.sub(r"_\d+(?=_|/|$)", "", path)


def _link(source: Path, target: Path) -> None:
    """Make `target` another name of `source`, atomically; a copy where there are no hard links."""
    temporary = target.with_name(f".{target.name}.partial")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:
        write_and_sync(temporary, source.read_bytes())
    os.replace(temporary, target)
    temporary.unlink(missing_ok=True)  # it stays where both were one file already


def write_and_sync(path: Path, content: bytes) -> None:
    """Write a file and have it on the disk, not in the system's memory, on return."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _shortest(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    single = np.float32(value)
    return str(single) if float(single) == value else repr(value)
