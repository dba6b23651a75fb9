"""What is learned: classes of examples, or the next token of a text."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from gpugrad import models, nn
from gpugrad import ops as gg
from gpugrad.backend import as_dtype
from gpugrad.cli.config import Config, ConfigError, is_text
from gpugrad.core.conversion import asarray
from gpugrad.core.tensor import Tensor
from gpugrad.data import DataLoader, DeviceLoader, LabelledDataset, SequenceDataset, load
from gpugrad.data.text import Text, Vocabulary, load_text
from gpugrad.data.transforms import Compose, RandomCrop, RandomHorizontalFlip
from gpugrad.nn import functional as F
from gpugrad.nn.random import Generator

__all__ = ["Classes", "NextToken", "Task", "task_of"]

#: Examples, or tokens, of one batch in a test.
TEST_BATCH, TEST_TOKENS = 1000, 1 << 14
#: Characters of several files from which whole files are set apart to validate with.
ENOUGH = 1 << 20
#: Windows of the validation text that are looked at after an epoch.
TEST_WINDOWS = 1024


class Task(Protocol):
    """Data, the net for them, and how well it does.

    Attributes
    ----------
    name, unit:
        What the data are called, and what is counted of them.
    """

    name: str
    unit: str

    @property
    def answers(self) -> int:
        """How many answers there are to choose from."""

    def net(self, config: Config) -> nn.Module:
        """The net that learns them, newly initialised."""

    def loader(self, config: Config, device: str, generator: Generator) -> Any:
        """The batches of an epoch, inputs and labels; with `state_dict` and `load_state_dict`."""

    def test_batches(self, config: Config, device: str) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches that are tested on."""

    def loss(self, scores: Tensor, labels: Tensor, **options: Any) -> Tensor:
        """The cross-entropy."""

    def correct(self, scores: Tensor, labels: Tensor) -> Tensor:
        """How many scores are greatest at the right place, a 0-d tensor."""

    def described(self) -> dict[str, Any]:
        """What tells these data from others."""

    def kept(self) -> dict[str, Any]:
        """What a checkpoint keeps of them."""


class Classes:
    """Examples, each of one class."""

    unit = "samples"

    def __init__(self, data: LabelledDataset) -> None:
        self.data = data
        self.name = data.name
        self._fingerprint: str | None = None

    def __repr__(self) -> str:
        return repr(self.data)

    @property
    def answers(self) -> int:
        return self.data.classes

    def net(self, config: Config) -> nn.Module:
        shape, classes = self.data.feature_shape, self.data.classes
        common: dict[str, Any] = {"dtype": config.dtype}
        if config.model == "mlp":
            return models.MLP(
                math.prod(shape), classes, config.width, config.depth, config.activation,
                config.norm, config.dropout, config.residual, **common,
            )  # fmt: skip
        channels, height, width = self._picture()
        if config.model == "resnet":
            return models.ResNet(
                channels, classes, config.depth, config.width, config.recompute, **common
            )
        return models.CNN(
            channels, height, width, classes, config.width, activation=config.activation,
            norm=config.norm, dropout=config.dropout, **common,
        )  # fmt: skip

    def _picture(self) -> tuple[int, int, int]:
        shape = self.data.feature_shape
        if len(shape) == 2:
            return (1, *shape)
        if len(shape) == 3:
            return shape
        raise ConfigError(
            f"--model: {self.name} has examples of shape {shape}, which are no pictures of "
            "[height, width] or [channels, height, width]; choose mlp"
        )

    def loader(self, config: Config, device: str, generator: Generator) -> Any:
        x = self._as_input(self.data.train_x, config)
        loader = DeviceLoader(
            x, self.data.train_y, batch_size=config.batch_size, shuffle=True, generator=generator,
            device=device,
        )  # fmt: skip
        return _Augmented(loader, generator) if config.augment else loader

    def _as_input(self, x: Any, config: Config) -> Any:
        x = x.astype(as_dtype(config.dtype), copy=False)
        return x[:, None] if config.augment and x.ndim == 3 else x

    def test_batches(self, config: Config, device: str) -> Iterator[tuple[Tensor, Tensor]]:
        x, y = self._as_input(self.data.test_x, config), self.data.test_y
        for i in range(0, len(x), TEST_BATCH):
            part = slice(i, i + TEST_BATCH)
            yield asarray(x[part], device=device), asarray(y[part], device=device)

    def loss(self, scores: Tensor, labels: Tensor, **options: Any) -> Tensor:
        return F.cross_entropy(scores, labels, **options)  # type: ignore[no-any-return]

    def correct(self, scores: Tensor, labels: Tensor) -> Tensor:
        return gg.sum(gg.equal(gg.argmax(scores, axis=1), labels))  # type: ignore[no-any-return]

    def described(self) -> dict[str, Any]:
        data = self.data
        if self._fingerprint is None:
            self._fingerprint = _digest(data.train_x, data.train_y, data.test_x, data.test_y)
        return {
            "training examples": len(data.train_x),
            "test examples": len(data.test_x),
            "feature shape": list(data.feature_shape),
            "classes": data.classes,
            "sha256": self._fingerprint,
        }

    def kept(self) -> dict[str, Any]:
        return {}


