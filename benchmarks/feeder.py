"""How fast the feeder of TFRecords is beside a `tf.data` pipeline written by hand.

    python benchmarks/feeder.py                 # all rows; writes benchmarks/feeder.txt
    python benchmarks/feeder.py rate            # some rows; writes nothing
    python benchmarks/feeder.py --gigabytes 4   # a larger set for the row `memory`

Records of 32x32x3 bytes and a label lie in files that the benchmark makes in a temporary folder,
which is removed. Rates come from two processes, one for each side, that draw batches by turns for
some seconds each after a warm-up, so that whatever else the machine does meets both. Ours shuffles
globally and draws as the training loop does for steps that take long: one thread makes the next
batch ahead, as tensors.
The other side shuffles in a window of 10,000 and prefetches. Both compare each record's CRC, and
whoever takes the batches does nothing with them. Peaks of memory are those of a new process each,
after one pass and more.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from loop import heading, print_and_keep, spread

ROOT = Path(__file__).resolve().parent.parent
PROJECT = ROOT / "<<cookiecutter.project>>"
SHAPE = (32, 32, 3)
BYTES = 32 * 32 * 3
FILES = 8
BATCH = 128
WARM_UP = 2.0  # seconds


# --------------------------------------------------------------------------------- the two sides


def ours(folder: str) -> Iterator[int]:
    """Draw as `Steps` does one by one; yields the number of examples of each batch."""
    import numpy as np
    import tensorflow as tf

    from engine.records.features import Decoded
    from engine.records.feeders import TFRecordExamplesFeeder

    class Raw(Decoded):
        """An array as its bytes."""

        def decode(self, contents: Any, num_parallel: int) -> Any:
            return tf.reshape(tf.io.decode_raw(contents, tf.uint8), [-1, *SHAPE])

    feeder = TFRecordExamplesFeeder(
        f"{folder}/*.tfrecord",
        features_map={"image": Raw()},
        labels_map={"label": {"type": "FixedLenFeature", "shape": [], "dtype": "int64"}},
        batch_size=BATCH,
    )
    if not feeder.random_access:
        raise RuntimeError("the files have no index, so that the shuffle would not be global")

    def tensors(step: int) -> Any:
        batch = feeder.batch(*divmod(step, feeder.steps_per_epoch))
        return tf.nest.map_structure(lambda array: tf.convert_to_tensor(array[np.newaxis]), batch)

    with ThreadPoolExecutor(max_workers=1) as executor:
        ahead = executor.submit(tensors, 0)
        for step in itertools.count(1):
            ahead.result()
            ahead = executor.submit(tensors, step)
            yield BATCH


def by_hand(folder: str) -> Iterator[int]:
    """Draw from a pipeline such as its documentation recommends."""
    import tensorflow as tf

    spec = {
        "image": tf.io.FixedLenFeature([], tf.string),
        "label": tf.io.FixedLenFeature([], tf.int64),
    }

    def parse(serialized: Any) -> Any:
        parsed = tf.io.parse_example(serialized, spec)
        images = tf.reshape(tf.io.decode_raw(parsed["image"], tf.uint8), [-1, *SHAPE])
        return {"image": images}, {"label": parsed["label"]}

    dataset = (
        tf.data.Dataset.list_files(f"{folder}/*.tfrecord", shuffle=True)
        .interleave(
            tf.data.TFRecordDataset,
            cycle_length=FILES,
            num_parallel_calls=tf.data.AUTOTUNE,
            deterministic=False,
        )
        .shuffle(10_000)
        .repeat()
        .batch(BATCH)
        .map(parse, num_parallel_calls=tf.data.AUTOTUNE, deterministic=False)
        .prefetch(tf.data.AUTOTUNE)
    )
    for _ in dataset:
        yield BATCH


SIDES = {"ours": ours, "by_hand": by_hand}


def side(name: str, folder: str) -> None:
    """In the process of a side: draw for as long as each line of the input says."""
    sys.path.insert(0, str(PROJECT))
    batches = SIDES[name](folder)
    for line in sys.stdin:
        order = json.loads(line)
        examples, start = 0, time.perf_counter()
        for number in batches:
            examples += number
            seconds = time.perf_counter() - start
            if seconds >= order["seconds"] and examples >= order["examples"]:
                break
        peak = next(int(row.split()[1]) for row in open("/proc/self/status") if "VmHWM" in row)  # noqa: SIM115
        print(json.dumps({"rate": examples / seconds, "peak": peak / 1024}), flush=True)


class Side:
    """A process that draws batches when told to."""

    def __init__(self, name: str, folder: Path) -> None:
        environment = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1"}
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--side", name, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            text=True,
        )

    def draw(self, seconds: float = 0, examples: int = 0) -> dict[str, float]:
        """Draw for so many seconds at least, and so many examples; return rate and peak memory."""
        assert self.process.stdin and self.process.stdout
        print(json.dumps({"seconds": seconds, "examples": examples}), file=self.process.stdin)
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"a side ended with {self.process.wait()}")
        return json.loads(answer)

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.communicate()


# -------------------------------------------------------------------------------------- the rows


def make(folder: Path, records: int) -> None:
    """Write records with random images, and metadata and index beside them."""
    import numpy as np

    from engine.records.files import generate, write_records

    def examples(seed: int, number: int) -> Iterator[bytes]:
        generator = np.random.default_rng(seed)
        for _ in range(number):
            yield example(generator.bytes(BYTES), int(generator.integers(10)))

    folder.mkdir()
    paths = [folder / f"{number}-of-{FILES}.tfrecord" for number in range(FILES)]
    for number, path in enumerate(paths):
        write_records(path, examples(number, records // FILES))
    generate(paths)


def example(image: bytes, label: int) -> bytes:
    """Return a serialized `tf.train.Example`, without the seconds that its own classes take."""

    def field(number: int, content: bytes) -> bytes:
        size, length = b"", len(content)
        while length > 127:
            size, length = size + bytes([length & 127 | 128]), length >> 7
        return bytes([number << 3 | 2]) + size + bytes([length]) + content

    def feature(name: bytes, kind: int, values: bytes) -> bytes:
        return field(1, field(1, name) + field(2, field(kind, values)))

    values = feature(b"image", 1, field(1, image)) + feature(b"label", 3, field(1, bytes([label])))
    return field(1, values)


def rate(folder: Path, args: argparse.Namespace) -> str:
    """Examples per second, ours over the other's."""
    make(folder, args.records)
    sides = [Side("ours", folder), Side("by_hand", folder)]
    rates: list[list[float]] = [[], []]
    try:
        for one in sides:
            one.draw(WARM_UP, args.records)
        for pair in range(args.pairs):
            # Who comes first changes from pair to pair.
            for number in (0, 1) if pair % 2 else (1, 0):
                rates[number].append(sides[number].draw(args.seconds)["rate"])
    finally:
        for one in sides:
            one.close()
    ratios = [mine / other for mine, other in zip(*rates, strict=True)]
    said = "reached" if statistics.median(ratios) >= 1 else "NOT REACHED"
    medians = " : ".join(f"{statistics.median(side):,.0f}" for side in rates)
    return (
        f"{args.records:,} records of 32x32x3 bytes in {FILES} files, batch {BATCH}, examples/s: "
        "the feeder, shuffling globally / tf.data, shuffling in a window of 10,000\n"
        f"    {spread(ratios)}, {args.pairs} pairs  >= 1.0: {said}  [{medians} examples/s]"
    )


