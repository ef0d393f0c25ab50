"""Writes the report: many run folders as one page, which needs no network and no server.

`report_page.html` is the page, written by hand; it is filled here with what it is to show."""

import base64
import json
import math
import os
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

from engine.runs import results, selection
from engine.runs.effects import LARGEST, clipped, effects_of, short
from engine.runs.results import RunRecord
from vegab.files import read_bytes, write_atomically

PAGE = Path(__file__).with_name("report_page.html")
PLACE_FOR_DATA = '"the data"'
Sweep = Mapping[str, Any]
MOST_OF_PICTURES = 5_000_000  # bytes of all together
MOST_VALUES = 500_000  # of all curves together, some 9 bytes each
FEWEST_ROWS = 16  # of a curve, however many there are
LONGEST_SETTING = 2_000  # characters
LINKED = (
    "history.csv", "learning_curve.png", "stdout.txt", "stderr.txt", "config.json", "meta.json",
    "eval/*.csv", "eval/*.json", "eval/*/scalars.json", "eval/*.png", "train/*[!0-9].png",
)  # fmt: skip


def write_report(
    records: Sequence[RunRecord],
    page: Path,
    problems: Sequence[str] = (),
    sweep: Sweep | None = None,
    columns: Sequence[str] = (),
) -> int:
    """Write the page, whose links are relative to its folder; return its size in bytes.

    `sweep` is what `engine.sweeps.sweep_of` returns, `columns` what the table shows at first."""
    known = selection.known_to(records)
    for name in columns:
        selection.find(known, name)
    data = data_of(records, page.parent, problems, sweep) | {"columns": _plain(columns)}
    before, place, after = PAGE.read_text(encoding="utf-8").partition(PLACE_FOR_DATA)
    assert place, f"{PAGE.name} has no place for the data"
    content = f"{before}{_as_json(data)}{after}".encode()
    write_atomically(page, content)
    return len(content)


def data_of(
    records: Sequence[RunRecord], folder: Path, problems: Sequence[str], sweep: Sweep | None
) -> dict[str, Any]:
    """Return what the page in `folder` shows, as JSON values; see `write_report`."""
    differing = results.differing_settings(records)
    readable = next((record for record in records if record.config), RunRecord(""))
    shared = readable.settings.items()
    common = {k: clipped(value, LONGEST_SETTING) for k, value in shared if k not in differing}
    num_values = sum(record.epoch * (len(record.metrics) + 3) for record in records)
    # One is read after the other: together they would need hundreds of megabytes.
    curves, stride = thinned(map(_history_of, records), num_values)
    monitor = selection.main_monitor(records)
    told = {
        "provenance": results.provenance_of(records),
        "monitor": monitor,
        "sweep": sweep,
        "metrics": _metrics_of(records, curves),
        "settings": {"differing": differing, "common": common},
        "effects": effects_of(records, monitor),
        "runs": [_run_of(record, folder, differing) for record in records],
        "notes": problems,
    }
    data = _plain(told)
    runs, notes = data["runs"], data["notes"]
    for run, curve in zip(runs, curves, strict=True):
        run["history"] = curve
    _add_pictures(records, runs, MOST_OF_PICTURES)
    if stride > 1:
        what = "Long curves are thinned, so that the page stays small"
        drawn = f"one epoch in {stride} is drawn, and the best and the last ones"
        notes.append(f"{what}: {drawn}. Each history.csv has them all.")
    if damaged := sum(bool(run["problem"]) for run in runs):
        count = f"{damaged} run{'s' * (damaged != 1)}"
        notes.append(f"{count} could not be read in full; the details say what is wrong.")
    return data


