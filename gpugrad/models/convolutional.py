"""A small convolutional net for small pictures."""

from __future__ import annotations

from typing import Any

from gpugrad import nn
from gpugrad.core.tensor import Tensor
from gpugrad.errors import ShapeError
from gpugrad.models.activations import activation as make_activation

__all__ = ["CNN", "as_pictures"]


class CNN(nn.Module):
    """Two convolutions of 3×3, each with normalisation and a pool of 2×2, and two layers.

    Parameters
    ----------
    channels, height, width:
        Of a picture; at least 4 pixels on each side.
    classes:
        Scores.
    features:
        Channels of the first convolution; the second has twice as many.
    hidden:
        Units of the hidden layer.
    norm:
        Batch normalisation behind each convolution (Ioffe and Szegedy, arXiv:1502.03167).
    dropout:
        The share of what comes out of the last pool that is dropped in training.

    Takes pictures of shape [N, channels, height, width], or [N, height, width] for one channel.

    >>> import gpugrad as gg
    >>> CNN(1, 28, 28, 10)(gg.ones((5, 28, 28), dtype="float32")).shape
    (5, 10)
    """

    def __init__(
        self,
        channels: int,
        height: int,
        width: int,
        classes: int,
        features: int = 32,
        hidden: int = 128,
        activation: str = "relu",
        norm: bool = True,
        dropout: float = 0.25,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if height < 4 or width < 4:
            raise ShapeError(
                f"CNN: pictures of {height}×{width} pixels are halved twice; they need 4 on each "
                "side"
            )
        self.channels = channels
        blocks: list[nn.Module] = []
        for inputs, outputs in ((channels, features), (features, 2 * features)):
            blocks.append(nn.Conv2d(inputs, outputs, 3, padding=1, bias=not norm, dtype=dtype))
            if norm:
                blocks.append(nn.BatchNorm2d(outputs, dtype=dtype))
            blocks += [make_activation(activation), nn.MaxPool2d(2)]
        self.features = nn.Sequential(*blocks)
        self.classifier = nn.Sequential(
            nn.Flatten(),
            nn.Dropout(dropout),
            nn.Linear(2 * features * (height // 4) * (width // 4), hidden, dtype=dtype),
            make_activation(activation),
            nn.Linear(hidden, classes, dtype=dtype),
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.classifier(self.features(as_pictures(x, self.channels)))
        return y


def as_pictures(x: Tensor, channels: int) -> Tensor:
    """Pictures of one channel with an axis for it."""
    return x.reshape((x.shape[0], 1, *x.shape[1:])) if x.ndim == 3 and channels == 1 else x
