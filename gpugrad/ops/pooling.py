"""Pooling: the largest element, or the mean, of every window."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from gpugrad.backend import Array, Backend
from gpugrad.backend.kernels import fusible
from gpugrad.core.conversion import asarray
from gpugrad.core.primitive import composite, differentiable, linear, primitive, sample
from gpugrad.core.tensor import Tensor
from gpugrad.errors import DTypeError, ParameterError, ShapeError
from gpugrad.ops.convolution import (
    Pads,
    Sizes,
    crop,
    fold,
    places,
    spread,
    taps,
    unfold,
    with_border,
)
from gpugrad.ops.creation import arange, ones
from gpugrad.ops.joining import concat
from gpugrad.ops.manipulation import expand_dims, squeeze
from gpugrad.ops.reductions import mean
from gpugrad.ops.samples import distinct, normal

#: No border.
_NONE: Pads = ()

# -- the largest element --------------------------------------------------------------------------


def _lowest(m: Any, x: Any, padding: Pads) -> Any:
    """x with a border that no element is smaller than."""
    if not any(map(any, padding)):
        return x
    whole, inside = with_border(x.shape, padding)
    low = m.create("full", whole, -math.inf, dtype=m.numpy_dtype(x), device=m.device(x))
    return m.setitem_copy(low, inside, x)


def _largest(
    m: Any, x: Any, out: Sizes, kernel: Sizes, stride: Sizes, padding: Pads, dilation: Sizes
) -> tuple[Any, Any]:
    """The largest element of every window, and the number of the first place that holds it."""
    windows = unfold(m, _lowest(m, x, padding), kernel, out, stride, _NONE, dilation)
    y = m.max(windows, axis=2)
    if not any(map(any, padding)):
        return y, m.argmax(windows, axis=2)
    # Of a window of negative infinities the border is no part.
    ones = m.ones_like(m.getitem(x, (slice(0, 1), slice(0, 1))))
    inside = unfold(m, ones, kernel, out, stride, padding, dilation) > 0
    found = (windows == m.expand_dims(y, axis=2)) | (windows != windows)
    return y, m.argmax(m.astype(found & inside, m.dtype("int8")), axis=2)


@fusible
def max_pool_backward(
    m: Any, g: Any, winner: Any, shape: Sizes, kernel: Sizes, stride: Sizes, padding: Pads,
    dilation: Sizes,
) -> Any:  # fmt: skip
    """Each element of g where its window's largest element is, added up, in an array of `shape`."""
    count, still = math.prod(kernel), (1,) * len(kernel)
    if m is differentiable:
        numbers = arange(count, dtype=winner.dtype, device=winner.device)
    else:
        numbers = m.create("arange", count, dtype=m.numpy_dtype(winner), device=m.device(winner))
    if kernel == stride and dilation == still:
        # Windows side by side: what is in them has every place once, and lies in order.
        lead, out = g.shape[:2], g.shape[2:]
        apart = (*lead, *(n for pair in zip(out, still) for n in pair))
        numbers = m.reshape(numbers, tuple(n for pair in zip(still, kernel) for n in pair))
        found = m.where(m.reshape(winner, apart) == numbers, m.reshape(g, apart), 0.0)
        return _side_by_side(m, found, shape, kernel, padding)
    numbers = m.reshape(numbers, (-1, *still))
    found = m.where(m.expand_dims(winner, axis=2) == numbers, m.expand_dims(g, axis=2), 0.0)
    return fold(m, found, shape, kernel, stride, padding, dilation)


def _side_by_side(m: Any, windows: Any, shape: Sizes, kernel: Sizes, padding: Pads) -> Any:
    """Windows, shape (N, C, and for each axis: windows, places in one), in an array of `shape`."""
    pairs = zip(windows.shape[2::2], windows.shape[3::2])
    covered = (*shape[:2], *(n * k for n, k in pairs))
    x, (whole, _) = m.reshape(windows, covered), with_border(shape, padding)
    if covered != whole:
        x = m.scatter_add(x, (..., *(slice(n) for n in covered[2:])), whole)
    return crop(m, x, shape, padding)


