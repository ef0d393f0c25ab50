"""Evaluation of runs with an iterator: what is stored, read back, and handed to callbacks."""

import functools
import json
import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from machinery import Command

from engine.iterators.datasets import DatasetMixin
from engine.iterators.outputs import (
    OutputWriter,
    StoredOutputs,
    callbacks_of,
    run_callbacks,
    yaml_of_outputs,
)
from vegab import UsageError
from vegab.files import replacing_folder

NUM_EXAMPLES = 10

# The models and iterators, in a module apart: callbacks have to do without Keras.
MODELS = '''
import logging
from pathlib import Path

import keras
import numpy as np

from engine.iterators import DatasetMixin, TemplateIterator, TFBaseEvaluator, TFBaseTrainer


class Scale:
    """Multiplies by the number of training steps that it has seen."""

    def __init__(self, config):
        self.steps = 0

    def get_state(self):
        return {"steps": self.steps}

    def set_state(self, state):
        self.steps = state["steps"]


class Scaling(TemplateIterator):
    checkpoint = None

    def initialize(self, checkpoint_path=None):
        self.checkpoint = checkpoint_path and Path(checkpoint_path).name

    def step_op(self, model, **batch):
        if self.config["test_mode"]:
            assert self.checkpoint.startswith("model") and self.test_mode, self.checkpoint
        assert self.get_split() == "train" or self.test_mode or not self.evaluating
        x = batch["x"]

        def train_op():
            model.steps += 1
            return float(model.steps)

        def eval_op():
            return {
                "scaled": x * model.steps,
                "image": np.tile(x[:, :1, np.newaxis, np.newaxis] / 10, (1, 2, 3, 1)),
                "said": [f"{name} \u00e9\\n" for name in batch["name"]],
                "nested": {"deep": {"double": 2 * x}, "global_step": np.full(
                    len(x), self.get_global_step())},
                "mean": x.mean(axis=1),
                "labels": {"place": batch["index_"], "name_again": batch["name"]},
            }

        return {"train_op": train_op, "eval_op": eval_op}

    evaluating = False


class Classes(DatasetMixin):
    def __init__(self, config):
        pass

    def __len__(self):
        return 4

    def get_example(self, i):
        return {"image": np.eye(4, dtype=np.float32)[i], "class": min(i, 2)}


def get_logger(name):
    return logging.getLogger(name)


class Documented(TemplateIterator):
    """What EDflow's documentation has of evaluation, as it stands there."""

    def step_op(self, model, **kwargs):
        outputs = kwargs["image"]
        loss = np.full(len(outputs), 0.5 + model.steps)

        def train_op():
            model.steps += 1
            np.random.rand()

        def eval_op():
            assert self.test_mode and len(self.dataset) == 4
            return {"outputs": np.array(outputs), "labels": {"loss": np.array(loss)}}

        return {"train_op": train_op, "log_op": lambda: {}, "eval_op": eval_op}

    @property
    def callbacks(self):
        # callbacks to run after validation
        return {"eval_op": {"accuracy": acc_callback}}


def acc_callback(root, data_in, data_out, config):
    from tqdm import trange

    logger = get_logger("acc_callback")
    correct = 0
    seen = 0
    # labels are loaded directly into memory
    loss1 = np.mean(data_out.labels["loss"])
    loss2 = 0.0
    for i in trange(len(data_in), leave=False):
        # data_in is the dataset that was used for evaluation
        labels = data_in[i]["class"]
        # data_out contains all the keys that were specified in the eval_op
        outputs = data_out[i]["outputs"]
        # labels are also available on each example
        loss = data_out[i]["labels_"]["loss"]

        prediction = np.argmax(outputs, axis=0)
        correct += labels == prediction
        loss2 += loss
    logger.info("Loss1: {}".format(loss1))
    logger.info("Loss2: {}".format(loss2 / len(data_in)))
    logger.info("Accuracy: {}".format(correct / len(data_in)))
    return {"scalars": {"accuracy": correct / len(data_in), "loss": loss2 / len(data_in)}}


class NothingToStore(Scaling):
    def step_op(self, model, **batch):
        return {"train_op": super().step_op(model, **batch)["train_op"]}


def network(config):
    x = keras.Input((4,), name="x")
    hidden = keras.layers.Dropout(0.5)(keras.layers.Dense(config["width"], activation="relu")(x))
    return keras.Model(x, keras.layers.Dense(1)(hidden))


class Trainer(TFBaseTrainer):
    def make_loss_ops(self, model, **batch):
        errors = keras.ops.square(model(batch["x"], training=self.is_training) - 1.0)
        return {"dense": keras.ops.mean(errors)}


class Evaluator(TFBaseEvaluator):
    def eval_op(self, model, **batch):
        return {"plus_one": self.outputs(model, **batch)["outputs"] + 1.0}
'''


