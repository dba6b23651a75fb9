"""Compiled functions: programs that do what the function does, and functions that cannot be one."""

from __future__ import annotations

import collections
import copy
import gc
import pickle
import textwrap
import threading
import tracemalloc
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import gpugrad as gg
from gpugrad import nn, optim
from gpugrad.core import compiling
from gpugrad.errors import CompileError, FreedGraphError, GraphError, InplaceError, OutOfRangeError
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


# -- what cannot be a program ----------------------------------------------------------------------


def call_often(function, *args):
    compiled = gg.compile(function)
    for _ in range(5):
        compiled(*args)


@pytest.mark.parametrize(
    "look",
    [
        lambda y: y.item(), float, bool, print, lambda y: y.detach().numpy(), lambda y: y.tolist(),
        lambda y: [1, 2, 3][y.to("int64")], lambda y: np.asarray(y.detach()),
    ],
)  # fmt: skip
def test_looking_at_values(look) -> None:
    def function(x):
        y = gg.sum(x)
        look(y)
        return y

    with pytest.raises(CompileError, match=r"function looks at .* at test_compile.py:\d+ .*where"):
        call_often(function, leaf(1.0))


def test_a_backward_pass_inside() -> None:
    def function(x):
        (x * 2).sum().backward()
        return x * 1

    with pytest.raises(CompileError, match=r"backward pass at test_compile.py.* call backward on"):
        call_often(function, leaf(1.0))


def test_an_optimiser_inside() -> None:
    w = leaf(1.0)
    w.grad = gg.tensor([1.0])
    optimizer = optim.SGD([w], lr=0.1)

    def function(x):
        y = x * w
        optimizer.step()
        return y

    with pytest.raises(CompileError, match=r"changed in place by other means .* optimisers"):
        call_often(function, gg.tensor([1.0]))


def test_arrays_from_elsewhere() -> None:
    generator = np.random.default_rng(0)

    def function(x):
        return x + gg.tensor(generator.standard_normal(2))

    with pytest.raises(CompileError, match=r"used at test_compile.py:\d+, of shape \(2,\), is"):
        call_often(function, gg.tensor([1.0, 2.0]))


def test_numbers_that_change() -> None:
    count = iter(range(10))
    with pytest.raises(CompileError, match=r"multiply\(x0, 2\).*multiply\(x0, 3\).*an argument"):
        call_often(lambda x: x * next(count), gg.tensor([1.0]))


def test_operations_that_change() -> None:
    count = iter(range(10))

    def function(x):
        for _ in range(next(count)):
            x = x * 2
        return x + 0

    with pytest.raises(CompileError, match="does not do the same in every call"):
        call_often(function, gg.tensor([1.0]))


def test_results_that_change() -> None:
    count = iter(range(10))
    with pytest.raises(CompileError, match=r"returned \[2\], and then \[3\]"):
        call_often(lambda x: (x * 1, next(count)), gg.tensor([1.0]))


def test_a_constant_that_is_changed_in_place() -> None:
    def function(x):
        y = gg.zeros(2)
        y[0] = 3.0
        return x * y

    with pytest.raises(CompileError, match=r"changed in place at test_compile\.py"):
        call_often(function, gg.tensor([1.0, 2.0]))


def test_a_leaf_made_inside() -> None:
    with pytest.raises(CompileError, match="is made anew in each call"):
        call_often(lambda x: x * leaf(1.0), gg.tensor([1.0]))


def test_a_hook_inside() -> None:
    def function(x):
        y = x * 2
        y.register_hook(lambda g: g)
        return y * 1

    with pytest.raises(CompileError, match="has a hook of a tensor in its graph"):
        call_often(function, leaf(1.0))


def test_recomputation_inside() -> None:
    net = nn.Linear(2, 2)
    with pytest.raises(CompileError, match="has checkpoint in its graph"):
        call_often(lambda x: nn.utils.checkpoint(net, x), gg.ones((1, 2), dtype="float32"))


def test_arguments_that_say_nothing() -> None:
    with pytest.raises(CompileError, match=r"got a ndarray; .*gg.asarray makes a tensor"):
        gg.compile(lambda x: x)(np.ones(2))
    with pytest.raises(CompileError, match="int is not callable; give a function or a module"):
        gg.compile(3)


