"""Batch sources over TFRecord files and over what is in memory.

A feeder is an endless stream: one pass over the examples after the other, each in an order of its
own, cut into batches. Batches cross the ends of passes: 8 examples in batches of 6 are 7 batches
in 5 passes. The batch at a step of an epoch is a function of the seed and of that position alone,
so there is no state to save.
"""

import copy
import glob
import hashlib
import logging
import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple, Self

import google_crc32c
import numpy as np

from src.batches import SHUFFLE_STREAM, Array, random_generator, require_at_least
from src.features import Parser, described, first_line, make_features, names_in, stored
from src.layouts import Layouts
from src.tfrecords import (
    FOOTER,
    FRAME,
    HEADER,
    INDEX,
    LABELS,
    METADATA,
    MetadataError,
    RecordError,
    RecordFile,
    file_info,
    generate,
    generate_command,
    header,
    masked,
    read_all,
    read_index,
)

log = logging.getLogger(__name__)

Record = tuple[int, int, bytes]  # number of the file, number in the file, content
COMPRESSIONS = ("", "GZIP", "ZLIB")
# Features that a record may be without are looked for in so many.
LOOKED_AT = 1000
MOST_OPEN = 64  # files, beside those that others have open


class Records(NamedTuple):
    """Records to be parsed together, as three lists of one length.

    A tuple for each record would keep Python's garbage collector busy.

    Attributes:
        data: their contents.
        files: the numbers of their files.
        numbers: their numbers in the file, from 0.
    """

    data: list[bytes]
    files: list[int]
    numbers: list[int]

    @classmethod
    def of(cls, records: Iterable[Record]) -> "Records":
        """Return records that come one by one."""
        listed = list(records)
        return cls(
            [data for _, _, data in listed],
            [file for file, _, _ in listed],
            [number for _, number, _ in listed],
        )


class Feeder:
    """Batches of examples that are counted from 0, in an order that seed and pass decide.

    Args:
        num_examples: in one pass.
        batch_size: examples a batch, from 1 to `num_examples`.
        drop_remainder: leave out a batch at the end that is not full.
        shuffle: give every pass an order of its own.
        seed: orders are functions of it, at least 0.

    Attributes:
        until_epochs: passes over the data; there is nothing after them, so that the last batch may
            be smaller. None: it never ends.

    Raises:
        ValueError: if batch size or seed is out of range.
    """

    until_epochs: int | None = None

    def __init__(
        self, num_examples: int, batch_size: int, drop_remainder: bool, shuffle: bool, seed: int
    ) -> None:
        require_at_least(1, batch_size=batch_size)
        require_at_least(0, seed=seed)
        if batch_size > num_examples:
            raise ValueError(f"batch_size is {batch_size}, but there are {num_examples} examples")
        self.num_examples = num_examples
        self.batch_size = batch_size
        self.drop_remainder = drop_remainder
        self.shuffle = shuffle
        self.seed = seed
        self._orders: dict[int, Array] = {}

    def __len__(self) -> int:
        """Return the number of examples."""
        return self.num_examples

    @property
    def steps_per_epoch(self) -> int:
        """Number of batches in an epoch, which may be a little more or less than one pass."""
        return self.total_steps(1)

    def total_steps(self, epochs: int) -> int:
        """Return the number of batches in so many passes."""
        full, rest = divmod(epochs * self.num_examples, self.batch_size)
        return full + (1 if rest and not self.drop_remainder else 0)

    def batch(self, epoch: int, step: int) -> Any:
        """Return the batch at `step` of `epoch`, both counted from 0.

        Raises:
            IndexError: if the epoch has no such step, or it is after `until_epochs`.
        """
        if epoch < 0 or not 0 <= step < self.steps_per_epoch:
            raise IndexError(
                f"step {step} of epoch {epoch}; an epoch has {self.steps_per_epoch} steps"
            )
        number = epoch * self.steps_per_epoch + step
        first = number * self.batch_size
        last = first + self.batch_size
        if self.until_epochs is not None:
            if number >= self.total_steps(self.until_epochs):
                raise IndexError(
                    f"step {step} of epoch {epoch} is after {self.until_epochs} passes over "
                    f"{self.num_examples} examples"
                )
            last = min(last, self.until_epochs * self.num_examples)
        return self._examples(first, last)

    def one_pass(self) -> "OnePass":
        """Return the batches of one pass in order, for an evaluation; the last may be smaller."""
        return OnePass(self._in_order())

    def digest(self) -> str:
        """Return a SHA-256 (hex) of what the batches depend on."""
        raise NotImplementedError

    def _in_order(self) -> Self:
        feeder = copy.copy(self)
        feeder.shuffle, feeder.drop_remainder = False, False
        feeder.until_epochs = 1
        feeder._orders = {}
        return feeder

    def _examples(self, first: int, last: int) -> Any:
        """Return the batch from one position in the stream to another."""
        raise NotImplementedError

    def _rows(self, first: int, last: int) -> Array:
        """Return which examples stand there: int64, shape (last - first,)."""
        number, place = divmod(first, self.num_examples)
        rows = self._order(number)[place : place + last - first]
        while len(rows) < last - first:
            number += 1
            rows = np.append(rows, self._order(number)[: last - first - len(rows)])
        return rows

    def _order(self, number: int) -> Array:
        """Return the examples in the order of a pass."""
        order = self._orders.get(number)
        if order is None:
            if self.shuffle:
                generator = random_generator(self.seed, number, SHUFFLE_STREAM)
                order = generator.permutation(self.num_examples)
            else:
                order = np.arange(self.num_examples)
            # A batch meets two passes at most; the ones before them have had their day.
            kept = {n: other for n, other in self._orders.items() if n == number - 1}
            self._orders = kept | {number: order}
        return order

    def _options(self) -> str:
        return f"{self.num_examples} {self.batch_size} {self.drop_remainder} {self.shuffle}" + (
            f" {self.seed}" if self.shuffle else ""
        )


