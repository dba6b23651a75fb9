"""Measurements of a run as event files, which TensorBoard shows as curves and histograms."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np

from gpugrad.core.conversion import asarray
from gpugrad.core.tensor import Tensor
from gpugrad.errors import GpugradError

__all__ = ["TensorBoard", "TensorBoardError"]

#: Intervals of equal width that a histogram counts in.
BINS = 64

#: Seconds after which at the latest what was written can be seen.
FLUSH = 10


class TensorBoardError(GpugradError, RuntimeError):
    """Event files that cannot be written: no package for them, no folder, or closed already."""


class TensorBoard:
    """Writes event files into a folder, by tensorboardX or, without it, by TensorBoard itself.

    Parameters
    ----------
    folder:
        Where the files lie; it is made if need be. `tensorboard --logdir FOLDER` shows them.

    A context manager that closes at its end. Each method takes the number of the step, by which
    values of one name are put in order; a slash in a name makes a group.

    Raises TensorBoardError when neither package is installed, for a folder that cannot be made, and
    for a call after `close`.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:  # doctest: +SKIP
    ...     with TensorBoard(folder) as board:
    ...         board.scalars({"train/loss": 0.5, "train/accuracy": 0.8}, step=1)
    """

    def __init__(self, folder: str | Path) -> None:
        kind = _writer_class()
        self.folder = Path(folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TensorBoardError(
                f"{folder}: cannot make this folder: {error.strerror or error}"
            ) from error
        self._writer: _Writer | None = kind(str(self.folder))

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """One number for each name; NaN and infinity are shown as what they are."""
        writer = self._open()
        for name, value in values.items():
            writer.scalar(name, float(value), step)

    def histogram(self, name: str, array: Any, step: int) -> None:
        """How the elements of a tensor or an array are distributed, from the least to the greatest.

        NaN and infinity are left out. Nothing is written for an array that has no other element.
        """
        writer = self._open()
        found = _count(array)
        if found is not None:
            writer.histogram(name, found, step)

    def text(self, name: str, text: str, step: int) -> None:
        """A text, in Markdown."""
        self._open().text(name, text, step)

    def close(self) -> None:
        """Write what is left; a second call does nothing."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _open(self) -> _Writer:
        if self._writer is None:
            raise TensorBoardError(f"{self.folder}: closed already; make another TensorBoard")
        return self._writer

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


@dataclass(frozen=True)
class _Counts:
    """A histogram: upper ends of its intervals and how many elements are in each; moments."""

    least: float
    greatest: float
    limits: list[float]
    counts: list[int]
    number: int
    sum: float
    sum_of_squares: float


def _count(array: Any) -> _Counts | None:
    host = array.detach().cpu().numpy() if isinstance(array, Tensor) else asarray(array).numpy()
    x = host.reshape(-1).astype(np.float64)
    x = x[np.isfinite(x)]
    if not x.size:
        return None
    least, greatest = float(x.min()), float(x.max())
    with np.errstate(over="ignore", invalid="ignore"):
        ends = np.linspace(least, greatest, BINS + 1)
        if not (np.diff(ends) > 0).all():  # all elements are equal, or as good as that
            ends = np.array([least, greatest])
            counts = np.array([x.size])
        else:
            counts, _ = np.histogram(x, ends)
        moments = float(x.sum()), float(x @ x)
    return _Counts(least, greatest, ends[1:].tolist(), counts.tolist(), x.size, *moments)


# -- the two packages -----------------------------------------------------------------------------


class _Writer(Protocol):
    """What is asked of a package."""

    def __init__(self, folder: str) -> None: ...

    def scalar(self, name: str, value: float, step: int) -> None: ...

    def histogram(self, name: str, found: _Counts, step: int) -> None: ...

    def text(self, name: str, text: str, step: int) -> None: ...

    def close(self) -> None: ...


def _writer_class() -> type[_Writer]:
    for kind in (_ByTensorboardX, _ByTensorboard):
        try:
            kind.load()
        except ImportError:
            continue
        return kind
    raise TensorBoardError(
        "event files need tensorboardX or tensorboard, and neither is installed; "
        "pip install 'gpugrad[tensorboard]'"
    )


class _ByTensorboardX:
    @staticmethod
    def load() -> Any:
        from tensorboardX import SummaryWriter

        return SummaryWriter

    def __init__(self, folder: str) -> None:
        self._writer = self.load()(folder, flush_secs=FLUSH)

    def scalar(self, name: str, value: float, step: int) -> None:
        self._writer.add_scalar(name, value, step)

    def histogram(self, name: str, found: _Counts, step: int) -> None:
        self._writer.add_histogram_raw(
            name, found.least, found.greatest, found.number, found.sum, found.sum_of_squares,
            found.limits, found.counts, step,
        )  # fmt: skip

    def text(self, name: str, text: str, step: int) -> None:
        self._writer.add_text(name, text, step)

    def close(self) -> None:
        self._writer.close()


class _ByTensorboard:
    """The same events, put together here."""

    @staticmethod
    def load() -> Any:
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        return EventFileWriter

    def __init__(self, folder: str) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2, tensor_pb2, types_pb2

        self._events: Any = event_pb2
        self._summaries: Any = summary_pb2
        self._tensors: Any = tensor_pb2
        self._string = types_pb2.DT_STRING
        self._writer = self.load()(folder, flush_secs=FLUSH)

    def _add(self, name: str, step: int, **value: Any) -> None:
        summary = self._summaries.Summary(value=[self._summaries.Summary.Value(tag=name, **value)])
        self._writer.add_event(
            self._events.Event(wall_time=time.time(), step=step, summary=summary)
        )

    def scalar(self, name: str, value: float, step: int) -> None:
        self._add(name, step, simple_value=value)

    def histogram(self, name: str, found: _Counts, step: int) -> None:
        histogram = self._summaries.HistogramProto(
            min=found.least, max=found.greatest, num=found.number, sum=found.sum,
            sum_squares=found.sum_of_squares, bucket_limit=found.limits, bucket=found.counts,
        )  # fmt: skip
        self._add(name, step, histo=histogram)

    def text(self, name: str, text: str, step: int) -> None:
        plugin = self._summaries.SummaryMetadata.PluginData(plugin_name="text")
        # tensorboardX gives this name, and both are to show in one place.
        self._add(
            f"{name}/text_summary", step,
            metadata=self._summaries.SummaryMetadata(plugin_data=plugin),
            tensor=self._tensors.TensorProto(
                dtype=self._string, string_val=[text.encode()],
                tensor_shape={"dim": [{"size": 1}]},
            ),
        )  # fmt: skip

    def close(self) -> None:
        self._writer.close()