class Numbers(DatasetMixin):
    """Ten examples; example i is four times i, and has the name "n<i>"."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.offset = config.get("offset", 0)
        self.labels = {"square": np.arange(NUM_EXAMPLES) ** 2, "place": np.zeros(NUM_EXAMPLES)}

    def __len__(self) -> int:
        return NUM_EXAMPLES

    def get_example(self, index: int) -> dict[str, Any]:
        return {"x": np.full(4, index + self.offset, np.float32), "name": f"n{index}"}


def compare(
    root: str, data_in: Any, data_out: StoredOutputs, config: Mapping[str, Any], factor: float = 1
) -> dict[str, Any]:
    """Return figures of stored outputs, as callbacks do."""
    differences = [
        np.abs(example["scaled"] - data_in[index]["x"] * data_out.meta["global_step"]).max()
        for index, example in enumerate(data_out)
    ]
    assert Path(root, "meta.yaml").is_file()
    return {"scalars": {"difference": np.max(differences) * factor}, "number": len(data_out)}


def fail(root: str, data_in: Any, data_out: Any, config: Any) -> None:
    """Do as a callback with a mistake in it does."""
    raise KeyError("no such thing")


def import_nothing(root: str, data_in: Any, data_out: Any, config: Any) -> dict[str, float]:
    """Say whether Keras or TensorFlow was imported."""
    import sys

    return {"heavy": len({"keras", "tensorflow"} & set(sys.modules)), "bad": float("nan")}


CONFIG = {
    "iterator": "evaluation_models:Scaling",
    "model": "evaluation_models:Scale",
    "datasets": {
        "train": "test_evaluation:Numbers",
        "validation": "test_evaluation:Numbers",
    },
    "batch_size": 4,
    "test_batch_size": 3,
    "num_steps": 7,
    "ckpt_freq": 2,
    "ckpt_keep": 9,
    "tensorboard": False,
    "width": 8,
    "eval_callbacks": {"compare": "test_evaluation:compare"},
    "callback_kwargs": {"compare": {"factor": 10}},
}

Do = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the models' module in it."""
    folder = tmp_path_factory.mktemp("evaluation")
    (folder / "evaluation_models.py").write_text(MODELS)
    return folder


@pytest.fixture
def do(quick_command: Command, here: Path, monkeypatch: pytest.MonkeyPatch) -> Do:
    """Run a command that finds the models."""
    monkeypatch.setenv("PYTHONPATH", str(here), prepend=os.pathsep)
    return quick_command


def trained(do: Do, folder: Path, config: Mapping[str, Any]) -> Path:
    """Train a config, once."""
    if not folder.exists():
        file = folder.with_suffix(".json")
        file.write_text(json.dumps(config))
        done = do("bin/train.py", file, folder)
        assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def run(do: Do, here: Path) -> Path:
    """A run of the numbers, which the tests share."""
    return trained(do, here / "run", CONFIG)


