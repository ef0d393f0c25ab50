"""What a step touches is resumed wherever it hangs; what nobody can save is refused by name."""

import json
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from interruptions import StopAt
from keras import layers
from loops import loop
from machinery import Command
from tqdm import tqdm

from configs import registry
from engine.hooks import Run
from engine.training import objects
from src.examples.iterators import GANTrainer
from src.experiment import build, train
from vegab import UsageError

IN_MODULE = keras.Variable(0.0, trainable=False)
HERE = "test_guard"


class Raise(keras.callbacks.Callback):
    """Assigns a variable that the step only reads."""

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Raise it."""
        IN_MODULE.assign_add(0.1)


class Changed(layers.Layer):
    """Changes what goes through it by a function, in training only."""

    def __init__(self, change: Callable[[Any], Any], when: bool | None = True) -> None:
        super().__init__()
        self.change = change
        self.when = when

    def call(self, x: Any, training: bool | None = None) -> Any:
        """Return it changed."""
        return self.change(x) if bool(training) == self.when else x


def classifier(*between: layers.Layer) -> keras.Model:
    """A model of the digits with layers between input and output."""
    inputs = keras.Input((8, 8, 1))
    x = inputs
    for layer in between:
        x = layer(x)
    return keras.Model(inputs, layers.Dense(10, "softmax")(layers.Flatten()(x)))


class TwoParts(keras.Model):
    """Trains each of two parts by an optimizer of its own, kept where `keep` puts them."""

    def __init__(self, keep: Callable[..., Any]) -> None:
        super().__init__()
        self.body = keras.Sequential([keras.Input((8, 8, 1)), layers.Flatten(), layers.Dense(8)])
        self.head = keras.Sequential([keras.Input((8,)), layers.Dense(10, "softmax")])
        pair = keras.optimizers.Adam(1e-3), keras.optimizers.SGD(1e-2, momentum=0.9)
        for part, optimizer in zip((self.body, self.head), pair, strict=True):
            optimizer.build(part.trainable_variables)
        self.kept = keep(self, *pair)
        self.built = True

    def call(self, x: Any) -> Any:
        """Return probabilities."""
        return self.head(self.body(x))

    def train_step(self, data: Any) -> Any:
        """Make a step of both."""
        x, y = data
        with tf.GradientTape(persistent=True) as tape:
            loss = self.compute_loss(x, y, self(x, training=True))
        pair = self.kept() if callable(self.kept) else self.kept.values()
        for part, optimizer in zip((self.body, self.head), pair, strict=True):
            variables = part.trainable_variables
            optimizer.apply(tape.gradient(loss, variables), variables)
        return {"loss": loss}


class Counting(keras.Model):
    """Counts its steps in a variable of TensorFlow's."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.steps_done = tf.Variable(0.0, trainable=False)

    def train_step(self, data: Any) -> Any:
        """Make a step that depends on how many there were."""
        self.steps_done.assign_add(1.0)
        return super().train_step((data[0] + 0.01 * self.steps_done, data[1]))


def optimizers_in_dict(*_: Any, **__: Any) -> keras.Model:
    """Optimizers where Keras and the checkpoint do not look."""
    return compiled(TwoParts(lambda model, one, two: {"body": one, "head": two}))


def optimizers_as_attributes(*_: Any, **__: Any) -> keras.Model:
    """Optimizers where the checkpoint looks."""

    def keep(model: Any, one: Any, two: Any) -> Any:
        model.first, model.second = one, two
        return lambda: (model.first, model.second)

    return compiled(TwoParts(keep))


def compiled(model: keras.Model, loss: Any = "sparse_categorical_crossentropy") -> keras.Model:
    """Compile a model."""
    model.compile("adam", loss)
    return model


def tf_variable(*_: Any, **__: Any) -> keras.Model:
    """A variable of TensorFlow's on the model."""
    inputs = keras.Input((8, 8, 1))
    outputs = layers.Dense(10, "softmax")(layers.Flatten()(inputs))
    return compiled(Counting(inputs, outputs))


