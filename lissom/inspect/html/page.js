// The page: its state, which the address keeps, and the columns drawn from it.
const page = { step: steps.length - 1, from: "prev", heat: "flops", node: null, module: null, overview: true, changes: false, offset: 0, open: new Set(), chosen: new Map(), unfolded: new Set(), query: "" };
const at = id => document.getElementById(id);

function state() {
  const from = page.from === "prev" ? page.step - 1 : page.from === "none" ? -1 : page.from;
  const heat = hasHeat(page.heat, page.step) ? page.heat : "flops";
  return { ...page, heat, from: from >= 0 && from < page.step ? from : null, changes: page.changes && from >= 0 && from < page.step };
}

function go(target) {
  const before = page.step;
  Object.assign(page, { overview: false, offset: 0 }, target);
  if (page.node && "node" in target) {
    const view = state();
    const entry = modules(view.step, view.from).root.nodes.find(item => item.node.name === page.node);
    if (entry) reveal(page, entry.node.path);
  }
  if (page.module !== null && "module" in target) reveal(page, page.module);
  if (page.step !== before) openSome(state(), 30);
  draw();
}

function writeAddress() {
  const parts = { step: page.step, heat: page.heat, ...(page.from !== "prev" ? { with: page.from } : {}), ...(page.node ? { node: page.node.slice(1) } : {}), ...(page.module !== null ? { module: page.module } : {}) };
  const text = page.overview ? "" : `#${new URLSearchParams(parts)}`;
  if (location.hash !== text) history.replaceState(null, "", text || location.pathname + location.search);
}

function readAddress() {
  const given = new URLSearchParams(location.hash.slice(1)), step = Number(given.get("step"));
  if (!given.has("step") || !Number.isInteger(step) || step < 0 || step >= steps.length) return false;
  const from = given.get("with"), heat = given.get("heat");
  const number = Number(from);
  go({
    step, from: from === "none" ? "none" : from !== null && Number.isInteger(number) ? number : "prev",
    heat: heat in HEATS ? heat : page.heat, node: given.has("node") ? `%${given.get("node")}` : null, module: given.get("module"),
  });
  return true;
}

function card(label, value, small, target) {
  return h("button", { class: "card", type: "button", disabled: target === null, on: { click: () => target && go(target) } },
    h("span", { class: "label" }, label), h("span", { class: "value" }, value), h("span", { class: "small" }, small));
}

function drawHeader() {
  const first = steps[0].size, last = steps[steps.length - 1].size, end = steps.length - 1;
  const change = (figure, unit) => first[figure] === last[figure] ? short(last[figure], unit) : `${short(first[figure], unit)} → ${short(last[figure], unit)}`;
  const cards = [[2, "Weights", "B"], [3, "Work of a call", "FLOP"], [0, "Operators", ""]].map(([figure, label, unit]) => {
    const best = bestSaving(figure);
    const small = best ? `most by ${passName(best.step)}: −${short(best.saved, unit)}` : "no pass saved any";
    return card(label, change(figure, unit), small, best && { step: best.step, from: "prev", node: null, module: null });
  });
  const heat = hasHeat("time", end) ? "time" : "flops", list = hasHeat(heat, end) ? costly(end, heat) : [];
  if (list.length) {
    const share = list[0][1] / list.reduce((sum, [, value]) => sum + value, 0);
    cards.push(card("Costliest part", list[0][0] || "the model itself", `${percent(share)} of the ${HEATS[heat].label === "Time" ? "time" : "FLOPs"}`,
      { step: end, from: "none", module: list[0][0], node: null, heat }));
  }
  const lossy = steps.map((step, i) => [i, step]).filter(([, step]) => ["approximation", "training"].includes(step.kind) && step.error !== null && !step.reverted);
  const worst = lossy.reduce((a, b) => a === null || b[1].error > a[1].error ? b : a, null);
  cards.push(worst ? card("Largest error", exponent(worst[1].error), `by ${passName(worst[0])}${worst[1].cosine === null ? "" : `, cosine ${worst[1].cosine.toFixed(4)}`}`, { step: worst[0], from: "prev", node: null, module: null })
    : card("Outputs", data.checks === "numeric" ? "equal" : "not compared", `checks: ${data.checks}`, null));
  at("header").replaceChildren(h("h1", {}, h("button", { class: "home", type: "button", title: "Overview", on: { click: () => go({ overview: true, node: null, module: null }) } }, data.title), h("small", {}, ` ${steps.length - 1} passes`)), h("div", { class: "cards" }, cards));
}

