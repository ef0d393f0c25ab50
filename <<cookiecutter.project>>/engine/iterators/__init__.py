"""Trains and evaluates by iterators, over datasets of examples (EDflow)."""

from typing import TYPE_CHECKING

from engine import lazy

if TYPE_CHECKING:
    from engine.iterators import evaluation as evaluation
    from engine.iterators import torch_guard as torch_guard
    from engine.iterators.base import PyHookedModelIterator as PyHookedModelIterator
    from engine.iterators.base import TemplateIterator as TemplateIterator
    from engine.iterators.base import TFHookedModelIterator as TFHookedModelIterator
    from engine.iterators.build import build_iterator as build_iterator
    from engine.iterators.datasets import DatasetMixin as DatasetMixin
    from engine.iterators.datasets import make_examples as make_examples
    from engine.iterators.datasets import stack as stack
    from engine.iterators.outputs import StoredOutputs as StoredOutputs
    from engine.iterators.outputs import newest_outputs as newest_outputs
    from engine.iterators.outputs import run_callbacks as run_callbacks
    from engine.iterators.ranges import check_ranges_of_iterator as check_ranges_of_iterator
    from engine.iterators.ranges import splits_of as splits_of
    from engine.iterators.steps import IteratorSteps as IteratorSteps
    from engine.iterators.steps import IteratorValidation as IteratorValidation
    from engine.iterators.torch_iterator import TorchHookedModelIterator as TorchHookedModelIterator
    from engine.iterators.trainers import TFBaseEvaluator as TFBaseEvaluator
    from engine.iterators.trainers import TFBaseTrainer as TFBaseTrainer
    from engine.iterators.trainers import TFFrequencyTrainer as TFFrequencyTrainer
    from engine.iterators.trainers import TFListTrainer as TFListTrainer
else:
    __getattr__ = lazy(__name__, __file__)
