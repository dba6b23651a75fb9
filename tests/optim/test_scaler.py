"""GradScaler: PyTorch's trajectory and order of calls, and no look at the device's values."""

import copy
import math
import pickle

import numpy as np
import pytest

import gpugrad as gg
from gpugrad import nn, optim
from gpugrad.errors import DTypeError, GpugradError, InplaceError, ParameterError
from gpugrad.optim.scaler import GradScaler, ScalerError
from tests.backend.counting import counting
from tests.backend.test_libraries import jax_device  # noqa: F401

SETTINGS = {
    "init_scale": 1024.0,
    "growth_factor": 4.0,
    "backoff_factor": 0.25,
    "growth_interval": 3,
}
#: Steps in which a gradient is infinite or NaN.
BAD = {4: math.inf, 5: math.nan, 6: -math.inf, 11: math.inf, 20: math.nan}


def slope(step):
    return BAD.get(step, 0.5 + 0.25 * (step % 4))


def trained(form, steps=30, device="cpu", settings=SETTINGS, dtype="float32"):
    """The scale, the parameter and the counter after every step."""
    w = nn.Parameter(gg.tensor(np.array([1.0, -2.0], dtype), device=device))
    optimizer = optim.SGD([w], lr=0.125, momentum=0.5)
    scaler = GradScaler(**settings)
    seen = []
    for step in range(steps):
        optimizer.zero_grad()
        weights = gg.tensor(np.array([slope(step), 0.5], dtype), device=device)
        scaler.scale(gg.sum(weights * w)).backward()
        if form == "short":
            optimizer.step(scaler=scaler, nonfinite="skip")
        else:
            if form == "unscale_":
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        seen.append((scaler._scale, scaler._tracker, w.detach()))
        seen[-1] = tuple(gg.tensor(x) for x in seen[-1])  # as they are now
    return seen


def read(seen):
    return [(s.item(), t.item(), w.tolist()) for s, t, w in seen]


