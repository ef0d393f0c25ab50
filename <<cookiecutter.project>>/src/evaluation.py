"""What an iterator makes of each example of a split, stored by index, and what is made of that.

`evaluate_split` writes a folder, `StoredOutputs` reads it as a dataset, `run_callbacks` hands it to
functions that compute figures. The last two need neither a model nor Keras. The folder holds

    meta.yaml                            split, checkpoint, step, kinds of the outputs, config
    model_outputs/<key>/000012.npy       the output of example 12 (text: .txt); of images a .png too
    labels/<name>.npy                    a number or label of every example, a row each
    scalars.json                         what callbacks have returned

and no path that would be wrong once the run folder is moved.
"""

import json
import logging
import math
import os
import re
import shutil
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from ruamel.yaml import YAML

from src import results
from src.datasets import Array, DatasetMixin, Example, leaves

if TYPE_CHECKING:
    from src.experiment import Experiment

log = logging.getLogger(__name__)

META = "meta.yaml"
OUTPUTS = "model_outputs"
LABELS = "labels"
SCALARS = "scalars.json"
SECONDS_BETWEEN_LOOKS = 2.0
KEPT = re.compile(r"model-([0-9]+)\.h5")

Callback = Callable[..., Any]


class OtherModelError(ValueError):
    """A commit that does not hold what the model to be evaluated needs."""


class NoOutputsError(TypeError):
    """An iterator that has nothing to be stored."""


# ---- evaluating ----------------------------------------------------------------------------------


def evaluate_split(
    experiment: "Experiment", checkpoint: Path, output: Path, split: str
) -> dict[str, Any]:
    """Restore a commit and store what the iterator's `evaluate` returns for each example.

    Args:
        experiment: with an iterator.
        checkpoint: a commit.
        output: the folder to write; an older one is replaced when the new one is whole.
        split: one of the iterator's datasets.

    Returns:
        What `meta.yaml` says.

    Raises:
        OtherModelError: if the commit belongs to another model.
        NoOutputsError: if the iterator has no eval_op.
        ValueError: if it returns what cannot be stored by example.
        OSError: if the commit is damaged, or something cannot be written.
    """
    from tqdm import tqdm

    from src.datasets import ExampleBatches
    from src.iterator_steps import sow

    iterator, config = experiment.iterator, experiment.config
    assert iterator is not None
    dataset = iterator.datasets[split]
    batches = ExampleBatches(
        dataset,
        config["test_batch_size"] or config["batch_size"],
        config["seed"],
        shuffle=False,
        num_workers=config["n_data_processes"],
    )
    partial = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        iterator.set_position(0, 0, 0, split)
        state = restore(iterator, checkpoint, batches.batch(0, 0))
        writer = OutputWriter(partial)
        for step in tqdm(range(len(batches)), desc=split, unit="batch", leave=False, disable=None):
            batch = batches.batch(0, step)
            iterator.set_position(state["global_step"], state["epoch"], step, split)
            sow(config["seed"], step)
            size = min(batches.batch_size, len(dataset) - writer.num_examples)
            writer.add(_evaluate(iterator, batch), size)
        writer.add_labels(getattr(dataset, "labels", None) or {})
        name = f"{type(iterator).__module__}:{type(iterator).__name__}"
        meta = {
            "description": f"what {name} made of each example of the split {split}",
            "split": split,
            "checkpoint": checkpoint.name,
            "global_step": state["global_step"],
            "num_examples": len(dataset),
            **writer.finish(),
            "config": dict(config),
        }
        with open(partial / META, "w", encoding="utf-8") as file:
            _yaml().dump(meta, file)
        _replace_folder(output, partial)
    finally:
        batches.close()
        shutil.rmtree(partial, ignore_errors=True)
    return meta


