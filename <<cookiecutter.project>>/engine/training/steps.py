"""Runs many steps in one compiled call, on batches that are made ready while the one before runs.

How steps are grouped changes no bit: every step is a compiled function of its batch and the model's
variables, and which one that is depends only on its place in the run and the batch's shapes."""

import functools
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf
from keras import tree

from engine import keras_private
from engine.batches import Ahead, BatchSource, batch_source, shapes_of
from engine.building import reason_of
from engine.checkpoints import freeze
from engine.devices import Workers, replicas
from engine.training import draws
from engine.trees import call_leaves, copied

LOOPS = ("StatelessWhile", "While")  # types of operations
FIRST_BATCHES = 8  # that are looked at where shapes vary
OF_A_BATCH = ValueError, tf.errors.InvalidArgumentError, tf.errors.UnimplementedError


class Call(NamedTuple):
    """What a call of one or many steps did."""

    step: int  # the one after the last one done, in the epoch
    results: dict[str, float]  # metrics of the epoch so far
    not_finite: int | None  # the first step whose loss is not a finite number
    last_results: Any  # what hooks are told of the last step
    seen: tuple[Any, ...] = ()  # its fetches, feeds and batch, if hooks were called before it


# Called before a step with (fetches, feeds, batch), the first two of which it may change.
Before = Callable[[dict[str, Any], Any, Any], None]
# Called with a step that was traced, a concrete function; None: nothing is.
Look = Callable[[Any], None] | None
Step = Callable[[Any], Any]  # of a batch; returns metrics


class _Group(NamedTuple):
    """Batches of equal shapes."""

    num_steps: int
    batches: Any  # tensors: if they are run at once, stacked along a new first dimension; or a list
    spec: Any  # of one batch, see `_Traces`
    kind: tuple[str, bool]  # the spec as text, and whether they are run at once


class _Traces:
    """A step, compiled for batches like the first ones, and with open dimensions for others."""

    def __init__(self, model: keras.Model, step: Step, source: BatchSource, look: Look) -> None:
        self._model, self._step, self._look = model, step, look
        self._first = source.batch(0, 0)
        self.base = tree.map_structure(_spec_of, arrays_of(self._first))
        if source.steps_per_epoch > 2:  # the last one may be smaller, which does not count
            self.base = self.spec_of(arrays_of(source.batch(0, 1)), "batch 2", number_too=True)
        if self.varies:
            for number in range(2, min(source.steps_per_epoch - 1, FIRST_BATCHES)):
                self.base = self.spec_of(arrays_of(source.batch(0, number)), f"batch {number + 1}")
            if (declared := getattr(source, "element_spec", None)) is not None:
                self.base = tree.map_structure(_opened_as, self.base, declared)
        self._loops = False
        self.names: list[str] = []  # of the metrics that a step returns, as far as it is known
        self._traced: dict[str, Any] = {}
        self.get(self.base)

    @property
    def varies(self) -> bool:
        """Whether not all batches have the same shape, but perhaps the last."""
        return any(None in spec.shape for spec in tree.flatten(self.base))

    def spec_of(self, batch: Any, name: str, number_too: bool = False) -> Any:
        """Return the spec of a batch, with open dimensions; ValueError for another structure."""
        try:
            opened = functools.partial(_opened, number_too=number_too)
            return tree.map_structure(opened, self.base, batch)
        except (ValueError, TypeError) as error:
            expected = f"expected the structure of the first batch, {shapes_of(self._first)}"
            raise ValueError(f"the data of {name} is {shapes_of(batch)}; {expected}") from error

    def get(self, spec: Any) -> Any:
        """Return the function for what `spec_of` returned."""
        if self._model.run_eagerly:
            return self._step
        # Steps that loop, as recurrent layers do, would take a quarter as long again.
        if not self._loops:
            any_number = tree.map_structure(
                lambda s: tf.TensorSpec([None, *s.shape[1:]] if s.shape else [], s.dtype), spec
            )
            key = str(any_number)
            if key not in self._traced:
                try:
                    traced = self._trace(any_number)
                except Exception:  # a model may have to know the number; if not that, see below
                    traced = None
                # Where shapes vary, a second trace would take longer than it wins back.
                if traced and not self.varies:
                    self._loops = any(op.type in LOOPS for op in traced.graph.get_operations())
                self._traced[key] = self._looked_at(None if self._loops else traced)
            if self._traced[key]:
                return self._traced[key]
        key = str(spec)
        if self._traced.get(key) is None:
            self._traced[key] = self._looked_at(self._trace(spec))
        return self._traced[key]

    def _looked_at(self, traced: Any) -> Any:
        if traced is not None:

            def zeros(output: Any) -> np.ndarray:
                shape = tf.TensorShape(getattr(output, "shape", ()))
                return np.zeros(shape if shape.is_fully_defined() else ())

            self.names = list(floats(tree.map_structure(zeros, traced.structured_outputs)))
            if self._look is not None:
                self._look(traced)
        return traced

    def _trace(self, spec: Any) -> Any:
        on_all = on_all_replicas(self._model, self._step)
        step = tf.function(on_all, jit_compile=self._model.jit_compile, autograph=False)
        with draws.replacing():
            return step.get_concrete_function(spec)


