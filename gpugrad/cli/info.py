"""What this machine can compute on, and with which versions."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from importlib import metadata

import numpy as np
from rich.table import Table
from rich.text import Text

import gpugrad
from gpugrad.backend import describe
from gpugrad.backend.base import DeviceInfo

__all__ = ["devices_table", "versions"]


def versions() -> Iterator[tuple[str, str]]:
    """Name and version of gpugrad, Python and the packages that it works with."""
    yield "gpugrad", gpugrad.__version__
    yield "Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    yield "NumPy", np.__version__
    try:
        lines = metadata.requires("gpugrad") or []
    except metadata.PackageNotFoundError:  # run from a checkout
        return
    accelerators = {_package(line) for line in lines if "cuda" in line.partition(";")[2]}
    for name in [_package(line) for line in lines if "extra ==" not in line]:
        if name != "numpy":
            yield name, _installed(name)
    for name in sorted(accelerators):
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
        devices = "\n".join(map(_device, info.devices)) or info.prefix
        table.add_row(
            info.name,
            info.version or "-",
            "yes" if info.usable else "no",
            Text(devices if info.usable else info.reason),
        )
    return table


def _device(device: DeviceInfo) -> str:
    memory = f", {device.memory / 2**30:.0f} GiB" if device.memory else ""
    return f"{device.device}: {device.name}{memory}"
