"""How many threads the kernels for the CPU use."""

from __future__ import annotations

from typing import Any

__all__ = ["describe_threads", "get_num_threads", "set_num_threads"]


def _pool() -> Any:
    from gpugrad.kernels.cpu import pool  # Numba, which nobody loads before it is needed

    return pool


def get_num_threads() -> int:
    """Threads that kernels for the CPU, matrix products among them, use at most.

    >>> import gpugrad as gg
    >>> gg.get_num_threads() >= 1
    True
    """
    return int(_pool().get_num_threads())


def set_num_threads(n: int) -> None:
    """Let kernels for the CPU use at most `n` threads, from now on and in every Python thread.

    From 1 to the number that Numba has (`NUMBA_NUM_THREADS`; by default the processors that this
    process may run on); ParameterError otherwise. The environment variable `GPUGRAD_THREADS` sets
    the number that a program starts with. As `torch.set_num_threads`.
    """
    _pool().set_num_threads(n)


def describe_threads() -> dict[str, str]:
    """What was decided about threads, and why, in words."""
    settings = _pool().describe()
    return {
        "threads": f"{settings.threads} ({settings.reasons['threads']})",
        "threading layer": f"{settings.layer} ({settings.reasons['layer']})",
        "BLAS": f"{settings.blas} ({settings.reasons['blas']})",
        "freed memory": settings.reasons["memory"],
    }
