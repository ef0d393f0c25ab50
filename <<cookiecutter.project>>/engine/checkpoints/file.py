"""Reads a commit: whether it is whole, and what it says of its run. It needs no Keras."""

import contextlib
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np

from engine.checkpoints.history import rows_of

LATEST = "model.h5"
PREVIOUS = "model_previous.h5"
BEST = "model_best.h5"
KEPT = "checkpoints"
USER_BLOCK = 512
SIGNATURE = b"training checkpoint, sha256 of what follows byte 512: "
STATE = "training_state"
TEXT = f"{STATE}/state"  # JSON
HISTORY = f"{STATE}/history"
WEIGHTS_AT_END = f"{STATE}/weights_at_end"  # where they are other than the last step's
ARRAY = "__array__"  # stands in the JSON for an array, with its number


class DamagedCheckpointError(OSError):
    """A file that is no commit, or whose bytes are not those that were written."""


def verify(path: Path) -> None:
    """Compare a commit's bytes with the digest in its first 512.

    Raises DamagedCheckpointError if they differ, or if the file is not one of ours.
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


def head_of(path: Path | None) -> bytes:
    """Return the first 512 bytes of a commit, which tell it from all others; zeros for None."""
    if path is None:
        return bytes(USER_BLOCK)
    with open(path, "rb") as file:
        return file.read(USER_BLOCK)


def digest_of(path: Path | None) -> str:
    """Return the digest in a checkpoint's first bytes, by which it is known; "" for None."""
    return digest_in(head_of(path))


def digest_in(head: bytes) -> str:
    """Return the digest in the first bytes of a checkpoint."""
    return head[len(SIGNATURE) : USER_BLOCK].rstrip(b"\0").decode(errors="replace")


def leads_out(name: Any) -> bool:
    """Whether a name of a file leads out of the folder which it is relative to, or is none."""
    return not isinstance(name, str) or Path(name).is_absolute() or ".." in Path(name).parts


def require_inside(names: Iterable[Any]) -> None:
    """Refuse names of files that lead out of the folder which they are relative to."""
    for name in names:
        if leads_out(name):
            raise DamagedCheckpointError(
                f"the checkpoint is none of ours: it would write the file {name!r}, which lies "
                "outside of the folder for it; put a good copy back"
            )


def read_state(path: Path) -> dict[str, Any]:
    """Return what a commit says of its run: epoch, steps, best epoch, history and more.

    Raises DamagedCheckpointError if that is not to be found in it.
    """
    try:
        with h5py.File(path, "r") as file:

            def with_array(value: dict[str, Any]) -> Any:
                is_array = value.keys() == {ARRAY}
                return file[f"{STATE}/arrays/{value[ARRAY]:05}"][()] if is_array else value

            state = json.loads(file[TEXT][()], object_hook=with_array)
            num_rows = state.pop("num_rows")
            state["history"] = rows_of(state.pop("columns"), file[HISTORY][:num_rows])
            if not all(isinstance(state.get(key, 0), int) for key in ("epoch", "global_step")):
                raise ValueError("epoch and step, of which names of files are made, are no numbers")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DamagedCheckpointError(f"{path} is no checkpoint of ours: {error}") from error
    files = (state.get("steps") or {}).get("iterator", {}).get("files")
    if isinstance(files, dict) and all(hasattr(content, "dtype") for content in files.values()):
        require_inside(files)  # those of a `TemplateIterator`: refused before anything begins
    return state


def is_done(state: Mapping[str, Any], num_epochs: int | None, num_steps: int | None) -> bool:
    """Whether nothing is left to train for a run that asks for so many epochs or, where that is
    not None, steps.

    An epoch whose steps are all done is open until its end, as its validation, is done, too.
    """
    if state["stop_reason"]:
        return True
    if num_steps is not None:
        is_open = state["step"] > 0 and not state["is_cut"]
        return state["global_step"] >= num_steps and not is_open
    return num_epochs is not None and state["epoch"] >= num_epochs


class Commit(NamedTuple):
    """A commit in a run folder.

    Attributes:
        path: of its file.
        state: what `read_state` returns.
        epoch: epochs done.
        ends_epoch: whether the next epoch begins from there.
    """

    path: Path
    state: dict[str, Any]
    epoch: int
    ends_epoch: bool


