"""Variants, Deephub's form of a config: the toy from its records to what is exported."""

import csv
import filecmp
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from interruptions import StopAt
from machinery import Command

from configs import registry
from engine.checkpoints import transfer
from engine.checkpoints.transfer import freeze, warm_start
from engine.devices import gpus as devices
from engine.hooks.base import Hook
from engine.records.build import OneLabel
from engine.records.feeders import Feeder, MemorySamplesFeeder
from engine.records.ranges import NOTED, REFUSED
from src import experiment as experiments
from src.examples import toy
from src.experiment import build
from vegab import UsageError, resolve
from vegab.config import Override

FEEDERS = (
    *("-p", "train.train_feeder.file_patterns", "data/toy/train-*"),
    *("-p", "train.eval_feeder.file_patterns", "data/toy/validation-*"),
)


def variant(**changes: Any) -> dict[str, Any]:
    """The toy with dotted keys changed; `__` stands for the point, and None deletes the key."""
    overrides = [
        Override(key.replace("__", "."), value, adds=True, deletes=value is None)
        for key, value in changes.items()
    ]
    return registry.resolve("toy", overrides=overrides)


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def train(folder: Path, *more: Hook, **changes: Any) -> list[dict[str, str]]:
    """Train a variant, or continue; return the rows of its history."""
    experiment = build(variant(**changes), str(folder))
    folder.mkdir(exist_ok=True)
    experiments.train(experiment, folder, [*experiment.hooks(None), *more])
    return rows_of(folder / "history.csv")


# ---- from the command line -----------------------------------------------------------------------


def test_the_toy_trains_as_the_seed_types_it(
    command: Command, quick_command: Command, tmp_path: Path
) -> None:
    folder = tmp_path / "toy"
    words = ("bin/train.py", "toy", *FEEDERS)
    done = command(*words, "-p", "model.model_dir", folder)
    assert done.returncode == 0, done.stderr
    rows = rows_of(folder / "history.csv")
    assert [row["step"] for row in rows] == [str(step) for step in range(1, 11)]
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"])
    assert float(rows[-1]["val_accuracy"]) == 0, "its classes are not among those of training"

    config = json.loads((folder / "config.json").read_text())
    assert "model_dir" not in config["model"], "the folder is not part of the config"
    assert config["train"]["train_feeder"]["file_patterns"] == "data/toy/train-*"

    again = command(*words, folder)
    assert again.returncode == 0 and "is already finished" in again.stdout
    assert "A larger --train.epochs continues it." in again.stdout
    fed_back = quick_command("bin/train.py", folder / "config.json", tmp_path / "again")
    assert fed_back.returncode == 0, fed_back.stderr
    assert filecmp.cmp(folder / "model.h5", tmp_path / "again" / "model.h5", shallow=False)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("{run}", "-p", "model.model_dir", "elsewhere"), "and model.model_dir is elsewhere"),
        ((), "SAVE_PATH is missing"),
        (("{run}", "-p", "train.epoch", "3"), "unknown key 'train.epoch'; did you mean 'epochs'?"),
        (("{run}", "--modl.type=x"), "unknown key 'modl.type'"),
        (
            ("{run}", "-c", "train.eval_feeder.file_patterns", "data/toy/validation-*"),
            "-c is --checkpoint, and train.eval_feeder.file_patterns is a key of the config: write",
        ),
        (("{run}", "-p", "train.epochs", "12/3"), "train.epochs: 12/3 is not computed"),
        (("{run}", "-p", "train.save_checkpoint_secs", "3"), "give one of them"),
        (("{run}", "-p", "train.epochs", "0"), "train.epochs is 0; it must be at least 1"),
        (("{run}", "--delete", "train.train_feeder"), "train.train_feeder' is missing"),
        (("{run}", "--delete", "train.eval_feeder"), "validation_secs needs a train.eval_feeder"),
    ],
)
def test_a_wrong_command_is_one_sentence(
    quick_command: Command, tmp_path: Path, arguments: tuple[str, ...], sentence: str
) -> None:
    run = tmp_path / "run"
    words = [word.replace("{run}", str(run)) for word in arguments]
    done = quick_command("bin/train.py", "toy", *words)
    assert done.returncode == 2
    assert sentence in done.stderr and done.stderr.count("\n") == 1
    assert not run.exists()


# ---- training ------------------------------------------------------------------------------------


