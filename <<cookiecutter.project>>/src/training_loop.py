"""The resumable training loop. Read it from top to bottom: that is the order of events.

It is never given the test set.
"""

import logging
import math
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import keras

from src import callback_state
from src.batches import Arrays, batch_source
from src.checkpoint import Checkpoint, Snapshot
from src.hooks import Hook, Run
from src.steps import Steps, Validation

log = logging.getLogger(__name__)

INTERRUPTED = 75  # exit code: stopped by a signal, the same command continues
LearningRates = Sequence[tuple[int, float]]


def training_loop(
    model: keras.Model,
    train: Any,
    valid: Arrays | None,
    save_path: Path,
    num_epochs: int,
    learning_rates: LearningRates | None = None,
    monitor: str = "val_loss",
    monitor_mode: str = "auto",
    on_nan: str = "stop",
    checkpoint_steps: int = 0,
    checkpoint_seconds: float = 0,
    seed: int = 0,
    fingerprint: dict[str, Any] | None = None,
    inexact: Sequence[str] = (),
    hooks: Sequence[Hook] = (),
    callbacks: Sequence[keras.callbacks.Callback] = (),
) -> list[dict[str, Any]]:
    """Train until `num_epochs` epochs are done, going on where the folder's last commit stands.

    Args:
        model: compiled; its own `train_step` is used if it has one.
        train: batches by epoch and step, or what `batch_source` makes such a source of.
        valid: features and labels to validate on after each epoch; None: there is no validation.
        save_path: the run folder, which exists.
        num_epochs: epochs in all, those of earlier attempts included.
        learning_rates: pairs of `until_epoch` and the rate that holds while `epoch < until_epoch`,
            the last one to the end; None: the optimizer's own rate or schedule.
        monitor: column of the history that decides which epoch is the best.
        monitor_mode: "min" or "max", whichever is better; "auto" goes by the name.
        on_nan: "stop" or "continue" when the loss is not a finite number.
        checkpoint_steps: commit every so many steps, beside the end of each epoch; 0: never.
        checkpoint_seconds: commit when so many seconds have passed; 0: never.
        seed: of the order of batches, where the data does not decide it.
        fingerprint: what has to be the same when the run is resumed; see `src.fingerprint`.
        inexact: what is not, in this attempt; from here on the commits say so.
        hooks: see `src.hooks`.
        callbacks: any Keras callbacks.

    Returns:
        The history, a row per epoch.

    Raises:
        FloatingPointError: if the loss is not finite and `on_nan` is "stop".
        SystemExit: with code 75, when SIGTERM, SIGINT, SIGUSR1 or SIGHUP came: the step has ended
            and its state is committed.
        KeyError: if the history has no column `monitor`.
        ValueError: if "auto" does not know whether less of `monitor` is better.
        OSError: if a commit cannot be written.
    """
    # ---- get ready -----------------------------------------------------------------------------
    source = batch_source(train, seed)
    lower_is_better = is_lower_better(monitor, monitor_mode)
    make_variables(model, source.batch(0, 0))
    checkpoint = Checkpoint(save_path, model)
    state = checkpoint.read() or {
        "epoch": 0,
        "step": 0,
        "global_step": 0,
        "learning_rate": 0.0,
        "results": {},
        "best_epoch": None,
        "stop_reason": None,
        "history": [],
        "hooks": {},
        "callbacks": {},
        "inexact": [],
    }
    run = Run(
        root=save_path,
        model=model,
        num_epochs=num_epochs,
        steps_per_epoch=source.steps_per_epoch,
        history=state["history"],
        global_step=state["global_step"],
        best_epoch=state["best_epoch"],
        monitor=monitor,
    )
    if state["stop_reason"] or state["epoch"] >= num_epochs:
        log.info("nothing to do: %s", state["stop_reason"] or f"{num_epochs} epochs are done")
        for hook in hooks:  # a kill may have come before their last word
            hook.before_training(run)
            hook.after_training()
        checkpoint.close()
        return state["history"]
    if inexact:
        state["inexact"].append({"global_step": state["global_step"], "differs": list(inexact)})
        log.warning("from here on the run is not bit for bit the same: %s", "; ".join(inexact))
    for callback in callbacks:
        if not callback_state.is_known(callback):
            log.warning(
                "%s keeps a state that is not saved: a resumed run may differ; give it get_state() "
                "and set_state(state), with JSON values",
                type(callback).__name__,
            )
    keras_callbacks = keras.callbacks.CallbackList(callbacks, model=model)
    model.stop_training = False
    one_by_one = looks_at_batches(callbacks)
    steps = Steps(model, source, one_by_one)
    validation = Validation(model, valid) if valid is not None else None
    first_epoch, step, learning_rate = state["epoch"], state["step"], state["learning_rate"]
    results = state["results"]  # what the last step of the epoch has returned
    committed_at = time.monotonic()

    def snapshot(epoch: int, step: int) -> Snapshot:
        """Copy everything as it is before `step` of `epoch`."""
        return checkpoint.snapshot(
            {
                "epoch": epoch,
                "step": step,
                "global_step": run.global_step,
                "learning_rate": learning_rate if step else 0.0,
                "results": results if step else {},
                "best_epoch": run.best_epoch,
                "stop_reason": run.stop_reason,
                "history": run.history,
                "hooks": states_of(hooks),
                "callbacks": states_of(callbacks),
                "inexact": state["inexact"],
                "fingerprint": fingerprint or {},
            }
        )

    try:
        with SignalsToFlag() as received:
            for hook in hooks:
                hook.before_training(run)
            keras_callbacks.on_train_begin()
            steps.compile()
            checkpoint.prepare()

            for epoch in range(first_epoch, num_epochs):
                # ---- begin the epoch, or restore the middle of it -------------------------------
                for hook in hooks:
                    hook.before_epoch(epoch)
                if epoch == first_epoch and step:
                    # What callbacks do as an epoch begins was done already; restoring undoes it.
                    keras_callbacks.on_epoch_begin(epoch)
                    checkpoint.restore()
                    give_back(state, hooks, callbacks)
                    log.info("continuing after step %d of epoch %d", step, epoch + 1)
                else:
                    if epoch == first_epoch and state["global_step"]:
                        checkpoint.restore()
                        give_back(state, hooks, callbacks)
                        log.info("continuing after epoch %d", epoch)
                    model.reset_metrics()
                    if learning_rates is not None:
                        rate = rate_in_epoch(learning_rates, epoch)
                        # Between two of its rates the schedule leaves a callback's changes alone.
                        if epoch == 0 or rate != rate_in_epoch(learning_rates, epoch - 1):
                            model.optimizer.learning_rate = rate
                    keras_callbacks.on_epoch_begin(epoch)
                    learning_rate = float(keras.ops.convert_to_numpy(model.optimizer.learning_rate))

                # ---- train -----------------------------------------------------------------------
                while step < source.steps_per_epoch:
                    begin = run.global_step - step
                    end = begin + source.steps_per_epoch
                    until = min(next_stop(run.global_step, checkpoint_steps, hooks), end)
                    then = min(next_stop(until, checkpoint_steps, hooks), end)
                    if one_by_one:
                        keras_callbacks.on_train_batch_begin(step)
                    call = steps.run(epoch, step, until - begin, then - begin)
                    run.global_step += call.step - step
                    step, results = call.step, call.results
                    if call.not_finite is not None and on_nan == "stop":
                        raise FloatingPointError(
                            f"the loss is not a number at step {call.not_finite + 1} of epoch "
                            f"{epoch + 1}; the last commit is kept, and --on_nan=continue goes on "
                            "all the same"
                        )
                    if one_by_one:
                        keras_callbacks.on_train_batch_end(step - 1, call.results)
                    for hook in hooks:
                        hook.after_step(run.global_step, call.results)
                    if received.name:
                        break
                    due = checkpoint_steps and run.global_step % checkpoint_steps == 0
                    late = time.monotonic() - committed_at > checkpoint_seconds > 0
                    if (due or late) and step < source.steps_per_epoch:
                        checkpoint.commit(snapshot(epoch, step))
                        committed_at = time.monotonic()

                # ---- validate, unless a signal came ---------------------------------------------
                # Validation uses the metrics of the epoch for its own.
                before_validation = snapshot(epoch, step) if validation else None
                logs = dict(results)
                if validation is not None and not received.name:
                    figures = validation.run(
                        keras_callbacks, stop=lambda: received.name is not None
                    )
                    logs |= {f"val_{key}": value for key, value in (figures or {}).items()}
                if received.name:
                    checkpoint.commit(before_validation or snapshot(epoch, step))
                    checkpoint.wait()
                    log.warning(
                        "%s: stopped at step %d of epoch %d", received.name, step, epoch + 1
                    )
                    raise SystemExit(INTERRUPTED)

                # ---- end the epoch and commit it ------------------------------------------------
                row = {"epoch": epoch, "step": run.global_step, "learning_rate": learning_rate}
                run.history.append(row | logs)
                is_best = improves(run, lower_is_better)
                if is_best:
                    run.best_epoch = epoch
                keras_callbacks.on_epoch_end(epoch, logs)
                for hook in hooks:
                    hook.after_epoch(epoch)
                if model.stop_training:
                    run.stop_reason = run.stop_reason or "a Keras callback stopped the training"
                step = 0
                checkpoint.commit(snapshot(epoch + 1, step), is_best)
                committed_at = time.monotonic()
                if run.stop_reason:
                    log.info("stopped after epoch %d: %s", epoch + 1, run.stop_reason)
                    break

            checkpoint.finish()
            keras_callbacks.on_train_end()
            for hook in hooks:
                hook.after_training()
            if run.best_epoch is not None:
                best = run.history[run.best_epoch][monitor]
                log.info("best epoch %d: %s %.4g", run.best_epoch + 1, monitor, best)
    except BaseException as error:
        for hook in hooks:
            if hasattr(hook, "run"):
                hook.at_exception(error)
        raise
    finally:
        steps.close()
        checkpoint.close()
    return run.history


