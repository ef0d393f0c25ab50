"""Models of many kinds, evaluated and exported by the commands: what is in the folders then."""

import csv
import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import forked
import keras
import numpy as np
import pandas as pd
import pytest
import tensorflow as tf
from keras import layers, ops
from machinery import ROOT, Command
from matplotlib.image import imread

from engine.batches import batch_source
from engine.runs import predictions
from src.data import Dataset

Config = Mapping[str, Any]
NUM_TEST = 40
COLOURS = ("red", "green", "blue")
TEXTS = np.array(["a red one", "green", "so blue, it is"] * 40, dtype=object)


def split(x: Any, y: Any = None, **more: Any) -> Dataset:
    """Return a data set whose last examples are the test set."""
    examples = x if y is None else (x, y)
    train, test = (
        keras.tree.map_structure(lambda array, rows=rows: array[rows], examples)
        for rows in (slice(-NUM_TEST), slice(-NUM_TEST, None))
    )
    return Dataset(train, test, lambda: test, **more)


def noise(*shape: int) -> np.ndarray:
    """Return 120 examples of noise, the same each time."""
    return np.random.default_rng(0).normal(size=(120, *shape)).astype("float32")


def compiled(model: keras.Model, loss: Any, **more: Any) -> keras.Model:
    model.compile("adam", loss, **more)
    return model


# ---- models and data of each kind ----------------------------------------------------------------


def prices(config: Config) -> Dataset:
    x = {"area": noise(2), "rooms": np.arange(120).reshape(-1, 1) % 5}
    return split(x, x["area"].sum(axis=1) * 100 + x["rooms"][:, 0])


def price(config: Config) -> keras.Model:
    inputs = {"area": keras.Input((2,), name="area"), "rooms": keras.Input((1,), name="rooms")}
    both = layers.Concatenate()([layers.Dense(4)(inputs["area"]), inputs["rooms"]])
    return compiled(keras.Model(inputs, layers.Dense(1)(both)), "mse")


def colours(config: Config) -> Dataset:
    labels = np.eye(3, dtype="float32")[np.arange(120) % 3]
    return split(TEXTS, labels, class_names=COLOURS)


def colour(config: Config) -> keras.Model:
    text = keras.Input((), dtype="string")
    words = layers.TextVectorization(output_mode="multi_hot", vocabulary=list(COLOURS))(text)
    loss = keras.losses.CategoricalCrossentropy(from_logits=True)
    return compiled(keras.Model(text, layers.Dense(3)(words)), loss, metrics=["accuracy"])


def tags(config: Config) -> Dataset:
    x = noise(4)
    return split(x, (x[:, :3] > 0).astype("int32"), class_names=COLOURS)


def tagger(config: Config) -> keras.Model:
    dense = layers.Dense(3, "sigmoid")
    return compiled(keras.Sequential([keras.Input((4,)), dense]), "binary_crossentropy")


def scenes(config: Config) -> Dataset:
    x = noise(8, 8, 3)
    return split(x, x.argmax(axis=-1), class_names=COLOURS)


def segmenter(config: Config) -> keras.Model:
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    return compiled(keras.Sequential([keras.Input((8, 8, 3)), layers.Conv2D(3, 1)]), loss)


def unlabelled(config: Config) -> Dataset:
    return split(noise(8, 8, 1))


def unjudged(config: Config) -> Dataset:
    return replace(unlabelled(config), valid=None)


class VAE(keras.Model):
    """Has steps of its own, and no loss."""

    def __init__(self) -> None:
        super().__init__()
        to_code, to_picture = layers.Dense(8), layers.Reshape((8, 8, 1))
        self.encoder = keras.Sequential([keras.Input((8, 8, 1)), layers.Flatten(), to_code])
        self.decoder = keras.Sequential([keras.Input((4,)), layers.Dense(64), to_picture])
        self.seeds = keras.random.SeedGenerator(1)

    def loss_of(self, data: Any) -> Any:
        images = data[0] if isinstance(data, tuple) else data
        mean, log_var = ops.split(self.encoder(images), 2, axis=-1)
        drawn = keras.random.normal(ops.shape(mean), seed=self.seeds)
        error = ops.square(self.decoder(mean + ops.exp(log_var / 2) * drawn) - images)
        return ops.mean(error) - 0.01 * ops.mean(log_var - ops.exp(log_var) - mean**2)

    def train_step(self, data: Any) -> dict[str, Any]:
        with tf.GradientTape() as tape:
            loss = self.loss_of(data)
        self.optimizer.apply(
            tape.gradient(loss, self.trainable_variables), self.trainable_variables
        )
        return {"loss": loss}


