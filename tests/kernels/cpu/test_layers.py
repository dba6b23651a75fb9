"""A chain of layers in one call, and all its gradients."""

import gc
import itertools
import weakref

import numpy as np
import pytest

import gpugrad as gg
from gpugrad.core.tensor import tensor_of
from gpugrad.errors import KernelError
from gpugrad.kernels.cpu import layers as family
from gpugrad.kernels.cpu import pool
from gpugrad.kernels.cpu.compile import CPU
from gpugrad.ops.fused import ACTIVATIONS
from gpugrad.ops.layers import LARGE, layers
from tests.kernels.cpu.assembly import assembly, packed
from tests.kernels.parity import layouts, run, wide

#: More rows than one piece, and widths that are no multiples of anything.
ROWS, WIDTHS = 75, (19, 23, 7, 16)


def operands(dtype="float32", rows=ROWS, widths=WIDTHS):
    """The input and the parameters, and a gradient of the result."""
    rng = np.random.default_rng(rows)
    found = [rng.standard_normal((rows, widths[0]))]
    for inputs, outputs in itertools.pairwise(widths):
        found.append(rng.standard_normal((outputs, inputs)) / np.sqrt(max(1, inputs)))
        found.append(rng.standard_normal(outputs))
    found.append(rng.standard_normal((rows, widths[-1])))
    return [x.astype(dtype) for x in found]


def test_the_threshold_is_that_of_the_operation():
    assert 2 * family.GRAIN == LARGE


