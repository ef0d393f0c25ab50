"""Walks over all that objects lead to: attributes, containers, closures and globals of code. The
path to a thing is the shortest one, and the same in every process that runs the same code."""

import contextlib
import functools
import inspect
import logging
import random
import re
import sys
import sysconfig
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import CodeType, FunctionType, MemberDescriptorType, MethodType, ModuleType
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from engine.checkpoints import callback_state
from engine.devices import components
from engine.hooks import Run
from engine.trees import map_leaves
from vegab import ROOT

MOST_OBJECTS = 100_000  # that are walked over
MOST_ITEMS = 10_000  # of a list or mapping; a longer one is data
# These lead to nothing, or to far too much.
PLAIN = (str, bytes, int, float, complex, type(None), np.ndarray, np.generic)
PASSED_BY = (*PLAIN, type, ModuleType, CodeType, logging.Logger, tf.Tensor, tf.data.Dataset)
# Asked once for each class, as below: every checkpoint walks over thousands of objects.
_leads_nowhere: Callable[[Any], bool] = functools.cache(lambda kind: issubclass(kind, PASSED_BY))
VARIABLES = (keras.Variable, tf.Variable)
# What keeps variables of its own; these are named by it.
KEEPERS = (keras.Optimizer, keras.Metric, keras.random.SeedGenerator, tf.random.Generator)


class Reached(NamedTuple):
    """A thing, how to come to it, and what keeps it, with the path to that."""

    path: str
    thing: Any
    keeper: Any = None
    keeper_path: str = ""


def walk(owners: Mapping[str, Any], passed_by: Iterable[Any] = ()) -> Iterator[Reached]:
    """Yield all that hangs on the owners, each thing once, the nearest first; not `passed_by`."""
    # By their ids, and kept: what is made by asking for it would leave its id to the next one.
    seen = {id(thing): thing for thing in passed_by}
    waiting = deque(Reached(name, owner) for name, owner in owners.items())
    while waiting and len(seen) < MOST_OBJECTS:
        reached = waiting.popleft()
        thing = reached.thing
        kind: Any = type(thing)  # isinstance would wake what stands for something else
        if id(thing) in seen or _leads_nowhere(kind):
            continue
        seen[id(thing)] = thing
        if issubclass(kind, KEEPERS) and reached.keeper is None:
            reached = Reached(reached.path, thing, thing, reached.path)
        if "._modules[" in reached.path:  # where PyTorch keeps what people write as an attribute
            path = re.sub(r"\._modules\['(\w+)'\]", r".\1", reached.path)
            reached = reached._replace(path=path)
        yield reached
        is_of_library = kind.__module__.startswith(("tensorflow.", "tensorboard."))
        if not issubclass(kind, VARIABLES) and (reached.keeper or not is_of_library):
            waiting.extend(
                Reached(path, part, reached.keeper, reached.keeper_path)
                for path, part in _parts(reached.path, thing)
            )


def _parts(path: str, thing: Any) -> Iterator[tuple[str, Any]]:
    """Yield what a thing leads to, without calling it, which may wake it; named things first."""
    kind: Any = type(thing)
    if issubclass(kind, dict) and dict.__len__(thing) < MOST_ITEMS:
        for number, (key, item) in enumerate(list(dict.items(thing))):
            if not _leads_nowhere(type(item)):
                yield f"{path}[{repr(key) if isinstance(key, str | int) else number}]", item
    elif issubclass(kind, list | tuple | set | frozenset | deque) and len(thing) < MOST_ITEMS:
        for number, item in enumerate(list(thing)):
            if not _leads_nowhere(type(item)):
                yield f"{path}[{number}]", item
    elif kind is MethodType:
        yield from ((path, part) for part in (thing.__func__, thing.__self__))
    elif issubclass(kind, functools.partial):
        yield from ((path, part) for part in (thing.func, thing.args, thing.keywords))
    if kind is FunctionType:
        yield from _around(thing)
    elif kind.__module__.startswith("torch.") and not hasattr(kind, "named_modules"):
        # Of an optimizer, scheduler or scaler, those that it works on.
        for name, item in callback_state.attributes_of(thing).items():
            items = item if isinstance(item, list | tuple) else [item]
            if any(hasattr(type(each), "state_dict") for each in items):
                yield f"{path}.{name}", item
    else:
        yield from _attributes(path, thing)


