"""Everything that the CPU's kernels compute, family by family, on small arrays.

A check yields results one after the other, of whatever mode it runs in: those of the kernels are
compared with those of the generic text. The sizes are those of `tests/kernels/interpreter.py`.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np

import gpugrad as gg
from gpugrad.backend import backend_for_device
from gpugrad.backend.kernels import fusible, kernel_mode
from gpugrad.backend.memory import squares
from gpugrad.backend.numpy import exchanged_copy
from gpugrad.backend.random import ROUNDS, philox_round, stream
from gpugrad.clip import max_abs, nonfinite_count, sum_of_squares
from gpugrad.clip.scaling import scaled
from gpugrad.core.primitive import registry
from gpugrad.core.tensor import tensor_of
from gpugrad.health.statistics import moments as plain_moments
from gpugrad.kernels import scalars as texts
from gpugrad.kernels.cpu import compile as compiler
from gpugrad.kernels.cpu import gemm as gemms
from gpugrad.kernels.cpu import memory, microkernel
from gpugrad.kernels.cpu import products as many_gemms
from gpugrad.kernels.random import philox_block
from gpugrad.kernels.template import SCALARS
from gpugrad.ops import activations, losses, normalization
from gpugrad.ops.attention import attention as plain_attention
from gpugrad.ops.attention import packed_attention
from gpugrad.ops.convolution import convolution as plain_convolution
from gpugrad.ops.fused import bias_activation_backward
from gpugrad.ops.layers import layers as chain
from gpugrad.ops.linalg import linear as plain_linear
from gpugrad.ops.linalg import linear_activation, weight_gradient
from gpugrad.ops.pointwise_losses import pointwise_loss
from gpugrad.ops.pooling import max_pool, window_mean
from gpugrad.ops.reductions import var_backward
from gpugrad.ops.transposed import transposed_convolution
from gpugrad.ops.updates import RULES
from gpugrad.optim.flat import flat_norm, flat_update
from tests.kernels.cpu.test_optimizer import NUMBERS, VARIANTS
from tests.kernels.parity import layouts

NUMPY = backend_for_device("cpu")
NAN, INF = np.nan, np.inf


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype("float32")


def derived(function, *arrays, wanted=None, **parameters):
    """Results, and the gradients of those arrays that are wanted, or of all of floats."""
    tensors = [None if x is None else tensor_of(x) for x in arrays]
    for i, x in enumerate(tensors):
        if x is not None and x.data.dtype.kind == "f" and (wanted is None or i in wanted):
            x.requires_grad_()
    found = function(*tensors, **parameters)
    found = found if isinstance(found, tuple) else (found,)
    for seed, y in enumerate(found):
        yield y.data
        up = np.asarray(random(*y.shape, seed=90 + seed), y.data.dtype)
        y.backward(tensor_of(up), retain_graph=seed + 1 < len(found))
    for x in tensors:
        if x is not None and x.requires_grad:
            yield x.grad.data


def elementwise():
    for size in (100, 205):
        x = 3 * random(size)
        yield from derived(gg.gelu, x)
        yield from derived(gg.tanh, x)
        yield from derived(gg.swiglu, x, random(size, seed=1))
        yield from derived(gg.geglu, x, random(size, seed=1))


def bias():
    g, x, b = random(25, 30), random(25, 30, seed=1), random(30, seed=2)
    for upstream in (g, np.where(g > 2, np.float32(NAN), g)):
        for activation in ("silu", "tanh"):
            for rows in (slice(None), slice(4)):
                yield from bias_activation_backward(
                    NUMPY, upstream[rows], x[rows], b, activation, True
                )
    yield from derived(gg.bias_activation, x, b, activation="tanh")
    yield from derived(gg.bias_activation, x, b, activation="gelu")


def linear():
    for rows, inputs, outputs in ((13, 5, 7), (31, 9, 12), (2, 0, 3)):
        x, w, b = random(rows, inputs), random(outputs, inputs, seed=1), random(outputs, seed=2)
        for activation in ("tanh", "silu"):
            yield from derived(linear_activation, x, w, b, activation=activation)
        yield from derived(linear_activation, x, w, b, wanted=(2,), activation="tanh")
        yield from derived(plain_linear, x, w, b)
        yield from derived(plain_linear, x, w)


def moments():
    x = random(230)
    spoilt = np.where(x > 1, np.float32(NAN), np.where(x < -1.2, np.float32(-INF), x))
    spoilt[::7] = 0
    apart = np.array([[0, 64], [64, 64], [70, 210], [210, 230], [3, 200]])
    for y in (x + 3, x - 3, spoilt, np.round(8 * x) / np.float32(8)):
        yield plain_moments(NUMPY, y)
        yield plain_moments(NUMPY, y[:50], low=-0.5, high=0.5)
        yield plain_moments(NUMPY, y, bounds=apart, low=-0.375, high=0.875)
        yield plain_moments(NUMPY, y, bounds=apart[:2], low=-0.375, high=0.875)
    yield plain_moments(NUMPY, random(0))
    yield plain_moments(NUMPY, np.full(3, NAN, np.float32))


def layers():
    features = (5, 7, 3, 6)
    parameters = []
    for k, (inputs, outputs) in enumerate(itertools.pairwise(features)):
        parameters += [random(outputs, inputs, seed=2 * k), random(outputs, seed=2 * k + 1)]
    for rows, activation in ((9, "tanh"), (4, "silu")):
        x = random(rows, 5, seed=rows)
        yield from derived(chain, x, *parameters, activation=activation)
        yield from derived(chain, x, *parameters[:2], activation=activation)
        for wanted in ((0,), (3,), (4, 5), (6,)):
            yield from derived(chain, x, *parameters, wanted=wanted, activation=activation)
        yield from derived(chain, x, *parameters, activation=activation, ends=True)


def wide():
    """Layers that are divided each by itself: with more columns than rows, and fewer; and so few
    rows that weights are not packed."""
    features = (23, 17, 30, 9)
    parameters = []
    for k, (inputs, outputs) in enumerate(itertools.pairwise(features)):
        weight = np.float32(0.2) * random(outputs, inputs, seed=2 * k)
        parameters += [weight, random(outputs, seed=2 * k + 1)]
    for rows, activation, ends in (
        (20, "tanh", True), (27, "silu", False), (13, "relu", True), (10, "silu", False),
    ):  # fmt: skip
        x = random(rows, 23, seed=rows)
        yield from derived(chain, x, *parameters, activation=activation, ends=ends)
        for wanted in ((0,), (3,), (4, 5), (6,)):
            yield from derived(
                chain, x, *parameters, wanted=wanted, activation=activation, ends=ends
            )
        tensors = [tensor_of(p.copy()).requires_grad_() for p in parameters]
        optimizer = gg.optim.SGD(tensors, lr=0.0)
        chain(tensor_of(x), *tensors, activation=activation, ends=ends).backward(
            tensor_of(random(rows, 9, seed=50))
        )
        for place in optimizer.arenas[0].places:
            leaf = place.tensor._node
            squares = np.square(leaf.grad.data, dtype="float64").sum()
            yield leaf.grad.data
            yield np.log(squares if kernel_mode() == "off" else leaf.squares)


STREAM = {"seed": 0x9E3779B97F4A7C15, "offset": (1 << 33) + 5}


def dropout():
    yield from derived(gg.dropout, random(205), p=0.4, **STREAM)
    for shape, activation in itertools.product(((31, 7), (3, 75)), (None, "gelu", "tanh")):
        x, b, r = random(*shape), random(shape[1], seed=1), random(*shape, seed=2)
        yield from derived(
            gg.bias_activation_dropout, x, b, r, activation=activation, p=0.4, **STREAM
        )
    yield from derived(gg.bias_activation_dropout, x, b, activation="gelu", p=0.4, **STREAM)
    yield from derived(gg.bias_activation_dropout, x, activation="relu", p=0.0, **STREAM)
    yield from derived(gg.dropout, x, p=1.0)
    for number in (3, (1 << 33) + 7):
        state = (number & 0xFFFFFFFF, number >> 32, *stream(**STREAM))
        for _ in range(ROUNDS):
            state = philox_round(*state)
        if kernel_mode() != "off":
            state = philox_block.instance(compiler.CPU, "float32")(number, *stream(**STREAM))
        yield from state[:4]


def embedding():
    index = np.random.default_rng(3).integers(0, 12, (8, 5)) ** 2 // 11
    table = random(20, 40)
    yield from derived(gg.embedding, index, table)
    yield from derived(gg.embedding, index.astype("int32"), table[:, :3], padding_idx=4)
    yield from derived(gg.embedding, index, table[:12], scale_grad_by_freq=True)


def special_rows():
    """Masks, infinities and NaN, in more than one piece."""
    rows = random(14, 70)
    rows[1, :40] = rows[2, 9:] = rows[3] = -INF
    rows[4, 3] = rows[5, 60] = INF
    rows[6, 0], rows[7, 69], rows[8, 50] = NAN, -NAN, 3e4
    rows[9, 1:], rows[10], rows[11, 45:] = -INF, -2e4, rows[11, 45:] + 20
    rows[12] += np.arange(70, dtype="float32")
    return rows


def softmax():
    for function in (gg.softmax, gg.log_softmax):
        yield from derived(function, 2 * random(7, 75), axis=1)
        yield from derived(function, 2 * random(2, 20, 35), axis=1)
        yield from derived(function, 2 * random(2, 3, 4, 5), axis=2)
        yield function(tensor_of(special_rows()), axis=1).data
        yield function(tensor_of(np.ascontiguousarray(special_rows().T)), axis=0).data
    for name in ("softmax_backward", "log_softmax_backward"):
        yield getattr(activations, name)(NUMPY, random(3, 5), -np.abs(random(3, 5, seed=1)), axis=1)


def cross_entropy():
    rng = np.random.default_rng(0)
    for shape in ((13, 11), (5, 75), (2, 11, 19)):
        x, weight = 3 * random(*shape), np.float32(0.5) + rng.random(shape[1], dtype="float32")
        target = rng.integers(0, shape[1], (shape[0], *shape[2:]))
        for smoothing, w in itertools.product((0.0, 0.2), (None, weight)):
            for reduction, ignored in (("none", -100), ("mean", 3), ("sum", -1)):
                t = np.where(rng.random(target.shape) < 0.3, ignored, target)
                yield from derived(
                    gg.cross_entropy, x, t, w, wanted=[0], ignore_index=ignored,
                    reduction=reduction, label_smoothing=smoothing,
                )  # fmt: skip
    x, target = special_rows(), rng.integers(0, 70, 14)
    for laid, t in ((x, target), (np.ascontiguousarray(x.T)[None], target[None])):
        yield losses.class_cross_entropy(laid, t, reduction="none", label_smoothing=0.1)[0].data


#: Which arguments need a gradient: x, weight, bias, each alone and with others.
NEEDS = ([0], [1], [2], [0, 1], [0, 2], [1, 2], [0, 1, 2])


def large_mean(*shape):
    return (1e4 + 1e-2 * np.random.default_rng(8).standard_normal(shape)).astype("float32")


def norm():
    x, r, w, b = random(45, 13) + 1, random(45, 13, seed=1), random(13, seed=2), random(13, seed=3)
    for wanted in NEEDS:
        yield from derived(gg.layer_norm, x, w, b, wanted=wanted)
    yield from derived(gg.add_layer_norm, x, r, w, b, eps=0.1)
    yield from derived(gg.layer_norm, random(3, 75))
    for wanted in ([0], [1], [0, 1]):
        yield from derived(gg.rms_norm, x, w, wanted=wanted)
    yield from derived(gg.add_rms_norm, x, r, w, eps=0.1)
    yield from derived(gg.rms_norm, random(3, 75))
    images, more = random(7, 6, 11) + 1, random(7, 6, 11, seed=1)
    for wanted in NEEDS:
        yield from derived(gg.group_norm, images, w[:6], b[:6], groups=3, wanted=wanted)
    yield from derived(gg.add_group_norm, images, more, w[:6], b[:6], groups=2, eps=0.1)
    yield from derived(gg.group_norm, random(2, 4, 40), groups=2)
    first = random(3, 75)
    first[:, 0] = 100
    yield fusible(registry["layer_norm"].forward, "layer_norm")(NUMPY, first)[1]
    for function, value, size in (
        (gg.layer_norm, large_mean(3, 75), {}),
        (gg.group_norm, large_mean(2, 4, 20), {"groups": 2}),
    ):
        yield function(tensor_of(value), eps=1e-12, **size).data
    # Backward without statistics, which are then computed anew.
    yield from filter_none(
        normalization.layer_norm_backward(NUMPY, r, x, w, None, 1, 1e-5, (True, True, True))
    )
    yield from filter_none(
        normalization.rms_norm_backward(NUMPY, r, x, w, None, 1, 1e-5, (True, True))
    )
    yield from filter_none(
        normalization.group_norm_backward(
            NUMPY, more, images, w[:6], None, 3, 1e-5, (True, True, True)
        )
    )


def filter_none(arrays):
    return (x for x in arrays if x is not None)


def batch_norm():
    beside = np.moveaxis(random(3, 4, 5, 6) + 1, -1, 1)  # channels last
    for x in (random(5, 6, 11) + 1, random(3, 6, 70) + 1, random(75, 6) + 1, beside):
        w, b, mean = (random(6, seed=seed) for seed in (2, 3, 4))
        var = np.abs(mean) + np.float32(0.5)
        for wanted in NEEDS:
            yield from derived(normalization.batch_norm_training, x, w, b, wanted=wanted)
        yield from derived(normalization.batch_norm_training, x, eps=0.1)
        yield from derived(gg.batch_norm_inference, x, mean, var, w, b)
        yield from derived(gg.batch_norm_inference, x, mean, var, eps=0.1)
        g = random(*x.shape, seed=5)
        yield from normalization.batch_norm_backward(NUMPY, g, x, w, None, 1e-5, (True, True, True))
    for shape in ((2, 6, 40), (75, 6)):
        yield normalization.batch_norm_training(tensor_of(large_mean(*shape)), eps=1e-12).data


def reduce():
    plain, tiny = random(205), np.full(100, 1e-23, "float32")
    spoilt = plain.copy()
    spoilt[[3, 70, 99]] = NAN, INF, -INF
    great, greatest = np.full(100, 1e25, "float32"), np.array([-5, 3, -2], "float32")
    for x in (plain, plain[:50], plain[::2], tiny, great, spoilt, greatest, -np.abs(plain)):
        if kernel_mode() == "off":  # in single precision the generic text overflows
            yield np.log(np.square(x, dtype="float64").sum())
        else:
            yield np.log(sum_of_squares(NUMPY, x))
        yield np.log(max_abs(NUMPY, x))
        yield nonfinite_count(NUMPY, x)
    for size in (50, 205):
        yield scaled(NUMPY, plain[:size].copy(), np.array(0.3, "float32"))


def reductions():
    wide, deep = random(7, 75) + 2, random(2, 21, 35) + 2
    tied = np.round(2 * random(5, 40))
    tied[2, 7] = NAN
    for function in (gg.var, gg.std, gg.logsumexp):
        yield from derived(function, wide, axis=1)
        yield from derived(function, wide[:, :30], axis=1)
        yield from derived(function, deep, axis=1)
        yield from derived(function, deep[:, :3], axis=(0, 1), keepdims=True)
        yield from derived(function, deep)
    yield from derived(gg.var, wide, axis=1, correction=3)
    yield from derived(gg.max, tied, axis=1)
    yield from derived(gg.min, tied)
    for rows in (special_rows(), special_rows()[:, :20]):
        yield gg.logsumexp(tensor_of(rows), axis=1).data
        yield gg.logsumexp(tensor_of(np.ascontiguousarray(rows.T)), axis=0).data
    for x, axis in ((large_mean(3, 20), 1), (large_mean(3, 75), 1), (large_mean(20, 33), 0)):
        y = x.astype("float64") if kernel_mode() == "off" else x  # where the generic text is exact
        yield np.log(gg.var(tensor_of(y), axis=axis).data)
        up = np.full(x.shape[1 - axis], 1e5, y.dtype)
        yield var_backward(NUMPY, y, up, axis, 0, False)


def scan():
    wide, deep = random(7, 75), random(2, 21, 35)
    for initial in (False, True):
        for x, axis in ((wide, 1), (wide[:, :9], 1), (deep, 1), (deep, 0), (wide[0], None)):
            yield from derived(gg.cumulative_sum, x, axis=axis, include_initial=initial)
            near = 1 + x / 8
            yield from derived(gg.cumulative_prod, near, axis=axis, include_initial=initial)


def exchanges():
    for shape in ((2, 5, 7, 1), (3, 4, 6, 5), (1, 2, 3, 70), (4, 1, 3, 9)):
        items, rows, columns, run = shape
        x = random(*shape).transpose(0, 2, 1, 3)
        yield exchanged_copy(NUMPY, x, items, rows, columns, run)


def pointwise():
    for size in (50, 205):
        x, t = random(size), random(size, seed=1)
        p, q = 1 / (1 + np.exp(-x)), 1 / (1 + np.exp(-t))
        for reduction in ("mean", "sum", "none"):
            for loss, a, b, number in (("huber", x, t, 0.7), ("divergence", x, q, 0.0),
                                       ("binary_cross_entropy", p, q, 0.0)):  # fmt: skip
                yield from derived(
                    pointwise_loss, a, b, loss=loss, reduction=reduction, number=number
                )
            yield from derived(pointwise_loss, x, t, q, loss="gaussian_nll", reduction=reduction)


def select():
    for size in (50, 205):
        x, y = random(size), random(size, seed=1)
        yield from derived(gg.where, x > y, x, y)
        yield gg.where(tensor_of(x > y), tensor_of(x), 0.5).data
        yield gg.where(tensor_of(x > y), 2.0, tensor_of(y)).data
        yield gg.where(tensor_of(x > y), tensor_of(x > 0), True).data


def gather():
    rng = np.random.default_rng(4)
    for shape, axis in (((6, 9), 1), ((3, 7, 20), 1), ((2, 5, 40), 1), ((9, 6), 0)):
        places = list(shape)
        places[axis] = 11
        index = rng.integers(-shape[axis], shape[axis], places)
        yield from derived(gg.take_along_axis, random(*shape), index, axis=axis)
        for bad in (shape[axis], -shape[axis] - 1):
            spoilt = index.copy()
            spoilt.flat[5] = bad
            try:
                yield gg.take_along_axis(tensor_of(random(*shape)), spoilt, axis=axis).data
            except IndexError:
                yield np.array(1)


def optimizer():
    plain = random(205)
    for size in (50, 130, 205):
        spoilt = plain[:size].copy()
        spoilt[[30, 40]] = NAN, -INF
        mixed = np.where(np.arange(size) < 64, np.float32(1e-23), plain[:size])
        great = np.where(np.arange(size) < 64, np.float32(1e25), plain[:size])
        tiny = np.full(size, 1e-23, "float32")
        for x in (plain[:size], mixed, great, spoilt, tiny, 0 * tiny):
            for finite_only in (False, True):
                squares, top, *where = flat_norm(NUMPY, x, finite_only=finite_only)
                yield from (np.log(squares), np.log(top), *where)
    far = plain.copy()
    far[[199, 140]] = INF, NAN
    yield from flat_norm(NUMPY, far, finite_only=True)
    for name, flags in VARIANTS:
        for size in (205, 40):
            p, g = random(size), random(size, seed=1)
            given = {"mean": g * 0.3, "velocity": g * 2, "square": g * g + 0.5, "total": g * g + 1}
            states = [given[s].astype("float32") for s in RULES[name].kept(flags)]
            g[7] = INF
            for factor, finite_only in ((None, True), (np.array(0.5, "float32"), True)):
                yield from flat_update(
                    NUMPY, p, g, *states, count=np.array(3), skip=None, finite_only=finite_only,
                    rule=name, factor=factor, flags=flags, numbers=NUMBERS,
                )  # fmt: skip


#: Where the functions of `kernels/scalars.py` have their seams, ends and special cases.
POINTS = (
    0.0, 1e-45, 1e-39, 1e-30, 1e-10, 1e-5, 3e-4, 0.1, 0.3, 0.4, 0.5, 0.59, 0.61, 0.7, 0.72, 0.9,
    1.0, 1.1, 1.41, 1.42, 2.0, 3.0, 3.9, 4.1, 5.5, 6.5, 9.0, 11.0, 17.0, 21.0, 50.0, 86.0, 88.7,
    90.0, 103.0, 110.0, 709.7, 711.0, 745.0, 1e5, 3e38, INF, NAN,
)  # fmt: skip


def scalars():
    """How many units in the last place results are off, beyond three; and their signs."""
    for dtype in ("float32", "float64"):
        x = np.array([*POINTS, *(-p for p in POINTS)], dtype)
        for name in SCALARS:
            wide = x.astype("float64")
            known = np.vectorize(math.erf) if name == "erf" else getattr(np, name)
            found = exact = known(wide).astype(dtype)
            if kernel_mode() != "off":
                function = getattr(texts, name).instance(compiler.CPU, dtype)
                found = np.array([function(v) for v in x], dtype)
            finite = np.isfinite(exact)
            off = np.abs(found - exact)[finite] / np.spacing(np.abs(exact[finite]))
            yield np.maximum(off, 3)
            yield np.where(finite, np.copysign(1, found), found)


def product(a, b, out=None, accumulate=False):
    """A product; NumPy's own where kernels are off."""
    shape = np.matmul(a, b).shape
    if out is None:
        out = np.full(shape, 2, "float32")
    if kernel_mode() == "off":
        out[...] = np.matmul(a, b) + (out if accumulate else 0)
        return out
    found = many_gemms.matmul(a, b, out, accumulate=accumulate)
    assert found is out
    return out


