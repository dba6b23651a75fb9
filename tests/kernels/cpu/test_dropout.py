"""Dropout, alone and after a product: the generic text's results, bit for bit where it rounds."""

import re

import numpy as np
import pytest

import gpugrad as gg
from gpugrad.backend import backend_for_device
from gpugrad.backend.random import ROUNDS
from gpugrad.errors import KernelError, ShapeError
from gpugrad.kernels.cpu import dropout as family
from gpugrad.ops.random import bias_activation_dropout_backward
from tests.kernels.cpu.assembly import assembly, packed
from tests.kernels.parity import DTYPES, EPS, layouts, run, wide

NUMPY = backend_for_device("cpu")
STREAM = {"seed": 0x9E3779B97F4A7C15, "offset": (1 << 33) + 5}
SHAPES = [(), (1,), (3,), (4,), (5,), (0,), (0, 3), (3, 0), (2, 3, 5), (1, 9001), (9001, 1)]


def normal(shape, dtype="float32", seed=0):
    return np.asarray(np.random.default_rng(seed).standard_normal(shape)).astype(DTYPES[dtype])


def equal(got, want):
    assert len(got) == len(want)
    for a, w in zip(got, want):
        assert a.dtype == w.dtype
        assert np.array_equal(a, w)


# -- alone ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.0, 2.0**-33, 0.1, 0.5, 0.999, 1.0])
def test_the_same_bits(dtype, p):
    x, g = normal((67, 129), dtype), normal((67, 129), dtype, 1)
    got = run("require", gg.dropout, x, g=g, p=p, **STREAM)
    equal(got, run("off", gg.dropout, x, g=g, p=p, **STREAM))


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape):
    x = normal(shape)
    got = run("require", gg.dropout, x, p=0.4, **STREAM)
    assert got[0].shape == got[1].shape == shape
    equal(got, run("off", gg.dropout, x, p=0.4, **STREAM))


def test_layouts():
    x, g = normal((31, 18)), normal((31, 18), seed=1)
    want = run("require", gg.dropout, x, g=g, p=0.3, **STREAM)
    for (_, laid), (_, h) in zip(layouts(x), layouts(g)):
        equal(run("require", gg.dropout, laid, g=h, p=0.3, **STREAM), want)


def test_sizes_around_a_span():
    for n in (family.SPAN - 1, family.SPAN, family.SPAN + 1, 3 * family.SPAN + 2):
        x = normal(n)
        equal(
            run("require", gg.dropout, x, p=0.5, **STREAM),
            run("off", gg.dropout, x, p=0.5, **STREAM),
        )


def test_what_is_dropped_is_zero_whatever_it_was():
    x = np.array([np.nan, np.inf, -np.inf, -1.0] * 300, "float32")
    with gg.use_kernels("require"):
        half = gg.dropout(x, p=0.5, seed=1).data
        none = gg.dropout(x, p=1.0, seed=1).data
    kept = gg.dropout(np.ones_like(x), p=0.5, seed=1).data != 0
    assert np.all(half[~kept] == 0)
    assert np.array_equal(half[kept], x[kept] * 2, equal_nan=True)
    assert np.all(none == 0)


# -- after a product ------------------------------------------------------------------------------


def operands(rows, columns, dtype="float32"):
    shapes = ((rows, columns), (columns,), (rows, columns), (rows, columns))
    return [normal(s, dtype, i) for i, s in enumerate(shapes)]


def close(got, want, dtype, scale=1.0):
    for a, w in zip(got, want):
        assert a.dtype == DTYPES[dtype] and a.shape == w.shape
        assert np.all(np.abs(wide(a) - wide(w)) <= scale * EPS[dtype] * (4.0 + np.abs(wide(w))))


