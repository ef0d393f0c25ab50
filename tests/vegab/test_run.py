"""vegab as a program: a plain function in real processes that are killed, refused, resumed."""

import argparse
import contextlib
import functools
import hashlib
import json
import os
import pty
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from machinery import ROOT

from vegab import (
    AutomaticNamer,
    ConfigRegistry,
    UsageError,
    read_run,
    snapshot,
    timestamp_namer,
    wrap,
    wrap_no_config_registry,
)
from vegab.run_folder import RunFolder

SCRIPT = '''
"""A script with no deep learning in sight."""
import atexit, os, signal, subprocess, sys, time
sys.path.insert(0, {root!r})
import vegab
from vegab import Key

registry = vegab.ConfigRegistry()
registry.set_root_config({{
    "mode": Key("print", "what to do"),
    "num_epochs": Key(3, "epochs in all"),
    "rate": 0.1,
    "fast": False,
    "seed": 7,
    "data": {{"seed": 8, "size": Key([8, 8], "height and width")}},
}})
registry.register("slow", {{"rate": 0.01}}, "slow but sure")

def position(save_path):
    with open(os.path.join(save_path, "epoch")) as file:
        return {{"epoch": int(file.read())}}

def prepare(config):
    print("preparing")
    if config["mode"] == "refuse":
        raise vegab.UsageError("mode: nothing is called refuse")
    if config["mode"] == "cannot prepare":
        raise RuntimeError("no such data")
    if config["mode"] == "prepare slowly":
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(600)
    return "prepared"

class Held:
    def __del__(self):
        os.write(1, b"tidied up\\n")

def work(config, save_path, prepared, *, note="none", twice=False):
    """Does what mode says.

    And some more.
    """
    mode = config["mode"]
    print("working", prepared, note, twice)
    with open(os.path.join(save_path, "epoch"), "w") as file:
        file.write(str(config["num_epochs"]))
    if mode == "descriptors":
        os.write(1, b"as C++ writes\\n")
        os.write(2, b"as C++ complains\\n")
        subprocess.run([sys.executable, "-c", "print('from a child')"])
    elif mode == "fail":
        raise ValueError("it broke\\nhere")
    elif mode in ("exit", "finish"):
        global held
        held = Held()
        atexit.register(os.write, 1, b"registered for the end\\n")
        if mode == "exit":
            raise SystemExit(75)
    elif mode == "full disk":
        raise OSError(28, "No space left on device")
    elif mode == "bars":
        from tqdm import tqdm
        for outer in tqdm(range(3), desc="outer"):
            for inner in tqdm(range(50), desc="inner", leave=False, mininterval=0):
                pass
        print("12345\\b\\b\\b\\b\\bfinal")
    elif mode == "terminal bar":
        from tqdm import tqdm
        stream = vegab.terminal()
        for i in tqdm(range(20), file=stream, disable=stream is None, mininterval=0):
            time.sleep(0.02)
            if i % 5 == 4:
                print("line", i)
        print("stream", stream is not None)
    elif mode == "child lives":
        child = subprocess.Popen(["sleep", "600"])
        if os.fork() == 0:
            time.sleep(600)
        print("child", child.pid)
    if mode in ("wait", "child lives"):
        print("ready")
        os.write(1, b"half a line")
        time.sleep(600)

if __name__ == "__main__":
    vegab.wrap(registry, work, plugins=[vegab.MetaSaver(position=position)], prepare=prepare)
'''

Done = subprocess.CompletedProcess[str]
Run = Callable[..., Done]


def run_script(path: Path, *arguments: str, **options: Any) -> Done:
    """Runs a script to its end, in its folder if not told otherwise."""
    settings: dict[str, Any] = {"capture_output": True, "text": True, "timeout": 300}
    words = [sys.executable, str(path), *arguments]
    return subprocess.run(words, **(settings | {"cwd": path.parent} | options))


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "work.py"
    path.write_text(SCRIPT.format(root=str(ROOT)))
    return path


@pytest.fixture
def run(script: Path) -> Run:
    return functools.partial(run_script, script)


