"""Runs an iterator for the training loop: one step at a time, and its validation."""

import contextlib
import itertools
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from engine import keras_private
from engine.batches import BatchSource, random_generator
from engine.training import Before, Call
from engine.trees import copied

STEP_STREAM = 3  # of random numbers that a step draws


class IteratorSteps:
    """Runs an iterator as `Steps` runs a model; what a step draws depends on seed and step."""

    one_by_one = True
    size = 1

    def __init__(self, iterator: Any, source: BatchSource, seed: int) -> None:
        self.iterator, self.source, self.seed = iterator, source, seed
        self._sums: dict[str, list[float]] = {}
        self._made = False
        keras_private.seed_generator()  # made on the first call, with a seed that Python draws

    def compile(self) -> None:
        """Make the variables that come into being with the first batch."""
        self._make(self.source.batch(0, 0))

    def dry_run(self) -> None:
        """Make the variables that come into being with a step; what it assigns is undone."""
        with undone(self.iterator):
            self.run(0, 0, 1, 1)

    def begin_epoch(self, epoch: int) -> None:
        """Start the metrics of an epoch."""
        self.iterator.set_position(epoch * self.source.steps_per_epoch, epoch, 0)
        self._sums = {}

    @property
    def learning_rate(self) -> float | None:
        return self.iterator.learning_rate

    def get_state(self) -> dict[str, Any]:
        return {"sums": self._sums, "iterator": self.iterator.get_state()}

    def set_state(self, state: Mapping[str, Any]) -> None:
        self._sums = {name: list(pair) for name, pair in state["sums"].items()}
        self.iterator.set_state(state["iterator"])

    def run(
        self, epoch: int, step: int, until: int, then: int, before: Before | None = None
    ) -> Call:
        iterator = self.iterator
        global_step = epoch * self.source.steps_per_epoch + step
        batch = self.source.batch(epoch, step)
        self._make(batch)
        iterator.set_position(global_step, epoch, step)
        sow(self.seed, global_step)
        feeds = copied(batch)
        fetches = {"global_step": iterator.get_global_step, "step_ops": copied(iterator.step_ops())}
        if before:
            before(fetches, feeds, batch)
        results = iterator.run(fetches, feeds)
        metrics = iterator.figures(results)
        for name, value in metrics.items():
            total, number = self._sums.get(name, (0.0, 0))
            self._sums[name] = [total + value, number + 1]
        iterator.set_position(global_step + 1, epoch, step)
        return Call(
            step=step + 1,
            results={name: total / number for name, (total, number) in self._sums.items()},
            not_finite=None if all(map(np.isfinite, metrics.values())) else step,
            last_results=results,
            seen=(fetches, feeds, batch),
        )

    def close(self) -> None:
        if hasattr(self.source, "close"):
            self.source.close()

    def _make(self, batch: Mapping[str, Any]) -> None:
        if not self._made:
            self._made = True
            self.iterator.begin()
            self.iterator.make_variables(batch)


@dataclass
class IteratorValidation:
    """Averages what an iterator's `validate` returns; what it draws depends on seed and step."""

    iterator: Any
    source: BatchSource
    seed: int

    def run(
        self, callbacks: keras.callbacks.CallbackList, stop: Callable[[], bool]
    ) -> dict[str, float] | None:
        """Return means over the examples, or None if `stop` said so after a batch."""
        iterator = self.iterator
        place = iterator.get_global_step(), iterator.get_epoch_step(), iterator.get_batch_step()
        sums: dict[str, float] = {}
        num_examples = 0
        callbacks.on_test_begin()
        for step in range(self.source.steps_per_epoch):
            batch = self.source.batch(0, step)
            iterator.set_position(place[0], place[1], step, "validation")
            sow(self.seed, step)
            callbacks.on_test_batch_begin(step)
            metrics = iterator.validate(batch)
            callbacks.on_test_batch_end(step, dict(metrics))
            if not metrics or stop():
                break
            size = len(keras.tree.flatten(batch)[0])
            num_examples += size
            for name, value in metrics.items():
                sums[name] = sums.get(name, 0.0) + size * value
        iterator.set_position(*place)
        if stop():
            return None
        logs = {name: total / num_examples for name, total in sums.items()}
        callbacks.on_test_end(logs)
        return logs


@contextlib.contextmanager
def undone(iterator: Any) -> Iterator[None]:
    """Let variables keep their values, those that are made in the block their first ones, and
    TensorFlow's eager operations draw what they would have drawn."""
    eager = keras_private.eager_generator()
    state = eager.getstate()
    eager.seed(eager.getrandbits(64))  # an operation that draws with one seed again goes on with it
    model = iterator.model
    weights = model.weights if isinstance(model, keras.Model) else []
    variables = [*weights, *itertools.chain(*iterator.variables().values())]
    values = [(variable, keras.ops.convert_to_numpy(variable)) for variable in variables]

    def make(next_creator: Callable[..., Any], **arguments: Any) -> Any:
        variable, first = next_creator(**arguments), arguments["initial_value"]
        if tf.executing_eagerly():
            first = variable
        with tf.init_scope():  # within a trace it has no value yet
            values.append((variable, np.array(first() if callable(first) else first)))
        return variable

    try:
        with tf.variable_creator_scope(make):
            yield
    finally:
        for variable, value in values:
            variable.assign(value)
        eager.setstate(state)


def sow(seed: int, step: int) -> None:
    """Seed the generators of Python, NumPy and PyTorch; Keras' are variables in checkpoints."""
    number = int(random_generator(seed, step, STEP_STREAM).integers(2**32))
    random.seed(number)
    np.random.seed(number)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(number)
