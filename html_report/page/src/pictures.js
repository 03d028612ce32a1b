// The pictures of the methods: one function for each kind of data (picture.py lists the kinds).

import { h, s } from "./dom.js";

export function picturePart(pictures) {
  const section = h("section", { id: "pictures", "aria-labelledby": "pictures-title" }, h("h2", { id: "pictures-title" }, "Pictures"));
  if (!pictures.length) section.append(h("p", {}, "No method left figures to draw. They come from calibration and from a budget."));
  section.append(h("div", { class: "pictures" }, pictures.map((picture) => h("figure", { class: "card" }, h("h3", {}, picture.title), draw[picture.kind](picture), h("figcaption", {}, [picture.unit, picture.caption].filter(Boolean).join(". "))))));
  return section;
}

const draw = { heatmap, points, bars, images };

function heatmap({ title, rows, columns, values, short }) {
  const flat = values.flat().filter((value) => value !== null);
  const words = flat.some((value) => typeof value === "string");
  const kinds = [...new Set(flat)];
  const [low, high] = [Math.min(...flat), Math.max(...flat)];
  const digits = flat.every(Number.isInteger) ? 0 : high - low < 0.05 ? 4 : 2;
  const shown = (value) => (short ? `${(100 * value).toFixed(2)}%` : value.toFixed(digits));
  const cell = (value) => {
    if (value === null) return h("td", {});
    if (words) return h("td", { class: "category", style: `border-color:var(--s${kinds.indexOf(value) % 6})` }, value);
    const t = high > low ? (value - low) / (high - low) : 0.5;
    return h("td", { style: `background:color-mix(in srgb, rgb(var(--heat-high)) ${Math.round(100 * t)}%, rgb(var(--heat-low)));color:${t > 0.55 ? "var(--page)" : "var(--text)"}` }, shown(value));
  };
  return h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": title }, h("table", { class: "heat" },
    h("thead", {}, h("tr", {}, h("td", {}), columns.map((name) => h("th", { scope: "col" }, name)))),
    h("tbody", {}, rows.map((name, i) => h("tr", {}, h("th", { scope: "row" }, name), values[i].map(cell))))));
}

const [W, H, LEFT, BOTTOM, TOP, RIGHT] = [460, 280, 58, 40, 12, 12];

/** Values of an axis: five even ones, written short. */
function scale(low, high, from, to) {
  if (low === high) [low, high] = [low - (Math.abs(low) || 1) / 2, high + (Math.abs(high) || 1) / 2];
  const step = nice((high - low) / 4);
  const first = Math.floor(low / step) * step;
  const last = Math.ceil(high / step - 1e-9) * step;
  const ticks = Array.from({ length: Math.round((last - first) / step) + 1 }, (_, k) => +(first + k * step).toPrecision(6));
  return { at: (value) => from + ((value - first) / (last - first)) * (to - from), ticks };
}

function nice(step) {
  const power = 10 ** Math.floor(Math.log10(step));
  return ([1, 2, 2.5, 5, 10].find((each) => each * power >= step) ?? 10) * power;
}

