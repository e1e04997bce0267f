
// What would be trained: a preview of data, memory and models.
const survey = data.survey, gb = v => v >= 1e9 ? (v / 1e9).toFixed(2) + " GB" : (v / 1e6).toFixed(0) + " MB";
const splitTitle = {train: "training", valid: "validation", test: "test"};
const LOOK = {context: "color:var(--soft)", target: "background:rgba(var(--heat),.2);border-radius:3px;padding:1px 0", cut: "color:var(--soft);text-decoration:line-through"};
const WORD = {context: "read, not trained", target: "trained", cut: "cut off"};
const mark = (kind, text) => kind === "target" ? `<mark style="color:inherit;${LOOK.target}">${text}</mark>` : `<span style="${LOOK[kind]}">${text}</span>`;
const sample = s => `<h3 style="font-size:13px;font-weight:500;margin:12px 0 4px" class="soft">${esc(s.where)}, ${whole(s.tokens)} tokens</h3><div class="sample" style="white-space:pre-wrap;overflow-wrap:anywhere;font-size:13.5px">${s.pieces.map(p => mark(p.kind, esc(p.text))).join("")}</div>`;
function lengthChart(w, split) {
  const bins = split.histogram, h = 240, top = Math.max(...bins.map(b => b[2])), end = bins[bins.length - 1][1], f = frame(w, h, {range: [0, end], title: "tokens", integer: true}, {range: [0, top * 1.05], title: "rows", integer: true});
  let s = f.s + bins.filter(b => b[2]).map(([lo, hi, n]) => `<rect x="${f.X(lo - 1) + 1}" y="${f.Y(n)}" width="${Math.max(1, f.X(hi) - f.X(lo - 1) - 2)}" height="${f.bottom - f.Y(n)}" rx="2" fill="${hue(0)}" ${tip(`${whole(lo)} to ${whole(hi)} tokens: ${whole(n)} ${n === 1 ? "row" : "rows"}`)}/>`).join("");
  if (survey.max_seq_length < end) s += `<line x1="${f.X(survey.max_seq_length)}" x2="${f.X(survey.max_seq_length)}" y1="12" y2="${f.bottom}" stroke="${hue(4)}" stroke-width="2" stroke-dasharray="5 4"/><text class="name" x="${f.X(survey.max_seq_length) - 5}" y="22" text-anchor="end">cut</text>`;
  return svg(w, h, s, `Lengths of the ${splitTitle[split.name]} rows`);
}
const names = survey.splits.map(s => splitTitle[s.name]), byName = n => survey.splits[names.indexOf(n)] || survey.splits[0];
const first = survey.splits[0], notes = survey.splits.flatMap(s => s.notes.map(n => ({...n, split: splitTitle[s.name]}))), leaks = survey.repeats.filter(r => r.leaks);
const fit = data.plan ? `<p>${data.plan.fits ? "A training that cuts no row fits" : "A training that cuts no row does not fit as it is"}: ${data.plan.batch_size} rows padded to ${whole(data.plan.length)} tokens need ${gb(data.plan.peak)} of the ${gb(data.limit)} that MLX may use on this machine.</p><p>Suggested: <code>${esc(data.flags.join(" "))}</code></p>` : `<p>${esc(data.problem)}</p>`;
show(`<h1>What would be trained</h1><p class="soft">${esc(data.data)} · tokens of ${esc(data.model)} · ${survey.splits.map(s => `${whole(s.rows)} ${splitTitle[s.name]}`).join(", ")} rows</p>`
  + tiles([[whole(first.rows), `${splitTitle[first.name]} rows`], [whole(first.tokens), "tokens, after cutting"], [pct(first.targets / Math.max(first.tokens, 1)), "of them are trained"], [whole(first.longest), "tokens in the longest row"], [whole(first.notes.length), "rows cut, skipped or incomplete"], [whole(leaks.length), "rows in two splits"]])
  + `<div class="grid">`
  + card("Rows as they are trained", ["target", "context", "cut"].map(k => mark(k, WORD[k])).join(" · "), survey.splits.map(s => s.samples.map(sample).join("")).join(""), true)
  + card("Lengths", "Before cutting.", chart("lengths", (w, o) => lengthChart(w, byName(o))), false, choose("lengths", names))
  + card("This machine", "Predicted from the shapes of the model; see docs/memory.md.", fit, false)
  + (notes.length ? card("Rows not trained as they stand", "", table("notes", [["row", n => n.where], ["split", n => n.split], ["tokens", n => n.tokens, whole], ["what happens", n => n.what]], notes), true) : "")
  + (survey.repeats.length ? card("Repeated rows", "Rows with the same tokens as an earlier row. A row in two splits makes the validation loss too good.", table("repeats", [["row", r => r.second], ["equals", r => r.first], ["in two splits", r => r.leaks ? "yes" : "no"]], survey.repeats), true) : "")
  + card("Models that would fit", `DoRA with these rows and ${gb(data.limit)}; lengths as this tokenizer counts them.`, table("models", [["model", m => m.name], ["parameters", m => m.parameters, v => (v / 1e9).toFixed(2) + " B"], ["peak, 16-bit", m => m.peak_16bit, gb], ["peak, 4-bit", m => m.peak_4bit, gb], ["fits", m => m.fits || "no"]], data.models), true)
  + "</div>");
