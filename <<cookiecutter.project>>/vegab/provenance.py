"""Records where a run came from: the source, git, the packages, the machine."""

import contextlib
import fnmatch
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Collection, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from vegab.files import PROJECT, ROOT

SECRETS = (
    ".env*", "env.sh", ".netrc", "*.pem", "id_rsa*", "id_ed25519*", "kaggle.json", "*credentials*",
    "secrets.*",
)  # fmt: skip
LARGEST_DIFF_IN_META = 1_000_000  # characters; the patch in code.zip has all of it
# The only environment variables recorded: others may hold secrets. Not all of TF_*:
# Terraform keeps its tokens there.
ENVIRONMENT = re.compile(
    r"CUDA_VISIBLE_DEVICES|KERAS_BACKEND|NVIDIA_TF32_OVERRIDE|OMP_NUM_THREADS|SLURM_JOB_ID|XLA_FLAGS"
    r"|ONEDNN_(MAX_CPU_ISA|DEFAULT_FPMATH_MODE)"
    r"|TF_(CPP|CUDNN|DETERMINISTIC|DISABLE|ENABLE|FORCE|GPU|NUM|SET_ONEDNN|USE|XLA)_\w+"
)


def run_quietly(*command: str) -> bytes | None:
    """What a command prints, or None if it failed. It gets no input, and 20 seconds."""
    nothing = subprocess.DEVNULL
    try:
        return subprocess.check_output(command, stdin=nothing, stderr=nothing, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None


# --------------------------------------------------------------------------------------------- git


class GitError(Exception):
    """git gave no answer; the message has its words."""


def git(*arguments: str, given: bytes = b"", also: Mapping[str, str] = {}) -> bytes:
    """What a git command prints that runs in the project's folder, and in its name: of git's
    variables in the environment only those of the user's settings count. It has 20 seconds."""
    others = {k: v for k, v in os.environ.items() if k[:4] != "GIT_" or k[:11] == "GIT_CONFIG_"}
    own = {"GIT_TERMINAL_PROMPT": "0", "GIT_OPTIONAL_LOCKS": "0", "LC_ALL": "C", **also}
    command = ["git", "-c", "core.fsmonitor=false", "-c", "core.quotePath=true", *arguments]
    try:
        done = subprocess.run(
            command, cwd=PROJECT, env=others | own, input=given, capture_output=True, timeout=20
        )
    except subprocess.TimeoutExpired:
        raise GitError(f"git {arguments[0]} gave no answer in 20 seconds") from None
    except OSError as error:
        raise GitError(f"git cannot be run: {error.strerror}") from None
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        raise GitError(said[0] if said else f"git {arguments[0]} failed without a message")
    return done.stdout


def git_words(*arguments: str) -> str | None:
    """The same as one line of text; None if there is no answer."""
    try:
        return git(*arguments).decode(errors="replace").strip() or None
    except GitError:
        return None


def names_in(listing: bytes) -> set[str]:
    """The names in a listing that git was asked for with -z."""
    return {os.fsdecode(name) for name in listing.split(b"\0") if name}


def is_secret(name: str, tracked: Collection[str]) -> bool:
    """Is a file, or a folder that it is in, called as secrets are? Source in git is none."""
    real = os.path.basename(os.path.realpath(PROJECT / name))
    parts = {part.lower() for part in (*Path(name).parts, real)}
    is_named = any(fnmatch.fnmatchcase(part, form) for part in parts for form in SECRETS)
    return is_named and not (name.endswith(".py") and name in tracked)


def describe_git(
    files: Collection[str], tracked: set[str]
) -> tuple[dict[str, Any] | None, bytes, set[str]]:
    """What git says of the source: for meta.json (None without a repository), the uncommitted part
    of these files as a patch, and which files are as committed. What git cannot answer is
    `unknown`, with its words, and `dirty` None. If the patch lacks files, `patch` says which."""
    about: dict[str, Any] = {"commit": None, "branch": None, "dirty": None, "diff": ""}
    try:
        git("rev-parse", "--git-dir")
        about["commit"] = commit = git_words("rev-parse", "--verify", "--quiet", "HEAD")
        about["branch"] = git_words("symbolic-ref", "--quiet", "--short", "HEAD")
        with tempfile.TemporaryDirectory() as place:
            patch, changed, problem = _uncommitted(Path(place), commit, files, tracked)
    except GitError as error:
        if not any(os.path.lexists(folder / ".git") for folder in (PROJECT, *PROJECT.parents)):
            return None, b"", set()
        return about | {"unknown": str(error)}, b"", set()
    text = patch.decode(errors="replace")
    if len(text) > LARGEST_DIFF_IN_META:
        text = f"({len(text)} characters: see uncommitted.diff in code.zip)"
    about |= {"dirty": bool(patch or changed), "diff": text}
    return about | ({"patch": problem} if problem else {}), patch, tracked - changed


def _uncommitted(
    place: Path, commit: str | None, files: Collection[str], tracked: set[str]
) -> tuple[bytes, set[str], str]:
    """The patch, all files that are not as committed, and what the patch lacks, or ""."""
    base = commit or git("hash-object", "-t", "tree", "--stdin").decode().strip()
    paths = ("rev-parse", "--git-path")
    index, objects = (PROJECT / os.fsdecode(git(*paths, n)).strip() for n in ("index", "objects"))
    # All happens in an index and in objects of its own: the repository is only read.
    own = {"GIT_INDEX_FILE": str(place / "index"), "GIT_OBJECT_DIRECTORY": str(place)}
    own["GIT_ALTERNATE_OBJECT_DIRECTORIES"] = json.dumps(str(objects), ensure_ascii=False)  # quoted
    if index.exists():
        shutil.copy2(index, place / "index")  # by its date git knows whose content it has to read
        # Marks by which a user has git take a file for unchanged do not make it so.
        there = {n for n in tracked if os.path.lexists(PROJECT / n)}
        for mark, marked in (("assume-unchanged", tracked), ("skip-worktree", there)):
            given = b"\0".join(map(os.fsencode, marked))
            git("update-index", f"--no-{mark}", "-z", "--stdin", given=given, also=own)
    unknown = names_in(git("ls-files", "-z", "--others", "--exclude-standard"))
    inside = {name[:-1] for name in unknown if name[-1] == "/"}  # repositories of their own
    added = {n for n in {*files} - tracked if not {*map(str, Path(n).parents)} & (tracked | inside)}
    update = ("--add", "--remove", "--ignore-skip-worktree-entries", "-z", "--stdin")
    given = b"\0".join(map(os.fsencode, sorted(tracked | added)))
    git("update-index", *update, given=given, also=own)
    tree = git("write-tree", also=own).decode().strip()
    listed = ("--name-only", "-z", "--relative", "--ignore-submodules=none")
    changed = names_in(git("diff-tree", "-r", *listed, base, tree, also=own)) | inside
    changed |= names_in(git("diff-files", *listed, also=own))  # changed submodules
    others = changed - {*files}
    lacking = sorted(n for n in others if os.path.lexists(PROJECT / n) or is_secret(n, tracked))
    without = [f":(exclude,literal){name}" for name in lacking]
    form = ("-r", "-p", "--binary", "--full-index", "--ignore-submodules=dirty")
    diff = ("-c", "diff.suppressBlankEmpty=false", "diff-tree", *form, base, tree)
    patch = git(*diff, "--", ".", *without, also=own)
    names = ", ".join(lacking)
    why = f"it lacks {names}: data, a secret, or a repository of its own" if names else ""
    return patch, changed, why


# ----------------------------------------------------------------------------- command and machine


def describe_command() -> dict[str, Any]:
    """The command as a list and a line to paste, where it was typed, and the file that it runs."""
    program = os.path.realpath(sys.argv[0])
    script = os.path.relpath(program, ROOT)
    words = ["python", *sys.orig_argv[1:]]
    if PROJECT != ROOT:  # from a snapshot of the project, whose own program is to be typed
        typed = os.path.relpath(PROJECT / script)
        words = [typed if os.path.realpath(word) == program else word for word in words]
    folder = os.path.relpath(os.getcwd(), PROJECT)
    return {"argv": words, "line": shlex.join(words), "folder": folder, "script": script}


def describe_machine() -> dict[str, Any]:
    """Host, processor, memory and graphics cards."""
    memory = None
    with contextlib.suppress(ValueError, OSError, AttributeError):
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "host": platform.node(),
        "platform": platform.platform(),
        "cpu": {"model": _cpu_model(), "cores": os.cpu_count(), "usable_cores": usable_cores()},
        "memory_bytes": memory,
        "gpus": ask_nvidia_smi("name,memory.total,driver_version"),
    }


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    brand = run_quietly("sysctl", "-n", "machdep.cpu.brand_string")  # macOS
    return brand.decode().strip() if brand else platform.processor() or platform.machine()


def usable_cores() -> int | None:
    """How many cores this process may use, or None if that cannot be told."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def ask_nvidia_smi(fields: str, form: str = "csv,noheader") -> list[str]:
    """A line for each NVIDIA GPU, with the fields that are asked for; [] without nvidia-smi."""
    answer = run_quietly("nvidia-smi", f"--query-gpu={fields}", f"--format={form}")
    return [line.strip() for line in (answer or b"").decode().splitlines() if line.strip()]


def describe_software() -> dict[str, Any]:
    """Python, every installed package with its version, and the variables that change results."""
    # Of several of one name the first counts, which is the one that Python imports.
    found = [each.metadata for each in reversed([*metadata.distributions()])]
    packages = {each["Name"]: each["Version"] for each in found if each["Name"]}
    return {
        "python": platform.python_version(),
        "packages": dict(sorted(packages.items(), key=lambda item: item[0].lower())),
        "environment": {k: v for k, v in sorted(os.environ.items()) if ENVIRONMENT.fullmatch(k)},
    }
