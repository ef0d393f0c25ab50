#!/usr/bin/env python
"""Look at run folders: list them, compare them, show how two differ, add notes and tags.

python bin/runs.py compare results/a 'results/lr_*' --sort=val_loss"""

import sys  # PYTHON_ARGCOMPLETE_OK
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import vegab
from engine.runs import comparison, results, selection
from vegab.command_line import argh  # which says what to do if it is missing
from vegab.execution import print_line, printable

FORMS = {"csv": comparison.as_csv, "markdown": comparison.as_markdown, "latex": comparison.as_latex}
CLEAR = "\x1b[H\x1b[2J"
SORT = "sort by this column; --sort=-COLUMN: in reverse order"


@argh.named("list")
@selection.selects
@argh.arg("--sort", metavar="COLUMN", help=SORT)
@argh.arg("--watch", help="show the list again every two seconds, until Ctrl-C")
def list_runs(
    *patterns: str,
    where: str = "",
    columns: str = "",
    best: int = 0,
    sort: str = "",
    watch: bool = False,
) -> None:
    """Print a line per run: its state, epoch, best metric and age."""
    asked = selection.columns_in(columns)
    while True:
        records, problems = selection.chosen(patterns, where, best)
        table = comparison.listing(records, asked, sort.removeprefix("-"))
        text = comparison.for_terminal(comparison.sorted_table(table, sort), bool(asked))
        print(CLEAR * (watch and sys.stdout.isatty()) + text, end="", flush=True)
        if not watch:
            return results.tell(problems)
        time.sleep(2)


@selection.selects
@argh.arg("--metric", action="append", metavar="NAME", help="this metric only; may be repeated")
@argh.arg("--group", help="one row for runs that differ only by seed or fold: mean ± std (count)")
@argh.arg("--rows", metavar="SETTINGS", help="for a paper: a row per value of these, as a,b")
@argh.arg("--by", metavar="SETTING", help="with --rows: a column for each value of this setting")
@argh.arg("--sort", metavar="COLUMN", help=SORT)
@argh.arg("--format", choices=("table", *FORMS, "json"), help="form of the table")
@argh.arg("-o", "--output", metavar="FILE", help="write it to FILE, and its runs to FILE.json")
def compare(
    *patterns: str,
    where: str = "",
    columns: str = "",
    best: int = 0,
    metric: Sequence[str] | None = None,
    group: bool = False,
    rows: str = "",
    by: str = "",
    sort: str = "",
    format: str = "table",
    output: str = "",
) -> None:
    """Print the settings that differ, and the best and the last value of each metric."""
    if output:
        results.require_writable(output)
    if (by and not rows) or (rows and group):
        raise vegab.UsageError("--by goes with --rows, and --rows does not go with --group")
    asked = selection.columns_in(columns)
    is_grouped, first = group or bool(rows), metric[0] if metric else None
    records, problems = selection.chosen(patterns, where, best, first, is_grouped)
    metrics = selection.metrics_of(records, metric or [])
    doubts: list[str] = []
    if rows:
        table, doubts = comparison.for_paper(records, metric or [], selection.columns_in(rows), by)
    elif group:
        table = comparison.grouped(records, metrics)
    elif asked:
        table = comparison.listing(records, asked, sort.removeprefix("-"))
    else:
        table = comparison.comparison(records, metrics)
    table = comparison.sorted_table(table, sort)
    if asked and is_grouped:
        table = comparison.picked(table, asked)
    provenance = results.provenance_of(records)
    if format == "json":
        text = comparison.as_json(table, provenance)
    elif format == "table":
        text = comparison.as_text(table) if output else comparison.for_terminal(table, bool(asked))
    else:
        text = FORMS[format](table)
    if format != "table" and sys.stdout.isatty() and not output:
        text = "\n".join(map(printable, text.split("\n")))
    if output:
        content = text.encode(errors="backslashreplace")
        results.write_with_provenance(Path(output), content, provenance)
    else:
        print(text, end="")
    results.tell(problems, [*results.problems_of(records), *doubts])


@argh.arg("one", metavar="RUN", help="a run folder")
@argh.arg("other", metavar="OTHER", help="the run folder to compare it with")
def diff(one: str, other: str) -> None:
    """Print what differs between two runs: config, command, packages, machine, data, code."""
    records = [the_run(one), the_run(other)]
    print(comparison.difference(*records), end="")
    results.tell([], results.problems_of(records))


@argh.arg("run", metavar="RUN", help="a run folder")
@argh.arg("text", metavar="TEXT", help="the note; '' removes the one that is there")
def note(run: str, text: str) -> None:
    """Write a note on a run; `list`, `compare` and the report show it."""
    record = the_run(run)
    results.write_notes(record, text, record.tags)
    print_line(f"{record.path}: {text}" if text else f"{record.path} has no note now")


@argh.arg("run", metavar="RUN", help="a run folder, a folder of runs, or a pattern")
@argh.arg("tags", nargs="*", metavar="TAG", help="words to find the runs by: --where tag=TAG")
@argh.arg("--remove", action="append", metavar="TAG", help="remove this tag; may be repeated")
def tag(run: str, *tags: str, remove: Sequence[str] | None = None) -> None:
    """Give runs tags; `list`, `compare` and the report show them and filter by them."""
    if unfit := [word for word in tags if not word or "," in word or word.split() != [word]]:
        raise vegab.UsageError(f"{unfit[0]!r} cannot be a tag: it is one word, without a comma")
    for record in results.runs_matching([run])[0]:
        every = dict.fromkeys([*record.tags, *tags])
        kept = [word for word in every if word not in (remove or ())]
        if kept != record.tags:
            results.write_notes(record, record.note, kept)
        print_line(f"{record.path}: {', '.join(kept) or 'no tags'}")


def the_run(name: str) -> results.RunRecord:
    """Return the only run of a name; UsageError if it holds several."""
    found, _ = results.runs_matching([name])
    if len(found) > 1:
        raise vegab.UsageError(f"{name} holds {len(found)} runs; name one of them")
    return found[0]


if __name__ == "__main__":
    vegab.wrap_commands(list_runs, compare, diff, note, tag)
