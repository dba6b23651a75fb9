"""Gradients through time: how much of the loss's gradient arrives at each step of a sequence."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpugrad import nn, ops
from gpugrad.backend import SPACES
from gpugrad.core.tensor import Tensor
from gpugrad.health.errors import HealthError
from gpugrad.health.probe import Piece, read
from gpugrad.health.recurrence import LAYERS
from gpugrad.health.statistics import SQUARES, moments

__all__ = ["ThroughTime", "through_time"]

Norms = NDArray[np.float64]

CELLS = (nn.RNNCell, nn.LSTMCell, nn.GRUCell)


@dataclass(frozen=True)
class ThroughTime:
    """The gradient that arrived at the states of one recurrent layer in one direction.

    Attributes
    ----------
    layer:
        The path of the module, and the suffix of the layer's weights in it: "rnn_l0".
    hidden:
        The L2 norm of dLoss/dh for the hidden state after each step, float64 [steps], in the order
        of time. All ways from the state to the loss count, that through later steps included. 0
        where none leads there.
    cell:
        The same of the cell state; None where there is none.
    """

    layer: str
    hidden: Norms
    cell: Norms | None = None

    @property
    def growth(self) -> float:
        """The factor from each step to the one that was computed before it, fitted over all.

        Above 1 gradients explode on their way back, below 1 they vanish. Its power of the number of
        steps is what a loss at the end is felt by in the beginning. NaN for fewer than two steps.

        >>> ThroughTime("rnn_l0", np.array([8.0, 4.0, 2.0, 1.0])).growth
        2.0...
        """
        norms = self.hidden[::-1] if not self.layer.endswith("_reverse") else self.hidden
        back = np.arange(len(norms))
        known = np.isfinite(norms) & (norms > 0)
        if known.sum() < 2:
            return float("nan")
        return float(np.exp(np.polyfit(back[known], np.log(norms[known]), 1)[0]))


@dataclass
class _Sequence:
    """One run of a layer over a sequence: what arrives at each step, on the device."""

    layer: str
    steps: int = 0
    hidden: dict[int, Any] = field(default_factory=dict)
    cell: dict[int, Any] = field(default_factory=dict)

    def watch(self, step: int, states: tuple[Tensor, ...]) -> None:
        """Note what arrives at the states after a step."""
        self.steps = max(self.steps, step + 1)
        for state, kept in zip(states, (self.hidden, self.cell)):
            if state.requires_grad:
                state.register_hook(partial(_note, kept, step))


def _note(kept: dict[int, Any], step: int, g: Tensor) -> None:
    m = SPACES[type(g.data)]
    kept[step] = m.bind(moments)(m, g.data)


def through_time(model: nn.Module, run: Callable[[], Any]) -> list[ThroughTime]:
    """The gradient norms through time of every recurrent layer, while `run()` runs the model.

    The layers `nn.RNN`, `nn.LSTM` and `nn.GRU` run step by step meanwhile, with the same results;
    each call of a cell is a step. The host waits for the device in the end.

    Parameters
    ----------
    model:
        What has recurrent layers, or is one.
    run:
        Runs the model forward, and `backward()` on its loss.

    Returns
    -------
    One entry for each layer and direction, in the order in which they ran; a layer that was called
    several times has several.

    Raises
    ------
    HealthError
        When there is no recurrent layer, or none was called.

    >>> import gpugrad as gg
    >>> layer = nn.RNN(2, 8)
    >>> def run():
    ...     output, _ = layer(gg.ones((20, 4, 2), dtype="float32"))
    ...     output[-1].sum().backward()
    >>> (found,) = through_time(layer, run)
    >>> found.layer, found.hidden.shape, found.growth < 1
    ('RNN_l0', (20,), True)
    """
    found: list[_Sequence] = []
    cells: dict[int, _Sequence] = {}
    recurrent = [(p, m) for p, m in model.named_modules() if isinstance(m, LAYERS + CELLS)]
    if not recurrent:
        raise HealthError(
            f"through_time: {type(model).__name__} has no recurrent layer or cell of gpugrad.nn"
        )
    with ExitStack() as blocks:
        for path, module in recurrent:
            name = path or type(module).__name__
            if isinstance(module, LAYERS):
                blocks.enter_context(_step_by_step(module, name, found))
            else:
                handle = module.register_forward_hook(_cell_hook(name, found, cells))
                blocks.callback(handle.remove)
        run()
    if not found:
        raise HealthError("through_time: run() called no recurrent layer of this model")
    pieces = [
        Piece(f"{i} {which} {step}", (0,), data)
        for i, sequence in enumerate(found)
        for which, kept in (("hidden", sequence.hidden), ("cell", sequence.cell))
        for step, data in kept.items()
    ]
    norms = {piece.what: float(np.sqrt(numbers[SQUARES])) for piece, numbers in read(pieces)}

    def of(i: int, which: str) -> Norms:
        steps = range(found[i].steps)
        return np.array([norms.get(f"{i} {which} {step}", 0.0) for step in steps])

    return [
        ThroughTime(sequence.layer, of(i, "hidden"), of(i, "cell") if sequence.cell else None)
        for i, sequence in enumerate(found)
    ]


@contextmanager
def _step_by_step(module: Any, name: str, found: list[_Sequence]) -> Iterator[None]:
    """Let a layer run over its sequences one step at a time."""
    whole = module.run

    def run(
        input: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Any, b_hh: Any, *states: Any,
        reverse: bool, **options: Any,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        suffix = next(s for s in module._suffixes if getattr(module, f"weight_ih{s}") is w_ih)
        sequence = _Sequence(f"{name}{suffix}")
        found.append(sequence)
        outputs: dict[int, Tensor] = {}
        steps = input.shape[0]
        for t in reversed(range(steps)) if reverse else range(steps):
            _, *after = whole(
                input[t : t + 1], w_ih, w_hh, b_ih, b_hh, *states, reverse=False, **options
            )
            states = tuple(after[: module.states])
            sequence.watch(t, states)
            outputs[t] = states[0]
        return ops.stack([outputs[t] for t in range(steps)], axis=0), *states

    module.run = run
    try:
        yield
    finally:
        del module.run


def _cell_hook(
    name: str, found: list[_Sequence], cells: dict[int, _Sequence]
) -> Callable[[Any, Any, Any], None]:
    def hook(module: Any, args: Any, out: Any) -> None:
        if id(module) not in cells:
            cells[id(module)] = _Sequence(name)
            found.append(cells[id(module)])
        sequence = cells[id(module)]
        sequence.watch(sequence.steps, out if isinstance(out, tuple) else (out,))

    return hook
