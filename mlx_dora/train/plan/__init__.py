"""Predicts the memory of a training without reading weights."""
