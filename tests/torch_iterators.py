"""Iterators for PyTorch, some of which keep what no checkpoint holds; see `test_torch.py`.

The docstring of each says where its things hang, as the refusal does; without one it is accepted.
"""

import functools
import json
import sys
from collections import deque
from dataclasses import dataclass
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


class Scaler(Start):
    """iterator.scaler (GradScaler)"""

    def start(self) -> None:
        self.scaler = torch.amp.GradScaler("cpu")


class Optimizers(Start):
    """iterator.optimizers['conv'] (Adam)"""

    def start(self) -> None:
        self.optimizers = {"conv": adam(self.model.layers[0])}


class Schedulers(Start):
    """iterator.schedulers[0] (ExponentialLR)"""

    def start(self) -> None:
        self.schedulers = [torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.9)]


class Behind(Start):
    """iterator.scheduler.optimizer (Adam)"""

    def start(self) -> None:
        self.scheduler = torch.optim.lr_scheduler.ExponentialLR(adam(self.model), 0.9)


class Generators(Start):
    """iterator.generator (Generator), iterator.more['noise'] (Generator)"""

    def start(self) -> None:
        self.generator = torch.Generator()
        self.more = {"noise": torch.Generator()}


class InList(Start):
    """iterator.nets[0] (Sequential)"""

    def start(self) -> None:
        self.nets = [nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))]


class InModel(Start):
    """model.layers.hidden[0] (Linear)"""

    def start(self) -> None:
        self.model.layers.hidden = [nn.Linear(2, 2)]


class InClosure(Start):
    """net in iterator.call (Linear)"""

    def start(self) -> None:
        net = nn.Linear(2, 2)
        self.call = lambda image: net(image)


class InPartial(Start):
    """part of iterator.call[0] (Linear)"""

    def start(self) -> None:
        self.call = functools.partial(nn.functional.linear, nn.Linear(2, 2))


class InGlobal(Start):
    """SCALER in src.torch_iterators (GradScaler)"""

    def validate(self, batch: Any) -> Any:
        return {"scale": SCALER.get_scale()}


class InRegistry(Start):
    """NETS in src.torch_iterators['new'] (Linear)"""

    def start(self) -> None:
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


class InDeque(Start):
    """part of iterator.parts (Linear)"""

    def start(self) -> None:
        self.parts = deque([nn.Linear(2, 2)])


class Elsewhere(Start):
    """something that neither iterator nor model names (GradScaler)"""

    def start(self) -> None:
        vars(json)["scaler"] = torch.amp.GradScaler("cpu")


class Trained(Start):
    """iterator.temperature (Tensor)"""

    def start(self) -> None:
        self.temperature = torch.zeros(1, requires_grad=True)
        self.second = torch.optim.Adam([self.temperature])


class Sharpness(torch.optim.SGD):
    def __init__(self, base: torch.optim.Optimizer) -> None:
        super().__init__(base.param_groups, lr=0.1)
        self.base = base


class Within(Start):
    """iterator.sharpness.base (Adam)"""

    def start(self) -> None:
        self.sharpness = Sharpness(adam(self.model))


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


class SavesItself(Scaler):
    """"""

    def get_state(self) -> Any:
        return {**super().get_state(), "scaler": self.scaler.state_dict()}


class SavesFiles(TemplateIterator):
    def step_op(self, model: Any, **batch: Any) -> Any:
        return {}

    def save(self, checkpoint_path: str) -> None:
        torch.save(self.model.state_dict(), checkpoint_path)


class Fine(Start):
    def start(self) -> None:
        self.blocks = [*self.model.layers]
        self.views = {"parallel": nn.DataParallel(self.model), "relu": nn.ReLU()}
        rates = torch.optim.lr_scheduler
        parts = [rates.ConstantLR(self.optimizer), rates.ExponentialLR(self.optimizer, 0.9)]
        self.scheduler = rates.SequentialLR(self.optimizer, parts, milestones=[2])
        self.net = nn.Linear(2, 2)
        self.generator = torch.default_generator
        self.weights = torch.ones(10)


class Garbage(Start):
    def start(self) -> None:
        torch.amp.GradScaler("cpu")
        cycle = [nn.Linear(2, 2), torch.amp.GradScaler("cpu")]
        cycle.append(cycle)


def main() -> None:
    """Build each, and print what is said of it."""
    from configs import registry
    from engine.iterators import torch_guard
    from src import experiment
    from vegab import UsageError

    said = {}
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
        said[name] = (expected, refusal.removeprefix("no checkpoint holds "))
    json.dump(said, sys.stdout)
