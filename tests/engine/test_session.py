"""What a run ends with is what `fit` ends with, and what it keeps is what it needs to go on."""

import csv
import gc
import glob
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
import pytest
from keras import layers, ops
from machinery import Command

from engine.checkpoints import load_weights
from engine.hooks import Hook, LearningRates
from engine.training.appended import AppendedFiles
from src.data import get_digits
from src.experiment import build, train
from vegab import UsageError
from vegab.files import replacing

HERE = "test_session"
CALLBACKS = "keras.callbacks"
STOPPING = {"class": f"{CALLBACKS}.EarlyStopping", "patience": 9, "restore_best_weights": True}
EMA = {"optimizer_arguments": {"use_ema": True, "ema_momentum": 0.9}}
SWAP = {"class": f"{CALLBACKS}.SwapEMAWeights", "swap_on_epoch": True}


@pytest.fixture
def small(config: dict[str, Any]) -> dict[str, Any]:
    """A config whose epochs have 10 batches."""
    return config | {"batch_size": 126, "learning_rate": 0.01, "num_epochs": 2, "seed": 1}


def run(config: Mapping[str, Any], folder: Path, *hooks: Hook) -> keras.Model:
    """Train into a folder, or go on there; return the model as the process has it in the end."""
    folder.mkdir(exist_ok=True)
    prepared = build(config, str(folder))
    rates = [LearningRates(prepared.learning_rates)] if prepared.learning_rates else []
    train(prepared, folder, [*rates, *hooks])
    return prepared.model


def same(one: Path, other: Path, *names: str) -> None:
    """Compare files of two runs."""
    for name in ("model.h5", "history.csv", *names):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


class Fails(Hook):
    """Fails in the end of an epoch, before its checkpoint."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def after_epoch(self, epoch: int) -> None:
        """Fail."""
        if epoch == self.epoch:
            raise OSError("planned")


@pytest.mark.parametrize(
    "changes",
    [
        {"callbacks": [STOPPING], "lr_schedule": [[1, 0.01], [9, 50.0]], "learning_rate": None},
        EMA,
        pytest.param(EMA | {"callbacks": [SWAP]}, marks=pytest.mark.slow),
        pytest.param(
            EMA | {"callbacks": [SWAP | {"swap_on_epoch": False}]}, marks=pytest.mark.slow
        ),
    ],
    ids=["restored", "averaged", "swapped", "swapped_to_validate"],
)
def test_the_weights_at_the_end_are_those_of_fit_and_a_longer_run_goes_on_from_the_last_step(
    changes: dict[str, Any], small: dict[str, Any], tmp_path: Path
) -> None:
    config = small | changes
    model = run(config, tmp_path / "extended")
    with h5py.File(tmp_path / "extended" / "model.h5") as file:
        state = file["training_state"]
        # After an epoch for which they were swapped, the averages are in the model already.
        assert ("weights_at_end" in state) is (changes.get("callbacks") != [SWAP])
        if changes is EMA:
            averages = [d for d in state["optimizer"].values() if "average" in d.attrs["path"]]
            kernel = next(a for a in averages if a.shape == state["weights/00000"].shape)
            np.testing.assert_array_equal(kernel[()], state["weights_at_end/00000"][()])
    loaded = keras.models.load_model(tmp_path / "extended" / "model.h5")
    evaluated = build(config).model
    load_weights(tmp_path / "extended" / "model.h5", evaluated)
    for mine, theirs, third in zip(model.weights, loaded.weights, evaluated.weights, strict=True):
        np.testing.assert_array_equal(mine, theirs)
        np.testing.assert_array_equal(mine, third)
    run(config | {"num_epochs": 4}, tmp_path / "extended")
    run(config | {"num_epochs": 4}, tmp_path / "straight")
    same(tmp_path / "straight", tmp_path / "extended", "model_best.h5")


class StopsEarly(keras.callbacks.Callback):
    """Ends the training within the second epoch."""

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """End it."""
        if int(self.model.optimizer.iterations) == 14:
            self.model.stop_training = True


def test_a_callback_ends_the_epoch_at_the_batch_at_which_it_says_so(
    small: dict[str, Any], tmp_path: Path
) -> None:
    config = small | {"callbacks": [{"class": f"{HERE}.StopsEarly"}], "num_epochs": 5}
    for _ in range(2):  # the second time there is nothing to do
        run(config, tmp_path / "run")
        rows = list(csv.DictReader((tmp_path / "run" / "history.csv").open()))
        assert [row["step"] for row in rows] == ["10", "14"]
        assert rows[-1]["val_loss"] != ""


class Adds(keras.callbacks.Callback):
    """Adds to the logs."""

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Add."""
        logs["val_f1"] = 0.5 - 0.1 * epoch


def test_what_a_callback_adds_to_the_logs_is_history_and_may_be_the_monitor(
    small: dict[str, Any], tmp_path: Path
) -> None:
    changes = {"callbacks": [{"class": f"{HERE}.Adds"}], "monitor": "val_f1"}
    run(small | changes | {"monitor_mode": "max"}, tmp_path / "run")
    rows = list(csv.DictReader((tmp_path / "run" / "history.csv").open()))
    assert [float(row["val_f1"]) for row in rows] == [0.5, 0.4]
    with h5py.File(tmp_path / "run" / "model_best.h5") as file:
        assert len(file["training_state/history"][:1]) == 1


