"""Names in cards: Hub ids, and local paths without their folders."""

from mlx_dora.io.hub_id import hub_id
from mlx_dora.page import local


def name_of(text: str) -> str:
    """Return the Hub id or last name of a local path; return other text unchanged."""
    return (local.is_local(text) and hub_id(text)) or local.name_of(text)
