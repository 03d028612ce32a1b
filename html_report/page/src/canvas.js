// One drawing of a graph: boxes, lines, zoom, keys. It draws what layout.js placed and reports what the reader does.

import { select } from "d3-selection";
import { zoom, zoomIdentity } from "d3-zoom";
import { s, h } from "./dom.js";

let count = 0;
const MARK = { added: "+ ", removed: "− ", changed: "~ " };

export class Canvas {
  /** @param on { toggle(group), choose(node), jump(node), moved(transform, canvas) } */
  constructor(title, on) {
    this.on = on;
    this.arrow = `arrow${count++}`;
    this.svg = s("svg", { role: "group", "aria-label": title, tabindex: -1 });
    this.layer = s("g");
    this.svg.append(s("defs", {}, s("marker", { id: this.arrow, viewBox: "0 0 8 8", refX: 7, refY: 4, markerWidth: 8, markerHeight: 8, markerUnits: "userSpaceOnUse", orient: "auto" }, s("path", { d: "M0,1 L7,4 L0,7 Z" }))), this.layer);
    this.heading = h("h3", {}, title);
    const button = (text, name, act) => h("button", { type: "button", "aria-label": name, onclick: act }, text);
    this.element = h("div", { class: "canvas" }, this.svg, this.heading,
      h("div", { class: "zoom" }, button("+", "Zoom in", () => this.scale(1.4)), button("−", "Zoom out", () => this.scale(1 / 1.4)), button("Fit", "Fit the whole graph", () => this.fit())));
    this.zoom = zoom().scaleExtent([0.05, 4])
      .filter((event) => (event.type === "wheel" ? event.ctrlKey || event.metaKey || event.shiftKey || this.focused : !event.button))
      .on("zoom", (event) => {
        this.layer.setAttribute("transform", event.transform);
        if (event.sourceEvent) this.on.moved(event.transform, this);
      });
    select(this.svg).call(this.zoom).on("dblclick.zoom", null);
    this.svg.addEventListener("pointerdown", () => { this.focused = true; });
    this.element.addEventListener("pointerleave", () => { this.focused = false; });
    this.svg.addEventListener("keydown", (event) => this.key(event));
    this.places = new Map();
  }

  /** @param hidden the status of what is left out of this drawing: "added", "removed" or "" */
  draw(root, chosen, near, hidden = "") {
    this.root = root;
    this.hidden = hidden;
    this.places = new Map();
    this.order = [];
    const content = s("g");
    this.drawBox(content, root, 0, 0, chosen, near);
    this.layer.replaceChildren(content);
    const first = this.places.get(chosen) ?? this.places.get(this.order[0]);
    if (first) first.element.setAttribute("tabindex", 0);
  }

  drawBox(parent, box, left, top, chosen, near) {
    const hidden = new Set(box.items.filter((item) => item.status === this.hidden).map((item) => item.key));
    for (const edge of box.edges) {
      if (edge.status === this.hidden || hidden.has(edge.from) || hidden.has(edge.to)) continue;
      const close = edge.from === chosen || edge.to === chosen;
      parent.append(s("path", { class: `edge ${edge.status} ${close ? "near" : ""}`, d: path(edge.points, left, top), "marker-end": `url(#${this.arrow})` }));
    }
    for (const item of box.items) {
      if (hidden.has(item.key)) continue;
      const [x, y] = [left + item.x, top + item.y];
      const element = this.drawItem(item, x, y, chosen, near);
      parent.append(element);
      this.places.set(item.key, { item, x, y, element });
      this.order.push(item.key);
      if (item.kind === "open") this.drawBox(parent, item.inner, x + (item.w - item.inner.w) / 2, y + 32, chosen, near);
    }
  }

  drawItem(item, x, y, chosen, near) {
    const classes = ["node", item.kind === "open" ? "open" : item.kind, item.op && item.op !== "call" ? "io" : "", item.status, item.key === chosen ? "selected" : ""];
    const act = (event) => {
      event.stopPropagation();
      if (item.kind === "node") this.on.choose(item.i);
      else if (item.kind === "pin") item.source !== null && this.on.jump(item.source);
      else this.on.toggle(item.id);
    };
    const mark = MARK[item.status];
    const title = s("text", { x: 12, y: 17 }, mark ? s("tspan", { class: "mark" }, mark) : null, item.kind === "group" ? "▸ " : item.kind === "open" ? "▾ " : "", item.title, " ");
    const lines = (item.lines ?? []).map((line, k) => s("text", { class: "soft", x: 12, y: 32 + 15 * k }, line, (item.marks ?? []).map((each) => s("tspan", { class: `mark ${each[0]}` }, ` ${each[1]}${each[2]}`)),
      item.hub ? s("tspan", {}, `  read by ${item.hub}`) : null));
    const highlight = near?.has(item.key) ? s("rect", { x: -3, y: -3, width: item.w + 6, height: item.h + 6, rx: 8, style: "fill:none;stroke:var(--accent);stroke-width:1.6" }) : null;
    return s("g", { class: classes.join(" "), transform: `translate(${x},${y})`, tabindex: -1, role: "button", "aria-description": describe(item), "aria-expanded": item.kind === "group" ? "false" : item.kind === "open" ? "true" : null, "data-key": item.key, onclick: act, onfocus: () => this.focus(item.key) },
      s("rect", { width: item.w, height: item.h, rx: 6 }), highlight, title, lines);
  }

