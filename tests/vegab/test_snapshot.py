"""What a run keeps of its source, and says of it, is true: in odd repositories, of odd names."""

import json
import os
import shutil
import stat
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vegab import UsageError, provenance, snapshot

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
Change = Callable[[Path], None]

CLEAN = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
CLEAN |= {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=N", "-c", "user.email=e@example.org"]
    command = ["git", *identity, "-c", "protocol.file.allow=always", *arguments]
    done = subprocess.run(command, cwd=folder, env=CLEAN, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.decode()


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with one commit, that this process takes for its own."""
    place = tmp_path / "its project"
    (place / "src").mkdir(parents=True)
    (place / "src" / "models.py").write_text("size = 1\nkind = 'a'\n\ndepth = 2\n")
    (place / "gone.txt").write_text("one\ntwo\n")
    (place / "picture.png").write_bytes(bytes(range(256)))
    (place / ".gitignore").write_text("/results/\n/data/\n*.log\nlocal.py\n")
    git(place, "init", "-q")
    git(place, "add", ".")
    git(place, "commit", "-qm", "first")
    belongs_to(monkeypatch, place)
    return place


def belongs_to(monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    for name in ("ROOT", "PROJECT"):
        monkeypatch.setattr(snapshot, name, place)
        monkeypatch.setattr(provenance, name, place)
    for name, value in CLEAN.items():
        if name.startswith("GIT_"):
            monkeypatch.setenv(name, value)


def require_true(project: Path, top: Path | None = None) -> snapshot.Snapshot:
    """Requires that commit and patch together are the source, and `dirty` what git status says."""
    taken = snapshot.take()
    record = taken.record["git"]
    assert "unknown" not in record and "patch" not in record, record
    is_marked = bool(git(project, "tag"))
    assert record["dirty"] == (is_marked or bool(git(project, "status", "--porcelain", "--", ".")))
    again = project.parent / "again"
    if record["commit"]:
        assert record["commit"] == git(project, "rev-parse", "HEAD").strip()
        git(project.parent, "clone", "-q", "--no-checkout", str(top or project), str(again))
        git(again, "checkout", "-q", record["commit"])
    else:
        again.mkdir()
        git(again, "init", "-q")
    inside = again / (project.relative_to(top) if top else "")
    if taken.patch:
        (project.parent / "patch").write_bytes(taken.patch)
        git(inside, "apply", "--whitespace=nowarn", str(project.parent / "patch"))
    every = (path for path in inside.rglob("*") if ".git" not in path.parts and path.is_file())
    found = {str(path.relative_to(inside)): path.read_bytes() for path in every}
    assert found == taken.files
    return taken


NAMES = [
    "a tab\t.py", "a line\n.py", 'a "quote".py', "two  blanks .py ", "ünïcode ✓.py", "-dash.py",
    "[brackets].txt", "*.txt", "back\\slash.py", "100%.txt", "#hash.txt", ":(exclude)x.txt",
    ":!y.py", "'single'.py", "$HOME.py", "a/b c/d\te.txt", "ends with dot.", "~tilde.py",
    "new/{}.yaml",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_odd_names_are_kept_and_in_the_patch(project: Path, name: str) -> None:
    (project / name).parent.mkdir(parents=True, exist_ok=True)
    (project / name).write_text("a\n\tb\n")
    taken = require_true(project)
    assert taken.files[name] == b"a\n\tb\n" and taken.record["git"]["dirty"]
    # As a change of what is committed, too.
    git(project, "add", "--all")
    git(project, "commit", "-qm", "second")
    (project / name).write_text("a\n\tc")
    shutil.rmtree(project.parent / "again")
    assert require_true(project).files[name] == b"a\n\tc"


SETTINGS = [
    "diff.noprefix=true", "diff.mnemonicPrefix=true", "color.ui=always", "diff.external=false",
    "diff.context=0", "diff.renames=copies", "diff.submodule=log", "diff.suppressBlankEmpty=true",
    "diff.interHunkContext=9", "core.quotePath=false", "diff.algorithm=patience",
    "diff.wsErrorHighlight=all", "diff.relative=false", "core.abbrev=4",
    "diff.ignoreSubmodules=all", "apply.whitespace=error", "core.pager=false",
    "status.showUntrackedFiles=no",
]  # fmt: skip


def test_settings_of_the_user_do_not_spoil_the_patch(project: Path) -> None:
    shutil.copy(project / "gone.txt", project / "copied.txt")
    (project / "gone.txt").rename(project / "moved.txt")
    (project / "src" / "models.py").write_text("size = 3 \nkind = 'a'\n\ndepth = 4\n")
    for setting in SETTINGS:
        key, _, value = setting.partition("=")
        git(project, "config", key, value)
        if key != "status.showUntrackedFiles":  # which would spoil this test's own question
            shutil.rmtree(project.parent / "again", ignore_errors=True)
            require_true(project)
        git(project, "config", "--unset", key)


def staged(project: Path) -> None:
    (project / "src" / "models.py").write_text("size = 5\n")
    git(project, "add", ".")


def staged_and_changed(project: Path) -> None:
    staged(project)
    (project / "src" / "models.py").write_text("size = 6\n")


def staged_new(project: Path) -> None:
    (project / "new.py").write_text("x = 1\n")
    git(project, "add", "new.py")


def executable(project: Path) -> None:
    (project / "src" / "models.py").chmod(0o755)


def crlf(project: Path) -> None:
    (project / "src" / "models.py").write_bytes(b"size = 1\r\nkind = 2\r\n")


def unborn(project: Path) -> None:
    shutil.rmtree(project / ".git")
    git(project, "init", "-q")


def detached(project: Path) -> None:
    git(project, "checkout", "-q", "--detach")
    (project / "more.py").write_text("")


def shallow(project: Path) -> None:
    git(project, "commit", "-q", "--allow-empty", "-m", "more")
    git(project.parent, "clone", "-q", "--depth=1", f"file://{project}", "shallow")
    shutil.rmtree(project / ".git")
    shutil.move(project.parent / "shallow" / ".git", project / ".git")


def as_read_only(project: Path) -> None:
    (project / "gone.txt").unlink()
    for path in [project / ".git", *(project / ".git").rglob("*")]:
        path.chmod(path.stat().st_mode & ~(stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH))


def binary(project: Path) -> None:
    (project / "picture.png").write_bytes(bytes(reversed(range(256))))


def assumed_unchanged(project: Path) -> None:
    git(project, "update-index", "--assume-unchanged", "src/models.py", "gone.txt")
    (project / "src" / "models.py").write_text("size = 8\n")
    (project / "gone.txt").unlink()
    git(project, "tag", "marked")  # git status is not asked: it says what it was told to


def skipped(project: Path) -> None:
    git(project, "update-index", "--skip-worktree", "src/models.py")
    (project / "src" / "models.py").write_text("size = 9\n")
    git(project, "tag", "marked")


def nothing(project: Path) -> None:
    os.utime(project / "src" / "models.py", (1, 1))  # which git takes a look at for that


CHANGES: list[Change] = [
    staged, staged_and_changed, staged_new, executable, crlf, unborn, detached, shallow,
    as_read_only, binary, assumed_unchanged, skipped, nothing,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_odd_states_of_a_repository(project: Path, change: Change) -> None:
    change(project)
    require_true(project)


def test_a_project_within_another_repository(
    tmp_path: Path, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tmp_path / "whole"
    inner = Path(shutil.copytree(project, whole / "sub [1]" / "inner"))
    shutil.rmtree(inner / ".git")
    (whole / "other.py").write_text("")
    git(whole, "init", "-q")
    git(whole, "add", "--all")
    git(whole, "commit", "-qm", "all")
    (whole / "other.py").write_text("not ours\n")
    (inner / "src" / "models.py").write_text("size = 7\n")
    (inner / "new.py").write_text("x = 1\n")
    belongs_to(monkeypatch, inner)
    moved = tmp_path / "x"
    moved.mkdir()
    taken = snapshot.take()
    assert b"not ours" not in taken.patch and "other.py" not in taken.files
    git(tmp_path, "clone", "-q", str(whole), str(moved / "again"))
    (moved / "patch").write_bytes(taken.patch)
    git(moved / "again" / "sub [1]" / "inner", "apply", str(moved / "patch"))
    assert (moved / "again" / "sub [1]" / "inner" / "new.py").read_text() == "x = 1\n"
    assert "size = 7" in (moved / "again" / "sub [1]" / "inner" / "src" / "models.py").read_text()


@pytest.mark.parametrize("name", ["a:b", "c:\"d\\e'", "ends with colon:"])
def test_a_folder_of_any_name(tmp_path: Path, project: Path, name: str, monkeypatch: Any) -> None:
    place = project.rename(tmp_path / name)
    belongs_to(monkeypatch, place)
    (place / "new.py").write_text("x = 1\n")
    require_true(place)


@pytest.mark.parametrize("names", [("GIT_DIR",), ("GIT_DIR", "GIT_WORK_TREE"), ("GIT_INDEX_FILE",)])
def test_the_caller_s_repository_is_not_asked(
    tmp_path: Path, project: Path, names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    git(other, "init", "-q")
    values = {"GIT_DIR": other / ".git", "GIT_WORK_TREE": other, "GIT_INDEX_FILE": other / "i"}
    for name in names:
        monkeypatch.setenv(name, str(values[name]))
    monkeypatch.setenv("GIT_EXTERNAL_DIFF", "false")
    (project / "new.py").write_text("x = 1\n")
    require_true(project)


def test_what_git_cannot_answer_is_unknown(
    project: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (project / ".gitattributes").write_text("*.dat filter=lfs\n")
    (project / "w.dat").write_text("v1\n")
    git(project, "add", ".")
    git(project, "commit", "-qm", "lfs")
    git(project, "config", "filter.lfs.clean", "no-such-program %f")
    git(project, "config", "filter.lfs.required", "true")
    (project / "w.dat").write_text("v22\n")
    told = snapshot.take().record["git"]
    assert told["dirty"] is None and "no-such-program" in told["unknown"]
    git(project, "config", "--unset", "filter.lfs.clean")
    git(project, "config", "--unset", "filter.lfs.required")

    monkeypatch.setenv("PATH", str(tmp_path))
    told = snapshot.take().record["git"]
    assert told["dirty"] is None and "git cannot be run" in told["unknown"]
    monkeypatch.undo()
    belongs_to(monkeypatch, project)

    (project / ".git" / "HEAD").write_text("rubbish")
    told = snapshot.take().record["git"]
    assert told["dirty"] is None and "not a git repository" in told["unknown"]
    assert "src/models.py" in snapshot.take().files


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give a repository away")
def test_a_repository_of_another_user_is_unknown(project: Path) -> None:
    for path in [project, *project.rglob("*")]:
        os.chown(path, 1234, 1234)
    told = snapshot.take().record["git"]
    assert told["dirty"] is None and "dubious ownership" in told["unknown"]


def test_repositories_inside_are_kept_with_their_changes(project: Path, tmp_path: Path) -> None:
    library = tmp_path / "library"
    library.mkdir()
    git(library, "init", "-q")
    (library / "mod.py").write_text("X = 1\n")
    git(library, "add", ".")
    git(library, "commit", "-qm", "a")
    git(project, "submodule", "--quiet", "add", str(library), "src/lib")
    git(project, "commit", "-qm", "sub")
    git(project, "clone", "-q", str(library), "src/clone")
    assert snapshot.take().record["git"]["dirty"]
    for name in ("lib", "clone"):
        (project / "src" / name / "mod.py").write_text("X = 2\n")
        (project / "src" / name / "new.py").write_text("Y = 2\n")
    taken = snapshot.take()
    for name in ("lib", "clone"):
        assert taken.files[f"src/{name}/mod.py"] == b"X = 2\n"
        assert taken.files[f"src/{name}/new.py"] == b"Y = 2\n"
    assert taken.record["git"]["dirty"] and "src/lib" in taken.record["git"]["patch"]
    assert not [name for name in taken.files if "/.git" in name and "modules" not in name]


def test_links_are_kept_with_their_content(project: Path, tmp_path: Path) -> None:
    (tmp_path / "helper.py").write_text("Z = 1\n")
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "inner.py").write_text("Z = 2\n")
    (project / "src" / "helper.py").symlink_to("../../helper.py")
    (project / "src" / "package").symlink_to(tmp_path / "package")
    (project / "src" / "round").symlink_to(project / "src")
    (project / "src" / "broken.py").symlink_to("nowhere")
    taken = snapshot.take()
    assert taken.files["src/helper.py"] == b"Z = 1\n"
    assert taken.files["src/package/inner.py"] == b"Z = 2\n"
    assert not [name for name in taken.files if "round" in name]
    assert [e["path"] for e in taken.record["left_out"]] == ["src/broken.py"]


def test_data_and_secrets_are_listed_and_not_kept(project: Path) -> None:
    (project / "data" / "images").mkdir(parents=True)
    (project / "data" / "images" / "0.bin").write_bytes(bytes(10))
    (project / "pictures").mkdir()
    for number in range(snapshot.MOST_FILES + 1):
        (project / "pictures" / f"{number}.txt").write_text("x")
    (project / "pictures" / "read.py").write_text("def read(): ...\n")
    (project / "large.bin").write_bytes(bytes(snapshot.LARGEST_FILE + 1))
    secrets = [".env", ".env.local", ".netrc", "a.pem", "id_rsa", "kaggle.json", "secrets.yaml"]
    secrets += ["aws_credentials", "credentials_of_mine.py", "src/.env.d/prod", "secrets.d/x/y"]
    for name in secrets:
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_text("TOKEN=hush")
    (project / "credentials.py").write_text("def ask(): ...\n")
    git(project, "add", "credentials.py")
    taken = snapshot.take()
    left = {entry["path"]: entry for entry in taken.record["left_out"]}
    assert {name for name, entry in left.items() if entry["why"] == "secret"} == {*secrets}
    assert left["data"]["files"] == 1 and left["data"]["bytes"] == 10
    assert left["pictures"]["files"] == snapshot.MOST_FILES + 1
    assert left["large.bin"]["bytes"] == snapshot.LARGEST_FILE + 1
    assert all(entry["changed"][:2] == "20" for entry in left.values())
    assert {"pictures/read.py", "credentials.py", "src/models.py"} <= taken.files.keys()
    place = project.parent / "code.zip"
    taken.write(place)
    assert b"hush" not in b"".join(snapshot.read(place).values()) + place.read_bytes()


def test_a_secret_that_is_deleted_is_not_in_the_patch(project: Path) -> None:
    (project / ".env").write_text("TOKEN=hush")
    git(project, "add", "--force", ".env")
    git(project, "commit", "-qm", "oops")
    (project / ".env").unlink()
    taken = snapshot.take()
    assert b"hush" not in taken.patch and "hush" not in json.dumps(taken.record)
    assert taken.record["git"]["dirty"] and ".env" in taken.record["git"]["patch"]


def test_too_many_files_are_left_out_and_the_source_is_not(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshot, "MOST_ENTRIES", 100)
    monkeypatch.setattr(snapshot, "MOST_FILES", 10)
    for folder in ("all in one", *(f"in many/{n}" for n in range(20))):
        (project / folder).mkdir(parents=True)
        for n in range(90 if folder == "all in one" else 6):
            (project / folder / f"{n}.png").touch()
    taken = snapshot.take()
    assert "src/models.py" in taken.files
    left = {entry["path"]: entry for entry in taken.record["left_out"]}
    assert "all in one" in left and all("in many" in name for name in {*left} - {"all in one"})
    assert sum(entry["files"] for entry in left.values()) == 90 + 20 * 6


def test_modules_in_use_are_kept_though_git_ignores_them(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (project / "local.py").write_text("A = 1\n")
    assert "local.py" not in snapshot.take().files
    monkeypatch.syspath_prepend(str(project))
    import local

    assert local.A == 1
    assert snapshot.take().files["local.py"] == b"A = 1\n"
    del sys.modules["local"]


def test_the_same_source_is_the_same_bytes(project: Path, tmp_path: Path) -> None:
    one, other = tmp_path / "1.zip", tmp_path / "2.zip"
    snapshot.take().write(one)
    os.utime(project / "src" / "models.py", (5, 5))
    snapshot.take().write(other)
    assert one.read_bytes() == other.read_bytes()
    assert snapshot.load(one).record == snapshot.take().record


@pytest.mark.parametrize("name", ["../out.py", "/tmp/out.py", "a/../../out.py"])
def test_a_snapshot_that_leads_out_is_refused(project: Path, tmp_path: Path, name: str) -> None:
    with zipfile.ZipFile(tmp_path / "code.zip", "w") as archive:
        archive.writestr(name, "x = 1")
    with pytest.raises(UsageError, match="outside of the project"):
        snapshot.load(tmp_path / "code.zip")


def test_a_stranger_s_snapshot_is_taken_for_no_other(project: Path, tmp_path: Path) -> None:
    """Neither a false digest nor compiled code nor a link makes it run under another's name."""
    own = snapshot.take()
    place = snapshot.freeze(own)
    false = {"src/models.py": b"evil = 1\n", "src/__pycache__/models.cpython-311.pyc": b"evil"}
    false[snapshot.RECORD] = json.dumps(own.record).encode()
    with zipfile.ZipFile(tmp_path / "code.zip", "w") as archive:
        for name, content in false.items():
            archive.writestr(name, content)
    other = snapshot.load(tmp_path / "code.zip")
    assert snapshot.freeze(other) != place and not list(snapshot.freeze(other).rglob("*.pyc"))
    assert (place / "src" / "models.py").read_bytes() == own.files["src/models.py"]
    (tmp_path / "link.zip").symlink_to(tmp_path / "code.zip")
    with pytest.raises(UsageError, match="cannot read"):
        snapshot.load(tmp_path / "link.zip")
