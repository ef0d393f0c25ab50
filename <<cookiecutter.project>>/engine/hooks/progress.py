"""Shows how the training goes: a bar, a line per epoch, the learning curve, TensorBoard."""

import io
import logging
import re
import time
from collections.abc import Mapping
from typing import Any, TextIO

from tqdm import tqdm

from engine import pictures as figures
from engine.checkpoints import csv_lines
from engine.hooks.base import Hook, Run, WriterHook, log
from vegab.files import write_atomically


class EpochLog(Hook):
    """Logs a line per epoch and appends its wall-clock times to `timing.csv`."""

    only_tells = True
    COLUMNS = ("epoch", "seconds", "steps_per_second", "finished_at")
    ROW = re.compile(r"\d{1,9},[\d.]+,[\d.]+,[\w:-]+")
    LINE = 80  # columns of the narrowest terminal
    head = ""  # the line that was logged last with the names of the columns

    def before_training(self, run: Run) -> None:
        super().before_training(run)
        path = run.root / "timing.csv"
        text = path.read_text(errors="replace") if path.exists() else ""
        _, *rows = text.splitlines() or [""]
        whole = [row for row in rows if self.ROW.fullmatch(row)]
        if len(whole) < len(rows):
            log.warning("%s: %d rows are corrupt; they are left out", path, len(rows) - len(whole))
        # An epoch that was done but not saved is done again.
        kept = [row for row in whole if int(row.split(",")[0]) <= len(run.history)]
        lines = [csv_lines(self.COLUMNS, []).strip(), *kept, ""]
        write_atomically(path, "\n".join(lines), sync=False)

    def before_epoch(self, epoch: int) -> None:
        self.start = time.perf_counter()
        self.steps_before = self.run.global_step

    def after_epoch(self, epoch: int) -> None:
        seconds = time.perf_counter() - self.start
        head, line = self._table(epoch, f"{seconds:.1f} s")
        if head != self.head:
            log.info("%s", head)
        self.head = head
        log.info("%s", line)
        rate = round((self.run.global_step - self.steps_before) / seconds, 1)
        finished_at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        cells = (epoch, round(seconds, 3), rate, finished_at)
        timing = dict(zip(self.COLUMNS, cells, strict=True))
        with open(self.run.root / "timing.csv", "a") as file:
            file.write(csv_lines(self.COLUMNS, [timing], header=False))

    def _table(self, epoch: int, time_taken: str) -> tuple[str, str]:
        """Return a line with names of metrics, and one with values, of as many as fit."""
        last = str(self.run.num_epochs)
        first = f"epoch {epoch + 1:{len(last)}}/{last}"
        values = {k: v for k, v in self.run.history[-1].items() if k not in ("epoch", "step")}
        values["learning_rate"] = values.pop("learning_rate", None)  # it tells least
        cells = [
            (name, f"{value:.4g}" if isinstance(value, float) else str(value), max(len(name), 6))
            for name, value in values.items()
            if value is not None
        ]
        room = self.LINE - len(first) - 2 - max(len(time_taken), 8)
        for cell in reversed(cells.copy()):
            if sum(2 + width for _, _, width in cells) > room and cell[0] != self.run.monitor:
                cells.remove(cell)
        head = "".join(f"  {name:>{width}}" for name, _, width in cells)
        line = "".join(f"  {value:>{width}}" for _, value, width in cells)
        return f"{'':{len(first)}}{head}", f"{first}{line}  {time_taken}"


