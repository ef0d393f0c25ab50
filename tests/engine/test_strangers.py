"""A run folder that somebody else made is read without harm, and nothing is written out of it."""

import hashlib
import importlib.util
import json
import os
import pickle
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import forked
import h5py
import pytest
from machinery import ROOT, Command

from engine import checkpoints
from engine.iterators import StoredOutputs
from engine.pictures import draw_learning_curve
from engine.runs import comparison, curves, reproduction, results, write_report
from engine.sweeps import sweep
from vegab import UsageError, read_run, snapshot
from vegab.config import read_yaml
from vegab.execution import printable
from vegab.files import read_json, write_json
from vegab.run_folder import RunFolder, living_owner, refuse_links, take_lock

Plant = Callable[[Path], Any]
SECRET = "the content of a file of mine"
META = {"status": "finished", "git": {"commit": "0" * 40}, "attempts": [{"start": "2026-01-01"}]}
HISTORY = "epoch,step,loss\n0,1,0.5\n1,2,0.4\n"


def sound(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"n": 1, "monitor": "loss", "num_epochs": 2}')
    (folder / "meta.json").write_text(json.dumps(META))
    (folder / "history.csv").write_text(HISTORY)
    with zipfile.ZipFile(folder / "code.zip", "w") as archive:
        archive.writestr("src/models.py", "x = 1\n")
    return folder


class Executes:
    def __reduce__(self) -> Any:
        return os.system, ("touch executed",)


def bomb(path: Path) -> None:
    """A file of 100 kB that unpacks to 100 GB by its own account."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.py", bytes(1000))
    content = bytearray(path.read_bytes())
    place = content.rfind(b"PK\x01\x02")
    content[place + 24 : place + 28] = struct.pack("<I", 0xF0000000)
    path.write_bytes(content)


def zip_of(path: Path, **members: str) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def zip_of_damage(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.py", bytes(1000))
    path.write_bytes(path.read_bytes().replace(b"a.py", b"a.py\xff\xff\xff", 1)[:-3])


def many_names(path: Path) -> None:
    """An archive of 15 MB that lists 400,000 files, as one of 100 MB could list two million."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("0.py", "")
    content = path.read_bytes()
    listing, end = content.index(b"PK\1\2"), content.index(b"PK\5\6")
    entry = content[listing:end]
    sizes = struct.pack("<HHLL", 0xFFFF, 0xFFFF, len(entry) * 400_000, listing)
    path.write_bytes(content[:listing] + entry * 400_000 + content[end : end + 8] + sizes + b"\0\0")


def repetitive(path: Path) -> None:
    """Two runs whose code differs in a file of a few lines, many times: hours for difflib."""
    for folder, step in ((path.parent, 1), (path.parents[1] / "mine", 7)):
        zip_of(folder / "code.zip", models="".join(f"{n * step % 300}\n" for n in range(60_000)))


def circle_of_lists(path: Path) -> None:
    """A pickle of a few hundred bytes that stands for 2 ** 60 values."""
    value: list[Any] = [1]
    for _ in range(60):
        value = [value, value]
    path.write_bytes(pickle.dumps({"epoch": 1, "global_step": 1, "fingerprint": {"data": value}}))


