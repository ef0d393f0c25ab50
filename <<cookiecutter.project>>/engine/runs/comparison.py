"""Tables of runs: what there is, how they compare, how two of them differ; and forms of a table."""

import csv
import difflib
import io
import json
import math
import pickle
import statistics
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from engine.runs import results
from engine.runs.results import RunRecord
from vegab import UsageError
from vegab.config import did_you_mean, differences, show
from vegab.execution import printable

SHORT_COMMIT = 8
LONGEST_NOTE = 70


class Mean(NamedTuple):
    """Mean and standard deviation (n - 1; None of one value) of a figure over some runs."""

    mean: float
    std: float | None
    num_runs: int


class Position(NamedTuple):
    """How far a run is, of how many."""

    number: int
    total: int | None


class Setting(NamedTuple):
    """A value of a config, as it stands there."""

    value: Any


class Table(NamedTuple):
    """Columns and rows; None is a cell without a value."""

    columns: list[str]
    rows: list[list[Any]]


def listing(records: Sequence[RunRecord]) -> Table:
    """Return a line a run: what it is, how far it is, how good, how old."""
    now = datetime.now(UTC)
    columns = ["run", "state", "epoch", "step", "best", "age", "duration", "config", "commit"]
    rows: list[list[Any]] = []
    for record in records:
        metric = record.metrics.get(record.monitor or "")
        age = now - datetime.fromisoformat(record.start) if record.start else None
        note = record.problem or (record.error if record.state == "failed" else "")
        cells: list[Any] = [
            record.path,
            f"{record.state}, inexact" if record.is_inexact else record.state,
            Position(record.epoch, record.num_epochs),
            Position(record.global_step, record.num_steps),
            f"{record.monitor} {metric.best:.4g} ({metric.best_epoch + 1})" if metric else None,
            _age(age.total_seconds()) if age else None,
            _duration(record.seconds) if record.num_attempts else None,
            record.config_name or None,
            _commit(record),
            note if len(note) <= LONGEST_NOTE else f"{note[: LONGEST_NOTE - 1]}…",
        ]
        rows.append(cells)
    if any(row[-1] for row in rows):
        return Table([*columns, "note"], rows)
    return Table(columns, [row[:-1] for row in rows])


def sorted_records(records: Sequence[RunRecord], column: str) -> list[RunRecord]:
    """Sort runs by a column of `listing`; a `-` before its name turns the order around.

    Raises UsageError if there is no such column.
    """
    order = {record.path: index for index, record in enumerate(records)}
    keys: dict[str, Callable[[RunRecord], Any]] = {
        "run": lambda r: order[r.path],
        "state": lambda r: r.state,
        "epoch": lambda r: r.epoch,
        "step": lambda r: r.global_step,
        "best": lambda r: r.metrics[r.monitor].best if r.monitor in r.metrics else None,
        "age": lambda r: r.start and -datetime.fromisoformat(r.start).timestamp(),
        "duration": lambda r: r.seconds,
        "config": lambda r: r.config_name,
        "commit": lambda r: r.commit,
    }
    name = column.removeprefix("-")
    if name not in keys:
        raise UsageError(_no_column(name, keys))
    rows = [[record, keys[name](record)] for record in records]
    return [record for record, _ in _sorted_rows(rows, 1, column.startswith("-"))]


def comparison(records: Sequence[RunRecord], metrics: Sequence[str]) -> Table:
    """Return a row a run: the settings that differ, the best and the last value of each metric."""
    settings = results.differing_settings(records)
    columns = ["run", "state", "epoch", *_setting_columns(settings), *_metric_columns(metrics)]
    rows = []
    for record in records:
        own = results.settings_of(record)
        position = Position(record.epoch, record.num_epochs)
        cells: list[Any] = [record.path, record.state, position]
        cells += [Setting(own[key]) if key in own else None for key in settings]
        for metric in metrics:
            figures = record.metrics.get(metric)
            cells += [figures.best, figures.last] if figures else [None, None]
        rows.append(cells)
    return Table(columns, rows)


