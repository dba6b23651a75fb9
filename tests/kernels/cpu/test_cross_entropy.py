"""Cross-entropy with classes: the loss, its gradient, what is kept between them, and padding."""

import tracemalloc

import numpy as np
import pytest

import gpugrad as gg
from gpugrad.errors import DTypeError, KernelError, OutOfRangeError, ShapeError
from gpugrad.kernels.cpu import cross_entropy as family
from gpugrad.ops.losses import class_cross_entropy
from tests.kernels.cpu.assembly import assembly, packed
from tests.kernels.parity import DTYPES, EPS, layouts, wide

NAN, INF = np.nan, np.inf

#: Shapes of logits: rows of one piece and of several, tiles of rows narrower and wider than one,
#: and many rows shorter than a vector.
SHAPES = [
    (13, 37),
    (1, 5),
    (5, 1),
    (3, 4500),
    (2, 5, 3, 7),
    (3, 11, 1),
    (2, 130, 300),
    (1, 3, 1500),
    (300, 5),
]


def operands(shape, dtype="float64", seed=0):
    rng = np.random.default_rng(seed)
    places = (shape[0], *shape[2:])
    target = rng.integers(0, shape[1], places)
    target.flat[1::4] = -100
    return (
        (3.0 * rng.standard_normal(shape)).astype(DTYPES[dtype]),
        target,
        rng.uniform(0.1, 2.0, shape[1]),
        rng.standard_normal(places).astype(DTYPES[dtype]),
    )


def run(mode, x, target, weight=None, g=None, **parameters):
    """Loss and gradient as raw arrays."""
    z = gg.asarray(x).detach().requires_grad_()
    with gg.use_kernels(mode):
        y = gg.cross_entropy(z, target, weight, **parameters)
        y.backward(None if g is None else gg.asarray(g))
    return y.data, z.grad.data


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_generic_text_says_the_same(shape, weighted, smoothing, reduction):
    x, target, weight, g = operands(shape)
    weight = weight if weighted else None
    options = {"reduction": reduction, "label_smoothing": smoothing}
    g = g if reduction == "none" else np.array(-1.7)
    got = run("require", x, target, weight, g, **options)
    want = run("off", x, target, weight, g, **options)
    assert got[0].shape == want[0].shape
    np.testing.assert_allclose(got[0], want[0], rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(got[1], want[1], rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", [(7, 3001), (2, 50, 33)])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_narrow_dtypes(dtype, shape, weighted, smoothing):
    """All arithmetic is of float32: a result is as good as its storage, or as float32."""
    x, target, weight, g = operands(shape, dtype)
    weight = weight.astype("float32") if weighted else None
    options = {"reduction": "none", "label_smoothing": smoothing}
    loss, gx = run("require", x, target, weight, g, **options)
    true, true_gx = run("off", wide(x), target, weight, wide(g), **options)
    assert loss.dtype == gx.dtype == x.dtype
    single = EPS["float32"]
    assert np.all(np.abs(wide(loss) - true) <= EPS[dtype] * np.abs(true) + 64 * single)
    above = 3.0 * np.abs(wide(g))[:, None]  # the heaviest weight is 2
    tiny = 2.0**-25 if dtype == "float16" else 0.0
    error = np.abs(wide(gx) - true_gx)
    assert np.all(error <= (EPS[dtype] + 48 * single) * np.abs(true_gx) + 4 * single * above + tiny)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "int64", "uint64"])
def test_targets_of_every_integer_dtype(dtype):
    x, target, *_ = operands((20, 9))
    target = np.where(target == -100, 3, target)
    want = run("require", x, target)
    got = run("require", x, target.astype(dtype))
    assert all(np.array_equal(a, w) for a, w in zip(got, want))


def test_a_class_can_be_the_one_ignored():
    x, target, weight, g = operands((40, 5))
    for smoothing in (0.0, 0.3):
        options = {"ignore_index": 2, "reduction": "none", "label_smoothing": smoothing}
        target = np.where(target == -100, 2, target)
        got = run("require", x, target, weight, g, **options)
        want = run("off", x, target, weight, g, **options)
        for a, w in zip(got, want):
            np.testing.assert_allclose(a, w, rtol=1e-12, atol=1e-14)
            assert not a[target == 2].any()