def restore(iterator: Any, path: Path, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Give model and iterator the state of a commit; return what it says of its run.

    Variables that are there only after a step are made by evaluating `batch`. What the commit has
    for training alone, such as optimizers, is left where this iterator has none of it.

    Raises:
        OtherModelError: if it has not what the model needs.
        OSError: if it is damaged.
    """
    from src.checkpoint import RESTORE_WEIGHTS, Checkpoint

    checkpoint = Checkpoint(path.parent, iterator.model, iterator.variables)
    try:
        state = checkpoint.read_other(path)
        checkpoint.prepare()
        if _error_of(lambda: checkpoint.require_fit(RESTORE_WEIGHTS)):
            _evaluate(iterator, batch)
            checkpoint.prepare()
        if error := _error_of(lambda: _restore(checkpoint, iterator, path, state["steps"])):
            reason = " ".join(str(error).replace(str(path), path.name).split())
            raise OtherModelError(reason) from error
    finally:
        checkpoint.close()
    return state


def _restore(checkpoint: Any, iterator: Any, path: Path, steps: Mapping[str, Any]) -> None:
    from src.checkpoint import RESTORE_ALL, load_weights

    if "iterator" not in steps:
        raise ValueError(f"{path} is of a run without an iterator")
    if checkpoint.fits(RESTORE_ALL):
        checkpoint.restore(RESTORE_ALL)
    else:
        checkpoint.require_fit(())
        if checkpoint.model is not None:
            load_weights(path, checkpoint.model)
        _assign_found(path, iterator.variables()["variables"])
    try:
        iterator.set_state(steps["iterator"])
    except KeyError:
        iterator.set_weights(steps["iterator"])  # another iterator over the same model


def _error_of(function: Callable[[], Any]) -> Exception | None:
    """Return the exception by which Keras, PyTorch or we refuse a commit, or None."""
    try:
        function()
    except (ValueError, KeyError, RuntimeError) as error:
        return error
    return None


def _assign_found(path: Path, variables: list[Any]) -> None:
    """Assign variables that the commit has as often as they are here; it may have others too."""
    import h5py

    from src.checkpoint import saved_variables, wanted_variables
    from src.commit_file import STATE

    with h5py.File(path, "r") as file:
        datasets = list(file[STATE]["variables"].values())
        saved = saved_variables(file[STATE]["variables"])
        wanted = wanted_variables(variables)
        # Of two that are alike here and three there, nobody knows which is which.
        known = Counter(saved)
        lacking = sorted(key for key, number in Counter(wanted).items() if known[key] != number)
        if lacking:
            names = ", ".join(f"{name} {shape}" for name, shape in lacking[:6])
            raise ValueError(
                f"{path} was written by another model; it has not these, or not as often: {names}"
            )
        for key, variable in zip(wanted, variables, strict=True):
            place = saved.index(key)
            saved.pop(place)
            variable.assign(datasets.pop(place)[()])
    if saved:
        names = ", ".join(f"{name} {shape}" for name, shape in saved[:6])
        log.warning("%s has variables that evaluation does not use: %s", path.name, names)


def _evaluate(iterator: Any, batch: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what the iterator has to be stored.

    Raises:
        NoOutputsError: if it has no eval_op, or that returns no dictionary.
    """
    try:
        outputs = iterator.evaluate(batch)
    except TypeError as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        if (Path(place.filename).name, place.name) == ("iterators.py", "evaluate"):
            raise NoOutputsError(str(error)) from error
        raise
    if not isinstance(outputs, Mapping):
        raise NoOutputsError(
            f"eval_op of {type(iterator).__name__} returns a {type(outputs).__name__}; expected a "
            "dictionary with an array or a list for each output"
        )
    return outputs


class OutputWriter:
    """Writes outputs of one batch after the other into a folder, by the index of the example.

    An output is "text" or an "array" in a file per example, an "image" that has a PNG beside its
    array, or a "number", of which all examples' are in one file, as labels are.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.num_examples = 0
        self._kinds: dict[str, str] = {}
        self._rows: dict[str, list[Array]] = {}
        self._counts: Counter[str] = Counter()

    def add(self, outputs: Mapping[str, Any], size: int) -> None:
        """Store the outputs of the next `size` examples.

        Raises:
            ValueError: if one is not there for each of them, or has no place to be stored at.
        """
        labels = outputs.get(LABELS, {})
        labels = labels if isinstance(labels, Mapping) else {LABELS: labels}
        for name, value in _named(labels):
            self._add_rows(name, np.asarray(_rows(value, size, name)), "label")
        for key, value in _named({k: v for k, v in outputs.items() if k != LABELS}):
            rows = _rows(value, size, key)
            if isinstance(rows, np.ndarray) and rows.ndim == 1 and rows.dtype.kind != "U":
                self._add_rows(key, rows, "number")
            else:
                self._counts[key] += size
                self._write_files(key, rows)
        self.num_examples += size

    def add_labels(self, labels: Mapping[str, Any]) -> None:
        """Store the labels of the dataset, where the outputs have none of that name."""
        for name, value in _named(labels):
            if name in self._rows:
                continue
            try:
                rows = np.asarray(_rows(value, self.num_examples, name))
            except ValueError as error:
                log.warning("a label of the dataset is not stored: %s", error)
                continue
            self._add_rows(name, rows, "label")

    def finish(self) -> dict[str, Any]:
        """Write what all examples share a file for; return the kinds of outputs and labels."""
        for key, count in self._counts.items():
            if count != self.num_examples:
                raise ValueError(f"the output {key!r} is missing in some of the batches")
            if any(other.startswith(f"{key}/") for other in self._kinds):
                raise ValueError(f"the output {key!r} is an output and a dictionary of others")
        for name, parts in self._rows.items():
            path = self.folder / LABELS / f"{name}.npy"
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, np.concatenate(parts), allow_pickle=False)
        outputs = {key: kind for key, kind in self._kinds.items() if kind != "label"}
        return {"outputs": outputs, "labels": list(self._rows)}

    def _note(self, key: str, kind: str) -> None:
        before = self._kinds.setdefault(key, kind)
        if {before, kind} == {"array", "image"}:
            self._kinds[key] = "array"  # not all of them can be shown
        elif before != kind:
            raise ValueError(f"the output {key!r} is a {before} once and a {kind} elsewhere")

    def _add_rows(self, name: str, rows: Array, kind: str) -> None:
        self._note(name, kind)
        self._counts[name] += len(rows)
        self._rows.setdefault(name, []).append(rows)

    def _write_files(self, key: str, rows: Array | list[Array]) -> None:
        folder = self.folder / OUTPUTS / key
        folder.mkdir(parents=True, exist_ok=True)
        for index, row in enumerate(rows, start=self.num_examples):
            path = folder / f"{index:06d}"
            if isinstance(row, str):
                self._note(key, "text")
                path.with_suffix(".txt").write_bytes(row.encode())
                continue
            np.save(path.with_suffix(".npy"), row, allow_pickle=False)
            image = as_image(row)
            self._note(key, "array" if image is None else "image")
            if image is not None:
                import tensorflow as tf

                path.with_suffix(".png").write_bytes(tf.io.encode_png(image).numpy())


def as_image(array: Array) -> Array | None:
    """Return uint8 or float in [-1, 1] of shape (height, width, 1, 3 or 4) as uint8, else None."""
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4) or not array.size:
        return None
    if array.dtype == np.uint8:
        return array
    if array.dtype.kind == "f" and array.min() >= -1 and array.max() <= 1:
        return np.rint((array.astype(np.float32) + 1) * 127.5).astype(np.uint8)
    return None


def _named(outputs: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
    """Yield outputs by name, which has to be a path in a folder."""
    for key, value in leaves(outputs):
        if any(part in ("", ".", "..") for part in key.split("/")):
            raise ValueError(f"the output {key!r} cannot be stored under that name")
        yield key, value


def _rows(value: Any, size: int, name: str) -> Array | list[Array]:
    """Return an output with a row for each of `size` examples, as one array where that can be.

    Raises:
        ValueError: if there are not so many rows.
    """
    rows: Array | list[Array]
    if isinstance(value, list | tuple):
        rows = [_plain_array(row, name) for row in value]
        if len({row.shape for row in rows}) == 1:
            rows = np.stack(rows)
    else:
        rows = _plain_array(value, name)
    if isinstance(rows, np.ndarray) and not rows.ndim:
        raise ValueError(f"the output {name!r} is a single value; expected one for each example")
    if len(rows) != size:
        raise ValueError(f"the output {name!r} has {len(rows)} rows for {size} examples")
    return rows


def _plain_array(value: Any, name: str) -> Array:
    """Return an array that can be read without unpickling anything."""
    array = np.asarray(value)
    if array.dtype.kind in "SO":
        items = [
            item.decode() if isinstance(item, bytes) else item for item in array.ravel().tolist()
        ]
        if not all(isinstance(item, str) for item in items):
            raise ValueError(f"the output {name!r} has values that are neither numbers nor text")
        array = np.array(items, dtype=np.str_).reshape(array.shape)
    if array.dtype.name == "bfloat16":  # which NumPy itself does not know
        array = array.astype(np.float32)
    return array


def _replace_folder(target: Path, new: Path) -> None:
    """Put a folder in the place of another; a kill leaves one of them, whole."""
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.replace(target, old)
    os.replace(new, target)
    shutil.rmtree(old, ignore_errors=True)


def _yaml() -> YAML:
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    return yaml


# ---- what was stored -----------------------------------------------------------------------------


class StoredOutputs(DatasetMixin):
    """The outputs in a folder that `evaluate_split` has written, by example.

    An example has the outputs as `evaluate` returned them, nested where they were; files are read
    when it is asked for. `labels` are memory-mapped.

    Attributes:
        folder: where they are.
        meta: what `meta.yaml` says.

    Raises:
        FileNotFoundError: if the folder has no outputs.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.meta: dict[str, Any] = _yaml().load((self.folder / META).read_text(encoding="utf-8"))

    def __len__(self) -> int:
        return self.meta["num_examples"]

    def get_example(self, index: int) -> Example:
        example: Example = {}
        for key, kind in self.meta["outputs"].items():
            *parents, name = key.split("/")
            place = example
            for parent in parents:
                place = place.setdefault(parent, {})
            place[name] = self._read(key, kind, index)
        return example

    @cached_property
    def labels(self) -> dict[str, Array]:
        """Labels, and the outputs that are numbers, one row per example."""
        return {
            name: np.load(self.folder / LABELS / f"{name}.npy", mmap_mode="r", allow_pickle=False)
            for name in self.meta["labels"]
        }

    def _read(self, key: str, kind: str, index: int) -> Any:
        path = self.folder / OUTPUTS / key / f"{index:06d}"
        if kind == "number":
            return self.labels[key][index]
        if kind == "text":
            return path.with_suffix(".txt").read_bytes().decode()
        # Mapped to memory, each would keep a file open.
        return np.load(path.with_suffix(".npy"), allow_pickle=False)


def newest_outputs(folder: Path, name: str) -> Path | None:
    """Return the folder `<name>-<global step>` of the highest step, or None if there is none."""
    steps = {
        int(match[1]): path
        for path in folder.glob("*")
        if (match := re.fullmatch(f"{re.escape(name)}-([0-9]+)", path.name))
        and (path / META).is_file()
    }
    return steps[max(steps)] if steps else None


# ---- callbacks -----------------------------------------------------------------------------------


def run_callbacks(
    output: Path,
    data_in: Any,
    config: Mapping[str, Any],
    callbacks: Mapping[str, Callback],
    callback_kwargs: Mapping[str, Mapping[str, Any]],
) -> dict[str, dict[str, float]]:
    """Call functions with what is stored; log the numbers they return, and keep them.

    Args:
        output: the folder.
        data_in: the dataset that was evaluated.
        config: of the evaluation.
        callbacks: by name; called as `(root, data_in, data_out, config, **kwargs)`.
        callback_kwargs: further arguments by the callback's name.

    Returns:
        The numbers by callback, as they are in `scalars.json`, beside those of earlier calls.

    Raises:
        RuntimeError: if a callback fails; it is named.
    """
    path = output / SCALARS
    kept = json.loads(path.read_text()) if path.exists() else {}
    returned: dict[str, dict[str, float]] = {}
    for name, callback in callbacks.items():
        data_out = StoredOutputs(output)
        try:
            result = callback(
                str(output), data_in, data_out, config, **callback_kwargs.get(name, {})
            )
        except Exception as error:
            raise RuntimeError(
                f"callback {name} failed: {type(error).__name__}: {error}; the outputs stay in "
                f"{output}"
            ) from error
        if not isinstance(result, Mapping):
            continue
        returned[name] = dict(_numbers(result))
        shown = "  ".join(f"{key} {value:.4g}" for key, value in returned[name].items())
        log.info("%s: %s", name, shown or "no numbers")
        # JSON knows no NaN.
        kept[name] = {
            key: value if math.isfinite(value) else None for key, value in returned[name].items()
        }
        temporary = path.with_name(f".{path.name}.partial")
        temporary.write_text(json.dumps(kept, indent=2) + "\n")
        os.replace(temporary, path)
    return returned


def _numbers(result: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, float]]:
    """Yield the numbers among what a callback returned: its own, and those under "scalars"."""
    for name, value in result.items():
        if isinstance(value, Mapping):
            if path or name == "scalars":
                yield from _numbers(value, f"{path}{name}/")
        elif isinstance(value, Real) or getattr(value, "shape", None) == ():
            yield f"{path}{name}".removeprefix("scalars/"), float(value)


