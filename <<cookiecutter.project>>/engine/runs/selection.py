"""Chooses runs, by conditions such as `state=finished val_loss<0.3`, and what to show of them."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from operator import eq, ge, gt, itemgetter, le, lt
from os.path import basename
from statistics import fmean
from typing import Any, NamedTuple

from engine.runs import results
from engine.runs.results import RunRecord
from vegab import UsageError
from vegab.command_line import argh
from vegab.config import UnknownKeyError, did_you_mean, find_key, show

FITTING = "only runs that fit: 'state=finished n_filters>=16 val_loss<0.3 tag=paper'"
OPTIONS = {
    "--where": ("FILTER", FITTING),
    "--columns": ("NAMES", "show these, as a,b,c: settings, metrics, and what `list` shows"),
    "--best": ("N", "only the N best runs, by the (first) metric, or else by what they monitor"),
}
LONGEST_NOTE = 70
# A word of a filter is a condition if it has a comparison that is not in quotes, with or without
# blanks around it. The page of bin/report.py reads filters in the same way.
WORD = re.compile(r'(?:[^\s"=<>]|"[^"]*"?|\s*[=<>!]*[=<>]\s*)+')
CONDITION = re.compile(r'((?:[^=<>!"]|"[^"]*")+)((?:!=|[=<>])[=<>!]*)(.*)')
COMPARISONS: dict[str, Any] = {"=": eq, "==": eq, "!=": eq, "<": lt, "<=": le, ">": gt, ">=": ge}


class Cell(NamedTuple):
    """A value that is shown as a text of its own; the value is what it is sorted by."""

    value: Any
    text: str


def _best(record: RunRecord) -> Cell | None:
    monitor = record.monitor or ""
    if (best := record.metrics.get(monitor)) is None:
        return None
    name = f"test_{monitor.removeprefix('val_')}"
    tested = f", {name} {record.metrics[name].last:.4g}" if name in record.metrics else ""
    return Cell(best.best, f"{monitor} {best.best:.4g} ({(best.best_epoch or 0) + 1}){tested}")


def _age(record: RunRecord) -> Cell | None:
    if not record.start:
        return None
    seconds = (datetime.now(UTC) - datetime.fromisoformat(record.start)).total_seconds()
    sizes = {"d": 86400, "h": 3600, "min": 60}
    unit = next((unit for unit, size in sizes.items() if seconds >= 2 * size), "s")
    return Cell(seconds, f"{max(seconds, 0) / sizes.get(unit, 1):.0f} {unit}")


def _duration(record: RunRecord) -> Cell | None:
    text = str(timedelta(seconds=round(record.seconds)))
    return Cell(record.seconds, text) if record.num_attempts else None


def _commit(record: RunRecord) -> Cell | None:
    short = (record.commit or "")[:8]
    return Cell(short, short + "+" * record.is_dirty) if short else None


def _problem(record: RunRecord) -> str | None:
    text = record.problem or (record.error if record.state == "failed" else "")
    return (text if len(text) <= LONGEST_NOTE else f"{text[: LONGEST_NOTE - 1]}…") or None


def _position(number: int, total: int | None) -> Cell:
    return Cell(number, f"{number}/{total}" if total else str(number))


def selects(command: Callable[..., None]) -> Callable[..., None]:
    """Explain the arguments by which a command chooses runs, and what it shows of them."""
    for name, (metavar, about) in OPTIONS.items():
        command = argh.arg(name, metavar=metavar, help=about)(command)
    return argh.arg("patterns", nargs="*", metavar="PATTERN", help=results.PATTERNS)(command)


Group = Sequence[RunRecord]
Getter = Callable[[RunRecord], Any]  # of a value or a cell; None where a run has none
OWN: dict[str, Getter] = {
    "run": lambda record: record.path,
    "state": lambda r: Cell(r.state, f"{r.state}, inexact" if r.is_inexact else r.state),
    "epoch": lambda record: _position(record.epoch, record.num_epochs),
    "step": lambda record: _position(record.global_step, record.num_steps),
    "best": _best,
    "age": _age,
    "duration": _duration,
    "config": lambda record: record.config_name or None,
    "commit": _commit,
    "tags": lambda record: Cell(record.tags, ", ".join(record.tags)) if record.tags else None,
    "note": lambda record: record.note or None,
    "problem": _problem,
}
OFTEN_EMPTY = ("tags", "note", "problem")  # a table has them where a run does
ALSO = {"name": "run", "tag": "tags"}


def known_to(records: Iterable[RunRecord]) -> dict[str, Getter]:
    """Return all that can be asked of runs, by name: what every run has, metrics, and settings."""
    records = list(records)
    known = OWN | {name: OWN[own] for name, own in ALSO.items()}
    for metric in dict.fromkeys(key for record in records for key in record.metrics):
        known.setdefault(metric, _of_metric(metric, 0))
        known |= {f"{metric} best": _of_metric(metric, 0), f"{metric} last": _of_metric(metric, 2)}
    for key in dict.fromkeys(key for record in records for key in record.settings):
        known[f"config.{key}" if key in known else key] = of_setting(key)
    return known


def _of_metric(metric: str, place: int) -> Getter:
    return lambda record: record.metrics[metric][place] if metric in record.metrics else None


def of_setting(key: str) -> Getter:
    """Return what gets a setting of a dotted key."""

    def get(record: RunRecord) -> Cell | None:
        own = record.settings
        return Cell(own[key], written(own[key])) if key in own else None

    return get


def written(value: Any) -> str:
    """Return a value with all digits, as it can be typed."""
    # Most are short to write, and there are many.
    return str(value) if type(value) in (str, int, float) else show(value)


def find(known: Mapping[str, Getter], name: str) -> Getter:
    """Return what a full or short name stands for; UsageError if it stands for nothing."""
    key = name if name in known else find_key(dict(known), name)
    if key not in known:
        raise UnknownKeyError(f"unknown key {name!r}{did_you_mean(name, known)}")
    return known[key]


def columns_in(text: str) -> list[str]:
    """Return the names that `--columns` asks for."""
    return [name.strip() for name in text.split(",") if name.strip()]


def matching(records: Sequence[RunRecord], text: str) -> list[RunRecord]:
    """Return the runs that fit all words of a filter: conditions, or texts that occur in its
    name, settings and notes. If a run has no value for a condition, only `!=` is true."""
    known: dict[str, Getter] = {}
    keys: list[str] = []
    fitting = list(records)
    for word in map(str.strip, WORD.findall(text)):
        condition = CONDITION.fullmatch(word)
        if condition is None:
            wanted = word.replace('"', "").casefold()
            keys = keys or results.differing_settings(records)
            fitting = [record for record in fitting if wanted in _text_of(record, keys)]
            continue
        key, sign, wanted = (part.strip().replace('"', "") for part in condition.groups())
        known = known or known_to(records)
        get, test = find(known, key), _test(word, sign, wanted)
        fitting = [record for record in fitting if test(_values(get, record))]
    return fitting


def _values(get: Getter, record: RunRecord) -> Sequence[Any]:
    if get is OWN["run"]:
        return record.path, basename(record.path)
    if get is OWN["tags"]:
        return record.tags
    value = get(record)
    return [] if value is None else [value.value if isinstance(value, Cell) else value]


def _test(word: str, sign: str, wanted: str) -> Callable[[Sequence[Any]], bool]:
    """Return whether one of a run's values fits; for `!=`, whether none is equal."""
    if sign not in COMPARISONS:
        raise UsageError(f"{word!r}: {sign} is not one of {', '.join(COMPARISONS)}")
    compare, text = COMPARISONS[sign], _folded(wanted)
    number: float | None = None
    try:
        number = float(wanted)
    except ValueError:
        if compare is not eq:
            raise UsageError(f"{word!r}: a number is expected after {sign}") from None

    def holds(value: Any) -> bool:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return number is not None and compare(value, number)
        return compare is eq and _folded(written(value)) == text

    return lambda values: any(map(holds, values)) != (sign == "!=")


