"""How a program ends: one that was interrupted waits for nothing but what it has promised."""

from __future__ import annotations

import subprocess
import sys

import pytest
from machinery import ROOT

from vegab.exits import outcome

SCRIPT = """
import atexit, os, sys, threading, time
sys.path.insert(0, sys.argv[2])
from vegab import exits

class Held:
    def __del__(self):
        os.write(1, b"tidied up\\n")

held = Held()
atexit.register(print, "registered")
threading.Thread(target=lambda: (time.sleep(0.2), print("thread"))).start()
exits.leave(int(sys.argv[1]))
"""


@pytest.mark.parametrize("code", [0, 1, 2, 75])
def test_only_the_tidying_up_is_left_out_and_only_after_an_interruption(code: int) -> None:
    words = [sys.executable, "-c", SCRIPT, str(code), str(ROOT)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=1800)
    assert (done.returncode, done.stderr) == (code, "")
    said = done.stdout.splitlines()
    # What is on its way through a pipe is written at the very end.
    assert sorted(said) == ["registered", "thread", *(["tidied up"] if code != 75 else [])]


def test_an_interruption_is_no_failure() -> None:
    errors = (None, KeyboardInterrupt(), SystemExit(75), SystemExit(1), ValueError())
    said = ["finished", "interrupted", "interrupted", "failed", "failed"]
    assert [outcome(error) for error in errors] == said
