"""Names of buffers and tied heads, as checkpoints have them."""

import pytest

from mlx_dora.io.derived import head_and_embedding, is_buffer, ties_embeddings


def test_rotary_tables_are_buffers_and_weights_are_not() -> None:
    assert is_buffer("model.layers.0.self_attn.rotary_emb.inv_freq")
    assert is_buffer("transformer.rotary_pos_emb.inv_freq")
    assert not is_buffer("model.layers.0.self_attn.q_proj.weight")
    assert not is_buffer("model.rotary_emb.proj.weight")


@pytest.mark.parametrize(
    ("names", "pair"),
    [
        (
            ["model.embed_tokens.weight", "lm_head.weight"],
            ("lm_head.weight", "model.embed_tokens.weight"),
        ),
        (["transformer.wte.weight"], ("lm_head.weight", "transformer.wte.weight")),
        (
            ["language_model.model.embed_tokens.weight", "vision.proj.weight"],
            (
                "language_model.lm_head.weight",
                "language_model.model.embed_tokens.weight",
            ),
        ),
        (["a.weight", "b.weight"], None),
    ],
)
def test_head_and_embedding_are_known_by_name(
    names: list[str], pair: tuple[str, str] | None
) -> None:
    assert head_and_embedding(names) == pair


def test_the_config_says_whether_they_are_tied() -> None:
    assert ties_embeddings({"tie_word_embeddings": True}) is True
    assert ties_embeddings({"text_config": {"tie_word_embeddings": False}}) is False
    assert ties_embeddings({"text_config": 5}) is None
