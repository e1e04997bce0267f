
// The report of an analysis or a comparison.
// The same module has the same color and shape in every report; other names share the last three colors.
const KNOWN = ["q_proj q_b_proj wq query_key_value qkv_proj c_attn", "k_proj kv_a_proj_with_mqa wk", "v_proj kv_b_proj wv", "o_proj out_proj dense wo",
  "gate_proj gate_up_proj w1", "up_proj fc1 c_fc w3 dense_h_to_4h", "down_proj fc2 w2 dense_4h_to_h c_proj"].map(t => t.split(" "));
function look(module) {
  const known = KNOWN.findIndex(names => names.includes(module));
  if (known >= 0) return known;
  let hash = 7;
  for (const c of module) hash = (hash * 31 + c.codePointAt(0)) % 10007;
  return 7 + hash % 3 + 10 * (hash % 7);
}
const everything = data.layers || data.pairs, rows = everything, moduleOf = n => n.split("[")[0].split(".").pop();
const layerOf = n => { const p = n.split(".").find(x => /^\d+$/.test(x)); return p === undefined ? null : +p; };
const place = m => { const i = KNOWN.findIndex(names => names.includes(m)); return i < 0 ? 99 : i; };
const modules = [...new Set(rows.map(r => moduleOf(r.name)))].sort((a, b) => place(a) - place(b) || (a < b ? -1 : 1));
const moduleLegend = () => legend(modules.map(m => [look(m), m]));
const many = (n, one, more) => `${whole(n)} ${n === 1 ? one : more}`;
const describe = r => `${r.name}\nΔM ${num(r.delta_m, 5)}   relative ${pct(r.delta_m_relative)}\nΔD ${num(r.delta_d, 5)}   mean angle ${deg(r.mean_angle)}\nmagnitude's share ${pct(r.radial_share)}\neffective rank ${r.effective_rank ? num(r.effective_rank) : "–"}${r.rank ? " of " + r.rank : ""}\n${r.classification}`;

// The range of an axis: from 0, unless all values are far from it.
function span(key) {
  const values = rows.map(r => r[key]), low = Math.min(...values), high = Math.max(...values) || 1, pad = .08 * (high - low);
  return low > high / 2 && pad ? [low - pad, high + pad] : [0, high * 1.05];
}
function scatter(w, key, title) {
  const h = Math.max(260, Math.min(340, w * .66)), f = frame(w, h, {range: span(key), title}, {range: span("delta_d"), title: "ΔD"});
  const spots = new Map(); // points in the same place, which would hide each other
  for (const r of rows) { const x = Math.round(f.X(r[key])), y = Math.round(f.Y(r.delta_d)), k = x + "," + y; if (!spots.has(k)) spots.set(k, {x, y, members: []}); spots.get(k).members.push(r); }
  const points = rows.map(r => marker(look(r.module), f.X(r[key]), f.Y(r.delta_d), 5, tip(describe(r)))).join("");
  return svg(w, h, f.s + points + [...spots.values()].filter(s => s.members.length > 2).map(s => `<text class="name count" x="${s.x + 8}" y="${s.y - 7}" ${tip(s.members.map(r => r.name).slice(0, 12).join("\n") + (s.members.length > 12 ? `\nand ${s.members.length - 12} more` : ""))}>×${s.members.length}</text>`).join(""), `${title} against ΔD, ${many(rows.length, "matrix", "matrices")}`);
}

function heat(w, value, text, title, detail, rows = everything) {
  const layers = [...new Set(rows.map(r => layerOf(r.name)))].sort((a, b) => (a ?? -1) - (b ?? -1)), L = 14 + 6.4 * Math.min(16, Math.max(...modules.map(m => m.length)));
  const cw = Math.min(60, (w - L - 4) / layers.length), ch = Math.max(22, Math.min(37, 280 / modules.length)), end = modules.length * ch, h = end + 86, cells = new Map();
  for (const r of rows) { const k = moduleOf(r.name) + "|" + layerOf(r.name); if (!none(value(r))) cells.set(k, [...(cells.get(k) || []), r]); }
  const means = [...cells.values()].map(g => mean(g.map(value))), least = Math.min(...means, Infinity), most = Math.max(...means, -Infinity);
  const size = Math.max(Math.abs(least), Math.abs(most)), [lo, hi] = !means.length ? [0, 1] : least < 0 ? [-size, size] : [least, most > least ? most : least || 1];
  let s = "";
  modules.forEach((m, i) => {
    s += `<text x="${L - 8}" y="${i * ch + ch / 2 + 4}" text-anchor="end">${esc(cut(m, 16))}</text>`;
    layers.forEach((l, j) => {
      const g = cells.get(m + "|" + l);
      if (!g) return;
      const v = mean(g.map(value)), head = g.length > 1 ? `${m}, layer ${l ?? "–"}\nmean of ${g.length}: ` : g[0].name + "\n";
      s += `<rect x="${L + j * cw + 1}" y="${i * ch + 1}" width="${Math.max(1, cw - 2)}" height="${ch - 2}" rx="3" fill="${tint(v, lo, hi)}" ${tip(`${head}${title} ${text(v)}${detail ? "\n" + g.map(detail).join("\n") : ""}`)}/>`;
    });
  });
  const step = Math.ceil(22 / cw);
  layers.forEach((l, j) => { if (j % step === 0) s += `<text x="${L + (j + .5) * cw}" y="${end + 16}" text-anchor="middle">${l ?? "–"}</text>`; });
  s += `<text class="name" x="${L + layers.length * cw / 2}" y="${end + 34}" text-anchor="middle">layer</text>`;
  return svg(w, h, s + colorBar(L, end + 44, Math.min(260, w - L - 10), lo, hi, text, title), `${title} by layer and module`);
}

