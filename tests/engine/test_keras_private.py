"""Each private name of Keras and TensorFlow does what engine/keras_private.py expects of it."""

import random
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
import pytest
import tensorflow as tf
from machinery import ROOT

from engine import keras_private


def model() -> keras.Model:
    inner = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, name="deep")], name="inner")
    made = keras.Sequential([keras.Input((3,)), inner, keras.layers.Dense(1, name="last")])
    made.compile("adam", "mse")
    return made


def strategy() -> tf.distribute.Strategy:
    return tf.distribute.MirroredStrategy(
        ["CPU:0"], cross_device_ops=tf.distribute.ReductionToOneDevice()
    )


def test_the_seed_generator_is_what_draws_and_python_seeds_it() -> None:
    keras.utils.clear_session()
    random.seed(3)
    first = keras_private.seed_generator()
    assert keras_private.seed_generator() is first
    before = first.state.numpy()
    drawn = keras.random.uniform((2,)).numpy()
    assert not np.array_equal(first.state.numpy(), before)
    first.state.assign(before)
    assert np.array_equal(keras.random.uniform((2,)).numpy(), drawn)
    keras.utils.clear_session()
    random.seed(3)
    assert np.array_equal(keras_private.seed_generator().state.numpy(), before)


def test_a_seed_generator_can_be_shared_with_another_thread() -> None:
    mine, found = keras_private.seed_generator(), []

    def look(generator: keras.random.SeedGenerator | None) -> None:
        if generator is not None:
            keras_private.share_seed_generator(generator)
        found.append(keras_private.seed_generator() is mine)

    for given in (None, mine):
        thread = threading.Thread(target=look, args=(given,))
        thread.start()
        thread.join()
    assert found == [False, True]


def test_layers_within_layers_are_found() -> None:
    made = model()
    names = [layer.name for layer in keras_private.layers_of(made)]
    assert {made.name, "inner", "deep", "last"} <= set(names)


def test_gradients_are_added_up_when_asked_and_not_by_apply() -> None:
    with strategy().scope():
        optimizer = keras.optimizers.SGD(1.0)
        weight = keras.Variable(np.zeros(2, np.float32))
        optimizer.build([weight])
    add_up = keras_private.take_gradient_sum(optimizer)
    assert optimizer._all_reduce_sum_gradients([(1, 2)]) == [(1, 2)]

    @tf.function
    def step() -> list[tf.Tensor]:
        return strategy().run(lambda: [g for g, _ in add_up([(tf.ones(2), weight.value)])])

    assert step()[0].numpy().tolist() == [1.0, 1.0]


def test_a_layer_takes_its_moments_from_a_function() -> None:
    layer = keras.layers.BatchNormalization()
    inputs = np.arange(6, dtype=np.float32).reshape(3, 2)
    layer.build(inputs.shape)
    mean, variance = keras_private.moments_of(layer, tf.constant(inputs), None)
    np.testing.assert_allclose(mean, inputs.mean(axis=0))
    np.testing.assert_allclose(variance, inputs.var(axis=0))
    keras_private.set_moments(layer, lambda layer, inputs, mask: (tf.ones(2), tf.ones(2)))
    layer(inputs, training=True)
    np.testing.assert_allclose(layer.moving_mean, 0.01 * np.ones(2), rtol=1e-5)

    class Own(keras.layers.BatchNormalization):
        def _moments(self, inputs: tf.Tensor, mask: tf.Tensor | None) -> tuple[str, str]:
            return "my", "own"

    own = Own()
    keras_private.set_moments(own, lambda *_: None)
    assert own._moments(tf.constant(inputs), None) == ("my", "own")


def test_a_model_is_written_as_save_does_and_stays_as_it_is(tmp_path: Path) -> None:
    made = model()
    made.optimizer.build(made.trainable_variables)
    config = dict(made._compile_config.config)
    with h5py.File(tmp_path / "ours.h5", "w") as file:
        keras_private.write_hdf5(made, file)
    assert made._compile_config.config == config
    assert "optimizer" in config
    made.save(tmp_path / "keras.h5")
    with h5py.File(tmp_path / "ours.h5") as ours, h5py.File(tmp_path / "keras.h5") as theirs:
        assert dict(ours.attrs) == dict(theirs.attrs)
        assert [*ours] == ["model_weights"]
        names: list[str] = []
        theirs["model_weights"].visit(names.append)
        for name in names:
            one, other = ours["model_weights"][name], theirs["model_weights"][name]
            assert one.attrs.keys() == other.attrs.keys()
            if isinstance(one, h5py.Dataset):
                assert one[()].tobytes() == other[()].tobytes()


