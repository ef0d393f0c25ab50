"""Iterators: what their steps do, what is refused, and that the examples' runs resume exactly."""

import functools
import gc
import importlib
import json
import logging
import os
import signal
import sys
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops
from machinery import ROOT

import src.experiment
from configs import registry
from engine.checkpoints import read_state
from engine.devices import INTERRUPTED
from engine.experiment import Experiment
from engine.hooks.base import Hook
from engine.iterators import (
    PyHookedModelIterator,
    TemplateIterator,
    TFHookedModelIterator,
    edflow,
)
from engine.iterators.base import figures_in, found_variables
from engine.iterators.build import NoModel
from engine.iterators.datasets import DatasetMixin
from engine.iterators.evaluation import OtherModelError, evaluate_split
from engine.iterators.outputs import StoredOutputs
from engine.iterators.steps import IteratorSteps
from engine.iterators.trainers import (
    TFBaseEvaluator,
    TFBaseTrainer,
    TFFrequencyTrainer,
    TFListTrainer,
)
from src.examples.iterators import Samples
from src.experiment import build
from vegab import UsageError

Settings = Mapping[str, Any]
Position = tuple[int, int, int, str]

# ---- data ----------------------------------------------------------------------------------------


class Numbers(DatasetMixin):
    """Twelve examples, three steps of an epoch: their index as a number, and eight ones."""

    num_examples = 12

    def __init__(self, config: Settings) -> None:
        pass

    def __len__(self) -> int:
        return self.num_examples

    def get_example(self, index: int) -> dict[str, Any]:
        return {"number": np.float32(index), "ones": np.ones(8, np.float32)}


class FewNumbers(Numbers):
    """Two steps of validation, the second of which has one example."""

    num_examples = 5


class NoNumbers(Numbers):
    """An empty split."""

    num_examples = 0


class WithoutLength:
    """Is no dataset, for nobody knows how long it is."""

    def __init__(self, config: Settings) -> None:
        pass


# ---- models and iterators that count -------------------------------------------------------------


class FileCounter:
    """A model without a framework: counts its updates, and sums up what it is given, in order."""

    def __init__(self, config: Settings) -> None:
        self.config = config
        self.updates = 0
        self.total = 0.0

    def update(self, number: Any) -> float:
        self.updates += 1
        self.total = 0.5 * self.total + float(number.sum())
        return self.total


class Counter(FileCounter):
    """Keeps its own state."""

    def get_state(self) -> dict[str, Any]:
        return {"updates": self.updates, "total": self.total}

    def set_state(self, state: Settings) -> None:
        self.updates, self.total = state["updates"], state["total"]


class VariableCounter:
    """The same in variables of TensorFlow, which need nobody to keep them."""

    def __init__(self, config: Settings) -> None:
        self.updates = tf.Variable(0)
        self.total = tf.Variable(0.0)

    def update(self, number: Any) -> Any:
        self.updates.assign_add(1)
        return self.total.assign(0.5 * self.total + ops.sum(number))


class NoisyCounter(VariableCounter):
    """Draws, too: from a generator of its own, and from Keras' global one."""

    def __init__(self, config: Settings) -> None:
        super().__init__(config)
        self.noise = [tf.Variable(0.0), tf.Variable(0.0)]
        self.seed_generator = keras.random.SeedGenerator(7)

    def update(self, number: Any) -> Any:
        for noise, seed in zip(self.noise, (self.seed_generator, None), strict=True):
            noise.assign(keras.random.uniform((), seed=seed))
        return super().update(number)


class EagerlyNoisyCounter(NoisyCounter):
    """Draws from TensorFlow's eager generator as well."""

    def update(self, number: Any) -> Any:
        total = super().update(number)
        self.noise[1].assign_add(tf.random.uniform(()))
        return total


class Counts(PyHookedModelIterator):
    """Updates a counter at each step, and writes down where it stands."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.positions: list[Position | str] = []
        self.hooks.append(Hook())

    def initialize(self, checkpoint_path: str | None = None) -> None:
        self.positions.append("initialize")

    def step_ops(self) -> Any:
        return {"train_op": self.train_op}

    def train_op(self, model: Any, number: Any, **_: Any) -> float:
        self.positions.append(self.position())
        return model.update(number)

    def validate(self, batch: Settings) -> dict[str, float]:
        self.positions.append(self.position())
        return {"mean": float(batch["number"].mean())}

    def position(self) -> Position:
        where = self.get_global_step(), self.get_epoch_step(), self.get_batch_step()
        return (*where, self.get_split())


class Wraps(Counts):
    """Does something around the loop, as EDflow's iterators did in a session."""

    def iterate(self, batches: Any) -> None:
        self.positions.append(f"before {batches.steps_per_epoch}")
        super().iterate(batches)
        self.positions.append("after")


class CompiledCounts(TFHookedModelIterator):
    """The same, compiled; counts how often it is traced."""

    num_traces = 0

    def step_ops(self) -> Any:
        return {"train_op": self.train_op}

    def train_op(self, model: Any, number: Any, **_: Any) -> Any:
        self.num_traces += 1
        return model.update(number)


class NewFunctions(CompiledCounts):
    """Returns another function at every step, as one should not."""

    def step_ops(self) -> Any:
        return {"train_op": lambda model, **batch: self.train_op(model, **batch)}


