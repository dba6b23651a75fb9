"""What steps of an optimiser must do, whatever runs their kernels: a simulator, or PTX in Python.

The truth is the generic text of `gpugrad.optim.flat`, on the same arrays.
"""

from __future__ import annotations

import itertools
import math

import numpy as np

import gpugrad as gg
from gpugrad.backend import backend_for_device
from gpugrad.kernels.cuda import gradient, optimizer
from gpugrad.ops.updates import RULES
from gpugrad.optim import flat
from tests.kernels.cuda.checks import DTYPES, EPS, wide

NUMPY = backend_for_device("cpu")

NUMBERS = {
    "lr": 0.1, "momentum": 0.9, "dampening": 0.2, "decay": 0.1, "beta1": 0.8, "gain1": 0.2,
    "beta2": 0.7, "gain2": 0.3, "eps": 1e-3, "log_beta1": math.log(0.8),
    "log_beta2": math.log(0.7), "alpha": 0.7, "gain": 0.3, "lr_decay": 0.1,
}  # fmt: skip

VARIANTS = [
    (name, flags)
    for name, row in RULES.items()
    for flags in itertools.product((False, True), repeat=len(row.flags))
]

#: Of each rule the variant with everything in it.
FULL = [(name, (True,) * len(row.flags)) for name, row in RULES.items()]

ADAMW = ("adam", (True, True))
LION = ("lion", (True,))

#: How far a norm may be from the true one, relative.
NORM = {"float16": 2.0**-20, "bfloat16": 2.0**-20, "float32": 2.0**-20, "float64": 2.0**-49}

#: What is not written at all would pass for what is not changed.
FOUND = (3, 5, 0, 0)


def at(x, shift):
    """A copy that begins `shift` elements after an address that packs may be loaded from."""
    room = np.empty(x.size + shift + 16, x.dtype)
    start = -room.ctypes.data % 16 // x.dtype.itemsize + shift
    out = room[start : start + x.size]
    out[...] = x
    return out


def gradient_of(storage, size, seed):
    return np.random.default_rng(seed).standard_normal(size).astype(DTYPES[storage])


def start(variant, storage, size):
    """A parameter and its states as they may be: sizes are no smaller than means."""
    name, flags = variant
    row = RULES[name]
    rng = np.random.default_rng(7)
    p, g = rng.standard_normal((2, size))
    given = {"mean": g * 0.3, "velocity": g * 2, "square": g * g + 0.5, "total": g * g + 1}
    kept = [given[s] for s in row.kept(dict(zip(row.flags, flags)))]
    return [x.astype(DTYPES[storage]) for x in (p, *kept)]


def close(got, want, storage):
    """Within a few roundings; half precision may round the other way."""
    got, want = wide(got), wide(want)
    units = 4.2 if storage in ("float16", "bfloat16") else 32
    np.testing.assert_allclose(got, want, rtol=units * EPS[storage], atol=units * EPS[storage])


def close_norm(got, want, storage):
    np.testing.assert_allclose(np.float64(got), want, rtol=NORM[storage], atol=0)


class Run:
    """Steps by the kernels, each compared with the generic text's step from the same arrays."""

    def __init__(self, variant, storage, size, *, shift=0, **options):
        self.storage = storage
        self.arrays = [at(x, shift) for x in start(variant, storage, size)]
        self.count = np.array(3)
        self.found = np.array(FOUND)
        name, flags = variant
        self.options = {
            "base": 10, "bound": 1.0, "nonfinite": "propagate", "rule": name,
            "flags": dict(zip(RULES[name].flags, flags)), "numbers": NUMBERS, **options,
        }  # fmt: skip
        self.shift = shift

    def step(self, g):
        """One step; the norm, the coefficient and what was found, as the kernels give them."""
        storage = self.storage
        twins, count = [x.copy() for x in self.arrays], self.count.copy()
        with gg.use_kernels("off"), np.errstate(all="ignore"):
            want = flat.flat_step(
                NUMPY, twins[0], g, *twins[1:], count=count, found=self.found, **self.options
            )
        own = at(g, self.shift)
        before = self.found.copy()
        got = optimizer.flat_step(
            NUMPY, self.arrays[0], own, *self.arrays[1:], count=self.count, found=self.found,
            **self.options,
        )  # fmt: skip
        assert own.tobytes() == g.tobytes(), "the gradient is not changed"
        assert np.array_equal(self.found, before), "nor is what was found before"
        for a, b in zip(self.arrays, twins, strict=True):
            close(a, b, storage)
        norm, coefficient, found = got
        assert (norm.shape, norm.dtype) == ((), np.asarray(want[0]).dtype)
        close_norm(norm, want[0], storage)
        assert (coefficient is None) == (want[1] is None)
        if coefficient is not None:
            assert (coefficient.shape, coefficient.dtype) == ((), norm.dtype)
            np.testing.assert_allclose(coefficient, want[1], rtol=2 * NORM[storage])
        assert found is not self.found
        assert (found.tolist(), found.dtype) == (want[2].tolist(), np.int64)
        assert self.count == count
        self.found = found
        return got