def one_product(a, b, out, beta):
    if kernel_mode() == "off":
        out[...] = a @ b + (beta * out if beta else 0)
    else:
        gemms.gemm["float32"](a, b, out, np.float32(beta))
    return out


MISALIGNED = lambda x: dict(layouts(x))["misaligned"]

#: A matrix in memory in the ways that BLAS can read, and in some that it cannot.
LAYOUTS = (
    lambda x: x.copy(),
    lambda x: np.asfortranarray(x),
    lambda x: np.repeat(np.repeat(x, 2, axis=0), 2, axis=1)[::2, ::2],
    lambda x: np.repeat(x, 3, axis=0)[::3],
    lambda x: np.ascontiguousarray(x[::-1])[::-1],
    lambda x: np.ascontiguousarray(np.repeat(x.T, 2, axis=0))[::2].T,
    MISALIGNED,
)


def gemm():
    yield from products_of((9, 3, 5))
    for stack in ((3,), (2, 3), (2, 1, 3)):
        a, b = random(*stack, 5, 4), random(*stack, 4, 9, seed=1)
        yield product(a, b)
        yield product(a, b[..., :1, :, :])
        yield product(a[..., :1, :, :], b, accumulate=True)
        yield product(a, b[(0,) * len(stack)])
        yield product(a.swapaxes(-1, -2), random(5, 3))
    yield product(random(30, 4), random(4, 5), accumulate=True)
    # Its columns lie in a row: for the operand that would be packed then, there is no room.
    yield product(random(33, 7), random(8, 7, seed=1).T, np.empty((8, 33), "float32").T)
    # Operands that lie in the memory of the result; the other one is below it.
    for start in (17, 24, 31, 40, 47):
        for turn in (lambda x: x, lambda x: x.T):
            x = random(63)
            other, shared, out = (x[i : i + 16].reshape(4, 4) for i in (0, start, 32))
            yield product(turn(shared), other, out)
            yield product(other, out, turn(shared))
            yield x
    x = random(8, 4, 4)
    yield product(x[5:2:-1], x[0], x[1:4])
    yield product(x[1:4], x[0], x[5:2:-1])
    # Rows that overlap, which are BLAS's neither as they are nor transposed.
    windows = np.lib.stride_tricks.sliding_window_view(random(25), 8)[::4]
    for x in (windows, windows.T):
        yield product(x, random(x.shape[1], 3))
        yield product(random(3, x.shape[0]), x)
    for shape in ((3, 2, 7), (1, 4, 3), (4, 1, 3), (4, 3, 1), (3, 0, 2), (5, 11, 17), (18, 4, 6)):
        yield from products_of(shape)
    a, b = random(2, 6, 7), random(2, 8, 7, seed=1)
    yield product(a, b.swapaxes(1, 2))


