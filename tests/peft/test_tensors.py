"""Names that PEFT's tensors have besides the usual, and weights saved along."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_dora.adapters.adapter import Adapter, take_adapter
from mlx_dora.adapters.config import DoRAConfig
from mlx_dora.errors import DoRAError
from mlx_dora.peft import from_peft, to_peft
from mlx_dora.peft.tensors import PEFT_TENSORS_NAME
from tests.adapters.folders import edit_config
from tests.adapters.training import QV, train

Make = Callable[..., Any]
EMBEDDINGS = "base_model.model.model.embed_tokens.weight"
HEAD = "base_model.model.lm_head.weight"


@pytest.fixture
def adapter(make_tiny_model: Make) -> Adapter:
    model = make_tiny_model()
    train(model, DoRAConfig(num_layers=2, keys=QV, rank=3))
    return take_adapter(model)


def rename(folder: Path, change: Callable[[str], str]) -> None:
    path = str(folder / PEFT_TENSORS_NAME)
    tensors = mx.load(path)
    assert isinstance(tensors, dict)
    mx.eval(tensors)
    mx.save_safetensors(path, {change(name): v for name, v in tensors.items()})


def add(folder: Path, **more: mx.array) -> None:
    path = str(folder / PEFT_TENSORS_NAME)
    tensors = mx.load(path)
    assert isinstance(tensors, dict)
    mx.eval(tensors)
    mx.save_safetensors(path, {**tensors, **more})


def with_adapter(name: str, adapter: str) -> str:
    for leaf in ("lora_A", "lora_B"):
        name = name.replace(f"{leaf}.weight", f"{leaf}.{adapter}.weight")
    return name.replace("_vector", f"_vector.{adapter}.weight")


@pytest.mark.parametrize("given", ["default", "my-adapter", "0"])
def test_report_21_the_adapters_name_is_taken_out(
    adapter: Adapter, tmp_path: Path, given: str
) -> None:
    to_peft(adapter, tmp_path / "peft")
    rename(tmp_path / "peft", lambda name: with_adapter(name, given))
    found = from_peft(tmp_path / "peft")
    assert found.tensors.keys() == adapter.tensors.keys()
    assert all(mx.array_equal(found.tensors[n], v) for n, v in adapter.tensors.items())


def test_report_21_several_adapters_are_named(adapter: Adapter, tmp_path: Path) -> None:
    to_peft(adapter, tmp_path / "peft")
    rename(
        tmp_path / "peft",
        lambda name: with_adapter(name, "one" if "layers.0" in name else "two"),
    )
    with pytest.raises(
        DoRAError, match=r"2 adapters .*selected_adapters=\['one'\].*two"
    ):
        from_peft(tmp_path / "peft")


def test_a_tensor_with_and_without_the_adapters_name_is_refused(
    adapter: Adapter, tmp_path: Path
) -> None:
    to_peft(adapter, tmp_path / "peft")
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.default.weight"
    add(tmp_path / "peft", **{name: mx.ones((3, 32))})
    with pytest.raises(DoRAError, match=r"stored twice: .*q_proj\.lora_A"):
        from_peft(tmp_path / "peft")


def test_report_25_copies_of_tied_embeddings_are_left_out(
    adapter: Adapter,
    make_tiny_model: Make,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    base = make_tiny_model()
    own = base.model.embed_tokens.weight
    to_peft(adapter, tmp_path / "peft")
    add(tmp_path / "peft", **{EMBEDDINGS: own, HEAD: own})
    with caplog.at_level(logging.WARNING, logger="mlx_dora"):
        found = from_peft(tmp_path / "peft", base)
    assert found.tensors.keys() == adapter.tensors.keys()
    assert "left out" in caplog.text
    assert "lm_head.weight" in caplog.text
    assert "embed_tokens.weight" in caplog.text


def test_copies_that_are_not_the_models_are_refused_for_their_own_reason(
    adapter: Adapter, make_tiny_model: Make, tmp_path: Path
) -> None:
    tied, untied = make_tiny_model(), make_tiny_model(tie_word_embeddings=False)
    packed = make_tiny_model(bits=4)
    own = tied.model.embed_tokens.weight
    cases = [
        (tied, HEAD, own + 1, r"differ from the embeddings, to which .*lm_head"),
        (tied, EMBEDDINGS, own + 1, r"differ from the model's: .*embed_tokens"),
        (tied, EMBEDDINGS, own[:-1], r"another shape than the model's .*embed_tokens"),
        (untied, HEAD, own + 1, r"differ from the model's: .*lm_head"),
        (packed, EMBEDDINGS, own, r"cannot be compared .*packed.*embed_tokens"),
        (packed, HEAD, own, r"cannot be compared .*packed.*lm_head"),
        (tied, "base_model.model.foo.weight", own, r"does not have: .*foo\.weight"),
    ]
    for number, (base, name, value, message) in enumerate(cases):
        folder = tmp_path / str(number)
        to_peft(adapter, folder)
        add(folder, **{name: value})
        with pytest.raises(DoRAError, match=message):
            from_peft(folder, base)


def test_an_adapter_of_a_tied_head_is_refused_as_such(
    adapter: Adapter, make_tiny_model: Make, tmp_path: Path
) -> None:
    base = make_tiny_model()
    own = base.model.embed_tokens.weight
    to_peft(adapter, tmp_path / "peft")
    head = "base_model.model.lm_head"
    add(
        tmp_path / "peft",
        **{
            f"{head}.base_layer.weight": own,
            f"{head}.lora_A.weight": mx.ones((3, 32)),
            f"{head}.lora_B.weight": mx.ones((own.shape[0], 3)),
            f"{head}.lora_magnitude_vector": mx.ones(own.shape[0]),
        },
    )
    edit_config(tmp_path / "peft", target_modules=["q_proj", "v_proj", "lm_head"])
    with pytest.raises(DoRAError, match="this model ties its head") as caught:
        from_peft(tmp_path / "peft", base)
    assert "differ" not in str(caught.value)


def test_a_folder_or_a_loaded_model_are_the_same_base(
    adapter: Adapter, make_tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    from mlx_dora.adapters.hosting import load

    base = make_tiny_folder("base")
    to_peft(adapter, tmp_path / "peft")
    edit_config(tmp_path / "peft", target_modules=["q_proj", "v_proj"])
    expected = from_peft(tmp_path / "peft", load(base)[0])
    for given in (base, str(base)):
        found = from_peft(tmp_path / "peft", given)
        assert (found.config, found.base) == (expected.config, expected.base)
    with pytest.raises(DoRAError, match="there is no model folder"):
        from_peft(tmp_path / "peft", tmp_path / "none")
