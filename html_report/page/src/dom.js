// Elements with text, never markup: names from a model are shown as they are.

/** An element. Attributes that begin with "on" are listeners; `null` and `false` leave an attribute out. */
export function h(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

/** The same in SVG. */
export function s(tag, attributes = {}, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat(3).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

/** A labelled table; numbers are set to the right. */
export function table(columns, rows, { caption, className } = {}) {
  const numeric = columns.map((_, i) => rows.length > 0 && rows.every((row) => typeof row[i] === "number" || /^-?$|^[\d.]+(e[+-]\d+| s| MB|x|%)?$/.test(row[i])));
  const cell = (tag, value, i, extra = {}) => h(tag, { class: numeric[i] ? "number" : null, ...extra }, value instanceof Node ? value : String(value ?? ""));
  return h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": caption ?? columns.join(", ") },
    h("table", { class: className },
      h("thead", {}, h("tr", {}, columns.map((name, i) => cell("th", name, i, { scope: "col" })))),
      h("tbody", {}, rows.map((row) => h("tr", {}, row.map((value, i) => cell("td", value, i)))))));
}

export const percent = (value, digits = 2) => (value === null || value === undefined ? "" : `${(100 * value).toFixed(digits)}%`);
export const times = (value) => (value === null || value === undefined ? "" : `${value.toFixed(2)}x`);
export const seconds = (value) => (value === null || value === undefined ? "" : `${value.toFixed(value < 1 ? 3 : 1)} s`);
