"""How exactly the products of float32 arrays are computed, where a device leaves a choice."""

from __future__ import annotations

from gpugrad.backend import _registered, on_register
from gpugrad.errors import ParameterError

__all__ = ["get_float32_matmul_precision", "set_float32_matmul_precision"]

PRECISIONS = ("highest", "high", "medium")

_chosen: list[str] = []


def get_float32_matmul_precision() -> str:
    """What :func:`set_float32_matmul_precision` was last told; `"highest"` before that.

    >>> import gpugrad as gg
    >>> gg.get_float32_matmul_precision()
    'highest'
    """
    return _chosen[-1] if _chosen else "highest"


def set_float32_matmul_precision(precision: str) -> None:
    """Let products of float32 arrays be less exact, and faster, on GPUs that can.

    Parameters
    ----------
    precision:
        `"highest"`, the default: all 24 bits of a float32 take part. `"high"`: tensor cores
        multiply numbers rounded to TF32, 11 bits, and add up in float32; products of trained nets
        are off by about 1e-3. `"medium"` is the same here. ParameterError for anything else.

    It concerns CuPy on GPUs since Ampere, from now on; elsewhere nothing changes. Off by default,
    as in CuPy and in PyTorch, whose names these are. Until it is called, CuPy's own setting holds
    (the environment variable CUPY_TF32).
    """
    if precision not in PRECISIONS:
        raise ParameterError(
            f"set_float32_matmul_precision: {precision!r} is none of {', '.join(PRECISIONS)}"
        )
    _chosen[:] = [precision]
    _tell()


def _tell() -> None:
    for backend in _registered:
        if _chosen:
            backend.set_product_precision(_chosen[-1])


on_register(_tell)
