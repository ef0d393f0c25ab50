"""Captures everything that a process writes, at the level of file descriptors, in two files.

The descriptors 1 and 2 point straight at the files: what was written before a SIGKILL is there, and
so is what C++ and child processes wrote. A small follower process, forked before anything heavy is
imported, reads the files as they grow and repeats them on the real terminal. A terminal that is
gone or blocked therefore never harms the run.

If `is_watched` is False, nothing is repeated except what a process without a run folder says."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import select
import signal
import socket
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO, cast

from vegab.exits import flush
from vegab.files import write_atomically

FILES = ("stdout.txt", "stderr.txt")
ATTEMPT = re.compile(rb"^--- attempt \d+, ", re.MULTILINE)
CONTROLS = re.compile("(\r|\n|\b|\x1b\\[A)")
POLL = 0.05  # seconds between two looks at the files
CHUNK = 65536  # bytes read at once
LONGEST_MESSAGE = 2000  # bytes; what one datagram holds on every system

# Whether anybody reads along; to be set before a capture begins.
is_watched = True
# Lines of stderr for the file only: what TensorFlow logs as it starts. Set before a capture begins.
hidden: re.Pattern[bytes] | None = re.compile(
    rb"^(?:WARNING: All log messages before absl::InitializeLog\(\) is called are written to STDERR"
    rb"|[IWE]\d{4} \d\d:\d\d:[\d.]+ +\d+ [\w./]+\.cc:\d+\] .*"
    rb"|To enable the following instructions: .*)\n",
    re.MULTILINE,
)

_active: Capture | None = None


def terminal() -> TextIO | None:
    """A stream that shows a bar of tqdm on the real terminal only; None where there is none."""
    if _active is None or not _active.has_terminal:
        return None
    return cast(TextIO, _Terminal(_active))


@contextlib.contextmanager
def filtered() -> Iterator[None]:
    """Keeps the lines that are `hidden` off the terminal, for a program without a run folder."""
    capture = Capture() if hidden and _active is None else None
    try:
        yield
    finally:
        if capture:
            capture.stop()


class Capture:
    """Captures from the moment it is made: into temporary files until `move_to` names a folder."""

    def __init__(self) -> None:
        global _active
        _open_closed_descriptors()
        self.real = [os.dup(1), os.dup(2)]
        self.has_terminal = os.isatty(self.real[1]) and os.environ.get("TERM") != "dumb"
        self._temporary = [tempfile.TemporaryFile(buffering=0) for _ in FILES]  # noqa: SIM115
        self._waiting = [file.fileno() for file in self._temporary]
        self.folder: Path | None = None
        self.is_watched = is_watched
        flush()
        self._control: socket.socket | None = None
        if is_watched:
            self._control, self._follower = self._follow()
        self._point_at(self._waiting)
        for number, name in enumerate(("stdout", "stderr"), start=1):
            stream = getattr(sys, name)
            if stream is None:
                setattr(sys, name, open(number, "w", buffering=1, closefd=False))  # noqa: SIM115
            elif isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(line_buffering=True)
        _active = self

    def _follow(self) -> tuple[socket.socket, int]:
        control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        parent = os.getpid()
        with warnings.catch_warnings():  # threads do no harm: the follower needs none of them
            warnings.simplefilter("ignore", DeprecationWarning)
            follower = os.fork()
        if follower == 0:
            control.close()
            try:
                _Follower(theirs, self.real, self._waiting, parent).run()
            finally:
                os._exit(0)
        theirs.close()
        return control, follower

    def move_to(self, folder: str) -> None:
        """From now on into the folder's stdout.txt and stderr.txt, after a line for this attempt;
        what waited in the temporary files comes first."""
        paths = [Path(folder) / name for name in FILES]
        for path in paths:
            collapse_file(path)
        before = [path.read_bytes() if path.exists() else b"" for path in paths]
        attempt = len(ATTEMPT.findall(before[0])) + 1
        head = f"--- attempt {attempt}, {datetime.now(UTC).isoformat(timespec='seconds')} ---\n"
        # A kill may have come in the middle of a line.
        heads = [b"\n" * bool(re.search(rb"[^\n]\Z", text)) + head.encode() for text in before]
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        files = [os.open(path, flags, 0o666) for path in paths]
        flush()
        waited = [_read_from(number, 0) for number in self._waiting]
        places = []
        for path, file, line, data in zip(paths, files, heads, waited, strict=True):
            write_all(file, line + data)
            places.append((str(path), os.fstat(file).st_size, len(data)))
        self._point_at(files)
        for file, number, data in zip(files, self._waiting, waited, strict=True):
            write_all(file, _read_from(number, len(data)))  # came in between
            os.close(file)
        self.tell({"switch": places})
        self.folder = Path(folder)

    def append(self, text: str) -> bool:
        """Adds a text to stderr.txt; says whether it could."""
        with contextlib.suppress(OSError):  # a full disk
            if self.folder:
                flush()
                with open(self.folder / FILES[1], "a", encoding="utf-8", errors="replace") as file:
                    file.write(text)
                return True
        return False

    def stop(self) -> None:
        """Points 1 and 2 at the terminal again, waits until it has everything, tidies the files."""
        global _active
        _active = None
        self._point_at(self.real)
        if self.folder:
            for name in FILES:
                with contextlib.suppress(OSError):  # a full disk: the file stays as it is
                    collapse_file(self.folder / name)
        if self._control:
            self.tell({"end": True}, wait=None)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(self._follower, 0)
            self._control.close()
        elif not self.folder:
            for number, file in zip(self.real, self._waiting, strict=True):
                with contextlib.suppress(OSError):  # a full disk
                    write_all(number, _read_from(file, 0))
        for number in self.real:
            os.close(number)

    def tell(self, message: dict[str, Any], wait: float | None = 2) -> None:
        """Sends a message to the follower; drops it if that is blocked for long."""
        if self._control is None:
            return
        self._control.settimeout(wait)
        while True:
            try:
                self._control.send(json.dumps(message).encode())
                return
            except OSError as error:
                if wait is not None or isinstance(error, ConnectionError):
                    return
                time.sleep(POLL)  # macOS says that the queue is full instead of waiting

    @staticmethod
    def _point_at(targets: list[int]) -> None:
        flush()
        for number, target in enumerate(targets, start=1):
            os.dup2(target, number)


def _open_closed_descriptors() -> None:
    """A process may be started with 0, 1 or 2 closed; the next file opened would then be stdout."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # it gets the lowest number that is free: this one


