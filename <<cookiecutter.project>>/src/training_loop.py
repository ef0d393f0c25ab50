"""Trains in a resumable loop. Read it from top to bottom: that is the order of events.

It is never given the test set. `engine/training/session.py` begins or resumes a run."""

import functools
import logging
import sys
import time
from typing import Any

from engine.hooks import Hooks
from engine.training import Session

log = logging.getLogger(__name__)


def training_loop(
    session: Session,
    *,
    checkpoint_steps: int = 0,
    checkpoint_seconds: float = 0,
    validation_seconds: float = 0,
) -> list[dict[str, Any]]:
    """Train until all epochs or steps are done, from the latest checkpoint on, if there is one.

    Args:
        session: the run: what it does, for how long, and where it begins or is resumed.
        checkpoint_steps: save a checkpoint every N steps, besides each epoch's end; 0: never.
        checkpoint_seconds: save one every N seconds; 0: never.
        validation_seconds: validate at most every N seconds of the process, and after the
            last epoch; the metrics then depend on the clock. 0: after every epoch.

    Returns:
        The history, a row per epoch.

    Raises:
        FloatingPointError: if a loss or weight is not finite and `session.on_nan` is "stop".
        SystemExit: with code 75, when a signal to stop came: the state is saved.
        KeyError: if the history has no column `monitor`.
        ValueError: if a checkpoint belongs to another model.
        OSError: if a checkpoint cannot be written.
        RuntimeError: if a hook fails; it is named."""
    run, hooks, callbacks = session.run, session.hooks, session.callbacks
    steps, validation = session.work.steps, session.work.validation
    if session.nothing_to_do:
        session.end_again()
        return run.history
    run.validates_seldom = validation_seconds > 0
    saved_at = validated_at = time.monotonic()
    with session.open() as signals:
        step, learning_rate = session.step, session.learning_rate
        for epoch in range(session.epoch, run.num_epochs):
            # ---- begin the epoch ---------------------------------------------------------------
            if step:  # a run is resumed in the middle of its epoch
                # This epoch began before the interruption; restoring undoes what is repeated here.
                hooks.call("before_epoch", epoch)
                callbacks.on_epoch_begin(epoch)
                session.restore()
            else:
                if epoch == session.epoch:
                    session.restore()
                hooks.call("before_epoch", epoch)
                steps.begin_epoch(epoch)
                callbacks.on_epoch_begin(epoch)
                learning_rate = steps.learning_rate

            # ---- train -------------------------------------------------------------------------
            begin = run.global_step - step
            end = min(begin + run.steps_per_epoch, run.num_steps or sys.maxsize)
            while run.global_step < end:
                until = min(next_stop(run.global_step, checkpoint_steps, hooks), end)
                then = min(next_stop(until, checkpoint_steps, hooks), end)
                if steps.one_by_one:
                    callbacks.on_train_batch_begin(step)
                acting, begun_at = hooks.act_before(run.global_step), run.global_step
                before = functools.partial(hooks.before_step, acting, begun_at) if acting else None
                call = steps.run(epoch, step, until - begin, then - begin, before)
                run.global_step += call.step - step
                step, run.results = call.step, call.results
                if call.not_finite is not None and session.on_nan == "stop":
                    where = f"at step {call.not_finite + 1} of epoch {epoch + 1}"
                    how = "the last checkpoint is kept, and --on_nan=continue goes on all the same"
                    raise FloatingPointError(f"a loss is not a finite number {where}; {how}")
                if steps.one_by_one:
                    callbacks.on_train_batch_end(step - 1, call.results)
                    if session.wants_to_stop:  # as in `fit`, the epoch ends here
                        end = run.global_step
                hooks.after_step(begun_at, run.global_step, call.last_results, *call.seen)
                is_late = time.monotonic() - saved_at > checkpoint_seconds > 0
                steps.size, to_save = signals.agree(steps.size, is_late)
                to_save |= checkpoint_steps > 0 and run.global_step % checkpoint_steps == 0
                to_save &= run.global_step < end and not signals.name
                if to_save or run.keep_as:
                    session.save(session.snapshot(epoch, step, learning_rate))
                    saved_at = time.monotonic()
                if signals.name:
                    break

            # ---- validate, unless a signal came -----------------------------------------------
            is_last = epoch + 1 == run.num_epochs or run.global_step == run.num_steps
            is_last |= session.wants_to_stop
            is_late = time.monotonic() - validated_at >= validation_seconds
            (is_due,) = signals.agree(is_last or is_late)
            is_cut, logs = step < run.steps_per_epoch, dict(run.results)
            trained = None
            if signals.name or is_cut or (validation is not None and is_due):
                # Validation overwrites the metrics of the epoch.
                trained = session.snapshot(epoch, step, learning_rate)
            if validation is not None and is_due and not signals.name:
                metrics = validation.run(callbacks, stop=signals.is_agreed)
                logs |= {f"val_{name}": value for name, value in (metrics or {}).items()}
                validated_at = time.monotonic()
            if signals.name:
                session.stop(trained or session.snapshot(epoch, step, learning_rate), signals)

            # ---- end the epoch and save it ----------------------------------------------------
            row = {"epoch": epoch, "step": run.global_step, "learning_rate": learning_rate} | logs
            if learning_rate is None:
                del row["learning_rate"]
            callbacks.on_epoch_end(epoch, logs)
            improves = session.add_row(row)  # and what callbacks have added to the logs
            hooks.call("after_epoch", epoch)
            cut = trained if is_cut and not session.wants_to_stop else None
            is_over = session.end_epoch(epoch, step, learning_rate, improves, not is_due, cut)
            step, saved_at = 0, time.monotonic()
            if is_over:
                break
    if run.best_epoch is not None and run.monitor is not None:
        best = run.history[run.best_epoch][run.monitor]
        log.info("best epoch %d: %s %.4g", run.best_epoch + 1, run.monitor, best)
    return run.history


def next_stop(global_step: int, checkpoint_steps: int, hooks: Hooks) -> int:
    """Return the first step after `global_step` at which a hook acts or a checkpoint is due."""
    stops = [hooks.next_stop(global_step)]
    if checkpoint_steps:
        stops.append((global_step // checkpoint_steps + 1) * checkpoint_steps)
    return min((stop for stop in stops if stop is not None), default=global_step + 1_000_000)