@pytest.mark.parametrize("activation", ["tanh", "silu"])  # one of each kind of derivative
def test_parity(activation):
    *arrays, g = operands("float64")
    got = run("require", layers, *arrays, g=g, activation=activation)
    want = run("off", layers, *arrays, g=g, activation=activation)
    for a, w in zip(got, want, strict=True):
        np.testing.assert_allclose(a, w, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("activation", ["tanh", "silu"])
def test_single_precision(activation):
    *arrays, g = operands()
    got = run("require", layers, *arrays, g=g, activation=activation)
    true = run("off", layers, *(wide(x) for x in arrays), g=wide(g), activation=activation)
    for a, t in zip(got, true, strict=True):
        assert a.dtype == np.float32
        np.testing.assert_allclose(a, t, rtol=1e-4, atol=1e-5 * np.abs(t).max())


@pytest.mark.parametrize("shape", [(19,), (0, 19), (2, 3, 19), (1, 19), (2, 0, 19), (64, 19)])
def test_shapes(shape):
    _, *parameters, _ = operands("float64")
    x = np.random.default_rng(0).standard_normal(shape)
    got = run("require", layers, x, *parameters, activation="silu")
    want = run("off", layers, x, *parameters, activation="silu")
    for a, c in zip(got, want, strict=True):
        assert a.shape == c.shape
        np.testing.assert_allclose(a, c, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("widths", [(3, 4), (3, 0, 2), (0, 2, 3), (2, 3, 0)])
def test_one_layer_and_no_features(widths):
    *arrays, g = operands("float64", 5, widths)
    got = run("require", layers, *arrays, g=g, activation="tanh")
    want = run("off", layers, *arrays, g=g, activation="tanh")
    for a, c in zip(got, want, strict=True):
        np.testing.assert_allclose(a, c, rtol=1e-12, atol=1e-13)


def test_layouts():
    *arrays, g = operands()
    want = run("require", layers, *arrays, g=g, activation="silu")
    compiled = [len(k.signatures) for k in _dispatchers("silu")]
    for i in (0, 1, 4, len(arrays)):
        for name, laid in layouts((*arrays, g)[i]):
            given = [*arrays, g]
            given[i] = laid
            for _ in range(2):
                got = run("require", layers, *given[:-1], g=given[-1], activation="silu")
                for a, w in zip(got, want, strict=True):
                    np.testing.assert_allclose(a, w, rtol=1e-5, atol=1e-5, err_msg=f"{i} {name}")
    # No layout is worth a compilation.
    assert compiled == [len(k.signatures) for k in _dispatchers("silu")]


def _dispatchers(activation):
    loops = family._loops(activation)
    return [template["float32"].threaded for template in loops[1:]]


@pytest.mark.parametrize("wanted", [{0}, {1}, {2}, {3}, {4}, {6}, {0, 3}, {1, 6}, {2, 5}])
def test_only_what_is_needed_is_computed(wanted):
    *arrays, g = operands()
    full = run("require", layers, *arrays, g=g, activation="tanh")
    tensors = [tensor_of(x) for x in arrays]
    for i in wanted:
        tensors[i].requires_grad_()
    with gg.use_kernels("require"):
        layers(*tensors, activation="tanh").backward(tensor_of(g))
    for i, t in enumerate(tensors):
        if i in wanted:
            np.testing.assert_array_equal(t.grad.data, full[1 + i])
        else:
            assert t.grad is None


def test_the_number_of_threads_changes_no_bit():
    *arrays, g = operands()
    before = pool.get_num_threads()
    found = []
    try:
        for threads in (*range(1, before + 1), before):
            pool.set_num_threads(threads)
            found.append(run("require", layers, *arrays, g=g, activation="silu"))
    finally:
        pool.set_num_threads(before)
    for other in found[1:]:
        assert all(np.array_equal(a, w) for a, w in zip(other, found[0], strict=True))


def test_many_rows_are_added_up_in_double_precision():
    rows = 1 << 19
    x, w, b = np.ones((rows, 1), "float32"), np.zeros((1, 1), "float32"), np.ones(1, "float32")
    g = np.full((rows, 1), 0.1, "float32")
    *_, gb = run("require", layers, x, w, b, g=g, activation="tanh")
    np.testing.assert_allclose(
        gb, rows * (1 - np.tanh(1.0) ** 2) * np.float64(np.float32(0.1)), rtol=1e-6
    )


def test_a_parameter_that_changed_place_is_found():
    """Tables of addresses are kept, but only for the very same arrays."""
    *arrays, g = operands("float64")
    for i in (1, 2, 5):
        run("require", layers, *arrays, g=g, activation="tanh")
        arrays[i] = arrays[i] + 1.0
        got = run("require", layers, *arrays, g=g, activation="tanh")
        want = run("off", layers, *arrays, g=g, activation="tanh")
        for a, w in zip(got, want, strict=True):
            np.testing.assert_allclose(a, w, rtol=1e-11, atol=1e-11)


def test_tables_keep_no_array_and_are_few():
    tables = family._Tables(family._find_parameters)
    arrays = operands()[1:-1]
    found = tables.of(arrays)
    assert tables.of(list(arrays)) is found
    gone = weakref.ref(arrays[3])
    arrays[3] = arrays[3].copy()
    gc.collect()
    assert gone() is None
    assert tables.of(arrays) is not found
    kept = [operands()[1:-1] for _ in range(3 * family.KEPT)]
    for one in kept:
        tables.of(one)
    assert len(tables._kept) <= family.KEPT


def test_a_home_that_is_gone_is_no_home():
    tables = family._Tables(family._find_homes)
    first, second = np.empty(3), np.empty(3)
    assert tables.of([first, second]).addresses.all()
    del second
    gc.collect()
    assert tables.of([first, family._NONE]).addresses[0, 1] == 0


def test_refusals():
    x, *parameters, _ = operands()
    for name in ACTIVATIONS:
        assert family._refuse(None, x, *parameters, activation=name) is None
    assert family._refuse(None, x, *parameters, activation="gleu") == "no activation 'gleu'"
    large = np.zeros((LARGE // parameters[0].size + 1, x.shape[1]), "float32")
    assert "divided each by itself" in str(family._refuse(None, large, *parameters))
    assert family._refuse(None, large[1:], *parameters) is None
    with gg.use_kernels("require"):
        with pytest.raises(KernelError, match="no array of a dtype"):
            layers(*(a.astype("float16") for a in (x, *parameters)))
        with pytest.raises(KernelError, match=r"parameters of float64 and float32"):
            layers(x, *parameters[:2], parameters[2].astype("float64"), *parameters[3:])
        with pytest.raises(KernelError, match=r"float64 of shape \(75, 19\) for 19 features of fl"):
            layers(x.astype("float64"), *parameters)
        with pytest.raises(KernelError, match=r"shapes \(7, 22\) and \(7,\)"):
            layers(x, *parameters[:2], parameters[2][:, 1:], *parameters[3:])
        with pytest.raises(KernelError, match="5 parameters"):
            layers(x, *parameters[:5])


@pytest.mark.parametrize("activation", ["relu", "tanh", "silu"])
def test_loops_are_vectorised(activation):
    row = np.ones(64, "float32")
    piece = family._loops(activation).backward.bound["_backward_piece"]
    through = piece.bound["_through"].instance(CPU, "float32")
    assert packed(assembly(through, row, row.copy(), row.copy())) >= 2