class JudgedVAE(VAE):
    """Has a test step and a call, too."""

    def test_step(self, data: Any) -> dict[str, Any]:
        return {"loss": self.loss_of(data)}

    def call(self, images: Any) -> dict[str, Any]:
        mean = self.encoder(images)[:, :4]
        return {"picture": self.decoder(mean), "mean": mean, "spread": ops.std(mean)}


def vae(config: Config) -> keras.Model:
    return compiled(JudgedVAE(), None)


def mute(config: Config) -> keras.Model:
    return compiled(VAE(), None)


class Speller(keras.Model):
    """Predicts words."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = layers.Dense(3)

    def call(self, inputs: Any) -> Any:
        return self.dense(inputs)

    def predict_step(self, data: Any) -> Any:
        return tf.gather(tf.constant(COLOURS), ops.argmax(self(data[0]), axis=-1))


def words(config: Config) -> Dataset:
    x = noise(4)
    return split(x, (x[:, 0] > 0).astype("int64"))


def speller(config: Config) -> keras.Model:
    return compiled(Speller(), keras.losses.SparseCategoricalCrossentropy(from_logits=True))


def pairs(config: Config) -> Dataset:
    x = noise(4, 3)
    labels = {"sign": (x[:, 0, 0] > 0).astype("int32"), "sum": x.sum(axis=(1, 2))}
    test = tf.data.Dataset.from_tensor_slices(({"x": x}, labels)).batch(16)
    return Dataset(({"x": x}, labels), None, lambda: test)


def two_outputs(config: Config) -> keras.Model:
    x = keras.Input((None, 3), name="x")
    shared = layers.GRU(4)
    hidden = layers.Add()([shared(x), shared(x[:, ::-1])])
    outputs = {"sign": layers.Dense(1)(hidden), "sum": layers.Dense(1)(hidden)}
    loss = {"sign": keras.losses.BinaryCrossentropy(from_logits=True), "sum": "mse"}
    return compiled(keras.Model({"x": x}, outputs), loss, metrics={"sum": ["mae"]})


# The data of each model, and what evaluation writes besides test.json.
KINDS = {
    "price": ("prices", "predictions.csv predicted_against_true.png residuals.csv"),
    "colour": ("colours", "predictions.csv confusion_matrix.png per_class.csv"),
    "tagger": ("tags", "predictions.csv per_class.csv"),
    "segmenter": ("scenes", "predictions.npz confusion_matrix.png per_class.csv examples.png"),
    "vae": ("unlabelled", "predictions.csv predictions.npz picture_examples.png"),
    "speller": ("words", "predictions.csv"),
    "two_outputs": (
        "pairs",
        "predictions.csv sign_confusion_matrix.png sign_per_class.csv "
        "sum_predicted_against_true.png sum_residuals.csv",
    ),
    "mute": ("unjudged", ""),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of each kind, all of them evaluated by one command."""
    folder = tmp_path_factory.mktemp("kinds")
    for model, (data, _) in KINDS.items():
        names = (f"--model=test_predictions.{model}", f"--dataset=test_predictions.{data}")
        words = ["bin/train.py", "digits", str(folder / model), *names, "--lr_schedule=null"]
        words += ["--num_epochs=2", "--no_tensorboard", "--monitor=loss"]
        done = forked.run(words, ROOT, os.environ)
        assert done.returncode == 0, done.stderr
    done = forked.run(["bin/evaluate.py", f"{folder}/*", "--checkpoint=latest"], ROOT, os.environ)
    assert done.returncode == 1
    (said,) = [line for line in done.stderr.splitlines() if line.startswith("evaluate.py")]
    assert f"{folder}/mute: model 'test_predictions.mute' cannot be evaluated" in said
    assert "VAE does not have a `call()` method" in said
    assert "Traceback" not in done.stderr
    assert "retracing" not in done.stderr
    return folder


def table_of(run: Path) -> pd.DataFrame:
    return pd.read_csv(run / "eval" / "predictions.csv", index_col="index")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "mute"])
