"""Trains parts of a model by losses of their own: in one step, by turns, or from a list."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import tensorflow as tf

from engine.iterators.base import Feeds, TFHookedModelIterator, _tensors, _variables_of, figures_in


class TFBaseTrainer(TFHookedModelIterator):
    """Trains named parts of a model, each by its own loss and optimizer.

    A part is an attribute of the model that has variables (`model.generator`), or else all
    trainable variables with its name in their path. Config: `optimizer` ("adam"), `lr` (0.001),
    `beta1`, `beta2`; with `lr_end`, `lr_decay_begin` and `lr_decay_end` the rate goes in a straight
    line from `lr` to `lr_end` between these steps.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.optimizers: dict[str, keras.Optimizer] = {}

    def make_loss_ops(self, model: Any, **batch: Any) -> Any:
        """Return the loss, a scalar, of each part by its name."""
        raise NotImplementedError(f"{type(self).__name__} has no make_loss_ops")

    def make_log_ops(self, model: Any, **batch: Any) -> Mapping[str, Any]:
        """Return further scalars for the history, of training and validation."""
        return {}

    def step_ops(self) -> Any:
        return {"train_op": self.train_op}

    def train_op(self, model: Any, **batch: Any) -> dict[str, Any]:
        """Make a step of all parts; return losses and logs."""
        return self._train(None, None, model, **batch)

    def known_ops(self) -> Iterator[tuple[str, Any]]:
        yield from super().known_ops()
        if "validation" in self.datasets and type(self).validate is TFBaseTrainer.validate:
            yield "validation", self._look_at_losses

    def validate(self, batch: Feeds) -> Mapping[str, float]:
        computed = self.run({"step_ops": self._look_at_losses}, batch)["step_ops"]
        return figures_in(computed)

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
        losses = tf.function(
            lambda feeds: self.make_loss_ops(self.model, **feeds), autograph=False
        ).get_concrete_function(_tensors(batch))
        entries = losses.structured_outputs
        for number, entry in enumerate(entries if isinstance(entries, list) else [entries]):
            for part in entry:
                variables = self.part_variables(part)
                key = f"{number}/{part}" if isinstance(entries, list) else part
                if key not in self.optimizers:
                    optimizer = self.make_optimizer(part)
                    optimizer.build(variables)
                    self.optimizers[key] = optimizer

    def make_optimizer(self, part: str) -> keras.Optimizer:
        """Return a new optimizer for a part."""
        kind = type(keras.optimizers.get(self.config.get("optimizer") or "adam"))
        betas = {"beta_1": self.config.get("beta1"), "beta_2": self.config.get("beta2")}
        given = {name: value for name, value in betas.items() if value is not None}
        return kind(learning_rate=float(self.rate_at(0)), **given)

    def part_variables(self, part: str) -> list[Any]:
        """Return the trainable variables of a part; ValueError if there are none."""
        found = getattr(getattr(self.model, part, None), "trainable_variables", None)
        if not found:
            every = [v for v in _variables_of(self.model)["variables"] if v.trainable]
            if isinstance(self.model, keras.Model):
                every = self.model.trainable_variables
            found = [variable for variable in every if part in variable.path]
        if not found:
            raise ValueError(
                f"make_loss_ops has a loss for {part!r}; the model has neither an attribute nor a "
                "trainable variable of that name"
            )
        return list(found)

    def _train(
        self, entry: int | None, parts: Sequence[str] | None, model: Any, **batch: Any
    ) -> dict[str, Any]:
        with tf.GradientTape(persistent=True) as tape:
            losses = self.make_loss_ops(model, **batch)
            losses = losses if entry is None else losses[entry]
        rate = self.rate_at(self._step_variable)
        for part in losses if parts is None else parts:
            variables = self.part_variables(part)
            optimizer = self.optimizers[part if entry is None else f"{entry}/{part}"]
            multiplier = 1.0 if entry is None else self.get_learning_rate_multiplier(entry)
            optimizer.learning_rate.assign(keras.ops.cast(rate * multiplier, "float32"))
            gradients = tape.gradient(losses[part], variables)
            optimizer.apply(gradients, variables)
        return {**_named(losses, entry is None), **self.make_log_ops(model, **batch)}

    def _look_at_losses(self, model: Any, **batch: Any) -> dict[str, Any]:
        losses = self.make_loss_ops(model, **batch)
        alone = not isinstance(losses, list)
        if not alone:
            losses = {part: loss for entry in losses for part, loss in entry.items()}
        return {**_named(losses, alone), **self.make_log_ops(model, **batch)}

    def get_learning_rate_multiplier(self, index: int) -> float:
        """Return the factor on the learning rate of the losses at `index` of a list."""
        return 1.0


