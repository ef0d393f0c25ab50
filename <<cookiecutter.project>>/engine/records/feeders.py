"""Feeds batches of examples from TFRecord files and from memory.

A feeder is an endless stream of passes over the examples, each in an order of its own, cut into
batches, which cross the ends of passes: 8 examples in batches of 6 are 7 batches in 5 passes. The
batch at a step of an epoch depends on seed and position only: there is no state to save."""

import copy
import hashlib
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import tensorflow as tf

from engine import batches
from engine.batches import SHUFFLE_STREAM, Ahead, Array, random_generator, require_at_least
from engine.records import files as tfrecords
from engine.records.features import Parser, described, first_line, held_in, make_features, stored
from engine.records.reading import Indexed, Records, Stream
from engine.trees import map_leaves

log = logging.getLogger(__name__)
LOOKED_AT = 1000  # records in which a feature that a record may be without is looked for


class Feeder:
    """Batches of examples that are counted from 0, in an order that seed and pass decide.

    A batch at the end that is not full is left out if `drop_remainder`; if `shuffle`, every pass
    has an order of its own. Raises ValueError if batch size or seed is out of range."""

    # Passes over the data, after which there is nothing; None: it never ends.
    until_epochs: int | None = None
    may_cross = False  # may a batch be larger than a pass?

    def __init__(
        self, num_examples: int, batch_size: int, drop_remainder: bool, shuffle: bool, seed: int
    ) -> None:
        require_at_least(1, batch_size=batch_size)
        require_at_least(0, seed=seed)
        if batch_size > num_examples and (drop_remainder or not self.may_cross):
            raise ValueError(f"batch_size is {batch_size}, but there are {num_examples} examples")
        self.num_examples, self.batch_size = num_examples, batch_size
        self.drop_remainder, self.shuffle, self.seed = drop_remainder, shuffle, seed
        self._orders: dict[int, Array] = {}

    def __len__(self) -> int:
        return self.num_examples

    @property
    def steps_per_epoch(self) -> int:
        """Number of batches in an epoch, which may be a little more or less than one pass."""
        return self.total_steps(1)

    def total_steps(self, epochs: int) -> int:
        """Return the number of batches in that many passes."""
        full, rest = divmod(epochs * self.num_examples, self.batch_size)
        return full + (1 if rest and not self.drop_remainder else 0)

    def batch(self, epoch: int, step: int) -> Any:
        """Return the batch at `step` of `epoch`, both counted from 0."""
        number = epoch * self.steps_per_epoch + step
        end = self.until_epochs and self.total_steps(self.until_epochs)
        if epoch < 0 or not 0 <= step < self.steps_per_epoch or (end and number >= end):
            what = f"an epoch has {self.steps_per_epoch} steps, and there are {end or 'endless'}"
            raise IndexError(f"step {step} of epoch {epoch}; {what} in all")
        first = number * self.batch_size
        return self._examples(first, min(first + self.batch_size, self._end))

    @property
    def _end(self) -> int:
        """Position in the stream after which there is nothing."""
        return (self.until_epochs or sys.maxsize) * self.num_examples

    def one_pass(self) -> Self:
        """Return a feeder of epoch 0 only, in order; the last batch may be smaller."""
        feeder = copy.copy(self)
        feeder.shuffle = feeder.drop_remainder = False
        feeder.until_epochs, feeder._orders = 1, {}
        return feeder

    def digest(self) -> str:
        """Return a SHA-256 (hex) of what the batches depend on."""
        raise NotImplementedError

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
        if number not in self._orders:
            order = np.arange(self.num_examples)
            if self.shuffle:
                order = random_generator(self.seed, number, SHUFFLE_STREAM).permutation(order)
            # A batch meets two passes in most cases, and never again those before them.
            kept = {n: other for n, other in self._orders.items() if n == number - 1}
            self._orders = kept | {number: order}
        return self._orders[number]

    def _options(self) -> str:
        options = f"{self.num_examples} {self.batch_size} {self.drop_remainder} {self.shuffle}"
        return f"{options} {self.seed}" if self.shuffle else options


class Serving(NamedTuple):
    """How an exported model reads records, which have no labels then."""

    spec: dict[str, Any]  # names and features, as `tf.io.parse_example` takes them
    # A function for use in a graph: serialized examples, strings of shape (batch,), to features.
    parse: Any


