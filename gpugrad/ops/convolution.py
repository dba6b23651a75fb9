"""Convolutions: a layer's product, bias and activation as one operation, on one axis or more."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np

from gpugrad.backend import Array, Backend
from gpugrad.backend.kernels import fusible
from gpugrad.core.conversion import asarray
from gpugrad.core.primitive import composite, differentiable, primitive, sample
from gpugrad.core.tensor import Tensor
from gpugrad.errors import ParameterError, ShapeError
from gpugrad.ops.fused import ACTIVATIONS, activation_named
from gpugrad.ops.manipulation import expand_dims, squeeze
from gpugrad.ops.samples import distinct, normal

Sizes = tuple[int, ...]
Pads = tuple[tuple[int, int], ...]

# -- windows --------------------------------------------------------------------------------------


def spread(value: Any, axes: int, operation: str, name: str, least: int) -> Sizes:
    """An option as one integer per axis; ParameterError when it is none, or too small.

    >>> spread(2, 2, "conv2d", "stride", 1)
    (2, 2)
    """
    values = tuple(value) if isinstance(value, Sequence) else (value,) * axes
    if len(values) == 1:
        values *= axes
    if len(values) != axes or any(
        isinstance(v, bool) or not isinstance(v, int | np.integer) for v in values
    ):
        raise ParameterError(
            f"{operation}: {name}={value!r}; it is an integer, or {axes} of them, one per axis"
        )
    if min(values) < least:
        raise ParameterError(f"{operation}: {name}={value!r}; it must be {least} or more")
    return tuple(int(v) for v in values)


def places(n: int, kernel: int, stride: int, pads: tuple[int, int], dilation: int) -> int:
    """How many windows fit along an axis; not positive when none does.

    >>> places(28, 3, 2, (1, 1), 1)
    14
    """
    return (n + sum(pads) - dilation * (kernel - 1) - 1) // stride + 1


def taps(out: Sizes, kernel: Sizes, stride: Sizes, dilation: Sizes) -> list[tuple[Any, ...]]:
    """For each place in a window, the index of what all windows have there."""
    return [
        (..., *(slice(k * d, k * d + (n - 1) * s + 1, s)
                for k, n, s, d in zip(where, out, stride, dilation)))
        for where in product(*map(range, kernel))
    ]  # fmt: skip


def with_border(shape: Sizes, pads: Pads) -> tuple[Sizes, tuple[Any, ...]]:
    """The shape with its border, and the index of what lies within that."""
    lead = shape[: -len(pads)]
    sizes = shape[-len(pads) :]
    whole = (*lead, *(n + low + high for n, (low, high) in zip(sizes, pads)))
    return whole, (..., *(slice(low, low + n) for n, (low, _) in zip(sizes, pads)))


def crop(m: Any, x: Any, shape: Sizes, padding: Pads) -> Any:
    """What lies within the border of x, of the given shape."""
    return m.getitem(x, with_border(shape, padding)[1]) if any(map(any, padding)) else x


def unfold(
    m: Any, x: Any, kernel: Sizes, out: Sizes, stride: Sizes, padding: Pads, dilation: Sizes,
    axis: int = 2,
) -> Any:  # fmt: skip
    """Every window of x, shape [N, C, \\*axes]: [N, C, places in a window, \\*out].

    With ``axis=1`` the places in a window come between the first two axes.
    """
    if any(map(any, padding)):
        whole, inside = with_border(x.shape, padding)
        x = m.scatter_add(x, inside, whole)
    return m.stack([m.getitem(x, tap) for tap in taps(out, kernel, stride, dilation)], axis=axis)


def fold(
    m: Any, windows: Any, shape: Sizes, kernel: Sizes, stride: Sizes, padding: Pads,
    dilation: Sizes,
) -> Any:  # fmt: skip
    """The transpose of :func:`unfold`: windows added up to an array of the given shape."""
    whole, _ = with_border(shape, padding)
    raw = m is not differentiable and m.mutable
    total: Any = None
    if raw:
        dtype, device = m.numpy_dtype(windows), m.device(windows)
        total = m.create("zeros", whole, dtype=dtype, device=device)
    for k, tap in enumerate(taps(windows.shape[3:], kernel, stride, dilation)):
        part = m.getitem(windows, (slice(None), slice(None), k))
        if raw:  # a view is added to: one pass over what the windows have there
            view = m.getitem(total, tap)
            view += part
        else:
            part = m.scatter_add(part, tap, whole)
            total = part if total is None else total + part
    return crop(m, total, shape, padding)


# -- the operation --------------------------------------------------------------------------------


def grouped(m: Any, x: Any, groups: int, rows: int, columns: int) -> Any:
    """x, shape [N, channels, …], as matrices [N, groups, rows, columns]."""
    return m.reshape(x, (x.shape[0], groups, rows, columns))


def _product(
    m: Any, x: Any, weight: Any, stride: Sizes, padding: Pads, dilation: Sizes, groups: int
) -> Any:
    kernel = weight.shape[2:]
    out = _out("convolution", x.shape, weight.shape, stride, padding, dilation)
    outputs, inner = weight.shape[0], math.prod(weight.shape[1:])
    windows = unfold(m, x, kernel, out, stride, padding, dilation)
    columns = grouped(m, windows, groups, inner, math.prod(out))
    y = m.matmul(m.reshape(weight, (groups, outputs // groups, inner)), columns)
    return m.reshape(y, (x.shape[0], outputs, *out))


@fusible
def convolution_backward(
    m: Any, g: Any, x: Any, weight: Any, bias: Any, kept: Any, stride: Sizes, padding: Pads,
    dilation: Sizes, groups: int, activation: str | None, needs: Sequence[bool],
    weight_home: Any = None, bias_home: Any = None,
) -> tuple[Any, Any, Any]:  # fmt: skip
    """The gradients of input, weight and bias, each None unless it is needed.

    ``kept`` is what the activation's derivative is told: its result or its operand.
    """
    if activation is not None:
        g = ACTIVATIONS[activation].partial(m, g, kept)
    gx = gw = gb = None
    if needs[2]:
        gb = sum_over_places(m, g, bias_home)
    batch, outputs, *out = g.shape
    inner, count = math.prod(weight.shape[1:]), math.prod(out)
    kernel = weight.shape[2:]
    border = tuple(
        (d * (k - 1) - low, d * (k - 1) - high)
        for d, k, (low, high) in zip(dilation, kernel, padding)
    )
    # Windows of g in place of those of x: with many more outputs than channels they were larger.
    gathers = set(stride) == {1} and min(map(min, border)) >= 0 and outputs <= 2 * x.shape[1]
    if needs[0] and gathers:
        return *_gathered(m, g, x, weight, border, dilation, groups, needs[1], weight_home), gb
    if needs[0]:
        turned = m.matrix_transpose(m.reshape(weight, (groups, outputs // groups, inner)))
        rows = grouped(m, g, groups, outputs // groups, count)
        windows = m.reshape(m.matmul(turned, rows), (batch, x.shape[1], math.prod(kernel), *out))
        gx = fold(m, windows, x.shape, kernel, stride, padding, dilation)
    if needs[1]:
        windows = unfold(
            m, exchanged(m, x), kernel, tuple(out), stride, padding, dilation, axis=1
        )  # fmt: skip
        left = per_group(m, exchanged(m, g), groups, outputs // groups, batch * count)
        right = per_group(m, windows, groups, inner, batch * count)
        gw = m.reshape(m.matmul(left, m.matrix_transpose(right)), weight.shape)
        gw = at_home(m, gw, weight_home)
    return gx, gw, gb


def exchanged(m: Any, x: Any) -> Any:
    """x with its first two axes, images and channels, exchanged."""
    return m.permute_dims(x, (1, 0, *range(2, x.ndim)))


def per_group(m: Any, x: Any, groups: int, rows: int, columns: int) -> Any:
    """x, channels first, as a matrix per group; that of one group alone is a plain matrix."""
    return m.reshape(x, (groups, rows, columns) if groups > 1 else (rows, columns))


def at_home(m: Any, x: Any, home: Any) -> Any:
    """A gradient, in the memory that its operand has for it, if it has."""
    if home is None or m is differentiable:
        return x
    m.setitem(home, ..., x)
    return home


def sum_over_places(m: Any, g: Any, home: Any) -> Any:
    """The sum of g, shape [N, O, \\*axes], over all axes but the second: a bias's gradient."""
    if home is None or m is differentiable or m.numpy_dtype(g).itemsize == 2:
        total = m.sum_to(g, (g.shape[1], *(1,) * (g.ndim - 2)))
        return at_home(m, m.reshape(total, (g.shape[1],)), home)
    m.xp.sum(g, axis=(0, *range(2, g.ndim)), out=home)
    return home


