"""Makes tables of runs, in many forms: a list, a comparison, the differences between two."""

import contextlib
import csv
import difflib
import io
import json
import math
import os
import pickle
import shutil
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Container, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from engine.runs import results, selection
from engine.runs.results import RunRecord
from engine.runs.selection import Cell, written
from vegab import UsageError, snapshot
from vegab.config import did_you_mean, differences, show
from vegab.execution import printable
from vegab.files import META

MOST_PAIRS = 25_000_000  # of lines that a diff compares
MOST_NAMES = 12  # of columns that are left out
RED, GREEN, YELLOW, CYAN, BOLD = 31, 32, 33, 36, 1  # as terminals number them
COLOURS = {"finished": GREEN, "running": CYAN, "interrupted": YELLOW, "failed": RED, "died": RED}


class Mean(NamedTuple):
    """Mean and standard deviation (n - 1; None of one value) of a metric over some runs."""

    mean: float
    std: float | None
    num_runs: int
    is_best: bool = False  # of its kind in the table, which says so in bold


class Best(float):
    """The best value of a metric in a table."""


class Table(NamedTuple):
    """Columns and rows; None is a cell without a value."""

    columns: list[str]
    rows: list[list[Any]]
    num_runs: int | None = None  # behind each mean, if they need not say so themselves
    metric: str = ""  # of all means, if no column says so


def listing(records: Sequence[RunRecord], columns: Sequence[str] = (), more: str = "") -> Table:
    """Return a line per run: its name, epoch, best metric and age; or these columns, and `more`."""
    known, rare = selection.known_to(records), selection.OFTEN_EMPTY
    own = selection.OWN.items()
    columns = columns or [n for n, get in own if n not in rare or any(map(get, records))]
    columns = list(dict.fromkeys(filter(None, ["run", *columns, more])))
    return Table(columns, _rows(records, columns, known))


def _rows(
    records: Sequence[RunRecord], columns: Sequence[str], known: Mapping[str, selection.Getter]
) -> list[list[Any]]:
    getters = [selection.find(known, name) for name in columns]
    return [[get(record) for get in getters] for record in records]


def comparison(records: Sequence[RunRecord], metrics: Sequence[str]) -> Table:
    """Return a row per run: the settings that differ, the best and last value of each metric."""
    known = selection.known_to(records)
    told = [name for name in ("tags", "note") if any(map(known[name], records))]
    settings = _setting_columns(known, results.differing_settings(records))
    columns = ["state", "epoch", *settings, *_metric_columns(records, metrics), *told]
    table = listing(records, columns)
    for place, name in enumerate(table.columns):
        values = [row[place] for row in table.rows if isinstance(row[place], float)]
        if len(values) > 1 and (metric := name.removesuffix(" best")) != name:
            is_lower = results.is_lower_better_in(records[0].config, metric)
            best = (min if is_lower else max)(values)
            for row in table.rows:
                row[place] = Best(best) if row[place] == best else row[place]
    return table


def grouped(records: Sequence[RunRecord], metrics: Sequence[str]) -> Table:
    """Return a row for all runs that differ only by seeds and folds; means are of finished ones."""
    known = selection.known_to(records)
    settings = _setting_columns(known, results.differing_settings(records, repetitions=False))
    columns = _metric_columns(records, metrics)
    groups = results.groups_of(records)
    rows = []
    for group, own in zip(groups, _rows([g[0] for g in groups], settings, known), strict=True):
        states = Counter(record.state for record in group)
        counted = [f"{number} {state}" for state, number in states.items()]
        shown = ", ".join(counted if len(states) > 1 else states)
        shown += "" if group[0].config else f": {group[0].path}"
        every = [results.values_of(record) for record in group if record.state == "finished"]
        means = (mean_of([values[key] for values in every if key in values]) for key in columns)
        rows.append([len(group), shown, *own, *means])
    return Table(["runs", "state", *settings, *columns], rows)


