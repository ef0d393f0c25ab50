"""Trains parts of a model by losses of their own: in one step, in turn, or from a list."""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import keras
import tensorflow as tf

from engine.iterators.base import Feeds, TFHookedModelIterator, figures_in, found_variables
from engine.trees import leaves, map_leaves

Losses = dict[tuple[Any, ...], Any]  # by the part's name, in a list after the number of the entry


class TFBaseTrainer(TFHookedModelIterator):
    """Trains named parts of a model, each by its own loss and optimizer.

    A part is an attribute of the model that has variables (`model.generator`), or else all
    trainable variables with its name in their path. Config: `optimizer` ("adam"), `lr` (0.001),
    `beta1` and `beta2` (of Adam: 0.5 and 0.9, as in EDflow); with `lr_end`, `lr_decay_begin` and
    `lr_decay_end` the rate goes in a straight line from `lr` to `lr_end` between these steps."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        decay = [key for key in ("lr_decay_begin", "lr_decay_end") if self.config.get(key)]
        if decay and self.config.get("lr_end") is None:
            self.logger.warning("%s: the rate stays at lr, because there is no lr_end", decay[0])
        self.optimizers: dict[str, keras.Optimizer] = {}
        self._turns: dict[Any, Callable[..., Any]] = {}

    @abstractmethod
    def make_loss_ops(self, model: Any, **batch: Any) -> Any:
        """Return the loss, a scalar, of each part by its name."""

    def make_log_ops(self, model: Any, **batch: Any) -> Mapping[str, Any]:
        """Return further scalars for the history, of training and validation."""
        return {}

    def turns(self) -> list[Any]:
        """Return what trains at step 0, 1, …, from the beginning again after the last one."""
        return [self.train_op]

    def step_ops(self) -> Any:
        turns = self.turns()
        return {"train_op": turns[self._global_step % len(turns)]}

    def train_op(self, model: Any, **batch: Any) -> dict[str, Any]:
        """Make a step of all parts; return losses and logs."""
        return self._train(None, None, model, **batch)

    def known_ops(self) -> Iterator[tuple[str, Any]]:
        yield from super().known_ops()
        if "validation" in self.datasets and type(self).validate is TFBaseTrainer.validate:
            yield "validation", self._compute_losses
        for turn in dict.fromkeys(self.turns()[1:]):
            yield "train", {"train_op": turn}

    def validate(self, batch: Feeds) -> Mapping[str, float]:
        return figures_in(self.run({"step_ops": self._compute_losses}, batch)["step_ops"])

    def rate_at(self, global_step: Any) -> Any:
        """Return the learning rate; `global_step` may be a tensor."""
        config = self.config
        begin, end = config.get("lr_decay_begin") or 0, config.get("lr_decay_end")
        rate = config["lr"] if config.get("lr") is not None else 0.001
        last = config.get("lr_end")
        end = end if end is not None else config.get("num_steps")
        if last is None or end is None:
            return rate
        share = (keras.ops.cast(global_step, "float32") - begin) / max(end - begin, 1)
        return rate + (last - rate) * keras.ops.clip(share, 0.0, 1.0)

    @property
    def learning_rate(self) -> float | None:
        return float(self.rate_at(self._global_step))

    def make_variables(self, batch: Feeds) -> None:
        self.make_optimizers(batch)
        super().make_variables(batch)

    def make_optimizers(self, batch: Feeds) -> None:
        """Make an optimizer for each loss that there is for a batch."""
        losses = tf.function(lambda feeds: self.make_loss_ops(self.model, **feeds), autograph=False)
        traced = losses.get_concrete_function(map_leaves(batch, tf.convert_to_tensor))
        for path, _ in leaves(traced.structured_outputs):
            variables = self.part_variables(path[-1])
            if _key(path) not in self.optimizers:
                optimizer = self.make_optimizer(path[-1])
                optimizer.build(variables)
                self.optimizers[_key(path)] = optimizer

    def make_optimizer(self, part: str) -> keras.Optimizer:
        """Return a new optimizer for a part."""
        kind = type(keras.optimizers.get(self.config.get("optimizer") or "adam"))
        given = {"beta_1": self.config.get("beta1"), "beta_2": self.config.get("beta2")}
        defaults = {"beta_1": 0.5, "beta_2": 0.9} if kind is keras.optimizers.Adam else {}
        given = defaults | {name: value for name, value in given.items() if value is not None}
        return kind(learning_rate=float(self.rate_at(0)), **given)

    def part_variables(self, part: str) -> list[Any]:
        """Return the trainable variables of a part; ValueError if there are none."""
        found = getattr(getattr(self.model, part, None), "trainable_variables", None)
        if not found:
            every = [v for v in found_variables(self.model)["variables"] if v.trainable]
            if isinstance(self.model, keras.Model):
                every = self.model.trainable_variables
            found = [variable for variable in every if part in variable.path]
        if not found:
            what = f"make_loss_ops has a loss for {part!r}"
            raise ValueError(f"{what}; the model has no attribute or variable of that name")
        return list(found)

    def get_learning_rate_multiplier(self, index: int) -> float:
        """Return the factor on the learning rate of the losses at `index` of a list."""
        return 1.0

    def _turn(self, entry: int | None, parts: Sequence[str] | None) -> Callable[..., Any]:
        """Return what trains some parts: always the same object, so that it is compiled once."""
        return self._turns.setdefault((entry, parts), partial(self._train, entry, parts))

    def _train(
        self, entry: int | None, parts: Sequence[str] | None, model: Any, **batch: Any
    ) -> dict[str, Any]:
        """Train parts, or all that an entry of a list has losses for."""
        with tf.GradientTape(persistent=True) as tape:
            losses = dict(leaves(self.make_loss_ops(model, **batch)))
        if entry is not None:
            losses = {path: loss for path, loss in losses.items() if path[0] == entry}
        multiplier = 1.0 if entry is None else self.get_learning_rate_multiplier(entry)
        rate = self.rate_at(self._step_variable) * multiplier
        for path in losses if parts is None else [(part,) for part in parts]:
            optimizer, variables = self.optimizers[_key(path)], self.part_variables(path[-1])
            optimizer.learning_rate.assign(keras.ops.cast(rate, "float32"))
            optimizer.apply(tape.gradient(losses[path], variables), variables)
        return {**_by_name(losses), **self.make_log_ops(model, **batch)}

    def _compute_losses(self, model: Any, **batch: Any) -> dict[str, Any]:
        losses = dict(leaves(self.make_loss_ops(model, **batch)))
        return {**_by_name(losses), **self.make_log_ops(model, **batch)}


class TFFrequencyTrainer(TFBaseTrainer):
    """Trains one part after the other: `{generator: 2, critic: 1}` is g, g, c by global step.

    `opt_frequency` is an attribute of the class or a key of the config; as a list, its entries are
    a part, or a list of parts that are trained together."""

    opt_frequency: Mapping[str, int] | Sequence[str | Sequence[str]] = ()

    @property
    def schedule(self) -> list[tuple[str, ...]]:
        """The parts that are trained at step 0, 1, …, from the beginning again at its end."""
        frequency = self.config.get("opt_frequency") or self.opt_frequency
        if isinstance(frequency, Mapping):
            return [(part,) for part, number in frequency.items() for _ in range(number)]
        return [(entry,) if isinstance(entry, str) else tuple(entry) for entry in frequency]

    def turns(self) -> list[Any]:
        return [self._turn(None, parts) for parts in self.schedule]

    def make_optimizers(self, batch: Feeds) -> None:
        """Make an optimizer for each loss. Raises ValueError for a part without one."""
        if not self.schedule:
            what = f"{type(self).__name__} has no opt_frequency"
            raise ValueError(f"{what}; give one, such as {{generator: 2, critic: 1}}")
        super().make_optimizers(batch)
        for part in (part for turn in self.schedule for part in turn):
            if part not in self.optimizers:
                there = f"make_loss_ops has losses for {', '.join(self.optimizers)}"
                raise ValueError(f"opt_frequency names {part!r}; {there}")


class TFListTrainer(TFBaseTrainer):
    """Takes a list of losses in turn: `make_loss_ops` returns a list of dictionaries."""

    def turns(self) -> list[Any]:
        last = max((int(key.partition("/")[0]) for key in self.optimizers), default=0)
        return [self._turn(entry, None) for entry in range(last + 1)]


class TFBaseEvaluator(TFHookedModelIterator):
    """Evaluates: a given checkpoint, all that there are (`eval_all`), or each new one as it comes
    (`eval_forever`); see `bin/evaluate.py`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.test_mode = True


def _key(path: tuple[Any, ...]) -> str:
    return "/".join(map(str, path))


def _by_name(losses: Losses) -> dict[str, Any]:
    """Name losses for the history: "loss" where there is only one, and no list."""
    if len(losses) == 1 and all(len(path) == 1 for path in losses):
        return {"loss": next(iter(losses.values()))}
    return {f"loss_{path[-1]}": loss for path, loss in losses.items()}
