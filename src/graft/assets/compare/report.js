"use strict";
const DATA = JSON.parse(document.getElementById("data").textContent);
const SVG = "http://www.w3.org/2000/svg";
const DASHES = ["", "7 4", "2 3", "9 3 2 3"];
const COLORS = 7;

function node(name, attributes = {}, parent = null, text = null) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== null) made.textContent = text;
  if (parent) parent.append(made);
  return made;
}

// ---------------------------------------------------------------------------------------------- numbers

function short(value) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size < 1e-3 || size >= 1e6) return value.toExponential(2);
  const digits = Math.max(0, 2 - Math.floor(Math.log10(size)));
  return value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
}

const SIZES = [["GB", 1e9], ["MB", 1e6], ["kB", 1e3]];
const SHOW = {
  count: value => value.toLocaleString("en", { maximumFractionDigits: 1 }),
  size: value => {
    for (const [unit, scale] of SIZES) if (value >= scale) return `${short(value / scale)} ${unit}`;
    return `${Math.round(value)} B`;
  },
  short,
  percent: value => `${short(100 * value)} %`,
  signed: value => (value < 0 ? "" : "+") + value.toFixed(3),
  over: value => (value < 0 ? "" : "+") + (100 * value).toFixed(1) + " %",
};

function brief(kind, value) {  // beside an axis: as short as it can be said
  if (kind === "count" && Math.abs(value) >= 1000) {
    for (const [unit, scale] of [["B", 1e9], ["M", 1e6], ["k", 1e3]]) if (Math.abs(value) >= scale) return Number((value / scale).toPrecision(3)) + unit;
  }
  if (kind === "over" || kind === "percent") return Number((100 * value).toPrecision(3)) + " %";
  if (kind === "size") for (const [unit, scale] of SIZES) if (value >= scale) return `${Number((value / scale).toPrecision(3))} ${unit}`;
  return String(Number(value.toPrecision(4)));
}

// ---------------------------------------------------------------------------------------------- axes

function ticksOf(low, high, count) {
  const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map(m => m * power).find(s => s >= rough);
  const found = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k++) found.push(k * step);
  return found;
}

function axisOf(values, room, mayLog) {  // values -> {at: value to pixel, ticks}; room = [from, to] in pixels
  const positive = values.filter(v => v > 0), low = Math.min(...values), high = Math.max(...values);
  if (mayLog && low >= 0 && positive.length && high > 20 * Math.min(...positive)) {
    const first = Math.floor(Math.log10(Math.min(...positive))), last = Math.ceil(Math.log10(high)), zero = values.includes(0);
    const from = zero ? first - 1 : first, pad = 0.04 * (last - from);
    const log = v => v > 0 ? Math.log10(v) : first - 1;
    const at = v => room[0] + (log(v) - from + pad) / (last - from + 2 * pad) * (room[1] - room[0]);
    const every = Math.max(1, Math.ceil((last - first) * 55 / Math.abs(room[1] - room[0])));
    const ticks = zero ? [0] : [];
    for (let k = first; k <= last; k += every) ticks.push(10 ** k);
    return { at, ticks };
  }
  const span = high - low || Math.abs(high) || 1, from = low - 0.07 * span, to = high + 0.07 * span;
  const at = v => room[0] + (v - from) / (to - from) * (room[1] - room[0]);
  return { at, ticks: ticksOf(from, to, Math.max(2, Math.abs(room[1] - room[0]) / 90)) };
}

function frame(box, width, height, x, y, heads, kinds) {
  box.querySelector("svg")?.remove();
  const svg = node("svg", { viewBox: `0 0 ${width} ${height}`, role: "group" });
  box.prepend(svg);
  const axis = node("g", { class: "axis", "aria-hidden": "true" }, svg);
  for (const value of x.ticks) {
    const at = x.at(value);
    node("line", { class: "grid", x1: at, x2: at, y1: 12, y2: height - 44 }, axis);
    node("text", { x: at, y: height - 28, "text-anchor": "middle" }, axis, brief(kinds[0], value));
  }
  for (const value of y.ticks) {
    const at = y.at(value);
    node("line", { class: "grid", x1: 58, x2: width - 12, y1: at, y2: at }, axis);
    node("text", { x: 52, y: at + 4, "text-anchor": "end" }, axis, brief(kinds[1], value));
  }
  node("text", { x: (58 + width - 12) / 2, y: height - 8, "text-anchor": "middle" }, axis, heads[0]);
  const turn = `rotate(-90) translate(${-(12 + height - 44) / 2} 13)`;
  node("text", { transform: turn, "text-anchor": "middle" }, axis, heads[1]);
  return svg;
}

