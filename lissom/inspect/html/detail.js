// The right column: an overview, a pass, a module or a node.
const KINDS = {
  capture: "the model as PyTorch runs it",
  rewrite: "exact: outputs must stay equal",
  annotation: "exact: adds information only",
  approximation: "lossy: outputs may change, and are compared with the original model's",
  training: "training: changes weights only",
};
const FIGURES = [["nodes", "", "operator calls"], ["parameters", "", "parameters"], ["bytes", "B", "bytes of weights"], ["FLOPs", "FLOP", "FLOPs"]];
const passName = step => steps[step].spelling.split("{")[0];
const link = (label, target, attributes) => h("button", { class: "link", type: "button", on: { click: () => go(target) }, ...attributes }, label);
const stepLink = step => link(`${step} ${passName(step)}`, { step, from: "prev", node: null, module: null });
const section = (title, ...content) => content.flat(9).some(Boolean) ? h("section", {}, h("h3", {}, title), ...content) : null;
const more = (title, ...content) => h("details", {}, h("summary", {}, title), ...content);

function signs({ added, removed, changed }) {
  return h("span", { class: "signs" },
    added ? h("ins", { title: `${added} added` }, `+${added}`) : null,
    removed ? h("del", { title: `${removed} removed` }, `−${removed}`) : null,
    changed ? h("mark", { title: `${changed} changed` }, `~${changed}`) : null);
}

function sameGraph(step) {
  return step > 0 && steps[step].lines === null || step > 0 && programText(step) === programText(step - 1);
}

// The layers and top modules of a step with what they cost, the costliest first.
function costly(step, heat) {
  const sums = new Map();
  for (const node of program(step).nodes) {
    const parts = node.path ? node.path.split(".") : [];
    const at = parts.findIndex(part => /^\d+$/.test(part));
    const path = parts.slice(0, at >= 0 ? at + 1 : 2).join(".");
    sums.set(path, (sums.get(path) || 0) + HEATS[heat].of(node));
  }
  return [...sums].filter(([, value]) => value > 0).sort((a, b) => b[1] - a[1]);
}

// The step that lowered a figure most: 0 nodes, 1 parameters, 2 bytes, 3 FLOPs.
function bestSaving(figure) {
  let best = null;
  for (let i = 1; i < steps.length; i++) {
    const saved = steps[i - 1].size[figure] - steps[i].size[figure];
    if (saved > 0 && (best === null || saved > best.saved)) best = { step: i, saved };
  }
  return best;
}

function changedModules(step, from) {
  const view = { step, from }, found = [];
  const visit = module => {
    const groups = groupsOf(module, step, from), done = new Set();
    const own = { added: 0, removed: 0, changed: 0 };
    for (const item of module.items) if (item.node && item.status in own) own[item.status]++;
    if (own.added + own.removed + own.changed) found.push({ path: module.path, label: module.path || "the model itself", counts: own });
    for (const item of module.items) {
      if (item.node || !changesOf(item)) continue;
      const group = groups.get(item.name);
      if (group) {
        if (done.has(group)) continue;
        done.add(group);
        found.push({ path: item.path, counts: item.counts, times: group.members.length, label: `${module.path ? `${module.path}.` : ""}${ranges(group.members)}` });
      } else if (item.items.some(entry => entry.node) || /^\d+$/.test(item.name)) {
        found.push({ path: item.path, counts: item.counts, label: item.path });
      } else visit(item);
    }
  };
  visit(modules(view.step, view.from).root);
  return found;
}

function amounts(text) {
  const found = /\{.*?(?:amounts|schemes|patterns)="([^"]*)"/.exec(text || "");
  return found === null ? [] : found[1].split(",").map(item => item.split("="));
}

