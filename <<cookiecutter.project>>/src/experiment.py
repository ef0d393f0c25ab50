"""From a config to data, model, hooks and callbacks: what every command in `bin` needs."""

import json
import logging
import math
import os
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from src import devices, fingerprint, workers
from vegab import ConfigRegistry, UsageError, read_run, resolve, trust

if TYPE_CHECKING:
    import keras

    from src.commit_file import Commit
    from src.hooks import Hook
    from src.iterators import PyHookedModelIterator
    from src.training_loop import Traced

CHOICES = {
    "precision": ("float32", "mixed_bfloat16", "mixed_float16", "float64"),
    "on_nan": ("stop", "continue"),
    "monitor_mode": ("auto", "min", "max"),
}
ROOT = Path(__file__).resolve().parents[1]
DEFAULT_RATE = 0.001
MAX_SEED = 2**32 - 1


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
        from src.training_loop import trace

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
        from src.commit_file import run_of

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
        from src.checkpoint import RESTORE_ALL, RESTORE_WEIGHTS, Checkpoint

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
        from src.commit_file import read_state

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
        from src.checkpoint import load_weights, verify

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

        from src import transfer

        if not isinstance(self.model, keras.Model):
            raise UsageError("--warm_start needs a Keras model; use --checkpoint with --retrain")
        try:
            result = transfer.warm_start(self.model, checkpoint, pattern)
        except (OSError, ValueError) as error:
            raise UsageError(f"--warm_start: {error}") from error
        logging.getLogger(__name__).info("%s", transfer.shown(result, checkpoint))

    def hooks(self, terminal: TextIO | None) -> list["Hook"]:
        """Return what happens around the steps; `terminal` is where a progress bar may be drawn."""
        from src import hooks

        chosen: list[Hook] = [hooks.Progress(terminal), hooks.EpochLog(), hooks.LearningCurve()]
        if self.config["tensorboard"]:
            chosen.append(hooks.TensorBoard("epoch_" if self.own_hooks else None))
        if self.config["patience"]:
            chosen.append(hooks.EarlyStopping(self.config["patience"]))
        return [*chosen, *self.config_hooks, *self.own_hooks]


@dataclass(frozen=True)
class Splits:
    """Training batches, and validation batches in order, or None."""

    train: Any
    valid: Any


def build(
    config: Mapping[str, Any],
    save_path: str | None = None,
    resume_inexact: bool = False,
    start: Path | None = None,
    together: bool = False,
    trains: bool = True,
) -> Experiment:
    """Import, read and build what the config names. Nothing is written.

    Args:
        config: the resolved config, of any kind.
        save_path: the run folder; what its commit says of threads and the like is taken over.
        resume_inexact: go on where the bits of an uninterrupted run cannot be had any more.
        start: a commit of another run to go on from; then these are taken over from there, unless
            the config says otherwise.
        together: train with the other workers that the environment names; see `src.workers`.
        trains: whether the hooks that the config names are needed.

    Raises:
        UsageError: if a value is out of range, a name leads nowhere, or the run in `save_path`
            could not be resumed exactly.
        OSError: if the data cannot be read.
        SystemExit: with code 75, if other workers do not come, or are gone.
    """
    check_ranges(config)
    stored, settings = prepare_process(config, save_path, start)
    from src import guard

    if "iterator" in config and together and workers.worker().number > 1:
        raise UsageError("a config with an iterator trains in one process; unset TF_CONFIG")
    with devices.scope(together) as several, guard.noting_lines():
        if several is not None:
            from src import replicas

            replicas.make_seed_generator()
        if "iterator" in config:
            if several is not None:
                raise UsageError("a config with an iterator trains on one GPU; give --gpus one")
            from src.iterator_experiment import build_iterator

            built = build_iterator(config, save_path)
        elif "train" in config:
            from src.variant_experiment import build_variant

            built = build_variant(config)
        else:
            built = build_compiled(config)
    strategy = getattr(built.model, "distribute_strategy", None)
    all_workers = workers.Workers(strategy)
    if all_workers.num_replicas > 1:
        replicas.prepare(built.model)
    # Made now, so that their code counts, and what the config names wrongly is refused.
    config_hooks = hooks_of(config) if trains else []
    now = fingerprint.take(config, settings, built.dataset, all_workers.layout)
    shown = {key: json.dumps(value, sort_keys=True) for key, value in now.items()}
    all_workers.require_same(shown, "and would not make the same updates")
    inexact = inexactness(stored, now, save_path, resume_inexact)
    return replace(built, fingerprint=now, inexact=inexact, config_hooks=config_hooks)


