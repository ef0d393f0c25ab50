"""A sweep: which trials there are, what they are called, and how far each is. Needs no Keras.

A trial is an ordinary run folder, made by what `bin/train.py` does. What the sweep is stands in
`sweep.json`; how far it is, its trials' folders say.
"""

import fcntl
import functools
import itertools
import json
import math
import os
import random
import re
import shlex
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from src import results
from src.results import RunRecord
from vegab import UsageError
from vegab.config import differences, read_yaml, show, show_differences
from vegab.run_folder import living_owner, read_json, write_json

SWEEP, LOCK = "sweep.json", "sweep.lock"
LONGEST_NAME = 150  # bytes, of a folder; file systems allow 255
RANGE = re.compile(r"(?P<low>\S+?)\s*\.\.\s*(?P<high>\S+?)(?P<log>\s+log)?")
DIGITS = 4  # of a number that is drawn: more say nothing, and make long names
STATES = ("waiting", "new", "running", "finished", "interrupted", "died", "failed", "broken")
# Exit codes of bin/train.py.
FINISHED, REFUSED, INTERRUPTED = 0, 2, 75
SECONDS_BETWEEN = 0.5


@dataclass(frozen=True)
class Trial:
    """One run of a sweep.

    Attributes:
        name: of its folder in the sweep's.
        settings: what sets it apart, by dotted key.
    """

    name: str
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Definition:
    """What a sweep is of.

    Attributes:
        config_name: CONFIG as it was typed.
        config: resolved, what all trials share.
        words: the command line of `bin/train.py` that it stands for, without the folder.
        axes: values by dotted key; all combinations are trials.
        ranges: "low..high" or "low..high log" by dotted key.
        num_random: trials that are drawn from the ranges, for each combination.
        num_seeds: seeds of each, counted up from the config's.
    """

    config_name: str
    config: Mapping[str, Any]
    words: Sequence[str]
    axes: Mapping[str, Sequence[Any]]
    ranges: Mapping[str, str]
    num_random: int
    num_seeds: int


# ------------------------------------------------------------------------------ what is asked for


def axes_of(texts: Sequence[str], key_of: Callable[[str], str]) -> dict[str, list[Any]]:
    """Read `--grid KEY=VALUE,VALUE,…`; the values are YAML.

    Args:
        texts: as typed.
        key_of: returns the dotted key that a name means, or raises UsageError.

    Raises:
        UsageError: if a text is none of that form, has no value, or names a key again.
    """
    axes: dict[str, list[Any]] = {}
    for text in texts:
        key, values = _split(text, "--grid", "n_filters=8,16,32", key_of, axes)
        read = read_yaml(f"[{values}]", f"--grid {text}")
        if not read or len({show(value) for value in read}) < len(read):
            what = "has the same value twice" if read else "has no value"
            raise UsageError(f"--grid {text} {what}; give values as in n_filters=8,16,32")
        axes[key] = read
    return axes


def ranges_of(texts: Sequence[str], key_of: Callable[[str], str]) -> dict[str, str]:
    """Read `--range KEY=LOW..HIGH`, or `'KEY=LOW..HIGH log'`; see `axes_of`."""
    ranges: dict[str, str] = {}
    for text in texts:
        key, value = _split(text, "--range", "'learning_rate=1e-4..1e-1 log'", key_of, ranges)
        bounds_of(value, f"--range {text}")
        ranges[key] = value
    return ranges


def _split(
    text: str, flag: str, example: str, key_of: Callable[[str], str], known: Mapping[str, Any]
) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name.strip() or not value.strip():
        raise UsageError(f"{flag} {text!r} is not of the form {flag} {example}")
    key = key_of(name.strip())
    if key in known:
        raise UsageError(f"{flag} {text}: {key} is given twice; put all its values into one")
    return key, value.strip()


def bounds_of(text: str, source: str) -> tuple[float, float, bool]:
    """Return the ends of a range and whether it is logarithmic; two integers draw integers.

    Raises:
        UsageError: if it is none.
    """
    match = RANGE.fullmatch(text)
    ends = [read_yaml(match[end], source) if match else None for end in ("low", "high")]
    numbers = [end for end in ends if isinstance(end, int | float) and not isinstance(end, bool)]
    if match is None or len(numbers) < 2 or not numbers[0] < numbers[1]:
        raise UsageError(f"{source} is no range; give one as 1e-4..1e-1, or '1e-4..1e-1 log'")
    if match["log"] and numbers[0] <= 0:
        raise UsageError(f"{source}: a logarithmic range begins above 0")
    return numbers[0], numbers[1], bool(match["log"])


