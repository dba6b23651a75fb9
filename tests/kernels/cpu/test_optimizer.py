"""The two passes of a step, compiled: parity, every layout, and the same bits on any thread."""

import itertools
import math
import os
import re
import subprocess
import sys

import numpy as np
import pytest

import gpugrad as gg
from gpugrad import nn, optim
from gpugrad.backend import backend_for_device
from gpugrad.backend.kernels import note_choices
from gpugrad.errors import KernelError
from gpugrad.kernels.cpu import optimizer as kernels
from gpugrad.kernels.cpu.compile import storage_view
from gpugrad.ops.updates import RULES
from gpugrad.optim.flat import flat_norm, flat_step, flat_update
from tests.kernels.cpu.assembly import assembly, packed
from tests.kernels.parity import DTYPES, EPS, layouts, wide

NUMPY = backend_for_device("cpu")
FEW = kernels.FEW * kernels.BLOCK
SIZES = [0, 1, 31, 8192, 8193, FEW, FEW + 1, FEW + 50_001]

NUMBERS = {
    "lr": 0.1, "momentum": 0.9, "dampening": 0.2, "decay": 0.1, "beta1": 0.8, "gain1": 0.2,
    "beta2": 0.7, "gain2": 0.3, "eps": 1e-3, "log_beta1": math.log(0.8),
    "log_beta2": math.log(0.7), "alpha": 0.7, "gain": 0.3, "lr_decay": 0.1,
}  # fmt: skip

VARIANTS = [
    (name, dict(zip(row.flags, flags)))
    for name, row in RULES.items()
    for flags in itertools.product((False, True), repeat=len(row.flags))
]


def arrays(name, flags, size, dtype, seed=0):
    """A parameter, a gradient, and states as they may be: sizes are no smaller than means."""
    rng = np.random.default_rng(seed)
    p, g = rng.standard_normal((2, size))
    given = {"mean": g * 0.3, "velocity": g * 2, "square": g * g + 0.5, "total": g * g + 1}
    kept = [given[s] for s in RULES[name].kept(flags)]
    return [x.astype(DTYPES[dtype]) for x in (p, g, *kept)]


def update(mode, name, flags, made, count=3, factor=0.5, skip=None, finite_only=False, **numbers):
    own = [x.copy() for x in made]
    with gg.use_kernels(mode):
        out = flat_update(
            NUMPY, *own, count=np.asarray(count), skip=skip, finite_only=finite_only, rule=name,
            factor=None if factor is None else np.asarray(factor, np.float32),
            flags=flags, numbers=NUMBERS | numbers,
        )  # fmt: skip
    assert all(a is b for a, b in zip(out, (own[0], *own[2:]), strict=True))
    assert np.array_equal(own[1], made[1], equal_nan=True), "the gradient is not touched"
    return out


def close(a, b, dtype):
    """Within a few roundings; half precision may round the other way."""
    units = 2.1 if dtype in ("float16", "bfloat16") else 16
    bound = units * EPS[dtype] * np.maximum(1, np.abs(wide(b)))
    return np.all(np.abs(wide(a) - wide(b)) <= bound)


# -- the update ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "flags"), VARIANTS)
def test_every_variant_is_the_generic_text(name, flags, dtype) -> None:
    made = arrays(name, flags, 20_011, dtype)
    for options in ({}, {"count": 1, "factor": None}, {"finite_only": True}):
        got = update("require", name, flags, made, **options)
        generic = update("off", name, flags, made, **options)
        for a, b, old in zip(got, generic, (made[0], *made[2:]), strict=True):
            assert a.dtype == old.dtype
            assert close(a, b, dtype)
            assert not np.array_equal(a, old)


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("sgd", {"moves": False, "nesterov": False, "decays": True}),
        ("lion", {"decays": True}),
        ("adam", {"decays": True, "decoupled": True}),
        ("rmsprop", {"centered": True, "moves": True, "decays": True}),
    ],
)
def test_every_number_of_states_on_several_threads(name, flags) -> None:
    made = arrays(name, flags, FEW + 8193, "float32")
    for a, b in zip(update("require", name, flags, made), update("off", name, flags, made)):
        assert close(a, b, "float32")


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_every_size(size, dtype) -> None:
    flags = {"decays": True, "decoupled": True}
    made = arrays("adam", flags, size, dtype)
    for a, b in zip(update("require", "adam", flags, made), update("off", "adam", flags, made)):
        assert close(a, b, dtype)


