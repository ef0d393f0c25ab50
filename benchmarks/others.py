"""The digits' Keras function under Hydra's multirun with joblib, and under Ray Tune, two at a time.

    python benchmarks/others.py FOLDER    # Ray Tune
    python benchmarks/others.py --multirun hydra/launcher=joblib n_filters=4,6 seed=0,1

`benchmarks/sweep.py` runs it for its row `others`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parent.parent / "<<cookiecutter.project>>"
EPOCHS = 2
FILTERS, SEEDS = (4, 6, 8, 10), tuple(range(8))
# Else Ray listens on all interfaces.
os.environ |= {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0"}


def fit(n_filters: int, seed: int, folder: Path) -> float:
    """Train by `model.fit` as Keras' documentation does it, with a history and a checkpoint.

    Data, model, optimizer and threads are those of the digits config.
    """
    sys.path.insert(0, str(PROJECT))
    from configs import registry
    from src import experiment

    config = registry["digits"] | {"num_epochs": EPOCHS, "n_filters": n_filters, "seed": seed}
    built = experiment.build(config | {"deterministic": False, "jit_compile": "auto"})
    import keras
    import tensorflow as tf

    source: Any = built.dataset.train
    data = tf.data.Dataset.from_tensor_slices((source.prepare(source.features), source.labels))
    data = data.shuffle(len(source)).batch(source.batch_size).prefetch(tf.data.AUTOTUNE)
    callbacks = [
        keras.callbacks.CSVLogger(str(folder / "history.csv")),
        keras.callbacks.ModelCheckpoint(str(folder / "model.keras")),
        keras.callbacks.TensorBoard(str(folder / "tb")),
    ]
    valid = built.dataset.valid
    history = built.model.fit(
        data, epochs=EPOCHS, validation_data=valid, callbacks=callbacks, verbose=0
    )
    return history.history["val_loss"][-1]


def ray_tune(folder: str) -> None:
    """Train all by Ray Tune; each of its trials has a core, and this machine is to have two."""
    import ray
    from ray import tune

    def train(config: dict[str, int]) -> None:
        place = Path(tune.get_context().get_trial_dir())
        tune.report({"val_loss": fit(config["n_filters"], config["seed"], place)})

    ray.init("local", num_cpus=2, include_dashboard=False)
    space = {"n_filters": tune.grid_search([*FILTERS]), "seed": tune.grid_search([*SEEDS])}
    tuner = tune.Tuner(
        train,
        param_space=space,
        tune_config=tune.TuneConfig(metric="val_loss", mode="min"),
        run_config=tune.RunConfig(name="tune", storage_path=str(Path(folder).resolve())),
    )
    results = tuner.fit()
    if results.errors:
        sys.exit(str(results.errors[0]))


def hydra_multirun() -> None:
    """Train what the command line says by Hydra."""
    import hydra
    from hydra.core.config_store import ConfigStore
    from hydra.core.hydra_config import HydraConfig

    ConfigStore.instance().store(name="config", node={"n_filters": 8, "seed": 0})

    @hydra.main(version_base=None, config_name="config")
    def train(config: Any) -> float:
        place = Path(HydraConfig.get().runtime.output_dir)
        return fit(config.n_filters, config.seed, place)

    train()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--multirun"]:
        hydra_multirun()
    else:
        ray_tune(sys.argv[1])
