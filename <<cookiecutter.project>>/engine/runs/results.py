"""Reads run folders back: what each is, its config, history and metrics. Needs no Keras.

pandas and NumPy are imported where they are used, so that the command line answers at once."""

import functools
import glob
import io
import json
import math
import os
import pickle
import re
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, get_origin

from engine.checkpoints import is_lower_better, rows_in
from vegab import UsageError, files
from vegab.config import did_you_mean, flatten
from vegab.execution import say
from vegab.files import CONFIG, LOCK, META, write_atomically
from vegab.provenance import git_words
from vegab.run_folder import state_now

if TYPE_CHECKING:
    import pandas as pd

# What the commands that read runs are told to read.
PATTERNS = "run folders, folders of runs, or patterns such as 'results/lr_*'; by default: results"
TEST = "eval/test.json"
PRUNED = "pruned.json"  # says after how many epochs a sweep ended a trial
# What a sweep keeps of its trials, in its folder: how those ended that were killed.
OUTPUTS, ENDINGS = ".output", "endings.json"
MOST_DEATHS = 3  # of a trial that is killed, before its sweep gives it up
GIVEN_UP = f"(death {MOST_DEATHS} of {MOST_DEATHS})"  # so ends what is kept of it then
NOTES = "notes.json"  # what somebody has written about a run, and its tags
FILES = (CONFIG, META, "history.csv", "loop_state.pkl", TEST, NOTES)
INDEX = ".runs.json"
FORM = 6  # of the entries in the index; those of another form are read again
FEWEST = 20  # fewer runs of a folder are read as fast without an index
NUMBER = re.compile(r"(\d+(?:\.\d+)?(?:e[+-]?\d+)?)")
SET = re.compile("^(val|test)_")
# Columns of the history that say nothing of how good the model is.
NO_METRICS = ("epoch", "step", "learning_rate")
Rows = list[dict[str, float]]  # of a history, by column
# What a file of another form raises.
OF_ANOTHER_FORM = (ArithmeticError, AttributeError, KeyError, RecursionError, TypeError, ValueError)


class Metric(NamedTuple):
    """The finite values of a column of the history: the best one, its epoch (from 0), the last. A
    metric of the test set, `test_…`, has one value, and no epoch."""

    best: float
    best_epoch: int | None
    last: float


@dataclass
class RunRecord:
    """What a run folder says of its run."""

    path: str  # the folder, as it was named or found
    # running, finished, interrupted, failed, died (it was running, and its process is no more), new
    # (nothing ran here) or broken (config.json or meta.json cannot be read)
    state: str = "new"
    problem: str = ""  # what could not be read, in one sentence
    config_name: str = ""  # CONFIG as it was typed
    config: dict[str, Any] = field(default_factory=dict)  # {} if it could not be read
    command: str = ""  # a line to paste
    commit: str | None = None  # of git
    is_dirty: bool = False  # were there uncommitted changes?
    start: str | None = None  # of the first attempt, ISO 8601 in UTC
    end: str | None = None  # of the last attempt; None while it goes on, or if it died
    seconds: float = 0.0  # that the attempts took together
    num_attempts: int = 0
    epoch: int = 0  # epochs done
    num_epochs: int | None = None  # of how many
    global_step: int = 0  # steps done
    num_steps: int | None = None  # of how many
    monitor: str | None = None  # column of the history that decides which epoch is the best
    # By column of the history, then those of the test set.
    metrics: dict[str, Metric] = field(default_factory=dict)
    error: str = ""  # of a failed run, the last line of what was raised
    parent: str = ""  # the run that this one is a fork of
    is_inexact: bool = False  # was it continued, or may it not be continued, bit for bit?
    note: str = ""  # what somebody has written about it
    tags: list[str] = field(default_factory=list)

    @functools.cached_property
    def settings(self) -> dict[str, Any]:
        """The config as one mapping of dotted keys: {"n_filters": 8, "train.epochs": 3}."""
        return flatten(self.config)


