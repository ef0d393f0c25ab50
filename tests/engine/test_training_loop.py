"""The loop: what stands in the history, how it resumes, how it stops."""

import signal
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from interruptions import AfterStep, StopAt
from loops import loop
from tensorflow.python.eager import context

from engine.batches import ArrayBatches, FunctionBatches
from engine.checkpoints import is_lower_better, read_state
from engine.hooks import LearningRates
from engine.hooks.base import Hook, IntervalHook
from engine.hooks.keeping import KeepCheckpoints
from engine.hooks.stopping import EarlyStopping
from engine.training.steps import Steps, _run_singly
from src.experiment import build

History = list[dict[str, Any]]


@pytest.fixture(autouse=True)
def short_runs_make_steps_in_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Steps, "FIRST_STEPS", 50)  # an epoch of the digits has 40


def train(
    config: dict[str, Any], folder: Path, hooks: tuple[Hook, ...] = (), **changes: Any
) -> History:
    folder.mkdir(exist_ok=True)
    experiment = build(config)
    arguments: dict[str, Any] = {
        "valid": experiment.dataset.valid,
        "num_epochs": config["num_epochs"],
        "learning_rates": experiment.learning_rates,
        "monitor": experiment.monitor,
        "callbacks": experiment.callbacks,
    }
    valid = (arguments | changes).pop("valid")
    return loop(
        experiment.model,
        experiment.dataset.train,
        valid,
        folder,
        hooks=hooks,
        **{k: v for k, v in (arguments | changes).items() if k != "valid"},
    )


def test_the_history_has_a_row_per_epoch(config: dict[str, Any], tmp_path: Path) -> None:
    history = train(config, tmp_path)
    assert [row["epoch"] for row in history] == [0, 1]
    assert [row["step"] for row in history] == [40, 80]
    assert history[1]["loss"] < history[0]["loss"]
    header, *rows = (tmp_path / "history.csv").read_text().splitlines()
    assert header == "epoch,step,learning_rate,loss,accuracy,val_loss,val_accuracy"
    assert [float(rows[1].split(",")[3])] == pytest.approx([history[1]["loss"]])


def test_the_rate_in_force_stands_in_the_history(config: dict[str, Any], tmp_path: Path) -> None:
    schedule = [[1, 0.01], [3, 0.002]]
    history = train(config | {"lr_schedule": schedule, "num_epochs": 4}, tmp_path)
    expected = [0.01, 0.002, 0.002, 0.002]
    assert [row["learning_rate"] for row in history] == pytest.approx(expected)


def test_the_schedule_holds_while_epoch_is_below_until() -> None:
    rates = [LearningRates([(3, 0.1), (6, 0.01)]).rate_in(epoch) for epoch in range(8)]
    assert rates == [0.1] * 3 + [0.01] * 5


def test_a_schedule_of_keras_is_named_by_its_path(config: dict[str, Any], tmp_path: Path) -> None:
    schedule = {
        "class": "keras.optimizers.schedules.PiecewiseConstantDecay",
        "boundaries": [39],
        "values": [0.01, 0.001],
    }
    history = train(config | {"lr_schedule": schedule}, tmp_path)
    assert [row["learning_rate"] for row in history] == pytest.approx([0.01, 0.001])


def test_a_run_without_validation_is_judged_by_its_loss(
    config: dict[str, Any], tmp_path: Path
) -> None:
    history = train(config, tmp_path, valid=None, monitor="loss")
    assert "val_loss" not in history[0]
    assert read_state(tmp_path / "model_best.h5")["epoch"] == 2


def test_interrupted_and_continued_equals_uninterrupted(
    config: dict[str, Any], tmp_path: Path
) -> None:
    config |= {"num_epochs": 3, "lr_schedule": [[1, 0.01], [3, 0.001]]}
    train(config, tmp_path / "straight")
    with pytest.raises(SystemExit) as stopped:
        train(config, tmp_path / "resumed", hooks=(StopAt(global_step=100),))
    assert stopped.value.code == 75
    assert len((tmp_path / "resumed" / "history.csv").read_text().splitlines()) == 1 + 2
    train(config, tmp_path / "resumed")
    for name in ("model.h5", "model_best.h5", "history.csv", "loop_state.pkl"):
        straight, resumed = (tmp_path / run / name for run in ("straight", "resumed"))
        assert straight.read_bytes() == resumed.read_bytes(), name


