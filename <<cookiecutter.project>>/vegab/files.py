"""Replaces files and folders in one step, and names what lies where."""

import contextlib
import errno
import json
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vegab.exits import UsageError

ROOT = Path(__file__).resolve().parents[1]  # of the code that runs
PLACE = ".code"  # where unpacked snapshots lie in the project, see `snapshot`
PROJECT = ROOT.parents[1] if ROOT.parent.name == PLACE else ROOT
LOCK, CONFIG, META = "run.lock", "config.json", "meta.json"  # what makes a folder that of a run
PARTIAL = ".partial"  # ends the name of a file that is being written
LARGEST_READ = 300_000_000  # bytes; the history of a million epochs has 83 million
MOST_LEVELS, MOST_VALUES = 100, 2_000_000  # of what is nested
# What there is in a meta.json, where it is there; null only at a key with a question mark.
_ATTEMPT = {"start": str, "git_commit?": str, "from?": dict, "to?": dict, "code": {"file": str}}
META_FORM = {
    **{"status": str, "attempts": [_ATTEMPT], "git?": dict, "flags?": dict},
    **{"command": {"line": str, "script": str, "folder": str}, "packages": {...: str}},
    **{"parent?": {"path": str, "from_step": int}, "environment": {...: str}},
}
FORMAT = 1  # of meta.json, whose number counts for config.json, too, and of sweep.json


@contextlib.contextmanager
def replacing(path: str | Path, sync: bool = True) -> Iterator[Path]:
    """A path to write a new file at, which takes the place of `path` at the end of the block. A
    reader, and a kill, find the old content or the new. If the block fails, the old one stays. With
    `sync` the new one is on the disk at the end, so that a power cut cannot take it."""
    path = Path(path)
    # Nobody can lay a link there before, because the name is not known.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}{PARTIAL}")
    os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666))
    try:
        yield temporary
        if sync:
            sync_to_disk(temporary)
        os.replace(temporary, path)
        if sync:
            sync_to_disk(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def remove_partial_files(folder: Path, *names: str) -> None:
    """Removes what a process that was killed had begun to write: of these files, which nobody else
    may write meanwhile, or of all in a folder."""
    for path in (path for name in names or "*" for path in folder.glob(f".{name}.*{PARTIAL}")):
        if path.is_file():
            path.unlink(missing_ok=True)


def write_atomically(path: str | Path, content: str | bytes, sync: bool = True) -> None:
    """Replaces the content of a file; see `replacing`."""
    with replacing(path, sync) as temporary:
        text = content if isinstance(content, bytes) else content.encode(errors="replace")
        temporary.write_bytes(text)


@contextlib.contextmanager
def replacing_folder(path: str | Path) -> Iterator[Path]:
    """An empty folder to fill, which takes the place of `path` at the end of the block. A kill
    leaves the old one or the new one, whole. If the block fails, the old one stays."""
    path = Path(path)
    partial, old = (path.with_name(f".{path.name}.{kind}") for kind in ("partial", "old"))
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(partial, ignore_errors=True)  # left by a process that was killed
    partial.mkdir()
    try:
        yield partial
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.replace(path, old)
        os.replace(partial, path)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def link(source: Path, target: Path) -> None:
    """Makes `target` another name of a file, in one step; a copy where there are no hard links."""
    with replacing(target, sync=False) as temporary:
        temporary.unlink(missing_ok=True)
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)
            sync_to_disk(temporary)


def inode_of(path: str | Path) -> int | None:
    """The number by which the file system knows a file or folder, or None if there is none."""
    try:
        return os.stat(path).st_ino
    except OSError:
        return None


def sync_to_disk(path: str | Path) -> None:
    """Has a file or folder on the disk, not only in the system's memory, on return."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: str | Path, value: Any) -> None:
    """Replaces a file by a value as JSON; see `replacing`."""
    write_atomically(path, json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")


def leads_out(name: Any) -> bool:
    """Does a path that somebody else may have written lead out of its folder, or is it none?"""
    path = Path(name) if isinstance(name, str) else Path()
    return path.is_absolute() or ".." in path.parts or not path.parts or "\0" in str(path)


def read_bytes(path: str | Path, inside: str | Path | None = None) -> bytes:
    """A file's content, which somebody else may have made: OSError if it is a pipe, which would be
    waited for, or very large, or if a link leads out of the folder `inside`."""
    real = os.path.realpath(path)
    if inside is not None and not real.startswith(os.path.join(os.path.realpath(inside), "")):
        raise OSError(errno.ELOOP, "it is a link that leads out of the folder", str(path))
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "it is not a file", str(path))
        if status.st_size > LARGEST_READ:
            raise OSError(errno.EFBIG, f"it is larger than {LARGEST_READ:,} bytes", str(path))
        return file.read()


def is_modest(value: Any) -> bool:
    """Can a value be gone through? It counts how often each part occurs in it, and how deep."""
    parts, num_values = [value], 0
    for _ in range(MOST_LEVELS):
        parts = [part for part in parts if isinstance(part, dict | list | tuple)]
        num_values += sum(map(len, parts))
        if num_values > MOST_VALUES:
            return False
        parts = [item for p in parts for item in (p.values() if isinstance(p, dict) else p)]
    return not parts


def misfit(value: Any, form: Any, at: str = "") -> str:
    """Where a value that somebody else may have written is not of a form, as `.a.0.b`, or ""."""
    if isinstance(form, type) or not isinstance(value, type(form)):
        return "" if isinstance(form, type) and isinstance(value, form) else at or "."
    if isinstance(form, list):
        pairs: Any = [(n, form[0]) for n in range(len(value))]
    else:
        pairs = [(key, form.get(key, form.get(...))) for key in value]
        pairs += [(k, form[f"{k}?"]) for k in value if f"{k}?" in form and value[k] is not None]
    found = (misfit(value[k], wanted, f"{at}.{k}") for k, wanted in pairs if wanted is not None)
    return next(filter(None, found), "")


def is_run(folder: str | Path) -> bool:
    """Is it the folder of a run, by what lies in it?"""
    if os.path.lexists(os.path.join(folder, LOCK)):
        return True
    config, meta = (read_json(os.path.join(folder, name)) for name in (CONFIG, META))
    return isinstance(config, dict) and isinstance(meta, dict) and "attempts" in meta


def read_json(path: str | Path, inside: str | Path | None = None) -> Any:
    """A JSON file's content, or None without one; UsageError if broken, or of a newer format. For
    `inside`, by default its folder, see `read_bytes`."""
    is_record = Path(path).name in (CONFIG, META)
    hint = "; put a good one back, or delete it: training writes it again" if is_record else ""
    try:
        content = json.loads(read_bytes(path, inside or Path(path).parent).decode())
        if not is_modest(content):
            raise RecursionError
    except (FileNotFoundError, NotADirectoryError):
        return None
    except RecursionError:
        raise UsageError(f"cannot read {path}: it is nested too deeply{hint}") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read {path}: {error}{hint}") from None
    key = misfit(content, META_FORM)[1:] if Path(path).name == META else ""
    if key:  # not of what is no mapping at all
        raise UsageError(f"cannot read {path}: its {key} is of another form; put a good one back")
    is_config = Path(path).name == CONFIG  # where a key of this name is the owner's
    found = content.get("format") if isinstance(content, dict) and not is_config else None
    if isinstance(found, int) and found > FORMAT:
        known = f"this version of the project knows {FORMAT}; use the newer version that wrote it"
        raise UsageError(f"cannot read {path}: its format is {found}, and {known}")
    return content
