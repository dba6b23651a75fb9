"""One step over a plan, in the one right order: unscale, norm, clip, skip, update.

Nothing is read from the device, save the one flag that `nonfinite="raise"` asks for. What the step
found out stays there, too, until somebody looks at it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np

from gpugrad.backend import Array, Backend
from gpugrad.backend.kernels import gate
from gpugrad.clip import GlobalNorm, check_bound, norm_of
from gpugrad.clip.norms import cast, scalar_tensor
from gpugrad.core.graph import mutations
from gpugrad.core.tensor import Tensor, tensor_of
from gpugrad.errors import DeviceError
from gpugrad.nn.utils import NonFiniteGradientError
from gpugrad.optim.arena import MASTER, Span
from gpugrad.optim.flat import (
    FIRST,
    advance,
    flat_norm,
    flat_step,
    flat_update,
    known_norm,
    norm_dtype,
    noted,
    unscale,
)
from gpugrad.optim.plan import Plan
from gpugrad.optim.rules import Told

__all__ = ["NONFINITE", "Report", "check_clip", "run_step"]

#: What a step may do about gradients that are NaN or infinite.
NONFINITE = ("propagate", "skip", "zero", "raise")


@lru_cache(64)
def _bounded(clip: Any) -> GlobalNorm:
    """The policy that a number stands for."""
    return GlobalNorm(check_bound(clip, "clip"))


def check_clip(clip: Any, name: str = "clip") -> None:
    """Raise ParameterError unless `clip` is None, a bound, or a policy."""
    if type(clip) is float and clip >= 0:
        return
    if not (clip is None or hasattr(clip, "coefficient") or hasattr(clip, "apply")):
        check_bound(clip, name)


class Report:
    """What the steps so far have found out, on the device.

    Attributes
    ----------
    clips:
        Steps that had a coefficient, a Python number.
    """

    def __init__(self) -> None:
        self.clips = 0
        self._found: Tensor | None = None
        self._clip: tuple[Array, Array | None, type] | None = None

    def found(self, m: Backend, like: Array) -> Array:
        """What there is to know, see :data:`gpugrad.optim.flat.SKIPPED`, beside an array."""
        if m.on_host and self._found is not None and self._found.backend is m:
            return self._found.data
        device = m.device(like)
        if self._found is None:
            return m.create("zeros", 4, dtype="int64", device=device)
        if self._found.backend is not m or self._found.device != device:
            return m.asarray(self._found.cpu().numpy(), device=device)
        return self._found.data

    def note(self, found: Array) -> None:
        """Take over what :meth:`found` has become."""
        self._found = tensor_of(found)

    def note_clip(self, norm: Array, coefficient: Array | None, like: Array) -> None:
        """Keep the norm before clipping, and what the gradients were multiplied by."""
        self._clip = norm, coefficient, type(like)
        self.clips += coefficient is not None

    @property
    def norm(self) -> Tensor | None:
        """Of the latest step with a clip, a 0-d tensor; None before."""
        return None if self._clip is None else scalar_tensor(self._clip[0], self._clip[2])

    @property
    def coefficient(self) -> Tensor | None:
        """What its gradients were multiplied by, likewise; None where there is no such number."""
        if self._clip is None or self._clip[1] is None:
            return None
        return scalar_tensor(self._clip[1], self._clip[2])

    def count(self, which: int) -> Tensor | None:
        """One of the counts, a 0-d tensor; None before the first."""
        return None if self._found is None else self._found[which]

    def forget_first(self) -> None:
        """Forget which element went bad first: the numbers will mean others."""
        if self._found is not None:
            found = self._found.cpu().numpy().copy()
            found[FIRST] = 0
            space, device = self._found.backend, self._found.device
            self._found = tensor_of(space.asarray(found, device=device))


@dataclass
class _Share:
    """The spans whose gradients are clipped together."""

    policy: Any
    spans: list[Span] = field(default_factory=list)
    factor: Array | None = None
    #: Whether its norm is the one that the optimiser reports.
    speaks: bool = False


def _shares(spans: Sequence[Span], groups: Sequence[dict[str, Any]], clip: Any) -> list[_Share]:
    """The groups with a clip of their own, and all the others together."""
    found: dict[int, _Share] = {}
    for span in spans:
        group = groups[span.arena.group]
        own = group.get("clip", clip)
        # One policy for two groups sees them together, as its memory needs; a number does not.
        key = id(own)
        if "clip" not in group or isinstance(own, int | float):
            key = -1 - span.arena.group if "clip" in group else 0
        if key not in found:
            if own is not None and not hasattr(own, "coefficient") and not hasattr(own, "apply"):
                own = _bounded(own)
            found[key] = _Share(own)
        found[key].spans.append(span)
    clipped = [share for key, share in found.items() if share.policy is not None]
    if clipped:
        (found[0] if 0 in found and found[0].policy is not None else clipped[0]).speaks = True
    return list(found.values())


@np.errstate(all="ignore")  # what overflows is the caller's business, as in PyTorch
def run_step(
    plan: Plan,
    groups: Sequence[dict[str, Any]],
    told: Sequence[Told],
    rule: str,
    report: Report,
    *,
    clip: Any,
    scaler: Any,
    nonfinite: str,
    name_of: Callable[[int], str],
) -> None:
    """Update everything in a plan; the arguments are those of `Optimizer.step`."""
    policy = None if scaler is not None else _common_policy(plan.spans, groups, clip, nonfinite)
    if policy is not None:
        (span,) = plan.spans
        run = span.arena.space.bind(_run_common)
        run(span.g, span, policy, told[span.arena.group], rule, report, nonfinite)
        return
    shares = _shares(plan.spans, groups, clip)
    if nonfinite == "propagate" and scaler is not None:
        # What a loss scale is for; one that is switched off has no say.
        nonfinite = "skip" if getattr(scaler, "is_enabled", lambda: True)() else nonfinite
    looks = nonfinite != "propagate" or scaler is not None or any(s.policy for s in shares)
    places = {(s.arena.space.name, s.arena.device): s for s in plan.spans}
    if looks and len(places) > 1:
        met = ", ".join(f"{name} on {device}" for name, device in sorted(places))
        raise DeviceError(
            f"step: parameters are in different places ({met}), and have no common norm or flag; "
            "give each place an optimiser of its own"
        )
    for (_, device), span in places.items():
        m = span.arena.space
        here = [
            replace(share, spans=mine)
            for share in shares
            if (mine := [s for s in share.spans if s.arena.device == device and s.arena.space is m])
        ]
        step = _Step(m, here, told, rule, report, scaler, nonfinite, name_of)
        m.bind(step.run)(span.g, plan.steps if len(places) == 1 else _steps(here), looks)


def _common_policy(
    spans: Sequence[Span], groups: Sequence[dict[str, Any]], clip: Any, nonfinite: str
) -> GlobalNorm | None:
    """What to clip by in a step that :func:`flat_step` makes; None if it is another one."""
    if len(spans) != 1 or nonfinite == "raise":
        return None
    (span,) = spans
    policy = groups[span.arena.group].get("clip", clip)
    if isinstance(policy, int | float):
        policy = _bounded(policy)
    common = isinstance(policy, GlobalNorm) and policy.norm_type == 2 and span.arena.space.mutable
    return policy if common else None


def _run_common(
    like: Array,
    span: Span,
    policy: GlobalNorm,
    told: Told,
    rule: str,
    report: Report,
    nonfinite: str,
) -> None:
    m = span.arena.space
    p, g, states = span.operands()
    measured = _known_norm(span)
    run = flat_step
    if not gate:  # nobody looks at the choice of a kernel, which is the same in every step
        span.settled = span.settled or flat_step.settled()  # type: ignore[attr-defined]
        run = span.settled
    norm, coefficient, found = run(
        m,
        p,
        g,
        *states,
        count=span.step.data,
        found=report.found(m, like),
        base=span.arena.base + span.start,
        bound=policy.max_norm,
        nonfinite=nonfinite,
        rule=rule,
        flags=told.flags,
        numbers=told.numbers,
        **({} if measured is None else {"measured": measured}),
    )
    report.note(found)
    report.note_clip(norm, coefficient, like)
    span.round()
    span.mark()


def _known_norm(span: Span) -> tuple[Array, Array, Array, Array] | None:
    """:func:`flat_norm` of a span, if kernels have found out most of it already."""
    known = span.known()
    return None if known is None else known_norm(span.arena.space, *known)


def _steps(shares: Sequence[_Share]) -> list[Tensor]:
    return list({id(s.step): s.step for share in shares for s in share.spans}.values())


@dataclass
class _Step:
    """A step in one place."""

    m: Backend
    shares: list[_Share]
    told: Sequence[Told]
    rule: str
    report: Report
    scaler: Any
    nonfinite: str
    name_of: Callable[[int], str]

    def run(self, like: Array, steps: Sequence[Tensor], looks: bool) -> None:
        """Everything, on the device of `like`."""
        m = self.m
        zero = self.nonfinite == "zero"
        inverse = None if self.scaler is None else self.scaler.inverse(m, like)
        skip = None
        if looks:
            totals = [self._measure(share, zero) for share in self.shares]
            bad, first = totals[0][2:]
            for *_, other, its_first in totals[1:]:
                first = m.xp.where(bad > 0, first, its_first)
                bad = bad + other
            flag = bad > 0
            if inverse is not None:
                flag = flag | ~m.isfinite(inverse)
            if self.nonfinite == "raise":
                self._raise_if(flag, first)
            skip = flag if self.nonfinite == "skip" else None
            coefficient = None
            for share, (squares, top, *_) in zip(self.shares, totals):
                norm, its = self._clip(share, squares, top, inverse, zero)
                if share.speaks:
                    coefficient = its
                    self.report.note_clip(norm, its, like)
            found = self.report.found(m, like)
            self.report.note(noted(m, found, flag, first, skip, coefficient))
            if self.scaler is not None:
                self.scaler.update_from(m, flag)
        counts = {id(step): cast(m, step.data + 1, step.data.dtype) for step in steps}
        for share in self.shares:
            for span in share.spans:
                self._update(span, counts[id(span.step)], share.factor, skip, zero)
        for step in steps:
            new = advance(m, step.data, counts[id(step)], skip)
            if m.mutable:
                m.setitem(step.data, ..., new)
            else:
                step.data = new

    def _measure(self, share: _Share, finite_only: bool) -> tuple[Array, Array, Array, Array]:
        """:func:`flat_norm` of all spans together, the first bad element by its own number."""
        m = self.m
        found = None
        any_will_do = getattr(share.policy, "norm_type", 2.0) != math.inf
        for span in share.spans:
            squares, top, bad, first = (_known_norm(span) if any_will_do else None) or flat_norm(
                m, span.g, finite_only=finite_only
            )
            first = first + (span.arena.base + span.start)
            if found is None:
                found = squares, top, bad, first
            else:
                found = (
                    found[0] + squares,
                    m.maximum(found[1], top),
                    found[2] + bad,
                    m.xp.where(found[2] > 0, found[3], first),
                )
        assert found is not None
        return found

    def _raise_if(self, found: Array, first: Array) -> None:
        if bool(self.m.to_host(found)):
            raise NonFiniteGradientError(
                f"step: the gradient of {self.name_of(int(self.m.to_host(first)))} is not finite; "
                "nothing was changed. Lower the learning rate, clip, or pass nonfinite='skip'"
            )

    def _clip(
        self, share: _Share, squares: Array, top: Array, inverse: Array | None, finite_only: bool
    ) -> tuple[Array, Array | None]:
        """The norm and the coefficient of a share, whose factor is found, or gradients changed."""
        m = self.m
        policy = share.policy
        share.factor = inverse
        order = getattr(policy, "norm_type", 2.0)
        if order == 2:
            norm = m.sqrt(squares)
        elif order == math.inf:
            norm = top
        else:
            grads = [span.g for span in share.spans]
            if finite_only:
                grads = [m.where(m.isfinite(g), g, 0.0) for g in grads]
            norm = norm_of(m, grads, order)
        dtype = norm_dtype(m, *(span.g for span in share.spans))
        if inverse is not None:
            norm = norm * cast(m, inverse, norm.dtype)
        norm = cast(m, norm, dtype)
        coefficient = None
        if hasattr(policy, "apply"):
            self._apply(share, finite_only)
        elif policy is not None and getattr(policy, "max_norm", 0.0) != math.inf:
            coefficient = policy.coefficient(m, norm)
            share.factor = coefficient if inverse is None else coefficient * cast(m, inverse, dtype)
        return norm, coefficient

    def _apply(self, share: _Share, finite_only: bool) -> None:
        """Unscale the gradients of a share, and let its policy change them, in place."""
        m = self.m
        spans = [(span, place) for span in share.spans for place in span.places]
        params = [place.tensor.data for _, place in spans]
        grads = [place.tensor._node.grad.data for _, place in spans]
        if share.factor is not None or finite_only:
            grads = [unscale(m, g, factor=share.factor, finite_only=finite_only) for g in grads]
        share.policy.apply(m, params, grads)
        for (span, place), g in zip(spans, grads):
            leaf = place.tensor._node
            leaf.squares = None
            if m.mutable:
                mutations.mark(g)
            else:
                leaf.grad = tensor_of(g)
            if not span.inside:
                span.g = g
            elif g is not place.lent():  # a copy of it is in the buffer
                m.setitem(span.arena.at(place), ..., g)
        share.factor = None

    def _update(
        self, span: Span, count: Array, factor: Array | None, skip: Array | None, zero: bool
    ) -> None:
        told = self.told[span.arena.group]
        p, g, states = span.operands()
        out = flat_update(
            self.m,
            p,
            g,
            *states,
            count=count,
            factor=factor,
            skip=skip,
            finite_only=zero,
            rule=self.rule,
            flags=told.flags,
            numbers=told.numbers,
        )
        if self.m.mutable:
            span.round()
        else:
            self._replace(span, out)
        span.mark()

    def _replace(self, span: Span, arrays: tuple[Array, ...]) -> None:
        """Put new arrays in the place of those that cannot change."""
        (place,) = span.places
        assert place.kept is not None
        names = self.told[span.arena.group].names
        if span.arena.narrow:
            arrays = self.m.astype(arrays[0], span.p.dtype), *arrays
            names = MASTER, *names
        for target, new in zip((place.tensor, *(place.kept[name] for name in names)), arrays):
            target.data = new
