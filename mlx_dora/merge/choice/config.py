"""Default extent of a choice; imports nothing, so that help texts can name it."""

ROWS = 16
"""Default number of rows of each task."""
