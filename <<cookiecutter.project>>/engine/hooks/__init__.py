"""Acts around the steps of training: progress, logs, curves, kept checkpoints, early stopping."""
# ruff: noqa: F401, I001

from typing import TYPE_CHECKING

from engine import lazy

if TYPE_CHECKING:
    from engine.hooks import base, exporters
    from engine.hooks.base import Hook, Hooks, IntervalHook, Run, give_addresses
    from engine.hooks.exporters import Export, export
    from engine.hooks.keeping import KeepCheckpoints
    from engine.hooks.progress import (
        EpochLog, LastMetrics, LearningCurve, Progress, TensorBoard, UnreadSettings,
    )  # fmt: skip
    from engine.hooks.step_logs import OF_EDFLOW, LoggingHook, scalars_of, tile
    from engine.hooks.stopping import EarlyStopping, LearningRates
else:
    __getattr__ = lazy(__name__, __file__)
