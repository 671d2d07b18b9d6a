"""The axes of the matrix: what is a method, what is a host, which cells are forbidden and why.

A new method is one line in METHODS, a new host one line in HOSTS.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from veneer import DoRA, Full, LoRA, Rows
from veneer.method import Method

from . import models
from .toy_method import Circulant

Params = dict[str, Tensor]


@dataclass(frozen=True)
class MethodCase:
    """`dense` is the new weight (*batch, out, in) as a slow formula over the adapter's parameters by name.

    `dense_lookup` is the same for an embedding, where it differs because outputs are columns.
    """

    name: str
    method: Method
    dense: Callable[[Tensor, Params], Tensor]
    dense_lookup: Callable[[Tensor, Params], Tensor] | None = None

    def formula(self, kind: str) -> Callable[[Tensor, Params], Tensor]:
        return self.dense_lookup or self.dense if kind == "lookup" else self.dense

    @property
    def covers_bias(self) -> bool:
        return isinstance(self.method, Full)


@dataclass(frozen=True)
class HostCase:
    """`weights`: full name → "plain" (…, out, in), "transposed" (…, in, out), "conv" (out, in, *k) or "lookup".

    `biases` are the vectors that a method covering biases takes along. `input` gives the model's input for a
    number of batch rows, which lie along `batch_dim` of input and output.
    """

    name: str
    build: Callable[[], nn.Module]
    input: Callable[[int], Tensor]
    weights: dict[str, str]
    biases: tuple[str, ...] = ()
    batch_dim: int = 0

    @property
    def patterns(self) -> list[str]:
        return list(self.weights)


def _lora(scale: float) -> Callable[[Tensor, Params], Tensor]:
    return lambda W, p: W + scale * torch.matmul(p["B"], p["A"])


def _circulant(W: Tensor, p: Params) -> Tensor:
    rows = [torch.roll(p["c"], i, dims=-1) for i in range(W.shape[-2])]
    return W + 0.5 * torch.stack(rows, dim=-2)


def _dora(inner: Callable[[Tensor, Params], Tensor], dim: int = -1) -> Callable[[Tensor, Params], Tensor]:
    def dense(W: Tensor, p: Params) -> Tensor:
        V = inner(W, {k.removeprefix("inner."): v for k, v in p.items()})
        norm = V.detach().pow(2).sum(dim, keepdim=True).sqrt()  # a constant for the gradient, paper §4.3
        return p["magnitude"].unsqueeze(dim) * V / norm

    return dense


ROWS = (4, 1)


def _rows(W: Tensor, p: Params) -> Tensor:
    rows = list(W.unbind(0))
    for i, row in zip(ROWS, p["rows"], strict=True):
        rows[i] = row
    return torch.stack(rows)


METHODS = [
    MethodCase("lora", LoRA(rank=3), _lora(1.0)),
    MethodCase("rslora", LoRA(rank=4, alpha=6, rank_stabilized=True), _lora(6 / math.sqrt(4))),
    MethodCase("lora-bias", LoRA(rank=3, alpha=1.5, bias=True), _lora(0.5)),
    MethodCase("dora", DoRA(LoRA(rank=3)), _dora(_lora(1.0)), _dora(_lora(1.0), dim=-2)),
    MethodCase("full", Full(), lambda W, p: p["weight"]),
    MethodCase("rows", Rows(ROWS), _rows),
    MethodCase("circulant", Circulant(scale=0.5), _circulant),
    MethodCase("dora-circulant", DoRA(Circulant(scale=0.5)), _dora(_circulant), _dora(_circulant, dim=-2)),
]


def _vectors(*shape: int) -> Callable[[int], Tensor]:
    return lambda rows: torch.randn(rows, *shape, dtype=torch.float64)


def _second(*shape: int) -> Callable[[int], Tensor]:
    return lambda rows: torch.randn(shape[0], rows, *shape[1:], dtype=torch.float64)


def _ids(rows: int) -> Tensor:
    ids = torch.randint(0, models.VOCAB, (rows, 6))
    ids[:, 0] = 1  # a row that Rows trains; with padding_idx=1 also the padding
    return ids


_W, _B = {"layer.weight": "plain"}, ("layer.bias",)
_C, _L = {"layer.weight": "conv"}, {"layer.weight": "lookup"}
_QKV = {"attn.q_proj_weight": "plain", "attn.k_proj_weight": "plain", "attn.v_proj_weight": "plain",
        "attn.out_proj.weight": "plain"}
_IN = {"attn.in_proj_weight": "plain", "attn.out_proj.weight": "plain"}
_OUT = ("attn.out_proj.bias",)
_EXPERTS = {"experts.gate_up_proj": "plain", "experts.down_proj": "plain"}

HOSTS = [
    HostCase("linear", lambda: models.Wrap(nn.Linear(8, 6)), _vectors(3, 8), _W, _B),
    HostCase("linear-nobias", lambda: models.Wrap(nn.Linear(8, 6, bias=False)), _vectors(8), _W),
    HostCase("linear-subclass", lambda: models.Wrap(models.OwnForward(8, 6)), _vectors(3, 8), _W, _B),
    HostCase("hf-conv1d", lambda: models.Wrap(models.hf_conv1d(6, 8)), _vectors(3, 8),
             {"layer.weight": "transposed"}, _B),
    HostCase("conv1d", lambda: models.Wrap(nn.Conv1d(4, 6, 3, stride=2, padding=1)), _vectors(4, 9), _C, _B),
    HostCase("conv2d", lambda: models.Wrap(nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0))),
             _vectors(4, 6, 5), _C, _B),
    HostCase("conv2d-1x1", lambda: models.Wrap(nn.Conv2d(4, 6, 1)), _vectors(4, 3, 3), _C, _B),
    HostCase("conv2d-dilated", lambda: models.Wrap(nn.Conv2d(4, 6, 3, dilation=2, padding="same", bias=False)),
             _vectors(4, 5, 5), _C),
    HostCase("conv2d-groups", lambda: models.Wrap(nn.Conv2d(4, 6, 3, groups=2, padding=1)), _vectors(4, 4, 4), _C, _B),
    HostCase("conv2d-depthwise", lambda: models.Wrap(nn.Conv2d(6, 6, 3, groups=6, padding=1)),
             _vectors(6, 4, 4), _C, _B),
    HostCase("conv2d-reflect", lambda: models.Wrap(nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect")),
             _vectors(4, 4, 5), _C, _B),
    HostCase("conv3d", lambda: models.Wrap(nn.Conv3d(2, 6, (2, 3, 1), padding=(1, 0, 0))),
             _vectors(2, 3, 4, 2), _C, _B),
    HostCase("embedding", lambda: models.Wrap(nn.Embedding(models.VOCAB, 6)), _ids, _L),
    HostCase("embedding-padding", lambda: models.Wrap(nn.Embedding(models.VOCAB, 6, padding_idx=1)), _ids, _L),
    HostCase("tied", models.Tied, _ids, {"embed.weight": "lookup"}),
    HostCase("attention", lambda: models.Attention(batch_first=True), _vectors(3, 8), _IN, _OUT),
    HostCase("attention-seq-first", lambda: models.Attention(batch_first=False), _second(3, 8), _IN, _OUT, batch_dim=1),
    HostCase("attention-qkv", lambda: models.Attention(batch_first=True, kdim=5, vdim=7), _vectors(3, 8), _QKV, _OUT),
    HostCase("parameter", lambda: models.Matrix(6, 8), _vectors(3, 8), {"proj": "plain"}),
    HostCase("parameter-in-out", lambda: models.Matrix(8, 6, turned=True), _vectors(3, 8), {"proj": "plain"}),
    HostCase("experts", lambda: models.Experts(turned=False), _vectors(8), {"w": "plain"}),
    HostCase("experts-transposed", lambda: models.Experts(turned=True), _vectors(8), {"w": "transposed"}),
    HostCase("experts-mixtral", models.Mixtral, _vectors(8), _EXPERTS),
    HostCase("experts-gpt-oss", models.GptOss, _vectors(8), dict.fromkeys(_EXPERTS, "transposed")),
]

DTYPES = [torch.float32, torch.bfloat16, torch.float64]

_NO_BIAS = "this kind of layer has no bias to add to; use bias=False"
_NOT_ROWS = "Rows trains rows of a matrix, such as an embedding"

#: (method, host) → the words of the refusal. Why: a convolution and a stack of experts are no tables of rows;
#: an embedding, or a forward of its own, has no place where a bias would be added.
FORBIDDEN = {
    **{("rows", h.name): _NOT_ROWS for h in HOSTS if "conv" in h.weights.values() or h.name.startswith("experts")},
    **{("lora-bias", h.name): _NO_BIAS for h in HOSTS
       if h.name.startswith(("embedding", "attention", "parameter", "experts", "tied", "linear-subclass"))},
}

CELLS = [(m, h) for m in METHODS for h in HOSTS if (m.name, h.name) not in FORBIDDEN]
