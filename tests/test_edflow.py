"""What somebody types who comes from EDflow: each row of the README's table, with a small package.

A command takes seconds to import TensorFlow, so tests share runs.
"""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from conftest import files_below, run

pytestmark = pytest.mark.slow

Done = subprocess.CompletedProcess[str]
Notes = list[dict[str, Any]]

# What an EDflow user has in a package: dataset, model, iterator, hooks, callbacks, configs.
PACKAGE = {
    "__init__.py": "",
    "data.py": '''
import numpy as np

from engine.iterators.datasets import DatasetMixin


class Line(DatasetMixin):
    """Points near a line."""

    def __init__(self, config):
        self.data_config = config["data"]

    def __len__(self):
        return self.data_config["n_examples"]

    def get_example(self, index):
        x = np.array([index / len(self), 1.0], np.float32)
        drawn = np.float32(self.prng.uniform(0.0, 0.1))
        return {"x": x, "drawn": drawn, "y": self.data_config["scale"] * x[:1] + drawn}
''',
    "record.py": '''
import json
import os


def note(**what):
    """Append a line to the file that the test reads."""
    with open(os.environ["RECORD"], "a") as file:
        file.write(json.dumps(what) + "\\n")
''',
    "model.py": """
import keras


def build(config):
    x = keras.Input((2,), name="x")
    hidden = keras.layers.Dense(config["width"], name="dense_1")(x)
    return keras.Model(x, keras.layers.Dense(1, name="dense_2")(hidden))
""",
    "iterator.py": '''
import keras
import numpy as np

from engine.hooks import Hook
from engine.iterators import TFBaseTrainer
from your_model.evaluation import count
from your_model.record import note


class Trainer(TFBaseTrainer):
    callbacks = {"eval_op": {"own": count}}

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.hooks.append(Seen("iterator"))

    def make_loss_ops(self, model, **batch):
        assert set(batch) == {"x", "drawn", "y", "index_"}, set(batch)
        return {"dense": keras.ops.mean((model(batch["x"]) - batch["y"]) ** 2)}

    def initialize(self, checkpoint_path=None):
        examples = self.get_fixed_examples("train")["index_"].tolist()
        found = checkpoint_path and checkpoint_path.rpartition("/")[2]
        note(kind="initialize", fixed_examples=examples, test_mode=self.test_mode, found=found)

    def eval_op(self, model, **batch):
        outputs = self.outputs(model, **batch)["outputs"]
        return {"outputs": outputs, "labels": {"test_mode": outputs[:, 0] * 0 + self.test_mode}}


class Seen(Hook):
    """Notes what it is called with."""

    def __init__(self, name="loop"):
        self.name = name

    def before_step(self, global_step, fetches, feeds, batch):
        weights = self.run.model.get_weights() if self.name == "loop" else []
        optimizers = getattr(self.run.iterator, "optimizers", {}).values()
        note(
            kind="before", of=self.name, step=global_step, drawn=batch["drawn"].tolist(),
            index=batch["index_"].tolist(), weights=[w.tolist() for w in weights],
            updates=[int(optimizer.iterations.value) for optimizer in optimizers],
        )

    def after_step(self, global_step, last_results):
        note(kind="after", of=self.name, step=global_step)


class Stopper(Hook):
    """Is the time limit of a cluster: a SIGTERM during the step that STOP_AT names."""

    def before_step(self, global_step, fetches, feeds, batch):
        import os
        import signal

        if global_step == int(os.environ.get("STOP_AT", -1)):
            os.kill(os.getpid(), signal.SIGTERM)
''',
    "plain.py": '''
from engine.iterators import PyHookedModelIterator
from your_model.record import note


class Counting(PyHookedModelIterator):
    """Has no model to train."""

    def step_ops(self):
        return {"train_op": self.train_op}

    def train_op(self, model, **batch):
        note(kind="plain", step=self.get_global_step(), index=batch["index_"].tolist(),
             datasets=sorted(self.datasets), model=type(model).__name__)
        return float(len(batch["x"]))
''',
    "evaluation.py": """
import sys


def count(root, data_in, data_out, config, factor=1):
    return {"scalars": {
        "examples": factor * len(data_out),
        "test_mode": float(data_out.labels["test_mode"].mean()),
        "keras": "keras" in sys.modules,
    }}
""",
    "base.yaml": """
model: your_model.model.build
datasets: {train: your_model.data.Line, validation: your_model.data.Line}
batch_size: 3
data: {n_examples: 12, scale: 2.0}
width: 3
""",
    "small.yaml": "batch_size: 4\ndata: {scale: 1.0}\n",
    "train.yaml": """
iterator: your_model.iterator.Trainer
data: {offset: 1}
copied: "{data/scale}"
copied_too: ${data.scale}
num_steps: 5
num_epochs: 99
lr: 0.01
max_batches_per_epoch: 2
ckpt_freq: 2
ckpt_keep: 1
hook_freq: 2
log_freq: 1
fixed_example_indices: {train: [0, 5]}
hooks: [your_model.iterator.Seen, your_model.iterator.Stopper]
tensorboard: false
""",
    "no_size.yaml": "extend: [train.yaml]\nbatch_size: null\n",
    "no_steps.yaml": "extend: [train.yaml]\nnum_steps: null\nnum_epochs: null\n",
    "eval.yaml": """
eval_callbacks: {count: your_model.evaluation.count}
callback_kwargs: {count: {factor: 10}}
""",
    "plain.yaml": """
iterator: your_model.plain.Counting
dataset: your_model.data.Line
batch_size: 5
num_epochs: 2
n_data_processes: 1
start_log_freq: 3
log_freq: 3
data: {n_examples: 12, scale: 1.0}
tensorboard: false
""",
}
BASES = ("-b", "your_model/base.yaml", "-b", "your_model/small.yaml")
TRAIN = ("your_model/train.yaml", "results/run", *BASES)
STORY = (*TRAIN, "--data/scale", "3", "-p", "note/new", "7", "-e", "your_model/eval.yaml")


