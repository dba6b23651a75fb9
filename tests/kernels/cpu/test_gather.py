"""Reading along an axis, and adding up where it was read: parity, layouts, threads, bad places."""

import numpy as np
import pytest

import gpugrad as gg
from gpugrad.backend.kernels import note_choices
from gpugrad.errors import KernelError
from gpugrad.kernels.cpu import pool
from gpugrad.ops.indexing import scatter_add_along_axis
from tests.kernels.parity import DTYPES, layouts, run

SHAPES = [(40, 50), (7, 20, 530), (5, 6, 7, 8), (9,)]


def normal(shape, dtype="float32", seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(DTYPES.get(dtype, dtype))


def places(shape, axis, count=9):
    wanted = [count if i == axis else n for i, n in enumerate(shape)]
    return np.random.default_rng(3).integers(-shape[axis], shape[axis], wanted)


def both(mode, x, index, axis, g):
    return run(mode, lambda x: gg.take_along_axis(x, index, axis=axis), x, g=g)


@pytest.mark.parametrize("dtype", DTYPES)
def test_parity(dtype):
    for shape in SHAPES:
        for axis in range(len(shape)):
            x, index = normal(shape, dtype), places(shape, axis)
            g = normal(index.shape, dtype, 1)
            for a, b in zip(both("require", x, index, axis, g), both("off", x, index, axis, g)):
                assert a.dtype == DTYPES[dtype] and np.array_equal(a, b), (shape, axis)


@pytest.mark.parametrize("dtype", ["int64", "int32", "uint8", "bool", "complex64"])
def test_what_is_only_moved_may_be_anything(dtype):
    x, index = (9 * normal((6, 8))).astype(dtype), places((6, 8), 1).astype("int32")
    with gg.use_kernels("require"):
        got = gg.take_along_axis(gg.asarray(x), index, axis=1).data
    np.testing.assert_array_equal(got, np.take_along_axis(x, index, 1))


def test_layouts():
    x, index = normal((40, 50)), places((40, 50), 1)
    g = normal(index.shape, seed=1)
    want = both("off", x, index, 1, g)
    for (name, a), (_, i), (_, up) in zip(layouts(x), layouts(index), layouts(g)):
        got = both("require", a, i, 1, up)
        assert all(np.array_equal(p, q) for p, q in zip(got, want, strict=True)), name
    small, none = np.broadcast_to(x[:1], x.shape), index[:, :0]
    assert np.array_equal(
        both("require", small, index, 1, g)[0], both("off", small, index, 1, g)[0]
    )
    assert not both("require", x, none, 1, g[:, :0])[1].any()


def test_threads_change_no_bit():
    x, before = normal((30, 20, 600)), pool.get_num_threads()
    try:
        for axis in (1, 2):
            index = places(x.shape, axis, 70)
            g, found = normal(index.shape, seed=1), []
            for n in (1, before):
                pool.set_num_threads(n)
                with note_choices() as log:
                    found.append([a.tobytes() for a in both("auto", x, index, axis, g)])
                assert [c.implementation for c in log] == ["numba cpu"] * 2
            assert found[0] == found[-1]
    finally:
        pool.set_num_threads(before)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("bad", [50, -51])
def test_a_place_outside_is_an_error(axis, bad):
    x, index = normal((50, 50)), places((50, 50), axis, 50)
    index[7, 3] = bad
    with gg.use_kernels("require"):
        with pytest.raises(IndexError, match=rf"along axis {axis} with 50 elements"):
            gg.take_along_axis(gg.tensor(x), index, axis=axis)
        with pytest.raises(IndexError, match=f"{bad}"):
            scatter_add_along_axis(gg.tensor(x), gg.asarray(index), (50, 50), axis)


def test_refusals_are_told():
    x, index = normal((6, 8)), places((6, 8), 1)
    with gg.use_kernels("require"):
        with pytest.raises(KernelError, match="elements of 16 bytes"):
            gg.take_along_axis(gg.asarray(x.astype("complex128")), index, axis=1)
        with pytest.raises(KernelError, match="no kernel for int64"):
            scatter_add_along_axis(gg.asarray(index), gg.asarray(index), (6, 8), 1)
