"""Which kernels of `norm.py` an operation takes, and on how many blocks."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

from gpugrad.backend import Backend
from gpugrad.backend.kernels import Kernel as Implementation
from gpugrad.kernels.cuda.elementwise import LABEL, in_a_row, refuse_arrays, refuse_shapes
from gpugrad.kernels.cuda.language import pack_size
from gpugrad.kernels.cuda.launch import machine, number_type, storage_of
from gpugrad.kernels.cuda.norm import kernel_of
from gpugrad.kernels.cuda.softmax import SHORT
from gpugrad.kernels.template import arithmetic

Array = Any


class Rows:
    """A matrix of which every row is a team's: `rows` of `columns` elements, one after the other.

    Attributes
    ----------
    gpu, storage, number:
        Where it is, what its elements are stored as, and what they are computed in.
    """

    def __init__(self, x: Array, rows: int, columns: int) -> None:
        self.gpu = machine(x)
        self.storage = storage_of(x)
        self.number = number_type(self.storage)
        self.rows, self.columns = rows, columns
        self.size = pack_size(self.storage)

    def run(self, name: str, *arguments: Any, packed: Sequence[Array]) -> None:
        """Launch a kernel that works on rows; packs are loaded from the arrays `packed`."""
        long = self.columns > SHORT
        at_once = 1 if long else self.gpu.threads // 32
        blocks = max(1, min((self.rows + at_once - 1) // at_once, self.gpu.wave))
        kernel = kernel_of(name, "block" if long else "warp")
        self.gpu.run(kernel[self.storage], (blocks,), *arguments, self.aligned(packed))

    def aligned(self, arrays: Sequence[Array]) -> int:
        """1 if packs may be loaded from all rows of all arrays, else 0."""
        return 0 if self.columns % self.size else self.gpu.aligned(*arrays)

    def numbers(self, *shape: int) -> Array:
        """Memory for numbers that are computed in."""
        return self.gpu.empty(shape, self.number)

    def filled(self, shape: Any, dtype: Any, value: float) -> Array:
        """An array of equal elements."""
        out = self.gpu.empty(shape, dtype)
        out[...] = value
        return out

    def vector(self, x: Array | None, size: int, dtype: Any, fill: float) -> Array:
        """A weight or a bias; where there is none, `fill` everywhere."""
        return self.filled((size,), dtype, fill) if x is None else in_a_row(x)

    def moments(
        self, x: Array, out: Sequence[Array], eps: float, centred: bool, inverse: bool
    ) -> None:
        """Mean, its rest and variance, or 1/sqrt(var + eps), of every row."""
        self.run(
            "moments", x, *out, eps, self.columns, self.rows, self.columns, int(centred),
            int(inverse), packed=(x,),
        )  # fmt: skip

    def folded(self, totals: Array, out: Array) -> Array:
        """The sum of the rows of a matrix of numbers into `out`."""
        chunks, columns = totals.shape
        storage = storage_of(out)
        self.gpu.run(
            kernel_of("norm_fold")[storage], ((columns + 31) // 32,), totals, out, columns, chunks
        )
        return out


# -- over the last axes ---------------------------------------------------------------------------


def _forward_last(
    x: Array, residual: Array | None, weight: Array | None, bias: Array | None, axes: int,
    eps: float, centred: bool,
) -> tuple[Array, ...]:  # fmt: skip
    """The result, what was normalised, and the statistics."""
    first = x.ndim - axes
    cut = Rows(x, prod(x.shape[:first]), prod(x.shape[first:]))
    kept = (*x.shape[:first], *(1,) * axes)
    if x.size == 0:
        rest = [cut.filled(kept, cut.number, 0.0) for _ in range(2 * centred)]
        total = x if residual is None else cut.gpu.empty(x.shape, x.dtype)
        rstd = cut.filled(kept, cut.number, (1.0 / eps) ** 0.5 if eps else float("inf"))
        return cut.gpu.empty(x.shape, x.dtype), total, *rest, rstd
    x = in_a_row(x)
    y = cut.gpu.empty(x.shape, x.dtype)
    beside, total = x, x
    if residual is not None:
        beside, total = in_a_row(residual), cut.gpu.empty(x.shape, x.dtype)
    statistics = [cut.numbers(*kept) for _ in range(3 if centred else 1)]
    w, b = (cut.vector(v, cut.columns, x.dtype, f) for v, f in ((weight, 1.0), (bias, 0.0)))
    cut.run(
        "norm_forward", x, beside, total, w, b, y, *(statistics if centred else statistics * 3),
        eps, cut.columns, cut.rows, cut.columns, int(centred), int(residual is not None),
        packed=(x, beside, total, w, b, y),
    )  # fmt: skip
    return y, total, *statistics


def _backward_last(
    g: Array, x: Array, weight: Array | None, statistics: Sequence[Array] | None, axes: int,
    eps: float, needs: Sequence[bool], also: Array | None, centred: bool,
) -> tuple[Array | None, ...]:  # fmt: skip
    first = x.ndim - axes
    shape = x.shape[first:]
    cut = Rows(x, prod(x.shape[:first]), prod(shape))
    gx = cut.gpu.empty(x.shape, x.dtype) if needs[0] else None
    if x.size == 0:
        return gx, *(cut.filled(shape, x.dtype, 0.0) if need else None for need in needs[1:])
    g, x = in_a_row(g), in_a_row(x)
    if statistics is None:
        statistics = [cut.numbers(cut.rows) for _ in range(3 if centred else 1)]
        cut.moments(x, statistics if centred else statistics * 3, eps, centred, inverse=True)
    stats = [*statistics] if centred else [*statistics] * 3
    if gx is not None:
        w = cut.vector(weight, cut.columns, x.dtype, 1.0)
        more = gx if also is None else in_a_row(also)
        cut.run(
            "norm_gradient", g, x, w, *stats, more, gx, cut.columns, cut.rows, cut.columns,
            int(centred), int(also is not None), packed=(g, x, w, more, gx),
        )  # fmt: skip
    if not any(needs[1:]):
        return gx, *(None for _ in needs[1:])
    tiles = cut.gpu.tiled(cut.rows, cut.columns, cut.size)
    totals = [cut.numbers(tiles.chunks, cut.columns) for _ in range(2)]
    cut.gpu.run(
        kernel_of("norm_column_sums")[cut.storage], (tiles.across, tiles.chunks),
        g, x, *stats, *totals, cut.rows, cut.columns, tiles.tile, tiles.rows, int(centred),
        cut.aligned((g, x)),
    )  # fmt: skip
    return gx, *(
        cut.folded(total, cut.gpu.empty(shape, x.dtype)) if need else None
        for total, need in zip(totals, needs[1:])
    )


# -- over channels --------------------------------------------------------------------------------


class Segments(Rows):
    """An operand of shape (batch, channels, ...) as a matrix with a row for each segment.

    Without `groups` over the batch. There, channels alone, (batch, channels), are turned so that a
    channel is one segment. Segment q has the moments number q // per % sets.
    """

    def __init__(self, x: Array, groups: int = 0) -> None:
        samples, self.channels = x.shape[:2]
        self.turned = not groups and prod(x.shape[2:]) == 1
        self.samples = 1 if self.turned else samples
        rows = self.samples * self.channels
        super().__init__(x, rows, x.size // max(rows, 1))
        self.per = self.channels // groups if groups else 1
        self.sets = samples * groups if groups else self.channels
        self.shape = x.shape

    def seen(self, x: Array) -> Array:
        """An array of this shape as a matrix."""
        if self.turned:
            x = x.reshape(self.shape[:2]).T
        return in_a_row(x).reshape(self.rows, self.columns)

    def back(self, y: Array) -> Array:
        """A matrix in the operand's shape."""
        return in_a_row(y.T).reshape(self.shape) if self.turned else y.reshape(self.shape)

    def scaled(
        self, x: Array, statistics: Sequence[Array], weight: Array | None, bias: Array | None
    ) -> Array:
        """The result, for a matrix."""
        y = self.gpu.empty(x.shape, x.dtype)
        pairs = ((weight, 1.0), (bias, 0.0))
        w, b = (self.vector(v, self.channels, x.dtype, fill) for v, fill in pairs)
        self.run(
            "norm_segments", x, *statistics, w, b, y, self.rows, self.columns, self.per, self.sets,
            self.channels, packed=(x, y),
        )  # fmt: skip
        return self.back(y)

    def sums(self, g: Array, x: Array, statistics: Sequence[Array]) -> tuple[Array, Array]:
        """Of each segment the sum of `g`, and of `g` times what was normalised: two matrices."""
        found = [self.numbers(self.samples, self.channels) for _ in range(2)]
        self.run(
            "norm_segment_sums", g, x, *statistics, *found, self.rows, self.columns, self.per,
            self.sets, packed=(g, x),
        )  # fmt: skip
        return found[0], found[1]

    def gradient(
        self, g: Array, x: Array, statistics: Sequence[Array], weight: Array, level: Array,
        slope: Array, also: Array | None = None,
    ) -> Array:  # fmt: skip
        """The operand's gradient, in its shape."""
        gx = self.gpu.empty(x.shape, x.dtype)
        more = gx if also is None else self.seen(also)
        self.run(
            "norm_segment_gradients", g, x, *statistics, weight, level, slope, more, gx, self.rows,
            self.columns, self.per, self.sets, self.channels, int(also is not None),
            packed=(g, x, more, gx),
        )  # fmt: skip
        return self.back(gx)

    def levels(
        self, sums: Array, products: Array, weight: Array, sets: int, per: int, count: int
    ) -> list[Array]:
        """What is taken off gradients, from the sums of `per` segments at a time."""
        found = [self.numbers(sets) for _ in range(2)]
        self.gpu.run(
            kernel_of("norm_levels")[self.storage], self.gpu.flat(sets, 1),
            sums, products, weight, *found, sets, per, self.channels, count,
        )  # fmt: skip
        return found

    def parameters(
        self, sums: Array, products: Array, dtype: Any, needs: Sequence[bool]
    ) -> tuple[Array | None, ...]:
        """Gradients of weight and bias."""
        return tuple(
            self.folded(v, self.gpu.empty((self.channels,), dtype)) if need else None
            for v, need in zip((products, sums), needs)
        )