class Template(TemplateIterator):
    """Counts how often each of its operations is computed."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.computed: dict[str, int] = {}

    def step_op(self, model: Any, **batch: Any) -> dict[str, Any]:
        def counted(name: str, function: Callable[[], Any]) -> Callable[[], Any]:
            def op() -> Any:
                self.computed[name] = self.computed.get(name, 0) + 1
                return function()

            return op

        return {
            "train_op": counted("train_op", lambda: model.update(batch["number"])),
            "log_op": counted("log_op", lambda: {"scalars": {"updates": model.updates}}),
            "eval_op": counted("eval_op", lambda: {"number": batch["number"]}),
            "more_op": counted("more_op", lambda: 7.0),
        }


class DrawsInEvaluation(Template):
    """Draws from the generator that training draws from, and changes a variable."""

    def evaluate(self, batch: Settings) -> dict[str, Any]:
        self.model.updates.assign_add(1)
        noise = keras.random.uniform((len(batch["number"]),)) + tf.random.uniform(())
        assert self.test_mode and self.get_split() == "validation"
        return {"noise": noise, "at": np.full(len(noise), self.get_global_step())}


class DrawsAndStoresNothing(DrawsInEvaluation):
    asked = 0

    def evaluate(self, batch: Settings) -> Any:
        super().evaluate(batch)
        self.asked += 1
        assert self.asked == 1, "nor will there be anything after another epoch"


class SavesFiles(Template):
    """Keeps its model in files of its own making, one of them in a folder."""

    def save(self, checkpoint_path: str) -> None:
        Path(checkpoint_path).mkdir()
        Path(checkpoint_path, "updates").write_bytes(bytes([self.model.updates]))
        Path(f"{checkpoint_path}.total").write_text(repr(self.model.total))

    def restore(self, checkpoint_path: str) -> None:
        (self.model.updates,) = Path(checkpoint_path, "updates").read_bytes()
        self.model.total = float(Path(f"{checkpoint_path}.total").read_text())


class LateModel(keras.Model):
    """Has no weights before it is called; is named, as a registered model is, for warm starts."""

    def __init__(self, config: Settings) -> None:
        super().__init__(name="late")
        self.dense = layers.Dense(1, name="dense")

    def call(self, ones: Any) -> Any:
        return self.dense(ones)


class LateIterator(TemplateIterator):
    """Has an optimizer that is built by its first step; notes what it begins with."""

    is_compiled = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.optimizer = keras.optimizers.Adagrad(0.1)  # whose slots do not begin with zeros
        self.begun_with: list[str | None] = []
        self.train_on = tf.function(self._train_on) if self.is_compiled else self._train_on

    def initialize(self, checkpoint_path: str | None = None) -> None:
        assert checkpoint_path is None or Path(checkpoint_path).is_file()
        self.begun_with.append(checkpoint_path)

    def _train_on(self, ones: Any) -> Any:
        with tf.GradientTape() as tape:
            loss = ops.mean(ops.square(self.model(ones) - 1.0))
        variables = self.model.trainable_variables
        self.optimizer.apply(tape.gradient(loss, variables), variables)
        return loss

    def step_op(self, model: Any, **batch: Any) -> dict[str, Any]:
        return {
            "train_op": lambda: float(self.train_on(batch["ones"])),
            "eval_op": lambda: {"outputs": model(batch["ones"])},
        }


def network() -> layers.Layer:
    dense = layer("same")
    dense.build((None, 8))
    return dense


class Frozen:
    """Has a network that nobody trains, with the names of the one that is trained."""

    def __init__(self, config: Settings) -> None:
        self.parts = {"inner": [network()]}  # an optimizer is nearer to what it trains


class HasAnother(PyHookedModelIterator):
    """Trains a network of its own; its optimizer is built by the first step."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.parts = {"inner": [network()]}
        self.optimizer = keras.optimizers.SGD(1.0, momentum=0.5)

    def step_ops(self) -> Any:
        return None if self.config.get("only_evaluates") else self.train_op

    def train_op(self, model: Any, ones: Any, **_: Any) -> Any:
        with tf.GradientTape() as tape:
            loss = ops.mean(self.parts["inner"][0](ones))
        variables = self.parts["inner"][0].trainable_variables
        self.optimizer.apply(tape.gradient(loss, variables), variables)
        return loss

    def eval_op(self, model: Any, ones: Any, **_: Any) -> dict[str, Any]:
        own, frozen = (it.parts["inner"][0](ones)[:, 0] for it in (self, model))
        return {"own": own, "frozen": frozen}


class ReadsItsCheckpoint(LateIterator):
    """Reads what it takes for a file that its `save` has written, as EDflow's iterators do."""

    def initialize(self, checkpoint_path: str | None = None) -> None:
        if checkpoint_path is not None:
            Path(checkpoint_path).read_text()


class LateCompiledIterator(LateIterator):
    is_compiled = True


class WithoutModel(PyHookedModelIterator):
    def step_ops(self) -> Any:
        return lambda model, number, **_: float(number.mean())


# ---- models of two parts, the loss of each of which depends on the other too ---------------------


def layer(name: str) -> layers.Layer:
    return layers.Dense(1, use_bias=False, kernel_initializer="ones", name=name)


def functional_parts(config: Settings) -> keras.Model:
    """Has the names of its parts in the paths of its variables."""
    ones = keras.Input((8,), name="ones")
    second = config.get("second", "critic")
    return keras.Model(ones, [layer("generator")(ones), layer(second)(ones)])


class PlainParts:
    """Has its parts as attributes, and is no Keras model."""

    def __init__(self, config: Settings) -> None:
        self.generator, self.critic = layer("first"), layer("second")
        for part in (self.generator, self.critic):
            part.build((None, 8))

    def __call__(self, ones: Any) -> tuple[Any, Any]:
        return self.generator(ones), self.critic(ones)


class KerasParts(keras.Model):
    """Has its parts as attributes."""

    def __init__(self, config: Settings) -> None:
        super().__init__()
        self.generator, self.critic, self.spare = layer("first"), layer("second"), layer("third")
        for part in (self.generator, self.critic, self.spare):
            part.build((None, 8))
        self.built = True

    def call(self, ones: Any) -> tuple[Any, Any]:
        return self.generator(ones), self.critic(ones)


def two_losses(model: Any, ones: Any) -> dict[str, Any]:
    """Return losses by which gradient descent at rate 1 takes 1 off `generator`, 8 off `critic`."""
    generated, judged = (ops.mean(output) for output in model(ones))
    return {"generator": generated + 2 * judged, "critic": 4 * generated + 8 * judged}


class Trainer(TFBaseTrainer):
    def make_loss_ops(self, model: Any, **batch: Any) -> Any:
        return two_losses(model, batch["ones"])


class FrequencyTrainer(TFFrequencyTrainer):
    opt_frequency: Any = {"generator": 2, "critic": 1}  # noqa: RUF012
    num_traces = 0

    def make_loss_ops(self, model: Any, **batch: Any) -> Any:
        self.num_traces += 1
        return two_losses(model, batch["ones"])


class NoFrequencyTrainer(FrequencyTrainer):
    opt_frequency = ()


class ListTrainer(TFListTrainer):
    num_traces = 0

    def make_loss_ops(self, model: Any, **batch: Any) -> Any:
        self.num_traces += 1
        losses = two_losses(model, batch["ones"])
        return [losses, {"critic": losses["critic"]}, {"generator": losses["generator"]}]

    def get_learning_rate_multiplier(self, index: int) -> float:
        return (1.0, 0.5, 0.25)[index]


def dropout_model(config: Settings) -> keras.Model:
    """Returns half the sum of eight ones, 4, unless some of them are dropped."""
    ones = keras.Input((8,), name="ones")
    half = layers.Dense(1, use_bias=False, kernel_initializer=keras.initializers.Constant(0.5))
    return keras.Model(ones, half(layers.Dropout(0.5)(ones)))


class DropoutTrainer(TFBaseTrainer):
    def make_loss_ops(self, model: Any, **batch: Any) -> Any:
        outputs = model(batch["ones"], training=self.is_training)
        return {"dense": ops.mean(ops.square(outputs - 4.0))}


class InnerDropout(keras.Model):
    """Has its dropout in a model within, and draws noise as well."""

    def __init__(self, config: Settings) -> None:
        super().__init__()
        self.inner = dropout_model(config)
        self.noise = keras.random.SeedGenerator(config["seed"])
        self.built = True


class InnerDropoutTrainer(TFBaseTrainer):
    def make_loss_ops(self, model: Any, **batch: Any) -> Any:
        return {"inner": ops.mean(self.eval_op(model, **batch)["sum"])}

    def eval_op(self, model: Any, **batch: Any) -> Any:
        noise = keras.random.normal((1,), seed=model.noise)
        return {"sum": model.inner(batch["ones"], training=self.is_training) + noise}


