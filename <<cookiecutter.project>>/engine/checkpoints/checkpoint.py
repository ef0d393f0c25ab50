"""Writes and reads one atomic checkpoint of everything that a run needs to go on.

`model.h5` is an ordinary Keras HDF5 file with two additions: the group `training_state`, and in the
first 512 bytes, which HDF5 leaves to its user, the SHA-256 of all bytes that follow. It is written
under another name, synced, and renamed: at every instant there is a whole one, the old or the new.
`history.csv` and `loop_state.pkl` are views of it, which are never read back to resume."""

import contextlib
import logging
import os
import pickle
import re
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
import tensorflow as tf

from engine import keras_private
from engine.checkpoints import file as commits
from engine.checkpoints.best import Row
from engine.checkpoints.file import DamagedCheckpointError, verify
from engine.checkpoints.history import HistoryArray, csv_lines
from engine.checkpoints.layout import CommitLayout, path_of
from engine.devices import Workers, replicas
from engine.trees import copied, map_leaves
from vegab.files import inode_of, link, replacing, sync_to_disk, write_atomically

log = logging.getLogger(__name__)
HISTORY_CSV, LOOP_STATE = "history.csv", "loop_state.pkl"
# Groups of variables.
RESTORE_ALL: tuple[str, ...] = ("weights", "variables", "optimizer", "metrics", "others")
RESTORE_WEIGHTS: tuple[str, ...] = ("weights", "variables")
SECONDS_FOR_FILES = 60
Entries = Mapping[str, Any]
Datasets = dict[str, h5py.Dataset]


@dataclass(frozen=True)
class Snapshot:
    """All that a checkpoint holds, which training can no longer change."""

    # Of each variable, in the order of the groups; TensorFlow copies what it is about to change
    # while it is still held here. Arrays where each replica has its own.
    values: list[Any]
    state: dict[str, Any]  # JSON values, and arrays; without the history
    rows: list[Row]  # the history, a row per finished epoch
    history: np.ndarray  # the same as an array
    columns: dict[str, bool]  # of the array; see `HistoryArray`
    files: dict[str, int]  # lengths of the files that others append to


