
"use strict";
// The shell of a page. Its own script follows, reads `data` and calls show(html) once.
const data = JSON.parse(document.getElementById("data").textContent);
const esc = t => String(t).replace(/[&<>"']/g, c => ({"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&#39;"}[c]));
const none = v => v === null || v === undefined;
const num = (v, d = 3) => none(v) ? "–" : v === 0 ? "0" : Math.abs(v) < 1e-3 || Math.abs(v) >= 1e5 ? v.toExponential(d - 1) : v.toPrecision(d);
const whole = v => none(v) ? "–" : Math.round(v).toLocaleString("en-US");
const pct = v => none(v) ? "–" : v === 0 ? "0 %" : (100 * v < 1e-3 ? (100 * v).toExponential(1) : (100 * v).toPrecision(3)) + " %";
const deg = v => none(v) ? "–" : num(v * 180 / Math.PI) + "°";
const signed = (v, d = 2) => none(v) ? "–" : (v < 0 ? "−" : "+") + Math.abs(v).toFixed(d);
const mean = a => a.reduce((s, v) => s + v, 0) / Math.max(a.length, 1);
const cut = (t, n) => t.length > n ? t.slice(0, n - 1) + "…" : t;

// Cards and tiles.
const card = (title, note, body, wide, pick) => `<section class="card${wide ? " wide" : ""}"><div class="head"><div><h2>${title}</h2><p class="soft">${note}</p></div>${pick || ""}</div>${body}</section>`;
const tile = (value, text) => `<div class="tile"><b>${value}</b><span>${text}</span></div>`;
const tiles = list => `<div class="tiles">${list.map(t => tile(...t)).join("")}</div>`;
const flags = text => text.replace(/(^|[\s(])(--[a-z][\w-]*)/g, '$1<span class="flag">$2</span>');
const bullets = list => `<ul>${list.map(t => `<li>${flags(esc(t))}</li>`).join("")}</ul>`;

// Tables that sort, filter and copy. A column is [title, value of a row, text of a value, help].
const tables = {}, MOST = 2000; // rows drawn at once
function table(id, columns, rows, sort = null) {
  tables[id] = {columns, rows, sort, filter: "", texts: columns.map(c => rows.some(r => typeof c[1](r) === "string"))};
  return `<div class="tools"><input type="search" placeholder="Filter" aria-label="Filter the rows" data-filter="${id}"><span class="soft" role="status" id="${id}-count"></span><button type="button" data-copy="${id}">Copy as CSV</button></div><div class="scroll" tabindex="0" role="region" aria-label="Table"><table id="${id}"><thead><tr>${columns.map((c, i) => `<th scope="col" class="${isText(id, i) ? "text" : ""}"><button type="button" data-sort="${id}:${i}"${c[3] ? ` title="${esc(c[3])}"` : ""}>${esc(c[0])}</button></th>`).join("")}</tr></thead><tbody></tbody></table></div>${meanings(columns)}`;
}
const meanings = columns => columns.some(c => c[3]) ? `<details class="soft"><summary>What the columns mean</summary><ul>${columns.filter(c => c[3]).map(c => `<li><b>${esc(c[0])}</b>: ${esc(c[3])}</li>`).join("")}</ul></details>` : "";
const isText = (id, i) => tables[id].texts[i];
const textOf = (c, r) => { const v = c[1](r); return none(v) ? "–" : c[2] ? c[2](v) : String(v); };
function visible(id) {
  const {columns, rows, sort, filter} = tables[id], words = filter.toLowerCase().split(/\s+/);
  const found = rows.filter(r => { const line = columns.map(c => textOf(c, r)).join(" ").toLowerCase(); return words.every(w => line.includes(w)); });
  if (!sort) return found;
  const value = columns[sort.column][1], sign = sort.descending ? -1 : 1;
  return found.sort((p, q) => { const a = value(p), b = value(q); if (none(a) || none(b)) return none(a) - none(b);
    return sign * (typeof a === "string" ? a.localeCompare(b, "en", {numeric: true}) : a - b); });
}
function fill(id) {
  const {columns, rows, sort} = tables[id], shown = visible(id), body = document.getElementById(id);
  body.tBodies[0].innerHTML = shown.slice(0, MOST).map(r => `<tr>${columns.map((c, i) => `<td${isText(id, i) ? ' class="text"' : ""}>${esc(textOf(c, r))}</td>`).join("")}</tr>`).join("");
  body.querySelectorAll("th").forEach((th, i) => th.setAttribute("aria-sort", sort && sort.column === i ? sort.descending ? "descending" : "ascending" : "none"));
  document.getElementById(id + "-count").textContent = (shown.length === rows.length ? `${whole(rows.length)} rows` : `${whole(shown.length)} of ${whole(rows.length)} rows`) + (shown.length > MOST ? `, the first ${whole(MOST)} shown` : "");
}
function sortBy(id, column) {
  const t = tables[id], same = t.sort && t.sort.column === column;
  t.sort = {column, descending: same ? !t.sort.descending : !isText(id, column)};
  fill(id);
}
// A quote mark stops spreadsheets from running a name that looks like a formula.
const cell = v => none(v) ? "" : typeof v === "number" ? String(v) : /[",\r\n]/.test(v) || /^[=+\-@\t]/.test(v) ? `"${(/^[=+\-@\t]/.test(v) ? "'" : "") + v.replace(/"/g, '""')}"` : v;
const csv = id => [tables[id].columns.map(c => cell(c[0])), ...visible(id).map(r => tables[id].columns.map(c => cell(c[1](r))))].map(l => l.join(",") + "\n").join("");
async function copy(button) {
  const text = csv(button.dataset.copy), label = "Copy as CSV";
  try { await navigator.clipboard.writeText(text); button.textContent = "Copied"; }
  catch {
    const area = Object.assign(document.createElement("textarea"), {value: text});
    document.body.append(area); area.select();
    button.textContent = document.execCommand("copy") ? "Copied" : "Not allowed here"; area.remove();
  }
  setTimeout(() => { button.textContent = label; }, 2000);
}

// Series: ten colors that colorblind readers can tell apart, and seven shapes.
const hue = i => `var(--c${i % 10})`;
function marker(i, x, y, r, more = "") {
  const s = r * .9, t = r * 1.2, d = [`M${x - r},${y}a${r},${r} 0 1,0 ${2 * r},0a${r},${r} 0 1,0 ${-2 * r},0Z`, `M${x - s},${y - s}h${2 * s}v${2 * s}h${-2 * s}Z`,
    `M${x},${y - t}L${x + t},${y + s}H${x - t}Z`, `M${x},${y - t * 1.1}L${x + t * 1.1},${y}L${x},${y + t * 1.1}L${x - t * 1.1},${y}Z`,
    `M${x},${y + t}L${x + t},${y - s}H${x - t}Z`, `M${x - r / 2.5},${y - t}h${r / 1.25}v${t - r / 2.5}h${t - r / 2.5}v${r / 1.25}h${r / 2.5 - t}v${t - r / 2.5}h${-r / 1.25}v${r / 2.5 - t}h${r / 2.5 - t}v${-r / 1.25}h${t - r / 2.5}Z`,
    `M${x - t},${y}L${x - t / 2},${y - r}H${x + t / 2}L${x + t},${y}L${x + t / 2},${y + r}H${x - t / 2}Z`][i % 7];
  return `<path class="mark" d="${d}" fill="${hue(i)}" stroke="var(--card)" ${more}/>`;
}
const legend = list => `<div class="legend">${list.map(([i, name]) => `<span><svg width="14" height="14" aria-hidden="true">${marker(i, 7, 7, 5)}</svg>${esc(name)}</span>`).join("")}</div>`;

// Charts. draw(width, ...options) returns an SVG of that width; the card's selects give the options.
const charts = {};
const chart = (id, draw, least = () => 0) => { charts[id] = {draw, least}; return `<div class="chart" id="${id}"></div>`; };
const choose = (id, options) => `<select data-view="${id}" aria-label="What to show">${options.map(o => `<option>${esc(o)}</option>`).join("")}</select>`;
const svg = (w, h, inner, label) => `<svg width="${w}" height="${h}" viewBox="0 0 ${w} ${h}" role="img" tabindex="0" aria-label="${esc(label)}. The arrow keys move through the values.">${inner}</svg>`;
const tip = text => `data-tip="${esc(text)}"`;
const power = e => "×10" + String(e).replace(/[-\d]/g, c => c === "-" ? "⁻" : "⁰¹²³⁴⁵⁶⁷⁸⁹"[c]);
function ticks(lo, hi, n, integer) {
  if (!(hi > lo)) return [lo];
  const raw = (hi - lo) / n, p = 10 ** Math.floor(Math.log10(raw)), s = Math.max([1, 2, 5, 10].find(k => k * p >= raw * .999) * p, integer ? 1 : 0), t = [];
  for (let v = Math.ceil(lo / s - 1e-9) * s; v <= hi + s * 1e-6; v += s) t.push(Math.abs(v) < s * 1e-6 ? 0 : v);
  return t;
}
function axis([lo, hi], n, title, integer) {
  const top = Math.max(Math.abs(lo), Math.abs(hi)), e = !integer && top && (top < .01 || top >= 1e5) ? Math.floor(Math.log10(top)) : 0, k = 10 ** e;
  const list = ticks(lo / k, hi / k, n, integer), step = list.length > 1 ? list[1] - list[0] : list[0] || 1, digits = Math.max(0, -Math.floor(Math.log10(Math.abs(step)) + 1e-9));
  return {title: title + (e ? ` (${power(e)})` : ""), marks: list.map(v => [v * k, integer ? whole(v) : v.toFixed(Math.min(digits, 6)).replace("-", "−")])};
}
// Axes of a chart: x and y are {range, title, integer}; x null leaves room for own labels below.
function frame(w, h, x, y, below = 44) {
  const yAxis = axis(y.range, 5, y.title, y.integer), L = 34 + 6.6 * Math.max(...yAxis.marks.map(m => m[1].length)), R = 12, T = 12, B = below;
  const [x0, x1] = x.range, [y0, y1] = y.range, X = v => L + (v - x0) / ((x1 - x0) || 1) * (w - L - R), Y = v => h - B - (v - y0) / ((y1 - y0) || 1) * (h - T - B);
  let s = yAxis.marks.map(([v, t]) => `<line class="axis" x1="${L}" x2="${w - R}" y1="${Y(v)}" y2="${Y(v)}"/><text x="${L - 6}" y="${Y(v) + 4}" text-anchor="end">${t}</text>`).join("");
  s += `<text class="name" transform="translate(12,${(h - B + T) / 2}) rotate(-90)" text-anchor="middle">${yAxis.title}</text>`;
  if (x.title !== null) {
    const xAxis = axis(x.range, Math.max(2, Math.min(6, (w - L) / 70)), x.title, x.integer);
    s += xAxis.marks.map(([v, t]) => `<text x="${X(v)}" y="${h - B + 16}" text-anchor="middle">${t}</text>`).join("");
    s += `<text class="name" x="${(L + w - R) / 2}" y="${h - 6}" text-anchor="middle">${xAxis.title}</text>`;
  }
  return {X, Y, s, left: L, right: w - R, bottom: h - B};
}
// The scale of a heat map, 40 px high: from lo to hi, through 0 where lo is negative.
let bars = 0;
const tint = (v, lo, hi) => { const a = lo < 0 ? Math.abs(v) / Math.max(-lo, hi) : (v - lo) / ((hi - lo) || 1); return `rgba(var(--${v < 0 ? "neg" : "heat"}),${(.06 + .94 * Math.min(1, Math.max(0, a))).toFixed(3)})`; };
function colorBar(x, y, w, lo, hi, text, title) {
  const id = `bar${++bars}`, stop = v => `<stop offset="${(v - lo) / ((hi - lo) || 1)}" style="stop-color:${tint(v, lo, hi)}"/>`, middle = (lo + hi) / 2;
  const marks = [[lo, "start"], [middle, "middle"], [hi, "end"]];
  return `<linearGradient id="${id}">${stop(lo)}${lo < 0 && hi > 0 ? stop(0) : ""}${stop(hi)}</linearGradient><text class="name" x="${x}" y="${y + 10}">${esc(title)}</text><rect x="${x}" y="${y + 15}" width="${w}" height="8" rx="3" fill="url(#${id})" stroke="var(--line)"/>`
    + marks.map(([v, a], i) => `<text x="${x + i * w / 2}" y="${y + 36}" text-anchor="${a}">${text(v)}</text>`).join("");
}
function draw(id, width) {
  const box = document.getElementById(id), picks = [...document.querySelectorAll(`select[data-view="${id}"]`)].map(s => s.value), w = Math.max(width || box.clientWidth, charts[id].least());
  if (w > 100) box.innerHTML = charts[id].draw(w, ...picks);
}

// Tooltips: by mouse, and by arrow keys inside a focused chart.
const bubble = document.getElementById("tip");
function hideTip() { bubble.style.display = "none"; for (const e of document.querySelectorAll(".on")) e.classList.remove("on"); }
function showTip(e, x, y) {
  bubble.textContent = e.dataset.tip; bubble.style.display = "block";
  bubble.style.left = Math.max(8, Math.min(x + 14, innerWidth - bubble.offsetWidth - 8)) + "px";
  bubble.style.top = Math.max(8, Math.min(y + 14, innerHeight - bubble.offsetHeight - 8)) + "px";
}
document.addEventListener("mousemove", e => { const t = e.target.closest && e.target.closest("[data-tip]"); hideTip(); if (t) showTip(t, e.clientX, e.clientY); });
document.addEventListener("focusout", hideTip);
document.addEventListener("keydown", e => {
  const step = {ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1}[e.key], graph = e.target.closest && e.target.closest("svg[tabindex]");
  if (e.key === "Escape") hideTip();
  if (!step || !graph) return;
  const list = [...graph.querySelectorAll("[data-tip]")], at = list.findIndex(t => t.classList.contains("on"));
  if (!list.length) return;
  e.preventDefault(); hideTip();
  const t = list[at < 0 ? step > 0 ? 0 : list.length - 1 : (at + step + list.length) % list.length];
  t.classList.add("on"); t.scrollIntoView({block: "nearest", inline: "nearest"});
  const r = t.getBoundingClientRect();
  showTip(t, r.right, r.bottom);
});

// Puts the page together: html, then how it was made.
function show(html) {
  const page = document.getElementById("page"), facts = data.provenance;
  if (facts) html += `<footer class="soft"><p>${Object.entries(facts).filter(f => f[0] !== "command").map(f => esc(f[1])).join(" · ")}</p>${facts.command ? `<p><code>${esc(facts.command)}</code></p>` : ""}</footer>`;
  page.innerHTML = html;
  const all = width => { for (const id in charts) draw(id, width && (document.getElementById(id).closest(".wide") ? 650 : 310)); };
  for (const s of document.querySelectorAll("select[data-view]")) s.onchange = () => draw(s.dataset.view);
  for (const b of document.querySelectorAll("[data-sort]")) b.onclick = () => { const [id, i] = b.dataset.sort.split(":"); sortBy(id, +i); };
  for (const b of document.querySelectorAll("[data-copy]")) b.onclick = () => copy(b);
  for (const f of document.querySelectorAll("[data-filter]")) f.oninput = () => { tables[f.dataset.filter].filter = f.value.trim(); fill(f.dataset.filter); };
  Object.keys(tables).forEach(fill); all();
  let before = innerWidth;
  addEventListener("resize", () => { if (innerWidth !== before) { before = innerWidth; all(); } });
  addEventListener("beforeprint", () => { hideTip(); all(true); });
  addEventListener("afterprint", () => all());
}
