"""A layer in one call: product, bias and activation, and all three gradients."""

import numpy as np
import pytest

import gpugrad as gg
from gpugrad.errors import KernelError
from gpugrad.kernels.cpu import linear as family
from gpugrad.kernels.cpu import pool
from gpugrad.kernels.cpu.compile import CPU
from gpugrad.ops.fused import ACTIVATIONS
from gpugrad.ops.linalg import linear, linear_activation
from tests.kernels.cpu.assembly import assembly, packed
from tests.kernels.parity import DTYPES, layouts, run, wide

#: Rows, inputs and outputs of a layer that one thread computes in one call, and of a large one.
SMALL, LARGE = (37, 19, 23), (300, 130, 257)


def operands(size, dtype="float32"):
    rows, inputs, outputs = size
    rng = np.random.default_rng(rows)
    shapes = ((rows, inputs), (outputs, inputs), (outputs,), (rows, outputs))
    x, w, b, g = (rng.standard_normal(s).astype(DTYPES[dtype]) for s in shapes)
    return x, w / DTYPES[dtype].type(np.sqrt(inputs)), b, g


def test_the_sizes_are_what_they_are_for():
    assert family._is_small(SMALL[0], operands(SMALL)[1])
    assert not family._is_small(LARGE[0], operands(LARGE)[1])


