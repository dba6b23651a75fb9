"""What a training run is made of: one table of options, for the command line and for files."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from gpugrad.errors import GpugradError
from gpugrad.models.activations import ACTIVATIONS

__all__ = [
    "ACTIVATIONS",
    "AUTOCAST",
    "DTYPES",
    "MODELS",
    "OPTIMIZERS",
    "SCHEDULES",
    "TEXT_MODELS",
    "Config",
    "ConfigError",
    "defaults_of",
    "is_text",
    "make_config",
    "option",
    "read_config",
]

#: Models by the name that `--model` takes; the second kind reads text.
IMAGE_MODELS = ("mlp", "cnn", "resnet")
TEXT_MODELS = ("rnn", "lstm", "gru", "gpt")
MODELS = (*IMAGE_MODELS, *TEXT_MODELS)

OPTIMIZERS = ("sgd", "adam", "adamw", "rmsprop", "adagrad", "lion")
SCHEDULES = ("decay", "constant", "linear", "cosine")
DTYPES = ("float32", "float64")
AUTOCAST = ("off", "bfloat16", "float16")
NONFINITE = ("propagate", "skip", "zero", "raise")


class ConfigError(GpugradError, ValueError):
    """Options of a run that cannot be."""


def _of(
    default: Any, text: str, *, least: float | None = None, share: bool = False,
    choices: tuple[str, ...] = (), changeable: bool = False,
) -> Any:  # fmt: skip
    """A field: its default, what `--help` says, and what values it takes."""
    about = {"help": text, "least": least, "share": share, "choices": choices}
    return field(default=default, metadata={**about, "changeable": changeable})


@dataclass(frozen=True)
class Config:
    """Everything that decides the course of a run; it is stored with every checkpoint.

    Every field is an option of `gpugrad train`, and a key of its configuration files.
    """

    data: str
    model: str = _of("mlp", "What to train.", choices=MODELS)
    width: int = _of(256, "Units of a layer, or channels of the first.", least=1)
    depth: int = _of(3, "Hidden layers or blocks; for resnet all its layers, 6n + 2.", least=0)
    heads: int = _of(4, "Heads of attention.", least=1)
    context: int = _of(64, "Tokens that a text model reads at once.", least=1)
    activation: str = _of("relu", "What follows a layer.", choices=tuple(ACTIVATIONS))
    norm: bool = _of(False, "Normalise in mlp and cnn.")
    residual: bool = _of(False, "A way around each hidden layer of mlp.")
    gain: float = _of(1.0, "Factor on all weights in the beginning.", least=0)
    dropout: float = _of(0.0, "Share of what is dropped in training.", share=True)
    epochs: int = _of(20, "Times through the data.", least=1, changeable=True)
    batch_size: int = _of(64, "Examples that are computed together.", least=1)
    accumulate: int = _of(1, "Batches whose gradients make one step.", least=1)
    lr: float = _of(1e-3, "Learning rate.", least=0, changeable=True)
    schedule: str = _of(
        "decay",
        "Course of the learning rate: times --lr-decay after each epoch, as it is, or falling to "
        "zero over the run, in a line or a cosine.",
        choices=SCHEDULES,
    )
    lr_decay: float = _of(1.0, "Factor of the schedule decay.", share=True, changeable=True)
    warmup: int = _of(0, "Steps in which the learning rate rises from zero.", least=0)
    optimizer: str = _of("adamw", "Update rule.", choices=OPTIMIZERS)
    momentum: float = _of(0.9, "Momentum of sgd and rmsprop.", least=0, changeable=True)
    weight_decay: float = _of(0.01, "Weight decay.", least=0, changeable=True)
    label_smoothing: float = _of(
        0.1, "Share of a label that is spread over all classes.", share=True, changeable=True
    )
    clip: float = _of(
        1.0, "Bound on the global norm of the gradients; 0 for none.", least=0, changeable=True
    )
    nonfinite: str = _of(
        "propagate", "What to do about gradients that are NaN or infinite.", choices=NONFINITE
    )
    dtype: str = _of("float32", "Of parameters.", choices=DTYPES)
    autocast: str = _of("off", "Narrow type that products compute in.", choices=AUTOCAST)
    recompute: bool = _of(False, "Compute blocks again on the way back, to save memory.")
    compile: bool = _of(False, "Run the net as a program: the same numbers, sooner.",
                        changeable=True)  # fmt: skip
    augment: bool = _of(False, "Shift pictures by up to two pixels and mirror them.")
    patience: int = _of(
        0, "Epochs without a better test loss after which to stop; 0 for never.", least=0,
        changeable=True,
    )  # fmt: skip
    limit: float = _of(4.0, "Megabytes of text that are read.", least=0)
    health: bool = _of(
        False, "Record how the gradients fare in health.jsonl, and say what is wrong in the end.",
        changeable=True,
    )  # fmt: skip
    health_every: int = _of(20, "Steps between two of those records.", least=1, changeable=True)
    seed: int = _of(0, "What all randomness starts from.", least=0)

    def __post_init__(self) -> None:
        for f in fields(self)[1:]:
            _check(f.name, getattr(self, f.name), f.metadata)
        if self.compile and self.recompute:
            raise ConfigError(
                "--compile and --recompute: a program keeps what it needs for the way back; leave "
                "one of the two out"
            )
        if is_text(self.data) != (self.model in TEXT_MODELS):
            kinds = TEXT_MODELS if is_text(self.data) else IMAGE_MODELS
            raise ConfigError(
                f"--model is {self.model!r}, which {self.data!r} is no data for; choose from "
                f"{', '.join(kinds)}"
            )


def _check(name: str, value: Any, about: Mapping[str, Any]) -> None:
    said = option(name)
    if about["choices"]:
        if value not in about["choices"]:
            raise ConfigError(f"{said} is {value!r}; choose from {', '.join(about['choices'])}")
    elif isinstance(value, bool | str):
        pass
    elif about["share"]:
        if not 0 <= value <= 1:
            raise ConfigError(f"{said} is {value}; it must be from 0 to 1")
    elif isinstance(value, float):
        if not about["least"] <= value < math.inf:
            raise ConfigError(f"{said} is {value}; it must be finite and zero or more")
    elif value < about["least"]:
        raise ConfigError(f"{said} is {value}; it must be at least {about['least']}")


#: Models and data sets that ask for other numbers than the rest.
_BY_MODEL: dict[str, dict[str, Any]] = {
    "cnn": {"width": 32, "depth": 2, "norm": True, "dropout": 0.25, "epochs": 5,
            "schedule": "cosine", "lr": 2e-3},
    "resnet": {"width": 16, "depth": 20, "epochs": 5, "schedule": "cosine", "lr": 2e-3},
    "rnn": {"width": 256, "depth": 1, "batch_size": 32, "epochs": 1, "schedule": "cosine",
            "warmup": 100, "lr": 2e-3, "label_smoothing": 0.0},
    "gpt": {"width": 128, "depth": 4, "batch_size": 16, "epochs": 1, "schedule": "cosine",
            "warmup": 100, "lr": 2e-3, "label_smoothing": 0.0, "context": 128},
}  # fmt: skip
_BY_MODEL["lstm"] = _BY_MODEL["gru"] = _BY_MODEL["rnn"]
_BY_DATA: dict[tuple[str, str], dict[str, Any]] = {
    ("fashion-mnist", "mlp"): {"epochs": 10, "lr_decay": 0.85},
}


def defaults_of(name: str) -> str:
    """The defaults of an option in words: the common one, and those of models that differ."""
    default = next(f.default for f in fields(Config) if f.name == name)
    found = [f"{default}"]
    found += [f"{model}: {own[name]}" for model, own in _BY_MODEL.items() if name in own]
    found += [f"{data}: {own[name]}" for (data, _), own in _BY_DATA.items() if name in own]
    return "; ".join(found)


def is_text(data: str) -> bool:
    """Whether what `gpugrad train` is given as its data is text.

    >>> is_text("text"), is_text("digits"), is_text("faces.npz"), is_text("novel.txt")
    (True, False, False, True)
    """
    if data == "text":
        return True
    path = Path(data)
    return path.suffix != ".npz" and (path.suffix != "" or path.is_dir())


def make_config(data: str, given: Mapping[str, Any]) -> Config:
    """The configuration for data, with the model's own defaults where nothing is given.

    >>> make_config("fashion-mnist", {"width": 64}).epochs, make_config("text", {}).model
    (10, 'gpt')
    """
    model = given.get("model", "gpt" if is_text(data) else "mlp")
    own = {**_BY_MODEL.get(model, {}), **_BY_DATA.get((data, model), {})}
    return Config(**{**own, "model": model, **given, "data": data})


def read_config(path: Path) -> dict[str, Any]:
    """The options in a TOML file; ConfigError for one that cannot be read, and for other keys.

    Keys are those of the command line, with - or with _; they may stand under `[train]`.
    """
    try:
        with path.open("rb") as file:
            content = tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: is no TOML: {error}") from error
    found = {**content, **content.pop("train", {})}
    found.pop("train", None)
    found = {str(key).replace("-", "_"): value for key, value in found.items()}
    known = {f.name: f for f in fields(Config)}
    if unknown := [key for key in found if key not in known]:
        raise ConfigError(
            f"{path}: there is no option {', '.join(unknown)}; the options are {', '.join(known)}"
        )
    for key, value in found.items():
        wanted = type("" if key == "data" else known[key].default)
        if wanted is float and type(value) is int:
            found[key] = float(value)
        elif type(value) is not wanted:
            raise ConfigError(f"{path}: {key} is {value!r}; it must be of type {wanted.__name__}")
    return found


def option(name: str) -> str:
    """A field of the configuration as it is written on the command line."""
    return "--" + name.replace("_", "-")
