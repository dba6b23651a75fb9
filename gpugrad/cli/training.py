"""The course of a training run: epochs, measurements, checkpoints, and going on from one."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from gpugrad import health, io, optim
from gpugrad import ops as gg
from gpugrad.cli.config import Config, ConfigError, option
from gpugrad.cli.tasks import Task, task_of
from gpugrad.core.autocast import autocast
from gpugrad.core.compiling import compile
from gpugrad.core.modes import no_grad
from gpugrad.core.tensor import Tensor
from gpugrad.data.text import vocabulary_from
from gpugrad.errors import GpugradError
from gpugrad.nn.random import Generator, default_generator, manual_seed

__all__ = [
    "DivergedError",
    "Reading",
    "ResumeError",
    "Run",
    "RunError",
    "Watch",
    "load_run",
    "resume",
    "start",
    "stored_config",
]

CHECKPOINT = "checkpoint.safetensors"
BEST = "best.safetensors"
METRICS = "metrics.jsonl"
HEALTH = "health.jsonl"

#: Steps between two readings of loss, accuracy and norm from the device.
READ_EVERY = 50

#: Options that a resumed run may set anew; the others would make it another run.
# The data are told by what they hold, not by their path.
CHANGEABLE = ("data", *(f.name for f in fields(Config) if f.metadata.get("changeable")))


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
    lr: float


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


def _optimizer(config: Config, net: Any) -> optim.Optimizer:
    """The optimiser that a run asks for."""
    params, lr, decay = net.parameters(), config.lr, config.weight_decay
    match config.optimizer:
        case "sgd":
            return optim.SGD(params, lr, config.momentum, weight_decay=decay)
        case "rmsprop":
            return optim.RMSprop(params, lr, momentum=config.momentum, weight_decay=decay)
        case "adam":
            return optim.Adam(params, lr, weight_decay=decay)
        case "adagrad":
            return optim.Adagrad(params, lr, weight_decay=decay)
        case "lion":
            return optim.Lion(params, lr, weight_decay=decay)
        case _:
            return optim.AdamW(params, lr, weight_decay=decay)


def _scaled(net: Any, gain: float) -> Any:
    """The net, its weights (what has two axes or more) times a factor."""
    if gain != 1:
        with no_grad():
            for p in net.parameters():
                if p.ndim > 1:
                    p *= gain
    return net


class Run:
    """A net, its optimiser and its data, somewhere between the first and the last epoch.

    Made by `start` and `resume`. `history` holds one row of measurements per finished epoch.
    """

    def __init__(self, config: Config, task: Task, device: str, folder: Path) -> None:
        self.config = config
        self.task = task
        self.device = device
        self.folder = folder
        self.epoch = 0  # epochs finished
        self.step = 0  # steps done in the epoch that runs
        self.sums = _Sums()
        self.history: list[dict[str, Any]] = []
        manual_seed(config.seed)
        self.net = _scaled(task.net(config), config.gain).to(device)
        self.optimizer = _optimizer(config, self.net)
        self.scaler = optim.GradScaler(enabled=config.autocast == "float16")
        # A generator of its own: the order of examples depends on nothing else that is drawn.
        self.loader = task.loader(config, device, Generator(config.seed))
        self._forward = compile(self._loss_of) if config.compile else self._loss_of
        self._unread: list[tuple[int, Tensor, Tensor, Tensor]] = []
        self.monitor: health.Monitor | None = None

    @property
    def checkpoint(self) -> Path:
        """Where the latest checkpoint lies."""
        return self.folder / CHECKPOINT

    @property
    def steps(self) -> int:
        """Steps of one epoch."""
        return math.ceil(len(self.loader) / self.config.accumulate)

    @property
    def lr(self) -> float:
        """The learning rate of the step that comes next.

        A function of the step alone: a run that goes on, or is made longer, needs no other state.
        """
        config, done = self.config, self.epoch * self.steps + self.step
        if done < config.warmup:
            return config.lr * (done + 1) / config.warmup
        if config.schedule == "decay":
            return float(config.lr * config.lr_decay**self.epoch)
        if config.schedule == "constant":
            return config.lr
        whole = max(1, config.epochs * self.steps - config.warmup)
        share = min(1.0, (done - config.warmup) / whole)
        left = 1 - share if config.schedule == "linear" else (1 + math.cos(math.pi * share)) / 2
        return config.lr * left

    # -- training ---------------------------------------------------------------------------------

    def train(self, watch: Watch, stop: Callable[[], bool] = lambda: False) -> bool:
        """Train until the last epoch; False when `stop` said so before.

        Whenever it ends without an error, a checkpoint of exactly this point is on the disk.

        Raises DivergedError when the loss is no longer finite; the last checkpoint stays.
        """
        # Overflow is no surprise here: a loss that is not finite ends the run with an explanation.
        with np.errstate(over="ignore", invalid="ignore"), self._monitored():
            return self._train(watch, stop)

    @contextmanager
    def _monitored(self) -> Iterator[None]:
        """Record the health of the steps inside, if that is asked for."""
        if not self.config.health:
            yield
            return
        self.monitor = health.Monitor(
            self.net, self.optimizer, every=self.config.health_every, path=self.folder / HEALTH,
            chance=math.log(max(2, self.task.answers)),
        )  # fmt: skip
        self.monitor.start(after=self.epoch * self.steps + self.step)
        try:
            yield
        finally:
            self.monitor.stop()

    def _train(self, watch: Watch, stop: Callable[[], bool]) -> bool:
        self._write_metrics()
        while not self.finished:
            if not self._train_epoch(watch, stop):
                self.save()
                return False
            row = self._measure()
            self.history.append(row)
            self.epoch += 1
            self.step = 0
            self.sums = _Sums()
            self.save()
            if row["test_loss"] == min(r["test_loss"] for r in self.history):
                self._save_best()
            self._append_metrics(row)
            watch.epoch(row)
            if stop() and not self.finished:
                return False
        return True

    @property
    def finished(self) -> bool:
        """Whether the last epoch is over, or the test loss has not fallen for too long."""
        return self.epoch >= self.config.epochs or self.stalled

    @property
    def stalled(self) -> bool:
        """Whether the test loss has not fallen for as many epochs as there is patience."""
        losses = [row["test_loss"] for row in self.history]
        if not losses or not self.config.patience:
            return False
        return len(losses) - 1 - losses.index(min(losses)) >= self.config.patience

    def _train_epoch(self, watch: Watch, stop: Callable[[], bool]) -> bool:
        read_at = time.perf_counter()
        batches = iter(self.loader)
        while self.step < self.steps:
            self._train_step(batches)
            self.step += 1
            stopping = stop()
            if stopping or self.step % READ_EVERY == 0 or self.step == self.steps:
                now = time.perf_counter()
                self.sums.seconds += now - read_at
                watch.reading(self._read(now - read_at))
                read_at = now
            if stopping and self.step < self.steps:
                return False
        for _ in batches:  # the loader's own end of the epoch
            raise AssertionError("more batches than steps")
        return True

    def _train_step(self, batches: Iterator[tuple[Tensor, Tensor]]) -> None:
        """One step, in which nothing is read from the device."""
        config = self.config
        self.optimizer.zero_grad()
        count = min(config.accumulate, len(self.loader) - self.step * config.accumulate)
        found = []
        for _ in range(count):
            inputs, labels = next(batches)
            with self._cast():
                loss, correct = self._forward(inputs, labels)
            self.scaler.scale(loss / count if count > 1 else loss).backward()
            found.append((labels.size, loss.detach(), correct))
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr
        scaler = self.scaler if self.scaler.is_enabled() else None
        self.optimizer.step(clip=config.clip or math.inf, scaler=scaler, nonfinite=config.nonfinite)
        if self.monitor is not None:
            self.monitor.step(found[-1][1])
        norm = self.optimizer.last_norm
        assert norm is not None
        self._unread += [(*one, norm) for one in found]

    def _loss_of(self, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The loss, and how many answers are right."""
        scores = self.net(inputs)
        loss = self.task.loss(scores, labels, label_smoothing=self.config.label_smoothing)
        return loss, self.task.correct(scores.detach(), labels)

    def _cast(self) -> Any:
        narrow = self.config.autocast
        kind = self.device.partition(":")[0]
        # Other devices than these two have no products in narrow types of their own.
        if narrow == "off" or kind not in ("cpu", "cuda"):
            return nullcontext()
        return autocast(kind, dtype=narrow)

    def _read(self, seconds: float) -> Reading:
        """Bring what was measured since the last reading to the host."""
        sizes, losses, corrects, norms = zip(*self._unread)
        self._unread = []
        loss, correct, norm = (_read_together(x) for x in (losses, corrects, norms))
        if not np.isfinite(loss).all():
            behind = (len(loss) - int(np.argmin(np.isfinite(loss))) - 1) // self.config.accumulate
            raise self._diverged(self.step - behind, float(loss[~np.isfinite(loss)][0]))
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
            self.optimizer.param_groups[0]["lr"],
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
            "lr": self.optimizer.param_groups[0]["lr"],
            "loss": sums.loss / sums.seen,
            "train_accuracy": sums.correct / sums.seen,
            "test_loss": test_loss,
            "test_accuracy": test_accuracy,
            # Divided once: in parts, it would depend on where the epoch was interrupted.
            "grad_norm": sums.norm / (self.step * self.config.accumulate),
            "grad_norm_max": sums.greatest_norm,
            "seconds": sums.seconds,
            "samples_per_second": sums.seen / max(sums.seconds, 1e-9),
        }

    @no_grad()
    def test(self) -> tuple[float, float]:
        """Mean loss and accuracy on what is set apart for it."""
        self.net.eval()
        count, losses, corrects = 0, [], []
        try:
            for inputs, labels in self.task.test_batches(self.config, self.device):
                with self._cast():
                    scores = self.net(inputs)
                    losses.append(self.task.loss(scores, labels, reduction="sum"))
                corrects.append(self.task.correct(scores, labels))
                count += labels.size
        finally:
            self.net.train()
        return (
            float(_read_together(losses).sum()) / count,
            float(_read_together(corrects).sum()) / count,
        )

    # -- files ------------------------------------------------------------------------------------

    def save(self) -> None:
        """Put a checkpoint of this point in place of the last one, whole or not at all."""
        state = {
            "config": asdict(self.config),
            "data": self.task.described(),
            "task": self.task.kept(),
            "epoch": self.epoch,
            "step": self.step,
            "sums": vars(self.sums),
            "rng": default_generator.state,
            "history": self.history,
            "loader": self.loader.state_dict(),
            "model": self.net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }
        io.save(self.checkpoint, *io.pack(state))

    def _save_best(self) -> None:
        """Keep the net of the epoch with the least test loss, beside the checkpoint."""
        state = {
            "config": asdict(self.config),
            "task": self.task.kept(),
            "epoch": self.epoch,
            "model": self.net.state_dict(),
        }
        io.save(self.folder / BEST, *io.pack(state))

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


