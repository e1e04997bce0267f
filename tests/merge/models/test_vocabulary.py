"""Vocabularies united, token by token."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_dora import DoRAError
from mlx_dora.adapters.hosting import load
from mlx_dora.io.checkpoint import Checkpoint
from mlx_dora.merge.models import read_mergekit, run_merge
from mlx_dora.merge.models.report import MergeReport
from tests.checks import to_numpy
from tests.merge.models.mergekit_models import make_all

NAME = "model.embed_tokens.weight"


@pytest.fixture(autouse=True)
def at_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_all(tmp_path)
    monkeypatch.chdir(tmp_path)


def merge(models: dict[str, float], out: str, **more: Any) -> MergeReport:
    entries = [
        {"model": name, "parameters": {"weight": weight}}
        for name, weight in models.items()
    ]
    config = {"merge_method": "linear", "base_model": next(iter(models)), **more}
    return run_merge(read_mergekit({**config, "models": entries}), Path(out))


def tokens(folder: str) -> dict[str, int]:
    from tokenizers import Tokenizer

    path = str(Path(folder) / "tokenizer.json")
    return Tokenizer.from_file(path).get_vocab(with_added_tokens=True)


def row(folder: str, token: str) -> np.ndarray:
    return to_numpy(Checkpoint(folder).tensor(NAME))[tokens(folder)[token]]


def test_the_union_keeps_the_bases_ids_and_adds_the_others_behind() -> None:
    report = merge({"A": 1, "V": 1, "W": 2}, "out", tokenizer_source="union")
    result, base = tokens("out"), tokens("A")
    assert {token: result[token] for token in base} == base
    assert set(result) == {*base, *tokens("V"), *tokens("W")}
    assert sorted(result.values()) == list(range(len(result)))
    assert any("with 4 added tokens" in line for line in report.lines())
    config = json.loads(Path("out/config.json").read_text())
    assert config["vocab_size"] == len(result) == 264


def test_a_token_takes_its_only_owner_the_base_or_the_mean() -> None:
    """`zebra` is V's alone, `hello` V's and W's, `<s>` not V's but the base's."""
    merge({"A": 1, "V": 1, "W": 2}, "out", tokenizer_source="union")
    assert np.allclose(row("out", "zebra"), row("V", "zebra"), atol=1e-7)
    mean = (row("V", "hello") + row("W", "hello")) / 2
    expected = (mean + row("V", "hello") + 2 * row("W", "hello")) / 4
    assert np.allclose(row("out", "hello"), expected, atol=1e-7)
    expected = (2 * row("A", "<s>") + 2 * row("W", "<s>")) / 4
    assert np.allclose(row("out", "<s>"), expected, atol=1e-7)
    expected = (row("A", "a") + row("V", "a") + 2 * row("W", "a")) / 4
    assert np.allclose(row("out", "a"), expected, atol=1e-7)


def test_special_tokens_stay_special_and_split_text_as_one() -> None:
    merge({"A": 1, "V": 1}, "out", tokenizer_source="union")
    added = json.loads(Path("out/tokenizer.json").read_text())["added_tokens"]
    special = {entry["content"]: entry["special"] for entry in added}
    assert special["<|tool|>"] is True
    assert special["hello"] is False
    _, tokenizer = load("out")
    assert tokenizer.encode("<|tool|>") == [tokens("out")["<|tool|>"]]


def test_spare_rows_are_the_mean_of_all_others() -> None:
    merge(
        {"A": 1, "P": 3}, "out", tokenizer={"source": "base", "pad_to_multiple_of": 64}
    )
    result = to_numpy(Checkpoint("out").tensor(NAME))
    assert result.shape[0] == 320
    assert np.allclose(result[260:], result[:260].mean(0), atol=1e-6)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"source": {"kind": "model_token", "model": "A", "token": "none"}},
         "A has no token 'none'"),
        ({"source": {"kind": "model_token", "model": "A", "token_id": 999}},
         "A has no token 999"),
        ({"source": "A"}, "A has no token '<.new.>'"),
        ({"source": "B"}, "B is not among the merged models"),
    ],
)  # fmt: skip
def test_rules_that_name_no_embedding_are_refused(
    rule: dict[str, Any], message: str
) -> None:
    with pytest.raises(DoRAError, match=message):
        merge({"A": 1, "W": 1}, "out", tokenizer={"tokens": {"<|new|>": rule}})
    assert not Path("out").exists()