def test_float32_against_float64() -> None:
    """Nothing is lost in the numbers of the rule: 1 - beta2, and bias corrections of late steps."""
    flags = {"decays": True, "decoupled": True}
    single = arrays("adam", flags, 10_000, "float32")
    double = [x.astype("float64") for x in single]
    near = {"beta2": 0.999, "gain2": 0.001, "log_beta2": math.log(0.999), "lr": 0.01}
    for count in (1, 2, 1000, 10**6):
        for a, b in zip(
            update("require", "adam", flags, single, count=count, **near),
            update("off", "adam", flags, double, count=count, **near),
        ):
            assert np.max(np.abs(a - b) / np.maximum(np.abs(b), 1e-3)) < 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_layout(dtype) -> None:
    flags = {"decays": False, "decoupled": False}
    made = [x.reshape(40, 500) for x in arrays("adam", flags, 20_000, dtype)]
    want = update("off", "adam", flags, made)
    for name, g in layouts(made[1]):
        with gg.use_kernels("auto"), note_choices() as choices:
            own = [x.copy() for x in made]
            flat_update(
                NUMPY, own[0], g, *own[2:], count=np.asarray(3), factor=np.float32(0.5), skip=None,
                finite_only=False, rule="adam", flags=flags, numbers=NUMBERS,
            )  # fmt: skip
        row = g.flags.c_contiguous
        assert choices[0].implementation == ("numba cpu" if row else "generic"), name
        for a, b in zip((own[0], *own[2:]), want):
            assert close(a, b, dtype)


def test_a_misaligned_parameter() -> None:
    flags = {"moves": True, "nesterov": False, "decays": True}
    made = arrays("sgd", flags, 20_000, "float32")
    want = update("off", "sgd", flags, made)
    raw = [np.empty(x.nbytes + 1, np.uint8)[1:].view(x.dtype) for x in made]
    for to, x in zip(raw, made):
        to[...] = x
    with gg.use_kernels("require"):
        out = flat_update(
            NUMPY, *raw, count=np.asarray(3), factor=np.float32(0.5), skip=None, finite_only=False,
            rule="sgd", flags=flags, numbers=NUMBERS,
        )  # fmt: skip
    for a, b in zip(out, want):
        assert close(a, b, "float32")


@pytest.mark.parametrize("mode", ["off", "require"])
@pytest.mark.parametrize(("name", "flags"), VARIANTS[-6:])
def test_skipping_changes_no_bit(name, flags, mode) -> None:
    made = arrays(name, flags, 20_000, "float32")
    made[1][77] = math.nan
    for skip in (np.asarray(True), np.True_):
        out = update(mode, name, flags, made, skip=skip)
        assert all(np.array_equal(a, b) for a, b in zip(out, (made[0], *made[2:])))
    out = update(mode, name, flags, made, skip=np.asarray(False))
    assert np.isnan(out[0][77])
    assert np.isfinite(np.delete(out[0], 77)).all()