def for_paper(
    records: Sequence[RunRecord], asked: Sequence[str], rows: Sequence[str], by: str
) -> tuple[Table, list[str]]:
    """Return a row for each value of some settings, a column for each of another, in it the mean of
    metrics, by default of the test set or the monitor, over finished runs; and what is doubtful."""
    known = selection.known_to(records)
    metrics = selection.metrics_of(records, asked)
    if not asked:
        tested = [metric for metric in metrics if metric.startswith("test_")]
        metrics = tested or list(filter(None, [selection.main_monitor(records)]))
    records = [r for r in records if r.state == "finished" and {*metrics} & r.metrics.keys()]
    if not records:
        raise UsageError(f"no finished run has {' or '.join(metrics) or 'what --metric names'}")
    settings = _rows(records, [*rows, *([by] if by else [])], known)
    runs: dict[tuple[Any, ...], dict[Any, list[RunRecord]]] = {}  # by the row's and column's values
    for record, values in zip(records, settings, strict=True):
        own = tuple(map(_frozen, values))
        runs.setdefault(own[: len(rows)], {}).setdefault(own[-1] if by else None, []).append(record)
    lines = sorted(runs, key=lambda values: [*map(_order, values)])
    across = sorted({place for line in runs.values() for place in line}, key=_order)
    columns, body = list(rows), [[*line] for line in lines]
    for place in across:
        of_value = [f"{by}={text_of(place)}"] if by else []
        columns += [", ".join([m] * (len(metrics) > 1 or not by) + of_value) for m in metrics]
    cells: dict[tuple[Any, ...], Mean | None] = {}
    for metric in metrics:
        is_lower = results.is_lower_better_in(records[0].config, metric)
        means = {
            (line, place): mean_of([r.metrics[metric].best for r in group if metric in r.metrics])
            for line in lines
            for place, group in runs[line].items()
        }
        best = (min if is_lower else max)((mean.mean for mean in means.values() if mean), default=0)
        for place, mean in means.items():
            cells[(*place, metric)] = mean and mean._replace(is_best=mean.mean == best)
    for parts, line in zip(body, lines, strict=True):
        parts += [cells.get((line, place, metric)) for place in across for metric in metrics]
    numbers = {mean.num_runs for mean in cells.values() if mean}
    num_runs = numbers.pop() if len(numbers) == 1 else None
    alike = [group for line in runs.values() for group in line.values()]
    mixed = dict.fromkeys(k for group in alike for k in results.differing_settings(group, False))
    doubt = f"a mean is over runs that also differ by {', '.join(mixed)}"
    hint = "add that to --rows, --by or --where"
    told = metrics[0] if by and len(metrics) == 1 else ""
    return Table(columns, body, num_runs, told), [f"{doubt}; {hint}"] if mixed else []


def _frozen(cell: Any) -> Any:
    has_parts = isinstance(cell, Cell) and isinstance(cell.value, list | dict)
    return Cell(cell.text, cell.text) if has_parts else cell


def _setting_columns(known: Container[str], settings: Sequence[str]) -> list[str]:
    """Return the names of columns; settings are told apart from what else has their name."""
    return [f"config.{key}" if f"config.{key}" in known else key for key in settings]


def _metric_columns(records: Sequence[RunRecord], metrics: Sequence[str]) -> list[str]:
    known = {column for record in records for column in results.values_of(record)}
    every = [n for key in dict.fromkeys(metrics) for n in (key, f"{key} best", f"{key} last")]
    return [name for name in every if name in known]


def _place_of(table: Table, name: str) -> int:
    """Return where a column is; a metric's is its best. UsageError if there is none."""
    found = [table.columns.index(key) for key in (name, f"{name} best") if key in table.columns]
    if not found:
        hint = did_you_mean(name, table.columns)
        raise UsageError(f"no column {name!r}{hint} (there are {', '.join(table.columns)})")
    return found[0]


def picked(table: Table, names: Sequence[str]) -> Table:
    """Return the first column and those of some names."""
    places = dict.fromkeys([0, *(_place_of(table, name) for name in names)])
    rows = [[row[place] for place in places] for row in table.rows]
    return table._replace(columns=[table.columns[place] for place in places], rows=rows)