def weight_of_the_loss(*_: Any, **__: Any) -> keras.Model:
    """A variable in a module, which the loss reads."""
    IN_MODULE.assign(0.0)
    cross_entropy = keras.losses.sparse_categorical_crossentropy
    return compiled(classifier(), lambda y, p: cross_entropy(y, p) + IN_MODULE * keras.ops.mean(p))


def in_closure(*_: Any, **__: Any) -> keras.Model:
    """A variable in a closure, changed in a branch only."""
    count = tf.Variable(0.0)

    def change(x: Any) -> Any:
        return tf.cond(tf.reduce_sum(x) > 0, lambda: x + count.assign_add(1.0), lambda: x)

    return classifier(Changed(change))


def normal(*_: Any, **__: Any) -> keras.Model:
    """Noise of TensorFlow's."""
    return classifier(Changed(lambda x: x + tf.random.normal(tf.shape(x))))


def within_loop(*_: Any, **__: Any) -> keras.Model:
    """Noise within a loop within a function."""

    @tf.function
    def noisy(x: Any) -> Any:
        steps = (tf.constant(0), x)
        return tf.while_loop(
            lambda n, _: n < 2, lambda n, x: (n + 1, x + tf.random.uniform(tf.shape(x))), steps
        )[1]

    return classifier(Changed(noisy))


def dropout(*_: Any, **__: Any) -> keras.Model:
    """TensorFlow's dropout."""
    return classifier(Changed(lambda x: tf.nn.dropout(x, 0.5)))


def flipped(*_: Any, **__: Any) -> keras.Model:
    """TensorFlow's augmentation."""
    return classifier(Changed(tf.image.random_flip_left_right))


def shuffled(*_: Any, **__: Any) -> keras.Model:
    """Shuffled rows."""
    return classifier(Changed(tf.random.shuffle))


def raw(*_: Any, **__: Any) -> keras.Model:
    """An operation without a public function."""
    return classifier(
        Changed(lambda x: x + tf.raw_ops.RandomStandardNormal(shape=tf.shape(x), dtype=tf.float32))
    )


def python(*_: Any, **__: Any) -> keras.Model:
    """A Python function within the step."""

    def change(x: Any) -> Any:
        y = tf.py_function(lambda a: a * 2, [x], tf.float32)
        y.set_shape(x.shape)
        return y

    return classifier(Changed(change))


def in_validation(*_: Any, **__: Any) -> keras.Model:
    """Noise in validation only."""
    return classifier(Changed(lambda x: x + tf.random.normal(tf.shape(x)), when=False))


def table(*_: Any, **__: Any) -> keras.Model:
    """A table that the step writes into."""
    numbers = tf.lookup.experimental.MutableHashTable(tf.int64, tf.float32, 0.0)
    one = tf.constant([1], tf.int64)

    def change(x: Any) -> Any:
        count = tf.reshape(numbers.lookup(one), [])
        numbers.insert(one, tf.reshape(count + 1, [1]))
        return x + count

    return classifier(Changed(change))


def stateful(*_: Any, **__: Any) -> keras.Model:
    """A recurrent layer that goes on where the batch before ended."""
    inputs = keras.Input(batch_shape=(30, 8, 8, 1))
    x = layers.GRU(4, stateful=True)(layers.Reshape((8, 8))(inputs))
    return keras.Model(inputs, layers.Dense(10, "softmax")(x))


def queue(*_: Any, **__: Any) -> keras.Model:
    """A queue that the step goes round in."""
    numbers = tf.queue.FIFOQueue(9, [tf.float32], shapes=[()])
    numbers.enqueue(0.0)

    def change(x: Any) -> Any:
        number = numbers.dequeue()
        with tf.control_dependencies([numbers.enqueue(number + 1)]):
            return x + number

    return classifier(Changed(change))


def sampled(*_: Any, **__: Any) -> keras.Model:
    """Candidates that TensorFlow samples."""

    def change(x: Any) -> Any:
        true = tf.zeros([1, 1], tf.int64)
        candidates = tf.random.uniform_candidate_sampler(true, 1, 4, True, 100)[0]
        return x + tf.cast(tf.reduce_sum(candidates), x.dtype)

    return classifier(Changed(change))


