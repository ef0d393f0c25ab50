"""Hooks: when they are called, what they see and change, and what those in the box do."""

import logging
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from interruptions import StopAt
from loops import loop
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from engine.batches import ArrayBatches
from engine.checkpoints import read_state
from engine.hooks import progress
from engine.hooks.base import Hook, Hooks, IntervalHook, Run
from engine.hooks.keeping import KeepCheckpoints
from engine.hooks.progress import EpochLog, LearningCurve, Progress, TensorBoard
from engine.hooks.step_logs import LoggingHook, tile
from engine.hooks.stopping import EarlyStopping
from engine.iterators import PyHookedModelIterator, TemplateIterator
from engine.iterators.build import of_iterators
from engine.iterators.datasets import DatasetMixin, ExampleBatches
from engine.pictures import new_figure
from engine.training.steps import Steps

NUM_EXAMPLES = 10


class Numbers(DatasetMixin):
    """Examples with their index as a number."""

    def __len__(self) -> int:
        return NUM_EXAMPLES

    def get_example(self, index: int) -> dict[str, Any]:
        return {"number": float(index)}


class Total:
    """A model without a framework: a sum."""

    def __init__(self) -> None:
        self.total = 0.0
        self.num_steps = 0

    def get_state(self) -> dict[str, Any]:
        return {"total": self.total, "num_steps": self.num_steps}

    def set_state(self, state: Mapping[str, Any]) -> None:
        self.total, self.num_steps = state["total"], state["num_steps"]


class Adds(PyHookedModelIterator):
    """Adds the numbers of a batch; the loss is that of a table by global step, or the total."""

    losses: Sequence[float] = ()

    def step_ops(self) -> Any:
        return {"train_op": self.train_op}

    def train_op(self, model: Total, number: np.ndarray, **_: Any) -> float:
        model.total += float(number.sum())
        model.num_steps += 1
        return self.losses[self.get_global_step()] if self.losses else model.total


class Draws(TemplateIterator):
    """Logs scalars, images and a figure of each batch."""

    def step_op(self, model: Total, **batch: Any) -> Mapping[str, Any]:
        number = batch["number"]

        def train_op() -> None:
            model.num_steps += 1

        def log_op() -> dict[str, Any]:
            figure = new_figure(1, 1)
            figure.add_subplot().plot([0, 1])
            images = np.broadcast_to(number[:, None, None, None], (len(number), 2, 2, 1))
            return {
                "scalars": {"mean": number.mean(), "deep": {"steps": model.num_steps}},
                "images": {"inputs": images.astype(np.uint8)},
                "figures": {"curve": figure},
            }

        return {"train_op": train_op, "log_op": log_op}


def run_iterator(
    folder: Path,
    hooks: Sequence[Any] = (),
    kind: type[PyHookedModelIterator] = Adds,
    own_hooks: Sequence[Any] = (),
    hook_freq: int = 1,
    batch_size: int = 2,
    **changes: Any,
) -> Total:
    folder.mkdir(exist_ok=True)
    config = {"batch_size": batch_size, "seed": 0}
    datasets = {"train": Numbers(), "validation": Numbers()}
    iterator = kind(config, str(folder), Total(), datasets, hook_freq, hooks=own_hooks)
    source = ExampleBatches(Numbers(), batch_size, seed=0)
    arguments: dict[str, Any] = {"num_epochs": 2, "monitor": None, "iterator": iterator}
    loop(iterator.model, source, None, folder, hooks=hooks, **(arguments | changes))
    return iterator.model


@pytest.fixture(autouse=True)
def short_runs_make_steps_in_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Steps, "FIRST_STEPS", 7)  # most runs here have two epochs of five


def run_keras(
    folder: Path, hooks: Sequence[Any], num_steps: int = 5, **changes: Any
) -> keras.Model:
    folder.mkdir(exist_ok=True)
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1, use_bias=False)])
    model.compile("sgd", "mse")
    features = np.ones((2 * num_steps, 3), np.float32)
    source = ArrayBatches(features, features[:, :1], batch_size=2, seed=0)
    arguments: dict[str, Any] = {"num_epochs": 2, "monitor": "loss"}
    loop(model, source, None, folder, hooks=hooks, **(arguments | changes))
    return model