def sorted_table(table: Table, column: str) -> Table:
    """Sort by a column (a metric's is its best), empty cells last; after a `-`, turned around."""
    if not column:
        return table
    place = _place_of(table, column.removeprefix("-"))
    there = [row for row in table.rows if row[place] is not None]
    others = [row for row in table.rows if row[place] is None]
    there.sort(key=lambda row: _order(row[place]), reverse=column.startswith("-"))
    return table._replace(rows=there + others)


def _order(cell: Any) -> tuple[int, Any]:
    """Return what puts numbers before texts, these as people do, and nothing last."""
    value = cell.mean if isinstance(cell, Mean) else _value(cell)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return 0, value
    return (2, 0) if value is None else (1, results.naturally(written(value)))


def mean_of(values: Sequence[float]) -> Mean | None:
    """Return mean and standard deviation of some values; None if there are none."""
    if not values:
        return None
    std = statistics.stdev(values) if len(values) > 1 else None
    return Mean(statistics.fmean(values), std, len(values))


def as_text(table: Table, width: int = 0, has_colours: bool = False) -> str:
    """Return aligned columns; those that tell least are left out until the lines fit into a
    `width`, if any. States have colours, if wanted, and what is best is bold."""
    columns = [*zip(*_shown(table), strict=True)]
    widths = [max(map(_width, column)) for column in columns]
    alike = [max(Counter(column[1:]).values(), default=0) for column in columns]

    def dullness(place: int) -> tuple[Any, ...]:
        name, most, has_names = table.columns[place], alike[place], "run" in table.columns
        is_mean = any(isinstance(row[place], Mean) for row in table.rows)
        # Without these, nobody could tell rows that stand for several runs apart, or see a failure.
        if most < len(table.rows) and (name == "state" or not (has_names or is_mean)):
            return (False,)
        is_minor = name.endswith(" last") + (f"val_{name}" in table.columns)
        return 2 * most > len(table.rows), is_minor, most, place

    room, kept = width - widths[0] if width else math.inf, {0}
    for place in sorted(range(1, len(columns)), key=dullness):
        if widths[place] + 2 <= room:
            kept.add(place)
            room -= widths[place] + 2
    padded = []
    for column, wide, to_the_right in zip(columns, widths, _to_the_right(table), strict=True):
        pairs = [(cell, " " * (wide - _width(cell))) for cell in column]
        padded.append([blank + cell if to_the_right else cell + blank for cell, blank in pairs])
    for place, name in enumerate(table.columns if has_colours else ()):
        for line, row in enumerate(table.rows, start=1):
            cell, text = row[place], padded[place][line]
            is_best = isinstance(cell, Best) or (isinstance(cell, Mean) and cell.is_best)
            code = COLOURS.get(text.strip()) if name == "state" else BOLD if is_best else None
            padded[place][line] = f"\x1b[{code}m{text}\x1b[0m" if code else text
    rows = zip(*padded, strict=True)
    lines = ["  ".join(row[place] for place in sorted(kept)).rstrip() for row in rows]
    lines += [note] if (note := _note_of(table)) else []
    if left_out := [name for place, name in enumerate(table.columns) if place not in kept]:
        more = len(left_out) - MOST_NAMES
        few = [*left_out[:MOST_NAMES], f"{more} more"] if more > 0 else left_out
        what = f"left out, because the terminal is {width} wide: {', '.join(few)}"
        lines.append(printable(f"{what}; name columns in --columns, or see all with | less -S"))
    return "\n".join(lines) + "\n"


def for_terminal(table: Table, is_whole: bool = False) -> str:
    """Return the text as stdout shows it: within its width, unless it is to be whole, and with
    colours, unless NO_COLOR is set; a file or a pipe has all of it, plain."""
    if not sys.stdout.isatty():
        return as_text(table)
    width = 0 if is_whole else shutil.get_terminal_size().columns
    return as_text(table, width, has_colours=not os.environ.get("NO_COLOR"))


def _note_of(table: Table) -> str:
    n = table.num_runs or 0
    means = f"mean ± standard deviation (n - 1) over {n} runs" if n > 1 else ""
    return printable(": ".join(filter(None, [table.metric, means])))


