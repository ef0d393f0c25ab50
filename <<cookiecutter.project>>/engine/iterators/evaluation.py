"""Stores what an iterator makes of each example of a split, by index, as `docs/iterators.md` says.

`evaluate_split` writes a folder, `StoredOutputs` reads it as a dataset, `run_callbacks` hands it to
functions that compute metrics. The last two need neither a model nor Keras."""

import contextlib
import itertools
import logging
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import h5py
from tqdm import tqdm

from engine import checkpoints
from engine.experiment import Experiment
from engine.hooks import Hook
from engine.iterators import outputs
from engine.iterators.base import NoOutputsError
from engine.iterators.datasets import ExampleBatches
from engine.iterators.steps import IteratorSteps, sow, undone
from engine.training import Guard
from vegab.files import CONFIG, link, read_json, replacing_folder
from vegab.files import META as RUN_META

log = logging.getLogger(__name__)
SECONDS_BETWEEN_LOOKS = 2.0
REFUSALS = (ValueError, KeyError, RuntimeError)  # of Keras, PyTorch and ours


class OtherModelError(ValueError):
    """A checkpoint does not hold what the model to be evaluated needs."""


def evaluate_split(
    experiment: Experiment, checkpoint: Path, output: Path, split: str
) -> dict[str, Any]:
    """Restore a checkpoint, store what the iterator makes of each example; return `meta.yaml`."""
    iterator, config = experiment.iterator, experiment.config
    assert iterator is not None
    dataset, size = iterator.datasets[split], config["test_batch_size"] or config["batch_size"]
    batches = ExampleBatches(dataset, size, config["seed"], False, config["n_data_processes"])
    with contextlib.closing(batches):
        iterator.set_position(0, 0, 0, split)
        state = restore(iterator, checkpoint, batches)
        iterator.set_position(state["global_step"], state["epoch"], 0, split)
        return store_outputs(iterator, config, batches, output, checkpoint.name)


def store_outputs(
    iterator: Any, config: Mapping[str, Any], batches: Any, output: Path, checkpoint: str
) -> dict[str, Any]:
    """Store what an iterator makes of the split where it stands; see `evaluate_split`."""
    global_step, epoch = iterator.get_global_step(), iterator.get_epoch_step()
    dataset, split = batches.dataset, iterator.get_split()
    with replacing_folder(output) as partial:
        writer, steps = outputs.OutputWriter(partial), range(batches.steps_per_epoch)
        for step in tqdm(steps, desc=split, unit="batch", leave=False, disable=None):
            batch = batches.batch(0, step)
            iterator.set_position(global_step, epoch, step, split)
            sow(config["seed"], step)
            size = min(batches.batch_size, len(dataset) - writer.num_examples)
            made = iterator.evaluate(batch)
            if not isinstance(made, Mapping):
                what = f"eval_op of {type(iterator).__name__} returns a {type(made).__name__}"
                raise NoOutputsError(f"{what}; expected a dictionary of arrays or lists")
            writer.add(made, size)
        writer.add_labels(getattr(dataset, "labels", None) or {})
        name = f"{type(iterator).__module__}:{type(iterator).__name__}"
        callbacks = outputs.own_callbacks(iterator, iterator.model) | config["eval_callbacks"]
        meta = {
            "description": f"what {name} made of each example of the split {split}",
            "split": split,
            "checkpoint": checkpoint,
            "global_step": global_step,
            "num_examples": len(dataset),
            **writer.finish(),
            "config": dict(config) | {"eval_callbacks": callbacks},
        }
        with open(partial / outputs.META, "w", encoding="utf-8") as file:
            outputs.yaml_of_outputs().dump(meta, file)
    return meta


class EvaluateEpochs(Hook):
    """Stores what `eval_op` makes of the validation split after each epoch, in `test_mode`, and
    calls the callbacks; what they return is kept of every epoch, the outputs of the latest."""

    only_tells = True

    def __init__(self, config: Mapping[str, Any], batches: Any, *callbacks: Any) -> None:
        self._config, self._batches, self._callbacks = config, batches, callbacks

    def after_epoch(self, epoch: int) -> None:
        if self._batches is None:
            return
        iterator, step = self.run.iterator, self.run.global_step
        before = iterator.get_global_step(), iterator.get_epoch_step(), iterator.get_batch_step()
        output = Path(self.eval, f"epoch-{step}")
        is_test, iterator.test_mode = iterator.test_mode, True
        try:
            with undone(iterator):
                iterator.set_position(step, epoch, 0, "validation")
                store_outputs(iterator, self._config, self._batches, output, f"epoch {epoch + 1}")
        except NoOutputsError:
            self._batches = None  # nor will there be any after another epoch
            return
        finally:
            iterator.test_mode = is_test
            iterator.set_position(*before)
        for earlier in Path(self.eval).glob("epoch-*"):
            if earlier != output:
                outputs.clean(earlier)
        data_in = iterator.datasets["validation"]
        outputs.run_callbacks(output, data_in, self._config, *self._callbacks)


