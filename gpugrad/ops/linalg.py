"""Products of matrices and vectors."""

# A declared operation is known to return Any; what it returns is a tensor.
# mypy: disable-error-code="no-any-return"
from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NoReturn

import numpy as np

from gpugrad.backend import Array, Backend
from gpugrad.backend.kernels import fusible
from gpugrad.backend.tape import replayable
from gpugrad.core.conversion import asarray
from gpugrad.core.primitive import composite, differentiable, primitive, sample
from gpugrad.core.tensor import Tensor, tensor_of
from gpugrad.errors import ShapeError
from gpugrad.ops.fused import ACTIVATIONS, Activation, activation_named, reference
from gpugrad.ops.manipulation import moveaxis, normal_axis, reshape
from gpugrad.ops.reductions import sum as sum_over
from gpugrad.ops.samples import normal

__all__ = ["dot", "matmul", "outer", "tensordot", "vecdot"]


# -- matrix products ------------------------------------------------------------------------------


def _rows(m: Any, x: Array) -> Array:
    """``x`` as a matrix of its last axes."""
    shape = x.shape
    return x if len(shape) == 2 else m.reshape(x, (math.prod(shape[:-1]), shape[-1]))


def product_of(m: Any, a: Array, b: Array) -> Array:
    """``a @ b``, where a stack of matrices meets a single one as one product of all its rows."""
    if a.ndim > 2 and b.ndim == 2:
        return m.reshape(m.matmul(_rows(m, a), b), (*a.shape[:-1], b.shape[-1]))
    return m.matmul(a, b)


def _matmul_left(g: Array, m: Backend, b: Array, a_shape: tuple[int, ...]) -> Array:
    if b.ndim == 1:
        return m.expand_dims(g, axis=-1) * b
    if len(a_shape) == 1:  # a is a row that met every matrix of the stack
        inner = (*range(b.ndim - 2), b.ndim - 1)
        return m.tensordot(b, g, axes=(inner, tuple(range(g.ndim))))
    if len(a_shape) == 2 < b.ndim:  # one product in place of a stack of them that is summed
        stack = (*range(b.ndim - 2), b.ndim - 1)
        return m.tensordot(g, b, axes=(stack, stack))
    return product_of(m, g, m.matrix_transpose(b))


def _matmul_right(g: Array, m: Backend, a: Array, b_shape: tuple[int, ...]) -> Array:
    if a.ndim == 1:
        column = m.expand_dims(a, axis=-1) if len(b_shape) > 1 else a
        return column * (m.expand_dims(g, axis=-2) if len(b_shape) > 1 else g)
    if len(b_shape) == 1:
        rows = tuple(range(a.ndim - 1))
        return m.tensordot(a, g, axes=(rows, rows))
    if len(b_shape) == 2:  # all rows of a stack in one product
        return m.matmul(m.matrix_transpose(_rows(m, a)), _rows(m, g))
    return m.matmul(m.matrix_transpose(a), g)


@primitive(
    vjps=(_matmul_left, _matmul_right),
    jvps=(lambda t, m, b: m.matmul(t, b), lambda t, m, a: m.matmul(a, t)),
    samples=lambda: [
        sample(normal((2, 3), 0), normal((3, 4), 1)),
        sample(normal((3,), 0), normal((3,), 1), note="two vectors"),
        sample(normal((2, 3), 0), normal((3,), 1), note="matrix and vector"),
        sample(normal((3,), 0), normal((3, 2), 1), note="vector and matrix"),
        sample(normal((5, 2, 3), 0), normal((5, 3, 4), 1), note="a stack of matrices"),
        sample(normal((5, 2, 3), 0), normal((3, 4), 1)),
        sample(normal((2, 3), 0), normal((5, 3, 4), 1)),
        sample(normal((2, 1, 2, 3), 0), normal((5, 3, 4), 1), note="stacks that broadcast"),
        sample(normal((3,), 0), normal((5, 3, 4), 1)),
        sample(normal((5, 2, 3), 0), normal((3,), 1)),
        sample(normal((2, 0), 0), normal((0, 3), 1), note="nothing to add up"),
    ],
)
def matmul(m: Backend, a: Array, b: Array, /) -> Array:
    """The matrix product of ``a`` and ``b``, as NumPy's ``@``.

    The last two axes hold matrices, axes before them broadcast. A one-dimensional ``a`` is a row, a
    one-dimensional ``b`` a column, and the result lacks that axis. Raises ShapeError when the
    columns of ``a`` and the rows of ``b`` differ in number.

    >>> import gpugrad as gg
    >>> gg.matmul(gg.asarray([[1.0, 2.0], [3.0, 4.0]]), gg.asarray([1.0, 1.0]))
    tensor([3., 7.])
    """
    try:
        return product_of(m, a, b)
    except Exception:
        _explain_matmul(a, b)
        raise