def new_run(root: Path = Path("."), **changes: Any) -> Run:
    fields: dict[str, Any] = {"history": [], "global_step": 0, "best_epoch": None, "monitor": None}
    return Run(root, None, num_epochs=9, steps_per_epoch=5, **(fields | changes))


class Recorder(Hook):
    """Writes down its calls."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def before_training(self, run: Run) -> None:
        super().before_training(run)
        self.calls.append("before_training")

    def before_epoch(self, epoch: int) -> None:
        self.calls.append(f"before_epoch {epoch}")

    def before_step(self, global_step: int, fetches: Any, feeds: Any, batch: Any) -> None:
        self.calls.append(f"before_step {global_step}")
        assert self.run.global_step == global_step

    def after_step(self, global_step: int, last_results: Any) -> None:
        self.calls.append(f"after_step {global_step}")
        assert self.run.global_step == global_step

    def after_epoch(self, epoch: int) -> None:
        self.calls.append(f"after_epoch {epoch}")
        assert self.run.history[-1]["epoch"] == epoch

    def after_training(self) -> None:
        self.calls.append("after_training")

    def at_exception(self, error: BaseException) -> None:
        self.calls.append(f"at_exception {error}")


class AfterSteps(Hook):
    """Writes down the steps after which it is called."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def after_step(self, global_step: int, last_results: Any) -> None:
        self.seen.append(global_step)


class BeforeSteps(Hook):
    """Writes down the steps before which it is called."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def before_step(self, global_step: int, fetches: Any, feeds: Any, batch: Any) -> None:
        self.seen.append(global_step)


class Looks(Hook):
    """Keeps what steps return."""

    def __init__(self) -> None:
        self.results: list[Any] = []

    def after_step(self, global_step: int, last_results: Any) -> None:
        self.results.append(last_results)


class SeedForm:
    """Is no `Hook`, and wants to see what the step was given."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, Any, Any, Any]] = []

    def after_step(self, global_step: int, fetches: Any, feeds: Any, batch: Any) -> None:
        self.seen.append((global_step, fetches, feeds, batch))


class Fails(Hook):
    """Fails after a step."""

    def __init__(self, global_step: int) -> None:
        self.global_step = global_step

    def after_step(self, global_step: int, last_results: Any) -> None:
        if global_step >= self.global_step:
            raise ValueError("no more ink")


def calls_of_epoch(epoch: int) -> list[str]:
    steps = [
        call
        for step in range(5 * epoch, 5 * epoch + 5)
        for call in (f"before_step {step}", f"after_step {step + 1}")
    ]
    return [f"before_epoch {epoch}", *steps, f"after_epoch {epoch}"]


# ---- when hooks are called, and what they see and change -----------------------------------------


@pytest.mark.parametrize("run", [run_keras, run_iterator])
@pytest.mark.parametrize("within", [False, True])
def test_the_order_of_all_calls(run: Any, within: bool, tmp_path: Path) -> None:
    recorder = Recorder()
    run(tmp_path, [IntervalHook([recorder], 1) if within else recorder])
    expected = ["before_training", *calls_of_epoch(0), *calls_of_epoch(1), "after_training"]
    assert recorder.calls == expected


def test_hooks_of_the_loop_come_before_those_of_the_iterator(tmp_path: Path) -> None:
    calls: list[str] = []

    class Named(Hook):
        def __init__(self, name: str) -> None:
            self.name = name

        def before_step(self, global_step: int, fetches: Any, feeds: Any, batch: Any) -> None:
            calls.append(f"{self.name} before {global_step}")

        def after_step(self, global_step: int, last_results: Any) -> None:
            calls.append(f"{self.name} after {global_step}")

    run_iterator(tmp_path, [Named("a"), Named("b")], own_hooks=[Named("c")], num_steps=1)
    assert calls == [f"{name} {when}" for when in ("before 0", "after 1") for name in "abc"]


