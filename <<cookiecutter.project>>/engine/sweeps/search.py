"""Trials that depend on earlier ones: Optuna chooses their settings, and ends the poor ones.

Trial n is chosen and judged by what is known of the trials before it but for the last
`num_parallel`, whatever else has ended by then. So a sweep that was killed and went on has the
trials of one that ran through, and each of these is bit for bit the same.
"""

import contextlib
import os
import random
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna import distributions
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState, create_trial

from engine.checkpoints import shortest
from engine.runs import results
from engine.sweeps import definition as sweep_trials
from engine.sweeps import sweep
from engine.sweeps.definition import Definition, Settings, Trial
from vegab.config import lookup, read_yaml, show

Known = Sequence[FrozenTrial]
JOURNAL = "optuna.log"
STUDY = "sweep"
Curve = list[tuple[int, float]]  # epochs done, and what is monitored


class Search:
    """The trials of a sweep of which Optuna knows; its folder is locked for this process.
    `suggested` are the settings that were chosen, in order; without a search, those of all trials.
    """

    def __init__(self, folder: Path, definition: Definition) -> None:
        self.folder = folder
        self.definition = definition
        self.suggested = sweep.read(folder)[2]
        self._journal = open_journal(folder / JOURNAL, definition, writes=True)

    def advance(self, given_up: Collection[str]) -> tuple[list[Trial], list[Trial]]:
        """Tell Optuna what has ended, and choose what is to follow; see `sweep.Sweeper.advance`."""
        known = self.known()
        while len(known) < len(self.suggested) and (ended := self._outcome(known, given_up)):
            self._journal.add_trial(ended)
            known = self.known()
        ready = len(known) + self.definition.num_parallel
        before = len(self.suggested)
        while self.definition.search and len(self.suggested) < min(self.definition.trials, ready):
            self.suggested.append(suggest(self.definition, known, self.suggested))
        trials = self.trials(len(self.suggested))
        if len(self.suggested) > before:
            sweep.write(self.folder, self.definition, trials, self.suggested)
        return trials, self.trials(ready)

    def known(self) -> list[FrozenTrial]:
        """Return the trials that Optuna was told of, in order."""
        return self._journal.get_trials(deepcopy=False)

    def trials(self, number: int) -> list[Trial]:
        """Return the run folders of the first `number` settings, each once."""
        every = (sweep_trials.repeated(self.definition, one) for one in self.suggested[:number])
        return list({trial.name: trial for trials in every for trial in trials}.values())

    def _outcome(self, known: Known, given_up: Collection[str]) -> FrozenTrial | None:
        """Return how the first trial ended that Optuna does not know yet, or None if it has not."""
        settings = self.suggested[len(known)]
        trials = sweep_trials.repeated(self.definition, settings)
        what = _what_it_is(self.definition, settings)
        failed = create_trial(state=TrialState.FAIL, **what)
        records = sweep.states_of(self.folder, trials)
        states = {record.state for record in records}
        if states & {"failed", "broken"} or any(trial.name in given_up for trial in trials):
            return failed
        if states != {"finished"}:
            return None
        histories = [results.read_history(record.path) for record in records]
        curves = [curve_in(history, self.definition) for history in histories]
        if not all(curves):
            return failed
        if len(curves) == 1:
            before = self.suggested[: len(known)]
            judged, is_poor = judge(self.definition, known, before, curves[0])
            what["intermediate_values"] = judged.intermediate_values
            what["system_attrs"] = judged.system_attrs
            if is_poor:
                return create_trial(state=TrialState.PRUNED, value=curves[0][-1][1], **what)
        best = min if self.definition.lower_is_better else max
        values = [best(value for _, value in curve) for curve in curves]
        mean = sum(values) / len(values)
        return create_trial(state=TrialState.COMPLETE, value=mean, **what)


