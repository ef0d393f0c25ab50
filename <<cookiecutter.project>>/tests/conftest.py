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

ROOT = Path(__file__).resolve().parents[1]
# A model that trains in a second.
SMALL = ("--n_filters=4", "--n_layers=1")

# nohup, or a shell's &, which the tests may be run by, makes children ignore these; what they start
# here must not.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)

Done = subprocess.CompletedProcess[str]
Command = Callable[..., Done]


@pytest.fixture
def config() -> dict[str, Any]:
    """The digits with a model that trains in a second."""
    small = {"n_filters": 4, "n_layers": 1, "num_epochs": 2, "lr_schedule": None}
    return registry["digits"] | small


@pytest.fixture(scope="session")
def command() -> Command:
    """Run `python SCRIPT ARGUMENTS` from the project's root, which is to end with `code`."""

    def run(*arguments: object, code: int = 0, env: dict[str, str] | None = None) -> Done:
        done = subprocess.run(
            [sys.executable, *map(str, arguments)],
            cwd=ROOT,
            env=os.environ | (env or {}),
            capture_output=True,
            text=True,
            timeout=1800,
        )
        assert done.returncode == code, f"{done.stdout}\n{done.stderr}"
        return done

    return run