def as_csv(table: Table) -> str:
    """Return CSV with all digits; a mean takes three columns."""

    def safe(cell: Any) -> str:
        value = "" if cell is None else _value(cell)
        # In a table, a text that begins like a formula would be one.
        is_formula = isinstance(value, str) and value.startswith(("=", "+", "-", "@"))
        return f"'{value}" if is_formula else written(value)

    plain = _without_means(table)
    text = io.StringIO()
    rows = [plain.columns, *([*map(safe, row)] for row in plain.rows)]
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def as_markdown(table: Table) -> str:
    """Return a table of Markdown."""
    rules = ["---:" if to_the_right else "---" for to_the_right in _to_the_right(table)]
    head, *body = _shown(table, lambda text: printable(text.translate(MARKDOWN)), "**{}**")
    lines = "".join(f"| {' | '.join(row)} |\n" for row in [head, rules, *body])
    return lines + (f"\n{note.translate(MARKDOWN)}\n" if (note := _note_of(table)) else "")


def as_latex(table: Table) -> str:
    r"""Return a tabular for LaTeX; it needs `\usepackage{booktabs}`."""
    kinds = "".join("r" if to_the_right else "l" for to_the_right in _to_the_right(table))
    rows = _shown(table, lambda text: printable(text).translate(LATEX), r"\textbf{{{}}}")
    head, *body = [" & ".join(row) + r" \\" for row in rows]
    lines = [rf"\begin{{tabular}}{{{kinds}}}", r"\toprule", head, r"\midrule", *body]
    note = [f"% {note}"] if (note := _note_of(table)) else []
    return "\n".join([*note, *lines, r"\bottomrule", r"\end{tabular}", ""])


def as_json(table: Table, provenance: Mapping[str, Any]) -> str:
    """Return a mapping per row, with all digits, and where the table comes from."""
    plain = _without_means(table)
    rows = [dict(zip(plain.columns, map(_value, row), strict=True)) for row in plain.rows]
    text = json.dumps({"rows": rows, "provenance": provenance})
    content = json.loads(text, parse_constant=lambda _: None)  # JSON knows no infinity
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def _without_means(table: Table) -> Table:
    """Give mean, standard deviation and count columns of their own."""
    is_mean = [any(isinstance(cell, Mean) for cell in cells) for cells in _cells_of(table)]
    told = f"{table.metric}, " * bool(table.metric)
    columns, rows = list[str](), list[list[Any]]()
    for name, wide in zip(table.columns, is_mean, strict=True):
        columns += [f"{told}{name} {part}" for part in ("mean", "std", "count")] if wide else [name]
    for row in table.rows:
        cells: list[Any] = []
        for cell, wide in zip(row, is_mean, strict=True):
            cells += (list(cell[:3]) if cell else [None, None, 0]) if wide else [cell]
        rows.append(cells)
    return Table(columns, rows)


def _value(cell: Any) -> Any:
    return cell.value if isinstance(cell, Cell) else float(cell) if isinstance(cell, Best) else cell


def text_of(cell: Any) -> str:
    """Return a cell as a table shows it."""
    if isinstance(cell, Cell):
        return cell.text
    return "" if cell is None else f"{cell:.4g}" if isinstance(cell, float) else str(cell)


def _shown(
    table: Table, escape: Callable[[str], str] = printable, bold: str = "{}"
) -> list[list[str]]:
    """Return the columns' names and the cells as text."""

    def shown(cell: Any) -> str:
        if not isinstance(cell, Mean):
            return escape(text_of(cell))
        text = escape(mean_and_spread(cell, has_number=table.num_runs is None))
        return bold.format(text) if cell.is_best else text

    return [[*map(escape, table.columns)], *([*map(shown, row)] for row in table.rows)]


def mean_and_spread(cell: Mean, has_number: bool = True) -> str:
    """Write a mean with as many decimals as two digits of its deviation have, and of how many."""
    number = f" ({cell.num_runs})" * has_number
    if not cell.std:
        return f"{cell.mean:.4g}{'' if cell.std is None else ' ± 0'}{number}"
    decimals = 1 - math.floor(math.log10(cell.std))
    if not 0 <= decimals <= 8:
        return f"{cell.mean:.4g} ± {cell.std:.2g}{number}"
    return f"{cell.mean:.{decimals}f} ± {cell.std:.{decimals}f}{number}"