TYPES: dict[str, Any] = {f.name: get_origin(f.type) or f.type for f in fields(RunRecord)}
TYPES |= dict.fromkeys(("commit", "start", "end", "monitor"), str | None)
TYPES |= dict.fromkeys(("num_epochs", "num_steps"), int | float | None)


def find_runs(patterns: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the run folders that patterns mean, each once, and a sentence for one with none."""
    found: dict[str, str] = {}  # by what the path really is
    problems = []
    for pattern in patterns or ("results",):
        is_path = os.path.lexists(pattern)
        hits = [pattern] if is_path else sorted(glob.glob(pattern, recursive=True), key=naturally)
        runs = [run for hit in hits if hit.strip() for run in _runs_below(os.path.normpath(hit))]
        for run in runs:
            found.setdefault(os.path.realpath(run), run)
        if hits and not runs:
            hint = "name a folder that bin/train.py made, or one above it"
            problems.append(f"{pattern!r} holds no run; {hint}")
        elif not hits:
            folder, name = os.path.split(os.path.normpath(pattern))
            siblings = os.listdir(folder or ".") if os.path.isdir(folder or ".") else []
            problems.append(f"nothing matches {pattern!r}{did_you_mean(name, siblings)}")
    if not found:
        raise UsageError("; ".join(problems))
    return list(found.values()), problems


def _runs_below(folder: str) -> list[str]:
    """Return the folder if it is a run, else the runs below; each folder is looked at once."""
    runs, seen, waiting = [], set(), [folder]
    while waiting:
        place = waiting.pop()
        if any(os.path.exists(f"{place}/{name}") for name in (LOCK, META)):
            runs.append(place)
            continue
        with suppress(OSError):  # a file, or a folder that may not be read
            status = os.stat(place)
            if (status.st_dev, status.st_ino) not in seen:
                names = sorted(os.listdir(place), key=naturally, reverse=True)
                waiting += [os.path.join(place, name) for name in names if name[0] != "."]
            seen.add((status.st_dev, status.st_ino))
    return runs


def naturally(name: str) -> list[str | float]:
    """Return what sorts names by the numbers in them: lr_2 before lr_10, 0.003 before 0.01."""
    parts = NUMBER.split(name)
    return [float(part) if index % 2 else part for index, part in enumerate(parts)]


def read_runs(paths: Sequence[str]) -> list[RunRecord]:
    """Return what run folders say, from the index, which is a cache, where nothing has changed."""
    entries = _entries(paths)
    records = [RunRecord(path, **entries[path]) for path in paths]
    for record in records:
        record.metrics = {key: Metric(*value) for key, value in record.metrics.items()}
        # One that is finished is not taken up again but by a longer one, which says so at once.
        if record.state != "finished":
            record.state = state_now(record.path, record.state)
        if record.end and record.state in ("running", "died"):
            if record.state == "running":
                record.seconds += max(0.0, time.time() - _time(record.end).timestamp())
            record.end = None
    note_given_up(records)
    return records


def note_given_up(records: Sequence[RunRecord]) -> None:
    """Count trials that their sweep has given up as failed, and say how they ended."""
    endings: dict[str, Any] = {}
    for record in records:
        folder, name = os.path.split(record.path)
        if record.state in ("waiting", "new", "interrupted", "died", "broken"):
            if folder not in endings:
                with suppress(UsageError):
                    endings[folder] = files.read_json(Path(folder, OUTPUTS, ENDINGS))
            how = endings.get(folder)
            how = how.get(name) if isinstance(how, dict) else None
            if isinstance(how, str) and how.endswith(GIVEN_UP):
                record.state, record.error = "failed", how


def runs_matching(patterns: Sequence[str]) -> tuple[list[RunRecord], list[str]]:
    """Return the records of the runs that patterns mean, and what `find_runs` says of others."""
    paths, problems = find_runs(patterns)
    return read_runs(paths), problems


def problems_of(records: Sequence[RunRecord]) -> list[str]:
    """Return a sentence for each run that cannot be read in full."""
    return [f"{record.path}: {record.problem}" for record in records if record.problem]


def tell(problems: Sequence[str], others: Sequence[str] = ()) -> None:
    """Print problems and other sentences; if there are `problems`, exit with code 1."""
    sys.stdout.flush()
    for problem in [*problems, *others]:
        say(problem)
    if problems:
        sys.exit(1)


def _entries(paths: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return the arguments of the `RunRecord` of each path."""
    by_folder: dict[str, list[str]] = {}
    for path in paths:
        by_folder.setdefault(os.path.dirname(path), []).append(os.path.basename(path))
    entries: dict[str, dict[str, Any]] = {}
    for folder, names in by_folder.items():
        index = Path(folder, INDEX)
        known: dict[str, Any] = {}  # stamp and entry of each run, by its name
        if len(names) >= FEWEST:
            with suppress(OSError, *OF_ANOTHER_FORM):
                known = dict(json.loads(files.read_bytes(index, folder or ".")))
        stamps = {name: _stamp(os.path.join(folder, name)) for name in names}
        new = [name for name in names if not _is_of(stamps[name], known.get(name))]
        known |= {name: (stamps[name], _read(os.path.join(folder, name))) for name in new}
        # An entry of a run that goes on is soon outdated, and not worth writing all of them.
        is_lasting = any(known[name][1].get("state") != "running" for name in new)
        if is_lasting and len(names) >= FEWEST:
            with suppress(OSError):
                write_atomically(index, json.dumps(known), sync=False)
        entries |= {os.path.join(folder, name): known[name][1] for name in names}
    return entries


def _is_of(stamp: str, entry: Any) -> bool:
    """Return whether an entry of the index, which anyone may have written, is of a run as it is."""
    with suppress(*OF_ANOTHER_FORM):
        told, content = entry
        _ = [_time(content[key]) for key in ("start", "end") if content.get(key)]
        _ = [math.hypot(best, last) for best, _, last in content.get("metrics", {}).values()]
        return told == stamp and all(isinstance(content[k], TYPES[k]) for k in content)
    return False


def _stamp(run: str) -> str:
    """Return what changes whenever a file of a run or the form of the entries does."""
    stamps = [str(FORM)]
    for name in FILES:
        with suppress(OSError):
            status = os.stat(f"{run}/{name}")
            stamps.append(f"{name} {status.st_ctime_ns:x}.{status.st_size:x}")
    return " ".join(stamps)


def _read(run: str) -> dict[str, Any]:
    """Read a run folder; what is in it is JSON, and does not depend on the time of day."""
    problems: list[str] = []

    def attempt(function: Callable[..., Any], *arguments: Any, file: str = "") -> Any:
        try:
            return function(*arguments)
        except (OSError, pickle.UnpicklingError, UsageError, *OF_ANOTHER_FORM) as error:
            form = f"{file} is not what this version of the project writes ({error!r})"
            problems.append(form if file else str(error))
            return {}

    config, meta = (attempt(mapping_in, run, name) for name in (CONFIG, META))
    entry = {"config": config} | attempt(_of_meta, meta, file=META)
    history, state = attempt(read_history, run), attempt(load_position, run)
    entry |= attempt(_of_history, config, history, state, file=CONFIG)
    of_history = entry.get("metrics", {})  # which comes first, also where a name is in both
    entry |= attempt(_of_notes, run, file=NOTES)
    entry["metrics"] = of_history | attempt(_of_test, run, file=TEST) | of_history
    if not any(os.path.exists(f"{run}/{name}") for name in (CONFIG, META)):
        return entry | {"state": "new"}  # it is about to begin, or never did
    if problems:
        entry["problem"] = "; ".join(problems)
        if not config or not meta or "state" not in entry:
            entry["state"] = "broken"
    return entry


def mapping_in(run: str, name: str) -> dict[str, Any]:
    """Return what a run's JSON file holds; UsageError if it is missing, broken or no mapping."""
    content = files.read_json(f"{run}/{name}")
    if not isinstance(content, dict):
        raise UsageError(f"there is no {name}" if content is None else f"{name} holds no mapping")
    return content


def _of_meta(meta: dict[str, Any]) -> dict[str, Any]:
    attempts = meta.get("attempts") or []
    git = meta.get("git") or {}
    spans = ((_time(a["end"]) - _time(a["start"])) for a in attempts if a.get("end"))
    last = attempts[-1] if attempts else {}
    return {
        "state": str(meta.get("status", "new")),
        "config_name": str(meta.get("config") or ""),
        "command": str((meta.get("command") or {}).get("line", "")),
        "commit": str(git["commit"]) if git.get("commit") else None,
        "is_dirty": bool(git.get("dirty")),
        "start": _time(attempts[0]["start"]).isoformat() if attempts else None,
        "end": _time(last.get("end") or last["start"]).isoformat() if attempts else None,
        "seconds": sum(span.total_seconds() for span in spans),
        "num_attempts": len(attempts),
        "error": (str(last.get("error") or "").strip().splitlines() or [""])[-1],
        "parent": str((meta.get("parent") or {}).get("path", "")),
    }


def _of_history(config: dict[str, Any], history: Rows, state: dict[str, Any]) -> dict[str, Any]:
    train = config.get("train") or {}
    num_epochs = config.get("num_epochs") or (isinstance(train, dict) and train.get("epochs"))
    num_steps = config.get("num_steps")
    epochs = len(history)
    steps = int(history[-1].get("step", 0)) if history else 0
    if num_steps and epochs and steps:
        num_epochs = math.ceil(num_steps / (history[0].get("step") or steps))
    elif num_epochs and epochs:
        num_steps = round(steps / epochs * num_epochs)
    columns = list(dict.fromkeys(key for row in history for key in row))
    metrics = {key: _metric(config, key, history) for key in columns if key not in NO_METRICS}
    monitor = config.get("monitor")
    candidates = (monitor, str(monitor).removeprefix("val_"), "val_loss", "loss")
    return {
        "epoch": max(epochs, state.get("epoch", 0)),
        "num_epochs": num_epochs or None,
        "global_step": max(steps, state.get("global_step", 0)),
        "num_steps": num_steps or None,
        "monitor": next((name for name in candidates if name in columns), None),
        "is_inexact": bool(state.get("inexact")),
        "metrics": {key: metric for key, metric in metrics.items() if metric},
    }


def _metric(config: dict[str, Any], key: str, history: Rows) -> Metric | None:
    epochs = [n for n, row in enumerate(history) if math.isfinite(row.get(key, math.nan))]
    if not epochs:
        return None
    pick = min if is_lower_better_in(config, key) else max
    best = pick(epochs, key=lambda epoch: history[epoch][key])  # the first of equal ones
    return Metric(history[best][key], best, history[epochs[-1]][key])


def _of_test(run: str) -> dict[str, Metric]:
    content = files.read_json(f"{run}/{TEST}", run) or {}
    numbers = {key: value for key, value in content.items() if isinstance(value, float)}
    # Whole numbers say what was evaluated.
    return {f"test_{key}": Metric(value, None, value) for key, value in numbers.items()}


def _of_notes(run: str) -> dict[str, Any]:
    content = files.read_json(f"{run}/{NOTES}", run) or {}
    return {"note": str(content.get("note", "")), "tags": list(map(str, content.get("tags", [])))}


def write_notes(record: RunRecord, note: str, tags: Sequence[str]) -> None:
    """Write the note and the tags that somebody gives a run into its folder."""
    files.write_json(Path(record.path, NOTES), {"note": note, "tags": tags})


def is_lower_better_in(config: dict[str, Any], metric: str) -> bool:
    """Whether less of a metric is better: by `monitor_mode`, if it is monitored, or by its name."""
    monitored, own = (SET.sub("", str(name)) for name in (config.get("monitor"), metric))
    mode = config.get("monitor_mode", "auto") if own == monitored else "auto"
    try:
        return is_lower_better(metric, mode)
    except ValueError:
        return True


def _time(text: Any) -> datetime:
    found = datetime.fromisoformat(str(text))
    return found if found.tzinfo else found.replace(tzinfo=UTC)


def read_history(run: str | Path) -> Rows:
    """Return the rows of `history.csv` by column, epochs from 0; ValueError if it is corrupt."""
    rows = []
    for epoch, row in enumerate(rows_in(Path(run)), start=1):
        try:
            cells = {key: float(cell) for key, cell in row.items() if cell != ""}
            _ = [int(cells.get(key, 0)) for key in ("epoch", "step")]
        except (TypeError, ValueError, OverflowError) as error:  # too few cells, or no number
            raise ValueError(f"line {epoch + 1} of history.csv is corrupt ({error})") from None
        rows.append(cells | {"epoch": cells.get("epoch", epoch) - 1})
    return rows


def is_whole(run: str) -> bool:
    """Whether a finished run has its latest and best checkpoint; UsageError if it cannot go on."""
    from engine import checkpoints  # with h5py

    problems: list[str] = []
    for name in (checkpoints.LATEST, checkpoints.PREVIOUS):
        try:
            checkpoints.verify(path := Path(run, name))
            if problems or checkpoints.read_state(path).get("best_epoch") is None:
                return not problems
            with suppress(OSError):
                checkpoints.verify(path.with_name(checkpoints.BEST))
                return True
            return False
        except OSError as error:
            is_gone = isinstance(error, FileNotFoundError)
            problems.append(f"{name} is gone" if is_gone else str(error))
    what = f"{run} is finished, and has lost its checkpoints ({'; '.join(problems)})"
    raise UsageError(f"{what}; put a copy back, or choose another SAVE_PATH to train it again")


def pruned_at(run: Path) -> int | None:
    """Return after how many epochs a sweep ended a run early, or None."""
    content = files.read_json(run / PRUNED)
    return int(content["epoch"]) if content else None


def values_of(record: RunRecord) -> dict[str, float]:
    """Return the values of a run's metrics: {"val_loss best": 0.3, "val_loss last": 0.4}."""
    values: dict[str, float] = {}
    for name, metric in record.metrics.items():
        is_one = metric.best_epoch is None
        each = {"": metric.best} if is_one else {" best": metric.best, " last": metric.last}
        values |= {name + kind: value for kind, value in each.items()}
    return values


def differing_settings(records: Sequence[RunRecord], repetitions: bool = True) -> list[str]:
    """Return the settings that are not the same in all runs, maybe without seeds and folds."""
    every = [record.settings for record in records if record.config]
    keys = dict.fromkeys(key for settings in every for key in settings)
    differing = [key for key in keys if len({_text(s.get(key, ...)) for s in every}) > 1]
    return [key for key in differing if repetitions or not is_repetition(key)]


def is_repetition(key: str) -> bool:
    """Whether a setting only repeats the same kind of run: a seed or a fold."""
    return key.endswith("seed") or key.rpartition(".")[2] == "fold"


def groups_of(records: Sequence[RunRecord]) -> list[list[RunRecord]]:
    """Return runs that differ only by seeds and folds together, one without a config on its own."""
    groups: dict[str, list[RunRecord]] = {}
    for record in records:
        settings = record.settings.items()
        same = json.dumps(sorted((k, _text(v)) for k, v in settings if not is_repetition(k)))
        groups.setdefault(same if record.config else record.path, []).append(record)
    return list(groups.values())


def _text(value: Any) -> str:
    """Return a text that is the same for the same values; `...` stands for none."""
    return json.dumps(value, sort_keys=True) if isinstance(value, list | dict) else repr(value)


def provenance_of(records: Sequence[RunRecord]) -> dict[str, Any]:
    """Return what stands next to each picture and table: the command, the commit, the runs."""
    told = ("path", "state", "config_name", "commit", "is_dirty")
    return {
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        "made_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "project_commit": git_words("rev-parse", "--verify", "--quiet", "HEAD") or None,
        "runs": [{name: getattr(record, name) for name in told} for record in records],
    }


def write_with_provenance(path: Path, content: bytes, provenance: dict[str, Any]) -> None:
    """Write a file, and next to it, as `<name>.json`, where it comes from."""
    text = json.dumps(provenance, indent=2, ensure_ascii=False) + "\n"
    escaped = text.encode(errors="backslashreplace")  # a name that is not UTF-8 is escaped
    write_atomically(path.with_name(f"{path.name}.json"), escaped)
    write_atomically(path, content)


def require_writable(output: str, *suffixes: str) -> None:
    """Raise UsageError for a file that cannot be written, or has none of the `suffixes`, if any."""
    target = Path(output)
    if suffixes and target.suffix.lower() not in suffixes:
        raise UsageError(f"--output={output} ends with none of {', '.join(suffixes)}")
    if not output.strip() or target.is_dir() or not os.access(target.parent, os.W_OK):
        raise UsageError(f"--output={output} is not a file that could be written")


def load_runs(*patterns: str) -> "pd.DataFrame":
    """Return a row per run, by path: state, epoch, settings and metrics (`val_loss best`,
    `val_loss last`, `test_loss`). The patterns are those of `find_runs`."""
    import pandas as pd

    rows = []
    for record in runs_matching(patterns)[0]:
        row = {"path": record.path, "state": record.state, "epoch": record.epoch}
        rows.append(record.settings | row | values_of(record))
    return pd.DataFrame(rows).set_index("path")


def load_history(run: str | Path) -> "pd.DataFrame":
    """Return a run's `history.csv`, a row per epoch, indexed by epoch (from 1)."""
    import pandas as pd

    rows = pd.DataFrame(read_history(run) or {"epoch": [], "step": []})
    return rows.astype({"epoch": int, "step": int}).assign(epoch=rows.epoch + 1).set_index("epoch")


def load_position(run: str | Path) -> dict[str, Any]:
    """Return epochs and steps done, or {} before the first checkpoint; see `loop_state`."""
    state = loop_state(run)
    keys = ("epoch", "global_step", "inexact")
    return {key: state[key] for key in keys if state.get(key) not in (None, [])}


def loop_state(run: str | Path) -> dict[str, Any]:
    """Return what `loop_state.pkl` holds; UnpicklingError, nothing executed, if it is not data."""
    try:
        content = files.read_bytes(Path(run, "loop_state.pkl"), run)
        state = _PlainUnpickler(io.BytesIO(content)).load()
        form = {"epoch": int, "global_step": int, "fingerprint?": dict}
        is_plain = files.is_modest(state) and not files.misfit(state, form)
        if not is_plain or not {"epoch", "global_step"} <= state.keys():
            raise ValueError("it holds no position")
        json.dumps(state, default=str, skipkeys=True)  # refuses numbers of thousands of digits
        return state
    except FileNotFoundError:
        return {}
    except OSError:
        raise
    except Exception as error:  # a corrupt pickle may raise anything
        raise pickle.UnpicklingError(f"loop_state.pkl cannot be read ({error})") from None


class _PlainUnpickler(pickle.Unpickler):
    """Builds numbers, strings, lists and dictionaries; a pickle that asks for more is refused."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it names {module}.{name}, and may hold only plain values")


def newest_evaluations(run: Path, file: str) -> dict[str, Path]:
    """Return `eval/<name>-<global step>` of the highest step that holds a file, by its name."""
    places = [path.parent for path in run.glob(f"eval/[!.]*-*/{file}")]
    parts = [(place.name.rpartition("-"), place) for place in places]
    numbered = [(int(step), name, place) for (name, _, step), place in parts if step.isdecimal()]
    return {name: place for _, name, place in sorted(numbered)}
