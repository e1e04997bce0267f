"""Training data: JSON lines to rows, targets and batches."""
