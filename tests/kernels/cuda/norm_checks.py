"""What the kernels of normalisation must compute, whatever runs them: see checks.py."""

from __future__ import annotations

import math

import numpy as np

import gpugrad as gg
from gpugrad.backend import backend_for_device
from gpugrad.core.primitive import registry
from gpugrad.kernels.cuda import norm_launch
from gpugrad.ops import normalization
from tests.kernels.cuda.checks import ARITHMETIC, DTYPES, EPS, same, wide

numpy = backend_for_device("cpu")


def generic(function, *args, **parameters):
    """What the generic text makes of raw arrays."""
    with gg.use_kernels("off"), np.errstate(all="ignore"):
        return function(numpy, *args, **parameters)


def random(storage, shape, seed, shift=0, mean=0.5):
    drawn = np.random.default_rng(seed).standard_normal(math.prod(shape) + shift) + mean
    return drawn.astype(DTYPES[storage])[shift:].reshape(shape)


def near(got, want, storage, terms=1.0):
    """Equal but for one rounding to the storage, and some of numbers of a few units."""
    got, want = wide(got), wide(want)
    assert got.shape == want.shape
    slack = 1.01 * EPS[storage] * np.abs(want) + 100 * terms * ARITHMETIC[storage]
    assert np.array_equal(np.isnan(got), np.isnan(want))
    bad = np.abs(got - want) > slack
    assert not bad.any(), f"got {got[bad][:5]}, wanted {want[bad][:5]}"


def operands(kind, storage, shape, shift):
    parameter = shape[-1:] if kind in ("layer", "rms") else shape[1:2]
    x, residual, g, also = (random(storage, shape, seed, shift) for seed in range(4))
    w, b = (random(storage, parameter, seed, shift, mean=1.0) for seed in (4, 5))
    return x, residual, g, also, w, b


def check_norm(
    kind, storage, put=same, get=same, shape=(5, 13), shift=0, groups=None, residual=False,
    affine=True, needs=(True, True, True),
):  # fmt: skip
    """Forward, statistics and backward of layer, RMS and group norm."""
    x, r, g, also, w, b = operands(kind, storage, shape, shift)
    size = {"groups": groups} if kind == "group" else {"axes": 1}
    given = [w, b][: 1 if kind == "rms" else 2] if affine else []
    before = [x, r] if residual else [x]
    name = f"{'add_' * residual}{kind}_norm"
    y, *more = norm_launch.KERNELS[name].run(numpy, *map(put, (*before, *given)), **size)
    true = generic(registry[name].forward, *map(wide, (*before, *given)), **size)
    assert get(y).dtype == DTYPES[storage]
    total = x
    if residual:
        total = get(more[0])
        assert np.array_equal(total, (x.astype(total.dtype) + r).astype(total.dtype))
        true = generic(registry[f"{kind}_norm"].forward, *map(wide, (total, *given)), **size)
        more = []
    near(get(y), true[0], storage)
    for mine, theirs in zip(more, true[1:]):
        assert get(mine).shape == theirs.shape
    if len(more) == 3:  # a mean and what rounding left of it
        near(sum(wide(get(v)) for v in more[:2]), true[1] + true[2], "float32")
    if more:
        np.testing.assert_allclose(get(more[-1]), true[-1], rtol=1e-5)

    backward = f"{kind}_norm_backward"
    weight = w if affine else None
    needs = needs[: 2 if kind == "rms" else 3]
    needs = needs if affine else (needs[0], *(False for _ in needs[1:]))
    found = norm_launch.KERNELS[backward].run(
        numpy, put(g), put(total), None if weight is None else put(w), more or None,
        groups or 1, 1e-5, needs, put(also) if residual else None,
    )  # fmt: skip
    want = generic(
        getattr(normalization, backward), wide(g), wide(total), None if weight is None else wide(w),
        None, groups or 1, 1e-5, needs, wide(also) if residual else None,
    )  # fmt: skip
    compare(found, want, storage, get, x.size)


