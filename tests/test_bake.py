"""The ways to generate a project, and what every generated project is like."""

from __future__ import annotations

import ast
import os
import re
import shutil
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT, Baker, files_below, run
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from ruamel.yaml import YAML

# ---------------------------------------------------------------------------------------------
# Ways to call it


def test_a_folder_a_git_url_and_a_zip_give_the_same_project(
    bake: Baker, template: Path, tmp_path: Path
) -> None:
    archive = tmp_path / "template.zip"
    run("git", "archive", "--prefix=research/", f"--output={archive}", "HEAD", cwd=template)
    first, *others = [bake(source=s) for s in (template, f"git+file://{template}", archive)]
    for baked in others:
        assert files_below(baked.project) == files_below(first.project)
    for baked in (first, *others):
        listing = run("git", "ls-files", "--stage", "src/scripts", cwd=baked.project).stdout
        modes = {line.split()[-1]: line.split()[0] for line in listing.splitlines()}
        assert modes.pop("src/scripts/train_simple_CNN.py") == "100755"
        assert set(modes.values()) == {"100644"}
        assert os.access(baked.project / "src/scripts/train_simple_CNN.py", os.X_OK)
        programs = list((baked.project / "bin").glob("*.py"))
        assert programs and all(os.access(program, os.X_OK) for program in programs)


def test_replay_gives_the_same_project(bake: Baker) -> None:
    first = bake(project="My Great Project!", description='"a" \\ b', license="Apache-2.0")
    again = bake(options=("--replay",))
    assert again.project.name == first.project.name == "My-Great-Project"
    assert files_below(again.project) == files_below(first.project)


def test_answers_can_be_typed(bake: Baker) -> None:
    lines = ["My Great Project!", "It is  great.", "A. Uthor", "a@example.org", "2", "3", "2"]
    lines += ["2", "n"]
    baked = bake(typed="\n".join(lines) + "\n")
    assert baked.project.name == "My-Great-Project"
    settings = tomllib.loads((baked.project / "pyproject.toml").read_text())["project"]
    assert settings["name"] == "my-great-project"
    assert settings["description"] == "It is great."
    assert settings["authors"] == [{"name": "A. Uthor"}]
    assert settings["license"] == "BSD-3-Clause"
    assert not (baked.project / "engine" / "sweeps").exists()
    assert not (baked.project / ".git").exists()


def test_pressing_enter_accepts_the_defaults(bake: Baker) -> None:
    typed = bake(typed="\n" * 9)
    assert typed.said.count("/9]") == 9, "each question is asked once, with its explanation"
    assert "What it is about" in typed.said
    assert files_below(typed.project) == files_below(bake().project)


@pytest.mark.slow
@pytest.mark.parametrize("version", ["2.6.0", "2.7.0"])
def test_older_cookiecutters_give_the_same_project(
    bake: Baker, python_with_cookiecutter: Callable[[str], Path], version: str
) -> None:
    answers = {"project": "My Great Project!", "description": 'a "b" \\ <c> é 🎉'}
    old = bake(python=python_with_cookiecutter(version), **answers)
    assert files_below(old.project) == files_below(bake(**answers).project)


@pytest.mark.slow
def test_a_too_old_cookiecutter_is_told_so(
    bake: Baker, python_with_cookiecutter: Callable[[str], Path]
) -> None:
    baked = bake(python=python_with_cookiecutter("2.5.0"), fails=True)
    assert (
        "This template needs cookiecutter 2.6 or newer: pip install -U cookiecutter" in baked.said
    )
    assert list(baked.output.iterdir()) == []


# ---------------------------------------------------------------------------------------------
# What is in it


def test_files_say_something_but_nothing_of_the_template_or_the_machine(project: Path) -> None:
    for name, content in files_below(project).items():
        assert "cookiecutter" not in name
        assert content.strip() or Path(name).name in ("__init__.py", ".gitkeep"), name
        tag = rb"<<[^\n]*cookiecutter|<%|<#|#%|\bcookiecutter\._"
        assert b"\0" in content or not re.search(tag, content), name
        for trace in (f"{ROOT}/", f"{Path.home()}/", f"{project.parent}/"):
            assert len(trace) < 4 or trace.encode() not in content, (name, trace)


