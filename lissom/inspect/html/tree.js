// The program as a tree of modules, identical layers as one row.
const HEATS = {
  flops: { label: "FLOPs", unit: "FLOP", of: node => node.cost ? node.cost[0] : 0 },
  bytes: { label: "Bytes moved", unit: "B", of: node => node.cost ? node.cost[1] + node.cost[2] : 0 },
  parameters: { label: "Parameters", unit: "", of: node => node.cost ? node.cost[3] : 0 },
  sharded: { label: "Sharded parameters", unit: "", of: node => node.sharded },
  time: { label: "Time", unit: "ms", of: node => data.times.nodes[node.name] || 0 },
  error: { label: "Error", largest: true, of: node => data.errors.nodes[node.name] || 0 },
  mass: { label: "Attention mass lost", largest: true, of: node => data.errors.lost[node.name] || 0 },
};
// What each measured heat is read from, and what measures it; they are known for the last step alone.
const MEASURED = {
  time: { of: data.times && data.times.nodes, how: "measure it with report.kernels() or --full" },
  error: { of: data.errors && data.errors.nodes, how: "measure it with report.errors() or --errors" },
  mass: { of: data.errors && data.errors.lost, how: "measure it with report.errors() or --errors; only sparse attentions lose any" },
};
if (!data.pieces.some(parts => parts.some(text => text.includes(" Shard(")))) delete HEATS.sharded;
const MOST_ROWS = 200;

const hasHeat = keep((heat, step) => {
  if (heat in MEASURED) return step === steps.length - 1 && MEASURED[heat].of !== null && Object.keys(MEASURED[heat].of).length > 0;
  return program(step).nodes.some(node => heat === "sharded" ? node.sharded > 0 : node.cost !== null);
});

const heatText = (heat, value) => heat === "time" ? `${digits(value)} ms` : HEATS[heat].largest ? exponent(value) : short(value, HEATS[heat].unit);

// A value beside that of the whole program: its share of a sum, or which part of the largest it is.
const heatShare = (heat, value, total) => HEATS[heat].largest ? `${percent(value / total)} of the largest` : `${percent(value / total)} of the program`;

// The modules of a step; nodes that are gone since the step `from` stand where they were.
const modules = keep((step, from) => {
  const compared = from === null ? null : compare(from, step);
  const root = { path: "", name: "", items: [], kids: new Map(), nodes: [], counts: { added: 0, removed: 0, changed: 0 } };
  const byPath = new Map([["", root]]);
  const place = (node, status, was) => {
    let at = root;
    const entry = { node, status, was }, chain = [root];
    if (node.path) for (const name of node.path.split(".")) {
      if (!at.kids.has(name)) {
        const made = { path: at.path ? `${at.path}.${name}` : name, name, items: [], kids: new Map(), nodes: [], counts: { added: 0, removed: 0, changed: 0 } };
        at.kids.set(name, made);
        at.items.push(made);
        byPath.set(made.path, made);
      }
      at = at.kids.get(name);
      chain.push(at);
    }
    at.items.push(entry);
    for (const module of chain) { module.nodes.push(entry); if (status in module.counts) module.counts[status]++; }
  };
  const gone = new Map();
  if (compared) {
    // A node that is gone is put in front of the next one that is still there.
    const after = new Map();
    for (const [name, was] of compared.before) after.set(was, name);
    const lost = new Set(compared.removed.map(node => node.name));
    let waiting = [];
    for (const node of program(from).nodes) {
      if (lost.has(node.name)) waiting.push(node);
      else if (waiting.length) { const key = after.get(node.name); gone.set(key, [...(gone.get(key) || []), ...waiting]); waiting = []; }
    }
    gone.set(null, waiting);
  }
  for (const node of program(step).nodes) {
    for (const lost of gone.get(node.name) || []) place(lost, "removed", lost);
    const was = compared ? program(from).byName.get(compared.before.get(node.name)) : undefined;
    place(node, compared ? compared.status.get(node.name) : "same", was);
  }
  for (const lost of gone.get(null) || []) place(lost, "removed", lost);
  return { root, byPath };
});

const changesOf = module => module.counts.added + module.counts.removed + module.counts.changed;

const joined = (heat, values) => HEATS[heat].largest ? values.reduce((a, b) => Math.max(a, b), 0) : values.reduce((a, b) => a + b, 0);

function heatOf(module, heat) {
  return joined(heat, module.nodes.filter(entry => entry.status !== "removed").map(entry => HEATS[heat].of(entry.node)));
}

// The groups of a module's numbered children: { members, differences } of each child, by its name.
function groupsOf(module, step, from) {
  const found = new Map();
  const own = at => Object.hasOwn(data.folds[steps[at].fold], module.path) ? data.folds[steps[at].fold][module.path] : undefined;
  const now = own(step), old = from === null ? null : own(from);
  if (!now) return found;
  const number = (groups, name) => groups ? groups.findIndex(group => group[0].includes(name)) : -1;
  const groups = new Map();
  for (const [index, [members, differences]] of now.entries()) for (const name of members) {
    const child = module.kids.get(name);
    if (!child) continue;
    // Layers that are equal now may have changed in different ways.
    const { added, removed, changed } = child.counts;
    const key = from === null || !changesOf(child) ? `${index}` : [index, number(old, name), added, removed, changed].join();
    if (!groups.has(key)) groups.set(key, { members: [], differences });
    groups.get(key).members.push(name);
  }
  for (const group of groups.values()) for (const name of group.members) found.set(name, group);
  return found;
}

// The rows of the tree as far as it is open: modules, groups of identical layers, nodes, and how a group differs.
function rowsOf(view) {
  const { root } = modules(view.step, view.from);
  const rows = [];
  const visit = (module, level) => {
    const groups = groupsOf(module, view.step, view.from), done = new Set();
    for (const item of module.items) {
      if (item.node) {
        if (!view.changes || item.status !== "same") rows.push({ kind: "node", level, ...item });
        continue;
      }
      let child = item, label = child.name, group = groups.get(child.name);
      if (group) {
        if (done.has(group)) continue;
        done.add(group);
        const chosen = view.chosen.get(module.path);
        child = module.kids.get(group.members.includes(chosen) ? chosen : group.members[0]);
        label = ranges(group.members);
        if (group.members.length === 1) { if (!group.differences.length) group = null; label = child.name; }
      }
      if (view.changes && !changesOf(child)) continue;
      while (child.items.length === 1 && !child.items[0].node && !group) { child = child.items[0]; label += `.${child.name}`; }
      rows.push({ kind: "module", level, module: child, label, group, parent: module });
      if (group && group.differences.length && view.open.has(child.path)) rows.push({ kind: "note", level: level + 1, lines: group.differences });
      if (view.open.has(child.path)) visit(child, level + 1);
    }
  };
  visit(root, 1);
  return rows;
}

// Opens modules from the outside in down to the numbered ones, as long as the rows fit on a screen.
function openSome(view, most) {
  for (let again = true; again;) {
    again = false;
    for (const row of rowsOf(view)) {
      if (row.kind !== "module" || view.open.has(row.module.path) || row.group || /^\d+$/.test(row.module.name)) continue;
      view.open.add(row.module.path);
      if (rowsOf(view).length > most) view.open.delete(row.module.path); else again = true;
    }
  }
}

// Opens everything above a node or module, and chooses its layer where identical ones are one row.
function reveal(view, path) {
  const parts = path ? path.split(".") : [];
  for (let i = 1; i <= parts.length; i++) {
    view.open.add(parts.slice(0, i).join("."));
    view.chosen.set(parts.slice(0, i - 1).join("."), parts[i - 1]);
  }
}