class OnePass:
    """One pass over a feeder's examples, in order: a batch source that is alike in every epoch."""

    def __init__(self, feeder: Feeder) -> None:
        self._feeder = feeder

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self._feeder)

    @property
    def steps_per_epoch(self) -> int:
        """Number of batches, the last and perhaps smaller one included."""
        return self._feeder.steps_per_epoch

    def batch(self, epoch: int, step: int) -> Any:
        """Return the batch at `step`, counted from 0.

        Raises:
            IndexError: if there is no such step.
        """
        return self._feeder.batch(0, step)

    def digest(self) -> str:
        """Return a SHA-256 (hex) of what the batches depend on."""
        return self._feeder.digest()


class Serving(NamedTuple):
    """How an exported model reads records, which have no labels then.

    Attributes:
        spec: names and features of `tf.io`, as `tf.io.parse_example` takes them.
        parse: a function of serialized examples, a tensor of strings of shape (batch,), that
            returns the features as dense tensors; for use in a `tf.function`.
    """

    spec: dict[str, Any]
    parse: Any


class TFRecordExamplesFeeder(Feeder):
    """Batches of `tf.train.Example`s in TFRecord files.

    With an index of the records beside the files, any record is at hand at once: each pass is
    shuffled as a whole, and a run goes on at any step without reading what was before. Without one,
    or where files are compressed, records are read as a stream: several files side by side,
    shuffled in a window, and a run goes on by reading the pass again up to where it was. Each
    record's checksum is looked at. Both give the same batches in every process.

    Batches are dicts of arrays; with `labels_map`, pairs of such dicts. Strings are arrays of
    `bytes` objects, shape (batch, ...). What has no fixed length (VarLenFeature, RaggedFeature,
    SparseFeature) is padded with zeros or empty strings to the longest of the batch.

    Args:
        file_patterns: a glob, or several; the files of all of them, sorted.
        features_map: names and features: `{type: FixedLenFeature, shape: [1], dtype: int64}`, also
            with `module_path` and `class_type` for `type`, or features of TensorFlow. Beside
            those of `tf.io` there are `ImageFeature` and `RawFeature` of `src.features`.
        labels_map: the same for labels, or None. A name may stand in both maps.
        max_examples: take so many from the start of the files; -1: all.
        batch_size: examples a batch.
        drop_remainder: leave out a batch at the end that is not full.
        shuffle: give every pass an order of its own.
        shuffle_buffer_size: records in the window, where they are read as a stream.
        num_parallel_maps: images decoded at a time; None: one for each core.
        num_parallel_reads: files read side by side, where they are read as a stream and shuffled;
            the order depends on it.
        prefetch: batches whose records a thread reads ahead, while others are parsed, which helps
            where the disk is slow; None: none, as the training loop makes a batch ahead anyway.
        auto_generate_meta: write metadata and index where they are missing or outdated.
        compression: "", "GZIP" or "ZLIB".
        on_corrupt: "fail", or "skip": the place of a corrupt record is taken by the next sound
            one in the files (in a stream, where the rest of a file is lost with it, by sound ones
            from the start of the files at the end of the pass), so that batches stay full.
            `one_pass()` leaves corrupt records out instead; it reads all records once for that.
        seed: orders are functions of it.

    Attributes:
        random_access: whether there is an index.

    Raises:
        FileNotFoundError: if a pattern matches no file.
        MetadataError: if metadata are missing or outdated; it says what to run.
        ValueError: if a value is out of range, a type of feature cannot be found, or the records
            do not hold what the maps say.
        RecordError: if a record is corrupt; `batch` raises it too.
    """

    def __init__(
        self,
        file_patterns: str | Path | Sequence[str | Path],
        features_map: Mapping[str, Any],
        labels_map: Mapping[str, Any] | None = None,
        max_examples: int = -1,
        batch_size: int = 128,
        drop_remainder: bool = False,
        shuffle: bool = True,
        shuffle_buffer_size: int = 10000,
        num_parallel_maps: int | None = None,
        num_parallel_reads: int = 32,
        prefetch: int | None = None,
        auto_generate_meta: bool = False,
        compression: str | None = "",
        on_corrupt: str = "fail",
        seed: int = 0,
    ) -> None:
        require_at_least(
            1,
            shuffle_buffer_size=shuffle_buffer_size,
            num_parallel_reads=num_parallel_reads,
            num_parallel_maps=1 if num_parallel_maps is None else num_parallel_maps,
        )
        require_at_least(0, prefetch=prefetch or 0)
        compression = (compression or "").upper()
        if compression not in COMPRESSIONS:
            raise ValueError(f"compression is {compression!r}; expected '', GZIP or ZLIB")
        if on_corrupt not in ("fail", "skip"):
            raise ValueError(f"on_corrupt is {on_corrupt!r}; expected fail or skip")
        self.paths = matching_files(file_patterns)
        features = make_features(features_map, "features_map")
        labels = make_features(labels_map, "labels_map") if labels_map is not None else None
        if auto_generate_meta:
            _generate_missing(self.paths, compression)
        self._infos = [file_info(path) for path in self.paths]
        totals = [info.total_records for info in self._infos]
        if max_examples == 0 or max_examples < -1:
            raise ValueError(f"max_examples is {max_examples}; expected -1 (all) or at least 1")
        if max_examples > sum(totals):
            raise ValueError(
                f"max_examples is {max_examples}, but {self._named()} hold {sum(totals)}"
            )
        num_examples = sum(totals) if max_examples == -1 else max_examples
        before = np.cumsum([0, *totals[:-1]])
        counts = np.clip(num_examples - before, 0, totals).tolist()
        super().__init__(num_examples, batch_size, drop_remainder, shuffle, seed)
        self.max_examples = max_examples
        self.on_corrupt = on_corrupt
        self.compression = compression
        self._parser = Parser(features, labels, num_parallel_maps or os.cpu_count() or 1)
        self._parse = self._compiled()
        self._layouts: Layouts | None = None
        self._corrupt: set[tuple[Path, int]] = set()
        self.prefetch = prefetch or 0
        self._ahead = _Ahead(self._records)
        self._sound: Array | None = None  # of one pass that leaves corrupt records out
        indexes = [None if compression else read_index(path) for path in self.paths]
        found = [index for index in indexes if index is not None]
        self.random_access = len(found) == len(self.paths)
        self._indexed = _Indexed(self.paths, found, counts) if self.random_access else None
        self._stream = _Stream(
            self.paths,
            counts,
            compression,
            window=min(shuffle_buffer_size, num_examples),
            side_by_side=num_parallel_reads,
            seed=seed if shuffle else None,
            on_corrupt=self._seen_corrupt,
        )
        self._log_access()
        self._check_records()
        # The first record was parsed by TensorFlow, so that what it finds fault with was seen.
        self._layouts = self._parser.layouts()

    @property
    def corrupt_records(self) -> int:
        """How many corrupt records were met so far, where they are skipped."""
        return len(self._corrupt)

    def serving_features(self) -> Serving:
        """Return how an exported model reads records: as this feeder does, but without labels."""
        parser = Parser(self._parser.features, None, self._parser.num_parallel)
        return Serving(stored(parser.features), parser.parse)

    def digest(self) -> str:
        """Return a SHA-256 (hex) of the files' metadata and the options; reads no records."""
        lines = [f"{path.name} {info}" for path, info in zip(self.paths, self._infos, strict=True)]
        lines += [self._options(), self.compression, self.on_corrupt, str(self.max_examples)]
        lines += [described(self._parser.features), described(self._parser.labels)]
        lines += [str(self.random_access)]
        if not self.random_access and self.shuffle:
            lines += [f"{self._stream.window} {self._stream.side_by_side}"]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def _in_order(self) -> Self:
        feeder = super()._in_order()
        feeder._parse = feeder._compiled()  # each object its own, for threads of their own
        feeder._layouts = self._parser.layouts()
        feeder._ahead = _Ahead(feeder._records)
        feeder._stream = self._stream.in_order()
        if self.on_corrupt == "skip":
            sound = (number for number, _ in self._numbered())
            feeder._sound = np.fromiter(sound, np.int64)
            feeder.num_examples = len(feeder._sound)
            feeder.batch_size = min(feeder.batch_size, feeder.num_examples)
            feeder._stream.total = feeder.num_examples
        return feeder

    def _compiled(self) -> Any:
        import tensorflow as tf

        return tf.function(
            self._parser.parse,
            input_signature=[tf.TensorSpec([None], tf.string)],
            autograph=False,
        )

    def _examples(self, first: int, last: int) -> Any:
        following = []
        for number in range(1, self.prefetch + 1):
            start = first + number * self.batch_size
            end = start + self.batch_size
            if self.until_epochs is not None:
                end = min(end, self.until_epochs * self.num_examples)
            if start < end:
                following.append((start, end))
        return self._parsed(self._ahead.read((first, last), following))

    def _records(self, first: int, last: int) -> Records:
        """Return the records from one position in the endless stream to another."""
        if self._indexed is None:
            return self._stream.read(first, last)
        rows = self._rows(first, last)
        if self._sound is not None:
            rows = self._sound[rows]
        try:
            return self._indexed.read(rows)
        except RecordError:
            if self.on_corrupt == "fail":
                raise
        return Records.of(self._sound_record(self._indexed, row) for row in rows.tolist())

    def _sound_record(self, indexed: "_Indexed", row: int) -> Record:
        """Return the record at `row`, or the next sound one, with the first after the last."""
        for other in chain(range(row, self.num_examples), range(row)):
            try:
                return indexed.read_one(other)
            except RecordError as error:
                self._seen_corrupt(error)
        raise ValueError(f"each record of {self._named()} is corrupt")

    def _seen_corrupt(self, error: RecordError) -> None:
        """Count a corrupt record, or raise the error."""
        if self.on_corrupt == "fail":
            raise error
        place = (error.path, error.offset)
        if place not in self._corrupt:
            self._corrupt.add(place)
            lost = "it" if self.random_access else "it and the records after it in the file"
            log.warning("%s; %s skipped, %d so far", error, lost, len(self._corrupt))

    def _numbered(self) -> Iterator[tuple[int, Record]]:
        """Give the sound records in order, with their numbers among all."""
        if self._indexed is None:
            yield from enumerate(self._stream.once())
            return
        for row in range(sum(self._indexed.counts)):
            try:
                yield row, self._indexed.read_one(row)
            except RecordError as error:
                self._seen_corrupt(error)

    def _parsed(self, records: Records) -> Any:
        import tensorflow as tf

        if self._layouts is not None:
            values = self._layouts.parse(records.data)
            if values is not None:
                return self._parser.arranged(values)
        try:
            parsed = self._parse(tf.constant(records.data, tf.string))
        except (tf.errors.InvalidArgumentError, UnicodeDecodeError) as error:
            # The second one is of a message that quotes a record.
            raise self._explained(records, error) from error
        return tf.nest.map_structure(lambda tensor: tensor.numpy(), parsed)

    def _explained(self, records: Records, error: Exception) -> ValueError:
        for data, file, number in zip(*records, strict=True):
            if fault := self._parser.fault(data):
                return ValueError(f"{self.paths[file]}, record {number} (from 0), {fault}")
        # Each alone is in order.
        paths = sorted({str(self.paths[file]) for file in records.files})
        return ValueError(
            f"records of {', '.join(paths)} do not fit in one batch, as images of several sizes "
            f"without resize_height and resize_width do not: {first_line(error)}"
        )

    def _check_records(self) -> None:
        """Parse the first record, and look for what a record may be without in some more."""
        import tensorflow as tf

        first = Records.of(record for _, record in islice(self._numbered(), 1))
        if not first.data:
            raise ValueError(f"each record of {self._named()} is corrupt")
        try:
            self._parsed(first)
        except (ValueError, TypeError, tf.errors.OpError) as error:
            raise self._explained(first, error) from error
        found: set[str] = set()
        for _, (_, _, data) in islice(self._numbered(), LOOKED_AT):
            found |= names_in(data)
            if not self._parser.missing(found):
                return
        for name, where in self._parser.missing(found).items():
            looked_at = min(LOOKED_AT, self.num_examples)
            raise ValueError(
                f"{where} names {name!r}, which none of the first {looked_at} records of "
                f"{self._named()} has; they have {', '.join(sorted(found)) or 'nothing'}"
            )

    def _named(self) -> str:
        more = f" and {len(self.paths) - 1} more files" if len(self.paths) > 1 else ""
        return f"{self.paths[0]}{more}"

    def _log_access(self) -> None:
        files = f"{len(self.paths)} files" if len(self.paths) > 1 else self.paths[0].name
        window = f"a window of {self._stream.window}"
        order = "as a whole" if self.random_access else f"in {window}"
        how = f"shuffled {order}" if self.shuffle else "in their order"
        if self.random_access:
            log.info("%s: %d examples, read by their index, %s", files, self.num_examples, how)
            return
        why = f"{self.compression} files" if self.compression else f"no {INDEX}"
        log.info(
            "%s: %d examples, read as a stream (%s), %s; a resumed run reads its pass up to where "
            "it was",
            files,
            self.num_examples,
            why,
            how,
        )


