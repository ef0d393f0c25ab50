#!/usr/bin/env python
"""Draw curves of run folders: one panel per metric, seeds as their mean with a band.

python bin/plot.py results/a 'results/lr_*' --metric=val_loss -o results/val_loss.pdf"""

import sys  # PYTHON_ARGCOMPLETE_OK
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import vegab
from engine.runs import curves, results, selection
from vegab.command_line import argh  # which says what to do if it is missing
from vegab.execution import print_line

COLUMN = "a column of history.csv; may be repeated; without it, what the runs monitor"
SMOOTH = "weight of a moving average, in [0, 1); the raw curve is drawn underneath"
OUTPUT = ".png, .pdf or .svg; without it, METRIC.png here; FILE.json, next to it, names the runs"


@selection.selects
@argh.arg("--metric", action="append", metavar="NAME", help=COLUMN)
@argh.arg("--x", choices=("epoch", "step"), help="what the x axis shows")
@argh.arg("--log_x", help="make the x axis logarithmic")
@argh.arg("--log_y", help="make the y axis logarithmic; values of 0 and below leave gaps")
@argh.arg("--linear_y", help="keep the y axis linear, even if values span a factor of 100")
@argh.arg("--smooth", metavar="WEIGHT", help=SMOOTH)
@argh.arg("-o", "--output", metavar="FILE", help=OUTPUT)
def plot(
    *patterns: str,
    where: str = "",
    columns: str = "",
    best: int = 0,
    metric: Sequence[str] | None = None,
    x: str = "epoch",
    log_x: bool = False,
    log_y: bool = False,
    linear_y: bool = False,
    smooth: float = 0.0,
    output: str = "",
) -> None:
    """Draw curves of runs; runs that differ only by seed or fold as mean ± standard deviation."""
    if not 0 <= smooth < 1:
        raise vegab.UsageError(f"--smooth={smooth:g} is not a weight in [0, 1), such as 0.6")
    if output:
        results.require_writable(output, *curves.FORMATS)
    first = metric[0] if metric else None
    records, without_run = selection.chosen(patterns, where, best, first, by_group=True)
    drawn, problems = curves.curves_of(records, metric or [], x, log_y)
    name = ", ".join(drawn)
    if not output:
        output = "".join("_" if c in '/\\:*?"<>|\0' else c for c in "-".join(drawn)) + ".png"
        results.require_writable(output)
    scale = False if linear_y else log_y or None
    figure = curves.draw(drawn, records, x, log_x, scale, smooth, selection.columns_in(columns))
    shown = {path for some in drawn.values() for path in some}
    provenance = results.provenance_of([record for record in records if record.path in shown])
    picture = curves.content_of(figure, Path(output).suffix.lower(), name, provenance)
    results.write_with_provenance(Path(output), picture, provenance)
    number = f"{len(shown)} run{'s' * (len(shown) > 1)}"
    print_line(f"{name} of {number}: {output}, {output}.json")
    results.tell(without_run, problems)


if __name__ == "__main__":
    vegab.wrap_commands(plot)
