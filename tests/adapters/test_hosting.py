import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_dora.adapters.config import DoRAConfig
from mlx_dora.adapters.files import save_adapter
from mlx_dora.adapters.hosting import (
    load,
    load_with_config,
    model_folder,
    use_in_mlx_lm,
)
from mlx_dora.adapters.surgery import apply_dora, dora_layers
from mlx_dora.errors import DoRAError
from mlx_dora.layers import DoRALinear
from tests.adapters.training import QV, TOKENS, perturb, train

MakeFolder = Callable[..., Path]


@pytest.fixture
def adapter(make_tiny_folder: MakeFolder, tmp_path: Path) -> Path:
    model, _ = load(make_tiny_folder("base"))
    train(model)
    save_adapter(model, tmp_path / "adapter", base_model="base")
    return tmp_path / "adapter"


def test_load_is_mlx_lms_with_our_layers(adapter: Path) -> None:
    base = adapter.parent / "base"
    plain, _ = load(base)
    expected = train(plain)
    model, tokenizer = load(str(base), str(adapter))
    assert mx.array_equal(model(TOKENS), expected)
    assert not model.training
    assert all(isinstance(layer, DoRALinear) for _, layer in dora_layers(model))
    assert tokenizer.encode("the fox")
    lazy, _, config = load_with_config(base, adapter, lazy=True)
    assert mx.array_equal(lazy(TOKENS), expected)
    assert config["model_type"] == "llama"


def test_another_base_is_refused_unless_asked(
    adapter: Path, make_tiny_folder: MakeFolder
) -> None:
    other = make_tiny_folder("other", seed=4)
    with pytest.raises(DoRAError, match=r"adapter does not fit the model: it was tr"):
        load(other, adapter)
    assert dora_layers(load(other, adapter, check_base=False)[0])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/no/such/model", "there is no model folder /no/such/model."),
        ("./model", "there is no model folder ./model."),
        ("../up", "there is no model folder ../up."),
        ("some-org/no-such-model", "the Hugging Face Hub gave no model"),
        ("no-such-model", "give a local model folder, or check the name"),
        ("what is this?", "the Hugging Face Hub gave no model"),
        ("a//b", "there is no model folder a//b."),
    ],
)
def test_unknown_model_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DoRAError) as caught:
        load(name)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_folder_that_is_no_model_is_one_line(
    tiny_model_folder: Path, tmp_path: Path
) -> None:
    cases: list[tuple[str, str, str]] = [
        ("config.json", "{", "is not JSON"),
        ("config.json", "[]", "must hold a JSON object"),
        ("config.json", "{}", "cannot load"),
        ("config.json", '{"model_type": "nonsense"}', "nonsense not supported"),
        ("config.json", '{"model_type": "llama"}', "cannot load"),
        ("model.safetensors", "", "it is empty"),
    ]
    for file, text, message in cases:
        kept = (tiny_model_folder / file).read_bytes()
        (tiny_model_folder / file).write_text(text)
        with pytest.raises(DoRAError) as caught:
            load(tiny_model_folder)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)
        (tiny_model_folder / file).write_bytes(kept)
    (tiny_model_folder / "model.safetensors").unlink()
    with pytest.raises(DoRAError, match="No safetensors found"):
        load(tiny_model_folder)
    with pytest.raises(DoRAError, match=r"is a file; give the model's folder"):
        load(tiny_model_folder / "config.json")
    (tmp_path / "e").mkdir()
    with pytest.raises(DoRAError, match=r"no config.json: not a model folder\.$"):
        load(tmp_path / "e")


