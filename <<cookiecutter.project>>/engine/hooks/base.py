"""Calls hooks around the steps of training: progress, curves, logs, checkpoints, early stopping.

A hook overrides what it needs of `Hook`. What `get_state` returns is saved in each checkpoint."""

import inspect
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.batches import require_at_least
from engine.checkpoints import callback_state

log = logging.getLogger(__name__)


@dataclass
class Run:
    """What hooks may look at; one object for the whole run, kept up to date by the loop."""

    root: Path  # the run folder
    model: Any  # the one that is trained
    num_epochs: int  # after which the run is finished
    steps_per_epoch: int
    history: list[dict[str, Any]]  # a row per finished epoch
    global_step: int  # steps done since the run began, over all attempts
    best_epoch: int | None  # by `monitor` so far
    monitor: str | None  # column of the history that says how good the model is
    num_steps: int | None = None  # after which the run is finished; None: `num_epochs` decides
    validates_seldom: bool = False  # are there epochs without validation?
    iterator: Any = None  # does the steps; None: the model's own training step does
    results: Mapping[str, float] = field(default_factory=dict)  # metrics of the epoch so far
    # Set it to a file name in `after_step` or `after_epoch`: a checkpoint is then saved, and also
    # kept under that name in `checkpoints/`.
    keep_as: str | None = None
    discard: Sequence[str] = ()  # names in `checkpoints/` that this checkpoint makes superfluous
    stop_reason: str | None = None  # set it to end the run after this epoch


