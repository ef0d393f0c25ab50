"""Keeps a project's source as it ran in one file, reads it back, and runs the project from it.

All of the source is kept, whatever git thinks of it: submodules and clones inside with their
changes, and linked files with their content. Data and secrets are left out, and listed."""

import contextlib
import hashlib
import heapq
import io
import itertools
import json
import os
import shutil
import sys
import tempfile
import time
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from glob import glob
from pathlib import Path
from typing import Any

import vegab.files
from vegab.exits import UsageError
from vegab.files import CONFIG, LOCK, META, PLACE, PROJECT, ROOT, leads_out, read_json, replacing
from vegab.provenance import GitError, describe_git, git, is_secret, names_in

CODE, PATCH, RECORD = "code.zip", "uncommitted.diff", ".provenance.json"
FLAG = "--own_code"
# What is not Python counts as data where a file, or all below a folder, is more than this.
LARGEST_FILE, MOST_BYTES, MOST_FILES = 1_000_000, 20_000_000, 1000
MOST_ENTRIES = 100_000  # that are looked at, in all
# Bytes of a file that somebody else may have made: packed, and unpacked.
LARGEST_ZIP, LARGEST_CODE = 100_000_000, 300_000_000
RECORD_FORM = {"left_out": [{"path": str, "why": str}], "git?": {"commit?": str}}
NOT_SOURCE = (".git", "__pycache__", "node_modules")
# Without these a run computes the same.
PROSE = ("docs/", "etc/", "tests/", "notebooks/")
UNUSED = 90 * 86400  # seconds after which unpacked code is removed
Files = Mapping[str, bytes]


