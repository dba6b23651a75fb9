"""Transposed convolutions: made of a product and of windows that are added up."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from gpugrad.core.conversion import asarray
from gpugrad.core.primitive import composite, differentiable, sample
from gpugrad.core.tensor import Tensor
from gpugrad.errors import ParameterError, ShapeError
from gpugrad.ops.convolution import check_groups, fold, grouped, spread
from gpugrad.ops.manipulation import expand_dims, squeeze
from gpugrad.ops.samples import normal


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
    kernel, outputs, (batch, channels, *sizes) = w.shape[2:], w.shape[1], x.shape
    out = tuple(
        (n - 1) * s - 2 * p + d * (k - 1) + q + 1
        for n, s, p, d, k, q in zip(sizes, stride, zeros, dilation, kernel, more)
    )
    if min(out) < 1:
        raise ShapeError(f"{operation}: a result of {out} places; use less padding")
    m, inner = differentiable, channels // groups
    rows = outputs * math.prod(kernel)
    turned = m.matrix_transpose(m.reshape(w, (groups, inner, rows)))
    windows = m.matmul(turned, grouped(m, x, groups, inner, math.prod(sizes)))
    windows = m.reshape(windows, (batch, groups * outputs, math.prod(kernel), *sizes))
    border = tuple((p, max(0, p - q)) for p, q in zip(zeros, more))
    y = fold(m, windows, (batch, groups * outputs, *out), kernel, stride, border, dilation)
    if bias is not None:
        y = y + m.reshape(asarray(bias), (-1, *(1,) * axes))
    return squeeze(y, axis=0) if alone else y  # type: ignore[no-any-return]


def _numpy_transpose(
    x: Any, weight: Any, bias: Any = None, stride: int = 1, padding: int = 0,
    output_padding: int = 0, groups: int = 1, dilation: int = 1,
) -> Any:  # fmt: skip
    """The definition along one axis or two, one place at a time."""
    n, c, *sizes = x.shape
    outputs, *kernel = weight.shape[1:]
    out = [(k - 1) * stride + dilation * (q - 1) + 1 for k, q in zip(sizes, kernel)]
    y = np.zeros((n, groups * outputs, *(q + output_padding for q in out)))
    for i in range(c):
        group = slice(i * groups // c * outputs, (i * groups // c + 1) * outputs)
        for place in np.ndindex(*sizes):
            for k in np.ndindex(*kernel):
                at = tuple(p * stride + q * dilation for p, q in zip(place, k))
                seen = x[(slice(None), i, *place)]
                y[(slice(None), group, *at)] += np.outer(seen, weight[(i, slice(None), *k)])
    inside: Any = (..., *(slice(padding, q + output_padding - padding) for q in out))
    y = y[inside]
    return y if bias is None else y + bias.reshape(-1, *(1,) * len(sizes))


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
