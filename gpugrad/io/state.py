"""Training state as nested Python values, to and from the flat tensors of a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpugrad.core.tensor import Tensor
from gpugrad.io.errors import CheckpointCorruptError, CheckpointError

__all__ = ["pack", "unpack"]

_STATE_KEY = "state"


def pack(state: Mapping[str, Any]) -> tuple[dict[str, NDArray[Any]], dict[str, str]]:
    """Split nested training state into the tensors and the metadata of a checkpoint.

    `state` is a dict to NumPy arrays and scalars of any shape and dtype, tensors, None, bools, ints
    of any size, floats, strings, and lists, tuples and dicts of these. Keys are strings or, all of
    one dict, ints. An array is named by its path, its parts joined with dots; everything else goes,
    as JSON, under `"state"` in the metadata. `unpack` restores it exactly, save that every mapping
    comes back as a dict, and every tensor as a NumPy array.

    Raises `CheckpointError`, naming the path, for a value of another type, a key of another type,
    and two arrays of one name.

    >>> state = {"model": {"0.weight": np.zeros(2)}, "optimizer": {"lr": 0.1, "betas": (0.9, 0.99)}}
    >>> tensors, metadata = pack(state)
    >>> tensors
    {'model.0.weight': array([0., 0.])}
    >>> unpack(tensors, metadata)["optimizer"]
    {'lr': 0.1, 'betas': (0.9, 0.99)}
    """
    tensors: dict[str, NDArray[Any]] = {}
    tree = _encode(state, "", tensors)
    return tensors, {_STATE_KEY: json.dumps(tree)}


def unpack(tensors: Mapping[str, NDArray[Any]], metadata: Mapping[str, str]) -> dict[str, Any]:
    """Restore the state that `pack` was given from the tensors and metadata it returned.

    The arrays of the result are those of `tensors`, not copies; other metadata are ignored.

    Raises `CheckpointError` when `metadata` have no packed state (as in a file of another program,
    whose tensors are used as they are), `CheckpointCorruptError` when it cannot be read, or names
    other tensors than there are.
    """
    if _STATE_KEY not in metadata:
        raise CheckpointError(
            f"the metadata have no {_STATE_KEY!r}, so these tensors were not packed by gpugrad; "
            "use them as they are"
        )
    rest = dict(tensors)
    try:
        state = _decode(json.loads(metadata[_STATE_KEY]), rest)
    except KeyError as error:
        raise CheckpointCorruptError(f"packed state names a tensor not there: {error}") from error
    except (ValueError, TypeError, RecursionError) as error:
        raise CheckpointCorruptError(f"packed state cannot be read: {error}") from error
    if rest:
        raise CheckpointCorruptError(
            f"packed state does not name these tensors: {', '.join(sorted(rest))}"
        )
    if not isinstance(state, dict):
        raise CheckpointCorruptError("packed state is not a dict")
    return state


# In the JSON a dict with one key that begins with $ stands for something JSON has not: an array
# {"$array": name}, a NumPy scalar {"$scalar": name}, a tuple {"$tuple": [...]}, a dict of integer
# keys {"$ints": {"0": ...}}, or a dict {"$dict": {...}} that would itself look like one of these.


def _encode(value: Any, path: str, tensors: dict[str, NDArray[Any]]) -> Any:
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Tensor):
        value = value.detach().cpu().numpy()
    if isinstance(value, np.ndarray | np.generic):
        if path in tensors:
            raise CheckpointError(f"two arrays would both be called {path!r}; rename one")
        tensors[path] = np.asarray(value)
        return {"$array" if isinstance(value, np.ndarray) else "$scalar": path}
    if type(value) in (list, tuple):
        items = [_encode(item, _join(path, str(i)), tensors) for i, item in enumerate(value)]
        return items if type(value) is list else {"$tuple": items}
    if isinstance(value, Mapping):
        if value and all(type(key) is int for key in value):
            named = {str(key): item for key, item in value.items()}
            return {"$ints": {k: _encode(v, _join(path, k), tensors) for k, v in named.items()}}
        if odd := [key for key in value if type(key) is not str]:
            raise CheckpointError(
                f"{path or 'state'}: key {odd[0]!r} is not a string, and not all keys are integers"
                "; use str()"
            )
        tree = {key: _encode(item, _join(path, key), tensors) for key, item in value.items()}
        return {"$dict": tree} if len(tree) == 1 and next(iter(tree)).startswith("$") else tree
    raise CheckpointError(
        f"{path}: a checkpoint cannot hold {type(value).__name__}; "
        "store arrays, numbers, strings, lists, tuples or dicts"
    )


def _decode(tree: Any, tensors: dict[str, NDArray[Any]]) -> Any:
    if isinstance(tree, list):
        return [_decode(item, tensors) for item in tree]
    if not isinstance(tree, dict):
        return tree
    if len(tree) == 1:
        tag, content = next(iter(tree.items()))
        if tag.startswith("$"):
            return _TAGS[tag](content, tensors)
    return _dict(tree, tensors)


def _dict(tree: dict[str, Any], tensors: dict[str, NDArray[Any]]) -> dict[str, Any]:
    return {key: _decode(item, tensors) for key, item in tree.items()}


_TAGS: dict[str, Callable[[Any, dict[str, NDArray[Any]]], Any]] = {
    "$array": lambda name, tensors: tensors.pop(name),
    "$scalar": lambda name, tensors: tensors.pop(name)[()],
    "$tuple": lambda items, tensors: tuple(_decode(items, tensors)),
    "$ints": lambda tree, tensors: {int(k): v for k, v in _dict(tree, tensors).items()},
    "$dict": _dict,
}


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key
