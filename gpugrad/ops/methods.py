"""The operators and methods of a tensor: the operations, where NumPy's arrays have them."""

# A declared operation is known to return Any; what it returns is a tensor.
# mypy: disable-error-code="no-any-return"
from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gpugrad.core.primitive import differentiable
from gpugrad.core.tensor import Tensor
from gpugrad.errors import ShapeError
from gpugrad.ops.indexing import subscript
from gpugrad.ops.manipulation import copy, matrix_transpose, permute_dims
from gpugrad.ops.manipulation import reshape as reshape_to

#: Operator → operation. Those of the second kind come with a reflected twin: 2 - x.
_UNARY = {"neg": "negative", "pos": "positive", "abs": "abs", "invert": "bitwise_invert"}
_BINARY = {
    "add": "add",
    "sub": "subtract",
    "mul": "multiply",
    "truediv": "divide",
    "floordiv": "floor_divide",
    "mod": "remainder",
    "pow": "pow",
    "matmul": "matmul",
    "and": "bitwise_and",
    "or": "bitwise_or",
    "xor": "bitwise_xor",
}
_ONE_WAY = {
    "lshift": "bitwise_left_shift",
    "rshift": "bitwise_right_shift",
    "lt": "less",
    "le": "less_equal",
    "gt": "greater",
    "ge": "greater_equal",
}
_METHODS = (
    "sum", "mean", "var", "std", "max", "min", "prod", "any", "all", "argmax", "argmin",
    "squeeze", "astype", "clip", "take", "dot",
)  # fmt: skip


def attach() -> None:
    """Give :class:`Tensor` its operators and methods.

    An operator is the operation itself, ``Tensor.__mul__ is gpugrad.multiply``, so that it costs
    nothing to write ``x * y``.
    """
    for operator, name in (_UNARY | _BINARY | _ONE_WAY).items():
        setattr(Tensor, f"__{operator}__", getattr(differentiable, name))
    for operator, name in _BINARY.items():
        setattr(Tensor, f"__r{operator}__", _reflected(getattr(differentiable, name)))
    for operator, name in {"eq": "equal", "ne": "not_equal"}.items():
        setattr(Tensor, f"__{operator}__", _equality(getattr(differentiable, name)))
    for name in _METHODS:
        setattr(Tensor, name, getattr(differentiable, name))
    for method in (reshape, transpose, flatten):
        setattr(Tensor, method.__name__, method)
    Tensor.clone = copy  # type: ignore[method-assign]
    Tensor.__getitem__ = subscript  # type: ignore[method-assign]
    Tensor.T = property(_transposed)  # type: ignore[assignment, method-assign]
    Tensor.mT = property(matrix_transpose)  # type: ignore[assignment, method-assign]


def _reflected(operation: Callable[..., Any]) -> Callable[[Tensor, Any], Any]:
    def swapped(self: Tensor, other: Any) -> Any:
        return operation(other, self)

    return swapped


def _equality(operation: Callable[..., Any]) -> Callable[[Tensor, Any], Any]:
    def compare(self: Tensor, other: Any) -> Any:
        if other is None or isinstance(other, str):
            return NotImplemented  # Python then compares identities, as it does for other objects
        return operation(self, other)

    return compare


def _one_tuple(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of ``f(2, 3)`` and of ``f((2, 3))`` alike."""
    if len(values) == 1 and isinstance(values[0], tuple | list):
        return tuple(values[0])
    return values


def reshape(self: Tensor, *shape: Any) -> Tensor:
    """The same elements under another shape: ``x.reshape(2, 3)`` or ``x.reshape((2, 3))``."""
    return reshape_to(self, _one_tuple(shape))


def transpose(self: Tensor, *axes: Any) -> Tensor:
    """The axes in another order, ``x.transpose(1, 0)``; reversed when none are given."""
    axes = _one_tuple(axes)
    if not axes or axes == (None,):
        return _transposed(self)
    if len(axes) != self.ndim:
        raise ShapeError(
            f"transpose: {len(axes)} axes for a tensor of {self.ndim}; name every axis once, as in "
            "NumPy, or use gpugrad.moveaxis"
        )
    return permute_dims(self, axes)


def _transposed(self: Tensor) -> Tensor:
    """The axes in reverse order."""
    return permute_dims(self, tuple(range(self.ndim))[::-1])


def flatten(self: Tensor) -> Tensor:
    """The elements along one axis. They may share memory with this tensor."""
    return reshape_to(self, (self.size,))
