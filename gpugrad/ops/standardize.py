"""The one text of every normalisation: mean 0 and variance 1, then weight and bias, and backward.

Operations differ in what shares a mean and a variance: the last axes (layer, RMS), a group of
channels of one sample (group), a channel over the whole batch (batch). Each says so by a
:class:`Layout`, and the functions below compute all of them.

Beside a large mean, a small deviation is lost when the mean is rounded. So the mean is kept as a
sum of two numbers, and distances are taken from both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from gpugrad.backend import Array, Backend
from gpugrad.core.primitive import differentiable
from gpugrad.errors import DTypeError, ParameterError, ShapeError
from gpugrad.ops.reductions import counting_dtype, reduced_size

Shape = tuple[int, ...]


# -- layouts --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """How an operation sees its operand.

    Attributes
    ----------
    shape:
        The shape that the operand is looked at in.
    axes:
        Those of its axes whose elements share a mean and a variance.
    parameter:
        The shape of weight and bias.
    affine:
        The shape in which they line up with the operand.
    """

    shape: Shape
    axes: Shape
    parameter: Shape
    affine: Shape

    @property
    def count(self) -> int:
        """How many elements share a mean; 1 where there are none."""
        return reduced_size(self.shape, self.axes) or 1


def last_axes(name: str, shape: Shape, axes: int) -> Layout:
    """The last `axes` axes together."""
    if not 1 <= axes <= len(shape):
        raise ShapeError(
            f"{name}: x of shape {tuple(shape)} and axes={axes}; it is normalised over its last "
            "axes, so this is a number from 1 to the number of axes"
        )
    first = len(shape) - axes
    return Layout(shape, tuple(range(first, len(shape))), shape[first:], shape[first:])


def in_groups(name: str, shape: Shape, groups: int) -> Layout:
    """Each group of channels of each sample."""
    channels = _channels(name, shape)
    if groups < 1 or channels % groups:
        raise ParameterError(
            f"{name}: x of shape {tuple(shape)} has {channels} channels, which {groups} groups do "
            "not divide evenly; choose a divisor of the number of channels"
        )
    inner = channels // groups
    seen = (shape[0], groups, inner, math.prod(shape[2:]))
    return Layout(seen, (2, 3), (channels,), (groups, inner, 1))


def by_channel(name: str, shape: Shape) -> Layout:
    """Each channel over the batch."""
    channels = _channels(name, shape)
    others = (0, *range(2, len(shape)))
    return Layout(shape, others, (channels,), (channels, *(1,) * (len(shape) - 2)))


def _channels(name: str, shape: Shape) -> int:
    if len(shape) < 2:
        raise ShapeError(
            f"{name}: x of shape {tuple(shape)}; axis 1 holds the channels, (batch, channels, "
            "...); give a single sample a batch axis with expand_dims(x, axis=0)"
        )
    return shape[1]


# -- what does not fit ----------------------------------------------------------------------------


def check(name: str, m: Backend, x: Array, layout: Layout, **parameters: Array | None) -> None:
    """Raise unless `x` holds real numbers and the parameters fit it in shape and dtype."""
    dtype = m.numpy_dtype(x)
    if dtype.kind in "biuc":
        raise DTypeError(
            f"{name}: x is {dtype}; real floating-point numbers are normalised, convert it with "
            ".to(dtype)"
        )
    check_shapes(name, x, layout, **parameters)
    for role, value in parameters.items():
        if value is not None and value.dtype != x.dtype:
            raise DTypeError(
                f"{name}: {role} is {m.numpy_dtype(value)} and x is {dtype}; convert one of them "
                "with .to(dtype)"
            )


def check_shapes(name: str, x: Array, layout: Layout, **parameters: Array | None) -> None:
    """Raise unless the parameters fit `x` in shape."""
    for role, value in parameters.items():
        if value is not None and tuple(value.shape) != layout.parameter:
            raise ShapeError(
                f"{name}: {role} of shape {tuple(value.shape)} for x of shape {tuple(x.shape)}; it "
                f"takes one of shape {layout.parameter}"
            )


def added(name: str, m: Backend, x: Array, residual: Array) -> Array:
    """The sum that the operations with a residual normalise."""
    if x.shape != residual.shape or x.dtype != residual.dtype:
        error = ShapeError if x.shape != residual.shape else DTypeError
        raise error(
            f"{name}: x is {m.numpy_dtype(x)}{list(x.shape)} and residual "
            f"{m.numpy_dtype(residual)}{list(residual.shape)}; they must be alike in shape and "
            "dtype, reshape or convert one of them"
        )
    return x + residual


# -- forward --------------------------------------------------------------------------------------


def _seen(m: Any, x: Array, shape: Shape) -> Array:
    """`x` in a shape, and in float32 where its own dtype is too short to add up in."""
    wide = counting_dtype(m, x)
    x = x if x.dtype == wide else m.astype(x, wide)
    return x if x.shape == shape else m.reshape(x, shape)


def _back(m: Any, x: Array, shape: Shape, dtype: Any) -> Array:
    x = x if x.shape == shape else m.reshape(x, shape)
    return x if x.dtype == dtype else m.astype(x, dtype)


def _mean(m: Any, x: Array, layout: Layout) -> Array:
    return m.sum(x, axis=layout.axes, keepdims=True) / layout.count


def _moments(
    m: Any, x: Array, layout: Layout, centred: bool
) -> tuple[Array, Array, tuple[Array, ...]]:
    """Distances from the mean, their mean square, and the mean as (mean, rest).

    Not `centred`: from zero, and no mean.
    """
    mean: tuple[Array, ...] = ()
    if centred:
        middle = _mean(m, x, layout)
        x = x - middle
        rest = _mean(m, x, layout)  # what rounding left of the mean
        x = x - rest
        mean = middle, rest
    return x, _mean(m, x * x, layout), mean


def _inverse_root(m: Any, var: Array, eps: float) -> Array:
    return 1.0 / m.sqrt(var + eps)


def _scaled(m: Any, y: Array, weight: Array | None, bias: Array | None, layout: Layout) -> Array:
    if weight is not None:
        y = y * _seen(m, weight, layout.affine)
    return y if bias is None else y + _seen(m, bias, layout.affine)


def moments(m: Any, x: Array, layout: Layout) -> tuple[Array, Array, Array]:
    """Mean, what its rounding left of it, and variance, in the shape of the weight."""
    _, var, (mean, rest) = _moments(m, _seen(m, x, layout.shape), layout, True)
    mean, rest, var = (m.reshape(v, layout.parameter) for v in (mean, rest, var))
    return mean, rest, var


def normalised(
    m: Backend,
    x: Array,
    weight: Array | None,
    bias: Array | None,
    layout: Layout,
    eps: float,
    centred: bool = True,
    given: Sequence[Array] | None = None,
) -> tuple[Array, ...]:
    """The result, and the statistics for its gradient: mean, its rest, 1/sqrt(var + eps).

    Parameters
    ----------
    centred:
        False to take the mean square in place of the variance, and off no mean.
    given:
        Moments from elsewhere, in the shape of the weight: the mean in one part or several, and the
        variance.
    """
    value = _seen(m, x, layout.shape)
    mean: Sequence[Array]
    if given is None:
        value, var, mean = _moments(m, value, layout, centred)
    else:
        *mean, var = (_seen(m, v, layout.affine) for v in given)
        for part in mean:
            value = value - part
    rstd = _inverse_root(m, var, eps)
    y = _scaled(m, value * rstd, weight, bias, layout)
    return _back(m, y, x.shape, x.dtype), *mean, rstd


# -- backward -------------------------------------------------------------------------------------


def gradients(
    m: Any,
    g: Array,
    x: Array,
    weight: Array | None,
    layout: Layout,
    statistics: Sequence[Array] | None,
    eps: float,
    needs: Sequence[bool],
    also: Array | None = None,
    centred: bool = True,
) -> tuple[Array | None, ...]:
    """Gradients of `x`, `weight` and `bias`, as far as `needs` asks for them; None for the rest.

    Parameters
    ----------
    statistics:
        What :func:`normalised` found; None finds it again.
    also:
        What reaches `x` by another way, of its shape.
    """
    value, g = _seen(m, x, layout.shape), _seen(m, g, layout.shape)
    if statistics is None:
        value, var, _ = _moments(m, value, layout, centred)
        rstd = _inverse_root(m, var, eps)
    else:
        *mean, rstd = statistics
        for part in mean:
            value = value - part
    y = value * rstd
    gx = None
    if needs[0]:
        gx = _scaled(m, g, weight, None, layout)
        level = _mean(m, gx, layout) if centred else 0.0
        gx = rstd * (gx - level - y * _mean(m, gx * y, layout))
        if also is not None:
            gx = gx + _seen(m, also, layout.shape)
        gx = _back(m, gx, x.shape, x.dtype)
    return gx, *_parameter_gradients(m, g, y, x.dtype, layout, needs[1:])


def moment_gradients(
    m: Any, gmean: Array | None, gvar: Array | None, x: Array, layout: Layout
) -> Array:
    """The gradient of `x` from those of the mean and the variance of :func:`moments`."""
    value = _seen(m, x, layout.shape)
    gx = value * 0.0
    if gmean is not None:
        gx = gx + _seen(m, gmean, layout.affine) / layout.count
    if gvar is not None:
        distance, _, _ = _moments(m, value, layout, True)
        gx = gx + _seen(m, gvar, layout.affine) * distance * (2.0 / layout.count)
    return _back(m, gx, x.shape, x.dtype)


def gradients_by(
    m: Any,
    g: Array,
    x: Array,
    mean: Array,
    var: Array,
    weight: Array | None,
    layout: Layout,
    eps: float,
    needs: Sequence[bool],
) -> tuple[Array | None, ...]:
    """Gradients where moments were given: of x, mean, var, weight and bias."""
    dtype, own = x.dtype, (mean.dtype, var.dtype)
    mean, var = (_seen(m, v, layout.affine) for v in (mean, var))
    x, g = _seen(m, x, layout.shape), _seen(m, g, layout.shape)
    rstd = _inverse_root(m, var, eps)
    y = (x - mean) * rstd
    parameters = _parameter_gradients(m, g, y, dtype, layout, needs[3:])
    gx = gmean = gvar = None
    if any(needs[:3]):
        moved = _scaled(m, g, weight, None, layout) * rstd
        if needs[0]:
            gx = _back(m, moved, x.shape, dtype)
        if needs[1]:
            gmean = _back(m, -m.sum_to(moved, layout.affine), layout.parameter, own[0])
        if needs[2]:
            gvar = m.sum_to(moved * y, layout.affine) * (rstd * -0.5)
            gvar = _back(m, gvar, layout.parameter, own[1])
    return gx, gmean, gvar, *parameters


def _parameter_gradients(
    m: Any, g: Array, y: Array, dtype: Any, layout: Layout, needs: Sequence[bool]
) -> tuple[Array | None, ...]:
    """Gradients of weight and bias, or of the weight alone, in their shape and dtype."""

    def summed(x: Array) -> Array:
        return _back(m, m.sum_to(x, layout.affine), layout.parameter, dtype)

    weight = summed(g * y) if needs[0] else None
    bias = (summed(g) if need else None for need in needs[1:])
    return weight, *bias


def known(m: Any, *statistics: Array) -> tuple[Array, ...] | None:
    """Statistics as a backward function takes them.

    None where the gradient is recorded itself: they depend on the operand, and it has to show.
    """
    return None if m is differentiable else statistics


def summand_gradients(
    m: Any,
    backward: Callable[..., Any],
    g: Sequence[Array | None],
    y: Sequence[Array],
    weight: Array | None,
    size: int,
    eps: float,
    needs: Sequence[bool],
) -> tuple[Array | None, ...]:
    """Gradients of both summands and the parameters where a sum was normalised.

    Parameters
    ----------
    backward:
        The operation's backward function, for the sum and the parameters.
    g, y:
        Gradients and values of its results: what was normalised, and the sum.
    size:
        Its axes or groups.
    """
    normal = m.zeros_like(y[0]) if g[0] is None else g[0]
    wanted = (needs[0] or needs[1], *needs[2:])
    gx, *parameters = backward(m, normal, y[1], weight, None, size, eps, wanted, g[1])
    return gx if needs[0] else None, gx if needs[1] else None, *parameters