def _read_from(file: int, start: int) -> bytes:
    return os.pread(file, os.fstat(file).st_size - start, start)


def write_all(file: int, data: bytes) -> None:
    """Writes to a descriptor until everything is written. Raises OSError."""
    while data:
        data = data[os.write(file, data) :]


# -------------------------------------------------------------------------------- overwritten text


def collapse(text: str) -> str:
    """What a terminal would show, where text was overwritten. A bar leaves its last state."""
    lines, row, column = [""], 0, 0
    for part in CONTROLS.split(text):
        if part == "\n":
            row, column = row + 1, 0
            if row == len(lines):
                lines.append("")
        elif part == "\r":
            column = 0
        elif part == "\b":
            column = max(column - 1, 0)
        elif part == "\x1b[A":
            row = max(row - 1, 0)
        elif part:
            line = lines[row].ljust(column)
            lines[row] = line[:column] + part + line[column + len(part) :]
            column += len(part)
    return "\n".join(lines)


def collapse_file(path: Path) -> None:
    """The same for a file, atomically, from the first line that has something overwritten."""
    data = path.read_bytes() if path.exists() else b""
    first = re.search(rb"\r(?!\n)|\x08|\x1b\[A", data)
    if first:
        start = data.rfind(b"\n", 0, first.start()) + 1
        tail = collapse(data[start:].decode("utf-8", "surrogateescape"))
        tidy = re.sub(r"[ \t]+$", "", tail, flags=re.MULTILINE)
        write_atomically(path, data[:start] + tidy.encode("utf-8", "surrogateescape"))


