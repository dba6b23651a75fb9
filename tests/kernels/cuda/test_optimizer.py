"""Clip and step in two launches: PTX run in Python against the generic text, and what it is."""

from __future__ import annotations

import inspect
import math
import sys

import numpy as np
import pytest

import gpugrad as gg
from gpugrad import nn, optim
from gpugrad.backend.kernels import Slot
from gpugrad.clip import scaling
from gpugrad.errors import KernelError
from gpugrad.kernels.cuda import build, gradient, launch, optimizer
from gpugrad.kernels.cuda.language import pack_size
from gpugrad.kernels.trace import formula_text
from gpugrad.ops.updates import RULES
from gpugrad.optim import flat
from tests.kernels.cuda import offline
from tests.kernels.cuda import optimizer_checks as checks
from tests.kernels.cuda.fake_gpu import FakeArray, FakeDriver
from tests.kernels.cuda.optimizer_checks import ADAMW, DTYPES, LION, NUMBERS, NUMPY, VARIANTS
from tests.kernels.cuda.ptx_machine import PtxGpu
from tests.kernels.cuda.ptx_machine import launch as launch_text

SGD = ("sgd", (False, False, False))

SHIPPED = {name: entry for family in ("gradient", "optimizer")
           for name, entry in build.entries(family).items()}  # fmt: skip


class Gpu(PtxGpu):
    """Two blocks of two warps; it notes what is launched, and blocks run in any order."""

    threads = 64

    def __init__(self):
        super().__init__()
        self.launched = []
        self.order = list

    def run(self, entry, blocks, *args):
        given = [np.asarray(a) if isinstance(a, np.ndarray) else a for a in args]
        for i, cast in entry.casts:
            given[i] = cast(given[i])
        self.launched.append((entry.name, blocks))
        only = self.order(np.ndindex(*blocks))
        launch_text(entry.ptx(), blocks, self.threads, tuple(given), only=only)


@pytest.fixture
def machine(monkeypatch):
    gpu = Gpu()
    monkeypatch.setitem(launch.STAND_INS, np.ndarray, gpu)
    return gpu


# -- results ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_every_variant(machine, variant):
    if variant[1] in optimizer.variants(variant[0]):
        checks.check_step(variant, "float32")


@pytest.mark.parametrize("storage", ["float64", "float16", "bfloat16"])
@pytest.mark.parametrize("variant", [ADAMW, ("sgd", (True, True, True)), SGD], ids=str)
def test_other_storages(machine, variant, storage):
    checks.check_step(variant, storage)


@pytest.mark.parametrize("size", [0, 1, 3, 31, 64, 257, 1001])
@pytest.mark.parametrize("storage", DTYPES)
def test_any_size(machine, storage, size):
    checks.check_step(ADAMW, storage, size=size, steps=1)


@pytest.mark.parametrize("storage", DTYPES)
@pytest.mark.parametrize("shift", [1, 3])
def test_any_alignment(machine, storage, shift):
    checks.check_step(ADAMW, storage, size=301, shift=shift, steps=1)


@pytest.mark.parametrize("nonfinite", ["propagate", "skip", "zero"])
@pytest.mark.parametrize("storage", DTYPES)
def test_trouble(machine, storage, nonfinite):
    checks.check_trouble(ADAMW, storage, nonfinite)


@pytest.mark.parametrize("nonfinite", ["propagate", "skip", "zero"])
def test_trouble_without_a_bound(machine, nonfinite):
    checks.check_trouble(LION, "float32", nonfinite, bound=math.inf)


@pytest.mark.parametrize("storage", DTYPES)
def test_infinity_and_zeros(machine, storage):
    checks.check_infinity(storage)
    checks.check_zeros(storage)


def test_bounds(machine):
    checks.check_bounds()


def test_gradients_of_300_in_half_precision(machine):
    run = checks.Run(ADAMW, "float16", 1000, bound=math.inf)
    norm, coefficient, _ = run.step(np.full(1000, 300, np.float16))
    assert coefficient is None
    assert norm == np.float32(300 * math.sqrt(1000))


@pytest.mark.parametrize("storage", DTYPES)
@pytest.mark.parametrize("finite_only", [False, True])
def test_norms_at_the_ends_of_the_range(machine, storage, finite_only):
    checks.check_range(storage, finite_only)


def test_norms_between_the_ranges(machine):
    checks.check_seams()


def test_norms_beyond_the_squares_of_double_precision(machine):
    checks.check_float64_range((1e-300, 5e-324))


