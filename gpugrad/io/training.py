"""The state of a training run: collected, restored, and kept in a folder of checkpoints."""

from __future__ import annotations

import contextlib
import math
import operator
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gpugrad.core.tensor import Tensor
from gpugrad.errors import ParameterError
from gpugrad.io.checkpoint import load, read_metadata, save
from gpugrad.io.errors import CheckpointCorruptError, CheckpointError, CheckpointNotFoundError
from gpugrad.io.state import pack, unpack
from gpugrad.nn.random import Generator, default_generator

__all__ = ["Checkpoints", "collect", "restore"]


def collect(**parts: Any) -> dict[str, Any]:
    """The state of a training run, for :func:`pack` or :meth:`Checkpoints.save`.

    Parameters
    ----------
    parts:
        By any name: objects with a ``state_dict`` (models, optimisers, schedulers, scalers,
        loaders, clipping policies), generators, and plain values (numbers, strings, arrays, lists,
        tuples and dicts of these). The state of the default generator goes in by itself.

    >>> from gpugrad import nn
    >>> net = nn.Linear(2, 1)
    >>> state = collect(model=net, epoch=3)
    >>> restore(state, model=net)
    {'epoch': 3}
    """
    objects = {name: part for name, part in parts.items() if _is_object(part)}
    return {
        "objects": {name: _state(part) for name, part in objects.items()},
        "values": {name: part for name, part in parts.items() if name not in objects},
        "random": default_generator.state,
    }


def restore(state: Mapping[str, Any], *, strict: bool = True, **parts: Any) -> dict[str, Any]:
    """Put what :func:`collect` collected back into the objects, and return the plain values.

    Everything or nothing: when one part refuses its state, those before it get theirs back.

    Parameters
    ----------
    state:
        What :func:`collect` gave, perhaps by way of a file.
    strict:
        Whether every object that was collected must be given. Without, those that are not are
        passed over, and the default generator stays as it is.
    parts:
        The objects, by the names they were collected under.

    Raises
    ------
    CheckpointError
        Names that only one side has, all of them listed, or a state that is none.
    StateDictError, OptimizerError, ...
        What the part that refuses its state raises; a note says which part it is.
    """
    try:
        states, values = dict(state["objects"]), dict(state["values"])
        random = tuple(map(operator.index, state["random"]))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            "this state was not made by gpugrad.io.collect; use its tensors as they are"
        ) from error
    problems = [f"not in the checkpoint: {name}" for name in parts if name not in states]
    if strict:
        problems += [f"in the checkpoint only: {name}" for name in states if name not in parts]
    if problems:
        raise CheckpointError("\n  ".join(("the checkpoint is of other parts:", *problems)))
    done: list[tuple[Any, Any]] = []
    for name, part in parts.items():
        done.append((part, _copied(_state(part))))
        try:
            _load(part, states[name])
        except BaseException as error:
            for other, before in reversed(done):
                # The part that refused has most often changed nothing, and may refuse this too.
                with contextlib.suppress(Exception):
                    _load(other, before)
            error.add_note(f"gpugrad: in the part {name!r} of the checkpoint")
            raise
    if strict:
        default_generator.state = random  # type: ignore[assignment]
    return values


def _is_object(part: Any) -> bool:
    return isinstance(part, Generator) or hasattr(part, "state_dict")


def _state(part: Any) -> Any:
    return part.state if isinstance(part, Generator) else part.state_dict()


def _load(part: Any, state: Any) -> None:
    if isinstance(part, Generator):
        part.state = tuple(state)
    else:
        part.load_state_dict(state)


def _copied(state: Any) -> Any:
    """A state that shares no memory with what it is the state of."""
    if isinstance(state, Tensor):
        return state.detach().cpu().numpy().copy()
    if isinstance(state, np.ndarray):
        return state.copy()
    if isinstance(state, Mapping):
        return {key: _copied(value) for key, value in state.items()}
    if isinstance(state, list):
        return [_copied(value) for value in state]
    return state


