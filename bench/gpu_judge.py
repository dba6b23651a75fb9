"""What the parts of gpu_check found, held against what is claimed, and shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bench import common

Results = dict[str, Any]
Lines = list[dict[str, Any]]

# What must be reached on a GPU.
DIGITS_ACCURACY = 0.97
#: float32 on two machines: rounding differs in every product, and more so the longer it trains.
CURVE_TOLERANCE = 0.02
HOST_SHARE_OF_TORCH = 1.0
CLIP_AND_STEP_SHARE, BIAS_BACKWARD_SHARE = 0.90, 0.85
LAUNCH_US, TINY_MS, CLIP_AND_STEP_LAUNCHES = 12.0, 0.1, 2
STEP_OF_TORCH = 1.0


def tests(results: Results) -> Lines:
    """No test marked gpu may fail, and some must have run."""
    outcomes = [t["outcome"] for t in results.get("tests", ())]
    bad = sum(o in ("failed", "error") for o in outcomes)
    passed = outcomes.count("passed")
    verdict = common.verdict(f"tests marked gpu that fail ({passed} pass, "
                             f"{outcomes.count('skipped')} skipped, "
                             f"{outcomes.count('not collected')} files not collected)",
                             bad, 0, "")  # fmt: skip
    if not passed and not bad:
        skipped = outcomes.count("skipped")
        why = f"all {skipped} were skipped" if skipped else results.get("summary") or "none ran"
        return [common.not_run("tests marked gpu", why)]
    return [verdict]


def primitives(results: Results) -> Lines:
    """Every primitive agrees with NumPy: value, gradient, second derivative."""
    rows = results.get("primitives", [])
    total = results.get("total", len(rows))
    out = []
    for check in ("value", "vjp", "second"):
        bad = sum(row[check].startswith("fail") for row in rows)
        good = sum(row[check] == "pass" for row in rows)
        out.append(common.verdict(f"operations of {len(rows)} whose {check} differs from NumPy's "
                                  f"({good} agree)", bad, 0, ""))  # fmt: skip
    if len(rows) < total:
        out.append(common.verdict("operations that were not reached", total - len(rows), 0, ""))
    return out


def merge_shards(entries: Mapping[str, dict[str, Any]]) -> Results:
    """The shards of the registry check as one result."""
    rows = [row for e in entries.values() for row in e["results"].get("primitives", ())]
    total = max((e["results"].get("total", 0) for e in entries.values()), default=0)
    return {"primitives": sorted(rows, key=lambda r: r["name"]), "total": total}


def main_job(results: Results) -> Lines:
    """The digits are learnt on the device, along the curve of the CPU."""
    if "device" not in results:
        return [common.not_run("main job on the device", "it did not get to its end")]
    found = results["device"]
    out = [common.verdict("digits on the device: test accuracy", found["accuracy"],
                          DIGITS_ACCURACY, "", at_least=True)]  # fmt: skip
    if "curve_difference" in results:
        out.append(common.verdict("digits: loss curve beside the CPU's, greatest difference "
                                  "over the first loss", results["curve_difference"],
                                  CURVE_TOLERANCE, ""))  # fmt: skip
    return out


def overhead(results: Results) -> Lines:
    """Host time per operation at most PyTorch's."""
    out = []
    for row in results.get("chains", ()):
        what = f"x*a+b on {row['shape']}: host time per operation, PyTorch = 1"
        if "share_of_torch" in row:
            out.append(common.verdict(what, row["share_of_torch"]["median"],
                                      HOST_SHARE_OF_TORCH, ""))  # fmt: skip
        else:
            out.append(common.not_run(what, results.get("torch", "PyTorch did not run")))
    return out or [common.not_run("overhead per operation", "no chain was finished")]


