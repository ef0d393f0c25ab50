"""What the tests share: a clean copy of the template, and a project generated as a user does it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import venv
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from fault_lab import Lab, opened

if "PYTEST_XDIST_WORKER" in os.environ:  # the others only hand out the tests
    import libraries

    assert libraries

ROOT = Path(__file__).resolve().parent.parent
pytest_plugins = ["machinery"]
TEMPLATE_FOLDER = "<<cookiecutter.project>>"
FAIL_ON_SKIP = "TEMPLATE_TESTS_FAIL_ON_SKIP"

# Files of tests that take minutes: begun last, one of them would run on alone.
LONGEST = [
    "own_tests",
    "docs",
    "ports",
    "faults_disk",
    "faults",
    "training_loop",
    "guard",
    "session",
    "hooks",
    "run_folders",
    "variants",
    "slurm",
    "cruft",
    "faults_distribution",
    "faults_iterators",
    "ray",
    "torch",
    "trackers",
    "make",
    "check_resume",
    "distribution",
    "reproduction",
    "bake",
    "edflow",
    "sweep",
    "search",
    "sixty_runs",
    "report_page",
    "deephub",
    "iterators",
    "run",
    "predictions",
    "plot",
    "answers",
    "fingerprint",
    "feeders",
    "trust",
    "evaluation",
    "checkpoint",
]

# nohup, or a shell's &, which the tests may be run by, makes children ignore these; what they start
# here must not.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)

# `make test ARGS=...` hands these down, and a make that a test runs would take them for its own.
for variable in ("ARGS", "MAKEFLAGS", "MAKELEVEL", "MFLAGS", "MAKEOVERRIDES"):
    os.environ.pop(variable, None)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first, each as it is; `--no-loadscope-reorder` leaves them there."""
    rank = {f"test_{name}.py": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Where nothing may be skipped but what needs root, a skipped test fails the session."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    skipped = reporter.stats.get("skipped", []) if reporter else []
    if os.geteuid() != 0:
        skipped = [report for report in skipped if "needs root" not in str(report.longrepr)]
    if os.environ.get(FAIL_ON_SKIP) and reporter and skipped:
        reporter.write_line(f"\n{FAIL_ON_SKIP} is set, and tests were skipped.", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def run(*command: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command with captured text, and fail the test with its output if it fails.

    `check=False` leaves the exit code to the caller; the other options are those of subprocess.run.
    """
    check = options.pop("check", True)
    options = {"capture_output": True, "text": True, "timeout": 600, **options}
    if "input" not in options:
        options["stdin"] = subprocess.DEVNULL
    words = [str(word) for word in command]
    done = subprocess.run(words, check=False, **options)
    if check and done.returncode != 0:
        pytest.fail(f"{words} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
    return done


def commit_all(repository: Path, message: str) -> None:
    """Commit everything in `repository`, which is made if it is none, under a made-up identity."""
    identity = ("-c", "user.name=Tester", "-c", "user.email=tester@example.org")
    run("git", "init", "--quiet", cwd=repository)
    run("git", "add", "--all", cwd=repository)
    run("git", *identity, "commit", "--quiet", "--message", message, cwd=repository)


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A git repository with the template as the working tree has it, without ignored files."""
    copy = tmp_path_factory.mktemp("template") / "research-template"
    listing = ("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    done = run(*listing, cwd=ROOT, check=False)
    if done.returncode == 0:
        for name in filter(None, done.stdout.split("\0")):
            if (ROOT / name).is_file():
                (copy / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, copy / name)
    else:  # not a clone, an unpacked archive
        ignored = shutil.ignore_patterns("build", ".venv", "__pycache__", ".*_cache", ".code")
        shutil.copytree(ROOT, copy, ignore=ignored)
    commit_all(copy, "The template")
    return copy


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """The environment of somebody who has configured nothing, with an empty home."""
    home = tmp_path / "home"
    home.mkdir()
    kept = ("PATH", "LANG", "LC_ALL", "TMPDIR", "PYTHONPYCACHEPREFIX")
    return {
        **{name: os.environ[name] for name in kept if name in os.environ},
        "HOME": str(home),
        "GIT_CONFIG_NOSYSTEM": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }


@dataclass
class Bake:
    """What `cookiecutter` did: how it ended, what it said, and the folder that it wrote into."""

    code: int
    said: str
    output: Path

    @property
    def project(self) -> Path:
        """The one folder in the output folder."""
        (folder,) = self.output.iterdir()
        return folder


Baker = Callable[..., Bake]


@pytest.fixture
def bake(template: Path, environment: dict[str, str], tmp_path: Path) -> Baker:
    """Generate a project with the command line of cookiecutter.

    bake(name="value", ...) answers on the command line. The other arguments: `options` are more
    words of the command line, `typed` is what a user types (`--no-input` is left out then),
    `python` the interpreter of another environment, `source` another place of the template, `env`
    more of the environment; `fails` says that the command is to fail.
    """
    count = 0

    def bake_project(
        *,
        options: tuple[str, ...] = (),
        typed: str | None = None,
        python: Path | str = sys.executable,
        source: object = template,
        fails: bool = False,
        env: dict[str, str] | None = None,
        **answers: str,
    ) -> Bake:
        nonlocal count
        count += 1
        output = tmp_path / f"output{count}"
        output.mkdir()
        command = [python, "-m", "cookiecutter", source, "--output-dir", output, *options]
        if typed is None and "--replay" not in options:
            command.append("--no-input")
        command += [f"{name}={value}" for name, value in answers.items()]
        done = run(
            *command,
            cwd=tmp_path,
            env=environment | (env or {}),
            check=False,
            **({} if typed is None else {"input": typed}),
        )
        said = done.stdout + done.stderr
        assert (done.returncode != 0) == fails, said
        return Bake(done.returncode, said, output)

    return bake_project


@pytest.fixture(scope="session")
def project(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project generated with the defaults, not to be changed by a test."""
    return generate(template, tmp_path_factory.mktemp("defaults"))


@pytest.fixture(scope="session")
def core(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project without the rooms that can be left out, not to be changed by a test."""
    return generate(template, tmp_path_factory.mktemp("core"), "rooms=core")


def generate(template: Path, output: Path, *answers: str) -> Path:
    """Generate a project in an empty folder, with the defaults but for `answers`."""
    home = {**os.environ, "HOME": str(output / "home")}
    (output / "home").mkdir()
    command = (sys.executable, "-m", "cookiecutter", template, "--no-input", "-o", output)
    run(*command, *answers, cwd=output, env=home)
    return output / "my-research"


@pytest.fixture(scope="module")
def lab(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """A copy of the default project, in which runs go wrong at chosen places; see `fault_lab`."""
    with opened(project, tmp_path_factory.mktemp("lab")) as a_lab:
        yield a_lab


@pytest.fixture(scope="session")
def python_with_cookiecutter(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[[str], Path]]:
    """Give the interpreter of an environment with another version of cookiecutter, made once.

    The test is skipped where that cannot be installed.
    """
    made: dict[str, Path | str] = {}

    def install(version: str) -> Path | str:
        folder = tmp_path_factory.mktemp(f"cookiecutter-{version}")
        python = folder / "bin" / "python"
        wanted = f"cookiecutter=={version}"
        if shutil.which("uv"):
            run("uv", "venv", "--quiet", "--clear", "--python", sys.executable, folder, check=False)
            done = run("uv", "pip", "install", "--python", python, wanted, check=False)
        else:
            venv.create(folder, with_pip=True)
            done = run(python, "-m", "pip", "install", wanted, check=False)
        if done.returncode == 0:
            return python
        reason = done.stderr.strip().splitlines() or ["no reason given"]
        return f"{wanted} cannot be installed here: {reason[-1]}"

    def python_with(version: str) -> Path:
        if version not in made:
            made[version] = install(version)
        python = made[version]
        if isinstance(python, str):
            pytest.skip(python)
        return python

    yield python_with


def files_below(folder: Path) -> dict[str, bytes]:
    """Return the content of every file below `folder` by its relative path, git's own left out."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and ".git" not in path.relative_to(folder).parts
    }