def start(config: Config, task: Task, device: str, folder: Path) -> Run:
    """A new run in `folder`, which is made; RunError when there is one in it already."""
    if (folder / CHECKPOINT).exists():
        raise RunError(
            f"{folder} holds a run already; go on with it by --resume {folder}, or choose another "
            "--out"
        )
    _make_folder(folder)
    return Run(config, task, device, folder)


def stored_config(path: Path) -> tuple[Config, dict[str, Any]]:
    """The configuration in a checkpoint, or in the one of a run's folder, and all of its state.

    Raises ResumeError for a file that `gpugrad train` has not written.
    """
    path = path / CHECKPOINT if path.is_dir() else path
    state = io.unpack(*io.load(path))
    try:
        return Config(**state["config"]), state
    except (KeyError, TypeError, ConfigError) as error:
        raise ResumeError(
            f"{path}: was not written by gpugrad train, or by another version of it ({error})"
        ) from error


def resume(
    path: Path,
    task: Task,
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
    stored, state = stored_config(path)
    names = (
        "data", "epoch", "step", "sums", "rng", "history", "loader", "model", "optimizer", "scaler",
    )  # fmt: skip
    if missing := [name for name in names if name not in state]:
        raise ResumeError(
            f"{path}: holds no whole run, {', '.join(missing)} of it are not there; go on from "
            f"{CHECKPOINT}"
        )
    differences = [
        f"{option(name)}: {getattr(stored, name)} in the checkpoint, {value} now"
        for name, value in given.items()
        if name not in CHANGEABLE and value != getattr(stored, name)
    ]
    described = state["data"]
    differences += [
        f"{name} of the data: {described.get(name)} in the checkpoint, {value} now"
        for name, value in task.described().items()
        if described.get(name) != value
    ]
    if differences:
        raise ResumeError(
            "\n  ".join((f"{path} is of another run:", *differences)), tuple(differences)
        )
    changed = {name: value for name, value in given.items() if name in CHANGEABLE}
    run = Run(replace(stored, **changed), task, device, folder or path.parent)
    run.epoch, run.history = state["epoch"], list(state["history"])
    if run.finished:
        raise ResumeError(
            f"{path}: its test loss has not fallen for {run.config.patience} epochs; give it more "
            f"with --patience {run.config.patience + 10}"
            if run.stalled
            else f"{path}: all its epochs, {run.epoch}, are done; ask for more with --epochs "
            f"{run.epoch + 10}"
        )
    run.net.load_state_dict(state["model"])
    run.optimizer.load_state_dict(state["optimizer"])
    run.scaler.load_state_dict(state["scaler"])
    run.loader.load_state_dict(state["loader"])
    for group in run.optimizer.param_groups:
        group.update({k: v for k, v in changed.items() if k in group and k != "lr"})
    run.step, run.sums = state["step"], _Sums(state["sums"])
    default_generator.state = tuple(state["rng"])
    _make_folder(run.folder)
    return run


def load_run(path: Path, device: str, data: str | None = None, data_dir: Path | None = None) -> Run:
    """The net of a run, to be looked at: of its best epoch if `path` is its folder."""
    file = path
    if path.is_dir():
        file = path / BEST if (path / BEST).exists() else path / CHECKPOINT
    config, state = stored_config(file)
    if data is not None:
        config = replace(config, data=data)
    # Tokens have to be the numbers that the net knows, whatever the text.
    known = state["task"].get("vocabulary")
    vocabulary = "characters" if known is None else vocabulary_from(known, str(file))
    run = Run(config, task_of(config, data_dir, vocabulary), device, path)
    run.net.load_state_dict(state["model"])
    run.epoch = state["epoch"]
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


def _read_together(values: Any) -> np.ndarray[Any, Any]:
    """The values of many 0-d tensors, in one copy to the host."""
    together: Tensor = gg.stack(list(values))
    return together.numpy().astype(np.float64)
