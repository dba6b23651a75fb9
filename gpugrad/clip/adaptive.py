"""Clipping policies that learn from the norms so far: AutoClip and ZClip.

Their memory is a few arrays of fixed size on the device of the norms. It is changed without a look
at any value, and a norm that is not finite leaves it as it was.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from gpugrad.backend import SPACES, Array, Backend
from gpugrad.clip.checks import check_norm_type, number
from gpugrad.clip.policies import NormPolicy
from gpugrad.clip.scaling import ratio
from gpugrad.core.conversion import asarray, tensor
from gpugrad.core.tensor import tensor_of
from gpugrad.errors import DeviceError, ParameterError

__all__ = ["AutoClip", "ZClip"]


class _Remembering(NormPolicy):
    """Keeps named arrays beside the norms; subclasses say which, and what they begin as."""

    def __init__(self, norm_type: float, **options: Any) -> None:
        self.norm_type = check_norm_type(norm_type)
        self._memory: dict[str, Array] = {}
        self._loaded: dict[str, np.ndarray[Any, Any]] = {}
        self._device = ""
        super().__init__(**options, norm_type=self.norm_type)

    def _begin(self, m: Backend, norm: Array) -> dict[str, Array]:
        raise NotImplementedError

    def _recall(self, m: Backend, norm: Array) -> dict[str, Array]:
        """The arrays, on the device of the norm; made, or brought there, at the first one."""
        device = m.device(norm)
        if not self._memory:
            self._memory = self._begin(m, norm)
            for name, value in self._loaded.items():
                dtype = m.numpy_dtype(self._memory[name])
                self._memory[name] = m.asarray(value, dtype=dtype, device=device, copy=True)
            self._loaded = {}
            self._device = device
        elif device != self._device:
            raise DeviceError(
                f"{type(self).__name__}: a norm on {device}, and the memory is on {self._device}; "
                "use one policy for each device"
            )
        return self._memory

    def _remember(self, m: Backend, fine: Array, **values: Array) -> None:
        """Take over new values where the 0-d array `fine` is true; the memory stays, if it can."""
        for name, value in values.items():
            old = self._memory[name]
            new = m.where(fine, value, old)
            if m.mutable:
                m.setitem(old, ..., new)
            else:
                self._memory[name] = new

    def state_dict(self) -> dict[str, Any]:
        """What the policy remembers: tensors and ints, copies."""
        if not self._memory:
            return {name: tensor(value) for name, value in self._loaded.items()}
        return {name: tensor(tensor_of(x)) for name, x in self._memory.items()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave, tensors or arrays; {} forgets everything.

        Everything is checked first: ParameterError for the state of another policy.
        """
        loaded = {name: asarray(value).cpu().numpy().copy() for name, value in state_dict.items()}
        like = np.zeros((), np.float64)
        wanted = self._begin(SPACES[type(like)], like) if loaded else {}
        for name in sorted(wanted.keys() | loaded.keys()):
            have = loaded[name].shape if name in loaded else "missing"
            want = wanted[name].shape if name in wanted else "not kept"
            if have != want and not self._accepts(name, have):
                raise ParameterError(
                    f"{self!r}: in the state {name} is {have}, here it is {want}; it is the state "
                    "of another policy"
                )
        self._loaded = loaded
        self._memory = {}

    def _accepts(self, name: str, shape: Any) -> bool:
        """Whether an array of another shape than in the beginning will do."""
        return False


