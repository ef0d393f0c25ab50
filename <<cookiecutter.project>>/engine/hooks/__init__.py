"""Acts around the steps of training: progress, logs, curves, kept checkpoints, early stopping."""

from typing import TYPE_CHECKING

from engine import lazy

if TYPE_CHECKING:
    from engine.hooks import base as base
    from engine.hooks.base import Hook as Hook
    from engine.hooks.base import Hooks as Hooks
    from engine.hooks.base import IntervalHook as IntervalHook
    from engine.hooks.base import Run as Run
    from engine.hooks.base import give_addresses as give_addresses
    from engine.hooks.exporters import Export as Export
    from engine.hooks.exporters import export as export
    from engine.hooks.keeping import KeepCheckpoints as KeepCheckpoints
    from engine.hooks.progress import EpochLog as EpochLog
    from engine.hooks.progress import LastMetrics as LastMetrics
    from engine.hooks.progress import LearningCurve as LearningCurve
    from engine.hooks.progress import Progress as Progress
    from engine.hooks.progress import TensorBoard as TensorBoard
    from engine.hooks.rates import LearningRates as LearningRates
    from engine.hooks.step_logs import LoggingHook as LoggingHook
    from engine.hooks.stopping import EarlyStopping as EarlyStopping
else:
    __getattr__ = lazy(__name__, __file__)
