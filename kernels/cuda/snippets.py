"""What no compiler's dialect can say, as PTX: reinterpretation, half precision, 16-byte accesses.

Each is a few instructions that every compiler takes as they are. Addresses are computed within, for
no compiler has pointers to half precision.
"""

from __future__ import annotations

from dataclasses import dataclass

from gpugrad.kernels.cuda.language import pack_size

__all__ = ["Snippet", "snippets"]


@dataclass(frozen=True)
class Snippet:
    """A few instructions as a function.

    Attributes
    ----------
    text:
        With `$0`, `$1`, … for results and then arguments.
    results, arguments:
        A letter for each: `f` and `d` floats of 32 and 64 bits, `h`, `r` and `l` integers of 16, 32
        and 64; a pointer is an `l`. More than one result is a tuple.
    names:
        Its arguments as the body of a kernel writes them; the last may be a tuple.
    memory:
        Whether it reads or writes memory, and so has its place in the order of things.
    """

    text: str
    results: str
    arguments: str
    names: str
    memory: bool


_LETTER = {"float32": "f", "float64": "d", "float16": "f", "bfloat16": "f"}
_HALF = {"float16": "f16", "bfloat16": "bf16"}


def snippets() -> dict[tuple[str, str], Snippet]:
    """Reinterpretation, and access to single elements and to packs of 16 bytes."""
    found = {}
    for number, letter, integer, bits in (("float32", "f", "r", 32), ("float64", "d", "l", 64)):
        move = f"mov.b{bits} $0, $1;"
        found["to_bits", number] = Snippet(move, integer, letter, "x", False)
        found["from_bits", number] = Snippet(move, letter, integer, "x", False)
    for storage, letter in _LETTER.items():
        width = pack_size(storage)
        single, packs = _single(storage), _packs(storage, width)
        found["read", storage] = Snippet(single[0], letter, "ll", "a, i", True)
        found["write", storage] = Snippet(single[1], "", "ll" + letter, "a, i, x", True)
        found["load", storage] = Snippet(packs[0], letter * width, "ll", "a, i", True)
        found["store", storage] = Snippet(packs[1], "", "ll" + letter * width, "a, i, x", True)
    return found


def _place(a: str, i: str, size: int) -> str:
    """Code that leaves the address of element `i` of `size` bytes in a register `p`."""
    return f".reg .b64 p; mad.lo.s64 p, {i}, {size}, {a}; cvta.to.global.u64 p, p;"


def _single(storage: str) -> tuple[str, str]:
    """Read and write one element."""
    if storage in ("float32", "float64"):
        bits = storage.removeprefix("float")
        size = int(bits) // 8
        return (
            f"{{ {_place('$1', '$2', size)} ld.global.f{bits} $0, [p]; }}",
            f"{{ {_place('$0', '$1', size)} st.global.f{bits} [p], $2; }}",
        )
    kind = _HALF[storage]
    # bfloat16 is the upper half of a float32.
    widen = "cvt.f32.f16 $0, h;" if kind == "f16" else "mov.b32 $0, {n, h};"
    narrow = f"cvt.rn.{kind}.f32 h, $2;"
    registers = ".reg .b16 h, n;"
    return (
        f"{{ {_place('$1', '$2', 2)} {registers} mov.b16 n, 0; ld.global.b16 h, [p]; {widen} }}",
        f"{{ {_place('$0', '$1', 2)} {registers} {narrow} st.global.b16 [p], h; }}",
    )


def _packs(storage: str, width: int) -> tuple[str, str]:
    """Load and store 16 bytes."""
    out = [f"${j}" for j in range(width)]
    into = [f"${j + 2}" for j in range(width)]
    size = 16 // width
    load, store = _place(f"${width}", f"${width + 1}", size), _place("$0", "$1", size)
    if storage in ("float32", "float64"):
        kind = f"v{width}.f{storage.removeprefix('float')}"
        return (
            f"{{ {load} ld.global.{kind} {{{', '.join(out)}}}, [p]; }}",
            f"{{ {store} st.global.{kind} [p], {{{', '.join(into)}}}; }}",
        )
    words = ", ".join(f"w{j}" for j in range(4))
    registers = f".reg .b32 {words};"
    return (
        f"{{ {load} {registers} .reg .b16 h, k, n; mov.b16 n, 0; "
        f"ld.global.v4.b32 {{{words}}}, [p]; {_widened(storage, out)} }}",
        f"{{ {store} {registers} {_narrowed(storage, into)} st.global.v4.b32 [p], {{{words}}}; }}",
    )


def _widened(storage: str, out: list[str]) -> str:
    """The words `w0` to `w3`, two halves each, as eight numbers."""
    convert = {
        "float16": "cvt.f32.f16 {0}, h; cvt.f32.f16 {1}, k;",
        "bfloat16": "mov.b32 {0}, {{n, h}}; mov.b32 {1}, {{n, k}};",
    }[storage]
    return " ".join(
        f"mov.b32 {{h, k}}, w{j}; {convert.format(low, high)}"
        for j, (low, high) in enumerate(zip(out[::2], out[1::2]))
    )


def _narrowed(storage: str, numbers: list[str]) -> str:
    """Eight numbers as the words `w0` to `w3`."""
    return " ".join(
        f"cvt.rn.{_HALF[storage]}x2.f32 w{j}, {high}, {low};"
        for j, (low, high) in enumerate(zip(numbers[::2], numbers[1::2]))
    )
