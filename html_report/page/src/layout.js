// Where things are drawn. A group is laid out by dagre in the layers that networkx gave its members; an open group inside
// it is laid out first and takes its place as one box. So opening a module lays out that module and those around it only.

import dagre from "@dagrejs/dagre";
import { short } from "./model.js";

const LINE = 15;
const MOST_PINS = 5;
const MANY_READERS = 5;

let context = null;
const widths = new Map();

function width(text) {
  if (!widths.has(text)) {
    context ??= document.createElement("canvas").getContext("2d");
    context.font = "12px ui-monospace, Menlo, Consolas, 'DejaVu Sans Mono', monospace";
    widths.set(text, context.measureText(text).width);
  }
  return widths.get(text);
}

/** Room for the sign that says that something was added, removed or changed. */
const sign = (status) => (["added", "removed", "changed"].includes(status) ? 18 : 0);

const clip = (text, most) => (text.length > most ? `${text.slice(0, most - 1)}…` : text);

/**
 * Lay out what is to be seen.
 * @param model the phase
 * @param view { open: Set of group ids, status: Map node -> status, counts: by group, row(i): the node as it is drawn,
 *   edges(): [[from, to, status]], kept: an object that stays the same for views that differ in what is open only }
 * @returns the outermost box: { w, h, items, edges } with items that may be open groups themselves
 */
export function layout(model, view) {
  const { kept } = view;
  kept.lifted ??= liftEdges(model, view);
  kept.boxes ??= new Map();
  return box(model, view, kept.lifted, 0);
}

/** The box of a group, as it was laid out before if the same groups in it were open: opening one lays out those around it. */
function box(model, view, lifted, id) {
  const key = `${id} ${[...view.open].filter((other) => model.groups[other].chain.includes(id)).sort((a, b) => a - b)}`;
  const { boxes } = view.kept;
  if (!boxes.has(key)) boxes.set(key, layOut(model, view, lifted, id));
  return boxes.get(key);
}

/** Each edge at the innermost group that holds both ends, between members of it; and where it enters open groups. */
function liftEdges(model, view) {
  const inside = new Map();
  const entering = new Map();
  const chain = (i) => [...model.groups[model.nodes[i].parent].chain.map((id) => -1 - id), i];
  for (const [from, to, status] of view.edges()) {
    const [a, b] = [chain(from), chain(to)];
    let k = 0;
    while (a[k] === b[k]) k++;
    const group = -1 - a[k - 1];
    add(inside, group, `${a[k]} ${b[k]}`, { from: a[k], to: b[k], status });
    for (let j = k; j < b.length - 1; j++) add(entering, -1 - b[j], `${from} ${b[j + 1]}`, { source: from, to: b[j + 1], status });
  }
  return { inside, entering };
}

function add(map, group, key, edge) {
  if (!map.has(group)) map.set(group, new Map());
  const known = map.get(group).get(key);
  if (!known) map.get(group).set(key, { ...edge });
  else if (known.status !== edge.status) known.status = "same";
}

function layOut(model, view, lifted, id) {
  const group = model.groups[id];
  const items = new Map();
  for (const child of group.groups) {
    const counts = view.counts[child];
    const total = counts.same + counts.added + counts.removed + counts.changed;
    if (!total) continue;
    items.set(-1 - child, view.open.has(child) ? openGroup(model, view, lifted, child) : closedGroup(model, view, child, counts, total));
  }
  for (const i of group.nodes) if (view.status.has(i)) items.set(i, nodeBox(model, view, i));
  const edges = [...(lifted.inside.get(id)?.values() ?? [])].filter((edge) => items.has(edge.from) && items.has(edge.to));
  const pins = id ? pinsOf(model, id, lifted.entering.get(id), items) : [];
  for (const pin of pins) {
    items.set(pin.key, pin);
    for (const [to, status] of pin.targets) edges.push({ from: pin.key, to, status });
  }
  return arrange(items, edges);
}

function nodeBox(model, view, i) {
  const node = view.row(i);
  const own = node.module.split(".").slice(-1)[0];
  const name = node.op === "call" ? short(node.target) : node.op === "output" ? "output" : node.op === "state" ? node.target.split(".").slice(-3).join(".") : node.name;
  const home = model.groups[node.parent].path;
  const title = clip(node.op === "call" && node.module !== home && own ? `${own}: ${name}` : name, 34);
  const type = clip(node.type, 34);
  const status = view.status.get(i);
  return { key: i, kind: "node", op: node.op, i, layer: node.layer, title, lines: [type], status, w: Math.max(width(title) + sign(status), width(type) * 0.92, 40) + 26, h: 8 + 2 * LINE };
}

