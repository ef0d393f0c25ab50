"""docs/trackers.md keeps its word: each recipe, pasted, tracks a run that is killed and continued.

The trackers are installed for these tests alone, beside the environment. Nothing is sent anywhere.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import pytest
from conftest import run
from test_docs import code_blocks
from test_docs import words_of_commands as commands_of

from engine.runs.results import read_history

pytestmark = pytest.mark.slow

REQUIREMENTS = Path(__file__).with_name("requirements-trackers.txt")
SMALL = ("--n_filters=4", "--n_layers=1", "--num_epochs=3")
NUM_STEPS = 40  # in an epoch

# The first attempt is killed at the worst instant: the trackers have been told of the second epoch,
# and it is not committed. In the second one, MLflow cannot be reached as the third epoch ends.
TROUBLE = """
import os
import signal

import mlflow

from engine.hooks import Hook

log_metrics = mlflow.log_metrics


def refuse(*arguments, **keywords):
    raise mlflow.MlflowException("there is no answer")


class Trouble(Hook):
    def before_epoch(self, epoch):
        if epoch == 2:
            mlflow.log_metrics = refuse

    def after_epoch(self, epoch):
        mlflow.log_metrics = log_metrics
        if epoch == 1 and "KILL" in os.environ:
            os.kill(os.getpid(), signal.SIGKILL)
"""

# Prints all that MLflow's own client finds.
READ_MLFLOW = """
import json

from mlflow import MlflowClient

client = MlflowClient()
(experiment,) = [e for e in client.search_experiments() if e.name != "Default"]
runs = [
    {
        "experiment": experiment.name,
        "name": found.info.run_name,
        "status": found.info.status,
        "params": found.data.params,
        "metrics": {
            name: [(m.step, m.value) for m in client.get_metric_history(found.info.run_id, name)]
            for name in found.data.metrics
        },
    }
    for found in client.search_runs([experiment.experiment_id])
]
print(json.dumps(runs))
"""

# Prints the records of .wandb files by their kind. Such a file has a header of 7 bytes and blocks
# of 32 KiB; a record lies there in one piece (1), or in a first (2), middle (3) and last one (4),
# each behind its checksum, length and kind.
READ_WANDB = """
import json
import struct
import sys
from pathlib import Path

from google.protobuf.json_format import MessageToDict
from wandb.proto.wandb_internal_pb2 import Record

for name in sys.argv[1:]:
    content, position, record = Path(name).read_bytes(), 7, b""
    while position + 7 <= len(content):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", content, position)
        record += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            print(json.dumps(MessageToDict(Record.FromString(record))))
            record = b""
"""


@pytest.fixture(scope="session")
def trackers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to import MLflow and W&B from; what they share with the environment stays there."""
    folder = tmp_path_factory.mktemp("trackers")
    options = ("--quiet", "--no-deps", "--target", folder, "-r", REQUIREMENTS)
    if shutil.which("uv"):
        run("uv", "pip", "install", "--python", sys.executable, *options)
    else:
        run(sys.executable, "-m", "pip", "install", "--disable-pip-version-check", *options)
    return folder