@dataclass(eq=False, repr=False)
class Steps:
    """Runs a compiled model's training steps on a batch source."""

    model: keras.Model
    source: BatchSource
    one_by_one: bool = False  # never group steps
    num_steps: int | None = None  # in all; None: there is no end
    look: Look = None  # called with each step that is traced

    # A signal may have to wait for the end of a call, and a progress bar too.
    SECONDS_PER_CALL = 0.08
    SECONDS_PER_CALL_OF_WORKERS = 1.0  # they agree after each call, in some 10 ms
    MOST_STEPS = 1000
    # A run of short epochs makes these singly, for if it ends soon it does not win back the time
    # that it takes to compile a function of many.
    FIRST_STEPS = 100

    def __post_init__(self) -> None:
        self.size = 1
        self._calls: dict[tuple[str, bool], Step] = {}
        self._traces: _Traces | None = None
        self._usual = ""  # the spec of batches that can be run at once
        is_alone = Workers(self.model.distribute_strategy).number == 1
        self._seconds = self.SECONDS_PER_CALL if is_alone else self.SECONDS_PER_CALL_OF_WORKERS
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
        self._ahead: tuple[tuple[int, int], Future[_Group]] | None = None
        self._last: tuple[tuple[int, int] | None, Any] = (None, None)  # batch that was read

    def compile(self) -> _Traces:
        """Compile for the first batch, if that is not done, which makes what a step makes."""
        if self._traces is None:
            self._traces = _Traces(self.model, self.model.train_step, self.source, self.look)
            self._usual = "" if self._traces.varies else str(self._traces.base)
        return self._traces

    def forget(self) -> None:
        """Forget what was compiled: what it was traced from may be another by now."""
        self._traces = None
        self._calls = {}

    def begin_epoch(self, epoch: int) -> None:
        """Start the metrics of an epoch."""
        self.model.reset_metrics()

    @property
    def learning_rate(self) -> float | None:
        """The rate in force, if there is one."""
        return float(keras.ops.convert_to_numpy(self.model.optimizer.learning_rate))

    def run(
        self, epoch: int, step: int, until: int, then: int, before: Before | None = None
    ) -> Call:
        """Run steps of `epoch` from `step` on, at least one, and none from `until` on; with
        `before`, only one. The batches of the next call, to stop at `then`, are made ready."""
        group = self._take(epoch, step, step + 1 if before else until)
        after, steps_per_epoch = step + group.num_steps, self.source.steps_per_epoch
        if after == steps_per_epoch:
            self._make_ready(epoch + 1, 0, steps_per_epoch)
        else:
            self._make_ready(epoch, after, until if after < until else then)
        known = group.kind in self._calls
        start = time.perf_counter()
        if before:
            return self._run_with(before, group, epoch, step)
        try:
            results, are_finite = self._call(group)
            finite = np.asarray(are_finite)
        except OF_A_BATCH as error:
            some, at_once = group.batches, group.kind[1]
            batch = tree.map_structure(lambda a: a[0], some) if at_once else some[0]
            last = f" (or one up to {after})" if group.num_steps > 1 else ""
            raise _untaken(f"step {step + 1} of epoch {epoch + 1}{last}", batch, error) from error
        if known and not self.one_by_one:  # the first call of a kind may have been compiled
            seconds = (time.perf_counter() - start) / group.num_steps
            self.size = int(min(max(self._seconds / seconds, 1), self.MOST_STEPS))
        metrics, not_finite = floats(results), None if finite.all() else step + int(finite.argmin())
        return Call(after, metrics, not_finite, metrics)

    def close(self) -> None:
        """Let the thread go that makes batches ready."""
        self._executor.shutdown(cancel_futures=True)
        if isinstance(ahead := getattr(self.source, "ahead", None), Ahead):
            ahead.forget()  # a process ends when all that it has begun to read is read

    def _call(self, group: _Group) -> Any:
        """Run a group; return the last step's results, and which losses are finite."""
        if group.kind not in self._calls:
            self._calls[group.kind] = self._compile(group)
        return self._calls[group.kind](group.batches)

    def _run_with(self, before: Before, group: _Group, epoch: int, step: int) -> Call:
        """Run one step with what hooks have made of its batch, and of what it does."""
        arrays = tree.map_structure(lambda tensor: tensor.numpy(), group.batches)
        batch = tree.map_structure(lambda a: a[0], arrays) if group.kind[1] else arrays[0]
        fetches: dict[str, Any] = {
            "train_op": lambda batch: floats(self._call(self._group([batch], epoch, step))[0])
        }
        feeds = copied(batch)
        before(fetches, feeds, batch)
        if isinstance(batch, tuple) and isinstance(feeds, list):
            feeds = tuple(feeds)
        results = call_leaves(fetches, feeds)
        metrics = results.get("train_op", {})
        metrics = metrics if isinstance(metrics, dict) else {}
        not_finite = step if not np.isfinite(losses_in(metrics)).all() else None
        return Call(step + 1, metrics, not_finite, results | metrics, (fetches, feeds, batch))

    def _take(self, epoch: int, step: int, until: int) -> _Group:
        ahead, self._ahead = self._ahead, None
        if ahead and ahead[0] == (epoch, step) and step + ahead[1].result().num_steps <= until:
            return ahead[1].result()
        size = self._size_at(epoch, step, until)
        return self._executor.submit(self._stack, epoch, step, size).result()

    def _make_ready(self, epoch: int, step: int, until: int) -> None:
        if self.num_steps is not None:
            until = min(until, self.num_steps - epoch * self.source.steps_per_epoch)
        if (size := self._size_at(epoch, step, until)) > 0:
            self._ahead = (epoch, step), self._executor.submit(self._stack, epoch, step, size)

    def _size_at(self, epoch: int, step: int, until: int) -> int:
        size, early = min(self.size, until - step), self._early_steps_from(epoch, step)
        return min(size, early) if early > 0 else size

    def _early_steps_from(self, epoch: int, step: int) -> int:
        """Return how many steps are still to be made singly; after the last one, less than 1."""
        steps_per_epoch = self.source.steps_per_epoch
        first_steps = self.FIRST_STEPS if steps_per_epoch < self.FIRST_STEPS else 0
        return first_steps - epoch * steps_per_epoch - step

    def _stack(self, epoch: int, step: int, size: int) -> _Group:
        batches: list[Any] = []
        shapes: list[Any] = []
        for place in ((epoch, number) for number in range(step, step + size)):
            if self._last[0] != place:  # to go back by one, tf.data reads all from the start
                self._last = place, arrays_of(self.source.batch(*place))
            batch = self._last[1]
            shapes.append(tree.map_structure(lambda a: (a.shape, a.dtype.num), batch))
            if shapes[-1] != shapes[0]:
                break  # the last batch of an epoch may be smaller: it is a group of its own
            batches.append(batch)
        return self._group(batches, epoch, step)

    def _group(self, batches: list[Any], epoch: int, step: int) -> _Group:
        spec = self.compile().spec_of(batches[0], f"step {step + 1} of epoch {epoch + 1}")
        kind, is_early = str(spec), self._early_steps_from(epoch, step) > 0
        at_once = kind == self._usual and not is_early and not self.model.run_eagerly
        if at_once:
            tensors = tree.map_structure(lambda *a: tf.convert_to_tensor(np.stack(a)), *batches)
        else:
            tensors = [tree.map_structure(tf.convert_to_tensor, batch) for batch in batches]
        return _Group(len(batches), tensors, spec, (kind, at_once))

    def _compile(self, group: _Group) -> Step:
        """Return a function of batches: the last step's results, and which losses are finite."""
        one_step = self.compile().get(group.spec)
        if not group.kind[1]:
            return functools.partial(_run_singly, one_step)
        outputs = one_step.structured_outputs

        def many_steps(batches: Any) -> Any:
            num_steps = tf.shape(tree.flatten(batches)[0])[0]

            def body(number: tf.Tensor, _: Any, finite: tf.TensorArray) -> Any:
                results = one_step(tree.map_structure(lambda array: array[number], batches))
                return number + 1, results, finite.write(number, _are_finite(results))

            start = tree.map_structure(lambda spec: tf.zeros(spec.shape, spec.dtype), outputs)
            finite = tf.TensorArray(tf.bool, size=num_steps)
            begun = (tf.constant(0), start, finite)
            _, results, finite = tf.while_loop(
                lambda number, *_: number < num_steps, body, begun, parallel_iterations=1
            )
            return results, finite.stack()

        # Any number of steps, not of examples: a recurrent layer would take half as long again.
        many_of = tree.map_structure(lambda s: tf.TensorSpec([None, *s.shape], s.dtype), group.spec)
        return tf.function(many_steps, autograph=False).get_concrete_function(many_of)


