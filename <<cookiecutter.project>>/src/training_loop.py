"""The resumable training loop. Read it from top to bottom: that is the order of events.

It is never given the test set.
"""

import logging
import math
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import keras
import tensorflow as tf

from src import checkpoint
from src.batches import Arrays, BatchSource
from src.hooks import Hook, Run

log = logging.getLogger(__name__)

INTERRUPTED = 75  # exit code: stopped by a signal, the same command continues
LearningRates = Sequence[tuple[int, float]]


def training_loop(
    model: keras.Model,
    train: BatchSource,
    valid: Arrays | None,
    save_path: Path,
    num_epochs: int,
    learning_rates: LearningRates | None = None,
    monitor: str = "val_loss",
    on_nan: str = "stop",
    hooks: Sequence[Hook] = (),
    callbacks: Sequence[keras.callbacks.Callback] = (),
) -> list[dict[str, Any]]:
    """Train until `num_epochs` epochs are done, going on where the folder's last commit stands.

    Args:
        model: compiled; its own `train_step` is used if it has one.
        train: batches by epoch and step.
        valid: features and labels to validate on after each epoch; None: there is no validation.
        save_path: the run folder, which exists.
        num_epochs: epochs in all, those of earlier attempts included.
        learning_rates: pairs of `until_epoch` and the rate that holds while `epoch < until_epoch`,
            the last one to the end; None: the optimizer's own rate or schedule.
        monitor: column of the history that decides which epoch is the best: the lowest value of a
            loss or an error, the highest of anything else.
        on_nan: "stop" or "continue" when the loss is not a finite number.
        hooks: see `src.hooks`.
        callbacks: any Keras callbacks.

    Returns:
        The history, a row per epoch.

    Raises:
        FloatingPointError: if the loss is not finite and `on_nan` is "stop".
        SystemExit: with code 75, at the end of the step in which SIGTERM, SIGINT, SIGUSR1 or
            SIGHUP came.
        KeyError: if the history has no column `monitor`.
        OSError: if a commit cannot be written.
    """
    # ---- restore -------------------------------------------------------------------------------
    # Metrics, and the weights of a subclassed model, come into being with the first batch. A test
    # step makes them without changing anything.
    model.test_on_batch(*train.batch(0, 0))
    model.optimizer.build(model.trainable_variables)
    train_step = compiled_train_step(model)
    state = checkpoint.restore(save_path, model) or {
        "epoch": 0,
        "global_step": 0,
        "best_epoch": None,
        "stop_reason": None,
        "history": [],
        "hooks": {},
    }
    if state["epoch"]:
        log.info("continuing after epoch %d, step %d", state["epoch"], state["global_step"])
    if state["stop_reason"] or state["epoch"] >= num_epochs:
        log.info("nothing to do: %s", state["stop_reason"] or f"{num_epochs} epochs are done")
        return state["history"]
    run = Run(
        root=save_path,
        model=model,
        num_epochs=num_epochs,
        steps_per_epoch=train.steps_per_epoch,
        history=state["history"],
        global_step=state["global_step"],
        best_epoch=state["best_epoch"],
        monitor=monitor,
    )
    for hook in hooks:
        if type(hook).__name__ in state["hooks"]:
            hook.set_state(state["hooks"][type(hook).__name__])
    keras_callbacks = keras.callbacks.CallbackList(callbacks, model=model)
    model.stop_training = False

    # ---- train ---------------------------------------------------------------------------------
    try:
        with SignalsToFlag() as received:
            for hook in hooks:
                hook.before_training(run)
            keras_callbacks.on_train_begin()

            for epoch in range(state["epoch"], num_epochs):
                if learning_rates is not None:
                    model.optimizer.learning_rate = rate_in_epoch(learning_rates, epoch)
                learning_rate = float(keras.ops.convert_to_numpy(model.optimizer.learning_rate))
                model.reset_metrics()
                for hook in hooks:
                    hook.before_epoch(epoch)
                keras_callbacks.on_epoch_begin(epoch)

                for step in range(train.steps_per_epoch):
                    keras_callbacks.on_train_batch_begin(step)
                    results = train_step(train.batch(epoch, step))
                    logs = {key: float(value) for key, value in results.items()}
                    run.global_step += 1
                    if not math.isfinite(logs.get("loss", 0.0)) and on_nan == "stop":
                        raise FloatingPointError(
                            f"the loss is {logs['loss']} after step {step + 1} of epoch "
                            f"{epoch + 1} (global step {run.global_step}); the state after epoch "
                            f"{epoch} is kept, and --on_nan=continue goes on all the same"
                        )
                    keras_callbacks.on_train_batch_end(step, logs)
                    for hook in hooks:
                        hook.after_step(run.global_step, logs)
                    if received.name:
                        log.warning(
                            "%s after step %d of epoch %d; the same command continues after "
                            "epoch %d",
                            received.name,
                            step + 1,
                            epoch + 1,
                            epoch,
                        )
                        raise SystemExit(INTERRUPTED)

                if valid is not None:
                    figures = model.evaluate(
                        *valid, batch_size=256, verbose=0, return_dict=True, callbacks=callbacks
                    )
                    # In the order of the training metrics, whatever the order of Keras.
                    for key in [*(key for key in logs if key in figures), *figures]:
                        logs[f"val_{key}"] = float(figures[key])
                run.history.append(
                    {
                        "epoch": epoch,
                        "step": run.global_step,
                        "learning_rate": learning_rate,
                        **logs,
                    }
                )
                is_best = improves(run, epoch)
                if is_best:
                    run.best_epoch = epoch
                keras_callbacks.on_epoch_end(epoch, logs)
                for hook in hooks:
                    hook.after_epoch(epoch)
                if model.stop_training:
                    run.stop_reason = run.stop_reason or "a Keras callback stopped the training"

                # ---- commit --------------------------------------------------------------------
                state = {
                    "epoch": epoch + 1,
                    "global_step": run.global_step,
                    "best_epoch": run.best_epoch,
                    "stop_reason": run.stop_reason,
                    "history": run.history,
                    "hooks": {
                        type(hook).__name__: hook_state
                        for hook in hooks
                        if (hook_state := hook.get_state())
                    },
                }
                checkpoint.commit(save_path, model, state, is_best)
                for hook in hooks:
                    hook.after_commit(epoch)
                if run.stop_reason:
                    log.info("stopped after epoch %d: %s", epoch + 1, run.stop_reason)
                    break
            if run.best_epoch is not None:
                best = run.history[run.best_epoch][monitor]
                log.info("best epoch %d: %s %.4g", run.best_epoch + 1, monitor, best)

            keras_callbacks.on_train_end()
            for hook in hooks:
                hook.after_training()
    except BaseException as error:
        for hook in hooks:
            if hasattr(hook, "run"):
                hook.at_exception(error)
        raise
    return run.history


def compiled_train_step(model: keras.Model) -> Callable[[Arrays], Mapping[str, Any]]:
    """Return the model's own `train_step`, compiled as `compile` was told to.

    Unlike `train_on_batch` it lets the metrics add up over the epoch.
    """
    if model.run_eagerly:
        return model.train_step
    return tf.function(model.train_step, jit_compile=model.jit_compile, reduce_retracing=True)


def rate_in_epoch(learning_rates: LearningRates, epoch: int) -> float:
    """Return the rate of the first pair whose `until_epoch` is above `epoch`, else the last one."""
    for until_epoch, rate in learning_rates:
        if epoch < until_epoch:
            return rate
    return learning_rates[-1][1]


def improves(run: Run, epoch: int) -> bool:
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
    lower_is_better = "loss" in run.monitor or "error" in run.monitor
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
