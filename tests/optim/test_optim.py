"""Optimisers: PyTorch's trajectories, state, refusals, and no look at the device's values."""

import math
from functools import cache

import numpy as np
import pytest

import gpugrad as gg
from gpugrad import nn, optim
from gpugrad.errors import InplaceError, ParameterError
from tests.backend.counting import counting

STEPS = 50
# One array longer than a block of the update, one matrix, one number.
SHAPES = [(40_000,), (3, 5), ()]


def start(seed=0):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(s) for s in SHAPES]


@cache
def gradient(step, i):
    """A gradient that depends on the step alone; some are large and some tiny."""
    rng = np.random.default_rng([step, i])
    return rng.standard_normal(SHAPES[i]) * 10.0 ** rng.integers(-3, 3)


def ours(make, steps=STEPS, dtype=np.float64, device=None, skip=(), clip=None):
    params = [nn.Parameter(gg.tensor(a.astype(dtype), device=device)) for a in start()]
    optimizer = make(params)
    for step in range(steps):
        optimizer.zero_grad()
        for i, p in enumerate(params):
            if (step, i) not in skip:
                p.grad = gg.tensor(gradient(step, i).astype(dtype), device=device)
        optimizer.step(clip=clip)
    return params, optimizer


CASES: list[tuple[str, dict]] = [
    ("SGD", {"lr": 0.1}),
    ("SGD", {"lr": 0.1, "weight_decay": 0.02}),
    ("SGD", {"lr": 0.1, "momentum": 0.9}),
    ("SGD", {"lr": 0.05, "momentum": 0.8, "dampening": 0.3, "weight_decay": 0.1}),
    ("SGD", {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    ("Adam", {}),
    ("Adam", {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}),
    ("AdamW", {}),
    ("AdamW", {"lr": 0.01, "betas": (0.5, 0.9), "weight_decay": 0.3}),
    ("AdamW", {"lr": 0.01, "betas": (0.0, 0.0), "weight_decay": 0.0}),
    ("RMSprop", {}),
    ("RMSprop", {"lr": 0.02, "alpha": 0.9, "momentum": 0.8, "weight_decay": 0.1}),
    ("RMSprop", {"lr": 0.02, "alpha": 0.9, "centered": True, "eps": 1e-3}),
    ("RMSprop", {"lr": 0.02, "momentum": 0.5, "centered": True, "eps": 1e-3}),
    ("Adagrad", {}),
    ("Adagrad", {"lr": 0.1, "lr_decay": 0.05, "weight_decay": 0.1, "eps": 1e-6,
                 "initial_accumulator_value": 0.3}),
]  # fmt: skip

LION: list[tuple[str, dict]] = [
    ("Lion", {}),
    ("Lion", {"lr": 0.01, "betas": (0.8, 0.95), "weight_decay": 0.2}),
]


@pytest.mark.torch
@pytest.mark.parametrize(("name", "options"), CASES)
@pytest.mark.parametrize("clip", [None, 1.0])
def test_the_trajectory_is_pytorchs(name, options, clip) -> None:
    import torch

    skip = {(0, 1), (7, 1), (8, 2)}  # parameters without a gradient are passed over
    mine, _ = ours(lambda p: getattr(optim, name)(p, **options), skip=skip, clip=clip)
    theirs = [torch.nn.Parameter(torch.tensor(a)) for a in start()]
    optimizer = getattr(torch.optim, name)(theirs, **options)
    for step in range(STEPS):
        optimizer.zero_grad()
        for i, p in enumerate(theirs):
            if (step, i) not in skip:
                p.grad = torch.tensor(gradient(step, i))
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(theirs, clip)
        optimizer.step()
    for p, t in zip(mine, theirs):
        a, b = p.detach().numpy(), t.detach().numpy()
        assert np.abs(a - b).max() <= 1e-12 * max(1.0, np.abs(b).max())


@pytest.mark.torch
def test_defaults_are_pytorchs() -> None:
    import torch

    for name in ("SGD", "Adam", "AdamW", "RMSprop", "Adagrad"):
        theirs = getattr(torch.optim, name)([torch.nn.Parameter(torch.zeros(1))]).defaults
        mine = getattr(optim, name)([nn.Parameter(gg.tensor(0.0))]).defaults
        assert {k: theirs[k] for k in mine} == mine


def test_sgd_by_hand() -> None:
    w = nn.Parameter(gg.tensor([1.0]))
    optimizer = optim.SGD([w], lr=0.1, momentum=0.5)
    for expected in (0.9, 0.75, 0.575):  # velocity 1, 1.5, 1.75
        w.grad = gg.tensor([1.0])
        optimizer.step()
        assert math.isclose(w.item(), expected, rel_tol=1e-15)


@pytest.mark.parametrize(("name", "options"), LION)
def test_lion_is_the_papers(name, options) -> None:
    """Algorithm 2 of arXiv:2302.06675, line by line."""
    mine, optimizer = ours(lambda p: getattr(optim, name)(p, **options))
    group = optimizer.param_groups[0]
    lr, (beta1, beta2), decay = group["lr"], group["betas"], group["weight_decay"]
    for i, p in enumerate(start()):
        theta, m = p, np.zeros_like(p)
        for step in range(STEPS):
            g = gradient(step, i)
            update = np.sign(beta1 * m + (1 - beta1) * g)
            theta = theta - lr * (update + decay * theta)
            m = beta2 * m + (1 - beta2) * g
        assert np.abs(mine[i].detach().numpy() - theta).max() <= 1e-12


def test_lion_defaults() -> None:
    assert optim.Lion([nn.Parameter(gg.tensor(0.0))]).defaults == {
        "lr": 1e-4, "betas": (0.9, 0.99), "weight_decay": 0,
    }  # fmt: skip


@pytest.mark.parametrize(("name", "options"), CASES[3:] + LION)
def test_parameters_keep_their_memory_and_dtype(name, options) -> None:
    p = nn.Parameter(gg.tensor(np.ones((300, 100), np.float32)))
    data = p.data
    optimizer = getattr(optim, name)([p], **{**options, "lr": np.float64(0.1)})
    p.grad = gg.tensor(np.ones((300, 100), np.float32))
    kept = p.grad.numpy().copy()
    optimizer.step(clip=1.0)
    assert p.data is data
    assert p.dtype == np.float32
    assert all(v.dtype == np.float32 for k, v in optimizer.state[p].items() if k != "step")
    assert np.array_equal(p.grad.numpy(), kept)  # clipping inside leaves the gradient alone
    assert not np.all(data == 1)


def test_layouts() -> None:
    """The update of a transposed or strided gradient is that of a plain one."""
    base = np.random.default_rng(0).standard_normal((6, 4))
    plain, turned = (nn.Parameter(gg.tensor(np.ones((4, 6)))) for _ in range(2))
    plain.grad = gg.tensor(np.ascontiguousarray(base.T))
    turned.grad = gg.asarray(base.T)
    for p in (plain, turned):
        optim.AdamW([p]).step()
    assert np.array_equal(plain.detach().numpy(), turned.detach().numpy())


def test_clip_reports_the_norm_before() -> None:
    params, optimizer = ours(lambda p: optim.SGD(p, lr=0.0), steps=1, clip=1e-3)
    flat = np.concatenate([np.ravel(p.grad.numpy()) for p in params])
    assert isinstance(optimizer.last_norm, gg.Tensor)
    assert math.isclose(optimizer.last_norm.item(), np.linalg.norm(flat), rel_tol=1e-12)
    free, _ = ours(lambda p: optim.SGD(p, lr=0.1), steps=3)
    bounded, _ = ours(lambda p: optim.SGD(p, lr=0.1), steps=3, clip=math.inf)
    for a, b in zip(free, bounded):
        assert np.array_equal(a.detach().numpy(), b.detach().numpy())
    for bound in (-1.0, math.nan):
        with pytest.raises(ParameterError, match="clip is"):
            optimizer.step(clip=bound)


def test_groups() -> None:
    a, b, c = (nn.Parameter(gg.tensor([1.0])) for _ in range(3))
    optimizer = optim.SGD([{"params": [a]}, {"params": b, "lr": 1.0}], lr=0.1)
    optimizer.add_param_group({"params": [c], "lr": 0.0})
    assert [g["lr"] for g in optimizer.param_groups] == [0.1, 1.0, 0.0]
    for p in (a, b, c):
        p.grad = gg.tensor([1.0])
    optimizer.step()
    assert [p.item() for p in (a, b, c)] == [0.9, 0.0, 1.0]
    optimizer.param_groups[2]["lr"] = 0.5  # what a schedule does
    optimizer.step()
    assert c.item() == 0.5


def test_closure() -> None:
    w = nn.Parameter(gg.tensor([2.0]))
    optimizer = optim.SGD([w], lr=0.25)

    def closure():
        optimizer.zero_grad()
        loss = gg.sum(w * w)
        loss.backward()
        return loss

    with gg.no_grad():
        assert optimizer.step(closure).item() == 4.0
    assert w.item() == 1.0


def test_zero_grad() -> None:
    params, optimizer = ours(optim.SGD, steps=1)
    optimizer.zero_grad(set_to_none=False)
    assert all(np.all(p.grad.numpy() == 0) for p in params)
    optimizer.zero_grad()
    assert all(p.grad is None for p in params)


def test_a_stale_graph_is_found_out() -> None:
    w = nn.Parameter(gg.tensor([2.0]))
    y = gg.sum(w * w)
    w.grad = gg.tensor([1.0])
    optim.SGD([w]).step()
    with pytest.raises(InplaceError, match="changed in place"):
        y.backward()


@pytest.mark.parametrize(("name", "options"), CASES + LION)
def test_state_goes_on_exactly(name, options) -> None:
    def make(p):
        return getattr(optim, name)(p, **options)

    straight, _ = ours(make, 6)
    params, first = ours(make, 3)
    again = [nn.Parameter(gg.tensor(p.detach().numpy())) for p in params]
    second = getattr(optim, name)(again, lr=123.0)
    state = first.state_dict()
    arrays = {
        "state": {
            str(i): {k: v if k == "step" else v.numpy() for k, v in kept.items()}
            for i, kept in state["state"].items()
        },
        "param_groups": state["param_groups"],
    }
    second.load_state_dict(arrays)
    assert second.param_groups[0]["lr"] == first.param_groups[0]["lr"]
    for step in range(3, 6):
        for i, p in enumerate(again):
            p.grad = gg.tensor(gradient(step, i))
        second.step()
    for a, b in zip(straight, again):
        assert np.array_equal(a.detach().numpy(), b.detach().numpy())


def test_state_looks_like_pytorchs() -> None:
    _, optimizer = ours(lambda p: optim.AdamW(p, lr=0.1), steps=2)
    state = optimizer.state_dict()
    assert sorted(state["state"]) == [0, 1, 2]
    assert sorted(state["state"][0]) == ["exp_avg", "exp_avg_sq", "step"]
    assert state["state"][0]["step"] == 2
    assert state["param_groups"][0]["params"] == [0, 1, 2]
    assert state["param_groups"][0]["lr"] == 0.1


def test_a_state_that_does_not_fit_changes_nothing() -> None:
    params, optimizer = ours(lambda p: optim.AdamW(p, lr=0.1), steps=1)
    before = optimizer.state_dict()
    kept = {i: dict(values) for i, values in before["state"].items()}
    groups = [dict(before["param_groups"][0], lr=5.0)]

    bad = {"state": {**kept, 1: {**kept[1], "exp_avg": np.zeros(2)}}, "param_groups": groups}
    with pytest.raises(nn.StateDictError, match=r"wrong shape: 1.exp_avg is \(2,\)") as caught:
        optimizer.load_state_dict(bad)
    assert caught.value.wrong_shape == ("1.exp_avg",)
    missing = {"state": {0: {"step": 1, "exp_avg": kept[0]["exp_avg"]}}, "param_groups": groups}
    with pytest.raises(nn.StateDictError, match=r"missing: 0\.exp_avg_sq"):
        optimizer.load_state_dict(missing)
    with pytest.raises(optim.OptimizerError, match="groups of"):
        optimizer.load_state_dict({"state": {}, "param_groups": [{**groups[0], "params": [0]}]})
    with pytest.raises(optim.OptimizerError, match="another optimiser"):
        optimizer.load_state_dict(optim.SGD(params).state_dict())
    with pytest.raises(optim.OptimizerError, match="lr is -1"):
        optimizer.load_state_dict({"state": kept, "param_groups": [{**groups[0], "lr": -1.0}]})
    with pytest.raises(optim.OptimizerError, match="unknown parameters"):
        optimizer.load_state_dict({"state": {7: kept[0]}, "param_groups": groups})
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert optimizer.state_dict()["state"][1]["exp_avg"].shape == (3, 5)


W = nn.Parameter(gg.tensor([1.0]))
V = nn.Parameter(gg.tensor([1.0]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: optim.SGD([]), "no parameters"),
        (lambda: optim.SGD(iter([])), "no parameters"),
        (lambda: optim.SGD(W), "put it into a list"),
        (lambda: optim.SGD([W, W]), "twice"),
        (lambda: optim.SGD([{"params": [W]}, {"params": [W]}]), "twice"),
        (lambda: optim.SGD([{"params": []}]), "empty"),
        (lambda: optim.SGD([1.0]), "float, not a tensor"),
        (lambda: optim.SGD([np.ones(2)]), "ndarray, not a tensor"),
        (lambda: optim.SGD([W * 2]), "computed from other tensors"),
        (lambda: optim.SGD([{"lr": 1.0}]), "'params'"),
        (lambda: optim.SGD([{"params": [W], "rate": 1.0}]), r"unknown hyperparameters \['rate'\]"),
        (
            lambda: optim.SGD([gg.tensor([1.0])]),
            r"\(1,\) does not require.*requires_grad_",
        ),
        (lambda: optim.SGD([gg.tensor([1])]), r"holds int64.*convert it"),
        (lambda: optim.SGD([W]).add_param_group({"params": [W]}), "twice"),
        (lambda: optim.SGD([W]).add_param_group({"params": []}), "empty"),
        (lambda: optim.SGD([W]).add_param_group({"lr": 0.1}), "'params'"),
        (lambda: optim.SGD([W]).add_param_group([V]), "a dict with 'params'"),
        (lambda: optim.SGD([W]).add_param_group({"params": [V], "lr": math.nan}), "lr is nan"),
        (lambda: optim.SGD([{"params": [W], "lr": -1.0}]), "lr is -1.0"),
        (lambda: optim.SGD([W], lr=gg.tensor(0.1)), r"lr is a tensor.*\.item\(\)"),
        (lambda: optim.Adam([W], betas=(gg.tensor(0.9), 0.999)), "beta1 is a tensor"),
        (lambda: optim.SGD([W], dampening=math.nan), "dampening is nan"),
        (lambda: optim.SGD([W], momentum=math.nan), "momentum is nan"),
        (lambda: optim.Adam([W], eps=math.nan), "eps is nan"),
        (lambda: optim.AdamW([W], weight_decay=math.nan), "weight_decay is nan"),
        (lambda: optim.RMSprop([W], eps=-1.0), "eps is -1.0"),
        (lambda: optim.Adagrad([W], eps=math.nan), "eps is nan"),
        (lambda: optim.Lion([W], weight_decay=-0.1), "weight_decay is -0.1"),
        (lambda: optim.SGD([W], lr=-1.0), "lr is -1.0"),
        (lambda: optim.SGD([W], lr=math.nan), "lr is nan"),
        (lambda: optim.SGD([W], lr=math.inf), "lr is inf"),
        (lambda: optim.SGD([W], lr="fast"), "lr is a number"),
        (lambda: optim.SGD([W], momentum=-0.1), "momentum is -0.1"),
        (lambda: optim.SGD([W], weight_decay=-0.1), "weight_decay is -0.1"),
        (lambda: optim.SGD([W], nesterov=True), "nesterov needs"),
        (lambda: optim.SGD([W], momentum=0.9, dampening=0.1, nesterov=True), "nesterov needs"),
        (lambda: optim.AdamW([W], betas=(1.0, 0.9)), "beta1 is 1.0"),
        (lambda: optim.AdamW([W], betas=(0.9, -0.1)), "beta2 is -0.1"),
        (lambda: optim.AdamW([W], betas=(0.9, math.nan)), "beta2 is nan"),
        (lambda: optim.AdamW([W], betas=0.9), "pair of numbers"),
        (lambda: optim.Adam([W], eps=-1e-8), "eps is -1e-08"),
        (lambda: optim.Adam([W], lr=-math.inf), "lr is -inf"),
        (lambda: optim.RMSprop([W], alpha=-0.1), "alpha is -0.1"),
        (lambda: optim.RMSprop([W], alpha=1.5), "alpha is 1.5"),
        (lambda: optim.RMSprop([W], momentum=-1), "momentum is -1"),
        (lambda: optim.Adagrad([W], lr_decay=-1), "lr_decay is -1"),
        (lambda: optim.Adagrad([W], initial_accumulator_value=-1), "initial_accumulator_value is"),
        (lambda: optim.Lion([W], betas=(0.9, 1.0)), "beta2 is 1.0"),
        (lambda: optim.Lion([W], lr=None), "lr is a number"),
        (lambda: optim.SGD([("w", W), W]), "all parameters have a name, or none has"),
    ],
)
def test_refusals(make, message) -> None:
    with pytest.raises(optim.OptimizerError, match=message) as caught:
        make()
    assert isinstance(caught.value, ValueError)


def test_a_refused_group_leaves_the_optimiser_as_it_was() -> None:
    optimizer = optim.SGD([W], lr=0.1)
    for group in ({"params": [V, W]}, {"params": [V], "lr": -1.0}, {"params": [V], "rate": 1.0}):
        with pytest.raises(optim.OptimizerError):
            optimizer.add_param_group(group)
    assert [group["params"] for group in optimizer.param_groups] == [[W]]


def test_frozen_parameters_stay_and_can_be_thawed() -> None:
    a, b = (nn.Parameter(gg.tensor([1.0])) for _ in range(2))
    b.requires_grad_(False)
    optimizer = optim.SGD([a, b], lr=0.5)
    for expected in (1.0, 0.5):
        (a * b).sum().backward()
        optimizer.step()
        assert b.item() == expected
        optimizer.zero_grad()
        with gg.no_grad():
            a[...] = 1.0
        b.requires_grad_()


@pytest.mark.parametrize(("name", "options"), CASES[2:] + LION)
def test_nothing_is_read_from_the_device(name, options) -> None:
    def make(p):
        return getattr(optim, name)(p, **options)

    host, _ = ours(make, 5, clip=1.0)
    with counting() as counts:
        params, optimizer = ours(make, 5, device="counting", clip=1.0)
        assert counts.host_reads == 0
        assert optimizer.last_norm.device == "counting"
        for a, b in zip(host, params):
            assert np.allclose(a.detach().numpy(), b.detach().cpu().numpy(), rtol=1e-12)


@pytest.mark.parametrize(("name", "options"), CASES[2:] + LION)
def test_on_strict_arrays(name, options) -> None:
    pytest.importorskip("array_api_strict")

    def make(p):
        return getattr(optim, name)(p, **options)

    host, _ = ours(make, 3, clip=1.0)
    params, _ = ours(make, 3, device="strict:device1", clip=1.0)
    for a, b in zip(host, params):
        assert b.device == "strict:device1"
        assert np.allclose(a.detach().numpy(), b.detach().cpu().numpy(), rtol=1e-12)


def test_repr() -> None:
    assert repr(optim.SGD([W], lr=0.5)).splitlines()[:3] == [
        "SGD (", "Parameter Group 0", "    lr: 0.5",
    ]  # fmt: skip
