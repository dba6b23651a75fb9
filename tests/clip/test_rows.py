"""Clipping gradients that lie in an optimiser's buffer: together, and nothing else with them."""

import gc
import math

import numpy as np
import pytest

import gpugrad as gg
from gpugrad import optim
from gpugrad.clip import clip_by_value_, rows, scaling, total_norm
from gpugrad.clip.rows import rows_of
from gpugrad.core.graph import lent
from gpugrad.errors import InplaceError
from gpugrad.nn.utils import clip_grad_norm_, clip_grads_with_norm_, get_total_norm
from tests.kernels.parity import DTYPES

SHAPES = [(3,), (2, 5), (), (0, 4), (16,), (7, 3), (1,), (40,)]


@pytest.fixture(autouse=True)
def _few_are_many(monkeypatch):
    monkeypatch.setattr(rows, "FEW", 2)


def make(dtype="float32", shapes=SHAPES, seed=0, optimizer=optim.SGD):
    """Parameters in an arena, with gradients, and copies of these."""
    rng = np.random.default_rng(seed)
    params = [gg.tensor(rng.standard_normal(s).astype(DTYPES[dtype]), requires_grad=True)
              for s in shapes]  # fmt: skip
    made = optimizer(params, lr=0.1)
    for p in params:
        p.backward(gg.tensor(rng.standard_normal(p.shape).astype(DTYPES[dtype])))
    return params, made, [p.grad.data.copy() for p in params]


def wide(x):
    return np.asarray(x).astype("float64")


def norm_of(grads):
    return math.sqrt(sum((wide(g) ** 2).sum() for g in grads))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", [0.5, 1.0, 2.0, 3.0, math.inf])
