"""What was measured while a model was trained: per layer and step, in memory and on disk."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TextIO

import numpy as np
from numpy.typing import NDArray

from gpugrad.health.errors import RecordError

__all__ = ["SCALARS", "STATISTICS", "Record", "Writer"]

#: One float32 per layer and recorded step; NaN where it is not known. Norms, means and extremes are
#: those of the finite elements.
STATISTICS = (
    "gradient_norm",  # L2 norm of the gradients of the layer's own parameters
    "gradient_max",  # largest |g|
    "gradient_nonfinite",  # how many elements of g are NaN or infinite
    "gradient_zeros",  # fraction of g that is exactly 0
    "parameter_norm",
    "parameter_min",
    "parameter_max",
    "update_ratio",  # |p_after - p_before| / |p_before|
    "activation_mean",
    "activation_std",
    "activation_min",
    "activation_max",
    "activation_nonfinite",
    "saturated",  # fraction of outputs at which the activation's slope is < 1 % of its largest
    "dead",  # fraction of units whose output is 0 for the whole batch
    "signal",  # root mean square of dLoss/d(output of the layer)
    # Of recurrent layers: what a gradient that goes back through time is multiplied by at each time
    # step; how many steps it can go; and how many it has to, from the outputs that the loss uses.
    "time_growth",
    "time_steps",
    "time_away",
)

#: One float32 per recorded step: the norm is the one before clipping.
SCALARS = ("loss", "lr", "norm", "coefficient")

FORMAT, VERSION = "gpugrad-health", 1

#: Bytes of the rows in memory, by default.
MEMORY = 900_000

#: Rows from the start that are always kept, and the fewest rows that there is room for.
FIRST, FEWEST = 8, 32

#: A loss or a norm that changes by this factor between two rows is a change worth keeping.
JUMP = 10.0


#: What a header may tell besides.
_MORE = ("frozen", "chance", "narrow")


class Record:
    """Statistics of the layers of a model over the steps of its training.

    Parameters
    ----------
    layers:
        Paths of the layers, in the order of the forward pass.
    kinds:
        Their class names.
    frozen:
        Paths of those layers whose parameters are not trained, on purpose.
    chance:
        The loss of the best constant answer, None where that is not known.
    narrow:
        Whether something is computed in float16 or bfloat16, None where that is not known.
    memory:
        Bytes that the rows may take. When they are full, every other row goes, and from then on
        every other row is kept: the steps that remain are spread evenly over the whole run. The
        first few, the latest, and those on either side of a sudden change stay.

    Attributes
    ----------
    steps:
        The recorded steps, int64 [n], ascending; 1 is the first.
    values:
        Statistic (see `STATISTICS`) → float32 [n, layers]; NaN where it is not known.
    scalars:
        Scalar (see `SCALARS`) → float32 [n].

    >>> record = Record(["0", "1"], ["Linear", "Tanh"])
    >>> record.append(1, {"gradient_norm": [0.5, float("nan")]}, {"loss": 2.0})
    >>> record.append(2, {"gradient_norm": [0.25, float("nan")]}, {"loss": 1.0})
    >>> record.steps, record.values["gradient_norm"][:, 0], record.scalars["loss"]
    (array([1, 2]), array([0.5 , 0.25], dtype=float32), array([2., 1.], dtype=float32))
    """

    def __init__(
        self,
        layers: Sequence[str],
        kinds: Sequence[str] | None = None,
        *,
        frozen: Collection[str] = (),
        chance: float | None = None,
        narrow: bool | None = None,
        memory: int = MEMORY,
    ) -> None:
        self.layers = list(layers)
        self.kinds = [""] * len(self.layers) if kinds is None else list(kinds)
        self.frozen = [path for path in self.layers if path in frozen]
        self.chance = chance
        self.narrow = narrow
        if len(self.kinds) != len(self.layers):
            raise RecordError(
                f"Record: {len(self.layers)} layers and {len(self.kinds)} kinds; give one class "
                "name per layer"
            )
        width = len(STATISTICS) * len(self.layers) + len(SCALARS)
        self._room = max(FEWEST, memory // (4 * width))
        self._rows = np.empty((0, width), np.float32)  # grows up to the room
        self._steps = np.empty(0, np.int64)
        self._numbers = np.empty(0, np.int64)  # which of all rows that were appended it is
        self._kept: set[int] = set()  # numbers of rows around changes
        self._n = 0
        self._appended = 0
        self._stride = 1
        self._writer: Writer | None = None

    def __len__(self) -> int:
        return self._n

    def __repr__(self) -> str:
        last = f", up to step {self._steps[self._n - 1]}" if self._n else ""
        return f"Record({len(self.layers)} layers, {self._n} rows{last})"

    # -- looking ----------------------------------------------------------------------------------

    @property
    def steps(self) -> NDArray[np.int64]:
        """The recorded steps, ascending."""
        return self._steps[: self._n]

    @property
    def values(self) -> dict[str, NDArray[np.float32]]:
        """Every statistic as an array [rows, layers]: views, valid until the next row."""
        many = len(self.layers)
        rows = self._rows[: self._n]
        return {name: rows[:, i * many : (i + 1) * many] for i, name in enumerate(STATISTICS)}

    @property
    def scalars(self) -> dict[str, NDArray[np.float32]]:
        """Every scalar as an array [rows]: views, valid until the next row."""
        at = len(STATISTICS) * len(self.layers)
        return {name: self._rows[: self._n, at + i] for i, name in enumerate(SCALARS)}

    @property
    def nbytes(self) -> int:
        """Bytes of the rows in memory."""
        return self._rows.nbytes + self._steps.nbytes + self._numbers.nbytes

    # -- adding -----------------------------------------------------------------------------------

    def append(
        self,
        step: int,
        values: Mapping[str, Sequence[float] | NDArray[Any]],
        scalars: Mapping[str, float],
    ) -> None:
        """Add what was measured in a step; what is not given is not known.

        Raises RecordError for an unknown name, another number of layers than there are, and a step
        that is not after the last one.
        """
        many = len(self.layers)
        row = np.full(self._rows.shape[1], np.nan, np.float32)
        with np.errstate(over="ignore"):  # beyond float32 is infinite
            for name, numbers in values.items():
                at = _index(STATISTICS, name, "statistic") * many
                if len(numbers) != many:
                    raise RecordError(
                        f"Record.append: {name} has {len(numbers)} numbers for {many} layers"
                    )
                row[at : at + many] = numbers
            for name, number in scalars.items():
                row[len(STATISTICS) * many + _index(SCALARS, name, "scalar")] = number
        self._append(int(step), row)

    def _append(self, step: int, row: NDArray[np.float32]) -> None:
        if self._n and step <= self._steps[self._n - 1]:
            raise RecordError(
                f"Record.append: step {step} is not after step {self._steps[self._n - 1]}"
            )
        if self._writer is not None:
            self._writer.write(step, row)
        if self._n:
            latest = self._n - 1
            if _jumps(self._rows[latest], row, len(self.layers)):
                self._keep(int(self._numbers[latest]), self._appended)
            # The latest row is always there; whether it stays is known now.
            if not self._stays(int(self._numbers[latest])):
                self._n = latest
        if self._n == self._room:
            self._thin()
        if self._n == len(self._steps):
            self._grow()
        self._steps[self._n] = step
        self._rows[self._n] = row
        self._numbers[self._n] = self._appended
        self._n += 1
        self._appended += 1

    def _keep(self, *numbers: int) -> None:
        if len(self._kept) + len(numbers) <= self._room // 4:
            self._kept.update(numbers)

    def _stays(self, number: int) -> bool:
        return number < FIRST or number % self._stride == 0 or number in self._kept

    def _thin(self) -> None:
        while self._n == self._room:
            self._stride *= 2
            stay = [i for i in range(self._n) if self._stays(int(self._numbers[i]))]
            n = len(stay)
            for array in (self._rows, self._steps, self._numbers):
                array[:n] = array[stay]
            self._n = n

    def _grow(self) -> None:
        size = min(self._room, max(FEWEST, 2 * len(self._steps)))
        rows = np.empty((size, self._rows.shape[1]), np.float32)
        steps, numbers = np.empty(size, np.int64), np.empty(size, np.int64)
        n = self._n
        rows[:n], steps[:n], numbers[:n] = self._rows[:n], self._steps[:n], self._numbers[:n]
        self._rows, self._steps, self._numbers = rows, steps, numbers

    # -- files ------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write every row: a header, then one line of JSON a step, 6 significant digits.

        NaN is null, infinities are the strings "inf" and "-inf".
        """
        with Path(path).open("w", encoding="utf-8") as file:
            file.write(self._header())
            for i in range(self._n):
                file.write(self._line(int(self._steps[i]), self._rows[i]))

    def writer(self, path: str | os.PathLike[str], *, append: bool = False) -> Writer:
        """Write every row, and each that will be added, when it comes; close it in the end.

        Unlike the rows in memory, those in the file stay: it is as long as the run. With `append`
        the file holds the rows so far already.
        """
        if self._writer is not None:
            raise RecordError(f"Record.writer: the rows go to {self._writer.path} already")
        self._writer = Writer(self, path, append)
        return self._writer

    @classmethod
    def resume(cls, path: str | os.PathLike[str], step: int, *, memory: int = MEMORY) -> Record:
        """The record in a file up to a step, to go on with; later rows are taken out of the file.

        Raises RecordError as `load` does.
        """
        old = cls.load(path)
        record = cls(
            old.layers, old.kinds, frozen=old.frozen, chance=old.chance, narrow=old.narrow,
            memory=memory,
        )  # fmt: skip
        draft = Path(f"{os.fspath(path)}.part")
        with draft.open("w", encoding="utf-8") as file:
            file.write(old._header())
            for i in range(int(np.searchsorted(old.steps, step, "right"))):
                file.write(old._line(int(old.steps[i]), old._rows[i]))
                record._append(int(old.steps[i]), old._rows[i])
        draft.replace(path)
        return record

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, memory: int = 64_000_000) -> Record:
        """Read what `save` or `writer` wrote, also of a run that was killed.

        A last line that was cut short is dropped. `memory` is that of the record; a longer file is
        thinned. RecordError if the file is none, damaged, or from a newer version.
        """
        with Path(path).open(encoding="utf-8", errors="replace") as file:
            lines = iter(file)
            header = _header(next(lines, ""), str(path))
            told = {key: header[key] for key in _MORE if key in header}
            record = cls(header["layers"], header["kinds"], **told, memory=memory)
            for step, row in record._read(lines, str(path)):
                record._append(step, row)
        return record

    def _read(self, lines: Iterator[str], path: str) -> Iterator[tuple[int, NDArray[np.float32]]]:
        many = len(self.layers)
        for number, line in enumerate(lines, 2):
            try:
                found = json.loads(line)
                row = np.full(self._rows.shape[1], np.nan, np.float32)
                for i, name in enumerate(STATISTICS):
                    if name in found:
                        row[i * many : (i + 1) * many] = _numbers(found[name], many)
                for i, name in enumerate(SCALARS, len(STATISTICS) * many):
                    row[i] = _number(found.get(name))
                step = int(found["step"])
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                if next(lines, None) is None:  # cut short
                    return
                raise RecordError(f"{path}, line {number} is damaged: {error}") from None
            yield step, row

    def _header(self) -> str:
        head = {"format": FORMAT, "version": VERSION, "layers": self.layers, "kinds": self.kinds}
        more = {key: value for key in _MORE if (value := getattr(self, key)) not in (None, [])}
        return json.dumps({**head, **more}) + "\n"

    def _line(self, step: int, row: NDArray[np.float32]) -> str:
        many = len(self.layers)
        line: dict[str, Any] = {"step": step}
        known = ~np.isnan(row)
        numbers = _rounded(row)
        at = len(STATISTICS) * many
        for i, name in enumerate(SCALARS, at):
            if known[i]:
                line[name] = numbers[i]
        for i, name in enumerate(STATISTICS):
            if known[i * many : (i + 1) * many].any():
                line[name] = numbers[i * many : (i + 1) * many]
        return json.dumps(line) + "\n"