class Checkpoint:
    """Writes a model's checkpoints, off the training thread and one at a time, and reads them back.

    Before `prepare`, all variables of a Keras model are made. With another model, or None, there
    are only `variables()`: by group, lists, or mappings by path. If `only_finite`, weights that are
    trained have to be finite numbers. `note_files` is called before a checkpoint can be seen,
    with its digest, the snapshot's `files`, and the digest of the checkpoint before it."""

    def __init__(
        self,
        folder: Path,
        model: Any,
        variables: Callable[[], dict[str, Any]] | None = None,
        only_finite: bool = False,
        note_files: Callable[[str, dict[str, int], str], None] | None = None,
    ) -> None:
        self.folder = folder
        self.model = model if isinstance(model, keras.Model) else None
        self._variables = variables or (lambda: variables_of(model))
        self._groups: dict[str, dict[str, Any]] = {}
        self._layout: CommitLayout | None = None
        self._history = HistoryArray()
        # Columns and number of rows of history.csv; None: the whole file is written again.
        self._in_csv: tuple[list[str], int] | None = None
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._only_finite = only_finite
        self._note_files = note_files
        self._inode = inode_of(folder)
        self._last: Snapshot | None = None  # of those that were saved
        self.found: Path | None = None  # the checkpoint that was read
        self._workers = Workers(self.model.distribute_strategy if self.model else None)

    def prepare(self) -> None:
        """Find all variables, and describe the model as it is before anything is restored."""
        is_first = not self._groups
        groups = {"weights": self.model.weights if self.model else [], **self._variables()}
        self._groups = {name: by_unique_path(groups.get(name, ())) for name in RESTORE_ALL}
        self._in_order = variables = [v for g in self._groups.values() for v in g.values()]
        self._of_each = [n for n, v in enumerate(variables) if replicas.has_one_each(v)]
        self._agreement = replicas.Agreement(variables, self._workers)
        self._layout = CommitLayout(self.model, self._groups, self._workers.num_replicas)
        if self._layout.unreadable and is_first:
            why = f"({self._layout.unreadable}); they hold all that resuming and evaluation need"
            log.info(f"keras.models.load_model will not open the checkpoints of this model {why}")

    def prepare_for(self, groups: Sequence[str], make: Callable[[], Any]) -> None:
        """Prepare to restore groups of variables; those that are not there yet, `make` makes."""
        self.prepare()
        if not self.fits(groups):
            make()
            self.prepare()

    def prepare_again(self) -> None:
        """Find all variables again, and prepare for those that were not there before."""
        now: Any = self._variables().get("others", {})
        if self._layout is None or {*now} != {*self._groups["others"]}:
            self.wait()  # what is being written has the variables of before
            self.prepare()

    def snapshot(self, state: Entries, files: Mapping[str, int] | None = None) -> Snapshot:
        """Take variables and state as they are; UsageError if copies of the model differ."""
        if self._layout is None:
            self.prepare()
        rows = list(state["history"])
        self._history.follow(rows)
        values: list[Any] = [_tensor(variable) for variable in self._in_order]
        self._agreement.require()
        copies = [replicas.components(self._in_order[n]) for n in self._of_each]
        of_each = [np.stack([copy.numpy() for copy in some]) for some in copies]
        for n, array in zip(self._of_each, replicas.gather(of_each, self._workers), strict=True):
            values[n] = array
        position, columns = copied(_without_history(state)), dict(self._history.columns)
        return Snapshot(values, position, rows, self._history.values, columns, dict(files or {}))

    def commit(
        self,
        snapshot: Snapshot,
        is_best: bool = False,
        keep_as: str | None = None,
        discard: Sequence[str] = (),
    ) -> None:
        """Start to write a snapshot as the latest checkpoint, and under other names; see `wait`."""
        self.wait()
        self._last = snapshot
        if self._workers.is_chief:
            self._pending = self._executor.submit(self._write, snapshot, is_best, keep_as, discard)

    def hold(self, state: Entries) -> None:
        """Take a state that was read, and restored, for that of the last checkpoint."""
        self._last = self.snapshot(state)

    def commit_end(self) -> None:
        """Write the last checkpoint again with the present weights, if these changed after it."""
        last, weights = self._last, self._groups.get("weights", {})
        if last is None or not weights:
            return
        at_end = [np.asarray(_tensor(weight)) for weight in weights.values()]
        before = [np.asarray(value) for value in last.values[: len(at_end)]]
        if all(a.tobytes() == b.tobytes() for a, b in zip(at_end, before, strict=True)):
            return
        self.wait()
        if self._workers.is_chief:
            self._require_same_folder()
            layout = CommitLayout(self.model, self._groups, self._workers.num_replicas, at_end=True)
            content = bytes(layout.put_together(last, at_end))
            self._note(content, last)
            write_atomically(self.folder / commits.LATEST, content)

    def wait(self) -> None:
        """Return when the last checkpoint is on the disk; raise its OSError, FloatingPointError."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def finish(self) -> None:
        """Wait until the last checkpoint and the views are on the disk; OSError if that fails."""
        self.wait()
        if self._workers.is_chief:
            for path in (self.folder / HISTORY_CSV, self.folder / LOOP_STATE, self.folder):
                sync_to_disk(path)

    def close(self) -> None:
        """Finish what was started, and end the writing thread. Raises nothing."""
        self._executor.shutdown()

    def read(self) -> dict[str, Any] | None:
        """Return the state of the latest good checkpoint, if any, and write its views."""
        if self._workers.is_chief:
            self.found = latest_good(self.folder)
        candidates = [self.folder / commits.LATEST, self.folder / commits.PREVIOUS]
        self.found = self._same_as_chief(self.found, candidates)
        if self.found is None:
            return None
        state = commits.read_state(self.found)
        rows = state["history"]
        self._history.follow(rows)
        if self._workers.is_chief:
            if state["best_epoch"] is not None:
                look_after_best(self.folder, state["best_epoch"])
            self._write_views(_without_history(state), rows, list(self._history.columns))
            self._in_csv = None  # the last row may be taken back, of an epoch cut short
        return state

    def read_other(self, path: Path) -> dict[str, Any]:
        """Return the state of another run's checkpoint, for `restore`; see `verify`."""
        verify(path)
        self.found = self._same_as_chief(path, [path])
        return commits.read_state(path)

    def _same_as_chief(self, path: Path | None, candidates: Sequence[Path]) -> Path | None:
        """Return the chief's checkpoint, which another worker looks for in `candidates`."""
        if self._workers.number == 1:
            return path
        mine = commits.digest_of(path).ljust(commits.USER_BLOCK)
        wanted = self._workers.gather_bytes(mine.encode())[0].decode().strip()
        if self._workers.is_chief or not wanted:
            return path if self._workers.is_chief else None
        for _ in range(SECONDS_FOR_FILES):  # a file system of many machines may be late
            for candidate in candidates:
                if candidate.exists() and commits.digest_of(candidate) == wanted:
                    verify(candidate)
                    return candidate
            time.sleep(1)
        wrong = f"does not find the chief's checkpoint in {self.folder}"
        hint = "all workers need the same folder"
        raise DamagedCheckpointError(f"worker {self._workers.rank} {wrong}; {hint}")

    def take_along(self, state: Entries, best_epoch: int | None) -> None:
        """Link the kept checkpoints and the best one of the run whose checkpoint was read."""
        path = self.found
        assert path is not None
        if not self._workers.is_chief:
            return
        run = commits.run_of(path)
        earlier = [commit for commit in commits.commits_of(run) if _leads_to(state, commit.state)]
        for commit in earlier:
            if commit.path.parent.name == commits.KEPT and (run / commits.LATEST).exists():
                (self.folder / commits.KEPT).mkdir(exist_ok=True)
                link(commit.path, self.folder / commits.KEPT / commit.path.name)
        if best_epoch is None:
            return
        if found := _end_of(best_epoch, [path, *(commit.path for commit in earlier)]):
            link(found, self.folder / commits.BEST)
        else:
            lost = f"the weights of epoch {best_epoch + 1}, the best so far, are not kept in {run}"
            log.info(f"{lost}; the next better epoch makes {commits.BEST}")

    def restore(self, groups: Sequence[str] = RESTORE_ALL) -> None:
        """Assign the variables of the checkpoint that was read; ValueError if they are others."""
        for group, saved, wanted in self._by_group(groups):
            if group == "others":
                if late := ", ".join(sorted(saved.keys() - wanted.keys())):
                    what = "does not exist before the first step: a resumed run may differ"
                    log.warning(f"{late} is in the checkpoint, but {what}; create it earlier")
                names = [name for name in wanted if name in saved]
                saved, wanted = ({n: each[n] for n in names} for each in (saved, wanted))
            self._assign(saved, wanted)
        if "optimizer" not in groups:
            self._layout = None  # the first steps may make variables that are not there yet

    def fits(self, groups: Collection[str]) -> bool:
        """Whether there is nothing to restore, or every variable that `restore` asks for."""
        if any("#" in name for name in self._groups.get("variables", ())):
            groups = {*groups, "optimizer"}  # by which goes the order of those with one name
        return self.found is None or all(s.keys() == w.keys() for _, s, w in self._by_group(groups))

    def require_fit(self, groups: Sequence[str]) -> None:
        """Raise a ValueError, naming what is not the same, if `restore` would not succeed."""
        for group, saved, wanted in self._by_group(groups):
            # What only a first step makes is not there yet.
            if group in RESTORE_WEIGHTS or wanted.keys() - saved.keys():
                self._compare(saved, wanted)

    def _by_group(self, groups: Collection[str]) -> Iterator[tuple[str, Datasets, dict[str, Any]]]:
        """Yield each group with its variables in the checkpoint that was read, and in the model."""
        with h5py.File(self.found, "r") as file:
            for group in groups:
                yield group, saved_variables(file, group), self._groups[group]

    def _assign(self, saved: Datasets, wanted: Mapping[str, Any]) -> None:
        self._compare(saved, wanted)
        for name, variable in wanted.items():
            value = commits.value_of(saved[name])
            has_replicas = replicas.NUM_REPLICAS in saved[name].attrs
            if replicas.has_one_each(variable):
                each = value if has_replicas else value[np.newaxis]
                replicas.assign(variable, each, self._workers)
            else:
                variable.assign(value.sum(axis=0, dtype=value.dtype) if has_replicas else value)

    def _compare(self, saved: Datasets, wanted: Mapping[str, Any]) -> None:
        shapes = {n: each.shape[replicas.NUM_REPLICAS in each.attrs :] for n, each in saved.items()}
        _require_same(shapes, wanted, self.found)

    def _write(
        self, snapshot: Snapshot, is_best: bool, keep_as: str | None, discard: Sequence[str]
    ) -> None:
        folder, layout = self.folder, self._layout
        assert layout is not None
        self._require_same_folder()
        if self._only_finite:
            self._require_finite(snapshot)
        try:
            content = layout.put_together(snapshot)
            with replacing(folder / commits.LATEST, sync=False) as temporary:
                temporary.write_bytes(content)
                sync_to_disk(temporary)
                self._note(content, snapshot)
                # The links come first: a kill between them and the rename leaves the latest one
                # in its place, and what is then repeated makes the same links again.
                if is_best:
                    link(temporary, folder / commits.BEST)
                if keep_as:
                    (folder / commits.KEPT).mkdir(exist_ok=True)
                    link(temporary, folder / commits.KEPT / keep_as)
                    sync_to_disk(folder / commits.KEPT)
                if (folder / commits.LATEST).exists():
                    link(folder / commits.LATEST, folder / commits.PREVIOUS)
            sync_to_disk(folder)
            for name in discard:
                (folder / commits.KEPT / name).unlink(missing_ok=True)
            self._write_views(snapshot.state, snapshot.rows, list(snapshot.columns))
        except OSError as error:
            what = f"{folder / commits.LATEST} or a file that belongs to it could not be written"
            hint = "the last checkpoint is whole; the same command continues once the cause is gone"
            raise OSError(f"{what} ({error.strerror}); {hint}") from error

    def _note(self, content: bytes | memoryview, snapshot: Snapshot) -> None:
        if self._note_files is not None:
            latest = self.folder / commits.LATEST
            before = commits.digest_of(latest if latest.exists() else None)
            digest = commits.digest_of(bytes(content[: commits.USER_BLOCK]))
            self._note_files(digest, snapshot.files, before)

    @property
    def is_in_its_folder(self) -> bool:
        """Whether the run folder is the one that it was when the process began."""
        return self._inode is None or inode_of(self.folder) == self._inode

    def _require_same_folder(self) -> None:
        if not self.is_in_its_folder:
            wrong = f"{self.folder} was renamed or replaced while this process trained in it"
            hint = "give it its name back, and type the same command"
            raise OSError(f"{wrong}; nothing is written there any more; {hint}")

    def _require_finite(self, snapshot: Snapshot) -> None:
        variables = [pair for group in self._groups.values() for pair in group.items()]
        step = snapshot.state["global_step"]
        for (name, variable), value in zip(variables, snapshot.values, strict=True):
            array = np.asarray(value if getattr(variable, "trainable", False) else ())
            if array.size and keras.backend.is_float_dtype(array.dtype.name):
                ends = np.array([array.min(), array.max()], np.float64)
                if not np.isfinite(ends).all():
                    hint = "the last checkpoint is kept, and --on_nan=continue goes on all the same"
                    raise FloatingPointError(f"{name} is not finite after step {step}; {hint}")

    def _write_views(self, position: Entries, rows: Sequence[Row], columns: list[str]) -> None:
        """Write `loop_state.pkl`, and what is new of `history.csv`; they are not synced."""
        path = self.folder / HISTORY_CSV
        (known_columns, known), self._in_csv = self._in_csv or (None, 0), None
        if columns != known_columns or known > len(rows) or not path.exists():
            write_atomically(path, csv_lines(columns, rows), sync=False)
        elif known < len(rows):
            with open(path, "a") as file:
                file.write(csv_lines(columns, rows[known:], header=False))
        plain = pickle.dumps(map_leaves(position, _plain), protocol=4)
        write_atomically(self.folder / LOOP_STATE, plain, sync=False)
        self._in_csv = columns, len(rows)