def grouped(records: Sequence[RunRecord], metrics: Sequence[str]) -> Table:
    """Return a row for all runs whose settings differ by seeds and folds alone.

    Means are over the finished ones; the column `state` says what the others are.
    """
    groups = results.groups_of(records)
    settings = [
        key for key in results.differing_settings(records) if not results.is_repetition(key)
    ]
    columns = ["runs", "state", *_setting_columns(settings), *_metric_columns(metrics)]
    rows = []
    for group in groups:
        own = results.settings_of(group[0])
        states = Counter(record.state for record in group)
        shown = ", ".join(
            state if len(states) == 1 else f"{number} {state}" for state, number in states.items()
        )
        cells: list[Any] = [len(group), shown if group[0].config else f"{shown}: {group[0].path}"]
        cells += [Setting(own[key]) if key in own else None for key in settings]
        finished = [record for record in group if record.state == "finished"]
        for metric in metrics:
            figures = [record.metrics[metric] for record in finished if metric in record.metrics]
            cells += [mean_of([f.best for f in figures]), mean_of([f.last for f in figures])]
        rows.append(cells)
    return Table(columns, rows)


def metrics_of(records: Sequence[RunRecord], asked: Sequence[str]) -> list[str]:
    """Return the metrics to show: those that were asked for, or all that a run has.

    Raises UsageError if no run has one that was asked for.
    """
    known = list(dict.fromkeys(metric for record in records for metric in record.metrics))
    for metric in asked:
        if metric not in known:
            raise UsageError(
                f"no run has the metric {metric!r}{did_you_mean(metric, known)} "
                f"(there are {', '.join(known) or 'none yet'})"
            )
    return list(asked) or known


def sorted_table(table: Table, column: str) -> Table:
    """Sort rows by a column, cells without a value last; a `-` before the name turns them around.

    A metric's name stands for its best value. Raises UsageError if there is no such column.
    """
    name = column.removeprefix("-")
    for candidate in (name, f"{name} best"):
        if candidate in table.columns:
            index = table.columns.index(candidate)
            return Table(table.columns, _sorted_rows(table.rows, index, column.startswith("-")))
    raise UsageError(_no_column(name, table.columns))


def _no_column(name: str, columns: Any) -> str:
    return f"no column {name!r} to sort by{did_you_mean(name, columns)} ({', '.join(columns)})"


def _sorted_rows(rows: Sequence[list[Any]], index: int, descending: bool) -> list[list[Any]]:
    def key(row: list[Any]) -> tuple[int, float, str]:
        value = row[index].value if isinstance(row[index], Setting) else row[index]
        value = value.mean if isinstance(value, Mean) else value
        value = value.number if isinstance(value, Position) else value
        if isinstance(value, int | float) and not isinstance(value, bool):
            return (0, value, "")
        return (1, 0, value if isinstance(value, str) else show(value))

    there = [row for row in rows if row[index] is not None]
    return [
        *sorted(there, key=key, reverse=descending),
        *(row for row in rows if row[index] is None),
    ]


def _setting_columns(settings: Sequence[str]) -> list[str]:
    """Return the names of settings, told apart from the columns that every table has."""
    own = ("run", "runs", "state", "epoch")
    return [f"config.{key}" if key in own else key for key in settings]


def _metric_columns(metrics: Sequence[str]) -> list[str]:
    return [f"{metric} {which}" for metric in metrics for which in ("best", "last")]


def mean_of(values: Sequence[float]) -> Mean | None:
    """Return mean and standard deviation of some values; None if there are none."""
    if not values:
        return None
    std = statistics.stdev(values) if len(values) > 1 else None
    return Mean(statistics.fmean(values), std, len(values))


def _commit(record: RunRecord) -> str | None:
    if not record.commit:
        return None
    return record.commit[:SHORT_COMMIT] + "+" * record.is_dirty


def _age(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def as_text(table: Table) -> str:
    """Return lines of columns below each other, numbers to the right."""
    rows = [[printable(_shown(cell)) for cell in row] for row in [table.columns, *table.rows]]
    widths = [max(map(_width, column)) for column in zip(*rows, strict=True)]
    right = _to_the_right(table)
    lines = []
    for row in rows:
        cells = []
        for cell, width, to_the_right in zip(row, widths, right, strict=True):
            blank = " " * (width - _width(cell))
            cells.append(blank + cell if to_the_right else cell + blank)
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines) + "\n"