def build_compiled(config: Mapping[str, Any]) -> Experiment:
    """Build what a config of root's kind names; see `build`.

    Raises:
        UsageError, OSError: as `build` does.
    """
    import keras

    from src.batches import batch_source
    from src.data import DATASETS, Dataset
    from src.models import MODELS

    dataset = call(config, "dataset", resolve(config["dataset"], "dataset", DATASETS), config)
    if not isinstance(dataset, Dataset):
        raise UsageError(
            f"dataset {config['dataset']!r} gives a {type(dataset).__name__}; expected a "
            "src.data.Dataset, or, for a dataset of examples, a config with the key 'iterator'"
        )
    source = call(config, "dataset", batch_source, dataset.train, config["seed"])
    dataset = replace(dataset, train=source)
    model = call(
        config,
        "model",
        resolve(config["model"], "model", MODELS),
        config,
        input_shape=dataset.input_shape,
        num_classes=dataset.num_classes,
    )
    learning_rates, first_rate = learning_rate(config)
    if model.compiled:
        refuse_what_is_compiled(config)
        learning_rates = None
    else:
        optimizers = {
            name.lower(): value
            for name, value in vars(keras.optimizers).items()
            if isinstance(value, type) and issubclass(value, keras.optimizers.Optimizer)
        }
        optimizer = resolve(config["optimizer"], "optimizer", optimizers)
        accumulate_steps = config["accumulate_steps"]
        accumulation = (
            {"gradient_accumulation_steps": accumulate_steps} if accumulate_steps > 1 else {}
        )
        model.compile(
            optimizer=call(
                config,
                "optimizer",
                optimizer,
                learning_rate=first_rate,
                **accumulation,
                **config["optimizer_arguments"],
            ),
            loss="sparse_categorical_crossentropy",
            metrics=["accuracy"],
            jit_compile=config["jit_compile"],
        )
    from src.history import is_lower_better
    from src.steps import floats, make_variables

    monitor = config["monitor"]
    if dataset.valid is None:
        monitor = monitor.removeprefix("val_")
    # A first batch shows whether model and data fit, before anything is written.
    first, fine_tune = dataset.train.batch(0, 0), config["fine_tune"]
    metrics = floats(call(config, "model", make_variables, model, first, fine_tune))
    if monitor.startswith("val_") and monitor.removeprefix("val_") not in metrics:
        raise UsageError(
            f"monitor is {config['monitor']!r}; choose one of {', '.join(sorted(metrics))}, "
            "or one with val_ before it"
        )
    call(config, "monitor", is_lower_better, monitor, config["monitor_mode"])
    return Experiment(
        config=config,
        dataset=dataset,
        model=model,
        learning_rates=learning_rates,
        monitor=monitor,
        callbacks=callbacks_of(config),
    )


def callbacks_of(config: Mapping[str, Any]) -> list["keras.callbacks.Callback"]:
    """Return the Keras callbacks that a config names."""
    return [from_mapping(config, "callbacks", entry) for entry in config["callbacks"]]


def hooks_of(config: Mapping[str, Any]) -> list["Hook"]:
    """Return the hooks that a config names."""
    return [from_mapping(config, "hooks", entry) for entry in config["hooks"]]


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
    from src.commit_file import commit_after

    try:
        return commit_after(folder, epoch)
    except ValueError as error:
        raise UsageError(f"--fork: {error}") from error