def _draw(text: str, key: str, number: int, seed: int) -> Any:
    """Draw a value of a range: a function of seed, key and number, so that more trials add some."""
    low, high, is_log = bounds_of(text, key)
    chance = random.Random(f"{seed} {key} {number}")
    if isinstance(low, int) and isinstance(high, int) and not is_log:
        return chance.randint(low, high)
    drawn = math.exp(chance.uniform(math.log(low), math.log(high))) if is_log else None
    drawn = chance.uniform(low, high) if drawn is None else drawn
    if isinstance(low, int) and isinstance(high, int):
        return min(max(round(drawn), low), high)
    return float(f"{drawn:.{DIGITS}g}")


def trials_of(definition: Definition) -> list[Trial]:
    """Return the trials of a sweep, in the order in which they are run.

    Raises:
        UsageError: if there is none, or two would have the same folder.
    """
    first_seed = definition.config["seed"]
    grid = [
        dict(zip(definition.axes, values, strict=True))
        for values in itertools.product(*definition.axes.values())
    ]
    drawn: list[dict[str, Any]] = [
        {key: _draw(text, key, i, first_seed) for key, text in definition.ranges.items()}
        for i in range(definition.num_random)
    ] or [{}]
    seeds: list[dict[str, Any]] = [{"seed": first_seed + i} for i in range(definition.num_seeds)]
    every = [one | other | seed for one in grid for other in drawn for seed in seeds or [{}]]
    if not any(every):
        raise UsageError("the sweep varies nothing; give --grid, --range with --random, or --seeds")
    different = {show(settings): settings for settings in every}  # a draw may come twice
    trials = [Trial(name_of(settings), settings) for settings in different.values()]
    names = Counter(trial.name for trial in trials)
    if twice := [name for name, number in names.items() if number > 1]:
        same = [dict(t.settings) for t in trials if t.name == twice[0]]
        raise UsageError(f"{show(same[0])} and {show(same[1])} would both be called {twice[0]}")
    return trials


def name_of(settings: Mapping[str, Any]) -> str:
    """Return the name of a trial's folder: "n_filters=8,seed=1", safe in file names and shells."""
    parts = []
    for key, value in settings.items():
        text = value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
        safe = re.sub(r"[^\w.,+-]+", "-", text).strip("-")
        parts.append(f"{key.rpartition('.')[2]}={safe.replace('-,-', ',')}")
    return ",".join(parts).encode()[:LONGEST_NAME].decode(errors="ignore")


# ---------------------------------------------------------------------------------- on the disk


def known_trials(folder: Path, definition: Definition) -> list[Trial]:
    """Return the trials of a definition and those of the sweep that is in the folder already.

    A larger grid, more seeds or more draws add their trials to those that are there.

    Raises:
        UsageError: if the folder holds something else, or the sweep of another config.
    """
    trials = trials_of(definition)
    if not (folder / SWEEP).exists():
        if any(name != LOCK for name in _names_in(folder)):
            raise UsageError(f"{folder} holds files but no sweep; choose a new or an empty folder")
        return trials
    content, there = read(folder)
    changes = differences(content["config"], dict(definition.config))
    if changes:
        raise UsageError(
            f"{folder} holds a sweep of another config ({show_differences(changes)}); "
            "choose another folder"
        )
    names = {trial.name for trial in there}
    return [*there, *(trial for trial in trials if trial.name not in names)]


def read(folder: Path) -> tuple[dict[str, Any], list[Trial]]:
    """Return what `sweep.json` says, and the trials.

    Raises:
        UsageError: if there is none, or it is none.
    """
    content = read_json(folder / SWEEP)
    if content is None:
        raise UsageError(f"{folder} holds no sweep; name a folder that bin/sweep.py made")
    try:
        return content, [Trial(entry["name"], entry["settings"]) for entry in content["trials"]]
    except (KeyError, TypeError) as error:
        raise UsageError(f"{folder / SWEEP} is not one of this project's ({error!r})") from error


def write(folder: Path, definition: Definition, trials: Sequence[Trial]) -> None:
    """Keep what a sweep is."""
    content = {
        "config_name": definition.config_name,
        "words": list(definition.words),
        "config": dict(definition.config),
        "grid": dict(definition.axes),
        "range": dict(definition.ranges),
        "random": definition.num_random,
        "seeds": definition.num_seeds,
        "trials": [{"name": t.name, "settings": dict(t.settings)} for t in trials],
    }
    write_json(folder / SWEEP, content)


