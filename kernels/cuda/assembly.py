"""PTX as text: made portable, put together into one file for each family, taken apart again.

A compiler's output names the toolkit's newest PTX version, mangled symbols and variables that
nothing reads. Kept in the repository it should change only when a kernel does, load on every driver
of CUDA 12 and later, and stand beside other kernels in one file.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

__all__ = ["entry_name", "join", "portable", "section", "sections"]

#: That of CUDA 12.0. What the kernels are made of is older: an assembler refuses an instruction
#: that is newer than the version its text names.
PTX_VERSION = "8.0"

_ENTRY = re.compile(r"\.visible \.entry (\w+)\s*\(")
_VARIABLE = re.compile(
    r"^(?:\.(?:visible|common|extern|weak) )*\.(?:global|shared|const) [^;]*?(\w+)(?:\[[^;]*\])?"
    r"(?: = [^;]*)?;\n",
    re.MULTILINE,
)
_FUNCTION = re.compile(r"^(?:\.(?:visible|weak) )*\.func .*?^\}\n", re.DOTALL | re.MULTILINE)
_HEADER = re.compile(r"\A.*?^\.address_size \d+\n", re.DOTALL | re.MULTILINE)
_MARK = "// kernel "


def entry_name(text: str) -> str:
    """The name of the one kernel in a text."""
    (name,) = _ENTRY.findall(text)
    return str(name)


def portable(text: str, name: str) -> str:
    """A compiler's output with the kernel called `name`, for the oldest version that can say it."""
    target = re.search(r"^\.target .*$", text, re.MULTILINE)
    assert target is not None
    body = _HEADER.sub("", text, count=1)
    body = re.sub(r"^\s*// \.globl.*\n", "", body, flags=re.MULTILINE)
    # One compiler leaves functions behind that it has inlined everywhere.
    body = _FUNCTION.sub("", body)
    own = re.escape(entry_name(body))
    body = re.sub(rf"\b{own}_param_(\d+)\b", r"param_\1", body)
    body = re.sub(rf"\b{own}\b", name, body)
    used = 0
    for match in list(_VARIABLE.finditer(body)):
        variable = re.escape(match[1])
        if len(re.findall(rf"\b{variable}\b", body)) == 1:
            body = body.replace(match[0], "")
        else:
            # Two kernels of one file may both have a variable of this name, and a compiler may
            # number its variables through.
            body = re.sub(rf"\b{variable}\b", f"{name}_shared_{used}", body)
            used += 1
    # Labels are local to their kernel, blank lines and comments say nothing.
    body = re.sub(r"^\s*//.*\n|^\s*\n", "", body, flags=re.MULTILINE)
    body = re.sub(r"[ \t]+$", "", body, flags=re.MULTILINE)
    return f".version {PTX_VERSION}\n{target[0]}\n.address_size 64\n{body.strip()}\n"


def join(title: str, texts: Iterable[str]) -> str:
    """One file from several portable texts of the same target."""
    parts = []
    header = ""
    for text in texts:
        found = _HEADER.match(text)
        assert found is not None
        assert header in ("", found[0]), "kernels for different targets in one file"
        header = found[0]
        parts.append(f"\n{_MARK}{entry_name(text)}\n{text[found.end() :]}")
    return f"// {title}\n{header}" + "".join(parts)


def section(text: str, name: str) -> str | None:
    """The portable text of one kernel of a joined file; None if it is not there."""
    mark = f"\n{_MARK}{name}\n"
    start = text.find(mark)
    if start < 0:
        return None
    header = text[text.find("\n") + 1 : text.find(f"\n{_MARK}")]
    end = text.find(f"\n{_MARK}", start + 1)
    return header + text[start + len(mark) : end if end > 0 else None]


def sections(text: str) -> Iterator[str]:
    """The names of the kernels in a joined file."""
    for line in text.splitlines():
        if line.startswith(_MARK):
            yield line.removeprefix(_MARK)
