"""The model itself, out of the wrappers whose prefixes belong in no name."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn


def unwrap(model: nn.Module) -> nn.Module:
    """The model out of `torch.compile` and data-parallel wrappers."""
    compiler: Any = sys.modules.get("torch._dynamo.eval_frame")  # slow to import, and there once one is compiled
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif compiler is not None and isinstance(model, compiler.OptimizedModule):
            model = model._orig_mod
        else:
            return model
