"""Chooses the settings of trials by the results of earlier ones, and says which are poor.

Optuna does both. What it has chosen stands in `sweep.json` before a trial begins, and is never
chosen again: it may depend on what has ended by then. Its study is made of what the trials'
folders say, whenever something is asked of it."""

import math
import random
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import optuna
from optuna import distributions
from optuna.trial import FrozenTrial, TrialState, create_trial

from engine.runs import results
from engine.sweeps import definition as sweep_trials
from engine.sweeps import sweep
from engine.sweeps.definition import Definition, Settings, Trial, Trials
from vegab.config import read_yaml, show
from vegab.execution import say
from vegab.files import META, read_json

MOST_ASKED = 50  # times that a sampler may choose what was chosen before
Curve = list[tuple[int, float]]  # epochs done, and what is monitored


class Search:
    """What a search has chosen, and will. `room` returns how many of its settings may be tried at a
    time; the sweep's folder is locked for this process."""

    def __init__(self, folder: Path, definition: Definition, room: Callable[[], int]) -> None:
        self.folder, self.definition, self.room = folder, definition, room
        _, self.trials, self.suggested = sweep.read(folder)
        self.is_exhausted = False
        self._ended: dict[int, FrozenTrial] = {}  # those that nothing changes any more

    def advance(self, given_up: Collection[str]) -> list[Trial]:
        """Choose what is to follow; see `sweep.Sweeper.advance`."""
        told = []
        for number, settings in enumerate(self.suggested):
            told.append(self._ended.get(number) or self._outcome(settings, given_up))
            if told[-1].state in (TrialState.COMPLETE, TrialState.PRUNED):
                self._ended[number] = told[-1]
        before = len(self.suggested)
        while len(self.suggested) < self.definition.trials and not self.is_exhausted:
            if sum(one.state == TrialState.RUNNING for one in told) >= self.room():
                break
            chosen = suggest(self.definition, told, self.suggested)
            self.is_exhausted = chosen is None
            if chosen is None:
                say(f"all {len(self.suggested)} combinations were chosen, fewer than --trials")
            else:
                self.suggested.append(chosen)
                told.append(_frozen(self.definition, chosen, TrialState.RUNNING))
                new = sweep_trials.repeated(self.definition, chosen, self.trials)
                self.trials += [trial for trial in new if trial not in self.trials]
        if len(self.suggested) > before:
            sweep.write(self.folder, self.definition, self.trials, self.suggested)
        return self.trials

    def _outcome(self, settings: Settings, given_up: Collection[str]) -> FrozenTrial:
        """Return the results of settings so far."""
        trials = sweep_trials.repeated(self.definition, settings, self.trials)
        records = sweep.states_of(self.folder, trials)
        states = {record.state for record in records}
        if "failed" in states or any(trial.name in given_up for trial in trials):
            return _frozen(self.definition, settings, TrialState.FAIL)
        if states != {"finished"}:
            return _frozen(self.definition, settings, TrialState.RUNNING)
        curves = [curve_in(results.read_history(r.path), self.definition) for r in records]
        value = sum(_best(self.definition, curve) for curve in curves) / len(curves)
        if math.isnan(value):
            return _frozen(self.definition, settings, TrialState.FAIL)
        if any(results.pruned_at(Path(record.path)) for record in records):
            return _frozen(self.definition, settings, TrialState.PRUNED, curves[0][-1][1])
        return _frozen(self.definition, settings, TrialState.COMPLETE, value)


def suggest(
    definition: Definition, told: Iterable[FrozenTrial], before: Sequence[Settings]
) -> Settings | None:
    """Return other settings than those before, by the tree-structured Parzen estimator (Bergstra
    et al., Algorithms for Hyper-Parameter Optimization, NeurIPS 2011); None if all were chosen."""
    chosen = {sweep_trials.identity(definition, settings) for settings in before}
    chance = random.Random(f"{definition.config['seed']} {len(before)}")
    # Trials that still run count as poor ones, so that no two of them are nearly the same.
    tree = optuna.samplers.TPESampler(seed=chance.getrandbits(32), constant_liar=True)
    samplers: list[Any] = [tree, optuna.samplers.RandomSampler(chance.getrandbits(32))]
    every = _distributions(definition)
    if not any(isinstance(one, distributions.FloatDistribution) for one in every.values()):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            samplers.append(optuna.samplers.BruteForceSampler(chance.getrandbits(32)))
    study = _new_study(definition)
    for one in told:
        study.add_trial(one)
    for sampler in samplers:
        study.sampler = sampler
        for _ in range(MOST_ASKED):
            params = study.ask(every).params
            settings = {key: _rounded(definition, key, value) for key, value in params.items()}
            if sweep_trials.identity(definition, settings) not in chosen:
                return settings
    return None