@contextlib.contextmanager
def started(script: Path, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """The script in a process group of its own, once it only waits; all dies at the end."""
    output = script.parent / arguments[1] / "stdout.txt"
    said_before = read(output).count("half a line")  # the last that it writes
    process = subprocess.Popen(
        [sys.executable, str(script), *arguments],
        cwd=script.parent,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        wait_for(lambda: read(output).count("half a line") > said_before)
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def wait_for(condition: Callable[[], bool]) -> None:
    for _ in range(6000):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("waited 300 s in vain")


def read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def meta_of(folder: Path) -> dict[str, Any]:
    meta: dict[str, Any] = json.loads((folder / "meta.json").read_text())
    return meta


def tree(folder: Path) -> dict[str, str]:
    """Every path under a folder with a hash of its content and its time of change."""
    return {
        str(path.relative_to(folder)): f"{path.stat().st_mtime_ns} "
        + (hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder")
        for path in sorted(folder.rglob("*"))
    }


# ----------------------------------------------------------------------------- the ordinary course


def test_a_run_and_its_folder(run: Run, tmp_path: Path) -> None:
    done = run("slow", "results/run", "--num_epochs=2", "-p", "rate", "-1e-4", "--fast", "--note=x")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "preparing\nworking prepared x False\n"
    folder = tmp_path / "results" / "run"
    config = json.loads((folder / "config.json").read_text())
    assert config == {
        "mode": "print", "num_epochs": 2, "rate": -1e-4, "fast": True, "seed": 7,
        "data": {"seed": 8, "size": [8, 8]},
    }  # fmt: skip
    assert (folder / "work.py").read_text() == (tmp_path / "work.py").read_text()
    head, *rest = (folder / "stdout.txt").read_text().splitlines()
    assert re.fullmatch(r"--- attempt 1, \d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00 ---", head)
    assert rest == ["preparing", "working prepared x False"]
    assert len((folder / "stderr.txt").read_text().splitlines()) == 1
    assert "vegab/capture.py" in snapshot.read(folder / "code.zip")


def test_the_same_command_again_says_that_it_is_finished(run: Run, tmp_path: Path) -> None:
    run("root", "run")
    before = tree(tmp_path / "run")
    again = run("root", "run/")
    assert (again.returncode, again.stderr) == (0, "")
    assert again.stdout.startswith("run is already finished (epoch 3). A larger --num_epochs")
    assert tree(tmp_path / "run") == before


def test_what_may_grow_is_a_key_at_its_place(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"num_epochs": 1, "model": {"num_epochs": 1}}')
    (tmp_path / "meta.json").write_text('{"attempts": [], "status": "finished"}')
    grown = {"num_epochs": 2, "model": {"num_epochs": 1}}
    RunFolder(str(tmp_path), grown, ["num_epochs"]).check()
    with pytest.raises(UsageError, match=r"another config \(model\.num_epochs: 1 -> 2\)"):
        RunFolder(str(tmp_path), grown | {"model": {"num_epochs": 2}}, ["num_epochs"]).check()


def test_a_key_that_is_younger_than_a_run_had_its_default_there(tmp_path: Path) -> None:
    registry = ConfigRegistry()
    registry.set_root_config({"rate": 0.1, "young": 2, "data": {"seed": 8, "fold": 0}})
    (tmp_path / "config.json").write_text('{"rate": 0.5, "data": {"seed": 9}}')
    (tmp_path / "meta.json").write_text('{"attempts": []}')

    def check(**changes: Any) -> None:
        config = {"rate": 0.5, "young": 2, "data": {"seed": 9, "fold": 0}} | changes
        RunFolder(str(tmp_path), config, [], registry.completed).check()

    check()
    with pytest.raises(UsageError, match=r"another config \(young: 2 -> 3\)"):
        check(young=3)
    with pytest.raises(UsageError, match=r"another config \(data.fold: 0 -> 1\)"):
        check(data={"seed": 9, "fold": 1})


def test_files_of_a_newer_format_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"format": 2}')  # a key of the owner's
    (tmp_path / "meta.json").write_text('{"attempts": [], "format": 2}')
    with pytest.raises(UsageError, match=r"meta.json: its format is 2, .* knows 1; use the newer"):
        RunFolder(str(tmp_path), {"format": 2}, []).check()
    (tmp_path / "meta.json").write_text('{"attempts": [], "format": 1}')
    RunFolder(str(tmp_path), {"format": 2}, []).check()


def test_more_epochs_continue_a_finished_run(run: Run, tmp_path: Path) -> None:
    run("root", "run")
    assert run("root", "run", "--num_epochs=5").returncode == 0
    meta = meta_of(tmp_path / "run")
    assert [(a["from"], a["to"]) for a in meta["attempts"]] == [
        (None, {"epoch": 3}),
        ({"epoch": 3}, {"epoch": 5}),
    ]
    assert json.loads((tmp_path / "run" / "config.json").read_text())["num_epochs"] == 5
    text = (tmp_path / "run" / "stdout.txt").read_text()
    assert re.findall(r"^--- attempt (\d), ", text, re.MULTILINE) == ["1", "2"]
    assert run("root", "run", "--num_epochs=4").returncode == 2


def test_dry_run_prints_the_config_and_touches_nothing(run: Run, tmp_path: Path) -> None:
    done = run("slow", "run", "--size=[4, 4]", "--dry_run")
    assert done.returncode == 0
    assert "rate: 0.01\n" in done.stdout and "  size: [4, 4]\n" in done.stdout
    assert "#   data.size: [8, 8] -> [4, 4]\n" in done.stdout
    assert "#   rate" not in done.stdout
    assert not (tmp_path / "run").exists()
    (tmp_path / "printed.yaml").write_text(done.stdout)
    assert run("printed.yaml", "run", "--dry_run").stdout.startswith(done.stdout.split("#")[0])


def test_help_lists_keys_defaults_reasons_and_configs(run: Run) -> None:
    done = run("--help", env={**os.environ, "COLUMNS": "80"})
    assert done.returncode == 0
    text = re.sub(r" +", " ", done.stdout)
    assert "usage: work.py CONFIG SAVE_PATH" in text and "Does what mode says." in text
    assert " --num_epochs=3 epochs in all\n" in text
    assert " --data.size=[8, 8] height and width\n" in text
    assert " slow slow but sure\n" in text
    assert " --note TEXT (none)\n" in text
    assert max(map(len, done.stdout.splitlines())) <= 100


def test_nothing_heavy_is_imported(tmp_path: Path) -> None:
    (tmp_path / "show.py").write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import vegab\n"
        "heavy = {'tensorflow', 'keras', 'numpy', 'src', 'ruamel.yaml'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)\n"
    )
    run_script(tmp_path / "show.py", check=True)


def test_the_commands_of_the_readme(tmp_path: Path) -> None:
    text = (ROOT / "vegab" / "README.md").read_text()
    program, commands = re.findall(r"```(?:python)?\n(.*?)```", text, re.DOTALL)[:2]
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "work.py").write_text(program)
    (tmp_path / "vegab").symlink_to(ROOT / "vegab")
    said = ""
    for line in commands.splitlines():
        _, script, *words = line.partition(" # ")[0].split()
        done = run_script(Path(script), *words, cwd=tmp_path, check=True)
        said += done.stdout if "--help" not in words else ""
    assert said == (
        "64 filters, into results/run\n"
        "results/run is already finished. A larger --num_epochs continues it.\n"
        "64 filters, into results/run\n"
        "64 filters, into results/again\n"
    )


def test_the_level_of_logging(script: Path, run: Run, tmp_path: Path) -> None:
    script.write_text(
        script.read_text().replace(
            'print("working"', 'import logging; logging.info("told"); logging.warning("careful")\n'
            '    print("working"'
        )
    )  # fmt: skip
    usual = run("root", "usual")
    assert "told\n" in usual.stdout and usual.stderr == "WARNING: careful\n"
    quiet = run("root", "quiet", "-l", "WARNING")
    assert "told\n" not in quiet.stdout and quiet.stderr == "WARNING: careful\n"


# ---------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["rooot", "run"], "unknown config 'rooot'; did you mean 'root'?"),
        (["root"], "the following arguments are required: SAVE_PATH"),
        (["root", "run", "--moed=x"], "unknown key 'moed'; did you mean 'mode'?"),
        (["root", "run", "--num_epochs=[1]"], "num_epochs: [1] was given, an integer is expected"),
        (["root", "run", "--num_epochs"], "--num_epochs needs a value"),
        (["root", "run", "-p", "rate"], "-p rate needs a value"),
        (["root", "run", "--fast=3"], "fast: 3 was given, true or false is expected"),
        (["root", "run", "--twice=3"], "--twice takes no value; 3 was given"),
        (["root", "run", "--no_rate"], "unknown key 'no_rate'"),
        (["root", "run", "--dryrun"], "unknown key 'dryrun'; did you mean 'dry_run'?"),
        (["root", "run", "-x"], "unrecognized arguments: -x (see"),
        (["root", "run", "rate=1"], "rate=1; each setting, and each value of a repeated flag, n"),
        (["root", "run", "-l", "LOUD"], "invalid choice: 'LOUD' (choose from "),
        (["root", "run", "--mode=refuse"], "mode: nothing is called refuse"),
        (["root", ""], "SAVE_PATH is empty"),
        (["root", "work.py"], "work.py is not a folder"),
        (["root", "work.py/run"], "work.py is not a folder"),
        (["root", "other"], "other holds files but no run"),
        (["root", "x" * 300], "File name too long"),
        (["list.yaml", "run"], "list.yaml holds a list"),
    ],
)
def test_a_wrong_command_is_one_sentence_and_touches_nothing(
    run: Run, tmp_path: Path, arguments: list[str], sentence: str
) -> None:
    (tmp_path / "list.yaml").write_text("[1]")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").write_text("not a run")
    before = tree(tmp_path)
    refused = run(*arguments)
    assert refused.returncode == 2
    assert refused.stderr.startswith("work.py: error: ") and sentence in refused.stderr
    assert refused.stderr.count("\n") == 1
    assert tree(tmp_path) == before