def _run_singly(one_step: Step, batches: list[Any]) -> Any:
    # For Grappler to rewrite a step takes longer than a hundred steps win back.
    with keras_private.as_traced():
        results = [one_step(batch) for batch in batches]
    losses = [tree.flatten(losses_in(each)) for each in results]
    return results[-1], [all(np.isfinite(loss).all() for loss in each) for each in losses]


def losses_in(results: Mapping[str, Any]) -> list[Any]:
    """Return the losses that a step returns: those with the word in their name, else all."""
    return [value for name, value in results.items() if "loss" in name] or [*results.values()]


def _are_finite(results: Mapping[str, Any]) -> Any:
    values = tree.flatten(losses_in(results))
    floats = [v for v in map(tf.convert_to_tensor, values) if v.dtype.is_floating]
    return tf.reduce_all([tf.reduce_all(tf.math.is_finite(value)) for value in floats])


def on_all_replicas(model: keras.Model, step: Step) -> Step:
    """Return a step of which every replica does a part of the batch, or the whole of a tiny one."""
    strategy = model.distribute_strategy
    if strategy is None or strategy.num_replicas_in_sync == 1:
        return step

    generator = keras_private.seed_generator()
    metrics = [v for v in model.metrics_variables if replicas.has_one_each(v)]

    def on_part(batch: Any) -> list[tf.Tensor]:
        # Each replica is traced in a thread of its own, and Keras would make one for each thread.
        keras_private.share_seed_generator(generator)
        context = tf.distribute.get_replica_context()
        number, parts = context.replica_id_in_sync_group, context.num_replicas_in_sync

        def part(tensor: tf.Tensor) -> tf.Tensor:
            size = tf.shape(tensor)[0]
            begin, end = number * size // parts, (number + 1) * size // parts
            return tf.cond(size < parts, lambda: tensor, lambda: tensor[begin:end])

        mine = tree.map_structure(part, batch)
        sizes = [tf.shape(tree.flatten(each)[0])[0] for each in (mine, batch)]
        with replicas.part_of(*sizes):
            step(mine)
        return replicas.sum_over_replicas([tf.convert_to_tensor(v.value) for v in metrics])

    def on_all(batch: Any) -> Mapping[str, Any]:
        sums = [strategy.experimental_local_results(s)[0] for s in strategy.run(on_part, (batch,))]
        with keras.StatelessScope(list(zip(metrics, sums, strict=True))):
            return model.get_metrics_result()

    return on_all


