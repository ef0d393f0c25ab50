"""Finds all that a step of training or validation uses, so that a checkpoint can hold it.

It is read from the graph, or found by walking over what callbacks, hooks and data keep; without a
graph, all of it is found so. What cannot be saved is refused."""

import contextlib
import gc
import logging
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

from engine import keras_private
from engine.checkpoints import by_unique_path, callback_state, path_of, read_others, variables_of
from engine.training import objects
from engine.training.objects import VARIABLES, handles_of, is_of_project, state_of, walk
from vegab import ROOT, UsageError

log = logging.getLogger(__name__)
# Operations that leave a table as it is, and messages to other workers, which take a token for
# their order. All others, of a resource that is not a variable, count as writers.
READERS = ("LookupTableFind", "LookupTableSize", "LookupTableExport", "Collective")
# These draw without being marked as operations with a state.
DRAW_ALL_THE_SAME = ("FractionalAvgPool", "FractionalMaxPool")
CALLS_PYTHON = ("PyFunc", "EagerPyFunc", "PyFuncStateless")
# What to do.
RANDOM = "draw by keras.random with a keras.random.SeedGenerator that is an attribute of a layer"
PYTHON = "write a Python function with operations of Keras or TensorFlow"
OTHER = "keep what changes in a weight of a layer"
Unsaved = tuple[str, str]  # what no checkpoint holds, and what to do
LOOKS_FOR_CHANGES = 10  # before the first step, and at checkpoints after it
# While an experiment was built.
_made: list["weakref.ref[Any]"] = []
_made_of_torch: list["weakref.ref[Any]"] = []