def as_csv(table: Table) -> str:
    """Return CSV with all digits; a mean takes three columns."""
    plain = _without_means(table)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(plain.columns)
    for row in plain.rows:
        cells = [cell.number if isinstance(cell, Position) else cell for cell in row]
        writer.writerow([repr(cell) if isinstance(cell, float) else _shown(cell) for cell in cells])
    return text.getvalue()


def as_markdown(table: Table) -> str:
    """Return a table of Markdown."""
    rules = ["---:" if to_the_right else "---" for to_the_right in _to_the_right(table)]
    rows = [[_for_markdown(_shown(cell)) for cell in row] for row in [table.columns, *table.rows]]
    return "".join(f"| {' | '.join(row)} |\n" for row in [rows[0], rules, *rows[1:]])


def as_latex(table: Table) -> str:
    r"""Return a tabular for LaTeX; it needs `\usepackage{booktabs}`."""
    kinds = ["r" if to_the_right else "l" for to_the_right in _to_the_right(table)]
    rows = [[_for_latex(_shown(cell)) for cell in row] for row in [table.columns, *table.rows]]
    head, *body = [" & ".join(row) + r" \\" for row in rows]
    begin = rf"\begin{{tabular}}{{{''.join(kinds)}}}"
    lines = [begin, r"\toprule", head, r"\midrule", *body, r"\bottomrule", r"\end{tabular}"]
    return "\n".join(lines) + "\n"


def as_json(table: Table, provenance: Mapping[str, Any]) -> str:
    """Return a mapping per row, with all digits, and where the table comes from."""
    plain = _without_means(table)
    rows = [
        {
            column: cell[0] if isinstance(cell, Setting | Position) else cell
            for column, cell in zip(plain.columns, row, strict=True)
        }
        for row in plain.rows
    ]
    content = json.loads(
        json.dumps({"rows": rows, "provenance": provenance}),
        parse_constant=lambda _: None,  # JSON knows no infinity
    )
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def _without_means(table: Table) -> Table:
    """Give mean, standard deviation and count columns of their own."""
    is_mean = [
        any(isinstance(row[i], Mean) for row in table.rows) for i in range(len(table.columns))
    ]
    columns = []
    for column, wide in zip(table.columns, is_mean, strict=True):
        columns += [f"{column} {part}" for part in ("mean", "std", "count")] if wide else [column]
    rows = []
    for row in table.rows:
        cells: list[Any] = []
        for cell, wide in zip(row, is_mean, strict=True):
            cells += (list(cell) if cell else [None, None, 0]) if wide else [cell]
        rows.append(cells)
    return Table(columns, rows)


def _shown(cell: Any) -> str:
    if cell is None:
        return ""
    if isinstance(cell, Setting):
        value = cell.value  # most are short to write, and there are many
        return str(value) if type(value) in (str, int, float) else show(value)
    if isinstance(cell, Mean):
        return mean_and_spread(cell)
    if isinstance(cell, Position):
        return f"{cell.number}/{cell.total}" if cell.total else str(cell.number)
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)


def mean_and_spread(cell: Mean) -> str:
    """Write a mean with as many decimals as the two digits of its standard deviation have."""
    if not cell.std:
        spread = "" if cell.std is None else " ± 0"
        return f"{cell.mean:.4g}{spread} ({cell.num_runs})"
    decimals = 1 - math.floor(math.log10(cell.std))
    if not 0 <= decimals <= 8:
        return f"{cell.mean:.4g} ± {cell.std:.2g} ({cell.num_runs})"
    return f"{cell.mean:.{decimals}f} ± {cell.std:.{decimals}f} ({cell.num_runs})"


def _to_the_right(table: Table) -> list[bool]:
    return [_are_numbers([row[i] for row in table.rows]) for i in range(len(table.columns))]


