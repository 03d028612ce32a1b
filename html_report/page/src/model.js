// The graphs of one phase after each pass: the last one and the way back, as Python wrote them (graph_data.py).

const TEXTS = ["op", "target", "args", "type", "module", "source", "trace", "name"];

export class PhaseModel {
  constructor(name, raw, strings) {
    this.name = name;
    this.when = raw.when;
    this.missing = raw.missing;
    this.steps = raw.steps;
    this.canonical = raw.canonical;
    this.groups = raw.groups.map(([label, path, parent, layer], id) => ({ id, label: strings[label], path: strings[path], parent, layer, nodes: [], groups: [], size: 0 }));
    const columns = raw.nodes;
    this.nodes = columns.name.map((_, i) => {
      const node = { i, inputs: columns.inputs[i], weights: columns.weights[i].map((n) => strings[n]), parent: columns.parent[i], layer: columns.layer[i] };
      for (const field of TEXTS) node[field] = strings[columns[field][i]];
      const by = columns.by[i];
      node.by = by ? { pass: strings[by[0]], method: strings[by[1]], sites: by[2].map((k) => strings[k]) } : null;
      return node;
    });
    for (const group of this.groups.slice(1)) this.groups[group.parent].groups.push(group.id);
    for (const node of this.nodes) this.groups[node.parent].nodes.push(node.i);
    for (const group of this.groups) {
      group.chain = [group.id];
      while (group.chain[0]) group.chain.unshift(this.groups[group.chain[0]].parent);
    }
    for (const node of this.nodes) for (const id of this.groups[node.parent].chain) this.groups[id].size++;
    this.last = raw.last;
    this.strings = strings;
    this.states = new Map();
    this.differences = new Map();
    this.layouts = new Map();
  }

  /** Where the layouts of one comparison are kept. */
  kept(key) {
    if (!this.layouts.has(key)) this.layouts.set(key, {});
    return this.layouts.get(key);
  }

  get final() {
    return this.steps.length - 1;
  }

  /** The graph after a step: which nodes are there, and what was different in them from what they are at the end. */
  state(step) {
    if (!this.states.has(step)) {
      let alive = new Set(this.last);
      const before = new Map();
      for (let k = this.final; k > step; k--) {
        const { added, removed, before: fields } = this.steps[k];
        for (const i of added) alive.delete(i);
        for (const i of removed) alive.add(i);
        for (const [i, change] of Object.entries(fields)) before.set(+i, { ...before.get(+i), ...this.unpack(change) });
      }
      this.states.set(step, { alive, before });
    }
    return this.states.get(step);
  }

  unpack(change) {
    const fields = {};
    for (const [name, value] of Object.entries(change)) {
      fields[name] = name === "inputs" ? value : name === "weights" ? value.map((n) => this.strings[n]) : this.strings[value];
    }
    return fields;
  }

  /** A node as it was after a step. */
  at(i, step) {
    const before = this.state(step).before.get(i);
    return before ? { ...this.nodes[i], ...before } : this.nodes[i];
  }

  /** From one step to another: for each node "same", "added", "removed" or "changed"; absent ones are left out. */
  difference(from, to) {
    const key = `${from} ${to}`;
    if (!this.differences.has(key)) {
      const [a, b] = [this.state(from), this.state(to)];
      const status = new Map();
      for (const node of this.nodes) {
        const there = [a.alive.has(node.i), b.alive.has(node.i)];
        if (!there[0] && !there[1]) continue;
        status.set(node.i, !there[0] ? "added" : !there[1] ? "removed" : this.differs(node.i, a, b) ? "changed" : "same");
      }
      const counts = this.groups.map(() => ({ same: 0, added: 0, removed: 0, changed: 0 }));
      for (const [i, kind] of status) for (const id of this.groups[this.nodes[i].parent].chain) counts[id][kind]++;
      this.differences.set(key, { status, counts });
    }
    return this.differences.get(key);
  }

  differs(i, a, b) {
    const [x, y] = [a.before.get(i), b.before.get(i)];
    if (x === y) return false;
    const [first, second] = [{ ...this.nodes[i], ...x }, { ...this.nodes[i], ...y }];
    return ["target", "type", "args"].some((field) => first[field] !== second[field]) || String(first.inputs) !== String(second.inputs);
  }

  /** Which passes added, changed and removed a node. */
  story(i) {
    const lines = [];
    for (const [k, step] of this.steps.entries()) {
      if (k === 0) continue;
      if (step.added.includes(i)) lines.push({ k, text: `added by ${step.name}` });
      if (step.removed.includes(i)) lines.push({ k, text: `removed by ${step.name}` });
      if (step.before[i]) lines.push({ k, text: `changed by ${step.name}: ${Object.keys(step.before[i]).join(", ")}` });
    }
    return lines;
  }

  /** Nodes and groups whose name, operator, module path or weights contain a text. */
  search(text, limit = 60) {
    const wanted = text.toLowerCase();
    const found = [];
    for (const group of this.groups) {
      if (group.id && group.path.toLowerCase().includes(wanted) && !group.label.includes("…")) found.push({ group: group.id, text: group.path });
      if (found.length >= limit / 3) break;
    }
    for (const node of this.nodes) {
      if (found.length >= limit) break;
      const place = [node.name, node.target, node.module, ...node.weights].find((each) => each.toLowerCase().includes(wanted));
      if (place === undefined) continue;
      const extra = place === node.name || place === node.target ? node.module : place === node.module ? "" : place;
      found.push({ node: node.i, text: [node.name, short(node.target), place === node.module ? node.module : extra].filter(Boolean).join("  ") });
    }
    return found;
  }
}

/** `aten.linear.default` to `linear`, `graphwright.int8_linear.default` to `int8_linear`. */
export function short(target) {
  const parts = target.split(".");
  return parts.length >= 3 && /^(aten|prims|graphwright)$/.test(parts[0]) ? parts[1] : target.replace(/^<built-in function (\w+)>$/, "$1").replace(/^<function (\w+) .*>$/, "$1");
}
