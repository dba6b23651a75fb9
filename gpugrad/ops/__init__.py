"""Every operation, one declaration each; a module's ``__all__`` is what becomes public."""

# Each module lists its public names in __all__; a new operation touches its own file only.
# ruff: noqa: F403
import types
import typing

from gpugrad.ops.activations import *
from gpugrad.ops.arithmetic import *
from gpugrad.ops.attention import *
from gpugrad.ops.comparison import *
from gpugrad.ops.contraction import *
from gpugrad.ops.creation import *
from gpugrad.ops.dtypes import *
from gpugrad.ops.embeddings import *
from gpugrad.ops.exponential import *
from gpugrad.ops.fused import *
from gpugrad.ops.indexing import *
from gpugrad.ops.joining import *
from gpugrad.ops.linalg import *
from gpugrad.ops.losses import *
from gpugrad.ops.manipulation import *
from gpugrad.ops.methods import attach
from gpugrad.ops.normalization import *
from gpugrad.ops.pointwise_losses import *
from gpugrad.ops.precision import *
from gpugrad.ops.random import *
from gpugrad.ops.recurrent import *
from gpugrad.ops.reductions import *
from gpugrad.ops.similarity import *
from gpugrad.ops.trigonometric import *

# mypy reads no sum of lists; without __all__ it takes every name that is starred.
if not typing.TYPE_CHECKING:
    __all__ = [
        name
        for file in tuple(globals().values())
        if isinstance(file, types.ModuleType) and file.__name__.startswith(f"{__name__}.")
        for name in getattr(file, "__all__", ())
    ]

attach()
