"""Trials that Optuna chooses and ends: each once, whatever was killed and in whatever order."""

import json
import math
import os
import random
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fault_lab import WHOLE, only_whole
from machinery import ROOT, Command
from sweeping import kill, killed_whenever_seen, pid_in, start, swept_under_fire, wait_for

from engine.runs.results import PRUNED
from engine.sweeps import Launcher, sweep
from engine.sweeps import definition as sweep_trials
from engine.sweeps.local import KILLED

optuna = pytest.importorskip("optuna")
search = pytest.importorskip("engine.sweeps.search")


def definition(**changes: Any) -> sweep_trials.Definition:
    config = {"seed": 3, "lr": 0.1, "kind": "a", "monitor": "val_loss", "num_epochs": 9}
    asked: dict[str, Any] = {"grid": {"kind": ["a", [1, 2]]}, "range": {"lr": "1e-4..1 log"}}
    asked |= {"random": 0, "seeds": 0, "search": "optuna", "trials": 20}
    return sweep_trials.Definition("root", config, [], **(asked | changes))


def loss_of(settings: sweep_trials.Settings, epoch: int) -> float:
    """Return a loss that is least at lr = 0.01, kind = a, and falls from epoch to epoch."""
    away = abs(math.log10(settings["lr"]) + 2)
    return away + (settings["kind"] != "a") + 1 / (epoch + 1) + settings.get("seed", 3) / 100


def end(
    folder: Path,
    trial: sweep_trials.Trial,
    told: sweep_trials.Definition,
    status: str = "finished",
    **losses: Any,
) -> None:
    """Leave in a trial's folder what a run leaves there that has ended."""
    place = folder / trial.name
    place.mkdir(exist_ok=True)
    (place / "config.json").write_text(json.dumps({**told.config, **trial.settings}))
    (place / "meta.json").write_text(json.dumps({"status": status}))
    every = [0.5] * 9 if losses else [loss_of(trial.settings, epoch) for epoch in range(9)]
    rows = [f"{epoch},{epoch},{loss!r}\n" for epoch, loss in enumerate(every)]
    (place / "history.csv").write_text("epoch,step,val_loss\n" + "".join(rows))


def test_a_curve_that_is_not_finite_everywhere_ends_no_search(tmp_path: Path) -> None:
    told = definition(pruner="median", range={}, grid={"lr": [0.1, 0.2, 0.3]}, trials=3)
    supply = open_search(tmp_path / "sweep", told)
    every = (["nan", "nan"], ["nan", "0.5"], ["0.4", "inf"])
    for trial, losses in zip(supply.advance(()), every, strict=True):
        end(tmp_path / "sweep", trial, told, losses={})
        rows = [f"{epoch},{epoch},{loss}\n" for epoch, loss in enumerate(losses)]
        (tmp_path / "sweep" / trial.name / "history.csv").write_text(
            "epoch,step,val_loss\n" + "".join(rows)
        )
    outcomes = [supply._outcome(settings, ()) for settings in supply.suggested]
    assert [(one.state.name, one.value) for one in outcomes] == [
        ("FAIL", None),
        ("COMPLETE", 0.5),
        ("COMPLETE", 0.4),
    ]
    own = supply.trials[1].name
    assert search.is_poor(tmp_path / "sweep", told, supply.trials, own, [(1, 0.1)]) is False
    assert len(supply.advance(())) == 3


def open_search(folder: Path, told: sweep_trials.Definition, room: int = 3) -> Any:
    """Open what a sweeper opens that begins, or that goes on after one that was killed."""
    folder.mkdir(exist_ok=True)
    if not (folder / sweep.SWEEP).exists():
        sweep.write(folder, told, [])
    return search.Search(folder, told, lambda: room)