def _max_pool_vjp(
    g: Array, m: Any, x_shape: Sizes, winner: Array, kernel: Sizes, stride: Sizes, padding: Pads,
    dilation: Sizes,
) -> Array:  # fmt: skip
    return max_pool_backward(m, g, winner, x_shape, kernel, stride, padding, dilation)


def _max_samples() -> list[Any]:
    still: dict[str, Any] = {"padding": ((0, 0), (0, 0)), "dilation": (1, 1)}
    return [
        sample(distinct((2, 3, 4, 6)), (2, 2), (2, 2), **still),
        sample(distinct((2, 3, 5, 7)), (3, 2), (2, 1), ((1, 2), (0, 1)), (1, 2),
               note="windows that overlap and reach over the border"),
        sample(distinct((2, 3, 7)), (3,), (2,), ((1, 1),), (1,), note="one axis"),
        sample(distinct((0, 3, 4, 4)), (2, 2), (2, 2), **still, note="an empty batch"),
    ]  # fmt: skip


def _windows(x: Any, border: float, kernel: Any, stride: Any, padding: Any, dilation: Any) -> Any:
    """Every window of an array, by NumPy: (N, C, places in a window, \\*out)."""
    x = np.pad(x, ((0, 0), (0, 0), *padding), constant_values=border)
    out = tuple(map(places, x.shape[2:], kernel, stride, ((0, 0),) * len(kernel), dilation))
    parts = [x[tap] for tap in taps(out, kernel, stride, dilation)]
    return np.stack(parts, axis=2)


@primitive(
    vjps=(_max_pool_vjp,),
    aux=("winner",),
    broadcasts=False,
    samples=_max_samples,
    reference=lambda x, *options, **more: _windows(x, -np.inf, *options, *more.values()).max(2),
)
def max_pool(
    m: Backend, x: Array, /, kernel: Sizes, stride: Sizes, padding: Pads, dilation: Sizes
) -> tuple[Array, Array]:
    """The largest element of every window of ``x``, shape (N, C, \\*axes).

    ``kernel``, ``stride`` and ``dilation`` have a number per axis, ``padding`` a pair, places
    before and behind that hold no element. Of equal elements the first gets the gradient.

    >>> import gpugrad as gg
    >>> from gpugrad.ops.pooling import max_pool
    >>> max_pool(gg.asarray([[[1.0, 3.0, 2.0, 0.0]]]), (2,), (2,), ((0, 0),), (1,))
    tensor([[[3., 2.]]])
    """
    out = _out("max_pool", m, x, kernel, stride, padding, dilation)
    y, winner = _largest(m, x, out, kernel, stride, padding, dilation)
    return y, m.astype(winner, m.dtype("int8" if math.prod(kernel) < 128 else "int32"))


def _numpy_indices(x: Any, *options: Any) -> Any:
    plane = np.arange(math.prod(x.shape[2:])).reshape(x.shape[2:])
    numbers = _windows(np.broadcast_to(plane, x.shape), -1, *options)
    winner = _windows(x, -np.inf, *options).argmax(axis=2, keepdims=True)
    return np.take_along_axis(numbers, winner, axis=2)[:, :, 0]


@primitive(
    samples=lambda: [
        sample(distinct((2, 3, 4, 6)), (2, 2), (2, 2), ((1, 0), (0, 0)), (1, 1)),
        sample(distinct((2, 3, 7)), (3,), (2,), ((0, 0),), (2,)),
    ],
    reference=_numpy_indices,
)
def max_pool_indices(
    m: Backend, x: Array, /, kernel: Sizes, stride: Sizes, padding: Pads, dilation: Sizes
) -> Array:
    """Where the largest element of every window is: its number in the plane of its channel.

    >>> import gpugrad as gg
    >>> from gpugrad.ops.pooling import max_pool_indices
    >>> max_pool_indices(gg.asarray([[[1.0, 3.0, 2.0, 0.0]]]), (2,), (2,), ((0, 0),), (1,))
    tensor([[[1, 2]]])
    """
    out = _out("max_pool", m, x, kernel, stride, padding, dilation)
    _, winner = _largest(m, x, out, kernel, stride, padding, dilation)
    rest = m.astype(winner, m.dtype("int64"))
    found, plane = 0, 1
    for axis in reversed(range(len(out))):
        start = m.create("arange", out[axis], dtype="int64", device=m.device(x))
        start = start * stride[axis] - padding[axis][0]
        start = m.reshape(start, (-1, *(1,) * (len(out) - 1 - axis)))
        found = found + (start + rest % kernel[axis] * dilation[axis]) * plane
        rest = rest // kernel[axis]
        plane *= x.shape[2 + axis]
    return found