class Checkpoints:
    """A folder with the last checkpoints of a run, and its best.

    Files are called ``step-00000120.safetensors``. Each is written atomically, and old ones are
    deleted only when a new one is on the disk, so that at every moment at least one is whole. One
    process writes to a folder at a time.

    Parameters
    ----------
    folder:
        Made when the first checkpoint is saved.
    keep_last:
        How many of the newest stay, at least 1; None keeps all.
    keep_best:
        How many of those with the best metric stay besides.
    mode:
        ``"min"`` when a small metric is good, ``"max"`` when a large one is.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     checkpoints = Checkpoints(folder, keep_last=1)
    ...     for step, loss in ((10, 0.5), (20, 0.3), (30, 0.4)):
    ...         _ = checkpoints.save(step, collect(loss=loss), metric=loss)
    ...     checkpoints.steps(), checkpoints.best(), restore(checkpoints.load())
    ([20, 30], 20, {'loss': 0.4})
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        keep_last: int | None = 3,
        keep_best: int = 1,
        mode: str = "min",
    ) -> None:
        if keep_last is not None and operator.index(keep_last) < 1:
            raise ParameterError(f"keep_last is at least 1, or None for all, got {keep_last}")
        if operator.index(keep_best) < 0:
            raise ParameterError(f"keep_best is at least 0, got {keep_best}")
        if mode not in ("min", "max"):
            raise ParameterError(f"mode is 'min' or 'max', got {mode!r}")
        self.folder = Path(folder)
        self.keep_last = keep_last
        self.keep_best = keep_best
        self.mode = mode

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step lies, or would."""
        return self.folder / f"step-{step:08d}.safetensors"

    def steps(self) -> list[int]:
        """The steps that there are checkpoints of, in order."""
        if not self.folder.is_dir():
            return []
        names = (_NAME.fullmatch(path.name) for path in self.folder.iterdir())
        return sorted(int(name[1]) for name in names if name)

    def save(self, step: int, state: Mapping[str, Any], metric: float | None = None) -> Path:
        """Write the checkpoint of a step, then delete those that need not stay.

        Raises what :func:`gpugrad.io.save` and :func:`gpugrad.io.pack` raise.
        """
        if operator.index(step) < 0:
            raise ParameterError(f"a step is at least 0, got {step}")
        tensors, metadata = pack(state)
        metadata["step"] = str(step)
        if metric is not None:
            metadata["metric"] = repr(float(metric))
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(
                f"{self.folder}: cannot make this folder: {error.strerror or error}"
            ) from error
        path = self.path(step)
        save(path, tensors, metadata)
        self._clean(step)
        return path

    def load(self, step: int | None = None) -> dict[str, Any]:
        """The state of a step, or of the newest checkpoint that is whole.

        Damaged ones are passed over with a warning. Raises CheckpointNotFoundError when none is
        left, and for a given step what :func:`gpugrad.io.load` and :func:`gpugrad.io.unpack` raise.
        """
        if step is not None:
            return unpack(*load(self.path(step)))
        damaged = []
        for newest in reversed(self.steps()):
            try:
                return unpack(*load(self.path(newest)))
            except (CheckpointCorruptError, CheckpointNotFoundError) as error:
                damaged.append(str(error))
                warnings.warn(f"passed over: {error}", RuntimeWarning, stacklevel=2)
        raise CheckpointNotFoundError(
            "\n  ".join((f"{self.folder}: no whole checkpoint is in this folder", *damaged))
        )

    def best(self) -> int | None:
        """The step with the best metric; of equals the latest. None when no metric was given."""
        ranked = self._ranked()
        return ranked[0] if ranked else None

    def _ranked(self) -> list[int]:
        """Steps with a metric, the best first. Files whose header is damaged have none."""
        sign = 1.0 if self.mode == "min" else -1.0
        found = []
        for step in self.steps():
            try:
                metric = float(read_metadata(self.path(step)).get("metric", "nan"))
            except (CheckpointError, ValueError):
                continue
            if not math.isnan(metric):
                found.append((sign * metric, -step))
        return [-step for _, step in sorted(found)]

    def _clean(self, saved: int) -> None:
        """Delete what need not stay, and what killed processes have left behind."""
        for orphan in self.folder.glob(".gpugrad-*.tmp"):
            orphan.unlink(missing_ok=True)
        if self.keep_last is None:
            return
        steps = self.steps()
        stay = {saved, *steps[-self.keep_last :], *self._ranked()[: self.keep_best]}
        for step in steps:
            if step not in stay:
                self.path(step).unlink(missing_ok=True)


_NAME = re.compile(r"step-(\d{8,})\.safetensors")
