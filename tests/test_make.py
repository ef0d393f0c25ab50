"""The goals of both Makefiles, above all how they come to an environment."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT, TEMPLATE_FOLDER, Baker, run
from ruamel.yaml import YAML


@pytest.mark.slow
def test_make_demo_trains_a_project_of_the_defaults(
    template: Path, python_with_cookiecutter: Callable[[str], Path], tmp_path: Path
) -> None:
    python_with_cookiecutter("2.6.0")  # skips the test where nothing can be installed
    copy = tmp_path / "a clone"
    shutil.copytree(template, copy)
    # A project of an earlier demo is replaced.
    (copy / "build" / "demo" / "my-research").mkdir(parents=True)
    environment = {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"}
    said = run("make", "demo", cwd=copy, env=environment, timeout=2400).stdout
    folder, picture = "build/demo/my-research/results/run", "learning_curve.png"
    assert said.endswith(
        f"\nThe run:            {folder}\nThe learning curve: {folder}/{picture}\n"
    )
    assert json.loads((copy / folder / "meta.json").read_text())["status"] == "finished"
    assert (copy / folder / picture).read_bytes().startswith(b"\x89PNG")
    project = copy / "build" / "demo" / "my-research"
    assert "already finished" in run("make", "train", cwd=project, env=environment).stdout


def test_the_template_explains_itself(template: Path) -> None:
    said = run("make", cwd=template).stdout
    for goal in ("demo", "test", "test-all", "fault-test", "lint", "lock", "benchmark"):
        assert f"make {goal}" in said


@pytest.fixture
def make_project(bake: Baker, environment: dict[str, str]) -> Callable[..., tuple[int, str]]:
    """Run make in a project; nothing can be installed, since neither uv nor pip work."""
    project = bake().project
    tools = project.parent / "tools"
    tools.mkdir()
    for tool in ("awk", "cmp", "cp", "echo", "make", "mv", "rm", "sh"):
        where = shutil.which(tool)
        assert where, tool
        (tools / tool).symlink_to(where)

    def make(goal: str, **variables: str) -> tuple[int, str]:
        done = run(
            *("make", "--no-print-directory", goal),
            cwd=project,
            env={**environment, "PATH": str(tools), **variables},
            check=False,
        )
        return done.returncode, done.stdout + done.stderr

    return make


def write_python(folder: Path, version: tuple[int, int]) -> None:
    """Write a stand-in for Python of this version, as far as `make setup` asks it anything."""
    (folder / "bin").mkdir(parents=True)
    supported = (3, 11) <= version <= (3, 13)
    said = f"Python {version[0]}.{version[1]}.0"
    (folder / "bin" / "python").write_text(
        f'#!/bin/sh\ncase "$*" in\n--version) echo {said};;\n-c*) exit {int(not supported)};;\n'
        '"-m pip --version") ;;\n'
        '*) echo "installs: $*"; exit 7;;\nesac\n'
    )
    (folder / "bin" / "python").chmod(0o755)


def test_make_explains_itself(make_project: Callable[..., tuple[int, str]]) -> None:
    code, said = make_project("help")
    assert code == 0, said
    for goal in ("setup", "train", "test", "lint", "lock", "clean"):
        assert f"make {goal}" in said


def test_an_active_environment_is_used(
    make_project: Callable[..., tuple[int, str]], project: Path, tmp_path: Path
) -> None:
    write_python(tmp_path / "active", (3, 12))
    code, said = make_project("setup", VIRTUAL_ENV=str(tmp_path / "active"))
    assert code != 0, "the stand-in cannot install"
    assert "installs: -m pip install" in said
    # What has been installed is not installed again.
    shutil.copy(project / "requirements.txt", tmp_path / "active" / ".installed-requirements.txt")
    assert make_project("setup", VIRTUAL_ENV=str(tmp_path / "active")) == (0, "")
    conda = {"CONDA_PREFIX": str(tmp_path / "active")}
    assert make_project("setup", CONDA_DEFAULT_ENV="research", **conda) == (0, "")
    # conda's base is active in every shell of its users: nothing is installed there.
    code, said = make_project("setup", CONDA_DEFAULT_ENV="base", **conda)
    assert code != 0
    assert "No Python 3.11 to 3.13 was found" in said


def test_an_unsuitable_python_is_refused(
    make_project: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    write_python(tmp_path / "old", (3, 9))
    code, said = make_project("setup", VIRTUAL_ENV=str(tmp_path / "old"))
    assert code != 0
    assert "is Python 3.9.0, but the project needs Python 3.11 to 3.13" in said
    code, said = make_project("setup", VIRTUAL_ENV=str(tmp_path / "gone"))
    assert code != 0
    assert "has no bin/python" in said
    code, said = make_project("setup")
    assert code != 0
    assert "No Python 3.11 to 3.13 was found" in said
    assert "install one" in said


@pytest.mark.parametrize(
    ("user", "there", "code", "said"),
    [
        ("1000", ("gcc", "chromium"), 0, "make lint\nmake test\nmake test-all\n"),
        ("1000", ("chromium",), 1, "This needs root: apt-get install gcc libc6-dev\n"),
        ("0", ("chromium",), 100, "apt-get update\n"),
    ],
    ids=["without root and SLURM", "without gcc", "packages cannot be had"],
)
def test_ci_passes_over_nothing_but_what_needs_root(
    user: str, there: tuple[str, ...], code: int, said: str, tmp_path: Path
) -> None:
    stubs = {
        "id": f"echo {user}",
        "apt-get": 'echo "apt-get $1"; exit 100',
        "make": 'echo "make $1"',
        **dict.fromkeys(("python3", "uv", *there), "exit 0"),
    }
    for name, script in stubs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "dirname").symlink_to(shutil.which("dirname") or "")
    bash = shutil.which("bash") or ""
    done = run(bash, ROOT / ".ci" / "run", env={"PATH": str(tmp_path)}, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (code, said)


@pytest.mark.parametrize("house", [ROOT, ROOT / TEMPLATE_FOLDER], ids=["template", "project"])
def test_workflows_try_every_python_and_the_oldest_and_newest_versions(house: Path) -> None:
    workflow = YAML(typ="safe").load((house / ".github" / "workflows" / "ci.yml").read_text())
    jobs = workflow["jobs"]
    assert jobs["test"]["strategy"]["matrix"]["python"] == ["3.11", "3.12", "3.13"]
    tried = jobs["versions"]["strategy"]["matrix"]["include"]
    assert [(each["python"], each["resolution"]) for each in tried] == [
        ("3.11", "lowest-direct"),
        ("3.13", "highest"),
    ]
    assert "schedule" in workflow["on"] and "schedule" in jobs["pre-releases"]["if"]
    for job in jobs.values():
        for step in job["steps"]:
            assert step.keys() & {"run", "uses"}
            script = step.get("run", "").replace("${{ matrix.resolution }}", "highest")
            assert run("bash", "-n", "-c", script, check=False).returncode == 0, script
