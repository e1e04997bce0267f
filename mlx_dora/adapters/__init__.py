"""Adapters in a model or on disk: configuration, attaching, files and fusing."""