class TFRecordExamplesFeeder(Feeder):
    """Batches of `tf.train.Example`s in TFRecord files; each record's checksum is compared.

    With an index next to the files (`random_access`), each pass is shuffled as a whole; else they
    are read as a stream, side by side, shuffled in a window. See `docs/records.md`.

    Batches are dicts of arrays; with `labels_map`, pairs of such dicts. Strings are arrays of
    `bytes` objects, shape (batch, ...). What has no fixed length (VarLenFeature, RaggedFeature,
    SparseFeature) is padded with zeros or empty strings to the longest of the batch.

    Args:
        file_patterns: a glob, or several; the files of all of them, sorted.
        features_map: names and features, as `{type: FixedLenFeature, shape: [1], dtype: int64}`;
            see `engine.records.features`.
        labels_map: the same for labels, or None. A name may stand in both maps.
        max_examples: take only the first N of the files; -1: all.
        shuffle_buffer_size: records in the window of a stream.
        num_parallel_maps: images decoded at a time; None: one for each core.
        num_parallel_reads: files of a shuffled stream read side by side; the order depends on it.
            None: one at a time, as `tf.data` takes it.
        prefetch: batches whose records a thread reads ahead, while others are parsed.
        auto_generate_meta: write metadata and index where they are missing or outdated.
        compression: "" or "GZIP".
        on_corrupt: "fail", or "skip": corrupt records are looked for at the start, which reads all
            files, and left out; in a stream, with the rest of their file."""

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
        num_parallel_reads: int | None = 32,
        prefetch: int | None = 2,
        auto_generate_meta: bool = False,
        compression: str | None = "",
        on_corrupt: str = "fail",
        seed: int = 0,
    ) -> None:
        if num_parallel_maps is None:
            num_parallel_maps = os.cpu_count() or 1
        num_parallel_reads = 1 if num_parallel_reads is None else num_parallel_reads
        prefetch = prefetch or 0
        reading = {"num_parallel_reads": num_parallel_reads, "num_parallel_maps": num_parallel_maps}
        require_at_least(1, shuffle_buffer_size=shuffle_buffer_size, **reading)
        require_at_least(0, prefetch=prefetch)
        compression = (compression or "").upper()
        tfrecords.require_compression(compression)
        if on_corrupt not in ("fail", "skip"):
            raise ValueError(f"on_corrupt is {on_corrupt!r}; expected fail or skip")
        self.paths = matching_files(file_patterns)
        features = make_features(features_map, "features_map")
        labels = make_features(labels_map, "labels_map") if labels_map is not None else None
        if auto_generate_meta and not all(tfrecords.is_described(path) for path in self.paths):
            problems = tfrecords.generate(self.paths, compression=compression).problems.values()
            if problems:
                raise tfrecords.MetadataError(f"no metadata could be made: {next(iter(problems))}")
        self._infos = [tfrecords.file_info(path) for path in self.paths]
        totals = [info.total_records for info in self._infos]
        if max_examples != -1 and not 1 <= max_examples <= sum(totals):
            held = f"1 to {sum(totals)}, which {self._named()} hold"
            raise ValueError(f"max_examples is {max_examples}; expected -1 (all), or {held}")
        most = sum(totals) if max_examples == -1 else max_examples
        counts = np.clip(most - np.cumsum([0, *totals[:-1]]), 0, totals).tolist()
        self.max_examples, self.on_corrupt = max_examples, on_corrupt
        self.compression, self.prefetch = compression, prefetch
        indexes = [None if compression else tfrecords.read_index(path) for path in self.paths]
        found = [index for index in indexes if index is not None]
        self.random_access = len(found) == len(self.paths)
        self._indexed = Indexed(self.paths, found, counts) if self.random_access else None
        self._sound: Array | None = None  # numbers of records, where corrupt ones are left out
        if on_corrupt == "skip":
            self._sound = np.fromiter(self._look_for_sound(counts), np.int64)
            file_of = np.searchsorted(np.cumsum(counts), self._sound, side="right")
            counts = np.bincount(file_of, minlength=len(counts)).tolist()
            if not sum(counts):
                raise ValueError(f"each record of {self._named()} is corrupt")
        super().__init__(sum(counts), batch_size, drop_remainder, shuffle, seed)
        self._parser = Parser(features, labels, num_parallel_maps)
        self._parse = self._compiled()
        self._ahead = Ahead(self._records, "records")
        window, order = min(shuffle_buffer_size, self.num_examples), seed if shuffle else None
        self._stream = Stream(self.paths, counts, compression, window, num_parallel_reads, order)
        self._log_access()
        self._check_records()

    def serving_features(self) -> Serving:
        """Return how an exported model reads records: as this feeder does, but without labels."""
        parser = Parser(self._parser.features, None, self._parser.num_parallel)
        return Serving(stored(parser.features), parser.parse)

    def digest(self) -> str:
        """Return a SHA-256 (hex) of the files' metadata and the options; reads no records."""
        lines = [f"{path.name} {info}" for path, info in zip(self.paths, self._infos, strict=True)]
        lines += [self._options(), self.compression, self.on_corrupt, str(self.max_examples)]
        maps = self._parser.features, self._parser.labels
        lines += [*map(described, maps), str(self.random_access)]
        if not self.random_access and self.shuffle:
            lines += [f"{self._stream.window} {self._stream.side_by_side}"]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def one_pass(self) -> Self:
        """See `Feeder`."""
        feeder = super().one_pass()
        feeder._parse = feeder._compiled()  # each object its own, for threads of their own
        feeder._ahead = Ahead(feeder._records, "records")
        feeder._stream = replace(self._stream, seed=None)
        return feeder

    def _compiled(self) -> Any:
        texts = tf.TensorSpec([None], tf.string)
        return tf.function(self._parser.parse, autograph=False).get_concrete_function(texts)

    def _examples(self, first: int, last: int) -> Any:
        end = self._end
        starts = [first + number * self.batch_size for number in range(1, self.prefetch + 1)]
        following = [(n, min(n + self.batch_size, end)) for n in starts if n < end]
        return self._parsed(self._ahead.take((first, last), *following))

    def _records(self, first: int, last: int) -> Records:
        """Return the records from one position in the endless stream to another."""
        if self._indexed is None:
            return self._stream.read(first, last)
        rows = self._rows(first, last)
        return self._indexed.read(rows if self._sound is None else self._sound[rows])

    def _look_for_sound(self, counts: Sequence[int]) -> Iterator[int]:
        """Give the numbers of the records that are not corrupt; reads all of them."""
        first = 0
        for path, number in zip(self.paths, counts, strict=True):
            stream = tfrecords.read_all(path, self.compression)
            for row in range(first, first + number):
                try:
                    if self._indexed:
                        self._indexed.read_one(row)
                    else:
                        next(stream, None)
                    yield row
                except tfrecords.RecordError as error:
                    lost = "it" if self._indexed else "it and what comes after it in the file"
                    log.warning("%s; %s is skipped", error, lost)
                    if not self._indexed:
                        break
            first += number

    def _parsed(self, records: Records) -> Any:
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
        paths = ", ".join(sorted({str(self.paths[file]) for file in records.files}))
        why = "such as images of several sizes without resize_height and resize_width"
        return ValueError(f"records of {paths} do not fit in one batch, {why}: {first_line(error)}")

    def _check_records(self) -> None:
        """Parse the first record, and look for what a record may be without in some more."""
        records = self._stream.once()
        if self._indexed is not None:
            rows = np.arange(self.num_examples) if self._sound is None else self._sound
            records = map(self._indexed.read_one, rows.tolist())
        found: set[str] = set()
        for number, record in enumerate(islice(records, LOOKED_AT)):
            if number == 0:
                self._parsed(Records.of([record]))
            found |= held_in(record[0]).keys()
            if not (missing := self._parser.missing(found)):
                return
        name, where = next(iter(missing.items()))
        what = f"none of the first {min(LOOKED_AT, len(self))} records of {self._named()} has"
        there = ", ".join(sorted(found)) or "nothing"
        raise ValueError(f"{where} names {name!r}, which {what}; they have {there}")

    def _named(self) -> str:
        more = f" and {len(self.paths) - 1} more files" if len(self.paths) > 1 else ""
        return f"{self.paths[0]}{more}"

    def _log_access(self) -> None:
        order, way = "as a whole", "by their index"
        if not self.random_access:
            order = f"in a window of {self._stream.window}"
            why = f"{self.compression} files" if self.compression else f"no {tfrecords.INDEX}"
            way = f"as a stream ({why}), which a resumed run reads up to where it was"
        how = f"shuffled {order}" if self.shuffle else "in their order"
        log.info("%s: %d examples, %s, read %s", self._named(), len(self), how, way)