const sizeOf = box => {
  const width = Math.max(300, Math.round(box.clientWidth));
  return [width, Math.round(Math.min(520, Math.max(300, width * 0.55)))];
};

// ---------------------------------------------------------------------------------------------- the Pareto picture

function front(points, x, y) {  // places of the points that no other beats, along x
  const worse = (column, a, b) => column.better === "high" ? b - a : a - b;
  const order = points.map((_, place) => place).sort((a, b) =>
    worse(x, points[a].x, points[b].x) || worse(y, points[a].y, points[b].y));
  const found = [];
  for (const place of order) {
    const last = points[found.at(-1)];
    if (!last || worse(y, points[place].y, last.y) < 0 || (points[place].y === last.y && points[place].x === last.x)) found.push(place);
  }
  return found;
}

function mark(kind, x, y) {
  if (kind === "base") return ["rect", { x: x - 5, y: y - 5, width: 10, height: 10 }];
  if (kind === "icl") return ["path", { d: `M${x} ${y - 7}L${x + 7} ${y}L${x} ${y + 7}L${x - 7} ${y}Z` }];
  return ["circle", { cx: x, cy: y, r: 5.5 }];
}

function drawPareto() {
  const box = document.getElementById("pareto"), sentence = document.getElementById("pareto-words");
  const [xs, ys] = ["pareto-x", "pareto-y"].map(id => DATA.columns.find(c => c.key === document.getElementById(id).value));
  const points = DATA.points.filter(p => p.values[xs.key] != null && p.values[ys.key] != null)
    .map(p => ({ ...p, x: p.values[xs.key], y: p.values[ys.key] }));
  const [width, height] = sizeOf(box);
  if (!points.length) {
    box.querySelector("svg")?.remove();
    sentence.textContent = `No entry has both ${xs.head} and ${ys.head}.`;
    return;
  }
  const bars = (column, p) => column.key === "quality" && p.low != null ? [p.low, p.high] : [];
  const x = axisOf(points.flatMap(p => [p.x, ...bars(xs, p)]), [58, width - 12], xs.key !== "quality");
  const y = axisOf(points.flatMap(p => [p.y, ...bars(ys, p)]), [height - 44, 12], ys.key !== "quality");
  const better = column => column.better ? `${column.head} (${column.better}er is better)` : column.head;
  const svg = frame(box, width, height, x, y, [better(xs), better(ys)], [xs.show, ys.show]);
  node("title", {}, svg, `${ys.head} against ${xs.head}`);
  const best = front(points, xs, ys);
  const line = best.map((place, k) => {
    const [a, b] = [x.at(points[place].x), y.at(points[place].y)];
    return k ? `H${a}V${b}` : `M${a} ${b}`;
  });
  node("path", { class: "front", d: line.join("") || "M0 0" }, svg);
  const taken = points.map(p => ({ x: x.at(p.x) - 7, y: y.at(p.y) - 7, width: 14, height: 14 }));
  best.slice(1).forEach((place, k) => {
    const [a, b] = [points[best[k]], points[place]].map(p => [x.at(p.x), y.at(p.y)]);
    taken.push({ x: Math.min(a[0], b[0]), y: a[1] - 1, width: Math.abs(b[0] - a[0]), height: 2 });
    taken.push({ x: b[0] - 1, y: Math.min(a[1], b[1]), width: 2, height: Math.abs(b[1] - a[1]) });
  });
  const drawn = points.map((p, place) => ({ p, place, on: best.includes(place) })).sort((a, b) => a.on - b.on);
  const groups = new Map();
  for (const { p, place, on } of drawn) {
    const words = `${p.label}: ${ys.head} ${SHOW[ys.show](p.y)}, ${xs.head} ${SHOW[xs.show](p.x)}${on ? ", on the front" : ""}`;
    const group = node("g", { class: on ? "point on" : "point", tabindex: 0, role: "img", "aria-label": words }, svg);
    const [a, b] = [x.at(p.x), y.at(p.y)];
    if (bars(ys, p).length) node("line", { class: "bar", x1: a, x2: a, y1: y.at(p.low), y2: y.at(p.high) }, group);
    if (bars(xs, p).length) node("line", { class: "bar", y1: b, y2: b, x1: x.at(p.low), x2: x.at(p.high) }, group);
    const [name, attributes] = mark(p.kind, a, b);
    node(name, { class: "shape", ...attributes }, group);
    node("circle", { cx: a, cy: b, r: 13, fill: "transparent" }, group);
    tipped(box, group, p, xs, ys, a / width);
    groups.set(place, group);
  }
  let unnamed = 0;
  for (const { p, place } of drawn.reverse()) if (!named(groups.get(place), p, x.at(p.x), y.at(p.y), taken, width, height)) unnamed += 1;
  sentence.textContent = `On the front: ${best.map(place => points[place].label).join(", ")}.`
    + (unnamed ? ` ${unnamed} ${unnamed === 1 ? "point has" : "points have"} no room for a name; point at one to read it.` : "");
}

