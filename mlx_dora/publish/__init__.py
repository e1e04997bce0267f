"""Sharing results: model cards, and uploads to the Hugging Face Hub."""

from mlx_dora.publish.card import adapter_card, fused_card
from mlx_dora.publish.upload import check_upload, upload_folder

__all__ = ["adapter_card", "check_upload", "fused_card", "upload_folder"]
