"""Bias and activation in one pass, forward and backward, with the statistics of the gradient."""

import numpy as np
import pytest

import gpugrad as gg
from gpugrad.backend import backend_for_device
from gpugrad.errors import KernelError, ParameterError, ShapeError
from gpugrad.kernels.cpu import bias as family
from gpugrad.kernels.cpu.compile import CPU
from gpugrad.ops.fused import ACTIVATIONS, bias_activation_backward
from tests.kernels.cpu.assembly import assembly, packed
from tests.kernels.parity import DTYPES, EPS, layouts, run, wide

NUMPY = backend_for_device("cpu")


def operands(rows, columns, dtype):
    rng = np.random.default_rng(rows)
    shapes = ((rows, columns), (columns,), (rows, columns))
    return [rng.standard_normal(shape).astype(DTYPES[dtype]) for shape in shapes]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_parity(activation):
    x, b, g = operands(129, 37, "float32")
    got = run("require", gg.bias_activation, x, b, g=g, activation=activation)
    true = run("off", gg.bias_activation, wide(x), wide(b), g=wide(g), activation=activation)
    scale = 1.0 + np.abs(wide(x)) + np.abs(wide(b))
    for a, t in zip(got[:2], true[:2]):
        assert a.dtype == np.float32
        assert np.all(np.abs(a - t) <= 32 * EPS["float32"] * scale * (1.0 + np.abs(wide(g))))
    np.testing.assert_allclose(got[2], true[2], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_storage(dtype):
    x, b, g = operands(65, 33, dtype)
    got = run("require", gg.bias_activation, x, b, g=g, activation="silu")
    true = run("off", gg.bias_activation, wide(x), wide(b), g=wide(g), activation="silu")
    for a, t in zip(got, true):
        assert a.dtype == DTYPES[dtype]
        # In half precision only the result is rounded; float64 adds up 65 rows in float64.
        slack = 4.0 if dtype != "float64" else 128.0
        assert np.all(np.abs(wide(a) - t) <= slack * EPS[dtype] * (np.abs(t) + 2.0))


SHAPES = [(1, 1), (1, 5), (5, 1), (0, 4), (3, 0), (7,), (2, 3, 4), (300, 3)]


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape):
    rng = np.random.default_rng(0)
    x, b = rng.standard_normal(shape), rng.standard_normal(shape[-1])
    got = run("require", gg.bias_activation, x, b, activation="gelu")
    want = run("off", gg.bias_activation, x, b, activation="gelu")
    for a, w in zip(got, want):
        assert a.shape == w.shape
        np.testing.assert_allclose(a, w, rtol=1e-12, atol=1e-12)


def test_layouts():
    x, b, g = operands(31, 18, "float32")
    want = run("require", gg.bias_activation, x, b, g=g, activation="tanh")
    for name, laid in layouts(x):
        got = run("require", gg.bias_activation, laid, b, g=g, activation="tanh")
        assert all(np.array_equal(a, w) for a, w in zip(got, want)), name
    for name, laid in layouts(g):
        got = run("require", gg.bias_activation, x, b, g=laid, activation="tanh")
        assert all(np.array_equal(a, w) for a, w in zip(got, want)), name


@pytest.mark.parametrize("mode", ["off", "require"])
def test_statistics_come_with_the_gradients(mode):
    x, b, g = operands(50, 20, "float32")
    g[3, 4], g[7, 1], g[9, 9] = np.nan, np.inf, -np.inf
    with gg.use_kernels(mode):
        gx, gb, (squares, bad) = bias_activation_backward(NUMPY, g, x, b, "silu", True)
        assert bad == 3.0
        assert np.isnan(squares)
        g[3, 4] = g[7, 1] = g[9, 9] = 0.0
        gx, gb, (squares, bad) = bias_activation_backward(NUMPY, g, x, b, "silu", True)
    assert bad == 0.0
    np.testing.assert_allclose(squares, (wide(gx) ** 2).sum(), rtol=1e-6)
    np.testing.assert_allclose(gb, wide(gx).sum(0), rtol=1e-5, atol=1e-5)


def test_the_sum_of_squares_does_not_overflow_in_half_precision():
    x, b, g = (np.full(s, v, "float16") for s, v in (((8, 4), 1), (4, 0), ((8, 4), 300)))
    with gg.use_kernels("require"):
        *_, (squares, bad) = bias_activation_backward(NUMPY, g, x, b, "relu", True)
    assert (squares, bad) == (32 * 300.0**2, 0.0)


def test_any_number_of_threads_gives_the_same_bits():
    from numba import get_num_threads, set_num_threads

    x, b, g = operands(1000, 96, "float32")
    before = get_num_threads()
    seen = []
    try:
        for threads in range(1, before + 1):
            set_num_threads(threads)
            seen.append(run("require", gg.bias_activation, x, b, g=g, activation="gelu_tanh"))
    finally:
        set_num_threads(before)
    for other in seen[1:]:
        assert all(np.array_equal(a, w) for a, w in zip(other, seen[0]))
    again = run("require", gg.bias_activation, x, b, g=g, activation="gelu_tanh")
    assert all(np.array_equal(a, w) for a, w in zip(again, seen[0]))


def test_refusals_and_errors():
    x = np.zeros((2, 3), "float32")
    with gg.use_kernels("require"):
        with pytest.raises(KernelError, match="no kernel for float32 with a bias of float64"):
            gg.bias_activation(x, np.zeros(3))
        with pytest.raises(KernelError, match=r"a bias of shape \(2,\) for operands of shape"):
            gg.bias_activation(x, np.zeros(2, "float32"))
    with pytest.raises(ShapeError, match=r"bias_activation: x of shape \(2, 3\) and bias of"):
        gg.bias_activation(x, np.zeros(2, "float32"))
    with pytest.raises(ParameterError, match="no activation 'gleu'; there are relu, "):
        gg.bias_activation(x, np.zeros(3, "float32"), activation="gleu")


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_loops_are_vectorised(activation):
    forward, backward = family._loops(activation)
    n = 64
    row = np.ones(n, "float32")
    text = assembly(forward.bound["row"].instance(CPU, "float32"), row, row, row.copy())
    assert packed(text) >= 2
    text = assembly(
        backward.bound["row"].instance(CPU, "float32"),
        row,
        row,
        row,
        row.copy(),
        row.copy(),
        np.zeros(2),
    )
    assert packed(text) >= 4


@pytest.mark.parametrize("mode", ["off", "require"])
def test_the_gradient_of_a_bias_is_written_where_it_belongs(mode) -> None:
    rng = np.random.default_rng(0)
    g, x = (rng.standard_normal((40, 30)).astype("float32") for _ in range(2))
    bias = gg.tensor(rng.standard_normal(30).astype("float32"), requires_grad=True)
    optimizer = gg.optim.SGD([bias])
    with gg.use_kernels(mode):
        home = np.full(30, 9, "float32")
        _, plain = bias_activation_backward(NUMPY, g, x, bias.data, "tanh")
        _, there = bias_activation_backward(NUMPY, g, x, bias.data, "tanh", bias_home=home)
        assert there is home
        assert np.array_equal(home, plain)
        gg.bias_activation(gg.tensor(x), bias, activation="tanh").backward(gg.tensor(g))
    (arena,) = optimizer.arenas
    assert bias.grad.data is arena.places[0].lent()
    assert np.array_equal(arena.g.flat[:30], plain)
