"""What happens around the steps of training: progress, curves, early stopping.

A hook overrides what it needs of `Hook`. Hooks run in the order of the list. A hook with
state of its own returns it from `get_state`; it is committed with the model under the name of the
hook's class, and given back on resume.
"""

import csv
import io
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import keras
from tqdm import tqdm

from src import results
from src.checkpoint import write_atomically
from src.history import csv_lines

log = logging.getLogger(__name__)


@dataclass
class Run:
    """What hooks may look at; one object for the whole run, kept up to date by the loop.

    Attributes:
        root: the run folder.
        model: the model in training.
        num_epochs: epochs when the run is finished.
        steps_per_epoch: steps in an epoch.
        history: a row per finished epoch.
        global_step: steps done since the run began, over all attempts.
        best_epoch: the best epoch by `monitor` so far, or None.
        monitor: column of the history that says how good the model is.
        stop_reason: set it to end the run after this epoch.
    """

    root: Path
    model: keras.Model
    num_epochs: int
    steps_per_epoch: int
    history: list[dict[str, Any]]
    global_step: int
    best_epoch: int | None
    monitor: str
    stop_reason: str | None = None


class Hook:
    """Does nothing; override what you need."""

    run: Run

    def before_training(self, run: Run) -> None:
        """Called once, after the state is restored."""
        self.run = run

    def before_epoch(self, epoch: int) -> None:
        """Called before the first step of an epoch, counted from 0."""

    def next_step(self, global_step: int) -> int | None:
        """Return the next step, above `global_step`, at which to call the hook; None: whenever."""
        return None

    def after_step(self, global_step: int, last_results: Mapping[str, float]) -> None:
        """Called after one or many steps with the metrics of the epoch so far.

        Between the steps that hooks ask for by `next_step`, the loop runs many in one call.
        """

    def after_epoch(self, epoch: int) -> None:
        """Called after validation, before the commit; the epoch's row is `run.history[-1]`."""

    def after_training(self) -> None:
        """Called when the last epoch is committed."""

    def at_exception(self, error: BaseException) -> None:
        """Called when training ends by an exception or a signal."""

    def get_state(self) -> dict[str, Any]:
        """Return what a resumed run needs, as JSON values."""
        return {}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Take back what `get_state` returned at the last commit."""


class EpochLog(Hook):
    """Logs a line per epoch and appends its wall-clock figures to `timing.csv`."""

    COLUMNS = ("epoch", "seconds", "steps_per_second", "finished_at")

    def before_training(self, run: Run) -> None:
        super().before_training(run)
        path = run.root / "timing.csv"
        rows: list[dict[str, Any]] = []
        if path.exists():
            with open(path, newline="") as file:
                rows = [row for row in csv.DictReader(file) if row["epoch"].isdecimal()]
        # An epoch that was done but not committed is done again.
        kept = [row for row in rows if int(row["epoch"]) < len(run.history)]
        write_atomically(path, csv_lines(self.COLUMNS, kept).encode())

    def before_epoch(self, epoch: int) -> None:
        self.start = time.perf_counter()
        self.steps_before = self.run.global_step

    def after_epoch(self, epoch: int) -> None:
        seconds = time.perf_counter() - self.start
        row = {key: value for key, value in self.run.history[-1].items() if key != "epoch"}
        figures = "  ".join(
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
            for key, value in row.items()
        )
        log.info("epoch %d/%d  %s  %.1f s", epoch + 1, self.run.num_epochs, figures, seconds)
        timing = {
            "epoch": epoch,
            "seconds": round(seconds, 3),
            "steps_per_second": round((self.run.global_step - self.steps_before) / seconds, 1),
            "finished_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        with open(self.run.root / "timing.csv", "a") as file:
            file.write(csv_lines(self.COLUMNS, [timing], header=False))


class Progress(Hook):
    """Shows a bar with epoch, step, loss, rate and time left on a terminal.

    Args:
        terminal: where to draw; None, as when the output goes to a file: nothing is drawn.
    """

    def __init__(self, terminal: TextIO | None) -> None:
        self.terminal = terminal

    def before_training(self, run: Run) -> None:
        super().before_training(run)
        self.bar = tqdm(
            total=run.num_epochs * run.steps_per_epoch,
            initial=run.global_step,
            file=self.terminal or io.StringIO(),
            disable=self.terminal is None or not log.isEnabledFor(logging.INFO),
            unit="step",
            leave=False,
            dynamic_ncols=True,
        )

    def before_epoch(self, epoch: int) -> None:
        self.bar.set_description(f"epoch {epoch + 1}/{self.run.num_epochs}", refresh=False)

    def after_step(self, global_step: int, last_results: Mapping[str, float]) -> None:
        if "loss" in last_results:
            self.bar.set_postfix_str(f"loss {last_results['loss']:.4f}", refresh=False)
        self.bar.update(global_step - self.bar.n)

    def after_training(self) -> None:
        self.bar.close()

    def at_exception(self, error: BaseException) -> None:
        self.bar.close()


class LearningCurve(Hook):
    """Draws `learning_curve.png` after an epoch, not too often, and at the end."""

    SECONDS_BETWEEN = 30.0
    SHARE_OF_TIME = 0.01  # a long history takes long to draw

    def __init__(self) -> None:
        self.next_at = float("-inf")

    def after_epoch(self, epoch: int) -> None:
        if time.monotonic() > self.next_at:
            self._draw()

    def after_training(self) -> None:
        self._draw()

    def at_exception(self, error: BaseException) -> None:
        self._draw()

    def _draw(self) -> None:
        if not self.run.history:
            return
        start = time.monotonic()
        try:
            results.draw_learning_curve(self.run.root, self.run.history, self.run.best_epoch)
        except OSError as error:  # a picture is no reason to stop; a commit that fails is
            log.warning("learning_curve.png could not be written (%s)", error.strerror)
        end = time.monotonic()
        self.next_at = end + max(self.SECONDS_BETWEEN, (end - start) / self.SHARE_OF_TIME)


class TensorBoard(Hook):
    """Writes the history to `tb/train` and `tb/validation`, which TensorBoard overlays."""

    def before_training(self, run: Run) -> None:
        from tensorboard.summary import Writer

        super().before_training(run)
        self.writers = {
            name: Writer(str(run.root / "tb" / name)) for name in ("train", "validation")
        }

    def after_epoch(self, epoch: int) -> None:
        for key, value in self.run.history[-1].items():
            if key in ("epoch", "step"):
                continue
            split = "validation" if key.startswith("val_") else "train"
            self.writers[split].add_scalar(key.removeprefix("val_"), value, step=epoch)
        for writer in self.writers.values():
            writer.flush()

    def after_training(self) -> None:
        for writer in self.writers.values():
            writer.close()

    def at_exception(self, error: BaseException) -> None:
        self.after_training()


class EarlyStopping(Hook):
    """Ends the run when `monitor` has not improved for `patience` epochs.

    The count needs no state: it is the distance to the best epoch, which the loop keeps.
    """

    def __init__(self, patience: int) -> None:
        self.patience = patience

    def after_epoch(self, epoch: int) -> None:
        best = self.run.best_epoch
        if best is not None and epoch - best >= self.patience:
            self.run.stop_reason = f"{self.run.monitor} has not improved for {self.patience} epochs"
