"""What the tests share: a small config, and a way to run the project's commands as a user does."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from configs import registry
from tests import forked
from vegab import trust

ROOT = Path(__file__).resolve().parents[1]
# nohup, or a shell's &, which the tests may be run by, makes children ignore these; what they start
# here must not.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)

Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(autouse=True)
def is_not_confined(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have no test leave to the next that a run's config was read."""
    monkeypatch.setenv(trust.FLAG, "")


@pytest.fixture
def config() -> dict[str, Any]:
    """The digits with a model that trains in a second."""
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
            timeout=600,
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
