"""The methods by name, for those who must not import MLX to list them."""

MEANS = ("slerp", "karcher", "nmean", "magnitude_weighted")
"""Mean direction and mean magnitude of each row, apart."""

SUMS = ("linear", "task_arithmetic")
"""Combinations of the rows as they are; closed over adapters all the same."""

ELEMENTWISE = ("ties", "dare", "dare_ties", "tsv")
"""Element by element (or matrix by matrix): they need the dense weight."""

FISHER = "fisher"
"""Rows or elements weighted by Fisher information, which it needs of each input."""

NORMALIZED = (*MEANS, "linear", FISHER)
"""Methods whose weights are made to sum to 1."""

ADAPTER_METHODS = (*MEANS, *SUMS, FISHER, *ELEMENTWISE)

MODEL_METHODS = ADAPTER_METHODS
