"""Schedules: PyTorch's trajectories, per group, also after a restart from a saved state."""

import json
import math
import warnings

import numpy as np
import pytest

import gpugrad as gg
from gpugrad import nn, optim
from gpugrad.optim import lr_scheduler
from tests.backend.counting import counting

STEPS = 200


def two_groups(name="SGD", **options):
    a, b = (nn.Parameter(gg.tensor([1.0, -2.0])) for _ in range(2))
    groups = [{"params": [a]}, {"params": [b], "lr": 0.03}]
    return getattr(optim, name)(groups, **{"lr": 0.5, **options})


def torchs_two_groups(name="SGD", **options):
    import torch

    a, b = (torch.nn.Parameter(torch.tensor([1.0, -2.0])) for _ in range(2))
    groups = [{"params": [a]}, {"params": [b], "lr": 0.03}]
    return getattr(torch.optim, name)(groups, **{"lr": 0.5, **options})


def rates(optimizer):
    return [group["lr"] for group in optimizer.param_groups]


def momentums(optimizer):
    return [group.get("momentum", group.get("betas")) for group in optimizer.param_groups]


#: What makes a schedule, given a module like torch.optim.lr_scheduler and an optimiser.
SCHEDULES = {
    "lambda": lambda m, o: m.LambdaLR(o, lambda e: 0.97**e),
    "lambdas": lambda m, o: m.LambdaLR(o, [lambda e: 1 / (1 + e), lambda e: e % 7]),
    "multiplicative": lambda m, o: m.MultiplicativeLR(o, lambda e: 0.95 + 0.01 * (e % 3)),
    "multiplicatives": lambda m, o: m.MultiplicativeLR(o, [lambda e: 0.9, lambda e: 0.99]),
    "step": lambda m, o: m.StepLR(o, 30),
    "step by step": lambda m, o: m.StepLR(o, 1, gamma=0.9),
    "multi-step": lambda m, o: m.MultiStepLR(o, [5, 17, 60, 60, 150], gamma=0.3),
    "multi-step from 0": lambda m, o: m.MultiStepLR(o, [0, 3], gamma=0.5),
    "constant": lambda m, o: m.ConstantLR(o),
    "constant long": lambda m, o: m.ConstantLR(o, factor=0.2, total_iters=70),
    "linear": lambda m, o: m.LinearLR(o),
    "linear down": lambda m, o: m.LinearLR(o, 1.0, 0.0, 150),
    "linear long": lambda m, o: m.LinearLR(o, 0.01, 0.8, 333),
    "exponential": lambda m, o: m.ExponentialLR(o, 0.97),
    "exponential to nothing": lambda m, o: m.ExponentialLR(o, 0.01),
    "polynomial": lambda m, o: m.PolynomialLR(o),
    "polynomial long": lambda m, o: m.PolynomialLR(o, total_iters=180, power=2.3),
    "polynomial unfinished": lambda m, o: m.PolynomialLR(o, total_iters=900, power=0.5),
    "cosine": lambda m, o: m.CosineAnnealingLR(o, 200),
    "cosine waves": lambda m, o: m.CosineAnnealingLR(o, 13, eta_min=0.001),
    "cosine of one": lambda m, o: m.CosineAnnealingLR(o, 1, eta_min=0.001),
    "restarts": lambda m, o: m.CosineAnnealingWarmRestarts(o, 11, eta_min=0.002),
    "longer restarts": lambda m, o: m.CosineAnnealingWarmRestarts(o, 7, T_mult=2),
    "one cycle": lambda m, o: m.OneCycleLR(o, 0.7, total_steps=STEPS),
    "one cycle, of groups": lambda m, o: m.OneCycleLR(
        o, [0.7, 0.1], epochs=20, steps_per_epoch=10, pct_start=0.4, anneal_strategy="linear",
        base_momentum=[0.8, 0.7], max_momentum=[0.9, 0.99], div_factor=10.0, final_div_factor=100.0,
    ),
    "one cycle, three phases": lambda m, o: m.OneCycleLR(
        o, 0.7, total_steps=STEPS + 7, three_phase=True
    ),
    "one cycle, rates alone": lambda m, o: m.OneCycleLR(
        o, 0.7, total_steps=STEPS, cycle_momentum=False, pct_start=0.11
    ),
    "sequence": lambda m, o: m.SequentialLR(
        o,
        [m.LinearLR(o, 0.1, total_iters=10), m.ExponentialLR(o, 0.99), m.CosineAnnealingLR(o, 50)],
        [10, 60],
    ),
    "sequence of others": lambda m, o: m.SequentialLR(
        o,
        [m.ConstantLR(o, 0.1, 20), m.CosineAnnealingWarmRestarts(o, 9),
         m.LambdaLR(o, lambda e: 0.9**e), m.MultiplicativeLR(o, lambda e: 0.98),
         m.PolynomialLR(o, 30)],
        [20, 40, 90, 130],
    ),
    "sequence from 0": lambda m, o: m.SequentialLR(
        o, [m.ExponentialLR(o, 0.5), m.StepLR(o, 3, 0.9)], [0]
    ),
    "chain": lambda m, o: m.ChainedScheduler(
        [m.ConstantLR(o, 0.3, 25), m.ExponentialLR(o, 0.98), m.StepLR(o, 40, 0.5)]
    ),
    "chain of waves": lambda m, o: m.ChainedScheduler(
        [m.LinearLR(o, total_iters=30), m.CosineAnnealingLR(o, 90),
         m.MultiStepLR(o, [100, 150])]
    ),
}  # fmt: skip