def _gathered(
    m: Any, g: Any, x: Any, weight: Any, border: Pads, dilation: Sizes, groups: int,
    wants_weight: bool, weight_home: Any,
) -> tuple[Any, Any]:  # fmt: skip
    """The gradients of input and weight where the stride is 1: products with the windows of g.

    A window is what one place of the input has a share in; each ends where the weight begins.
    """
    outputs, inner, *kernel = weight.shape
    batch, channels, *sizes = x.shape
    outer, places_, count = outputs // groups, math.prod(kernel), batch * math.prod(sizes)
    still = (1,) * len(kernel)
    windows = unfold(
        m, exchanged(m, g), tuple(kernel), tuple(sizes), still, border, dilation, axis=1
    )  # fmt: skip
    windows = per_group(m, windows, groups, outer * places_, count)
    turned = m.flip(m.reshape(weight, (groups, outer, inner, places_)), axis=-1)
    turned = m.permute_dims(turned, (0, 2, 1, 3))
    turned = per_group(m, turned, groups, inner, outer * places_)
    gx = exchanged(m, m.reshape(m.matmul(turned, windows), (channels, batch, *sizes)))
    if not wants_weight:
        return gx, None
    seen = per_group(m, exchanged(m, x), groups, inner, count)
    gw = m.reshape(m.matmul(windows, m.matrix_transpose(seen)), (outputs, *kernel, inner))
    last = len(kernel) + 1
    gw = m.permute_dims(m.flip(gw, axis=tuple(range(1, last))), (0, last, *range(1, last)))
    return gx, at_home(m, gw, weight_home)