def _explain_matmul(a: Array, b: Array) -> None:
    """Raise ShapeError when it is the shapes that a failed product is about."""
    left, right = getattr(a, "shape", ()), getattr(b, "shape", ())
    if not left or not right:
        raise ShapeError(
            f"matmul: shapes {left} and {right}: a 0-d operand has no axis to sum over; use "
            "multiply (*) to scale by a number"
        )
    row = max(len(right) - 2, 0)
    if left[-1] != right[row]:
        turned = len(right) > 1 and left[-1] == right[-1]
        raise ShapeError(
            f"matmul: shapes {tuple(left)} and {tuple(right)} do not fit: axis {len(left) - 1} of "
            f"the first has {left[-1]} elements, axis {row} of the second {right[row]}; they are "
            "summed over together and must agree"
            + ("; transpose the second (b.mT)" if turned else "; transpose or reshape one of them")
        )
    try:
        np.broadcast_shapes(left[:-2], right[:-2])
    except ValueError:
        raise ShapeError(
            f"matmul: shapes {tuple(left)} and {tuple(right)} do not fit: the stacks {left[:-2]} "
            f"and {right[:-2]} do not broadcast; line them up with reshape or expand_dims"
        ) from None


# -- the affine map of a layer --------------------------------------------------------------------


@fusible
def matmul_into(m: Backend, a: Array, b: Array, out: Array) -> Array:
    """``a @ b`` for two matrices, written into ``out``, which is returned."""
    if a.dtype.itemsize == 2:
        m.setitem(out, ..., m.matmul(a, b))
    else:
        m.xp.matmul(a, b, out=out)
    return out


@fusible
def weight_gradient(m: Any, g: Any, x: Any, weight_home: Any) -> Any:
    """gᵀ·x over all axes but the last, into `weight_home` if that is given.

    What is in a home must not be changed afterwards: its sum of squares may be known already.
    """
    left, right = _rows(m, g).mT, _rows(m, x)
    if weight_home is None:
        return m.matmul(left, right)
    return matmul_into(m, left, right, weight_home)


@fusible
def sum_over_rows(m: Any, g: Any, shape: tuple[int, ...], home: Any = None) -> Any:
    """The sum over all axes but the last, into `home` if that is given."""
    total = m.sum_to(g, shape)
    if home is None or m is differentiable:
        return total
    m.setitem(home, ..., total)
    return home


