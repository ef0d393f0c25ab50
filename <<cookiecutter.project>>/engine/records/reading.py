"""Reads records from files in the order that the seed decides."""

import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, count, islice
from pathlib import Path
from typing import NamedTuple

import google_crc32c
import numpy as np

from engine.batches import SHUFFLE_STREAM, Array, random_generator
from engine.records import files as tfrecords

Record = tuple[bytes, int, int]  # content, number of the file, number in the file
MOST_OPEN = 64  # files; a process may often have no more than 256


class Records(NamedTuple):
    """Records to be parsed together. Tuples for each would keep the garbage collector busy."""

    data: list[bytes]
    files: list[int]
    numbers: list[int]

    @classmethod
    def of(cls, records: Iterable[Record]) -> "Records":
        """Return records that come one by one."""
        columns = map(list, zip(*records, strict=True))
        return cls(next(columns, []), next(columns, []), next(columns, []))


class Indexed:
    """Reads records of uncompressed files by their numbers among all; threads may share it."""

    def __init__(self, paths: list[Path], indexes: list[Array], counts: list[int]) -> None:
        self.counts, self._paths = counts, paths
        self._ends = np.cumsum(counts)
        self._firsts = self._ends - counts
        # One array for all files: where records begin, with each file's end after its last one.
        self._offsets = np.concatenate(indexes)
        self._places = np.cumsum([0, *(len(index) for index in indexes[:-1])])
        self._descriptors: OrderedDict[int, int] = OrderedDict()
        # A descriptor that another thread closes might come back as that of another file.
        self._lock = threading.Lock()
        weakref.finalize(self, lambda opened: [*map(os.close, opened.values())], self._descriptors)

    def read(self, rows: Array) -> Records:
        """Return records by their numbers. Raises RecordError if one is corrupt."""
        files = np.searchsorted(self._ends, rows, side="right")
        numbers = rows - self._firsts[files]
        places = self._places[files] + numbers
        starts = self._offsets[places]
        sizes = (self._offsets[places + 1] - starts).tolist()
        starts, names = starts.tolist(), files.tolist()
        with self._lock:
            frames = [
                os.pread(self._descriptors.get(file) or self._opened(file), size, start)
                for file, size, start in zip(names, sizes, starts, strict=True)
            ]
        data = [frame[tfrecords.HEADER.size : -tfrecords.FOOTER.size] for frame in frames]
        if not _are_sound(frames, data, sizes):  # who does not ask all at once can say why
            for file, *of_frame in zip(names, starts, sizes, frames, strict=True):
                tfrecords.require_sound(self._paths[file], *of_frame)
        return Records(data, names, numbers.tolist())

    def read_one(self, row: int) -> Record:
        """Return a record by its number."""
        (data,), (file,), (number,) = self.read(np.array([row]))
        return data, file, number

    def _opened(self, file: int) -> int:
        if len(self._descriptors) >= MOST_OPEN:
            os.close(self._descriptors.popitem(last=False)[1])
        descriptor = os.open(self._paths[file], os.O_RDONLY | os.O_CLOEXEC)
        self._descriptors[file] = descriptor
        return descriptor


def _are_sound(frames: list[bytes], data: list[bytes], sizes: list[int]) -> bool:
    """Return whether all records are whole. To compare CRCs all at once takes half the time."""
    if not all(
        len(frame) == size and frame.startswith(tfrecords.header(size - tfrecords.FRAME))
        for frame, size in zip(frames, sizes, strict=True)
    ):
        return False
    stored = np.frombuffer(b"".join([frame[-tfrecords.FOOTER.size :] for frame in frames]), "<u4")
    found = np.array([google_crc32c.value(part) for part in data], np.uint64)
    return bool((tfrecords.masked(found) == stored).all())


@dataclass
class Stream:
    """Records in the order of their files, or shuffled in a window."""

    paths: list[Path]
    counts: list[int]  # how many records of each file belong to the data
    compression: str
    window: int  # records to choose from
    side_by_side: int  # files read at a time, one record from each in turn
    seed: int | None  # of the order; None: that of the files

    def __post_init__(self) -> None:
        self.total = sum(self.counts)
        self._at: int | None = None
        self._iterator: Iterator[Record] = iter(())

    def read(self, first: int, last: int) -> Records:
        """Return the records from one position in the endless stream to another."""
        if self._at != first:
            number, place = divmod(first, self.total)
            seed = self.seed
            each = (self.once() if seed is None else self._shuffled(seed, n) for n in count(number))
            self._iterator = islice(chain.from_iterable(each), place, None)
        self._at = None  # where it stands after an error is not known
        records = Records.of(islice(self._iterator, last - first))
        self._at = last
        return records

    def once(self) -> Iterator[Record]:
        """Give the records of all files, one file after the other."""
        for file in range(len(self.paths)):
            yield from self._of_file(file)

    def _shuffled(self, seed: int, number: int) -> Iterator[Record]:
        generator = random_generator(seed, number, SHUFFLE_STREAM)
        records = self._side_by_side(generator.permutation(len(self.paths)).tolist())
        window = list(islice(records, self.window))
        places: list[int] = []
        for record in records:
            if not places:  # numbers drawn one by one take longer than records to read
                places = generator.integers(self.window, size=1024).tolist()
            place = places.pop()
            yield window[place]
            window[place] = record
        yield from (window[place] for place in generator.permutation(len(window)).tolist())

    def _side_by_side(self, files: list[int]) -> Iterator[Record]:
        waiting = iter([file for file in files if self.counts[file]])
        # Where a file ends, the next one that waits takes its place.
        reading = [
            chain(self._of_file(file), chain.from_iterable(map(self._of_file, waiting)))
            for file in islice(waiting, self.side_by_side)
        ]
        while reading:
            still = []
            for records in reading:
                if (record := next(records, None)) is not None:
                    yield record
                    still.append(records)
            reading = still

    def _of_file(self, file: int) -> Iterator[Record]:
        path, most = self.paths[file], self.counts[file]
        number = 0
        for _, data in islice(tfrecords.read_all(path, self.compression), most):
            yield data, file, number
            number += 1
        if number < most:
            what = f"{path} ends after {number} records, but its metadata says {most} or more"
            command = tfrecords.generate_command(path)
            raise tfrecords.MetadataError(f"{what}; if the file is right, type: {command}")