@pytest.mark.parametrize("within", [False, True])
def test_a_hook_that_fails_is_named_and_the_last_commit_stays(within: bool, tmp_path: Path) -> None:
    recorder, fails = Recorder(), Fails(7)
    hooks = [recorder, IntervalHook([fails], 1) if within else fails]
    message = "^hook Fails failed in after_step: ValueError: no more ink$"
    with pytest.raises(RuntimeError, match=message):
        run_iterator(tmp_path, hooks)
    assert recorder.calls[-2] == "after_step 7"
    assert recorder.calls[-1].startswith("at_exception hook Fails failed")
    assert read_state(tmp_path / "model.h5")["global_step"] == 5
    assert run_iterator(tmp_path).num_steps == 10


def test_addresses_are_given_to_all_hooks(tmp_path: Path) -> None:
    hook, inner, own = Hook(), Hook(), Hook()
    run_iterator(tmp_path, [hook, IntervalHook([IntervalHook([inner], 1)], 1)], own_hooks=[own])
    for each in (hook, inner, own):
        assert each.root == str(tmp_path)
        for name in ("code", "checkpoints", "train", "eval"):
            assert getattr(each, name) == str(tmp_path / name)
        assert each.run.num_epochs == 2


def test_a_keras_step_does_what_hooks_make_of_it(tmp_path: Path) -> None:
    class Blank(Hook):
        """Shows the model nothing, of which it learns nothing."""

        def before_step(self, global_step: int, fetches: Any, feeds: Any, batch: Any) -> None:
            feeds[0] = np.zeros_like(feeds[0])
            fetches["extra"] = lambda feeds: int(feeds[0].sum())
            assert batch[0].min() == 1.0

    looks, seed_form = Looks(), SeedForm()
    results = looks.results
    keras.utils.set_random_seed(0)
    blank = run_keras(tmp_path / "blank", [Blank(), looks, seed_form], num_epochs=1)
    keras.utils.set_random_seed(0)
    other = run_keras(tmp_path / "other", [AfterSteps()], num_epochs=1, num_steps=5)
    keras.utils.set_random_seed(0)
    new = keras.layers.Dense(1, use_bias=False)
    new.build((None, 3))
    assert np.array_equal(blank.get_weights()[0], new.get_weights()[0])
    assert not np.array_equal(other.get_weights()[0], new.get_weights()[0])
    assert [result["extra"] for result in results] == [0] * 5
    assert results[-1]["loss"] == pytest.approx(1.0)
    assert [step for step, *_ in seed_form.seen] == [1, 2, 3, 4, 5]
    _, fetches, feeds, batch = seed_form.seen[0]
    assert set(fetches) == {"train_op", "extra"}
    assert feeds[0].max() == 0.0
    assert batch[0].min() == 1.0


def test_a_step_of_an_iterator_does_what_hooks_make_of_it(tmp_path: Path) -> None:
    class Ones(Hook):
        def before_step(self, global_step: int, fetches: Any, feeds: Any, batch: Any) -> None:
            feeds["number"] = np.ones_like(feeds["number"])
            fetches["extra"] = lambda model, **feeds: feeds["number"].tolist()
            if global_step == 3:
                fetches["step_ops"]["train_op"] = lambda model, **feeds: 100.0

    looks = Looks()
    results = looks.results
    model = run_iterator(tmp_path, [Ones(), looks], num_epochs=1)
    assert (model.total, model.num_steps) == (8.0, 4)  # step 3 has done something else
    assert results[0] == {"global_step": 0, "step_ops": {"train_op": 2.0}, "extra": [1.0, 1.0]}
    assert results[3]["step_ops"] == {"train_op": 100.0}
    assert [result["global_step"] for result in results] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("run", [run_keras, run_iterator])
def test_a_hook_of_the_seeds_form_works_within_an_interval(run: Any, tmp_path: Path) -> None:
    seed_form = SeedForm()
    run(tmp_path, [IntervalHook([seed_form], 4)])  # type: ignore[list-item]
    assert [step for step, *_ in seed_form.seen] == [1, 5, 9]
    assert all(fetches and feeds and batch for _, fetches, feeds, batch in seed_form.seen)


