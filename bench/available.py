"""Who can compute here, and why others cannot."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable

from gpugrad.bench.workload import CONTENDERS, Contender

#: How a library is installed that gpugrad does not bring along.
INSTALL = {
    "torch": "pip install torch",
    "jax": "pip install jax",
    "autograd": "pip install 'gpugrad[bench]'",
    "mygrad": "pip install mygrad",
}


def why_not(who: Contender) -> str | None:
    """Why a contender cannot compute here, as far as can be told without importing its library."""
    if importlib.util.find_spec(who.library) is None:
        return f"{who.library} is not installed; {INSTALL.get(who.library, 'install it')}"
    return None if who.on_host else no_device(who.device)


def no_device(device: str) -> str | None:
    """Why gpugrad cannot use a device; None if it can."""
    from gpugrad.backend import describe

    prefix = device.partition(":")[0]
    for info in describe():
        if info.prefix == prefix:
            if info.usable:
                return None
            return info.reason.removeprefix(f"{prefix}: ")
    return f"no backend for {device}"


def split(
    wanted: Iterable[Contender] = CONTENDERS.values(),
) -> tuple[list[Contender], dict[str, str]]:
    """Those that can compute here, and why the others cannot."""
    present, absent = [], {}
    for who in wanted:
        why = why_not(who)
        if why is None:
            present.append(who)
        else:
            absent[who.key] = why
    return present, absent
