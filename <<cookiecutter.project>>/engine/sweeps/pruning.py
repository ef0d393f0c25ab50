"""Ends a trial of a sweep early, if it does worse than other trials."""

from engine.hooks import Hook, Run
from engine.runs import results
from engine.sweeps import search, sweep
from vegab.files import write_json


class StopPoorTrial(Hook):
    """Asks a pruner of Optuna after each epoch; `bin/sweep.py --pruner` adds it to each trial.

    The sweep is that in whose folder the run lies. Where a run ends early is written down before it
    ends, and never decided again: not when it is resumed, and not when it is made again elsewhere,
    where it is given `epoch`, the number of epochs to end after."""

    def __init__(self, epoch: int | None = None) -> None:
        self.epoch = epoch

    def before_training(self, run: Run) -> None:
        """Find the sweep; a run that is not a trial is compared with nothing."""
        super().before_training(run)
        self.epoch = self.epoch or results.pruned_at(run.root)
        self.folder, self.own = run.root.resolve().parent, run.root.resolve().name

    def after_epoch(self, epoch: int) -> None:
        """End the run, if it is poor."""
        if not self.epoch and (self.folder / sweep.SWEEP).exists():
            definition, trials, _ = sweep.read(self.folder)
            curve = search.curve_in(self.run.history, definition)
            is_own = any(trial.name == self.own for trial in trials)
            if is_own and search.is_poor(self.folder, definition, trials, self.own, curve):
                self.epoch = epoch + 1
                write_json(self.run.root / results.PRUNED, {"epoch": self.epoch})
        if self.epoch and epoch + 1 >= self.epoch:
            self.run.stop_reason = "poor next to other trials of its sweep"