def swept(
    folder: Path, told: sweep_trials.Definition, chance: random.Random, failing: Iterable[int] = ()
) -> Any:
    """Let a search's trials end in any order, and its sweeper be killed; return the last one."""
    supply = open_search(folder, told)
    while True:
        chosen = [*supply.suggested]
        every = supply.advance(())
        assert supply.suggested[: len(chosen)] == chosen, "what was chosen is never chosen again"
        assert sweep.read(folder)[2] == supply.suggested, "and stands there before a trial begins"
        left = [trial for trial in every if not (folder / trial.name).exists()]
        if not left:
            return supply
        trial = chance.choice(left)
        has_failed = [t.name for t in every].index(trial.name) in failing
        end(folder, trial, told, "failed" if has_failed else "finished")
        if chance.random() < 0.3:
            supply = open_search(folder, told, room=chance.randint(1, 8))


def states(supply: Any) -> list[Any]:
    return [supply._outcome(settings, ()).state for settings in supply.suggested]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_in_any_order_and_with_kills_as_many_are_chosen_as_are_asked_for(
    seed: int, tmp_path: Path
) -> None:
    told = definition()
    supply = swept(tmp_path / "first", told, random.Random(seed))
    identities = {sweep_trials.identity(told, one) for one in supply.suggested}
    assert len(identities) == len(supply.suggested) == len(supply.trials) == 20
    assert states(supply) == [optuna.trial.TrialState.COMPLETE] * 20


def test_it_learns_from_trials_that_have_ended(tmp_path: Path) -> None:
    suggested = swept(tmp_path / "sweep", definition(trials=40), random.Random(0)).suggested
    losses = [loss_of(settings, 8) for settings in suggested]
    assert sum(losses[-15:]) < 0.6 * sum(losses[:15])
    assert all(1e-4 <= settings["lr"] <= 1 for settings in suggested)
    assert {json.dumps(settings["kind"]) for settings in suggested} == {'"a"', "[1, 2]"}


def test_more_trials_go_on_from_those_that_are_there(tmp_path: Path) -> None:
    few = swept(tmp_path / "few", definition(trials=6), random.Random(0)).suggested
    longer = swept(tmp_path / "few", definition(trials=12), random.Random(0)).suggested
    assert len(longer) == 12 and longer[:6] == few


@pytest.mark.parametrize(
    ("grid", "number"), [({"kind": ["a", "b", "c"]}, 3), ({"kind": [-1, 1], "n": [1, 2]}, 4)]
)
def test_all_combinations_are_chosen_and_then_the_search_ends(
    grid: dict[str, Any], number: int, tmp_path: Path
) -> None:
    told = definition(grid=grid, range={}, trials=12)
    folder = tmp_path / "sweep"
    supply = open_search(folder, told)
    for _ in range(20):
        for trial in supply.advance(()):
            end(folder, trial, told, losses={})
    assert supply.is_exhausted
    assert len(supply.suggested) == len({trial.name for trial in supply.trials}) == number


def test_a_range_of_few_whole_numbers_is_used_up(tmp_path: Path) -> None:
    told = definition(grid={}, range={"n": "-2..3"}, trials=9)
    supply = open_search(tmp_path / "sweep", told, room=9)
    supply.advance(())
    assert sorted(settings["n"] for settings in supply.suggested) == [-2, -1, 0, 1, 2, 3]
    assert {trial.name for trial in supply.trials} >= {"n=-2", "n=2"}


def test_what_a_setting_is_worth_is_the_mean_over_its_seeds(tmp_path: Path) -> None:
    told = definition(seeds=3, trials=4)
    supply = swept(tmp_path / "sweep", told, random.Random(0))
    assert len(list((tmp_path / "sweep").glob("*/meta.json"))) == 12
    for settings in supply.suggested:
        every = [loss_of({**settings, "seed": seed}, 8) for seed in (3, 4, 5)]
        assert supply._outcome(settings, ()).value == pytest.approx(sum(every) / 3)


