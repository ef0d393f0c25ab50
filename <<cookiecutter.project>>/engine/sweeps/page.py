"""Writes the page on a sweep: what its settings do."""

import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.runs import RunRecord, write_report
from engine.sweeps import sweep
from engine.sweeps.definition import PLAN
from vegab import UsageError
from vegab.config import show

SWEEP_PAGE = "sweep.html"


def write_sweep(records: Sequence[RunRecord], folder: Path) -> None:
    """Write `sweep.html` into a sweep's folder, unless none of its trials has begun."""
    begun = [record for record in records if record.state != "waiting"]
    if begun:
        write_report(begun, folder / SWEEP_PAGE, sweep=sweep_of(begun))


def sweep_of(records: Sequence[RunRecord]) -> dict[str, Any] | None:
    """Return what `sweep.json` says in addition to the runs, if all of them lie in one sweep."""
    folders = {os.path.dirname(record.path) for record in records}
    if len(folders) != 1:
        return None
    folder = Path(folders.pop())
    try:
        told, trials, _ = sweep.read(folder)
    except UsageError:
        return None
    definition = [shlex.join([told.config_name, *told.words])]
    for key, values in told.grid.items():
        definition.append(f"grid {key}={','.join(map(show, values))}")
    definition += [f"range {key}={text}" for key, text in told.range.items()]
    rest = {key: getattr(told, key) for key in PLAN if key not in ("grid", "range")}
    definition += [f"{key} {value}" for key, value in rest.items() if value]
    return {
        "definition": definition,
        "num_trials": len(trials),
        "num_waiting": sum(not (folder / trial.name).exists() for trial in trials),
    }