class Lab:
    """A project with the package in it, and what its hooks have noted."""

    def __init__(self, project: Path, record: Path) -> None:
        self.project = project
        self.record = record

    def do(self, script: str, *arguments: object, **environment: str) -> Done:
        """Run `python bin/SCRIPT.py ARGUMENTS` in the project."""
        self.record.write_text("")
        command = (sys.executable, f"bin/{script}.py", *arguments)
        variables = os.environ | {"RECORD": str(self.record)} | environment
        return run(*command, cwd=self.project, env=variables, check=False)

    def train(self, *arguments: object, code: int = 0, **environment: str) -> Done:
        done = self.do("train", *arguments, **environment)
        assert done.returncode == code, done.stdout + done.stderr
        return done

    def notes(self) -> Notes:
        """What the last command has noted."""
        return [json.loads(line) for line in self.record.read_text().splitlines()]

    def steps(self) -> list[int]:
        return [note["step"] for note in of_kind(self.notes(), "before", "loop")]

    def config(self, folder: str) -> dict[str, Any]:
        return json.loads((self.project / folder / "config.json").read_text())

    def history(self, folder: str) -> list[dict[str, str]]:
        with open(self.project / folder / "history.csv", newline="") as file:
            return list(csv.DictReader(file))

    def begun_with(self, file: str) -> list[int]:
        """How often the optimizers had updated weights, which were those of a checkpoint."""
        first = of_kind(self.notes(), "before", "loop")[0]
        with h5py.File(self.project / file) as checkpoint:
            layers = [checkpoint["model_weights"][name] for name in ("dense_1", "dense_2")]
            weights = [layer[name][()] for layer in layers for name in layer.attrs["weight_names"]]
        for weight, noted in zip(weights, first["weights"], strict=True):
            np.testing.assert_array_equal(weight, np.array(noted, np.float32))
        return first["updates"]


