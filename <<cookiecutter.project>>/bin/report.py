#!/usr/bin/env python
"""Write a report on run folders: one page with their table, curves, settings and examples.

python bin/report.py results 'other/lr_*' -o report.html"""

import contextlib  # PYTHON_ARGCOMPLETE_OK
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import vegab
from engine.runs import report as page
from engine.runs import results, selection
from vegab.command_line import argh  # which says what to do if it is missing


@selection.selects
@argh.arg("-o", "--output", metavar="FILE", help="the page, which needs no network")
def report(
    *patterns: str, where: str = "", columns: str = "", best: int = 0, output: str = "report.html"
) -> None:
    """Write the page."""
    results.require_writable(output)
    records, problems = selection.chosen(patterns, where, best)
    asked, sweep = selection.columns_in(columns), None
    with contextlib.suppress(vegab.UsageError):  # a project may be without this room
        from engine.sweeps import sweep_of

        sweep = sweep_of(records)
    size = page.write_report(records, Path(output), problems, sweep, asked)
    print(f"{output}: {len(records)} run{'s' * (len(records) > 1)}, {size / 1e6:.2f} MB")
    results.tell(problems)


if __name__ == "__main__":
    vegab.wrap_commands(report)
