"""Make the PTX that ships: `python -m gpugrad.kernels.cuda.build [family …] [--check]`.

Each family, a file beside this one with a function `entries`, becomes `ptx/<family>.ptx` and
`ptx/<family>.json`: for every kernel a digest of the source it is made of and the registers it
takes on each architecture. Only kernels of changed source are made, but with `--anew` all of them.
With `--check` nothing is written, and what is out of date is reported.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import importlib.util
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpugrad.errors import KernelError
from gpugrad.kernels.cuda import assembly
from gpugrad.kernels.cuda.launch import ARCHITECTURE, SHIPPED, Entry

__all__ = [
    "ARCHITECTURES",
    "Usage",
    "assemble",
    "assembler",
    "assembler_version",
    "compiled",
    "entries",
    "families",
]

#: What the PTX is assembled for, to see that it can be and what it takes.
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")


def families() -> list[str]:
    """The files of kernels that ship."""
    ships = re.compile(r"^def entries\(\) -> Iterator\[Entry\]:$", re.MULTILINE)
    folder = Path(__file__).parent
    return [path.stem for path in sorted(folder.glob("*.py")) if ships.search(path.read_text())]


def entries(family: str) -> dict[str, Entry]:
    """The kernels of a family that ship, by name."""
    module = importlib.import_module(f"gpugrad.kernels.cuda.{family}")
    found: dict[str, Entry] = {}
    for entry in module.entries():
        if found.setdefault(entry.name, entry) is not entry:
            raise KernelError(f"{family}: two kernels are called {entry.name}")
        if entry.kernel.family != family:
            raise KernelError(f"{family} ships {entry.name} of the family {entry.kernel.family}")
    return found


def compiled(family: str, names: Iterable[str]) -> dict[str, str]:
    """Texts of kernels, made anew in several processes."""
    jobs = [(family, name) for name in names]
    with ProcessPoolExecutor(
        min(len(jobs), os.cpu_count() or 1) or 1, multiprocessing.get_context("spawn")
    ) as pool:
        return dict(zip((name for _, name in jobs), pool.map(_compile, jobs, chunksize=4)))


def _compile(job: tuple[str, str]) -> str:
    family, name = job
    return _entries_here(family)[name].compiled()


_known: dict[str, dict[str, Entry]] = {}


def _entries_here(family: str) -> dict[str, Entry]:
    if family not in _known:
        _known[family] = entries(family)
    return _known[family]


# -- the assembler --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Usage:
    """What a kernel takes on an architecture: registers, and bytes of memory of each kind."""

    registers: int
    stack: int
    spilled: int
    shared: int


def assembler() -> str | None:
    """NVIDIA's `ptxas`: that on the path, or of an installed wheel."""
    found = shutil.which("ptxas")
    if found:
        return found
    spec = importlib.util.find_spec("nvidia")
    for place in spec.submodule_search_locations or () if spec else ():
        for path in sorted(Path(place).glob("*/bin/ptxas")):
            return str(path)
    return None


def assembler_version() -> str:
    """Its version; empty if there is none."""
    program = assembler()
    if program is None:
        return ""
    run = subprocess.run([program, "--version"], capture_output=True, text=True, check=True)
    found = re.search(r"V([\d.]+)", run.stdout)
    return found[1] if found else "unknown"


def assemble(text: str, architecture: str) -> dict[str, Usage]:
    """What the kernels of a text take.

    Raises
    ------
    KernelError
        There is no assembler, or it refuses the text.
    """
    program = assembler()
    if program is None:
        raise KernelError('no ptxas here; pip install "nvidia-cuda-nvcc-cu12==12.4.*" brings one')
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernels.ptx"
        source.write_text(text, encoding="utf-8")
        command = [program, "-v", f"-arch={architecture}", str(source), "-o", f"{folder}/out"]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        raise KernelError(f"ptxas refuses the text for {architecture}: {run.stderr.strip()}")
    return dict(_usages(run.stderr))


def _usages(log: str) -> Iterator[tuple[str, Usage]]:
    for part in log.split("Compiling entry function '")[1:]:
        name = part.partition("'")[0]

        def number(pattern: str, part: str = part) -> int:
            return sum(int(n) for n in re.findall(pattern, part))

        yield (
            name,
            Usage(
                registers=number(r"Used (\d+) registers"),
                stack=number(r"(\d+) bytes stack frame"),
                spilled=number(r"(\d+) bytes spill"),
                shared=number(r"(\d+) bytes smem"),
            ),
        )


