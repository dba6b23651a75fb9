"""Compiled functions: programs that do what the function does, and functions that cannot be one."""

from __future__ import annotations

import gc
import textwrap
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import gpugrad as gg
from gpugrad import nn, optim
from gpugrad.errors import CompileError, FreedGraphError, GraphError, InplaceError
from gpugrad.nn import functional as F
from tests.backend.counting import counting


def leaf(*values, dtype="float64"):
    return gg.tensor(np.array(values, dtype), requires_grad=True)


def random(*shape, seed=0):
    return gg.tensor(np.random.default_rng(seed).standard_normal(shape).astype("float32"))


def is_program(compiled) -> bool:
    return compiled.text.startswith("def forward(")


# -- what a program looks like ---------------------------------------------------------------------


def test_a_program_reads_like_the_chain_rule() -> None:
    w = leaf(2.0, 3.0)
    loss_of = gg.compile(lambda x: gg.sum(gg.tanh(x * w)))
    for _ in range(2):
        loss_of(gg.tensor([0.5, 1.0]))
    assert loss_of.text == textwrap.dedent(
        """\
        def forward(x0):
            w0 = tensor_w0.data
            t0 = multiply(x0, w0)
            t1 = tanh(t0)
            del t0
            t2 = sum(t1, axis=None, dtype=None, keepdims=False)
            t2 = normalise(t2, kind)
            return [t2], [t1, x0]

        def backward(g, kept, ends):
            t1, x0 = kept
            kept.clear()
            p0, = ends
            g_t2 = g
            g_t1 = sum_vjp0(g_t2, m, (2,), c1, None, None, False)
            del g_t2
            g_t0 = tanh_vjp0(m, g_t1, t1)
            del g_t1, t1
            g_p0 = multiply_vjp1(g_t0, x0)
            del g_t0, x0
            return (p0, g_p0),"""
    )


def test_text_before_there_is_a_program() -> None:
    compiled = gg.compile(gg.tanh)
    compiled(gg.tensor(1.0))
    with pytest.raises(CompileError, match="tanh has no program yet; call it twice"):
        _ = compiled.text


# -- nets ------------------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.layers = nn.ModuleList(
            [nn.TransformerEncoderLayer(8, 2, 16, 0.1, batch_first=True) for _ in range(2)]
        )

    def forward(self, x):
        y = self.embedding(x)
        for layer in self.layers:
            y = layer(y, is_causal=True)
        return y @ self.embedding.weight.T


class Recurrent(nn.Module):
    def __init__(self, kind) -> None:
        super().__init__()
        self.layer = kind(5, 7, num_layers=2, dropout=0.2)
        self.head = nn.Linear(7, 10)

    def forward(self, x):
        return self.head(self.layer(x)[0][-1])


def images(step):
    return random(6, 3, 8, 8, seed=step)


NETS = {
    "mlp": (
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 32), nn.GELU(), nn.Linear(32, 10)),
        images,
    ),
    "deep": (
        lambda: nn.Sequential(
            nn.Flatten(),
            nn.Linear(192, 16),
            *(m for _ in range(12) for m in (nn.Linear(16, 16), nn.Tanh())),
            nn.Linear(16, 10),
        ),
        images,
    ),
    "cnn": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3, padding="same"), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
            nn.Dropout(0.3), nn.Conv2d(8, 8, 3), nn.GroupNorm(2, 8), nn.SiLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10),
        ),
        images,
    ),
    "batch norm without momentum": (
        lambda: nn.Sequential(nn.Flatten(), nn.BatchNorm1d(192, momentum=None), nn.Linear(192, 10)),
        images,
    ),
    "lstm": (lambda: Recurrent(nn.LSTM), lambda step: random(4, 6, 5, seed=step)),
    "gru": (lambda: Recurrent(nn.GRU), lambda step: random(4, 6, 5, seed=step)),
    "transformer": (
        Tied, lambda step: gg.tensor(np.random.default_rng(step).integers(0, 11, (3, 4))),
    ),
}  # fmt: skip


