"""Says how a program ends: its exit codes, and whose mistake it was."""

import sys
from contextlib import suppress

FINISHED, FAILED, REFUSED, INTERRUPTED = 0, 1, 2, 75
EXIT_CODES = {"finished": FINISHED, "failed": FAILED, "interrupted": INTERRUPTED}


class UsageError(Exception):
    """A mistake of the person who typed the command: one sentence, exit code 2, nothing written."""


def outcome(error: BaseException | None) -> str:
    """How a call ended: finished, interrupted or failed."""
    if error is None:
        return "finished"
    interrupted = isinstance(error, KeyboardInterrupt) or (
        isinstance(error, SystemExit) and error.code == INTERRUPTED
    )
    return "interrupted" if interrupted else "failed"


def flush() -> None:
    """Has the streams written, as far as a full disk, a broken pipe or a closed one let them."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, AttributeError, ValueError):
            stream.flush()