# -- sums and means -------------------------------------------------------------------------------


@fusible
def window_mean_backward(
    m: Any, g: Any, shape: Sizes, kernel: Sizes, stride: Sizes, padding: Pads, divisor: float
) -> Any:
    """The transpose of :func:`window_mean`."""
    g, still = g / divisor, (1,) * len(kernel)
    if kernel == stride:
        apart = tuple(n for pair in zip(g.shape[2:], still) for n in pair)
        full = tuple(n for pair in zip(g.shape[2:], kernel) for n in pair)
        g = m.broadcast_to(m.reshape(g, (*g.shape[:2], *apart)), (*g.shape[:2], *full))
        return _side_by_side(m, g, shape, kernel, padding)
    windows = m.broadcast_to(
        m.expand_dims(g, axis=2), (*g.shape[:2], math.prod(kernel), *g.shape[2:])
    )  # fmt: skip
    return fold(m, windows, shape, kernel, stride, padding, still)


@linear(
    transpose=lambda g, m, x_shape, kernel, stride, padding, divisor: window_mean_backward(
        m, g, x_shape, kernel, stride, padding, divisor
    ),
    samples=lambda: [
        sample(normal((2, 3, 4, 6)), (2, 2), (2, 2), ((0, 0), (0, 0)), 4.0),
        sample(normal((2, 3, 5, 7)), (3, 2), (2, 1), ((1, 2), (0, 1)), 5.0),
        sample(normal((2, 3, 7)), (3,), (2,), ((1, 1),), 1.0, note="one axis"),
        sample(normal((2, 3, 4, 4)), (4, 4), (4, 4), ((0, 0), (0, 0)), 16.0, note="whole planes"),
        sample(normal((0, 3, 4, 4)), (2, 2), (2, 2), ((0, 0), (0, 0)), 4.0, note="an empty batch"),
    ],
    reference=lambda x, kernel, stride, padding, divisor: (
        _windows(x, 0.0, kernel, stride, padding, (1,) * len(kernel)).sum(2) / divisor
    ),
)
def window_mean(
    m: Backend, x: Array, /, kernel: Sizes, stride: Sizes, padding: Pads, divisor: float
) -> Array:
    """The sum of every window of ``x``, shape (N, C, \\*axes), over ``divisor``.

    ``padding`` is zeros before and behind, a pair per axis.

    >>> import gpugrad as gg
    >>> from gpugrad.ops.pooling import window_mean
    >>> window_mean(gg.asarray([[[1.0, 3.0, 2.0, 0.0]]]), (2,), (2,), ((0, 0),), 2.0)
    tensor([[[2., 1.]]])
    """
    still = (1,) * len(kernel)
    out = _out("avg_pool", m, x, kernel, stride, padding, still)
    if any(map(any, padding)):
        whole, inside = with_border(x.shape, padding)
        x = m.scatter_add(x, inside, whole)
    total: Any = None
    for tap in taps(out, kernel, stride, still):
        part = m.getitem(x, tap)
        total = part if total is None else total + part
    return total / divisor


def _out(
    operation: str, m: Any, x: Any, kernel: Sizes, stride: Sizes, padding: Pads, dilation: Sizes
) -> Sizes:
    if m.numpy_dtype(x).kind not in "fV":  # bfloat16 is of kind V
        raise DTypeError(f"{operation}: {x.dtype} elements; convert them to a floating-point dtype")
    out = tuple(map(places, x.shape[2:], kernel, stride, padding, dilation))
    if any(n < 1 for n in out):
        raise ShapeError(
            f"{operation}: input of shape {tuple(x.shape)} has no window of kernel {kernel}, "
            f"dilation {dilation}, with padding {padding}; pad more, or use a smaller kernel"
        )
    return out


