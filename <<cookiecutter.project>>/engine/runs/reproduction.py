"""Reproduces a run from nothing but its folder, for `bin/reproduce.py`. Needs no TensorFlow.

The order is that of events: what the folder says, its code restored, the run, the comparison."""

import contextlib
import csv
import filecmp
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from engine import checkpoints
from engine.checkpoints import Cells, Difference, history_difference, rows_in
from engine.devices import workers
from engine.runs import results
from engine.training import fingerprint
from vegab import UsageError, read_run, snapshot, trust
from vegab.files import PROJECT, leads_out
from vegab.provenance import ENVIRONMENT, GitError, ask_nvidia_smi, describe_software, git
from vegab.run_folder import refuse_links

# These say how a run went on, or what came after it; it is made again without them.
NOT_FOR_THE_TRAINING = ("evaluation", "name", "own_code", "resume_inexact", "fork", "from_epoch")
# Of another machine, or of no consequence.
NOT_TAKEN_OVER = re.compile(r"SLURM_JOB_ID|CUDA_VISIBLE_DEVICES|TF_CPP_\w+")
# Of a checkpoint's state: where it was made, which is compared apart.
RECORD = ("fingerprint", "inexact")
MOST_NAMES = 5
PRUNING = "engine.sweeps.StopPoorTrial"  # the hook that bin/sweep.py adds
SURROUNDINGS = ("data", "devices", "layout", "settings")
STOP = Path(__file__).with_name("stop_at.py")
POLL = 0.05  # seconds between two looks at the history
Meta = Mapping[str, Any]  # meta.json, or a part of it


class Original:
    """A run that is to be made again: the whole of a finished one, or its first epochs."""

    def __init__(self, folder: Path, epochs: int) -> None:
        """Read a run, of which the first `epochs` are to be compared, or all (0); touch nothing."""
        trust.confine()  # the process that runs it again, too
        refuse_links(folder, folder)
        run = read_run(folder)
        meta: dict[str, Any] = run["meta"]
        self.folder, self.config, self.meta, self.status = folder, run["config"], meta, run["state"]
        if not meta.get("attempts") or not self.config:
            raise UsageError(f"{folder} is not a run folder; name one that bin/train.py made")
        if self.status == "running":
            raise UsageError(f"{folder} is still running; wait for it, or stop it")
        self.state = state = last_state(folder)  # of its latest checkpoint
        done = len(state["history"])
        if self.status != "finished" and state["is_cut"]:  # a row that is not whole, which goes on
            done -= 1
        if done == 0:
            raise UsageError(f"{folder} has not finished an epoch; there is nothing to compare")
        if not 0 <= epochs <= done:
            raise UsageError(f"--epochs is {epochs}; {folder} has {done} epochs")
        is_part = epochs not in (0, done)
        self.is_whole = self.status == "finished" and not is_part
        try:
            rows, committed = rows_in(folder), committed_rows(state)
        except ValueError as error:
            raise UsageError(f"{error}; delete it, because model.h5 has all of it") from error
        # That are to be compared; those that a kill left out are the checkpoint's.
        self.rows = [*rows[: len(committed)], *committed[len(rows) :]][: epochs or done]
        begun, self.code = code_of(folder, meta)
        self.commit = meta["attempts"][begun].get("git_commit")  # git's, when the run began
        self.other_code = other_code(folder, meta["attempts"][begun:], self.code)
        command = meta.get("command") or {}
        self.script = Path(command.get("script", ""))  # what ran, in `code`
        if str(self.script) not in self.code.files:
            raise UsageError(f"the script that ran, {self.script}, is not in the code of {folder}")
        self.typed_in = PROJECT / command.get("folder", ".")  # where, in the project as it is now
        self.flags: dict[str, Any] = meta.get("flags") or {}  # that it began with
        # The checkpoint of another run that it began with.
        parent, checkpoint = meta.get("parent") or {}, str(self.flags.get("checkpoint") or "")
        self.start = start_of(folder, self.typed_in, parent, checkpoint)
        self.fingerprint: dict[str, Any] = state.get("fingerprint") or {}
        several = re.match(r"(\d+) workers", self.fingerprint.get("layout", ""))
        self.num_workers = int(several[1]) if several else 1
        self._refuse_what_is_missing()
        if is_part and self.start and not self.flags.get("retrain"):
            begun_with = len(checkpoints.read_state(self.start)["history"])
            if epochs <= begun_with:
                what = f"the first {begun_with} of {folder} are those of the run that it began with"
                raise UsageError(f"--epochs is {epochs}; {what}; give {begun_with + 1} or more")

    @property
    def stop(self) -> dict[str, Any] | None:
        """The callback that ends it; None: it ends by itself, or takes no callbacks."""
        if self.is_whole or not isinstance(self.config.get("callbacks"), list):
            return None
        return {"class": "stop_at.StopAfterEpoch", "epoch": len(self.rows)}

    def _refuse_what_is_missing(self) -> None:
        """Refuse a run whose weights to begin with, or whose GPUs, are not there."""
        weights, gpus = (str(self.flags.get(key) or "") for key in ("warm_start", "gpus"))
        if weights and not (self.typed_in / weights).exists():
            what = f"{self.folder} began with --warm_start={weights}"
            raise UsageError(f"{what}, which is not there any more")
        if self.num_workers > 1 and "GPU" in self.fingerprint.get("devices", []):
            what = f"{self.folder} was trained by {self.fingerprint['layout']}, on GPUs"
            how = "type its command there with another folder, and compare both model.h5 by cmp"
            raise UsageError(f"{what}; {how}")
        wanted = [int(part) for part in gpus.split(",") if part.isdigit()]
        if wanted and max(wanted) >= (present := len(ask_nvidia_smi("name"))):
            seen = f"here {present or 'no'} GPUs are seen"
            raise UsageError(f"{self.folder} ran with --gpus={gpus}; {seen}")


