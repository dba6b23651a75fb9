"""The norm of gradients whose sums of squares were found out as they were written."""

import threading

import numpy as np
import pytest

import gpugrad as gg
from gpugrad import nn, optim
from gpugrad.backend.memory import squares
from gpugrad.clip import GlobalNorm, Value
from gpugrad.core.tensor import tensor_of
from gpugrad.kernels.cpu import linear, products, weight_gradient
from gpugrad.nn.utils import NonFiniteGradientError, clip_grad_norm_
from gpugrad.optim import arena, flat
from gpugrad.optim.arena import Span

INPUTS, HIDDEN, OUTPUTS, BATCH = 48, 96, 64, 128

#: Bytes of inputs up to which squares are noted here, and rows that are too many for any layer.
LARGEST = BATCH * HIDDEN * 8
MANY = LARGEST // (4 * INPUTS) + 1


@pytest.fixture(autouse=True)
def _small_is_large(monkeypatch):
    """Let nets for tests be worth it."""
    for module, name, value in (
        (arena, "NOTED", 2000), (flat, "NOTED", 2000), (weight_gradient, "LEAST", 2000),
        (weight_gradient, "LARGEST", LARGEST),
        (linear, "GRAIN", 1), (products, "GRAIN", 1),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, value)


@pytest.fixture
def used(monkeypatch):
    """How often a norm was made of what is known."""
    times = []
    plain = Span.known

    def known(self):
        found = plain(self)
        times.extend([found] * (found is not None))
        return found

    monkeypatch.setattr(Span, "known", known)
    return times


class Net(nn.Module):
    """Weights with and without a bias, one that is used twice, and one too small to note."""

    def __init__(self, dtype="float32"):
        super().__init__()
        self.first = nn.Linear(INPUTS, HIDDEN)
        self.shared = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.bare = nn.Linear(HIDDEN, OUTPUTS, bias=False)
        self.last = nn.Linear(OUTPUTS, 3)
        self.to(dtype=dtype)

    def forward(self, x, twice=False):
        x = gg.tanh(self.first(x))
        if twice:
            x = gg.tanh(self.shared(gg.tanh(self.shared(x))))
        return self.last(gg.tanh(self.bare(x)))


def inputs(seed, dtype="float32", rows=BATCH):
    return gg.asarray(np.random.default_rng(seed).standard_normal((rows, INPUTS)).astype(dtype))


def made(dtype="float32", rule=optim.SGD):
    net = Net(dtype)
    optimizer = rule(net.parameters(), lr=1e-3)
    return net, optimizer


def raw(net):
    """Gradients as they are, unseen by the library."""
    leaves = [p._node for p in net.parameters()]
    return [leaf.grad.data for leaf in leaves if leaf.grad is not None]


def norm_of(net):
    return np.sqrt(sum(np.square(g, dtype="float64").sum() for g in raw(net)))


def noted(net):
    return [name for name, p in net.named_parameters() if p._node.squares is not None]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_norm_is_that_of_all_elements(dtype, used, monkeypatch):
    net, optimizer = made(dtype)
    for step in range(3):
        optimizer.zero_grad()
        gg.sum(net(inputs(step, dtype))).backward()
        assert noted(net) == ["first.weight", "bare.weight"]
        before = [p.data.copy() for p in net.parameters()]
        wanted = norm_of(net)
        optimizer.step(clip=1.0)
        assert used
        used.clear()
        np.testing.assert_allclose(optimizer.last_norm.item(), wanted, rtol=1e-6)
        # The same step by the norm that was read.
        after = [p.data.copy() for p in net.parameters()]
        for p, x in zip(net.parameters(), before):
            p.data[...] = x
        with monkeypatch.context() as patch:
            patch.setattr(Span, "known", lambda self: None)
            optimizer.step(clip=1.0)
        for p, x in zip(net.parameters(), after):
            np.testing.assert_allclose(p.data, x, rtol=1e-5, atol=1e-9)


def test_what_is_known_may_be_less_than_the_last_time(used):
    net, optimizer = made()
    for seen in ((), ("first",), (), ("bare",), ("first", "bare"), ()):
        optimizer.zero_grad()
        gg.sum(net(inputs(len(used)), twice=True)).backward()
        for name in seen:
            getattr(net, name).weight.grad.data[...] *= 2
        wanted = norm_of(net)
        optimizer.step(clip=1.0)
        np.testing.assert_allclose(optimizer.last_norm.item(), wanted, rtol=1e-6)
    assert len(used) == 5


def test_what_is_left_may_be_large(used):
    net, optimizer = made()
    gg.sum(net(inputs(0), twice=True)).backward()
    assert noted(net) == ["first.weight", "bare.weight"]
    wanted = norm_of(net)
    optimizer.step(clip=1.0)
    parts = [part.size for _, left in used for part in left]
    assert max(parts) >= HIDDEN * HIDDEN > min(parts)
    np.testing.assert_allclose(optimizer.last_norm.item(), wanted, rtol=1e-6)


