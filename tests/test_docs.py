"""Types what the READMEs and the pages in docs/ say, and compares what comes with what they show.

A block without a language holds commands, each with the output that is shown of it below; `…`
stands for lines that are left out. A comment `exit code N` says how a command ends, if not with 0.
A block of Python or YAML under a line that ends in a file's name and a colon is written there. All
commands are typed in their order, in one fresh project, with nothing but PATH and a home.
"""

from __future__ import annotations

import ast
import os
import re
import resource
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from conftest import ROOT, TEMPLATE_FOLDER, run
from ruamel.yaml import YAML

IN_TEMPLATE = ROOT / TEMPLATE_FOLDER

# What is not typed, and why: the beginning of a command, and the reason.
EXCEPTIONS = {
    "make demo": "downloads an environment; test_make does it",
    "python bin/train.py cifar10 results/cifar ": "downloads CIFAR-10",
    "python bin/train.py cifar10 results/both ": "needs two GPUs",
    "python bin/train.py cifar10 results/four ": "needs a cluster",
    "python bin/train.py cifar10 results/job ": "needs a cluster; test_slurm has one",
    "python bin/sweep.py cifar10 results/jobs ": "needs a cluster; test_slurm has one",
    "pip install -c requirements.txt mlflow-skinny": "a download; test_trackers does it",
    "pip install -c requirements.txt wandb": "a download; test_trackers does it",
    "python bin/train.py iterator_torch results/torch_net ": "needs PyTorch; test_torch has it",
    "python bin/train.py digits results/tracked --hooks='[{class: src.mlflow_hook": "see MLflow's",
    "python bin/train.py digits results/tracked --hooks='[{class: src.wandb_hook": "see W&B's",
}

PROGRAMS = {"cd", "cmp", "cookiecutter", "cp", "cruft", "export", "git", "make", "pip"}
PROGRAMS |= {"python", "sed", "source", "tensorboard"}

# What is another one each time. The rest has to come as it is shown, but for the width of columns.
VARIES = [
    (r"\b\d+\.\d s$", "SECONDS"),
    (r"\b\d+ (s|min|h|days)\b", "AGE"),
    (r"\b\d+(:\d\d)+\b", "DURATION"),
    (r"\b(?=\w*\d)[0-9a-f]{7,8}\b\+?", "COMMIT"),
    # These depend on the processor, too.
    (r"(best epoch|\.h5 of (?:epoch|step)) \d+", r"\1 N"),
    (r"(val_\w+ \d\S*) \(\d+\)", r"\1 (N)"),
    (r"(best val_loss \S+ results/\w+/)\S+", r"\1TRIAL"),
    (r"(killed after the steps) \[.*\]", r"\1 STEPS"),
    (r"\s+", " "),
]
NUMBER = re.compile(r"-?\d+\.\d+")
# Metrics come within so much, for another processor rounds in another way.
TOLERANCE = 0.1, 0.25  # absolute, and of the number

# What is said while one waits, and by the shell.
NOISE = re.compile(r"^importing TensorFlow …$|resource_tracker|^bash: line \d+: +\d+ Killed")


@dataclass
class Block:
    """A block of code in a page."""

    page: Path
    line: int
    language: str
    content: str
    file: str  # where the line above it says that it belongs, or ""
    section: int


@dataclass
class Command:
    """What is typed, how it is to end, and what is shown of its output."""

    text: str
    line: int
    exit_code: int = 0
    shown: list[str] = field(default_factory=list)


def blocks_of(page: Path) -> list[Block]:
    """Return the blocks of code in a page."""
    blocks: list[Block] = []
    opened: Block | None = None
    before, section = "", 0
    for number, line in enumerate(page.read_text().splitlines(), start=1):
        if line.startswith("#%"):  # a condition of the template's
            continue
        if opened is not None and line == "```":
            blocks.append(opened)
            opened, before = None, ""
        elif opened is not None:
            opened.content += line + "\n"
        elif fence := re.fullmatch(r"```(\w*)", line):
            named = re.search(r"`([\w./]+\.(?:py|yaml))`:$", before)
            file = named[1] if named else ""
            opened = Block(page, number + 1, fence[1], "", file, section)
        elif line.strip():
            before = line
            section += line.startswith("## ")
    assert opened is None, f"{page}: a block is not closed"
    return blocks


