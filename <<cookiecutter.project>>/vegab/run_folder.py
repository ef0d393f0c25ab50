"""Guards run folders: who may open one, a lock that dies with its process; and reads them back."""

import contextlib
import fcntl
import json
import os
import socket
import stat
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from vegab.config import Config, differences, flatten, show_differences
from vegab.exits import UsageError
from vegab.files import CONFIG, LOCK, META, is_run, read_json, remove_partial_files
from vegab.provenance import run_quietly

IN_USE = "is in use by"  # in the sentence of who finds a folder locked
LOCKED = (BlockingIOError, PermissionError)  # what lockf raises where another process has the lock

# Folders that this process has locked. A record lock is lost as soon as its process closes *any*
# descriptor of the file, so nothing in this process may open the lock file of a folder in here.
_locked_here: set[str] = set()


class AlreadyFinished(Exception):  # noqa: N818 (it is news, not an error)
    """The same command ran to its end in this folder before."""


class RunFolder:
    """The folder of one run, for the one process that may write to it. `check` looks and touches
    nothing; `open` makes it and takes the lock; `close` gives that back. `path` is as it was typed,
    `absolute` is right wherever the function goes. `completed` gives an older config its younger
    keys. A finished run that is not `is_whole` is continued."""

    def __init__(
        self,
        save_path: str,
        config: Config,
        extendable: Iterable[str],
        completed: Callable[[Config], Config] = dict,
        is_whole: Callable[[str], bool] = lambda path: True,
    ) -> None:
        if not save_path.strip():
            raise UsageError("SAVE_PATH is empty; give the folder of the run, as results/run")
        self.path = os.path.normpath(save_path)
        self.absolute = os.path.abspath(save_path)
        self.config, self.extendable, self.completed = config, tuple(extendable), completed
        self.is_whole = is_whole
        self._lock: int | None = None

    def check(self, writes: bool = True) -> None:
        """Raises UsageError if the folder cannot be this run's, AlreadyFinished if it is done."""
        try:
            self._check_writable()
            content = os.listdir(self.absolute) if os.path.exists(self.absolute) else []
            if content and not is_run(self.absolute):
                raise UsageError(f"{self.path} holds files but no run; choose a new or empty one")
        except OSError as error:
            raise UsageError(f"{self.path}: {error.strerror}; choose another SAVE_PATH") from None
        refuse_links(self.absolute, self.path)
        owner = living_owner(self.absolute) if writes else None
        if owner:
            hint = "wait for it, stop it, or choose another SAVE_PATH"
            who = f"process {owner['pid']} on {owner['host']}"
            raise UsageError(f"{self.path} {IN_USE} {who}; {hint}")
        self._check_config()

    def open(self) -> None:
        """Makes the folder and takes the lock. Raises UsageError if another process was faster."""
        self._lock = take_lock(self.absolute, LOCK, self.path, self._check_config)
        _locked_here.add(os.path.realpath(self.absolute))
        for folder in (Path(self.absolute), Path(self.absolute, "checkpoints")):
            remove_partial_files(folder)

    def close(self) -> None:
        """Gives the lock back. The file stays: who removes a lock file takes it from another."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
            _locked_here.discard(os.path.realpath(self.absolute))

    def _check_writable(self) -> None:
        place = self.absolute
        while not os.path.lexists(place):
            place = os.path.dirname(place)
        shown = self.path if place == self.absolute else f"{self.path}: {os.path.relpath(place)}"
        if not os.path.isdir(place):
            raise UsageError(f"{shown} is not a folder; choose another SAVE_PATH")
        if not os.access(place, os.R_OK | os.W_OK | os.X_OK):
            raise UsageError(f"{shown} is not writable; choose another SAVE_PATH")

    def _check_config(self) -> None:
        before, meta = (read_json(Path(self.absolute, name)) for name in (CONFIG, META))
        if not isinstance(before, dict):
            return
        changes = differences(self.completed(before), self.config)
        refused = {
            key: (old, new)
            for key, (old, new) in changes.items()
            if key not in self.extendable or {type(old), type(new)} - {int, float} or new <= old
        }
        if refused:
            what = f"a run with another config ({show_differences(refused)})"
            raise UsageError(f"{self.path} holds {what}; choose another SAVE_PATH")
        meta = meta or {}
        if meta.get("status") != "finished" or not self.is_whole(self.path) or changes:
            return
        position = (meta.get("attempts") or [{}])[-1].get("to") or {}
        reached = ", ".join(f"{name} {value}" for name, value in position.items())
        numbers = [k for k, value in flatten(self.config).items() if type(value) in (int, float)]
        growing = " or ".join(f"--{key}" for key in numbers if key in self.extendable)
        sentence = f"{self.path} is already finished" + (f" ({reached})." if reached else ".")
        raise AlreadyFinished(sentence + f" A larger {growing} continues it." * bool(growing))


def take_lock(
    folder: str | Path, name: str, shown: str | Path, check: Callable[[], None] = lambda: None
) -> int:
    """Makes a folder, takes the lock that its file `name` is, and returns what to close. Nothing is
    written before `check` was called. Raises UsageError, naming the folder as `shown`."""
    try:
        os.makedirs(folder, exist_ok=True)
        lock = os.open(os.path.join(folder, name), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        raise UsageError(f"{shown}: {error.strerror}; choose another SAVE_PATH") from None
    try:
        # A process that only looks whether the folder is in use holds the lock for a moment.
        for wait in (0.05, 0.1, 0.2, 0):
            try:
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except LOCKED:
                time.sleep(wait)
            except OSError as error:
                wrong = f"this file system has no file locks ({error.strerror})"
                hint = "choose a SAVE_PATH on another one"
                raise UsageError(f"{shown}: {wrong}; {hint}") from None
        else:
            raise UsageError(f"{shown} {IN_USE} another process that was faster")
        check()
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"{json.dumps(_this_process())}\n".encode(), 0)
    except BaseException:
        os.close(lock)
        raise
    return lock


def _this_process() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid(), "start": start_of(os.getpid())}


def start_of(pid: int) -> str | None:
    """When a process of this machine began, in its system's own words; None if there is none."""
    try:
        # Fields from the third on, after a name that may hold blanks: see proc(5).
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:  # macOS has no /proc
        said = run_quietly("ps", "-o", "lstart=", "-p", str(pid))
        return said.decode().strip() or None if said else None