class MemorySamplesFeeder(Feeder):
    """Batches of samples in memory.

    Args:
        x: features: an array, list, DataFrame, Series, dict of them, or list of dicts.
        y: labels, of the same kinds, or None: batches are features only.
        feed_as_dict: batches are dicts: by the names of columns, or, for what has none, by the
            numbers of its columns ("0", "1", ...; an array of more than 2 dimensions is one
            column). False: batches are arrays.
        batch_size: samples a batch.
        drop_remainder: leave out a batch at the end that is not full.
        shuffle: give every pass an order of its own.
        seed: orders are functions of it.

    Raises:
        ValueError: if first dimensions differ, a dict is not to be fed as one, or batch size or
            seed is out of range.
    """

    def __init__(
        self,
        x: Any,
        y: Any = None,
        feed_as_dict: bool = True,
        batch_size: int = 128,
        drop_remainder: bool = False,
        shuffle: bool = True,
        seed: int = 0,
    ) -> None:
        self.x = _columns(x, "x", feed_as_dict)
        self.y = None if y is None else _columns(y, "y", feed_as_dict)
        shapes = {
            name: array.shape
            for part, values in (("x", self.x), ("y", self.y))
            for name, array in _named_arrays(part, values)
        }
        num_samples = next(iter(shapes.values()))[0]
        for name, shape in shapes.items():
            if shape[0] != num_samples:
                raise ValueError(
                    f"{next(iter(shapes))} has {num_samples} samples and {name} has {shape[0]}; "
                    "expected as many"
                )
        super().__init__(num_samples, batch_size, drop_remainder, shuffle, seed)

    def digest(self) -> str:
        """Return a SHA-256 (hex) of the samples, to the last byte, and the options."""
        sha256 = hashlib.sha256(self._options().encode())
        for part, values in (("x", self.x), ("y", self.y)):
            for name, array in _named_arrays(part, values):
                sha256.update(f"{name} {array.dtype} {array.shape}".encode())
                is_object = array.dtype.hasobject
                sha256.update(
                    repr(array.tolist()).encode() if is_object else np.ascontiguousarray(array).data
                )
        return sha256.hexdigest()

    def _examples(self, first: int, last: int) -> Any:
        rows = self._rows(first, last)
        x, y = (_taken(values, rows) for values in (self.x, self.y))
        return x if y is None else (x, y)


