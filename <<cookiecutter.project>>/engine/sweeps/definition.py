"""Reads what a sweep is asked for, and makes its trials: their settings and their names."""

import hashlib
import itertools
import json
import math
import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from engine.runs import results
from vegab import UsageError
from vegab.config import Schema, checked, did_you_mean, flatten, read_text, read_yaml, show

# What a sweep may be asked for, with the defaults.
PLAN: dict[str, Any] = {"grid": {}, "range": {}, "random": 0, "seeds": 0, "folds": 0}
PLAN |= {"search": "", "trials": 0, "pruner": ""}
PLAN_FILE = PLAN | {"config": "", "overrides": {}}
LONGEST_NAME = 150  # bytes, of a folder; file systems allow 255
RANGE = re.compile(r"(?P<low>\S+?)\s*\.\.\s*(?P<high>\S+?)(?P<log>\s+log)?")
ENGINES, PRUNERS = ("optuna",), ("median", "halving", "hyperband")
DIGITS = 4  # of a number that is drawn: more say nothing, and make long names
KeyOf = Callable[[str], str]
Settings = Mapping[str, Any]  # by dotted key


class Trial(NamedTuple):
    """One run of a sweep."""

    name: str  # of its folder in the sweep's
    settings: Settings  # what sets it apart


Trials = Sequence[Trial]


@dataclass(frozen=True)
class Definition:
    """What a sweep consists of."""

    config_name: str  # CONFIG as it was typed
    config: Mapping[str, Any]  # resolved, what all trials share
    words: Sequence[str]  # the command line of bin/train.py that it stands for, without the folder
    grid: Mapping[str, Sequence[Any]]  # values by dotted key; all combinations are trials
    range: Mapping[str, str]  # "low..high" or "low..high log" by dotted key
    random: int  # trials that are drawn from the ranges, for each combination
    seeds: int  # seeds of each, counted up from the config's
    folds: int = 0  # parts of the data, each validated on once; 0: no cross-validation
    search: str = ""  # "optuna" if that chooses from grid and ranges
    trials: int = 0  # settings that it chooses
    pruner: str = ""  # what ends poor trials early, see `engine.sweeps.search`
    # Returns the config of a trial with these settings; where nobody knows it, they stand for it.
    resolve: Callable[[Settings], dict[str, Any]] = field(default=dict, compare=False)

    @property
    def lower_is_better(self) -> bool:
        """Whether less of what is monitored is better."""
        return results.is_lower_better_in(dict(self.config), str(self.config.get("monitor")))


def read_known(path: Path, defaults: dict[str, Any]) -> dict[str, Any]:
    """Return what a YAML file says that may have keys and types as in `defaults`, and no others."""
    content = read_yaml(read_text(path), str(path)) or {}
    try:
        if not isinstance(content, dict):
            raise UsageError(f"{show(content)} was given, a mapping is expected")
        given = {str(key): value for key, value in content.items() if value is not None}
        return checked(Schema(defaults), defaults, given, is_open=False, is_resolved=True)
    except UsageError as error:
        raise UsageError(f"{path}: {error} (its keys are {', '.join(defaults)})") from None


def words_of_plan(path: str, is_config_typed: bool) -> list[str]:
    """Return the command line that says what a plan does, without its CONFIG if one was typed."""
    plan = read_known(Path(path), PLAN_FILE)
    name = plan.pop("config", "")
    words = [name] if name and not is_config_typed else []
    flags = flatten(plan.pop("overrides", {}))
    for key in ("grid", "range"):
        for setting, value in plan.pop(key, {}).items():
            if key == "grid" and not isinstance(value, list):
                raise UsageError(f"{path}: grid.{setting} is {show(value)}; give a list")
            text = ",".join(map(show, value)) if key == "grid" else value
            words.append(f"--{key}={setting}={text}")
    return [*words, *(f"--{key}={show(value)}" for key, value in (flags | plan).items())]


def require_numbers(least: int, **numbers: int) -> None:
    """Raise a UsageError that names the first number that is too small."""
    for name, number in numbers.items():
        if number < least:
            raise UsageError(f"{name} is {number}; it must be at least {least}")