function frame(title, x, y, xLabel, yLabel, marks) {
  const text = (value, attributes) => s("text", { class: "soft", ...attributes }, String(value));
  return s("svg", { class: "chart", viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": title },
    y.ticks.map((tick) => [s("line", { class: "axis", x1: LEFT, x2: W - RIGHT, y1: y.at(tick), y2: y.at(tick) }), text(tick, { x: LEFT - 6, y: y.at(tick) + 4, "text-anchor": "end" })]),
    (x?.ticks ?? []).map((tick) => text(tick, { x: x.at(tick), y: H - BOTTOM + 16, "text-anchor": "middle" })),
    text(xLabel, { x: (LEFT + W - RIGHT) / 2, y: H - 6, "text-anchor": "middle" }),
    text(yLabel, { x: 12, y: (TOP + H - BOTTOM) / 2, "text-anchor": "middle", transform: `rotate(-90 12 ${(TOP + H - BOTTOM) / 2})` }), marks);
}

const SHAPES = [(x, y) => `M${x - 4},${y} a4,4 0 1,0 8,0 a4,4 0 1,0 -8,0`, (x, y) => `M${x - 4},${y - 4} h8 v8 h-8 Z`, (x, y) => `M${x},${y - 5} l5,9 h-10 Z`, (x, y) => `M${x},${y - 6} l5,6 l-5,6 l-5,-6 Z`];

function legend(series) {
  const mark = (k) => s("svg", { width: 14, height: 14, "aria-hidden": "true" }, s("path", { d: SHAPES[k % 4](7, 7), style: `fill:var(--s${k % 6})` }));
  return h("ul", { class: "legend" }, series.map((each, k) => h("li", {}, mark(k), ` ${each.name}`)));
}

function points({ title, x, y, series, limit, level }) {
  const all = series.flatMap((each) => each.points);
  const range = (k, extra) => { const list = [...all.map((p) => p[k]), ...(extra === undefined || extra === null ? [] : [extra])]; return [Math.min(...list), Math.max(...list)]; };
  const [sx, sy] = [scale(...range(0, limit), LEFT + 6, W - RIGHT - 6), scale(...range(1, level), H - BOTTOM, TOP)];
  const marks = series.map((each, k) => {
    const colour = `var(--s${k % 6})`;
    const placed = each.points.map((p) => [sx.at(p[0]), sy.at(p[1])]);
    const line = each.line ? s("polyline", { points: placed.map((p) => p.join(",")).join(" "), style: `fill:none;stroke:${colour};stroke-width:2` }) : null;
    const dots = each.line && placed.length > 40 ? null : placed.map(([a, b], i) => s("path", { d: SHAPES[k % 4](a, b), style: `fill:${colour};fill-opacity:0.8` }, s("title", {}, `${each.name}: ${each.points[i].map((v) => +v.toPrecision(4)).join(", ")}`)));
    return [line, dots];
  });
  if (limit !== undefined && limit !== null) marks.push(s("line", { class: "level", x1: sx.at(limit), x2: sx.at(limit), y1: TOP, y2: H - BOTTOM }));
  if (level !== undefined && level !== null) marks.push(s("line", { class: "level", x1: LEFT, x2: W - RIGHT, y1: sy.at(level), y2: sy.at(level) }));
  return h("div", {}, frame(title, sx, sy, x, y, marks), legend(series));
}

function bars({ title, labels, series, unit }) {
  const high = Math.max(...series.flatMap((each) => each.values), 0);
  const y = scale(0, high || 1, H - BOTTOM, TOP);
  const slot = (W - LEFT - RIGHT) / labels.length;
  const wide = (slot * 0.7) / series.length;
  const every = Math.ceil((labels.length * 64) / (W - LEFT));
  const marks = labels.map((name, i) => [
    i % every === 0 ? s("text", { class: "soft", x: LEFT + slot * (i + 0.5), y: H - BOTTOM + 16, "text-anchor": "middle" }, name) : null,
    series.map((each, k) => s("rect", { x: LEFT + slot * i + slot * 0.15 + wide * k, width: wide, y: y.at(each.values[i]), height: y.at(0) - y.at(each.values[i]), style: `fill:var(--s${k % 6})` }, s("title", {}, `${name}, ${each.name}: ${+each.values[i].toPrecision(4)}`))),
  ]);
  return h("div", {}, frame(title, null, y, "", unit, marks), legend(series));
}

function images({ title, rows }) {
  return h("div", {}, rows.map((row) => h("div", {}, h("span", { class: "status" }, row.label), h("div", { class: "strip", tabindex: 0, role: "region", "aria-label": `${title}: ${row.label}` }, row.images.map((image) => h("div", {}, h("img", { src: image.source, alt: `${row.label}, ${image.label}` }), h("span", {}, image.label)))))));
}
