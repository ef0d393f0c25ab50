"""Cuts back the files that callbacks and hooks append to, to their length at a checkpoint."""

import contextlib
import io
import os
import sys
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from engine.checkpoints import HISTORY_CSV, LOOP_STATE, callback_state
from engine.training.objects import walk
from vegab.files import PARTIAL, read_json, write_json

FILE = "appended.json"  # no part of a checkpoint: TensorBoard's names have the time in them
WITH_WRITERS = ("tensorflow.", "tensorboard.", "keras.")
BEGIN = "begin"  # the lengths with which files were opened
# What the project itself writes; it looks after these.
OWN = ("stdout.txt", "stderr.txt", "timing.csv", "run.lock", HISTORY_CSV, LOOP_STATE, FILE)
Lengths = dict[str, int]
_listening: list["AppendedFiles"] = []
_hooked: list[bool] = []


class AppendedFiles:
    """The files in `root` that others append to; what is `passed_by`, as the model, does not."""

    def __init__(self, root: Path, passed_by: Sequence[Any] = ()) -> None:
        self.root = root
        self._passed_by = passed_by
        self._lock = threading.RLock()  # checkpoints are written in a thread of their own
        known = read_json(root / FILE)
        self._known: dict[str, Lengths] = known if isinstance(known, dict) else {}
        self._names: set[str] = set()
        self._before: set[str] = set()

    def cut(self, checkpoint: str, owners: Iterable[Any]) -> None:
        """Cut files back to what they were at a checkpoint, named by its digest."""
        texts = [
            os.path.abspath(value)
            for reached in walk({"": list(owners)}, self._passed_by)
            for value in callback_state.attributes_of(reached.thing).values()
            if isinstance(value, str | os.PathLike)
        ]
        # A stranger may have written the list: outside of the folder, only what they name counts.
        lengths = self._known.get(BEGIN, {}) | self._known.get(checkpoint, {})
        for name, length in lengths.items():
            path = os.path.abspath(self.root / name)
            is_inside = os.path.realpath(path).startswith(os.path.realpath(self.root) + os.sep)
            is_meant = (is_inside or path in texts) and not os.path.islink(path)
            if is_meant and os.path.isfile(path) and os.path.getsize(path) > length:
                os.truncate(path, length)
        self._names = set(self._known.get(checkpoint, {}))

    def listen(self) -> None:
        """From now on, note the files that are opened."""
        self._before = _open_files(set())
        if not _hooked:
            _hooked.append(True)
            sys.addaudithook(_note)  # which stays for as long as the process lives
        _listening[:] = [self]

    def stop(self) -> None:
        """Note no more."""
        _listening.clear()

    def keep_first(self, lengths: Lengths) -> None:
        """Keep the lengths that files have before anything is appended."""
        with self._lock:
            known = self._known.get(BEGIN, {})
            if lengths.keys() - known.keys():
                self._known[BEGIN] = lengths | known
                write_json(self.root / FILE, self._known)

    def lengths(self, owners: Iterable[Any]) -> Lengths:
        """Return the lengths of the files now, after what callbacks and hooks hold is written."""
        for reached in walk({"": list(owners)}, self._passed_by):
            kind = type(reached.thing)
            if issubclass(kind, io.IOBase) and not reached.thing.closed:
                reached.thing.flush()
                if isinstance(name := getattr(reached.thing, "name", None), str):
                    self._names.add(self._name(os.path.abspath(name)))
            elif hasattr(kind, "flush") and kind.__module__.startswith(WITH_WRITERS):
                reached.thing.flush()
        names = self._names | {self._name(path) for path in _open_files(self._before)}
        found: Lengths = {}
        for name in sorted(filter(None, names)):
            path = self.root / name
            with contextlib.suppress(OSError):  # it may have gone just now
                if path.is_file():
                    found[name] = path.stat().st_size
        self._names = {*found}
        return found

    def keep(self, checkpoint: str, lengths: Lengths, before: str) -> None:
        """Keep the lengths of a checkpoint that is about to be seen, and of the one before it."""
        with self._lock:
            if lengths or self._known:
                kept = {key: self._known[key] for key in (BEGIN, before) if key in self._known}
                self._known = kept | {checkpoint: lengths}
                write_json(self.root / FILE, self._known)

    def note(self, path: str) -> None:
        """Note a file that is opened to append to it, before anything is appended."""
        name = self._name(os.path.abspath(path))
        if name and name not in self._names:
            length = os.path.getsize(path) if os.path.isfile(path) else 0
            with self._lock:
                self._names.add(name)
                self.keep_first({name: length})

    def _name(self, path: str) -> str:
        """Return a path relative to the run folder; "" for what the project itself writes."""
        name = os.path.relpath(path, self.root)
        is_own = name in OWN or name.endswith(PARTIAL)
        return "" if is_own or path.startswith(("/dev/", "/proc/")) else name


def _open_files(known: set[str]) -> set[str]:
    """Return the regular files that this process may write to, without those that are known."""
    found = set()
    for link in Path("/proc/self/fd").glob("*"):  # on Linux
        try:
            path = os.readlink(link)
            if path in known or not os.path.isfile(path):
                continue
            info = Path(f"/proc/self/fdinfo/{link.name}").read_text()
        except OSError:
            continue  # it was open for this listing
        if int(info.partition("flags:")[2].split()[0], 8) & os.O_ACCMODE != os.O_RDONLY:
            found.add(path)
    return found


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and _listening and isinstance(arguments[0], str | os.PathLike):
        path, mode, flags = arguments
        if (isinstance(mode, str) and "a" in mode) or (flags or 0) & os.O_APPEND:
            _listening[0].note(os.fspath(path))
