"""The course of a training run: epochs, measurements, checkpoints, and going on from one."""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from gpugrad import io
from gpugrad import ops as gg
from gpugrad.cli.config import Config, ConfigError, build_net, build_optimizer, option
from gpugrad.cli.threads import serial_blas
from gpugrad.core.conversion import asarray
from gpugrad.core.modes import no_grad
from gpugrad.core.tensor import Tensor
from gpugrad.data import Dataset, batches
from gpugrad.errors import GpugradError
from gpugrad.nn import functional as F
from gpugrad.nn.random import default_generator, manual_seed

__all__ = ["DivergedError", "ResumeError", "Run", "RunError", "Watch", "resume", "start"]

CHECKPOINT = "checkpoint.safetensors"
METRICS = "metrics.jsonl"

#: Steps between two readings of loss, accuracy and norm from the device.
READ_EVERY = 50

#: Options that a resumed run may set anew; the others would make it another run.
# The data are told by what they hold, not by their path.
CHANGEABLE = (
    "data",
    "epochs",
    "lr",
    "lr_decay",
    "momentum",
    "weight_decay",
    "label_smoothing",
    "clip",
)


class RunError(GpugradError, RuntimeError):
    """A run that cannot start, or cannot go on."""


class DivergedError(RunError):
    """The loss is no longer a finite number. `epoch` and `step` say since when, counted from 1."""

    def __init__(self, message: str, epoch: int, step: int) -> None:
        super().__init__(message)
        self.epoch = epoch
        self.step = step