def eager(*_: Any, **__: Any) -> keras.Model:
    """A variable in a closure, and TensorFlow's noise, in steps that are not compiled."""
    count = tf.Variable(0.0)

    def change(x: Any) -> Any:
        return x + 0.01 * count.assign_add(1.0) * tf.random.normal(tf.shape(x))

    model = classifier(Changed(change))
    model.compile("adam", "sparse_categorical_crossentropy", run_eagerly=True)
    return model


def optimizers_in_list(*_: Any, **__: Any) -> keras.Model:
    """Optimizers in a list of dictionaries."""
    model = TwoParts(lambda model, one, two: {})
    model.groups = [
        {"of": one} for one in (keras.optimizers.Adam(1e-3), keras.optimizers.Adam(1e-2))
    ]
    for part, group in zip((model.body, model.head), model.groups, strict=True):
        group["of"].build(part.trainable_variables)
    model.kept = lambda: [group["of"] for group in model.groups]
    return compiled(model)


def drawn(*_: Any, **__: Any) -> keras.Model:
    """Draws of further kinds, of a gamma distribution and of classes among them."""

    def change(x: Any) -> Any:
        noise = tf.random.gamma([], 0.5) + tf.random.poisson([], 1.5)
        noise += tf.random.truncated_normal([]) + tf.cast(
            tf.random.categorical(tf.zeros([1, 3]), 1)[0, 0], tf.float32
        )
        return x + 0.1 * noise * tf.cast(tf.random.uniform([], 0, 5, tf.int32), tf.float32)

    return classifier(Changed(change))


class CountsEpochs(keras.callbacks.Callback):
    """Keeps a variable, and generators, that no step knows of."""

    def __init__(self) -> None:
        super().__init__()
        self.number = tf.Variable(0.0)
        self.generator = np.random.default_rng(0)

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Set the rate by both."""
        self.number.assign_add(1.0)
        rate = 0.01 / float(self.number.numpy()) * self.generator.uniform()
        self.model.optimizer.learning_rate.assign(rate)


@pytest.fixture
def quick(config: dict[str, Any]) -> dict[str, Any]:
    """A config whose last batch is as large as the others: 1,260 examples in 42 batches."""
    return config | {"batch_size": 30, "learning_rate": None, "monitor": "loss"}


REFUSED = {
    "python": r"Python function of EagerPyFunc keeps, in test_guard\.py, line \d+",
    "queue": r"Queue\w+ changes, in test_guard\.py, line \d+",
    "sampled": r"UniformCandidateSampler, in test_guard\.py, line \d+",
}
KEPT = [
    "optimizers_in_dict",
    "optimizers_in_list",
    "tf_variable",
    "weight_of_the_loss",
    "in_closure",
    "normal",
    "within_loop",
    "dropout",
    "flipped",
    "shuffled",
    "raw",
    "drawn",
    "in_validation",
    "table",
    "stateful",
    "eager",
    "callback",
]


@pytest.mark.parametrize("kind", KEPT)
def test_what_a_step_touches_is_resumed_wherever_it_hangs(
    kind: str, quick: dict[str, Any], tmp_path: Path
) -> None:
    config = quick | {"model": f"{HERE}.{kind}", "num_epochs": 2}
    if kind == "stateful":  # of which validation would need batches of the same size
        config["dataset"] = f"{HERE}.without_validation"
    if kind == "weight_of_the_loss":
        config["callbacks"] = [{"class": f"{HERE}.Raise"}]
    if kind == "callback":
        config |= {"model": "simple_cnn", "callbacks": [{"class": f"{HERE}.CountsEpochs"}]}
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    for folder in (straight, resumed):
        folder.mkdir()
    train(build(config), straight, [])
    with pytest.raises(SystemExit):
        train(build(config), resumed, [StopAt(59)])
    train(build(config, str(resumed)), resumed, [])
    for name in ("model.h5", "history.csv"):
        assert (straight / name).read_bytes() == (resumed / name).read_bytes(), name


@pytest.mark.parametrize("kind", REFUSED)
def test_what_nobody_can_save_is_refused_by_name(kind: str, quick: dict[str, Any]) -> None:
    prepared = build(quick | {"model": f"{HERE}.{kind}"})
    with pytest.raises(UsageError, match=REFUSED[kind]) as refusal:
        prepared.with_work(allow_inexact=False)
    assert "--allow_inexact" in str(refusal.value)
    work = prepared.with_work(allow_inexact=True).work
    assert work is not None and len(work.guard.found) > 0


def without_validation(config: Mapping[str, Any]) -> Any:
    """The digits, for training only."""
    from dataclasses import replace

    from src.data import get_digits

    return replace(get_digits(config), valid=None)


def python_that_nobody_reads(*_: Any, **__: Any) -> keras.Model:
    """A Python function within the step that only prints, and noise that nothing depends on."""

    def change(x: Any) -> Any:
        tf.py_function(lambda a: None, [x], [])
        tf.random.normal([2])
        return x

    return classifier(Changed(change))


def keras_own(*_: Any, **__: Any) -> keras.Model:
    """Keras' own random layers, a table that only is read, averages, an averaged optimizer."""
    words = layers.IntegerLookup(vocabulary=list(range(5)))

    def look_up(x: Any) -> Any:
        return x + keras.ops.cast(words(keras.ops.cast(x, "int64")), x.dtype)

    model = classifier(
        layers.RandomTranslation(0.1, 0.1),
        layers.GaussianNoise(0.1),
        layers.BatchNormalization(),
        Changed(look_up),
        layers.Dropout(0.1),
    )
    model.compile(
        keras.optimizers.Adam(use_ema=True, gradient_accumulation_steps=2),
        "sparse_categorical_crossentropy",
        metrics=["accuracy"],
    )
    return model


