"""Holds what a config describes: data, model, training; and finds the run that it begins with."""

import logging
import textwrap
import traceback
from collections import ChainMap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from engine.building import from_mapping, quiet_libraries, refusal, refusals_named
from engine.devices import gpus, workers
from engine.training import fingerprint
from vegab import ConfigRegistry, UsageError, read_run, trust
from vegab.provenance import usable_cores
from vegab.run_folder import refuse_links

if TYPE_CHECKING:
    import keras

    from engine.checkpoints import Commit
    from engine.hooks import Hook
    from engine.training import Session, Work

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Experiment:
    """What a config stands for."""

    config: Mapping[str, Any]  # resolved
    dataset: Any  # batch sources as `train` and `valid`, or None; `src.data.Dataset` has more
    model: Any  # compiled; with an iterator: any object
    monitor: str | None  # column of the history that decides which epoch is the best
    callbacks: list["keras.callbacks.Callback"]
    fingerprint: dict[str, Any] = field(default_factory=dict)  # the same when a run is resumed
    # What is not as in the checkpoint that is resumed, by the user's leave.
    inexact: list[str] = field(default_factory=list)
    iterator: Any = None  # what does the steps; None: the model's training step does
    # Pairs of `until_epoch` and rate, where the optimizer does not have its own.
    learning_rates: Sequence[tuple[int, float]] = ()
    own_hooks: Sequence["Hook"] = ()  # of the config's kind, besides what every run has
    serving: Any = None  # how an exported model reads records, where training reads them
    # Settings of the loop that are not in the config under the names that root has.
    changes: Mapping[str, Any] = field(default_factory=dict)
    config_hooks: Sequence["Hook"] = ()  # those that the config names
    watched: Mapping[str, str] = field(default_factory=dict)  # further columns, by key
    work: "Work | None" = None  # its steps, where they are traced already

    @property
    def settings(self) -> Mapping[str, Any]:
        """How long to train and when to save, under the names that root has."""
        return ChainMap(dict(self.changes), self.config)  # type: ignore[arg-type]

    def with_work(self, allow_inexact: bool = False) -> "Experiment":
        """Trace the steps; UsageError if anything does not fit, or no checkpoint can hold it."""
        from engine.batches import shapes_of
        from engine.checkpoints import is_lower_better
        from engine.training import work_on

        train, valid = self.dataset.train, self.dataset.valid
        try:
            work = work_on(
                self.model, train, valid, callbacks=self.callbacks, hooks=self.config_hooks,
                num_steps=self.settings.get("num_steps"), seed=self.config["seed"],
                iterator=self.iterator, allow_inexact=allow_inexact,
            )  # fmt: skip
        except (OSError, UsageError):
            raise
        except Exception as error:  # of the user's model, loss or metrics, whatever it is
            if self.iterator is not None:
                raise
            names = {frame.name for frame in traceback.extract_tb(error.__traceback__)}
            part, source = ("valid", valid) if "test_step" in names else ("train", train)
            key = next((key for key in ("metrics", "loss") if f"compute_{key}" in names), "model")
            if not names & {"_trace", "_looked_at"}:  # it came before a step was traced
                raise refusal(self.config, "dataset", error) from error
            batch = f"a batch of {shapes_of(source.batch(0, 0))} ({part})"
            raise refusal(self.config, key, error, batch) from error
        # A callback may add to the logs what is to be monitored.
        known = {None, "step", "learning_rate", *work.names}
        for key, name in {**self.watched, "monitor": self.monitor}.items():
            if work.names and name not in known and not self.callbacks:
                none = ", or --monitor= for none" * (key == "monitor")
                choices = ", ".join(sorted(work.names))
                raise UsageError(f"{key} is {name!r}; choose one of {choices}{none}")
        with refusals_named(self.config, "monitor"):
            is_lower_better(self.monitor, self.settings["monitor_mode"])
        return replace(self, work=work)

    @cached_property
    def traced(self) -> "Work":
        """Its steps, traced now if they are not yet."""
        work = self.work or self.with_work().work
        assert work is not None
        return work

    def session(
        self,
        save_path: Path,
        hooks: Sequence["Hook"],
        start_from: Path | None = None,
        retrain: bool = False,
    ) -> "Session":
        """Begin or resume a run; see `engine.training.Session`."""
        from engine.checkpoints import run_of
        from engine.hooks import LearningRates
        from engine.training import Session, Start

        start = None
        if start_from is not None:
            rate: Callable[[int], float] | None = None  # as in the other run
            before = read_run(run_of(start_from))["config"]
            # A schedule of Keras is not a state, and is this run's own.
            has_own = isinstance(self.config.get("lr_schedule"), Mapping | str)
            keys = () if has_own or self.iterator is not None else ("learning_rate", "lr_schedule")
            if any(key in before and before[key] != self.config.get(key) for key in keys):
                rates = self.learning_rates or [(0, float(self.model.optimizer.learning_rate))]
                rate = LearningRates(rates).rate_in
            start = Start(start_from, retrain, rate)
        settings = self.settings
        return Session(
            save_path, self.traced, hooks=hooks, callbacks=self.callbacks, start=start,
            num_epochs=settings["num_epochs"] or 0, num_steps=settings.get("num_steps"),
            monitor=self.monitor, monitor_mode=settings["monitor_mode"],
            fingerprint=self.fingerprint, inexact=self.inexact, on_nan=settings["on_nan"],
        )  # fmt: skip

    def check_start(self, path: Path, retrain: bool, flag: str = "--checkpoint") -> None:
        """Raise UsageError if the checkpoint that a flag names is corrupt, or another model's."""
        from engine.checkpoints import RESTORE_ALL, RESTORE_WEIGHTS, Checkpoint

        work = self.traced if self.iterator is not None else None
        checkpoint = Checkpoint(path.parent, self.model, work.guard.variables if work else None)
        groups = RESTORE_WEIGHTS if retrain else RESTORE_ALL
        try:
            checkpoint.read_other(path)
            if work:
                self.iterator.begin(str(path))
            checkpoint.prepare_for(groups, work.steps.dry_run if work else lambda: None)
            checkpoint.require_fit(groups)
        except (OSError, ValueError) as error:
            raise UsageError(f"{flag}: {error}") from error
        finally:
            checkpoint.close()

    def require_more_to_do(self, path: Path, flag: str) -> None:
        """Raise a UsageError if nothing is left to train from the checkpoint that a flag names."""
        from engine.checkpoints import is_done, read_state

        state = read_state(path)
        num_epochs, num_steps = self.settings["num_epochs"], self.settings.get("num_steps")
        if is_done(state, num_epochs, num_steps):
            done = f"{state['epoch']} epochs are done, of {num_epochs} in this config"
            if num_steps is not None:
                done = f"{state['global_step']} steps are done, of {num_steps} in this config"
            if state["stop_reason"]:
                done = f"that run was stopped ({state['stop_reason']})"
            raise UsageError(f"{flag}: {done}; ask for more, or begin with an earlier epoch")

    def load(self, path: Path) -> dict[str, Any]:
        """Assign what a checkpoint has of the model; return the state in the same file."""
        from engine.checkpoints import digest_of, load_weights, read_state, verify
        from engine.training import Guard

        digest, has_weights = None, self.iterator is not None
        while digest != digest_of(path):
            digest = digest_of(path)
            verify(path)
            state = read_state(path)
            try:
                load_weights(path, self.model)
                Guard(self.model).load_others(path, state.get("others", {}))
            except ValueError as error:
                if has_weights:
                    raise UsageError(f"{path} does not belong to this config: {error}") from error
                self.with_work(allow_inexact=True)  # a step makes those of a subclassed model
                digest, has_weights = None, True
        return state

    def warm_start(self, checkpoint: Path, pattern: str) -> None:
        """Begin with weights of a checkpoint, and say which; UsageError if none can be taken."""
        import keras

        from engine.checkpoints import transfer

        if not isinstance(self.model, keras.Model):
            raise UsageError("--warm_start needs a Keras model; use --checkpoint with --retrain")
        if self.iterator is not None and not self.model.built:
            self.traced.steps.dry_run()
        try:
            log.info("%s", transfer.warm_start(self.model, checkpoint, pattern))
        except (OSError, ValueError) as error:
            raise UsageError(f"--warm_start: {error}") from error

    def shown(self) -> str:
        """Return a line each on the data, the model and the device that steps run on."""
        train, valid = self.dataset.train, self.dataset.valid
        iterator, name = self.config.get("iterator"), self.config.get("model")
        dataset = self.config.get("dataset")
        data = f"{dataset}, " if isinstance(dataset, str) else ""
        data += f"batches per epoch: {train.steps_per_epoch} to train on"
        data += f", {valid.steps_per_epoch} to validate on" if valid is not None else ""
        model = name if isinstance(name, str) else type(self.model).__name__
        if getattr(self.model, "built", False):
            model += f", {self.model.count_params():,} parameters"
        model += f", trained by {iterator}" * bool(iterator)
        found = gpus.device_names() or [f"{usable_cores()} CPU cores"]
        lines = ("data", data), ("model", model), ("device", ", ".join(found))
        indent = " " * 8
        return "\n".join(textwrap.fill(f"{k:8}{v}", 80, subsequent_indent=indent) for k, v in lines)

    def hooks(self, terminal: TextIO | None) -> list["Hook"]:
        """Return what happens around the steps; `terminal` is where a progress bar may be drawn."""
        from engine import hooks

        chosen: list[Hook] = [hooks.Progress(terminal), hooks.EpochLog(), hooks.LearningCurve()]
        if self.config["tensorboard"]:
            chosen.append(hooks.TensorBoard("epoch_" if self.own_hooks else None))
        if self.config["patience"]:
            chosen.append(hooks.EarlyStopping(self.config["patience"]))
        chosen += [*self.config_hooks, *self.own_hooks]
        if self.learning_rates:
            chosen.append(hooks.LearningRates(self.learning_rates))
        return chosen


