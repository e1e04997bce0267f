import pytest

from mlx_dora.evaluate import cross_entropy


@pytest.fixture
def few_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute the logits of 17 tokens at a time."""
    monkeypatch.setattr(cross_entropy, "CHUNK_LOGITS", 1)
    monkeypatch.setattr(cross_entropy, "CHUNK_TOKENS", 17)
