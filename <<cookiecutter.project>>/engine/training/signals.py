"""Turns a signal to stop into a flag that the loop reads between steps."""

import signal
from types import FrameType

from engine.devices import Workers


class SignalsToFlag:
    """Within the block, a signal to stop sets `name` and the step goes on to its end.

    Several workers see the name when they agree. A second SIGINT leaves at once. A SIGHUP that was
    ignored at the start, as by `nohup`, stays ignored."""

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)

    def __init__(self, workers: Workers) -> None:
        self.workers = workers
        self._received = self._agreed = 0

    def __enter__(self) -> "SignalsToFlag":
        self.before = {}
        for number in self.SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                self.before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    @property
    def name(self) -> str | None:
        """The signal that came, or None."""
        number = self._received if self.workers.number == 1 else self._agreed
        return signal.Signals(number).name if number else None

    def agree(self, *decisions: int) -> list[int]:
        """Return what the chief has decided, and hear of signals; all workers call it."""
        rows = self.workers.gather([self._received, *decisions])
        self._agreed = int(rows[:, 0].max())
        return [int(decision) for decision in rows[0, 1:]]

    def is_agreed(self) -> bool:
        """Agree, and return whether a signal came."""
        self.agree()
        return self.name is not None

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._received = number
