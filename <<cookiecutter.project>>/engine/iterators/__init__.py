"""Trains and evaluates by iterators, over datasets of examples (EDflow)."""
# ruff: noqa: F401

from typing import TYPE_CHECKING

from engine import lazy

if TYPE_CHECKING:
    from engine.iterators import edflow, evaluation, outputs
    from engine.iterators.base import PyHookedModelIterator, TemplateIterator, TFHookedModelIterator
    from engine.iterators.build import build_iterator
    from engine.iterators.datasets import DatasetMixin
    from engine.iterators.outputs import StoredOutputs, callbacks_of, run_callbacks
    from engine.iterators.ranges import check_ranges_of_iterator, splits_of
    from engine.iterators.torch_iterator import TorchHookedModelIterator
    from engine.iterators.trainers import (
        TFBaseEvaluator,
        TFBaseTrainer,
        TFFrequencyTrainer,
        TFListTrainer,
    )
else:
    __getattr__ = lazy(__name__, __file__)
