"""mergekit files that people posted: accepted, with the weights that mergekit gives.

The numbers in the names are those of mergekit's issues and pull requests.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner

from mlx_dora import DoRAError
from mlx_dora.cli.merge import command
from mlx_dora.merge.models.merge import run_merge
from mlx_dora.merge.models.mergekit import read_mergekit
from mlx_dora.merge.models.report import MergeReport
from tests.checks import assert_close
from tests.merge.methods.test_elementwise import ties_truth
from tests.merge.models.test_merge import MATRIX, read
from tests.merge.oracle import dense_karcher

ATTENTION = "model.layers.1.self_attn.o_proj.weight"
Config = dict[str, Any]


@pytest.fixture
def models(make_tiny_folder: Callable[..., Path]) -> dict[str, str]:
    return {
        name: str(make_tiny_folder(name, seed=seed))
        for seed, name in enumerate(("BASE", "A", "B"))
    }


def merge(config: Config, out: Path) -> MergeReport:
    return run_merge(read_mergekit(config), out)


def entries(models: dict[str, str], **settings: list[float]) -> list[Config]:
    return [
        {"model": models[name], "parameters": {k: v[i] for k, v in settings.items()}}
        for i, name in enumerate("AB")
    ]


def test_int8_mask_is_accepted_and_changes_nothing__mergekit_338(
    models: dict[str, str], tmp_path: Path
) -> None:
    report = merge(
        {
            "merge_method": "ties",
            "base_model": models["BASE"],
            "models": [
                {"model": models["BASE"]},
                *entries(models, density=[0.5, 0.4], weight=[0.5, 0.3]),
            ],
            "parameters": {"normalize": True, "int8_mask": True},
            "dtype": "float32",
        },
        tmp_path / "out",
    )
    base, a, b = (read(Path(path), MATRIX) for path in models.values())
    moved = ties_truth(
        [(item - base).astype(float) for item in (a, b)], [0.5, 0.3], [0.5, 0.4], True
    )
    assert_close(mx.array(read(tmp_path / "out", MATRIX)), base + moved)
    assert "int8_mask has no effect here" in report.lines()[0]


def test_karchers_limits_are_accepted__mergekit_230(
    models: dict[str, str], tmp_path: Path
) -> None:
    report = merge(
        {
            "merge_method": "karcher",
            "models": [{"model": models[name]} for name in "AB"],
            "parameters": {"max_iter": 100, "tol": 1e-9},
        },
        tmp_path / "out",
    )
    a, b = (read(Path(models[name]), MATRIX) for name in "AB")
    truth = dense_karcher([a.reshape(1, -1), b.reshape(1, -1)], [0.5, 0.5])
    assert_close(mx.array(read(tmp_path / "out", MATRIX)), truth.reshape(a.shape))
    assert [line.split(" has")[0] for line in report.lines()[:2]] == [
        "parameters: max_iter", "parameters: tol",
    ]  # fmt: skip


def task_arithmetic(models: dict[str, str], **more: Any) -> Config:
    first = {"model": models["A"], "parameters": {"weight": 1.0}}
    return {
        "merge_method": "task_arithmetic",
        "base_model": models["BASE"],
        "models": [first],
        "dtype": "float32",
        **more,
    }


def put_template(folder: str, text: str | list[Any]) -> None:
    path = Path(folder) / "tokenizer_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "chat_template": text}))


@pytest.mark.parametrize(
    ("keys", "owner"),
    [
        ({"tokenizer_source": "base"}, "BASE"),
        ({"tokenizer_source": "union"}, "BASE"),
        ({"tokenizer": {}}, "BASE"),
        ({"tokenizer_source": "A"}, "A"),
        ({"tokenizer": {"source": "A"}}, "A"),
        ({"tokenizer": {"source": "A"}, "name": "x"}, "A"),
    ],
)
def test_a_tokenizer_of_equal_vocabulary_is_used__mergekit_479(
    models: dict[str, str], tmp_path: Path, keys: Config, owner: str
) -> None:
    put_template(models["A"], "A: {{ messages }}")
    text = json.dumps(keys).replace('"A"', json.dumps(models["A"]))
    report = merge(task_arithmetic(models, **json.loads(text)), tmp_path / "out")
    assert_close(
        mx.array(read(tmp_path / "out", MATRIX)), read(Path(models["A"]), MATRIX)
    )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        own = (Path(models[owner]) / name).read_bytes()
        assert (tmp_path / "out" / name).read_bytes() == own
    assert "tokenizer: all vocabularies are equal." in report.lines()


def test_another_vocabulary_is_aligned_by_token(
    models: dict[str, str], tmp_path: Path
) -> None:
    """A has two tokens' ids swapped; its rows are put in the base's order."""
    path = Path(models["A"]) / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    first, second = list(vocabulary)[:2]
    i, k = vocabulary[first], vocabulary[second]
    vocabulary[first], vocabulary[second] = k, i
    path.write_text(json.dumps(content))
    report = merge(task_arithmetic(models, tokenizer_source="base"), tmp_path / "out")
    assert any("aligned by token" in line for line in report.lines())
    name = "model.embed_tokens.weight"
    own, result = read(Path(models["A"]), name), read(tmp_path / "out", name)
    assert_close(mx.array(result[[i, k]]), own[[k, i]], bound=1e-6)
    rest = [row for row in range(len(result)) if row not in (i, k)]
    assert_close(mx.array(result[rest]), own[rest], bound=1e-6)
    path.unlink()
    with pytest.raises(DoRAError, match="A has no tokenizer"):
        merge(task_arithmetic(models, tokenizer_source="base"), tmp_path / "none")
    merge(task_arithmetic(models), tmp_path / "unchecked")  # as before, unchecked


def test_the_tokenizers_model_cannot_be_the_output(
    models: dict[str, str], tmp_path: Path
) -> None:
    config = task_arithmetic(models, tokenizer_source=models["B"])
    plan = read_mergekit(config)
    for out, reason in ((models["B"], "is the input"), (tmp_path, "holds the input")):
        with pytest.raises(DoRAError, match=reason):
            run_merge(plan, out, overwrite=True)
    assert (Path(models["B"]) / "tokenizer.json").is_file()


def test_a_list_of_templates_with_damaged_names_gives_the_default(
    models: dict[str, str], tmp_path: Path
) -> None:
    named = {"name": "default", "template": "mine {{ messages }}"}
    for folder in models.values():
        put_template(folder, [{"name": []}, 5, named])
    report = merge(task_arithmetic(models, chat_template="auto"), tmp_path / "out")
    assert any("template: from 2 of 2 models" in line for line in report.lines())
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == (
        "mine {{ messages }}"
    )


@pytest.mark.parametrize("is_file", [False, True])
@pytest.mark.parametrize(
    ("wanted", "expected", "note"),
    [
        ("auto", "two: {{ messages }}", "from 2 of 3 models"),
        ("own {{ messages }}", "own {{ messages }}", "set by the config"),
        ("chatml", "one: {{ messages }}", "not shipped here"),
    ],
)
def test_the_chat_template_is_chosen(
    models: dict[str, str], tmp_path: Path, is_file: bool, wanted, expected, note
) -> None:
    from transformers import AutoTokenizer

    for name, text in zip(models, ("one", "two", "two"), strict=True):
        put_template(models[name], f"{text}: {{{{ messages }}}}")
        if is_file:
            put_template(models[name], "stale")
            path = Path(models[name]) / "chat_template.jinja"
            path.write_text(f"{text}: {{{{ messages }}}}")
    config = task_arithmetic(models, chat_template=wanted)
    config["models"].append({"model": models["B"], "parameters": {"weight": 0.0}})
    report = merge(config, tmp_path / "out")
    result = AutoTokenizer.from_pretrained(tmp_path / "out").chat_template
    assert result == expected
    assert any(note in line for line in report.lines())


T = [
    {"filter": "self_attn", "value": [0, 0.5, 0.3, 0.7, 1]},
    {"filter": "mlp", "value": [1, 0.5, 0.7, 0.3, 0.25]},
    {"value": 0.5},
]


def test_slices_over_all_blocks_are_whole_models__mergekit_96(
    models: dict[str, str], tmp_path: Path
) -> None:
    top = {"merge_method": "slerp", "base_model": models["A"], "parameters": {"t": T}}
    plain = [{"model": models[name]} for name in "AB"]
    slices = [{"sources": [{**entry, "layer_range": [0, 2]} for entry in plain]}]
    forms = {
        "models": {"models": plain},
        "slices": {"slices": slices},
        "modules": {"modules": {"default": {"slices": slices}}},
        "module_models": {"modules": {"default": {"models": plain}}},
    }
    for name, form in forms.items():
        merge({**top, **form}, tmp_path / name)
        written = (tmp_path / name / "model.safetensors").read_bytes()
        assert written == (tmp_path / "models" / "model.safetensors").read_bytes()
    a, b = (read(Path(models[name]), MATRIX).astype(float) for name in "AB")
    theta = np.arccos((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b))
    truth = (np.sin(0.75 * theta) * a + np.sin(0.25 * theta) * b) / np.sin(theta)
    assert_close(mx.array(read(tmp_path / "slices", MATRIX)), truth)
    b_only = read(Path(models["B"]), ATTENTION)
    assert_close(mx.array(read(tmp_path / "slices", ATTENTION)), b_only, bound=1e-6)


@pytest.mark.parametrize(
    ("first", "last", "message"),
    [
        (0, 3, r"layer_range \[0, 3\] of .*A, which has 2 blocks"),
        (5, 6, "has 2 blocks"),
    ],
)
def test_slices_beyond_the_blocks_are_refused(
    models: dict[str, str], tmp_path: Path, first: int, last: int, message: str
) -> None:
    source = {"model": models["A"], "layer_range": [first, last]}
    config = {"merge_method": "passthrough", "slices": [{"sources": [source]}]}
    with pytest.raises(DoRAError, match=message):
        merge(config, tmp_path / "out")


def test_slices_of_models_of_other_sizes_are_refused_with_every_reason(
    make_tiny_folder: Callable[..., Path], models: dict[str, str], tmp_path: Path
) -> None:
    other = make_tiny_folder("wide", seed=9, hidden_size=64, num_key_value_heads=4)
    slices = [
        {"sources": [{"model": name, "layer_range": [0, 1]}]}
        for name in (models["A"], str(other))
    ]
    with pytest.raises(DoRAError, match=r"hidden_size of .* is 64.*num_key_value_head"):
        merge({"merge_method": "passthrough", "slices": slices}, tmp_path / "out")


def test_a_stack_has_the_configs_lists_by_block(
    models: dict[str, str], tmp_path: Path
) -> None:
    """``layer_types`` and the like have an entry for each block."""
    for name in "AB":
        path = Path(models[name]) / "config.json"
        config = json.loads(path.read_text())
        config["layer_types"] = [f"{name}{block}" for block in range(2)]
        path.write_text(json.dumps(config))
    slices = [
        {"sources": [{"model": models["A"], "layer_range": [0, 2]}]},
        {"sources": [{"model": models["B"], "layer_range": [1, 2]}]},
    ]
    report = merge({"merge_method": "passthrough", "slices": slices}, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["layer_types"] == ["A0", "A1", "B1"]
    assert config["num_hidden_layers"] == 3
    assert any(line.startswith("layer_types: one entry") for line in report.lines())


def test_passthrough_copies_a_model__mergekit_418(
    models: dict[str, str], tmp_path: Path
) -> None:
    source = {"model": models["A"], "layer_range": [0, 2]}
    merge({"merge_method": "passthrough", "slices": [{"sources": [source]}]},
          tmp_path / "copy")  # fmt: skip
    scale = [{"filter": "o_proj", "value": 0.5}, {"value": 1.0}]
    first = {"model": models["A"], "parameters": {"scale": scale}}
    merge({"merge_method": "passthrough", "models": [first]}, tmp_path / "scaled")
    for name in (MATRIX, ATTENTION, "model.embed_tokens.weight"):
        own = read(Path(models["A"]), name)
        assert (read(tmp_path / "copy", name) == own).all()
        factor = 0.5 if name == ATTENTION else 1.0
        assert (read(tmp_path / "scaled", name) == factor * own).all()
    with pytest.raises(DoRAError, match="passthrough uses one model"):
        both = [{"model": models[name]} for name in "AB"]
        merge({"merge_method": "passthrough", "models": both}, tmp_path / "out")


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
@pytest.mark.parametrize("rescale", [None, False])
def test_dare_drops_and_rescales__mergekit_9(
    models: dict[str, str], tmp_path: Path, method: str, rescale: bool | None
) -> None:
    """One model: each change is dropped, or weighted and rescaled as in mergekit."""
    name = "model.embed_tokens.weight"
    settings = {"density": 0.53, "weight": 0.4}
    merge(
        {
            "merge_method": method,
            "base_model": models["BASE"],
            "models": [{"model": models["A"], "parameters": settings}],
            "parameters": {} if rescale is None else {"rescale": rescale},
            "dtype": "float32",
        },
        tmp_path / "out",
    )
    base, tuned = (read(Path(models[item]), name) for item in ("BASE", "A"))
    moved = read(tmp_path / "out", name) - base
    is_kept = np.abs(moved) > 1e-7
    assert is_kept.mean() == pytest.approx(0.53, abs=0.02)
    change = (tuned - base).astype(float)
    restored = np.abs(change).sum() / np.abs(change[is_kept]).sum()
    assert restored == pytest.approx(1 / 0.53, rel=0.05)
    factor = 0.4 if rescale is False else 0.4 * restored
    assert_close(mx.array(moved[is_kept]), factor * change[is_kept], bound=1e-5)


def test_the_command_prints_the_notes_and_refuses_options_that_the_file_sets(
    models: dict[str, str], tmp_path: Path
) -> None:
    path = tmp_path / "merge.yaml"
    path.write_text(
        f"merge_method: dare_linear\nbase_model: {models['BASE']}\nname: mine\n"
        f"models:\n- model: {models['A']}\n  parameters: {{weight: 1, density: 0.5}}\n"
    )
    actual = []
    for i, seed in enumerate((["--seed", "1"], ["--seed", "1"], ["--seed", "2"])):
        out = tmp_path / f"out{i}"
        args = ["models", "-c", str(path), "--save-path", str(out), *seed]
        result = CliRunner().invoke(command, args)
        assert result.exit_code == 0, result.output
        assert "name: has no effect on the merged model." in result.stdout
        actual.append(read(out, MATRIX))
    assert (actual[0] == actual[1]).all()
    assert (actual[0] != actual[2]).any()
    args = ["models", "-c", str(path), "--save-path", str(tmp_path / "x")]
    result = CliRunner().invoke(command, [*args, "--method", "ties", "--density", "1"])
    assert result.exit_code == 2
    assert "--method, --density: set by the --config file" in result.stderr
    path.write_text("name: a\n---\nname: b\n")
    result = CliRunner().invoke(command, args)
    assert result.exit_code == 1
    assert "holds several YAML documents (---)" in result.stderr
    config = task_arithmetic(models)
    path.write_text(json.dumps(config))
    for seed in ("-1", str(2**64)):
        result = CliRunner().invoke(command, [*args, "--seed", seed])
        assert result.exit_code == 1
        assert "seed must be a whole number of at least 0" in result.stderr