class _Augmented:
    """A loader whose pictures are shifted by up to two pixels and mirrored."""

    def __init__(self, loader: Any, generator: Generator) -> None:
        self._loader = loader
        self._change = Compose(
            [RandomHorizontalFlip(generator=generator),
             RandomCrop(tuple(loader.tensors[0].shape[-2:]), padding=2, generator=generator)]
        )  # fmt: skip
        self.state_dict = loader.state_dict
        self.load_state_dict = loader.load_state_dict

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        for x, y in self._loader:
            yield self._change(x), y


class NextToken:
    """A text, and at each of its places the token that follows."""

    unit = "tokens"

    def __init__(self, text: Text, name: str) -> None:
        self.text = text
        self.name = name
        self._fingerprint: str | None = None

    def __repr__(self) -> str:
        text = self.text
        return (
            f"{text.source}: {len(text.train):,} tokens to train on, {len(text.validation):,} to "
            f"validate with, {len(text.vocabulary)} different ones"
        )

    @property
    def answers(self) -> int:
        return len(self.text.vocabulary)

    def net(self, config: Config) -> nn.Module:
        size = len(self.text.vocabulary)
        common: dict[str, Any] = {"dropout": config.dropout, "dtype": config.dtype}
        if config.model == "gpt":
            return models.GPT(
                size, config.context, config.width, config.depth, config.heads,
                checkpoint=config.recompute, **common,
            )  # fmt: skip
        return models.RecurrentLM(size, config.model, config.width, config.depth, **common)

    def _windows(self, tokens: Any, config: Config) -> SequenceDataset:
        shorter = min(len(self.text.train), len(self.text.validation))
        if config.context >= shorter:
            raise ConfigError(
                f"--context {config.context} is too long for {self.text.source}: its shorter part "
                f"has {shorter:,} tokens; pass --context {max(1, shorter - 1)} or less, or give it "
                "a longer text"
            )
        return SequenceDataset(tokens, config.context)

    def loader(self, config: Config, device: str, generator: Generator) -> Any:
        windows = self._windows(self.text.train, config)
        return DataLoader(
            windows, config.batch_size, shuffle=True, drop_last=len(windows) > config.batch_size,
            num_workers=1, generator=generator, device=device,
        )  # fmt: skip

    def test_batches(self, config: Config, device: str) -> Iterator[tuple[Tensor, Tensor]]:
        windows = self._windows(self.text.validation, config)
        count = min(len(windows), TEST_WINDOWS)
        # Evenly over the whole: neighbours are alike.
        chosen = np.linspace(0, len(windows) - 1, count).astype(np.int64)
        size = max(1, TEST_TOKENS // config.context)
        for i in range(0, count, size):
            x, y = windows.get_batch(chosen[i : i + size])
            yield x.to(device), y.to(device)

    def loss(self, scores: Tensor, labels: Tensor, **options: Any) -> Tensor:
        flat = scores.reshape((-1, scores.shape[-1]))
        return F.cross_entropy(flat, labels.reshape((-1,)), **options)  # type: ignore[no-any-return]

    def correct(self, scores: Tensor, labels: Tensor) -> Tensor:
        return gg.sum(gg.equal(gg.argmax(scores, axis=-1), labels))  # type: ignore[no-any-return]

    def described(self) -> dict[str, Any]:
        text = self.text
        if self._fingerprint is None:
            self._fingerprint = _digest(text.train, text.validation)
        return {
            "training tokens": len(text.train),
            "validation tokens": len(text.validation),
            "different tokens": len(text.vocabulary),
            "sha256": self._fingerprint,
        }

    def kept(self) -> dict[str, Any]:
        return {"vocabulary": self.text.vocabulary.to_dict()}


def task_of(
    config: Config, folder: Path | None, vocabulary: str | Vocabulary = "characters"
) -> Task:
    """The task that a configuration names; DataError when its data cannot be had.

    Text is read with the vocabulary, by default one of its own.
    """
    if not is_text(config.data):
        return Classes(load(config.data, folder=folder))
    path = None if config.data == "text" else Path(config.data)
    limit = int(config.limit * 1e6) or None
    many = path is None or path.is_dir()
    split = "files" if many and (limit is None or limit >= ENOUGH) else "tail"
    text = load_text(path, vocabulary=vocabulary, limit=limit, split=split)
    return NextToken(text, "text" if path is None else path.stem)


def _digest(*arrays: Any) -> str:
    digest = hashlib.sha256()
    for x in arrays:
        digest.update(np.ascontiguousarray(x).view(np.uint8).data)
    return digest.hexdigest()
