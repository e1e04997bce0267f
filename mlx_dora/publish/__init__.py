"""Sharing results: model cards, and uploads to the Hugging Face Hub."""

from typing import TYPE_CHECKING

from mlx_dora.lazy import public_names

if TYPE_CHECKING:
    from mlx_dora.publish.card import adapter_card, fused_card
    from mlx_dora.publish.upload import check_upload, upload_folder

_HOME = {
    "adapter_card": "mlx_dora.publish.card",
    "check_upload": "mlx_dora.publish.upload",
    "fused_card": "mlx_dora.publish.card",
    "upload_folder": "mlx_dora.publish.upload",
}

__all__ = ["adapter_card", "check_upload", "fused_card", "upload_folder"]

__getattr__, __dir__ = public_names(__name__, _HOME)
