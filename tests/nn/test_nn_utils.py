"""`nn.utils`: PyTorch's signatures and results."""

import inspect
import math

import ml_dtypes
import numpy as np
import pytest

import gpugrad as gg
from gpugrad import nn
from gpugrad.errors import DeviceError, DTypeError, InplaceError, ParameterError, ShapeError
from gpugrad.nn import utils
from tests.backend.counting import counting

SHAPES = [(3, 4), (7,), (), (0, 2), (2, 1, 5)]
ORDERS = [0.5, 1, 2, 2.0, 3, math.inf, "inf"]


def values(seed=0, scale=1.0):
    rng = np.random.default_rng(seed)
    return [np.asarray(scale * rng.standard_normal(s)) for s in SHAPES]


def pair(arrays, dtypes):
    """Parameters with gradients, ours and PyTorch's; the last has none."""
    import torch

    ours, theirs = [], []
    for i, g in enumerate(arrays):
        dtype = dtypes[i % len(dtypes)]
        g = np.array(g, dtype)
        p = nn.Parameter(gg.tensor(np.zeros_like(g)))
        q = torch.nn.Parameter(torch.from_numpy(np.zeros_like(g)))
        p.grad, q.grad = gg.tensor(g), torch.from_numpy(g.copy())
        ours.append(p)
        theirs.append(q)
    return [*ours, nn.Parameter(gg.tensor(1.0))], [*theirs, torch.nn.Parameter(torch.ones(()))]


def same(ours, theirs, tolerance):
    for p, q in zip(ours, theirs):
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None:
            assert str(q.grad.dtype) == f"torch.{p.grad.dtype}"
            mine, other = p.grad.numpy(), q.grad.double().numpy()
            assert np.allclose(mine, other, rtol=tolerance, atol=0, equal_nan=True)


TOLERANCE = {("float64",): 1e-13, ("float32",): 2e-6, ("float32", "float64"): 2e-6}


@pytest.mark.torch
def test_signatures_are_pytorchs() -> None:
    import torch

    for name in utils.__all__:
        # One is elsewhere in PyTorch, and one is not there at all.
        if inspect.isclass(getattr(utils, name)) or name in ("checkpoint", "truncated"):
            continue
        ours = inspect.signature(getattr(utils, name)).parameters.values()
        theirs = inspect.signature(getattr(torch.nn.utils, name)).parameters.values()
        assert [(p.name, p.default, p.kind) for p in ours] == [
            (p.name, p.default, p.kind) for p in theirs
        ], name


@pytest.mark.torch
@pytest.mark.parametrize("foreach", [None, True, False])
@pytest.mark.parametrize("dtypes", TOLERANCE)
@pytest.mark.parametrize("order", ORDERS)
def test_total_norm(order, dtypes, foreach) -> None:
    import torch

    # PyTorch takes no greatest magnitude of an empty tensor.
    arrays = [a for a in values() if a.size or float(order) != math.inf]
    ours, theirs = pair(arrays, dtypes)
    grads = [p.grad for p in ours[:-1]]
    norm = utils.get_total_norm(grads, order, foreach=foreach)
    other = torch.nn.utils.get_total_norm([q.grad for q in theirs[:-1]], order, foreach=foreach)
    assert str(other.dtype) == f"torch.{norm.dtype}"
    assert norm.shape == tuple(other.shape) == ()
    assert math.isclose(norm.item(), other.item(), rel_tol=TOLERANCE[dtypes])
    assert utils.get_total_norm(grads[0], order).item() == pytest.approx(
        torch.nn.utils.get_total_norm(theirs[0].grad, order).item(), rel=1e-5
    )


@pytest.mark.torch
@pytest.mark.parametrize("max_norm", [0, 0.5, 4.0, 1e9, math.inf])
@pytest.mark.parametrize("dtypes", TOLERANCE)
@pytest.mark.parametrize("order", [0.5, 1, 2, 3, math.inf])
def test_clipping_by_norm(order, dtypes, max_norm) -> None:
    import torch

    arrays = [a for a in values(scale=3.0) if a.size]
    ours, theirs = pair(arrays, dtypes)
    norm = utils.clip_grad_norm_(ours, max_norm, order)
    other = torch.nn.utils.clip_grad_norm_(theirs, max_norm, order)
    assert math.isclose(norm.item(), other.item(), rel_tol=TOLERANCE[dtypes])
    same(ours, theirs, TOLERANCE[dtypes])