def test_a_folder_that_is_not_writable_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    if os.geteuid() == 0:  # who may write everywhere
        monkeypatch.setattr(os, "access", lambda path, mode: "closed" not in str(path))
    with pytest.raises(UsageError, match="closed is not writable; choose another SAVE_PATH"):
        RunFolder(str(tmp_path / "closed" / "run"), {}, ()).check()


def test_another_config_is_refused_key_by_key(run: Run, tmp_path: Path) -> None:
    run("root", "run")
    before = tree(tmp_path / "run")
    refused = run("root", "run", "--rate=0.5", "--data.seed=9", "--num_epochs=4")
    assert refused.returncode == 2
    assert "another config (rate: 0.1 -> 0.5, data.seed: 8 -> 9)" in refused.stderr
    refused = run("root", "run", "--mode=refuse", "--num_epochs=4")
    assert refused.returncode == 2
    assert tree(tmp_path / "run") == before


def test_a_second_process_is_refused_while_the_first_lives(
    script: Path, run: Run, tmp_path: Path
) -> None:
    with started(script, "root", "run", "--mode=wait") as first:
        before = tree(tmp_path / "run")
        for arguments in (["--mode=wait"], ["--mode=print"]):
            refused = run("root", "run", *arguments)
            assert refused.returncode == 2
            assert f"run is in use by process {first.pid} on " in refused.stderr
        assert tree(tmp_path / "run") == before


def test_the_lock_dies_with_its_process_though_children_live(
    script: Path, run: Run, tmp_path: Path
) -> None:
    with started(script, "root", "run", "--mode=child lives") as first:
        child = int(re.findall(r"child (\d+)", read(tmp_path / "run" / "stdout.txt"))[0])
        first.kill()
        first.wait()
        os.kill(child, 0)  # still there
        assert "another config" in run("root", "run").stderr  # and not "in use"


def test_of_several_that_start_at_once_one_runs(script: Path, tmp_path: Path) -> None:
    commands = [
        subprocess.Popen(
            [sys.executable, str(script), "root", "run", "--mode=wait"],
            cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )
        for _ in range(4)
    ]  # fmt: skip
    wait_for(lambda: sum(process.poll() is None for process in commands) == 1)
    wait_for(lambda: "ready\n" in read(tmp_path / "run" / "stdout.txt"))
    for process in commands:
        process.terminate()
    said = [process.communicate()[1] for process in commands]
    assert sorted(process.returncode for process in commands) == [2, 2, 2, 75]
    assert sum("in use by" in text for text in said) == 3
    assert len(meta_of(tmp_path / "run")["attempts"]) == 1


# ------------------------------------------------------------------------ interruption and failure


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP"])
def test_a_signal_interrupts_and_the_same_command_continues(
    script: Path, run: Run, tmp_path: Path, name: str
) -> None:
    with started(script, "root", "run", "--mode=wait") as process:
        process.send_signal(getattr(signal, name))
        _, said = process.communicate(timeout=1800)
    assert process.returncode == 75
    assert said.decode() == (f"work.py: interrupted by {name}; the same command continues run\n")
    meta = meta_of(tmp_path / "run")
    assert meta["status"] == "interrupted"
    assert meta["attempts"][0]["exit_status"] == 75
    with started(script, "root", "run", "--mode=wait"):
        assert len(meta_of(tmp_path / "run")["attempts"]) == 2


def test_a_function_can_end_interrupted_itself_and_then_nothing_is_tidied_up(
    run: Run, tmp_path: Path
) -> None:
    """With TensorFlow it takes Python a second, for which nobody may wait."""
    exited, finished = (run("root", mode, f"--mode={mode}") for mode in ("exit", "finish"))
    assert (exited.returncode, meta_of(tmp_path / "exit")["status"]) == (75, "interrupted")
    assert all("registered for the end\n" in done.stdout for done in (exited, finished))
    assert "tidied up" in finished.stdout and "tidied up" not in exited.stdout


def test_a_signal_during_the_preparation_touches_nothing(run: Run, tmp_path: Path) -> None:
    before = tree(tmp_path)
    interrupted = run("root", "run", "--mode=prepare slowly")
    assert interrupted.returncode == 75
    assert interrupted.stdout == "preparing\n"
    assert interrupted.stderr == "work.py: interrupted before the run folder was opened\n"
    assert tree(tmp_path) == before


def test_what_was_written_before_a_kill_is_there(script: Path, run: Run, tmp_path: Path) -> None:
    with started(script, "root", "run", "--mode=wait") as process:
        process.kill()
        process.wait()
    folder = tmp_path / "run"
    assert read(folder / "stdout.txt").endswith("working prepared none False\nready\nhalf a line")
    assert meta_of(folder)["status"] == "running"
    assert read_run(folder)["state"] == "died"
    with started(script, "root", "run", "--mode=wait"):
        assert read_run(folder)["state"] == "running"
        first, second = meta_of(folder)["attempts"]
    assert first["exit_status"] == "killed" and first["to"] == {"epoch": 3}
    assert second["from"] == {"epoch": 3}
    assert "\nhalf a line\n--- attempt 2, " in read(folder / "stdout.txt")


def test_a_crash_leaves_its_traceback(run: Run, tmp_path: Path) -> None:
    failed = run("root", "run", "--mode=fail")
    assert failed.returncode == 1
    *_, before, last = failed.stderr.splitlines()
    assert last == "work.py: failed: ValueError: it broke here (traceback in run/stderr.txt)"
    assert before == "here" and 'raise ValueError("it broke' in failed.stderr
    assert "Traceback (most recent call last)" in read(tmp_path / "run" / "stderr.txt")
    meta = meta_of(tmp_path / "run")
    assert meta["status"] == "failed"
    assert meta["attempts"][0]["error"] == "ValueError: it broke\nhere"


def test_an_explained_failure_is_one_sentence_on_the_terminal(run: Run, tmp_path: Path) -> None:
    failed = run("root", "run", "--mode=full disk")
    sentence = "[Errno 28] No space left on device (traceback in run/stderr.txt)"
    assert (failed.returncode, failed.stderr) == (1, f"work.py: failed: {sentence}\n")
    assert "raise OSError(28" in read(tmp_path / "run" / "stderr.txt")


def test_a_failed_preparation_belongs_to_the_run(run: Run, tmp_path: Path) -> None:
    failed = run("root", "run", "--mode=cannot prepare")
    assert failed.returncode == 1
    assert failed.stderr.endswith("RuntimeError: no such data (traceback in run/stderr.txt)\n")
    assert "RuntimeError: no such data" in read(tmp_path / "run" / "stderr.txt")
    assert meta_of(tmp_path / "run")["status"] == "failed"


def test_a_limit_on_file_size_is_a_failure_that_can_be_resumed(run: Run, tmp_path: Path) -> None:
    limited = "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (20, 20));"
    limited += "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    (tmp_path / "limited.py").write_text(limited)
    failed = run_script(tmp_path / "limited.py", "work.py", "root", "run")
    assert failed.returncode == 1
    assert failed.stderr.splitlines()[-1].startswith("work.py: failed: [Errno 27] File too large")
    assert run("root", "run").returncode == 0


# ------------------------------------------------------------------------------------------ output