const ordered = [...rows].sort((a, b) => modules.indexOf(moduleOf(a.name)) - modules.indexOf(moduleOf(b.name)) || (a.layer ?? -1) - (b.layer ?? -1));
function boxes(w, key, scale, title, isSigned) {
  const q = r => r.quantiles[key].map(v => v * scale), h = 258, top = Math.max(...ordered.map(r => q(r)[5])) * 1.08 || 1, low = isSigned ? Math.min(0, ...ordered.map(r => q(r)[1])) * 1.08 : 0;
  const f = frame(w, h, {range: [0, ordered.length], title: null}, {range: [low, top], title}, 46), one = f.X(1) - f.X(0), bw = Math.min(16, one * .62), step = Math.ceil((3 + 6.2 * String(Math.max(...ordered.map(r => r.layer ?? 0))).length) / one);
  let s = f.s, from = 0, own = 0;
  ordered.forEach((r, i) => {
    const v = q(r), x = f.X(i + .5), c = hue(look(r.module)), last = i === ordered.length - 1 || ordered[i + 1].module !== r.module;
    s += `<g ${tip(r.name + "\n" + ["least", "5 %", "25 %", "median", "75 %", "95 %", "most"].map((n, k) => `${n} ${num(v[k], 4)}`).join("\n"))}><rect x="${x - bw / 2 - 1}" y="${f.Y(v[5])}" width="${bw + 2}" height="${Math.max(1, f.Y(v[1]) - f.Y(v[5]))}" fill="transparent" stroke="none"/><line x1="${x}" x2="${x}" y1="${f.Y(v[1])}" y2="${f.Y(v[5])}" stroke="${c}"/><rect x="${x - bw / 2}" y="${f.Y(v[4])}" width="${bw}" height="${Math.max(1, f.Y(v[2]) - f.Y(v[4]))}" rx="2" fill="${c}" stroke="none"/><line x1="${x - bw / 2}" x2="${x + bw / 2}" y1="${f.Y(v[3])}" y2="${f.Y(v[3])}" stroke="var(--card)" stroke-width="2"/></g>`;
    if (!none(r.layer) && own % step === 0) s += `<text class="layer" x="${x}" y="${h - 28}" text-anchor="middle">${r.layer}</text>`;
    own += 1;
    if (!last) return;
    const a = f.X(from) + 3, b = f.X(i + 1) - 3;
    s += `<line class="axis" x1="${a}" x2="${b}" y1="${h - 21}" y2="${h - 21}"/><text class="name" x="${(a + b) / 2}" y="${h - 6}" text-anchor="middle">${esc(cut(r.module, Math.max(3, Math.floor((b - a) / 6.2))))}</text>`;
    from = i + 1; own = 0;
  });
  return svg(w, h, s, title + " of the rows of each matrix");
}
const roomy = () => Math.min(4000, 60 + Math.max(4 * ordered.length, 66 * modules.length));

function curve(w, log, keys, what) {
  const h = 250, series = keys.map(k => log.filter(r => typeof r[k] === "number").map(r => [r.step, r[k]])), all = series.flat();
  const range = i => { const v = all.map(p => p[i]), a = Math.min(...v), b = Math.max(...v); return [a, b > a ? b : a + 1]; }, losses = range(1), pad = .06 * (losses[1] - losses[0]);
  const f = frame(w, h, {range: range(0), title: "step", integer: true}, {range: [losses[0] - pad, losses[1] + pad], title: what}), style = i => `stroke="${hue(i ? 4 : 0)}" stroke-width="2"${i ? ' stroke-dasharray="6 4"' : ""}`;
  return svg(w, h, f.s + series.map((p, i) => `<polyline fill="none" ${style(i)} points="${p.map(q => f.X(q[0]) + "," + f.Y(q[1])).join(" ")}"/>` + p.map(q => marker(i ? 4 : 0, f.X(q[0]), f.Y(q[1]), 4, tip(`${["training", "validation"][i]} ${what}\nstep ${whole(q[0])}: ${num(q[1], 5)}`))).join("")).join(""), what[0].toUpperCase() + what.slice(1) + " over steps");
}

