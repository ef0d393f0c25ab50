"""Hooks of tests that do something after one step."""

import os
import signal
from typing import Any

from engine.hooks.base import Hook


class AfterStep(Hook):
    """Calls `act` after a step."""

    def __init__(self, global_step: int) -> None:
        self.global_step = global_step

    def next_step(self, global_step: int) -> int | None:
        return self.global_step if global_step < self.global_step else None

    def after_step(self, global_step: int, last_results: Any) -> None:
        if global_step == self.global_step:
            self.act()

    def act(self) -> None:
        raise NotImplementedError


class StopAt(AfterStep):
    """Sends the process a signal."""

    def __init__(self, global_step: int, number: signal.Signals = signal.SIGTERM) -> None:
        super().__init__(global_step)
        self.number = number

    def act(self) -> None:
        os.kill(os.getpid(), self.number)
