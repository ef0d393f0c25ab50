"""A project can follow the template: what changes there arrives, and the owner's edits stay."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import TEMPLATE_FOLDER, commit_all, run

pytestmark = pytest.mark.slow

TEXT = "<< 7*7 >> 'a' \"b\" \\ <c>"


class Cruft:
    """A template under development, and a project that `cruft create` made of it."""

    def __init__(self, template: Path, folder: Path, environment: dict[str, str]) -> None:
        self.environment = environment
        self.template = folder / "template"
        shutil.copytree(template, self.template)
        self.folder = folder
        self.project = folder / "My-Great-Project"

    def __call__(self, command: str, *options: str, **settings: Any) -> str:
        """Run a command of cruft; return what it said."""
        where = self.project if self.project.exists() else self.folder
        words = (sys.executable, "-m", "cruft", command, *options)
        done = run(*words, cwd=where, env=self.environment, **settings)
        return done.stdout + done.stderr

    def change_template(self, name: str, old: str, new: str) -> None:
        """Replace a text in a file of the template and commit."""
        change(self.template / TEMPLATE_FOLDER / name, old, new)
        commit_all(self.template, "Change the template")


def change(path: Path, old: str, new: str) -> None:
    """Replace a text that stands in a file once."""
    text = path.read_text()
    assert text.count(old) == 1, (path, old)
    path.write_text(text.replace(old, new))


@pytest.fixture
def cruft(template: Path, environment: dict[str, str], tmp_path: Path) -> Cruft:
    cruft = Cruft(template, tmp_path, environment)
    typed = f"My Great Project!\n{TEXT}\n{TEXT}\n\n\n\n\n\n\n"
    said = cruft("create", str(cruft.template), input=typed)
    assert "git add .cruft.json" in said, "what to type for a clean working tree"
    commit_all(cruft.project, "Follow the template")
    return cruft


def test_a_fresh_project_is_up_to_date(cruft: Cruft) -> None:
    assert "up to date" in cruft("check")
    assert cruft("diff", "--exit-code") == ""
    assert (cruft.project / ".git").is_dir()


def test_a_change_of_the_template_reaches_a_project_with_edits(cruft: Cruft) -> None:
    change(cruft.project / "pyproject.toml", 'version = "0.1.0"', 'version = "0.2.0"')
    change(cruft.project / "etc" / "README.md", "# etc", "# Notes")
    answers = json.loads((cruft.project / ".cruft.json").read_text())
    del answers["context"]["cookiecutter"]["rooms"]  # a project that is older than this question
    (cruft.project / ".cruft.json").write_text(json.dumps(answers))
    commit_all(cruft.project, "Edits of the owner")
    history = run("git", "log", "--format=%H", cwd=cruft.project).stdout

    cruft.change_template("pyproject.toml", '"tqdm>=4.66"', '"tqdm>=4.67"')
    new_file = cruft.template / TEMPLATE_FOLDER / "etc" / "new.md"
    new_file.write_text("<< cookiecutter.project >>: << cookiecutter.__description >>\n")
    commit_all(cruft.template, "A new file")

    assert "out of date" in cruft("check", check=False)
    said = cruft("update", "--skip-apply-ask")
    assert "make train" not in said, "the copies made to compare say nothing"
    settings = (cruft.project / "pyproject.toml").read_text()
    assert '"tqdm>=4.67"' in settings
    assert 'version = "0.2.0"' in settings
    assert (cruft.project / "etc" / "README.md").read_text().startswith("# Notes")
    assert (cruft.project / "etc" / "new.md").read_text() == f"My-Great-Project: {TEXT}\n"
    assert list(cruft.project.rglob("*.rej")) == []
    assert run("git", "log", "--format=%H", cwd=cruft.project).stdout == history
    assert "up to date" in cruft("check")

    difference = cruft("diff")
    changed = [line for line in difference.splitlines() if line.startswith("diff ")]
    assert len(changed) == 2, "the owner's two edits and nothing else"
    assert "make train" not in difference


def test_an_update_brings_no_room_that_was_left_out(
    template: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    cruft = Cruft(template, tmp_path, environment)
    answers = {"project": cruft.project.name, "rooms": "core"}
    cruft("create", str(cruft.template), "--no-input", "--extra-context", json.dumps(answers))
    commit_all(cruft.project, "Follow the template")
    for name in ("engine/sweeps/new.py", "src/new.py"):
        (cruft.template / TEMPLATE_FOLDER / name).write_text("# new\n")
    cruft.change_template("engine/iterators/__init__.py", "(EDflow)", "(such as EDflow's)")
    cruft("update", "--skip-apply-ask")
    assert "up to date" in cruft("check")
    status = run("git", "status", "--porcelain", cwd=cruft.project).stdout
    assert {line.split()[1] for line in status.splitlines()} == {".cruft.json", "src/new.py"}
