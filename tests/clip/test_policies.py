"""Policies without a memory, against formulas spelled out, in every library, with no host read."""

import math

import ml_dtypes
import numpy as np
import pytest

import gpugrad as gg
from gpugrad import nn
from gpugrad.backend import backend_of
from gpugrad.clip import AGC, GlobalNorm, GradientPolicy, NormPolicy, TensorNorm, Value
from gpugrad.errors import DeviceError, ParameterError
from tests.backend.counting import counting
from tests.backend.test_libraries import jax_device  # noqa: F401

SHAPES = [(4, 3), (4,), (), (5, 2, 3, 3), (0, 3), (1, 6), (6, 1)]


def made(dtype=np.float64, scale=1.0, seed=0):
    rng = np.random.default_rng(seed)
    return [(scale * rng.standard_normal(s)).astype(dtype) for s in SHAPES]


def applied(policy, params, grads, device="cpu"):
    """What a policy makes of gradients, on the host."""
    there = [[gg.tensor(a, device=device).data for a in arrays] for arrays in (params, grads)]
    m = backend_of(there[0][0])
    before = list(there[1])
    assert policy.apply(m, *there) is None
    if m.mutable:
        assert all(a is b for a, b in zip(before, there[1])), "in place"
    return [m.to_host(g) for g in there[1]]


def coefficient(policy, norm, dtype="float64", device="cpu"):
    norm = gg.tensor(np.array(norm, dtype), device=device)
    c = policy.coefficient(norm.backend, norm.data)
    assert c.shape == ()
    assert norm.backend.numpy_dtype(c) == dtype
    return norm.backend.to_host(c).item()


# -- by the global norm ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_global_norm(dtype, jax_device) -> None:  # noqa: F811
    for device in ("cpu", jax_device):
        assert coefficient(GlobalNorm(2.0), 8.0, dtype, device) == pytest.approx(0.25, rel=1e-6)
        assert coefficient(GlobalNorm(2.0), 1.5, dtype, device) == 1.0
        assert coefficient(GlobalNorm(2.0), 0.0, dtype, device) == 1.0
        assert coefficient(GlobalNorm(0.0), 0.0, dtype, device) == 0.0
        assert coefficient(GlobalNorm(0.0), 3.0, dtype, device) == 0.0
        assert coefficient(GlobalNorm(math.inf), 3.0, dtype, device) == 1.0
        assert coefficient(GlobalNorm(1e300), 1e-3, dtype, device) == 1.0
        assert coefficient(GlobalNorm(1.0), math.inf, dtype, device) == 0.0
        assert math.isnan(coefficient(GlobalNorm(1.0), math.nan, dtype, device))


def test_kinds_and_texts() -> None:
    assert isinstance(GlobalNorm(1.0), NormPolicy)
    assert GlobalNorm(1, "inf").norm_type == math.inf
    for policy in (Value(1.0), TensorNorm(1.0), AGC()):
        assert isinstance(policy, GradientPolicy)
        assert not hasattr(policy, "norm_type"), "what asks for the norm of all gradients"
        assert not hasattr(policy, "coefficient")
    assert not hasattr(GlobalNorm(1.0), "apply")
    texts = [str(p) for p in (GlobalNorm(1), Value(2), TensorNorm(3, 1), AGC(0.02))]
    assert texts == [
        "GlobalNorm(max_norm=1.0, norm_type=2.0)",
        "Value(bound=2.0)",
        "TensorNorm(max_norm=3.0, norm_type=1.0)",
        "AGC(clipping=0.02, eps=0.001)",
    ]


def test_no_memory_no_state() -> None:
    assert GlobalNorm(1.0).state_dict() == {}
    AGC().load_state_dict({})
    with pytest.raises(ParameterError, match="Value keeps no state"):
        Value(1.0).load_state_dict({"history": 1})


@pytest.mark.parametrize("bad", [-1.0, math.nan, "much", None])
@pytest.mark.parametrize("make", [GlobalNorm, Value, TensorNorm, AGC, lambda x: AGC(eps=x)])
def test_bad_bounds(make, bad) -> None:
    with pytest.raises(ParameterError, match=r"max_norm|bound|clipping|eps"):
        make(bad)


@pytest.mark.parametrize("make", [GlobalNorm, TensorNorm])
def test_bad_orders(make) -> None:
    for order in (0.1, 0, -2, math.nan):
        with pytest.raises(ParameterError, match="norm_type"):
            make(1.0, order)


# -- each gradient in its own way ------------------------------------------------------------------


def value(p, g):
    return np.clip(g, -0.5, 0.5)


def by_norm(order):
    def rule(p, g):
        norm = np.linalg.norm(g.ravel(), order)
        return g * min(1.0, 0.5 / (norm + 1e-6))

    return rule


def agc(p, g, clipping=0.3, eps=0.5):
    """The rule of the paper, row by row."""
    if g.ndim < 2:
        most = clipping * max(np.linalg.norm(p), eps)
        norm = np.linalg.norm(g)
        return g * (most / norm) if norm > most else g
    return np.array([agc(a.ravel(), b.ravel()).reshape(b.shape) for a, b in zip(p, g)])