@primitive(
    vjps=(
        replayable(lambda g, m, weight: product_of(m, g, weight)),
        weight_gradient,
        replayable(lambda g, m, bias_home: sum_over_rows(m, g, g.shape[-1:], bias_home)),
    ),
    jvps=(
        lambda t, m, weight: m.matmul(t, m.matrix_transpose(weight)),
        lambda t, m, x: m.matmul(x, m.matrix_transpose(t)),
        lambda t: t,
    ),
    samples=lambda: [
        sample(normal((4, 3), 0), normal((2, 3), 1), normal((2,), 2)),
        sample(normal((4, 3), 0), normal((2, 3), 1), None, note="without a bias"),
        sample(normal((3,), 0), normal((2, 3), 1), normal((2,), 2)),
        sample(normal((5, 4, 3), 0), normal((2, 3), 1), normal((2,), 2)),
        sample(normal((0, 3), 0), normal((2, 3), 1), normal((2,), 2), note="an empty batch"),
    ],
    reference=lambda x, weight, bias=None: x @ weight.T + (0.0 if bias is None else bias),
)
def linear(m: Backend, x: Array, weight: Array, bias: Array | None = None, /) -> Array:
    """``x @ weight.T + bias``: the affine map of a layer.

    Parameters
    ----------
    x:
        Shape (..., in), any number of axes from one.
    weight:
        Shape (out, in), as PyTorch stores it.
    bias:
        Shape (out,), or None.

    Returns
    -------
    Shape (..., out). Raises ShapeError, naming both shapes, when they do not fit.

    >>> import gpugrad as gg
    >>> from gpugrad.ops.linalg import linear
    >>> linear(gg.asarray([1.0, 2.0]), gg.asarray([[1.0, 1.0]]), gg.asarray([0.5]))
    tensor([3.5])
    """
    return _linear_product(m, x, weight) if bias is None else biased(m, x, weight, bias)


def biased(m: Backend, x: Array, weight: Array, bias: Array) -> Array:
    """:func:`linear` of raw arrays, with a bias."""
    y = _linear_product(m, x, weight)
    _check_linear_bias(weight, bias)
    if m.mutable and bias.dtype == y.dtype:
        y += bias
        return y
    return y + bias


def _linear_product(m: Backend, x: Array, weight: Array) -> Array:
    if weight.ndim != 2 or not x.ndim or x.shape[-1] != weight.shape[1]:
        _explain_linear(x, weight)
    return product_of(m, x, weight.mT)


def _check_linear_bias(weight: Array, bias: Array) -> None:
    if bias.shape != weight.shape[:1]:
        raise ShapeError(
            f"linear: bias of shape {tuple(bias.shape)} for weight of shape "
            f"{tuple(weight.shape)}; it needs one element per output, {tuple(weight.shape[:1])}"
        )


def activated(
    m: Backend, x: Array, weight: Array, bias: Array, chosen: Activation
) -> tuple[Array, Array]:
    """A layer: what its activation is applied to, and its result."""
    z = biased(m, x, weight, bias)
    y = chosen.forward(m, z)
    return z, y if y.dtype == z.dtype else m.astype(y, z.dtype)


@fusible
def linear_activation_backward(
    m: Any, g: Any, x: Any, weight: Any, bias: Any, kept: Any, activation: str, needs: Any,
    weight_home: Any, bias_home: Any,
) -> Any:  # fmt: skip
    """All gradients of a layer in one call, each only when it is needed."""
    chosen = ACTIVATIONS[activation]
    if m is differentiable:  # what was kept beside the result would count as a constant
        kept = linear(x, weight, bias)
        kept = chosen.forward(m, kept) if chosen.from_result else kept
    gz = chosen.partial(m, g, kept)
    gx = product_of(m, gz, weight) if needs[0] else None
    gw = weight_gradient(m, gz, x, weight_home) if needs[1] else None
    return gx, gw, sum_over_rows(m, gz, bias.shape, bias_home) if needs[2] else None


@primitive(
    vjp=linear_activation_backward,
    aux=("kept",),
    samples=lambda: [
        sample(normal((4, 3), 0), normal((2, 3), 1), normal((2,), 2), activation="gelu_tanh"),
        sample(normal((4, 3), 0), normal((2, 3), 1), normal((2,), 2), activation="tanh"),
        sample(normal((3,), 0), normal((2, 3), 1), normal((2,), 2), activation="silu"),
        sample(normal((5, 4, 3), 0), normal((2, 3), 1), normal((2,), 2), activation="gelu"),
        sample(normal((0, 3), 0), normal((2, 3), 1), normal((2,), 2), activation="sigmoid",
               note="an empty batch"),
    ],
    reference=lambda x, weight, bias, activation: reference(x @ weight.T, bias, activation),
)  # fmt: skip
def linear_activation(
    m: Backend, x: Array, weight: Array, bias: Array, /, activation: str = "relu"
) -> tuple[Array, Array]:
    """``activation(x @ weight.T + bias)``: a layer of a net, and its three gradients in one call.

    Parameters
    ----------
    x, weight, bias:
        As in :func:`linear`; there is a bias.
    activation:
        A name, as in :func:`gpugrad.bias_activation`.

    Returns
    -------
    Shape (..., out). What the derivative of the activation is computed from, its operand or its
    result, is kept for the backward pass.

    >>> import gpugrad as gg
    >>> from gpugrad.ops.linalg import linear_activation
    >>> linear_activation(gg.asarray([1.0, 2.0]), gg.asarray([[1.0, -1.0]]), gg.asarray([0.5]))
    tensor([0.])
    """
    chosen = activation_named("linear", activation)
    z, y = activated(m, x, weight, bias, chosen)
    return y, y if chosen.from_result else z


