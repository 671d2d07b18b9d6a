"""Models and golden data of these tests.

golden/ holds outputs of NeMo AutoModel itself (torch 2.13, CPU, fp32): a table of matches, one patched linear layer, a
tiny Llama with its gradients and merged weights, and a directory it wrote.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

GOLDEN = Path(__file__).parent / "golden"
META = json.loads((GOLDEN / "meta.json").read_text())


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj = nn.Linear(8, 8)
        self.o_proj = nn.Linear(8, 8)

    def forward(self, x):
        return x + self.o_proj(self.q_proj(x))


class Toy(nn.Module):
    """The modules that the golden table of matches was made on."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.emb = nn.Embedding(16, 8)
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.xq_proj = nn.Linear(8, 8)
        self.fc = nn.Linear(8, 8)
        self.lm_head = nn.Linear(8, 16)

    def forward(self, ids):
        x = self.emb(ids)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.fc(self.xq_proj(x)))


class ToyForCausalLM(Toy):
    pass


class Experts(nn.Module):
    """Stacked experts, of which each token goes through all, behind a linear layer."""

    def __init__(self, experts=3, width=6, inner=4):
        super().__init__()
        torch.manual_seed(1)
        self.config = type("Config", (), {"num_experts_per_tok": 2})()
        self.router = nn.Linear(width, experts)
        self.experts = nn.Module()
        self.experts.up = nn.Parameter(torch.randn(experts, inner, width))
        self.experts.bias = nn.Parameter(torch.zeros(experts, inner))


def golden_linear():
    data = load_file(GOLDEN / "linear.safetensors")
    layer = nn.Linear(12, 20)
    with torch.no_grad():
        layer.weight.copy_(data["base_weight"])
        layer.bias.copy_(data["base_bias"])
    return layer, data


def golden_llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    data = load_file(GOLDEN / "llama.safetensors")
    model = LlamaForCausalLM(LlamaConfig(**META["llama"]["config"], _name_or_path="tiny-llama"))
    model.load_state_dict({key.removeprefix("base."): t for key, t in data.items() if key.startswith("base.")})
    return model, data


def golden_factors():
    """Adapter tensors by (module, "lora_A" or "lora_B")."""
    tensors = load_file(GOLDEN / "ckpt" / "adapter_model.safetensors")
    return {tuple(key.removeprefix("base_model.model.").removesuffix(".weight").rsplit(".", 1)): tensor
            for key, tensor in tensors.items()}
