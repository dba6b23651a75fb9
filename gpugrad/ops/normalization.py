"""Normalisation over features, groups of channels, or a batch; each also with a residual.

What they compute is written once, in :mod:`gpugrad.ops.standardize`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gpugrad.backend import Array, Backend
from gpugrad.backend.kernels import fusible
from gpugrad.core.conversion import asarray
from gpugrad.core.primitive import composite, primitive, sample
from gpugrad.core.tensor import Tensor
from gpugrad.ops import standardize
from gpugrad.ops.samples import normal, positive
from gpugrad.ops.standardize import by_channel, in_groups, last_axes

__all__ = [
    "add_batch_norm",
    "add_group_norm",
    "add_layer_norm",
    "add_rms_norm",
    "batch_norm",
    "batch_norm_inference",
    "group_norm",
    "layer_norm",
    "rms_norm",
]

Needs = Sequence[bool]
Statistics = Sequence[Array] | None
Gradients = tuple[Array | None, ...]


# -- samples and references -----------------------------------------------------------------------


def _numpy_norm(
    x: Any, weight: Any, bias: Any, eps: float, axes: Any, affine: Any, centred: bool = True
) -> Any:
    d = x - x.mean(axes, keepdims=True) if centred else x
    y = d / np.sqrt((d * d).mean(axes, keepdims=True) + eps)
    y = y if weight is None else y * np.reshape(weight, affine)
    return y if bias is None else y + np.reshape(bias, affine)


def _numpy_layer(
    x: Any, weight: Any = None, bias: Any = None, axes: int = 1, eps: float = 1e-5,
    centred: bool = True,
) -> Any:  # fmt: skip
    last = tuple(range(x.ndim - axes, x.ndim))
    return _numpy_norm(x, weight, bias, eps, last, x.shape[x.ndim - axes :], centred)


def _numpy_rms(x: Any, weight: Any = None, axes: int = 1, eps: float = 1e-5) -> Any:
    return _numpy_layer(x, weight, None, axes, eps, centred=False)


def _numpy_group(
    x: Any, weight: Any = None, bias: Any = None, *, groups: int, eps: float = 1e-5
) -> Any:
    affine = (groups, x.shape[1] // groups, *(1,) * (x.ndim - 2))
    seen = x.reshape(x.shape[0], *affine[:2], *x.shape[2:])
    return _numpy_norm(seen, weight, bias, eps, tuple(range(2, seen.ndim)), affine).reshape(x.shape)


def _per_channel(x: Any, v: Any) -> Any:
    return np.reshape(v, (-1, *(1,) * (x.ndim - 2)))


def _numpy_batch(x: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Any:
    others = (0, *range(2, x.ndim))
    y = _numpy_norm(x, weight, bias, eps, others, _per_channel(x, np.ones(x.shape[1])).shape)
    return y, x.mean(others), x.var(others)


def _numpy_inference(
    x: Any, mean: Any, var: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Any:
    y = (x - _per_channel(x, mean)) / np.sqrt(_per_channel(x, var) + eps)
    y = y if weight is None else y * _per_channel(x, weight)
    return y if bias is None else y + _per_channel(x, bias)


def _numpy_after_sum(norm: Callable[..., Any]) -> Callable[..., Any]:
    def reference(x: Any, residual: Any, *args: Any, **parameters: Any) -> Any:
        y = norm(x + residual, *args, **parameters)
        return (y[0], x + residual, *y[1:]) if isinstance(y, tuple) else (y, x + residual)

    return reference


def _layer_samples() -> list[Any]:
    x, w, b = normal((4, 5), 0), normal(5, 1), normal(5, 2)
    return [
        sample(x, w, b),
        sample(x, None, None, note="without weight and bias"),
        sample(x, w, None, eps=0.1, note="without a bias"),
        sample(normal((2, 3, 4), 3), normal((3, 4), 4), normal((3, 4), 5), axes=2),
        sample(normal(5, 3), w, b, note="one row"),
        sample(normal((0, 5), 3), w, b, note="no rows"),
        sample(np.ones((2, 5)), w, b, eps=0.1, note="equal elements"),
    ]


def _rms_samples() -> list[Any]:
    return [sample(*s.args[:2], note=s.note, **s.kwargs) for s in _layer_samples()]


def _group_samples() -> list[Any]:
    w, b = normal(4, 1), normal(4, 2)
    return [
        sample(normal((3, 4, 5), 0), w, b, groups=2),
        sample(normal((2, 4, 2, 3), 3), None, None, groups=4, note="a group for each channel"),
        sample(normal((2, 4, 2), 3), w, None, groups=1, eps=0.1, note="one group of all"),
        sample(normal((3, 4), 4), w, b, groups=2, note="channels alone"),
        sample(normal((0, 4, 3), 4), w, b, groups=2, note="an empty batch"),
    ]


def _batch_samples() -> list[Any]:
    w, b = normal(3, 1), normal(3, 2)
    return [
        sample(normal((5, 3), 0), w, b),
        sample(normal((2, 3, 2, 2), 3), w, b, note="channels of images"),
        sample(normal((4, 3, 2), 4), None, None, eps=0.1, note="without weight and bias"),
        sample(normal((4, 3), 4), None, b, note="without a weight"),
    ]


def _inference_samples() -> list[Any]:
    mean, var = normal(3, 7), positive(3, 8)
    return [
        sample(s.args[0], mean, var, *s.args[1:], note=s.note, **s.kwargs) for s in _batch_samples()
    ]


def _with_residual(samples: Callable[[], list[Any]]) -> Callable[[], list[Any]]:
    return lambda: [
        sample(s.args[0], normal(s.args[0].shape, 9), *s.args[1:], note=s.note, **s.kwargs)
        for s in samples()
    ]


# -- over the last axes ---------------------------------------------------------------------------


def _text(operation: Any) -> Callable[..., Any]:
    """The forward of an operation as it is declared, over a namespace."""
    forward: Callable[..., Any] = operation.primitive.forward
    return forward


def _after_sum_vjp(backward: Callable[..., Gradients]) -> Callable[..., Gradients]:
    """The rule of an operation with a residual; statistics are found again from the sum."""

    def rule(
        g: Sequence[Any], m: Any, y: Any, weight: Array | None, axes: int, eps: float, needs: Needs
    ) -> Gradients:
        return standardize.summand_gradients(m, backward, g, y, weight, axes, eps, needs)

    return rule


@fusible
def layer_norm_backward(
    m: Any, g: Array, x: Array, weight: Array | None, statistics: Statistics, axes: int,
    eps: float, needs: Needs, also: Array | None = None,
) -> Gradients:  # fmt: skip
    """Gradients of x, weight and bias: see :func:`gpugrad.ops.standardize.gradients`."""
    layout = last_axes("layer_norm", x.shape, axes)
    return standardize.gradients(m, g, x, weight, layout, statistics, eps, needs, also)


def _layer_norm_vjp(
    g: Array, m: Any, x: Array, weight: Array | None, mean: Array, rest: Array, rstd: Array,
    axes: int, eps: float, needs: Needs,
) -> Gradients:  # fmt: skip
    known = standardize.known(m, mean, rest, rstd)
    return layer_norm_backward(m, g, x, weight, known, axes, eps, needs)


@primitive(
    vjp=_layer_norm_vjp,
    aux=("mean", "rest", "rstd"),
    broadcasts=False,
    samples=_layer_samples,
    reference=_numpy_layer,
)
def layer_norm(
    m: Backend,
    x: Array,
    weight: Array | None = None,
    bias: Array | None = None,
    /,
    axes: int = 1,
    eps: float = 1e-5,
) -> tuple[Array, ...]:
    """``(x - mean) / sqrt(var + eps) * weight + bias``, with moments over the last axes.

    Layer normalisation (Ba et al., arXiv:1607.06450). Half precision is computed in float32.

    Parameters
    ----------
    x:
        Shape (..., features), real floating-point numbers.
    weight, bias:
        The shape of the last ``axes`` axes and the dtype of ``x``, or None.
    axes:
        How many of the last axes share a mean and a variance (the mean squared distance from it).
    eps:
        Added to the variance.

    Returns
    -------
    The shape and dtype of ``x``. Raises ShapeError or DTypeError, naming both sides, when weight or
    bias do not fit.

    >>> import gpugrad as gg
    >>> gg.layer_norm(gg.tensor([[1.0, 3.0], [5.0, 9.0]]), eps=0.0)
    tensor([[-1.,  1.],
            [-1.,  1.]])
    """
    layout = last_axes("layer_norm", x.shape, axes)
    standardize.check("layer_norm", m, x, layout, weight=weight, bias=bias)
    return standardize.normalised(m, x, weight, bias, layout, eps)


@primitive(
    vjp=_after_sum_vjp(layer_norm_backward),
    outputs=2,
    broadcasts=False,
    samples=_with_residual(_layer_samples),
    reference=_numpy_after_sum(_numpy_layer),
)
def add_layer_norm(
    m: Backend,
    x: Array,
    residual: Array,
    weight: Array | None = None,
    bias: Array | None = None,
    /,
    axes: int = 1,
    eps: float = 1e-5,
) -> tuple[Array, Array]:
    """:func:`layer_norm` of ``x + residual``, and that sum: two results.

    ``residual`` has the shape and dtype of ``x``; the rest is as there. It is the step between two
    blocks of a transformer: the sum goes on to the next one, what is normalised into the block.

    >>> import gpugrad as gg
    >>> gg.add_layer_norm(gg.tensor([1.0, 3.0]), gg.tensor([1.0, 1.0]), eps=0.0)
    (tensor([-1.,  1.]), tensor([2., 4.]))
    """
    total = standardize.added("add_layer_norm", m, x, residual)
    return _text(layer_norm)(m, total, weight, bias, axes, eps)[0], total


@fusible
def rms_norm_backward(
    m: Any, g: Array, x: Array, weight: Array | None, statistics: Statistics, axes: int,
    eps: float, needs: Needs, also: Array | None = None,
) -> Gradients:  # fmt: skip
    """Gradients of x and weight: see :func:`gpugrad.ops.standardize.gradients`."""
    layout = last_axes("rms_norm", x.shape, axes)
    return standardize.gradients(
        m, g, x, weight, layout, statistics, eps, needs, also, centred=False
    )


def _rms_norm_vjp(
    g: Array, m: Any, x: Array, weight: Array | None, rstd: Array, axes: int, eps: float,
    needs: Needs,
) -> Gradients:  # fmt: skip
    return rms_norm_backward(m, g, x, weight, standardize.known(m, rstd), axes, eps, needs)


@primitive(
    vjp=_rms_norm_vjp,
    aux=("rstd",),
    broadcasts=False,
    samples=_rms_samples,
    reference=_numpy_rms,
)
def rms_norm(
    m: Backend, x: Array, weight: Array | None = None, /, axes: int = 1, eps: float = 1e-5
) -> tuple[Array, ...]:
    """``x / sqrt(mean(x**2) + eps) * weight``, with the mean over the last axes.

    Root mean square layer normalisation (Zhang and Sennrich, arXiv:1910.07467). Parameters, dtypes
    and errors are those of :func:`layer_norm`.

    >>> import gpugrad as gg
    >>> gg.rms_norm(gg.tensor([3.0, 4.0, 0.0, 0.0]), eps=0.0)
    tensor([1.2, 1.6, 0. , 0. ])
    """
    layout = last_axes("rms_norm", x.shape, axes)
    standardize.check("rms_norm", m, x, layout, weight=weight)
    return standardize.normalised(m, x, weight, None, layout, eps, centred=False)


@primitive(
    vjp=_after_sum_vjp(rms_norm_backward),
    outputs=2,
    broadcasts=False,
    samples=_with_residual(_rms_samples),
    reference=_numpy_after_sum(_numpy_rms),
)
def add_rms_norm(
    m: Backend,
    x: Array,
    residual: Array,
    weight: Array | None = None,
    /,
    axes: int = 1,
    eps: float = 1e-5,
) -> tuple[Array, Array]:
    """:func:`rms_norm` of ``x + residual``, and that sum: two results.

    ``residual`` has the shape and dtype of ``x``; the rest is as there.

    >>> import gpugrad as gg
    >>> gg.add_rms_norm(gg.tensor([1.0, 3.0]), gg.tensor([1.0, -1.0]), eps=0.0)
    (tensor([1., 1.]), tensor([2., 2.]))
    """
    total = standardize.added("add_rms_norm", m, x, residual)
    return _text(rms_norm)(m, total, weight, axes, eps)[0], total


# -- over groups of channels ----------------------------------------------------------------------


@fusible
def group_norm_backward(
    m: Any, g: Array, x: Array, weight: Array | None, statistics: Statistics, groups: int,
    eps: float, needs: Needs, also: Array | None = None,
) -> Gradients:  # fmt: skip
    """Gradients of x, weight and bias: see :func:`gpugrad.ops.standardize.gradients`."""
    layout = in_groups("group_norm", x.shape, groups)
    return standardize.gradients(m, g, x, weight, layout, statistics, eps, needs, also)


def _group_norm_vjp(
    g: Array, m: Any, x: Array, weight: Array | None, mean: Array, rest: Array, rstd: Array,
    groups: int, eps: float, needs: Needs,
) -> Gradients:  # fmt: skip
    known = standardize.known(m, mean, rest, rstd)
    return group_norm_backward(m, g, x, weight, known, groups, eps, needs)


@primitive(
    vjp=_group_norm_vjp,
    aux=("mean", "rest", "rstd"),
    broadcasts=False,
    samples=_group_samples,
    reference=_numpy_group,
)
def group_norm(
    m: Backend,
    x: Array,
    weight: Array | None = None,
    bias: Array | None = None,
    /,
    *,
    groups: int,
    eps: float = 1e-5,
) -> tuple[Array, ...]:
    """``(x - mean) / sqrt(var + eps) * weight + bias``, with moments over groups of channels.

    Group normalisation (Wu and He, arXiv:1803.08494): each sample's channels are cut into
    ``groups`` of equal size, which share a mean and a variance.

    Parameters
    ----------
    x:
        Shape (batch, channels, ...), real floating-point numbers.
    weight, bias:
        Shape (channels,) and the dtype of ``x``, or None.
    groups:
        A divisor of the number of channels; ParameterError otherwise.

    >>> import gpugrad as gg
    >>> gg.group_norm(gg.tensor([[1.0, 3.0, 0.0, 8.0]]), groups=2, eps=0.0)
    tensor([[-1.,  1., -1.,  1.]])
    """
    layout = in_groups("group_norm", x.shape, groups)
    standardize.check("group_norm", m, x, layout, weight=weight, bias=bias)
    return standardize.normalised(m, x, weight, bias, layout, eps)


def _add_group_norm_vjp(
    g: Sequence[Any], m: Any, y: Any, weight: Array | None, groups: int, eps: float, needs: Needs
) -> Gradients:
    return standardize.summand_gradients(m, group_norm_backward, g, y, weight, groups, eps, needs)


@primitive(
    vjp=_add_group_norm_vjp,
    outputs=2,
    broadcasts=False,
    samples=_with_residual(_group_samples),
    reference=_numpy_after_sum(_numpy_group),
)
def add_group_norm(
    m: Backend,
    x: Array,
    residual: Array,
    weight: Array | None = None,
    bias: Array | None = None,
    /,
    *,
    groups: int,
    eps: float = 1e-5,
) -> tuple[Array, Array]:
    """:func:`group_norm` of ``x + residual``, and that sum: two results.

    ``residual`` has the shape and dtype of ``x``; the rest is as there.

    >>> import gpugrad as gg
    >>> gg.add_group_norm(gg.tensor([[1.0, 3.0]]), gg.tensor([[0.0, 2.0]]), groups=1, eps=0.0)
    (tensor([[-1.,  1.]]), tensor([[1., 5.]]))
    """
    total = standardize.added("add_group_norm", m, x, residual)
    return _text(group_norm)(m, total, weight, bias, groups=groups, eps=eps)[0], total


# -- over a batch ---------------------------------------------------------------------------------


def _batch_moments_vjp(g: Sequence[Any], m: Any, x: Array) -> Gradients:
    layout = by_channel("batch_moments", x.shape)
    return (standardize.moment_gradients(m, g[0], g[2], x, layout),)


@primitive(
    vjp=_batch_moments_vjp,
    outputs=3,
    broadcasts=False,
    samples=lambda: [sample(normal((5, 3), 0)), sample(normal((2, 3, 2, 2), 3))],
    reference=lambda x: (*_numpy_batch(x)[1:2], np.zeros(x.shape[1]), *_numpy_batch(x)[2:]),
)
def batch_moments(m: Backend, x: Array, /) -> tuple[Array, Array, Array]:
    """The mean of each channel, what rounding left of it, and the variance.

    What :func:`batch_norm` needs of its operand, (batch, channels, ...). The variance is divided by
    the number of elements. For half precision all three are float32.

    >>> import gpugrad as gg
    >>> from gpugrad.ops.normalization import batch_moments
    >>> batch_moments(gg.tensor([[1.0, 0.0], [3.0, 8.0]]))
    (tensor([2., 4.]), tensor([0., 0.]), tensor([ 1., 16.]))
    """
    layout = by_channel("batch_norm", x.shape)
    standardize.check("batch_norm", m, x, layout)
    return standardize.moments(m, x, layout)


@fusible
def batch_norm_backward(
    m: Any, g: Array, x: Array, weight: Array | None, statistics: Statistics, eps: float,
    needs: Needs,
) -> Gradients:  # fmt: skip
    """Gradients of x, weight and bias: see :func:`gpugrad.ops.standardize.gradients`."""
    layout = by_channel("batch_norm", x.shape)
    return standardize.gradients(m, g, x, weight, layout, statistics, eps, needs)


def _batch_norm_training_vjp(
    g: Array, m: Any, x: Array, weight: Array | None, mean: Array, rest: Array, rstd: Array,
    eps: float, needs: Needs,
) -> Gradients:  # fmt: skip
    known = standardize.known(m, mean, rest, rstd)
    return batch_norm_backward(m, g, x, weight, known, eps, needs)


@primitive(
    vjp=_batch_norm_training_vjp,
    aux=("mean", "rest", "rstd"),
    broadcasts=False,
    samples=_batch_samples,
    reference=lambda *args, **parameters: _numpy_batch(*args, **parameters)[0],
)
def batch_norm_training(
    m: Backend,
    x: Array,
    weight: Array | None = None,
    bias: Array | None = None,
    /,
    eps: float = 1e-5,
    moments: Sequence[Array] | None = None,
) -> tuple[Array, ...]:
    """What :func:`batch_norm` records; ``moments`` are those of ``x``, where they are known.

    >>> import gpugrad as gg
    >>> from gpugrad.ops.normalization import batch_norm_training
    >>> batch_norm_training(gg.tensor([[1.0, 0.0], [3.0, 8.0]]), eps=0.0)
    tensor([[-1., -1.],
            [ 1.,  1.]])
    """
    layout = by_channel("batch_norm", x.shape)
    standardize.check("batch_norm", m, x, layout, weight=weight, bias=bias)
    found = m.batch_moments(x) if moments is None else moments
    return standardize.normalised(m, x, weight, bias, layout, eps, given=found)


@composite(samples=_batch_samples, reference=_numpy_batch)
def batch_norm(
    x: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> tuple[Tensor, Tensor, Tensor]:
    """``(x - mean) / sqrt(var + eps) * weight + bias``, with moments of each channel of a batch.

    Batch normalisation in training (Ioffe and Szegedy, arXiv:1502.03167).

    Parameters
    ----------
    x:
        Shape (batch, channels, ...), real floating-point numbers.
    weight, bias:
        Shape (channels,) and the dtype of ``x``, or None.

    Returns
    -------
    The result, of the shape and dtype of ``x``; the mean and the variance of each channel, shape
    (channels,), for running averages. The variance is divided by the number of elements. For half
    precision both are float32.

    >>> import gpugrad as gg
    >>> y, mean, var = gg.batch_norm(gg.tensor([[1.0, 0.0], [3.0, 8.0]]), eps=0.0)
    >>> y, mean, var
    (tensor([[-1., -1.],
            [ 1.,  1.]]), tensor([2., 4.]), tensor([ 1., 16.]))
    """
    x = asarray(x)
    mean, rest, var = batch_moments(x)
    known = (mean.data, rest.data, var.data)
    return batch_norm_training(x, weight, bias, eps=eps, moments=known), mean, var


@composite(samples=_with_residual(_batch_samples), reference=_numpy_after_sum(_numpy_batch))
def add_batch_norm(
    x: Any, residual: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`batch_norm` of ``x + residual``: the result, that sum, its means and its variances.

    ``residual`` has the shape and dtype of ``x``; the rest is as there.

    >>> import gpugrad as gg
    >>> y, total, mean, var = gg.add_batch_norm([[1.0], [3.0]], [[1.0], [1.0]], eps=0.0)
    >>> y.tolist(), total.tolist(), mean.tolist(), var.tolist()
    ([[-1.0], [1.0]], [[2.0], [4.0]], [3.0], [1.0])
    """
    x, residual = asarray(x), asarray(residual)
    total = standardize.added("add_batch_norm", x.backend, x, residual)
    y, mean, var = batch_norm(total, weight, bias, eps)
    return y, total, mean, var