def test_errors_are_those_of_the_function() -> None:
    table = random(4, 2)
    compiled = ready(lambda i: F.embedding(i, table), gg.tensor([1, 2]))
    with pytest.raises(OutOfRangeError, match="embedding") as found:
        compiled(gg.tensor([1, 4]))
    with pytest.raises(OutOfRangeError) as plain:
        F.embedding(gg.tensor([1, 4]), table)
    assert str(found.value) == str(plain.value)
    assert compiled(gg.tensor([3, 0])).tolist() == table[gg.tensor([3, 0])].tolist()


def test_an_error_while_it_is_watched_leaves_all_as_it_was() -> None:
    compiled = gg.compile(lambda x: 1 / 0)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            compiled(gg.tensor([1.0]))
    assert gg.tensor([2.0]).item() == 2
    assert (gg.tensor([2.0]) * 3).tolist() == [6]
    x = leaf(1.0)
    (x * x).sum().backward()
    assert x.grad.tolist() == [2]


def test_compiled_twice_is_compiled_once() -> None:
    compiled = gg.compile(gg.tanh)
    assert gg.compile(compiled) is compiled
    outer = gg.compile(lambda x: compiled(x) * 2)
    for _ in range(4):
        assert outer(gg.tensor(0.0)).item() == 0
    assert "tanh" in outer.text


# -- what is kept ----------------------------------------------------------------------------------


def test_nothing_of_a_call_is_kept() -> None:
    w = leaf(*np.ones(5))
    compiled = gg.compile(lambda x: {"y": gg.sin(gg.exp(x) * w)})
    for shape in ((5,), (2, 5)):  # after one call of a kind, and after some
        for _ in range(1 if shape == (5,) else 4):
            x = gg.tensor(np.ones(shape))
            y = compiled(x)["y"]
            y.sum().backward()
            seen = [weakref.ref(x.data), weakref.ref(y.data), weakref.ref(y)]
            del x, y
            gc.collect()
            assert [there() for there in seen] == [None] * 3


def test_not_more_than_some_kinds_are_known() -> None:
    compiled = gg.compile(lambda x: x * 2)
    for n in range(200):
        compiled(gg.zeros(n))
    assert len(compiled._kinds) == compiling.KINDS


def test_equal_values_that_differ() -> None:
    compiled = gg.compile(lambda x, n: (x * n, n))
    for _ in range(4):
        for n in (1, True, 1.0, 0.0, -0.0, float("nan")):
            y, kept = compiled(gg.tensor([2.0]), n)
            assert (type(kept), repr(kept)) == (type(n), repr(n))
            assert repr(y.item()) == repr((gg.tensor([2.0]) * n).item())
    assert len(compiled._kinds) == 6


# -- whose gradient is whose -----------------------------------------------------------------------


def test_gradients_of_one_tensor_for_two_arguments_and_then_two() -> None:
    def function(a, b):
        return gg.sum(gg.tanh(a) * b * b)

    compiled = gg.compile(function)
    x = leaf(0.3)
    for _ in range(2):
        compiled(x, x).backward()
    found = []
    for f in (function, compiled):
        a, b = leaf(0.3), leaf(0.7)
        f(a, b).backward()
        found.append((a.grad.item(), b.grad.item()))
    assert found[0] == found[1]


def test_gradients_of_an_argument_that_is_also_outside() -> None:
    w = leaf(2.0)
    compiled = gg.compile(lambda x: gg.sum(x * w * w))
    for _ in range(3):
        compiled(w).backward()
    w.grad, a = None, leaf(5.0)
    compiled(a).backward()
    assert (a.grad.item(), w.grad.item()) == (4, 20)


def test_several_results_of_one_operation_as_arguments() -> None:
    head = gg.compile(lambda a, b: gg.sum(a**2 * b))
    for k in range(4):
        x = leaf(1.0 + k, 2.0, 3.0, 4.0)
        a, b = gg.split(x, 2)
        head(a, b).backward()
        assert x.grad.tolist() == [2 * (1 + k) * 3, 16, (1 + k) ** 2, 4]


def test_results_of_one_program_in_another() -> None:
    first = gg.compile(lambda x: (x * 2, gg.sin(x)))
    second = gg.compile(lambda a, b: gg.sum(a * b))
    for k in range(4):
        x = leaf(0.5 + k)
        second(*first(x)).backward()
        want = leaf(0.5 + k)
        gg.sum(want * 2 * gg.sin(want)).backward()
        assert x.grad.item() == want.grad.item()


