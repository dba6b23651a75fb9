"""Clipping, parameters as one vector, and how far gradients go back; PyTorch's names where it has
some, and its results.

Only `error_if_nonfinite=True` reads a value from the device; everything else stays there.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from gpugrad import ops
from gpugrad.clip import check_bound, clip_by_value_, coefficient, scale_, total_norm
from gpugrad.core.actions import action
from gpugrad.core.autocast import current_autocast
from gpugrad.core.modes import no_grad
from gpugrad.core.recompute import recomputed
from gpugrad.core.tensor import Tensor
from gpugrad.errors import DeviceError, DTypeError, GpugradError, ParameterError, ShapeError
from gpugrad.nn.module import write
from gpugrad.nn.random import default_generator

__all__ = [
    "NonFiniteGradientError",
    "checkpoint",
    "clip_grad_norm_",
    "clip_grad_value_",
    "clip_grads_with_norm_",
    "get_total_norm",
    "parameters_to_vector",
    "truncated",
    "vector_to_parameters",
]


class NonFiniteGradientError(GpugradError, RuntimeError):
    """A total norm that is NaN or infinite, where the caller asked to be told."""


def checkpoint(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`function(*args, **kwargs)`, keeping for the backward pass nothing but the arguments.

    When the backward pass comes by, the function runs once more, with the same random numbers and
    the same :class:`gpugrad.autocast`: memory is paid for with time. It returns a tensor or a tuple
    of some, from its arguments and from parameters. As `torch.utils.checkpoint.checkpoint`; Chen et
    al., "Training deep nets with sublinear memory cost" (arXiv:1604.06174).

    Raises GraphError when the function returns something else, or other shapes the second time.

    >>> import gpugrad as gg
    >>> x = gg.tensor(2.0, requires_grad=True)
    >>> checkpoint(lambda v: v * v * v, x).backward()
    >>> x.grad
    tensor(12.)
    """
    state, casting = default_generator.state, current_autocast()
    first = True

    @contextmanager
    def around() -> Iterator[None]:
        nonlocal first
        if first:
            first = False
            yield
            return
        now = default_generator.state
        default_generator.state = state
        try:
            with ExitStack() as stack:
                if casting is not None:
                    stack.enter_context(casting.again())
                yield
        finally:
            default_generator.state = now

    return recomputed(function, args, kwargs, around)


def truncated(
    model: Callable[..., Any], x: Tensor, steps: int, state: Any = None, *, axis: int = 0
) -> Iterator[tuple[slice, Any]]:
    """Run a recurrent model over pieces of a sequence, for back-propagation that ends at each.

    The state goes on from piece to piece, and gradients do not: they are those of at most `steps`
    steps, and so is the memory (truncated back-propagation through time; Williams and Peng, 1990).

    Parameters
    ----------
    model:
        Called with a piece and a state, None in the beginning, it returns its output and the new
        state: a tensor, or a tuple of some. `nn.RNN`, `nn.LSTM` and `nn.GRU` do.
    x:
        The sequences.
    steps:
        Length of a piece; the last one may be shorter. ParameterError below 1.
    state:
        The first state.
    axis:
        The axis of time; 1 for layers with `batch_first`.

    Yields the steps of a piece as a slice, and the output for them. Run it backward before the next
    is asked for.

    >>> import gpugrad as gg
    >>> from gpugrad import nn
    >>> layer, x = nn.GRU(3, 4), gg.ones((10, 2, 3), dtype="float32")
    >>> for part, y in truncated(layer, x, 4):
    ...     y.sum().backward()
    ...     print(part.start, part.stop, y.shape)
    0 4 (4, 2, 4)
    4 8 (4, 2, 4)
    8 10 (2, 2, 4)
    """
    if steps < 1:
        raise ParameterError(f"truncated: steps={steps}; a piece has at least 1 step")
    for start in range(0, x.shape[axis], steps):
        part = slice(start, min(start + steps, x.shape[axis]))
        index = (slice(None),) * (axis % x.ndim) + (part,)
        y, state = model(x[index], state)
        yield part, y
        state = _detached(state)


def _detached(state: Any) -> Any:
    if isinstance(state, tuple | list):
        return tuple(_detached(s) for s in state)
    return state.detach()