def sanitizer(results: Results) -> Lines:
    """No error, and it came to its end."""
    what = f"{results.get('tool', 'compute-sanitizer')}: errors in {results.get('calls', 0)} calls"
    errors = results.get("errors")
    if not results.get("with_tool"):
        return [common.not_run(what, "without compute-sanitizer")]
    if errors is None:
        why = results.get("refused") or f"no summary; it ended with {results.get('ended')}"
        return [common.not_run(what, why)]
    if results.get("ended") != 0 and errors == 0:
        return [common.not_run(what, f"the program under it ended with {results.get('ended')}")]
    return [common.verdict(what, errors, 0, "")]


def kernels(results: Results) -> Lines:
    """Each kernel ran at each size."""
    rows = results.get("kernels", [])
    bad = [r for r in rows if r.get("error") and r["error"] != "out of memory"]
    out = [common.verdict(f"kernels of {len(rows)} rows that fail", len(bad), 0, "")]
    out += [common.not_run(f"{r['slot']}, {r['size']}", "out of memory")
            for r in rows if r.get("error") == "out of memory"]  # fmt: skip
    if late := results.get("not_reached"):
        out.append(common.verdict("cases that were not reached", len(late), 0, ""))
    return out


def steps(results: Results) -> Lines:
    """Losses as PyTorch's, no host read, time and memory at most PyTorch's."""
    name = results.get("workload", "step")
    rows = results.get("steps", [])
    if not rows:
        return [common.not_run(f"step of {name}", "it did not come to its end")]
    out = []
    reads = results.get("counts", {}).get("host_reads")
    waits = results.get("waits")
    if reads is not None or waits:
        what = f"{name}: host reads in a step{f' ({waits})' if waits else ''}"
        out.append(common.verdict(what, max(reads or 0, int(bool(waits))), 0, ""))
    elif waits == "":
        out.append(common.verdict(f"{name}: host reads that CuPy sees in a step", 0, 0, ""))
    peers = [r for r in rows if "share" in r]
    if not peers:
        why = results.get("torch") or "; ".join(results.get("left_out", ["no peer"]))
        return [*out, common.not_run(f"{name}: beside PyTorch", why)]
    best = max(peers, key=lambda r: r["share"])
    out.append(common.verdict(f"step of {name}: time, {best['contender']} = 1", best["share"],
                              STEP_OF_TORCH, ""))  # fmt: skip
    own = next(r for r in rows if r["contender"] == "gpugrad")
    eager = next((r for r in peers if r["contender"] == "torch" and r["peak_MiB"]), None)
    if eager:
        out.append(common.verdict(f"step of {name}: peak memory, PyTorch = 1",
                                  own["peak_MiB"] / eager["peak_MiB"], 1.0, ""))  # fmt: skip
    return out


def claims(results: Results) -> Lines:
    """Line by line; what was not measured is said."""
    out: Lines = []

    def line(what: str, value: Any, limit: float, unit: str = "", at_least: bool = False) -> None:
        if value is None:
            left = results.get("left_out", [])
            out.append(common.not_run(what, "; ".join(left) or "not measured"))
        else:
            out.append(common.verdict(what, value, limit, unit, at_least=at_least))

    line("launch of a kernel: host time", results.get("launch_us", {}).get("median"), LAUNCH_US,
         "µs")  # fmt: skip
    steps = results.get("clip_and_step", [{}])
    for row in steps:
        what = f"clip + AdamW, {row.get('parameters_M', '?')} M parameters"
        line(f"{what}: share of a copy's bandwidth", row.get("share"), CLIP_AND_STEP_SHARE,
             at_least=True)  # fmt: skip
    row, counts = steps[0], steps[0].get("counts", {})
    launches = counts.get("kernels")
    line("clip + AdamW: kernels launched", row.get("own_launches") if launches is None
         else launches, CLIP_AND_STEP_LAUNCHES)  # fmt: skip
    reads = counts.get("host_reads")
    if row.get("waits") is not None:
        reads = max(reads or 0, int(bool(row["waits"])))
    line("clip + AdamW: host reads", reads, 0)
    share = results.get("bias_backward", {}).get("share")
    line("bias + GELU backward, 4096×4096: share of a copy's bandwidth", share,
         BIAS_BACKWARD_SHARE, at_least=True)  # fmt: skip
    for name in ("clip_grad_norm_", "step"):
        line(f"1000 tensors of 4 elements: {name}",
             results.get(f"tiny_{name}_ms", {}).get("median"), TINY_MS, "ms")  # fmt: skip
    line("dropout: elements that the CPU drops and the GPU does not, or the other way round",
         results.get("other_in_mask"), 0)  # fmt: skip
    if "compilers_loaded" in results:
        line("compilers that were loaded", len(results["compilers_loaded"]), 0)
    return out