class _Turns(TFBaseTrainer):
    """Trains something else at each step, by turns."""

    def turns(self) -> list["_Turn"]:
        """Return what is trained at step 0, 1, …, from the beginning again at its end."""
        raise NotImplementedError

    def step_ops(self) -> Any:
        turns = self.turns()
        return {"train_op": turns[self._global_step % len(turns)]}

    def known_ops(self) -> Iterator[tuple[str, Any]]:
        yield from super().known_ops()
        for turn in dict.fromkeys(self.turns()):
            yield "train", {"train_op": turn}


class TFFrequencyTrainer(_Turns):
    """Trains one part after the other: `{generator: 2, critic: 1}` is g, g, c by global step.

    `opt_frequency` is an attribute of the class or a key of the config; as a list, its entries are
    a part, or a list of parts that are trained together.
    """

    opt_frequency: Mapping[str, int] | Sequence[str | Sequence[str]] = ()

    @property
    def schedule(self) -> list[tuple[str, ...]]:
        """The parts that are trained at step 0, 1, …, from the beginning again at its end."""
        frequency = self.config.get("opt_frequency") or self.opt_frequency
        if isinstance(frequency, Mapping):
            return [(part,) for part, number in frequency.items() for _ in range(number)]
        return [(entry,) if isinstance(entry, str) else tuple(entry) for entry in frequency]

    def turns(self) -> list["_Turn"]:
        """Return the parts that are trained at each step of the schedule."""
        return [_Turn(self, None, parts) for parts in self.schedule]

    def make_variables(self, batch: Feeds) -> None:
        """Make the optimizers, then trace the step of the first turn.

        Raises:
            ValueError: if there is no schedule, or a part in it has no loss.
        """
        if not self.schedule:
            raise ValueError(
                f"{type(self).__name__} has no opt_frequency; give one, such as "
                "{generator: 2, critic: 1}"
            )
        super().make_variables(batch)

    def make_optimizers(self, batch: Feeds) -> None:
        """Make an optimizer for each loss, of which every part in the schedule has one."""
        super().make_optimizers(batch)
        unknown = [part for turn in self.schedule for part in turn if part not in self.optimizers]
        if unknown:
            raise ValueError(
                f"opt_frequency names {unknown[0]!r}; make_loss_ops has losses for "
                f"{', '.join(self.optimizers)}"
            )


class TFListTrainer(_Turns):
    """Takes a list of losses in turn: `make_loss_ops` returns a list of dictionaries."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._num_entries = 1

    def turns(self) -> list["_Turn"]:
        return [_Turn(self, entry, None) for entry in range(self._num_entries)]

    def make_variables(self, batch: Feeds) -> None:
        super().make_variables(batch)
        self._num_entries = 1 + max(int(key.partition("/")[0]) for key in self.optimizers)


@dataclass(frozen=True)
class _Turn:
    """The step of some parts of a trainer; equal to others of the same parts, as `_compile` asks.

    A `partial` would be compiled anew at every step, for no two of them are equal.
    """

    trainer: TFBaseTrainer
    entry: int | None
    parts: tuple[str, ...] | None

    def __call__(self, model: Any, **batch: Any) -> Any:
        return self.trainer._train(self.entry, self.parts, model, **batch)


class TFBaseEvaluator(TFHookedModelIterator):
    """Evaluates: a given checkpoint, all that there are (`eval_all`), or each new one as it comes
    (`eval_forever`); see `bin/evaluate.py`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.test_mode = True


def _named(losses: Mapping[str, Any], alone: bool) -> dict[str, Any]:
    """Name losses for the history: "loss" where there is but one."""
    if alone and len(losses) == 1:
        return {"loss": next(iter(losses.values()))}
    return {f"loss_{part}": loss for part, loss in losses.items()}
