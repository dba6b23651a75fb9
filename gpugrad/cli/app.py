"""The commands and their options."""

from __future__ import annotations

import inspect
import logging
import math
import shlex
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import Field, fields, replace
from functools import wraps
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer
from rich.console import Console

import gpugrad
from gpugrad.backend import backend_for_device
from gpugrad.backend.threads import describe_threads
from gpugrad.cli.config import Config, ConfigError, defaults_of, make_config, read_config
from gpugrad.cli.display import Display, Logged, result_table
from gpugrad.cli.tasks import task_of
from gpugrad.cli.training import (
    CHANGEABLE,
    Run,
    Watch,
    free_folder,
    load_run,
    resume,
    start,
    stored_config,
)
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
        for name, text in describe_threads().items():
            out.print(f"{name:<16} {text}", soft_wrap=True)
        out.print(devices_table())


# -- train ---------------------------------------------------------------------------------------


def _checked(f: Field[Any]) -> Callable[[Any], Any] | None:
    """What typer calls with the value of an option."""
    about = f.metadata
    if about["choices"]:
        return _choice(about["choices"])
    if about["share"]:
        return _share
    return _finite if isinstance(f.default, float) else None


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


def _with_config(function: Callable[..., None]) -> Callable[..., None]:
    """Give a command an option for every field of the configuration; None was not given.

    The command takes them all in one mapping, `given`.
    """
    own = inspect.signature(function, eval_str=True).parameters
    options = {}
    for f in fields(Config)[1:]:
        kind: Any = type(f.default)
        about = f.metadata
        text = about["help"]
        if about["choices"]:
            text += f" One of {', '.join(about['choices'])}."
        least = about["least"] if kind is int else None
        annotation = Annotated[
            kind | None,
            typer.Option(
                help=f"{text} \\[default: {defaults_of(f.name)}]", min=least, callback=_checked(f)
            ),
        ]
        options[f.name] = inspect.Parameter(
            f.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation
        )

    @wraps(function)
    def command(**values: Any) -> None:
        given = {name: value for name in options if (value := values.pop(name)) is not None}
        function(**values, given=given)

    listed = [p.replace(kind=p.KEYWORD_ONLY) for name, p in own.items() if name != "given"]
    command.__signature__ = inspect.Signature([*listed, *options.values()])  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in (*listed, *options.values())}
    return command


@app.command()
@_with_config
def train(
    data: Annotated[
        str | None,
        typer.Argument(
            metavar="DATA",
            help="digits, fashion-mnist, text (Python's own sources), or a path: an .npz file with "
            "x and y, a text file, or a folder of them.",
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option("--config", help="A TOML file with options; those given here go first."),
    ] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="Folder where the data lie, if not in the usual places.")
    ] = None,
    device: Annotated[
        str, typer.Option(help="auto, cpu, cuda or cuda:N; auto takes a GPU if there is one.")
    ] = "auto",
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
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Write logs for TensorBoard into the folder.")
    ] = False,
    live: Annotated[
        bool, typer.Option("--live", help="Show the gradients of the layers; with --health.")
    ] = False,
    traceback: Annotated[
        bool, typer.Option("--traceback", help="Show where an error comes from.")
    ] = False,
    given: Any = None,
) -> None:
    """Train a net: to tell the classes of a data set apart, or to write text."""
    with _errors_told(traceback), _Interrupt() as interrupt:
        options = {**({} if config is None else read_config(config)), **given}
        if live:
            options["health"] = True
        named = options.pop("data", None)
        chosen = _device(device)
        if checkpoint is not None:
            stored, _ = stored_config(checkpoint)
            options["data"] = data or named or stored.data
            changed = {k: v for k, v in options.items() if k in CHANGEABLE}
            task = task_of(replace(stored, **changed), data_dir)
            course = resume(checkpoint, task, chosen, options, folder)
        else:
            if (data or named) is None:
                raise ConfigError("no data; name them, as in: gpugrad train digits")
            settings = make_config(data or str(named), options)
            task = task_of(settings, data_dir)
            where = folder or free_folder(Path("runs"), task.name)
            course = start(settings, task, chosen, where)
        _train(course, interrupt, data_dir, tensorboard, live)


