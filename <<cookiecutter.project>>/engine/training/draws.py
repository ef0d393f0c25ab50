"""Replaces TensorFlow's random operations, whose counters are out of reach, while a step is traced,
by draws without a state, whose seeds come from a generator whose state is a variable."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import tensorflow as tf

from engine import keras_private

random = tf.random


def _shaped(draw: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function for operations that are given a shape and perhaps ranges."""
    return lambda op, shape, *ranges, seed: draw(shape, seed, *ranges, dtype=op.outputs[0].dtype)


def _each_of(draw: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function for operations that draw a shape for each of their parameters."""

    def drawn(op: Any, shape: Any, parameter: Any, seed: Any) -> Any:
        whole = tf.concat([shape, tf.shape(parameter, shape.dtype)], axis=0)
        return draw(whole, seed, parameter, dtype=op.outputs[0].dtype)

    return drawn


def _box(op: Any, size: Any, boxes: Any, covered: Any = 0.1, *, seed: Any) -> Any:
    names = ("aspect_ratio_range", "area_range", "max_attempts", "use_image_if_no_bounding_boxes")
    arguments = {name: op.get_attr(name) for name in names} | {"min_object_covered": covered}
    return tf.image.stateless_sample_distorted_bounding_box(size, boxes, seed, **arguments)


# By the type of an operation: a function of it, its inputs, and a seed.
WITHOUT_STATE: Mapping[str, Callable[..., Any]] = {
    "RandomStandardNormal": _shaped(random.stateless_normal),
    "TruncatedNormal": _shaped(random.stateless_truncated_normal),
    "RandomUniform": _shaped(random.stateless_uniform),
    "RandomUniformInt": _shaped(random.stateless_uniform),
    "ParameterizedTruncatedNormal": lambda op, *inputs, seed: (
        random.stateless_parameterized_truncated_normal(inputs[0], seed, *inputs[1:])
    ),
    "RandomGamma": _each_of(random.stateless_gamma),
    "RandomPoissonV2": _each_of(random.stateless_poisson),
    "RandomShuffle": lambda op, value, seed: random.experimental.stateless_shuffle(value, seed),
    "Multinomial": lambda op, logits, number, seed: random.stateless_categorical(
        logits, number, seed, dtype=op.outputs[0].dtype
    ),
    "SampleDistortedBoundingBox": _box,
    "SampleDistortedBoundingBoxV2": _box,
}
_generators: list[tf.random.Generator] = []  # one, as soon as it is known


def begin(seed: int) -> None:
    """Make the generator that all seeds come from; what comes first depends on `seed`."""
    _generators[:] = [tf.random.Generator.from_seed(seed)]


@contextlib.contextmanager
def replacing() -> Iterator[None]:
    """Within the block, replace the draws in what this thread traces."""
    if not _generators:
        begin(0)
    with keras_private.replacing_operations(_replaced):
        yield


def _replaced(op: tf.Operation) -> Sequence[tf.Tensor] | None:
    """Return what takes the place of an operation's outputs, or None."""
    if (draw := WITHOUT_STATE.get(op.type)) is None:
        return None
    keras_private.give_seed(op)  # nobody reads it any more, but TensorFlow computes it all the same
    drawn = draw(op, *op.inputs, seed=_generators[0].make_seeds(1)[:, 0])
    outputs = list(drawn) if isinstance(drawn, tuple) else [drawn]
    for output, replaced in zip(outputs, op.outputs, strict=True):
        output.set_shape(replaced.shape)
    return outputs
