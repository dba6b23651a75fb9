"""Verdicts and remedies on a grid of nets, against what is measured when they are trained.

``python bench/health_grid.py [--quick] [--cases N] [--minutes M] [--seed S …] [--jobs J]
[--out PATH]``. Also measures the depth scales of wide tanh nets and compares them with theory.

What counts as the truth is said in one place, `truth`; it does not look at verdicts.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import platform
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from datetime import date
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

import gpugrad as gg
from gpugrad import nn
from gpugrad.health.diagnosis import Diagnosis, diagnose, remedied
from gpugrad.health.monitor import Monitor
from gpugrad.health.remedies import REMEDIES
from gpugrad.health.theory import MeanField, correlation_map, mean_field
from gpugrad.health.verdict import judge

ACTIVATIONS = {"tanh": nn.Tanh, "relu": nn.ReLU, "sigmoid": nn.Sigmoid, "gelu": nn.GELU}
DEPTHS = (4, 10, 20, 50, 100, 200)
GAINS = (0.5, 1.0, 1.5, 2.5)
CELLS = {"rnn": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}
LENGTHS = (5, 20, 60, 200)

FEATURES, CLASSES, WIDTH, EXAMPLES, BATCH = 16, 4, 32, 256, 64


# -- nets and tasks --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A net of the grid: either layers above each other, or a recurrent one over `depth` steps."""

    depth: int
    activation: str = "tanh"
    gain: float = 1.0
    norm: str = "none"
    residual: bool = False
    cell: str = ""
    seed: int = 0

    def __str__(self) -> str:
        if self.cell:
            return f"{self.cell} over {self.depth} steps, gain {self.gain}"
        return (
            f"{self.depth} {self.activation}, gain {self.gain}, norm {self.norm}"
            f"{', residual' * self.residual}"
        )


