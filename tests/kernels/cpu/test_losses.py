"""Losses of an element and its target: sums and gradients against the generic text and float64."""

import numpy as np
import pytest

import gpugrad as gg
from gpugrad.backend.kernels import note_choices
from gpugrad.errors import KernelError
from gpugrad.kernels.cpu import losses, pool
from gpugrad.ops.pointwise_losses import FORMULAS, pointwise_loss
from tests.kernels.cpu.assembly import assembly, packed
from tests.kernels.parity import DTYPES, EPS, layouts, run, wide

#: Losses whose operands are probabilities, or logarithms of them, which are not positive.
PROBABILITIES = ("binary_cross_entropy", "logit_cross_entropy", "divergence", "gaussian_nll")


#: Other sizes, more blocks than one, and three operands.
MORE = (("huber", 1), ("huber", 30_000), ("gaussian_nll", 300))


def operands(loss, n, dtype="float32"):
    """An operand, its target, and a variance where there is one."""
    random = np.random.default_rng(0)
    x, t = random.standard_normal((2, n))
    if loss in PROBABILITIES:
        t = random.uniform(0.05, 0.95, n)
    if loss == "binary_cross_entropy":
        x = random.uniform(0.05, 0.95, n)
    more = [random.uniform(0.5, 2.0, n)] if loss == "gaussian_nll" else []
    return [v.astype(DTYPES[dtype]) for v in (x, t, *more)]


def results(mode, loss, arrays, reduction, g=None):
    return run(mode, pointwise_loss, *arrays, g=g, loss=loss, reduction=reduction, number=0.7)


@pytest.mark.parametrize("loss", FORMULAS)
def test_parity(loss):
    for dtype in ("float32", "float64"):
        arrays = operands(loss, 1000, dtype)
        for reduction in ("mean", "sum"):
            got = results("require", loss, arrays, reduction)
            generic = results("off", loss, arrays, reduction)
            true = results("off", loss, [wide(x) for x in arrays], reduction)
            assert got[0].shape == ()
            for a, b, t in zip(got, generic, true, strict=True):
                assert a.dtype == b.dtype == DTYPES[dtype]
                near = 64 * EPS[dtype] * (np.abs(t) + np.abs(t).max())
                assert np.all(np.abs(wide(a) - t) <= near), reduction
                assert np.all(np.abs(wide(b) - t) <= 4 * near), reduction


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_storage_and_reduction(dtype):
    for loss, n in (("huber", 1000), *(MORE if dtype == "float32" else ())):
        arrays = operands(loss, n, dtype)
        up = np.random.default_rng(1).standard_normal(n).astype(DTYPES[dtype])
        for reduction, g in (("mean", None), ("none", up)):
            got = results("require", loss, arrays, reduction, g)
            true = results("off", loss, [wide(x) for x in arrays], reduction,
                           None if g is None else wide(g))  # fmt: skip
            for a, t in zip(got, true, strict=True):
                assert a.dtype == DTYPES[dtype] and a.shape == t.shape
                tiny = 2.0**-24 if dtype == "float16" else 0.0
                near = 64 * EPS[dtype] * np.abs(t).max() + tiny
                np.testing.assert_allclose(wide(a), t, rtol=2 * EPS[dtype], atol=near)


def test_layouts():
    x, t = (v.reshape(40, 50) for v in operands("huber", 2000))
    want = results("require", "huber", [x, t], "mean")
    for (name, a), (_, b) in zip(layouts(x), layouts(t)):
        got = results("require", "huber", [a, b], "mean")
        assert all(np.array_equal(p, q) for p, q in zip(got, want, strict=True)), name


def test_nan_and_infinity_keep_their_meaning():
    x = np.array([np.nan, np.inf, -np.inf, 0.0, 1.0] * 5, "float32")
    for loss in ("squared_error", "absolute_error", "huber", "smooth_l1"):
        with np.errstate(all="ignore"):
            got, want = (
                results(mode, loss, [x, x[::-1].copy()], "sum") for mode in ("require", "off")
            )
        for a, b in zip(got, want, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6, err_msg=loss)


def test_threads_change_no_bit():
    arrays = operands("huber", 100_003)
    before = pool.get_num_threads()
    found = []
    try:
        for n in (1, before):
            pool.set_num_threads(n)
            found.append([a.tobytes() for a in results("require", "huber", arrays, "mean")])
    finally:
        pool.set_num_threads(before)
    assert found[0] == found[-1]


def test_loops_are_vectorised():
    x, p = np.ones(64, np.float32), np.float32(0.7)
    for loss in ("huber", "logit_cross_entropy"):
        one, _ = losses._loops(loss, False)
        assert packed(assembly(one["float32"], x, x, p, p)) > 8, loss
        one, _ = losses._loops(f"{loss}_x_partial", True)
        assert packed(assembly(one["float32"], p, x, x, x, p, p)) > 4, loss


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("mse_loss", {}), ("l1_loss", {}), ("huber_loss", {"delta": 0.7}),
        ("smooth_l1_loss", {"beta": 0.7}), ("smooth_l1_loss", {"beta": 0.0}),
        ("binary_cross_entropy_with_logits", {}), ("kl_div", {"reduction": "batchmean"}),
    ],
)  # fmt: skip
def test_a_loss_is_one_pass_each_way(name, options):
    x, t = (gg.tensor(v, requires_grad=i == 0)
            for i, v in enumerate(operands("divergence", 8192)))  # fmt: skip
    with note_choices() as log:
        getattr(gg, name)(x, t, **options).backward()
    assert [(c.operation, c.implementation) for c in log] == [
        ("pointwise_loss", "numba cpu"), ("pointwise_loss_backward", "numba cpu"),
    ]  # fmt: skip


def test_what_there_is_no_kernel_for():
    x = np.ones(5, np.float32)
    with gg.use_kernels("require"):
        with pytest.raises(KernelError, match="operands of float32 and float64"):
            pointwise_loss(gg.tensor(x), gg.tensor(x.astype("float64")))
        with pytest.raises(KernelError, match="nothing to compute"):
            pointwise_loss(gg.tensor(x[:0]), gg.tensor(x[:0]))
