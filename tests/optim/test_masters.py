"""Parameters stored in two bytes: updates run on their masters, which are float32."""

import numpy as np
import pytest

import gpugrad as gg
from gpugrad import nn, optim
from gpugrad.nn.errors import StateDictError
from tests.backend.counting import counting
from tests.backend.test_libraries import jax_device  # noqa: F401

SHAPES = [(9_000,), (3, 5), ()]
RULES = [
    lambda p: optim.SGD(p, lr=0.1),
    lambda p: optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    lambda p: optim.AdamW(p, lr=0.01),
    lambda p: optim.RMSprop(p, momentum=0.8, centered=True),
    lambda p: optim.Adagrad(p, lr=0.1, initial_accumulator_value=0.3),
    lambda p: optim.Lion(p),
]


def narrow(values, dtype):
    return gg.tensor(np.asarray(values, np.float32)).to(dtype)


def start(dtype, device=None):
    rng = np.random.default_rng(0)
    values = [rng.standard_normal(shape) for shape in SHAPES]
    return [nn.Parameter(narrow(x, dtype).to(device or "cpu")) for x in values]


def give(params, step, dtype):
    """Gradients of a step, the same values whatever holds them."""
    rng = np.random.default_rng([1, step])
    for p in params:
        g = narrow(rng.standard_normal(p.shape), dtype)
        p.grad = g.to(p.device, p.dtype)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("make", RULES)
@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("mode", ["off", "require"])
def test_parameters_are_a_float32_run_rounded(dtype, make, clip, mode) -> None:
    params, wide = start(dtype), [nn.Parameter(p.detach().to("float32")) for p in start(dtype)]
    optimizer, reference = make(params), make(wide)
    with gg.use_kernels(mode):
        for step in range(5):
            for run, its in ((optimizer, params), (reference, wide)):
                give(its, step, dtype)
                run.step(clip=clip)
    for p, q in zip(params, wide):
        state = optimizer.state[p]
        assert {state[name].dtype.name for name in state if name != "step"} == {"float32"}
        assert np.array_equal(state["master"].numpy(), q.detach().numpy())
        assert p.dtype.name == dtype
        assert np.array_equal(p.detach().numpy(), q.detach().to(dtype).numpy())


def test_steps_too_small_for_two_bytes_add_up() -> None:
    p = nn.Parameter(narrow([1.0, 2.0], "bfloat16"))
    optimizer = optim.SGD([p], lr=1e-4)  # the neighbours of 1 are 0.004 and 0.008 away
    for _ in range(1000):
        p.grad = narrow([1.0, -1.0], "bfloat16")
        optimizer.step()
    assert np.allclose(p.detach().numpy().astype(float), [0.9, 2.1], atol=0.008)


def test_what_was_changed_since_counts_as_it_is() -> None:
    p = nn.Parameter(narrow([1.0, 2.0, 3.0], "float16"))
    optimizer = optim.SGD([p], lr=1e-5)
    give([p], 0, "float16")
    optimizer.step()
    held = optimizer.state[p]["master"].numpy().copy()
    p.data[1] = 7.0
    p.grad = narrow([0.0, 0.0, 0.0], "float16")
    optimizer.step()
    assert p.detach().numpy().tolist() == [1.0, 7.0, 3.0]
    assert optimizer.state[p]["master"].numpy().tolist() == [held[0], 7.0, held[2]]
    net = nn.Linear(2, 2).to("float16")
    optimizer = optim.AdamW(net.parameters())
    saved = {name: x.detach().numpy().copy() for name, x in net.state_dict().items()}
    give(net.parameters(), 0, "float16")
    optimizer.step()
    net.load_state_dict({name: gg.tensor(x) for name, x in saved.items()})
    for x in net.parameters():
        x.grad = narrow(np.zeros(x.shape), "float16")
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    for name, x in net.state_dict().items():
        assert np.array_equal(x.numpy(), saved[name])


