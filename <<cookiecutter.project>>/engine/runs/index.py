"""An index beside runs: what was read of each, so that it need not be read again.

`.runs.sqlite` in a folder of runs is a cache and nothing else: deleting it loses nothing, an entry
counts only while the stamp of its run is the same, and where it cannot be read or written, runs
are read one by one.
"""

import json
import os
import sqlite3
from collections.abc import Mapping
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
    try:
        with closing(_opened(path)) as index:
            rows = index.execute(f"SELECT name, stamp, entry FROM {TABLE}").fetchall()
        return {
            os.fsdecode(name): json.loads(entry)
            for name, stamp, entry in rows
            if stamps.get(os.fsdecode(name)) == stamp
        }
    except (sqlite3.Error, ValueError) as error:
        _remove_if_damaged(path, error)
        return {}


def write(folder: str, entries: Mapping[str, tuple[str, Mapping[str, Any]]]) -> None:
    """Keep entries of a folder's runs: by a run's name, its stamp and what was read, as JSON."""
    path = os.path.join(folder, NAME)
    if not entries or (len(entries) < FEWEST and not os.path.exists(path)):
        return
    rows = [
        (os.fsencode(name), stamp, json.dumps(entry)) for name, (stamp, entry) in entries.items()
    ]
    try:
        with closing(_opened(path)) as index, index:
            index.executemany(f"INSERT OR REPLACE INTO {TABLE} VALUES (?, ?, ?)", rows)
    except (sqlite3.Error, ValueError) as error:
        _remove_if_damaged(path, error)


def _opened(path: str) -> sqlite3.Connection:
    index = sqlite3.connect(path, timeout=SECONDS_TO_WAIT)
    columns = "name BLOB PRIMARY KEY, stamp TEXT, entry TEXT"
    try:
        index.execute("PRAGMA synchronous = OFF")  # it may be lost, and is then made anew
        index.execute(f"CREATE TABLE IF NOT EXISTS {TABLE} ({columns})")
    except sqlite3.Error:
        index.close()
        raise
    return index


def _remove_if_damaged(path: str, error: Exception) -> None:
    """Remove an index that is none; one that is locked or cannot be written stays."""
    if not isinstance(error, sqlite3.OperationalError):
        with suppress(OSError):
            os.unlink(path)
