"""Clipping policies without a memory: by the global norm, by value, per tensor, and AGC.

There are two kinds. A :class:`NormPolicy` looks at one number, the norm of all gradients, and gives
back one number that they are multiplied by, which an optimiser folds into its update. A
:class:`GradientPolicy` changes every gradient in its own way, in a pass of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

from gpugrad.backend import Array, Backend
from gpugrad.clip.checks import check_bound, check_norm_type
from gpugrad.clip.norms import norm_of, unit_norms
from gpugrad.clip.scaling import QUIET, clipped, ratio, scaled
from gpugrad.core.tensor import Tensor
from gpugrad.errors import ParameterError

__all__ = ["AGC", "GlobalNorm", "GradientPolicy", "NormPolicy", "TensorNorm", "Value"]


class _Policy:
    def __init__(self, **options: Any) -> None:
        self._options = options  # as they were given, for the text of a policy

    def state_dict(self) -> dict[str, Any]:
        """What the policy remembers: tensors and ints, copies. {} for one without a memory."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `state_dict` gave, tensors or arrays."""
        if state_dict:
            raise ParameterError(
                f"{type(self).__name__} keeps no state, and was given {sorted(state_dict)}; it is "
                "the state of another policy"
            )

    def __repr__(self) -> str:
        shown = ", ".join(f"{name}={value!r}" for name, value in self._options.items())
        return f"{type(self).__name__}({shown})"


class NormPolicy(_Policy):
    """A policy that multiplies all gradients by one number, given their norm.

    Attributes
    ----------
    norm_type:
        The order of the norm that it wants.
    """

    norm_type: float

    def coefficient(self, m: Backend, norm: Array) -> Array:
        """What gradients of this norm are multiplied by: a 0-d array of the norm's dtype.

        `m` is the backend of the raw 0-d array `norm`. Nothing is read from the device. Call it
        once a step: some policies remember the norm.
        """
        with QUIET():
            return m.bind(self._coefficient)(m, norm)

    def _coefficient(self, m: Backend, norm: Array) -> Array:
        raise NotImplementedError


class GradientPolicy(_Policy):
    """A policy that changes every gradient in its own way."""

    def apply(self, m: Backend, params: list[Array], grads: list[Array]) -> None:
        """Clip the raw arrays `grads` of the parameters `params`, whose backend is `m`.

        They change in place; in a library whose arrays cannot, new ones take their places in the
        list. Nothing is read from the device.
        """
        with QUIET():
            m.bind(self._apply)(m, params, grads)

    def _apply(self, m: Backend, params: list[Array], grads: list[Array]) -> None:
        for i, (p, g) in enumerate(zip(params, grads)):
            if math.prod(g.shape):
                grads[i] = self._clip(m, p, g)

    def _clip(self, m: Backend, p: Array, g: Array) -> Array:
        raise NotImplementedError


class GlobalNorm(NormPolicy):
    """Scale all gradients so that their total norm is at most `max_norm` (Pascanu et al., 2013).

    Parameters
    ----------
    max_norm:
        Zero or more. A norm that is NaN makes every gradient NaN; an infinite one makes finite
        elements 0.
    norm_type:
        From 0.5 on, or infinity.

    >>> import gpugrad as gg
    >>> from gpugrad.clip import GlobalNorm, total_norm
    >>> norm = total_norm([gg.tensor([30.0, 40.0])])
    >>> round(float(GlobalNorm(1.0).coefficient(norm.backend, norm.data)), 6)
    0.02
    """

    def __init__(self, max_norm: float, norm_type: float = 2.0) -> None:
        self.max_norm = check_bound(max_norm)
        self.norm_type = check_norm_type(norm_type)
        super().__init__(max_norm=self.max_norm, norm_type=self.norm_type)

    def _coefficient(self, m: Backend, norm: Array) -> Array:
        return ratio(m, norm, self.max_norm)


