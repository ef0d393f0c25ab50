#!/usr/bin/env python
"""Evaluate runs on the test set; this is the only place where the test set is read.

A run with an iterator is evaluated on one of its splits instead: what the iterator makes of each
example is stored, see engine/iterators/evaluation.py, and handed to the config's callbacks."""

import logging  # PYTHON_ARGCOMPLETE_OK
import math
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import vegab
from configs import registry
from engine import checkpoints, training
from engine.building import reason_of, refusal, refusals_named
from engine.experiment import commit_named, config_of
from engine.runs import results
from engine.training import fingerprint
from src import experiment
from vegab.config import load_file, merge, resolve_references
from vegab.execution import print_line
from vegab.files import CONFIG, write_json

log = logging.getLogger(__name__)


@vegab.filtered()
def evaluate(
    runs: Sequence[str],
    checkpoint: str = "best",
    *,
    evaluation: Sequence[str] = (),
    name: str = "",
    split: str = "validation",
    callbacks_only: bool = False,
    own_code: bool = False,
) -> None:
    """Evaluate runs on the test set; write the results to the folder eval of each.

    Args:
        runs: run folders, folders of runs, or patterns in quotes such as 'results/lr_*'
        checkpoint: "best", "latest", or the path of a checkpoint
        evaluation: evaluate with this config over the run's; may be repeated
        name: store outputs as NAME-STEP instead of by the config's or the split's name
        split: the split to evaluate on, if the config has an iterator
        callbacks_only: only call the callbacks with the latest stored outputs, without a model
        own_code: use the code that each run ran, not that of the project"""
    folders, problems = results.find_runs(runs)
    if len(folders) > 1 and checkpoint not in ("best", "latest"):
        raise vegab.UsageError(f"--checkpoint={checkpoint} belongs to one run; name only that run")
    for folder in map(Path, folders):
        try:
            evaluate_run(folder, checkpoint, evaluation, name, split, callbacks_only)
        except Exception as error:
            if len(folders) == 1:
                raise
            log.debug("", exc_info=error)
            is_said = isinstance(error, vegab.UsageError | OSError)
            kind = "" if is_said else f"{type(error).__name__}: "
            problems.append(f"{folder}: {kind}{reason_of(error)}")
    results.tell(problems)


def evaluate_run(
    folder: Path, checkpoint: str, files: Sequence[str], name: str, split: str, callbacks_only: bool
) -> None:
    """Evaluate one run; see `evaluate`."""
    config = config_of(folder, registry)
    if "iterator" in config:
        # Ended by a signal, it leaves nothing half written behind.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        files = files or [""]
        configs = [config_asked_for(folder, file, split) for file in files]
        names = [name or Path(file).stem or split for file in files]
        fits = all(Path(each).name == each and not each.startswith(".") for each in names)
        if not fits or len(set(names)) < len(names):
            shown = " and ".join(map(repr, names))
            hint = "give each another single word"
            raise vegab.UsageError(f"outputs cannot be stored as {shown}; {hint}")
        for file, own, each in zip(files, configs, names, strict=True):
            if callbacks_only:
                call_callbacks(folder, file, each)
            else:
                evaluate_with_iterator(folder, checkpoint, own, file, each, split)
        return
    if files or name or callbacks_only or split != "validation":
        asked = "-e, --name, --split and --callbacks_only"
        raise vegab.UsageError(f"the config of {folder} has no iterator, which {asked} need")
    if "train" in config and not config["train"]["eval_feeder"]:
        raise vegab.UsageError(f"{folder} has no train.eval_feeder to evaluate on")
    evaluate_model(folder, commit_named(folder, checkpoint), config)


def evaluate_model(folder: Path, path: Path, config: dict[str, Any]) -> None:
    """Write metrics and predictions on the test set; of a variant, on what its eval_feeder has."""
    prepared = experiment.build(config, trains=False)

    import keras

    from engine.batches import batch_source, require_labels_in_classes
    from engine.runs import predictions

    epoch = prepared.load(path)["epoch"]
    model, dataset = prepared.model, prepared.dataset
    split = "validation" if "train" in config else "test"
    with refusals_named(config, "dataset"):
        data = dataset.load_test() if split == "test" else dataset.valid
        source = batch_source(data, shuffle=False)
        if (number := getattr(dataset, "num_classes", None)) is not None:
            require_labels_in_classes(number, source)
    found, metrics, notes = None, {}, []
    try:
        validation = training.Validation(model, source)
        metrics = validation.run(keras.callbacks.CallbackList(), stop=lambda: False) or {}
    except (OSError, vegab.UsageError):
        raise
    except Exception as error:
        _, labels, _ = keras.utils.unpack_x_y_sample_weight(source.batch(0, 0))
        has_step = type(model).test_step is not keras.Model.test_step
        if has_step or (model.loss is not None and labels is not None):
            raise refusal(config, "model", error, f"the {split} set") from error
        notes.append("no metrics: they need a test_step, or labels and a loss")
    try:
        found = predictions.predict(model, source)
    except Exception as error:
        notes.append(f"no predictions: {reason_of(error)}")
    if not found and not metrics:
        raise vegab.UsageError(f"model {config['model']!r} cannot be evaluated: {'; '.join(notes)}")
    output, number = folder / "eval", ""
    output.mkdir(exist_ok=True)
    summary = {"checkpoint": path.name, "epoch": epoch, "split": split}
    if found:
        summary["num_examples"] = found.num_examples
        number = f" {found.num_examples} examples,"
        title = f"{folder.resolve().name}, {path.name}, {split} set"
        losses = keras.tree.flatten(model.loss)
        are_logits = all(getattr(loss, "from_logits", False) for loss in losses)
        names = list(getattr(dataset, "class_names", None) or ())
        notes += predictions.write(output, title, found, names, are_logits)
    summary["code_differs"] = fingerprint.code_differs(path, folder)
    # JSON knows no NaN.
    summary |= {key: value if math.isfinite(value) else None for key, value in metrics.items()}
    write_json(output / f"{split}.json", summary)
    for note in notes:
        print_line(note)
    shown = "".join(f"  {key} {value:.4g}" for key, value in metrics.items())
    print_line(f"{split} set,{number} {path.name} of epoch {epoch}:{shown}")
    print_line(f"in {output}: {', '.join(sorted(file.name for file in output.iterdir()))}")