def _run_of(record: RunRecord, folder: Path, differing: Sequence[str]) -> dict[str, Any]:
    settings, run = record.settings, Path(record.path)
    again = shlex.join(["python", "bin/reproduce.py", record.path])
    entry = vars(record) | {
        # The command that makes the run again, or goes on with one that has not finished.
        "again": again if record.state == "finished" else record.command,
        # The dot: a name with a colon is a folder, not the scheme of an address.
        "href": f"./{quote(os.fsencode(os.path.relpath(run, folder)))}/",
        "has_config": bool(record.config),
        "settings": {k: clipped(settings[k], LONGEST_SETTING) for k in differing if k in settings},
        # Of another folder there are none.
        "files": [
            str(path.relative_to(run))
            for pattern in LINKED
            for path in sorted(run.glob(pattern))
            if Path(os.path.realpath(path)).is_relative_to(os.path.realpath(run))
        ],
    }
    del entry["config"]
    return entry


def _add_pictures(records: Sequence[RunRecord], runs: Sequence[dict[str, Any]], space: int) -> None:
    """Put pictures of evaluation and samples into the page while there is space, else links."""
    for record, run in zip(records, runs, strict=True):
        run["pictures"] = dict.fromkeys(filter(re.compile(r"\w+/.*\.png").match, run["files"]))
        for name in run["pictures"]:
            with suppress(OSError):
                content = read_bytes(Path(record.path, name), record.path)
                space -= len(content)
                if space >= 0 and content.startswith(b"\x89PNG"):
                    text = base64.b64encode(content).decode()
                    run["pictures"][name] = f"data:image/png;base64,{text}"


def _history_of(record: RunRecord) -> list[dict[str, float]]:
    try:
        return results.read_history(record.path)
    except (OSError, ValueError):  # the record's problem says so
        return []


def thinned(
    histories: Iterable[list[dict[str, float]]], num_values: int
) -> tuple[list[dict[str, list]], int]:
    """Return the curves of runs, values by column, None where there is no number, and their stride:
    every stride-th epoch (from 1) stays, the last, and each column's least and largest value."""
    stride = max(1, -(-num_values // MOST_VALUES))
    curves = [_curve_of(rows, min(stride, len(rows) // FEWEST_ROWS or 1)) for rows in histories]
    return curves, stride


def _curve_of(rows: Sequence[dict[str, float]], stride: int) -> dict[str, list]:
    if not rows:
        return {}
    columns = dict.fromkeys(key for row in rows for key in row if key not in ("epoch", "step"))
    kept = {*range(0, len(rows), stride), len(rows) - 1}
    for key in columns:
        finite = [i for i, row in enumerate(rows) if math.isfinite(row.get(key, math.nan))]
        kept |= {pick(finite, key=lambda i: rows[i][key], default=0) for pick in (min, max)}
    chosen = [rows[index] for index in sorted(kept)]
    values = {key: [row.get(key, math.nan) for row in chosen] for key in columns}
    curve = {k: [short(v) if math.isfinite(v) else None for v in vs] for k, vs in values.items()}
    return {"epoch": [int(row["epoch"]) + 1 for row in chosen], **curve}


def _metrics_of(
    records: Sequence[RunRecord], curves: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Return name and direction of each column, those of validation first."""
    names = dict.fromkeys(key for curve in curves for key in curve if key != "epoch")
    in_order = sorted(names, key=lambda name: (name == "learning_rate", name[:4] != "val_"))
    configs = {key: record.config for record in reversed(records) for key in record.metrics}
    lower = {name: results.is_lower_better_in(configs.get(name, {}), name) for name in in_order}
    return [{"name": name, "lower": is_lower} for name, is_lower in lower.items()]


def _plain(value: Any) -> Any:
    """Return a JSON value with what JavaScript's numbers and texts cannot hold as text."""
    if isinstance(value, Mapping):
        return {_plain(str(key)): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, str):  # a file's name may be no UTF-8
        return value.encode(errors="replace").decode()
    is_large = isinstance(value, int) and abs(value) > LARGEST
    is_infinite = isinstance(value, float) and not math.isfinite(value)
    return str(value) if is_large or is_infinite else value


def _as_json(data: Any) -> str:
    """Return JSON that nothing in it can end, within an element `script`."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("<", r"\u003c").replace(">", r"\u003e").replace("&", r"\u0026")
