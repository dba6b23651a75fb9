"""What a recurrent layer does to gradients on their way back through time, step by step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpugrad import nn, ops
from gpugrad.backend import SPACES, Array, Backend
from gpugrad.backend.kernels import fusible
from gpugrad.core.autocast import autocast
from gpugrad.core.conversion import tensor
from gpugrad.core.modes import no_grad
from gpugrad.core.tensor import Tensor
from gpugrad.core.transforms import vjp

__all__ = ["LAYERS", "farthest", "growth", "size_by_step", "used_by_step", "walk_back"]

#: Layers that run over a whole sequence.
LAYERS = (nn.RNN, nn.LSTM, nn.GRU)

#: A factor that holds for a layer shows in a few examples: no more of a batch are looked at.
EXAMPLES = 8

#: What is smaller than this has lost digits, or will be 0 a few steps on.
SMALL = 1e-36

Floats = NDArray[np.float64]


def walk_back(layer: Any, args: Sequence[Any]) -> Array | None:
    """How large a gradient that sets out from the last state is when it arrives at each input.

    The loss is not asked for it: what it sends into the outputs of all steps would hide what comes
    through time. A random gradient sets out in its place, from the last layer's last state, in the
    first of two directions. A few examples are run once more for it, without dropout. Nothing of
    the layer changes, and nothing is read from the device.

    Parameters
    ----------
    layer:
        One of `LAYERS`.
    args:
        What it was called with: sequences, and maybe first states.

    Returns
    -------
    The L2 norm at the input of each step, over examples and features: float64 [steps], in the
    order of time, on the device. None for fewer than two steps.
    """
    first = args[1] if len(args) > 1 else None
    with no_grad(), autocast("cpu", enabled=False):
        x = args[0].detach()
        if x.ndim == 2:
            x = ops.expand_dims(x, axis=1)
        elif layer.batch_first:
            x = ops.permute_dims(x, (1, 0, 2))
        if x.shape[0] < 2 or not x.shape[1]:
            return None
        x = _wide(x[:, :EXAMPLES])
        states = [_few(s) for s in (first if isinstance(first, tuple | list) else (first,))]
        states += [None] * (layer.states - len(states))
        last, pull = vjp(lambda x: _last_state(layer, x, states), x)
        drawn = np.random.default_rng(0).standard_normal(last.shape)
        with np.errstate(all="ignore"):  # it may explode
            (g,) = pull(tensor(drawn, dtype=last.dtype, device=last.device))
    m: Backend = SPACES[type(g.data)]
    return m.bind(size_by_step)(m, g.data)


def _last_state(layer: Any, x: Tensor, first: Sequence[Tensor | None]) -> Tensor:
    """The last state of the last layer, in its first direction."""
    directions = 1 + layer.bidirectional
    found: list[Any] = []
    for k, parameters in enumerate(layer.all_weights):
        direction = k % directions
        if k and not direction:
            x = found[0][0] if directions == 1 else ops.concat([y[0] for y in found], axis=-1)
            found = []
        weights = (*(_wide(p.detach()) for p in parameters), None, None)[:4]
        states = (None if s is None else s[k] for s in first)
        options = {"reverse": bool(direction), **layer._options()}
        found.append(type(layer).run(x, *weights, *states, **options))
    return found[0][1]  # type: ignore[no-any-return]


def _few(state: Tensor | None) -> Tensor | None:
    """First states of the examples that are looked at."""
    if state is None:
        return None
    state = state.detach()
    return _wide(ops.expand_dims(state, axis=1) if state.ndim == 2 else state[:, :EXAMPLES])


def _wide(x: Tensor) -> Tensor:
    return ops.astype(x, "float32") if x.dtype.itemsize < 4 else x


@fusible
def size_by_step(m: Backend, g: Array, /) -> Array:
    """The L2 norm of each element of the first axis, of three; float64."""
    g = m.astype(g, m.dtype("float64"))
    return m.sqrt(m.sum(m.vecdot(g, g), axis=1))


@fusible
def used_by_step(m: Backend, g: Array, /, *, axis: int) -> Array:
    """For each element of an axis 1 if anything in it is not 0, else 0; float64."""
    others = tuple(i for i in range(len(g.shape)) if i != axis)
    return m.astype(m.any(g != 0, axis=others), m.dtype("float64"))


# -- on the host -----------------------------------------------------------------------------------


def growth(norms: Floats) -> float:
    """The factor from each step to the one before, where norms are neither 0 nor infinite.

    What has under- or overflowed says nothing; the steps between it and the end do. 0 or infinite
    if this happens within a single step, NaN if nothing has set out.

    >>> growth(np.array([0.0, 2.0, 4.0, 8.0]))
    0.5
    """
    last = float(norms[-1])
    if not (math.isfinite(last) and last > 0):
        return math.nan
    fine = np.isfinite(norms) & (norms >= min(SMALL, last))
    lost = np.flatnonzero(~fine)
    first = int(lost[-1]) + 1 if lost.size else 0
    many = len(norms) - 1 - first
    if not many:
        return float(norms[-2] / last) if np.isfinite(norms[-2]) else math.inf
    return float((norms[first] / last) ** (1 / many))


def farthest(used: NDArray[np.bool_], directions: int) -> int:
    """How many steps the input that is worst off is away from an output that the loss uses.

    A step's input shows in the outputs from this step on; with two directions in those before, too.

    >>> [farthest(np.array(used), 1) for used in ([0, 0, 0, 1], [1, 1, 1, 1], [1, 0, 0, 1])]
    [3, 0, 2]
    """
    at = np.flatnonzero(used)
    if not at.size:
        return len(used) - 1
    between = np.diff(at) - 1 if directions == 1 else np.diff(at) // 2
    after = len(used) - 1 - at[-1] if directions > 1 else 0
    return int(max(at[0], after, between.max(initial=0)))
