"""The READMEs are the first thing that is tried: what they say to type works."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from conftest import ROOT, run


def code_blocks(text: str, language: str) -> list[str]:
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [block for name, block in blocks if name == language]


def commands_of(text: str) -> list[list[str]]:
    """Return the words of each command in a block without a language; `\\` joins lines."""
    lines = "\n".join(code_blocks(text, "")).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.startswith("python ")]


@pytest.fixture
def own(project: Path, tmp_path: Path) -> Path:
    """A project of one's own, with a run to speak of."""
    copy = tmp_path / "own"
    shutil.copytree(project, copy, symlinks=True)
    for name in ("run", "a", "n8_s0"):
        (copy / "results" / name).mkdir(parents=True)
        (copy / "results" / name / "config.json").write_text('{"seed": 3}')
    return copy


@pytest.mark.parametrize("readme", ["template", "project"])
def test_every_command_line_of_a_readme_is_understood(readme: str, own: Path) -> None:
    path = ROOT / "README.md" if readme == "template" else own / "README.md"
    commands = commands_of(path.read_text())
    assert len(commands) >= 6
    for _, script, *arguments in commands:
        # What it would do is what it was told to do; that it does it is tested elsewhere.
        option = "--dry_run" if script == "bin/train.py" else "--help"
        run(sys.executable, script, *arguments, option, cwd=own)


def test_the_examples_of_the_readme_work_when_they_are_pasted(own: Path) -> None:
    model, config = code_blocks((own / "README.md").read_text(), "python")
    with open(own / "src" / "models.py", "a") as file:
        file.write(f"\n\n{model}")
    configs = own / "configs" / "__init__.py"
    before, marker, after = configs.read_text().partition("registry.add_folder")
    configs.write_text(before + config + "\n" + marker + after)
    arguments = ("digits_deep", "results/mlp", "--model=mlp", "--num_epochs=1")
    run(sys.executable, "bin/train.py", *arguments, cwd=own, env=os.environ)
    assert (own / "results" / "mlp" / "model.h5").is_file()


def test_the_tree_of_the_readme_names_what_is_there(own: Path) -> None:
    tree = next(
        block
        for block in code_blocks((own / "README.md").read_text(), "")
        if block.startswith("bin/train.py")
    )
    named = [name for line in tree.splitlines() for name in line[:22].split() if "/" in name]
    assert len(named) > 10
    for name in named:
        assert list(own.glob(name.rstrip(",").rstrip("/"))), name
