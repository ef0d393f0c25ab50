"""Evaluate a run on the test set; this is the only place where the test set is read."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import vegab
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
    path = {"best": folder / "model_best.h5", "latest": folder / "model.h5"}.get(
        checkpoint, Path(checkpoint)
    )
    if not path.is_file():
        raise vegab.UsageError(
            f"there is no checkpoint {path}; --checkpoint takes best, latest or the path of one, "
            "and a run has its first after its first epoch"
        )
    config = results.load_config(folder)
    # The training batches are built but never drawn here.
    prepared = experiment.build(config)

    import pandas as pd

    from src.checkpoint import load_weights, read_state, verify, write_atomically

    verify(path)
    load_weights(path, prepared.model)
    features, labels = prepared.dataset.load_test()
    metrics = prepared.model.evaluate(features, labels, batch_size=256, verbose=0, return_dict=True)
    probabilities = prepared.model.predict(features, batch_size=256, verbose=0)
    predictions = probabilities.argmax(axis=1)
    matrix = results.confusion_matrix(labels, predictions, prepared.dataset.num_classes)

    output = folder / "eval"
    output.mkdir(exist_ok=True)
    summary = {
        "checkpoint": path.name,
        "epoch": read_state(path)["epoch"],
        "split": "test",
        "num_examples": len(labels),
        **{key: float(value) for key, value in metrics.items()},
    }
    write_atomically(output / "test.json", (json.dumps(summary, indent=2) + "\n").encode())
    per_class = results.per_class_figures(matrix)
    write_atomically(output / "per_class.csv", per_class.to_csv().encode())
    table = pd.DataFrame(
        {
            "label": labels,
            "prediction": predictions,
            "probability": probabilities.max(axis=1),
        }
    )
    table.index.name = "index"
    write_atomically(output / "predictions.csv", table.to_csv().encode())
    results.draw_confusion_matrix(
        matrix, output / "confusion_matrix.png", f"{folder.resolve().name}, {path.name}, test set"
    )
    figures = "  ".join(f"{key} {value:.4g}" for key, value in metrics.items())
    print(f"test set, {len(labels)} examples, {path.name} of epoch {summary['epoch']}:  {figures}")
    print(f"in {output}: {', '.join(sorted(file.name for file in output.iterdir()))}")


if __name__ == "__main__":
    vegab.wrap_no_config_registry(evaluate)
