// The top of the page, and the table of passes.

import { h, table, seconds } from "./dom.js";

export function summaryPart(data) {
  const { summary } = data;
  const pairs = (rows) => h("dl", {}, rows.map(([name, value]) => [h("dt", {}, name), h("dd", {}, String(value))]));
  const card = (title, ...content) => h("div", { class: "card" }, h("h3", {}, title), content);
  const outcome = Object.entries(summary.counts).map(([status, count]) => `${count} ${status.replace("_", " ")}`).join(", ") || "none";
  const cards = [
    card("Program", pairs([["kind", summary.kind], ["target", summary.target], ["decisions", outcome], ...Object.entries(summary.seconds).map(([name, value]) => [`time to ${name}`, seconds(value)])])),
    card("Methods", summary.methods.length ? summary.methods.map((method) => h("p", {}, h("strong", {}, method.name), " ", h("code", {}, method.options))) : h("p", {}, "None: this is the canonical program.")),
    card("Made with", Object.keys(summary.versions).length ? pairs(Object.entries(summary.versions)) : h("p", {}, "Not noted.")),
  ];
  if (summary.missing.length) {
    cards.push(h("div", { class: "card missing" }, h("h3", {}, "Not known"), summary.missing.map((each) => [h("p", {}, each.what, " To get it: ", h("code", {}, each.how))])));
  }
  const phases = summary.phases.map((phase) => [phase.name, phase.when, phase.calls, ...Object.values(phase.sites)]);
  return h("section", { id: "summary", "aria-labelledby": "summary-title" }, h("h2", { id: "summary-title" }, "Summary"),
    h("div", { class: "cards" }, cards),
    h("h3", {}, "Before and after"),
    table(["", "before", "after", "note"], summary.figures.map((row) => [row.name, row.before, row.after, row.note]), { caption: "Before and after" }),
    h("h3", {}, "Phases"),
    table(["phase", "when", "calls", "attention", "linear", "cache", "norm"], phases, { caption: "Phases" }));
}

export function passPart(data) {
  const rows = [];
  const seen = new Set();
  for (const phase of Object.values(data.phases)) {
    for (const step of phase.steps.slice(1)) {
      const key = `${step.phase} ${step.name} ${step.nodes}`;
      if (step.phase === "captured" && seen.has(key)) continue;
      seen.add(key);
      rows.push([step.phase, step.name, step.changed, step.nodes[0], step.nodes[1], seconds(step.seconds), seconds(step.verify), step.difference === null ? "-" : step.difference.toExponential(1)]);
    }
  }
  const missing = Object.values(data.phases).find((phase) => phase.missing)?.missing;
  return h("section", { id: "passes", "aria-labelledby": "passes-title" }, h("h2", { id: "passes-title" }, "Passes"),
    missing && h("p", {}, missing),
    rows.length ? table(["phase", "pass", "rewrites", "nodes before", "after", "time", "check", "largest difference"], rows, { caption: "Passes" }) : h("p", {}, "No pass changed anything that was kept."));
}