def test_hook_freq_skips_hooks_and_no_step(tmp_path: Path) -> None:
    after, before, always = AfterSteps(), BeforeSteps(), BeforeSteps()
    model = run_iterator(tmp_path, [always], own_hooks=[after, before], hook_freq=3)
    assert model.num_steps == 10
    assert (before.seen, after.seen) == ([0, 3, 6, 9], [1, 4, 7, 10])
    assert always.seen == list(range(10))


# ---- IntervalHook --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "end", "expected"),
    [
        ({"interval": 3}, 10, [0, 3, 6, 9]),
        ({"interval": 3, "start": 2, "stop": 8}, 99, [2, 5]),
        ({"interval": 1, "stop": 0}, 99, []),
        (
            {"interval": 1, "max_interval": 1000},
            4000,
            [0, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1000, 2000, 3000],
        ),
        ({"interval": 1, "max_interval": 4}, 18, [0, 2, 4, 8, 12, 16]),
        ({"interval": 1, "max_interval": 4, "start": 5}, 20, [5, 7, 9, 13, 17]),
        ({"interval": 3, "max_interval": 7}, 30, [0, 6, 7, 14, 21, 28]),
        ({"interval": 5, "max_interval": 2}, 7, [0, 2, 4, 6]),
        ({"interval": 1, "modify_each": 2}, 30, [0, 1, 2, 4, 8, 12, 16, 24]),
        ({"interval": 1, "modify_each": 2, "max_interval": 4}, 18, [0, 1, 2, 4, 8, 12, 16]),
        ({"interval": 3, "modify_each": float("inf")}, 10, [0, 3, 6, 9]),
    ],
)
def test_the_steps_of_an_interval(arguments: dict[str, Any], end: int, expected: list[int]) -> None:
    hook = IntervalHook([], **arguments)
    # From wherever a resumed run begins, they are the same.
    for step in range(end):
        later = [due + 1 for due in expected if due >= step]
        found = hook.next_step(step)
        assert found == later[0] if later else found > end


@pytest.mark.parametrize(
    "wrong",
    [{"interval": 0}, {"interval": 1, "start": -1}, {"interval": 1, "modify_each": 0}],
)
def test_an_interval_that_makes_no_sense_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be at least"):
        IntervalHook([], **wrong)


def test_an_interval_counts_the_steps_of_the_run_only() -> None:
    iterator: Any = PyHookedModelIterator({}, ".", None, {})  # type: ignore[abstract]
    IntervalHook([], 1, get_step=iterator.get_global_step)
    with pytest.raises(ValueError, match="get_step is not an iterator's get_global_step"):
        IntervalHook([], 1, get_step=lambda: 3)


def test_an_interval_calls_its_hooks_at_its_steps_alone(tmp_path: Path) -> None:
    recorder, after = Recorder(), AfterSteps()
    run_keras(tmp_path, [IntervalHook([recorder, after], 4, start=1, stop=8)])
    steps = [call for call in recorder.calls if "step" in call]
    assert steps == ["before_step 1", "after_step 2", "before_step 5", "after_step 6"]
    assert after.seen == [2, 6]
    assert len(recorder.calls) == len(steps) + 6  # of training and epochs, it is told all


def test_a_resumed_run_has_the_intervals_of_one_that_was_not_interrupted(tmp_path: Path) -> None:
    straight, first, second = AfterSteps(), AfterSteps(), AfterSteps()
    run_iterator(tmp_path / "straight", [IntervalHook([straight], 1, max_interval=4)])
    with pytest.raises(SystemExit):
        run_iterator(tmp_path / "resumed", [IntervalHook([first], 1, max_interval=4), StopAt(4)])
    run_iterator(tmp_path / "resumed", [IntervalHook([second], 1, max_interval=4)])
    assert straight.seen == [1, 3, 5, 9]
    assert first.seen + second.seen == straight.seen


