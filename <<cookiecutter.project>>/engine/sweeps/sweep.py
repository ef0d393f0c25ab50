"""Keeps a sweep on the disk: what it is, how far each trial is; and has the trials trained.

Needs no Keras. A trial is an ordinary run folder, made by what `bin/train.py` does. What the sweep
is stands in `sweep.json`; the folders of its trials say how far it is."""

import os
import shlex
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from engine import endings
from engine.runs import MOST_DEATHS, RunRecord, results, selection
from engine.sweeps.definition import PLAN, Definition, Settings, Trial, trials_of
from engine.sweeps.local import SECONDS_BETWEEN
from vegab import UsageError
from vegab.config import differences, show, show_differences
from vegab.exits import FINISHED, INTERRUPTED, REFUSED
from vegab.files import FORMAT, leads_out, misfit, read_json, write_json
from vegab.run_folder import IN_USE, living_owner, refuse_links, take_lock
from vegab.snapshot import CODE

SWEEP, LOCK, LOG, SWEEP_PAGE = "sweep.json", "sweep.lock", "sweep.log", "sweep.html"
OUTPUTS, ENDINGS = results.OUTPUTS, results.ENDINGS
STATES = ("waiting", "new", "running", "finished", "interrupted", "died", "failed", "broken")
MOST_LINES, NUM_BEST = 40, 10  # trials that `status` prints, and the best among them
# The form of sweep.json, which somebody else may have written.
_DEFINITION = {"config_name": str, "config": dict, "words": [str], "grid": {...: list}}
_DEFINITION |= {"range": {...: str}, "search": str, "pruner": str, "seeds": int, "trials": int}
FORM = {"definition": _DEFINITION, "suggested": [dict], "trials": [{"name": str, "settings": dict}]}
# Is told how many trials run, are done and have failed, and the best so far.
Show = Callable[[int, int, int, str], None]


def taken_up(
    folder: Path, definition: Definition, completed: Callable[[Any], dict[str, Any]] = dict
) -> tuple[Definition, list[Trial]]:
    """Return a definition and its trials, after those of the sweep that is in the folder already.
    Raises UsageError if the folder holds something else, as a sweep of another config. `completed`
    gives one of an earlier time the keys that are younger, with their defaults."""
    if not (folder / SWEEP).exists():
        try:
            is_new = not folder.exists() or set(os.listdir(folder)) <= {LOCK, LOG, CODE}
        except OSError as error:
            raise UsageError(f"{folder}: {error.strerror}; choose another folder") from None
        if not is_new:
            raise UsageError(f"{folder} holds files but no sweep; choose a new or an empty folder")
        return definition, trials_of(definition)
    before, there, _ = read(folder)
    searched = ("grid", "range", "seeds", "folds")  # which a search cannot change on its way
    fixed = ["search", "pruner", *(searched if definition.search else ())]
    own = [{f"--{key}": getattr(one, key) for key in fixed} for one in (before, definition)]
    old, now = completed(before.config) | own[0], {**definition.config} | own[1]
    if changes := show_differences(differences(old, now)):
        what = f"a sweep of another config ({changes})"
        raise UsageError(f"{folder} holds {what}; choose another folder")
    return definition, [*there, *(new for new in trials_of(definition, there) if new not in there)]


def read(folder: Path) -> tuple[Definition, list[Trial], list[Settings]]:
    """Return what `sweep.json` says: of what it is, the trials, and what a search has chosen.
    Without a search, the last are the settings of all trials. UsageError if it is not a sweep."""
    content = read_json(folder / SWEEP)
    if content is None:
        raise UsageError(f"{folder} holds no sweep; name a folder that bin/sweep.py made")
    try:
        trials = [Trial(entry["name"], entry["settings"]) for entry in content["trials"]]
        if wrong := misfit(content, FORM) or next(filter(leads_out, [t.name for t in trials]), ""):
            raise KeyError(wrong)
        known = {each.name for each in fields(Definition)} - {"resolve"}
        definition = Definition(**{k: v for k, v in content["definition"].items() if k in known})
        return definition, trials, content["suggested"] or [trial.settings for trial in trials]
    except (KeyError, TypeError) as error:
        raise UsageError(f"{folder / SWEEP} is not one of this project's ({error!r})") from error


