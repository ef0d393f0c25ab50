#!/usr/bin/env python
"""Make TFRecord files and their metadata, check them, and show what is in them."""

import fnmatch  # PYTHON_ARGCOMPLETE_OK
import functools
import os
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import vegab
from engine.records import MetadataError, images
from engine.records import files as tfrecords
from engine.runs import comparison
from vegab.command_line import argh  # which says what to do if it is missing
from vegab.execution import one_line, say

PATTERNS = "files, or patterns in quotes such as 'data/toy/*'"


@argh.arg("patterns", nargs="+", metavar="PATTERN", help=PATTERNS)
@argh.arg("--force", help="make all entries again")
@argh.arg("--compression", choices=tfrecords.COMPRESSIONS, help="'': by a file's first bytes")
def generate_metadata(*patterns: str, force: bool = False, compression: str = "") -> None:
    """Count the records of files; write the counts and an index of offsets next to the files."""
    paths = matching(patterns)
    print(f"{len(paths)} files matched")
    done = tfrecords.generate(paths, force, compression, bar("files"))
    print(f"{len(done.made)} made, {len(done.kept)} kept, {len(done.problems)} skipped")
    for problem in done.problems.values():
        say(f"skipped: {problem}")
    if done.problems:
        sys.exit(1)


@argh.arg("patterns", nargs="+", metavar="PATTERN", help=PATTERNS)
@argh.arg("--deep", help="also compare MD5 sums, for which files are read to their end")
def validate(*patterns: str, deep: bool = False) -> None:
    """Compare files with their metadata: are they there, and of the same size?"""
    bad = 0
    paths = matching(patterns, listed=True)
    for path in bar("files")(paths):
        try:
            tfrecords.file_info(path, deep)
        except (MetadataError, OSError) as error:
            say(f"bad: {one_line(error)}")
            bad += 1
    print(f"{len(paths)} files, {bad} of them bad")
    if bad:
        sys.exit(1)


@argh.arg("patterns", nargs="+", metavar="PATTERN", help=PATTERNS)
def total_examples(*patterns: str) -> None:
    """Print how many records the files have in all, by their metadata."""
    paths = matching(patterns, listed=True)
    print(sum(tfrecords.file_info(path).total_records for path in paths))


@argh.arg("file", metavar="FILE", help="a file of Examples, compressed or not")
def inspect(file: str) -> None:
    """Show the features in a file's first record: name, type, and number of values."""
    from engine.records import features  # with TensorFlow

    path = Path(file)
    if not path.is_file():
        raise vegab.UsageError(f"there is no file {file}")
    if path.name in tfrecords.COMPANIONS:
        raise vegab.UsageError(f"{file} holds no records; give a file next to it")
    for offset, data in tfrecords.read_all(path, tfrecords.compression_of(path)):
        try:
            held = sorted(features.held_in(data).items())
        except ValueError as error:
            raise tfrecords.RecordError(path, offset, "is not a tf.train.Example") from error
        rows = [[name, dtype or "none", str(len(values))] for name, (dtype, values) in held]
        print(comparison.as_text(comparison.Table(["feature", "type", "values"], rows)), end="")
        break


@argh.arg("folder", metavar="FOLDER", help="a folder with a subfolder of pictures per label")
@argh.arg("out", metavar="OUT", help="the folder to make")
@argh.arg("--shards", metavar="N", help="number of training files; 0: one per 100 MB or so")
@argh.arg("--split", metavar="SHARE", help="share of the pictures to put aside for validation")
def from_images(folder: str, out: str, *, shards: int = 0, split: float = 0.0) -> None:
    """Make records of pictures (JPEG, PNG, GIF, BMP) that lie in a subfolder for each label."""
    source, output = Path(folder), Path(out)
    if not source.is_dir():
        raise vegab.UsageError(f"there is no folder {folder}")
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        raise vegab.UsageError(f"{out} already exists; name a folder that is new or empty")
    if source.resolve() in (output.resolve(), *output.resolve().parents):
        raise vegab.UsageError(f"{out} lies in {folder}, and would become a label the next time")
    if not 0 <= split < 1:
        raise vegab.UsageError(f"--split={split}: expected a share of at least 0 and below 1")
    try:
        pictures, labels = images.pictures_of(source)
        splits = images.split_and_shuffle(pictures, split)
    except images.PictureError as error:
        raise vegab.UsageError(str(error)) from error
    numbers = {name: images.number_of_shards(entry) for name, entry in splits.items()}
    if not 0 <= shards <= len(splits["train"]):
        most = len(splits["train"])
        raise vegab.UsageError(f"--shards={shards}: expected 1 to {most}, or 0 to go by the size")
    if shards:
        numbers = {"train": shards, "validation": max(1, round(shards * split))}
    # Ended by a signal, it leaves nothing half written behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    images.write_pictures(output, splits, labels, numbers, bar("pictures"))
    for name, entry in splits.items():
        print(f"{name}: {len(entry)} pictures in {name}-*-of-{numbers[name]:05}")
    if others := sorted(each.name for each in source.glob("[!.]*") if each.is_file()):
        say(f"{folder}: {len(others)} files without a label, such as {others[0]}, are left out")
    print(f"{len(labels)} labels in {tfrecords.LABELS}; all in {output}")


def matching(patterns: Sequence[str], listed: bool = False) -> list[Path]:
    """Return the files that patterns mean; if `listed`, also those gone that the metadata has."""
    found: set[Path] = set()
    for pattern in patterns:
        hits, files = tfrecords.matching(pattern)
        for folder in {path.parent for path in (*files, Path(pattern))} if listed else ():
            names = fnmatch.filter(tfrecords.read_metadata(folder), Path(pattern).name)
            files |= {folder / name for name in names}
        # A shell that has expanded a pattern names folders and companions, too.
        if not files and (len(patterns) == 1 or not hits):
            hint = f"; name the files in it, as in '{pattern}/*'" if Path(pattern).is_dir() else ""
            raise vegab.UsageError(f"no file matches {pattern}{hint}")
        found |= files
    if not found:
        raise vegab.UsageError("none of these is a file of records")
    return sorted(found)


def bar(unit: str) -> Callable[[Any], Iterable[Any]]:
    """Return what shows on a terminal how far one has gone through a list."""
    from tqdm import tqdm

    return functools.partial(tqdm, unit=f" {unit}", disable=None, leave=False, dynamic_ncols=True)


def main() -> NoReturn:
    """Run the command that the command line names."""
    # TensorFlow only unpacks here: it needs no GPU, and nothing that it would tell of itself.
    quiet = {"TF_CPP_MIN_LOG_LEVEL": "3", "TF_ENABLE_ONEDNN_OPTS": "0"}
    os.environ |= {"CUDA_VISIBLE_DEVICES": "-1", **quiet}
    commands = generate_metadata, validate, total_examples, inspect, from_images
    vegab.wrap_commands(*commands, explained=(OSError, MetadataError, images.PictureError))


if __name__ == "__main__":
    main()
