"""Figures that do not depend on the clock, held against those that are committed.

``python bench/guards.py [--only GROUP,…] [--update]``

They are counted, so they are the same on every machine and in every run, and a change of one is a
change of the program:

* ``engine``: calls of gpugrad's Python functions in a step, blocks of memory that a graph holds,
  peak of memory of a step; for each minor version of Python, which counts in its own way;
* ``generic``: operations of the array library, reads by the host and uploads in a step on a library
  that counts them, without kernels;
* ``gpu``: the same on a stand-in for CuPy with the kernels that ship: launches of ours, of all;
* ``kernels``: of every kernel that ships, bytes of PTX, registers on each architecture, and loads
  and stores of 16 bytes;
* ``import``: the modules that ``import gpugrad`` loads.

`guards.json` holds each figure with its band beside it. What leaves its band is named with what it
was; ``--update`` writes what is, and prints what changed. Less than was is a change as well: it is
worth keeping.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

ROOT = Path(__file__).resolve().parents[1]
FIGURES = Path(__file__).with_name("guards.json")

#: By the last part of a figure's name: the share by which it may differ.
BANDS = {"calls": 0.02, "blocks": 0.03, "peak_bytes": 0.03, "ptx_bytes": 0.05}

#: What is counted of each kernel, in this order.
COLUMNS = ("ptx_bytes", "sm_80", "sm_90", "sm_100", "loads", "stores")

#: Steps before something is counted: they fill caches, and let the first batches pass.
WARM = 4

PYTHON = "{}.{}".format(*sys.version_info)

Figures = dict[str, Any]


def band_of(name: str) -> float:
    return BANDS.get(name.rpartition(".")[2], 0.0)


# -- counting -------------------------------------------------------------------------------------


def calls_of(run: Callable[[], Any]) -> int:
    """How often Python functions of gpugrad, written or generated, are called."""
    home, count = str(ROOT / "gpugrad"), 0
    also = str(ROOT / "kernels")

    def look(frame: Any, event: str, _: Any) -> None:
        nonlocal count
        name = frame.f_code.co_filename
        count += event == "call" and name.startswith((home, also, "<gpugrad"))

    before = sys.getprofile()
    sys.setprofile(look)
    try:
        run()
    finally:
        sys.setprofile(before)
    return count


def held_by(forward: Callable[[], Any]) -> int:
    """Blocks of memory that what `forward` gives keeps alive; the least of a few times."""
    import gc

    found = []
    gc.collect()
    gc.disable()
    try:
        for _ in range(5):
            before = sys.getallocatedblocks()
            kept = forward()
            found.append(sys.getallocatedblocks() - before)
            del kept
    finally:
        gc.enable()
    return min(found)


def peak_of(run: Callable[[], Any]) -> int:
    """The most bytes that Python and NumPy take while `run` runs; the least of a few times."""
    import gc
    import tracemalloc

    gc.collect()
    gc.disable()
    tracemalloc.start()
    try:
        found = []
        for _ in range(3):
            run()
            before, _ = tracemalloc.get_traced_memory()
            tracemalloc.reset_peak()
            run()
            found.append(tracemalloc.get_traced_memory()[1] - before)
    finally:
        tracemalloc.stop()
        gc.enable()
    return min(found)


def chain() -> tuple[Callable[[], Any], Callable[[], Any]]:
    """A hundred times x*a+b, forward; and with backward."""
    import numpy as np

    import gpugrad as gg

    drawn = np.random.default_rng(0).standard_normal((4, 8, 8)).astype("float32")
    x, a, b, g = (gg.tensor(v) for v in drawn)
    x.requires_grad_()

    def forward() -> Any:
        y = x
        for _ in range(100):
            y = y * a + b
        return y

    def step() -> None:
        x.grad = None
        forward().backward(g)

    return forward, step


def engine() -> Figures:
    """The eager engine on the CPU, without kernels, which are no part of it."""
    import gpugrad as gg
    from bench import gpu_nets

    found: Figures = {}
    with gg.use_kernels("off"):
        forward, step = chain()
        for _ in range(WARM):
            step()
        found["chain.calls"] = calls_of(step)
        found["chain.blocks"] = held_by(forward)
        found["chain.peak_bytes"] = peak_of(step)
        for name in ("mlp", "gpt"):
            work = gpu_nets.WORKLOADS[name]
            train = gpu_nets.with_gpugrad(work, work.small, "cpu")
            for _ in range(WARM):
                train()
            found[f"{name}_step.calls"] = calls_of(train)
            found[f"{name}_step.peak_bytes"] = peak_of(train)
    return {f"{PYTHON}.{name}": value for name, value in found.items()}


def stepping(device: str, counts: Any) -> Iterator[tuple[str, Any]]:
    """The counters after a step of each net, and after each way to clip."""
    import numpy as np

    import gpugrad as gg
    from bench import gpu_nets

    def counted(run: Callable[[], Any]) -> Any:
        for _ in range(WARM):
            run()
        counts.clear()
        run()
        return counts

    for name, work in gpu_nets.WORKLOADS.items():
        yield f"{name}_step", counted(gpu_nets.with_gpugrad(work, work.small, device))
    drawn = np.ones((2, 50, 3), "float32")
    params = [gg.tensor(x, device=device, requires_grad=True) for x in drawn[0]]
    optimizer = gg.optim.AdamW(params)
    for p, g in zip(params, drawn[1], strict=True):
        p.backward(gg.tensor(g, device=device))
    yield "clip_and_adamw", counted(lambda: optimizer.step(clip=1.0))
    yield "clip_grad_norm_", counted(lambda: gg.nn.utils.clip_grad_norm_(params, 1.0))


def generic() -> Figures:
    """Steps on the library that counts."""
    from tests.backend.counting import counting

    found: Figures = {}
    with counting() as counts:
        for name, seen in stepping("counting", counts):
            found |= {f"{name}.launches": seen.launches, f"{name}.host_reads": seen.host_reads,
                      f"{name}.uploads": seen.uploads}  # fmt: skip
    return found


def gpu() -> Figures:
    """Steps on the stand-in for CuPy; this process must not know the real one."""
    from bench import gpu_fake

    found: Figures = {}
    counts = gpu_fake.install()
    for name, seen in stepping("cuda:0", counts):
        found |= {f"{name}.launches": seen.launches, f"{name}.own": sum(seen.kernels.values()),
                  f"{name}.host_reads": seen.host_reads,
                  f"{name}.uploads": seen.library.uploads}  # fmt: skip
    return found


def kernels() -> Figures:
    """What is in the files that ship; registers are those that building them noted."""
    from gpugrad.kernels.cuda import assembly, build

    wide_load = re.compile(r"\bld\.global\S*\.(v4\.[bfsu]32|v2\.[bfsu]64)\b")
    wide_store = re.compile(r"\bst\.global\S*\.(v4\.[bfsu]32|v2\.[bfsu]64)\b")
    found: Figures = {}
    for family in build.families():
        text, told = build.read(family)
        for name, one in told["kernels"].items():
            section = assembly.section(text, name) or ""
            registers = [one["registers"][a] for a in build.ARCHITECTURES]
            row = (len(section), *registers, len(wide_load.findall(section)),
                   len(wide_store.findall(section)))  # fmt: skip
            found |= {f"{family}.{name}.{c}": x for c, x in zip(COLUMNS, row, strict=True)}
    return found


def imports() -> Figures:
    """What `import gpugrad` loads, in an interpreter of its own: our modules, and whose others."""
    code = "import sys, json; old = set(sys.modules); import gpugrad; "
    code += "print(json.dumps(sorted(set(sys.modules) - old)))"
    env = {k: v for k, v in os.environ.items() if k != "COVERAGE_PROCESS_START"}
    env["PYTHONPATH"] = str(ROOT)
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True,
                         check=True)  # fmt: skip
    names = json.loads(run.stdout)
    foreign = {name.partition(".")[0] for name in names} - {"gpugrad", *sys.stdlib_module_names}
    return {
        "own": sorted(n for n in names if n.partition(".")[0] == "gpugrad"),
        "foreign": sorted(n for n in foreign if not n.startswith("_")),
    }


GROUPS: dict[str, Callable[[], Figures]] = {
    "engine": engine, "generic": generic, "gpu": gpu, "kernels": kernels, "import": imports,
}  # fmt: skip


def measured(group: str) -> Figures:
    """The figures of a group, counted in a fresh interpreter."""
    command = [sys.executable, str(Path(__file__).resolve()), "--count", group]
    env = {k: v for k, v in os.environ.items() if not k.startswith(("GPUGRAD_", "COVERAGE_"))}
    env |= {"PYTHONHASHSEED": "0", "PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if run.returncode:
        raise RuntimeError(f"guards: {group} cannot be counted:\n{run.stderr[-3000:]}")
    found: Figures = json.loads(run.stdout.splitlines()[-1])
    return found


# -- comparing ------------------------------------------------------------------------------------


def compare(group: str, known: Mapping[str, Any], found: Figures) -> list[str]:
    """What has left its band, a line each. `known` is the group in the file."""
    lines = []
    for name in sorted({*known, *found}):
        full = f"{group}.{name}"
        if name not in found:
            lines.append(f"{full}: is gone, was {shown(known[name][0])}")
        elif name not in known:
            lines.append(f"{full}: {shown(found[name])}, is new")
        elif isinstance(found[name], list):
            old, new = set(known[name][0]), set(found[name])
            lines += [f"{full}: {one}, is new" for one in sorted(new - old)]
            lines += [f"{full}: {one}, is gone" for one in sorted(old - new)]
        else:
            was, band = known[name]
            if abs(found[name] - was) > band * was:
                lines.append(f"{full}: {found[name]}, was {was} (band {100 * band:g} %)")
    return lines


def shown(value: Any) -> str:
    return f"{len(value)} names" if isinstance(value, list) else str(value)


def missing(group: str, known: Mapping[str, Any]) -> str:
    """Why a group cannot be judged here; "" if it can."""
    if group == "engine" and not any(name.startswith(f"{PYTHON}.") for name in known):
        return f"no figures for Python {PYTHON}; python bench/guards.py --update counts them"
    return ""


def judged(group: str, known: Mapping[str, Any], found: Figures) -> list[str]:
    """As :func:`compare`, and of the engine only what this Python can count."""
    if group == "engine":
        known = {name: x for name, x in known.items() if name.startswith(f"{PYTHON}.")}
    return compare(group, known, found)


# -- the file -------------------------------------------------------------------------------------


def read(path: Path = FIGURES) -> dict[str, Figures]:
    """Groups of figures, each a pair of the figure and its band."""
    if not path.is_file():
        return {group: {} for group in GROUPS}
    told = json.loads(path.read_text(encoding="utf-8"))
    out: dict[str, Figures] = {group: told.get(group, {}) for group in GROUPS}
    columns, bands = told["kernels"]["columns"], told["kernels"]["bands"]
    out["kernels"] = {
        f"{kernel}.{column}": [value, band]
        for kernel, row in told["kernels"]["figures"].items()
        for column, value, band in zip(columns, row, bands, strict=True)
    }
    return out


def write(groups: Mapping[str, Figures], path: Path = FIGURES) -> None:
    """A line for a figure, a line for a kernel, a line for a module: changes are easy to read."""
    rows: dict[str, list[int]] = {}
    for name, (value, _) in groups["kernels"].items():
        kernel, _, column = name.rpartition(".")
        rows.setdefault(kernel, [0] * len(COLUMNS))[COLUMNS.index(column)] = value
    table = {"columns": list(COLUMNS), "bands": [band_of(c) for c in COLUMNS], "figures": rows}
    parts = [f'"about": {json.dumps("Written by python bench/guards.py --update.")}']
    for group in GROUPS:
        if group == "kernels":
            inner = ",\n".join(f"   {json.dumps(k)}: {json.dumps(v)}" for k, v in rows.items())
            head = "".join(f'  "{k}": {json.dumps(table[k])},\n' for k in ("columns", "bands"))
            parts.append(f'"kernels": {{\n{head}  "figures": {{\n{inner}\n  }}\n }}')
        elif group == "import":
            parts.append(f'"import": {json.dumps(groups[group], indent=2)}')
        else:
            inner = ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}"
                               for k, v in groups[group].items())  # fmt: skip
            parts.append(f'"{group}": {{\n{inner}\n }}')
    text = "{\n " + ",\n ".join(parts) + "\n}\n"
    json.loads(text)
    path.write_text(text, encoding="utf-8")


def updated(group: str, known: Figures, found: Figures) -> Figures:
    """What the file is to hold of a group; figures of other versions of Python stay."""
    new = {name: [value, band_of(name)] for name, value in found.items()}
    if group == "engine":
        others = {n: x for n, x in known.items() if not n.startswith(f"{PYTHON}.")}
        return dict(sorted({**others, **new}.items()))
    return new


def main(arguments: list[str] | None = None, path: Path = FIGURES) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--update", action="store_true", help="write the figures as they are")
    parser.add_argument("--only", default="", help=f"of {', '.join(GROUPS)}, with commas")
    parser.add_argument("--count", choices=GROUPS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.count:
        print(json.dumps(GROUPS[options.count]()))
        return 0
    known, changed = read(path), 0
    for group in options.only.split(",") if options.only else GROUPS:
        if (why := missing(group, known[group])) and not options.update:
            print(f"{group}: {why}")
            continue
        found = measured(group)
        lines = judged(group, known[group], found)
        changed += len(lines)
        print("\n".join(lines) if lines else f"{group}: {len(found)} figures hold")
        if options.update:
            known[group] = updated(group, known[group], found)
    if options.update:
        write(known, path)
        print(f"{path}: {changed} changes")
        return 0
    return int(changed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