# ---- what refuses, or is refused -----------------------------------------------------------------


class WithoutStepOps(PyHookedModelIterator):
    pass


class WithoutStepOp(TemplateIterator):
    pass


class WithoutLosses(TFBaseTrainer):
    pass


class LossOfNobody(TFBaseTrainer):
    def make_loss_ops(self, model: Any, **batch: Any) -> Any:
        return {"nobody": two_losses(model, batch["ones"])["critic"]}


class LoopsItself(Counts):
    def iterate(self, batches: Any) -> None:
        for step in range(3):
            self.train_op(self.model, **batches.batch(0, step))


class RefusesModel:
    def __init__(self, config: Settings) -> None:
        raise ValueError("width must be even")


class RefusesIterator(Counts):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.width = self.config["width"]


class RefusesDataset(Numbers):
    def __init__(self, config: Settings) -> None:
        raise TypeError("width must be even")


# ---- how the tests train -------------------------------------------------------------------------


def path_of(thing: Any) -> str:
    """Return the import path of a class or function of this module."""
    return f"{__name__}:{thing.__name__}"


CONFIG: dict[str, Any] = {
    "iterator": path_of(Counts),
    "model": path_of(Counter),
    "datasets": {"train": path_of(Numbers)},
    "batch_size": 4,
    "num_steps": 4,
    "tensorboard": False,
}
BOTH_SPLITS = {"train": path_of(Numbers), "validation": path_of(FewNumbers)}
SGD: dict[str, Any] = {"model": path_of(KerasParts), "optimizer": "sgd", "lr": 1.0}

