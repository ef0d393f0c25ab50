"""Iterators for PyTorch that keep things wherever one can; see `test_torch.py`.

The docstring of each says where the states hang that a checkpoint holds besides the model's and the
optimizer's; "refused" and what is said for what nobody finds.
"""

import functools
import json
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from engine.iterators import PyHookedModelIterator
from src.examples.torch_classifier import TorchClassifierIterator

SCALER = torch.amp.GradScaler("cpu")
NETS: dict[str, Any] = {}
Rate = torch.optim.lr_scheduler.ExponentialLR


def adam(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(module.parameters())


class Start(TorchClassifierIterator):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.start()

    def start(self) -> None:
        pass


class Several(Start):
    """iterator.scaler, iterator.optimizers['conv'], iterator.schedulers[0]"""

    def start(self) -> None:
        self.scaler = torch.amp.GradScaler("cpu")
        self.optimizers = {"conv": adam(self.model.layers[0])}
        self.schedulers = [Rate(self.optimizer, 0.9)]


class Behind(Start):
    """iterator.scheduler, iterator.scheduler.optimizer"""

    def start(self) -> None:
        self.scheduler = Rate(adam(self.model), 0.9)


class Generators(Start):
    """iterator.generator, iterator.more['noise']"""

    def start(self) -> None:
        self.generator = torch.Generator()
        self.more = {"noise": torch.Generator()}


class InContainers(Start):
    """iterator.nets[0], iterator.parts[0], iterator.holder.net, model.layers.hidden[0]"""

    @dataclass(slots=True)
    class Holder:
        net: nn.Module

    def start(self) -> None:
        self.nets = [nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))]
        self.parts = deque([nn.Linear(2, 2)])
        self.holder = self.Holder(nn.Linear(2, 2))
        self.model.layers.hidden = [nn.Linear(2, 2)]


class InCode(Start):
    """iterator.part[0], net in src.torch_iterators.InCode.start.<locals>.<lambda>, src.torch_iterators.NETS['new'], src.torch_iterators.SCALER"""  # noqa: E501

    def start(self) -> None:
        net = nn.Linear(2, 2)
        self.call = lambda image: net(image)
        self.part = functools.partial(nn.functional.linear, nn.Linear(2, 2))
        NETS["new"] = nn.Linear(2, 2)

    def validate(self, batch: Any) -> Any:
        return {"scale": SCALER.get_scale(), "number": len(NETS)}


class Trained(Start):
    """iterator.second, iterator.temperature"""

    def start(self) -> None:
        self.temperature = torch.zeros(1, requires_grad=True)
        self.second = torch.optim.Adam([self.temperature])


class Elsewhere(Start):
    """refused a GradScaler that neither iterator nor model names"""

    def start(self) -> None:
        vars(json)["scaler"] = torch.amp.GradScaler("cpu")


class Plain(PyHookedModelIterator):
    """iterator.optimizer"""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.optimizer = adam(self.model)

    def step_ops(self) -> Any:
        return {"train_op": lambda model, **_: 0.0}


class SavesItself(Start):
    """none"""

    def start(self) -> None:
        self.scaler = torch.amp.GradScaler("cpu")

    def get_state(self) -> Any:
        return {"scaler": self.scaler.state_dict()}


class Everything(Start):
    """Trains by all kinds of state; its run is killed."""

    def start(self) -> None:
        self.scaler = torch.amp.GradScaler("cpu", init_scale=16.0, growth_interval=3)
        parts = {"conv": self.model.layers[0], "head": self.model.layers[5]}
        self.optimizers = {name: adam(part) for name, part in parts.items()}
        self.schedulers = [Rate(optimizer, 0.97) for optimizer in self.optimizers.values()]
        self.noise = torch.Generator()
        self.average = torch.zeros(10)

    def train_op(self, model: Any, image: Any, label: Any, **_: Any) -> Any:
        if not hasattr(self, "late"):  # what only the first step makes
            self.late = nn.Linear(10, 10)
        scores = model(image)
        scores = scores + 0.1 * torch.randn(scores.shape, generator=self.noise) + self.average
        self.average = 0.9 * self.average + 0.1 * scores.mean(0).detach()
        with torch.no_grad():
            self.late.weight += 0.01
        loss = nn.functional.cross_entropy(scores + self.late(scores), label.long())
        for optimizer in self.optimizers.values():
            optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        for optimizer in self.optimizers.values():
            self.scaler.step(optimizer)
        self.scaler.update()
        for scheduler in self.schedulers:
            scheduler.step()
        return {"loss": loss, "scale": torch.tensor(self.scaler.get_scale())}


def main(output: str) -> None:
    """Build each, and write into a file what is found."""
    from configs import registry
    from src import experiment
    from vegab import UsageError

    found = {}
    for name, kind in [*globals().items()]:
        is_iterator = isinstance(kind, type) and issubclass(kind, PyHookedModelIterator)
        if not is_iterator or kind.__module__ != __name__ or name in ("Start", "Everything"):
            continue
        config = registry["iterator_torch"] | {"iterator": f"{__name__}.{name}"}
        NETS.clear()
        try:
            work = experiment.build(config).with_work(allow_inexact=False).work
            assert work is not None
            states = {*work.guard.states()} - {"model", "iterator.optimizer", "eager_draws"}
            said = ", ".join(sorted(states)) or "none"
            if name == "Plain":
                said = ", ".join(sorted({*work.guard.states()} - {"model", "eager_draws"}))
        except UsageError as error:
            said = str(error).partition(", so a resumed run would have")[0]
            said = said.replace("no checkpoint holds", "refused")
        found[name] = (kind.__doc__, said)
    Path(output).write_text(json.dumps(found))
