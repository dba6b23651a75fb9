"""Import time: what `import gpugrad` costs beyond `import numpy`, and what it loads.

``python bench/import_time.py [--quick] [--json PATH]``. Every sample is a fresh interpreter; the
two imports take turns.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from gpugrad.bench import common

SECONDS_BEYOND_NUMPY = 0.2
#: Libraries that are needed later or never; none of them may come with `import gpugrad`.
LATER = ("array_api_strict", "cupy", "ml_dtypes", "numba", "rich", "safetensors", "scipy", "torch",
         "typer")  # fmt: skip

PROBE = """
import json, sys, time
start = time.perf_counter()
import {module}
seconds = time.perf_counter() - start
packages = sorted({{name.partition(".")[0] for name in sys.modules}})
print(json.dumps([seconds, packages, len(sys.modules)]))
"""


def probe(module: str) -> tuple[float, list[str], int]:
    """Seconds of one import in a fresh interpreter, and what it loaded."""
    run = subprocess.run(
        [sys.executable, "-c", PROBE.format(module=module)], capture_output=True, text=True,
        env=common.environment(1), timeout=120, check=False,
    )  # fmt: skip
    if run.returncode != 0:
        raise RuntimeError(f"import {module} failed:\n{run.stderr[-4000:]}")
    seconds, names, count = json.loads(run.stdout)
    return seconds, names, count


def report(quick: bool) -> dict[str, Any]:
    """Alternate the imports and judge the difference of the medians."""
    modules = ("numpy", "gpugrad")
    probes = {m: probe(m) for m in modules}  # writes bytecode and warms the file cache
    seconds: dict[str, list[float]] = {m: [] for m in modules}
    for _ in range(3 if quick else 21):
        for m in modules:
            seconds[m].append(probe(m)[0])
    beyond = [g - n for g, n in zip(seconds["gpugrad"], seconds["numpy"], strict=True)]
    loaded = [name for name in LATER if name in probes["gpugrad"][1]]
    results: dict[str, Any] = {
        "numpy_ms": common.spread(seconds["numpy"], 1e3),
        "gpugrad_ms": common.spread(seconds["gpugrad"], 1e3),
        "beyond_ms": common.spread(beyond, 1e3),
        "modules_beyond": probes["gpugrad"][2] - probes["numpy"][2],
        "packages_beyond": sorted(set(probes["gpugrad"][1]) - set(probes["numpy"][1])),
        "too_early": loaded,
    }
    rows = [{"import": k.removesuffix("_ms"), "ms": v["median"],
             "quartiles": f"{v['q1']:.3g} to {v['q3']:.3g}"}
            for k, v in results.items() if k.endswith("_ms")]  # fmt: skip
    text = (f"{common.table(rows)}\n\n{results['modules_beyond']} modules beyond NumPy's; "
            f"loaded too early: {', '.join(loaded) or 'none'}")  # fmt: skip
    return {
        "benchmark": "import_time", "quick": quick, "threads": 1, **common.provenance(),
        "results": results,
        "verdicts": [
            common.verdict("import gpugrad beyond NumPy", results["beyond_ms"]["median"] / 1e3,
                           SECONDS_BEYOND_NUMPY, "s"),
            common.verdict("libraries loaded too early", len(loaded), 0, ""),
        ],
        "table": text,
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few samples: a check, not a result")
    parser.add_argument("--json", help="write the report to this file")
    options = parser.parse_args(arguments)
    common.finish(report(options.quick), options.json)


if __name__ == "__main__":
    main()
