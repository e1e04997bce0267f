"""Renders the report in a real browser: complete and without console errors."""

import base64
import hashlib
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_dora.adapters.config import DoRAConfig
from mlx_dora.adapters.files import save_adapter
from mlx_dora.adapters.surgery import adapter_layers, apply_dora
from mlx_dora.analyze import analyze_finetune, compare_adapters, report
from mlx_dora.analyze.report import render_report
from mlx_dora.errors import DoRAError

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next((path for name in NAMES if (path := shutil.which(name))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium here")


def browse(page: Path, *flags: str) -> tuple[str, str]:
    """Return a page's document and log from a headless browser."""
    assert BROWSER is not None
    command = [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu"]
    command += ["--enable-logging=stderr", "--v=0", "--window-size=1200,1500"]
    command += [f"--user-data-dir={page.parent / 'profile'}"]
    command += ["--virtual-time-budget=3000", *flags, page.as_uri()]
    # Do not preload MLX's libraries into the browser.
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env={"PATH": "/usr/bin"}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def console(log: str) -> list[str]:
    return re.findall(r".*CONSOLE.*", log)


def two_models() -> tuple[dict[str, mx.array], dict[str, mx.array]]:
    mx.random.seed(3)
    names = [
        f"model.layers.{i}.{module}.weight"
        for i in range(3)
        for module in ("self_attn.q_proj", "mlp.up_proj")
    ]
    base = {name: mx.random.normal((24, 16)) for name in names}
    tuned = {k: v + 0.05 * mx.random.normal(v.shape) for k, v in base.items()}
    return base, tuned


@needs_browser
def test_a_report_draws_every_matrix(tmp_path: Path):
    analysis = analyze_finetune(*two_models(), spectrum=True)
    page = tmp_path / "report.html"
    page.write_text(render_report(analysis.to_dict()), encoding="utf-8")
    document, log = browse(page, "--dump-dom")
    assert console(log) == []
    scatter = document.split('id="scatter"')[1].split('id="heat"')[0]
    assert scatter.count("<circle") == len(analysis.layers)
    for layer in analysis.layers:
        assert f"<td>{layer.name}</td>" in document
    assert analysis.guidance[0].sentence in document


@needs_browser
def test_a_screenshot_shows_the_drawing(tmp_path: Path):
    analysis = analyze_finetune(*two_models())
    page, picture = tmp_path / "report.html", tmp_path / "report.png"
    page.write_text(render_report(analysis.to_dict()), encoding="utf-8")
    _, log = browse(page, f"--screenshot={picture}")
    assert console(log) == []
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pixels = pyplot.imread(picture)[..., :3]
    assert pixels.shape[:2] == (1500, 1200)
    levels = (pixels * 15).round().reshape(-1, 3)
    colours = {tuple(color) for color in levels[::7].tolist()}
    assert len(colours) > 20  # a blank or broken page has a few


@needs_browser
def test_a_broken_page_is_noticed(tmp_path: Path):
    page = tmp_path / "report.html"
    page.write_text("<script>nothing.there()</script>", encoding="utf-8")
    _, log = browse(page, "--dump-dom")
    assert any("nothing is not defined" in line for line in console(log))


@needs_browser
def test_a_comparison_draws_the_matrix_of_adapters(tiny_model, tmp_path: Path):
    folders = []
    apply_dora(tiny_model, DoRAConfig(rank=2, num_layers=-1))
    for seed in (1, 2):
        mx.random.seed(seed)
        for _, layer in adapter_layers(tiny_model):
            layer.lora_b = 0.1 * mx.random.normal(layer.lora_b.shape)
        folders.append(tmp_path / str(seed))
        save_adapter(tiny_model, folders[-1])
    from mlx_dora import remove_dora

    remove_dora(tiny_model)
    comparison = compare_adapters(folders, tiny_model)
    page = tmp_path / "report.html"
    page.write_text(render_report(comparison.to_dict()), encoding="utf-8")
    document, log = browse(page, "--dump-dom")
    assert console(log) == []
    grid = document.split('id="grid"')[1].split('id="heat"')[0]
    assert grid.count("<rect") == 4


def test_a_name_cannot_end_the_script():
    text = render_report({"kind": "models", "source": "</script><b>"})
    assert "</script><b>" not in text


ATTACK = "\"'><img src=x onerror=\"document.title='PWNED'\">"


def hostile_analysis() -> dict[str, Any]:
    """Return an analysis in which every name is markup that would run a script."""
    base, tuned = two_models()
    tuned = {f"a.{ATTACK}.{name}": value for name, value in tuned.items()}
    base = {f"a.{ATTACK}.{name}": value for name, value in base.items()}
    content = analyze_finetune(base, tuned).to_dict()
    return {**content, "source": ATTACK, "base": ATTACK}


@needs_browser
def test_names_are_text_in_the_page(tmp_path: Path):
    page = tmp_path / "report.html"
    page.write_text(render_report(hostile_analysis()), encoding="utf-8")
    document, log = browse(page, "--dump-dom")
    assert console(log) == []
    assert "<img" not in document
    assert "<title>mlx_dora analysis</title>" in document


@needs_browser
def test_the_policy_stops_a_script_that_escaping_missed(tmp_path: Path, monkeypatch):
    template = Path(report.__file__).with_name("report.html").read_text("utf-8")
    escaping = re.search(r"const esc=.*\n", template)
    assert escaping is not None
    broken = tmp_path / "broken.html"
    broken.write_text(template.replace(escaping[0], "const esc=t=>String(t);\n"))
    monkeypatch.setattr(report, "_TEMPLATE", broken)
    page = tmp_path / "report.html"
    page.write_text(render_report(hostile_analysis()), encoding="utf-8")
    document, log = browse(page, "--dump-dom")
    assert "<img" in document  # so the markup was inserted
    assert "<title>mlx_dora analysis</title>" in document
    assert any("Content Security Policy" in line for line in console(log))


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
