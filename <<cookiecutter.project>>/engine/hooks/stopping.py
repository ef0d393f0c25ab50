"""Acts at an epoch's beginning or end: sets the learning rate, or ends the training."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from engine.batches import require_at_least
from engine.checkpoints import best_of, is_lower_better
from engine.hooks.base import Hook, Run


@dataclass(eq=False)
class EarlyStopping(Hook):
    """Ends the run when `monitor` has not improved for `patience` epochs."""

    patience: int
    monitor: str | None = None  # column of the history; None: the run's own
    monitor_mode: str = "auto"  # of a `monitor` that is given here: "min", "max" or by its name
    stop_on_nan: bool = False  # end the run, too, when the column is not a finite number
    in_steps: bool = False  # `patience` is in steps, though it is looked at the ends of epochs only
    min_steps: int = 0  # never stop before step N
    every_steps: int = 1  # look at the first end of an epoch after every N steps

    def __post_init__(self) -> None:
        require_at_least(1, patience=self.patience, every_steps=self.every_steps)

    def before_training(self, run: Run) -> None:
        super().before_training(run)
        self.lower_is_better = is_lower_better(self.monitor, self.monitor_mode)

    def after_epoch(self, epoch: int) -> None:
        monitor, row = self.monitor or self.run.monitor, self.run.history[-1]
        if monitor is None or (monitor not in row and self.run.validates_seldom):
            return
        if monitor not in row:
            raise ValueError(f"monitor is {monitor!r}; the history has {', '.join(row)}")
        if self.stop_on_nan and not math.isfinite(row[monitor]):
            self.run.stop_reason = f"{monitor} is {row[monitor]}"
            return
        history, best = self.run.history, self.run.best_epoch
        if self.monitor is not None:
            best = best_of(history, monitor, self.lower_is_better)
        step, before = row["step"], history[-2]["step"] if len(history) > 1 else 0
        is_time = step >= self.min_steps and step // self.every_steps > before // self.every_steps
        if best is None or not is_time:
            return
        since, unit = epoch - best, "epochs"
        if self.in_steps:
            since, unit = step - history[best]["step"], "steps"
        if since >= self.patience:
            self.run.stop_reason = f"{monitor} has not improved for {self.patience} {unit}"


@dataclass(eq=False)
class LearningRates(Hook):
    """Sets one rate after the other. `rates` are pairs of `until_epoch` and the rate that holds
    while `epoch < until_epoch`, epochs counted from 0; the last one holds to the end."""

    rates: Sequence[tuple[int, float]]

    def rate_in(self, epoch: int) -> float:
        return next((rate for until, rate in self.rates if epoch < until), self.rates[-1][1])

    def before_epoch(self, epoch: int) -> None:
        """Set the rate where it changes; between two changes a callback may set another."""
        if epoch == 0 or self.rate_in(epoch) != self.rate_in(epoch - 1):
            self.run.model.optimizer.learning_rate = self.rate_in(epoch)