def test_each_kind_has_its_metrics_and_pictures(runs: Path, kind: str) -> None:
    output = runs / kind / "eval"
    assert {path.name for path in output.iterdir()} == {"test.json", *KINDS[kind][1].split()}
    summary = json.loads((output / "test.json").read_text())
    assert summary["num_examples"] == (120 if kind == "two_outputs" else NUM_TEST)
    with open(runs / kind / "history.csv", newline="") as file:
        *_, last = csv.DictReader(file)
    if kind == "vae":  # it draws
        assert summary["loss"] < 3
    elif kind != "two_outputs":  # the test set is that of the validation
        assert summary["loss"] == pytest.approx(float(last["val_loss"]), rel=1e-5)
    for picture in output.glob("*.png"):
        assert imread(picture).std() > 0


def test_numbers_have_residuals(runs: Path) -> None:
    table = table_of(runs / "price")
    np.testing.assert_allclose(table["label"], prices({}).load_test()[1], rtol=1e-6)
    residuals = pd.read_csv(runs / "price" / "eval" / "residuals.csv", index_col=0)
    errors = table["prediction"] - table["label"]
    assert residuals.loc["prediction", "mean"] == pytest.approx(errors.mean(), rel=1e-4)
    assert residuals.loc["prediction", "std"] == pytest.approx(errors.std(), rel=1e-4)


def test_classes_have_names_and_text_stands_in_the_table(runs: Path) -> None:
    table = table_of(runs / "colour")
    assert list(table) == ["input", "label", "prediction", "probability"]
    assert table["input"].tolist() == TEXTS[-NUM_TEST:].tolist()
    assert table["probability"].between(1 / 3, 1).all()
    per_class = pd.read_csv(runs / "colour" / "eval" / "per_class.csv", index_col="label")
    assert tuple(per_class.index) == COLOURS
    for index, name in enumerate(COLOURS):
        found = table[table["label"] == index]
        assert per_class.loc[name, "support"] == len(found)
        hits = (found["prediction"] == index).mean()
        assert per_class.loc[name, "recall"] == pytest.approx(hits)
    assert set(table_of(runs / "speller")["prediction"]) <= set(COLOURS)


def test_several_labels_at_once_are_counted_each_by_itself(runs: Path) -> None:
    table = table_of(runs / "tagger")
    per_class = pd.read_csv(runs / "tagger" / "eval" / "per_class.csv", index_col="label")
    for index, name in enumerate(COLOURS):
        label, prediction = table[f"label_{index}"], table[f"prediction_{index}"]
        assert (prediction == (table[f"probability_{index}"] > 0.5)).all()
        assert per_class.loc[name, "precision"] == pytest.approx(label[prediction == 1].mean())


def test_a_class_for_each_pixel_is_kept_as_arrays(runs: Path) -> None:
    wanted = scenes({}).load_test()[1]
    with np.load(runs / "segmenter" / "eval" / "predictions.npz") as arrays:
        np.testing.assert_array_equal(arrays["label"], wanted)
        hits = (arrays["prediction"] == wanted).mean()
    per_class = pd.read_csv(runs / "segmenter" / "eval" / "per_class.csv")
    assert (per_class["recall"] * per_class["support"]).sum() / wanted.size == pytest.approx(hits)


def test_metrics_of_the_test_set_are_compared_and_drawn(
    command: Command, runs: Path, tmp_path: Path
) -> None:
    compared = command("bin/runs.py", "compare", runs, "--metric=test_loss", "--format=csv")
    for row in csv.DictReader(compared.stdout.splitlines()):
        path = Path(row["run"], "eval", "test.json")
        loss = json.loads(path.read_text())["loss"] if path.exists() else None
        assert row["test_loss"] == ("" if loss is None else str(loss))
    words = ("bin/runs.py", "compare", runs, "--group", "--metric=test_sum_mae", "--format=latex")
    assert r"& test\_sum\_mae \\" in command(*words).stdout
    loss = json.loads((runs / "price" / "eval" / "test.json").read_text())["loss"]
    assert f", test_loss {loss:.4g}" in command("bin/runs.py", "list", runs / "price").stdout
    drawn = tmp_path / "losses.png"
    done = command("bin/plot.py", runs, "--metric=test_loss", "-o", drawn)
    assert done.returncode == 0, done.stderr
    assert f"{runs / 'mute'} has no test_loss" in done.stderr
    assert imread(drawn).std() > 0


FORMS = ["model.keras", "model.weights.h5", "saved_model"]