class Guard:
    """Looks at each step of training and validation that is traced.

    With `allows_inexact`, what cannot be saved is not refused: `found` has a phrase for each such
    thing. `has_news`: a trace came since this was set to False, which may use more variables."""

    def __init__(
        self, model: Any, iterator: Any = None, data: Sequence = (), allows_inexact: bool = False
    ) -> None:
        self._model, self._iterator = model, iterator
        self._steps = {"model": model, "iterator": iterator}
        self.around: dict[str, Sequence[Any]] = {}  # callbacks and hooks
        self._data = {"data": data}
        self._allows_inexact = allows_inexact
        self._captured: dict[int, Any] = {}  # by the id of a handle, in the order of capture
        self._tables: dict[str, Any] = {}
        self._has_graph = self.has_news = False
        self._reached: list[Any] = []  # variables from model and iterator, once all is traced
        self._num_looks = 0
        self._own: list[tuple[str, Any, dict[str, str]]] = []
        self.found: list[str] = []

    def look(self, traced: Any) -> None:
        """Look at a step, a concrete function; UsageError for what no checkpoint can hold."""
        self._has_graph = self.has_news = True
        self._reached = []
        known = {id(h): variable for variable in traced.variables for h in handles_of(variable)}
        unknown = []
        for captured, placeholder in traced.graph.captures:
            if captured.dtype != tf.resource:
                continue
            if id(captured) in known:
                self._captured.setdefault(id(captured), known[id(captured)])
            elif writers := _writers(placeholder):
                unknown.append((captured, writers[0]))
        tables = {  # that can be saved, by path, each by the id of its handle
            id(thing.resource_handle): {path: state_of(thing)}
            for path, thing, *_ in (walk(self._steps) if unknown else ())
            if isinstance(thing, tf.lookup.experimental.MutableHashTable)
        }
        for captured, _ in unknown:
            self._tables |= tables.get(id(captured), {})
        unsaved = [
            (f"the table or queue that {writer.type} changes{_line_of(writer)}", OTHER)
            for captured, writer in unknown
            if id(captured) not in tables
        ]
        self.tell([*unsaved, *_draws(traced.graph)])

    def tell(self, unsaved: Sequence[Unsaved]) -> None:
        """Note what was found; raise UsageError if there is anything, and it is not allowed."""
        if unsaved and not self._allows_inexact:
            names = ", ".join(dict.fromkeys(name for name, _ in unsaved))
            remedies = "; ".join(dict.fromkeys(remedy for _, remedy in unsaved))
            hint = f"{remedies}; or add --allow_inexact to train all the same"
            why = "so a resumed run would have other bits"
            raise UsageError(f"no checkpoint holds {names}, {why}; {hint}")
        self.found += [name for name, _ in unsaved if name not in self.found]

    def variables(self) -> dict[str, Any]:
        """Return all variables besides the model's weights, by group; see `Checkpoint`."""
        is_of_model = self._iterator is None
        groups = dict(variables_of(self._model) if is_of_model else self._iterator.variables())
        # Without a graph, all that is there counts; an iterator's groups have that already.
        takes_all = is_of_model and not self._has_graph
        return groups | {"others": self._others(groups, takes_all)}

    def load_others(self, path: Path, states: Mapping[str, Any]) -> None:
        """Give model and iterator, for evaluation, a checkpoint's `states` and other variables."""
        saved = read_others(path)
        wanted = self.variables()["others"] if saved else {}
        for name in saved.keys() & wanted.keys():
            if saved[name].shape == tuple(wanted[name].shape):
                wanted[name].assign(saved[name])
        known = self.states() if states else {}
        for name in states.keys() & known.keys():
            known[name].put(states[name])

    def _others(self, groups: Mapping[str, Sequence[Any]], takes_all: bool) -> dict[str, Any]:
        """Return the variables that are in no group, by the path from what they hang on."""
        weights = self._model.weights if isinstance(self._model, keras.Model) else []
        position = self._iterator.of_position() if self._iterator is not None else []
        saved = {
            id(handle)
            for variable in [*weights, *position, *(v for group in groups.values() for v in group)]
            for handle in handles_of(variable)
        }
        wanted = {key for key in self._captured if key not in saved}
        if not self._has_graph:
            made = _handles_of_made()
            if made.keys() - self._captured.keys():
                gc.collect()  # what only cycles hold is not used any more
                made = _handles_of_made()
            self._captured |= made
        named: list[tuple[str, Any]] = []

        def take(reached: Iterable[objects.Reached], take_all: bool) -> None:
            for path, thing, keeper, keeper_path in reached:
                if not isinstance(thing, VARIABLES):
                    continue
                handles = {id(handle) for handle in handles_of(thing)}
                if handles & saved or not (take_all or handles & wanted):
                    continue
                saved.update(handles)
                wanted.difference_update(handles)
                named.append((f"{keeper_path}/{path_of(thing)}" if keeper else path, thing))

        own = [self._model, self._iterator]
        take(walk(self.around | self._data, own), take_all=True)
        if wanted or takes_all:
            if not (self._reached and self._has_graph):
                self._reached = [r for r in walk(self._steps) if isinstance(r.thing, VARIABLES)]
            take(self._reached, takes_all)
        for handle, variable in self._captured.items():
            if handle not in saved:
                saved |= {id(each) for each in handles_of(variable)}
                named.append((path_of(variable), variable))
        return by_unique_path(named)

    def states(self) -> dict[str, objects.State]:
        """Return how to save what is not a variable, such as generators, by the path to it."""
        passed_by = self._passed_by()
        if self._iterator is None and self._has_graph:
            passed_by.append(self._model)
        owners = self._steps | self.around
        if not self._has_graph:
            owners["eager_draws"] = keras_private.eager_generator()
        found = dict(self._tables)
        held: set[int] = set()
        for path, thing, *_ in walk(owners, passed_by):
            state = state_of(thing)
            if state is not None and (not state.tensors or not state.tensors <= held):
                held |= state.tensors
                found[path] = state
        return found

    def _passed_by(self) -> list[Any]:
        """Return data, which is a function of position, and what an iterator saves by itself."""
        iterator, passed_by = self._iterator, list(self._data["data"])
        if iterator is not None:
            passed_by += [*iterator.datasets.values(), *iterator.saved_by_itself()]
        return passed_by

    def require_reached(self) -> None:
        """Raise UsageError for what PyTorch made with an iterator, and hangs on nothing known."""
        gc.collect()  # what only cycles hold is not used any more
        alive = [thing for ref in _made_of_torch if (thing := ref()) is not None]
        owners = self._steps | self._data if alive else {}
        reached = {id(thing) for _, thing, *_ in walk(owners)}
        modules = [t for t in alive if id(t) in reached and hasattr(type(t), "named_modules")]
        held = {id(inner) for module in modules for inner in module.modules()}
        for thing in alive:
            if id(thing) not in reached | held and state_of(thing) is not None:
                name = f"a {type(thing).__name__} that neither iterator nor model names"
                self.tell([(name, "make it an attribute of the iterator")])

    def tell_changes(self) -> None:
        """Warn of what only Python holds, has changed since the first call, and is not saved."""
        if self._num_looks == LOOKS_FOR_CHANGES:
            return
        self._num_looks += 1
        if self._num_looks == 1:
            self._own = [
                (path, thing, callback_state.plain_attributes(thing))
                for path, thing, *_ in walk(self._steps | self.around, self._passed_by())
                if is_of_project(type(thing)) and not getattr(type(thing), "only_tells", False)  # type: ignore[arg-type]
            ]
        for path, thing, before in self._own:
            now = callback_state.plain_attributes(thing)
            names = objects.attributes_of_project(type(thing))  # type: ignore[arg-type]
            if changed := [name for name in names if now.get(name) != before.get(name)]:
                self._own = [each for each in self._own if each[1] is not thing]
                log.warning(
                    f"{path} ({type(thing).__name__}) changes its {', '.join(changed)}, which no "
                    "checkpoint holds: a resumed run may differ; give it get_state() and "
                    "set_state(state), with JSON values, or only_tells = True if it only shows"
                )