def last_state(folder: Path) -> dict[str, Any]:
    """Return the state in the latest checkpoint, once it and the best one are known to be whole."""
    if not (folder / checkpoints.LATEST).is_file():
        raise UsageError(f"{folder} has no {checkpoints.LATEST}; there is nothing to compare")
    try:
        for name in (checkpoints.LATEST, checkpoints.BEST):
            with contextlib.suppress(FileNotFoundError):
                checkpoints.verify(folder / name)
        return checkpoints.read_state(folder / checkpoints.LATEST)
    except checkpoints.DamagedCheckpointError as error:
        raise UsageError(f"{error}; put a good copy back") from error


def committed_rows(state: Mapping[str, Any]) -> list[Cells]:
    """Return the history of a checkpoint as `history.csv` has it."""
    rows = state["history"]
    columns = dict.fromkeys(column for row in rows for column in row)
    return list(csv.DictReader(checkpoints.csv_lines(list(columns), rows).splitlines()))


def code_of(folder: Path, meta: Mapping[str, Any]) -> tuple[int, snapshot.Snapshot]:
    """Return the attempt with which the run began, from 0, and its source."""
    # One that finds no checkpoint begins the run again.
    attempts = meta["attempts"]
    begun = max((i for i, attempt in enumerate(attempts) if attempt.get("from") == {}), default=0)
    names = [attempt["code"]["file"] for attempt in attempts[begun:] if "code" in attempt]
    return begun, snapshot.load(own_file(folder, names[0] if names else snapshot.CODE))


def own_file(folder: Path, name: str) -> Path:
    """Return the path of a file that a run's record names; UsageError if it leads out."""
    if leads_out(name):
        raise UsageError(f"{folder}: its record names {name!r}, outside of the folder")
    return folder / name


def other_code(folder: Path, attempts: Sequence[Meta], code: snapshot.Snapshot) -> list[str]:
    """Return a phrase for each attempt that made steps with other source than the first one."""
    found = []
    for attempt in attempts:
        name = attempt["code"]["file"] if "code" in attempt else snapshot.CODE
        went_on = attempt.get("from") is None or attempt["from"] != attempt.get("to")
        if went_on and (path := own_file(folder, name)).exists():
            files = snapshot.differing_source(code.files, snapshot.load(path).files)
            found += [f"a later attempt ran other code ({name}: {listed(files)})"] if files else []
    return list(dict.fromkeys(found))


