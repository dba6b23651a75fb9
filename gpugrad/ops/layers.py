"""A chain of layers as one operation.

Where layers are small, what the program pays for each call is more than what the call computes.
Between large ones, what Python does is slow, for its code has left the caches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from gpugrad.backend import SPACES, Array, Backend
from gpugrad.backend.kernels import fusible, kernel_mode
from gpugrad.core.autocast import is_autocast_enabled
from gpugrad.core.calls import is_told
from gpugrad.core.primitive import differentiable, primitive, sample
from gpugrad.core.tensor import Tensor
from gpugrad.errors import DTypeError, ShapeError
from gpugrad.ops.fused import activation_named, reference
from gpugrad.ops.linalg import (
    activated,
    biased,
    linear,
    product_of,
    sum_over_rows,
    weight_gradient,
)
from gpugrad.ops.samples import normal

__all__: list[str] = []


#: Layers that are quicker in one call: so many, or two if one of them has so many multiply-adds.
CHAIN, LARGE = 8, 1 << 21


def joins(x: Any, parameters: Sequence[Any], activation: str, ends: bool) -> bool:
    """Whether layers are quicker in one call: where there is a kernel for them.

    `parameters` are a weight and a bias of each. False, too, for what does not fit together, so
    that the layer at fault can say so, and where somebody is to be told of each layer.
    """
    if not isinstance(x, Tensor) or is_autocast_enabled() or kernel_mode() == "off" or is_told():
        return False
    data = x.data
    space = SPACES[type(data)]
    slot = space.slots.get("layers")
    if slot is None or not data.shape:
        return False
    arrays = [p.data for p in parameters]
    rows = math.prod(data.shape[:-1])
    if len(parameters) < 2 * CHAIN and max(w.size for w in arrays[::2]) * rows < LARGE:
        return False
    return slot.takes(space, data, *arrays, activation=activation, ends=ends)


def _pairs(arrays: Sequence[Any]) -> list[tuple[Any, Any]]:
    """The weight and the bias of each layer."""
    if len(arrays) < 3 or len(arrays) % 2 == 0:
        raise ShapeError(
            f"layers: {len(arrays)} arrays; an input is needed, and a weight and a bias for each "
            "layer"
        )
    return list(zip(arrays[1::2], arrays[2::2]))


def _in_one(m: Backend, arrays: Sequence[Array]) -> Array:
    return m.concat([m.reshape(x, (-1,)) for x in arrays])


def _apart(m: Any, kept: Array, shapes: Sequence[tuple[int, ...]]) -> list[Array]:
    """Arrays of these shapes that lie in `kept` one after the other."""
    found, start = [], 0
    for shape in shapes:
        size = math.prod(shape)
        found.append(m.reshape(m.getitem(kept, slice(start, start + size)), shape))
        start += size
    return found


@fusible
def layers_backward(
    m: Any, g: Any, arrays: Sequence[Any], kept: Any, activation: str, ends: bool,
    needs: Sequence[bool], arrays_home: Sequence[Any],
) -> list[Any]:  # fmt: skip
    """All gradients of a chain, each only when it is needed."""
    chosen = activation_named("layers", activation)
    pairs = _pairs(arrays)
    bent = pairs[:-1] if ends else pairs  # those with an activation
    if m is differentiable:  # what was kept beside the result would count as a constant
        results, sums = [arrays[0]], []
        for weight, bias in bent:
            sums.append(linear(results[-1], weight, bias))
            results.append(chosen.forward(m, sums[-1]))
    else:
        shapes = [(*arrays[0].shape[:-1], bias.shape[0]) for _, bias in bent]
        found = _apart(m, kept, shapes if chosen.from_result else shapes * 2)
        results, sums = [arrays[0], *found[: len(bent)]], found[len(bent) :]
    told = results[1:] if chosen.from_result else sums
    grads: list[Any] = [None] * len(arrays)
    first = max(list(needs).index(True) - 1, 0) // 2
    for k in range(len(pairs) - 1, first - 1, -1):
        weight, bias = pairs[k]
        at_weight, at_bias = 1 + 2 * k, 2 + 2 * k
        if k < len(bent):
            g = chosen.partial(m, g, told[k])
        if needs[at_weight]:
            grads[at_weight] = weight_gradient(m, g, results[k], arrays_home[at_weight])
        if needs[at_bias]:
            grads[at_bias] = sum_over_rows(m, g, bias.shape, arrays_home[at_bias])
        if k > first or needs[0]:
            g = product_of(m, g, weight)
    if needs[0]:
        grads[0] = g
    return grads


def _reference(x: Any, *parameters: Any, activation: str = "relu", ends: bool = False) -> Any:
    *pairs, last = zip(parameters[::2], parameters[1::2])
    for weight, bias in pairs:
        x = reference(x @ weight.T, bias, activation)
    weight, bias = last
    return x @ weight.T + bias if ends else reference(x @ weight.T, bias, activation)


def _samples() -> Any:
    def parameters(*features: int) -> list[Any]:
        found = []
        for k, shape in enumerate(zip(features[1:], features)):
            found += [normal(shape, 2 * k + 1), normal(shape[:1], 2 * k + 2)]
        return found

    return [
        sample(normal((4, 3), 0), *parameters(3, 2, 5, 4), activation="tanh"),
        sample(normal((4, 3), 0), *parameters(3, 2, 3), activation="gelu_tanh"),
        sample(normal((2, 3, 2), 0), *parameters(2, 3, 2), activation="sigmoid", note="more axes"),
        sample(normal(3, 0), *parameters(3, 2, 2), activation="silu", note="one row"),
        sample(normal((0, 3), 0), *parameters(3, 2, 3), activation="silu", note="no rows"),
        sample(normal((4, 3), 0), *parameters(3, 2), activation="tanh", note="one layer"),
        sample(normal((4, 3), 0), *parameters(3, 2, 5, 4), activation="tanh", ends=True,
               note="a bare end"),
        sample(normal((2, 3, 2), 0), *parameters(2, 3, 2), activation="gelu", ends=True,
               note="a bare end after another activation"),
        sample(normal((4, 3), 0), *parameters(3, 2), ends=True, note="one bare layer"),
    ]  # fmt: skip


@primitive(
    vjp=layers_backward,
    aux=("kept",),
    broadcasts=False,
    samples=_samples,
    reference=_reference,
)
def layers(
    m: Backend, *arrays: Array, activation: str = "relu", ends: bool = False
) -> tuple[Array, Array]:
    """``activation(… activation(x @ w1.T + b1) … @ wn.T + bn)``: layers one after the other.

    Parameters
    ----------
    arrays:
        The input of shape (..., in), then of each layer its weight of shape (out, in) and its bias
        of shape (out,), all of one dtype.
    activation:
        A name, as in :func:`gpugrad.bias_activation`, the same for all layers.
    ends:
        The last layer has none, as the end of a net.

    Returns
    -------
    Shape (..., out of the last layer). For the backward pass, what each layer gave is kept, and,
    where the derivative of the activation is computed from its operand, that too, all in one array.

    >>> import gpugrad as gg
    >>> from gpugrad.ops.layers import layers
    >>> double, shift = gg.asarray([[2.0]]), gg.asarray([-1.0])
    >>> layers(gg.asarray([1.0]), double, shift, double, shift)
    tensor([1.])
    """
    pairs = _pairs(arrays)
    chosen = activation_named("layers", activation)
    if any(x.dtype != arrays[0].dtype for x in arrays):
        met = ", ".join(sorted({str(x.dtype) for x in arrays}))
        raise DTypeError(f"layers: arrays of {met}; convert them to one dtype with .to(dtype)")
    y = arrays[0]
    results, sums = [], []
    for weight, bias in pairs[:-1] if ends else pairs:
        z, y = activated(m, y, weight, bias, chosen)
        sums.append(z)
        results.append(y)
    kept = results if chosen.from_result else results + sums
    if ends:
        y = biased(m, y, *pairs[-1])
    return y, _in_one(m, kept) if kept else m.reshape(y, (-1,))[:0]