Full = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module", autouse=True)
def fast_collections() -> None:
    """Keep what is there out of the garbage collection that `build` begins with."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def full(tmp_path: Path) -> Full:
    """Make a full config of `CONFIG` and changes to it; a change to None takes the key out."""

    def make(**changes: Any) -> dict[str, Any]:
        given = {key: value for key, value in (CONFIG | changes).items() if value is not None}
        file = tmp_path / "config.json"
        file.write_text(json.dumps(given))
        return registry.resolve(str(file))

    return make


def train(
    config: dict[str, Any], folder: Path, *hooks: Hook, stop: int | None = None
) -> Experiment:
    """Train as `bin/train.py` does, until the end, or until a signal comes after a step."""
    folder.mkdir(exist_ok=True)
    experiment = build(config, str(folder))
    if stop is None:
        src.experiment.train(experiment, folder, hooks)
    else:
        with pytest.raises(SystemExit, match=f"^{INTERRUPTED}$"):
            src.experiment.train(experiment, folder, [*hooks, StopAt(stop)])
    return experiment


def first_batch(experiment: Experiment) -> dict[str, Any]:
    return experiment.dataset.train.batch(0, 0)


class StopAt(Hook):
    """Sends the process a signal, or fails, after a step."""

    def __init__(self, global_step: int, fails: bool = False) -> None:
        self.global_step = global_step
        self.fails = fails

    def after_step(self, global_step: int, last_results: Any) -> None:
        if global_step == self.global_step and self.fails:
            raise ValueError("no more ink")
        if global_step == self.global_step:
            os.kill(os.getpid(), signal.SIGTERM)


class Weights(Hook):
    """Writes down the weights of a model of two parts after each step."""

    def __init__(self) -> None:
        self.seen: list[tuple[float, float]] = []

    def after_step(self, global_step: int, last_results: Any) -> None:
        self.seen.append(weights_of(self.run.model))


def weights_of(model: Any) -> tuple[float, float]:
    variables = model.generator.variables, model.critic.variables
    first, second = (part[0].numpy() for part in variables)
    assert np.ptp(first) == np.ptp(second) == 0.0
    return float(first[0, 0]), float(second[0, 0])


def assert_same_run(folder: Path) -> None:
    for name in ("model.h5", "history.csv", "model_best.h5"):
        one, other = folder / "straight" / name, folder / "resumed" / name
        assert one.exists() == other.exists(), name
        if one.exists():
            assert one.read_bytes() == other.read_bytes(), name


# ---- what a step calls, and what hooks make of it ------------------------------------------------


def total(model: Any, number: Any, **_: Any) -> Any:
    return ops.sum(number)


def largest(model: Any, number: Any, **_: Any) -> Any:
    return ops.max(number)


@pytest.mark.parametrize("kind", [PyHookedModelIterator, TFHookedModelIterator])
@pytest.mark.parametrize(
    ("step_ops", "expected"),
    [
        (total, 6.0),
        ({"a": total, "deep": {"b": largest, "c": total}}, {"a": 6.0, "deep": {"b": 3.0, "c": 6}}),
        ([total, [largest]], [6.0, [3.0]]),
    ],
    ids=["function", "mapping", "list"],
)
def test_a_step_returns_results_in_the_shape_of_step_ops(
    kind: type[PyHookedModelIterator], step_ops: Any, expected: Any, tmp_path: Path
) -> None:
    iterator = kind({}, str(tmp_path), None, {})
    iterator.set_position(5, 0, 0)
    fetches = {"global_step": iterator.get_global_step, "step_ops": step_ops}
    results = iterator.run(fetches, {"number": np.array([1.0, 2.0, 3.0])})
    assert keras.tree.map_structure(float, results) == {"global_step": 5, "step_ops": expected}


@pytest.mark.parametrize(
    ("iterator", "model"), [(Counts, Counter), (CompiledCounts, VariableCounter)]
)
def test_what_a_hook_changes_in_place_reaches_the_step_and_not_the_data(
    iterator: type, model: type, full: Full
) -> None:
    class SameBatch:
        """Gives out its own array, as a dataset in memory may."""

        steps_per_epoch = 9

        def batch(self, epoch: int, step: int) -> dict[str, Any]:
            return {"number": numbers, "nested": {"number": numbers}}

    def before(fetches: Any, feeds: Any, batch: Any) -> None:
        np.testing.assert_array_equal(feeds["number"], batch["number"])
        assert batch["number"] is numbers
        feeds["number"] *= 10
        feeds["nested"]["number"] += 1

    def before_other(fetches: Any, feeds: Any, batch: Any) -> None:
        fetches["step_ops"]["train_op"] = total
        fetches["more"] = lambda model, nested, **_: nested["number"].tolist()

    numbers = np.array([1.0, 2.0], np.float32)
    experiment = build(full(iterator=path_of(iterator), model=path_of(model)))
    steps = IteratorSteps(experiment.iterator, SameBatch(), seed=0)
    first = steps.run(0, 0, 1, 1, before).last_results
    assert first["step_ops"]["train_op"] == 30.0
    second = steps.run(0, 1, 2, 2, before_other).last_results
    assert second["step_ops"]["train_op"] == 3.0
    assert second["more"] == [1.0, 2.0]
    assert steps.run(0, 2, 3, 3).last_results["step_ops"]["train_op"] == 18.0
    assert numbers.tolist() == [1.0, 2.0]
    assert int(experiment.model.updates) == 2


def test_iterator_and_hooks_know_the_run_folder(full: Full, tmp_path: Path) -> None:
    hook = Hook()
    iterator = train(full(num_steps=1), tmp_path / "run", hook).iterator
    assert len(iterator.hooks) == 1
    for name in ("checkpoints", "train", "eval"):
        assert (tmp_path / "run" / name).is_dir(), "a step may write there"
    for each in (iterator, hook, *iterator.hooks):
        assert each.root == str(tmp_path / "run")
        for name in ("code", "checkpoints", "train", "eval"):
            assert getattr(each, name) == str(tmp_path / "run" / name)


# ---- where the run stands ------------------------------------------------------------------------


def test_an_iterator_knows_where_it_stands_also_after_a_resume(full: Full, tmp_path: Path) -> None:
    def positions(experiment: Experiment) -> list[Position | str]:
        first, *others = experiment.iterator.positions
        assert first == "initialize"
        return others

    config = full(datasets=BOTH_SPLITS, num_steps=5)
    straight = train(config, tmp_path / "straight")
    expected: list[Position | str] = [
        (0, 0, 0, "train"),
        (1, 0, 1, "train"),
        (2, 0, 2, "train"),
        (3, 0, 0, "validation"),
        (3, 0, 1, "validation"),
        (3, 1, 0, "train"),
        (4, 1, 1, "train"),
        (5, 1, 0, "validation"),
        (5, 1, 1, "validation"),
    ]
    assert positions(straight) == expected
    stopped = train(config, tmp_path / "resumed", stop=4)
    resumed = train(config, tmp_path / "resumed")
    assert positions(stopped) == expected[:6]
    assert positions(resumed) == expected[6:]
    assert resumed.iterator.get_global_step() == 5
    history = read_state(tmp_path / "resumed" / "model.h5")["history"]
    assert [row["val_mean"] for row in history] == [2.0, 2.0]


def test_what_wraps_the_loop_is_called_around_it(full: Full, tmp_path: Path) -> None:
    iterator = train(full(iterator=path_of(Wraps), num_steps=1), tmp_path / "run").iterator
    assert iterator.positions == ["before 3", "initialize", (0, 0, 0, "train"), "after"]
    assert iterator.dataset is iterator.datasets["train"]


def test_fixed_examples_are_those_of_the_config(full: Full) -> None:
    config = full(datasets=BOTH_SPLITS, fixed_example_indices={"train": [11, 2, 2]})
    iterator = build(config).iterator
    examples = iterator.get_fixed_examples("train")
    assert examples["number"].tolist() == examples["index_"].tolist() == [11, 2, 2]
    assert examples["ones"].shape == (3, 8)
    assert iterator.get_fixed_examples() is examples


def test_fixed_examples_of_a_split_that_is_not_there_are_a_note(
    full: Full, caplog: pytest.LogCaptureFixture
) -> None:
    config = full(fixed_example_indices={"train": [1], "validation": [0]})
    assert build(config).iterator.get_fixed_examples()["index_"].tolist() == [1]
    assert "fixed_example_indices has validation, which is not a split" in caplog.text


def test_fixed_examples_are_drawn_from_each_split_by_the_seed(full: Full, tmp_path: Path) -> None:
    def drawn(split: str, **changes: Any) -> list[int]:
        config = full(datasets=BOTH_SPLITS, **changes)
        examples = build(config, str(tmp_path)).iterator.get_fixed_examples(split)
        return examples["index_"].tolist()

    config = full(datasets=BOTH_SPLITS)
    train(config, tmp_path)
    indices = drawn("train")  # in an iterator as a resume makes it
    assert len(set(indices)) == 4
    assert max(indices) >= 5
    assert set(indices) <= set(range(12))
    assert build(config).iterator.get_fixed_examples("train")["index_"].tolist() == indices
    assert len(set(drawn("validation"))) == 4
    assert set(drawn("validation")) <= set(range(5))
    for seed in (1, 2):
        other = build(config | {"seed": seed}).iterator
        assert other.fixed_example_indices("train") != indices
    whole = build(config | {"batch_size": 8}).iterator
    assert sorted(whole.get_fixed_examples("validation")["index_"]) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("test_mode", [False, True])
def test_test_mode_reaches_model_and_iterator(test_mode: bool, full: Full) -> None:
    experiment = build(full(test_mode=test_mode))
    assert experiment.model.config["test_mode"] is test_mode
    assert experiment.iterator.test_mode is test_mode


# ---- how many steps there are --------------------------------------------------------------------


KINDS = [(Counts, Counter), (CompiledCounts, NoisyCounter), (SavesFiles, FileCounter)]


@pytest.mark.parametrize("fails", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize(("iterator", "model"), KINDS)
def test_num_steps_is_the_number_of_updates_whatever_interrupts_them(
    iterator: type, model: type, fails: bool, full: Full, tmp_path: Path
) -> None:
    kinds = {"iterator": path_of(iterator), "model": path_of(model)}
    config = full(**kinds, num_epochs=99, datasets=BOTH_SPLITS)
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    assert int(train(config, straight).model.updates) == 4
    for stop in (1, 2, 3, 4):
        if fails:
            with pytest.raises(RuntimeError, match="StopAt failed in after_step"):
                train(config, resumed, StopAt(stop, fails))
        else:
            train(config, resumed, stop=stop)
    assert int(train(config, resumed).model.updates) == 4
    assert_same_run(tmp_path)
    history = read_state(resumed / "model.h5")["history"]
    assert [row["step"] for row in history] == [3, 4]

    before = (resumed / "model.h5").read_bytes()
    assert int(train(config, resumed).model.updates) == 0  # nor is anything restored
    assert (resumed / "model.h5").read_bytes() == before


def test_a_signal_after_the_last_step_of_all_leaves_its_epoch_to_the_resume(
    full: Full, tmp_path: Path
) -> None:
    config = full(num_steps=3, datasets=BOTH_SPLITS)  # the last of an epoch, too
    train(config, tmp_path / "straight")
    train(config, tmp_path / "resumed", stop=3)
    resumed = train(config, tmp_path / "resumed")
    assert resumed.model.updates == 3
    assert_same_run(tmp_path)


def test_num_epochs_counts_where_there_is_no_num_steps(full: Full, tmp_path: Path) -> None:
    assert train(full(num_steps=None, num_epochs=2), tmp_path / "run").model.updates == 6


def test_more_steps_continue_a_finished_run(full: Full, tmp_path: Path) -> None:
    config = full(datasets=BOTH_SPLITS)
    train(config | {"num_steps": 8}, tmp_path / "straight")
    train(config, tmp_path / "resumed")
    assert train(config | {"num_steps": 8}, tmp_path / "resumed").model.updates == 8
    assert_same_run(tmp_path)


# ---- TemplateIterator ----------------------------------------------------------------------------


class Reads(Hook):
    """Reads an operation after some steps."""

    def __init__(self, name: str, steps: set[int]) -> None:
        self.name = name
        self.steps = steps
        self.read: list[Any] = []

    def after_step(self, global_step: int, last_results: Any) -> None:
        if global_step in self.steps:
            self.read.append(last_results["step_ops"][self.name])


@pytest.mark.parametrize(
    "train_ops", [None, ["train/train_op", "more_op"], ["step_ops/train_op", "step_ops/more_op"]]
)
def test_an_operation_is_computed_once_if_somebody_reads_it(
    train_ops: list[str] | None, full: Full, tmp_path: Path
) -> None:
    config = full(iterator=path_of(Template), train_ops=train_ops)
    one, two = Reads("log_op", {1, 3}), Reads("log_op", {3})
    experiment = train(config, tmp_path / "run", one, two)
    more = {"more_op": 4} if train_ops else {}
    assert experiment.iterator.computed == {"train_op": 4, "log_op": 2} | more
    assert [result["scalars"]["updates"] for result in one.read] == [1, 3]  # after training
    assert two.read == one.read[1:]
    (row, _) = read_state(tmp_path / "run" / "model.h5")["history"]
    assert ("more_op" in row) == bool(train_ops)


def test_an_operation_that_a_step_does_not_have_is_named(full: Full, tmp_path: Path) -> None:
    of_template: dict[str, Any] = {"iterator": path_of(Template), "num_steps": 1}
    with pytest.raises(ValueError, match="train_ops names other_op; step_op returns train_op, log"):
        train(full(**of_template, train_ops=["train/other_op"]), tmp_path / "refused")
    for op in ("train/other_op", "validation/other_op"):
        wrong = build(full(**of_template, log_ops=[op])).own_hooks[0]
        with pytest.raises(RuntimeError, match="log_ops names other_op; a step has train_op, log_"):
            train(full(**of_template), tmp_path / op[:5], wrong)
    config = full(**of_template, train_ops=[], log_ops=["step_ops/log_op"])
    experiment = train(config, tmp_path / "none", build(config).own_hooks[0])
    assert experiment.iterator.computed == {"log_op": 1}, "and nothing trains"


# ---- TFHookedModelIterator -----------------------------------------------------------------------


@pytest.mark.parametrize("iterator", [DrawsInEvaluation, DrawsAndStoresNothing])
def test_evaluation_after_an_epoch_leaves_the_training_as_it_was(
    iterator: type, full: Full, tmp_path: Path
) -> None:
    def trained(evaluates: bool) -> list[Any]:
        model, splits = path_of(EagerlyNoisyCounter), BOTH_SPLITS
        config = full(iterator=path_of(iterator), model=model, datasets=splits, num_steps=7)
        folder = tmp_path / str(evaluates)
        folder.mkdir()
        experiment = build(config, str(folder))
        src.experiment.train(experiment, folder, experiment.hooks(None) if evaluates else [])
        model = experiment.model
        return [v.numpy() for v in (model.updates, model.total, *model.noise)]

    assert trained(True) == trained(False)
    stored = [StoredOutputs(folder) for folder in tmp_path.glob("True/eval/*")]
    if iterator is DrawsAndStoresNothing:
        assert not stored
    else:
        assert [[each.labels["at"].tolist(), len(each)] for each in stored] == [[[7.0] * 5, 5]]


def test_a_step_is_traced_once_and_not_at_each_step(
    full: Full, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    changes = {"iterator": path_of(CompiledCounts), "model": path_of(VariableCounter)}
    experiment = train(full(**changes, num_steps=9), tmp_path / "run")
    assert int(experiment.model.updates) == 9
    assert experiment.iterator.num_traces == 1
    assert "step_ops has returned" not in caplog.text


def test_functions_that_are_new_at_every_step_are_warned_of_once(
    full: Full, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(NewFunctions, "MOST_COMPILED", 3)
    config = full(iterator=path_of(NewFunctions), model=path_of(VariableCounter), num_steps=7)
    with caplog.at_level(logging.WARNING):
        train(config, tmp_path / "run")
    assert caplog.text.count("step_ops has returned 3 sets of functions") == 1


@pytest.mark.parametrize(
    ("kind", "split", "test_mode", "drops"),
    [
        (TFHookedModelIterator, "train", False, True),
        (TFHookedModelIterator, "train", True, False),
        (TFHookedModelIterator, "validation", False, False),
        (TFHookedModelIterator, "validation", True, False),
        (TFBaseEvaluator, "train", False, False),
    ],
)
def test_there_is_dropout_in_training_alone(
    kind: type, split: str, test_mode: bool, drops: bool, full: Full
) -> None:
    config = full(model=path_of(dropout_model), test_mode=test_mode)
    config["iterator"] = f"engine.iterators.{kind.__name__}"
    experiment = build(config)
    iterator, batch = experiment.iterator, first_batch(experiment)
    for place in ("train", split):  # what was compiled for another place is not for this one
        iterator.set_position(0, 0, 0, place)
        outputs = iterator.evaluate(batch)["outputs"]
    assert iterator.is_training is drops
    assert outputs.shape == (4, 1)
    assert (outputs == 4.0).all() == (not drops)


def test_there_is_no_dropout_in_the_validation_of_a_run(full: Full, tmp_path: Path) -> None:
    changes = {"iterator": path_of(DropoutTrainer), "model": path_of(dropout_model)}
    train(full(**changes, datasets=BOTH_SPLITS, optimizer="sgd", lr=0.0), tmp_path / "run")
    for row in read_state(tmp_path / "run" / "model.h5")["history"]:
        assert row["loss"] > 0.0
        assert row["val_loss"] == 0.0
        assert row["learning_rate"] == 0.0


# ---- trainers of parts ---------------------------------------------------------------------------


@pytest.mark.parametrize("model", [functional_parts, PlainParts, KerasParts])
def test_each_part_is_trained_by_its_own_loss(model: Any, full: Full, tmp_path: Path) -> None:
    config = full(**SGD | {"model": path_of(model)}, iterator=path_of(Trainer), num_steps=3)
    experiment = train(config, tmp_path / "run")
    iterator = experiment.iterator
    for part, value in (("generator", -2.0), ("critic", -23.0)):
        assert iterator.part_variables(part)[0].numpy().ravel().tolist() == [value] * 8
    optimizers = iterator.optimizers
    assert list(optimizers) == ["generator", "critic"]
    assert [int(optimizer.iterations) for optimizer in optimizers.values()] == [3, 3]
    (row,) = read_state(tmp_path / "run" / "model.h5")["history"]
    assert {"loss_generator", "loss_critic"} <= set(row)
    # The parts are 8 weights of 1, 0 and -1, then of 1, -7 and -15, before each of three steps.
    assert row["loss_generator"] == 2 * 8 * -7.0


def test_the_optimizer_is_that_of_the_config(full: Full) -> None:
    config = full(model=path_of(KerasParts), iterator=path_of(Trainer), lr=0.5, beta1=0.25)
    adam = build(config).iterator.optimizers["critic"]
    assert isinstance(adam, keras.optimizers.Adam)
    assert (float(adam.learning_rate), adam.beta_1, adam.beta_2) == (0.5, 0.25, 0.9)
    config = full(model=path_of(KerasParts), iterator=path_of(Trainer), optimizer="rmsprop")
    optimizers = build(config).iterator.optimizers
    assert {type(one) for one in optimizers.values()} == {keras.optimizers.RMSprop}
    assert len({id(one) for one in optimizers.values()}) == 2


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {0: 0.5, 99: 0.5}),
        (
            {"lr_end": 0.25, "lr_decay_begin": 10, "lr_decay_end": 20},
            {0: 0.5, 10: 0.5, 12: 0.45, 15: 0.375, 20: 0.25, 21: 0.25, 99: 0.25},
        ),
        ({"lr_end": 0.0}, {0: 0.5, 4: 0.25, 8: 0.0, 9: 0.0}),  # over all steps
        ({"lr_end": 1.0, "lr_decay_begin": 4}, {4: 0.5, 6: 0.75, 8: 1.0}),
        ({"lr": 0.0}, {0: 0.0}),
        ({"lr_decay_begin": 1, "lr_decay_end": 3}, {0: 0.5, 3: 0.5}),
    ],
)
def test_the_rate_goes_in_a_straight_line(
    changes: dict[str, Any],
    expected: dict[int, float],
    full: Full,
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = full(**SGD | {"lr": 0.5, "num_steps": 8} | changes, iterator=path_of(Trainer))
    iterator = build(config).iterator
    rates = {}
    for step in expected:
        iterator.set_position(step, 0, 0)
        rates[step] = iterator.learning_rate
    assert rates == pytest.approx(expected, abs=1e-7)
    is_without_end = "lr_decay_end" in changes and "lr_end" not in changes
    assert ("the rate stays at lr, because there is no lr_end" in caplog.text) == is_without_end


def test_steps_are_made_at_the_rate_that_the_history_tells(full: Full, tmp_path: Path) -> None:
    decay = {"lr_end": 0.5, "lr_decay_begin": 1, "lr_decay_end": 3}
    config = full(**SGD, **decay, iterator=path_of(Trainer), num_steps=5)
    straight, first, second = Weights(), Weights(), Weights()
    train(config, tmp_path / "straight", straight)
    generator = [weights[0] for weights in straight.seen]
    assert generator == [0.0, -1.0, -1.75, -2.25, -2.75]
    train(config, tmp_path / "resumed", first, stop=2)
    train(config, tmp_path / "resumed", second)
    assert first.seen + second.seen == straight.seen
    history = read_state(tmp_path / "resumed" / "model.h5")["history"]
    assert [row["learning_rate"] for row in history] == [1.0, 0.5]
    assert_same_run(tmp_path)


@pytest.mark.parametrize(
    ("iterator", "opt_frequency", "expected", "num_turns"),
    [
        # What is taken off generator and critic at each step.
        (FrequencyTrainer, None, [(1, 0), (1, 0), (0, 8), (1, 0), (1, 0), (0, 8)], 2),
        (FrequencyTrainer, {"critic": 1, "generator": 1}, [(0, 8), (1, 0)] * 3, 2),
        (
            FrequencyTrainer,
            ["generator", ["critic", "generator"], "generator", "critic"],
            [(1, 0), (1, 8), (1, 0), (0, 8), (1, 0), (1, 8)],
            3,
        ),
        (ListTrainer, None, [(1, 8), (0, 4), (0.25, 0)] * 2, 3),
    ],
    ids=["class", "mapping", "list", "TFListTrainer"],
)
def test_parts_take_turns_by_global_step_also_after_a_resume(
    iterator: type,
    opt_frequency: Any,
    expected: list[tuple[float, float]],
    num_turns: int,
    full: Full,
    tmp_path: Path,
) -> None:
    def train_all(folder: Path, *stops: int) -> list[Weights]:
        hooks = [Weights() for _ in range(len(stops) + 1)]
        for stop, hook in zip(stops, hooks, strict=False):
            train(config, folder, hook, stop=stop)
        experiment = train(config, folder, hooks[-1])
        if not stops:  # the losses are traced before, too, by `build` and by the loop
            assert experiment.iterator.num_traces <= num_turns + 2
        return hooks

    kinds = {"iterator": path_of(iterator), "opt_frequency": opt_frequency}
    config = full(**SGD, **kinds, num_steps=6, batch_size=6)
    (straight,) = train_all(tmp_path / "straight")
    steps = np.diff([(1.0, 1.0), *straight.seen], axis=0)
    np.testing.assert_array_equal(-steps, expected)
    several = train_all(tmp_path / "resumed", 1, 5)
    assert [weights for hook in several for weights in hook.seen] == straight.seen
    assert_same_run(tmp_path)


# ---- what is refused -----------------------------------------------------------------------------


def refused(words: str, **changes: Any) -> Any:
    """Return changes to a config, and what its refusal says, parted by " … "."""
    return pytest.param(changes, words.split(" … "), id=words)


KERAS_PARTS = path_of(KerasParts)
NO_VALIDATION = BOTH_SPLITS | {"validation": path_of(NoNumbers)}
NOWHERE = BOTH_SPLITS | {"validation": "nowhere:Data"}
AT_LEAST_1 = (
    *("batch_size", "num_steps", "num_epochs", "hook_freq", "test_batch_size"),
    *("max_batches_per_epoch", "ckpt_freq", "ckpt_keep", "log_freq"),
)
NO_FREQUENCIES: tuple[Any, ...] = (
    {"generator": 1, "nobody": 1},
    {"nobody": 1},
    ["spare", "critic"],
)
REFUSALS = [
    refused("iterator … nowhere.Iterator … no module nowhere", iterator="nowhere.Iterator"),
    refused("iterator … :Countss … has no 'Countss'", iterator=path_of(Counts) + "s"),
    refused("model … nowhere:Model … no module src.nowhere or ", model="nowhere:Model"),
    refused("model … :Counters … has no 'Counters'", model=path_of(Counter) + "s"),
    refused(
        "datasets.train … src.nowhere.Data … src has no 'nowhere'",
        datasets={"train": "src.nowhere.Data"},
    ),
    refused("datasets.validation … nowhere:Data … no module src.nowhere or ", datasets=NOWHERE),
    refused(
        "dataset … nowhere:Data … no module src.nowhere or ", datasets=None, dataset="nowhere:Data"
    ),
    refused("model … :RefusesModel … width must be even", model=path_of(RefusesModel)),
    refused("iterator … :RefusesIterator … KeyError: 'width'", iterator=path_of(RefusesIterator)),
    refused(
        "datasets.train … :RefusesDataset … width must be even",
        datasets={"train": path_of(RefusesDataset)},
    ),
    refused(
        "dataset … :RefusesDataset … width must be even",
        datasets=None,
        dataset=path_of(RefusesDataset),
    ),
    refused(
        "datasets.train … :WithoutLength … without __len__",
        datasets={"train": path_of(WithoutLength)},
    ),
    refused("datasets.train … :NoNumbers … is empty", datasets={"train": path_of(NoNumbers)}),
    refused("datasets.validation … :NoNumbers … is empty", datasets=NO_VALIDATION),
    refused("datasets … validation … train", datasets={"validation": path_of(Numbers)}),
    refused("iterator … :WithoutStepOps … no step_ops", iterator=path_of(WithoutStepOps)),
    refused("iterator … :WithoutStepOp … no step_op;", iterator=path_of(WithoutStepOp)),
    refused("iterator … :WithoutLosses … no make_loss_ops", iterator=path_of(WithoutLosses)),
    refused("iterator … :Counter … is not an iterator", iterator=path_of(Counter)),
    refused("iterator … :total … is not an iterator", iterator=path_of(total)),
    refused(
        "iterator … :LossOfNobody … a loss for 'nobody'",
        iterator=path_of(LossOfNobody),
        model=KERAS_PARTS,
    ),
    refused(
        "iterator … :NoFrequencyTrainer … has no opt_frequency",
        iterator=path_of(NoFrequencyTrainer),
        model=KERAS_PARTS,
    ),
    *(
        refused(
            "opt_frequency names … iterator … :FrequencyTrainer … generator, critic",
            iterator=path_of(FrequencyTrainer),
            model=KERAS_PARTS,
            opt_frequency=turns,
        )
        for turns in NO_FREQUENCIES
    ),
    refused(
        "fixed_example_indices … has 12 … from 0 to 11",
        fixed_example_indices={"train": [0, 12]},
    ),
    refused("fixed_example_indices … -1", fixed_example_indices={"train": [-1]}),
    refused("iterator … :LoopsItself … call super().iterate", iterator=path_of(LoopsItself)),
    *(refused(f"{key} is 0 … must be at least 1", **{key: 0}) for key in AT_LEAST_1),
    refused("batch_size … 4", batch_size="4"),
    refused("n_data_processes is -1 … at least 0", n_data_processes=-1),
]


@pytest.mark.parametrize(("changes", "words"), REFUSALS)
def test_a_bad_input_is_refused_in_one_sentence(
    changes: dict[str, Any], words: list[str], full: Full
) -> None:
    with pytest.raises(UsageError) as refused:
        build(full(**changes))
    message = str(refused.value)
    for word in words:
        assert word in message
    assert "\n" not in message
    assert len(message) < 500


@pytest.mark.parametrize("key", ["iterator", "datasets", "batch_size", "num_steps"])
def test_a_key_that_has_to_be_there_is_named(key: str, full: Full) -> None:
    with pytest.raises(UsageError, match=f"'{key}'.* is missing"):
        full(**{key: None})


def test_the_model_alone_may_be_absent(full: Full, tmp_path: Path) -> None:
    experiment = train(full(model=None, iterator=path_of(WithoutModel)), tmp_path / "run")
    assert isinstance(experiment.model, NoModel)
    assert read_state(tmp_path / "run" / "model.h5")["global_step"] == 4


def test_an_iterator_that_reads_the_checkpoint_itself_is_told_not_to(
    full: Full, tmp_path: Path
) -> None:
    config = full(iterator=path_of(ReadsItsCheckpoint), model=path_of(LateModel))
    train(config | {"num_steps": 2}, tmp_path / "half")
    half = tmp_path / "half" / "model.h5"
    said = r"initialize\(\S+\): UnicodeDecodeError: .*; it need not read what is restored"
    with pytest.raises(UsageError, match=said):
        begun(config, tmp_path / "resumed", half)
    with pytest.raises(OtherModelError, match=said):
        evaluate_split(build(config, trains=False), half, tmp_path / "outputs", "train")


def test_of_two_networks_of_one_name_each_has_its_own_weights(
    full: Full, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = full(iterator=path_of(HasAnother), model=path_of(Frozen), num_steps=2)
    train(config, tmp_path / "run")
    latest = tmp_path / "run" / "model.h5"
    evaluate_split(build(config, trains=False), latest, tmp_path / "outputs", "train")
    labels = StoredOutputs(tmp_path / "outputs").labels
    assert (labels["own"][0], labels["frozen"][0]) == (8 - 8 * 2.5, 8)
    assert "are taken in their order" not in caplog.text
    retrained = begun(config, tmp_path / "retrained", latest, retrain=True)
    both = retrained.iterator, retrained.model
    own, frozen = (it.parts["inner"][0].kernel[0, 0] for it in both)
    assert (float(own), float(frozen)) == (1 - 2.5 - 2.5, 1)
    other = build(config | {"only_evaluates": True}, trains=False)
    evaluate_split(other, latest, tmp_path / "others", "train")
    assert "model.h5: variables of the same name are taken in their order" in caplog.text


def test_a_run_whose_random_draws_are_deep_in_the_model_is_evaluated(
    full: Full, tmp_path: Path
) -> None:
    config = full(iterator=path_of(InnerDropoutTrainer), model=path_of(InnerDropout), num_steps=2)
    train(config | {"optimizer": "sgd"}, tmp_path / "run")
    prepared = build(config | {"optimizer": "sgd"}, trains=False)
    evaluate_split(prepared, tmp_path / "run" / "model.h5", tmp_path / "outputs", "train")
    assert StoredOutputs(tmp_path / "outputs").meta["num_examples"] > 0


def begun(config: dict[str, Any], folder: Path, start: Path, retrain: bool = False) -> Experiment:
    """Train with another run's checkpoint as `bin/train.py -c` does."""
    folder.mkdir()
    experiment = build(config, str(folder), start=None if retrain else start).with_work()
    experiment.check_start(start, retrain)
    src.experiment.train(experiment, folder, [], start_from=start, retrain=retrain)
    return experiment


