"""Leave out rooms, make programs executable and the git repository, say what to type next.

Nothing here may fail the generation: cookiecutter would delete the project. Nothing here asks
anything or touches a network.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

ANSWERS = json.loads(r"""<< cookiecutter | tojson >>""")

BY_CRUFT = "_output_dir" not in ANSWERS

# Only this repository, whatever the caller's environment says; and no waiting for a key press.
ENVIRONMENT = {
    key: value
    for key, value in os.environ.items()
    if key not in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_OBJECT_DIRECTORY")
}
ENVIRONMENT["GIT_TERMINAL_PROMPT"] = "0"


# What a user types as a program. Unpacked from a zip file, it has lost the bit that lets it run.
PROGRAMS = ("bin/*.py", "src/scripts/train_simple_CNN.py")

# Rooms that a project may be without, and what hangs on each besides engine/ROOM and docs/ROOM.md.
LEFT_OUT_OF_CORE = {
    "iterators": (
        *("configs/gan.yaml", "configs/iterator_list.yaml", "configs/iterator_numpy.yaml"),
        *("configs/iterator_template.yaml", "configs/iterator_tensorflow.yaml"),
        *("configs/iterator_torch.yaml", "configs/iterator_trainer.yaml"),
        *("configs/evaluation/outputs.yaml", "src/examples/iterators.py"),
        "src/examples/torch_classifier.py",
    ),
    "records": (
        *("bin/tfrecords.py", "configs/feeders/feeder_toy_eval.yaml"),
        *("configs/feeders/feeder_toy_train.yaml", "configs/variants/toy.yaml", "data/toy"),
        "src/examples/toy.py",
    ),
    "sweeps": ("bin/sweep.py", "configs/slurm.yaml"),
    "any of them": (
        "src/examples/__init__.py",
        "src/examples/torch_loop.py",
        "tests/test_rooms.py",
    ),
}


def leave_out(room: str, paths: tuple[str, ...]) -> None:
    """Remove a room and what hangs on it. What the user put next to it stays."""
    for path in map(Path, (f"engine/{room}", f"docs/{room}.md", *paths)):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        if path.parent.is_dir() and not any(path.parent.iterdir()):
            path.parent.rmdir()


def make_executable(path: Path) -> None:
    """Let everybody who may read the file run it."""
    with contextlib.suppress(OSError):
        mode = path.stat().st_mode
        path.chmod(mode | (mode & 0o444) >> 2)


def git(*arguments: str) -> bool:
    """Run git in the project; return whether it succeeded. Its output is not shown."""
    options = []
    for setting in ("commit.gpgSign=false", "core.hooksPath=/dev/null", "maintenance.auto=false"):
        options += ["-c", setting]
    try:
        done = subprocess.run(
            ["git", *options, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=ENVIRONMENT,
            timeout=60,
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


def has_identity() -> bool:
    """Whether git knows the user's name and address without guessing them from the machine."""
    settings = ("-c", "user.useConfigOnly=true")
    return git(*settings, "var", "GIT_AUTHOR_IDENT") and git(
        *settings, "var", "GIT_COMMITTER_IDENT"
    )


def make_repository() -> str:
    """Make a repository with a first commit on `main`; return what remains to be said about it."""
    by_hand = "git init && git add --all && git commit -m 'First commit'"
    if os.path.lexists(".git"):
        return ""  # generated over a project that has its history
    if shutil.which("git") is None:
        return f"git was not found, so there is no repository yet. Once it is installed: {by_hand}"
    if git("rev-parse", "--is-inside-work-tree") and not git("check-ignore", "--quiet", "."):
        return (
            "The project lies in another git repository. To add its files there: git add . "
            f"For a repository of its own instead: {by_hand}"
        )
    # `git init -b` is not known to git older than 2.28.
    if not (git("init") and git("symbolic-ref", "HEAD", "refs/heads/main") and git("add", "--all")):
        return f"git could not make the repository. To see why: {by_hand}"
    identity: tuple[str, ...] = ()
    if not has_identity():
        name, email = ANSWERS["__author"], ANSWERS["__email"]
        identity = ("-c", f"user.name={name}", "-c", f"user.email={email}")
    if not git(*identity, "commit", "--no-verify", "-m", "First commit"):
        return "git could not make the first commit. To see why: git commit -m 'First commit'"
    if identity:
        return (
            "git does not know your name and address, so the first commit has the author's. "
            "To change it:\n    git config user.name NAME; git config user.email EMAIL; "
            "git commit --amend --reset-author --no-edit"
        )
    return ""


def is_thrown_away() -> bool:
    """Whether this is one of the copies which `cruft update` and `cruft diff` make to compare."""
    parent = Path.cwd().parent
    in_temporary = parent.parent == Path(tempfile.gettempdir()).resolve()
    return BY_CRUFT and in_temporary and parent.name.startswith("tmp")


def path_to_type() -> str:
    """Return the project's folder as seen from where the user stands, quoted for the shell."""
    project = Path.cwd()
    stand = os.environ.get("PWD", "")
    path = os.path.relpath(project, os.path.realpath(stand)) if os.path.isdir(stand) else project
    return shlex.quote(str(project if str(path).startswith("..") else path))


def main() -> None:
    """Do what was asked for, and say the three commands to type next."""
    if ANSWERS["rooms"] == "core":
        for room, paths in LEFT_OUT_OF_CORE.items():
            leave_out(room, paths)
    for path in itertools.chain(*map(Path().glob, PROGRAMS)):
        make_executable(path)
    remark = make_repository() if ANSWERS["git_init"] else ""
    if is_thrown_away():
        return
    words = f"{remark}\n\n" if remark else ""
    if BY_CRUFT and ANSWERS["git_init"]:
        words += "cruft writes .cruft.json only now. To have it in the first commit:\n"
        words += "    git add .cruft.json && git commit --amend --no-edit\n\n"
    words += f"{ANSWERS['project']} is ready. Type next:\n\n"
    words += f"    cd {path_to_type()}\n    make train\n    make test\n"
    # Straight to the descriptor: a reader that went away (`cookiecutter ... | head`) or a terminal
    # without this alphabet is an error here and not, unseen, when Python flushes at its end.
    os.write(1, f"\n{words}\n".encode(errors="backslashreplace"))


if __name__ == "__main__":
    try:
        main()
    except Exception as error:
        with contextlib.suppress(OSError):
            os.write(2, f"The project is complete, but its last step failed: {error!r}\n".encode())