def _convolution_vjp(
    m: Any, g: Any, x: Any, weight: Any, bias: Any, kept: Any, stride: Sizes, padding: Pads,
    dilation: Sizes, groups: int, activation: str | None, needs: Any, weight_home: Any,
    bias_home: Any,
) -> Any:  # fmt: skip
    if m is differentiable and activation is not None:
        # What was kept beside the result would count as a constant.
        chosen = ACTIVATIONS[activation]
        kept = m.convolution(x, weight, bias, stride, padding, dilation, groups)
        kept = chosen.forward(m, kept) if chosen.from_result else kept
    return convolution_backward(
        m, g, x, weight, bias, kept, stride, padding, dilation, groups, activation, needs,
        weight_home, bias_home,
    )  # fmt: skip


def _samples() -> list[Any]:
    x, w, b = normal((2, 3, 6, 5), 0), normal((4, 3, 3, 2), 1), normal(4, 2)
    still: dict[str, Any] = {"stride": (1, 1), "padding": ((0, 0), (0, 0)), "dilation": (1, 1)}
    return [
        sample(x, w, b, **still),
        sample(x, w, None, **still, note="without a bias"),
        sample(x, w, b, **still, activation="tanh"),
        sample(x, w, b, **still, activation="gelu_tanh"),
        sample(distinct((1, 1, 3, 3)), distinct((2, 1, 2, 2), 1), distinct(2, 2), **still,
               activation="relu"),
        sample(x, w, b, stride=(2, 3), padding=((2, 1), (0, 3)), dilation=(2, 1)),
        sample(normal((2, 4, 5, 4)), normal((6, 2, 2, 2), 1), normal(6, 2), stride=(1, 2),
               padding=((1, 1), (1, 1)), dilation=(1, 1), groups=2, activation="silu"),
        sample(normal((2, 3, 4, 4)), normal((3, 1, 3, 3), 1), None, stride=(1, 1),
               padding=((1, 1), (1, 1)), dilation=(1, 1), groups=3, note="each channel alone"),
        sample(normal((2, 3, 7)), normal((2, 3, 3), 1), normal(2, 2), stride=(2,),
               padding=((1, 1),), dilation=(1,), activation="sigmoid", note="one axis"),
        sample(normal((1, 2, 3, 3, 3)), normal((2, 2, 2, 2, 2), 1), normal(2, 2),
               stride=(1, 1, 1), padding=((0, 0),) * 3, dilation=(1, 1, 1), note="three axes"),
        sample(normal((2, 3, 4, 4)), normal((5, 3, 1, 1), 1), normal(5, 2), **still),
        sample(np.zeros((0, 3, 6, 5)), w, b, **still, activation="tanh", note="an empty batch"),
    ]  # fmt: skip