def products_of(shape):
    """One, in all layouts."""
    m, k, n = shape
    a, b, c = random(m, k), random(k, n, seed=1), random(m, n, seed=2)
    same, *others = LAYOUTS
    for left, right, out in (
        (same, same, same), (others[0],) * 3, (others[1],) * 3,
        *((other, same, same) for other in others),
        *((same, other, same) for other in others),
        *((same, same, other) for other in others),
    ):  # fmt: skip
        yield one_product(left(a), right(b), out(c), 0)
        yield one_product(left(a), right(b), out(c), 1)
        yield product(left(a), right(b), out(c))
        yield product(left(a), right(b), out(c), True)


def small_products():
    """The product of small matrices, with each number of rows and columns, and as it is packed."""
    for m, n in itertools.product((1, 2, 3, 5, 9, 12, 13), (1, 3, 4, 6, 11, 13)):
        a, b, c = random(m, 2, 3), random(6, n, seed=1), random(m, n, seed=2)
        packed = np.full(microkernel.packed_shape(6, n, a.dtype), NAN, a.dtype)
        for accumulate in (False, True):
            if kernel_mode() == "off":
                yield a.reshape(m, 6) @ b + (c if accumulate else 0)
                continue
            for lying in (b.T.copy().T, np.repeat(b, 2, axis=1)[:, ::2], b):
                packed[...] = NAN
                microkernel.pack["float32"](lying, packed)
                panels = np.concatenate(list(packed), 1)
                assert not panels[:, n:].any()
                assert np.array_equal(panels[:, :n], b)
            width, out = packed.shape[2], c.copy() if accumulate else np.full_like(c, NAN)
            microkernel.product["float32"](
                m, n, 2, 3, memory.address(a), (6, 3, 1), memory.address(packed),
                (3 * width, width, 6 * width), memory.address(out), n, accumulate,
            )  # fmt: skip
            yield out


