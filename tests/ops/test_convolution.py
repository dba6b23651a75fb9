"""Convolutions: what they refuse, and what PyTorch's options mean."""

import numpy as np
import pytest

import gpugrad as gg
from gpugrad.errors import ParameterError, ShapeError
from gpugrad.nn import functional as F
from gpugrad.ops.convolution import convolution, fold, pads, places, spread, unfold
from tests.backend.counting import counting


def ones(*shape):
    return gg.ones(shape)


BAD_SHAPES = [
    (ones(2, 3, 8), ones(4, 5, 3), r"made for 5 channels, the input has 3; .*in_channels=3"),
    (ones(2, 3, 2), ones(4, 3, 3), r"axis 2 has 2 places and padding \(0, 0\).*spans 3; pad more"),
]  # fmt: skip


@pytest.mark.parametrize(("x", "weight", "words"), BAD_SHAPES)
def test_shapes_that_do_not_fit(x, weight, words):
    with pytest.raises(ShapeError, match=words):
        F.conv1d(x, weight)


def test_axes_that_do_not_fit():
    with pytest.raises(ShapeError, match=r"conv2d: input of shape \(2, 3, 4, 5, 6\).*\(C, H, W\)"):
        F.conv2d(ones(2, 3, 4, 5, 6), ones(4, 3, 3, 3))
    with pytest.raises(ShapeError, match=r"weight of shape \(4, 3, 3\)"):
        F.conv2d(ones(2, 3, 4, 5), ones(4, 3, 3))
    with pytest.raises(ShapeError, match=r"bias of shape \(3,\).*one element per output, \(4,\)"):
        F.conv1d(ones(2, 3, 8), ones(4, 3, 3), ones(3))
    with pytest.raises(ShapeError, match="3 outputs do not divide into groups"):
        F.conv1d(ones(2, 4, 8), ones(3, 2, 3), groups=2)


@pytest.mark.parametrize(("options", "words"), [
    ({"stride": 0}, "conv1d: stride=0; it must be 1 or more"),
    ({"stride": (1, 2)}, r"stride=\(1, 2\); it is an integer, or 1 of them"),
    ({"dilation": 1.5}, "dilation=1.5; it is an integer"),
    ({"padding": -1}, "padding=-1; it must be 0 or more"),
    ({"padding": "full"}, r'padding=\'full\'; it is "same", "valid", or a number'),
    ({"padding": "same", "stride": 2}, r'"same" keeps the size, which stride=\(2,\) does not'),
    ({"groups": True}, "groups=True; it is an integer"),
    ({"activation": "sine"}, "conv1d: no activation 'sine'; there are relu"),
])  # fmt: skip
def test_options_that_cannot_be(options, words):
    with pytest.raises(ParameterError, match=words):
        F.conv1d(ones(2, 3, 8), ones(4, 3, 3), **options)


def test_options_per_axis():
    assert spread((3,), 2, "", "", 1) == (3, 3)
    assert spread(np.int64(3), 2, "", "", 1) == (3, 3)
    assert pads("same", (3, 4), (1, 1), (2, 1), "") == ((2, 2), (1, 2))
    assert pads("valid", (3, 4), (1, 1), (2, 1), "") == ((0, 0), (0, 0))
    assert places(5, 3, 2, (0, 1), 2) == 1


def test_fold_is_the_transpose_of_unfold():
    from gpugrad.backend import backend_for_device

    m, rng = backend_for_device("cpu"), np.random.default_rng(0)
    options = {"kernel": (3, 2), "stride": (2, 1), "padding": ((1, 2), (0, 3)), "dilation": (1, 2)}
    x = rng.standard_normal((2, 3, 6, 5))
    windows = unfold(m, x, out=(4, 6), **options)
    other = rng.standard_normal(windows.shape)
    assert windows.shape == (2, 3, 6, 4, 6)
    back = fold(m, other, x.shape, **options)
    assert np.isclose((windows * other).sum(), (x * back).sum())


def test_gradients_that_nobody_wants_are_not_computed():
    x, w = gg.ones((1, 2, 5)), gg.ones((3, 2, 2)).requires_grad_()
    y = F.conv1d(x, w)
    y.sum().backward()
    assert x.grad is None and w.grad.shape == w.shape


def test_operands_of_two_dtypes():
    x = gg.ones((1, 2, 5), dtype="float32").requires_grad_()
    w = gg.ones((3, 2, 2), dtype="float64").requires_grad_()
    y = convolution(x, w, None, (1,), ((0, 0),), (1,))
    y.sum().backward()
    assert y.dtype == np.float64 and x.grad.dtype == np.float32 and w.grad.dtype == np.float64


def test_a_transpose_that_cannot_be():
    x, w = ones(2, 3, 5), ones(3, 4, 3)
    with pytest.raises(ParameterError, match="conv_transpose1d: output_padding=2; it must be"):
        F.conv_transpose1d(x, w, stride=2, output_padding=2)
    with pytest.raises(ShapeError, match=r"conv_transpose1d: input of shape \(2, 5, 5\)"):
        F.conv_transpose1d(ones(2, 5, 5), w)
    with pytest.raises(ShapeError, match="3 channels do not divide into 2 groups"):
        F.conv_transpose1d(x, w, groups=2)
    with pytest.raises(ShapeError, match="use less padding"):
        F.conv_transpose1d(ones(2, 3, 1), w, padding=2)


def backward_launches(function, *shapes):
    """How many operations the array library runs for the gradients of all operands.

    With one for each leaf whose gradient is a view, and is copied into memory of its own.
    """
    with counting() as counts:
        operands = [gg.ones(s, device="counting").requires_grad_() for s in shapes]
        y = function(*operands)
        g = gg.ones(y.shape, device="counting")
        counts.clear()
        y.backward(g)
        return counts.launches


def test_gradients_take_few_launches_however_large_the_kernel():
    def convolve(stride):
        return lambda x, w, b: F.conv2d(x, w, b, stride, 1)

    small, large = (
        backward_launches(convolve(1), (2, 4, 9, 9), (5, 4, k, k), (5,)) for k in (3, 5)
    )
    assert small == large == 8
    # Where windows are added up, one launch for each place in them.
    small, large = (
        backward_launches(convolve(2), (2, 4, 9, 9), (5, 4, k, k), (5,)) for k in (3, 5)
    )
    assert small == 9 + 9 and large == 25 + 9
    transposed = backward_launches(
        lambda x, w, b: F.conv_transpose2d(x, w, b, 2, 1), (2, 4, 9, 9), (4, 5, 4, 4), (5,)
    )
    assert transposed == 8
    assert backward_launches(lambda x: F.max_pool2d(x, 2), (2, 4, 8, 8)) == 3 + 1
    assert backward_launches(lambda x: F.max_pool2d(x, 3, 2), (2, 4, 9, 9)) == 9 + 4
