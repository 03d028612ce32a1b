// What is known of one node: shape, place, neighbours, the pass and decision that made it, its stack trace.

import { h, percent, times } from "./dom.js";
import { label } from "./layout.js";

export class Details {
  /** @param on { jump(node), step(k), decision(site) } */
  constructor(data, on) {
    this.on = on;
    this.decisions = new Map();
    for (const decision of data.decisions) this.decisions.set(decision.site, [...(this.decisions.get(decision.site) ?? []), decision]);
    this.element = h("aside", { class: "details", "aria-label": "Details", "aria-live": "polite", tabindex: 0 });
  }

  empty(model) {
    const { groups, nodes } = model;
    this.element.replaceChildren(h("h3", {}, "Nothing chosen"),
      h("p", {}, `The phase ${model.name} runs when ${model.when}. Over all passes it had ${nodes.length} nodes in ${groups.length - 1} groups. Choose a box to see its shape, source line, decision and stack trace.`));
  }

  show(model, i, step) {
    const alive = model.state(step).alive.has(i);
    const node = model.at(i, step);
    const readers = model.nodes.filter((other) => model.state(step).alive.has(other.i) && model.at(other.i, step).inputs.includes(i));
    const rows = [
      ["operator", code(node.target)], ["type", code(node.type)], ["module", node.module && code(node.module)], ["source", node.source && code(node.source)],
      ["arguments", node.args && code(node.args)], ["weights", node.weights.length > 0 && node.weights.map((name) => h("div", {}, code(name)))],
      ["now", !alive && "not in the graph at this pass"],
    ].filter((row) => row[1]);
    this.element.replaceChildren(h("h3", {}, code(node.name)),
      h("dl", {}, rows.map(([name, value]) => [h("dt", {}, name), h("dd", {}, value)])),
      ...this.made(model, i, node),
      ...this.links("Reads", model, node.inputs.map((k) => model.nodes[k])),
      ...this.links("Read by", model, readers),
      node.trace ? h("details", {}, h("summary", {}, "Stack trace"), h("pre", { tabindex: 0 }, node.trace)) : h("p", { class: "status" }, "No stack trace was kept."));
  }

  made(model, i, node) {
    const story = model.story(i);
    const parts = [h("h3", {}, "Where it comes from")];
    if (node.by) parts.push(h("p", {}, `Made by ${node.by.pass}${node.by.method ? ` as ${node.by.method} decided` : ""}.`));
    if (story.length) parts.push(h("ul", {}, story.map(({ k, text }) => h("li", {}, h("button", { type: "button", class: "link", onclick: () => this.on.step(k) }, text)))));
    else if (!node.by) parts.push(h("p", {}, "In the graph as it was captured."));
    const sites = node.by?.sites.length ? node.by.sites : [this.siteOf(model, node)];
    for (const decision of sites.flatMap((site) => this.decisions.get(site) ?? [])) parts.push(this.decision(decision));
    return parts;
  }

  /** The decision about what stood in a node's place: a removed linear was replaced at its own module. */
  siteOf(model, node) {
    if (node.op !== "call" || !node.module) return "";
    const prefix = `${model.name}/${node.module}/`;
    const kind = /linear|addmm/.test(node.target) ? "linear" : /attention/.test(node.target) ? "attention" : "";
    return kind ? [...this.decisions.keys()].find((site) => site.startsWith(`${prefix}${kind}[`)) ?? "" : "";
  }

  decision(decision) {
    const figures = [["predicted", percent(decision.predicted)], ["speed-up", times(decision.measured)], ["error at the site", percent(decision.local, 3)], ["error of the output", percent(decision.output, 3)]].filter((row) => row[1]);
    return h("div", { class: "card" },
      h("h3", {}, h("span", { class: decision.status }, decision.status.replace("_", " ")), ` ${decision.method}: ${decision.pass || "no pass"}`),
      decision.reason && h("p", {}, decision.reason),
      h("dl", {}, [...figures, ...Object.entries(decision.options)].map(([name, value]) => [h("dt", {}, name), h("dd", { class: "mono" }, String(value).slice(0, 80) + (String(value).length > 80 ? "…" : ""))])),
      h("button", { type: "button", class: "link", onclick: () => this.on.decision(decision.site) }, "Show in the table"));
  }

  links(title, model, nodes) {
    if (!nodes.length) return [];
    const item = (node) => h("li", {}, h("button", { type: "button", class: "link", onclick: () => this.on.jump(node.i) }, label(model, node.i)), ` ${node.type}`);
    const more = nodes.length > 30 ? h("li", {}, `and ${nodes.length - 30} more`) : null;
    return [h("h3", {}, `${title} (${nodes.length})`), h("ul", {}, nodes.slice(0, 30).map(item), more)];
  }
}

const code = (text) => h("code", {}, text);
