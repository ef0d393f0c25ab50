"""Reads and writes TFRecord files, and the metadata and index next to them, without TensorFlow.

A record is a uint64 (little-endian), its length; a uint32, the masked CRC32C of these eight bytes;
the data; a uint32, the masked CRC32C of the data. No byte is used whose CRC was not compared.

`_tfrecord_metadata.json` says of each file in its folder how many records it holds, and what it was
when they were counted. `_tfrecord_index.npz` says where each record of an uncompressed file begins,
and is not used where it does not fit the files."""

import array
import contextlib
import fcntl
import functools
import glob
import gzip
import hashlib
import io
import json
import os
import shlex
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import google_crc32c

from vegab.files import remove_partial_files, replacing, write_atomically

if TYPE_CHECKING:  # it is imported where it is used, so that bin/tfrecords.py answers at once
    import numpy as np

METADATA, INDEX = "_tfrecord_metadata.json", "_tfrecord_index.npz"
LABELS = "labels.txt"  # where the pictures of a folder became records: the name of each label
COMPANIONS = (METADATA, INDEX, LABELS, "README.md")  # what lies next to records and holds none
VERSION = 1
COMPRESSIONS = ("", "GZIP")
HEADER, FOOTER = struct.Struct("<QI"), struct.Struct("<I")
TORN = "is truncated: the file ends in it"
FRAME = HEADER.size + FOOTER.size  # bytes of a record besides its data
PIECE = 2**20  # bytes that are read at once


class RecordError(OSError):
    """A record that is truncated, or whose bytes are not those that were written."""

    # The offset is where the record begins, in bytes; in a compressed file, of what it unpacks to.
    def __init__(self, path: Path, offset: int, reason: str) -> None:
        super().__init__(f"{path}: the record at byte {offset} {reason}")
        self.path, self.offset, self.reason = path, offset, reason

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path, self.offset, self.reason)


class MetadataError(ValueError):
    """Metadata that is missing, corrupt or of other bytes than the file's."""


@dataclass(frozen=True)
class FileInfo:
    """What the metadata says of a file."""

    total_records: int
    file_size: int  # in bytes, as it lies on the disk
    md5_hash: str  # of these bytes, 32 hexadecimal digits


@dataclass
class Generated:
    """What `generate` did with each file."""

    made: list[Path] = field(default_factory=list)  # their entries are new
    kept: list[Path] = field(default_factory=list)  # their entries were right
    problems: dict[Path, str] = field(default_factory=dict)  # why one was not read to its end


def matching(pattern: str) -> tuple[list[str], set[Path]]:
    """Return what a glob matches, and which of it may be files of records by their names."""
    hits = [pattern] if os.path.exists(pattern) else glob.glob(pattern, recursive=True)
    paths = {path for path in map(Path, hits) if path.is_file() and path.name[0] != "."}
    return hits, {path for path in paths if path.name not in COMPANIONS}


def generate_command(target: Path) -> str:
    """Return the command that makes the metadata of a file or of all files in a folder."""
    pattern = f"{glob.escape(str(target))}/*" if target.is_dir() else str(target)
    return f"python bin/tfrecords.py generate-metadata {shlex.quote(pattern)}"


def read_metadata(folder: Path) -> dict[str, FileInfo]:
    """Return what the metadata of a folder, if there is any, says of each file."""
    with contextlib.suppress(FileNotFoundError):
        return dict(_parsed(*_identity(folder / METADATA)))
    return {}


def file_info(path: Path, deep: bool = False) -> FileInfo:
    """Return what the metadata says of a file; MetadataError if that does not fit (`deep`: MD5)."""
    info = read_metadata(path.parent).get(path.name)
    of_folder = generate_command(path.parent)
    if not path.exists():
        listed = f", which {METADATA} lists; put it back, or move {METADATA} away and type: "
        raise MetadataError(f"there is no file {path}{listed + of_folder if info else ''}")
    if not (path.parent / METADATA).exists():
        raise MetadataError(f"{path} has no metadata: there is no {METADATA}; type: {of_folder}")
    command = generate_command(path)
    if info is None:
        raise MetadataError(f"{path} is not in {METADATA}; type: {command}")
    size = path.stat().st_size
    reason = f"{size} bytes, but its metadata says {info.file_size}"
    if size == info.file_size:
        if not deep or _md5(path) == info.md5_hash:
            return info
        reason = "the size that its metadata says, but other bytes (MD5)"
    raise MetadataError(f"{path} has {reason}; if the file is right, type: {command}")