def _forward_groups(
    x: Array, residual: Array | None, weight: Array | None, bias: Array | None, groups: int,
    eps: float,
) -> tuple[Array, ...]:  # fmt: skip
    total = x if residual is None else x + residual
    cut = Segments(x, groups)
    kept = (x.shape[0], groups, 1, 1)
    if x.size == 0:
        rstd = cut.filled(kept, cut.number, (1.0 / eps) ** 0.5 if eps else float("inf"))
        none = (cut.filled(kept, cut.number, 0.0) for _ in range(2))
        return cut.gpu.empty(x.shape, x.dtype), total, *none, rstd
    matrix = cut.seen(total)
    statistics = [cut.numbers(*kept) for _ in range(3)]
    whole = Rows(x, cut.sets, cut.per * cut.columns)
    whole.moments(matrix, statistics, eps, centred=True, inverse=True)
    return cut.scaled(matrix, statistics, weight, bias), total, *statistics


def _backward_groups(
    g: Array, x: Array, weight: Array | None, statistics: Sequence[Array] | None, groups: int,
    eps: float, needs: Sequence[bool], also: Array | None,
) -> tuple[Array | None, ...]:  # fmt: skip
    cut = Segments(x, groups)
    if x.size == 0:
        gx = cut.gpu.empty(x.shape, x.dtype) if needs[0] else None
        size = (cut.channels,)
        return gx, *(cut.filled(size, x.dtype, 0.0) if need else None for need in needs[1:])
    up, matrix = cut.seen(g), cut.seen(x)
    count = cut.per * cut.columns
    if statistics is None:
        statistics = [cut.numbers(cut.sets) for _ in range(3)]
        Rows(x, cut.sets, count).moments(matrix, statistics, eps, centred=True, inverse=True)
    sums, products = cut.sums(up, matrix, statistics)
    gx = None
    if needs[0]:
        w = cut.vector(weight, cut.channels, x.dtype, 1.0)
        level, slope = cut.levels(sums, products, w, cut.sets, cut.per, count)
        gx = cut.gradient(up, matrix, statistics, w, level, slope, also)
    return gx, *cut.parameters(sums, products, x.dtype, needs[1:])