function named(group, p, a, b, taken, width, height) {  // the name at the first free place; false if there is none
  const text = p.label.length > 34 ? `${p.label.slice(0, 17)}…${p.label.slice(-16)}` : p.label;
  const made = node("text", { class: "halo", "aria-hidden": "true" }, group, text);
  for (const far of [11, 20, 32]) {
    for (const [dx, dy] of [[1, 0], [1, -.8], [1, .8], [-1, 0], [-1, -.8], [-1, .8], [0, -1.2], [0, 1.2]]) {
      made.setAttribute("text-anchor", dx > 0 ? "start" : dx < 0 ? "end" : "middle");
      made.setAttribute("x", a + dx * far);
      made.setAttribute("y", b + dy * far + 4);
      const own = made.getBBox();
      const inside = own.x >= 58 && own.x + own.width <= width - 2 && own.y >= 4 && own.y + own.height <= height - 44;
      const hit = taken.some(t => own.x < t.x + t.width && t.x < own.x + own.width && own.y < t.y + t.height && t.y < own.y + own.height);
      if (inside && !hit) {
        taken.push(own);
        if (far > 11) node("line", { class: "bar", x1: a + dx * 8, y1: b + dy * 8, x2: a + dx * (far - 2), y2: b + dy * (far - 2) }, group);
        return true;
      }
    }
  }
  made.remove();
  return false;
}

function tipped(box, group, p, xs, ys, side) {
  const tip = box.querySelector(".tip");
  const show = () => {
    tip.replaceChildren();
    const name = document.createElement("b");
    name.textContent = p.label;
    tip.append(name);
    for (const column of new Set([ys, xs])) {
      const line = document.createElement("div");
      line.textContent = `${column.head}: ${SHOW[column.show](p.values[column.key])}`;
      if (column.key === "quality" && p.low != null) line.textContent += ` (${short(p.low)} to ${short(p.high)})`;
      tip.append(line);
    }
    tip.hidden = false;
    const at = group.querySelector(".shape").getBoundingClientRect(), own = box.getBoundingClientRect();
    tip.style.left = side > 0.5 ? "auto" : `${at.right - own.left + 8}px`;
    tip.style.right = side > 0.5 ? `${own.right - at.left + 8}px` : "auto";
    tip.style.top = `${at.top - own.top + 12}px`;
  };
  const hide = () => { tip.hidden = true; };
  for (const event of ["mouseenter", "focus"]) group.addEventListener(event, show);
  for (const event of ["mouseleave", "blur"]) group.addEventListener(event, hide);
}

// ---------------------------------------------------------------------------------------------- learning curves

const picked = new Set();

