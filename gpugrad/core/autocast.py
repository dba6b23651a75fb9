"""Mixed precision: inside a block, products compute in a narrow type, and sums in a wide one.

What an operation is called with is converted on the way in, as a step of the graph: gradients
arrive in the dtype of what was converted. Which operations are concerned, a table says; all others
take what comes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import wraps
from types import TracebackType
from typing import Any, TypeVar

from gpugrad.backend import as_dtype
from gpugrad.core.graph import Leaf, mutations, next_seq
from gpugrad.core.modes import is_grad_enabled
from gpugrad.core.primitive import Primitive, differentiable
from gpugrad.core.tensor import Tensor
from gpugrad.errors import DTypeError

__all__ = ["autocast", "is_autocast_enabled"]

F = TypeVar("F", bound=Callable[..., Any])

#: Operations by name that convert their operands: True to the narrow type, False to float32. Read
#: when an operation is first called.
NARROWS: dict[str, bool] = {}

#: Not empty while any thread is inside a block; operations of the table look at it first.
casting: list[None] = []


class _ThreadState(threading.local):
    setting: autocast | None = None


_state = _ThreadState()


def is_autocast_enabled() -> bool:
    """Whether this thread is inside of a block of :class:`autocast` that is enabled.

    >>> import gpugrad as gg
    >>> with gg.autocast("cpu"):
    ...     gg.is_autocast_enabled()
    True
    """
    return _state.setting is not None and _state.setting.enabled


def current_autocast() -> autocast | None:
    """The innermost block that this thread is in."""
    return _state.setting


class autocast:
    """Let matrix products, convolutions and the like compute in a narrow type.

    Parameters
    ----------
    device_type:
        `"cpu"` or `"cuda"`: only operands there are converted.
    dtype:
        `"bfloat16"` or `"float16"`; by default bfloat16 on the CPU and float16 on a GPU. Gradients
        of float16 want a loss scale, :class:`gpugrad.optim.GradScaler`.
    enabled:
        False: in this block nothing is converted, also inside of another.
    cache_enabled:
        Convert a parameter once for the whole block, as long as it does not change.

    Products, layers, convolutions, attention and recurrent layers convert float32 to the narrow
    type; exponentials, powers, sums, softmax, normalisation and losses convert narrow types to
    float32. Everything else computes in what it is given, and float64 is left alone. Parameters
    stay float32, and so do their gradients. As PyTorch's `torch.autocast`; a context manager, and a
    decorator for functions.

    Raises DTypeError for another dtype.

    >>> import gpugrad as gg
    >>> x = gg.ones((2, 2), dtype="float32")
    >>> with gg.autocast("cpu", dtype="float16"):
    ...     (x @ x).dtype, gg.sum(x @ x).dtype
    (dtype('float16'), dtype('float32'))
    """

    def __init__(
        self,
        device_type: str,
        dtype: Any = None,
        enabled: bool = True,
        cache_enabled: bool = True,
    ) -> None:
        self.device_type = str(device_type).partition(":")[0]
        if self.device_type not in ("cpu", "cuda"):
            raise DTypeError(f'autocast: device_type is {device_type!r}; it is "cpu" or "cuda"')
        narrow = "bfloat16" if self.device_type == "cpu" else "float16"
        name = as_dtype(narrow if dtype is None else dtype).name
        if name not in ("bfloat16", "float16"):
            raise DTypeError(
                f"autocast: {dtype!r} is no narrow type; there are 'bfloat16' and 'float16'"
            )
        self.dtype = name
        self.enabled = enabled
        self.cache_enabled = cache_enabled
        self._cache: dict[int, tuple[Tensor, int, Tensor]] = {}
        self._before: list[autocast | None] = []

    def __enter__(self) -> autocast:
        casting.append(None)
        self._before.append(_state.setting)
        _state.setting = self
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        _state.setting = self._before.pop()
        casting.pop()
        self._cache.clear()

    def __call__(self, function: F) -> F:
        @wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            with self.again():
                return function(*args, **kwargs)

        return wrapped  # type: ignore[return-value]

    def again(self) -> autocast:
        """Another block with the same setting."""
        return autocast(self.device_type, self.dtype, self.enabled, self.cache_enabled)

    def convert(self, x: Any, narrow: bool) -> Any:
        """An operand as an operation of the table takes it."""
        if not isinstance(x, Tensor) or x.device.partition(":")[0] != self.device_type:
            return x
        have = x.dtype.name
        if have not in ("bfloat16", "float16", "float32"):
            return x
        want = self.dtype if narrow else "float32"
        if have == want:
            return x
        if not (self.cache_enabled and narrow and isinstance(x._node, Leaf) and is_grad_enabled()):
            return differentiable.astype(x, want)
        found = self._cache.get(id(x))
        if found is not None and found[0] is x and not mutations.after(x.data, found[1]):
            return found[2]
        made = differentiable.astype(x, want)
        self._cache[id(x)] = (x, next_seq(), made)
        return made


def cast_operands(made: Primitive, operands: Sequence[Any]) -> Sequence[Any]:
    """The operands of an operation of the table, called while some thread is in a block."""
    setting = _state.setting
    if setting is None or not setting.enabled:
        return operands
    narrow = NARROWS[made.name]
    return [setting.convert(x, narrow) for x in operands]
