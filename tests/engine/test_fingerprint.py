"""A resume that could not be exact is refused, with what differs."""

import hashlib
import importlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import forked
import h5py
import pytest
from machinery import ROOT
from test_training_loop import train

from engine.checkpoints.file import SIGNATURE, USER_BLOCK, read_state
from engine.training import fingerprint, sources
from src.experiment import build
from vegab import UsageError
from vegab.config import nested


@pytest.fixture
def run(config: dict[str, Any], tmp_path: Path) -> Path:
    """A run with a commit that knows its fingerprint."""
    prepared = build(config)
    train(config, tmp_path / "run", fingerprint=prepared.fingerprint)
    return tmp_path / "run"


def edit(run: Path, **changes: Any) -> None:
    """Change the fingerprint in a commit, as if it had been made elsewhere."""
    stored = fingerprint.stored_in(run)
    assert stored is not None
    edit_state(run / "model.h5", fingerprint=stored | changes)


def edit_state(commit: Path, **changes: Any) -> None:
    """Change the state in a commit, and its digest to go with that."""
    with h5py.File(commit, "r+") as file:
        state = json.loads(file["training_state/state"][()]) | changes
        del file["training_state/state"]
        file["training_state/state"] = json.dumps(state)
    content = commit.read_bytes()
    digest = hashlib.sha256(content[USER_BLOCK:]).hexdigest().encode()
    head = (SIGNATURE + digest).ljust(USER_BLOCK, b"\0")
    commit.write_bytes(head + content[USER_BLOCK:])


def test_nothing_differs_in_the_same_place(config: dict[str, Any], run: Path) -> None:
    assert build(config, str(run)).inexact == []


@pytest.mark.parametrize(
    ("changes", "phrase"),
    [
        ({"versions": {"tensorflow": "1.0"}}, "versions tensorflow: 1.0, now "),
        ({"data": "0"}, "the data has changed"),
        ({"code": {"src/models.py": "0"}}, "src/models.py has changed"),
        ({"code": {"engine": "0"}}, "the engine is another version"),
        ({"processor": ["abacus"]}, "processor: abacus, now "),
        ({"devices": ["TPU"]}, "devices: TPU, now CPU"),
    ],
)
def test_what_differs_is_named_and_may_be_accepted(
    changes: dict[str, Any], phrase: str, config: dict[str, Any], run: Path
) -> None:
    edit(run, **changes)
    with pytest.raises(UsageError, match="--resume_inexact") as refusal:
        build(config, str(run))
    assert phrase in str(refusal.value)
    assert phrase in "; ".join(build(config, str(run), resume_inexact=True).inexact)


def test_an_inexact_resume_is_on_record(config: dict[str, Any], run: Path) -> None:
    train(config | {"num_epochs": 3}, run, inexact=["the data has changed"])
    state = read_state(run / "model.h5")
    assert state["inexact"] == [{"global_step": 80, "differs": ["the data has changed"]}]


def test_settings_are_those_of_the_commit(config: dict[str, Any], run: Path) -> None:
    stored = fingerprint.stored_in(str(run))
    assert stored is not None
    stored["settings"]["threads"] = 7
    assert fingerprint.settings_of(config, stored)["threads"] == 7
    assert fingerprint.settings_of(config, None)["threads"] >= 1