@pytest.mark.parametrize(
    ("kind", "precision"),
    [
        ("python_that_nobody_reads", "float32"),
        ("optimizers_as_attributes", "float32"),
        ("keras_own", "float32"),
        ("keras_own", "mixed_float16"),
        ("keras_own", "float64"),
    ],
)
def test_what_checkpoints_hold_is_not_refused(
    kind: str, precision: str, quick: dict[str, Any]
) -> None:
    prepared = build(quick | {"model": f"{HERE}.{kind}", "precision": precision})
    work = prepared.with_work(allow_inexact=False).work
    assert work is not None and work.guard.found == []


class NoisyGAN(GANTrainer):
    """Calls Python when the critic is trained, which is not the first turn."""

    def make_loss_ops(self, model: Any, **batch: Any) -> Any:
        """Return both losses."""
        losses = super().make_loss_ops(model, **batch)
        factor = tf.py_function(lambda: 1.0, [], tf.float32)
        return losses | {"critic": losses["critic"] * tf.reshape(factor, [])}


def test_the_steps_of_an_iterator_are_looked_at_in_every_turn() -> None:
    config = registry["gan"] | {"iterator": f"{HERE}.NoisyGAN"}
    prepared = build(config)
    with pytest.raises(UsageError, match="EagerPyFunc keeps, in test_guard"):
        prepared.with_work(allow_inexact=False)


def test_the_loop_looks_by_itself(quick: dict[str, Any], tmp_path: Path) -> None:
    prepared = build(quick | {"model": f"{HERE}.python"})
    data = prepared.dataset
    with pytest.raises(UsageError, match="EagerPyFunc"):
        loop(prepared.model, data.train, data.valid, tmp_path, num_epochs=1)
    assert list(tmp_path.iterdir()) == []


class SetsRate(keras.callbacks.Callback):
    """Sets, before the first step, what the step is traced from."""

    def on_train_begin(self, logs: Any = None) -> None:
        """Set it."""
        self.model.factor = 0.0


