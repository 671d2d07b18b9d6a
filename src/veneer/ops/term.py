"""What an adapter contributes to a layer's output, as the ops see it: tensors, no methods, no modules."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from veneer.forms import Form


@dataclass(eq=False)
class Term:
    """y gains  gain ∘ (x Wᵀ + drop₂(keep ∘ (drop₁(x) ΔWᵀ))) − x Wᵀ + bias, with ΔW given by its form.

    gain (out,) or None for 1; keep (out,) or (1,), or None for 1; bias (out,) or None; `rows` (batch,) of 0/1 in
    any dtype, or None for every row of the batch; `dropout` and `out_dropout`, of drop₁ and drop₂, are 0 outside
    training.
    """

    form: Form
    dropout: float = 0.0
    gain: Tensor | None = None
    bias: Tensor | None = None
    rows: Tensor | None = None
    keep: Tensor | None = None
    out_dropout: float = 0.0
