"""Kernels for NumPy arrays, compiled by Numba when they are first wanted.

This file is a table and imports no compiler: which operation has kernels in which module, and from
how many elements on they are quicker than NumPy.
"""

from gpugrad.backend.kernels import slots

#: Operations that are one formula, of the same name; their derivatives are `name_partial`.
PLAIN = (
    "exp", "expm1", "log", "log1p",
    *(
        name + part
        for name in (
            "erf", "tanh", "sigmoid", "logsigmoid", "softplus", "silu", "mish", "elu", "celu",
            "selu", "relu", "relu6", "relu_squared", "leaky_relu", "threshold", "hardtanh",
            "hardsigmoid", "hardswish", "softsign", "tanhshrink",
        )
        for part in ("", "_partial")
    ),
    "softshrink", "hardshrink", "shrink_partial",
    "swiglu", "swiglu_gate_partial", "swiglu_value_partial",
)  # fmt: skip

#: Operations with a parameter `approximate`: the formula itself, or the one by tanh.
APPROXIMATE = (
    "gelu", "gelu_partial", "geglu", "geglu_gate_partial", "geglu_value_partial",
)  # fmt: skip

SLOTS = slots(
    __name__,
    {
        "elementwise": (1 << 14, (*PLAIN, *APPROXIMATE)),
        "bias": (1 << 14, ("bias_activation", "bias_activation_backward")),
    },
)
