"""Convolution layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import numpy as np

from gpugrad.backend import backend_for_device
from gpugrad.core.tensor import Tensor
from gpugrad.errors import ParameterError, ShapeError
from gpugrad.nn import functional as F
from gpugrad.nn import init
from gpugrad.nn.module import Module, Parameter
from gpugrad.nn.random import Generator
from gpugrad.ops.convolution import check_groups, pads, spread

__all__ = ["Conv1d", "Conv2d", "ConvTranspose1d", "ConvTranspose2d"]


def _zeros(shape: tuple[int, ...], device: str | None, dtype: Any) -> Parameter:
    host = np.zeros(shape, dtype=np.dtype(dtype or "float32"))
    return Parameter(backend_for_device(device or "cpu").asarray(host, device=device))


class _Convolution(Module):
    """What the layers share; they differ in the number of axes."""

    axes: int
    weight: Parameter
    bias: Parameter | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: str | int | tuple[int, ...] = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: str | None = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        layer, axes = type(self).__name__, self.axes
        check_groups(groups, layer)
        if padding_mode != "zeros":
            raise ParameterError(
                f"{layer}: padding_mode={padding_mode!r}; there are zeros only: lengthen the input "
                "with gpugrad.pad, and give padding=0"
            )
        for name, n in (("in_channels", in_channels), ("out_channels", out_channels)):
            if n < 1 or n % groups:
                raise ShapeError(
                    f"{layer}({in_channels}, {out_channels}), groups={groups}: {name} must be 1 or "
                    "more, and divide into the groups"
                )
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = spread(kernel_size, axes, layer, "kernel_size", 1)
        self.stride = spread(stride, axes, layer, "stride", 1)
        self.dilation = spread(dilation, axes, layer, "dilation", 1)
        pads(padding, self.kernel_size, self.stride, self.dilation, layer)
        self.padding = (
            padding if isinstance(padding, str) else spread(padding, axes, layer, "padding", 0)
        )
        self.groups = groups
        self.padding_mode = padding_mode
        self.weight = _zeros((*self._channels(), *self.kernel_size), device, dtype)
        self.bias = _zeros((out_channels,), device, dtype) if bias else None
        self.reset_parameters()

    def _channels(self) -> tuple[int, int]:
        """The first two axes of the weight."""
        return self.out_channels, self.in_channels // self.groups

    def reset_parameters(self, generator: Generator | None = None) -> None:
        """Draw weight and bias anew: uniform within ±1/√(weights per output), as in PyTorch."""
        init.kaiming_uniform_(self.weight, a=math.sqrt(5), generator=generator)
        if self.bias is not None:
            bound = 1 / math.sqrt(math.prod(self.weight.shape[1:]))
            init.uniform_(self.bias, -bound, bound, generator)

    def _check(self, input: Tensor) -> None:
        channels = input.shape[-1 - self.axes] if input.ndim > self.axes else 0
        if channels != self.in_channels:
            raise ShapeError(
                f"input of shape {input.shape} has {channels} channels, the layer takes "
                f"{self.in_channels}; give the layer before it {self.in_channels} channels, or "
                f"make this one {type(self).__name__}({channels}, {self.out_channels}, …)"
            )

    def forward(self, input: Tensor, activation: str | None = None) -> Tensor:
        self._check(input)
        convolve = F.conv1d if self.axes == 1 else F.conv2d
        return convolve(  # type: ignore[no-any-return]
            input, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups,
            activation=activation,
        )  # fmt: skip

    def extra_repr(self) -> str:
        parts = [f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
                 f"stride={self.stride}"]  # fmt: skip
        usual = (1,) * self.axes
        if self.padding != (0,) * self.axes:
            parts.append(f"padding={self.padding}")
        if self.dilation != usual:
            parts.append(f"dilation={self.dilation}")
        if self.groups != 1:
            parts.append(f"groups={self.groups}")
        if self.bias is None:
            parts.append("bias=False")
        return ", ".join(parts)

    def label(self) -> str:
        return f"{type(self).__name__} {self.in_channels}->{self.out_channels}"


class Conv1d(_Convolution):
    """Slides `kernel_size` weights per channel along one axis: (N, C, L) to (N, O, places).

    Options and initial values are those of :class:`Conv2d`.

    >>> import gpugrad as gg
    >>> Conv1d(3, 8, 5, padding="same")(gg.zeros((2, 3, 20), dtype="float32")).shape
    (2, 8, 20)
    """

    axes = 1


class Conv2d(_Convolution):
    """Slides a window of weights over planes: (N, C, H, W) to (N, O, places, places).

    The weight has the shape (out_channels, in_channels/groups, \\*kernel_size). It and the bias
    start uniform within ±1/√(weights per output), as in PyTorch. `stride`, `padding`, `dilation`
    and `groups` are those of :func:`gpugrad.nn.functional.conv2d`. PyTorch's `padding_mode` is
    `"zeros"`; others raise ParameterError.

    >>> import gpugrad as gg
    >>> Conv2d(3, 8, 3, stride=2, padding=1)(gg.zeros((2, 3, 9, 9), dtype="float32")).shape
    (2, 8, 5, 5)
    """

    axes = 2


class _Transpose(_Convolution):
    """What the transposed layers share."""

    output_padding: tuple[int, ...]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: int | tuple[int, ...] = 0,
        output_padding: int | tuple[int, ...] = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: int | tuple[int, ...] = 1,
        padding_mode: str = "zeros",
        device: str | None = None,
        dtype: Any = None,
    ) -> None:
        if isinstance(padding, str):
            raise ParameterError(
                f"{type(self).__name__}: padding={padding!r}; a transposed convolution takes "
                "numbers of places"
            )
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
            padding_mode, device, dtype,
        )  # fmt: skip
        self.output_padding = spread(
            output_padding, self.axes, type(self).__name__, "output_padding", 0
        )

    def _channels(self) -> tuple[int, int]:
        return self.in_channels, self.out_channels // self.groups

    def forward(  # type: ignore[override]
        self, input: Tensor, output_size: Sequence[int] | None = None
    ) -> Tensor:
        self._check(input)
        convolve = F.conv_transpose1d if self.axes == 1 else F.conv_transpose2d
        more = self._more(input, output_size)
        return convolve(  # type: ignore[no-any-return]
            input, self.weight, self.bias, self.stride, self.padding, more, self.groups,
            self.dilation,
        )  # fmt: skip

    def _more(self, input: Tensor, output_size: Sequence[int] | None) -> tuple[int, ...]:
        """The output padding that gives this size."""
        if output_size is None:
            return self.output_padding
        wanted, padding = tuple(output_size)[-self.axes :], cast("tuple[int, ...]", self.padding)
        sizes = zip(
            input.shape[-self.axes :], self.stride, padding, self.dilation, self.kernel_size
        )
        least = tuple((n - 1) * s - 2 * p + d * (k - 1) + 1 for n, s, p, d, k in sizes)
        more = tuple(w - n for w, n in zip(wanted, least))
        most = tuple(max(s, d) - 1 for s, d in zip(self.stride, self.dilation))
        if len(wanted) != self.axes or not all(0 <= x <= top for x, top in zip(more, most)):
            greatest = tuple(n + top for n, top in zip(least, most))
            raise ShapeError(
                f"output_size={tuple(output_size)} cannot be reached from an input of shape "
                f"{input.shape}; sizes from {least} to {greatest} can"
            )
        return more

    def extra_repr(self) -> str:
        text = super().extra_repr()
        more = self.output_padding
        return f"{text}, output_padding={more}" if any(more) else text


class ConvTranspose1d(_Transpose):
    """The transpose of :class:`Conv1d`: (N, C, L) to (N, O, places).

    Options and initial values are those of :class:`ConvTranspose2d`.

    >>> import gpugrad as gg
    >>> ConvTranspose1d(8, 3, 4, stride=2, padding=1)(gg.zeros((2, 8, 10), dtype="float32")).shape
    (2, 3, 20)
    """

    axes = 1


class ConvTranspose2d(_Transpose):
    """The transpose of :class:`Conv2d`, which enlarges planes: (N, C, H, W) to (N, O, …, …).

    The weight has the shape (in_channels, out_channels/groups, \\*kernel_size). Initial values and
    options are PyTorch's; `stride`, `padding`, `output_padding`, `groups` and `dilation` are those
    of :func:`gpugrad.nn.functional.conv_transpose2d`. Called with an `output_size`, (H, W), it adds
    the output padding that leads there, and raises ShapeError where none does.

    >>> import gpugrad as gg
    >>> layer = ConvTranspose2d(8, 3, 3, stride=2, padding=1)
    >>> x = gg.zeros((2, 8, 5, 5), dtype="float32")
    >>> layer(x).shape, layer(x, output_size=(10, 10)).shape
    ((2, 3, 9, 9), (2, 3, 10, 10))
    """

    axes = 2
