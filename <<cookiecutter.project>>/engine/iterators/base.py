"""Defines iterators: they say what one step of training does, and the training loop calls them.

They are EDflow's; `docs/iterators.md` lists them, `engine/iterators/steps.py` runs them."""

import logging
import re
import tempfile
from abc import abstractmethod
from collections import UserDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from engine import keras_private
from engine.batches import BatchSource, random_generator
from engine.checkpoints import require_inside
from engine.hooks import OF_EDFLOW, Hook, give_addresses, scalars_of
from engine.iterators import edflow
from engine.iterators.datasets import make_examples, stack
from engine.iterators.steps import IteratorSteps, IteratorValidation
from engine.training import KEEPERS, VARIABLES, handles_of, walk
from engine.trees import call_leaves, leaves, map_leaves

FIXED_EXAMPLES_STREAM = 4
Feeds = Mapping[str, Any]
# No attribute of the iterator: what hangs on it is searched for states.
_loop: ContextVar[Callable[[], Any]] = ContextVar("loop")


class NoOutputsError(TypeError):
    """An iterator has nothing to store."""


class PyHookedModelIterator:
    """Calls functions of the model and the batch; any framework, or none.

    A subclass returns them from `step_ops`. What a step may draw, and what of iterator and model is
    saved, stands in `docs/exactness.md`. `root` is the run folder; `code`, `checkpoints`, `train`
    and `eval` are folders in it."""

    def __init__(
        self,
        config: Mapping[str, Any],
        root: str,
        model: Any,
        datasets: Mapping[str, Any],
        hook_freq: int = 1,
        num_epochs: int = 1,
        hooks: Sequence[Hook] = (),
        **others: Any,
    ) -> None:
        edflow.check_arguments(self, others)
        self.config = config
        self.model = model  # what the config's `model` has made
        self.datasets = dict(datasets)  # by split, "train" and perhaps "validation"
        self.hook_freq = hook_freq
        self.num_epochs = num_epochs
        self.hooks = list(hooks)  # append yours; they act at every `hook_freq`-th step
        self.test_mode = bool(config.get("test_mode", False))  # is this an evaluation?
        self.logger = logging.getLogger(type(self).__name__)
        give_addresses(self, Path(root))
        self.set_position(0, 0, 0)
        self._has_begun = False
        self._fixed_examples: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        if name == "dataset":  # that of the split, unless a subclass has set another
            return self.datasets.get(self._split)
        raise edflow.missing(self, name)

    # ---- what a subclass gives ------------------------------------------------------------------
    @abstractmethod
    def step_ops(self) -> Any:
        """Return functions, nested as you like, of the model and the batch's entries by name."""

    def validate(self, batch: Feeds) -> Mapping[str, float]:
        """Return metrics of a validation batch; they are averaged into `val_…` of the history."""
        return {}

    def evaluate(self, batch: Feeds) -> Mapping[str, Any]:
        """Return what to store of each example of a batch: what `eval_op(model, **batch)` gives."""
        if not hasattr(self, "eval_op"):
            what = f"{type(self).__name__} has no eval_op(model, **batch)"
            raise NoOutputsError(f"{what}, so nothing can be stored")
        return self.eval_op(self.model, **batch)

    def get_state(self) -> dict[str, Any]:
        """Return JSON values and arrays that have to survive a kill, besides Keras' variables."""
        return {"model": self.model.get_state()} if hasattr(self.model, "get_state") else {}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Take back what `get_state` returned."""
        if "model" in state:
            self.model.set_state(state["model"])

    def set_weights(self, state: Mapping[str, Any]) -> None:
        """Take from another run's state what a new training of the same model begins with."""
        PyHookedModelIterator.set_state(self, state)

    # ---- what it can ask ------------------------------------------------------------------------
    def get_global_step(self, *_: Any, **__: Any) -> int:
        """Return the number of steps done."""
        return self._global_step

    def get_epoch_step(self, *_: Any, **__: Any) -> int:
        """Return the epoch, counted from 0."""
        return self._epoch

    def get_batch_step(self, *_: Any, **__: Any) -> int:
        """Return the step within the epoch, counted from 0."""
        return self._batch_step

    def get_split(self, *_: Any, **__: Any) -> str:
        """Return "train", or the split that is validated or evaluated."""
        return self._split

    def get_fixed_examples(self, split: str = "train") -> dict[str, Any]:
        """Return the examples at `fixed_example_indices(split)`, stacked as a batch is."""
        if split not in self._fixed_examples:
            indices = self.fixed_example_indices(split)
            self._fixed_examples[split] = stack([self.datasets[split][int(i)] for i in indices])
        return self._fixed_examples[split]

    def fixed_example_indices(self, split: str) -> list[int]:
        """Return the config's `fixed_example_indices[split]`, or else a batch drawn by the seed."""
        if split not in self.datasets:
            raise ValueError(f"no split {split!r}; the splits are {', '.join(self.datasets)}")
        length = len(self.datasets[split])
        given = (self.config.get("fixed_example_indices") or {}).get(split)
        if given is None:
            generator = random_generator(self.config.get("seed", 0), 0, FIXED_EXAMPLES_STREAM)
            number = min(self.config["batch_size"], length)
            return sorted(generator.choice(length, number, replace=False).tolist())
        if outside := [index for index in given if not 0 <= index < length]:
            what = f"fixed_example_indices.{split} has {outside[0]}"
            raise ValueError(f"{what}; give indices from 0 to {length - 1}")
        return list(given)

    # ---- what the loop does with it -------------------------------------------------------------
    def initialize(self, checkpoint_path: str | None = None) -> None:
        """Called once before the first step, with the checkpoint that is restored after it."""

    def begin(self, checkpoint_path: str | None = None) -> None:
        """Have it initialized, once."""
        if not self._has_begun:
            self._has_begun = True
            try:
                self.initialize(checkpoint_path)
            except Exception as error:
                if checkpoint_path is None:
                    raise
                what = f"initialize({checkpoint_path!r}): {type(error).__name__}: {error}"
                raise ValueError(f"{what}; it need not read what is restored after it") from error

    def iterate(self, batches: BatchSource) -> None:
        """Do what is left of the training, on these batches; a subclass may do more around it."""
        _loop.get()()

    def iterate_by(self, loop: Callable[[], Any], batches: BatchSource) -> None:
        """Have `iterate` call the training loop."""
        _loop.set(loop)
        for folder in (self.checkpoints, self.train, self.eval):
            Path(folder).mkdir(parents=True, exist_ok=True)  # a step may write there, as in EDflow
        self.iterate(batches)

    def run(self, fetches: Mapping[str, Any], feed_dict: Feeds) -> Any:
        """Call every function in `fetches` with the feeds; return results of the same shape."""
        return call_leaves(fetches, self.model, **feed_dict)

    def figures(self, results: Any) -> dict[str, float]:
        """Return the metrics among a step's results; a number without a name is the loss."""
        return figures_in(results.get("step_ops"))

    @property
    def learning_rate(self) -> float | None:
        """The rate in force, for the history; None: there is none to tell."""
        return None

    def variables(self) -> dict[str, list[Any]]:
        """Return the variables of Keras and TensorFlow that iterator and model have, by group."""
        return found_variables(self, self.of_position())

    def make_steps(self, source: BatchSource, seed: int) -> IteratorSteps:
        """Return what runs its steps on batches; `seed` is of the numbers that steps draw."""
        return IteratorSteps(self, source, seed)

    def make_validation(self, source: BatchSource, seed: int) -> IteratorValidation:
        """Return what validates on batches; `seed` is of the numbers that it draws."""
        return IteratorValidation(self, source, seed)

    def look_at_traces(self, look: Callable[[Any], None], batch: Feeds) -> None:
        """Call a function with each step that is traced; here none is."""

    def of_position(self) -> list[Any]:
        return []  # variables that tell a step where the run stands

    def saved_by_itself(self) -> list[Any]:
        """Return what need not be searched for states: `get_state` is written for it."""
        shipped = (PyHookedModelIterator.get_state, TemplateIterator.get_state)
        saves = getattr(type(self), "save", TemplateIterator.save) is not TemplateIterator.save
        if saves or type(self).get_state not in shipped:
            return [self, self.model]
        return [self.model] if hasattr(self.model, "get_state") else []

    def make_variables(self, batch: Feeds) -> None:
        """Make the variables that come into being with the first batch, without a step."""

    def set_position(
        self, global_step: int, epoch: int, batch_step: int, split: str = "train"
    ) -> None:
        """Tell where the run stands."""
        self._global_step, self._epoch = global_step, epoch
        self._batch_step, self._split = batch_step, split