def _handles_of_made() -> dict[int, Any]:
    """Return the variables that were made and are alive, by the ids of their handles."""
    alive = [variable for ref in _made if (variable := ref()) is not None]
    return {id(handle): variable for variable in alive for handle in handles_of(variable)}


@contextlib.contextmanager
def noting_variables() -> Iterator[None]:
    """Within the block, note each variable that is made."""
    _made.clear()

    def make(next_creator: Callable[..., Any], **arguments: Any) -> Any:
        variable = next_creator(**arguments)
        _made.append(weakref.ref(variable))
        return variable

    with tf.variable_creator_scope(make):
        yield


@contextlib.contextmanager
def noting_torch() -> Iterator[None]:
    """Within the block, note what PyTorch makes that has a state."""
    before = gc.get_objects()  # held until the end, so that nothing new has an id of theirs
    yield
    found = gc.get_objects() if "torch" in sys.modules else []
    kinds = {kind for kind in map(type, found) if hasattr(kind, "load_state_dict")}
    known = set(map(id, before))
    stateful = [thing for thing in found if type(thing) in kinds and id(thing) not in known]
    _made_of_torch[:] = map(weakref.ref, stateful)


def _draws(graph: Any) -> list[Unsaved]:
    """Return the operations that draw from, or keep, what is in no variable."""
    found = [op for op in _operations(graph) if _kind(op).draws or op.type in CALLS_PYTHON]
    return [
        (f"what the Python function of {op.type} keeps{_line_of(op)}", PYTHON)
        if op.type in CALLS_PYTHON
        else (f"the random state of {op.type}{_line_of(op)}", RANDOM)
        for op in _read(found)
    ]


def _operations(graph: Any) -> Iterator[Any]:
    """Yield all operations of a graph, and of the functions that it calls."""
    seen: set[str] = set()
    graphs = [graph]
    while graphs:
        graph = graphs.pop()
        for op in graph.get_operations():
            yield op
            for name in _functions_of(op):
                inner = keras_private.graph_of(graph, name) if name not in seen else None
                seen.add(name)
                if inner is not None:
                    graphs.append(inner)


def _functions_of(op: Any) -> list[str]:
    values = [op.get_attr(attribute) for attribute in _kind(op).functions]
    functions = [each for v in values for each in (v if isinstance(v, list) else [v])]
    return [each.name for each in functions if each.name]


class _Kind:
    """What there is to know of a type of operations."""

    def __init__(self, definition: Any) -> None:
        attributes = definition.attr
        self.functions = [attribute.name for attribute in attributes if "func" in attribute.type]
        has_seed = any(attribute.name == "seed" for attribute in attributes)
        self.draws = has_seed and (definition.is_stateful or definition.name in DRAW_ALL_THE_SAME)
        self.is_stateful = definition.is_stateful


_kinds: dict[str, _Kind] = {}


def _kind(op: Any) -> _Kind:
    if op.type not in _kinds:
        _kinds[op.type] = _Kind(op.op_def)
    return _kinds[op.type]


def _read(found: Sequence[Any]) -> list[Any]:
    """Return those operations on whose outputs a result or a variable depends."""
    needed: set[int] = set()
    for graph in {id(op.graph): op.graph for op in found}.values():
        of_graph = {id(op) for op in found if op.graph is graph}
        open_ops = [tensor.op for tensor in graph.outputs]
        stateful = (op for op in graph.get_operations() if _kind(op).is_stateful)
        open_ops += [op for op in stateful if id(op) not in of_graph]
        while open_ops:
            op = open_ops.pop()
            if id(op) not in needed:
                needed.add(id(op))
                open_ops += [tensor.op for tensor in op.inputs]
    return [op for op in found if id(op) in needed]


def _writers(tensor: Any) -> list[Any]:
    """Return the operations that may change a resource which is not a variable."""
    found: list[Any] = []
    for op in tensor.consumers():
        names = _functions_of(op)
        if not names:
            found += [] if op.type.startswith(READERS) else [op]
            continue
        number = next(n for n, each in enumerate(op.inputs) if each is tensor)
        for inner in (keras_private.graph_of(op.graph, name) for name in names):
            # The inputs of If and Case begin with the condition, which the branches are not given.
            offset = len(op.inputs) - len(inner.inputs) if inner is not None else 0
            if inner is None or not 0 <= number - offset < len(inner.inputs):
                found.append(op)
            else:
                found += _writers(inner.inputs[number - offset])
    return found


def _line_of(op: Any) -> str:
    """Return ", in file, line number" of the user's line that made an operation, or ""."""
    own = [frame for frame in op.traceback if objects.is_own(frame.filename)]
    if not own:
        return ""
    path = Path(own[-1].filename)  # the loop's own lines call the step; the user's is the innermost
    shown = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path.name
    return f", in {shown}, line {own[-1].lineno}"
