"""Convolutions and pooling with options drawn at random, against PyTorch."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gpugrad as gg
from gpugrad.backend import backend_for_device
from gpugrad.errors import GpugradError
from gpugrad.nn import functional as F

torch = pytest.importorskip("torch")

#: The same examples in every run.
EXAMPLES = settings(max_examples=150, derandomize=True, report_multiple_bugs=False)


@pytest.fixture(autouse=True, scope="module")
def kernels_at_any_size():
    with pytest.MonkeyPatch.context() as patch:
        for slot in backend_for_device("cpu").slots.values():
            patch.setattr(slot, "at_least", 0)
        yield


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def laid(x, how):
    """The same elements, lying in memory in another way."""
    if how == "channels last" and x.ndim > 2:
        return np.moveaxis(np.ascontiguousarray(np.moveaxis(x, 1, -1)), -1, 1)
    if how == "strided":
        return np.repeat(x, 2, axis=-1)[..., ::2]
    return np.ascontiguousarray(x[::-1])[::-1] if how == "reversed" else x


def gradients(y, leaves, g, **more):
    """What PyTorch calls torch.autograd.grad."""
    y.backward(g, **more)
    found = [x.grad for x in leaves]
    for x in leaves:
        x.grad = None
    return found


def derivatives(y, leaves, number, gradients):
    """Values, gradients, and gradients of what these are used for; `number` makes a tensor."""
    yield y
    first = gradients(y, leaves, number(normal(*y.shape, seed=7)), create_graph=True)
    yield from first
    total = sum((g * number(normal(*g.shape, seed=8))).sum() for g in first)
    second = [None] * len(leaves)
    if total.requires_grad:
        second = gradients(total, leaves, number(np.ones(())))
    for x, g in zip(leaves, second, strict=True):
        # What has no share in the gradients has none, or zeros.
        yield number(np.zeros(x.shape)) if g is None else g


def both(ours, theirs, arrays, layout, mode):
    """The same numbers on both sides, or an error on both."""
    there = [torch.tensor(x, requires_grad=True) for x in arrays]
    try:
        wanted = theirs(*there)
    except (RuntimeError, ValueError):
        wanted = None
    here = [gg.tensor(laid(x, layout)).requires_grad_() for x in arrays]
    with gg.use_kernels(mode):
        if wanted is None:
            with pytest.raises(GpugradError):
                ours(*here)
            return
        if not wanted.isfinite().all():
            # A window without an element: of that, PyTorch's derivative writes anywhere.
            np.testing.assert_array_equal(ours(*here).detach().numpy(), wanted.detach().numpy())
            return
        got = derivatives(ours(*here), here, gg.tensor, gradients)
        grad = partial(torch.autograd.grad, allow_unused=True)
        for a, b in zip(got, derivatives(wanted, there, torch.tensor, grad), strict=True):
            np.testing.assert_allclose(
                a.detach().numpy(), b.detach().numpy(), rtol=1e-9, atol=1e-9, strict=True
            )


LAYOUTS = st.sampled_from(["plain", "channels last", "strided", "reversed"])
MODES = st.sampled_from(["auto", "off"])


@st.composite
def convolutions(draw):
    axes = draw(st.sampled_from([1, 2]))

    def each(low, high):
        return tuple(draw(st.integers(low, high)) for _ in range(axes))

    groups = draw(st.integers(1, 3))
    inner, outer = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    kernel, stride, dilation = each(1, 3), each(1, 3), each(1, 3)
    padding = draw(st.sampled_from(["valid", "same", "numbers", "numbers", "numbers"]))
    x = (draw(st.integers(0, 3)), groups * inner, *each(1, 8))
    return x, (groups * outer, inner, *kernel), {
        "stride": stride, "dilation": dilation, "groups": groups,
        "padding": each(0, 3) if padding == "numbers" else padding,
    }  # fmt: skip


@EXAMPLES
@given(convolutions(), st.booleans(), st.booleans(), LAYOUTS, MODES)
def test_convolutions(sizes, alone, biased, layout, mode):
    x, weight, options = sizes
    arrays = [normal(*(x[1:] if alone else x)), normal(*weight, seed=1)]
    if biased:
        arrays.append(normal(weight[0], seed=2))
    name = f"conv{len(x) - 2}d"
    ours, theirs = getattr(F, name), getattr(torch.nn.functional, name)
    both(
        lambda *of: ours(*of, **options), lambda *of: theirs(*of, **options), arrays,
        "plain" if alone else layout, mode,
    )  # fmt: skip


@st.composite
def pools(draw):
    axes = draw(st.sampled_from([1, 2]))

    def each(low, high):
        return tuple(draw(st.integers(low, high)) for _ in range(axes))

    kernel = each(1, 4)
    options = {
        "kernel_size": kernel,
        "stride": draw(st.sampled_from([None, each(1, 4)])),
        "padding": draw(st.sampled_from([0, 1, tuple(k // 2 for k in kernel)])),
        "ceil_mode": draw(st.booleans()),
    }
    x = (draw(st.integers(0, 2)), draw(st.integers(1, 3)), *each(1, 9))
    return x, options


@EXAMPLES
@given(pools(), st.integers(1, 3), st.booleans(), LAYOUTS, MODES)
def test_max_pools(sizes, dilation, alone, layout, mode):
    x, options = sizes
    arrays = [normal(*(x[1:] if alone else x))]
    name = f"max_pool{len(x) - 2}d"
    ours, theirs = getattr(F, name), getattr(torch.nn.functional, name)
    options["dilation"] = dilation
    both(
        lambda *of: ours(*of, **options), lambda *of: theirs(*of, **options), arrays,
        "plain" if alone else layout, mode,
    )  # fmt: skip


@EXAMPLES
@given(pools(), st.booleans(), st.sampled_from([None, 1, 3, -2]), st.booleans(), LAYOUTS, MODES)
def test_mean_pools(sizes, counted, divisor, alone, layout, mode):
    x, options = sizes
    arrays = [normal(*(x[1:] if alone else x))]
    name = f"avg_pool{len(x) - 2}d"
    ours, theirs = getattr(F, name), getattr(torch.nn.functional, name)
    options["count_include_pad"] = counted
    if len(x) == 4:
        options["divisor_override"] = divisor
    both(
        lambda *of: ours(*of, **options), lambda *of: theirs(*of, **options), arrays,
        "plain" if alone else layout, mode,
    )  # fmt: skip


@EXAMPLES
@given(st.data(), LAYOUTS, MODES)
def test_adaptive_pools(data, layout, mode):
    axes = data.draw(st.sampled_from([1, 2]))
    sizes = [data.draw(st.integers(1, 9)) for _ in range(axes)]
    out = [data.draw(st.sampled_from([1, 2, 3, 5, 7])) for _ in range(axes)]
    x = normal(data.draw(st.integers(0, 2)), 2, *sizes)
    name = f"adaptive_avg_pool{axes}d"
    ours, theirs = getattr(F, name), getattr(torch.nn.functional, name)
    both(lambda of: ours(of, out), lambda of: theirs(of, out), [x], layout, mode)
