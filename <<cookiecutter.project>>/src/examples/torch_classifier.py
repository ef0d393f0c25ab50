"""Classifies the bundled digits with PyTorch (`pip install torch`)."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from engine.iterators import TorchHookedModelIterator


class Classifier(nn.Module):
    """A small convolutional network; maps (batch, 1, 8, 8) to logits of shape (batch, 10)."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        torch.manual_seed(config["seed"])
        self.layers = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Dropout(0.2),
            nn.Linear(256, 10),
        )

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.layers(image)


class TorchClassifierIterator(TorchHookedModelIterator):
    """Trains a `Classifier` with Adam."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=self.config["lr"])

    def step_ops(self) -> Any:
        return {"train_op": self.train_op}

    def train_op(
        self, model: Classifier, image: torch.Tensor, label: torch.Tensor, **_: Any
    ) -> torch.Tensor:
        """Make a step; return the loss before it."""
        model.train()
        loss = nn.functional.cross_entropy(model(image), label.long())
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss

    def eval_op(self, model: Classifier, image: torch.Tensor, **_: Any) -> dict[str, Any]:
        model.train(not self.test_mode)
        with torch.no_grad():
            return {"labels": {"prediction": model(image).argmax(dim=1)}}
