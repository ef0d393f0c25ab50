# PYTHON_ARGCOMPLETE_OK
"""Look at run folders: list them, compare them, show how two differ.

python bin/runs.py compare results/a 'results/lr_*' --sort=val_loss
"""

import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import vegab
from engine.runs import comparison, results
from vegab.command_line import argh  # which tells what to do where it is not installed

FORMS = {
    "table": comparison.as_text,
    "csv": comparison.as_csv,
    "markdown": comparison.as_markdown,
    "latex": comparison.as_latex,
}
SECONDS_BETWEEN = 2.0


@argh.named("list")
@argh.arg("patterns", nargs="+", metavar="PATTERN", help=results.PATTERNS)
@argh.arg("--sort", metavar="COLUMN", help="by this column; --sort=-COLUMN: the other way round")
@argh.arg("--watch", help="show it again every two seconds, until Ctrl-C")
def list_runs(*patterns: str, sort: str = "", watch: bool = False) -> None:
    """Print a line a run: its state, how far it is, how good, how old."""
    if sort:  # a mistyped column is refused before anything is read
        comparison.sorted_table(comparison.listing([]), sort)
    while True:
        records, problems = results.runs_matching(patterns)
        table = comparison.listing(records)
        if sort:
            table = comparison.sorted_table(table, sort)
        clear = "\x1b[H\x1b[2J" if watch and sys.stdout.isatty() else ""
        print(clear + comparison.as_text(table), end="", flush=True)
        if not watch:
            break
        results.tell([], problems)
        time.sleep(SECONDS_BETWEEN)
    results.tell(problems)


@argh.arg("patterns", nargs="+", metavar="PATTERN", help=results.PATTERNS)
@argh.arg("--metric", action="append", metavar="NAME", help="this metric only; may be repeated")
@argh.arg("--group", help="a row for runs that differ only by seeds and folds: mean ± std (count)")
@argh.arg("--sort", metavar="COLUMN", help="by this column; --sort=-COLUMN: the other way round")
@argh.arg("--format", choices=(*FORMS, "json"), help="of the table")
@argh.arg("-o", "--output", metavar="FILE", help="write it to a file, and FILE.json with its runs")
def compare(
    *patterns: str,
    metric: Sequence[str] | None = None,
    group: bool = False,
    sort: str = "",
    format: str = "table",
    output: str = "",
) -> None:
    """Print the settings that differ, and the best and the last value of each metric."""
    if output:
        results.require_writable(output)
    records, problems = results.runs_matching(patterns)
    metrics = comparison.metrics_of(records, metric or [])
    make = comparison.grouped if group else comparison.comparison
    table = make(records, metrics)
    if sort:
        table = comparison.sorted_table(table, sort)
    provenance = results.provenance_of(records)
    text = FORMS[format](table) if format in FORMS else comparison.as_json(table, provenance)
    if output:
        content = text.encode(errors="backslashreplace")
        results.write_with_provenance(Path(output), content, provenance)
    else:
        print(text, end="")
    results.tell(problems, problems_of(records))


@argh.arg("one", metavar="RUN", help="a run folder")
@argh.arg("other", metavar="OTHER", help="the run folder to compare it with")
def diff(one: str, other: str) -> None:
    """Print what differs between two runs: config, command, packages, machine, data, code."""
    records: list[results.RunRecord] = []
    for name in (one, other):
        found, _ = results.runs_matching([name])
        if len(found) > 1:
            raise vegab.UsageError(f"{name} holds {len(found)} runs; name one of them")
        records += found
    print(comparison.difference(*records), end="")
    results.tell([], problems_of(records))


def problems_of(records: Sequence[results.RunRecord]) -> list[str]:
    """Return a sentence for each run that cannot be read in full."""
    return [f"{record.path}: {record.problem}" for record in records if record.problem]


if __name__ == "__main__":
    vegab.wrap_commands(list_runs, compare, diff)
