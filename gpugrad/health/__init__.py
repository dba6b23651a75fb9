"""Gradient health: see gradients explode or vanish, know why, and fix it.

Everything here is loaded when it is first used: `gpugrad.health` itself costs an import nothing.
"""

from __future__ import annotations

import importlib
from typing import Any

#: Module → the names that it offers here.
_OFFERS = {
    "anomaly": ("detect_anomaly",),
    "errors": ("AnomalyError", "HealthError", "RecordError"),
    "page": ("report",),
    "monitor": ("Monitor",),
    "probe": ("observe",),
    "diagnosis": ("Diagnosis", "Trial", "diagnose", "remedied"),
    "remedies": ("REMEDIES", "Remedy"),
    "theory": ("MeanField", "mean_field"),
    "findings": ("Finding", "Verdict"),
    "verdict": ("judge",),
    "replay": ("guard",),
    "sequences": ("ThroughTime", "through_time"),
    "record": ("SCALARS", "STATISTICS", "Record"),
}

#: Modules that are offered as a whole, because their names say little alone.
_MODULES = ("board", "figures", "live")

_HOME = {name: module for module, names in _OFFERS.items() for name in names}

__all__ = sorted({*_HOME, *_MODULES})


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