def test_norms_are_accurate(machine):
    checks.check_accuracy(machine)


@pytest.mark.parametrize("storage", DTYPES)
@pytest.mark.parametrize("size", [0, 1, 700])
def test_norms_of_any_size(machine, storage, size):
    checks.check_norm(checks.gradient_of(storage, size, size))
    checks.check_norm(checks.gradient_of(storage, size, size), finite_only=True, shift=1)


def test_many_that_are_not_finite(machine):
    checks.check_norm(np.full(600, -math.inf, np.float32), finite_only=True)
    checks.check_many(machine)


@pytest.mark.parametrize("variant", [ADAMW, SGD], ids=str)
@pytest.mark.parametrize("storage", ["float32", "float64", "bfloat16"])
def test_the_update_alone(machine, variant, storage):
    checks.check_update(variant, storage)


def test_more_parts_than_threads(machine):
    machine.threads, machine.parts = 32, 40
    run = checks.Run(LION, "float32", 40 * 128 - 5, nonfinite="skip")
    g = checks.gradient_of("float32", 40 * 128 - 5, 0)
    run.step(g)
    g[[5000, 4999]] = math.nan
    run.step(g)


def test_blocks_in_any_order_give_the_same_bits(machine):
    """No block reads what another one writes, the count of steps above all."""
    machine.parts = 5
    told = []
    for order in (list, lambda blocks: list(blocks)[::-1], list):
        machine.order = order
        run = checks.Run(ADAMW, "float32", 1200)
        out = run.step(checks.gradient_of("float32", 1200, 0))
        told.append([x.tobytes() for x in (*run.arrays, *out, run.count)])
    assert told[0] == told[1] == told[2]


def test_late_steps(machine):
    """Corrections for the first steps stay precise, and vanish in the end."""
    near = {**NUMBERS, "beta2": 0.999, "gain2": 0.001, "log_beta2": math.log(0.999)}
    for count in (0, 1, 1000, 10**6, 2**33):
        run = checks.Run(ADAMW, "float32", 40, numbers=near)
        run.count[...] = count
        run.step(checks.gradient_of("float32", 40, 1))
        assert run.count == count + 1
    checks.check_step(
        ADAMW, "float32",
        numbers={**NUMBERS, "beta1": 0.0, "gain1": 1.0, "log_beta1": -math.inf},
    )  # fmt: skip


# -- launches and host reads -----------------------------------------------------------------------


def fake_step(driver, dtype, size, **options):
    p, g, mean, square = (FakeArray(size, dtype, address=0x1000 * i) for i in range(1, 5))
    given = {
        "count": FakeArray((), "int64"), "found": FakeArray(4, "int64"), "base": 0, "bound": 1.0,
        "nonfinite": "skip", "rule": "adam", "flags": {"decays": True, "decoupled": True},
        "numbers": NUMBERS, **options,
    }  # fmt: skip
    kernel = optimizer.KERNELS["flat_step"]
    assert kernel.refuse(None, p, g, mean, square, **given) is None
    return (p, g, mean, square), given, kernel.run(None, p, g, mean, square, **given)


@pytest.fixture
def driver(monkeypatch):
    driver = FakeDriver()
    monkeypatch.setitem(sys.modules, "cupy", driver.module())
    monkeypatch.setattr(launch, "_gpus", {})
    return driver


