"""The order of a step, unscale, norm, clip, skip, update, and what it finds out on the way."""

import math

import numpy as np
import pytest

import gpugrad as gg
from gpugrad import nn, optim
from gpugrad.backend import backend_for_device
from gpugrad.clip import AGC, AutoClip, GlobalNorm, TensorNorm, Value, ZClip
from gpugrad.errors import DeviceError, InplaceError, ParameterError
from gpugrad.nn.utils import NonFiniteGradientError
from gpugrad.optim.flat import flat_norm, flat_update
from tests.backend.counting import counting

NUMPY = backend_for_device("cpu")
BAD = [math.nan, math.inf, -math.inf]


def make(arrays, device=None, dtype="float64", **grads):
    return [
        (name, nn.Parameter(gg.tensor(np.asarray(x, dtype), device=device)))
        for name, x in arrays.items()
    ]


def setup(grads, kind=optim.SGD, device=None, dtype="float64", **options):
    """Parameters of ones, with these gradients, and an optimiser with learning rate 1."""
    named = make({k: np.ones_like(g, dtype="float64") for k, g in grads.items()}, device, dtype)
    for name, p in named:
        p.grad = gg.tensor(np.asarray(grads[name], dtype), device=device)
    return dict(named), kind(named, lr=1.0, **options)


def change(p):
    return 1.0 - p.detach().cpu().numpy()


# -- clipping --------------------------------------------------------------------------------------


def test_a_number_is_the_global_norm() -> None:
    p, optimizer = setup({"a": [3.0], "b": [0.0, 4.0]})
    optimizer.step(clip=1.0)
    factor = 1 / (5 + 1e-6)
    assert np.allclose(change(p["a"]), 3 * factor, rtol=1e-14)
    assert np.allclose(change(p["b"]), [0, 4 * factor], rtol=1e-14)
    assert optimizer.last_norm.item() == 5.0
    assert math.isclose(optimizer.last_coefficient.item(), factor, rel_tol=1e-15)
    assert p["a"].grad.item() == 3.0, "the gradient stays as it is"
    optimizer.step(clip=100.0)
    assert optimizer.last_coefficient.item() == 1.0
    assert optimizer.clip_fraction.item() == 0.5


@pytest.mark.parametrize("bound", [0, 0.0])
def test_a_bound_of_zero(bound) -> None:
    p, optimizer = setup({"a": [3.0]}, kind=optim.AdamW, weight_decay=0.0)
    optimizer.step(clip=bound)
    assert change(p["a"]) == 0


@pytest.mark.parametrize("bound", [-1.0, math.nan, "much"])
def test_bounds_that_are_refused(bound) -> None:
    p, optimizer = setup({"a": [3.0]})
    with pytest.raises(ParameterError, match="clip is"):
        optimizer.step(clip=bound)
    with pytest.raises(ParameterError, match="clip of a parameter group is"):
        optim.SGD([{"params": [p["a"]], "clip": bound}])
    assert change(p["a"]) == 0


def test_zero_gradients() -> None:
    p, optimizer = setup({"a": [0.0, 0.0]}, kind=optim.Adam)
    optimizer.step(clip=1.0, nonfinite="skip")
    assert np.all(change(p["a"]) == 0)
    assert optimizer.last_norm.item() == 0
    assert optimizer.skipped.item() == 0