def test_layouts():
    for shape in ((31, 18), (3, 18, 31)):
        x, target, weight, g = operands(shape, "float32")
        options = {"reduction": "none", "label_smoothing": 0.1}
        want = run("require", x, target, weight, g, **options)
        for name, laid in layouts(x):
            if x.ndim > 2 and name in ("misaligned", "read-only"):
                continue  # the same to every loop, and each is a compilation of its own
            got = run("require", laid, target, weight, g, **options)
            for a, w in zip(got, want):  # rows along memory are summed in another order
                ulps = 8 * (name == "transposed")
                np.testing.assert_allclose(a, w, rtol=ulps * 2.0**-23, atol=ulps * 1e-7)
        for (name, targets), (_, above) in zip(layouts(target), layouts(g)):
            if name in ("strided", "reversed", "transposed"):
                got = run("require", x, targets, weight, above, **options)
                assert all(np.array_equal(a, w) for a, w in zip(got, want)), name


def test_rows_of_a_transposed_view_are_rows():
    x, g = (operands(shape, "float32")[0] for shape in ((4, 9, 300), (4, 9)))
    target = np.arange(36).reshape(4, 9) * 8
    loss, gx = run("require", x.transpose(0, 2, 1), target, g=g, reduction="none")
    flat, flat_gx = run(
        "require", x.reshape(36, 300), target.reshape(-1), g=g.reshape(-1), reduction="none"
    )
    assert np.array_equal(loss.reshape(-1), flat)
    assert np.array_equal(gx.transpose(0, 2, 1).reshape(36, 300), flat_gx)


# -- what is kept between forward and backward -----------------------------------------------------


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", [(13, 37), (2, 5, 3, 7)])
def test_the_same_is_kept_as_by_the_generic_text(shape, weighted):
    x, target, weight, _ = operands(shape)
    weight = weight if weighted else None
    kept = []
    for mode in ("require", "off"):
        with gg.use_kernels(mode):
            y = class_cross_entropy(gg.tensor(x, requires_grad=True), target, weight)
        kept.append(y.grad_fn.saved())
    for name in ("largest", "total", "counted"):
        a, w = kept[0][name], kept[1][name]
        assert a.shape == w.shape == (() if name == "counted" else target.shape)
        assert a.dtype == w.dtype
        np.testing.assert_allclose(a, w, rtol=1e-13)


@pytest.mark.parametrize(("first", "second"), [("off", "require"), ("require", "off")])
def test_forward_and_backward_need_not_be_of_one_kind(first, second):
    x, target, weight, g = operands((2, 6, 40))
    options = {"reduction": "none", "label_smoothing": 0.1}
    z = gg.tensor(x, requires_grad=True)
    with gg.use_kernels(first):
        y = gg.cross_entropy(z, target, weight, **options)
    with gg.use_kernels(second):
        y.backward(gg.tensor(g))
    want = run("off", x, target, weight, g, **options)
    np.testing.assert_allclose(z.grad.data, want[1], rtol=1e-11, atol=1e-14)


def test_no_probabilities_are_stored():
    """Forward nothing of the size of the logits is made, and backward the gradient alone."""
    x = np.zeros((200, 1000), "float32")  # below what is kept aside for further use
    z, target = gg.asarray(x).requires_grad_(), gg.asarray(np.zeros(200, int))
    with gg.use_kernels("require"):
        gg.cross_entropy(z, target).backward()  # compiled by now
        z.grad = None
        tracemalloc.start()
        try:
            y = gg.cross_entropy(z, target)
            forward = tracemalloc.get_traced_memory()[1]
            y.backward()
            backward = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert forward < 0.1 * x.nbytes
    assert x.nbytes <= backward < 1.1 * x.nbytes


