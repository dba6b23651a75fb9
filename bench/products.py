"""Matrix products of a training step, on one pool of threads, against NumPy, PyTorch and two pools.

``python bench/products.py [--quick] [--json PATH]``. The shapes are those of an MLP 784-512-512-10
on batches of 128 (forward, dX, dW), and of a GPT with 128 channels and 4 heads on 16 sequences of
64. Every contender has a process of its own, because pools in one process disturb each other; the
processes take turns, call by call of each shape. Two threads, float32, a new result every time.

The second part runs all the products of a step, and after each a Numba loop over its result: once
with everything on one pool, and with NumPy's products on a pool of their own beside Numba's.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from gpugrad.bench import common

THREADS = 2

#: Variables of each contender's process, besides those that tell NumPy's BLAS, OpenMP and Numba the
#: number of threads. These make gpugrad leave NumPy's BLAS as it is, unless its own says otherwise.
CONTENDERS: dict[str, dict[str, str]] = {
    "gpugrad": {"GPUGRAD_THREADS": str(THREADS)},
    "numpy": {},
    "torch": {},
}
POOLS: dict[str, dict[str, str]] = {
    "one pool": {"GPUGRAD_THREADS": str(THREADS)},
    "two pools, tbb": {"NUMBA_THREADING_LAYER": "tbb"},
    "two pools, omp": {"NUMBA_THREADING_LAYER": "omp"},
}

#: Seconds that one turn takes at least, and between two turns: idle threads of OpenBLAS and OpenMP
#: ask for work again and again for so long, and would slow the next contender down.
TURN, REST = 0.02, 0.06


# -- the products ---------------------------------------------------------------------------------


def products() -> dict[str, tuple[str, Callable[[Any], tuple[Any, Any]]]]:
    """Name → workload, and a maker of both operands from a maker of arrays."""
    found: dict[str, tuple[str, Callable[[Any], tuple[Any, Any]]]] = {}

    def linear(job: str, rows: int, inputs: int, outputs: int) -> None:
        name = f"{rows}x{inputs}x{outputs}"
        found[f"{name} forward"] = job, lambda new: (new(rows, inputs), new(outputs, inputs).T)
        found[f"{name} dX"] = job, lambda new: (new(rows, outputs), new(outputs, inputs))
        found[f"{name} dW"] = job, lambda new: (new(rows, outputs).T, new(rows, inputs))

    for inputs, outputs in ((784, 512), (512, 512), (512, 10)):
        linear("W1", 128, inputs, outputs)
    for inputs, outputs in ((128, 384), (128, 128), (128, 512), (512, 128)):
        linear("W5", 1024, inputs, outputs)
    heads: Any = lambda new: new(16, 64, 4, 32).swapaxes(1, 2)
    found["64 x 64x32x64 scores"] = "W5", lambda new: (heads(new), heads(new).swapaxes(2, 3))
    found["64 x 64x64x32 mix"] = "W5", lambda new: (new(16, 4, 64, 64), heads(new))
    found["64 x 64x64x32 mixᵀ"] = "W5", lambda new: (new(16, 4, 64, 64).swapaxes(2, 3), heads(new))
    return found


#: How often each product of W5 runs in a step of four layers; those of W1 run once.
LAYERS = 4

SMALL = {f"{n}x{n}x{n}": n for n in (8, 64)}


def arrays() -> Callable[..., Any]:
    """A maker of arrays, the same ones in every process."""
    import numpy as np

    rng = np.random.default_rng(0)
    return lambda *shape: rng.standard_normal(shape, dtype=np.float32)


# -- one contender's process ----------------------------------------------------------------------


def multiplier(name: str) -> Callable[[Any, Any], Any]:
    """The function that multiplies two arrays of this contender."""
    if name in ("gpugrad", "one pool"):
        from gpugrad.kernels.cpu.products import available, matmul

        assert available() is None, available()
        return matmul
    if name == "torch":
        import torch

        torch.set_num_threads(THREADS)
        torch.set_grad_enabled(False)
        return torch.matmul
    import numpy as np

    return np.matmul


def own(name: str, pair: tuple[Any, Any]) -> tuple[Any, Any]:
    """The operands as arrays of the contender's library, on the same memory."""
    if name != "torch":
        return pair
    import torch

    return torch.from_numpy(pair[0]), torch.from_numpy(pair[1])


def jobs(name: str) -> dict[str, Callable[[], Any]]:
    """What this contender may be asked to run."""
    matmul = multiplier(name)
    new = arrays()
    pairs = {what: own(name, make(new)) for what, (_, make) in products().items()}
    pairs |= {what: own(name, (new(n, n), new(n, n))) for what, n in SMALL.items()}
    if name not in POOLS:
        return {what: partial(matmul, a, b) for what, (a, b) in pairs.items()}

    import numpy as np
    from numba import njit, prange

    from gpugrad.kernels.cpu import pool

    pool.start()  # settles who uses which threads before Numba compiles

    @njit(parallel=True, fastmath=True)
    def activate(x: Any) -> None:
        blocks = (x.size + 8191) // 8192
        for block in prange(blocks):
            for i in range(block * 8192, min(x.size, block * 8192 + 8192)):
                x[i] = max(x[i] * np.float32(0.5), x[i])

    def step(job: str) -> Any:
        total = None
        for _ in range(LAYERS if job == "W5" else 1):
            for what, (belongs, _) in products().items():
                if belongs == job:
                    total = matmul(*pairs[what])
                    activate(total.reshape(-1))
        return total

    return {job: partial(step, job) for job in ("W1", "W5")}