def test_epochs_are_absolute_and_an_interruption_changes_no_bit(tmp_path: Path) -> None:
    changes = {"train__validation_secs": None, "train__save_checkpoint_steps": 1}
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    train(straight, **changes)
    with pytest.raises(SystemExit) as interrupted:
        train(stopped, StopAt(4), **changes)
    assert interrupted.value.code == 75
    rows = train(stopped, **changes)
    assert len(rows) == 10
    before = (stopped / "model.h5").stat().st_mtime_ns
    train(stopped, **changes)
    assert (stopped / "model.h5").stat().st_mtime_ns == before, "a finished run makes no step"
    for name in ("model.h5", "model_best.h5", "history.csv"):
        assert filecmp.cmp(straight / name, stopped / name, shallow=False), name
    assert len(train(stopped, **changes, train__epochs=12)) == 12


def test_batches_cross_the_ends_of_epochs() -> None:
    changes = {"train__train_feeder__batch_size": 6, "train__train_feeder__max_examples": 8}
    steps = build(variant(**changes, train__epochs=5)).settings["num_steps"]
    assert steps == 7, "5 epochs of 8 examples in batches of 6"


def test_validation_comes_at_most_so_often_and_at_the_end(tmp_path: Path) -> None:
    seldom = [row["val_loss"] != "" for row in train(tmp_path / "seldom")]
    assert seldom == [False] * 9 + [True]
    always = train(tmp_path / "always", train__validation_secs=None)
    assert all(row["val_loss"] for row in always)


def test_the_last_figures_of_each_split_are_there_after_a_resume(tmp_path: Path) -> None:
    run, changes = tmp_path / "run", {"train__validation_secs": None}
    with pytest.raises(SystemExit):
        train(run, StopAt(4), **changes)
    (run / "metrics.csv").unlink()

    class Look(Hook):
        def before_epoch(self, epoch: int) -> None:
            if not hasattr(self, "seen"):
                self.seen = (run / "metrics.csv").read_text().splitlines()

    look = Look()
    train(run, look, **changes)
    assert [line.split(",")[:3] for line in look.seen[1:]] == [
        ["train", "3", "3"],
        ["validation", "3", "3"],
    ]
    rows = {row["split"]: row for row in rows_of(run / "metrics.csv")}
    last = rows_of(run / "history.csv")[-1]
    assert rows["train"]["loss"] == last["loss"]
    assert rows["validation"]["loss"] == last["val_loss"]


def test_early_stopping_counts_steps_and_the_best_is_exported(tmp_path: Path) -> None:
    run = tmp_path / "run"
    rows = train(
        run,
        train__validation_secs=None,
        train__early_stopping_metric="loss",
        train__early_stopping_steps_without_decrease=2,
        train__early_stopping_min_steps=6,
        train__exporters={"best": {"type": "BestExporter"}, "last": {"type": "FinalExporter"}},
        model__learning_rate=0.5,  # the validation loss soon rises
    )
    losses = [float(row["val_loss"]) for row in rows]
    best = int(np.argmin(losses))
    assert 6 <= len(rows) == max(best + 1 + 2, 6) < 10
    for name, epoch in (("best", best), ("last", len(rows) - 1)):
        exported = keras.models.load_model(run / "export" / name / "model.keras")
        valid = build(variant()).dataset.valid.batch(0, 0)
        loss = exported.evaluate(*valid, verbose=0, return_dict=True)["loss"]
        assert loss == pytest.approx(losses[epoch], rel=1e-6), name


def test_checkpoints_of_the_best_epochs_are_kept_however_short_the_run(tmp_path: Path) -> None:
    copier = {"class_type": "BestCheckpointCopier", "checkpoints_to_keep": 2}
    changes: dict[str, Any] = {
        "train__validation_secs": None,
        "model__learning_rate": 0.5,
        "train__exporters": {"keep": {**copier, "score_metric": "loss"}},
    }
    with pytest.raises(SystemExit):
        train(tmp_path / "run", StopAt(4), **changes)
    rows = train(tmp_path / "run", **changes)
    best = sorted(rows, key=lambda row: float(row["val_loss"]))[:2]
    kept = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert kept == {f"model-{row['step']}.h5" for row in best}
    train(tmp_path / "short", **changes, train__epochs=1)
    assert (tmp_path / "short" / "checkpoints" / "model-1.h5").exists()


