"""What the kernels of softmax and cross-entropy must compute, whatever runs them: see checks.py."""

from __future__ import annotations

import math

import numpy as np

import gpugrad as gg
from gpugrad.backend import backend_for_device
from gpugrad.core.primitive import registry
from gpugrad.kernels.cuda import cross_entropy, softmax
from gpugrad.ops import activations
from gpugrad.ops.losses import class_cross_entropy_backward
from tests.kernels.cuda.checks import DTYPES, close, inputs, same, wide

numpy = backend_for_device("cpu")


def generic(function, *args, **parameters):
    """What the generic text makes of raw arrays, without a word on NaN."""
    with gg.use_kernels("off"), np.errstate(all="ignore"):
        return function(numpy, *args, **parameters)


def forward_of(name):
    return registry[name].forward


def random(storage, shape, seed, shift=0, scale=1.0):
    drawn = scale * np.random.default_rng(seed).standard_normal(math.prod(shape) + shift)
    return drawn.astype(DTYPES[storage])[shift:].reshape(shape)


def check_softmax(name, storage, put=same, get=same, shape=(5, 13), axis=-1, shift=0):
    """Forward and backward along an axis."""
    x, g = (random(storage, shape, seed, shift) for seed in (0, 1))
    y = get(softmax.KERNELS[name].run(numpy, put(x), axis=axis))
    assert y.dtype == DTYPES[storage]
    close(y, generic(forward_of(name), wide(x), axis=axis), storage, 0.3)
    backward = f"{name}_backward"
    gx = get(softmax.KERNELS[backward].run(numpy, put(g), put(y), axis))
    scale = 1.0 + np.abs(wide(g)).sum(axis, keepdims=True)
    want = generic(getattr(activations, backward), wide(g), wide(y), axis=axis)
    close(gx, want, storage, np.broadcast_to(scale, shape))


#: Rows that are special: what there is at which places.
SPECIAL: tuple[list[tuple], ...] = (
    [], [(slice(0, 70), -np.inf)], [(slice(9, None), -np.inf)], [(slice(None), -np.inf)],
    [(3, np.inf)], [(75, np.inf)], [(0, np.nan)], [(79, -np.nan)],
    [(slice(0, 40), -np.inf), (7, -np.nan)], [(50, 3e4)], [(slice(1, None), -np.inf)],
    [(slice(None), -2e4)], [(slice(None), np.nan)],
)  # fmt: skip


def special_rows(storage):
    rows = random(storage, (len(SPECIAL), 80), 3)
    for row, places in zip(rows, SPECIAL):
        for place, value in places:
            row[place] = value
    return rows


def check_special(name, storage, put=same, get=same):
    """Masks, infinities and NaN, along memory and across it."""
    x = special_rows(storage)
    want = generic(forward_of(name), wide(x))
    for laid, axis in ((x, 1), (np.ascontiguousarray(x.T), 0)):
        y = get(softmax.KERNELS[name].run(numpy, put(laid), axis=axis))
        y = wide(np.moveaxis(y, axis, 1))
        assert np.array_equal(np.isnan(y), np.isnan(want))
        infinite = np.isinf(want)
        assert np.array_equal(y[infinite], want[infinite])
        finite = np.isfinite(want)
        close(y[finite].astype(DTYPES[storage]), want[finite], storage, 0.3)


def check_loss(
    storage, put=same, get=same, shape=(5, 13), reduction="mean", label_smoothing=0.0,
    weighted=False, ignore_index=-100, kind="int64", shift=0, x=None,
):  # fmt: skip
    """The loss, what is kept of it, and the gradient."""
    x = random(storage, shape, 0, shift) if x is None else x
    places = (shape[0], *shape[2:])
    target = np.random.default_rng(1).integers(0, shape[1], places)
    target.reshape(-1)[1::4] = ignore_index
    target = target.astype(kind)
    weight = np.abs(inputs("float32", shape[1], 2)) + np.float32(0.5) if weighted else None
    options = (ignore_index, reduction, label_smoothing)
    put_weight = None if weight is None else put(weight)
    run, run_back = (k.run for k in cross_entropy.KERNELS.values())
    loss, *kept = run(numpy, put(x), put(target), put_weight, *options)
    true_weight = None if weight is None else wide(weight)
    forward = forward_of("class_cross_entropy")
    truth = generic(forward, wide(x), target, true_weight, *options)
    got = get(loss)
    assert got.dtype == DTYPES[storage] and got.shape == truth[0].shape
    heaviest = 1.0 if weight is None else float(weight.max())
    terms = 1.0 if reduction != "sum" else target.size
    finite = np.isfinite(truth[0])
    assert np.array_equal(np.isnan(got), np.isnan(truth[0]))
    assert np.array_equal(wide(got)[~finite], truth[0][~finite], equal_nan=True)
    close(got[finite], truth[0][finite], storage, 2.0 * heaviest * terms)
    # Kept in the type that is computed in, whatever the storage.
    number = "float64" if storage == "float64" else "float32"
    defined = np.isfinite(truth[2])  # a row of which the sum is NaN has no greatest
    for mine, theirs in zip(kept, truth[1:]):
        mine = get(mine)
        assert mine.dtype == number and mine.shape == theirs.shape
        rtol = 1e-12 if number == "float64" else 1e-5
        if theirs.ndim:
            np.testing.assert_allclose(mine[defined], theirs[defined], rtol=rtol)
        else:
            np.testing.assert_allclose(mine, theirs, rtol=rtol)
    assert np.array_equal(np.isnan(get(kept[1])), np.isnan(truth[2]))

    g = random(storage, got.shape, 4)
    gx = get(run_back(numpy, put(x), put(g), put(target), put_weight, *kept, *options))
    want = generic(
        class_cross_entropy_backward, wide(x), wide(g), target, true_weight, *truth[1:], *options
    )
    assert gx.dtype == DTYPES[storage] and gx.shape == x.shape
    finite = np.isfinite(want)
    assert np.array_equal(np.isnan(gx), np.isnan(want))
    assert not np.any(wide(gx)[np.broadcast_to((target == ignore_index)[:, None], shape)])
    close(gx[finite], want[finite], storage, 2.0 * heaviest * (1.0 + np.abs(wide(g)).max()))


def check_special_losses(put=same, get=same, label_smoothing=0.0):
    """Masks, infinities and NaN, of which some are padding."""
    x = special_rows("float32")
    for laid in (x, np.ascontiguousarray(x.T)[None]):
        check_loss(
            "float32", put, get, laid.shape, "none", label_smoothing, ignore_index=-1, x=laid
        )  # fmt: skip


def check_no_class(put=same, get=same):
    """A target that is no class: loss and gradient are NaN, and nothing else is touched."""
    for shape in ((3, 5), (1, 5, 3)):
        x = random("float32", shape, 0)
        target = np.array([1, 5, -7]).reshape(shape[0], *shape[2:])
        run, run_back = (k.run for k in cross_entropy.KERNELS.values())
        loss, *kept = run(numpy, put(x), put(target), None, -100, "none", 0.0)
        assert np.isnan(get(loss)).reshape(-1).tolist() == [False, True, True]
        g = put(np.ones(target.shape, np.float32))
        gx = get(run_back(numpy, put(x), g, put(target), None, *kept, -100, "none", 0.0))
        rows = np.isnan(gx if len(shape) == 2 else gx[0].T)
        assert rows.all(1).tolist() == rows.any(1).tolist() == [False, True, True]
