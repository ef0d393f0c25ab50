"""Sweeps: which trials there are, that they are ordinary runs, and that nothing is lost."""

import functools
import json
import math
import multiprocessing
import operator
import os
import random
import shlex
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
from fault_lab import WHOLE
from machinery import ROOT, Command
from sweeping import (
    EXACT,
    attempts_in,
    exact_files,
    is_told_to_end,
    kill,
    pid_in,
    start,
    swept_under_fire,
    wait_for,
)

from configs import registry
from engine.devices import gpus as devices
from engine.sweeps import definition as sweep_trials
from engine.sweeps import local as launch
from engine.sweeps import ray_cluster, slurm, sweep
from engine.sweeps.definition import Trial
from engine.sweeps.sweep import FINISHED, REFUSED, Sweeper
from vegab import UsageError
from vegab.config import find_key
from vegab.run_folder import IN_USE, living_owner

SMALL = (
    *("--num_epochs=2", "--n_layers=1", "--batch_size=126", "--no_tensorboard", "--threads=1"),
    *("--checkpoint_steps=3", "--dropout=0.3"),
)
GRID = ("--grid", "n_filters=2,3", "--grid", "lr_schedule=[[1,0.01],[2,0.001]],null")


def trials_in(folder: Path) -> list[str]:
    return sorted(path.parent.name for path in folder.glob("*/config.json"))


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep of four trials that nothing stopped."""
    folder = tmp_path_factory.mktemp("sweep") / "straight"
    process = start(ROOT, "bin/sweep.py", "root", folder, *SMALL, *GRID, "--jobs=2")
    said, problems = process.communicate(timeout=1800)
    assert process.returncode == 0, problems
    assert said.startswith("4 trials: 4 finished; best val_loss ")
    return folder


def test_a_trial_is_the_run_that_its_command_makes_by_hand(
    swept: Path, command: Command, tmp_path: Path
) -> None:
    told = command("bin/sweep.py", "root", swept, *SMALL, *GRID, "--dry_run").stdout.splitlines()
    assert len(told) == 4
    assert len(trials_in(swept)) == 4
    for line in told:
        _, script, config, path, *rest = shlex.split(line)
        meta = json.loads((Path(path) / "meta.json").read_text())
        assert meta["command"]["line"] == line
        assert meta["status"] == "finished"
    # The last one has a schedule of its own taken away.
    again = tmp_path / "again"
    assert command(script, config, again, *rest).returncode == 0
    for name in EXACT:
        assert (again / name).read_bytes() == (Path(path) / name).read_bytes(), name
    listed = command("bin/runs.py", "compare", swept, "--format=csv", "--metric=val_loss").stdout
    assert listed.splitlines()[0] == (
        "run,state,epoch,n_filters,lr_schedule,val_loss best,val_loss last"
    )
    assert len(listed.splitlines()) == 5
    page = (swept / "sweep.html").read_text()
    assert "grid n_filters=2,3" in page
    assert all(name in page for name in trials_in(swept))


@pytest.mark.slow
def test_the_same_command_trains_nothing_and_a_larger_grid_what_is_new(
    swept: Path, command: Command, tmp_path: Path
) -> None:
    before = {path: path.stat().st_mtime_ns for path in swept.glob("*/*")}
    done = command("bin/sweep.py", "root", swept, *SMALL, *GRID)
    assert done.returncode == 0, done.stderr
    assert {path: path.stat().st_mtime_ns for path in swept.glob("*/*")} == before
    larger = ("--grid", "n_filters=2,3", "--grid", "lr_schedule=null", "--seeds=2")
    done = command("bin/sweep.py", "root", swept, *SMALL, *larger, "--dry_run")
    names = [Path(shlex.split(line)[3]).name for line in done.stdout.splitlines()]
    assert names[4:] == [  # the first seed is that of the trials that are there
        "n_filters=2,lr_schedule=null,seed=1",
        "n_filters=3,lr_schedule=null,seed=1",
    ]
    other = command("bin/sweep.py", "root", swept, *SMALL, *GRID, "--dropout=0.1")
    assert other.returncode == 2
    assert "holds a sweep of another config (dropout: 0.3 -> 0.1)" in other.stderr


@pytest.mark.slow
def test_sweeper_and_trials_that_are_killed_lose_nothing(
    swept: Path, command: Command, tmp_path: Path
) -> None:
    folder = tmp_path / "killed"
    words = ("root", folder, *SMALL, *GRID, "--jobs=2")
    first = start(ROOT, "bin/sweep.py", *words)
    wait_for(lambda: list(folder.glob("*/model.h5")))
    first.kill()
    first.wait()
    # The trials of the sweeper that is gone live on, or are killed as well.
    kill(*map(pid_in, folder.glob("n_filters=2*")))
    second = command("bin/sweep.py", *words)
    assert second.returncode == 0, second.stdout + second.stderr
    assert second.stdout.startswith("4 trials: 4 finished")
    assert exact_files(folder) == exact_files(swept)


@pytest.mark.slow
def test_whatever_is_killed_each_trial_has_the_bits_of_an_undisturbed_sweep(
    command: Command, tmp_path: Path
) -> None:
    """With TEMPLATE_FAULT_TESTS_WHOLE=1, forty trials and fifty kills; else a few."""
    number, kills = (40, 50) if WHOLE else (6, 6)
    straight, folder = tmp_path / "straight", tmp_path / "killed"
    words = ("--num_steps=400", f"--seeds={number}", "--jobs=2")
    done = command("bin/sweep.py", "iterator_numpy", straight, *words)
    assert done.returncode == 0, done.stderr
    every = ("bin/sweep.py", "iterator_numpy", folder, *words)
    began = time.monotonic()
    killed, said = swept_under_fire(ROOT, every, folder, kills, random.Random(0))
    assert killed.total() == kills, said
    print(f"{dict(killed)} in {time.monotonic() - began:.0f} s: {said}")
    assert f"{number} of {number} trials are finished" in said
    assert exact_files(folder) == exact_files(straight)
    assert trials_in(folder) == trials_in(straight)
    assert len(trials_in(folder)) == len(sweep.read(folder)[1]) == number


def test_a_trial_that_was_given_up_has_failed_until_it_is_tried_again(tmp_path: Path) -> None:
    how = {
        "n=1": "it died (death 3 of 3)",
        "n=2": "it died (death 2 of 3)",
        "n=4": "x (death 3 of 3)",
    }
    (tmp_path / ".output").mkdir()
    (tmp_path / ".output" / "endings.json").write_text(json.dumps(how))
    for n, status in ((1, None), (2, "running"), (3, "running"), (4, "finished")):
        (tmp_path / f"n={n}").mkdir()
        if status:
            (tmp_path / f"n={n}" / "config.json").write_text("{}")
            meta = {"attempts": [], "status": status}
            (tmp_path / f"n={n}" / "meta.json").write_text(json.dumps(meta))
    records = sweep.states_of(tmp_path, [Trial(f"n={n}", {}) for n in (1, 2, 3, 4, 5)])
    assert [one.state for one in records] == ["failed", "died", "died", "finished", "waiting"]
    assert records[0].error == how["n=1"]
    assert sweep.problems(tmp_path, records) == [
        f"{tmp_path}/n=1 failed: {how['n=1']}", f"{tmp_path}/n=2 is not finished: {how['n=2']}",
    ]  # fmt: skip


def test_of_many_trials_status_shows_those_that_need_a_look_and_the_best(
    command: Command, tmp_path: Path
) -> None:
    told = definition(grid={"n": list(range(60))})
    trials = sweep_trials.trials_of(told)
    sweep.write(tmp_path, told, trials)
    for number, trial in enumerate(trials[:50]):
        folder = tmp_path / trial.name
        folder.mkdir()
        config = {"num_epochs": 1, "monitor": "val_loss"}
        (folder / "config.json").write_text(json.dumps(config))
        status = "interrupted" if number == 20 else "finished"
        (folder / "meta.json").write_text(json.dumps({"attempts": [], "status": status}))
        (folder / "history.csv").write_text(f"epoch,val_loss\n1,{(number - 30) ** 2}\n")
    shown = [Path(one.path).name for one in sweep.to_look_at(sweep.states_of(tmp_path, trials))]
    assert shown[0] == trials[20].name
    assert set(shown[1:]) == {trial.name for trial in trials[25:35]}
    said = command("bin/sweep.py", "status", tmp_path).stdout
    assert f"and 49 more: python bin/runs.py list {tmp_path}" in said
    assert len(said.splitlines()) < 16
    few = sweep.states_of(tmp_path, trials[:40])
    assert sweep.to_look_at(few) == few


def test_a_trial_that_was_in_use_is_tried_again_whoever_has_ended_by_then(tmp_path: Path) -> None:
    class Begun:
        """Says that the folder was in use, and later that all went well."""

        codes: ClassVar = [REFUSED, FINISHED]

        def adopted(self) -> set[str]:
            return set()

        def is_stopped(self) -> bool:
            return False

        def said(self, name: str) -> str:
            return f"train.py: error: {name} {IN_USE} process 7 on here; wait for it"

        def run(self, commands: dict[str, Any], tell: Any) -> None:
            tell([], dict.fromkeys(commands, self.codes.pop(0)))

    launcher = Begun()
    trials = [Trial("n=1", {})]
    sweeper = Sweeper(tmp_path, lambda refused: trials, lambda trial: [], launcher)
    sweeper.run(retry_failed=False, show=lambda *numbers: None)
    assert launcher.codes == []
    assert sweeper.refused == {}


def test_what_ray_tries_again_is_not_taken_for_what_lives_on(tmp_path: Path) -> None:
    launcher = launch.Launcher(tmp_path, lambda: False)
    output = launcher.output("one")
    with open(output, "a") as file:  # as of a trial whose worker is gone
        (tmp_path / "one").write_text("")
        arguments = ["root", str(tmp_path / "one")], str(ROOT), dict(os.environ), str(output)
        assert ray_cluster.train(*arguments) == REFUSED
        file.write("epoch 20/20\n")
    assert launcher.said("one").startswith("train.py: error: ")


@pytest.mark.slow
def test_a_sweep_is_told_to_stop_and_goes_on(swept: Path, command: Command, tmp_path: Path) -> None:
    folder = tmp_path / "stopped"
    words = ("root", folder, *SMALL, *GRID, "--jobs=2")
    first = start(ROOT, "bin/sweep.py", *words)
    wait_for(lambda: list(folder.glob("*/model.h5")))
    # It would be done before it is told to stop, were the other commands slow to begin.
    first.send_signal(signal.SIGSTOP)
    second = command("bin/sweep.py", *words)
    assert second.returncode == 2
    assert "is being swept by process" in second.stderr
    stop = start(ROOT, "bin/sweep.py", "stop", folder)
    wait_for(lambda: is_told_to_end(first.pid))
    first.send_signal(signal.SIGCONT)
    said, problems = stop.communicate(timeout=1800)
    assert stop.returncode == 0, problems
    assert first.wait(300) == 75
    assert "waiting" in said
    states = {json.loads(path.read_text())["status"] for path in folder.glob("*/meta.json")}
    assert states <= {"interrupted", "finished"}
    assert command("bin/sweep.py", *words).returncode == 0
    assert exact_files(folder) == exact_files(swept)
    assert "4 finished" in command("bin/sweep.py", "status", folder).stdout
    assert "nobody sweeps" in command("bin/sweep.py", "stop", folder).stdout


@pytest.mark.slow
def test_a_sweep_outlives_its_terminal_and_its_trials_a_sweeper_that_is_killed(
    command: Command, tmp_path: Path
) -> None:
    folder = tmp_path / "sweep"
    words = ("root", folder, *SMALL, "--num_epochs=3000", "--n_filters=2", "--seeds=2", "--jobs=1")
    assert "status" in command("bin/sweep.py", *words, "--detach").stdout
    wait_for(lambda: list(folder.glob("*/model.h5")))
    sweeper = json.loads((folder / "sweep.lock").read_text())["pid"]
    os.kill(sweeper, signal.SIGHUP)
    assert "is being swept" in command("bin/sweep.py", *words, "--detach").stderr
    kill(sweeper)
    assert living_owner(folder / "seed=0")
    said = command("bin/sweep.py", "stop", folder).stdout
    assert "1 waiting, 1 interrupted" in said
    assert not living_owner(folder / "seed=0")


def test_a_trial_that_has_not_begun_ends_with_its_sweeper(tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    process = start(ROOT, "bin/sweep.py", "root", folder, *SMALL, "--seeds=2")
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    wait_for(lambda: (folder / sweep.OUTPUTS).exists(), process)
    wait_for(lambda: len(children.read_text().split()) > 1, process)
    time.sleep(0.5)  # the fork server imports TensorFlow, and has been asked for a trial
    process.kill()
    process.communicate()  # which waits for the fork server and the trial, too
    assert trials_in(folder) == [], "`stop` could not have found it"


def test_a_trial_that_fails_is_shown_and_stops_no_other(command: Command, tmp_path: Path) -> None:
    grid = ("--grid", "learning_rate=0.01,1e38", "--jobs=2")
    words = ("bin/sweep.py", "root", tmp_path / "sweep", *SMALL, "--n_filters=2", *grid)
    done = command(*words)
    assert done.returncode == 1
    assert done.stdout.startswith("2 trials: 1 finished, 1 failed")
    (line,) = [line for line in done.stderr.splitlines() if " failed: " in line]
    assert "learning_rate=1e+38" in line
    assert "loss" in line
    run = tmp_path / "sweep" / "learning_rate=1e+38"
    for flags, number in (((), 1), (("--retry_failed",), 2)):
        assert command(*words, *flags).returncode == 1
        assert len(attempts_in(run)) == number


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "the sweep varies nothing"),
        (("--grid", "n_filters="), "is not of the form"),
        (("--grid", "n_filter=2,3"), "did you mean 'n_filters'?"),
        (("--grid", "n_filters=2,2"), "has the same value twice"),
        (("--grid", "n_filters=2,x"), "n_filters: x was given, an integer is expected"),
        (("--grid", "batch_size=0,8"), "batch_size is 0; it must be at least 1"),
        (("--grid", "n_filters=2", "--grid", "n_filters=3"), "is given twice"),
        (("--seeds=-1",), "seeds is -1"),
        (("--seeds=2", "--grid", "seed=3,4,5"), "seed is varied by two of --grid, --range"),
        (("--seeds=2", "--jobs=0"), "jobs is 0; it must be at least 1"),
        (("--seeds=2", "--gpus=a"), "--gpus=a: give numbers such as 0 or 0,1"),
        (("--seeds=2", "--gpus=0,1", "--jobs=3"), "asks for more; give --per_gpu=2"),
        (("--random=2",), "--random needs a --range"),
        (("--range", "dropout=0.1..0.5"), "--range needs --random"),
        (("--folds=1",), "num_folds is 1; it must be at least 2"),
        (("--launcher=slrm", "--seeds=2"), "did you mean 'slurm'?"),
        (("--random=2", "--range", "dropout=0.5..0.1"), "is not a range"),
        (("--random=2", "--range", "dropout=0..0.5 log"), "begins above 0"),
        (("--plan", "no.yaml"), "cannot read no.yaml"),
    ],
)
def test_a_mistake_is_one_sentence_and_touches_nothing(
    words: tuple[str, ...], said: str, command: Command, tmp_path: Path
) -> None:
    done = command("bin/sweep.py", "root", tmp_path / "sweep", *words)
    assert done.returncode == 2
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_what_every_trial_refuses_leaves_nothing_behind(command: Command, tmp_path: Path) -> None:
    words = ("root", tmp_path / "sweep", *SMALL, "--seeds=2", "--monitor=val_f1")
    done = command("bin/sweep.py", *words)
    assert done.returncode == 2
    reason = "monitor is 'val_f1'; choose one of accuracy, loss"
    assert done.stderr.count(reason) == 1
    assert not list(tmp_path.iterdir())
    # In the background, it says so where it said that it would.
    assert command("bin/sweep.py", *words, "--detach").returncode == 0
    log = tmp_path / "sweep" / sweep.LOG
    wait_for(lambda: log.exists() and reason in log.read_text())
    wait_for(lambda: [path.name for path in log.parent.iterdir()] == [log.name])


def test_a_launcher_that_is_not_installed_is_one_sentence(command: Command, tmp_path: Path) -> None:
    (tmp_path / "ray.py").write_text("raise ModuleNotFoundError('No module named ray')")
    words = ("bin/sweep.py", "root", tmp_path / "sweep", "--seeds=2", "--launcher=ray")
    done = command(*words, env={"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 2
    assert done.stderr == 'sweep.py: error: --launcher ray needs Ray: pip install "ray>=2.40"\n'
    assert not (tmp_path / "sweep").exists()


@pytest.mark.slow
def test_gpus_are_shared_out_one_a_trial(swept: Path, command: Command, tmp_path: Path) -> None:
    folder = tmp_path / "gpus"
    grid = ("--grid", "n_filters=2,3", "--grid", "lr_schedule=null")
    done = command("bin/sweep.py", "root", folder, *SMALL, *grid, "--gpus=5,7")
    assert done.returncode == 0, done.stderr
    told = [json.loads(path.read_text()) for path in sorted(folder.glob("*/meta.json"))]
    assert [meta["environment"]["CUDA_VISIBLE_DEVICES"] for meta in told] == ["5", "7"]
    assert not any("--gpus" in meta["command"]["line"] for meta in told)
    for name, content in exact_files(folder).items():
        assert (swept / name).read_bytes() == content, name


@pytest.mark.parametrize(
    ("given", "most_at_a_time"),
    [
        ({"gpus": "5,7"}, {"5": 1, "7": 1}),
        ({"gpus": "5,7", "per_gpu": 2}, {"5": 2, "7": 2}),
        ({"jobs": 2}, {"": 2}),
        ({"threads": 1}, {"": 4}),
        *(
            pytest.param(*row, marks=pytest.mark.slow)
            for row in [
                ({"gpus": "5,7", "jobs": 1}, {"5": 1}),
                ({"gpus": "none", "jobs": 3}, {"": 3}),
                ({"threads": 3}, {"": 1}),
                ({}, {"": 1}),
            ]
        ),
    ],
)
def test_as_many_run_at_a_time_as_there_is_room_for(
    given: dict[str, Any],
    most_at_a_time: dict[str, int],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    seen: list[Counter[str]] = []
    ended: list[dict[str, int]] = []

    def tell(running: Sequence[str], codes: Mapping[str, int]) -> dict[str, Sequence[str]]:
        seen.append(Counter(launcher.held.values()))
        ended.append(dict(codes))
        return {}

    monkeypatch.setattr(launch, "_run", lambda *words: time.sleep(0.1))
    for name in ("CUDA_VISIBLE_DEVICES", devices.SEVERAL, "PYTHONPATH"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(4))
    asked = {"jobs": None, "gpus": "", "per_gpu": 1, "threads": None} | given
    launcher = launch.LocalLauncher(**asked, outputs=tmp_path / "said", is_stopped=lambda: False)
    launcher._processes = multiprocessing.get_context("fork")
    names = [f"trial {number}" for number in range(9)]
    launcher.run({name: [] for name in names}, tell)
    assert functools.reduce(operator.or_, ended) == dict.fromkeys(names, 0)
    assert sum(map(len, ended)) == len(names), "each is told once"
    assert dict(functools.reduce(operator.or_, seen)) == most_at_a_time


def test_a_sweep_of_a_newer_format_is_refused(tmp_path: Path) -> None:
    told = definition(seeds=2)
    sweep.write(tmp_path, told, sweep_trials.trials_of(told))
    assert sweep.read(tmp_path)[0] == told
    content = json.loads((tmp_path / "sweep.json").read_text())
    (tmp_path / "sweep.json").write_text(json.dumps(content | {"format": 2}))
    with pytest.raises(UsageError, match="its format is 2"):
        sweep.read(tmp_path)


def test_a_folder_of_something_else_is_refused(command: Command, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for words in (("root", tmp_path, "--seeds=2"), ("status", tmp_path), ("stop", tmp_path)):
        done = command("bin/sweep.py", *words)
        assert done.returncode == 2
        assert "no sweep" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_plan_says_the_same_as_the_command_line(command: Command, tmp_path: Path) -> None:
    plan = tmp_path / "plan.yaml"
    plan.write_text("grid: {n_filters: [2, 3]}\nrange: {dropout: 0.1..0.5}\nrandom: 2\nseeds: 2\n")
    folder = tmp_path / "sweep"
    by_plan = command("bin/sweep.py", "root", folder, "--plan", plan, "--dry_run")
    words = ("--grid", "n_filters=2,3", "--range", "dropout=0.1..0.5", "--random=2", "--seeds=2")
    assert by_plan.stdout == command("bin/sweep.py", "root", folder, *words, "--dry_run").stdout
    assert len(by_plan.stdout.splitlines()) == 8
    more = "config: digits\noverrides: {n_layers: 1, lr_schedule: [[1, 0.01]], dropout: 0.3}\n"
    plan.write_text("grid: {n_filters: [2, 3]}\n" + more)
    by_plan = command("bin/sweep.py", folder, "--plan", plan, "--dropout=0.1", "--dry_run")
    same = ("--grid", "n_filters=2,3", "--n_layers=1", "--lr_schedule=[[1, 0.01]]")
    typed = command("bin/sweep.py", "digits", folder, *same, "--dropout=0.1", "--dry_run")
    assert by_plan.stdout == typed.stdout
    assert len(by_plan.stdout.splitlines()) == 2
    other = command("bin/sweep.py", "root", folder, "--plan", plan, "--dry_run")
    assert other.stdout.startswith("python bin/train.py root ")
    # What is typed takes precedence, wherever it stands.
    plan.write_text("config: digits\ngrid: {n_filters: [2, 3], n_layers: [1, 2]}\n")
    first = (f"--plan={plan}", "--grid", "n_layers=3")
    lines = command("bin/sweep.py", *first, folder, "--dry_run").stdout.splitlines()
    assert [Path(shlex.split(line)[3]).name for line in lines] == [
        "n_filters=2,n_layers=3",
        "n_filters=3,n_layers=3",
    ]
    other = command("bin/sweep.py", *first, "root", folder, "--dry_run")
    assert other.stdout.startswith("python bin/train.py root ")
    plan.write_text("grids: {n_filters: [2, 3]}\n")
    refused = command("bin/sweep.py", "root", folder, "--plan", plan)
    assert refused.returncode == 2
    assert "unknown key 'grids'; did you mean 'grid'?" in refused.stderr


def test_a_trial_is_its_resolved_config_however_that_came_about(
    command: Command, tmp_path: Path
) -> None:
    own, folder = tmp_path / "own.yaml", tmp_path / "sweep"
    own.write_text("n_layers: 1\naccumulate_steps: ${n_layers}\n")

    def names_of(*words: str) -> list[str]:
        told = command("bin/sweep.py", own, folder, *words, "--dry_run").stdout.splitlines()
        return [Path(shlex.split(line)[3]).name for line in told]

    steps = ("--grid", 'accumulate_steps=1,2,"${n_layers}"')
    assert len(names_of("--grid", "n_layers=1,2", *steps)) == 4
    mappings = "optimizer_arguments={momentum: 0.9},{momentum: 1},{momentum: 1.0}"
    assert len(names_of("--grid", mappings)) == 2
    # With two layers there are two steps, so that one step is another config.
    told = sweep_trials.Definition(str(own), registry.resolve(str(own)), [], {}, {}, 0, 0)
    folder.mkdir()
    sweep.write(folder, told, [Trial("n_layers=2", {"n_layers": 2})])
    added = names_of("--grid", "n_layers=2", "--grid", "accumulate_steps=1,2")
    assert added == ["n_layers=2", "n_layers=2,accumulate_steps=1"]


def test_folds_are_trials_that_share_all_but_what_they_validate_on(
    command: Command, tmp_path: Path
) -> None:
    words = ("--grid", "n_filters=2,3", "--folds=3", "--seeds=2", "--dry_run")
    told = command("bin/sweep.py", "root", tmp_path / "sweep", *words).stdout.splitlines()
    assert len(told) == 12
    expected = ["seed=0,fold=0", "seed=0,fold=1", "seed=0,fold=2", "seed=1,fold=0"]
    names = [Path(shlex.split(line)[3]).name for line in told[:4]]
    assert names == [f"n_filters=2,{name}" for name in expected]
    assert all("--num_folds=3" in line for line in told)
    none = command("bin/sweep.py", "iterator_numpy", tmp_path / "sweep", "--folds=3")
    assert none.returncode == 2
    assert "iterator_numpy has no keys num_folds and fold" in none.stderr


def definition(**changes: object) -> sweep_trials.Definition:
    asked: dict[str, Any] = {"grid": {}, "range": {}, "random": 0, "seeds": 0} | changes
    return sweep_trials.Definition("root", {"seed": 7, "lr": 0.1, "n": 3}, [], **asked)


def test_draws_lie_in_their_ranges_and_more_of_them_add_to_the_first() -> None:
    ranges = {"lr": "1e-4..1e-1 log", "n": "2..5"}
    many = sweep_trials.trials_of(definition(range=ranges, random=400))
    few = sweep_trials.trials_of(definition(range=ranges, random=5))
    assert many[:5] == few
    rates = [float(trial.settings["lr"]) for trial in many]
    assert min(rates) >= 1e-4
    assert max(rates) <= 1e-1
    for low in (1e-4, 1e-3, 1e-2):  # as many in each factor of ten
        assert 90 < sum(low <= rate < 10 * low for rate in rates) < 180
    assert {trial.settings["n"] for trial in many} == {2, 3, 4, 5}
    narrow = sweep_trials.trials_of(definition(range={"lr": "0.9999..0.99996"}, random=40))
    assert max(float(trial.settings["lr"]) for trial in narrow) == 0.99996, "not 1"


def test_seeds_count_up_from_the_config_s() -> None:
    trials = sweep_trials.trials_of(definition(grid={"n": [1, 2]}, seeds=2))
    expected = [{"n": n, "seed": seed} for n in (1, 2) for seed in (7, 8)]
    assert [dict(trial.settings) for trial in trials] == expected
    assert [trial.name for trial in trials][:2] == ["n=1,seed=7", "n=1,seed=8"]


def test_a_long_name_is_cut_and_stays_its_own() -> None:
    axes = {f"a_rather_long_setting_{i}": [0.123456789] for i in range(9)} | {"n": [1, 2]}
    one, other = (trial.name for trial in sweep_trials.trials_of(definition(grid=axes)))
    assert one != other
    assert len(one.encode()) == len(other.encode()) == 150


def test_a_short_name_stands_for_a_nested_key() -> None:
    config = {"model": {"n_filters": 8}}
    axes = sweep_trials.grid_of(["n_filters=8,16"], lambda name: find_key(config, name))
    assert axes == {"model.n_filters": [8, 16]}
    with pytest.raises(UsageError, match="unknown key"):
        sweep_trials.grid_of(["filters=8"], lambda name: find_key(config, name))


@pytest.mark.slow
def test_a_trial_that_was_killed_as_it_began_begins_again(command: Command, tmp_path: Path) -> None:
    words = ("root", tmp_path / "sweep", *SMALL, "--num_epochs=1", "--n_filters=2", "--seeds=2")
    assert command("bin/sweep.py", *words).returncode == 0
    trial = tmp_path / "sweep" / "seed=1"
    for path in trial.iterdir():  # a kill between meta.json and config.json
        if path.is_file() and path.name not in ("meta.json", "run.lock"):
            path.unlink()
    meta = json.loads((trial / "meta.json").read_text())
    (trial / "meta.json").write_text(json.dumps(meta | {"status": "running"}))
    done = command("bin/sweep.py", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("2 of 2 trials are finished\n")


FAILED = "sbatch: error: Batch job submission failed: "
POLICY = "Batch job submission failed: Job violates accounting/QOS policy (job submit limit, …)"


@pytest.mark.parametrize(
    ("complaint", "is_later"),
    [
        (f"sbatch: error: QOSMaxSubmitJobPerUserLimit\nsbatch: error: {POLICY}", True),
        (f"sbatch: error: AssocMaxSubmitJobLimit\nsbatch: error: {POLICY}", True),
        (f"sbatch: error: QOSMaxWallDurationPerJobLimit\nsbatch: error: {POLICY}", False),
        (f"sbatch: error: {POLICY}", True),
        ("sbatch: error: Batch job submission failed: Socket timed out on send/recv", True),
        ("slurm_load_jobs error: Unable to contact slurm controller (connect failure)", True),
        ("sbatch: error: Batch job submission failed: Invalid account or account/…", False),
        ("sbatch: error: Batch job submission failed: Invalid job array specification", False),
        (f"{FAILED}Unable to create job record, try again", True),
        (f"{FAILED}Zero Bytes were transmitted or received", True),
        (f"{FAILED}Message receive failure", True),
        (f"{FAILED}Slurm backup controller in standby mode", True),
        ("sbatch: error: lua: this account's request was refused", False),
    ],
)
def test_what_slurm_refuses_is_asked_later_or_never(complaint: str, is_later: bool) -> None:
    error = slurm._refusal(complaint, "sbatch")
    assert isinstance(error, slurm.NotNowError) == is_later
    assert str(error).startswith("sbatch says: ")
    assert "error: QOS" not in str(error)


def test_limits_of_time_are_read_as_slurm_reads_them() -> None:
    limits = {"2": 120, "1:30": 90, "0:01:59": 119, "1-0": 86400, "1-2:03": 93780, "0": math.inf}
    for text, seconds in (limits | {"UNLIMITED": math.inf, "soon": math.inf}).items():
        assert slurm.seconds_of(text) == seconds, text


@pytest.mark.parametrize(
    ("code", "restarts", "has_saved", "again"),
    [(75, 0, False, True), (75, 3, False, False), (75, 99, True, True), (143, 2, False, True),
     (1, 0, True, False), (0, 0, True, False)],
)  # fmt: skip
def test_a_job_that_gets_nowhere_is_not_queued_again_for_ever(
    code: int, restarts: int, has_saved: bool, again: bool, tmp_path: Path
) -> None:
    (tmp_path / "scontrol").write_text('#!/bin/sh\necho "$@"')
    (tmp_path / "scontrol").chmod(0o755)
    mark, model = tmp_path / "job_2.run", tmp_path / "run" / "model.h5"
    model.parent.mkdir()
    model.write_text("")
    mark.write_text(f"{model.parent}\n")
    os.utime(model, (1, 1)) if not has_saved else os.utime(mark, (1, 1))
    script = f"place={tmp_path}/job\n(exit {code})\n{slurm.QUEUE_AGAIN}"
    env = {"SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_JOB_ID": "7"}
    env |= {"SLURM_RESTART_COUNT": str(restarts), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", script], env=env, capture_output=True, check=False)
    assert done.stdout.decode() == ("requeue 7_2\n" if again else "")
    assert done.returncode == (0 if again else code)
    assert again or (tmp_path / "job_2.code").read_text() == f"{code}\n"


@pytest.mark.parametrize(
    ("command", "said", "expected"),
    [
        ("scontrol", "JobId=2 JobState=OUT_OF_MEMORY ExitCode=0:125 Run", ("OUT_OF_MEMORY", 0)),
        ("scontrol", "JobId=2 JobState=FAILED Reason=x ExitCode=3:0 Run", ("FAILED", 3)),
        ("sacct", "NODE_FAIL|1:0\n", ("NODE_FAIL", 1)),
        ("sacct", "CANCELLED by 0|0:15\n", ("CANCELLED", 0)),
        ("none", "", ("", 0)),
    ],
)
def test_slurm_is_asked_how_a_job_ended(
    command: str, said: str, expected: tuple[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(program: str, *words: str) -> str:
        if program == command:
            return said
        raise UsageError("it has forgotten the job, or is not there")

    monkeypatch.setattr(slurm, "ask", ask)
    assert slurm.ending_of("7_2") == expected
