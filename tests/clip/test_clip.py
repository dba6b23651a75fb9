"""Norms and clipping, against NumPy and PyTorch, and without a look at the device's values."""

import math

import numpy as np
import pytest

import gpugrad as gg
from gpugrad import nn
from gpugrad.clip import clip_by_norm_, clip_by_value_, coefficient, total_norm
from gpugrad.errors import DeviceError, GpugradError, InplaceError, ParameterError
from tests.backend.counting import counting

SHAPES = [(3, 4), (7,), (), (2, 1, 5)]


def arrays(dtype=np.float64, scale=1.0):
    rng = np.random.default_rng(0)
    return [(scale * rng.standard_normal(s)).astype(dtype) for s in SHAPES]


def parameters(dtype=np.float64, scale=1.0):
    """Parameters with gradients, and one without."""
    made = []
    for g in arrays(dtype, scale):
        p = nn.Parameter(gg.tensor(np.zeros_like(g)))
        p.grad = gg.tensor(g)
        made.append(p)
    return [*made, nn.Parameter(gg.tensor(np.zeros(2, dtype)))]


@pytest.mark.parametrize("p", [0.5, 1, 2, 3, math.inf])
def test_total_norm(p) -> None:
    flat = np.concatenate([a.ravel() for a in arrays()])
    norm = total_norm([gg.tensor(a) for a in arrays()], p)
    assert norm.shape == ()
    assert norm.dtype == np.float64
    expected = np.sum(np.abs(flat) ** p) ** (1 / p) if p != math.inf else np.abs(flat).max()
    assert math.isclose(norm.item(), expected, rel_tol=1e-14)


@pytest.mark.torch
@pytest.mark.parametrize("max_norm", [0.0, 0.5, 4.0, 1e9, math.inf])
@pytest.mark.parametrize("p", [1.0, 2.0, 3.0, math.inf])
def test_clipping_is_pytorchs(max_norm, p) -> None:
    import torch

    ours, theirs = parameters(), []
    for q in ours:
        t = torch.nn.Parameter(torch.zeros(q.shape, dtype=torch.float64))
        t.grad = None if q.grad is None else torch.tensor(q.grad.numpy().copy())
        theirs.append(t)
    norm = nn.utils.clip_grad_norm_(ours, max_norm, p)
    assert math.isclose(
        norm.item(), torch.nn.utils.clip_grad_norm_(theirs, max_norm, p).item(), rel_tol=1e-13
    )
    for q, t in zip(ours[:-1], theirs):
        assert np.allclose(q.grad.numpy(), t.grad.numpy(), rtol=1e-13, atol=0)
    assert ours[-1].grad is None


@pytest.mark.torch
def test_clipping_values_is_pytorchs() -> None:
    import torch

    ours = parameters()
    theirs = [torch.nn.Parameter(torch.zeros(q.shape, dtype=torch.float64)) for q in ours]
    for q, t in zip(ours[:-1], theirs):
        t.grad = torch.tensor(q.grad.numpy().copy())
    nn.utils.clip_grad_value_(ours, 0.3)
    torch.nn.utils.clip_grad_value_(theirs, 0.3)
    for q, t in zip(ours[:-1], theirs):
        assert np.array_equal(q.grad.numpy(), t.grad.numpy())


def test_the_clipped_norm_is_the_bound() -> None:
    made = parameters(scale=100.0)
    before = nn.utils.clip_grad_norm_(made, 1.0)
    assert before.item() > 100
    after = nn.utils.get_total_norm(p.grad for p in made[:-1])
    assert math.isclose(after.item(), 1.0, rel_tol=1e-7)


def test_small_gradients_stay_bit_for_bit() -> None:
    made = parameters(scale=1e-3)
    nn.utils.clip_grad_norm_(made, 1.0)
    for p, g in zip(made, arrays(scale=1e-3)):
        assert np.array_equal(p.grad.numpy(), g)


def test_the_pieces_make_the_whole() -> None:
    whole, pieces = parameters(), parameters()
    norm = nn.utils.clip_grad_norm_(whole, 0.7)
    same = nn.utils.get_total_norm([p.grad for p in pieces if p.grad is not None])
    nn.utils.clip_grads_with_norm_(pieces, 0.7, same)
    assert norm.item() == same.item()
    for a, b in zip(whole[:-1], pieces):
        assert np.array_equal(a.grad.numpy(), b.grad.numpy())


def test_one_tensor_is_a_list_of_one() -> None:
    p = parameters()[0]
    expected = np.linalg.norm(p.grad.numpy())
    assert math.isclose(nn.utils.get_total_norm(p.grad).item(), expected)
    assert math.isclose(nn.utils.clip_grad_norm_(p, 1.0).item(), expected)
    nn.utils.clip_grad_value_(p, 0.01)
    assert np.abs(p.grad.numpy()).max() == 0.01


def test_the_function_of_the_namespace_keeps_its_name() -> None:
    assert gg.clip(gg.tensor([3.0]), 0.0, 1.0).item() == 1.0