def test_little_is_not_worth_copying_much(used):
    net = nn.Sequential(nn.Linear(INPUTS, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 16))
    optimizer = optim.SGD(net.parameters(), lr=1e-3)
    gg.sum(net(inputs(0))).backward()
    assert noted(net) == ["0.weight"]
    wanted = norm_of(net)
    optimizer.step(clip=1.0)
    assert not used
    np.testing.assert_allclose(optimizer.last_norm.item(), wanted, rtol=1e-6)


def _look(p):
    return p.grad.data


def _picture(p):
    (leaf,) = [node for node in gg.graph(gg.sum(p)).nodes if node.kind == "leaf"]
    return leaf.grad.data


@pytest.mark.parametrize("look", [_look, _picture])
def test_who_has_seen_a_gradient_may_change_it(look):
    net, optimizer = made()
    optimizer.zero_grad()
    gg.sum(net(inputs(0))).backward()
    assert noted(net) == ["first.weight", "bare.weight"]
    look(net.first.weight)[...] *= 3
    assert noted(net) == ["bare.weight"]
    wanted = norm_of(net)
    optimizer.step(clip=1.0)
    np.testing.assert_allclose(optimizer.last_norm.item(), wanted, rtol=1e-6)


def test_a_policy_changes_gradients():
    net, optimizer = made()
    gg.sum(net(inputs(0))).backward()
    assert noted(net)
    optimizer.step(clip=Value(1e-3))
    assert not noted(net)
    wanted = norm_of(net)
    optimizer.step(clip=1.0)
    np.testing.assert_allclose(optimizer.last_norm.item(), wanted, rtol=1e-6)


def test_a_gradient_that_somebody_holds_is_not_written_to():
    net, optimizer = made()
    gg.sum(net(inputs(0))).backward()
    held = net.first.weight.grad
    kept = held.data.copy()
    optimizer.zero_grad()
    gg.sum(net(inputs(1))).backward()
    assert noted(net) == ["bare.weight"]
    np.testing.assert_array_equal(held.data, kept)
    held.data[...] = 7
    wanted = norm_of(net)
    optimizer.step(clip=1.0)
    np.testing.assert_allclose(optimizer.last_norm.item(), wanted, rtol=1e-6)


def test_a_backward_pass_that_fails_leaves_nothing_behind():
    net, optimizer = made()
    x = inputs(0).requires_grad_()

    def refuse(g):
        raise ValueError("no")

    remove = x.register_hook(refuse)
    with pytest.raises(ValueError, match="no"):
        gg.sum(net(x)).backward()
    assert squares
    remove()
    # More rows than kernels that note anything take.
    gg.sum(net(inputs(1, rows=MANY))).backward()
    assert not noted(net)
    wanted = norm_of(net)
    optimizer.step(clip=1.0)
    np.testing.assert_allclose(optimizer.last_norm.item(), wanted, rtol=1e-6)


def test_nothing_is_known_of_what_the_caller_gives():
    net, optimizer = made()
    weight = net.first.weight
    given = weight._node.home.take()
    given[...] = 2
    squares[id(given)] = 1.0
    weight.backward(tensor_of(given))
    optimizer.step(clip=1.0)
    wanted = 2 * np.sqrt(weight.size)
    np.testing.assert_allclose(optimizer.last_norm.item(), wanted, rtol=1e-6)


@pytest.mark.parametrize("nonfinite", ["propagate", "skip", "zero", "raise"])
@pytest.mark.parametrize("where", ["first.weight", "first.bias"])
def test_what_is_not_finite(nonfinite, where):
    net, optimizer = made()
    x = inputs(0)
    if where == "first.weight":
        x.data[3, 5] = np.inf
    gg.sum(net(x) * gg.asarray(np.float32(1))).backward()
    if where == "first.bias":
        net.first.bias.grad.data[7] = np.nan
    before = net.last.weight.data.copy()
    finite = [np.where(np.isfinite(g), g, 0) for g in raw(net)]
    wanted = np.sqrt(sum(np.square(g, dtype="float64").sum() for g in finite))
    if nonfinite == "raise":
        with pytest.raises(NonFiniteGradientError):
            optimizer.step(clip=1.0, nonfinite="raise")
        return
    optimizer.step(clip=1.0, nonfinite=nonfinite)
    assert optimizer.first_nonfinite() is not None
    assert optimizer.skipped.item() == (nonfinite == "skip")
    assert (net.last.weight.data == before).all() == (nonfinite == "skip")
    if nonfinite == "zero":
        np.testing.assert_allclose(optimizer.last_norm.item(), wanted, rtol=1e-6)
    else:
        assert not np.isfinite(optimizer.last_norm.item())