def _explain_linear(x: Array, weight: Array) -> NoReturn:
    shapes = f"linear: input of shape {tuple(x.shape)} and weight of shape {tuple(weight.shape)}"
    if weight.ndim != 2:
        raise ShapeError(f"{shapes}: a weight has two axes, (out, in)")
    if not x.ndim:
        raise ShapeError(f"{shapes}: the input needs at least one axis, (..., in)")
    fix = (
        "the weight is (out, in): transpose it (weight.mT)"
        if x.shape[-1] == weight.shape[0]
        else f"give the layer in_features={x.shape[-1]}, or reshape the input so that its last "
        f"axis has {weight.shape[1]} elements"
    )
    raise ShapeError(
        f"{shapes}: the last axis of the input has {x.shape[-1]} elements, axis 1 of the weight "
        f"{weight.shape[1]}; {fix}"
    )


# -- sums over chosen axes ------------------------------------------------------------------------


def _contracted(axes: Any, a_ndim: int, b_ndim: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The axes of both operands that a tensordot sums over, counted from the front."""
    if isinstance(axes, int):
        return tuple(range(a_ndim - axes, a_ndim)), tuple(range(axes))
    left, right = ((x,) if isinstance(x, int) else tuple(x) for x in axes)
    return tuple(x % a_ndim for x in left), tuple(x % b_ndim for x in right)


def _tensordot_grad(
    m: Backend, g: Array, other: Array, mine: Sequence[int], theirs: Sequence[int], ndim: int,
    first: bool,
) -> Array:  # fmt: skip
    """The gradient of one operand: ``g`` and the other operand summed over the other's free axes.

    What comes out has this operand's free axes, then those that were summed over, in the order in
    which the other operand has them.
    """
    free = [i for i in range(ndim) if i not in mine]
    others = [i for i in range(other.ndim) if i not in theirs]
    start = len(free) if first else 0
    g_axes = tuple(range(start, start + len(others)))
    raw = m.tensordot(g, other, axes=(g_axes, tuple(others)))
    came = free + [mine[k] for k in sorted(range(len(theirs)), key=theirs.__getitem__)]
    return m.permute_dims(raw, tuple(sorted(range(ndim), key=came.__getitem__)))


def _tensordot_left(g: Array, m: Backend, b: Array, a_shape: tuple[int, ...], axes: Any) -> Array:
    mine, theirs = _contracted(axes, len(a_shape), b.ndim)
    return _tensordot_grad(m, g, b, mine, theirs, len(a_shape), True)


def _tensordot_right(g: Array, m: Backend, a: Array, b_shape: tuple[int, ...], axes: Any) -> Array:
    theirs, mine = _contracted(axes, a.ndim, len(b_shape))
    return _tensordot_grad(m, g, a, mine, theirs, len(b_shape), False)


@primitive(
    vjps=(_tensordot_left, _tensordot_right),
    jvps=(
        lambda t, m, b, axes: m.tensordot(t, b, axes=axes),
        lambda t, m, a, axes: m.tensordot(a, t, axes=axes),
    ),
    native="tensordot",
    samples=lambda: [
        sample(normal((2, 3, 4), 0), normal((3, 4, 5), 1)),
        sample(normal((2, 3, 4), 0), normal((4, 5, 2), 1), axes=((0, 2), (2, 0))),
        sample(normal((2, 3), 0), normal((3, 2), 1), axes=((-1,), (0,))),
        sample(normal((2, 3), 0), normal((4,), 1), axes=0),
        sample(normal((2, 3), 0), normal((2, 3), 1), note="every axis"),
    ],
)
def tensordot(m: Backend, a: Array, b: Array, /, axes: Any = 2) -> Array:
    """The product of ``a`` and ``b`` summed over ``axes``: a number of them, or two lists.

    A number stands for the last axes of ``a`` and the first ones of ``b``. The result has the other
    axes of ``a``, then those of ``b``.

    >>> import gpugrad as gg
    >>> gg.tensordot(gg.ones((2, 3)), gg.ones((2, 3)), axes=((0, 1), (0, 1)))
    tensor(6.)
    """
    ...


@composite(
    samples=lambda: [
        sample(normal((2, 3), 0), normal((2, 3), 1)),
        sample(normal((2, 3), 0), normal((3,), 1)),
        sample(normal((3, 2), 0), normal((3, 2), 1), axis=0),
    ],
    reference=np.vecdot,
)
def vecdot(x1: Any, x2: Any, /, *, axis: int = -1) -> Tensor:
    """The dot products of the vectors along ``axis``; the other axes broadcast.

    The first operand is conjugated if it is complex.

    >>> import gpugrad as gg
    >>> gg.vecdot(gg.asarray([[1.0, 2.0], [3.0, 4.0]]), gg.asarray([1.0, 1.0]))
    tensor([3., 7.])
    """
    a, b = (
        x if normal_axis(axis, x.ndim, "vecdot") == x.ndim - 1 else moveaxis(x, axis, -1)
        for x in (asarray(x1), asarray(x2))
    )
    if a.shape[-1] != b.shape[-1]:
        raise ShapeError(
            f"vecdot: axis {axis} has {a.shape[-1]} elements in the first operand and "
            f"{b.shape[-1]} in the second; they are summed over together and must agree"
        )
    if a.dtype.kind == "c":  # which no gradient comes from
        a = tensor_of(a.backend.conj(a.data))
    return sum_over(a * b, axis=-1)


@composite(
    samples=lambda: [sample(normal((2,), 0), normal((3,), 1))],
    reference=np.outer,
)
def outer(x1: Any, x2: Any, /) -> Tensor:
    """Every element of ``x1`` times every element of ``x2``, both flattened: a matrix.

    >>> import gpugrad as gg
    >>> gg.outer(gg.asarray([1, 2]), gg.asarray([3, 4]))
    tensor([[3, 4],
            [6, 8]])
    """
    x1, x2 = asarray(x1), asarray(x2)
    return reshape(x1, (x1.size, 1)) * reshape(x2, (1, x2.size))


@composite(
    samples=lambda: [
        sample(normal((3,), 0), normal((3,), 1)),
        sample(normal((2, 3), 0), normal((3, 4), 1)),
        sample(normal((2, 3), 0), normal((5, 3, 4), 1)),
        sample(normal((2, 3), 0), normal((3,), 1)),
        sample(normal((2, 3), 0), 2.0),
    ],
    reference=np.dot,
)
def dot(x1: Any, x2: Any, /) -> Tensor:
    """NumPy's ``dot``: over the last axis of ``x1`` and the last but one of ``x2``.

    For vectors and matrices it is :func:`matmul`; a number scales.

    >>> import gpugrad as gg
    >>> gg.dot(gg.asarray([1.0, 2.0]), gg.asarray([3.0, 4.0]))
    tensor(11.)
    """
    x1, x2 = (x if isinstance(x, (int, float, complex)) else asarray(x) for x in (x1, x2))
    left, right = (len(getattr(x, "shape", ())) for x in (x1, x2))
    if not left or not right:
        return differentiable.multiply(x1, x2)
    if left <= 2 and right <= 2:
        return matmul(x1, x2)
    return tensordot(x1, x2, axes=((left - 1,), (max(right - 2, 0),)))
