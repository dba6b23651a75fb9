"""Recurrent layers over sequences, and their cells for a single step."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, ClassVar

from gpugrad import ops
from gpugrad.core.tensor import Tensor
from gpugrad.errors import ParameterError, ShapeError
from gpugrad.nn import functional as F
from gpugrad.nn import init
from gpugrad.nn.module import Module, Parameter
from gpugrad.nn.random import Generator

__all__ = ["GRU", "LSTM", "RNN", "GRUCell", "LSTMCell", "RNNCell"]

#: The parameters of one layer in one direction, in their order; those after the second are biases.
NAMES = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


def _parameter(shape: tuple[int, ...], device: str | None, dtype: Any) -> Parameter:
    return Parameter(ops.zeros(shape, dtype=dtype or "float32", device=device))


class _Weights(Module):
    """Holds weights whose initial values depend on the number of hidden units alone."""

    hidden_size: int

    def _check_sizes(self, input_size: int, hidden_size: int) -> None:
        if input_size < 1 or hidden_size < 1:
            raise ShapeError(
                f"{type(self).__name__}({input_size}, {hidden_size}): at least 1 feature and 1 "
                "hidden unit are needed"
            )

    def reset_parameters(self, generator: Generator | None = None) -> None:
        """Draw every weight and bias anew, uniform within ±1/√hidden_size."""
        bound = 1 / math.sqrt(self.hidden_size)
        for p in self.parameters():
            init.uniform_(p, -bound, bound, generator)


def _expected(what: str, came: Tensor, wanted: str, fix: str) -> ShapeError:
    return ShapeError(f"{what} of shape {came.shape}, expected {wanted}; {fix}")


# -- layers over sequences ------------------------------------------------------------------------


class _Recurrent(_Weights):
    """Layers above each other, each in one or two directions."""

    gates: ClassVar[int]

    #: What runs one layer in one direction, and how many states it starts from and ends in.
    run: ClassVar[Callable[..., Any]]
    states: ClassVar[int] = 1

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: str | None = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        self._check_sizes(input_size, hidden_size)
        if num_layers < 1:
            raise ParameterError(f"{name}: num_layers={num_layers}; at least 1 layer is needed")
        if isinstance(dropout, bool) or not 0 <= dropout <= 1:
            raise ParameterError(f"{name}: dropout={dropout} is a probability, from 0 to 1")
        if dropout and num_layers == 1:
            warnings.warn(
                f"{name}: dropout={dropout} follows every layer but the last, and there is only "
                "one; add layers, or put a Dropout behind this one",
                stacklevel=3,
            )
        if proj_size:
            raise ParameterError(
                f"{name}: proj_size={proj_size}; hidden states are not projected here: put a "
                "Linear behind the layer, or make the hidden state smaller"
            )
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.bias = bias
        self.batch_first = batch_first
        self.dropout = float(dropout)
        self.bidirectional = bidirectional
        self.proj_size = proj_size
        self._suffixes = [
            f"_l{layer}{direction}"
            for layer in range(num_layers)
            for direction in ("", "_reverse")[: 1 + bidirectional]
        ]
        rows = self.gates * hidden_size
        for k, suffix in enumerate(self._suffixes):
            above = k >= 1 + bidirectional
            features = hidden_size * (1 + bidirectional) if above else input_size
            shapes = (rows, features), (rows, hidden_size), (rows,), (rows,)
            for parameter, shape in list(zip(NAMES, shapes))[: 4 if bias else 2]:
                setattr(self, parameter + suffix, _parameter(shape, device, dtype))
        self.reset_parameters()

    @property
    def all_weights(self) -> list[list[Parameter]]:
        """The parameters of every layer and direction, in the order of the hidden states."""
        return [
            [getattr(self, name + suffix) for name in NAMES[: 4 if self.bias else 2]]
            for suffix in self._suffixes
        ]

    def flatten_parameters(self) -> None:
        """Nothing: it is here because code that was written for PyTorch calls it."""

    def _options(self) -> dict[str, Any]:
        """What `run` is told beside its operands."""
        return {}

    def _run(
        self, input: Tensor, given: tuple[Tensor | None, ...]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The output, and the last states, of an input and the first states."""
        batched = self._check_input(input)
        if not batched:
            input = ops.expand_dims(input, axis=1)
        elif self.batch_first:
            input = ops.permute_dims(input, (1, 0, 2))
        batch = input.shape[1]
        first = [self._check_state(s, what, batch, batched) for s, what in zip(given, ("h0", "c0"))]
        directions = 1 + self.bidirectional
        last: list[Any] = []
        for layer in range(self.num_layers):
            if layer and self.dropout:
                input = F.dropout(input, self.dropout, self.training)
            outputs = []
            for direction in range(directions):
                k = layer * directions + direction
                weights = (*self.all_weights[k], None, None)[:4]
                states = (None if s is None else s[k] for s in first)
                output, *found = self.run(
                    input, *weights, *states, reverse=bool(direction), **self._options()
                )
                outputs.append(output)
                last.append(found[: self.states])
            input = outputs[0] if directions == 1 else ops.concat(outputs, axis=-1)
        # What is alone is seen with an axis more; nothing is copied.
        after = tuple(
            ops.stack(s, axis=0) if len(s) > 1 else ops.expand_dims(s[0], axis=0)
            for s in zip(*last)
        )
        if not batched:
            return ops.squeeze(input, axis=1), tuple(ops.squeeze(s, axis=1) for s in after)
        return ops.permute_dims(input, (1, 0, 2)) if self.batch_first else input, after

    def _check_input(self, input: Tensor) -> bool:
        """Whether the input is a batch of sequences, and not a single one."""
        axes = "(batch, steps, features)" if self.batch_first else "(steps, batch, features)"
        if input.ndim not in (2, 3):
            raise _expected("input", input, f"{axes}, or (steps, features)", "reshape it")
        if input.shape[-1] != self.input_size:
            raise ShapeError(
                f"input has {input.shape[-1]} features (shape {input.shape}), the layer takes "
                f"{self.input_size}; give the layer before it {self.input_size} outputs, or make "
                f"this one {type(self).__name__}({input.shape[-1]}, {self.hidden_size})"
            )
        if input.shape[1 if self.batch_first and input.ndim == 3 else 0] == 0:
            raise ShapeError(
                f"input of shape {input.shape} has no steps, and so there is no last state; leave "
                "empty sequences out"
            )
        return input.ndim == 3

    def _check_state(
        self, state: Tensor | None, what: str, batch: int, batched: bool
    ) -> Tensor | None:
        """A first state with an axis for the batch, if one is given."""
        if state is None:
            return None
        layers, hidden = len(self._suffixes), self.hidden_size
        wanted = (layers, batch, hidden) if batched else (layers, hidden)
        if state.shape != wanted:
            raise _expected(
                what, state, str(wanted),
                "it holds the layers' states one after the other (with two directions two each), "
                "and has a batch axis where the input has one",
            )  # fmt: skip
        return state if batched else ops.expand_dims(state, axis=1)

    def extra_repr(self) -> str:
        text = f"{self.input_size}, {self.hidden_size}"
        defaults = {
            "num_layers": 1, "bias": True, "batch_first": False, "dropout": 0.0,
            "bidirectional": False,
        }  # fmt: skip
        changed = {k: v for k, d in defaults.items() if (v := getattr(self, k)) != d}
        return ", ".join([text, *(f"{k}={v}" for k, v in changed.items())])

    def label(self) -> str:
        return f"{type(self).__name__} {self.input_size}->{self.hidden_size}"


