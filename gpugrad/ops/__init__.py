"""Every operation, one declaration each; a module's ``__all__`` is what becomes public."""

# Each module lists its public names in __all__; a new operation touches its own file only.
# ruff: noqa: F403
import typing

from gpugrad.ops import (
    activations,
    arithmetic,
    comparison,
    contraction,
    creation,
    dtypes,
    exponential,
    indexing,
    joining,
    linalg,
    losses,
    manipulation,
    reductions,
    trigonometric,
)
from gpugrad.ops.activations import *
from gpugrad.ops.arithmetic import *
from gpugrad.ops.comparison import *
from gpugrad.ops.contraction import *
from gpugrad.ops.creation import *
from gpugrad.ops.dtypes import *
from gpugrad.ops.exponential import *
from gpugrad.ops.indexing import *
from gpugrad.ops.joining import *
from gpugrad.ops.linalg import *
from gpugrad.ops.losses import *
from gpugrad.ops.manipulation import *
from gpugrad.ops.methods import attach
from gpugrad.ops.reductions import *
from gpugrad.ops.trigonometric import *

if (
    not typing.TYPE_CHECKING
):  # mypy reads no sum of lists; without __all__ it takes every name imported
    __all__ = [
        name
        for module in (
            activations,
            arithmetic,
            comparison,
            contraction,
            creation,
            dtypes,
            exponential,
            indexing,
            joining,
            linalg,
            losses,
            manipulation,
            reductions,
            trigonometric,
        )
        for name in module.__all__
    ]

attach()