def latest_good(folder: Path) -> Path | None:
    """Return the latest whole checkpoint, None before the first; corrupt ones are set aside."""
    damaged = []
    for path in (folder / commits.LATEST, folder / commits.PREVIOUS):
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
        names = ", ".join(path.name for path in damaged)
        hint = "put a good copy back, or start from scratch in another folder"
        raise DamagedCheckpointError(f"no checkpoint in {folder} is whole ({names}); {hint}")
    return None


def look_after_best(folder: Path, best_epoch: int) -> None:
    """Link `model_best.h5` again if it is lost or corrupt; if that is impossible, say so once."""
    path = folder / commits.BEST
    try:
        verify(path)
        # It may be newer: a kill came between the link to it and the checkpoint, which comes again.
        if len(commits.read_state(path)["history"]) > best_epoch:
            return
        harm = "is of another epoch"
    except FileNotFoundError:
        harm = "is gone"
    except DamagedCheckpointError:
        harm = "is corrupt"
        os.replace(path, path.with_name(f"{path.name}.damaged"))
    if found := _end_of(best_epoch, (folder / commits.LATEST, folder / commits.PREVIOUS)):
        link(found, path)
        log.warning("%s %s; it is made again from %s", path, harm, found.name)
    else:
        log.warning(
            f"{path} {harm} and cannot be made again: the weights of epoch {best_epoch + 1}, the "
            "best so far, are lost; the next better epoch makes it again"
        )


