"""Nested tuples, lists and dictionaries of arrays, taken apart and put together again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def flatten(tree: Any) -> tuple[list[Any], Callable[[list[Any]], Any]]:
    """The leaves of ``tree`` in a fixed order, and the function that rebuilds the tree from leaves.

    Tuples (named ones too), lists and dictionaries are inner nodes, None is an empty one, and
    everything else is a leaf. Dictionaries are walked in order of insertion.

    >>> leaves, rebuild = flatten({"w": 1, "b": [2, None]})
    >>> leaves
    [1, 2]
    >>> rebuild([x * 10 for x in leaves])
    {'w': 10, 'b': [20, None]}
    """
    leaves: list[Any] = []
    build = _flatten(tree, leaves)

    def rebuild(values: list[Any]) -> Any:
        if len(values) != len(leaves):
            raise ValueError(f"a tree of {len(leaves)} leaves cannot hold {len(values)}")
        return build(iter(values).__next__)

    return leaves, rebuild


def _flatten(tree: Any, leaves: list[Any]) -> Callable[[Callable[[], Any]], Any]:
    if tree is None:
        return lambda _: None
    if isinstance(tree, dict):
        parts = {key: _flatten(value, leaves) for key, value in tree.items()}
        return lambda take: {key: part(take) for key, part in parts.items()}
    if isinstance(tree, tuple | list):
        items = [_flatten(value, leaves) for value in tree]
        kind = type(tree)
        if hasattr(tree, "_fields"):
            return lambda take: kind(*(part(take) for part in items))
        return lambda take: kind(part(take) for part in items)
    leaves.append(tree)
    return lambda take: take()
