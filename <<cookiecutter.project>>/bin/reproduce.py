#!/usr/bin/env python
"""Reproduce a run from nothing but its folder, and compare history and weights bit for bit.

python bin/reproduce.py results/run"""

import shutil  # PYTHON_ARGCOMPLETE_OK
import signal
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import vegab
from engine import checkpoints, endings
from engine.runs import reproduction
from vegab.execution import print_line
from vegab.exits import INTERRUPTED, REFUSED


def reproduce(run: str, *, epochs: int = 0) -> None:
    """Reproduce the run in folder RUN with its own code, and compare history and weights.

    Args:
        run: a run folder
        epochs: train and compare only the first N epochs; 0: all that the run has"""
    original = reproduction.Original(Path(run), epochs)
    done, attempts = len(original.state["history"]), len(original.meta["attempts"])
    is_dirty = bool((original.meta.get("git") or {}).get("dirty"))
    commit = (original.commit or "unknown")[:7] + ", with uncommitted changes" * is_dirty
    epochs_done = f"{len(original.rows)} of {done} epochs"
    tries = f"{attempts} attempt{'s' * (attempts > 1)}"
    print_line(f"{run}: {original.status}, {epochs_done}, {tries}, commit {commit}")
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)  # they end it as Ctrl-C does
    place = Path(tempfile.mkdtemp(prefix="reproduce-"))
    is_kept = False
    try:
        is_kept = not is_identical(original, place)
    finally:
        if not is_kept:
            shutil.rmtree(place, ignore_errors=True)
    if is_kept:
        print_line(f"kept to look at: {place} (run/ is the run, code/ what ran)")
        raise SystemExit(1)


def is_identical(original: reproduction.Original, place: Path) -> bool:
    """Make the run again in a new folder, and print how it compares."""
    from tqdm import tqdm

    for line in reproduction.restore(original, place):
        print_line(line)
    before = reproduction.causes(original, None)
    print_line(reproduction.line_of(before, "packages, Python and processor"))
    again = place / "run"
    is_hidden = not sys.stderr.isatty()
    with tqdm(total=len(original.rows), unit="epoch", leave=False, disable=is_hidden) as bar:
        code = reproduction.run_again(original, place, lambda done: bar.update(done - bar.n))
    reason = endings.ending(code, (place / "output.txt").read_text(errors="replace"))
    if code == REFUSED:
        raise vegab.UsageError(f"{original.folder} cannot be run here: {reason}")
    if line := reproduction.surroundings(original, again):
        print_line(line)
    found = reproduction.causes(original, again)
    fails = code not in (0, INTERRUPTED)
    # A run that failed then may fail again, past all that is compared.
    if fails and (original.is_whole or len(checkpoints.rows_in(again)) < len(original.rows)):
        print_line(f"different: here it fails: {reason}")
    else:
        result = reproduction.compare(original, again)
        if result.difference is None:
            print_line(f"identical bit for bit: {', '.join(result.compared)}")
            if result.left_out:
                print_line(result.left_out)
            return True
        where, then, now = result.difference
        print_line(f"different: {where}: {then} in {original.folder}, {now} when run again")
        edited = reproduction.edited_cell(original)
        found = [edited, *found] if edited else found or [NOTHING]
    for index, cause in enumerate(found):
        print_line(f"differs too: {cause}" if index else f"likely cause: {cause}")
    return False


NOTHING = (
    "nothing of the environment differs: something draws random numbers that the seed does not "
    "decide, or goes by the clock; bin/check_resume.py looks for it"
)

if __name__ == "__main__":
    vegab.wrap_no_config_registry(reproduce)
