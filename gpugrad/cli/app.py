"""The commands and their options."""

from __future__ import annotations

import math
import shlex
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer
from rich.console import Console

import gpugrad
from gpugrad.backend import backend_for_device
from gpugrad.cli.config import ACTIVATIONS, DEFAULTS, DTYPES, OPTIMIZERS, Config, make_config
from gpugrad.cli.display import Display, result_table
from gpugrad.cli.training import Run, free_folder, resume, start
from gpugrad.data import load
from gpugrad.errors import DeviceError, GpugradError

__all__ = ["app", "run"]

INTERRUPTED = 130  # 128 + SIGINT, as shells count

app = typer.Typer(
    name="gpugrad",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    help="Train nets with gpugrad, and see what it can compute on.",
)
out = Console(highlight=False)
err = Console(stderr=True, highlight=False, soft_wrap=True)


def run(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    try:
        app(args=None if argv is None else list(argv), prog_name="gpugrad")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


def _version(wanted: bool) -> None:
    if wanted:
        out.print(f"gpugrad {gpugrad.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


@contextmanager
def _errors_told(traceback: bool) -> Iterator[None]:
    """Tell the library's own errors in a sentence; what is not ours is a bug and shows in full."""
    try:
        yield
    except KeyboardInterrupt:
        err.print("stopped at once; the last checkpoint, if there is one, is whole")
        raise typer.Exit(INTERRUPTED) from None
    except GpugradError as error:
        if traceback:
            raise
        err.print(f"[bold red]error:[/] {_plain(str(error))}")
        for note in getattr(error, "__notes__", ()):
            err.print(_plain(note))
        raise typer.Exit(1) from None


def _plain(text: str) -> str:
    return text.replace("[", r"\[")


# -- info ----------------------------------------------------------------------------------------


@app.command()
def info(
    traceback: Annotated[
        bool, typer.Option("--traceback", help="Show where an error comes from.")
    ] = False,
) -> None:
    """Show versions, backends and devices, and why a device cannot be used."""
    from gpugrad.cli.info import devices_table, versions

    with _errors_told(traceback):
        for name, version in versions():
            out.print(f"{name:<16} {version}", soft_wrap=True)
        out.print(devices_table())


# -- train ---------------------------------------------------------------------------------------


def _choice(names: Sequence[str]) -> Callable[[str | None], str | None]:
    """Accept one of `names`, in any case and with - for _."""

    def check(value: str | None) -> str | None:
        name = None if value is None else value.lower().replace("-", "_")
        if name is not None and name not in names:
            raise typer.BadParameter(f"{value!r} is not one of {', '.join(names)}")
        return name

    return check


def _finite(value: float | None) -> float | None:
    if value is not None and not 0 <= value < math.inf:
        raise typer.BadParameter(f"{value} is not a finite number of zero or more")
    return value


def _share(value: float | None) -> float | None:
    if value is not None and not 0 <= value <= 1:
        raise typer.BadParameter(f"{value} is not a number from 0 to 1")
    return value


def _said(name: str, text: str, **options: Any) -> Any:
    """An option whose help names its default; None tells that it was not given."""
    default = str(getattr(Config, name))
    for data, own in DEFAULTS.items():
        default += f"; {data}: {own[name]}" if name in own else ""
    return typer.Option(help=f"{text} \\[default: {default}]", **options)


@app.command()
def train(
    data: Annotated[
        str,
        typer.Argument(
            metavar="DATA", help="digits, fashion-mnist, or the path of an .npz file with x and y."
        ),
    ],
    data_dir: Annotated[
        Path | None, typer.Option(help="Folder where the data lie, if not in the usual places.")
    ] = None,
    device: Annotated[
        str, typer.Option(help="auto, cpu, cuda or cuda:N; auto takes a GPU if there is one.")
    ] = "auto",
    width: Annotated[int | None, _said("width", "Units of a hidden layer.", min=1)] = None,
    depth: Annotated[int | None, _said("depth", "Hidden layers.", min=0)] = None,
    activation: Annotated[
        str | None,
        _said("activation", f"One of {', '.join(ACTIVATIONS)}.", callback=_choice([*ACTIVATIONS])),
    ] = None,
    epochs: Annotated[int | None, _said("epochs", "Times through the data.", min=1)] = None,
    batch_size: Annotated[int | None, _said("batch_size", "Examples in a step.", min=1)] = None,
    lr: Annotated[float | None, _said("lr", "Learning rate.", callback=_finite)] = None,
    optimizer: Annotated[
        str | None, _said("optimizer", "sgd or adamw.", callback=_choice(OPTIMIZERS))
    ] = None,
    lr_decay: Annotated[
        float | None,
        _said("lr_decay", "Learning rate times this after each epoch.", callback=_share),
    ] = None,
    momentum: Annotated[
        float | None, _said("momentum", "Momentum of sgd.", callback=_finite)
    ] = None,
    weight_decay: Annotated[
        float | None, _said("weight_decay", "Weight decay.", callback=_finite)
    ] = None,
    label_smoothing: Annotated[
        float | None,
        _said("label_smoothing", "Share of a label spread over all classes.", callback=_share),
    ] = None,
    clip: Annotated[
        float | None,
        _said("clip", "Bound on the global norm of the gradients; 0 for none.", callback=_finite),
    ] = None,
    seed: Annotated[int | None, _said("seed", "What all randomness starts from.", min=0)] = None,
    dtype: Annotated[
        str | None, _said("dtype", "float32 or float64.", callback=_choice(DTYPES))
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option(
            "--out", help="Folder for checkpoint and metrics \\[default: a new one in runs/]."
        ),
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            "--resume",
            metavar="PATH",
            help="Go on with the run of this checkpoint, or folder; its options hold.",
        ),
    ] = None,
    traceback: Annotated[
        bool, typer.Option("--traceback", help="Show where an error comes from.")
    ] = False,
) -> None:
    """Train a multilayer perceptron to tell the classes of a data set apart."""
    given = {
        "data": data,
        "width": width,
        "depth": depth,
        "activation": activation,
        "epochs": epochs,
        "batch_size": batch_size,
        "lr": lr,
        "optimizer": optimizer,
        "lr_decay": lr_decay,
        "momentum": momentum,
        "weight_decay": weight_decay,
        "label_smoothing": label_smoothing,
        "clip": clip,
        "seed": seed,
        "dtype": dtype,
    }
    given = {name: value for name, value in given.items() if value is not None}
    with _errors_told(traceback), _Interrupt() as interrupt:
        chosen = _device(device)
        examples = load(data, folder=data_dir)
        if checkpoint is not None:
            course = resume(checkpoint, examples, chosen, given, folder)
        else:
            where = folder or free_folder(Path("runs"), examples.name)
            course = start(make_config(data, given), examples, chosen, where)
        _train(course, interrupt, data_dir)


def _train(course: Run, interrupt: _Interrupt, data_dir: Path | None) -> None:
    config = course.config
    parameters = sum(p.size for p in course.net.parameters())
    out.print(
        f"{_plain(repr(course.data))}\n{config.depth} hidden layers of {config.width}, "
        f"{config.activation}; {parameters:,} parameters on {course.device}\n"
        f"{config.optimizer}, lr {config.lr:g}, batches of {config.batch_size}, "
        f"clip {config.clip or 'off'}, seed {config.seed}",
        soft_wrap=True,
    )
    if course.epoch or course.step:
        out.print(f"going on after epoch {course.epoch}, step {course.step} of the next")
    with Display(out, config.epochs, course.epoch) as display:
        finished = course.train(display, interrupt)
    if not finished:
        at = f"epoch {course.epoch + 1}, step {course.step}" if course.step else (
            f"the end of epoch {course.epoch}")  # fmt: skip
        err.print(
            f"interrupted at {at}; saved to {course.checkpoint}. Go on with\n"
            f"  {_plain(_resume_command(course, data_dir))}"
        )
        raise typer.Exit(INTERRUPTED)
    out.print(result_table(course.folder.name, course.history))
    last = course.history[-1]
    seconds = sum(row["seconds"] for row in course.history)
    out.print(
        f"test accuracy {last['test_accuracy']:.2%} after {last['epoch']} "
        f"{'epoch' if last['epoch'] == 1 else 'epochs'} and "
        f"{seconds:.1f} s of training; {course.checkpoint}",
        soft_wrap=True,
    )


def _resume_command(course: Run, data_dir: Path | None) -> str:
    words = ["gpugrad", "train", course.config.data, "--resume", str(course.folder)]
    words += [] if data_dir is None else ["--data-dir", str(data_dir)]
    return shlex.join(words)


def _device(wanted: str) -> str:
    """The device to train on; for "auto" the first GPU, or the CPU and a line that says why."""
    if wanted != "auto":
        backend_for_device(wanted).native_device(wanted)
        return wanted
    try:
        backend_for_device("cuda").native_device("cuda")
    except DeviceError as error:
        out.print(f"on the CPU: {_plain(str(error))}", soft_wrap=True)
        return "cpu"
    return "cuda:0"


class _Interrupt:
    """Remembers a first Ctrl-C, so that the step under way can end; a second one stops at once."""

    def __init__(self) -> None:
        self._asked = False

    def __call__(self) -> bool:
        return self._asked

    def __enter__(self) -> _Interrupt:
        self._before = signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(self, *error: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
        signal.signal(signal.SIGINT, self._before)