class AutoClip(_Remembering):
    """Clip to a percentile of the norms so far (Seetharaman et al., 2020, arXiv 2007.14469).

    The bound of a step is the percentile of the norms of the latest steps, this one among them,
    interpolated as NumPy does.

    Parameters
    ----------
    percentile:
        From 0 to 100; the paper recommends 10.
    window:
        How many norms are remembered. None, as in the paper, is all: the memory doubles when it is
        full, and every step sorts it.
    norm_type:
        The order of the norm.

    >>> import gpugrad as gg
    >>> policy = AutoClip(50.0)
    >>> for norm in (1.0, 3.0, 4.0):
    ...     c = policy.coefficient(gg.tensor(norm).backend, gg.tensor(norm).data)
    >>> round(float(c), 4)  # the median, 3, over 4
    0.75
    """

    #: Norms that are remembered before the memory grows for the first time.
    FIRST = 1024

    def __init__(
        self, percentile: float = 10.0, window: int | None = None, norm_type: float = 2.0
    ) -> None:
        self.percentile = number(percentile, "percentile")
        if not 0 <= self.percentile <= 100:
            raise ParameterError(f"percentile is {self.percentile}; it must be from 0 to 100")
        self.window = None if window is None else whole(window, "window")
        self._steps = 0  # no fewer than the norms that are remembered; known without a look
        super().__init__(norm_type, percentile=self.percentile, window=self.window)

    def _begin(self, m: Backend, norm: Array) -> dict[str, Array]:
        return {
            "history": _filled(m, norm, self.window or self.FIRST, math.inf),
            "count": m.create("zeros", (), dtype="int32", device=m.device(norm)),
        }

    def _coefficient(self, m: Backend, norm: Array) -> Array:
        history, count = self._recall(m, norm).values()
        if self.window is None and self._steps == history.shape[0]:
            history = m.concat([history, _filled(m, norm, self._steps, math.inf)])
            self._memory["history"] = history
        self._steps += 1
        fine = m.isfinite(norm)
        size = history.shape[0]
        places = m.create("arange", size, dtype="int32", device=m.device(norm))
        history = m.where((places == count % size) & fine, norm, history)
        last = m.minimum(count - m.astype(~fine, count.dtype), size - 1)
        self._remember(m, fine, history=history, count=count + 1)
        return ratio(m, norm, self._percentile(m, history, m.maximum(last, 0), norm.dtype))

    def _percentile(self, m: Backend, history: Array, last: Array, dtype: Any) -> Array:
        """Of the places up to `last` in order; those that are empty are infinite, and go behind."""
        place = m.astype(m.asarray(last), dtype) * (self.percentile / 100)
        low = m.astype(m.asarray(place), last.dtype)
        pair = m.take(m.sort(history), m.stack([low, m.minimum(low + 1, last)]))
        share = place - m.astype(m.asarray(low), dtype)
        # Both ends are weighted: beside an infinite neighbour nothing may be subtracted.
        return m.where(share > 0, (1 - share) * pair[0] + share * pair[1], pair[0])

    def state_dict(self) -> dict[str, Any]:
        """What the policy remembers: tensors and ints, copies."""
        state = super().state_dict()
        return {**state, "steps": self._steps} if state else {}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        state = dict(state_dict)
        steps = int(state.pop("steps", 0))
        super().load_state_dict(state)
        self._steps = steps

    def _accepts(self, name: str, shape: Any) -> bool:
        # All of them may be any power of two by now.
        return self.window is None and name == "history" and isinstance(shape, tuple)


class ZClip(_Remembering):
    """Clip norms that are outliers by their z-score (Kumar et al., 2025, arXiv 2504.02507).

    Mean μ and variance σ² of the norms are followed by moving averages, which begin as those of the
    first `warmup` norms. A norm g whose score s = (g − μ)/σ is above z is brought to μ + (z²/s)·σ:
    the further out it is, the nearer to the mean it gets. The averages see the clipped norm.

    Parameters
    ----------
    z:
        The z-score from which on a norm is clipped.
    alpha:
        Share of an average that stays at every step.
    warmup:
        Steps that are only looked at.
    norm_type:
        The order of the norm.

    >>> import gpugrad as gg
    >>> policy = ZClip(warmup=4)
    >>> for norm in (0.9, 1.1, 0.9, 1.1, 100.0):
    ...     c = policy.coefficient(gg.tensor(norm).backend, gg.tensor(norm).data)
    >>> round(100 * float(c), 4)
    1.0006
    """

    def __init__(
        self, z: float = 2.5, alpha: float = 0.97, warmup: int = 25, norm_type: float = 2.0
    ) -> None:
        self.z, self.alpha = number(z, "z"), number(alpha, "alpha")
        self.warmup = whole(warmup, "warmup")
        if not 0 < self.z < math.inf:
            raise ParameterError(f"z is {self.z}; it must be positive and finite")
        if not 0 < self.alpha < 1:
            raise ParameterError(f"alpha is {self.alpha}; it must be between 0 and 1")
        super().__init__(norm_type, z=self.z, alpha=self.alpha, warmup=self.warmup)

    def _begin(self, m: Backend, norm: Array) -> dict[str, Array]:
        return {
            "mean": _filled(m, norm, None, 0.0),
            "variance": _filled(m, norm, None, 0.0),
            "count": m.create("zeros", (), dtype="int32", device=m.device(norm)),
        }

    def _coefficient(self, m: Backend, norm: Array) -> Array:
        mean, variance, count = self._recall(m, norm).values()
        warming = count < self.warmup
        beyond = norm - mean
        most = self.z * m.sqrt(variance)
        spike = ~warming & (beyond > most)  # so `beyond` is positive there
        target = m.where(spike, mean + most * most / beyond, norm)
        # A running mean and variance are moving averages whose newest share shrinks: 1, 1/2, 1/3, …
        newest = 1 / m.astype(m.asarray(count + 1), norm.dtype)
        weight = m.where(warming, newest, m.ones_like(newest) * (1 - self.alpha))
        new_mean = mean + weight * (target - mean)
        after = target - new_mean
        square = m.where(warming, (target - mean) * after, after * after)
        new_variance = variance + weight * (square - variance)
        fine = m.isfinite(norm)
        self._remember(m, fine, mean=new_mean, variance=new_variance, count=count + 1)
        return m.where(spike, target / norm, m.ones_like(norm))


def whole(value: Any, name: str) -> int:
    """`value` as an int of one at least; ParameterError for anything else."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ParameterError(f"{name} is {value!r}; it must be a whole number of one at least")
    return value


def _filled(m: Backend, like: Array, size: int | None, value: float) -> Array:
    """An array of `size` elements, 0-d without it, of the dtype and on the device of `like`."""
    shape = () if size is None else (size,)
    return m.create("full", shape, value, dtype=m.numpy_dtype(like), device=m.device(like))