def refuse_links(folder: str | Path, shown: str | Path) -> None:
    """Raises UsageError if a run folder has pipes, which would be waited for, or links that lead
    out of it. Below its first level a link to a file may stay, as trackers make them: what is
    written there takes its place. Folders of other runs in it are looked at by who opens these."""
    real = os.path.realpath(folder)
    for place, folders, files in os.walk(real):
        if place != real and {CONFIG, LOCK} & {*files}:
            folders.clear()
            continue
        for path in (os.path.join(place, name) for name in (*folders, *files)):
            name = f"{shown}: {os.path.relpath(path, real)}"
            try:
                mode = os.lstat(path).st_mode
            except FileNotFoundError:  # an evaluation writes there, and has just renamed it
                continue
            if stat.S_ISLNK(mode):
                is_inside = os.path.realpath(path).startswith(f"{real}{os.sep}")
                if is_inside or (place != real and os.path.isfile(path)):
                    continue
                what = "a link that leads out of the folder, and a run writes into no other"
                raise UsageError(f"{name} is {what}; remove it, or choose another folder")
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                raise UsageError(f"{name} is not a file; remove it")


def living_owner(path: str | Path, name: str = LOCK) -> dict[str, Any] | None:
    """Who holds the lock of a run folder, as {"host", "pid", "start"}, or None. Touches nothing.
    `name` is that of the lock file, where the folder is not a run's. What the lock says is only
    true if `start` is that of the process, see `start_of`."""
    path = Path(path)
    if os.path.realpath(path) in _locked_here:
        return _this_process()
    try:
        lock = os.open(path / name, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.lockf(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return None
    except LOCKED:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            owner = json.loads(os.read(lock, 4096))
            return {"host": owner["host"], "pid": owner["pid"], "start": owner.get("start")}
        return {"host": "an unknown host", "pid": "(unknown)", "start": None}
    except OSError:
        return None
    finally:
        os.close(lock)


def read_run(path: str | Path) -> dict[str, Any]:
    """A run folder as `{"config": …, "meta": …, "state": …}`. The state is one of running,
    finished, interrupted, failed, died (it was running, and its process is no more) and new
    (nothing ran here). Raises UsageError if a file is broken."""
    path = Path(path)
    config, meta = read_json(path / CONFIG), read_json(path / META)
    if not all(isinstance(content, dict | None) for content in (config, meta)):
        raise UsageError(f"{path}: its {CONFIG} or {META} holds no mapping; put a good one back")
    state = state_now(path, (meta or {}).get("status", "new"))
    return {"config": config or {}, "meta": meta or {}, "state": state}


def state_now(path: str | Path, status: str) -> str:
    """What a run's recorded status comes to: one that was running may have died."""
    if living_owner(path):
        return "running"
    return "died" if status == "running" else status