@pytest.mark.parametrize(
    "policy",
    [GlobalNorm(0.5), GlobalNorm(0.5, 1), GlobalNorm(0.5, 3.0), GlobalNorm(0.5, math.inf),
     Value(0.3), TensorNorm(0.4), AGC(0.1)],
    ids=repr,
)  # fmt: skip
@pytest.mark.parametrize("kept", [True, False])
def test_policies(policy, kept) -> None:
    """What the policy makes of the gradients by itself is what the step uses."""
    grads = {"a": [3.0, -0.1], "b": [[0.2, 4.0], [1.0, -1.0]]}
    p, optimizer = setup(grads)
    if kept:  # gradients of a backward pass lie in the buffer
        for name, g in grads.items():
            p[name].grad = None
            gg.sum(p[name] * gg.tensor(g)).backward()
    arrays = [np.array(g) for g in grads.values()]
    if hasattr(policy, "apply"):
        policy.apply(NUMPY, [np.ones_like(g) for g in arrays], arrays)
    else:
        norm = np.linalg.norm(np.concatenate([g.ravel() for g in arrays]), policy.norm_type)
        arrays = [g * policy.coefficient(NUMPY, np.array(norm)) for g in arrays]
    optimizer.step(clip=policy)
    for name, g in zip(grads, arrays):
        assert np.allclose(change(p[name]), g, rtol=1e-12)
    flat = np.concatenate([np.ravel(g) for g in grads.values()])
    order = getattr(policy, "norm_type", 2)
    assert math.isclose(optimizer.last_norm.item(), np.linalg.norm(flat, order), rel_tol=1e-12)
    assert (optimizer.last_coefficient is None) == hasattr(policy, "apply")
    for (name, g), used in zip(grads.items(), arrays):
        assert np.allclose(p[name].grad.numpy(), used if hasattr(policy, "apply") else g)


@pytest.mark.parametrize("policy", [AutoClip(50.0), ZClip()], ids=repr)
def test_policies_with_a_memory_are_asked_once_a_step(policy) -> None:
    asked = []
    coefficient = policy.coefficient

    def ask(m, norm):
        asked.append(float(norm))
        return coefficient(m, norm)

    policy.coefficient = ask
    _, optimizer = setup({"a": [3.0], "b": [4.0]})
    for _ in range(3):
        optimizer.step(clip=policy)
    assert asked == [5.0] * 3


def test_a_graph_that_saved_a_gradient_finds_out() -> None:
    p, optimizer = setup({"a": [3.0]})
    g = p["a"].grad.requires_grad_()
    y = gg.sum(g * g)
    p["a"].grad = g.detach()
    optimizer.step(clip=Value(1.0))
    assert g.item() == 1.0
    with pytest.raises(InplaceError):
        y.backward()


def test_a_group_has_its_own_clip() -> None:
    named = make({"a": [1.0], "b": [1.0], "c": [1.0], "d": [1.0]})
    groups = [
        {"params": named[:1]},
        {"params": named[1:2], "clip": 2.0},
        {"params": named[2:3], "clip": None},
        {"params": named[3:], "clip": Value(0.25)},
    ]
    optimizer = optim.SGD(groups, lr=1.0)
    for (_, p), g in zip(named, (3.0, 8.0, 16.0, 32.0)):
        p.grad = gg.tensor([g])
    optimizer.step(clip=1.0)
    changes = [change(p).item() for _, p in named]
    assert np.allclose(changes, [1.0, 2.0, 16.0, 0.25], rtol=1e-6)
    assert optimizer.last_norm.item() == 3.0
    assert "clip" not in optimizer.state_dict()["param_groups"][1]
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.param_groups[1]["clip"] == 2.0
    for _, p in named:
        p.data = np.ones(1)
    optimizer.step()
    assert np.allclose([change(p).item() for _, p in named], [3.0, 2.0, 16.0, 0.25], rtol=1e-6)
    assert optimizer.last_norm.item() == 8.0


def test_only_groups_clip() -> None:
    named = make({"a": [1.0], "b": [1.0]})
    optimizer = optim.SGD(
        [{"params": named[:1], "clip": 1.0}, {"params": named[1:], "clip": 2.0}], lr=1.0
    )
    for _, p in named:
        p.grad = gg.tensor([4.0])
    optimizer.step()
    assert np.allclose([change(p).item() for _, p in named], [1.0, 2.0], rtol=1e-6)
    assert optimizer.last_norm.item() == 4.0