def _reference(
    x: Any, weight: Any, bias: Any = None, stride: Any = (), padding: Any = (), dilation: Any = (),
    groups: int = 1, activation: str | None = None,
) -> Any:  # fmt: skip
    """The definition, one place and one channel at a time."""
    from gpugrad.backend import backend_for_device

    out = _out("convolution", x.shape, weight.shape, stride, padding, dilation)
    x = np.pad(x, ((0, 0), (0, 0), *padding))
    outputs, inner, *kernel = weight.shape
    y = np.zeros((x.shape[0], outputs, *out))
    for o in range(outputs):
        start = o // (outputs // groups) * inner
        for place in np.ndindex(*out):
            window = tuple(
                slice(p * s, p * s + d * (k - 1) + 1, d)
                for p, s, d, k in zip(place, stride, dilation, kernel)
            )
            seen = x[(slice(None), slice(start, start + inner), *window)]
            y[(slice(None), o, *place)] = (seen * weight[o]).sum(tuple(range(1, x.ndim)))
        y[:, o] += 0.0 if bias is None else bias[o]
    if activation is None:
        return y
    return ACTIVATIONS[activation].forward(backend_for_device("cpu"), y)


@primitive(vjp=_convolution_vjp, aux=("kept",), samples=_samples, reference=_reference)
def convolution(
    m: Backend,
    x: Array,
    weight: Array,
    bias: Array | None = None,
    /,
    stride: Sizes = (1, 1),
    padding: Pads = ((0, 0), (0, 0)),
    dilation: Sizes = (1, 1),
    groups: int = 1,
    activation: str | None = None,
) -> tuple[Array, Array | None]:
    """``activation(x ⋆ weight + bias)``: a layer of a net, and its three gradients in one call.

    Parameters
    ----------
    x:
        Shape (N, C, \\*axes), with one axis of places or more.
    weight:
        Shape (O, C/groups, \\*kernel). It is not turned around, as everywhere in deep learning.
    bias:
        Shape (O,), or None.
    stride, dilation:
        One number per axis: from window to window, and from place to place within one.
    padding:
        Zeros before and behind, a pair per axis.
    groups:
        How many parts the channels are in; each part of the outputs sees one of the inputs.
    activation:
        A name, as in :func:`gpugrad.bias_activation`, or None.

    Returns
    -------
    Shape (N, O, \\*places). Its elements may lie in memory with the channels last.

    >>> import gpugrad as gg
    >>> from gpugrad.ops.convolution import convolution
    >>> x, weight = gg.asarray([[[1.0, 2.0, 4.0]]]), gg.asarray([[[-1.0, 1.0]]])
    >>> convolution(x, weight, None, (1,), ((0, 0),), (1,))
    tensor([[[1., 2.]]])
    """
    _check(x.shape, weight.shape, None if bias is None else bias.shape, groups)
    y = _product(m, x, weight, stride, padding, dilation, groups)
    if bias is not None:
        y = y + m.reshape(bias, (-1, *(1,) * (y.ndim - 2)))
    if activation is None:
        return y, None
    chosen = activation_named("convolution", activation)
    z, y = y, chosen.forward(m, y)
    return y, y if chosen.from_result else z


