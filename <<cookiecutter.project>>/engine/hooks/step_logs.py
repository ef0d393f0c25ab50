"""Logs scalars, images and figures of single steps."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from engine import pictures as figures
from engine.batches import Array
from engine.hooks.base import WriterHook, log
from engine.trees import by_path
from vegab.files import write_atomically

KINDS = ("scalars", "images", "figures")
OF_EDFLOW = "^(train|step_ops)/"  # what it writes before the name of an operation


class LoggingHook(WriterHook):
    """Logs scalars, images and figures, under the step's number as `before_step` sees it.

    An operation of the iterator returns {"scalars": …, "images": …, "figures": …}, each by name,
    nested names being joined by "/"; what stands next to these counts as a scalar. Without an
    operation, the scalars are the metrics of the epoch so far.
    Scalars become a line of the log, images, and figures of matplotlib, `train/<name>_<step>.png`,
    and at the end, side by side, `train/<name>.png`.
    Images have the shape (N, H, W, C) or (H, W, C) with C in 1, 3, 4, and are uint8 or floats, in
    [-1, 1] if one of the array is negative, and if not, in [0, 1].

    Of the operations in `log_ops`, "train/log_op" is "log_op"; "validation/log_op" is that of a
    `TemplateIterator` on a validation batch, which depends on the step, and prefixes its names."""

    VALIDATION = "validation/"

    def __init__(
        self, log_ops: Sequence[str] = ("log_op", "validation/log_op"), tensorboard: bool = True
    ) -> None:
        self.log_ops = [re.sub(OF_EDFLOW, "", name) for name in log_ops]
        self.tensorboard = tensorboard

    def after_step(self, global_step: int, last_results: Any) -> None:
        step = global_step - 1
        logs = self._logs(step, last_results)
        scalars = {name: _number(name, value) for name, value in logs["scalars"].items()}
        if scalars:
            told = "  ".join(f"{name} {value:.4g}" for name, value in scalars.items())
            log.info("step %d: %s", step, told)
        pictures = {name: self._save_image(name, step, i) for name, i in logs["images"].items()}
        pictures |= {name: self._save_figure(name, step, f) for name, f in logs["figures"].items()}
        if self.tensorboard and (scalars or pictures):
            self._write(step, scalars, pictures)

    def after_training(self) -> None:
        super().after_training()
        figures.draw_through_training(Path(self.train))

    def _logs(self, step: int, last_results: Any) -> dict[str, dict[str, Any]]:
        """Return by kind what there is to log, by its name."""
        ops = last_results.get("step_ops") if isinstance(last_results, Mapping) else None
        ops = ops if isinstance(ops, Mapping) else {}
        asked = {name.removeprefix(self.VALIDATION) for name in self.log_ops}
        if lacking := asked - {"log_op", *ops}:
            raise ValueError(f"log_ops names {min(lacking)}; a step has {', '.join(ops) or 'none'}")
        found = [("", ops[name]) for name in self.log_ops if name in ops]
        found = found or [("", {"scalars": self.run.results})]
        names = [name for name in self.log_ops if name.startswith(self.VALIDATION)]
        if names and hasattr(self.run.iterator, "of_validation"):
            names = [name.removeprefix(self.VALIDATION) for name in names]
            computed = self.run.iterator.of_validation(step, names)
            found += [(self.VALIDATION, result) for result in computed]
        logs: dict[str, dict[str, Any]] = {kind: {} for kind in KINDS}
        for prefix, result in found:
            for kind, values in logs.items():
                here = scalars_of(result) if kind == "scalars" else result.get(kind, {})
                values |= {prefix + name: value for name, value in by_path(here).items()}
        return logs

    def _save_image(self, name: str, step: int, images: Any) -> Array:
        picture = tile(_pixels(name, images))
        write_atomically(self._path(name, step), tf.io.encode_png(picture).numpy())
        return picture

    def _save_figure(self, name: str, step: int, figure: Any) -> Array:
        from matplotlib import pyplot

        path = self._path(name, step)
        figures.save_figure(figure, path)
        pyplot.close(figure)  # it keeps those that it has made
        return tf.io.decode_png(path.read_bytes(), channels=4).numpy()

    def _path(self, name: str, step: int) -> Path:
        Path(self.train).mkdir(exist_ok=True)
        file_name = re.sub(r"[^\w.-]", "_", name)
        return Path(self.train, f"{file_name}_{step:08d}.png")

    def _write(self, step: int, scalars: dict[str, float], pictures: dict[str, Array]) -> None:
        if self.writer is None:
            self.writer = tf.summary.create_file_writer(str(Path(self.root, "tb")))
        with self.writer.as_default(step):
            for name, value in scalars.items():
                tf.summary.scalar(name, value)
            for name, picture in pictures.items():
                tf.summary.image(name, picture[np.newaxis])


def scalars_of(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return the scalars of what a `log_op` returned, nested as they are."""
    others = {name: value for name, value in result.items() if name not in KINDS}
    return others | dict(result.get("scalars", {}))


def _number(name: str, value: Any) -> float:
    if math.prod(np.shape(value)) != 1:  # np.size is a method of a tensor of PyTorch
        expected = 'expected numbers, or arrays and figures below "images" and "figures"'
        raise ValueError(f"log_op returned {name!r} of shape {np.shape(value)}; {expected}")
    return float(value.item() if hasattr(value, "item") else np.reshape(value, ()))


def tile(images: Array) -> Array:
    """Return images, (N, H, W, C), as one, (rows * H, columns * W, C); what is left over is 0."""
    number, height, width, channels = images.shape
    columns = math.ceil(math.sqrt(number))
    rows = math.ceil(number / columns)
    cells = np.zeros((rows * columns, height, width, channels), images.dtype)
    cells[:number] = images
    grid = cells.reshape(rows, columns, height, width, channels).swapaxes(1, 2)
    return grid.reshape(rows * height, columns * width, channels)


def _pixels(name: str, images: Any) -> Array:
    """Return images as uint8 of shape (N, H, W, C); see `LoggingHook`."""
    array = np.asarray(images)
    array = array[np.newaxis] if array.ndim == 3 else array
    if array.ndim != 4 or array.shape[-1] not in (1, 3, 4) or 0 in array.shape:
        expected = "expected (N, H, W, C), C 1, 3 or 4"
        raise ValueError(f"image {name!r} has the shape {np.shape(images)}; {expected}")
    if array.dtype == np.uint8:
        return array
    if not np.issubdtype(array.dtype, np.floating):
        raise ValueError(f"image {name!r} is of {array.dtype}; expected uint8, or floats")
    array = np.nan_to_num(array.astype(np.float64))
    array = (array + 1) / 2 if array.min() < 0 else array
    return np.rint(array.clip(0, 1) * 255).astype(np.uint8)