def test_nothing_to_clip() -> None:
    assert nn.utils.clip_grad_norm_([], 1.0).item() == 0.0
    assert nn.utils.get_total_norm([]).item() == 0.0
    assert nn.utils.clip_grad_norm_([nn.Parameter(gg.tensor(1.0))], 1.0).item() == 0.0
    empty = gg.tensor(np.zeros((0, 3), np.float32))
    assert total_norm([empty]).item() == 0.0
    assert total_norm([empty], math.inf).item() == 0.0
    assert total_norm([empty, gg.tensor([3.0])], math.inf).item() == 3.0


def test_half_precision_adds_up_in_single() -> None:
    grads = [gg.tensor(np.full(10_000, 100, np.float16)), gg.tensor(np.ones(1, np.float16))]
    norm = total_norm(grads)
    assert norm.dtype == np.float32
    assert math.isclose(norm.item(), math.sqrt(1e8 + 1), rel_tol=1e-6)
    clip_by_norm_(grads, 1000.0)
    assert grads[0].dtype == np.float16
    assert np.allclose(grads[0].numpy(), 10, rtol=1e-3)


def test_mixed_dtypes() -> None:
    grads = [gg.tensor(np.full(4, 3, np.float32)), gg.tensor(np.full(4, 4.0))]
    norm = clip_by_norm_(grads, 1.0)
    assert norm.dtype == np.float64
    assert math.isclose(norm.item(), 10.0, rel_tol=1e-12)
    assert [g.dtype.name for g in grads] == ["float32", "float64"]


@pytest.mark.parametrize("bound", [-1.0, math.nan, "much", None])
def test_bad_bounds(bound) -> None:
    made = parameters()
    for call in (nn.utils.clip_grad_norm_, nn.utils.clip_grad_value_):
        with pytest.raises(ParameterError, match=r"max_norm|clip_value"):
            call(made, bound)
    with pytest.raises(ValueError, match="max_norm"):
        nn.utils.clip_grads_with_norm_(made, bound, gg.tensor(1.0))
    assert np.array_equal(made[0].grad.numpy(), arrays()[0])


@pytest.mark.parametrize("p", [0, -1, math.nan, "two", -math.inf])
def test_bad_norm_types(p) -> None:
    with pytest.raises(ParameterError, match="norm_type"):
        nn.utils.clip_grad_norm_(parameters(), 1.0, p)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nonfinite(value) -> None:
    made = parameters()
    made[1].grad = gg.tensor(np.full(7, value))
    before = made[0].grad.numpy().copy()
    with pytest.raises(nn.utils.NonFiniteGradientError, match="not finite") as caught:
        nn.utils.clip_grad_norm_(made, 1.0, error_if_nonfinite=True)
    assert isinstance(caught.value, GpugradError)
    assert isinstance(caught.value, RuntimeError)
    assert np.array_equal(made[0].grad.numpy(), before)
    norm = total_norm([p.grad for p in made[:-1]])
    assert not math.isfinite(norm.item())
    factor = coefficient(norm, 1.0).item()
    assert math.isnan(factor) if math.isnan(value) else factor == 0.0


def test_nothing_is_read_from_the_device() -> None:
    with counting() as counts:
        made = []
        for g in arrays(np.float32, 10.0):
            p = nn.Parameter(gg.tensor(np.zeros_like(g), device="counting"))
            p.grad = gg.tensor(g, device="counting")
            made.append(p)
        counts.clear()
        norm = nn.utils.clip_grad_norm_(made, 1.0)
        nn.utils.clip_grad_norm_(made, 1.0, math.inf)
        nn.utils.clip_grad_value_(made, 0.1)
        assert counts.host_reads == 0
        assert counts.uploads == 0
        flat = np.concatenate([a.ravel() for a in arrays(np.float32, 10.0)])
        assert math.isclose(norm.item(), np.linalg.norm(flat), rel_tol=1e-6)
        assert counts.host_reads == 1


def test_on_strict_arrays() -> None:
    pytest.importorskip("array_api_strict")
    made = [gg.tensor(g, device="strict:device1") for g in arrays()]
    for p in (1, 2, 3.5, math.inf):
        host = total_norm([gg.tensor(g) for g in arrays()], p)
        norm = total_norm(made, p)
        assert norm.device == "strict:device1"
        assert math.isclose(norm.item(), host.item(), rel_tol=1e-13)
    clip_by_norm_(made, 1.0)
    assert math.isclose(total_norm(made).item(), 1.0, rel_tol=1e-5)
    clip_by_value_(made, 0.05)
    assert total_norm(made, math.inf).item() == 0.05


def test_several_places() -> None:
    pytest.importorskip("array_api_strict")
    with pytest.raises(DeviceError, match="different places"):
        total_norm([gg.tensor([1.0]), gg.tensor([1.0], device="strict:device1")])


def test_a_graph_that_saved_a_gradient_finds_out() -> None:
    g = gg.tensor([3.0, 4.0], requires_grad=True)
    y = gg.sum(g * g)
    clip_by_norm_([g.detach()], 1.0)
    with pytest.raises(InplaceError):
        y.backward()
