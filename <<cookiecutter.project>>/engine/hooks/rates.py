"""Sets the learning rate by the epoch."""

from collections.abc import Sequence

from engine.hooks.base import Hook


class LearningRates(Hook):
    """Sets one rate after the other.

    Args:
        rates: pairs of `until_epoch` and the rate that holds while `epoch < until_epoch`, epochs
            counted from 0; the last one holds to the end.
    """

    def __init__(self, rates: Sequence[tuple[int, float]]) -> None:
        self.rates = list(rates)

    def rate_in(self, epoch: int) -> float:
        """Return the rate in an epoch."""
        return next((rate for until, rate in self.rates if epoch < until), self.rates[-1][1])

    def before_epoch(self, epoch: int) -> None:
        """Set the rate where it changes; between two changes a callback may set another."""
        if epoch == 0 or self.rate_in(epoch) != self.rate_in(epoch - 1):
            self.run.model.optimizer.learning_rate = self.rate_in(epoch)
