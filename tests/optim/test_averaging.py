"""Averages of weights: PyTorch's values, in few passes, and nothing looked at on the device."""

import copy
import gc
import math

import numpy as np
import pytest

import gpugrad as gg
from gpugrad import nn, optim
from gpugrad.errors import InplaceError
from gpugrad.optim import averaging
from tests.backend.counting import counting

RNG = np.random.default_rng(0)
X = RNG.standard_normal((40, 16, 5))


def build(library, number):
    """A net of either library; one parameter is a number, and gets no gradient."""
    n = library.nn
    net = n.Sequential(n.Linear(5, 7), n.BatchNorm1d(7), n.Tanh(), n.Linear(7, 2))
    net.scale = n.Parameter(number)
    return net


def torchs_net():
    import torch

    return build(torch, torch.tensor(1.0)).double()


def make(device=None):
    gg.nn.manual_seed(0)
    return build(gg, gg.tensor(1.0)).to("float64").to(device)


def train(net, optimizer, batches, after=lambda: None, tensor=gg.tensor):
    for x in batches:
        optimizer.zero_grad()
        (net(tensor(x)) ** 2).mean().backward()
        optimizer.step()
        after()


def ours(averaged_of, optimizer=True, device=None, steps=30):
    """A net, its optimiser, and its averages after training."""
    net = make(device)
    made = optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    if not optimizer:  # parameters stay outside of buffers
        made = optim.SGD(copy.deepcopy(net).parameters(), lr=0.1, momentum=0.9)
    averaged = averaged_of(net)
    train(
        net, made, X[:steps], lambda: averaged.update_parameters(net),
        lambda x: gg.tensor(x, device=device),
    )  # fmt: skip
    return net, made, averaged


AVERAGES = {
    "default": lambda m: {},
    "mean": lambda m: {"multi_avg_fn": m.get_swa_multi_avg_fn()},
    "mean of one": lambda m: {"avg_fn": m.get_swa_avg_fn()},
    "ema": lambda m: {"multi_avg_fn": m.get_ema_multi_avg_fn(0.9)},
    "short ema": lambda m: {"multi_avg_fn": m.get_ema_multi_avg_fn(0.2)},
    "ema of one": lambda m: {"avg_fn": m.get_ema_avg_fn(0.9)},
    "own": lambda m: {"avg_fn": lambda a, b, n: a + (b - a) / (n + 3)},
}