def commands_of(block: Block) -> list[Command]:
    """Return the commands in a block without a language, with what is shown of each."""
    commands: list[Command] = []
    continues = False
    for number, line in enumerate(block.content.splitlines(), start=block.line):
        if continues:
            commands[-1].text += "\n" + line
        elif line.split(" ")[0] in PROGRAMS or line.startswith("./"):
            commands.append(Command(line, number))
        else:
            assert commands, f"{block.page}:{number}: this is the output of no command: {line}"
            commands[-1].shown.append(line)
        continues = line.endswith("\\") and not commands[-1].shown
    for command in commands:
        if said := re.search(r"#.*\bexit code (\d+)", command.text):
            command.exit_code = int(said[1])
    return commands


def code_blocks(text: str, language: str) -> list[str]:
    """Return the content of each block in a language."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [block for name, block in blocks if name == language]


def words_of_commands(text: str) -> list[list[str]]:
    """Return the words of each command that begins with `python`; `\\` joins lines."""
    lines = "\n".join(code_blocks(text, "")).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.startswith("python ")]


def pages_of(project: Path) -> list[Path]:
    """Return the project's README and its pages, in the order in which the README names them."""
    names = re.findall(
        r"\]\((docs/\w+\.md)\)", (project / "README.md").read_text().split("| page")[1]
    )
    return [project / "README.md", *(project / name for name in dict.fromkeys(names))]


def is_excepted(command: str) -> bool:
    """Whether a command is one of those that are not typed."""
    return any(" ".join(command.split()).startswith(start) for start in EXCEPTIONS)


def normal(line: str) -> str:
    """Return a line without what is another one each time."""
    for pattern, name in VARIES:
        line = re.sub(pattern, name, line)
    return line.strip()


def agree(shown: str, came: str) -> bool:
    """Whether a line came as it is shown; numbers with a point may differ a little."""
    if NUMBER.split(shown) != NUMBER.split(came):
        return False
    pairs = zip(NUMBER.findall(shown), NUMBER.findall(came), strict=True)
    absolute, relative = TOLERANCE
    return all(
        abs(float(one) - float(other)) <= absolute + relative * abs(float(one))
        for one, other in pairs
    )


def matches(shown: list[str], came: list[str]) -> bool:
    """Whether lines came as they are shown, where `…` stands for any lines."""
    if not shown:
        return not came
    if shown[0] == "…":
        return any(matches(shown[1:], came[start:]) for start in range(len(came) + 1))
    return bool(came) and agree(shown[0], came[0]) and matches(shown[1:], came[1:])


def furnish(project: Path) -> None:
    """Give a project the environment that `make setup` would make: this one, under its own name."""
    environment = project / ".venv"
    (environment / "bin").mkdir(parents=True)
    for program in (Path(sys.prefix) / "bin").iterdir():
        if not program.name.lower().startswith("activate"):
            (environment / "bin" / program.name).symlink_to(program)
    (environment / "lib").symlink_to(Path(sys.prefix) / "lib")
    settings = Path(sys.prefix) / "pyvenv.cfg"
    if settings.exists():
        shutil.copy(settings, environment)
    else:  # not a virtual environment, so what is installed for the system counts
        home = Path(sys.executable).resolve().parent
        (environment / "pyvenv.cfg").write_text(
            f"home = {home}\ninclude-system-site-packages = true\n"
        )
    shutil.copy(project / "requirements.txt", environment / ".installed-requirements.txt")
    (environment / "bin" / "activate").write_text(f"PATH={environment}/bin:$PATH\n")


