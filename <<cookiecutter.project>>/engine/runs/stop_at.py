"""Ends a run where `bin/reproduce.py` wants it to end; it is laid next to the code of that run.

Keras callbacks come after all others of a config, so that the others' states keep their places. A
hook would not, because some configs bring hooks of their own that follow."""

from typing import Any

import keras


class StopAfterEpoch(keras.callbacks.Callback):
    """Ends the run as Ctrl-C does, once `epoch` epochs are saved and before the next one."""

    def __init__(self, epoch: int) -> None:
        super().__init__()
        self.end = epoch

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        if epoch == self.end:
            raise KeyboardInterrupt

    def get_state(self) -> dict[str, Any]:
        return {}

    def set_state(self, state: Any) -> None:
        """There is none."""