def matching_files(patterns: str | Path | Sequence[str | Path]) -> list[Path]:
    """Return the files that globs match, sorted, each once; not those that describe others.

    Raises:
        FileNotFoundError: if a pattern matches none.
    """
    paths: set[Path] = set()
    patterns = [patterns] if isinstance(patterns, str | Path) else patterns
    for pattern in patterns:
        found = {Path(name) for name in glob.glob(str(pattern), recursive=True)}
        found = {
            path for path in found if path.name not in (METADATA, INDEX, LABELS) and path.is_file()
        }
        if not found:
            raise FileNotFoundError(f"no file matches {str(pattern)!r}")
        paths |= found
    if not paths:
        raise FileNotFoundError("file_patterns is empty; expected a glob, or a list of them")
    return sorted(paths)


class _Ahead:
    """Reads, in a thread if asked to, what will be wanted next; what is read is the same.

    Args:
        read: called with two positions in the stream, never by two threads at a time.
    """

    def __init__(self, read: Callable[[int, int], Records]) -> None:
        # Not a bound method, which would keep the feeder and its thread alive for ever.
        self._read = weakref.WeakMethod(read)
        self._executor: ThreadPoolExecutor | None = None
        self._pending: dict[tuple[int, int], Future[Records]] = {}

    def read(self, wanted: tuple[int, int], following: Sequence[tuple[int, int]]) -> Records:
        """Return the records wanted, and begin to read those that follow."""
        if self._executor is None:
            if not following:
                return self._call(wanted)
            self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="records")
        if wanted not in self._pending:
            for future in self._pending.values():
                future.cancel()
            self._pending = {}
        for span in (wanted, *following):
            if span not in self._pending:
                self._pending[span] = self._executor.submit(self._call, span)
        return self._pending.pop(wanted).result()

    def _call(self, span: tuple[int, int]) -> Records:
        read = self._read()
        return read(*span) if read is not None else Records([], [], [])


