"""Many states of a run folder, each looked at as a resume does: NAME OUTPUT ARGUMENTS.

Run by the fork server in a generated project, for `engine.checkpoints.checkpoint` needs Keras.
"""

from __future__ import annotations

import itertools
import json
import logging
import random
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fault_lab import read_trace

from engine.checkpoints.checkpoint import DamagedCheckpointError, latest_good

COMMITS = ("model.h5", "model_previous.h5", "model_best.h5")


def damage(run: str, count: str) -> dict[str, Any]:
    """Damage the newest commit in many ways; the one before it must be used each time."""
    chance = random.Random(0)
    newest, before = (Path(run, name).read_bytes() for name in COMMITS[:2])
    undetected = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for number in range(int(count)):
            content = bytearray(newest)
            kind = ("flip", "cut", "zero")[number % 3]
            place = chance.randrange(len(content)) if number % 4 else chance.randrange(600)
            if kind == "flip":
                content[place] ^= 1 << chance.randrange(8)
            elif kind == "cut":
                del content[place:]
            else:
                length = chance.randint(1, 4096)
                content[place : place + length] = bytes(len(content[place : place + length]))
            if content == newest:
                content.append(0)  # what was zeroed was zero already
            (folder / "model.h5").write_bytes(content)
            (folder / "model_previous.h5").write_bytes(before)
            good = latest_good(folder)
            if good is None or good.read_bytes() != before:
                undetected.append([kind, place])
            for path in folder.iterdir():
                path.unlink()
    return {"tried": int(count), "undetected": undetected}


@dataclass(eq=False)
class Inode:
    """A file's bytes that are on the disk for certain, and the writes that may not be."""

    durable: bytes = b""
    pending: list[tuple[int, bytes]] = field(default_factory=list)

    def contents(self, chance: random.Random) -> list[bytes]:
        """What a power cut may leave: nothing, a part, parts in any order, or all of it."""
        if not self.pending:
            return [self.durable]
        full = self.written(self.pending)
        found = [self.durable, b"", bytes(len(full)), full]
        for _ in range(8):
            found.append(full[: chance.randrange(len(full) + 1)])
            size = chance.choice([16, 512, 4096])
            blocks = [full[start : start + size] for start in range(0, len(full), size)]
            kept = [block if chance.random() < 0.5 else bytes(len(block)) for block in blocks]
            found.append(b"".join(kept))
        return found

    def written(self, writes: list[tuple[int, bytes]]) -> bytes:
        content = bytearray(self.durable)
        for offset, data in writes:
            content.extend(bytes(max(0, offset - len(content))))
            content[offset : offset + len(data)] = data
        return bytes(content)

    def sync(self) -> None:
        self.durable, self.pending = self.written(self.pending), []


def power(before: str, after: str, trace: str, rounds: str) -> dict[str, Any]:
    """All states in which a power cut may leave the folder at any moment of one commit.

    Directory operations reach the disk in order, but for those since the last sync of the folder
    any number of the latest may be missing; unsynced data may be there, cut, in part, or not.
    """
    chance = random.Random(0)
    folder_name = Path(before).name
    inodes = {path.name: Inode(path.read_bytes()) for path in Path(before).iterdir()
              if path.is_file()}  # fmt: skip
    old, new = inodes["model.h5"].durable, Path(after, "model.h5").read_bytes()
    old_best = inodes["model_best.h5"].durable
    # Names as they were after each directory operation; the disk has one of those from `sure` on.
    names, sure, acknowledged = [dict(inodes)], 0, False
    seen: set[int] = set()
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as scratch:
        for step, (call, path, other, offset, data) in enumerate(read_trace(Path(trace))):
            now = dict(names[-1])
            if call in ("create", "open") and path not in now and path != folder_name:
                now[path] = Inode()
            elif call == "create":
                now[path].durable, now[path].pending = b"", []
            elif call == "write":
                now[path].pending.append((offset, data))
            elif call == "rename" and now[path] is not now.get(other):
                now[other] = now.pop(path)
            elif call in ("link", "linkat"):
                now[other] = now[path]
            elif call in ("unlink", "unlinkat"):
                now.pop(path, None)
            elif call == "fsync" and path == folder_name:
                sure = len(names) - 1
                acknowledged = acknowledged or now["model.h5"].durable == new
            elif call == "fsync":
                now[path].sync()
            if now != names[-1]:
                names.append(now)
            for state in names[sure:]:
                # The views are made anew from the commits, whatever is left of them.
                models = {name: inode for name, inode in state.items() if "model" in name}
                unsure = [name for name, inode in models.items() if inode.pending]
                for _ in range(int(rounds)):
                    choices = [state[name].contents(chance) for name in unsure]
                    for contents in itertools.islice(itertools.product(*choices), 200):
                        files = {name: inode.durable for name, inode in models.items()}
                        files |= dict(zip(unsure, contents, strict=True))
                        key = hash((acknowledged, *sorted(files.items())))
                        if key in seen:
                            continue
                        seen.add(key)
                        problem = judge(Path(scratch), files, (old, new), old_best, acknowledged)
                        if problem:
                            wrong.append(f"at call {step}, {call} {path}: {problem}")
    return {"states": len(seen), "wrong": wrong, "acknowledged": acknowledged}


def judge(
    folder: Path,
    files: dict[str, bytes],
    commits: tuple[bytes, bytes],
    old_best: bytes,
    acknowledged: bool,
) -> str | None:
    """Say what is wrong with a state of the folder, or None."""
    for name, content in files.items():
        (folder / name).write_bytes(content)
    try:
        good = latest_good(folder)
        used = good.read_bytes() if good else b""
    except DamagedCheckpointError as error:
        return str(error)
    finally:
        for path in folder.iterdir():
            path.unlink()
    if used not in commits:
        return "what is used is no commit"
    if acknowledged and used != commits[1]:
        return "an acknowledged commit is lost"
    if files["model_best.h5"] not in (old_best, commits[1]):
        return "model_best.h5 is torn"
    return None


if __name__ == "__main__":
    logging.disable()
    _, name, output, *arguments = sys.argv
    checks: dict[str, Any] = {"damage": damage, "power": power}
    found = checks[name](*arguments)
    Path(output).write_text(json.dumps(found))