@pytest.mark.parametrize("iterator", [LateIterator, LateCompiledIterator])
def test_a_model_that_is_made_by_its_first_step_begins_with_a_checkpoint(
    iterator: type, full: Full, tmp_path: Path
) -> None:
    config = full(iterator=path_of(iterator), model=path_of(LateModel))
    assert train(config, tmp_path / "straight").iterator.begun_with == [None]
    train(config | {"num_steps": 2}, tmp_path / "half")
    half = tmp_path / "half" / "model.h5"
    gone_on = begun(config, tmp_path / "resumed", half)
    assert gone_on.iterator.begun_with == [str(half)]
    assert_same_run(tmp_path)

    evaluated = build(config, trains=False)
    evaluate_split(evaluated, half, tmp_path / "outputs", "train")
    assert evaluated.iterator.begun_with == [str(half)]

    # Retrained, it begins with the weights only: as a warm start, with an optimizer that is new.
    retrained = begun(config, tmp_path / "retrained", half, retrain=True)
    assert retrained.iterator.begun_with == [str(half)]
    assert int(retrained.iterator.optimizer.iterations) == 4
    (tmp_path / "warm").mkdir()
    warm = build(config, str(tmp_path / "warm")).with_work()
    warm.warm_start(tmp_path / "half", ".*")
    src.experiment.train(warm, tmp_path / "warm", [])
    files = [(tmp_path / name / "history.csv").read_text() for name in ("retrained", "warm")]
    assert files[0] == files[1] != (tmp_path / "straight" / "history.csv").read_text()
    weights = [[w.numpy().tolist() for w in each.model.weights] for each in (retrained, warm)]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("retrain", [False, True])