def test_the_state_of_hooks_within_an_interval_is_committed(tmp_path: Path) -> None:
    class Counts(Hook):
        def __init__(self) -> None:
            self.count = 0

        def after_step(self, global_step: int, last_results: Any) -> None:
            self.count += 1

        def get_state(self) -> dict[str, Any]:
            return {"count": self.count}

        def set_state(self, state: Mapping[str, Any]) -> None:
            self.count = state["count"]

    with pytest.raises(SystemExit):
        run_iterator(tmp_path, [IntervalHook([AfterSteps(), Counts()], 2), StopAt(7)])
    counts = Counts()
    run_iterator(tmp_path, [IntervalHook([AfterSteps(), counts], 2)])
    assert counts.count == 5


def test_intervals_that_look_after_steps_leave_them_grouped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    run_steps = Steps.run

    def counted(self: Steps, epoch: int, step: int, *arguments: Any) -> Any:
        call = run_steps(self, epoch, step, *arguments)
        calls.append(call.step - step)
        return call

    monkeypatch.setattr(Steps, "run", counted)
    monkeypatch.setattr(Steps, "SECONDS_PER_CALL", 100.0)
    after = [AfterSteps() for _ in range(10)]
    hooks = [IntervalHook([hook], 20, stop=70) for hook in after]
    run_keras(tmp_path / "after", hooks, num_steps=100, num_epochs=1)
    assert [hook.seen for hook in after] == [[1, 21, 41, 61]] * 10
    assert sum(calls) == 100
    assert len(calls) <= 8
    calls.clear()
    before = BeforeSteps()
    hooks.append(IntervalHook([IntervalHook([before], 1)], 50, stop=70))
    run_keras(tmp_path / "before", hooks, num_steps=100, num_epochs=1)
    assert before.seen == [0, 50]
    assert len(calls) <= 12


# ---- LoggingHook ---------------------------------------------------------------------------------


def log_once(folder: Path, global_step: int, **results: Any) -> None:
    hook = LoggingHook(tensorboard=False)
    Hooks([hook]).start(new_run(folder))
    hook.after_step(global_step, {"step_ops": {"log_op": results}})


def test_what_stands_next_to_the_kinds_is_a_scalar(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        log_once(tmp_path, 4, accuracy=np.float32(0.5), scalars={"loss": 2})
    assert "step 3: accuracy 0.5  loss 2" in caplog.text

    class Tensor:  # of PyTorch, which is no array while it has a gradient
        shape, size, item = (), dict, lambda self: 0.25

    with caplog.at_level(logging.INFO):
        log_once(tmp_path, 5, loss=Tensor())
    assert "step 4: loss 0.25" in caplog.text
    with pytest.raises(ValueError, match=r"'histogram' of shape \(2,\); expected numbers"):
        log_once(tmp_path, 4, histogram=np.ones(2))


def test_tiles_are_laid_in_rows() -> None:
    images = np.arange(1, 4, dtype=np.uint8)[:, None, None, None] * np.ones((2, 3, 1), np.uint8)
    grid = tile(images)
    assert grid.dtype == np.uint8
    ones, zeros = np.ones((2, 3)), np.zeros((2, 3))
    assert np.array_equal(grid[..., 0], np.block([[ones, 2 * ones], [3 * ones, zeros]]))
    for number, shape in ((1, (4, 5)), (2, (4, 10)), (5, (8, 15)), (9, (12, 15)), (10, (12, 20))):
        noise = np.random.default_rng(0).random((number, 4, 5, 3))
        grid = tile(noise)
        assert grid.shape == (*shape, 3)
        assert grid.dtype == np.float64
        assert np.array_equal(grid[:4, :5], noise[0])


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (np.array([0, 7, 255], np.uint8), [0, 7, 255]),
        (np.array([0.0, 0.5, 1.0], np.float32), [0, 128, 255]),
        (np.array([-1.0, 0.0, 1.0]), [0, 128, 255]),
        (np.array([0.0, np.nan, 9.0]), [0, 0, 255]),
    ],
)
def test_pixels_of_an_image(image: np.ndarray, expected: list[int], tmp_path: Path) -> None:
    log_once(tmp_path, 5, images={"a/b": tf.constant(image.reshape(1, 3, 1))})
    assert read_png(tmp_path / "train" / "a_b_00000004.png")[..., 0].tolist() == [expected]


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((2, 2)), r"image 'x' has the shape \(2, 2\); expected \(N, H, W, C\)"),
        (np.zeros((4, 4, 2)), r"image 'x' has the shape \(4, 4, 2\)"),
        (np.zeros((4, 4, 1), np.int32), "image 'x' is of int32; expected uint8, or floats"),
    ],
)
def test_what_is_no_image_is_named(image: np.ndarray, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        log_once(tmp_path, 1, images={"x": image})


def read_png(path: Path) -> np.ndarray:
    return tf.io.decode_png(path.read_bytes()).numpy()


def tensorboard_steps(folder: Path) -> dict[str, list[int]]:
    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [event.step for event in events.Tensors(tag)] for tag in events.Tags()["tensors"]}