def memory(folder: Path, args: argparse.Namespace) -> str:
    """Peak of memory on a large set, ours less the other's."""
    records = int(args.gigabytes * 1e9) // (BYTES + 60) // FILES * FILES
    size = records * (BYTES + 100)
    if shutil.disk_usage(folder.parent).free < 2 * size:
        return f"memory\n    not measured: {folder.parent} has less than {2 * size:,} bytes free"
    small, large = folder / "small", folder / "large"
    folder.mkdir()
    make(small, args.records)
    make(large, records)
    peaks: dict[tuple[str, str], list[float]] = {}
    for _ in range(args.processes):
        for name in SIDES:
            for which, number in (("small", args.records), ("large", records)):
                one = Side(name, folder / which)
                try:
                    peak = one.draw(0, number + 20 * BATCH)["peak"]
                finally:
                    one.close()
                peaks.setdefault((name, which), []).append(peak)
    differences = [
        mine - other
        for mine, other in zip(peaks["ours", "large"], peaks["by_hand", "large"], strict=True)
    ]
    said = "reached" if statistics.median(differences) <= 300 else "NOT REACHED"
    medians = {key: statistics.median(values) for key, values in peaks.items()}
    return (
        f"{args.gigabytes:g} GB in {records:,} such records, peak of memory, MB: "
        "the feeder - tf.data\n"
        f"    {spread(differences)}, {args.processes} pairs  <= 300: {said}  "
        f"[{medians['ours', 'large']:.0f} : {medians['by_hand', 'large']:.0f} MB; with "
        f"{args.records:,} records {medians['ours', 'small']:.0f} : "
        f"{medians['by_hand', 'small']:.0f} MB]"
    )


ROWS = {"rate": rate, "memory": memory}


def main() -> None:
    """Measure rows, print them, and keep them beside this file if they are all."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("rows", nargs="*", help=f"{', '.join(ROWS)}; none: all")
    parser.add_argument("--pairs", type=int, default=9, help="of the row `rate`")
    parser.add_argument("--seconds", type=float, default=3.0, help="that a side draws at a time")
    parser.add_argument("--records", type=int, default=50_000)
    parser.add_argument("--gigabytes", type=float, default=2.0, help="of the row `memory`")
    parser.add_argument("--processes", type=int, default=3, help="of each side, for `memory`")
    args = parser.parse_args()

    def measured(name: str) -> str:
        with tempfile.TemporaryDirectory() as folder:
            return ROWS[name](Path(folder, name), args)

    head = heading(
        ("tensorflow", "tensorflow-cpu", "google-crc32c"), "the files were in the system's cache"
    )
    rows = {name: functools.partial(measured, name) for name in ROWS}
    print_and_keep(parser, args.rows, rows, head, "feeder")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--side"]:
        side(*sys.argv[2:])
    else:
        sys.path.insert(0, str(PROJECT))
        main()
