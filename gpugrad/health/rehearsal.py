"""A few training steps on a copy, on examples like those of a batch: does the loss come down?"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from gpugrad import ops
from gpugrad.backend import SPACES
from gpugrad.core.conversion import tensor
from gpugrad.core.modes import enable_grad, no_grad
from gpugrad.core.tensor import Parameter, Tensor
from gpugrad.health.errors import HealthError
from gpugrad.health.verdict import FEW, LEARNT
from gpugrad.nn import functional as F
from gpugrad.nn.module import Module
from gpugrad.nn.random import Generator, default_generator

__all__ = ["Batch", "Loss", "Make", "Rehearsal", "copied", "rehearse"]

Net = TypeVar("Net", bound=Module)

#: Takes what the model returned and the targets.
Loss = Callable[[Any, Any], Tensor]

#: Makes an optimiser of parameters.
Make = Callable[[list[Parameter]], Any]

#: Steps after which most nets that learn at all have begun to.
STEPS = 300
#: Training meets other examples than those of one batch, which any net can learn by heart. So those
#: of the other batches are made up: near the batch's, but with this share of the variance of inputs
#: drawn anew. Mean and variance of every input stay what they are.
DRAWN = 0.5
#: Of how many batches an epoch is, if nobody says.
BATCHES = 4
#: From this share of the best constant answer's loss on it is certain that a net learns.
SURELY_LEARNT = 0.5


class Batch:
    """Inputs and targets, the loss of what a model makes of them, and of the best constant answer.

    `batch` is a pair of inputs and targets; the inputs of models with several are a tuple. Arrays
    are moved to where the model is, and those of real numbers to its dtype.
    """

    def __init__(self, model: Module, batch: Any, loss: Loss | None) -> None:
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            raise HealthError(
                f"diagnose: a batch is a pair (inputs, targets), not {type(batch).__name__}; put "
                "several inputs into a tuple"
            )
        inputs, targets = batch
        self.inputs = tuple(
            _as_tensor(model, x) for x in (inputs if isinstance(inputs, tuple) else (inputs,))
        )
        self.targets = _as_tensor(model, targets)
        whole = isinstance(self.targets, Tensor) and self.targets.dtype.kind in "iub"
        self.loss: Loss = loss or (_cross_entropy if whole else _squared_error)
        self.chance = self._chance(whole) if loss is None else None

    def run_backward(self, model: Module, inputs: Sequence[Any] | None = None) -> Tensor:
        """The loss; gradients are left on the parameters, if the loss depends on any.

        Of the batch's inputs, or of others in their place.
        """
        with enable_grad():
            value = self.loss(model(*(inputs or self.inputs)), self.targets)
        if value.requires_grad:
            value.backward()
        return value.detach()

    def like(self, generator: Generator) -> list[Any]:
        """Other inputs for the same targets; whole numbers, and what has no examples, stay."""
        return [_redrawn(x, generator) for x in self.inputs]

    def _chance(self, whole: bool) -> float | None:
        targets = self.targets.detach().numpy()
        if not targets.size:
            return None
        if whole:
            share = np.unique(targets[targets >= 0], return_counts=True)[1] / targets.size
            return float(-(share * np.log(share)).sum())
        return float(np.mean((targets - targets.mean(axis=0)).astype(np.float64) ** 2))


def _as_tensor(model: Module, x: Any) -> Any:
    if isinstance(x, Tensor) or not hasattr(x, "dtype"):
        return x
    p = next(iter(model.parameters()), None)
    if p is None:
        return tensor(x)
    dtype = p.dtype if np.dtype(x.dtype).kind == "f" else None
    return tensor(x, dtype=dtype, device=p.device)


def _redrawn(x: Any, generator: Generator) -> Any:
    """Examples with `DRAWN` of the variance that they have, place by place, drawn anew."""
    if not isinstance(x, Tensor) or x.dtype.kind != "f" or not x.ndim or x.shape[0] < 2:
        return x
    noise = tensor(generator.normal(x.shape), dtype=x.dtype, device=x.device)
    with no_grad():
        middle = ops.mean(x.detach(), axis=0, keepdims=True)
        apart = x.detach() - middle
        deviation = ops.sqrt(ops.mean(apart * apart, axis=0, keepdims=True))
        return middle + math.sqrt(1 - DRAWN) * apart + math.sqrt(DRAWN) * deviation * noise


def _first(output: Any) -> Any:
    while isinstance(output, tuple | list):
        output = output[0]
    return output


def _cross_entropy(output: Any, targets: Tensor) -> Tensor:
    scores = _first(output)
    return F.cross_entropy(  # type: ignore[no-any-return]
        scores.reshape((-1, scores.shape[-1])), targets.reshape((-1,))
    )


def _squared_error(output: Any, targets: Tensor) -> Tensor:
    return F.mse_loss(_first(output), targets)  # type: ignore[no-any-return]


@contextmanager
def copied(model: Net, seed: int = 0) -> Iterator[Net]:
    """A copy of a model, in training mode and without gradients.

    Random numbers, such as those of dropout, begin at `seed`; their state is restored afterwards.
    """
    state = default_generator.state
    default_generator.manual_seed(seed)
    try:
        try:
            twin = copy.deepcopy(model)
        except Exception as error:
            raise HealthError(
                f"diagnose: {type(model).__name__} cannot be copied ({error}), and the original "
                "must stay as it is; keep files, locks and the like out of the model"
            ) from error
        twin.train()
        twin.zero_grad()
        yield twin
    finally:
        default_generator.state = state


@dataclass(frozen=True)
class Rehearsal:
    """What became of a copy that was trained on examples near those of the batch.

    Attributes
    ----------
    losses:
        Before each step.
    norms:
        Of all gradients together, before clipping.
    lr, clip:
        The learning rate, and the norm that gradients were clipped at.
    chance:
        The loss of the best constant answer, if known.
    """

    losses: NDArray[np.float64] = field(repr=False)
    norms: NDArray[np.float64] = field(repr=False)
    lr: float
    clip: float | None
    chance: float | None

    @property
    def start(self) -> float:
        """The first loss."""
        return float(self.losses[0])

    @property
    def end(self) -> float:
        """The mean of the last 20, and of half of fewer; NaN if one of these is not finite."""
        return float(self.losses[-min(FEW, (len(self.losses) + 1) // 2) :].mean())

    @property
    def goal(self) -> float:
        """What the loss has to stay below for the net to learn anything."""
        return LEARNT * (self.start if self.chance is None else self.chance)

    @property
    def surely(self) -> float:
        """Below this loss it is certain that the net learns."""
        return SURELY_LEARNT / LEARNT * self.goal

    def decides(self, steps: int) -> bool:
        """Whether another draw of examples would hardly say otherwise.

        The net surely learns, in half of the steps that it has, or it is as far from the goal on
        the other side.
        """
        if self.end < self.surely:
            return 2 * len(self.losses) <= steps
        return not self.end < self.goal**2 / self.surely

    @property
    def learnt(self) -> bool:
        """Whether the loss came down, below that of the best constant answer."""
        return bool(self.end < self.goal)

    def __str__(self) -> str:
        text = f"loss {self.start:.4g} → {self.end:.4g} in {len(self.losses)} steps"
        return text if self.chance is None else f"{text} (best constant answer {self.chance:.4g})"


def rehearse(
    model: Module,
    batch: Batch,
    *,
    steps: int = STEPS,
    lr: float = 1e-3,
    clip: float | None = None,
    slower: float = 1.0,
    make: Make | None = None,
    batches: int = BATCHES,
    seed: int = 0,
) -> Rehearsal:
    """Train a model on examples near those of a batch, and say what became of the loss.

    Changes the model. The batch and others that are made up, see `DRAWN`, take turns as those of an
    epoch do. A net has learnt if the mean of the last losses is below `LEARNT` times that of the
    best constant answer: the same that is asked of a real run.

    It ends when the model surely learns, or its loss is not finite any more.

    Parameters
    ----------
    steps:
        How many at most.
    lr:
        Of Adam; Kingma and Ba, arXiv:1412.6980.
    clip:
        Scale gradients to this norm if theirs is greater.
    slower:
        A factor on the learning rate.
    make:
        Makes the optimiser to use in place of Adam.
    batches:
        Of an epoch.
    seed:
        Of the random numbers that examples are made of.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer: _Adam | _Theirs = (
        _Adam(parameters, lr * slower, clip) if make is None
        else _Theirs(make(parameters), slower, clip)
    )  # fmt: skip
    drawn = Generator(seed)
    losses: list[Any] = []
    numbers: list[float] = []

    def result() -> Rehearsal:
        # The host reads now and then, not at every step.
        numbers.extend(float(x.item()) for x in losses[len(numbers) :])
        norms = np.array([float(x) for x in optimizer.norms], np.float64)
        return Rehearsal(np.array(numbers, np.float64), norms, optimizer.lr, clip, batch.chance)

    while True:
        model.zero_grad()
        turn = len(losses) % batches
        drawn.state = seed, turn * len(batch.inputs)
        losses.append(batch.run_backward(model, batch.like(drawn) if turn else None))
        optimizer.step()
        n = len(losses)
        if n < steps and n % FEW:
            continue
        so_far = result()
        if n >= steps or so_far.end < so_far.surely or not math.isfinite(so_far.end):
            return so_far