def batch_moments(m: Backend, x: Array) -> tuple[Array, ...]:
    """Mean, what its rounding left of it, and variance of each channel."""
    cut = Segments(x)
    if x.size == 0:
        return tuple(cut.filled((cut.channels,), cut.number, 0.0) for _ in range(3))
    parts = [cut.numbers(cut.rows) for _ in range(3)]
    cut.moments(cut.seen(x), parts, 0.0, centred=True, inverse=False)
    if cut.samples == 1:
        return tuple(parts)
    found = tuple(cut.numbers(cut.channels) for _ in range(3))
    cut.gpu.run(
        kernel_of("norm_together")[arithmetic(cut.storage)], cut.gpu.flat(cut.channels, 1),
        *parts, *found, cut.channels, cut.samples, cut.samples,
    )  # fmt: skip
    return found


def _training(
    m: Backend, x: Array, weight: Array | None = None, bias: Array | None = None,
    eps: float = 1e-5, moments: Sequence[Array] | None = None,
) -> tuple[Array, ...]:  # fmt: skip
    mean, rest, var = batch_moments(m, x) if moments is None else moments
    cut = Segments(x)
    statistics = mean, rest, 1.0 / m.sqrt(var + eps)
    y = cut.gpu.empty(x.shape, x.dtype)
    if x.size:
        y = cut.scaled(cut.seen(x), statistics, weight, bias)
    return y, *(v.reshape(-1, *(1,) * (x.ndim - 2)) for v in statistics)