def damage_json(**values: Any) -> Callable[[bytes], bytes]:
    return lambda content: json.dumps({**json.loads(content), **values}).encode()


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("tokenizer.json", lambda content: b"{}"),
        ("tokenizer.json", lambda content: content[: len(content) // 2]),
        ("tokenizer.json", damage_json(model={"type": "x"})),
        ("tokenizer_config.json", damage_json(tool_parser_type="os")),
        ("tokenizer_config.json", damage_json(tokenizer_class=5)),
        ("tokenizer_config.json", damage_json(model_max_length="x")),
        ("tokenizer_config.json", lambda content: b"[" * 100_000),
        ("config.json", damage_json(num_attention_heads=0)),
        ("config.json", damage_json(num_attention_heads=3)),  # does not divide 32
        ("config.json", damage_json(rope_theta="x")),
        ("config.json", damage_json(hidden_size=10**400)),
        ("config.json", damage_json(quantization={"bits": "x"})),
        ("config.json", lambda content: b"\xef\xbb\xbf" + content),
        ("model.safetensors", lambda content: content[:-4]),
    ],
)
def test_a_damaged_model_is_one_line_that_names_it(
    tiny_model_folder: Path, file: str, damage: Callable[[bytes], bytes]
) -> None:
    path = tiny_model_folder / file
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DoRAError) as caught:
        load(tiny_model_folder)
    assert str(tiny_model_folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_adapter_in_place_of_the_model_is_recognised(adapter: Path) -> None:
    with pytest.raises(DoRAError, match="It is an adapter: give its base"):
        load(adapter)


def test_broken_adapter_is_found_before_the_model_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(DoRAError, match="is not an adapter folder"):
        load("/no/such/model", tmp_path)


def test_remote_code_stays_off(tiny_model_folder: Path) -> None:
    path = tiny_model_folder / "config.json"
    config = {**json.loads(path.read_text()), "model_file": "evil.py"}
    path.write_text(json.dumps(config))
    (tiny_model_folder / "evil.py").write_text("raise SystemExit('it ran')")
    with pytest.raises(DoRAError, match="disabled by default"):
        load(tiny_model_folder)


def test_model_folder_expands_the_home(
    tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tiny_model_folder.parent))
    assert model_folder("~/tiny") == tiny_model_folder
    with pytest.raises(DoRAError, match="there is no model folder ~/none"):
        model_folder("~/none")


def test_context_undoes_everything(adapter: Path) -> None:
    import mlx_lm

    dora, utils = (import_module(f"mlx_lm.tuner.{name}") for name in ("dora", "utils"))
    theirs = dora.DoRALinear
    base = str(adapter.parent / "base")
    expected = load(base, adapter)[0](TOKENS)
    with use_in_mlx_lm():
        lora = import_module("mlx_lm.lora")  # perhaps not imported before
        assert dora.DoRALinear is DoRALinear
        assert utils.DoRALinear is DoRALinear
        with use_in_mlx_lm():
            pass
        assert utils.DoRALinear is DoRALinear
        model, *_ = mlx_lm.load(base, adapter_path=str(adapter))
        assert len(dora_layers(model)) == 4
        assert mx.array_equal(model(TOKENS), expected)
    stock, *_ = mlx_lm.load(base, adapter_path=str(adapter))
    assert dora_layers(stock) == []
    assert dora.DoRALinear is theirs
    assert utils.DoRALinear is theirs
    assert lora.load_adapters is utils.load_adapters
    assert lora.load_adapters.__module__ == "mlx_lm.tuner.utils"


def test_mlx_lms_own_conversion_uses_our_layers(tiny_model: nn.Module) -> None:
    from mlx_lm.tuner.utils import linear_to_lora_layers

    parameters = {"rank": 4, "scale": 2.0, "dropout": 0.0, "keys": list(QV)}
    with use_in_mlx_lm():
        linear_to_lora_layers(tiny_model, 1, parameters, use_dora=True)
    assert len(dora_layers(tiny_model)) == 2


def test_strict_loading_inside_mlx_lm(adapter: Path) -> None:
    import mlx_lm

    path = str(adapter / "adapters.safetensors")
    tensors = mx.load(path)
    assert isinstance(tensors, dict)
    kept = {name: value for name, value in tensors.items() if not name.endswith(".m")}
    mx.eval(kept)
    mx.save_safetensors(path, kept)
    base = str(adapter.parent / "base")
    mlx_lm.load(base, adapter_path=str(adapter))  # stock takes it in silence
    with use_in_mlx_lm(), pytest.raises(DoRAError, match=r"missing: .*q_proj.m"):
        mlx_lm.load(base, adapter_path=str(adapter))


def test_other_kinds_load_inside_mlx_lm(
    make_tiny_folder: MakeFolder, tmp_path: Path
) -> None:
    import mlx_lm

    base = make_tiny_folder("base")
    model, _ = load(base)
    expected = train(model, DoRAConfig(num_layers=1, keys=QV), "lora")
    save_adapter(model, tmp_path / "a")
    with use_in_mlx_lm():
        model, *_ = mlx_lm.load(str(base), adapter_path=str(tmp_path / "a"))
    assert mx.array_equal(model(TOKENS), expected)


def test_base_of_another_dtype_is_another_base(
    make_tiny_folder: MakeFolder, adapter: Path
) -> None:
    half = make_tiny_folder("half", dtype=mx.bfloat16)
    with pytest.raises(DoRAError, match="tensors differ"):
        load(half, adapter)


def test_fresh_adapter_on_a_loaded_model(tiny_model_folder: Path) -> None:
    model, _ = load(tiny_model_folder)
    before = model(TOKENS)
    apply_dora(model, DoRAConfig(num_layers=1))
    assert mx.array_equal(model(TOKENS), before)
    perturb(model)
    assert not mx.array_equal(model(TOKENS), before)
