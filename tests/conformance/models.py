"""Tiny models, one per kind of host. Built in fp64 so that every dtype of the matrix starts from it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCAB = 11


class Wrap(nn.Module):
    """One layer under the name `layer`."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class OwnForward(nn.Linear):
    """A subclass of `nn.Linear` that computes something else."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input * 0.5, self.weight, self.bias).tanh()


def hf_conv1d(out: int, in_: int) -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    layer = Conv1D(out, in_)
    nn.init.normal_(layer.weight, std=0.4)
    nn.init.normal_(layer.bias, std=0.4)
    return layer


class Tied(nn.Module):
    """Ids → embedding → a nonlinearity → logits over the same tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 6)
        self.head = nn.Linear(6, VOCAB, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embed(ids)))


class Attention(nn.Module):
    def __init__(self, batch_first: bool, kdim: int | None = None, vdim: int | None = None) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=batch_first, kdim=kdim, vdim=vdim)
        nn.init.normal_(self.attn.out_proj.bias, std=0.3)
        nn.init.normal_(self.attn.in_proj_bias, std=0.3)

    def forward(self, x: Tensor) -> Tensor:
        key, value = x[..., : self.attn.kdim], x[..., -self.attn.vdim:]
        return self.attn(x, key, value)[0]


class Matrix(nn.Module):
    """A bare parameter (out, in), or with `turned` (in, out)."""

    def __init__(self, rows: int, columns: int, turned: bool = False) -> None:
        super().__init__()
        self.turned = turned
        self.proj = nn.Parameter(torch.randn(rows, columns))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.proj if self.turned else F.linear(x, self.proj)


class Experts(nn.Module):
    """Every token through all experts (E, out, in) or, as `is_transposed` says, (E, in, out)."""

    def __init__(self, turned: bool) -> None:
        super().__init__()
        self.is_transposed = turned
        self.w = nn.Parameter(torch.randn(3, 8, 6) if turned else torch.randn(3, 6, 8))

    def forward(self, x: Tensor) -> Tensor:
        w = self.w if self.is_transposed else self.w.mT
        return torch.einsum("ti,eio->teo", x, w).tanh().sum(1)


class _Routed(nn.Module):
    """transformers' fused experts, two of three per token, chosen by the token itself."""

    experts: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        index = x[:, :3].topk(2).indices
        share = torch.tensor([0.75, 0.25], dtype=x.dtype, device=x.device).expand(x.shape[0], 2)
        return self.experts(x, index, share)


class Mixtral(_Routed):
    def __init__(self) -> None:
        super().__init__()
        from transformers.models.mixtral.modeling_mixtral import MixtralExperts

        # batched_mm: the implementation without a loop over the data, which fullgraph can compile.
        config: Any = SimpleNamespace(num_local_experts=3, hidden_size=8, intermediate_size=6, hidden_act="silu",
                                      _experts_implementation="batched_mm")
        self.experts = _filled(MixtralExperts(config))


class GptOss(_Routed):
    def __init__(self) -> None:
        super().__init__()
        from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

        config: Any = SimpleNamespace(num_local_experts=3, hidden_size=8, intermediate_size=6, swiglu_alpha=1.702,
                                      swiglu_limit=7.0, _experts_implementation="batched_mm")
        self.experts = _filled(GptOssExperts(config))


def _filled(module: nn.Module) -> nn.Module:
    for param in module.parameters():
        nn.init.normal_(param, std=0.4)
    return module