def generate(
    paths: Sequence[Path],
    force: bool = False,
    compression: str = "",
    progress: Callable[[Sequence[Path]], Iterable[Path]] = iter,
) -> Generated:
    """Write metadata and index of files into the folders that they lie in.

    An entry whose size and MD5 are the file's is kept, unless `force`; another is made by reading
    the file to its end. What was done is written when the work is interrupted, too. Raises
    MetadataError if metadata that is there is corrupt. The compression is "GZIP", or "" to find it
    from each file's first bytes. `progress` goes through the paths, and may show how far it is."""
    require_compression(compression)
    before = {path.parent: read_metadata(path.parent) for path in paths}
    found: dict[Path, dict[str, _Scanned]] = {}  # by folder, then by name
    result = Generated()
    try:
        for path in progress(paths):
            known = before[path.parent].get(path.name)
            try:
                if known and not force and is_described(path, deep=True):
                    result.kept.append(path)
                    continue
                scanned = _scan(path, compression or compression_of(path))
            except OSError as error:
                result.problems[path] = str(error)
                continue
            found.setdefault(path.parent, {})[path.name] = scanned
            # A file that only lacked its index is not reported.
            (result.kept if scanned[0] == known and not force else result.made).append(path)
    finally:
        for folder, files in found.items():
            _save(folder, files)
    return result


def read_index(path: Path) -> "np.ndarray | None":
    """Return where each record begins, and the file's end; None without an index that fits."""
    try:
        offsets = _loaded(*_identity(path.parent / INDEX)).get(path.name)
        info = read_metadata(path.parent).get(path.name)
        size = path.stat().st_size
    except (OSError, MetadataError):
        return None
    if offsets is None or offsets[-1] != size:
        return None
    return None if info and info.total_records != len(offsets) - 1 else offsets


def compression_of(path: Path) -> str:
    """Return "" or GZIP by a file's first bytes; RecordError if it is neither."""
    with open(path, "rb") as file:
        head = file.read(HEADER.size)
    if not head or (len(head) == HEADER.size and head == header(HEADER.unpack(head)[0])):
        return ""
    if head.startswith(b"\x1f\x8b"):
        return "GZIP"
    raise RecordError(path, 0, "is truncated, or this is not a TFRecord file")


def read_all(path: Path, compression: str = "") -> Iterator[tuple[int, bytes]]:
    """Yield each record's offset in bytes (as unpacked) and its data."""
    require_compression(compression)
    with open(path, "rb", buffering=PIECE) as file:
        yield from _records(path, file, compression, os.fstat(file.fileno()).st_size)


def require_sound(path: Path, start: int, size: int, frame: bytes) -> None:
    """Raise a RecordError unless `frame` is whole, as long as the index says, and has its CRCs."""
    if len(frame) < size:
        raise RecordError(path, start, TORN)
    length = _checked_length(path, start, frame)
    if length != size - FRAME:
        raise RecordError(path, start, f"has {length} bytes, unlike what the index says")
    if not frame.endswith(_footer(frame[HEADER.size : -FOOTER.size])):
        raise RecordError(path, start, "is corrupt: its data have another CRC")


def write_records(path: Path, records: Iterable[bytes], compression: str = "") -> int:
    """Write a file of records when all are there, always the same bytes; return how many."""
    require_compression(compression)
    number = 0
    with replacing(path) as temporary, open(temporary, "wb", buffering=PIECE) as file:
        packer = gzip.GzipFile("", "wb", fileobj=file, mtime=0) if compression else None
        with packer or contextlib.nullcontext(file) as output:
            for data in records:
                output.write(header(len(data)) + data + _footer(data))
                number += 1
    return number


def masked(crc: Any) -> Any:
    """Return a CRC, or an array of them as uint64, as it stands in a file of records."""
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _footer(data: bytes) -> bytes:
    return FOOTER.pack(masked(google_crc32c.value(data)))


@functools.lru_cache(maxsize=2**14)
def header(length: int) -> bytes:
    """Return the bytes that a record with `length` bytes of data begins with."""
    packed = struct.pack("<Q", length)
    return packed + _footer(packed)


def _records(path: Path, file: Any, compression: str, size: int) -> Iterator[tuple[int, bytes]]:
    stream = gzip.GzipFile(fileobj=file) if compression else file
    offset = 0
    while head := _read(stream, HEADER.size, path, offset):
        length = _checked_length(path, offset, head)
        # A length is a number like any other in a file: no memory is set aside at its word.
        if not compression and length > size - offset - FRAME:
            raise RecordError(path, offset, TORN)
        body = _read(stream, length + FOOTER.size, path, offset)
        data = body[:length]
        if body[length:] != _footer(data):
            require_sound(path, offset, length + FRAME, head + body)  # knows how to say why
        yield offset, data
        offset += length + FRAME


def _read(stream: Any, size: int, path: Path, offset: int) -> bytes:
    """Return `size` bytes, or less where the stream ends; what is not there takes no memory."""
    try:
        if size <= PIECE:
            return stream.read(size)
        pieces = []
        while size and (piece := stream.read(min(size, PIECE))):
            pieces.append(piece)
            size -= len(piece)
        return b"".join(pieces)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise RecordError(path, offset, f"cannot be unpacked: {error}") from error