def _train(
    course: Run, interrupt: _Interrupt, data_dir: Path | None, tensorboard: bool, live: bool
) -> None:
    config = course.config
    parameters = sum(p.size for p in course.net.parameters())
    out.print(
        f"{_plain(repr(course.task))}\n{config.model}, width {config.width}, depth "
        f"{config.depth}; {parameters:,} parameters on {course.device}\n"
        f"{config.optimizer}, lr {config.lr:g}, batches of {config.batch_size}, "
        f"clip {config.clip or 'off'}, seed {config.seed}",
        soft_wrap=True,
    )
    if course.epoch or course.step:
        out.print(f"going on after epoch {course.epoch}, step {course.step} of the next")
    with ExitStack() as stack:
        stack.enter_context(_compiling_told())
        watch: Watch
        if live:
            from gpugrad.cli.health import LiveWatch

            watch = stack.enter_context(LiveWatch(out, course))
        else:
            watch = stack.enter_context(Display(out, config.epochs, course.epoch, course.task.unit))
        if tensorboard:
            from gpugrad.cli.tensorboard import TensorBoard

            log = stack.enter_context(TensorBoard(course.folder / "tensorboard"))
            watch = Logged(watch, log, course)
        stack.callback(_say_health, course)  # of a run that diverged, too
        finished = course.train(watch, interrupt)
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
    if last["epoch"] < config.epochs:
        out.print(f"stopped: the test loss has not fallen for {config.patience} epochs")
    seconds = sum(row["seconds"] for row in course.history)
    out.print(
        f"test accuracy {last['test_accuracy']:.2%}, loss {last['test_loss']:.4f} after "
        f"{last['epoch']} {'epoch' if last['epoch'] == 1 else 'epochs'} and {seconds:.1f} s of "
        f"training; {course.checkpoint}",
        soft_wrap=True,
    )


def _say_health(course: Run) -> None:
    """What the run's record shows, if there is one."""
    if course.monitor is not None and len(course.monitor.record):
        out.print(f"health: {_plain(str(course.monitor.verdict()))}", soft_wrap=True)


# -- eval and sample -----------------------------------------------------------------------------

_RUN = typer.Argument(metavar="RUN", help="A run's folder, or one of its checkpoints.")
_TRACEBACK = typer.Option("--traceback", help="Show where an error comes from.")


@app.command("eval")
def evaluate(
    run: Annotated[Path, _RUN],
    data: Annotated[
        str | None, typer.Option(help="Other data than the run's own, of the same kind.")
    ] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Folder where the data lie.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    traceback: Annotated[bool, _TRACEBACK] = False,
) -> None:
    """Test the net of a run, that of its best epoch, on the data that are set apart."""
    with _errors_told(traceback):
        course = load_run(run, _device(device, err), data, data_dir)
        loss, accuracy = course.test()
        out.print(
            f"{_plain(repr(course.task))}\n{course.config.model} after epoch {course.epoch}: test "
            f"loss {loss:.4f}, accuracy {accuracy:.2%}",
            soft_wrap=True,
        )


@app.command()
def sample(
    run: Annotated[Path, _RUN],
    prompt: Annotated[
        str | None, typer.Option(help="What the text begins with \\[default: a new line].")
    ] = None,
    length: Annotated[int, typer.Option(help="Tokens to write.", min=1)] = 400,
    temperature: Annotated[
        float, typer.Option(help="0 takes the likeliest token, 1 draws as the net says.", min=0)
    ] = 0.8,
    top_k: Annotated[
        int, typer.Option(help="Draw from this many likeliest tokens; 0 for all.", min=0)
    ] = 0,
    seed: Annotated[int, typer.Option(help="What is drawn starts from this.", min=0)] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    traceback: Annotated[bool, _TRACEBACK] = False,
) -> None:
    """Let a text model write."""
    from gpugrad.cli.sampling import load_writer

    with _errors_told(traceback):
        writer = load_writer(run, _device(device, err))
        start, following = writer(prompt, length, temperature, top_k, seed)
        out.print(_plain(start), end="", soft_wrap=True)
        for text in following:
            out.file.write(text)
            out.file.flush()
        out.print()