def weights():
    """The gradient of a weight, alone and at home, and what is noted of its squares there."""
    great = np.float32(1e25) * (np.arange(13) < 5) + np.float32(1)
    for rows, features, inputs in ((5, 13, 7), (20, 9, 12), (3, 4, 6), (21, 9, 12), (0, 9, 12)):
        g, x = random(rows, features), random(rows, inputs, seed=1)
        for scale in (np.float32(1), np.float32(1e-25), great[:features]):
            y = scale * g
            yield weight_gradient(NUMPY, y, x, None) / np.max(scale)
            home = np.full((features, inputs), NAN, "float32")
            yield weight_gradient(NUMPY, y, x, home) / np.max(scale)
            ours = kernel_mode() != "off" and 0 < rows <= 20 and home.size >= 40
            total = squares.pop(id(home)) if ours else np.square(home, dtype="float64").sum()
            yield np.log(total)


def attention():
    """Several heads, or one that is cut; in more than one block, and in part of one."""
    for batch, queries, keys, features, out in (((2, 2), 11, 13, 3, 5), ((), 27, 19, 2, 1)):
        q, k = random(*batch, queries, features), random(*batch, keys, features, seed=1)
        v = random(*batch, keys, out, seed=2)
        seen = np.random.default_rng(3).random((*batch[1:], queries, keys)) < 0.6
        seen[..., 2, :] = False
        more, for_all = random(*batch, queries, keys, seed=4), random(1, keys, seed=5)
        # Scores that grow from block to block, so that the greatest changes.
        k *= np.linspace(0.5, 3, keys, dtype="float32")[:, None]
        for mask, is_causal, p in (
            (None, False, 0.0), (seen, False, 0.0), (more, False, 0.0), (for_all, True, 0.0),
            (None, True, 0.4), (seen.swapaxes(-1, -2).copy().swapaxes(-1, -2), False, 0.4),
        ):  # fmt: skip
            yield from derived(
                plain_attention, q, k, v, mask, wanted=(0, 1, 2), is_causal=is_causal, dropout_p=p,
                **STREAM,
            )  # fmt: skip
        for one in range(3):
            yield from derived(plain_attention, q, k, v, wanted=(one,), is_causal=True)
    packed = random(3, 7, 12)
    for is_causal in (False, True):
        yield from derived(packed_attention, packed, heads=2, is_causal=is_causal, scale=0.7)