def floats(results: Mapping[str, Any]) -> dict[str, float]:
    """Return metrics, perhaps nested, as floats; one with a value a class as name_0, name_1, …."""
    flat: dict[str, float] = {}
    for name, value in results.items():
        if isinstance(value, Mapping):
            flat |= floats(value)
        elif np.ndim(value):
            values = np.asarray(value).reshape(-1)
            flat |= {f"{name}_{number}": float(each) for number, each in enumerate(values)}
        else:
            flat[name] = float(value)
    return flat


def make_variables(model: keras.Model, batch: Any, fine_tune: str | None = None) -> None:
    """Make the variables that come into being with the first batch, and change none; of weights,
    only those that `fine_tune` matches are to be trained. ValueError if it does not fit."""
    batch = tree.map_structure(keras.ops.convert_to_tensor, batch)
    try:
        step = on_all_replicas(model, model.test_step)
        if step != model.test_step:
            step = tf.function(step, autograph=False)
        with draws.replacing():
            step(batch)
    except (NotImplementedError, ValueError):
        if model.loss is not None:
            raise
        model(batch[0] if isinstance(batch, tuple) else batch, training=False)
    model.reset_metrics()
    if fine_tune is not None:
        freeze(model, fine_tune)
    if not model.optimizer.built:
        model.optimizer.build(model.trainable_variables)