# -- the files ------------------------------------------------------------------------------------


def recipe() -> str:
    """A digest of our own part in compiling: with another one, everything is made anew."""
    ours = hashlib.sha256()
    for name in ("assembly.py", "compiler.py", "language.py", "snippets.py"):
        ours.update(Path(__file__).with_name(name).read_bytes())
    return ours.hexdigest()[:32]


def build(family: str, folder: Path = SHIPPED, anew: bool = False) -> int:
    """Write the two files of a family; how many kernels were made, for those that are up to date
    are kept, unless all are to be made `anew`."""
    from gpugrad.kernels.cuda.compiler import versions

    made_by = {**versions(), "assembler": assembler_version(), "recipe": recipe()}
    wanted = entries(family)
    text, told = ("", {}) if anew else read(family, folder)
    kept = told["kernels"] if told and told["made by"] == made_by else {}
    texts, kernels = {}, {}
    for name, entry in wanted.items():
        found = assembly.section(text, name)
        if found and kept.get(name, {}).get("source") == entry.digest:
            texts[name], kernels[name] = found, kept[name]
    missing = [name for name in wanted if name not in texts]
    if missing:
        made = compiled(family, missing)
        together = assembly.join("", made.values())
        usages = {a: assemble(together, a) for a in ARCHITECTURES}
        for name in missing:
            texts[name] = made[name]
            kernels[name] = {
                "source": wanted[name].digest,
                "registers": {a: usages[a][name].registers for a in ARCHITECTURES},
            }
    folder.mkdir(exist_ok=True)
    title = f"Kernels of {family}.py: made by gpugrad.kernels.cuda.build."
    (folder / f"{family}.ptx").write_text(
        assembly.join(title, (texts[name] for name in wanted)), encoding="utf-8", newline="\n"
    )
    told = {
        "target": "sm_{}{}".format(*ARCHITECTURE),
        "made by": made_by,
        "kernels": {name: kernels[name] for name in wanted},
    }
    (folder / f"{family}.json").write_text(_json(told), encoding="utf-8", newline="\n")
    return len(missing)


def read(family: str, folder: Path = SHIPPED) -> tuple[str, dict[str, Any]]:
    """The two files of a family; empty if there are none."""
    try:
        text = (folder / f"{family}.ptx").read_text(encoding="utf-8")
        return text, json.loads((folder / f"{family}.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return "", {}


def _json(told: dict[str, Any]) -> str:
    """A line for each kernel: a change of one is a change of one line."""
    lines = (f'  "{name}": {json.dumps(one)}' for name, one in told["kernels"].items())
    head = json.dumps({key: told[key] for key in told if key != "kernels"}, indent=1)
    return f'{head.removesuffix("}").rstrip()},\n "kernels": {{\n' + ",\n".join(lines) + "\n }\n}\n"


def stale(family: str, folder: Path = SHIPPED) -> list[str]:
    """What is wrong with the files, as their sources stand; needs no compiler."""
    text, manifest = read(family, folder)
    if not manifest:
        return [f"{folder / family}.ptx or .json is not there"]
    told = manifest["kernels"]
    wanted = entries(family)
    held = list(assembly.sections(text))
    problems = [f"{name} is not in the PTX" for name in wanted if name not in held]
    problems += [f"{name} ships, but is no kernel any more" for name in held if name not in wanted]
    problems += [
        f"{name} was made of other source"
        for name, entry in wanted.items()
        if name in told and told[name]["source"] != entry.digest
    ]
    problems += [f"{name} is not in the manifest" for name in wanted if name not in told]
    return problems


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m gpugrad.kernels.cuda.build",
                                     description="Make the PTX that ships.")  # fmt: skip
    parser.add_argument("family", nargs="*", help="all by default")
    parser.add_argument("--anew", action="store_true", help="also what is up to date")
    parser.add_argument("--check", action="store_true", help="only say what is out of date")
    given = parser.parse_args(arguments)
    wrong = 0
    for family in given.family or families():
        if given.check:
            problems = stale(family)
            wrong += len(problems)
            sys.stdout.writelines(f"{family}: {problem}\n" for problem in problems)
        else:
            made = build(family, anew=given.anew)
            size = (SHIPPED / f"{family}.ptx").stat().st_size
            count = len(entries(family))
            sys.stdout.write(f"{family}: {made} of {count} kernels made, {size >> 10} KiB\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
