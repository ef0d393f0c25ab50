"""Trials that Optuna chooses and ends: the same ones, whatever was killed and in whatever order."""

import json
import math
import os
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from machinery import ROOT, Command
from sweeping import EXACT, exact_files, kill, pid_in, start, wait_for

from engine.sweeps import definition as sweep_trials
from engine.sweeps import sweep

optuna = pytest.importorskip("optuna")
search = pytest.importorskip("engine.sweeps.search")


def definition(**changes: Any) -> sweep_trials.Definition:
    config = {"seed": 3, "lr": 0.1, "kind": "a", "monitor": "val_loss", "num_epochs": 9}
    asked: dict[str, Any] = {"grid": {"kind": ["a", [1, 2]]}, "range": {"lr": "1e-4..1 log"}}
    asked |= {"random": 0, "seeds": 0, "search": "optuna", "trials": 20, "num_parallel": 3}
    return sweep_trials.Definition("root", config, [], **(asked | changes))


def loss_of(settings: sweep_trials.Settings, epoch: int) -> float:
    """Return a loss that is least at lr = 0.01, kind = a, and falls from epoch to epoch."""
    away = abs(math.log10(settings["lr"]) + 2)
    return away + (settings["kind"] != "a") + 1 / (epoch + 1) + settings.get("seed", 3) / 100


def end(
    folder: Path, trial: sweep_trials.Trial, told: sweep_trials.Definition, status: str = "finished"
) -> None:
    """Leave in a trial's folder what a run leaves there that has ended."""
    place = folder / trial.name
    place.mkdir(exist_ok=True)
    (place / "config.json").write_text(json.dumps({**told.config, **trial.settings}))
    (place / "meta.json").write_text(json.dumps({"status": status}))
    rows = [f"{epoch},{epoch},{loss_of(trial.settings, epoch)!r}\n" for epoch in range(9)]
    (place / "history.csv").write_text("epoch,step,val_loss\n" + "".join(rows))


def open_search(folder: Path, told: sweep_trials.Definition) -> Any:
    """Open what a sweeper opens that begins, or that goes on after one that was killed."""
    folder.mkdir(exist_ok=True)
    if not (folder / sweep.SWEEP).exists():
        sweep.write(folder, told, [])
    return search.Search(folder, told)


def swept(
    folder: Path, told: sweep_trials.Definition, chance: random.Random, failing: Iterable[int] = ()
) -> tuple[list[Any], list[Any]]:
    """Let a search's trials end in any order, and its sweeper be killed; return what it made."""
    supply = open_search(folder, told)
    while True:
        every, ready = supply.advance(())
        left = [trial for trial in ready if not (folder / trial.name).exists()]
        if not left:
            known = [
                (trial.number, trial.state, trial.values, trial.params, trial.system_attrs)
                for trial in supply.known()
            ]
            return supply.suggested, known
        trial = chance.choice(left)
        has_failed = [t.name for t in every].index(trial.name) in failing
        end(folder, trial, told, "failed" if has_failed else "finished")
        if chance.random() < 0.3:
            supply = open_search(folder, told)


@pytest.mark.parametrize("pruner", ["", "median", "halving", "hyperband"])
def test_neither_order_nor_kills_change_what_is_chosen_and_told(
    pruner: str, tmp_path: Path
) -> None:
    told = definition(pruner=pruner)
    first = swept(tmp_path / "first", told, random.Random(0))
    assert len(first[0]) == 20
    assert len(first[1]) == 20
    for seed in (1, 2):
        assert swept(tmp_path / str(seed), told, random.Random(seed)) == first
    pruned = [trial for trial in first[1] if trial[1] == optuna.trial.TrialState.PRUNED]
    assert bool(pruned) == bool(pruner)