function closedGroup(model, view, id, counts, total) {
  const group = model.groups[id];
  const title = clip(group.label, 38);
  const marks = [["added", "+", counts.added], ["removed", "−", counts.removed], ["changed", "~", counts.changed]].filter((mark) => mark[2]);
  const line = total > 1 ? `${total} nodes` : clip(only(model, view, id), 38);
  const tail = marks.map((mark) => ` ${mark[1]}${mark[2]}`).join("");
  const status = marks.length ? "changed-inside" : "same";
  return { key: -1 - id, kind: "group", id, layer: group.layer, title, lines: [line], marks, status, w: Math.max(width(title) + 40, width(line + tail) * 0.92 + 24), h: 8 + 2 * LINE };
}

/** What the one node of a group is. */
function only(model, view, id) {
  for (const i of model.groups[id].nodes) if (view.status.has(i)) return `${short(view.row(i).target)} ${view.row(i).type}`;
  return "1 node";
}

function openGroup(model, view, lifted, id) {
  const inner = box(model, view, lifted, id);
  const title = clip(model.groups[id].label, 48);
  return { key: -1 - id, kind: "open", id, layer: model.groups[id].layer, title, status: "same", inner, w: Math.max(inner.w + 24, width(title) + 60), h: inner.h + 40 };
}

/** What comes from outside into an open group: one small box a source, or one for all of them where there are many. */
function pinsOf(model, id, entering, items) {
  if (!entering) return [];
  const sources = new Map();
  for (const { source, to, status } of entering.values()) {
    if (!items.has(to)) continue;
    if (!sources.has(source)) sources.set(source, new Map());
    sources.get(source).set(to, status);
  }
  const pin = (key, title, source, targets) => ({ key, kind: "pin", source, title, lines: [], targets, status: "same", layer: null, w: width(title) + 24, h: 8 + LINE });
  const all = [...sources];
  if (all.length <= MOST_PINS) return all.map(([source, targets]) => pin(`pin ${id} ${source}`, clip(`from ${label(model, source)}`, 40), source, targets));
  const targets = new Map();
  for (const [, each] of all) for (const [to, status] of each) targets.set(to, targets.has(to) && targets.get(to) !== status ? "same" : status);
  return [pin(`pins ${id}`, `${all.length} values from outside`, null, targets)];
}

export function label(model, i) {
  const node = model.nodes[i];
  if (node.op !== "call") return node.op === "state" ? node.target.split(".").slice(-2).join(".") : node.name;
  const parts = node.module.split(".");
  const own = /^\d+$/.test(parts.at(-1)) ? parts.slice(-2).join(".") : parts.at(-1);
  return own ? `${own}: ${short(node.target)}` : node.name;
}

function arrange(items, edges) {
  const list = [...items.values()];
  const readers = new Map();
  for (const edge of edges) readers.set(edge.from, (readers.get(edge.from) ?? 0) + 1);
  for (const pin of list.filter((item) => item.layer === null)) {
    pin.layer = Math.min(...[...pin.targets.keys()].map((key) => items.get(key).layer ?? 0)) - 1;
  }
  const rank = new Map([...new Set(list.map((item) => item.layer))].sort((a, b) => a - b).map((layer, k) => [layer, k]));
  const graph = new dagre.graphlib.Graph({ multigraph: false });
  graph.setGraph({ ranker: "none", nodesep: 18, ranksep: 26, edgesep: 8, marginx: 12, marginy: 12 });
  graph.setDefaultEdgeLabel(() => ({}));
  for (const item of list) graph.setNode(String(item.key), { width: item.w, height: item.h, rank: 2 * rank.get(item.layer) });
  const drawn = [];
  const hubs = new Map();
  for (const edge of edges) {
    // What everything reads, such as a mask, would cover the picture with lines: its readers are shown when it is chosen.
    if (readers.get(edge.from) > MANY_READERS) hubs.set(edge.from, readers.get(edge.from));
    else if (rank.get(items.get(edge.from).layer) < rank.get(items.get(edge.to).layer)) {
      graph.setEdge(String(edge.from), String(edge.to), {});
      drawn.push(edge);
    }
  }
  dagre.layout(graph);
  for (const item of list) {
    const placed = graph.node(String(item.key));
    item.x = placed.x - item.w / 2;
    item.y = placed.y - item.h / 2;
    item.hub = hubs.get(item.key) ?? 0;
  }
  const lines = drawn.map((edge) => ({ ...edge, points: graph.edge(String(edge.from), String(edge.to)).points }));
  const { width: w = 0, height: h = 0 } = list.length ? graph.graph() : {};
  return { items: list.sort((a, b) => a.y - b.y || a.x - b.x), edges: lines, w: Math.max(w, 60), h: Math.max(h, 30) };
}