function hasEffect(i) {
  const step = steps[i];
  return i === 0 || step.kind !== "rewrite" || step.rewritten > 0 || step.added > 0 || step.removed > 0 || String(step.size) !== String(steps[i - 1].size);
}

function stepRow(i) {
  const step = steps[i], before = i ? steps[i - 1].size : null;
  const chips = before === null ? [] : [[0, "", " nodes"], [2, "B", ""], [3, "FLOP", ""]].map(([figure, unit, word]) => {
    const change = step.size[figure] - before[figure];
    return change ? h("span", { class: `chip ${change > 0 ? "more" : "less"}` }, signed(change, unit), word) : null;
  });
  return h("button", { class: `step ${step.kind}`, type: "button", "data-step": i, "aria-current": !page.overview && i === page.step ? "step" : null, on: { click: () => go({ step: i, from: "prev", node: null, module: null }) } },
    h("span", { class: "number" }, i), h("span", { class: "name", title: step.spelling }, step.spelling),
    h("span", { class: "what" }, step.reverted ? `reverted: ${step.reverted.split(": ")[0]}` : step.summary),
    h("span", { class: "chips" }, chips, step.error ? h("span", { class: "chip" }, `error ${exponent(step.error)}`) : null,
      h("span", { class: "chip quiet" }, `${(step.seconds + step.checked).toFixed(2)} s`)));
}

const matching = step => [step.spelling, step.summary, step.about, ...step.notes].join(" ").toLowerCase().includes(page.query);

function drawPasses() {
  const rows = [];
  for (let i = 0; i < steps.length;) {
    let end = i;
    while (end < steps.length && !hasEffect(end) && (page.overview || end !== page.step)) end++;
    if (page.query) { if (matching(steps[i])) rows.push(stepRow(i)); i++; continue; }
    if (end - i < 2 || page.unfolded.has(i)) { for (const stop = Math.max(end, i + 1); i < stop; i++) rows.push(stepRow(i)); continue; }
    const first = i;
    rows.push(h("button", { class: "folded", type: "button", "aria-expanded": "false", on: { click: () => { page.unfolded.add(first); draw(); } } }, `${end - i} passes changed nothing`));
    i = end;
  }
  at("steps").replaceChildren(...rows);
  at("found").replaceChildren(...searched());
  const current = at("steps").querySelector("[aria-current]");
  if (current) current.scrollIntoView({ block: "nearest" });
}

// Modules and nodes of the current step that match the search.
function searched() {
  if (page.query.length < 2) return [];
  const { root, byPath } = modules(page.step, null);
  const paths = [...byPath.keys()].filter(path => path.toLowerCase().includes(page.query)).slice(0, 8);
  const found = root.nodes.map(item => item.node).filter(node => `${node.name} ${node.operator}`.toLowerCase().includes(page.query)).slice(0, 8);
  const items = [...paths.map(path => link(path, { module: path, node: null })), ...found.map(node => link(`${node.name} ${node.operator}`, { node: node.name, module: null }))];
  return [h("h3", {}, items.length ? `In step ${page.step}` : "No module or node of this step matches"), ...items];
}

function drawTools(view) {
  const option = (value, label, chosen) => h("option", { value, selected: chosen }, label);
  const from = h("select", { "aria-label": "Compared with", on: { change: event => go({ from: ["none", "prev"].includes(event.target.value) ? event.target.value : Number(event.target.value) }) } },
    option("prev", "the step before", page.from === "prev"), option("none", "nothing", page.from === "none"),
    steps.slice(0, view.step).map((_, i) => option(i, `${i} ${passName(i)}`, page.from === i)));
  const step = h("select", { "aria-label": "Step", on: { change: event => go({ step: Number(event.target.value) }) } }, steps.map((_, i) => option(i, `${i} ${passName(i)}`, i === view.step)));
  const heats = Object.entries(HEATS).map(([heat, { label }]) => h("button", {
    type: "button", "aria-pressed": String(heat === view.heat), disabled: !hasHeat(heat, view.step),
    title: hasHeat(heat, view.step) ? null : !(heat in MEASURED) ? "not known for this step" : MEASURED[heat].of === null ? MEASURED[heat].how : view.step < steps.length - 1 ? "measured for the last step alone" : "none", on: { click: () => go({ heat }) },
  }, label));
  const box = h("input", { type: "checkbox", checked: page.changes, on: { change: event => go({ changes: event.target.checked }) } });
  const counts = view.from === null ? null : compare(view.from, view.step).counts;
  at("tools").replaceChildren(h("label", {}, "After ", step), h("label", {}, "compared with ", from), counts ? signs(counts) : "",
    view.from === null ? "" : h("label", {}, box, " changes only"), h("span", { class: "heats", role: "group", "aria-label": "Shares" }, heats));
}

