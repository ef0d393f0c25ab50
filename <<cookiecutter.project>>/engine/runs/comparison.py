"""Makes tables of runs: what there is, how they compare, how two of them differ; in many forms."""

import csv
import difflib
import io
import json
import math
import pickle
import statistics
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

from engine.runs import results
from engine.runs.results import RunRecord
from vegab import UsageError, snapshot
from vegab.config import did_you_mean, differences, show
from vegab.execution import printable

SHORT_COMMIT = 8
LONGEST_NOTE = 70


class Mean(NamedTuple):
    """Mean and standard deviation (n - 1; None of one value) of a metric over some runs."""

    mean: float
    std: float | None
    num_runs: int


class Cell(NamedTuple):
    """A value that is shown as a text of its own; the value is what it is sorted by."""

    value: Any
    text: str


class Table(NamedTuple):
    """Columns and rows; None is a cell without a value."""

    columns: list[str]
    rows: list[list[Any]]


def listing(records: Sequence[RunRecord]) -> Table:
    """Return a line a run: what it is, how far it is, how good, how old."""
    now = datetime.now(UTC)
    columns = ["run", "state", "epoch", "step", "best", "age", "duration", "config", "commit"]
    rows: list[list[Any]] = []
    for index, record in enumerate(records):
        monitor = record.monitor or ""
        best = record.metrics.get(monitor)
        name = f"test_{monitor.removeprefix('val_')}"
        tested = f", {name} {record.metrics[name].last:.4g}" if name in record.metrics else ""
        start = record.start and datetime.fromisoformat(record.start)
        age = (now - start).total_seconds() if start else None
        duration = timedelta(seconds=round(record.seconds))
        note = record.problem or (record.error if record.state == "failed" else "")
        cells: list[Any] = [
            Cell(index, record.path),
            f"{record.state}, inexact" if record.is_inexact else record.state,
            _position(record.epoch, record.num_epochs),
            _position(record.global_step, record.num_steps),
            best
            and Cell(
                best.best, f"{monitor} {best.best:.4g} ({(best.best_epoch or 0) + 1}){tested}"
            ),
            None if age is None else Cell(age, _age(age)),
            Cell(record.seconds, str(duration)) if record.num_attempts else None,
            record.config_name or None,
            record.commit and record.commit[:SHORT_COMMIT] + "+" * record.is_dirty,
            note if len(note) <= LONGEST_NOTE else f"{note[: LONGEST_NOTE - 1]}…",
        ]
        rows.append(cells)
    if any(row[-1] for row in rows):
        return Table([*columns, "note"], rows)
    return Table(columns, [row[:-1] for row in rows])


def comparison(records: Sequence[RunRecord], metrics: Sequence[str]) -> Table:
    """Return a row a run: the settings that differ, the best and the last value of each metric."""
    keys, columns = results.differing_settings(records), _metric_columns(records, metrics)
    rows = []
    for record in records:
        position = _position(record.epoch, record.num_epochs)
        cells = [record.path, record.state, position, *_settings(record, keys)]
        values = results.values_of(record)
        rows.append([*cells, *(values.get(column) for column in columns)])
    return Table(["run", "state", "epoch", *_setting_columns(keys), *columns], rows)


def grouped(records: Sequence[RunRecord], metrics: Sequence[str]) -> Table:
    """Return a row for all runs that differ only by seeds and folds; means are of finished ones."""
    keys = results.differing_settings(records, repetitions=False)
    columns = _metric_columns(records, metrics)
    rows = []
    for group in results.groups_of(records):
        states = Counter(record.state for record in group)
        shown = ", ".join(
            state if len(states) == 1 else f"{number} {state}" for state, number in states.items()
        )
        shown += "" if group[0].config else f": {group[0].path}"
        cells = [len(group), shown, *_settings(group[0], keys)]
        every = [results.values_of(record) for record in group if record.state == "finished"]
        means = (mean_of([values[key] for values in every if key in values]) for key in columns)
        rows.append([*cells, *means])
    return Table(["runs", "state", *_setting_columns(keys), *columns], rows)


def _setting_columns(settings: Sequence[str]) -> list[str]:
    """Return the names of columns; settings are told apart from those that every table has."""
    own = ("run", "runs", "state", "epoch")
    return [f"config.{key}" if key in own else key for key in settings]


