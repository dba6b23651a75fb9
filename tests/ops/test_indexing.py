import numpy as np
import pytest

import gpugrad as gg
from gpugrad.errors import InplaceError, ShapeError
from gpugrad.ops.indexing import put_index

DEVICES = ["cpu", "strict:device1"]


def host(x: gg.Tensor) -> np.ndarray:
    return x.backend.to_host(x.data)


def random_index(rng: np.random.Generator, shape: tuple[int, ...]):
    """A slice, integer, new axis, array or mask for every axis, or an ellipsis for the last."""
    arrays = rng.random() < 0.6
    length = int(rng.integers(1, 4))
    parts: list = []
    for n in shape[: rng.integers(0, len(shape) + 1)]:
        kind = rng.integers(0, 4)
        if kind == 0:
            parts.append(int(rng.integers(-n, n)))
        elif kind == 1 and arrays:
            parts.append(rng.integers(-n, n, length))
        elif kind == 2:
            parts.append(slice(*sorted(int(i) for i in rng.integers(0, n + 1, 2)), 2))
        else:
            parts.append(slice(None, None, -1))
        if rng.random() < 0.2:
            parts.append(None)
    if rng.random() < 0.5:
        parts.append(...)
    return tuple(parts)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("seed", range(40))
def test_any_index_reads_and_scatters_back(seed: int, device: str) -> None:
    rng = np.random.default_rng(seed)
    a = rng.standard_normal((3, 4, 2))
    index = random_index(rng, a.shape)
    x = gg.tensor(a, device=device, requires_grad=True)
    y = x[index]
    np.testing.assert_array_equal(host(y), a[index])
    g = rng.standard_normal(y.shape)
    y.backward(gg.tensor(g, device=device))
    expected = np.zeros_like(a)
    np.add.at(expected, index, g)
    np.testing.assert_allclose(host(x.grad), expected, rtol=1e-12, atol=1e-12)
    if device == "cpu":
        gg.check_grads(lambda x: x[index] * x[index], (gg.tensor(a),))


@pytest.mark.parametrize("device", DEVICES)
def test_indices_may_be_tensors_lists_and_host_arrays(device: str) -> None:
    a = np.arange(12.0).reshape(3, 4)
    x = gg.tensor(a, device=device)
    rows = [2, 0, 2]
    for index in (gg.tensor(rows, device=device), rows, np.array(rows), [gg.tensor(2), 0, 2]):
        np.testing.assert_array_equal(host(x[index]), a[rows])
        np.testing.assert_array_equal(host(x[1:, index]), a[1:, rows])
    mask = a > 5.0
    for where in (x > 5.0, mask, mask.tolist()):
        np.testing.assert_array_equal(host(x[where]), a[mask])
    np.testing.assert_array_equal(host(x[[True, False, True]]), a[[True, False, True]])
    assert x[[]].shape == (0, 4)
    assert x[gg.tensor(1, device=device)].shape == (4,)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("index", [3, (0, -5), ([0, 3],), (slice(None), [4])])
def test_an_index_outside_says_where(index, device: str) -> None:
    with pytest.raises(IndexError) as caught:
        gg.zeros((3, 4), device=device)[index]
    assert any("gpugrad.getitem(x: float64[3, 4]" in note for note in caught.value.__notes__)


def test_too_many_indices() -> None:
    with pytest.raises(IndexError, match="too many indices"):
        gg.zeros((3,))[0, 0]


def test_a_part_cannot_change_in_place_while_it_is_recorded() -> None:
    x = gg.ones(4).requires_grad_()
    part = x[1:]
    with pytest.raises(InplaceError, match="share memory"):
        part += 1.0


def test_setitem_in_the_graph_is_functional() -> None:
    x = gg.tensor([1.0, 2.0, 3.0], requires_grad=True)
    v = gg.tensor([10.0], requires_grad=True)
    y = x * 1.0
    before = y.data
    y[1:] = v
    z = (y * gg.tensor([1.0, 2.0, 3.0])).sum()
    z.backward()
    np.testing.assert_array_equal(before, [1.0, 2.0, 3.0])
    np.testing.assert_array_equal(x.grad.numpy(), [1.0, 0.0, 0.0])
    np.testing.assert_array_equal(v.grad.numpy(), [5.0])


@pytest.mark.parametrize("device", DEVICES)
def test_setitem_outside_the_graph_writes(device: str) -> None:
    a = np.arange(12.0).reshape(3, 4)
    x = gg.tensor(a, device=device)
    x[gg.tensor([2, 0], device=device), 1:] = -1.0
    x[[1]] = gg.zeros(4, device=device)
    a[[2, 0], 1:] = -1.0
    a[[1]] = 0.0
    np.testing.assert_array_equal(host(x), a)