def test_groups_that_share_a_policy_are_clipped_together() -> None:
    named = make({"a": [1.0], "b": [1.0]})
    policy = GlobalNorm(1.0)
    optimizer = optim.SGD(
        [{"params": named[:1], "clip": policy}, {"params": named[1:], "clip": policy}], lr=1.0
    )
    for (_, p), g in zip(named, (3.0, 4.0)):
        p.grad = gg.tensor([g])
    optimizer.step()
    assert np.allclose([change(p).item() for _, p in named], [0.6, 0.8], rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_does_not_overflow(dtype) -> None:
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    n = 40_000
    for mode in ("off", "require"):
        p = nn.Parameter(gg.tensor(np.ones(n, np.float32)).to(dtype))
        p.grad = gg.tensor(np.full(n, 300.0, np.float32)).to(dtype)
        optimizer = optim.SGD([p], lr=1.0)
        with gg.use_kernels(mode):
            optimizer.step(clip=100.0, nonfinite="skip")
        assert optimizer.last_norm.dtype == np.float32
        assert math.isclose(optimizer.last_norm.item(), 300 * math.sqrt(n), rel_tol=1e-2)
        assert optimizer.skipped.item() == 0
        assert np.allclose(p.detach().numpy().astype(float), 0.5, rtol=1e-2)


def test_float32_norms_beyond_its_squares() -> None:
    for size, mode in ((7, "off"), (20_000, "require"), (20_000, "off")):
        for scale in (1e30, 1e-30):
            _, optimizer = setup({"a": np.full(size, scale)}, dtype="float32")
            with gg.use_kernels(mode):
                optimizer.step(clip=math.inf)
            assert math.isclose(optimizer.last_norm.item(), scale * math.sqrt(size), rel_tol=1e-6)


# -- what is not finite ----------------------------------------------------------------------------


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("kind", [optim.SGD, optim.AdamW])
def test_skip(value, clip, kind) -> None:
    p, optimizer = setup({"a": [3.0, 1.0], "b": [4.0, 2.0]}, kind)
    optimizer.step(clip=clip, nonfinite="skip")
    before = {name: x.detach().numpy().copy() for name, x in p.items()}
    state = {k: v.numpy().copy() for k, v in optimizer.state[p["b"]].items()}
    p["b"].grad = gg.tensor([4.0, value])
    optimizer.step(clip=clip, nonfinite="skip")
    for name, x in p.items():
        assert np.array_equal(x.detach().numpy(), before[name])
    for k, v in optimizer.state[p["b"]].items():
        assert np.array_equal(v.numpy(), state[k])
    assert optimizer.skipped.item() == 1
    assert optimizer.first_nonfinite() == "b"
    steps = {v["step"] for v in optimizer.state_dict()["state"].values()}
    assert steps == {1}
    p["b"].grad = gg.tensor([4.0, 2.0])
    optimizer.step(clip=clip, nonfinite="skip")
    assert optimizer.skipped.item() == 1
    assert {v["step"] for v in optimizer.state_dict()["state"].values()} == {2}
    assert not np.array_equal(p["a"].detach().numpy(), before["a"])


@pytest.mark.parametrize("value", BAD)
def test_zero(value) -> None:
    p, optimizer = setup({"a": [3.0, value], "b": [value, 4.0]})
    optimizer.step(clip=1.0, nonfinite="zero")
    assert optimizer.last_norm.item() == 5.0
    assert np.allclose(change(p["a"]), [0.6, 0.0], rtol=1e-6)
    assert np.allclose(change(p["b"]), [0.0, 0.8], rtol=1e-6)
    assert optimizer.first_nonfinite() == "a"
    assert optimizer.skipped.item() == 0


@pytest.mark.parametrize("policy", [GlobalNorm(1.0, 1), GlobalNorm(1.0, math.inf), Value(1.0)])
def test_zero_with_policies(policy) -> None:
    p, optimizer = setup({"a": [3.0, math.nan, -1.0]})
    optimizer.step(clip=policy, nonfinite="zero")
    expected = {1: [0.75, 0, -0.25], math.inf: [1, 0, -1 / 3]}.get(
        getattr(policy, "norm_type", 0), [1.0, 0, -1.0]
    )
    assert np.allclose(change(p["a"]), expected, rtol=1e-6)


@pytest.mark.parametrize("value", BAD)
def test_raise(value) -> None:
    p, optimizer = setup({"a": [3.0], "b": [[1.0, value]], "c": [value]}, optim.Adam)
    with pytest.raises(NonFiniteGradientError, match="gradient of b is not finite"):
        optimizer.step(clip=1.0, nonfinite="raise")
    assert all(np.all(change(x) == 0) for x in p.values())
    assert {v["step"] for v in optimizer.state_dict()["state"].values()} == {0}
    p["b"].grad = p["c"].grad = None
    optimizer.step(clip=1.0, nonfinite="raise")
    assert change(p["a"]) != 0


def test_propagate() -> None:
    p, optimizer = setup({"a": [3.0], "b": [math.nan]})
    optimizer.step()
    assert change(p["a"]) == 3.0
    assert np.isnan(change(p["b"]))
    optimizer.step(clip=1.0)
    assert np.isnan(change(p["a"]))
    assert np.isnan(optimizer.last_norm.item())


def test_a_mode_that_is_none() -> None:
    _, optimizer = setup({"a": [3.0]})
    with pytest.raises(ParameterError, match="nonfinite is 'ignore'"):
        optimizer.step(nonfinite="ignore")


def test_the_first_to_go_bad_is_remembered() -> None:
    p, optimizer = setup({"a": [3.0], "b": [1.0], "c": [1.0]})
    assert optimizer.first_nonfinite() is None
    optimizer.step(clip=1.0)
    assert optimizer.first_nonfinite() is None
    p["c"].grad = gg.tensor([math.nan])
    optimizer.step(clip=1.0)  # now every parameter is NaN, and so is every gradient
    for x in p.values():
        x.grad = gg.tensor([math.nan])
    optimizer.step(clip=1.0)
    assert optimizer.first_nonfinite() == "c"
    for x in p.values():
        x.grad = gg.tensor([1.0])
    optimizer.step(clip=1.0)
    p["b"].grad = gg.tensor([math.inf])
    optimizer.step(clip=1.0)
    assert optimizer.first_nonfinite() == "b", "it went bad anew"
    for x in p.values():
        x.data = x.data.astype(np.float32)
        x.grad = gg.tensor([1.0], dtype="float32")
    optimizer.step()
    assert optimizer.first_nonfinite() == "b", "also when the parameters have moved"


@pytest.mark.parametrize("size", [1, 100, 8191, 8192, 8193, 50_000])
@pytest.mark.parametrize("mode", ["off", "require"])
def test_one_bad_element_among_many(size, mode) -> None:
    rng = np.random.default_rng(size)
    for at in {0, size // 2, size - 1}:
        g = rng.standard_normal(size)
        g[at] = math.nan
        p, optimizer = setup({"x": [1.0], "y": g, "z": [1.0]}, dtype="float32")
        with gg.use_kernels(mode):
            optimizer.step(nonfinite="skip")
        assert optimizer.first_nonfinite() == "y"
        assert np.all(change(p["y"]) == 0)


def test_parameters_without_names() -> None:
    a, b = (nn.Parameter(gg.tensor([1.0, 2.0])) for _ in range(2))
    optimizer = optim.SGD([a, b])
    a.grad, b.grad = gg.tensor([1.0, 2.0]), gg.tensor([1.0, math.nan])
    optimizer.step(nonfinite="skip")
    assert optimizer.first_nonfinite() == "parameter 1, of shape (2,)"
    c = nn.Parameter(gg.tensor([1.0]))
    optimizer.add_param_group({"params": [("c", c)]})
    with pytest.raises(NonFiniteGradientError, match="parameter 1 of group 0, of shape"):
        optimizer.step(nonfinite="raise")


# -- loss scaling ----------------------------------------------------------------------------------


class Scale:
    """A scaler of the protocol: multiplies by 8, and remembers what it was told."""

    def __init__(self):
        self.told = []

    def inverse(self, m, like):
        return m.create("full", (), 0.125, dtype="float32", device=m.device(like))

    def update_from(self, m, bad):
        self.told.append(bool(m.to_host(bad)))


@pytest.mark.parametrize("clip", [None, 1.0, GlobalNorm(1.0, 1), Value(1.0), TensorNorm(1.0)])
@pytest.mark.parametrize("nonfinite", ["skip", "zero", "raise"])
def test_unscaling_comes_before_everything_else(clip, nonfinite) -> None:
    grads = {"a": [3.0, 0.5], "b": [4.0]}
    plain, first = setup(grads)
    scaled, second = setup({k: np.multiply(g, 8) for k, g in grads.items()})
    first.step(clip=clip, nonfinite=nonfinite)
    scaler = Scale()
    second.step(clip=clip, scaler=scaler, nonfinite=nonfinite)
    for name in grads:
        assert np.allclose(change(scaled[name]), change(plain[name]), rtol=1e-12)
    if clip is not None:
        assert math.isclose(first.last_norm.item(), second.last_norm.item(), rel_tol=1e-12)
    assert scaler.told == [False]


@pytest.mark.parametrize("nonfinite", ["propagate", "skip", "zero"])
def test_a_scaler_hears_of_what_is_not_finite(nonfinite) -> None:
    p, optimizer = setup({"a": [8.0, math.inf]})
    scaler = Scale()
    optimizer.step(scaler=scaler, nonfinite=nonfinite)
    assert scaler.told == [True]
    assert np.allclose(change(p["a"]), [1.0, 0.0] if nonfinite == "zero" else 0.0)
    assert optimizer.skipped.item() == (nonfinite != "zero")


def test_a_scaler_that_is_switched_off() -> None:
    p, optimizer = setup({"a": [2.0, math.inf]})
    optimizer.step(scaler=optim.GradScaler(enabled=False))
    assert change(p["a"])[0] == 2.0


# -- places ----------------------------------------------------------------------------------------


def every_kind_of_step(device):
    grads = {"a": [3.0, -0.1], "b": [[0.2, 4.0], [1.0, -1.0]]}
    scaler = optim.GradScaler(init_scale=4.0)
    p, optimizer = setup(grads, optim.AdamW, device=device)
    scaler.scale(gg.sum(p["a"])).backward()
    autoclip = AutoClip(50.0)
    for options in (
        {"clip": 1.0},
        {"clip": 1.0, "nonfinite": "skip"},
        {"clip": GlobalNorm(1.0, 3)},
        {"clip": GlobalNorm(1.0, math.inf), "nonfinite": "zero"},
        {"clip": Value(0.1)},
        {"clip": autoclip},
        {"scaler": scaler, "clip": 1.0},
        {"nonfinite": "zero"},
    ):
        optimizer.step(**options)
    p["b"].grad[0, 0] = math.nan
    optimizer.step(nonfinite="skip")
    optimizer.step(nonfinite="zero", clip=1.0)
    return p, optimizer


def test_nothing_is_read_from_the_device() -> None:
    host, _ = every_kind_of_step("cpu")
    with counting() as counts:
        there, optimizer = every_kind_of_step("counting")
        assert counts.host_reads == 0
        for name, x in host.items():
            assert np.allclose(there[name].detach().cpu().numpy(), x.detach().numpy(), rtol=1e-12)
        counts.clear()
        assert optimizer.skipped.item() == 1
        assert optimizer.last_norm.device == "counting"
        assert optimizer.clip_fraction.device == "counting"
        assert counts.host_reads == 1


def test_on_strict_arrays() -> None:
    pytest.importorskip("array_api_strict")
    host, _ = every_kind_of_step("cpu")
    there, optimizer = every_kind_of_step("strict:device1")
    for name, x in host.items():
        assert np.allclose(there[name].detach().cpu().numpy(), x.detach().numpy(), rtol=1e-12)
    assert optimizer.first_nonfinite() == "b"


def test_parameters_in_several_places() -> None:
    pytest.importorskip("array_api_strict")
    a = nn.Parameter(gg.tensor([1.0]))
    b = nn.Parameter(gg.tensor([1.0], device="strict:device1"))
    optimizer = optim.SGD([a, b], lr=0.5)
    a.grad, b.grad = gg.tensor([1.0]), gg.tensor([2.0], device="strict:device1")
    for options in ({"clip": 1.0}, {"nonfinite": "skip"}):
        with pytest.raises(DeviceError, match="different places"):
            optimizer.step(**options)
    optimizer.step()
    assert (a.item(), b.item()) == (0.5, 0.0)


def test_a_library_whose_arrays_do_not_change() -> None:
    jax = pytest.importorskip("jax")
    from gpugrad.backend import Backend, register_backend
    from tests.backend.counting import forget_backend

    class Jax(Backend):
        mutable = False

        def find_dtype(self, dtype):
            return np.dtype(dtype)

        def numpy_dtype(self, x):
            return x.dtype

    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    cls = type(jax.numpy.zeros(1))
    register_backend(Jax("jax", jax.numpy, "jax", (cls,)))
    try:
        grads = {"a": [3.0, -0.1], "b": [[0.2, 4.0], [1.0, -1.0]]}
        there, optimizer = setup(grads, optim.AdamW, device="jax")
        other, reference = setup(grads, optim.AdamW)
        for options in ({}, {"clip": 1.0, "nonfinite": "skip"}, {"clip": Value(0.1)}):
            optimizer.step(**options)
            reference.step(**options)
        for name, x in other.items():
            assert there[name].device == "jax"
            assert np.allclose(np.asarray(there[name].data), x.detach().numpy(), rtol=1e-12)
    finally:
        forget_backend("jax")
        jax.config.update("jax_enable_x64", before)


# -- the two passes, by themselves -----------------------------------------------------------------


def test_the_generic_passes_take_every_layout() -> None:
    x = np.arange(24.0).reshape(4, 6)
    for p, g in ((x.copy().T, x.T), (np.repeat(x, 2, 1)[:, ::2], x), (x.copy()[::-1], x)):
        squares, top, bad, first = flat_norm(NUMPY, g, finite_only=False)
        assert (squares, top, bad, first) == (float((x * x).sum()), 23.0, 0, 0)
        before = p.copy()
        out = flat_update(
            NUMPY, p, g, count=np.array(1), factor=np.array(0.5), skip=None, finite_only=False,
            rule="sgd", flags={"moves": False, "nesterov": False, "decays": False},
            numbers={"lr": 2.0, "momentum": 0.0, "dampening": 0.0, "decay": 0.0},
        )  # fmt: skip
        assert out == (p,)
        assert np.array_equal(p, before - g)


# -- hyperparameters that change -------------------------------------------------------------------


@pytest.mark.parametrize("change", [
    lambda group: group.update(lr=0.5),
    lambda group: group.update(weight_decay=0.0),
    lambda group: group.update(betas=(0.5, 0.5)),
    lambda group: group["betas"].__setitem__(0, 0.5),
    lambda group: group.update(lr=gg.tensor(0.5, dtype="float64")),
], ids=["lr", "a flag", "betas", "betas in place", "lr as a tensor"])  # fmt: skip
def test_a_hyperparameter_holds_from_the_next_step_on(change) -> None:
    def trained(changes):
        p = gg.tensor(np.ones(4), requires_grad=True)
        optimizer = gg.optim.AdamW([p], lr=0.1, betas=[0.9, 0.99])
        for number in range(4):
            if number == changes:
                change(optimizer.param_groups[0])
            p.grad = gg.tensor(np.arange(4.0) - number)
            optimizer.step(clip=1.0)
        return p.tolist()

    assert len({tuple(trained(changes)) for changes in (0, 1, 2, 3, None)}) == 5


def test_a_learning_rate_that_changes_in_place() -> None:
    p, rate = gg.tensor([1.0, 1.0], requires_grad=True), gg.tensor(0.5)
    optimizer = gg.optim.SGD([p], lr=0.5)
    optimizer.param_groups[0]["lr"] = rate
    found = []
    for value in (0.5, 0.25, 0.0):
        rate[...] = value
        p.grad = gg.tensor([1.0, 1.0])
        optimizer.step()
        found.append(p.tolist())
    assert found == [[0.5, 0.5], [0.25, 0.25], [0.25, 0.25]]