def write(
    folder: Path, definition: Definition, trials: Sequence[Trial], chosen: Sequence[Settings] = ()
) -> None:
    """Keep what a sweep is."""
    content = {
        "format": FORMAT,
        "definition": {k: v for k, v in asdict(definition).items() if k != "resolve"},
        "suggested": list(map(dict, chosen)) if definition.search else [],
        "trials": [{"name": t.name, "settings": dict(t.settings)} for t in trials],
    }
    write_json(folder / SWEEP, content)


def require_unlocked(folder: Path) -> None:
    """Raise UsageError if another process sweeps a folder, or a link in it leads out of it."""
    refuse_links(folder, folder)
    if owner := living_owner(folder, LOCK):
        who = f"process {owner['pid']} on {owner['host']}"
        hint = f"python bin/sweep.py stop {shlex.quote(str(folder))} ends that"
        raise UsageError(f"{folder} is being swept by {who}; {hint}")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make a sweep's folder, and hold it. Raises UsageError if another process does."""
    require_unlocked(folder)
    lock = take_lock(folder, LOCK, folder)
    try:
        yield
    finally:
        os.close(lock)


def states_of(folder: Path, trials: Sequence[Trial]) -> list[RunRecord]:
    """Return what the folder of each trial says; the state of one that has none is "waiting"."""
    paths = [os.path.join(folder, trial.name) for trial in trials]
    records = {r.path: r for r in results.read_runs([*filter(os.path.exists, paths)])}
    every = [records.get(path) or RunRecord(path, state="waiting") for path in paths]
    results.note_given_up(every)
    return every


def ranked(records: Iterable[RunRecord]) -> list[RunRecord]:
    """Return the runs that did not fail and have values of what they monitor, the best first."""
    return [record for [record] in selection.ranked([record] for record in records)]


def _reached(best: RunRecord) -> str:
    return f"best {best.monitor} {best.metrics[str(best.monitor)].best:.4g}"


def to_look_at(records: Sequence[RunRecord]) -> list[RunRecord]:
    """Return all trials, or of many those that run or went wrong, and the best."""
    if len(records) <= MOST_LINES:
        return list(records)
    unusual = [record for record in records if record.state not in ("waiting", "new", "finished")]
    finished = [record for record in records if record.state == "finished"]
    return [*unusual[: MOST_LINES - NUM_BEST], *ranked(finished)[:NUM_BEST]]


def summary(records: Sequence[RunRecord]) -> str:
    """Return a line: how many trials are in each state, and the best of them."""
    states = Counter(record.state for record in records)
    text = ", ".join(f"{states[state]} {state}" for state in STATES if states[state])
    early = sum(r.state == "finished" and r.epoch < (r.num_epochs or 0) for r in records)
    text += f" ({early} of them early)" if early else ""
    best = "".join(f"; {_reached(record)}: {record.path}" for record in ranked(records)[:1])
    return f"{len(records)} trials: {text}{best}"


def problems(folder: Path, records: Sequence[RunRecord]) -> list[str]:
    """Return a sentence for each trial that failed, or ended otherwise before it was finished."""
    noted = read_json(folder / OUTPUTS / ENDINGS)
    noted, found = noted if isinstance(noted, dict) else {}, []
    for record in records:
        how = noted.get(os.path.basename(record.path))
        if record.state == "failed":
            found.append(f"{record.path} failed: {record.error}")
        elif how and record.state != "finished":
            found.append(f"{record.path} is not finished: {how}")
    return found


def write_sweep(records: Sequence[RunRecord], folder: Path) -> None:
    """Write `sweep.html` into a sweep's folder, unless none of its trials has begun."""
    from engine.runs import write_report

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
        told, trials, _ = read(folder)
    except UsageError:
        return None
    definition = [shlex.join([told.config_name, *told.words])]
    definition += [f"grid {key}={','.join(map(show, axis))}" for key, axis in told.grid.items()]
    definition += [f"range {key}={text}" for key, text in told.range.items()]
    rest = {key: getattr(told, key) for key in PLAN if key not in ("grid", "range")}
    definition += [f"{key} {value}" for key, value in rest.items() if value]
    num_waiting = sum(not (folder / trial.name).exists() for trial in trials)
    return {"definition": definition, "num_trials": len(trials), "num_waiting": num_waiting}