def _end_of(epoch: int, candidates: Iterable[Path]) -> Path | None:
    """Return the first whole checkpoint among the candidates that is of the end of an epoch."""
    for path in candidates:
        with contextlib.suppress(OSError, RuntimeError):  # missing or corrupt
            state = commits.read_state(path)
            if (state["step"] == 0 or state["is_cut"]) and len(state["history"]) == epoch + 1:
                verify(path)
                return path
    return None


def load_weights(path: Path, model: keras.Model) -> None:
    """Assign the weights of a checkpoint. Raises ValueError if they are another model's."""
    saved, wanted = by_unique_path(commits.weights_in(path)), by_unique_path(model.weights)
    _require_same({path: value.shape for path, value in saved.items()}, wanted, path)
    for name, weight in wanted.items():
        weight.assign(saved[name])


def variables_of(model: keras.Model) -> dict[str, list[Any]]:
    """Return the variables that a compiled model has besides its weights, by group."""
    weights = {id(weight) for weight in model.weights}
    others = [variable for variable in model.variables if id(variable) not in weights]
    return {
        # What draws without a seed of its own draws from the global generator.
        "variables": [*others, keras_private.seed_generator().state],
        "optimizer": [v for each in replicas.optimizers_of(model) for v in each.variables],
        "metrics": [variable for metric in model.metrics for variable in metric.variables],
    }


