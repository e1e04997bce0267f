"""Groups of merge methods that tests run over, read from the table."""

from mlx_dora.merge.methods import METHODS

ALL = list(METHODS)
EXACT = [value.name for value in METHODS.values() if value.is_exact]
NORMALIZED = [value.name for value in METHODS.values() if value.is_mean]
MEANS = ["slerp", "karcher", "nmean", "magnitude_weighted"]
SUMS = ["linear", "task_arithmetic"]
FISHER = "fisher"