def prepare(
    make: Callable[[Mapping[str, Any], str | None], Experiment],  # from config and run folder
    config: Mapping[str, Any],  # resolved
    save_path: str | None = None,  # the run folder, whose checkpoint says what can be set
    resume_inexact: bool = False,  # go on where the bits cannot be had any more
    start: Path | None = None,  # a checkpoint of another run, which says it for a new one
    together: bool = False,  # with the other workers that the environment names
    trains: bool = True,  # whether the hooks that the config names are needed
) -> Experiment:
    """Set this process up, build the experiment, and check whether its run can be resumed.

    Raises UsageError if a name leads nowhere, or the run in `save_path` could not be resumed
    exactly; OSError if the data cannot be read."""
    # TensorFlow and Keras, which may not be imported before, are given what the bits depend on.
    quiet_libraries()
    stored = fingerprint.stored_in(save_path) if save_path else None
    before = fingerprint.of(start) if start else None
    settings = fingerprint.apply(fingerprint.settings_of(config, stored, before))
    import keras

    from engine.batches import FunctionBatches
    from engine.devices import replicas
    from engine.training import draws, guard, make_variables

    # Names start over, so that a second model in one process has those of the first.
    keras.utils.clear_session(free_memory=False)
    keras.config.set_dtype_policy(config["precision"])
    # Initial weights, and the seeds of dropout layers, come from here.
    keras.utils.set_random_seed(config["seed"])
    if "iterator" in config and together and workers.worker().number > 1:
        raise UsageError("a config with an iterator trains in one process; unset TF_CONFIG")
    with gpus.scope(together) as several, guard.noting_variables():
        draws.begin(config["seed"])
        if several is not None:
            if "iterator" in config:
                raise UsageError("a config with an iterator trains on one GPU; give --gpus one")
            replicas.make_seed_generator()
        built = make(config, save_path)
        fine_tune = built.settings.get("fine_tune")
        is_eager = getattr(built.model, "run_eagerly", False)
        if built.iterator is None and (several is not None or fine_tune or is_eager):
            # They have to be there before a step is traced, or none is.
            with refusals_named(config, "model"):
                make_variables(built.model, built.dataset.train.batch(0, 0), fine_tune)
    if not trains and save_path is None:
        return built
    all_workers = workers.Workers(getattr(built.model, "distribute_strategy", None))
    if all_workers.num_replicas > 1:
        replicas.prepare(built.model)
    # Made now, so that what the config names wrongly is refused.
    config_hooks = [from_mapping(config, "hooks", e) for e in (config["hooks"] if trains else ())]
    for name in ("train", "valid") if trains else ():
        source = getattr(built.dataset, name)
        if isinstance(source, FunctionBatches):
            with refusals_named(config, "dataset", f"this config ({name})"):
                source.settle(((stored or {}).get("counted") or {}).get(name))
    now = fingerprint.take(config, settings, built.dataset, all_workers.layout)
    all_workers.require_same(now, "and would not make the same updates")
    inexact = fingerprint.differences(stored, now) if stored else []
    if stored and inexact and not resume_inexact:
        is_code = any(stored.get(key) != now[key] for key in ("code", "config"))
        raise UsageError(
            f"{save_path} cannot be continued bit for bit: {'; '.join(inexact)}; "
            + "add --own_code to go on with the code that it began with, " * is_code
            + "restore what differs, or add --resume_inexact to go on all the same"
        )
    return replace(built, fingerprint=now, inexact=inexact, config_hooks=config_hooks)