# -- what does not fit ----------------------------------------------------------------------------


def _out(
    operation: str, x: Sizes, weight: Sizes, stride: Sizes, padding: Pads, dilation: Sizes
) -> Sizes:
    """How many places there are along each axis; ShapeError when there is none on one."""
    out = tuple(map(places, x[2:], weight[2:], stride, padding, dilation))
    for axis, n in enumerate(out):
        if n < 1:
            need = dilation[axis] * (weight[2 + axis] - 1) + 1
            raise ShapeError(
                f"{operation}: input of shape {tuple(x)}: axis {2 + axis} has {x[2 + axis]} "
                f"places and padding {padding[axis]}, the kernel spans {need}; pad more, or use a "
                "smaller kernel or dilation"
            )
    return out


def _check(x: Sizes, weight: Sizes, bias: Sizes | None, groups: int) -> None:
    shapes = f"convolution: input of shape {tuple(x)} and weight of shape {tuple(weight)}"
    if len(weight) < 3 or len(x) != len(weight):
        raise ShapeError(
            f"{shapes}: they are (N, C, *axes) and (O, C/groups, *kernel), with as many axes"
        )
    if x[1] != weight[1] * groups:
        raise ShapeError(
            f"{shapes}, groups={groups}: the weight is made for {weight[1] * groups} channels, "
            f"the input has {x[1]}; give the layer in_channels={x[1]}, or another input"
        )
    if weight[0] % groups:
        raise ShapeError(
            f"{shapes}, groups={groups}: {weight[0]} outputs do not divide into groups"
        )
    if bias is not None and bias != weight[:1]:
        raise ShapeError(
            f"convolution: bias of shape {tuple(bias)} for weight of shape {tuple(weight)}; it "
            f"needs one element per output, {tuple(weight[:1])}"
        )


# -- PyTorch's functions --------------------------------------------------------------------------


