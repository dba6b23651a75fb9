"""A GPU in Python that runs PTX: the very text that ships, without a GPU.

It is strict where hardware is: every access must lie in an array that was passed and be aligned to
its width, every thread of a block must come to a barrier, and of a warp to a shuffle. It knows the
instructions that the kernels are made of; any other is an error.
"""

from __future__ import annotations

import math
import re
import struct
from bisect import bisect_right
from collections.abc import Iterator
from fractions import Fraction
from functools import cache

import numpy as np

from gpugrad.kernels.cuda.launch import Machine

WIDTH = re.compile(r"(?:[bsuf]|bf)(\d+)(?:x2)?$")


@cache
def bits_of(kind: str) -> int:
    found = WIDTH.match(kind)
    return int(found[1]) if found else {"pred": 1}[kind]


def signed(x: int, width: int) -> int:
    return x - (1 << width) if x >> (width - 1) else x


def to_float(x: int, width: int) -> float:
    code = {16: "<He", 32: "<If", 64: "<Qd"}[width]
    return struct.unpack("<" + code[2], struct.pack("<" + code[1], x))[0]


def from_float(x: float, width: int) -> int:
    code = {16: "<He", 32: "<If", 64: "<Qd"}[width]
    try:
        packed = struct.pack("<" + code[2], x)
    except OverflowError:
        packed = struct.pack("<" + code[2], math.copysign(math.inf, x))
    return struct.unpack("<" + code[1], packed)[0]


def to_bfloat(x: int) -> int:
    """The upper half of a float32, to nearest, ties to even."""
    if x & 0x7FFFFFFF > 0x7F800000:
        return 0x7FFF
    return (x + 0x7FFF + (x >> 16 & 1)) >> 16


def divide(a: float, b: float) -> float:
    if b == 0:
        return math.nan if a == 0 or a != a else math.copysign(math.inf, a) * math.copysign(1, b)
    return a / b


def fused(a: float, b: float, c: float, width: int) -> float:
    if width == 32 or not all(map(math.isfinite, (a, b, c))):
        return a * b + c  # a product of two float32 is exact in double precision
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    try:
        return float(exact) if exact else a * b + c
    except OverflowError:
        return math.copysign(math.inf, exact)


COMPARE = {
    "lt": lambda a, b: a < b, "le": lambda a, b: a <= b, "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b, "eq": lambda a, b: a == b, "ne": lambda a, b: a != b,
}  # fmt: skip


def compare(code: str, a, b) -> bool:
    nan = a != a or b != b
    if code in ("num", "nan"):
        return nan == (code == "nan")
    if code not in COMPARE:  # ltu, …: true as well if either is NaN
        return nan or COMPARE[code.removesuffix("u")](a, b)
    return not nan and COMPARE[code](a, b)


# -- memory ---------------------------------------------------------------------------------------


class Memory:
    """Arrays at the addresses that they have on the host, and shared memory below them."""

    def __init__(self) -> None:
        self.starts: list[int] = []
        self.pieces: dict[int, object] = {}

    def add(self, start: int, data) -> None:
        if start not in self.pieces or len(data) > len(self.pieces[start]):
            self.pieces[start] = data
            self.starts = sorted(self.pieces)

    def find(self, address: int, size: int):
        assert address % size == 0, f"access of {size} bytes at {address:#x}: not aligned"
        i = bisect_right(self.starts, address) - 1
        start = self.starts[i] if i >= 0 else 0
        data = self.pieces.get(start, b"")
        offset = address - start
        assert offset + size <= len(data), f"access of {size} bytes at {address:#x}: outside"
        return data, offset

    def load(self, address: int, size: int) -> bytes:
        data, offset = self.find(address, size)
        return bytes(data[offset : offset + size])

    def store(self, address: int, value: bytes) -> None:
        data, offset = self.find(address, len(value))
        data[offset : offset + len(value)] = value


# -- programs -------------------------------------------------------------------------------------


class Program:
    """The one kernel of a text, taken apart."""

    def __init__(self, text: str) -> None:
        head, body = re.search(r"\.visible \.entry (.*?)\n\{\n(.*)\n\}", text, re.DOTALL).groups()
        self.parameters = re.findall(r"\.param \.(\w+) (\w+)", head)
        self.shared = {
            name: int(size) for name, size in re.findall(r"\.shared .*? (\w+)\[(\d+)\];", text)
        }
        self.code: list[tuple] = []
        self.labels: dict[str, int] = {}
        for statement in re.split(r"[;\n]", body):
            self._take(statement.strip())

    def _take(self, statement: str) -> None:
        label = re.match(r"(\$\w+):\s*", statement)
        if label:
            self.labels[label[1]] = len(self.code)
            statement = statement[label.end() :]
        statement = statement.removeprefix("{ ").strip()  # a scope; vectors never come first
        if statement in ("", "{", "}") or statement.startswith("."):  # a declaration
            return
        when = re.match(r"@(!?)(%?\w+)\s+", statement)
        if when:
            statement = statement[when.end() :]
        operation, _, rest = statement.partition(" ") if " " in statement else (statement, "", "")
        operation, _, more = operation.partition("\t")
        operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s{}\[\]]+", more + " " + rest)
        condition = (when[2], when[1] == "!") if when else None
        base, *how = operation.split(".")
        known = base if base in ("bra", "ret", "bar", "shfl") else getattr(Thread, f"do_{base}")
        self.code.append((condition, known, how, [parsed(x) for x in operands]))


