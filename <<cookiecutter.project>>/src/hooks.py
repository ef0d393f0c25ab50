"""What happens around the steps of training: progress, curves, logs, checkpoints, early stopping.

A hook overrides what it needs of `Hook`. Hooks run in the order of the list. A hook with
state of its own returns it from `get_state`; it is committed with the model under the name of the
hook's class, and given back on resume.
"""

import csv
import inspect
import io
import logging
import math
import re
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import tensorflow as tf
from tqdm import tqdm

from src import callback_state, figures
from src.batches import Array, require_at_least
from src.checkpoint import write_atomically
from src.commit_file import require_inside
from src.datasets import leaves, make_examples, stack
from src.history import best_of, csv_lines, is_lower_better

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
        monitor: column of the history that says how good the model is, or None.
        num_steps: steps when the run is finished, or None: those of `num_epochs` epochs.
        validates_seldom: whether there are epochs without validation.
        iterator: what does the steps, or None: the model's own training step does.
        results: the figures of the epoch so far.
        keep_as: set it in `after_step` to have a commit made now and kept under this name in
            `checkpoints/` too.
        discard: names in `checkpoints/` that this commit makes superfluous.
        stop_reason: set it to end the run after this epoch.
    """

    root: Path
    model: Any
    num_epochs: int
    steps_per_epoch: int
    history: list[dict[str, Any]]
    global_step: int
    best_epoch: int | None
    monitor: str | None
    num_steps: int | None = None
    validates_seldom: bool = False
    iterator: Any = None
    results: Mapping[str, float] = field(default_factory=dict)
    keep_as: str | None = None
    discard: Sequence[str] = ()
    stop_reason: str | None = None


class Hook:
    """Does nothing; override what you need.

    Attributes:
        run: what there is to know of the run, from `before_training` on.
        root: the run folder; `code`, `checkpoints`, `train` and `eval` are folders in it.
        only_tells: whether all that it does is to write or to show. Of several workers, the chief
            alone has it act. A hook that may change the run acts on all of them; what it writes
            into `root` is kept by the chief alone.
    """

    only_tells = False
    run: Run
    root: str
    code: str
    checkpoints: str
    train: str
    eval: str

    def before_training(self, run: Run) -> None:
        """Called once, before the state is restored."""
        self.run = run

    def before_epoch(self, epoch: int) -> None:
        """Called before the first step of an epoch, counted from 0.

        What it changes, such as the learning rate, holds in a resumed run as well: at an epoch's
        beginning it is called after the state is restored. Where a run goes on within an epoch, it
        is called before, and restoring brings back what has become of the change.
        """

    def next_step(self, global_step: int) -> int | None:
        """Return the next number of steps done, above `global_step`, at which to act.

        `after_step` is then called with that number, and `before_step` with the one below it. None:
        a hook that has a `before_step` acts at every step, another one whenever a call of many
        steps ends.
        """
        return None

    def acts_before(self) -> bool:
        """Whether `before_step` is to be called; if nobody's is, steps may be grouped."""
        return type(self).before_step is not Hook.before_step

    def before_step(
        self, global_step: int, fetches: dict[str, Any], feeds: Any, batch: Any
    ) -> None:
        """Called before a step, when `global_step` steps are done.

        Args:
            global_step: steps done.
            fetches: nested functions that the step will call; what is changed here is what it does.
            feeds: a copy of the batch, which the step is given; change it as you like.
            batch: as the data has it; leave it alone.
        """

    def after_step(self, global_step: int, last_results: Any) -> None:
        """Called after a step, when `global_step` steps are done.

        `after_step(self, global_step, fetches, feeds, batch)` is called too, if it is written so.

        Args:
            global_step: steps done, one more than `before_step` was told.
            last_results: of a Keras model, its metrics over the epoch so far; of an iterator, what
                its `run` has returned.
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


ADDRESSES = ("code", "checkpoints", "train", "eval")


def give_addresses(thing: Any, root: Path) -> None:
    """Set the attributes by which hooks and iterators find the run folder and what is in it."""
    thing.root = str(root)
    for name in ADDRESSES:
        setattr(thing, name, str(root / name))


class Hooks:
    """Calls hooks in their order, each when it wants to act; one that fails is named.

    Args:
        hooks: in the order in which they are called.
        seldom: those of them that act at every `hook_freq`-th step alone, beginning with the first.
        hook_freq: at least 1.
        is_chief: whether this process is the one that writes.
    """

    def __init__(
        self,
        hooks: Sequence[Hook],
        seldom: Sequence[Hook] = (),
        hook_freq: int = 1,
        is_chief: bool = True,
    ) -> None:
        self.hooks = list(hooks)
        # They count all the same for where a call of many steps is to end.
        self._mute = {
            id(hook) for hook in hooks if getattr(hook, "only_tells", False) and not is_chief
        }
        self._seldom = {id(hook) for hook in seldom} if hook_freq > 1 else set()
        self._hook_freq = hook_freq
        self._sees_feeds = {id(hook): _takes_feeds(hook) for hook in hooks}
        self._acts_before = {
            id(hook): self._sees_feeds[id(hook)] or _acts_before(hook) for hook in hooks
        }
        self._started: list[Hook] = []
        # What a resumed run would begin with, of those that save nothing and may change the run.
        self._at_start: dict[int, dict[str, Any]] = {}

    def start(self, run: Run) -> None:
        """Tell all of them of the run."""
        for hook in self.hooks:
            give_addresses(hook, run.root)
        for hook in self.hooks:
            self._call(hook, "before_training", run)
            self._started.append(hook)
            has_state = getattr(type(hook), "get_state", Hook.get_state) is not Hook.get_state
            if not (has_state or getattr(hook, "only_tells", False)):
                self._at_start[id(hook)] = callback_state.plain_attributes(hook)

    def get_state(self) -> dict[str, Any]:
        """Return the states of all that have one; warn once of each whose changes are lost."""
        for hook in self.hooks:
            if id(hook) not in self._at_start:
                continue
            before, now = self._at_start[id(hook)], callback_state.plain_attributes(hook)
            if changed := [name for name in now if before.get(name) != now[name]]:
                del self._at_start[id(hook)]
                log.warning(
                    "hook %s changes its %s, which is not saved: a resumed run may differ; give it "
                    "get_state() and set_state(state), with JSON values, or only_tells = True if "
                    "all that it does is to write or to show",
                    type(hook).__name__,
                    ", ".join(changed),
                )
        return callback_state.get_all(self.hooks)

    def call(self, method: str, *arguments: Any) -> None:
        """Call a method of all hooks that have it.

        Raises:
            OSError, FloatingPointError, RuntimeError: naming the hook, if it fails.
        """
        for hook in self.hooks:
            self._call(hook, method, *arguments)

    def has_one_before(self) -> bool:
        """Whether there is a hook that acts before a step."""
        return any(self._acts_before.values())

    def next_stop(self, global_step: int) -> int | None:
        """Return the next step above `global_step` before or after which somebody acts."""
        stops = []
        for hook in self.hooks:
            step = self._acts_at(hook, global_step)
            if step is not None:
                before = self._acts_before[id(hook)] and step - 1 > global_step
                stops.append(step - 1 if before else step)
        return min(stops, default=None)

    def act_before(self, global_step: int) -> list[Hook]:
        """Return the hooks whose `before_step` is to be called before the next step."""
        return [
            hook
            for hook in self.hooks
            if self._acts_before[id(hook)] and self._acts_at(hook, global_step) == global_step + 1
        ]

    def before_step(
        self, hooks: Sequence[Hook], global_step: int, fetches: Any, feeds: Any, batch: Any
    ) -> None:
        """Call `before_step` of some hooks."""
        for hook in hooks:
            self._call(hook, "before_step", global_step, fetches, feeds, batch)

    def after_step(self, begun_at: int, global_step: int, results: Any, *seen: Any) -> None:
        """Call `after_step` of those that want to act at `global_step`.

        Args:
            begun_at: global step at which the call of one or many steps began.
            global_step: steps done.
            results: of the step.
            seen: fetches, feeds and batch, where there was but one step.
        """
        for hook in self.hooks:
            step = self._acts_at(hook, begun_at)
            if step is None or step == global_step:
                with_feeds = self._sees_feeds[id(hook)]
                self._call(hook, "after_step", global_step, *(seen if with_feeds else (results,)))

    def at_exception(self, error: BaseException) -> None:
        """Tell those that know of the run; one that fails at that is named in the log."""
        for hook in self._started:
            try:
                self._call(hook, "at_exception", error)
            except Exception as another:
                log.error("%s", another)

    def _acts_at(self, hook: Hook, global_step: int) -> int | None:
        step = hook.next_step(global_step) if hasattr(hook, "next_step") else None
        if step is None and id(hook) in self._seldom:
            return -(-global_step // self._hook_freq) * self._hook_freq + 1
        if step is None and self._acts_before[id(hook)]:
            return global_step + 1
        return step

    def _call(self, hook: Hook, method: str, *arguments: Any) -> None:
        function = getattr(hook, method, None)
        if function is None or id(hook) in self._mute:
            return
        try:
            function(*arguments)
        except Exception as error:
            if isinstance(hook, IntervalHook):
                raise  # it has named the one of its hooks that failed
            kinds = (OSError, FloatingPointError)
            kind = next((kind for kind in kinds if isinstance(error, kind)), RuntimeError)
            what = str(error) if kind is not RuntimeError else f"{type(error).__name__}: {error}"
            raise kind(f"hook {type(hook).__name__} failed in {method}: {what}") from error


def _acts_before(hook: Any) -> bool:
    """Whether a hook, be it a `Hook` or not, has something to do before a step."""
    return hook.acts_before() if hasattr(hook, "acts_before") else hasattr(hook, "before_step")


def _takes_feeds(hook: Any) -> bool:
    """Whether `after_step` is written as (global_step, fetches, feeds, batch)."""
    parameters = (
        inspect.signature(hook.after_step).parameters.values()
        if hasattr(hook, "after_step")
        else ()
    )
    return sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters) == 4


class EpochLog(Hook):
    """Logs a line per epoch and appends its wall-clock figures to `timing.csv`."""

    only_tells = True
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


class LearningCurve(Hook):
    """Draws `learning_curve.png` after an epoch, not too often, and at the end or a failure."""

    only_tells = True
    SECONDS_BEFORE = 10.0  # a short run draws it once
    SECONDS_BETWEEN = 30.0
    SHARE_OF_TIME = 0.01  # a long history takes long to draw

    def before_training(self, run: Run) -> None:
        super().before_training(run)
        self.next_at = time.monotonic() + self.SECONDS_BEFORE

    def after_epoch(self, epoch: int) -> None:
        if time.monotonic() > self.next_at:
            self._draw()

    def after_training(self) -> None:
        self._draw()

    def at_exception(self, error: BaseException) -> None:
        if not isinstance(error, SystemExit | KeyboardInterrupt):  # an interruption cannot wait
            self._draw()

    def _draw(self) -> None:
        if not self.run.history:
            return
        start = time.monotonic()
        try:
            figures.draw_learning_curve(self.run.root, self.run.history, self.run.best_epoch)
        except OSError as error:  # a picture is no reason to stop; a commit that fails is
            log.warning("learning_curve.png could not be written (%s)", error.strerror)
        end = time.monotonic()
        self.next_at = end + max(self.SECONDS_BETWEEN, (end - start) / self.SHARE_OF_TIME)


class TensorBoard(Hook):
    """Writes the history to `tb/train` and `tb/validation`, which TensorBoard overlays.

    Args:
        prefix: of the tags; None: "epoch_" with an iterator, where "loss" is a curve over steps.
    """

    only_tells = True

    def __init__(self, prefix: str | None = None) -> None:
        self.prefix = prefix

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
            prefix = self.prefix
            if prefix is None:
                prefix = "" if self.run.iterator is None else "epoch_"
            tag = prefix + key.removeprefix("val_")
            self.writers[split].add_scalar(tag, value, step=epoch)
        for writer in self.writers.values():
            writer.flush()

    def after_training(self) -> None:
        for writer in self.writers.values():
            writer.close()
        self.writers = {}  # a later hook's failure comes here again

    def at_exception(self, error: BaseException) -> None:
        self.after_training()


class LastMetrics(Hook):
    """Writes the last figures of training and of validation to `metrics.csv`, a row each."""

    only_tells = True

    def before_training(self, run: Run) -> None:
        super().before_training(run)
        self._write()

    def after_epoch(self, epoch: int) -> None:
        self._write()

    def _write(self) -> None:
        history = self.run.history
        with_validation = [row for row in history if any(key.startswith("val_") for key in row)]
        rows = []
        for split, of_split in (("train", history), ("validation", with_validation)):
            for row in of_split[-1:]:
                figures = {
                    key.removeprefix("val_"): value
                    for key, value in row.items()
                    if key.startswith("val_") is (split == "validation")
                }
                place = {"split": split, "epoch": row["epoch"], "step": row["step"]}
                rows.append(place | figures)
        columns = list(dict.fromkeys(key for row in rows for key in row))
        if rows:
            write_atomically(self.run.root / "metrics.csv", csv_lines(columns, rows).encode())


class EarlyStopping(Hook):
    """Ends the run when `monitor` has not improved for `patience` epochs.

    The count needs no state: it is the distance to the best epoch, which the loop keeps.

    Args:
        patience: epochs, or steps.
        monitor: column of the history; None: the run's own.
        monitor_mode: "min" or "max", whichever is better; "auto" goes by the name. It counts for a
            `monitor` that is given here.
        stop_on_nan: end the run, too, when the column is not a finite number.
        in_steps: count steps; it is looked at the ends of epochs all the same.
        min_steps: never stop before so many steps.
        every_steps: look at the first end of an epoch after each multiple of so many steps.
    """

    def __init__(
        self,
        patience: int,
        monitor: str | None = None,
        monitor_mode: str = "auto",
        stop_on_nan: bool = False,
        in_steps: bool = False,
        min_steps: int = 0,
        every_steps: int = 1,
    ) -> None:
        require_at_least(1, patience=patience, every_steps=every_steps)
        self.patience = patience
        self.in_steps = in_steps
        self.min_steps = min_steps
        self.every_steps = every_steps
        self.monitor = monitor
        self.monitor_mode = monitor_mode
        self.stop_on_nan = stop_on_nan

    def before_training(self, run: Run) -> None:
        super().before_training(run)
        self.lower_is_better = is_lower_better(self.monitor, self.monitor_mode)

    def after_epoch(self, epoch: int) -> None:
        monitor, row = self.monitor or self.run.monitor, self.run.history[-1]
        if monitor is None:
            return
        if monitor not in row:
            if self.run.validates_seldom:
                return
            raise ValueError(f"monitor is {monitor!r}; the history has {', '.join(row)}")
        if self.stop_on_nan and not math.isfinite(row[monitor]):
            self.run.stop_reason = f"{monitor} is {row[monitor]}"
            return
        best, history = self._best_epoch(), self.run.history
        if best is None or not self._is_time():
            return
        unit, since = "epochs", epoch - best
        if self.in_steps:
            unit, since = "steps", row["step"] - history[best]["step"]
        if since >= self.patience:
            self.run.stop_reason = f"{monitor} has not improved for {self.patience} {unit}"

    def _is_time(self) -> bool:
        """Whether there were enough steps, and a multiple of `every_steps` since the last epoch."""
        if self.min_steps == 0 and self.every_steps == 1:
            return True
        step, *earlier = [row["step"] for row in reversed(self.run.history)][:2]
        before = earlier[0] if earlier else 0
        return step >= self.min_steps and step // self.every_steps > before // self.every_steps

    def _best_epoch(self) -> int | None:
        if self.monitor is None:
            return self.run.best_epoch
        return best_of(self.run.history, self.monitor, self.lower_is_better)


class IntervalHook(Hook):
    """Lets its hooks act at certain steps alone, as `before_step` numbers them: 0 is the first.

    These are `start` and every `interval`-th step from there on. With `max_interval` the interval
    doubles each time until it is that, and the next step is the next multiple of it: 1 and 1000
    give 0, 2, 4, 8, …, 512, 1000, 2000, …. They depend on nothing else, so a resumed run finds them
    again without a state.

    Args:
        hooks: called in this order; a `next_step` of their own makes them act more seldom.
        interval: steps from one time to the next, at least 1.
        start: the first step, at least 0.
        stop: no step from this one on; None: there is no end.
        max_interval: at least 1; None: the interval stays as it is.

    Raises:
        ValueError: if a number is out of range.
    """

    NEVER = sys.maxsize

    def __init__(
        self,
        hooks: Sequence[Hook],
        interval: int,
        start: int = 0,
        stop: int | None = None,
        max_interval: int | None = None,
    ) -> None:
        most = interval if max_interval is None else max_interval
        require_at_least(1, interval=interval, max_interval=most)
        require_at_least(0, start=start)
        self.hooks = list(hooks)
        self.interval = interval
        self.start = start
        self.stop = stop
        self.max_interval = most
        self._calls = Hooks(self.hooks)
        self._seen: tuple[Any, ...] = ()

    def next_step(self, global_step: int) -> int:
        """Return the next number of steps done at which one of these steps is done."""
        due = self.first_due(global_step)
        return self.NEVER if due is None else due + 1

    def first_due(self, step: int) -> int | None:
        """Return the first step from `step` on at which to act, or None if there is none."""
        due, interval = self.start, self.interval
        while due < step:
            if interval == self.max_interval:  # from here on, all multiples of it
                missing = step - self.start
            else:
                interval = min(2 * interval, self.max_interval)
                missing = due + 1 - self.start
            due = self.start + -(-missing // interval) * interval
        return due if self.stop is None or due < self.stop else None

    def acts_before(self) -> bool:
        return self._calls.has_one_before()

    def before_training(self, run: Run) -> None:
        super().before_training(run)
        self._calls.start(run)

    def before_epoch(self, epoch: int) -> None:
        self._calls.call("before_epoch", epoch)

    def before_step(
        self, global_step: int, fetches: dict[str, Any], feeds: Any, batch: Any
    ) -> None:
        if self.first_due(global_step) == global_step:
            self._seen = fetches, feeds, batch
            acting = self._calls.act_before(global_step)
            self._calls.before_step(acting, global_step, fetches, feeds, batch)

    def after_step(self, global_step: int, last_results: Any) -> None:
        if self.first_due(global_step - 1) == global_step - 1:
            seen, self._seen = self._seen, ()
            self._calls.after_step(global_step - 1, global_step, last_results, *seen)

    def after_epoch(self, epoch: int) -> None:
        self._calls.call("after_epoch", epoch)

    def after_training(self) -> None:
        self._calls.call("after_training")

    def at_exception(self, error: BaseException) -> None:
        self._calls.at_exception(error)

    def get_state(self) -> dict[str, Any]:
        return self._calls.get_state()

    def set_state(self, state: Mapping[str, Any]) -> None:
        callback_state.put_all(self.hooks, state)


class KeepCheckpoints(Hook):
    """Keeps a commit every so many steps as `checkpoints/model-<steps done>.h5`, and not too many.

    A value is that of the epoch so far, for a "val_…" column that of the epoch before. A checkpoint
    without a finite one counts as the worst, and of two that are equally good the newer is kept.

    Args:
        every: steps from one to the next, at least 1.
        keep: how many stay, at least 1.
        monitor: column of the history that says which are the best; None: the newest stay.
        monitor_mode: "min" or "max", whichever is better; "auto" goes by the name.

    Raises:
        ValueError: if a number is out of range.
    """

    NAME = re.compile(r"model-[0-9]+\.h5")

    def __init__(
        self, every: int, keep: int = 5, monitor: str | None = None, monitor_mode: str = "auto"
    ) -> None:
        require_at_least(1, every=every, keep=keep)
        self.every = every
        self.keep = keep
        self.monitor = monitor
        self.monitor_mode = monitor_mode
        self.kept: list[tuple[int, float | None]] = []  # steps done and value, oldest first

    def before_training(self, run: Run) -> None:
        super().before_training(run)
        self.lower_is_better = is_lower_better(self.monitor, self.monitor_mode)

    def next_step(self, global_step: int) -> int:
        return (global_step // self.every + 1) * self.every

    def after_step(self, global_step: int, last_results: Any) -> None:
        if global_step % self.every:
            return
        self.kept.append((global_step, self._value()))
        best = sorted(self.kept, key=self._rank)[: self.keep]
        # A new one that is superfluous is committed all the same: a resume goes on from there.
        self.run.keep_as = self._name(global_step)
        self.run.discard = [
            self._name(step) for step, value in self.kept if (step, value) not in best
        ]
        self.kept = sorted(best)

    def get_state(self) -> dict[str, Any]:
        return {"kept": [[step, value] for step, value in self.kept]}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Take back the list, less what is not there, as in a run that began with another's commit.

        A file that is not in the list is of an attempt that was killed before its commit, or before
        it could remove the file.
        """
        folder = Path(self.checkpoints)
        require_inside(self._name(step) for step, _ in state["kept"])
        known = {self._name(step) for step, _ in state["kept"]}
        for path in folder.glob("model-*.h5"):
            if self.NAME.fullmatch(path.name) and path.name not in known:
                path.unlink()
        self.kept = [
            (step, value) for step, value in state["kept"] if (folder / self._name(step)).exists()
        ]

    def _value(self) -> float | None:
        """Return what `monitor` is now, or None where there is no finite value yet."""
        if self.monitor is None:
            return None
        of_validation = self.monitor.startswith("val_")
        rows = self.run.history if of_validation else [self.run.results]
        found = next((row for row in reversed(rows) if self.monitor in row), None)
        if found is None and any(rows) and not (of_validation and self.run.validates_seldom):
            raise ValueError(f"monitor is {self.monitor!r}; there are {', '.join(rows[-1])}")
        value = found[self.monitor] if found else math.nan
        return value if math.isfinite(value) else None

    def _rank(self, entry: tuple[int, float | None]) -> tuple[float, int]:
        """Return a key that sorts the best first."""
        step, value = entry
        if value is None:
            return math.inf, -step
        return value if self.lower_is_better else -value, -step

    @staticmethod
    def _name(global_step: int) -> str:
        return f"model-{global_step}.h5"