class Typist:
    """Types commands one after the other, as into one shell.

    Args:
        folder: an empty one, for the home and what is made.
        template: a repository, which `gh:org/template` is made to mean.
    """

    def __init__(self, folder: Path, template: Path) -> None:
        self.folder, self.start = folder, folder / "work"
        self.start.mkdir()
        home, tools, remote = folder / "home", folder / "tools", folder / "org" / "template"
        for made in (home, tools, remote.parent):
            made.mkdir()
        for program in ("cookiecutter", "cruft"):
            (tools / program).symlink_to(Path(sys.prefix) / "bin" / program)
        remote.symlink_to(template)
        (home / ".cookiecutterrc").write_text(f'abbreviations:\n  gh: "{folder}/{{0}}"\n')
        (home / ".gitconfig").write_text(
            f'[url "{folder}/org/"]\n\tinsteadOf = https://github.com/org/\n'
        )
        self.environment = {"PATH": f"{tools}:{os.environ['PATH']}", "HOME": str(home)}
        self.cwd = self.start

    def type(self, command: str) -> tuple[int, list[str]]:
        """Type a command; return how it ended, and the lines that it wrote."""
        after = self.folder / "after"
        script = f'{command}\ncode=$?\n{{ pwd; env -0; }} > "{after}"\nexit $code\n'
        done = subprocess.run(
            ["bash", "-c", script],
            cwd=self.cwd,
            env=self.environment,
            input="\n" * 20,
            capture_output=True,
            text=True,
            timeout=1800,
        )
        folder, _, rest = after.read_text().partition("\n")
        self.cwd = Path(folder)
        pairs = (entry.split("=", 1) for entry in rest.split("\0") if entry)
        left_out = ("_", "OLDPWD", "PWD", "SHLVL")
        self.environment = {name: value for name, value in pairs if name not in left_out}
        for project in (self.cwd, *self.cwd.glob("*/")):
            if (project / "bin" / "train.py").exists() and not (project / ".venv").exists():
                furnish(project)
        said = (done.stdout + done.stderr).splitlines()
        return done.returncode, [line for line in said if not NOISE.search(line)]

    def follow(self, page: Path, sections_start_over: bool = False) -> list[str]:
        """Do what a page says from its top to its end; return what did not come as it says."""
        problems, section = [], 0
        for block in blocks_of(page):
            if sections_start_over and block.section != section:
                self.cwd, section = self.start, block.section
            if block.file:
                target = self.cwd / block.file
                written = target.read_text() if target.exists() and target.suffix == ".py" else ""
                target.write_text(written + block.content)
            if block.language:
                continue
            for command in commands_of(block):
                if is_excepted(command.text):
                    continue
                code, came = self.type(command.text)
                shown = [normal(line) for line in command.shown if line.strip()]
                place = f"{page.name}:{command.line}: {command.text}"
                if code != command.exit_code:
                    problems.append(f"{place}\nended with {code}:\n" + "\n".join(came[-30:]))
                elif shown and not matches(shown, [normal(x) for x in came if x.strip()]):
                    problems.append(f"{place}\nwrote:\n" + "\n".join(came[:40]))
        return problems


@pytest.fixture(scope="module")
def typist(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Typist]:
    """Somebody who types; what has been made for one page is there for the next."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    yield Typist(tmp_path_factory.mktemp("docs"), template)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(f"\nThe commands of all pages took {seconds:.0f} seconds of the processor.")


@pytest.mark.slow
def test_the_template_s_readme(typist: Typist) -> None:
    problems = typist.follow(ROOT / "README.md", sections_start_over=True)
    assert not problems, "\n\n".join(problems)


@pytest.mark.slow
def test_the_protocols(typist: Typist) -> None:
    typist.cwd = typist.folder / "protocols"
    typist.cwd.mkdir()
    problems = typist.follow(ROOT / "docs" / "protocols.md")
    assert not problems, "\n\n".join(problems)


@pytest.fixture(scope="module")
def fresh(typist: Typist) -> Path:
    """The project in which all that the project's pages say is typed."""
    typist.cwd = typist.folder / "fresh"
    typist.cwd.mkdir()
    code, said = typist.type("cookiecutter gh:org/template --no-input")
    assert code == 0, said
    return typist.cwd / "my-research"