def start_of(folder: Path, typed_in: Path, parent: Meta, checkpoint: str | None) -> Path | None:
    """Return the checkpoint that --fork or --checkpoint began with, or None."""
    if "from_step" in parent:
        place, steps = typed_in / parent["path"], parent["from_step"]
        what = f"{folder} began with the state of {parent['path']} after step {steps}"
        paths = [c.path for c in checkpoints.commits_of(place) if c.state["global_step"] == steps]
        attempts = read_run(place)["meta"].get("attempts")
        if attempts and attempts[0].get("start") != parent.get("started"):
            raise UsageError(f"{what}, and that folder holds another run now")
    elif checkpoint:
        path = typed_in / checkpoint
        what = f"{folder} began with --checkpoint={checkpoint}"
        paths = [path / checkpoints.LATEST if path.is_dir() else path]
    else:
        return None
    for path in paths:
        try:
            checkpoints.verify(path)
            return path.resolve()
        except FileNotFoundError:
            continue
        except checkpoints.DamagedCheckpointError as error:
            raise UsageError(f"{what}; {error}") from error
    raise UsageError(f"{what}, which is not there any more")


def restore(original: Original, place: Path) -> list[str]:
    """Put source and config of a run into a folder; return lines on what is not from its folder."""
    project = place / "code"
    left_out = original.code.record.get("left_out", ())
    found = [restore_unchanged(original, e, project) for e in left_out if e.get("why") != "secret"]
    if linked := snapshot.unpack(original.code, project):
        found.append(f"{listed(linked)} from the project as it is now")
    told = "; ".join(filter(None, found))
    lines = [f"not from the run folder: {told}"] if told else []
    config = dict(original.config)
    threads = (original.fingerprint.get("settings") or {}).get("threads")
    if threads and "threads" in config:
        of_its_own = fingerprint.settings_of(config, None)["threads"]
        if threads != of_its_own:
            config["threads"] = threads
            lines.append(f"threads: {threads} as then, not {of_its_own}")
    if (epoch := results.pruned_at(original.folder)) and original.is_whole:
        ends = {PRUNING: {"epoch": epoch}}
        config["hooks"] = [hook | ends.get(hook.get("class"), {}) for hook in config["hooks"]]
    if original.stop:
        shutil.copy(STOP, project)
        config["callbacks"] = [*config["callbacks"], original.stop]
    (place / "config.json").write_text(json.dumps(config))
    return lines


def restore_unchanged(original: Original, entry: Mapping[str, Any], project: Path) -> str:
    """Put a file that was left out, and was as committed, in its place; say where it is from."""
    name = str(entry.get("path", ""))
    own_file(original.folder, name)
    if original.commit and entry.get("git") == "unchanged":
        with contextlib.suppress(GitError):
            content = git("show", f"{original.commit}:./{name}")
            (project / name).parent.mkdir(parents=True, exist_ok=True)
            (project / name).write_bytes(content)
            return f"{name} from git at {original.commit[:7]}"
    is_there = os.path.lexists(PROJECT / name)
    return "" if is_there else f"{name} is missing: neither git nor the project has it"


def run_again(original: Original, place: Path, show: Callable[[int], object]) -> int:
    """Run what is in `place` until the epochs to compare are done; return the exit code."""
    children = begin(original, place)
    chief, wanted = children[0], len(original.rows)
    is_to_be_told = not original.is_whole and not original.stop
    try:
        while chief.poll() is None:
            done = len(rows_in(place / "run"))
            show(min(done, wanted))
            if is_to_be_told and done >= wanted:
                chief.terminate()  # it saves and ends, as do the others
                is_to_be_told = False
            time.sleep(POLL)
    finally:
        for child in children:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)  # with its worker processes
                child.wait()
    show(min(len(rows_in(place / "run")), wanted))
    return chief.returncode