function heatCells(value, total, heat) {
  const share = total ? value / total : 0;
  return h("span", { class: "heat", title: value ? `${heatText(heat, value)}, ${heatShare(heat, value, total)}` : "" },
    value ? h("span", { class: "fill", style: `width:${Math.min(100, 100 * share).toFixed(2)}%` }) : null, h("span", { class: "figure" }, !value ? "" : HEATS[heat].largest ? heatText(heat, value) : percent(share)));
}

function choices(row) {
  if (!row.group || row.group.members.length < 2) return null;
  const choose = name => go({ module: row.parent.path ? `${row.parent.path}.${name}` : name, node: null });
  const { members } = row.group;
  if (members.length > 12) return h("select", { class: "choice", "aria-label": "Layer", on: { click: event => event.stopPropagation(), change: event => choose(event.target.value) } },
    members.map(name => h("option", { value: name, selected: name === row.module.name }, name)));
  return h("span", { class: "choice" }, members.map(name => h("button", { type: "button", tabindex: -1, "aria-pressed": String(name === row.module.name && page.open.has(row.module.path)), title: `Show layer ${name}`, on: { click: event => { event.stopPropagation(); choose(name); } } }, name)));
}

function treeRow(row, view, total) {
  const base = { role: "treeitem", "aria-level": row.level, tabindex: -1, style: `--level:${row.level - 1}` };
  if (row.kind === "note") return h("div", { class: "row note", style: base.style }, "unlike most: ", h("span", { title: row.lines.join("\n") }, differenceTexts(row.lines).join("; ")));
  const heat = hasHeat(view.heat, view.step) ? view.heat : null;
  if (row.kind === "node") {
    const { node, status } = row;
    return h("div", { ...base, class: `row node ${status}`, "data-node": node.name, "aria-selected": String(page.node === node.name), on: { click: () => go({ node: node.name, module: null }) } },
      h("span", { class: "label" }, h("span", { class: "sign", "aria-label": status }, { added: "+", removed: "−", changed: "~" }[status] || ""), h("code", { class: "operator" }, node.operator.replace(/^(aten|lissom|operator)\./, "")), h("code", { class: "quiet" }, node.name)),
      h("code", { class: "type" }, node.type), heat && status !== "removed" ? heatCells(HEATS[heat].of(node), total, heat) : h("span", {}));
  }
  const { module, group } = row, open = page.open.has(module.path);
  const members = group ? group.members.map(name => row.parent.kids.get(name)) : [module];
  const toggle = () => { if (open && page.module === module.path) page.open.delete(module.path); else page.open.add(module.path); go({ module: module.path, node: null }); };
  return h("div", { ...base, class: "row module", "data-path": module.path, "aria-expanded": String(open), "aria-selected": String(page.module === module.path), on: { click: toggle } },
    h("span", { class: "label" }, h("span", { class: "caret", on: { click: event => { event.stopPropagation(); if (open) page.open.delete(module.path); else page.open.add(module.path); draw(); } } }, open ? "▾" : "▸"), h("strong", {}, row.label),
      members.length > 1 ? h("span", { class: "times", title: "the same operators, shapes and constants" }, `×${members.length} identical`) : null, group && group.differences.length ? h("span", { class: "differs", title: group.differences.join("\n") }, `differs: ${differenceTexts(group.differences)[0]}`) : null, choices(row)),
    h("span", { class: "type" }, signs(module.counts), h("span", { class: "quiet" }, `${plural(module.nodes.filter(entry => entry.status !== "removed").length, "node")}${members.length > 1 ? " each" : ""}`)),
    heat ? heatCells(joined(heat, members.map(item => heatOf(item, heat))), total, heat) : h("span", {}));
}

