"""Layers: linear maps, and what only passes a value on."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from gpugrad.backend import as_dtype, backend_for_device
from gpugrad.backend.random import check_probability
from gpugrad.core.modes import no_grad
from gpugrad.core.tensor import Tensor
from gpugrad.errors import ShapeError
from gpugrad.nn import functional as F
from gpugrad.nn import init
from gpugrad.nn.module import Module, Parameter
from gpugrad.nn.random import Generator, draws_from
from gpugrad.ops.embeddings import row_of_padding

__all__ = ["Dropout", "Embedding", "Flatten", "Identity", "Linear"]


def _empty(shape: tuple[int, ...], device: str | None, dtype: Any) -> Parameter:
    space = backend_for_device(device or "cpu")
    host = np.zeros(shape, dtype=as_dtype(dtype or "float32"))
    return Parameter(space.asarray(host, device=device))


class Linear(Module):
    """x·Wᵀ + b, with W of shape [out_features, in_features] and b of shape [out_features].

    Both start uniform within ±1/√in_features, as in PyTorch. Parameters are float32 unless `dtype`
    says otherwise.

    >>> import gpugrad as gg
    >>> Linear(8, 3)(gg.tensor(np.ones((5, 8), np.float32))).shape
    (5, 3)
    """

    bias: Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: str | None = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if in_features < 1 or out_features < 1:
            raise ShapeError(
                f"Linear({in_features}, {out_features}): at least 1 feature is needed on each side"
            )
        self.in_features = in_features
        self.out_features = out_features
        self.weight = _empty((out_features, in_features), device, dtype)
        self.bias = _empty((out_features,), device, dtype) if bias else None
        self.reset_parameters()

    def reset_parameters(self, generator: Generator | None = None) -> None:
        """Draw weight and bias anew."""
        init.kaiming_uniform_(self.weight, a=math.sqrt(5), generator=generator)
        if self.bias is not None:
            bound = 1 / math.sqrt(self.in_features)
            init.uniform_(self.bias, -bound, bound, generator)

    def forward(self, input: Tensor, activation: str | None = None) -> Tensor:
        try:
            return F.linear(input, self.weight, self.bias, activation=activation)
        except ShapeError as error:
            if not input.ndim or input.shape[-1] == self.in_features:
                raise
            raise ShapeError(
                f"input has {input.shape[-1]} features (shape {input.shape}), the layer takes "
                f"{self.in_features}; give the layer before it {self.in_features} outputs, or make "
                f"this one Linear({input.shape[-1]}, {self.out_features})"
            ) from error

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}"
        )

    def label(self) -> str:
        return f"{type(self).__name__} {self.in_features}->{self.out_features}"


class Embedding(Module):
    """A table with a row of `embedding_dim` numbers for each of `num_embeddings` words.

    Rows start normally distributed with standard deviation 1, that of `padding_idx` with zeros; it
    gets no gradient, so it stays as it is. Names and meaning are PyTorch's; of its options,
    `max_norm` and `sparse` are refused, as :func:`gpugrad.nn.functional.embedding` says.

    >>> import gpugrad as gg
    >>> table = Embedding(10, 3, padding_idx=0)
    >>> table(gg.tensor([[1, 2, 0, 0]])).shape
    (1, 4, 3)
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        _weight: Tensor | None = None,
        _freeze: bool = False,
        device: str | None = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if num_embeddings < 1 or embedding_dim < 1:
            raise ShapeError(
                f"Embedding({num_embeddings}, {embedding_dim}): at least 1 row and 1 column are "
                "needed"
            )
        F.check_dense(max_norm, sparse)
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.padding_idx = row_of_padding(padding_idx, num_embeddings)
        self.scale_grad_by_freq = scale_grad_by_freq
        if _weight is None:
            self.weight = _empty((num_embeddings, embedding_dim), device, dtype)
            self.reset_parameters()
        else:
            self.weight = Parameter(_weight, requires_grad=False)
        self.weight.requires_grad_(not _freeze)

    @classmethod
    def from_pretrained(
        cls,
        embeddings: Tensor,
        freeze: bool = True,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
    ) -> Embedding:
        """The layer with `embeddings`, shape [num_embeddings, embedding_dim], as its table.

        It shares their memory. `freeze` leaves the table out of training.

        >>> import gpugrad as gg
        >>> Embedding.from_pretrained(gg.tensor([[1.0, 2.0]]))(gg.tensor([0]))
        tensor([[1., 2.]])
        """
        if embeddings.ndim != 2:
            raise ShapeError(
                f"Embedding.from_pretrained: embeddings of shape {embeddings.shape}; a table has "
                "two axes, [num_embeddings, embedding_dim]"
            )
        rows, columns = embeddings.shape
        return cls(
            rows, columns, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse,
            embeddings, freeze,
        )  # fmt: skip

    def reset_parameters(self, generator: Generator | None = None) -> None:
        """Draw the table anew."""
        init.normal_(self.weight, generator=generator)
        if self.padding_idx is not None:
            with no_grad():
                self.weight[self.padding_idx] = 0.0

    def forward(self, input: Tensor) -> Tensor:
        return F.embedding(
            input, self.weight, self.padding_idx, scale_grad_by_freq=self.scale_grad_by_freq
        )

    def extra_repr(self) -> str:
        text = f"{self.num_embeddings}, {self.embedding_dim}"
        if self.padding_idx is not None:
            text += f", padding_idx={self.padding_idx}"
        return text + ", scale_grad_by_freq=True" * self.scale_grad_by_freq

    def label(self) -> str:
        return f"{type(self).__name__} {self.num_embeddings}x{self.embedding_dim}"


class Identity(Module):
    """Returns its input. Takes, and ignores, any arguments, so that it can stand for any layer."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def forward(self, input: Tensor) -> Tensor:
        return input


class Flatten(Module):
    """Joins the axes from `start_dim` to `end_dim` into one.

    >>> import gpugrad as gg
    >>> Flatten()(gg.tensor(np.zeros((5, 2, 3)))).shape
    (5, 6)
    """

    def __init__(self, start_dim: int = 1, end_dim: int = -1) -> None:
        super().__init__()
        self.start_dim = start_dim
        self.end_dim = end_dim

    def forward(self, input: Tensor) -> Tensor:
        return F.flatten(input, self.start_dim, self.end_dim)

    def extra_repr(self) -> str:
        return f"start_dim={self.start_dim}, end_dim={self.end_dim}"


class Dropout(Module):
    """In training mode, sets each element to zero with probability `p` and scales the rest.

    The rest is multiplied by 1/(1−p), so that the expected value stays; in evaluation mode the
    input passes unchanged. What is dropped depends on the generator's seed and on how many arrays
    it has drawn, and is the same on every backend. Srivastava et al., "Dropout: a simple way to
    prevent neural networks from overfitting" (2014).

    >>> import gpugrad as gg
    >>> drop = Dropout(0.5, generator=Generator(0))
    >>> sorted({float(v) for v in drop(gg.tensor([1.0] * 100)).tolist()})
    [0.0, 2.0]
    >>> drop.eval()(gg.tensor([1.0]))
    tensor([1.])
    """

    def __init__(self, p: float = 0.5, *, generator: Generator | None = None) -> None:
        super().__init__()
        check_probability(p)
        self.p = p
        self.generator = generator

    def forward(self, input: Tensor) -> Tensor:
        return F.dropout(input, self.p, self.training, generator=draws_from(self.generator))

    def extra_repr(self) -> str:
        return f"p={self.p}"