@dataclass
class Sweeper:
    """Trains what is not done yet."""

    folder: Path  # of the sweep, which is locked for this process
    # Returns all trials by now; it is given the names of those that were refused.
    advance: Callable[[Collection[str]], list[Trial]]
    command_of: Callable[[Trial], Sequence[str]]  # returns the words after bin/train.py
    launcher: Any  # starts them; see `engine.sweeps.local`
    refused: dict[str, str] = field(default_factory=dict)  # what those said that left no folder
    num_refusals: int = 0  # of bin/train.py itself
    tried: set[str] = field(default_factory=set)
    deaths: Counter[str] = field(default_factory=Counter)

    def run(self, retry_failed: bool, show: Show) -> list[RunRecord]:
        """Train until all are done or failed, or it is told to stop; return the records of all."""
        self._show = show
        # One that is broken was killed as it began, and begins again, or says what is wrong.
        done = ("finished",) if retry_failed else ("finished", "failed")
        while True:
            trials = self.advance(self.refused)
            records = states_of(self.folder, trials)
            states = {trial.name: r.state for trial, r in zip(trials, records, strict=True)}
            elsewhere = [name for name, state in states.items() if state == "running"]
            ended = {name for name, state in states.items() if state in done}
            others = ended | self.tried | ({*elsewhere} - self.launcher.adopted())
            left = [trial for trial in trials if trial.name not in others]
            if self.launcher.is_stopped() or not (left or elsewhere):
                return records
            self._best = ranked(records)[:1]
            self._num_done = sum(record.state == "finished" for record in records)
            self._num_failed = sum(record.state in done for record in records) - self._num_done
            self._begun = {trial.name for trial in trials}
            if left:
                self.launcher.run({each.name: self.command_of(each) for each in left}, self._tell)
            while not (left or self.launcher.is_stopped()):
                if not all(living_owner(self.folder / name) for name in elsewhere):
                    break
                self._tell(elsewhere, {})
                time.sleep(SECONDS_BETWEEN)

    def _goes_on(self, name: str, code: int) -> bool:
        """Note how a trial has ended; return whether it was killed, and goes on."""
        # One that found its folder in use is tried later; whose it was may have ended by then.
        if code == REFUSED and IN_USE in self.launcher.said(name):
            return False
        has_begun = code in (FINISHED, INTERRUPTED) or (self.folder / name).exists()
        how = ""
        if (endings.signal_of(code) or code == INTERRUPTED) and not self.launcher.is_stopped():
            self.deaths[name] += 1
            how = f"{self.launcher.how(name, code)} (death {self.deaths[name]} of {MOST_DEATHS})"
            path = self.folder / OUTPUTS / ENDINGS  # for `problems`
            write_json(path, (read_json(path) or {}) | {name: how})
            if self.deaths[name] < MOST_DEATHS:
                return True
        self.tried.add(name)
        if code == REFUSED or not has_begun:
            said = self.launcher.said(name)
            self.refused[name] = f"{name}: {how} ({said})" if how else said
            self.num_refusals += code == REFUSED
        return False

    def _tell(self, running: Sequence[str], codes: Mapping[str, int]) -> dict[str, Sequence[str]]:
        """Say how it stands; return commands that may begin because others have ended: new ones,
        and those that were killed, so that what waits for them does not wait long."""
        new: list[Trial] = []
        if codes:
            self._begun -= {name for name, code in codes.items() if self._goes_on(name, code)}
            paths = [os.path.join(self.folder, name) for name in codes]
            self._best = ranked([*self._best, *results.read_runs(paths)])[:1]
            self._num_done += sum(code == FINISHED for code in codes.values())
            tried = codes.keys() & self.tried
            self._num_failed += sum(codes[name] not in (FINISHED, INTERRUPTED) for name in tried)
            trials = self.advance(self.refused)
            new = [trial for trial in trials if trial.name not in self._begun]
            self._begun |= {trial.name for trial in new}
        best = "".join(map(_reached, self._best))
        self._show(len(running), self._num_done, self._num_failed, best)
        return {trial.name: self.command_of(trial) for trial in new}
