"""Iterators for PyTorch, which is an extra: `pip install torch`."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from engine.iterators.base import Feeds, PyHookedModelIterator
from engine.trees import map_leaves

KEEP_STATE = (torch.nn.Module, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler)


class TorchHookedModelIterator(PyHookedModelIterator):
    """For PyTorch: the functions of `step_ops` are given tensors, what they return becomes arrays.

    Arrays of 4 dimensions go from (batch, height, width, channels) to (batch, channels, height,
    width) and back, those of 3 get a channel. The states of modules and optimizers among the
    attributes of iterator and model survive a kill; what else has a state is refused, see
    `engine/iterators/torch_guard.py`. Needs PyTorch (`pip install torch`).
    """

    transform = True  # the order of dimensions

    def run(self, fetches: Mapping[str, Any], feed_dict: Feeds) -> Any:
        """Call the functions with tensors; return arrays."""
        results = super().run(fetches, map_leaves(feed_dict, self._to_torch))
        return map_leaves(results, self._from_torch)

    def evaluate(self, batch: Feeds) -> Mapping[str, Any]:
        return map_leaves(super().evaluate(map_leaves(batch, self._to_torch)), self._from_torch)

    def get_state(self) -> dict[str, Any]:
        """Return the states of modules and optimizers, as arrays."""
        return {
            name: map_leaves(thing.state_dict(), _without_torch)
            for name, thing in self._parts().items()
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Load the states of modules and optimizers.

        Raises:
            ValueError: if there is a state of something that is not there yet.
        """
        parts = self._parts()
        if late := sorted(state.keys() - parts.keys()):
            raise ValueError(
                f"{', '.join(late)} is in the checkpoint, but {type(self).__name__} has none yet; "
                "make it in __init__"
            )
        for name, thing in parts.items():
            thing.load_state_dict(_with_torch(state[name]))

    def set_weights(self, state: Mapping[str, Any]) -> None:
        """Load the states of modules alone."""
        for name, thing in self._parts().items():
            if isinstance(thing, torch.nn.Module):
                thing.load_state_dict(_with_torch(state[name]))

    def _parts(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        owners = {"": self, "model.": self.model}
        for prefix, owner in owners.items():
            for name, value in vars(owner).items():
                if isinstance(value, KEEP_STATE) and value is not self.model:
                    found[prefix + name] = value
        if isinstance(self.model, torch.nn.Module):
            found = {name: part for name, part in found.items() if not name.startswith("model.")}
            found["model"] = self.model
        return found

    def _to_torch(self, value: Any) -> Any:
        if not isinstance(value, np.ndarray) or value.dtype.kind not in "biuf":
            return value
        if self.transform and value.ndim == 3:
            value = value[..., np.newaxis]
        if self.transform and value.ndim == 4:
            value = value.transpose(0, 3, 1, 2)
        return torch.from_numpy(np.ascontiguousarray(value))

    def _from_torch(self, value: Any) -> Any:
        if not hasattr(value, "detach"):
            return value
        array = value.detach().cpu().numpy()
        return array.transpose(0, 2, 3, 1) if self.transform and array.ndim == 4 else array


def _without_torch(value: Any) -> Any:
    return value.detach().cpu().numpy() if hasattr(value, "detach") else value


def _with_torch(state: Any) -> Any:
    """Return a state of PyTorch out of JSON values and arrays: the optimizers' keys are numbers."""
    if isinstance(state, Mapping):
        return {
            int(key) if key.isdecimal() else key: _with_torch(item) for key, item in state.items()
        }
    if isinstance(state, list):
        return [_with_torch(item) for item in state]
    if isinstance(state, np.ndarray | np.generic):
        return torch.from_numpy(np.array(state))
    return state