@pytest.mark.parametrize("size", [0, 1, 10_000_000, 2**32 + 5])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_step_is_two_launches_for_any_size(driver, dtype, size):
    arrays, given, (norm, coefficient, found) = fake_step(driver, dtype, size)
    (first, *measured), (second, *updated) = driver.launched
    assert first == f"measure_kernel_{dtype}"
    assert second == f"update_adam_decays_decoupled_{dtype}"
    work = 256 * pack_size(dtype)
    assert measured[0] == updated[0] == (min(1024, max(1, -(-size // work))),)
    assert measured[2][0] is arrays[1]
    assert measured[2][1] is given["count"]
    assert measured[2][4:] == [size, 0, 1]
    assert [updated[2][i] for i in range(4)] == list(arrays)
    assert (norm.shape, norm.dtype, coefficient.shape) == ((), np.float32, ())
    assert (found.shape, found.dtype) == ((4,), np.int64)


def test_a_step_needs_nothing_but_what_ships(driver):
    fake_step(driver, "float32", 1000)
    names = [text.split(b"// kernel")[0] for _, text in driver.loaded]
    assert len(names) == 2
    for _, text in driver.loaded:
        assert b".version 8.0" in text


class Guarded(np.ndarray):
    """An array that the host must not look into."""

    def _refuse(self, *args):
        raise TypeError("the host reads a device array")

    __bool__ = __int__ = __float__ = __index__ = __iter__ = item = tolist = _refuse


def test_the_host_reads_nothing(machine, monkeypatch):
    monkeypatch.setitem(launch.STAND_INS, Guarded, machine)
    arrays = [x.view(Guarded) for x in checks.start(ADAMW, "float32", 300)]
    g = checks.gradient_of("float32", 300, 0).view(Guarded)
    count, found = (np.array(x).view(Guarded) for x in (0, [0, 0, 0, 0]))
    for _ in range(2):
        _, _, found = optimizer.flat_step(
            NUMPY, arrays[0], g, *arrays[1:], count=count, found=found.view(Guarded), base=0,
            bound=1.0, nonfinite="skip", rule="adam", flags={"decays": True, "decoupled": True},
            numbers=NUMBERS,
        )  # fmt: skip
    with pytest.raises(TypeError, match="the host reads"):
        bool(count)
    assert np.asarray(count) == 2


def test_an_optimiser_clips_and_steps_in_two_launches(machine, monkeypatch):
    slots = {name: Slot(name, "gpugrad.kernels.cuda.optimizer") for name in optimizer.KERNELS}
    rng = np.random.default_rng(0)
    values = [rng.standard_normal(n).astype("f4") for n in (1, 130, 7, 64, 300)]
    grads = [rng.standard_normal(x.size).astype("f4") for x in values]

    def train(make, steps=3, **options):
        params = [nn.Parameter(gg.tensor(x.copy())) for x in values]
        optimizer = make(params)
        for p, g in zip(params, grads):
            p.grad = gg.tensor(g.copy())
        for _ in range(steps):
            optimizer.step(clip=1.0, **options)
        reports = [optimizer.last_norm, optimizer.last_coefficient, optimizer.clip_fraction]
        return [x.detach().numpy() for x in (*params, *reports)], optimizer

    for make in (optim.AdamW, optim.Lion):
        with gg.use_kernels("off"):
            want, _ = train(make)
        with monkeypatch.context() as patch:
            patch.setattr(NUMPY, "slots", slots)
            machine.launched.clear()
            got, made = train(make)
            assert len(machine.launched) == 3 * 2
            grads[2][3], kept = math.nan, grads[2][3]
            bad, made = train(make, nonfinite="skip", steps=2)
            assert made.skipped.item() == 2
            assert made.first_nonfinite().startswith("parameter 2, of shape")
            grads[2][3] = kept
        for a, b in zip(got, want, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
        for a, b in zip(bad, values):
            np.testing.assert_array_equal(a, b)


# -- what is refused -------------------------------------------------------------------------------


def test_refusals_say_why():
    x = FakeArray((20, 10), "float32")
    other = FakeArray((10, 20), "float32")
    count, found = FakeArray((), "int64"), FakeArray(4, "int64")
    apart = FakeArray((20, 10), "float32")
    apart.flags.c_contiguous = False
    norm, update, step = (
        optimizer.KERNELS[name].refuse for name in ("flat_norm", "flat_update", "flat_step")
    )
    assert norm(None, x, finite_only=True) is None
    assert update(None, x, x, count=count, factor=None) is None
    assert step(None, x, x, count=count, found=found, base=0) is None
    assert "int32" in norm(None, FakeArray(3, "int32"), finite_only=True)
    assert "in a row" in norm(None, apart, finite_only=True)
    assert "float64" in update(None, x, FakeArray((20, 10), "float64"), count=count)
    assert "(10, 20)" in update(None, x, x, other, count=count)
    assert "int32" in step(None, x, x, count=FakeArray((), "int32"), found=found)
    assert "float64" in step(None, x, x, count=count, found=FakeArray(4, "float64"))
    with pytest.raises(KernelError, match="take arrays on a GPU"):
        optimizer.flat_norm(None, np.ones(3, np.float32), finite_only=False)


# -- formulas and constants of other layers --------------------------------------------------------


def test_the_coefficient_is_that_of_clipping():
    assert formula_text(optimizer.clip_ratio, "f") == formula_text(scaling.ratio, "f")
    for name in ("SKIPPED", "CLIPPED", "FIRST", "BAD"):
        assert getattr(optimizer, name) == getattr(flat, name)


def test_every_rule_fits_the_kernel():
    for name, row in RULES.items():
        assert len(optimizer.numbers_of(row)) <= optimizer.NUMBERS, name
        assert len(row.states) <= optimizer.STATES, name


# -- the text --------------------------------------------------------------------------------------


def states_of(entry):
    """How many states a kernel of an update changes."""
    advance = entry.kernel.bound["advance"].function.__name__
    return int(advance.removeprefix("advance"))


@pytest.mark.parametrize("name", SHIPPED)
def test_memory_is_accessed_in_16_bytes(name):
    entry = SHIPPED[name]
    found = offline.accesses(entry.ptx(), entry.storage)
    if name.startswith("update"):
        assert found == (2 + states_of(entry), 1 + states_of(entry))
    else:
        assert found == ((1, 0) if name.startswith("measure") else (0, 0))


def test_what_ships():
    for name in RULES:
        for flags in optimizer.variants(name):
            kernel = optimizer.update_of(name, flags)
            assert f"{kernel.name}_float32" in SHIPPED
    for storage in DTYPES:
        assert f"update_adam_decays_decoupled_{storage}" in SHIPPED
        assert f"measure_kernel_{storage}" in SHIPPED


@pytest.mark.parametrize("architecture", build.ARCHITECTURES)
def test_a_variant_that_does_not_ship(architecture):
    entry = optimizer.update_of("rmsprop", (True, True, True))["bfloat16"]
    assert entry.shipped() is None
    text = entry.ptx()
    offline.assert_single(entry.name, text)
    offline.assert_whole(entry.name, text)
    offline.assert_light(entry.name, offline.usage(text, architecture)[entry.name])
    assert offline.accesses(text, "bfloat16") == (5, 4)


class Far:
    """A huge array in a place of its own, of which only a few bytes are ever touched."""

    def __init__(self, size, place):
        self.size = size
        self.address = place << 44
        self.bytes = {}

    def __len__(self):
        return self.size

    def __getitem__(self, part):
        return bytes(self.bytes.get(i, 0) for i in range(part.start, part.stop))

    def __setitem__(self, part, value):
        self.bytes.update(zip(range(part.start, part.stop), value))


COUNT = 2**31 + 2**20 + 3


def test_gradients_of_more_elements_than_31_bits_can_count():
    g = Far(4 * COUNT, 1)
    g[4 * (COUNT - 1) : 4 * COUNT] = np.float32(math.nan).tobytes()
    g[4 * (COUNT - 2) : 4 * (COUNT - 1)] = np.float32(3).tobytes()
    blocks = -(-COUNT // (32 * 4))
    sums, marks = Far(16 * blocks, 2), Far(16 * blocks + 8, 3)
    text = gradient.measure_kernel["float32"].ptx()
    count = np.array([5])
    arguments = (g, count, sums, marks, COUNT, 1, 1)
    launch_text(text, (blocks,), 32, arguments, only=[(blocks - 1,)])
    last = 8 * (blocks - 1)
    assert np.frombuffer(marks[last : last + 8], np.int64) == COUNT - 1
    middle = 4 * (2 * blocks - 1)
    assert np.frombuffer(sums[middle : middle + 4], np.float32) == 9


def test_parameters_of_more_elements_than_31_bits_can_count():
    p, g = Far(4 * COUNT, 1), Far(4 * COUNT, 2)
    last = slice(4 * (COUNT - 1), 4 * COUNT)
    p[last], g[last] = np.float32(3).tobytes(), np.float32(8).tobytes()
    blocks = -(-COUNT // (32 * 4))
    entry = optimizer.update_of(*SGD)["float32"]
    numbers = {"dampening": 0.0, "lr": 0.5, "momentum": 0.0, "decay": 0.0}
    assert list(numbers) == optimizer.numbers_of(RULES["sgd"])
    factor, count = np.array([0.25], np.float32), np.array([7])
    arguments = (
        p, g, g, g, g, factor, count, count, count, factor, factor, count, COUNT, 0, 0,
        optimizer.SCALES, 0.0, *numbers.values(), *[0.0] * 5, 1,
    )  # fmt: skip
    assert len(arguments) == len(inspect.signature(entry.kernel.function).parameters)
    launch_text(entry.ptx(), (blocks,), 32, arguments, only=[(blocks - 1,)])
    assert np.frombuffer(p[last], np.float32) == 2
    assert min(p.bytes) > 2**33