def _training_backward(
    m: Backend, g: Array, x: Array, weight: Array | None, statistics: Sequence[Array] | None,
    eps: float, needs: Sequence[bool],
) -> tuple[Array | None, ...]:  # fmt: skip
    if statistics is None:
        mean, rest, var = batch_moments(m, x)
        statistics = mean, rest, 1.0 / m.sqrt(var + eps)
    return _batch_gradients(g, x, weight, statistics, needs, fixed=False)[0]


def _batch_gradients(
    g: Array, x: Array, weight: Array | None, statistics: Sequence[Array], needs: Sequence[bool],
    fixed: bool,
) -> tuple[tuple[Array | None, ...], Array, Array]:  # fmt: skip
    """Gradients of operand, weight and bias, and the sums of each channel.

    If the statistics are `fixed`, nothing is taken off the operand's gradient.
    """
    cut = Segments(x)
    size = (cut.channels,)
    if x.size == 0:
        gx = cut.gpu.empty(x.shape, x.dtype)
        none = cut.filled(size, x.dtype, 0.0), cut.filled(size, x.dtype, 0.0)
        sums = cut.filled(size, cut.number, 0.0)
        return tuple(v if need else None for v, need in zip((gx, *none), needs)), sums, sums
    up, matrix = cut.seen(g), cut.seen(x)
    parts = cut.sums(up, matrix, statistics)
    sums, products = (cut.folded(v, cut.numbers(cut.channels)) for v in parts)
    gx = None
    if needs[0]:
        w = cut.vector(weight, cut.channels, x.dtype, 1.0)
        if fixed:
            levels = [cut.filled(size, cut.number, 0.0)] * 2
        else:
            count = x.size // cut.channels
            levels = cut.levels(sums, products, w, cut.channels, 1, count)
        gx = cut.gradient(up, matrix, statistics, w, *levels)
    found = (gx, *cut.parameters(*parts, x.dtype, needs[1:]))
    return found, sums, products


def _given(m: Backend, x: Array, mean: Array, var: Array, eps: float) -> tuple[Array, ...]:
    number = number_type(storage_of(x))
    mean, var = (in_a_row(v).astype(number, copy=False) for v in (mean, var))
    return mean, mean * number(0), 1.0 / m.sqrt(var + eps)


def _inference(
    m: Backend, x: Array, mean: Array, var: Array, weight: Array | None = None,
    bias: Array | None = None, eps: float = 1e-5,
) -> Array:  # fmt: skip
    cut = Segments(x)
    if x.size == 0:
        return cut.gpu.empty(x.shape, x.dtype)
    return cut.scaled(cut.seen(x), _given(m, x, mean, var, eps), weight, bias)


def _inference_backward(
    m: Backend, g: Array, x: Array, mean: Array, var: Array, weight: Array | None, eps: float,
    needs: Sequence[bool],
) -> tuple[Array | None, ...]:  # fmt: skip
    statistics = _given(m, x, mean, var, eps)
    wanted = (needs[0], *needs[3:])
    found, sums, products = _batch_gradients(g, x, weight, statistics, wanted, fixed=True)
    rstd = statistics[2]
    factor = rstd if weight is None else rstd * weight.astype(rstd.dtype)
    gmean = (-factor * sums).astype(mean.dtype) if needs[1] else None
    gvar = (products * factor * rstd * -0.5).astype(var.dtype) if needs[2] else None
    return found[0], gmean, gvar, *found[1:]


# -- for the slots --------------------------------------------------------------------------------


def _refuse_parameters(x: Array, shape: tuple[int, ...], *parameters: Any) -> str | None:
    given = [p for p in parameters if p is not None]
    if why := refuse_arrays(x, *given):
        return why
    wrong = [p.shape for p in given if p.shape != shape]
    return f"a weight or bias of shape {wrong[0]} where {shape} is needed" if wrong else None


def _refuse_last(x: Array, axes: int, *parameters: Any) -> str | None:
    if not 1 <= axes <= x.ndim:
        return f"{axes} axes of {x.ndim}"
    return _refuse_parameters(x, x.shape[x.ndim - axes :], *parameters)


