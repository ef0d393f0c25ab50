"""Ends a trial of a sweep early, where it is poor beside earlier ones."""

import json
from pathlib import Path

from engine.hooks import Hook, Run
from engine.sweeps import search, sweep


class StopPoorTrial(Hook):
    """Asks a pruner of Optuna after each epoch; `bin/sweep.py --pruner` adds it to each trial.

    What it knows of other trials of the folder `sweep` does not change while the run goes on, nor
    later: a run that is resumed or repeated ends at the same epoch.
    """

    def __init__(self, sweep: str) -> None:
        self.folder = Path(sweep)

    def before_training(self, run: Run) -> None:
        """Find out which trial this is; ValueError if it is none, or earlier ones are not known."""
        super().before_training(run)
        self.definition, _, suggested = sweep.read(self.folder)
        config = json.loads((run.root / "config.json").read_text(encoding="utf-8"))
        number = search.number_of(suggested, config)
        if number is None:
            raise ValueError(f"no trial of {self.folder} has the settings of this run")
        self.before = suggested[:number]
        path = self.folder / search.JOURNAL  # which is written to meanwhile
        journal = search.open_journal(path, self.definition, writes=False)
        self.known = journal.get_trials(deepcopy=False)
        if len(self.known) <= number - self.definition.num_parallel:
            raise ValueError(f"{path} has lost trials before this one")

    def after_epoch(self, epoch: int) -> None:
        """End the run, if it is poor."""
        curve = search.curve_in(self.run.history, self.definition)
        _, is_poor = search.judge(self.definition, self.known, self.before, curve)
        if is_poor:
            self.run.stop_reason = (
                f"poor beside earlier trials of {self.folder} ({self.definition.pruner} pruner)"
            )
