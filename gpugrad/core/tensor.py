"""The tensor: an array of any library, and its place in the graph."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from itertools import chain
from threading import Lock
from typing import TYPE_CHECKING, Any, SupportsIndex

import numpy as np

from gpugrad.backend import SPACES, Array, Backend, as_dtype
from gpugrad.backend.memory import squares
from gpugrad.core import graph
from gpugrad.core.actions import action, tracing
from gpugrad.core.graph import NOT_IN_PLACE, Extra, Leaf, extra_of, mutations, next_seq
from gpugrad.core.handle import RemovableHandle
from gpugrad.core.modes import is_grad_enabled
from gpugrad.core.primitive import differentiable
from gpugrad.core.walk import through_hooks, walk
from gpugrad.errors import DeviceError, DTypeError, GraphError, InplaceError, ShapeError

#: Operands that are not arrays: Python's numbers are weak, None stands for a missing operand.
SCALARS = frozenset({float, int, bool, complex, type(None)})


class Tensor:
    """An array that remembers how it was computed.

    Make one with :func:`gpugrad.tensor`; operations make the others. Every function of the array
    namespace is there as a method where NumPy has it.

    Attributes
    ----------
    data:
        The array itself, of the library that owns it (``numpy.ndarray``, ``cupy.ndarray``, …).
    """

    __slots__ = ("__weakref__", "_node", "_stopped", "data")

    #: NumPy's operators hand over to ours: ``array * tensor`` calls ``Tensor.__rmul__``.
    __array_ufunc__ = None

    data: Array
    _node: Any

    # -- what it is --------------------------------------------------------------------------------

    @property
    def shape(self) -> tuple[int, ...]:
        """The size of every axis."""
        return self.data.shape  # type: ignore[no-any-return]

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return len(self.data.shape)

    @property
    def size(self) -> int:
        """The number of elements."""
        n = 1
        for length in self.data.shape:
            n *= length
        return n

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype of the elements, as NumPy names it."""
        return SPACES[type(self.data)].numpy_dtype(self.data)

    @property
    def nbytes(self) -> int:
        """Bytes that the elements take."""
        return SPACES[type(self.data)].nbytes(self.data)

    @property
    def device(self) -> str:
        """Where the array lives: ``"cpu"``, ``"cuda:0"``."""
        return SPACES[type(self.data)].device(self.data)

    @property
    def backend(self) -> Backend:
        """The backend that owns the array."""
        return SPACES[type(self.data)]

    # -- its place in the graph --------------------------------------------------------------------

    @property
    def requires_grad(self) -> bool:
        """Whether a backward pass reaches this tensor."""
        return self._node is not None

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        self.requires_grad_(value)

    def requires_grad_(self, requires_grad: bool = True) -> Tensor:
        """Start or stop collecting gradients here, and return the tensor itself.

        A leaf that stops keeps its :attr:`grad` and takes up where it stopped when it starts again.
        Raises DTypeError for integers and booleans, which have no derivative, and GraphError when a
        computed tensor is asked to stop (detach it instead).
        """
        if not requires_grad:
            if not self.is_leaf:
                raise GraphError(
                    "requires_grad_(False): this tensor was computed from others; use detach() "
                    "for a tensor outside the graph"
                )
            if self._node is not None:
                self._stopped = self._node
            self._node = None
        elif self._node is None:
            check_differentiable(self.data, "requires_grad_")
            self._node = getattr(self, "_stopped", None) or Leaf()
        return self

    @property
    def is_leaf(self) -> bool:
        """Whether the tensor was made by hand and not by a recorded operation."""
        return self._node is None or isinstance(self._node, Leaf)

    @property
    def grad_fn(self) -> Any:
        """The graph node that computed this tensor; None for a leaf."""
        return None if isinstance(self._node, Leaf) else self._node

    @property
    def grad(self) -> Tensor | None:
        """The gradient that backward passes have added up here, or None.

        Computed tensors keep theirs only after :meth:`retain_grad`.
        """
        node = self._node or getattr(self, "_stopped", None)
        if isinstance(node, Leaf):
            node.squares = None
            return node.grad  # type: ignore[no-any-return]
        extra: Extra | None = getattr(node, "extra", None)
        return None if extra is None else extra.grad

    @grad.setter
    def grad(self, value: Tensor | None) -> None:
        node = self._node or getattr(self, "_stopped", None)
        if value is not None:
            if not isinstance(value, Tensor):
                raise DTypeError(f"grad: a tensor or None, not {type(value).__name__}")
            if value.shape != self.shape:
                raise ShapeError(
                    f"grad: shape {value.shape} for a tensor of shape {self.shape}; they must agree"
                )
            if value.dtype != self.dtype:
                raise DTypeError(
                    f"grad: {value.dtype} for a tensor of {self.dtype}; convert the gradient with "
                    f".to({str(self.dtype)!r})"
                )
            if not same_device(value.device, self.device):
                raise DeviceError(
                    f"grad: a gradient on {value.device} for a tensor on {self.device}; move it "
                    f"with .to({self.device!r})"
                )
        if isinstance(node, Leaf):
            node.squares = None
            node.grad = value
        elif node is not None:
            extra_of(node).grad = value
        elif value is not None:
            raise GraphError("grad: this tensor does not require a gradient")

    def retain_grad(self) -> None:
        """Keep the gradient of a computed tensor too, in :attr:`grad`."""
        if self._node is None:
            raise GraphError("retain_grad: this tensor does not require a gradient")
        if not isinstance(self._node, Leaf):
            extra_of(self._node).retain = True

    def register_hook(self, hook: Callable[[Tensor], Tensor | None]) -> RemovableHandle:
        """Call ``hook`` with the complete gradient of this tensor in every backward pass.

        What the hook returns, unless None, takes the gradient's place: a tensor of the same shape.
        It must not change the gradient in place. Returns what removes the hook.
        """
        if self._node is None:
            raise GraphError("register_hook: this tensor does not require a gradient")
        hooks = extra_of(self._node).hooks
        key = next_seq()  # never given twice, so that a removal finds its own hook only
        hooks[key] = hook
        return RemovableHandle(lambda: hooks.pop(key, None))

    def detach(self) -> Tensor:
        """A tensor of the same array outside the graph. Nothing is copied."""
        return tensor_of(self.data)

    def backward(
        self,
        gradient: Any = None,
        *,
        retain_graph: bool | None = None,
        create_graph: bool = False,
    ) -> None:
        """Add the gradients of this tensor to ``.grad`` of every leaf it was computed from.

        Parameters
        ----------
        gradient:
            The gradient that arrives from above, of this tensor's shape. May be left out when the
            tensor has one element: it is 1 then.
        retain_graph:
            Keep the saved arrays so that the graph can be run again. Default: ``create_graph``.
        create_graph:
            Record the backward pass itself, for derivatives of derivatives.

        Raises
        ------
        GraphError
            When nothing was recorded, or there is no gradient for more than one element.
        FreedGraphError
            On a second pass through a graph that was not retained.
        InplaceError
            When an array that a node saved was changed in place since.
        """
        if self._node is None:
            raise GraphError(
                "backward: this tensor has no graph; set requires_grad=True on an input before "
                "computing it, outside of no_grad()"
            )
        g = seed(self, gradient, create_graph)
        retain = create_graph if retain_graph is None else retain_graph
        given = () if gradient is None else (g.data if create_graph else g,)
        deposit(*walk([(self._node, g)], retain=retain, wrap=tensor_of if create_graph else None),
                given)  # fmt: skip

    # -- where it lives ----------------------------------------------------------------------------

    def to(self, device: str | None = None, dtype: Any = None) -> Tensor:
        """This tensor on another device or of another dtype; itself when nothing changes.

        Gradients find the way back. ``device`` is a string such as ``"cpu"`` or ``"cuda:0"``.
        """
        if (device is not None and not isinstance(device, str)) or (
            device is not None and dtype is None and _is_dtype_name(device)
        ):
            device, dtype = None, device
        out: Tensor = self
        if dtype is not None and as_dtype(dtype) != self.dtype:
            out = differentiable.astype(out, as_dtype(dtype))
        if device is not None and not same_device(device, self.device):
            out = differentiable.to_device(out, device=device)
        return out

    def cpu(self) -> Tensor:
        """This tensor in host memory."""
        return self.to("cpu")

    def numpy(self) -> np.ndarray[Any, Any]:
        """The elements as a NumPy array: shared on the CPU, copied from a GPU.

        Refused for a tensor that requires a gradient, because the graph would not see what happens
        to the array; detach it first.
        """
        if self._node is not None:
            raise GraphError(
                "numpy: this tensor requires a gradient; call tensor.detach().numpy() if the graph "
                "need not see what happens to the array"
            )
        return SPACES[type(self.data)].to_host(self.data)

    def item(self) -> Any:
        """The one element as a Python number. On a GPU the host waits for it."""
        if self.size != 1:
            raise ShapeError(f"item: a tensor of one element is needed, this one has {self.size}")
        return SPACES[type(self.data)].to_host(self.data).item()

    def tolist(self) -> Any:
        """The elements as nested Python lists."""
        return SPACES[type(self.data)].to_host(self.data).tolist()

    def __float__(self) -> float:
        return float(self.item())

    def __int__(self) -> int:
        return int(self.item())

    def __bool__(self) -> bool:
        if self.size != 1:
            raise ShapeError(
                f"a tensor of shape {self.shape} is neither true nor false; use any() or all()"
            )
        return bool(self.item())

    def __complex__(self) -> complex:
        return complex(self.item())

    def __index__(self) -> int:
        return operator.index(self.item())

    def __format__(self, spec: str) -> str:
        return format(str(self) if self.data.shape or not spec else self.item(), spec)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        if self.device != "cpu":
            raise DeviceError(
                f"a tensor on {self.device} does not become a NumPy array by itself; call "
                ".numpy() to copy it to the host"
            )
        return np.array(self.numpy(), dtype=dtype, copy=copy)

    def __dlpack__(self, **options: Any) -> Any:
        if self._node is not None:
            raise GraphError("DLPack: this tensor requires a gradient; export tensor.detach()")
        return self.data.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.data.__dlpack_device__()  # type: ignore[no-any-return]

    def __array_namespace__(self, *, api_version: str | None = None) -> Any:
        import gpugrad

        known = gpugrad.__array_api_version__
        if api_version is not None and api_version > known:
            raise ValueError(f"Array API {api_version} is not implemented; the newest is {known}")
        return gpugrad

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if not self.is_leaf:
            raise GraphError("deepcopy: only leaves can be copied with their place; detach() first")
        space = SPACES[type(self.data)]
        twin = type(self).__new__(type(self))
        twin.data = space.asarray(self.data, device=space.device(self.data), copy=True)
        twin._node = None if self._node is None else Leaf()
        if self._node is not None and self.grad is not None:
            grad = self.grad if self.grad.is_leaf else self.grad.detach()
            twin.grad = grad.__deepcopy__(memo)
        memo[id(self)] = twin
        return twin

    # -- in place ----------------------------------------------------------------------------------

    def _inplace(self, name: str, operation: Callable[..., Any], other: Any) -> Tensor:
        """``self = operation(self, other)``, keeping this tensor object.

        Outside the graph the memory itself changes, and nodes that saved it find out. A recorded
        tensor gets a new array instead: what earlier nodes saved keeps its value.
        """
        recorded = is_grad_enabled() and (
            self._node is not None or (isinstance(other, Tensor) and other._node is not None)
        )
        if not recorded:
            value = other.data if isinstance(other, Tensor) else other
            result = operation(tensor_of(self.data), value)
            self._expect_same(name, result)
            if SPACES[type(self.data)].mutable:
                self._write(name, ..., result.data)
            else:
                self.data = result.data
            return self
        self._refuse_inplace(name)
        result = operation(self, other)
        self._expect_same(name, result)
        self.data = result.data
        self._node = result._node
        return self

    def _write(self, name: str, index: Any, value: Any) -> None:
        """Change the memory itself, and say so to the nodes that saved it."""
        try:
            SPACES[type(self.data)].setitem(self.data, index, value)
        except Exception as error:
            error.add_note(f"gpugrad: {name} on a tensor of {self.dtype}, shape {self.shape}")
            raise
        mutations.mark(self.data)

    def _refuse_inplace(self, name: str) -> None:
        if isinstance(self._node, Leaf):
            raise InplaceError(
                f"{name}: a leaf that requires a gradient cannot change in place while it is "
                "recorded; write x = x + 1, or make the change under no_grad()"
            )
        made = getattr(self._node, "primitive", None)
        if made is not None and made.view:
            raise InplaceError(
                f"{name}: this tensor came from {made.name}, which may share memory with its "
                "input; change a copy, or write x = x + 1"
            )

    def _expect_same(self, name: str, result: Tensor) -> None:
        if result.shape != self.shape:
            raise ShapeError(
                f"{name}: the result has shape {result.shape}, which does not fit in place into "
                f"{self.shape}; write x = x + y to get a new tensor"
            )
        if result.data.dtype != self.data.dtype:
            raise DTypeError(
                f"{name}: the result is {result.dtype}, this tensor {self.dtype}; write x = x + y, "
                "or convert the operand with .to(dtype)"
            )

    def __setitem__(self, index: Any, value: Any) -> None:
        index = placed_index(self.data, index)
        recorded = is_grad_enabled() and (
            self._node is not None or (isinstance(value, Tensor) and value._node is not None)
        )
        if not recorded:
            raw = value.data if isinstance(value, Tensor) else value
            if SPACES[type(self.data)].mutable:
                self._write("setitem", index, raw)
                return
        self._refuse_inplace("setitem")
        if recorded and self.dtype.kind in "biu":
            raise DTypeError(
                f"setitem: a tensor of {self.dtype} cannot hold values that require a gradient; "
                "convert it first, x = x.to('float32'), or detach the value"
            )
        result = differentiable.put_index(self, value, index=index)
        self.data = result.data
        self._node = result._node

    def __iadd__(self, other: Any) -> Tensor:
        return self._inplace("+=", differentiable.add, other)

    def __isub__(self, other: Any) -> Tensor:
        return self._inplace("-=", differentiable.subtract, other)

    def __imul__(self, other: Any) -> Tensor:
        return self._inplace("*=", differentiable.multiply, other)

    def __itruediv__(self, other: Any) -> Tensor:
        return self._inplace("/=", differentiable.divide, other)

    def __ipow__(self, other: Any) -> Tensor:
        return self._inplace("**=", differentiable.pow, other)

    # -- looks -------------------------------------------------------------------------------------

    def __len__(self) -> int:
        if not self.data.shape:
            raise TypeError("len() of a 0-d tensor")
        return int(self.data.shape[0])

    def __iter__(self) -> Iterator[Tensor]:
        if not self.data.shape:
            raise TypeError("iteration over a 0-d tensor")
        return (self[i] for i in range(len(self)))

    __hash__ = object.__hash__

    def __repr__(self) -> str:
        space = SPACES[type(self.data)]
        body = np.array2string(space.to_host(self.data), separator=", ", prefix="tensor(")
        parts = [body]
        if self.dtype not in (np.dtype("float64"), np.dtype("int64"), np.dtype("bool")):
            parts.append(f"dtype={self.dtype}")
        if self.device != "cpu":
            parts.append(f"device={self.device!r}")
        if isinstance(self._node, Leaf):
            parts.append("requires_grad=True")
        elif self._node is not None:
            parts.append(f"grad_fn=<{self._node.primitive.name}>")
        return f"tensor({', '.join(parts)})"

    if TYPE_CHECKING:  # put here by gpugrad.ops, which owns the formulas

        def __add__(self, other: Any) -> Tensor: ...
        def __radd__(self, other: Any) -> Tensor: ...
        def __sub__(self, other: Any) -> Tensor: ...
        def __rsub__(self, other: Any) -> Tensor: ...
        def __mul__(self, other: Any) -> Tensor: ...
        def __rmul__(self, other: Any) -> Tensor: ...
        def __truediv__(self, other: Any) -> Tensor: ...
        def __rtruediv__(self, other: Any) -> Tensor: ...
        def __floordiv__(self, other: Any) -> Tensor: ...
        def __rfloordiv__(self, other: Any) -> Tensor: ...
        def __mod__(self, other: Any) -> Tensor: ...
        def __rmod__(self, other: Any) -> Tensor: ...
        def __pow__(self, other: Any) -> Tensor: ...
        def __rpow__(self, other: Any) -> Tensor: ...
        def __matmul__(self, other: Any) -> Tensor: ...
        def __rmatmul__(self, other: Any) -> Tensor: ...
        def __and__(self, other: Any) -> Tensor: ...
        def __rand__(self, other: Any) -> Tensor: ...
        def __or__(self, other: Any) -> Tensor: ...
        def __ror__(self, other: Any) -> Tensor: ...
        def __xor__(self, other: Any) -> Tensor: ...
        def __rxor__(self, other: Any) -> Tensor: ...
        def __lshift__(self, other: Any) -> Tensor: ...
        def __rshift__(self, other: Any) -> Tensor: ...
        def __invert__(self) -> Tensor: ...
        def __neg__(self) -> Tensor: ...
        def __pos__(self) -> Tensor: ...
        def __abs__(self) -> Tensor: ...
        def __eq__(self, other: object) -> Tensor: ...  # type: ignore[override]
        def __ne__(self, other: object) -> Tensor: ...  # type: ignore[override]
        def __lt__(self, other: Any) -> Tensor: ...
        def __le__(self, other: Any) -> Tensor: ...
        def __gt__(self, other: Any) -> Tensor: ...
        def __ge__(self, other: Any) -> Tensor: ...
        def __getitem__(self, index: Any) -> Tensor: ...
        @property
        def T(self) -> Tensor: ...
        @property
        def mT(self) -> Tensor: ...
        def sum(self, axis: Any = ..., dtype: Any = ..., keepdims: bool = ...) -> Tensor: ...
        def mean(self, axis: Any = ..., keepdims: bool = ...) -> Tensor: ...
        def var(self, axis: Any = ..., correction: float = ..., keepdims: bool = ...) -> Tensor: ...
        def std(self, axis: Any = ..., correction: float = ..., keepdims: bool = ...) -> Tensor: ...
        def max(self, axis: Any = ..., keepdims: bool = ...) -> Tensor: ...
        def min(self, axis: Any = ..., keepdims: bool = ...) -> Tensor: ...
        def prod(self, axis: Any = ..., dtype: Any = ..., keepdims: bool = ...) -> Tensor: ...
        def any(self, axis: Any = ..., keepdims: bool = ...) -> Tensor: ...
        def all(self, axis: Any = ..., keepdims: bool = ...) -> Tensor: ...
        def argmax(self, axis: int | None = ..., keepdims: bool = ...) -> Tensor: ...
        def argmin(self, axis: int | None = ..., keepdims: bool = ...) -> Tensor: ...
        def reshape(self, *shape: Any) -> Tensor: ...
        def transpose(self, *axes: Any) -> Tensor: ...
        def squeeze(self, axis: Any = ...) -> Tensor: ...
        def astype(self, dtype: Any) -> Tensor: ...
        def clip(self, min: Any = ..., max: Any = ...) -> Tensor: ...
        def take(self, indices: Any, axis: SupportsIndex | None = ...) -> Tensor: ...
        def clone(self) -> Tensor: ...
        def flatten(self) -> Tensor: ...
        def dot(self, other: Any) -> Tensor: ...