def _refuse_channels(x: Array, groups: int, *parameters: Any) -> str | None:
    if x.ndim < 2 or groups < 1 or x.shape[1] % groups:
        return f"{groups} groups in the shape {x.shape}"
    return _refuse_parameters(x, x.shape[1:2], *parameters)


def _forward(kind: str, residual: bool) -> Implementation:
    """Of layer, RMS or group norm; its operands are x, a residual if so, weight and bias."""

    def run(
        m: Backend, x: Array, *more: Any, axes: int = 1, groups: int = 1, eps: float = 1e-5
    ) -> tuple[Array, ...]:
        beside = more[0] if residual else None
        weight, bias = (*more[residual:], None, None)[:2]
        if kind == "group":
            found = _forward_groups(x, beside, weight, bias, groups, eps)
        else:
            found = _forward_last(x, beside, weight, bias, axes, eps, kind == "layer")
        return found[:2] if residual else (found[0], *found[2:])

    def refuse(
        m: Backend, x: Any, *more: Any, axes: int = 1, groups: int = 1, eps: float = 1e-5
    ) -> str | None:
        if why := refuse_shapes(x, *more[:residual]):
            return why
        if kind == "group":
            return _refuse_channels(x, groups, *more[residual:])
        return _refuse_last(x, axes, *more[residual:])

    return Implementation(run, LABEL, refuse)


def _backward(kind: str) -> Implementation:
    def run(
        m: Backend, g: Array, x: Array, weight: Array | None, statistics: Sequence[Array] | None,
        size: int, eps: float, needs: Sequence[bool], also: Array | None = None,
    ) -> tuple[Array | None, ...]:  # fmt: skip
        if kind == "group":
            return _backward_groups(g, x, weight, statistics, size, eps, needs, also)
        layer = kind == "layer"
        return _backward_last(g, x, weight, statistics, size, eps, needs, also, layer)

    def refuse(
        m: Backend, g: Any, x: Any, weight: Any, statistics: Any, size: int, eps: float,
        needs: Any, also: Any = None,
    ) -> str | None:  # fmt: skip
        alike = (g, x) if also is None else (g, x, also)
        by_size = _refuse_channels if kind == "group" else _refuse_last
        return refuse_shapes(*alike) or by_size(x, size, weight)

    return Implementation(run, LABEL, refuse)


def _refuse_batch(x: Any, parameters: Sequence[Any] = (), given: Sequence[Any] = ()) -> str | None:
    if why := refuse_arrays(x):
        return why
    if x.ndim < 2:
        return f"no axis of channels in the shape {x.shape}"
    for v in given:
        if not hasattr(v, "dtype") or not storage_of(v) or v.shape != x.shape[1:2]:
            return f"moments that are not {x.shape[1]} numbers of a kernel's dtype"
    return _refuse_parameters(x, x.shape[1:2], *parameters)


def _refuse_training(m: Backend, x: Any, *parameters: Any, **options: Any) -> str | None:
    return _refuse_batch(x, parameters)


def _refuse_training_backward(m: Backend, g: Any, x: Any, weight: Any, *more: Any) -> str | None:
    return refuse_shapes(g, x) or _refuse_batch(x, (weight,))


def _refuse_inference(
    m: Backend, x: Any, mean: Any, var: Any, *parameters: Any, **options: Any
) -> str | None:
    return _refuse_batch(x, parameters, (mean, var))


def _refuse_inference_backward(
    m: Backend, g: Any, x: Any, mean: Any, var: Any, weight: Any, *more: Any
) -> str | None:
    return refuse_shapes(g, x) or _refuse_batch(x, (weight,), (mean, var))


#: For the slots of the backend.
KERNELS = {
    **{f"{kind}_norm": _forward(kind, residual=False) for kind in ("layer", "rms", "group")},
    **{f"add_{kind}_norm": _forward(kind, residual=True) for kind in ("layer", "rms", "group")},
    **{f"{kind}_norm_backward": _backward(kind) for kind in ("layer", "rms", "group")},
    "batch_moments": Implementation(batch_moments, LABEL, _refuse_training),
    "batch_norm_training": Implementation(_training, LABEL, _refuse_training),
    "batch_norm_backward": Implementation(_training_backward, LABEL, _refuse_training_backward),
    "batch_norm_inference": Implementation(_inference, LABEL, _refuse_inference),
    "batch_norm_inference_backward": Implementation(
        _inference_backward, LABEL, _refuse_inference_backward
    ),
}
