"""Parts of a graph that are not kept but computed again when the walk back comes by.

Time for memory: of such a part only its inputs stay, until its gradient is asked for (Chen et al.,
"Training deep nets with sublinear memory cost", 2016).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from gpugrad.core.graph import FREED, MANY, Node, Pick, next_seq
from gpugrad.core.modes import enable_grad, is_grad_enabled, no_grad
from gpugrad.core.primitive import Primitive
from gpugrad.core.tensor import Tensor, tensor_of
from gpugrad.core.walk import walk
from gpugrad.errors import GraphError

__all__ = ["recomputed"]

Around = Callable[[], AbstractContextManager[Any]]

_PART = Primitive("checkpoint", lambda m: None, "", ("inputs",), True, {}, outputs="many")


class Part(Node):
    """A part of the graph that was computed without recording."""

    __slots__ = ("args", "around", "function", "kwargs", "outputs", "shapes")
    kind = MANY
    primitive = _PART

    def __init__(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        around: Around,
        outputs: Sequence[Tensor],
    ) -> None:
        self.function: Any = function
        self.args = args
        self.kwargs = kwargs
        self.around: Any = around
        self.outputs = len(outputs)
        self.shapes = tuple(y.shape for y in outputs)
        self.seq = next_seq()

    def vjp(self, g: Any) -> Any:
        return self.pull(g, None)

    def pop(self, g: Any) -> Any:
        pairs = self.pull(g, None)
        self.clear()
        return pairs

    def pull(self, g: Any, wrap: Callable[..., Any] | None) -> list[tuple[Any, Any]]:
        """Compute the part again, recording, and walk back through it."""
        since = next_seq()
        with enable_grad(), self.around():
            found = _several(self.function(*self.args, **self.kwargs))
        if tuple(y.shape for y in found) != self.shapes:
            raise GraphError(
                f"checkpoint: {_name(self.function)} returned {[y.shape for y in found]} when it "
                f"was computed again, and {list(self.shapes)} before; it must depend on nothing "
                "that changes"
            )
        seeds = [(y._node, g[i]) for i, y in enumerate(found) if y._node is not None and i in g]
        borrowed, owned = walk(seeds, retain=wrap is not None, wrap=wrap, since=since)
        return [*borrowed.items(), *owned.items()]

    def clear(self) -> None:
        self.seq = FREED
        self.args = ()
        self.kwargs = {}
        self.function = self.around = None

    def _tensors(self) -> list[Tensor]:
        return [x for x in (*self.args, *self.kwargs.values()) if isinstance(x, Tensor)]

    def parents(self) -> list[tuple[int, Any]]:
        return [(i, x._node) for i, x in enumerate(self._tensors()) if x._node is not None]

    @property
    def mask(self) -> tuple[bool, ...]:
        return tuple(x._node is not None for x in self._tensors())

    def saved(self) -> dict[str, Any]:
        return {"inputs": [x.data for x in self._tensors()]}

    def parameters(self) -> dict[str, Any]:
        return {}

    def metas(self) -> tuple[Any, ...] | None:
        return (*(None for _ in self._tensors()), self.shapes)


def recomputed(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], around: Around
) -> Any:
    """The result of a function of tensors, a tensor or a tuple of some, keeping its inputs only.

    Parameters
    ----------
    around:
        Makes what the function runs in: called for the first time and for each further one, so
        that both compute the same.
    """
    if not is_grad_enabled():
        return function(*args, **kwargs)
    with no_grad(), around():
        y = function(*args, **kwargs)
    found = _several(y)
    node = Part(function, args, kwargs, around, found)
    out = tuple(tensor_of(x.data, Pick(node, i)) for i, x in enumerate(found))
    return out[0] if isinstance(y, Tensor) else out


def _several(y: Any) -> tuple[Tensor, ...]:
    found = (y,) if isinstance(y, Tensor) else y
    if not isinstance(found, tuple) or not all(isinstance(x, Tensor) for x in found):
        raise GraphError(
            f"checkpoint: a function returns a tensor or a tuple of some, not {type(y).__name__}"
        )
    return found


def _name(function: Any) -> str:
    return getattr(function, "__qualname__", None) or type(function).__name__
