"""A few core operations, forward and backward, by pytest-benchmark: ``pytest bench``."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

import gpugrad as gg
from gpugrad.errors import DeviceError

OPERATIONS: dict[str, tuple[Callable[..., gg.Tensor], int]] = {
    "add": (lambda x, y: x + y, 2),
    "multiply": (lambda x, y: x * y, 2),
    "matmul": (lambda x, y: x @ y, 2),
    "softmax": (lambda x: gg.softmax(x, axis=-1), 1),
    "sum": (lambda x: gg.sum(x, axis=0), 1),
}


@pytest.fixture(params=["cpu", "cuda:0"])
def device(request):
    try:
        gg.tensor(0.0, device=request.param)
    except (DeviceError, RuntimeError) as error:
        pytest.skip(f"{request.param} cannot be used: {error}")
    return request.param


@pytest.mark.parametrize("size", [8, 256])
@pytest.mark.parametrize("name", OPERATIONS)
def test_forward_and_backward(benchmark, name, size, device):
    function, count = OPERATIONS[name]
    rng = np.random.default_rng(0)
    operands = [
        gg.tensor(rng.standard_normal((size, size), dtype=np.float32), device=device,
                  requires_grad=True)
        for _ in range(count)
    ]  # fmt: skip
    g = gg.tensor(np.ones(function(*operands).shape, np.float32), device=device)

    def both_ways():
        for x in operands:
            x.grad = None
        function(*operands).backward(g)
        g.backend.synchronize()

    benchmark(both_ways)
    assert all(x.grad.shape == x.shape for x in operands)