function overviewPanel() {
  const last = steps.length - 1, heat = hasHeat("time", last) ? "time" : "flops";
  const total = program(last).nodes.reduce((sum, node) => sum + HEATS[heat].of(node), 0);
  const list = costly(last, heat).slice(0, 6).map(([path, value]) => h("li", {},
    link(path || "the model itself", { step: last, from: "none", module: path, node: null, heat }), ` ${percent(value / total)} `, h("small", {}, heatText(heat, value))));
  const savings = [0, 2, 3].map(figure => [figure, bestSaving(figure)]).filter(([, best]) => best !== null);
  return [
    h("h2", {}, "Overview"),
    h("p", {}, "Each entry on the left is a pass. Choose one to see in the middle what it changed: ",
      h("ins", {}, "added"), ", ", h("del", {}, "removed"), " and ", h("mark", {}, "changed"), " nodes. Identical layers are one row."),
    section("Largest savings", h("ul", {}, savings.map(([figure, best]) =>
      h("li", {}, stepLink(best.step), ` −${short(best.saved, FIGURES[figure][1])} ${figure === 0 ? "nodes" : ""}`)))),
    section(`Where the ${heat === "time" ? "time goes" : "FLOPs are"} after the last step`, list.length ? h("ul", {}, list) : null),
    section("Notes", h("ul", {}, steps.flatMap((step, i) => step.notes.map(note => h("li", {}, i > 0 && i < last ? [stepLink(i), ": "] : null, note))))),
    section("Not in this report", data.missing.length ? h("ul", {}, data.missing.map(item => h("li", {}, item))) : null),
    section("Keys", h("p", { class: "keys" }, h("kbd", {}, "↑"), " ", h("kbd", {}, "↓"), " passes, ", h("kbd", {}, "Enter"), " to the program, ",
      h("kbd", {}, "←"), " ", h("kbd", {}, "→"), " close and open a module, ", h("kbd", {}, "/"), " search, ", h("kbd", {}, "Esc"), " back")),
  ];
}

function stepPanel(view) {
  const step = steps[view.step], before = view.step > 0 ? steps[view.step - 1] : null;
  const options = step.spelling.includes("{") ? h("code", { class: "block" }, step.spelling) : null;
  const sizes = FIGURES.map(([, unit, label], i) => h("tr", {}, h("th", { scope: "row" }, label),
    h("td", {}, before ? short(before.size[i], unit) : ""), h("td", {}, short(step.size[i], unit)),
    h("td", { class: before && step.size[i] > before.size[i] ? "more" : "less" }, before ? signed(step.size[i] - before.size[i], unit) : "")));
  const facts = [
    ["error", step.error === null ? null : `${exponent(step.error)} relative, to ${["rewrite", "annotation"].includes(step.kind) ? "the step before" : "the original"}`],
    ["smallest cosine", step.cosine === null ? null : step.cosine.toFixed(5)], ["metric", step.metric],
    ["held-out loss", step.heldOut ? step.heldOut.map(exponent).join(" → ") : null],
    ["seconds", `${step.seconds.toFixed(2)}, and ${step.checked.toFixed(2)} for the checks`],
  ].filter(([, value]) => value !== null);
  const next = steps.findIndex((_, i) => i > view.step && !sameGraph(i));
  const quiet = step.rewritten > 0 && sameGraph(view.step) && !step.reverted;
  const where = before ? changedModules(view.step, view.step - 1) : [];
  const chosen = amounts(step.perSite);
  return [
    h("h2", {}, `${view.step} · ${passName(view.step)}`), options,
    step.about ? h("p", {}, step.about) : null,
    h("p", {}, h("span", { class: `kind ${step.kind}` }, step.kind), ` ${KINDS[step.kind] || ""}`),
    h("p", {}, h("strong", {}, step.summary.split("; skipped")[0])),
    quiet ? h("p", {}, "The graph is the same: only weights changed. ", next > 0 ? ["The next change of the graph is by ", stepLink(next)] : null) : null,
    h("table", {}, h("thead", {}, h("tr", {}, h("td", {}), ["before", "after", "change"].map(item => h("th", { scope: "col" }, item)))), h("tbody", {}, sizes)),
    h("dl", {}, facts.map(([name, value]) => [h("dt", {}, name), h("dd", {}, String(value))])),
    section("Notes", step.notes.length ? h("ul", {}, step.notes.map(item => h("li", {}, item))) : null),
    section("Chosen for each site", chosen.length ? h("table", {}, h("tbody", {}, chosen.map(([path, value]) =>
      h("tr", {}, h("th", { scope: "row" }, link(path, { module: path, node: null })), h("td", {}, value))))) : null),
    section("Where it changed", where.length ? h("ul", {}, where.slice(0, 40).map(item => h("li", {},
      link(item.label, { from: "prev", module: item.path, node: null }), item.times > 1 ? ` ×${item.times} each ` : " ", signs(item.counts))),
      where.length > 40 ? h("li", {}, `and ${where.length - 40} more`) : null) : null),
    section("Left alone", step.skipped.map(([reason, places]) => more(`${plural(places.length, "place")}: ${reason}`,
      h("ul", {}, places.slice(0, 100).map(([node, place]) => h("li", {}, link(place, { node: `%${node}`, module: null }))))))),
  ];
}

function costList(value, total) {
  return Object.entries(HEATS).filter(([heat]) => total(heat) > 0).map(([heat, { label }]) =>
    [h("dt", {}, label), h("dd", {}, value(heat) ? `${heatText(heat, value(heat))}, ${heatShare(heat, value(heat), total(heat))}` : "none")]);
}