class Value(GradientPolicy):
    """Bring every element into [-bound, bound]; NaN stays NaN.

    >>> import numpy as np
    >>> from gpugrad.backend import backend_of
    >>> g = np.array([-3.0, 0.5])
    >>> Value(1.0).apply(backend_of(g), [np.zeros(2)], [g])
    >>> g.tolist()
    [-1.0, 0.5]
    """

    def __init__(self, bound: float) -> None:
        self.bound = check_bound(bound, "bound")
        super().__init__(bound=self.bound)

    def _clip(self, m: Backend, p: Array, g: Array) -> Array:
        return clipped(m, g, self.bound)


class TensorNorm(GradientPolicy):
    """Scale each gradient by itself so that its norm is at most `max_norm`.

    >>> import numpy as np
    >>> from gpugrad.backend import backend_of
    >>> grads = [np.array([30.0, 40.0]), np.array([0.5])]
    >>> TensorNorm(1.0).apply(backend_of(grads[0]), grads, grads)
    >>> [np.round(g, 6).tolist() for g in grads]
    [[0.6, 0.8], [0.5]]
    """

    def __init__(self, max_norm: float, norm_type: float = 2.0) -> None:
        self.max_norm = check_bound(max_norm)
        self.order = check_norm_type(norm_type)
        super().__init__(max_norm=self.max_norm, norm_type=self.order)

    def _clip(self, m: Backend, p: Array, g: Array) -> Array:
        return scaled(m, g, ratio(m, norm_of(m, [g], self.order), self.max_norm))


class AGC(GradientPolicy):
    """Adaptive gradient clipping (Brock et al., 2021, arXiv 2102.06171): small beside the weights.

    A unit is a row of a weight, which belongs to one output: element i of its first axis, over all
    the others. Biases and gains, with fewer than two axes, are one unit. The gradient of a unit is
    scaled so that its norm is at most `clipping` times the norm of the unit's weights.

    Parameters
    ----------
    clipping:
        The paper's λ.
    eps:
        The least norm that weights count with, so that what begins at zero can grow.
    skip:
        Parameters to leave alone: tensors, or a function of a parameter's raw array that tells. The
        paper leaves out the last layer, `skip=net.head.parameters()`; `skip=lambda p: p.ndim < 2`
        leaves out biases and gains.

    >>> import numpy as np
    >>> from gpugrad.backend import backend_of
    >>> w, g = np.array([[3.0, 4.0], [0.6, 0.8]]), np.ones((2, 2))
    >>> AGC(0.1).apply(backend_of(w), [w], [g])
    >>> np.linalg.norm(g, axis=1).round(6).tolist()
    [0.5, 0.1]
    """

    def __init__(
        self,
        clipping: float = 0.01,
        eps: float = 1e-3,
        skip: Iterable[Tensor] | Callable[[Array], bool] = (),
    ) -> None:
        self.clipping = check_bound(clipping, "clipping")
        self.eps = check_bound(eps, "eps")
        self.skip = skip if callable(skip) else tuple(skip)
        super().__init__(clipping=self.clipping, eps=self.eps)
        if not callable(self.skip):
            for x in self.skip:
                if not isinstance(x, Tensor):
                    raise ParameterError(
                        f"skip has {type(x).__name__}; give tensors, as in "
                        "skip=net.head.parameters(), or a function of a parameter's array"
                    )

    def _skips(self, p: Array) -> bool:
        if callable(self.skip):
            return bool(self.skip(p))
        return any(p is x.data for x in self.skip)

    def _clip(self, m: Backend, p: Array, g: Array) -> Array:
        if self._skips(p):
            return g
        norm = unit_norms(m, g)
        most = self.clipping * m.maximum(unit_norms(m, p), self.eps)
        # Where it is more there is no division by zero; elsewhere the quotient is not used.
        factor = m.where(norm > most, most / norm, m.ones_like(norm))
        return scaled(m, g, factor)