def train(make, data, compiles, device="cpu", steps=6):
    """Losses, parameters, buffers and gradients of some steps."""
    gg.manual_seed(3)
    net = make().to(device)
    optimizer = optim.AdamW(net.parameters(), lr=1e-2)

    def loss_of(x, target):
        y = net(x)
        return F.cross_entropy(y.reshape((-1, y.shape[-1])), target.reshape(-1))

    function = gg.compile(loss_of) if compiles else loss_of
    losses = []
    for step in range(steps):
        x = data(step).to(device)
        rows = int(np.prod(net(x).shape[:-1]))
        target = gg.tensor(np.random.default_rng(step).integers(0, 10, rows), device=device)
        optimizer.zero_grad()
        loss = function(x, target)
        loss.backward()
        optimizer.step(clip=1.0)
        losses.append(loss.detach())
    if compiles:
        assert is_program(function)
    state = [x.cpu().numpy().copy() for x in net.state_dict().values()]
    grads = [p.grad.cpu().numpy() for p in net.parameters()]
    return [x.cpu().numpy() for x in losses], state, grads


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("device", ["cpu", "strict:device1"])
def test_training_is_the_same_to_the_last_bit(net, device) -> None:
    for a, b in zip(train(*NETS[net], True, device), train(*NETS[net], False, device), strict=True):
        for x, y in zip(a, b, strict=True):
            assert x.dtype == y.dtype
            assert np.array_equal(x, y)


def test_nothing_is_read_from_a_device() -> None:
    for net in ("mlp", "cnn", "lstm", "transformer"):
        make, data = NETS[net]
        with counting() as counts:
            model = make().to("counting")
            loss_of = gg.compile(lambda x, model=model: gg.mean(model(x) ** 2))
            x = data(0).to("counting")
            for _ in range(2):
                loss_of(x).backward()
            assert is_program(loss_of)
            counts.clear()
            loss_of(x).backward()
            assert counts.launches > 5
            assert (counts.host_reads, counts.uploads) == (0, 0)


def test_memory_is_no_more() -> None:
    net = nn.Sequential(*(nn.Linear(256, 256) for _ in range(6)))

    def peak(function):
        x = random(512, 256)
        for _ in range(4):
            function(x).backward()
        gc.collect()
        tracemalloc.start()
        before = tracemalloc.get_traced_memory()[0]
        function(x).backward()
        found = tracemalloc.get_traced_memory()[1] - before
        tracemalloc.stop()
        return found

    def loss_of(x):
        return gg.sum(net(gg.sin(x)) ** 2)

    compiled = gg.compile(loss_of)
    assert peak(compiled) <= 1.02 * peak(loss_of)


# -- kinds of arguments ----------------------------------------------------------------------------


def test_each_shape_dtype_and_value_has_a_program() -> None:
    calls = []

    def function(x, power, *, scale=1.0):
        calls.append(1)
        return x**power * scale

    compiled = gg.compile(function)
    for _ in range(4):
        for x in (gg.tensor([1.0, 2.0]), gg.tensor([3.0]), gg.tensor([3.0], dtype="float32")):
            for power, scale in ((2, 1.0), (3, 1.0), (3, 2.0)):
                assert compiled(x, power, scale=scale).tolist() == (x**power * scale).tolist()
    assert len(calls) == 2 * 9


def test_nested_arguments_and_results() -> None:
    def function(pair, options):
        a, b = pair
        return {"sum": a + b, "rest": (a * options["w"], None, 7)}

    compiled = gg.compile(function)
    for k in range(4):
        a, b, w = (gg.tensor([float(k + i)]) for i in range(3))
        out = compiled((a, b), {"w": w})
        assert out["sum"].tolist() == [2 * k + 1]
        assert out["rest"][0].tolist() == [k * (k + 2)]
        assert out["rest"][1:] == (None, 7)
    assert is_program(compiled)


def test_one_tensor_for_two_arguments_and_then_two() -> None:
    compiled = gg.compile(lambda a, b: a * 2 + b)
    x = gg.tensor([1.0])
    for _ in range(3):
        assert compiled(x, x).item() == 3
    assert compiled(x, gg.tensor([5.0])).item() == 7


def test_an_argument_that_is_also_outside() -> None:
    w = gg.tensor([2.0])
    compiled = gg.compile(lambda x: x * w)
    for _ in range(3):
        assert compiled(w).item() == 4
    assert compiled(gg.tensor([5.0])).item() == 10


def test_gradients_of_arguments_and_several_results() -> None:
    def function(a, b):
        c = a * b
        return c, gg.sin(c), b.detach() + 1

    compiled = gg.compile(function)
    for _ in range(4):
        found = []
        for f in (function, compiled):
            a, b = leaf(1.0, 2.0), leaf(3.0, 4.0)
            c, s, rest = f(a, b)
            assert not rest.requires_grad
            s.sum().backward(retain_graph=True)
            (c * s).sum().backward()
            found.append((a.grad.tolist(), b.grad.tolist(), rest.tolist()))
        assert found[0] == found[1]


