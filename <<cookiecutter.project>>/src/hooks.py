"""Acts around the steps of training: an example of a hook, yours to extend.

A hook overrides the methods of `engine.hooks.Hook` that it needs. A config names it:
--hooks='[{class: hooks:GapLog}]'"""

import logging

from engine.hooks import Hook

log = logging.getLogger(__name__)


class GapLog(Hook):
    """Logs after each epoch by how much validation is worse than training: a sign of overfitting.

    Args:
        metric: a column of the history, which has another one with "val_" in front of the name."""

    only_tells = True  # it changes nothing in the run

    def __init__(self, metric: str = "loss") -> None:
        self.metric = metric

    def after_epoch(self, epoch: int) -> None:
        """Log the difference; `run.history` has a row per epoch, and the last is this epoch's."""
        row = self.run.history[-1]
        if f"val_{self.metric}" in row:
            gap = row[f"val_{self.metric}"] - row[self.metric]
            log.info("epoch %d: %s is %+.4g in validation", epoch + 1, self.metric, gap)