def test_operations_are_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        run_iterator(
            tmp_path, [IntervalHook([LoggingHook()], 4)], kind=Draws, batch_size=4, num_steps=6
        )
    lines = [record.message for record in caplog.records if record.message.startswith("step ")]
    # Validation begins at example (step * 4) % 10: 0, 1, 2, 3 and 6, 7, 8, 9.
    assert re.fullmatch(
        r"step 0: mean \S+  deep/steps 1  validation/mean 1.5  validation/deep/steps 1", lines[0]
    )
    assert re.fullmatch(
        r"step 4: mean \S+  deep/steps 5  validation/mean 7.5  validation/deep/steps 5", lines[1]
    )
    names = ("curve", "inputs", "validation_curve", "validation_inputs")
    files = sorted(f"{name}{end}.png" for name in names for end in ("_00000000", "_00000004", ""))
    assert sorted(path.name for path in (tmp_path / "train").iterdir()) == files
    grid = read_png(tmp_path / "train" / "validation_inputs_00000004.png")
    assert grid[..., 0].tolist() == [[6, 6, 7, 7]] * 2 + [[8, 8, 9, 9]] * 2
    assert read_png(tmp_path / "train" / "curve_00000004.png").shape[:2] == (150, 150)
    height, width = read_png(tmp_path / "train" / "inputs.png").shape[:2]
    assert width > 1.5 * height, "two steps, side by side"
    tags = {"mean", "deep/steps", "inputs", "curve"}
    expected = {prefix + tag: [0, 4] for tag in tags for prefix in ("", "validation/")}
    assert tensorboard_steps(tmp_path / "tb") == expected


def test_operations_are_logged_by_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        hook = LoggingHook(["train/log_op"], tensorboard=False)
        run_iterator(tmp_path, [hook], kind=Draws, num_steps=1)
    assert re.search(r"step 0: mean \S+  deep/steps 1$", caplog.text, re.MULTILINE)
    assert not (tmp_path / "tb").exists()


def test_what_is_logged_changes_no_position(tmp_path: Path) -> None:
    class Looks(Draws):
        def step_op(self, model: Total, **batch: Any) -> Mapping[str, Any]:
            split, ops = self.get_split(), super().step_op(model, **batch)

            def log_op() -> dict[str, Any]:
                seen.append((split, self.get_global_step()))
                return {}

            return {**ops, "log_op": log_op}

    seen: list[tuple[str, int]] = []
    run_iterator(tmp_path, [LoggingHook()], kind=Looks, num_steps=2)
    assert seen == [("train", 1), ("validation", 1), ("train", 2), ("validation", 2)]