def require_one_of(choices: Sequence[str], what: str, name: str) -> None:
    """Raise a UsageError unless a name is among the choices."""
    if name not in choices:
        hint = did_you_mean(name, choices)
        raise UsageError(f"{what} is {name!r}; expected one of {', '.join(choices)}{hint}")


def grid_of(texts: Sequence[str], key_of: KeyOf) -> dict[str, list[Any]]:
    """Read `--grid KEY=VALUE,VALUE,…`, values being YAML; `key_of` returns the dotted key."""
    axes = {}
    for key, text in _split(texts, "--grid", "n_filters=8,16,32", key_of).items():
        axes[key] = read_yaml(f"[{text}]", f"--grid {key}={text}")
        if len(set(map(show, axes[key]))) < len(axes[key]):
            raise UsageError(f"--grid {key}={text} has the same value twice; give each once")
    return axes


def ranges_of(texts: Sequence[str], key_of: KeyOf) -> dict[str, str]:
    """Read `--range KEY=LOW..HIGH`, or `'KEY=LOW..HIGH log'`; see `grid_of`."""
    ranges = _split(texts, "--range", "'learning_rate=1e-4..1e-1 log'", key_of)
    for key, text in ranges.items():
        bounds_of(text, f"--range {key}={text}")
    return ranges


def _split(texts: Sequence[str], flag: str, example: str, key_of: KeyOf) -> dict[str, str]:
    found: dict[str, str] = {}
    for text in texts:
        name, equals, value = (part.strip() for part in text.partition("="))
        if not (name and equals and value):
            raise UsageError(f"{flag} {text!r} is not of the form {flag} {example}")
        key = key_of(name)
        if key in found:
            raise UsageError(f"{flag} {text}: {key} is given twice; put all its values into one")
        found[key] = value
    return found


def bounds_of(text: str, source: str) -> tuple[Any, Any, bool]:
    """Return the ends of a range and whether it is logarithmic; two integers draw integers."""
    match = RANGE.fullmatch(text)
    ends: Sequence[str] = match.group("low", "high") if match else ("", "")
    low, high = (read_yaml(end, source) for end in ends)
    if not (match and {type(low), type(high)} <= {int, float} and low < high):
        raise UsageError(f"{source} is not a range; give one as 1e-4..1e-1, or '1e-4..1e-1 log'")
    if match["log"] and low <= 0:
        raise UsageError(f"{source}: a logarithmic range begins above 0")
    return low, high, bool(match["log"])


def _draw(text: str, key: str, number: int, seed: int) -> Any:
    """Draw a value of a range: a function of seed, key and number, so that more trials add some."""
    low, high, is_log = bounds_of(text, key)
    chance = random.Random(f"{seed} {key} {number}")
    is_whole = isinstance(low, int) and isinstance(high, int)
    if not is_log:
        drawn = chance.randint(low, high) if is_whole else chance.uniform(low, high)
    else:
        drawn = math.exp(chance.uniform(math.log(low), math.log(high)))
    return min(max(round(drawn), low), high) if is_whole else shortened(drawn, low, high)


def shortened(value: float, low: float, high: float) -> float:
    """Return a number of a range with as many digits as a setting needs."""
    return min(max(float(f"{value:.{DIGITS}g}"), float(low)), float(high))


def check_search(definition: Definition) -> None:
    """Raise a UsageError if what is asked for does not fit together, or Optuna is not there."""
    varied = [*definition.grid, *definition.range, *repeats(definition)[0]]
    if twice := [key for key in varied if varied.count(key) > 1]:
        raise UsageError(f"{twice[0]} is varied by two of --grid, --range, --seeds and --folds")
    if definition.search:
        require_one_of(ENGINES, "search", definition.search)
    if definition.pruner:
        require_one_of(PRUNERS, "pruner", definition.pruner)
    if bool(definition.search) != bool(definition.trials):
        raise UsageError("--search and --trials belong together; give both or none")
    if not definition.search and bool(definition.random) != bool(definition.range):
        raise UsageError("--range needs --random=DRAWS or --search; --random needs a --range")
    if definition.search and definition.random:
        raise UsageError("--search chooses by itself; leave --random out")
    if definition.search and not (definition.range or definition.grid):
        raise UsageError("--search needs something to choose from: give --range or --grid")
    if definition.pruner and definition.search and len(repeats(definition)) > 1:
        raise UsageError("--pruner compares single runs; leave out --seeds and --folds")
    if not (definition.search or definition.pruner):
        return
    if not definition.config.get("monitor"):
        raise UsageError("the config does not say which trial is best; add --monitor=val_loss")
    try:
        import optuna  # noqa: F401
    except ImportError:
        raise UsageError('--search and --pruner need Optuna: pip install "optuna>=4.5"') from None


