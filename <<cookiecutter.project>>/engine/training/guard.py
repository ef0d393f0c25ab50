"""Refuses a step that uses what no checkpoint holds, for a resumed run would have other bits.

What a step uses is read from its graph once it is traced, so that it does not matter where that
hangs. Of a step that is not compiled there is no graph, and nothing is found.
"""

import contextlib
import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from engine.checkpoints import variables_of
from engine.devices import components
from engine.keras_private import graph_of
from vegab import ROOT, UsageError

# Operations that leave a table as it is, and messages to other workers, which take a token for
# their order. All others, of a resource that is no variable, count as writers.
READERS = ("LookupTableFind", "LookupTableSize", "LookupTableExport", "Collective")
# These draw without being marked as operations with a state.
DRAW_ALL_THE_SAME = ("FractionalAvgPool", "FractionalMaxPool")
CALLS_PYTHON = ("PyFunc", "EagerPyFunc", "PyFuncStateless")
# What keeps variables of its own; it is named in place of each of them.
KEEPERS = (
    keras.Optimizer,
    keras.Metric,
    keras.random.SeedGenerator,
    tf.random.Generator,
)
# What to do.
VARIABLE = "make a variable a weight of a layer (add_weight)"
OPTIMIZER = "make an optimizer an attribute of the model itself"
RANDOM = "draw by keras.random with a keras.random.SeedGenerator that is an attribute of a layer"
PYTHON = "write a Python function with operations of Keras or TensorFlow"
OTHER = "keep in a weight of a layer what changes"
MOST_OBJECTS = 100_000  # that are searched for where a variable hangs
_lines: dict[int, str] = {}  # where in the project a variable was made, by the id of its handle


class Guard:
    """Looks at each step of training and validation that is traced.

    Args:
        model: compiled; with an iterator: any object.
        iterator: what does the steps, or None: the model's training step does.
        callbacks: of Keras.
        hooks: of the run.
        allows_inexact: note what is found instead of refusing it.

    Attributes:
        found: a phrase for each thing that no checkpoint holds.
    """

    def __init__(
        self,
        model: Any,
        iterator: Any = None,
        callbacks: Sequence[Any] = (),
        hooks: Sequence[Any] = (),
        allows_inexact: bool = False,
    ) -> None:
        self._model = model
        self._iterator = iterator
        # Where a variable may hang.
        self._owners = {
            "model": model,
            "iterator": iterator,
            "callbacks": callbacks,
            "hooks": hooks,
        }
        self._allows_inexact = allows_inexact
        self.found: list[str] = []

    def look(self, traced: Any) -> None:
        """Look at a step, a concrete function.

        Raises:
            UsageError: if it uses what no checkpoint holds, and that is not allowed.
        """
        self.tell([*self._unsaved(traced), *_draws(traced.graph)])

    def tell(self, unsaved: Sequence["Unsaved"]) -> None:
        """Refuse or note what was found.

        Raises:
            UsageError: if there is anything, and it is not allowed.
        """
        if unsaved and not self._allows_inexact:
            names = ", ".join(dict.fromkeys(each.name for each in unsaved))
            remedies = "; ".join(dict.fromkeys(each.remedy for each in unsaved))
            raise UsageError(
                f"no checkpoint holds {names}, so a resumed run would have other bits; {remedies}; "
                "or add --allow_inexact to train all the same"
            )
        self.found += [each.name for each in unsaved if each.name not in self.found]

    def _saved(self) -> list[Any]:
        """Return the variables that a checkpoint holds, or that the position decides."""
        weights = self._model.weights if isinstance(self._model, keras.Model) else []
        if self._iterator is None:
            groups = variables_of(self._model)
        else:
            groups = self._iterator.variables() | {"position": self._iterator.of_position()}
        return [*weights, *(variable for group in groups.values() for variable in group)]

    def _unsaved(self, traced: Any) -> list["Unsaved"]:
        """Return what is captured and not saved."""
        saved = {id(handle) for variable in self._saved() for handle in _handles(variable)}
        known = {
            id(handle): variable for variable in traced.variables for handle in _handles(variable)
        }
        variables, others = [], []
        for captured, placeholder in traced.graph.captures:
            if captured.dtype != tf.resource or id(captured) in saved:
                continue
            if id(captured) in known:
                variables.append(known[id(captured)])
            elif writers := _writers(placeholder):
                changed = f"the table or queue that {writers[0].type} changes"
                others.append(Unsaved(changed + _line_of(writers[0]), OTHER))
        return [*(self._named(variables) if variables else []), *others]

    def _named(self, variables: Sequence[Any]) -> list["Unsaved"]:
        """Return variables by where they hang; for all of one optimizer, say, that optimizer."""
        places = _places(self._owners, {id(handle) for v in variables for handle in _handles(v)})
        by_place: dict[str, list[Any]] = {}
        keepers: dict[str, Any] = {}
        for variable in variables:
            found = next((places[id(h)] for h in _handles(variable) if id(h) in places), None)
            place, keeper = found or (variable.name, None)
            by_place.setdefault(place, []).append(variable)
            keepers[place] = keeper
        unsaved = []
        for place, those in by_place.items():
            keeper = keepers[place]
            kind = type(keeper).__name__ if keeper is not None else those[0].name.split(":")[0]
            number = f", {len(those)} variables" if len(those) > 1 else ""
            line = next((_lines[id(h)] for v in those for h in _handles(v) if id(h) in _lines), "")
            remedy = OPTIMIZER if isinstance(keeper, keras.Optimizer) else VARIABLE
            unsaved.append(Unsaved(f"{place} ({kind}{number}{line})", remedy))
        return unsaved