# ---- which checkpoints ---------------------------------------------------------------------------


def checkpoints_to_evaluate(run: Path, config: Mapping[str, Any], given: Path) -> Iterator[Path]:
    """Yield commits, each under a second name, so that it stays as it is until the next is asked.

    With `eval_all` these are all that the run has kept, in the order of steps, then its latest;
    with `eval_forever` the latest, then each newer one, until the run has ended; else the given
    one. No global step comes twice.
    """
    from src.commit_file import read_state

    seen: set[int] = set()
    paths = [given]
    if config.get("eval_all"):
        kept = {
            int(match[1]): path
            for path in (run / "checkpoints").glob("model-*.h5")
            if (match := KEPT.fullmatch(path.name))
        }
        paths = [*(kept[step] for step in sorted(kept)), run / "model.h5"]
    elif config.get("eval_forever"):
        paths = []
    for path in paths:
        if config.get("eval_all") and not path.exists():
            continue  # it was superfluous by now
        with held(path, run) as commit:
            step = read_state(commit)["global_step"]
            if step not in seen:
                seen.add(step)
                yield commit
    if config.get("eval_forever"):
        yield from _as_they_come(run, seen)


def _as_they_come(run: Path, seen: set[int]) -> Iterator[Path]:
    from src.commit_file import read_state

    latest, looked_at = run / "model.h5", None
    while True:
        # Asked first: the last commit is there before the run says that it has ended.
        is_over = has_ended(run)
        status = os.stat(latest) if latest.exists() else None
        now = (status.st_ino, status.st_mtime_ns) if status else None
        if status and now != looked_at:
            looked_at = now
            with held(latest, run) as commit:
                state = read_state(commit)
                is_over = is_over or _is_final(state, results.load_config(run))
                if state["global_step"] not in seen:
                    seen.add(state["global_step"])
                    yield commit
            if not is_over:
                log.info("waiting for a commit after step %d of %s", state["global_step"], run)
        if is_over:
            return
        time.sleep(SECONDS_BETWEEN_LOOKS)


def has_ended(run: Path) -> bool:
    """Whether a run says that it has ended, however it has."""
    if not (run / "meta.json").exists():
        return False
    return results.load_meta(run).get("status") in ("finished", "failed", "interrupted")


def _is_final(state: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
    """Whether a commit is a run's last: training may itself wait for its evaluation to end."""
    if state["stop_reason"]:
        return True
    if config.get("num_steps") is not None:
        is_open = state["step"] > 0 and not state["is_cut"]  # its epoch has yet to be ended
        return state["global_step"] >= config["num_steps"] and not is_open
    return state["epoch"] >= (config.get("num_epochs") or math.inf)


@contextmanager
def held(path: Path, folder: Path) -> Iterator[Path]:
    """Give a commit a second name in `folder`, which training does not replace."""
    with tempfile.TemporaryDirectory(prefix=".evaluating-", dir=folder) as name:
        second = Path(name, path.name)
        try:
            os.link(path, second)
        except OSError:
            shutil.copyfile(path, second)
        yield second
