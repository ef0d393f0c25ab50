"""Uses names of Keras and TensorFlow that are not public, each in one function. A test of the
template tries each function, and so shows which name a new version has dropped."""

import contextlib
import ctypes
import functools
import random
import struct
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import h5py
import keras
import tensorflow as tf
from keras.src.backend.common import global_state
from keras.src.legacy.saving import legacy_h5_format
from keras.src.random.seed_generator import GLOBAL_SEED_GENERATOR, global_seed_generator
from tensorflow.compiler.xla.tsl.protobuf import coordination_config_pb2
from tensorflow.python.distribute.cluster_resolver import slurm_cluster_resolver
from tensorflow.python.eager import context
from tensorflow.python.framework import op_callbacks


def seed_generator() -> keras.random.SeedGenerator:
    """Return this thread's generator, made at the first call, seeded by Python's `random`."""
    return global_seed_generator()


def share_seed_generator(generator: keras.random.SeedGenerator) -> None:
    """Have this thread, too, draw from a generator, where no other is given."""
    global_state.set_global_attribute(GLOBAL_SEED_GENERATOR, generator)


def layers_of(model: keras.Model) -> list[keras.Layer]:
    """Return a model and all the layers in it, those within layers and models too."""
    return list(model._flatten_layers())


def take_gradient_sum(optimizer: keras.Optimizer) -> Callable[[list[Any]], list[Any]]:
    """Return the function that adds up gradients of all replicas; Keras calls it no more."""
    add_up = optimizer._all_reduce_sum_gradients
    for each in (optimizer, getattr(optimizer, "inner_optimizer", optimizer)):
        each._all_reduce_sum_gradients = list
    return add_up


def set_moments(layer: keras.layers.BatchNormalization, moments: Callable[..., Any]) -> None:
    """Have a layer, unless its class has its own, call `moments(layer, inputs, mask)`."""
    if type(layer)._moments is keras.layers.BatchNormalization._moments:
        layer._moments = functools.partial(moments, layer)


def moments_of(layer: keras.layers.BatchNormalization, inputs: Any, mask: Any) -> Any:
    """Return mean and variance of inputs as Keras computes them, over the axes but the layer's."""
    return keras.layers.BatchNormalization._moments(layer, inputs, mask)


def write_hdf5(model: keras.Model, file: h5py.File) -> None:
    """Write what `model.save("model.h5")` does into an open file, without the optimizer."""
    compile_config = getattr(model, "_compile_config", None)  # none before compile()
    # Keras takes the optimizer out of it.
    kept = dict(compile_config.config) if compile_config is not None else None
    write_optimizer = legacy_h5_format.save_optimizer_weights_to_hdf5_group
    try:
        legacy_h5_format.save_optimizer_weights_to_hdf5_group = lambda *_: None
        legacy_h5_format.save_model_to_hdf5(model, file, include_optimizer=True)
    finally:
        legacy_h5_format.save_optimizer_weights_to_hdf5_group = write_optimizer
        if compile_config is not None:
            compile_config.config = kept


def own_weights(model: keras.Model) -> list[Any]:
    """Return the weights that belong to a model itself, and to none of its layers."""
    weights = {id(weight) for weight in model.weights}
    own = [*model._trainable_variables, *model._non_trainable_variables]
    return [variable for variable in own if id(variable) in weights]


def eager_generator() -> random.Random:
    """Return what seeds TensorFlow's random operations that are not in a graph."""
    if not hasattr(context.context(), "_rng"):  # as long as no seed was set
        tf.random.set_seed(0)
    return context.context()._rng


def graph_of(graph: Any, name: str) -> Any:
    """Return the graph of a function that a graph calls by its name; None if it has none."""
    return getattr(graph._get_function(name), "graph", None)


def give_seed(op: Any) -> None:
    """Give a random operation in a graph a seed, without which it is not deterministic."""
    if not op.get_attr("seed") and not op.get_attr("seed2"):
        op._set_attr("seed", tf.compat.v1.AttrValue(i=1))


@contextlib.contextmanager
def replacing_operations(replaced: Callable[[Any], Sequence[Any] | None]) -> Iterator[None]:
    """Within the block, have the tensors that `replaced` returns, unless that is None, take the
    place of those of an operation that this thread adds to a graph."""

    def look(
        _: str, __: Any, ___: Any, outputs: Any, op_name: Any = None, graph: Any = None
    ) -> Any:
        return replaced(outputs[0].op) if graph is not None and len(outputs) else None

    op_callbacks.add_op_callback(look)
    try:
        yield
    finally:
        op_callbacks.remove_op_callback(look)


@contextlib.contextmanager
def as_traced() -> Iterator[None]:
    """Have this thread's functions run without Grappler; public options hold for all."""
    eager = context.context()
    usual = eager.function_call_options
    config = tf.compat.v1.ConfigProto.FromString(usual.config_proto_serialized)
    config.graph_options.rewrite_options.disable_meta_optimizer = True
    eager.function_call_options = context.FunctionCallOptions(usual.executor_type, config)
    try:
        yield
    finally:
        eager.function_call_options = usual


def set_patience(number: int, seconds_to_register: int, seconds_of_silence: int) -> None:
    """Say, before TensorFlow has run anything, how long its workers wait for each other."""
    context.context().configure_coordination_service(
        service_type="standalone",
        service_leader="/job:worker/replica:0/task:0",
        cluster_register_timeout_in_ms=seconds_to_register * 1000,
        heartbeat_timeout_in_ms=seconds_of_silence * 1000,
        coordinated_jobs=[coordination_config_pb2.CoordinatedJob(name="worker", num_tasks=number)],
    )


def tell_workers(why: str) -> None:
    """End what the other workers do together with this one: it raises an error there."""
    context.context().report_error_to_cluster(tf.errors.FAILED_PRECONDITION, why)


def hosts_in(nodelist: str) -> Sequence[str]:
    """Return the names in SLURM's short form, such as n[1-3,7], in its order."""
    return slurm_cluster_resolver.expand_hostlist(nodelist)


@contextlib.contextmanager
def exiting_after(seconds: int, code: int) -> Iterator[None]:
    """End the process with an exit code if the block takes longer; on Linux only.

    A thread or handler of Python would wait for TensorFlow to return, so a timer of the C library
    calls `_exit`; `faulthandler`, which could do that too, knows the code 1 only."""
    if not sys.platform.startswith("linux"):
        yield
        return
    library, timer, call_in_a_thread = ctypes.CDLL(None), ctypes.c_void_p(), 2
    leave = ctypes.cast(library._exit, ctypes.c_void_p)
    # `struct sigevent`: value, signal, what to do, function, padding.
    event = struct.pack("niiP40x", code, 0, call_in_a_thread, leave.value)
    length = (ctypes.c_long * 4)(0, 0, seconds, 0)  # no repetition, then seconds
    if library.timer_create(time.CLOCK_MONOTONIC, event, ctypes.byref(timer)):
        raise OSError("the system gives no timer, without which a worker may wait for ever")
    library.timer_settime(timer, 0, length, None)
    try:
        yield
    finally:
        library.timer_delete(timer)