def test_put_index_broadcasts_casts_and_lets_values_have_more_axes() -> None:
    x, v = np.zeros((2, 3), np.float32), np.arange(3.0).reshape(1, 1, 3)
    y = put_index(gg.tensor(x), gg.tensor(v), 1)
    assert y.dtype == np.float32
    np.testing.assert_array_equal(y.numpy(), [[0, 0, 0], [0, 1, 2]])
    gg.check_grads(lambda x, v: put_index(x, v, (slice(None), 0)) ** 2.0,
                   (gg.tensor(np.ones((2, 3))), gg.tensor(np.ones((1, 1, 2)))))  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("seed", range(10))
def test_take_along_axis_broadcasts_off_the_axis(seed: int, device: str) -> None:
    rng = np.random.default_rng(seed)
    shape = tuple(map(int, rng.integers(1, 4, rng.integers(1, 4))))
    axis = int(rng.integers(-len(shape), len(shape)))
    mine, theirs = (
        [1 if rng.random() < 0.3 and i != axis % len(shape) else n for i, n in enumerate(shape)]
        for _ in range(2)
    )
    theirs[axis] = int(rng.integers(1, 5))
    a, indices = rng.standard_normal(mine), rng.integers(-mine[axis], mine[axis], theirs)
    x = gg.tensor(a, device=device)
    y = gg.take_along_axis(x, gg.tensor(indices, device=device), axis=axis)
    np.testing.assert_array_equal(host(y), np.take_along_axis(a, indices, axis))
    gg.check_grads(lambda x: gg.take_along_axis(x, indices, axis=axis), (x,))


def test_take_along_axis_wants_equal_numbers_of_axes() -> None:
    with pytest.raises(ShapeError, match="x has 2 axes and indices 1"):
        gg.take_along_axis(gg.zeros((2, 3)), gg.tensor([0]), axis=1)
    with pytest.raises(ShapeError, match="axis 2 is out of bounds"):
        gg.take_along_axis(gg.zeros((2, 3)), gg.tensor([[0]]), axis=2)


@pytest.mark.parametrize("indices", [[0, 2, -1], [[0, 1], [2, 2]], 1, (0, 2)])
@pytest.mark.parametrize("axis", [None, 0, -2, 1])
def test_take_is_numpys(indices, axis: int | None) -> None:
    a = np.arange(12.0).reshape(3, 4)
    np.testing.assert_array_equal(
        gg.take(gg.tensor(a), indices, axis=axis).numpy(), np.take(a, indices, axis=axis)
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("axis", [0, -1])
def test_sorting_is_stable(device: str, descending: bool, axis: int) -> None:
    a = np.random.default_rng(0).integers(0, 3, (5, 6)).astype(float)
    x = gg.tensor(a, device=device, requires_grad=True)
    order = np.argsort(-a if descending else a, axis=axis, kind="stable")
    np.testing.assert_array_equal(host(gg.argsort(x, axis=axis, descending=descending)), order)
    y = gg.sort(x, axis=axis, descending=descending)
    np.testing.assert_array_equal(host(y), np.take_along_axis(a, order, axis))
    g = np.arange(30.0).reshape(5, 6)
    y.backward(gg.tensor(g, device=device))
    expected = np.zeros_like(a)
    np.put_along_axis(expected, order, g, axis)
    np.testing.assert_array_equal(host(x.grad), expected)


def test_what_chooses_has_no_gradient() -> None:
    x = gg.tensor([3.0, 1.0, 2.0], requires_grad=True)
    results = [gg.argsort(x), *gg.nonzero(x), gg.searchsorted(gg.tensor([0.0]), x)]
    assert not any(y.requires_grad for y in results)
    assert all(y.dtype == np.int64 for y in results)


@pytest.mark.parametrize("device", DEVICES)
def test_one_hot(device: str) -> None:
    indices = gg.tensor([[0, 2], [1, 5]], device=device)
    expected = [[[1, 0, 0], [0, 0, 1]], [[0, 1, 0], [0, 0, 0]]]
    y = gg.one_hot(indices, 3, dtype="float32")
    assert y.dtype == np.float32
    np.testing.assert_array_equal(host(y), expected)


def test_gathering_an_embedding_adds_up_where_a_row_is_read_twice() -> None:
    table = gg.zeros((4, 2)).requires_grad_()
    table[gg.tensor([1, 3, 1])].backward(gg.tensor([[1.0, 2.0], [3.0, 4.0], [10.0, 20.0]]))
    np.testing.assert_array_equal(table.grad.numpy(), [[0, 0], [11, 22], [0, 0], [3, 4]])
