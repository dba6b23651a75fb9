"""gpugrad: automatic differentiation for NumPy and CuPy arrays.

>>> import gpugrad as gg
>>> x = gg.tensor([1.0, 2.0, 3.0], requires_grad=True)
>>> y = gg.sum(x * x)
>>> y.backward()
>>> x.grad
tensor([2., 4., 6.])
"""

import typing

from gpugrad import core, ops
from gpugrad import health as health  # empty until something of it is used
from gpugrad import nn as nn  # before the star: gpugrad.clip, the package, yields to clip
from gpugrad import optim as optim
from gpugrad.core.public import *  # noqa: F403
from gpugrad.nn.random import *  # noqa: F403
from gpugrad.ops import *  # noqa: F403 - the array namespace; each module's __all__ says what
from gpugrad.ops.arithmetic import clip as clip  # the function, not the package gpugrad.clip

__version__ = "0.1.0"
__array_api_version__ = "2024.12"

# mypy reads no sum of lists; without __all__ it takes every name that is starred.
if not typing.TYPE_CHECKING:
    __all__ = [
        "health",
        "nn",
        "optim",
        *core.public.__all__,
        *nn.random.__all__,
        *ops.__all__,
    ]
