// Draws the plots of a page when they come into sight, in the page's colours, and its table of runs.
// PLOTS and RUNS come from data.js beside the page.
"use strict";

const dark = window.matchMedia("(prefers-color-scheme: dark)");
const CONFIG = {
  responsive: true, displaylogo: false, displayModeBar: false, showTips: false,
};

// ---- Plots

function theme() {
  const style = getComputedStyle(document.documentElement);
  const colour = (name) => style.getPropertyValue(name).trim();
  const axis = {
    gridcolor: colour("--line"), linecolor: colour("--line"), tickcolor: colour("--line"), gridwidth: 1,
  };
  const touch = window.matchMedia("(pointer: coarse)").matches;
  return {
    layout: {
      font: { color: colour("--ink"), family: getComputedStyle(document.body).fontFamily, size: 12 },
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      xaxis: axis, yaxis: axis,
      hoverlabel: { bgcolor: colour("--tint"), bordercolor: colour("--soft"), font: { color: colour("--ink") }, align: "left" },
      modebar: { bgcolor: "rgba(0,0,0,0)", color: colour("--soft"), activecolor: colour("--ink") },
      dragmode: touch ? false : "zoom",  // a finger on a plot scrolls the page
    },
  };
}

function hidden(div) {
  const buttons = div.closest("figure").querySelectorAll('.legend button[aria-pressed="false"]');
  return new Set([...buttons].map((button) => button.dataset.group));
}

// Half-transparent dots that are clear on white sink into a dark page.
function seen(trace) {
  if (!dark.matches || !trace.marker?.opacity) return trace;
  return { ...trace, marker: { ...trace.marker, opacity: 0.85 } };
}

function draw(div) {
  const plot = PLOTS[div.dataset.picture][Number(div.dataset.panel)];
  const off = hidden(div);
  const traces = plot.data.map((trace) => ({
    ...seen(trace), visible: !off.has(trace.legendgroup),
  }));
  div.dataset.drawn = "yes";
  return Plotly.react(div, traces, { ...plot.layout, template: theme() }, CONFIG);
}

const plots = [...document.querySelectorAll(".plot")];
const drawn = () => plots.filter((div) => div.dataset.drawn);

const watcher = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    if (entry.isIntersecting) {
      watcher.unobserve(entry.target);
      draw(entry.target);
    }
  }
}, { rootMargin: "400px" });
plots.forEach((div) => watcher.observe(div));
dark.addEventListener("change", () => drawn().forEach(draw));

for (const button of document.querySelectorAll(".legend button")) {
  button.addEventListener("click", () => {
    button.setAttribute("aria-pressed", String(button.getAttribute("aria-pressed") !== "true"));
    for (const div of button.closest("figure").querySelectorAll(".plot")) {
      if (div.dataset.drawn) draw(div);
    }
  });
}

// ---- The table of runs

const PAGE = 25;
const table = document.getElementById("runs-table");
const filter = document.getElementById("runs-filter");
const more = document.getElementById("runs-more");
const idColumn = RUNS.columns.indexOf("run");
const numeric = RUNS.columns.map((_, i) => RUNS.rows.some((row) => typeof row[i] === "number"));
const order = { column: -1, sign: 1 };
let shown = PAGE;
const haystack = new Map(RUNS.rows.map((row) => [
  row, row.map((value, i) => `${RUNS.columns[i]} ${value ?? ""}`).join(" | ").toLowerCase(),
]));

function compare(a, b) {
  if (a === b) return 0;
  if (a === null || a === "") return 1;   // what is not there comes last, whichever way
  if (b === null || b === "") return -1;
  const numbers = typeof a === "number" && typeof b === "number";
  return order.sign * (numbers ? a - b : String(a).localeCompare(String(b), undefined, { numeric: true }));
}

function matching() {
  const wanted = filter.value.toLowerCase().split(/[,\s]+/).filter(Boolean);
  const rows = RUNS.rows.filter((row) => wanted.every((word) => haystack.get(row).includes(word)));
  return order.column < 0 ? rows : rows.toSorted((a, b) => compare(a[order.column], b[order.column]));
}

function cell(value, column) {
  const td = document.createElement("td");
  if (numeric[column]) td.className = "number";
  if (RUNS.columns[column] === "status") td.className = `status ${value}`;
  if (column === idColumn && RUNS.configs.includes(value)) {
    const link = document.createElement("a");
    link.href = `configs/${value}.json`;
    link.textContent = value;
    td.append(link);
  } else {
    td.textContent = value === null ? "–" : String(value).replace(/^-(?=\d)/, "−");
  }
  return td;
}

function fill() {
  const rows = matching();
  const body = table.tBodies[0];
  body.replaceChildren(...rows.slice(0, shown).map((row) => {
    const tr = document.createElement("tr");
    tr.append(...row.map(cell));
    return tr;
  }));
  document.getElementById("runs-count").textContent = `${rows.length} of ${RUNS.rows.length} runs`;
  more.hidden = rows.length <= shown;
}

function head() {
  const row = table.createTHead().insertRow();
  RUNS.columns.forEach((name, column) => {
    const th = document.createElement("th");
    th.scope = "col";
    th.textContent = name;
    th.tabIndex = 0;
    if (numeric[column]) th.className = "number";
    const sort = () => {
      order.sign = order.column === column ? -order.sign : 1;
      order.column = column;
      for (const other of row.cells) other.removeAttribute("aria-sort");
      th.setAttribute("aria-sort", order.sign > 0 ? "ascending" : "descending");
      fill();
    };
    th.addEventListener("click", sort);
    th.addEventListener("keydown", (event) => { if (event.key === "Enter") sort(); });
    row.append(th);
  });
  table.createTBody();
}

head();
fill();
filter.addEventListener("input", () => { shown = PAGE; fill(); });
more.addEventListener("click", () => { shown += 10 * PAGE; fill(); });
