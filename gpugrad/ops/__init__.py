"""Every operation, one declaration each; a module's ``__all__`` is what becomes public."""

# Each module lists its public names in __all__; a new operation touches its own file only.
# ruff: noqa: F403
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

__all__: list[str] = []
__all__ += activations.__all__
__all__ += arithmetic.__all__
__all__ += comparison.__all__
__all__ += contraction.__all__
__all__ += creation.__all__
__all__ += dtypes.__all__
__all__ += exponential.__all__
__all__ += indexing.__all__
__all__ += joining.__all__
__all__ += linalg.__all__
__all__ += losses.__all__
__all__ += manipulation.__all__
__all__ += reductions.__all__
__all__ += trigonometric.__all__

attach()