def _attributes(path: str, thing: Any) -> Iterator[tuple[str, Any]]:
    kind: Any = type(thing)
    if issubclass(kind, keras.Model):
        yield f"{path}.layers", thing.layers
    items = callback_state.attributes_of(thing)
    if "param_groups" in items:  # of an optimizer of PyTorch's, all of which it saves
        items = {key: items[key] for key in items if key not in ("state", "param_groups")}
    if kind is Run:  # the loop saves its fields; the history among them grows with each epoch
        items = {key: items[key] for key in items if key not in Run.__dataclass_fields__}
    for name in _slots_of(kind):
        items.setdefault(name, getattr(thing, name, None))
    named = [(str(name), item) for name, item in items.items() if not _leads_nowhere(type(item))]
    for name, item in sorted(named, key=lambda each: each[0].startswith("_")):
        yield f"{path}.{name}", item
    for base in _own_bases(kind):
        for name, item in list(vars(base).items()):
            yield f"{path}.{name}", getattr(item, "__func__", item)


@functools.cache
def _slots_of(kind: type) -> list[str]:
    return [
        name
        for base in kind.__mro__
        for name in getattr(base, "__slots__", ())
        if isinstance(vars(base).get(name), MemberDescriptorType)
    ]


@functools.cache
def _own_bases(kind: type) -> list[type]:
    return [base for base in kind.__mro__ if is_of_project(base)]


def _around(function: FunctionType) -> Iterator[tuple[str, Any]]:
    """Yield what a function finds around it: in its closure, and, by its names, in its module."""
    where = f"{function.__module__}.{function.__qualname__}"
    for cell, name in zip(function.__closure__ or (), function.__code__.co_freevars, strict=True):
        with contextlib.suppress(ValueError):  # it is empty
            yield f"{name} in {where}", cell.cell_contents
    if is_own(function.__code__.co_filename):
        names = inspect.getclosurevars(function)
        for name, item in names.globals.items():
            yield f"{function.__module__}.{name}", item
            if isinstance(item, ModuleType) and is_own(getattr(item, "__file__", None) or ""):
                for attribute in sorted(names.unbound & vars(item).keys()):
                    yield f"{item.__name__}.{attribute}", vars(item)[attribute]
    yield from ((where, default) for default in function.__defaults__ or ())


def handles_of(variable: Any) -> list[Any]:
    """Return the resource of a variable, or those of its copies on several devices."""
    value = variable.value if isinstance(variable, keras.Variable) else variable
    return [part.handle for part in components(value) or [value]]


@functools.cache
def is_of_project(kind: type) -> bool:
    """Whether a class is written by the researcher."""
    return is_own(getattr(sys.modules.get(kind.__module__), "__file__", None) or "")


@functools.cache
def attributes_of_project(kind: type) -> list[str]:
    """Return names of attributes that only the researcher's part, without `get_state`, uses."""
    own: set[str] = set()
    others: set[str] = set()
    for base in kind.__mro__:
        functions = [getattr(item, "fget", item) for item in vars(base).values()]
        codes = [item.__code__ for item in functions if isinstance(item, FunctionType)]
        names = {name for code in codes for name in _names_in(code)}
        if is_of_project(base):
            if "get_state" in vars(base):  # which says what is to be saved
                return []
            own |= names
        else:
            others |= names
    return sorted(own - others)