def splits_of(config: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Return key and import path of the dataset of each split, for a config with an iterator."""
    names = {f"datasets.{split}": (split, path) for split, path in config["datasets"].items()}
    if not names:
        names["dataset"] = "train", config["dataset"]
        names["validation_dataset"] = "validation", config["validation_dataset"]
    return {split: (key, path) for key, (split, path) in names.items() if path}


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


def check_ranges(config: Mapping[str, Any]) -> None:
    """Refuse numbers that have the right type and make no sense.

    Raises:
        UsageError: naming the key, the value and what it may be.
    """
    check_common_ranges(config)
    if "iterator" in config:
        check_ranges_of_iterator(config)
    elif "train" in config:
        check_ranges_of_variant(config)
    else:
        check_ranges_of_compiled(config)


def check_ranges_of_compiled(config: Mapping[str, Any]) -> None:
    """See `check_ranges`."""
    require_at_least_one(
        config, "batch_size", "num_epochs", "n_filters", "n_layers", "accumulate_steps"
    )
    if config["jit_compile"] and config["deterministic"]:
        raise UsageError(
            "jit_compile and deterministic exclude each other, for TensorFlow has no deterministic "
            "XLA; add --no_deterministic (bits may then change on a GPU), or --no_jit_compile"
        )
    if config["checkpoint_steps"] < 0:
        raise UsageError(
            f"checkpoint_steps is {config['checkpoint_steps']}; it must be at least 0 (0: never)"
        )
    if not 0 <= config["dropout"] < 1:
        raise UsageError(f"dropout is {config['dropout']}; it must be at least 0 and below 1")
    num_folds, fold = config["num_folds"], config["fold"]
    if num_folds < 0 or num_folds == 1:
        raise UsageError(f"num_folds is {num_folds}; it must be at least 2, or 0 for none")
    if not 0 <= fold < max(num_folds, 1):
        raise UsageError(f"fold is {fold}; it must be at least 0 and below num_folds, {num_folds}")
    rate = config["learning_rate"]
    if rate is not None and (not isinstance(rate, int | float) or not rate > 0):
        raise UsageError(f"learning_rate is {rate!r}; it must be a number above 0")


def check_ranges_of_iterator(config: Mapping[str, Any]) -> None:
    """See `check_ranges`."""
    require_at_least_one(config, "batch_size", "hook_freq", "log_freq", "start_log_freq")
    given = ("num_steps", "num_epochs", "test_batch_size", "ckpt_freq", "max_batches_per_epoch")
    require_at_least_one(config, *(key for key in given if config[key] is not None))
    require_at_least_one(config, "ckpt_keep")
    if config["n_data_processes"] < 0:
        raise UsageError(
            f"n_data_processes is {config['n_data_processes']}; it must be at least 0 (0: none)"
        )


def check_ranges_of_variant(config: Mapping[str, Any]) -> None:
    """See `check_ranges`."""
    train = config["train"]
    if not train["train_feeder"]:
        raise UsageError("the key 'train.train_feeder' is missing: {type: a feeder, …}")
    numbers = ("save_checkpoint_steps", "early_stopping_hook_run_every_steps")
    given = [key for key in numbers if train[key] is not None]
    steps = [f"early_stopping_steps_without_{change}" for change in ("decrease", "increase")]
    given += [key for key in steps if train[key] is not None]
    require_at_least_one(train, "epochs", "save_summary_steps", *given, section="train.")
    for one, other in (steps, ("save_checkpoint_steps", "save_checkpoint_secs")):
        if train[one] is not None and train[other] is not None:
            raise UsageError(
                f"train.{one} is {train[one]} and train.{other} is {train[other]}; give one of "
                f"them (--delete train.{other})"
            )
    for key in ("save_checkpoint_secs", "validation_secs"):
        value = train[key]
        if value is not None and (not isinstance(value, int | float) or value <= 0):
            raise UsageError(f"train.{key} is {value!r}; it must be a number of seconds above 0")
    if train["validation_secs"] and not train["eval_feeder"]:
        raise UsageError("train.validation_secs needs a train.eval_feeder to validate on")


def require_at_least_one(config: Mapping[str, Any], *keys: str, section: str = "") -> None:
    """Refuse a number below 1, or what is none.

    Raises:
        UsageError: naming the key and the value.
    """
    for key in keys:
        if not isinstance(config[key], int) or config[key] < 1:
            raise UsageError(f"{section}{key} is {config[key]!r}; it must be at least 1")


def check_common_ranges(config: Mapping[str, Any]) -> None:
    """Refuse what makes no sense for any config.

    Raises:
        UsageError: naming the key, the value and what it may be.
    """
    threads = config["threads"]
    if threads is not None and (not isinstance(threads, int) or threads < 1):
        raise UsageError(f"threads is {threads!r}; it must be at least 1, or null: one a core")
    for key in ("patience", "checkpoint_seconds"):
        if config[key] < 0:
            raise UsageError(f"{key} is {config[key]}; it must be at least 0 (0: never)")
    if not 0 <= config["seed"] <= MAX_SEED:
        raise UsageError(f"seed is {config['seed']}; it must be from 0 to {MAX_SEED}")
    for key, choices in CHOICES.items():
        if config[key] not in choices:
            raise UsageError(f"{key} is {config[key]!r}; choose one of {', '.join(choices)}")


def learning_rate(config: Mapping[str, Any]) -> tuple[list[tuple[int, float]] | None, Any]:
    """Return the rates by epoch, if any, and what the optimizer starts with.

    Raises:
        UsageError: if `lr_schedule` is neither a list of [until_epoch, rate] nor a Keras schedule.
    """
    schedule, rate = config["lr_schedule"], config["learning_rate"]
    if schedule is None:
        return None, DEFAULT_RATE if rate is None else float(rate)
    if rate is not None:
        raise UsageError(
            f"learning_rate is {rate} and there is an lr_schedule, {schedule}; "
            "add --lr_schedule=null to train at one rate"
        )
    if isinstance(schedule, Mapping | str):
        return None, learning_rate_schedule(config, "lr_schedule", schedule)
    pairs = (
        [
            (pair[0], float(pair[1]))
            for pair in schedule
            if isinstance(pair, list)
            and len(pair) == 2
            and isinstance(pair[0], int)
            and isinstance(pair[1], int | float)
            and math.isfinite(pair[1])
            and pair[1] >= 0
        ]
        if isinstance(schedule, list)
        else []
    )
    epochs = [until for until, _ in pairs]
    if not pairs or len(pairs) != len(schedule) or epochs != sorted(set(epochs)) or epochs[0] < 1:
        raise UsageError(
            f"lr_schedule is {schedule}; expected a list of [until_epoch, rate] with rising "
            "epochs, such as [[3, 0.1], [6, 0.01]], or a Keras schedule, such as "
            "{class: keras.optimizers.schedules.CosineDecay, initial_learning_rate: 0.1, "
            "decay_steps: 1000}"
        )
    return pairs, pairs[0][1]


def learning_rate_schedule(config: Mapping[str, Any], key: str, value: Any) -> Any:
    """Return a Keras schedule over steps: {class: exponential, …}, or "0.1:1000:0.01".

    The text is rates with the steps between at which they change.

    Raises:
        UsageError: if it is neither.
    """
    import keras

    schedules = keras.optimizers.schedules
    if isinstance(value, str) and ":" in value:
        try:
            numbers = [float(part) for part in value.split(":")]
            return schedules.PiecewiseConstantDecay(
                [int(step) for step in numbers[1::2]], numbers[::2]
            )
        except ValueError as error:
            if value.replace(":", "").replace(".", "").isdecimal():
                raise UsageError(f"{key} is {value!r}: {error}") from None
    known = {
        "exponential": schedules.ExponentialDecay,
        "piecewise": schedules.PiecewiseConstantDecay,
        "cosine": schedules.CosineDecay,
        "cosine_restarts": schedules.CosineDecayRestarts,
    }
    return from_mapping(config, key, value, known)


def refuse_what_is_compiled(config: Mapping[str, Any]) -> None:
    """Refuse learning rates for a model that has compiled itself, with an optimizer of its own.

    Raises:
        UsageError: naming the settings.
    """
    given = [key for key in ("lr_schedule", "learning_rate") if config[key] is not None]
    if given:
        raise UsageError(
            f"model {config['model']!r} compiles itself and would not see {', '.join(given)}; "
            f"add {' '.join(f'--{key}=null' for key in given)}"
        )


def from_mapping(
    config: Mapping[str, Any], key: str, value: Any, registered: Mapping[str, Any] | None = None
) -> Any:
    """Call the class or function that `value` names: "path", or {class: path, argument: …}."""
    arguments = dict(value) if isinstance(value, Mapping) else {"class": value}
    name = arguments.pop("class", None)
    if not isinstance(name, str):
        raise UsageError(f"{key} is {value}; expected an import path, or a mapping with `class`")
    return call(config, key, resolve(name, key, registered), **arguments)


def call(
    config: Mapping[str, Any], key: str, function: Callable[..., Any], /, *args: Any, **kwargs: Any
) -> Any:
    """Call what a key of the config names; a refusal names the key and the line that refused.

    Raises:
        UsageError: in place of a ValueError, a TypeError, or the KeyError of a key that is missing.
    """
    try:
        return function(*args, **kwargs)
    except (ValueError, TypeError, KeyError) as error:
        logging.getLogger(__name__).debug("%s", traceback.format_exc())
        frames = traceback.extract_tb(error.__traceback__)[1:]  # without this function's own
        of_project = [
            frame
            for frame in frames
            if Path(frame.filename).is_relative_to(ROOT) and "site-packages" not in frame.filename
        ]
        place = ""
        if frames:
            frame = (of_project or frames)[-1]
            place = f"{Path(frame.filename).name}, line {frame.lineno}; "
        reason = f"KeyError: {error}" if isinstance(error, KeyError) else str(error)
        reason = " ".join(reason.split())
        value: Any = config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        raise UsageError(
            f"{key} {value!r} does not take this config: {reason[:300]} ({place}-l DEBUG shows all)"
        ) from error


def quiet_libraries() -> None:
    """Keep notices of matplotlib, and what can be of TensorFlow's, out of the output."""
    for name in ("matplotlib", "absl", "tensorflow"):
        logging.getLogger(name).setLevel(logging.WARNING)
    if not logging.getLogger().isEnabledFor(logging.DEBUG):
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")
