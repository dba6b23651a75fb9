"use strict";
// Shows the numbers under the pointer, or under the finger; with the arrow keys, too.
(() => {
  const tip = document.getElementById("tip");
  const text = (v) => {
    if (v === null || v === undefined) return "not known";
    if (typeof v !== "number") return v;
    const size = Math.abs(v);
    if (v !== 0 && (size < 1e-3 || size >= 1e6)) {
      return v.toExponential(2).replace("e+", "e").replace(/\.?0+e/, "e");
    }
    return String(Number(v.toPrecision(4)));
  };
  const near = (xs, x) => {
    let low = 0, high = xs.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (xs[middle] <= x) low = middle; else high = middle;
    }
    return x - xs[low] <= xs[high] - x ? low : high;
  };
  const mark = (plot, kind) => {
    plot.querySelectorAll(".cross, .cell").forEach((old) => old.remove());
    const made = document.createElement("div");
    made.className = kind;
    plot.append(made);
    return made;
  };
  const line = (plot, data, u) => {
    const x = data.x[0] + u * (data.x[1] - data.x[0]);
    const series = data.series.filter((s) => s.x.length);
    if (!series.length) return "";
    const at = series[0].x[near(series[0].x, x)];
    const share = (at - data.x[0]) / (data.x[1] - data.x[0]);
    mark(plot, "cross").style.left = `${100 * share}%`;
    const lines = series.map((s) => {
      const i = near(s.x, at);
      return s.name + " " + (s.y ? text(s.y[i]) : `${text(s.low[i])} … ${text(s.high[i])}`);
    });
    return [data.names ? data.names[at] : `${data.label} ${text(at)}`, ...lines].join("\n");
  };
  const heat = (plot, data, u, v) => {
    if (!data.cells) {
      const raw = atob(data.codes);
      data.cells = new Uint16Array(raw.length / 2);
      for (let i = 0; i < data.cells.length; i++) {
        data.cells[i] = raw.charCodeAt(2 * i) | (raw.charCodeAt(2 * i + 1) << 8);
      }
    }
    const column = Math.min(data.columns - 1, Math.floor(u * data.columns));
    const row = Math.min(data.rows - 1, Math.floor(v * data.rows));
    const code = data.cells[row * data.columns + column];
    let value = ["not known", "NaN or infinite", "0"][code];
    if (code > 2) {
      const place = data.axis[0] + ((code - 3) / 65532) * (data.axis[1] - data.axis[0]);
      value = text(Number((data.log ? 10 ** place : place).toPrecision(3)));
    }
    const cell = mark(plot, "cell").style;
    cell.left = `${(100 * column) / data.columns}%`;
    cell.top = `${(100 * row) / data.rows}%`;
    cell.width = `max(4px, ${100 / data.columns}%)`;
    cell.height = `${100 / data.rows}%`;
    const wide = (data.steps[1] + 1 - data.steps[0]) / data.columns;
    const first = Math.ceil(data.steps[0] + column * wide - 1e-9);
    const last = Math.ceil(data.steps[0] + (column + 1) * wide - 1e-9) - 1;
    return `${data.names[row]}\nstep ${first}${last > first ? ` to ${last}` : ""}\n${value}`;
  };
  const hide = (plot) => {
    tip.hidden = true;
    plot.querySelectorAll(".cross, .cell").forEach((old) => old.remove());
  };
  document.querySelectorAll(".plot").forEach((plot) => {
    const source = plot.querySelector("script");
    if (!source) return;
    let data = null, u = 0.5, v = 0.5;
    const show = () => {
      data ??= JSON.parse(source.textContent);
      tip.textContent = data.codes === undefined ? line(plot, data, u) : heat(plot, data, u, v);
      tip.hidden = !tip.textContent;
      const box = plot.getBoundingClientRect();
      const x = box.left + u * box.width, y = box.top + v * box.height;
      const left = x + 14 + tip.offsetWidth > innerWidth ? x - 14 - tip.offsetWidth : x + 14;
      tip.style.left = `${Math.max(4, left)}px`;
      tip.style.top = `${Math.max(4, Math.min(y + 14, innerHeight - tip.offsetHeight - 4))}px`;
    };
    const inside = (w) => Math.min(1 - 1e-9, Math.max(0, w));
    const point = (event) => {
      const box = plot.getBoundingClientRect();
      u = inside((event.clientX - box.left) / box.width);
      v = inside((event.clientY - box.top) / box.height);
      show();
    };
    plot.addEventListener("pointermove", point);
    plot.addEventListener("pointerdown", point);
    plot.addEventListener("pointerleave", () => hide(plot));
    plot.addEventListener("blur", () => hide(plot));
    plot.addEventListener("keydown", (event) => {
      if (event.key === "Escape") return hide(plot);
      const move = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]};
      if (!move[event.key]) return;
      event.preventDefault();
      data ??= JSON.parse(source.textContent);
      u = inside(u + move[event.key][0] / (data.columns || 100));
      v = inside(v + move[event.key][1] / (data.rows || 100));
      show();
    });
  });
})();
