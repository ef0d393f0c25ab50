"""Writes the page on a sweep: what its settings do."""

import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.runs import RunRecord, write_report
from engine.sweeps import sweep
from vegab import UsageError
from vegab.config import show

SWEEP_PAGE = "sweep.html"


def write_sweep(records: Sequence[RunRecord], folder: Path) -> None:
    """Write `sweep.html` into a sweep's folder, unless none of its trials has begun."""
    begun = [record for record in records if record.state != "waiting"]
    if begun:
        write_report(begun, folder / SWEEP_PAGE, sweep=sweep_of(begun))


def sweep_of(records: Sequence[RunRecord]) -> dict[str, Any] | None:
    """Return what `sweep.json` says beside the runs, if all of them lie in one sweep."""
    folders = {os.path.dirname(record.path) for record in records}
    if len(folders) != 1:
        return None
    folder = Path(folders.pop())
    try:
        told, trials, _ = sweep.read(folder)
    except UsageError:
        return None
    definition = [shlex.join([told.config_name, *told.words])]
    for key, value in vars(told).items():
        if key in ("config_name", "words", "config", "num_parallel") or not value:
            continue
        each = value.items() if isinstance(value, dict) else []
        definition += [f"{key} {name}={_listed(entry)}" for name, entry in each]
        definition += [] if isinstance(value, dict) else [f"{key} {_listed(value)}"]
    begun = {os.path.basename(record.path) for record in records}
    missing = [trial.name for trial in trials if trial.name not in begun]
    return {
        "definition": definition,
        "num_trials": len(trials),
        "num_waiting": sum(not (folder / name).exists() for name in missing),
    }


def _listed(value: Any) -> str:
    if isinstance(value, str):
        return value
    return ",".join(map(show, value)) if isinstance(value, list) else show(value)
