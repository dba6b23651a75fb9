"""Parts of a net that are computed again on the way back instead of being kept."""

import numpy as np
import pytest

import gpugrad as gg
from gpugrad import nn
from gpugrad.errors import GraphError
from gpugrad.nn.utils import checkpoint


def net(seed=0):
    gg.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 3))


def x(seed=0, grad=True):
    return gg.tensor(np.random.default_rng(seed).standard_normal((5, 4)).astype("float32"),
                     requires_grad=grad)  # fmt: skip


def gradients(run):
    part, a = net(), x()
    gg.manual_seed(7)
    y = run(part, a)
    gg.sum(y * y).backward()
    after = gg.default_generator.state
    return [y.detach().numpy(), a.grad.numpy(), *(p.grad.numpy() for p in part.parameters())], after


def test_results_gradients_and_random_numbers_are_the_same():
    want, state = gradients(lambda part, a: part(a))
    got, same = gradients(checkpoint)
    assert state == same
    for a, b in zip(got, want):
        np.testing.assert_array_equal(a, b)


def test_only_the_arguments_are_kept():
    part, a = net(), x()
    whole = gg.graph(part(a)).saved_bytes
    kept = gg.graph(checkpoint(part, a)).saved_bytes
    assert kept == a.data.nbytes < whole


def test_parameters_get_gradients_though_no_argument_wants_one():
    part, a = net(), x(grad=False)
    gg.sum(checkpoint(part, a)).backward()
    assert all(p.grad is not None for p in part.parameters())
    assert a.grad is None


def test_a_chain_of_parts_and_a_use_beside_them():
    def run(wrap):
        gg.manual_seed(1)
        layers = [nn.Linear(4, 4) for _ in range(3)]
        a = x()
        y = a
        for layer in layers:
            y = wrap(lambda v, f=layer: gg.tanh(f(v)) + v, y)
        gg.sum(y * a).backward()
        return [a.grad.numpy(), *(p.grad.numpy() for f in layers for p in f.parameters())]

    for got, want in zip(run(checkpoint), run(lambda f, *args: f(*args))):
        np.testing.assert_allclose(got, want, rtol=1e-6)


def test_several_results_of_which_one_is_used():
    a = x()
    first, _ = checkpoint(lambda v: (v * 2, v * v), a)
    gg.sum(first).backward()
    np.testing.assert_array_equal(a.grad.numpy(), np.full((5, 4), 2, "float32"))


def test_a_graph_that_is_kept_runs_twice():
    a = x()
    y = gg.sum(checkpoint(lambda v: v * v, a))
    y.backward(retain_graph=True)
    y.backward()
    np.testing.assert_allclose(a.grad.numpy(), 4 * a.detach().numpy())
    with pytest.raises(GraphError):
        y.backward()


def test_a_gradient_that_is_recorded_itself():
    value = gg.tensor(3.0)
    third = gg.grad(gg.grad(lambda v: checkpoint(lambda u: u * u * u, v), create_graph=True))
    assert third(value).item() == 18.0


def test_nesting():
    a = x()
    gg.sum(checkpoint(lambda v: checkpoint(lambda u: u * u, v) * v, a)).backward()
    np.testing.assert_allclose(a.grad.numpy(), 3 * a.detach().numpy() ** 2, rtol=1e-6)


def test_autocast_is_the_same_both_times():
    part, a = nn.Linear(4, 3), x()
    seen = []

    def run(v):
        y = part(v)
        seen.append(y.dtype.name)
        return y

    with gg.autocast("cpu"):
        y = checkpoint(run, a)
    gg.sum(y.to("float32")).backward()
    assert seen == ["bfloat16", "bfloat16"]
    assert part.weight.grad.dtype.name == "float32"


def test_without_gradients_it_is_just_a_call():
    with gg.no_grad():
        assert checkpoint(lambda v: v * 2, x()).requires_grad is False


def test_what_it_refuses():
    with pytest.raises(GraphError, match="returns a tensor or a tuple of some, not list"):
        checkpoint(lambda v: [v], x())
    sizes = iter((4, 3))
    y = checkpoint(lambda v: v[:, : next(sizes)], x())
    with pytest.raises(GraphError, match=r"when it was computed again"):
        gg.sum(y).backward()
    with pytest.raises(GraphError, match="no forward mode through checkpoint"):
        gg.jvp(lambda v: checkpoint(lambda u: u * u, v), (gg.tensor(1.0),), (gg.tensor(1.0),))


def test_an_argument_that_changes_in_between_is_noticed():
    a = x()
    b = a * 1.0
    y = checkpoint(lambda v: v * v, b)
    with gg.no_grad():
        b += 1.0
    with pytest.raises(gg.errors.InplaceError, match="checkpoint"):
        gg.sum(y).backward()