class Progress(Hook):
    """Shows a bar with epoch, step, loss, rate and time left on a terminal, if there is one."""

    only_tells = True

    def __init__(self, terminal: TextIO | None) -> None:
        self.terminal = terminal

    def before_training(self, run: Run) -> None:
        super().before_training(run)
        self.bar = tqdm(
            total=run.num_steps or run.num_epochs * run.steps_per_epoch,
            initial=run.global_step,
            file=self.terminal or io.StringIO(),
            disable=self.terminal is None or not log.isEnabledFor(logging.INFO),
            unit="step",
            leave=False,
            dynamic_ncols=True,
        )

    def before_epoch(self, epoch: int) -> None:
        self.bar.set_description(f"epoch {epoch + 1}/{self.run.num_epochs}", refresh=False)

    def after_step(self, global_step: int, last_results: Any) -> None:
        for name, value in list(self.run.results.items())[:1]:
            self.bar.set_postfix_str(f"{name} {value:.4f}", refresh=False)
        self.bar.update(global_step - self.bar.n)

    def after_training(self) -> None:
        self.bar.close()

    def at_exception(self, error: BaseException) -> None:
        self.bar.close()


class UnreadSettings(Hook):
    """Names settings that differ from root's, and that nothing has read in the first epoch."""

    only_tells = True

    def __init__(self, config: Mapping[str, Any], root: Mapping[str, Any]) -> None:
        self.changed = [key for key, value in config.items() if value != root.get(key, value)]
        self.config = config

    def before_training(self, run: Run) -> None:
        super().before_training(run)
        self.is_new = run.global_step == 0  # a resumed process takes some from the checkpoint

    def after_epoch(self, epoch: int) -> None:
        read = getattr(self.config, "read", self.changed)
        unread = [key for key in self.changed if key not in read]
        if unread and epoch == 0 and self.is_new:
            log.warning("%s: set, but neither model nor data reads it", ", ".join(unread))


class LearningCurve(Hook):
    """Draws `learning_curve.png` after an epoch, not too often, and at the end or a failure."""

    only_tells = True
    SECONDS_BETWEEN = 30.0

    def before_training(self, run: Run) -> None:
        super().before_training(run)
        self.drawn_at = time.monotonic()

    def after_epoch(self, epoch: int) -> None:
        if time.monotonic() > self.drawn_at + self.SECONDS_BETWEEN:
            self._draw()

    def after_training(self) -> None:
        self._draw()

    def at_exception(self, error: BaseException) -> None:
        if not isinstance(error, SystemExit | KeyboardInterrupt):  # an interruption cannot wait
            self._draw()

    def _draw(self) -> None:
        if not self.run.history:
            return
        try:
            figures.draw_learning_curve(self.run.root, self.run.history, self.run.best_epoch)
        except OSError as error:  # a picture is no reason to stop; a checkpoint that fails is
            log.warning("learning_curve.png could not be written (%s)", error.strerror)
        self.drawn_at = time.monotonic()


class TensorBoard(WriterHook):
    """Writes the history to `tb`: one entry in TensorBoard, a tag for each metric."""

    def __init__(self, prefix: str | None = None) -> None:
        self.prefix = prefix

    def before_training(self, run: Run) -> None:
        from tensorboard.summary import Writer

        super().before_training(run)
        if self.prefix is None:
            self.prefix = "" if run.iterator is None else "epoch_"
        self.writer = Writer(str(run.root / "tb"))

    def after_epoch(self, epoch: int) -> None:
        for key, value in self.run.history[-1].items():
            if key not in ("epoch", "step"):
                self.writer.add_scalar(f"{self.prefix}{key}", value, step=epoch + 1)
        super().after_epoch(epoch)


class LastMetrics(Hook):
    """Writes the last metrics of training and of validation to `metrics.csv`, a row each."""

    only_tells = True

    def before_training(self, run: Run) -> None:
        super().before_training(run)
        if run.history:
            self.after_epoch(run.history[-1]["epoch"])

    def after_epoch(self, epoch: int) -> None:
        rows: list[dict[str, Any]] = []
        for split, is_valid in (("train", False), ("validation", True)):
            for row in reversed(self.run.history):
                names = [name for name in row if name.startswith("val_") is is_valid]
                if names:
                    place = {"split": split, "epoch": row["epoch"], "step": row["step"]}
                    rows.append(place | {name.removeprefix("val_"): row[name] for name in names})
                    break
        columns = list(dict.fromkeys(key for row in rows for key in row))
        write_atomically(self.run.root / "metrics.csv", csv_lines(columns, rows), sync=False)
