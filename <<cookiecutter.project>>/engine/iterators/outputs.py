"""Stores what an evaluation makes of each example, and reads it back for callbacks."""

import json
import logging
import math
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
from ruamel.yaml import YAML

from engine.iterators.datasets import Array, DatasetMixin, Example
from engine.trees import by_path, leaves
from vegab import UsageError, resolve
from vegab.config import merge, read_text, read_yaml
from vegab.files import leads_out, misfit, write_json

log = logging.getLogger(__name__)
FORM: dict[str, Any] = {"split": str, "checkpoint": str, "global_step": int, "num_examples": int}
FORM |= {"outputs": {...: str}, "config": {"eval_callbacks": dict}, "labels": [str]}
META, OUTPUTS, LABELS, SCALARS = "meta.yaml", "model_outputs", "labels", "scalars.json"
Callback = Callable[..., Any]


class OutputWriter:
    """Writes outputs of one batch after the other into a folder, by the example's index: "text" or
    an "array" in a file per example, an "image" that has a PNG next to its array, or a "number",
    which is in one file for all examples, as a label is."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.num_examples = folder, 0
        self._kinds: dict[str, str] = {}
        self._rows: dict[str, list[Array]] = {}
        self._counts: Counter[str] = Counter()

    def add(self, outputs: Mapping[str, Any], size: int) -> None:
        """Store the outputs of the next `size` examples; ValueError if there are not as many."""
        outputs = dict(outputs)
        labels = outputs.pop(LABELS, {})
        for name, value in _named(labels if isinstance(labels, Mapping) else {LABELS: labels}):
            self._add_rows(name, np.asarray(_rows(value, size, name)), "label")
        for key, value in _named(outputs):
            rows = _rows(value, size, key)
            if isinstance(rows, np.ndarray) and rows.ndim == 1 and rows.dtype.kind != "U":
                self._add_rows(key, rows, "number")
            else:
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
            else:
                self._add_rows(name, rows, "label")

    def finish(self) -> dict[str, Any]:
        """Write what all examples share a file for; return the kinds of outputs and labels."""
        for key, count in self._counts.items():
            if count != self.num_examples:
                raise ValueError(f"the output {key!r} is missing in some of the batches")
            if any(other.startswith(f"{key}/") for other in self._kinds):
                raise ValueError(f"the output {key!r} is both an output and a dictionary of others")
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
        self._counts[key] += len(rows)
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
    for key, value in by_path(outputs).items():
        if any(part in ("", ".", "..") for part in key.split("/")):
            raise ValueError(f"the output {key!r} cannot be stored under that name")
        yield key, value


def _rows(value: Any, size: int, name: str) -> Array | list[Array]:
    """Return an output with a row for each of `size` examples, as one array where that can be."""
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
        items = [v.decode() if isinstance(v, bytes) else v for v in array.ravel().tolist()]
        if not all(isinstance(item, str) for item in items):
            raise ValueError(f"the output {name!r} has values that are neither numbers nor text")
        array = np.array(items, dtype=np.str_).reshape(array.shape)
    return array.astype(np.float32) if array.dtype.name == "bfloat16" else array  # not NumPy's own


def yaml_of_outputs() -> YAML:
    """Return what reads and writes `meta.yaml`."""
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    return yaml


class StoredOutputs(DatasetMixin):
    """The outputs in a folder that `evaluate_split` has written, by example, nested as they were.

    Files are read when an example is asked for, `labels` memory-mapped. `meta` is `meta.yaml`."""

    append_labels = True  # an example has its labels under "labels_"

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        path = self.folder / META
        self.meta: dict[str, Any] = read_yaml(read_text(path), str(path))
        needed = {"num_examples", "outputs", "labels"}
        is_ours = not misfit(self.meta, FORM) and needed <= self.meta.keys()
        if not is_ours or any(map(leads_out, [*self.meta["outputs"], *self.meta["labels"]])):
            raise UsageError(f"{path} is not what an evaluation writes; evaluate again")

    def __len__(self) -> int:
        return self.meta["num_examples"]

    def get_example(self, index: int) -> Example:
        example: Example = {}
        for key, kind in self.meta["outputs"].items():
            path = self.folder / OUTPUTS / key / f"{index:06d}"
            if kind == "number":
                value = self.labels[key][index]
            elif kind == "text":
                value = path.with_suffix(".txt").read_bytes().decode()
            else:  # mapped to memory, each would keep a file open
                value = np.load(path.with_suffix(".npy"), allow_pickle=False)
            *parents, name = key.split("/")
            place = example
            for parent in parents:
                place = place.setdefault(parent, {})
            place[name] = value
        return example

    @cached_property
    def labels(self) -> dict[str, Array]:
        """Labels, and the outputs that are numbers, one row per example."""
        paths = {name: self.folder / LABELS / f"{name}.npy" for name in self.meta["labels"]}
        return {k: np.load(p, mmap_mode="r", allow_pickle=False) for k, p in paths.items()}


def run_callbacks(
    output: Path,
    data_in: Any,
    config: Mapping[str, Any],
    callbacks: Mapping[str, Callback],
    callback_kwargs: Mapping[str, Mapping[str, Any]],
) -> dict[str, dict[str, float]]:
    """Call functions with what is stored in a folder; log and keep the numbers that they return.

    They are called as `(root, data_in, data_out, config, **kwargs)`, with the dataset that was
    evaluated and the evaluation's config. `scalars.json` has the numbers with those of before."""
    path = output / SCALARS
    kept = json.loads(path.read_text()) if path.exists() else {}
    returned: dict[str, dict[str, float]] = {}
    for name, callback in callbacks.items():
        given, data_out = callback_kwargs.get(name, {}), StoredOutputs(output)
        try:
            result = callback(str(output), data_in, data_out, config, **given)
        except Exception as error:
            what = f"callback {name} failed: {type(error).__name__}: {error}"
            raise RuntimeError(f"{what}; the outputs stay in {output}") from error
        if isinstance(result, Mapping):
            returned[name] = numbers = _numbers(result)
            shown = "  ".join(f"{key} {value:.4g}" for key, value in numbers.items())
            log.info("%s: %s", name, shown or "no numbers")
            # JSON knows no NaN.
            kept[name] = {k: v if math.isfinite(v) else None for k, v in numbers.items()}
            write_json(path, kept)
    if (config.get("eval_hook") or {}).get("clean_after_callbacks"):
        clean(output)
    return returned