@pytest.mark.torch
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("order", [1, 2, 3, math.inf])
def test_what_is_not_finite(order, bad) -> None:
    import torch

    arrays = [a for a in values() if a.size]
    arrays[1][3] = bad
    ours, theirs = pair(arrays, ["float64"])
    norm = utils.clip_grad_norm_(ours, 1.0, order)
    other = torch.nn.utils.clip_grad_norm_(theirs, 1.0, order)
    assert np.array_equal(norm.item(), other.item(), equal_nan=True)
    same(ours, theirs, 1e-13)


@pytest.mark.torch
@pytest.mark.parametrize("bound", [0, 0.3, 10.0, math.inf])
def test_clipping_by_value(bound) -> None:
    import torch

    arrays = values()
    arrays[1][:3] = math.nan, math.inf, -math.inf
    for foreach in (None, False, True):
        ours, theirs = pair(arrays, ["float32", "float64"])
        utils.clip_grad_value_(ours, bound, foreach)
        torch.nn.utils.clip_grad_value_(theirs, bound, foreach)
        same(ours, theirs, 0.0)


@pytest.mark.torch
def test_clipping_with_a_norm() -> None:
    import torch

    for norm in (0.0, 0.5, 20.0, math.inf, math.nan):
        ours, theirs = pair(values(), ["float64"])
        utils.clip_grads_with_norm_(ours, 2.0, gg.tensor(norm))
        torch.nn.utils.clip_grads_with_norm_(theirs, 2.0, torch.tensor(norm, dtype=torch.float64))
        same(ours, theirs, 1e-13)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("clip", [utils.clip_grad_norm_, utils.get_total_norm])
def test_error_if_nonfinite(clip, value) -> None:
    p = nn.Parameter(gg.zeros(2))
    p.grad = gg.tensor([value, 1.0])
    first = p.grad if clip is utils.get_total_norm else p
    others = {} if clip is utils.get_total_norm else {"max_norm": 1.0}
    with pytest.raises(utils.NonFiniteGradientError, match=r"norm of order 2\.0 is (nan|inf)"):
        clip(first, error_if_nonfinite=True, **others)
    assert p.grad.tolist()[1] == 1.0, "nothing was changed"
    clip(first, **others)


def test_half_precision_norms_are_float32() -> None:
    """PyTorch returns them as half, where one of 300s in 50 × 50 would be infinite."""
    for dtype in ("float16", ml_dtypes.bfloat16):
        p = nn.Parameter(gg.tensor(np.zeros((300, 300), dtype)))
        p.grad = gg.tensor(np.full((300, 300), 300, dtype))
        norm = utils.clip_grad_norm_([p], 90.0)
        assert norm.dtype == np.float32
        assert math.isclose(norm.item(), 90_000, rel_tol=1e-2)
        assert p.grad.dtype == dtype
        assert np.allclose(p.grad.numpy().astype(float), 0.3, rtol=1e-2)


def test_nothing_to_clip() -> None:
    for nothing in ([], [nn.Parameter(gg.tensor(1.0))]):
        assert utils.clip_grad_norm_(nothing, 1.0).item() == 0.0
        utils.clip_grad_value_(nothing, 1.0)
        utils.clip_grads_with_norm_(nothing, 1.0, gg.tensor(3.0))


def test_an_exhausted_generator_is_told() -> None:
    parameters = nn.Linear(2, 2).parameters()
    assert len(list(parameters)) == 2
    with pytest.warns(UserWarning, match=r"generator of parameters is exhausted"):
        utils.clip_grad_norm_(parameters, 1.0)


@pytest.mark.parametrize("bound", [-1.0, math.nan, "much", None])
def test_bad_bounds(bound) -> None:
    p = nn.Parameter(gg.zeros(2))
    for call in (
        lambda: utils.clip_grad_norm_(p, bound),
        lambda: utils.clip_grad_value_(p, bound),
        lambda: utils.clip_grads_with_norm_(p, bound, gg.tensor(1.0)),
    ):
        with pytest.raises(ParameterError, match=r"max_norm|clip_value"):
            call()


def test_graphs_that_saved_a_gradient_find_out() -> None:
    p = nn.Parameter(gg.tensor([3.0, 4.0]))
    for clip in (lambda: utils.clip_grad_norm_(p, 1.0), lambda: utils.clip_grad_value_(p, 1.0)):
        p.grad = gg.tensor([3.0, 4.0])
        scale = gg.tensor([1.0, 2.0], requires_grad=True)
        y = gg.sum(scale * p.grad)
        clip()
        with pytest.raises(InplaceError):
            y.backward()