def test_part_of_the_results() -> None:
    compiled = gg.compile(lambda a: (a * 2, a * 3))
    for _ in range(3):
        a = leaf(1.0)
        compiled(a)[1].sum().backward()
        assert a.grad.tolist() == [3.0]


def test_inside_of_a_larger_graph() -> None:
    compiled = gg.compile(lambda h: gg.tanh(h * h))
    for _ in range(3):
        x = leaf(0.5, 0.25)
        y = compiled(gg.exp(x))
        (y * 3).sum().backward()
        want = leaf(0.5, 0.25)
        (gg.tanh(gg.exp(want) * gg.exp(want)) * 3).sum().backward()
        assert x.grad.tolist() == want.grad.tolist()


def test_gradient_wanted_or_not() -> None:
    w = leaf(2.0)
    compiled = gg.compile(lambda x: x * w)
    x = gg.tensor([3.0])
    for _ in range(3):
        assert compiled(x).requires_grad
        with gg.no_grad():
            assert not compiled(x).requires_grad
    w.requires_grad_(False)
    for _ in range(3):
        assert not compiled(x).requires_grad
    w.requires_grad_()
    y = compiled(x)
    y.backward()
    assert w.grad.tolist() == [3.0]


def test_training_and_evaluation() -> None:
    gg.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
    compiled = gg.compile(net)
    x = gg.ones((2, 4), dtype="float32")
    for _ in range(3):
        net.train()
        drawn = [compiled(x).detach().numpy() for _ in range(3)]
        assert not np.array_equal(drawn[1], drawn[2])
        net.eval()
        for _ in range(3):
            assert np.array_equal(compiled(x).detach().numpy(), net(x).detach().numpy())
    assert [name for name, _ in compiled.named_parameters()] == ["0.weight", "0.bias"]


def test_random_numbers_are_those_of_the_function() -> None:
    net = nn.Sequential(nn.Dropout(0.5), nn.Dropout(0.5))
    compiled = gg.compile(lambda x: net(x) + F.dropout(x, 0.5))
    x = gg.ones((8, 8), dtype="float32")
    for _ in range(3):
        compiled(x)
    state = gg.nn.random.default_generator.state
    y = compiled(x).numpy()
    after = gg.nn.random.default_generator.state
    gg.nn.random.default_generator.state = state
    assert np.array_equal((net(x) + F.dropout(x, 0.5)).numpy(), y)
    assert gg.nn.random.default_generator.state == after


def test_autocast_is_a_kind() -> None:
    a = random(4, 4)
    compiled = gg.compile(lambda x: x @ x)
    for _ in range(3):
        assert compiled(a).dtype == np.float32
        with gg.autocast("cpu", dtype="float16"):
            assert compiled(a).dtype == np.float16
            assert compiled(a).tolist() == (a @ a).tolist()


def test_values_from_outside_are_those_of_the_call() -> None:
    w = gg.tensor([2.0])
    compiled = gg.compile(lambda x: x * w)
    x = gg.tensor([3.0])
    for _ in range(3):
        compiled(x)
    w[...] = 5.0
    assert compiled(x).item() == 15
    w.data = np.array([7.0])  # another array of the same kind
    assert compiled(x).item() == 21
    w.data = np.array([1.0, 2.0])  # and of another
    for _ in range(3):
        assert compiled(x).tolist() == [3, 6]


def test_constants_made_inside() -> None:
    def function(x):
        mask = gg.arange(3) < 2
        return gg.where(mask, x, gg.zeros(3)), gg.ones(2)

    compiled = gg.compile(function)
    for k in range(5):
        y, ones = compiled(gg.tensor([1.0, 2.0, 3.0]) * k)
        assert y.tolist() == [k, 2 * k, 0]
        assert ones.tolist() == [1, 1]
        ones += 1  # a result is the caller's own


def test_changes_in_place() -> None:
    total = gg.zeros(2)

    def function(x):
        nonlocal total
        total += x
        y = x * 1
        y[0] = 7.0
        return y * total

    compiled = gg.compile(function)
    for k in range(1, 6):
        x = gg.tensor([1.0, 2.0])
        assert compiled(x).tolist() == [7 * k, 4 * k]
        assert total.tolist() == [k, 2 * k]
    assert is_program(compiled)