WAYS: dict[str, Plant] = {
    "fifo": os.mkfifo,
    "deep": lambda path: path.write_text("[" * 200_000),
    "rather deep": lambda path: path.write_text('{"n": ' * 500 + "1" + "}" * 500),
    "digits": lambda path: path.write_text('{"n": ' + "9" * 5_000 + "}"),
    "infinity": lambda path: path.write_text('{"n": Infinity, "num_epochs": 1e999}'),
    "huge": lambda path: os.truncate(os.open(path, os.O_WRONLY | os.O_CREAT), 1 << 40),
    "folder": lambda path: path.mkdir(),
    "device": lambda path: path.symlink_to("/dev/zero"),
    "link": lambda path: path.symlink_to(path.parents[1] / "secret"),
    "round": lambda path: path.symlink_to(path.name),
    "empty": lambda path: path.write_text(""),
    "list": lambda path: path.write_text("[1, 2]"),
    "bytes": lambda path: path.write_bytes(bytes(range(256))),
}
FILES = (
    *("config.json", "meta.json", "history.csv", "loop_state.pkl", "code.zip", "eval/test.json"),
    "notes.json",
)
HOSTILE: list[tuple[str, str, Plant]] = [
    (name, how, plant) for name in FILES for how, plant in WAYS.items()
] + [
    ("loop_state.pkl", "executes", lambda path: path.write_bytes(pickle.dumps(Executes()))),
    *(
        ("loop_state.pkl", kind, lambda path, value=value: path.write_bytes(pickle.dumps(value)))
        for kind, value in {
            "digits": {"epoch": 10**6000, "global_step": 1},
            "text": {"epoch": "1", "global_step": 1},
            "other": {"epoch": 1, "global_step": 1, "fingerprint": [1]},
        }.items()
    ),
    ("loop_state.pkl", "bomb", circle_of_lists),
    *(
        ("history.csv", kind, lambda path, text=text: path.write_text(text))
        for kind, text in {
            "infinity": HISTORY + "inf,inf,0.1\n",
            "quote": HISTORY + '3,6,"' + "x" * 200_000,
            "rows": HISTORY + "3,6,1\n" * 2_000_000,
            "columns": f"epoch,step,{','.join(f'm{n}' for n in range(9000))}\n1{',1' * 9000}\n",
        }.items()
    ),
    ("code.zip", "damage", zip_of_damage),
    ("code.zip", "repetitive", repetitive),
    ("code.zip", "names", many_names),
    *(
        ("code.zip", f"record {told}", lambda path, told=told: zip_of(
            path, **{snapshot.RECORD: told, "src/models.py": "x = 1"}))
        for told in ('{"left_out": 5}', '{"left_out": [5]}', '{"left_out": [{"path": 5}]}', "[1]")
    ),
    *(
        ("meta.json", f"{key} {value!r}", lambda path, told={key: value}: path.write_text(
            json.dumps(META | told)))
        for key in ("attempts", "command", "flags", "git", "packages", "environment", "parent")
        for value in (5, "x", [5], {"script": 5, "a": 5, "path": 5})
    ),
    ("code.zip", "bomb", bomb),
    ("code.zip", "out", lambda path: zip_of(path, **{"../../out.py": "x"})),
    ("code.zip", "root", lambda path: zip_of(path, **{"/out.py": "x"})),
    ("eval", "link", lambda path: path.symlink_to(path.parents[1] / "elsewhere")),
    ("notes.json", "page", lambda path: path.write_text('{"note": "<script>alert(1)</script>"}')),
    ("eval/examples.png", "link", lambda path: path.symlink_to(path.parents[2] / "secret")),
    ("eval/predictions.csv", "link", lambda path: path.symlink_to(path.parents[2] / "secret")),
    ("eval/predictions.csv", "fifo", os.mkfifo),
    ("run.lock", "link", lambda path: path.symlink_to(path.parents[1] / "secret")),
    ("run.lock", "fifo", os.mkfifo),
    ("meta.json", "code", lambda path: path.write_text(json.dumps(
        META | {"attempts": [{"start": "2026-01-01", "code": {"file": "../secret"}}]}))),
    ("meta.json", "escapes", lambda path: path.write_text(json.dumps(
        META | {"command": {"line": "\x1b]0;x\x07<script>alert(1)</script>=1+1"}}))),
]  # fmt: skip


def plant(folder: Path, name: str, how: Plant) -> None:
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    if path.is_file():
        path.unlink()
    how(path)


def look(folder: Path, other: Path) -> str:
    """Do what the commands do that look at runs; return all that is shown."""
    records = results.read_runs([str(folder), str(other)])
    assert records[1].state == "finished", "one bad folder spoils no listing"
    shown = comparison.as_text(comparison.listing(records))
    shown += comparison.difference(*records)
    for table in (comparison.comparison(records, []), comparison.grouped(records, [])):
        shown += comparison.as_text(table, 80)
    write_report(records, folder.parent / "report.html")
    for function in (read_run, results.load_history, snapshot.code_of):
        try:
            shown += repr(function(folder))
        except (UsageError, OSError, ValueError) as error:
            shown += str(error)
    refused: Callable[[], Any]
    for refused in (
        lambda: reproduction.Original(folder, 0),
        lambda: snapshot.load(folder / "code.zip"),
        lambda: sweep.read(folder),
        lambda: RunFolder(str(folder), {}, ()).check(),
    ):
        try:
            refused()
        except UsageError as error:
            shown += str(error)
        except Exception as error:
            # A run that is done is news, not an error.
            assert type(error).__name__ == "AlreadyFinished", error
    page = (folder.parent / "report.html").read_text()
    assert "<script>alert" not in page
    return shown + page


