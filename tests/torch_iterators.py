"""Iterators for PyTorch, some of which keep what no checkpoint holds; see `test_torch.py`.

The docstring of each says where its things hang, as the refusal does; without one it is accepted.
"""

import functools
import json
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from engine.iterators import PyHookedModelIterator, TemplateIterator
from src.examples.torch_classifier import TorchClassifierIterator

SCALER = torch.amp.GradScaler("cpu")
NETS: dict[str, Any] = {}


def adam(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(module.parameters())


class Start(TorchClassifierIterator):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.start()

    def start(self) -> None:
        pass


def said(refusal: str) -> Callable[[Callable[[Any], None]], Any]:
    """Make an iterator out of what starts it, with what is said of it as its docstring."""

    def make(start: Callable[[Any], None]) -> Any:
        names = {"start": start, "__doc__": refusal, "__module__": __name__}
        return type(start.__name__, (Start,), names)

    return make


@said("iterator.scaler (GradScaler)")
def scaler(it: Any) -> None:
    it.scaler = torch.amp.GradScaler("cpu")


@said("iterator.optimizers['conv'] (Adam)")
def optimizers(it: Any) -> None:
    it.optimizers = {"conv": adam(it.model.layers[0])}


@said("iterator.schedulers[0] (ExponentialLR)")
def schedulers(it: Any) -> None:
    it.schedulers = [torch.optim.lr_scheduler.ExponentialLR(it.optimizer, 0.9)]


@said("iterator.scheduler.optimizer (Adam)")
def behind(it: Any) -> None:
    it.scheduler = torch.optim.lr_scheduler.ExponentialLR(adam(it.model), 0.9)


@said("iterator.generator (Generator), iterator.more['noise'] (Generator)")
def generators(it: Any) -> None:
    it.generator = torch.Generator()
    it.more = {"noise": torch.Generator()}


@said("iterator.nets[0] (Sequential)")
def in_list(it: Any) -> None:
    it.nets = [nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))]


@said("model.layers.hidden[0] (Linear)")
def in_model(it: Any) -> None:
    it.model.layers.hidden = [nn.Linear(2, 2)]


@said("net in iterator.call (Linear)")
def in_closure(it: Any) -> None:
    net = nn.Linear(2, 2)
    it.call = lambda image: net(image)


@said("part of iterator.call[0] (Linear)")
def in_partial(it: Any) -> None:
    it.call = functools.partial(nn.functional.linear, nn.Linear(2, 2))


class InGlobal(Start):
    """SCALER in src.torch_iterators (GradScaler)"""

    def validate(self, batch: Any) -> Any:
        return {"scale": SCALER.get_scale()}


@said("NETS in src.torch_iterators['new'] (Linear)")
def in_registry(it: Any) -> None:
    NETS["new"] = nn.Linear(2, 2)


class OfClass(Start):
    """iterator.scaler (GradScaler)"""

    scaler = torch.amp.GradScaler("cpu")


class InSlots(Start):
    """part of iterator.parts (Linear)"""

    @dataclass(slots=True)
    class Parts:
        net: nn.Module

    def start(self) -> None:
        self.parts = self.Parts(nn.Linear(2, 2))


@said("part of iterator.parts (Linear)")
def in_deque(it: Any) -> None:
    it.parts = deque([nn.Linear(2, 2)])


@said("something that neither iterator nor model names (GradScaler)")
def elsewhere(it: Any) -> None:
    vars(json)["scaler"] = torch.amp.GradScaler("cpu")


@said("iterator.temperature (Tensor)")
def trained(it: Any) -> None:
    it.temperature = torch.zeros(1, requires_grad=True)
    it.second = torch.optim.Adam([it.temperature])


class Sharpness(torch.optim.SGD):
    def __init__(self, base: torch.optim.Optimizer) -> None:
        super().__init__(base.param_groups, lr=0.1)
        self.base = base


@said("iterator.sharpness.base (Adam)")
def within(it: Any) -> None:
    it.sharpness = Sharpness(adam(it.model))


class Late(Start):
    def train_op(self, *args: Any, **batch: Any) -> Any:
        if not hasattr(self, "second"):
            self.second = adam(self.model)
        return super().train_op(*args, **batch)


class PlainStart(PyHookedModelIterator):
    def step_ops(self) -> Any:
        return {"train_op": lambda model, **_: 0.0}


class Plain(PlainStart):
    """model (Classifier)"""


class Holder:
    def __init__(self, config: Any) -> None:
        self.nets = [nn.Linear(2, 2)]


class Saving(Holder):
    def get_state(self) -> Any:
        return {}

    def set_state(self, state: Any) -> None:
        pass


class HeldModel(PlainStart):
    """model.nets[0] (Linear)"""

    made_with = Holder


class SavingModel(PlainStart):
    made_with = Saving


class Beside(PlainStart):
    """iterator.optimizer (Adam)"""

    made_with = Saving

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.optimizer = adam(self.model.nets[0])


class SavesItself(Start):
    def start(self) -> None:
        self.scaler = torch.amp.GradScaler("cpu")

    def get_state(self) -> Any:
        return {**super().get_state(), "scaler": self.scaler.state_dict()}


class SavesFiles(TemplateIterator):
    def step_op(self, model: Any, **batch: Any) -> Any:
        return {}

    def save(self, checkpoint_path: str) -> None:
        torch.save(self.model.state_dict(), checkpoint_path)


@said("")
def fine(it: Any) -> None:
    it.blocks = [*it.model.layers]
    it.views = {"parallel": nn.DataParallel(it.model), "relu": nn.ReLU()}
    rates = torch.optim.lr_scheduler
    parts = [rates.ConstantLR(it.optimizer), rates.ExponentialLR(it.optimizer, 0.9)]
    it.scheduler = rates.SequentialLR(it.optimizer, parts, milestones=[2])
    it.net = nn.Linear(2, 2)
    it.generator = torch.default_generator
    it.weights = torch.ones(10)


@said("")
def garbage(it: Any) -> None:
    torch.amp.GradScaler("cpu")
    cycle = [nn.Linear(2, 2), torch.amp.GradScaler("cpu")]
    cycle.append(cycle)


def main(output: str) -> None:
    """Build each, and write what is said of it into a file."""
    from configs import registry
    from engine.iterators import torch_guard
    from src import experiment
    from vegab import UsageError

    found = {}
    for name, kind in [*globals().items()]:
        if not isinstance(kind, type) or not issubclass(kind, PyHookedModelIterator):
            continue
        if kind.__module__ != __name__ or name in ("Start", "PlainStart"):
            continue
        config = registry["iterator_torch"] | {"iterator": f"{__name__}.{name}"}
        if hasattr(kind, "made_with"):
            config["model"] = f"{__name__}.{kind.made_with.__name__}"
        NETS.clear()
        try:
            experiment.build(config).with_work(allow_inexact=False)
            refusal = ""
        except UsageError as error:
            refusal = str(error).partition(", so a resumed run would have")[0]
            assert torch_guard.REMEDY in str(error), error
        expected = kind.__dict__.get("__doc__") or ""
        found[name] = (expected, refusal.removeprefix("no checkpoint holds "))
    Path(output).write_text(json.dumps(found))