#: Input, weight, and what differs from stride 1, no padding, dilation 1, one group.
CONVOLUTIONS: tuple[tuple[Any, Any, dict[str, Any]], ...] = (
    ((2, 2, 5, 6), (3, 2, 2, 3), {}),
    ((4, 3, 6, 5), (5, 3, 3, 2), {"padding": ((1, 2), (2, 0))}),
    ((2, 3, 7, 8), (2, 3, 3, 2), {"stride": (2, 3), "padding": ((1, 1), (2, 0))}),
    ((2, 3, 7, 8), (9, 3, 2, 2), {"dilation": (2, 3), "padding": ((0, 1), (1, 2))}),
    ((2, 3, 9, 9), (2, 3, 2, 2), {"dilation": (1, 2), "stride": (2, 1)}),
    ((2, 4, 6, 5), (10, 2, 3, 2), {"groups": 2, "padding": ((1, 0), (1, 1))}),
    ((2, 4, 6, 7), (6, 2, 2, 3), {"groups": 2, "stride": (2, 2), "dilation": (2, 1)}),
    ((2, 6, 5, 5), (6, 1, 3, 3), {"groups": 6, "padding": ((1, 1), (1, 1))}),
    ((3, 6, 7, 9), (6, 1, 3, 3), {"groups": 6, "stride": (2, 2), "dilation": (1, 2)}),
    ((2, 6, 6, 5), (6, 1, 3, 4), {"groups": 6, "stride": (2, 1), "padding": ((0, 0), (1, 2))}),
    ((1, 6, 4, 5), (6, 1, 2, 3), {"groups": 6}),
    ((2, 22, 4, 5), (4, 11, 2, 2), {"groups": 2, "stride": (2, 2)}),
    ((1, 1, 2, 2), (2, 1, 2, 2), {"padding": ((1, 0), (1, 1))}),
    ((1, 2, 4, 5), (6, 2, 2, 2), {}),
    ((2, 4, 3, 3), (2, 4, 1, 1), {"padding": ((4, 3), (0, 3))}),
    ((3, 2, 9), (3, 2, 4), {"stride": (2,), "padding": ((2, 1),)}),
    ((8, 6, 2, 3), (7, 6, 2, 2), {}),
    ((8, 6, 2, 3), (7, 6, 2, 2), {"padding": ((1, 0), (0, 1))}),
    ((8, 6, 2, 3), (7, 6, 2, 2), {"padding": ((1, 0), (0, 1)), "stride": (1, 2)}),
)


