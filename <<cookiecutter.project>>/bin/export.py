#!/usr/bin/env python
"""Export a run's model: a SavedModel that needs nothing of this project, .keras, weights, ONNX."""

import os  # PYTHON_ARGCOMPLETE_OK
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import vegab
from configs import registry
from engine.experiment import commit_named, config_of
from engine.training import fingerprint
from src import experiment


@vegab.filtered()
def export(run: str, output: str, checkpoint: str = "best", *, own_code: bool = False) -> None:
    """Write the model of the run in folder RUN into the new folder OUTPUT.

    Args:
        run: a run folder
        output: a new folder, for all forms that the model can have
        checkpoint: "best", "latest", or the path of a checkpoint
        own_code: use the code that the run ran, not that of the project"""
    folder, target = Path(run), Path(output)
    config = config_of(folder, registry)
    path = commit_named(folder, checkpoint)
    if "iterator" in config:
        hint = "export a compiled Keras model, or save yours in an evaluation callback"
        why = "has an iterator, and only that knows what its model takes"
        raise vegab.UsageError(f"the config of {run} {why}; {hint}")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise vegab.UsageError(f"{output} already exists; give a new folder")
    prepared = experiment.build(config, trains=False)
    prepared.load(path)
    import keras

    from engine.hooks import exporters

    features, *_ = keras.utils.unpack_x_y_sample_weight(prepared.dataset.train.batch(0, 0))
    signatures, missing = exporters.export(prepared.model, features, prepared.serving, target)
    for name, inputs in signatures.items():
        print(f"{name}: {', '.join(f'{key} {spec}' for key, spec in inputs.items())}")
    fingerprint.code_differs(path, folder)
    if missing:
        print(exporters.shown(missing))
    print(f"{path.name} of {run}, in {output}: {', '.join(sorted(os.listdir(target)))}")


if __name__ == "__main__":
    vegab.wrap_no_config_registry(export, short_flags={"c": "checkpoint"})