def test_output_of_descriptors_and_children_is_captured(run: Run, tmp_path: Path) -> None:
    done = run("root", "run", "--mode=descriptors")
    expected = "preparing\nworking prepared none False\nas C++ writes\nfrom a child\n"
    assert done.stdout == expected
    assert done.stderr == "as C++ complains\n"
    assert read(tmp_path / "run" / "stdout.txt").partition("---\n")[2] == expected
    assert read(tmp_path / "run" / "stderr.txt").endswith("---\nas C++ complains\n")


def test_a_progress_bar_leaves_its_last_state(run: Run, tmp_path: Path) -> None:
    assert "50 [00:00" in run("root", "run", "--mode=bars").stderr
    lines = read(tmp_path / "run" / "stderr.txt").splitlines()
    assert [line for line in lines[1:] if line] == [line for line in lines if "outer: 100%" in line]
    assert read(tmp_path / "run" / "stdout.txt").endswith("\nfinal\n")


def test_where_nobody_reads_along_no_more_is_said_than_has_to_be(
    script: Path, run: Run, tmp_path: Path
) -> None:
    quiet = "import vegab, vegab.capture\nvegab.capture.is_watched = False\n"
    script.write_text(script.read_text().replace("import vegab\n", quiet, 1))
    done = run("root", "run")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    said = (tmp_path / "run" / "stdout.txt").read_text().splitlines()
    assert said[1:] == ["preparing", "working prepared none False"]
    refused = run("root", "refused", "--mode=refuse")
    assert (refused.returncode, refused.stdout) == (2, "preparing\n")
    assert "nothing is called refuse" in refused.stderr
    failed = run("root", "failed", "--mode=fail")
    assert (failed.returncode, failed.stdout) == (1, "")
    assert failed.stderr.startswith("work.py: failed: ValueError: it broke")
    assert "Traceback" in (tmp_path / "failed" / "stderr.txt").read_text()


def test_a_closed_pipe_does_not_harm_the_run(script: Path, tmp_path: Path) -> None:
    command = f"{shlex.quote(sys.executable)} work.py root run --mode=descriptors | true"
    subprocess.run(["sh", "-c", command], cwd=tmp_path, check=True, timeout=1800)
    wait_for((tmp_path / "run" / "meta.json").exists)  # a shell may not wait for the first one
    wait_for(lambda: meta_of(tmp_path / "run")["status"] == "finished")
    assert "from a child\n" in read(tmp_path / "run" / "stdout.txt")


def test_closed_descriptors_do_not_harm_the_run(script: Path, tmp_path: Path) -> None:
    command = f"{shlex.quote(sys.executable)} work.py root run --mode=descriptors <&- >&- 2>&-"
    assert subprocess.run(["sh", "-c", command], cwd=tmp_path, timeout=1800).returncode == 0
    assert "from a child\n" in read(tmp_path / "run" / "stdout.txt")
    assert "as C++ complains\n" in read(tmp_path / "run" / "stderr.txt")


def on_a_terminal(
    script: Path, *arguments: str, after: str = "", keys: bytes = b""
) -> tuple[str, int]:
    """What a terminal gets, and the exit code; the keys are typed once `after` was seen."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(script.parent)
        os.environ["TERM"] = "xterm"
        os.execv(sys.executable, [sys.executable, str(script), *arguments])
    seen = b""
    while True:
        try:
            data = os.read(terminal, 65536)
        except OSError:
            data = b""
        if not data:
            break
        seen += data
        if keys and after.encode() in seen:
            os.write(terminal, keys)
            keys = b""
    os.close(terminal)
    return seen.decode(), os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_a_bar_on_the_terminal_stays_below_what_is_printed(script: Path, tmp_path: Path) -> None:
    seen, code = on_a_terminal(script, "root", "run", "--mode=terminal bar")
    assert code == 0 and "stream True" in seen
    assert seen.count("it/s]") > 5
    screen = [line.rpartition("\x1b[K")[2] for line in seen.split("\r\n")]
    lines = [line for line in screen if line.startswith("line")]
    assert lines == [f"line {i}" for i in (4, 9, 14, 19)]
    assert "100%" in screen[-3]  # the bar's last state stays, above the last line
    for name in ("stdout.txt", "stderr.txt"):
        assert "it/s]" not in read(tmp_path / "run" / name)


def test_there_is_no_bar_without_a_terminal(run: Run) -> None:
    done = run("root", "run", "--mode=terminal bar")
    assert "stream False" in done.stdout and done.stderr == ""


def test_ctrl_c_on_a_terminal(script: Path, tmp_path: Path) -> None:
    seen, code = on_a_terminal(script, "root", "run", "--mode=wait", after="ready", keys=b"\x03")
    assert code == 75
    assert seen.endswith("work.py: interrupted by SIGINT; the same command continues run\r\n")


# -------------------------------------------------------------------------------- what is recorded


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A small project of its own in git: vegab, the script, a committed and an ignored file."""
    project = tmp_path / "project with space"
    shutil.copytree(ROOT / "vegab", project / "vegab", ignore=shutil.ignore_patterns("__pycache__"))
    (project / "work.py").write_text(SCRIPT.format(root=str(project)))
    (project / "model.py").write_text("size = 1\n")
    (project / ".gitignore").write_text("__pycache__/\nsecret.env\n/results/\n")
    (project / "secret.env").write_text("TOKEN=1\n")
    return project


def git(project: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=N", "-c", "user.email=e@example.org"]
    command = ["git", *identity, *arguments]
    return subprocess.run(command, cwd=project, check=True, capture_output=True, text=True).stdout


def run_in(project: Path, *arguments: str) -> dict[str, Any]:
    tokens = {"MY_TOKEN": "TOKEN", "TF_TOKEN_example": "TOKEN", "TF_VAR_password": "TOKEN"}
    environment = {**os.environ, **tokens, "OMP_NUM_THREADS": "2", "TF_DETERMINISTIC_OPS": "1"}
    run_script(Path("work.py"), *arguments, cwd=project, env=environment, check=True)
    return meta_of(project / arguments[1])


needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="needs git")