def close(mine, theirs):
    return all(math.isclose(a, b, rel_tol=1e-12, abs_tol=1e-15) for a, b in zip(mine, theirs))


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_the_trajectory_is_pytorchs(name, optimizer) -> None:
    import torch

    options = {"momentum": 0.9} if optimizer == "SGD" else {}
    mine, theirs = two_groups(optimizer, **options), torchs_two_groups(optimizer, **options)
    schedule = SCHEDULES[name](lr_scheduler, mine)
    other = SCHEDULES[name](torch.optim.lr_scheduler, theirs)
    for step in range(STEPS):
        assert close(rates(mine), rates(theirs)), step
        assert close(np.ravel(momentums(mine)), np.ravel(momentums(theirs))), step
        assert schedule.get_last_lr() == rates(mine)
        assert all(type(rate) is float for rate in rates(mine))
        if step == STEPS // 2 and hasattr(other, "base_lrs"):
            assert close(schedule.base_lrs, other.base_lrs)
        if hasattr(other, "last_epoch"):
            assert schedule.last_epoch == other.last_epoch
        schedule.step()
        other.step()


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("middle", [1, 10, 77])
def test_a_loaded_state_goes_on_exactly(name, middle) -> None:
    straight, first, second = (two_groups(momentum=0.9) for _ in range(3))
    whole = SCHEDULES[name](lr_scheduler, straight)
    half = SCHEDULES[name](lr_scheduler, first)
    for _ in range(middle):
        whole.step()
        half.step()
    saved = json.loads(json.dumps([half.state_dict(), first.state_dict()], allow_nan=False))
    rest = SCHEDULES[name](lr_scheduler, second)
    rest.step()
    rest.load_state_dict(saved[0])
    second.load_state_dict(saved[1])
    assert rest.get_last_lr() == half.get_last_lr()
    assert rest.state_dict() == half.state_dict()
    for _ in range(middle, 100):
        whole.step()
        rest.step()
        assert rates(second) == rates(straight)
        assert momentums(second) == momentums(straight)


