"""Pooling: what it refuses, and what PyTorch's options mean."""

import numpy as np
import pytest

import gpugrad as gg
from gpugrad.errors import DTypeError, ParameterError, ShapeError
from gpugrad.nn import functional as F

POOLS = [F.max_pool2d, F.avg_pool2d]


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize(("args", "words"), [
    ((0,), "kernel_size=0; it must be 1 or more"),
    ((2, 0), "stride=0; it must be 1 or more"),
    ((2, 2, 2), "padding=2 for kernel_size=2; it is half of that at most"),
    (((1, 2, 3),), r"kernel_size=\(1, 2, 3\); it is an integer, or 2 of them"),
])  # fmt: skip
def test_options_that_cannot_be(pool, args, words):
    with pytest.raises(ParameterError, match=f"{pool.__name__}: {words}"):
        pool(gg.ones((1, 2, 8, 8)), *args)


@pytest.mark.parametrize("pool", POOLS)
def test_inputs_that_cannot_be(pool):
    with pytest.raises(ShapeError, match=rf"{pool.__name__}: input of shape \(8, 8\).*\(C, H, W\)"):
        pool(gg.ones((8, 8)), 2)
    with pytest.raises(ShapeError, match="has no window of kernel"):
        pool(gg.ones((1, 2, 3, 3)), 4)
    with pytest.raises(DTypeError, match="int64 elements; convert them"):
        pool(gg.ones((1, 2, 4, 4), dtype="int64"), 2)


def test_a_divisor_of_zero():
    with pytest.raises(ParameterError, match="avg_pool2d: divisor_override=0"):
        F.avg_pool2d(gg.ones((1, 2, 4, 4)), 2, divisor_override=0)


def test_adaptive_inputs_that_cannot_be():
    with pytest.raises(ShapeError, match=r"adaptive_avg_pool2d: input of shape \(4, 4\)"):
        F.adaptive_avg_pool2d(gg.ones((4, 4)), 1)
    with pytest.raises(ParameterError, match=r"output_size=\(0,\)"):
        F.adaptive_avg_pool1d(gg.ones((4, 4)), 0)
    with pytest.raises(ShapeError, match="has no element to average"):
        F.adaptive_avg_pool1d(gg.ones((4, 0)), 2)


def test_the_first_of_equals_gets_the_gradient():
    x = gg.ones((1, 1, 2, 2)).requires_grad_()
    F.max_pool2d(x, 2).sum().backward()
    assert x.grad.tolist() == [[[[1.0, 0.0], [0.0, 0.0]]]]


def test_large_windows_count_in_more_than_a_byte():
    x = gg.asarray(np.arange(400.0).reshape(1, 1, 20, 20)).requires_grad_()
    y, places = F.max_pool2d(x, 20, return_indices=True)
    y.sum().backward()
    assert places.tolist() == [[[[399]]]]
    assert x.grad.numpy().argmax() == 399 and x.grad.numpy().sum() == 1


def test_a_window_of_another_shape_than_the_stride():
    x = gg.asarray(np.arange(12.0).reshape(1, 3, 4))
    assert F.max_pool2d(x, (1, 2), stride=(2, 1)).tolist() == [[[1, 2, 3], [9, 10, 11]]]
    assert F.avg_pool2d(x, (3, 1)).tolist() == [[[4, 5, 6, 7]]]