  focus(key) {
    for (const { element } of this.places.values()) if (element.getAttribute("tabindex") === "0") element.setAttribute("tabindex", -1);
    this.places.get(key)?.element.setAttribute("tabindex", 0);
  }

  key(event) {
    const group = event.target.closest?.("g.node");
    if (!group) return;
    const key = /^-?\d+$/.test(group.dataset.key) ? +group.dataset.key : group.dataset.key;
    const at = this.order.indexOf(key);
    const moves = { ArrowDown: 1, ArrowRight: 1, ArrowUp: -1, ArrowLeft: -1 };
    if (event.key === "Enter" || event.key === " ") group.dispatchEvent(new MouseEvent("click", { bubbles: true }));
    else if (event.key in moves) this.reach(this.order[at + moves[event.key]]);
    else if (event.key === "Home") this.reach(this.order[0]);
    else if (event.key === "End") this.reach(this.order.at(-1));
    else if (event.key === "Escape") this.on.choose(null);
    else return;
    event.preventDefault();
  }

  /** Focus a box, and move the picture if it is outside. */
  reach(key) {
    const place = this.places.get(key);
    if (!place) return;
    this.show(key);
    place.element.focus({ preventScroll: true });
  }

  /** Bring a box into view without changing the scale. */
  show(key, centre = false) {
    const place = this.places.get(key);
    if (!place) return;
    const { clientWidth: w, clientHeight: hgt } = this.svg;
    const t = this.transform();
    const k = centre && t.k < 0.7 ? 1 : t.k;
    const [x, y] = [place.x * k + t.x, place.y * k + t.y];
    const inside = k === t.k && x >= 0 && y >= 0 && x + place.item.w * k <= w && y + Math.min(place.item.h * k, hgt) <= hgt;
    if (inside && !centre) return;
    const height = Math.min(place.item.h * k, hgt - 60);
    this.move(zoomIdentity.translate(w / 2 - (place.x + place.item.w / 2) * k, hgt / 2 - height / 2 - place.y * k).scale(k), true);
  }

  transform() {
    return this.svg.__zoom ?? zoomIdentity;
  }

  move(transform, tell = false) {
    select(this.svg).call(this.zoom.transform, transform);
    if (tell) this.on.moved(transform, this);
  }

  scale(factor) {
    select(this.svg).call(this.zoom.scaleBy, factor);
    this.on.moved(this.transform(), this);
  }

  fit() {
    const { clientWidth: w, clientHeight: hgt } = this.svg;
    if (!this.root || !w) return;
    const k = Math.min(1, (w - 20) / this.root.w, Math.max((hgt - 40) / this.root.h, 0.02));
    this.move(zoomIdentity.translate((w - this.root.w * k) / 2, 30).scale(k), true);
  }

  /** The whole graph where it is readable, else its top. */
  start() {
    const { clientWidth: w, clientHeight: hgt } = this.svg;
    if (!this.root || !w) return;
    const k = Math.min(1, Math.max(0.6, Math.min((w - 20) / this.root.w, (hgt - 44) / this.root.h)));
    this.move(zoomIdentity.translate((w - this.root.w * k) / 2, 34).scale(k));
  }
}

/** What the drawing says by shape and colour, in words. */
function describe(item) {
  const inside = item.marks?.map((mark) => `${mark[2]} ${mark[0]}`).join(", ");
  const kind = item.kind === "group" || item.kind === "open" ? "module" : item.kind === "pin" ? "value from outside" : item.op;
  return [kind, item.status in MARK ? item.status : "", inside].filter(Boolean).join(", ");
}

function path(points, left, top) {
  const at = (p) => `${(p.x + left).toFixed(1)},${(p.y + top).toFixed(1)}`;
  if (points.length < 3) return `M${points.map(at).join(" L")}`;
  let d = `M${at(points[0])}`;
  for (let k = 1; k < points.length - 1; k++) {
    const end = k === points.length - 2 ? points[k + 1] : { x: (points[k].x + points[k + 1].x) / 2, y: (points[k].y + points[k + 1].y) / 2 };
    d += ` Q${at(points[k])} ${at(end)}`;
  }
  return d;
}
