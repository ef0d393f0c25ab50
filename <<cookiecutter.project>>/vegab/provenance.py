"""What a run has to remember of where it came from: the source, git, the packages, the machine."""

import contextlib
import functools
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from vegab.files import LOCK, ROOT, replacing_folder

LARGEST_COPIED_FILE = 1_000_000  # bytes; larger ones are named in meta.json, not copied
LARGEST_DIFF_IN_META = 1_000_000  # characters; code/uncommitted.diff has all of it
# The only environment variables recorded: others may hold secrets. Not all of TF_*:
# Terraform keeps its tokens there.
ENVIRONMENT = re.compile(
    r"CUDA_VISIBLE_DEVICES|KERAS_BACKEND|NVIDIA_TF32_OVERRIDE|OMP_NUM_THREADS|SLURM_JOB_ID|XLA_FLAGS"
    r"|ONEDNN_(MAX_CPU_ISA|DEFAULT_FPMATH_MODE)"
    r"|TF_(CPP|CUDNN|DETERMINISTIC|DISABLE|ENABLE|FORCE|GPU|NUM|SET_ONEDNN|USE|XLA)_\w+"
)
NAME_AND_VERSION = re.compile(r"^(Name|Version): *(.*\S)", re.MULTILINE)  # in a package's METADATA


def run_quietly(*command: str) -> bytes | None:
    """What a command prints in the project's folder, or None if it failed. It gets no input, and
    20 seconds."""
    of_git = {"GIT_TERMINAL_PROMPT": "0", "GIT_OPTIONAL_LOCKS": "0", "GIT_LITERAL_PATHSPECS": "1"}
    environment = os.environ | of_git | {"LC_ALL": "C"}
    nothing = subprocess.DEVNULL
    try:
        return subprocess.check_output(
            command, cwd=ROOT, env=environment, stdin=nothing, stderr=nothing, timeout=20
        )
    except (OSError, subprocess.SubprocessError):
        return None


# ------------------------------------------------------------------------------------------ source


def git(*arguments: str) -> bytes | None:
    """What a git command prints in the project's folder, or None."""
    return run_quietly("git", "-c", "core.fsmonitor=false", *arguments)


def git_words(*arguments: str) -> str | None:
    """The same as one line of text."""
    answer = git(*arguments)
    return None if answer is None else answer.decode(errors="replace").strip()


def source_files() -> tuple[list[str], list[str]]:
    """The source as (tracked, untracked) relative paths; without git all counts as untracked."""
    tracked, untracked = _listed("--cached"), _listed("--others", "--exclude-standard")
    if not tracked and not untracked:  # no git, or a repository around the project ignores it all
        untracked = list(_walk())

    @functools.cache
    def is_in_a_run(folder: Path) -> bool:
        return folder != ROOT and ((folder / LOCK).exists() or is_in_a_run(folder.parent))

    def is_source(name: str) -> bool:
        path = ROOT / name
        return (path.is_file() or path.is_symlink()) and not is_in_a_run(path.parent)

    return sorted(filter(is_source, {*tracked})), sorted(filter(is_source, {*untracked}))


def _listed(*which: str) -> list[str]:
    listing = git("ls-files", "-z", *which)
    return [os.fsdecode(name) for name in (listing or b"").split(b"\0") if name]


def _walk() -> Iterator[str]:
    """What looks like source: no hidden folders, caches, environments, results, and of the data
    only the bundled sample."""
    for folder, names, files in os.walk(ROOT):
        here = Path(folder)
        if here == ROOT / "data":
            names[:], files = [name for name in names if name == "digits"], []
        names[:] = [
            name
            for name in names
            if not name.startswith((".", "__pycache__", "node_modules"))
            and here / name != ROOT / "results"
            and not (here / name / "pyvenv.cfg").exists()
        ]
        # Without git nobody says what is private; these are by their purpose.
        public = (name for name in files if name != "env.sh" and not name.startswith(".env"))
        yield from (str((here / name).relative_to(ROOT)) for name in public)