function touching(names, upTo) {
  const found = [];
  for (let i = 1; i <= upTo; i++) if (names.has(passName(i)) && steps[i].rewritten > 0) found.push(h("li", {}, stepLink(i)));
  return found.length ? h("ul", {}, found) : null;
}

function modulePanel(view) {
  const { root, byPath } = modules(view.step, view.from);
  const module = byPath.get(view.module);
  if (!module) return [h("h2", {}, view.module), h("p", {}, `Step ${view.step} has no node in this module.`)];
  const parent = byPath.get(module.path.split(".").slice(0, -1).join(".")) || root;
  const group = groupsOf(parent, view.step, view.from).get(module.name);
  const changed = module.nodes.filter(entry => entry.status !== "same");
  const passes = new Set(module.nodes.flatMap(entry => entry.node.origin ? entry.node.origin.passes : []));
  const here = module.nodes.filter(entry => entry.status !== "removed").length;
  return [
    h("h2", {}, module.path || "the model itself"),
    h("p", {}, plural(here, "node"), group && group.members.length > 1 ? `; identical to ${plural(group.members.length - 1, "other")}: ${ranges(group.members)}` : "",
      group && group.differences.length ? ["; unlike most of its siblings:", h("code", { class: "block" }, differenceTexts(group.differences).join("\n"))] : null),
    h("dl", {}, costList(heat => heatOf(module, heat), heat => hasHeat(heat, view.step) ? heatOf(root, heat) : 0)),
    view.from === null ? null : section(`Changed since step ${view.from}`, changed.length ? h("pre", { class: "diff" }, changed.slice(0, 80).map(nodeDiff)) : h("p", {}, "nothing"),
      changed.length > 80 ? h("p", {}, `and ${changed.length - 80} more nodes`) : null),
    section("Passes that made or changed its nodes", touching(passes, view.step)),
  ];
}

// The line of a node before and after, and its weights whose values or types changed.
function nodeDiff({ node, status, was }) {
  const before = status === "added" ? null : was.text.trim(), after = status === "removed" ? null : node.text.trim();
  const lines = before === after ? [h("span", {}, "  ", after)] : diffLines(before, after);
  const at = state();
  for (const name of at.from === null || status !== "changed" ? [] : compare(at.from, at.step).weights.get(node.name) || []) {
    const [a, b] = [at.from, at.step].map(step => program(step).weights.get(name).text.trim());
    lines.push(...a === b ? [h("span", { class: "quiet" }, `  ${name}: its values were set`)] : diffLines(a, b));
  }
  return lines;
}

function nodePanel(view) {
  const { root } = modules(view.step, view.from);
  const entry = root.nodes.find(item => item.node.name === view.node);
  if (!entry) return [h("h2", {}, view.node), h("p", {}, `Step ${view.step} has no such node.`)];
  const { node, status } = entry, { readers } = program(status === "removed" ? view.from : view.step);
  const origin = node.origin || { source: "", code: "", passes: [] };
  const names = items => h("span", {}, items.map(name => [name[0] === "%" ? link(name, { node: name, module: null }) : h("code", {}, name), " "]));
  const rows = [
    ["operator", h("code", {}, node.operator)], ["type", h("code", {}, node.type)],
    ["module", node.path ? link(node.path, { module: node.path, node: null }) : "the model itself"],
    ["source", origin.source ? [origin.source, origin.code ? h("code", { class: "block" }, origin.code) : null] : null],
    ["replaces", node.replaces ? h("code", {}, node.replaces) : null],
    ["reads", node.args.length ? names([...new Set(node.args)]) : null],
    ["attention mass", data.errors && view.step === steps.length - 1 && node.name in data.errors.lost
      ? `${percent(1 - data.errors.lost[node.name])} of the original's is at the keys it sees` : null],
    ["read by", readers.has(node.name) ? names(readers.get(node.name).map(item => item.name)) : "the result"],
  ].filter(([, value]) => value !== null);
  return [
    h("h2", {}, node.name), status === "same" ? null : h("p", {}, h("span", { class: `kind ${status}` }, status), ` since step ${view.from}`),
    h("dl", {}, rows.map(([name, value]) => [h("dt", {}, name), h("dd", {}, value)]),
      costList(heat => HEATS[heat].of(node), heat => hasHeat(heat, view.step) ? heatOf(root, heat) : 0)),
    section("Text", h("pre", {}, node.text.trim())),
    status === "same" ? null : section(`Difference to step ${view.from}`, h("pre", { class: "diff" }, nodeDiff(entry))),
    section("Passes that made or changed it", touching(new Set(origin.passes), view.step)),
  ];
}
