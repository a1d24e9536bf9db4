// Tables are sorted by a click on the name of a column, and filtered by words and by comparisons such as images>=1024.
"use strict";
document.documentElement.classList.add("js");

// What a cell is compared by: its exact number, or the number that its text begins with; null for other texts.
function numberOf(cell) {
  if (cell.dataset.v !== undefined) return Number(cell.dataset.v);
  const text = cell.textContent.trim().replace(/,(?=\d{3})/g, "");
  return /^[+-]?(\d|\.\d)/.test(text) ? parseFloat(text) : null;
}

// A first click puts the largest number first, or texts in order; another click turns the order round.
function sort(table, column) {
  const rows = [...table.tBodies[0].rows], heads = [...table.tHead.rows[0].cells];
  const value = rows.map(row => numberOf(row.cells[column]));
  const text = rows.map(row => row.cells[column].textContent.trim());
  const numeric = value.every((one, i) => one !== null || !text[i]);
  const now = heads[column].ariaSort;
  const down = now ? now === "ascending" : numeric;
  const order = rows.map((_, i) => i).sort((a, b) => {
    if (!text[a] || !text[b]) return !text[a] - !text[b] || a - b;  // empty cells are last in both orders
    const by = numeric ? value[a] - value[b] : text[a].localeCompare(text[b], "en", {numeric: true});
    return (down ? -by : by) || a - b;
  });
  order.forEach(i => table.tBodies[0].append(rows[i]));
  heads.forEach((head, i) => { head.ariaSort = i !== column ? null : down ? "descending" : "ascending"; });
}

const COMPARE = {"<": (a, b) => a < b, ">": (a, b) => a > b, "<=": (a, b) => a <= b, ">=": (a, b) => a >= b,
                 "=": (a, b) => a === b};

// images>=1024 compares the first column whose name begins with "images"; other words must be in the row.
function matches(table, row, word) {
  const found = /^(.+?)(<=|>=|<|>|=)([+-]?[\d.,]+)$/.exec(word);
  if (!found) return row.textContent.toLowerCase().includes(word);
  const column = [...table.tHead.rows[0].cells].findIndex(head => head.textContent.toLowerCase().startsWith(found[1]));
  const value = column < 0 ? null : numberOf(row.cells[column]);
  return value !== null && COMPARE[found[2]](value, parseFloat(found[3].replaceAll(",", "")));
}

function filter(table, text, count) {
  const words = text.toLowerCase().split(/\s+/).filter(word => word);
  const rows = [...table.tBodies[0].rows];
  rows.forEach(row => { row.hidden = !words.every(word => matches(table, row, word)); });
  count.textContent = `${rows.filter(row => !row.hidden).length} of ${rows.length} rows`;
}

for (const table of document.querySelectorAll("table.cards")) {
  const n = table.tBodies[0].rows.length;
  if (n < 6) continue;
  table.classList.add("sortable");
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    const name = head.firstChild;  // below it there may be the axis of drawn intervals
    if (name?.nodeType !== Node.TEXT_NODE) return;
    const button = document.createElement("button");
    button.onclick = () => sort(table, column);
    name.replaceWith(button);
    button.append(name);
  });
  const input = document.createElement("input"), count = document.createElement("span"), bar = document.createElement("p");
  input.type = "search";
  input.placeholder = "filter: words, or images>=1024";
  input.ariaLabel = "filter the rows";
  input.oninput = () => filter(table, input.value, count);
  bar.className = "filter";
  bar.append(input, count);
  table.parentElement.before(bar);
}