class _Indexed:
    """Records at hand by their numbers among all.

    Args:
        paths: the files.
        indexes: offsets of each file's records and its end.
        counts: how many records of each file belong to the data.
    """

    def __init__(self, paths: list[Path], indexes: list[Array], counts: list[int]) -> None:
        self.counts = counts
        self._paths = paths
        self._ends = np.cumsum(counts)
        # One array for all files: where records begin, with each file's end after its last one.
        lengths = [len(index) for index in indexes]
        self._offsets = np.concatenate(indexes)
        firsts = np.cumsum([0, *lengths[:-1]])
        self._shifts = firsts - (self._ends - counts)
        views = [self._offsets[i : i + n] for i, n in zip(firsts, lengths, strict=True)]
        self._files = [RecordFile(*pair) for pair in zip(paths, views, strict=True)]
        self._descriptors: OrderedDict[int, int] = OrderedDict()
        # A descriptor that another thread closes might come back as that of another file.
        self._lock = threading.Lock()
        weakref.finalize(self, _close, self._descriptors)

    def read(self, rows: Array) -> Records:
        """Return records by their numbers.

        Raises:
            RecordError: if one is corrupt.
        """
        files = np.searchsorted(self._ends, rows, side="right")
        places = rows + self._shifts[files]
        starts = self._offsets[places]
        sizes = (self._offsets[places + 1] - starts).tolist()
        names = files.tolist()
        numbers = (rows - (self._ends[files] - np.take(self.counts, files))).tolist()
        with self._lock:
            frames = [
                os.pread(self._descriptors.get(file) or self._opened(file), size, start)
                for file, size, start in zip(names, sizes, starts.tolist(), strict=True)
            ]
        data = [frame[HEADER.size : -FOOTER.size] for frame in frames]
        # What does not look right is read again by what knows how to say why.
        for i in np.flatnonzero(~self._are_sound(frames, data, sizes)).tolist():
            data[i] = self._files[names[i]].read(numbers[i])
        return Records(data, names, numbers)

    def read_one(self, row: int) -> Record:
        """Return a record by its number."""
        (data,), (file,), (number,) = self.read(np.array([row]))
        return file, number, data

    def _are_sound(self, frames: list[bytes], data: list[bytes], sizes: list[int]) -> Array:
        """Return which records are whole and have the right checksums: bool, shape (frames,).

        Checksums are compared all at once, which takes half the time of one after the other.
        """
        are_whole = [
            len(frame) == size and frame.startswith(header(size - FRAME))
            for frame, size in zip(frames, sizes, strict=True)
        ]
        if not all(are_whole):
            return np.zeros(len(frames), bool)
        stored = np.frombuffer(b"".join([frame[-FOOTER.size :] for frame in frames]), "<u4")
        found = np.array([google_crc32c.value(part) for part in data], np.uint64)
        return masked(found) == stored

    def _opened(self, file: int) -> int:
        if len(self._descriptors) >= MOST_OPEN:
            os.close(self._descriptors.popitem(last=False)[1])
        descriptor = os.open(self._paths[file], os.O_RDONLY | os.O_CLOEXEC)
        self._descriptors[file] = descriptor
        return descriptor