def suggest(definition: Definition, known: Known, before: Sequence[Settings]) -> Settings:
    """Return the settings of the next trial, by the tree-structured Parzen estimator; see `judge`.

    Bergstra et al., Algorithms for Hyper-Parameter Optimization, NeurIPS 2011; as Optuna has it.
    """
    seed = random.Random(f"{definition.config['seed']} {len(before)}").getrandbits(32)
    # Trials that still run count as poor ones, so that no two of them are nearly the same.
    sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=True)
    study = _study_before(definition, known, before, sampler)
    chosen = study.ask(_distributions(definition)).params
    return {key: _rounded(definition, key, value) for key, value in chosen.items()}


def judge(
    definition: Definition, known: Known, before: Sequence[Settings], curve: Curve
) -> tuple[FrozenTrial, bool]:
    """Look at a trial as Optuna's pruner does after each epoch, up to where it would end it.

    The `known` trials have ended, and the settings `before` are those of the trials before this
    one. The curve is epochs done, and what is monitored. Return the trial with what the pruner has
    noted in it, and whether it is poor.
    """
    study = _study_before(definition, known, before, optuna.samplers.RandomSampler(0))
    trial = study.ask()
    is_poor = False
    for epoch, value in curve:
        trial.report(value, epoch)
        if is_poor := trial.should_prune():
            break
    return study.get_trials(deepcopy=False)[-1], is_poor


def _study_before(
    definition: Definition, known: Known, before: Sequence[Settings], sampler: Any
) -> optuna.Study:
    """Return a study in memory that holds what is known when the next trial begins."""
    study = _new_study(definition, sampler=sampler, pruner=_pruner(definition))
    num_known = max(0, len(before) - definition.num_parallel + 1)
    for trial in known[:num_known]:
        study.add_trial(trial)
    for settings in before[num_known:]:
        what = _what_it_is(definition, settings)
        study.add_trial(create_trial(state=TrialState.RUNNING, **what))
    return study


def _new_study(definition: Definition, **arguments: Any) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    direction = optuna.study.StudyDirection(1 if definition.lower_is_better else 2)
    return optuna.create_study(study_name=STUDY, direction=direction, **arguments)


def _pruner(definition: Definition) -> Any:
    if definition.pruner == "median":
        return optuna.pruners.MedianPruner()
    if definition.pruner == "halving":
        return optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=3)
    if definition.pruner == "hyperband":
        return optuna.pruners.HyperbandPruner(min_resource=1, max_resource=definition.num_epochs)
    return optuna.pruners.NopPruner()


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
        return min(max(sweep_trials.shortened(value), float(low)), float(high))
    return value


def _what_it_is(definition: Definition, settings: Settings) -> dict[str, Any]:
    """Return a trial's settings in Optuna's terms: chosen by it, or only noted."""
    if not definition.search:
        return {"user_attrs": {"settings": dict(settings)}}
    params = {k: show(v) if k in definition.grid else v for k, v in settings.items()}
    return {"params": params, "distributions": _distributions(definition)}


def curve_in(history: Sequence[Mapping[str, Any]], definition: Definition) -> Curve:
    """Return epochs done and what is monitored, for each row of a history that has it."""
    key = str(definition.monitor)
    # As history.csv has it, so that a trial that is going on is judged as it will stand there.
    return [(int(row["epoch"]) + 1, float(shortest(row[key]))) for row in history if key in row]


def number_of(suggested: Sequence[Settings], config: dict[str, Any]) -> int | None:
    """Return which trial a config is that of, or None."""
    for number, settings in enumerate(suggested):
        with contextlib.suppress(KeyError):
            if all(lookup(config, key) == value for key, value in settings.items()):
                return number
    return None


def open_journal(path: Path, definition: Definition, writes: bool) -> optuna.Study:
    """Open Optuna's journal; one process may write to it, which holds the sweep's lock."""
    if writes and path.exists():
        Path(f"{path}.lock").unlink(missing_ok=True)  # left by a process that was killed
        content = path.read_bytes()
        os.truncate(path, content.rfind(b"\n") + 1)  # and so is half a line
    storage = JournalStorage(JournalFileBackend(str(path)))
    return _new_study(definition, storage=storage, load_if_exists=True)