class Unsaved(NamedTuple):
    """What no checkpoint holds, and what to do."""

    name: str
    remedy: str


@contextlib.contextmanager
def noting_lines() -> Iterator[None]:
    """Within the block, note where in the project each variable is made."""

    def make(next_creator: Callable[..., Any], **arguments: Any) -> Any:
        variable = next_creator(**arguments)
        frame = sys._getframe(1)
        while frame is not None and not _is_own(frame.f_code.co_filename):
            frame = frame.f_back  # type: ignore[assignment]
        if frame is not None:
            line = f", made in {_shown(frame.f_code.co_filename)}, line {frame.f_lineno}"
            _lines.update({id(handle): line for handle in _handles(variable)})
        return variable

    with tf.variable_creator_scope(make):
        yield


def _handles(variable: Any) -> list[Any]:
    """Return the resource of a variable, or those of its copies on several devices."""
    value = variable.value if isinstance(variable, keras.Variable) else variable
    return [part.handle for part in components(value) or [value]]


def _draws(graph: Any) -> list[Unsaved]:
    """Return the operations that draw from, or keep, what is in no variable."""
    found = [op for op in _operations(graph) if _draws_itself(op) or op.type in CALLS_PYTHON]
    read = {id(op) for op in _read(found)} if found else set()
    unsaved = []
    for op in found:
        if id(op) not in read:
            continue
        if op.type in CALLS_PYTHON:
            name = f"what the Python function of {op.type} keeps{_line_of(op)}"
            unsaved.append(Unsaved(name, PYTHON))
        else:
            unsaved.append(Unsaved(f"the random state of {op.type}{_line_of(op)}", RANDOM))
    return unsaved


def _operations(graph: Any) -> Iterator[Any]:
    """Yield all operations of a graph, and of the functions that it calls."""
    seen: set[str] = set()
    graphs = [graph]
    while graphs:
        graph = graphs.pop()
        for op in graph.get_operations():
            yield op
            for name in _functions_of(op):
                inner = graph_of(graph, name) if name not in seen else None
                seen.add(name)
                if inner is not None:
                    graphs.append(inner)


def _functions_of(op: Any) -> list[str]:
    names = []
    for attribute, is_list in _kind(op.type, op).functions:
        value = op.get_attr(attribute)
        names += [each.name for each in (value if is_list else [value])]
    return [name for name in names if name]


class _Kind:
    """What there is to know of a type of operations."""

    def __init__(self, definition: Any) -> None:
        attributes = definition.attr
        self.functions = [(a.name, "list" in a.type) for a in attributes if "func" in a.type]
        has_seed = any(attribute.name == "seed" for attribute in attributes)
        self.draws = has_seed and (definition.is_stateful or definition.name in DRAW_ALL_THE_SAME)
        self.is_stateful = definition.is_stateful


_kinds: dict[str, _Kind] = {}


def _kind(name: str, op: Any) -> _Kind:
    if name not in _kinds:
        _kinds[name] = _Kind(op.op_def)
    return _kinds[name]


def _draws_itself(op: Any) -> bool:
    return _kind(op.type, op).draws


def _read(found: Sequence[Any]) -> list[Any]:
    """Return those operations on whose outputs a result or a variable depends."""
    needed: set[int] = set()
    for graph in {id(op.graph): op.graph for op in found}.values():
        of_graph = {id(op) for op in found if op.graph is graph}
        ends = [
            op
            for op in graph.get_operations()
            if _kind(op.type, op).is_stateful and id(op) not in of_graph
        ]
        open_ops = [*(tensor.op for tensor in graph.outputs), *ends]
        while open_ops:
            op = open_ops.pop()
            if id(op) not in needed:
                needed.add(id(op))
                open_ops += [tensor.op for tensor in op.inputs]
    return [op for op in found if id(op) in needed]