class TemplateIterator(PyHookedModelIterator):
    """Has operations to train, to log and to evaluate, each computed only if somebody reads it. A
    subclass may save and restore in files of its own; these become part of the checkpoint."""

    @abstractmethod
    def step_op(self, model: Any, **batch: Any) -> Mapping[str, Any]:
        """Return functions without arguments: `train_op`, which trains and may return a loss, or
        metrics by name; `log_op`, a dictionary of "scalars", "images" and "figures", or of scalars;
        `eval_op`, one of arrays, with arrays under "labels"."""

    def save(self, checkpoint_path: str) -> None:
        """Write what has to survive a kill to a file or folder of that name."""

    def restore(self, checkpoint_path: str) -> None:
        """Read back what `save` has written."""

    def step_ops(self) -> Any:
        return self.step_op

    def run(self, fetches: Mapping[str, Any], feed_dict: Feeds) -> Any:
        """Train; all other operations are computed when somebody reads them."""
        results = super().run(fetches, feed_dict)
        if isinstance(results.get("step_ops"), Mapping):
            results["step_ops"] = LazyResults(results["step_ops"])
            self._trained(results["step_ops"])
        return results

    def _trained(self, ops: Mapping[str, Any]) -> dict[str, Any]:
        """Return the results of the operations that train: `train_ops`, or else "train_op"."""
        named = self.config.get("train_ops")
        names = [re.sub(OF_EDFLOW, "", name) for name in (["train_op"] if named is None else named)]
        if named and (unknown := {*names} - {*ops}):
            raise ValueError(f"train_ops names {min(unknown)}; step_op returns {', '.join(ops)}")
        return {name: ops[name] for name in names if name in ops}

    def figures(self, results: Any) -> dict[str, float]:
        return figures_in(self._trained(results.get("step_ops", {})))

    def validate(self, batch: Feeds) -> Mapping[str, float]:
        ops = self.step_op(self.model, **batch)
        return figures_in(scalars_of(ops["log_op"]())) if "log_op" in ops else {}

    def of_validation(self, number: int, names: Sequence[str]) -> list[Any]:
        """Return what operations give for a batch of the split "validation", if there is one."""
        if "validation" not in self.datasets:
            return []
        dataset, config = self.datasets["validation"], self.config
        size = min(config.get("test_batch_size") or config["batch_size"], len(dataset))
        indices = [(number * size + place) % len(dataset) for place in range(size)]
        batch = stack(make_examples(dataset, indices, config.get("seed", 0), epoch=0))
        self._split = "validation"
        try:
            ops = self.step_op(self.model, **batch)
            return [ops[name]() for name in names if name in ops]
        finally:
            self._split = "train"

    def evaluate(self, batch: Feeds) -> Mapping[str, Any]:
        ops = self.step_op(self.model, **batch)
        if "eval_op" not in ops:
            what = f"step_op of {type(self).__name__} returns no eval_op"
            raise NoOutputsError(f"{what}, so nothing can be stored")
        return ops["eval_op"]()

    def get_state(self) -> dict[str, Any]:
        """Return the files that `save` writes, and the state that any iterator has."""
        state = super().get_state()
        if type(self).save is not TemplateIterator.save:
            with tempfile.TemporaryDirectory() as name:
                self.save(str(Path(name, "checkpoint")))
                paths = [path for path in sorted(Path(name).rglob("*")) if path.is_file()]
                content = {str(path.relative_to(name)): path.read_bytes() for path in paths}
                state["files"] = {k: np.frombuffer(v, np.uint8) for k, v in content.items()}
        return state

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Have `restore` read the files; DamagedCheckpointError if one would lie elsewhere."""
        super().set_state(state)
        if "files" in state:
            require_inside(state["files"])
            with tempfile.TemporaryDirectory() as name:
                for relative, content in state["files"].items():
                    path = Path(name, relative)
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(np.asarray(content, np.uint8).tobytes())
                self.restore(str(Path(name, "checkpoint")))

    def set_weights(self, state: Mapping[str, Any]) -> None:
        """Have `restore` read the files; what it makes of them is up to it."""
        self.set_state(state)


class LazyResults(UserDict[str, Any]):
    """Results by name; one that is a function is called when it is read first."""

    def __getitem__(self, name: str) -> Any:
        value = super().__getitem__(name)
        value = value() if callable(value) else value
        self[name] = value = LazyResults(value) if isinstance(value, dict) else value
        return value


class TFHookedModelIterator(PyHookedModelIterator):
    """Compiles what `step_ops` returns, once for each set of functions and shapes of a batch."""

    MOST_COMPILED = 20

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._step_variable = tf.Variable(0, dtype=tf.int64, trainable=False)
        self._compiled: dict[Any, Any] = {}
        self._traced: list[Any] = []
        self._look: Callable[[Any], None] | None = None

    @property
    def is_training(self) -> bool:
        """What to give layers as `training`: false in validation, evaluation and `test_mode`."""
        return self._split == "train" and not self.test_mode

    def step_ops(self) -> Any:
        """Return the model's outputs; a subclass returns what trains it."""
        return self.outputs

    def outputs(self, model: keras.Model, **batch: Any) -> Any:
        """Call a Keras model with the entries of the batch that have its inputs' names."""
        if not getattr(model, "inputs", None):
            what = f"{type(model).__name__} is not a functional model"
            raise TypeError(f"{what}; write an iterator with an eval_op(model, **batch)")
        names = [tensor.name for tensor in model.inputs]
        if missing := [name for name in names if name not in batch]:
            raise ValueError(f"the batch has {', '.join(batch)}; the model's input is {missing[0]}")
        inputs = {name: batch[name] for name in names}
        outputs = model(inputs if len(names) > 1 else inputs[names[0]], training=self.is_training)
        return outputs if isinstance(outputs, dict) else {"outputs": outputs}

    def eval_op(self, model: Any, **batch: Any) -> Mapping[str, Any]:
        """Return what evaluation stores: the model's outputs; a subclass may return others."""
        return self.outputs(model, **batch)

    def evaluate(self, batch: Feeds) -> Mapping[str, Any]:
        return self.run({"step_ops": self.eval_op}, batch)["step_ops"]

    def run(self, fetches: Mapping[str, Any], feed_dict: Feeds) -> Any:
        """Call the functions under "step_ops" in one compiled call, all others as they are."""
        others = {name: item for name, item in fetches.items() if name != "step_ops"}
        results = call_leaves(others, self.model, **feed_dict)
        if "step_ops" in fetches:
            self._step_variable.assign(self._global_step)
            results["step_ops"] = keras.tree.map_structure(
                lambda value: value.numpy() if isinstance(value, tf.Tensor) else value,
                self._run_compiled(fetches["step_ops"], feed_dict),
            )
        return results

    def make_variables(self, batch: Feeds) -> None:
        self._run_compiled(self.step_ops(), batch, only_trace=True)

    def look_at_traces(self, look: Callable[[Any], None], batch: Feeds) -> None:
        """Trace what is known beforehand; call a function with that and with all later traces."""
        for split, ops in self.known_ops():
            self._split = split
            self._run_compiled(ops, batch, only_trace=True)
        self._split = "train"
        self._look = look
        for traced in self._traced:
            look(traced)

    def known_ops(self) -> Iterator[tuple[str, Any]]:
        """Yield split and functions of each kind of step that is known before the first."""
        yield "train", self.step_ops()

    def of_position(self) -> list[Any]:
        return [self._step_variable]

    def _run_compiled(self, ops: Any, batch: Feeds, only_trace: bool = False) -> Any:
        """Call functions, compiled, or only trace them; note what is traced."""
        key = (self.is_training, *leaves(ops))
        if key not in self._compiled:
            if len(self._compiled) == self.MOST_COMPILED:
                what = f"step_ops has returned {self.MOST_COMPILED} sets of functions"
                self.logger.warning(f"{what}, each compiled; return the same ones at every step")
            self._compiled[key] = tf.function(
                lambda feeds: call_leaves(ops, self.model, **feeds), autograph=False
            )
        function, feeds = self._compiled[key], map_leaves(batch, tf.convert_to_tensor)
        num_traces = function.experimental_get_tracing_count()
        result = (function.get_concrete_function if only_trace else function)(feeds)
        if function.experimental_get_tracing_count() != num_traces:
            self._traced.append(function.get_concrete_function(feeds))
            if self._look is not None:
                self._look(self._traced[-1])
        return result


