"""What recurrent layers have in common: their operands, their steps, the gradients of weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from gpugrad.backend import Backend
from gpugrad.backend.tape import spoil
from gpugrad.errors import DTypeError, ShapeError
from gpugrad.ops.linalg import product_of, weight_gradient

Gradients = tuple[Any, ...]


def check_operands(
    name: str, m: Backend, gates: int, x: Any, weight_ih: Any, weight_hh: Any, bias_ih: Any,
    bias_hh: Any, **states: Any,
) -> None:  # fmt: skip
    """Raise unless the arrays of a layer fit together."""
    if x.ndim != 3:
        raise ShapeError(
            f"{name}: x of shape {tuple(x.shape)}; a sequence has three axes, (steps, batch, "
            "features); for a single one, add an axis of length 1 with expand_dims(x, axis=1)"
        )
    steps, batch, features = x.shape
    if steps == 0:
        raise ShapeError(
            f"{name}: x of shape {tuple(x.shape)} has no steps, and so there is no last state; "
            "leave empty sequences out"
        )
    if weight_hh.ndim != 2 or weight_hh.shape[0] != gates * weight_hh.shape[1]:
        raise ShapeError(
            f"{name}: weight_hh of shape {tuple(weight_hh.shape)}; it has {gates} rows for each of "
            f"its columns, ({gates} x hidden, hidden)"
        )
    rows, hidden = weight_hh.shape
    wanted = {
        "weight_ih": (weight_ih, (rows, features)), "bias_ih": (bias_ih, (rows,)),
        "bias_hh": (bias_hh, (rows,)), **{k: (v, (batch, hidden)) for k, v in states.items()},
    }  # fmt: skip
    for what, (value, shape) in wanted.items():
        if value is not None and tuple(value.shape) != shape:
            raise ShapeError(
                f"{name}: {what} of shape {tuple(value.shape)}, expected {shape} for x of shape "
                f"{tuple(x.shape)} and weight_hh of shape {tuple(weight_hh.shape)}"
            )
    dtype = m.numpy_dtype(x)
    if dtype.kind in "biuc":
        raise DTypeError(f"{name}: x of {dtype}; a layer computes in real floating-point numbers")
    for what, value in {"weight_hh": weight_hh, **{k: v for k, (v, _) in wanted.items()}}.items():
        if value is not None and value.dtype != x.dtype:
            raise DTypeError(
                f"{name}: x of {dtype} and {what} of {m.numpy_dtype(value)}; convert one of them "
                "with .to(dtype), so that all are alike"
            )


def wide(m: Any, *arrays: Any) -> tuple[Any, ...]:
    """The arrays in float32 if the first is of two bytes; what is none stays."""
    dtype = arrays[0].dtype
    if not isinstance(dtype, np.dtype):
        dtype = np.dtype(str(dtype).rpartition(".")[2])
    if dtype.itemsize > 2:
        return arrays
    spoil("elements of two bytes, which are computed in float32")
    return tuple(None if x is None else m.astype(x, m.dtype("float32")) for x in arrays)


def narrow(m: Any, dtype: Any, *arrays: Any) -> tuple[Any, ...]:
    """The inverse of :func:`wide` for results."""
    return tuple(y if y.dtype == dtype else m.astype(y, dtype) for y in arrays)


def in_order(m: Any, x: Any, reverse: bool) -> Sequence[Any]:
    """The steps of a sequence, the first to be computed first."""
    steps: Sequence[Any] = m.unstack(x)
    return steps[::-1] if reverse else steps


def joined(m: Any, steps: list[Any], reverse: bool) -> Any:
    """The inverse of :func:`in_order`."""
    return m.stack(steps[::-1] if reverse else steps)


def sum_of(*parts: Any) -> Any:
    """Of arrays that there may be; None of none."""
    total = None
    for x in parts:
        total = x if total is None else total if x is None else total + x
    return total


def split_gates(m: Any, x: Any, parts: int) -> tuple[Any, ...]:
    """``x`` in as many pieces of the last axis."""
    n = x.shape[-1] // parts
    return tuple(x[..., k * n : (k + 1) * n] for k in range(parts))


def projected(m: Any, x: Any, weight_ih: Any, bias: Any) -> Any:
    """The input's share in what the gates are given, at all steps."""
    p = product_of(m, x, m.matrix_transpose(weight_ih))
    return p if bias is None else p + bias


def first_state(m: Any, given: Any, like: Any, size: int) -> Any:
    """A state of so many units; zeros with the rows of ``like`` where none is given."""
    return m.zeros_like(like[:, :size]) if given is None else given


def bias_gradient(m: Any, g: Any, wanted: bool) -> Any:
    """The sums over steps and batch, if they are wanted."""
    return m.sum_to(g, g.shape[-1:]) if wanted else None


def weight_gradients(
    m: Any, gp: Any, gq: Any, x: Any, weight_ih: Any, h0: Any, output: Any, reverse: bool,
    needs: Any, weight_ih_home: Any, weight_hh_home: Any,
) -> Gradients:  # fmt: skip
    """Gradients of x and both weights from those of the two shares of the gates."""
    gx = product_of(m, gp, weight_ih) if needs[0] else None
    gw_ih = weight_gradient(m, gp, x, weight_ih_home) if needs[1] else None
    if not needs[2]:
        return gx, gw_ih, None
    early, late = slice(None, -1), slice(1, None)
    after, before = (early, late) if reverse else (late, early)
    gw_hh = weight_gradient(m, gq[after, ...], output[before, ...], weight_hh_home)
    if h0 is not None:
        first = gq[-1 if reverse else 0, ...]
        gw_hh = gw_hh + m.matmul(m.matrix_transpose(first), h0)
    return gx, gw_ih, gw_hh