def begin(original: Original, place: Path) -> list[subprocess.Popen[bytes]]:
    """Start the processes that train, the one that writes first; they are on this machine."""
    folder = original.typed_in.resolve()
    if folder.is_relative_to(PROJECT):
        folder = place / "code" / folder.relative_to(PROJECT)
    environments = [environment_of(original)]
    if original.num_workers > 1:
        configs = workers.on_this_machine(original.num_workers)
        environments = [environments[0] | {"TF_CONFIG": text} for text in configs]
    command, cwd = command_of(original, place), folder if folder.is_dir() else place / "code"
    # In sessions of their own: Ctrl-C is for this process, which ends the others.
    apart: Any = {"cwd": cwd, "stdin": subprocess.DEVNULL, "start_new_session": True}
    apart["stderr"], children = subprocess.STDOUT, []
    for rank, environment in enumerate(environments):
        with open(place / ("output.txt" if rank == 0 else f"output-{rank}.txt"), "wb") as output:
            children.append(subprocess.Popen(command, env=environment, stdout=output, **apart))
    return children


def command_of(original: Original, place: Path) -> list[str]:
    """Return the command that makes a run again in `place`, with the flags that it began with."""
    paths = (place / "code" / original.script, place / "config.json", place / "run")
    command = [sys.executable, *map(str, paths)]
    flags = {k: v for k, v in original.flags.items() if k not in NOT_FOR_THE_TRAINING}
    if original.start:
        flags["checkpoint"] = str(original.start)
    if flags.get("warm_start"):
        flags["warm_start"] = str((original.typed_in / str(flags["warm_start"])).resolve())
    for name, value in flags.items():
        if isinstance(value, bool):
            command.append(f"--{name}" if value else f"--no_{name}")
        else:
            texts = value if isinstance(value, list) else [value]
            command += [f"--{name}={text}" for text in texts]
    return command


def environment_of(original: Original) -> dict[str, str]:
    """Return the variables to make a run again with: its own, where bits hang on them."""
    recorded = original.meta.get("environment") or {}
    here = NOT_TAKEN_OVER.fullmatch  # what is this machine's own
    environment = {k: v for k, v in os.environ.items() if here(k) or not ENVIRONMENT.fullmatch(k)}
    environment |= {k: v for k, v in recorded.items() if not here(k)}
    if settings := original.fingerprint.get("settings"):  # {}: its script does not keep them
        environment |= {v: settings.get(k, "") for k, v in fingerprint.READ_AT_IMPORT.items()}
    devices = original.fingerprint.get("devices")
    if devices and "GPU" not in devices:
        environment["CUDA_VISIBLE_DEVICES"] = "-1"
    if "DATA_DIR" in environment:
        environment["DATA_DIR"] = str(Path(environment["DATA_DIR"]).expanduser().absolute())
    return environment


class Result(NamedTuple):
    """What came out of a comparison."""

    compared: list[str]  # what was, such as "history.csv (5 epochs)"
    difference: Difference | None = None  # the first one
    left_out: str = ""  # a sentence, if the weights were not compared


def compare(original: Original, again: Path) -> Result:
    """Compare history and weights of a run and of the same run made again."""
    number = len(original.rows)
    file, others = "history.csv", rows_in(again)
    compared = [f"{file} ({number} epoch{'s' * (number > 1)})"]
    difference = history_difference(original.rows, others if original.is_whole else others[:number])
    pairs, left_out = pairs_of_commits(original, again)
    for one, other in pairs:
        if difference:
            break
        file = str(one.relative_to(original.folder))
        compared.append(file)
        if not (one.exists() and other.exists()):
            there = ("there" if path.exists() else "nothing" for path in (one, other))
            return Result(compared, Difference(file, *there))
        if not filecmp.cmp(one, other, shallow=False):
            difference = checkpoints.commit_difference(one, other, ignored=RECORD)
    if difference:
        difference = difference._replace(place=f"{file}, {difference.place}")
    return Result(compared, difference, left_out)


