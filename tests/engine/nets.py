"""Small models that several engine tests use."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Block(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.q_proj = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(self.q_proj(x)))))


class Net(nn.Module):
    """An embedding, blocks, and an output head under the name that heads go by."""

    def __init__(self, blocks: int = 3, width: int = 8, vocab: int = 13, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, width)
        self.layers = nn.ModuleList(Block(width) for _ in range(blocks))
        self.lm_head = nn.Linear(width, vocab, bias=False)
        if tied:
            self.lm_head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x)


@torch.no_grad()
def scatter(model: nn.Module, name: str = "default", by: float = 0.1) -> nn.Module:
    """Move every parameter of an adapter."""
    for key, param in model.named_parameters():
        if f".adapters.{name}." in f".{key}":
            param.add_(torch.randn(param.shape).mul_(by).to(param.dtype))
    return model


def adapter_state(model: nn.Module, name: str = "default") -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items() if f".adapters.{name}." in f".{key}"}


def tiny_llama(dtype: torch.dtype = torch.float32, tied: bool = False) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    config = LlamaConfig(vocab_size=29, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                         num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=32,
                         tie_word_embeddings=tied)
    return LlamaForCausalLM(config).to(dtype)


def assert_as_good(got: Tensor, own: Tensor, truth: Tensor, dtype: torch.dtype) -> None:
    """`got` is nearer to the fp64 truth than twice what dense eager arithmetic in the same dtype is, by norm.

    The floor is for where that arithmetic happens to round to the truth: an eps of a 16-bit type, and the few by
    which two orders of the same sum differ in fp32 and fp64.
    """
    assert got.shape == own.shape == truth.shape
    mine, theirs = (float((t.double() - truth.double()).norm() / truth.double().norm()) for t in (got, own))
    floor = torch.finfo(dtype).eps * {torch.float64: 32, torch.float32: 4}.get(dtype, 1)
    assert mine <= 2 * theirs + floor, f"error {mine:.3g}, dense {dtype} has {theirs:.3g}"