@pytest.mark.parametrize("size", [SMALL, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("activation", ["tanh", "silu"])  # one of each kind of derivative
def test_parity(activation, size):
    *arrays, g = operands(size, "float64")
    got = run("require", linear_activation, *arrays, g=g, activation=activation)
    want = run("off", linear_activation, *arrays, g=g, activation=activation)
    for a, w in zip(got, want):
        np.testing.assert_allclose(a, w, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("size", [SMALL, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("activation", ["tanh", "silu"])
def test_single_precision(activation, size):
    *arrays, g = operands(size)
    got = run("require", linear_activation, *arrays, g=g, activation=activation)
    true = run(
        "off", linear_activation, *(wide(x) for x in arrays), g=wide(g), activation=activation
    )
    for a, t in zip(got, true):
        assert a.dtype == np.float32
        np.testing.assert_allclose(a, t, rtol=1e-4, atol=1e-5 * np.abs(t).max())


@pytest.mark.parametrize("shape", [(4,), (0, 4), (2, 3, 4), (1, 4), (2, 0, 4)])
def test_shapes(shape):
    _, w, b, _ = operands((1, 4, 3), "float64")
    x = np.random.default_rng(0).standard_normal(shape)
    got = run("require", linear_activation, x, w, b, activation="silu")
    want = run("off", linear_activation, x, w, b, activation="silu")
    for a, c in zip(got, want):
        assert a.shape == c.shape
        np.testing.assert_allclose(a, c, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sizes", [(3, 0, 2), (3, 2, 0)])
def test_no_features(sizes):
    *arrays, _ = operands(sizes, "float64")
    got = run("require", linear_activation, *arrays, activation="tanh")
    want = run("off", linear_activation, *arrays, activation="tanh")
    for a, c in zip(got, want):
        np.testing.assert_allclose(a, c, rtol=1e-13)


@pytest.mark.parametrize("size", [SMALL, LARGE], ids=["small", "large"])
def test_layouts(size):
    *arrays, g = operands(size)
    want = run("require", linear_activation, *arrays, g=g, activation="silu")
    compiled = {id(k): len(k.signatures) for k in _dispatchers("silu")}
    for i in range(4):
        for name, laid in layouts((*arrays, g)[i]):
            given = [*arrays, g]
            given[i] = laid
            got = run("require", linear_activation, *given[:3], g=given[3], activation="silu")
            for a, w in zip(got, want):
                np.testing.assert_allclose(a, w, rtol=1e-5, atol=1e-5, err_msg=f"{i} {name}")
    # No layout is worth a compilation.
    assert compiled == {id(k): len(k.signatures) for k in _dispatchers("silu")}


def _dispatchers(activation):
    loops = family._loops(activation)
    for template in loops[1:]:
        found = template["float32"]
        yield found.threaded if isinstance(found, pool.Launch) else found


def test_every_activation_has_one():
    x, w, b, _ = operands(SMALL)
    for name in ACTIVATIONS:
        assert family._refuse(None, x, w, b, name) is None
    assert family._refuse(None, x, w, b, "gleu") == "no activation 'gleu'"


@pytest.mark.parametrize("frozen", range(3))
def test_only_what_is_needed_is_computed(frozen):
    from gpugrad.core.tensor import tensor_of

    *arrays, g = operands(SMALL)
    full = run("require", linear_activation, *arrays, g=g, activation="tanh")
    tensors = [tensor_of(x) for x in arrays]
    for i, t in enumerate(tensors):
        t.requires_grad_(i != frozen)
    with gg.use_kernels("require"):
        linear_activation(*tensors, activation="tanh").backward(tensor_of(g))
    for i, t in enumerate(tensors):
        if i == frozen:
            assert t.grad is None
        else:
            np.testing.assert_array_equal(t.grad.data, full[1 + i])


def test_every_run_gives_the_same_bits():
    """On one number of threads: BLAS adds up in another order where a piece of a product ends."""
    *arrays, g = operands(LARGE)
    before = pool.get_num_threads()
    try:
        for threads in range(1, before + 1):
            pool.set_num_threads(threads)
            first, again = (
                run("require", linear_activation, *arrays, g=g, activation="silu") for _ in range(2)
            )
            assert all(np.array_equal(a, w) for a, w in zip(again, first))
    finally:
        pool.set_num_threads(before)


def test_many_rows_are_added_up_in_double_precision():
    rows = 1 << 19
    x, w, b = np.ones((rows, 1), "float32"), np.zeros((1, 1), "float32"), np.ones(1, "float32")
    g = np.full((rows, 1), 0.1, "float32")
    *_, gb = run("require", linear_activation, x, w, b, g=g, activation="tanh")
    np.testing.assert_allclose(
        gb, rows * (1 - np.tanh(1.0) ** 2) * np.float64(np.float32(0.1)), rtol=1e-6
    )


@pytest.mark.parametrize("size", [SMALL, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_without_an_activation(size, dtype):
    x, w, b, g = operands(size, dtype)
    near = 1e-5 if dtype == "float32" else 1e-12
    for bias in ([b], []):
        got = run("require", linear, x, w, *bias, g=g)
        true = run("off", linear, *(wide(a) for a in (x, w, *bias)), g=wide(g))
        for a, t in zip(got, true):
            assert a.dtype == dtype
            np.testing.assert_allclose(a, t, rtol=near, atol=10 * near * np.abs(t).max())


@pytest.mark.parametrize("shape", [(4,), (0, 4), (2, 3, 4), (2, 0, 4)])
def test_shapes_without_an_activation(shape):
    _, w, b, _ = operands((1, 4, 3), "float64")
    x = np.random.default_rng(0).standard_normal(shape)
    for a, c in zip(run("require", linear, x, w, b), run("off", linear, x, w, b)):
        assert a.shape == c.shape
        np.testing.assert_allclose(a, c, rtol=1e-12, atol=1e-12)


def test_refusals():
    x, w, b, _ = operands(SMALL)
    with gg.use_kernels("require"):
        with pytest.raises(KernelError, match="no kernel for float16, float16 and float16"):
            linear_activation(*(a.astype("float16") for a in (x, w, b)))
        with pytest.raises(KernelError, match=r"shapes \(37, 19\), \(23, 18\) and \(23,\)"):
            linear_activation(x, w[:, 1:], b)


@pytest.mark.parametrize("activation", ["relu", "tanh", "silu"])
def test_loops_are_vectorised(activation):
    row = np.ones(64, "float32")
    loops = family._loops(activation)
    forward = (
        loops.forward_small.bound["_forward_rows"].bound["forward_row"].instance(CPU, "float32")
    )
    assert packed(assembly(forward, row, row.copy(), row.copy())) >= 2
    backward = (
        loops.backward_small.bound["_backward_rows"].bound["backward_row"].instance(CPU, "float32")
    )
    assert packed(assembly(backward, row, row.copy(), row.copy(), row.copy())) >= 2