# -- health and explain --------------------------------------------------------------------------


@app.command()
def health(
    run: Annotated[
        Path, typer.Argument(metavar="RUN_OR_FILE", help="A run's folder, or a health.jsonl.")
    ],
    page: Annotated[
        Path | None,
        typer.Option("--out", help="The page to write \\[default: health.html beside the record]."),
    ] = None,
    events: Annotated[
        Path | None,
        typer.Option("--tensorboard", metavar="FOLDER", help="Write the record there, too."),
    ] = None,
    show: Annotated[bool, typer.Option("--open", help="Show the page in the browser.")] = False,
    traceback: Annotated[bool, _TRACEBACK] = False,
) -> None:
    """Say how the gradients of a run fared, and write a report on it."""
    from gpugrad.cli import health as reports

    with _errors_told(traceback):
        reports.show(out, run, page, events, open_=show)


@app.command()
def explain(
    chapter: Annotated[
        str | None, typer.Argument(help="Which one; without it, they are listed.")
    ] = None,
    folder: Annotated[
        Path | None, typer.Option("--out", help="Folder to write the chapter to, as a page.")
    ] = None,
    traceback: Annotated[bool, _TRACEBACK] = False,
) -> None:
    """Show by small runs how gradients explode and vanish, and what helps."""
    from gpugrad.cli.explain import contents, tell

    with _errors_told(traceback):
        if chapter is None:
            out.print(contents())
        else:
            tell(chapter, out, folder)


# -- bench ---------------------------------------------------------------------------------------


@app.command()
def bench(
    only: Annotated[
        str | None, typer.Option(help="Parts of workloads' names, separated by commas.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Small sizes: a check, no result.")
    ] = False,
    backend: Annotated[
        str | None, typer.Option(help="Who takes part, by key, separated by commas.")
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option(
            "--out", help="Folder for bench.json and bench.html \\[default: a new one in runs/]."
        ),
    ] = None,
    listed: Annotated[
        bool, typer.Option("--list", help="Show workloads and backends, and what is missing.")
    ] = False,
    compared: Annotated[
        tuple[Path, Path] | None,
        typer.Option("--compare", metavar="A B", help="Show what changed from A.json to B.json."),
    ] = None,
    result: Annotated[
        Path | None, typer.Option("--page", help="Draw the page of a result again.")
    ] = None,
    traceback: Annotated[bool, _TRACEBACK] = False,
) -> None:
    """Time gpugrad's backends, and the other libraries that are installed."""
    from gpugrad.cli import bench as benches

    with _errors_told(traceback):
        if listed:
            benches.list_everything(out)
        elif compared is not None:
            benches.compare(out, *compared)
        elif result is not None:
            benches.draw(out, result)
        elif not benches.measure(out, only, backend, folder, quick=quick):
            err.print("interrupted; what had been measured is kept")
            raise typer.Exit(INTERRUPTED)


@contextmanager
def _compiling_told() -> Iterator[None]:
    """Say why nothing seems to happen when kernels are compiled, once."""

    class Told(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            log.removeHandler(self)
            out.print(
                "compiling kernels for this processor, which takes some seconds; they are kept"
            )

    log, handler = logging.getLogger("gpugrad.kernels"), Told()
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


def _resume_command(course: Run, data_dir: Path | None) -> str:
    words = ["gpugrad", "train", course.config.data, "--resume", str(course.folder)]
    words += [] if data_dir is None else ["--data-dir", str(data_dir)]
    return shlex.join(words)


def _device(wanted: str, say: Console = out) -> str:
    """The device to work on; for "auto" the first GPU, or the CPU and a line that says why."""
    if wanted != "auto":
        backend_for_device(wanted).native_device(wanted)
        return wanted
    try:
        backend_for_device("cuda").native_device("cuda")
    except DeviceError as error:
        say.print(f"on the CPU: {_plain(str(error))}", soft_wrap=True)
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