def _checked_length(path: Path, offset: int, frame: bytes) -> int:
    """Return the length of a record's data; `frame` begins with the header."""
    if len(frame) < HEADER.size:
        raise RecordError(path, offset, TORN)
    length, _ = HEADER.unpack_from(frame)
    if not frame.startswith(header(length)):
        raise RecordError(path, offset, "is corrupt: its length has another CRC")
    return length


def require_compression(compression: str) -> None:
    """Raise a ValueError unless it is one of COMPRESSIONS."""
    if compression not in COMPRESSIONS:
        raise ValueError(f"the compression is {compression!r}; it must be GZIP or empty")


def _identity(path: Path) -> tuple[Path, int, int, int]:
    """Return what tells whether a file was replaced; it is read again only then."""
    status = path.stat()
    return path, status.st_ino, status.st_mtime_ns, status.st_size


@functools.lru_cache(maxsize=4)
def _parsed(path: Path, *_: int) -> Mapping[str, FileInfo]:
    advice = f"restore it, or move it away and type: {generate_command(path.parent)}"
    try:
        content = json.loads(path.read_bytes())
        version, files = content["version"], content["files"]
        if version == VERSION:
            return {name: _entry(entry) for name, entry in files.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise MetadataError(f"{path} is corrupt ({error}); {advice}") from error
    raise MetadataError(f"{path} has version {version!r}, but only {VERSION} is known; {advice}")


def _entry(entry: Mapping[str, Any]) -> FileInfo:
    info = FileInfo(**entry)
    counts = (info.total_records, info.file_size)
    if any(type(n) is not int or n < 0 for n in counts) or not isinstance(info.md5_hash, str):
        raise ValueError(f"{entry} is not a number of records, one of bytes, and an MD5")
    return info


@functools.lru_cache(maxsize=4)
def _loaded(path: Path, *_: int) -> "Mapping[str, np.ndarray]":
    """Return the offsets of each file in an index; nothing if it is corrupt."""
    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as arrays:
            index = {name: arrays[name] for name in arrays.files}
    except (OSError, ValueError, KeyError, EOFError, MemoryError, zipfile.BadZipFile, zlib.error):
        return {}
    return {
        name: offsets
        for name, offsets in index.items()
        if offsets.dtype == np.int64 and offsets.ndim == 1 and len(offsets) and offsets[0] == 0
        if (np.diff(offsets) >= FRAME).all()
    }


def _md5(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def is_described(path: Path, deep: bool = False) -> bool:
    """Return whether the metadata of a file is right, and the index if there should be one."""
    try:
        file_info(path, deep)
    except MetadataError:
        return False
    return compression_of(path) != "" or read_index(path) is not None


# What the metadata says of a file, and where its records begin; None: it is compressed.
_Scanned = tuple[FileInfo, "np.ndarray | None"]


def _scan(path: Path, compression: str) -> _Scanned:
    """Read a file to its end: count its records."""
    import numpy as np

    starts = array.array("q", [0])
    with open(path, "rb", buffering=PIECE) as file:
        size = os.fstat(file.fileno()).st_size
        for offset, data in _records(path, file, compression, size):
            starts.append(offset + len(data) + FRAME)
    info = FileInfo(len(starts) - 1, size, _md5(path))
    return info, None if compression else np.array(starts, dtype=np.int64)


def _save(folder: Path, scanned: Mapping[str, _Scanned]) -> None:
    """Add what was found to metadata and index, next to what another process may have added."""
    import numpy as np

    with _locked(folder):
        remove_partial_files(folder, METADATA, INDEX)
        before = read_metadata(folder)
        entries = before | {name: info for name, (info, _) in scanned.items()}
        found: dict[str, np.ndarray | None] = {}
        with contextlib.suppress(FileNotFoundError):
            found.update(_loaded(*_identity(folder / INDEX)))
        found |= {name: offsets for name, (_, offsets) in scanned.items()}
        index = {name: offsets for name, offsets in found.items() if offsets is not None}
        # The index comes first: it is only used where it agrees with the metadata.
        if index or (folder / INDEX).exists():
            packed = io.BytesIO()
            with zipfile.ZipFile(packed, "w") as archive:  # not `savez`: a file may be named "file"
                for name in sorted(index):
                    with archive.open(f"{name}.npy", "w") as file:  # it is dated 1980
                        np.save(file, index[name], allow_pickle=False)
            write_atomically(folder / INDEX, packed.getvalue())
        if entries != before:
            files = {name: asdict(entries[name]) for name in sorted(entries)}
            content = json.dumps({"version": VERSION, "files": files}, indent=4)
            write_atomically(folder / METADATA, content + "\n")


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Let no other process that asks for the lock write into the folder meanwhile."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks is used without
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