def _close(descriptors: dict[int, int]) -> None:
    while descriptors:
        os.close(descriptors.popitem()[1])


class _Stream:
    """Records in the order of their files, or shuffled in a window.

    Args:
        paths: the files.
        counts: how many records of each file belong to the data.
        compression: of the files.
        window: records to choose from.
        side_by_side: files read at a time, one record from each in turn.
        seed: of the order; None: that of the files.
        on_corrupt: called with an error; what is left of that file is left out if it returns.
    """

    def __init__(
        self,
        paths: list[Path],
        counts: list[int],
        compression: str,
        window: int,
        side_by_side: int,
        seed: int | None,
        on_corrupt: Any,
    ) -> None:
        self.paths = paths
        self.counts = counts
        self.compression = compression
        self.window = window
        self.side_by_side = side_by_side
        self.seed = seed
        self.on_corrupt = on_corrupt
        self.total = sum(counts)
        self._at: int | None = None
        self._iterator: Iterator[Record] = iter(())

    def in_order(self) -> "_Stream":
        """Return a stream of the same records in the order of the files."""
        stream = copy.copy(self)
        stream.seed, stream._at = None, None
        return stream

    def read(self, first: int, last: int) -> Records:
        """Return the records from one position in the endless stream to another."""
        if self._at != first:
            self._iterator = self._from(first)
        self._at = None  # where it stands after an error is not known
        records = Records.of(islice(self._iterator, last - first))
        self._at = last
        return records

    def once(self) -> Iterator[Record]:
        """Give the sound records of all files, one file after the other."""
        for file in range(len(self.paths)):
            yield from self._of_file(file)

    def _from(self, first: int) -> Iterator[Record]:
        number, place = divmod(first, self.total)
        while True:
            yield from islice(self._pass(number), place, None)
            number, place = number + 1, 0

    def _pass(self, number: int) -> Iterator[Record]:
        """Give as many records as there are to be in a pass."""
        records = self.once() if self.seed is None else self._shuffled(self.seed, number)
        given = 0
        while given < self.total:
            before = given
            for record in islice(records, self.total - given):
                yield record
                given += 1
            if given == before:
                raise ValueError(f"each record of {self.paths[0]} and its like is corrupt")
            records = self.once()  # corrupt records have left places empty

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
        reading = [self._of_file(file) for file in islice(waiting, self.side_by_side)]
        while reading:
            still = []
            for records in reading:
                record = next(records, None)
                while record is None and (file := next(waiting, None)) is not None:
                    records = self._of_file(file)
                    record = next(records, None)
                if record is not None:
                    yield record
                    still.append(records)
            reading = still

    def _of_file(self, file: int) -> Iterator[Record]:
        number = 0
        path, count = self.paths[file], self.counts[file]
        try:
            for _, data in islice(read_all(path, self.compression), count):
                yield file, number, data
                number += 1
        except RecordError as error:
            self.on_corrupt(error)
            return
        if number < count:
            raise MetadataError(
                f"{path} ends after {number} records, but its metadata say "
                f"{count} or more; if the file is right, type: {generate_command(path)}"
            )


