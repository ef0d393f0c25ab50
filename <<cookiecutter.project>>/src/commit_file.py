"""Reads a commit: whether it is whole, and what it says of its run. It needs no Keras."""

import hashlib
import json
from pathlib import Path
from typing import Any

import h5py

from src.history import rows_of

USER_BLOCK = 512
SIGNATURE = b"training checkpoint, sha256 of what follows byte 512: "
STATE = "training_state"
TEXT = f"{STATE}/state"  # JSON
HISTORY = f"{STATE}/history"
ARRAY = "__array__"  # stands in the JSON for an array, with its number


class DamagedCheckpointError(OSError):
    """A file that is no commit, or whose bytes are not those that were written."""


def verify(path: Path) -> None:
    """Compare a commit's bytes with the digest in its first 512.

    Raises:
        DamagedCheckpointError: if they differ, or if the file is not one of ours.
    """
    with open(path, "rb") as file:
        head = file.read(USER_BLOCK)
        if not head.startswith(SIGNATURE):
            raise DamagedCheckpointError(f"{path} is not a checkpoint of this project, or is torn")
        digest = hashlib.file_digest(file, "sha256").hexdigest().encode()
    if head.rstrip(b"\0") != SIGNATURE + digest:
        raise DamagedCheckpointError(
            f"{path} is damaged: its bytes are not those that were written"
        )
    _refuse_foreign(path)


def read_state(path: Path) -> dict[str, Any]:
    """Return what a commit says of its run: epoch, steps, best epoch, history and more.

    Raises:
        DamagedCheckpointError: if that is not to be found in it.
    """
    try:
        with h5py.File(path, "r") as file:
            state = _with_arrays(json.loads(file[TEXT][()]), file)
            num_rows = state.pop("num_rows")
            state["history"] = rows_of(state.pop("columns"), file[HISTORY][:num_rows])
            return state
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DamagedCheckpointError(f"{path} is no checkpoint of ours: {error}") from error


def weights_in(file: h5py.File) -> list[tuple[str, h5py.Dataset]]:
    """Return path and data of the weights in a commit, which Keras may have written."""
    if "model_weights" not in file:
        datasets = file[STATE]["weights"].values()
        return [(str(dataset.attrs["path"]), dataset) for dataset in datasets]
    group = file["model_weights"]
    return [
        (str(name), group[layer][name])
        for layer in group.attrs["layer_names"]
        for name in group[layer].attrs["weight_names"]
    ]


def _with_arrays(value: Any, file: h5py.File) -> Any:
    if isinstance(value, list):
        return [_with_arrays(item, file) for item in value]
    if isinstance(value, dict) and value.keys() == {ARRAY}:
        return file[f"{STATE}/arrays/{value[ARRAY]:05}"][()]
    if isinstance(value, dict):
        return {key: _with_arrays(item, file) for key, item in value.items()}
    return value


def _refuse_foreign(path: Path) -> None:
    """Refuse what no commit of ours has: data kept elsewhere, or larger than the file.

    A digest shows that a file is whole, not who made it; HDF5 follows links to other files.

    Raises:
        DamagedCheckpointError: naming what there is.
    """
    size = path.stat().st_size

    def look(group: h5py.Group) -> None:
        for name in group:
            link = group.get(name, getlink=True)
            place = f"{group.name.rstrip('/')}/{name}"
            if not isinstance(link, h5py.HardLink):
                raise DamagedCheckpointError(f"{path} is no checkpoint of ours: {place} is a link")
            item = group[name]
            if isinstance(item, h5py.Group):
                look(item)
            elif item.external or item.is_virtual or item.nbytes > size:
                raise DamagedCheckpointError(
                    f"{path} is no checkpoint of ours: {place} is not within the file"
                )

    with h5py.File(path, "r") as file:
        look(file)