def run_of(commit: Path) -> Path:
    """Return the run folder that a commit lies in."""
    return commit.parent.parent if commit.parent.name == KEPT else commit.parent


def commits_of(run: Path) -> list[Commit]:
    """Return the commits that a run keeps and that can be read, those after most steps first.

    They are not verified: that reads every byte of them.
    """
    found = []
    for path in (run / LATEST, run / PREVIOUS, run / BEST, *sorted((run / KEPT).glob("*.h5"))):
        with contextlib.suppress(OSError, RuntimeError):  # missing or damaged
            found.append((path, read_state(path)))
    if not found:
        return []
    found.sort(key=lambda entry: entry[1]["global_step"], reverse=True)
    latest = found[0][1]
    # The only epoch of fewer steps than the others is one that `num_steps` has cut.
    whole = latest["history"][: -1 if latest["is_cut"] else None]
    epochs = {row["step"]: row["epoch"] + 1 for row in whole}
    return [
        Commit(
            path,
            state,
            epochs.get(state["global_step"], state["epoch"]),
            state["global_step"] in epochs,
        )
        for path, state in found
    ]


def commit_after(run: Path, epoch: int) -> Commit:
    """Return the whole commit that a run keeps of the end of an epoch; of 0: its latest.

    Raises ValueError if there is none; it says of which epochs there is one.
    """
    commits = commits_of(run)
    for commit in commits:
        if not epoch or (commit.ends_epoch and commit.epoch == epoch):
            with contextlib.suppress(DamagedCheckpointError):
                verify(commit.path)
                return commit
    epochs = sorted({commit.epoch for commit in commits if commit.ends_epoch} - {epoch})
    if not epochs:
        raise ValueError(f"{run} has no commit of the end of an epoch")
    kept = ", ".join(map(str, epochs))
    raise ValueError(f"{run} has no commit of the end of epoch {epoch}, but of {kept}")


def datasets_in(file: h5py.File, group: str) -> list[tuple[str, h5py.Dataset]]:
    """Return path and dataset of the variables in a group of a checkpoint."""
    if (
        group == "weights" and group not in file[STATE]
    ):  # of an older project, written by Keras only
        root = file["model_weights"]
        return [
            (name, root[layer][name])
            for layer in names_in(root, "layer_names")
            for name in names_in(root[layer], "weight_names")
        ]
    return [(str(each.attrs["path"]), each) for each in file[STATE].get(group, {}).values()]


def weights_in(file: h5py.File) -> list[tuple[str, np.ndarray]]:
    """Return path and value of the weights that a checkpoint is used with.

    They are those at the end of training, where these are other than the last step's.
    """
    if "weights" not in file[STATE]:
        return [(path, value_of(dataset)) for path, dataset in datasets_in(file, "weights")]
    ends = file.get(WEIGHTS_AT_END, {})
    return [
        (str(dataset.attrs["path"]), value_of(ends.get(name, dataset)))
        for name, dataset in file[STATE]["weights"].items()
    ]


def value_of(dataset: h5py.Dataset) -> np.ndarray:
    """Return the value of a variable, in its own dtype."""
    value = np.asarray(dataset[()])
    if "dtype" not in dataset.attrs:
        return value
    import ml_dtypes

    return value.view(np.dtype(getattr(ml_dtypes, str(dataset.attrs["dtype"]))))


def names_in(group: h5py.Group, attribute: str) -> list[str]:
    """Return a list of names that Keras keeps in an attribute, or in several if it is long."""
    if attribute in group.attrs:
        return list(map(str, group.attrs[attribute]))
    parts = sorted(
        (name for name in group.attrs if name.startswith(attribute)),
        key=lambda name: int(name.removeprefix(attribute)),
    )
    return [str(name) for part in parts for name in group.attrs[part]]


def _refuse_foreign(path: Path) -> None:
    """Refuse what no commit of ours has: data kept elsewhere, or larger than the file.

    A digest shows that a file is whole, not who made it; HDF5 follows links to other files.
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
