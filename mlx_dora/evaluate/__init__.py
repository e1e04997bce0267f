"""Evaluates a model: loss, label accuracy, samples, fused against unfused."""
