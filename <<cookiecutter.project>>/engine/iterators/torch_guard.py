"""Finds what an iterator uses of PyTorch and no checkpoint holds: a resumed run would lose it.

Iterator and model are searched as the garbage collector does it, so it does not matter where a
thing hangs: among attributes, in a dictionary or list, in the closure of a function, or in a global
that their code names. What was made while they were built, and is alive, counts even if the search
does not come to it.
"""

import contextlib
import gc
import logging
import re
import sys
import weakref
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from types import CodeType, FunctionType, ModuleType
from typing import Any

from engine.iterators.base import PyHookedModelIterator, TemplateIterator
from vegab import ROOT

REMEDY = (
    "make each module, optimizer and scheduler an attribute of its own of the iterator, which "
    "inherits from TorchHookedModelIterator, or of the model, and write get_state and set_state "
    "for all else (see engine/iterators/torch_iterator.py)"
)
# Of these nothing leads to an object of PyTorch, or far too much does.
PASSED_BY = (ModuleType, CodeType, logging.Logger, str, bytes, int, float, complex, type(None))
PACKAGES_PASSED_BY = ("tensorflow", "keras", "numpy")
UNNAMED = "something that neither iterator nor model names"


@contextlib.contextmanager
def watching() -> Iterator[list["weakref.ref[Any]"]]:
    """Collect, by the end of the block, what was made in it of PyTorch's that has a state."""
    made: list[weakref.ref[Any]] = []
    if "torch" not in sys.modules:
        yield made
        return
    was_frozen = gc.get_freeze_count() > 0
    gc.freeze()  # so that get_objects returns only what is new
    try:
        yield made
        kinds: dict[type, bool] = {}
        for thing in gc.get_objects():
            kind = type(thing)
            if kind not in kinds:
                kinds[kind] = _has_state(kind)
            if kinds[kind]:
                made.append(weakref.ref(thing))
    finally:
        if not was_frozen:
            gc.unfreeze()


def unsaved(iterator: PyHookedModelIterator, made: Sequence["weakref.ref[Any]"] = ()) -> list[str]:
    """Return a phrase, such as "iterator.scaler (GradScaler)", for each thing that is not saved.

    What iterator or model save by a `get_state` or `save` of their own is their business. `made` is
    what `watching` collected while they were built.
    """
    saver = next(kind for kind in type(iterator).__mro__ if "get_state" in vars(kind))
    is_shipped = saver in (PyHookedModelIterator, TemplateIterator)
    if "torch" not in sys.modules or not (
        is_shipped or saver.__module__ == "engine.iterators.torch_iterator"
    ):
        return []
    if saver is TemplateIterator and type(iterator).save is not TemplateIterator.save:  # type: ignore[attr-defined]
        return []
    parts = [] if is_shipped else list(iterator._parts().values())  # type: ignore[attr-defined]
    # A batch is a function of its position.
    known = {id(iterator.datasets), *map(id, iterator.datasets.values())}
    if is_shipped and hasattr(iterator.model, "get_state"):
        known |= {id(thing) for _, thing in _reached({"model": iterator.model}, known)}
    roots = {"iterator": iterator, "model": iterator.model}
    found = [(where, thing) for where, thing in _reached(roots, known) if _is_state(thing)]
    known |= {id(thing) for _, thing in found}

    def others() -> list[tuple[str, Any]]:
        things = [thing for ref in made if (thing := ref()) is not None and id(thing) not in known]
        return [(UNNAMED, thing) for thing in things]

    missing = _not_saved([*found, *others()], parts)
    if any(where == UNNAMED for where, _ in missing):
        del missing
        gc.collect()  # what only cycles hold is not used any more
        missing = _not_saved([*found, *others()], parts)
    return [f"{where} ({type(thing).__name__})" for where, thing in missing]


def _not_saved(found: Sequence[tuple[str, Any]], parts: Sequence[Any]) -> list[tuple[str, Any]]:
    """Return those of what was found whose state is not in that of the parts that are saved."""
    torch = sys.modules["torch"]
    saved = _asked(parts, [thing for _, thing in found])
    tensors: set[int] = set()
    for part in parts:
        if isinstance(part, torch.nn.Module):
            saved |= {id(module) for module in part.modules()}
            tensors |= _tensors_of(part)
    missing = []
    # Modules first, for their tensors have no line of their own.
    for where, thing in sorted(found, key=lambda item: not isinstance(item[1], torch.nn.Module)):
        held = _tensors_of(thing) if isinstance(thing, torch.nn.Module) else {id(thing)}
        if id(thing) not in saved and not held <= tensors:
            missing.append((where, thing))
        tensors |= held
    return missing


