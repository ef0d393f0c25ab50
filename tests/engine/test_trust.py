"""A checkpoint and a run's config are data: what a stranger has written there runs nothing."""

import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from machinery import ROOT, Command
from test_fingerprint import edit_state
from test_training_loop import train

from configs import registry
from engine.checkpoints import callback_state
from engine.checkpoints import file as commit_file
from engine.hooks.keeping import KeepCheckpoints
from engine.iterators import TemplateIterator
from src import experiment
from vegab import UsageError, resolve, trust
from vegab.config import Override

# What a project may have by accident: reached through its own modules, these are not its own.
run_shell = subprocess.check_output
half_done = functools.partial(subprocess.check_output, shell=True)
text = "text"


class Own:
    def act(self) -> None:
        pass


own = Own()


@pytest.fixture
def stranger(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process has read a config of a run folder."""
    monkeypatch.setattr(trust, "_typed", set())
    trust.confine()


@pytest.mark.parametrize(
    "name",
    [
        "subprocess.check_output",
        "builtins.eval",
        "functools.partial",
        "src.data.Path.unlink",
        "engine.hooks.progress:io.open",
        "keras.src.utils.io_utils.sys.exit",
        "test_trust:run_shell",
        "test_trust.half_done",
        "test_trust:text.join",
        "engine.hooks.keeping:Path.unlink",
        "engine.hooks.Hook.__subclasses__",
        "vegab.trust.note_typed",
        "pytest.main",
        "pluggy.PluginManager",
        "this.c",
        "results.run.code.Harm",
        "__main__.main",
    ],
)
@pytest.mark.usefixtures("stranger")
def test_a_name_of_a_stranger_leads_nowhere_else(name: str) -> None:
    with pytest.raises(UsageError, match=r"^callbacks: '.*' leads to .* pyproject\.toml"):
        resolve(name, "callbacks")
    assert "this" not in sys.modules  # what is not known to be inside is not even imported


@pytest.mark.parametrize(
    "name",
    [
        "engine.hooks.KeepCheckpoints",
        "engine.hooks:EpochLog",
        "keras.callbacks.EarlyStopping",
        "keras.optimizers.schedules:CosineDecay",
        "tensorflow.keras.callbacks.CSVLogger",
        "numpy.random.rand",
        "test_trust:own.act",
    ],
)
@pytest.mark.usefixtures("stranger")
def test_a_name_of_a_stranger_leads_into_project_and_dependencies(name: str) -> None:
    assert resolve(name, "callbacks") is not None


@pytest.mark.usefixtures("stranger")
def test_what_is_wrong_with_a_name_is_said_as_ever() -> None:
    with pytest.raises(UsageError, match="did you mean 'KeepCheckpoints'"):
        resolve("engine.hooks.KeepCheckpoint", "hooks")
    with pytest.raises(UsageError, match=r"no module src\.nowhere or src\.examples\.nowhere"):
        resolve("nowhere:Thing", "hooks")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A folder that is a run's, with a config that names what it may not."""
    run = tmp_path / "run"
    run.mkdir()
    config = registry["digits"] | {"model": "subprocess.check_output"}
    (run / "config.json").write_text(json.dumps(config))
    (run / "meta.json").write_text("{}")
    return run


@pytest.mark.parametrize("way", ["itself", "link", "extended", "base", "beside"])
def test_a_config_from_a_run_folder_is_a_stranger_s(
    way: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trust, "_typed", set())
    file, bases = run / "config.json", []
    if way == "link":
        file = tmp_path / "link.json"
        file.symlink_to(run / "config.json")
    elif way == "extended":
        file = tmp_path / "mine.yaml"
        file.write_text("extend: run/config.json\nn_filters: 3\n")
    elif way == "base":
        file, bases = tmp_path / "mine.yaml", [run / "config.json"]
        file.write_text("n_filters: 3\n")
    elif way == "beside":  # what such a file extends is as little typed as itself
        shutil.copy(file, tmp_path / "lure.json")
        file.write_text('{"extend": "../lure.json"}')
    config = registry.resolve(str(file), bases)
    with pytest.raises(UsageError, match="leads to subprocess"):
        experiment.experiment_of(config, None)


def test_what_was_typed_may_name_anything(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trust, "_typed", set())
    copy = tmp_path / "copy.json"
    shutil.copy(run / "config.json", copy)
    assert resolve(registry.resolve(str(copy))["model"], "model") is subprocess.check_output
    overrides = [Override("model", "subprocess.run")]
    config = registry.resolve(str(run / "config.json"), overrides=overrides)
    assert resolve(config["model"], "model") is subprocess.run
    with pytest.raises(UsageError, match="leads to subprocess"):
        resolve("subprocess.Popen", "model")


@pytest.mark.parametrize(
    "words",
    [
        ("bin/evaluate.py", "{run}"),
        ("bin/export.py", "{run}", "{new}"),
        ("bin/train.py", "{run}/config.json", "{new}"),
        ("bin/train.py", "digits", "{new}", "-b", "{run}/config.json", "--num_epochs=1"),
        ("bin/check_resume.py", "{run}/config.json", "--kills=1", "--epochs=1"),
        ("bin/reproduce.py", "{run}"),
    ],
    ids=lambda words: words[0] + " -b" * ("-b" in words),
)
def test_no_command_runs_what_a_run_s_config_names(
    words: tuple[str, ...], hostile: Path, quick_command: Command, tmp_path: Path
) -> None:
    proof, new = hostile / "proof", tmp_path / "new"
    done = quick_command(*(word.format(run=hostile, new=new) for word in words))
    assert done.returncode == 2
    assert "callbacks: 'subprocess.check_output' leads to subprocess" in done.stderr
    assert "Traceback" not in done.stderr
    assert not proof.exists()
    assert not new.exists()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("hostile") / "run"
    words = ("bin/train.py", "digits", str(run), "--n_filters=2", "--n_layers=1", "--num_epochs=1")
    subprocess.run([sys.executable, *words, "--batch_size=126"], cwd=ROOT, check=True)
    return run


@pytest.fixture
def hostile(finished: Path, tmp_path: Path) -> Path:
    """A run whose config.json somebody else has edited."""
    run = tmp_path / "hostile"
    shutil.copytree(finished, run)
    config = json.loads((run / "config.json").read_text())
    entry = {"class": "subprocess.check_output", "args": f"touch {run}/proof", "shell": True}
    (run / "config.json").write_text(json.dumps(config | {"callbacks": [entry]}))
    return run


# ---- checkpoints ---------------------------------------------------------------------------------


class Saves(TemplateIterator):
    def step_op(self, model: Any, **batch: Any) -> dict[str, Any]:
        return {}

    def restore(self, checkpoint_path: str) -> None:
        raise AssertionError("nothing is to be restored")


@pytest.mark.parametrize("name", ["{}/harm", "../harm", "checkpoint/../../harm", 3])
def test_a_checkpoint_writes_no_file_elsewhere(name: Any, tmp_path: Path) -> None:
    iterator = Saves({}, str(tmp_path), None, {})
    name = name.format(tmp_path) if isinstance(name, str) else name
    content = np.zeros(3, np.uint8)
    before = set(Path(tmp_path).rglob("*")), set(Path("/tmp").glob("harm"))
    with pytest.raises(commit_file.DamagedCheckpointError, match="outside of the folder"):
        iterator.set_state({"files": {"checkpoint": content, name: content}})
    assert (set(Path(tmp_path).rglob("*")), set(Path("/tmp").glob("harm"))) == before


@pytest.mark.parametrize(
    "change",
    [
        {"steps": {"iterator": {"files": {"../harm": {commit_file.ARRAY: 0}}}}},
        {"global_step": "/../../harm"},
    ],
    ids=["files", "step"],
)
def test_a_checkpoint_that_would_is_refused_as_it_is_read(
    change: dict[str, Any], config: dict[str, Any], tmp_path: Path
) -> None:
    callback = keras.callbacks.EarlyStopping(patience=9, restore_best_weights=True)
    train(config | {"num_epochs": 1}, tmp_path, callbacks=[callback])  # which has arrays
    edit_state(tmp_path / "model.h5", **change)
    commit_file.verify(tmp_path / "model.h5")
    with pytest.raises(commit_file.DamagedCheckpointError, match="is not a checkpoint of"):
        commit_file.read_state(tmp_path / "model.h5")


def test_the_names_of_kept_checkpoints_are_numbers(tmp_path: Path) -> None:
    hook = KeepCheckpoints(1)
    hook.checkpoints = str(tmp_path)
    with pytest.raises(commit_file.DamagedCheckpointError, match="outside of the folder"):
        hook.set_state({"kept": [["/../../harm", None]]})


def test_the_state_of_a_callback_sets_what_is_listed_alone(tmp_path: Path) -> None:
    callback = keras.callbacks.ModelCheckpoint(str(tmp_path / "mine.keras"))
    state = callback_state.get(callback)
    callback_state.put(callback, state | {"best": 3.0})
    assert callback.best == 3.0
    with pytest.raises(commit_file.DamagedCheckpointError, match="set filepath of ModelCheckpoint"):
        callback_state.put(callback, state | {"best": 4.0, "filepath": os.devnull})
    assert (callback.best, callback.filepath) == (3.0, str(tmp_path / "mine.keras"))
    with pytest.raises(commit_file.DamagedCheckpointError, match="nothing is saved"):
        callback_state.put(keras.callbacks.Callback(), {"on_epoch_end": None})