CLOSED = [
    "lambda", "step", "multi-step", "constant long", "linear long", "exponential", "polynomial",
    "cosine waves", "restarts", "longer restarts",
]  # fmt: skip


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", CLOSED)
def test_a_jump_to_an_epoch_is_pytorchs(name) -> None:
    import torch

    mine, theirs = two_groups(), torchs_two_groups()
    schedule = SCHEDULES[name](lr_scheduler, mine)
    other = SCHEDULES[name](torch.optim.lr_scheduler, theirs)
    for epoch in (40, 7, 0, 163, None, None, 3, None):
        schedule.step(epoch)
        other.step(epoch)
        assert close(rates(mine), rates(theirs)), epoch
        assert schedule.last_epoch == other.last_epoch


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", ["restarts", "longer restarts"])
def test_fractions_of_epochs_are_pytorchs(name) -> None:
    import torch

    mine, theirs = two_groups(), torchs_two_groups()
    schedule = SCHEDULES[name](lr_scheduler, mine)
    other = SCHEDULES[name](torch.optim.lr_scheduler, theirs)
    for i in range(150):
        schedule.step(i / 4)
        other.step(i / 4)
        assert close(rates(mine), rates(theirs)), i
    for _ in range(20):
        schedule.step()
        other.step()
        assert close(rates(mine), rates(theirs))


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", ["exponential", "cosine waves", "lambda", "polynomial long"])
def test_rates_that_others_changed_go_on_as_pytorchs(name) -> None:
    import torch

    mine, theirs = two_groups(), torchs_two_groups()
    schedule = SCHEDULES[name](lr_scheduler, mine)
    other = SCHEDULES[name](torch.optim.lr_scheduler, theirs)
    for step in range(60):
        if step in (5, 31):
            mine.param_groups[0]["lr"] = theirs.param_groups[0]["lr"] = 0.123
        schedule.step()
        other.step()
        assert close(rates(mine), rates(theirs)), step


@pytest.mark.torch
def test_going_on_from_a_last_epoch_is_pytorchs() -> None:
    import torch

    for name in ("exponential", "cosine waves", "lambda", "linear long", "polynomial long"):
        mine, theirs = two_groups(), torchs_two_groups()
        for optimizer in (mine, theirs):
            for group, lr in zip(optimizer.param_groups, (0.25, 0.02)):
                group["initial_lr"] = 0.5
                group["lr"] = lr
        kept = SCHEDULES[name]
        make = {
            "exponential": lambda m, o: m.ExponentialLR(o, 0.97, last_epoch=4),
            "cosine waves": lambda m, o: m.CosineAnnealingLR(o, 13, last_epoch=4),
            "lambda": lambda m, o: m.LambdaLR(o, lambda e: 0.97**e, last_epoch=4),
            "linear long": lambda m, o: m.LinearLR(o, total_iters=40, last_epoch=4),
            "polynomial long": lambda m, o: m.PolynomialLR(o, total_iters=40, last_epoch=4),
        }.get(name, kept)
        schedule, other = make(lr_scheduler, mine), make(torch.optim.lr_scheduler, theirs)
        for _ in range(30):
            assert close(rates(mine), rates(theirs)), name
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                other.step()
            schedule.step()


# -- a plateau ------------------------------------------------------------------------------------

PLATEAUS = [
    {},
    {"factor": 0.5, "patience": 3},
    {"mode": "max", "patience": 2, "threshold": 0.1},
    {"threshold_mode": "abs", "threshold": 0.05, "patience": 1, "factor": 0.7},
    {"mode": "max", "threshold_mode": "abs", "threshold": 0.05, "patience": 1},
    {"patience": 0, "cooldown": 4, "factor": 0.8, "min_lr": [0.01, 0.02]},
    {"patience": 1, "factor": 0.3, "min_lr": 0.005, "eps": 0.01},
]


@pytest.mark.torch
@pytest.mark.parametrize("options", PLATEAUS)
@pytest.mark.parametrize("middle", [None, 37])
def test_plateaus_are_pytorchs(options, middle) -> None:
    import torch

    measures = np.random.default_rng(0).random(STEPS) + np.linspace(1, 0, STEPS)
    measures[20] = math.nan
    mine, theirs = two_groups(), torchs_two_groups()
    schedule = optim.ReduceLROnPlateau(mine, **options)
    other = torch.optim.lr_scheduler.ReduceLROnPlateau(theirs, **options)
    for step, measure in enumerate(measures):
        assert schedule.get_last_lr() == other.get_last_lr() == rates(mine), step
        if step == middle:
            saved = json.loads(json.dumps(schedule.state_dict()))
            schedule = optim.ReduceLROnPlateau(mine, patience=99)
            schedule.load_state_dict(saved)
        schedule.step(gg.tensor(measure))
        other.step(measure)
        assert rates(mine) == rates(theirs), step


