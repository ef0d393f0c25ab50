"""Runs iterators in PyTorch, which is an extra: `pip install torch`."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from engine.iterators.base import Feeds, PyHookedModelIterator
from engine.trees import map_leaves


class TorchHookedModelIterator(PyHookedModelIterator):
    """Gives the functions of `step_ops` tensors of PyTorch; what they return becomes arrays.

    Arrays of 4 dimensions go from (batch, height, width, channels) to (batch, channels, height,
    width) and back, those of 3 get a channel, unless not `transform`."""

    transform = True

    def __init__(self, *args: Any, transform: bool | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if transform is not None:
            self.transform = transform

    def run(self, fetches: Mapping[str, Any], feed_dict: Feeds) -> Any:
        """Call the functions with tensors; return arrays."""
        results = super().run(fetches, map_leaves(feed_dict, self._to_torch))
        return map_leaves(results, self._from_torch)

    def evaluate(self, batch: Feeds) -> Mapping[str, Any]:
        return map_leaves(super().evaluate(map_leaves(batch, self._to_torch)), self._from_torch)

    def _to_torch(self, value: Any) -> Any:
        if not isinstance(value, np.ndarray) or value.dtype.kind not in "biuf":
            return value
        if self.transform and value.ndim == 3:
            value = value[..., np.newaxis]
        if self.transform and value.ndim == 4:
            # A copy: NumPy leaves one channel in the old order, in which PyTorch would go on.
            value = value.transpose(0, 3, 1, 2).copy()
        return torch.from_numpy(np.ascontiguousarray(value))

    def _from_torch(self, value: Any) -> Any:
        if not hasattr(value, "detach"):
            return value
        array = value.detach().cpu().numpy()
        return array.transpose(0, 2, 3, 1) if self.transform and array.ndim == 4 else array