def tensor_of(data: Array, node: Any = None) -> Tensor:
    """The tensor of an array, as it is, at a place in the graph.

    In place of an ``__init__``, which would make every operation that builds a tensor slower.
    """
    made = Tensor()
    made.data = data
    made._node = node
    return made


class Parameter(Tensor):
    """A tensor that a module owns and an optimiser trains."""

    __slots__ = ()

    def __init__(self, data: Any, requires_grad: bool = True) -> None:
        self.data = data.data if isinstance(data, Tensor) else data
        self._node = None
        if requires_grad:
            self.requires_grad_()


def check_differentiable(x: Array, where: str) -> None:
    """Raise DTypeError unless ``x`` holds real floating-point numbers."""
    dtype = SPACES[type(x)].numpy_dtype(x)
    if dtype.kind in "biu":
        raise DTypeError(
            f"{where}: {dtype} has no derivative; convert to a floating-point dtype first, for "
            "example tensor.to('float32')"
        )
    if dtype.kind == "c":
        raise DTypeError(f"{where}: gradients of complex tensors are not supported, got {dtype}")


def raw_index(index: Any) -> Any:
    """An index with the arrays of the tensors in it.

    A NumPy array is copied: the graph keeps the index, and nobody would tell it of a change.
    """
    if isinstance(index, Tensor):
        return index.data
    if isinstance(index, np.ndarray):
        return index.copy()
    if isinstance(index, tuple):
        return tuple(raw_index(i) for i in index)
    if isinstance(index, list):
        return np.asarray([raw_index(i) for i in index], dtype=None if index else np.intp)
    return index