def test_nothing_is_read_from_the_device() -> None:
    with counting() as counts:
        p = nn.Parameter(gg.tensor(np.zeros((3, 4), np.float32), device="counting"))
        p.grad = gg.tensor(np.ones((3, 4), np.float32), device="counting")
        counts.clear()
        for order in (0.5, 1, 2, 3, math.inf):
            utils.clip_grad_norm_([p], 1.0, order)
        utils.clip_grads_with_norm_([p], 1.0, utils.get_total_norm([p.grad]))
        utils.clip_grad_value_([p], 0.1)
        utils.vector_to_parameters(utils.parameters_to_vector([p]).detach(), [p])
        assert (counts.host_reads, counts.uploads) == (0, 0)


# -- parameters as a vector ------------------------------------------------------------------------


@pytest.mark.torch
def test_vectors_are_pytorchs() -> None:
    import torch

    ours = [nn.Parameter(gg.tensor(a)) for a in values()]
    theirs = [torch.nn.Parameter(torch.tensor(a)) for a in values()]
    vector = utils.parameters_to_vector(ours)
    other = torch.nn.utils.parameters_to_vector(theirs)
    assert np.array_equal(vector.detach().numpy(), other.detach().numpy())
    assert vector.requires_grad == other.requires_grad
    new = np.arange(vector.size, dtype=np.float64)
    utils.vector_to_parameters(gg.tensor(new), ours)
    torch.nn.utils.vector_to_parameters(torch.tensor(new), theirs)
    for p, q in zip(ours, theirs):
        assert p.shape == tuple(q.shape)
        assert np.array_equal(p.detach().numpy(), q.detach().numpy())


def test_gradients_flow_through_the_vector() -> None:
    net = nn.Linear(3, 2)
    vector = utils.parameters_to_vector(net.parameters())
    (vector * gg.asarray(np.arange(8.0))).sum().backward()
    assert net.weight.grad.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert net.bias.grad.tolist() == [6, 7]


def test_parameters_keep_their_memory_and_dtype() -> None:
    p, q = nn.Parameter(gg.zeros(2, dtype="float32")), nn.Parameter(gg.zeros((1, 1)))
    held = p.data, q.data
    utils.vector_to_parameters(gg.tensor([1.0, 2.0, 3.0], requires_grad=True), iter([p, q]))
    assert p.data is held[0]
    assert q.data is held[1]
    assert p.dtype == np.float32
    assert p.tolist() == [1, 2]
    assert q.tolist() == [[3]]
    assert p.is_leaf and p.requires_grad


def test_a_graph_that_saved_a_parameter_finds_out() -> None:
    p = nn.Parameter(gg.ones(2))
    y = gg.sum(p * p)
    utils.vector_to_parameters(gg.zeros(2), [p])
    with pytest.raises(InplaceError):
        y.backward()


def test_vectors_that_do_not_fit() -> None:
    p, q = nn.Parameter(gg.ones(2)), nn.Parameter(gg.ones((2, 2)))
    for shape in ((5,), (7,), (2, 3), ()):
        with pytest.raises(ShapeError, match=r"6 elements together; it must have shape \(6,\)"):
            utils.vector_to_parameters(gg.zeros(shape), [p, q])
    assert p.tolist() == [1, 1], "nothing was changed"
    data: object = np.zeros(6)
    with pytest.raises(DTypeError, match="vec is a tensor, not ndarray"):
        utils.vector_to_parameters(data, [p, q])
    with pytest.raises(ShapeError, match="there are no parameters"):
        utils.parameters_to_vector([])
    utils.vector_to_parameters(gg.zeros(0), [])


def test_vectors_of_several_places() -> None:
    pytest.importorskip("array_api_strict")
    mixed = [gg.ones(2), gg.ones(2, device="strict:device1")]
    with pytest.raises(DeviceError, match=r"cpu and on strict:device1.*\.to\(device\)"):
        utils.parameters_to_vector(mixed)
    with pytest.raises(DeviceError, match="vector_to_parameters"):
        utils.vector_to_parameters(gg.zeros(4), mixed)
    utils.vector_to_parameters(gg.zeros(2), mixed[1:])
    assert mixed[1].tolist() == [0, 0]