def describe_git(untracked: list[str]) -> tuple[dict[str, Any] | None, bytes]:
    """What meta.json says of git (None without a repository), and the uncommitted part as a patch.
    `git apply` takes the patch; new source files are in it.
    """
    if git("rev-parse", "--git-dir") is None:
        return None, b""
    commit = git_words("rev-parse", "--verify", "--quiet", "HEAD")
    patch = b""
    if commit:
        patch = git(
            "diff", "HEAD", "--relative", "--binary", "--no-color", "--no-ext-diff",
            "--no-textconv", "--src-prefix=a/", "--dst-prefix=b/",
        ) or b""  # fmt: skip
    patch += b"".join(_as_added(name) for name in untracked)
    text = patch.decode(errors="replace")
    if len(text) > LARGEST_DIFF_IN_META:
        text = f"({len(text)} characters: see uncommitted.diff in the copied code)"
    branch = git_words("symbolic-ref", "--quiet", "--short", "HEAD") or None
    return {"commit": commit or None, "branch": branch, "dirty": bool(patch), "diff": text}, patch


def _as_added(name: str) -> bytes:
    """A new text file as git would show it; of a binary or large one, its name."""
    path, shown = ROOT / name, os.fsencode(name)
    content = b"\0"
    with contextlib.suppress(OSError):
        if not path.is_symlink() and path.stat().st_size <= LARGEST_COPIED_FILE:
            content = path.read_bytes()
    mode = b"100755" if os.access(path, os.X_OK) else b"100644"
    head = b"diff --git a/%b b/%b\nnew file mode %b\n" % (shown, shown, mode)
    if b"\0" in content:
        return b"# not shown, binary or large: %b\n" % shown
    if not content:
        return head
    lines = re.findall(rb".*\n|.+", content)
    added = b"".join(b"+" + line for line in lines)
    if not content.endswith(b"\n"):
        added += b"\n\\ No newline at end of file\n"
    tab = b"\t" if b" " in shown else b""  # as git does, so that the name's end is clear
    place = b"--- /dev/null\n+++ b/%b%b\n@@ -0,0 +1,%d @@\n" % (shown, tab, len(lines))
    return head + place + added


def copy_source(files: list[str], patch: bytes, destination: Path) -> list[str]:
    """Copies the source into a new folder; returns what was too large to copy."""
    too_large = []
    with replacing_folder(destination) as partial:
        for name in files:
            source, target = ROOT / name, partial / name
            if not source.is_symlink() and source.stat().st_size > LARGEST_COPIED_FILE:
                too_large.append(name)
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target, follow_symlinks=False)
        if patch:
            (partial / "uncommitted.diff").write_bytes(patch)
    return too_large


def digest_of(files: list[str]) -> str:
    """One SHA-256 over names and content, to see whether the source changed between attempts."""
    total = hashlib.sha256()
    for name in files:
        path = ROOT / name
        total.update(os.fsencode(name) + b"\0")
        if path.is_symlink():
            total.update(os.fsencode(os.readlink(path)))
        elif path.stat().st_size <= LARGEST_COPIED_FILE:
            total.update(hashlib.sha256(path.read_bytes()).digest())
        else:
            total.update(str(path.stat().st_size).encode())
    return total.hexdigest()


# ----------------------------------------------------------------------------- command and machine


def describe_command() -> dict[str, Any]:
    """The command as a list and as a line to paste, where in the project it was typed, and which
    of the project's files it runs."""
    words = ["python", *sys.orig_argv[1:]]
    return {
        "argv": words,
        "line": shlex.join(words),
        "folder": os.path.relpath(os.getcwd(), ROOT),
        "script": os.path.relpath(os.path.realpath(sys.argv[0]), ROOT),
    }


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
    packages: dict[str, str | None] = {}
    for distribution in metadata.distributions():
        text = distribution.read_text("METADATA") or distribution.read_text("PKG-INFO") or ""
        # Not `distribution.metadata`: to parse the rest takes several times as long.
        about = dict(NAME_AND_VERSION.findall(text.partition("\n\n")[0]))
        if "Name" in about:
            packages.setdefault(about["Name"], about.get("Version"))
    return {
        "python": platform.python_version(),
        "packages": dict(sorted(packages.items(), key=lambda item: item[0].lower())),
        "environment": {k: v for k, v in sorted(os.environ.items()) if ENVIRONMENT.fullmatch(k)},
    }
