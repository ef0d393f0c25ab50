"""Everything that a process writes, in two files. (Step one: no echo while it runs.)"""

from __future__ import annotations

import contextlib
import sys
from typing import TextIO


def terminal() -> TextIO | None:
    """A stream for a progress bar on the real terminal, or None where there is none."""
    return None


class Capture:
    def move_to(self, folder: str) -> None: ...

    @contextlib.contextmanager
    def only_in_files(self):
        yield

    def stop(self) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