class Hook:
    """Does nothing; override what you need."""

    # Does it only write or show something? Then only the chief of several workers calls it. A hook
    # that may change the run is called by all; what it writes into `root` only the chief keeps.
    only_tells = False
    run: Run  # what there is to know of the run, from `before_training` on
    root: str  # the run folder; these are folders in it:
    code: str
    checkpoints: str
    train: str
    eval: str

    def before_training(self, run: Run) -> None:
        """Called once, before the state is restored."""
        self.run = run

    def before_epoch(self, epoch: int) -> None:
        """Called before the first step of an epoch, counted from 0; if a run is resumed within
        an epoch, before the state is restored, which undoes what the hook changes."""

    def next_step(self, global_step: int) -> int | None:
        """Return the next step, a number above `global_step`, before which `before_step` and after
        which `after_step` is to be called. None: a hook with a `before_step` acts at every step,
        another one whenever a call of many steps ends."""
        return None

    def before_step(
        self, global_step: int, fetches: dict[str, Any], feeds: Any, batch: Any
    ) -> None:
        """Called before a step, when `global_step` steps are done. It may change `fetches`, nested
        functions that the step will call, and `feeds`, its copy of the batch, but not `batch`."""

    def after_step(self, global_step: int, last_results: Any) -> None:
        """Called after a step, when `global_step` steps are done, with a Keras model's metrics over
        the epoch so far, or what an iterator's `run` has returned. A method that is written as
        `after_step(self, global_step, fetches, feeds, batch)` is given these instead."""

    def after_epoch(self, epoch: int) -> None:
        """Called after validation, before the checkpoint; the epoch's row is `run.history[-1]`."""

    def after_training(self) -> None:
        """Called when the last epoch is saved."""

    def at_exception(self, error: BaseException) -> None:
        """Called when training ends by an exception or a signal."""

    def get_state(self) -> dict[str, Any]:
        """Return what a resumed run needs, as JSON values and arrays."""
        return {}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Take back what `get_state` returned at the latest checkpoint."""


class WriterHook(Hook):
    """Flushes its `writer`, if there is one, after each epoch, and closes it at the end."""

    only_tells = True
    writer: Any = None

    def after_epoch(self, epoch: int) -> None:
        if self.writer is not None:
            self.writer.flush()

    def after_training(self) -> None:
        if self.writer is not None:  # a later hook's failure comes here again
            self.writer.close()
        self.writer = None

    def at_exception(self, error: BaseException) -> None:
        self.after_training()


def give_addresses(thing: Any, root: Path) -> None:
    """Set the attributes by which hooks and iterators find the run folder and what is in it."""
    thing.root = str(root)
    for name in ("code", "checkpoints", "train", "eval"):
        setattr(thing, name, str(root / name))


class Hooks:
    """Calls hooks in their order; those that are `seldom` at every `hook_freq`-th step only."""

    def __init__(
        self,
        hooks: Sequence[Hook],
        seldom: Sequence[Hook] = (),
        hook_freq: int = 1,
        is_chief: bool = True,
    ) -> None:
        self.hooks = list(hooks)
        self._intervals = list(_expanded(hooks))
        self._every = every = [hook for hook, _ in self._intervals]
        # Hooks that do not act here still decide where a call of many steps is to end.
        tell = {id(hook) for hook in every if getattr(hook, "only_tells", False)}
        self._mute = set() if is_chief else tell
        self._seldom = {id(hook) for hook in seldom} if hook_freq > 1 else set()
        self._hook_freq = hook_freq
        self._sees_feeds = {id(hook) for hook in every if _takes_feeds(hook)}
        self._acts_before = {id(hook) for hook in every if _acts_before(hook)}
        self._started: list[Hook] = []

    def start(self, run: Run) -> None:
        """Tell all of them of the run."""
        for hook in self._every:
            give_addresses(hook, run.root)
        for hook in self._every:
            self._call(hook, "before_training", run)
            self._started.append(hook)

    def call(self, method: str, *arguments: Any) -> None:
        """Call a method of all hooks that have it; an error names the hook."""
        for hook in self._every:
            self._call(hook, method, *arguments)

    def next_stop(self, global_step: int) -> int | None:
        """Return the next step above `global_step` before or after which somebody acts."""
        stops = []
        for hook, intervals in self._intervals:
            due = [interval.next_step(global_step) for interval in intervals]
            if (step := max(due) if due else self._acts_at(hook, global_step)) is not None:
                before = id(hook) in self._acts_before and step - 1 > global_step
                stops.append(step - before)
        return min(stops, default=None)

    def act_before(self, global_step: int) -> list[Hook]:
        """Return the hooks whose `before_step` is to be called before the next step."""
        acting = self._acting(global_step, global_step + 1)
        return [hook for hook in acting if id(hook) in self._acts_before]

    def before_step(self, hooks: Sequence[Hook], *arguments: Any) -> None:
        """Call `before_step` of some hooks with its arguments."""
        for hook in hooks:
            self._call(hook, "before_step", *arguments)

    def after_step(self, begun_at: int, global_step: int, results: Any, *seen: Any) -> None:
        """Call `after_step` of those that act; `seen` are fetches, feeds, batch of one step."""
        for hook in self._acting(begun_at, global_step):
            told = seen if id(hook) in self._sees_feeds else (results,)
            self._call(hook, "after_step", global_step, *told)

    def at_exception(self, error: BaseException) -> None:
        """Tell those that know of the run; one that fails at that is named in the log."""
        for hook in self._started:
            try:
                self._call(hook, "at_exception", error)
            except Exception as another:
                log.error("%s", another)

    def _acting(self, begun_at: int, global_step: int) -> Iterator[Hook]:
        """Yield those that act at `global_step`, where a call ends that began at `begun_at`."""
        for hook, intervals in self._intervals:
            since = global_step - 1 if intervals else begun_at
            is_due = all(interval.next_step(since) == global_step for interval in intervals)
            if is_due and self._acts_at(hook, since) in (None, global_step):
                yield hook

    def _acts_at(self, hook: Hook, global_step: int) -> int | None:
        step = hook.next_step(global_step) if hasattr(hook, "next_step") else None
        if step is None and id(hook) in self._seldom:
            return -(-global_step // self._hook_freq) * self._hook_freq + 1
        if step is None and id(hook) in self._acts_before:
            return global_step + 1
        return step

    def _call(self, hook: Hook, method: str, *arguments: Any) -> None:
        function = getattr(hook, method, None)
        if function is None or id(hook) in self._mute:
            return
        try:
            function(*arguments)
        except Exception as error:
            kinds = (OSError, FloatingPointError)
            kind = next((kind for kind in kinds if isinstance(error, kind)), RuntimeError)
            what = str(error) if kind is not RuntimeError else f"{type(error).__name__}: {error}"
            raise kind(f"hook {type(hook).__name__} failed in {method}: {what}") from error


def _expanded(
    hooks: Sequence[Hook], intervals: tuple["IntervalHook", ...] = ()
) -> Iterator[tuple[Hook, tuple["IntervalHook", ...]]]:
    """Yield the hooks that act, each with the `IntervalHook`s that it is in."""
    for hook in hooks:
        if isinstance(hook, IntervalHook):
            yield from _expanded(hook.hooks, (*intervals, hook))
        else:
            yield hook, intervals


def _acts_before(hook: Any) -> bool:
    """Whether a hook wants to see what a step is given; if nobody does, steps may be grouped."""
    function = getattr(hook, "before_step", Hook.before_step)
    return getattr(function, "__func__", function) is not Hook.before_step or _takes_feeds(hook)


def _takes_feeds(hook: Any) -> bool:
    """Whether `after_step` is written as (global_step, fetches, feeds, batch)."""
    if not hasattr(hook, "after_step"):
        return False
    parameters = inspect.signature(hook.after_step).parameters.values()
    return sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters) == 4


class IntervalHook(Hook):
    """Lets its hooks act only at certain steps, as `before_step` numbers them: 0 is the first.

    These are `start` and every `interval`-th step from there on, below `stop`. With `max_interval`
    the interval doubles each time until it is that: 1 and 1000 give 0, 2, 4, 8, …, 512, 1000, 2000,
    …. With `modify_each` it doubles only after that many times, and without end if there is no
    `max_interval`. A `next_step` of the hooks makes them act less often."""

    def __init__(
        self,
        hooks: Sequence[Hook],
        interval: int,
        start: int = 0,
        stop: int | None = None,
        *,  # EDflow's order of what follows is another
        max_interval: int | None = None,
        modify_each: float | None = None,
        get_step: Callable[[], int] | None = None,
    ) -> None:
        if get_step is not None and getattr(get_step, "__name__", "") != "get_global_step":
            raise ValueError("get_step is not an iterator's get_global_step; leave it out")
        self.hooks = list(hooks)
        self.interval, self.start, self.stop = interval, start, stop
        if max_interval is None:
            max_interval = interval if modify_each is None else sys.maxsize
        self.max_interval = max_interval
        # EDflow writes float("inf") for never.
        self.modify_each = 1 if modify_each is None else int(min(modify_each, sys.maxsize))
        modify_each = self.modify_each
        require_at_least(1, interval=interval, max_interval=max_interval, modify_each=modify_each)
        require_at_least(0, start=start)

    def next_step(self, global_step: int) -> int:
        due, interval = self.start, self.interval
        while interval != self.max_interval:
            last = due + (self.modify_each - 1) * interval  # before the interval doubles
            if global_step <= last:
                break
            interval = min(2 * interval, self.max_interval)
            due = self.start + ((last - self.start) // interval + 1) * interval
        due += max(-(-(global_step - due) // interval), 0) * interval
        return due + 1 if self.stop is None or due < self.stop else sys.maxsize

    def get_state(self) -> dict[str, Any]:
        return callback_state.get_all(self.hooks)

    def set_state(self, state: Mapping[str, Any]) -> None:
        callback_state.put_all(self.hooks, state)
