"""Normalisation layers: over features, groups of channels, or the batch."""

from __future__ import annotations

from typing import Any, ClassVar

from gpugrad import ops
from gpugrad.core.modes import no_grad
from gpugrad.core.tensor import Tensor
from gpugrad.errors import ParameterError, ShapeError
from gpugrad.nn import functional as F
from gpugrad.nn import init
from gpugrad.nn.module import Module, Parameter, write

__all__ = ["BatchNorm1d", "BatchNorm2d", "GroupNorm", "LayerNorm", "RMSNorm"]


class _Affine(Module):
    """Holds weight and bias, ones and zeros in the beginning, or None."""

    weight: Parameter | None
    bias: Parameter | None

    def _make(
        self, shape: tuple[int, ...], weight: bool, bias: bool, device: str | None, dtype: Any
    ) -> None:
        def parameter(wanted: bool) -> Parameter | None:
            like = {"dtype": dtype or "float32", "device": device}
            return Parameter(ops.ones(shape, **like)) if wanted else None

        self.weight = parameter(weight)
        self.bias = parameter(weight and bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the weight to ones and the bias to zeros."""
        if self.weight is not None:
            init.ones_(self.weight)
        if self.bias is not None:
            init.zeros_(self.bias)


def _shape(layer: str, normalized_shape: Any) -> tuple[int, ...]:
    shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
    if not shape:
        raise ShapeError(f"{layer}: normalized_shape is empty; give the sizes of the last axes")
    return shape


class LayerNorm(_Affine):
    """Brings the last axes, of shape `normalized_shape`, to mean 0 and variance 1 together.

    Then multiplies by the weight and adds the bias, one element for each place in these axes. Ba et
    al., arXiv:1607.06450.

    >>> import gpugrad as gg
    >>> LayerNorm(2, eps=0.0)(gg.tensor([[1.0, 3.0]], dtype="float32")).tolist()
    [[-1.0, 1.0]]
    """

    def __init__(
        self,
        normalized_shape: Any,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: str | None = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.normalized_shape = _shape("LayerNorm", normalized_shape)
        self.eps = eps
        self.elementwise_affine = elementwise_affine
        self._make(self.normalized_shape, elementwise_affine, bias, device, dtype)

    def forward(self, input: Tensor) -> Tensor:
        return F.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        return (
            f"{self.normalized_shape}, eps={self.eps}, "
            f"elementwise_affine={self.elementwise_affine}, bias={self.bias is not None}"
        )

    def label(self) -> str:
        return f"LayerNorm {self.normalized_shape}"


class RMSNorm(_Affine):
    """Divides by the root of the mean square over the last axes, and multiplies by the weight.

    Zhang and Sennrich, arXiv:1910.07467. `eps=None` stands for the resolution of the dtype that is
    computed in, as in PyTorch.

    >>> import gpugrad as gg
    >>> RMSNorm(2, eps=0.0)(gg.tensor([[3.0, 3.0]], dtype="float32")).tolist()
    [[1.0, 1.0]]
    """

    def __init__(
        self,
        normalized_shape: Any,
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: str | None = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.normalized_shape = _shape("RMSNorm", normalized_shape)
        self.eps = eps
        self.elementwise_affine = elementwise_affine
        self._make(self.normalized_shape, elementwise_affine, False, device, dtype)

    def forward(self, input: Tensor) -> Tensor:
        return F.rms_norm(input, self.normalized_shape, self.weight, self.eps)

    def extra_repr(self) -> str:
        return (
            f"{self.normalized_shape}, eps={self.eps}, elementwise_affine={self.elementwise_affine}"
        )

    def label(self) -> str:
        return f"RMSNorm {self.normalized_shape}"


class GroupNorm(_Affine):
    """Brings each group of channels of each sample to mean 0 and variance 1.

    Input of shape (batch, channels, ...). Then multiplies by the weight and adds the bias, one
    element for each channel. Wu and He, arXiv:1803.08494.

    >>> import gpugrad as gg
    >>> GroupNorm(2, 4, eps=0.0)(gg.tensor([[1.0, 3.0, 0.0, 8.0]], dtype="float32")).tolist()
    [[-1.0, 1.0, -1.0, 1.0]]
    """

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        device: str | None = None,
        dtype: Any = None,
        *,
        bias: bool = True,
    ) -> None:
        super().__init__()
        if num_groups < 1 or num_channels % num_groups:
            raise ParameterError(
                f"GroupNorm: num_channels ({num_channels}) must be divisible by num_groups "
                f"({num_groups})"
            )
        self.num_groups = num_groups
        self.num_channels = num_channels
        self.eps = eps
        self.affine = affine
        self._make((num_channels,), affine, bias, device, dtype)

    def forward(self, input: Tensor) -> Tensor:
        _check_channels(input, self.num_channels)
        return F.group_norm(input, self.num_groups, self.weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        return (
            f"{self.num_groups}, {self.num_channels}, eps={self.eps}, affine={self.affine}, "
            f"bias={self.bias is not None}"
        )

    def label(self) -> str:
        return f"GroupNorm {self.num_channels} in {self.num_groups}"


def _check_channels(input: Tensor, channels: int) -> None:
    if input.ndim > 1 and input.shape[1] != channels:
        raise ShapeError(
            f"input of shape {input.shape} has {input.shape[1]} channels (axis 1), the layer takes "
            f"{channels}; move the channels to axis 1, or change the layer's number of channels"
        )


class _BatchNorm(_Affine):
    """Batch normalisation with running averages; subclasses say how many axes an input has."""

    axes: ClassVar[tuple[int, ...]]
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: str | None = None,
        dtype: Any = None,
        *,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.num_features = num_features
        self.eps = eps
        self.momentum = momentum
        self.affine = affine
        self.track_running_stats = track_running_stats
        self._make((num_features,), affine, bias, device, dtype)

        def buffer(make: Any, shape: Any, dtype: Any) -> Tensor | None:
            return make(shape, dtype=dtype, device=device) if track_running_stats else None

        dtype = dtype or "float32"
        self.register_buffer("running_mean", buffer(ops.zeros, (num_features,), dtype))
        self.register_buffer("running_var", buffer(ops.ones, (num_features,), dtype))
        self.register_buffer("num_batches_tracked", buffer(ops.zeros, (), "int64"))

    def reset_running_stats(self) -> None:
        """Forget the running averages: mean 0, variance 1, no batches."""
        for buffer, fill in (
            (self.running_mean, init.zeros_),
            (self.running_var, init.ones_),
            (self.num_batches_tracked, init.zeros_),
        ):
            if buffer is not None:
                fill(buffer)

    def forward(self, input: Tensor) -> Tensor:
        if input.ndim not in self.axes:
            wanted = " or ".join(map(str, self.axes))
            raise ShapeError(
                f"input of shape {input.shape} has {input.ndim} axes, the layer takes {wanted}: "
                "(batch, channels, ...); reshape it"
            )
        _check_channels(input, self.num_features)
        evaluated = not self.training and self.running_mean is not None
        tracked = self.training and self.track_running_stats
        running = (self.running_mean, self.running_var) if evaluated or tracked else (None, None)
        y = F.batch_norm(
            input, *running, self.weight, self.bias, training=not evaluated,
            momentum=self._share(), eps=self.eps,
        )  # fmt: skip
        if tracked and self.num_batches_tracked is not None:
            with no_grad():
                write(self.num_batches_tracked, self.num_batches_tracked + 1)
        return y

    def _share(self) -> Any:
        """What the running averages take over from a batch: a number, or one on the device."""
        if self.momentum is not None or self.num_batches_tracked is None:
            return self.momentum
        assert self.running_mean is not None
        return 1.0 / (self.num_batches_tracked + 1).to(dtype=self.running_mean.dtype)

    def extra_repr(self) -> str:
        return (
            f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, affine={self.affine}, "
            f"bias={self.bias is not None}, track_running_stats={self.track_running_stats}"
        )

    def label(self) -> str:
        return f"{type(self).__name__} {self.num_features}"


class BatchNorm1d(_BatchNorm):
    """Brings each channel of a batch, (batch, channels) or (batch, channels, length), to mean 0.

    And to variance 1; then multiplies by the weight and adds the bias, one element for each
    channel. In training mode with the mean and variance of the batch, of which running averages are
    kept: a share of `momentum` comes from the newest batch (None: all batches weigh the same). In
    evaluation mode with these averages, or with the batch's where `track_running_stats` is off.
    Ioffe and Szegedy, arXiv:1502.03167.

    >>> import gpugrad as gg
    >>> norm = BatchNorm1d(1, eps=0.0, momentum=0.5)
    >>> norm(gg.tensor([[1.0], [3.0]], dtype="float32")).tolist()
    [[-1.0], [1.0]]
    >>> norm.running_mean, norm.running_var
    (tensor([1.], dtype=float32), tensor([1.5], dtype=float32))
    """

    axes = (2, 3)


class BatchNorm2d(_BatchNorm):
    """:class:`BatchNorm1d` for images: input of shape (batch, channels, height, width).

    >>> import gpugrad as gg
    >>> BatchNorm2d(3)(gg.zeros((2, 3, 4, 4), dtype="float32")).shape
    (2, 3, 4, 4)
    """

    axes = (4,)