class Diary(keras.callbacks.Callback):
    """Appends to files of its own, one of which it holds open."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.path = Path(folder, "diary.txt")
        self.held = open(Path(folder, "held.txt"), "a")  # noqa: SIM115

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Append."""
        with open(self.path, "a") as file:
            file.write(f"{epoch}\n")
        self.held.write(f"{epoch}\n")


def test_what_callbacks_append_is_there_once(small: dict[str, Any], tmp_path: Path) -> None:
    for name in ("straight", "killed"):
        folder = tmp_path / name
        folder.mkdir()
        config = small | {"num_epochs": 4, "tensorboard": True}
        config["callbacks"] = [
            {"class": f"{CALLBACKS}.CSVLogger", "filename": str(folder / "log.csv")},
            {"class": f"{HERE}.Diary", "folder": str(folder)},
            {"class": f"{CALLBACKS}.TensorBoard", "log_dir": str(folder / "keras")},
        ]
        for epoch in (0, 2) if name == "killed" else ():
            with pytest.raises(OSError, match="planned"):
                run(config, folder, Fails(epoch))
            gc.collect()  # a file that is held is written to its end now, and not later
        run(config, folder)
    for name in ("history.csv", "log.csv", "diary.txt", "held.txt"):
        straight, killed = (tmp_path / run_name / name for run_name in ("straight", "killed"))
        assert straight.read_text() == killed.read_text(), name
    counts = [
        number_of_events(tmp_path / name / "keras" / "train") for name in ("straight", "killed")
    ]
    assert counts[0] == counts[1]


def test_a_file_that_is_being_replaced_is_not_appended_to(tmp_path: Path) -> None:
    """Its name is gone a moment later, when a checkpoint would ask for its length."""
    files = AppendedFiles(tmp_path)
    files.listen()
    with replacing(tmp_path / "loop_state.pkl") as written, open(written, "w"):
        (tmp_path / "own.txt").open("w").close()
        with open(tmp_path / "own.txt", "a") as own:
            own.write("a row")
            own.flush()
            lengths = files.lengths([])
    files.stop()
    assert lengths == {"own.txt": 5}


def number_of_events(folder: Path) -> list[tuple[str, int]]:
    """Return tag and step of all scalars in a folder, sorted."""
    from tensorflow.compat.v1.train import summary_iterator

    return sorted(
        (value.tag, event.step)
        for path in glob.glob(str(folder / "events*"))
        for event in summary_iterator(path)
        for value in event.summary.value
        if value.tag.startswith("epoch")
    )


class Blank:
    """One batch is all zeros, at which the gradient of a norm is not a number."""

    def __init__(self, source: Any) -> None:
        self.source, self.steps_per_epoch = source, source.steps_per_epoch

    def batch(self, epoch: int, step: int) -> Any:
        """Return a batch."""
        features, labels = self.source.batch(epoch, step)
        return (np.zeros_like(features), labels) if (epoch, step) == (1, 3) else (features, labels)


def with_blank(config: Mapping[str, Any]) -> Any:
    """The digits with that batch."""
    dataset = get_digits(config)
    return replace(dataset, train=Blank(dataset.train))


def with_norm(config: Mapping[str, Any], input_shape: Any, **_: Any) -> keras.Model:
    """A model whose outputs are regularised by a norm."""
    inputs = keras.Input(input_shape)
    dense = layers.Dense(
        16, "relu", False, activity_regularizer=lambda a: 1e-3 * ops.sqrt(ops.sum(ops.square(a)))
    )
    return keras.Model(inputs, layers.Dense(10, "softmax")(dense(layers.Flatten()(inputs))))


def test_weights_that_are_not_finite_never_replace_finite_ones(
    small: dict[str, Any], tmp_path: Path
) -> None:
    config = small | {"model": f"{HERE}.with_norm", "dataset": f"{HERE}.with_blank"}
    config["checkpoint_steps"] = 1
    for _ in range(2):  # nor does the same command, which finds the last good one
        with pytest.raises(FloatingPointError, match="not a finite number"):
            run(config, tmp_path / "run")
        with h5py.File(tmp_path / "run" / "model.h5") as file:
            weights = [d[()] for d in file["training_state/weights"].values()]
        assert all(np.isfinite(weight).all() for weight in weights)
    run(config | {"on_nan": "continue"}, tmp_path / "other")


class Moves(Hook):
    """Renames the run folder, and puts another one in its place."""

    def after_epoch(self, epoch: int) -> None:
        """Do so once."""
        if epoch == 0:
            folder = Path(self.root)
            folder.rename(folder.with_name("moved"))
            folder.mkdir()


