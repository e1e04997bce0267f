"""Several adapters on several tasks: the numbers, and the page in a browser."""

import json
import re
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_dora import DoRAConfig, DoRAError, apply_dora, load, save_adapter
from mlx_dora.adapters.adapter import BaseModel
from mlx_dora.adapters.files import write_adapter_files
from mlx_dora.adapters.fingerprint import fingerprint
from mlx_dora.adapters.surgery import apply_layers
from mlx_dora.evaluate.config import EvaluateConfig
from mlx_dora.evaluate.tasks import TaskTable, evaluate_tasks
from mlx_dora.evaluate.tasks_page import render_tasks
from mlx_dora.train.run.start import trainable_tensors
from tests.browser import Browser
from tests.cli.training_data import write_data
from tests.processes import run

CELLS = "[...document.querySelectorAll('#cells .cell')]"


def write_texts(folder: Path) -> Path:
    """Write plain texts, which have no labels."""
    folder.mkdir()
    lines = [json.dumps({"text": f"the quick fox number {i}"}) for i in range(4)]
    (folder / "valid.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def write_adapter(base: Path, save_path: Path, size: float) -> Path:
    model, _ = load(base)
    apply_dora(model, DoRAConfig(rank=2, num_layers=-1))
    changed = [(name, value + size) for name, value in trainable_tensors(model).items()]
    model.load_weights(changed, strict=False)
    save_adapter(model, save_path, base_model=str(base))
    return save_path


@pytest.fixture
def adapters(tiny_model_folder: Path, tmp_path: Path) -> list[Path]:
    return [
        write_adapter(tiny_model_folder, tmp_path / name, size)
        for name, size in (("one", 0.02), ("two", 0.06))
    ]


@pytest.fixture
def data(tmp_path: Path) -> list[Path]:
    return [
        write_data(tmp_path / "parity", test=4),
        write_texts(tmp_path / "texts"),
    ]


def texts_loss(model: nn.Module, tokenizer: Any, folder: Path) -> float:
    """Mean loss of all tokens but the first of each row, in float64."""
    losses: list[float] = []
    for line in (folder / "valid.jsonl").read_text().splitlines():
        tokens = tokenizer.encode(json.loads(line)["text"])
        tokens.append(tokenizer.eos_token_id)
        logits = np.array(model(mx.array([tokens]))[0], np.float64)
        top = logits.max(1, keepdims=True)
        logs = logits - top - np.log(np.exp(logits - top).sum(1, keepdims=True))
        losses += [-logs[i, t] for i, t in enumerate(tokens[1:])]
    return float(np.mean(losses))


def test_each_cell_is_the_loss_of_its_adapter_on_its_task(
    tiny_model_folder: Path, adapters: list[Path], data: list[Path]
) -> None:
    config = EvaluateConfig(model=str(tiny_model_folder), samples=1, max_tokens=2)
    table = evaluate_tasks(
        config, adapters=[*map(str, adapters)], data=[*map(str, data)]
    )
    assert table.models == ("base", "one", "two")
    assert [(t.name, t.split) for t in table.tasks] == [
        ("parity", "test"),
        ("texts", "valid"),
    ]
    model, tokenizer = load(tiny_model_folder)
    expected = [texts_loss(model, tokenizer, data[1])]
    for adapter in adapters:
        fresh, _ = load(tiny_model_folder, adapter)
        expected.append(texts_loss(fresh, tokenizer, data[1]))
    losses = [result.loss.loss for result in table.tasks[1].results]
    assert losses == pytest.approx(expected, rel=1e-5)
    assert len({round(loss, 3) for loss in losses}) == 3
    assert table.mean(2) == pytest.approx(np.mean(table.losses(2)))
    worse = {
        (model, place)
        for model in (1, 2)
        for place, task in enumerate(table.tasks)
        if task.results[model].loss.loss > task.results[0].loss.loss
    }
    assert set(table.worse) == worse
    assert [task.has_labels for task in table.tasks] == [True, False]
    values = json.loads(json.dumps(table.to_dict()))
    assert values["models"] == ["base", "one", "two"]
    assert values["mean_loss"] == pytest.approx([table.mean(i) for i in range(3)])
    change = values["tasks"][1]["results"][2]["change"]
    assert change == pytest.approx(expected[2] - expected[0], rel=1e-4)


def test_a_full_fine_tuning_does_not_change_the_next_adapter(
    tiny_model_folder: Path, adapters: list[Path], data: list[Path], tmp_path: Path
) -> None:
    model, _ = load(tiny_model_folder)
    base = BaseModel(fingerprint=fingerprint(model))
    apply_layers(model, DoRAConfig(num_layers=-1), "full")
    changed = [
        (name, value + 0.02)
        for name, value in tree_flatten(model.trainable_parameters())
        if isinstance(value, mx.array)
    ]
    model.load_weights(changed, strict=False)
    write_adapter_files(model, tmp_path / "full", fine_tune_type="full", base=base)
    config = EvaluateConfig(model=str(tiny_model_folder), samples=0, labels=False)
    texts = [str(data[1])]
    both = evaluate_tasks(
        config, adapters=[str(tmp_path / "full"), str(adapters[0])], data=texts
    )
    alone = evaluate_tasks(config, adapters=[str(adapters[0])], data=texts)
    assert both.losses(2) == alone.losses(1)
    assert both.losses(1) != pytest.approx(both.losses(0), rel=1e-4)


def test_a_table_needs_data_and_a_base() -> None:
    with pytest.raises(DoRAError, match="at least one data set"):
        evaluate_tasks(EvaluateConfig(model="x"), adapters=["a"], data=[])
    with pytest.raises(DoRAError, match="a model or an adapter"):
        evaluate_tasks(EvaluateConfig(), adapters=[], data=["d"])


def evaluate(
    adapters: list[Path], data: list[Path], *more: object
) -> CompletedProcess[str]:
    words: list[object] = ["-m", "mlx_dora", "evaluate"]
    for adapter in adapters:
        words += ["--adapter-path", adapter]
    for folder in data:
        words += ["--data", folder]
    return run([*words, "--samples", 1, "--max-tokens", 2, *more])


def test_the_command_prints_and_writes_the_table(
    adapters: list[Path], data: list[Path], tmp_path: Path, browser: Browser
) -> None:
    page, facts = tmp_path / "table.html", tmp_path / "table.json"
    done = evaluate(adapters, data, "--report", page, "--json", facts)
    assert done.returncode == 0, done.stderr
    text = done.stdout
    found = json.loads(facts.read_text())
    head, *rows = text[text.index("loss  ") :].splitlines()[:4]
    assert head.split() == ["loss", "parity", "texts", "mean"]
    for place, row in enumerate(rows):
        name, *numbers = row.split()
        losses = [task["results"][place]["loss"]["loss"] for task in found["tasks"]]
        expected = [*losses, found["mean_loss"][place]]
        assert name == found["models"][place]
        assert [*map(float, numbers)] == pytest.approx(expected, abs=6e-5)
    for entry in found["above_base"]:
        said = f"{entry['model']} is worse than the base on {entry['task']}: loss "
        assert said in text
    assert "parity, sample 1" in text
    tab = browser.open(page)
    assert (tab.problems, tab.requests) == ([], [])
    assert tab.evaluate(f"{CELLS}.length") == 6
    assert tab.overflow() == []
    shown = tab.evaluate("document.body.textContent")
    assert "mlx_dora evaluate" in shown
    assert str(tmp_path) not in shown
    again = evaluate(adapters, data, "--report", page)
    assert again.returncode == 1
    assert "--overwrite" in again.stderr


def made(
    tiny_model_folder: Path, adapters: list[Path], data: list[Path], samples: int = 2
) -> TaskTable:
    config = EvaluateConfig(model=str(tiny_model_folder), samples=samples, max_tokens=2)
    return evaluate_tasks(
        config, adapters=[*map(str, adapters)], data=[*map(str, data)]
    )


def test_the_page_shows_what_the_table_holds(
    tiny_model_folder: Path,
    adapters: list[Path],
    data: list[Path],
    tmp_path: Path,
    browser: Browser,
) -> None:
    table = made(tiny_model_folder, adapters, data)
    page = tmp_path / "page.html"
    page.write_text(render_tasks(table), encoding="utf-8")
    for width, dark in ((1200, False), (360, True)):
        tab = browser.open(page, width=width, dark=dark)
        assert (tab.problems, tab.overflow()) == ([], [])
    tips = tab.evaluate(f"{CELLS}.map(c => c.dataset.tip)")
    for tip, (model, place) in zip(
        tips, [(m, t) for m in range(3) for t in range(2)], strict=True
    ):
        loss = table.tasks[place].results[model].loss.loss
        assert tip.startswith(f"{table.models[model]} on {table.tasks[place].name}\n")
        assert float(re.findall(r"loss ([\d.]+)", tip)[0]) == pytest.approx(
            loss, abs=6e-5
        )
        assert ("accuracy" in tip) is (place == 0)
    rows = tab.evaluate(
        "[...document.querySelectorAll('#losses tbody tr')].map(r => r.innerText)"
    )
    assert [row.split("\t")[0] for row in rows] == ["base", "one", "two"]
    assert tab.evaluate("document.querySelectorAll('details.sample').length") == 4
    text = tab.evaluate("document.querySelector('#page').textContent")
    assert text.count("is worse than the base on") == len(table.worse)


def test_names_cannot_run_scripts(
    tiny_model_folder: Path, data: list[Path], tmp_path: Path, browser: Browser
) -> None:
    evil = "<img src=x onerror=document.title='bad'>"
    adapter = write_adapter(tiny_model_folder, tmp_path / evil, 0.02)
    table = made(tiny_model_folder, [adapter], data, samples=0)
    page = tmp_path / "page.html"
    page.write_text(render_tasks(table), encoding="utf-8")
    tab = browser.open(page)
    assert tab.problems == []
    assert tab.evaluate("document.title") == "mlx_dora evaluation"
    assert evil in tab.evaluate("document.body.textContent")
