"""What this machine can compute on, and with which versions."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from importlib import metadata
from typing import Any

import numpy as np
from rich.table import Table

import gpugrad
from gpugrad.backend import describe

__all__ = ["devices_table", "versions"]


def versions() -> Iterator[tuple[str, str]]:
    """Name and version of gpugrad, Python and the packages that it works with."""
    yield "gpugrad", gpugrad.__version__
    yield "Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    yield "NumPy", np.__version__
    needed, optional = [], []
    for line in metadata.requires("gpugrad") or []:
        (optional if "extra ==" in line else needed).append(line)
    for line in needed:
        name = _package(line)
        if name != "numpy":
            yield name, _installed(name)
    accelerators = sorted({_package(line) for line in optional if "cuda" in line.partition(";")[2]})
    for name in accelerators:
        yield name, _installed(name)


def _package(requirement: str) -> str:
    name = requirement.partition(";")[0]
    return name[: next((i for i, c in enumerate(name) if c in "<>=!~[ ("), len(name))]


def _installed(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def devices_table() -> Table:
    """Every backend with its devices, and why it cannot be used where it cannot."""
    table = Table(title="backends")
    for name in ("backend", "version", "usable", "devices, or what is missing"):
        table.add_column(name, overflow="fold")
    for info in describe():
        devices = "\n".join(_device(d) for d in info.devices)
        table.add_row(
            info.name,
            info.version or "-",
            "yes" if info.usable else "no",
            devices if info.usable else info.reason,
        )
    return table


def _device(device: Any) -> str:
    return str(device)
