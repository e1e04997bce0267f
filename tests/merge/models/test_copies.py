"""Stored copies of tied heads and rotary buffers in merges of models.

The numbers in the names are reports of mergekit, mlx-lm and TinyLlama.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_dora import DoRAError
from mlx_dora.analyze import analyze_finetune
from mlx_dora.io.checkpoint import Checkpoint
from mlx_dora.merge import merge_models
from tests.checks import assert_close
from tests.merge.models.test_merge import edit, read

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
BUFFER = "model.layers.{}.self_attn.rotary_emb.inv_freq"


@pytest.fixture
def tied(make_tiny_folder: Callable[..., Path]) -> tuple[Path, Path]:
    """Two tied models; the second stores a copy of its head."""
    plain, copied = (make_tiny_folder(f"m{seed}", seed=seed) for seed in (1, 2))
    edit(copied, lm_head__weight=mx.array(read(copied, EMBEDDING)))
    return plain, copied


def mean(first: Path, other: Path, name: str = EMBEDDING) -> np.ndarray:
    return (read(first, name).astype(float) + read(other, name)) / 2


def test_a_copied_head_of_an_input_is_left_out_with_a_note__mlx_lm_1298(
    tied: tuple[Path, Path], tmp_path: Path
) -> None:
    report = merge_models(list(tied), save_path=tmp_path / "out", method="linear")
    assert HEAD not in Checkpoint(tmp_path / "out").names
    assert_close(mx.array(read(tmp_path / "out", EMBEDDING)), mean(*tied))
    assert f"config: {HEAD}." in report.lines()[0]


def test_a_copied_head_of_the_pattern_stays_a_copy__mergekit_464(
    tied: tuple[Path, Path], tmp_path: Path
) -> None:
    """Even if settings by name would make the head and the embedding differ."""
    plain, copied = tied
    weights = {"lm_head": [1.0, 0.0], "*": [1.0, 1.0]}
    report = merge_models(
        [copied, plain], save_path=tmp_path / "out", method="linear", weights=weights
    )
    head, embedding = (read(tmp_path / "out", name) for name in (HEAD, EMBEDDING))
    assert (head == embedding).all()
    assert_close(mx.array(embedding), mean(*tied))
    assert "a copy of the merged embedding" in report.lines()[0]


def test_an_untied_model_takes_the_embedding_of_a_tied_one_as_its_head__mergekit_464(
    make_tiny_folder: Callable[..., Path], tied: tuple[Path, Path], tmp_path: Path
) -> None:
    untied = make_tiny_folder("untied", seed=3, tie_word_embeddings=False)
    report = merge_models(
        [untied, tied[0]], save_path=tmp_path / "out", method="linear"
    )
    expected = (read(untied, HEAD).astype(float) + read(tied[0], EMBEDDING)) / 2
    assert_close(mx.array(read(tmp_path / "out", HEAD)), expected)
    assert_close(mx.array(read(tmp_path / "out", EMBEDDING)), mean(untied, tied[0]))
    assert f"merged as {HEAD} of {tied[0]}" in report.lines()[0]
    with pytest.raises(DoRAError, match=f"extra: {HEAD}"):
        merge_models([tied[0], untied], save_path=tmp_path / "no", method="linear")


def test_buffers_are_carried_from_the_pattern__tinyllama_127(
    tied: tuple[Path, Path], tmp_path: Path
) -> None:
    plain, other = tied
    names = [BUFFER.format(i) for i in range(2)]
    tables: dict[str, Any] = {n.replace(".", "__"): mx.ones((4,)) for n in names}
    edit(other, **tables)
    report = merge_models(
        [other, plain], save_path=tmp_path / "with", method="linear", weights=[1, 3]
    )
    for name in names:
        assert (read(tmp_path / "with", name) == 1).all()
    assert any("Rotary buffers are copied from" in line for line in report.lines())
    report = merge_models(
        [plain, other], save_path=tmp_path / "without", method="linear"
    )
    assert not {*names} & {*Checkpoint(tmp_path / "without").names}
    assert names[0] in report.lines()[0]


def test_analysis_skips_a_copied_head__mlx_examples_564(
    tied: tuple[Path, Path], make_tiny_folder: Callable[..., Path]
) -> None:
    plain, copied = tied
    again = make_tiny_folder("again", seed=2)  # the same without the copy
    expected = analyze_finetune(plain, again).layers
    for pair in ((plain, copied), (copied, plain)):
        result = analyze_finetune(*pair).layers
        assert [layer.name for layer in result] == [layer.name for layer in expected]
        assert result[0].delta_d == pytest.approx(expected[0].delta_d)
    edit(copied, lm_head__weight=mx.ones((320, 32)))
    with pytest.raises(DoRAError, match=f"lacks {HEAD}"):
        analyze_finetune(plain, copied)