def test_everything_but_results_and_data_is_for_git(project: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(project, copy)
    for name in ("results/run/history.csv", "data/cifar.tar.gz", "env.sh", ".venv/bin/python"):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_text("x")
    status = run("git", "status", "--porcelain", "--untracked-files=all", cwd=copy).stdout
    assert status == ""
    tracked = run("git", "ls-files", cwd=copy).stdout.splitlines()
    assert set(tracked) == set(files_below(project))
    assert {"data/digits/digits.npz", "results/.gitkeep"} <= set(tracked)


@pytest.mark.parametrize(
    ("license", "first_line", "identifier"),
    [
        ("MIT", "MIT License", "MIT"),
        ("BSD-3-Clause", "BSD 3-Clause License", "BSD-3-Clause"),
        ("Apache-2.0", "Apache License", "Apache-2.0"),
        ("proprietary", "Copyright (c) A. Uthor", "LicenseRef-Proprietary"),
    ],
)
def test_licences(bake: Baker, license: str, first_line: str, identifier: str) -> None:
    project = bake(license=license, author="A. Uthor").project
    text = (project / "LICENSE").read_text()
    assert text.splitlines()[0].strip() == first_line
    assert text.count("A. Uthor") == 1
    settings = tomllib.loads((project / "pyproject.toml").read_text())["project"]
    assert settings["license"] == identifier
    citation = YAML(typ="safe").load((project / "CITATION.cff").read_text())
    assert citation.get("license") == (None if license == "proprietary" else license)


@pytest.mark.parametrize("version", ["3.11", "3.12", "3.13"])
def test_python_versions(bake: Baker, version: str) -> None:
    project = bake(python_version=version).project
    assert f"PREFERRED := {version}\n" in (project / "Makefile").read_text()
    settings = tomllib.loads((project / "pyproject.toml").read_text())["project"]
    assert settings["requires-python"] == ">=3.11,<3.14"


@pytest.mark.parametrize("accelerator", ["cpu", "cuda"])
def test_every_requirement_is_locked(bake: Baker, accelerator: str) -> None:
    project = bake(accelerator=accelerator).project
    settings = tomllib.loads((project / "pyproject.toml").read_text())
    wanted = settings["project"]["dependencies"] + settings["dependency-groups"]["dev"]

    locked: dict[str, list[Requirement]] = {}
    for line in (project / "requirements.txt").read_text().splitlines():
        if not line.startswith("#"):
            assert re.fullmatch(r"[a-z0-9-]+==[0-9a-z.]+( ; [^#@]+)?", line), line
            locked.setdefault(line.split("==")[0], []).append(Requirement(line))

    platforms = [
        {"sys_platform": system, "platform_machine": machine, "python_full_version": f"{python}.1"}
        for system, machine in (("linux", "x86_64"), ("linux", "aarch64"), ("darwin", "arm64"))
        for python in ("3.11", "3.12", "3.13")
    ]
    for platform in platforms:
        for requirement in map(Requirement, wanted):
            if requirement.marker and not requirement.marker.evaluate(platform):
                continue
            versions = [
                next(iter(found.specifier)).version
                for found in locked[canonicalize_name(requirement.name)]
                if found.marker is None or found.marker.evaluate(platform)
            ]
            assert len(versions) == 1, (requirement, platform)
            assert requirement.specifier.contains(versions[0]), requirement

    assert ("tensorflow-cpu" in locked) == (accelerator == "cpu")
    assert ("nvidia-cudnn-cu12" in locked) == (accelerator == "cuda")
    assert not {"scikit-learn", "torch", "vegab"} & set(locked)


def test_the_tests_run_with_the_versions_that_projects_get(project: Path) -> None:
    own = (ROOT / "requirements.txt").read_text().splitlines()
    assert set((project / "requirements.txt").read_text().splitlines()) <= set(own)


# ---------------------------------------------------------------------------------------------
# Rooms that can be left out

LEFT_OUT = ("engine/iterators", "engine/records", "engine/sweeps")


def test_core_is_a_part_of_the_whole_and_has_the_same_python(project: Path, core: Path) -> None:
    whole, part = files_below(project), files_below(core)
    assert part.keys() < whole.keys()
    assert [name for name in part if name.endswith(".py") and part[name] != whole[name]] == []
    assert not any((core / room).exists() for room in LEFT_OUT)
    assert run("git", "status", "--porcelain", cwd=core).stdout == ""


def test_nothing_in_core_refers_to_what_is_left_out(project: Path, core: Path) -> None:
    gone = files_below(project).keys() - files_below(core).keys()
    configs = {Path(name).stem for name in gone if name.startswith("configs/")}
    modules = {name[:-3].replace("/", ".") for name in gone if name.endswith(".py")}
    words = re.compile(
        "|".join(
            [
                *map(re.escape, {*gone, *modules, "data/toy", "--launcher"}),
                rf"train\.py ({'|'.join(configs)})\b",
            ]
        )
    )
    for file in core.rglob("*"):
        name = str(file.relative_to(core))
        if file.suffix in (".md", ".toml", ".yaml", ".yml", ".cff") or file.name == "Makefile":
            text = file.read_text()
            assert not words.search(text), (name, words.search(text))
            for link in re.findall(r"\]\(([\w./]+)[)#]", text):
                assert (file.parent / link).exists(), (name, link)
        elif file.suffix == ".py":
            for node in ast.parse(file.read_text()).body:  # not in functions, which import late
                if isinstance(node, ast.ImportFrom):
                    imported = {f"{node.module}.{alias.name}" for alias in node.names}
                    assert not {node.module, *imported} & modules, name
    settings = tomllib.loads((core / "pyproject.toml").read_text())["project"]
    assert "optional-dependencies" not in settings
    assert "crc32c" not in (core / "requirements.txt").read_text()


@pytest.mark.parametrize(
    ("words", "room"),
    [
        (["{iterator: a.B, dataset: a.c, batch_size: 1, num_steps: 1}"], "engine/iterators"),
        (["{model: {type: a.B}, train: {train_feeder: {type: c}}}"], "engine/records"),
        (["n_filters: 4", "--launcher=slurm"], "engine/sweeps"),
    ],
)
def test_core_says_what_it_is_without(
    core: Path, tmp_path: Path, words: list[str], room: str
) -> None:
    (tmp_path / "config.yaml").write_text(words[0])
    command = ("bin/train.py", tmp_path / "config.yaml", tmp_path / "run", *words[1:])
    done = run(sys.executable, *command, cwd=core, check=False)
    assert done.returncode == 2
    assert f"this project was generated without {room}" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_leaving_rooms_out_spares_what_the_user_put_there(bake: Baker) -> None:
    baked = bake(rooms="core")
    own = [baked.project / name for name in ("src/examples/mine.py", "configs/variants/mine.yaml")]
    for file in own:
        file.parent.mkdir()
        file.write_text("# mine")
    bake(rooms="core", options=("--output-dir", str(baked.output), "--overwrite-if-exists"))
    assert [file.read_text() for file in own] == ["# mine", "# mine"]
    assert not (baked.project / "src" / "examples" / "iterators.py").exists()


def test_readme_says_how_large_a_project_is(project: Path, core: Path) -> None:
    readme = (ROOT / "README.md").read_text()
    for answer, folder in (("all", project), ("core", core)):
        row = re.search(rf"\| `{answer}`[^|]*\| ([\d,]+) \| ([\d,]+) \|", readme)
        assert row, answer
        there = files_below(folder)  # a test may have run a command there
        files = {name: there[name] for name in there if "__pycache__" not in str(name)}
        lines = sum(content.count(b"\n") for name, content in files.items() if name[-3:] == ".py")
        for said, found in zip(row.groups(), (len(files), lines), strict=True):
            assert int(said.replace(",", "")) == pytest.approx(found, rel=0.03), (answer, found)


# ---------------------------------------------------------------------------------------------
# What it does


@pytest.mark.slow
@pytest.mark.parametrize("generated", ["project", "core"])
@pytest.mark.parametrize(
    "command",
    [("ruff", "check", "--no-cache"), ("ruff", "format", "--no-cache", "--check"), ("mypy",)],
)
def test_code_is_clean(
    generated: str, request: pytest.FixtureRequest, tmp_path: Path, command: tuple[str, ...]
) -> None:
    project = request.getfixturevalue(generated)
    cache = {"MYPY_CACHE_DIR": str(tmp_path), **os.environ}  # that of `make lint`, from make
    run(sys.executable, "-m", *command, cwd=project, env=cache)