def callbacks_of(
    config: Mapping[str, Any], *owners: Any
) -> tuple[dict[str, Callback], dict[str, Any]]:
    """Import the callbacks of a config; return them and their arguments by name. EDflow's places
    count as well: `eval_hook`, `eval_pipeline`, `callbacks` of the owners, iterator and model."""
    hook, pipeline = config.get("eval_hook") or {}, config.get("eval_pipeline") or {}
    callbacks: dict[str, Any] = {}
    for key, paths in (
        ("callbacks", own_callbacks(*owners)),
        ("eval_hook.eval_callbacks", hook.get("eval_callbacks")),
        ("eval_pipeline.callbacks", pipeline.get("callbacks")),
        ("eval_callbacks", config["eval_callbacks"]),
    ):
        for name, path in ({"cb": paths} if isinstance(paths, str) else paths or {}).items():
            callbacks[name] = resolve(path, f"{key}.{name}") if path else None
    arguments = merge(pipeline.get("callback_kwargs") or {}, config["callback_kwargs"])
    if unknown := arguments.keys() - callbacks.keys():
        there = f"eval_callbacks has {', '.join(callbacks) or 'none'}"
        raise UsageError(f"callback_kwargs.{min(unknown)} is for no callback; {there}")
    return {name: callback for name, callback in callbacks.items() if callback}, arguments


def own_callbacks(*owners: Any) -> dict[str, str]:
    """Return the paths in `callbacks` of iterator and model; EDflow's are under "eval_op"."""
    found: dict[str, Any] = {}
    for owner in owners:
        given = getattr(owner, "callbacks", None)
        found |= given.get("eval_op", given) if isinstance(given, Mapping) else {}
    for name, each in found.items():
        if not isinstance(each, str):  # what has no path is refused where it is imported
            parts = (getattr(each, part, "") for part in ("__module__", "__qualname__"))
            found[name] = ".".join(parts)
    return found


def clean(output: Path) -> None:
    """Remove all from a folder of outputs but what callbacks have returned."""
    for name in (OUTPUTS, LABELS):
        shutil.rmtree(output / name, ignore_errors=True)
    (output / META).unlink(missing_ok=True)
    if not any(output.iterdir()):
        output.rmdir()


def _numbers(result: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers among what a callback returned: its own, and those under "scalars"."""
    return {
        "/".join(map(str, path)).removeprefix("scalars/"): float(value)
        for path, value in leaves(result, lists=False)
        if (len(path) == 1 or path[0] == "scalars")
        and (isinstance(value, Real) or getattr(value, "shape", None) == ())
    }
