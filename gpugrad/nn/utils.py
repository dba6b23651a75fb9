"""Clipping under PyTorch's names and with its results, over `gpugrad.clip`.

Only `error_if_nonfinite=True` reads a value from the device; everything else stays there.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from gpugrad.clip import check_bound, clip_by_value_, coefficient, scale_, total_norm
from gpugrad.core.tensor import Tensor
from gpugrad.errors import GpugradError

__all__ = [
    "NonFiniteGradientError",
    "clip_grad_norm_",
    "clip_grad_value_",
    "clip_grads_with_norm_",
    "get_total_norm",
]


class NonFiniteGradientError(GpugradError, RuntimeError):
    """A total norm that is NaN or infinite, where the caller asked to be told."""


def get_total_norm(
    tensors: Tensor | Iterable[Tensor],
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """The norm of all tensors taken as one vector, as a 0-d tensor on their device.

    Parameters
    ----------
    norm_type:
        Any positive number, or infinity.
    error_if_nonfinite:
        Raise NonFiniteGradientError when the norm is NaN or infinite. The host waits for the
        device to find out.
    foreach:
        Taken and ignored: there is one implementation.

    >>> import gpugrad as gg
    >>> get_total_norm([gg.tensor([3.0]), gg.tensor([4.0])])
    tensor(5.)
    """
    norm = total_norm(_listed(tensors), norm_type)
    if error_if_nonfinite and not math.isfinite(norm.item()):
        raise NonFiniteGradientError(
            f"the total norm of order {float(norm_type)} is {norm.item()}: some gradient is not "
            "finite; lower the learning rate, or find the layer before clipping"
        )
    return norm


def clip_grads_with_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    total_norm: Tensor,
    foreach: bool | None = None,
) -> None:
    """Scale the gradients in place by min(1, max_norm/(total_norm + 1e-6))."""
    scale_(_grads(parameters), coefficient(total_norm, max_norm))


def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """Scale the gradients in place so that their total norm is at most `max_norm`.

    Returns the norm before clipping. Parameters without a gradient are passed over. Inside a
    training step prefer `optimizer.step(clip=max_norm)`, which clips while it updates.

    Raises ParameterError for a bound that is negative or NaN.

    >>> import gpugrad as gg
    >>> w = gg.tensor([3.0, 4.0], requires_grad=True)
    >>> gg.sum(w * w).backward()
    >>> clip_grad_norm_([w], 1.0)
    tensor(10.)
    >>> [round(g, 4) for g in w.grad.tolist()]
    [0.6, 0.8]
    """
    bound = check_bound(max_norm)
    grads = _grads(parameters)
    norm = get_total_norm(grads, norm_type, error_if_nonfinite)
    scale_(grads, coefficient(norm, bound))
    return norm


def clip_grad_value_(
    parameters: Tensor | Iterable[Tensor], clip_value: float, foreach: bool | None = None
) -> None:
    """Bring every element of the gradients in place into [-clip_value, clip_value]."""
    clip_by_value_(_grads(parameters), clip_value)


def _listed(tensors: Tensor | Iterable[Tensor]) -> list[Tensor]:
    return [tensors] if isinstance(tensors, Tensor) else list(tensors)


def _grads(parameters: Tensor | Iterable[Tensor]) -> list[Tensor]:
    return [p.grad for p in _listed(parameters) if p.grad is not None]