@pytest.mark.parametrize("run", [run_keras, run_iterator])
def test_without_operations_the_figures_are_logged(
    run: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        run(tmp_path, [IntervalHook([LoggingHook()], 4)])
    assert len(re.findall(r"step [048]: loss \S+$", caplog.text, re.MULTILINE)) == 3
    assert tensorboard_steps(tmp_path / "tb") == {"loss": [0, 4, 8]}
    assert not (tmp_path / "train").exists()


def test_figures_of_pyplot_are_closed(tmp_path: Path) -> None:
    from matplotlib import pyplot

    figure = pyplot.figure(figsize=(1, 1))
    log_once(tmp_path, 1, figures={"x": figure})
    assert not pyplot.fignum_exists(figure.number)
    assert (tmp_path / "train" / "x_00000000.png").exists()


# ---- KeepCheckpoints -----------------------------------------------------------------------------


class Lists(Adds):
    """Is best after steps 10 and 100."""

    losses = tuple(0.1 if step in (9, 99) else 1.0 + step for step in range(110))


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_the_best_checkpoints_are_kept_across_a_restart(tmp_path: Path) -> None:
    def train(folder: Path, *more: Hook) -> None:
        keep = KeepCheckpoints(10, keep=2, monitor="loss")
        run_iterator(folder, [keep, *more], kind=Lists, batch_size=NUM_EXAMPLES, num_epochs=110)

    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    train(straight)
    assert names_in(straight / "checkpoints") == {"model-10.h5", "model-100.h5"}
    assert read_state(straight / "checkpoints" / "model-100.h5")["global_step"] == 100
    with pytest.raises(SystemExit):
        train(resumed, StopAt(57))
    assert names_in(resumed / "checkpoints") == {"model-10.h5", "model-20.h5"}
    for name in ("model-1.h5", "model-100.h5", "model-10.h5.bak", "my_model-7.h5"):
        (resumed / "checkpoints" / name).write_bytes(b"")
    with pytest.raises(SystemExit):
        train(resumed, StopAt(61))
    mine = {"model-10.h5.bak", "my_model-7.h5"}
    assert names_in(resumed / "checkpoints") == {"model-10.h5", "model-20.h5"} | mine
    train(resumed)
    assert names_in(resumed / "checkpoints") == {"model-10.h5", "model-100.h5"} | mine
    for name in ("model.h5", "checkpoints/model-10.h5", "checkpoints/model-100.h5"):
        assert (resumed / name).read_bytes() == (straight / name).read_bytes(), name


def test_without_a_monitor_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    run_iterator(tmp_path, [KeepCheckpoints(3, keep=2)])
    assert names_in(tmp_path / "checkpoints") == {"model-6.h5", "model-9.h5"}


def test_a_monitor_of_validation_is_that_of_the_epoch_before(tmp_path: Path) -> None:
    keep = KeepCheckpoints(10, keep=2, monitor="val_accuracy")
    run = new_run(tmp_path, results={"accuracy": 1.0})
    Hooks([keep]).start(run)
    kept = []
    for epoch, value in enumerate((None, 0.5, math.nan, 0.7, 0.2), start=1):
        if value is not None:
            run.history.append({"epoch": epoch, "val_accuracy": value})
        keep.after_step(10 * epoch, {})
        assert run.keep_as == f"model-{10 * epoch}.h5"
        kept.append(([step for step, _ in keep.kept], list(run.discard)))
    assert kept == [
        ([10], []),
        ([10, 20], []),
        ([20, 30], ["model-10.h5"]),
        ([20, 40], ["model-30.h5"]),
        ([20, 40], ["model-50.h5"]),
    ]


def test_a_list_of_another_run_does_not_count(tmp_path: Path) -> None:
    keep = KeepCheckpoints(10, keep=2)
    Hooks([keep]).start(new_run(tmp_path))
    keep.set_state({"kept": [[10, None], [20, None]]})
    assert keep.kept == []


def test_a_monitor_that_checkpoints_cannot_have_is_named(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"KeepCheckpoints failed .*'los'; there are loss"):
        run_iterator(tmp_path, [KeepCheckpoints(1, monitor="los", monitor_mode="min")])


# ---- EarlyStopping and the others ----------------------------------------------------------------


class TurnsNaN(Adds):
    """Has a loss that is no number in the second epoch."""

    losses = (1.0,) * 5 + (math.nan,) * 50


@pytest.mark.parametrize("stop_on_nan", [False, True])
def test_a_run_may_end_when_the_monitor_is_no_number(stop_on_nan: bool, tmp_path: Path) -> None:
    stopping = EarlyStopping(patience=3, stop_on_nan=stop_on_nan)
    changes: dict[str, Any] = {"num_epochs": 9, "monitor": "loss", "on_nan": "continue"}
    run_iterator(tmp_path, [stopping], kind=TurnsNaN, **changes)
    reason = "loss is nan" if stop_on_nan else "loss has not improved for 3 epochs"
    assert stopping.run.stop_reason == reason
    assert len(stopping.run.history) == (2 if stop_on_nan else 4)


def test_early_stopping_may_have_a_monitor_of_its_own() -> None:
    stopping = EarlyStopping(2, monitor="val_accuracy")
    run = new_run(monitor="loss")
    stopping.before_training(run)
    for epoch, value in enumerate((0.5, 0.6, 0.6, 0.1)):
        assert run.stop_reason is None
        row = {"epoch": epoch, "step": epoch + 1, "loss": 1.0 - epoch, "val_accuracy": value}
        run.history.append(row)
        run.best_epoch = epoch
        stopping.after_epoch(epoch)
    assert run.stop_reason == "val_accuracy has not improved for 2 epochs"
    run.history.append({"epoch": 4})
    with pytest.raises(ValueError, match="monitor is 'val_accuracy'; the history has epoch"):
        stopping.after_epoch(4)


class Silent(Adds):
    """Tells no figures."""

    def figures(self, results: Any) -> dict[str, float]:
        return {}


class Accurate(Adds):
    """Tells of no loss."""

    def figures(self, results: Any) -> dict[str, float]:
        return {"accuracy": 0.5}


def test_the_table_of_epochs_is_aligned_and_fits_a_narrow_terminal(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Many(Adds):
        """Tells of more metrics than fit."""

        def figures(self, results: Any) -> dict[str, float]:
            return {f"a_metric_{number}": 10.0**-number for number in range(12)}

    with caplog.at_level(logging.INFO):
        run_iterator(tmp_path, [EpochLog()], kind=Many)
    head, *rows = [m for m in caplog.messages if "a_metric_0" in m or m.startswith("epoch")]
    assert len(rows) == 2 and head.endswith("a_metric_4")
    assert all(len(line) <= 80 for line in (head, *rows))
    assert all(row[: len(head)].endswith(" 0.0001") for row in rows)


@pytest.mark.parametrize("kind", [Silent, Accurate])
def test_the_usual_hooks_need_neither_loss_nor_rate_nor_monitor(
    kind: type[Adds], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    usual = [Progress(None), EpochLog(), LearningCurve(), TensorBoard(), EarlyStopping(1)]
    config: dict[str, Any] = {
        "tensorboard": True,
        "start_log_freq": 1,
        "log_freq": 2,
        "ckpt_freq": 4,
    }
    config |= {"ckpt_keep": 1, "monitor": None, "monitor_mode": "auto"}
    with caplog.at_level(logging.INFO):
        run_iterator(tmp_path, [*usual, *of_iterators(config, None, None)], kind=kind)
    assert "epoch 2/2" in caplog.text
    assert len((tmp_path / "timing.csv").read_text().splitlines()) == 3
    assert names_in(tmp_path / "checkpoints") == {"model-8.h5"}
    has_figures = kind is Accurate
    assert (tmp_path / "learning_curve.png").exists() == has_figures
    tags = {"epoch_accuracy": [1, 2], "accuracy": [0, 2, 4, 6, 8]} if has_figures else {}
    assert tensorboard_steps(tmp_path / "tb") == tags
    assert not of_iterators(config | {"ckpt_freq": None}, None, None)[1:]


def test_the_curve_of_a_short_run_is_drawn_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[int] = []

    def draw(root: Path, history: Sequence[Any], best_epoch: int | None) -> None:
        drawn.append(len(history))

    monkeypatch.setattr(progress.figures, "draw_learning_curve", draw)
    run_iterator(tmp_path / "short", [LearningCurve()])
    assert drawn == [2]
    monkeypatch.setattr(LearningCurve, "SECONDS_BETWEEN", -1)
    run_iterator(tmp_path / "long", [LearningCurve()])
    assert drawn == [2, 1, 2, 2]
