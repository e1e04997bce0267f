"""Calls of the ops, described as far as their speed depends on it."""

from typing import NamedTuple

import mlx.core as mx

DORA_SCALE = "dora_scale"


class Case(NamedTuple):
    """A kind of call for which the kernel or plain MLX is chosen.

    This is a named tuple because every call of an op on a GPU makes one.

    Attributes:
        op: ``normalize_rows``, ``adapted_norm``, ``fused_weight`` or ``dora_scale``.
        dtype: Dtype of the weight, of the scales of a packed weight, or of the
            activations.
        rows: Output rows of the weight; tokens for ``dora_scale``.
        columns: Columns of the weight; outputs of the layer for ``dora_scale``.
        rank: Rank of the update; 0 if the op has no update.
        bits: Bits of a packed weight; 0 for a dense weight.
        group_size: Columns of a packed weight that share a scale.
        has_offset: Whether ``dora_scale`` adds an offset, as for a base with a bias.
        has_gradients: Whether ``dora_scale`` is trained through.
    """

    op: str
    dtype: mx.Dtype
    rows: int
    columns: int
    rank: int = 0
    bits: int = 0
    group_size: int = 0
    has_offset: bool = False
    has_gradients: bool = False

    @property
    def dtype_name(self) -> str:
        """Name of the dtype, as in ``bfloat16``."""
        return str(self.dtype).removeprefix("mlx.core.")

    @property
    def name(self) -> str:
        """The op and its form, as in ``adapted_norm 4-bit``."""
        name = f"{self.op} {self.bits}-bit" if self.bits else self.op
        return f"{name} and gradients" if self.has_gradients else name

    @property
    def text(self) -> str:
        """All facts as text: the key in files."""
        facts = [f"{self.name} {self.dtype_name} {self.rows} x {self.columns}"]
        if self.bits:
            facts.append(f"groups of {self.group_size}")
        if self.rank:
            facts.append(f"rank {self.rank}")
        if self.has_offset:
            facts.append("offset")
        return ", ".join(facts)

    def for_tokens(self, tokens: int) -> "Case":
        """Return the case of a batch of `tokens`, from the case of a single token."""
        if self.op != DORA_SCALE:
            return self
        return self._replace(rows=self.rows * tokens)

    def points(self) -> tuple["Case", ...]:
        """Return the cases that are measured to choose for this case.

        The number of tokens varies from batch to batch, and is measured at powers of
        two: a count between two of them takes the kernel where both do.
        """
        if self.op != DORA_SCALE or self.rows < 1:
            return (self,)
        lower = 1 << (self.rows.bit_length() - 1)
        if lower == self.rows:
            return (self,)
        return self._replace(rows=lower), self._replace(rows=2 * lower)