def _metric_columns(records: Sequence[RunRecord], metrics: Sequence[str]) -> list[str]:
    every = (
        record.metrics[key].by_column(key)
        for key in metrics
        for record in records
        if key in record.metrics
    )
    return list(dict.fromkeys(column for columns in every for column in columns))


def _settings(record: RunRecord, keys: Sequence[str]) -> list[Any]:
    own = results.settings_of(record)
    return [Cell(own[key], _written(own[key])) if key in own else None for key in keys]


def _position(number: int, total: int | None) -> Cell:
    return Cell(number, f"{number}/{total}" if total else str(number))


def metrics_of(records: Sequence[RunRecord], asked: Sequence[str]) -> list[str]:
    """Return the metrics asked for, or all that a run has; UsageError for one that no run has."""
    known = list(dict.fromkeys(metric for record in records for metric in record.metrics))
    for metric in asked:
        if metric not in known:
            raise UsageError(
                f"no run has the metric {metric!r}{did_you_mean(metric, known)} "
                f"(there are {', '.join(known) or 'none yet'})"
            )
    return list(asked) or known


def sorted_table(table: Table, column: str) -> Table:
    """Sort by a column (a metric's is its best), empty cells last; after a `-`, turned around."""
    columns, name = table.columns, column.removeprefix("-")
    found = [columns.index(key) for key in (name, f"{name} best") if key in columns]
    if not found:
        hint = did_you_mean(name, columns)
        raise UsageError(f"no column {name!r} to sort by{hint} ({', '.join(columns)})")

    def key(row: list[Any]) -> tuple[bool, Any]:
        value = _value(row[found[0]])
        value = value.mean if isinstance(value, Mean) else value
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return not is_number, value if is_number else _written(value)

    there = [row for row in table.rows if row[found[0]] is not None]
    others = [row for row in table.rows if row[found[0]] is None]
    return Table(columns, sorted(there, key=key, reverse=column.startswith("-")) + others)


def mean_of(values: Sequence[float]) -> Mean | None:
    """Return mean and standard deviation of some values; None if there are none."""
    if not values:
        return None
    std = statistics.stdev(values) if len(values) > 1 else None
    return Mean(statistics.fmean(values), std, len(values))


