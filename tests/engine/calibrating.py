"""What the tests of statistics and of the starts from them share: small models and data."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from veneer.calibrate import calibrate
from veneer.method import VeneerWarning
from veneer.statistics import Statistics


class Attention(nn.Module):
    """q, k, v from one input, o from another; a loss over tokens when there are labels."""

    def __init__(self, width: int = 12, vocab: int = 17) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, width)
        for name in ("q", "k", "v", "o"):
            setattr(self, name, nn.Linear(width, width, bias=False))
        self.lm_head = nn.Linear(width, vocab, bias=False)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, attention_mask: Tensor | None = None) -> Any:
        x = self.embed(input_ids)
        x = self.o(torch.tanh(self.q(x)) * self.k(x) + self.v(x))
        logits = self.lm_head(x)
        if labels is None:
            return logits
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


def tokens(rows: int = 6, length: int = 10, vocab: int = 17) -> dict[str, Tensor]:
    ids = torch.randint(0, vocab, (rows, length))
    return {"input_ids": ids, "labels": ids.roll(1, 1)}


def cut(batch: dict[str, Tensor], size: int) -> list[dict[str, Tensor]]:
    """One batch as several of `size` rows (the last may have fewer)."""
    parts = {key: value.split(size) for key, value in batch.items()}
    return [dict(zip(parts, part, strict=True)) for part in zip(*parts.values(), strict=True)]


def found(model: nn.Module, batches: Sequence[Any], rules: Any, **options: Any) -> Statistics:
    """`calibrate` where nobody minds that components have not settled after so few batches."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*had not settled", category=VeneerWarning)
        return calibrate(model, batches, rules, **options)


def seen_by(model: nn.Module, name: str, batches: Sequence[dict[str, Tensor]]) -> Tensor:
    """All inputs (n, in) that a layer is given, by a hook of our own."""
    rows: list[Tensor] = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda m, args: rows.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    hook.remove()
    return torch.cat(rows)