@fusible
def batch_norm_inference_backward(
    m: Any, g: Array, x: Array, mean: Array, var: Array, weight: Array | None, eps: float,
    needs: Needs,
) -> Gradients:  # fmt: skip
    """Gradients of x, mean, var, weight and bias."""
    layout = by_channel("batch_norm_inference", x.shape)
    return standardize.gradients_by(m, g, x, mean, var, weight, layout, eps, needs)


@primitive(
    vjp=batch_norm_inference_backward,
    broadcasts=False,
    samples=_inference_samples,
    reference=_numpy_inference,
)
def batch_norm_inference(
    m: Backend,
    x: Array,
    mean: Array,
    var: Array,
    weight: Array | None = None,
    bias: Array | None = None,
    /,
    eps: float = 1e-5,
) -> Array:
    """:func:`batch_norm` with the means and variances that are given, shape (channels,).

    >>> import gpugrad as gg
    >>> mean, var = gg.tensor([1.0, 0.0]), gg.tensor([4.0, 1.0])
    >>> gg.batch_norm_inference(gg.tensor([[3.0, 5.0]]), mean, var, eps=0.0)
    tensor([[1., 5.]])
    """
    layout = by_channel("batch_norm_inference", x.shape)
    standardize.check("batch_norm_inference", m, x, layout, weight=weight, bias=bias)
    standardize.check_shapes("batch_norm_inference", x, layout, mean=mean, var=var)
    return standardize.normalised(m, x, weight, bias, layout, eps, given=(mean, var))[0]