def convolution():
    for x, weight, given in CONVOLUTIONS:
        axes = len(x) - 2
        usual = {"stride": (1,) * axes, "padding": ((0, 0),) * axes, "dilation": (1,) * axes}
        arrays = random(*x), random(*weight, seed=1), random(weight[0], seed=2)
        yield from derived(plain_convolution, *arrays, **usual | given)
    x, w, b = random(2, 2, 3, 4), random(3, 2, 2, 2, seed=1), random(3, seed=2)
    usual = {"stride": (1, 1), "padding": ((1, 0), (0, 0)), "dilation": (1, 1)}
    for wanted in NEEDS:
        yield from derived(plain_convolution, x, w, b, wanted=wanted, **usual)
    for activation in (None, "relu", "gelu", "tanh"):
        yield from derived(plain_convolution, x, w, b, **usual, activation=activation)
        yield from derived(plain_convolution, x, w, None, **usual, activation=activation)


#: Input, weight, padding, for tiles: whole and half ones, with borders and without.
TILES = (
    ((9, 3, 6, 6), (3, 3, 3, 3), ((0, 0), (0, 0))),
    ((9, 9, 5, 5), (12, 9, 3, 3), ((1, 0), (0, 0))),
    ((2, 9, 9, 7), (3, 9, 3, 3), ((1, 1), (1, 0))),
    ((1, 9, 10, 10), (9, 9, 3, 3), ((0, 0), (0, 0))),
    ((1, 3, 8, 11), (3, 3, 3, 3), ((0, 0), (0, 0))),
)