def test_a_trial_that_fails_or_is_given_up_is_known_as_such(tmp_path: Path) -> None:
    supply = swept(tmp_path / "sweep", definition(), random.Random(0), failing=(2, 7))
    told = states(supply)
    assert len(told) == 20
    failed = [number for number, state in enumerate(told) if state.name == "FAIL"]
    assert failed == [2, 7]
    given_up = [supply.trials[5].name]
    assert supply._outcome(supply.suggested[5], given_up).state.name == "FAIL"


@pytest.mark.parametrize("pruner", ["median", "halving", "hyperband"])
def test_a_pruner_ends_what_is_poor_and_not_what_is_good(pruner: str, tmp_path: Path) -> None:
    told = definition(pruner=pruner, grid={"lr": [0.01, 0.02, 0.005, 0.03, 0.04, 0.9]}, range={})
    folder = tmp_path / "sweep"
    folder.mkdir()
    trials = [sweep_trials.Trial(f"lr={lr}", {"lr": lr, "kind": "a"}) for lr in told.grid["lr"]]
    for trial in trials[:5]:
        end(folder, trial, told)

    def is_poor(trial: sweep_trials.Trial, epochs: int) -> bool:
        curve = [(epoch + 1, loss_of(trial.settings, epoch)) for epoch in range(epochs)]
        return bool(search.is_poor(folder, told, trials, trial.name, curve))

    assert any(is_poor(trials[5], epochs) for epochs in range(1, 9))
    assert not any(is_poor(trials[0], epochs) for epochs in range(1, 9))


# ------------------------------------------------------------------------------ the whole of it

WORDS = ("--num_epochs=4", "--range", "lr=1e-4..1 log", "--search=optuna", "--trials=7")
WITH_PRUNER = (*WORDS, "--pruner=halving", "--jobs=2")


def test_the_last_line_counts_what_can_be_done(command: Command, tmp_path: Path) -> None:
    words = ("iterator_numpy", tmp_path / "sweep", "--num_epochs=1")
    search_of_two = ("--search=optuna", "--grid", "batch_size=256,512")
    all_chosen = "sweep.py: all 2 combinations were chosen, fewer than --trials"
    for number, chosen in ((4, [all_chosen]), (1, [])):
        done = command("bin/sweep.py", *words, *search_of_two, f"--trials={number}")
        assert done.returncode == 0, done.stderr
        assert done.stderr.splitlines() == chosen
        assert done.stdout.splitlines()[2:] == ["2 of 2 trials are finished"]


@pytest.mark.slow
def test_a_search_that_is_killed_goes_on(command: Command, tmp_path: Path) -> None:
    folder, moved = tmp_path / "sweep", tmp_path / "moved"
    words = ("bin/sweep.py", "iterator_numpy", folder, *WITH_PRUNER)
    first = start(ROOT, *words)
    wait_for(lambda: len(list(folder.glob("*/model.h5"))) >= 3)
    first.kill()
    kill(*map(pid_in, folder.glob("*=*")))
    first.communicate()
    chosen = sweep.read(folder)[2]
    folder.rename(moved)  # nothing in it knows where it lies
    done = command("bin/sweep.py", "iterator_numpy", moved, *WITH_PRUNER)
    assert done.returncode == 0, done.stderr
    assert "7 trials: 7 finished (" in done.stdout
    assert done.stdout.endswith("7 of 7 trials are finished\n")
    assert sweep.read(moved)[2][: len(chosen)] == chosen
    assert str(folder) not in "".join(p.read_text() for p in moved.glob("*/config.json"))
    # A trial that was ended early ends there, too, when it is made again.
    early = min(moved.glob("*/history.csv"), key=lambda path: len(path.read_text())).parent
    epochs = json.loads((early / "pruned.json").read_text())["epoch"]
    assert len((early / "history.csv").read_text().splitlines()) == epochs + 1 < 5
    again = command("bin/reproduce.py", early)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "identical bit for bit: history.csv" in again.stdout
    assert "model.h5" in again.stdout