def placed_index(x: Array, index: Any) -> Any:
    """An index of ``x`` with its arrays, tensors' and the host's, where the library reads them.

    A list becomes an array, of integers or of booleans.
    """
    index = raw_index(index)
    space = SPACES[type(x)]
    if isinstance(index, np.ndarray) and not isinstance(x, np.ndarray):
        return space.asarray(index, device=space.device(x))
    if isinstance(index, tuple):
        return tuple(placed_index(x, i) for i in index)
    return index


def same_device(a: str, b: str) -> bool:
    """Whether two device strings name one device: "cuda" is "cuda:0"."""
    return a.removesuffix(":0") == b.removesuffix(":0")


def _is_dtype_name(name: str) -> bool:
    try:
        as_dtype(name)
    except TypeError:
        return False
    return True


def seed(y: Tensor, gradient: Any, create_graph: bool) -> Any:
    """The gradient that a backward pass starts from, checked against the tensor ``y``."""
    space = SPACES[type(y.data)]
    if gradient is None:
        if y.size != 1:
            raise GraphError(
                f"backward: a gradient is implied for one element only, this tensor has shape "
                f"{y.shape}; reduce it (y.sum()) or pass gradient="
            )
        g = space.ones_like(y.data)
        if tracing.trace is not None:
            tracing.trace.note_made(g)
        return tensor_of(g) if create_graph else g
    if not isinstance(gradient, Tensor):
        gradient = tensor_of(space.asarray(gradient, device=space.device(y.data)))
    if gradient.dtype.kind == "c" and y.dtype.kind != "c":
        raise DTypeError(
            f"backward: the gradient is {gradient.dtype}, the tensor {y.dtype}; give its real part"
        )
    if gradient.shape != y.shape:
        raise ShapeError(
            f"backward: the gradient has shape {gradient.shape}, the tensor {y.shape}; "
            "they must be equal"
        )
    if not same_device(gradient.device, y.device):
        raise DeviceError(
            f"backward: the gradient is on {gradient.device}, the tensor on {y.device}; move it "
            f"with gradient.to({y.device!r})"
        )
    if gradient.data.dtype != y.data.dtype:
        gradient = differentiable.astype(gradient, y.dtype)
    return gradient if create_graph else gradient.data