def _tensor(variable: Any) -> tf.Tensor:
    value = variable.value if isinstance(variable, keras.Variable) else variable
    first = [*replicas.components(value), value][0]  # all are the same
    # The operation itself costs a third of what `read_value` does.
    return tf.raw_ops.ReadVariableOp(resource=first.handle, dtype=first.dtype)


def by_unique_path(variables: Any) -> dict[str, Any]:
    """Return variables, or pairs of path and value, by paths that are the same in each process."""
    if isinstance(variables, Mapping):
        return dict(variables)
    found: dict[str, Any] = {}
    for each in variables:
        path, value = each if isinstance(each, tuple) else (path_of(each), each)
        path = first = re.sub(r"_\d+(?=[_/:]|$)|:\d+$", "", path)  # without counters and :0
        number = 2
        while path in found:
            path, number = f"{first}#{number}", number + 1
        found[path] = value
    return found


def read_others(path: Path) -> dict[str, np.ndarray]:
    """Return the variables of a checkpoint that are in no other group, by path."""
    with h5py.File(path, "r") as file:
        found = saved_variables(file, "others")
        return {name: commits.value_of(each) for name, each in found.items()}


def saved_variables(file: h5py.File, group: str) -> Datasets:
    """Return the datasets of variables in a group of a checkpoint, by path."""
    return by_unique_path(commits.datasets_in(file, group))


def _require_same(saved: Mapping[str, Any], wanted: Mapping[str, Any], path: Path | None) -> None:
    shapes = {name: tuple(variable.shape) for name, variable in wanted.items()}
    if differing := sorted(f"{n} {shape}" for n, shape in {*saved.items()} ^ {*shapes.items()}):
        raise ValueError(
            f"{path} was written by another model or optimizer, or by one whose variables are made "
            f"during training, and should be made before; these are in one of the two only: "
            f"{', '.join(differing[:6])}"
        )


def _leads_to(state: Entries, earlier: Entries) -> bool:
    """Whether `earlier` can be an earlier state of the same run as `state`, or the same one."""
    rows = earlier["history"]
    has_same_rows = repr(state["history"][: len(rows)]) == repr(rows)  # a NaN does not equal itself
    return has_same_rows and earlier["global_step"] <= state["global_step"]


def _without_history(state: Entries) -> dict[str, Any]:
    return {key: value for key, value in state.items() if key != "history"}


def _plain(leaf: Any) -> Any:
    """Return a JSON value as it is, and an array as its dtype and shape."""
    if not isinstance(leaf, np.ndarray | np.generic):
        return leaf
    return f"{leaf.dtype} of shape {leaf.shape}" if leaf.shape else leaf.item()
