"""AutoClip and ZClip against their papers' formulas, their memory, and a resumed run."""

import copy
import math
import pickle

import numpy as np
import pytest

import gpugrad as gg
from gpugrad import io
from gpugrad.clip import AutoClip, ZClip
from gpugrad.errors import ParameterError
from tests.backend.counting import counting
from tests.backend.test_libraries import jax_device  # noqa: F401

#: Norms of a run that falls, with spikes.
NORMS = np.abs(np.random.default_rng(5).normal(2.0, 0.3, 120)) * np.linspace(2, 1, 120)
NORMS[[30, 31, 70, 110]] *= [8.0, 30.0, 1000.0, 3.0]


def coefficients(policy, norms, device="cpu", dtype="float64"):
    found = []
    for norm in norms:
        x = gg.tensor(np.array(norm, dtype), device=device)
        found.append(x.backend.to_host(policy.coefficient(x.backend, x.data)).item())
    return np.array(found)


def autoclip(norms, percentile, window=None):
    """As the paper has it: the percentile of the history, this norm in it."""
    found = []
    for i, norm in enumerate(norms):
        history = norms[: i + 1] if window is None else norms[max(0, i + 1 - window) : i + 1]
        found.append(min(1.0, np.percentile(history, percentile) / (norm + 1e-6)))
    return np.array(found)


def zclip(norms, z, alpha, warmup):
    """As the paper has it: mean and variance of a warm-up, then moving averages."""
    found = list(np.ones(warmup))
    mean, variance = np.mean(norms[:warmup]), np.var(norms[:warmup])
    for norm in norms[warmup:]:
        score = (norm - mean) / math.sqrt(variance)
        kept = mean + z * z / score * math.sqrt(variance) if score > z else norm
        found.append(kept / norm)
        mean = alpha * mean + (1 - alpha) * kept
        variance = alpha * variance + (1 - alpha) * (kept - mean) ** 2
    return np.array(found)


@pytest.mark.parametrize("window", [None, 1, 7, 120, 500])
@pytest.mark.parametrize("percentile", [0, 10, 37.5, 50, 100])
def test_autoclip(percentile, window) -> None:
    have = coefficients(AutoClip(percentile, window), NORMS)
    assert np.allclose(have, autoclip(NORMS, percentile, window), rtol=1e-13, atol=0)


@pytest.mark.parametrize(("z", "alpha", "warmup"), [(2.5, 0.97, 25), (1.0, 0.5, 2), (3.0, 0.9, 60)])
def test_zclip(z, alpha, warmup) -> None:
    have = coefficients(ZClip(z, alpha, warmup), NORMS)
    want = zclip(NORMS, z, alpha, warmup)
    assert np.allclose(have, want, rtol=1e-11, atol=0)
    assert (want < 1).any()


def test_autoclip_remembers_all_when_the_memory_grows(monkeypatch) -> None:
    monkeypatch.setattr(AutoClip, "FIRST", 4)
    policy = AutoClip(30.0)
    assert np.allclose(coefficients(policy, NORMS), autoclip(NORMS, 30.0), rtol=1e-13, atol=0)
    assert policy.state_dict()["history"].shape == (128,)