def _names_in(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UsageError(f"{folder}: {error.strerror}; choose another folder") from None


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a sweep's folder, which is made, for this process.

    Raises:
        UsageError: if another one holds it, or it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / LOCK, "a+")  # noqa: SIM115 (it is closed below)
    except OSError as error:
        raise UsageError(f"{folder}: {error.strerror}; choose another folder") from None
    with lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            owner = owner_of(folder) or {"pid": "(unknown)", "host": "an unknown host"}
            raise UsageError(
                f"{folder} is being swept by process {owner['pid']} on {owner['host']}; "
                f"python bin/sweep.py stop {shlex.quote(str(folder))} ends that"
            ) from None
        lock.truncate(0)
        lock.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}))
        lock.flush()
        yield


def owner_of(folder: Path) -> dict[str, Any] | None:
    """Return host and process of who sweeps a folder, or None."""
    try:
        with open(folder / LOCK) as lock:
            try:
                fcntl.lockf(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
                return None
            except OSError:
                return json.load(lock)
    except (OSError, ValueError):
        return None


# ------------------------------------------------------------------------------ how far it is


def states_of(folder: Path, trials: Sequence[Trial]) -> list[RunRecord]:
    """Return what the folder of each trial says; the state of one that has none is "waiting"."""
    paths = [os.path.join(folder, trial.name) for trial in trials]
    there = [path for path in paths if os.path.exists(path)]
    records = {record.path: record for record in results.read_runs(there)}
    return [records.get(path) or RunRecord(path, state="waiting") for path in paths]


def best_of(records: Sequence[RunRecord]) -> RunRecord | None:
    """Return the run whose best value of what it monitors is the best, or None."""
    known = [record for record in records if record.monitor in record.metrics]
    if not known:
        return None
    monitor = str(known[0].monitor)
    sign = 1 if results.is_lower_better_in(known[0].config, monitor) else -1
    same = (record for record in known if record.monitor == monitor)
    return min(same, key=lambda record: sign * _figure(record))


def _figure(record: RunRecord) -> float:
    return record.metrics[str(record.monitor)].best


def summary(records: Sequence[RunRecord]) -> str:
    """Return a line: how many trials are in each state, and the best of them."""
    states = Counter(record.state for record in records)
    text = ", ".join(f"{states[state]} {state}" for state in STATES if states[state])
    best = best_of(records)
    found = f"; best {best.monitor} {_figure(best):.4g}: {best.path}" if best else ""
    return f"{len(records)} trials: {text}{found}"


class Sweeper:
    """Trains what is not done yet.

    Args:
        folder: of the sweep, which is locked for this process.
        commands: by a trial's name, the command line of `bin/train.py`.
        launcher: starts them; see `src.launch`.
        show: called with what stands on the line on the terminal, and how many trials are done.
    """

    def __init__(
        self,
        folder: Path,
        commands: Mapping[str, Sequence[str]],
        launcher: Any,
        show: Callable[[str, int], None],
    ) -> None:
        self.folder = folder
        self.commands = commands
        self.launcher = launcher
        self.show = show
        self.refused: dict[str, str] = {}
        self._best: RunRecord | None = None
        self._seen: set[str] = set()

    def run(self, trials: Sequence[Trial], retry_failed: bool) -> list[RunRecord]:
        """Train until all are done or failed, or until it is told to stop; return their records.

        Trials that another process trains, as those of a sweeper that was killed, are waited for.
        """
        done = ("finished",) if retry_failed else ("finished", "failed", "broken")
        tried: set[str] = set()
        while True:
            records = states_of(self.folder, trials)
            self._best = best_of(records)
            pairs = list(zip(trials, records, strict=True))
            left = [
                trial.name
                for trial, record in pairs
                if record.state not in (*done, "running") and trial.name not in tried
            ]
            is_waiting = any(record.state == "running" for record in records)
            if self.launcher.is_stopped() or not (left or is_waiting):
                return records
            before = len(pairs) - len(left)
            tell = functools.partial(self._tell, before)
            if left:
                codes = self.launcher.run({name: self.commands[name] for name in left}, tell)
            else:
                codes = {}
                time.sleep(SECONDS_BETWEEN)
            # One that found its folder in use may be tried again when that one has ended.
            for name, code in codes.items():
                if code == REFUSED and living_owner(self.folder / name):
                    continue
                tried.add(name)
                if code == REFUSED:
                    self.refused[name] = self.launcher.said(name)

    def _tell(self, before: int, running: Sequence[str], codes: Mapping[str, int]) -> None:
        for name in codes.keys() - self._seen:
            self._seen.add(name)
            own = results.read_runs([os.path.join(self.folder, name)])
            self._best = best_of([*filter(None, [self._best]), *own])
        failed = sum(code not in (FINISHED, INTERRUPTED) for code in codes.values())
        found = f", best {_figure(self._best):.4g}" if self._best else ""
        self.show(f"{len(running)} running, {failed} failed{found}", before + len(codes))