class Writer:
    """Writes the rows of a record to a file as they come; see `Record.writer`."""

    def __init__(self, record: Record, path: str | os.PathLike[str], append: bool) -> None:
        self.path = str(path)
        self._record = record
        mode: Literal["a", "w"] = "a" if append else "w"
        file = Path(path).open(mode, encoding="utf-8")  # noqa: SIM115
        self._file: TextIO | None = file
        if not append:
            file.write(record._header())
            for i in range(len(record)):
                file.write(record._line(int(record.steps[i]), record._rows[i]))
            file.flush()

    def write(self, step: int, row: NDArray[np.float32]) -> None:
        """Write one row, so that it is there when the program is killed."""
        assert self._file is not None
        self._file.write(self._record._line(step, row))
        self._file.flush()

    def close(self) -> None:
        """Close the file; rows to come are in memory alone."""
        if self._file is not None:
            self._file.close()
            self._file = None
            self._record._writer = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _index(names: tuple[str, ...], name: str, what: str) -> int:
    try:
        return names.index(name)
    except ValueError:
        raise RecordError(
            f"Record.append: {name!r} is no {what}; there are {', '.join(names)}"
        ) from None


def _jumps(before: NDArray[np.float32], now: NDArray[np.float32], many: int) -> bool:
    """Whether something happened: numbers went bad, or loss or norm changed by a large factor."""
    at = len(STATISTICS) * many
    for i in (at + SCALARS.index("loss"), at + SCALARS.index("norm")):
        a, b = abs(float(before[i])), abs(float(now[i]))
        if math.isfinite(a) != math.isfinite(b) or a > JUMP * b > 0.0 or b > JUMP * a > 0.0:
            return True
    bad = [_bad(row, many) for row in (before, now)]
    return bad[0] != bad[1]