def nothing(results: Results) -> Lines:
    return []


# -- tables ---------------------------------------------------------------------------------------


def figures(entries: Mapping[str, dict[str, Any]]) -> str:
    """The measured figures, beside the verdicts."""
    text = []
    chains = entries.get("overhead", {}).get("results", {}).get("chains", [])
    rows = [{"chain": row["shape"], "library": library, **row["libraries"][library]}
            for row in chains for library in row["libraries"]]  # fmt: skip
    if rows:
        columns = ["chain", "library", "host_us", "total_us", "event_us", "kernel_us", "kernels"]
        text.append(f"Per operation (forward and backward):\n\n{common.table(rows, columns)}")
    ceilings = entries.get("ceilings", {}).get("results", {}).get("ceilings", [])
    if ceilings:
        text.append(f"Ceilings:\n\n{common.table(ceilings)}")
    if found := entries.get("kernels", {}).get("results", {}).get("kernels", []):
        title = "Kernels, share of a copy of as many bytes (product: of a product's rate):"
        text.append(f"{title}\n\n{kernel_table(found)}")
    stepped = [row for name, entry in entries.items() if name.startswith("steps-")
               for row in entry["results"].get("steps", ())]  # fmt: skip
    if stepped:
        columns = ["step", "contender", "ms", "host_ms", "event_ms", "share", "peak_MiB",
                   "kernels", "host_reads"]  # fmt: skip
        text.append(f"Training steps (share: gpugrad's time, contender = 1):\n\n"
                    f"{common.table(stepped, columns)}")  # fmt: skip
    return "\n\n".join(text)


def kernel_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line for each kernel, its sizes beside each other."""
    lines: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        line = lines.setdefault((row["case"], row["slot"]), {"kernel": row["slot"],
                                                             "case": row["case"]})  # fmt: skip
        size = row["size"]
        line[size] = row.get("error") or f"{100 * row['share']:.0f} %{' (waits)' * row['waits']}"
        if size == "HBM" and "error" not in row:
            line |= {"GB/s": row["GB/s"], "host_us": row["host_us"], "launches": row["launches"]}
            if "share_of_product" in row:
                line["product"] = f"{100 * row['share_of_product']:.0f} %"
    columns = ["kernel", "case", "HBM", "L2", "L2, in turn", "product", "GB/s", "host_us",
               "launches"]  # fmt: skip
    return common.table(list(lines.values()), columns)


def failures(entries: Mapping[str, dict[str, Any]], most: int = 20) -> list[str]:
    """The first few things that went wrong, one line each."""
    lines = []
    for name, entry in entries.items():
        found = entry["results"]
        lines += [f"{name}: {test['name']}: {test['why']}" for test in found.get("tests", ())
                  if test["outcome"] in ("failed", "error")]  # fmt: skip
        for row in found.get("primitives", ()):
            lines += [f"{row['name']}: {check}: {row[check].removeprefix('fail: ')}"
                      for check in ("value", "vjp", "second")
                      if row[check].startswith("fail")]  # fmt: skip
        lines += [f"{name}: {row['case']}, {row['slot']}, {row['size']}: {row['error']}"
                  for row in found.get("kernels", ()) if row.get("error")]  # fmt: skip
        lines += [f"{name}: {why}" for why in found.get("left_out", ())]
        if found.get("errors"):
            lines.append(f"{name}: {found['summary']}: {', '.join(found['where'])}")
    if len(lines) > most:
        lines[most:] = [f"… and {len(lines) - most} more, in the JSON"]
    return [line[:200] for line in lines]
