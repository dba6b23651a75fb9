"""Operations that draw random numbers, counter-based: their masks are computed anew, never kept.

What is drawn is a function of two numbers, ``seed`` and ``offset``, and of an element's place
(:mod:`gpugrad.backend.random`); a :class:`gpugrad.nn.Generator` hands such pairs out. So the same
call gives the same numbers on every device, and the backward pass draws what the forward drew.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from gpugrad.backend import Array, Backend
from gpugrad.backend.kernels import fusible
from gpugrad.backend.random import dropped, kept_scale, words
from gpugrad.core.primitive import linear, primitive, sample
from gpugrad.errors import DTypeError, ShapeError
from gpugrad.ops.fused import ACTIVATIONS, activation_named
from gpugrad.ops.samples import normal

__all__ = ["bias_activation_dropout", "dropout"]


# -- dropout --------------------------------------------------------------------------------------


def _numpy_words(count: int, seed: int, offset: int) -> list[int]:
    """The words of a stream by Python's own integers: the reference."""
    low = (1 << 32) - 1
    found: list[int] = []
    for block in range(-(-count // 4)):
        counter = block + (offset << 64)
        c = [counter >> 32 * i & low for i in range(4)]
        k = [seed & low, seed >> 32]
        for _ in range(10):
            a, b = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
            c = [b >> 32 ^ c[1] ^ k[0], b & low, a >> 32 ^ c[3] ^ k[1], a & low]
            k = [(k[0] + 0x9E3779B9) & low, (k[1] + 0xBB67AE85) & low]
        found += c
    return found[:count]


def _numpy_dropout(x: Any, p: float = 0.5, seed: int = 0, offset: int = 0) -> Any:
    x = np.asarray(x)
    drawn = np.array(_numpy_words(x.size, seed, offset), np.uint64).reshape(x.shape)
    return np.where(drawn >= round(p * 2**32), x / (1 - p) if p < 1 else 0.0, 0.0)


@linear(
    transpose=lambda g, m, p, seed, offset: m.dropout(g, p, seed, offset),
    samples=lambda: [
        sample(normal((3, 5)), p=0.5, seed=7, offset=3),
        sample(normal((2, 3, 4)), p=0.2, seed=(1 << 64) - 1, offset=1 << 40),
        sample(normal((6,)), p=0.0, note="nothing is dropped"),
        sample(normal((6,)), p=1.0, note="everything is dropped"),
        sample(normal(()), p=0.5, seed=3, note="0-d"),
        sample(normal((0, 3)), p=0.5, note="empty"),
    ],
    reference=_numpy_dropout,
)
def dropout(m: Backend, x: Array, /, p: float = 0.5, seed: int = 0, offset: int = 0) -> Array:
    """``x`` with each element set to zero with probability ``p``, and the rest times 1/(1 - p).

    Element i of the flattened ``x`` is dropped when word i of the stream (``seed``, ``offset``) is
    below p·2³²; NaN and infinity are dropped like any other. Nothing is kept for the backward pass
    but the parameters. Srivastava et al., "Dropout: a simple way to prevent neural networks from
    overfitting" (2014); the words are those of Philox4x32-10 (Salmon et al., 2011).

    Parameters
    ----------
    x:
        Floating-point or complex, of any shape.
    p:
        From 0 to 1, both included; a multiple of 2⁻³² is the probability to the last digit.
    seed, offset:
        From 0 to 2⁶⁴ - 1 each. :func:`gpugrad.nn.functional.dropout` takes them from a generator.

    >>> import gpugrad as gg
    >>> gg.dropout(gg.asarray([1.0, 2.0, 3.0, 4.0]), p=0.5, seed=5)
    tensor([2., 0., 6., 8.])
    """
    dtype = m.numpy_dtype(x)
    if dtype.kind in "biu":
        raise DTypeError(f"dropout: {dtype} cannot be scaled; convert x to a floating-point dtype")
    drawn = m.reshape(words(m, math.prod(x.shape), seed, offset, m.device(x)), x.shape)
    # Two bytes would round the factor before it multiplies.
    wide = m.astype(x, m.dtype("float32")) if dtype.itemsize == 2 else x
    y = m.where(drawn >= dropped(p), wide * kept_scale(p), 0.0)
    return y if y.dtype == x.dtype else m.astype(y, x.dtype)


# -- after a product ------------------------------------------------------------------------------


def _thinned(m: Any, x: Any, p: float, seed: int, offset: int) -> Any:
    return x if p == 0 else m.dropout(x, p, seed, offset)


def _activated(m: Any, x: Any, bias: Any, activation: str | None) -> Any:
    if activation is not None and bias is not None:
        return m.bias_activation(x, bias, activation)
    z = x if bias is None else x + bias
    return z if activation is None else ACTIVATIONS[activation].forward(m, z)


@fusible
def bias_activation_dropout_backward(
    m: Any,
    g: Any,
    x: Any,
    bias: Any,
    activation: str | None = None,
    p: float = 0.5,
    seed: int = 0,
    offset: int = 0,
) -> tuple[Any, Any]:
    """Gradients of ``x`` and ``bias`` (None without one); the residual's is ``g`` itself."""
    gz = _thinned(m, g, p, seed, offset)
    if activation is not None:
        gz = ACTIVATIONS[activation].backward(m, gz, x if bias is None else x + bias)
    return gz, None if bias is None else m.sum_to(gz, bias.shape)


def _after_product_vjp(
    g: Any, m: Any, x: Any, bias: Any, activation: str | None, p: float, seed: int, offset: int,
    needs: tuple[bool, ...],
) -> tuple[Any, ...]:  # fmt: skip
    gx = gb = None
    if needs[0] or needs[1]:
        gx, gb = bias_activation_dropout_backward(m, g, x, bias, activation, p, seed, offset)
    return gx, gb, g


def _after_product_samples() -> list[Any]:
    x, b, r = normal((4, 3), 0), normal(3, 1), normal((4, 3), 2)
    return [
        sample(x, b, r, activation="gelu", p=0.4, seed=5, offset=2),
        sample(x, b, r, p=0.5, seed=1, note="no activation"),
        sample(x, b, activation="silu", p=0.3, seed=1 << 63, note="no residual"),
        sample(x, None, r, activation="tanh", p=0.25, seed=3, note="no bias"),
        sample(x, b, r, activation="gelu_tanh", p=0.0, note="nothing is dropped"),
        sample(normal((2, 3, 4), 3), normal(4, 1), normal((2, 3, 4), 4), activation="mish", seed=2),
    ]


def _numpy_after_product(
    x: Any, bias: Any = None, residual: Any = None, activation: str | None = None, p: float = 0.5,
    seed: int = 0, offset: int = 0,
) -> Any:  # fmt: skip
    from gpugrad.backend import backend_for_device

    z = x if bias is None else x + bias
    if activation is not None:
        z = ACTIVATIONS[activation].forward(backend_for_device("cpu"), z)
    y = _numpy_dropout(z, p, seed, offset)
    return y if residual is None else y + residual


@primitive(vjp=_after_product_vjp, samples=_after_product_samples, reference=_numpy_after_product)
def bias_activation_dropout(
    m: Backend,
    x: Array,
    bias: Array | None = None,
    residual: Array | None = None,
    /,
    activation: str | None = None,
    p: float = 0.5,
    seed: int = 0,
    offset: int = 0,
) -> Array:
    """``dropout(activation(x + bias)) + residual``: what follows a product in a residual block.

    Parameters
    ----------
    x:
        Shape (..., features).
    bias:
        Shape (features,), the dtype of ``x``; None adds nothing.
    residual:
        The shape and dtype of ``x``; None adds nothing.
    activation:
        A name that :func:`bias_activation` takes, or None for none.
    p, seed, offset:
        As in :func:`dropout`, whose mask it uses.

    Returns
    -------
    The shape and dtype of ``x``. Neither the sum nor the mask is kept for the backward pass.

    >>> import gpugrad as gg
    >>> x = gg.asarray([[1.0, -2.0], [3.0, 4.0]])
    >>> gg.bias_activation_dropout(x, gg.ones(2), gg.ones((2, 2)), activation="relu", seed=2)
    tensor([[1., 1.],
            [9., 1.]])
    """
    name = "bias_activation_dropout"
    if activation is not None:
        activation_named(name, activation)
    if bias is not None and (bias.ndim != 1 or x.shape[-1:] != bias.shape):
        raise ShapeError(
            f"{name}: x of shape {tuple(x.shape)} and bias of shape {tuple(bias.shape)}; a bias "
            "has one axis, as long as the last axis of x"
        )
    if residual is not None and residual.shape != x.shape:
        raise ShapeError(
            f"{name}: x of shape {tuple(x.shape)} and residual of shape {tuple(residual.shape)} "
            "must agree; broadcast the residual first, with broadcast_to"
        )
    y = _thinned(m, _activated(m, x, bias, activation), p, seed, offset)
    y = y if residual is None else y + residual
    return y if y.dtype == x.dtype else m.astype(y, x.dtype)
