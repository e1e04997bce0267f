"""A training run: prepare, resume, loop, and what is reported and written."""
