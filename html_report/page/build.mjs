// Bundles src/ and the libraries into ../assets/page.min.js, and writes their licences beside it.
// `node build.mjs --check` fails where what is there is not what would be built.

import { readFileSync, readdirSync, writeFileSync } from "node:fs";
import { createHash } from "node:crypto";
import { build } from "esbuild";

const here = new URL(".", import.meta.url);
const assets = new URL("../assets/", here);
const sources = readdirSync(new URL("src/", here)).sort();
const hash = createHash("sha256");
for (const name of [...sources.map((each) => `src/${each}`), "package-lock.json"]) hash.update(readFileSync(new URL(name, here)));

const result = await build({
  absWorkingDir: here.pathname,
  entryPoints: ["src/main.js"],
  bundle: true,
  minify: true,
  format: "iife",
  target: "es2022",
  charset: "ascii",
  legalComments: "none",
  metafile: true,
  write: false,
});
const packages = new Set();
for (const input of Object.keys(result.metafile.inputs)) {
  const found = input.match(/node_modules\/((?:@[^/]+\/)?[^/]+)\//);
  if (found) packages.add(found[1]);
}
const licences = [...packages].sort().map((name) => {
  const folder = new URL(`node_modules/${name}/`, here);
  const { version, license, homepage } = JSON.parse(readFileSync(new URL("package.json", folder)));
  return `${name} ${version}, ${license}, ${homepage ?? ""}\n\n${readFileSync(new URL("LICENSE", folder), "utf8").trim()}\n`;
});
const names = [...packages].sort().join(", ");
const code = `/* graphwright page, sources ${hash.digest("hex").slice(0, 16)}; with ${names}: see LICENCES.txt */\n${result.outputFiles[0].text.replaceAll("</script", "<\\/script")}`;
const text = `The page holds these libraries:\n\n${licences.join(`\n${"-".repeat(80)}\n\n`)}`;
for (const [name, content] of [["page.min.js", code], ["LICENCES.txt", text]]) {
  const file = new URL(name, assets);
  if (!process.argv.includes("--check")) writeFileSync(file, content);
  else if (readFileSync(file, "utf8") !== content) throw new Error(`${name} is not what the sources make: run npm run build`);
}
console.log(`page.min.js ${(code.length / 1024).toFixed(0)} kB with ${names}`);
