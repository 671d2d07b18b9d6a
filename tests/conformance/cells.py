"""The axes of the matrix: what is a method, what is a host, which cells are forbidden and why.

A new method is one line in METHODS, a new host one line in HOSTS.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from veneer import AdaLoRA, DoRA, Full, LoHa, LoKr, LoRA, RandLoRA, Rows, VBLoRA, VeRA
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
    #: kinds of weights on which these options mean something of their own; None = all
    kinds: tuple[str, ...] | None = None
    identity_at_start: bool = True
    #: a file for other tools holds the same change by other parameters
    made_plain: bool = False

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


def _from(start: Callable[[Tensor], tuple[Tensor, Tensor]], scale: float) -> Callable[[Tensor, Params], Tensor]:
    """LoRA that begins at a pair found from W, one matrix after the other and in fp32: W + s(BA − B₀A₀)."""
    def dense(W: Tensor, p: Params) -> Tensor:
        begun = [start(matrix) for matrix in W.float().reshape(-1, *W.shape[-2:])]
        A, B = (torch.stack(part).reshape(p[name].shape).to(p[name].dtype)
                for name, part in zip("AB", zip(*begun, strict=True), strict=True))
        return W + scale * (p["B"] @ p["A"] - B @ A)

    return dense


def _pissa(rank: int, scale: float) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    def start(W: Tensor) -> tuple[Tensor, Tensor]:
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        root = (S[:rank] / scale).sqrt()
        return root[:, None] * Vh[:rank], U[:, :rank] * root

    return start


def _olora(rank: int) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    def start(W: Tensor) -> tuple[Tensor, Tensor]:
        Q = torch.linalg.qr(W[:, :rank])[0]
        return Q.mT @ W, Q

    return start


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


def _adalora(scale: float) -> Callable[[Tensor, Params], Tensor]:
    return lambda W, p: W + scale * sum(
        p["E"][..., i, None, None] * p["B"][..., :, i, None] * p["A"][..., None, i, :] for i in range(p["E"].shape[-1]))


def _loha(scale: float) -> Callable[[Tensor, Params], Tensor]:
    def dense(W: Tensor, p: Params) -> Tensor:
        first, second = (_sum_of_outer(W, p, f"w{i}_a", f"w{i}_b", f"t{i}") for i in (1, 2))
        return W + scale * first * second

    return dense


def _sum_of_outer(W: Tensor, p: Params, a: str, b: str, core: str) -> Tensor:
    """Σᵢ a[:, i] b[i, :], or with a core over kernel positions k: Σᵢⱼ core[i, j, k] a[i, :] b[j, :]."""
    if core not in p:
        return sum(p[a][..., :, i, None] * p[b][..., i, None, :] for i in range(p[a].shape[-1]))
    t, parts = p[core].flatten(2), []
    for k in range(t.shape[-1]):
        parts.append(sum(t[i, j, k] * torch.outer(p[a][i], p[b][j])
                         for i in range(t.shape[0]) for j in range(t.shape[1])))
    return torch.stack(parts, dim=-1).flatten(1)


def _lokr(scale: float) -> Callable[[Tensor, Params], Tensor]:
    def factor(W: Tensor, p: Params, i: int) -> Tensor:
        return p[f"w{i}"] if f"w{i}" in p else _sum_of_outer(W, p, f"w{i}_a", f"w{i}_b", f"t{i}")

    def dense(W: Tensor, p: Params) -> Tensor:
        left, right = factor(W, p, 1), factor(W, p, 2)
        if W.dim() == 3:
            return W + scale * torch.stack([torch.kron(x, y) for x, y in zip(left, right, strict=True)])
        return W + scale * torch.kron(left, right)

    return dense


SIZE = (40, 40)  # of the shared bases: at least that of every weight here


def _vera(W: Tensor, p: Params) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    rank, (out, in_) = p["d"].shape[-1], W.shape[-2:]
    # nn.init's Kaiming bound for a rectifier over the second dimension, A first
    A = torch.empty(rank, SIZE[1]).uniform_(-math.sqrt(6 / SIZE[1]), math.sqrt(6 / SIZE[1]), generator=generator)
    B = torch.empty(SIZE[0], rank).uniform_(-math.sqrt(6 / rank), math.sqrt(6 / rank), generator=generator)
    A, B = A[:, :in_].to(p["d"].dtype), B[:out].to(p["d"].dtype)
    return W + torch.diag_embed(p["b"]) @ B @ torch.diag_embed(p["d"]) @ A


def _randlora(scale: float) -> Callable[[Tensor, Params], Tensor]:
    def dense(W: Tensor, p: Params) -> Tensor:
        lam, gamma = p["lambda_"], p["gamma"]
        rank, count, short = lam.shape[-2], lam.shape[-1], gamma.shape[-1]
        generator = torch.Generator().manual_seed(7)

        def draw(*size: int) -> Tensor:
            bound = 1 / math.sqrt(size[-1])
            return torch.empty(size, dtype=torch.bfloat16).uniform_(-bound, bound, generator=generator)

        A = draw(rank, 1, SIZE[1])
        B = torch.cat([draw(SIZE[0], 1, rank) for _ in range(math.ceil(SIZE[1] / rank))], 1)
        A, B = ((t / t.std()).to(lam.dtype) for t in (A, B))
        long = max(W.shape[-2:])
        wide = B[:long, :count].reshape(long, count * rank)
        change = torch.zeros(*W.shape[:-2], long, short, dtype=lam.dtype)
        for i in range(rank):
            for j in range(count):
                row = lam[..., i, j, None] * A[i, 0, :short] * gamma[..., j, :]
                change = change + wide[:, i * count + j, None] * row.unsqueeze(-2)
        return W + scale * (change if W.shape[-1] <= W.shape[-2] else change.mT)

    return dense


def _vblora(W: Tensor, p: Params) -> Tensor:
    bank, chosen = p["shared.bank"], 2

    def vectors(logits: Tensor) -> Tensor:
        """One mixed sub-vector per leading index, by sorting."""
        order = logits.argsort(-1, descending=True)[..., :chosen]
        share = torch.exp(logits.gather(-1, order) - logits.gather(-1, order).logsumexp(-1, keepdim=True))
        return torch.einsum("...k,...kl->...l", share, bank[order])

    A = vectors(p["logits_A"])  # (*batch, r, tiles, length)
    B = vectors(p["logits_B"])  # (*batch, tiles, r, length)
    A = torch.cat(A.unbind(-2), -1)[..., :W.shape[-1]]
    B = torch.cat(B.unbind(-3), -1)[..., :W.shape[-2]]  # (*batch, r, out)
    return W + torch.einsum("...ro,...ri->...oi", B, A)


METHODS = [
    MethodCase("lora", LoRA(rank=3), _lora(1.0)),
    MethodCase("rslora", LoRA(rank=4, alpha=6, rank_stabilized=True), _lora(6 / math.sqrt(4))),
    MethodCase("lora-bias", LoRA(rank=3, alpha=1.5, bias=True), _lora(0.5)),
    MethodCase("pissa", LoRA(rank=2, alpha=5, init="pissa"), _from(_pissa(2, 2.5), 2.5), made_plain=True),
    MethodCase("olora", LoRA(rank=2, init="olora"), _from(_olora(2), 1.0), made_plain=True),
    MethodCase("dora", DoRA(LoRA(rank=3)), _dora(_lora(1.0)), _dora(_lora(1.0), dim=-2)),
    MethodCase("full", Full(), lambda W, p: p["weight"]),
    MethodCase("rows", Rows(ROWS), _rows),
    MethodCase("circulant", Circulant(scale=0.5), _circulant),
    MethodCase("adalora", AdaLoRA(init_r=3, target_r=2, total_step=10, alpha=300), _adalora(100.0)),
    MethodCase("loha", LoHa(rank=1, alpha=20), _loha(20.0)),
    MethodCase("loha-dense", LoHa(rank=3, alpha=30), _loha(10.0)),
    MethodCase("loha-conv", LoHa(rank=2, alpha=60, effective_conv=True), _loha(30.0), kinds=("conv",)),
    MethodCase("lokr", LoKr(rank=8, alpha=12), _lokr(1.5)),
    MethodCase("lokr-both", LoKr(rank=1, alpha=3, decompose_both=True, init="lycoris"), _lokr(3.0)),
    MethodCase("lokr-conv", LoKr(rank=1, effective_conv=True), _lokr(1.0), kinds=("conv",)),
    MethodCase("vera", VeRA(rank=5, d_initial=1.0, seed=7, bases=SIZE), _vera),
    MethodCase("vblora", VBLoRA(rank=3, num_vectors=7, vector_length=4, init_vector_bank_bound=0.25), _vblora,
               identity_at_start=False),
    MethodCase("randlora", RandLoRA(rank=3, alpha=6, seed=7, bases=SIZE), _randlora(2.0)),
]
#: every additive method once more inside of DoRA
METHODS += [MethodCase(f"dora-{case.name}", DoRA(case.method), _dora(case.dense), _dora(case.dense, dim=-2), case.kinds,
                       case.identity_at_start, case.made_plain)
            for case in METHODS if case.name not in ("lora", "rslora", "lora-bias", "dora", "full", "rows")]


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

ALL = [(m, h) for m in METHODS for h in HOSTS if m.kinds is None or set(m.kinds) & set(h.weights.values())]
CELLS = [(m, h) for m, h in ALL if (m.name, h.name) not in FORBIDDEN]