# -- PyTorch's functions --------------------------------------------------------------------------


class _Call:
    """The options of a call, one number per axis, and its operand as a batch."""

    def __init__(
        self, operation: str, axes: int, input: Any, kernel: Any, stride: Any, padding: Any,
        dilation: Any, ceil_mode: bool,
    ) -> None:  # fmt: skip
        x = asarray(input)
        if x.ndim not in (axes + 1, axes + 2):
            names = ", ".join("DHW"[-axes:])
            raise ShapeError(
                f"{operation}: input of shape {x.shape}; it is (N, C, {names}) or (C, {names})"
            )
        self.alone = x.ndim == axes + 1
        self.x: Any = expand_dims(x, axis=0) if self.alone else x
        self.kernel = spread(kernel, axes, operation, "kernel_size", 1)
        nothing = stride is None or stride in ((), [])
        self.stride = self.kernel if nothing else spread(stride, axes, operation, "stride", 1)
        self.dilation = spread(dilation, axes, operation, "dilation", 1)
        self.given = spread(padding, axes, operation, "padding", 0)
        for k, d, p in zip(self.kernel, self.dilation, self.given):
            if 2 * p > d * (k - 1) + 1:
                raise ParameterError(
                    f"{operation}: padding={padding!r} for kernel_size={kernel!r}; it is half of "
                    "that at most, so that every window has an element"
                )
        # Zeros behind the last place that the last window may want.
        self.behind = tuple(
            self._behind(n, *options) if ceil_mode else 0
            for n, *options in zip(
                self.x.shape[2:], self.kernel, self.stride, self.given, self.dilation
            )
        )
        self.padding = tuple((p, p + more) for p, more in zip(self.given, self.behind))

    @staticmethod
    def _behind(n: int, kernel: int, stride: int, pad: int, dilation: int) -> int:
        """Places that a last, incomplete window needs; it has to begin before the border behind."""
        span = dilation * (kernel - 1) + 1
        out = -(-(n + 2 * pad - span) // stride) + 1
        if (out - 1) * stride >= n + pad:
            out -= 1
        return max(0, (out - 1) * stride + span - n - 2 * pad)

    def result(self, y: Any) -> Any:
        return squeeze(y, axis=0) if self.alone else y


def _max_pool(
    operation: str, axes: int, input: Any, kernel_size: Any, stride: Any, padding: Any,
    dilation: Any, ceil_mode: bool, return_indices: bool,
) -> Any:  # fmt: skip
    call = _Call(operation, axes, input, kernel_size, stride, padding, dilation, ceil_mode)
    options = (call.kernel, call.stride, call.padding, call.dilation)
    y = call.result(max_pool(call.x, *options))
    return (y, call.result(max_pool_indices(call.x, *options))) if return_indices else y


def _avg_pool(
    operation: str, axes: int, input: Any, kernel_size: Any, stride: Any, padding: Any,
    ceil_mode: bool, count_include_pad: bool, divisor_override: int | None,
) -> Tensor:  # fmt: skip
    if divisor_override is not None and not divisor_override:
        raise ParameterError(f"{operation}: divisor_override=0; it divides the sums")
    call = _Call(operation, axes, input, kernel_size, stride, padding, 1, ceil_mode)
    behind, given = any(call.behind), any(call.given)
    if divisor_override is not None:
        divisor = divisor_override
    elif not behind and (count_include_pad or not given):
        divisor = math.prod(call.kernel)
    else:
        divisor = 1
    y = window_mean(call.x, call.kernel, call.stride, call.padding, float(divisor))
    if divisor_override is None and divisor == 1:
        # Windows of different numbers of places: a plane of ones tells how many.
        sizes, border = call.x.shape[2:], call.padding
        if count_include_pad:
            sizes = tuple(n + 2 * p for n, p in zip(sizes, call.given))
            border = tuple((0, n) for n in call.behind)
        plane = ones((1, 1, *sizes), dtype=call.x.dtype, device=call.x.device)
        y = y / window_mean(plane, call.kernel, call.stride, border, 1.0)
    return call.result(y)  # type: ignore[no-any-return]


def _adaptive(operation: str, axes: int, input: Any, output_size: Any) -> Tensor:
    x = asarray(input)
    if x.ndim not in (axes + 1, axes + 2):
        names = ", ".join("DHW"[-axes:])
        raise ShapeError(
            f"{operation}: input of shape {x.shape}; it is (N, C, {names}) or (C, {names})"
        )
    sizes = x.shape[-axes:]
    wanted = tuple(output_size) if isinstance(output_size, list | tuple) else (output_size,) * axes
    if len(wanted) == axes:
        wanted = tuple(n if w is None else w for w, n in zip(wanted, sizes))
    out = spread(wanted, axes, operation, "output_size", 1)
    if all(n % k == 0 for n, k in zip(sizes, out)) and all(sizes):
        kernel = tuple(n // k for n, k in zip(sizes, out))
        return _avg_pool(operation, axes, x, kernel, None, 0, False, True, None)
    y: Any = x
    for axis, n, k in zip(range(x.ndim - axes, x.ndim), sizes, out):
        if n == k:
            continue
        if not n:
            raise ShapeError(f"{operation}: input of shape {x.shape} has no element to average")
        lead = (slice(None),) * axis
        parts = [y[(*lead, slice(i * n // k, -(-(i + 1) * n // k)))] for i in range(k)]
        y = concat([mean(part, axis=axis, keepdims=True) for part in parts], axis=axis)
    return y  # type: ignore[no-any-return]


def max_pool1d(
    input: Any,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    """The largest element of every window along one axis; see :func:`max_pool2d`.

    >>> import gpugrad as gg
    >>> from gpugrad.nn.functional import max_pool1d
    >>> max_pool1d(gg.tensor([[1.0, 3.0, 2.0, 0.0]]), 2)
    tensor([[3., 2.]])
    """
    return _max_pool("max_pool1d", 1, input, kernel_size, stride, padding, dilation, ceil_mode,
                     return_indices)  # fmt: skip


def max_pool2d(
    input: Any,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    """The largest element of every window, as PyTorch's function.

    Parameters
    ----------
    input:
        Shape (N, C, H, W), or (C, H, W) for a single one.
    kernel_size, stride, dilation:
        An integer, or one per axis; ``stride=None`` stands for the kernel size.
    padding:
        Places on both sides that hold no element, at most half the kernel size.
    ceil_mode:
        Whether a last window that begins inside, but reaches beyond the border, counts.
    return_indices:
        Return also the places of the largest elements, int64 numbers within their planes.

    Of equal elements the first gets the gradient. Raises ShapeError when there is no window,
    ParameterError for an option that cannot be.

    >>> import gpugrad as gg
    >>> from gpugrad.nn.functional import max_pool2d
    >>> max_pool2d(gg.tensor([[[1.0, 3.0], [2.0, 0.0]]]), 2, return_indices=True)
    (tensor([[[3.]]]), tensor([[[1]]]))
    """
    return _max_pool("max_pool2d", 2, input, kernel_size, stride, padding, dilation, ceil_mode,
                     return_indices)  # fmt: skip


def avg_pool1d(
    input: Any,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
) -> Tensor:
    """The mean of every window along one axis; see :func:`avg_pool2d`.

    >>> import gpugrad as gg
    >>> from gpugrad.nn.functional import avg_pool1d
    >>> avg_pool1d(gg.tensor([[1.0, 3.0, 2.0, 0.0]]), 2)
    tensor([[2., 1.]])
    """
    return _avg_pool("avg_pool1d", 1, input, kernel_size, stride, padding, ceil_mode,
                     count_include_pad, None)  # fmt: skip


@composite(
    samples=lambda: [
        sample(normal((2, 3, 4, 6)), 2),
        sample(normal((3, 5, 5)), 3, 2, 1, count_include_pad=False),
    ],
    reference=lambda *args, **options: _numpy_avg_pool(*args, **options),
)
def avg_pool2d(
    input: Any,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """The mean of every window, as PyTorch's function.

    Parameters
    ----------
    input:
        Shape (N, C, H, W), or (C, H, W) for a single one.
    kernel_size, stride:
        An integer, or one per axis; ``stride=None`` stands for the kernel size.
    padding:
        Zeros on both sides, at most half the kernel size.
    ceil_mode:
        Whether a last window that begins inside, but reaches beyond the border, counts.
    count_include_pad:
        Whether these zeros count in the mean.
    divisor_override:
        What sums are divided by instead of the number of places.

    >>> import gpugrad as gg
    >>> from gpugrad.nn.functional import avg_pool2d
    >>> avg_pool2d(gg.tensor([[[1.0, 3.0], [2.0, 0.0]]]), 2)
    tensor([[[1.5]]])
    """
    return _avg_pool("avg_pool2d", 2, input, kernel_size, stride, padding, ceil_mode,
                     count_include_pad, divisor_override)  # fmt: skip


def _numpy_avg_pool(
    x: Any, kernel: int, stride: int | None = None, padding: int = 0,
    count_include_pad: bool = True,
) -> Any:  # fmt: skip
    lead = x.shape[:-2]
    options = ((kernel,) * 2, (stride or kernel,) * 2, ((padding,) * 2,) * 2, (1, 1))
    x = x.reshape(-1, 1, *x.shape[-2:])
    counts = _windows(np.ones_like(x), 0.0, *options).sum(2)
    y = _windows(x, 0.0, *options).sum(2) / (kernel**2 if count_include_pad else counts)
    return y.reshape(*lead, *y.shape[2:])


def adaptive_avg_pool1d(input: Any, output_size: Any) -> Tensor:
    """Means of parts of one axis that fill it evenly; see :func:`adaptive_avg_pool2d`.

    >>> import gpugrad as gg
    >>> from gpugrad.nn.functional import adaptive_avg_pool1d
    >>> adaptive_avg_pool1d(gg.tensor([[1.0, 3.0, 2.0, 0.0]]), 1)
    tensor([[1.5]])
    """
    return _adaptive("adaptive_avg_pool1d", 1, input, output_size)


@composite(
    samples=lambda: [
        sample(normal((2, 3, 4, 6)), 1, note="one mean per plane"),
        sample(normal((2, 3, 4, 6)), (2, 3)),
        sample(normal((3, 5, 7)), (2, 3), note="parts that overlap"),
    ],
    reference=lambda x, output_size: _numpy_adaptive(x, output_size),
)
def adaptive_avg_pool2d(input: Any, output_size: Any) -> Tensor:
    """Means of parts of each plane, as PyTorch's function: as many as ``output_size`` says.

    Part i of k along an axis of n places is from ⌊i·n/k⌋ up to ⌈(i+1)·n/k⌉. ``input`` has the shape
    (N, C, H, W) or (C, H, W); ``output_size`` is an integer, or two, None for the input's own.

    >>> import gpugrad as gg
    >>> from gpugrad.nn.functional import adaptive_avg_pool2d
    >>> adaptive_avg_pool2d(gg.tensor([[[1.0, 3.0], [2.0, 0.0]]]), (1, None))
    tensor([[[1.5, 1.5]]])
    """
    return _adaptive("adaptive_avg_pool2d", 2, input, output_size)


def _numpy_adaptive(x: Any, output_size: Any) -> Any:
    rows, columns = output_size if isinstance(output_size, tuple) else (output_size,) * 2
    h, w = x.shape[-2:]
    return np.stack([
        np.stack([
            x[..., i * h // rows : -(-(i + 1) * h // rows),
              j * w // columns : -(-(j + 1) * w // columns)].mean((-2, -1))
            for j in range(columns)], axis=-1)
        for i in range(rows)], axis=-2)  # fmt: skip