def restore(iterator: Any, path: Path, batches: Any) -> dict[str, Any]:
    """Give model and iterator the state of a checkpoint; return what it says of its run. What only
    training needs, such as optimizers, is left where this iterator has none of it."""
    checkpoint = checkpoints.Checkpoint(path.parent, iterator.model, iterator.variables)
    try:
        state = checkpoint.read_other(path)
        iterator.begin(str(path))
        weights = checkpoints.RESTORE_WEIGHTS
        checkpoint.prepare_for(weights, lambda: iterator.evaluate(batches.batch(0, 0)))
        with contextlib.suppress(Exception):  # evaluation may have other steps
            checkpoint.prepare_for(weights, IteratorSteps(iterator, batches, 0).dry_run)
        if "iterator" not in state["steps"]:
            raise ValueError(f"{path} is of a run without an iterator")
        if checkpoint.fits(checkpoints.RESTORE_ALL):
            checkpoint.restore(checkpoints.RESTORE_ALL)
        else:
            checkpoint.require_fit(("weights",))
            _assign_found(path, iterator.variables()["variables"], checkpoint.fits(weights))
        if checkpoint.model is not None:
            checkpoints.load_weights(path, checkpoint.model)
        Guard(iterator.model, iterator).load_others(path, state.get("others", {}))
        try:
            iterator.set_state(state["steps"]["iterator"])
        except KeyError:
            iterator.set_weights(state["steps"]["iterator"])  # another iterator, the same model
    except REFUSALS as error:
        reason = " ".join(str(error).replace(str(path), path.name).split())
        raise OtherModelError(reason) from error
    finally:
        checkpoint.close()
    return state


def _assign_found(path: Path, variables: list[Any], is_in_order: bool) -> None:
    """Assign variables that the checkpoint has as often as they are here; it may have others."""
    with h5py.File(path, "r") as file:
        saved = checkpoints.saved_variables(file, "variables")
        wanted = checkpoints.by_unique_path(variables)
        # Of two that are alike here and three there, nobody knows which is which.
        known, here = (Counter(name.split("#")[0] for name in names) for names in (saved, wanted))
        lacking = [
            f"{name} {tuple(variable.shape)}"
            for name, variable in sorted(wanted.items())
            if known[name.split("#")[0]] != here[name.split("#")[0]]
            or saved[name].shape != tuple(variable.shape)
        ]
        if lacking:
            what = f"{path} was written by another model; it lacks these, or has fewer of them"
            raise ValueError(f"{what}: {', '.join(lacking[:6])}")
        if not is_in_order and any("#" in name for name in wanted):
            what = "variables of the same name are taken in their order"
            log.warning("%s: %s; give layers names of their own", path.name, what)
        for name, variable in wanted.items():
            variable.assign(checkpoints.value_of(saved[name]))
        if others := sorted(saved.keys() - wanted.keys()):
            names = ", ".join(others[:6])
            log.warning("%s has variables that evaluation does not use: %s", path.name, names)


def checkpoints_to_evaluate(run: Path, config: Mapping[str, Any], given: Path) -> Iterator[Path]:
    """Yield checkpoints, each under a second name, so that it stays until the next is asked for:
    with `eval_all` all that the run has, with `eval_forever` the latest, then each newer one, until
    the run has ended; else the given one. No global step comes twice."""
    paths = [] if config.get("eval_forever") else [given]
    if config.get("eval_all"):
        paths = [commit.path for commit in reversed(checkpoints.commits_of(run))]
    seen: set[int] = set()
    for path in itertools.chain(paths, _as_they_come(run) if config.get("eval_forever") else ()):
        if path.exists() or not config.get("eval_all"):  # else it was superfluous by now
            with tempfile.TemporaryDirectory(prefix=".evaluating-", dir=run) as name:
                checkpoint = Path(name, path.name)
                link(path, checkpoint)
                step = checkpoints.read_state(checkpoint)["global_step"]
                if step not in seen:
                    seen.add(step)
                    yield checkpoint


def _as_they_come(run: Path) -> Iterator[Path]:
    latest, is_over = run / checkpoints.LATEST, False
    while not is_over:
        # Asked first: the last checkpoint is there before the run says that it has ended.
        meta = read_json(run / RUN_META) or {}
        is_over = meta.get("status") in ("finished", "failed", "interrupted")
        if latest.exists():
            state, config = checkpoints.read_state(latest), read_json(run / CONFIG)
            yield latest
            # Training may itself wait for its evaluation to end.
            is_over |= checkpoints.is_done(state, config.get("num_epochs"), config.get("num_steps"))
        if not is_over:
            time.sleep(SECONDS_BETWEEN_LOOKS)
