"""What can be said of PTX without a GPU: what it takes, and which instructions it is made of."""

from __future__ import annotations

import re
from functools import cache

import pytest

from gpugrad.errors import KernelError
from gpugrad.kernels.cuda.build import Usage, assemble, assembler

#: How 16-byte accesses are written for each storage.
WIDE = {"float32": "v4.f32", "float64": "v2.f64", "float16": "v4.b32", "bfloat16": "v4.b32"}

#: Vector registers of a multiprocessor, and threads of a block: with at most so many registers to a
#: thread, two blocks are at work where one waits.
MOST_REGISTERS = 65536 // (2 * 256)

#: Attention has dozens of sums in registers. In double precision each takes two, and one block is
#: at work: so many sums are independent of each other that no other need be.
SUMS_IN_DOUBLE = re.compile(r"attention_\w*float64$")


@cache
def usage(text: str, architecture: str) -> dict[str, Usage]:
    """What each kernel of a text takes; the test is skipped where that cannot be found out."""
    if assembler() is None:
        pytest.skip("no ptxas: pip install nvidia-cuda-nvcc-cu12")
    try:
        return assemble(text, architecture)
    except KernelError as error:
        if "is not defined for option" in str(error) or "Unsupported" in str(error):
            pytest.skip(f"{assembler()} does not know {architecture}")
        raise


def assert_light(name: str, found: Usage) -> None:
    """No spills, no local memory, and registers for enough threads."""
    assert found.spilled == 0, f"{name} spills {found.spilled} bytes"
    assert found.stack == 0, f"{name} uses {found.stack} bytes of local memory"
    most = 255 if SUMS_IN_DOUBLE.match(name) else MOST_REGISTERS
    assert 0 < found.registers <= most, f"{name} takes {found.registers} registers"


def assert_whole(name: str, text: str) -> None:
    """Nothing is called, and nothing is kept in local memory."""
    assert not re.search(r"\bcall\b|\.func\b|\.extern\b|\.local\b", text), f"{name} is not whole"


def assert_single(name: str, text: str) -> None:
    """No instruction of double precision."""
    found = re.findall(r"\S*\.f64\S*", text)
    assert not found, f"{name} has {found[:3]}"


def accesses(text: str, storage: str) -> tuple[int, int]:
    """How many 16-byte loads and stores there are."""
    kind = re.escape(WIDE[storage])
    return (
        len(re.findall(rf"\bld\.global\.{kind}\b", text)),
        len(re.findall(rf"\bst\.global\.{kind}\b", text)),
    )