def arrays_of(batch: Any) -> Any:
    """Return a batch as nested NumPy arrays; raise ValueError if there is anything else in it."""

    def array_of(leaf: Any) -> np.ndarray:
        array = np.asarray(leaf)
        if array.dtype.hasobject and not array.ndim:
            raise ValueError(f"a {type(leaf).__name__} is in a batch; expected dense arrays only")
        return array

    return tree.map_structure(array_of, batch)


def _spec_of(array: np.ndarray) -> tf.TensorSpec:
    return tf.TensorSpec(array.shape, array.dtype)


def _opened(spec: tf.TensorSpec, array: np.ndarray, number_too: bool) -> tf.TensorSpec:
    """Return the spec of an array, open in the dimensions in which it is not as `spec` is."""
    if len(spec.shape) != array.ndim:
        return _spec_of(array)
    sizes = [a if a == b else None for a, b in zip(spec.shape, array.shape, strict=True)]
    if sizes and spec.shape[0] is not None and not number_too:
        sizes[0] = len(array)
    return tf.TensorSpec(sizes, array.dtype)


def _opened_as(spec: tf.TensorSpec, declared: tf.TensorSpec) -> tf.TensorSpec:
    """Return a spec, open in the dimensions of an example that tf.data leaves open."""
    if spec.shape.rank != declared.shape.rank or not spec.shape.rank:
        return spec
    both = zip(spec.shape[1:], declared.shape[1:], strict=True)
    sizes = [None if may_be is None else size for size, may_be in both]
    return tf.TensorSpec([spec.shape[0], *sizes], spec.dtype)


def _untaken(what: str, batch: Any, error: Exception) -> ValueError:
    return ValueError(f"{what} cannot take its batch, {shapes_of(batch)}: {reason_of(error)}")


class Validation:
    """Evaluates a model on epoch 0 of what `batch_source` takes, compiled once for all epochs."""

    def __init__(self, model: keras.Model, examples: Any, look: Look = None) -> None:
        self.model, self.source, self._look = model, batch_source(examples, shuffle=False), look
        self._traces: _Traces | None = None

    def compile(self) -> _Traces:
        """Trace the step for the first batches, which makes variables that are not there yet."""
        if self._traces is None:
            self._traces = _Traces(self.model, self.model.test_step, self.source, self._look)
        return self._traces

    def run(
        self, callbacks: keras.callbacks.CallbackList, stop: Callable[[], bool]
    ) -> dict[str, float] | None:
        """Return the metrics over all examples, or None if `stop` said so after a batch."""
        traces = self.compile()
        self.model.reset_metrics()
        callbacks.on_test_begin()
        results: dict[str, Any] = {}
        for step in range(self.source.steps_per_epoch):
            batch = arrays_of(self.source.batch(0, step))
            test_step = traces.get(traces.spec_of(batch, f"evaluation step {step + 1}"))
            callbacks.on_test_batch_begin(step)
            try:
                with draws.replacing():
                    results = test_step(tree.map_structure(tf.convert_to_tensor, batch))
            except OF_A_BATCH as error:
                raise _untaken(f"evaluation step {step + 1}", batch, error) from error
            callbacks.on_test_batch_end(step, results)
            if stop():
                return None
        logs = floats(results)
        callbacks.on_test_end(logs)
        return logs