function drawCurves() {
  const box = document.getElementById("curves");
  if (!box) return;
  const key = document.getElementById("curves-key").value;
  const lines = DATA.curves.map((c, place) => ({ ...c, place, points: c[key] })).filter(c => c.points.length);
  const [width, height] = sizeOf(box);
  const x = axisOf(lines.flatMap(c => c.points.map(p => p[0])), [58, width - 12], false);
  const y = axisOf(lines.flatMap(c => c.points.flatMap(p => [p[2], p[3]])), [height - 44, 12], false);
  const svg = frame(box, width, height, x, y, ["optimizer step", key === "loss" ? "training loss" : "evaluation loss"], ["short", "short"]);
  node("title", {}, svg, "Learning curves: the mean over the seeds, and their range");
  for (const { label, place, points } of lines) {
    const dim = picked.size && !picked.has(label) ? " dim" : "";
    const color = `var(--c${place % COLORS})`;
    const up = points.map(p => `${x.at(p[0])} ${y.at(p[3])}`), down = points.map(p => `${x.at(p[0])} ${y.at(p[2])}`).reverse();
    const group = node("g", { class: `line${dim}`, role: "img", "aria-label": `${label}: from ${short(points[0][1])} to ${short(points.at(-1)[1])}` }, svg);
    node("path", { class: "band", fill: color, d: `M${[...up, ...down].join("L")}Z` }, group);
    const dash = DASHES[Math.floor(place / COLORS) % DASHES.length];
    node("path", { class: "curve", style: `stroke:${color}`, "stroke-dasharray": dash, d: `M${points.map(p => `${x.at(p[0])} ${y.at(p[1])}`).join("L")}` }, group);
    node("title", {}, group, label);
  }
}

function legend() {
  const list = document.getElementById("curves-legend");
  DATA.curves.forEach(({ label }, place) => {
    const item = document.createElement("li"), button = document.createElement("button");
    button.type = "button";
    button.setAttribute("aria-pressed", "false");
    const svg = node("svg", { viewBox: "0 0 26 10", "aria-hidden": "true" }, button);
    node("path", { class: "curve", style: `stroke:var(--c${place % COLORS})`, "stroke-dasharray": DASHES[Math.floor(place / COLORS) % DASHES.length], d: "M0 5H26" }, svg);
    button.append(label);
    button.addEventListener("click", () => {
      if (!picked.delete(label)) picked.add(label);
      button.setAttribute("aria-pressed", String(picked.has(label)));
      drawCurves();
    });
    item.append(button);
    list.append(item);
  });
}

// ---------------------------------------------------------------------------------------------- tables

function sortable(table) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, place) => head.querySelector("button")?.addEventListener("click", () => {
    const now = head.getAttribute("aria-sort");
    const up = now ? now !== "ascending" : head.dataset.first !== "descending";
    for (const other of heads) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const text = head.classList.contains("text"), body = table.tBodies[0];
    const value = row => row.cells[place].dataset.value ?? (text ? row.cells[place].textContent.trim() : "");
    const rows = [...body.rows].map(row => [value(row), row]);
    rows.sort(([a], [b]) => {
      if (a === "" || b === "") return (a === "") - (b === "");  // what was not measured stays below
      const order = text ? a.localeCompare(b, "en", { numeric: true }) : Number(a) - Number(b);
      return up ? order : -order;
    });
    body.append(...rows.map(([, row]) => row));
  }));
}

document.querySelectorAll("table.sortable").forEach(sortable);
for (const id of ["pareto-x", "pareto-y"]) document.getElementById(id)?.addEventListener("change", drawPareto);
document.getElementById("curves-key")?.addEventListener("change", drawCurves);
if (document.getElementById("curves")) legend();
function draw() {
  if (document.getElementById("pareto")) drawPareto();
  drawCurves();
}
draw();
let waiting = 0;
addEventListener("resize", () => {
  cancelAnimationFrame(waiting);
  waiting = requestAnimationFrame(draw);
});
let opened = [];
function forPaper(on) {  // pictures are drawn anew at the width of the paper, or their letters would shrink
  for (const box of document.querySelectorAll(".picture")) box.style.width = on ? "660px" : "";
  draw();
}
addEventListener("beforeprint", () => {
  opened = [...document.querySelectorAll("details:not([open], .long)")];
  opened.forEach(each => { each.open = true; });
  forPaper(true);
});
addEventListener("afterprint", () => {
  opened.forEach(each => { each.open = false; });
  forPaper(false);
});
function unfold() {  // a link to an entry opens it
  const target = location.hash && document.getElementById(location.hash.slice(1));
  if (target && target.tagName === "DETAILS") target.open = true;
}
addEventListener("hashchange", unfold);
unfold();