def test_an_index_that_is_computed() -> None:
    compiled = gg.compile(lambda x, i: x[i] + x[gg.argmax(x)] + x[1:])
    for k in range(4):
        x = gg.tensor(np.roll(np.arange(3.0), k))
        i = gg.tensor([k % 3, (k + 1) % 3])
        assert compiled(x, i).tolist() == (x[i] + x[gg.argmax(x)] + x[1:]).tolist()
    assert is_program(compiled)


def test_a_function_with_a_first_call_of_its_own() -> None:
    kept = {}

    def function(x):
        if "mask" not in kept:
            kept["mask"] = (x > 0).detach()
        return x * kept["mask"]

    compiled = gg.compile(function)
    for _ in range(5):
        assert compiled(gg.tensor([-1.0, 2.0])).tolist() == [0, 2]
    assert is_program(compiled)


# -- the graph -------------------------------------------------------------------------------------


def ready(function, *args):
    compiled = gg.compile(function)
    for _ in range(2):
        compiled(*args)
    assert is_program(compiled)
    return compiled


def test_two_runs_before_the_way_back() -> None:
    w = leaf(2.0)
    compiled = ready(lambda x: gg.sum(gg.sin(x * w)), gg.tensor([1.0]))
    first, second = (compiled(gg.tensor([v])) for v in (1.0, 2.0))
    (first + second).backward()
    assert w.grad.item() == pytest.approx(np.cos(2.0) + 2 * np.cos(4.0))


def test_a_second_way_back() -> None:
    w = leaf(2.0)
    compiled = ready(lambda x: gg.sum(x * w), gg.tensor([1.0]))
    y = compiled(gg.tensor([1.0]))
    y.backward(retain_graph=True)
    y.backward()
    assert w.grad.item() == 2
    with pytest.raises(FreedGraphError, match="program were released"):
        y.backward()


def test_a_saved_value_that_has_changed() -> None:
    w = leaf(2.0)
    compiled = ready(lambda x: gg.sum(x * w), gg.tensor([1.0]))
    x = gg.tensor([3.0])
    y = compiled(x)
    x += 1
    with pytest.raises(InplaceError, match="'x0' of shape"):
        y.backward()


def test_derivatives_of_derivatives_are_refused() -> None:
    compiled = ready(lambda x: gg.sum(x**3), leaf(2.0))
    with pytest.raises(GraphError, match="<lambda> were asked for, which is compiled"):
        compiled(leaf(2.0)).backward(create_graph=True)


def test_under_transforms() -> None:
    compiled = gg.compile(lambda x: gg.sum(x**3))
    for _ in range(3):
        assert gg.grad(compiled)(gg.tensor([2.0])).tolist() == [12]
        assert gg.value_and_grad(compiled)(gg.tensor([2.0]))[0].item() == 8


def test_hooks_of_leaves_and_results() -> None:
    w = leaf(2.0)
    compiled = ready(lambda x: gg.sum(x * w), gg.tensor([1.0]))
    seen = []
    with w.register_hook(lambda g: g * 10):
        y = compiled(gg.tensor([1.0]))
        y.register_hook(lambda g: seen.append(g.item()))
        y.backward()
    assert w.grad.item() == 10
    assert seen == [1]


def test_modules_with_hooks_run_as_they_are() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    compiled = ready(net, gg.ones((1, 2), dtype="float32"))
    seen = []
    x = gg.ones((1, 2), dtype="float32")
    with net[0].register_forward_hook(lambda module, args, out: seen.append(1)):
        for _ in range(4):
            compiled(x)
    compiled(x)
    assert len(seen) == 4


def test_who_watches_sees_every_operation() -> None:
    compiled = ready(lambda x: gg.log(x * 1), gg.tensor([1.0]))
    names = [c.operation for c in gg.explain(compiled)(gg.tensor([1.0])).choices]
    assert names == ["multiply", "log"]
    with pytest.raises(gg.health.AnomalyError, match="log"), gg.health.detect_anomaly():
        compiled(gg.tensor([-1.0]))


def test_two_threads() -> None:
    w = gg.tensor(np.arange(1000.0))
    compiled = gg.compile(lambda x: gg.sum(gg.tanh(x * w)))

    def work(seed):
        found = []
        for k in range(30):
            x = gg.tensor(np.full(1000, seed + k / 30), requires_grad=True)
            compiled(x).backward()
            found.append(x.grad.numpy().sum())
        return found

    alone = [work(seed) for seed in range(4)]
    compiled = gg.compile(compiled.function)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(work, range(4))) == alone
