"""Says how a program ends: its exit codes, and whose mistake it was."""

import atexit
import logging
import os
import sys
from contextlib import suppress
from typing import NoReturn

FINISHED, FAILED, REFUSED, INTERRUPTED = 0, 1, 2, 75
EXIT_CODES = {"finished": FINISHED, "failed": FAILED, "interrupted": INTERRUPTED}


class UsageError(Exception):
    """A mistake of the person who typed the command: one sentence, exit code 2, nothing written."""


def outcome(error: BaseException | None) -> str:
    """How a call ended: finished, interrupted or failed."""
    if error is None:
        return "finished"
    is_exit = isinstance(error, SystemExit) and error.code == INTERRUPTED
    return "interrupted" if is_exit or isinstance(error, KeyboardInterrupt) else "failed"


_ends_at_once = False


def leave(code: int) -> NoReturn:
    """Ends the process. Whoever interrupts it may not wait: Python's own tidying up, which takes a
    second where TensorFlow is loaded, is then left out."""
    global _ends_at_once
    _ends_at_once = code == INTERRUPTED
    sys.exit(code)


def flush() -> None:
    """Has the streams written, as far as a full disk, a broken pipe or a closed one let them."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, AttributeError, ValueError):
            stream.flush()


@atexit.register  # before all others, so that it is called after them, with all threads joined
def _end_at_once() -> None:
    if _ends_at_once:
        logging.shutdown()
        flush()
        os._exit(INTERRUPTED)
