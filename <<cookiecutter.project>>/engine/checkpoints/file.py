"""Reads a checkpoint: whether it is whole, what it says, and how two differ. It needs no Keras."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np

from engine.checkpoints.differences import NOTHING, Difference, history_difference, rows_in
from engine.checkpoints.history import rows_of
from vegab.files import leads_out, misfit

LATEST, PREVIOUS, BEST = "model.h5", "model_previous.h5", "model_best.h5"
KEPT = "checkpoints"
USER_BLOCK = 512
SIGNATURE = b"training checkpoint, sha256 of what follows byte 512: "
STATE = "training_state"
TEXT, HISTORY = f"{STATE}/state", f"{STATE}/history"  # JSON, and an array
WEIGHTS_AT_END = f"{STATE}/weights_at_end"  # where they are other than the last step's
FORM = {"epoch": int, "global_step": int, "fingerprint": {"settings": dict, "code": dict}}
ARRAY = "__array__"  # stands in the JSON for an array, with its number


class DamagedCheckpointError(OSError):
    """A file that is not a checkpoint, or whose bytes are not those that were written."""


def verify(path: Path) -> None:
    """Raise a DamagedCheckpointError unless a file is one of our checkpoints, and whole."""
    with open(path, "rb") as file:
        head = file.read(USER_BLOCK)
        if not head.startswith(SIGNATURE):
            reason = "is not a checkpoint of this project, or is truncated"
            raise DamagedCheckpointError(f"{path} {reason}")
        digest = hashlib.file_digest(file, "sha256").hexdigest().encode()
    if head.rstrip(b"\0") != SIGNATURE + digest:
        raise DamagedCheckpointError(f"{path} is corrupt: its bytes are not those once written")
    with h5py.File(path, "r") as file:
        _refuse_foreign(file)


def digest_of(checkpoint: Path | bytes | None) -> str:
    """Return the digest in a checkpoint's first bytes, by which it is known; "" for None."""
    if isinstance(checkpoint, Path):
        with open(checkpoint, "rb") as file:
            checkpoint = file.read(USER_BLOCK)
    return (checkpoint or b"")[len(SIGNATURE) :].rstrip(b"\0").decode(errors="replace")


def require_inside(names: Iterable[Any]) -> None:
    """Refuse names of files that lead out of the folder which they are relative to."""
    for name in names:
        if leads_out(name):
            raise DamagedCheckpointError(
                f"this is not a checkpoint of this project: it would write the file {name!r}, "
                "outside of the folder for it; put a good copy back"
            )


def read_state(path: Path) -> dict[str, Any]:
    """Return what a checkpoint says of its run: epoch, steps, best epoch, history and more."""
    try:
        with h5py.File(path, "r") as file:
            _refuse_foreign(file)

            def with_array(value: dict[str, Any]) -> Any:
                is_array = value.keys() == {ARRAY}
                return file[f"{STATE}/arrays/{value[ARRAY]:05}"][()] if is_array else value

            state = json.loads(file[TEXT][()], object_hook=with_array)
            num_rows = state.pop("num_rows")
            state["history"] = rows_of(state.pop("columns"), file[HISTORY][:num_rows])
            if wrong := misfit(state, FORM):
                raise ValueError(f"its {wrong[1:]} is of another form")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DamagedCheckpointError(f"{path} is not a checkpoint of ours: {error}") from error
    files = (state.get("steps") or {}).get("iterator", {}).get("files")
    if isinstance(files, dict) and all(hasattr(content, "dtype") for content in files.values()):
        require_inside(files)  # those of a `TemplateIterator`: refused before anything begins
    return state


def is_done(state: Mapping[str, Any], num_epochs: int | None, num_steps: int | None) -> bool:
    """Whether nothing is left to train, by the number of steps, or if that is None, of epochs."""
    if state["stop_reason"]:
        return True
    if num_steps is not None:
        is_open = state["step"] > 0 and not state["is_cut"]  # its validation is still to come
        return state["global_step"] >= num_steps and not is_open
    return num_epochs is not None and state["epoch"] >= num_epochs