def _age(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


def as_text(table: Table) -> str:
    """Return lines of columns below each other, numbers to the right."""
    rows = [[printable(cell) for cell in row] for row in _shown(table)]
    widths = [max(map(_width, column)) for column in zip(*rows, strict=True)]
    right = _to_the_right(table)
    text = ""
    for row in rows:
        cells = []
        for cell, width, to_the_right in zip(row, widths, right, strict=True):
            blank = " " * (width - _width(cell))
            cells.append(blank + cell if to_the_right else cell + blank)
        text += "  ".join(cells).rstrip() + "\n"
    return text


def as_csv(table: Table) -> str:
    """Return CSV with all digits; a mean takes three columns."""
    plain = _without_means(table)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(plain.columns)
    for row in plain.rows:
        values = ["" if cell is None else _value(cell) for cell in row]
        # In a table, a text that begins like a formula would be one.
        is_formula = [isinstance(v, str) and v.startswith(("=", "+", "-", "@")) for v in values]
        cells = zip(values, is_formula, strict=True)
        writer.writerow([f"'{value}" if is_one else _written(value) for value, is_one in cells])
    return text.getvalue()


def as_markdown(table: Table) -> str:
    """Return a table of Markdown."""
    rules = ["---:" if to_the_right else "---" for to_the_right in _to_the_right(table)]
    head, *body = [[printable(cell.translate(MARKDOWN)) for cell in row] for row in _shown(table)]
    return "".join(f"| {' | '.join(row)} |\n" for row in [head, rules, *body])


def as_latex(table: Table) -> str:
    r"""Return a tabular for LaTeX; it needs `\usepackage{booktabs}`."""
    kinds = "".join("r" if to_the_right else "l" for to_the_right in _to_the_right(table))
    rows = [[printable(cell).translate(LATEX) for cell in row] for row in _shown(table)]
    head, *body = [" & ".join(row) + r" \\" for row in rows]
    lines = [rf"\begin{{tabular}}{{{kinds}}}", r"\toprule", head, r"\midrule", *body]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def as_json(table: Table, provenance: Mapping[str, Any]) -> str:
    """Return a mapping per row, with all digits, and where the table comes from."""
    plain = _without_means(table)
    rows = [dict(zip(plain.columns, map(_value, row), strict=True)) for row in plain.rows]
    content = json.loads(
        json.dumps({"rows": rows, "provenance": provenance}),
        parse_constant=lambda _: None,  # JSON knows no infinity
    )
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def _without_means(table: Table) -> Table:
    """Give mean, standard deviation and count columns of their own."""
    is_mean = [any(isinstance(cell, Mean) for cell in cells) for cells in _cells_of(table)]
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


def _value(cell: Any) -> Any:
    return cell.value if isinstance(cell, Cell) else cell


def _written(value: Any) -> str:
    """Return a value with all digits, as it can be typed."""
    # Most are short to write, and there are many.
    return str(value) if type(value) in (str, int, float) else show(value)


def _shown(table: Table) -> list[list[str]]:
    def text(cell: Any) -> str:
        if isinstance(cell, Mean):
            return mean_and_spread(cell)
        if isinstance(cell, Cell):
            return cell.text
        return "" if cell is None else f"{cell:.4g}" if isinstance(cell, float) else str(cell)

    return [table.columns, *([text(cell) for cell in row] for row in table.rows)]


def mean_and_spread(cell: Mean) -> str:
    """Write a mean with as many decimals as the two digits of its standard deviation have."""
    if not cell.std:
        spread = "" if cell.std is None else " ± 0"
        return f"{cell.mean:.4g}{spread} ({cell.num_runs})"
    decimals = 1 - math.floor(math.log10(cell.std))
    if not 0 <= decimals <= 8:
        return f"{cell.mean:.4g} ± {cell.std:.2g} ({cell.num_runs})"
    return f"{cell.mean:.{decimals}f} ± {cell.std:.{decimals}f} ({cell.num_runs})"


def _cells_of(table: Table) -> list[list[Any]]:
    """Return the cells with a value, by column."""
    places = range(len(table.columns))
    return [[row[i] for row in table.rows if row[i] is not None] for i in places]


def _to_the_right(table: Table) -> list[bool]:
    """Return which columns hold only numbers, that are shown as such."""

    def is_number(cell: Any) -> bool:
        is_plain = isinstance(cell, Cell) and cell.text == str(cell.value)
        return isinstance(cell.value if is_plain else cell, int | float | Mean)

    return [bool(cells) and all(map(is_number, cells)) for cells in _cells_of(table)]


def _width(text: str) -> int:
    if text.isascii():
        return len(text)
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1
        for c in text
    )


MARKDOWN = str.maketrans({"&": "&amp;", "<": "&lt;", **{c: f"\\{c}" for c in "\\|`*_[]"}})
LATEX = str.maketrans(
    {
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
)


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
    """Return the fingerprint of a run's data and what its numbers depend on besides packages."""
    try:
        stored = results.loop_state(record.path).get("fingerprint") or {}
    except (OSError, pickle.UnpicklingError):
        return {}
    return {key: stored[key] for key in ("data", "processor", "settings") if key in stored}


def _code(one: Path, other: Path) -> list[str]:
    """Return a unified diff of the source that two runs have used."""
    try:
        paths = [snapshot.code_of(folder) for folder in (one, other)]
        found = zip((one, other), paths, strict=True)
        if missing := [f"  {folder} has no code" for folder, path in found if path is None]:
            return missing
        codes = [snapshot.read(path) for path in paths if path]
    except UsageError as error:
        return [f"  {error}"]
    lines: list[str] = []
    for file in snapshot.differing(*codes):
        contents = [code.get(file, b"") for code in codes]
        try:
            texts = [content.decode().splitlines(keepends=True) for content in contents]
        except UnicodeDecodeError:
            lines.append(f"  {file}: not text, and not the same")
            continue
        first, second = (f"{path}/{file}" for path in paths)
        for line in difflib.unified_diff(texts[0], texts[1], first, second):
            lines += [line] if line.endswith("\n") else [line, "\\ No newline at end of file"]
    return lines