# The loops over a row are those of bias_activation, where they are tested for every activation.
@pytest.mark.parametrize("activation", [None, "relu", "gelu", "gelu_tanh", "sigmoid"])
def test_parity(activation):
    *arrays, g = operands(129, 37)
    options = {"activation": activation, "p": 0.3, **STREAM}
    got = run("require", gg.bias_activation_dropout, *arrays, g=g, **options)
    true = run("off", gg.bias_activation_dropout, *map(wide, arrays), g=wide(g), **options)
    size = 1.0 + max(np.abs(wide(x)).max() for x in (*arrays, g)) ** 2
    close([got[0], got[1], got[3]], [true[0], true[1], true[3]], "float32", 32 * size)
    np.testing.assert_allclose(got[2], true[2], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
@pytest.mark.parametrize("p", [0.0, 0.25, 1.0])
def test_storage(dtype, p):
    *arrays, g = operands(65, 33, dtype)
    options = {"activation": "silu", "p": p, **STREAM}
    got = run("require", gg.bias_activation_dropout, *arrays, g=g, **options)
    true = run("off", gg.bias_activation_dropout, *map(wide, arrays), g=wide(g), **options)
    close(got, true, dtype, 128.0 if dtype == "float64" else 8.0)


@pytest.mark.parametrize(
    "shape",
    [(1, 1), (1, 5), (5, 1), (0, 4), (3, 0), (7,), (2, 3, 4), (700, 3), (3, 5000), (2, 2048)],
)
def test_every_shape_has_the_mask_of_dropout(shape):
    x, b, r, g = (normal(s, "float64", i) for i, s in enumerate((shape, shape[-1], shape, shape)))
    options = {"activation": "gelu", "p": 0.4, **STREAM}
    got = run("require", gg.bias_activation_dropout, x, b, r, g=g, **options)
    want = run("off", gg.bias_activation_dropout, x, b, r, g=g, **options)
    for a, w in zip(got, want):
        assert a.shape == w.shape
        np.testing.assert_allclose(a, w, rtol=1e-12, atol=1e-12)
    kept = gg.dropout(np.ones(shape), p=0.4, **STREAM).data != 0
    assert np.array_equal(got[0] != r, kept)
    assert np.array_equal(got[1] != 0, kept)
    assert np.array_equal(got[3], g)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("residual", [True, False])
def test_what_may_be_left_out(bias, residual):
    x, b, r, g = operands(40, 30, "float64")
    given = [x, b if bias else None, r if residual else None]

    def call(*tensors):
        rest = iter(tensors[1:])
        b, r = (next(rest) if there else None for there in (bias, residual))
        return gg.bias_activation_dropout(tensors[0], b, r, activation="gelu", p=0.2, **STREAM)

    arrays = [a for a in given if a is not None]
    got, want = (run(mode, call, *arrays, g=g) for mode in ("require", "off"))
    assert len(got) == 2 + bias + residual
    for a, w in zip(got, want):
        np.testing.assert_allclose(a, w, rtol=1e-12, atol=1e-12)


def test_layouts_of_all_operands():
    options = {"activation": "relu", "p": 0.3, **STREAM}
    *arrays, g = operands(31, 18)
    want = run("require", gg.bias_activation_dropout, *arrays, g=g, **options)
    for laid in zip(*map(layouts, (*arrays, g))):
        *given, h = (x for _, x in laid)
        equal(run("require", gg.bias_activation_dropout, *given, g=h, **options), want)


def test_any_number_of_threads_gives_the_same_bits():
    from numba import get_num_threads, set_num_threads

    *arrays, g = operands(1000, 96)
    before = get_num_threads()
    seen = []
    try:
        for threads in range(1, before + 1):
            set_num_threads(threads)
            seen.append([
                *run("require", gg.bias_activation_dropout, *arrays, g=g, activation="gelu_tanh"),
                *run("require", gg.dropout, arrays[0], g=g),
            ])  # fmt: skip
    finally:
        set_num_threads(before)
    for other in seen[1:]:
        equal(other, seen[0])


def test_a_gradient_that_nobody_wants_is_not_computed(monkeypatch):
    x, b, r, g = operands(9, 5)
    residual = gg.tensor(r, requires_grad=True)

    def fail(*args, **kwargs):
        raise AssertionError("called")

    y = gg.bias_activation_dropout(x, b, residual, activation="relu")
    monkeypatch.setattr("gpugrad.ops.random.bias_activation_dropout_backward", fail)
    y.backward(gg.tensor(g))
    assert np.array_equal(residual.grad.numpy(), g)


def test_backward_without_a_bias_has_no_gradient_for_it():
    x, _, _, g = operands(9, 5)
    for mode in ("off", "require"):
        with gg.use_kernels(mode):
            gx, gb = bias_activation_dropout_backward(NUMPY, g, x, None, "relu", 0.5)
        assert gb is None and gx.shape == x.shape


def test_refusals():
    x = np.zeros((2, 3), "float32")
    with gg.use_kernels("require"):
        with pytest.raises(KernelError, match="no kernel for complex128"):
            gg.dropout(np.zeros(3, complex))
        with pytest.raises(KernelError, match="no kernel for float32 with a bias of float64"):
            gg.bias_activation_dropout(x, np.zeros(3))
        with pytest.raises(KernelError, match="operands of float32 and float64"):
            gg.bias_activation_dropout(x, None, np.zeros((2, 3)))
        with pytest.raises(KernelError, match="no formula for 'gleu'"):
            gg.bias_activation_dropout(x, None, x, activation="gleu")
        with pytest.raises(KernelError, match="operands without axes"):
            gg.bias_activation_dropout(np.float32(1.0))
    large = np.zeros((64, 256), "float32")
    with pytest.raises(ShapeError, match=r"x of shape \(64, 256\) and residual of shape \(256,\)"):
        gg.bias_activation_dropout(large, None, large[0])


# -- the machine code -----------------------------------------------------------------------------

#: A product of several pairs of 32-bit numbers, on x86 or Arm.
WIDE_PRODUCT = re.compile(r"\bv?pmuludq\b|\bumull2?\s+v\d+\.2d")


def test_loops_are_vectorised():
    n = 256
    room, row = np.empty(n, np.uint32), np.ones(n, "float32")
    text = assembly(family._draw["float32"], room, 0, (0, 0, 0, 0))
    assert len(WIDE_PRODUCT.findall(text)) >= 2 * ROUNDS - 4  # the first may be known
    for loop in (family._keep, family._keep_and_add):
        text = assembly(loop["float32"], row, row, room, row.copy(), np.uint32(1), np.float32(2))
        assert packed(text) >= 2


def test_both_passes_end_in_vectorised_loops():
    forward, backward = family._loops("gelu_tanh", True)
    assert forward.bound["forward_rows"].bound["forward_row"] is family._rows("gelu_tanh")[0]
    assert backward.bound["backward_rows"].bound["backward_row"] is family._rows("gelu_tanh")[1]
    n = 64
    row = np.ones(n, "float32")
    for activation in (None, "gelu_tanh"):
        first, second = family._rows(activation)
        assert packed(assembly(first["float32"], row, row, row.copy())) >= 1
        text = assembly(second["float32"], row, row, row, row.copy(), row.copy(), np.zeros(2))
        assert packed(text) >= 3