def pairs_of_commits(original: Original, again: Path) -> tuple[list[tuple[Path, Path]], str]:
    """Return the checkpoints to compare of both runs; and a sentence, if none has the weights."""
    folder, epoch = original.folder, len(original.rows)
    if original.is_whole:
        pairs = [(folder / n, again / n) for n in (checkpoints.LATEST, checkpoints.BEST)]
        return [pair for pair in pairs if pair[0].exists() or pair[1].exists()], ""
    # Of several names of one checkpoint the first counts, which is that of the latest.
    made = reversed(checkpoints.commits_of(again))
    there = {(commit.state["epoch"], commit.state["step"]): commit.path for commit in made}
    ones = [c for c in checkpoints.commits_of(folder) if c.ends_epoch and c.epoch == epoch]
    for one in ones:
        # One of an epoch's last step is made before the epoch's end, and is another one.
        if other := there.get((one.state["epoch"], one.state["step"])):
            return [(one.path, other)], ""
    why = "were not kept when it was run again" if ones else f"are not kept in {folder}"
    return [], f"the weights after epoch {epoch} {why}, and were not compared"


def surroundings(original: Original, again: Path) -> str:
    """Return a line on what else the bits depend on, if both runs have recorded that."""
    then, now = original.fingerprint, fingerprint.stored_in(again)
    if not (then and now):
        return ""
    one, other = ({k: its.get(k) for k in SURROUNDINGS if k in then} for its in (then, now))
    return line_of(fingerprint.differences(one, other), "data, devices and settings")


def line_of(found: Sequence[str], names: str) -> str:
    return f"not as it was then: {'; '.join(found)}" if found else f"{names} are the same"


def causes(original: Original, again: Path | None) -> list[str]:
    """Return why two runs may differ, the likeliest first; without `again`, what is known now."""
    found = list(original.other_code)
    for entry in original.state.get("inexact") or []:
        what = "; ".join(entry["differs"])
        found.append(f"it was continued inexactly after step {entry['global_step']} ({what})")
    then, now = original.fingerprint, fingerprint.stored_in(again) if again else None
    keys: tuple[str, ...] = ("code", "data", "versions", "processor", *SURROUNDINGS[1:])
    if not now:
        keys, now = ("processor",), {"processor": fingerprint.processor_features()}
    now.get("code", {}).pop(STOP.name, None)  # which was laid next to it
    for key in [key for key in keys if key in then]:
        found += fingerprint.differences({key: then[key]}, {key: now.get(key)})
    if original.config.get("deterministic") is False and "GPU" in then.get("devices", []):
        found.append("it ran with operations that are not deterministic (deterministic: false)")
    python = original.meta.get("python")
    if python and python != platform.python_version():
        found.append(f"Python {python}, now {platform.python_version()}")
    told = (then.get("versions") or {}) if "versions" in keys else {}
    return found + differing_packages(original.meta.get("packages") or {}, told)


def differing_packages(then: Mapping[str, str], told: Mapping[str, str]) -> list[str]:
    """Return a phrase for each package whose version is another here."""
    now = describe_software()["packages"]
    names = sorted({*then, *now} - told.keys(), key=str.lower)
    pairs = [(name, then.get(name, "missing"), now.get(name, "missing")) for name in names]
    phrases = [f"{name} {one}, now {other}" for name, one, other in pairs if one != other]
    more = len(phrases) - MOST_NAMES
    return phrases[:MOST_NAMES] + [f"{more} more packages"] * (more > 0)


def edited_cell(original: Original) -> str:
    """Return a sentence if `history.csv` is not what the checkpoint says, or "" if it is."""
    committed = committed_rows(original.state)[: len(original.rows)]
    found = history_difference(original.rows, committed)
    return f"history.csv was changed after the run: its model.h5 has {found.other}" if found else ""


def listed(names: Sequence[str]) -> str:
    more = len(names) - MOST_NAMES
    return ", ".join(names[:MOST_NAMES]) + f" and {more} more" * (more > 0)
