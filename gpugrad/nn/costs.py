"""What operations cost: multiply-adds of products, and operations on single elements.

A product of matrices, a convolution, attention and a recurrent layer count their multiply-adds, of
which each is two floating-point operations. What the other operations do to an element is a small
number, fixed in the tables below: 1 if an operation is in none. Moving data costs nothing, and
neither does a conversion. Masks take nothing off: attention counts every pair of positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from gpugrad.core.primitive import Primitive

__all__ = ["Cost", "cost_of"]


class Cost(NamedTuple):
    """What one call costs.

    Attributes
    ----------
    multiply_adds:
        Of products.
    elements:
        Operations on single elements, without those of `activation`.
    activation:
        Operations of an activation that is computed together with something else.
    """

    multiply_adds: int = 0
    elements: int = 0
    activation: int = 0

    @property
    def flops(self) -> int:
        """Floating-point operations: two for each multiply-add, one for each of the others."""
        return 2 * self.multiply_adds + self.elements + self.activation

    def __add__(self, other: tuple[Any, ...]) -> Cost:
        return Cost(*(a + b for a, b in zip(self, other)))


Count = Callable[[Sequence[Any], Mapping[str, Any], Any], Cost]

# -- operations on single elements ----------------------------------------------------------------

#: Greatest element, difference, exponential, sum, quotient.
SOFTMAX = 5

#: Mean, difference, square and sum.
_MOMENTS = 4

#: Operations on each element of the first operand; the number after the last is what they do.
_PER_ELEMENT: dict[str, int] = {
    **dict.fromkeys(("sum", "mean", "sum_to", "max", "min", "argmax", "argmin", "prod", "any",
                     "all", "count_nonzero", "cumulative_sum", "cumulative_prod"), 1),
    **dict.fromkeys(("softmax", "log_softmax", "logsumexp", "class_cross_entropy"), SOFTMAX),
    **dict.fromkeys(("var", "std", "batch_moments"), _MOMENTS),
    # The moments, whose difference is used again; scale, weight and bias.
    **dict.fromkeys(("layer_norm", "group_norm"), _MOMENTS + 3),
    **dict.fromkeys(("add_layer_norm", "add_group_norm"), _MOMENTS + 4),
    # Difference, scale, weight and bias; the moments are known.
    **dict.fromkeys(("batch_norm_training", "batch_norm_inference"), 4),
    # Square, sum, scale and weight.
    "rms_norm": 4,
    "add_rms_norm": 5,
}  # fmt: skip

#: Operations that move elements, convert them, or look some up.
_MOVING = frozenset({
    "argsort", "cast", "concatenate", "copy", "embedding", "gather", "getitem", "max_pool_indices",
    "nonzero", "put_index", "roll", "scatter_add", "scatter_add_along_axis", "searchsorted",
    "stacked", "to_device", "tril", "triu",
})  # fmt: skip


def _size(x: Any) -> int:
    return math.prod(getattr(x, "shape", ()))


def _window(operands: Sequence[Any], options: Mapping[str, Any], y: Any) -> Cost:
    return Cost(elements=_size(y) * math.prod(options["kernel"]))


def _bias_activation(operands: Sequence[Any], options: Mapping[str, Any], y: Any) -> Cost:
    return Cost(elements=_size(y), activation=_size(y))


def _bias_activation_dropout(operands: Sequence[Any], options: Mapping[str, Any], y: Any) -> Cost:
    _, bias, residual = operands
    parts = (bias is not None) + (options["p"] > 0) + (residual is not None)
    activated = options["activation"] is not None
    return Cost(elements=parts * _size(y), activation=activated * _size(y))


# -- products -------------------------------------------------------------------------------------


def _matmul(operands: Sequence[Any], options: Mapping[str, Any], y: Any) -> Cost:
    return Cost(_size(y) * operands[0].shape[-1])


def _tensordot(operands: Sequence[Any], options: Mapping[str, Any], y: Any) -> Cost:
    shape, axes = operands[0].shape, options["axes"]
    summed = shape[len(shape) - axes :] if isinstance(axes, int) else [shape[i] for i in axes[0]]
    return Cost(_size(y) * math.prod(summed))


def _layer(operands: Sequence[Any], options: Mapping[str, Any], y: Any) -> Cost:
    """A product with a weight of which each output has a row, bias, and maybe an activation."""
    _, weight, bias = operands
    biased, activated = bias is not None, options.get("activation") is not None
    return Cost(
        _size(y) * math.prod(weight.shape[1:]), biased * _size(y), activated * _size(y)
    )  # fmt: skip


def _transposed(operands: Sequence[Any], options: Mapping[str, Any], y: Any) -> Cost:
    """Each element of the input is multiplied by the weights that lead from its channel."""
    x, weight, bias = operands
    return Cost(_size(x) * math.prod(weight.shape[1:]), (bias is not None) * _size(y))


def _attention(operands: Sequence[Any], options: Mapping[str, Any], y: Any) -> Cost:
    query, key, value = (x.shape for x in operands[:3])
    scores = math.prod(y.shape[:-1]) * key[-2]
    return Cost(scores * (query[-1] + value[-1]), SOFTMAX * scores)


def _packed_attention(operands: Sequence[Any], options: Mapping[str, Any], y: Any) -> Cost:
    length = y.shape[-2]
    return Cost(
        2 * _size(y) * length, SOFTMAX * math.prod(y.shape[:-1]) * options["heads"] * length
    )


def _recurrent(own: int) -> Count:
    """A layer whose cell does `own` operations on a unit besides those of its gates.

    A gate adds its products and biases, and has one function.
    """

    def count(operands: Sequence[Any], options: Mapping[str, Any], y: Any) -> Cost:
        x, _, weight_hh, *biases = operands[:5]
        steps, batch, features = x.shape
        rows, hidden = weight_hh.shape
        gates = rows * (2 + sum(b is not None for b in biases))
        return Cost(
            steps * batch * rows * (features + hidden), steps * batch * (gates + own * hidden)
        )

    return count


_COUNTS: dict[str, Count] = {
    "matmul": _matmul,
    "tensordot": _tensordot,
    "linear": _layer,
    "linear_activation": _layer,
    "convolution": _layer,
    "transposed_convolution": _transposed,
    "attention": _attention,
    "packed_attention": _packed_attention,
    "rnn_layer": _recurrent(0),
    "lstm_layer": _recurrent(5),  # f·c + i·g; o·tanh(c)
    "gru_layer": _recurrent(5),  # r times a product; (1 - z)·n + z·h
    "max_pool": _window,
    "window_mean": _window,
    "bias_activation": _bias_activation,
    "bias_activation_dropout": _bias_activation_dropout,
}


def cost_of(
    made: Primitive, operands: Sequence[Any], parameters: Mapping[str, Any], results: Sequence[Any]
) -> Cost:
    """What one call of a primitive costs, from the shapes of its operands and results.

    >>> import gpugrad as gg
    >>> from gpugrad.core.primitive import registry
    >>> a, b = gg.ones((2, 3)), gg.ones((3, 4))
    >>> cost_of(registry["matmul"], (a, b), {}, (a @ b,)).flops
    48
    """
    name = made.name
    if (made.view and name != "sum_to") or name in _MOVING:
        return Cost()
    if name in _PER_ELEMENT:
        return Cost(elements=_PER_ELEMENT[name] * _size(operands[0]))
    if name in _COUNTS:
        return _COUNTS[name](operands, parameters, results[0])
    return Cost(elements=_size(results[0]) if results else 0)
