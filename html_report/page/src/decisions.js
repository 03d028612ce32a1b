// The table of decisions: sorted, filtered, with the reasons; and what nearly was a site.

import { h, percent, times, table } from "./dom.js";

const STEP = 25;
const COLUMNS = [
  ["place", "site", (d) => d.place, (d, part) => h("button", { type: "button", class: "link", onclick: () => part.on.reveal(d.site) }, d.place)],
  ["phase", "phase", (d) => d.phase],
  ["method", "method", (d) => d.method],
  ["pass", "pass", (d) => d.pass],
  ["status", "outcome", (d) => d.status, (d) => h("span", { class: d.status }, d.status.replace("_", " "))],
  ["predicted", "predicted share", (d) => d.predicted, (d) => percent(d.predicted)],
  ["measured", "measured speed-up", (d) => d.measured, (d) => times(d.measured)],
  ["local", "error at the site", (d) => d.local, (d) => percent(d.local, 3)],
  ["output", "error of the output", (d) => d.output, (d) => percent(d.output, 3)],
  ["reason", "reason", (d) => d.reason],
];
const NUMBERS = new Set(["predicted", "measured", "local", "output"]);

export class DecisionPart {
  /** @param on { reveal(site) } */
  constructor(data, on) {
    this.data = data;
    this.on = on;
    this.sort = { key: null, down: false };
    this.shown = STEP;
    this.element = h("section", { id: "decisions", "aria-labelledby": "decisions-title" }, h("h2", { id: "decisions-title" }, "Decisions"));
    if (data.decisions.length) this.build();
    else this.element.append(h("p", {}, "There are none: no method was asked for. ", h("code", {}, "gw.optimize(model, methods=[gw.Int8()], calibration=batches)"), " makes some."));
    this.element.append(...this.near());
  }

  build() {
    const values = (key) => [...new Set(this.data.decisions.map((d) => d[key]).filter(Boolean))];
    const choice = (key, label) => h("label", {}, label, h("select", { id: `filter-${key}`, onchange: (event) => this.filter(key, event.target.value) }, h("option", { value: "" }, "all"), values(key).map((value) => h("option", { value }, value.replace("_", " ")))));
    this.filters = {};
    this.body = h("tbody");
    this.count = h("p", { class: "status", role: "status" });
    this.more = h("button", { type: "button", onclick: () => { this.shown *= 4; this.draw(); } }, "Show more");
    this.text = h("input", { type: "search", id: "filter-text", placeholder: "site or reason", oninput: (event) => this.filter("text", event.target.value.toLowerCase()) });
    this.heads = new Map(COLUMNS.map(([key, title]) => [key, h("th", { scope: "col", class: NUMBERS.has(key) ? "number" : null }, h("button", { type: "button", onclick: () => this.order(key) }, title))]));
    this.element.append(
      h("div", { class: "bar" }, h("label", { for: "filter-text" }, "Filter", this.text), choice("status", "Outcome"), choice("phase", "Phase"), choice("method", "Method"), choice("pass", "Pass")),
      this.count,
      h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Table of decisions" }, h("table", { class: "decisions" }, h("thead", {}, h("tr", {}, [...this.heads.values()])), this.body)),
      this.more);
    this.draw();
    addEventListener("beforeprint", () => { this.shown = Infinity; this.draw(); });
  }

  filter(key, value) {
    this.filters[key] = value;
    this.shown = STEP;
    this.draw();
  }

  order(key) {
    this.sort = { key, down: this.sort.key === key ? !this.sort.down : NUMBERS.has(key) };
    this.draw();
  }

  /** Show the decisions about one site. */
  only(site) {
    if (!this.body) return;
    this.text.value = site.slice(site.indexOf("/") + 1);
    this.filters = { text: this.text.value.toLowerCase() };
    for (const list of this.element.querySelectorAll("select")) list.value = "";
    this.draw();
    this.element.scrollIntoView();
    this.text.focus({ preventScroll: true });
  }

  draw() {
    const { text = "", ...fields } = this.filters;
    const rows = this.data.decisions.filter((d) => Object.entries(fields).every(([key, value]) => !value || d[key] === value) && (!text || `${d.site} ${d.reason}`.toLowerCase().includes(text)));
    const column = COLUMNS.find(([key]) => key === this.sort.key);
    if (column) {
      const [, , value] = column;
      const missing = (x) => x === null || x === undefined || x === "";
      const compare = (a, b) => (missing(a) || missing(b) ? missing(a) - missing(b) : (a > b) - (a < b) || 0) * (this.sort.down && !missing(a) && !missing(b) ? -1 : 1);
      rows.sort((a, b) => compare(value(a), value(b)));
    }
    for (const [key, head] of this.heads) head.setAttribute("aria-sort", key !== this.sort.key ? "none" : this.sort.down ? "descending" : "ascending");
    const cell = ([key, title, value, show], d) => h("td", { "data-name": title, class: NUMBERS.has(key) ? "number" : key === "place" ? "mono" : null }, show ? show(d, this) : value(d));
    this.body.replaceChildren(...rows.slice(0, this.shown).map((d) => h("tr", {}, COLUMNS.map((each) => cell(each, d)))));
    this.count.textContent = `${rows.length} of ${this.data.decisions.length} decisions` + (rows.length > this.shown ? `, the first ${this.shown} are shown` : "");
    this.more.hidden = rows.length <= this.shown;
  }

  near() {
    const rows = this.data.near.map((miss) => [miss.phase, miss.family, miss.where, miss.count, miss.reason + (miss.nearest ? " (nearest miss)" : ""), miss.source]);
    if (!rows.length) return [];
    return [h("details", {}, h("summary", {}, `What nearly was a site (${rows.length} kinds)`), table(["phase", "family", "at", "how many", "what failed", "source"], rows, { caption: "What nearly was a site" }))];
  }
}
