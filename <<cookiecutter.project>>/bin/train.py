"""Train CONFIG into the folder SAVE_PATH; the same command continues an interrupted run."""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import vegab
from configs import registry
from src import experiment, results


def train(
    config: dict[str, Any],
    save_path: str,
    prepared: experiment.Experiment,
    *,
    resume_inexact: bool = False,
) -> None:
    """Train CONFIG into the folder SAVE_PATH; the same command continues an interrupted run.

    Args:
        config: the resolved config.
        save_path: the run folder.
        prepared: what the config stands for.
        resume_inexact: continue although versions, processor, data or code have changed
    """
    from src.training_loop import training_loop

    training_loop(
        model=prepared.model,
        train=prepared.dataset.train,
        valid=prepared.dataset.valid,
        save_path=Path(save_path),
        num_epochs=config["num_epochs"],
        learning_rates=prepared.learning_rates,
        monitor=prepared.monitor,
        monitor_mode=config["monitor_mode"],
        on_nan=config["on_nan"],
        checkpoint_steps=config["checkpoint_steps"],
        checkpoint_seconds=config["checkpoint_seconds"],
        seed=config["seed"],
        fingerprint=prepared.fingerprint,
        inexact=prepared.inexact,
        hooks=prepared.hooks(vegab.terminal()),
        callbacks=prepared.callbacks,
    )


if __name__ == "__main__":
    vegab.wrap(
        registry,
        train,
        plugins=[vegab.MetaSaver(position=results.load_position)],
        prepare=experiment.build,
    )