def winograd():
    for x, weight, padding in TILES:
        arrays = random(*x), random(*weight, seed=1), random(weight[0], seed=2)
        for activation in (None, "relu", "gelu"):
            yield from derived(plain_convolution, *arrays, padding=padding, activation=activation)
        for wanted in NEEDS:
            yield from derived(plain_convolution, *arrays, padding=padding, wanted=wanted)


#: Input, weight, places of the result, stride, padding, dilation, groups.
TRANSPOSED = (
    ((3, 4, 4, 5), (4, 5, 4, 4), (8, 10), (2, 2), (1, 1), (1, 1), 1),
    ((2, 3, 3, 4), (3, 2, 3, 2), (9, 9), (3, 2), (1, 0), (1, 1), 1),
    ((2, 3, 3, 4), (3, 4, 2, 1), (9, 8), (3, 2), (0, 0), (1, 1), 1),
    ((2, 4, 4, 3), (4, 3, 3, 3), (10, 11), (2, 3), (1, 0), (2, 2), 2),
    ((2, 6, 3, 4), (6, 1, 3, 4), (5, 9), (2, 2), (1, 0), (1, 1), 6),
    ((2, 6, 3, 4), (6, 1, 3, 3), (5, 6), (1, 1), (0, 0), (1, 1), 6),
    ((1, 2, 5), (2, 3, 4), (9,), (2,), (1,), (1,), 1),
    ((9, 12, 2, 3), (12, 6, 2, 2), (3, 4), (1, 1), (0, 0), (1, 1), 1),
    ((9, 12, 2, 3), (12, 6, 2, 2), (2, 4), (1, 1), (1, 0), (1, 1), 1),
    ((1, 2, 5, 3), (2, 3, 3, 3), (10, 6), (2, 2), (1, 1), (1, 1), 1),
    ((2, 2, 3, 3), (2, 7, 2, 2), (6, 6), (2, 2), (0, 0), (1, 1), 1),
)