@pytest.mark.parametrize("mode", ["off", "require"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_elements_that_are_not_finite_count_as_zero(dtype, mode) -> None:
    flags = {"decays": True}
    made = arrays("lion", flags, 20_000, dtype)
    zeroed = [x.copy() for x in made]
    for at, value in ((0, math.nan), (9000, math.inf), (19_999, -math.inf)):
        made[1][at] = value
        zeroed[1][at] = 0
    got = update(mode, "lion", flags, made, finite_only=True)
    for a, b in zip(got, update(mode, "lion", flags, zeroed)):
        assert np.array_equal(a, b)


def test_operands_that_are_refused() -> None:
    flags = {"moves": False, "nesterov": False, "decays": False}
    x = np.ones((200, 100), np.float32)
    for p, g, why in (
        (x.T, x.T, "do not lie in a row"),
        (x, x.astype("float64"), "a float64 of shape"),
        (x.astype(">f4"), x, "no kernel for >f4"),
        (x, np.ones((100, 100), np.float32), "shape"),
    ):
        with gg.use_kernels("require"), pytest.raises(KernelError, match=why):
            flat_update(
                NUMPY, p.copy("K"), g, count=np.asarray(1), factor=None, skip=None,
                finite_only=False, rule="sgd", flags=flags, numbers=NUMBERS,
            )  # fmt: skip


# -- what the gradient amounts to ------------------------------------------------------------------


def norms(mode, g, finite_only=False):
    with gg.use_kernels(mode):
        return [np.asarray(x)[()] for x in flat_norm(NUMPY, g, finite_only=finite_only)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_norms(dtype, size) -> None:
    g = np.random.default_rng(size).standard_normal(size).astype(DTYPES[dtype])
    x = wide(g)
    for mode in ("off", "require"):
        squares, top, bad, first = norms(mode, g)
        assert math.isclose(squares, math.fsum(x * x), rel_tol=1e-6, abs_tol=0)
        assert top == np.abs(x).max(initial=0)
        assert (bad, first) == (0, 0)


@pytest.mark.parametrize("mode", ["off", "require"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("at", [[0], [300_002], [8191, 8192], [5, 70_000, 299_999]])
def test_what_is_not_finite_is_counted_and_found(dtype, at, mode) -> None:
    g = np.random.default_rng(0).standard_normal(300_003).astype(DTYPES[dtype])
    for i, value in zip(at, itertools.cycle((math.nan, -math.inf, math.inf))):
        g[i] = value
    rest = wide(np.delete(g, at))
    squares, top, bad, first = norms(mode, g)
    assert not math.isfinite(squares)
    assert not math.isfinite(top)
    assert (bad, first) == (len(at), at[0])
    squares, top, bad, first = norms(mode, g, finite_only=True)
    assert math.isclose(squares, math.fsum(rest * rest), rel_tol=1e-6)
    assert top == np.abs(rest).max()
    assert (bad, first) == (len(at), at[0])


def test_one_nan_among_ten_million() -> None:
    g = np.ones(10_000_000, np.float32)
    g[7_654_321] = math.nan
    squares, _, bad, first = norms("require", g)
    assert math.isnan(squares)
    assert (bad, first) == (1, 7_654_321)
    assert norms("require", g, finite_only=True)[0] == g.size - 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("finite_only", [False, True])
def test_squares_beyond_the_range(dtype, finite_only) -> None:
    info = {"float16": (6e4, 1e-7), "float64": (1e150, 1e-150)}
    for value in info.get(dtype, (1e38, 1e-38)):
        g = np.zeros(60_000, DTYPES[dtype])
        g[::3] = value
        x = float(wide(g)[0])
        squares = norms("require", g, finite_only)[0]
        assert math.isclose(math.sqrt(squares), x * math.sqrt(20_000), rel_tol=1e-6)


def test_three_hundred_in_half_precision() -> None:
    g = np.full(1_000_000, 300.0, np.float16)
    assert norms("require", g)[0] == 9e10


def test_sums_are_accurate() -> None:
    """Single precision over a block, double over the blocks."""
    g = np.random.default_rng(0).standard_normal(3_000_001, np.float32)
    x = wide(g)
    assert math.isclose(norms("require", g)[0], math.fsum(x * x), rel_tol=1e-8)


# -- threads, bits, machine code -------------------------------------------------------------------

BITS = """
import hashlib
import numpy as np
import gpugrad as gg
from gpugrad import nn, optim

r = np.random.default_rng(0)
params = [nn.Parameter(gg.tensor(r.standard_normal(n).astype("f4"))) for n in (300_001, 77, 50_000)]
optimizer = optim.AdamW(params, lr=0.1)
for _ in range(3):
    optimizer.zero_grad()
    sum((gg.sum(gg.tensor(r.standard_normal(p.size).astype("f4")) * p) for p in params)).backward()
    optimizer.step(clip=1.0)
digest = hashlib.sha256(optimizer.last_norm.numpy().tobytes())
for p in params:
    digest.update(p.detach().numpy().tobytes())
print(digest.hexdigest())
"""


def test_the_same_bits_on_any_number_of_threads() -> None:
    found = set()
    for threads in ("1", "2", "2"):
        env = {**os.environ, "NUMBA_NUM_THREADS": threads, "GPUGRAD_THREADS": threads}
        run = subprocess.run(
            [sys.executable, "-c", BITS], env=env, capture_output=True, text=True, check=True
        )
        found.add(run.stdout)
    assert len(found) == 1


#: Conversions to double precision, and arithmetic in it, of x86 and Arm.
DOUBLE = re.compile(
    r"\bv?(?:cvtss2sd|cvtps2pd|(?:add|mul|sub|div|sqrt|fn?madd\d+)[sp]d)\b|\bfcvtl\b"
)


@pytest.mark.parametrize(("name", "flags"), VARIANTS)
def test_packed_instructions_and_no_double_precision(name, flags) -> None:
    loop, _ = kernels.loops(name, tuple(flags.values()), False)
    made = arrays(name, flags, 100, "float32")
    text = assembly(loop["float32"], *made, np.ones(kernels.NUMBERS, np.float32))
    assert packed(text) >= 2
    assert not DOUBLE.search(text)


@pytest.mark.parametrize(("dtype", "finite_only"), [("float32", True), ("float64", False)])
def test_packed_instructions_in_other_variants(dtype, finite_only) -> None:
    loop, _ = kernels.loops("adam", (True, True), finite_only)
    made = arrays("adam", {"decays": True, "decoupled": True}, 100, dtype)
    text = assembly(loop[dtype], *made, np.ones(kernels.NUMBERS, dtype))
    assert packed(text) >= 4
    assert bool(DOUBLE.search(text)) == (dtype == "float64"), "the search does find some"


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("loop", ["_measure", "_measure_finite"])
def test_packed_instructions_in_the_norm(loop, dtype) -> None:
    g = np.ones(100, DTYPES[dtype])
    bits = np.int64 if dtype == "float64" else np.int32
    outputs = np.zeros(1), np.zeros(1, bits), np.zeros(1, bits)
    text = assembly(getattr(kernels, loop)[dtype], storage_view(g), *outputs)
    assert packed(text) >= 4


# -- the step --------------------------------------------------------------------------------------

#: Gradients of the steps in a row: what they have, and where.
TROUBLE: tuple[dict[int, float], ...] = (
    {}, {9000: math.nan, 70: -math.inf}, {5: math.inf}, {}, {0: math.nan},
)  # fmt: skip


@pytest.mark.parametrize("nonfinite", ["propagate", "skip", "zero"])
@pytest.mark.parametrize("bound", [1.0, 1e6, math.inf])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_steps_are_those_of_the_generic_text(dtype, bound, nonfinite) -> None:
    flags = {"decays": True, "decoupled": True}
    made = arrays("adam", flags, 20_011, dtype)
    own = {mode: [x.copy() for x in made] for mode in ("off", "require")}
    counts = {mode: np.array(0) for mode in own}
    found = dict.fromkeys(own, np.zeros(4, np.int64))
    for spoilt in TROUBLE:
        outcome = {}
        for mode, (p, g, *states) in own.items():
            g = g.copy()
            g[[*spoilt]] = [*spoilt.values()]
            before = found[mode].copy()
            with gg.use_kernels(mode), np.errstate(all="ignore"):
                norm, coefficient, new = flat_step(
                    NUMPY, p, g, *states, count=counts[mode], found=found[mode], base=10,
                    bound=bound, nonfinite=nonfinite, rule="adam", flags=flags, numbers=NUMBERS,
                )  # fmt: skip
            assert np.array_equal(found[mode], before), "what was found before is not changed"
            outcome[mode] = norm, coefficient, new
            found[mode] = new
        (norm, factor, kept), (its_norm, its_factor, its) = outcome["off"], outcome["require"]
        assert (norm.dtype, kept.dtype) == (its_norm.dtype, its.dtype)
        np.testing.assert_allclose(its_norm, norm, rtol=1e-6)
        assert (factor is None) == (its_factor is None) == (bound == math.inf)
        if factor is not None:
            assert factor.dtype == its_factor.dtype
            np.testing.assert_allclose(its_factor, factor, rtol=1e-6)
        assert kept.tolist() == its.tolist()
        assert counts["off"] == counts["require"]
        if nonfinite != "propagate":  # NaN has been everywhere, and says nothing
            for a, b in zip(own["require"], own["off"], strict=True):
                assert close(a, b, dtype)


def test_a_step_whose_norm_is_known() -> None:
    p, g = (np.ones(20_000, np.float32) for _ in range(2))
    with gg.use_kernels("require"):
        norm, coefficient, _ = flat_step(
            NUMPY, p, g, count=np.array(0), found=np.zeros(4, np.int64), base=0, bound=1.0,
            nonfinite="skip", rule="sgd", numbers={"lr": 1.0, "decay": 0.0, "momentum": 0.0,
                                                   "dampening": 0.0},
            flags={"moves": False, "nesterov": False, "decays": False},
            measured=(np.float64(16.0), np.float64(np.nan), np.int64(0), np.int64(0)),
        )  # fmt: skip
    assert norm == 4
    assert coefficient == pytest.approx(0.25)
    assert np.all(p == 1 - coefficient)


# -- together --------------------------------------------------------------------------------------


def test_an_optimiser_uses_them() -> None:
    params = [nn.Parameter(gg.tensor(np.ones(9000, np.float32))) for _ in range(3)]
    optimizer = optim.RMSprop(params)
    for p in params:
        p.grad = gg.tensor(np.ones(9000, np.float32))
    with note_choices() as choices:
        optimizer.step(clip=1.0)
    assert [(c.operation, c.implementation) for c in choices] == [("flat_step", "numba cpu")]


def test_two_threads_of_python() -> None:
    from concurrent.futures import ThreadPoolExecutor

    def train(seed):
        r = np.random.default_rng(seed)
        p = nn.Parameter(gg.tensor(r.standard_normal(200_000).astype("f4")))
        optimizer = optim.Adam([p])
        for _ in range(5):
            optimizer.zero_grad()
            gg.sum(p * p).backward()
            optimizer.step(clip=1.0)
        return p.detach().numpy()

    alone = [train(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(train, range(4)))
    for a, b in zip(alone, together):
        assert np.array_equal(a, b)
