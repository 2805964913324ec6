"use strict";
// The programs of the steps, read from the data block, and how two of them differ.
const data = JSON.parse(document.getElementById("data").textContent);
const steps = data.steps;

function keep(make) {
  const known = new Map();
  return (...keys) => {
    const key = keys.join();
    if (!known.has(key)) known.set(key, make(...keys));
    return known.get(key);
  };
}

// The records of a step's lines.
const records = keep(step => {
  if (step < 0) return [];
  const before = records(step - 1), stretches = steps[step].lines;
  if (stretches === null) return before;
  const found = [];
  for (let i = 0; i < stretches.length; i += 3) {
    const [source, start, length] = stretches.slice(i, i + 3);
    for (let j = start; j < start + length; j++) found.push(source === 0 ? before[j] : j);
  }
  return found;
});

// One line of a program: its text, and for nodes and weights their parts.
const line = keep(id => {
  const [piece, cost, origin, replaces, ...numbers] = data.records[id];
  const pieces = data.pieces[piece], names = numbers.map(number => data.names[number]);
  let text = pieces[0];
  names.forEach((name, i) => { text += name + pieces[i + 1]; });
  const found = { id, piece, text, names, path: "", args: [], cost: null, origin: null, replaces: null };
  const defines = pieces.length > 1 && pieces[1].startsWith(": ");
  found.kind = defines && pieces[0] === "  " && names[0][0] === "%" ? "node" : defines && pieces[0] === "  weight " ? "weight" : "other";
  if (found.kind === "other") return found;
  found.name = names[0];
  found.type = pieces[1].slice(2).split(" = ")[0];
  if (cost >= 0) found.cost = data.costs[cost];
  if (origin >= 0) found.origin = { source: data.origins[origin][0], code: data.origins[origin][1], passes: data.origins[origin][2] };
  if (replaces >= 0) found.replaces = data.names[replaces];
  if (found.kind === "weight") return found;
  if (pieces[pieces.length - 2].endsWith("  # ")) found.path = names[names.length - 1];
  found.args = names.slice(1, found.path ? -1 : undefined);
  found.operator = pieces[1].slice(pieces[1].indexOf(" = ") + 3).split("(")[0];
  return found;
});

// The number of elements of a type such as f32[64, 256]; 0 where a size has a name.
const elements = type => ((/\[([^\]]*)\]/.exec(type) || ["", ""])[1].split(",").reduce((product, size) => product * Number(size || 1), 1)) || 0;

const programText = step => records(step).map(id => line(id).text).join("\n");

// The nodes of a step in order, by name, with their weights and readers.
const program = keep(step => {
  const lines = records(step).map(id => line(id));
  const nodes = lines.filter(item => item.kind === "node");
  const weights = new Map(lines.filter(item => item.kind === "weight").map(item => [item.name, item]));
  const byName = new Map(nodes.map(item => [item.name, item]));
  const readers = new Map();
  for (const node of nodes) node.sharded = 0;
  for (const node of nodes) for (const name of new Set(node.args)) {
    const weight = weights.get(name);
    if (weight && weight.type.includes(" Shard(")) node.sharded += elements(weight.type);
    if (!readers.has(name)) readers.set(name, []);
    readers.get(name).push(node);
  }
  return { nodes, byName, weights, readers };
});

// For the name of a node the name of the one that it replaced, in any step.
const replacedBy = (() => {
  const found = new Map();
  data.records.forEach((record, id) => { if (record[3] >= 0) found.set(line(id).name, data.names[record[3]]); });
  return found;
})();

// The nodes of two steps matched by name and by what they replaced; status by name in the later step.
const compare = keep((from, to) => {
  const old = program(from), now = program(to);
  const before = new Map(), taken = new Set();
  for (const node of now.nodes) if (old.byName.has(node.name)) { before.set(node.name, node.name); taken.add(node.name); }
  for (const node of now.nodes) {
    let name = before.has(node.name) ? undefined : node.replaces;
    for (let i = 0; name !== undefined && name !== null && i < 50 && !old.byName.has(name); i++) name = replacedBy.get(name);
    if (name && old.byName.has(name) && !taken.has(name)) { before.set(node.name, name); taken.add(name); }
  }
  const weightChanged = name => {
    const a = old.weights.get(name), b = now.weights.get(name);
    return a !== undefined && b !== undefined && a.id !== b.id;
  };
  const status = new Map(), weights = new Map();
  for (const node of now.nodes) {
    const was = old.byName.get(before.get(node.name));
    if (was === undefined) { status.set(node.name, "added"); continue; }
    const same = was.piece === node.piece && was.path === node.path
      && was.args.every((name, i) => name === node.args[i] || name === before.get(node.args[i]));
    const touched = node.args.filter(weightChanged);
    if (touched.length) weights.set(node.name, touched);
    status.set(node.name, same && !touched.length ? "same" : "changed");
  }
  const removed = old.nodes.filter(node => !taken.has(node.name));
  const counts = { added: 0, removed: removed.length, changed: 0, same: 0 };
  for (const value of status.values()) counts[value]++;
  return { status, before, removed, weights, counts, total: counts.added + counts.removed + counts.changed };
});