@pytest.mark.parametrize("kind", ["price", "colour", "two_outputs", "vae", "mute"])
def test_each_form_is_exported_or_named(
    quick_command: Command, runs: Path, tmp_path: Path, kind: str
) -> None:
    output = tmp_path / "out"
    done = quick_command("bin/export.py", runs / kind, output, "--checkpoint=latest")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert sorted(path.name for path in output.iterdir()) == FORMS[: 3 - (kind == "mute")]
    assert ("saved_model (Model VAE does not have" in done.stdout) == (kind == "mute")
    assert "model.onnx (tf2onnx is not installed)" in done.stdout
    if kind in ("vae", "mute"):
        return
    # What is served is what was predicted.
    serve = tf.saved_model.load(str(output / "saved_model")).signatures["serving_default"]
    features = batch_source(globals()[KINDS[kind][0]]({}).load_test(), shuffle=False).batch(0, 0)[0]
    features = features if isinstance(features, dict) else {"inputs": features}
    served = serve(**keras.tree.map_structure(tf.constant, features))
    made = served["sum" if kind == "two_outputs" else "outputs"].numpy()
    made = made.argmax(axis=1) if kind == "colour" else made[:, 0]
    column = table_of(runs / kind)["sum_prediction" if kind == "two_outputs" else "prediction"]
    np.testing.assert_allclose(made, column[: len(made)], rtol=1e-4)


# ---- in this process -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("output", "label", "expected"),
    [
        ([[2.0, -1], [0, 3]], [0, 1], ([0, 1], [0, 1])),
        ([[2.0, -1], [0, 3], [1, 0]], [[0], [-1], [1]], ([0, -1, 1], [0, 1, 0])),
        ([[0.2, 0.8], [0.9, 0.1]], [[0.0, 1], [0, 1]], ([1, 1], [1, 0])),
        ([[0.2, 0.8], [0.9, 0.1]], [[1.0, 1], [0, 1]], ([[1, 1], [0, 1]], [[0, 1], [1, 0]])),
        ([[0.2], [0.7]], [1, 1], ([1, 1], [0, 1])),
        ([-0.2, 0.7], [1, 1], ([1, 1], [0, 1])),
        ([[0.2, 0.8]], [[0.3, 0.7]], None),  # numbers
        ([[0.2, 0.8]], [[17]], None),  # quantiles, or mean and variance
        ([[0.2, 0.8]], [["a"]], None),
    ],
)
def test_classes_are_seen_in_whatever_labels(output: Any, label: Any, expected: Any) -> None:
    output = np.array(output, "float32")
    label = np.array(label, dtype=object if "a" in str(label) else None)
    if label.size == output.size:
        label = label.reshape(output.shape)
    found = predictions.classes_of(output, label, are_logits=False)
    assert (found and (found.label.tolist(), found.prediction.tolist())) == expected
    assert found is None or ((found.probability >= 0).all() and (found.probability <= 1).all())


def test_logits_are_logits_also_where_they_could_be_probabilities() -> None:
    output, label = np.array([0.2, 0.3], "float32"), np.array([1, 0])
    for are_logits, wanted in ((True, [1, 1]), (False, [0, 0])):
        found = predictions.classes_of(output, label, are_logits)
        assert found is not None and found.prediction.tolist() == wanted


class Echo:
    """Predicts its input, and a number that belongs to no example."""

    def predict_on_batch(self, x: Any) -> Any:
        return {"echo": x, "number": np.float32(1)}


def test_what_is_kept_of_a_long_set_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predictions, "MOST_EXAMPLES", 5)
    lengths = iter(range(2, 12))
    batches = [(np.ones((3, next(lengths)), "float32"), np.full(3, 0.5)) for _ in range(4)]
    source = SimpleNamespace(batch=lambda epoch, step: batches[step], steps_per_epoch=4)
    found = predictions.predict(Echo(), source)
    assert found.num_examples == 12
    wanted = [[1, 1, np.nan]] * 3 + [[1, 1, 1]] * 3  # padded to the longest
    np.testing.assert_array_equal(found.outputs["echo"], wanted)
    notes = predictions.write(tmp_path, "title", found, [], are_logits=False)
    assert notes[0].startswith("number has no row for each example")
    assert notes[-1] == "only the first 6 of 12 examples are looked at"
    assert list(pd.read_csv(tmp_path / "predictions.csv")["prediction_2"].isna()) == [
        *[True] * 3,
        *[False] * 3,
    ]
