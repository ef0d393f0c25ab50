"""Runs the training loop as a script does, without a config."""

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.hooks import LearningRates
from engine.training import Session, work_on
from src.training_loop import training_loop


def loop(
    model: Any,
    train: Any,
    valid: Any,
    save_path: Path,
    hooks: Sequence[Any] = (),
    learning_rates: Any = None,
    **arguments: Any,
) -> list[dict[str, Any]]:
    """Train into a folder; the arguments are those of `work_on`, `Session` and `training_loop`."""
    if learning_rates:
        hooks = [*hooks, LearningRates(learning_rates)]
    arguments["hooks"] = hooks

    def of(function: Any) -> dict[str, Any]:
        names = inspect.signature(function).parameters
        return {name: value for name, value in arguments.items() if name in names}

    work = work_on(model, train, valid, **of(work_on))
    return training_loop(Session(save_path, work, **of(Session)), **of(training_loop))
