"""The report in a real browser: complete, right, and without console errors."""

import base64
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_dora.analyze import analyze_finetune
from mlx_dora.analyze.agreement import PairAgreement
from mlx_dora.analyze.compare import AdapterComparison
from mlx_dora.analyze.report import render_report
from mlx_dora.errors import DoRAError
from tests.analyze.test_agreement import agreement
from tests.browser import Browser, Tab

MODULES = ("self_attn.q_proj", "mlp.up_proj")
LOG = [{"step": 5 * i, "train_loss": 3 - i / 9, "val_loss": None} for i in range(1, 9)]


def two_models(layers: int = 3, unchanged: int = 0) -> tuple[dict[str, Any], ...]:
    """Return a model before and after; `unchanged` of its layers are equal in both."""
    mx.random.seed(3)
    names = [f"model.layers.{i}.{m}.weight" for i in range(layers) for m in MODULES]
    base = {name: mx.random.normal((24, 16)) for name in names}
    tuned = {
        name: w if int(name.split(".")[2]) < unchanged else w + 0.05 * mx.abs(w)
        for name, w in base.items()
    }
    return base, tuned


def three_adapters() -> AdapterComparison:
    """Return a comparison of two adapters that agree and one independent of both."""
    cosines = {(0, 1): 0.98, (0, 2): 0.01, (1, 2): -0.03}
    pairs: list[PairAgreement] = [
        agreement(f"model.layers.{layer}.{module}", *pair, cosine - layer / 50)
        for layer in range(4)
        for module in MODULES
        for pair, cosine in cosines.items()
    ]
    names = ["/home/jane/runs/docs", "/home/jane/runs/docs_again", "/home/jane/spam"]
    return AdapterComparison(
        adapters=names, pairs=pairs, adapter_ranks=[8, 8, 4], ranks={"a": 9}
    )


def write(folder: Path, content: dict[str, Any], log: bool = False) -> Path:
    page = folder / "report.html"
    if log:
        lines = "\n".join(map(json.dumps, LOG))
        (folder / "log.jsonl").write_text(lines, encoding="utf-8")
    text = render_report(content, folder / "log.jsonl", ["mlx_dora.analyze", "models"])
    page.write_text(text, encoding="utf-8")
    return page


def column(tab: Tab, table: str, index: int) -> list[str]:
    return tab.evaluate(
        f"[...document.querySelectorAll('#{table} tbody tr')]"
        f".map(r => r.cells[{index}].textContent)"
    )


def test_a_report_draws_every_matrix(browser: Browser, tmp_path: Path):
    analysis = analyze_finetune(*two_models(), spectrum=True)
    tab = browser.open(write(tmp_path, analysis.to_dict(), log=True))
    assert (tab.problems, tab.requests) == ([], [])
    assert tab.evaluate("document.querySelectorAll('#scatter .mark').length") == 6
    assert sorted(column(tab, "matrices", 0)) == sorted(m.name for m in analysis.layers)
    text = tab.evaluate("document.body.textContent")
    assert analysis.guidance[0].sentence in text
    assert "mlx_dora.analyze models" in text
    layers = "[...document.querySelectorAll('#dist .layer')].map(t => t.textContent)"
    assert tab.evaluate(layers) == ["0", "1", "2", "0", "1", "2"]
    scale = "[...document.querySelectorAll('#heat text')].slice(-3).map(t => +/^[^°]+/"
    low, middle, high = tab.evaluate(scale + ".exec(t.textContent)[0])")
    assert 0 < low < middle < high
    steps = tab.evaluate("document.querySelector('#curve').textContent")
    assert "1020" in steps  # 10, 20: whole numbers
    assert "10.0" not in steps


SAMPLES = [
    {"step": step, "set": of, "prompt": "P", "completion": f"<b>{step}</b>",
     "reward": reward, "rewards": {}, "tokens": 1, "stopped": True}
    for step, of, reward in [(0, "valid", 0.25), (0, "train", 0.5), (0, "train", None),
                             (4, "train", 1.0), (4, "train", 0.5)]
]  # fmt: skip


