"""Derivatives against finite differences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gpugrad.core.conversion import asarray
from gpugrad.core.primitive import differentiable
from gpugrad.core.tensor import Tensor, tensor_of
from gpugrad.core.transforms import jvp, vjp
from gpugrad.core.tree import flatten
from gpugrad.errors import DTypeError, GradientCheckError


def check_grads(
    f: Callable[..., Any],
    args: Sequence[Any],
    *,
    order: int = 2,
    modes: Sequence[str] = ("reverse", "forward"),
    eps: float = 1e-5,
    rtol: float = 1e-6,
    atol: float = 1e-8,
    seed: int = 0,
) -> None:
    """Compare the derivatives of ``f`` with central differences along a random direction.

    Parameters
    ----------
    f:
        A function of tensors that returns a tensor, or a structure of tensors.
    args:
        Its arguments, float64: differences of float32 values say nothing.
    order:
        How many times to differentiate: the second order checks the gradient's own gradient.
    modes:
        ``"reverse"`` checks vjp, ``"forward"`` checks jvp.
    eps:
        Half the distance of the two points, relative to the size of the arguments.
    rtol, atol:
        What the two may differ by, relative to the larger one and absolutely.
    seed:
        Of the random directions.

    Raises
    ------
    GradientCheckError
        With order, mode, both values and the difference.

    >>> import gpugrad as gg
    >>> gg.check_grads(lambda x: x * x, (gg.tensor([1.0, 2.0]),))
    """
    rng = np.random.default_rng(seed)
    tensors = [asarray(x).detach() for x in args]
    for x in tensors:
        if x.dtype != np.float64:
            raise DTypeError(f"check_grads: arguments must be float64, got {x.dtype}")
    name = getattr(f, "__name__", "f")

    def random_like(x: Tensor) -> Tensor:
        space = x.backend
        return tensor_of(space.asarray(rng.standard_normal(x.shape), device=space.device(x.data)))

    vs = [random_like(x) for x in tensors]
    step = eps * max([1.0, *(float(np.max(np.abs(x.backend.to_host(x.data)))) for x in tensors
                             if x.size)])  # fmt: skip

    def outputs(h: float) -> list[Tensor]:
        moved = [x + v * h for x, v in zip(tensors, vs, strict=True)]
        return [asarray(y) for y in flatten(f(*moved))[0]]

    numeric = [(_host(a) - _host(b)) / (2 * step)
               for a, b in zip(outputs(step), outputs(-step), strict=True)]  # fmt: skip
    us = [rng.standard_normal(d.shape) for d in numeric]
    expected = float(sum(np.sum(u * d) for u, d in zip(us, numeric, strict=True)))
    scale = float(sum(np.sum(np.abs(u * d)) for u, d in zip(us, numeric, strict=True)))
    found: dict[str, float] = {}
    if "reverse" in modes:
        y, pull = vjp(f, *tensors)
        _, rebuild = flatten(y)
        gradients = pull(rebuild(_like(us, y)))
        found["reverse"] = float(
            sum(np.sum(_host(g) * _host(v)) for g, v in zip(gradients, vs, strict=True))
        )
    if "forward" in modes:
        tangents = flatten(jvp(f, tensors, vs)[1])[0]
        found["forward"] = float(
            sum(np.sum(u * _host(t)) for u, t in zip(us, tangents, strict=True))
        )
    for mode, got in found.items():
        if not abs(got - expected) <= atol + rtol * max(abs(got), abs(expected), scale):
            raise GradientCheckError(
                f"check_grads: {name}, {mode} mode: derivative {got!r}, finite differences "
                f"{expected!r}, difference {got - expected:.3g}"
            )
    if order > 1:
        ones = differentiable.ones_like

        def gradient(*xs: Tensor) -> Any:
            y, pull = vjp(f, *xs)
            weights = [ones(t.detach()) * 0.7 + t.detach() * 0.0 for t in flatten(y)[0]]
            return pull(flatten(y)[1](weights))

        gradient.__name__ = f"the gradient of {name}"
        check_grads(gradient, tensors, order=order - 1, modes=modes, eps=eps, rtol=rtol,
                    atol=atol, seed=seed + 1)  # fmt: skip


def _host(x: Tensor) -> np.ndarray[Any, Any]:
    return x.backend.to_host(x.data)


def _like(values: Sequence[np.ndarray[Any, Any]], tree: Any) -> list[Tensor]:
    """The arrays ``values`` on the device and with the dtype of the leaves of ``tree``."""
    return [
        tensor_of(y.backend.asarray(u, dtype=y.dtype, device=y.backend.device(y.data)))
        for u, y in zip(values, flatten(tree)[0], strict=True)
    ]
