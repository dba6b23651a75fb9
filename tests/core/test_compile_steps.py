"""Compiled training steps: a backward pass and what changes parameters inside of a program."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest

import gpugrad as gg
from gpugrad import nn, optim
from gpugrad.errors import CompileError, FreedGraphError
from gpugrad.nn import functional as F
from tests.backend.counting import counting
from tests.core.test_compile import NETS, is_program, leaf, random


def train(make, data, compiles, device="cpu", steps=6):
    """Losses, parameters, buffers and gradients of some steps."""
    gg.manual_seed(3)
    net = make().to(device)
    optimizer = optim.AdamW(net.parameters(), lr=1e-2)
    scheduler = optim.lr_scheduler.ExponentialLR(optimizer, 0.9)

    def step(x, target):
        optimizer.zero_grad()
        y = net(x)
        loss = F.cross_entropy(y.reshape((-1, y.shape[-1])), target.reshape(-1))
        loss.backward()
        optimizer.step(clip=0.5)
        scheduler.step()
        return loss.detach(), y

    function = gg.compile(step) if compiles else step
    losses = []
    for number in range(steps):
        x = data(number).to(device)
        rows = int(np.prod(net(x).shape[:-1]))
        target = gg.tensor(np.random.default_rng(number).integers(0, 10, rows), device=device)
        losses += function(x, target)
    if compiles:
        assert is_program(function)
        assert "deposit(" in function.text
        assert "\ndef backward" not in function.text
    state = [x.cpu().numpy().copy() for x in net.state_dict().values()]
    grads = [p.grad.cpu().numpy() for p in net.parameters()]
    norm = optimizer.last_norm.cpu().numpy()
    return [x.detach().cpu().numpy() for x in losses], state, grads, [norm]


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("device", ["cpu", "strict:device1"])
def test_steps_are_the_same_to_the_last_bit(net, device) -> None:
    for a, b in zip(train(*NETS[net], True, device), train(*NETS[net], False, device), strict=True):
        for x, y in zip(a, b, strict=True):
            assert x.dtype == y.dtype
            assert np.array_equal(x, y)


def test_a_step_reads_like_what_was_written() -> None:
    w = leaf(2.0, 3.0)
    optimizer = optim.SGD([w], lr=0.5)

    @gg.compile
    def step(x):
        optimizer.zero_grad()
        loss = gg.sum(x * w)
        loss.backward()
        optimizer.step()
        return loss

    for _ in range(3):
        step(gg.tensor([1.0, -1.0]))
    assert w.tolist() == [0.5, 4.5]
    lines = [line.strip() for line in step.text.splitlines()]
    acts = [x for x in lines if x.split("(")[0] in ("zero_grad", "t1 = sum", "deposit", "step")]
    assert [x.partition("(")[0] for x in acts] == ["zero_grad", "t1 = sum", "deposit", "step"]


def test_no_graph_is_returned() -> None:
    w = leaf(2.0)

    @gg.compile
    def step(x):
        loss = gg.sum(x * w)
        loss.backward()
        return loss

    for i in range(4):
        loss = step(gg.tensor([3.0]))
        if i < 2:
            with pytest.raises(FreedGraphError, match="released by an earlier backward"):
                loss.backward()
        else:
            assert not loss.requires_grad
    assert w.grad.tolist() == [12.0]


def test_gradients_add_up() -> None:
    w = leaf(1.0, 2.0)

    @gg.compile
    def two(x, y):
        gg.sum(x * w).backward()
        gg.sum(gg.sin(w) * y).backward()

    for _ in range(4):
        w.grad = None
        two(gg.tensor([1.0, 2.0]), gg.tensor([0.5, 0.5]))
        assert np.allclose(w.grad.numpy(), [1 + 0.5 * np.cos(1), 2 + 0.5 * np.cos(2)], atol=1e-15)
    before = w.grad.numpy().copy()
    two(gg.tensor([1.0, 2.0]), gg.tensor([0.5, 0.5]))
    assert np.allclose(w.grad.numpy(), 2 * before, atol=1e-15)


def test_a_graph_that_is_used_twice() -> None:
    w = leaf(1.0)

    def twice(retain):
        def function(x):
            y = gg.exp(x * w)
            y.sum().backward(retain_graph=retain)
            (y * y).sum().backward()
            return y

        return function

    found = gg.compile(twice(True))
    for i in range(4):
        w.grad = None
        x = gg.tensor([0.1 * i])
        found(x)
        e = np.exp(0.1 * i)
        assert w.grad.item() == pytest.approx(0.1 * i * (e + 2 * e * e), rel=1e-14)
    assert is_program(found)
    with pytest.raises(FreedGraphError, match="released by an earlier backward"):
        gg.compile(twice(False))(gg.tensor([0.1]))


def test_what_is_only_returned() -> None:
    w, other = leaf(1.0), gg.tensor([7.0])

    @gg.compile
    def step(x):
        gg.sum(x * w).backward()
        return other, w.detach()

    for i in range(4):
        a, b = step(gg.tensor([1.0 + i]))
        assert (a.tolist(), b.tolist()) == ([7.0], [1.0])
    assert is_program(step)


def test_gradients_as_results() -> None:
    def loss(w, x):
        return gg.sum(gg.tanh(x * w))

    found = gg.compile(gg.value_and_grad(loss))
    for i in range(4):
        w, x = gg.tensor([1.0 + i, 2.0]), gg.tensor([0.5, -i])
        value, g = found(w, x)
        expected = gg.value_and_grad(loss)(w, x)
        assert value.item() == expected[0].item()
        assert g.tolist() == expected[1].tolist()
    assert is_program(found)


def test_two_optimisers_take_turns() -> None:
    def made(compiles):
        gg.manual_seed(1)
        maker, judge = nn.Linear(3, 4), nn.Linear(4, 1)
        first = optim.Adam(maker.parameters(), lr=1e-2)
        second = optim.RMSprop(judge.parameters(), lr=1e-2)

        def step(noise, real):
            second.zero_grad()
            fake = maker(noise)
            worth = F.softplus(judge(fake.detach())).mean() + F.softplus(-judge(real)).mean()
            worth.backward()
            second.step(clip=1.0)
            first.zero_grad()
            second.zero_grad()
            loss = F.softplus(-judge(fake)).mean()
            loss.backward()
            first.step(clip=1.0)
            return worth, loss

        function = gg.compile(step) if compiles else step
        found = []
        for i in range(6):
            pair = function(random(8, 3, seed=i), random(8, 4, seed=100 + i))
            found += [x.item() for x in pair]
        assert not compiles or is_program(function)
        return found

    assert made(True) == made(False)


@pytest.mark.parametrize("device", ["cpu", "strict:device1"])
def test_clipping_scaling_and_averages(device) -> None:
    def made(compiles):
        gg.manual_seed(1)
        net = nn.Linear(3, 2).to(device)
        optimizer = optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        scaler = gg.optim.GradScaler(init_scale=8.0, growth_interval=2)
        average = optim.AveragedModel(net)

        def step(x):
            optimizer.zero_grad()
            loss = gg.mean(net(x) ** 2)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            norm = nn.utils.clip_grad_norm_(net.parameters(), 0.1)
            scaler.step(optimizer)
            scaler.update()
            average.update_parameters(net)
            return loss.detach(), norm

        function = gg.compile(step) if compiles else step
        found = []
        for i in range(6):
            found += [x.item() for x in function(random(5, 3, seed=i).to(device))]
        assert not compiles or is_program(function)
        return found, [x.tolist() for x in average.state_dict().values()], scaler.get_scale()

    assert made(True) == made(False)


def test_nothing_is_read_from_a_device() -> None:
    with counting() as counts:
        net = NETS["mlp"][0]().to("counting")
        optimizer = optim.AdamW(net.parameters())

        @gg.compile
        def step(x):
            optimizer.zero_grad()
            gg.mean(net(x) ** 2).backward()
            optimizer.step(clip=1.0)

        x = random(6, 3, 8, 8).to("counting")
        for _ in range(3):
            step(x)
        assert is_program(step)
        counts.clear()
        step(x)
        assert counts.launches > 5
        assert (counts.host_reads, counts.uploads) == (0, 0)


def test_what_a_step_has_computed_is_gone() -> None:
    net = nn.Linear(4, 4)
    seen = []

    @gg.compile
    def step(x):
        y = gg.tanh(net(x))
        seen.append(weakref.ref(y.data))
        y.sum().backward()

    for i in range(2):  # which are watched
        step(random(3, 4, seed=i))
        gc.collect()
    step(random(3, 4, seed=2))
    assert len(seen) == 2
    assert [x() for x in seen] == [None, None]


def test_frozen_parameters_and_other_modes() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5), nn.Linear(3, 1))
    optimizer = optim.SGD(net.parameters(), lr=0.1)

    @gg.compile
    def step(x):
        optimizer.zero_grad()
        loss = net(x).sum()
        loss.backward()
        optimizer.step()
        return loss

    for _ in range(3):
        step(random(2, 3))
    before = net[0].weight.tolist()
    net[0].requires_grad_(False)
    for _ in range(3):
        step(random(2, 3))
    assert net[0].weight.tolist() == before
    net.eval()
    for _ in range(3):
        step(random(2, 3))
    assert net[2].weight.grad is not None


# -- what cannot be one ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x, w: (x * leaf(1.0)).sum().backward(), "keeping gradients in .grad is for other"),
        (lambda x, w: (x * w).sum().backward(create_graph=True), "records its backward pass at"),
        (lambda x, w: gg.grad(lambda v: gg.grad(lambda u: (u * u * v).sum())(w).sum())(x),
         "records its backward pass at"),
    ],
)  # fmt: skip
def test_what_a_program_cannot_do(function, message) -> None:
    w = leaf(2.0)
    compiled = gg.compile(lambda x: function(x, w))

    def call_often():
        for i in range(5):
            compiled(gg.tensor([1.0 + i]))

    with pytest.raises(CompileError, match=message):
        call_often()
