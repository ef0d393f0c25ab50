"""Evaluate a run on the test set; this is the only place where the test set is read."""

import json
import math
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import vegab
from configs import registry
from src import experiment, results


def evaluate(run: str, checkpoint: str = "best") -> None:
    """Evaluate the run in folder RUN on the test set and write what comes out to RUN/eval.

    Args:
        run: a run folder.
        checkpoint: "best", "latest", or the path of a checkpoint.
    """
    folder = Path(run)
    if not (folder / "config.json").is_file():
        raise vegab.UsageError(
            f"{run} is not a run folder: it holds no config.json; name one that bin/train.py made"
        )
    named = {"best": folder / "model_best.h5", "latest": folder / "model.h5"}
    path = named.get(checkpoint, Path(checkpoint))
    if not path.is_file():
        hint = "a run has its first after its first epoch"
        if checkpoint == "best" and named["latest"].is_file():
            hint = "no epoch was the best of this run, but --checkpoint=latest is there"
        raise vegab.UsageError(
            f"there is no checkpoint {path}; --checkpoint takes best, latest or the path of one; "
            + hint
        )
    # Settings that are younger than the run have their defaults.
    config = {**registry.get_root_config(), **vegab.read_run(run)["config"]}
    # The training batches are built but never drawn here.
    prepared = experiment.build(config)

    import numpy as np

    from src.checkpoint import load_weights, read_state, verify, write_atomically

    verify(path)
    try:
        load_weights(path, prepared.model)
    except ValueError as error:
        raise vegab.UsageError(f"{path} does not belong to {run}: {error}") from error
    features, labels = prepared.dataset.load_test()
    metrics = prepared.model.evaluate(features, labels, batch_size=256, verbose=0, return_dict=True)
    outputs = prepared.model.predict(features, batch_size=256, verbose=0)

    output = folder / "eval"
    output.mkdir(exist_ok=True)
    figures = {key: float(value) for key, value in metrics.items()}
    summary = {
        "checkpoint": path.name,
        "epoch": read_state(path)["epoch"],
        "split": "test",
        "num_examples": len(labels),
        # JSON knows no NaN.
        **{key: value if math.isfinite(value) else None for key, value in figures.items()},
    }
    write_atomically(output / "test.json", (json.dumps(summary, indent=2) + "\n").encode())
    num_classes = prepared.dataset.num_classes
    if num_classes == 2 and outputs.shape == (len(labels), 1):
        outputs = np.concatenate([1 - outputs, outputs], axis=1)  # one output: that of class 1
    if outputs.shape == (len(labels), num_classes):
        title = f"{folder.resolve().name}, {path.name}, test set"
        write_classification(output, title, np.ravel(labels), outputs)
    else:
        print(f"the outputs, of shape {outputs.shape}, are not those of a classifier: figures only")
    shown = "  ".join(f"{key} {value:.4g}" for key, value in figures.items())
    print(f"test set, {len(labels)} examples, {path.name} of epoch {summary['epoch']}:  {shown}")
    print(f"in {output}: {', '.join(sorted(file.name for file in output.iterdir()))}")


def write_classification(output: Path, title: str, labels: Any, probabilities: Any) -> None:
    """Write predictions, per-class figures and the confusion matrix.

    Args:
        output: a folder.
        title: above the picture.
        labels: int array of shape (num_examples,).
        probabilities: float array of shape (num_examples, num_classes).
    """
    import pandas as pd

    from src.checkpoint import write_atomically

    predictions = probabilities.argmax(axis=1)
    columns = {
        "label": labels,
        "prediction": predictions,
        "probability": probabilities.max(axis=1),
    }
    table = pd.DataFrame(columns).rename_axis("index")
    write_atomically(output / "predictions.csv", table.to_csv().encode())
    matrix = results.confusion_matrix(labels, predictions, probabilities.shape[1])
    per_class = results.per_class_figures(matrix)
    write_atomically(output / "per_class.csv", per_class.to_csv().encode())
    results.draw_confusion_matrix(matrix, output / "confusion_matrix.png", title)


if __name__ == "__main__":
    vegab.wrap_no_config_registry(evaluate)
