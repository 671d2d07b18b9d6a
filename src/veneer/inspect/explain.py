"""Which arithmetic each adapted weight takes right now, and why."""

from __future__ import annotations

import torch
from torch import nn

from veneer.attached import hosts


def explain(model: nn.Module) -> str:
    """A table: weight, path ("fused", "low rank", "weight space", …), reason, for the live adapters."""
    rows = [("weight", "path", "why")]
    # To see its path, what a training forward would drop is drawn.
    with torch.no_grad(), torch.random.fork_rng():
        for name, host in hosts(model):
            rows += [(f"{name}.{param}" if name else param, *host.explain(param)) for param in host.veneer.layouts]
    widths = [max(len(row[i]) for row in rows) for i in range(2)]
    return "\n".join(f"{w.ljust(widths[0])}  {p.ljust(widths[1])}  {why}" for w, p, why in rows)