def matching_files(patterns: str | Path | Sequence[str | Path]) -> list[Path]:
    """Return the files that globs match, sorted; FileNotFoundError if one matches none."""
    paths: set[Path] = set()
    for pattern in [patterns] if isinstance(patterns, str | Path) else patterns:
        _, found = tfrecords.matching(str(pattern))
        if not found:
            raise FileNotFoundError(f"no file matches {str(pattern)!r}")
        paths |= found
    if not paths:
        raise FileNotFoundError("file_patterns is empty; expected a glob, or a list of them")
    return sorted(paths)


class MemorySamplesFeeder(Feeder):
    """Batches of samples in memory.

    Args:
        x: features: an array, list, DataFrame, Series, dict of them, or list of dicts.
        y: labels, of the same kinds, or None: batches are features only.
        feed_as_dict: batches are dicts: by the names of columns, or, for what has none, by the
            numbers of its columns ("0", "1", ...; an array of more than 2 dimensions is one
            column). False: batches are arrays.
        batch_size, drop_remainder, shuffle, seed: as for `Feeder`; a batch may have more samples
            than there are, which are then those of more passes than one."""

    may_cross = True

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
        (first, array), *others = self._arrays()
        for name, other in others:
            if len(other) != len(array):
                sizes = f"{first} has {len(array)} samples and {name} has {len(other)}"
                raise ValueError(f"{sizes}; expected the same number")
        super().__init__(len(array), batch_size, drop_remainder, shuffle, seed)

    def digest(self) -> str:
        """Return a SHA-256 (hex) of the samples, to the last byte, and the options."""
        sha256 = hashlib.sha256(self._options().encode())
        for name, array in self._arrays():
            sha256.update(name.encode())
            batches.add_to_digest(sha256, array)
        return sha256.hexdigest()

    def _arrays(self) -> list[tuple[str, Array]]:
        return [*_named_arrays("x", self.x), *_named_arrays("y", self.y)]

    def _examples(self, first: int, last: int) -> Any:
        rows = self._rows(first, last)
        x, y = map_leaves((self.x, self.y), lambda array: None if array is None else array[rows])
        return x if y is None else (x, y)