# -- training -------------------------------------------------------------------------------------

TRAININGS = [
    ("SGD", {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    ("SGD", {}),
    ("Adam", {"weight_decay": 0.01}),
    ("AdamW", {}),
    ("RMSprop", {"momentum": 0.5}),
    ("Adagrad", {"lr_decay": 0.01}),
]


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("name", "options"), TRAININGS)
@pytest.mark.parametrize("schedule", ["one cycle", "sequence", "step", "chain", "restarts"])
def test_parameters_go_where_pytorchs_go(name, options, schedule) -> None:
    import torch

    if schedule == "one cycle" and name == "Adagrad":
        schedule = "one cycle, rates alone"
    rng = np.random.default_rng(1)
    start, target = rng.standard_normal((2, 4, 3))
    x = rng.standard_normal((50, 8, 4))

    def train(library, tensor, parameter, schedulers):
        w, b = parameter(tensor(start)), parameter(tensor(np.zeros(3)))
        optimizer = getattr(library.optim, name)(
            [{"params": [w]}, {"params": [b], "lr": 0.02}], lr=0.05, **options
        )
        made = SCHEDULES[schedule](schedulers, optimizer)
        for batch in x:
            optimizer.zero_grad()
            y = tensor(batch) @ w + b
            ((y - tensor(batch @ target + 0.3)) ** 2).mean().backward()
            optimizer.step()
            made.step()
        return w.detach().numpy(), b.detach().numpy()

    mine = train(gg, gg.tensor, nn.Parameter, lr_scheduler)
    theirs = train(torch, torch.tensor, torch.nn.Parameter, torch.optim.lr_scheduler)
    for a, b in zip(mine, theirs):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


def test_lion_follows_its_schedule() -> None:
    """Each step of Lion changes every element by the learning rate of its time."""
    w = nn.Parameter(gg.tensor([0.0, 0.0]))
    optimizer = optim.Lion([w], lr=0.5)
    schedule = optim.StepLR(optimizer, 3, gamma=0.5)
    for _ in range(9):
        w.grad = gg.tensor([1.0, -1.0])
        optimizer.step()
        schedule.step()
    assert w.tolist() == [-3 * (0.5 + 0.25 + 0.125), 3 * (0.5 + 0.25 + 0.125)]


@pytest.mark.parametrize("name", ["one cycle", "sequence", "chain"])
def test_nothing_is_read_from_the_device(name) -> None:
    with counting() as counts:
        w = nn.Parameter(gg.tensor([1.0, 2.0], device="counting"))
        optimizer = optim.AdamW([{"params": [w]}], lr=0.5)
        schedule = SCHEDULES[name](lr_scheduler, optimizer)
        for _ in range(STEPS):
            w.grad = gg.tensor([1.0, -1.0], device="counting")
            optimizer.step(clip=1.0)
            schedule.step()
        assert counts.host_reads == 0


# -- the helper -----------------------------------------------------------------------------------


def test_warm_up_and_wave() -> None:
    optimizer = two_groups()
    schedule = optim.WarmupCosineLR(optimizer, 10, 50, eta_min=0.01)
    for step in range(80):
        for lr, base in zip(rates(optimizer), (0.5, 0.03)):
            if step < 10:
                want = base * (0.1 + 0.9 * step / 10)
            else:
                wave = (1 + math.cos(math.pi * (min(step, 50) - 10) / 40)) / 2
                want = 0.01 + (base - 0.01) * wave
            assert math.isclose(lr, want, rel_tol=1e-12), step
        assert schedule.last_epoch == step
        schedule.step()


def test_no_warm_up() -> None:
    optimizer = two_groups()
    schedule = optim.WarmupCosineLR(optimizer, 0, 4)
    seen = []
    for _ in range(5):
        seen.append(rates(optimizer)[0])
        schedule.step()
    assert np.allclose(seen, [0.5 * (1 + math.cos(math.pi * i / 4)) / 2 for i in range(5)])


def test_sequences_in_sequences() -> None:
    def inner(o):
        parts = [optim.ConstantLR(o, 0.5, 99), optim.ExponentialLR(o, 0.5)]
        return optim.SequentialLR(o, parts, [2])

    optimizer = two_groups()
    schedule = optim.SequentialLR(optimizer, [inner(optimizer), inner(optimizer)], [4])
    seen = []
    for _ in range(8):
        seen.append(rates(optimizer)[0])
        schedule.step()
    assert seen == [0.25, 0.25, 0.5, 0.25] * 2


def test_a_chain_in_a_sequence_begins_anew() -> None:
    optimizer = two_groups()
    chain = optim.ChainedScheduler(
        [optim.ConstantLR(optimizer, 0.5, 2), optim.ExponentialLR(optimizer, 0.5)]
    )
    schedule = optim.SequentialLR(optimizer, [optim.StepLR(optimizer, 1), chain], [2])
    seen = []
    for _ in range(5):
        seen.append(rates(optimizer)[0])
        schedule.step()
    assert np.allclose(seen, [0.5, 0.05, 0.25, 0.125, 0.125])


# -- the rest -------------------------------------------------------------------------------------


@pytest.mark.torch
def test_names_are_pytorchs() -> None:
    import torch

    theirs = set(torch.optim.lr_scheduler.__all__) - {"CyclicLR"}
    assert theirs - set(lr_scheduler.__all__) == set()
    for name in lr_scheduler.__all__:
        assert getattr(optim, name) is getattr(lr_scheduler, name)


def test_repr_shows_the_options() -> None:
    optimizer = two_groups()
    assert repr(optim.StepLR(optimizer, 3)) == "StepLR(step_size=3, gamma=0.1, last_epoch=0)"
    chain = optim.ChainedScheduler([optim.ExponentialLR(optimizer, 0.5)])
    assert repr(chain) == "ChainedScheduler(ExponentialLR(gamma=0.5, last_epoch=0))"


def test_numbers_of_numpy_become_plain() -> None:
    optimizer = two_groups()
    n, x = np.int64(7), np.float32(0.5)
    made = [
        optim.StepLR(optimizer, n, x), optim.MultiStepLR(optimizer, np.array([3, n]), x),
        optim.LinearLR(optimizer, x, x, n), optim.CosineAnnealingLR(optimizer, n, x),
        optim.CosineAnnealingWarmRestarts(optimizer, n, n, x),
        optim.OneCycleLR(optimizer, x, n), optim.ReduceLROnPlateau(optimizer, min_lr=x),
        optim.WarmupCosineLR(optimizer, n, 3 * n),
        optim.LambdaLR(optimizer, lambda epoch: np.float64(0.5)),
    ]  # fmt: skip
    for schedule in made:
        state = schedule.state_dict()
        assert json.loads(json.dumps(state)) == state


def test_the_last_rates_are_a_copy() -> None:
    schedule = optim.StepLR(two_groups(), 3)
    schedule.get_last_lr()[0] = 7.0
    schedule.state_dict()["base_lrs"][0] = 7.0
    assert schedule.get_last_lr()[0] == schedule.base_lrs[0] == 0.5


def test_a_state_that_does_not_fit_changes_nothing() -> None:
    optimizer = two_groups()
    schedule = optim.StepLR(optimizer, 3)
    before = schedule.state_dict()
    other = optim.SGD([nn.Parameter(gg.tensor([1.0]))])
    for state, words in [
        (optim.ExponentialLR(optimizer, 0.5).state_dict(), "another schedule: missing"),
        (optim.StepLR(other, 3).state_dict(), "1 parameter groups, here are 2"),
        ({}, "missing"),
    ]:
        with pytest.raises(optim.OptimizerError, match=words):
            schedule.load_state_dict(state)
    assert schedule.state_dict() == before

    def pair(gamma):
        parts = [optim.StepLR(optimizer, 3, gamma), optim.ExponentialLR(optimizer, gamma)]
        return optim.SequentialLR(optimizer, parts, [5])

    whole, bad = pair(0.5), pair(0.7).state_dict()
    before = whole.state_dict()
    bad["_schedulers"][1].pop("gamma")
    with pytest.raises(optim.OptimizerError, match="gamma"):
        whole.load_state_dict(bad)
    assert whole.state_dict() == before
    with pytest.raises(optim.OptimizerError, match="1 schedules, here are 2"):
        whole.load_state_dict({**before, "_schedulers": before["_schedulers"][:1]})


def test_a_group_that_comes_later() -> None:
    for make in (SCHEDULES["step"], SCHEDULES["restarts"]):
        optimizer = two_groups()
        schedule = make(lr_scheduler, optimizer)
        optimizer.add_param_group({"params": [nn.Parameter(gg.tensor([1.0]))]})
        with pytest.raises(optim.OptimizerError, match=r"2 parameter groups.*now has 3.*add_param"):
            schedule.step()
    plateau = optim.ReduceLROnPlateau(two_groups())
    plateau.optimizer.add_param_group({"params": [nn.Parameter(gg.tensor([1.0]))]})
    with pytest.raises(optim.OptimizerError, match="2 parameter groups"):
        plateau.step(1.0)


SGD = two_groups()
ADAGRAD = two_groups("Adagrad")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: optim.StepLR(None, 3), "StepLR: an optimiser is needed, not NoneType"),
        (lambda: optim.StepLR(SGD, 0), "step_size is 0; it must be a whole number, 1 or more"),
        (lambda: optim.StepLR(SGD, 2.5), "step_size is 2.5"),
        (lambda: optim.StepLR(SGD, 3, gamma=math.nan), "gamma is nan"),
        (lambda: optim.StepLR(SGD, 3, gamma=-0.1), "gamma is -0.1; it must be a number, finite"),
        (lambda: optim.ExponentialLR(SGD, math.inf), "gamma is inf"),
        (lambda: optim.ExponentialLR(SGD, "0.9"), "gamma is '0.9'"),
        (lambda: optim.MultiStepLR(SGD, [3], gamma=None), "gamma is None"),
        (lambda: optim.ConstantLR(SGD, factor=1.5), "factor is 1.5; it must be a number, from 0"),
        (
            lambda: optim.ConstantLR(SGD, total_iters=0),
            "total_iters is 0; it must be a number above",
        ),
        (lambda: optim.LinearLR(SGD, start_factor=0), "start_factor is 0"),
        (lambda: optim.LinearLR(SGD, end_factor=-1), "end_factor is -1"),
        (lambda: optim.PolynomialLR(SGD, total_iters=-1), "total_iters is -1"),
        (lambda: optim.PolynomialLR(SGD, power=-1), "power is -1"),
        (lambda: optim.CosineAnnealingLR(SGD, 0), "T_max is 0"),
        (lambda: optim.CosineAnnealingLR(SGD, 9, eta_min=math.nan), "eta_min is nan"),
        (lambda: optim.CosineAnnealingWarmRestarts(SGD, 0), "T_0 is 0"),
        (lambda: optim.CosineAnnealingWarmRestarts(SGD, 3, T_mult=0), "T_mult is 0"),
        (lambda: optim.CosineAnnealingWarmRestarts(SGD, 3).step(-1), "epoch is -1"),
        (lambda: optim.OneCycleLR(SGD, 0.1), "give total_steps, or epochs and steps_per_epoch"),
        (lambda: optim.OneCycleLR(SGD, 0.1, total_steps=0), "total_steps is 0"),
        (lambda: optim.OneCycleLR(SGD, 0.1, epochs=3, steps_per_epoch=-1), "steps_per_epoch is -1"),
        (lambda: optim.OneCycleLR(SGD, math.nan, 9), "max_lr is nan"),
        (lambda: optim.OneCycleLR(SGD, [0.1], 9), "max_lr has 1 values for 2 groups"),
        (lambda: optim.OneCycleLR(SGD, 0.1, 9, pct_start=1.5), "pct_start is 1.5"),
        (lambda: optim.OneCycleLR(SGD, 0.1, 9, anneal_strategy="sin"), "'cos' or 'linear', not 's"),
        (lambda: optim.OneCycleLR(SGD, 0.1, 9, max_momentum=1.1), "max_momentum is 1.1"),
        (lambda: optim.OneCycleLR(SGD, 0.1, 9, div_factor=0), "div_factor is 0"),
        (lambda: optim.OneCycleLR(ADAGRAD, 0.1, 9), "neither momentum nor betas; pass cycle_mom"),
        (lambda: optim.LambdaLR(SGD, [lambda e: 1.0]), "lr_lambda has 1 values for 2 groups"),
        (lambda: optim.LambdaLR(SGD, 0.5), "lr_lambda is a function of the epoch, not 0.5"),
        (
            lambda: optim.LambdaLR(SGD, lambda e: math.nan),
            r"LambdaLR: the learning rate of group 0 in epoch 0 would be nan",
        ),
        (lambda: optim.LambdaLR(SGD, [lambda e: 1.0, lambda e: -1.0]), "group 1 in epoch 0"),
        (lambda: optim.ReduceLROnPlateau(SGD, mode="less"), "mode is 'min' or 'max', not 'less'"),
        (lambda: optim.ReduceLROnPlateau(SGD, threshold_mode="x"), "'rel' or 'abs', not 'x'"),
        (lambda: optim.ReduceLROnPlateau(SGD, factor=1.0), "factor is 1.0; it must be at least 0"),
        (lambda: optim.ReduceLROnPlateau(SGD, factor=math.nan), "factor is nan"),
        (lambda: optim.ReduceLROnPlateau(SGD, patience=-1), "patience is -1"),
        (lambda: optim.ReduceLROnPlateau(SGD, min_lr=[1.0]), "min_lr has 1 values for 2 groups"),
        (lambda: optim.ReduceLROnPlateau(SGD, min_lr=-1.0), "min_lr is -1.0"),
        (lambda: optim.SequentialLR(SGD, [], []), "there are no schedules"),
        (lambda: optim.SequentialLR(SGD, [SGD], []), "number 0 is no schedule, but SGD"),
        (lambda: optim.SequentialLR(SGD, [optim.StepLR(SGD, 3)], [2]), "1 schedules need 0 mile"),
        (lambda: optim.SequentialLR(SGD, [optim.StepLR(SGD, 3) for _ in range(3)], [5, 2]), "rise"),
        (lambda: optim.SequentialLR(SGD, [optim.StepLR(ADAGRAD, 3)], []), "another optimiser"),
        (lambda: optim.SequentialLR(SGD, [optim.StepLR(SGD, 3)], [], last_epoch=4), "load the sta"),
        (lambda: optim.ChainedScheduler([optim.ReduceLROnPlateau(SGD)]), "step it apart"),
        (lambda: optim.WarmupCosineLR(SGD, 5, 5), "warmup_steps is 5 of 5"),
        (lambda: optim.WarmupCosineLR(SGD, -1, 5), "warmup_steps is -1"),
        (lambda: optim.StepLR(two_groups(), 3, last_epoch=4), "group 0 has no 'initial_lr'"),
    ],
)
def test_refusals(make, words) -> None:
    with pytest.raises(optim.OptimizerError) as caught:
        make()
    assert words in str(caught.value)


def test_a_cycle_that_is_over() -> None:
    optimizer = two_groups()
    schedule = optim.OneCycleLR(optimizer, 0.1, total_steps=5)
    for _ in range(4):
        schedule.step()
    last = rates(optimizer)
    schedule.step()  # the usual loop calls it after the last batch, too
    assert rates(optimizer) == last == [0.1 / 25 / 1e4] * 2
    with pytest.raises(optim.OptimizerError, match=r"this is step 6 of 5; make the cycle longer"):
        schedule.step()
