"""Transforms of batches of images, where the batch is: vectorised, and the same on every device.

Each takes a tensor, or an array of any library, of shape [N, C, H, W], or [C, H, W] for one image,
and returns the same kind. What is drawn at random is a function of a generator's seed and counter
and of an image's place in the batch (:mod:`gpugrad.backend.random`), so that equal generators make
equal pictures on the CPU and on a GPU. Nothing is recorded for a backward pass, and nothing is read
back to the host.

>>> import gpugrad as gg
>>> from gpugrad.nn import Generator
>>> flip = RandomHorizontalFlip(p=1.0, generator=Generator(0))
>>> augment = Compose([ToFloat(), flip, Normalize(0.5, 0.5)])
>>> augment(gg.asarray(np.array([[[0, 51, 255]]], np.uint8)))
tensor([[[ 1. , -0.6, -1. ]]], dtype=float32)
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gpugrad.backend import SPACES, Array, Backend
from gpugrad.backend.random import words
from gpugrad.core.tensor import Tensor, tensor_of
from gpugrad.errors import DTypeError, ParameterError, ShapeError
from gpugrad.nn.random import Generator, draws_from

__all__ = [
    "Compose",
    "Cutout",
    "Normalize",
    "RandomCrop",
    "RandomErasing",
    "RandomHorizontalFlip",
    "ToFloat",
]


class Compose:
    """One transform after the other.

    >>> Compose([ToFloat(), Cutout(8)])
    Compose(ToFloat(), Cutout(8))
    """

    def __init__(self, transforms: Sequence[Callable[[Any], Any]]) -> None:
        self.transforms = list(transforms)

    def __call__(self, x: Any) -> Any:
        for transform in self.transforms:
            x = transform(x)
        return x

    def __repr__(self) -> str:
        return f"Compose({', '.join(map(repr, self.transforms))})"


class _Transform:
    """A function of a raw array [N, C, H, W]."""

    def __call__(self, x: Any) -> Any:
        raw = x.data if isinstance(x, Tensor) else x
        m = SPACES[type(raw)]
        if raw.ndim not in (3, 4):
            raise ShapeError(
                f"{type(self).__name__}: images of shape [N, C, H, W] or [C, H, W] are wanted, got "
                f"{tuple(raw.shape)}"
            )
        # Of several GPUs, that of the images: operators do not look for it by themselves.
        apply = m.bind(self.apply)
        y = apply(m, raw if raw.ndim == 4 else m.reshape(raw, (1, *raw.shape)))
        y = y if raw.ndim == 4 else m.reshape(y, y.shape[1:])
        return tensor_of(y) if isinstance(x, Tensor) else y

    def apply(self, m: Backend, x: Array) -> Array:
        raise NotImplementedError

    def extra_repr(self) -> str:
        return ""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.extra_repr()})"


class ToFloat(_Transform):
    """Numbers as floating point: unsigned bytes 0 ... 255 become 0 ... 1, others keep their value.

    Parameters
    ----------
    dtype:
        What they become.
    """

    def __init__(self, dtype: Any = "float32") -> None:
        self.dtype = np.dtype(dtype)
        if self.dtype.kind != "f":
            raise DTypeError(f"ToFloat: {self.dtype} is no floating-point dtype")

    def apply(self, m: Backend, x: Array) -> Array:
        y = m.astype(x, m.dtype(self.dtype))
        return y / 255 if m.numpy_dtype(x) == np.uint8 else y

    def extra_repr(self) -> str:
        return "" if self.dtype == np.float32 else str(self.dtype)


class Normalize(_Transform):
    """(x - mean) / std for each channel: one number for all of them, or one for each.

    Raises DTypeError for images of integers, and ParameterError for a std that is not above 0.
    """

    def __init__(self, mean: Any, std: Any) -> None:
        self.mean = np.asarray(mean, np.float64).reshape(-1)
        self.std = np.asarray(std, np.float64).reshape(-1)
        if not (self.std > 0).all():
            raise ParameterError(f"Normalize: std is above 0 for every channel, got {std}")
        self._kept: dict[tuple[str, str], tuple[Array, Array]] = {}

    def apply(self, m: Backend, x: Array) -> Array:
        dtype = m.numpy_dtype(x)
        if dtype.kind not in "fV":
            raise DTypeError(f"Normalize: images of {dtype}; put ToFloat() before it")
        channels = x.shape[1]
        for values in (self.mean, self.std):
            if len(values) not in (1, channels):
                raise ShapeError(
                    f"Normalize: {len(values)} numbers for images of {channels} channels"
                )
        place = (m.device(x), dtype.name)
        if place not in self._kept:  # sent to the device once
            self._kept[place] = (
                m.asarray(self.mean.reshape(-1, 1, 1).astype(dtype), device=place[0]),
                m.asarray((1 / self.std).reshape(-1, 1, 1).astype(dtype), device=place[0]),
            )
        mean, scale = self._kept[place]
        return (x - mean) * scale

    def extra_repr(self) -> str:
        return f"{self.mean.tolist()}, {self.std.tolist()}"


class _Random(_Transform):
    """A transform that draws, once for every batch."""

    def __init__(self, generator: Generator | None) -> None:
        if generator is not None:
            draws_from(generator)  # complains
        self.generator = generator

    def words(self, m: Backend, x: Array, count: int) -> list[Array]:
        """`count` random integers of 32 bits for each image, each of shape [N, 1, 1, 1]."""
        n = x.shape[0]
        drawn = words(m, n * count, *draws_from(self.generator).stream(), m.device(x))
        drawn = m.reshape(drawn, (n, count, 1, 1, 1))
        return list(m.unstack(drawn, axis=1))


def _below(word: Array, n: Any) -> Array:
    """An integer from 0 to n - 1 out of a random word."""
    return word * n >> 32


class RandomHorizontalFlip(_Random):
    """Each image mirrored, left to right, with probability `p`."""

    def __init__(self, p: float = 0.5, generator: Generator | None = None) -> None:
        super().__init__(generator)
        self.p = _probability("RandomHorizontalFlip", p)

    def apply(self, m: Backend, x: Array) -> Array:
        (word,) = self.words(m, x, 1)
        return m.where(word < round(self.p * 2**32), m.flip(x, axis=3), x)

    def extra_repr(self) -> str:
        return f"p={self.p:g}"


class RandomCrop(_Random):
    """A window of each image, at a random place of its own.

    Parameters
    ----------
    size:
        Height and width of the window, one number for both.
    padding:
        How much is added on every side before: one number, (left and right, top and bottom), or
        (left, top, right, bottom).
    fill:
        What is added, in mode ``"constant"``.
    padding_mode:
        ``"constant"``, ``"edge"`` (the nearest pixel) or ``"reflect"`` (mirrored at it).
    """

    def __init__(
        self,
        size: int | tuple[int, int],
        padding: int | Sequence[int] | None = None,
        fill: float = 0,
        padding_mode: str = "constant",
        generator: Generator | None = None,
    ) -> None:
        super().__init__(generator)
        self.size = _pair(size)
        around = [0] if padding is None else [padding] if isinstance(padding, int) else [*padding]
        if len(around) not in (1, 2, 4) or min(around) < 0:
            raise ParameterError(
                f"RandomCrop: padding is 1, 2 or 4 numbers from 0 on, got {padding}"
            )
        around = (around * 4)[:4] if len(around) < 4 else around
        self.padding = tuple(map(operator.index, around))
        self.fill = fill
        if padding_mode not in ("constant", "edge", "reflect"):
            raise ParameterError(
                f"RandomCrop: padding_mode is 'constant', 'edge' or 'reflect', got {padding_mode!r}"
            )
        self.padding_mode = padding_mode

    def apply(self, m: Backend, x: Array) -> Array:
        n, channels, height, width = x.shape
        left, top, right, bottom = self.padding
        h, w = self.size
        room = (height + top + bottom - h + 1, width + left + right - w + 1)
        if min(room) < 1:
            raise ShapeError(
                f"RandomCrop: a window of {h} x {w} does not fit into images of {height} x {width} "
                f"with padding {self.padding}"
            )
        row, column = self.words(m, x, 2)
        device = m.device(x)
        rows = _below(row, room[0]) - top + self._steps(m, (1, 1, h, 1), device)
        columns = _below(column, room[1]) - left + self._steps(m, (1, 1, 1, w), device)
        inside = m.logical_and(_within(m, rows, height), _within(m, columns, width))
        rows, columns = self._folded(m, rows, height), self._folded(m, columns, width)
        # Where each pixel of the result lies in the flat memory of x.
        planes = self._steps(m, (n, channels, 1, 1), device) * (height * width)
        places = planes + rows * width + columns
        y = m.take(m.reshape(x, (-1,)), m.reshape(places, (-1,)), axis=0)
        y = m.reshape(y, (n, channels, h, w))
        if self.padding_mode != "constant" or not any(self.padding):
            return y
        return m.astype(m.where(inside, y, self.fill), x.dtype, copy=False)

    @staticmethod
    def _steps(m: Backend, shape: tuple[int, ...], device: str) -> Array:
        steps = m.create("arange", math.prod(shape), dtype="int64", device=device)
        return m.reshape(steps, shape)

    def _folded(self, m: Backend, places: Array, n: int) -> Array:
        """Places outside of 0 ... n - 1 brought to the pixel that they show."""
        if self.padding_mode != "reflect":
            return m.clip(places, 0, n - 1)
        if n == 1:
            return places * 0
        period = 2 * (n - 1)
        places = places % period
        return m.where(places < n, places, period - places)

    def extra_repr(self) -> str:
        return f"{self.size}, padding={self.padding}"


class Cutout(_Random):
    """A square of `size` pixels around a random place of each image set to `value`.

    At the border only a part of the square is in the image. DeVries and Taylor, "Improved
    regularization of convolutional neural networks with cutout" (2017).
    """

    def __init__(self, size: int, value: float = 0, generator: Generator | None = None) -> None:
        super().__init__(generator)
        self.size = operator.index(size)
        if self.size < 1:
            raise ParameterError(f"Cutout: size is at least 1, got {size}")
        self.value = value

    def apply(self, m: Backend, x: Array) -> Array:
        row, column = self.words(m, x, 2)
        top = _below(row, x.shape[2]) - self.size // 2
        left = _below(column, x.shape[3]) - self.size // 2
        return _erased(m, x, top, left, self.size, self.size, self.value)

    def extra_repr(self) -> str:
        return str(self.size)


class RandomErasing(_Random):
    """A random rectangle of each image set to `value`, with probability `p`.

    Its area is a share of the image from `scale`, its height over its width from `ratio`, evenly on
    a logarithmic scale; a side that comes out longer than the image's is shortened to it. Zhong et
    al., "Random erasing data augmentation" (2020).
    """

    def __init__(
        self,
        p: float = 0.5,
        scale: tuple[float, float] = (0.02, 0.33),
        ratio: tuple[float, float] = (0.3, 3.3),
        value: float = 0,
        generator: Generator | None = None,
    ) -> None:
        super().__init__(generator)
        self.p = _probability("RandomErasing", p)
        if not 0 <= scale[0] <= scale[1] <= 1:
            raise ParameterError(f"RandomErasing: scale is a range within 0 ... 1, got {scale}")
        if not 0 < ratio[0] <= ratio[1] < math.inf:
            raise ParameterError(f"RandomErasing: ratio is a range above 0, got {ratio}")
        self.scale = scale
        self.ratio = ratio
        self.value = value

    def apply(self, m: Backend, x: Array) -> Array:
        height, width = x.shape[2:]
        chance, share, shape, row, column = self.words(m, x, 5)
        area = _between(m, share, *self.scale) * (height * width)
        ratio = m.exp(_between(m, shape, *map(math.log, self.ratio)))
        h = self._side(m, area * ratio, height)
        w = self._side(m, area / ratio, width)
        h = h * m.astype(chance < round(self.p * 2**32), m.dtype("int64"))
        top, left = _below(row, height - h + 1), _below(column, width - w + 1)
        return _erased(m, x, top, left, h, w, self.value)

    @staticmethod
    def _side(m: Backend, square: Array, longest: int) -> Array:
        return m.clip(m.astype(m.round(m.sqrt(square)), m.dtype("int64")), 0, longest)

    def extra_repr(self) -> str:
        return f"p={self.p:g}, scale={self.scale}, ratio={self.ratio}"


def _between(m: Backend, word: Array, low: float, high: float) -> Array:
    return m.astype(word, m.dtype("float64")) * ((high - low) / 2**32) + low


def _within(m: Backend, places: Array, n: int) -> Array:
    return m.logical_and(places >= 0, places < n)


def _erased(
    m: Backend, x: Array, top: Array, left: Array, height: Any, width: Any, value: float
) -> Array:
    device = m.device(x)
    rows = m.reshape(m.create("arange", x.shape[2], dtype="int64", device=device), (1, 1, -1, 1))
    columns = m.create("arange", x.shape[3], dtype="int64", device=device)
    inside = m.logical_and(
        m.logical_and(rows >= top, rows < top + height),
        m.logical_and(columns >= left, columns < left + width),
    )
    return m.astype(m.where(inside, value, x), x.dtype, copy=False)


def _probability(name: str, p: float) -> float:
    if not 0 <= p <= 1:
        raise ParameterError(f"{name}: p is a probability from 0 to 1, got {p}")
    return float(p)


def _pair(size: Any) -> tuple[int, int]:
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) != 2 or min(pair) < 1:
        raise ParameterError(f"RandomCrop: size is one or two numbers from 1 on, got {size}")
    return pair
