"""The arena: one buffer under all parameters, which nobody notices but by the speed."""

import copy
import gc
import pickle
import weakref

import numpy as np
import pytest

import gpugrad as gg
from gpugrad import nn, optim
from gpugrad.backend import memory
from gpugrad.backend.kernels import note_choices
from gpugrad.core.graph import destination, mutations
from gpugrad.errors import InplaceError
from tests.backend.counting import Array, counting

SHAPES = [(3, 4), (5,), (), (2, 1, 3), (0, 2)]


def make(shapes=SHAPES, dtype="float64", seed=0):
    rng = np.random.default_rng(seed)
    return [nn.Parameter(gg.tensor(rng.standard_normal(s).astype(dtype))) for s in shapes]


def backward(params, scale=1.0):
    """Gradients 2·scale·p."""
    total = gg.tensor(0.0, dtype=params[0].dtype, device=params[0].device)
    for p in params:
        total = total + scale * gg.sum(p * p)
    total.backward()


def address(x):
    return x.__array_interface__["data"][0]


def buffer_of(optimizer, name="p", i=0):
    return getattr(optimizer._arenas[0][i], name).flat


def inside(x, flat):
    return address(flat) <= address(x) <= address(flat) + flat.nbytes


# -- the layout ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_parameters_gradients_and_state_lie_in_a_row(dtype) -> None:
    params = make(dtype=dtype)
    before = [p.detach().numpy().copy() for p in params]
    optimizer = optim.AdamW(params, lr=0.0)
    for p, old in zip(params, before):
        assert np.array_equal(p.detach().numpy(), old)
        assert p.shape == old.shape
        assert p.dtype == old.dtype
        assert inside(p.data, buffer_of(optimizer))
        assert address(p.data) % 64 == 0
    backward(params)
    assert all(inside(p.grad.data, buffer_of(optimizer, "g")) for p in params)
    optimizer.step()
    states = optimizer._arenas[0][0].states
    for name in ("exp_avg", "exp_avg_sq"):
        assert all(inside(optimizer.state[p][name].data, states[name].flat) for p in params)
        assert all(optimizer.state[p][name].shape == p.shape for p in params)