def _writers(tensor: Any) -> list[Any]:
    """Return the operations that may change a resource which is no variable."""
    found: list[Any] = []
    for op in tensor.consumers():
        names = _functions_of(op)
        if not names:
            found += [] if op.type.startswith(READERS) else [op]
            continue
        number = next(n for n, each in enumerate(op.inputs) if each is tensor)
        for inner in (graph_of(op.graph, name) for name in names):
            # The inputs of If and Case begin with the condition, which the branches are not given.
            offset = len(op.inputs) - len(inner.inputs) if inner is not None else 0
            if inner is None or not 0 <= number - offset < len(inner.inputs):
                found.append(op)
            else:
                found += _writers(inner.inputs[number - offset])
    return found


def _line_of(op: Any) -> str:
    """Return ", in file, line number" of the user's line that made an operation, or ""."""
    own = [frame for frame in op.traceback if _is_own(frame.filename)]
    # The loop's own lines call the step; that of the user is the innermost.
    return f", in {_shown(own[-1].filename)}, line {own[-1].lineno}" if own else ""


@functools.cache
def _is_own(file_name: str) -> bool:
    """Whether a file is the researcher's: of the project, and not the machinery."""
    path = Path(file_name)
    if not path.is_relative_to(ROOT) or "site-packages" in path.parts:
        return False
    return path.relative_to(ROOT).parts[0] not in ("engine", "vegab")


def _shown(file_name: str) -> str:
    return str(Path(file_name).relative_to(ROOT))


def _places(owners: Mapping[str, Any], wanted: set[int]) -> dict[int, tuple[str, Any]]:
    """Return where variables hang, by the ids of their handles: the shortest way from an owner.

    For what keeps variables of its own, such as an optimizer, the way to that, and that.
    """
    places: dict[int, tuple[str, Any]] = {}
    seen: set[int] = set()
    level = [(name, owner, "", None) for name, owner in owners.items()]
    while level and len(places) < len(wanted) and len(seen) < MOST_OBJECTS:
        below: list[tuple[str, Any, str, Any]] = []
        for path, thing, to_keeper, keeper in level:
            if id(thing) in seen:
                continue
            seen.add(id(thing))
            if isinstance(thing, keras.Variable | tf.Variable):
                for handle in _handles(thing):
                    if id(handle) in wanted:
                        places.setdefault(id(handle), (to_keeper or path, keeper))
                continue
            if keeper is None and isinstance(thing, KEEPERS):
                to_keeper, keeper = path, thing
            below += [(name, item, to_keeper, keeper) for name, item in _parts(path, thing)]
        level = below
    return places


def _parts(path: str, thing: Any) -> Iterator[tuple[str, Any]]:
    """Yield what hangs on an object, with the way to it; what people name first."""
    if isinstance(thing, Mapping):
        yield from ((f"{path}[{key!r}]", item) for key, item in list(thing.items()))
    elif isinstance(thing, list | tuple | set | frozenset):
        yield from ((f"{path}[{number}]", item) for number, item in enumerate(thing))
    elif isinstance(thing, MethodType):
        yield path, thing.__func__
        yield path, thing.__self__
    elif isinstance(thing, functools.partial):
        yield from ((path, item) for item in (thing.func, thing.args, thing.keywords))
    elif isinstance(thing, FunctionType):
        yield from _named_by(thing)
    elif not isinstance(thing, type | ModuleType | str | bytes | int | float):
        if isinstance(thing, keras.Model):
            yield f"{path}.layers", thing.layers
        names = vars(thing) if hasattr(thing, "__dict__") else {}
        slots = [name for kind in type(thing).__mro__ for name in getattr(kind, "__slots__", ())]
        items = dict(names) | {
            name: getattr(thing, name, None) for name in slots if name not in names
        }
        for name in sorted(items, key=lambda name: str(name).startswith("_")):
            yield f"{path}.{name}", items[name]
        for kind in type(thing).__mro__:
            if _is_own(getattr(sys.modules.get(kind.__module__), "__file__", None) or ""):
                for name, item in list(vars(kind).items()):
                    yield f"{path}.{name}", getattr(item, "__func__", item)


def _named_by(function: FunctionType) -> Iterator[tuple[str, Any]]:
    """Yield what a function finds around it: in its closure, and, by its names, in its module."""
    names = inspect.getclosurevars(function) if _is_own(function.__code__.co_filename) else None
    where = f"{function.__module__}.{function.__qualname__}"
    for cell, name in zip(function.__closure__ or (), function.__code__.co_freevars, strict=True):
        with contextlib.suppress(ValueError):  # it is empty
            yield f"{name} in {where}", cell.cell_contents
    if names is not None:
        for name, item in names.globals.items():
            yield f"{function.__module__}.{name}", item
    yield from ((where, default) for default in function.__defaults__ or ())
