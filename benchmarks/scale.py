"""The constants that docs/scale.md of a project estimates with.

python benchmarks/scale.py              # all rows; writes benchmarks/scale.txt
python benchmarks/scale.py checkpoint   # some rows; writes nothing
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from loop import PROJECT, heading, large_model, print_and_keep

sys.path.insert(0, str(PROJECT))

TIMES = 5


def median_of(function: Callable[[], object], times: int = TIMES) -> float:
    """Return the seconds that a function takes."""
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def checkpoint(folder: Path) -> str:
    """What one checkpoint takes, of 26 million weights with Adam's two moments."""
    import keras

    from engine.checkpoints.checkpoint import RESTORE_ALL, Checkpoint, verify
    from engine.training.session import new_run

    model = large_model({}, (8, 8, 1), 10)
    model.compile("adam", "sparse_categorical_crossentropy")
    model.optimizer.build(model.trainable_variables)
    checkpoint = Checkpoint(folder, model)
    checkpoint.prepare()
    snapshots, writes = [], []
    for _ in range(TIMES):
        start = time.perf_counter()
        taken = checkpoint.snapshot(new_run())
        copied = time.perf_counter()
        checkpoint.commit(taken)
        checkpoint.wait()
        snapshots.append(copied - start)
        writes.append(time.perf_counter() - copied)
    path = folder / "model.h5"
    size = path.stat().st_size
    weights = sum(int(keras.ops.size(weight)) for weight in model.weights)

    def read() -> None:
        verify(path)
        checkpoint.read()
        checkpoint.restore(RESTORE_ALL)

    reading = median_of(read)
    checkpoint.close()
    return (
        f"checkpoint of {weights / 1e6:.1f} million float32 weights with Adam: "
        f"{size / 1e6:.0f} MB, {size / weights:.1f} bytes a weight\n"
        f"    taken from the model in {statistics.median(snapshots):.3f} s; "
        f"hashed, written and synced in {statistics.median(writes):.2f} s "
        f"({size / statistics.median(writes) / 1e6:,.0f} MB/s); "
        f"checked and read back in {reading:.2f} s ({size / reading / 1e6:,.0f} MB/s)"
    )


def run_folder(folder: Path) -> str:
    """What a run of the digits leaves on the disk."""
    run = folder / "run"
    command = [sys.executable, "bin/train.py", "digits", str(run), "--num_epochs=3"]
    subprocess.run(command, cwd=PROJECT, check=True, capture_output=True)
    files = [path for path in run.rglob("*") if path.is_file()]
    sizes = {path: path.stat().st_size for path in files}
    checkpoints = [path for path in files if path.suffix == ".h5"]
    rest = [path for path in files if path not in {run / "code.zip", *checkpoints}]
    return (
        f"run folder of the digits: {len(files)} files\n"
        f"    code.zip, {sizes[run / 'code.zip'] / 1e3:.0f} kB; {len(checkpoints)} checkpoints; "
        f"{len(rest)} others, {sum(sizes[p] for p in rest) / 1e3:.0f} kB"
    )


def history(folder: Path) -> str:
    """What reading and keeping a long history takes."""
    from engine.checkpoints.history import HistoryArray, csv_lines
    from engine.runs.results import read_history

    columns = ("learning_rate", "loss", "accuracy", "val_loss", "val_accuracy")
    rows: list[dict[str, float]] = [
        {"epoch": i, "step": 40 * i} | dict.fromkeys(columns, 0.1234567 + i) for i in range(100_000)
    ]
    (folder / "history.csv").write_text(csv_lines(["epoch", "step", *columns], rows))
    reading = median_of(lambda: read_history(folder), 3)
    array = HistoryArray()
    array.follow(rows)
    return (
        f"history of 100,000 epochs: {(folder / 'history.csv').stat().st_size / 1e6:.1f} MB of "
        f"text, read in {reading:.2f} s; {array.values.nbytes / len(rows):.0f} bytes a row in "
        "each checkpoint"
    )


def index(folder: Path) -> str:
    """What the index of TFRecord files takes."""
    from engine.records import files as tfrecords

    paths = [folder / f"{number}.tfrecord" for number in range(4)]
    for path in paths:
        tfrecords.write_records(path, (os.urandom(3_100) for _ in range(100_000)))
    size, records = sum(path.stat().st_size for path in paths), 400_000
    start = time.perf_counter()
    tfrecords.generate(paths)
    making = time.perf_counter() - start
    bytes_ = (folder / tfrecords.INDEX).stat().st_size
    code = (
        "import sys, time; from pathlib import Path; "
        "from engine.records import files as tfrecords; "
        "start = time.perf_counter(); "
        "[tfrecords.read_index(Path(name)) for name in sys.argv[1:]]; "
        "print(time.perf_counter() - start)"
    )
    command = [sys.executable, "-c", code, *map(str, paths)]
    read = functools.partial(
        subprocess.run, command, cwd=PROJECT, check=True, capture_output=True, text=True
    )
    seconds = statistics.median(float(read().stdout) for _ in range(TIMES))
    return (
        f"index of {records:,} records of 3.1 kB: {bytes_ / records:.1f} bytes a record, read in "
        f"{seconds * 1e9 / records:.0f} ns a record; "
        f"made in {making:.1f} s ({size / making / 1e6:,.0f} MB/s, checksums included)"
    )


ROWS = {"checkpoint": checkpoint, "run_folder": run_folder, "history": history, "index": index}


def main() -> None:
    """Measure rows, print them, and keep them beside this file if they are all."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("rows", nargs="*", help=f"{', '.join(ROWS)}; none: all")
    args = parser.parse_args()

    def measured(name: str) -> str:
        with tempfile.TemporaryDirectory() as folder:
            return ROWS[name](Path(folder))

    head = heading(("tensorflow", "tensorflow-cpu", "keras"))
    rows = {name: functools.partial(measured, name) for name in ROWS}
    print_and_keep(parser, args.rows, rows, head, "scale")


if __name__ == "__main__":
    main()