def config_asked_for(folder: Path, file: str, split: str) -> dict[str, Any]:
    """Return the run's config with that of an -e, if any, over it."""
    from engine.iterators import splits_of

    own = folder / CONFIG
    config = registry.resolve(file or str(own), bases=[own])
    if not file or "test_mode" not in load_file(Path(file)):
        config["test_mode"] = True
    if split not in (splits := splits_of(config)):
        raise vegab.UsageError(f"{folder} has no split {split!r}; it has {', '.join(splits)}")
    return config


def evaluate_with_iterator(
    folder: Path, checkpoint: str, config: dict[str, Any], file: str, name: str, split: str
) -> None:
    """Store what the iterator makes of a split by one or more checkpoints; call the callbacks."""
    from engine.iterators import callbacks_of, evaluation, run_callbacks

    if checkpoint not in ("best", "latest"):
        config |= {"eval_all": False, "eval_forever": False}
    path = folder / checkpoints.LATEST  # with eval_forever, training may not have written it yet
    if not config.get("eval_forever"):
        path = commit_named(folder, "latest" if config.get("eval_all") else checkpoint)
    # A difference from the training does not matter here.
    prepared = experiment.build(config, str(folder), resume_inexact=True, trains=False)
    assert prepared.iterator is not None
    callbacks, arguments = callbacks_of(config, prepared.iterator, prepared.model)
    data_in = prepared.iterator.datasets[split]
    (folder / "eval").mkdir(exist_ok=True)
    commits = evaluation.checkpoints_to_evaluate(folder, config, path)
    for number, commit in enumerate(commits):
        if number == 0:
            fingerprint.code_differs(commit, folder)
        step = checkpoints.read_state(commit)["global_step"]
        output = folder / "eval" / f"{name}-{step}"
        try:
            meta = evaluation.evaluate_split(prepared, commit, output, split)
        except evaluation.NoOutputsError as error:
            raise vegab.UsageError(f"iterator: {error}") from error
        except evaluation.OtherModelError as error:
            model = f"the model of {file or folder}"
            raise vegab.UsageError(f"{commit.name} does not belong to {model}: {error}") from error
        tell(meta, output, run_callbacks(output, data_in, config, callbacks, arguments))


def call_callbacks(folder: Path, file: str, name: str) -> None:
    """Call the callbacks with stored outputs; neither model nor Keras is imported."""
    from engine.iterators import StoredOutputs, callbacks_of, run_callbacks, splits_of

    output = results.newest_evaluations(folder, "meta.yaml").get(name)
    if output is None:
        stored = sorted(path.parent.name for path in folder.glob("eval/[!.]*/meta.yaml"))
        hint = f"there are {', '.join(stored)}" if stored else "evaluate without --callbacks_only"
        raise vegab.UsageError(f"no outputs are stored as {name} in {folder / 'eval'}; {hint}")
    meta = StoredOutputs(output).meta
    if not {"config", "split", "checkpoint", "global_step"} <= meta.keys():
        raise vegab.UsageError(f"{output} is not what an evaluation writes; evaluate again")
    config = meta["config"]  # their own, and what the file says now
    if file:
        config = resolve_references(merge(config, load_file(Path(file))))
    callbacks, arguments = callbacks_of(config)
    key, data = splits_of(config)[meta["split"]]
    make = vegab.resolve(data, key)
    with refusals_named(config, key):
        data_in = make(config)
    tell(meta, output, run_callbacks(output, data_in, config, callbacks, arguments))


def tell(meta: Mapping[str, Any], output: Path, scalars: Mapping[str, Any]) -> None:
    """Print the line that an evaluation ends with."""
    shown = [f"{name}/{k} {v:.4g}" for name, items in scalars.items() for k, v in items.items()]
    what = f"{meta['split']}, {meta['num_examples']} examples, {meta['checkpoint']}"
    values = "  ".join([":", *shown] if shown else [])
    print_line(f"{what} of step {meta['global_step']}, in {output}{values}")


if __name__ == "__main__":
    flags = {"e": "evaluation", "n": "name", "c": "checkpoint"}
    vegab.wrap_no_config_registry(evaluate, short_flags=flags)
