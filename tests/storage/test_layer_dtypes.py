"""In which dtype a packed layer puts out its results under autocast: that of its own forward, adapted or not."""

from __future__ import annotations

import pytest
import torch

import veneer
from veneer import LoRA

from .layers import CASES, Case, scheme


@pytest.mark.parametrize("case", [Case("nf4", scheme("nf4")), *CASES], ids=lambda case: case.name)
def test_under_autocast(case: Case) -> None:
    model = case.build()
    layer, x = model.get_submodule("down"), torch.randn(16, 128)

    def given() -> torch.dtype:
        with torch.autocast("cpu", torch.bfloat16):
            return layer(x).dtype

    with torch.no_grad():
        bare = given()
    if case.name in ("nf4", "bnb-int8", "torchao-intx", "hqq-4", "gguf-q8_0", "gptq-stand-in"):
        assert bare == torch.bfloat16, "as an ordinary linear layer"
    assert given() == bare
    veneer.attach(model, LoRA(rank=2))
    layer = model.get_submodule("down")
    assert given() == bare, "in training"
    with torch.no_grad():
        assert given() == bare, "without gradients"
    veneer.merge(model)
    assert given() == bare, "merged"