class _Theirs:
    """An optimiser that is given."""

    def __init__(self, optimizer: Any, slower: float, clip: float | None) -> None:
        self.optimizer, self.clip = optimizer, clip
        self.norms: list[Any] = []
        for group in optimizer.param_groups:
            group["lr"] *= slower
        self.lr = float(optimizer.param_groups[0]["lr"])

    def step(self) -> None:
        self.optimizer.step(**({} if self.clip is None else {"clip": self.clip}))


class _Adam:
    """Adam over all parameters of a place at once, by hand: optimisers stand above this package."""

    def __init__(self, parameters: Sequence[Parameter], lr: float, clip: float | None) -> None:
        self.parameters = parameters
        self.lr, self.clip = lr, clip
        self.norms: list[Any] = []
        self._steps = 0
        self._state: dict[Any, Any] = {}

    def step(self) -> None:
        self._steps += 1
        places: dict[tuple[Any, str], list[Parameter]] = {}
        for p in self.parameters:
            if p.grad is not None:
                m = SPACES[type(p.data)]
                places.setdefault((m, m.device(p.data)), []).append(p)
        for key, group in places.items():
            self._update(key, group)

    def _update(self, key: Any, group: list[Parameter]) -> None:
        m = key[0]
        wide = m.float64 if any(p.dtype.itemsize > 4 for p in group) else m.float32

        def flat(arrays: Any) -> Any:
            return m.concat([m.reshape(m.astype(x, wide), (-1,)) for x in arrays])

        g = flat([p.grad.data for p in group])  # type: ignore[union-attr]
        norm = m.sqrt(m.sum(g * g))
        self.norms.append(norm)
        if self.clip is not None:
            g = g * m.minimum(self.clip / (norm + 1e-6), m.ones_like(norm))
        n = self._steps
        mean, square = self._state.get((key, len(group)), (0.0 * g, 0.0 * g))
        mean, square = 0.9 * mean + 0.1 * g, 0.999 * square + 0.001 * g * g
        self._state[key, len(group)] = mean, square
        change = mean / (1 - 0.9**n) / (m.sqrt(square / (1 - 0.999**n)) + 1e-8)
        values = flat([p.data for p in group]) - self.lr * change
        at = 0
        for p in group:
            part = m.reshape(values[at : at + p.size], p.shape)
            at += p.size
            p.data = part if part.dtype == p.data.dtype else m.astype(part, p.data.dtype)