def test_a_commit_that_is_older_than_a_setting_goes_on(
    config: dict[str, Any], run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    stored = fingerprint.stored_in(run)
    assert stored is not None
    old = {k: v for k, v in stored["settings"].items() if not k.startswith("onednn_")}
    edit(run, settings=old)
    assert build(config, str(run)).inexact == []
    assert "ONEDNN_MAX_CPU_ISA" not in os.environ  # it began without


@pytest.mark.parametrize(
    ("key", "may_grow"),
    [
        ("num_epochs", True),
        ("num_steps", True),
        ("train.epochs", True),
        ("epochs", False),
        ("model.num_steps", False),
        ("callback_kwargs.mine.epochs", False),
    ],
)
def test_what_may_grow_is_a_key_at_its_place(
    key: str, may_grow: bool, config: dict[str, Any]
) -> None:
    dataset, settings = build(config).dataset, fingerprint.settings_of(config, None)
    digests = [
        fingerprint.take(config | nested(key, number), settings, dataset, "")["config"]
        for number in (1, 2)
    ]
    assert (digests[0] == digests[1]) is may_grow


def test_hooks_and_modules_outside_of_src_count(tmp_path: Path) -> None:
    project = tmp_path / "project"
    for room in ("bin", "configs", "data", "engine", "src", "vegab"):
        shutil.copytree(ROOT / room, project / room, ignore=shutil.ignore_patterns("__pycache__"))
    (project / "own").mkdir()
    hooks = project / "own" / "hooks.py"
    hooks.write_text("from engine.hooks import Hook\nclass Mine(Hook):\n    pass\n")
    small = ("--n_filters=2", "--n_layers=1", "--batch_size=126", "--no_tensorboard")
    words = ("bin/train.py", "digits", "run", *small, "--hooks=[{class: own.hooks.Mine}]")
    done = forked.run([*words, "--num_epochs=1"], project, os.environ)
    assert done.returncode == 0, done.stderr
    stored = fingerprint.stored_in(project / "run")
    assert stored is not None
    own = {name for name in stored["code"] if not name.startswith("src/")}
    assert own == {"engine", "own/hooks.py"}
    with open(hooks, "a") as file:
        file.write("    # a comment is no change\n")
    assert forked.run([*words, "--num_epochs=2"], project, os.environ).returncode == 0
    with open(hooks, "a") as file:
        file.write("    only_tells = True\n")
    again = forked.run([*words, "--num_epochs=3"], project, os.environ)
    assert again.returncode == 2
    assert "own/hooks.py has changed" in again.stderr


def test_source_that_differs_from_a_run_s_is_named(
    run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert fingerprint.code_differs(run / "model.h5", run) == []
    assert not caplog.records
    stored = fingerprint.stored_in(run)
    assert stored is not None
    edit(run, code=stored["code"] | {"src/models.py": "0", "src/gone.py": "0"})
    assert fingerprint.code_differs(run / "model.h5", run) == ["src/models.py", "src/gone.py"]
    assert "src/models.py, src/gone.py have changed since the run" in caplog.text


@pytest.mark.parametrize("name", fingerprint.READ_AT_IMPORT.values())
def test_what_tensorflow_reads_at_its_import_is_as_the_run_began(
    name: str, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(name, raising=False)
    left_open = fingerprint.settings_of(config, None)
    fingerprint.apply(left_open)
    assert name not in os.environ  # TensorFlow's own choice, which hangs on the processor
    monkeypatch.setenv(name, "0")
    said = fingerprint.settings_of(config, None)
    fingerprint.apply(left_open)
    assert name not in os.environ
    fingerprint.apply(said)
    assert os.environ[name] == "0"


def test_other_data_has_another_digest(config: dict[str, Any]) -> None:
    digests = [
        build(config | {"dataset": "digits"}).fingerprint["data"],
        build(config | {"batch_size": 16}).fingerprint["data"],
    ]
    assert digests[0] != digests[1]


def test_what_a_process_has_imported_does_not_matter(config: dict[str, Any]) -> None:
    code = sources.digests(config)
    importlib.import_module("src.examples.iterators")
    assert sources.digests(config) == code
    assert set(code) == {
        "engine",
        *(f"src/{name}.py" for name in ("__init__", "data", "experiment", "models")),
        "src/training_loop.py",
    }


def test_what_a_config_names_counts_with_what_that_imports(config: dict[str, Any]) -> None:
    named = sources.digests(config | {"model": "toy:DebugToyModel"})
    assert "src/examples/toy.py" in named
    assert "src/examples/toy.py" not in sources.digests(config)