class ResumeError(RunError):
    """A checkpoint of another run: `differences` says, item by item, in what it differs."""

    def __init__(self, message: str, differences: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.differences = differences


@dataclass(frozen=True)
class Reading:
    """What the latest steps brought: means of loss and accuracy, norm of the last gradient."""

    epoch: int
    step: int
    steps: int
    loss: float
    accuracy: float
    grad_norm: float
    samples_per_second: float


class Watch(Protocol):
    """Who wants to know how a run goes."""

    def reading(self, reading: Reading) -> None:
        """Called on the reading schedule, several times an epoch."""

    def epoch(self, row: Mapping[str, Any]) -> None:
        """Called after every epoch with the line that goes into metrics.jsonl."""


class _Sums:
    """What is added up over one epoch, so that it survives an interruption in the middle."""

    def __init__(self, values: Mapping[str, float] | None = None) -> None:
        self.seen = 0
        self.loss = self.correct = self.norm = self.greatest_norm = self.seconds = 0.0
        for name, value in (values or {}).items():
            setattr(self, name, value)


class Run:
    """A net, its optimiser and its data, somewhere between the first and the last epoch.

    Made by `start` and `resume`. `history` holds one row of measurements per finished epoch.
    """

    def __init__(self, config: Config, data: Dataset, device: str, folder: Path) -> None:
        self.config = config
        self.data = data
        self.device = device
        self.folder = folder
        self.epoch = 0  # epochs finished
        self.step = 0  # steps done in the epoch that runs
        self.sums = _Sums()
        self.history: list[dict[str, Any]] = []
        manual_seed(config.seed)
        self.net = build_net(config, math.prod(data.feature_shape), data.classes).to(device)
        self.optimizer = build_optimizer(config, self.net)
        self.train_x = data.train_x.reshape(len(data.train_x), -1).astype(config.dtype, copy=False)
        self.test_x = data.test_x.reshape(len(data.test_x), -1).astype(config.dtype, copy=False)
        self._fingerprint: str | None = None
        self._unread: list[tuple[int, Tensor, Tensor, Tensor]] = []

    @property
    def checkpoint(self) -> Path:
        """Where the latest checkpoint lies."""
        return self.folder / CHECKPOINT

    @property
    def steps(self) -> int:
        """Steps of one epoch."""
        return math.ceil(len(self.train_x) / self.config.batch_size)

    @property
    def lr(self) -> float:
        """The learning rate of the epoch that runs."""
        return self.config.lr * self.config.lr_decay**self.epoch

    # -- training ---------------------------------------------------------------------------------

    def train(self, watch: Watch, stop: Callable[[], bool] = lambda: False) -> bool:
        """Train until the last epoch; False when `stop` said so before.

        Whenever it ends without an error, a checkpoint of exactly this point is on the disk.

        Raises DivergedError when the loss is no longer finite; the last checkpoint stays.
        """
        # Overflow is no surprise here: a loss that is not finite ends the run with an explanation.
        with np.errstate(over="ignore", invalid="ignore"), serial_blas(self._largest_product()):
            return self._train(watch, stop)

    def _train(self, watch: Watch, stop: Callable[[], bool]) -> bool:
        self._write_metrics()
        while self.epoch < self.config.epochs:
            if not self._train_epoch(watch, stop):
                self.save()
                return False
            row = self._measure()
            self.history.append(row)
            self.epoch += 1
            self.step = 0
            self.sums = _Sums()
            self.save()
            self._append_metrics(row)
            watch.epoch(row)
            if stop() and self.epoch < self.config.epochs:
                return False
        return True

    def _largest_product(self) -> int:
        sizes = (p.size for p in self.net.parameters() if p.ndim == 2)
        return self.config.batch_size * max(sizes)

    def _train_epoch(self, watch: Watch, stop: Callable[[], bool]) -> bool:
        config = self.config
        # A generator of its own for every epoch: an order depends on nothing that came before.
        rng = np.random.default_rng([config.seed, self.epoch])
        order = batches(self.train_x, self.data.train_y, config.batch_size, rng=rng)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr
        read_at = time.perf_counter()
        for x, y in islice(order, self.step, None):
            self._train_step(x, y)
            self.step += 1
            stopping = stop()
            if stopping or self.step % READ_EVERY == 0 or self.step == self.steps:
                now = time.perf_counter()
                self.sums.seconds += now - read_at
                watch.reading(self._read(now - read_at))
                read_at = now
            if stopping and self.step < self.steps:
                return False
        return True

    def _train_step(self, x: Any, y: Any) -> None:
        """One step, in which nothing is read from the device."""
        inputs = asarray(x, device=self.device)
        labels = asarray(y, device=self.device)
        logits = self.net(inputs)
        loss = F.cross_entropy(logits, labels, label_smoothing=self.config.label_smoothing)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step(clip=self.config.clip or math.inf)
        norm = self.optimizer.last_norm
        assert norm is not None
        self._unread.append((len(y), loss.detach(), _correct(logits.detach(), labels), norm))

    def _read(self, seconds: float) -> Reading:
        """Bring what was measured since the last reading to the host."""
        sizes, losses, corrects, norms = zip(*self._unread)
        self._unread = []
        loss, correct, norm = (_read_together(x) for x in (losses, corrects, norms))
        if not np.isfinite(loss).all():
            first = self.step - len(loss) + int(np.argmin(np.isfinite(loss))) + 1
            raise self._diverged(first, float(loss[~np.isfinite(loss)][0]))
        size = np.asarray(sizes)
        sums = self.sums
        sums.seen += int(size.sum())
        sums.loss += float((size * loss).sum())
        sums.correct += float(correct.sum())
        sums.norm += float(norm.sum())
        sums.greatest_norm = max(sums.greatest_norm, float(norm.max()))
        return Reading(
            self.epoch + 1,
            self.step,
            self.steps,
            float((size * loss).sum() / size.sum()),
            float(correct.sum() / size.sum()),
            float(norm[-1]),
            int(size.sum()) / max(seconds, 1e-9),
        )

    def _diverged(self, step: int, loss: float) -> DivergedError:
        message = (
            f"training diverged: the loss became {loss} in epoch {self.epoch + 1} at step {step}; "
            f"lower --lr (now {self.config.lr:g}), or bound the gradients with --clip (now "
            f"{self.config.clip or 'off'})"
        )
        if self.checkpoint.exists():
            message += f". The last checkpoint, {self.checkpoint}, is from before"
        return DivergedError(message, self.epoch + 1, step)

    def _measure(self) -> dict[str, Any]:
        """The row of the epoch that has just ended."""
        sums = self.sums
        test_loss, test_accuracy = self.test()
        return {
            "epoch": self.epoch + 1,
            "steps": self.step,
            "lr": self.lr,
            "loss": sums.loss / sums.seen,
            "train_accuracy": sums.correct / sums.seen,
            "test_loss": test_loss,
            "test_accuracy": test_accuracy,
            "grad_norm": sums.norm / self.step,
            "grad_norm_max": sums.greatest_norm,
            "seconds": sums.seconds,
            "samples_per_second": sums.seen / max(sums.seconds, 1e-9),
        }

    @no_grad()
    def test(self, batch_size: int = 1000) -> tuple[float, float]:
        """Mean loss and accuracy on the test set."""
        self.net.eval()
        losses, corrects = [], []
        for x, y in batches(self.test_x, self.data.test_y, batch_size, shuffle=False):
            labels = asarray(y, device=self.device)
            logits = self.net(asarray(x, device=self.device))
            losses.append(F.cross_entropy(logits, labels, reduction="sum"))
            corrects.append(_correct(logits, labels))
        self.net.train()
        count = len(self.test_x)
        return (
            float(_read_together(losses).sum()) / count,
            float(_read_together(corrects).sum()) / count,
        )

    # -- files ------------------------------------------------------------------------------------

    def save(self) -> None:
        """Put a checkpoint of this point in place of the last one, whole or not at all."""
        state = {
            "config": asdict(self.config),
            "data": self.described_data(),
            "epoch": self.epoch,
            "step": self.step,
            "sums": vars(self.sums),
            "rng": default_generator.state,
            "history": self.history,
            "model": _on_host(self.net.state_dict()),
            "optimizer": _on_host(self.optimizer.state_dict()),
        }
        io.save(self.checkpoint, *io.pack(state))

    def described_data(self) -> dict[str, Any]:
        """What tells one data set from another: shapes, and a digest of every value."""
        data = self.data
        if self._fingerprint is None:
            digest = hashlib.sha256()
            for x in (data.train_x, data.train_y, data.test_x, data.test_y):
                digest.update(np.ascontiguousarray(x).view(np.uint8).data)
            self._fingerprint = digest.hexdigest()
        return {
            "training examples": len(data.train_x),
            "test examples": len(data.test_x),
            "feature shape": list(data.feature_shape),
            "classes": data.classes,
            "sha256": self._fingerprint,
        }

    def _write_metrics(self) -> None:
        """Begin the file anew from the checkpoint, whatever an interrupted run left in it."""
        self._metrics("w", self.history)

    def _append_metrics(self, row: Mapping[str, Any]) -> None:
        self._metrics("a", [row])

    def _metrics(self, mode: str, rows: list[Any]) -> None:
        path = self.folder / METRICS
        try:
            with path.open(mode, encoding="utf-8") as file:
                for row in rows:
                    file.write(json.dumps(row) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise RunError(f"{path} could not be written: {error.strerror or error}") from error


def start(config: Config, data: Dataset, device: str, folder: Path) -> Run:
    """A new run in `folder`, which is made; RunError when there is one in it already."""
    if (folder / CHECKPOINT).exists():
        raise RunError(
            f"{folder} holds a run already; go on with it by --resume {folder}, or choose another "
            "--out"
        )
    _make_folder(folder)
    return Run(config, data, device, folder)


def resume(
    path: Path,
    data: Dataset,
    device: str,
    given: Mapping[str, Any],
    folder: Path | None = None,
) -> Run:
    """The run whose checkpoint is `path`, or lies in the folder `path`, at the point it was saved.

    `given` are options set on the command line: what decides how long and how fast to train takes
    the place of the stored value, anything else has to agree with it. `folder` is where the run
    goes on, by default where the checkpoint lies.

    Raises ResumeError, listing every difference, when options or data are those of another run.
    """
    path = path / CHECKPOINT if path.is_dir() else path
    state = io.unpack(*io.load(path))
    try:
        stored = Config(**state["config"])
        names = ("data", "epoch", "step", "sums", "rng", "history", "model", "optimizer")
        described, epoch, step, sums, rng, history, model, optimizer = (state[n] for n in names)
    except (KeyError, TypeError, ConfigError) as error:
        raise ResumeError(
            f"{path}: was not written by gpugrad train, or by another version of it ({error})"
        ) from error
    differences = [
        f"{option(name)}: {getattr(stored, name)} in the checkpoint, {value} now"
        for name, value in given.items()
        if name not in CHANGEABLE and value != getattr(stored, name)
    ]
    changed = {name: value for name, value in given.items() if name in CHANGEABLE}
    run = Run(replace(stored, **changed), data, device, folder or path.parent)
    differences += [
        f"{name} of the data: {described.get(name)} in the checkpoint, {value} now"
        for name, value in run.described_data().items()
        if described.get(name) != value
    ]
    if differences:
        raise ResumeError(
            "\n  ".join((f"{path} is of another run:", *differences)), tuple(differences)
        )
    if epoch >= run.config.epochs:
        raise ResumeError(
            f"{path}: all its epochs, {epoch}, are done; ask for more with --epochs {epoch + 10}"
        )
    run.net.load_state_dict(model)
    run.optimizer.load_state_dict(optimizer)
    for group in run.optimizer.param_groups:
        group.update({k: v for k, v in changed.items() if k in group and k != "lr"})
    run.epoch, run.step, run.sums, run.history = epoch, step, _Sums(sums), list(history)
    default_generator.state = tuple(rng)
    _make_folder(run.folder)
    return run


def free_folder(root: Path, name: str) -> Path:
    """The first of `root`/name-1, name-2, … that is not there yet."""
    numbers: Iterator[int] = iter(range(1, 1_000_000))
    return next(path for n in numbers if not (path := root / f"{name}-{n}").exists())


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{folder}: cannot make this folder: {error.strerror or error}") from error


def _correct(logits: Tensor, labels: Tensor) -> Tensor:
    """How many rows have their greatest score at the right class."""
    hits: Tensor = gg.sum(gg.equal(gg.argmax(logits, axis=1), labels))
    return hits


def _read_together(values: Any) -> np.ndarray[Any, Any]:
    """The values of many 0-d tensors, in one copy to the host."""
    together: Tensor = gg.stack(list(values))
    return together.numpy().astype(np.float64)


def _on_host(state: Any) -> Any:
    """Nested state with its tensors as NumPy arrays and its keys as strings."""
    if isinstance(state, Tensor):
        return state.detach().cpu().numpy()
    if isinstance(state, Mapping):
        return {str(key): _on_host(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(_on_host(value) for value in state)
    return state
