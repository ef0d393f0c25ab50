"""What a config stands for, and the runs that it may begin with."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from engine.training import fingerprint
from vegab import ConfigRegistry, UsageError, read_run, trust

if TYPE_CHECKING:
    import keras

    from engine.checkpoints import Commit
    from engine.hooks import Hook
    from engine.iterators import PyHookedModelIterator
    from engine.training import Traced
from engine.building import quiet_libraries
from engine.hooks import EarlyStopping, EpochLog, LearningCurve, Progress, TensorBoard


@dataclass(frozen=True)
class Experiment:
    """What a config stands for.

    Attributes:
        config: the resolved config.
        dataset: training batches, validation arrays, and how to read the test set; with an
            iterator: `Splits`.
        model: compiled; with an iterator: any object.
        learning_rates: pairs of `until_epoch` and rate, or None where the optimizer has its own.
        monitor: column of the history that decides which epoch is the best, or None.
        callbacks: Keras callbacks.
        fingerprint: what has to be the same when the run is resumed.
        inexact: what is not the same as in the commit that is resumed, by the user's leave.
        iterator: what does the steps, or None: the model's training step does.
        own_hooks: those that the config's kind brings, beside what every run has.
        serving: how an exported model reads records, where training reads them, or None.
        settings: of the loop, where they are not in the config under the names of `training_loop`.
        config_hooks: those that the config names.
        traced: its steps, where they are traced already.
        unsaved: what the iterator uses of PyTorch's and no commit holds.
    """

    config: Mapping[str, Any]
    dataset: Any
    model: Any
    learning_rates: list[tuple[int, float]] | None
    monitor: str | None
    callbacks: list["keras.callbacks.Callback"]
    fingerprint: dict[str, Any] = field(default_factory=dict)
    inexact: list[str] = field(default_factory=list)
    iterator: "PyHookedModelIterator | None" = None
    own_hooks: Sequence["Hook"] = ()
    serving: Any = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    config_hooks: Sequence["Hook"] = ()
    traced: "Traced | None" = None
    unsaved: Sequence[str] = ()

    def train(
        self,
        save_path: Path,
        hooks: Sequence["Hook"],
        start_from: Path | None = None,
        retrain: bool = False,
    ) -> None:
        """Train into a run folder, or go on where its last commit stands; see `training_loop`."""
        from src.training_loop import training_loop

        settings = {**self.config, **self.settings}
        training_loop(
            model=self.model,
            train=self.dataset.train,
            valid=self.dataset.valid,
            save_path=save_path,
            num_epochs=settings["num_epochs"] or 0,
            num_steps=settings.get("num_steps"),
            iterator=self.iterator,
            traced=self.traced,
            learning_rates=self.learning_rates,
            monitor=self.monitor,
            monitor_mode=settings["monitor_mode"],
            on_nan=settings["on_nan"],
            checkpoint_steps=settings.get("checkpoint_steps", 0),
            checkpoint_seconds=settings["checkpoint_seconds"],
            validation_seconds=settings.get("validation_seconds", 0),
            seed=settings["seed"],
            fingerprint=self.fingerprint,
            inexact=self.inexact,
            hooks=hooks,
            callbacks=self.callbacks,
            start_from=start_from,
            retrain=retrain,
            new_rate=start_from is not None and self.has_another_rate(start_from),
        )

    def trace(self, allow_inexact: bool) -> "Experiment":
        """Trace the steps of training and validation.

        Args:
            allow_inexact: note what a resume would not restore, instead of refusing it.

        Raises:
            UsageError: if a step uses what no commit holds, and that is not allowed.
        """
        from engine.training import trace

        settings = {**self.config, **self.settings}
        traced = trace(
            self.model,
            self.dataset.train,
            self.dataset.valid,
            self.callbacks,
            self.config_hooks,
            settings.get("num_steps"),
            self.iterator,
            allow_inexact,
            self.unsaved,
        )
        return replace(self, traced=traced)

    def has_another_rate(self, path: Path) -> bool:
        """Return whether the config has not the learning rates of the run that made a commit."""
        from engine.checkpoints import run_of

        before = read_run(run_of(path))["config"]
        if self.iterator is not None or isinstance(self.config.get("lr_schedule"), Mapping | str):
            return False  # a schedule of Keras is no state, and is this run's own
        keys = ("learning_rate", "lr_schedule")
        return any(key in before and before[key] != self.config.get(key) for key in keys)

    def check_start(self, path: Path, retrain: bool, flag: str = "--checkpoint") -> None:
        """Look whether a training could begin with a commit, which a flag has named.

        Raises:
            UsageError: if it is damaged, or one of another model.
        """
        from engine.checkpoints import RESTORE_ALL, RESTORE_WEIGHTS, Checkpoint

        variables = self.iterator.variables if self.iterator is not None else None
        checkpoint = Checkpoint(path.parent, self.model, variables)
        try:
            checkpoint.read_other(path)
            checkpoint.prepare()
            checkpoint.require_fit(RESTORE_WEIGHTS if retrain else RESTORE_ALL)
        except (OSError, ValueError) as error:
            raise UsageError(f"{flag}: {error}") from error
        finally:
            checkpoint.close()

    def require_more_to_do(self, path: Path, flag: str) -> None:
        """Refuse to begin with a commit, which a flag has named, if nothing is left to train.

        Raises:
            UsageError: saying why.
        """
        from engine.checkpoints import read_state

        state = read_state(path)
        settings = {**self.config, **self.settings}
        num_epochs, num_steps = settings["num_epochs"], settings.get("num_steps")
        is_open = state["step"] > 0 and not state["is_cut"]
        if state["stop_reason"]:
            raise UsageError(
                f"{flag}: that run was stopped ({state['stop_reason']}); begin with an earlier "
                "epoch"
            )
        if num_steps is not None and state["global_step"] >= num_steps and not is_open:
            done = f"{state['global_step']} steps are done, of {num_steps} in this config"
        elif num_steps is None and state["epoch"] >= num_epochs:
            done = f"{state['epoch']} epochs are done, of {num_epochs} in this config"
        else:
            return
        raise UsageError(f"{flag}: {done}; ask for more, or begin with an earlier epoch")

    def load(self, path: Path) -> None:
        """Assign the weights of a commit.

        Raises:
            UsageError: if they are those of another model.
            OSError: if the commit is damaged.
        """
        from engine.checkpoints import load_weights, verify

        verify(path)
        try:
            load_weights(path, self.model)
        except ValueError as error:
            raise UsageError(f"{path} does not belong to this config: {error}") from error

    def warm_start(self, checkpoint: Path, pattern: str) -> None:
        """Begin with weights of a checkpoint, and say which; see `transfer.warm_start`.

        Raises:
            UsageError: if none can be taken.
        """
        import keras

        from engine.checkpoints import transfer

        if not isinstance(self.model, keras.Model):
            raise UsageError("--warm_start needs a Keras model; use --checkpoint with --retrain")
        try:
            result = transfer.warm_start(self.model, checkpoint, pattern)
        except (OSError, ValueError) as error:
            raise UsageError(f"--warm_start: {error}") from error
        logging.getLogger(__name__).info("%s", transfer.shown(result, checkpoint))

    def hooks(self, terminal: TextIO | None) -> list["Hook"]:
        """Return what happens around the steps; `terminal` is where a progress bar may be drawn."""

        chosen: list[Hook] = [Progress(terminal), EpochLog(), LearningCurve()]
        if self.config["tensorboard"]:
            chosen.append(TensorBoard("epoch_" if self.own_hooks else None))
        if self.config["patience"]:
            chosen.append(EarlyStopping(self.config["patience"]))
        return [*chosen, *self.config_hooks, *self.own_hooks]


@dataclass(frozen=True)
class Splits:
    """Training batches, and validation batches in order, or None."""

    train: Any
    valid: Any


def prepare_process(
    config: Mapping[str, Any], save_path: str | None, start: Path | None = None
) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """Give TensorFlow and Keras, which may not be imported before, what the bits depend on.

    Returns:
        The fingerprint in the commit of `save_path`, or None, and the settings that are in force.
    """
    quiet_libraries()
    stored = fingerprint.stored_in(save_path) if save_path else None
    before = fingerprint.of(start) if start else None
    settings = fingerprint.apply(fingerprint.settings_of(config, stored, before))
    import keras

    # Names start over, so that a second model in one process has those of the first.
    keras.utils.clear_session(free_memory=False)
    keras.config.set_dtype_policy(config["precision"])
    # Initial weights, and the seeds of dropout layers, come from here.
    keras.utils.set_random_seed(config["seed"])
    return stored, settings


def config_of(folder: Path, registry: ConfigRegistry) -> dict[str, Any]:
    """Return the config of a run; settings that are younger than it have their defaults.

    From here on, what it names has to be of the project and its dependencies: see `vegab.trust`.

    Raises:
        UsageError: if the folder holds none.
    """
    if not (folder / "config.json").is_file():
        raise UsageError(
            f"{folder} is not a run folder: it holds no config.json; name one that bin/train.py "
            "made"
        )
    trust.confine()
    config = read_run(folder)["config"]
    return {**registry.defaults_for(config), **config}


def commit_named(folder: Path, checkpoint: str) -> Path:
    """Return the commit of a run that "best", "latest" or a path means.

    Raises:
        UsageError: if it is not there.
    """
    named = {"best": folder / "model_best.h5", "latest": folder / "model.h5"}
    path = named.get(checkpoint, Path(checkpoint))
    if not path.is_file():
        hint = "a run has its first after its first epoch"
        if checkpoint == "best" and named["latest"].is_file():
            hint = "this run keeps none of a best epoch, but --checkpoint=latest is there"
        raise UsageError(
            f"there is no checkpoint {path}; --checkpoint takes best, latest or the path of one; "
            + hint
        )
    return path


def commit_to_fork(folder: Path, epoch: int) -> "Commit":
    """Return the commit of a run at the end of an epoch, counted from 1; of 0: its latest.

    Raises:
        UsageError: if the folder is no run, is still written to, or has no such commit.
    """
    run = read_run(folder)
    if not run["meta"].get("attempts"):
        raise UsageError(f"--fork: {folder} is not a run folder; name one that bin/train.py made")
    if run["state"] == "running":
        raise UsageError(
            f"--fork: {folder} is still running, and what it keeps changes; wait for it, or give "
            "a copy of one of its checkpoints as --checkpoint"
        )
    if epoch < 0:
        raise UsageError(f"--from_epoch is {epoch}; it must be at least 1")
    from engine.checkpoints import commit_after

    try:
        return commit_after(folder, epoch)
    except ValueError as error:
        raise UsageError(f"--fork: {error}") from error


def inexactness(
    stored: dict[str, Any] | None, now: dict[str, Any], save_path: str | None, allowed: bool
) -> list[str]:
    """Return what is not as the commit has it.

    Raises:
        UsageError: if there is anything, and it is not allowed.
    """
    found = fingerprint.differences(stored, now) if stored else []
    if found and not allowed:
        raise UsageError(
            f"{save_path} cannot be continued bit for bit: {'; '.join(found)}; restore what "
            "differs (the source is in its code/), or add --resume_inexact to go on all the same"
        )
    return found