def _columns(values: Any, name: str, feed_as_dict: bool) -> Any:
    columns: Any = values
    if isinstance(values, list) and values and all(isinstance(row, Mapping) for row in values):
        keys = list(values[0])
        if any(list(row) != keys for row in values):
            raise ValueError(f"the dicts of {name} have different keys; expected {keys} in each")
        columns = {key: [row[key] for row in values] for key in keys}
    elif hasattr(values, "columns"):  # a DataFrame
        columns = {key: values[key] for key in values.columns}
    elif not isinstance(values, Mapping):
        columns = np.asarray(values)
        own = getattr(values, "name", None)  # of a Series
        if feed_as_dict and columns.ndim == 2:
            columns = dict(enumerate(columns.T))
        elif feed_as_dict:
            columns = {0 if own is None else own: columns}
    elif not feed_as_dict:
        raise ValueError(f"{name} is a dict, which feed_as_dict=False cannot make an array of")
    if isinstance(columns, Mapping):
        columns = {str(key): np.asarray(column) for key, column in columns.items()}
        if not columns:
            raise ValueError(f"{name} has no columns; expected at least one")
        if not feed_as_dict:
            columns = np.stack(list(columns.values()), axis=-1)
    for column, array in _named_arrays(name, columns):
        if array.ndim == 0 or not len(array):
            raise ValueError(f"{column} has no samples; expected at least one")
    return columns


def _named_arrays(name: str, values: Any) -> Iterator[tuple[str, Array]]:
    if isinstance(values, dict):
        yield from ((f"{name}[{key!r}]", array) for key, array in values.items())
    elif values is not None:
        yield name, values
