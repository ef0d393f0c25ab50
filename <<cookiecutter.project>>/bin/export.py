"""Export a run's model: a SavedModel that needs nothing of this project, and a .keras file."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import vegab
from configs import registry
from engine.experiment import commit_named, config_of
from engine.training import fingerprint
from src import experiment


def export(run: str, output: str, checkpoint: str = "best") -> None:
    """Write the model of the run in folder RUN into the new folder OUTPUT.

    Args:
        run: a run folder.
        output: a folder to make, for saved_model/ and model.keras
        checkpoint: "best", "latest", or the path of a checkpoint
    """
    folder, target = Path(run), Path(output)
    config = config_of(folder, registry)
    path = commit_named(folder, checkpoint)
    if "iterator" in config:
        raise vegab.UsageError(
            f"the config of {run} has an iterator, which alone knows what its model takes; export "
            "a compiled Keras model, or save yours in an evaluation callback"
        )
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise vegab.UsageError(f"{output} is there already; give a new folder")
    prepared = experiment.build(config, trains=False)
    prepared.load(path)
    from engine.hooks import export as write

    batch = prepared.dataset.train.batch(0, 0)
    features = batch[0] if isinstance(batch, tuple) else batch
    signatures = write(prepared.model, features, prepared.serving, target)
    for name, inputs in signatures.items():
        print(f"{name}: {', '.join(f'{key} {spec}' for key, spec in inputs.items())}")
    fingerprint.code_differs(path)
    print(f"{path.name} of {run}, in {output}: model.keras, saved_model")


if __name__ == "__main__":
    vegab.wrap_no_config_registry(export, short_flags={"c": "checkpoint"})