def check_step(variant, storage, *, size=150, shift=0, steps=2, **options):
    run = Run(variant, storage, size, shift=shift, **options)
    for seed in range(steps):
        run.step(gradient_of(storage, size, seed))


#: The steps in which elements are not finite, and the values of some.
TROUBLE: tuple[dict[int, float], ...] = (
    {},
    {140: math.nan, 70: -math.inf},
    {5: math.inf},
    {},
    {149: math.nan},
)


def check_trouble(variant, storage, nonfinite, **options):
    """Several steps, good ones and bad ones."""
    run = Run(variant, storage, 150, nonfinite=nonfinite, **options)
    for seed, places in enumerate(TROUBLE):
        g = gradient_of(storage, 150, seed)
        for i, value in places.items():
            g[i] = value
        run.step(g)
        if nonfinite == "propagate" and places:  # all is NaN from here on
            run = Run(variant, storage, 150, nonfinite=nonfinite, **options)
    skips = sum(map(bool, TROUBLE)) if nonfinite == "skip" else 0
    if nonfinite != "propagate":
        assert run.count == 3 + len(TROUBLE) - skips
        assert run.found.tolist()[0] == FOUND[0] + skips


def check_infinity(storage):
    """A norm that is infinite leaves finite elements nothing."""
    run = Run(ADAMW, storage, 40)
    g = gradient_of(storage, 40, 0)
    g[17] = -math.inf
    norm, coefficient, found = run.step(g)
    assert (norm, coefficient) == (math.inf, 0)
    assert found.tolist() == [3, 6, 28, 1]


def check_zeros(storage):
    run = Run(ADAMW, storage, 40)
    norm, coefficient, _ = run.step(np.zeros(40, DTYPES[storage]))
    assert (norm, coefficient) == (0, 1)


def check_bounds(storage="float32"):
    for bound in (0.0, 1e-3, 1e9, math.inf):
        check_step(ADAMW, storage, bound=bound, steps=1)


def truth(g, finite_only=False):
    """The norm in twice the precision, as two factors: 2**x cannot overflow or vanish."""
    x = wide(g)
    if finite_only:
        x = np.where(np.isfinite(x), x, 0)
    top = np.abs(x).max(initial=0)
    shift = math.frexp(top)[1] if top and math.isfinite(top) else 0
    return math.sqrt(math.fsum((math.ldexp(v, -shift)) ** 2 for v in x.tolist())), shift


def check_norm(g, finite_only=False, shift=0):
    """All that is found of one gradient."""
    storage = str(g.dtype)
    squares, top, bad, first = gradient.flat_norm(NUMPY, at(g, shift), finite_only=finite_only)
    assert [x.shape for x in (squares, top, bad, first)] == [()] * 4
    assert (squares.dtype, bad.dtype, first.dtype) == (np.float64, np.int64, np.int64)
    x = wide(g)
    wrong = np.flatnonzero(~np.isfinite(x))
    assert (bad, first) == (len(wrong), wrong[0] if len(wrong) else 0)
    if len(wrong) and not finite_only:
        np.testing.assert_equal(wide(squares), (x * x).sum())
        np.testing.assert_equal(wide(top), np.abs(x).max())
        return
    root, exponent = truth(g, finite_only)
    close_norm(math.sqrt(squares), math.ldexp(root, exponent), storage)
    assert top == np.abs(np.where(np.isfinite(x), x, 0)).max(initial=0)


