"""LoHa and LoKr against LyCORIS's own modules, with the same numbers.

Scales. LyCORIS's alpha defaults to 1 and ours to the rank, so both are said here. Where both of LoKr's factors are
whole, LyCORIS has s = 1 whatever alpha is: ours then gets no alpha, which is a scale of 1. With rs_lora, LyCORIS's
s is alpha/√rank: ours gets alpha·√rank.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from veneer import DoRA, LoHa, LoKr
from veneer.method import Method
from veneer.methods.lokr import split

from .compare import (
    BAR,
    CONV1D,
    CONV2D,
    LAYERS,
    LINEAR,
    assert_equal_layers,
    attach,
    copy_into,
    layers,
    parameters,
    relative,
)

pytest.importorskip("lycoris", reason="LoHa and LoKr are compared with lycoris_lora")
loha = pytest.importorskip("lycoris.modules.loha")
lokr = pytest.importorskip("lycoris.modules.lokr")
general = pytest.importorskip("lycoris.functional.general")

#: ours, LyCORIS's class, its options, and the layers
CASES: dict[str, tuple[Method, Any, dict[str, Any], tuple[str, ...]]] = {
    "loha": (LoHa(rank=3, alpha=6), loha.LohaModule, {"lora_dim": 3, "alpha": 6}, LINEAR + CONV1D + CONV2D),
    "loha-1": (LoHa(rank=1), loha.LohaModule, {"lora_dim": 1, "alpha": 1}, LINEAR + CONV1D + CONV2D),
    "loha-no-alpha": (LoHa(rank=2), loha.LohaModule, {"lora_dim": 2, "alpha": 0}, LINEAR),
    "loha-bypass": (LoHa(rank=3, alpha=2), loha.LohaModule, {"lora_dim": 3, "alpha": 2, "bypass_mode": True},
                    LINEAR + CONV2D),
    "loha-rs": (LoHa(rank=3, alpha=2 * math.sqrt(3)), loha.LohaModule, {"lora_dim": 3, "alpha": 2, "rs_lora": True},
                LINEAR),
    "loha-tucker": (LoHa(rank=3, alpha=6, effective_conv=True), loha.LohaModule,
                    {"lora_dim": 3, "alpha": 6, "use_tucker": True}, CONV1D + CONV2D),
    "lokr": (LoKr(rank=1, alpha=2), lokr.LokrModule, {"lora_dim": 1, "alpha": 2}, LINEAR + CONV1D + CONV2D),
    "lokr-bypass": (LoKr(rank=1, alpha=2), lokr.LokrModule, {"lora_dim": 1, "alpha": 2, "bypass_mode": True},
                    LINEAR + CONV2D[:3]),
    "lokr-rs": (LoKr(rank=2, alpha=3 * math.sqrt(2), decompose_factor=2), lokr.LokrModule,
                {"lora_dim": 2, "alpha": 3, "factor": 2, "rs_lora": True}, LINEAR),
    # s = 1 over there
    "lokr-whole": (LoKr(rank=8), lokr.LokrModule, {"lora_dim": 8, "alpha": 5}, LINEAR + CONV1D + CONV2D),
    "lokr-full-matrix": (LoKr(rank=64), lokr.LokrModule, {"lora_dim": 1, "full_matrix": True}, LINEAR + CONV2D),
    "lokr-both": (LoKr(rank=1, alpha=2, decompose_both=True), lokr.LokrModule,
                  {"lora_dim": 1, "alpha": 2, "decompose_both": True}, LINEAR + CONV1D + CONV2D),
    "lokr-factor": (LoKr(rank=2, alpha=3, decompose_factor=2), lokr.LokrModule,
                    {"lora_dim": 2, "alpha": 3, "factor": 2}, LINEAR + CONV1D + CONV2D),
    "lokr-factor-that-divides-nothing": (LoKr(rank=1, alpha=3, decompose_factor=5), lokr.LokrModule,
                                         {"lora_dim": 1, "alpha": 3, "factor": 5}, LINEAR[:2] + CONV2D),
    "lokr-tucker": (LoKr(rank=2, alpha=3, decompose_factor=2, effective_conv=True), lokr.LokrModule,
                    {"lora_dim": 2, "alpha": 3, "factor": 2, "use_tucker": True}, CONV1D + CONV2D),
    "lokr-tucker-both": (LoKr(rank=1, alpha=3, decompose_both=True, effective_conv=True), lokr.LokrModule,
                         {"lora_dim": 1, "alpha": 3, "decompose_both": True, "use_tucker": True}, CONV1D + CONV2D),
}
CELLS = [(case, layer) for case, (*_, names) in CASES.items() for layer in names]


def lycoris_module(cls: Any, options: dict[str, Any], layer: nn.Module) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """LyCORIS's module around a layer, with random values, and its parameters by our names."""
    layer.requires_grad_(False)
    module = cls("layer", layer, **options)
    names = {name: param for name, param in module.named_parameters() if name != "dora_scale"}
    with torch.no_grad():
        for param in names.values():
            param.normal_(std=0.5)
    return module, {name.removeprefix("hada_").removeprefix("lokr_"): param for name, param in names.items()}


@pytest.mark.parametrize(("case", "layer"), CELLS)
def test_outputs_and_gradients(case, layer):
    method, cls, options, _ = CASES[case]
    base, ours = layers((layer,)), layers((layer,))
    module, params = lycoris_module(cls, options, layers((layer,))[layer])
    (_, adapter), = attach(ours, method).values()
    copy_into(adapter, params)
    assert_equal_layers(base[layer], module, params, ours[layer], adapter, LAYERS[layer].input)


@pytest.mark.parametrize("layer", ["wide", "conv2d"])
@pytest.mark.parametrize(("inner", "cls", "options"), [
    (LoHa(rank=3), loha.LohaModule, {"lora_dim": 3, "alpha": 3}),
    (LoKr(rank=1), lokr.LokrModule, {"lora_dim": 1, "alpha": 1}),
])
def test_outputs_with_trained_lengths(inner, cls, options, layer):
    """LyCORIS's weight_decompose is DoRA's outputs. Its gradients are others: they go through the norm too, which the
    paper (§4.3) and PEFT take for a constant."""
    ours = layers((layer,))
    module, params = lycoris_module(cls, {**options, "weight_decompose": True}, layers((layer,))[layer])
    (_, adapter), = attach(ours, DoRA(inner)).values()
    values = {f"inner.{name}": param for name, param in params.items()}
    with torch.no_grad():
        module.dora_scale.mul_(torch.rand_like(module.dora_scale) + 0.5)
        copy_into(adapter, {**values, "magnitude": module.dora_scale})
        assert set(parameters(adapter)) == {*values, "magnitude"}
        x = torch.randn(LAYERS[layer].input)
        assert relative(ours[layer](x), module(x)) < BAR


def test_how_sizes_are_split():
    """Alike but for one thing: a factor that divides a size and is the larger of the two is the first here, as in
    PEFT, and the second in LyCORIS."""
    for size in range(1, 300):
        for factor in (-1, *range(1, 40)):
            own = split(size, factor)
            assert general.factorization(size, factor) == tuple(sorted(own))
            assert own[0] <= own[1] or own[0] == factor
