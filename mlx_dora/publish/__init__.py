"""Sharing results: model cards, and uploads to the Hugging Face Hub."""