def _generate_missing(paths: list[Path], compression: str) -> None:
    for path in paths:
        try:
            file_info(path)
            if compression or read_index(path) is not None:
                continue
        except MetadataError:
            pass  # missing or outdated: made now; corrupt: said by `generate`
        for problem in generate(paths, compression=compression).problems.values():
            raise MetadataError(f"no metadata could be made: {problem}")
        return


def _columns(values: Any, name: str, feed_as_dict: bool) -> Any:
    """Return samples as an array, or a dict of arrays."""
    rows = values if isinstance(values, list) else []
    if rows and all(isinstance(row, Mapping) for row in rows):
        keys = list(rows[0])
        if any(list(row) != keys for row in rows):
            raise ValueError(f"the dicts of {name} have different keys; expected {keys} in each")
        columns = {str(key): np.asarray([row[key] for row in rows]) for key in keys}
        return _checked_columns(columns if feed_as_dict else _beside(columns), name)
    if isinstance(values, Mapping):
        if not feed_as_dict:
            raise ValueError(f"{name} is a dict, which feed_as_dict=False cannot make an array of")
        columns = {str(key): np.asarray(column) for key, column in values.items()}
        return _checked_columns(columns, name)
    if hasattr(values, "columns"):  # a DataFrame
        columns = {str(key): np.asarray(values[key]) for key in values.columns}
        return _checked_columns(columns if feed_as_dict else _beside(columns), name)
    array = np.asarray(values)
    if not feed_as_dict:
        return _checked_columns(array, name)
    if hasattr(values, "index") and getattr(values, "name", None) is not None:  # a Series
        return _checked_columns({str(values.name): array}, name)
    if array.ndim == 2:
        return _checked_columns({str(i): array[:, i] for i in range(array.shape[1])}, name)
    return _checked_columns({"0": array}, name)


def _beside(columns: dict[str, Array]) -> Array:
    return np.stack(list(columns.values()), axis=-1) if columns else np.empty(0)


def _checked_columns(values: Any, name: str) -> Any:
    arrays = list(_named_arrays(name, values))
    if not arrays:
        raise ValueError(f"{name} has no columns; expected at least one")
    for column, array in arrays:
        if array.ndim == 0 or not len(array):
            raise ValueError(f"{column} has no samples; expected at least one")
    return values


def _named_arrays(name: str, values: Any) -> Iterator[tuple[str, Array]]:
    if isinstance(values, dict):
        yield from ((f"{name}[{key!r}]", array) for key, array in values.items())
    elif values is not None:
        yield name, values


def _taken(values: Any, rows: Array) -> Any:
    if isinstance(values, dict):
        return {key: array[rows] for key, array in values.items()}
    return None if values is None else values[rows]


FEEDERS = {
    "TFRecordExamplesFeeder": TFRecordExamplesFeeder,
    "MemorySamplesFeeder": MemorySamplesFeeder,
}
