"""The tests that a generated project ships pass as it comes."""

from __future__ import annotations

import os
import sys

import pytest
from conftest import FAIL_ON_SKIP, Baker, run

# Commands that take long, and whose code the tests of a whole project run as well.
SAME = "check_resume or made_again or export or example_runner or refuses or probabilities"


@pytest.mark.slow
@pytest.mark.parametrize("rooms", ["all", "core"])
def test_project_passes_its_own_tests(bake: Baker, rooms: str) -> None:
    project = bake(rooms=rooms).project
    environment = {name: value for name, value in os.environ.items() if name != FAIL_ON_SKIP}
    in_parallel = ("-n", "auto", "--maxprocesses=4", "--dist=loadfile", "--no-loadscope-reorder")
    command = ("pytest", "-q", *in_parallel, *(["-k", f"not ({SAME})"] if rooms == "core" else []))
    tests = run(sys.executable, "-m", *command, cwd=project, env=environment, timeout=5400)
    closing = tests.stdout.strip().splitlines()[-1]
    if os.environ.get(FAIL_ON_SKIP):
        assert "skipped" not in closing, tests.stdout