@pytest.fixture
def network(do: Do, here: Path) -> Path:
    """A run of a Keras model with dropout."""
    changes = {"iterator": "evaluation_models:Trainer", "model": "evaluation_models.network"}
    return trained(do, here / "network", CONFIG | changes | {"monitor": "val_loss"} | NO_CALLBACKS)


NO_CALLBACKS: dict[str, Any] = {"eval_callbacks": {}, "callback_kwargs": {}}


def test_outputs_are_stored_by_index_and_move_with_the_run(
    do: Do, command: Command, run: Path, here: Path
) -> None:
    done = do("bin/evaluate.py", run)
    assert done.returncode == 0, done.stderr
    output = run / "eval" / "validation-7"
    assert done.stdout.splitlines()[-1] == (
        f"validation, 10 examples, model.h5 of step 7, in {output}:  "
        "compare/difference 0  compare/number 10"
    )
    assert "has no best checkpoint" in done.stdout
    assert "compare: difference 0  number 10" in done.stdout
    assert not list((run / "eval").glob(".*")) + list(run.glob(".evaluating*"))
    assert str(here) not in (output / "meta.yaml").read_text()
    assert json.loads((output / "scalars.json").read_text()) == {
        "compare": {"difference": 0.0, "number": 10.0}
    }

    stored = StoredOutputs(output)
    assert len(stored) == NUM_EXAMPLES
    for index in range(NUM_EXAMPLES):
        example = stored[index]
        x = np.full(4, index, np.float32)
        assert example.pop("index_") == index
        labels = example.pop("labels_")
        assert (labels["place"], labels["square"]) == (index, index**2)
        assert example.pop("said") == f"n{index} é\n"
        assert example.pop("mean") == index
        np.testing.assert_array_equal(example.pop("scaled"), 7 * x)
        np.testing.assert_array_equal(example["nested"]["deep"]["double"], 2 * x)
        assert example.pop("nested")["global_step"] == 7
        assert example.pop("image").shape == (2, 3, 1)
        assert not example
        assert (output / "model_outputs" / "image" / f"{index:06d}.png").is_file()
    assert (output / "model_outputs" / "nested" / "deep" / "double" / "000009.npy").is_file()
    labels = stored.labels
    assert set(labels) == {"place", "name_again", "mean", "nested/global_step", "square"}
    np.testing.assert_array_equal(labels["place"], np.arange(10))  # not the dataset's zeros
    np.testing.assert_array_equal(labels["square"], np.arange(10) ** 2)
    assert labels["name_again"].tolist() == [f"n{index}" for index in range(10)]
    assert {key: stored.meta[key] for key in ("split", "checkpoint", "global_step")} == {
        "split": "validation",
        "checkpoint": "model.h5",
        "global_step": 7,
    }
    assert stored.meta["outputs"] == {
        "scaled": "array",
        "image": "image",
        "said": "text",
        "nested/deep/double": "array",
        "nested/global_step": "number",
        "mean": "number",
    }
    assert stored.meta["config"]["test_mode"] is True

    moved = here / "moved" / "elsewhere"
    shutil.copytree(run, moved)
    for folder in (moved, run):  # where it was, the outputs are still needed
        assert (folder / "eval" / "validation-7").is_dir()
    more = here / "more.yaml"
    more.write_text("eval_callbacks: {light: test_evaluation.import_nothing}\n")
    words = ("bin/evaluate.py", moved, "--callbacks_only", "-e", more, "-n", "validation")
    again = command(*words)  # it imports nothing heavy
    assert again.returncode == 0, again.stderr
    assert json.loads((moved / "eval" / "validation-7" / "scalars.json").read_text()) == {
        "compare": {"difference": 0.0, "number": 10.0},
        "light": {"heavy": 0.0, "bad": None},
    }
    assert "light/heavy 0  light/bad nan" in again.stdout