@pytest.mark.slow
@pytest.mark.parametrize("page", [str(p.relative_to(IN_TEMPLATE)) for p in pages_of(IN_TEMPLATE)])
def test_a_page_of_the_project(typist: Typist, fresh: Path, page: str) -> None:
    typist.cwd = fresh
    problems = typist.follow(fresh / page)
    assert not problems, "\n\n".join(problems)


def all_pages() -> list[Path]:
    own = (ROOT / "README.md", ROOT / "docs" / "decisions.md", ROOT / "docs" / "protocols.md")
    return [*own, *pages_of(IN_TEMPLATE)]


def test_every_page_is_followed() -> None:
    there = {IN_TEMPLATE / "README.md", *(IN_TEMPLATE / "docs").glob("*.md")}
    assert set(pages_of(IN_TEMPLATE)) == there


def test_few_commands_are_not_typed() -> None:
    typed = [
        " ".join(command.text.split())
        for page in all_pages()
        for block in blocks_of(page)
        if not block.language
        for command in commands_of(block)
    ]
    assert len(typed) > 60
    assert sum(map(is_excepted, typed)) <= 11
    for start in EXCEPTIONS:
        assert any(command.startswith(start) for command in typed), f"nobody says {start}"


def test_lines_agree_as_they_should() -> None:
    assert matches(["a", "…", "b"], ["a", "x", "y", "b"])
    assert matches(["…", "b"], ["b"])
    assert not matches(["a", "…"], ["b", "a"])
    assert not matches(["a"], ["a", "b"])
    table = "results/a  finished  8/8  val_loss 0.3301 (8)  10 s  0:03  digits  70b381d4"
    other = "results/a finished 8/8 val_loss 0.35 (7) 2 min 0:13 digits 1a2b3c4d+"
    assert agree(normal(table), normal(other))
    assert not agree(normal(table), normal(other.replace("8/8", "7/8")))
    assert not agree("loss 0.3", "loss 0.6")


def test_snippets_are_python_and_yaml() -> None:
    for page in all_pages():
        for block in blocks_of(page):
            assert block.language in ("", "json", "python", "text", "yaml"), block
            if block.language == "python":
                compile(block.content, f"{page}:{block.line}", "exec")
            elif block.language in ("json", "yaml"):
                assert YAML(typ="safe").load(block.content), block


LOOK_UP = """
import importlib, sys
for name in sys.argv[1:]:
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        try:
            for part in parts[end:]:
                found = getattr(found, part)
            break
        except AttributeError:
            pass
        except ModuleNotFoundError as error:
            assert error.name == "torch", error  # an extra
            break
    else:
        print(name)
"""


@pytest.mark.slow
def test_names_that_are_imported_exist(project: Path) -> None:
    names = set()
    for page in all_pages():
        names |= set(re.findall(r"`((?:engine|vegab)(?:\.\w+)+)`", page.read_text()))
        for block in blocks_of(page):
            for node in ast.walk(ast.parse(block.content if block.language == "python" else "")):
                if isinstance(node, ast.ImportFrom) and node.module:
                    names |= {f"{node.module}.{alias.name}" for alias in node.names}
    ours = sorted(name for name in names if name.split(".")[0] in ("engine", "src", "vegab"))
    assert len(ours) > 5
    missing = run(sys.executable, "-c", LOOK_UP, *ours, cwd=project).stdout.split()
    assert not missing


def test_files_that_are_named_exist(project: Path) -> None:
    made = {block.file for page in pages_of(project) for block in blocks_of(page)}
    for page in pages_of(project):
        text = page.read_text()
        named = re.findall(r"`((?:bin|configs|data|docs|engine|src|vegab)/[\w/.*]*)`", text)
        tree = [line.split("  ")[0] for line in "".join(code_blocks(text, "text")).splitlines()]
        named += [
            name for line in tree for name in line.split() if re.fullmatch(r"[\w/.]+/.*", name)
        ]
        for name in named:
            assert name in made or list(project.glob(name.rstrip("/"))), f"{page.name}: {name}"
        for link in re.findall(r"\]\((?!https?:)([^)#]+)", text):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_a_readme_is_a_page(project: Path) -> None:
    assert len((project / "README.md").read_text().splitlines()) <= 140