def _names_in(code: CodeType) -> set[str]:
    inner = [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return set(code.co_names).union(*map(_names_in, inner))


@functools.cache
def is_own(file_name: str) -> bool:
    """Whether a file is the researcher's: neither a library's nor of the machinery."""
    path = Path(file_name)
    if not path.is_absolute() or {"site-packages", "dist-packages"} & {*path.parts}:
        return False
    machinery = (ROOT / "engine", ROOT / "vegab", sysconfig.get_path("stdlib"))
    return not any(path.is_relative_to(place) for place in machinery)


class State(NamedTuple):
    """How to take the state out of a thing, as JSON values and arrays, and to put it back."""

    get: Callable[[], Any]
    put: Callable[[Any], None]
    tensors: frozenset[int] = frozenset()  # ids of PyTorch's that it holds
    is_model: bool = False  # of PyTorch


def state_of(thing: Any) -> State | None:
    """Return how to save a random generator, a table, or what has a `state_dict`, as PyTorch's."""
    torch = sys.modules.get("torch")
    if isinstance(thing, np.random.Generator):
        bits = thing.bit_generator
        return State(lambda: bits.state, lambda state: setattr(bits, "state", state))
    if isinstance(thing, np.random.RandomState):
        return State(lambda: thing.get_state(legacy=False), thing.set_state)
    if isinstance(thing, random.Random):
        return State(
            lambda: list(thing.getstate()),
            lambda state: thing.setstate((state[0], tuple(state[1]), state[2])),
        )
    if isinstance(thing, tf.lookup.experimental.MutableHashTable):
        return State(lambda: _entries(thing), lambda state: _refill(thing, state))
    if torch is not None and isinstance(thing, torch.Generator):
        if thing is torch.default_generator:
            return None  # its seed is set before each step, see `engine.iterators.steps.sow`
        return State(lambda: thing.get_state().numpy(), lambda s: thing.set_state(with_torch(s)))
    if torch is not None and isinstance(thing, torch.Tensor):
        ids = frozenset([id(thing)])
        return State(lambda: without_torch(thing), lambda s: thing.data.copy_(with_torch(s)), ids)
    if not (hasattr(type(thing), "state_dict") and hasattr(type(thing), "load_state_dict")):
        return None
    is_model = torch is not None and isinstance(thing, torch.nn.Module)
    tensors = frozenset(map(id, [*thing.parameters(), *thing.buffers()] if is_model else []))
    if is_model and not tensors:
        return None
    return State(
        lambda: without_torch(thing.state_dict()),
        lambda state: thing.load_state_dict(with_torch(state)),
        tensors,
        is_model,
    )


def _entries(table: Any) -> dict[str, np.ndarray]:
    keys, values = (np.asarray(part) for part in table.export())
    order = np.argsort(keys, kind="stable")  # a table has none
    parts = {"keys": keys[order], "values": values[order]}
    return {name: a.astype(np.bytes_) if a.dtype == object else a for name, a in parts.items()}


def _refill(table: Any, entries: Mapping[str, Any]) -> None:
    table.remove(table.export()[0])
    table.insert(entries["keys"], entries["values"])


def without_torch(value: Any) -> Any:
    """Return nested values of PyTorch as JSON values and arrays."""

    def plain(leaf: Any) -> Any:
        if isinstance(leaf, deque):
            return without_torch(list(leaf))
        if not hasattr(leaf, "detach"):
            return leaf
        tensor, torch = leaf.detach().cpu(), sys.modules["torch"]
        if tensor.dtype == torch.bfloat16:  # which NumPy does not have
            return {"bfloat16": tensor.view(torch.int16).numpy().copy()}
        return tensor.numpy().copy()

    return map_leaves(value, plain)


def with_torch(state: Any) -> Any:
    """Return a state of PyTorch out of JSON values and arrays: the optimizers' keys are numbers."""
    torch = sys.modules["torch"]
    if isinstance(state, Mapping):
        if state.keys() == {"bfloat16"}:
            return torch.from_numpy(np.array(state["bfloat16"])).view(torch.bfloat16)
        return {int(k) if k.isdecimal() else k: with_torch(item) for k, item in state.items()}
    if isinstance(state, list):
        return [with_torch(item) for item in state]
    if isinstance(state, np.ndarray | np.generic):
        return torch.from_numpy(np.array(state))
    return state