def test_the_documented_evaluation_runs_after_each_epoch_and_again(do: Do, here: Path) -> None:
    changes = {"iterator": "evaluation_models:Documented", "num_steps": 4, "batch_size": 2}
    data = dict.fromkeys(("train", "validation"), "evaluation_models:Classes")
    run = trained(do, here / "documented", CONFIG | changes | {"datasets": data} | NO_CALLBACKS)

    def scalars(name: str) -> Any:
        return json.loads((run / "eval" / name / "scalars.json").read_text())["accuracy"]

    for epoch, step in enumerate((2, 4)):
        assert scalars(f"epoch-{step}") == {"accuracy": 0.75, "loss": 0.5 + 2 * epoch + 2}
    # Of the latest epoch, the outputs are there; of all, what callbacks have returned.
    assert len(StoredOutputs(run / "eval" / "epoch-4")) == 4
    assert [path.name for path in (run / "eval" / "epoch-2").iterdir()] == ["scalars.json"]

    (run / "eval" / "epoch-4" / "scalars.json").unlink()
    again = do("bin/evaluate.py", run, "--callbacks_only", "-n", "epoch")
    assert again.returncode == 0, again.stderr
    assert "validation, 4 examples, epoch 2 of step 4" in again.stdout
    assert scalars("epoch-4") == {"accuracy": 0.75, "loss": 4.5}
    (here / "clean.yaml").write_text("eval_hook: {clean_after_callbacks: true}\n")
    cleaned = do("bin/evaluate.py", run, "-e", here / "clean.yaml")
    assert cleaned.returncode == 0, cleaned.stderr
    assert [path.name for path in (run / "eval" / "clean-4").iterdir()] == ["scalars.json"]


def test_every_kept_checkpoint_is_evaluated_once(do: Do, run: Path, here: Path) -> None:
    # EDflow's places of callbacks count as well.
    (here / "all.yaml").write_text(
        "eval_all: true\n"
        "eval_hook: {eval_callbacks: {first: test_evaluation:compare}}\n"
        "eval_pipeline: {callbacks: {second: test_evaluation:compare},"
        " callback_kwargs: {second: {factor: 2}}}\n"
    )
    done = do("bin/evaluate.py", run, "-e", here / "all.yaml", "--split=train")
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("train, 10 examples")]
    assert [line.split(",")[2] for line in lines] == [
        " model-2.h5 of step 2",
        " model-4.h5 of step 4",
        " model-6.h5 of step 6",
        " model.h5 of step 7",
    ]
    for step in (2, 4, 6, 7):
        stored = StoredOutputs(run / "eval" / f"all-{step}")
        np.testing.assert_array_equal(stored[3]["scaled"], np.full(4, 3.0 * step))
        scalars = json.loads((stored.folder / "scalars.json").read_text())
        assert list(scalars) == ["first", "second", "compare"]

    given = do("bin/evaluate.py", run, "-e", here / "all.yaml",
               f"--checkpoint={run / 'checkpoints' / 'model-4.h5'}", "-n", "one")  # fmt: skip
    assert given.returncode == 0, given.stderr
    assert [path.name for path in (run / "eval").glob("one-*")] == ["one-4"]