def test_what_an_exporter_writes_has_its_name(tmp_path: Path) -> None:
    feeder = {**variant()["train"]["eval_feeder"], "labels_map": None}
    last = {"type": "FinalExporter", "name": "final_export", "serving_feeder": feeder,
            "serving_input_receiver_fn": "serving_input_receiver_fn"}  # fmt: skip
    train(tmp_path / "run", train__epochs=1, train__exporters={"last": last})
    assert [path.name for path in (tmp_path / "run" / "export").iterdir()] == ["final_export"]


@pytest.mark.parametrize(
    ("entry", "sentence"),
    [
        ({"type": "Other"}, "x is a Other; choose one of BestExporter"),
        ({"type": "FinalExporter", "nane": "a"}, "a FinalExporter has no 'nane'; it takes name"),
        ({"type": "BestExporter", "name": "a/b"}, "give it a single word"),
        ({"type": "BestExporter", "serving_input_receiver_fn": "mine"}, "is 'mine'"),
        ({"type": "BestCheckpointCopier", "checkpoints_to_keep": 0}, "keep is 0"),
        (
            {"type": "BestCheckpointCopier", "score_metric": "los"},
            r"train\.exporters\.x\.score_metric is 'val_los'; choose one of accuracy, loss, val_",
        ),
        ("BestExporter", "expected {type: "),
    ],
)
def test_what_an_exporter_does_not_take_is_refused(entry: Any, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        build(variant(train__exporters={"x": entry})).with_work()


@pytest.mark.parametrize("key", [*NOTED, *REFUSED])
def test_what_deephub_did_and_is_not_done_here_is_said_before_the_first_step(
    key: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config, said = variant(), f"{key.replace('*', 'x')}: this is not done here; "
    if key.startswith("train.exporters.*."):
        exporter = {"type": "BestExporter", key.rpartition(".")[2]: 1}
        config["train"]["exporters"]["x"] = exporter
    else:
        config[key] = {"predict_feeder": {}}
    if key in NOTED:
        build(config, str(tmp_path))
        assert said + NOTED[key] in caplog.text
        assert not list(tmp_path.iterdir())
    else:
        with pytest.raises(UsageError) as refusal:
            build(config)
        assert str(refusal.value) == said + REFUSED[key]


def test_half_of_early_stopping_is_noted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    build(variant(train__early_stopping_metric="loss"), str(tmp_path))
    assert "only one is given; the metric without steps stops nothing" in caplog.text
    with pytest.raises(UsageError, match=r"train\.early_stopping_metric is 'val_los'"):
        build(variant(train__early_stopping_metric="los", monitor="loss")).with_work()


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ("0.1:1:0.01:3:0.001", [0.1, 0.01, 0.01, 0.001]),
        ({"class": "exponential", "initial_learning_rate": 0.1, "decay_steps": 1,
          "decay_rate": 0.5}, [0.1, 0.05, 0.025, 0.0125]),
        pytest.param("0.1:2:0.01", [0.1, 0.1, 0.01, 0.01], marks=pytest.mark.slow),
        pytest.param({"class": "piecewise", "boundaries": [1], "values": [0.1, 0.01]},
            [0.1, 0.1, 0.01, 0.01], marks=pytest.mark.slow),
        pytest.param({"class": "cosine_restarts", "initial_learning_rate": 0.1,
            "first_decay_steps": 2, "t_mul": 1.0}, [0.1, 0.05, 0.1, 0.05], marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_rates_follow_a_schedule_by_name(tmp_path: Path, schedule: Any, rates: list[float]) -> None:
    rows = train(tmp_path / "run", train__lr_schedule=schedule, train__epochs=4)
    assert [float(row["learning_rate"]) for row in rows] == pytest.approx(rates)


# ---- names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "model",
    [
        {"type": "toy:DebugToyModel"},
        {"type": "src.examples.toy.DebugToyModel"},
        {"module_path": "src.examples.toy", "class_type": "DebugToyModel"},
        {"module_path": "deephub.models.registry.toy", "class_type": "DebugToyModel"},
    ],
)
def test_classes_are_found_in_either_spelling(model: dict[str, str]) -> None:
    config = variant() | {"model": {**model, "hidden_neurons": 7}}
    for name in ("train_feeder", "eval_feeder"):
        feeder = config["train"][name]
        del feeder["type"]
        feeder |= {"module_path": "deephub.feeders", "class_type": "TFRecordExamplesFeeder"}
    assert build(config).model.get_layer("hidden").units == 7


def test_names_of_edflow_lead_to_their_homes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from engine.hooks import Hook
    from engine.iterators import DatasetMixin, TFBaseTrainer
    from engine.iterators.build import NoModel

    assert resolve("edflow.iterators.tf_trainer.TFBaseTrainer", "iterator") is TFBaseTrainer
    assert resolve("edflow.data.dataset_mixin:DatasetMixin", "dataset") is DatasetMixin
    assert resolve("edflow.hooks.hook.Hook", "hooks") is Hook
    assert resolve("edflow.util.NoModel", "model") is NoModel
    with pytest.raises(UsageError, match="there is no module"):
        resolve("edflow.nowhere.Nothing", "hooks")
    (tmp_path / "of_edflow.py").write_text("from edflow.hooks.hook import Hook\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UsageError, match=r"No module named 'edflow'; import .* from engine\.itera"):
        resolve("of_edflow.Anything", "hooks")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model__type": "toy:Nothing"}, r"'toy:Nothing': src\.examples\.toy has no 'Nothing'"),
        ({"model__type": "nowhere:Model"}, "no module src.nowhere or src.examples.nowhere"),
        ({"model__hidden": 3}, "unexpected keyword argument 'hidden'"),
        ({"model__type": "json:loads"}, "does not take this config"),
        ({"model__type": "src.models.build_simple_cnn"}, "does not take this config"),
        ({"train__train_feeder__type": "Other"}, r"train\.train_feeder\.type: there is no 'Other'"),
        ({"train__train_feeder__file_patterns": "data/no/*"}, "no file matches"),
        ({"train__train_feeder__batch_size": 11}, r"train\.train_feeder .*batch_size is 11"),
        ({"train__lr_schedule": "fast"}, "fast"),
        ({"train__fine_tune": "nothing"}, "matches no weight"),
        ({"train__fine_tune": "("}, "is not a regular expression"),
        ({"monitor": "beauty"}, "set monitor_mode|Set monitor_mode"),
    ],
)
def test_what_cannot_be_built_is_named(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        build(variant(**changes))


def test_feeders_from_memory_and_without_labels(tmp_path: Path) -> None:
    numbers = [[0.0], [1.0], [2.0], [3.0]]
    feeder = {"type": "MemorySamplesFeeder", "x": {"number": numbers}, "batch_size": 2}
    config = variant(train__epochs=2, train__validation_secs=None)
    config["train"] |= {"train_feeder": {**feeder, "y": [0, 1, 2, 3]}, "eval_feeder": {}}
    experiment = build(config, str(tmp_path))
    experiments.train(experiment, tmp_path, experiment.hooks(None))
    assert (tmp_path / "history.csv").read_text().splitlines()[-1].startswith("2,4,")
    without_labels = OneLabel(MemorySamplesFeeder({"number": numbers}, batch_size=2))
    assert without_labels.batch(0, 0).keys() == {"number"}


class Thrice(Feeder):
    """A feeder of one's own: three examples."""

    def __init__(self, batch_size: int) -> None:
        super().__init__(3, batch_size, drop_remainder=False, shuffle=False, seed=0)

    def digest(self) -> str:
        return "thrice"

    def _examples(self, first: int, last: int) -> Any:
        rows = self._rows(first, last)
        return {"number": rows[:, np.newaxis]}, rows


class KeepsItsPlace(toy.DebugToyModel):
    """A model that is told where its run is, as Deephub's are."""

    def __init__(self, model_dir: str, hidden_neurons: int) -> None:
        super().__init__(hidden_neurons=hidden_neurons)
        PLACES.append(model_dir)


PLACES: list[str] = []


def test_classes_of_ones_own_are_found_by_their_path(tmp_path: Path) -> None:
    config = variant(train__epochs=2)
    config["train"]["train_feeder"] = {"type": f"{__name__}:Thrice", "batch_size": 2}
    model = {"module_path": __name__, "class_type": "KeepsItsPlace", "hidden_neurons": 3}
    experiment = build(config | {"model": model}, str(tmp_path))
    experiments.train(experiment, tmp_path, experiment.hooks(None))
    assert [str(tmp_path)] == PLACES
    assert [row["step"] for row in rows_of(tmp_path / "history.csv")] == ["2", "3"]
    config["train"]["train_feeder"] = {"type": "types:SimpleNamespace"}
    with pytest.raises(UsageError, match=r"SimpleNamespace has no steps_per_epoch; inherit from"):
        build(config)


def test_a_model_that_is_not_compiled_is_refused() -> None:
    config = variant() | {"model": {"type": "keras:Sequential"}}
    with pytest.raises(UsageError, match="gives a Sequential; expected a compiled Keras model"):
        build(config)


# ---- weights of other runs -----------------------------------------------------------------------


def weights_of(model: keras.Model) -> dict[str, Any]:
    return {weight.path: np.array(weight) for weight in model.weights}


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with weights that are no model's first ones."""
    folder = tmp_path_factory.mktemp("other")
    changes = {"train__epochs": 2, "model__learning_rate": 0.1}
    train(folder, **changes)
    for name, content in (("config", variant(**changes)), ("meta", {"attempts": []})):
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("kind", ["", "model.h5", "model.keras", "model.weights.h5"])
def test_a_warm_start_takes_the_weights_that_match(other: Path, kind: str) -> None:
    trained = keras.models.load_model(other / "model.h5")
    trained.save(other / "model.keras")
    trained.save_weights(other / "model.weights.h5")
    checkpoint = other / kind
    model = build(variant()).model
    before = weights_of(model)
    result = warm_start(model, checkpoint, "(?!outputs)")
    assert result.startswith(f"warm start: 2 weights taken from {checkpoint};")
    assert result.endswith("; not outputs/bias, outputs/kernel")
    for name, value in weights_of(model).items():
        is_taken = name.startswith("hidden/")
        np.testing.assert_array_equal(value, (weights_of(trained) if is_taken else before)[name])
        assert (value != before[name]).any() == is_taken


@pytest.mark.parametrize("kind", ["model.h5", "model.keras"])
def test_a_warm_start_that_takes_nothing_or_another_shape_is_refused(
    other: Path, kind: str
) -> None:
    keras.models.load_model(other / "model.h5").save(other / "model.keras")
    model = build(variant(model__hidden_neurons=7)).model
    before = weights_of(model)
    with pytest.raises(ValueError, match="has no weight of the model that 'nothing' matches"):
        warm_start(model, other / kind, "nothing")
    with pytest.raises(ValueError, match="hidden"):
        warm_start(model, other / kind, "hidden")
    with pytest.raises(FileNotFoundError, match="there is no checkpoint"):
        warm_start(model, other / "none.h5")
    for name, value in weights_of(model).items():
        np.testing.assert_array_equal(value, before[name])


def test_a_warm_start_is_told_and_acts_only_without_a_commit(
    quick_command: Command, other: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    words = ("bin/train.py", "toy", run, "--warm_start", other, "--warm_start_vars=.*kernel")
    done = quick_command(*words, "-p", "train.epochs", "1")
    assert done.returncode == 0, done.stderr
    assert "warm start: 2 weights taken from" in done.stdout
    assert "not hidden/bias, outputs/bias" in done.stdout
    again = quick_command(*words, "-p", "train.epochs", "2")
    assert again.returncode == 0, again.stderr
    assert "warm start" not in again.stdout


def test_a_variant_names_its_warm_start(
    quick_command: Command, other: Path, tmp_path: Path
) -> None:
    words = ("bin/train.py", "toy", tmp_path / "run", "-p", "train.epochs", "1")
    named = ("train.warm_start_check_point", other, "train.warm_start_variables_regex", "hidden")
    done = quick_command(*words, "-p", *named[:2], "-p", *named[2:])
    assert done.returncode == 0, done.stderr
    assert "warm start: 2 weights taken from" in done.stdout


def test_a_warm_start_and_fine_tuning_go_together(config: dict[str, Any], tmp_path: Path) -> None:
    experiment = build(config)
    experiments.train(experiment, tmp_path, [])
    tuned = build(config | {"fine_tune": "dense.*"})
    trained = sorted(weight.path for weight in tuned.model.trainable_weights)
    assert trained == ["dense/bias", "dense/kernel"]
    tuned.warm_start(tmp_path, ".*")
    assert weights_of(tuned.model).keys() == weights_of(experiment.model).keys()
    for name, value in weights_of(tuned.model).items():
        np.testing.assert_array_equal(value, weights_of(experiment.model)[name])


def test_fine_tuning_trains_only_what_matches(tmp_path: Path) -> None:
    run, changes = tmp_path / "run", {"train__fine_tune": "outputs/bias", "train__epochs": 3}
    first = weights_of(build(variant(**changes)).model)
    with pytest.raises(SystemExit):
        train(run, StopAt(2), **changes)
    train(run, **changes)
    train(tmp_path / "straight", **changes)
    assert filecmp.cmp(run / "model.h5", tmp_path / "straight" / "model.h5", shallow=False)
    loaded = weights_of(keras.models.load_model(run / "model.h5"))
    assert [name for name in first if (loaded[name] != first[name]).any()] == ["outputs/bias"]


def test_frozen_weights_of_equal_shape_keep_their_places(tmp_path: Path) -> None:
    model = keras.Sequential([keras.Input((3, 1)), keras.layers.LSTM(1, name="cell")])
    before = weights_of(model)
    freeze(model, ".*bias")
    assert [w.path.rpartition("/")[2] for w in model.trainable_weights] == ["bias"]
    with transfer.as_if_none_were_frozen(model):
        assert len(model.trainable_weights) == len(before)
    assert [w.path.rpartition("/")[2] for w in model.trainable_weights] == ["bias"]


# ---- export --------------------------------------------------------------------------------------

SERVE = """
import sys

import numpy as np
import tensorflow as tf

loaded = tf.saved_model.load(sys.argv[1])
numbers = np.arange(4).reshape(4, 1)
plain = loaded.signatures["serving_default"](number=tf.constant(numbers, tf.int64))
examples = [tf.train.Example() for _ in range(4)]
for n, example in enumerate(examples):
    example.features.feature["number"].int64_list.value.append(n)
texts = tf.constant([example.SerializeToString() for example in examples])
served = loaded.signatures["serving_examples"](examples=texts)
np.savez(sys.argv[2], plain=plain["outputs"], served=served["outputs"])
assert not any(name == "src" or name.startswith("src.") for name in sys.modules)
"""


@pytest.mark.slow
def test_an_exported_model_needs_nothing_of_the_project(
    quick_command: Command, other: Path, tmp_path: Path
) -> None:
    done = quick_command("bin/export.py", other, tmp_path / "out", "--checkpoint=latest")
    assert done.returncode == 0, done.stderr
    assert "serving_examples: examples string (None,)" in done.stdout
    script = (sys.executable, "-c", SERVE, tmp_path / "out" / "saved_model", tmp_path / "out.npz")
    subprocess.run(script, check=True, cwd=tmp_path, capture_output=True)
    model = keras.models.load_model(other / "model.h5")
    numbers = tf.constant([[0.0], [1.0], [2.0], [3.0]])
    expected = keras.ops.convert_to_numpy(model({"number": numbers}))
    with np.load(tmp_path / "out.npz") as got:
        np.testing.assert_array_equal(got["plain"], expected)
        np.testing.assert_array_equal(got["served"], expected)
    again = keras.models.load_model(tmp_path / "out" / "model.keras")
    for name, value in weights_of(again).items():
        np.testing.assert_array_equal(value, weights_of(model)[name])

    taken = quick_command("bin/export.py", other, tmp_path / "out")
    assert taken.returncode == 2 and "already exists; give a new folder" in taken.stderr


def test_evaluation_tells_the_figures_of_the_eval_feeder(
    quick_command: Command, other: Path
) -> None:
    done = quick_command("bin/evaluate.py", other, "--checkpoint=latest")
    assert done.returncode == 0, done.stderr
    summary = json.loads((other / "eval" / "validation.json").read_text())
    last = rows_of(other / "history.csv")[-1]
    assert summary["loss"] == pytest.approx(float(last["val_loss"]), rel=1e-6)


# ---- devices -------------------------------------------------------------------------------------


def test_gpus_are_chosen_by_number(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    monkeypatch.setenv(devices.SEVERAL, "0")

    def chosen(gpus: str) -> str:
        devices.choose_gpus(gpus)
        return os.environ["CUDA_VISIBLE_DEVICES"]

    assert chosen("") == "7"
    assert chosen("0") == "0"
    assert chosen("none") == "-1"
    with pytest.raises(UsageError, match="give numbers such as 0"):
        chosen("one")
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho '0, 40, 300'; echo '1, 0, 1'; echo '2, 3, 9000'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert chosen("-1") == "1"
    program.write_text("#!/bin/sh\necho '0, 40, 300'\n")
    with pytest.raises(UsageError, match="no GPU is idle here"):
        chosen("-1")