class Commit(NamedTuple):
    """A checkpoint in a run folder."""

    path: Path  # of its file
    state: dict[str, Any]  # what `read_state` returns
    epoch: int  # epochs done
    ends_epoch: bool  # does the next epoch begin from there?


def run_of(commit: Path) -> Path:
    """Return the run folder that a checkpoint lies in."""
    return commit.parent.parent if commit.parent.name == KEPT else commit.parent


def commits_of(run: Path) -> list[Commit]:
    """Return the checkpoints of a run that can be read, unverified; most steps first."""
    found = []
    for path in (run / LATEST, run / PREVIOUS, run / BEST, *sorted((run / KEPT).glob("*.h5"))):
        with contextlib.suppress(OSError, RuntimeError):  # missing or corrupt
            found.append((path, read_state(path)))
    if not found:
        return []
    found.sort(key=lambda entry: entry[1]["global_step"], reverse=True)
    latest = found[0][1]
    # The only epoch of fewer steps than the others is one that `num_steps` has cut.
    whole = latest["history"][: -1 if latest["is_cut"] else None]
    epochs = {row["step"]: row["epoch"] + 1 for row in whole}
    steps = [(path, state, state["global_step"]) for path, state in found]
    return [Commit(path, s, epochs.get(n, s["epoch"]), n in epochs) for path, s, n in steps]


def commit_after(run: Path, epoch: int) -> Commit:
    """Return the checkpoint after an epoch (0: the latest), verified; ValueError without one."""
    commits = commits_of(run)
    for commit in commits:
        if not epoch or (commit.ends_epoch and commit.epoch == epoch):
            with contextlib.suppress(DamagedCheckpointError):
                verify(commit.path)
                return commit
    epochs = sorted({commit.epoch for commit in commits if commit.ends_epoch} - {epoch})
    if not epochs:
        raise ValueError(f"{run} has no checkpoint of the end of an epoch")
    kept = ", ".join(map(str, epochs))
    raise ValueError(f"{run} has no checkpoint of the end of epoch {epoch}, but of {kept}")


def datasets_in(file: h5py.File, group: str) -> list[tuple[str, h5py.Dataset]]:
    """Return path and dataset of the variables in a group of a checkpoint."""
    if group == "weights" and group not in file[STATE]:  # an older project's, by Keras only
        root = file["model_weights"]
        return [
            (name, root[layer][name])
            for layer in names_in(root, "layer_names")
            for name in names_in(root[layer], "weight_names")
        ]
    return [(str(each.attrs["path"]), each) for each in file[STATE].get(group, {}).values()]


def weights_in(path: Path) -> list[tuple[str, np.ndarray]]:
    """Return path and value of the weights to use: those at the end of training, if they differ."""
    with h5py.File(path, "r") as file:
        ends = file.get(WEIGHTS_AT_END, {})
        weights = enumerate(datasets_in(file, "weights"))
        return [(name, value_of(ends.get(f"{n:05}", each))) for n, (name, each) in weights]


def value_of(dataset: h5py.Dataset) -> np.ndarray:
    """Return the value of a variable, in its own dtype."""
    value = np.asarray(dataset[()])
    if "dtype" not in dataset.attrs:
        return value
    import ml_dtypes

    return value.view(np.dtype(getattr(ml_dtypes, str(dataset.attrs["dtype"]))))


def names_in(group: h5py.Group, attribute: str) -> list[str]:
    """Return a list of names that Keras keeps in an attribute, or in several if it is long."""
    parts = [name for name in group.attrs if name.startswith(attribute)]
    parts.sort(key=lambda name: int(name.removeprefix(attribute) or 0))
    names = [name for part in parts for name in group.attrs[part]]
    return [name.decode() if isinstance(name, bytes) else str(name) for name in names]


