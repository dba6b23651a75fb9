"""Compiled functions: what a program may rely on, and what cannot be one."""

from __future__ import annotations

import collections
import copy
import gc
import pickle
import threading
import weakref

import numpy as np
import pytest

import gpugrad as gg
from gpugrad import nn
from gpugrad.clip import clip_by_norm_
from gpugrad.core import compiling
from gpugrad.errors import CompileError, InplaceError, OutOfRangeError
from gpugrad.nn import functional as F
from tests.core.test_compile import leaf, random, ready

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

    with pytest.raises(
        CompileError, match=r"function looks at .* at test_compile_limits.py:\d+ .*where"
    ):
        call_often(function, leaf(1.0))


def test_a_backward_pass_inside() -> None:
    def function(x):
        (x * 2).sum().backward()
        return x * 1

    with pytest.raises(CompileError, match=r"an argument, .*_limits.py:\d+; let gg.grad"):
        call_often(function, leaf(1.0))


def test_a_change_of_an_array_inside() -> None:
    w = leaf(1.0)
    w.grad = gg.tensor([1.0])

    def function(x):
        clip_by_norm_([w.grad], 0.5)
        return x * w

    with pytest.raises(CompileError, match=r"changed in place by other means .* optimisers"):
        call_often(function, gg.tensor([1.0]))


def test_arrays_from_elsewhere() -> None:
    generator = np.random.default_rng(0)

    def function(x):
        return x + gg.tensor(generator.standard_normal(2))

    with pytest.raises(
        CompileError, match=r"used at test_compile_limits.py:\d+, of shape \(2,\), is"
    ):
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

    with pytest.raises(CompileError, match=r"changed in place at test_compile_limits\.py"):
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
        (lambda x: x[x > 0], "takes elements by a boolean array .getitem. at test_compile_limits"),
        (lambda x: gg.nonzero(x)[0], "calls nonzero at test_compile.* fixed shapes; use gg.where"),
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
