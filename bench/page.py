"""A run as one HTML page that needs nothing else: no network, no script."""

from __future__ import annotations

from html import escape

from gpugrad.bench import plots, summary
from gpugrad.bench.summary import Report, seconds_text

STYLE = """
:root { --paper: #fff; --ink: #1b1f24; --faint: #d7dce1; --soft: #5b6670;
  --own: #0b7a4b; --generic: #7fb99d; --a: #c2500a; --b: #e08e45; --c: #8a3c8f; --d: #2563c9;
  --e: #8c7a14; --f: #70757d; --gpu: #0b6b8a; --gpu-generic: #7cb3c4; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171a; --ink: #e6e9ec; --faint: #343b42;
  --soft: #9aa5af; --own: #3ccf8e; --generic: #7aa893; --a: #ff9248; --b: #e9b27c; --c: #d38bd8;
  --d: #7aaaff; --e: #d8c24a; --f: #a5abb3; --gpu: #45c4e8; --gpu-generic: #7ea6b3; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 60rem; background: var(--paper);
  color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; }
h3 { font-size: 1rem; margin: 1.5rem 0 0.25rem; }
p.where, p.what { color: var(--soft); font-size: 0.85rem; margin-top: 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.85rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.25rem 0.6rem; border-bottom: 1px solid var(--faint); text-align: right;
  white-space: nowrap; }
th:first-child, td:first-child, td.words { text-align: left; }
td.words { white-space: normal; }
th[colspan] { padding-top: 1rem; }
svg { display: block; width: 100%; height: auto; max-width: 46rem; }
svg text { fill: var(--ink); font: 12px system-ui, sans-serif; }
.grid { stroke: var(--faint); } .ceiling { stroke: var(--ink); stroke-width: 2; fill: none; }
.crossover { stroke: var(--soft); stroke-dasharray: 5 4; }
.curve { fill: none; stroke-width: 2; stroke: currentColor; }
.curve[class$="cuda"], .curve.c-cupy { stroke-dasharray: 6 3; }
.dot, .bar { fill: currentColor; }
.legend { display: flex; flex-wrap: wrap; gap: 0.3rem 1rem; padding: 0; list-style: none;
  font-size: 0.85rem; }
.legend i { display: inline-block; width: 0.8em; height: 0.8em; margin-right: 0.4em;
  background: currentColor; }
.legend span { color: var(--ink); }
.c-numba, .c-numba-compile { color: var(--own); } .c-numpy { color: var(--generic); }
.c-cuda, .c-cuda-compile { color: var(--gpu); } .c-cupy { color: var(--gpu-generic); }
.c-torch, .c-torch-cuda { color: var(--a); }
.c-torch-fused, .c-torch-fused-cuda { color: var(--b); }
.c-torch-compile, .c-torch-compile-cuda { color: var(--c); }
.c-jax, .c-jax-cuda { color: var(--d); }
.c-autograd { color: var(--e); } .c-mygrad { color: var(--f); }
""".strip()


def page(report: Report) -> str:
    """The whole page."""
    body = [
        "<h1>gpugrad bench</h1>",
        f'<p class="where">{escape(summary.where(report))}</p>',
        *notes(report),
        legend(report),
        "<h2>Roofline</h2>",
        *rooflines(report),
        "<h2>Times</h2>",
        times(report),
        "<h2>Speed-up over peers</h2>",
        "<p>Time as a multiple of gpugrad's on the same device: longer is slower. Medians of "
        "rounds in which all took turns.</p>",
        *bars(report),
        "<h2>Time against size</h2>",
        *curves(report),
        "<h2>What is missing</h2>",
        missing(report),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8"/>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>\n'
        '<meta name="color-scheme" content="light dark"/>\n'
        f"<title>gpugrad bench, {escape(report['date'])}</title>\n"
        f"<style>\n{STYLE}\n</style>\n</head>\n<body>\n" + "\n".join(body) + "\n</body>\n</html>\n"
    )


def notes(report: Report) -> list[str]:
    found = []
    if report["quick"]:
        found.append("A quick run of small sizes: a check, not a result.")
    if not report["complete"]:
        found.append("The run was interrupted: what had been measured by then.")
    return [f"<p><strong>{text}</strong></p>" for text in found]


