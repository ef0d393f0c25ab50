"""Begins or resumes a run: what the loop needs before its first step, and what it saves."""

import contextlib
import logging
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import keras

from engine import checkpoints
from engine.batches import BatchSource, batch_source
from engine.checkpoints import RESTORE_ALL, Snapshot, best_of, callback_state
from engine.devices import INTERRUPTED, Workers
from engine.hooks import Hook, Hooks, Run
from engine.training.appended import AppendedFiles
from engine.training.guard import Guard
from engine.training.signals import SignalsToFlag
from engine.training.steps import Steps, Validation, floats

log = logging.getLogger(__name__)

BEFORE_STEPS = ("set_model", "set_params", "on_train_begin")  # methods of callbacks
LOOKS_AT_BATCHES = ("on_train_batch_begin", "on_train_batch_end", "on_batch_begin", "on_batch_end")


@dataclass(frozen=True)
class Work:
    """What a run does: steps of training and of validation, traced and looked at."""

    model: Any  # compiled; with an iterator: any object
    source: BatchSource
    steps: Any  # runs the steps of training
    validation: Any  # validates, or None
    guard: Guard  # has looked at the steps that are traced, and looks at those that will be
    iterator: Any = None  # what does the steps, or None: the model's own training step does
    # Columns that history.csv will have of steps and validation, as far as they are known:
    # callbacks may add others; none, if the steps are not compiled.
    names: Sequence[str] = ()
    # Whether hooks or callbacks of the user act before the first step, who may change what it was
    # traced from: then it is traced again.
    may_be_outdated: bool = False


def work_on(
    model: Any,
    train: Any,
    valid: Any = None,
    *,
    callbacks: Sequence[keras.callbacks.Callback] = (),
    hooks: Sequence[Hook] = (),
    num_steps: int | None = None,
    seed: int = 0,
    iterator: Any = None,
    allow_inexact: bool = False,
) -> Work:
    """Make the steps of a run on what `batch_source` takes, and trace them; see `Session`."""
    source = batch_source(train, seed=seed)
    guard = Guard(model, iterator, [source, valid], allow_inexact)
    if iterator is not None:
        guard.require_reached()
        iterator.look_at_traces(guard.look, source.batch(0, 0))
        steps = iterator.make_steps(source, seed)
        validation = iterator.make_validation(valid, seed) if valid is not None else None
        return Work(model, source, steps, validation, guard, iterator)
    steps = Steps(model, source, _look_at_batches(callbacks), num_steps, guard.look)
    validation = Validation(model, valid, guard.look) if valid is not None else None
    both = type(model).train_step, type(model).test_step
    if model.built and both == (keras.Model.train_step, keras.Model.test_step):
        # What makes variables is traced twice: let that be the smaller step.
        if validation is not None:
            validation.compile()
        if not getattr(model.optimizer, "built", True):
            model.optimizer.build(model.trainable_variables)  # as its first step would
    names = list(steps.compile().names)
    names += [f"val_{name}" for name in validation.compile().names] if validation else []
    methods = [getattr(type(each), name) for each in callbacks for name in BEFORE_STEPS]
    methods += [type(hook).before_training for hook in hooks if hasattr(hook, "before_training")]
    # Others than Keras' callbacks and this project's hooks may change what was traced.
    is_early = any(not method.__module__.startswith(("keras.", "engine.")) for method in methods)
    return Work(model, source, steps, validation, guard, names=names, may_be_outdated=is_early)


class Start(NamedTuple):
    """The checkpoint of another run that one begins with."""

    path: Path
    retrain: bool = False  # take only the weights from there, and begin at step 0
    rate: Callable[[int], float] | None = None  # of an epoch, if it is not to be that of the other


