"""The git repository that a new project gets, and the last words."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Baker, run

LAST_WORDS = "    make train\n    make test\n"


def log(project: Path, form: str) -> str:
    """Return the history of `project` in one of git's formats."""
    return run("git", "log", f"--format={form}", cwd=project).stdout.strip()


def write_git(folder: Path, script: str) -> dict[str, str]:
    """Write a stand-in for git; return the environment in which it is found first."""
    folder.mkdir()
    (folder / "git").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "git").chmod(0o755)
    return {"PATH": f"{folder}:{os.environ['PATH']}"}


def test_first_commit_with_the_users_identity(bake: Baker, environment: dict[str, str]) -> None:
    # A signing key that is not there and hooks that fail are the user's, not this commit's.
    hooks = Path(environment["HOME"], "hooks")
    hooks.mkdir()
    (hooks / "pre-commit").write_text("#!/bin/sh\nexit 1\n")
    (hooks / "pre-commit").chmod(0o755)
    Path(environment["HOME"], ".gitconfig").write_text(
        "[user]\nname = Ada\nemail = ada@example.org\nsigningkey = none\n"
        f"[commit]\ngpgsign = true\n[core]\nhooksPath = {hooks}\n[init]\ndefaultBranch = trunk\n"
    )
    baked = bake(author="Somebody Else")
    assert log(baked.project, "%an <%ae> | %cn <%ce> | %s") == (
        "Ada <ada@example.org> | Ada <ada@example.org> | First commit"
    )
    assert run("git", "branch", "--show-current", cwd=baked.project).stdout == "main\n"
    assert run("git", "status", "--porcelain", cwd=baked.project).stdout == ""
    assert "identity" not in baked.said


@pytest.mark.parametrize("email", ["", "r@example.org"])
def test_first_commit_without_an_identity_bears_the_authors_name(bake: Baker, email: str) -> None:
    baked = bake(author='René "R" <Müller>', email=email)
    assert log(baked.project, "%an|%ae|%s") == f'René "R" Müller|{email}|First commit'
    assert "git config user.name NAME" in baked.said
    assert baked.said.endswith(LAST_WORDS + "\n")


def test_no_repository_where_none_is_wanted(bake: Baker) -> None:
    baked = bake(git_init="no")
    assert not (baked.project / ".git").exists()
    assert baked.said.endswith(LAST_WORDS + "\n")


def test_without_git_the_project_is_made_all_the_same(bake: Baker, tmp_path: Path) -> None:
    baked = bake(env={"PATH": str(tmp_path / "nothing")})
    assert not (baked.project / ".git").exists()
    assert "git was not found" in baked.said
    assert "git init && git add --all && git commit" in baked.said
    assert baked.said.endswith(LAST_WORDS + "\n")


@pytest.mark.parametrize("failing", ["init", "commit"])
def test_a_git_that_fails_does_not_fail_the_project(
    bake: Baker, tmp_path: Path, failing: str
) -> None:
    script = (
        f'for word; do [ "$word" = {failing} ] && exit 1; done\nexec {shutil.which("git")} "$@"'
    )
    baked = bake(env=write_git(tmp_path / "bin", script))
    assert (baked.project / "pyproject.toml").is_file()
    assert "To see why: git" in baked.said
    assert baked.said.endswith(LAST_WORDS + "\n")


def test_git_of_the_callers_environment_is_left_alone(bake: Baker, tmp_path: Path) -> None:
    other = tmp_path / "other"
    run("git", "init", "--quiet", other)
    baked = bake(env={"GIT_DIR": str(other / ".git"), "GIT_WORK_TREE": str(other)})
    assert log(baked.project, "%s") == "First commit"
    assert run("git", "log", cwd=other, check=False).returncode != 0, "no commit went there"


def test_a_repository_around_the_project_has_its_files(bake: Baker, tmp_path: Path) -> None:
    run("git", "init", "--quiet", tmp_path)
    baked = bake()
    assert "lies in another git repository" in baked.said
    run("git", "add", "--all", cwd=tmp_path)
    known = run("git", "ls-files", "--stage", cwd=tmp_path).stdout
    assert f"{baked.project.name}/src/models.py" in known and "160000" not in known


def test_generating_over_a_project_keeps_its_history(bake: Baker) -> None:
    baked = bake()
    first = log(baked.project, "%H")
    bake(options=("--output-dir", str(baked.output), "--overwrite-if-exists"))
    assert log(baked.project, "%H") == first


def test_the_network_is_not_touched(bake: Baker, tmp_path: Path) -> None:
    # Python reports each connection and each look-up of a name; git has its own, so it is listed.
    (tmp_path / "watch").mkdir()
    (tmp_path / "watch" / "sitecustomize.py").write_text(
        "import sys\n"
        "def watch(event, arguments):\n"
        "    if event in ('socket.connect', 'socket.getaddrinfo'):\n"
        f"        open({str(tmp_path / 'seen')!r}, 'a').write(event)\n"
        "sys.addaudithook(watch)\n"
        f"open({str(tmp_path / 'watched')!r}, 'a').write('.')\n"
    )
    script = f'echo "$@" >> {tmp_path}/calls\nexec {shutil.which("git")} "$@"'
    bake(env={**write_git(tmp_path / "bin", script), "PYTHONPATH": str(tmp_path / "watch")})
    assert not (tmp_path / "seen").exists()
    assert (tmp_path / "watched").read_text() == "...", "cookiecutter and both hooks were watched"
    calls = (tmp_path / "calls").read_text().split()
    assert "commit" in calls
    assert not {"clone", "fetch", "ls-remote", "pull", "push", "remote", "submodule"} & set(calls)


def test_a_reader_that_goes_away_does_not_cost_the_project(
    template: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "cookiecutter", str(template), "--no-input"]
    read_end, write_end = os.pipe()
    os.close(read_end)
    done = subprocess.run(command, cwd=tmp_path, env=environment, stdout=write_end, timeout=1800)
    os.close(write_end)
    assert done.returncode == 0
    assert (tmp_path / "my-research" / ".git").is_dir()


def test_the_folder_to_enter_is_named_from_where_the_user_stands(
    bake: Baker, tmp_path: Path
) -> None:
    here = bake(env={"PWD": str(tmp_path)})
    assert f"    cd {here.output.name}/my-research\n" in here.said
    elsewhere = bake(env={"PWD": "/usr"})
    assert f"    cd {elsewhere.project}\n" in elsewhere.said