@pytest.mark.parametrize("nonfinite", ["skip", "zero", "propagate"])
def test_gradients_that_are_not_finite(nonfinite) -> None:
    p = nn.Parameter(narrow([1.0, 2.0], "float16"))
    optimizer = optim.SGD([p], lr=0.5)
    p.grad = narrow([np.inf, 1.0], "float16")
    optimizer.step(nonfinite=nonfinite)
    wanted = {"skip": [1.0, 2.0], "zero": [1.0, 1.5], "propagate": [-np.inf, 1.5]}[nonfinite]
    assert p.detach().numpy().tolist() == wanted
    assert optimizer.state[p]["master"].numpy().tolist() == wanted


def test_a_loss_scale_reaches_below_float16() -> None:
    p = nn.Parameter(narrow([1.0], "float16"))
    optimizer, scaler = optim.SGD([p], lr=1.0), optim.GradScaler(init_scale=2.0**16)
    for _ in range(4):
        optimizer.zero_grad()
        scaler.scale(gg.sum(p.to("float32") * 1e-7)).backward()
        optimizer.step(scaler=scaler)
    assert np.isclose(1 - optimizer.state[p]["master"].item(), 4e-7, rtol=0.2)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_going_on_from_a_state_dict_changes_no_bit(dtype) -> None:
    def run(params, optimizer, steps):
        for step in steps:
            give(params, step, dtype)
            optimizer.step(clip=1.0)
        return [p.detach().numpy().copy() for p in params]

    params = start(dtype)
    optimizer = optim.AdamW(params)
    run(params, optimizer, range(3))
    copies = [nn.Parameter(gg.tensor(p.detach().numpy().copy())) for p in params]
    again = optim.AdamW(copies)
    again.load_state_dict(optimizer.state_dict())
    for a, b in zip(run(params, optimizer, range(3, 6)), run(copies, again, range(3, 6))):
        assert np.array_equal(a, b)
    for p, q in zip(params, copies):
        assert np.array_equal(
            optimizer.state[p]["master"].numpy(), again.state[q]["master"].numpy()
        )


def test_a_narrow_state_without_masters_loads() -> None:
    p = nn.Parameter(narrow([1.0, 2.0], "bfloat16"))
    optimizer = optim.AdamW([p])
    mean = narrow([0.5, 0.25], "bfloat16")
    state = {"step": 3, "exp_avg": mean, "exp_avg_sq": mean * mean}
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": {0: state}, "param_groups": groups})
    p.grad = narrow([0.0, 0.0], "bfloat16")
    optimizer.step()
    assert optimizer.state[p]["exp_avg"].dtype == np.float32
    assert np.allclose(optimizer.state[p]["exp_avg"].numpy(), [0.45, 0.225])
    assert optimizer.state_dict()["state"][0]["step"] == 4
    wrong = {**optimizer.state_dict()["state"][0], "master": narrow([1.0, 2.0], "bfloat16")}
    with pytest.raises(
        StateDictError, match=r"wrong dtype: 0\.master is bfloat16, expected float32"
    ):
        optimizer.load_state_dict({"state": {0: wrong}, "param_groups": groups})


def test_nothing_is_read_from_the_device() -> None:
    with counting() as counts:
        params = start("float16", "counting")
        optimizer = optim.AdamW(params)
        give(params, 0, "float16")
        optimizer.step(clip=1.0)
        optimizer.step(clip=1.0, nonfinite="skip")
        assert counts.host_reads == 0


def test_arrays_that_cannot_change(jax_device) -> None:  # noqa: F811
    params, there = start("bfloat16"), start("bfloat16", jax_device)
    for its in (params, there):
        optimizer = optim.AdamW(its, lr=0.01)
        for step in range(3):
            give(its, step, "bfloat16")
            optimizer.step(clip=1.0)
        assert {optimizer.state[p]["master"].dtype.name for p in its} == {"float32"}
    for p, q in zip(params, there):
        assert np.array_equal(p.detach().numpy(), np.asarray(q.data))
