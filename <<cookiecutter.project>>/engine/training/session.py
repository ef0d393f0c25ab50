"""Begins or resumes a run: what the loop needs before its first step."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import keras

from engine.batches import BatchSource
from engine.hooks import Hook, Hooks
from engine.iterators import PyHookedModelIterator, TFHookedModelIterator, torch_guard
from engine.training.guard import Guard, Unsaved
from engine.training.steps import Steps, Validation, has_all_variables, make_variables

log = logging.getLogger(__name__)

BEFORE_STEPS = ("set_model", "set_params", "on_train_begin")  # methods of callbacks
NEW_RUN: dict[str, Any] = {
    "epoch": 0,
    "step": 0,
    "global_step": 0,
    "learning_rate": 0.0,
    "results": {},
    "steps": {},
    "best_epoch": None,
    "is_cut": False,
    "stop_reason": None,
    "hooks": {},
    "callbacks": {},
}


def next_stop(global_step: int, checkpoint_steps: int, hooks: Hooks) -> int:
    """Return the first step after `global_step` at which somebody wants to act."""
    stops = [hooks.next_stop(global_step)]
    if checkpoint_steps:
        stops.append((global_step // checkpoint_steps + 1) * checkpoint_steps)
    return min((stop for stop in stops if stop is not None), default=global_step + 1_000_000)


def looks_at_batches(callbacks: Sequence[keras.callbacks.Callback]) -> bool:
    """Whether a callback has its own `on_train_batch_*`, so that steps cannot be grouped."""
    names = ("on_train_batch_begin", "on_train_batch_end", "on_batch_begin", "on_batch_end")
    for callback in callbacks:
        for name in names:
            if getattr(type(callback), name) is not getattr(keras.callbacks.Callback, name):
                log.info("%s looks at each batch: steps run singly", type(callback).__name__)
                return True
    return False


@dataclass(frozen=True)
class Traced:
    """Steps that were traced, and looked at, before there was a run folder.

    Attributes:
        guard: what has looked at them, and will look at those that are traced later.
        steps: of the model; None: an iterator does them.
        validation: of the model, or None.
        may_be_outdated: whether hooks or callbacks of the user act before the first step, who may
            change what it was traced from: then it is traced again.
    """

    guard: Guard
    steps: Any = None
    validation: Validation | None = None
    may_be_outdated: bool = False


def trace(
    model: Any,
    source: BatchSource,
    valid: Any,
    callbacks: Sequence[keras.callbacks.Callback] = (),
    hooks: Sequence[Hook] = (),
    num_steps: int | None = None,
    iterator: PyHookedModelIterator | None = None,
    allow_inexact: bool = False,
    unsaved: Sequence[str] = (),
) -> Traced:
    """Trace training step and validation step; see `training_loop` for the arguments.

    Args:
        allow_inexact: note what a resume would not restore, instead of refusing it.
        unsaved: what was found already.

    Raises:
        UsageError: if a step uses what no commit holds, and that is not allowed.
    """
    guard = Guard(model, iterator, callbacks, hooks, allow_inexact)
    guard.tell([Unsaved(name, torch_guard.REMEDY) for name in unsaved])
    if iterator is not None:
        if isinstance(iterator, TFHookedModelIterator):
            iterator.look_at_traces(guard.look, source.batch(0, 0))
        return Traced(guard)
    if not has_all_variables(model):
        make_variables(model, source.batch(0, 0))
    steps = Steps(model, source, looks_at_batches(callbacks), num_steps, guard.look)
    steps.compile()
    validation = Validation(model, valid, guard.look) if valid is not None else None
    if validation is not None:
        validation.compile()
    return Traced(guard, steps, validation, acts_before_steps(callbacks, hooks))


def acts_before_steps(callbacks: Sequence[keras.callbacks.Callback], hooks: Sequence[Hook]) -> bool:
    """Whether others than Keras' callbacks and this project's hooks act before the first step."""
    methods = [getattr(type(each), name) for each in callbacks for name in BEFORE_STEPS]
    methods += [type(hook).before_training for hook in hooks if hasattr(hook, "before_training")]
    return any(not method.__module__.startswith(("keras.", "engine.")) for method in methods)