class LoggingHook(Hook):
    """Logs scalars, images and figures, under the step's number as `before_step` sees it.

    What there is: an operation of the iterator returns {"scalars": …, "images": …, "figures": …},
    each by name, names nested in dictionaries being joined by "/". If there is no such operation,
    the scalars are the figures of the epoch so far.

    Scalars become a line of the log, images a grid in `train/<name>_<step>.png`, figures of
    matplotlib such a file too, after which they are closed. All go to TensorBoard in `tb/train`.

    Images are arrays of shape (N, H, W, C) or (H, W, C) with C in 1, 3, 4, of uint8 or of floats.
    Floats are taken as in [-1, 1] if one of the array is negative, and if not, as in [0, 1].

    Args:
        log_ops: names of operations; "train/log_op" is "log_op". "validation/log_op" is the same
            operation of a `TemplateIterator` on a validation batch, which depends on the step; all
            that it returns has "validation/" before its name.
        tensorboard: whether to write for TensorBoard.
    """

    only_tells = True
    VALIDATION = "validation/"

    def __init__(
        self,
        log_ops: Sequence[str] = ("log_op", "validation/log_op"),
        tensorboard: bool = True,
    ) -> None:
        self.log_ops = [name.removeprefix("train/") for name in log_ops]
        self.tensorboard = tensorboard
        self._writer: Any = None

    def after_step(self, global_step: int, last_results: Any) -> None:
        step = global_step - 1
        logs = self._logs(step, last_results)
        scalars = {name: float(value) for name, value in logs["scalars"].items()}
        if scalars:
            figures = "  ".join(f"{name} {value:.4g}" for name, value in scalars.items())
            log.info("step %d: %s", step, figures)
        pictures = {name: self._save_image(name, step, i) for name, i in logs["images"].items()}
        pictures |= {name: self._save_figure(name, step, f) for name, f in logs["figures"].items()}
        if self.tensorboard and (scalars or pictures):
            self._write(step, scalars, pictures)

    def after_epoch(self, epoch: int) -> None:
        if self._writer is not None:
            self._writer.flush()

    def after_training(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def at_exception(self, error: BaseException) -> None:
        self.after_training()

    def _logs(self, step: int, last_results: Any) -> dict[str, dict[str, Any]]:
        """Return by kind what there is to log, by its name."""
        ops = last_results.get("step_ops") if isinstance(last_results, Mapping) else None
        ops = ops if isinstance(ops, Mapping) else {}
        found = [("", ops[name]) for name in self.log_ops if name in ops]
        if not found:
            found.append(("", {"scalars": self.run.results}))
        of_validation = [
            name.removeprefix(self.VALIDATION)
            for name in self.log_ops
            if name.startswith(self.VALIDATION)
        ]
        if of_validation:
            computed = self._validation_results(step, of_validation)
            found += [(self.VALIDATION, result) for result in computed]
        logs: dict[str, dict[str, Any]] = {"scalars": {}, "images": {}, "figures": {}}
        for prefix, result in found:
            for kind, named in logs.items():
                named |= {prefix + name: value for name, value in leaves(result.get(kind, {}))}
        return logs

    def _validation_results(self, step: int, names: Sequence[str]) -> list[Any]:
        """Return what operations of a `TemplateIterator` give for a validation batch."""
        iterator = self.run.iterator
        if not hasattr(iterator, "step_op") or "validation" not in iterator.datasets:
            return []
        dataset, config = iterator.datasets["validation"], iterator.config
        batch_size = min(config.get("test_batch_size") or config["batch_size"], len(dataset))
        indices = [(step * batch_size + number) % len(dataset) for number in range(batch_size)]
        batch = stack(make_examples(dataset, indices, config.get("seed", 0), epoch=0))
        place = iterator.get_global_step(), iterator.get_epoch_step(), iterator.get_batch_step()
        iterator.set_position(*place, "validation")
        try:
            ops = iterator.step_op(iterator.model, **batch)
            return [ops[name]() for name in names if name in ops]
        finally:
            iterator.set_position(*place)

    def _save_image(self, name: str, step: int, images: Any) -> Array:
        picture = tile(_pixels(name, images))
        write_atomically(self._path(name, step), tf.io.encode_png(picture).numpy())
        return picture

    def _save_figure(self, name: str, step: int, figure: Any) -> Array:
        from matplotlib import pyplot

        path = self._path(name, step)
        figures.save_figure(figure, path)
        pyplot.close(figure)  # it keeps those that it has made
        return tf.io.decode_png(path.read_bytes(), channels=4).numpy()

    def _path(self, name: str, step: int) -> Path:
        Path(self.train).mkdir(exist_ok=True)
        file_name = re.sub(r"[^\w.-]", "_", name)
        return Path(self.train, f"{file_name}_{step:08d}.png")

    def _write(
        self, step: int, scalars: Mapping[str, float], pictures: Mapping[str, Array]
    ) -> None:
        if self._writer is None:
            self._writer = tf.summary.create_file_writer(str(Path(self.root, "tb", "train")))
        with self._writer.as_default(step):
            for name, value in scalars.items():
                tf.summary.scalar(name, value)
            for name, picture in pictures.items():
                tf.summary.image(name, picture[np.newaxis])


def of_iterators(config: Mapping[str, Any]) -> list[Hook]:
    """Return the hooks that a config with an iterator asks for by its keys."""
    hooks: list[Hook] = [
        IntervalHook(
            [LoggingHook(tensorboard=config["tensorboard"])],
            config["start_log_freq"],
            max_interval=config["log_freq"],
        )
    ]
    if config["ckpt_freq"]:
        hooks.append(
            KeepCheckpoints(
                config["ckpt_freq"], config["ckpt_keep"], config["monitor"], config["monitor_mode"]
            )
        )
    return hooks


def tile(images: Array) -> Array:
    """Return images as one, in rows from left to right; what is left over is 0.

    Args:
        images: uint8 or float array of shape (N, H, W, C), N at least 1.

    Returns:
        array of the same dtype and shape (rows * H, columns * W, C): as many columns as rows, or
        one more.
    """
    number, height, width, channels = images.shape
    columns = math.ceil(math.sqrt(number))
    rows = math.ceil(number / columns)
    cells = np.zeros((rows * columns, height, width, channels), images.dtype)
    cells[:number] = images
    grid = cells.reshape(rows, columns, height, width, channels).swapaxes(1, 2)
    return grid.reshape(rows * height, columns * width, channels)


def _pixels(name: str, images: Any) -> Array:
    """Return images as uint8 of shape (N, H, W, C); see `LoggingHook`.

    Raises:
        ValueError: if they are no images.
    """
    array = np.asarray(images)
    array = array[np.newaxis] if array.ndim == 3 else array
    is_float = np.issubdtype(array.dtype, np.floating)
    if array.ndim != 4 or array.shape[-1] not in (1, 3, 4) or 0 in array.shape:
        raise ValueError(
            f"image {name!r} has the shape {np.shape(images)}; expected (N, H, W, C) or (H, W, C) "
            "with 1, 3 or 4 channels"
        )
    if not is_float and array.dtype != np.uint8:
        raise ValueError(f"image {name!r} is of {array.dtype}; expected uint8, or floats")
    if not is_float:
        return array
    array = np.nan_to_num(array.astype(np.float64))
    array = (array + 1) / 2 if array.min() < 0 else array
    return np.rint(array.clip(0, 1) * 255).astype(np.uint8)