def legend(report: Report) -> str:
    items = "".join(
        f'<li class="c-{escape(key)}"><i></i><span>{escape(about["label"])}</span></li>'
        for key, about in report["contenders"].items()
        if key not in report["absent"]
    )
    return f'<ul class="legend">{items}</ul>'


def rooflines(report: Report) -> list[str]:
    found = []
    for device, ceilings in report["ceilings"].items():
        drawn = plots.roofline(report, device)
        name = report["devices"].get(device, {}).get("name", report["machine"]["cpu"])
        copied, multiplied = (ceilings[what] / 1e9 for what in ("bandwidth", "flops"))
        found.append(
            f"<h3>{escape(device)}: {escape(str(name))}</h3>"
            f'<p class="what">Ceilings as measured: a copy moves {copied:,.0f} GB/s, a product of '
            f"matrices does {multiplied:,.0f} GFLOP/s. What lies above the slope has its data in a "
            "cache.</p>" + (drawn or "<p>Nothing to draw.</p>")
        )
    return found or ["<p>No ceilings were measured.</p>"]


def times(report: Report) -> str:
    heads = ["", "median", "quartiles", "over gpugrad", "of the roofline", "memory"]
    hosted = any("host" in e for w in report["workloads"].values() for e in w["sizes"].values())
    if hosted:
        heads.insert(3, "queued by the host in")
    rows = []
    for name, size in summary.last_sizes(report):
        lines = summary.lines(report, name, size)
        used = report["workloads"][name]["sizes"][size].get("memory", {})
        if lines:
            rows.append(f'<tr><th colspan="{len(heads)}">{escape(f"{name}, {size}")}</th></tr>')
        for line in lines:
            low, high = line.quartiles
            held = used.get(line.contender)
            cells = [
                seconds_text(line.median),
                f"{seconds_text(low)} to {seconds_text(high)}",
                "–" if line.ratio is None else f"{line.ratio:.3g}",
                "–" if line.share is None else f"{line.share:.0%}",
                "–" if held is None else f"{held / 2**20:.0f} MiB",
            ]
            if hosted:
                host = sorted(line.host)
                cells.insert(2, seconds_text(host[len(host) // 2]) if host else "–")
            rows.append(
                f'<tr><td class="c-{escape(line.contender)}">{escape(line.label)}</td>'
                + "".join(f"<td>{cell}</td>" for cell in cells)
                + "</tr>"
            )
    head = "".join(f"<th>{h}</th>" for h in heads)
    return (
        '<p class="what">Memory is what a pass holds beyond its operands, where it was measured.'
        f'</p><div class="wide"><table><tr>{head}</tr>\n{"".join(rows)}</table></div>'
    )


def bars(report: Report) -> list[str]:
    found = []
    for name, size in summary.last_sizes(report):
        for device in report["ceilings"] or ("cpu",):
            drawn = plots.speed_ups(report, name, size, device)
            if drawn:
                about = report["workloads"][name]["what"]
                on = "" if device == "cpu" else f", {escape(device)}"
                found.append(f"<h3>{escape(name)}, {escape(size)}{on}</h3>"
                             f'<p class="what">{escape(about)}</p>{drawn}')  # fmt: skip
    return found or ["<p>Nobody to compare with.</p>"]


def curves(report: Report) -> list[str]:
    found = []
    for name in report["workloads"]:
        drawn = plots.sizes(report, name)
        if drawn:
            found.append(f"<h3>{escape(name)}</h3>{drawn}")
    return found or ["<p>One size of each was measured.</p>"]


def missing(report: Report) -> str:
    """Contenders that took no part, and why; and what went wrong."""
    rows = [
        (report["contenders"].get(key, {}).get("label", key), "everything", why)
        for key, why in report["absent"].items()
    ]
    rows += [(label, f"{name}, {size}", why)
             for name, size, label, why in summary.problems(report)]  # fmt: skip
    rows += [
        (report["contenders"][key]["label"], name, why)
        for name, about in report["workloads"].items()
        for key, why in about["refused"].items()
    ]
    if not rows:
        return "<p>Nothing.</p>"
    body = "".join(
        f'<tr><td>{escape(who)}</td><td class="words">{escape(what)}</td>'
        f'<td class="words">{escape(why)}</td></tr>'
        for who, what, why in rows
    )
    heads = "<tr><th>contender</th><th>in</th><th>why</th></tr>"
    return f'<div class="wide"><table>{heads}\n{body}</table></div>'