def test_detached_from_outside_follows_its_tensor() -> None:
    w = leaf(2.0)
    compiled = ready(lambda x: x * w.detach(), gg.tensor([1.0]))
    w.data = np.array([9.0])
    assert compiled(gg.tensor([1.0])).item() == 9


@pytest.mark.parametrize("mode", ["auto", "off", "require"])
def test_gradients_in_any_order_in_memory_and_mode(mode) -> None:
    gg.manual_seed(0)
    nets = [nn.Sequential(nn.Linear(200, 300), nn.LayerNorm(300), nn.GELU()) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    pairs: list = [(nets[0], nets[0]), (nets[1], gg.compile(nets[1]))]
    for step in range(5):
        x = random(128, 200, seed=step)
        for net, function in pairs:
            net.zero_grad()
            y = function(x)
            with gg.use_kernels(mode if step > 3 else "auto"):
                if step % 2:
                    y.sum().backward()
                else:
                    y.backward(gg.tensor(np.asfortranarray(random(128, 300).numpy())))
        for a, b in zip(nets[0].parameters(), nets[1].parameters()):
            assert np.array_equal(a.grad.numpy(), b.grad.numpy())


# -- what else may change --------------------------------------------------------------------------


def test_modes_in_turn() -> None:
    gg.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
    compiled = gg.compile(net)
    x = gg.ones((2, 4), dtype="float32")
    for i in range(9):
        net.train(i % 2 == 0)
        state = gg.nn.random.default_generator.state
        y = compiled(x)
        gg.nn.random.default_generator.state = state
        assert np.array_equal(y.detach().numpy(), net(x).detach().numpy())
    assert len(next(iter(compiled._kinds.values())).programs) == 2


def test_parts_and_settings_of_modules() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
    compiled = gg.compile(lambda x: net(x))
    x = random(6, 4)

    def check():
        for _ in range(4):
            state, kept = gg.nn.random.default_generator.state, net[1].running_mean.numpy().copy()
            y, mean = compiled(x), net[1].running_mean.numpy().copy()
            gg.nn.random.default_generator.state = state
            net[1].running_mean[...] = gg.tensor(kept)
            assert np.array_equal(y.detach().numpy(), net(x).detach().numpy())
            assert np.array_equal(mean, net[1].running_mean.numpy())

    check()
    net[0].weight = nn.Parameter(random(4, 4, seed=1))
    check()
    net[2].p = 0.0
    check()
    net[1].momentum = 0.9
    check()
    net[0] = nn.Linear(4, 4)
    check()


def test_modules_that_are_not_called() -> None:
    layer, switch = nn.Dropout(0.5), nn.Dropout(0.5)
    x = gg.ones((4, 4))
    for function, module in (
        (layer.forward, layer), (lambda x: F.dropout(x, training=switch.training), switch),
    ):  # fmt: skip
        compiled = ready(function, x)
        module.eval()
        assert compiled(x).tolist() == x.tolist()


def test_copies_have_programs_of_their_own() -> None:
    net = nn.Linear(2, 2)
    x = gg.ones((1, 2), dtype="float32")
    compiled = ready(net, x)
    for twin in (copy.deepcopy(compiled), pickle.loads(pickle.dumps(compiled))):
        with gg.no_grad():
            for p in twin.parameters():
                p[...] = 0.0
        for _ in range(3):
            assert twin(x).tolist() == [[0, 0]]
    assert compiled(x).tolist() == net(x).tolist() != [[0, 0]]


def test_methods() -> None:
    class Net(nn.Module):
        def __init__(self, k):
            super().__init__()
            self.k = k

        @gg.compile
        def forward(self, x):
            return x * self.k

    nets = Net(2.0), Net(3.0)
    for _ in range(4):
        assert [net(gg.tensor(1.0)).item() for net in nets] == [2, 3]
    compiled = gg.compile(nets[0])
    compiled.k = 5.0
    assert [compiled(gg.tensor(1.0)).item() for _ in range(4)] == [5] * 4


def test_values_that_happen_to_agree() -> None:
    compiled = gg.compile(lambda x: x * gg.tensor(np.abs(x.data).max()))
    x = gg.tensor([1.0, 2.0])
    for _ in range(5):
        assert compiled(x).tolist() == [2, 4]
    with pytest.raises(CompileError, match="has no program yet"):
        _ = compiled.text
    with pytest.raises(CompileError, match="is made anew in each call"):
        collections.deque((compiled(x * k) for k in range(5)), maxlen=0)


def test_a_failed_run_draws_as_the_function_does() -> None:
    table = random(4, 2)
    compiled = gg.compile(lambda i: F.embedding(i, table) * F.dropout(gg.ones(2), 0.5))
    for _ in range(3):
        compiled(gg.tensor([0]))
    before = gg.nn.random.default_generator.draws
    with pytest.raises(OutOfRangeError):
        compiled(gg.tensor([9]))
    with pytest.raises(OutOfRangeError):
        F.embedding(gg.tensor([9]), table)
    assert gg.nn.random.default_generator.draws == before


def test_changes_in_another_thread() -> None:
    stop = threading.Event()

    def change():
        t = gg.zeros(3)
        while not stop.is_set():
            t += 1

    other = threading.Thread(target=change)
    other.start()
    try:
        for _ in range(20):
            compiled = gg.compile(lambda x: gg.sum(gg.tanh(gg.exp(x * 2) + 1)))
            for _ in range(5):
                compiled(leaf(1.0, 2.0)).backward()
    finally:
        stop.set()
        other.join()


@pytest.mark.parametrize("count", [1, 2])
def test_a_picture(count) -> None:
    compiled = ready(lambda x: (x * 2, x * 3)[:count], leaf(1.0))
    assert "program" in str(gg.graph(compiled(leaf(1.0))[0]))


# -- what else cannot be a program -----------------------------------------------------------------

buffer, kept = gg.zeros(1), nn.Identity()
kept.n = gg.zeros(1)


def assign(x):
    buffer.data = (buffer * 0.5 + x).data
    return buffer * x


def remember(x):
    y = x * 2
    kept.n = y.detach()
    return y


def seed(x):
    gg.manual_seed(0)
    return F.dropout(x, 0.5)


def collect(x):
    class Out:
        pass

    out = Out()
    out.loss = x * 2
    return out


def late(x):
    y = gg.sum(x * buffer)
    with gg.no_grad():
        buffer.__iadd__(1.0)
    return y


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: x[x > 0], "takes elements by a boolean array .getitem. at test_compile"),
        (lambda x: gg.nonzero(x)[0], "calls nonzero at test_compile.py.* fixed shapes; use gg.wh"),
        (assign, "a tensor from outside, of shape .1,., gets another array"),
        (lambda x: (kept(x), remember(x))[1], "sets 'n' of a Identity"),
        (seed, "seeds a generator of random numbers at test_compile.*outside"),
        (lambda x: F.dropout(x, 0.5, generator=nn.Generator(0)), "seeds a generator"),
        (lambda x: x.requires_grad_() * 2, "gets another array or place in the graph"),
        (collect, "returns a Out; return tensors and plain values"),
        (lambda x: x.data, "returns a ndarray; return tensors"),
    ],
)  # fmt: skip
def test_what_a_program_would_not_do_again(function, message) -> None:
    compiled = gg.compile(function)
    with pytest.raises(CompileError, match=message):
        collections.deque((compiled(gg.tensor([1.0 + k])) for k in range(5)), maxlen=0)


def test_a_change_in_place_of_what_the_way_back_needs() -> None:
    with pytest.raises(InplaceError, match="backward of multiply: its saved array"):
        call_often(late, leaf(1.0))


def test_another_place_in_the_graph() -> None:
    total = leaf(1.0, 2.0) * 1

    def function(x):
        t = total
        t += x
        return t * 1

    with pytest.raises(CompileError, match="gets another array or place in the graph"):
        call_often(function, leaf(1.0, 2.0))


def test_compiled_modules_in_modules() -> None:
    net = nn.Module()
    with pytest.raises(nn.ModuleError, match="compiled module, whose parameters nobody would find"):
        net.layer = gg.compile(nn.Linear(2, 2))


def test_containers_of_others() -> None:
    with pytest.raises(CompileError, match="got a OrderedDict; arguments are nested in tuples"):
        gg.compile(lambda d: d["x"])(collections.OrderedDict(x=leaf(1.0)))