function drawTree(view) {
  const rows = rowsOf(view), total = hasHeat(view.heat, view.step) ? heatOf(modules(view.step, view.from).root, view.heat) : 0;
  const shown = rows.slice(page.offset, page.offset + MOST_ROWS).map(row => treeRow(row, view, total));
  const move = (label, offset) => h("button", { class: "folded", type: "button", on: { click: () => { page.offset = offset; draw(); } } }, label);
  if (page.offset > 0) shown.unshift(move(`show the ${MOST_ROWS} rows before`, Math.max(0, page.offset - MOST_ROWS)));
  if (rows.length > page.offset + MOST_ROWS) shown.push(move(`show more: ${rows.length - page.offset - MOST_ROWS} rows are left`, page.offset + MOST_ROWS));
  if (!rows.length) shown.push(h("p", { class: "quiet empty" }, view.changes ? "Nothing changed between the two steps." : "The program has no nodes."));
  at("tree").replaceChildren(...shown);
  const selected = at("tree").querySelector("[aria-selected=true]");
  if (selected) selected.scrollIntoView({ block: "nearest" });
  const first = selected || at("tree").querySelector(".row[tabindex]");
  if (first) first.tabIndex = 0;
}

function draw() {
  const view = state();
  const inTree = at("tree").contains(document.activeElement);
  writeAddress();
  drawPasses();
  drawTools(view);
  drawTree(view);
  at("detail").replaceChildren(...(page.overview ? overviewPanel() : page.node ? nodePanel(view) : page.module !== null ? modulePanel(view) : stepPanel(view)).filter(Boolean));
  if (inTree) { const row = at("tree").querySelector("[tabindex='0']"); if (row) row.focus({ preventScroll: true }); }
}

function moveStep(by) {
  const shown = [...at("steps").querySelectorAll(".step")].map(item => Number(item.dataset.step));
  if (!shown.length) return;
  const here = page.overview ? (by > 0 ? -1 : shown.length) : shown.indexOf(page.step);
  go({ step: shown[Math.min(shown.length - 1, Math.max(0, here + by))], from: "prev", node: null, module: null });
}

function moveRow(by) {
  const rows = [...at("tree").querySelectorAll(".row[tabindex]")], here = rows.indexOf(document.activeElement);
  const row = rows[Math.min(rows.length - 1, Math.max(0, here + by))];
  rows.forEach(item => { item.tabIndex = item === row ? 0 : -1; });
  row.focus();
}

addEventListener("keydown", event => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const typing = ["INPUT", "SELECT"].includes(event.target.tagName) && event.target.type !== "checkbox";
  const row = event.target.closest ? event.target.closest("#tree .row") : null;
  const by = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  if (event.key === "Escape") { if (page.query) { at("search").value = page.query = ""; draw(); } else go(page.node ? { node: null } : page.module !== null ? { module: null } : { overview: true }); document.activeElement.blur(); }
  else if (event.key === "/" && !typing) at("search").focus();
  else if (event.target.id === "search" && event.key === "Enter") { const first = at("found").querySelector("button") || at("steps").querySelector(".step"); if (first) first.click(); }
  else if (typing) return;
  else if (by && row) moveRow(by);
  else if (by) moveStep(by);
  else if (row && event.key === "Enter") row.click();
  else if (row && row.dataset.path !== undefined && ["ArrowLeft", "ArrowRight"].includes(event.key)) { if (event.key === "ArrowRight") page.open.add(row.dataset.path); else page.open.delete(row.dataset.path); draw(); }
  else if (event.key === "Enter" && event.target.tagName !== "BUTTON") moveRow(1);
  else return;
  event.preventDefault();
});
at("search").addEventListener("input", event => { page.query = event.target.value.trim().toLowerCase(); drawPasses(); });
addEventListener("hashchange", readAddress);

if (data.heat) page.heat = data.heat;
else if (hasHeat("time", steps.length - 1)) page.heat = "time";
openSome(state(), 30);
drawHeader();
if (!readAddress()) draw();
