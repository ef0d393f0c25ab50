"""Reads and checks a config with an iterator, before TensorFlow is imported."""

from collections.abc import Mapping
from typing import Any

from engine.building import require_at_least_one
from engine.iterators.edflow import check_keys
from vegab import UsageError


def check_ranges_of_iterator(config: Mapping[str, Any]) -> None:
    """See `check_ranges`."""
    check_keys(config)
    keys = ("batch_size", "hook_freq", "log_freq", "start_log_freq", "ckpt_keep")
    given = ("num_steps", "num_epochs", "test_batch_size", "ckpt_freq", "max_batches_per_epoch")
    require_at_least_one(config, *keys, *(key for key in given if config[key] is not None))
    if config["n_data_processes"] < 0:
        given = config["n_data_processes"]
        raise UsageError(f"n_data_processes is {given}; it must be at least 0 (0: none)")


def splits_of(config: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Return key and import path of the dataset of each split, for a config with an iterator."""
    names = {f"datasets.{split}": (split, path) for split, path in config["datasets"].items()}
    if not names:
        names["dataset"] = "train", config["dataset"]
        names["validation_dataset"] = "validation", config["validation_dataset"]
    return {split: (key, path) for key, (split, path) in names.items() if path}
