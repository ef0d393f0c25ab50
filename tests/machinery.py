"""What the tests of engine/ and vegab/ share; they test these where they lie, in the template."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import forked
import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent / "<<cookiecutter.project>>"
# Configs name classes of these tests, and processes of their own import them.
FOLDERS = [HERE, HERE / "engine", HERE / "vegab"]

Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(autouse=True, scope="module")
def tests_can_be_imported(request: pytest.FixtureRequest) -> Iterator[None]:
    """Have a test of the machinery run in the project, and what it starts find these modules."""
    with pytest.MonkeyPatch.context() as patch:
        if request.path.parent in FOLDERS[1:]:
            for folder in FOLDERS:
                patch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
            patch.chdir(ROOT)
        yield


@pytest.fixture(autouse=True)
def is_not_confined(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have no test leave to the next that a run's config was read."""
    monkeypatch.setenv("VEGAB_CONFINED", "")


@pytest.fixture
def config() -> dict[str, Any]:
    """The digits with a model that trains in a second."""
    from configs import registry

    return registry["digits"] | {
        "n_filters": 4,
        "n_layers": 1,
        "num_epochs": 2,
        "lr_schedule": None,
    }


@pytest.fixture
def command() -> Command:
    """Run `python SCRIPT ARGUMENTS` from the project's root."""

    def run(
        *arguments: object, env: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *map(str, arguments)],
            cwd=ROOT,
            env=os.environ | (env or {}),
            capture_output=True,
            text=True,
            timeout=1800,
        )

    return run


@pytest.fixture
def quick_command() -> Command:
    """Do as `command` does, but in a process that has the libraries imported; see `forked`."""

    def run(
        *arguments: object, env: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        return forked.run([*map(str, arguments)], ROOT, os.environ | (env or {}))

    return run


def example(**features: Any) -> bytes:
    """Return a serialized Example; bytes, integers or floats, alone or in lists."""
    import tensorflow as tf

    made = tf.train.Features()
    for name, values in features.items():
        values = values if isinstance(values, list) else [values]
        kinds = {int: "int64_list", float: "float_list", bytes: "bytes_list"}
        getattr(made.feature[name], kinds[type(values[0])]).value.extend(values)
    return tf.train.Example(features=made).SerializeToString()