def _refuse_foreign(file: h5py.File) -> None:
    """Refuse data that HDF5 would read elsewhere, or that is larger than the file."""
    size, seen = os.path.getsize(file.filename), set()

    def refuse_if(is_foreign: bool, what: str) -> None:
        if is_foreign:
            raise DamagedCheckpointError(f"{file.filename} is not a checkpoint of ours: {what}")

    def look(group: h5py.Group) -> None:
        address = h5py.h5o.get_info(group.id).addr
        refuse_if(address in seen, f"the group {group.name} is in it twice")
        seen.add(address)
        for name in group:
            place = f"{group.name.rstrip('/')}/{name}"
            is_hard = isinstance(group.get(name, getlink=True), h5py.HardLink)
            refuse_if(not is_hard, f"{place} is a link")
            if isinstance(item := group[name], h5py.Group):
                look(item)
            else:
                is_outside = item.external or item.is_virtual or item.nbytes > size
                refuse_if(is_outside, f"{place} is not within the file")

    look(file)


def first_difference(one: Path, other: Path) -> str:
    """Return where two runs differ first, in history or checkpoint; "" if nowhere."""
    if difference := history_difference(rows_in(one), rows_in(other)):
        return str(difference)
    for name in (LATEST, BEST):
        if not (one / name).exists() and not (other / name).exists():
            continue  # without a monitor no epoch is the best
        if (one / name).read_bytes() != (other / name).read_bytes():
            difference = commit_difference(one / name, other / name)
            return f"{name}, {difference or 'its description'}"
    return ""


def commit_difference(one: Path, other: Path, ignored: Sequence[str] = ()) -> Difference | None:
    """Return the first array or entry of state, not `ignored`, that differs; weights come first."""
    with h5py.File(one) as a, h5py.File(other) as b:
        for file in (a, b):
            _refuse_foreign(file)
        datasets, others = _all_datasets(a), _all_datasets(b)
        names = sorted({*datasets, *others}, key=lambda name: (name.startswith(STATE), name))
        for name in names:
            if name == TEXT:
                continue
            if name not in datasets or name not in others:
                shown = ("there" if name in found else NOTHING for found in (datasets, others))
                return Difference(name, *shown)
            if difference := _array_difference(datasets[name], others[name]):
                return difference
        if TEXT in datasets and TEXT in others:
            state, another = json.loads(a[TEXT][()]), json.loads(b[TEXT][()])
            for key in dict.fromkeys([*state, *another]):
                values = [json.dumps(its.get(key), sort_keys=True) for its in (state, another)]
                if key not in ignored and values[0] != values[1]:
                    return Difference(f"state, {key}", *(value[:100] for value in values))
    return None


def _all_datasets(file: h5py.File) -> dict[str, h5py.Dataset]:
    found: dict[str, Any] = {}
    file.visititems(found.__setitem__)
    return {name: item for name, item in found.items() if isinstance(item, h5py.Dataset)}


def _array_difference(one: h5py.Dataset, other: h5py.Dataset) -> Difference | None:
    """Compare bytes: a NaN equals itself, and 0.0 is not -0.0."""
    a, b = (np.asarray(dataset[()]) for dataset in (one, other))
    if a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes():
        return None
    name = str(one.attrs.get("path", one.name.lstrip("/")))
    if a.dtype != b.dtype or a.shape != b.shape:
        return Difference(name, *(f"{array.dtype} of shape {array.shape}" for array in (a, b)))
    cells = [array.reshape(-1, 1).view(np.uint8) for array in (a, b)]
    index = int(np.argmax((cells[0] != cells[1]).any(axis=1)))
    place = [int(number) for number in np.unravel_index(index, a.shape)]
    return Difference(f"{name}{place or ''}", *(str(array.flat[index]) for array in (a, b)))