@needs_git
def test_meta_tells_where_a_run_came_from(project: Path) -> None:
    git(project, "init", "-q", "-b", "trunk")
    git(project, "add", ".")
    git(project, "commit", "-q", "-m", "first")
    clean = run_in(project, "root", "results/clean")
    commit = git(project, "rev-parse", "HEAD").strip()
    assert clean["git"] == {"commit": commit, "branch": "trunk", "dirty": False, "diff": ""}
    assert snapshot.PATCH not in snapshot.read(project / "results" / "clean" / "code.zip")

    (project / "model.py").write_text("size = 2\n")
    (project / "new layer.py").write_text("depth = 3\nno_newline = 'é'")
    (project / "large.txt").write_text("#" * 1_100_000)
    status = git(project, "status", "--porcelain")
    meta = run_in(project, "slow", "results/dirty", "--note=a b")
    assert git(project, "status", "--porcelain") == status
    assert meta["status"] == "finished"
    assert meta["git"]["dirty"] and meta["git"]["commit"] == commit
    assert "-size = 1\n+size = 2\n" in meta["git"]["diff"]
    assert "+++ b/new layer.py" in meta["git"]["diff"] and "+depth = 3\n" in meta["git"]["diff"]
    assert "TOKEN" not in json.dumps(meta)
    left_out = {entry["path"]: entry["bytes"] for entry in meta["not_in_code"]}
    assert left_out == {"large.txt": 1_100_000, "secret.env": 8}
    assert meta["command"]["line"] == "python work.py slow results/dirty '--note=a b'"
    assert meta["command"]["folder"] == "."
    assert meta["seeds"] == {"seed": 7, "data.seed": 8}
    assert (
        meta["environment"].items() >= {"OMP_NUM_THREADS": "2", "TF_DETERMINISTIC_OPS": "1"}.items()
    )
    # Ray, which a test of this process may have imported, has packages of its own on the path.
    path = [entry for entry in sys.path if "thirdparty_files" not in entry]
    found = reversed([*metadata.distributions(path=path)])
    installed = {one.name: one.version for one in found}
    assert meta["packages"] == installed and installed["argh"]
    assert meta["python"] == ".".join(map(str, sys.version_info[:3]))
    assert meta["host"] and meta["platform"] and meta["cpu"]["model"] and meta["cpu"]["cores"] >= 1
    assert isinstance(meta["gpus"], list) and meta["memory_bytes"] > 1e8
    (attempt,) = meta["attempts"]
    assert attempt["start"] <= attempt["end"] and attempt["exit_status"] == 0
    assert attempt["git_commit"] == commit and attempt["pid"] > 0

    # The patch on top of the commit is the source as it ran, and so is code.zip.
    code = project.parent / "code"
    shutil.unpack_archive(project / "results" / "dirty" / "code.zip", code)
    other = project.parent / "other"
    git(project, "clone", "-q", str(project), str(other))
    git(other, "apply", str(code / "uncommitted.diff"))
    for name in ("model.py", "new layer.py", "vegab/config.py", "work.py", ".gitignore"):
        assert (code / name).read_bytes() == (project / name).read_bytes()
        assert (other / name).read_bytes() == (project / name).read_bytes()
    assert not (code / "secret.env").exists() and not (code / "results").exists()
    run_script(code / "work.py", "root", "run", check=True)


@needs_git
def test_other_source_in_a_later_attempt_is_kept_beside_the_first(project: Path) -> None:
    git(project, "init", "-q")
    run_in(project, "root", "runs/a")  # a run folder that git does not ignore is no source
    first = run_in(project, "root", "runs/a", "--num_epochs=4")
    assert [a["code"]["file"] for a in first["attempts"]] == ["code.zip", "code.zip"]
    (project / "model.py").write_text("size = 2\n")
    second = run_in(project, "root", "runs/a", "--num_epochs=5")
    assert second["attempts"][2]["code"]["file"] == "code_attempt_3.zip"
    one, other = (
        snapshot.read(project / "runs" / "a" / a["code"]["file"]) for a in second["attempts"][1:]
    )
    assert one["model.py"] == b"size = 1\n" and other["model.py"] == b"size = 2\n"
    assert second["git"]["commit"] is None
    assert not [name for name in other if name.startswith("runs/")]


def test_without_git_the_source_is_found_by_its_looks(project: Path) -> None:
    source = {"src/data/a.py", "src/results/b.py", "data/digits/x.npz"}
    for name in {".venv/a.py", "env/pyvenv.cfg", "env/b.py"} | source:
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_text("x")
    (project / "data" / "big.bin").write_bytes(bytes(1_100_000))
    meta = run_in(project, "root", "results/run")
    names = snapshot.read(project / "results" / "run" / "code.zip").keys()
    assert {"work.py", "model.py", "vegab/config.py"} | source <= names
    assert not names & {".venv/a.py", "env/b.py", "data/big.bin"}
    assert meta["git"] is None


# ----------------------------------------------------------------------------------------- parents

CHILD = """
import json, os, sys
sys.path.insert(0, {root!r})
import vegab

registry = vegab.ConfigRegistry()
registry.set_root_config({{"n_filters": 16, "num_epochs": 3}})

def work(config, save_path, *, origin="", note="x", repeat=1):
    if os.environ.get("KEEP"):
        with open(os.path.join(save_path, "state"), "w") as file:
            file.write(os.environ["KEEP"])
    sys.exit(int(os.environ.get("CODE", "0")))

def position(save_path):
    path = os.path.join(save_path, "state")
    return {{"epoch": open(path).read()}} if os.path.exists(path) else {{}}

def parent(args):
    return {{"path": args.flags["origin"], "from_epoch": 2}} if args.flags["origin"] else {{}}

if __name__ == "__main__":
    vegab.wrap(registry, work, plugins=[vegab.MetaSaver(position=position, parent=parent)])
"""


