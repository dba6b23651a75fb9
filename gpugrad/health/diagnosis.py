"""Before training: what one batch tells about a net, beside what the theory predicts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from gpugrad import ops
from gpugrad.core.modes import no_grad
from gpugrad.core.tensor import Tensor
from gpugrad.health.errors import HealthError
from gpugrad.health.findings import SHOWN, Finding, Verdict
from gpugrad.health.prediction import Group, MeanFieldOfNet, describe, predict
from gpugrad.health.probe import layers_of, observe
from gpugrad.health.record import Record
from gpugrad.health.rehearsal import BATCHES, STEPS, Batch, Loss, Make, Rehearsal, copied, rehearse
from gpugrad.health.remedies import REMEDIES, Remedy, remedies_for
from gpugrad.health.surgery import RECURRENT, Impossible
from gpugrad.health.verdict import CERTAIN, is_weighted, profile_findings, suspicions
from gpugrad.nn.module import Module

__all__ = ["Diagnosis", "Trial", "diagnose", "remedied"]

Net = TypeVar("Net", bound=Module)

#: Below this share of what a layer puts out, differences between examples are lost; up to the
#: other one that may be why a net does not learn.
ALIKE, MAY_BE_ALIKE = 1e-4, 0.03
#: How sure a suspicion has to be to be named as the cause of what the rehearsal has found.
SUSPECT = 0.25
#: Trials of remedies are shorter than the rehearsal by this factor.
TRIED = 3


@dataclass(frozen=True)
class Trial:
    """A remedy, tried on a copy.

    Attributes
    ----------
    name:
        Its name in the table of remedies.
    text:
        What was changed, with figures; or why it could not be.
    possible:
        Whether it could be tried.
    verdict:
        Of the changed copy, before its rehearsal.
    rehearsal:
        Its training on the batch, until it surely learns; None if the verdict says already that it
        will not.
    ratio:
        The first layer's gradient norm over the last one's, after the change.
    """

    name: str
    text: str
    possible: bool = False
    verdict: Verdict | None = None
    rehearsal: Rehearsal | None = None
    ratio: float = math.nan

    @property
    def helps(self) -> bool:
        """Whether the copy is healthy, and learns."""
        if self.verdict is None or self.rehearsal is None:
            return False
        return self.verdict.healthy and self.rehearsal.learnt

    @property
    def rank(self) -> tuple[bool, bool, float, float]:
        """Smaller is better: those that help first, and among them what learns soonest."""
        if self.rehearsal is None:
            return True, not self.possible, math.inf, math.inf
        end = self.rehearsal.end if math.isfinite(self.rehearsal.end) else math.inf
        return not self.helps, False, float(len(self.rehearsal.losses)), end

    def as_dict(self) -> dict[str, Any]:
        """The trial as JSON has it."""
        found: dict[str, Any] = {"name": self.name, "text": self.text, "helps": self.helps}
        if self.verdict is not None:
            found |= {"verdict": self.verdict.kind, "ratio": self.ratio}
        if self.rehearsal is not None:
            found |= {
                "loss": [self.rehearsal.start, self.rehearsal.end],
                "steps": len(self.rehearsal.losses),
                "learnt": self.rehearsal.learnt,
            }
        return found

    def __str__(self) -> str:
        if self.verdict is None:
            return f"{self.name:14} not tried: {self.text}"
        mark = "helps" if self.helps else "does not learn"
        if not self.verdict.healthy:
            mark = f"still {self.verdict.kind}"
        loss = f"{self.rehearsal}; " if self.rehearsal is not None else ""
        return f"{self.name:14} {mark}: {loss}gradients first/last {self.ratio:.2g}; {self.text}"


@dataclass(frozen=True)
class Diagnosis:
    """What `diagnose` found; print it.

    Attributes
    ----------
    verdict:
        Whether the net will train, and why not.
    record:
        One row: the forward and backward of the batch.
    separation:
        For each layer of the record, how much of its output differs between the examples: 1 is all,
        near 0 everything looks alike. NaN where there is no axis of examples.
    groups:
        Layers from one with weights to the next, with measured and predicted gains.
    theory:
        Mean-field theory of the plain part of the net, if it has one.
    times:
        For each recurrent layer the root mean square of dLoss/d(its input), step by step.
    rehearsal:
        The training of a copy on the batch, unless it was not asked for or could not be.
    trials:
        Remedies that were tried, best first.
    """

    verdict: Verdict
    record: Record = field(repr=False)
    separation: NDArray[np.float64] = field(repr=False)
    groups: tuple[Group, ...] = field(repr=False)
    theory: MeanFieldOfNet | None
    times: dict[str, NDArray[np.float64]] = field(repr=False)
    rehearsal: Rehearsal | None
    trials: tuple[Trial, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """The diagnosis as JSON has it."""
        return {
            "verdict": self.verdict.as_dict(),
            "groups": [group.as_dict() for group in self.groups],
            "theory": None if self.theory is None else self.theory.as_dict(),
            "times": {path: values.tolist() for path, values in self.times.items()},
            "loss": None if self.rehearsal is None else self.rehearsal.losses.tolist(),
            "chance": None if self.rehearsal is None else self.rehearsal.chance,
            "trials": [trial.as_dict() for trial in self.trials],
        }

    def __str__(self) -> str:
        parts = [str(self.verdict), "", describe(self.groups)]
        if self.theory is not None:
            parts.append(str(self.theory))
        for path, values in self.times.items():
            ratio = values[0] / values[-1] if values[-1] else math.nan
            parts.append(f"{path}: gradients through {len(values)} time steps {ratio:.2g} "
                         "(first against last)")  # fmt: skip
        if self.rehearsal is not None:
            parts.append(
                f"rehearsal near the batch, learning rate {self.rehearsal.lr:g}: {self.rehearsal}"
            )
        if self.trials:
            parts += ["", "remedies, each tried on a copy:"]
            parts += [f"{i}. {trial}" for i, trial in enumerate(self.trials, 1)]
        return "\n".join(parts)


def diagnose(
    model: Module,
    batch: Any,
    loss: Loss | None = None,
    *,
    try_remedies: bool = False,
    steps: int = STEPS,
    lr: float = 1e-3,
    optimizer: Make | None = None,
    batches: int = BATCHES,
    seed: int = 0,
) -> Diagnosis:
    """Say from one batch whether a net will train, and what to change if not.

    The batch runs forward and backward once, and the gains of gradients from layer to layer are
    measured and set beside those that mean-field theory predicts from the weights. Then a copy is
    trained for a few steps on examples near those of the batch: a rehearsal. The net is sick if its
    gradients are more extreme than 1e6 from the first layer to the last, or if the loss of the
    rehearsal does not come below 0.9 times that of the best constant answer; where that is a close
    call, most of three rehearsals decide. What else was measured says why. The model itself is left
    exactly as it is; everything happens to copies of it, in training mode. The same model, batch
    and seed have the same diagnosis.

    Parameters
    ----------
    model:
        The net.
    batch:
        A pair of inputs and targets. A tuple of inputs is passed on as several arguments.
    loss:
        Takes what the model returned, and the targets. By default cross-entropy over the last axis
        of the first output if targets are whole numbers, else the mean squared error.
    try_remedies:
        Make each change that may help to a copy of its own, measure and rehearse it, and rank them.
    steps:
        Of the rehearsal, at most: fewer if the net surely learns. 0: judge by the one forward and
        backward alone.
    lr:
        The learning rate of the rehearsal, of Adam.
    optimizer:
        Makes the optimiser of the rehearsal, if the training uses another: a function of a list of
        parameters, such as `lambda p: gg.optim.SGD(p, lr=0.1)`.
    batches:
        Of an epoch: how many such batches there are. All examples but the batch's are made up.
    seed:
        Of the random numbers of the rehearsal, of dropout, and of remedies.

    Raises
    ------
    HealthError
        If the model cannot be copied, or the batch is no pair.

    >>> from gpugrad import nn
    >>> _ = nn.manual_seed(0)
    >>> net = nn.Sequential(*(m for _ in range(20) for m in (nn.Linear(8, 8), nn.Sigmoid())))
    >>> x, y = np.random.default_rng(0).standard_normal((32, 8)), np.arange(32) % 8
    >>> diagnose(net, (x, y), steps=0).verdict.kind
    'vanishing'
    """
    work = Batch(model, batch, loss)
    with np.errstate(all="ignore"):  # what overflows is what is looked for
        how = {"lr": lr, "make": optimizer, "batches": batches, "seed": seed}
        return _diagnose(model, work, try_remedies, steps, how)


def _diagnose(
    model: Module, work: Batch, try_remedies: bool, steps: int, how: dict[str, Any]
) -> Diagnosis:
    with copied(model, how["seed"]) as twin:
        found = _measure(twin, work)
        groups, theory = predict(twin, found.record)
        rehearsal = None
        if steps and found.trainable and not _certain(found.findings):
            rehearsal = _rehearsed(model, work, steps, how)
    verdict = _weighed(found, rehearsal)
    trials: tuple[Trial, ...] = ()
    if try_remedies and not verdict.healthy:
        norm = _usual_norm(rehearsal)
        trials = _tried(model, work, verdict, found, (steps or STEPS) // TRIED, norm, how)
        helpful = [trial.name for trial in trials if trial.helps]
        verdict = Verdict(tuple(_advised(f, helpful) for f in verdict.findings))
    return Diagnosis(
        verdict, found.record, found.separation, groups, theory, found.times, rehearsal, trials
    )


def _rehearsed(model: Module, work: Batch, steps: int, how: dict[str, Any]) -> Rehearsal:
    """A rehearsal; where it leaves doubt, the one in the middle of three, of different examples."""
    found: list[Rehearsal] = []
    for seed in range(how["seed"], how["seed"] + 3):
        with copied(model, seed) as twin:
            found.append(rehearse(twin, work, steps=steps, **{**how, "seed": seed}))
        if found[0].decides(steps) or (len(found) == 2 and found[0].learnt is found[1].learnt):
            return found[0]
    return sorted(found, key=lambda r: r.end if math.isfinite(r.end) else math.inf)[1]


def remedied(model: Net, name: str, batch: Any, loss: Loss | None = None, *, seed: int = 0) -> Net:
    """A copy of a model with a remedy applied; what is done to the training leaves it unchanged.

    With the same seed it is the copy that `diagnose` tried.

    Raises HealthError for an unknown name, and where the remedy cannot be applied to this model.

    >>> from gpugrad import nn
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.Sigmoid(), nn.Linear(8, 2))
    >>> [type(m).__name__ for m in remedied(net, "activation", (np.ones((3, 4)), np.arange(3) % 2))]
    ['Linear', 'ReLU', 'Linear']
    """
    if name not in REMEDIES:
        raise HealthError(f"{name!r} is no remedy; there are {', '.join(REMEDIES)}")
    work = Batch(model, batch, loss)
    with copied(model, seed) as twin:
        _apply(REMEDIES[name], twin, work)
        twin.train(model.training)
    return twin


# -- measuring -------------------------------------------------------------------------------------


@dataclass
class _Found:
    record: Record
    findings: list[Finding]
    separation: NDArray[np.float64]
    times: dict[str, NDArray[np.float64]]
    trainable: bool
    ratio: float


def _measure(twin: Module, work: Batch) -> _Found:
    """One forward and backward of a copy."""
    many = next((x.shape[0] for x in work.inputs if isinstance(x, Tensor) and x.ndim), 0)
    spread: dict[int, Tensor] = {}
    inputs: dict[str, Tensor] = {}
    handles = []

    def compare(module: Module, args: Any, out: Any) -> None:
        y = out[0] if isinstance(out, tuple) else out
        if isinstance(y, Tensor) and y.dtype.kind == "f" and y.ndim > 1 and y.shape[0] == many > 1:
            spread[id(module)] = _separation(y)

    def listen(path: str) -> Any:
        def before(module: Module, args: Any) -> Any:
            inputs[path] = ops.zeros_like(args[0].detach()).requires_grad_()
            return (args[0] + inputs[path], *args[1:])

        return before

    layers = layers_of(twin)
    parameters = list(twin.parameters())
    trained = [p for p in parameters if p.requires_grad]
    paths = {path: m for path, m in twin.named_modules() if isinstance(m, RECURRENT)}
    try:
        handles = [x.module.register_forward_hook(compare) for x in layers]
        if trained:
            handles += [m.register_forward_pre_hook(listen(path)) for path, m in paths.items()]
        record = observe(twin, lambda: work.run_backward(twin))
    finally:
        for handle in handles:
            handle.remove()
    times = {
        path: _by_step(g, m)
        for path, m in paths.items()
        if path in inputs and (g := inputs[path].grad) is not None
    }
    twin.zero_grad()

    module_of = {x.path: x.module for x in layers}
    looked = [path for path in record.layers if path not in record.frozen]
    separation = np.array([
        float(spread[id(module_of[path])].item()) if id(module_of[path]) in spread else math.nan
        for path in record.layers
    ])  # fmt: skip
    findings = _unfit(work, trained, parameters)
    if not findings:
        findings += suspicions(record, layers=looked)
        findings += _alike(record, separation)
    for path, values in times.items():
        names = [f"{path}, step {t}" for t in range(len(values))]
        findings += profile_findings(
            values[None], names, what=f"gradients of {path}'s inputs", unit="time step"
        )
    norms = record.values["gradient_norm"][0].astype(np.float64)
    weights = [
        i
        for i, (path, kind) in enumerate(zip(record.layers, record.kinds))
        if path not in record.frozen and math.isfinite(norms[i]) and is_weighted(kind)
    ]
    ratio = math.nan
    if weights and norms[weights[-1]]:
        ratio = float(norms[weights[0]] / norms[weights[-1]])
    kinds = set(record.kinds)
    findings = [replace(f, remedies=_fitting(f.remedies, kinds)) for f in findings]
    reached = any(np.isfinite(norms[i]) for i in range(len(norms)))
    return _Found(record, findings, separation, times, bool(trained) and reached, ratio)


def _separation(y: Tensor) -> Tensor:
    """How much of the outputs differs between examples: their deviation over their whole size."""
    with no_grad():
        x = ops.astype(y.detach(), "float32") if y.dtype.itemsize < 4 else y.detach()
        largest = ops.max(ops.abs(x))
        x = x / ops.where(largest > 0, largest, ops.ones_like(largest))  # squares stay in range
        middle = x - ops.mean(x, axis=0, keepdims=True)
        whole = ops.mean(x * x)
        return ops.sqrt(  # type: ignore[no-any-return]
            ops.mean(middle * middle) / ops.where(whole > 0, whole, ops.ones_like(whole))
        )


def _by_step(g: Tensor, layer: Any) -> NDArray[np.float64]:
    x = g.detach().numpy().astype(np.float64)
    time = 1 if layer.batch_first and x.ndim == 3 else 0
    return np.sqrt(np.mean(x**2, axis=tuple(i for i in range(x.ndim) if i != time)))  # type: ignore[no-any-return]


def _unfit(work: Batch, trained: Sequence[Any], parameters: Sequence[Any]) -> list[Finding]:
    """What is wrong with the batch, or with the model as a whole."""
    found = []
    for i, x in enumerate(work.inputs):
        if isinstance(x, Tensor) and x.dtype.kind == "f":
            bad = int((~np.isfinite(x.detach().numpy())).sum())
            if bad:
                text = f"non-finite: {bad} of the numbers of input {i} are NaN or infinite"
                found.append(Finding("non-finite", None, 1, None, 1.0, text, ()))
    if not trained:
        what = "no parameter of the model is trained: all are frozen" if parameters else \
            "the model has no parameters"  # fmt: skip
        text = f"not reached: {what}; there is nothing to train"
        found.append(Finding("not reached", None, None, None, 1.0, text, ()))
    return found


def _alike(record: Record, separation: NDArray[np.float64]) -> list[Finding]:
    """Whether examples can still be told apart behind the last hidden layer."""
    known = np.flatnonzero(np.isfinite(separation))
    if len(known) < 3:
        return []
    i = int(known[-2])  # the last one is the output, whose biases say nothing about the inputs
    share = float(separation[i])
    if share >= MAY_BE_ALIKE:
        return []
    slope = (0.5 - SUSPECT) / math.log(MAY_BE_ALIKE / ALIKE)
    sure = 0.5 + slope * math.log(ALIKE / max(share, 1e-12))
    text = (
        f"vanishing: the inputs' differences are {share:.2g} of what {record.kinds[i]} puts out "
        f"after {i + 1} layers; the net tells them apart no more"
    )
    layer = record.layers[i]
    sure = round(min(0.94, max(0.0, sure)), 3)
    return [Finding("vanishing", layer, 1, None, sure, text, remedies_for("vanishing"))]


# -- weighing --------------------------------------------------------------------------------------


def _certain(findings: Sequence[Finding]) -> bool:
    """Whether the verdict is clear without a rehearsal."""
    final = ("non-finite", "exploding", "vanishing")
    return any(f.confidence >= CERTAIN and f.kind in final for f in findings)


def _weighed(found: _Found, rehearsal: Rehearsal | None) -> Verdict:
    """The verdict on what was measured, with regard to how the rehearsal went.

    A net that learns is not sick, whatever its gains are, unless these are extreme. For one that
    does not learn, weaker suspicions are named as causes.
    """
    findings = found.findings
    if rehearsal is None:
        return Verdict.of(findings)
    looks = len(rehearsal.losses)
    sure = [
        f
        for f in findings
        if f.kind == "not reached"
        or (f.confidence >= CERTAIN and f.kind not in ("dead", "saturated"))
    ]
    rest = [f for f in findings if f not in sure]
    if rehearsal.learnt:
        return Verdict.of(sure, looks)
    causes = [_raised(f) for f in rest if f.confidence >= SUSPECT]
    rose = not rehearsal.end < 2 * max(rehearsal.start, rehearsal.chance or 0.0)
    kind = "diverging" if rose else "stalled"
    known = 0.9 if rehearsal.chance is not None or rose else 0.4  # it may be trained already
    text = f"{kind}: rehearsed near the batch, {rehearsal}"
    helps = _fitting(remedies_for(kind), set(found.record.kinds))
    return Verdict.of([*sure, *causes, Finding(kind, None, 1, None, known, text, helps)])


def _raised(f: Finding) -> Finding:
    """A suspicion that is confirmed."""
    return replace(f, confidence=max(f.confidence, SHOWN))


# -- trying remedies -------------------------------------------------------------------------------


def _fitting(names: Sequence[str], kinds: set[str]) -> tuple[str, ...]:
    return tuple(name for name in names if REMEDIES[name].fits(kinds))


def _tried(
    model: Module,
    work: Batch,
    verdict: Verdict,
    found: _Found,
    steps: int,
    norm: float,
    how: dict[str, Any],
) -> tuple[Trial, ...]:
    names = dict.fromkeys(name for f in verdict.findings for name in f.remedies)
    kinds = set(found.record.kinds)
    trials = [
        _try(REMEDIES[name], model, work, steps, norm, how) for name in _fitting(list(names), kinds)
    ]
    return tuple(sorted(trials, key=lambda trial: trial.rank))


def _try(
    remedy: Remedy, model: Module, work: Batch, steps: int, norm: float, how: dict[str, Any]
) -> Trial:
    if remedy.by_hand:
        return Trial(remedy.name, remedy.by_hand)
    with copied(model, how["seed"]) as twin:
        try:
            text = _apply(remedy, twin, work)
        except Impossible as error:
            return Trial(remedy.name, str(error))
        after = _measure(twin, work)
        clip = None
        if remedy.clips:
            clip = norm
            text = remedy.text(norm=f"{norm:.2g}")
        rehearsal = None
        if after.trainable and not _certain(after.findings):
            rehearsal = rehearse(twin, work, steps=steps, clip=clip, slower=remedy.slower, **how)
            if remedy.slower != 1:
                text = remedy.text(lr=f"{rehearsal.lr:g}")
        verdict = _weighed(after, rehearsal)
        return Trial(remedy.name, text, True, verdict, rehearsal, after.ratio)


def _advised(f: Finding, helpful: Sequence[str]) -> Finding:
    """The finding with what helped in trials at the head of its remedies."""
    first = tuple(name for name in helpful if f.kind in REMEDIES[name].against)
    return replace(f, remedies=(*first, *(name for name in f.remedies if name not in first)))


def _usual_norm(rehearsal: Rehearsal | None) -> float:
    """A norm to clip at: that of the calmer steps, if it is below 1, else 1."""
    norms = rehearsal.norms[np.isfinite(rehearsal.norms)] if rehearsal is not None else np.empty(0)
    return min(1.0, float(np.quantile(norms, 0.25))) or 1.0 if norms.size else 1.0


def _apply(remedy: Remedy, twin: Module, work: Batch) -> str:
    if remedy.apply is None:
        return remedy.text()
    return remedy.apply(twin, lambda: twin(*work.inputs))
