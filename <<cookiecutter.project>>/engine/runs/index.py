"""Keeps an index next to runs: what was read of each, so that it need not be read again.

`.runs.sqlite` in a folder of runs is a cache and nothing else: deleting it loses nothing, an entry
counts only while the stamp of its run is the same, and where it cannot be read or written, runs
are read one by one.
"""

import json
import os
import sqlite3
from collections.abc import Callable, Mapping
from contextlib import closing, suppress
from typing import Any

NAME = ".runs.sqlite"
TABLE = "runs_3"  # entries of another form have another number
FEWEST = 20  # fewer runs are read as fast without
SECONDS_TO_WAIT = 1.0  # for another process that writes


def read(folder: str, stamps: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Return the entries of a folder's runs that are as they were when they were read.

    `stamps` has, by a run's name, what changes when the run does.
    """
    path = os.path.join(folder, NAME)
    if len(stamps) < FEWEST or not os.path.exists(path):
        return {}

    def entries(index: sqlite3.Connection) -> dict[str, dict[str, Any]]:
        rows = index.execute(f"SELECT name, stamp, entry FROM {TABLE}").fetchall()
        named = [(os.fsdecode(name), stamp, entry) for name, stamp, entry in rows]
        return {
            name: json.loads(entry) for name, stamp, entry in named if stamps.get(name) == stamp
        }

    return _call_with(path, entries) or {}


def write(folder: str, entries: Mapping[str, tuple[str, Mapping[str, Any]]]) -> None:
    """Keep entries of a folder's runs: by a run's name, its stamp and what was read, as JSON."""
    path = os.path.join(folder, NAME)
    if not entries or (len(entries) < FEWEST and not os.path.exists(path)):
        return
    rows = [
        (os.fsencode(name), stamp, json.dumps(entry)) for name, (stamp, entry) in entries.items()
    ]
    insert = f"INSERT OR REPLACE INTO {TABLE} VALUES (?, ?, ?)"
    _call_with(path, lambda index: index.executemany(insert, rows))


def _call_with(path: str, function: Callable[[sqlite3.Connection], Any]) -> Any:
    """Call a function with an index; return None where that fails. A damaged index is removed."""
    columns = "name BLOB PRIMARY KEY, stamp TEXT, entry TEXT"
    try:
        with closing(sqlite3.connect(path, timeout=SECONDS_TO_WAIT)) as index, index:
            index.execute("PRAGMA synchronous = OFF")  # it may be lost, and is then made again
            index.execute(f"CREATE TABLE IF NOT EXISTS {TABLE} ({columns})")
            return function(index)
    except sqlite3.OperationalError:
        return None  # it is locked, or cannot be written
    except (sqlite3.Error, ValueError):
        with suppress(OSError):
            os.unlink(path)
        return None