@pytest.mark.slow
def test_a_setting_that_always_dies_is_given_up(command: Command, tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    words = ("--grid", "n_filters=2,3", "--num_epochs=1", "--n_layers=1", "--search=optuna",
             "--trials=5", "--no_tensorboard", "--threads=1", "--lr_schedule=null")  # fmt: skip
    (tmp_path / "dies.py").write_text(
        "import os, signal\nfrom engine.hooks import Hook\nclass Dies(Hook):\n"
        "    def after_epoch(self, epoch):\n        import json\n"
        "        if '=3' in str(self.run.root): os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    paths = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    hooks = '--hooks=[{"class": "dies.Dies"}]'
    done = command(
        "bin/sweep.py", "digits", folder, *words, hooks, env={**os.environ, "PYTHONPATH": paths}
    )
    assert done.returncode == 1, done.stderr
    assert "n_filters=3 failed: it died by SIGKILL" in done.stderr
    assert "all 2 combinations were chosen, fewer than --trials" in done.stderr
    assert done.stdout.endswith("1 of 2 trials are finished\n")
    assert len(json.loads((folder / "n_filters=3" / "meta.json").read_text())["attempts"]) == 3
    for look in (("bin/sweep.py", "status", folder), ("bin/runs.py", "list", folder)):
        lines = [x for x in command(*look).stdout.splitlines() if "n_filters=3 " in x]
        assert lines[0].split()[1] == "failed"


@only_whole  # what dies each time is killed from outside, which a busy machine may miss
@pytest.mark.slow
def test_a_search_under_fire_chooses_none_twice_and_each_is_made_again_to_the_bit(
    command: Command, tmp_path: Path
) -> None:
    """With TEMPLATE_FAULT_TESTS_WHOLE=1, thirty settings and twenty kills; else a few."""
    number, kills, made_again = (30, 20, 29) if WHOLE else (6, 4, 2)
    folder, doomed = tmp_path / "sweep", "lr=0.3"
    rates = ["0.3", *(f"{0.001 * 1.2**i:.4g}" for i in range(number - 1))]
    words = (
        *("--num_epochs=30", "--grid", f"lr={','.join(rates)}", "--search=optuna"),
        *(f"--trials={number}", "--pruner=halving", "--jobs=2"),
    )
    every = ("bin/sweep.py", "iterator_numpy", folder, *words)
    began = time.monotonic()
    with killed_whenever_seen(folder / doomed):
        killed, said = swept_under_fire(ROOT, every, folder, kills, random.Random(1))
    assert killed.total() == kills, said
    print(f"{dict(killed)} in {time.monotonic() - began:.0f} s: {said}")
    assert f"{number - 1} of {number} trials are finished" in said
    assert f"{folder / doomed} failed: it died by SIGKILL" in said
    told, trials, chosen = sweep.read(folder)
    identities = {sweep_trials.identity(told, one) for one in chosen}
    assert len(identities) == len(chosen) == len(trials) == number
    whole = [folder / trial.name for trial in trials if trial.name != doomed]
    early = [path for path in whole if (path / "pruned.json").exists()]
    assert early
    for run in sorted(whole, key=lambda path: path not in early)[:made_again]:
        again = command("bin/reproduce.py", run)
        assert again.returncode == 0, again.stdout + again.stderr
        assert "identical bit for bit: history.csv" in again.stdout


class Simulated(Launcher):
    """Runs nothing: its trials take a time by a clock of its own, and leave what runs leave. Half
    of them are pruned early, a tenth is killed on its way, and the first one at each attempt.
    """

    def __init__(self, folder: Path, told: sweep_trials.Definition) -> None:
        super().__init__(folder / ".output", lambda: False)
        self.folder, self.told, self.now, self.work = folder, told, 0.0, 0.0
        self.chance = random.Random(0)
        self.ends: dict[str, float] = {}
        self.killed: set[str] = set()
        self.pruned: set[str] = set()

    def room(self) -> int:
        return 8

    def begin(self, name: str, words: Sequence[str]) -> str:
        is_first = name in (*self.ends, name)[:1]
        (self.killed.add if is_first or self.chance.random() < 0.1 else self.killed.discard)(name)
        (self.pruned.add if self.chance.random() < 0.5 else self.pruned.discard)(name)
        seconds = self.chance.uniform(1, 5) * (0.3 if name in self.pruned else 1)
        self.work += seconds
        self.ends[name] = self.now + seconds
        return name

    def ended(self, running: list[str]) -> list[str]:
        first = min(running, key=self.ends.__getitem__)
        self.now = self.ends[first]
        return [first]

    def code_of(self, one: str, name: str) -> int:
        if name in self.killed:
            return KILLED
        settings = dict(part.split("=") for part in name.split(","))
        trial = sweep_trials.Trial(name, {"lr": float(settings["lr"]), "kind": settings["kind"]})
        end(self.folder, trial, self.told)
        if name in self.pruned:
            (self.folder / name / PRUNED).write_text('{"epoch": 2}')
        return 0


@pytest.mark.slow
def test_workers_are_as_busy_as_in_a_search_that_does_not_wait(tmp_path: Path) -> None:
    told = definition(grid={"kind": ["a", "b"]}, trials=60, pruner="halving")
    busy = []
    for name in ("search", "unordered"):
        folder = tmp_path / name
        launcher, chooser = Simulated(folder, told), open_search(folder, told, room=8)
        if name == "unordered":
            chooser.room = lambda: 60  # none waits for what another has learned
        sweeper = sweep.Sweeper(folder, chooser.advance, lambda trial: [], launcher)
        records = sweeper.run(retry_failed=False, show=lambda *numbers: None)
        assert len(records) == 60
        assert [record.state for record in records].count("finished") == 59
        assert launcher.pruned and len(launcher.killed) == 1, "the one that always dies"
        busy.append(launcher.work / (8 * launcher.now))
    print(f"busy: {busy[0]:.3f}, unordered {busy[1]:.3f}")
    assert busy[0] >= 0.95 * busy[1]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--search=optun", "--trials=3"), "did you mean 'optuna'?"),
        (("--search=optuna",), "--search and --trials belong together"),
        (("--trials=3",), "--search and --trials belong together"),
        (("--search=optuna", "--trials=3"), "--search needs something to choose from"),
        (("--trials=-1",), "trials is -1"),
        (("--seeds=2", "--pruner=medain"), "did you mean 'median'?"),
        (("--seeds=2", "--pruner=median", "--range", "lr=1e-4..1"), "--range needs --random"),
        ((*WORDS, "--seeds=2", "--pruner=median"), "--pruner compares single runs"),
        ((*WORDS, "--monitor=null"), "the config does not say which trial is best"),
        ((*WORDS, "--random=2"), "leave --random out"),
        (("--search=optuna", "--trials=2", "--range", "batch_size=0..4"), "batch_size is 0"),
    ],
)
def test_a_mistake_is_one_sentence_and_touches_nothing(
    words: tuple[str, ...], said: str, command: Command, tmp_path: Path
) -> None:
    done = command("bin/sweep.py", "iterator_numpy", tmp_path / "sweep", *words)
    assert done.returncode == 2
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_search_keeps_to_what_it_chooses_from(tmp_path: Path) -> None:
    told = definition(trials=3)
    swept(tmp_path / "sweep", told, random.Random(0))
    other = definition(trials=3, range={"lr": "1e-3..1 log"})
    with pytest.raises(sweep.UsageError, match=r"another config \(--range.lr: "):
        sweep.taken_up(tmp_path / "sweep", other)
    assert sweep.taken_up(tmp_path / "sweep", definition(trials=9))[1]
    # A key that is younger than the sweep has its default.
    younger = replace(told, config={**told.config, "new_key": 0})
    with pytest.raises(sweep.UsageError, match="new_key: "):
        sweep.taken_up(tmp_path / "sweep", younger)
    assert sweep.taken_up(tmp_path / "sweep", younger, lambda old: {"new_key": 0, **old})[1]