function grid(w, measure, title) {
  const m = data.matrices[measure], n = m.length, longest = Math.max(...data.labels.map(t => Math.min(t.length, 18))), L = 14 + 6.4 * longest, c = Math.max(22, Math.min(72, (w - L - 8) / n)), tilted = longest * 6.4 > c - 6, below = tilted ? 20 + 4.6 * longest : 24;
  const known = m.flat().filter(v => v !== null), signedBar = known.some(v => v < 0), h = n * c + below + 48, lo = signedBar ? -1 : 0;
  let s = "";
  m.forEach((line, i) => {
    const x = L + i * c + c / 2, y = n * c + 15, name = esc(cut(data.labels[i], 18));
    s += `<text class="name" x="${L - 8}" y="${i * c + c / 2 + 4}" text-anchor="end">${name}</text><text class="name" text-anchor="${tilted ? "end" : "middle"}" transform="translate(${x + (tilted ? 5 : 0)},${y}) rotate(${tilted ? -40 : 0})">${name}</text>`;
    line.forEach((v, k) => {
      if (v === null) return;
      s += `<rect x="${L + k * c + 1}" y="${i * c + 1}" width="${c - 2}" height="${c - 2}" rx="4" fill="${tint(v, lo, 1)}" ${tip(`${data.labels[i]}\n${data.labels[k]}\n${title} ${num(v, 5)}`)}/>`;
      if (c >= 34) s += `<text x="${L + k * c + c / 2}" y="${i * c + c / 2 + 4}" text-anchor="middle" style="fill:${Math.abs(v) > .8 ? "var(--card)" : Math.abs(v) > .62 ? "#15171a" : "var(--ink)"};pointer-events:none">${lo < 0 ? signed(v) : v.toFixed(2)}</text>`;
    });
  });
  return svg(w, h, s + colorBar(L, n * c + below + 4, Math.min(240, w - L - 10), lo, 1, v => v && lo < 0 ? signed(v, 1) : num(v, 2), title), title + " of each pair of adapters");
}