def test_a_tokenizer_may_come_from_a_folder_without_weights() -> None:
    """Only its tokenizer and config are read; no model is downloaded for it."""
    Path("V/model.safetensors").unlink()
    report = merge({"A": 1, "W": 1}, "out", tokenizer_source="V")
    assert tokens("out") == tokens("V")
    note = "2 tokens that no model has get embeddings of 0 ('zebra', '<|tool|>')"
    assert any(note in line for line in report.lines())
    assert not row("out", "zebra").any()  # no model has it
    expected = (row("A", "a") + row("W", "a")) / 2
    assert np.allclose(row("out", "a"), expected, atol=1e-7)


def test_a_rule_for_a_token_that_every_model_has_needs_force() -> None:
    rules = {"a": {"source": {"kind": "zero"}}}
    report = merge({"A": 1, "W": 1}, "out", tokenizer={"tokens": rules})
    assert any("a: has no effect" in line for line in report.lines())
    expected = (row("A", "a") + row("W", "a")) / 2
    assert np.allclose(row("out", "a"), expected, atol=1e-7)
    rules["a"]["force"] = True  # type: ignore[assignment]
    merge({"A": 1, "W": 1}, "forced", tokenizer={"tokens": rules})
    assert not row("forced", "a").any()


def test_the_ids_of_the_named_tokenizer_go_into_the_config() -> None:
    report = merge({"A": 1, "V": 1}, "out", tokenizer_source="V")
    config = json.loads(Path("out/config.json").read_text())
    own = json.loads(Path("V/config.json").read_text())
    assert config["eos_token_id"] == own["eos_token_id"]
    assert "eos_token_id: that of V." in report.lines()
    assert tokens("out") == tokens("V")


def test_a_tokenizer_with_more_tokens_than_rows() -> None:
    """Added tokens without a row are dropped; tokens of the vocabulary refused."""
    weights = mx.load("W/model.safetensors")
    assert isinstance(weights, dict)
    mx.eval(weights)
    for rows, message in ((259, None), (200, "57 tokens of tokenizer.json")):
        mx.save_safetensors(
            "W/model.safetensors", {**weights, NAME: weights[NAME][:rows]}
        )
        config = json.loads(Path("W/config.json").read_text())
        Path("W/config.json").write_text(json.dumps({**config, "vocab_size": rows}))
        if message is None:
            merge({"W": 1, "A": 1}, "out", tokenizer_source="base")
            assert max(tokens("out").values()) == 258
            assert Checkpoint("out").info(NAME).shape[0] == 259
        else:
            with pytest.raises(DoRAError, match=message):
                merge({"W": 1, "A": 1}, "none", tokenizer_source="base")


def test_packed_embeddings_are_aligned_too(make_tiny_folder: Any) -> None:
    """Unpacked, aligned, and packed again as the base's."""
    packed = make_tiny_folder("packed", bits=8)
    content = json.loads((packed / "tokenizer.json").read_text())
    other = make_tiny_folder("other", seed=2)
    changed = json.loads((other / "tokenizer.json").read_text())
    vocabulary = changed["model"]["vocab"]
    first, second = list(vocabulary)[:2]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(changed))
    assert content != changed
    merge({str(packed): 0.0, str(other): 1.0}, "out", tokenizer_source="base")
    result = Checkpoint("out")
    assert result.info("model.embed_tokens.weight").dtype == "U32"
    model, _ = load("out")
    table: Any = dict(model.named_modules())["model.embed_tokens"]
    swapped = to_numpy(table(mx.array([vocabulary[second], vocabulary[first]])))
    own = to_numpy(Checkpoint(other).tensor(NAME))
    expected = own[[vocabulary[first], vocabulary[second]]]
    assert np.abs(swapped - expected).max() < 0.02 * np.abs(own).max()
