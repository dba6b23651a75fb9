"""The machine code of a kernel, compiled anew: what comes from the disk cache cannot be shown."""

import re

from numba import njit


def assembly(dispatcher, *args):
    """The assembly text of a compiled function for these arguments."""
    options = {k: v for k, v in dispatcher.targetoptions.items() if k not in ("nopython", "cache")}
    fresh = njit(**options)(dispatcher.py_func)
    fresh(*args)
    return fresh.inspect_asm(fresh.signatures[0])


#: Arithmetic on several floats at once, of x86 (AVX and later) or Arm.
PACKED = re.compile(
    r"\bv(?:mul|add|sub|div|max|min|sqrt|fn?m(?:add|sub)\d+|cmp\w*|blendv|and|or)p[sd]\b"
    r"|\bf(?:mul|add|sub|div|mla|mls|max|min|sqrt|cm\w\w)\s+v\d+\.[24][sd]"
)


def packed(text):
    """How many packed floating-point instructions there are."""
    return len(PACKED.findall(text))