def _folded(text: str) -> str:
    return "".join(text.casefold().split())


def _text_of(record: RunRecord, keys: Iterable[str]) -> str:
    """Return what a run is called, and which of the settings that differ it has."""
    told = (record.path, record.state, record.config_name, record.commit or "", record.problem)
    own = record.settings
    pairs = (f"{key}={written(own[key])}" for key in keys if key in own)
    return "\n".join([*told, record.error, record.note, *record.tags, *pairs]).casefold()


def metrics_of(records: Sequence[RunRecord], asked: Sequence[str]) -> list[str]:
    """Return the metrics asked for, or all that a run has; UsageError for one that no run has."""
    known = list(dict.fromkeys(metric for record in records for metric in record.metrics))
    if unknown := [metric for metric in asked if metric not in known]:
        hint = f"{did_you_mean(unknown[0], known)} (there are {', '.join(known) or 'none yet'})"
        raise UsageError(f"no run has the metric {unknown[0]!r}{hint}")
    return list(asked) or known


def main_monitor(records: Iterable[RunRecord]) -> str | None:
    """Return what most runs monitor."""
    monitors = Counter(record.monitor for record in records if record.monitor)
    return monitors.most_common(1)[0][0] if monitors else None


def ranked(groups: Iterable[Group], metric: str | None = None) -> list[Group]:
    """Return the groups with values of a metric, by default what most runs monitor, best first."""
    groups = list(groups)
    metric = metric or main_monitor(record for group in groups for record in group)
    found = []
    for group in groups:
        usable = [r for r in group if metric in r.metrics and r.state not in ("failed", "broken")]
        if metric and usable:
            sign = 1 if results.is_lower_better_in(usable[0].config, metric) else -1
            found.append((sign * fmean(record.metrics[metric].best for record in usable), group))
    return [group for _, group in sorted(found, key=itemgetter(0))]


def chosen(
    patterns: Sequence[str],
    where: str = "",
    best: int = 0,
    metric: str | None = None,
    by_group: bool = False,
) -> tuple[list[RunRecord], list[str]]:
    """Return the runs that patterns and a filter choose, or the `best` of them, and what
    `find_runs` says; with `by_group`, those that differ only by seeds and folds by their mean."""
    records, problems = results.runs_matching(patterns)
    fitting = matching(records, where)
    if not fitting:
        raise UsageError(f"none of {len(records)} runs fits {where!r}")
    if best < 0:
        raise UsageError(f"--best={best}: a number of runs is expected")
    if best:
        metrics_of(fitting, [metric] if metric else [])
        groups = results.groups_of(fitting) if by_group else [[record] for record in fitting]
        fitting = [record for group in ranked(groups, metric)[:best] for record in group]
        if not fitting:
            raise UsageError(f"--best={best}: none of the runs has a value to rank it by")
    return fitting, problems