def _tensors_of(module: Any) -> set[int]:
    return {id(tensor) for tensor in (*module.parameters(), *module.buffers())}


def _asked(parts: Sequence[Any], things: Sequence[Any]) -> set[int]:
    """Return the things whose `state_dict` is called when that of the parts is."""
    asked: set[int] = set()

    def recording(function: Any) -> Any:
        def state_dict(self: Any, *args: Any, **kwargs: Any) -> Any:
            asked.add(id(self))
            return function(self, *args, **kwargs)

        return state_dict

    kinds = {kind for thing in [*things, *parts] for kind in type(thing).__mro__}
    originals = {kind: vars(kind)["state_dict"] for kind in kinds if "state_dict" in vars(kind)}
    try:
        for kind, function in originals.items():
            setattr(kind, "state_dict", recording(function))  # noqa: B010
        for part in parts:
            part.state_dict()
    finally:
        for kind, function in originals.items():
            setattr(kind, "state_dict", function)  # noqa: B010
    return asked


def _has_state(kind: type) -> bool:
    return hasattr(kind, "state_dict") and hasattr(kind, "load_state_dict")


def _is_state(thing: Any) -> bool:
    """Return whether a thing has a state that steps change: that of PyTorch's own generators is
    set before each step, see `iterator_steps.sow`."""
    torch, kind = sys.modules["torch"], type(thing)
    if issubclass(kind, torch.Tensor):
        return bool(thing.requires_grad and thing.is_leaf)
    if issubclass(kind, torch.Generator):
        own = (torch.default_generator, *torch.cuda.default_generators)
        return not any(thing is generator for generator in own)
    return _has_state(kind)


def _reached(roots: Mapping[str, Any], passed_by: set[int]) -> Iterator[tuple[str, Any]]:
    """Yield all that roots lead to, each thing once, and where it hangs; the nearest come first."""
    seen = set(passed_by)
    waiting = deque(roots.items())
    while waiting:
        where, thing = waiting.popleft()
        kind = type(thing)  # isinstance would wake what stands for something else
        if id(thing) in seen or issubclass(kind, PASSED_BY):
            continue
        if kind.__module__.partition(".")[0] in PACKAGES_PASSED_BY:
            continue
        seen.add(id(thing))
        yield re.sub(r"\._modules\['(\w+)'\]", r".\1", where), thing
        waiting.extend(_leads_to(where, thing))


def _leads_to(where: str, thing: Any) -> Iterator[tuple[str, Any]]:
    if issubclass(type(thing), type):
        if _is_own(thing.__module__):
            yield from ((f"{where}.{name}", value) for name, value in vars(thing).items())
        return
    if type(thing) is FunctionType:
        for name, cell in zip(thing.__code__.co_freevars, thing.__closure__ or (), strict=True):
            with contextlib.suppress(ValueError):  # nothing is in it yet
                yield f"{name} in {where}", cell.cell_contents
        for part in (thing.__defaults__, thing.__kwdefaults__, vars(thing)):
            yield f"part of {where}", part
        if _is_own(thing.__module__):
            yield from _globals_of(thing)
        return
    kind = type(thing)
    if issubclass(kind, dict):
        for key, value in list(dict.items(thing)):
            yield f"{where}[{repr(key) if isinstance(key, str | int) else '…'}]", value
    elif issubclass(kind, list | tuple):
        yield from ((f"{where}[{number}]", value) for number, value in enumerate(thing))
    if kind.__dictoffset__:
        yield from ((f"{where}.{name}", value) for name, value in list(vars(thing).items()))
        yield from ((where, base) for base in kind.__mro__)
    # Slots, sets, parts of a partial, the function of a method, …
    yield from ((f"part of {where}", value) for value in gc.get_referents(thing))


def _globals_of(function: FunctionType) -> Iterator[tuple[str, Any]]:
    """Yield the globals that a function names, also as attributes of the project's modules."""
    names = _names_in(function.__code__)
    for name in names & function.__globals__.keys():
        value = function.__globals__[name]
        if not isinstance(value, ModuleType):
            yield f"{name} in {function.__module__}", value
        elif _is_own(value.__name__):
            for attribute in names & vars(value).keys():
                yield f"{attribute} in {value.__name__}", vars(value)[attribute]


def _names_in(code: CodeType) -> set[str]:
    inner = [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return set(code.co_names).union(*map(_names_in, inner))


def _is_own(module: str | None) -> bool:
    """Return whether a module is one of the project, or the cells of a notebook."""
    if module == "__main__":
        return True
    file = getattr(sys.modules.get(module or ""), "__file__", None)
    return file is not None and file.startswith(str(ROOT)) and "site-packages" not in file