def test_a_report_shows_rewards_and_samples(browser: Browser, tmp_path: Path):
    lines = "\n".join(map(json.dumps, SAMPLES))
    (tmp_path / "samples.jsonl").write_text(lines)
    analysis = analyze_finetune(*two_models())
    tab = browser.open(write(tmp_path, analysis.to_dict(), log=True))
    assert (tab.problems, tab.requests) == ([], [])
    tips = tab.evaluate(
        "[...document.querySelectorAll('#rewards [data-tip]')].map(t => t.dataset.tip)"
    )
    assert tips == [
        "training reward\nstep 0: 0.50000",
        "training reward\nstep 4: 0.75000",
        "validation reward\nstep 0: 0.25000",
    ]
    assert column(tab, "samples", 3) == ["<b>4</b>", "<b>4</b>", *["<b>0</b>"] * 3]
    assert column(tab, "samples", 4) == ["0.500", "1.00", "–", "0.500", "0.250"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"step": -1}, "step must be a whole number"),
        ({"set": "test"}, "set must be train or valid, got 'test'"),
        ({"reward": "1"}, "reward must be a number"),
        ({"reward": float("nan")}, "reward must be a number"),
        ({"completion": 3}, "completion must be text"),
    ],
)
def test_a_bad_sample_is_named_with_its_line(
    tmp_path: Path, change: dict[str, Any], reason: str
):
    rows = [SAMPLES[0], SAMPLES[1] | change]
    (tmp_path / "log.jsonl").write_text('{"step": 1, "train_loss": 1.0}\n')
    (tmp_path / "samples.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(DoRAError, match=reason) as caught:
        render_report({"kind": "models"}, tmp_path / "log.jsonl")
    assert "samples.jsonl, line 2" in str(caught.value)


def test_unchanged_matrices_count_in_no_number(browser: Browser, tmp_path: Path):
    whole = analyze_finetune(*two_models(layers=6, unchanged=4))
    tuned_alone = analyze_finetune(
        *({k: v for k, v in m.items() if int(k.split(".")[2]) >= 4}
          for m in two_models(layers=6, unchanged=4))
    )  # fmt: skip
    assert len(whole.unchanged) == 8
    ours, theirs = whole.to_dict(), tuned_alone.to_dict()
    for key in ("correlation", "radial_share", "guidance", "layers"):
        assert ours[key] == theirs[key]
    tab = browser.open(write(tmp_path, ours))
    tiles = "[...document.querySelectorAll('.tile')].map(t => t.textContent)"
    numbers = tab.evaluate(tiles)
    assert numbers[0] == "4of 12 matrices changed"
    share = whole.radial_share
    assert share is not None
    assert numbers[3].startswith(f"{100 * share:.3g} %")
    assert f"{share:.1%}" in whole.guidance[0].sentence
    assert "8 matrices are equal" in tab.evaluate("document.body.textContent")


def test_two_equal_models_have_a_report(browser: Browser, tmp_path: Path):
    analysis = analyze_finetune(*two_models(unchanged=3))
    tab = browser.open(write(tmp_path, analysis.to_dict()))
    assert tab.problems == []
    text = tab.evaluate("document.body.textContent")
    assert analysis.guidance[0].sentence in text
    assert "6 matrices are equal" in text


def test_points_in_the_same_place_are_counted(browser: Browser, tmp_path: Path):
    content = analyze_finetune(*two_models()).to_dict()
    for layer in content["layers"][:4]:
        layer.update(delta_m=0.0, delta_d=0.0)
    tab = browser.open(write(tmp_path, content))
    counts = "[...document.querySelectorAll('#scatter .count')].map(t => t.textContent)"
    assert tab.evaluate(counts) == ["×4"]


def test_a_module_looks_the_same_in_every_report(browser: Browser, tmp_path: Path):
    tab = browser.open(write(tmp_path, analyze_finetune(*two_models()).to_dict()))
    looks = "['q_proj','k_proj','v_proj','o_proj','gate_proj','up_proj','down_proj']"
    assert tab.evaluate(f"{looks}.map(look)") == list(range(7))
    others = tab.evaluate("['lm_head', 'embed_tokens', 'ü'].map(look)")
    assert others == tab.evaluate("['lm_head', 'embed_tokens', 'ü'].map(look)")
    assert all(look % 10 >= 7 for look in others)


def test_a_comparison_names_its_adapters(browser: Browser, tmp_path: Path):
    page = write(tmp_path, three_adapters().to_dict())
    assert "jane" not in page.read_text(encoding="utf-8")
    tab = browser.open(page)
    assert (tab.problems, tab.requests) == ([], [])
    names = "[...document.querySelectorAll('#grid .name')].map(t => t.textContent)"
    assert {"docs", "docs_again", "spam"} < {*tab.evaluate(names)}
    assert tab.evaluate("document.querySelectorAll('#grid rect').length") == 9 + 1
    assert column(tab, "pairs", 2)[0] == "−0.090"  # the most opposed first
    assert column(tab, "pairs", 1)[0] == "docs_again – spam"
    text = tab.evaluate("document.body.textContent")
    pick = "document.querySelectorAll('select[data-view=heat]')[1]"
    tab.evaluate(f"{pick}.value = 'docs – spam'; {pick}.onchange()")
    scale = "[...document.querySelectorAll('#heat text')].at(-1).textContent"
    assert tab.evaluate(scale) == "0.0500"  # of this pair alone: +0.01 to -0.05
    assert "docs (rank 8) · docs_again (rank 8) · spam (rank 4)" in text


CONTRASTS = """(() => {
  const rgb = c => getComputedStyle(c).color.match(/[\\d.]+/g).map(Number);
  const probe = document.body.appendChild(document.createElement("i"));
  const color = css => { probe.style.color = css; return rgb(probe); };
  const light = c => [0.2126, 0.7152, 0.0722].reduce((s, k, i) => s + k *
    (c[i] > 10 ? ((c[i] / 255 + .055) / 1.055) ** 2.4 : c[i] / 255 / 12.92), 0);
  const values = [...Array(101).keys()].map(i => i / 100), card = color("var(--card)");
  data.labels = values.map(String);
  data.matrices.test = [values, ...values.slice(1).map(() => values.map(() => null))];
  const drawn = grid(9999, "test", "");
  document.body.insertAdjacentHTML("beforeend", `<div id="t">${drawn}</div>`);
  const texts = [...document.querySelectorAll("#t text[style]")];
  return [...document.querySelectorAll("#t rect[fill^=rgba]")].map((rect, i) => {
    const [r, g, b, a = 1] = color(rect.getAttribute("fill"));
    const back = light([r, g, b].map((c, k) => a * c + (1 - a) * card[k]));
    const fore = light(color(texts[i].style.fill));
    return (Math.max(fore, back) + .05) / (Math.min(fore, back) + .05);
  });
})()"""


@pytest.mark.parametrize("dark", [False, True])
def test_numbers_on_the_grid_can_be_read(browser: Browser, tmp_path: Path, dark: bool):
    page = write(tmp_path, three_adapters().to_dict())
    contrasts = browser.open(page, dark=dark).evaluate(CONTRASTS)
    assert len(contrasts) == 101
    assert min(contrasts) >= 3.5
    assert sorted(contrasts)[len(contrasts) // 10] >= 4


def test_a_flag_is_not_broken_across_lines(browser: Browser, tmp_path: Path):
    tab = browser.open(write(tmp_path, three_adapters().to_dict()))
    flags = "[...document.querySelectorAll('li .flag')].map(f => f.textContent)"
    assert {"--method", "--data"} <= {*tab.evaluate(flags)}
    breaks = "getComputedStyle(document.querySelector('.flag')).whiteSpace"
    assert tab.evaluate(breaks) == "nowrap"


@pytest.mark.parametrize("kind", ["models", "comparison"])
def test_a_narrow_report_is_legible(browser: Browser, tmp_path: Path, kind: str):
    models = analyze_finetune(*two_models(layers=12))
    made = models if kind == "models" else three_adapters()
    tab = browser.open(write(tmp_path, made.to_dict(), log=True), width=360)
    assert tab.evaluate("document.documentElement.scrollWidth") == 360
    assert tab.overflow() == []
    sizes = tab.evaluate(
        """[...document.querySelectorAll("svg[role] text")].map(t => {
        const s = t.closest("svg"), k = s.clientWidth / s.viewBox.baseVal.width;
        return parseFloat(getComputedStyle(t).fontSize) * k; })"""
    )
    assert len(sizes) > 20
    assert min(sizes) >= 10


@pytest.mark.parametrize("dark", [False, True])
def test_a_screenshot_shows_the_drawing(browser: Browser, tmp_path: Path, dark: bool):
    page = write(tmp_path, analyze_finetune(*two_models()).to_dict())
    tab = browser.open(page, width=1200, height=1500, dark=dark)
    tab.screenshot(tmp_path / "report.png", whole=False)
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pixels = pyplot.imread(tmp_path / "report.png")[..., :3]
    assert pixels.shape[:2] == (1500, 1200)
    assert (pixels[:40].mean() < 0.5) == dark
    levels = (pixels * 15).round().reshape(-1, 3)
    colors = {tuple(color) for color in levels[::7].tolist()}
    assert len(colors) > 20  # a blank or broken page has a few


ATTACK = "\"'><img src=x onerror=\"document.title='PWNED'\">"


def test_names_are_text_in_the_page(browser: Browser, tmp_path: Path):
    models = [
        {f"a.{ATTACK}.{name}": value for name, value in weights.items()}
        for weights in two_models()
    ]
    content = analyze_finetune(*models).to_dict()
    tab = browser.open(write(tmp_path, {**content, "source": ATTACK, "base": ATTACK}))
    assert tab.problems == []
    assert tab.evaluate("document.images.length") == 0
    assert tab.evaluate("document.title") == "mlx_dora analysis"


def test_a_name_cannot_end_the_script():
    text = render_report({"kind": "models", "source": "</script><b>"})
    assert "</script><b>" not in text


def test_the_policy_allows_the_pages_own_script_alone():
    text = render_report({"kind": "models"})
    policy = re.search(r'Content-Security-Policy" content="(.*?)"', text)
    assert policy is not None
    rules = dict(rule.split(" ", 1) for rule in policy[1].split("; "))
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert rules["default-src"] == "'none'"
    assert rules["script-src"] == f"'sha256-{digest}'"
    assert "http" not in policy[1]
    # The policy must precede everything that it restricts.
    assert text.index("Content-Security-Policy") < text.index("<style>")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (json.dumps({"step": ATTACK, "train_loss": 1.0}), "step must be a whole"),
        ('{"step": 1.5}', "step must be a whole number"),
        ('{"step": -1}', "step must be a whole number"),
        ('{"step": 1, "train_loss": "2"}', "train_loss must be a number"),
        ('{"step": 1, "val_loss": true}', "val_loss must be a number"),
        ("null", "must hold a JSON object"),
        ("\0\0", "is not JSON"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_a_log_line_that_is_no_report_is_named(tmp_path: Path, line: str, reason: str):
    log = tmp_path / "log.jsonl"
    log.write_text(f'{{"step": 1, "train_loss": 1.0}}\n{line}\n')
    with pytest.raises(DoRAError, match=reason) as caught:
        render_report({"kind": "models"}, log)
    assert "log.jsonl, line 2" in str(caught.value)


def test_a_log_that_is_not_utf8_is_named(tmp_path: Path):
    (tmp_path / "log.jsonl").write_bytes(b'{"step": 1, "a": "\xff"}\n')
    with pytest.raises(DoRAError, match=r"log\.jsonl, line 1 is not JSON: 'utf-8'"):
        render_report({"kind": "models"}, tmp_path / "log.jsonl")


def test_a_loss_that_was_not_finite_is_a_gap_in_the_curve(tmp_path: Path):
    log = tmp_path / "log.jsonl"
    log.write_text('{"step": 1, "train_loss": NaN}\n{"step": 2, "train_loss": 1.5}\n')
    text = render_report({"kind": "models"}, log)
    data = re.search(r'id="data">(.*?)</script>', text)
    assert data is not None
    assert json.loads(data[1])["log"] == [
        {"step": 1, "train_loss": None, "val_loss": None},
        {"step": 2, "train_loss": 1.5, "val_loss": None},
    ]
