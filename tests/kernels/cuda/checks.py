"""What kernels must compute, whatever runs them: a simulator, PTX in Python, or a GPU.

Each check takes `put` and `get`, which bring an array to the machine and back.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

from gpugrad.backend import backend_for_device
from gpugrad.kernels.cuda import bias, elementwise, reduce
from gpugrad.kernels.formula import formula
from gpugrad.ops import formulas

DTYPES = {
    "float16": np.dtype("float16"),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype("float32"),
    "float64": np.dtype("float64"),
}

#: Half a unit in the last place, relative: of what is stored, and of what is computed in.
EPS = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24, "float64": 2.0**-53}
ARITHMETIC = {"float16": 2.0**-24, "bfloat16": 2.0**-24, "float32": 2.0**-24, "float64": 2.0**-53}

#: The numbers of formulas that have no default values for them.
NUMBERS = {"threshold": (0.5, -1.5), "threshold_partial": (0.5,)}

#: Formulas that are not smooth at 0, where the others are looked at too.
POSITIVE = ("log",)

numpy = backend_for_device("cpu")


def same(x):
    return x


def wide(x):
    return np.asarray(x).astype("float64")


def inputs(storage, count, seed, shift=0):
    """Numbers of all magnitudes; with `shift` they begin so many elements after an address that
    packs may be loaded from."""
    random = np.random.default_rng(seed)
    x = random.normal(size=count + shift) * 2.0 ** random.integers(-6, 4, size=count + shift)
    return x.astype(DTYPES[storage])[shift:]


def close(got, want, storage, scale):
    """`got` is `want` rounded to the storage, after a few roundings of numbers of size `scale`."""
    got, want = wide(got), wide(want)
    assert got.shape == want.shape
    few = 16 * ARITHMETIC[storage]
    slack = (1.01 * EPS[storage] + few) * np.abs(want) + few * scale
    if storage == "float16":
        slack = slack + 2.0**-25  # subnormal numbers
    bad = ~(np.abs(got - want) <= slack)
    assert not bad.any(), f"got {got[bad][:5]}, wanted {want[bad][:5]}"


def sizes(*arrays):
    return np.prod([1 + np.abs(wide(x)) for x in arrays], axis=0)


def truth(name, arrays, numbers):
    own = getattr(formulas, name, None)
    if own is None:
        return getattr(np, name)(*arrays) if name != "erf" else numpy.erf(*arrays)
    return own(numpy, *arrays, *numbers)


def check_map(name, storage, put=same, get=same, count=13, shift=0, numbers=None):
    """An element-wise formula."""
    made = formula(name)
    arrays = [inputs(storage, count, seed, shift) for seed in range(len(made.operands))]
    if name in POSITIVE:
        arrays = [np.abs(x) for x in arrays]
    if name == "log1p":
        arrays = [np.maximum(x, DTYPES[storage].type(-0.9)) for x in arrays]
    if name in ("exp", "expm1"):
        arrays = [np.minimum(x, DTYPES[storage].type(8)) for x in arrays]
    given = numbers if numbers is not None else NUMBERS.get(name, ())
    out = get(elementwise.map_implementation(name).run(numpy, *(put(x) for x in arrays), *given))
    assert out.dtype == DTYPES[storage]
    close(out, truth(name, [wide(x) for x in arrays], given), storage, sizes(*arrays))


def check_bias(activation, storage, put=same, get=same, shape=(5, 13), shift=0):
    """Bias and activation, forward and backward with both gradients and the statistics."""
    rows, columns = shape
    g, x = (inputs(storage, rows * columns, seed, shift).reshape(shape) for seed in (0, 1))
    b = inputs(storage, columns, 2)
    z = wide(x) + wide(b)
    y = truth(activation, [z], ())
    close(
        get(bias.launch_bias_activation(put(x), put(b), activation)),
        y,
        storage,
        sizes(x) + sizes(b),
    )

    told = y if formula(f"{activation}_partial").operands == ["g", "y"] else z
    gx = getattr(formulas, f"{activation}_partial")(numpy, wide(g), told)
    found = bias.launch_bias_activation_backward(put(g), put(x), put(b), activation)
    got_gx, got_gb, squares, bad = (get(part) for part in found)
    scale = sizes(g) * (sizes(x) + sizes(b))
    close(got_gx, gx, storage, scale)
    close(got_gb, gx.sum(0), storage, scale.sum(0))
    np.testing.assert_allclose(
        squares, [(gx**2).sum()], rtol=1e-4 if storage != "float64" else 1e-9
    )
    assert bad.tolist() == [0]

    home = put(np.full(columns, 9, DTYPES[storage]))
    run = bias.KERNELS["bias_activation_backward"].run
    same_gx, there = run(numpy, put(g), put(x), put(b), activation, bias_home=home)
    assert there is home
    assert np.array_equal(get(there), got_gb) and np.array_equal(get(same_gx), got_gx)


def check_rows(storage, put=same, get=same, shape=(5, 13), shift=0):
    """Sums over all axes but the last, into memory that is given or not."""
    kernel = bias.KERNELS["sum_over_rows"]
    g = inputs(storage, int(np.prod(shape)), 0, shift).reshape(shape)
    over = tuple(range(len(shape) - 1))
    home = put(np.full(shape[-1:], 9, DTYPES[storage]))
    for there in (None, home):
        assert kernel.refuse(numpy, put(g), shape[-1:], there) is None
        got = kernel.run(numpy, put(g), shape[-1:], there)
        assert there is None or got is there
        assert got.dtype == g.dtype
        close(get(got), wide(g).sum(over), storage, sizes(g).sum(over))


def check_bias_counts(put=same, get=same):
    """Elements of the gradient that are not finite are counted, and spoil what they should."""
    g, x, b = inputs("float32", 60, 0), inputs("float32", 60, 1), inputs("float32", 12, 2)
    g[[7, 30]] = np.nan, np.inf
    parts = bias.launch_bias_activation_backward(
        put(g.reshape(5, 12)), put(x.reshape(5, 12)), put(b), "tanh"
    )
    _, gb, squares, bad = (get(part) for part in parts)
    assert bad.tolist() == [2]
    assert not np.isfinite(squares[0])
    assert np.flatnonzero(~np.isfinite(gb)).tolist() == [6, 7]


def check_summary(storage, count, put=same, get=same, shift=0):
    """Σx², max |x| and the count of one array."""
    x = inputs(storage, count, 3, shift)
    squares, peak, bad = (get(part) for part in reduce.launch_summary(put(x)))
    np.testing.assert_allclose(squares, [(wide(x) ** 2).sum()], rtol=1e-5)
    assert peak.tolist() == [np.abs(wide(x)).max(initial=0)]
    assert bad.tolist() == [0]


def check_summary_counts(storage, put=same, get=same, count=500):
    """One NaN is found wherever it is, and an infinity is not NaN."""
    for place in (0, 1, count // 2, count - 1):
        x = inputs(storage, count, 4)
        x[place] = np.nan
        squares, peak, bad = (get(part) for part in reduce.launch_summary(put(x)))
        assert np.isnan(squares[0])
        assert np.isnan(peak[0])
        assert bad.tolist() == [1]
        x[place] = -np.inf
        squares, peak, bad = (get(part) for part in reduce.launch_summary(put(x)))
        assert (squares[0], peak[0], bad[0]) == (np.inf, np.inf, 1)


def check_half_norm(put=same, get=same):
    """Gradients of 300, whose squares float16 cannot hold."""
    x = np.full(100, 300, np.float16)
    squares, peak, bad = (get(part) for part in reduce.launch_summary(put(x)))
    assert (squares[0], peak[0], bad[0]) == (9e6, 300, 0)