def test_weights_of_a_model_itself_are_told_from_those_of_its_layers() -> None:
    made = model()
    own = made.add_weight(shape=(), name="own")
    assert keras_private.own_weights(made) == [own]


def test_the_generator_of_eager_draws_decides_them() -> None:
    before = keras_private.eager_generator().getstate()
    tf.random.normal([])
    assert keras_private.eager_generator().getstate() != before


def test_operations_are_replaced_while_they_are_traced() -> None:
    def replaced(op: Any) -> Any:
        if op.type == "RandomStandardNormal":
            keras_private.give_seed(op)
            assert op.get_attr("seed") or op.get_attr("seed2")
            return [tf.ones(op.inputs[0])]
        return None

    with keras_private.replacing_operations(replaced):
        traced = tf.function(lambda: tf.random.normal([3])).get_concrete_function()
        assert not np.array_equal(tf.random.normal([3]), np.ones(3))  # of others it hears nothing
    np.testing.assert_array_equal(traced(), np.ones(3))


def test_a_model_without_a_config_is_refused(tmp_path: Path) -> None:
    class Own(keras.Model):
        def __init__(self, size: int) -> None:
            super().__init__()

    with h5py.File(tmp_path / "ours.h5", "w") as file, pytest.raises(NotImplementedError):
        keras_private.write_hdf5(Own(3), file)


def test_the_graph_of_a_called_function_is_found() -> None:
    inner = tf.function(lambda x: tf.math.sin(x))
    outer = tf.function(lambda x: inner(x) + 1).get_concrete_function(tf.constant(1.0))
    (call,) = [op for op in outer.graph.get_operations() if "PartitionedCall" in op.type]
    graph = keras_private.graph_of(outer.graph, call.get_attr("f").name)
    assert "Sin" in [op.type for op in graph.get_operations()]


def test_functions_run_as_they_were_traced_in_this_thread_only() -> None:
    from tensorflow.python.eager import context

    def is_disabled() -> bool:
        config = tf.compat.v1.ConfigProto.FromString(
            context.context().function_call_options.config_proto_serialized
        )
        return config.graph_options.rewrite_options.disable_meta_optimizer

    found = []
    with keras_private.as_traced():
        thread = threading.Thread(target=lambda: found.append(is_disabled()))
        thread.start()
        thread.join()
        found.append(is_disabled())
        assert tf.function(lambda x: x + 1)(1).numpy() == 2
    assert [*found, is_disabled()] == [False, True, False]


@pytest.mark.slow
def test_how_long_workers_wait_can_be_set() -> None:
    program = (
        "from engine import keras_private\n"
        "from tensorflow.python.eager import context\n"
        "keras_private.set_patience(2, 45, 20)\n"
        "config = context.context().coordination_service\n"
        "print(config.cluster_register_timeout_in_ms, config.heartbeat_timeout_in_ms,"
        " config.coordinated_job_list[0].num_tasks)\n"
    )
    said = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert said.stdout.split() == ["45000", "20000", "2"]


def test_hosts_are_in_slurm_s_order() -> None:
    assert list(keras_private.hosts_in("n[9-10,2],m1")) == ["n9", "n10", "n2", "m1"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="there is no such timer")
@pytest.mark.parametrize(
    ("seconds", "code"), [(1, 75), pytest.param(60, 0, marks=pytest.mark.slow)]
)
def test_a_timer_ends_a_process_in_which_python_runs_nothing(seconds: int, code: int) -> None:
    # ctypes.PyDLL keeps Python's lock while it sleeps.
    program = (
        "import ctypes; from engine import keras_private\n"
        f"with keras_private.exiting_after({seconds}, 75):\n"
        "    ctypes.PyDLL(None).sleep(2)\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False)
    assert ended.returncode == code