class Short(nn.Module):
    """A short cut around a layer."""

    def __init__(self, *body: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(*body)

    def forward(self, x: gg.Tensor) -> gg.Tensor:
        return x + self.body(x)


class Reader(nn.Module):
    """Reads a sequence, and then says of which class it is."""

    def __init__(self, cell: str, gain: float) -> None:
        super().__init__()
        self.rnn = CELLS[cell](FEATURES, WIDTH, batch_first=True)
        self.head = nn.Linear(WIDTH, CLASSES)
        if cell == "rnn":  # the gated cells keep their usual start
            nn.init.normal_(self.rnn.weight_hh_l0, 0.0, gain / math.sqrt(WIDTH))

    def forward(self, x: gg.Tensor) -> gg.Tensor:
        y, _ = self.rnn(x)
        return self.head(y[:, -1])


def net(case: Case) -> nn.Module:
    """The net of a case: weights normal with deviation gain/√fan_in, biases 0."""
    gg.manual_seed(case.seed)
    if case.cell:
        return Reader(case.cell, case.gain)
    modules: list[nn.Module] = []
    inputs = FEATURES
    for _ in range(case.depth - 1):
        body: list[nn.Module] = [_linear(inputs, WIDTH, case.gain)]
        if case.norm != "none":
            body.append(nn.LayerNorm(WIDTH) if case.norm == "layer" else nn.BatchNorm1d(WIDTH))
        body.append(ACTIVATIONS[case.activation]())
        if case.residual and inputs == WIDTH:
            modules.append(Short(*body))
        else:
            modules += body
        inputs = WIDTH
    return nn.Sequential(*modules, _linear(inputs, CLASSES, case.gain))


def _linear(inputs: int, outputs: int, gain: float) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    nn.init.normal_(layer.weight, 0.0, gain / math.sqrt(inputs))
    nn.init.zeros_(layer.bias)
    return layer


def task(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Inputs, and classes that a net can learn.

    Of single examples the class is the largest of four random linear functions. A sequence shows
    its class in its first step, and noise in all others.
    """
    rng = np.random.default_rng(case.seed)
    if not case.cell:
        x = rng.standard_normal((EXAMPLES, FEATURES)).astype(np.float32)
        return x, (x @ rng.standard_normal((FEATURES, CLASSES))).argmax(1)
    y = rng.integers(0, CLASSES, EXAMPLES)
    x = rng.standard_normal((EXAMPLES, case.depth, FEATURES)).astype(np.float32)
    x[:, :, :CLASSES] = 0.0
    x[np.arange(EXAMPLES), 0, y] = 3.0
    return x, y


# -- the truth -------------------------------------------------------------------------------------

STEPS, LR, LOOK = 300, 1e-3, 20


@dataclass(frozen=True)
class Truth:
    """What became of a net; see `truth`."""

    ratio: float
    extreme: bool
    end: float | None
    chance: float
    sick: bool

    @property
    def trained(self) -> bool:
        """Whether the loss came down, if the net was trained at all."""
        return self.end is not None and self.end < 0.9 * self.chance


def truth(
    model: nn.Module,
    data: tuple[np.ndarray, np.ndarray],
    *,
    lr: float = LR,
    clip: float | None = None,
    watched: Monitor | None = None,
) -> Truth:
    """Measure whether a net is sick. Trains it.

    It is sick if one of these holds:

    * gradients: before training, the norm of the gradient of the first layer's parameters is
      outside of [1e-6, 1e6] times that of the last layer's, on the first batch (of a recurrent net,
      that with regard to its input at the first step and at the last one); or is not finite;
    * training: after 300 steps of Adam at 1e-3, over batches of 64 out of 256 examples, the mean of
      the last 20 losses is not below 0.9 times that of the best constant answer: it diverged, or
      it stalled. Training ends before if the mean of 20 losses is below half of the constant
      answer's.

    A net whose gradients are extreme is not trained, but if `watched` wants to see it.
    """
    x, y = (gg.tensor(part) for part in data)
    share = np.bincount(data[1]) / len(data[1])
    chance = float(-(share[share > 0] * np.log(share[share > 0])).sum())
    ratio = _ratio(model, x[:BATCH], y[:BATCH])
    extreme = not 1e-6 <= ratio <= 1e6
    if extreme and watched is None:
        return Truth(ratio, True, None, chance, True)
    optimizer = gg.optim.Adam(model.parameters(), lr=lr)
    if watched is not None:
        watched.start()
    losses: list[float] = []
    for step in range(STEPS):
        at = step * BATCH % EXAMPLES
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x[at : at + BATCH]), y[at : at + BATCH])
        loss.backward()
        optimizer.step(clip=clip)
        if watched is not None:
            watched.step(loss)
        losses.append(loss.item())
        end = float(np.mean(losses[-LOOK:]))
        if not math.isfinite(losses[-1]) or (step >= LOOK and end < 0.5 * chance):
            break
    if watched is not None:
        watched.stop()
    return Truth(ratio, extreme, end, chance, extreme or not end < 0.9 * chance)


def _ratio(model: nn.Module, x: gg.Tensor, y: gg.Tensor) -> float:
    """The gradient's norm at the first layer, or step, over that at the last."""
    model.train()
    model.zero_grad()
    if isinstance(model, Reader) or any(
        isinstance(m, tuple(CELLS.values())) for m in model.modules()
    ):
        x = x.detach().requires_grad_()
    nn.functional.cross_entropy(model(x), y).backward()
    if x.grad is not None:
        g = x.grad.numpy().astype(np.float64)
        first, last = np.linalg.norm(g[:, 0]), np.linalg.norm(g[:, -1])
    else:
        layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
        first, last = _norm(layers[0]), _norm(layers[-1])
    model.zero_grad()
    return float(first / last) if last > 0 else math.nan


def _norm(layer: nn.Module) -> float:
    grads = [p.grad.numpy().astype(np.float64) for p in layer.parameters() if p.grad is not None]
    return math.sqrt(sum(float((g**2).sum()) for g in grads))


# -- one case --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """Verdicts on a net before it was trained, and after, and the truth.

    `glance` is whether one look without a rehearsal finds it healthy, `monitored` the verdict on
    its training, and `passed` the kind of what that says had been extreme at the start only.
    """

    case: Case
    truth: Truth
    kind: str
    healthy: bool
    glance: bool
    monitored: str | None
    passed: str | None
    remedy: str | None
    cured: bool | None
    text: str
    seconds: float

    @property
    def right(self) -> bool:
        """Whether the verdict before training agrees with the truth."""
        return self.healthy is not self.truth.sick


def examine(case: Case, *, remedies: bool = True, monitored: bool = False) -> Outcome:
    """Diagnose a net, train it, and if it is sick train it again with the best remedy."""
    began = time.perf_counter()
    data = task(case)
    batch = data[0][:BATCH], data[1][:BATCH]
    model = net(case)
    with np.errstate(all="ignore"):
        found = diagnose(model, batch, try_remedies=remedies, batches=EXAMPLES // BATCH)
        glance = (
            diagnose(model, batch, steps=0).verdict.healthy if monitored else found.verdict.healthy
        )
        trained = copy.deepcopy(model)
        monitor = Monitor(trained, every=5) if monitored else None
        real = truth(trained, data, watched=monitor)
        kind, passed = None, None
        if monitor is not None:
            watched = judge(monitor.record, chance=real.chance)
            kind = watched.kind
            passed = next((f.kind for f in watched.findings if f.until is not None), None)
        remedy, cured = None, None
        if remedies and real.sick and not found.verdict.healthy:
            remedy, cured = cure(model, found, data, batch)
    verdict = found.verdict
    return Outcome(
        case=case,
        truth=real,
        kind=verdict.kind,
        healthy=verdict.healthy,
        glance=glance,
        monitored=kind,
        passed=passed,
        remedy=remedy,
        cured=cured,
        text=verdict.findings[0].text,
        seconds=time.perf_counter() - began,
    )


def cure(model: nn.Module, found: Diagnosis, data: Any, batch: Any) -> tuple[str | None, bool]:
    """The remedy that ranks first, and whether the net trains with it."""
    trials = [trial for trial in found.trials if trial.possible]
    if not trials:
        return None, False
    best = REMEDIES[trials[0].name]
    with_it = remedied(model, best.name, batch)
    clip = 1.0 if best.clips else None
    return best.name, not truth(with_it, data, lr=LR * best.slower, clip=clip).sick


# -- the grid --------------------------------------------------------------------------------------


def cases(seed: int = 0) -> list[Case]:
    """Every case once, with seeds of their own."""
    rng = random.Random(seed)
    deep = [
        Case(depth, activation, gain, norm, residual, "", rng.randrange(10**6))
        for depth, activation, gain, norm, residual in product(
            DEPTHS, ACTIVATIONS, GAINS, ("none", "layer", "batch"), (False, True)
        )
    ]
    recurrent = [
        Case(length, "tanh", gain, "none", False, cell, rng.randrange(10**6))
        for length, cell in product(LENGTHS, CELLS)
        for gain in (GAINS if cell == "rnn" else (1.0,) * len(GAINS))
    ]
    return deep + recurrent


def _in_time(case: Case, *, end: float, remedies: bool) -> Outcome | None:
    """What becomes of a case, if it begins before the end."""
    return None if time.time() > end else examine(case, remedies=remedies, monitored=True)


def summary(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Counts: how often verdicts were right, and remedies helped."""

    def share(of: Iterator[bool]) -> tuple[int, int]:
        found = list(of)
        return sum(found), len(found)

    return {
        "cases": len(outcomes),
        "sick": sum(o.truth.sick for o in outcomes),
        "right": sum(o.right for o in outcomes),
        "false alarms": sum(not o.healthy and not o.truth.sick for o in outcomes),
        "missed": sum(o.healthy and o.truth.sick for o in outcomes),
        "confusion": {
            truth: {
                called: sum(o.truth.sick is sick and o.healthy is healthy for o in outcomes)
                for called, healthy in (("called sick", False), ("called healthy", True))
            }
            for truth, sick in (("sick", True), ("healthy", False))
        },
        "one look right": sum(o.glance is not o.truth.sick for o in outcomes),
        "one look false alarms": sum(not o.glance and not o.truth.sick for o in outcomes),
        "monitored right": share((o.monitored == "healthy") is not o.truth.sick
                                 for o in outcomes if o.monitored),
        "monitored right, or told of the start": share(
            (o.monitored == "healthy" and o.passed is None) is not o.truth.sick
            for o in outcomes if o.monitored),
        "monitored right about the training": share(
            (o.monitored == "healthy") is o.truth.trained for o in outcomes if o.monitored),
        "monitored false alarms": sum(
            o.monitored not in (None, "healthy") and not o.truth.sick for o in outcomes),
        "cured": share(o.cured for o in outcomes if o.cured is not None),
        "remedies": dict(Counter(o.remedy for o in outcomes if o.cured is not None)),
        "kinds": dict(Counter(o.kind for o in outcomes)),
    }  # fmt: skip


# -- depth scales of wide nets ---------------------------------------------------------------------


@dataclass(frozen=True)
class Scales:
    """Depth scales of wide random tanh nets, measured and predicted, in layers."""

    sigma_w: float
    sigma_b: float
    gradient: float
    gradient_theory: float
    correlation: float
    correlation_theory: float


def scales(
    sigma_w: float, sigma_b: float, *, width: int, depth: int, seeds: int, inputs: int = 24
) -> Scales:
    """Send inputs forward and a random gradient backward through real nets, and fit the decay.

    Pre-activations start with the length q*. Squared gradients are averaged over units and inputs.
    In the ordered phase correlations start below c* = 1, and their distance from it is fitted where
    it is small. In the chaotic one two sets of inputs start on either side of c*, and the distance
    between their correlations is fitted: c* itself is a little different in a net that is not
    infinitely wide. There the distance cannot be as small as the asymptotic scale asks for, and the
    theory is asked for its decay over the same layers. Averages are over pairs, and over nets.
    """
    theory = mean_field("tanh", sigma_w, sigma_b)
    ordered = theory.correlation == 1
    starts = (0.9, 1.0) if ordered else (theory.correlation - 0.02, theory.correlation + 0.18)
    away, signals = [], []
    for seed in range(seeds):
        found = [
            _propagate(theory, start, width, depth, seed, inputs) for start in starts if start < 1
        ]
        c = [correlation for correlation, _ in found]
        away.append(1 - c[0] if ordered else c[1] - c[0])
        signals.append(found[0][1])
    slope = np.polyfit(np.arange(depth), np.log(signals).mean(0), 1)[0]
    distance = np.abs(np.mean(away, axis=0))
    # In the chaotic phase every layer adds a little noise, whatever is left of the distance.
    small = 1e-5 if ordered else 0.02
    last = int(np.append(np.flatnonzero(distance < small), depth)[0])
    first = int(np.argmax(distance < 0.3 * distance[0])) if ordered else 0
    at, weights = np.arange(first, last), np.ones(last - first) if ordered else distance[first:last]
    decay = np.polyfit(at, np.log(distance[first:last]), 1, w=weights)[0]
    predicted = theory.xi_correlation
    if not ordered:
        expected = _expected(theory, starts[1], depth) - _expected(theory, starts[0], depth)
        predicted = -1 / np.polyfit(at, np.log(expected[first:last]), 1, w=weights)[0]
    return Scales(sigma_w, sigma_b, 1 / abs(slope), theory.xi_gradient, -1 / decay, predicted)


def _expected(theory: MeanField, start: float, depth: int) -> np.ndarray:
    """The correlations of infinitely wide layers."""
    c = [start]
    while len(c) < depth:
        c.append(correlation_map("tanh", c[-1], theory.length, theory.sigma_w, theory.sigma_b))
    return np.array(c)


def _propagate(
    theory: MeanField, start: float, width: int, depth: int, seed: int, inputs: int
) -> tuple[np.ndarray, np.ndarray]:
    """Per layer the correlation, and the mean squared gradient, of pre-activations."""
    gg.manual_seed(seed)
    rng = np.random.default_rng(seed)
    sw, sb, q = theory.sigma_w, theory.sigma_b, theory.length
    square = (q - sb**2) / sw**2
    shared = min(max((start * q - sb**2) / (sw**2 * square), 0.0), 1.0)
    x = math.sqrt(shared) * rng.standard_normal(width) + math.sqrt(
        1 - shared
    ) * rng.standard_normal((inputs, width))
    layers = []
    for _ in range(depth):
        layer = nn.Linear(width, width)
        nn.init.normal_(layer.weight, 0.0, sw / math.sqrt(width))
        nn.init.normal_(layer.bias, 0.0, sb)
        layers += [layer, nn.Tanh()]
    seen: list[np.ndarray] = []
    signal = np.zeros(depth)

    def look(i: int, module: Any, args: Any, out: gg.Tensor) -> None:
        seen.append(out.detach().numpy().astype(np.float64))
        out.register_hook(partial(note, i))

    def note(i: int, g: gg.Tensor) -> None:
        signal[i] = float((g.numpy().astype(np.float64) ** 2).mean())

    for i, layer in enumerate(layers[::2]):
        layer.register_forward_hook(partial(look, i))
    y = nn.Sequential(*layers)(gg.tensor((math.sqrt(square) * x).astype(np.float32)))
    (y * gg.tensor(rng.standard_normal(y.shape).astype(np.float32))).sum().backward()
    h = np.array(seen)
    middle = h.mean(axis=1, keepdims=True)
    differences = ((h - middle) ** 2).mean(axis=(1, 2)) * inputs / (inputs - 1)
    return 1 - differences / (h**2).mean(axis=(1, 2)), signal


#: σ_w and σ_b of both phases, away from the transition, where scales grow beyond any net.
PHASES = ((0.8, 0.1), (1.0, 0.3), (1.5, 0.8), (1.8, 0.05), (2.5, 0.3), (4.0, 0.3))


# -- the program -----------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the grid, print its tables, and write a report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="60 cases of little depth")
    parser.add_argument("--cases", type=int, help="how many, drawn by chance; default all")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no case after them")
    parser.add_argument("--seed", type=int, nargs="+", default=[0])
    parser.add_argument("--jobs", type=int, default=1, help="processes that run cases")
    parser.add_argument("--no-remedies", action="store_true")
    parser.add_argument("--no-scales", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    grids = [cases(seed) for seed in options.seed]
    for seed, grid in zip(options.seed, grids):
        random.Random(seed).shuffle(grid)
    chosen = [case for row in zip(*grids) for case in row]
    if options.quick:
        chosen = [case for case in chosen if case.depth <= 20][:60]
    chosen = chosen[: options.cases]
    run = partial(
        _in_time, end=time.time() + 60 * options.minutes, remedies=not options.no_remedies
    )
    outcomes: list[Outcome] = []
    misses: list[str] = []
    with ProcessPoolExecutor(options.jobs) as pool:
        for outcome in pool.map(run, chosen):
            if outcome is None:
                continue
            outcomes.append(outcome)
            if not outcome.right or outcome.cured is False:
                misses.append(
                    f"{outcome.case}, seed {outcome.case.seed}: truth {asdict(outcome.truth)}; "
                    f"verdict {outcome.kind}: {outcome.text}; remedy {outcome.remedy}, "
                    f"cured {outcome.cured}"
                )
                print(misses[-1], flush=True)
    found = summary(outcomes)
    for name, value in found.items():
        print(f"{name:38} {value}")
    wide = []
    if not options.no_scales:
        size = {"width": 800, "depth": 20, "seeds": 2} if options.quick else \
            {"width": 1000, "depth": 16, "seeds": 12}  # fmt: skip
        print("\nwide tanh nets, depth scales in layers: measured / theory")
        for sigma_w, sigma_b in PHASES:
            s = scales(sigma_w, sigma_b, **size)
            wide.append(asdict(s))
            pairs = {
                "gradients": (s.gradient, s.gradient_theory),
                "correlation": (s.correlation, s.correlation_theory),
            }
            texts = [f"{name} {a:.3f}/{b:.3f} = {a / b:.3f}" for name, (a, b) in pairs.items()]
            print(f"σ_w {sigma_w}, σ_b {sigma_b}: {', '.join(texts)}", flush=True)
    if options.out:
        report = {
            "date": date.today().isoformat(),
            "versions": {
                "gpugrad": gg.__version__,
                "python": platform.python_version(),
                "numpy": np.__version__,
                "machine": platform.machine(),
            },
            "seeds": options.seed,
            "summary": found,
            "misses": misses,
            "scales": wide,
            "truth": truth.__doc__,
            "outcomes": [asdict(o) for o in outcomes],
        }
        options.out.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
