// Puts the page together from the data that Python wrote into it.

import { h } from "./dom.js";
import { GraphPart } from "./graph.js";
import { DecisionPart } from "./decisions.js";
import { picturePart } from "./pictures.js";
import { passPart, summaryPart } from "./summary.js";

const data = JSON.parse(document.getElementById("data").textContent);

const root = document.documentElement;
const button = document.getElementById("theme");
function setTheme(theme) {
  root.dataset.theme = theme;
  button.textContent = theme === "dark" ? "light" : "dark";
}
const dark = matchMedia("(prefers-color-scheme: dark)");
setTheme(dark.matches ? "dark" : "light");
dark.addEventListener("change", () => setTheme(dark.matches ? "dark" : "light"));
button.addEventListener("click", () => setTheme(root.dataset.theme === "dark" ? "light" : "dark"));

const graph = new GraphPart(data, { decision: (site) => decisions.only(site) });
const decisions = new DecisionPart(data, {
  reveal: (site) => { if (graph.revealSite(site)) graph.element.scrollIntoView(); },
});
const parts = [summaryPart(data), graph.element, decisions.element, picturePart(data.pictures), passPart(data)];
const main = document.getElementById("main");
main.replaceChildren(...parts);
for (const part of parts) document.querySelector(".top nav").append(h("a", { href: `#${part.id}` }, part.querySelector("h2").textContent));
graph.start();
root.dataset.ready = "true";