def test_it_learns_from_trials_that_have_ended(tmp_path: Path) -> None:
    told = definition(trials=40, num_parallel=1)
    suggested, _ = swept(tmp_path / "sweep", told, random.Random(0))
    losses = [loss_of(settings, 8) for settings in suggested]
    assert sum(losses[-15:]) < 0.6 * sum(losses[:15])
    assert all(1e-4 <= settings["lr"] <= 1 for settings in suggested)
    assert {json.dumps(settings["kind"]) for settings in suggested} == {'"a"', "[1, 2]"}


def test_more_trials_go_on_from_those_that_are_there(tmp_path: Path) -> None:
    few, _ = swept(tmp_path / "few", definition(trials=6), random.Random(0))
    longer, _ = swept(tmp_path / "few", definition(trials=12), random.Random(0))
    many, _ = swept(tmp_path / "many", definition(trials=12), random.Random(5))
    assert longer[:6] == few
    assert longer == many


def test_what_a_setting_is_worth_is_the_mean_over_its_seeds(tmp_path: Path) -> None:
    told = definition(seeds=3, trials=4)
    suggested, known = swept(tmp_path / "sweep", told, random.Random(0))
    assert len(list((tmp_path / "sweep").glob("*/meta.json"))) == 12
    for settings, (_, _, values, _, _) in zip(suggested, known, strict=True):
        every = [loss_of({**settings, "seed": seed}, 8) for seed in (3, 4, 5)]
        assert values == pytest.approx([sum(every) / 3])


def test_a_trial_that_fails_is_known_as_such_and_the_search_goes_on(tmp_path: Path) -> None:
    _, known = swept(tmp_path / "sweep", definition(), random.Random(0), failing=(2, 7))
    failed = [number for number, state, *_ in known if state == optuna.trial.TrialState.FAIL]
    assert failed == [2, 7]
    assert len(known) == 20


def test_half_a_line_and_a_lock_in_the_journal_are_no_harm(tmp_path: Path) -> None:
    told = definition(trials=6)
    first, _ = swept(tmp_path / "first", told, random.Random(0))
    folder = tmp_path / "torn"
    swept(folder, definition(trials=3), random.Random(0))
    with open(folder / search.JOURNAL, "a") as journal:
        journal.write('{"op_code": 4, "worker')
    os.symlink("nowhere", folder / f"{search.JOURNAL}.lock")
    assert swept(folder, told, random.Random(0))[0] == first


# ------------------------------------------------------------------------------ the whole of it

WORDS = ("--num_epochs=4", "--range", "lr=1e-4..1 log", "--search=optuna", "--trials=7")
PRUNED = (*WORDS, "--pruner=halving", "--jobs=2")


@pytest.mark.slow
def test_a_search_that_is_killed_ends_as_one_that_is_not(command: Command, tmp_path: Path) -> None:
    # The folder's name is part of the trials' config.
    killed, straight = tmp_path / "sweep", tmp_path / "straight"
    words = ("bin/sweep.py", "iterator_numpy", killed, *PRUNED)
    done = command(*words)
    assert done.returncode == 0, done.stderr
    assert "7 trials: 7 finished (" in done.stdout
    killed.rename(straight)
    first = start(ROOT, *words)
    wait_for(lambda: len(list(killed.glob("*/model.h5"))) >= 3)
    first.kill()
    kill(*map(pid_in, killed.iterdir()))
    first.communicate()
    again = command(*words)
    assert again.returncode == 0, again.stderr
    assert exact_files(killed, "config.json") == exact_files(straight, "config.json")
    # A trial that was ended early ends there, too, when it is repeated by hand.
    early = min(killed.glob("*/history.csv"), key=lambda path: len(path.read_text()))
    assert len(early.read_text().splitlines()) < 5
    repeated = command("bin/train.py", early.parent / "config.json", tmp_path / "again")
    assert repeated.returncode == 0, repeated.stderr
    for name in EXACT:
        assert (tmp_path / "again" / name).read_bytes() == (early.parent / name).read_bytes()


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
        ((*WORDS, "--grid", "model=a/b,a?b"), "would both be called model=a-b"),
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