class Session:
    """One attempt at a run, from the first look at its folder on.

    Attributes:
        run: how far it is; what hooks may look at.
        epoch, step: the first ones to train, counted from 0.
        learning_rate: at the beginning of that epoch, if `step` is not 0.
        nothing_to_do: why there is nothing left to train, or "".

    Raises ValueError if "auto" does not know whether less of `monitor` is better, or `start` is a
    checkpoint of another model; OSError if there are checkpoints, and none of them is whole."""

    def __init__(
        self,
        folder: Path,  # which exists
        work: Work,
        *,
        hooks: Sequence[Hook] = (),  # in their order; those of an iterator come after them
        callbacks: Sequence[keras.callbacks.Callback] = (),
        num_epochs: int = 0,  # in all, those of earlier attempts included
        num_steps: int | None = None,  # in all, whatever `num_epochs` says
        monitor: str | None = "val_loss",  # column that decides which epoch is the best, if any
        monitor_mode: str = "auto",  # by its name; or "min", "max", whichever is better
        start: Start | None = None,  # to begin with, while the folder has no checkpoint of its own
        fingerprint: Mapping[str, Any] | None = None,  # has to be the same when it is resumed
        inexact: Sequence[str] = (),  # what of that differs
        on_nan: str = "stop",  # or "continue", when a loss or weight is NaN or infinity
    ) -> None:
        self.work, self.on_nan = work, on_nan
        self.workers = Workers(getattr(work.model, "distribute_strategy", None))
        self._lower_is_better = checkpoints.is_lower_better(monitor, monitor_mode)
        iterator, steps_per_epoch = work.iterator, work.source.steps_per_epoch
        passed_by = [work.model, iterator, work.source]
        self._files = AppendedFiles(self._root_of(folder, callbacks), passed_by)
        self._checkpoint = checkpoints.Checkpoint(
            folder, work.model, work.guard.variables, on_nan == "stop", self._files.keep
        )
        if num_steps is not None:
            num_epochs = -(-num_steps // steps_per_epoch)
        self._restores = RESTORE_ALL
        self._rate: float | None = None
        state = self._checkpoint.read()
        if start is not None:
            state = self._begun_with(start, state, monitor)
        self._is_new = state is None
        self._state = state = state or new_run()
        if state["is_cut"] and num_steps is not None and state["global_step"] < num_steps:
            state["history"].pop()  # the epoch goes on from where `num_steps` had cut it
            state["best_epoch"] = best_of(state["history"], monitor, self._lower_is_better)
        self.epoch, self.step = state["epoch"], state["step"]
        self.learning_rate = state["learning_rate"]
        self._callbacks = callbacks
        self.run = Run(
            root=self._files.root, model=work.model, iterator=iterator, monitor=monitor,
            num_epochs=num_epochs, num_steps=num_steps, steps_per_epoch=steps_per_epoch,
            history=state["history"], global_step=state["global_step"],
            best_epoch=state["best_epoch"], results=state["results"],
        )  # fmt: skip
        if iterator is None:
            self.hooks = Hooks(hooks, is_chief=self.workers.is_chief)
        else:
            self.hooks = Hooks([*hooks, *iterator.hooks], iterator.hooks, iterator.hook_freq)
        self._owners = [*self.hooks.hooks, *callbacks]
        work.guard.around = {"callbacks": callbacks, "hooks": self.hooks.hooks}
        self._files.cut(checkpoints.digest_of(self._checkpoint.found), self._owners)
        self._files.listen()
        # Callbacks ask for a Keras model, also where an iterator trains something else.
        is_keras = isinstance(work.model, keras.Model)
        self._keras_model = work.model if is_keras else keras.Sequential()
        last = keras.callbacks.LambdaCallback(on_epoch_end=self._take_logs)
        self.callbacks = keras.callbacks.CallbackList(
            [*callbacks, last], model=self._keras_model, verbose=0,
            epochs=num_epochs, steps=steps_per_epoch,
        )  # fmt: skip
        for callback in callbacks:
            if isinstance(callback, keras.callbacks.CSVLogger) and not self._is_new:
                callback.append = True  # it would begin the file again
            if isinstance(callback, keras.callbacks.SwapEMAWeights):
                # After the last epoch it would overwrite the last step's weights, from which a
                # run that is extended goes on.
                callback.set_params(callback.params | {"epochs": sys.maxsize})
        self._keras_model.stop_training = False
        asked = f"{num_epochs} epochs" if num_steps is None else f"{num_steps} steps"
        is_over = checkpoints.is_done(state, num_epochs, num_steps)
        self.nothing_to_do = (state["stop_reason"] or f"{asked} are done") if is_over else ""
        self._fingerprint = dict(fingerprint or {})
        if not self.nothing_to_do:
            self._tell(inexact)

    # ---- what it goes on from -------------------------------------------------------------------

    def _begun_with(
        self, start: Start, state: dict[str, Any] | None, monitor: str | None
    ) -> dict[str, Any]:
        """Return the state to go on from: the run's own, or that of another one's checkpoint."""
        if state is not None:
            folder = self._checkpoint.folder
            log.info("%s goes on from its own checkpoint, not from %s", folder, start.path)
            return state
        other = self._checkpoint.read_other(start.path)
        if start.retrain:
            log.info("starting from the weights of %s only", start.path)
            self._restores = checkpoints.RESTORE_WEIGHTS
            return new_run() | {"steps": other["steps"], "others": other.get("others", {})}
        log.info("starting from %s", start.path)
        best_epoch = best_of(other["history"], monitor, self._lower_is_better)
        self._checkpoint.take_along(other, best_epoch)
        if start.rate is not None:
            self._rate = start.rate(other["epoch"])
        return other | {"best_epoch": best_epoch}

    def _take_logs(self, epoch: int, logs: Mapping[str, Any] | None) -> None:
        self._logs = dict(logs or {})  # as the callbacks before leave them

    def _root_of(self, folder: Path, callbacks: Sequence[Any]) -> Path:
        """Return where hooks and callbacks write: what other workers do is thrown away."""
        if self.workers.is_chief:
            return folder
        self._scratch = tempfile.TemporaryDirectory()
        callback_state.redirect(callbacks, Path(self._scratch.name))
        return Path(self._scratch.name)

    def _tell(self, inexact: Sequence[str]) -> None:
        """Say, here and in the checkpoints, what is not exact."""
        unsaved = self.work.guard.found
        if inexact:
            log.warning("from here on the run is not bit for bit the same: %s", "; ".join(inexact))
        if names := "; ".join(unsaved):
            log.warning("a resumed run will have other bits, because no checkpoint holds %s", names)
        if differs := [*inexact, *unsaved]:
            entry = {"global_step": self._state["global_step"], "differs": differs}
            self._state["inexact"].append(entry)

    # ---- around the steps -----------------------------------------------------------------------

    @contextlib.contextmanager
    def open(self) -> Iterator[SignalsToFlag]:
        """From the hooks' first word to their last; signals to stop become a flag."""
        work, checkpoint = self.work, self._checkpoint
        try:
            with SignalsToFlag(self.workers) as signals:
                self.hooks.start(self.run)
                self.callbacks.on_train_begin()
                if work.may_be_outdated:
                    work.steps.forget()
                if work.iterator is None or not self._is_new:
                    if work.iterator is not None:
                        work.iterator.begin(str(checkpoint.found))
                    work.steps.compile()
                    self._checkpoint.prepare()
                others = self._state.get("others", {})
                lacks = bool(others) and not others.keys() <= work.guard.states().keys()
                if work.iterator is not None and (lacks or not checkpoint.fits(self._restores)):
                    work.steps.dry_run()  # what a first step makes has to be there to be restored
                    checkpoint.prepare()
                work.guard.has_news = False
                work.guard.tell_changes()
                self._files.keep_first(self._files.lengths(self._owners))
                yield signals
                self._checkpoint.finish()
                signals.agree()
                self.callbacks.on_train_end()
                self._end_training()
                self.hooks.call("after_training")
        except BaseException as error:
            if self._checkpoint.is_in_its_folder:  # nothing is written into another's
                self.hooks.at_exception(error)
            raise
        finally:
            work.steps.close()
            self._checkpoint.close()
            self._files.stop()

    def end_again(self) -> None:
        """Do what comes after the last step: a kill may have come before it."""
        log.info("nothing to do: %s", self.nothing_to_do)
        if self.work.iterator is None and not self._is_new:
            with self.open():
                self._restore()
                self._checkpoint.hold(self._state)
            return
        self.hooks.start(self.run)
        self.hooks.call("after_training")
        self.work.steps.close()
        self._checkpoint.close()

    def _end_training(self) -> None:
        """Do to the weights what `fit` does at its end, and save what they have become."""
        model = self.work.model
        if self.work.iterator is None:
            for callback in self._callbacks:
                if isinstance(callback, keras.callbacks.SwapEMAWeights):
                    callback.on_epoch_begin(self.run.num_epochs)  # the averages go to their place
            model.optimizer.finalize_variable_values(model.trainable_variables)
        self._checkpoint.commit_end()

    @property
    def wants_to_stop(self) -> bool:
        """Whether a callback has said that the epoch, and the training, ends with this batch."""
        return bool(self._keras_model.stop_training)

    def restore(self) -> None:
        """Give everything the state that was read, if there was one."""
        if self._is_new:
            return
        self._restore()
        within = f"step {self.step} of epoch {self.epoch + 1}"
        log.info("continuing after %s", within if self.step else f"epoch {self.epoch}")

    def _restore(self) -> None:
        self._checkpoint.restore(self._restores)
        states = self.work.guard.states()
        for path, value in self._state.get("others", {}).items():
            if path not in states:
                log.warning("the checkpoint has the state of %s, which this run lacks", path)
            elif states[path].is_model or self._restores is RESTORE_ALL:
                states[path].put(value)
        if self._restores is RESTORE_ALL:
            callback_state.put(self.work.steps, self._state["steps"])
            callback_state.put_all(self.hooks.hooks, self._state["hooks"])
            callback_state.put_all(self._callbacks, self._state["callbacks"])
        elif self.work.iterator is not None:
            self.work.iterator.set_weights(self._state["steps"]["iterator"])
        if self._rate is not None:
            self.work.model.optimizer.learning_rate = self._rate

    # ---- what it saves --------------------------------------------------------------------------

    def snapshot(self, epoch: int, step: int, learning_rate: float | None) -> Snapshot:
        """Copy everything as it is before `step` of `epoch`."""
        run, guard = self.run, self.work.guard
        if guard.has_news or step == 0:  # there may be more variables than before
            self._checkpoint.prepare_again()
            guard.has_news = False
        guard.tell_changes()
        return self._checkpoint.snapshot(
            {
                "epoch": epoch,
                "step": step,
                "global_step": run.global_step,
                "learning_rate": learning_rate if step else 0.0,
                "results": run.results if step else {},
                "steps": callback_state.get(self.work.steps),
                "best_epoch": run.best_epoch,
                "is_cut": False,
                "stop_reason": run.stop_reason,
                "history": run.history,
                "hooks": callback_state.get_all(self.hooks.hooks),
                "callbacks": callback_state.get_all(self._callbacks),
                "others": {path: state.get() for path, state in guard.states().items()},
                "inexact": self._state["inexact"],
                "fingerprint": self._fingerprint,
            },
            self._files.lengths(self._owners),
        )

    def save(self, snapshot: Snapshot, is_best: bool = False) -> None:
        """Begin to write a checkpoint, and keep it where a hook wants that."""
        run = self.run
        self._checkpoint.commit(snapshot, is_best, run.keep_as, run.discard)
        run.keep_as, run.discard = None, ()

    def stop(self, snapshot: Snapshot, signals: SignalsToFlag) -> None:
        """Save what a signal has interrupted, and end the process: SystemExit with code 75."""
        self._checkpoint.commit(snapshot)
        self._checkpoint.wait()
        signals.agree()  # nobody leaves before the checkpoint is there
        step, epoch = snapshot.state["step"], snapshot.state["epoch"] + 1
        log.warning("%s: stopped at step %d of epoch %d", signals.name, step, epoch)
        raise SystemExit(INTERRUPTED)

    def add_row(self, row: dict[str, Any]) -> bool:
        """Add an epoch, and what callbacks have added to its logs; return whether it is best."""
        run, logs = self.run, self._logs
        more = {n: v for n, v in logs.items() if n not in row and not isinstance(v, str)}
        run.history.append(row | floats(more))
        if run.monitor is None or run.monitor not in run.history[-1]:
            return False
        so_far = (run.history, run.best_epoch, run.monitor)
        if better := checkpoints.is_best(*so_far, self._lower_is_better):
            run.best_epoch = row["epoch"]
        return better

    def end_epoch(
        self,
        epoch: int,
        step: int,
        learning_rate: float | None,
        is_best: bool,
        may_lack_monitor: bool,
        cut: Snapshot | None,
    ) -> bool:
        """Save the end of an epoch; return whether the run ends with it. Of one that `num_steps`
        cuts short, `cut` is a copy from before its validation, for more steps would belong to it.
        Raises KeyError if the history has no column `monitor`, unless there was no validation."""
        run = self.run
        if self._keras_model.stop_training:
            run.stop_reason = run.stop_reason or "a Keras callback stopped the training"
        if cut is None:
            self.save(self.snapshot(epoch + 1, 0, learning_rate), is_best)
        else:  # what hooks keep is not settled while the epoch is open
            at_end = self.snapshot(epoch, step, learning_rate)
            changes = {"best_epoch": run.best_epoch, "is_cut": True}
            ended = replace(at_end, values=cut.values, state=cut.state | changes)
            self._checkpoint.commit(ended, is_best)
        if not (run.monitor is None or may_lack_monitor or run.monitor in run.history[-1]):
            self._checkpoint.finish()
            raise KeyError(f"monitor is {run.monitor!r}; there are {', '.join(run.history[-1])}")
        if run.stop_reason:
            log.info("stopped after epoch %d: %s", epoch + 1, run.stop_reason)
        return bool(run.stop_reason)


def new_run() -> dict[str, Any]:
    """Return the state of a run before its first step."""
    state: dict[str, Any] = {"epoch": 0, "step": 0, "global_step": 0, "learning_rate": 0.0}
    state |= {"best_epoch": None, "is_cut": False, "stop_reason": None, "history": []}
    state |= {name: {} for name in ("results", "steps", "hooks", "callbacks", "others")}
    return state | {"inexact": []}


def _look_at_batches(callbacks: Sequence[keras.callbacks.Callback]) -> bool:
    """Whether a callback has its own `on_train_batch_*`, so that steps cannot be grouped."""
    for callback in callbacks:
        for name in LOOKS_AT_BATCHES:
            method = getattr(callback, name)  # perhaps of the instance, as LambdaCallback's
            if getattr(method, "__func__", None) is not getattr(keras.callbacks.Callback, name):
                log.info("%s looks at each batch, so steps run one by one", type(callback).__name__)
                return True
    return False