def serve(name: str) -> None:
    """Run what is asked on standard input, one line each, and say how long a call took."""
    runs = jobs(name)
    print(json.dumps({what: checksum(run()) for what, run in runs.items()}), flush=True)
    repeats: dict[str, int] = {}
    for line in sys.stdin:
        what = line.strip()
        run = runs[what]
        if what not in repeats:
            run()
            start = time.perf_counter()
            run()
            repeats[what] = max(1, math.ceil(TURN / (time.perf_counter() - start)))
        n = repeats[what]
        run()  # wakes the threads that went to sleep while others had their turn
        start = time.perf_counter()
        for _ in range(n):
            run()
        print((time.perf_counter() - start) / n, flush=True)


def checksum(x: Any) -> float:
    import numpy as np

    return float(np.abs(np.asarray(x, dtype="float64")).sum())


# -- turns ----------------------------------------------------------------------------------------


def take_turns(contenders: dict[str, dict[str, str]], rounds: int) -> dict[str, dict[str, Any]]:
    """Seconds per call: what → contender → one number for every round."""
    workers = {
        name: subprocess.Popen(
            [sys.executable, __file__, "--serve", name],
            env=common.environment(THREADS) | variables,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for name, variables in contenders.items()
    }  # fmt: skip
    try:
        sums = {name: json.loads(answer(w)) for name, w in workers.items()}
        truth = next(iter(sums.values()))
        for name, found in sums.items():
            for what, value in found.items():
                if not math.isclose(value, truth[what], rel_tol=1e-5):
                    raise SystemExit(f"{name} computes something else for {what}; no comparison")
        seconds: dict[str, dict[str, Any]] = {
            what: {name: [] for name in workers} for what in truth
        }
        for _ in range(rounds):
            for what, by_name in seconds.items():
                for name, worker in workers.items():
                    assert worker.stdin is not None
                    worker.stdin.write(what + "\n")
                    worker.stdin.flush()
                    by_name[name].append(float(answer(worker)))
                    time.sleep(REST)
        return seconds
    finally:
        for worker in workers.values():
            assert worker.stdin is not None
            worker.stdin.close()
            worker.wait()


def answer(worker: Any) -> str:
    line: str = worker.stdout.readline()
    if not line:
        raise SystemExit(f"{worker.args[-1]} ended with {worker.wait()}")
    return line


def measure(quick: bool) -> dict[str, Any]:
    """Both parts: spreads of times, and ratios round by round."""
    rounds = 3 if quick else 11
    found: dict[str, Any] = {"rounds": rounds}
    for part, contenders in (("products", CONTENDERS), ("pools", POOLS)):
        seconds = take_turns(contenders, rounds)
        own_name = next(iter(contenders))
        found[part] = {
            what: {
                name: {
                    "us": common.spread(times, 1e6),
                    "ratio": common.ratio(times, by_name[own_name]),
                }
                for name, times in by_name.items()
            }
            for what, by_name in seconds.items()
        }
    return found


# -- report ---------------------------------------------------------------------------------------


def mean_ratio(found: dict[str, Any], job: str, peer: str) -> float:
    """The geometric mean over a workload's products of the peer's time as a multiple of ours."""
    ratios = [found["products"][what][peer]["ratio"]["median"]
              for what, (belongs, _) in products().items() if belongs == job]  # fmt: skip
    return math.exp(sum(map(math.log, ratios)) / len(ratios))


def verdicts(found: dict[str, Any]) -> list[dict[str, Any]]:
    """No slower than NumPy and PyTorch product by product, and one pool no slower than two."""
    out = []
    for job in ("W1", "W5"):
        for peer in ("numpy", "torch"):
            what = f"products of {job}: times as fast as {peer}, geometric mean"
            out.append(common.verdict(what, mean_ratio(found, job, peer), 1.0, "x", at_least=True))
        for peer in list(POOLS)[1:]:
            ratio = found["pools"][job][peer]["ratio"]["median"]
            what = f"products and loops of {job}: one pool, times as fast as {peer}"
            out.append(common.verdict(what, ratio, 1.0, "x", at_least=True))
    return out


def tables(found: dict[str, Any]) -> str:
    """Times of the first contender, and the others' as multiples of it."""
    text = []
    for part in ("products", "pools"):
        rows = []
        for what, by_name in found[part].items():
            own_name, *peers = by_name
            row: dict[str, Any] = {part: what, f"{own_name}, µs": by_name[own_name]["us"]["median"]}
            for peer in peers:
                spread = by_name[peer]["ratio"]
                row[f"{peer} ÷ {own_name}"] = spread["median"]
                row[f"{peer}: quartiles"] = f"{spread['q1']:.3g} to {spread['q3']:.3g}"
            rows.append(row)
        text.append(common.table(rows))
    return "\n\n".join(text)


def report(quick: bool) -> dict[str, Any]:
    """Measure, and judge."""
    found = common.measure(__file__, *(["--quick"] if quick else []), threads=THREADS)
    return {"benchmark": "products", "quick": quick, "threads": THREADS, **common.provenance(),
            "results": found, "verdicts": verdicts(found), "table": tables(found)}  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few rounds: a check, not a result")
    parser.add_argument("--json", help="write the report to this file")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.serve:
        serve(options.serve)
        return
    if options.measure:
        common.write_json(options.measure, measure(options.quick))
        return
    common.finish(report(options.quick), options.json)


if __name__ == "__main__":
    main()
