// The part of the page with the graph: phase, slider over passes, comparison, search, drawing, details of a node.

import { h, seconds } from "./dom.js";
import { PhaseModel } from "./model.js";
import { Canvas } from "./canvas.js";
import { layout } from "./layout.js";
import { Details } from "./details.js";

export class GraphPart {
  constructor(data, on) {
    this.models = Object.entries(data.phases).map(([name, raw]) => () => new PhaseModel(name, raw, data.strings));
    this.names = Object.keys(data.phases);
    this.details = new Details(data, { jump: (i) => this.reveal({ node: i }), step: (k) => this.setStep(k), decision: on.decision });
    const handlers = { toggle: (id) => this.toggle(id), choose: (i) => this.choose(i), jump: (i) => this.reveal({ node: i }), moved: (t, from) => this.follow(t, from) };
    this.left = new Canvas("before", handlers);
    this.right = new Canvas("graph", handlers);
    this.element = this.build();
    this.open = new Set();
  }

  build() {
    const choice = (name, label, options, act) => {
      const list = h("select", { id: name, onchange: (event) => act(event.target.value) }, options.map(([value, text]) => h("option", { value }, text)));
      return [h("label", { for: name }, label, list), list];
    };
    const [phase, phaseList] = choice("phase", "Phase", this.names.map((name) => [name, name]), (name) => this.setPhase(name));
    const [compare, compareList] = choice("compare", "Compare with", [], () => this.redraw());
    const [view, viewList] = choice("view", "Show", [["over", "overlaid"], ["beside", "side by side"], ["after", "this graph only"]], () => this.setView());
    Object.assign(this, { phaseList, compareList, viewList });
    this.slider = h("input", { type: "range", id: "step", min: 0, step: 1, oninput: (event) => this.setStep(+event.target.value) });
    this.stepText = h("output", { for: "step", class: "mono" });
    this.status = h("p", { class: "status", role: "status" });
    this.hits = h("ul", { hidden: true, "aria-label": "What was found" });
    this.query = h("input", { type: "search", id: "search", placeholder: "module, operator or weight", "aria-label": "Search the graph", autocomplete: "off", oninput: () => this.search(), onkeydown: (event) => event.key === "Escape" && this.clearSearch() });
    this.canvases = h("div", { class: "canvases" }, this.left.element, this.right.element);
    const legend = [["added", "+ added"], ["removed", "− removed"], ["changed", "~ changed"]];
    return h("section", { id: "graph", "aria-labelledby": "graph-title" },
      h("h2", { id: "graph-title" }, "Graph"),
      h("div", { class: "bar" }, phase, compare, view, h("div", { class: "found" }, this.query, this.hits), h("button", { type: "button", onclick: () => this.collapse() }, "Close all modules")),
      h("div", { class: "bar" }, h("label", { class: "grow", for: "step" }, "After pass", this.slider), this.stepText),
      this.status,
      h("div", { class: "work" }, this.canvases, this.details.element),
      h("ul", { class: "legend" }, legend.map(([kind, text]) => h("li", {}, h("i", { class: kind }), text)), h("li", {}, "A box with ▸ opens. Drag to move; ctrl and wheel, or + and −, to zoom. Keys: arrows, Enter, Escape.")));
  }

  start() {
    this.setPhase(this.names[0]);
    new ResizeObserver(() => this.right.svg.clientWidth !== this.width && this.settle()).observe(this.right.svg);
  }

  settle() {
    const first = !this.width;
    this.width = this.right.svg.clientWidth;
    if (first || !this.right.root) this.right.start();
  }