def test_a_larger_number_of_epochs_goes_on_from_where_it_was(
    config: dict[str, Any], tmp_path: Path
) -> None:
    train(config | {"num_epochs": 3}, tmp_path / "straight")
    train(config | {"num_epochs": 2}, tmp_path / "extended")
    train(config | {"num_epochs": 3}, tmp_path / "extended")
    straight, extended = (tmp_path / run / "model.h5" for run in ("straight", "extended"))
    assert straight.read_bytes() == extended.read_bytes()


class Warm(Hook):
    """Sets the rate of an epoch as it begins, and changes it within."""

    def before_epoch(self, epoch: int) -> None:
        self.run.model.optimizer.learning_rate = 0.002 * (epoch + 1)

    def next_step(self, global_step: int) -> int | None:
        return (global_step // 20 + 1) * 20

    def after_step(self, global_step: int, last_results: Any) -> None:
        optimizer = self.run.model.optimizer
        optimizer.learning_rate = float(optimizer.learning_rate) / 2


@pytest.mark.parametrize("within", [pytest.param(False, marks=pytest.mark.slow), True])
def test_what_a_hook_sets_before_an_epoch_holds_in_a_resumed_run(
    within: bool, config: dict[str, Any], tmp_path: Path
) -> None:
    config |= {"num_epochs": 3}
    train(config, tmp_path / "straight", hooks=(Warm(),))
    if within:
        with pytest.raises(SystemExit):
            train(config, tmp_path / "resumed", hooks=(Warm(), StopAt(105)))
    else:
        train(config | {"num_epochs": 2}, tmp_path / "resumed", hooks=(Warm(),))
    train(config, tmp_path / "resumed", hooks=(Warm(),))
    for name in ("model.h5", "history.csv"):
        straight, resumed = (tmp_path / run / name for run in ("straight", "resumed"))
        assert straight.read_bytes() == resumed.read_bytes(), name


class Counts(Hook):
    """Counts epochs."""

    def __init__(self) -> None:
        self.factors = [0.5, 0.1]
        self.seen: dict[str, list[int]] = {"epochs": []}

    def after_epoch(self, epoch: int) -> None:
        self.seen["epochs"].append(epoch)


class CountsForTheFuture(Counts):
    def get_state(self) -> dict[str, Any]:
        return self.seen

    def set_state(self, state: Any) -> None:
        self.seen = dict(state)


class CountsToTell(Counts):
    only_tells = True


class Constant(Counts):
    def after_epoch(self, epoch: int) -> None:
        pass


@pytest.mark.parametrize("within", [False, True])
def test_a_hook_that_forgets_is_named_once(
    within: bool, config: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hooks: list[Hook] = [Counts(), CountsForTheFuture(), CountsToTell(), Constant()]
    hooks += [EarlyStopping(patience=9), KeepCheckpoints(40, keep=1)]
    if within:
        hooks = [IntervalHook(hooks, 1)]
    train(config, tmp_path, hooks=tuple(hooks))
    warnings = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    (warning,) = [message for message in warnings if "no checkpoint holds" in message]
    assert "(Counts) changes its seen, which no checkpoint holds" in warning
    assert "get_state()" in warning


def test_a_finished_run_makes_no_further_step(config: dict[str, Any], tmp_path: Path) -> None:
    train(config, tmp_path)
    before = (tmp_path / "model.h5").read_bytes()
    assert len(train(config, tmp_path)) == 2
    assert (tmp_path / "model.h5").read_bytes() == before


def test_keras_callbacks_take_part(config: dict[str, Any], tmp_path: Path) -> None:
    calls: list[str] = []

    class Recorder(keras.callbacks.Callback):
        def on_train_begin(self, logs: Any = None) -> None:
            calls.append("train_begin")

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            calls.append("batch")

        def on_test_begin(self, logs: Any = None) -> None:
            calls.append("test")

        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            calls.append(f"epoch {epoch} {'val_loss' in logs}")
            self.model.stop_training = epoch == 1

        def on_train_end(self, logs: Any = None) -> None:
            calls.append("train_end")

    history = train(config | {"num_epochs": 9}, tmp_path, callbacks=[Recorder()])
    assert len(history) == 2
    epoch = ["batch"] * 40 + ["test"]
    assert calls == ["train_begin", *epoch, "epoch 0 True", *epoch, "epoch 1 True", "train_end"]


def test_keras_callbacks_know_how_much_there_is_to_do(
    config: dict[str, Any], tmp_path: Path
) -> None:
    callback = keras.callbacks.Callback()
    train(config | {"num_epochs": 1}, tmp_path, callbacks=[callback])
    assert callback.params == {"verbose": 0, "epochs": 1, "steps": 40}


def test_early_stopping_stops_and_stays_stopped(config: dict[str, Any], tmp_path: Path) -> None:
    # A rate of zero: nothing ever improves on the first epoch.
    config |= {"num_epochs": 9, "learning_rate": 1e-30, "augmented": False, "dropout": 0.0}
    arguments: dict[str, Any] = {"hooks": (EarlyStopping(patience=2),), "monitor": "val_accuracy"}
    assert len(train(config, tmp_path, **arguments)) <= 6
    stopped_after = len(train(config, tmp_path, **arguments))
    assert read_state(tmp_path / "model.h5")["epoch"] == stopped_after
    assert read_state(tmp_path / "model_best.h5")["epoch"] == stopped_after - 2


class Diverging(keras.layers.Layer):
    """Is the identity, until its weight is told to be not a number."""

    def build(self, input_shape: Any) -> None:
        self.factor = self.add_weight(shape=(), initializer="ones", trainable=False, name="factor")

    def call(self, inputs: Any) -> Any:
        return inputs * self.factor


def diverging_model() -> keras.Model:
    model = keras.Sequential(
        [keras.Input((8, 8, 1)), keras.layers.Flatten(), Diverging(), keras.layers.Dense(10)]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("sgd", loss)
    return model


class DivergeAt(AfterStep):
    def act(self) -> None:
        self.run.model.layers[1].factor.assign(np.nan)


@pytest.mark.parametrize("on_nan", ["stop", "continue"])
def test_a_loss_that_is_not_a_number(on_nan: str, config: dict[str, Any], tmp_path: Path) -> None:
    dataset = build(config).dataset
    arguments: dict[str, Any] = {"num_epochs": 2, "on_nan": on_nan, "hooks": [DivergeAt(50)]}
    if on_nan == "continue":
        loop(diverging_model(), dataset.train, dataset.valid, tmp_path, **arguments)
        assert (tmp_path / "history.csv").read_text().count("nan") == 2
        assert read_state(tmp_path / "model_best.h5")["epoch"] == 1
        return
    with pytest.raises(FloatingPointError, match=r"step 11 of epoch 2"):
        loop(diverging_model(), dataset.train, dataset.valid, tmp_path, **arguments)
    assert read_state(tmp_path / "model.h5")["epoch"] == 1
    arguments["hooks"] = []
    model = diverging_model()
    history = loop(model, dataset.train, dataset.valid, tmp_path, **arguments)
    assert len(history) == 2
    assert np.isfinite(history[1]["loss"])


def test_a_monitor_that_nothing_has_is_named(config: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(KeyError, match=r"monitor is 'val_lost'; there are .*val_loss"):
        train(config, tmp_path, monitor="val_lost", monitor_mode="min")
    assert (tmp_path / "model.h5").exists()  # an epoch's work is not lost for a name


def test_signal_handlers_are_put_back(config: dict[str, Any], tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    train(config, tmp_path)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"accumulate_steps": 3}, marks=pytest.mark.slow),
        pytest.param({"optimizer_arguments": {"clipnorm": 0.5}}, marks=pytest.mark.slow),
        pytest.param({"precision": "mixed_bfloat16"}, marks=pytest.mark.slow),
        pytest.param(
            {
                "callbacks": [
                    {
                        "class": "keras.callbacks.ReduceLROnPlateau",
                        "patience": 0,
                        "min_delta": 10.0,
                    },
                    {
                        "class": "keras.callbacks.EarlyStopping",
                        "patience": 9,
                        "restore_best_weights": True,
                    },
                ]
            },
            marks=pytest.mark.slow,
        ),
        {
            "lr_schedule": {
                "class": "keras.optimizers.schedules.ExponentialDecay",
                "initial_learning_rate": 0.01,
                "decay_steps": 10,
                "decay_rate": 0.9,
            }
        },
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_stopped_in_the_middle_of_an_epoch_it_ends_the_same(
    changes: dict[str, Any], config: dict[str, Any], tmp_path: Path
) -> None:
    config |= changes
    try:
        train(config, tmp_path / "straight")
        for stop in (17, 41):
            with pytest.raises(SystemExit):
                train(config, tmp_path / "resumed", hooks=(StopAt(stop),))
        train(config, tmp_path / "resumed")
    finally:
        keras.config.set_dtype_policy("float32")
    for name in ("model.h5", "model_best.h5", "history.csv"):
        straight, resumed = (tmp_path / run / name for run in ("straight", "resumed"))
        assert straight.read_bytes() == resumed.read_bytes(), name


@pytest.mark.slow
def test_how_steps_are_grouped_changes_no_bit(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Looks(keras.callbacks.Callback):
        """Makes steps run singly."""

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            pass

    train(config, tmp_path / "single", callbacks=[Looks()])
    train(config, tmp_path / "grouped")
    monkeypatch.setattr(Steps, "SECONDS_PER_CALL", 100.0)
    train(config, tmp_path / "whole_epochs")
    single, *others = (
        (tmp_path / run / "model.h5").read_bytes() for run in ("single", "grouped", "whole_epochs")
    )
    assert all(other == single for other in others)


def test_a_call_has_as_many_steps_as_a_signal_may_wait_for(
    config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most 100 ms, by a clock on which a step takes 10 ms, and later 45 ms."""
    now, seconds_per_step = 0.0, 0.01
    call = Steps._call

    def takes_long(self: Steps, group: Any) -> Any:
        nonlocal now
        now += seconds_per_step * group.num_steps
        return call(self, group)

    monkeypatch.setattr(Steps, "_call", takes_long)
    monkeypatch.setattr("engine.training.steps.time", SimpleNamespace(perf_counter=lambda: now))
    experiment = build(config)
    steps = Steps(experiment.model, experiment.dataset.train)
    steps.compile()
    fast: list[float] = []
    slow: list[float] = []
    step = 0
    while step < 39:
        taken = slow if step >= 15 else fast
        seconds_per_step = 0.045 if step >= 15 else 0.01
        after = steps.run(0, step, 39, 39).step
        taken.append((after - step) * seconds_per_step)
        step = after
    steps.close()
    assert 0.05 < max(fast) <= 0.1
    # The first call was ready when the clock changed, the next one is made ready as it begins.
    assert len(slow) > 4
    assert max(slow[2:]) <= 0.1


@pytest.mark.parametrize(
    ("first_steps", "begin", "expected"),
    [
        (100, (0, 0), [(39, "singly"), (40, "singly")]),
        (100, (2, 5), [(20, "singly"), (39, "at once"), (40, "singly")]),
        (100, (2, 20), [(39, "at once"), (40, "singly")]),
        (100, (9, 0), [(39, "at once"), (40, "singly")]),
        (40, (0, 0), [(39, "at once"), (40, "singly")]),  # no short epochs
    ],
)
def test_a_steps_place_and_its_batch_decide_which_function_makes_it(
    config: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    first_steps: int,
    begin: tuple[int, int],
    expected: list[tuple[int, str]],
) -> None:
    """Whatever attempt it belongs to: else a resumed run would round otherwise."""
    monkeypatch.setattr(Steps, "FIRST_STEPS", first_steps)
    made = []
    call = Steps._call

    def noted(self: Steps, group: Any) -> Any:
        made.append("at once" if isinstance(group.batches, tuple) else "singly")
        return call(self, group)

    monkeypatch.setattr(Steps, "_call", noted)
    experiment = build(config)
    assert experiment.dataset.train.steps_per_epoch == 40
    steps = Steps(experiment.model, experiment.dataset.train)
    steps.size = 1000  # as after many fast calls
    steps.compile()
    epoch, step = begin
    ends = []
    while step < 40:
        step = steps.run(epoch, step, 40, 40).step
        steps.size = 1000
        ends.append(step)
    steps.close()
    assert list(zip(ends, made, strict=True)) == expected


@pytest.mark.parametrize(
    "lengths", [[4] * 9, [3, 4, 4, 5, 3, 4, 4, 5, 3]], ids=["equal", "varying"]
)
def test_batches_of_a_function_are_read_once_whatever_their_shapes(lengths: list[int]) -> None:
    """To go back to a batch, all of its epoch before it has to be read again."""
    opened = Counter[int]()

    def open_epoch(epoch: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        opened[epoch] += 1
        for number, length in enumerate(lengths):
            size = 2 if number < 8 else 1  # the last is smaller
            yield np.ones((size, length, 2), np.float32), np.ones((size, 1), np.float32)

    layers = [keras.layers.GlobalAveragePooling1D(), keras.layers.Dense(1)]
    model = keras.Sequential([keras.Input((None, 2)), *layers])
    model.compile("sgd", "mse")
    steps = Steps(model, FunctionBatches(open_epoch))
    ends = []
    for epoch in range(20):
        step = 0
        while step < 9:
            steps.size = 4  # as after fast calls
            step = steps.run(epoch, step, 9, 9).step
            ends.append((epoch, step))
    steps.close()
    assert ends[-1] == (19, 9)
    assert {opened[epoch] for epoch in range(5, 20)} == {1}, "but for what is looked at first"


def test_only_single_steps_run_as_they_were_traced_and_only_in_their_thread() -> None:
    def is_rewritten() -> bool:
        options = context.context().function_call_options.config_proto_serialized
        config = tf.compat.v1.ConfigProto.FromString(options)
        return not config.graph_options.rewrite_options.disable_meta_optimizer

    seen = []

    def one_step(batch: Any) -> dict[str, float]:
        with ThreadPoolExecutor(1) as beside:
            seen.append((is_rewritten(), beside.submit(is_rewritten).result()))
        return {"loss": 0.0}

    _run_singly(one_step, [None])
    assert seen == [(False, True)]
    assert is_rewritten()


class CountsTraces(keras.Sequential):
    """Notes the number of examples, as far as it is known, whenever its step is traced."""

    def train_step(self, data: Any) -> dict[str, Any]:
        self.traces = [*getattr(self, "traces", ()), data[0].shape[0]]
        return super().train_step(data)


class KnowsNumber(CountsTraces):
    """Cannot be traced for a number of examples that is yet to come."""

    def train_step(self, data: Any) -> dict[str, Any]:
        keras.ops.zeros([data[0].shape[0]])
        return super().train_step(data)


class TellsHow(keras.Sequential):
    """Notes of each training step whether it ran eagerly."""

    def train_step(self, data: Any) -> dict[str, Any]:
        self.eagerly = [*getattr(self, "eagerly", ()), tf.executing_eagerly()]
        return super().train_step(data)


@pytest.mark.slow
def test_a_model_that_runs_eagerly_is_not_compiled(tmp_path: Path) -> None:
    features = np.random.default_rng(0).random((67, 4), np.float32)
    source = ArrayBatches(features, np.arange(67) % 2, batch_size=32, seed=0)
    model = TellsHow([keras.Input((4,)), keras.layers.Dense(2)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("sgd", loss, run_eagerly=True)
    loop(model, source, None, tmp_path, num_epochs=20, monitor="loss")
    assert list(model.eagerly) == [True] * 60  # beyond the first steps, too


@pytest.mark.parametrize(
    ("kind", "layer", "expected"),
    [
        (CountsTraces, keras.layers.Flatten, {None}),
        (KnowsNumber, keras.layers.Flatten, {32, 3}),
        (CountsTraces, lambda: keras.layers.LSTM(2), {None, 32, 3}),
    ],
)
def test_a_smaller_last_batch_is_traced_anew_only_where_it_has_to_be(
    tmp_path: Path, kind: type[CountsTraces], layer: Any, expected: set[int | None]
) -> None:
    features = np.random.default_rng(0).random((67, 4, 4), np.float32)
    source = ArrayBatches(features, np.arange(67) % 2, batch_size=32, seed=0)
    model = kind([keras.Input((4, 4)), layer(), keras.layers.Dense(2)])
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    loop(model, source, None, tmp_path, num_epochs=2, monitor="loss")
    assert set(model.traces) == expected
    # A tf.function may call what it traces twice, but no step is traced a second time.
    assert len(model.traces) <= 2 * len(expected)


def test_commits_come_as_often_as_asked(config: dict[str, Any], tmp_path: Path) -> None:
    seen: list[int] = []

    class Watch(Hook):
        def next_step(self, global_step: int) -> int:
            return global_step + 1

        def after_step(self, global_step: int, last_results: Any) -> None:
            if (tmp_path / "model.h5").exists():
                seen.append(read_state(tmp_path / "model.h5")["global_step"])

    train(config | {"num_epochs": 1}, tmp_path, hooks=(Watch(),), checkpoint_steps=15)
    assert {15, 30} & set(seen)
    assert not set(seen) - {15, 30}


def test_a_callback_whose_state_is_not_saved_is_named(
    config: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Counts(keras.callbacks.Callback):
        def __init__(self) -> None:
            super().__init__()
            self.count = 0

        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            self.count += 1

    class Saves(Counts):
        def get_state(self) -> dict[str, Any]:
            return {"count": self.count}

        def set_state(self, state: dict[str, Any]) -> None:
            self.count = state["count"]

    train(config | {"num_epochs": 1}, tmp_path, callbacks=[Counts(), Saves()])
    assert caplog.text.count("(Counts) changes its count, which no checkpoint holds") == 1
    assert "Counts" in caplog.text


class LazyOptimizer(keras.Model):
    """Has a second optimizer, whose variables come into being with the first training step."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = keras.layers.Dense(6, activation="relu")
        self.classifier = keras.layers.Dense(10)
        self.second = keras.optimizers.Adam(0.01)

    def call(self, inputs: Any) -> Any:
        return self.classifier(self.hidden(keras.ops.reshape(inputs, (-1, 64))))

    def train_step(self, data: Any) -> dict[str, Any]:
        features, labels = data
        with tf.GradientTape(persistent=True) as tape:
            loss = self.compute_loss(y=labels, y_pred=self(features, training=True))
        for layer, optimizer in ((self.hidden, self.optimizer), (self.classifier, self.second)):
            variables = layer.trainable_variables
            optimizer.apply(tape.gradient(loss, variables), variables)
        return {"loss": loss}


def test_a_second_optimizer_that_is_built_late_is_resumed(
    config: dict[str, Any], tmp_path: Path
) -> None:
    def run(folder: Path, stop: int = 0) -> None:
        dataset = build(config).dataset
        model = LazyOptimizer()
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile("sgd", loss)
        folder.mkdir(exist_ok=True)
        hooks = (StopAt(stop),) if stop else ()
        loop(model, dataset.train, None, folder, num_epochs=2, monitor="loss", hooks=hooks)

    run(tmp_path / "straight")
    with pytest.raises(SystemExit):
        run(tmp_path / "resumed", stop=23)
    run(tmp_path / "resumed")
    for name in ("model.h5", "history.csv"):
        straight, resumed = (tmp_path / folder / name for folder in ("straight", "resumed"))
        assert straight.read_bytes() == resumed.read_bytes(), name


class OwnSteps(keras.Model):
    """A model with steps of its own, as Keras' guide writes them."""

    def train_step(self, data: Any) -> dict[str, Any]:
        features, labels = data
        with tf.GradientTape() as tape:
            predictions = self(features, training=True)
            loss = self.compute_loss(y=labels, y_pred=predictions)
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply(gradients, self.trainable_variables)
        for metric in self.metrics:
            if metric.name == "loss":
                metric.update_state(loss)
            else:
                metric.update_state(labels, predictions)
        return {metric.name: metric.result() for metric in self.metrics}

    def test_step(self, data: Any) -> dict[str, Any]:
        features, labels = data
        predictions = self(features, training=False)
        loss = self.compute_loss(y=labels, y_pred=predictions)
        for metric in self.metrics:
            if metric.name == "loss":
                metric.update_state(loss)
            else:
                metric.update_state(labels, predictions)
        return {metric.name: metric.result() for metric in self.metrics}


def test_a_model_with_steps_of_its_own_trains(config: dict[str, Any], tmp_path: Path) -> None:
    dataset = build(config).dataset
    inputs = keras.Input((8, 8, 1))
    outputs = keras.layers.Dense(10)(keras.layers.Flatten()(inputs))
    model = OwnSteps(inputs, outputs)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss, metrics=["accuracy"])
    history = loop(model, dataset.train, dataset.valid, tmp_path, num_epochs=2)
    assert {"loss", "accuracy", "val_loss", "val_accuracy"} <= set(history[0])
    assert history[1]["loss"] < history[0]["loss"]


class TestsWhatTrainingMade(keras.Model):
    """As in `fit`, its first training step comes before its first test."""

    def train_step(self, data: Any) -> dict[str, Any]:
        if not hasattr(self, "seen"):
            with tf.init_scope():
                self.seen = tf.Variable(0.0)
        self.seen.assign_add(1.0)
        return super().train_step(data)

    def test_step(self, data: Any) -> dict[str, Any]:
        return {**super().test_step(data), "seen": self.seen.read_value()}


def test_the_first_training_step_comes_before_the_first_test(
    config: dict[str, Any], tmp_path: Path
) -> None:
    dataset = build(config).dataset
    inputs = keras.Input((8, 8, 1))
    outputs = keras.layers.Dense(10, "softmax")(keras.layers.Flatten()(inputs))
    model = TestsWhatTrainingMade(inputs, outputs)
    model.compile("adam", "sparse_categorical_crossentropy")
    history = loop(model, dataset.train, dataset.valid, tmp_path, num_epochs=2)
    steps = dataset.train.steps_per_epoch
    assert [row["val_seen"] for row in history] == [steps, 2 * steps]


@pytest.mark.parametrize(
    ("monitor", "lower"),
    [
        ("val_loss", True),
        ("val_mae", True),
        ("rmse", True),
        ("val_accuracy", False),
        ("auc", False),
    ],
)
def test_which_metrics_are_better_when_lower(monitor: str, lower: bool) -> None:
    assert is_lower_better(monitor) is lower
    assert is_lower_better("beauty", "max") is False
    with pytest.raises(ValueError, match="monitor_mode"):
        is_lower_better("beauty")


def test_a_loss_scale_is_resumed(config: dict[str, Any], tmp_path: Path) -> None:
    config |= {"precision": "mixed_float16"}
    try:
        train(config | {"num_epochs": 2}, tmp_path / "straight")
        train(config | {"num_epochs": 1}, tmp_path / "resumed")
        train(config | {"num_epochs": 2}, tmp_path / "resumed")
    finally:
        keras.config.set_dtype_policy("float32")
    straight, resumed = (tmp_path / run / "model.h5" for run in ("straight", "resumed"))
    assert straight.read_bytes() == resumed.read_bytes()


def test_a_rate_that_a_callback_set_holds_until_the_schedule_changes(
    config: dict[str, Any], tmp_path: Path
) -> None:
    class Halve(keras.callbacks.Callback):
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            self.model.optimizer.learning_rate = 0.5 * float(self.model.optimizer.learning_rate)

    config |= {"num_epochs": 4, "lr_schedule": [[3, 0.04], [4, 0.01]]}
    history = train(config, tmp_path, callbacks=[Halve()])
    assert [row["learning_rate"] for row in history] == pytest.approx([0.04, 0.02, 0.01, 0.01])
