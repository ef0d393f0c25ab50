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
    prepared.train(Path(save_path), prepared.hooks(vegab.terminal()))


if __name__ == "__main__":
    vegab.wrap(
        registry,
        train,
        plugins=[vegab.MetaSaver(position=results.load_position)],
        prepare=experiment.build,
    )