def pads(padding: Any, kernel: Sizes, stride: Sizes, dilation: Sizes, operation: str) -> Pads:
    """PyTorch's ``padding`` as a pair of numbers per axis.

    >>> pads("same", (4,), (1,), (1,), "conv1d")
    ((1, 2),)
    """
    if padding == "valid":
        return ((0, 0),) * len(kernel)
    if padding == "same":
        if any(s != 1 for s in stride):
            raise ParameterError(
                f'{operation}: padding="same" keeps the size, which stride={stride} does not; '
                "give the padding in numbers"
            )
        totals = [d * (k - 1) for k, d in zip(kernel, dilation)]
        return tuple((n // 2, n - n // 2) for n in totals)
    if isinstance(padding, str):
        raise ParameterError(
            f'{operation}: padding={padding!r}; it is "same", "valid", or a number per axis'
        )
    return tuple((n, n) for n in spread(padding, len(kernel), operation, "padding", 0))


def check_groups(groups: Any, operation: str) -> int:
    """The number of groups; ParameterError unless it is one."""
    if isinstance(groups, bool) or not isinstance(groups, int | np.integer) or groups < 1:
        raise ParameterError(f"{operation}: groups={groups!r}; it is an integer, 1 or more")
    return int(groups)


def _convolve(
    axes: int, input: Any, weight: Any, bias: Any, stride: Any, padding: Any, dilation: Any,
    groups: Any, activation: str | None,
) -> Tensor:  # fmt: skip
    operation = f"conv{axes}d"
    x, w = asarray(input), asarray(weight)
    if x.ndim not in (axes + 1, axes + 2) or w.ndim != axes + 2:
        names = ", ".join("DHW"[-axes:])
        raise ShapeError(
            f"{operation}: input of shape {x.shape} and weight of shape {w.shape}; the input is "
            f"(N, C, {names}) or (C, {names}), the weight (O, C/groups, "
            f"{', '.join('k' + n for n in 'DHW'[-axes:])})"
        )
    stride = spread(stride, axes, operation, "stride", 1)
    dilation = spread(dilation, axes, operation, "dilation", 1)
    zeros = pads(padding, w.shape[2:], stride, dilation, operation)
    if activation is not None:
        activation_named(operation, activation)
    alone = x.ndim == axes + 1
    y = convolution(
        expand_dims(x, axis=0) if alone else x, w, bias, stride, zeros, dilation,
        check_groups(groups, operation), activation,
    )  # fmt: skip
    return squeeze(y, axis=0) if alone else y  # type: ignore[no-any-return]


def _numpy_convolve(axes: int) -> Any:
    def reference(
        x: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0,
        dilation: Any = 1, groups: int = 1, activation: str | None = None,
    ) -> Any:  # fmt: skip
        stride, dilation = (spread(v, axes, "", "", 1) for v in (stride, dilation))
        zeros = pads(padding, weight.shape[2:], stride, dilation, "")
        alone = x.ndim == axes + 1
        x = x[None] if alone else x
        y = _reference(x, weight, bias, stride, zeros, dilation, groups, activation)
        return y[0] if alone else y

    return reference


@composite(
    samples=lambda: [
        sample(normal((2, 3, 7)), normal((4, 3, 3), 1), normal(4, 2), stride=2, padding=1),
        sample(normal((4, 7)), normal((4, 2, 3), 1), None, groups=2, dilation=2, padding="same"),
    ],
    reference=_numpy_convolve(1),
)
def conv1d(
    input: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    *,
    activation: str | None = None,
) -> Tensor:
    """A convolution along one axis, as PyTorch's function; see :func:`conv2d`.

    ``input`` has the shape (N, C, L) or (C, L), ``weight`` (O, C/groups, k).

    >>> import gpugrad as gg
    >>> from gpugrad.ops.convolution import conv1d
    >>> conv1d(gg.asarray([[1.0, 2.0, 4.0]]), gg.asarray([[[-1.0, 1.0]]]))
    tensor([[1., 2.]])
    """
    return _convolve(1, input, weight, bias, stride, padding, dilation, groups, activation)


@composite(
    samples=lambda: [
        sample(normal((2, 3, 5, 6)), normal((4, 3, 3, 2), 1), normal(4, 2), padding="same"),
        sample(normal((3, 5, 6)), normal((4, 3, 3, 2), 1), None, stride=(2, 1), padding=(1, 0),
               activation="tanh"),
    ],
    reference=_numpy_convolve(2),
)  # fmt: skip
def conv2d(
    input: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    *,
    activation: str | None = None,
) -> Tensor:
    """A convolution over two axes, as PyTorch's function.

    Parameters
    ----------
    input:
        Shape (N, C, H, W), or (C, H, W) for a single one.
    weight:
        Shape (O, C/groups, kH, kW).
    bias:
        Shape (O,), or None.
    stride, dilation:
        An integer, or one per axis.
    padding:
        Zeros on both sides, an integer or one per axis; ``"valid"`` for none; ``"same"`` for a
        result of the input's size (stride 1), the odd zero behind.
    groups:
        Parts of the channels that do not see each other.
    activation:
        A name such as ``"relu"``: it is applied too, and all of it is one operation, with one
        backward call for all gradients.

    Returns
    -------
    Shape (N, O, places, places) or (O, places, places). On the CPU its elements lie in memory with
    the channels last, which the next layer reads as it is.

    Raises ShapeError when the shapes do not fit, ParameterError for an option that cannot be.

    >>> import gpugrad as gg
    >>> from gpugrad.ops.convolution import conv2d
    >>> conv2d(gg.ones((1, 3, 3)), gg.ones((1, 1, 2, 2)), stride=1).tolist()
    [[[4.0, 4.0], [4.0, 4.0]]]
    """
    return _convolve(2, input, weight, bias, stride, padding, dilation, groups, activation)