@pytest.fixture(scope="module")
def lab(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    folder = tmp_path_factory.mktemp("edflow")
    copy = folder / "my-research"
    shutil.copytree(project, copy, symlinks=True)
    (copy / "your_model").mkdir()
    for name, text in PACKAGE.items():
        (copy / "your_model" / name).write_text(text)
    return Lab(copy, folder / "record.jsonl")


Story = tuple[Done, Notes, Done, Notes]


@pytest.fixture(scope="module")
def story(lab: Lab) -> Story:
    """A run that a signal stops at its third step, and that the same command continues.

    Returns both commands, and what was noted in each.
    """
    stopped = lab.train(*STORY, code=75, STOP_AT="2", TF_ENABLE_ONEDNN_OPTS="0")
    noted = lab.notes()
    continued = lab.train(*STORY)
    return stopped, noted, continued, lab.notes()


def of_kind(noted: Notes, kind: str, of: str | None = None) -> Notes:
    return [note for note in noted if note["kind"] == kind and of in (None, note.get("of"))]


def test_a_file_with_an_iterator_is_trained(story: Story, lab: Lab) -> None:
    assert (lab.project / "results/run/model.h5").is_file()
    assert [int(row["step"]) for row in lab.history("results/run")] == [2, 4, 5]
    assert all(float(row["val_loss"]) > 0 for row in lab.history("results/run"))


def test_the_same_command_continues(story: Story, lab: Lab) -> None:
    _, noted, continued, noted_then = story
    assert [note["step"] for note in of_kind(noted, "before", "loop")] == [0, 1, 2]
    assert [note["step"] for note in of_kind(noted_then, "before", "loop")] == [3, 4]
    # It computes as the run began, though the variable is not set any more.
    assert "oneDNN custom operations are on" not in continued.stdout + continued.stderr
    before = files_below(lab.project / "results/run")
    again = lab.train(*STORY)
    assert "already finished" in again.stdout
    assert lab.steps() == []
    assert files_below(lab.project / "results/run") == before


def test_bases_overrides_references_and_new_keys(story: Story, lab: Lab) -> None:
    config = lab.config("results/run")
    assert config["data"] == {"n_examples": 12, "scale": 3.0, "offset": 1}
    assert (config["copied"], config["copied_too"]) == (3.0, 3.0)
    assert (config["batch_size"], config["width"]) == (4, 3)
    assert config["note"] == {"new": 7}


def test_evaluation_follows_training_and_may_come_later(story: Story, lab: Lab) -> None:
    evaluated = lab.project / "results/run/eval"
    first = json.loads((evaluated / "eval-5" / "scalars.json").read_text())
    own = {"examples": 12.0, "test_mode": 1.0, "keras": 1.0}
    assert first == {"own": own, "count": own | {"examples": 120.0}}
    assert "count/examples 120" in story[2].stdout
    assert not (evaluated / "later-5").exists()
    words = ("results/run", "-e", "your_model/eval.yaml", "-n", "later")
    for options, keras in ((), 1.0), (("--callbacks_only",), 0.0):  # callbacks need no Keras
        done = lab.do("evaluate", *words, *options)
        assert done.returncode == 0, done.stderr
        later = json.loads((evaluated / "later-5" / "scalars.json").read_text())
        assert later == {name: each | {"keras": keras} for name, each in first.items()}


def test_hooks_see_steps_as_before(story: Story) -> None:
    _, noted, _, noted_then = story
    every = noted + noted_then
    for of, steps in (("loop", [0, 1, 2, 3, 4]), ("iterator", [0, 2, 4])):  # hook_freq is 2
        before, after = of_kind(every, "before", of), of_kind(every, "after", of)
        assert [note["step"] for note in before] == steps
        assert [note["step"] for note in after] == [step + 1 for step in steps]


def test_keys_of_the_engine_mean_what_they_meant(story: Story, lab: Lab) -> None:
    stopped, noted, continued, noted_then = story
    begun = of_kind([*noted, *noted_then], "initialize")  # twice in training, once to evaluate
    assert [note["found"] for note in begun] == [None, "model.h5", "model.h5"]
    assert [note["test_mode"] for note in begun] == [False, False, True]
    assert [note["fixed_examples"] for note in begun] == [[0, 5]] * 3
    # Two batches of four an epoch, and no example twice in it.
    batches = [note["index"] for note in of_kind(noted + noted_then, "before", "loop")]
    assert [len(batch) for batch in batches] == [4] * 5
    assert all(len({*batches[n], *batches[n + 1]}) == 8 for n in (0, 2))
    assert logged_steps(stopped) + logged_steps(continued) == [0, 1, 2, 3, 4]  # log_freq is 1


def logged_steps(done: Done) -> list[int]:
    return [int(number) for number in re.findall(r"^step (\d+):", done.stdout, re.MULTILINE)]


def test_examples_draw_by_position(story: Story) -> None:
    """A continued process does not draw again what was drawn at the beginning."""
    drawn = [note["drawn"] for note in of_kind(story[1] + story[3], "before", "loop")]
    every = [number for batch in drawn for number in batch]
    assert len(set(every)) == len(every)


def test_checkpoints_are_kept_as_often_as_asked(story: Story, lab: Lab) -> None:
    kept = [path.name for path in (lab.project / "results/run/checkpoints").iterdir()]
    assert kept == ["model-4.h5"]


def test_retrain_takes_weights_alone_into_a_named_folder(story: Story, lab: Lab) -> None:
    words = (*TRAIN, "-c", "results/run", "-r", "-n", "again", "--num_steps=2", "-l", "WARNING")
    done = lab.train(*words)
    assert done.stdout == "", "-l WARNING"
    assert lab.steps() == [0, 1]
    assert lab.begun_with("results/run/model.h5") == [0]
    assert [int(row["step"]) for row in lab.history("results/run_again")] == [2]


def test_a_checkpoint_is_gone_on_from_and_then_the_run_s_own(story: Story, lab: Lab) -> None:
    kept = "results/run/checkpoints/model-4.h5"
    words = (*TRAIN, "-c", kept, "--num_steps=7", "-p", "experiment_name", "longer")
    lab.train(*words, code=75, STOP_AT="5")
    assert lab.steps() == [4, 5]
    assert lab.begun_with(kept) == [4]
    lab.train(*words)
    assert lab.steps() == [6]
    assert [int(row["step"]) for row in lab.history("results/run_longer")] == [2, 4, 6, 7]


def test_one_dataset_and_no_model(lab: Lab) -> None:
    done = lab.train("your_model/plain.yaml", "results/plain")
    assert logged_steps(done) == [0, 3]
    notes = of_kind(lab.notes(), "plain")
    assert [note["step"] for note in notes] == list(range(6))
    assert {tuple(note["datasets"]) for note in notes} == {("train",)}
    assert {note["model"] for note in notes} == {"NoModel"}
    # The last batch of an epoch is smaller, and none wraps around.
    assert [len(note["index"]) for note in notes] == [5, 5, 2] * 2
    for epoch in (notes[:3], notes[3:]):
        assert sorted(index for note in epoch for index in note["index"]) == list(range(12))
    rows = lab.history("results/plain")
    assert [int(row["step"]) for row in rows] == [3, 6]
    assert not [column for column in rows[0] if column.startswith("val_")]


# ---- what cannot be -------------------------------------------------------------------------

REFUSED = "results/refused"
QUICK = {
    "no batch_size": (("your_model/no_size.yaml", REFUSED), "'batch_size' is missing"),
    "no steps": (("your_model/no_steps.yaml", REFUSED), "'num_steps' and 'num_epochs' is missing"),
    "no iterator": (("your_model/base.yaml", REFUSED), "the key 'iterator' is missing"),
    "key that would be new": (("your_model/train.yaml", REFUSED, "--nothing", "3"), "'nothing'"),
    "-r without -c": (("your_model/train.yaml", REFUSED, "-r"), "--checkpoint"),
    "no checkpoint": (("your_model/train.yaml", REFUSED, "-c", "gone.h5"), "gone.h5"),
    "no run": (("your_model/train.yaml", REFUSED, "-c", "your_model"), "your_model/model.h5"),
    "no evaluation file": (("your_model/train.yaml", REFUSED, "-e", "gone.yaml"), "gone.yaml"),
    "no base": (("your_model/train.yaml", REFUSED, "-b", "gone.yaml"), "gone.yaml"),
}


@pytest.fixture
def refused(lab: Lab) -> Callable[[tuple[str, ...], str], bool]:
    """Type a command that is refused in one sentence and touches nothing.

    Returns whether it has imported TensorFlow.
    """

    def type_in(arguments: tuple[str, ...], part: str) -> bool:
        # What a command that was not refused has left is not to be blamed on the next.
        shutil.rmtree(lab.project / REFUSED, ignore_errors=True)
        before = contents_and_times(lab.project)
        settings = {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONPROFILEIMPORTTIME": "1"}
        done = lab.do("train", *arguments, *BASES, **settings)
        assert done.returncode == 2, done.stdout + done.stderr
        # TensorFlow's own notices, where it was imported, are no sentence of ours.
        (sentence,) = [line for line in done.stderr.splitlines() if line.startswith("train.py")]
        assert sentence.startswith("train.py: error: ")
        assert part in sentence
        assert "Traceback" not in done.stdout + done.stderr
        assert contents_and_times(lab.project) == before
        return any(line.endswith("| tensorflow") for line in done.stderr.splitlines())

    return type_in


def contents_and_times(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {
        name: (content, (folder / name).stat().st_mtime_ns)
        for name, content in files_below(folder).items()
    }


@pytest.mark.parametrize(("arguments", "part"), QUICK.values(), ids=QUICK)
def test_a_mistake_is_told_before_tensorflow_is_imported(
    arguments: tuple[str, ...], part: str, refused: Callable[[tuple[str, ...], str], bool]
) -> None:
    assert not refused(arguments, part)


def test_a_mistake_leaves_a_run_as_it_was(
    story: Story, refused: Callable[[tuple[str, ...], str], bool]
) -> None:
    as_it_was = ("your_model/train.yaml", "results/run", "--data/scale=3", "-p", "note/new", "7")
    refused((*as_it_was, "--num_steps=9", "-e", "gone.yaml"), "gone.yaml")
    refused((*as_it_was, "--width=4"), "width: 3 -> 4")


# ---- the table ------------------------------------------------------------------------------

FROM_A_CHECKPOINT = (
    test_retrain_takes_weights_alone_into_a_named_folder,
    test_a_checkpoint_is_gone_on_from_and_then_the_run_s_own,
)
COVERED: dict[str, tuple[Callable[..., None], ...]] = {
    "edflow -t your_model/train.yaml": (test_a_file_with_an_iterator_is_trained,),
    "edflow -b base.yaml -t": (test_bases_overrides_references_and_new_keys,),
    "-e eval.yaml": (test_evaluation_follows_training_and_may_come_later,),
    "-p logs/run": (test_the_same_command_continues,),
    "-c checkpoint, -r": FROM_A_CHECKPOINT,
    "-n name, experiment_name": FROM_A_CHECKPOINT,
    '--a/b 3, "{a/b}" in a file': (
        test_bases_overrides_references_and_new_keys,
        test_a_mistake_is_told_before_tensorflow_is_imported,
    ),
    "edeval -m FOLDER": (test_evaluation_follows_training_and_may_come_later,),
    "dataset, datasets, model, iterator, batch_size, num_steps, num_epochs, test_mode, hook_freq, "
    "ckpt_freq, log_freq, start_log_freq, fixed_example_indices, max_batches_per_epoch, "
    "n_data_processes": (
        test_keys_of_the_engine_mean_what_they_meant,
        test_hooks_see_steps_as_before,
        test_one_dataset_and_no_model,
    ),
    "edflow.iterators.…": (test_a_file_with_an_iterator_is_trained,),
    "edflow.hooks.hook.Hook": (test_hooks_see_steps_as_before,),
    "edflow.data.dataset_mixin": (test_examples_draw_by_position,),
    "eval_hook, eval_pipeline, self.callbacks": (
        test_evaluation_follows_training_and_may_come_later,
    ),
    "logs/…/train/checkpoints": (test_checkpoints_are_kept_as_often_as_asked,),
}


def test_every_row_of_the_table_has_a_test(project: Path) -> None:
    page = (project / "docs" / "iterators.md").read_text()
    section = page.split("## Coming from EDflow")[1].split("\n## ")[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("|")]
    assert rows[0].strip() == "EDflow"
    assert [row.replace("`", "").strip() for row in rows[2:]] == list(COVERED)