const advice = card("What the numbers suggest", "Each line is one stated rule; see docs/analysis.md.", bullets(data.guidance.map(g => g.sentence)), true);
function comparison() {
  const grids = {"cosine of the updates": "update_cosine", "cosine of adapted rows": "direction_cosine", "overlap of what they read": "input_overlap", "overlap of what they write": "output_overlap", "Δm of opposite sign": "sign_conflict"};
  const heats = {"cosine of the updates": r => r.update_cosine, "overlap of what they read": r => r.input_overlap, "overlap of what they write": r => r.output_overlap, "disturbance of the first": r => r.disturbs_first, "disturbance of the second": r => r.disturbs_second, "Δm of opposite sign": r => r.sign_conflict};
  const pair = r => `${data.labels[r.first]} – ${data.labels[r.second]}`, names = [...new Set(data.pairs.map(pair))], several = names.length > 1, all = `mean of ${names.length} pairs`, three = v => num(v);
  const columns = [["matrix", r => r.name], ["pair", pair], ["cosine", r => r.update_cosine, v => signed(v, 3), "Cosine of the two updates: +1 agree, 0 unrelated, −1 opposed"], ["reads", r => r.input_overlap, three, "Overlap of the input directions, 0 to 1"],
    ["writes", r => r.output_overlap, three, "Overlap of the output directions, 0 to 1"], ["Δm opposed", r => r.sign_conflict, pct, "Share of the magnitude changes that have opposite signs"],
    ["disturbs 1st", r => r.disturbs_first, three, "Size of the second's output on the first's inputs, relative to the first's"], ["disturbs 2nd", r => r.disturbs_second, three, "Size of the first's output on the second's inputs, relative to the second's"]];
  return `<h1>${data.adapters.length} adapters compared</h1><p class="soft">${data.labels.map((a, i) => esc(a) + (none(data.adapter_ranks[i]) ? "" : ` (rank ${data.adapter_ranks[i]})`)).join(" · ")}</p><div class="grid">${advice}`
    + card("Adapter against adapter", "Energy-weighted means over matrices.", chart("grid", (w, o) => grid(w, grids[o], o)), false, choose("grid", Object.keys(grids)))
    + card("Where they agree", `By layer and module${Math.min(...rows.map(r => r.update_cosine)) < 0 ? "; orange is negative" : ""}.`, chart("heat", (w, o, p) => heat(w, heats[o], num, o, several ? r => `${pair(r)} ${num(heats[o](r))}` : null, several && p !== all ? rows.filter(r => pair(r) === p) : rows)), false, choose("heat", Object.keys(heats)) + (several ? choose("heat", [all, ...names]) : ""))
    + card("Every pair on every matrix", "The most opposed first. Click a heading to sort.", table("pairs", columns, data.pairs, {column: 2, descending: false}), true) + "</div>";
}
function adaptation() {
  const c = data.correlation, ranks = [...new Set(rows.map(r => r.rank).filter(Boolean))].sort((a, b) => a - b), left = data.unchanged.length;
  const lead = `${esc(data.source)} on ${esc(data.base)}` + (ranks.length ? ` · rank ${ranks.length > 1 ? `${ranks[0]} to ${ranks[ranks.length - 1]}` : ranks[0]}` : "") + (left ? ` · ${many(left, "matrix is", "matrices are")} equal in both models and left out` : "");
  const head = `<h1>${data.kind === "adapter" ? "What the adapter did" : "What fine-tuning did"}</h1><p class="soft">${lead}</p>`;
  if (!rows.length) return `${head}<div class="grid">${advice}</div>`;
  const trained = legend([[0, "training"], [4, "validation (dashed)"]]), sampled = [["step", r => r.step, whole], ["set", r => r.set], ["prompt", r => r.prompt], ["completion", r => r.completion], ["reward", r => r.reward, v => num(v)]];
  const keys = {"absolute ΔM": ["delta_m", "ΔM"], "relative ΔM": ["delta_m_relative", "ΔM / ‖W₀‖"]};
  const heats = {"mean angle": [r => r.mean_angle, deg], "relative ΔM": [r => r.delta_m_relative, pct], "magnitude's share": [r => r.radial_share, pct], ...(rows.some(r => r.effective_rank) ? {"effective rank": [r => r.effective_rank, num]} : {})};
  const boxed = {"angle, degrees": ["angle", 180 / Math.PI], "Δm / ‖W₀‖, percent": ["delta_m_relative", 100, true]};
  const columns = [["matrix", r => r.name], ["ΔM", r => r.delta_m, v => num(v), "Mean change of a row's length"], ["relative ΔM", r => r.delta_m_relative, pct, "The same, as a share of the length"], ["ΔD", r => r.delta_d, v => v.toExponential(2), "Mean of 1 − cosine of a row's angle"],
    ["angle", r => r.mean_angle, deg, "Mean angle of a row (CSV: radians)"], ["Δm with angle", r => r.correlation, v => signed(v), "Correlation of both over the rows"], ["eff. rank", r => r.effective_rank || null, v => num(v), "How many directions the update uses, weighted by energy"], ["kind", r => r.classification, null, "What most rows did: rotated, amplified, attenuated, mixed, or minimal (less than a thousandth)"]];
  return `${head}${tiles([[whole(rows.length), left ? `of ${whole(rows.length + left)} matrices changed` : rows.length === 1 ? "matrix" : "matrices"], [deg(mean(rows.map(r => r.mean_angle))), "mean angle of a row"], [pct(mean(rows.map(r => r.delta_m_relative))), "mean change of length"], [pct(data.radial_share), "of the squared change is magnitude"],
    [signed(c.pearson), `correlation of ΔM with ΔD${none(c.interval[0]) ? "" : ` (95 %: ${signed(c.interval[0])} to ${signed(c.interval[1])}; n ${c.n})`}`]])}<div class="grid">${advice}`
    + card("Magnitude against direction", "Each point is a matrix, as in figure 2 of the DoRA paper.", chart("scatter", (w, o) => scatter(w, ...keys[o])) + moduleLegend(), false, choose("scatter", Object.keys(keys)))
    + card("Layer by module", "The bar below is the scale.", chart("heat", (w, o) => heat(w, ...heats[o], o)), false, choose("heat", Object.keys(heats)))
    + card("Rows inside each matrix", "Median, middle half, and 5 to 95 % of the rows; the numbers are layers.", chart("dist", (w, o) => boxes(w, boxed[o][0], boxed[o][1], o, boxed[o][2]), roomy), true, choose("dist", Object.keys(boxed)))
    + (data.log && data.log.length > 1 ? card("Training", "From log.jsonl beside the adapter.", chart("curve", w => curve(w, data.log, ["train_loss", "val_loss"], "loss")) + trained, true) : "")
    + (data.samples && data.samples.curve.length > 1 ? card("Rewards", "Mean reward of the completions sampled at each step.", chart("rewards", w => curve(w, data.samples.curve, ["train", "valid"], "reward")) + trained, true) : "")
    + (data.samples ? card("Samples", "The latest completions in samples.jsonl. Click a heading to sort.", table("samples", sampled, data.samples.rows), true) : "")
    + card("Every matrix", "Click a heading to sort.", table("matrices", columns, rows, {column: 3, descending: true}), true) + "</div>";
}
show(data.kind === "comparison" ? comparison() : adaptation());
