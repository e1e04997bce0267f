"""Groups of merge methods that tests run over, read from the table."""

from mlx_dora.merge.methods import METHODS

ALL = list(METHODS)
EXACT = [one.name for one in METHODS.values() if one.is_exact]
NORMALIZED = [one.name for one in METHODS.values() if one.is_mean]
MEANS = ["slerp", "karcher", "nmean", "magnitude_weighted"]
SUMS = ["linear", "task_arithmetic"]
FISHER = "fisher"