#: Numbers whose squares their type cannot hold, and some beside them.
RANGE = {
    "float16": [6e4, 6e-8, 300.0],
    "bfloat16": [3e38, 1e-38, 1e20, 1e-20, 1e-13, 1e13],
    "float32": [3e38, 1e-45, 1e-38, 1e20, 1e-20, 1e-13, 1e13, 3.6e-13, 1.3e13],
    "float64": [1e150, 1e-150, 1e30, 1e-30],
}


def check_range(storage, finite_only, values=slice(None)):
    """Great numbers, small ones, and both together."""
    values = RANGE[storage][values]
    for value in values:
        g = np.zeros(100, DTYPES[storage])
        g[::3] = value
        if finite_only:
            g[50] = math.nan
        check_norm(g, finite_only)
    mixed = np.resize(np.array(values, DTYPES[storage]), 100)
    check_norm(mixed, finite_only)
    check_norm(np.sort(mixed), finite_only)


def check_seams():
    """Packs beside the limits between the three sums: more than one of these counts."""
    for limit in (gradient.LOW, gradient.HIGH):
        value = math.sqrt(0.9 * limit.instance(None, "float32") / 4)
        g = np.full(64, value, np.float32)
        g[20:24] *= 1.2
        check_norm(g)


def check_float64_range(values=(1e300, 1e-300, 5e-324)):
    """The norm is right even where the squares are beyond double precision."""
    for value in values:
        run = Run(("sgd", (False,) * 3), "float64", 8, bound=math.inf)
        norm, _, _ = optimizer.flat_step(
            NUMPY, run.arrays[0], np.full(8, value), count=run.count, found=run.found,
            **run.options,
        )  # fmt: skip
        root, exponent = truth(np.full(8, value))
        np.testing.assert_allclose(norm, math.ldexp(root, exponent), rtol=NORM["float64"])


def check_accuracy(machine):
    """Four squares make 1 and a little, which a plain sum loses from 128 on."""
    machine.threads, machine.parts = 32, 1
    g = np.full(30_000, 0.5 * (1 + 1.9 * 2.0**-19), np.float32)
    check_norm(g)


def check_many(machine):
    """More bad elements than 32 bits can count, far behind."""
    parts = 40
    bad, first = np.full(parts, 2**31 - 1), np.arange(parts)[::-1] + 2**40
    first[5] = 2**35 + 1
    for none in (3, 39):
        bad[none], first[none] = 0, -1
    sums, top, out = np.ones(4 * parts, np.float32), np.empty((), np.float32), np.empty(3, np.int64)
    marks = np.concatenate([first, bad, [0]])
    machine.run(gradient.norm_total_kernel["float32"], (1,), sums, marks, top, out, parts)
    assert out.tolist()[1:] == [bad.sum(), 2**35 + 1]
    assert top == 1


def check_update(variant, storage, **options):
    """The update alone, with its factor and flag on the device or without."""
    name, flags = variant
    made = start(variant, storage, 90)
    g = gradient_of(storage, 90, 1)
    g[[3, 50]] = math.nan, math.inf
    number = np.float64 if storage == "float64" else np.float32
    shared = {
        "rule": name,
        "flags": dict(zip(RULES[name].flags, flags)),
        "numbers": NUMBERS,
        **options,
    }
    for factor, skip, finite_only in (
        (None, None, True),
        (np.array(0.5, number), None, False),
        (np.array(0.25, np.float64), np.array(False), True),
        (None, np.array(True), False),
    ):
        for count in (1, 3):
            given = {
                "count": np.array(count), "factor": factor, "skip": skip,
                "finite_only": finite_only, **shared,
            }  # fmt: skip
            own, twins = ([x.copy() for x in made] for _ in range(2))
            with gg.use_kernels("off"), np.errstate(all="ignore"):
                flat.flat_update(NUMPY, twins[0], g, *twins[1:], **given)
            out = optimizer.flat_update(NUMPY, own[0], g, *own[1:], **given)
            assert all(a is b for a, b in zip(out, own, strict=True))
            assert given["count"] == count
            for a, b, old in zip(own, twins, made):
                close(a, b, storage)
                assert np.array_equal(a, old) == (skip is not None and bool(skip))