def transposed():
    for x, weight, out, stride, padding, dilation, groups in TRANSPOSED:
        given = {"out": out, "stride": stride, "padding": padding, "dilation": dilation}
        arrays = random(*x), random(*weight, seed=1), random(groups * weight[1], seed=2)
        yield from derived(transposed_convolution, *arrays, **given, groups=groups)
    for wanted in NEEDS:
        yield from derived(
            transposed_convolution, *arrays, **given, groups=groups, wanted=wanted
        )  # fmt: skip
    yield from derived(transposed_convolution, *arrays[:2], None, **given)


def turning():
    """More columns of an image than are turned at a time."""
    many, one = tensor_of(random(2, 1100, 3, 4)), tensor_of(random(1, 1100, 1, 1, seed=1) / 30)
    given = {"stride": (1, 1), "padding": ((0, 0), (0, 0)), "dilation": (1, 1)}
    yield plain_convolution(many, one, **given).data


#: Input, kernel, stride, padding, dilation.
POOLS = (
    ((2, 3, 4, 6), (2, 2), (2, 2), ((0, 0), (0, 0)), (1, 1)),
    ((2, 3, 5, 7), (2, 2), (2, 2), ((0, 0), (0, 0)), (1, 1)),
    ((2, 3, 5, 7), (2, 2), (1, 1), ((1, 0), (0, 0)), (1, 1)),
    ((2, 3, 5, 7), (2, 2), (2, 2), ((0, 0), (1, 1)), (1, 1)),
    ((2, 3, 9, 8), (3, 2), (2, 1), ((1, 2), (0, 1)), (1, 2)),
    ((2, 3, 7, 9), (2, 2), (2, 2), ((0, 0), (0, 0)), (2, 3)),
    ((2, 3, 8, 9), (2, 2), (3, 4), ((0, 0), (0, 0)), (1, 1)),
    ((2, 3, 7, 6), (2, 3), (2, 2), ((0, 0), (1, 1)), (1, 1)),
    ((2, 3, 12), (3,), (2,), ((1, 1),), (2,)),
)


def pooling():
    for shape, kernel, stride, padding, dilation in POOLS:
        whole = {"kernel": kernel, "stride": stride, "padding": padding}
        for x in (random(*shape), np.round(random(*shape))):
            yield from derived(max_pool, x, **whole, dilation=dilation)
        spoilt = random(*shape)
        spoilt[np.random.default_rng(1).random(shape) < 0.2] = NAN
        yield max_pool(tensor_of(spoilt), **whole, dilation=dilation).data
        yield from derived(window_mean, random(*shape), **whole, divisor=3.0)


def recurrent():
    sizes = ((2, 2, 1, 3), (3, 9, 3, 5), (4, 2, 7, 9))
    for (steps, batch, features, n), name in itertools.product(sizes, ("gru", "lstm", "rnn")):
        layer, rows = getattr(gg, f"{name}_layer"), {"gru": 3, "lstm": 4, "rnn": 1}[name] * n
        states = 2 if name == "lstm" else 1
        shapes = [
            (steps, batch, features), (rows, features), (rows, n), (rows,), (rows,),
            *[(batch, n)] * states,
        ]  # fmt: skip
        arrays = [random(*s, seed=i) for i, s in enumerate(shapes)]
        for reverse, there in ((False, 5 + states), (True, 5 + states), (True, 4), (False, 3)):
            given = {"reverse": reverse}
            if name == "rnn":
                given["nonlinearity"] = "relu" if there == 4 else "tanh"

            def results(*of, layer=layer, given=given, count=1 + states):
                return layer(*of, **given)[:count]

            yield from derived(results, *arrays[:there])
            # With gradients from all results at a time.
            together = lambda *of, results=results: sum(y.sum() for y in results(*of))
            yield from derived(together, *arrays[:there])
