"""The model and golden data of these tests.

golden/ holds outputs of NVIDIA ModelOpt itself (torch 2.13, CPU, fp32): what it validates, which layers patterns hit,
what it freezes, and outputs and gradients of this model with one and two adapters.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from veneer.attached import adapter_names, hosts

GOLDEN = Path(__file__).parent / "golden"
META = json.loads((GOLDEN / "meta.json").read_text())
LAYERS = ["self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2", "output_layer"]


class Toy(nn.Module):
    """Megatron's names on ordinary layers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.LayerNorm(16)
        self.self_attention = nn.ModuleDict({"linear_qkv": nn.Linear(16, 48, bias=False),
                                             "linear_proj": nn.Linear(16, 16, bias=False)})
        self.mlp = nn.ModuleDict({"linear_fc1": nn.Linear(16, 32, bias=False),
                                  "linear_fc2": nn.Linear(32, 16, bias=False)})
        self.output_layer = nn.Linear(16, 10, bias=False)

    def forward(self, x):
        q, k, v = self.self_attention["linear_qkv"](self.norm(x)).chunk(3, dim=-1)
        x = x + self.self_attention["linear_proj"](q * torch.sigmoid(k) + v)
        x = x + self.mlp["linear_fc2"](F.relu(self.mlp["linear_fc1"](self.norm(x))))
        return self.output_layer(x)


def golden():
    """The model with ModelOpt's base weights, and its data."""
    data = load_file(GOLDEN / "toy.safetensors")
    model = Toy()
    state = {key.removeprefix("two.state."): t for key, t in data.items() if key.startswith("two.state.")}
    model.load_state_dict({key: tensor for key, tensor in state.items() if ".lora_" not in key})
    return model, data, {key: tensor for key, tensor in state.items() if ".lora_" in key}


def structure(model):
    """layer → adapter → rank, scale and whether it is on, as ModelOpt's own structure has it."""
    found = {layer: {} for layer in LAYERS}
    for layer, host in hosts(model):
        for name in adapter_names(model):
            if name in host.adapters:
                adapter = host.adapters[name]["weight"]
                on = name in host.veneer.route.live and name not in host.veneer.off
                found[layer][name] = {"rank": adapter.rank, "scale": adapter.scale, "enable": on}
    return found


def requires_grad(model):
    """By ModelOpt's names."""
    found = {name: p.requires_grad for name, p in model.named_parameters() if ".adapters." not in name}
    for layer, host in hosts(model):
        for name, slots in host.adapters.items():
            for letter, factor in (("a", "A"), ("b", "B")):
                found[f"{layer}.lora_{letter}_{name}.weight"] = getattr(slots["weight"], factor).requires_grad
    return found
