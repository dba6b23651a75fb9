import numpy as np
import pytest

import gpugrad as gg
from gpugrad.errors import ShapeError
from gpugrad.ops.linalg import linear

RNG = np.random.default_rng(0)


def randn(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape)


def matmul_shapes(seed: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    rng = np.random.default_rng(seed)
    stack = tuple(rng.integers(1, 4, rng.integers(0, 3)))
    inner, rows, columns = rng.integers(1, 4, 3)

    def thinned() -> tuple[int, ...]:
        kept = stack[rng.integers(0, len(stack) + 1) :]
        return tuple(int(n) if rng.random() < 0.7 else 1 for n in kept)

    a = (int(inner),) if rng.random() < 0.2 else (*thinned(), int(rows), int(inner))
    b = (int(inner),) if rng.random() < 0.2 else (*thinned(), int(inner), int(columns))
    return a, b


@pytest.mark.parametrize("seed", range(40))
def test_matmul_of_any_shapes(seed: int) -> None:
    a, b = (randn(*s) for s in matmul_shapes(seed))
    y = gg.matmul(a, b)
    np.testing.assert_allclose(y.numpy(), np.matmul(a, b), rtol=1e-12, atol=1e-12)
    assert y.shape == np.matmul(a, b).shape
    gg.check_grads(gg.matmul, (gg.tensor(a), gg.tensor(b)))


def test_matmul_saves_only_the_other_operand() -> None:
    x, w = gg.tensor(randn(2, 3)), gg.tensor(randn(3, 4), requires_grad=True)
    assert set((x @ w).grad_fn.saved()) == {"a", "b_shape"}
    x.requires_grad_()
    assert set((x @ w.detach()).grad_fn.saved()) == {"b", "a_shape"}


def test_matmul_gradient_of_a_shared_matrix_is_one_product() -> None:
    # Batches of rows against one matrix: no stack of (in, out) matrices on the way.
    x, w = gg.tensor(randn(50, 4, 3)), gg.tensor(randn(3, 2), requires_grad=True)
    g = randn(50, 4, 2)
    (x @ w).backward(gg.tensor(g))
    np.testing.assert_allclose(w.grad.numpy(), np.einsum("bij,bik->jk", x.numpy(), g), rtol=1e-12)


def test_matmul_promotes_and_casts_the_gradient_back() -> None:
    a = gg.tensor(randn(2, 3), dtype="float32", requires_grad=True)
    y = a @ gg.tensor(randn(3, 2))
    assert y.dtype == np.float64
    y.sum().backward()
    assert a.grad.dtype == np.float32


@pytest.mark.parametrize(
    ("a", "b", "words"),
    [
        ((2, 3), (2, 4), ["(2, 3)", "(2, 4)", "axis 1", "3 elements", "axis 0", "second 2"]),
        ((2, 3), (4, 3), ["transpose the second", "b.mT"]),
        ((2, 5, 3), (4, 3, 6), ["(2,)", "(4,)", "do not broadcast"]),
        ((3,), (4,), ["(3,)", "(4,)"]),
        ((), (3,), ["0-d", "multiply"]),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "strict:device1"])
def test_matmul_errors_name_shapes_axes_and_the_fix(
    a: tuple[int, ...], b: tuple[int, ...], words: list[str], device: str
) -> None:
    with pytest.raises(ShapeError) as caught:
        gg.matmul(gg.ones(a, device=device), gg.ones(b, device=device))
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("shape", [(3,), (4, 3), (2, 4, 3), (2, 1, 4, 3), (0, 3)])
def test_linear_against_its_parts(shape: tuple[int, ...]) -> None:
    x, w, b = (gg.tensor(v) for v in (randn(*shape), randn(2, 3), randn(2)))
    expected = x.numpy() @ w.numpy().T + b.numpy()
    np.testing.assert_allclose(linear(x, w, b).numpy(), expected, rtol=1e-12)
    gg.check_grads(linear, (x, w, b))
    gg.check_grads(linear, (x, w))


def test_linear_keeps_what_the_wanted_gradients_need() -> None:
    x, w, b = (gg.tensor(v) for v in (randn(4, 3), randn(2, 3), randn(2)))

    def saved(*wanted: int) -> set[str]:
        operands = [t.detach() for t in (x, w, b)]
        for i in wanted:
            operands[i].requires_grad_()
        return set(linear(*operands).grad_fn.saved())

    assert saved(2) == set()
    assert saved(1) == {"x"}
    assert saved(0) == {"weight"}
    assert saved(0, 1, 2) == {"x", "weight"}


def test_linear_does_not_write_into_its_operands() -> None:
    x, w, b = randn(1, 3), randn(2, 3), randn(2)
    kept = b.copy()
    linear(gg.tensor(x), gg.tensor(w), gg.tensor(b))
    np.testing.assert_array_equal(b, kept)


@pytest.mark.parametrize(
    ("x", "w", "b", "words"),
    [
        ((4, 3), (2, 5), (2,), ["(4, 3)", "(2, 5)", "in_features=3"]),
        ((4, 2), (2, 3), (2,), ["(4, 2)", "(2, 3)", "weight.mT"]),
        ((4, 3), (3,), None, ["two axes"]),
        ((4, 3), (2, 3), (3,), ["bias of shape (3,)", "(2,)"]),
        ((), (2, 3), None, ["at least one axis"]),
    ],
)
def test_linear_errors_name_shapes_and_the_fix(x, w, b, words) -> None:
    with pytest.raises(ShapeError) as caught:
        linear(gg.ones(x), gg.ones(w), None if b is None else gg.ones(b))
    for word in words:
        assert word in str(caught.value)


@pytest.mark.torch
@pytest.mark.parametrize("shape", [(3,), (4, 3), (2, 4, 3)])
def test_linear_is_pytorchs(shape: tuple[int, ...]) -> None:
    import torch

    values = [randn(*shape), randn(2, 3), randn(2)]
    mine = [gg.tensor(v, requires_grad=True) for v in values]
    theirs = [torch.tensor(v, requires_grad=True) for v in values]
    y, z = linear(*mine), torch.nn.functional.linear(*theirs)
    g = randn(*y.shape)
    y.backward(gg.tensor(g))
    z.backward(torch.tensor(g))
    np.testing.assert_allclose(y.detach().numpy(), z.detach().numpy(), rtol=1e-12)
    for a, b in zip(mine, theirs, strict=True):
        np.testing.assert_allclose(a.grad.numpy(), b.grad.numpy(), rtol=1e-12)


@pytest.mark.parametrize("seed", range(25))
def test_tensordot_over_any_axes(seed: int) -> None:
    rng = np.random.default_rng(seed)
    a_ndim, b_ndim = rng.integers(1, 4, 2)
    k = int(rng.integers(0, min(a_ndim, b_ndim) + 1))
    left = [int(i) for i in rng.permutation(a_ndim)[:k]]
    right = [int(i) for i in rng.permutation(b_ndim)[:k]]
    a_shape, b_shape = (list(map(int, rng.integers(1, 4, n))) for n in (a_ndim, b_ndim))
    for i, j in zip(left, right, strict=True):
        b_shape[j] = a_shape[i]
    left = [i - int(a_ndim) if rng.random() < 0.3 else i for i in left]
    a, b = rng.standard_normal(a_shape), rng.standard_normal(b_shape)
    axes = (tuple(left), tuple(right))
    y = gg.tensordot(a, b, axes=axes)
    np.testing.assert_allclose(y.numpy(), np.tensordot(a, b, axes=axes), rtol=1e-12, atol=1e-12)
    gg.check_grads(lambda a, b: gg.tensordot(a, b, axes=axes), (gg.tensor(a), gg.tensor(b)))


@pytest.mark.parametrize(
    ("a", "b"), [((3,), (3,)), ((2, 3), (3,)), ((3,), (3, 2)), ((2, 3), (4, 3, 5)), ((), (2, 3))]
)
def test_dot_is_numpys(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    x, y = randn(*a), randn(*b)
    np.testing.assert_allclose(gg.dot(x, y).numpy(), np.dot(x, y), rtol=1e-12)
    np.testing.assert_allclose(gg.dot(x.tolist(), y.tolist()).numpy(), np.dot(x, y), rtol=1e-12)


def test_vecdot_conjugates_and_checks() -> None:
    z = np.array([1 + 2j, 3 - 1j])
    np.testing.assert_allclose(gg.vecdot(z, z).numpy(), np.vecdot(z, z))
    with pytest.raises(ShapeError, match="3 elements in the first operand and 4 in the second"):
        gg.vecdot(gg.ones((2, 3)), gg.ones((2, 4)))
