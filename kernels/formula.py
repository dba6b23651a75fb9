"""Formulas of `gpugrad/ops/formulas.py` as scalar functions of a compiler, for every target."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

from gpugrad.backend import Backend
from gpugrad.backend.kernels import Kernel
from gpugrad.kernels.template import Template
from gpugrad.kernels.trace import scalar_function
from gpugrad.ops import formulas

__all__ = ["APPROXIMATE", "PLAIN", "Formula", "approximated", "formula", "map_kernels"]

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

#: Arguments of a formula that are arrays; the others are numbers.
_OPERANDS = ("g", "x", "y", "target", "variance")
_GATES = ("g", "gate", "value")


class Formula:
    """A formula of `ops/formulas.py` as a scalar template of a fixed signature.

    Attributes
    ----------
    operands, numbers:
        Its arguments after `m`: arrays, and numbers with their default values.
    scalar:
        A template of `(operands…, p, q)`: at most two numbers, by position.
    plain:
        A template of `(operands…)`, the numbers being the default ones.
    """

    def __init__(self, formula: Callable[..., Any], name: str) -> None:
        parameters = dict(inspect.signature(formula).parameters)
        del parameters["m"]
        self.name = name
        arrays = _GATES if "gate" in parameters else _OPERANDS
        self.operands = [p for p in parameters if p in arrays]
        self.numbers = {
            p: 0.0 if parameters[p].default is inspect.Parameter.empty else parameters[p].default
            for p in parameters
            if p not in self.operands
        }
        spare = [f"unused{i}" for i in range(2 - len(self.numbers))]
        arguments = [*self.operands, *self.numbers, *spare]
        self.scalar: Template = scalar_function(formula, f"{name}_of", arguments=arguments)
        self.plain: Template = scalar_function(formula, f"{name}_plain", fixed=self.numbers)

    def values(self, parameters: dict[str, Any], positional: tuple[Any, ...]) -> list[float]:
        """The two numbers of a call."""
        given = {**self.numbers, **dict(zip(self.numbers, positional)), **parameters}
        return [*(float(given[name]) for name in self.numbers), 0.0, 0.0][:2]


@cache
def formula(name: str) -> Formula:
    """The compiled side of a formula, by its name; of a plain function such as `exp`, too."""
    own = getattr(formulas, name, None)
    if own is None:

        def own(m: Any, x: Any) -> Any:
            return getattr(m, name)(x)

    return Formula(own, name)


def map_kernels(map_kernel: Callable[[str], Kernel]) -> dict[str, Kernel]:
    """The kernels of all operations that are formulas, for the slots of a backend.

    `map_kernel` makes that of one formula.
    """
    return {
        **{name: map_kernel(name) for name in PLAIN},
        **{name: _approximate(name, map_kernel) for name in APPROXIMATE},
    }


def approximated(name: str) -> dict[str, str]:
    """For each value of the parameter `approximate`, the formula that it selects."""
    return {"none": name, "tanh": name.replace("gelu", "gelu_tanh").replace("geglu", "geglu_tanh")}


def _approximate(name: str, map_kernel: Callable[[str], Kernel]) -> Kernel:
    kernels = {value: map_kernel(one) for value, one in approximated(name).items()}

    def chosen(args: tuple[Any, ...], approximate: str | None) -> tuple[Kernel, tuple[Any, ...]]:
        # A rule hands its parameters on by position, a forward by name.
        if isinstance(args[-1], str):
            *operands, approximate = args
            args = tuple(operands)
        return kernels[approximate or "none"], args

    def run(m: Backend, *args: Any, approximate: str | None = None) -> Any:
        kernel, operands = chosen(args, approximate)
        return kernel.run(m, *operands)

    def refuse(m: Backend, *args: Any, approximate: str | None = None) -> Any:
        if (wanted := next((a for a in args if isinstance(a, str)), approximate)) not in kernels:
            return f"no formula for approximate={wanted!r}"
        kernel, operands = chosen(args, approximate)
        return kernel.refuse(m, *operands)

    return Kernel(run, kernels["none"].label, refuse)
