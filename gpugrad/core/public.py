"""What the engine offers to users, by name."""

from __future__ import annotations

from gpugrad.backend import Backend, register_backend, register_kernel
from gpugrad.backend.kernels import Kernel, fusible, kernel_mode, use_kernels
from gpugrad.backend.precision import (
    get_float32_matmul_precision,
    set_float32_matmul_precision,
)
from gpugrad.backend.threads import get_num_threads, set_num_threads
from gpugrad.core.autocast import autocast, is_autocast_enabled
from gpugrad.core.checks import check_grads
from gpugrad.core.compiling import compile
from gpugrad.core.conversion import asarray, from_dlpack, tensor
from gpugrad.core.explain import Explanation, explain
from gpugrad.core.modes import enable_grad, is_grad_enabled, no_grad, set_grad_enabled
from gpugrad.core.primitive import Sample, composite, elementwise, linear, primitive, sample
from gpugrad.core.tensor import Tensor
from gpugrad.core.transforms import grad, hessian, hvp, identity, jacobian, jvp, value_and_grad, vjp
from gpugrad.core.view import Graph, graph

__all__ = [
    "Backend",
    "Explanation",
    "Graph",
    "Kernel",
    "Sample",
    "Tensor",
    "asarray",
    "autocast",
    "check_grads",
    "compile",
    "composite",
    "elementwise",
    "enable_grad",
    "explain",
    "from_dlpack",
    "fusible",
    "get_float32_matmul_precision",
    "get_num_threads",
    "grad",
    "graph",
    "hessian",
    "hvp",
    "identity",
    "is_autocast_enabled",
    "is_grad_enabled",
    "jacobian",
    "jvp",
    "kernel_mode",
    "linear",
    "no_grad",
    "primitive",
    "register_backend",
    "register_kernel",
    "sample",
    "set_float32_matmul_precision",
    "set_grad_enabled",
    "set_num_threads",
    "tensor",
    "use_kernels",
    "value_and_grad",
    "vjp",
]