@pytest.mark.parametrize("shape", [(3, 4), (2, 4, 3)])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.2}, {"reduction": "none"}])
def test_derivatives_of_every_order(options, shape):
    """The two numbers that are kept count as constants: what is recorded must not rest on them."""
    x, target, weight, _ = operands(shape)
    with gg.use_kernels("require"):
        gg.check_grads(
            lambda z: gg.cross_entropy(z, gg.tensor(target), gg.tensor(weight), **options),
            (gg.tensor(x),), order=3,
        )  # fmt: skip
        t = np.random.default_rng(1).standard_normal(shape)
        _, forward = gg.jvp(
            lambda z: gg.cross_entropy(z, target, weight, **options), (gg.tensor(x),),
            (gg.tensor(t),),
        )  # fmt: skip
    step = 1e-6
    high, low = (
        gg.cross_entropy(gg.tensor(x + s * t), target, weight, **options).data
        for s in (step, -step)
    )
    np.testing.assert_allclose(forward.data, (high - low) / (2 * step), rtol=1e-6, atol=1e-8)


# -- values out of the ordinary --------------------------------------------------------------------


def both(x, target, **options):
    """Rows as rows and as a tile, and what the generic text says."""
    options = {"reduction": "none", **options}
    g = np.ones(len(target), x.dtype)
    yield run("require", x, target, g=g, **options)
    loss, gx = run("require", x.T[None].copy(), target[None], g=g[None], **options)
    yield loss[0], gx[0].T
    with np.errstate(invalid="ignore", over="ignore"):
        yield run("off", x, target, g=g, **options)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_masks_infinities_and_nans(smoothing):
    x = np.random.default_rng(0).standard_normal((12, 5000))
    target = np.arange(12) * 7 + 2000
    x[0, :2500] = x[1, 2500:] = -INF  # the target of the first is masked out
    x[2] = -INF
    x[3, 4000] = x[4, 2028] = INF
    x[5, 10], x[6, 10] = NAN, -NAN
    x[7], x[8, 4500] = -NAN, 1e300
    x[9, :2100] = -INF
    x[9, 3] = -NAN
    x[10] += np.repeat([0.0, 25.0, 100.0, 50.0], 1250)
    x[11, 1:] = -INF
    rows, tile, generic = both(x, target, label_smoothing=smoothing)
    for got in (rows, tile):
        for a, w in zip(got, generic):
            np.testing.assert_allclose(a, w, rtol=1e-11, atol=1e-15)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_padding_may_hold_anything(smoothing):
    x = np.random.default_rng(0).standard_normal((4, 6))
    x[1], x[3, 2:4] = NAN, (INF, -INF)
    target = np.array([0, -100, 2, -100])
    rows, tile, generic = both(x, target, label_smoothing=smoothing)
    for loss, gx in (rows, tile, generic):
        assert np.all(np.isfinite(loss)) and np.all(np.isfinite(gx))
        assert not loss[1::2].any() and not gx[1::2].any()
        np.testing.assert_allclose(loss, generic[0], rtol=1e-13)


def test_far_from_zero_nothing_is_lost():
    """Beside logits of 1e4 a loss of 1e-3 is within the rounding of float32; it must survive."""
    x = np.zeros((2, 8), "float32")
    x[:, 0] = 7.0
    target = np.zeros(2, int)
    for near, far in zip(both(x, target), both(x + np.float32(16384.0), target)):
        assert 0.0063 < near[0][0] < 0.0064
        assert all(np.array_equal(a, b) for a, b in zip(near, far))


def test_a_target_that_is_no_class_does_no_harm():
    """Whoever calls the primitive itself is not checked: the result says so, memory stays whole."""
    for shape in ((3, 5), (1, 5, 3)):
        x = np.zeros(shape)
        target = np.array([1, 5, -7]).reshape((shape[0], *shape[2:]))
        with gg.use_kernels("require"):
            z = gg.tensor(x, requires_grad=True)
            y = class_cross_entropy(z, target, reduction="none")
            y.sum().backward()
        assert np.array_equal(np.isnan(y.data).reshape(-1), [False, True, True])
        bad = np.isnan(z.grad.data.reshape(3, 5) if len(shape) == 2 else z.grad.data[0].T)
        assert np.array_equal(bad.all(1), [False, True, True])
        assert not bad[0].any()


