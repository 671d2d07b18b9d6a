"""Tiny random models and adapters whose every tensor is random, so that equal outputs mean something."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

import veneer
from veneer.method import VeneerWarning


class Mixed(nn.Module):
    """Embedding, convolutions, linear layers, norms, attention: (batch, 12) token ids → (batch, 12, 7)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8, padding_idx=0)
        self.conv1 = nn.Conv1d(8, 8, 3, stride=1, padding=1)
        self.conv2 = nn.Conv2d(1, 4, (3, 2), stride=(2, 1), padding=1)
        self.block = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8, bias=False))
        self.norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 7)

    def forward(self, ids):
        x = self.embed(ids)
        x = x + self.conv1(x.mT).mT
        x = x + self.conv2(x.unsqueeze(1)).mean((1, 2), keepdim=False)[:, None, :8]
        x = self.norm(x + self.block(x))
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(x)


def randomise(model: nn.Module, names=("lora_", "adapters", "modules_to_save", "trainable_tokens", ".bias")) -> None:
    """Every trainable parameter gets a random value of its own size of order."""
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for param in model.parameters():
            if param.requires_grad:
                noise = torch.randn(param.shape, generator=generator).to(param.dtype)
                param.add_(0.3 * noise if param.dim() > 1 else 0.1 * noise)


def llama(tied: bool = False):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(5)
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, tie_word_embeddings=tied, attention_bias=True)
    return transformers.LlamaForCausalLM(config).eval()


def gpt2():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(6)
    config = transformers.GPT2Config(vocab_size=40, n_embd=32, n_layer=2, n_head=4, n_positions=32)
    return transformers.GPT2LMHeadModel(config).eval()


def mixed():
    torch.manual_seed(7)
    return Mixed().eval()


BASES = {"llama": llama, "llama_tied": lambda: llama(tied=True), "gpt2": gpt2, "mixed": mixed}
IDS = {"llama": (3, 9), "llama_tied": (3, 9), "gpt2": (3, 9), "mixed": (3, 12)}


_MADE: dict[str, nn.Module] = {}


def fresh(name: str) -> nn.Module:
    """A copy of a base model: the same weights each time."""
    if name not in _MADE:
        _MADE[name] = BASES[name]()
    return copy.deepcopy(_MADE[name])


def outputs(model: nn.Module, kind: str) -> torch.Tensor:
    """The model's outputs on fixed token ids, which go through every row of a small vocabulary."""
    size = 20 if kind == "mixed" else 40
    rows, columns = IDS[kind]
    ids = torch.arange(rows * columns).reshape(rows, columns) * 7 % size
    with torch.no_grad():
        found = model(ids)
    return found if isinstance(found, torch.Tensor) else found.logits


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference relative to the largest value."""
    return float((a - b).abs().max() / b.abs().max())


def adapted(model: nn.Module, rules, **options) -> nn.Module:
    """The model with a trained-looking adapter."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", VeneerWarning)  # some of the rules are uneven on purpose
        veneer.attach(model, rules, **options)
    randomise(model)
    return model