def is_poor(folder: Path, definition: Definition, trials: Trials, own: str, curve: Curve) -> bool:
    """Ask Optuna's pruner of the trial named `own` after each epoch, with what the folders of all
    trials say now. The curve is its epochs done, and what is monitored."""
    sampler = optuna.samplers.RandomSampler(0)
    study = _new_study(definition, sampler=sampler, pruner=_pruner(definition))
    asked: Any = None
    for trial in trials:
        one = study.ask()
        if trial.name == own:
            asked = one
            continue
        others: Curve = []
        with suppress(OSError, ValueError):  # it has not begun
            others = curve_in(results.read_history(folder / trial.name), definition)
        for epoch, value in others:
            one.report(value, epoch)
            if definition.pruner != "median":  # these note in a trial how far it has come
                one.should_prune()
        meta = read_json(folder / trial.name / META)
        if others and meta and meta.get("status") == "finished":
            if results.pruned_at(folder / trial.name):
                study.tell(one, state=TrialState.PRUNED)
            else:
                study.tell(one, _best(definition, others))
    poor = False
    for epoch, value in curve:
        asked.report(value, epoch)
        poor = asked.should_prune()
    return poor


def _best(definition: Definition, curve: Curve) -> float:
    """Return the best value of a curve; NaN if there is no other, or none at all."""
    values = (value for _, value in curve if not math.isnan(value))
    return (min if definition.lower_is_better else max)(values, default=math.nan)


def _new_study(definition: Definition, **arguments: Any) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    direction = optuna.study.StudyDirection(1 if definition.lower_is_better else 2)
    return optuna.create_study(study_name="sweep", direction=direction, **arguments)


def _pruner(definition: Definition) -> Any:
    pruners: Any = optuna.pruners
    if definition.pruner == "halving":
        return pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=3)
    return pruners.MedianPruner() if definition.pruner == "median" else pruners.HyperbandPruner()


def _distributions(definition: Definition) -> dict[str, distributions.BaseDistribution]:
    """Return what each key is chosen from; values of a grid stand there as text."""
    found: dict[str, distributions.BaseDistribution] = {}
    for key, text in definition.range.items():
        low, high, is_log = sweep_trials.bounds_of(text, key)
        is_whole = isinstance(low, int) and isinstance(high, int)
        kind = distributions.IntDistribution if is_whole else distributions.FloatDistribution
        found[key] = kind(low, high, log=is_log)
    for key, values in definition.grid.items():
        found[key] = distributions.CategoricalDistribution([show(value) for value in values])
    return found


def _rounded(definition: Definition, key: str, value: Any) -> Any:
    """Return a value of Optuna's as it stands in the config and in the folder's name."""
    if key in definition.grid:
        return read_yaml(value, key)
    if isinstance(value, float):
        low, high, _ = sweep_trials.bounds_of(definition.range[key], key)
        return sweep_trials.shortened(value, low, high)
    return value


def _frozen(
    definition: Definition, settings: Settings, state: TrialState, value: float | None = None
) -> FrozenTrial:
    """Return a trial of these settings in Optuna's terms."""
    params = {k: show(v) if k in definition.grid else v for k, v in settings.items()}
    every = _distributions(definition)
    return create_trial(state=state, value=value, params=params, distributions=every)


def curve_in(history: Sequence[Mapping[str, Any]], definition: Definition) -> Curve:
    """Return epochs done and what is monitored, for each row of a history that has it."""
    from engine.checkpoints import shortest  # with NumPy

    key = str(definition.config.get("monitor"))
    # As history.csv has it, so that a trial that is going on is judged as it will stand there.
    return [(int(row["epoch"]) + 1, float(shortest(row[key]))) for row in history if key in row]