def _bad(row: NDArray[np.float32], many: int) -> bool:
    return any(
        bool((row[i * many : (i + 1) * many] > 0).any())
        for i in (STATISTICS.index("gradient_nonfinite"), STATISTICS.index("activation_nonfinite"))
    )


def _rounded(row: NDArray[np.float32]) -> list[Any]:
    """Numbers of 6 significant digits, as JSON has them."""
    x = row.astype(np.float64)
    finite = np.isfinite(x)
    size = np.abs(np.where(finite & (x != 0), x, 1.0))
    scale = 10.0 ** (5.0 - np.floor(np.log10(size)))
    numbers: list[Any] = (np.rint(np.where(finite, x, 0.0) * scale) / scale).tolist()
    for i in np.flatnonzero(~finite).tolist():
        numbers[i] = None if math.isnan(x[i]) else str(x[i])
    return numbers


def _numbers(found: Iterable[Any], many: int) -> list[float]:
    numbers = [_number(x) for x in found]
    if len(numbers) != many:
        raise ValueError(f"{len(numbers)} numbers for {many} layers")
    return numbers


def _number(x: Any) -> float:
    return math.nan if x is None else float(x)


def _header(line: str, path: str) -> dict[str, Any]:
    try:
        header = json.loads(line)
        ours = header["format"] == FORMAT
        version = int(header["version"])
    except (ValueError, KeyError, TypeError):
        ours, version, header = False, 0, {}
    if not ours:
        raise RecordError(
            f"{path} is no record of gradient health: its first line is no header of one"
        )
    if version > VERSION:
        raise RecordError(
            f"{path} is a record of version {version}, and this gpugrad reads up to version "
            f"{VERSION}; update gpugrad"
        )
    return header  # type: ignore[no-any-return]