@dataclass
class Tracked:
    """A run by both recipes, killed once and continued, and one that no tracker saw."""

    lab: Path
    environment: dict[str, str]
    folder: Path
    untracked: Path

    def read(self, script: str, *arguments: object) -> list[Any]:
        """Run a script that prints lines of JSON, and return what they say."""
        words = (sys.executable, "-c", script, *arguments)
        done = run(*words, cwd=self.lab, env=self.environment)
        return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def lab(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project into which both hooks of docs/trackers.md were pasted, under the names there."""
    copy = tmp_path_factory.mktemp("tracked") / "my-research"
    shutil.copytree(project, copy, symlinks=True)
    text = (copy / "docs" / "trackers.md").read_text()
    names = re.findall(r"^`(src/\w+\.py)`:$", text, re.MULTILINE)
    for name, code in zip(names, code_blocks(text, "python"), strict=True):
        (copy / name).write_text(code)
    (copy / "src" / "trouble.py").write_text(TROUBLE)
    return copy


@pytest.fixture(scope="module")
def tracked(lab: Path, trackers: Path, tmp_path_factory: pytest.TempPathFactory) -> Tracked:
    """The page's commands, with both hooks in one run, and one that makes trouble."""
    text = (lab / "docs" / "trackers.md").read_text()
    # What is imported by four processes is compiled by the first of them.
    forbids = "PYTHONDONTWRITEBYTECODE"
    environment = {key: value for key, value in os.environ.items() if key != forbids}
    environment |= {"PYTHONPATH": str(trackers), "HOME": str(tmp_path_factory.mktemp("home"))}
    for line in "".join(code_blocks(text, "")).splitlines():
        if line.startswith("export "):
            environment |= dict(word.split("=", 1) for word in shlex.split(line)[1:])
    recipes = [command for command in commands_of(text) if "--hooks=" in command[-1]]
    hooks = [command[-1].removeprefix("--hooks=[").removesuffix("]") for command in recipes]
    assert len(hooks) == 2
    (words,) = {tuple(command[1:-1]) for command in recipes}
    command = (sys.executable, *words, *SMALL)
    all_hooks = f"--hooks=[{', '.join(hooks)}, {{class: src.trouble.Trouble}}]"
    killed = run(*command, all_hooks, cwd=lab, env=environment | {"KILL": "1"}, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    continued = run(*command, all_hooks, cwd=lab, env=environment)
    assert "MLflow is told of epoch 3 later: there is no answer" in continued.stderr
    folder = lab / words[-1]
    untracked = folder.with_name("untracked")
    run(*command[:-4], untracked, *SMALL, cwd=lab)
    return Tracked(lab, environment, folder, untracked)


def content_of(path: Path) -> dict[str, Any]:
    """Return what a commit holds by name, without the fingerprint."""
    content: dict[str, Any] = {}

    def add(name: str, item: h5py.Group | h5py.Dataset) -> None:
        content[name] = item[()].tobytes() if isinstance(item, h5py.Dataset) else None
        content.update({f"{name}@{key}": str(value) for key, value in item.attrs.items()})

    with h5py.File(path) as file:
        content.update({f"@{key}": str(value) for key, value in file.attrs.items()})
        file.visititems(add)
        state = json.loads(file["training_state/state"][()])
    return content | {"training_state/state": state | {"fingerprint": None}}


def test_the_training_is_the_same_with_trackers_and_without(tracked: Tracked) -> None:
    attempts = json.loads((tracked.folder / "meta.json").read_text())["attempts"]
    assert [attempt["exit_status"] for attempt in attempts] == ["killed", 0]
    assert attempts[1]["from"]["epoch"] == 1, "the second epoch had been sent and not committed"
    name = "history.csv"
    assert (tracked.folder / name).read_bytes() == (tracked.untracked / name).read_bytes()
    for name in ("model.h5", "model_best.h5"):
        content = content_of(tracked.folder / name)
        assert len(content) > 20
        assert content == content_of(tracked.untracked / name), name


def test_mlflow_has_one_run_with_each_epoch_once(tracked: Tracked) -> None:
    ((mlflow_run,),) = tracked.read(READ_MLFLOW)
    settings = ("experiment", "name", "status")
    expected = [tracked.environment["MLFLOW_EXPERIMENT_NAME"], tracked.folder.name, "FINISHED"]
    assert [mlflow_run[key] for key in settings] == expected
    config = json.loads((tracked.folder / "config.json").read_text())
    assert mlflow_run["params"] == {key: str(value) for key, value in config.items()}
    rows = read_history(tracked.folder)
    assert len(rows) == 3
    assert set(mlflow_run["metrics"]) == set(rows[0])
    for name, values in mlflow_run["metrics"].items():
        assert [step for step, _ in values] == [0, 1, 2], name
        assert [value for _, value in values] == pytest.approx([row[name] for row in rows]), name


def test_wandb_has_one_id_and_the_whole_history_at_the_last_attempt(tracked: Tracked) -> None:
    folder = tracked.folder / "wandb"
    attempts = sorted(folder.glob("offline-run-*"))
    assert len(attempts) == 2
    assert (folder / "latest-run").resolve() == attempts[-1].resolve()
    (identifier,) = {attempt.name.split("-")[-1] for attempt in attempts}
    records = tracked.read(READ_WANDB, attempts[-1] / f"run-{identifier}.wandb")
    (started,) = [record["run"] for record in records if "run" in record]
    assert started["runId"] == identifier
    assert started["displayName"] == tracked.folder.name
    assert started["project"] == tracked.environment["WANDB_PROJECT"]
    updates = started["config"]["update"]
    config = {update["key"]: json.loads(update["valueJson"]) for update in updates}
    assert json.loads((tracked.folder / "config.json").read_text()).items() <= config.items()
    sent = [
        {item["nestedKey"][0]: json.loads(item["valueJson"]) for item in record["history"]["item"]}
        for record in records
        if "history" in record
    ]
    rows = read_history(tracked.folder)
    assert [row["_step"] for row in sent] == [NUM_STEPS, 2 * NUM_STEPS, 3 * NUM_STEPS]
    for row, expected in zip(sent, rows, strict=True):
        assert {key: row[key] for key in expected} == pytest.approx(expected)
    assert [record for record in records if "exit" in record], "the run was finished"


def test_what_the_page_says_to_paste_and_type_is_in_order(lab: Path) -> None:
    text = (lab / "docs" / "trackers.md").read_text()
    files = re.findall(r"src/\w+_hook\.py", text)
    run(sys.executable, "-m", "ruff", "check", "--no-cache", *files, cwd=lab)
    run(sys.executable, "-m", "ruff", "format", "--no-cache", "--check", *files, cwd=lab)
    commands = commands_of(text)
    assert len(commands) == 2
    for _, *words in commands:
        run(sys.executable, *words[:2], "results/other", *words[3:], "--dry_run", cwd=lab)