#: Two threads may bring gradients to one leaf.
_depositing = Lock()


@action
def deposit(borrowed: dict[Any, Any], owned: dict[Any, Any], given: tuple[Array, ...] = ()) -> None:
    """Add what a walk brought to the leaves to their ``.grad``.

    An array that somebody else may hold (a view, the caller's own, one that reached two leaves) is
    copied, so that a gradient never shares memory with anything. A leaf with a home has its
    gradient there.
    """
    shared = {id(x) for x in given}
    for found in (owned, borrowed):
        for leaf, g in found.items():
            if leaf.extra is not None and leaf.extra.hooks:
                tensor = through_hooks(leaf.extra.hooks, as_tensor(g))
                found[leaf] = tensor if isinstance(g, Tensor) else tensor.data
                shared.add(id(tensor.data))  # the hooks may have kept it
    with _depositing:  # only now: a hook that raises changes nothing
        for leaf, g in chain(owned.items(), borrowed.items()):
            recorded = isinstance(g, Tensor)
            x = g.data if recorded else g
            leaf.squares = None
            old = leaf.grad
            if old is None:
                if leaf.home is not None and not recorded:
                    there = leaf.home.keep(x)
                    if there is not None:
                        if squares and id(x) not in shared:
                            leaf.squares = squares.pop(id(there), None)
                        shared.add(id(x))
                        leaf.grad = tensor_of(there)
                        continue
                space = SPACES[type(x)]
                if id(x) in shared or (leaf not in owned and space.is_view(x)):
                    if recorded:
                        g = differentiable.copy(g)
                    else:
                        g = space.asarray(g, device=space.device(g), copy=True)
                shared.add(id(x))
                leaf.grad = g if recorded else tensor_of(g)
            elif recorded:
                leaf.grad = old + g
            elif old._node is not None or not SPACES[type(x)].mutable:
                leaf.grad = tensor_of((old.detach() + tensor_of(g)).data)
            else:
                total = old.data
                graph.add_into(total, g)
                mutations.mark(total)


def as_tensor(x: Any) -> Tensor:
    """``x`` itself when it is a tensor, else a tensor of the array ``x``."""
    return x if isinstance(x, Tensor) else tensor_of(x)


differentiable.as_tensor = as_tensor
NOT_IN_PLACE.add(Tensor)