def next_stop(global_step: int, checkpoint_steps: int, hooks: Sequence[Hook]) -> int:
    """Return the first step after `global_step` at which somebody wants to act."""
    stops = [hook.next_step(global_step) for hook in hooks]
    if checkpoint_steps:
        stops.append((global_step // checkpoint_steps + 1) * checkpoint_steps)
    return min((stop for stop in stops if stop is not None), default=global_step + 1_000_000)


def looks_at_batches(callbacks: Sequence[keras.callbacks.Callback]) -> bool:
    """Whether a callback has its own `on_train_batch_*`, so that steps cannot be grouped."""
    names = ("on_train_batch_begin", "on_train_batch_end", "on_batch_begin", "on_batch_end")
    for callback in callbacks:
        for name in names:
            if getattr(type(callback), name) is not getattr(keras.callbacks.Callback, name):
                log.info("%s looks at each batch: steps run singly", type(callback).__name__)
                return True
    return False


def states_of(objects: Sequence[Any]) -> dict[str, Any]:
    """Return the states of hooks or callbacks by class name; those without one are left out."""
    states = {}
    for index, item in enumerate(objects):
        if item_state := callback_state.get(item):
            states[f"{index} {type(item).__name__}"] = item_state
    return states


def give_back(state: dict[str, Any], *lists: Sequence[Any]) -> None:
    """Give hooks and callbacks what `states_of` took from them."""
    for key, objects in zip(("hooks", "callbacks"), lists, strict=True):
        for index, item in enumerate(objects):
            if item_state := state[key].get(f"{index} {type(item).__name__}"):
                callback_state.put(item, item_state)


def rate_in_epoch(learning_rates: LearningRates, epoch: int) -> float:
    """Return the rate of the first pair whose `until_epoch` is above `epoch`, else the last one."""
    for until_epoch, rate in learning_rates:
        if epoch < until_epoch:
            return rate
    return learning_rates[-1][1]


LOWER_IS_BETTER = ("loss", "error", "mae", "mse", "mape", "msle", "rmse", "perplexity", "kl")
HIGHER_IS_BETTER = ("acc", "auc", "precision", "recall", "f1", "iou", "dice", "r2", "score", "psnr")


def is_lower_better(monitor: str, mode: str = "auto") -> bool:
    """Whether less of a metric is better, by `mode` ("min", "max"), or in "auto" by its name.

    Raises:
        ValueError: if the name does not tell.
    """
    if mode != "auto":
        return mode == "min"
    lower = any(part in monitor.lower() for part in LOWER_IS_BETTER)
    higher = any(part in monitor.lower() for part in HIGHER_IS_BETTER)
    if lower == higher:
        raise ValueError(f"is less of {monitor!r} better, or more? Set monitor_mode to min or max")
    return lower


def make_variables(model: keras.Model, batch: Any) -> dict[str, Any]:
    """Make the variables that come into being with the first batch, and change none.

    These are the weights of a subclassed model, the metrics' and the optimizer's. Returns what a
    test step returns, or {} for a model that cannot be tested.
    """
    batch = keras.tree.map_structure(keras.ops.convert_to_tensor, batch)
    results: dict[str, Any] = {}
    try:
        results = model.test_step(batch)
    except (NotImplementedError, ValueError):
        if model.loss is not None:
            raise
        model(batch[0] if isinstance(batch, tuple) else batch, training=False)
    model.reset_metrics()
    if not model.optimizer.built:
        model.optimizer.build(model.trainable_variables)
    return results


def improves(run: Run, lower_is_better: bool) -> bool:
    """Whether the last row of the history is better than that of the best epoch so far.

    Raises:
        KeyError: if there is no column `run.monitor`.
    """
    row = run.history[-1]
    if run.monitor not in row:
        raise KeyError(f"monitor is {run.monitor!r}; the history has {', '.join(row)}")
    value = row[run.monitor]
    if not math.isfinite(value):
        return False
    if run.best_epoch is None:
        return True
    best = run.history[run.best_epoch][run.monitor]
    return value < best if lower_is_better else value > best


class SignalsToFlag:
    """Within the block, a signal to stop sets `name` and the step goes on to its end.

    A second SIGINT leaves at once. A SIGHUP that was ignored at the start, as by `nohup`, stays
    ignored.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)

    def __enter__(self) -> "SignalsToFlag":
        self.name: str | None = None
        self.before = {}
        for number in self.SIGNALS:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue
            self.before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.name and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name