def test_a_folder_that_was_replaced_is_noticed(small: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(OSError, match="renamed or replaced"):
        run(small, tmp_path / "run", Moves())
    assert list((tmp_path / "run").iterdir()) == []


def model_of(between: Callable[[Any], Any], **compiled: Any) -> Callable[..., keras.Model]:
    """Return what builds a model of the digits with something between input and output."""

    def build_it(config: Any, input_shape: Any, num_classes: int) -> keras.Model:
        inputs = keras.Input(input_shape)
        x = between(layers.Flatten()(inputs))
        return keras.Model(inputs, layers.Dense(num_classes, "softmax")(x))

    return build_it


class Twins(layers.Layer):
    """Two layers of one name."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.one, self.two = layers.Dense(8, name="dense"), layers.Dense(8, name="dense")

    def build(self, shape: Any) -> None:
        """Build both."""
        self.one.build(shape)
        self.two.build((None, 8))

    def call(self, x: Any) -> Any:
        """Call both."""
        return self.two(self.one(x))


class NoJSON(layers.Dense):
    """A layer whose config is not JSON."""

    def get_config(self) -> dict[str, Any]:
        """Return it."""
        return super().get_config() | {"something": object()}


class Scaled(keras.Model):
    """A model with a weight of its own."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.dense = layers.Dense(10, "softmax")
        self.factor = self.add_weight(shape=(), initializer="ones", name="factor")

    def call(self, x: Any) -> Any:
        """Return probabilities."""
        return self.dense(layers.Flatten()(x) * self.factor)


def shared(x: Any) -> Any:
    """An encoder that two nested models share."""
    inputs = keras.Input((64,))
    encoder = keras.Model(inputs, layers.Dense(8, "relu")(inputs), name="encoder")
    inputs = keras.Input((64,))
    one = keras.Model(inputs, layers.BatchNormalization()(encoder(inputs)), name="one")
    inputs = keras.Input((64,))
    return layers.Add()([one(x), keras.Model(inputs, encoder(inputs), name="two")(x)])


def many(x: Any) -> Any:
    """Layers with more than 64 KB of names within one layer: 70 of a thousand characters."""
    inputs = keras.Input((64,))
    y = inputs
    for number in range(35):
        y = layers.Dense(1, name=f"layer_with_a_long_name_{number:0960}")(y)
    return keras.Model(inputs, y, name="many")(x)


same_names = model_of(lambda x: Twins()(x))
no_json = model_of(lambda x: NoJSON(8)(x))
half = model_of(lambda x: layers.Dense(8, dtype="bfloat16")(x))
shared_encoder, long_names = model_of(shared), model_of(many)


def own_weight(config: Any, input_shape: Any, num_classes: int) -> keras.Model:
    """A subclassed model."""
    return Scaled()


@pytest.mark.parametrize(
    ("model", "loads"),
    [
        ("same_names", False),
        ("no_json", False),
        ("half", True),
        ("shared_encoder", True),
        pytest.param("long_names", True, marks=pytest.mark.slow),
        ("own_weight", False),
    ],
)
def test_what_keras_cannot_write_is_trained_resumed_and_evaluated_all_the_same(
    model: str, loads: bool, small: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    config = small | {"model": f"{HERE}.{model}", "optimizer": "adafactor"}
    run(config, tmp_path / "straight")
    said = "load_model will not open" in caplog.text
    with pytest.raises(OSError, match="planned"):
        run(config, tmp_path / "killed", Fails(1))
    trained = run(config, tmp_path / "killed")
    same(tmp_path / "straight", tmp_path / "killed")
    features = get_digits(config).load_test()[0][:20]
    prepared = build(config)
    prepared.load(tmp_path / "killed" / "model.h5")
    evaluated = prepared.model
    expected = trained.predict(features, verbose=0)
    np.testing.assert_array_equal(evaluated.predict(features, verbose=0), expected)
    if loads:
        loaded = keras.models.load_model(tmp_path / "killed" / "model.h5")
        np.testing.assert_allclose(loaded.predict(features, verbose=0), expected, atol=1e-6)
    assert said or loads


def test_settings_that_a_compiled_model_does_not_see_are_refused(small: dict[str, Any]) -> None:
    given = {"learning_rate": None, "optimizer": "sgd", "accumulate_steps": 4}
    with pytest.raises(UsageError, match=r"optimizer, accumulate_steps; add --optimizer=\"adam\""):
        build(small | given | {"model": f"{HERE}.compiled"})


def compiled(config: Any, input_shape: Any, num_classes: int) -> keras.Model:
    """A model that is compiled already."""
    model = half(config, input_shape, num_classes)
    model.compile("adam", "sparse_categorical_crossentropy")
    return model


def test_a_setting_that_nobody_reads_is_named(quick_command: Command, tmp_path: Path) -> None:
    words = ["bin/train.py", "digits", tmp_path / "run", "--num_epochs=2", "--n_filters=3"]
    words += [f"--model={HERE}.half", "--fold=0", "--lr_schedule=null", "--no_tensorboard"]
    done = quick_command(*words)
    assert done.returncode == 0, done.stderr
    assert (done.stdout + done.stderr).count("n_filters: set, but neither") == 1
