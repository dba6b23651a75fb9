"""gpugrad: automatic differentiation for NumPy and CuPy arrays.

>>> import gpugrad as gg
>>> x = gg.tensor([1.0, 2.0, 3.0], requires_grad=True)
>>> y = gg.sum(x * x)
>>> y.backward()
>>> x.grad
tensor([2., 4., 6.])
"""

from gpugrad import nn, ops, optim  # before the star: gpugrad.clip, the package, yields to clip
from gpugrad.backend import Backend, register_backend
from gpugrad.core.checks import check_grads
from gpugrad.core.modes import enable_grad, is_grad_enabled, no_grad, set_grad_enabled
from gpugrad.core.primitive import Sample, composite, elementwise, linear, primitive, sample
from gpugrad.core.tensor import Tensor, asarray, from_dlpack, tensor
from gpugrad.core.transforms import (
    grad,
    hessian,
    hvp,
    identity,
    jacobian,
    jvp,
    value_and_grad,
    vjp,
)
from gpugrad.core.view import Graph, graph
from gpugrad.nn.random import Generator, manual_seed
from gpugrad.ops import *  # noqa: F403 - the array namespace; each module's __all__ says what
from gpugrad.ops.arithmetic import clip as clip  # the function, not the package gpugrad.clip

__version__ = "0.1.0"
__array_api_version__ = "2024.12"

__all__ = [
    "Backend",
    "Generator",
    "Graph",
    "Sample",
    "Tensor",
    "asarray",
    "check_grads",
    "composite",
    "elementwise",
    "enable_grad",
    "from_dlpack",
    "grad",
    "graph",
    "hessian",
    "hvp",
    "identity",
    "is_grad_enabled",
    "jacobian",
    "jvp",
    "linear",
    "manual_seed",
    "nn",
    "no_grad",
    "optim",
    "primitive",
    "register_backend",
    "sample",
    "set_grad_enabled",
    "tensor",
    "value_and_grad",
    "vjp",
]
__all__ += ops.__all__
