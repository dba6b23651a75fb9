"""The multilayer perceptron."""

from __future__ import annotations

from typing import Any

from gpugrad import nn
from gpugrad.models.activations import activation as make_activation
from gpugrad.models.activations import gain_of

__all__ = ["MLP"]


class MLP(nn.Sequential):
    """Layers of one width, each followed by an activation, and a last one for the scores.

    Parameters
    ----------
    features, classes:
        Elements of an example, whatever its shape, and scores.
    width, depth:
        Units of a hidden layer, and how many there are.
    activation:
        A name of :data:`gpugrad.models.activations.ACTIVATIONS`.
    norm:
        Layer normalisation before each activation.
    dropout:
        The share of hidden units that is dropped in training.
    residual:
        A way around each hidden layer but the first.

    Weights start normally distributed with the variance that keeps the signal's size (He et al.,
    arXiv:1502.01852), biases at zero.

    >>> import gpugrad as gg
    >>> MLP(64, 10, width=32, depth=2)(gg.ones((5, 8, 8), dtype="float32")).shape
    (5, 10)
    """

    def __init__(
        self,
        features: int,
        classes: int,
        width: int = 256,
        depth: int = 3,
        activation: str = "relu",
        norm: bool = False,
        dropout: float = 0.0,
        residual: bool = False,
        dtype: Any = None,
    ) -> None:
        super().__init__(nn.Flatten())
        for i in range(depth):
            block: list[nn.Module] = [_linear(features, width, activation, dtype)]
            if norm:
                block.append(nn.LayerNorm(width, dtype=dtype))
            block.append(make_activation(activation))
            if dropout:
                block.append(nn.Dropout(dropout))
            self.extend([nn.Residual(*block)] if residual and i else block)
            features = width
        self.append(_linear(features, classes, activation, dtype))


def _linear(features: int, outputs: int, activation: str, dtype: Any) -> nn.Linear:
    # The layer's own start shrinks the signal by √6 a layer, which trains worse on small data.
    layer = nn.Linear(features, outputs, dtype=dtype)
    nn.init.kaiming_normal_(layer.weight, nonlinearity=gain_of(activation))
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer
