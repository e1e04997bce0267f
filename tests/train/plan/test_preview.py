import json
from dataclasses import replace
from pathlib import Path

import pytest

from mlx_dora import DoRAConfig
from mlx_dora.train import TrainConfig, plan_memory
from mlx_dora.train.plan.preview import preview_training, render_preview
from tests.adapters.stacks import write_folder
from tests.browser import Browser

ATTACK = "</script><img src=x onerror=\"document.title='PWNED'\">"
DORA = DoRAConfig(rank=4, num_layers=1)


@pytest.fixture
def train(tiny_model_folder: Path, tmp_path: Path) -> TrainConfig:
    """Forty rows in a CSV file; every fourth is long, and one has hostile text."""
    texts = [
        f"fox {n}" + " the lazy dog" * (20 if n % 4 == 0 else 1) for n in range(39)
    ]
    lines = ["prompt,completion", *(f"{text},yes" for text in texts)]
    lines.append('"' + ATTACK.replace('"', '""') + '",no')
    path = tmp_path / "rows.csv"
    path.write_text("\n".join(lines) + "\n")
    return TrainConfig(model=str(tiny_model_folder), data=str(path), mask_prompt=True)


def test_the_suggested_flags_cut_no_row_and_fit(train: TrainConfig) -> None:
    preview = preview_training(train, DORA)
    length, batch = (int(flag.split()[1]) for flag in preview.flags)
    lengths = preview.survey.splits[0].trained.lengths
    assert length - 8 < max(lengths) <= length
    assert batch == 32  # of 36 rows, on a machine that has room for all
    suggested = replace(train, max_seq_length=length, batch_size=batch)
    plan = plan_memory(suggested, DORA, limit=preview.limit)
    assert plan.fits
    tight = preview_training(train, DORA, limit=plan.peak // 4)
    length, batch = (int(flag.split()[1]) for flag in tight.flags)
    assert 1 <= batch < 32
    smaller = replace(train, max_seq_length=length, batch_size=batch)
    assert plan_memory(smaller, DORA, limit=plan.peak // 4).fits
    none = preview_training(train, DORA, limit=1000)
    assert "smaller or quantized" in none.flags[-1]
    assert {model.fits for model in none.models} == {None}


def test_a_model_without_a_plan_still_shows_its_rows(
    train: TrainConfig, tmp_path: Path
) -> None:
    latent = write_folder(tmp_path / "latent", "deepseek_v3")
    for file in Path(str(train.model)).glob("tokenizer*"):
        (latent / file.name).write_bytes(file.read_bytes())
    template = Path(str(train.model)) / "chat_template.jinja"
    if template.exists():
        (latent / template.name).write_bytes(template.read_bytes())
    preview = preview_training(replace(train, model=str(latent)), DORA)
    assert preview.plan is None
    assert "its attention is latent" in str(preview.problem)
    assert [len(split.lengths) for split in preview.survey.splits] == [36, 4]


def test_the_page_shows_rows_marks_and_models_and_no_folder(
    train: TrainConfig, tmp_path: Path, browser: Browser
) -> None:
    train = replace(train, max_seq_length=40, valid_share=0)
    preview = preview_training(train, DORA, samples=40)
    text = render_preview(preview, ["mlx_dora.data", str(tmp_path / "rows.csv")])
    assert str(tmp_path) not in text
    page = tmp_path / "page.html"
    page.write_text(text, encoding="utf-8")
    for width, dark in ((1200, False), (360, True)):
        tab = browser.open(page, width=width, dark=dark)
        assert (tab.problems, tab.requests, tab.overflow()) == ([], [], [])
    marks = tab.evaluate(
        "[...document.querySelectorAll('.sample mark')].map(m => m.textContent)"
    )
    assert marks.count("yes<|im_end|>\n") == 29  # ten long rows are cut before it
    assert tab.evaluate("document.title") == "mlx_dora data"
    shown = tab.evaluate("document.querySelector('main').textContent")
    assert ATTACK in shown
    assert "11rows cut, skipped or incomplete" in shown  # with the hostile row
    assert "rows.csv, line 2" in shown
    rows = "document.querySelectorAll('#models tbody tr').length"
    assert tab.evaluate(rows) == 20
    json.dumps(preview.to_dict(), allow_nan=False)