def test_evaluation_is_in_test_mode_unless_the_file_says_otherwise(
    do: Do, network: Path, here: Path
) -> None:
    (here / "trains.yaml").write_text("test_mode: false\n")
    (here / "other.yaml").write_text("iterator: evaluation_models:Evaluator\noffset: 0\n")
    first = do("bin/evaluate.py", network, "--split=train", "-n", "first")
    assert first.returncode == 0, first.stderr
    assert "model_best.h5" in first.stdout
    several = do("bin/evaluate.py", network, "-e", here / "trains.yaml", "-e", here / "other.yaml",
                 "--split=train", "--checkpoint=best")  # fmt: skip
    assert several.returncode == 0, several.stderr
    again = do("bin/evaluate.py", network, "--split=train")
    assert again.returncode == 0, again.stderr

    def outputs(name: str, key: str = "outputs") -> np.ndarray:
        (folder,) = (network / "eval").glob(f"{name}-*")
        return np.stack([example[key] for example in StoredOutputs(folder)])

    assert outputs("first").shape == (10, 1)
    np.testing.assert_array_equal(outputs("first"), outputs("train"))
    assert not np.array_equal(outputs("first"), outputs("trains"))
    np.testing.assert_allclose(outputs("first") + 1, outputs("other", "plus_one"), rtol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoint=nowhere.h5"], "there is no checkpoint nowhere.h5; give a path"),
        (["--split=tests"], "has no split 'tests'; it has train, validation"),
        (["--callbacks_only", "-n", "other"], "no outputs are stored as other"),
        (["-e", "nowhere.yaml"], "cannot read nowhere.yaml"),
        (["-n", "a/b"], "outputs cannot be stored as 'a/b'"),
        (["-e", "{typo}", "-e", "{typo}"], "cannot be stored as 'typo' and 'typo'"),
        (["-e", "{typo}"], "eval_callbacks.compare: 'test_evaluation:compar"),
        (["-e", "{nothing}"], "step_op of NothingToStore returns no eval_op"),
        (["-e", "{arguments}"], "callback_kwargs.compere is for no callback"),
    ],
)
def test_a_refusal_is_one_sentence(
    arguments: list[str], message: str, do: Do, run: Path, here: Path
) -> None:
    files = {
        "typo": "eval_callbacks: {compare: 'test_evaluation:compar'}",
        "nothing": "iterator: evaluation_models:NothingToStore",
        "arguments": "callback_kwargs: {compere: {}}",
    }
    for name, text in files.items():
        (here / f"{name}.yaml").write_text(text)
    paths = {name: here / f"{name}.yaml" for name in files}
    before = sorted(run.rglob("*"))
    done = do("bin/evaluate.py", run, *(word.format(**paths) for word in arguments))
    assert done.returncode == 2, done.stderr
    assert message in done.stderr.strip().splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert set(run.rglob("*")) - set(before) <= {run / "eval"}


def test_the_commit_of_another_model_is_refused_by_names(
    do: Do, run: Path, network: Path, here: Path
) -> None:
    (here / "wider.yaml").write_text("width: 9\n")
    for arguments, message in (
        ((network, "-e", here / "wider.yaml"), "dense/kernel (4, 9)"),
        ((network, f"--checkpoint={run / 'model.h5'}"), "model.h5 does not belong to the model"),
    ):
        done = do("bin/evaluate.py", *arguments)
        assert done.returncode == 2, done.stderr
        assert message in done.stderr.strip().splitlines()[-1]
        assert "Traceback" not in done.stderr


def test_callbacks_of_iterator_and_model_need_an_import_path() -> None:
    config = {**NO_CALLBACKS, "eval_callbacks": {"own": None, "third": "test_evaluation.fail"}}
    model = SimpleNamespace(callbacks={"own": compare, "second": "test_evaluation.compare"})
    callbacks, _ = callbacks_of(config, SimpleNamespace(), model)
    assert callbacks == {"second": compare, "third": fail}
    for other in (lambda *_: None, functools.partial(compare), {"first": compare}):
        with pytest.raises(UsageError, match=r"callbacks\.bad: .* names nothing that could be"):
            callbacks_of(config, SimpleNamespace(callbacks={"eval_op": {"bad": other}}))


def test_a_failing_callback_is_named_and_outputs_stay(do: Do, run: Path, here: Path) -> None:
    (here / "fails.yaml").write_text(
        "eval_callbacks: {compare: null, broken: 'test_evaluation:fail'}\n"
    )
    if not (run / "eval" / "validation-7").is_dir():
        assert do("bin/evaluate.py", run).returncode == 0
    done = do("bin/evaluate.py", run, "-e", here / "fails.yaml", "-n", "validation",
              "--callbacks_only")  # fmt: skip
    assert done.returncode == 1
    assert "callback broken failed: KeyError: 'no such thing'" in done.stderr
    assert len(StoredOutputs(run / "eval" / "validation-7")) == NUM_EXAMPLES