def figures_in(results: Any) -> dict[str, float]:
    """Return the numbers among nested results by their path, in which `train_op` is left out."""
    figures = {
        "/".join(str(name) for name in path if name != "train_op") or "loss": float(value)
        for path, value in leaves(results)
        if isinstance(value, int | float | np.number) or getattr(value, "shape", None) == ()
    }
    if len(figures) == 1 and "".join(figures).isdigit():  # its place in a list is not a name
        return {"loss": sum(figures.values())}
    return figures


def found_variables(owner: Any, others: Sequence[Any] = ()) -> dict[str, list[Any]]:
    """Return the variables on an object and its `model`, other than a Keras model's weights."""
    groups: dict[str, list[Any]] = {"variables": [], "optimizer": [], "metrics": []}
    model = getattr(owner, "model", None)
    weights = model.weights if isinstance(model, keras.Model) else []
    seen = {id(handle) for variable in (*weights, *others) for handle in handles_of(variable)}
    # What looks at the steps in training is not there in evaluation, and leads to all of them.
    passed_by = [*getattr(owner, "datasets", {}).values(), getattr(owner, "_look", None)]
    found = [(each.thing, each.keeper) for each in walk({"model": model, "it": owner}, passed_by)]
    # What draws without a seed of its own draws from the global generator.
    for thing, keeper in [*found, (keras_private.seed_generator().state, None)]:
        if isinstance(thing, VARIABLES) and not seen & {*map(id, handles_of(thing))}:
            seen.update(map(id, handles_of(thing)))
            # An optimizer also lists the weights that it trains, which are not its own.
            own = {id(variable) for variable in getattr(keeper, "variables", ())}
            kinds = zip(("optimizer", "metrics"), KEEPERS, strict=False)
            names = [name for name, k in kinds if isinstance(keeper, k) and id(thing) in own]
            groups[names[0] if names else "variables"].append(thing)
    return groups