# ------------------------------------------------------------------------------------ the follower


class _Terminal(io.TextIOBase):
    """The stream that `terminal` returns: its text goes to the follower, which draws it."""

    encoding = "utf-8"

    def __init__(self, capture: Capture) -> None:
        self._capture = capture

    def write(self, text: str) -> int:
        if _active is self._capture:
            for start in range(0, len(text), LONGEST_MESSAGE // 6):  # JSON writes é as six bytes
                piece = text[start : start + LONGEST_MESSAGE // 6]
                printed = [os.fstat(number).st_size for number in (1, 2)]
                self._capture.tell({"bar": piece, "after": printed}, wait=0)
        return len(text)

    def isatty(self) -> bool:
        return True

    def fileno(self) -> int:
        """The terminal's own descriptor: to ask for its width, not to write."""
        return self._capture.real[1]


@dataclass
class _Follower:
    """Runs in a process of its own until it is told to end, or until the other one is gone."""

    control: socket.socket
    real: list[int]
    files: list[int]
    parent: int
    offsets: list[int] = field(default_factory=lambda: [0, 0])
    bar: str = ""
    at_line_start: bool = True

    def run(self) -> None:
        os.setsid()  # Ctrl-C and a closed terminal are meant for the run
        for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            signal.signal(name, signal.SIG_IGN)
        os.dup2(os.open(os.devnull, os.O_RDWR), 0)
        self.control.setblocking(False)
        ends = False
        while not ends:
            select.select([self.control], [], [], POLL)
            ends = os.getppid() != self.parent
            sizes = [os.fstat(file).st_size for file in self.files]  # what is later is below a bar
            while message := self.receive():
                ends = ends or "end" in message
                if "switch" in message:
                    paths, offsets, limits = zip(*message["switch"], strict=True)
                    self.echo(limits)
                    self.files = [os.open(path, os.O_RDONLY) for path in paths]
                    self.offsets, sizes = [*offsets], [*offsets]
                elif "bar" in message:
                    self.draw(message["bar"], message["after"])
            self.echo((sys.maxsize, sys.maxsize) if ends else sizes)
        if self.bar.strip():
            self.send(1, b"\n")

    def receive(self) -> dict[str, Any]:
        with contextlib.suppress(OSError):
            return dict(json.loads(self.control.recv(CHUNK) or b"{}"))
        return {}

    def echo(self, limits: Sequence[int] = (sys.maxsize, sys.maxsize)) -> None:
        """Repeats what is new in both files, up to the limits."""
        for i, file in enumerate(self.files):
            while most := min(CHUNK, max(limits[i] - self.offsets[i], 0)):
                data = os.pread(file, most, self.offsets[i])
                if not data:
                    break
                self.offsets[i] += len(data)
                self.print(i, data)

    def print(self, i: int, data: bytes) -> None:
        """Writes to the real stdout or stderr; a bar is taken away before and put back after."""
        if i == 1 and hidden:
            data = hidden.sub(b"", data)
        if self.bar and self.at_line_start:
            self.send(1, b"\r\x1b[K")
        self.send(i, data)
        if self.real[i] != -1 and os.isatty(self.real[i]):
            self.at_line_start = data.endswith(b"\n") if data else self.at_line_start
        if self.bar and self.at_line_start:
            self.send(1, self.bar.encode())

    def draw(self, text: str, printed: Sequence[int]) -> None:
        """Adds text to the bar's line; lines that it completes stay above it."""
        if "\n" in text:  # what was printed before comes above these lines
            self.echo(printed)
        *complete, bar = collapse(self.bar + text if self.bar else text).split("\n")
        if self.at_line_start:
            above = "".join(f"{line.rstrip()}\n" for line in complete)
            self.send(1, f"\r\x1b[K{above}{bar.rstrip()}".encode())
        self.bar = bar.rstrip()

    def send(self, i: int, data: bytes) -> None:
        try:
            if self.real[i] != -1:
                write_all(self.real[i], data)
        except OSError:  # the terminal was closed, or `| head` has enough
            self.real[i] = -1
