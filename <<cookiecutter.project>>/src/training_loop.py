"""The resumable training loop. Read it from top to bottom: that is the order of events.

It is never given the test set.
"""

import functools
import logging
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import keras

from engine.batches import batch_source
from engine.checkpoints import (
    RESTORE_ALL,
    RESTORE_WEIGHTS,
    Checkpoint,
    Snapshot,
    best_of,
    callback_state,
    is_best,
    is_lower_better,
)
from engine.devices import INTERRUPTED, Workers
from engine.hooks import Hook, Hooks, Run
from engine.iterators import (
    IteratorSteps,
    IteratorValidation,
    PyHookedModelIterator,
)
from engine.training import (
    NEW_RUN,
    SignalsToFlag,
    Steps,
    Traced,
    Validation,
    next_stop,
    trace,
)

log = logging.getLogger(__name__)
LearningRates = Sequence[tuple[int, float]]


def training_loop(
    model: Any,
    train: Any,
    valid: Any,
    save_path: Path,
    num_epochs: int = 0,
    num_steps: int | None = None,
    iterator: PyHookedModelIterator | None = None,
    traced: "Traced | None" = None,
    learning_rates: LearningRates | None = None,
    monitor: str | None = "val_loss",
    monitor_mode: str = "auto",
    on_nan: str = "stop",
    checkpoint_steps: int = 0,
    checkpoint_seconds: float = 0,
    seed: int = 0,
    fingerprint: dict[str, Any] | None = None,
    inexact: Sequence[str] = (),
    hooks: Sequence[Hook] = (),
    callbacks: Sequence[keras.callbacks.Callback] = (),
    start_from: Path | None = None,
    retrain: bool = False,
    new_rate: bool = False,
    validation_seconds: float = 0,
) -> list[dict[str, Any]]:
    """Train until all epochs or steps are done, going on where the folder's last commit stands.

    Args:
        model: compiled; its own `train_step` is used if it has one. With an iterator: any object.
        train: batches by epoch and step, or what `batch_source` makes such a source of.
        valid: features and labels to validate on after each epoch, or a batch source; None: there
            is no validation.
        save_path: the run folder, which exists.
        num_epochs: epochs in all, those of earlier attempts included.
        num_steps: steps in all, whatever `num_epochs` says; the last epoch may be cut short.
        iterator: what does the steps; None: the model's training step does.
        traced: what `trace` has made of the model, or of the iterator; None: it is done here.
        learning_rates: pairs of `until_epoch` and the rate that holds while `epoch < until_epoch`,
            the last one to the end; None: the optimizer's own rate or schedule.
        monitor: column of the history that decides which epoch is the best; None: nothing does.
        monitor_mode: "min" or "max", whichever is better; "auto" goes by the name.
        on_nan: "stop" or "continue" when the loss is not a finite number.
        checkpoint_steps: commit every so many steps, beside the end of each epoch; 0: never.
        checkpoint_seconds: commit when so many seconds have passed; 0: never.
        seed: of the order of batches, where the data does not decide it.
        fingerprint: what has to be the same when the run is resumed; see
            `engine.training.fingerprint`.
        inexact: what is not, in this attempt; from here on the commits say so.
        hooks: see `engine.hooks`; those of the iterator come after them.
        callbacks: any Keras callbacks.
        validation_seconds: validate at most every so many seconds of the process, and after the
            last epoch; the figures then depend on the clock. 0: after every epoch.
        start_from: a commit of another run to begin with, while the folder has none of its own.
        retrain: take only the weights from there, and begin at step 0.
        new_rate: take all but the learning rate, which is this run's own.

    Returns:
        The history, a row per epoch.

    Raises:
        FloatingPointError: if the loss is not finite and `on_nan` is "stop".
        SystemExit: with code 75, when SIGTERM, SIGINT, SIGUSR1 or SIGHUP came: the step has ended
            and its state is committed.
        KeyError: if the history has no column `monitor`.
        ValueError: if "auto" does not know whether less of `monitor` is better, or a commit is one
            of another model.
        OSError: if a commit cannot be written.
        RuntimeError: if a hook fails; it is named.
        UsageError: if a step uses what no commit holds; see `engine.training.guard`.
    """
    # ---- get ready -----------------------------------------------------------------------------
    workers = Workers(getattr(model, "distribute_strategy", None))
    source = batch_source(train, seed)
    if num_steps is not None:
        num_epochs = -(-num_steps // source.steps_per_epoch)
    lower_is_better = is_lower_better(monitor, monitor_mode)
    steps: Steps | IteratorSteps
    validation: Validation | IteratorValidation | None = None
    if iterator is None:
        traced = traced or trace(model, source, valid, callbacks, hooks, num_steps)
        steps, validation = traced.steps, traced.validation
        checkpoint = Checkpoint(save_path, model)
        calls = Hooks(hooks, is_chief=workers.is_chief)
    else:
        steps = IteratorSteps(iterator, source, seed)
        validation = IteratorValidation(iterator, valid, seed) if valid is not None else None
        checkpoint = Checkpoint(save_path, iterator.model, iterator.variables)
        calls = Hooks([*hooks, *iterator.hooks], iterator.hooks, iterator.hook_freq)
    hooks = calls.hooks
    new_run = NEW_RUN | {"history": [], "inexact": []}
    state, restores = checkpoint.read(), RESTORE_ALL
    own_rate = None
    if state is not None and start_from is not None:
        log.info("%s has a commit of its own: what it began with has had its effect", save_path)
    elif state is None and start_from is not None:
        other = checkpoint.read_other(start_from)
        if retrain:
            state, restores = new_run | {"steps": other["steps"]}, RESTORE_WEIGHTS
        else:
            best_epoch = best_of(other["history"], monitor, lower_is_better)
            checkpoint.take_along(other, best_epoch)
            state = other | {"best_epoch": best_epoch}
            if new_rate and learning_rates is not None:
                own_rate = rate_in_epoch(learning_rates, state["epoch"])
            elif new_rate:
                own_rate = float(model.optimizer.learning_rate)
        log.info("starting from %s%s", start_from, ", its weights alone" if retrain else "")
    is_new = state is None
    state = state or new_run
    if state["is_cut"] and num_steps is not None and state["global_step"] < num_steps:
        state["history"].pop()  # the epoch goes on from where `num_steps` had cut it
        state["best_epoch"] = best_of(state["history"], monitor, lower_is_better)
    root = save_path
    if not workers.is_chief:
        # What hooks and callbacks write on the other workers is thrown away.
        scratch = tempfile.TemporaryDirectory()
        root = Path(scratch.name)
        callback_state.redirect(callbacks, root)
    run = Run(
        root=root,
        model=model,
        num_epochs=num_epochs,
        num_steps=num_steps,
        validates_seldom=validation_seconds > 0,
        iterator=iterator,
        steps_per_epoch=source.steps_per_epoch,
        history=state["history"],
        global_step=state["global_step"],
        best_epoch=state["best_epoch"],
        monitor=monitor,
    )
    # After a signal at the very last step, its epoch has yet to be validated and ended.
    is_open = state["step"] > 0 and not state["is_cut"]
    all_steps_done = num_steps is not None and state["global_step"] >= num_steps and not is_open
    if state["stop_reason"] or state["epoch"] >= num_epochs or all_steps_done:
        done = f"{num_steps} steps" if all_steps_done else f"{num_epochs} epochs"
        log.info("nothing to do: %s", state["stop_reason"] or f"{done} are done")
        calls.start(run)  # a kill may have come before the hooks' last word
        calls.call("after_training")
        checkpoint.close()
        return state["history"]
    if inexact:
        log.warning("from here on the run is not bit for bit the same: %s", "; ".join(inexact))
    unsaved = traced.guard.found if traced is not None else []
    if unsaved:
        log.warning(
            "a resumed run will have other bits, for no checkpoint holds %s", "; ".join(unsaved)
        )
    if inexact or unsaved:
        differs = [*inexact, *unsaved]
        state["inexact"].append({"global_step": state["global_step"], "differs": differs})
    for callback in callbacks:
        if not callback_state.is_known(callback):
            log.warning(
                "%s keeps a state that is not saved: a resumed run may differ; give it get_state() "
                "and set_state(state), with JSON values",
                type(callback).__name__,
            )
    # Callbacks ask for a Keras model, also where an iterator trains something else.
    keras_model = model if isinstance(model, keras.Model) else keras.Sequential()
    keras_callbacks = keras.callbacks.CallbackList(
        callbacks, model=keras_model, verbose=0, epochs=num_epochs, steps=source.steps_per_epoch
    )
    keras_model.stop_training = False
    first_epoch, step, learning_rate = state["epoch"], state["step"], state["learning_rate"]
    results = state["results"]  # the figures of the epoch so far
    committed_at = validated_at = time.monotonic()

    def snapshot(epoch: int, step: int) -> Snapshot:
        """Copy everything as it is before `step` of `epoch`."""
        return checkpoint.snapshot(
            {
                "epoch": epoch,
                "step": step,
                "global_step": run.global_step,
                "learning_rate": learning_rate if step else 0.0,
                "results": results if step else {},
                "steps": steps.get_state(),
                "best_epoch": run.best_epoch,
                "is_cut": False,
                "stop_reason": run.stop_reason,
                "history": run.history,
                "hooks": calls.get_state(),
                "callbacks": callback_state.get_all(callbacks),
                "inexact": state["inexact"],
                "fingerprint": fingerprint or {},
            }
        )

    def restore() -> None:
        """Give everything the state that was read."""
        checkpoint.restore(restores)
        if restores is RESTORE_WEIGHTS:
            steps.set_weights(state["steps"])
        else:
            steps.set_state(state["steps"])
            callback_state.put_all(hooks, state["hooks"])
            callback_state.put_all(callbacks, state["callbacks"])
        if own_rate is not None:
            model.optimizer.learning_rate = own_rate

    try:
        with SignalsToFlag(workers) as received:
            calls.start(run)
            keras_callbacks.on_train_begin()
            if isinstance(steps, Steps) and traced and traced.may_be_outdated:
                steps.forget()
            if iterator is None or not is_new:
                steps.compile()
                checkpoint.prepare()
            if isinstance(steps, IteratorSteps) and not checkpoint.fits(restores):
                steps.dry_run()  # what a first step makes has to be there to be restored
                checkpoint.prepare()

            for epoch in range(first_epoch, num_epochs):
                # ---- begin the epoch, or restore the middle of it -------------------------------
                if epoch == first_epoch and step:
                    # What is done as an epoch begins was done already; restoring undoes it.
                    calls.call("before_epoch", epoch)
                    keras_callbacks.on_epoch_begin(epoch)
                    restore()
                    log.info("continuing after step %d of epoch %d", step, epoch + 1)
                else:
                    if epoch == first_epoch and not is_new:
                        restore()
                        log.info("continuing after epoch %d", epoch)
                    calls.call("before_epoch", epoch)
                    steps.begin_epoch(epoch)
                    if learning_rates is not None:
                        rate = rate_in_epoch(learning_rates, epoch)
                        # Between two of its rates the schedule leaves a callback's changes alone.
                        if epoch == 0 or rate != rate_in_epoch(learning_rates, epoch - 1):
                            model.optimizer.learning_rate = rate
                    keras_callbacks.on_epoch_begin(epoch)
                    learning_rate = steps.learning_rate

                # ---- train -----------------------------------------------------------------------
                begin = run.global_step - step
                end = begin + source.steps_per_epoch
                if num_steps is not None:
                    end = min(end, num_steps)
                while run.global_step < end:
                    until = min(next_stop(run.global_step, checkpoint_steps, calls), end)
                    then = min(next_stop(until, checkpoint_steps, calls), end)
                    if steps.one_by_one:
                        keras_callbacks.on_train_batch_begin(step)
                    acting, begun_at = calls.act_before(run.global_step), run.global_step
                    before = functools.partial(calls.before_step, acting, begun_at)
                    call = steps.run(
                        epoch, step, until - begin, then - begin, before if acting else None
                    )
                    run.global_step += call.step - step
                    step, results = call.step, call.results
                    run.results = results
                    if call.not_finite is not None and on_nan == "stop":
                        raise FloatingPointError(
                            f"the loss is not a number at step {call.not_finite + 1} of epoch "
                            f"{epoch + 1}; the last commit is kept, and --on_nan=continue goes on "
                            "all the same"
                        )
                    if steps.one_by_one:
                        keras_callbacks.on_train_batch_end(step - 1, call.results)
                    calls.after_step(begun_at, run.global_step, call.last_results, *call.seen)
                    due = checkpoint_steps and run.global_step % checkpoint_steps == 0
                    late = time.monotonic() - committed_at > checkpoint_seconds > 0
                    steps.size, is_late = received.agree(steps.size, late)
                    wanted = (due or is_late) and run.global_step < end and not received.name
                    if run.keep_as or wanted:
                        checkpoint.commit(
                            snapshot(epoch, step), keep_as=run.keep_as, discard=run.discard
                        )
                        run.keep_as, run.discard = None, ()
                        committed_at = time.monotonic()
                    if received.name:
                        break

                # ---- validate, unless a signal came ---------------------------------------------
                is_cut = step < source.steps_per_epoch
                is_last = epoch + 1 == num_epochs or run.global_step == num_steps
                is_due = time.monotonic() - validated_at >= validation_seconds or is_last
                is_due = bool(received.agree(is_due)[0])
                validates = validation is not None and is_due
                # Validation uses the metrics of the epoch for its own.
                before_validation = snapshot(epoch, step) if validates or is_cut else None
                logs = dict(results)
                if validation is not None and is_due and not received.name:
                    figures = validation.run(keras_callbacks, stop=received.is_agreed)
                    logs |= {f"val_{key}": value for key, value in (figures or {}).items()}
                    validated_at = time.monotonic()
                if received.name:
                    checkpoint.commit(before_validation or snapshot(epoch, step))
                    checkpoint.wait()
                    received.agree()  # nobody leaves before the commit is there
                    log.warning(
                        "%s: stopped at step %d of epoch %d", received.name, step, epoch + 1
                    )
                    raise SystemExit(INTERRUPTED)

                # ---- end the epoch and commit it ------------------------------------------------
                row: dict[str, Any] = {"epoch": epoch, "step": run.global_step}
                if learning_rate is not None:
                    row["learning_rate"] = learning_rate
                run.history.append(row | logs)
                improves = (
                    monitor is not None
                    and (is_due or monitor in run.history[-1])
                    and is_best(run.history, run.best_epoch, monitor, lower_is_better)
                )
                if improves:
                    run.best_epoch = epoch
                keras_callbacks.on_epoch_end(epoch, logs)
                calls.call("after_epoch", epoch)
                if keras_model.stop_training:
                    run.stop_reason = run.stop_reason or "a Keras callback stopped the training"
                if is_cut and before_validation:
                    # More steps, if they come, belong to this epoch: it stays open.
                    at_end, taken = snapshot(epoch, step), before_validation
                    changes = {"best_epoch": run.best_epoch, "is_cut": True}
                    ended = replace(at_end, values=taken.values, state=taken.state | changes)
                else:
                    step = 0
                    ended = snapshot(epoch + 1, step)
                checkpoint.commit(ended, improves)
                committed_at = time.monotonic()
                if run.stop_reason:
                    log.info("stopped after epoch %d: %s", epoch + 1, run.stop_reason)
                    break

            checkpoint.finish()
            received.agree()
            keras_callbacks.on_train_end()
            calls.call("after_training")
            if run.best_epoch is not None and monitor is not None:
                best = run.history[run.best_epoch][monitor]
                log.info("best epoch %d: %s %.4g", run.best_epoch + 1, monitor, best)
    except BaseException as error:
        calls.at_exception(error)
        raise
    finally:
        steps.close()
        checkpoint.close()
    return run.history


def rate_in_epoch(learning_rates: LearningRates, epoch: int) -> float:
    """Return the rate of the first pair whose `until_epoch` is above `epoch`, else the last one."""
    for until_epoch, rate in learning_rates:
        if epoch < until_epoch:
            return rate
    return learning_rates[-1][1]