def test_a_run_without_an_iterator_has_no_evaluation_files(command: Command, here: Path) -> None:
    folder = here / "plain"
    folder.mkdir()
    (folder / "config.json").write_text('{"dataset": "digits"}')
    (folder / "meta.json").write_text("{}")
    for arguments in (("-e", "eval.yaml"), ("--callbacks_only",), ("--split=train",)):
        done = command("bin/evaluate.py", folder, *arguments)
        assert done.returncode == 2
        assert "has no iterator" in done.stderr


# ---- in this process -----------------------------------------------------------------------------


def test_each_kind_of_output_is_read_back_as_it_was(tmp_path: Path) -> None:
    images = np.linspace(-1, 1, 5 * 2 * 2 * 3).reshape(5, 2, 2, 3)
    outputs: dict[str, Any] = {
        "image": images,
        "bytes": np.arange(5 * 4, dtype=np.uint8).reshape(5, 2, 2, 1),
        "too_bright": images * np.array([1, 1, 1, 1, 9]).reshape(5, 1, 1, 1),
        "ragged": [np.ones((number, 2)) for number in range(5)],
        "tensor_text": np.array([b"a", "é".encode(), b"", b"d", b"e"], dtype=object),
        "words": np.array([["a", "bc"]] * 5),
        "flags": [True, False, True, False, True],
        "nothing": np.zeros((5, 0)),
    }
    texts = ["a", "bcd", "é", "", "x"]
    writer = OutputWriter(tmp_path)
    for first, size in ((0, 2), (2, 2), (4, 1)):
        part = slice(first, first + size)
        batch = {key: value[part] for key, value in outputs.items()}
        writer.add(batch | {"labels": {"deep": {"text": texts[part]}}}, size)
    writer.add_labels({"short": np.zeros(4), "own": [1, 2, 3, 4, 5], "deep/text": np.zeros(5)})
    meta = writer.finish()
    assert meta["outputs"] == {
        "image": "image",
        "bytes": "image",
        "too_bright": "array",
        "ragged": "array",
        "tensor_text": "text",
        "words": "array",
        "flags": "number",
        "nothing": "array",
    }
    assert meta["labels"] == ["deep/text", "flags", "own"]
    write_meta(tmp_path, meta | {"num_examples": 5})
    stored = StoredOutputs(tmp_path)
    np.testing.assert_array_equal([example["image"] for example in stored], images)
    assert [example["ragged"].shape for example in stored] == [(n, 2) for n in range(5)]
    assert [example["tensor_text"] for example in stored] == ["a", "é", "", "d", "e"]
    assert stored[-1]["words"].tolist() == ["a", "bc"]
    assert stored[1]["nothing"].shape == (0,)
    assert stored.labels["flags"].tolist() == [True, False, True, False, True]
    assert stored.labels["deep/text"].tolist() == ["a", "bcd", "é", "", "x"]
    assert isinstance(stored.labels["own"], np.memmap)

    import matplotlib.image

    shown = matplotlib.image.imread(tmp_path / "model_outputs" / "image" / "000004.png")
    np.testing.assert_allclose(shown * 2 - 1, images[4], atol=1 / 127)
    grey = matplotlib.image.imread(tmp_path / "model_outputs" / "bytes" / "000001.png")
    np.testing.assert_array_equal(np.rint(grey * 255), np.arange(4, 8).reshape(2, 2))


