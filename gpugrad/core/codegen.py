"""From a declaration to fast Python: the public function of a primitive, and its node classes.

Most of the cost of an operation on a small array is Python's own: calls, attribute look-ups,
building objects. So each primitive gets a function written out for its operands, and each set of
operands that want a gradient gets a node class with exactly the slots that its rules name. The
text of both is generated here, compiled on first use, and can be read with :func:`source`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from threading import RLock
from types import FunctionType
from typing import Any, NoReturn

from gpugrad.backend import SPACES, Backend, backend_for_device, is_array, on_register
from gpugrad.backend.kernels import Choice, fusible, note
from gpugrad.core.autocast import NARROWS, cast_operands, casting
from gpugrad.core.graph import Pick, next_seq
from gpugrad.core.modes import gate, is_grad_enabled, records
from gpugrad.core.nodes import (
    FIT,
    compiled,
    has_joint_class,
    has_rule_classes,
    mask_of,
    node_class,
    saved_value,
)
from gpugrad.core.primitive import Primitive, registry
from gpugrad.core.rules import GenericNode
from gpugrad.core.tensor import SCALARS, Tensor, tensor_of
from gpugrad.errors import DeviceError, DTypeError, GpugradError, ShapeError

# -- operands -------------------------------------------------------------------------------------


def lift(made: Primitive, value: Any, peers: Sequence[Any]) -> Any:
    """The array, Python scalar or None that an operand which is not a tensor stands for.

    A Python scalar stays one next to an array (it is weak: it takes the array's dtype). Lists and
    NumPy scalars become arrays on the device of the operands beside them.
    """
    cls = type(value)
    arrays = (p.data if isinstance(p, Tensor) else p for p in peers)
    peer = next((x for x in arrays if type(x) not in SCALARS and is_array(x)), None)
    if cls in SCALARS:
        if peer is not None or value is None:
            return value
        return backend_for_device("cpu").asarray(value)
    if is_array(value) and value.shape:
        own = SPACES[cls]  # a subclass (numpy.memmap) is read as its library's plain array
        array = value if cls in own.types else own.asarray(value, device=own.device(value))
        return _numeric(made, array)
    if isinstance(value, str | bytes | dict | set) or (callable(value) and not is_array(value)):
        raise DTypeError(
            f"{made.name}: {cls.__name__} is not an array, a number or a nested list of numbers"
        )
    space: Backend = SPACES[type(peer)] if peer is not None else backend_for_device("cpu")
    if isinstance(value, list | tuple) and any(isinstance(v, Tensor) for v in value):
        raise DTypeError(
            f"{made.name}: a list of tensors is not an array; join them with gpugrad.stack first"
        )
    try:
        array = space.asarray(value, device=space.device(peer) if peer is not None else None)
    except (TypeError, ValueError) as error:
        raise DTypeError(f"{made.name}: cannot make an array of {cls.__name__}: {error}") from error
    return _numeric(made, array)


def _numeric(made: Primitive, x: Any) -> Any:
    """The array ``x``, unless it holds objects, text or dates."""
    if getattr(x.dtype, "kind", "f") in "OUSMm":
        raise DTypeError(f"{made.name}: {x.dtype} is not a numeric dtype; pass numbers or booleans")
    return x


def kind_of(first: Any, rest: Sequence[Any]) -> type:
    """The array class that decides where an operation runs: that of the first array operand."""
    for x in (first, *(p.data if isinstance(p, Tensor) else p for p in rest)):
        if type(x) not in SCALARS and is_array(x):
            return type(x)
    return type(backend_for_device("cpu").asarray(0.0))


# -- errors ---------------------------------------------------------------------------------------


def show(x: Any) -> str:
    """An operand in a message: dtype, shape and, off the CPU, device."""
    if type(x) in SCALARS or not is_array(x):
        return repr(x) if type(x) in SCALARS else type(x).__name__
    space = SPACES[type(x)]
    device = space.device(x)
    place = "" if device == "cpu" else f" on {device}"
    return f"{space.numpy_dtype(x)}{list(x.shape)}{place}"


def fail(made: Primitive, operands: Sequence[Any], error: Exception) -> NoReturn:
    """Raise ``error`` again with the operation and what met in it, typed where it is plain."""
    names = made.operands if not made.variadic else [f"{made.operands[0]}[{i}]" for i in
                                                     range(len(operands))]  # fmt: skip
    met = ", ".join(f"{n}: {show(x)}" for n, x in zip(names, operands, strict=False))
    arrays = [x for x in operands if type(x) not in SCALARS and is_array(x)]
    if isinstance(error, GpugradError):
        error.add_note(f"gpugrad.{made.name}({met})")
        raise error
    if len({(SPACES[type(x)].name, SPACES[type(x)].device(x)) for x in arrays}) > 1:
        mixed(made, operands)
    said = str(error).removesuffix(".")
    if isinstance(error, ValueError) and arrays:
        trouble = "operands do not fit together" if len(arrays) > 1 else "cannot take"
        raise ShapeError(
            f"{made.name}: {trouble} ({met}): {said}. {_advice(made, arrays, error)}"
        ) from error
    if isinstance(error, TypeError) and arrays:
        raise DTypeError(
            f"{made.name}: cannot take ({met}): {said}. Convert what does not fit with .to(dtype)"
        ) from error
    error.add_note(f"gpugrad.{made.name}({met})")
    raise error


def _advice(made: Primitive, arrays: Sequence[Any], error: Exception) -> str:
    if isinstance(error, IndexError):  # an axis that is not there is both kinds of error
        n = len(arrays[0].shape)
        return f"The axes of {n} dimensions are {-n} to {n - 1}" if n else "A 0-d array has no axes"
    if made.advice:
        return made.advice
    if made.elementwise:
        return (
            "Shapes broadcast when, from the last axis backward, sizes are equal or one of them "
            "is 1; use reshape or expand_dims to line them up"
        )
    return "Check the operands' shapes against the operation's documentation"


def mixed(made: Primitive, operands: Sequence[Any]) -> NoReturn:
    """Raise for operands that live in different libraries or on different devices."""
    met = ", ".join(
        f"{n} is {show(x)} ({SPACES[type(x)].name} on {SPACES[type(x)].device(x)})"
        for n, x in zip(made.operands * len(operands), operands, strict=False)
        if type(x) not in SCALARS and is_array(x)
    )
    raise DeviceError(
        f"{made.name}: its operands live on different devices: {met}; move one with "
        ".to(device) so that both are in one place"
    )


def normalise(y: Any, kind: type) -> Any:
    """An array in place of the scalar object that some libraries return for a 0-d result."""
    if type(y) in SCALARS or SPACES[type(y)] is SPACES[kind]:
        return SPACES[kind].asarray(y)
    return y


# -- implementations ------------------------------------------------------------------------------


def implement(made: Primitive, kind: type) -> Callable[..., Any]:
    """The forward bound to the library of an array class, found at the first call with it."""
    space = SPACES[kind]
    if made.native is not None:
        found = getattr(space, made.native)
    else:
        found = partial(made.forward, space)
        if made.name in space.slots:
            found = space.fused(made.name, found)
        found = space.bind(found)
    if watching:
        found = watched(made, found, space)
    made.implementations[kind] = found
    return found  # type: ignore[no-any-return]


#: Not empty while :func:`explain` runs in some thread.
watching: list[None] = []


def watched(made: Primitive, found: Callable[..., Any], space: Backend) -> Callable[..., Any]:
    """``found``, telling :func:`explain` that it ran, where no slot tells."""
    if made.name in space.slots or (made.native or "") in space.slots:
        return found
    choice = Choice(made.name, "generic", f"{space.name} has no kernel for it")

    def told(*args: Any, **kwargs: Any) -> Any:
        note(choice)
        return found(*args, **kwargs)

    return told


def forget() -> None:
    """Look every implementation up again."""
    for made in registry.values():
        made.implementations.clear()


on_register(forget)

# -- the public function --------------------------------------------------------------------------


def function_source(made: Primitive) -> str:
    """The text of a primitive's public function."""
    operands = made.operands
    parameters = list(made.parameters.values())
    optional = [p.default is None for p in inspect.signature(made.forward).parameters.values()][1:]
    head = [o + "=None" * none for o, none in zip(operands, optional)]
    head = [f"*{operands[0]}"] if made.variadic else [*head, "/"]
    star = made.variadic
    for p in parameters:
        if p.kind is p.KEYWORD_ONLY and not star:
            head.append("*")
            star = True
        head.append(p.name if p.default is p.empty else f"{p.name}=default_{p.name}")
    lines = [f"def {made.name}({', '.join(head)}):"]
    add = lines.append
    kwargs = "".join(f", {p.name}={p.name}" for p in parameters)
    if made.variadic:
        return _variadic_source(made, lines, kwargs)
    count = range(len(operands))
    if made.name in NARROWS:
        together = "".join(f"{o}, " for o in operands)
        add("    if casting_:")
        add(f"        {together}= cast_operands(made, ({together}))")
    for i in count:
        name = operands[i]
        others = "(" + "".join(f"{operands[j]}, " for j in count if j != i) + ")"
        add(f"    if {name}.__class__ is Tensor or isinstance({name}, Tensor):")
        add(f"        u{i} = {name}.data")
        add(f"        p{i} = {name}._node")
        if i == 0:
            add("        kind = u0.__class__")
        # The usual company of a tensor needs no look at the other operands: a Python number.
        if i == 0 and len(operands) == 2:
            add(f"    elif {name}.__class__ in SCALARS and isinstance({operands[1]}, Tensor):")
            add(f"        u0 = {name}")
            add("        p0 = None")
            add(f"        kind = {operands[1]}.data.__class__")
        elif i > 0:
            add(f"    elif {name}.__class__ in SCALARS:")
            add(f"        u{i} = {name}")
            add(f"        p{i} = None")
        add("    else:")
        add(f"        u{i} = lift(made, {name}, {others})")
        add(f"        p{i} = None")
        if i == 0:
            add(f"        kind = kind_of(u0, {others})")
    arrays = ", ".join(f"u{i}" for i in count)
    for i in count[1:]:
        add(f"    if u{i}.__class__ is not kind and u{i}.__class__ not in SCALARS:")
        add(f"        foreign(made, ({arrays},), kind)")
    target = "y, *aux" if made.aux else "y"
    _add_lookup(lines)
    add("    try:")
    add(f"        {target} = forward({arrays}{kwargs})")
    add("    except Exception as error:")
    add(f"        fail(made, ({arrays},), error)")
    if made.outputs == 1 and "device" not in made.parameters:
        add("    if y.__class__ is not kind:")
        add("        y = normalise(y, kind)")
    values = "(" + "".join(f"{p.name}, " for p in parameters) + ")"
    if has_joint_class(made):
        _add_joint(made, lines, arrays, values)
        return "\n".join(lines)
    if not has_rule_classes(made):
        parents = "(" + "".join(f"p{i}, " for i in count) + ")"
        aux = "aux" if made.aux else "()"
        add(f"    return record(made, ({arrays},), {parents}, y, {aux}, {values})")
        return "\n".join(lines)
    wanted = [i for i in count if made.rules[i] is not None]  # type: ignore[index]
    nothing = " and ".join(f"p{i} is None" for i in wanted)
    add("    t = Tensor()")
    add("    t.data = y")
    add(f"    if {nothing} or gate_ and not records(t):")
    add("        t._node = None")
    add("        return t")
    fits = made.fits
    if len(wanted) == 1:
        _add_node(made, lines, 1 << wanted[0], "    ", fits)
    else:
        keyword = "if"
        for bits in sorted(range(1, 1 << len(wanted)), key=lambda b: bin(b).count("1")):
            key = sum(1 << wanted[k] for k in range(len(wanted)) if bits >> k & 1)
            test = " and ".join(f"p{i} is {'not ' if key >> i & 1 else ''}None" for i in wanted)
            last = bits == (1 << len(wanted)) - 1
            add("    else:" if last else f"    {keyword} {test}:")
            keyword = "elif"
            _add_node(made, lines, key, "        ", fits)
    if fits:
        metas = ", ".join(f"meta_of(u{i})" for i in count)
        if made.may_broadcast:
            add("    if not same:")
        add(f"    {'    ' * made.may_broadcast}n.meta = ({metas}, y.shape)")
    if parameters:
        add(f"    n.kw = {values}")
    add("    n.seq = next_seq()")
    add("    t._node = n")
    add("    return t")
    return "\n".join(lines)


def _add_lookup(lines: list[str]) -> None:
    """The lines that find the implementation, in a plain dict: nothing is looked up faster."""
    lines += [
        "    try:",
        "        forward = implementations[kind]",
        "    except KeyError:",
        "        forward = implement(made, kind)",
    ]


def _add_node(made: Primitive, lines: list[str], key: int, indent: str, fits: bool) -> None:
    """The lines that make one node and fill the slots that its mask asks for."""
    if made.may_broadcast:
        _add_same(lines, key, indent)
        key_of = f"{key} if same else {key + FIT}"
        cls = f"(node_{key} if same else node_{key + FIT})"
    else:
        key_of = str(key + FIT if fits else key)
        cls = f"node_{key_of}"
    lines += [
        f"{indent}try:",
        f"{indent}    n = {cls}()",
        f"{indent}except NameError:  # the first node of its kind",
        f"{indent}    n = node_class(made, {key_of})()",
    ]
    mask = mask_of(made, key)
    for k, i in enumerate(i for i, on in enumerate(mask) if on):
        lines.append(f"{indent}n.p{k} = p{i}")
    for name in made.saved_names(mask):
        lines.append(f"{indent}n.s_{name} = {saved_value(made, name, 'u{}')}")


def _add_same(lines: list[str], key: int, indent: str) -> None:
    """The lines that ask whether every operand that wants a gradient has the result's shape.

    And its dtype. When one operand does, the sizes tell: a result of as many bytes and axes was
    neither broadcast nor promoted, unless it is empty. That costs two thirds of comparing shapes;
    the standard knows no ``nbytes``, so the exception is for libraries that keep to its letter.
    """
    if key == 3:
        lines.append(f"{indent}same = u0.shape == u1.shape and u0.dtype is u1.dtype")
        return
    u = f"u{key - 1}"
    lines += [
        f"{indent}try:",
        f"{indent}    same = y.nbytes == {u}.nbytes != 0 and y.ndim == {u}.ndim",
        f"{indent}except AttributeError:",
        f"{indent}    same = y.shape == {u}.shape and y.dtype == {u}.dtype",
    ]


def _add_joint(made: Primitive, lines: list[str], arrays: str, values: str) -> None:
    """The lines that make a node with a joint rule; its class knows what it saves."""
    count = range(len(made.operands))
    add = lines.append
    add("    t = Tensor()")
    add("    t.data = y")
    nothing = " and ".join(f"p{i} is None" for i in count)
    add(f"    if {nothing} or gate_ and not records(t):")
    add("        t._node = None")
    add("        return t")
    key = " + ".join(f"({1 << i} if p{i} is not None else 0)" for i in count)
    add(f"    key_ = {key} + {FIT * made.fits}")
    add("    try:")
    add("        n = nodes[key_]()")
    add("    except KeyError:  # the first node of its kind")
    add("        n = nodes[key_] = node_class(made, key_)")
    add("        n = n()")
    parents = "".join(f"p{i}, " for i in count)
    add(f"    n.fill(({parents}), ({arrays},), y, {'aux' if made.aux else '()'}, {values})")
    metas = ", ".join(f"meta_of(u{i})" for i in count)
    add(f"    n.meta = ({metas}, y.shape)")
    add("    n.seq = next_seq()")
    add("    t._node = n")
    add("    return t")


def _variadic_source(made: Primitive, lines: list[str], kwargs: str) -> str:
    name = made.operands[0]
    add = lines.append
    if made.name in NARROWS:
        add("    if casting_:")
        add(f"        {name} = cast_operands(made, {name})")
    add(f"    arrays, parents, kind = lift_all(made, {name})")
    _add_lookup(lines)
    add("    try:")
    add(f"        {'y, *aux' if made.aux else 'y'} = forward(*arrays{kwargs})")
    add("    except Exception as error:")
    add("        fail(made, arrays, error)")
    if made.outputs == 1:
        add("    if y.__class__ is not kind:")
        add("        y = normalise(y, kind)")
    values = "(" + "".join(f"{p}, " for p in made.parameters) + ")"
    add(f"    return record(made, arrays, parents, y, {'aux' if made.aux else '()'}, {values})")
    return "\n".join(lines)


def lift_all(made: Primitive, operands: Sequence[Any]) -> tuple[list[Any], tuple[Any, ...], type]:
    """Arrays, parents and array class of a variadic call."""
    if not operands:
        raise ShapeError(f"{made.name}: needs at least one array")
    arrays, parents = [], []
    for x in operands:
        if isinstance(x, Tensor):
            arrays.append(x.data)
            parents.append(x._node)
        else:
            arrays.append(lift(made, x, operands))
            parents.append(None)
    kind = kind_of(arrays[0], arrays[1:])
    for x in arrays:
        if type(x) is not kind and type(x) not in SCALARS:
            foreign(made, arrays, kind)
    return arrays, tuple(parents), kind


def foreign(made: Primitive, operands: Sequence[Any], kind: type) -> None:
    """Operands of different classes: fine inside one library, an error across libraries."""
    here = SPACES[kind]
    if any(type(x) not in SCALARS and SPACES[type(x)] is not here for x in operands):
        mixed(made, operands)


def meta_of(x: Any) -> Any:
    """(shape, dtype) of an operand; None for a Python scalar, which has neither."""
    return None if type(x) in SCALARS else (x.shape, x.dtype)


#: What a node may keep of an operand instead, by the ending of the name that a rule has for it.
FACET: dict[str, Callable[[Any], Any]] = {
    "_shape": lambda x: () if type(x) in SCALARS else x.shape,
    "_dtype": lambda x: None if type(x) in SCALARS else x.dtype,
    "_device": lambda x: None if type(x) in SCALARS else SPACES[type(x)].device(x),
}


@cache
def _kept(made: Primitive, mask: tuple[bool, ...]) -> tuple[tuple[str, str, int], ...]:
    """What a generic node saves: its name, the facet of an operand, "y" or "aux", and which."""
    found = []
    for name in made.saved_names(mask):
        if name == "y":
            found.append((name, "y", 0))
        elif name in made.aux:
            found.append((name, "aux", made.aux.index(name)))
        else:
            operand, facet = next(
                (o, f) for o in made.operands for f in ("", *FACET) if o + f == name
            )
            found.append((name, facet, made.operands.index(operand)))
    return tuple(found)


def record(
    made: Primitive,
    arrays: Sequence[Any],
    parents: tuple[Any, ...],
    y: Any,
    aux: Sequence[Any],
    values: tuple[Any, ...],
) -> Any:
    """Wrap a result, and record a generic node for it when a gradient is wanted."""
    if made.rules is not None:
        parents = tuple(
            p if r is not None else None for p, r in zip(parents, made.rules, strict=True)
        )
    several = made.outputs != 1
    if (
        not made.differentiable
        or all(p is None for p in parents)
        or (gate and not is_grad_enabled())
    ):
        return tuple(tensor_of(x) for x in y) if several else tensor_of(y)
    mask = tuple([p is not None for p in parents])
    saved: dict[str, Any] = {}
    for name, facet, at in _kept(made, mask):
        if facet == "y":
            saved[name] = y
        elif facet == "aux":
            saved[name] = aux[at]
        elif not facet:
            saved[name] = list(arrays) if made.variadic else arrays[at]
        else:
            read = FACET[facet]
            saved[name] = [read(x) for x in arrays] if made.variadic else read(arrays[at])
    metas = (*[meta_of(x) for x in arrays], tuple(x.shape for x in y) if several else y.shape)
    parameters = dict(zip(made.parameters, values, strict=True))
    node = GenericNode(made, parents, saved, parameters, metas)
    if several:
        node.outputs = len(y)
        out: Any = tuple(tensor_of(x, Pick(node, i)) for i, x in enumerate(y))
    else:
        out = tensor_of(y, node)
    if gate:
        for t in out if several else (out,):
            records(t)
    return out


def build(made: Primitive) -> None:
    """Give a primitive its public function; the text is compiled at the first call."""
    made.implementations = {}
    if made.native is None and not made.aux:
        Backend.extras[made.name] = fusible(made.forward, made.name)
    scope: dict[str, Any] = {
        "Tensor": Tensor, "SCALARS": SCALARS, "SPACES": SPACES, "lift": lift, "lift_all": lift_all,
        "kind_of": kind_of, "fail": fail, "foreign": foreign, "normalise": normalise,
        "record": record, "meta_of": meta_of, "next_seq": next_seq, "gate_": gate,
        "records": records, "made": made, "node_class": node_class, "nodes": {},
        "casting_": casting, "cast_operands": cast_operands,
        "implement": implement, "implementations": made.implementations,
        "__name__": made.forward.__module__,
    }  # fmt: skip
    for p in made.parameters.values():
        scope[f"default_{p.name}"] = p.default
    function = FunctionType(_first_call.__code__, scope, made.name)
    scope["compile_now"] = partial(_compile_now, made)
    function.__doc__ = made.doc
    function.__module__ = made.forward.__module__
    function.__qualname__ = made.name
    signature = inspect.signature(made.forward)
    parameters = list(signature.parameters.values())[1:]
    function.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    function.primitive = made  # type: ignore[attr-defined]
    made.function = function


def _first_call(*args: Any, **kwargs: Any) -> Any:
    """What a public function does until its first call: become its generated text."""
    return compile_now()(*args, **kwargs)  # type: ignore[name-defined]  # noqa: F821


_compiling = RLock()


def _compile_now(made: Primitive) -> Callable[..., Any]:
    """Generate and compile a primitive's function, keeping the function object that others hold."""
    function: Any = made.function
    with _compiling:
        if function.__code__ is _first_call.__code__:
            real = plain(made)
            function.__defaults__ = real.__defaults__
            function.__kwdefaults__ = real.__kwdefaults__
            function.__code__ = real.__code__
    return function  # type: ignore[no-any-return]


def plain(made: Primitive) -> Any:
    """The generated function itself, another object than the one that everybody holds."""
    with _compiling:
        if made.text is None:
            found: dict[str, Any] = {}  # apart: the name may be that of a helper in scope
            text = compiled(function_source(made), f"<gpugrad {made.name}>")
            exec(text, made.function.__globals__, found)
            made.text = found[made.name]
    return made.text


#: Called with the primitive, its arguments by position and those by name; returns the result.
Around = Callable[[Primitive, tuple[Any, ...], dict[str, Any]], Any]


@contextmanager
def intercepted(around: Around) -> Iterator[None]:
    """Let `around` be called in the place of every operation, from any thread, inside the block.

    It exchanges what the operations' functions consist of, so nothing is paid for it elsewhere.
    """
    functions: list[tuple[Any, Any]] = []
    with _compiling:
        for made in registry.values():
            function: Any = made.function
            functions.append((function, function.__code__))
            function.__globals__["around"] = partial(around, made)
            function.__code__ = _intercepted.__code__
    try:
        yield
    finally:
        with _compiling:
            for function, code in functions:
                function.__code__ = code


def _intercepted(*args: Any, **kwargs: Any) -> Any:
    """What a public function does in a block of :func:`intercepted`."""
    return around(args, kwargs)  # type: ignore[name-defined]  # noqa: F821


def source(function: Callable[..., Any]) -> str:
    """The generated text behind a public function, for reading and debugging."""
    return function_source(function.primitive)  # type: ignore[attr-defined]