@pytest.mark.parametrize("shape", [(0, 4), (0, 4, 3), (2, 4, 0)])
def test_no_rows(shape):
    x, target = np.zeros(shape), np.zeros((shape[0], *shape[2:]), int)
    for mode in ("require", "off"):
        loss, gx = run(mode, x, target, reduction="sum")
        assert loss == 0.0
        assert gx.shape == shape
        with np.errstate(all="ignore"):
            assert np.isnan(run(mode, x, target)[0])


def test_half_precision_counts_beyond_its_own_numbers():
    x = np.zeros((70_000, 2), "float16")
    loss, gx = run("require", x, np.zeros(70_000, int), g=np.array(1024.0, "float16"))
    assert loss == pytest.approx(np.log(2), rel=1e-3)
    np.testing.assert_allclose(wide(gx)[0], [-512 / 70_000, 512 / 70_000], rtol=1e-3)


# -- errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["require", "auto", "off"])
def test_errors_are_the_same_in_every_mode(mode):
    x = gg.zeros((4, 3))
    with gg.use_kernels(mode):
        with pytest.raises(
            OutOfRangeError, match=r"target 3 at \[2\] is no class; they are 0 to 2"
        ):
            gg.cross_entropy(x, [0, 1, 3, -1])
        with pytest.raises(ShapeError, match=r"\(4,\); got \(5,\)"):
            gg.cross_entropy(x, [0] * 5)
        with pytest.raises(ShapeError, match=r"weight of shape \(2,\) for 3 classes"):
            gg.cross_entropy(x, [0] * 4, [1.0, 1.0])
        with pytest.raises(DTypeError, match="not booleans"):
            gg.cross_entropy(x, gg.zeros((4, 3), dtype=bool))


def test_refusals():
    x, target = gg.zeros((4, 3), dtype="float32"), gg.zeros(4, dtype=int)
    with gg.use_kernels("require"):
        for bad, words in (
            (lambda: class_cross_entropy(gg.zeros((4, 3), dtype=int), target), "int64"),
            (lambda: class_cross_entropy(x, gg.zeros(4)), "targets of float64"),
            (lambda: class_cross_entropy(x, gg.zeros(3, dtype=int)), r"targets of shape \(3,\)"),
            (
                lambda: class_cross_entropy(x, target, gg.ones(2)),
                r"shape \(2,\) for 3 cl",
            ),
            (lambda: gg.cross_entropy(gg.zeros((1, 0)), [-100]), "no classes"),
            (lambda: gg.cross_entropy(x, target, ignore_index=1 << 63), str(1 << 63)),
        ):
            with pytest.raises(KernelError, match=words):
                bad()


# -- the machine -----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(300, 700), (2, 70, 900)])
def test_any_number_of_threads_gives_the_same_bits(shape):
    from numba import get_num_threads, set_num_threads

    x, target, weight, _ = operands(shape, "float32")
    before = get_num_threads()
    seen = []
    try:
        for threads in [*range(1, before + 1), 1]:
            set_num_threads(threads)
            seen.append(run("require", x, target, weight, label_smoothing=0.1))
    finally:
        set_num_threads(before)
    for other in seen[1:]:
        assert all(np.array_equal(a, w) for a, w in zip(other, seen[0]))


@pytest.mark.parametrize("storage", ["float32", "float64"])
def test_loops_are_vectorised(storage):
    a, b, c, d, e = np.ones((5, 64), storage)
    one = a[0]
    for loop, args in {
        family._sum_shifted: (a, one),
        family._dot_shifted: (a, b, one),
        family._write_less: (a, b, one, one, one),
        family._write_less_weighted: (a, b, one, one, one, c),
        family._add_shifted: (a, b, one, c),
        family._write_gradients: (a, b, c, d, e, one),
    }.items():
        assert packed(assembly(loop[storage], *args)) >= 1, loop