@dataclass
class Snapshot:
    """The source as it is now, and what is known of it."""

    files: Files
    record: dict[str, Any]  # sha256 of names and contents; git; left_out
    patch: bytes = b""  # the uncommitted part

    def write(self, path: Path) -> None:
        """Writes it as one file, whose bytes depend on nothing but the source and git's answer."""
        told = {RECORD: json.dumps(self.record).encode()}
        told |= {PATCH: self.patch} if self.patch else {}
        with replacing(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
            for name, content in sorted({**self.files, **told}.items()):
                info = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
                mode = 0o755 if os.access(ROOT / name, os.X_OK) else 0o644
                info.external_attr = (0o100000 | mode) << 16
                archive.writestr(info, content, zipfile.ZIP_DEFLATED)


def take() -> Snapshot:
    """Takes the source as it is now; where this process runs from a snapshot, that one."""
    if PROJECT != ROOT:
        return load(ROOT / CODE)
    walk = _Walk()
    walk.everywhere()
    for module in [*sys.modules.values()]:  # in use, though git may be told to ignore it
        file = Path(getattr(module, "__file__", None) or "/")
        if file.suffix == ".py" and file.is_relative_to(ROOT) and "site-packages" not in file.parts:
            walk.take(file, is_in_use=True)
    files = walk.read()
    left_out = [walk.left_out[name] for name in sorted(walk.left_out.keys() - files.keys())]
    about, patch, unchanged = describe_git(files, walk.tracked)
    for entry in left_out:
        if entry["path"] in unchanged:
            entry["git"] = "unchanged"
    return Snapshot(files, {"sha256": _digest(files), "git": about, "left_out": left_out}, patch)


def load(path: Path) -> Snapshot:
    """Reads a snapshot back; raises UsageError if it is broken."""
    files = dict(read(path))
    patch, record = files.pop(PATCH, b""), files.pop(RECORD, b"{}")
    try:
        # What it says of its own digest is not believed: unpacked code is found again by that.
        told = {**json.loads(record), "sha256": _digest(files)}
        if wrong := vegab.files.misfit(told, RECORD_FORM):
            raise ValueError(f"{wrong[1:]} is of another form")
        return Snapshot(files, told, patch)
    except (ValueError, TypeError, RecursionError) as error:
        raise UsageError(f"cannot read {path}: its {RECORD} is broken ({error})") from None


def _digest(files: Files) -> str:
    sums = (f"{name}\0{hashlib.sha256(files[name]).hexdigest()}\n" for name in sorted(files))
    return hashlib.sha256("".join(sums).encode(errors="surrogateescape")).hexdigest()


def read(path: Path) -> Files:
    """Returns what a snapshot holds, by name, without what Python has compiled, perhaps from other
    source. Links are not followed. Raises UsageError if that fails."""
    try:
        if path.is_symlink():
            raise ValueError("it is a link")
        content = vegab.files.read_bytes(path, path.parent)
        # Each file has this signature in the listing, which would be read as a whole.
        if len(content) > LARGEST_ZIP or content.count(b"PK\1\2") > MOST_ENTRIES:
            raise ValueError(f"its {len(content):,} bytes are more than the code of a project")
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            every = archive.infolist()
            members = [info for info in every if not info.filename.endswith(("/", ".pyc"))]
            if sum(info.file_size for info in members) > LARGEST_CODE:
                raise ValueError(f"it unpacks to more than {LARGEST_CODE:,} bytes")
            for info in members:
                if leads_out(info.filename):
                    raise ValueError(f"it names {info.filename!r}, outside of the project")
            return {info.filename: archive.read(info) for info in members}
    except FileNotFoundError:
        raise UsageError(f"{path} is gone, and with it the source that was run") from None
    except Exception as error:  # whatever a damaged archive makes of itself
        raise UsageError(f"cannot read {path}: {error}") from None


def differing(one: Files, other: Files) -> list[str]:
    """Returns the files that are not the same in two snapshots, sorted."""
    names = {name for name in {*one, *other} if one.get(name) != other.get(name)}
    return sorted(names - {PATCH, RECORD})


def differing_source(one: Files, other: Files) -> list[str]:
    """The same without prose, tests and data."""
    names = (name for name in differing(one, other) if not name.endswith(".md"))
    return [name for name in names if not name.startswith((*PROSE, "data/"))]


# ------------------------------------------------------------------------------------ what is kept


class _Walk:
    """Looks at every file of the project once."""

    def __init__(self) -> None:
        self.files: set[str] = set()
        self.left_out: dict[str, dict[str, Any]] = {}
        self.tracked: set[str] = set()
        self.ignored: set[str] = set()
        with contextlib.suppress(GitError):
            self.tracked = names_in(git("ls-files", "-z", "--cached"))

    def everywhere(self) -> None:
        """Takes the project's files, of small folders first, but for too much that is no Python."""
        num_seen, waiting = 0, [self._entries_of(ROOT)]
        sizes: dict[Path, dict[str, int]] = {}  # of files that are not Python, by folder
        while waiting:
            num_entries, folder, names, files = heapq.heappop(waiting)
            num_seen += num_entries
            if num_seen > MOST_ENTRIES:
                self.leave_out(folder, "data", [os.path.join(folder, name) for name in files])
                continue
            if folder == ROOT or ".git" in (*names, *files):  # a repository of its own
                self._ask_what_is_ignored(folder)
            for name in filter(lambda name: self._may_be_source(folder / name), names):
                heapq.heappush(waiting, self._entries_of(folder / name))
            sizes[folder] = {}
            for name in sorted(set(files) - set(NOT_SOURCE)):
                sizes[folder] |= self.take(folder / name)
        for folder in sorted(sizes, key=lambda folder: len(folder.parts), reverse=True):
            found = sizes[folder]
            if len(found) > MOST_FILES or sum(found.values()) > MOST_BYTES:
                self.files -= found.keys()
                self.leave_out(folder, "data", [str(ROOT / name) for name in found])
            elif folder.parent not in (ROOT, ROOT.parent):
                sizes[folder.parent] |= found

    def _entries_of(self, folder: Path) -> tuple[int, Path, list[str], list[str]]:
        _, names, files = next(os.walk(folder, onerror=self._unread), ("", [], []))
        return len(names) + len(files), folder, names, files

    def _unread(self, error: OSError) -> None:
        self.leave_out(Path(error.filename), error.strerror or "cannot be read")

    def _ask_what_is_ignored(self, repository: Path) -> None:
        words = ("ls-files", "-z", "--others", "--ignored", "--exclude-standard", "--directory")
        with contextlib.suppress(GitError):
            listing = names_in(git("-C", str(repository), *words))
            self.ignored |= {os.path.normpath(repository / name) for name in listing}

    def _may_be_source(self, path: Path) -> bool:
        is_ignored = str(path) in self.ignored
        hidden = path.name.startswith(".") and (not self.tracked or is_ignored)
        is_run = (path / META).exists() and (path / CONFIG).exists()
        is_other = is_run or (path / "pyvenv.cfg").exists() or (path / LOCK).exists()
        if path in (ROOT / PLACE, ROOT / "results") or path.name in NOT_SOURCE:
            return False
        above = map(os.path.realpath, path.parents)
        goes_round = path.is_symlink() and os.path.realpath(path) in above
        if hidden or is_other or goes_round:
            return False
        if is_ignored:
            walk = ((here, name) for here, _, names in os.walk(path) for name in names)
            files = itertools.islice(walk, MOST_ENTRIES // 10)
            self.leave_out(path, "data", [os.path.join(*file) for file in files])
        return not is_ignored

    def take(self, path: Path, is_in_use: bool = False) -> dict[str, int]:
        """Takes a file; returns its name and size if it may turn out to be data."""
        name, is_python = str(path.relative_to(ROOT)), path.suffix == ".py"
        if is_secret(name, self.tracked):
            self.leave_out(path, "secret")
        elif str(path) in self.ignored and not is_in_use:
            if not (is_python or path.suffix == ".pyc" or path.name.startswith(".")):
                self.leave_out(path, "data")
        elif not path.is_file():
            self.leave_out(path, "no file, or a link that leads nowhere")
        elif not is_python and path.stat().st_size > LARGEST_FILE:
            self.leave_out(path, "data")
        else:
            self.files.add(name)
            return {} if is_python else {name: path.stat().st_size}
        return {}

    def read(self) -> dict[str, bytes]:
        """Returns the content of what was taken."""
        contents = {}
        for name in sorted(self.files):
            try:
                name.encode()  # a zip file has names in UTF-8 only
                contents[name] = (ROOT / name).read_bytes()
            except (OSError, UnicodeEncodeError) as error:
                why = getattr(error, "strerror", None) or "its name is not UTF-8"
                self.leave_out(ROOT / name, why)
        return contents

    def leave_out(self, path: Path, why: str, files: Sequence[str] | None = None) -> None:
        """Lists a file, or a folder with the number, size and latest change of files in it."""
        found = [os.lstat(f) for f in ([path] if files is None else files) if os.path.lexists(f)]
        name = os.path.relpath(path, ROOT)
        changed = max((int(status.st_mtime) for status in found), default=0)
        self.left_out[name] = {
            "path": os.fsencode(name).decode(errors="backslashreplace"),
            "why": why,
            "bytes": sum(status.st_size for status in found),
            "changed": datetime.fromtimestamp(changed, UTC).isoformat(),
            **({} if files is None else {"files": len(files)}),
        }


# -------------------------------------------------------------------------- running from a snapshot


def unpack(snapshot: Snapshot, place: Path) -> list[str]:
    """Writes a snapshot's files into a new folder, and links there what the project has of what
    was left out, and of data/; returns the paths of these links."""
    for name, content in snapshot.files.items():
        target = place / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
    names = [entry["path"] for entry in snapshot.record.get("left_out", []) if "path" in entry]
    names = [name for name in names if not leads_out(name)]
    links = [link for name in [*names, "data"] for link in _link(PROJECT / name, place / name)]
    return [os.path.relpath(path, place) for path in links]


def _link(source: Path, target: Path) -> list[Path]:
    """Links what a folder has, and another one, which may be missing, has not."""
    if source.is_dir() and target.is_dir():
        pairs = [(path, target / path.name) for path in sorted(source.iterdir())]
        return [link for pair in pairs for link in _link(*pair)]
    if not source.exists() or os.path.lexists(target):
        return []
    target.parent.mkdir(parents=True, exist_ok=True)
    target.symlink_to(source)
    return [target]


def freeze(snapshot: Snapshot) -> Path:
    """Returns a folder with the project as a snapshot has it. Processes that run from there go on
    with it, whatever becomes of the project; data/ is the project's."""
    places = PROJECT / PLACE
    place = places / str(snapshot.record["sha256"])[:16]
    if not place.is_dir():
        places.mkdir(exist_ok=True)
        (places / ".gitignore").write_text("*\n")
        for old in places.iterdir():
            if old.is_dir() and old.stat().st_mtime < time.time() - UNUSED:
                shutil.rmtree(old, ignore_errors=True)
        partial = Path(tempfile.mkdtemp(dir=places, prefix=".partial-"))
        unpack(snapshot, partial)
        snapshot.write(partial / CODE)
        with contextlib.suppress(OSError):  # another process was faster
            os.rename(partial, place)
        shutil.rmtree(partial, ignore_errors=True)
    os.utime(place)
    return place


def keep(snapshot: Snapshot, path: Path) -> None:
    """Writes a snapshot to a file; one that this process runs from gets another name only."""
    if PROJECT != ROOT:
        vegab.files.link(ROOT / CODE, path)
    else:
        snapshot.write(path)


def code_of(folder: Path) -> Path | None:
    """Returns the file with the code of a run's latest attempt, or of a sweep; None without one."""
    meta, name = read_json(folder / META), CODE
    with contextlib.suppress(AttributeError, IndexError, KeyError, TypeError):
        name = meta["attempts"][-1]["code"]["file"]
    return None if leads_out(name) or not (folder / name).exists() else folder / name


def go_on_from(began: Path | None = None) -> None:
    """Runs this command again from a snapshot of the project, so that all that it starts, at
    whatever time, has the source as it is now. `began` is a snapshot of what it goes on with:
    raises UsageError if the project has other source meanwhile."""
    if PROJECT != ROOT:
        return
    now = take()
    if began and began.exists() and (names := differing_source(load(began).files, now.files)):
        hint = f"add {FLAG} to go on with that, or choose another folder"
        raise UsageError(f"{began.parent} began with other code ({', '.join(names[:3])}); {hint}")
    script = os.path.relpath(os.path.realpath(sys.argv[0]), ROOT)
    os.execv(sys.executable, [sys.executable, str(freeze(now) / script), *sys.argv[1:]])


def go_back(arguments: list[str]) -> None:
    """Runs the program from the code of the runs that a command line names, where it says so."""
    if FLAG not in arguments or PROJECT != ROOT:
        return
    words = [word for word in arguments if not word.startswith("-")]
    paths = [path for word in words for path in ([word] if os.path.exists(word) else glob(word))]
    codes = [code for path in paths if (code := code_of(Path(path)))]
    if not codes:
        raise UsageError(f"{FLAG} needs the folder of a run that has begun, as SAVE_PATH or RUN")
    snapshots = {each.record["sha256"]: each for each in map(load, codes)}
    if len(snapshots) > 1:
        raise UsageError(f"{FLAG}: these runs ran different code; name one at a time")
    script = os.path.relpath(os.path.realpath(sys.argv[0]), ROOT)
    (snapshot,) = snapshots.values()
    if script not in snapshot.files:
        raise UsageError(f"{codes[0]} has no {script}")
    try:
        place = freeze(snapshot)
    except OSError as error:
        raise UsageError(f"cannot unpack {codes[0]}: {error}") from None
    os.execv(sys.executable, [sys.executable, str(place / script), *arguments])