class Scaled(keras.Model):
    """Multiplies its loss by an attribute."""

    factor = 1.0

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """Return the loss times the factor."""
        return super().compute_loss(*args, **kwargs) * self.factor


def scaled(*_: Any, **__: Any) -> keras.Model:
    """A model whose loss is scaled."""
    inputs = keras.Input((8, 8, 1))
    return compiled(Scaled(inputs, layers.Dense(10, "softmax")(layers.Flatten()(inputs))))


def test_what_callbacks_set_before_the_first_step_counts(
    quick: dict[str, Any], tmp_path: Path
) -> None:
    callbacks = [{"class": f"{HERE}.SetsRate"}]
    prepared = build(quick | {"model": f"{HERE}.scaled", "callbacks": callbacks})
    train(prepared.with_work(allow_inexact=False), tmp_path, [])
    rows = (tmp_path / "history.csv").read_text().splitlines()
    assert rows[0].split(",")[3] == "loss"
    assert float(rows[1].split(",")[3]) == 0.0


def test_a_refusal_leaves_no_folder_and_what_is_allowed_is_on_record(
    quick_command: Command, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    words = ["bin/train.py", "digits", run, f"--model={HERE}.python", "--lr_schedule=null"]
    words += ["--num_epochs=1", "--no_tensorboard"]
    refused = quick_command(*words)
    assert refused.returncode == 2
    sentence = refused.stderr.strip().splitlines()[-1]
    assert "Python function" in sentence
    assert not run.exists()
    allowed = quick_command(*words, "--allow_inexact")
    assert allowed.returncode == 0, allowed.stderr
    attempt = json.loads((run / "meta.json").read_text())["attempts"][-1]
    assert "Python function" in attempt["to"]["inexact"][0]["differs"][0]
    listed = quick_command("bin/runs.py", "list", run)
    assert "finished, inexact" in listed.stdout


@pytest.mark.slow
def test_a_sweep_may_allow_it_too(quick_command: Command, tmp_path: Path) -> None:
    words = ["bin/sweep.py", "digits", tmp_path / "sweep", f"--model={HERE}.python"]
    words += ["--lr_schedule=null", "--num_epochs=1", "--no_tensorboard", "--grid", "seed=1"]
    refused = quick_command(*words)
    assert refused.returncode == 2
    assert "Python function" in refused.stderr
    allowed = quick_command(*words, "--allow_inexact")
    assert allowed.returncode == 0, allowed.stderr
    assert "1 finished" in allowed.stdout


class Fresh(list[Any]):
    """A list that is made when it is asked for."""


class NetOfFresh(keras.Model):
    def __init__(self) -> None:
        super().__init__()
        self.made: list[weakref.ref[Fresh]] = []
        self.inner = layers.Dense(1)

    @property
    def layers(self) -> Fresh:
        fresh = Fresh([self.inner])
        self.made.append(weakref.ref(fresh))
        return fresh


def test_what_a_walk_has_seen_leaves_its_address_to_nothing_else() -> None:
    model = NetOfFresh()
    model.made.clear()
    alive = [[ref() is not None for ref in model.made] for _ in objects.walk({"model": model})]
    assert alive[-1] == [True]


def test_a_checkpoint_of_a_long_run_takes_as_long_as_one_of_a_short_run(tmp_path: Path) -> None:
    """What the loop itself keeps is not walked over, as it grows with each epoch."""
    hook, run = StopAt(1), Run(tmp_path, None, 1, 1, [], 999, None, None)
    run.history = [{"epoch": n} for n in range(999)]
    vars(run)["shared"] = layers.Dense(1)  # by one hook, for others
    hook.before_training(run)
    paths = [reached.path for reached in objects.walk({"hooks": [hook]})]
    assert "hooks[0].run.shared" in paths
    assert not any("history" in path for path in paths)


def test_what_a_progress_bar_goes_through_is_found() -> None:
    generator = np.random.default_rng(0)
    paths = {id(each.thing): each.path for each in objects.walk({"hook": tqdm([generator])})}
    assert id(generator) in paths