@pytest.mark.parametrize("order", [1, 2, 3, np.inf])
def test_every_norm(order):
    net, optimizer = made()
    gg.sum(net(inputs(0))).backward()
    assert noted(net)
    wanted = np.linalg.norm(np.concatenate([g.ravel() for g in raw(net)]).astype("float64"), order)
    optimizer.step(clip=GlobalNorm(1.0, norm_type=order))
    np.testing.assert_allclose(optimizer.last_norm.item(), wanted, rtol=1e-6)


def test_groups_of_their_own(used):
    net = Net()
    optimizer = optim.AdamW(
        [{"params": net.first.parameters(), "clip": 0.5}, {"params": net.bare.parameters()}]
    )
    gg.sum(net(inputs(0))).backward()
    wanted = np.linalg.norm(net.bare.weight._node.grad.data.astype("float64"))
    optimizer.step(clip=1.0)
    assert len(used) == 2
    np.testing.assert_allclose(optimizer.last_norm.item(), wanted, rtol=1e-6)


def test_two_threads():
    """Each runs a net of its own; what is noted of one is not taken for the other's."""
    wrong = []

    def work(seed):
        net, optimizer = made()
        for step in range(20):
            optimizer.zero_grad()
            gg.sum(net(inputs(seed + step))).backward()
            wanted = norm_of(net)
            optimizer.step(clip=1.0)
            if not np.isclose(optimizer.last_norm.item(), wanted, rtol=1e-6, atol=0):
                wrong.append(step)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (0, 100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


class Fuzz:
    """Things that may happen to the gradients of a net, in any order."""

    def __init__(self, seed):
        self.random = np.random.default_rng(seed)
        self.net, self.optimizer = made(rule=optim.AdamW)
        self.scaler = gg.optim.GradScaler(init_scale=8.0)
        self.held = []

    def loss(self):
        rows = int(self.random.choice([BATCH, BATCH, MANY]))
        twice = self.random.random() < 0.3
        return gg.sum(self.net(inputs(int(self.random.integers(99)), rows=rows), twice=twice))

    def one(self):
        """A parameter that has a gradient."""
        having = [p for p in self.net.parameters() if p._node.grad is not None]
        return having[self.random.integers(len(having))] if having else None

    def backward(self):
        self.loss().backward()

    def backward_twice(self):
        loss = self.loss()
        loss.backward(retain_graph=True)
        loss.backward()

    def scaled(self):
        self.scaler.scale(self.loss()).backward()

    def zero_grad(self):
        self.optimizer.zero_grad(set_to_none=bool(self.random.random() < 0.7))

    def read(self):
        if (p := self.one()) is not None:
            assert p.grad.shape == p.shape

    def hold(self):
        if (p := self.one()) is not None:
            self.held.append(p.grad)

    def let_go(self):
        self.held.clear()

    def change_what_is_held(self):
        for g in self.held:
            g.data[...] *= 1.5

    def change(self):
        if (p := self.one()) is not None:
            p.grad.data[...] *= 2

    def change_in_place(self):
        if (p := self.one()) is not None:
            p.grad *= 0.5

    def assign(self):
        if (p := self.one()) is not None:
            p.grad = tensor_of(np.ones(p.shape, "float32"))

    def clip(self):
        if raw(self.net):
            clip_grad_norm_(self.net.parameters(), 0.1)

    def hook(self):
        p = self.net.bare.weight
        remove = p.register_hook(lambda g: g * 2)
        self.backward()
        remove()

    def freeze(self):
        self.net.first.requires_grad_(False)
        self.backward()
        self.net.first.requires_grad_(True)

    def another_optimizer(self):
        self.optimizer = optim.SGD(self.net.parameters(), lr=1e-4)

    def step(self):
        if not raw(self.net):
            return
        wanted = norm_of(self.net)
        bound = float(self.random.choice([0.1, np.inf]))
        nonfinite = str(self.random.choice(["propagate", "skip", "zero"]))
        self.optimizer.step(clip=bound, nonfinite=nonfinite)
        np.testing.assert_allclose(self.optimizer.last_norm.item(), wanted, rtol=1e-6)

    def policy_step(self):
        if raw(self.net):
            self.optimizer.step(clip=Value(1e-2))


ACTIONS = [
    name for name, what in vars(Fuzz).items()
    if callable(what) and name not in ("__init__", "loss", "one")
]  # fmt: skip
#: What training is made of comes more often.
OFTEN = [9.0 if name in ("backward", "step", "zero_grad") else 1.0 for name in ACTIONS]


def test_whatever_happens_to_gradients(used):
    for seed in range(30):
        fuzz = Fuzz(seed)
        for name in fuzz.random.choice(ACTIONS, size=80, p=np.array(OFTEN) / sum(OFTEN)):
            try:
                getattr(fuzz, name)()
            except AssertionError as error:
                error.add_note(f"seed {seed}, at {name}")
                raise
    assert len(used) > 50