def test_what_lies_between_stays_zero() -> None:
    params = make()
    optimizer = optim.AdamW(params, lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        backward(params)
        optimizer.step(clip=0.5)
    arena = optimizer._arenas[0][0]
    gaps = np.ones(arena.size, bool)
    for place in arena.places:
        gaps[place.start : place.start + place.size] = False
    assert gaps.any()
    for flat in (arena.p.flat, arena.g.flat, *(b.flat for b in arena.states.values())):
        assert not flat[gaps].any()


def test_one_arena_for_each_dtype_and_group() -> None:
    params = make() + make(dtype="float32")
    optimizer = optim.SGD([{"params": params[:7]}, {"params": params[7:]}], lr=0.1)
    kinds = [[str(a.numpy_dtype) for a in made] for made in optimizer._arenas]
    assert kinds == [["float64", "float32"], ["float32"]]
    backward(params[:5])
    backward(params[5:])
    before = [p.detach().numpy().copy() for p in params]
    optimizer.step()
    for p, old in zip(params, before):
        assert np.allclose(p.detach().numpy(), old - 0.1 * 2 * old, rtol=1e-6)


def test_a_step_is_one_kernel_whatever_the_number_of_tensors() -> None:
    params = make([(7, 3)] * 50)
    optimizer = optim.AdamW(params)
    for _ in range(2):
        backward(params)
        with gg.use_kernels("require"), note_choices() as choices:
            optimizer.step(clip=1.0, nonfinite="skip")
        assert [c.operation for c in choices] == ["flat_step"]


def test_state_dicts_are_what_they_were() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    before = {name: x.numpy().copy() for name, x in net.state_dict().items()}
    optimizer = optim.Adam(net.parameters())
    after = net.state_dict()
    assert list(after) == list(before)
    assert all(np.array_equal(after[name].numpy(), x) for name, x in before.items())
    backward(list(net.parameters()))
    optimizer.step()
    state = optimizer.state_dict()["state"]
    assert [state[i]["exp_avg"].shape for i in range(4)] == [p.shape for p in net.parameters()]
    # It shares the optimiser's memory.
    state[0]["exp_avg"][...] = 7.0
    assert np.all(optimizer.state[next(net.parameters())]["exp_avg"].numpy() == 7.0)


# -- gradients -------------------------------------------------------------------------------------


def test_backward_adds_in_place() -> None:
    params = make()
    optimizer = optim.SGD(params)  # noqa: F841 - it lives as long as its name
    backward(params)
    first = [p.grad for p in params]
    backward(params)
    for p, g in zip(params, first):
        assert p.grad is g
        assert np.allclose(g.numpy(), 4 * p.detach().numpy())


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_keeps_the_home(set_to_none) -> None:
    params = make()
    optimizer = optim.SGD(params, lr=0.1)
    for _ in range(3):
        optimizer.zero_grad(set_to_none)
        backward(params)
        assert all(inside(p.grad.data, buffer_of(optimizer, "g")) for p in params)
        assert all(np.allclose(p.grad.numpy(), 2 * p.detach().numpy()) for p in params)
        optimizer.step()


KEEPERS = {
    "tensor": lambda g: g,
    "detached": lambda g: g.detach(),
    "array": lambda g: g.numpy(),
    "view": lambda g: g.numpy()[1:],
    "view of a view": lambda g: g.numpy()[1:].T[..., :2],
    "tensor view": lambda g: g[0],
    "memoryview": lambda g: memoryview(g.numpy()),
    "dlpack": lambda g: np.from_dlpack(g.numpy()[:2]),
}


@pytest.mark.parametrize("kind", KEEPERS)
def test_a_gradient_that_somebody_keeps_does_not_change(kind) -> None:
    w, v = make([(3, 4), (3, 4)])
    optimizer = optim.SGD([w, v], lr=0.1)
    backward([w, v])
    kept = KEEPERS[kind](w.grad)
    before = np.array(kept)
    optimizer.step()
    optimizer.zero_grad()
    start = w.detach().numpy().copy()
    backward([w, v], scale=100.0)
    optimizer.step()
    assert np.array_equal(np.array(kept), before)
    assert np.allclose(w.grad.numpy(), 200 * start)
    assert np.allclose(w.detach().numpy(), start - 0.1 * 200 * start)
    del kept
    optimizer.zero_grad()
    backward([w, v])
    assert inside(w.grad.data, buffer_of(optimizer, "g")), "given back, and used again"


def test_a_gradient_kept_and_one_set_by_hand() -> None:
    """The step must not copy the new gradient over the one that is kept."""
    (w,) = make([(3,)])
    optimizer = optim.SGD([w], lr=0.5)
    backward([w])
    kept = w.grad
    before, start = kept.numpy().copy(), w.detach().numpy().copy()
    w.grad = kept * 3.0
    optimizer.step()
    assert np.array_equal(kept.numpy(), before)
    assert np.allclose(w.detach().numpy(), start - 0.5 * 3 * before)


def test_rules_may_write_where_the_gradient_belongs() -> None:
    w, v = make([(3, 4), (5,)])
    assert destination(w._node) is None, "no optimiser, no home"
    optimizer = optim.SGD([w, v])
    there = destination(w._node)
    assert there.shape == (3, 4)
    assert inside(there, buffer_of(optimizer, "g"))
    assert destination(w._node) is None, "handed out"
    del there
    assert destination(w._node) is not None, "given back"
    backward([w, v])
    assert destination(w._node) is None, "a gradient is there"
    w.grad = None
    remove = w.register_hook(lambda g: None)
    assert destination(w._node) is None, "a hook would see it"
    remove()
    assert destination(w._node) is not None
    assert destination((w * 2)._node) is None, "no leaf"


def test_what_a_rule_wrote_there_is_not_copied(monkeypatch) -> None:
    (w,) = make([(4,)])
    optimizer = optim.SGD([w])  # noqa: F841 - it lives as long as its name
    place = w._node.home
    there = place.take()
    there[...] = 3.0
    assert place.keep(there) is there
    taken = []
    monkeypatch.setattr(type(place), "take", lambda self: taken.append(self))
    assert place.keep(there) is there
    assert not taken


def test_two_gradients_of_one_walk() -> None:
    (w,) = make([(2, 3)])
    optimizer = optim.SGD([w])
    (gg.sum(w * 2) + gg.sum(w * w) + gg.sum(gg.exp(w))).backward()
    x = w.detach().numpy()
    assert np.allclose(w.grad.numpy(), 2 + 2 * x + np.exp(x))
    assert inside(w.grad.data, buffer_of(optimizer, "g"))


def test_one_gradient_for_two_leaves() -> None:
    a, b = make([(3,), (3,)])
    optimizer = optim.SGD([a, b])  # noqa: F841 - it lives as long as its name
    gg.sum((a + b) * 3.0).backward()
    a.grad[...] = 0.0
    assert np.all(b.grad.numpy() == 3.0)


def test_a_recorded_gradient() -> None:
    (w,) = make([(3,)])
    optimizer = optim.SGD([w], lr=0.1)
    gg.sum(w * w * w).backward(create_graph=True)
    assert w.grad.requires_grad
    start, g = w.detach().numpy().copy(), w.grad.detach().numpy().copy()
    optimizer.step()
    assert np.allclose(w.detach().numpy(), start - 0.1 * g)


def test_hooks_see_and_change_gradients() -> None:
    (w,) = make([(3,)])
    optimizer = optim.SGD([w])  # noqa: F841 - it lives as long as its name
    seen = []

    def double(g):
        seen.append(g)
        return g * 2

    w.register_hook(double)
    backward([w])
    w.grad[...] = 0.0
    assert np.allclose(seen[0].numpy(), 2 * w.detach().numpy())


# -- parameters that come, go and rest -------------------------------------------------------------


def reference(params, lr, beta, moves):
    """Momentum by hand: `moves` says in which steps each parameter has a gradient 2p."""
    values = [p.detach().numpy().copy() for p in params]
    velocity = [np.zeros_like(v) for v in values]
    for active in moves:
        for i in active:
            velocity[i] = beta * velocity[i] + 2 * values[i]
            values[i] = values[i] - lr * velocity[i]
    return values


def test_frozen_parameters_rest() -> None:
    params = make([(4,), (3,), (2,)])
    moves = [(0, 1, 2), (0, 2), (0, 2), (0, 1, 2), (1,)]
    expected = reference(params, 0.1, 0.9, moves)
    optimizer = optim.SGD(params, lr=0.1, momentum=0.9)
    for active in moves:
        optimizer.zero_grad()
        for i, p in enumerate(params):
            p.requires_grad_(i in active)
        backward(params)
        optimizer.step()
    for p, value in zip(params, expected):
        assert np.allclose(p.detach().numpy(), value, rtol=1e-13)
    assert [s["step"] for s in optimizer.state_dict()["state"].values()] == [4, 3, 4]


def test_frozen_parameters_do_not_decay() -> None:
    params = make([(4,), (3,)])
    optimizer = optim.AdamW(params, lr=0.1, weight_decay=0.5)
    backward(params)
    optimizer.step()
    kept = params[1].detach().numpy().copy()
    moment = optimizer.state[params[1]]["exp_avg"].numpy().copy()
    params[1].requires_grad_(False)  # with a gradient left over
    optimizer.step()
    assert np.array_equal(params[1].detach().numpy(), kept)
    assert np.array_equal(optimizer.state[params[1]]["exp_avg"].numpy(), moment)


def test_a_parameter_that_never_has_a_gradient_has_no_state() -> None:
    params = make([(4,), (3,)])
    optimizer = optim.Adam(params)
    backward(params[:1])
    optimizer.step()
    assert list(optimizer.state_dict()["state"]) == [0]


def test_tied_parameters() -> None:
    net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    net[1].weight = net[0].weight
    w = net[0].weight
    optimizer = optim.SGD(net.parameters(), lr=0.1)
    x = gg.tensor(np.eye(4, dtype=np.float32))
    start = w.detach().numpy().copy()
    gg.sum(net(x)).backward()
    expected = start - 0.1 * w.grad.numpy()
    optimizer.step()
    assert np.allclose(w.detach().numpy(), expected)
    assert net[1].weight is net[0].weight


def test_a_group_is_added() -> None:
    a, b = make([(4,), (3,)])
    expected = reference([a, b], 0.1, 0.9, [(0,), (0, 1)])
    optimizer = optim.SGD([a], lr=0.1, momentum=0.9)
    backward([a])
    optimizer.step()
    optimizer.add_param_group({"params": [b]})
    optimizer.zero_grad()
    backward([a, b])
    optimizer.step()
    for p, value in zip((a, b), expected):
        assert np.allclose(p.detach().numpy(), value, rtol=1e-13)
    assert inside(b.data, optimizer._arenas[1][0].p.flat)


def test_a_parameter_of_a_group_is_replaced() -> None:
    """What programs do that grow or prune what they train."""
    a, b = make([(4,), (3,)])
    optimizer = optim.Adam([a, b], lr=0.1)
    backward([a, b])
    optimizer.step()
    more = nn.Parameter(gg.tensor(np.arange(6.0)))
    state = optimizer.state.pop(b)
    state["exp_avg"], state["exp_avg_sq"] = gg.tensor(np.ones(6)), gg.tensor(np.full(6, 4.0))
    optimizer.state[more] = state
    optimizer.param_groups[0]["params"][1] = more
    optimizer.zero_grad()
    backward([a, more])
    start, g = more.detach().numpy().copy(), more.grad.numpy().copy()
    optimizer.step()
    mean, square = 0.9 + 0.1 * g, 0.999 * 4 + 0.001 * g * g
    expected = start - 0.1 * (mean / (1 - 0.9**2)) / (np.sqrt(square / (1 - 0.999**2)) + 1e-8)
    assert np.allclose(more.detach().numpy(), expected, rtol=1e-12)


def test_momentum_switched_on_later() -> None:
    (w,) = make([(4,)])
    value = w.detach().numpy().copy()
    optimizer = optim.SGD([w], lr=0.1)
    velocity = np.zeros(4)
    for momentum in (0, 0.5, 0.5):
        optimizer.param_groups[0]["momentum"] = momentum
        optimizer.zero_grad()
        backward([w])
        velocity = 2 * value + 0.5 * velocity
        value = value - 0.1 * velocity
        velocity = velocity * (momentum > 0)  # it is kept from when there is momentum
        optimizer.step()
        assert np.allclose(w.detach().numpy(), value, rtol=1e-13)


# -- parameters that move --------------------------------------------------------------------------


def test_another_dtype_takes_the_state_along() -> None:
    net = nn.Linear(3, 2)
    optimizer = optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    expected = [
        v.astype(np.float64) for v in reference(list(net.parameters()), 0.1, 0.9, [(0, 1)] * 2)
    ]
    backward(list(net.parameters()))
    optimizer.step()
    net.to("float64")
    optimizer.zero_grad()
    backward(list(net.parameters()))
    optimizer.step()
    for p, value in zip(net.parameters(), expected):
        assert p.dtype == np.float64
        assert optimizer.state[p]["momentum_buffer"].dtype == np.float64
        assert np.allclose(p.detach().numpy(), value, rtol=1e-5)
        assert inside(p.data, buffer_of(optimizer))
    assert [s["step"] for s in optimizer.state_dict()["state"].values()] == [2, 2]


def test_another_library_and_back() -> None:
    pytest.importorskip("array_api_strict")
    net = nn.Linear(3, 2).to("float64")
    expected = reference(list(net.parameters()), 0.1, 0.9, [(0, 1)] * 3)
    optimizer = optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for device in ("cpu", "strict:device1", "cpu"):
        net.to(device)
        optimizer.zero_grad()
        backward([p.to("cpu") for p in net.parameters()])
        optimizer.step()
    for p, value in zip(net.parameters(), expected):
        assert np.allclose(p.detach().numpy(), value, rtol=1e-13)


def test_an_array_put_in_by_hand() -> None:
    (w,) = make([(4,)])
    optimizer = optim.SGD([w], lr=0.5)
    backward([w])
    optimizer.step()
    w.data = np.clip(w.data, -0.5, 0.5)
    value = w.detach().numpy().copy()
    optimizer.zero_grad()
    backward([w])
    optimizer.step()
    assert np.allclose(w.detach().numpy(), value - 0.5 * 2 * value, atol=1e-15)
    assert inside(w.data, buffer_of(optimizer)), "it moved back in"
    w.data = np.arange(6.0)  # of another shape
    optimizer.zero_grad()
    backward([w])
    optimizer.step()
    assert np.allclose(w.detach().numpy(), 0.0)


HOLDERS = {
    "detached": lambda p: p.detach(),
    "array": lambda p: p.data,
    "view": lambda p: p.data[1:],
    "state": lambda p: {"w": p.detach()},
    "parameter": lambda p: nn.Parameter(p),
    "graph": lambda p: gg.exp(p) * p,
}


@pytest.mark.parametrize("kind", HOLDERS)
def test_an_array_that_is_held_elsewhere_stays(kind) -> None:
    w, v = make([(4,), (3,)])
    holder = HOLDERS[kind](w)
    before = w.data
    optimizer = optim.SGD([w, v], lr=0.5)
    assert w.data is before
    value = before.copy()
    backward([w, v])
    optimizer.step(clip=1e9)
    assert w.data is before, "who looks at it sees the update"
    assert np.allclose(before, value - 0.5 * 2 * value, atol=1e-15)
    assert inside(v.data, buffer_of(optimizer))
    del holder, before
    gc.collect()
    value = w.detach().numpy().copy()
    optimizer.zero_grad()
    backward([w, v])
    optimizer.step()
    assert inside(w.data, buffer_of(optimizer)), "it moves in when it is free"
    assert np.allclose(w.detach().numpy(), value - 0.5 * 2 * value, atol=1e-15)


def test_parameters_that_are_views_of_one_array() -> None:
    whole = np.arange(6.0)
    a, b = (nn.Parameter(gg.asarray(x)) for x in (whole[:3], whole[3:]))
    optimizer = optim.SGD([a, b], lr=0.25)
    backward([a, b])
    optimizer.step()
    assert np.array_equal(whole, np.arange(6.0) / 2)


def test_a_transposed_parameter() -> None:
    x = np.arange(6.0).reshape(2, 3)
    w = nn.Parameter(gg.asarray(x.T))
    optimizer = optim.AdamW([w], lr=0.5, weight_decay=0.0)
    backward([w])
    optimizer.step(clip=100.0)
    assert w.shape == (3, 2)
    assert np.allclose(x[0, 1:], [0.5, 1.5])


# -- several optimisers ----------------------------------------------------------------------------


def test_the_later_optimiser_holds_the_parameters_and_both_work() -> None:
    params = make([(4,), (3,)])
    expected = reference(params, 0.1, 0.0, [(0, 1)] * 6)
    first = optim.SGD(params, lr=0.1)
    backward(params)
    first.step()
    second = optim.SGD(params, lr=0.1)
    for optimizer in (second, first, second, first, first):
        optimizer.zero_grad()
        backward(params)
        optimizer.step()
        assert all(inside(p.data, buffer_of(second)) for p in params)
    for p, value in zip(params, expected):
        assert np.allclose(p.detach().numpy(), value, rtol=1e-13)


def test_an_optimiser_takes_over_from_one_that_is_gone() -> None:
    params = make([(4,), (3,)])
    first = optim.SGD(params, lr=0.1)
    second = optim.SGD(params, lr=0.1)
    del second
    gc.collect()
    for _ in range(2):
        first.zero_grad()
        backward(params)
        first.step()
    assert all(inside(p.data, buffer_of(first)) for p in params)
    assert all(p._node.home.arena is first._arenas[0][0] for p in params)


def test_an_optimiser_leaves_no_memory_behind() -> None:
    params = make([(4,), (3,)])
    optimizer = optim.Adam(params)
    backward(params)
    optimizer.step()
    for p in params:
        p.grad = None
    arena = weakref.ref(optimizer._arenas[0][0])
    gradients = weakref.ref(optimizer._arenas[0][0].g)
    del optimizer
    assert arena() is None
    assert gradients() is None
    backward(params)
    assert all(np.allclose(p.grad.numpy(), 2 * p.detach().numpy()) for p in params)


def test_a_copy_of_net_and_optimiser_goes_its_own_way() -> None:
    params = make([(4,), (3,)])
    optimizer = optim.Adam(params, lr=0.1)
    backward(params)
    optimizer.step(clip=1.0)
    twins, twin = copy.deepcopy((params, optimizer))
    assert twin.param_groups[0]["params"][0] is twins[0]
    values = [p.detach().numpy().copy() for p in params]
    for made, o in ((params, optimizer), (twins, twin)):
        o.zero_grad()
        backward(made)
        o.step()
    for p, t, old in zip(params, twins, values):
        assert np.array_equal(p.detach().numpy(), t.detach().numpy())
        assert not np.array_equal(p.detach().numpy(), old)
        assert not np.shares_memory(p.data, t.data)
    assert [s["step"] for s in twin.state_dict()["state"].values()] == [2, 2]


def test_parameters_can_be_pickled() -> None:
    params = make([(4,)])
    optimizer = optim.Adam(params, lr=0.1)
    backward(params)
    optimizer.step()
    twins, twin = pickle.loads(pickle.dumps((params, optimizer)))
    for made, o in ((params, optimizer), (twins, twin)):
        o.zero_grad()
        backward(made)
        o.step()
    assert np.array_equal(params[0].detach().numpy(), twins[0].detach().numpy())


def test_a_loaded_state_moves_in() -> None:
    params = make([(4,), (3,)])
    optimizer = optim.Adam(params, lr=0.1)
    backward(params)
    optimizer.step()
    state = optimizer.state_dict()
    optimizer.load_state_dict(state)
    optimizer.step()
    kept = optimizer.state[params[0]]["exp_avg"].data
    assert inside(kept, optimizer._arenas[0][0].states["exp_avg"].flat)
    optimizer.state.clear()  # and may be forgotten
    optimizer.step()
    assert optimizer.state_dict()["state"][0]["step"] == 1


# -- in-place changes ------------------------------------------------------------------------------


def test_a_change_of_one_parameter_does_not_mark_its_neighbours() -> None:
    a, b = make([(4,), (4,)])
    optimizer = optim.SGD([a, b])  # noqa: F841 - it lives as long as its name
    y = gg.sum(b * b)
    with gg.no_grad():
        a[...] = 0.0
    y.backward()
    z = gg.sum(a * a)
    with gg.no_grad():
        a[1:] *= 2.0
    with pytest.raises(InplaceError, match="changed in place"):
        z.backward()


def test_a_step_marks_what_it_changed() -> None:
    a, b = make([(4,), (4,)])
    optimizer = optim.SGD([a, b], lr=0.1)
    for frozen in (False, True):
        optimizer.zero_grad()
        ya, yb = gg.sum(a * a), gg.sum(b * b)
        backward([a])
        if not frozen:
            backward([b])
        optimizer.step()
        with pytest.raises(InplaceError):
            ya.backward()
        if frozen:
            yb.backward()
        else:
            with pytest.raises(InplaceError):
                yb.backward()


def test_a_graph_through_a_view_of_a_parameter_finds_out() -> None:
    a, b = make([(4,), (4,)])
    optimizer = optim.SGD([a, b], lr=0.1)
    y = gg.sum(gg.exp(a[1:]) * a[1:])
    backward([a, b])
    optimizer.step()
    with pytest.raises(InplaceError):
        y.backward()


def test_marks_end_with_their_arrays() -> None:
    before = len(mutations.when)
    params = make([(4,)] * 20)
    optimizer = optim.SGD(params)
    backward(params)
    optimizer.step()
    assert len(mutations.when) >= before + 20
    del params, optimizer
    gc.collect()
    assert len(mutations.when) <= before + 1


# -- libraries -------------------------------------------------------------------------------------


class CountingBuffer(memory.HostBuffer):
    """A buffer of the counting library's arrays."""

    def __init__(self, size, dtype, device):
        super().__init__(size, dtype)
        self.flat = Array(self.flat)

    def lend(self, start, shape):
        part, _ = super().lend(start, shape)
        return Array(part), part


def test_on_a_device_nothing_is_read_and_launches_do_not_grow(monkeypatch) -> None:
    monkeypatch.setitem(memory.BUFFERS, "counting", CountingBuffer)
    with counting() as counts:

        def launches(n):
            params = [
                nn.Parameter(gg.tensor(np.full(4, i + 1.0), device="counting")) for i in range(n)
            ]
            optimizer = optim.AdamW(params, lr=0.1)
            for _ in range(2):
                backward(params)
                optimizer.step(clip=1.0, nonfinite="skip")
            counts.clear()
            optimizer.step(clip=1.0, nonfinite="skip")
            assert counts.host_reads == counts.uploads == 0
            return counts.launches

        assert launches(3) == launches(40)


def test_a_gpu_buffer_knows_when_a_loan_has_ended() -> None:
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
    room = np.zeros(64, np.float32)
    whole = cupy.cuda.UnownedMemory(address(room), room.nbytes, room, 0)
    made = memory.GpuBuffer.__new__(memory.GpuBuffer)
    made._cupy = cupy
    made.flat = cupy.ndarray((64,), np.float32, cupy.cuda.MemoryPointer(whole, 0))
    part, loan = made.lend(16, (2, 3))
    assert part.data.ptr == address(room) + 64
    assert part.shape == (2, 3)
    loan = weakref.ref(loan)
    view = part[1:].T
    array = weakref.ref(part)
    assert array() is part
    del part
    assert loan() is not None, "a view is left"
    del view
    assert loan() is None


# -- all of it at once -----------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_random_lives(seed) -> None:
    """Random events, against an optimiser of each parameter's own that never has an arena."""
    rng = np.random.default_rng(seed)
    params = make([(3,), (2, 2), (), (5,)], seed=seed)
    optimizer = optim.Adam(params, lr=0.05, weight_decay=0.1)
    values = [p.detach().numpy().copy() for p in params]
    means = [np.zeros_like(v) for v in values]
    squares = [np.zeros_like(v) for v in values]
    counts = [0] * len(params)
    held = []
    for _ in range(60):
        event = rng.integers(8)
        i = int(rng.integers(len(params)))
        if event == 0:
            held.append((params[i].detach(), i))
        elif event == 1 and held:
            held.pop(int(rng.integers(len(held))))
        elif event == 2:
            params[i].data = params[i].data.copy()
        elif event == 3:
            params[i].requires_grad_(not params[i].requires_grad)
        elif event == 4:
            optimizer.load_state_dict(optimizer.state_dict())
        elif event == 5:
            params, optimizer = copy.deepcopy((params, optimizer))
            held = []
        if rng.integers(2):
            optimizer.zero_grad()
        for j, p in enumerate(params):
            if p.requires_grad and rng.integers(4):
                g = rng.standard_normal(p.shape)
                if rng.integers(2):
                    gg.sum(p * gg.tensor(g)).backward()
                else:
                    p.grad = gg.tensor(g)
            if p.requires_grad and p.grad is not None:
                g = p.grad.detach().numpy() + 0.1 * values[j]
                counts[j] += 1
                means[j] = 0.9 * means[j] + 0.1 * g
                squares[j] = 0.999 * squares[j] + 0.001 * g * g
                top = means[j] / (1 - 0.9 ** counts[j])
                size = np.sqrt(squares[j] / (1 - 0.999 ** counts[j]))
                values[j] = values[j] - 0.05 * top / (size + 1e-8)
        optimizer.step()
        for p, value in zip(params, values):
            assert np.allclose(p.detach().numpy(), value, rtol=1e-10, atol=1e-12)
        for kept, j in held:
            if kept.data is params[j].data:
                assert np.allclose(kept.numpy(), values[j], rtol=1e-10, atol=1e-12)
