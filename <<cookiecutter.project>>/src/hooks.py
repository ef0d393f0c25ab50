"""What happens around the steps of training: an example of a hook, yours to extend.

A hook has the methods that it needs of those in `engine.hooks.Hook`. A config names it:
--hooks='[{class: hooks:GapLog}]'
"""

import logging

from engine.hooks import Hook

log = logging.getLogger(__name__)


class GapLog(Hook):
    """Logs after each epoch by how much validation is worse than training: a sign of overfitting.

    Args:
        metric: of the history, which has a column of this name and one with "val_" before it.
    """

    only_tells = True  # it changes nothing in the run

    def __init__(self, metric: str = "loss") -> None:
        self.metric = metric

    def after_epoch(self, epoch: int) -> None:
        """Log the difference; `run.history` has a row for each epoch, the last one is this."""
        row = self.run.history[-1]
        if f"val_{self.metric}" in row:
            gap = row[f"val_{self.metric}"] - row[self.metric]
            log.info("epoch %d: %s is %+.4g in validation", epoch + 1, self.metric, gap)
