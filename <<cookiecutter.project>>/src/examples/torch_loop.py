#!/usr/bin/env python
"""Trains in a loop of PyTorch's own (`pip install torch`); vegab does the rest.

python src/examples/torch_loop.py root results/torch_loop --num_epochs=5

The same command continues an interrupted run bit for bit: order of examples and dropout depend only
on seed and epoch, and `model.pt` has all the rest."""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import vegab
from engine.checkpoints import csv_lines
from vegab import Key
from vegab.files import replacing, write_atomically

registry = vegab.ConfigRegistry()
SETTINGS = {
    "n_filters": Key(16, "filters of the convolution"),
    "dropout": Key(0.2, "dropout rate before the last layer"),
    "batch_size": Key(32, "examples per step"),
    "learning_rate": Key(0.001, "learning rate of Adam"),
    "num_epochs": Key(10, "epochs in all; a larger number continues a finished run"),
    "seed": Key(0, "seed of initial weights, order of examples and dropout"),
}
registry.set_root_config(SETTINGS)


def build(config: dict[str, Any]) -> Any:
    """Return the model; refuse, before a folder is made, if PyTorch is missing."""
    try:
        import torch
    except ModuleNotFoundError:
        raise vegab.UsageError("PyTorch is missing; type pip install torch") from None
    torch.manual_seed(config["seed"])
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, config["n_filters"], 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.MaxPool2d(2),
        torch.nn.Flatten(),
        torch.nn.Dropout(config["dropout"]),
        torch.nn.Linear(16 * config["n_filters"], 10),
    )


def train(config: dict[str, Any], save_path: str, model: Any) -> None:
    """Train a small network of PyTorch on the digits into the folder SAVE_PATH."""
    import numpy as np
    import torch
    from torch.utils.data import DataLoader, TensorDataset

    from src.data import DIGITS

    with np.load(DIGITS) as file:
        images = torch.from_numpy(file["images"][:, np.newaxis]).float() / 16
        labels = torch.from_numpy(file["labels"]).long()
    part = torch.arange(len(labels)) // 10 % 10  # 8 and 9 are the test set, which is not used
    digits = TensorDataset(images[part < 7], labels[part < 7])
    batches = DataLoader(digits, config["batch_size"], shuffle=True)
    valid, valid_labels = images[part == 7], labels[part == 7]
    loss_of = torch.nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=config["learning_rate"])
    checkpoint = Path(save_path, "model.pt")
    history: list[dict[str, float]] = []
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        history = saved["history"]
        write_history(save_path, history)  # a kill may have come between the two files

    for epoch in range(len(history), config["num_epochs"]):
        torch.manual_seed(config["seed"] + epoch + 1)
        model.train()
        losses = []
        for batch, batch_labels in batches:
            loss = loss_of(model(batch), batch_labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        model.eval()
        with torch.no_grad():
            logits = model(valid)
        row = {
            "epoch": epoch,
            "step": (epoch + 1) * len(batches),
            "loss": sum(losses) / len(losses),
            "val_loss": loss_of(logits, valid_labels).item(),
            "val_accuracy": (logits.argmax(dim=1) == valid_labels).float().mean().item(),
        }
        history.append(row)
        print(", ".join(f"{name} {value:.4g}" for name, value in row.items()))

        states = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        with replacing(checkpoint) as temporary:
            torch.save({**states, "history": history}, temporary)
        write_history(save_path, history)


def write_history(save_path: str, history: list[dict[str, float]]) -> None:
    """Write a row per epoch to `history.csv`."""
    write_atomically(Path(save_path, "history.csv"), csv_lines(list(history[0]), history))


if __name__ == "__main__":
    vegab.wrap(registry, train, prepare=build)