def _are_numbers(column: Sequence[Any]) -> bool:
    cells = [cell.value if isinstance(cell, Setting) else cell for cell in column]
    given = [cell for cell in cells if cell is not None]
    return bool(given) and all(
        isinstance(cell, int | float | Mean) and not isinstance(cell, bool) for cell in given
    )


def _width(text: str) -> int:
    if text.isascii():
        return len(text)
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1
        for c in text
    )


def _for_markdown(text: str) -> str:
    for character, instead in (("&", "&amp;"), ("<", "&lt;"), ("\\", "\\\\"), ("|", "\\|")):
        text = text.replace(character, instead)
    for character in "`*_[]":
        text = text.replace(character, f"\\{character}")
    return printable(text)


LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    '"': r"{\ttfamily\char34}",
    # A row that begins with one of these would be read as an argument of the command before it.
    "[": "{[}",
    "*": "{*}",
    **{character: f"\\{character}" for character in "&%$#_{}"},
}


def _for_latex(text: str) -> str:
    return "".join(LATEX.get(character, character) for character in printable(text))


def difference(one: RunRecord, other: RunRecord) -> str:
    """Return what differs between two runs: config, command, environment, data and code."""
    first, second = (results.read_json(record.path, "meta.json", []) for record in (one, other))
    if one.config and other.config:
        config = _changes(one.config, other.config)
    else:
        config = [f"  {record.path}: {record.problem}" for record in (one, other) if record.problem]
    sections = {
        "config": config,
        "command": _changes({"command": one.command}, {"command": other.command}),
        "packages": _changes(first.get("packages") or {}, second.get("packages") or {}),
        "environment": _changes(_environment(first), _environment(second)),
        "data": _changes(_data(one), _data(other)),
        "code": _code(Path(one.path), Path(other.path)),
    }
    lines = [f"--- {one.path}", f"+++ {other.path}"]
    for name, found in sections.items():
        lines += ["", f"{name}: {'the same' if not found else ''}".rstrip(), *found]
    # A tab in code is a tab: the patch is to be applied.
    shown = ["\t".join(map(printable, line.rstrip("\n").split("\t"))) for line in lines]
    return "\n".join(shown) + "\n"


def _changes(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    changes = differences(dict(one), dict(other))
    return [f"  {key}: {show(old)} -> {show(new)}" for key, (old, new) in sorted(changes.items())]


def _environment(meta: Mapping[str, Any]) -> dict[str, Any]:
    keys = ("python", "host", "platform", "cpu", "gpus", "environment")
    return {key: meta[key] for key in keys if key in meta}


def _data(record: RunRecord) -> dict[str, Any]:
    """Return the fingerprint of a run's data and what its numbers depend on beside packages."""
    try:
        stored = results.load_fingerprint(record.path)
    except (OSError, pickle.UnpicklingError):
        return {}
    return {key: stored[key] for key in ("data", "processor", "settings") if key in stored}


def _code(one: Path, other: Path) -> list[str]:
    """Return a unified diff of the source that two runs have used."""
    lines: list[str] = []
    if missing := [f"  {run} has no code/" for run in (one, other) if not (run / "code").is_dir()]:
        return missing
    names = {
        str(path.relative_to(run / "code"))
        for run in (one, other)
        for path in (run / "code").rglob("*")
        if path.is_file() and path != run / "code" / "uncommitted.diff"
    }
    for name in sorted(names):
        contents = [_content(run / "code" / name) for run in (one, other)]
        if contents[0] == contents[1]:
            continue
        before, after = (_lines(content) for content in contents)
        if before is None or after is None:
            lines.append(f"  {name}: not text, and not the same")
            continue
        paths = [str(run / "code" / name) for run in (one, other)]
        for line in difflib.unified_diff(before, after, fromfile=paths[0], tofile=paths[1]):
            lines += [line] if line.endswith("\n") else [line, "\\ No newline at end of file"]
    return lines


def _content(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def _lines(content: bytes | None) -> list[str] | None:
    try:
        return (content or b"").decode().splitlines(keepends=True)
    except UnicodeDecodeError:
        return None