@pytest.mark.parametrize(("name", "how", "what"), HOSTILE, ids=[f"{n}-{h}" for n, h, _ in HOSTILE])
def test_a_hostile_file_does_no_harm(
    name: str, how: str, what: Plant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret").write_text(f'{{"{SECRET}": "{SECRET}"}}')
    (tmp_path / "elsewhere").mkdir()
    for file in ("test.json", "predictions.csv", "examples.png"):
        (tmp_path / "elsewhere" / file).write_text(f'{{"{SECRET}": 1.5}}')
    folder, other = sound(tmp_path / "stranger"), sound(tmp_path / "mine")
    plant(folder, name, what)
    names = {path for path in tmp_path.rglob("*") if "report" not in path.name}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.monotonic()
    shown = look(folder, other)
    assert time.monotonic() - start < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # kB
    assert SECRET not in shown
    assert "\x1b" not in shown
    assert {path for path in tmp_path.rglob("*") if "report" not in path.name} == names
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", ["stdout.txt", "history.csv", "eval", "tb", "model.h5"])
def test_nothing_is_written_through_a_link(tmp_path: Path, name: str) -> None:
    folder = sound(tmp_path / "stranger")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(tmp_path / "outside")
    with pytest.raises(UsageError, match=f"{name} is a link that leads out of the folder"):
        RunFolder(str(folder), {}, ()).check()
    assert not (tmp_path / "outside").exists()


@pytest.mark.parametrize("name", ["tb/train", "checkpoints/model-4.h5", "eval/deep/er/labels"])
def test_nothing_is_written_through_a_link_further_down(tmp_path: Path, name: str) -> None:
    folder = sound(tmp_path / "stranger")
    (folder / name).parent.mkdir(parents=True)
    (folder / name).symlink_to(tmp_path / "outside")
    with pytest.raises(UsageError, match=f"{name} is a link that leads out of the folder"):
        RunFolder(str(folder), {}, ()).check()
    refuse_links(tmp_path, "a folder of runs")  # who writes into the run looks there
    (tmp_path / "outside").write_text("a tracker's log")
    refuse_links(folder, folder)


def test_what_a_kill_left_half_written_is_removed(tmp_path: Path) -> None:
    for name in ("", "checkpoints", "eval"):
        (tmp_path / "run" / name).mkdir(exist_ok=True)
        (tmp_path / "run" / name / f".model.h5.{5:016x}.partial").write_text("half")
    (tmp_path / "run" / "run.lock").touch()
    folder = RunFolder(str(tmp_path / "run"), {}, ())
    folder.open()
    folder.close()
    left = list((tmp_path / "run").rglob("*.partial"))
    assert [path.parent.name for path in left] == ["eval"]  # an evaluation may be writing there


HOLDER = """
import json, os, sys, time
sys.path.insert(0, sys.argv[1])
from vegab.run_folder import take_lock
lock = take_lock(sys.argv[2], "sweep.lock", "sweep")
if sys.argv[3] != "own":
    os.ftruncate(lock, 0)
    os.pwrite(lock, sys.argv[3].encode(), 0)
print("held", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("start", ["own", None, "12345"])
def test_a_signal_goes_only_to_the_process_that_the_lock_proves(
    start: str | None, tmp_path: Path
) -> None:
    spec = importlib.util.spec_from_file_location("sweep_program", ROOT / "bin" / "sweep.py")
    assert spec and spec.loader
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    with subprocess.Popen(["sleep", "60"]) as bystander:
        said = {"host": socket.gethostname(), "pid": bystander.pid, "start": start}
        words = [str(ROOT), str(tmp_path), start if start == "own" else json.dumps(said)]
        command = [sys.executable, "-c", HOLDER, *words]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
            assert holder.stdout and holder.stdout.readline() == "held\n"
            if start == "own":
                program.end_all([tmp_path], "sweep.lock")
                assert holder.wait() == -signal.SIGTERM
            else:
                with pytest.raises(UsageError, match=r"does not prove"):
                    program.end_all([tmp_path], "sweep.lock")
            holder.kill()
        assert bystander.poll() is None
        bystander.kill()


def test_a_planted_link_is_not_written_through(tmp_path: Path) -> None:
    outside, run = tmp_path / "outside", tmp_path / "run"
    run.mkdir()
    outside.write_text("mine")
    (run / ".meta.json.partial").symlink_to(outside)
    (run / "meta.json").symlink_to(outside)
    write_json(run / "meta.json", {"status": "running"})
    assert outside.read_text() == "mine"
    assert read_json(run / "meta.json") == {"status": "running"}
    assert not (run / "meta.json").is_symlink()


def test_a_lock_that_leads_elsewhere_is_neither_followed_nor_waited_for(tmp_path: Path) -> None:
    outside, run = tmp_path / "outside", tmp_path / "run"
    run.mkdir()
    outside.write_text("mine")
    (run / "run.lock").symlink_to(outside)
    with pytest.raises(UsageError, match="choose another SAVE_PATH"):
        take_lock(run, "run.lock", run)
    assert outside.read_text() == "mine"
    (run / "run.lock").unlink()
    os.mkfifo(run / "run.lock")
    assert living_owner(run) is None


ALIASES = "a0: &a0 [1, 1]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)
)


@pytest.mark.parametrize("text", [ALIASES, "a: &a [*a]\n", "[" * 100_000, "{a: " * 50_000])
def test_a_config_without_end_is_refused(text: str) -> None:
    start = time.monotonic()
    with pytest.raises(UsageError, match=r"^stranger\.yaml"):
        read_yaml(text, "stranger.yaml")
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    "name", ["a$^$b", r"$\frac$", "50$ and 60$", "[1]", "a'b\"c", "ünï ✓", "\udcff", "a\x1bb"]
)
def test_a_name_is_taken_literally(tmp_path: Path, name: str) -> None:
    run = sound(tmp_path / "results" / name)
    draw_learning_curve(run, [{"epoch": 0, "loss": 1.0}, {"epoch": 1, "loss": 0.5}], 1)
    assert (run / "learning_curve.png").stat().st_size > 0
    assert results.find_runs([str(run)])[0] == [str(run)]
    shown = comparison.as_text(comparison.listing(results.read_runs([str(run)])))
    assert printable(name) in shown


def test_a_picture_whose_title_would_move_the_cursor_is_still_one(tmp_path: Path) -> None:
    run = sound(tmp_path / "run")
    (run / "history.csv").write_text("epoch,step,a\x1b]0;x\x07\n1,2,0.5\n")
    records = results.read_runs([str(run)])
    drawn, _ = curves.curves_of(records, ["a\x1b]0;x\x07"])
    told: dict[str, Any] = {"project_commit": None, "runs": []}
    picture = curves.content_of(curves.draw(drawn, records), ".svg", "".join(drawn), told)
    assert b"\x1b" not in picture and ElementTree.fromstring(picture) is not None


@pytest.mark.parametrize("start", ["=1+1", "+1", "-1", "@x"])
def test_a_cell_of_a_table_is_no_formula(tmp_path: Path, start: str) -> None:
    run = sound(tmp_path / "run")
    (run / "config.json").write_text(json.dumps({"kind": start}))
    other = sound(tmp_path / "other")
    records = results.read_runs([str(run), str(other)])
    table = comparison.as_csv(comparison.comparison(records, []))
    assert f"'{start}" in table and f",{start}" not in table


OUTPUTS = (
    "{split: a, checkpoint: b, global_step: 1, num_examples: 1, config: {eval_callbacks: {}}, "
)


@pytest.mark.parametrize("text", [
    "[1]", "split: 5", ALIASES, "[" * 100_000, "a: &a [*a]", "!!python/object/apply:os.getpid []",
    OUTPUTS + "labels: [], outputs: {../../secret: text}}", OUTPUTS + "labels: [5], outputs: {}}",
    OUTPUTS + "labels: [/secret], outputs: {}}",
])  # fmt: skip
def test_outputs_of_another_form_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "meta.yaml").write_text(OUTPUTS + "labels: [a], outputs: {b/c: text}}")
    assert len(StoredOutputs(tmp_path)) == 1
    (tmp_path / "meta.yaml").write_text(text)
    with pytest.raises(UsageError, match=r"meta\.yaml"):
        StoredOutputs(tmp_path)


def test_groups_of_a_checkpoint_in_a_circle_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.h5"
    with h5py.File(path, "w", userblock_size=512) as file:
        file.create_group("a")["a"] = file["/"]
    content = path.read_bytes()
    digest = hashlib.sha256(content[512:]).hexdigest().encode()
    path.write_bytes((checkpoints.file.SIGNATURE + digest).ljust(512, b"\0") + content[512:])
    for read in (checkpoints.verify, checkpoints.read_state):
        with pytest.raises(checkpoints.DamagedCheckpointError, match="twice"):
            read(path)


@pytest.mark.parametrize("changes", [
    {"epoch": "x"}, {"global_step": 0.5}, {"fingerprint": [1]}, {"fingerprint": {"settings": 5}},
])  # fmt: skip
def test_a_checkpoint_of_another_form_is_none_of_ours(tmp_path: Path, changes: Any) -> None:
    state = {"epoch": 1, "global_step": 1, "num_rows": 0, "columns": {}} | changes
    with h5py.File(tmp_path / "model.h5", "w", userblock_size=512) as file:
        file["training_state/state"] = json.dumps(state)
        file["training_state/history"] = [[0.0]]
    with pytest.raises(checkpoints.DamagedCheckpointError, match=f"its {next(iter(changes))}"):
        checkpoints.read_state(tmp_path / "model.h5")


def test_a_checkpoint_shows_nothing_of_another_file(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "secret.h5", "w") as file:
        file["training_state/state"] = json.dumps({"epoch": 1, "global_step": 1, "num_rows": 0})
    with h5py.File(tmp_path / "model.h5", "w", userblock_size=512) as file:
        file["training_state"] = h5py.ExternalLink("secret.h5", "training_state")
    for read in (
        lambda: checkpoints.read_state(tmp_path / "model.h5"),
        lambda: checkpoints.commit_difference(tmp_path / "model.h5", tmp_path / "secret.h5"),
    ):
        with pytest.raises(checkpoints.DamagedCheckpointError, match="is a link"):
            read()


def test_runs_below_a_linked_folder_are_found_and_circles_end(tmp_path: Path) -> None:
    sound(tmp_path / "scratch" / "a")
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "project").symlink_to(tmp_path / "scratch")
    (tmp_path / "scratch" / "back").symlink_to(tmp_path / "results")
    found, _ = results.find_runs([str(tmp_path / "results")])
    assert found == [str(tmp_path / "results" / "project" / "a")]


def test_links_without_a_circle_and_folders_of_great_depth_are_gone_through(
    tmp_path: Path,
) -> None:
    sound(tmp_path / "run")
    for n in range(25):  # 2 ** 25 ways lead to the last one
        (tmp_path / "bomb" / str(n)).mkdir(parents=True)
        for name in "ab" if n else "":
            (tmp_path / "bomb" / str(n - 1) / name).symlink_to(tmp_path / "bomb" / str(n))
    place = os.open(tmp_path, os.O_RDONLY)
    for _ in range(1200):
        os.mkdir("d", dir_fd=place)
        below = os.open("d", os.O_RDONLY, dir_fd=place)
        os.close(place)
        place = below
    os.close(place)
    start = time.monotonic()
    try:
        assert results.find_runs([str(tmp_path)])[0] == [str(tmp_path / "run")]
        assert time.monotonic() - start < 5
    finally:  # Python's own would recur too deeply
        subprocess.run(["rm", "-rf", tmp_path / "d"], check=True)


@pytest.mark.parametrize("entry", [
    5, [], {}, ["x", 5], ["stamp", [1]], ["stamp", {"x": 1}], ["stamp", {"state": 5}],
    ["stamp", {"start": "x"}], ["stamp", {"metrics": {"loss": [1]}}],
])  # fmt: skip
def test_an_index_that_somebody_planted_is_not_believed(tmp_path: Path, entry: Any) -> None:
    runs = [str(sound(tmp_path / str(n))) for n in range(results.FEWEST)]
    told = [results._stamp(runs[0]) if part == "stamp" else part for part in entry] if (
        isinstance(entry, list)) else entry  # fmt: skip
    (tmp_path / results.INDEX).write_text(json.dumps({"0": told}))
    records = results.read_runs(runs)
    assert {record.state for record in records} == {"finished"}
    assert comparison.as_text(comparison.listing(records))


SWEEP = {
    "definition": {"config_name": "root", "config": {}, "words": [], "grid": {}, "range": {},
                   "random": 0, "seeds": 0},
    "suggested": [],
    "trials": [{"name": "a", "settings": {}}],
}  # fmt: skip


@pytest.mark.parametrize("changes", [
    {"trials": [{"name": "../mine", "settings": {}}]}, {"trials": [{"name": "/", "settings": {}}]},
    {"trials": [{"name": 5, "settings": {}}]}, {"trials": 5}, {"suggested": 5}, {"definition": []},
    {"definition": SWEEP["definition"] | {"grid": {"n": 5}}},  # type: ignore[operator]
])  # fmt: skip
def test_a_sweep_of_trials_elsewhere_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    (tmp_path / "sweep.json").write_text(json.dumps(SWEEP))
    assert len(sweep.read(tmp_path)[1]) == 1
    (tmp_path / "sweep.json").write_text(json.dumps(SWEEP | changes))
    with pytest.raises(UsageError, match=r"is not one of this project's"):
        sweep.read(tmp_path)


def test_nobody_s_run_is_stopped_through_a_link(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("sweep_program", ROOT / "bin" / "sweep.py")
    assert spec and spec.loader
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "sweep.json").write_text(json.dumps(SWEEP))
    (tmp_path / "sweep" / "a").symlink_to(sound(tmp_path / "mine"))
    with pytest.raises(UsageError, match="a is a link that leads out"):
        program.stop(str(tmp_path / "sweep"))


def test_a_module_in_a_run_folder_is_not_imported(tmp_path: Path) -> None:
    folder = sound(tmp_path / "stranger")
    (folder / "json.py").write_text("open('executed', 'w')")
    (folder / "keras.py").write_text("open('executed', 'w')")
    look(folder, sound(tmp_path / "mine"))
    assert not Path("executed").exists() and str(folder) not in sys.path


SMALL = ("--n_filters=2", "--n_layers=1")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    words = ["bin/train.py", "digits", str(folder), "--num_epochs=1", *SMALL]
    assert forked.run(words, ROOT, os.environ).returncode == 0
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("how", ["fifo", "deep", "link", "bytes"])
@pytest.mark.parametrize("name", ["config.json", "model_best.h5", "timing.csv"])
def test_the_commands_say_what_is_wrong_with_a_hostile_file(
    name: str, how: str, quick_command: Command, tmp_path: Path, trained: Path
) -> None:
    (tmp_path / "secret").write_text(f'{{"{SECRET}": "{SECRET}"}}')
    folder = Path(shutil.copytree(trained, tmp_path / "stranger"))
    plant(folder, name, WAYS[how])
    for command in (
        ("bin/evaluate.py", folder),
        ("bin/export.py", folder, tmp_path / "exported"),
        ("bin/plot.py", folder, "-o", tmp_path / "curve.png"),
        ("bin/reproduce.py", folder),
        ("bin/train.py", "digits", folder, "--num_epochs=2", *SMALL),
    ):
        start = time.monotonic()
        done = quick_command(*command)
        said = done.stdout + done.stderr
        assert done.returncode in (0, 1, 2) and "Traceback" not in said, said
        assert SECRET not in said and time.monotonic() - start < 60  # nothing is waited for
