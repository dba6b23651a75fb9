"""The part of CuPy that launches kernels, without a GPU: it notes what it is told."""

from __future__ import annotations

import math
from types import ModuleType, SimpleNamespace

import numpy as np


class FakeArray:
    """A contiguous array: an address, a shape and a dtype."""

    def __init__(self, shape, dtype, address=0x1000, device=0):
        self.shape = shape if isinstance(shape, tuple) else (shape,)
        self.dtype = np.dtype(dtype)
        self.size = math.prod(self.shape)
        self.ndim = len(self.shape)
        self.data = SimpleNamespace(ptr=address, device_id=device)
        self.flags = SimpleNamespace(c_contiguous=True)


FakeArray.__module__ = "cupy._core.core"


class FakeDriver:
    """What the driver was asked, and what it answers."""

    def __init__(self, gpus=1, capability="90"):
        self.gpus = gpus
        self.capability = capability
        self.current = 0
        self.loaded: list[tuple[int, bytes]] = []
        self.launched: list[tuple] = []
        self.refuses = ""

    def module(self) -> ModuleType:
        """What `import cupy` gives."""
        driver = self

        class Device:
            def __init__(self, number):
                self.number = number
                self.compute_capability = driver.capability
                self.attributes = {"MultiProcessorCount": 132}

            def __enter__(self):
                self.before, driver.current = driver.current, self.number

            def __exit__(self, *_):
                driver.current = self.before

        class Module:
            def load(self, text):
                if driver.refuses:
                    raise RuntimeError(driver.refuses)
                assert text.endswith(b"\0")
                driver.loaded.append((driver.current, text))
                self.home = driver.current

            def get_function(self, name):
                assert f".entry {name}(".encode() in driver.loaded[-1][1]
                home = self.home

                def function(blocks, threads, arguments):
                    assert driver.current == home, "launched in another GPU's context"
                    driver.launched.append((name, blocks, threads, list(arguments)))

                return function

        cupy = ModuleType("cupy")
        cupy.empty = lambda shape, dtype: FakeArray(shape, dtype, device=driver.current)
        cupy.cuda = SimpleNamespace(
            Device=Device,
            function=SimpleNamespace(Module=Module),
            runtime=SimpleNamespace(
                getDeviceCount=lambda: driver.gpus, getDevice=lambda: driver.current
            ),
        )
        return cupy