def test_a_checkpoint_of_another_model_is_refused_by_its_variables(
    retrain: bool, full: Full, tmp_path: Path
) -> None:
    config = full(**SGD | {"model": path_of(functional_parts)}, iterator=path_of(Trainer))
    train(config, tmp_path / "run")
    path = tmp_path / "run" / "model.h5"
    build(config).check_start(path, retrain)
    config |= {"second": "critical"}
    with pytest.raises(UsageError) as refused:
        build(config).check_start(path, retrain)
    message = str(refused.value)
    assert message.startswith("--checkpoint: ")
    for word in (str(path), "critic/kernel (8, 1)", "critical/kernel (8, 1)"):
        assert word in message
    assert "generator/kernel" not in message
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UsageError, match="--checkpoint: "):
        build(config).check_start(path, retrain)


# ---- what EDflow knew, and nothing acts on here --------------------------------------------------

KINDS_OF_NAMES = edflow.TABLE.keys() - {"as_written"}
TABLE = [(kind, name) for kind in sorted(KINDS_OF_NAMES) for name in edflow.TABLE[kind]]


@pytest.mark.parametrize(("kind", "name"), TABLE)
def test_what_edflow_knew_is_named_with_what_to_do_instead(
    kind: str,
    name: str,
    full: Full,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Uses(Trainer if kind == "of_trainers" else Counts):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs, **({name: 1} if kind == "arguments" else {}))
            if kind == "attributes":
                assert not hasattr(self, name)
                getattr(self, name)

    if kind in ("definitions", "of_trainers"):
        setattr(Uses, name, lambda self: None)
    changes: dict[str, Any] = {"iterator": path_of(Uses)}
    if kind == "of_trainers":
        changes["model"] = path_of(KerasParts)
    if kind == "imports":
        changes["datasets"] = {"train": f"edflow.some.where.{name}"}
    if kind in ("keys", "noted_keys"):
        key, *inner = name.split(".")
        changes[key] = functools.reduce(lambda value, part: {part: value}, inner[::-1], "asked")  # type: ignore[arg-type,return-value]
    monkeypatch.setitem(globals(), "Uses", Uses)
    instead = edflow.TABLE[kind][name]
    if kind in ("noted_keys", "arguments"):
        build(full(**changes))
        assert f"{name}, a" in caplog.text
        assert f" of EDflow, has no effect here: {instead}" in caplog.text
    else:
        with pytest.raises(UsageError) as refused:
            build(full(**changes))
        assert name in str(refused.value)
        assert instead in str(refused.value)
        assert "\n" not in str(refused.value)


