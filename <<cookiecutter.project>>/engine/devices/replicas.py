"""Keeps copies of a model on several devices the same: every replica makes the same update.

Metrics differ, because each counts its part of a batch; a checkpoint has those of every replica."""

import contextlib
import functools
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from engine import keras_private
from engine.devices.workers import Workers
from vegab import UsageError

NUM_REPLICAS = "num_replicas"  # attribute of a checkpoint's dataset: its first dimension
_part = threading.local()  # of the batch that is trained on; each replica is traced in a thread


def make_seed_generator() -> None:
    """Make Keras' global generator; initial weights stay those of one device."""
    before = random.getstate()
    keras_private.seed_generator()
    random.setstate(before)


def prepare(model: Any) -> None:
    """Make a model fit for several devices; UsageError if its steps cannot be shared out."""
    if model.run_eagerly:
        raise UsageError("a model with run_eagerly trains on one device; compile it without that")
    if getattr(model.optimizer, "gradient_accumulation_steps", None):
        raise UsageError("accumulate_steps needs one device; give a larger batch_size instead")
    if getattr(model.optimizer, "ema_overwrite_frequency", None):
        raise UsageError("ema_overwrite_frequency needs one device; leave it out")
    for layer in keras_private.layers_of(model):
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.synchronized = True
            keras_private.set_moments(layer, _moments)
    for optimizer in optimizers_of(model):
        add_up = keras_private.take_gradient_sum(optimizer)
        optimizer.scale_loss = functools.partial(_scale_loss, optimizer.scale_loss)
        optimizer.apply = functools.partial(_apply, optimizer.apply, add_up)


def optimizers_of(model: Any) -> list[keras.Optimizer]:
    """Return the optimizer that a model was compiled with, and others that it has."""
    others = [value for value in vars(model).values() if isinstance(value, keras.Optimizer)]
    return list({id(optimizer): optimizer for optimizer in (model.optimizer, *others)}.values())


@contextlib.contextmanager
def part_of(size: tf.Tensor, whole: tf.Tensor) -> Iterator[None]:
    """Say how many examples of a batch this replica trains on, and how many the batch has."""
    parts = tf.distribute.get_replica_context().num_replicas_in_sync
    _part.weight = tf.cast(tf.where(size < whole, size * parts / whole, 1.0), tf.float32)
    try:
        yield
    finally:
        del _part.weight


def _scale_loss(scale_loss: Callable[[tf.Tensor], tf.Tensor], loss: tf.Tensor) -> tf.Tensor:
    """Weight the loss of a part by its examples; Keras assumes that all parts have as many."""
    return scale_loss(loss * tf.cast(getattr(_part, "weight", 1.0), loss.dtype))


def _apply(
    apply: Callable[..., None], add_up: Callable[..., Any], gradients: Sequence, variables: Sequence
) -> None:
    """Update by the gradients of the whole batch; Keras would clip those of each replica."""
    if tf.distribute.get_replica_context() is not None:
        gradients = [sums for sums, _ in add_up(list(zip(gradients, variables, strict=True)))]
    apply(gradients, variables)


def _moments(layer: Any, inputs: tf.Tensor, mask: tf.Tensor | None) -> Any:
    """Return mean and variance over the whole batch, by one message; Keras would send three."""
    context = tf.distribute.get_replica_context()
    if context is None or mask is not None:
        return keras_private.moments_of(layer, inputs, mask)
    axes = [a for a in range(len(inputs.shape)) if a != layer.axis % len(inputs.shape)]
    count = tf.cast(tf.size(inputs) // inputs.shape[layer.axis], inputs.dtype)
    sums = [tf.reduce_sum(inputs, axes), tf.reduce_sum(tf.square(inputs), axes)]
    total, squares, count = sum_over_replicas([*sums, count])
    mean = total / count
    return mean, tf.maximum(squares / count - tf.square(mean), 0.0)


def sum_over_replicas(tensors: Sequence[tf.Tensor]) -> list[tf.Tensor]:
    """Return the sums over all replicas, each of which calls this; one message for each dtype."""
    context = tf.distribute.get_replica_context()
    summed = list(tensors)
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        numbers = [number for number, tensor in enumerate(tensors) if tensor.dtype == dtype]
        flat = tf.concat([tf.reshape(tensors[number], [-1]) for number in numbers], axis=0)
        sums = context.all_reduce(tf.distribute.ReduceOp.SUM, flat)
        parts = tf.split(sums, [tensors[number].shape.num_elements() for number in numbers])
        for number, part in zip(numbers, parts, strict=True):
            summed[number] = tf.reshape(part, tensors[number].shape)
    return summed


def has_one_each(variable: Any) -> bool:
    """Whether each replica has a value of its own for a variable, as for metrics."""
    value = variable.value if isinstance(variable, keras.Variable) else variable
    return bool(components(value)) and value.synchronization == tf.VariableSynchronization.ON_READ


def components(variable: Any) -> Sequence[tf.Variable]:
    """Return the variable of each replica in this process; none, if there is but one device."""
    value = variable.value if isinstance(variable, keras.Variable) else variable
    return value.values if isinstance(value, tf.distribute.DistributedValues) else ()


class Agreement:
    """Whether the copies of a model are the same, bit for bit, on all devices of all workers."""

    def __init__(self, variables: Sequence[Any], workers: Workers) -> None:
        self.workers = workers
        self.variables = [v for v in variables if components(v) and not has_one_each(v)]
        parts = [components(variable) for variable in self.variables]

        def digests() -> tf.Tensor:  # uint8 of shape (variables, replicas here, 8)
            rows = [[tf.fingerprint(v.read_value()[tf.newaxis]) for v in part] for part in parts]
            return tf.stack([tf.concat(row, axis=0) for row in rows])

        self._digests = tf.function(digests) if workers.num_replicas > 1 and parts else None

    def require(self) -> None:
        """Raise a UsageError naming a variable that differs; all workers call this at one step."""
        if self._digests is None:
            return
        mine = self._digests().numpy()
        rows = self.workers.gather_bytes(mine.tobytes())
        found = np.stack([np.frombuffer(row, np.uint8).reshape(mine.shape) for row in rows])
        differs = (found != found[:1, :, :1]).any(axis=(0, 2, 3))
        if differs.any():
            variable = self.variables[int(differs.argmax())]
            name = getattr(variable, "path", variable.name)
            why = "it depends on the part of a batch that a device sees; train this model on one"
            raise UsageError(f"{name} is not the same on all devices: {why}")


def gather(values: Sequence[np.ndarray], workers: Workers) -> list[np.ndarray]:
    """Return arrays of (replicas here, ...) as such of (replicas, ...); all workers call it."""
    rows = workers.gather_bytes(b"".join(array.tobytes() for array in values))
    gathered, begin = [], 0
    for array in values:
        parts = [np.frombuffer(row, array.dtype, array.size, begin) for row in rows]
        gathered.append(np.concatenate([part.reshape(array.shape) for part in parts]))
        begin += array.nbytes
    return gathered


def assign(variable: Any, values: np.ndarray, workers: Workers) -> None:
    """Give each replica here its value back; if their number differs, the first gets the sum."""
    if len(values) != workers.num_replicas:
        first = values.sum(axis=0, dtype=values.dtype)
        values = np.stack([first, *[np.zeros_like(first)] * (workers.num_replicas - 1)])
    here = components(variable)
    for number, component in enumerate(here, start=workers.rank * len(here)):
        component.assign(values[number])