@pytest.mark.torch
@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("name", AVERAGES)
def test_averages_are_pytorchs(name, use_buffers) -> None:
    import torch
    from torch.optim import swa_utils

    options = {"use_buffers": use_buffers}
    _, _, averaged = ours(
        lambda net: averaging.AveragedModel(net, **AVERAGES[name](averaging), **options)
    )
    theirs = torchs_net()
    start = {k: torch.tensor(v.numpy()) for k, v in make().state_dict().items()}
    theirs.load_state_dict(start)
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9)
    # PyTorch's own mean of lists divides in float32, and cannot take whole numbers.
    same = AVERAGES["default" if name == "mean" else name](swa_utils)
    other = swa_utils.AveragedModel(theirs, **same, **options)
    train(theirs, optimizer, X[:30], lambda: other.update_parameters(theirs), torch.tensor)
    assert set(averaged.state_dict()) == set(other.state_dict())
    assert averaged.n_averaged.item() == 30
    for key, value in other.state_dict().items():
        mine = averaged.state_dict()[key].numpy()
        if mine.dtype.kind == "i":  # fractions are cut off, of numbers that PyTorch has in float32
            assert abs(mine - value.numpy()) <= 1, key
        else:
            np.testing.assert_allclose(mine, value.numpy(), rtol=1e-9, atol=1e-12, err_msg=key)
    x = RNG.standard_normal((9, 5))
    a, b = averaged.eval()(gg.tensor(x)), other.eval()(torch.tensor(x))
    np.testing.assert_allclose(a.detach().numpy(), b.detach().numpy(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_first_update_copies_exactly(dtype) -> None:
    for decay in (0.0, 0.5, 0.999, 1.0):
        net = nn.Linear(40, 30).to(dtype)
        averaged = optim.AveragedModel(net, multi_avg_fn=optim.get_ema_multi_avg_fn(decay))
        with gg.no_grad():
            for p in averaged.module.parameters():
                p[...] = math.nan  # nothing of it may stay
        for _ in range(5):  # and what does not change stays as it is
            averaged.update_parameters(net)
            for a, b in zip(averaged.parameters(), net.parameters()):
                assert np.array_equal(a.detach().numpy(), b.detach().numpy())


@pytest.mark.parametrize("name", AVERAGES)
def test_nothing_is_read_from_the_device(name) -> None:
    host = ours(lambda net: optim.AveragedModel(net, **AVERAGES[name](averaging)))[2]
    with counting() as counts:
        _, _, there = ours(
            lambda net: optim.AveragedModel(net, **AVERAGES[name](averaging)), device="counting"
        )
        assert counts.host_reads == 0
        assert there.n_averaged.device == "counting"
        for a, b in zip(host.parameters(), there.parameters()):
            np.testing.assert_allclose(a.detach().numpy(), b.detach().cpu().numpy(), rtol=1e-12)


@pytest.mark.parametrize("name", ["default", "ema", "own"])
def test_on_arrays_without_buffers(name) -> None:
    pytest.importorskip("array_api_strict")
    host = ours(lambda net: optim.AveragedModel(net, **AVERAGES[name](averaging)), steps=4)[2]
    there = ours(
        lambda net: optim.AveragedModel(net, **AVERAGES[name](averaging)),
        device="strict:device1", steps=4,
    )[2]  # fmt: skip
    for a, b in zip(host.parameters(), there.parameters()):
        assert b.device == "strict:device1"
        np.testing.assert_allclose(a.detach().numpy(), b.detach().cpu().numpy(), rtol=1e-12)


# -- passes ---------------------------------------------------------------------------------------


def passes(averaged, net, monkeypatch):
    """How many elements each call of the update ran over."""
    seen = []
    kept = averaging.flat_update

    def counted(m, p, g, **options):
        seen.append(p.size)
        return kept(m, p, g, **options)

    monkeypatch.setattr(averaging, "flat_update", counted)
    averaged.update_parameters(net)
    monkeypatch.undo()
    return seen


def test_one_pass_where_an_optimiser_holds_the_parameters(monkeypatch) -> None:
    net, optimizer, averaged = ours(optim.AveragedModel)
    (arena,) = optimizer._arenas[0]
    assert passes(averaged, net, monkeypatch) == [arena.size]
    # The buffer of the averages has no gradients beside it.
    ((own, _),) = averaged._layout._flat
    assert own.g is None
    for a, b in zip(own.places, arena.places):
        assert (a.start, a.shape) == (b.start, b.shape)


def test_one_pass_for_each_group(monkeypatch) -> None:
    net = make()
    groups = [
        {"params": net[0].parameters()},
        {"params": [*net[1].parameters(), *net[3].parameters(), net.scale]},
    ]
    optimizer = optim.AdamW(groups)
    averaged = optim.AveragedModel(net)
    assert len(passes(averaged, net, monkeypatch)) == 2
    train(net, optimizer, X[:2])
    assert len(passes(averaged, net, monkeypatch)) == 2


def test_parameters_on_their_own(monkeypatch) -> None:
    net = make()
    averaged = optim.AveragedModel(net)
    sizes = [p.size for p in net.parameters()]
    assert passes(averaged, net, monkeypatch) == sizes
    other = nn.Parameter(gg.tensor([1.0]))
    optimizer = optim.SGD([*net.parameters(), other], lr=0.1)
    assert passes(averaged, net, monkeypatch) == sizes, "the buffer holds somebody else, too"
    del optimizer


def test_parameters_that_move(monkeypatch) -> None:
    """Into buffers, to new ones, to another dtype: averages go on as if nothing had been."""

    def run(moves):
        net = make()
        averaged = optim.AveragedModel(net, multi_avg_fn=optim.get_ema_multi_avg_fn(0.8))
        optimizer = None
        for step, x in enumerate(X[:12]):
            if moves and step in (3, 6):
                optimizer = optim.SGD(net.parameters(), lr=0.0)
            if moves and step == 9:
                optimizer.add_param_group({"params": [nn.Parameter(gg.tensor(1.0))]})
                held = next(averaged.module.parameters()).data  # looked at from outside
                optimizer.step()
            with gg.no_grad():
                for p in net.parameters():
                    p[...] = p * 0.9 + float(x[0, 0])
            averaged.update_parameters(net)
        if moves:
            assert np.array_equal(held, next(averaged.module.parameters()).detach().numpy())
        return [p.detach().numpy().copy() for p in averaged.parameters()]

    for a, b in zip(run(False), run(True)):
        assert np.array_equal(a, b)


def test_narrow_parameters_have_wide_averages() -> None:
    net = nn.Linear(3, 2).to("float16")
    averaged = optim.AveragedModel(net, multi_avg_fn=optim.get_ema_multi_avg_fn(0.999))
    averaged.module.to("float32")
    optimizer = optim.SGD(net.parameters(), lr=0.0)
    with gg.no_grad():
        net.weight[...] = 0.0
        averaged.update_parameters(net)
        net.weight[...] = 1.0
        for _ in range(10):
            averaged.update_parameters(net)
    assert averaged.module.weight.dtype == np.float32
    got = averaged.module.weight.detach().numpy()
    np.testing.assert_allclose(got, 1 - 0.999**10, rtol=1e-5)
    del optimizer


def test_averages_elsewhere() -> None:
    pytest.importorskip("array_api_strict")
    net = make()
    averaged = optim.AveragedModel(net, device="strict:device1")
    optimizer = optim.SGD(net.parameters(), lr=0.1)
    train(net, optimizer, X[:5], lambda: averaged.update_parameters(net))
    assert all(p.device == "strict:device1" for p in averaged.parameters())
    with averaged.applied_to(net):
        assert all(p.device == "cpu" for p in net.parameters())
        net(gg.tensor(X[0]))


# -- lending --------------------------------------------------------------------------------------


def test_a_net_computes_with_the_averages_for_a_while() -> None:
    net, optimizer, averaged = ours(optim.AveragedModel)
    net.eval()
    averaged.eval()
    x = gg.tensor(X[0])
    before = net(x).detach().numpy().copy()
    arrays = [p.data for p in net.parameters()]
    with averaged.applied_to(net) as lent:
        assert lent is net
        inside = net(x).detach().numpy()
        with pytest.raises(optim.OptimizerError, match="leave the with-block"):
            averaged.update_parameters(net)
        with pytest.raises(optim.OptimizerError, match="already"), averaged.applied_to(net):
            pass
    assert np.array_equal(inside, averaged(x).detach().numpy())
    assert not np.array_equal(inside, before)
    assert np.array_equal(net(x).detach().numpy(), before)
    assert all(p.data is a for p, a in zip(net.parameters(), arrays))
    with pytest.raises(ZeroDivisionError), averaged.applied_to(net):
        1 / 0  # noqa: B018
    assert all(p.data is a for p, a in zip(net.parameters(), arrays))
    plan = optimizer._plan
    net.train()
    train(net, optimizer, X[:1], lambda: averaged.update_parameters(net))
    assert optimizer._plan is plan, "the optimiser has not noticed"


def test_training_goes_on_exactly_after_lending() -> None:
    def run(lends):
        net = make()
        optimizer = optim.AdamW(net.parameters())
        averaged = optim.AveragedModel(net)

        def after():
            averaged.update_parameters(net)
            if lends:
                with averaged.applied_to(net.eval()):
                    net(gg.tensor(X[0]))
                net.train()

        train(net, optimizer, X[:6], after)
        return [x.detach().numpy() for x in (*net.parameters(), *averaged.parameters())]

    for a, b in zip(run(False), run(True)):
        assert np.array_equal(a, b)


def test_a_graph_of_old_averages_is_found_out() -> None:
    for optimizer in (True, False):
        net, made, averaged = ours(optim.AveragedModel, optimizer)
        y = averaged(gg.tensor(X[0], requires_grad=True)).sum()
        averaged.update_parameters(net)
        with pytest.raises(InplaceError, match="changed in place"):
            y.backward()
        del made


# -- state ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["default", "ema"])
def test_a_loaded_state_goes_on_exactly(name) -> None:
    def start():
        net = make()
        optimizer = optim.SGD(net.parameters(), lr=0.1)
        return net, optimizer, optim.AveragedModel(net, **AVERAGES[name](averaging))

    net, optimizer, whole = start()
    train(net, optimizer, X[:4], lambda: whole.update_parameters(net))
    net2, optimizer2, rest = start()
    rest.update_parameters(net2)
    net2.load_state_dict({k: v.numpy() for k, v in net.state_dict().items()})
    rest.load_state_dict({k: v.numpy() for k, v in whole.state_dict().items()})
    assert rest.n_averaged.item() == 4
    train(net, optimizer, X[4:9], lambda: whole.update_parameters(net))
    train(net2, optimizer2, X[4:9], lambda: rest.update_parameters(net2))
    for a, b in zip(whole.state_dict().values(), rest.state_dict().values()):
        assert np.array_equal(a.numpy(), b.numpy())


def test_a_copy_goes_its_own_way() -> None:
    net, _, averaged = ours(optim.AveragedModel)
    twin = copy.deepcopy(averaged)
    before = next(averaged.module.parameters()).detach().numpy().copy()
    with gg.no_grad():
        net[0].weight[...] = 100.0
    twin.update_parameters(net)
    assert np.array_equal(next(averaged.module.parameters()).detach().numpy(), before)
    assert twin.n_averaged.item() == averaged.n_averaged.item() + 1


# -- functions by hand ----------------------------------------------------------------------------


@pytest.mark.torch
@pytest.mark.parametrize("n", [1, 5])
def test_functions_by_hand_are_pytorchs(n: int) -> None:
    import torch
    from torch.optim import swa_utils

    a, b = RNG.standard_normal((2, 4))
    for name, args in (("get_ema_avg_fn", (0.7,)), ("get_swa_avg_fn", ())):
        mine = getattr(optim, name)(*args)(gg.tensor(a), gg.tensor(b), n)
        theirs = getattr(swa_utils, name)(*args)(torch.tensor(a), torch.tensor(b), n)
        np.testing.assert_allclose(mine.numpy(), theirs.numpy(), rtol=1e-12)
    for name, args in (("get_ema_multi_avg_fn", (0.7,)), ("get_swa_multi_avg_fn", ())):
        mine, theirs = [gg.tensor(a)], [torch.tensor(a)]
        getattr(optim, name)(*args)(mine, [gg.tensor(b)], gg.tensor(n))
        getattr(swa_utils, name)(*args)(theirs, [torch.tensor(b)], n)
        np.testing.assert_allclose(mine[0].numpy(), theirs[0].numpy(), rtol=1e-12)


@pytest.mark.torch
def test_update_bn_is_pytorchs() -> None:
    import torch
    from torch.optim import swa_utils

    net, theirs = make(), torchs_net()
    theirs.load_state_dict({k: torch.tensor(v.numpy()) for k, v in net.state_dict().items()})
    net.eval()
    optim.update_bn([gg.tensor(x) for x in X[:6]], net)
    assert not net.training
    assert not net[1].training
    assert net[1].momentum == 0.1
    swa_utils.update_bn([torch.tensor(x) for x in X[:6]], theirs)
    for key, value in theirs.state_dict().items():
        np.testing.assert_allclose(net.state_dict()[key].numpy(), value.numpy(), rtol=1e-9)
    optim.update_bn([(gg.tensor(X[0]), 1)], net, device="cpu")
    assert net[1].num_batches_tracked.item() == 1
    optim.update_bn([], nn.Linear(2, 2))


def test_an_optimiser_that_is_gone() -> None:
    net = nn.Linear(3, 2)
    optimizer = optim.SGD(net.parameters(), lr=0.1)
    average = optim.AveragedModel(net)
    average.update_parameters(net)
    del optimizer
    gc.collect()
    with gg.no_grad():
        net.weight.data *= 3.0
    average.update_parameters(net)
    want = net.weight.detach().numpy() * (1 + 1 / 3) / 2
    np.testing.assert_allclose(average.module.weight.detach().numpy(), want, rtol=1e-6)


# -- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: optim.get_ema_multi_avg_fn(1.5), "decay is 1.5; it must be from 0 to 1"),
        (lambda: optim.get_ema_avg_fn(-0.1), "decay is -0.1"),
        (lambda: optim.get_ema_avg_fn(math.nan), "decay is nan"),
        (lambda: optim.AveragedModel(nn.Identity()), "Identity has no parameters"),
        (lambda: optim.AveragedModel(nn.Linear(2, 2), avg_fn=max, multi_avg_fn=max), "not both"),
        (lambda: optim.AveragedModel(nn.Linear(2, 2)).update_parameters(nn.Linear(3, 2)),
         "weight is (2, 3), here (2, 2)"),
        (lambda: optim.AveragedModel(nn.Linear(2, 2)).update_parameters(
            nn.Linear(2, 2, bias=False)), "bias is missing, here (2,)"),
    ],
)  # fmt: skip
def test_refusals(make, words) -> None:
    with pytest.raises(optim.OptimizerError) as caught:
        make()
    assert words in str(caught.value)