class RNN(_Recurrent):
    """Plain recurrent layers: the state becomes tanh(W_ih·x + b_ih + W_hh·h + b_hh) at each step.

    Parameters are those of PyTorch, in name, order and initial distribution: uniform within
    ±1/√hidden_size. Elman, "Finding structure in time" (1990).

    Parameters
    ----------
    input_size, hidden_size:
        Features of the input at a step, and units of every layer.
    num_layers:
        Layers above each other, each running over what the one before it returns.
    nonlinearity:
        ``"tanh"`` or ``"relu"``.
    bias:
        Whether there are biases.
    batch_first:
        Whether the batch is the first axis of input and output, and not the second; states are not
        affected.
    dropout:
        The probability of a :class:`Dropout` between layers.
    bidirectional:
        Whether each layer also runs from the last step to the first; the outputs of both stand
        beside each other.

    Called with an input of shape (steps, batch, input_size), or (steps, input_size) for a single
    sequence, and the first states, (layers x directions, batch, hidden_size), by default zeros. It
    returns the last layer's states at all steps, (steps, batch, directions x hidden_size), and the
    last states of all layers. Raises ShapeError for shapes that do not fit and for no steps.

    >>> import gpugrad as gg
    >>> output, last = RNN(4, 5, num_layers=2)(gg.zeros((7, 3, 4), dtype="float32"))
    >>> output.shape, last.shape
    ((7, 3, 5), (2, 3, 5))
    """

    gates = 1
    run = staticmethod(ops.rnn_layer)

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: str | None = None,
        dtype: Any = None,
    ) -> None:
        _check_nonlinearity("RNN", nonlinearity)
        self.nonlinearity = nonlinearity
        super().__init__(
            input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional,
            device=device, dtype=dtype,
        )  # fmt: skip

    def _options(self) -> dict[str, Any]:
        return {"nonlinearity": self.nonlinearity}

    def forward(self, input: Tensor, hx: Tensor | None = None) -> tuple[Tensor, Tensor]:
        output, (last,) = self._run(input, (hx,))
        return output, last


