"""Acts around a run: keeps its record in the folder, makes its name, links to it."""

import argparse
import contextlib
import os
import re
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vegab import provenance, snapshot
from vegab.config import Config, flatten, show
from vegab.exits import EXIT_CODES, UsageError, outcome
from vegab.files import CONFIG, FORMAT, META, inode_of, is_run, read_json, write_json


class VegabPlugin:
    """Is told of what happens. It keeps `args`; else nothing is done until a subclass says what."""

    args = argparse.Namespace()

    def on_parsed_args(self, args: argparse.Namespace) -> None:
        """The command line was read. `args.save_path` may be changed; `args.config` is the name
        or path, `args.overrides` maps dotted keys to the values given, `args.flags` has the
        function's flags by name, `args.given_flags` those that are not their default,
        `args.resolved_config` the config with all overrides."""
        self.args = args

    def on_before_call(self, config: Config, save_path: str) -> None:
        """The folder is open and locked, the function comes next."""

    def on_after_call(self, config: Config, save_path: str) -> None:
        """The function returned."""

    def on_failure(self, config: Config, save_path: str, error: BaseException) -> None:
        """The function, or a plugin, raised. KeyboardInterrupt and SystemExit(75) are
        interruptions. May come without `on_before_call`."""


class MetaSaver(VegabPlugin):
    """Keeps config.json, meta.json, the script and the source in the run folder.

    `position(save_path)` says where the run stands, as {"epoch": 3, "global_step": 120}; every
    attempt notes it at its start (`from`) and end (`to`); {} says that nothing is kept yet.

    The run that this one comes from is noted as its parent: that whose config.json is CONFIG, or
    the one that `parent(args)` names, as {"path": folder, …}; {} names none."""

    def __init__(
        self,
        position: Callable[[str], dict[str, Any]] | None = None,
        parent: Callable[[argparse.Namespace], dict[str, Any]] | None = None,
    ) -> None:
        self.position, self.parent = position, parent
        self._folder: Path | None = None

    def on_before_call(self, config: Config, save_path: str) -> None:
        self._folder = folder = Path(save_path).absolute()
        self._inode = inode_of(folder)
        meta = read_json(folder / META) or {}
        attempts = meta.get("attempts", [])
        position = self._position()
        if attempts and "end" not in attempts[-1]:  # it died without a word
            attempts[-1].update(end=None, exit_status="killed", to=position)
        code = snapshot.take()
        git = code.record.get("git")
        command, machine = provenance.describe_command(), provenance.describe_machine()
        attempt = {"start": _now(), "pid": os.getpid(), "host": machine["host"]}
        attempt |= {"command": command["line"], "git_commit": git and git["commit"]}
        attempts.append(attempt | {"from": position})
        self._meta = {
            "format": FORMAT,
            "status": "running",
            "command": command,
            **self._origin(folder, meta, position),
            **provenance.describe_software(),
            **machine,
            "git": git,
            "seeds": {k: value for k, value in flatten(config).items() if k.endswith("seed")},
            "not_in_code": code.record.get("left_out", []),
            "attempts": attempts,
        }
        # In this order: a kill between the two must not leave a longer run that counts as finished.
        write_json(folder / META, self._meta)
        write_json(folder / CONFIG, config)
        script = Path(sys.argv[0])
        if script.suffix == ".py" and script.is_file():
            shutil.copyfile(script, folder / script.name)
        # What a later attempt ran, if it is something else, goes to a file of its own.
        copies = {a["code"]["sha256"]: a["code"]["file"] for a in attempts if "code" in a}
        sha256 = code.record["sha256"]
        if sha256 not in copies:
            copies[sha256] = f"code_attempt_{len(attempts)}.zip" if copies else snapshot.CODE
            snapshot.keep(code, folder / copies[sha256])
        attempts[-1]["code"] = {"file": copies[sha256], "sha256": sha256}
        write_json(folder / META, self._meta)

    def on_after_call(self, config: Config, save_path: str) -> None:
        self.on_failure(config, save_path, None)

    def on_failure(self, config: Config, save_path: str, error: BaseException | None) -> None:
        if self._folder is None or inode_of(self._folder) != self._inode:
            return  # it was renamed or replaced meanwhile: nothing is written into another's
        status = outcome(error)
        attempt = self._meta["attempts"][-1]
        attempt.update(end=_now(), exit_status=EXIT_CODES[status], to=self._position())
        if status == "failed":
            attempt["error"] = f"{type(error).__name__}: {error}"
        self._meta["status"] = status
        write_json(self._folder / META, self._meta)

    def _origin(
        self, folder: Path, meta: dict[str, Any], position: dict[str, Any] | None
    ) -> dict[str, Any]:
        # A run begins with its first attempt, and again with each while nothing is kept.
        config = getattr(self.args, "config", None)
        named = Path(config or "")
        is_own = os.path.realpath(named) == os.path.realpath(folder / CONFIG)
        if meta.get("attempts") and (position != {} or is_own):
            return {key: meta.get(key) for key in ("config", "flags", "parent")}
        parent = self.parent(self.args) if self.parent else {}
        if not parent and named.name == CONFIG:
            parent = {"path": str(named.parent)}
        known = None  # which it stays if the parent is not a run folder
        with contextlib.suppress(KeyError, IndexError, TypeError, UsageError):
            first = read_json(Path(parent["path"]) / META)["attempts"][0]
            known = {**parent, "started": first.get("start"), "commit": first.get("git_commit")}
        flags = getattr(self.args, "given_flags", {})
        return {"config": config, "flags": flags, "parent": known}

    def _position(self) -> dict[str, Any] | None:
        with contextlib.suppress(Exception):  # the record of a run must not stop it
            return self.position(str(self._folder)) if self.position else None
        return None