@pytest.mark.torch
@pytest.mark.parametrize("form", ["short", "step", "unscale_"])
def test_the_trajectory_is_pytorchs(form) -> None:
    import torch

    w = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = torch.optim.SGD([w], lr=0.125, momentum=0.5)
    scaler = torch.amp.GradScaler("cpu", **SETTINGS)
    theirs = []
    for step in range(30):
        optimizer.zero_grad()
        scaler.scale((torch.tensor([slope(step), 0.5]) * w).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        theirs.append((scaler.get_scale(), scaler._get_growth_tracker(), w.tolist()))
    assert read(trained(form)) == theirs
    assert len({scale for scale, _, _ in theirs}) > 4


@pytest.mark.parametrize("form", ["short", "step", "unscale_"])
def test_other_libraries(form, jax_device) -> None:  # noqa: F811
    want = read(trained(form))
    assert read(trained(form, device=jax_device)) == want
    pytest.importorskip("array_api_strict")
    assert read(trained(form, device="strict:device1")) == want


@pytest.mark.parametrize("form", ["short", "step", "unscale_"])
def test_nothing_is_read_from_the_device(form) -> None:
    with counting() as counts:
        seen = trained(form, 12, "counting")
        assert counts.host_reads == 0
        assert read(seen) == read(trained(form, 12))


def test_the_scale_is_never_sent_again() -> None:
    with counting() as counts:
        w = nn.Parameter(gg.ones(3, dtype="float32", device="counting"))
        optimizer = optim.SGD([w], lr=0.1)
        scaler = GradScaler()
        for _ in range(5):
            optimizer.zero_grad()
            scaler.scale(gg.sum(w * w)).backward()
            counts.clear()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_([w], 1.0)
            scaler.step(optimizer)
            scaler.update()
            assert (counts.host_reads, counts.uploads) == (0, 0)


def test_no_growth_beyond_single_precision_and_no_warning() -> None:
    settings = {**SETTINGS, "init_scale": 1e38, "growth_interval": 1}
    assert [scale for scale, _, _ in read(trained("step", 2, settings=settings))] == [
        float(np.float32(1e38))
    ] * 2


def test_clipping_sees_unscaled_gradients() -> None:
    found = []
    for form in ("short", "step", "unscale_"):
        w = nn.Parameter(gg.tensor([0.0, 0.0]))
        optimizer = optim.SGD([w], lr=1.0)
        scaler = GradScaler()
        scaler.scale(gg.sum(w * gg.tensor([3.0, 4.0]))).backward()
        if form == "short":
            optimizer.step(scaler=scaler, clip=1.0)
        elif form == "step":
            scaler.step(optimizer, clip=1.0)
        else:
            scaler.unscale_(optimizer)
            assert nn.utils.clip_grad_norm_([w], 1.0).item() == 5.0
            scaler.step(optimizer)
        found.append(w.tolist())
    assert np.allclose(found, [[-0.6, -0.8]] * 3)


def test_what_unscale_found_counts_after_clipping_has_hidden_it() -> None:
    w = nn.Parameter(gg.tensor([1.0, 1.0]))
    optimizer = optim.SGD([w], lr=1.0)
    scaler = GradScaler(init_scale=8.0)
    scaler.scale(gg.sum(w * gg.tensor([math.inf, 1.0]))).backward()
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_value_([w], 1.0)
    assert w.grad.tolist() == [1.0, 1.0]
    scaler.step(optimizer)
    scaler.update()
    assert w.tolist() == [1.0, 1.0]
    assert scaler.get_scale() == 4.0


def test_two_optimisers_share_a_scale() -> None:
    a, b = nn.Parameter(gg.tensor(1.0)), nn.Parameter(gg.tensor(1.0))
    first, second = optim.SGD([a], lr=1.0), optim.SGD([b], lr=1.0)
    scaler = GradScaler(init_scale=8.0)
    for slope_of_b, scale in ((math.nan, 4.0), (2.0, 4.0)):
        for optimizer in (first, second):
            optimizer.zero_grad()
        losses = scaler.scale([a * 0.5, b * slope_of_b])
        for loss in losses:
            loss.backward()
        scaler.unscale_(second)
        scaler.step(first)
        scaler.step(second)
        scaler.update()
        assert scaler.get_scale() == scale
    assert (a.item(), b.item()) == (0.0, -1.0)
    assert scaler.state_dict()["_growth_tracker"] == 1


@pytest.mark.parametrize("bad", [0, 1, 2])
@pytest.mark.parametrize("form", ["short", "step", "unscale_"])
def test_one_bad_gradient_among_several(form, bad) -> None:
    params = [nn.Parameter(gg.ones(2)) for _ in range(3)]
    optimizer = optim.SGD(params, lr=1.0)
    scaler = GradScaler(init_scale=8.0)
    slopes = [math.inf if i == bad else 1.0 for i in range(3)]
    scaler.scale(sum(gg.sum(p) * s for p, s in zip(params, slopes))).backward()
    if form == "short":
        optimizer.step(scaler=scaler)
    else:
        if form == "unscale_":
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 4.0
    assert all(p.tolist() == [1.0, 1.0] for p in params)


@pytest.mark.parametrize("form", ["short", "step", "unscale_"])
def test_a_loss_on_another_device(form) -> None:
    pytest.importorskip("array_api_strict")
    w = nn.Parameter(gg.ones(2, device="strict:device1"))
    optimizer = optim.SGD([w], lr=1.0)
    scaler = GradScaler(init_scale=8.0)
    for slope, scale in ((2.0, 8.0), (math.nan, 4.0)):
        optimizer.zero_grad()
        scaler.scale(gg.sum(w.to("strict:device2")) * slope).backward()
        if form == "short":
            optimizer.step(scaler=scaler)
        else:
            if form == "unscale_":
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        assert scaler._scale.device == "strict:device2"
        assert (scaler.get_scale(), w.tolist()) == (scale, [-1.0, -1.0])


def test_float16_parameters() -> None:
    """Their gradients cannot be held unscaled, but a step unscales them in float32."""
    for form in ("short", "step"):
        w = nn.Parameter(gg.tensor(np.array([1.0], np.float16)))
        optimizer = optim.SGD([w], lr=1e6)
        scaler = GradScaler(init_scale=2.0**14)
        x = gg.sum(w.to(dtype="float32") * 1e-8)  # float16 would hold 0
        scaler.scale(x).backward()
        assert w.grad.item() > 0
        with pytest.raises(DTypeError, match="unscale_: gradients of float16"):
            scaler.unscale_(optimizer)
        if form == "short":
            optimizer.step(scaler=scaler)
        else:
            scaler.step(optimizer)
        assert w.item() == pytest.approx(0.99, abs=1e-3)


def test_scaling_many_outputs() -> None:
    scaler = GradScaler(init_scale=4.0)
    x = gg.tensor(2.0)
    pair = scaler.scale((x, [x, x]))
    assert isinstance(pair, tuple) and isinstance(pair[1], list)
    assert pair[1][1].item() == 8.0
    assert [y.item() for y in scaler.scale(iter([x, x]))] == [8.0, 8.0]
    assert scaler.scale(gg.tensor(2.0, dtype="float64")).dtype == np.float64
    with pytest.raises(DTypeError, match="a tensor or an iterable of them, not float"):
        scaler.scale(3.0)


# -- the order of calls ----------------------------------------------------------------------------


def ready(scaled=True):
    w = nn.Parameter(gg.tensor([1.0]))
    scaler, optimizer = GradScaler(), optim.SGD([w], lr=0.1)
    if scaled:
        scaler.scale(gg.sum(w)).backward()
    return scaler, optimizer, w


def test_unscaling_twice() -> None:
    scaler, optimizer, w = ready()
    scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match=r"unscale_\(\) has already been called on this optim"):
        scaler.unscale_(optimizer)
    assert w.grad.item() == 1.0
    scaler.step(optimizer)
    scaler.update()
    w.grad = None
    scaler.scale(gg.sum(w)).backward()
    scaler.unscale_(optimizer)
    assert w.grad.item() == 1.0


