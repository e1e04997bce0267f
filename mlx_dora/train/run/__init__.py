"""A training run: prepare, resume, loop, reports and checkpoints."""
