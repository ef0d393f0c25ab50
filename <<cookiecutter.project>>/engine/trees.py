"""Walks over nested dictionaries, lists and tuples."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np


def leaves(nested: Mapping[Any, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values in nested dictionaries, each by its keys joined with "/"."""
    for name, value in nested.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{path}{name}/")
        else:
            yield f"{path}{name}", value


def map_leaves(nested: Any, function: Callable[[Any], Any]) -> Any:
    """Call a function with every leaf of nested dictionaries, lists and tuples.

    The result has that shape, with lists for tuples. Unlike Keras' own, it takes a mapping of any
    kind, and leaves the order of the keys as it is.
    """
    if isinstance(nested, Mapping):
        return {key: map_leaves(item, function) for key, item in nested.items()}
    if isinstance(nested, list | tuple):
        return [map_leaves(item, function) for item in nested]
    return function(nested)


def call_leaves(fetches: Any, *arguments: Any, **feeds: Any) -> Any:
    """Call every function in nested dictionaries, lists and tuples; return results of that shape.

    What is not a function stays as it is.
    """
    return map_leaves(fetches, lambda leaf: leaf(*arguments, **feeds) if callable(leaf) else leaf)


def copied(nested: Any) -> Any:
    """Return nested dictionaries, lists (tuples too) and arrays anew; other leaves as they are."""
    return map_leaves(nested, lambda leaf: leaf.copy() if isinstance(leaf, np.ndarray) else leaf)