def test_unscaling_after_the_step() -> None:
    scaler, optimizer, _ = ready()
    scaler.step(optimizer)
    with pytest.raises(RuntimeError, match=r"unscale_\(\) is being called after step\(\)"):
        scaler.unscale_(optimizer)


def test_stepping_twice() -> None:
    scaler, optimizer, _ = ready()
    scaler.step(optimizer)
    with pytest.raises(RuntimeError, match=r"step\(\) has already been called since the last upd"):
        scaler.step(optimizer)


@pytest.mark.parametrize("call", ["unscale_", "step"])
def test_both_forms_in_one_step(call) -> None:
    scaler, optimizer, w = ready()
    getattr(scaler, call)(optimizer)
    before = w.item()
    with pytest.raises(ScalerError, match=r"would unscale twice; finish with scaler\.step"):
        optimizer.step(scaler=scaler)
    assert w.item() == before


def test_updating_without_a_step() -> None:
    scaler, optimizer, _ = ready()
    with pytest.raises(ScalerError, match="no gradients were checked since the last one"):
        scaler.update()
    optimizer.step(scaler=scaler)
    with pytest.raises(ScalerError, match=r"optimizer\.step\(scaler=…\) updates the scale by itse"):
        scaler.update()
    scaler.update(2.0)
    assert scaler.get_scale() == 2.0


def test_a_loss_that_was_not_scaled() -> None:
    scaler, optimizer, w = ready(scaled=False)
    w.grad = gg.tensor([1.0])
    for call in (
        lambda: scaler.unscale_(optimizer),
        lambda: scaler.step(optimizer),
        lambda: optimizer.step(scaler=scaler),
        scaler.update,
    ):
        with pytest.raises(ScalerError, match=r"call scaler\.scale\(loss\)\.backward\(\)"):
            call()
    assert w.item() == 1.0