def test_norms_are_those_of_the_tensors_one_by_one(dtype, order) -> None:
    params, _optimizer, grads = make(dtype)
    whole = np.concatenate([np.abs(wide(g)).ravel() for g in grads])
    want = whole.max() if order == math.inf else (whole**order).sum() ** (1 / order)
    got = get_total_norm([p.grad for p in params], order)
    assert got.item() == pytest.approx(want, rel=1e-12 if dtype == "float64" else 2e-6)
    assert got.dtype == (np.float64 if dtype == "float64" else np.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("max_norm", [0.0, 1.0, 1e6])
def test_clipping_is_that_of_tensors_elsewhere(dtype, max_norm) -> None:
    params, _optimizer, grads = make(dtype)
    others = [gg.tensor(g, requires_grad=True) for g in grads]
    for p, g in zip(others, grads):
        p.grad = gg.tensor(g.copy())
    assert [bool(rows_of([p.grad.data for p in those])[0]) for those in (params, others)] == [1, 0]
    norms = [clip_grad_norm_(those, max_norm).item() for those in (params, others)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)
    for p, other in zip(params, others):
        a, b = wide(p.grad.data), wide(other.grad.data)
        eps = {"float16": 2**-10, "bfloat16": 2**-7, "float32": 1e-6, "float64": 1e-13}[dtype]
        np.testing.assert_allclose(a, b, rtol=eps, atol=eps * 1e-3)


@pytest.mark.parametrize("chosen", [[1, 4], [0, 1, 2, 3], [5, 6], [7, 0], [2], [], [3, 4, 6, 7]])
def test_only_the_gradients_that_are_given_change(chosen) -> None:
    params, _optimizer, grads = make()
    some = [params[i] for i in chosen]
    norm = clip_grad_norm_(some, 0.5)
    want = norm_of([grads[i] for i in chosen])
    assert norm.item() == pytest.approx(want, rel=1e-6)
    for i, (p, g) in enumerate(zip(params, grads)):
        if i in chosen:
            np.testing.assert_allclose(p.grad.data, g * min(1, 0.5 / want), rtol=1e-5)
        else:
            np.testing.assert_array_equal(p.grad.data, g)


def test_a_gradient_given_twice_is_scaled_twice() -> None:
    params, _optimizer, grads = make(shapes=[(3,), (4,)])
    clip_grads_with_norm_([params[0], params[0], params[1]], 1.0, gg.tensor(2.0))
    np.testing.assert_allclose(params[0].grad.data, grads[0] / 4, rtol=1e-5)
    np.testing.assert_allclose(params[1].grad.data, grads[1] / 2, rtol=1e-5)
    norm = get_total_norm([params[0].grad, params[0].grad])
    assert norm.item() == pytest.approx(math.sqrt(2) * norm_of([params[0].grad.data]), rel=1e-6)


def test_several_arenas_and_what_is_in_none() -> None:
    first, optimizer, grads = make()
    second, _another, more = make("float64", seed=1)
    outside = gg.tensor([3.0, 4.0], requires_grad=True)
    outside.grad = gg.tensor([3.0, 4.0])
    kept = first[1].grad  # somebody looks at it: the next one lies elsewhere
    optimizer.zero_grad()
    for p, g in zip(first, grads):
        p.backward(gg.tensor(g))
    norm = clip_grad_norm_([*first, outside, *second], 1.0)
    want = norm_of([*grads, *more, np.float64([3, 4])])
    assert norm.item() == pytest.approx(want, rel=1e-6)
    assert norm.dtype == np.float64
    for p, g in zip([*first, *second], [*grads, *more]):
        np.testing.assert_allclose(p.grad.data, g / want, rtol=1e-5)
    np.testing.assert_array_equal(kept.data, grads[1])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_free_between_them_stays_zero(value) -> None:
    params, optimizer, _grads = make()
    params[4].grad.data[3] = value
    norm = clip_grad_norm_(params, 1.0)
    np.testing.assert_equal(norm.item(), value)
    (arena,) = optimizer.arenas
    used = np.zeros(arena.size, bool)
    for place in arena.places:
        used[place.start : place.start + place.size] = True
    assert (~used).sum() > 30
    assert not arena.g.flat[~used].any()
    if math.isnan(value):
        assert all(np.isnan(p.grad.data).all() for p in params)
    else:
        assert np.isnan(params[4].grad.data).sum() == 1
        assert sum(np.count_nonzero(p.grad.data) for p in params) == 1


def test_a_graph_that_saved_a_gradient_finds_out() -> None:
    params, _optimizer, _grads = make()
    x = gg.tensor(np.ones((2, 5), np.float32), requires_grad=True)
    y = (x * params[1].grad).sum()
    z = (x * params[7].grad[:5]).sum()
    clip_grad_norm_(params[:3], 0.1)
    z.backward()
    with pytest.raises(InplaceError):
        y.backward()


def test_notes_on_sums_of_squares_are_forgotten() -> None:
    params, _optimizer, _ = make()
    for p in params:
        p._node.squares = 3.0
    clip_grad_norm_(params, 0.1)
    assert all(p._node.squares is None for p in params)


def test_the_step_after_it_is_that_of_what_was_clipped() -> None:
    params, optimizer, grads = make()
    before = [p.detach().numpy().copy() for p in params]
    norm = clip_grad_norm_(params, 0.5).item()
    optimizer.step()
    for p, old, g in zip(params, before, grads):
        np.testing.assert_allclose(p.detach().numpy(), old - 0.1 * g * (0.5 / norm), rtol=1e-4)


def test_half_precision_is_widened_in_portions(monkeypatch) -> None:
    monkeypatch.setattr(scaling, "PORTION", 24)
    params, _optimizer, grads = make("float16")
    clip_grads_with_norm_(params, 1.0, gg.tensor(np.float32(4.0)))
    for p, g in zip(params, grads):
        np.testing.assert_allclose(wide(p.grad.data), wide(g) / 4, rtol=2**-10)


def test_values_are_clipped_one_by_one() -> None:
    params, _optimizer, grads = make()
    clip_by_value_([p.grad for p in params], 0.5)
    for p, g in zip(params, grads):
        np.testing.assert_array_equal(p.grad.data, np.clip(g, -0.5, 0.5))


def test_what_was_lent_is_forgotten_with_its_array() -> None:
    gc.collect()
    before = len(lent._parts)
    params, optimizer, _ = make()
    x = params[0].grad.data
    (part,) = lent.parts([x])
    assert part is not None
    _, buffer, start = part
    assert buffer is optimizer.arenas[0].g.flat and start == 0
    assert lent.parts([x.copy(), x[:2]]) == [None, None]
    assert len(lent._parts) == before + len(params)
    del params, optimizer, x, buffer, part, _
    gc.collect()
    assert len(lent._parts) == before


def test_total_norm_of_one_part() -> None:
    params, _optimizer, grads = make()
    assert total_norm([params[5].grad]).item() == pytest.approx(norm_of([grads[5]]), rel=1e-6)
