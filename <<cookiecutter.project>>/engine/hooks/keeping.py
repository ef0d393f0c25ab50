"""Keeps checkpoints every N steps, and not too many of them."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.batches import require_at_least
from engine.checkpoints import is_lower_better, require_inside
from engine.hooks.base import Hook, Run


@dataclass(eq=False)
class KeepCheckpoints(Hook):
    """Keeps checkpoints as `checkpoints/model-<steps done>.h5`, the best or the latest.

    Every N steps a value is that of the epoch so far, of a "val_…" column that of the last one.
    One without a finite value counts as the worst; of two equally good ones the later stays."""

    NAME = re.compile(r"model-[0-9]+\.h5")

    every: int | None  # N steps; None: at the end of each epoch that has the column `monitor`
    keep: int = 5
    monitor: str | None = None  # column of the history by which the best are kept
    monitor_mode: str = "auto"

    def __post_init__(self) -> None:
        require_at_least(1, every=1 if self.every is None else self.every, keep=self.keep)
        self.kept: list[tuple[int, float | None]] = []  # steps done and value, oldest first

    def before_training(self, run: Run) -> None:
        super().before_training(run)
        self.lower_is_better = is_lower_better(self.monitor, self.monitor_mode)

    def next_step(self, global_step: int) -> int | None:
        return (global_step // self.every + 1) * self.every if self.every else None

    def after_step(self, global_step: int, last_results: Any) -> None:
        if self.every and global_step % self.every == 0:
            self._keep(global_step)

    def after_epoch(self, epoch: int) -> None:
        if self.every is None and self.monitor in (None, *self.run.history[-1]):
            self._keep(self.run.global_step)

    def _keep(self, global_step: int) -> None:
        self.kept.append((global_step, self._value()))
        best = sorted(self.kept, key=self._rank)[: self.keep]
        # A new one that is superfluous is saved all the same: a resume goes on from there.
        self.run.keep_as = self._name(global_step)
        self.run.discard = [self._name(entry[0]) for entry in self.kept if entry not in best]
        self.kept = sorted(best)

    def get_state(self) -> dict[str, Any]:
        return {"kept": [[step, value] for step, value in self.kept]}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Take back the list, less what is gone; remove what an attempt that was killed kept."""
        folder = Path(self.checkpoints)
        known = {self._name(step): (step, value) for step, value in state["kept"]}
        require_inside(known)
        for path in folder.glob("model-*.h5"):
            if self.NAME.fullmatch(path.name) and path.name not in known:
                path.unlink()
        self.kept = [entry for name, entry in known.items() if (folder / name).exists()]

    def _value(self) -> float | None:
        """Return what `monitor` is now, or None where there is no finite value yet."""
        if self.monitor is None:
            return None
        of_validation = self.monitor.startswith("val_")
        rows = self.run.history if of_validation or not self.every else [self.run.results]
        found = next((row for row in reversed(rows) if self.monitor in row), None)
        if found is None and any(rows) and not (of_validation and self.run.validates_seldom):
            raise ValueError(f"monitor is {self.monitor!r}; there are {', '.join(rows[-1])}")
        value = found[self.monitor] if found else math.nan
        return value if math.isfinite(value) else None

    def _rank(self, entry: tuple[int, float | None]) -> tuple[float, int]:
        """Return a key that sorts the best first."""
        step, value = entry
        worse = math.inf if value is None else value if self.lower_is_better else -value
        return worse, -step

    @staticmethod
    def _name(global_step: int) -> str:
        return f"model-{global_step}.h5"