def get_total_norm(
    tensors: Tensor | Iterable[Tensor],
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """The norm of all tensors taken as one vector, as a 0-d tensor on their device.

    Half precision is added up, and its norm returned, in float32.

    Parameters
    ----------
    norm_type:
        Any number from 0.5 on, or infinity.
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


@action
def clip_grads_with_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    total_norm: Tensor,
    foreach: bool | None = None,
) -> None:
    """Scale the gradients in place by min(1, max_norm/(total_norm + 1e-6)).

    Parameters without a gradient are passed over. Raises ParameterError for a bound that is
    negative or NaN.

    >>> import gpugrad as gg
    >>> w = gg.tensor([1.0], requires_grad=True)
    >>> gg.sum(3.0 * w).backward()
    >>> clip_grads_with_norm_([w], 1.0, gg.tensor(6.0))
    >>> round(w.grad.item(), 4)
    0.5
    """
    scale_(_grads(parameters), coefficient(total_norm, max_norm))


@action
def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """Scale the gradients in place so that their total norm is at most `max_norm`.

    Returns the norm before clipping. Parameters without a gradient are passed over. Gradients of
    parameters that an optimiser holds lie in a row: neighbours are measured, and multiplied,
    together. Inside a training step prefer `optimizer.step(clip=max_norm)`, which clips while it
    updates.

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
    listed = _listed(parameters)
    if not listed and isinstance(parameters, Iterator):
        warnings.warn(
            "clip_grad_norm_: the generator of parameters is exhausted, so nothing is clipped; "
            "call .parameters() anew, or keep a list",
            stacklevel=2,
        )
    grads = _grads(listed)
    norm = get_total_norm(grads, norm_type, error_if_nonfinite)
    scale_(grads, coefficient(norm, bound))
    return norm


@action
def clip_grad_value_(
    parameters: Tensor | Iterable[Tensor], clip_value: float, foreach: bool | None = None
) -> None:
    """Bring every element of the gradients in place into [-clip_value, clip_value].

    NaN stays NaN. Raises ParameterError for a bound that is negative or NaN.

    >>> import gpugrad as gg
    >>> w = gg.tensor([3.0, 0.1], requires_grad=True)
    >>> gg.sum(w * w).backward()
    >>> clip_grad_value_([w], 1.0)
    >>> w.grad
    tensor([1. , 0.2])
    """
    clip_by_value_(_grads(parameters), clip_value)


def parameters_to_vector(parameters: Iterable[Tensor]) -> Tensor:
    """All elements of all parameters in one row, as a 1-d tensor through which gradients flow.

    Raises ShapeError when there are none, and DeviceError when they are in different places.

    >>> import gpugrad as gg
    >>> parameters_to_vector([gg.tensor([[1.0, 2.0]]), gg.tensor(3.0)])
    tensor([1., 2., 3.])
    """
    listed = _placed("parameters_to_vector", list(parameters))
    if not listed:
        raise ShapeError("parameters_to_vector: there are no parameters; was a generator used up?")
    vector: Tensor = ops.concat([ops.reshape(p, (-1,)) for p in listed])
    return vector


@action
def vector_to_parameters(vec: Tensor, parameters: Iterable[Tensor]) -> None:
    """Copy the elements of a vector into parameters, one after the other.

    Their memory stays the same; elements are converted to their dtypes.

    Raises DTypeError when `vec` is no tensor, ShapeError, changing nothing, when it has another
    number of elements than the parameters, and DeviceError when these are in different places.

    >>> import gpugrad as gg
    >>> w, b = gg.zeros((1, 2)), gg.zeros(())
    >>> vector_to_parameters(gg.tensor([1.0, 2.0, 3.0]), [w, b])
    >>> w, b
    (tensor([[1., 2.]]), tensor(3.))
    """
    if not isinstance(vec, Tensor):
        raise DTypeError(f"vector_to_parameters: vec is a tensor, not {type(vec).__name__}")
    listed = _placed("vector_to_parameters", list(parameters))
    size = sum(p.size for p in listed)
    if vec.shape != (size,):
        raise ShapeError(
            f"vector_to_parameters: a vector of shape {vec.shape} for parameters of {size} "
            f"elements together; it must have shape ({size},)"
        )
    start = 0
    with no_grad():
        for p in listed:
            part = ops.reshape(vec[start : start + p.size], p.shape)
            write(p, part if part.dtype == p.dtype else ops.astype(part, p.dtype))
            start += p.size


def _placed(name: str, parameters: list[Tensor]) -> list[Tensor]:
    places = sorted({p.device for p in parameters})
    if len(places) > 1:
        raise DeviceError(
            f"{name}: parameters are on {' and on '.join(places)}; do it for those of each device, "
            "or move the module to one with .to(device)"
        )
    return parameters


def _listed(tensors: Tensor | Iterable[Tensor]) -> list[Tensor]:
    return [tensors] if isinstance(tensors, Tensor) else list(tensors)


def _grads(parameters: Tensor | Iterable[Tensor]) -> list[Tensor]:
    return [p.grad for p in _listed(parameters) if p.grad is not None]
