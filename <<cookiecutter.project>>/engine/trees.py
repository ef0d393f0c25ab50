"""Walks over nested dictionaries, lists and tuples."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

Path = tuple[Any, ...]  # keys and indices


def leaves(nested: Any, path: Path = (), lists: bool = True) -> Iterator[tuple[Path, Any]]:
    """Yield path and value of each leaf; without `lists`, lists and tuples are leaves."""
    if isinstance(nested, Mapping):
        items: Any = nested.items()
    elif lists and isinstance(nested, list | tuple):
        items = enumerate(nested)
    else:
        yield path, nested
        return
    for key, item in items:
        yield from leaves(item, (*path, key), lists)


def by_path(nested: Mapping[Any, Any]) -> dict[str, Any]:
    """Return the values in nested dictionaries by their keys joined with "/"."""
    return {"/".join(map(str, path)): value for path, value in leaves(nested, lists=False)}


def map_leaves(nested: Any, function: Callable[[Any], Any]) -> Any:
    """Call a function with every leaf of nested dictionaries, lists and tuples, which become lists.
    Unlike Keras' own, it takes a mapping of any kind, and leaves the order of the keys as it is."""
    if isinstance(nested, Mapping):
        return {key: map_leaves(item, function) for key, item in nested.items()}
    if isinstance(nested, list | tuple):
        return [map_leaves(item, function) for item in nested]
    return function(nested)


def call_leaves(fetches: Any, *arguments: Any, **feeds: Any) -> Any:
    """Call each function among the leaves; what is not a function stays as it is."""
    return map_leaves(fetches, lambda leaf: leaf(*arguments, **feeds) if callable(leaf) else leaf)


def copied(nested: Any) -> Any:
    """Return nested dictionaries, lists (of tuples too), copies of arrays; other leaves as is."""
    return map_leaves(nested, lambda leaf: leaf.copy() if isinstance(leaf, np.ndarray) else leaf)


def named(nested: Any, prefix: str) -> dict[str, Any]:
    """Return the leaves by their keys joined with "_", in Keras' order. `prefix` stands before an
    index at the top, and for the key of a leaf that is not nested."""
    import keras

    found = {}
    for path, leaf in keras.tree.flatten_with_path(nested):
        keys = path if path and isinstance(path[0], str) else (prefix, *path)
        found["_".join(map(str, keys))] = leaf
    return found