def config_of(folder: Path, registry: ConfigRegistry) -> dict[str, Any]:
    """Return a run's config, completed; from here on, names are confined to the project."""
    if not (folder / "config.json").is_file():
        raise UsageError(f"{folder} is not a run folder; name one that bin/train.py made")
    trust.confine()
    refuse_links(folder, folder)
    return registry.completed(read_run(folder)["config"])


def commit_named(folder: Path, checkpoint: str) -> Path:
    """Return the checkpoint that "best", "latest" or a path means; UsageError if there is none."""
    named = {"best": folder / "model_best.h5", "latest": folder / "model.h5"}
    has_monitor = read_run(folder)["config"].get("monitor")
    if checkpoint == "best" and not named["best"].is_file() and not has_monitor:
        log.info("%s monitors nothing, so it has no best checkpoint: the latest is taken", folder)
        checkpoint = "latest"
    path = named.get(checkpoint, Path(checkpoint))
    if not path.is_file():
        hint = f"give {'--checkpoint latest or ' * (checkpoint == 'best')}a path"
        raise UsageError(f"there is no checkpoint {path}; {hint}")
    return path


def commit_to_fork(folder: Path, epoch: int) -> "Commit":
    """Return the checkpoint of a run at the end of an epoch, counted from 1 (0: the latest)."""
    run = read_run(folder)
    if not run["meta"].get("attempts"):
        raise UsageError(f"--fork: {folder} is not a run folder; name one that bin/train.py made")
    if run["state"] == "running":
        hint = "wait for it, or give a copy of one of its checkpoints as --checkpoint"
        raise UsageError(f"--fork: {folder} is still running, and what it keeps changes; {hint}")
    if epoch < 0:
        raise UsageError(f"--from_epoch is {epoch}; it must be at least 1")
    from engine.checkpoints import commit_after

    try:
        return commit_after(folder, epoch)
    except ValueError as error:
        raise UsageError(f"--fork: {error}") from error
