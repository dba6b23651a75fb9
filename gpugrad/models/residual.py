"""Residual nets for small pictures."""

from __future__ import annotations

from typing import Any

from gpugrad import nn
from gpugrad.core.tensor import Tensor
from gpugrad.errors import ParameterError
from gpugrad.models.convolutional import as_pictures
from gpugrad.nn import functional as F

__all__ = ["ResNet"]


class Block(nn.Module):
    """Two convolutions of 3×3 beside a short cut, which carries what they change."""

    def __init__(self, inputs: int, outputs: int, stride: int, dtype: Any = None) -> None:
        super().__init__()
        options: dict[str, Any] = {"padding": 1, "bias": False, "dtype": dtype}
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, **options)
        self.bn1 = nn.BatchNorm2d(outputs, dtype=dtype)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, **options)
        self.bn2 = nn.BatchNorm2d(outputs, dtype=dtype)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False, dtype=dtype),
                nn.BatchNorm2d(outputs, dtype=dtype),
            )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.downsample(x))


class ResNet(nn.Module):
    """The residual net for CIFAR of He et al. (arXiv:1512.03385), of 6n + 2 layers.

    Three stages of n blocks; the second and the third halve the pictures and double the channels.

    Parameters
    ----------
    channels, classes:
        Of a picture, and scores.
    layers:
        20, 32, 44, 56, 110, …: 6n + 2. ParameterError for other numbers.
    width:
        Channels of the first stage.
    checkpoint:
        Compute the blocks again on the way back instead of keeping what is in them.

    >>> import gpugrad as gg
    >>> ResNet(1, 10, layers=8, width=4)(gg.ones((2, 1, 8, 8), dtype="float32")).shape
    (2, 10)
    """

    def __init__(
        self,
        channels: int,
        classes: int,
        layers: int = 20,
        width: int = 16,
        checkpoint: bool = False,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if layers < 8 or (layers - 2) % 6:
            raise ParameterError(
                f"ResNet: {layers} layers; there are nets of 6n + 2, such as 8, 20, 32, 44 or 56"
            )
        self.channels = channels
        self.checkpoint = checkpoint
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1, bias=False, dtype=dtype)
        self.bn1 = nn.BatchNorm2d(width, dtype=dtype)
        blocks: list[nn.Module] = []
        inputs = width
        for stage in range(3):
            outputs = width << stage
            for block in range((layers - 2) // 6):
                stride = 2 if stage and not block else 1
                blocks.append(Block(inputs, outputs, stride, dtype))
                inputs = outputs
        self.blocks = nn.ModuleList(blocks)
        self.fc = nn.Linear(inputs, classes, dtype=dtype)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = F.relu(self.bn1(self.conv1(as_pictures(x, self.channels))))
        for block in self.blocks:
            y = nn.utils.checkpoint(block, y) if self.checkpoint else block(y)
        y = F.adaptive_avg_pool2d(y, 1)
        return self.fc(y.reshape(y.shape[:2]))  # type: ignore[no-any-return]