@dataclass
class AutomaticNamer(VegabPlugin):
    """Names runs by a function of the command line: NAME_ in front of SAVE_PATH's last part, with
    `as_suffix` SAVE_PATH_NAME, with `as_prefix=False` SAVE_PATH/NAME. `namer` may also be the name
    of one that is here. An empty name, or an empty SAVE_PATH, changes nothing; nor is there a new
    name for a run that exists, so that its path, typed again, continues it, except as a suffix."""

    namer: Callable[[argparse.Namespace], str] | str
    as_prefix: bool | None = None
    as_suffix: bool = False

    def __post_init__(self) -> None:
        if self.as_prefix and self.as_suffix:
            raise ValueError("a name is a prefix or a suffix, not both")
        known = {namer.__name__: namer for namer in (timestamp_namer, kwargs_namer)}
        namer = known.get(self.namer) if isinstance(self.namer, str) else self.namer
        if not callable(namer):
            raise ValueError(f"namer is {self.namer!r}; give {', '.join(known)} or a function")
        self._namer = namer

    def on_parsed_args(self, args: argparse.Namespace) -> None:
        name, parent = self._namer(args), args.save_path
        if not name or not parent.strip() or (not self.as_suffix and is_run(parent)):
            return
        if self.as_prefix is not False or self.as_suffix:
            parent, last = os.path.split(os.path.normpath(parent))
            name = f"{last}_{name}" if self.as_suffix else f"{name}_{last}"
        args.save_path = os.path.join(parent, name)
        self.has_named = not self.as_suffix


def timestamp_namer(args: argparse.Namespace) -> str:
    """The local time, as 2026-05-01_12-00-00."""
    return time.strftime("%Y-%m-%d_%H-%M-%S")


def kwargs_namer(args: argparse.Namespace) -> str:
    """The overrides, sorted, as n_filters=10_seed=1; without any, the name of the config."""
    given = getattr(args, "overrides", {})
    name = "_".join(f"{key}={show(given[key])}" for key in sorted(given))
    name = name or Path(getattr(args, "config", "root")).stem
    # Safe in file names and shells; cut below the limit of 255 bytes.
    return re.sub(r"[^\w.,=+-]+", "-", name)[:120].strip("-") or "root"


class TensorBoardLinker(VegabPlugin):
    """Makes `folder/<run name>` a link to the run's tb/, so that TensorBoard shows chosen runs."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def on_before_call(self, config: Config, save_path: str) -> None:
        target = Path(save_path).absolute() / "tb"
        target.mkdir(exist_ok=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        parts = Path(save_path).absolute().parts[1:]
        for n in range(1, len(parts) + 1):  # a name that another run has is made longer
            link = self.folder / "_".join(parts[-n:])
            if link.is_symlink() and link.resolve() == target.resolve():
                return
            if not os.path.lexists(link):
                link.symlink_to(os.path.relpath(target, self.folder.resolve()))
                return


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
