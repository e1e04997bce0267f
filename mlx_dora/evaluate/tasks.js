
// A base and adapters, merged or not, on several tasks.
const {models, tasks} = data, names = tasks.map(t => t.name), adapters = models.slice(1);
const change = (t, m) => none(t.losses[m]) || none(t.losses[0]) ? null : t.losses[m] - t.losses[0];
const reach = t => Math.max(...adapters.map((_, i) => -(change(t, i + 1) ?? 0)), 0); // the largest gain of an adapter
const lines = models.map((name, m) => ({name, m, losses: tasks.map(t => t.losses[m]), mean: tasks.some(t => none(t.losses[m])) ? null : mean(tasks.map(t => t.losses[m]))}));
const above = adapters.flatMap((name, i) => tasks.filter(t => change(t, i + 1) > 0).map(t => `${name} is worse than the base on ${t.name}: loss ${num(t.losses[i + 1], 4)} against ${num(t.losses[0], 4)}.`));
const fixed = v => v.toFixed(4);

// Each cell is the change of the loss as a share of the largest gain of an adapter on that task: blue is better than the base, red worse.
function grid(w) {
  const longest = Math.min(24, Math.max(...models.map(n => n.length))), L = 14 + 6.6 * longest, cw = Math.max(64, Math.min(150, (w - L - 8) / names.length)), ch = 34, top = 24;
  let s = names.map((n, k) => `<text class="name" x="${L + (k + .5) * cw}" y="14" text-anchor="middle">${esc(cut(n, Math.floor(cw / 6.6)))}</text>`).join("");
  models.forEach((name, m) => {
    s += `<text class="name" x="${L - 8}" y="${top + m * ch + ch / 2 + 4}" text-anchor="end">${esc(cut(name, 24))}</text>`;
    tasks.forEach((t, k) => {
      const c = change(t, m), most = reach(t) || Math.abs(t.losses[0]) || 1, share = none(c) ? null : Math.max(-1, Math.min(1, -c / most));
      s += `<rect class="cell" x="${L + k * cw + 1}" y="${top + m * ch + 1}" width="${cw - 2}" height="${ch - 2}" rx="4" fill="${none(share) ? "none" : tint(share, -1, 1)}" ${tip(`${name} on ${t.name}\nloss ${none(t.losses[m]) ? "not finite" : fixed(t.losses[m])}\nchange ${none(c) ? "–" : signed(c, 4)}\nshare of the largest gain ${none(c) || !reach(t) ? "–" : pct(-c / reach(t)).replace("-", "−")}${none(t.accuracies[m]) ? "" : `\naccuracy ${pct(t.accuracies[m])}`}`)}/>`;
      s += `<text class="value" x="${L + (k + .5) * cw}" y="${top + m * ch + ch / 2 + 4}" text-anchor="middle" pointer-events="none" style="${!none(share) && Math.abs(share) > .55 ? "fill:var(--card)" : "fill:var(--ink)"}">${none(t.losses[m]) ? "–" : t.losses[m].toFixed(3)}</text>`;
    });
  });
  return svg(Math.max(w, L + names.length * cw + 8), top + models.length * ch + 6, s, "Loss by model and task");
}
const least = () => 14 + 6.6 * 24 + 64 * names.length;
const lossColumns = [["model", r => r.name], ...names.map((n, k) => [n, r => r.losses[k], fixed]), ["mean", r => r.mean, fixed, "mean of the losses over the tasks"]];
const labelled = tasks.filter(t => !none(t.accuracies[0])), accuracyColumns = [["model", r => r.name], ...labelled.map(t => [t.name, r => t.accuracies[r.m], pct])];
const quote = text => `<div style="white-space:pre-wrap;overflow-wrap:anywhere;font-size:13.5px">${esc(text.trim()) || "–"}</div>`;
const said = (who, text) => `<h4 style="font-size:12.5px;font-weight:500;margin:8px 0 0" class="soft">${esc(who)}</h4>${quote(text)}`;
const samples = t => t.prompts.map((p, i) => `<details class="sample"${i ? "" : " open"}><summary>${esc(cut(p.text.trim(), 90))}</summary>${said("prompt", p.text)}${said("data", p.expected)}${models.map((n, m) => said(n, p.samples[m])).join("")}</details>`).join("");
const byMean = adapters.length && lines.slice(1).filter(l => !none(l.mean)).sort((a, b) => a.mean - b.mean)[0];
show(`<h1>${adapters.length ? "What the adapters do to each task" : "The base on each task"}</h1><p class="soft">${tasks.map(t => `${esc(t.name)}: ${whole(t.rows)} ${t.split} rows, ${whole(t.tokens)} target tokens`).join(" · ")}</p>`
  + tiles([[whole(tasks.length), tasks.length === 1 ? "task" : "tasks"], [whole(adapters.length), adapters.length === 1 ? "adapter" : "adapters"], [num(lines[0].mean, 4), "mean loss of the base"], ...(byMean ? [[num(byMean.mean, 4), `least mean loss, by ${esc(byMean.name)}`]] : [])])
  + `<div class="grid">`
  + card("Losses", "Blue is better than the base, red is worse. The darkest blue in a column is the adapter with the least loss.", chart("cells", grid, least), true)
  + (above.length ? card("Worse than the base", "", bullets(above), true) : "")
  + card("All losses", "Mean loss of a target token.", table("losses", lossColumns, lines), true)
  + (labelled.length ? card("Accuracy", "Share of rows whose own label ranks highest.", table("accuracies", accuracyColumns, lines), true) : "")
  + tasks.filter(t => t.prompts.length).map(t => card(`Samples of ${esc(t.name)}`, "Continuations of the same prompts.", samples(t), true)).join("")
  + "</div>");