def compare(found, want, storage, get, terms):
    assert [v is None for v in found] == [v is None for v in want]
    for k, (mine, theirs) in enumerate(zip(found, want)):
        if theirs is not None:
            mine = get(mine)
            assert mine.dtype == DTYPES[storage]
            near(mine, theirs, storage, 4.0 if k == 0 else 1.0 + terms / max(theirs.size, 1))


def check_batch(storage, put=same, get=same, shape=(5, 13), shift=0, needs=(True, True, True)):
    """Moments, training and inference of batch norm, forward and backward."""
    x, _, g, _, w, b = operands("batch", storage, shape, shift)
    number = "float64" if storage == "float64" else "float32"
    run = {name: kernel.run for name, kernel in norm_launch.KERNELS.items()}
    moments = run["batch_moments"](numpy, put(x))
    mean, rest, var = generic(registry["batch_moments"].forward, wide(x))
    assert all(get(v).dtype == number and get(v).shape == mean.shape for v in moments)
    near(wide(get(moments[0])) + wide(get(moments[1])), mean + rest, number)
    near(get(moments[2]), var, number)

    y, *statistics = run["batch_norm_training"](numpy, *map(put, (x, w, b)), moments=moments)
    near(
        get(y), generic(registry["batch_norm_training"].forward, *map(wide, (x, w, b)))[0], storage
    )
    args = (None, 1e-5, needs)
    for known in (statistics, None):
        found = run["batch_norm_backward"](numpy, *map(put, (g, x, w)), known, 1e-5, needs)
        want = generic(normalization.batch_norm_backward, *map(wide, (g, x, w)), *args)
        compare(found, want, storage, get, x.size)

    fixed = random(storage, w.shape, 6), np.abs(random(storage, w.shape, 7)) + w.dtype.type(1)
    y = run["batch_norm_inference"](numpy, *map(put, (x, *fixed, w, b)))
    near(get(y), generic(registry["batch_norm_inference"].forward, *map(wide, (x, *fixed, w, b))),
         storage, 4.0)  # fmt: skip
    every = (needs[0], *needs)
    every = (needs[0], needs[1], needs[2], *needs[1:])
    back = "batch_norm_inference_backward"
    found = run[back](numpy, *map(put, (g, x, *fixed, w)), 1e-5, every)
    want = generic(getattr(normalization, back), *map(wide, (g, x, *fixed, w)), 1e-5, every)
    assert [v is None for v in found] == [v is None for v in want]
    for mine, theirs in zip(found, want):
        if theirs is not None:
            near(get(mine), theirs, storage, 4.0 + 4.0 * x.size / max(w.size, 1))


def check_large_mean(put=same, get=same):
    """A deviation of 1e-2 beside a mean of 1e4, in single precision."""
    drawn = np.random.default_rng(0).standard_normal((2, 4, 50))
    x = (1e4 + 1e-2 * drawn).astype("float32")
    run = {name: kernel.run for name, kernel in norm_launch.KERNELS.items()}
    for name, value, size in (
        ("layer_norm", x[:, 0], {}),
        ("group_norm", x, {"groups": 2}),
        ("batch_norm_training", x, {}),
    ):
        y = run[name](numpy, put(np.ascontiguousarray(value)), eps=1e-12, **size)[0]
        want = generic(registry[name].forward, wide(value), eps=1e-12, **size)[0]
        np.testing.assert_allclose(get(y), want, rtol=0, atol=1e-5)


def check_nan(put=same, get=same):
    """One NaN touches its row and no other."""
    x, _, g, _, w, b = operands("layer", "float32", (4, 40), 0)
    x[2, 7] = np.nan
    y, *statistics = norm_launch.KERNELS["layer_norm"].run(numpy, *map(put, (x, w, b)))
    rows = np.isnan(get(y))
    assert rows.all(1).tolist() == rows.any(1).tolist() == [i == 2 for i in range(4)]
    gx, _, gb = norm_launch.KERNELS["layer_norm_backward"].run(
        numpy, *map(put, (g, x, w)), statistics, 1, 1e-5, (True, True, True)
    )
    rows = np.isnan(get(gx))
    assert rows.all(1).tolist() == rows.any(1).tolist() == [i == 2 for i in range(4)]
    assert np.isfinite(get(gb)).all()
