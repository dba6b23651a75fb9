"""Where the gradients of several tensors come by together, for a function to see them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from gpugrad.core.graph import FREED, MANY, Node, Pick, next_seq
from gpugrad.core.primitive import Primitive, differentiable
from gpugrad.core.tensor import Tensor, tensor_of
from gpugrad.errors import ShapeError

__all__ = ["gate"]

Grads = tuple[Tensor | None, ...]

_GATE = Primitive("hook", lambda m: None, "", ("inputs",), True, {}, outputs="many")


class Gate(Node):
    """The identity of several tensors, whose gradients a function sees together."""

    __slots__ = ("hook", "nodes", "outputs", "tensors")
    kind = MANY
    primitive = _GATE

    def __init__(self, tensors: Sequence[Tensor], hook: Callable[[Grads], Any]) -> None:
        self.seq = next_seq()
        self.hook: Any = hook
        self.nodes = [x._node for x in tensors]
        self.tensors = [(x.shape, x.dtype) for x in tensors]
        self.outputs = len(self.tensors)

    def vjp(self, g: Any) -> Any:
        return self.pull(g, None)

    def pop(self, g: Any) -> Any:
        pairs = self.pull(g, None)
        self.clear()
        return pairs

    def pull(self, g: Any, wrap: Callable[..., Any] | None) -> list[tuple[Any, Any]]:
        """Show the hook what has arrived; what it returns, unless None, goes on in its place."""
        found: list[Any] = [None] * self.outputs
        for i, x in g.items():
            found[i] = differentiable.as_tensor(x)
        out = self.hook(tuple(found))
        if out is not None:
            out = out if isinstance(out, tuple) else (out,)
            if len(out) != self.outputs:
                raise ShapeError(
                    f"a backward hook returned {len(out)} gradients for {self.outputs}; return "
                    "one for each, or None to leave them as they are"
                )
            found = [self._checked(i, x) for i, x in enumerate(out)]
        return [
            (node, x if x is None or wrap is not None else x.data)
            for node, x in zip(self.nodes, found)
            if node is not None
        ]

    def _checked(self, i: int, g: Any) -> Any:
        if g is None:
            return None
        g, (shape, dtype) = differentiable.as_tensor(g), self.tensors[i]
        if g.shape != shape:
            raise ShapeError(
                f"a backward hook returned shape {g.shape} for gradient {i}, of shape {shape}; "
                "they must be equal"
            )
        return g if g.dtype == dtype else differentiable.astype(g, dtype)

    def clear(self) -> None:
        self.seq = FREED
        self.nodes = []
        self.hook = None

    @property
    def mask(self) -> tuple[bool, ...]:
        return tuple(node is not None for node in self.nodes)

    def parents(self) -> list[tuple[int, Any]]:
        return [(i, node) for i, node in enumerate(self.nodes) if node is not None]

    def saved(self) -> dict[str, Any]:
        return {}

    def parameters(self) -> dict[str, Any]:
        return {}

    def metas(self) -> tuple[Any, ...] | None:
        return (*self.tensors, tuple(shape for shape, _ in self.tensors))


def gate(tensors: Sequence[Tensor], hook: Callable[[Grads], Any]) -> tuple[Tensor, ...]:
    """The same tensors, behind a gate: their gradients come by together on their way back.

    Parameters
    ----------
    hook:
        Called once in every backward pass with the gradients, None for a tensor that has none.
        What it returns, unless None, goes on in their place: one for each, of its shape, or None.

    Tensors that require no gradient are returned as they are.
    """
    if all(x._node is None for x in tensors):
        return tuple(tensors)
    node = Gate(tensors, hook)
    return tuple(
        x if x._node is None else tensor_of(x.data, Pick(node, i)) for i, x in enumerate(tensors)
    )