CASES = {
    "value": (Value(0.5), value),
    "norm 2": (TensorNorm(0.5), by_norm(2)),
    "norm 1": (TensorNorm(0.5, 1), by_norm(1)),
    "norm inf": (TensorNorm(0.5, math.inf), by_norm(math.inf)),
    "agc": (AGC(0.3, 0.5), agc),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("scale", [0.05, 3.0])
def test_gradient_policies(name, scale, jax_device) -> None:  # noqa: F811
    policy, rule = CASES[name]
    params, grads = made(seed=1), made(scale=scale)
    expected = [rule(p, g) if g.size else g for p, g in zip(params, grads)]
    assert scale == 0.05 or any(not np.array_equal(a, b) for a, b in zip(expected, grads))
    devices = ["cpu", jax_device]
    try:
        import array_api_strict  # noqa: F401

        devices.append("strict:device1")
    except ImportError:
        pass
    for device in devices:
        for have, want in zip(applied(policy, params, grads, device), expected):
            assert have.shape == want.shape
            assert np.allclose(have, want, rtol=1e-6 if "norm" in name else 1e-12, atol=0)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", ["float16", ml_dtypes.bfloat16, "float32"])
def test_narrow_gradients_keep_their_dtype(name, dtype) -> None:
    policy, rule = CASES[name]
    params, grads = made(dtype, seed=1), made(dtype, scale=3.0)
    # Half precision is rounded once, from what was computed in single.
    tolerance = float(ml_dtypes.finfo(dtype).eps) * (4 if dtype == "float32" else 1)
    for p, g, have in zip(params, grads, applied(policy, params, grads)):
        assert have.dtype == dtype
        want = rule(p.astype(np.float64), g.astype(np.float64)) if g.size else g
        assert np.allclose(have.astype(np.float64), want.astype(np.float64), rtol=tolerance, atol=0)


def test_half_precision_gradients_of_300_become_small_and_finite() -> None:
    grads = [np.full((50, 50), 300, np.float16)]
    weights = [np.full((50, 50), 1, np.float16)]
    (have,) = applied(TensorNorm(1.0), weights, grads)
    assert np.allclose(have.astype(float), 1 / 50, rtol=1e-3)
    (have,) = applied(AGC(0.01), weights, grads)
    assert np.allclose(have.astype(float), 0.01, rtol=1e-3)
    (have,) = applied(Value(1e6), weights, grads)  # a bound that float16 does not know
    assert np.array_equal(have, grads[0])


def test_value_keeps_nan() -> None:
    g = np.array([math.nan, math.inf, -math.inf, 0.1])
    (have,) = applied(Value(1.0), [g], [g])
    assert np.array_equal(have, [math.nan, 1.0, -1.0, 0.1], equal_nan=True)


def test_a_bound_of_zero_gives_zeros() -> None:
    for policy in (Value(0.0), TensorNorm(0.0), AGC(0.0)):
        for have in applied(policy, made(seed=1), made()):
            assert not have.any()


def test_zeros_stay_zeros() -> None:
    zeros = [np.zeros(s) for s in SHAPES]
    for policy, _ in CASES.values():
        for have in applied(policy, zeros, zeros):
            assert np.array_equal(have, np.zeros(have.shape))


def test_one_tensor_does_not_touch_another() -> None:
    spoilt = [np.array([math.nan, 1.0]), np.array([3.0, 4.0])]
    have = applied(TensorNorm(1.0), spoilt, spoilt)
    assert np.isnan(have[0]).all()
    assert np.allclose(have[1], [0.6, 0.8])


def test_agc_takes_a_unit_for_itself() -> None:
    w = np.array([[3.0, 4.0], [0.0, 0.0], [30.0, 40.0]])
    g = np.full((3, 2), 1.0)
    (have,) = applied(AGC(0.1, eps=1e-3), [w], [g])
    assert np.allclose(np.linalg.norm(have, axis=1), [0.5, 1e-4, math.sqrt(2)])
    g[0, 0] = math.nan
    (have,) = applied(AGC(0.1), [w], [g])
    assert np.isnan(have[0]).tolist() == [True, False]
    assert np.allclose(np.linalg.norm(have[2]), math.sqrt(2))


def test_agc_leaves_out_what_it_is_told_to() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    params = [p.data for p in net.parameters()]
    ones = [np.ones_like(p) for p in params]
    policies = {
        "last layer": AGC(0.01, skip=net[2].parameters()),
        "vectors": AGC(0.01, skip=lambda p: p.ndim < 2),
        "nothing": AGC(0.01),
    }
    changed = {}
    for name, policy in policies.items():
        grads = [x.copy() for x in ones]
        policy.apply(backend_of(params[0]), params, grads)
        changed[name] = [not np.array_equal(g, x) for g, x in zip(grads, ones)]
    assert changed == {
        "last layer": [True, True, False, False],
        "vectors": [True, False, True, False],
        "nothing": [True, True, True, True],
    }
    names: list = ["weight"]
    with pytest.raises(ParameterError, match=r"skip has str.*net\.head\.parameters\(\)"):
        AGC(skip=names)


def test_nothing_is_read_from_the_device() -> None:
    with counting() as counts:
        params, grads = (
            [gg.tensor(a, device="counting").data for a in made(np.float32, scale=s)]
            for s in (1, 9)
        )
        m = backend_of(grads[0])
        counts.clear()
        for policy, _ in CASES.values():
            policy.apply(m, params, grads)
        norm = gg.tensor(np.float32(7), device="counting")
        counts.uploads = 0
        GlobalNorm(1.0).coefficient(m, norm.data)
        assert (counts.host_reads, counts.uploads) == (0, 0)


def test_adaptive_policies_want_one_place() -> None:
    pytest.importorskip("array_api_strict")
    here, there = (gg.tensor(1.0, device=f"strict:device{i}") for i in (1, 2))
    from gpugrad.clip import ZClip

    policy = ZClip()
    policy.coefficient(here.backend, here.data)
    with pytest.raises(DeviceError, match="use one policy for each device"):
        policy.coefficient(there.backend, there.data)
