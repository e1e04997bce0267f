"""The report in a real browser: drawn, complete, without a console error."""

import re
import shutil
import subprocess
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_dora.adapters.config import DoRAConfig
from mlx_dora.adapters.files import save_adapter
from mlx_dora.adapters.surgery import adapter_layers, apply_dora
from mlx_dora.analyze import analyze_finetune, compare_adapters
from mlx_dora.analyze.report import render_report

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next((path for name in NAMES if (path := shutil.which(name))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium here")


def browse(page: Path, *flags: str) -> tuple[str, str]:
    """What a headless browser prints of a page: its document and its log."""
    assert BROWSER is not None
    command = [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu"]
    command += ["--enable-logging=stderr", "--v=0", "--window-size=1200,1500"]
    command += [f"--user-data-dir={page.parent / 'profile'}"]
    command += ["--virtual-time-budget=3000", *flags, page.as_uri()]
    # The browser is not ours: what is preloaded for MLX stays out of it.
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
    for one in analysis.layers:
        assert f"<td>{one.name}</td>" in document
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
    colours = {tuple(one) for one in levels[::7].tolist()}
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
    found = compare_adapters(folders, tiny_model)
    page = tmp_path / "report.html"
    page.write_text(render_report(found.to_dict()), encoding="utf-8")
    document, log = browse(page, "--dump-dom")
    assert console(log) == []
    grid = document.split('id="grid"')[1].split('id="heat"')[0]
    assert grid.count("<rect") == 4


def test_a_name_cannot_end_the_script():
    text = render_report({"kind": "models", "source": "</script><b>"})
    assert "</script><b>" not in text