@pytest.fixture
def origin(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Runs a script; returns what meta.json says of the origin of `child`."""
    (tmp_path / "child.py").write_text(CHILD.format(root=str(ROOT)))

    def run(*arguments: str, keep: str = "", code: int = 0) -> dict[str, Any]:
        environment = os.environ | {"KEEP": keep, "CODE": str(code)}
        done = run_script(tmp_path / "child.py", *arguments, env=environment)
        assert done.returncode == code, done.stderr
        meta = meta_of(tmp_path / arguments[1])
        return {key: meta[key] for key in ("config", "flags", "parent")}

    return run


def test_a_run_knows_the_run_that_its_config_is_of(origin: Any, tmp_path: Path) -> None:
    old = origin("root", "old", "--n_filters=2", "--repeat=1")
    assert old == {"config": "root", "flags": {}, "parent": None}
    (attempt,) = meta_of(tmp_path / "old")["attempts"]
    parent = {"path": "old", "started": attempt["start"], "commit": attempt["git_commit"]}
    child = {"config": "old/config.json", "flags": {"note": "y"}, "parent": parent}
    words = ("child", "--n_filters=3")
    assert origin("old/config.json", *words, "--note=y", keep="1", code=75) == child
    # From here on there is something to go on from, whatever the command says.
    assert origin("child/config.json", "child", "--repeat=2", code=75) == child
    assert origin("root", *words) == child
    assert origin("root", *words, "--num_epochs=4", "--origin=old") == child
    (tmp_path / "lone").mkdir()
    shutil.copy(tmp_path / "old" / "config.json", tmp_path / "lone")
    assert origin("lone/config.json", "other")["parent"] is None, "lone is no run folder"


def test_a_run_that_has_kept_nothing_begins_anew(origin: Any, tmp_path: Path) -> None:
    origin("root", "old")
    forked = origin("root", "child", "--origin=old", code=75)
    assert forked["flags"] == {"origin": "old"}
    assert forked["parent"]["path"] == "old" and forked["parent"]["from_epoch"] == 2
    assert origin("child/config.json", "child", code=75) == forked
    assert origin("root", "child") == {"config": "root", "flags": {}, "parent": None}


# ----------------------------------------------------------------------------------------- plugins

SMALL = """
import os, sys
sys.path.insert(0, {root!r})
import vegab

registry = vegab.ConfigRegistry()
registry.set_root_config({{"n_filters": 16, "seed": 0}})

class Teller(vegab.VegabPlugin):
    def on_parsed_args(self, args):
        print("parsed", args.config, args.overrides, file=sys.stderr)
    def on_before_call(self, config, save_path):
        print("before", os.path.exists(save_path))
    def on_after_call(self, config, save_path):
        print("after")
    def on_failure(self, config, save_path, error):
        print("failure", type(error).__name__)

def work(config, save_path):
    print("saved in", save_path)
    if config["seed"] == 13:
        raise KeyError("thirteen")
    if config["seed"] == 14:
        raise KeyboardInterrupt

def ported(config, save_path, extra, name="", flag=False):
    print(*config.values(), extra, name, flag)

def resize(source, size: int, *, save_path="", smooth=True, scale=1.0, name="x"):
    '''Resizes a picture.

    Args:
        source: the picture, about 100% of the time.
        scale: by how much it is
            enlarged
    '''
    print("resizing", source, size + 1, smooth, scale, name)
    if source == "nothing":
        raise FileNotFoundError("there is no nothing")

if __name__ == "__main__":
    {call}
"""


def run_small(tmp_path: Path, call: str, *arguments: str) -> Done:
    (tmp_path / "small.py").write_text(SMALL.format(root=str(ROOT), call=call))
    return run_script(tmp_path / "small.py", *arguments)


def test_hidden_lines_stay_in_the_file_and_nothing_else_does(tmp_path: Path) -> None:
    lines = ["I0000 hidden", "I0000 of the user's", "x I0000 hidden", "last, without an end"]
    say = f"vegab.capture.hidden = re.compile(rb'^I0000 hidden\\n', re.MULTILINE); words = {lines}"
    work = f"import re; {say}; write = lambda: os.write(2, chr(10).join(words).encode())"
    done = run_small(
        tmp_path, f"{work}; vegab.wrap(registry, lambda config, path: write())", "root", "run"
    )
    assert done.stderr == "\n".join(lines[1:])
    assert "\n".join(lines) in (tmp_path / "run" / "stderr.txt").read_text()
    # A program without a run folder has nobody who keeps them.
    call = f"{work}; vegab.wrap(registry, vegab.filtered()(lambda config: write()))"
    done = run_small(tmp_path, call, "root")
    assert (done.stderr, done.returncode) == ("\n".join(lines[1:]), 0)


def test_plugins_are_told_of_everything(tmp_path: Path) -> None:
    call = "vegab.main(registry, work, plugins=[Teller(), Teller()])"
    done = run_small(tmp_path, call, "root", "run", "--seed=3")
    assert done.stderr == "parsed root {'seed': 3}\n" * 2
    assert done.stdout == "before True\n" * 2 + "saved in run\n" + "after\n" * 2
    failed = run_small(tmp_path, call, "root", "failing", "--seed=13")
    assert failed.returncode == 1
    assert failed.stdout == "before True\n" * 2 + "saved in failing\n" + "failure KeyError\n" * 2


def test_runs_are_named_automatically(tmp_path: Path) -> None:
    namer = "vegab.AutomaticNamer(namer='kwargs_namer', as_prefix=False)"
    call = f"vegab.wrap(registry, work, plugins=[{namer}, vegab.MetaSaver()])"
    flags = ("--seed=1", "--n_filters=10")
    done = run_small(tmp_path, call, "root", "results", *flags)
    assert done.stdout == "saved in results/n_filters=10_seed=1\n"
    again = run_small(tmp_path, call, "root", "results/n_filters=10_seed=1", *flags)
    assert again.stdout == "results/n_filters=10_seed=1 is already finished.\n"
    assert run_small(tmp_path, call, "root", "plain").stdout == "saved in plain/root\n"
    stopped = run_small(tmp_path, call, "root", "s", "--seed=14").stderr
    said = "the same command, with this path as SAVE_PATH, continues s/seed=14"
    assert stopped == f"small.py: interrupted; {said}\n"
    now = timestamp_namer(argparse.Namespace())
    assert re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d", now)


def test_a_folder_of_configs_and_fixed_arguments_as_the_vegab_of_old_took_them(
    tmp_path: Path,
) -> None:
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "root.json").write_text('{"ids": [1], "note": "", "seed": 1}')
    (tmp_path / "configs" / "large.json").write_text('{"seed": 4}')
    call = "vegab.main('configs', ported, extra=3, name='a')"
    done = run_small(tmp_path, call, "large", "run", "--ids=3,4", "--note=a # b")
    assert done.stdout == "[3, 4] a # b 4 3 a False\n", done.stderr
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config == {"ids": [3, 4], "note": "a # b", "seed": 4}, "a MetaSaver is there unasked"
    assert "unknown key 'extra'" in run_small(tmp_path, call, "root", "b", "--extra=3").stderr
    wrong = run_small(tmp_path, "vegab.main('configs', ported, extras=3)", "root", "b")
    assert "wrap() was given extras, which ported has no parameter for" in wrong.stderr


OLD_CONFIGS = """
from vegab import ConfigRegistry

simple_CNN_configs = ConfigRegistry()

simple_CNN_configs.set_root_config({
  "n_layers": 1,
  "n_epochs": 100,
  "dataset": "cifar10",
  "lr_schedule": [[10, 0.1], [20, 0.01]],
  "n_filters": 100
})

c = simple_CNN_configs['root']
c['dataset'] = 'cifar100'
simple_CNN_configs['cifar100'] = c
"""
OLD_RUNNER = """
import sys
sys.path.insert(0, {root!r})
from configs_of_old.simple_CNN import simple_CNN_configs
from vegab import main, MetaSaver, AutomaticNamer

def train(config, save_path):
    print(config['dataset'], config['lr_schedule'], config['n_filters'], save_path)

if __name__ == "__main__":
    main(simple_CNN_configs, train,
        plugins=[MetaSaver(), AutomaticNamer(as_prefix=True, namer="timestamp_namer")])
"""


def test_a_registry_and_a_runner_of_the_old_template_run(tmp_path: Path) -> None:
    (tmp_path / "configs_of_old").mkdir()
    (tmp_path / "configs_of_old" / "simple_CNN.py").write_text(OLD_CONFIGS)
    (tmp_path / "train.py").write_text(OLD_RUNNER.format(root=str(ROOT)))
    words = ("cifar100", "results/run", "--n_filters=10", "--lr_schedule=[[1, 0.5]]")
    done = run_script(tmp_path / "train.py", *words)
    assert done.returncode == 0, done.stderr
    (run,) = (tmp_path / "results").iterdir()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d_run", run.name)
    assert done.stdout == f"cifar100 [[1, 0.5]] 10 results/{run.name}\n"
    again = run_script(tmp_path / "train.py", words[0], f"results/{run.name}", *words[2:])
    assert again.stdout == f"results/{run.name} is already finished.\n"


def test_tensorboard_links_point_at_runs(tmp_path: Path) -> None:
    call = "vegab.wrap(registry, work, plugins=[vegab.TensorBoardLinker('boards')])"
    for path in ("results/a/run", "results/b/run", "results/a/run"):
        assert run_small(tmp_path, call, "root", path).returncode == 0
    links = {p.name: p.resolve().relative_to(tmp_path) for p in (tmp_path / "boards").iterdir()}
    assert links == {"run": Path("results/a/run/tb"), "b_run": Path("results/b/run/tb")}
    assert not os.readlink(tmp_path / "boards" / "run").startswith("/")


def test_a_function_without_configs_is_a_program(tmp_path: Path) -> None:
    call = "vegab.wrap_no_config_registry(resize)"
    done = run_small(tmp_path, call, "picture", "3", "--no_smooth", "--scale=2", "--name=7")
    assert (done.stdout, done.stderr) == ("resizing picture 4 False 2.0 7\n", "")
    assert done.returncode == 0
    helped = run_small(tmp_path, call, "--help").stdout
    assert "usage: small.py SOURCE SIZE [options]" in helped
    assert "the picture, about 100% of the time." in helped
    assert re.search(r"--scale X +by how much it is enlarged \(1\.0\)\n", helped)
    for arguments, sentence in [
        (["picture"], "the following arguments are required: SIZE"),
        (["picture", "three"], "SIZE: three was given, an integer is expected"),
        (["picture", "3", "--scal=2"], "unknown key 'scal'; did you mean 'scale'?"),
        (["picture", "3", "--scale=big"], "scale: big was given, a number is expected"),
    ]:
        refused = run_small(tmp_path, call, *arguments)
        assert refused.returncode == 2 and sentence in refused.stderr
    failed = run_small(tmp_path, call, "nothing", "3")
    assert (failed.returncode, failed.stderr) == (1, "small.py: failed: there is no nothing\n")


def test_a_function_without_configs_can_have_a_run_folder(tmp_path: Path) -> None:
    call = "vegab.wrap_no_config_registry(resize, plugins=[vegab.MetaSaver()])"
    done = run_small(tmp_path, call, "picture", "3", "--save_path=run")
    assert done.stdout == "resizing picture 4 True 1.0 x\n"
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config == {"source": "picture", "size": 3, "smooth": True, "scale": 1.0, "name": "x"}
    assert "resizing picture" in read(tmp_path / "run" / "stdout.txt")
    assert run_small(tmp_path, call, "other", "3", "--save_path=run").returncode == 2


# ------------------------------------------------------------- kinds of config, flags with a letter

FLOWS = """
import json, sys
from collections.abc import Sequence
sys.path.insert(0, {root!r})
import vegab
from vegab import Key

registry = vegab.ConfigRegistry()
registry.set_root_config({{"n_filters": 16, "fast": False}})
registry.add_schema(
    {{
        "iterator": Key(None, "what does a step"),
        "batch_size": None,
        "num_steps": None,
        "num_epochs": None,
        "log_freq": 1000,
        "verbose": Key(False, "say more"),
        "hook": {{"op": Key("validation/op", "what is measured")}},
    }},
    required=[("iterator",), ("num_steps", "num_epochs")],
    title="keys of a flow",
)

class Teller(vegab.VegabPlugin):
    def on_parsed_args(self, args):
        print(json.dumps([args.flags, args.resolved_config, args.overrides]), file=sys.stderr)

def work(config, save_path, *, checkpoint="", retrain=False, name="",
         evaluation: Sequence[str] = ()):
    '''Works.

    Args:
        checkpoint: where to start
        evaluation: what to evaluate
    '''
    print(json.dumps([config, checkpoint, retrain, evaluation]))

def loose(source, *, evaluation: list[str] = (), retrain=False, save_path=""):
    print(source, evaluation, retrain)

letters = {{"c": "checkpoint", "r": "retrain", "e": "evaluation", "n": "name"}}
namer = vegab.AutomaticNamer(lambda args: args.flags["name"], as_suffix=True)
if __name__ == "__main__":
    {call}
"""
FLOW = """
iterator: your_model.Iterator
num_steps: 10
own: {active: true, rate: 0.5}
stages: {1: {end: 3}}
copied: '{own/rate}'
"""
WRAP_FLOWS = """vegab.wrap(
        registry, work, plugins=[vegab.MetaSaver(), namer, Teller()], short_flags=letters
    )"""


@pytest.fixture
def flow(tmp_path: Path) -> Run:
    """Runs a script that knows a schema beside root; flow.yaml is a file of that kind."""
    (tmp_path / "flow.yaml").write_text(FLOW)
    (tmp_path / "flow.py").write_text(FLOWS.format(root=str(ROOT), call=WRAP_FLOWS))
    return functools.partial(run_script, tmp_path / "flow.py")


def config_of(done: Done) -> dict[str, Any]:
    assert done.returncode == 0, done
    config: dict[str, Any] = json.loads(done.stdout)[0]
    return config


def test_a_file_with_keys_of_its_own_runs_and_is_fed_back(flow: Run, tmp_path: Path) -> None:
    config = config_of(flow("flow.yaml", "run"))
    assert config == {
        "iterator": "your_model.Iterator", "batch_size": None, "num_steps": 10,
        "num_epochs": None, "log_freq": 1000, "verbose": False, "hook": {"op": "validation/op"},
        "own": {"active": True, "rate": 0.5}, "stages": {"1": {"end": 3}}, "copied": 0.5,
    }  # fmt: skip
    assert json.loads((tmp_path / "run" / "config.json").read_text()) == config
    assert config_of(flow("run/config.json", "again")) == config
    finished = flow("run/config.json", "run")
    assert finished.stdout == "run is already finished. A larger --num_steps continues it.\n"


def test_overrides_of_a_file_with_keys_of_its_own(flow: Run, tmp_path: Path) -> None:
    config = config_of(
        flow(
            "--no_active", "--own/rate", "0.25", "--verbose", "flow.yaml", "run",
            "--stages.1.end=4", "-p", "new/key", "-1", "-P", "text", "[1]", "--hook/op=other",
        )
    )  # fmt: skip
    assert config["own"] == {"active": False, "rate": 0.25} and config["verbose"] is True
    assert config["copied"] == 0.25 and config["stages"] == {"1": {"end": 4}}
    assert (config["new"], config["text"], config["hook"]) == ({"key": -1}, "[1]", {"op": "other"})
    (tmp_path / "base.yaml").write_text("iterator: of.Base\nown: {active: true}\n")
    (tmp_path / "top.yaml").write_text("num_epochs: 2\n")
    config = config_of(flow("top.yaml", "based", "-bbase.yaml", "--no_active"))
    assert (config["iterator"], config["own"]) == ("of.Base", {"active": False})


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["flow.yaml", "run", "--own/rat=1"], "unknown key 'own/rat'; did you mean 'own.rate'?"),
        (["flow.yaml", "run", "--rate=high"], "own.rate: high was given, a number is expected"),
        (["flow.yaml", "run", "--iterator="], "flow.yaml: the key 'iterator' is missing"),
        (["flow.yaml", "run", "-p", "own/rate/x", "1"], "own.rate: "),
        (["root", "run", "-p", "new", "1"], "unknown key 'new'"),
        (["bare.yaml", "run"], "bare.yaml: unknown key 'bach_size'"),
        (["missing.yaml", "run", "--iterator=x"], "cannot read missing.yaml: No such file"),
        (["rooot", "x.yaml"], "unknown config 'rooot'; did you mean 'root'?"),
        (["--mine", "flow.yaml", "run"], "unknown key 'mine'"),
        (["flow.yaml", "run", "-c"], "-c needs a value"),
        (["flow.yaml", "run", "-r", "true"], "unrecognized arguments: true"),
    ],
)
def test_a_wrong_command_on_such_a_file_is_one_sentence(
    flow: Run, tmp_path: Path, arguments: list[str], sentence: str
) -> None:
    (tmp_path / "bare.yaml").write_text("bach_size: 2\n")
    refused = flow(*arguments)
    assert refused.returncode == 2
    assert refused.stderr.startswith("flow.py: error: ") and sentence in refused.stderr
    assert refused.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_more_steps_or_epochs_extend_a_run_of_such_a_file(flow: Run, tmp_path: Path) -> None:
    assert flow("flow.yaml", "run", "--num_epochs=2").returncode == 0
    finished = flow("flow.yaml", "run", "--num_epochs=2").stdout
    assert finished.endswith("A larger --num_steps or --num_epochs continues it.\n")
    config = config_of(flow("flow.yaml", "run", "--num_epochs=3", "--num_steps=20"))
    assert (config["num_epochs"], config["num_steps"]) == (3, 20)
    refused = flow("flow.yaml", "run", "--num_epochs=3", "--num_steps=5")
    assert refused.returncode == 2 and "(num_steps: 20 -> 5)" in refused.stderr


def test_dry_run_of_a_file_with_keys_of_its_own(flow: Run, tmp_path: Path) -> None:
    (tmp_path / "top.yaml").write_text("note: x\n")
    done = flow("top.yaml", "run", "-b", "flow.yaml", "--rate=0.1", "--dry_run")
    assert done.returncode == 0
    assert "copied: 0.1\n" in done.stdout and '  "1":\n    end: 3\n' in done.stdout
    assert "#   iterator: null -> your_model.Iterator\n" in done.stdout
    assert "#   note" not in done.stdout
    (tmp_path / "printed.yaml").write_text(done.stdout)
    assert flow("printed.yaml", "run", "--dry_run").stdout.startswith(done.stdout.split("#")[0])
    assert not (tmp_path / "run").exists()


def test_help_lists_the_keys_of_each_kind_and_letters(flow: Run) -> None:
    for arguments in (["--help"], ["missing.yaml", "-h"]):
        text = flow(*arguments).stdout
        root, _, rest = text.partition("\nkeys of a flow:\n")
        assert "--n_filters=16" in root and "--n_filters" not in rest
        rest = re.sub(r" +", " ", rest)
        assert (
            " --iterator=null what does a step\n" in rest and "--verbose=false say more\n" in rest
        )
        assert " --hook.op=validation/op what is measured\n" in rest
        root = re.sub(r" +", " ", root)
        assert "--checkpoint TEXT where to start\n" in root and " -r, --retrain\n" in root
        assert "--evaluation TEXT what to evaluate\n" in root


def test_flags_have_letters_and_may_be_repeated(flow: Run, tmp_path: Path) -> None:
    done = flow(
        "-e", "a.yaml", "-r", "flow.yaml", "run", "-c", "-1", "--evaluation=b.yaml",
        "--evaluation", "7", "-n", "big", "--rate=1",
    )  # fmt: skip
    config, *flags = json.loads(done.stdout)
    assert flags == ["-1", True, ["a.yaml", "b.yaml", "7"]]
    seen, resolved, overrides = json.loads(done.stderr)
    assert seen == {
        "checkpoint": "-1", "retrain": True, "name": "big", "evaluation": ["a.yaml", "b.yaml", "7"],
    }  # fmt: skip
    assert resolved == config and config["own"]["rate"] == 1.0
    assert overrides == {"own.rate": 1.0}
    assert (tmp_path / "run_big" / "config.json").is_file() and not (tmp_path / "run").exists()
    plain = flow("root", "plain")
    assert json.loads(plain.stdout)[1:] == ["", False, []]


def test_p_reaches_a_key_that_has_the_name_of_a_flag(flow: Run, tmp_path: Path) -> None:
    (tmp_path / "named.yaml").write_text(FLOW + "name: mine\n")
    done = flow("named.yaml", "run", "-p", "name", "yours", "--name=big")
    assert config_of(done)["name"] == "yours"
    assert (tmp_path / "run_big").is_dir()


def test_a_function_without_configs_has_such_flags_too(tmp_path: Path) -> None:
    letters = "{'e': 'evaluation', 'r': 'retrain'}"
    call = f"vegab.wrap_no_config_registry(loose, [Teller()], short_flags={letters})"
    (tmp_path / "flow.py").write_text(FLOWS.format(root=str(ROOT), call=call))
    done = run_script(tmp_path / "flow.py", "x", "-e", "a", "-r", "-e", "b")
    assert done.stdout == "x ['a', 'b'] True\n"
    seen, resolved, _ = json.loads(done.stderr)
    assert seen["evaluation"] == ["a", "b"]
    assert resolved == {"source": "x", "evaluation": ["a", "b"], "retrain": True}


@pytest.mark.parametrize(
    "letters, sentence",
    [
        ({"p": "note"}, "'p' was given for 'note'; give a letter, but none of bhlpP"),
        ({"no": "note"}, "'no' was given for 'note'; give a letter"),
        ({"x": "nothing"}, "'x' was given for 'nothing'; .* for a flag of the function: .*note"),
    ],
)
def test_a_wrong_letter_is_the_author_s_mistake(letters: dict[str, str], sentence: str) -> None:
    def work(config: dict[str, Any], *, note: str = "") -> None: ...

    for wrapped in (
        lambda: wrap(ConfigRegistry(), work, short_flags=letters),
        lambda: wrap_no_config_registry(work, short_flags=letters),
    ):
        with pytest.raises(ValueError, match=sentence):
            wrapped()


def test_a_flag_that_is_a_key_of_a_schema_is_the_author_s_mistake() -> None:
    def work(config: dict[str, Any], *, note: str = "") -> None: ...

    registry = ConfigRegistry()
    registry.add_schema({"note": ""})
    with pytest.raises(ValueError, match="the name 'note' is taken"):
        wrap(registry, work)


def test_an_automatic_name_can_be_a_prefix_a_suffix_or_nothing() -> None:
    def named(save_path: str, name: str, **options: Any) -> str:
        args = argparse.Namespace(save_path=save_path)
        AutomaticNamer(lambda args: name, **options).on_parsed_args(args)
        assert isinstance(args.save_path, str)
        return args.save_path

    assert named("results", "big", as_prefix=False) == "results/big"
    assert named("results/run", "big", as_prefix=True) == "results/big_run"
    assert named("results/run", "big") == "results/big_run", "as in the vegab of old"
    assert named("results/run/", "big", as_suffix=True) == "results/run_big"
    assert named("", "big", as_suffix=True) == ""
    for options in ({}, {"as_prefix": False}, {"as_suffix": True}):
        assert named("results/run", "", **options) == "results/run"
    with pytest.raises(ValueError, match="a prefix or a suffix, not both"):
        named("run", "big", as_prefix=True, as_suffix=True)
    for namer in ("time", True):
        with pytest.raises(ValueError, match=f"namer is {namer!r}; give timestamp_namer, kwargs"):
            AutomaticNamer(namer)  # type: ignore[arg-type]