class GRU(_Recurrent):
    """Gated recurrent units: two gates decide how much of the state is kept, and what is read.

    Arguments, parameters, input and results are those of :class:`RNN`, but for `nonlinearity`; the
    rows of the weights are reset gate, update gate and candidate. Cho et al., arXiv:1406.1078.

    >>> import gpugrad as gg
    >>> output, last = GRU(4, 5, bidirectional=True)(gg.zeros((7, 3, 4), dtype="float32"))
    >>> output.shape, last.shape
    ((7, 3, 10), (2, 3, 5))
    """

    gates = 3
    run = staticmethod(ops.gru_layer)

    def forward(self, input: Tensor, hx: Tensor | None = None) -> tuple[Tensor, Tensor]:
        output, (last,) = self._run(input, (hx,))
        return output, last


class LSTM(_Recurrent):
    """Long short-term memory: beside the hidden state a cell, which gates let in, keep and let out.

    Arguments, parameters and input are those of :class:`RNN`, but for `nonlinearity`; the rows of
    the weights are input gate, forget gate, candidate and output gate. First and last states are
    pairs, of hidden and cell states. PyTorch's `proj_size` is refused with ParameterError.
    Hochreiter and Schmidhuber (1997); Gers et al. (2000).

    >>> import gpugrad as gg
    >>> layer = LSTM(4, 5, batch_first=True)
    >>> output, (hidden, cell) = layer(gg.zeros((3, 7, 4), dtype="float32"))
    >>> output.shape, hidden.shape, cell.shape
    ((3, 7, 5), (1, 3, 5), (1, 3, 5))
    """

    gates = 4
    states = 2
    run = staticmethod(ops.lstm_layer)

    def forward(
        self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        output, (hidden, cell) = self._run(input, _pair(hx))
        return output, (hidden, cell)


def _pair(hx: Any) -> tuple[Tensor | None, Tensor | None]:
    if hx is None:
        return None, None
    if not isinstance(hx, tuple | list) or len(hx) != 2:
        came = f"{len(hx)} of them" if isinstance(hx, tuple | list) else type(hx).__name__
        raise ParameterError(f"hx is a pair (hidden state, cell state), not {came}")
    return hx[0], hx[1]


def _check_nonlinearity(name: str, nonlinearity: str) -> None:
    if nonlinearity not in ("tanh", "relu"):
        raise ParameterError(f"{name}: nonlinearity={nonlinearity!r}; it is 'tanh' or 'relu'")


# -- cells ----------------------------------------------------------------------------------------


class _Cell(_Weights):
    """A layer that makes a single step: a sequence of one."""

    gates: ClassVar[int]
    run: ClassVar[Callable[..., Any]]
    bias_ih: Parameter | None
    bias_hh: Parameter | None

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: str | None = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self._check_sizes(input_size, hidden_size)
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.bias = bias
        rows = self.gates * hidden_size
        self.weight_ih = _parameter((rows, input_size), device, dtype)
        self.weight_hh = _parameter((rows, hidden_size), device, dtype)
        self.bias_ih = _parameter((rows,), device, dtype) if bias else None
        self.bias_hh = _parameter((rows,), device, dtype) if bias else None
        self.reset_parameters()

    def _options(self) -> dict[str, Any]:
        return {}

    def _run(self, input: Tensor, given: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
        """The states after the step."""
        if input.ndim not in (1, 2) or input.shape[-1] != self.input_size:
            raise _expected(
                "input", input, f"(batch, {self.input_size}) or ({self.input_size},)",
                "reshape it, or change the cell's input_size",
            )  # fmt: skip
        batched = input.ndim == 2
        shape = (*input.shape[:-1], self.hidden_size)
        states = []
        for state, what in zip(given, ("hx", "cx")):
            if state is not None and state.shape != shape:
                raise _expected(what, state, str(shape), "it has a row for each of the input's")
            states.append(state if state is None or batched else ops.expand_dims(state, axis=0))
        rows = input if batched else ops.expand_dims(input, axis=0)
        _, *found = self.run(
            ops.expand_dims(rows, axis=0), self.weight_ih, self.weight_hh, self.bias_ih,
            self.bias_hh, *states, **self._options(),
        )  # fmt: skip
        after = found[: len(given)]
        return tuple(after if batched else (ops.squeeze(s, axis=0) for s in after))

    def extra_repr(self) -> str:
        return f"{self.input_size}, {self.hidden_size}" + ", bias=False" * (not self.bias)

    def label(self) -> str:
        return f"{type(self).__name__} {self.input_size}->{self.hidden_size}"


class RNNCell(_Cell):
    """One step of an :class:`RNN`: from an input and a state to the next state.

    Called with an input of shape (batch, input_size), or (input_size,), and a state, (batch,
    hidden_size), by default zeros; returns the next state.

    >>> import gpugrad as gg
    >>> RNNCell(4, 5, nonlinearity="relu")(gg.zeros((3, 4), dtype="float32")).shape
    (3, 5)
    """

    gates = 1
    run = staticmethod(ops.rnn_layer)

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        device: str | None = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, device, dtype)
        _check_nonlinearity("RNNCell", nonlinearity)
        self.nonlinearity = nonlinearity

    def _options(self) -> dict[str, Any]:
        return {"nonlinearity": self.nonlinearity}

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        return self._run(input, (hx,))[0]

    def extra_repr(self) -> str:
        kind = "" if self.nonlinearity == "tanh" else f", nonlinearity={self.nonlinearity}"
        return super().extra_repr() + kind


class GRUCell(_Cell):
    """One step of a :class:`GRU`; called as :class:`RNNCell` is.

    >>> import gpugrad as gg
    >>> GRUCell(4, 5)(gg.zeros(4, dtype="float32"), gg.zeros(5, dtype="float32")).shape
    (5,)
    """

    gates = 3
    run = staticmethod(ops.gru_layer)

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        return self._run(input, (hx,))[0]


class LSTMCell(_Cell):
    """One step of an :class:`LSTM`: called as :class:`RNNCell` is, but that states are pairs.

    >>> import gpugrad as gg
    >>> hidden, cell = LSTMCell(4, 5)(gg.zeros((3, 4), dtype="float32"))
    >>> hidden.shape, cell.shape
    ((3, 5), (3, 5))
    """

    gates = 4
    run = staticmethod(ops.lstm_layer)

    def forward(
        self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        hidden, cell = self._run(input, _pair(hx))
        return hidden, cell