def write_meta(folder: Path, meta: Mapping[str, Any]) -> None:
    with open(folder / "meta.yaml", "w") as file:
        yaml_of_outputs().dump(dict(meta), file)


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        ({"x": np.zeros(3)}, "'x' has 3 rows for 2 examples"),
        ({"x": np.float32(3)}, "'x' is a single value"),
        ({"a": {"..": np.zeros(2)}}, "'a/..' cannot be stored"),
        ({"x": [{1}, {2}]}, "'x' has values that are neither numbers nor text"),
        ({"x": np.zeros((2, 3)), "x/y": np.zeros((2, 3))}, "an output and a dictionary"),
        ({"x": np.zeros(2), "labels": {"x": np.zeros(2)}}, "'x' is a label once and a number"),
        ({"x": np.zeros((2, 3)), "y": np.zeros(2)}, "'y' is missing in some"),
    ],
)
def test_what_cannot_be_stored_is_named(
    outputs: dict[str, Any], message: str, tmp_path: Path
) -> None:
    writer = OutputWriter(tmp_path)
    with pytest.raises(ValueError, match=message.replace(".", "[.]")):
        writer.add(outputs, 2)
        writer.add({key: value for key, value in outputs.items() if key != "y"}, 2)
        writer.finish()


def test_new_commits_are_evaluated_until_the_run_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from engine import checkpoints
    from engine.iterators import evaluation  # it imports Keras, without which callbacks do

    def read_state(path: Path) -> dict[str, Any]:
        return json.loads(path.read_text())

    monkeypatch.setattr(checkpoints, "read_state", read_state)
    monkeypatch.setattr(evaluation, "SECONDS_BETWEEN_LOOKS", 0.05)
    (tmp_path / "config.json").write_text('{"num_steps": 100}')
    status = tmp_path / "meta.json"
    status.write_text('{"status": "running"}')

    def commit(step: int) -> None:
        place = {"global_step": step, "epoch": step, "step": 0, "is_cut": False}
        state = place | {"stop_reason": None}
        (tmp_path / "new").write_text(json.dumps(state))
        (tmp_path / "new").rename(tmp_path / "model.h5")

    def end() -> None:
        commit(4)
        (tmp_path / "new").write_text('{"status": "failed"}')
        (tmp_path / "new").rename(status)

    # What training does while a commit is evaluated, or some time after.
    meanwhile = {1: lambda: commit(2), 2: lambda: commit(2)}
    later = {2: lambda: commit(3), 3: end}
    commit(1)
    steps = []
    for path in evaluation.checkpoints_to_evaluate(
        tmp_path, {"eval_forever": True}, tmp_path / "model.h5"
    ):
        step = read_state(path)["global_step"]
        meanwhile.get(step, lambda: None)()
        assert read_state(path)["global_step"] == step
        steps.append(step)
        if step in later:
            threading.Timer(0.4, later[step]).start()
    assert steps == [1, 2, 3, 4]
    assert not list(tmp_path.glob(".evaluating*"))

    # Training that waits for its evaluation has not ended, but makes no more commits.
    status.write_text('{"status": "running"}')
    commit(100)
    every = evaluation.checkpoints_to_evaluate(
        tmp_path, {"eval_forever": True}, tmp_path / "model.h5"
    )
    assert len(list(every)) == 1


def test_an_older_result_is_replaced_as_a_whole(tmp_path: Path) -> None:
    for content in ("old", "new"):
        with replacing_folder(tmp_path / "target") as partial:
            (partial / content).write_text(content)
    assert [path.name for path in tmp_path.rglob("*")] == ["target", "new"]


def test_callbacks_may_return_numbers_in_many_ways(tmp_path: Path) -> None:
    write_meta(tmp_path, {"num_examples": 0, "outputs": {}, "labels": []})
    results = {
        "mapping": {"a": 1, "b": np.float32(2), "text": "c", "images": {"d": 3}},
        "nested": {"scalars": {"a": {"b": np.array(1.5)}}, "c": 2},
        "nothing": None,
    }
    callbacks = {name: lambda *_, result=result: result for name, result in results.items()}
    scalars = run_callbacks(tmp_path, None, {}, callbacks, {})
    assert scalars == {"mapping": {"a": 1.0, "b": 2.0}, "nested": {"a/b": 1.5, "c": 2.0}}