POLICIES = {
    "autoclip": lambda: AutoClip(20.0),
    "window": lambda: AutoClip(20.0, window=9),
    "zclip": lambda: ZClip(warmup=10),
}


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("device", ["counting", "strict:device1", "jax"])
def test_other_libraries(name, device, request) -> None:
    want = coefficients(POLICIES[name](), NORMS[:40])
    if device == "counting":
        with counting():
            have = coefficients(POLICIES[name](), NORMS[:40], device)
    else:
        if device == "jax":
            device = request.getfixturevalue("jax_device")
        else:
            pytest.importorskip("array_api_strict")
        have = coefficients(POLICIES[name](), NORMS[:40], device)
    assert np.allclose(have, want, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", POLICIES)
def test_single_precision(name) -> None:
    want = coefficients(POLICIES[name](), NORMS)
    have = coefficients(POLICIES[name](), NORMS, dtype="float32")
    assert np.allclose(have, want, rtol=1e-3)


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("at", [0, 3, 20])
def test_norms_that_are_not_finite_leave_no_trace(name, at) -> None:
    want = coefficients(POLICIES[name](), NORMS)
    spoilt = np.insert(NORMS, [at, at, at], [math.nan, math.inf, math.nan])
    have = coefficients(POLICIES[name](), spoilt)
    assert np.array_equal(np.delete(have, [at, at + 1, at + 2]), want)


def test_an_infinite_norm_clips_to_nothing_and_nan_shows() -> None:
    found = coefficients(AutoClip(50.0), [1.0, 2.0, math.inf, math.nan])
    assert found[2] == 0.0
    assert math.isnan(found[3])
    found = coefficients(ZClip(warmup=2), [1.0, 2.0, math.inf, 1.5])
    assert found[2] == 0.0
    assert found[3] == 1.0


def test_equal_norms_are_no_outliers() -> None:
    assert np.array_equal(coefficients(ZClip(warmup=3), [2.0] * 10), np.ones(10))
    found = coefficients(ZClip(warmup=3), [2.0] * 5 + [8.0, 2.0])
    assert found[5] == pytest.approx(0.25)  # without variance, to the mean
    assert np.array_equal(coefficients(ZClip(warmup=2), [0.0] * 5), np.ones(5))


@pytest.mark.parametrize("name", POLICIES)
def test_nothing_is_read_and_memory_stays_in_place(name) -> None:
    with counting() as counts:
        norms = [gg.tensor(np.float32(x), device="counting") for x in NORMS]
        policy = POLICIES[name]()
        m = norms[0].backend
        policy.coefficient(m, norms[0].data)
        memory = [id(x) for x in policy._memory.values()]
        counts.clear()
        for norm in norms[1:]:
            policy.coefficient(m, norm.data)
        assert (counts.host_reads, counts.uploads) == (0, 0)
        assert [id(x) for x in policy._memory.values()] == memory


@pytest.mark.parametrize("name", POLICIES)
def test_a_run_resumed_from_a_file_goes_on_as_if_nothing_had_happened(
    name, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(AutoClip, "FIRST", 4)  # so that it has grown by then
    want = coefficients(POLICIES[name](), NORMS)
    policy = POLICIES[name]()
    first = coefficients(policy, NORMS[:33])
    state = {k: v if isinstance(v, int) else v.numpy() for k, v in policy.state_dict().items()}
    io.save(tmp_path / "x.safetensors", *io.pack({"clip": state}))
    coefficients(policy, NORMS[33:50])  # what is saved does not change any more
    again = POLICIES[name]()
    again.load_state_dict(io.unpack(*io.load(tmp_path / "x.safetensors"))["clip"])
    assert {k: np.asarray(v).tolist() for k, v in again.state_dict().items()} == {
        k: np.asarray(v).tolist() for k, v in state.items()
    }, "before the first step"
    assert np.array_equal([*first, *coefficients(again, NORMS[33:])], want)


@pytest.mark.parametrize("name", POLICIES)
def test_copies_go_on_by_themselves(name) -> None:
    policy = POLICIES[name]()
    coefficients(policy, NORMS[:20])
    twins = [copy.deepcopy(policy), pickle.loads(pickle.dumps(policy))]
    want = coefficients(policy, NORMS[20:])
    for twin in twins:
        assert np.array_equal(coefficients(twin, NORMS[20:]), want)


def test_states_of_others_are_refused() -> None:
    policies = {name: make() for name, make in POLICIES.items()}
    for policy in policies.values():
        coefficients(policy, NORMS[:5])
    for name, message in (
        ("autoclip", "history is missing"),
        ("zclip", r"history is \(1024,\), here it is not"),
    ):
        other = policies["zclip" if name == "autoclip" else "autoclip"]
        with pytest.raises(ParameterError, match=f"{message}.*the state of another policy"):
            policies[name].load_state_dict(other.state_dict())
    with pytest.raises(ParameterError, match=r"history is \(1024,\), here it is \(9,\)"):
        policies["window"].load_state_dict(policies["autoclip"].state_dict())
    missing = policies["zclip"].state_dict()
    del missing["variance"]
    with pytest.raises(ParameterError, match="variance is missing"):
        policies["zclip"].load_state_dict(missing)


def test_nothing_seen_nothing_saved() -> None:
    for make in POLICIES.values():
        policy = make()
        assert policy.state_dict() == {}
        coefficients(policy, NORMS[:5])
        policy.load_state_dict({})
        assert policy.state_dict() == {}
        assert np.array_equal(coefficients(policy, NORMS), coefficients(make(), NORMS))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AutoClip(-1), "percentile is -1.0; it must be from 0 to 100"),
        (lambda: AutoClip(math.nan), "percentile"),
        (lambda: AutoClip("ten"), "percentile is a number, not str"),
        (lambda: AutoClip(window=0), "window is 0; it must be a whole number"),
        (lambda: AutoClip(window=2.5), "window"),
        (lambda: AutoClip(norm_type=0.2), "norm_type"),
        (lambda: ZClip(z=0), "z is 0.0"),
        (lambda: ZClip(z=math.inf), "z is inf"),
        (lambda: ZClip(alpha=1), "alpha is 1.0"),
        (lambda: ZClip(alpha=0), "alpha is 0.0"),
        (lambda: ZClip(alpha=math.nan), "alpha"),
        (lambda: ZClip(warmup=0), "warmup is 0"),
        (lambda: ZClip(warmup=True), "warmup is True"),
    ],
)
def test_bad_parameters(make, message) -> None:
    with pytest.raises(ParameterError, match=message):
        make()


def test_texts() -> None:
    assert repr(AutoClip()) == "AutoClip(percentile=10.0, window=None, norm_type=2.0)"
    assert repr(ZClip()) == "ZClip(z=2.5, alpha=0.97, warmup=25, norm_type=2.0)"
