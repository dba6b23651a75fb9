"""Transposed convolutions: a product, and windows that are added up, as one operation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from gpugrad.backend import Array, Backend
from gpugrad.backend.kernels import fusible
from gpugrad.core.conversion import asarray
from gpugrad.core.primitive import composite, primitive, sample
from gpugrad.core.tensor import Tensor
from gpugrad.errors import ParameterError, ShapeError
from gpugrad.ops.convolution import (
    Pads,
    Sizes,
    at_home,
    check_groups,
    exchanged,
    fold,
    grouped,
    per_group,
    spread,
    sum_over_places,
    unfold,
)
from gpugrad.ops.manipulation import expand_dims, squeeze
from gpugrad.ops.samples import normal

# -- the operation --------------------------------------------------------------------------------


def border(
    sizes: Sizes, kernel: Sizes, out: Sizes, stride: Sizes, padding: Sizes, dilation: Sizes
) -> Pads:
    """What windows reach before and behind a result of ``out`` places.

    >>> border((3,), (4,), (6,), (2,), (1,), (1,))
    ((1, 1),)
    """
    return tuple(
        (p, max(0, (n - 1) * s + d * (k - 1) + 1 - p - size))
        for n, k, size, s, p, d in zip(sizes, kernel, out, stride, padding, dilation)
    )


@fusible
def transposed_convolution_backward(
    m: Any, g: Any, x: Any, weight: Any, stride: Sizes, padding: Pads, dilation: Sizes,
    groups: int, needs: Sequence[bool], weight_home: Any = None, bias_home: Any = None,
) -> tuple[Any, Any, Any]:  # fmt: skip
    """The gradients of input, weight and bias, each None unless it is needed.

    The first two are products with the windows of g, which has the border that `padding` says.
    """
    gx = gw = None
    gb = sum_over_places(m, g, bias_home) if needs[2] else None
    if needs[0] or needs[1]:
        batch, channels, *sizes = x.shape
        kernel, inner, count = weight.shape[2:], channels // groups, batch * math.prod(sizes)
        windows = unfold(
            m, exchanged(m, g), kernel, tuple(sizes), stride, padding, dilation, axis=1
        )  # fmt: skip
        rows = math.prod(weight.shape[1:])
        windows = per_group(m, windows, groups, rows, count)
        if needs[0]:
            gx = m.matmul(per_group(m, weight, groups, inner, rows), windows)
            gx = exchanged(m, m.reshape(gx, (channels, batch, *sizes)))
        if needs[1]:
            seen = per_group(m, exchanged(m, x), groups, inner, count)
            gw = m.reshape(m.matmul(seen, m.matrix_transpose(windows)), weight.shape)
            gw = at_home(m, gw, weight_home)
    return gx, gw, gb


def _vjp(
    m: Any, g: Any, x: Any, weight: Any, out: Sizes, stride: Sizes, padding: Sizes,
    dilation: Sizes, groups: int, needs: Any, weight_home: Any, bias_home: Any,
) -> Any:  # fmt: skip
    pads = border(x.shape[2:], weight.shape[2:], out, stride, padding, dilation)
    return transposed_convolution_backward(
        m, g, x, weight, stride, pads, dilation, groups, needs, weight_home, bias_home
    )


def _samples() -> list[Any]:
    return [
        sample(normal((2, 3, 3, 4)), normal((3, 2, 3, 2), 1), normal(2, 2), out=(6, 8),
               stride=(2, 2), padding=(1, 0), dilation=(1, 1)),
        sample(normal((2, 4, 5)), normal((4, 3, 3), 1), None, out=(8,), stride=(1,), padding=(0,),
               dilation=(2,), groups=2, note="without a bias"),
        sample(normal((1, 2, 3, 2)), normal((2, 2, 2, 2), 1), normal(2, 2), out=(10, 6),
               stride=(3, 3), padding=(0, 0), dilation=(1, 1), note="places of no window"),
        sample(np.zeros((0, 2, 3)), normal((2, 2, 2), 1), normal(2, 2), out=(4,), stride=(1,),
               padding=(0,), dilation=(1,), note="an empty batch"),
    ]  # fmt: skip


@primitive(
    vjp=_vjp,
    samples=_samples,
    reference=lambda x, weight, bias, out, stride, padding, dilation, groups=1: _reference(
        x, weight, bias, out, stride, padding, dilation, groups
    ),
)
def transposed_convolution(
    m: Backend,
    x: Array,
    weight: Array,
    bias: Array | None = None,
    /,
    out: Sizes = (),
    stride: Sizes = (1, 1),
    padding: Sizes = (0, 0),
    dilation: Sizes = (1, 1),
    groups: int = 1,
) -> Array:
    """The transpose of a convolution, and a bias.

    Parameters
    ----------
    x:
        Shape (N, C, \\*axes), with one axis of places or more.
    weight:
        Shape (C, O/groups, \\*kernel).
    bias:
        Shape (O,), or None.
    out:
        Places of the result along each axis.
    stride, padding, dilation, groups:
        Those of the convolution whose transpose it is, a number per axis; ``padding`` is what the
        result leaves out of the first windows.

    Returns
    -------
    Shape (N, O, \\*out). Its elements may lie in memory with the channels last.

    >>> import gpugrad as gg
    >>> from gpugrad.ops.transposed import transposed_convolution
    >>> x, weight = gg.asarray([[[1.0, 2.0]]]), gg.asarray([[[1.0, 10.0]]])
    >>> transposed_convolution(x, weight, None, (4,), (2,), (0,), (1,))
    tensor([[[ 1., 10.,  2., 20.]]])
    """
    batch, channels, *sizes = x.shape
    kernel, outputs, inner = weight.shape[2:], weight.shape[1] * groups, channels // groups
    rows = math.prod(weight.shape[1:])
    turned = m.matrix_transpose(m.reshape(weight, (groups, inner, rows)))
    windows = m.matmul(turned, grouped(m, x, groups, inner, math.prod(sizes)))
    windows = m.reshape(windows, (batch, outputs, math.prod(kernel), *sizes))
    pads = border(tuple(sizes), kernel, out, stride, padding, dilation)
    y = fold(m, windows, (batch, outputs, *out), kernel, stride, pads, dilation)
    return y if bias is None else y + m.reshape(bias, (-1, *(1,) * len(sizes)))


# -- PyTorch's functions --------------------------------------------------------------------------


def _transpose(
    axes: int, input: Any, weight: Any, bias: Any, stride: Any, padding: Any, output_padding: Any,
    groups: Any, dilation: Any,
) -> Tensor:  # fmt: skip
    operation = f"conv_transpose{axes}d"
    x, w = asarray(input), asarray(weight)
    groups = check_groups(groups, operation)
    stride = spread(stride, axes, operation, "stride", 1)
    dilation = spread(dilation, axes, operation, "dilation", 1)
    zeros = spread(padding, axes, operation, "padding", 0)
    more = spread(output_padding, axes, operation, "output_padding", 0)
    alone = x.ndim == axes + 1
    if alone:
        x = expand_dims(x, axis=0)
    if x.ndim != axes + 2 or w.ndim != axes + 2 or x.shape[1] != w.shape[0]:
        raise ShapeError(
            f"{operation}: input of shape {asarray(input).shape} and weight of shape {w.shape}; "
            "they are (N, C, *axes) or (C, *axes), and (C, O/groups, *kernel)"
        )
    if w.shape[0] % groups:
        raise ShapeError(f"{operation}: {w.shape[0]} channels do not divide into {groups} groups")
    if any(n >= max(s, d) for n, s, d in zip(more, stride, dilation)):
        raise ParameterError(
            f"{operation}: output_padding={output_padding!r}; it must be smaller than the stride "
            "or the dilation"
        )
    outputs = groups * w.shape[1]
    if bias is not None and asarray(bias).shape != (outputs,):
        raise ShapeError(
            f"{operation}: bias of shape {asarray(bias).shape}; it needs one element per output, "
            f"{(outputs,)}"
        )
    out = tuple(
        (n - 1) * s - 2 * p + d * (k - 1) + q + 1
        for n, s, p, d, k, q in zip(x.shape[2:], stride, zeros, dilation, w.shape[2:], more)
    )
    if min(out) < 1:
        raise ShapeError(f"{operation}: a result of {out} places; use less padding")
    y = transposed_convolution(x, w, bias, out, stride, zeros, dilation, groups)
    return squeeze(y, axis=0) if alone else y  # type: ignore[no-any-return]


def _reference(
    x: Any, weight: Any, bias: Any, out: Sizes, stride: Sizes, padding: Sizes, dilation: Sizes,
    groups: int,
) -> Any:  # fmt: skip
    """The definition, one place at a time."""
    n, c, *sizes = x.shape
    outputs, *kernel = weight.shape[1:]
    y = np.zeros((n, groups * outputs, *out))
    for i in range(c):
        group = slice(i * groups // c * outputs, (i * groups // c + 1) * outputs)
        for place in np.ndindex(*sizes):
            for k in np.ndindex(*kernel):
                each = zip(place, k, stride, dilation, padding)
                at = [p * s + q * d - z for p, q, s, d, z in each]
                if all(0 <= p < size for p, size in zip(at, out)):
                    seen = x[(slice(None), i, *place)]
                    y[(slice(None), group, *at)] += np.outer(seen, weight[(i, slice(None), *k)])
    return y if bias is None else y + bias.reshape(-1, *(1,) * len(sizes))


def _numpy_transpose(
    x: Any, weight: Any, bias: Any = None, stride: int = 1, padding: int = 0,
    output_padding: int = 0, groups: int = 1, dilation: int = 1,
) -> Any:  # fmt: skip
    out = tuple(
        (n - 1) * stride - 2 * padding + dilation * (k - 1) + output_padding + 1
        for n, k in zip(x.shape[2:], weight.shape[2:])
    )
    s, p, d = ((v,) * len(out) for v in (stride, padding, dilation))
    return _reference(x, weight, bias, out, s, p, d, groups)


@composite(
    samples=lambda: [
        sample(normal((2, 4, 5)), normal((4, 3, 3), 1), normal(3, 2), stride=2, padding=1),
        sample(normal((2, 4, 5)), normal((4, 3, 3), 1), None, groups=2, dilation=2),
    ],
    reference=_numpy_transpose,
)
def conv_transpose1d(
    input: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Tensor:
    """The transpose of a convolution along one axis; see :func:`conv_transpose2d`.

    >>> import gpugrad as gg
    >>> from gpugrad.ops.transposed import conv_transpose1d
    >>> conv_transpose1d(gg.asarray([[1.0, 2.0]]), gg.asarray([[[1.0, 10.0]]]), stride=2)
    tensor([[ 1., 10.,  2., 20.]])
    """
    return _transpose(1, input, weight, bias, stride, padding, output_padding, groups, dilation)


@composite(
    samples=lambda: [
        sample(normal((2, 3, 3, 4)), normal((3, 2, 3, 2), 1), normal(2, 2), stride=2, padding=1,
               output_padding=1),
        sample(normal((1, 4, 3, 2)), normal((4, 2, 2, 2), 1), normal(4, 2), groups=2, stride=3,
               output_padding=2),
    ],
    reference=_numpy_transpose,
)  # fmt: skip
def conv_transpose2d(
    input: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Tensor:
    """What the gradient of a convolution's input is: each element spread over a window.

    Parameters
    ----------
    input:
        Shape (N, C, H, W), or (C, H, W) for a single one.
    weight:
        Shape (C, O/groups, kH, kW).
    bias:
        Shape (O,), or None.
    stride, padding, dilation, groups:
        Those of the convolution whose transpose it is.
    output_padding:
        Places more at the end of the result, less than ``stride`` or ``dilation``: a convolution
        with a stride forgets how many there were.

    Returns
    -------
    Shape (N, O, places, places), with (H − 1)·stride − 2·padding + dilation·(kH − 1) +
    output_padding + 1 places along the first axis. Raises ShapeError when the shapes do not fit,
    ParameterError for an option that cannot be.

    >>> import gpugrad as gg
    >>> from gpugrad.ops.transposed import conv_transpose2d
    >>> conv_transpose2d(gg.ones((1, 1, 1)), gg.ones((1, 3, 2, 2)), stride=2).shape
    (3, 2, 2)
    """
    return _transpose(2, input, weight, bias, stride, padding, output_padding, groups, dilation)
