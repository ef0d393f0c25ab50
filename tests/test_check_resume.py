"""`bin/check_resume.py` finds what breaks the promise in one's own code, and says where."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest
from conftest import run

pytestmark = pytest.mark.slow

FAULTS = """
import itertools
import os
import signal
from dataclasses import replace

import keras
import numpy as np
import tensorflow as tf

from src.data import get_digits
from engine.hooks import Hook
from src.models import build_simple_cnn


class Forgetful(keras.callbacks.Callback):
    def __init__(self):
        super().__init__()
        self.steps = 0

    def on_train_batch_begin(self, batch, logs=None):
        self.steps += 1
        self.model.optimizer.learning_rate = 0.001 * self.steps


class ForgetfulHook(Hook):
    def __init__(self):
        self.steps = 0

    def after_step(self, global_step, last_results):
        self.steps += 1
        self.run.model.optimizer.learning_rate = 0.001 * self.steps


class Advancing:
    steps_per_epoch = 10

    def __init__(self, batches):
        self.batches = batches
        self.count = itertools.count()

    def batch(self, epoch, step):
        return self.batches.batch(0, next(self.count) % self.batches.steps_per_epoch)


def get_advancing(config):
    dataset = get_digits(config)
    return replace(dataset, train=Advancing(dataset.train))


class Crashing(keras.callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None):
        os.kill(os.getpid(), signal.SIGSEGV)


class OwnGenerator(keras.layers.Layer):
    def __init__(self):
        super().__init__()
        self.generator = np.random.default_rng()

    def call(self, inputs):
        return inputs * self.generator.uniform(0.5, 1.5)


class PythonFunction(keras.layers.Layer):
    def __init__(self):
        super().__init__()
        self.count = itertools.count()

    def call(self, inputs):
        factor = tf.py_function(lambda: 1.0 + 0.1 * next(self.count), [], tf.float32)
        return inputs * tf.reshape(factor, [])


def with_layer(layer):
    def build(config, input_shape, num_classes):
        inner = build_simple_cnn(config, input_shape, num_classes)
        inputs = keras.Input(input_shape)
        return keras.Model(inputs, inner(layer()(inputs)))

    return build


build_with_generator = with_layer(OwnGenerator)
build_with_python = with_layer(PythonFunction)
"""

SMALL = ("digits", "--kills=3", "--n_filters=2", "--n_layers=1", "--batch_size=126")


@pytest.fixture(scope="module")
def faulty(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose owner has made every mistake there is."""
    copy = tmp_path_factory.mktemp("faulty") / "my-research"
    shutil.copytree(project, copy, symlinks=True)
    (copy / "src" / "faults.py").write_text(FAULTS)
    return copy


def test_what_is_in_order_is_identical(faulty: Path) -> None:
    done = run(sys.executable, "bin/check_resume.py", *SMALL, cwd=faulty)
    said = done.stdout.splitlines()[-1]
    assert said.startswith("identical: model.h5, model_best.h5, history.csv, killed after")
    assert "likely cause" not in done.stdout


@pytest.mark.parametrize(
    ("fault", "causes"),
    [
        ("--callbacks=[{class: faults:Forgetful}]", ("(Forgetful) changes its steps",)),
        ("--hooks=[{class: faults:ForgetfulHook}]", ("(ForgetfulHook) changes its steps",)),
        ("--dataset=faults:get_advancing", ("not a function of position", "faults.py, line")),
        ("--model=faults:build_with_generator", (".generator is a generator of Python",)),
        (
            "--model=faults:build_with_python",
            ("no checkpoint holds what the Python function of", "src/faults.py, line"),
        ),
    ],
    ids=["callback", "hook", "data", "generator", "operation"],
)
def test_a_planted_fault_is_found_and_named(
    fault: str, causes: tuple[str, ...], faulty: Path
) -> None:
    words = (sys.executable, "bin/check_resume.py", *SMALL, "--lr_schedule=null", fault)
    done = run(*words, cwd=faulty, env=os.environ, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "differ" in done.stdout
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("likely cause: ")]
    for cause in causes:
        assert cause in line


@pytest.mark.parametrize(
    ("fault", "code", "said"),
    [
        ("callbacks=[{class: os.abort}]", 1, "cannot be built: it died by SIGABRT (Aborted)"),
        (
            "callbacks=[{class: faults:Crashing}]",
            1,
            "the run itself fails: it died by SIGSEGV (Segmentation fault)",
        ),
        ("model=keras.Sequential", 2, "model 'keras.Sequential' does not take this config"),
    ],
)
def test_what_does_not_train_at_all_says_why(
    fault: str, code: int, said: str, faulty: Path
) -> None:
    words = (sys.executable, "bin/check_resume.py", *SMALL, f"--{fault}")
    done = run(*words, cwd=faulty, check=False)
    assert done.returncode == code
    assert said in done.stderr