def trials_of(definition: Definition, there: Sequence[Trial] = ()) -> list[Trial]:
    """Return a sweep's trials in the order of their running; of a search, none. See `named`."""
    if definition.search:
        return []
    seed = definition.config["seed"]
    combinations = itertools.product(*definition.grid.values())
    grid = (dict(zip(definition.grid, values, strict=True)) for values in combinations)
    ranges, draws = definition.range.items(), range(definition.random)
    drawn = [{key: _draw(text, key, i, seed) for key, text in ranges} for i in draws] or [{}]
    parts = itertools.product(grid, drawn, repeats(definition))
    every = [one | other | repeat for one, other, repeat in parts]
    if not any(every):
        raise UsageError("the sweep varies nothing; give --grid, --random, --seeds or --folds")
    return named(definition, every, there)


def identity(definition: Definition, settings: Settings) -> str:
    """Return a text that is the same for settings that make the same config; 1 is 1.0."""
    text = json.dumps(definition.resolve(settings), default=str)
    return json.dumps(json.loads(text, parse_int=float), sort_keys=True)


def named(definition: Definition, every: Iterable[Settings], there: Trials = ()) -> list[Trial]:
    """Return trials with these settings, each once: those that are there, or new ones."""
    known = {identity(definition, trial.settings): trial for trial in there}
    names = {trial.name for trial in there}
    found = {}
    for settings in every:
        what = identity(definition, settings)
        if what not in known:
            name = name_of(settings)
            known[what] = Trial(_marked(name, what) if name in names else name, settings)
            names.add(known[what].name)
        found[what] = known[what]
    return list(found.values())


def repeats(definition: Definition) -> list[dict[str, Any]]:
    """Return what sets runs of the same settings apart: seed and fold."""
    first = definition.config["seed"]
    seeds = [{"seed": first + i} for i in range(definition.seeds)] or [{}]
    folds = [{"fold": i} for i in range(definition.folds)] or [{}]
    return [seed | fold for seed in seeds for fold in folds]


def repeated(definition: Definition, settings: Settings, there: Trials = ()) -> list[Trial]:
    """Return the trials of settings that a search has chosen, one for each seed and fold."""
    return named(definition, ({**settings, **repeat} for repeat in repeats(definition)), there)


def corners(definition: Definition) -> list[Settings]:
    """Return settings with the ends of all ranges and every value of all axes, to look at first."""
    ends = {key: bounds_of(text, key)[:2] for key, text in definition.range.items()}
    choices = {**ends, **definition.grid}
    found = itertools.zip_longest(*choices.values())
    return [{k: v for k, v in zip(choices, one, strict=True) if v is not None} for one in found]


def name_of(settings: Settings) -> str:
    """Return a name for a trial's folder: "n_filters=8,seed=1", safe in file names and shells."""
    parts = []
    for key, value in settings.items():
        text = value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
        safe = re.sub(r"[^\w.,+-]+", "-", re.sub(r"[][{}\"]", "", text))
        parts.append(f"{key.rpartition('.')[2]}={safe}")
    name = ",".join(parts)
    return name if len(name.encode()) <= LONGEST_NAME else _marked(name, name)


def _marked(name: str, what: str) -> str:
    mark = hashlib.sha256(what.encode()).hexdigest()[:8]
    return name.encode()[: LONGEST_NAME - 9].decode(errors="ignore") + f"~{mark}"