def _cells_of(table: Table) -> list[list[Any]]:
    """Return the cells with a value, by column."""
    return [[row[i] for row in table.rows if row[i] is not None] for i in range(len(table.columns))]


def _to_the_right(table: Table) -> list[bool]:
    """Return which columns hold only numbers, that are shown as such."""

    def is_number(cell: Any) -> bool:
        is_plain = isinstance(cell, Cell) and cell.text == str(cell.value)
        return isinstance(cell.value if is_plain else cell, int | float | Mean)

    return [bool(cells) and all(map(is_number, cells)) for cells in _cells_of(table)]


def _width(text: str) -> int:
    if text.isascii():
        return len(text)
    from tqdm.utils import disp_len  # which knows of wide letters

    return disp_len(text)


MARKDOWN = str.maketrans({"&": "&amp;", "<": "&lt;", **{c: f"\\{c}" for c in "\\|`*_[]"}})
WORDS = {"\\": "backslash", "~": "asciitilde", "^": "asciicircum", "|": "bar"}
WORDS |= {"<": "less", ">": "greater"}
LATEX = str.maketrans(
    {c: rf"\text{word}{{}}" for c, word in WORDS.items()}
    | {c: f"\\{c}" for c in "&%$#_{}"}
    # A row that begins with one of these would be read as an argument of the command before it.
    | {c: f"{{{c}}}" for c in "[*"}
    | {"±": r"$\pm$", '"': r"{\ttfamily\char34}"}
)


def difference(one: RunRecord, other: RunRecord) -> str:
    """Return what differs between two runs: config, command, environment, data and code."""
    first, second = _told(one), _told(other)
    lines = [f"--- {one.path}", f"+++ {other.path}"]
    for name in (*first, "code"):
        if name == "code":
            found = _code(Path(one.path), Path(other.path))
        elif name == "config" and not (one.config and other.config):
            found = [f"  {problem}" for problem in results.problems_of([one, other])]
        else:
            changes = sorted(differences(first[name], second[name]).items())
            found = [f"  {key}: {show(old)} -> {show(new)}" for key, (old, new) in changes]
        lines += ["", f"{name}: {'the same' if not found else ''}".rstrip(), *found]
    # A tab in code is a tab: the patch is to be applied.
    shown = ["\t".join(map(printable, line.rstrip("\n").split("\t"))) for line in lines]
    return "\n".join(shown) + "\n"


def _told(record: RunRecord) -> dict[str, dict[str, Any]]:
    """Return what a run says of itself, besides its code."""
    meta: dict[str, Any] = {}
    stored: dict[str, Any] = {}
    with contextlib.suppress(UsageError):
        meta = results.mapping_in(record.path, META)
    with contextlib.suppress(OSError, pickle.UnpicklingError):
        stored = results.loop_state(record.path).get("fingerprint") or {}
    surroundings = ("python", "host", "platform", "cpu", "gpus", "environment")
    return {
        "config": record.config,
        "command": {"command": record.command},
        "packages": meta.get("packages") or {},
        "environment": {key: meta[key] for key in surroundings if key in meta},
        "data": {key: stored[key] for key in ("data", "processor", "settings") if key in stored},
    }


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
    room = MOST_PAIRS
    for file in snapshot.differing(*codes):
        contents = [code.get(file, b"") for code in codes]
        try:
            texts = [content.decode().splitlines(keepends=True) for content in contents]
        except UnicodeDecodeError:
            lines.append(f"  {file}: not text, and not the same")
            continue
        room -= len(texts[0]) * len(texts[1])  # as long it may take
        if room < 0:
            lines.append(f"  {file}: too long to be shown line by line, and not the same")
            continue
        first, second = (f"{path}/{file}" for path in paths)
        for line in difflib.unified_diff(texts[0], texts[1], first, second):
            lines += [line] if line.endswith("\n") else [line, "\\ No newline at end of file"]
    return lines