  setPhase(name) {
    const at = this.names.indexOf(name);
    if (typeof this.models[at] === "function") this.models[at] = this.models[at]();
    this.model = this.models[at];
    this.phaseList.value = name;
    this.open = this.defaultOpen();
    this.chosen = null;
    this.slider.max = this.model.final;
    this.slider.disabled = this.model.final === 0;
    const options = [["0", this.model.steps[0].name], ["previous", "the pass before"], ["none", "nothing"]];
    if (this.model.canonical > 0 && this.model.canonical < this.model.final) options.unshift([String(this.model.canonical), "canonical"]);
    this.compareList.replaceChildren(...options.map(([value, text]) => h("option", { value }, text)));
    this.setStep(this.model.final);
    this.details.empty(this.model);
    this.right.start();
  }

  /** Modules are closed, but the outermost ones are opened as long as there is little to see. */
  defaultOpen() {
    const open = new Set([0]);
    let shown = this.model.groups[0];
    while (shown.nodes.length + shown.groups.length <= 12) {
      const largest = shown.groups.map((id) => this.model.groups[id]).sort((a, b) => b.size - a.size)[0];
      if (!largest || largest.size < this.model.groups[0].size / 2) break;
      open.add(largest.id);
      shown = largest;
    }
    return open;
  }

  setStep(k) {
    this.step = k;
    this.slider.value = k;
    const step = this.model.steps[k];
    const parts = [`${k} of ${this.model.final}: ${step.name}`];
    if (k) parts.push(`${step.phase === "captured" ? "all phases" : step.phase}, ${step.changed} rewrites, ${step.nodes[0]} → ${step.nodes[1]} nodes, ${seconds(step.seconds)}`);
    else parts.push(`${step.calls} calls`);
    this.stepText.value = parts.join(" · ");
    this.slider.setAttribute("aria-valuetext", parts.join(", "));
    this.redraw();
  }

  setView() {
    this.redraw();
    if (this.chosen !== null) this.centre(this.visible(this.chosen));
    else this.right.start();
    if (this.viewList.value === "beside") this.left.move(this.right.transform());
  }

  centre(key) {
    this.canvas(key).show(key, true);
  }

  base() {
    const value = this.compareList.value;
    if (value === "previous") return Math.max(this.step - 1, 0);
    return value === "none" || value === "" ? this.step : Math.min(+value, this.step);
  }

  toggle(id) {
    if (this.open.has(id)) this.open.delete(id);
    else this.open.add(id);
    const started = performance.now();
    this.redraw();
    this.canvas(-1 - id).reach(-1 - id);
    this.status.dataset.milliseconds = (performance.now() - started).toFixed(1);
  }

  collapse() {
    this.open = this.defaultOpen();
    this.redraw();
    this.right.start();
  }

  /** The drawing that has a box; where both have it, that of the graph after the pass. */
  canvas(key) {
    return this.right.places.has(key) || !this.left.places.has(key) ? this.right : this.left;
  }

  choose(i) {
    this.chosen = i;
    if (i === null) this.details.empty(this.model);
    else this.details.show(this.model, i, this.step);
    this.redraw();
    if (i !== null) this.canvas(i).places.get(i)?.element.focus({ preventScroll: true });
  }

  /** Open what hides a node or group, choose it and bring it into view. */
  reveal({ node, group }) {
    const chain = node === undefined ? this.model.groups[group].chain : this.model.groups[this.model.nodes[node].parent].chain;
    for (const id of chain) this.open.add(id);
    if (node !== undefined && !this.model.state(this.step).alive.has(node) && !this.model.state(this.base()).alive.has(node)) this.showStepOf(node);
    if (node === undefined) this.redraw();
    else this.choose(node);
    this.centre(node ?? -1 - group);
  }

  /** Move the slider to the last pass after which a node is there. */
  showStepOf(node) {
    for (let k = this.model.final; k >= 0; k--) if (this.model.state(k).alive.has(node)) return this.setStep(k);
  }