def parsed(operand: str):
    """A number as its bits, a vector as a tuple of names, an address as a list; else a name."""
    if operand[:2].lower() in ("0f", "0d"):
        return int(operand[2:], 16)
    if operand[0] in "-0123456789":
        return int(operand, 0)
    if operand[0] == "{":
        return tuple(re.findall(r"[%\w]+", operand))
    if operand[0] == "[":
        base, offset = re.fullmatch(r"\[([%\w]+)(?:\+(-?\d+))?\]", operand).groups()
        return [base, int(offset or 0)]
    return operand


@cache
def program(text: str) -> Program:
    return Program(text)


class Thread:
    """One thread: its registers, and a generator that stops where it waits for others."""

    def __init__(self, program: Program, memory: Memory, fixed: dict[str, int]) -> None:
        self.program = program
        self.memory = memory
        self.registers = dict(fixed)

    def value(self, operand, width: int) -> int:
        if type(operand) is str:
            return self.registers[operand] & ((1 << width) - 1)
        if type(operand) is int:
            return operand & ((1 << width) - 1)
        low, high = (self.value(x, width // 2) for x in operand)
        return low | high << width // 2

    def set(self, operand, value: int, width: int) -> None:
        value &= (1 << width) - 1
        if type(operand) is str:
            self.registers[operand] = value
        else:
            low, high = operand
            half = width // 2
            self.registers[low], self.registers[high] = value & ((1 << half) - 1), value >> half

    def address(self, operand: list) -> int:
        return self.registers[operand[0]] + operand[1]

    def run(self) -> Iterator[tuple]:
        counter, code = 0, self.program.code
        for _ in range(10**6):
            condition, base, how, operands = code[counter]
            counter += 1
            if condition and bool(self.registers[condition[0]]) == condition[1]:
                continue
            if type(base) is not str:
                base(self, how, operands)
            elif base == "bra":
                counter = self.program.labels[operands[0]]
            elif base == "ret":
                return
            elif base == "bar":
                yield ("bar",)
            else:
                assert how == ["sync", "bfly", "b32"]
                target, source, mask, limit, members = operands
                assert self.value(limit, 32) == 31
                assert self.value(members, 32) == 0xFFFFFFFF
                found = yield "shfl", self.value(source, 32), self.value(mask, 32)
                self.set(target.partition("|")[0], found, 32)
        raise AssertionError("a million instructions: the loop does not end")

    # Memory.

    def do_ld(self, how: list[str], operands: list) -> None:
        kind = how[-1]
        width = bits_of(kind)
        if how[0] == "param":
            self.set(operands[0], self.registers[operands[1][0]], width)
            return
        targets = operands[0] if type(operands[0]) is tuple else (operands[0],)
        data = self.memory.load(self.address(operands[1]), len(targets) * width // 8)
        for j, target in enumerate(targets):
            part = data[j * width // 8 : (j + 1) * width // 8]
            value = int.from_bytes(part, "little")
            self.registers[target] = value

    def do_st(self, how: list[str], operands: list) -> None:
        size = bits_of(how[-1]) // 8
        sources = operands[1] if type(operands[1]) is tuple else (operands[1],)
        values = (self.value(s, size * 8).to_bytes(size, "little") for s in sources)
        self.memory.store(self.address(operands[0]), b"".join(values))

    # Moves and conversions.

    def do_mov(self, how: list[str], operands: list) -> None:
        width = bits_of(how[-1])
        self.set(operands[0], self.value(operands[1], width), width)

    def do_cvta(self, how: list[str], operands: list) -> None:
        self.set(operands[0], self.value(operands[1], 64), 64)

    def do_selp(self, how: list[str], operands: list) -> None:
        width = bits_of(how[-1])
        chosen = operands[1] if self.value(operands[3], 1) else operands[2]
        self.set(operands[0], self.value(chosen, width), width)

    def do_cvt(self, how: list[str], operands: list) -> None:
        into, source = how[-2], how[-1]
        rounding = how[:-2]
        out, given = bits_of(into), bits_of(source)
        if into in ("f16x2", "bf16x2"):
            narrow = to_bfloat if into[0] == "b" else lambda x: from_float(to_float(x, 32), 16)
            high, low = (narrow(self.value(x, 32)) for x in operands[1:])
            self.set(operands[0], high << 16 | low, 32)
            return
        x = self.value(operands[1], given)
        if into == "bf16":
            self.set(operands[0], to_bfloat(x), 16)
            return
        number = (
            to_float(x, given) if source[0] == "f" else signed(x, given) if source[0] == "s" else x
        )
        if rounding in (["rmi"], ["rni"]) and math.isfinite(number):
            number = math.floor(number) if rounding == ["rmi"] else round(number)
        if into[0] == "f":
            self.set(operands[0], from_float(float(number), out), out)
        else:
            self.set(operands[0], int(number), out)

    # Arithmetic.

    def numbers(self, kind: str, operands: list) -> list:
        width = bits_of(kind)
        values = [self.value(x, width) for x in operands]
        if kind[0] == "f":
            return [to_float(x, width) for x in values]
        return [signed(x, width) for x in values] if kind[0] == "s" else values

    def result(self, kind: str, target: str, x, width: int | None = None) -> None:
        width = width or bits_of(kind)
        self.set(target, from_float(x, width) if kind[0] == "f" else int(x), width)

    def do_add(self, how: list[str], operands: list) -> None:
        a, b = self.numbers(how[-1], operands[1:])
        self.result(how[-1], operands[0], a + b)

    def do_sub(self, how: list[str], operands: list) -> None:
        a, b = self.numbers(how[-1], operands[1:])
        self.result(how[-1], operands[0], a - b)

    def do_mul(self, how: list[str], operands: list) -> None:
        a, b = self.numbers(how[-1], operands[1:])
        assert how[0] in ("lo", "wide") or how[-1][0] == "f", how
        wide = 2 * bits_of(how[-1]) if how[0] == "wide" else None
        self.result(how[-1], operands[0], a * b, wide)

    def do_mad(self, how: list[str], operands: list) -> None:
        assert how[0] in ("lo", "wide"), how
        a, b = self.numbers(how[-1], operands[1:3])
        wide = bits_of(how[-1]) * (2 if how[0] == "wide" else 1)
        self.result(how[-1], operands[0], a * b + self.value(operands[3], wide), wide)

    def do_fma(self, how: list[str], operands: list) -> None:
        width = bits_of(how[-1])
        a, b, c = self.numbers(how[-1], operands[1:])
        self.result(how[-1], operands[0], fused(a, b, c, width))

    def do_div(self, how: list[str], operands: list) -> None:
        a, b = self.numbers(how[-1], operands[1:])
        if how[-1][0] == "f":
            self.result(how[-1], operands[0], divide(a, b))
        else:
            self.result(how[-1], operands[0], int(Fraction(a, b)))

    def do_rcp(self, how: list[str], operands: list) -> None:
        (a,) = self.numbers(how[-1], operands[1:])
        self.result(how[-1], operands[0], divide(1.0, a))

    def do_rem(self, how: list[str], operands: list) -> None:
        a, b = self.numbers(how[-1], operands[1:])
        self.result(how[-1], operands[0], a - b * int(Fraction(a, b)))

    def do_sqrt(self, how: list[str], operands: list) -> None:
        (a,) = self.numbers(how[-1], operands[1:])
        self.result(how[-1], operands[0], math.sqrt(a) if a >= 0 else math.nan)

    def do_neg(self, how: list[str], operands: list) -> None:
        (a,) = self.numbers(how[-1], operands[1:])
        self.result(how[-1], operands[0], -a)

    def do_abs(self, how: list[str], operands: list) -> None:
        (a,) = self.numbers(how[-1], operands[1:])
        self.result(how[-1], operands[0], abs(a))

    def do_min(self, how: list[str], operands: list) -> None:
        self.result(how[-1], operands[0], min(self.numbers(how[-1], operands[1:])))

    def do_max(self, how: list[str], operands: list) -> None:
        self.result(how[-1], operands[0], max(self.numbers(how[-1], operands[1:])))

    def do_setp(self, how: list[str], operands: list) -> None:
        a, b = self.numbers(how[-1], operands[1:])
        self.registers[operands[0]] = int(compare(how[0], a, b))

    # Bits.

    def do_and(self, how: list[str], operands: list) -> None:
        width = bits_of(how[-1])
        a, b = (self.value(x, width) for x in operands[1:])
        self.set(operands[0], a & b, width)

    def do_or(self, how: list[str], operands: list) -> None:
        width = bits_of(how[-1])
        a, b = (self.value(x, width) for x in operands[1:])
        self.set(operands[0], a | b, width)

    def do_xor(self, how: list[str], operands: list) -> None:
        width = bits_of(how[-1])
        a, b = (self.value(x, width) for x in operands[1:])
        self.set(operands[0], a ^ b, width)

    def do_not(self, how: list[str], operands: list) -> None:
        width = bits_of(how[-1])
        self.set(operands[0], ~self.value(operands[1], width), width)

    def do_shl(self, how: list[str], operands: list) -> None:
        width = bits_of(how[-1])
        by = self.value(operands[2], 32)
        self.set(operands[0], self.value(operands[1], width) << min(by, width), width)

    def do_shr(self, how: list[str], operands: list) -> None:
        width = bits_of(how[-1])
        (a,) = self.numbers(how[-1], operands[1:2])
        self.set(operands[0], a >> min(self.value(operands[2], 32), width), width)

    def do_bfi(self, how: list[str], operands: list) -> None:
        width = bits_of(how[-1])
        a, b = (self.value(x, width) for x in operands[1:3])
        at, count = (self.value(x, 32) for x in operands[3:])
        mask = ((1 << count) - 1) << at
        self.set(operands[0], b & ~mask | (a << at) & mask, width)


# -- grids ----------------------------------------------------------------------------------------


def run_block(program: Program, memory: Memory, count: int, fixed: dict[str, int]) -> None:
    """Run the threads of a block from one meeting point to the next."""
    memory = _with_shared(program, memory, fixed)
    threads = [Thread(program, memory, {**fixed, "%tid.x": i}) for i in range(count)]
    runs = [t.run() for t in threads]
    answers: list = [None] * count
    alive = list(range(count))
    while alive:
        waiting = {}
        for i in alive:
            try:
                waiting[i] = runs[i].send(answers[i])
            except StopIteration:
                continue
        kinds = {w[0] for w in waiting.values()}
        assert len(kinds) <= 1, "some threads wait at a barrier and some at a shuffle"
        assert not waiting or len(waiting) == len(alive), "some threads wait for those that left"
        for i, wait in waiting.items():
            answers[i] = waiting[i ^ wait[2]][1] if wait[0] == "shfl" else None
        alive = list(waiting)


def _with_shared(program: Program, memory: Memory, fixed: dict[str, int]) -> Memory:
    place = 1 << 12
    own = Memory()
    own.pieces = dict(memory.pieces)
    for name, size in program.shared.items():
        fixed[name] = place
        # What no thread has written is a NaN.
        own.pieces[place] = bytearray(b"\xff" * size)
        place += size + 256
    own.starts = sorted(own.pieces)
    return own


def launch(text: str, blocks: tuple, threads: int, arguments: tuple, only=None) -> None:
    """Run a grid on NumPy arrays (changed in place) and numbers; `only` some of its blocks."""
    code = program(text)
    memory = Memory()
    fixed = {"%ntid.x": threads}
    for axis, size in zip("xyz", (*blocks, 1, 1)):
        fixed[f"%nctaid.{axis}"] = size
    assert len(arguments) == len(code.parameters)
    for (kind, name), argument in zip(code.parameters, arguments):
        if isinstance(argument, np.ndarray):
            assert argument.flags.c_contiguous
            fixed[name] = argument.ctypes.data
            if argument.size:
                memory.add(fixed[name], argument.reshape(-1).view(np.uint8).data)
        elif hasattr(argument, "address"):
            fixed[name] = argument.address
            memory.add(argument.address, argument)
        elif isinstance(argument, int | np.integer):
            fixed[name] = int(argument) & ((1 << bits_of(kind)) - 1)
        else:
            fixed[name] = from_float(float(argument), bits_of(kind))
    for block in only if only is not None else np.ndindex(*blocks):
        here = {f"%ctaid.{axis}": int(i) for axis, i in zip("xyz", (*block, 0, 0))}
        run_block(code, memory, threads, {**fixed, **here})


class PtxGpu(Machine):
    """A small GPU that runs the PTX of entries on NumPy arrays."""

    threads = 32
    wave = 2
    parts = 2
    chunks = 2

    def __init__(self, shipped: bool = True) -> None:
        self.shipped = shipped

    def empty(self, shape, dtype):
        out = np.empty(shape, dtype)
        out.reshape(-1).view(np.uint8)[...] = 0x7F
        return out

    def address(self, x) -> int:
        return x.ctypes.data

    def run(self, entry, blocks, *args) -> None:
        text = entry.shipped() if self.shipped else entry.compiled()
        assert text is not None, f"{entry.name} does not ship"
        given = list(args)
        for i, cast in entry.casts:
            given[i] = cast(given[i])
        launch(text, blocks, self.threads, tuple(given))
