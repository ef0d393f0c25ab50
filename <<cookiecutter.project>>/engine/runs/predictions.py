"""Shows what a model predicts: a table, classes and how they are confused, residuals, pictures."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from engine import pictures
from engine.trees import named
from vegab.files import replacing, write_atomically

Array = np.ndarray
MOST_EXAMPLES, MOST_BYTES = 100_000, 256_000_000  # that are predicted; metrics are of all
MOST_BYTES_OF_PICTURES = 64_000_000  # of them, among which mistakes are looked for
TABLE, MOST_COLUMNS = "predictions.csv", 100
APART, MOST_BYTES_APART = "predictions.npz", 64_000_000  # of each array
MOST_CLASSES = 1_000  # that are counted one by one
MOST_PANELS = 6


class Predictions(NamedTuple):
    """The first examples of a set and what a model makes of them: arrays (examples, ...) by name,
    objects if text. Of other features only the first few are there, and some pictures."""

    features: dict[str, Array]
    labels: dict[str, Array]
    outputs: dict[str, Array]
    left_out: set[str]  # outputs without a row for each example
    num_examples: int  # of the set, of which there may be more


class Classes(NamedTuple):
    """Labels and predictions of one shape, (examples, ...): integers in [0, number); with several
    at once 0 or 1, and the last dimension is that of the classes."""

    label: Array
    prediction: Array
    probability: Array  # of the prediction; with several at once that of a 1
    number: int
    several_at_once: bool = False


def predict(model: Any, source: Any) -> Predictions:
    """Predict the examples of a batch source in its order, as many as can be looked at."""
    import keras
    import tensorflow as tf

    # Of several runs, it takes their models for one that is traced over and over.
    tf.get_logger().setLevel("ERROR")
    batches: list[list[dict[str, Array]]] = []
    left_out: set[str] = set()
    num_examples = num_bytes = 0
    for step in range(source.steps_per_epoch):
        x, y, _ = keras.utils.unpack_x_y_sample_weight(source.batch(0, step))
        few = max(pictures.NUM_EXAMPLES - num_examples, 0)
        size = len(keras.tree.flatten(x)[0])
        num_examples += size
        if num_examples - size >= MOST_EXAMPLES or num_bytes >= MOST_BYTES:
            continue
        outputs = model.predict_on_batch(keras.tree.map_structure(tf.convert_to_tensor, x))
        names = getattr(model, "output_names", None) or ()
        if isinstance(outputs, list | tuple) and len(outputs) == len(names):
            outputs = dict(zip(names, outputs, strict=True))
        batch = []
        for nested, prefix in ((x, "input"), (y, "label"), (outputs, "output")):
            arrays = {k: _plain(v) for k, v in named(nested, prefix).items() if v is not None}
            batch.append({k: array for k, array in arrays.items() if array.shape[:1] == (size,)})
        left_out |= arrays.keys() - batch[2].keys()
        for key, array in batch[0].items():
            is_kept = _are_pictures(array) and num_bytes < MOST_BYTES_OF_PICTURES
            if array.dtype.kind != "O" and not is_kept:
                batch[0][key] = array[:few].copy()
        batches.append(batch)
        for array in (array for part in batch for array in part.values()):
            num_bytes += sum(map(len, array.flat)) if array.dtype.kind == "O" else array.nbytes
    features, labels, outputs = (
        {key: _joined([part[i][key] for part in batches]) for key in batches[0][i]}
        for i in range(3)
    )
    return Predictions(features, labels, outputs, left_out, num_examples)


def _plain(value: Any) -> Array:
    """Return an array of numbers that NumPy has names for, or of text."""
    array = np.asarray(value.to_tensor() if hasattr(value, "to_tensor") else value)
    if array.dtype.kind == "V":  # bfloat16
        return array.astype(np.float32)
    if array.dtype.kind not in "SOU":
        return array
    text = [v.decode(errors="replace") if isinstance(v, bytes) else str(v) for v in array.flat]
    return np.array(text, dtype=object).reshape(array.shape)


def _joined(parts: Sequence[Array]) -> Array:
    """Join batches; where other dimensions of them differ, NaN, 0 or an empty text fills up."""
    shape = map(max, zip(*(part.shape[1:] for part in parts), strict=True))
    fill = {"f": np.nan, "O": ""}.get(parts[0].dtype.kind, 0)
    whole = np.full((sum(map(len, parts)), *shape), fill, parts[0].dtype)
    begin = 0
    for part in parts:
        whole[(slice(begin, begin + len(part)), *map(slice, part.shape[1:]))] = part
        begin += len(part)
    return whole


def _are_pictures(array: Array) -> bool:
    return array.ndim == 4 and array.shape[-1] in (1, 3) and min(array.shape[1:3]) > 1


def write(
    folder: Path, title: str, found: Predictions, class_names: Sequence[str], are_logits: bool
) -> list[str]:
    """Write the table of predictions, and what there is to see of each output, into a folder;
    return a sentence for whatever a reader may miss."""
    features, labels, outputs, left_out, num_examples = found
    notes = [f"{name} has no row for each example, and is left out" for name in sorted(left_out)]
    columns = {key: array for key, array in features.items() if array.dtype.kind == "O"}
    inputs = [array for array in features.values() if _are_pictures(array)]
    rows = {"input": inputs[0]} if len(inputs) == 1 else {}
    if not labels.keys() & outputs.keys():
        labels = dict(zip(outputs, labels.values(), strict=False))
    for name, output in outputs.items():
        start = "" if len(outputs) == 1 else f"{name}_"
        heading = f"{title}, {name}" if start else title

        def path(file: str, start: str = start) -> Path:
            return folder / (re.sub(r"[^\w.-]", "_", start) + file)

        label, target = labels.get(name), {}
        if label is not None and label.size == output.size:
            label = label.reshape(output.shape)
            target = {"target": label}
        classes, examples = classes_of(output, label, are_logits), path("examples.png")
        if not classes:
            own = {"label": label, "prediction": output}
        else:
            own = dict(zip(("label", "prediction", "probability"), classes[:3], strict=True))
            names = class_names if len(class_names) == classes.number else range(classes.number)
            notes += _write_classes(path, heading, classes, names)
        if classes and output.ndim == 4 and output.shape[-1] > 1 and not classes.several_at_once:
            maps = {"target": classes.label, "output": classes.prediction}
            pictures.draw_examples(rows | maps, examples, heading, names)
        elif _are_pictures(output):
            pictures.draw_examples(rows | target | {"output": output}, examples, heading)
        elif classes and not start and rows and classes.label.ndim == 1:
            pictures.draw_classified(rows["input"], classes[:3], names, examples, heading)
        elif not classes and target and "O" not in (output.dtype.kind, target["target"].dtype.kind):
            _write_residuals(path, heading, target["target"], output)
        columns |= {f"{start}{key}": array for key, array in own.items() if array is not None}
    if columns and (number := len(next(iter(columns.values())))) < num_examples:
        notes.append(f"only the first {number:,} of {num_examples:,} examples are looked at")
    return notes + _write_table(folder, columns)


def classes_of(output: Array, label: Array | None, are_logits: bool) -> Classes | None:
    """Return the classes that an output and its labels, (examples, ...), mean; None for none.

    Labels are integers in [0, number) for an output (..., number), and up to half of them others,
    as those that a loss ignores; or of the output's shape and all 0 or 1. Outputs are logits if one
    is not in [0, 1], or if `are_logits` says so."""
    if label is None or not label.size or output.dtype.kind != "f" or label.dtype.kind == "O":
        return None
    *shape, number = output.shape if output.ndim > 1 else (*output.shape, 1)
    if number > 1 and label.size * number == output.size:
        is_inside = (label >= 0) & (label < number)
        if is_inside.mean() < 0.5 or (label != np.round(label)).any():
            return None
        return _best_of(output, label.reshape(shape).astype(np.int64))
    if label.shape != output.shape or not np.isin(label, (0, 1)).all():
        return None
    label = label.astype(np.int64)
    if number > 1 and (label.sum(axis=-1) == 1).all():
        return _best_of(output, label.argmax(axis=-1))
    if are_logits or (output < 0).any() or (output > 1).any():
        with np.errstate(over="ignore"):
            output = 1 / (1 + np.exp(-output))
    prediction = (output > 0.5).astype(np.int64)
    if number > 1:
        return Classes(label, prediction, output, number, several_at_once=True)
    probability = np.where(prediction, output, 1 - output)
    return Classes(label.reshape(shape), prediction.reshape(shape), probability.reshape(shape), 2)


def _best_of(scores: Array, label: Array) -> Classes:
    """Return the class with the highest of the scores (..., number): probabilities, or logits."""
    probability = scores.max(axis=-1)
    errors = np.abs(scores.sum(axis=-1) - 1)
    if (scores < 0).any() or (errors > 0.01).any():  # NaN does not count
        probability = 1 / np.exp(scores - probability[..., np.newaxis]).sum(axis=-1)
    return Classes(label, scores.argmax(axis=-1), probability, scores.shape[-1])


def _write_classes(
    path: Callable[[str], Path], title: str, classes: Classes, names: Sequence[Any]
) -> list[str]:
    """Write precision, recall, F1 (0 where undefined), support of each class; draw the matrix."""
    import pandas as pd

    label, prediction, probability, number, several_at_once = classes
    if number > MOST_CLASSES:
        return [f"{title}: {number:,} classes are too many to count each of them"]
    notes = []
    if several_at_once:
        axes = tuple(range(label.ndim - 1))
        arrays = (label & prediction, label, prediction)
        hits, support, predicted = (array.sum(axis=axes) for array in arrays)
    else:
        is_counted = (label >= 0) & (label < number) & np.isfinite(probability)
        if not is_counted.all():
            why = f"they are padding, not of the {number} classes, or have no finite prediction"
            some = f"{(~is_counted).sum()} of {label.size} labels"
            notes.append(f"{title}: {some} are not counted, because {why}")
        matrix = np.zeros((number, number), np.int64)
        np.add.at(matrix, (label[is_counted], prediction[is_counted]), 1)
        pictures.draw_confusion_matrix(matrix, path("confusion_matrix.png"), title, names)
        hits, support, predicted = matrix.diagonal(), matrix.sum(axis=1), matrix.sum(axis=0)
    columns = {
        "precision": hits / predicted.clip(min=1),
        "recall": hits / support.clip(min=1),
        "f1": 2 * hits / (support + predicted).clip(min=1),
        "support": support,
    }
    table = pd.DataFrame(columns, index=pd.Index(names, name="label"))
    write_atomically(path("per_class.csv"), table.to_csv(), sync=False)
    return notes


def _write_residuals(path: Callable[[str], Path], title: str, true: Array, output: Array) -> None:
    """Write how predictions differ from true values, and draw them: each column, if few."""
    import pandas as pd

    if output.size > MOST_PANELS * len(output):
        true, output = true.reshape(-1), output.reshape(-1)
    wanted, given = _columns("prediction", true), _columns("prediction", output)
    pairs = {key: (wanted[key], given[key]) for key in given}
    residuals = {key: np.subtract(*pair[::-1], dtype=np.float64) for key, pair in pairs.items()}
    table = pd.DataFrame(residuals).describe().T.rename_axis("of")
    write_atomically(path("residuals.csv"), table.to_csv(), sync=False)
    pictures.draw_predicted_against_true(pairs, path("predicted_against_true.png"), title)


def _columns(key: str, array: Array) -> dict[str, Array]:
    """Return the values of each example as columns: `key`, or `key`_0, `key`_1, …."""
    flat = array.reshape(len(array), -1).T
    return {key if len(flat) == 1 else f"{key}_{i}": column for i, column in enumerate(flat)}


def _write_table(folder: Path, arrays: Mapping[str, Array]) -> list[str]:
    """Write vectors as columns of the table, and what has too many, or more dimensions, apart."""
    import pandas as pd

    table: dict[str, Array] = {}
    apart: dict[str, Array] = {}
    for key, array in arrays.items():
        if array.ndim > 2 or len(table) + array.size // len(array) > MOST_COLUMNS:
            most = max(MOST_BYTES_APART * len(array) // max(array.nbytes, 1), 1)
            apart[key] = array[:most].astype(str) if array.dtype.kind == "O" else array[:most]
        else:
            table |= _columns(key, array)
    if table:
        rows = pd.DataFrame(table).rename_axis("index")
        write_atomically(folder / TABLE, rows.to_csv(), sync=False)
    if not apart:
        return []
    with replacing(folder / APART, sync=False) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, **apart)  # type: ignore[arg-type]
    shown = ", ".join(f"{key} of {len(array):,} examples" for key, array in apart.items())
    return [f"{APART} has what needs more than {MOST_COLUMNS} columns, or dimensions: {shown}"]