  /** Choose the node that a decision made, or else one at its module. */
  revealSite(site) {
    const [phase] = site.split("/");
    const place = site.slice(phase.length + 1).replace(/\/[^/]*$/, "");
    if (this.names.includes(phase) && this.model.name !== phase) this.setPhase(phase);
    const made = this.model.nodes.filter((node) => node.by?.sites.includes(site)).at(-1) ?? this.model.nodes.filter((node) => node.module === place).at(-1);
    if (made) this.reveal({ node: made.i });
    return Boolean(made);
  }

  search() {
    const text = this.query.value.trim();
    this.hits.hidden = !text;
    if (!text) return;
    const found = this.model.search(text);
    const choose = (hit) => { this.clearSearch(); this.reveal(hit); };
    this.hits.replaceChildren(...(found.length ? found.map((hit) => h("li", {}, h("button", { type: "button", onclick: () => choose(hit) }, hit.text))) : [h("li", {}, "Nothing of that name.")]));
  }

  clearSearch() {
    this.hits.hidden = true;
    this.query.value = "";
  }

  redraw() {
    const base = this.base();
    const { status, counts } = this.model.difference(base, this.step);
    const mode = base === this.step ? "after" : this.viewList.value;
    const beside = mode === "beside";
    this.left.element.style.display = beside ? "" : "none";
    this.right.heading.textContent = `after ${this.model.steps[this.step].name}`;
    this.left.heading.textContent = `after ${this.model.steps[base].name}`;
    const near = this.neighbours();
    // Side by side, both have the places of the overlaid drawing, so that what corresponds stands at the same height.
    const drawn = mode === "after" ? this.layout(this.step, this.step, only(status, "removed"), counts, "removed") : this.layout(base, this.step, status, counts, "");
    if (beside) this.left.draw(drawn, this.chosen, near, "added");
    this.right.draw(drawn, this.chosen, near, beside ? "removed" : "");
    const all = counts[0];
    const text = base === this.step ? `${all.same} nodes` : `${all.added} nodes added, ${all.removed} removed, ${all.changed} changed, ${all.same} as they were, compared with ${this.compareList.selectedOptions[0].text}`;
    this.status.textContent = this.model.missing || text;
    if (beside) this.left.move(this.right.transform());
  }

  layout(from, to, status, counts, without) {
    const view = { open: this.open, status, counts: without ? counts.map((each) => ({ ...each, [without]: 0 })) : counts, row: (i) => this.model.at(i, status.get(i) === "removed" ? from : to), edges: () => this.edges(from, to, status), kept: this.model.kept(`${from} ${to} ${without}`) };
    return layout(this.model, view);
  }

  edges(from, to, status) {
    const edges = new Map();
    for (const i of status.keys()) {
      const before = status.get(i) === "added" ? [] : this.model.at(i, from).inputs;
      const after = status.get(i) === "removed" ? [] : this.model.at(i, to).inputs;
      for (const source of new Set([...before, ...after])) {
        if (!status.has(source) || source === i) continue;
        const kind = from === to ? "same" : !before.includes(source) ? "added" : !after.includes(source) ? "removed" : "same";
        edges.set(`${source} ${i}`, [source, i, kind]);
      }
    }
    return [...edges.values()];
  }

  /** Boxes that read the chosen node or that it reads, as they are drawn now. */
  neighbours() {
    if (this.chosen === null) return new Set();
    const near = [...this.model.at(this.chosen, this.step).inputs];
    for (const i of this.model.state(this.step).alive) if (this.model.at(i, this.step).inputs.includes(this.chosen)) near.push(i);
    return new Set(near.map((i) => this.visible(i)));
  }

  /** The innermost box that stands for a node: itself, or the closed group that it is in. */
  visible(i) {
    const closed = this.model.groups[this.model.nodes[i].parent].chain.find((id) => id && !this.open.has(id));
    return closed === undefined ? i : -1 - closed;
  }

  follow(transform, from) {
    const other = from === this.left ? this.right : this.left;
    if (this.viewList.value === "beside") other.move(transform);
  }
}

function only(status, without) {
  return new Map([...status].filter(([, kind]) => kind !== without));
}
