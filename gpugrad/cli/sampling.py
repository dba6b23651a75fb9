"""Text that a model writes, token by token."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from gpugrad.cli.config import TEXT_MODELS
from gpugrad.cli.tasks import NextToken
from gpugrad.cli.training import BEST, CHECKPOINT, RunError, stored_config
from gpugrad.core.conversion import asarray
from gpugrad.core.modes import no_grad
from gpugrad.data.errors import DataError
from gpugrad.data.text import Text, Vocabulary, vocabulary_from
from gpugrad.nn.random import Generator

__all__ = ["load_writer"]

Writer = Callable[[str | None, int, float, int, int], tuple[str, Iterator[str]]]


def load_writer(path: Path, device: str) -> Writer:
    """What writes on from a prompt with the text model of a run.

    It takes the prompt, how many tokens to write, the temperature, from how many of the likeliest
    tokens to draw (0 for all), and a seed; it gives the prompt and what follows. Without a prompt
    that is a new line, or the first token if the text has none. RunError for a model that does not
    write, and for a prompt that it cannot read.
    """
    if path.is_dir():
        path = path / BEST if (path / BEST).exists() else path / CHECKPOINT
    config, state = stored_config(path)
    if config.model not in TEXT_MODELS:
        raise RunError(f"{path}: {config.model} tells classes apart, and writes nothing")
    vocabulary = vocabulary_from(state["task"]["vocabulary"], str(path))
    nothing = np.zeros(0, np.int64)
    net = NextToken(Text(nothing, nothing, vocabulary, ""), "").net(config).to(device)
    net.load_state_dict(state["model"])
    net.eval()

    @no_grad()
    def scores(tokens: list[int]) -> Any:
        window = asarray(np.asarray([tokens[-config.context :]], np.int64), device=device)
        return net(window)[0, -1].cpu().numpy().astype(np.float64)

    def follow(
        tokens: list[int], length: int, temperature: float, top_k: int, seed: int
    ) -> Iterator[str]:
        drawn = Generator(seed).uniform((length,))
        for u in drawn:
            tokens.append(_draw(scores(tokens), temperature, top_k, float(u)))
            yield vocabulary.decode(tokens[-1:])

    def write(prompt: str | None, *how: Any) -> tuple[str, Iterator[str]]:
        tokens = _encoded(vocabulary, "\n" if prompt is None else prompt)
        if prompt == "":
            raise RunError("sample: an empty prompt; give at least one character")
        if prompt and not tokens:
            raise RunError(
                f"sample: the model knows no {_strange(vocabulary, prompt)!r}; prompt it with "
                "characters of the text that it has learned"
            )
        tokens = tokens or [0]
        return vocabulary.decode(tokens), follow(tokens, *how)

    return write


def _encoded(vocabulary: Vocabulary, text: str) -> list[int]:
    """Tokens of a text; none where it has some that the vocabulary has not."""
    try:
        return [int(t) for t in vocabulary.encode(text)]
    except DataError:
        return []


def _strange(vocabulary: Vocabulary, text: str) -> str:
    """The first character that a vocabulary has not."""
    return next(c for c in text if not _encoded(vocabulary, c))


def _draw(scores: Any, temperature: float, top_k: int, u: float) -> int:
    """A token: the likeliest, or the one at the place `u` from 0 to 1 among all that may come."""
    order = np.argsort(-scores, kind="stable")
    if temperature == 0:
        return int(order[0])
    order = order[: top_k or len(order)]
    weights = np.exp((scores[order] - scores[order[0]]) / temperature)
    place = np.searchsorted(np.cumsum(weights), u * weights.sum(), side="right")
    return int(order[min(int(place), len(order) - 1)])
