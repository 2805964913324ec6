// Elements and numbers. All text is set as text, never as HTML.
function h(tag, attributes, ...children) {
  const found = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (key === "on") for (const [event, action] of Object.entries(value)) found.addEventListener(event, action);
    else if (key === "style") found.style.cssText = value;
    else found.setAttribute(key, value === true ? "" : value);
  }
  found.append(...children.flat(9).filter(child => child !== null && child !== undefined && child !== false && child !== ""));
  return found;
}

function digits(value) {
  const size = Math.abs(value);
  return size >= 99.5 || value === 0 ? value.toFixed(0) : size >= 9.95 ? value.toFixed(1) : size >= 0.995 ? value.toFixed(2) : value.toPrecision(2);
}

function short(value, unit) {
  if (unit === "" && Number.isInteger(value) && Math.abs(value) < 1e5) return value.toLocaleString("en");
  for (const [prefix, size] of [["T", 1e12], ["G", 1e9], ["M", 1e6], ["K", 1e3]]) {
    if (Math.abs(value) >= size) return `${digits(value / size)} ${prefix}${unit}`;
  }
  return `${Number.isInteger(value) ? value : digits(value)} ${unit}`;
}

const plural = (count, word) => `${count.toLocaleString("en")} ${word}${count === 1 ? "" : "s"}`;
const exponent = value => value === 0 ? "0" : value >= 0.01 && value < 1000 ? String(Number(value.toPrecision(2))) : value.toExponential(0);
const signed = (value, unit) => value === 0 ? "" : `${value > 0 ? "+" : "−"}${short(Math.abs(value), unit)}`;
const percent = share => share >= 0.0995 ? `${(100 * share).toFixed(0)} %` : share >= 0.001 ? `${(100 * share).toFixed(1)} %` : share > 0 ? "<0.1 %" : "";

// The numbers of layers as ranges: 0-4,6.
function ranges(numbers) {
  const found = [];
  for (const number of numbers.map(Number).sort((a, b) => a - b)) {
    const last = found[found.length - 1];
    if (last && last[1] === number - 1) last[1] = number; else found.push([number, number]);
  }
  return found.map(([a, b]) => a === b ? `${a}` : `${a}-${b}`).join(",");
}

// Two lines as lists of words with those marked that are in one line alone.
function wordDiff(before, after) {
  const a = before.split(/([\s,()[\]]+)/), b = after.split(/([\s,()[\]]+)/);
  const table = Array.from({ length: a.length + 1 }, () => new Uint16Array(b.length + 1));
  for (let i = a.length - 1; i >= 0; i--) for (let j = b.length - 1; j >= 0; j--) {
    table[i][j] = a[i] === b[j] ? table[i + 1][j + 1] + 1 : Math.max(table[i + 1][j], table[i][j + 1]);
  }
  const left = [], right = [];
  let i = 0, j = 0;
  while (i < a.length || j < b.length) {
    if (i < a.length && j < b.length && a[i] === b[j]) { left.push(a[i++]); right.push(b[j++]); }
    else if (j >= b.length || (i < a.length && table[i + 1][j] >= table[i][j + 1])) left.push(h("b", {}, a[i++]));
    else right.push(h("b", {}, b[j++]));
  }
  return [left, right];
}

// How one node's pattern differs from another's: the words that are not in both.
function patternChange(before, after) {
  const words = parts => [...new Set(parts.filter(part => part instanceof Element).map(part => part.textContent.replace(/^\w+=/, "")))].filter(word => /\w/.test(word)).join(" ");
  const [left, right] = wordDiff(before, after).map(words);
  const operator = /= ([\w.]+)\(/.exec(after);
  return `${operator ? `${operator[1].replace(/^(aten|lissom)\./, "")}: ` : ""}${left || "nothing"} → ${right || "nothing"}`;
}

// The differences of a group from the largest one, in words where nodes pair up.
function differenceTexts(lines) {
  const operator = line => (/= ([\w.]+)\(/.exec(line) || [line, line])[1];
  const minus = lines.filter(line => line.startsWith("- ")), found = [];
  for (const line of lines.filter(item => !item.startsWith("- "))) {
    const pair = minus.findIndex(item => operator(item) === operator(line));
    found.push(line.startsWith("+ ") && pair >= 0 ? patternChange(minus.splice(pair, 1)[0].slice(2), line.slice(2)) : line.replace(/^\+ /, "has "));
  }
  return [...found, ...minus.map(line => line.replace(/^- /, "lacks "))];
}

function diffLines(before, after) {
  if (before === null) return [h("ins", {}, "+ ", after)];
  if (after === null) return [h("del", {}, "− ", before)];
  const [left, right] = wordDiff(before, after);
  return [h("del", {}, "− ", left), h("ins", {}, "+ ", right)];
}
