"""What can be found wrong with a model, and a verdict made of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from gpugrad.health.remedies import remedies_for

__all__ = ["KINDS", "SHOWN", "Finding", "Verdict", "finding"]

#: What can be found, worst first: causes stand before what they cause.
KINDS = (
    "non-finite", "exploding", "vanishing", "diverging", "dead", "saturated", "not reached",
    "clip-starved", "stalled",
)  # fmt: skip

#: Findings below this confidence are suspicions, and are not shown.
SHOWN = 0.5


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, or that nothing is.

    Attributes
    ----------
    kind:
        `"non-finite"`, `"exploding"`, `"vanishing"`, `"diverging"`, `"dead"`, `"saturated"`,
        `"not reached"`, `"clip-starved"`, `"stalled"` or `"healthy"`.
    layer, step:
        Where it is worst, and the recorded step at which it began; None if it has no place.
    growth:
        The factor per layer, or per time step, on the way back, of what explodes or vanishes.
    confidence:
        From 0 to 1.
    text:
        What was seen, with figures.
    remedies:
        Names in the table of remedies, best first.
    until:
        The recorded step at which it had passed; None if it lasts.
    """

    kind: str
    layer: str | None = None
    step: int | None = None
    growth: float | None = None
    confidence: float = 1.0
    text: str = ""
    remedies: tuple[str, ...] = ()
    until: int | None = None

    def as_dict(self) -> dict[str, Any]:
        """The finding as JSON has it."""
        return {**vars(self), "remedies": list(self.remedies)}


@dataclass(frozen=True)
class Verdict:
    """All findings, worst first; the first is of kind `"healthy"` if nothing is wrong any more."""

    findings: tuple[Finding, ...]

    @classmethod
    def of(cls, findings: Iterable[Finding], looks: int = 1, unknown: str = "") -> Verdict:
        """The verdict of what was found, which may be nothing; suspicions are left out.

        `unknown` says why nobody can tell whether the net learns.

        That nothing is wrong is as sure as Laplace's rule of succession makes it, after so many
        looks at which nothing was: one step deserves 2/3, and a hundred 0.99.
        """
        shown = [f for f in findings if f.confidence >= SHOWN]
        shown.sort(key=lambda f: (_severity(f), -f.confidence))
        lasts = [f for f in shown if f.until is None]
        passed = [f for f in shown if f.until is not None]
        text = "healthy: nothing explodes, vanishes or stands still"
        if unknown:
            text = f"healthy: nothing explodes or vanishes; {unknown}"
        sure = round((looks + 1) / (looks + 2), 3)
        return cls((*(lasts or [Finding("healthy", confidence=sure, text=text)]), *passed))

    @property
    def kind(self) -> str:
        """The kind of the worst finding."""
        return self.findings[0].kind

    @property
    def healthy(self) -> bool:
        """Whether nothing is wrong."""
        return self.kind == "healthy"

    def as_dict(self) -> dict[str, Any]:
        """The verdict as JSON has it."""
        return {
            "kind": self.kind,
            "healthy": self.healthy,
            "findings": [f.as_dict() for f in self.findings],
        }

    def __str__(self) -> str:
        lines = []
        for f in self.findings:
            where = f", at layer {f.layer}" if f.layer and f.until is None else ""
            when = f", since step {f.step}" if f.step is not None and f.step > 1 else ""
            lines.append(f"{f.text}{where}{when}")
            if f.remedies:
                lines.append(f"  try: {', '.join(f.remedies)}")
        return "\n".join(lines)


def _severity(f: Finding) -> float:
    # Where nothing at all comes through, it is not the layers' gains that are to blame.
    cut = f.kind == "vanishing" and f.growth is None
    return KINDS.index("dead") + 0.5 if cut else KINDS.index(f.kind)


def finding(
    kind: str,
    confidence: float,
    text: str,
    layer: str | None = None,
    step: int | None = None,
    growth: float | None = None,
) -> Finding:
    """A finding with the remedies of its kind."""
    known = min(1.0, max(0.0, float(confidence)))
    return Finding(kind, layer, step, growth, round(known, 3), text, remedies_for(kind))