def test_what_edflow_itself_writes_into_a_config_is_no_news(
    full: Full, caplog: pytest.LogCaptureFixture
) -> None:
    quiet = {"wandb": {"active": False, "project": None}, "git": False}
    quiet["minimal_logging"] = {"image_format": "png"}
    written = {"integrations": quiet, "eval_hook": {"eval_op": "validation/eval_op"}}
    build(full(**written, ckpt_zero=False, fcond="lambda c: True"))
    assert "EDflow" not in caplog.text


def test_a_word_that_was_true_or_false_in_edflow_s_files_is_noted(
    full: Full, caplog: pytest.LogCaptureFixture
) -> None:
    build(full(augment={"flip": "no", "crop": [True, "Yes"]}, note="none", monitor_mode="min"))
    said = "augment.flip is the text no; write false if it is what EDflow read it as"
    assert said in caplog.text
    assert "augment.crop.1 is the text Yes; write true if" in caplog.text
    assert caplog.text.count("is the text") == 2


def test_an_argument_that_nobody_knows_is_refused() -> None:
    with pytest.raises(TypeError, match="Counts has no argument 'transfrom'"):
        Counts({}, ".", None, {}, transfrom=False)


@pytest.mark.parametrize(
    ("arguments", "shape"), [({}, (2, 5, 3, 4)), ({"transform": False}, (2, 3, 4, 5))]
)
def test_the_order_of_dimensions_is_kept_where_an_argument_says_so(
    arguments: dict[str, bool], shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = types.ModuleType("torch")  # which a project need not have installed
    torch.from_numpy = lambda array: array  # type: ignore[attr-defined]
    module = "engine.iterators.torch_iterator"
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.delitem(sys.modules, module, raising=False)
    kind = importlib.import_module(module).TorchHookedModelIterator
    monkeypatch.delitem(sys.modules, module)
    results = kind({}, ".", None, {}, **arguments).run(
        {"shape": lambda model, image: image.shape}, {"image": np.ones((2, 3, 4, 5))}
    )
    assert results["shape"] == list(shape)


def test_the_operations_to_log_are_those_of_the_config(full: Full) -> None:
    logs = build(full(log_ops=["train/more_op"])).own_hooks[0]
    assert [hook.log_ops for hook in logs.hooks] == [["more_op"]]  # type: ignore[attr-defined]


# ---- the examples --------------------------------------------------------------------------------

# PyTorch is an extra, which a project need not have installed.
NEED_PYTORCH = {"iterator_torch"}
EXAMPLES = [
    name
    for name in registry.names()
    if (ROOT / "configs" / f"{name}.yaml").exists()
    and "iterator" in registry[name]
    and name not in NEED_PYTORCH
]


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_resumes_bit_for_bit(name: str, tmp_path: Path) -> None:
    # Two epochs, the first of which is interrupted.
    shorter = {"num_steps": 3, "max_batches_per_epoch": 2, "test_batch_size": 256}
    config = registry.resolve(name) | shorter | {"tensorboard": False}
    hooks = [Samples()] if name == "gan" else []
    train(config, tmp_path / "straight", *hooks)
    train(config, tmp_path / "resumed", *hooks, stop=1)
    train(config, tmp_path / "resumed", *hooks)
    assert read_state(tmp_path / "straight" / "model.h5")["global_step"] == 3
    assert_same_run(tmp_path)
    for run in ("straight", "resumed") if hooks else ():
        samples = sorted(path.name for path in (tmp_path / run / "train").iterdir())
        assert samples == ["samples.png", "samples_00000002.png", "samples_00000003.png"]


class HoldsANetwork:
    """A model that is no Keras model, and has one."""

    def __init__(self) -> None:
        self.network = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])


def test_weights_are_not_taken_for_those_of_the_optimizer_that_trains_them() -> None:
    owner = types.SimpleNamespace(model=HoldsANetwork(), optimizer=keras.optimizers.Adam())
    owner.optimizer.build(owner.model.network.trainable_variables)  # it is reached first
    groups = found_variables(owner)
    paths = {name: {variable.path for variable in found} for name, found in groups.items()}
    assert {v.path for v in owner.model.network.weights} <= paths["variables"]
    assert paths["optimizer"] == {v.path for v in owner.optimizer.variables}


def test_the_only_number_of_a_list_is_the_loss() -> None:
    assert figures_in([np.float32(2)]) == figures_in({"train_op": [None, 2.0]}) == {"loss": 2.0}
    assert figures_in([1, 2.0]) == {"0": 1.0, "1": 2.0}
