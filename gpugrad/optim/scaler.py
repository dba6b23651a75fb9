"""Loss scaling for half precision, adapted on the device."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpugrad.backend import SPACES, Array, Backend
from gpugrad.clip import nonfinite_count, scale_
from gpugrad.core.actions import action
from gpugrad.core.graph import mutations
from gpugrad.core.tensor import Tensor, tensor_of
from gpugrad.errors import DTypeError, GpugradError, ParameterError
from gpugrad.optim.optimizer import Optimizer

__all__ = ["GradScaler", "ScalerError"]


class ScalerError(GpugradError, RuntimeError):
    """Calls of a scaler in an order that would unscale, step or adapt wrongly."""


@dataclass
class _Stage:
    """How far one optimiser has come since the last update."""

    unscaled: bool = False
    stepped: bool = False
    found: Array | None = None  # whether a gradient was not finite, a 0-d array


class GradScaler:
    """Multiplies the loss, so that small gradients survive half precision, and adapts the factor.

    A step whose gradients are not all finite is skipped, and the scale reduced; after
    `growth_interval` steps without one it grows. Scale, counter and verdict stay on the device: no
    step waits for the host.

    One optimiser takes the short form::

        scaler.scale(loss).backward()
        optimizer.step(scaler=scaler, clip=1.0, nonfinite="skip")

    PyTorch's form serves several optimisers, and code that looks at unscaled gradients::

        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()

    Parameters
    ----------
    init_scale:
        The scale of the first step.
    growth_factor, backoff_factor:
        What it is multiplied by: above 1, and between 0 and 1. It never grows beyond float32.
    growth_interval:
        Steps in a row with finite gradients after which it grows.
    enabled:
        False makes every method do nothing but `step`, which steps.

    Raises ParameterError for values outside these ranges.

    >>> import gpugrad as gg
    >>> w = gg.tensor([1.0], requires_grad=True)
    >>> scaler = GradScaler(init_scale=8.0)
    >>> scaler.scale(gg.sum(3.0 * w)).backward()
    >>> w.grad
    tensor([24.])
    """

    def __init__(
        self,
        init_scale: float = 65536.0,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 2000,
        enabled: bool = True,
    ) -> None:
        for name, value, fits, needed in (
            ("init_scale", init_scale, 0 < init_scale < math.inf, "positive and finite"),
            ("growth_factor", growth_factor, 1 < growth_factor < math.inf, "more than 1"),
            ("backoff_factor", backoff_factor, 0 < backoff_factor < 1, "between 0 and 1"),
            ("growth_interval", growth_interval, growth_interval >= 1, "one at least"),
        ):
            if enabled and not fits:
                raise ParameterError(f"GradScaler: {name} is {value}; it must be {needed}")
        self.growth_factor = growth_factor
        self.backoff_factor = backoff_factor
        self.growth_interval = growth_interval
        self._enabled = enabled
        self._begin = (float(init_scale), 0)
        # 0-d tensors, made on the device of the first loss.
        self._scale: Tensor | None = None
        self._tracker: Tensor | None = None
        self._stages: dict[int, _Stage] = {}

    # -- the loss ---------------------------------------------------------------------------------

    def scale(self, outputs: Any) -> Any:
        """A tensor, or every tensor of a list, tuple or other iterable, times the scale."""
        if not self._enabled:
            return outputs
        if isinstance(outputs, Tensor):
            return outputs * self._scale_for(outputs).to(outputs.device)
        if isinstance(outputs, list | tuple):
            return type(outputs)(self.scale(x) for x in outputs)
        if isinstance(outputs, Iterable):
            return map(self.scale, outputs)
        raise DTypeError(f"scale: a tensor or an iterable of them, not {type(outputs).__name__}")

    def _scale_for(self, outputs: Tensor) -> Tensor:
        if self._scale is None:
            space, device = outputs.backend, outputs.device
            scale, tracker = self._begin
            self._scale = tensor_of(space.create("full", (), scale, dtype="float32", device=device))
            self._tracker = tensor_of(
                space.create("full", (), tracker, dtype="int32", device=device)
            )
        return self._scale

    def _started(self, name: str) -> tuple[Tensor, Tensor]:
        if self._scale is None or self._tracker is None:
            raise ScalerError(
                f"{name}: there is no scale yet; call scaler.scale(loss).backward() in place of "
                "loss.backward()"
            )
        return self._scale, self._tracker

    # -- the short form: what optimizer.step(scaler=…) asks ----------------------------------------

    def inverse(self, m: Backend, like: Array) -> Array:
        """What unscales gradients: 1/scale, a 0-d array of float32 on the device of `like`."""
        if not self._enabled:
            return m.create("ones", (), dtype="float32", device=m.device(like))
        self._only_short()
        return self._inverse(like)

    def update_from(self, m: Backend, bad: Array) -> None:
        """Adapt the scale after a step: `bad`, a 0-d array, says if a gradient was not finite."""
        if self._enabled:
            self._only_short()
            self._adapt(bad)

    def _only_short(self) -> None:
        if any(stage.unscaled or stage.stepped for stage in self._stages.values()):
            raise ScalerError(
                "optimizer.step(scaler=…) after unscale_() or step() of the scaler would unscale "
                "twice; finish with scaler.step(optimizer) and scaler.update()"
            )

    def _inverse(self, like: Array) -> Array:
        scale, _ = self._started("step")
        near = _to_place_of(like, scale.data)
        return SPACES[type(near)].bind(lambda x: 1.0 / x)(near)

    @np.errstate(all="ignore")  # a scale that would overflow stays as it is
    def _adapt(self, bad: Array) -> None:
        scale, tracker = self._started("update")
        space = scale.backend
        # Both the old and the new value are there, so nobody has to wait to know which.
        new = space.bind(self._adapted)(space, scale.data, tracker.data,
                                        _to_place_of(scale.data, bad))  # fmt: skip
        for kept, value in zip((scale, tracker), new):
            _fill(kept, value)

    def _adapted(self, m: Backend, scale: Array, tracker: Array, bad: Array) -> tuple[Array, Array]:
        full = tracker + 1 >= self.growth_interval
        grown = scale * self.growth_factor
        grown = m.where(full & m.isfinite(grown), grown, scale)
        return (
            m.where(bad, scale * self.backoff_factor, grown),
            m.where(bad | full, m.zeros_like(tracker), tracker + 1),
        )

    # -- PyTorch's form ----------------------------------------------------------------------------

    @action
    def unscale_(self, optimizer: Optimizer) -> None:
        """Divide the gradients of an optimiser's parameters by the scale, in place.

        Raises ScalerError when it was called for this optimiser since the last `update`, or after
        `step`, and DTypeError for float16 gradients, which are too narrow for what is left.
        """
        if not self._enabled:
            return
        stage = self._stages.setdefault(id(optimizer), _Stage())
        if stage.stepped:
            raise ScalerError("unscale_() is being called after step(); call it before")
        if stage.unscaled:
            raise ScalerError(
                "unscale_() has already been called on this optimizer since the last update(); "
                "gradients can be unscaled once"
            )
        self._started("unscale_")
        grads = _grads(optimizer)
        if any(g.dtype == np.float16 for g in grads):
            raise DTypeError(
                "unscale_: gradients of float16 cannot hold small values unscaled; leave "
                "unscale_() out, and the step unscales in float32, or keep parameters in float32"
            )
        inverse: dict[str, Tensor] = {}
        flags = []
        for g in grads:
            if g.device not in inverse:
                inverse[g.device] = tensor_of(self._inverse(g.data))
            flags.append(g.backend.bind(_not_finite)(g.backend, g.data))
            scale_([g], inverse[g.device])
        if flags:
            self._note(stage, *flags)
        stage.unscaled = True

    @action
    def step(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
        """`optimizer.step(*args, **kwargs)` on unscaled gradients, skipped if one is not finite.

        Gradients that `unscale_` has not divided yet are unscaled while the optimiser updates.
        Returns what `optimizer.step` does.

        Raises ScalerError for a closure, for a second step before `update`, and when no parameter
        has a gradient.
        """
        if not self._enabled:
            return optimizer.step(*args, **kwargs)
        if "closure" in kwargs or (args and callable(args[0])):
            raise ScalerError(
                "closure use is not supported by GradScaler: it would scale the loss anew; run the "
                "closure before, or pass enabled=False"
            )
        self._started("step")
        stage = self._stages.setdefault(id(optimizer), _Stage())
        if stage.stepped:
            raise ScalerError("step() has already been called since the last update()")
        if not _grads(optimizer):
            raise ScalerError(
                "no parameter of this optimizer has a gradient; call scaler.scale(loss).backward() "
                "before step()"
            )
        kwargs.setdefault("nonfinite", "skip")
        result = optimizer.step(*args, scaler=_Once(self, stage), **kwargs)
        stage.stepped = True
        return result

    @action
    def update(self, new_scale: float | Tensor | None = None) -> None:
        """Adapt the scale to what the steps since the last update found, or set it to `new_scale`.

        Raises ScalerError when there were none: a step in the short form has adapted it already.
        """
        if not self._enabled:
            return
        scale, _ = self._started("update")
        if new_scale is not None:
            _fill(scale, _given(new_scale, scale))
        else:
            found = [stage.found for stage in self._stages.values() if stage.found is not None]
            if not found:
                raise ScalerError(
                    "update: no gradients were checked since the last one; call step() or "
                    "unscale_() before. optimizer.step(scaler=…) updates the scale by itself"
                )
            self._adapt(_any([_to_place_of(scale.data, bad) for bad in found]))
        self._stages.clear()

    def _note(self, stage: _Stage, *flags: Array) -> None:
        scale, _ = self._started("step")
        found = [] if stage.found is None else [stage.found]
        stage.found = _any([*found, *(_to_place_of(scale.data, bad) for bad in flags)])

    # -- what it knows -----------------------------------------------------------------------------

    def is_enabled(self) -> bool:
        """Whether it does anything."""
        return self._enabled

    def get_scale(self) -> float:
        """The scale as a Python number; 1 when disabled. On a GPU the host waits for it."""
        if not self._enabled:
            return 1.0
        return self._begin[0] if self._scale is None else float(self._scale.item())

    def state_dict(self) -> dict[str, Any]:
        """Python numbers, under PyTorch's names; {} when disabled. On a GPU the host waits."""
        if not self._enabled:
            return {}
        return {
            "scale": self.get_scale(),
            "growth_factor": self.growth_factor,
            "backoff_factor": self.backoff_factor,
            "growth_interval": self.growth_interval,
            "_growth_tracker": self._begin[1] if self._tracker is None else self._tracker.item(),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave, PyTorch's too; nothing when disabled.

        Raises ScalerError for the empty state of a disabled scaler.
        """
        if not self._enabled:
            return
        if not state_dict:
            raise ScalerError(
                "load_state_dict: the state is empty, as that of a disabled scaler is; use "
                "GradScaler(enabled=False), or leave the state out"
            )
        self.growth_factor = float(state_dict["growth_factor"])
        self.backoff_factor = float(state_dict["backoff_factor"])
        self.growth_interval = int(state_dict["growth_interval"])
        self._begin = (float(state_dict["scale"]), int(state_dict["_growth_tracker"]))
        if self._scale is not None and self._tracker is not None:
            for kept, value in zip((self._scale, self._tracker), self._begin):
                _fill(kept, _given(value, kept))


class _Once:
    """A scaler as one optimiser's step sees it in PyTorch's form: it collects, and adapts later."""

    def __init__(self, scaler: GradScaler, stage: _Stage) -> None:
        self._scaler = scaler
        self._stage = stage

    def inverse(self, m: Backend, like: Array) -> Array:
        if self._stage.found is None:  # unscale_() was not called
            return self._scaler._inverse(like)
        # What unscale_() found counts, whatever clipping has made of the gradients since: one that
        # was infinite may have a finite value by now. NaN makes the step see it.
        found = _to_place_of(like, self._stage.found)
        one = m.create("ones", (), dtype="float32", device=m.device(like))
        return m.bind(m.where)(found, one * math.nan, one)

    def update_from(self, m: Backend, bad: Array) -> None:
        self._scaler._note(self._stage, bad)


def _grads(optimizer: Optimizer) -> list[Tensor]:
    return [
        p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None
    ]


def _not_finite(m: Backend, g: Array) -> Array:
    return nonfinite_count(m, g) > 0


def _any(flags: list[Array]) -> Array:
    space = SPACES[type(flags[0])]
    return flags[0] if len(flags) == 1 else space.bind(lambda *x: space.any(space.stack(x)))(*flags)


def _to_place_of(like: Array, x: Array) -> Array:
    """The 0-d array `x` on the device of `like`; itself, if it is there."""
    space, device = SPACES[type(x)], SPACES[type(like)].device(like)
    return x if space.device(x) == device else space.to_device(x, device)


def _given(value: float | Tensor, like: Tensor) -> Array:
    """A value of the user's as a 0-d array beside `like`."""
    if isinstance(value, Tensor):
        if value.size != 1 or value.requires_grad:
            raise ParameterError(
                f"update: a new scale is a number, or a tensor of one element that requires no "
                f"gradient, not one of shape {value.shape}"
            )
        value = value.to(like.device, like.dtype).reshape(())
        return value.data
    space = like.backend
    return space.create("full", (), value, dtype=like.dtype, device=like.device)


def _fill(kept: Tensor, value: Array) -> None:
    """Change a 0-d tensor, in its memory if that can change; graphs that saved it find out."""
    if kept.backend.mutable:
        kept.backend.setitem(kept.data, ..., value)
        mutations.mark(kept.data)
    else:
        kept.data = value
