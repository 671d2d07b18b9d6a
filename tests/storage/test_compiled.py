"""torch.compile over packed layers: one graph, with the numbers of the plain run."""

from __future__ import annotations

import pytest
import torch

import veneer
from veneer import LoRA

from .layers import Net


@pytest.mark.parametrize("scheme", ["nf4", "nf8", "gguf-q8_0"])
@pytest.mark.parametrize("adapted", [False, True])
def test_one_graph(scheme: str, adapted: bool) -> None:
    if scheme.startswith("gguf"):
        pytest.importorskip("gguf")
    torch.compiler.reset()
    model = Net()
    veneer.quantize(model, scheme)
    if adapted:
        veneer.attach(model, LoRA(rank=2))
        with torch.no_grad():
            model.up.adapters.default.weight.B.normal_()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 64)
    found = []
    for run in (model, compiled):
        model.zero_grad()
        xs = x.clone().requires_grad_()
        y = run(xs)
        y.square().sum().backward()
        found.append((y.detach(), xs.grad))
        if adapted:
            found[-1] += (model.up.adapters.default.weight.A.grad.clone(),)
    torch.testing.assert_close(found[0], found[1])
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))
