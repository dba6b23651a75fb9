"""Batches of a data set in memory, and checkpoints: against PyTorch's loader and safetensors.

``python bench/data.py [--quick] [--json PATH]``. An epoch over 60000 rows of 784 float32 numbers in
shuffled batches of 128; and a file of 100 MiB in 25 tensors, written to a disk and read. gpugrad's
files are flushed to the disk and have checksums, which are computed and compared; the others' are
not. The contenders take turns in one process.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from gpugrad.bench import common

#: Rows of the data set; tensors of 4 MiB in the file.
ROWS, QUICK_ROWS = 60_000, 2_000
TENSORS, QUICK_TENSORS = 25, 2

#: What the loader has to reach, against PyTorch's.
SPEED_UP = 3.0

Run = Callable[[], Any]


def loaders(rows: int) -> dict[str, Run]:
    """One epoch each; the sum of all labels, so that nobody leaves any out."""
    import numpy as np

    from gpugrad.data import DataLoader, DeviceLoader, TensorDataset

    x = np.random.default_rng(0).standard_normal((rows, 784), dtype=np.float32)
    y = np.arange(rows)

    def epoch(loader: Any) -> Run:
        return lambda: sum(int(labels.sum().item()) for _, labels in loader)

    data = TensorDataset(x, y)
    found = {
        "gpugrad": epoch(DataLoader(data, 128, shuffle=True)),
        "gpugrad, 1 worker": epoch(DataLoader(data, 128, shuffle=True, num_workers=1)),
        "gpugrad, DeviceLoader": epoch(DeviceLoader(x, y, batch_size=128, shuffle=True)),
    }
    if importlib.util.find_spec("torch"):
        import torch
        from torch.utils import data as theirs

        torch.set_num_threads(2)
        other = theirs.TensorDataset(torch.from_numpy(x), torch.from_numpy(y))
        found["torch"] = epoch(theirs.DataLoader(other, 128, shuffle=True))
    for name, run in found.items():
        if run() != rows * (rows - 1) // 2:
            raise RuntimeError(f"{name} leaves rows out")
    return found


def files(count: int, folder: Path) -> dict[str, dict[str, Run]]:
    """Writing and reading."""
    import numpy as np
    import safetensors.numpy

    from gpugrad import io

    rng = np.random.default_rng(0)
    arrays = {f"w{i}": rng.standard_normal(1 << 20, dtype=np.float32) for i in range(count)}
    own, other = folder / "own.safetensors", folder / "other.safetensors"
    writing: dict[str, Run] = {
        "gpugrad": lambda: io.save(own, arrays),
        "safetensors": lambda: safetensors.numpy.save_file(arrays, other),
    }
    for write in writing.values():
        write()
    reading: dict[str, Run] = {
        "gpugrad": lambda: io.load(own),
        "gpugrad, without checksums": lambda: io.load(other),
        "gpugrad, mapped": lambda: io.load(own, mmap=True),
        "safetensors": lambda: safetensors.numpy.load_file(other),
    }
    return {"writing": writing, "reading": reading}


def measure(quick: bool) -> dict[str, dict[str, list[float]]]:
    """Seconds of everybody in each case."""
    rounds = 3 if quick else 11
    found = {"epoch": common.alternate(loaders(QUICK_ROWS if quick else ROWS), rounds=rounds)}
    with tempfile.TemporaryDirectory() as folder:
        for case, runs in files(QUICK_TENSORS if quick else TENSORS, Path(folder)).items():
            found[case] = common.alternate(runs, rounds=rounds)
    return found


def report(quick: bool) -> dict[str, Any]:
    seconds = common.measure(__file__, *(["--quick"] if quick else []), threads=2)
    rows = [
        {"case": f"{case}, ms", "contender": name, **common.spread(s, 1e3),
         "over gpugrad": common.ratio(s, timed["gpugrad"])["median"]}
        for case, timed in seconds.items() for name, s in timed.items()
    ]  # fmt: skip
    what, epoch = "shuffled batches of 128, over PyTorch", seconds["epoch"]
    verdict = (
        common.verdict(what, common.ratio(epoch["torch"], epoch["gpugrad"])["median"], SPEED_UP,
                       "x", at_least=True)
        if "torch" in epoch else common.not_run(what, "PyTorch is not installed")
    )  # fmt: skip
    return {"benchmark": "data", "quick": quick, "threads": 2, **common.provenance(),
            "results": seconds, "verdicts": [verdict], "table": common.table(rows)}  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="little data: a check, no result")
    parser.add_argument("--json", help="write the report to this file")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.measure:
        common.write_json(options.measure, measure(options.quick))
        return
    common.finish(report(options.quick), options.json)


if __name__ == "__main__":
    main()
