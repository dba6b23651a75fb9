"""A chain of layers as one operation.

Where layers are small, what the program pays for each call is more than what the call computes.
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
from gpugrad.ops.linalg import activated, linear, product_of, sum_over_rows, weight_gradient
from gpugrad.ops.samples import normal

__all__: list[str] = []


#: Multiply-adds of a layer from which on it is worth a call of its own.
LARGE = 1 << 21


def joins(x: Any, parameters: Sequence[Any]) -> bool:
    """Whether small layers are quicker in one call: where there is a kernel for them.

    `parameters` are a weight and a bias of each. False, too, for what does not fit together, so
    that the layer at fault can say so, and where somebody is to be told of each layer.
    """
    if not isinstance(x, Tensor) or is_autocast_enabled() or kernel_mode() == "off" or is_told():
        return False
    data = x.data
    kind = type(data)
    if "layers" not in SPACES[kind].slots or not data.shape:
        return False
    *rows, features = data.shape
    dtype = data.dtype
    most = LARGE / max(1, math.prod(rows))
    if dtype not in _TAKEN:
        return False
    for weight, bias in zip(parameters[::2], parameters[1::2]):
        w, b = weight.data, bias.data
        if type(w) is not kind or type(b) is not kind or w.dtype != dtype or b.dtype != dtype:
            return False
        if len(shape := w.shape) != 2 or shape[1] != features or b.shape != shape[:1]:
            return False
        if features * shape[0] >= most:
            return False
        features = shape[0]
    return True


#: Dtypes that there are kernels for.
_TAKEN = ("float32", "float64")


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
    m: Any, g: Any, arrays: Sequence[Any], kept: Any, activation: str, needs: Sequence[bool],
    arrays_home: Sequence[Any],
) -> list[Any]:  # fmt: skip
    """All gradients of a chain, each only when it is needed."""
    chosen = activation_named("layers", activation)
    pairs = _pairs(arrays)
    if m is differentiable:  # what was kept beside the result would count as a constant
        results, sums = [arrays[0]], []
        for weight, bias in pairs:
            sums.append(linear(results[-1], weight, bias))
            results.append(chosen.forward(m, sums[-1]))
    else:
        shapes = [(*arrays[0].shape[:-1], bias.shape[0]) for _, bias in pairs]
        found = _apart(m, kept, shapes if chosen.from_result else shapes * 2)
        results, sums = [arrays[0], *found[: len(pairs)]], found[len(pairs) :]
    told = results[1:] if chosen.from_result else sums
    grads: list[Any] = [None] * len(arrays)
    first = max(list(needs).index(True) - 1, 0) // 2
    for k in range(len(pairs) - 1, first - 1, -1):
        weight, bias = pairs[k]
        at_weight, at_bias = 1 + 2 * k, 2 + 2 * k
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


def _reference(x: Any, *parameters: Any, activation: str) -> Any:
    for weight, bias in zip(parameters[::2], parameters[1::2]):
        x = reference(x @ weight.T, bias, activation)
    return x


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
    ]


@primitive(
    vjp=layers_backward,
    aux=("kept",),
    broadcasts=False,
    samples=_samples,
    reference=_reference,
)
def layers(m: Backend, *arrays: Array, activation: str = "relu") -> tuple[Array, Array]:
    """``activation(… activation(x @ w1.T + b1) … @ wn.T + bn)``: layers one after the other.

    Parameters
    ----------
    arrays:
        The input of shape (..., in), then of each layer its weight of shape (out, in) and its bias
        of shape (out,), all of one dtype.
    activation:
        A name, as in :func:`gpugrad.bias_activation`, the same for all layers.

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
    for weight, bias in pairs:
        z, y = activated(m, y, weight, bias, chosen)
        sums.append(z)
        results.append(y)
    return y, _in_one(m, results if chosen.from_result else results + sums)