def test_no_gradients() -> None:
    scaler, optimizer, w = ready()
    w.grad = None
    with pytest.raises(ScalerError, match="no parameter of this optimizer has a gradient"):
        scaler.step(optimizer)
    assert issubclass(ScalerError, GpugradError)


def test_a_closure() -> None:
    scaler, optimizer, _ = ready()
    for call in (
        lambda: scaler.step(optimizer, lambda: None),
        lambda: scaler.step(optimizer, closure=lambda: None),
    ):
        with pytest.raises(ScalerError, match="closure use is not supported"):
            call()


def test_a_graph_that_was_scaled_before_the_scale_changed() -> None:
    scaler, optimizer, w = ready(scaled=False)
    x = gg.sum(w)
    late = scaler.scale(x * x)
    scaler.scale(gg.sum(w * math.nan)).backward()
    optimizer.step(scaler=scaler)
    with pytest.raises(InplaceError):
        late.backward()


# -- setting and saving ----------------------------------------------------------------------------


def test_a_new_scale() -> None:
    scaler, optimizer, _ = ready()
    scaler.step(optimizer)
    scaler.update(new_scale=16.0)
    assert scaler.get_scale() == 16.0
    new = gg.tensor([32.0])
    scaler.update(new)
    new[0] = 1.0
    assert scaler.get_scale() == 32.0
    for bad in (gg.ones(2), gg.tensor(1.0, requires_grad=True)):
        with pytest.raises(ParameterError, match="a tensor of one element that requires no grad"):
            scaler.update(bad)


def test_disabled() -> None:
    scaler = GradScaler(growth_factor=0.0, enabled=False)
    w = nn.Parameter(gg.tensor([1.0]))
    loss = gg.sum(2.0 * w)
    assert scaler.scale(loss) is loss
    loss.backward()
    optimizer = optim.SGD([w], lr=0.25)
    scaler.unscale_(optimizer)
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    optimizer.step(scaler=scaler)
    scaler.update()
    assert w.item() == 0.0
    assert not scaler.is_enabled()
    assert GradScaler().is_enabled()
    assert scaler.get_scale() == 1.0
    assert scaler.state_dict() == {}
    scaler.load_state_dict({"scale": 3.0})


@pytest.mark.torch
def test_states_are_pytorchs() -> None:
    import torch

    theirs = torch.amp.GradScaler("cpu", **SETTINGS)
    state = {**theirs.state_dict(), "scale": 512.0, "_growth_tracker": 2}
    theirs.load_state_dict(state)
    for scaled in (False, True):
        scaler = ready(scaled)[0]
        scaler.load_state_dict(state)
        assert scaler.state_dict() == theirs.state_dict() == state
        w = nn.Parameter(gg.tensor([1.0]))
        optimizer = optim.SGD([w], lr=0.1)
        scaler.scale(gg.sum(w)).backward()
        assert w.grad.item() == 512.0
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == 2048.0  # the third good step
    with pytest.raises(ScalerError, match="the state is empty"):
        GradScaler().load_state_dict({})


def test_copies() -> None:
    scaler, optimizer, _ = ready()
    scaler.step(optimizer)
    scaler.update(8.0)
    for twin in (copy.deepcopy(scaler), pickle.loads(pickle.dumps(scaler))):
        scaler.update(16.0)
        assert twin.get_scale() == 8.0
        scaler.update(8.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"init_scale": 0.0}, "init_scale is 0.0; it must be positive and finite"),
        ({"init_scale": math.inf}, "init_scale"),
        ({"init_scale": math.nan}, "init_scale"),
        ({"growth_factor": 1.0}, "growth_factor is 1.0; it must be more than 1"),
        ({"growth_factor": math.inf}, "growth_factor"),
        ({"backoff_factor": 1.0}, "backoff_factor is 1.0; it must be between 0 and 1"),
        ({"backoff_factor": 0.0}, "backoff_factor"),
        ({"growth_interval": 0}, "growth_interval is 0; it must be one at least"),
    ],
)
def test_bad_settings(settings, message) -> None:
    with pytest.raises(ParameterError, match=message):
        GradScaler(**settings)
